"""Datasets to matplotlib figures: heatmaps for two dims, bars for one, small multiples for models, components and metrics.

Every figure keeps apart three kinds of cell: a measured value (a colour, white at 0), an effect that was proved to be zero
(hatched), and a cell that holds no number (grey). Nothing here touches pyplot, so that no figure stays open: a function
returns its figure, which notebooks show and ``savefig`` writes.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from tracepatch.errors import ResultError
from tracepatch.results import over_pairs, require_dataset

COLOURS = "RdBu_r"  # white at 0, and told apart with any colour blindness
SMALL, MEDIUM, LARGE = 7, 8, 9  # points: legible where the figure is printed at its own size
CHARACTER, WIDTH = 0.058, 6.5  # inches: the mean width of a small character, and what panels may take
FLOOR = 0.05  # of the clean − corrupted difference: the least that fills the colour scale
ABSENT, MEASURED, PROVED_ZERO = 0, 1, 2  # flags of ``status``
PANELS = ("component", "model", "metric")
ACROSS = ("pos", "head", "neuron", "", "name", "layer", "component", "model")  # which dim is taken first; "" is any other
DOWN = ("layer", "name", "", "neuron", "head", "pos", "component", "model")
TEXTURES: dict[str, dict[str, Any]] = {
    "proved": {"facecolor": "white", "edgecolor": "#c6c6c6", "hatch": "////"},
    "absent": {"facecolor": "#dedede", "edgecolor": "#c0c0c0", "hatch": "xxxx"},
}


class _Label(NamedTuple):
    text: str
    differs: bool = False  # the clean and the corrupted token do
    varies: bool = False  # the pairs' tokens do


@dataclass(frozen=True)
class _Panel:
    """What one panel shows: values and the masks of its textures, [down, across] or [down], and a label for every tick."""

    title: str
    values: NDArray[np.float64]
    masks: dict[str, NDArray[np.bool_]]
    labels: list[list[_Label]]
    pairs: xr.DataArray
    gap: float


@dataclass(frozen=True)
class _View:
    name: str
    dims: list[str]
    columns: str | None
    words: list[bool]  # whether a dim's labels are words, which are read from the top and never left out
    mean: xr.Dataset
    panels: list[_Panel]
    title: str
    legend: dict[str, str]


class _Shown(Figure):
    """A figure that a notebook shows although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def heatmap(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    columns: str | None = None,
    limit: float | None = None,
    title: str | None = None,
    annotate: bool | None = None,
    pair: int | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """A heatmap over two dims, with a panel for each entry of a third.

    Layers run from the bottom to the top. A position is labelled with its token: in bold ``clean→corrupted`` where the
    prompts differ, and in italics with ``…`` where the averaged pairs differ and the first one's token stands for all.
    White space around a token is left out; a token of nothing else is shown as ``␣``, ``⏎`` or ``⇥``.

    Args:
        effects: A result, such as that of ``tp.patch`` or ``tp.concat``.
        variable: What to show; ``normalized`` where there is one, else ``effect``.
        x: The dim across; by default pos, head or neuron.
        y: The dim upwards, or downwards where its labels are words; by default layer.
        columns: The dim of the panels; by default component, model or metric, whichever has several entries.
        limit: The value at both ends of the colour scale, which all panels share (metrics in their own units have one
            each). By default the largest absolute value, but at least a twentieth of the clean − corrupted difference,
            so that noise does not look like effects where nothing happens.
        title: Replaces the default, which names the model and the pairs; ``""`` leaves it out.
        annotate: Whether to write the numbers into the measured cells; by default those that do not round to zero,
            where cells are few and large enough.
        pair: The pair to show; by default the average over pairs (``tp.over_pairs``).
        figure: A figure or subfigure to draw into; by default a new one of a fitting size.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: A tree instead of a dataset, an unknown variable, dim or pair, or too many or too few dims.
    """
    if limit is not None and not 0 < limit < np.inf:
        raise ResultError(f"limit is the value at the ends of the colour scale, a positive number, not {limit!r}.")
    view = _view(effects, variable, {"y": y, "x": x}, columns, pair)
    rows, cells = view.panels[0].values.shape
    longest = max(len(label.text) for panel in view.panels for label in panel.labels[1]) if view.words[1] else 2
    narrow = cells * SMALL * 1.15 / 72 if view.words[1] else 0.0  # a panel with very many tokens may be wider than others
    size = max(float(np.clip(cells * 0.32, 1.7, WIDTH)), narrow), float(np.clip(rows * 0.34, 1.0, 5.5))
    canvas, axes, (wide, high) = _canvas(view, figure, title, size, longest * CHARACTER)
    apart = view.columns == "metric" and view.name != "normalized"
    together = _limit(view, view.panels)
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        bound = limit or (_limit(view, [panel]) if apart else together)
        across, up = np.arange(cells + 1) - 0.5, np.arange(rows + 1) - 0.5
        values = np.ma.masked_invalid(panel.values)
        mesh = ax.pcolormesh(across, up, values, cmap=COLOURS, norm=Normalize(-bound, bound), rasterized=values.size > 5000)
        for key, mask in panel.masks.items():
            _texture(ax, mask, key)
        if min(wide / cells, high / rows) > 0.08:  # lines between smaller cells would hide them
            ax.vlines(across[1:-1], -0.5, rows - 0.5, color="#e4e4e4", linewidth=0.4)
            ax.hlines(up[1:-1], -0.5, cells - 0.5, color="#e4e4e4", linewidth=0.4)
        shown = [(i, j, _number(panel.values[i, j], bound)) for i, j in np.argwhere(~panel.masks["proved"] & ~values.mask)]
        if annotate is None:
            fits = max((len(text) for _, _, text in shown), default=0) * CHARACTER < wide / cells and high / rows > 0.15
            shown = [(i, j, text) for i, j, text in shown if fits and values.size <= 60 and text.strip("0.")]
        for i, j, text in shown if annotate is not False else ():
            colour = "white" if abs(panel.values[i, j]) > 0.6 * bound else "#303030"
            ax.text(j, i, text, ha="center", va="center", fontsize=SMALL - 1, color=colour, parse_math=False)
        _ticks(ax.xaxis, panel.labels[1], view.words[1], wide)
        _ticks(ax.yaxis, panel.labels[0], view.words[0], high)
        if apart or panel is view.panels[-1]:
            down, beside = (1, 1) if apart else np.max(list(axes), axis=0) + 1
            beyond = any(np.nanmax(abs(p.values), initial=0) > bound for p in ([panel] if apart else view.panels))
            around, ends = [ax] if apart else list(axes.values()), "both" if beyond else "neither"
            share = 0.16 / (beside * wide)
            bar = canvas.colorbar(mesh, ax=around, aspect=down * high / 0.12, fraction=share, pad=share / 2, extend=ends)
            marks = np.linspace(-bound, bound, 3 if down * high < 1.5 else 5)
            bar.set_ticks(marks.tolist(), labels=[_number(mark, bound) for mark in marks])
            bar.ax.tick_params(labelsize=SMALL, width=0.5, length=2)
            flat = down * high < 2.6  # upright, the words would be longer than the bar
            lines = [part for line in _scale(view, panel.title) for part in (textwrap.wrap(line, 25) if flat else [line])]
            turned: dict[str, Any] = {"rotation": 0, "ha": "left", "va": "center"} if flat else {}
            bar.set_label("\n".join(lines), fontsize=SMALL if flat else MEDIUM, parse_math=False, **turned)
    return _finish(canvas, view, axes)


def bars(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    y: str | None = None,
    columns: str | None = None,
    title: str | None = None,
    pair: int | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Horizontal bars over one dim, such as the names of rows, and a dot for each pair; the arguments are ``heatmap``'s.

    A bar is the average over pairs; its dots are spread upwards only to be seen. A pair whose clean and corrupted values
    are too close has no normalized effect and no dot, but counts in the average (``tp.over_pairs``).

    Raises:
        ResultError: A tree instead of a dataset, an unknown variable, dim or pair, or too many or too few dims.
    """
    view = _view(effects, variable, {"y": y}, columns, pair)
    count = len(view.panels[0].values)
    canvas, axes, (_, high) = _canvas(view, figure, title, (2.8, float(np.clip(count * 0.22, 0.8, 8))), 0.5)
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        ax.barh(np.arange(count), np.nan_to_num(panel.values), height=0.7, color="#6aaed6")
        ax.axvline(0, color="#303030", linewidth=0.6)
        if panel.pairs.sizes.get("pair", 1) > 1:
            dots = panel.pairs.transpose("pair", view.dims[0]).values
            ax.scatter(dots, np.linspace(-0.22, 0.22, len(dots))[:, None] + np.arange(count), s=4, color="#303030", zorder=3)
        ax.margins(x=0.06)
        for key, mask in panel.masks.items():
            _texture(ax, mask[:, None], key)
        ax.set_ylim(-0.5, count - 0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, width=0.5, length=2)
        ax.set_xlabel("\n".join(_scale(view, panel.title)), fontsize=SMALL, parse_math=False)
        _ticks(ax.yaxis, panel.labels[0], view.words[0], high)
    if view.columns != "metric" or view.name == "normalized":
        ends = np.array([ax.get_xlim() for ax in axes.values()])
        for ax in axes.values():
            ax.set_xlim(ends.min(), ends.max())
    return _finish(canvas, view, axes)


def _view(
    effects: xr.Dataset, variable: str | None, axes: dict[str, str | None], columns: str | None, pair: int | None
) -> _View:
    """What to show, with its dims settled; ``axes`` are those of a panel, y before x, with what the caller chose."""
    require_dataset(effects)
    single = mean = effects
    wanted = [dim for dim in (*axes.values(), columns) if dim is not None]
    known = effects["pair"].values.tolist() if "pair" in effects["effect"].dims else []
    if pair is not None and pair not in known:
        raise ResultError(f"There is no pair {pair!r}; there are {', '.join(map(str, known)) or 'none, they are averaged'}.")
    if pair is not None:
        single = mean = effects.sel(pair=pair)
    elif known and "pair" not in wanted:
        mean = over_pairs(effects)
    name = variable or ("normalized" if "normalized" in mean else "effect")
    if name not in mean or name == "status":
        offered = [str(v) for v in mean.data_vars if v != "status"]
        raise ResultError(f"There is no variable {name!r} to plot; there are {', '.join(offered)}.")
    dims = {str(dim): size for dim, size in mean[name].sizes.items()}
    shape = ", ".join(f"{dim} ({size})" for dim, size in dims.items()) or "none"
    if set(wanted) - set(dims) or len(set(wanted)) < len(wanted):
        raise ResultError(f"{', '.join(axes)}, columns must be different dims of {name!r}: {shape}. Got {', '.join(wanted)}.")
    free, chosen = [dim for dim in dims if dim not in wanted and dim != "metric"], list[str]()
    for axis, given in axes.items():
        order = ACROSS if axis == "x" else DOWN
        ranked = sorted(free, key=lambda dim, order=order: order.index(dim if dim in order else ""))  # type: ignore[misc]
        chosen += [given] if given else ranked[:1]
        free = [dim for dim in free if dim not in chosen]
    if len(chosen) < len(axes):
        advice = "tp.plots.bars shows a single one" if len(axes) == 2 and dims else "choose a variable with more"
        raise ResultError(f"{name!r} has too few dims: {shape}; {advice}.")
    rest = [dim for dim in dims if dim not in (*chosen, columns)]
    columns = columns or next((dim for dim in PANELS if dim in rest and dims[dim] > 1), None)
    left = [dim for dim in rest if dims[dim] > 1 and dim != columns]
    if left:
        pick = ", ".join(f"{dim}={mean[dim].values.tolist()[0]!r}" for dim in left)
        other = f", or give it panels: columns={left[0]!r}" if columns is None else ""
        other += "; tp.plots.heatmap shows two dims" if len(axes) == 1 else ""
        raise ResultError(f"{name!r} has too many dims: {shape}. Select one of {', '.join(left)}: effects.sel({pick}){other}.")
    first = {dim: 0 for dim in rest if dim != columns}
    single, mean = single.isel(first, missing_dims="ignore"), mean.isel(first, missing_dims="ignore")
    data, sizes = mean[name], mean.sizes
    status = mean["status"] if "status" in mean and set(mean["status"].dims) <= set(data.dims) else xr.full_like(data, 1)
    undefined = bool((data.isnull() & (status != ABSENT)).any())
    coords, panels = data.coords, []
    for number in range(sizes[columns] if columns else 1):
        here = {columns: number} if columns else {}
        part, one, own = (d.isel(here, missing_dims="ignore") for d in (mean, single, status))  # type: ignore[attr-defined]
        values = part[name].transpose(*chosen)
        absent = values.isnull().values  # never drawn as a zero, even one that was proved
        proved = (own.broadcast_like(values).transpose(*chosen).values == PROVED_ZERO) & ~absent
        entry = coords[columns].values[number] if columns else ""
        text = str(entry) if isinstance(entry, str) else f"{columns} {entry}"
        gap = float(abs(part["clean"] - part["corrupted"]).min()) if {"clean", "corrupted"} <= set(part.data_vars) else 0.0
        masks = {"proved": proved, "absent": absent}
        panels.append(_Panel(text, values.values, masks, [_labels(one, dim) for dim in chosen], one[name], gap))
    alone = {d: coords[d].item() for d in ("component", "name", "layer", "pos", "head", "neuron", "pair") if d in coords and not coords[d].dims}
    model = "" if columns == "model" else str(coords["model"].item() if "model" in coords else mean.attrs["model"])
    facts = [model, str(mean.attrs.get("pairs", "")), *(v if isinstance(v, str) else f"{d} {v}" for d, v in alone.items())]
    facts += [f"mean over {len(known)} pairs"] if len(known) > 1 and "pair" not in data.dims and pair is None else []
    names = {"proved": "no effect (proved)", "absent": "absent or undefined" if undefined else "absent"}
    legend = {key: text for key, text in names.items() if any(p.masks[key].any() for p in panels)}
    words = [dim in ("pos", "row") or data[dim].dtype.kind in "OUT" for dim in chosen]
    return _View(name, chosen, columns, words, mean, panels, " · ".join(filter(None, facts)), legend)
