"""Datasets to matplotlib figures."""

from __future__ import annotations

from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from tracepatch.attention_pictures import arcs, attention
from tracepatch.combining import main_variable
from tracepatch.curves import depth, windows
from tracepatch.heatmaps import FLOOR, bars, heatmap, interactions
from tracepatch.panels import PANELS
from tracepatch.scatters import audit, quadrants, scatter

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
    "quadrants",
    "scatter",
    "windows",
]


def picture(effects: xr.Dataset, variable: str | None = None, **options: Any) -> Figure:
    """The picture that fits a result, with its own arguments.

    ``attention`` over dest and src of every head, ``windows`` over layer and width, ``bars`` over one dim, else
    ``heatmap``; of three dims that with the fewest entries beside layer and pos has the panels.
    """
    sizes = effects[main_variable(effects)].sizes
    inner = [str(dim) for dim in sizes if dim not in ("pair", *PANELS)]
    if {"layer", "head", "dest", "src"} <= set(inner):
        return attention(effects, variable, **options)
    if set(inner) == {"layer", "width"}:
        return windows(effects, variable, **options)
    if len(inner) < 2:
        return bars(effects, variable, **options)
    several = any(sizes.get(dim, 1) > 1 for dim in PANELS)
    free = [dim for dim in inner if dim not in ("layer", "pos")]
    if len(inner) == 3 and not several and free:
        options = {"columns": min(free, key=lambda dim: sizes[dim]), **options}
    return heatmap(effects, variable, **options)
