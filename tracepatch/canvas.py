"""What all figures share: sizes, colours, textures, tick labels, legends, and a figure that notebooks show.

Every figure keeps apart three kinds of cell: a measured value (a colour, white at 0), an effect that was proved to be
zero (hatched), and a cell that holds no number (grey, or dotted where it is not measured yet). Nothing here touches
pyplot, so that no figure stays open.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from tracepatch.errors import plural
from tracepatch.panels import Label, View

COLOURS = "RdBu_r"  # white at 0, and told apart with any colour blindness
SMALL, MEDIUM, LARGE = 7, 8, 9  # points: legible where the figure is printed at its own size
CHARACTER, WIDTH = 0.058, 6.5  # inches: the mean width of a small character, and what panels may take
TALL = 2.6  # inches: what a colour bar must have for its label to stand beside it
TEXTURES: dict[str, dict[str, Any]] = {
    "proved": {"facecolor": "white", "edgecolor": "#c6c6c6", "hatch": "////"},
    "pending": {"facecolor": "#f6f2e4", "edgecolor": "#c9b67a", "hatch": "...."},
    "absent": {"facecolor": "#dedede", "edgecolor": "#c0c0c0", "hatch": "xxxx"},
    "blank": {"facecolor": "white", "edgecolor": "white"},
}
NAMES = {"pos": "position", "dest": "attending token (dest)", "src": "attended token (src)"}


class Shown(Figure):
    """A figure that a notebook shows although pyplot did not make it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def number(value: float, bound: float) -> str:
    """With as many digits as the scale deserves, and no minus before a zero."""
    power = int(np.floor(np.log10(bound)))
    digits = max(0, 2 - power) if power > 0 else max(2, 1 - power)
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def laid_out(
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
    canvas = fitted(figure, *whole.tolist())
    axes = {divmod(n, across): canvas.add_subplot(down, across, n + 1) for n in range(count)}
    text = view.title if title is None else title
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        ax.set_title(panel.title if view.columns else text, fontsize=MEDIUM, parse_math=False)
    if view.columns and text:
        canvas.suptitle(text, fontsize=LARGE, parse_math=False)
    got = np.maximum((inches(canvas) - margins) / [across, down], 0.5)
    return canvas, axes, (float(got[0]), float(got[1]))


def interval_key(result: xr.Dataset, kind: str) -> Line2D | Patch:
    """What an interval looks like, for a legend: ``"ring"`` where it includes 0, ``"whiskers"`` or ``"band"``."""
    clusters, pairs = int(result.attrs["clusters"]), int(result.attrs["averaged_pairs"])
    over = plural(clusters, "pair") if clusters == pairs else f"{plural(clusters, 'cluster')} of pairs"
    name = f"{100 * float(result.attrs['interval_level']):g} % interval over {over}"
    if kind == "ring":
        look: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markerfacecolor": "none", "linestyle": ""}
        return Line2D([], [], color="#303030", markeredgewidth=0.6, label=f"{name} includes 0", **look)
    if kind == "band":
        return Patch(color="#303030", alpha=0.2, linewidth=0, label=name)
    return Line2D([], [], color="#303030", linewidth=0.9, marker="|", markersize=5, label=name)


def inches(canvas: Figure | SubFigure) -> NDArray[np.float64]:
    """Width and height of a figure or subfigure."""
    return np.array(canvas.bbox.size) / canvas.dpi


def hatched(ax: Axes, mask: NDArray[np.bool_], key: str) -> None:
    """Gives the cells of a mask their texture: one rectangle for each run of cells in a row, or whole rows of bars."""
    runs: list[Rectangle] = []
    for row, line in enumerate(np.atleast_2d(mask.T).T):
        ends = np.flatnonzero(np.diff([0, *line.astype(int), 0])).reshape(-1, 2).tolist()
        runs += [Rectangle((start - 0.5 * (mask.ndim > 1), row - 0.5), stop - start, 1) for start, stop in ends]
    if runs:
        place = ax.transData if mask.ndim > 1 else ax.get_yaxis_transform()
        over = 2.2 if key == "blank" else 1.5  # of the lines between cells
        drawn = PatchCollection(runs, linewidth=0, gid=key, zorder=over, transform=place, **TEXTURES[key])
        ax.add_collection(drawn, autolim=False)


def unsure(ax: Axes, mask: NDArray[np.bool_], room: float) -> None:
    """A ring in the cells of a mask: in a corner, where numbers leave it free, or in the middle of small cells."""
    at = np.argwhere(mask) + (0.0 if room < 0.18 else 0.32)
    size = float(np.clip(room * 72 / 5, 1.2, 3.5))
    ax.scatter(at[:, 1], at[:, 0], size**2, facecolors="none", edgecolors="#303030", linewidths=0.6, gid="unsure")


def tick_labels(axis: Axis, labels: Sequence[Label], words: bool, room: float) -> None:
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


def finished(
    canvas: Figure | SubFigure, view: View, axes: dict[tuple[int, int], Axes], more: Sequence[Any] = ()
) -> Figure:
    """Names the axes, keeps labels that panels share at the edge of the grid only, and explains what occurs.

    Args:
        canvas: Of the panels.
        view: What they show.
        axes: The panels by row and column.
        more: What else the legend explains.
    """
    names = [NAMES.get(dim, dim) for dim in view.dims]
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
    handles += [*token_keys(labels), *more]
    legend(canvas, handles)
    return root(canvas)


def token_keys(labels: Sequence[Label]) -> list[Line2D]:
    """What the type faces of tokens mean, as far as they occur, for a legend."""
    mark: dict[str, Any] = {"linestyle": "", "markeredgewidth": 0}
    handles = list[Line2D]()
    if any(label.differs for label in labels):
        sample = r"$\bf{a{\to}b}$"
        text = "clean→corrupted token"
        handles.append(Line2D([], [], marker=sample, markersize=17, color="black", label=text, **mark))
    if any(label.varies for label in labels):
        text = "pairs differ: first pair's token"
        handles.append(Line2D([], [], marker=r"$\it{a}\ldots$", markersize=11, color="#707070", label=text, **mark))
    return handles


def root(canvas: Figure | SubFigure) -> Figure:
    """The whole figure that a canvas is part of."""
    found = canvas.get_figure(root=True)
    assert isinstance(found, Figure)
    return found


def fitted(figure: Figure | SubFigure | None, width: float, height: float) -> Figure | SubFigure:
    """The canvas that was given, or a new one of a size in inches, whose parts make room for each other."""
    canvas = figure or Shown(figsize=(width, height), layout="constrained")
    if isinstance(canvas, Figure) and canvas.get_layout_engine() is None:
        canvas.set_layout_engine("constrained")
    return canvas


def legend(canvas: Figure | SubFigure, handles: Sequence[Any], title: str = "") -> None:
    """What the marks mean, below the panels, in as many columns as fit."""

    def width(columns: int) -> float:
        parts = np.array_split([len(handle.get_label()) for handle in handles], columns)  # as a legend fills them
        return sum(float(max(part)) * CHARACTER + 0.45 for part in parts)

    if handles:
        fitting = [columns for columns in range(1, len(handles) + 1) if width(columns) < inches(canvas)[0]]
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": max(fitting, default=1)}
        made = canvas.legend(handles=handles, frameon=False, fontsize=SMALL, handlelength=2.4, **place)
        if title:
            made.set_title(title, FontProperties(size=SMALL))
            made.get_title().set(parse_math=False, ha="center")
