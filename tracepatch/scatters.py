"""Two results against each other, such as an estimate and what it estimates."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tracepatch.agreement import SAMPLED, TOP, View, rounded
from tracepatch.canvas import MEDIUM, SMALL, fitted, legend, root
from tracepatch.combining import main_variable, over_pairs
from tracepatch.errors import ResultError, plural
from tracepatch.findings import Audit
from tracepatch.marks import FAINT, PALETTE, corner_text, key, looks, name_points, sequence
from tracepatch.panels import title_of
from tracepatch.points import DASHES, Axis, Points, limits

COLOURED = ("component", "model", "layer")  # what points are coloured by if nothing else is said
WIDE = 60  # characters of a title
NOTABLE = 0.02  # of the axis: smaller disagreements are not named


def scatter(
    x: xr.Dataset | xr.DataArray,
    y: xr.Dataset | xr.DataArray,
    variable: str | None = None,
    *,
    color: str | None = None,
    label: int = 5,
    title: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    corner: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """A point for each site that two results share: an estimate of its effect over its effect, one model over another.

    Both axes have one scale where the units are the same, with the line y = x. In a corner stand Pearson's and
    Spearman's correlation over the sites that were measured in both, and their number. What was proved to be zero in
    one of them is a ring, and does not count.

    Args:
        x: A result, averaged over pairs as ``tp.over_pairs`` does it, or a variable of one, taken as it is.
        y: The same for the other axis. Sites are matched by their labels; those of one result only are left out.
        variable: What to show of results; ``normalized`` if both have it, else ``effect`` or ``estimate``.
        color: What colours the points: a dim or coordinate. By default component, model or layer, whichever has
            several entries. Words have a colour and shape each, numbers a scale.
        label: How many of the largest disagreements are named: of the points farthest from y = x or, where units
            differ, from a straight line through all. A name for which there is no room is left out.
        title: Replaces the default, which names the model and the pairs; ``""`` leaves it out.
        xlabel: Replaces what is said of x.
        ylabel: Replaces what is said of y.
        corner: Replaces the correlations.
        figure: A figure or subfigure to draw into; by default a new one.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: The results have nothing in common or other dims, or a variable or coordinate does not exist.
    """
    x, y = (over_pairs(given) if isinstance(given, xr.Dataset) else given for given in (x, y))
    if variable is None and all("normalized" in given for given in (x, y) if isinstance(given, xr.Dataset)):
        variable = "normalized"
    points = Points.of(Axis.of(x, variable), Axis.of(y, variable))
    canvas = fitted(figure, 4.6, 4.7)
    ax = canvas.add_subplot()
    default = title_of(x) if isinstance(x, xr.Dataset) else ""
    ax.set_title(textwrap.fill(default, WIDE) if title is None else title, fontsize=MEDIUM, parse_math=False)
    handles = _coloured(ax, points, color)
    limits(ax, points.both, points.same)
    if points.same:
        ax.axline((0, 0), slope=1, zorder=1, **DASHES)
        handles.append(Line2D([], [], label="y = x", **DASHES))
    lines = _distinct(x, y, points.axes)
    for axis, given, words in ((ax.xaxis, xlabel, lines[0]), (ax.yaxis, ylabel, lines[1])):
        axis.set_label_text("\n".join(words) if given is None else given, fontsize=SMALL, parse_math=False)
    legend(canvas, handles)
    box = corner_text(ax, _correlations(points) if corner is None else corner, points.both, points.same)
    apart = abs(_disagreement(points))
    order = [
        i for i in np.argsort(-apart, kind="stable")[:label].tolist() if apart[i] > NOTABLE * np.ptp(ax.get_ylim())
    ]
    name_points(ax, points.names(order), points.both, [box])
    return root(canvas)


def audit(audited: xr.Dataset, **options: Any) -> Figure:
    """Exact effects over their estimates, of the sites that ``tp.audit`` patched, coloured by component.

    In a corner stand the correlations of ``tp.Audit``: over all sites, those drawn by chance standing for the others.

    Args:
        audited: What ``tp.audit`` returned.
        options: ``color``, ``label``, ``title`` and ``figure``, as for ``scatter``.

    Raises:
        ResultError: The dataset is not audited.
    """
    found, view, like = Audit.of(audited), View.of(audited), audited["audited"]
    patched, axes = like.isin((TOP, SAMPLED)), list[xr.DataArray]()
    for words, values in ((f"estimate by {audited.attrs['estimator']}", view.estimate), ("exact effect", view.effect)):
        data = like.transpose(*view.dims).copy(data=values.reshape([like.sizes[dim] for dim in view.dims]))
        axes.append(data.where(patched).assign_attrs(units=view.unit, long_name=words))
    lines = [f"Pearson r = {rounded(found.pearson)}", f"Spearman ρ = {rounded(found.spearman)}"]
    corner = "\n".join([*lines, f"{int(patched.sum()):,} of {plural(found.cells, 'site')}"])
    options = {"title": textwrap.fill(title_of(over_pairs(audited)), WIDE), "corner": corner, **options}
    return scatter(axes[0], axes[1], **options)


def _coloured(ax: Axes, points: Points, color: str | None) -> list[Any]:
    """Draws the points; what the legend says of them."""
    coords, shape = points.coords.coords, points.coords.shape
    if color is None:
        color = next((c for c in COLOURED if c in coords and coords[c].size > 1), "")
    elif color not in coords:
        offered = ", ".join(str(name) for name in coords if coords[name].dims)
        raise ResultError(f"There is no coordinate {color!r} to colour by; there are {offered}.")
    x, y = points.both.T
    look: dict[str, Any] = {"linewidths": 0.3, "edgecolors": "white", "zorder": 3, "rasterized": len(x) > 5000}
    look |= {"s": float(np.clip(3000 / len(x), 4, 24)), "alpha": 0.9 if len(x) < 300 else 0.5}
    known, handles = points.measured, list[Any]()
    if color:
        every = coords[color].broadcast_like(points.coords).transpose(*points.coords.dims).values
        values = every.reshape(shape).ravel()[points.kept]
    if color and values.dtype.kind in "OUT":
        entries = list(dict.fromkeys(values.tolist()))
        for entry, own in looks(entries, color).items():
            mask = known & (values == entry)
            ax.scatter(x[mask], y[mask], color=own.colour, marker=own.shape, gid=str(entry), **look)
            handles.append(key(own, str(entry)))
    elif color:
        colours, scale = sequence(float(values.min()), float(values.max()))
        dots = ax.scatter(x[known], y[known], c=values[known], cmap=colours, norm=scale, gid=color, **look)
        bar = ax.figure.colorbar(
            dots, cax=ax.inset_axes((1.03, 0, 0.03, 1))
        )  # as high as the axes, whatever their shape
        bar.set_label(color, fontsize=SMALL)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=SMALL, width=0.5, length=2)
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=values.dtype.kind in "iu"))
    else:
        ax.scatter(x[known], y[known], color=PALETTE[0], gid="sites", **look)
    if not known.all():
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": FAINT, "linewidths": 0.6}
        ax.scatter(x[~known], y[~known], look["s"], zorder=2, gid="proved", **ring)
        style: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": FAINT, "linestyle": ""}
        handles.append(Line2D([], [], marker="o", markersize=4, label="no effect (proved)", **style))
    return handles


def _correlations(points: Points) -> str:
    """Pearson's and Spearman's correlation of what was measured in both, and how many sites that is."""
    frame = pd.DataFrame(points.both[points.measured])
    lines = []
    for name, columns in (("Pearson r", frame), ("Spearman ρ", frame.rank())):  # ranks of ties are their mean
        varied = len(columns) > 2 and bool((columns.std() > 0).all())
        lines.append(f"{name} = {columns[0].corr(columns[1]):.2f}".replace("-", "−") if varied else f"{name} undefined")
    lines.append(plural(len(frame), "site") + (f", {points.alone:,} in one only" if points.alone else ""))
    return "\n".join(lines)


def _disagreement(points: Points) -> NDArray[np.float64]:
    """How far each point is above y = x or, where units differ, above the least-squares line."""
    x, y = points.both.T
    if points.same:
        return np.asarray(y - x)
    slope, shift = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, y.mean())
    return np.asarray(y - slope * x - shift)


def _distinct(x: Any, y: Any, axes: tuple[Axis, Axis]) -> list[list[str]]:
    """What is said of either axis, with what tells the two apart in front."""
    lines = [list(axis.words) for axis in axes]
    if not all(isinstance(given, xr.Dataset) for given in (x, y)):
        return lines
    estimated = [main_variable(given) == "estimate" for given in (x, y)]
    if any(estimated) and not all(estimated):
        which = estimated.index(False)
        lines[which][0] = f"exact {lines[which][0]}"
    elif lines[0] == lines[1]:
        for name in ("model", "component", "pairs"):
            ours = [str(given.attrs.get(name, "")) for given in (x, y)]
            if ours[0] != ours[1]:
                return [[f"{own}: {line[0]}", *line[1:]] for own, line in zip(ours, lines, strict=True)]
    return lines
