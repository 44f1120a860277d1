"""Points that are told apart and named: colours with shapes, the name of a site, labels that do not overlap."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from tracepatch.canvas import SMALL
from tracepatch.errors import ResultError
from tracepatch.panels import readable

# Okabe and Ito's colours, which any colour vision tells apart, in an order of contrast with white; shapes repeat it.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A8A8A")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", "--", "-.", ":")
FAINT = "#9a9a9a"
MOST = len(PALETTE)
ABBREVIATED = {"layer": "L{}", "head": "H{}", "kv_head": "KV{}", "neuron": "N{}"}
REACHES, TURNS = (9, 16, 25, 36, 50, 66), 16  # points from a mark to its label, and directions that are tried


class Look(NamedTuple):
    """How the marks of one entry look."""

    colour: str
    shape: str
    line: str


def looks(entries: Sequence[Any], what: str) -> dict[Any, Look]:
    """A look of its own for each entry.

    Raises:
        ResultError: There are more than can be told apart.
    """
    if len(entries) > MOST:
        raise ResultError(f"{what} has {len(entries)} entries, and {MOST} can be told apart: select some of them.")
    cycle = zip(PALETTE, SHAPES, itertools.cycle(LINES), strict=False)
    return {entry: Look(*look) for entry, look in zip(entries, cycle, strict=False)}


def site_words(labels: Mapping[str, Any], tokens: Mapping[Any, str] | None = None) -> str:
    """A site in a few letters: ``z L9H6``, ``L3 · pos 9 (gave)``.

    Args:
        labels: Its coordinates.
        tokens: The text of each position.
    """
    front = [str(value) for dim, value in labels.items() if dim in ("component", "model")]
    short = "".join(ABBREVIATED[dim].format(value) for dim, value in labels.items() if dim in ABBREVIATED)
    rest = []
    for dim, value in labels.items():
        if dim in ("component", "model", *ABBREVIATED):
            continue
        text = (tokens or {}).get(value, "") if dim == "pos" else ""
        rest.append(str(value) if dim == "name" else f"{dim} {value}" + f" ({text})" * bool(text))
    return " · ".join(filter(None, [" ".join([*front, short]).strip(), *rest]))


def tokens_of(result: xr.Dataset | xr.DataArray) -> dict[Any, str]:
    """The text of each position, where it is the same in all cells."""
    if "token" not in result.coords or result["token"].dims != ("pos",):
        return {}
    return dict(zip(result["pos"].values.tolist(), map(readable, result["token"].values.tolist()), strict=True))


def key(look: Look, text: str, line: bool = False) -> Line2D:
    """What an entry looks like, for a legend."""
    style: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.2} if line else {"linestyle": ""}
    return Line2D([], [], color=look.colour, marker=look.shape, markersize=4.5, markeredgewidth=0, label=text, **style)


def corner_text(ax: Axes, text: str, points: NDArray[np.float64], diagonal: bool) -> Bbox:
    """Writes a text into the corner with the fewest of the points ``[point, 2]``; the box in pixels that it takes.

    Args:
        ax: The axes, with their final limits.
        text: The text.
        points: What it should not cover.
        diagonal: Whether the corners of the diagonal from below are left free.
    """
    inside = ax.transAxes.inverted().transform(ax.transData.transform(points))
    corners = [(0.03, 0.97), (0.97, 0.03), *([] if diagonal else [(0.03, 0.03), (0.97, 0.97)])]
    across, up = min(corners, key=lambda corner: (abs(inside - corner) < (0.4, 0.2)).all(1).sum())
    way: dict[str, Any] = {"ha": "left" if across < 0.5 else "right", "va": "bottom" if up < 0.5 else "top"}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    written = ax.text(across, up, text, fontsize=SMALL, transform=ax.transAxes, bbox=box, zorder=4, **way)
    _settled(ax)
    return written.get_window_extent()


def name_points(
    ax: Axes,
    points: Sequence[tuple[float, float, str]],
    others: NDArray[np.float64],
    avoid: Sequence[Bbox] = (),
) -> None:
    """Writes names beside points, with a line to each, so that they cover neither each other nor the axes' edge.

    Args:
        ax: The axes, with their final limits.
        points: x, y and the name, the most important first. One for which there is no room is left out.
        others: All points ``[point, 2]``, which names should not cover.
        avoid: Boxes in pixels that are taken.
    """
    per = _settled(ax) / 72
    marks, room = ax.transData.transform(others), ax.get_window_extent()
    boxes, lines = [box.padded(3 * per) for box in avoid], np.zeros((0, 2))
    for x, y, name in points:
        probe = ax.text(0, 0, name, fontsize=SMALL, parse_math=False)
        half = np.array(probe.get_window_extent().size) / 2
        probe.remove()
        at, best = ax.transData.transform((x, y)), None
        for reach, turn in itertools.product(REACHES, range(TURNS)):
            way = np.array([np.cos(2 * np.pi * turn / TURNS), np.sin(2 * np.pi * turn / TURNS)])
            centre = at + way * (reach * per + half * abs(way))
            box = Bbox([centre - half, centre + half])
            outside = (centre - half < room.min).any() or (centre + half > room.max).any()
            if outside or any(box.overlaps(other) for other in boxes):
                continue
            line = at + np.linspace(0.15, 0.85, 16)[:, None] * (centre - at)
            touched = (abs(line[:, None] - marks) < 3 * per).all(2).any(0) & (abs(marks - at) > 3 * per).any(1)
            crossed = sum(box.containsx(px) and box.containsy(py) for px, py in lines)
            crossed += sum(other.containsx(px) and other.containsy(py) for px, py in line for other in boxes)
            covered = (abs(marks - centre) < half + 3 * per).all(1).sum()
            cost = reach + 60 * (covered + touched.sum() + crossed)
            if best is None or cost < best[0]:
                best = cost, centre, box, line
        if best is None:
            continue
        boxes.append(best[2].padded(4 * per))
        lines = np.concatenate([lines, best[3]])
        ax.annotate(
            name,
            (x, y),
            tuple((best[1] - at) / per),
            textcoords="offset points",
            fontsize=SMALL,
            ha="center",
            va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        ).set_in_layout(False)


def _settled(ax: Axes) -> float:
    """Gives the axes the size that they will have; pixels in an inch."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure.dpi


def sequence(low: float, high: float) -> Any:
    """Colours of an ordered quantity, all of them visible on white."""
    scale = mpl.colormaps["viridis"].resampled(256)
    return mpl.colors.ListedColormap(scale(np.linspace(0, 0.82, 256))), mpl.colors.Normalize(low, high)
