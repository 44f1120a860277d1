"""Heatmaps and bars: the pictures of a sweep over two dims, and over one."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from tracepatch.canvas import (
    CHARACTER,
    COLOURS,
    MEDIUM,
    SMALL,
    TALL,
    TEXTURES,
    WIDTH,
    finished,
    hatched,
    interval_key,
    laid_out,
    number,
    tick_labels,
    unsure,
)
from tracepatch.combining import main_variable, over_pairs
from tracepatch.errors import ResultError, listing
from tracepatch.panels import Panel, View, arrange, named, scale_words

FLOOR = 0.05  # of the clean − corrupted difference: the least that fills the colour scale


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
    each = np.array([0.32, 0.34]) if len(view.panels) == 1 or not all(view.words) else np.array([0.18, 0.18])
    wide, high = np.clip([cells, rows] * each, [1.7, 1.0], [WIDTH, 5.5]).tolist()
    titles = max(len(panel.title) for panel in view.panels) * CHARACTER * MEDIUM / SMALL
    size = max(wide, narrow, titles), high
    canvas, axes, (wide, high) = laid_out(view, figure, title, size, longest * CHARACTER)
    apart = view.columns == "metric" and view.name != "normalized"
    together = scale_limit(view, view.panels)
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        bound = limit or (scale_limit(view, [panel]) if apart else together)
        across, up = np.arange(cells + 1) - 0.5, np.arange(rows + 1) - 0.5
        values, scale, many = panel.values, Normalize(-bound, bound), panel.values.size > 5000
        mesh = ax.pcolormesh(across, up, values, cmap=COLOURS, norm=scale, rasterized=many)
        for key in TEXTURES:
            hatched(ax, panel.masks[key], key)
        if min(wide / cells, high / rows) > 0.08:  # lines between smaller cells would hide them
            ax.vlines(across[1:-1], -0.5, rows - 0.5, color="#e4e4e4", linewidth=0.4)
            ax.hlines(up[1:-1], -0.5, cells - 0.5, color="#e4e4e4", linewidth=0.4)
        measured = np.argwhere(~np.any(list(panel.masks.values()), 0))
        shown = [(i, j, number(panel.values[i, j], bound)) for i, j in measured]
        if annotate is None:
            fits = max((len(text) for _, _, text in shown), default=0) * CHARACTER < wide / cells and high / rows > 0.15
            shown = [(i, j, text) for i, j, text in shown if fits and values.size <= 60 and text.strip("0.")]
        for i, j, text in shown if annotate is not False else ():
            colour = "white" if abs(panel.values[i, j]) > 0.6 * bound else "#303030"
            ax.text(j, i, text, ha="center", va="center", fontsize=SMALL - 1, color=colour, parse_math=False)
        if panel.unsure.any():
            unsure(ax, panel.unsure, min(wide / cells, high / rows))
        tick_labels(ax.xaxis, panel.labels[1], view.words[1], wide)
        tick_labels(ax.yaxis, panel.labels[0], view.words[0], high)
        if apart or panel is view.panels[-1]:
            down, beside = (1, 1) if apart else np.max(list(axes), axis=0) + 1
            beyond = any(np.nanmax(abs(p.values), initial=0) > bound for p in ([panel] if apart else view.panels))
            around, ends = [ax] if apart else list(axes.values()), "both" if beyond else "neither"
            share, aspect = 0.17 / (beside * wide), down * (high + 0.3) / 0.11
            bar = canvas.colorbar(mesh, ax=around, aspect=aspect, fraction=share, pad=share / 2, extend=ends)
            marks = np.linspace(-bound, bound, 3 if down * high < 1.5 else 5)
            bar.set_ticks(marks.tolist(), labels=[number(mark, bound) for mark in marks])
            bar.ax.tick_params(labelsize=SMALL, width=0.5, length=2)
            flat = down * high < TALL  # upright, the words would be longer than the bar
            lines = [
                part for line in scale_words(view, panel.title) for part in textwrap.wrap(line, 25 if flat else 99)
            ]
            turned: dict[str, Any] = {"rotation": 0, "ha": "left", "va": "center"} if flat else {}
            bar.set_label("\n".join(lines), fontsize=SMALL if flat else MEDIUM, parse_math=False, **turned)
    some = any(panel.unsure.any() for panel in view.panels)
    return finished(canvas, view, axes, [interval_key(view.mean, "ring")] if some else [])


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
    canvas, axes, (_, high) = laid_out(view, figure, title, (2.8, float(np.clip(count * 0.22, 0.8, 8))), 0.5)
    for panel, ax in zip(view.panels, axes.values(), strict=True):
        ax.barh(np.arange(count), np.nan_to_num(panel.values), height=0.7, color="#6aaed6")
        ax.axvline(0, color="#303030", linewidth=0.6)
        if panel.pairs.sizes.get("pair", 1) > 1:
            dots = panel.pairs.transpose("pair", view.dims[0]).values
            spread = np.linspace(-0.22, 0.22, len(dots))[:, None] + np.arange(count)
            ax.scatter(dots, spread, s=5, color="#303030", alpha=0.7, linewidths=0, zorder=3)
        ax.margins(x=0.06)
        if panel.ends is not None:
            _whiskers(ax, panel, panel.ends)
        for key in TEXTURES:
            hatched(ax, panel.masks[key], key)
        ax.set_ylim(-0.5, count - 0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, width=0.5, length=2)
        ax.set_xlabel("\n".join(scale_words(view, panel.title)), fontsize=SMALL, parse_math=False)
        tick_labels(ax.yaxis, panel.labels[0], view.words[0], high)
    if view.columns != "metric" or view.name == "normalized":
        ends = np.array([ax.get_xlim() for ax in axes.values()])
        for ax in axes.values():
            ax.set_xlim(ends.min(), ends.max())
    some = any(panel.ends is not None for panel in view.panels)
    return finished(canvas, view, axes, [interval_key(view.mean, "whiskers")] if some else [])


def interactions(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    sites: tuple[str, str] | None = None,
    limit: float | None = None,
    title: str | None = None,
    annotate: bool | None = None,
    pair: int | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Two matrices over pairs of sites: what they do together, and their interaction, joint effect − sum of both alone.

    Above 0 two sites need each other, as both inputs of an AND do; below 0 they do the same work, as those of an OR do.
    That holds for denoising and for noising, where effects are mostly below 0.

    Args:
        effects: A result over two dims with the same labels, as of ``p.row(first="0.1", second="1.3")``. A row with
            equal labels patches that site alone; of a joint row one order of its labels is enough.
        variable: What to show; ``normalized`` where there is one, else ``effect`` or ``estimate``.
        sites: The two dims; by default the only two with the same labels.
        limit: As for ``heatmap``.
        title: As for ``heatmap``.
        annotate: As for ``heatmap``.
        pair: As for ``heatmap``.
        figure: As for ``heatmap``.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: There are no such dims, a site is not patched alone, or as for ``heatmap``.
    """
    main = main_variable(effects)
    if pair is not None and "pair" in effects[main].dims and pair in effects["pair"]:
        effects = effects.sel(pair=pair)
        pair = None
    mean = over_pairs(effects)
    name = named(mean, variable)
    down, across = _twin_dims(mean[name], sites)
    order = mean[down].values
    data = mean[name].transpose(..., down, across).reindex({across: order})
    mirrored = data.rename({down: across, across: down}).transpose(*data.dims)
    joint = data.fillna(mirrored)
    same = xr.DataArray(np.eye(len(order), dtype=bool), {down: order, across: order}, (down, across))
    alone = joint.where(same).max(across)
    lacking = [str(site) for site in order if not alone.sel({down: site}).notnull().all()]
    if lacking:
        raise ResultError(
            f"An interaction is the joint effect less those of both sites alone, and no row patches these alone:\n"
            f"{listing(lacking)}\nAdd a row with the same label as {down}= and as {across}=, and with one edit."
        )
    apart = (joint - alone - alone.rename({down: across})).where(~same)
    titles = ["both together (diagonal: alone)", "interaction: together − sum of both alone"]
    shown = xr.concat([joint, apart], xr.DataArray(titles, dims="shown", name="shown")).assign_attrs(mean[name].attrs)
    rest = [v for v in mean.data_vars if not {down, across} & set(mean[v].dims)]
    both = mean[rest].assign({main: shown, name: shown}).assign_coords(blank=same & (shown["shown"] == titles[1]))
    options: dict[str, Any] = {"limit": limit, "title": title, "annotate": annotate, "pair": pair, "figure": figure}
    return heatmap(both, name, y=down, x=across, columns="shown", **options)


def _twin_dims(data: xr.DataArray, sites: tuple[str, str] | None) -> tuple[str, str]:
    """The two dims with the same labels."""
    sizes = ", ".join(f"{dim} ({size})" for dim, size in data.sizes.items()) or "(none)"
    entries = {str(dim): set(data[dim].values.tolist()) for dim in data.dims if dim != "pair"}
    if sites is not None and not (set(sites) <= set(entries) and entries[sites[0]] == entries[sites[1]]):
        raise ResultError(f"sites are two dims with the same labels; {data.name!r} has {sizes}, and not so {sites}.")
    found = [sites] if sites else [p for p in itertools.combinations(entries, 2) if entries[p[0]] == entries[p[1]]]
    if len(found) != 1:
        raise ResultError(
            f"Interactions are over two dims with the same labels, and {data.name!r} has {sizes}"
            + (
                ": name them, as in sites=('first', 'second')."
                if found
                else ". Label rows as p.row(first=…, second=…)."
            )
        )
    return found[0]


def _whiskers(ax: Axes, panel: Panel, ends: NDArray[np.float64]) -> None:
    """The intervals of bars; an end that is not finite is an arrow."""
    known = np.flatnonzero(~np.any(list(panel.masks.values()), 0) & ~np.isnan(ends).any(0))
    shown = ends[:, known]
    open_ = np.isinf(shown)
    shown = np.where(open_, np.sign(shown) * 1.2 * abs(np.where(open_, panel.values[known], shown)).max(), shown)
    ax.hlines(known, shown[0], shown[1], color="#303030", linewidth=0.9, zorder=4, gid="interval")
    for end, beyond, closed, arrow in zip(shown, open_, ("|", "|"), ("<", ">"), strict=True):
        for which, marker in ((~beyond, closed), (beyond, arrow)):
            ax.plot(end[which], known[which], marker, color="#303030", markersize=4, markeredgewidth=0.9, zorder=4)


def scale_limit(view: View, panels: Sequence[Panel]) -> float:
    """What fills the scale of panels that share one: the largest value, and at least ``FLOOR`` of the difference."""
    gap = 1.0 if view.name == "normalized" else min(p.gap for p in panels) if view.name.startswith("effect") else 0.0
    return max(FLOOR * gap, *(float(np.nanmax(abs(p.values), initial=0)) for p in panels)) or 1.0
