"""What both directions say of each site: sufficient, necessary, both, or working against the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tracepatch.canvas import MEDIUM, SMALL, fitted, legend, root
from tracepatch.combining import main_variable, over_pairs
from tracepatch.errors import ResultError, listing
from tracepatch.marks import Look, key, name_points
from tracepatch.panels import title_of, told
from tracepatch.points import DASHES, Axis, Points, limits
from tracepatch.verdicts import directions_of

VERDICTS = {
    "necessary and sufficient": Look("#0072B2", "o", "-"),
    "redundant": Look("#009E73", "s", "-"),
    "necessary only": Look("#D55E00", "^", "-"),
    "opposing": Look("#CC79A7", "v", "-"),
    "irrelevant": Look("#8A8A8A", "o", "-"),
}


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
    the other way by as much as a threshold is opposing: it works against the clean answer.

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
        denoising, noising, shares = directions_of(denoising)
        sufficient = shares["sufficient"] if sufficient is None else sufficient
        necessary = shares["necessary"] if necessary is None else necessary
    sufficient, necessary = (0.2 if share is None else share for share in (sufficient, necessary))
    _require_directions(denoising, noising)
    if not (sufficient > 0 and necessary > 0):
        raise ResultError(f"Thresholds are positive shares, not {sufficient!r} and {necessary!r}.")
    restored, lost = over_pairs(denoising), over_pairs(noising)
    lost = lost.assign(normalized=(-lost["normalized"]).assign_attrs(lost["normalized"].attrs))
    points = Points.of(Axis.of(restored, "normalized"), Axis.of(lost, "normalized"))
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
        area = 10 if verdict == "irrelevant" else 26
        ax.scatter(x[mask], y[mask], area, look.colour, marker=look.shape, **style)
        handles.append(key(look, f"{verdict} ({mask.sum()})"))
    bounds = [[sufficient, necessary], [-sufficient, -necessary]]
    limits(ax, np.concatenate([points.both, bounds]), same=False)
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


def _require_directions(denoising: xr.Dataset, noising: xr.Dataset) -> None:
    """Refuses results of other directions."""
    wrong = []
    for name, given, base in (("denoising", denoising, "corrupted"), ("noising", noising, "clean")):
        main_variable(given)
        if given.attrs.get("base") != base:
            wrong.append(f"{name} edits the {base} run; this result edits the {given.attrs.get('base', 'unknown')} run")
        if "normalized" not in given:
            wrong.append(f"{name} has no `normalized`: the pairs need corrupted prompts")
    if wrong:
        raise ResultError(
            f"quadrants(denoising, noising) takes tp.patch(…, direction='denoising') and then direction='noising'.\n"
            f"{listing(wrong)}"
        )
