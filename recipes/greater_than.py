"""Greater-than: which parts let a later year end what began in 1732?

"The war lasted from the year 1732 to the year 17" continues with 33 to 99. Hanna, Liu & Variengien (2023), *How does
GPT-2 compute greater-than?* (arXiv:2305.00586), found the circuit that does this in GPT-2 small. The metric is theirs:
the summed probability of all later years minus that of all others, which is between -1 and 1. In the corrupted prompt
the war begins in 1701, so that nearly every year is right, and what remains is the model's knowledge that any year may
follow. Corrupted values are written into the clean run (noising): the effect is what is lost.

Attention has to bring the year to the last token, and MLPs there have to make of it a preference for what is later.
Each part is patched whole, which also changes what later parts make of it, and only on its way to the logits: the edge
from the part to what the unembedding reads. The second is what Hanna et al. call its direct contribution.

What to expect. In GPT-2 small the answer is written by MLPs 8 to 11, of which 9 and 10 do most; they read heads 5.5,
6.1, 6.9, 7.10, 8.11 and 9.1, which attend from the end to the year. Heads have little direct contribution: their output
is read by the MLPs. A probability is bounded, so that effects of parts that do the same thing do not add up, and a part
that holds probability back may hardly show. Where a tokenizer has digits apart, the answer is the first of the two.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import tracepatch as tp

TOYS = ("many_tasks",)
METRIC = tp.prob_diff
WRITERS = ("attn_out", "mlp_out")


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """Years of the 11th to the 17th century; corrupted, all begin in their year 01."""
    return tp.tasks.greater_than(tokenizer, count, seed)


@tp.recipe
def residual_stream(p):
    """Noise the residual stream entering each layer, one position at a time."""
    for layer, pos in p.grid("resid_pre", by=("layer", "pos")):
        with p.row(layer=layer, pos=pos):
            p.clean.resid_pre[layer, pos] = p.corrupted.resid_pre[layer, pos]


@tp.recipe
def layers(p):
    """Noise what attention and the MLP of each layer add at the last token."""
    for name in WRITERS:
        for layer in p.grid(name, by="layer"):
            with p.row(component=name, layer=layer):
                getattr(p.clean, name)[layer, -1] = getattr(p.corrupted, name)[layer, -1]


@tp.recipe
def direct(p):
    """Noise the same on the way to the logits only: later layers go on reading the clean value."""
    for name in WRITERS:
        for layer in p.grid(name, by="layer"):
            with p.row(writer=name, writer_layer=layer):
                clean, corrupted = (getattr(world, name)[layer, -1] for world in (p.clean, p.corrupted))
                p.clean.logits_in[-1] += corrupted - clean


@tp.recipe
def heads(p):
    """Noise each head's output at the last token."""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.clean.z[layer, -1, head] = p.corrupted.z[layer, -1, head]


@tp.recipe
def direct_heads(p):
    """Noise the same on the way to the logits only."""
    for layer, head in p.grid("head_out", by=("layer", "head")):
        with p.row(writer_layer=layer, writer_head=head):
            p.clean.logits_in[-1] += p.corrupted.head_out[layer, -1, head] - p.clean.head_out[layer, -1, head]


def probabilities(model, pairs, layer: int, head: int) -> xr.Dataset:
    """The probability of every year, ``clean`` and, as ``value``, with a head noised at the last token."""
    years = sorted({year for answers in (*pairs.answer, *pairs.wrong) for year in answers})
    with tp.patching(model, pairs, {year: tp.basket([year], of="prob", name=year) for year in years}) as p, p.row():
        p.clean.z[layer, -1, head] = p.corrupted.z[layer, -1, head]
    return p.run().squeeze("row").rename(metric="year")


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """What the strongest head, noised, does to the probability of each year; drawn over the year of the beginning."""
    effects = tp.over_pairs(results["heads"])
    layer, head = effects["effect"].to_series().idxmin()
    more = prompts(model.tokenizer, 32, (pairs.seed or 0) + 1)
    found = probabilities(model, more, layer, head)
    first_right = xr.DataArray([min(map(int, answers)) for answers in more.answer], dims="pair")
    found = found[["clean", "value"]].isel(pair=np.argsort(first_right.values))
    first_right = first_right.sortby(first_right)
    later = found["year"].astype(int) >= first_right
    lines, shown = [f"  {'':<22}later years  other years"], {"clean": "clean", "value": f"head {layer}.{head} noised"}
    figure, darkest = Figure(figsize=(9.6, 4.2), layout="constrained"), float(found["clean"].quantile(0.97))
    for axes, (name, words) in zip(figure.subplots(1, 2, sharey=True), shown.items(), strict=True):
        right, wrong = (float(found[name].where(where, 0).sum("year").mean()) for where in (later, ~later))
        lines.append(f"  {words:<22}{right:11.2f}  {wrong:11.2f}")
        image = axes.pcolormesh(found[name].transpose("pair", "year"), cmap="Greys", vmin=0, vmax=darkest)
        axes.step([*first_right.values, first_right.values[-1]], range(len(more) + 1), color="#c44e52")
        axes.set(title=words, xlabel="year that is predicted", ylabel="prompts, by the first year that is right")
    figure.colorbar(image, ax=figure.axes, label="probability", extend="max")
    figure.savefig(f"{path}.years.png", dpi=110)
    return [*lines, f"  picture {path}.years.png: right of the red line is later"]
