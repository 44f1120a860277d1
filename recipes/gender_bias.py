"""Gender bias: which heads and neurons carry a stereotype, by causal mediation analysis?

"The nurse said that" goes on with *she* rather than *he*, as stereotype has it. Vig et al. (2020), *Causal Mediation
Analysis for Interpreting Neural NLP: The Case of Gender Bias* (arXiv:2004.12265), exchange the profession for a word
that states the other gender, *man*, and ask through which parts of the model that changes the pronoun. With the odds
y = p(anti-stereotypical pronoun) / p(stereotypical pronoun), of the prompt u, a part z of the model, and the exchange
x, effects are relative changes:

    total      TE   y(x)/y(u) - 1                      the other prompt
    indirect   NIE  y(u, z as under x)/y(u) - 1        only z comes from the other prompt: noising
    direct     NDE  y(x, z as under u)/y(u) - 1        all but z does: denoising, seen from u

log y is minus the logit difference, so that patching in both directions gives all three exactly. For a linear model TE
= NDE + NIE; where parts amplify each other, it is not.

What to expect. Effects are sparse: in GPT-2 small a handful of the 144 heads, most of them in the middle layers, have
indirect effects that are worth mentioning, and few neurons do most of what all neurons do. Direct effects of single
heads are close to the total, because all the rest still changes. The occupation words of a stereotype differ in
strength: look at single pairs before trusting the mean, which the strongest odds dominate. Both pronouns must be
something the model says: probabilities of 0.01 have ratios too.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import tracepatch as tp

TOYS = ("many_tasks",)


def prompts(tokenizer, count: int = 16, seed: int = 0) -> tp.Pairs:
    """Occupations of women and of men in turn; corrupted, the man or the woman, whichever is against the stereotype."""
    return tp.tasks.occupation(tokenizer, count, seed)


def mediator(p, name: str, where: tuple) -> None:
    """Two rows for a part of the model: it alone as in the other prompt, and all but it as in the other prompt."""
    labels = dict(zip(tp.COMPONENTS[name].index, where, strict=True))
    labels = {dim: index for dim, index in labels.items() if isinstance(index, int)}
    with p.row(side="indirect", **labels):
        getattr(p.clean, name)[where] = getattr(p.corrupted, name)[where]
    with p.row(side="direct", **labels):
        getattr(p.corrupted, name)[where] = getattr(p.clean, name)[where]


@tp.recipe
def layers_of_attention(p):
    """What attention adds in each layer, at all positions, as the mediator."""
    for layer in p.grid("attn_out", by="layer"):
        mediator(p, "attn_out", (layer, slice(None)))


@tp.recipe
def layers_of_mlps(p):
    """What the MLP adds in each layer, at all positions, as the mediator."""
    for layer in p.grid("mlp_out", by="layer"):
        mediator(p, "mlp_out", (layer, slice(None)))


@tp.recipe
def heads(p):
    """Each head, at all positions, as the mediator."""
    for layer, head in p.grid("z", by=("layer", "head")):
        mediator(p, "z", (layer, slice(None), head))


@tp.study
def strongest_heads(model, pairs, metric=tp.logit_diff, **options):
    """More and more heads as one mediator, those with the strongest indirect effect first."""
    alone = tp.patch(model, pairs, "z", metric, direction="noising", **options)
    return together(model, pairs, metric, "z", ranked(alone), **options)


@tp.study
def strongest_neurons(model, pairs, metric=tp.logit_diff, **options):
    """More and more neurons as one mediator; attribution says which have the strongest indirect effect."""
    alone = tp.attribute(model, pairs, "mlp_act", metric, direction="noising")
    return together(model, pairs, metric, "mlp_act", ranked(alone), **options)


def ranked(effects: xr.Dataset) -> list[tuple[int, int]]:
    """Layer and number of heads or neurons, those first that take most away from the stereotype."""
    mean = tp.over_pairs(effects)[next(name for name in ("effect", "estimate") if name in effects)]
    mean = mean.isel(metric=0) if "metric" in mean.dims else mean
    return mean.to_series().dropna().sort_values().index.tolist()


def together(model, pairs, metric, name: str, order: list[tuple[int, int]], **options) -> xr.Dataset:
    """The first of the order together, noised: 1, 2, 4, 8, … and all of them."""
    counts = [2**i for i in range(20) if 2**i < len(order)] + [len(order)]
    with tp.patching(model, pairs, metric, **options) as p:
        for count in counts:
            chosen = {layer: [unit for at, unit in order[:count] if at == layer] for layer, _ in order[:count]}
            with p.row(strongest=count):
                for layer, units in chosen.items():
                    getattr(p.clean, name)[layer, :, units] = getattr(p.corrupted, name)[layer, :, units]
    return p.run()


def odds(effects: xr.Dataset) -> xr.Dataset:
    """Vig et al.'s effects, from logit differences: ``total``, ``indirect`` and, where there is one, ``direct``.

    Args:
        effects: By pair and site, of logit differences; with the dim side, or of noising alone.

    Returns:
        Means over pairs of relative changes of p(anti-stereotypical) / p(stereotypical).
    """
    found = xr.Dataset({"total": np.exp(effects["clean"] - effects["corrupted"]) - 1})
    for side in effects["side"].values if "side" in effects.dims else [""]:
        value = effects["value"].sel(side=side) if side else effects["value"]
        found[side or "indirect"] = np.exp(effects["clean"] - value) - 1
    return found.mean("pair")


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Total, indirect and direct effects on the odds, and how many heads and neurons it takes to change the pronoun."""
    if metrics[0] is not tp.logit_diff:
        results = {name: part(model, pairs) for name, part in PARTS.items()}
    effects = odds(results["heads"])
    lines = [f"  {'changes of the odds':<28}indirect      direct       total"]
    for layer, head in effects["indirect"].to_series().nlargest(3).index:
        one = effects.sel(layer=layer, head=head)
        numbers = "".join(f"{float(one[name]):+12,.2f}" for name in ("indirect", "direct", "total"))
        lines.append(f"  {f'head {layer}.{head}':<24}{numbers}")
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for words in ("heads", "neurons"):
        curve = -tp.over_pairs(results[f"strongest_{words}"])["normalized"]
        share = 100 * curve["strongest"] / int(curve["strongest"].max())
        axes.plot(share, curve, marker="o", label=words)
        enough = float(share.where(curve >= curve.max() / 2).min())
        lines.append(
            f"  {words} together: up to {float(curve.max()):.2f} of the log odds, half of it by {enough:.1f} % of them"
        )
    axes.axhline(1.0, color="grey", linestyle="--", label="total effect")
    axes.set(xscale="log", xlabel="% of all, the strongest first", ylabel="indirect effect, share of the log odds")
    axes.legend()
    figure.savefig(f"{path}.together.png", dpi=110)
    return [*lines, f"  picture {path}.together.png"]


PARTS = {"heads": heads, "strongest_heads": strongest_heads, "strongest_neurons": strongest_neurons}
