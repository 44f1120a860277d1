"""Datasets to matplotlib figures: heatmaps for two dims, bars for one, a panel for each model, component or metric.

Every figure keeps apart three kinds of cell: a measured value (a colour, white at 0), an effect that was proved to be
zero (hatched), and a cell that holds no number (grey). Nothing here touches pyplot, so that no figure stays open: a
function returns its figure, which notebooks show and ``savefig`` writes.
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
from matplotlib.axis import Axis, XAxis
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
TALL = 2.6  # inches: what a colour bar must have for its label to stand beside it
FLOOR = 0.05  # of the clean − corrupted difference: the least that fills the colour scale
ABSENT, MEASURED, PROVED_ZERO = 0, 1, 2  # flags of ``status``
PANELS = ("component", "model", "metric")
ACROSS = ("pos", "head", "neuron", "", "name", "layer", "component", "model")  # which is taken first; "" is any other
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
    """What one panel shows: values and the masks of its textures, [down, across] or [down], and a label for each."""

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
    narrow = cells * SMALL * 1.15 / 72 if view.words[1] else 0.0  # many tokens take more than WIDTH
    size = max(float(np.clip(cells * 0.32, 1.7, WIDTH)), narrow), float(np.clip(rows * 0.34, 1.0, 5.5))
    canvas, axes, (wide, high) = _canvas(view, figure, title, size, longest * CHARACTER)
    apart = view.columns == "metric" and view.name != "normalized"
    together = _limit(view, view.panels)
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        bound = limit or (_limit(view, [panel]) if apart else together)
        across, up = np.arange(cells + 1) - 0.5, np.arange(rows + 1) - 0.5
        values, scale, many = np.ma.masked_invalid(panel.values), Normalize(-bound, bound), panel.values.size > 5000
        mesh = ax.pcolormesh(across, up, values, cmap=COLOURS, norm=scale, rasterized=many)
        for key, mask in panel.masks.items():
            _texture(ax, mask, key)
        if min(wide / cells, high / rows) > 0.08:  # lines between smaller cells would hide them
            ax.vlines(across[1:-1], -0.5, rows - 0.5, color="#e4e4e4", linewidth=0.4)
            ax.hlines(up[1:-1], -0.5, cells - 0.5, color="#e4e4e4", linewidth=0.4)
        measured = np.argwhere(~panel.masks["proved"] & ~panel.masks["absent"])
        shown = [(i, j, _number(panel.values[i, j], bound)) for i, j in measured]
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
            share, aspect = 0.17 / (beside * wide), down * (high + 0.3) / 0.11
            bar = canvas.colorbar(mesh, ax=around, aspect=aspect, fraction=share, pad=share / 2, extend=ends)
            marks = np.linspace(-bound, bound, 3 if down * high < 1.5 else 5)
            bar.set_ticks(marks.tolist(), labels=[_number(mark, bound) for mark in marks])
            bar.ax.tick_params(labelsize=SMALL, width=0.5, length=2)
            flat = down * high < TALL  # upright, the words would be longer than the bar
            lines = [part for line in _scale(view, panel.title) for part in textwrap.wrap(line, 25 if flat else 99)]
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
    """Horizontal bars over one dim, such as the names of rows, with a dot for each pair; arguments as for ``heatmap``.

    A bar is the average over pairs; its dots are spread upwards only to be seen. A pair whose clean and corrupted
    values are too close has no normalized effect and no dot, but counts in the average (``tp.over_pairs``).

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
            spread = np.linspace(-0.22, 0.22, len(dots))[:, None] + np.arange(count)
            ax.scatter(dots, spread, s=5, color="#303030", alpha=0.7, linewidths=0, zorder=3)
        ax.margins(x=0.06)
        for key, mask in panel.masks.items():
            _texture(ax, mask, key)
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
    known = effects["pair"].values.tolist() if "pair" in effects["effect"].dims else []
    if pair is not None and pair not in known:
        raise ResultError(f"There is no pair {pair!r}; there are {', '.join(map(str, known)) or 'none: one mean'}.")
    if pair is not None:
        single = mean = effects.sel(pair=pair)
    elif known and "pair" not in (*axes.values(), columns):
        mean = over_pairs(effects)
    name = variable or ("normalized" if "normalized" in mean else "effect")
    if name not in mean or name == "status":
        offered = ", ".join(str(v) for v in mean.data_vars if v != "status")
        raise ResultError(f"There is no variable {name!r} to plot; there are {offered}.")
    chosen, columns, lone = _arrange(mean[name], axes, columns)
    single, mean = single.isel(lone, missing_dims="ignore"), mean.isel(lone, missing_dims="ignore")
    data, coords, panels = mean[name], mean[name].coords, []
    fitting = "status" in mean and set(mean["status"].dims) <= set(data.dims)
    status = mean["status"] if fitting else xr.full_like(data, MEASURED)
    for number in range(data.sizes[columns] if columns else 1):
        here = {columns: number} if columns else {}
        part, one = mean.isel(here, missing_dims="ignore"), single.isel(here, missing_dims="ignore")
        values = part[name].transpose(*chosen)
        absent = values.isnull().values  # never drawn as a zero, even one that was proved
        own = status.isel(here, missing_dims="ignore").broadcast_like(values).transpose(*chosen).values
        entry = coords[columns].values[number] if columns else ""
        text = str(entry) if isinstance(entry, str) else f"{columns} {entry}"
        both = {"clean", "corrupted"} <= set(part.data_vars)
        gap = float(np.nan_to_num(abs(part["clean"] - part["corrupted"]).min())) if both else 0.0
        masks = {"proved": (own == PROVED_ZERO) & ~absent, "absent": absent}
        panels.append(_Panel(text, values.values, masks, [_labels(one, dim) for dim in chosen], one[name], gap))
    model = "" if columns == "model" else str(coords["model"].item() if "model" in coords else mean.attrs["model"])
    facts = [model, str(mean.attrs.get("pairs", ""))]
    for dim in ("component", "name", "layer", "pos", "head", "neuron", "pair"):  # what was selected beforehand
        if dim in coords and not coords[dim].dims:
            facts.append(f"{dim} {coords[dim].item()}".removeprefix("component ").removeprefix("name "))
    if len(known) > 1 and pair is None and "pair" not in data.dims:
        facts.append(f"mean over {len(known)} pairs")
    undefined = bool((data.isnull() & (status != ABSENT)).any())
    names = {"proved": "no effect (proved)", "absent": "absent or undefined" if undefined else "absent"}
    legend = {key: text for key, text in names.items() if any(p.masks[key].any() for p in panels)}
    words = [dim in ("pos", "row") or data[dim].dtype.kind in "OUT" for dim in chosen]
    return _View(name, chosen, columns, words, mean, panels, " · ".join(filter(None, facts)), legend)


def _arrange(
    data: xr.DataArray, axes: dict[str, str | None], columns: str | None
) -> tuple[list[str], str | None, dict[str, int]]:
    """The dims of the axes, the dim of the panels if any, and the dims of a single entry that neither needs."""
    dims = {str(dim): size for dim, size in data.sizes.items()}
    what = f"{data.name!r} has the dims {', '.join(f'{dim} ({size})' for dim, size in dims.items()) or '(none)'}"
    wanted = [dim for dim in (*axes.values(), columns) if dim is not None]
    if set(wanted) - set(dims) or len(set(wanted)) < len(wanted):
        raise ResultError(f"{what}: {', '.join(axes)} and columns are different ones of them, not {', '.join(wanted)}.")
    free, chosen = [dim for dim in dims if dim not in wanted and dim != "metric"], list[str]()
    for axis, given in axes.items():
        order = ACROSS if axis == "x" else DOWN
        free.sort(key=lambda dim, order=order: order.index(dim if dim in order else ""))  # type: ignore[misc]
        chosen.append(given or (free.pop(0) if free else ""))
    if "" in chosen:
        advice = "tp.plots.bars shows a single one" if len(axes) == 2 and dims else "choose a variable with more"
        raise ResultError(f"{what}, too few: {advice}.")
    rest = [dim for dim in dims if dim not in (*chosen, columns)]
    columns = columns or next((dim for dim in PANELS if dim in rest and dims[dim] > 1), None)
    left = [dim for dim in rest if dims[dim] > 1 and dim != columns]
    if left:
        pick = ", ".join(f"{dim}={data[dim].values.tolist()[0]!r}" for dim in left)
        other = f", or give one panels, as in columns={left[0]!r}" if columns is None else ""
        other += "; tp.plots.heatmap shows two" if len(axes) == 1 else ""
        raise ResultError(f"{what}, too many: select of {', '.join(left)}, as in effects.sel({pick}){other}.")
    return chosen, columns, {dim: 0 for dim in rest if dim != columns}


def _limit(view: _View, panels: Sequence[_Panel]) -> float:
    """The default of ``heatmap``'s limit for panels that share a scale."""
    gap = 1.0 if view.name == "normalized" else min(p.gap for p in panels) if view.name.startswith("effect") else 0.0
    return max(FLOOR * gap, *(float(np.nanmax(abs(p.values), initial=0)) for p in panels)) or 1.0


def _scale(view: _View, title: str) -> list[str]:
    """What the numbers are, in lines: variable and metric, unit, direction."""
    data, attrs = view.mean[view.name], view.mean.attrs
    names, units = list(json.loads(attrs.get("metrics", "{}"))), data.attrs.get("units", "").split(", ")
    metric = title if view.columns == "metric" and view.name != "normalized" else ""
    if "metric" in view.mean.coords and not view.mean["metric"].dims:
        metric = str(view.mean["metric"].item())
    unit = dict(zip(names, units, strict=False)).get(metric, "") if len(names) == len(units) else ""
    unit = units[0] if len(units) == 1 else unit  # a unit that metrics share, or that of a fraction
    kind, _, part = view.name.partition("_")
    texts = {"normalized": "normalized effect on", "effect": f"effect on the {part} part of" if part else "effect on"}
    text = f"{texts.get(kind, view.name + ':')} {metric}" if metric else texts.get(kind, view.name).removesuffix(" on")
    base = attrs.get("base", "")
    way = {"corrupted": "denoising: ", "clean": "noising: "}.get(base, "") if "corrupted" in view.mean else ""
    return [text, *([f"[{unit}]"] if unit else []), *([f"{way}patched into the {base} run"] if base else [])]


def _labels(data: xr.Dataset, dim: str) -> list[_Label]:
    """A label for each entry of a dim: for positions the tokens, for the rows of a sparse result what names them."""
    if dim == "pos" and "token" in data.coords:
        arrays = [data[side] for side in ("token", "corrupted_token") if side in data.coords]
        sides = [array.transpose(..., "pos").values.reshape(-1, data.sizes["pos"]).T for array in arrays]
        found = []
        for clean, corrupted in zip(sides[0], sides[-1], strict=True):
            differs, varies = bool((clean != corrupted).any()), len({*clean}) > 1 or len({*corrupted}) > 1
            other = "→" + _token(corrupted[0]) * bool(clean[0] != corrupted[0]) if differs else ""
            found.append(_Label(_token(clean[0]) + other + "…" * varies, differs, varies))
        return found
    if dim == "row":
        parts = [data[c] for c in data.coords if c != dim and data[c].dims == (dim,)]
        rows = zip(*([f"{part.name} {v}" for v in part.values] for part in parts), strict=True)
        return [_Label(" ".join(row)) for row in rows]
    return [_Label(f"{v:g}" if isinstance(v, float) else str(v)) for v in data[dim].values.tolist()]


def _token(text: str) -> str:
    bare = text.strip() or text.translate({32: "␣", 9: "⇥", 10: "⏎", 13: "⏎"})
    return bare if len(bare) <= 16 else f"{bare[:12]}⋯{bare[-3:]}"


def _number(value: float, bound: float) -> str:
    """With as many digits as the scale deserves, and no minus before a zero."""
    power = int(np.floor(np.log10(bound)))
    digits = max(0, 2 - power) if power > 0 else max(2, 1 - power)
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _canvas(
    view: _View, figure: Figure | SubFigure | None, title: str | None, size: tuple[float, float], below: float
) -> tuple[Figure | SubFigure, dict[tuple[int, int], Axes], tuple[float, float]]:
    """A canvas with a grid of panels of about a size in inches, the panels by row and column, and the size they got."""
    count, costs = len(view.panels), {}
    left = 0.6 + max(len(label.text) for panel in view.panels for label in panel.labels[0]) * CHARACTER * view.words[0]
    for across in range(1, count + 1):
        down = -(-count // across)
        repeated = down if view.columns == "model" or across * down > count else 1  # rows with tick labels of their own
        beside, above = 1.9 if down * size[1] < TALL else 1.1, 0.8 + 0.2 * down + 0.2 * len(view.legend)
        margins = np.array([left + beside, above + below * repeated])
        whole = margins + np.array([across * size[0], down * size[1]])
        costs[abs(np.log(whole[0] / whole[1] / 1.4)) + 0.3 * (across * down - count)] = across, down, margins, whole
    across, down, margins, whole = costs[min(costs)]
    canvas = figure or _Shown(figsize=tuple(whole), layout="constrained")
    if isinstance(canvas, Figure) and canvas.get_layout_engine() is None:
        canvas.set_layout_engine("constrained")
    axes = {divmod(n, across): canvas.add_subplot(down, across, n + 1) for n in range(count)}
    text = view.title if title is None else title
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        ax.set_title(panel.title if view.columns else text, fontsize=MEDIUM, parse_math=False)
    if view.columns and text:
        canvas.suptitle(text, fontsize=LARGE, parse_math=False)
    got = np.maximum((_inches(canvas) - margins) / [across, down], 0.5)
    return canvas, axes, (float(got[0]), float(got[1]))


def _inches(canvas: Figure | SubFigure) -> NDArray[np.float64]:
    return np.array(canvas.bbox.size) / canvas.dpi


def _texture(ax: Axes, mask: NDArray[np.bool_], key: str) -> None:
    """Hatches the cells of a mask, one rectangle for each run of cells in a row; a row of bars in its whole width."""
    runs: list[Rectangle] = []
    for row, line in enumerate(np.atleast_2d(mask.T).T):
        ends = np.flatnonzero(np.diff([0, *line.astype(int), 0])).reshape(-1, 2).tolist()
        runs += [Rectangle((start - 0.5 * (mask.ndim > 1), row - 0.5), stop - start, 1) for start, stop in ends]
    if runs:
        place = ax.transData if mask.ndim > 1 else ax.get_yaxis_transform()
        hatched = PatchCollection(runs, linewidth=0, gid=key, zorder=1.5, transform=place, **TEXTURES[key])
        ax.add_collection(hatched, autolim=False)


def _ticks(axis: Axis, labels: Sequence[_Label], words: bool, room: float) -> None:
    """Labels that do not touch: words turned and made smaller, numbers thinned out."""
    each, longest = room / len(labels), max(len(label.text) for label in labels) * CHARACTER
    flat = isinstance(axis, XAxis)
    needed = longest + 0.1 if flat else SMALL * 1.2 / 72
    step = 1 if words else next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s * each >= needed), 5000)
    turned: dict[str, Any] = {}
    if flat and words and needed > each:
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if each > 0.18 else {"rotation": 90}
    size = float(np.clip(each * 72 / 1.1, 3, SMALL)) if words and (turned or not flat) else SMALL
    texts = [label.text for label in labels[::step]]
    axis.set_ticks(range(0, len(labels), step), texts, fontsize=size, parse_math=False, **turned)
    axis.set_tick_params(width=0.5, length=2)
    for text, label in zip(axis.get_ticklabels(), labels[::step], strict=True):
        text.set(fontweight="bold" if label.differs else "normal", fontstyle="italic" if label.varies else "normal")
        text.set_color("#707070" if label.varies and not label.differs else "black")
    if words and not flat:
        axis.set_inverted(True)


def _finish(canvas: Figure | SubFigure, view: _View, axes: dict[tuple[int, int], Axes]) -> Figure:
    """Names the axes, keeps labels that panels share at the edge of the grid only, and explains what occurs."""
    names = ["position" if dim == "pos" else dim for dim in view.dims]
    shared = all(panel.labels[0] == view.panels[0].labels[0] for panel in view.panels)
    for panel, ((row, column), ax) in zip(view.panels, axes.items(), strict=True):
        ax.spines[:].set_linewidth(0.5)
        if column == 0:
            ax.set_ylabel(names[0], fontsize=MEDIUM)
        elif shared:
            ax.tick_params(labelleft=False)
        beneath = dict(zip(axes, view.panels, strict=True)).get((row + 1, column))
        if len(names) > 1 and beneath is None:
            ax.set_xlabel(names[1], fontsize=MEDIUM)
        elif beneath is not None and len(names) > 1 and beneath.labels[1] == panel.labels[1]:
            ax.tick_params(labelbottom=False)
    labels = [label for panel in view.panels for found in panel.labels for label in found]
    handles: list[Any] = [Patch(label=text, linewidth=0.5, **TEXTURES[key]) for key, text in view.legend.items()]
    mark: dict[str, Any] = {"linestyle": "", "markeredgewidth": 0}
    if any(label.differs for label in labels):
        sample = r"$\bf{a{\to}b}$"
        text = "clean→corrupted token"
        handles.append(Line2D([], [], marker=sample, markersize=17, color="black", label=text, **mark))
    if any(label.varies for label in labels):
        text = "pairs differ: first pair's token"
        handles.append(Line2D([], [], marker=r"$\it{a}\ldots$", markersize=11, color="#707070", label=text, **mark))
    if handles:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": max(1, int(_inches(canvas)[0] / 2))}
        canvas.legend(handles=handles, frameon=False, fontsize=SMALL, handlelength=2.4, **place)
    found = canvas.get_figure(root=True)
    assert isinstance(found, Figure)
    return found
