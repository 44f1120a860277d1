"""A number for every attention weight: a matrix for each head, or arcs over the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from tracepatch.canvas import CHARACTER, LARGE, MEDIUM, SMALL, fitted, inches, legend, number, root, token_keys
from tracepatch.combining import over_pairs
from tracepatch.errors import ResultError, listing
from tracepatch.heatmaps import heatmap, scale_limit
from tracepatch.marks import site_words
from tracepatch.panels import Panel, arrange, named, scale_words

UP, DOWN = "#B2182B", "#2166AC"  # the ends of the heatmaps' colour scale
FAINTEST = 0.05  # of the strongest: weaker arcs are left out
WIDEST = 3.2  # points
HIGH, LOOP = 0.95, 0.13  # inches: of the longest arc, and of the loop of a token that attends to itself
LONG = 9.0  # inches: a longer text is turned


def attention(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    count: int = 6,
    pair: int | None = None,
    **options: Any,
) -> Figure:
    """A matrix for each head, ``dest`` downwards and ``src`` across: what every attention weight does, or is.

    What a token cannot attend to is left white. All heads share a colour scale, white at 0.

    Args:
        effects: A result over layer, head, dest and src: of patched patterns or scores, or of attention attribution
            (pattern · gradient).
        variable: What to show; ``normalized`` where there is one, else ``effect`` or ``estimate``.
        heads: The (layer, head) to show, in order; by default those with the largest values.
        count: How many to show by default.
        pair: The pair to show; by default the average over pairs.
        options: ``limit``, ``title``, ``annotate`` and ``figure`` of ``tp.plots.heatmap``.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: Other dims, an unknown variable or pair, or heads that the result does not have.
    """
    chosen, name = _chosen(effects, variable, heads, count, pair)
    return heatmap(chosen, name, x="src", y="dest", columns="panel", **{"annotate": False, **options})


def arcs(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    count: int = 3,
    pair: int | None = None,
    limit: float | None = None,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Arcs over the text, a line of text for each head: from the token attended to, on the left, to the attending one.

    The wider an arc, the larger its number; its colour is the sign. A loop is a token that attends to itself. Arcs of
    less than a twentieth of the widest are left out.

    Args:
        effects: As for ``attention``.
        variable: As for ``attention``.
        heads: As for ``attention``.
        count: As for ``attention``.
        pair: The pair to show, which gives the text; by default the average over pairs, with the text of the first.
        limit: The number of the widest arc; by default as for ``tp.plots.heatmap``.
        title: Replaces the default, which names the model and the pairs; ``""`` leaves it out.
        figure: A figure or subfigure to draw into; by default a new one.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: As for ``attention``.
    """
    if limit is not None and not 0 < limit < np.inf:
        raise ResultError(f"limit is the number of the widest arc, a positive one, not {limit!r}.")
    chosen, name = _chosen(effects, variable, heads, count, pair)
    view = arrange(chosen, name, {"y": "dest", "x": "src"}, "panel", None)
    bound = limit or scale_limit(view, view.panels)
    text_of = {  # a position from the end stands there
        place: label
        for dim, found in zip(("dest", "src"), view.panels[0].labels, strict=True)
        for place, label in zip(chosen[dim].values.tolist(), found, strict=True)
    }
    places = sorted(text_of, key=lambda place: (place < 0, place))
    labels = [text_of[place] for place in places]
    widths = np.array([max(len(label.text), 2) * CHARACTER * (1.12 if label.differs else 1) + 0.08 for label in labels])
    turned = widths.sum() > LONG
    if turned:
        widths = np.full(len(labels), 0.17)
    longest = max(len(label.text) for label in labels) * CHARACTER
    below = 0.1 + (longest if turned else 0.12)
    canvas = fitted(figure, max(widths.sum() + 0.6, 3.6), len(view.panels) * (HIGH + below + 0.12) + 1.1)
    size = SMALL * min(1.0, (inches(canvas)[0] - 0.6) / widths.sum())
    middles = np.cumsum(widths) - widths / 2
    dests, srcs = (middles[[places.index(place) for place in chosen[dim].values.tolist()]] for dim in ("dest", "src"))
    for row, panel in enumerate(view.panels):
        ax = canvas.add_subplot(len(view.panels), 1, row + 1)
        ax.set_xlim(0, widths.sum())
        ax.set_ylim(-below, HIGH + 0.06)
        ax.set_axis_off()
        ax.text(-0.012, 0.5, panel.title, transform=ax.transAxes, ha="right", va="center", fontsize=MEDIUM)
        _arcs(ax, panel, dests, srcs, bound)
        for middle, label in zip(middles, labels, strict=True):
            face: dict[str, Any] = {"fontweight": "bold" if label.differs else "normal"}
            face |= {"fontstyle": "italic", "color": "#707070"} if label.varies and not label.differs else {}
            face |= (
                {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
                if turned
                else {"ha": "center", "va": "baseline"}
            )
            ax.text(middle, -0.05 if turned else -0.16, label.text, fontsize=size, parse_math=False, **face)
    text = view.title if title is None else title
    if text:
        canvas.suptitle(text, fontsize=LARGE, parse_math=False)
    words = [*scale_words(view, ""), "an arc: from the token attended to (left) to the one that attends (right)"]
    drawn = [panel.values[abs(np.nan_to_num(panel.values)) >= FAINTEST * bound] for panel in view.panels]
    keys = [
        Line2D([], [], color=colour, linewidth=WIDEST, label=f"{sign}{number(bound, bound)}")
        for sign, colour, found in (("+", UP, np.concatenate(drawn) > 0), ("−", DOWN, np.concatenate(drawn) < 0))
        if found.any()
    ]
    legend(canvas, keys + token_keys(labels), "\n".join(words))
    return root(canvas)


def _arcs(ax: Axes, panel: Panel, dests: NDArray[np.float64], srcs: NDArray[np.float64], bound: float) -> None:
    """One head's arcs, the strongest on top, between the places of its tokens."""
    strength = abs(np.nan_to_num(panel.values))
    dest, src = np.nonzero(strength >= FAINTEST * bound)
    order = np.argsort(strength[dest, src])
    dest, src = dest[order], src[order]
    ends, share = np.stack([srcs[src], dests[dest]], 1), np.minimum(strength[dest, src] / bound, 1)
    wide = abs(ends[:, 1] - ends[:, 0])
    turn = np.linspace(np.pi, 0, 60)
    reach = max(dests.max() - srcs.min(), srcs.max() - dests.min()) or 1.0
    x = ends.mean(1)[:, None] + np.cos(turn) * (ends[:, 1] - ends[:, 0])[:, None] / 2  # [arc, point]
    y = np.sin(turn) * (HIGH * (wide / reach) ** 0.7)[:, None]
    loop = np.linspace(-0.35, 1.35, 60) * np.pi
    x = np.where(wide[:, None] > 0, x, ends[:, :1] + np.cos(loop) * LOOP / 2)
    y = np.where(wide[:, None] > 0, y, LOOP / 2 + np.sin(loop) * LOOP / 2)
    colours = np.where((panel.values[dest, src] > 0)[:, None], to_rgba(UP), to_rgba(DOWN))
    colours[:, 3] = 0.3 + 0.7 * share
    widths = WIDEST * share**0.7
    lines = LineCollection(list(np.stack([x, y], 2)), colors=colours, linewidths=widths, capstyle="butt", gid="arcs")
    ax.add_collection(lines, autolim=False)


def _chosen(
    effects: xr.Dataset, variable: str | None, heads: Sequence[tuple[int, int]] | None, count: int, pair: int | None
) -> tuple[xr.Dataset, str]:
    """The heads to show along a dim ``panel``, and the variable."""
    if pair is not None:
        known = effects["pair"].values.tolist() if "pair" in effects.dims else []
        if pair not in known:
            raise ResultError(f"There is no pair {pair!r}; there are {', '.join(map(str, known)) or 'none: one mean'}.")
        effects = effects.sel(pair=pair)
    mean = over_pairs(effects)
    name = named(mean, variable)
    lone = {
        str(dim): 0 for dim in mean[name].dims if mean.sizes[dim] == 1 and dim not in ("layer", "head", "dest", "src")
    }
    mean = mean.isel(lone)
    for dim in ("layer", "head"):  # selected beforehand
        mean = mean if dim in mean.dims else mean.expand_dims({dim: [mean.coords.get(dim, xr.DataArray("?")).item()]})
    if set(mean[name].dims) != {"layer", "head", "dest", "src"}:
        has = ", ".join(map(str, effects[name].dims)) or "none"
        raise ResultError(
            f"Pictures of attention show layer, head, dest and src; {name!r} has the dims {has}. Patch patterns with "
            "tp.patch(model, pairs, 'pattern', by=('layer', 'head', 'dest', 'src')), and select of any other dim."
        )
    every = [(layer, head) for layer in mean["layer"].values.tolist() for head in mean["head"].values.tolist()]
    largest = abs(mean[name]).max(("dest", "src"))
    if heads is None:
        strength = {cell: float(largest.sel(layer=cell[0], head=cell[1])) for cell in every}
        found = [cell for cell in every if not np.isnan(strength[cell])]
        heads = sorted(sorted(found, key=lambda cell: -strength[cell])[:count])
    wrong = [f"layer {cell[0]}, head {cell[1]}" for cell in heads if cell not in every]
    if wrong or not heads:
        raise ResultError(f"The result has no such heads, or none was chosen.\n{listing(wrong)}")
    at = {dim: xr.DataArray([cell[i] for cell in heads], dims="panel") for i, dim in enumerate(("layer", "head"))}
    picked = mean.sel(at).drop_vars(["layer", "head", "kv_head", "depth"], errors="ignore")
    return picked.assign_coords(panel=[site_words({"layer": layer, "head": head}) for layer, head in heads]), name
