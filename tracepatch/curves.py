"""Curves over the layers: windows of several widths, and several models on one relative depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tracepatch.canvas import LARGE, MEDIUM, SMALL, fitted, interval_key, legend, root
from tracepatch.combining import over_pairs
from tracepatch.errors import ResultError
from tracepatch.marks import key, looks, sequence
from tracepatch.panels import INTERVALS, named, title_of, told

PANEL = (3.4, 2.3)  # inches
FEW = 12  # windows of a width whose spans are shown


def windows(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    width: str = "width",
    layer: Literal["first", "middle"] | None = None,
    columns: str | None = None,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Effects of windows of layers that are patched together: a curve for each width, over the middle of the window.

    A faint line through a point spans the layers of its window, where there are few. A band is the interval, where the
    result has intervals (``tp.intervals``). With positions as well, ``tp.plots.heatmap(effects, x="layer", y="pos",
    columns="width")`` shows layers across and the text downwards.

    Args:
        effects: A result whose rows are labelled with a layer of the window and its width, as in
            ``p.row(layer=3, width=5)`` for layers 3 to 7.
        variable: What to show; ``normalized`` where there is one, else ``effect`` or ``estimate``.
        width: The label of the width.
        layer: Which layer of a window its label names: the first, or the middle one (of an even width the upper of
            both, as in Meng et al. 2022). What ``tp.sweeps.windows`` returns says itself which layers a window has;
            of anything else it is the first unless said otherwise.
        columns: The dim of the panels; by default component, model or metric, whichever has several entries.
        title: Replaces the default, which names the model and the pairs; ``""`` leaves it out.
        figure: A figure or subfigure to draw into; by default a new one.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: The result has other dims, widths that are no numbers of layers, or no such variable.
    """
    if layer not in (None, "first", "middle"):
        raise ResultError(f"layer is 'first' or 'middle': which layer of a window its label names; not {layer!r}.")
    mean = over_pairs(effects)
    if width in mean.coords and not mean[width].dims:
        mean = mean.expand_dims(width)
    name = named(mean, variable)
    parts, dims = _panels(mean, name, (width, "layer"), columns, "windows of layers")
    sizes = mean[width].values.tolist()
    if not all(float(size).is_integer() and size >= 1 for size in sizes):
        raise ResultError(f"{width!r} is how many layers a window has, whole numbers from 1, not {sizes}.")
    colours, scale = sequence(min(sizes), max(*sizes, min(sizes) + 1))
    canvas, axes = _axes(len(parts), figure, mean, title, dims)
    for (text, part), ax in zip(parts, axes, strict=True):
        for number, size in enumerate(sizes):
            values, ends = _line(part.isel({width: number}), name, "layer")
            start = part["layer"].values - (int(size) // 2 if layer == "middle" else 0)
            stop = start + size - 1
            if layer is None and {"first", "last"} <= set(part.coords):
                start, stop = (_edge(part[edge], width, number) for edge in ("first", "last"))
            middle, colour = (start + stop) / 2, colours(scale(size))
            there = np.isfinite(values)
            if there.sum() <= FEW:
                ends_of_it = (start - 0.4)[there], (stop + 0.4)[there]
                ax.hlines(values[there], *ends_of_it, colour, linewidth=0.7, alpha=0.35, gid="span")
            marker = {"marker": "o", "markersize": 3, "linewidth": 1.2, "color": colour, "gid": f"{size}"}
            ax.plot(middle[there], values[there], zorder=3, **marker)
            if ends is not None:
                ax.fill_between(middle[there], *ends[:, there], color=colour, alpha=0.15, linewidth=0)
        _dress(ax, text, "layer (a point: the middle of a window)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("\n".join(told(mean, name)), fontsize=SMALL, parse_math=False)
    keys = [
        Line2D([], [], color=colours(scale(s)), marker="o", markersize=3, label=f"{s:g} layer" + "s" * (s != 1))
        for s in sizes
    ]
    legend(canvas, keys + _band(mean, name))
    return root(canvas)


def _edge(layers: xr.DataArray, width: str, number: int) -> NDArray[np.float64]:
    """The first, or the last layer of each window of a width."""
    found = layers.isel({width: number}) if width in layers.dims else layers
    edges: NDArray[np.float64] = found.values.astype(float)
    return edges


def depth(
    effects: xr.Dataset,
    variable: str | None = None,
    *,
    reduce: Literal["largest", "sum"] | None = None,
    columns: str | None = None,
    title: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Several models on one axis: effects over relative depth, 0 for a model's first layer and 1 for its last.

    Args:
        effects: The result of ``tp.concat``, or of one model.
        variable: What to show; ``normalized`` where there is one, else ``effect`` or ``estimate``.
        reduce: What to make of the dims that are left, such as positions or heads: ``"largest"``, the number farthest
            from 0 with its sign, or ``"sum"``. Without it there may be none left.
        columns: The dim of the panels; by default component or metric, whichever has several entries.
        title: Replaces the default, which names the pairs; ``""`` leaves it out.
        figure: A figure or subfigure to draw into; by default a new one.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ResultError: The result has no layers, dims that are neither shown nor reduced, or no such variable.
    """
    if reduce not in (None, "largest", "sum"):
        raise ResultError(f"reduce is 'largest', 'sum' or None, not {reduce!r}.")
    mean = over_pairs(effects)
    name = named(mean, variable)
    if "model" not in mean.dims:
        mean = mean.expand_dims(model=[str(mean.attrs.get("model", "model"))])
    keep = ("model", "layer", *(dim for dim in ("component", "metric") if mean.sizes.get(dim, 1) > 1), columns)
    over = [str(dim) for dim in mean[name].dims if dim not in keep and mean.sizes[dim] > 1]
    if reduce is not None and over:
        mean = mean.assign({name: _reduced(mean[name], over, reduce)}).drop_vars(
            INTERVALS.get(name, ()), errors="ignore"
        )
    left = [dim for dim in over if dim != columns]
    hint = f", or give one panels, as in columns={left[0]!r}" if left and columns is None else ""
    hint += ", or say what to make of the others: reduce='largest' or 'sum'"
    parts, dims = _panels(mean, name, ("model", "layer"), columns, "layers", hint)
    if "depth" not in mean.coords:
        raise ResultError(
            "The result does not say how far up its layers stand: it has no coordinate `depth`, as tp.patch gives."
        )
    styles = looks(mean["model"].values.tolist(), "model")
    canvas, axes = _axes(len(parts), figure, mean, title, dims)
    for (text, part), ax in zip(parts, axes, strict=True):
        for number, (model, look) in enumerate(styles.items()):
            values, ends = _line(part.isel(model=number), name, "layer")
            at, there = part["depth"].isel(model=number, missing_dims="ignore").values, np.isfinite(values)
            style: dict[str, Any] = {"color": look.colour, "marker": look.shape, "linestyle": look.line}
            ax.plot(at[there], values[there], markersize=3.5, linewidth=1.2, gid=str(model), zorder=3, **style)
            if ends is not None:
                ax.fill_between(at[there], *ends[:, there], color=look.colour, alpha=0.15, linewidth=0)
        _dress(ax, text, "relative depth (0: first layer, 1: last)")
        ax.set_xlim(-0.04, 1.04)
    first, *rest = told(mean, name)
    what = {"largest": "largest ", "sum": "sum of "}[reduce] if reduce and over else ""
    lines = [f"{what}{first}" + (f" over {', '.join(over)}" if what else ""), *rest]
    axes[0].set_ylabel("\n".join(lines), fontsize=SMALL, parse_math=False)
    legend(canvas, [key(look, str(model), line=True) for model, look in styles.items()] + _band(mean, name))
    return root(canvas)


def _reduced(data: xr.DataArray, over: Sequence[str], reduce: str) -> xr.DataArray:
    if reduce == "sum":
        return data.sum(over, min_count=1, keep_attrs=True)
    stacked = data.stack(_all=over)
    strongest = abs(stacked).fillna(-1).argmax("_all")
    found = stacked.isel(_all=strongest).drop_vars(["_all", *over], errors="ignore")
    return found.assign_attrs(data.attrs)


def _panels(
    mean: xr.Dataset, name: str, axes: tuple[str, str], columns: str | None, what: str, hint: str = ""
) -> tuple[list[tuple[str, xr.Dataset]], str | None]:
    """The parts that panels show, with their titles, and the dim that they are of."""
    sizes = {str(dim): size for dim, size in mean[name].sizes.items()}
    has = ", ".join(f"{dim} ({size})" for dim, size in sizes.items()) or "(none)"
    wanted = [dim for dim in (*axes, columns) if dim is not None]
    if not set(wanted) <= set(sizes):
        raise ResultError(f"A picture of {what} needs the dims {', '.join(wanted)}; {name!r} has {has}.")
    rest = [dim for dim in sizes if dim not in wanted]
    columns = columns or next((d for d in ("component", "model", "metric") if d in rest and sizes[d] > 1), None)
    left = [dim for dim in rest if sizes[dim] > 1 and dim != columns]
    if left:
        pick = ", ".join(f"{dim}={mean[dim].values.tolist()[0]!r}" for dim in left)
        raise ResultError(
            f"{name!r} has the dims {has}, too many: select of {', '.join(left)}, as in effects.sel({pick}){hint}."
        )
    mean = mean.isel({dim: 0 for dim in rest if dim != columns})
    if columns is None:
        return [("", mean)], None
    entries = mean[columns].values.tolist()
    return [
        (f"{e}" if isinstance(e, str) else f"{columns} {e}", mean.isel({columns: i})) for i, e in enumerate(entries)
    ], columns


def _line(part: xr.Dataset, name: str, dim: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The numbers of a curve, and the ends of their intervals ``[low or high, layer]``, if there are any."""
    ends = [part[end].values for end in INTERVALS.get(name, ()) if end in part]
    return part[name].transpose(dim).values, np.array(ends) if len(ends) == 2 else None


def _axes(
    count: int, figure: Figure | SubFigure | None, mean: xr.Dataset, title: str | None, columns: str | None
) -> tuple[Figure | SubFigure, list[Axes]]:
    across = 2 if count == 4 else min(count, 3)
    down = -(-count // across)
    canvas = fitted(figure, 0.9 + PANEL[0] * across if across == 1 else 0.9 + 2.7 * across, 1.1 + PANEL[1] * down)
    axes: list[Axes] = []
    for number in range(count):
        shared = axes[0] if axes and columns != "metric" else None
        axes.append(canvas.add_subplot(down, across, number + 1, sharey=shared))
        axes[-1].tick_params(labelleft=number % across == 0 or shared is None)
    text = title_of(mean) if title is None else title
    if text:
        canvas.suptitle(text, fontsize=LARGE if count > 1 else MEDIUM, parse_math=False)
    return canvas, axes


def _dress(ax: Axes, title: str, across: str) -> None:
    ax.axhline(0, color="#303030", linewidth=0.6, zorder=1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_linewidth(0.5)
    ax.tick_params(labelsize=SMALL, width=0.5, length=2)
    ax.set_title(title, fontsize=MEDIUM, parse_math=False)
    ax.set_xlabel(across, fontsize=SMALL)


def _band(mean: xr.Dataset, name: str) -> list[Any]:
    """What a band means, for a legend."""
    return [interval_key(mean, "band")] if all(end in mean for end in INTERVALS.get(name, ("",))) else []
