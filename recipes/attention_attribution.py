"""Attention attribution: which tokens does each head look at to the benefit of the answer?

A pattern says where a head looks, not whether that matters. Attention attribution multiplies each attention weight by
the metric's gradient with respect to it (Nanda 2023, *Attribution Patching: Activation Patching At Industrial Scale*):
what the weight brings to the answer in the clean run, to first order. One forward and one backward give all of them,
and no corrupted prompt is needed. Minus an attribution is the estimate of setting that weight to zero. Setting the
largest to zero, one at a time, says how good it is. The prompts are those of ``ioi``.

What to expect. A few heads have a few weights each that carry nearly everything: from the last token to a name, or from
a name to its other mention. Positive weights raise the answer above the wrong one, negative ones do the opposite. In
GPT-2 small the name movers (9.6, 9.9, 10.0) look from the last token at the indirect object, the negative name movers
(10.7, 11.10) do so with the other sign, and the S-inhibition heads (7.3, 7.9, 8.6, 8.10) look at the second mention of
the subject (Wang et al. 2022). A weight that is set to zero is not a weight that goes elsewhere: the others of its
token stay as they are, and no longer sum to 1. The first-order step is poor where a head's output is large beside the
stream that it is added to.
"""

from __future__ import annotations

import xarray as xr
from tracepatch.recipes import ioi

import tracepatch as tp

prompts = ioi.prompts
WEIGHT = ("layer", "head", "dest", "src")


@tp.study
def weights(model, pairs, metric):
    """What each attention weight of the clean run brings to the metric: weight · gradient."""
    return tp.attention_attribution(model, pairs, metric)


def largest(attribution: xr.Dataset, count: int = 10) -> xr.DataArray:
    """The largest attributions by size, averaged over pairs: ``[weight]``, with layer, head, dest and src."""
    mean = tp.over_pairs(attribution)["estimate"].stack(weight=WEIGHT)
    return mean[abs(mean).fillna(0).argsort().values[::-1][:count]].reset_index("weight")


def zeroed(model, pairs, chosen: xr.DataArray, metric=tp.logit_diff, **options) -> xr.Dataset:
    """The exact effects of setting weights of the clean run to zero, one at a time; ``chosen`` is of ``largest``."""
    with tp.patching(model, pairs, metric, **options) as p:
        for layer, head, dest, src in zip(*(chosen[dim].values.tolist() for dim in WEIGHT), strict=True):
            with p.row(layer=layer, head=head, dest=dest, src=src):
                p.clean.pattern[layer, head, dest, src] = 0
    return p.run()


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Draws arcs over the text, and sets the largest weights to zero: what ``tracepatch run`` adds to its summary.

    Args:
        model: Of the results.
        pairs: The prompts.
        metrics: What was read; the first one is compared.
        results: ``weights`` → attributions.
        path: Where pictures go: a folder and the beginning of their names.

    Returns:
        Lines for the summary: the largest attributions, with what is lost when the weight is zero.
    """
    found = results["weights"]
    chosen = largest(found)
    lost = -tp.over_pairs(zeroed(model, pairs, chosen, metrics[0]))["effect"].values
    tokens = tp.over_pairs(found)["src_token"].values
    lines = [f"  {'largest attention attributions':<40}estimate  exact"]
    for one, exact in zip(chosen, lost, strict=True):
        layer, head, dest, src = (int(one[dim]) for dim in WEIGHT)
        where = f"{layer}.{head}  {dest} ({tokens[dest].strip()}) → {src} ({tokens[src].strip()})"
        lines.append(f"  {where:<40}{float(one):+8.2f}  {exact:+.2f}")
    picture = f"{path}.arcs.png"
    tp.plots.arcs(found, pair=0).savefig(picture, dpi=110)
    return [*lines, f"  picture {picture}"]
