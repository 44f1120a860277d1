"""Datasets to matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from tracepatch.attention_pictures import arcs, attention
from tracepatch.combining import concat, main_variable
from tracepatch.curves import depth, windows
from tracepatch.errors import ResultError
from tracepatch.heatmaps import FLOOR, bars, heatmap, interactions
from tracepatch.panels import PANELS
from tracepatch.scatters import audit, scatter
from tracepatch.verdict_pictures import quadrants

__all__ = [
    "FLOOR",
    "arcs",
    "attention",
    "audit",
    "bars",
    "depth",
    "heatmap",
    "interactions",
    "picture",
    "pictures",
    "quadrants",
    "scatter",
    "windows",
]


def picture(effects: xr.Dataset, variable: str | None = None, **options: Any) -> Figure:
    """The picture that fits a result, with its own arguments.

    ``audit`` of an audited estimate, ``quadrants`` of both directions with verdicts, ``attention`` over dest and src of
    every head, ``windows`` over layer and width, ``depth`` over the layers of several models, ``bars`` over one dim,
    else ``heatmap``; of three dims that with the fewest entries beside layer and pos has the panels.
    """
    if "audited" in effects:
        if "model" in effects.dims:
            raise ResultError("A picture of an audit shows one model: select one, as in effects.sel(model=…).")
        return audit(effects, **options)
    sizes = effects[main_variable(effects)].sizes
    if "verdict" in effects:
        return quadrants(effects, **options)
    inner = [str(dim) for dim in sizes if dim not in ("pair", *PANELS)]
    if {"layer", "head", "dest", "src"} <= set(inner):
        return attention(effects, variable, **options)
    if set(inner) == {"layer", "width"}:
        return windows(effects, variable, **options)
    names = [dim for dim in inner if effects[dim].dtype.kind in "OTU"]
    if sizes.get("model", 1) > 1 and "layer" in inner and len(names) == len(inner) - 1 < 2:
        return depth(effects, variable, **{"columns": names[0] if names else None, **options})
    if len(inner) < 2:
        return bars(effects, variable, **options)
    several = any(sizes.get(dim, 1) > 1 for dim in PANELS)
    free = [dim for dim in inner if dim not in ("layer", "pos")]
    if len(inner) == 3 and not several and free:
        options = {"columns": min(free, key=lambda dim: sizes[dim]), **options}
    return heatmap(effects, variable, **options)


def pictures(
    results: Sequence[xr.Dataset], prepare: Callable[[xr.Dataset], xr.Dataset] = lambda result: result, **options: Any
) -> dict[str, Figure]:
    """The pictures that fit the results of several models: one of all, called ``""``, or one of each, by model.

    Args:
        results: One of each model.
        prepare: What to make of what is drawn, such as its average over pairs.
        options: Those of ``picture``.

    Raises:
        ResultError: There is no picture of such results.
    """
    try:
        return {"": picture(prepare(concat(results) if len(results) > 1 else results[0]), **options)}
    except ResultError:
        if len(results) == 1:
            raise
    found = {}
    for result in results:
        model = str(result.attrs["model"])
        title = {"title": f"{options['title']} · {model}"} if options.get("title") else {}
        found[model] = picture(prepare(result), **options | title)
    return found
