"""What limits what a result shows: the caveats of the literature that apply to what was run, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import xarray as xr

from tracepatch.checklist import Checklist
from tracepatch.combining import datasets_of, main_variable, over_pairs
from tracepatch.errors import plural
from tracepatch.plan import Status
from tracepatch.resampling import cluster_count
from tracepatch.results import Result

SOURCES = {
    "Heimersheim & Nanda 2024": "https://arxiv.org/abs/2404.15255",
    "Li & Janson 2024": "https://arxiv.org/abs/2409.09951",
    "McGrath et al. 2023": "https://arxiv.org/abs/2307.15771",
    "Meng et al. 2022": "https://arxiv.org/abs/2202.05262",
    "Miller et al. 2024": "https://arxiv.org/abs/2407.08734",
    "Nanda 2023": "https://www.neelnanda.io/mechanistic-interpretability/attribution-patching",
    "Rushing & Nanda 2024": "https://arxiv.org/abs/2402.15390",
    "Zhang & Nanda 2023": "https://arxiv.org/abs/2309.16042",
}
SURE, MANY = 6, 20  # pairs that share no prompt: for a test to get below 0.05; for odd ones not to move a mean much
LOW = 0.02  # a mean probability that can hardly fall
METRICS = {
    "logit_diff": (
        "The logit difference rises where the right answer gains and where the wrong one loses, and does not see other "
        "tokens. `effect_answer` and `effect_wrong` in the result tell the two apart."
    ),
    "logit": "A single logit moves also when all logits move together, which changes no prediction.",
    "prob": (
        "A probability saturates: near 0 it cannot fall and near 1 it cannot rise, so that components which work "
        "against the answer stay invisible."
    ),
    "log_prob": "A log-probability falls where any other token gains, whether or not that has to do with the task.",
    "rank": "A rank jumps, depends on all other tokens, and is 0 where the answer wins by a little or by far.",
    "kl": "KL has no sign, and sees every change of the distribution, whether or not it has to do with the task.",
    "cross_entropy": "The loss is a mean over all positions, most of which are not about the answer.",
}


@dataclass(frozen=True)
class Caveat:
    """One caveat: what it is about, what it says, who showed it, and the parts of the experiment that it concerns."""

    about: str
    text: str
    sources: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


def caveats_of(
    results: Mapping[str, Sequence[xr.Dataset]], checklists: Mapping[str, Checklist] | None = None
) -> list[Caveat]:
    """The caveats that apply to an experiment, the most particular first.

    Args:
        results: Part of the experiment → its results, such as one for each model.
        checklists: Model → the checks of its prompts.
    """
    found: dict[tuple[str, str], Caveat] = {}
    for rule in (_numbers, _pairs, _direction, _metric, _always):  # rule by rule, so that equals stand together
        for part, several in results.items():
            for result in several:
                for caveat in rule(result):
                    known = found.setdefault((caveat.about, caveat.text), caveat)
                    parts = tuple(dict.fromkeys((*known.parts, part)))
                    found[caveat.about, caveat.text] = replace(known, parts=parts)
    every = [result for several in results.values() for result in several]
    whole = [*_prompts(checklists or {}), *_one_direction(every), *_noise(every), *_above(results)]
    return [*whole, *found.values()]


def _prompts(checklists: Mapping[str, Checklist]) -> Iterator[Caveat]:
    for model, checklist in checklists.items():
        for check in checklist.checks:
            if check.verdict != "ok":
                yield Caveat("Prompts", f"{model}: {check.sentence}.")


def _one_direction(results: Sequence[xr.Dataset]) -> Iterator[Caveat]:
    ways = {(str(result.attrs.get("base")), str(result.attrs.get("written"))) for result in results}
    others = {("corrupted", "clean"): "noising", ("clean", "corrupted"): "denoising"}
    if len(ways) != 1 or not ways <= set(others):
        return
    other = others[ways.pop()]
    if all(str(result.attrs.get("pairs", "")).endswith("both roles") for result in results):
        text = (
            f"Only one direction was run, and as every pair stands in both roles, {other} would be the same runs with "
            "the sign turned. To tell what is necessary from what is sufficient, corrupt prompts so that the answer "
            "is lost, not exchanged, and run both."
        )
    else:
        text = (
            "Only one direction was run. What is sufficient need not be necessary, nor the other way round: run "
            f"{other} too before saying that a site matters, or does not."
        )
    yield Caveat("One direction", text, ("Heimersheim & Nanda 2024",))


def noise_of(results: Sequence[xr.Dataset]) -> dict[tuple[str, str], tuple[float, str]]:
    """(Model, metric) → how far unpatched rows drifted at most beside the patched ones, and the unit."""
    most: dict[tuple[str, str], tuple[float, str]] = {}
    for result in results:
        metrics = list(json.loads(result.attrs.get("metrics", "{}")))
        units = str(result[main_variable(result)].attrs.get("units", "")).split(", ")
        units = units if len(units) == len(metrics) else units[:1] * len(metrics)
        floors = json.loads(result.attrs.get("noise_floor", "{}"))
        for name, unit in zip(metrics, units, strict=True):
            if name in floors:
                key = str(result.attrs.get("model", "")), name
                most[key] = max(most.get(key, (0.0, unit)), (float(floors[name]), unit))
    return most


def short(number: float) -> str:
    """One digit, as the checks of a run write it."""
    return f"{number:.1g}".replace("e-0", "e-")


def checks_of(results: Sequence[Result]) -> str:
    """What the checks of several runs of a model found, in one line; each run's own line has it in full."""
    told = [str(result.attrs["checks"]) for result in results]
    if all(text == "off" for text in told):
        return "off"
    still = sum("patches change nothing" in text for text in told)
    noise = noise_of([one for result in results for one in datasets_of(result).values()]).values()
    floors = ", ".join(f"{short(floor)} {unit}".strip() for floor, unit in noise)
    unchanged = f"; patches change nothing in {plural(still, 'part')}" if still else ""
    return f"passed in {plural(len(results), 'part')}; noise up to {floors}{unchanged}"


def _noise(results: Sequence[xr.Dataset]) -> Iterator[Caveat]:
    most = noise_of(results)
    several = len({name for _, name in most}) > 1
    told = [
        f"{short(floor)} {unit}".strip() + f" on {model}" + f" ({name})" * several
        for (model, name), (floor, unit) in most.items()
    ]
    if told:
        text = (
            f"Unpatched rows beside the patched ones drift by up to {', '.join(told)}. Effects of that size are noise."
        )
        yield Caveat("Noise floor", text)


def _above(results: Mapping[str, Sequence[xr.Dataset]]) -> Iterator[Caveat]:
    """Normalized effects beyond the whole difference."""
    told = []
    for part, several in results.items():
        for result in several:
            mean = over_pairs(result)
            if "normalized" in mean and (most := float(mean["normalized"].max())) > 1 + LOW:
                told.append(f"{most:.2f} ({part}, {result.attrs.get('model', '')})")
    if told:
        text = (
            f"Normalized effects go up to {', '.join(told)}. That is no error: more than everything comes back where "
            "what works against the answer stays switched off."
        )
        yield Caveat("Above 1", text, ("Heimersheim & Nanda 2024",))


def _numbers(result: xr.Dataset) -> Iterator[Caveat]:
    """What depends on the numbers of a result."""
    mean, model = over_pairs(result), str(result.attrs.get("model", "the model"))
    if "status" in result and (pending := int((result["status"] == Status.PENDING).sum())):
        yield Caveat("Not complete", f"On {model}, {plural(pending, 'cell')} of single pairs are not measured yet.")
    checks = str(result.attrs.get("checks", ""))
    if checks == "off":
        yield Caveat("Unchecked", f"On {model}, runs did not check themselves.")
    elif "patches change nothing" in checks:
        yield Caveat("No effect at all", f"On {model}, patches change nothing, up to rounding.")
    if close := json.loads(result.attrs.get("pairs_too_close", "[]")):
        text = f"On {model}, clean and corrupted runs are too close to divide by in {plural(len(close), 'pair')}: "
        yield Caveat("No difference", f"{text}{', '.join(map(str, close))}. Read `effect` there, not `normalized`.")
    if "prob" in json.loads(result.attrs.get("metrics", "{}")) and "corrupted" in mean:
        values = mean["corrupted"].sel(metric="prob") if "metric" in mean["corrupted"].dims else mean["corrupted"]
        if (low := float(values.mean())) < LOW:
            text = f"On {model}, the corrupted run gives the answer a probability of {low:.2g}, which cannot fall."
            yield Caveat("Near-zero baseline", text, ("Zhang & Nanda 2023",))


def _pairs(result: xr.Dataset) -> Iterator[Caveat]:
    main = main_variable(result)
    if "pair" not in result[main].dims:
        return
    pairs, clusters = result.sizes["pair"], cluster_count(result)
    told = plural(pairs, "pair") + ("" if clusters == pairs else f" in {clusters} clusters that share no prompt")
    if clusters < SURE:
        text = (
            f"There are {told}. With fewer than {SURE} of them, no test can tell an effect from chance at 5 %, and "
            "intervals are too short. Take more prompts before reading anything into small effects."
        )
        yield Caveat("Few pairs", text)
    elif clusters < MANY:
        text = f"There are {told}: an odd one can still move a mean. Look at single pairs, too."
        yield Caveat("Number of pairs", text)
    if "normalized" in result:
        text = (
            "Over pairs, `normalized` is the mean effect divided by the mean clean − corrupted difference. A mean of "
            "the pairs' own ratios is another number, often a larger one."
        )
        yield Caveat("Ratio of means", text, ("Miller et al. 2024",))
    known = [Status.MEASURED, Status.ESTIMATED]
    measured = int(over_pairs(result)["status"].isin(known).sum()) if "status" in result else 0
    if clusters >= SURE and measured >= MANY:
        text = (
            f"{measured:,} cells have a number. By chance alone, about {measured / 20:,.0f} of their 95 % intervals "
            "leave 0 out. The p-values in the tables are Holm's, which allow for all cells of a part."
        )
        yield Caveat("Many cells", text)


def _direction(result: xr.Dataset) -> Iterator[Caveat]:
    base, written = str(result.attrs.get("base", "")), str(result.attrs.get("written", ""))
    both = "verdict" in result
    if both or (base, written) == ("corrupted", "clean"):
        text = (
            "Denoising: clean values are written into the corrupted run. An effect says that a site carries enough "
            "to bring the answer back, given everything else in that run; not that nothing else does. Of two parts "
            "that are both needed, neither shows alone."
        )
        yield Caveat("Sufficient, not necessary", text, ("Heimersheim & Nanda 2024",))
    if both or (base, written) == ("clean", "corrupted"):
        text = (
            "Noising: corrupted values are written into the clean run. A loss says that a site is needed. A small "
            "one is weak evidence that it is not: other parts may step in, and of two that are each enough neither "
            "shows alone."
        )
        yield Caveat("Necessary, not sufficient", text, ("McGrath et al. 2023", "Rushing & Nanda 2024"))
    if written.lstrip("-").replace(".", "").strip("0") == "" and "0" in written:
        text = (
            "Zero is written. A component's usual output may be far from zero, so that zeroing breaks what has "
            "nothing to do with the task. On IOI, zeroing ranked components as counterfactual values did with a "
            "correlation of 0.59, means and resampled values with 0.83."
        )
        yield Caveat("Zero is not neutral", text, ("Li & Janson 2024",))
    if "gaussian" in str(result.attrs.get("plan", "")):
        text = (
            "Gaussian noise makes activations that no prompt gives, and picks out other heads than replaced tokens do. "
            "Repeat with replaced tokens what matters."
        )
        yield Caveat("Noise", text, ("Zhang & Nanda 2023", "Meng et al. 2022"))


def _metric(result: xr.Dataset) -> Iterator[Caveat]:
    for name in json.loads(result.attrs.get("metrics", "{}")):
        own = f"{name} is a metric of your own: whether it saturates, jumps or can fall decides what can be seen."
        sources = ("Zhang & Nanda 2023",) if name == "prob" else ()
        yield Caveat(f"Metric {name}", METRICS.get(name, own), sources)


def _always(result: xr.Dataset) -> Iterator[Caveat]:
    main = main_variable(result)
    if main == "estimate":
        text = (
            "These are estimates, not effects. They are good for small changes, and poor for large ones such as the "
            "residual stream, the first MLP and attention that is saturated. Measure the largest with tp.patch."
        )
        yield Caveat("Estimates", text, ("Nanda 2023",))
    components = str(result.attrs.get("component", "")).split(", ")
    if any(name.startswith("resid_") for name in components) and {"layer", "pos"} <= set(result[main].dims):
        text = (
            "In the residual stream, the changed token entering the first layer and the last token leaving the last "
            "one are the whole difference by construction. The finding is where one stripe gives way to the other."
        )
        yield Caveat("By construction", text)
    text = (
        "Patched runs mix two prompts into a state that no prompt gives. Results hold for these prompts, this "
        "corruption and this metric. A site is not a circuit: which sites talk to which takes joint rows, edges and "
        "new prompts."
    )
    yield Caveat("What patching shows", text, ("Heimersheim & Nanda 2024", "Miller et al. 2024"))
