"""Two results against each other: an estimate and what it estimates, what is sufficient and what is necessary."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tracepatch.agreement import SAMPLED, TOP, View, rounded
from tracepatch.canvas import MEDIUM, SMALL, fitted, legend, root
from tracepatch.combining import MAIN, by_site, labels_at, main_variable, over_pairs
from tracepatch.errors import ResultError, plural
from tracepatch.findings import Audit
from tracepatch.marks import FAINT, PALETTE, Look, corner_text, key, looks, name_points, sequence, site_words, tokens_of
from tracepatch.panels import named, title_of, told
from tracepatch.plan import Status
from tracepatch.verdicts import require_directions, two_ways

COLOURED = ("component", "model", "layer")  # what points are coloured by if nothing else is said
WIDE = 60  # characters of a title
NOTABLE = 0.02  # of the axis: smaller disagreements are not named
DASHES: dict[str, Any] = {"color": "#707070", "linewidth": 0.8, "linestyle": (0, (4, 3))}
VERDICTS = {
    "necessary and sufficient": Look("#0072B2", "o", "-"),
    "sufficient, not necessary: redundant": Look("#009E73", "s", "-"),
    "necessary, not sufficient": Look("#D55E00", "^", "-"),
    "works against": Look("#CC79A7", "v", "-"),
    "neither": Look("#8A8A8A", "o", "-"),
}


@dataclass(frozen=True)
class _Axis:
    """One of the two results: its numbers, which of them were measured, its unit and what is said of it."""

    data: xr.DataArray
    measured: xr.DataArray
    unit: str
    words: list[str]

    @classmethod
    def of(cls, given: xr.Dataset | xr.DataArray, variable: str | None) -> _Axis:
        if isinstance(given, xr.DataArray):
            unit, name = str(given.attrs.get("units", "")), str(given.attrs.get("long_name", given.name or ""))
            return cls(given, given.notnull(), unit, [name, *([f"[{unit}]"] if unit else [])])
        main = main_variable(given)
        name = main if variable in (None, *MAIN) else named(given, variable)
        data = given[name]
        known = given["status"].isin([Status.MEASURED, Status.ESTIMATED]) if "status" in given else data.notnull()
        lines = told(given, name)
        return cls(data, known.broadcast_like(data), str(data.attrs.get("units", "")), lines)


@dataclass(frozen=True)
class _Points:
    """The cells that two results share, one after the other."""

    both: NDArray[np.float64]  # [point, 2]
    measured: NDArray[np.bool_]
    coords: xr.DataArray
    axes: tuple[_Axis, _Axis]
    alone: int

    @property
    def same(self) -> bool:
        """Whether the axes have one unit."""
        return self.axes[0].unit == self.axes[1].unit

    def names(self, chosen: list[int]) -> list[tuple[float, float, str]]:
        """x, y and the site of some of them."""
        dims, shape = [str(dim) for dim in self.coords.dims], self.coords.shape
        tokens, found = tokens_of(self.coords), []
        for i in chosen:
            at = dict(zip(dims, map(int, np.unravel_index(self.kept[i], shape)), strict=True))
            found.append((*self.both[i].tolist(), site_words(labels_at(self.coords, at), tokens)))
        return found

    @property
    def kept(self) -> NDArray[np.intp]:
        """The number of each among the cells of ``coords``, which has NaN elsewhere."""
        return np.flatnonzero(self.coords.notnull().values)

    @classmethod
    def of(cls, x: _Axis, y: _Axis) -> _Points:
        if set(x.data.dims) != set(y.data.dims):
            told = [
                f"{name} has {', '.join(map(str, axis.data.dims)) or 'none'}" for name, axis in (("x", x), ("y", y))
            ]
            raise ResultError(f"Both need the same dims to be matched: {'; '.join(told)}.")
        if "metric" in x.data.dims:
            pick = x.data["metric"].values.tolist()[0]
            raise ResultError(
                f"The results have several metrics: select one of each, as in effects.sel(metric={pick!r})."
            )
        matched = (by_site(array) for array in (x.data, y.data, x.measured, y.measured))
        a, b, m, n = xr.align(*matched, join="inner")
        b, m, n = (array.transpose(*a.dims) for array in (b, m, n))
        there = np.isfinite(a.values) & np.isfinite(b.values)
        if not there.any():
            raise ResultError(
                "The two results have no site with a number in both: their labels, or where they have numbers, differ."
            )
        both = np.stack([a.values[there], b.values[there]], 1).astype(float)
        alone = int(x.data.notnull().sum() + y.data.notnull().sum()) - 2 * len(both)
        return cls(both, (m.values & n.values)[there], a.where(there), (x, y), alone)


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
    points = _Points.of(_Axis.of(x, variable), _Axis.of(y, variable))
    canvas = fitted(figure, 4.6, 4.7)
    ax = canvas.add_subplot()
    default = title_of(x) if isinstance(x, xr.Dataset) else ""
    ax.set_title(textwrap.fill(default, WIDE) if title is None else title, fontsize=MEDIUM, parse_math=False)
    handles = _coloured(ax, points, color)
    _limits(ax, points.both, points.same)
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


def quadrants(
    denoising: xr.Dataset,
    noising: xr.Dataset | None = None,
    *,
    sufficient: float | None = None,
    necessary: float | None = None,
    label: int = 12,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Which sites are sufficient, and which are necessary: a point for each site, with a verdict at stated thresholds.

    Across stands the normalized effect of denoising, the share of the clean − corrupted difference that a site brings
    back alone; upwards minus that of noising, the share that is lost without it. A part of an AND is necessary and not
    sufficient, a part of an OR sufficient and not necessary (Heimersheim & Nanda 2024). A site that moves the metric
    the other way by as much as a threshold works against the clean answer.

    Args:
        denoising: The result of writing clean values into the corrupted run; or that of ``tp.sweeps.both_directions``,
            alone.
        noising: The result of writing corrupted values into the clean run, at the same sites.
        sufficient: The least share brought back that counts as sufficient; that of the result, or 0.2.
        necessary: The least share lost that counts as necessary; that of the result, or 0.2.
        label: How many sites are named, the largest first; those that are neither are not.
        title: As for ``scatter``.
        figure: As for ``scatter``.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: The results are not of these two directions or share no site, or a threshold is not positive.
    """
    if noising is None:
        denoising, noising, shares = two_ways(denoising)
        sufficient = shares["sufficient"] if sufficient is None else sufficient
        necessary = shares["necessary"] if necessary is None else necessary
    sufficient, necessary = (0.2 if share is None else share for share in (sufficient, necessary))
    require_directions(denoising, noising)
    if not (sufficient > 0 and necessary > 0):
        raise ResultError(f"Thresholds are positive shares, not {sufficient!r} and {necessary!r}.")
    restored, lost = over_pairs(denoising), over_pairs(noising)
    lost = lost.assign(normalized=(-lost["normalized"]).assign_attrs(lost["normalized"].attrs))
    points = _Points.of(_Axis.of(restored, "normalized"), _Axis.of(lost, "normalized"))
    canvas = fitted(figure, 5.2, 5.4)
    ax = canvas.add_subplot()
    ax.set_title(title_of(restored) if title is None else title, fontsize=MEDIUM, parse_math=False)
    x, y = points.both.T
    against = (x <= -sufficient) | (y <= -necessary)
    enough, needed = (x >= sufficient) & ~against, (y >= necessary) & ~against
    masks = [enough & needed, enough & ~needed, needed & ~enough, against, ~(enough | needed | against)]
    handles = []
    for (verdict, look), mask in zip(VERDICTS.items(), masks, strict=True):
        style: dict[str, Any] = {"linewidths": 0.4, "edgecolors": "white", "zorder": 3, "gid": verdict}
        area = 10 if verdict == "neither" else 26
        ax.scatter(x[mask], y[mask], area, look.colour, marker=look.shape, **style)
        handles.append(key(look, f"{verdict} ({mask.sum()})"))
    bounds = [[sufficient, necessary], [-sufficient, -necessary]]
    _limits(ax, np.concatenate([points.both, bounds]), same=False)
    _tint(ax, sufficient, necessary)
    for line, bound in ((ax.axvline, sufficient), (ax.axhline, necessary)):
        line(bound, zorder=1, **DASHES)
        line(-bound, zorder=1, **(DASHES | {"color": "#c8c8c8"}))
    handles.append(Line2D([], [], label=f"thresholds {sufficient:g} and {necessary:g}", **DASHES))
    metric = told(restored, "normalized")[0].removeprefix("normalized effect").removeprefix(" on ")
    of = f" in {metric}" if metric else ""
    ax.set_xlabel(
        f"sufficient: share of the difference{of} that it restores\ndenoising: clean into the corrupted run",
        fontsize=SMALL,
    )
    ax.set_ylabel(
        f"necessary: share of the difference{of} that is lost\nnoising: corrupted into the clean run", fontsize=SMALL
    )
    legend(canvas, handles)
    size = np.where(masks[-1], -1, np.hypot(x, y))
    order = [i for i in np.argsort(-size, kind="stable")[:label].tolist() if size[i] >= 0]
    name_points(ax, points.names(order), points.both)
    return root(canvas)


def _tint(ax: Axes, sufficient: float, necessary: float) -> None:
    """Colours the three regions of a positive verdict faintly."""
    right, top = ax.get_xlim()[1], ax.get_ylim()[1]
    corners = [(sufficient, necessary, right, top), (sufficient, -necessary, right, necessary)]
    corners.append((-sufficient, necessary, sufficient, top))
    for look, (x0, y0, x1, y1) in zip(VERDICTS.values(), corners, strict=False):
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=look.colour, alpha=0.07, linewidth=0, zorder=0))


def _coloured(ax: Axes, points: _Points, color: str | None) -> list[Any]:
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


def _limits(ax: Axes, points: NDArray[np.float64], same: bool) -> None:
    """Room around points and 0; the same on both axes, or on each its own."""
    low, high = np.minimum(points.min(0), 0), np.maximum(points.max(0), 0)
    if same:
        low, high = np.full(2, low.min()), np.full(2, high.max())
        ax.set_aspect("equal", adjustable="box")
    room = 0.1 * np.where(high > low, high - low, 1.0)
    ax.set_xlim(low[0] - room[0], high[0] + room[0])
    ax.set_ylim(low[1] - room[1], high[1] + room[1])
    ax.axhline(0, color="#d8d8d8", linewidth=0.6, zorder=0)
    ax.axvline(0, color="#d8d8d8", linewidth=0.6, zorder=0)
    ax.tick_params(labelsize=SMALL, width=0.5, length=2)
    ax.spines[:].set_linewidth(0.5)


def _correlations(points: _Points) -> str:
    """Pearson's and Spearman's correlation of what was measured in both, and how many sites that is."""
    frame = pd.DataFrame(points.both[points.measured])
    lines = []
    for name, columns in (("Pearson r", frame), ("Spearman ρ", frame.rank())):  # ranks of ties are their mean
        varied = len(columns) > 2 and bool((columns.std() > 0).all())
        lines.append(f"{name} = {columns[0].corr(columns[1]):.2f}".replace("-", "−") if varied else f"{name} undefined")
    lines.append(plural(len(frame), "site") + (f", {points.alone:,} in one only" if points.alone else ""))
    return "\n".join(lines)


def _disagreement(points: _Points) -> NDArray[np.float64]:
    """How far each point is above y = x or, where units differ, above the least-squares line."""
    x, y = points.both.T
    if points.same:
        return np.asarray(y - x)
    slope, shift = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, y.mean())
    return np.asarray(y - slope * x - shift)


def _distinct(x: Any, y: Any, axes: tuple[_Axis, _Axis]) -> list[list[str]]:
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
