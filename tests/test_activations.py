"""Metrics that read activations: against the oracle's live values in every form, what is pruned, and where forwards end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap, made_up_pairs, one_name, pick
from test_forms import OWN, Chance, numbers
from test_forms import tiny as wide
from test_oracle import INSIDE
from test_scripts import agree as scripts_agree
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.architecture import architecture_of
from tracepatch.forms import allowed
from tracepatch.jobs import EAGER
from tracepatch.sites import COMPONENTS, SCALES, Site
from tracepatch.table import FORMS, Form

pytestmark = pytest.mark.filterwarnings("ignore:The patches change nothing")
WORDS = [f"w{i}" for i in range(30, 60)]
OFTEN = ("gpt2", "llama", "gemma2", "mixtral", "gpt_neox")
FLAT = ("q_in", "k_in", "v_in", "cross_attn_out", "logits_in_scale")  # what no table has


@cache
def tiny(model_type: str) -> Any:
    return tp.load(build(model_type, layers=3), tokenizer())


def number(x: torch.Tensor) -> torch.Tensor:
    """One number that depends on every entry, each in its own way."""
    flat = x.reshape(len(x), -1).clamp(min=-1e3)  # masked scores
    return (flat * torch.linspace(-1, 1.5, flat.shape[1], device=x.device)).sum(-1) + flat[:, 0].square()


def reading(component: str, index: Any, name: str = "") -> tp.Metric:
    return tp.metric(number, name or f"{component}{index}", component=component, index=index)


def offered(model: Any, layer: int = 1, but: Sequence[str] = ()) -> list[str]:
    found = architecture_of(model)
    return [c for c in COMPONENTS if found.offers(c, layer) and c not in (*SCALES, "logits", *but)]


def places(model: Any, component: str, chance: random.Random, length: int = 7) -> Any:
    """A random index: a layer, positions, units and sources, each as an integer, a slice or a list."""
    kind, depth = COMPONENTS[component], len(architecture_of(model))
    sizes = {"pos": length, "dest": length, "src": length}
    sizes[kind.unit or ""] = architecture_of(model).units(component, 0)
    index: list[Any] = []
    for dim in kind.index:
        if dim == "layer":
            index.append(chance.randrange(depth))
            continue
        n = sizes[dim]
        one, other = chance.randrange(n), chance.randrange(n)
        index.append(
            chance.choice(
                [one, one - n, -1, slice(None), slice(min(one, other), max(one, other) + 1), sorted({one, other})]
            )
        )
    return tuple(index)


def expected(slow: Slow, p: tp.Patching, row: Any, pair: int) -> list[float]:
    """Every metric of a row, by the oracle."""
    live = slow.reference.values(slow.ids[row.base, pair], slow.edits(row, pair))
    found = []
    for metric in p.metrics:
        if metric.site is None:
            found.append(float(gap(p.encoded)(live["logits", 0], pair)))
            continue
        site: Site = metric.site
        key = one_name(site.component, site.layer, len(p.architecture))
        value = pick(live[key], site, COMPONENTS[site.component].unit is not None)
        found.append(float(number(value[None].float())))
    return found


def compared(model: Any, recorded: Sequence[tp.Patching], moves: bool = False) -> None:
    """The numbers of plans of the same rows, in several forms, are the oracle's."""
    p = recorded[0]
    said = " ".join(map(str, (*p.rows, *p.edited.values(), *(m.site for m in p.metrics))))
    slow = Slow(tp.models.module_of(model), p.encoded, eager=any(n in said for n in EAGER), edited=p.edited)
    wanted = np.array([[expected(slow, p, row, pair) for pair in range(len(p.encoded))] for row in p.rows])
    scale = 1 + np.abs(wanted).max((0, 1))
    for one in recorded:
        value = one.run(progress=False)["value"]
        value = value if "metric" in value.dims else value.expand_dims("metric")
        found = value.transpose("number", "pair", "metric").values
        form = next((batch.form for group in one.plan.groups for batch in group.batches), "nothing")
        error = np.abs(found - wanted) / scale
        worst = np.unravel_index(error.argmax(), error.shape)
        assert not moves or (np.abs(wanted - wanted[:1]).max((0, 1)) > 1e-3).mean() > 0.7, "few of them move"
        told = f"{form}: {p.metrics[worst[2]].name} of {p.rows[worst[0]]} on pair {worst[1]}"
        assert error.max() < 2e-5, f"{told}: {found[worst]} instead of {wanted[worst]}"


def forms_of(model: Any, eager: bool) -> list[Form]:
    refused = allowed(model, architecture_of(model), eager).refused
    return [form for form in FORMS if form not in refused]


def recorded(
    model: Any, pairs: tp.Pairs, metrics: Any, record: Callable[[tp.Patching], None], **options: Any
) -> Iterator[tp.Patching]:
    several = [metrics] if isinstance(metrics, tp.Metric) else list(metrics)
    with tp.patching(model, pairs, several, form="flat") as p:
        record(p)
    said = " ".join(map(str, (*p.rows, *p.edited.values(), *(m.site for m in p.metrics))))
    yield p
    for form in forms_of(model, any(n in said for n in EAGER))[:-1]:
        with tp.patching(model, pairs, several, form=form, **options) as p:
            record(p)
        yield p


def sweep(p: tp.Patching, names: Sequence[str], thin: int = 3) -> None:
    """A few sites of each component in each layer, into the corrupted run and into the clean one by turns."""
    count = 0
    for name in names:
        kind = COMPONENTS[name]
        for layer in range(len(p.architecture)) if kind.layered else (0,):
            units = p.architecture.units(name, layer)
            sites: list[Any] = [
                (pos, *unit)
                for pos in (slice(None), 2, -1, [3, 5])
                for unit in ([(0,), ([0, units - 1],)] if kind.unit else [()])
            ]
            if kind.attends:
                sites = [(0, slice(3, None), slice(None)), (slice(None), -1, [0, 2]), (1, 4, 2), ([0, units - 1], -1)]
            for site in sites[count % thin :: thin]:
                base, other = ((p.corrupted, p.clean), (p.clean, p.corrupted))[count // 2 % 2]
                at = (layer, *site) if kind.layered else site
                with p.row(number=count):
                    getattr(base, name)[at] = getattr(other, name)[at]
                count += 1


# ------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("model_type", OFTEN)
def test_every_component_can_be_read(model_type: str) -> None:
    """All of them at once, and beside logits: nothing ends, everything is read where it passes by."""
    model = tiny(model_type)
    chance = random.Random(model_type)
    names = offered(model, but=("embed",))
    metrics = [reading(name, places(model, name, chance)) for name in offered(model)] + [tp.logit_diff]
    tables = [m for m in metrics if m.site is None or m.site.component not in FLAT]
    for group in (metrics, tables):
        plans = list(recorded(model, made_up_pairs(WORDS), group, lambda p: sweep(p, names, thin=4)))
        compared(model, plans, moves=True)
    assert plans[1].plan.groups[0].batches[0].form == "packed"


def alone(model_type: str, component: str, seed: int) -> None:
    """One metric: what is later is not computed, and most rows are proved; the oracle computes and measures all."""
    model, chance = tiny(model_type), random.Random(f"{model_type} {component} {seed}")
    metric = reading(component, places(model, component, chance))
    seen = reference.PLACES[model_type].interface  # by the oracle
    names = offered(model, but=() if seen else INSIDE)

    def record(p: tp.Patching) -> None:
        sweep(p, names, thin=6)

    plans = list(recorded(model, made_up_pairs(WORDS), metric, record))
    compared(model, plans)
    for p in plans:
        assert p.plan.until <= 3 or component == "logits_in"
        assert p.plan.jobs < p.plan.proofs.size
    unpruned = list(recorded(model, made_up_pairs(WORDS)[:1], metric, record, prune=False))
    compared(model, unpruned[1:] or unpruned)


@pytest.mark.parametrize("component", [c for c in COMPONENTS if c not in (*SCALES, "logits", "cross_attn_out")])
def test_each_component_alone(component: str) -> None:
    model_type = "mixtral" if component in ("router_logits", "experts_out") else "gpt2"
    if component not in offered(tiny(model_type)):
        model_type = "llama"
    alone(model_type, component, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", [*OFTEN, "olmo2", "gpt_oss", "opt", "falcon", "gpt_neo", "mpt", "bloom"])
def test_each_component_alone_on_many_models(model_type: str, seed: int) -> None:
    inside = reference.PLACES[model_type].interface
    for component in offered(tiny(model_type)):
        if inside or component not in INSIDE:
            alone(model_type, component, seed)


# ------------------------------------------------------------------------------------------------- by chance


class Looking(Chance):
    """Chance with one to three metrics that read activations, some beside logits."""

    def look(self, model: Any) -> list[tp.Metric]:
        r, found = self.random, []
        names = offered(model, but=INSIDE if self.plain and self.model_type in OWN else ())
        for i in range(r.choice([1, 1, 2, 3])):
            name = r.choice(names)
            found.append(reading(name, places(model, name, r, self.length), f"{i}: {name}"))
        return found + [tp.logit_diff] * (r.random() < 0.4)


def by_chance(model_type: str, seed: int, plain: bool) -> None:
    chance = Looking(model_type, seed, plain)
    model = wide(model_type, layers=chance.random.choice([2, 3]))
    pairs, options = chance.pairs(), chance.options()
    metrics = chance.look(model)
    state = chance.random.getstate()

    def record(p: tp.Patching) -> None:
        chance.random.setstate(state)
        chance.record(p)

    if plain:
        compared(model, list(recorded(model, pairs, metrics, record, **options)))
        return
    plans = list(recorded(model, pairs, metrics, record, **options))
    with tp.patching(model, pairs, metrics, form="flat", prune=False) as p:
        record(p)
    try:
        wanted = numbers(p)
        for one in plans:
            np.testing.assert_allclose(numbers(one), wanted, atol=2e-5 * (1 + np.nanmax(np.abs(wanted))), rtol=0)
    except errors.MeasurementError as error:
        if "gave NaN or inf" not in str(error):  # a pattern that is renormalized to 0
            raise


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("model_type", "seed"), [(t, s) for t in ("gpt2", "llama", "gpt_neo") for s in range(4)])
def test_random_recipes(model_type: str, seed: int, plain: bool) -> None:
    by_chance(model_type, seed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "mixtral", "gpt_oss", "opt", "phi", "falcon", "gpt_neo", "mpt"])  # fmt: skip
def test_many_random_recipes(model_type: str, plain: bool) -> None:
    for seed in range(100, 130):
        by_chance(model_type, seed, plain)


# ------------------------------------------------------------------------------------------------- where forwards end


def weights_used(monkeypatch: pytest.MonkeyPatch, model: Any, run: Callable[[], Any]) -> set[str]:
    """The names of the matrices that were multiplied with meanwhile."""
    names = {id(parameter): name for name, parameter in tp.models.module_of(model).named_parameters()}
    plain, used = torch.nn.functional.linear, set()

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        used.add(names.get(id(weight), ""))
        return plain(x, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", linear)
        run()
    return used


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("component", "index", "until"), [("z", (1, -1, 0), 2), ("resid_pre", (1, 3), 1), ("pattern", (0, 1, -1, 2), 1), ("resid_post", (2, -1), 3)])  # fmt: skip
def test_nothing_above_the_last_read_is_computed(
    component: str, index: Any, until: int, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    with tp.patching(model, made_up_pairs(WORDS), reading(component, index), form=form) as p:
        sweep(p, ["resid_pre", "z", "mlp_out"])
    used = weights_used(monkeypatch, model, lambda: p.run(progress=False))
    layers = {int(name.split(".")[2]) for name in used if name.startswith("model.layers.")}
    assert layers == set(range(until))
    assert not any("lm_head" in name or "embed_tokens" in name for name in used)
    assert p.plan.until == until
    upper = ["2 layers and the unembedding are", "1 layer and the unembedding are", "the unembedding is"][until - 1]
    assert (
        f"\n  ends         above layer {until - 1}: nothing later is read, so {upper} not computed\n"
        in p.plan.explain()
    )
    with tp.patching(model, made_up_pairs(WORDS), [reading(component, index), tp.logit_diff], form=form) as p:
        sweep(p, ["resid_pre", "z", "mlp_out"])
    assert "\n  ends " not in p.plan.explain()
    used = weights_used(monkeypatch, model, lambda: p.run(progress=False))
    assert len({name.split(".")[2] for name in used if name.startswith("model.layers.")}) == 3


@pytest.mark.parametrize(("model_type", "why"), [("bart", "the model's code fails (RuntimeError"), ("mamba", ""), ("bloom", ""), ("gptj", "")])  # fmt: skip
def test_models_whose_code_does_not_end(model_type: str, why: str) -> None:
    """They are computed to the end, and the plan says so."""
    model = tp.load(build(model_type, layers=3), tokenizer())
    with tp.patching(
        model, made_up_pairs(WORDS)[:2], reading("mlp_out" if model_type != "mamba" else "attn_out", (1, -1))
    ) as p:
        for layer in range(3):
            with p.row(number=layer):
                p.corrupted.resid_pre[layer, -1] = 0.5 * p.clean.resid_pre[layer, 0]
    assert (p.plan.until == 2) == (not why)
    assert (f"although nothing there is read: {why}" in p.plan.explain()) == bool(why)
    value = p.run(progress=False)
    moved = abs(value["effect"]).max("pair") > 1e-3
    assert moved.values.tolist() == [True, True, False]
    if model_type in reference.PLACES and not why:
        compared(model, [p])


def test_rows_that_reach_further_are_computed_further(gpt2: Any, pairs: tp.Pairs) -> None:
    """What rows save, take from worlds, or write although it cannot matter."""
    metric = reading("z", (0, -1, 0))

    def plan(record: Callable[[tp.Patching], None], **options: Any) -> tp.Patching:
        with tp.patching(gpt2, pairs, metric, **options) as p:
            with p.row(number=0):
                p.corrupted.resid_pre[0, 9:] = p.clean.resid_pre[0, 9:]
            with p.row(number=1):
                record(p)
        return p

    def late(p: tp.Patching) -> None:
        p.corrupted.mlp_out[2, -1] = 0

    def saves(p: tp.Patching) -> None:
        p.save(p.corrupted.resid_pre[2, -1])

    def takes(p: tp.Patching) -> None:
        p.corrupted.resid_pre[0, -1] = p.clean.resid_pre[1, -1]

    def logits(p: tp.Patching) -> None:
        p.save(p.corrupted.logits[-1])

    for record, options, until in (
        (late, {}, 1),
        (late, {"prune": False}, 3),
        (saves, {}, 2),
        (takes, {}, 1),
        (logits, {}, 4),
    ):
        p = plan(record, **options)
        assert p.plan.until == until
        result = p.run(progress=False)
        assert float(abs(result["effect"].sel(number=0)).min()) > 1e-4
        assert record is takes or float(abs(result["effect"].sel(number=1)).max()) < 1e-5


# ------------------------------------------------------------------------------------------------- what is pruned


def proofs(model: Any, metrics: Any, write: Callable[[tp.Patching], None]) -> str:
    with tp.patching(model, ioi_pairs(1), metrics) as p, p.row():
        write(p)
    return tp.plan.Proof(p.plan.proofs[0, 0]).name


@pytest.mark.parametrize(
    ("site", "metric", "proof"),
    [
        ("z[1, -1, 0]", ("z", (1, -1, 0)), "NONE"),
        ("z[1, -1, 1]", ("z", (1, -1, 0)), "UNREACHABLE"),  # another head of the same layer
        ("z[1, -1, 1]", ("resid_mid", (1, -1)), "NONE"),
        ("z[1, -2, 1]", ("resid_mid", (1, -1)), "UNREACHABLE"),  # beside it, with no attention left
        ("z[0, -2, 1]", ("resid_mid", (1, -1)), "NONE"),
        ("z[0, -1, 1]", ("resid_mid", (1, -2)), "UNREACHABLE"),  # after it
        ("mlp_out[1, -1]", ("mlp_act", (1, -1, 3)), "UNREACHABLE"),  # later in the layer
        ("mlp_out[1, -1]", ("resid_pre", (2, -1)), "NONE"),
        ("resid_post[1, -1]", ("resid_pre", (2, -1)), "NONE"),  # one place with two names
        ("resid_pre[2, -1]", ("resid_post", (1, -1)), "NONE"),
        ("k[1, -2, 0]", ("pattern", (1, 0, -1, 3)), "NONE"),
        ("k[1, -2, 0]", ("q", (1, -1, 0)), "UNREACHABLE"),
        ("q[1, -2, 0]", ("pattern", (1, 0, -1, 3)), "UNREACHABLE"),
        ("q_in[1, -1, 0]", ("k", (1, -1, 0)), "UNREACHABLE"),
        ("q_in[1, -1, 0]", ("q", (1, -1, 0)), "NONE"),
        ("logits[-1]", ("resid_post", (2, -1)), "UNREACHABLE"),
    ],
)
def test_what_cannot_reach_what_is_read(site: str, metric: tuple[str, Any], proof: str, gpt2: Any) -> None:
    component, _, index = site.partition("[")
    at = eval(f"({index.removesuffix(']')},)")

    def write(p: tp.Patching) -> None:
        getattr(p.corrupted, component)[at] = 1.0

    assert proofs(gpt2, reading(*metric), write) == proof
    both = proofs(gpt2, [reading(*metric), tp.logit_diff], write)
    assert both == proofs(gpt2, tp.logit_diff, write) if proof == "UNREACHABLE" else both == "NONE"


def test_a_function_carries_to_other_positions_and_heads(gpt2: Any) -> None:
    def spread(live: torch.Tensor) -> torch.Tensor:
        return live + live.mean(tuple(range(1, live.ndim)), keepdim=True)

    def positions(p: tp.Patching) -> None:
        p.corrupted.resid_pre[1, -1] += 1.0
        p.corrupted.resid_mid[1, :] = spread

    def heads(p: tp.Patching) -> None:
        p.corrupted.z[1, -1, 1] = 1.0
        p.corrupted.z[1, -1, :] = spread

    assert proofs(gpt2, reading("resid_post", (1, 2)), positions) == "NONE"
    assert proofs(gpt2, reading("z", (1, -1, 0)), heads) == "NONE"
    for metric, write in ((reading("resid_post", (1, 2)), positions), (reading("z", (1, -1, 0)), heads)):
        values = []
        for prune in (True, False):
            with tp.patching(gpt2, ioi_pairs(1), metric, prune=prune) as p, p.row():
                write(p)
            values.append(float(p.run(progress=False)["value"].values.item()))
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_whatever_is_pruned_measures_zero(name: str) -> None:
    model, pairs = toy(name), ioi_pairs(1, 2)
    chance = random.Random(name)
    for component in offered(model):
        metric = reading(component, places(model, component, chance, 12))
        results = []
        for prune in (True, False):
            with tp.patching(model, pairs, metric, prune=prune) as p:
                sweep(p, offered(model, but=("logits_in",)), thin=5)
            results.append(p.run(progress=False))
        zero = results[0]["status"] == tp.Status.PROVED_ZERO
        assert zero.any()
        scale = 1 + float(abs(results[1]["base"]).max())
        assert float(abs(results[1]["effect"].where(zero, 0)).max()) < 1e-5 * scale, component
        np.testing.assert_allclose(results[0]["value"], results[1]["value"], atol=1e-5 * scale)


# ------------------------------------------------------------------------------------------------- everything around it


def test_a_direction_of_each_pair(gpt2: Any, pairs: tp.Pairs) -> None:
    """The stream at the end, on the directions of the pair's own answers: what the lens sees of their difference."""
    rows = tp.models.module_of(gpt2).lm_head.weight.detach()
    norm = tp.models.module_of(gpt2).transformer.ln_f

    def lens(x: torch.Tensor, given: Any) -> torch.Tensor:
        """The logit difference, read off the stream."""
        right, wrong = (rows[given[need][:, 0]] for need in ("answer", "wrong"))
        return (norm(x) * (right - wrong)).sum(-1)

    metric = tp.metric(lens, unit="logits", component="resid_post", index=(-1, -1), needs=("answer", "wrong"))
    seen, whole = tp.patch(gpt2, pairs, "z", metric), tp.patch(gpt2, pairs, "z")
    for variable in ("value", "effect", "clean", "corrupted", "normalized"):
        np.testing.assert_allclose(seen[variable], whole[variable], atol=2e-4)
    assert seen.attrs[
        "metrics"
    ] == '{"lens": "of resid_post[-1, -1]: The logit difference, read off the stream."}'.replace("[-1,", "[2,")
    assert seen["effect"].attrs["units"] == "logits"


def test_it_is_what_rows_save(gpt2: Any, pairs: tp.Pairs) -> None:
    """What norms divide by and what modules give have no oracle: the same live values, kept in another way."""
    sites: list[tuple[str, Any]] = [
        (name, (1, [2, -1]) if COMPONENTS[name].layered else (-1,))
        for name in SCALES
        if architecture_of(gpt2).offers(name, 1)
    ]
    sites += [
        ("transformer.h.1.mlp.c_fc.output", -1),
        ("transformer.h.1.ln_2.input", slice(3, None)),
        ("transformer.ln_f.output", -1),
    ]
    for component, index in sites:
        with tp.patching(gpt2, pairs, reading(component, index, "read")) as p:
            for layer in range(2):
                with p.row(layer=layer):
                    p.corrupted.resid_mid[layer, 3:] = p.clean.resid_mid[layer, 3:]
                    world = p.corrupted
                    path, _, side = component.rpartition(".")
                    value = getattr(world, side)(path)[index] if path else getattr(world, component)[index]
                    p.save(value, reduce=number, name="saved")
        result = p.run(progress=False)
        assert float(abs(result["effect"]).max()) > 1e-3
        np.testing.assert_allclose(result["value"], p.saved["saved"], rtol=1e-5)
        with tp.patching(gpt2, pairs, reading(component, index, "read")) as bare:  # in a table, where there are such
            for layer in range(2):
                with bare.row(layer=layer):
                    bare.corrupted.resid_mid[layer, 3:] = bare.clean.resid_mid[layer, 3:]
        np.testing.assert_allclose(bare.run(progress=False)["value"], result["value"], rtol=1e-4)
        module = "." in component
        assert (bare.plan.groups[0].batches[0].form == "flat") == (module or component == "logits_in_scale")
        told = f"6 rows are flat: tables hold no rows that are read in {component}"
        assert (told in bare.plan.explain()) == (module or component == "logits_in_scale")


def test_edited_worlds_have_baselines_of_what_is_read() -> None:
    model = tiny("llama")

    def record(p: tp.Patching) -> None:
        noised = p.world("noised", of=p.clean)
        noised.embed[[1, 2]] += p.gaussian(1.0)
        twice = p.world("twice", of=noised)
        twice.mlp_out[0, 3] = 0
        for count, (layer, pos) in enumerate(p.grid("resid_mid", pos=[1, 4, -1])):
            with p.row(number=2 * count):
                noised.resid_mid[layer, pos] = p.clean.resid_mid[layer, pos]
            with p.row(number=2 * count + 1):
                twice.mlp_out[layer, pos] = noised.mlp_out[layer, pos]

    metrics = [reading("resid_pre", (1, -1)), reading("pattern", (1, 2, -1)), reading("v", (0, slice(None), 1))]
    plans = list(recorded(model, made_up_pairs(WORDS), metrics, record))
    compared(model, plans)
    slow = Slow(tp.models.module_of(model), plans[0].encoded, edited=plans[0].edited)
    for p in plans:
        result = p.run(progress=False)
        for world in ("clean", "noised", "twice"):
            wanted = [float(number(slow.values[world, i]["resid_pre", 1][-1][None])) for i in range(3)]
            np.testing.assert_allclose(result[world].sel(metric="resid_pre(1, -1)"), wanted, rtol=1e-4, atol=1e-4)


def test_a_directory_knows_what_is_read(gpt2: Any, pairs: tp.Pairs, tmp_path: Any) -> None:
    def run(metric: tp.Metric) -> tuple[Any, int]:
        with tp.patching(gpt2, pairs, metric, directory=tmp_path) as p:
            for layer in range(2):
                with p.row(layer=layer):
                    p.corrupted.resid_pre[layer, 9] = p.clean.resid_pre[layer, 9]
        assert np.isnan(p.partial()["value"]).all() or p.plan.measured["stored"]
        return p.run(progress=False), p.plan.measured["stored"]

    first, stored = run(reading("z", (1, -1, 0), "read"))
    assert not stored
    again, stored = run(reading("z", (1, -1, 0), "read"))
    assert stored == 6
    assert first["value"].identical(again["value"])
    for component, index in (
        ("z", (1, -1, 1)),
        ("z", (1, -2, 0)),
        ("v", (1, -1, 0)),
        ("z", (1, [-1], 0)),
        ("z", (2, -1, 0)),
    ):
        _, stored = run(reading(component, index, "read"))
        assert not stored, f"{component}[{index}] is not what was kept"


def test_a_run_that_is_stopped(gpt2: Any, pairs: tp.Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    from tracepatch import executors

    metrics = [reading("z", (1, -1, 0), "read"), tp.logit_diff]
    with tp.patching(gpt2, pairs, metrics, batch_size=2) as p:
        for layer, pos in p.grid("resid_pre", pos=[9, -1]):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    whole, calls = executors._Run._batch, []

    def interrupted(self: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(executors._Run, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            p.run(progress=False)
    part = p.partial()
    result = p.run(progress=False)
    done = part["status"] == tp.Status.MEASURED
    assert 0 < int(done.sum()) < int((result["status"] == tp.Status.MEASURED).sum())
    np.testing.assert_array_equal(part["value"].where(done), result["value"].where(done))


def test_what_explain_says(gpt2: Any, pairs: tp.Pairs) -> None:
    looks = tp.metric(lambda a: a, "looks", "probability", component="pattern", index=(-1, 2, -1, 9))
    with tp.patching(gpt2, pairs, [looks, tp.logit_diff]) as p:
        with p.row(name="later"):
            p.corrupted.mlp_out[2, -2] = 0
        with p.row(name="earlier"):
            p.corrupted.resid_pre[2, 9] = p.clean.resid_pre[2, 9]
    told = p.plan.explain()
    assert "\n  metric       looks [probability] of pattern[2, 2, -1, 9]; logit_diff [logits] at position -1\n" in told
    assert (
        "           -3  cannot reach what is read: later in the forward, after its last position, or beside it" in told
    )
    assert "step by step" in told
    p.run(progress=False)
    assert " probability, " in p.plan.explain().splitlines()[-1]


@pytest.mark.parametrize("component", ["z", "resid_post", "head_out", "pattern", "q", "attn_in", "q_in", "resid_mid", "mlp_act", "mlp_in_scale", "logits_in", "embed"])  # fmt: skip
def test_scripts_read_it_too(component: str, gpt2: Any, pairs: tp.Pairs, tmp_path: Any) -> None:
    index = {"pattern": (1, 2, -1), "embed": (9,), "logits_in": (-1,), "mlp_in_scale": (1, [3, -1])}.get(
        component, (1, [9, -1]) if COMPONENTS[component].unit is None else (1, -1, [0, 2])
    )
    metrics = [tp.logit_diff, reading(component, index, "read")]
    with tp.patching(gpt2, pairs, metrics, form="flat") as p:
        for count, name in enumerate(("resid_pre", "resid_mid", "q_in", "head_out", component)):
            at: Any = ((1,) if COMPONENTS[name].layered else ()) + (slice(None),) * (
                len(COMPONENTS[name].index) - COMPONENTS[name].layered
            )
            with p.row(number=count):
                getattr(p.corrupted, name)[at] = getattr(p.clean, name)[at]
        with p.row(number=9):
            p.corrupted.resid_pre[2, -1] += 1.0
            p.corrupted.attn_out[1, -1] = 0
    assert scripts_agree(p, 0, tmp_path, metric="read") > 1e-3


def test_no_script_for_modules(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs, reading("transformer.h.1.mlp.output", -1, "read")) as p, p.row():
        p.corrupted.resid_pre[1, -1] = 0
    with pytest.raises(
        errors.RecipeError, match=r"'read' reads transformer.h.1.mlp.output\[-1\], for which no plain script"
    ):
        p.rows[0].as_nnsight()


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"component": "zz", "index": (1, -1)}, errors.ComponentError, "no component 'zz'. Did you mean z"),
        ({"component": "z"}, errors.MetricError, r"say which and where, as in component='z', index=\(9, -1, 6\)"),
        ({"index": (1, -1)}, errors.MetricError, "say which and where"),
        ({"component": "z", "index": (1, 2, 3, 4)}, errors.SiteError, r"has the indices \[layer, pos, head\]; 4 were"),
        ({"component": "z", "index": (slice(2), -1)}, errors.SiteError, "is not one layer|several layers"),
        ({"component": "z", "index": (1, -1), "positions": [2]}, errors.MetricError, "stand in index="),
        ({"component": "z", "index": (1, -1), "vocab": (2,)}, errors.MetricError, "speak of logits"),
        (
            {"component": "z", "index": (1, -1), "needs": ("clean",)},
            errors.MetricError,
            "can be given answer and wrong",
        ),
        ({"component": "logits", "index": -1}, errors.MetricError, "logits are what is read without component="),
    ],
)
def test_what_cannot_be_read(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tp.metric(number, **given)


def test_what_this_model_or_these_prompts_do_not_have(gpt2: Any, pairs: tp.Pairs) -> None:
    for component, index, error, says in (
        ("z", (3, -1, 0), errors.SiteError, "this model has 3 layers, 0 to 2"),
        ("z", (1, -1, 4), errors.SiteError, "layer 1 has 4 heads, 0 to 3"),
        ("z", (1, 99, 0), errors.SiteError, "position 99 is in no prompt; the prompts have 14 tokens"),
        ("router_logits", (1, -1, 0), errors.ComponentError, "has no router_logits: its MLP has no experts"),
        ("transformer.h.9.mlp.output", -1, errors.ComponentError, "has no module 'transformer.h.9.mlp'"),
    ):
        with pytest.raises(error, match=says):
            tp.patching(gpt2, pairs, reading(component, index))
    uneven = made_up_pairs(WORDS)
    with tp.patching(tiny("gpt2"), uneven, reading("z", (1, 7, 0), "read")) as p:
        pass_row = p.row()
        with pass_row:
            p.corrupted.z[0, -1, 0] = 0
        with pytest.raises(
            errors.MetricError, match=r"'read' reads z\[1, 7, 0\], which pair 0 does not have \(7 tokens\)"
        ):
            p.make_plan()
        p.rows.clear()
        p.metrics = (reading("z", (1, -1, 0)),)
        with p.row(name="again"):
            p.corrupted.z[0, -1, 0] = 0


def test_functions_that_are_no_metrics(gpt2: Any, pairs: tp.Pairs) -> None:
    for function, says in (
        (lambda z: z, r"must return one number a row: a tensor of shape \[3\] for 3 rows; it returned shape \[3, 16\]"),
        (lambda z: z @ torch.ones(5), r"fails on values of z\[1, -1, 0\], \[row 3, d_head 16\]: RuntimeError"),
        (lambda z: z.sum(-1) / z.sum(), "mixes rows: .* reduce over the other dims only"),
    ):
        with pytest.raises(errors.MetricError, match=says):
            tp.patching(gpt2, pairs, tp.metric(function, "f", component="z", index=(1, -1, 0)))
    with pytest.raises(errors.MetricError, match=r"reads z\[1, -1, 0\], and at\(\) moves what is read of the logits"):
        reading("z", (1, -1, 0)).at(3)


def test_raw_traces_and_modules_around_what_is_read(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs, [reading("z", (1, -1, 0)), tp.logit_diff]) as p:
        with pytest.raises(
            errors.RecipeError, match=r"A metric reads z\[1, -1, 0\], which has passed by when a raw trace"
        ):
            with p.row(name="raw"):
                p.trace(lambda model: None)
        with p.row(name="plain"):
            p.corrupted.z[0, -1, 0] = 0
    with tp.patching(gpt2, pairs, reading("mlp_out", (1, -1))) as p:
        with p.row(name="plain"):
            p.corrupted.z[0, -1, 0] = 0
    with pytest.raises(errors.RecipeError, match=r"a metric takes attn_out\[1, -1\], which has passed by when"):
        with tp.patching(gpt2, pairs, reading("attn_out", (1, -1))) as p, p.row():
            p.corrupted.output("transformer.h.1.attn")[-1] = 0
