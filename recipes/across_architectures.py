"""Across architectures: at which depth is the same task done in different models?

One experiment, written without a model in it, is run on every model that is given: ``tracepatch run
across_architectures --model A --model B …``. Layers are compared by relative depth, 0 for a model's first and 1 for its
last, so that models of other sizes and families stand in one figure. The prompts are those of ``ioi``, with the second
mention of the subject changed in the corrupted prompt; every model reads the same words, as far as they are one token
of its tokenizer. Clean values are written into the corrupted run (denoising): the residual stream that leaves each
layer, at the changed token and at the last one, and what attention and the MLP of each layer add, at all positions.

What to expect. In every model that does the task the stream at the changed token begins with an effect of 1 and ends
near 0, and that at the last token does the opposite: by construction at both ends. Where they cross, the information
has been moved, and there attention outputs light up. In GPT-2 small the S-inhibition heads of layers 7 and 8 move it
(Wang et al. 2022), at a relative depth of .64 to .73. Small models have few layers to divide the work among, and a
model that needs one step where another needs two does not show it in this figure: it compares depths, not mechanisms.
"""

from __future__ import annotations

import xarray as xr
from tracepatch.recipes import ioi

import tracepatch as tp

prompts = ioi.prompts


@tp.recipe
def by_depth(p):
    """Denoise the stream leaving each layer at the changed and the last token, and what attention and the MLP add."""
    for where, position in {"changed": p.span("subject"), "last": -1}.items():
        for layer in p.grid("resid_post", by="layer"):
            with p.row(name=f"stream at the {where} token", layer=layer):
                p.corrupted.resid_post[layer, position] = p.clean.resid_post[layer, position]
    for name in ("attn_out", "mlp_out"):
        for layer in p.grid(name, by="layer"):
            with p.row(name=name, layer=layer):
                getattr(p.corrupted, name)[layer] = getattr(p.clean, name)[layer]


def crossing(effects: xr.Dataset) -> xr.DataArray:
    """The relative depth of the first layer that leaves more at the last token than at the changed one.

    Args:
        effects: Of ``by_depth``, of one model or of several.

    Returns:
        By model, where there are several.
    """
    mean = tp.over_pairs(effects)
    changed, last = (mean["normalized"].sel(name=f"stream at the {where} token") for where in ("changed", "last"))
    return mean["depth"].where(last > changed).min("layer")


def conclude_all(results: dict[str, xr.Dataset], folder) -> list[str]:
    """Tells where each model moves the information: what ``tracepatch run`` adds to its summary.

    Args:
        results: ``by_depth`` → effects, with a dim ``model``.
        folder: Where pictures go; the one of this experiment is drawn from its results.

    Returns:
        Lines for the summary.
    """
    depths = crossing(results["by_depth"])
    lines = [f"  {model:<26}{depth:.2f}" for model, depth in zip(depths["model"].values, depths.values, strict=True)]
    return ["  relative depth at which the last token takes over from the changed one", *lines]
