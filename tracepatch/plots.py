"""Datasets to matplotlib figures: heatmaps for two dims, bars for one, a panel for each model, component or metric.

Every figure keeps apart three kinds of cell: a measured value (a colour, white at 0), an effect that was proved to be
zero (hatched), and a cell that holds no number (grey, or dotted where it is not measured yet). Nothing here touches
pyplot, so that no figure stays open: a function returns its figure, which notebooks show and ``savefig`` writes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

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

from tracepatch.combining import require_dataset
from tracepatch.errors import ResultError
from tracepatch.panels import PANELS, Label, Panel, View, arrange, scale_words

COLOURS = "RdBu_r"  # white at 0, and told apart with any colour blindness
SMALL, MEDIUM, LARGE = 7, 8, 9  # points: legible where the figure is printed at its own size
CHARACTER, WIDTH = 0.058, 6.5  # inches: the mean width of a small character, and what panels may take
TALL = 2.6  # inches: what a colour bar must have for its label to stand beside it
FLOOR = 0.05  # of the clean − corrupted difference: the least that fills the colour scale
TEXTURES: dict[str, dict[str, Any]] = {
    "proved": {"facecolor": "white", "edgecolor": "#c6c6c6", "hatch": "////"},
    "pending": {"facecolor": "#f6f2e4", "edgecolor": "#c9b67a", "hatch": "...."},
    "absent": {"facecolor": "#dedede", "edgecolor": "#c0c0c0", "hatch": "xxxx"},
}


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
    view = arrange(effects, variable, {"y": y, "x": x}, columns, pair)
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
        values, scale, many = panel.values, Normalize(-bound, bound), panel.values.size > 5000
        mesh = ax.pcolormesh(across, up, values, cmap=COLOURS, norm=scale, rasterized=many)
        for key, mask in panel.masks.items():
            _texture(ax, mask, key)
        if min(wide / cells, high / rows) > 0.08:  # lines between smaller cells would hide them
            ax.vlines(across[1:-1], -0.5, rows - 0.5, color="#e4e4e4", linewidth=0.4)
            ax.hlines(up[1:-1], -0.5, cells - 0.5, color="#e4e4e4", linewidth=0.4)
        measured = np.argwhere(~np.any(list(panel.masks.values()), 0))
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
            lines = [
                part for line in scale_words(view, panel.title) for part in textwrap.wrap(line, 25 if flat else 99)
            ]
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
    view = arrange(effects, variable, {"y": y}, columns, pair)
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
        ax.set_xlabel("\n".join(scale_words(view, panel.title)), fontsize=SMALL, parse_math=False)
        _ticks(ax.yaxis, panel.labels[0], view.words[0], high)
    if view.columns != "metric" or view.name == "normalized":
        ends = np.array([ax.get_xlim() for ax in axes.values()])
        for ax in axes.values():
            ax.set_xlim(ends.min(), ends.max())
    return _finish(canvas, view, axes)


def picture(effects: xr.Dataset, variable: str | None = None, **options: Any) -> Figure:
    """The picture that fits a result: ``heatmap``, or ``bars`` where there is one dim; arguments as theirs."""
    require_dataset(effects)
    sizes = effects["effect"].sizes
    inner = [dim for dim in sizes if dim not in ("pair", *PANELS)]
    return (heatmap if len(inner) > 1 else bars)(effects, variable, **options)


def _limit(view: View, panels: Sequence[Panel]) -> float:
    """The default of ``heatmap``'s limit for panels that share a scale."""
    gap = 1.0 if view.name == "normalized" else min(p.gap for p in panels) if view.name.startswith("effect") else 0.0
    return max(FLOOR * gap, *(float(np.nanmax(abs(p.values), initial=0)) for p in panels)) or 1.0


def _number(value: float, bound: float) -> str:
    """With as many digits as the scale deserves, and no minus before a zero."""
    power = int(np.floor(np.log10(bound)))
    digits = max(0, 2 - power) if power > 0 else max(2, 1 - power)
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _canvas(
    view: View, figure: Figure | SubFigure | None, title: str | None, size: tuple[float, float], below: float
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


def _ticks(axis: Axis, labels: Sequence[Label], words: bool, room: float) -> None:
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


def _finish(canvas: Figure | SubFigure, view: View, axes: dict[tuple[int, int], Axes]) -> Figure:
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
