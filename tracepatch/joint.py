"""Several sites in one row: windows of layers, sets together, with one left out, or kept when all else goes.

Each function records rows, runs them in one plan and returns a labelled dataset, as ``tp.patch`` does. A *place* is a
component with its index, ``("z", 9, slice(None), 6)`` for ``z[9, :, 6]``. Places are given as a list, or as a mapping
of names to one or several: ``{"name movers": [("z", 9, -1, 9), ("z", 9, -1, 6)]}``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.cells import Cells, Direction
from tracepatch.combining import NOTHING
from tracepatch.errors import RecipeError
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model
from tracepatch.places import Place, Places, along, at, named, picked, write
from tracepatch.plan import Status
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.sites import component


def windows(
    model: Model,
    pairs: Pairs,
    name: str,
    width: int | Sequence[int],
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] = ("layer", "pos"),
    direction: Direction = "denoising",
    source: Any = None,
    only: dict[str, Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Patches a component in several neighbouring layers at once, window by window.

    A window of width w around layer l is l − w//2 to l − w//2 + w − 1, as far as there are such layers, as in causal
    tracing (Meng et al. 2022, width 10). Width 1 patches single layers.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        name: The component.
        width: Layers of a window; several widths become a dim.
        metric: What is read.
        by: The dims to run over, ``layer`` among them: the middle of the window.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        only: Dims and the indices to keep; of ``layer`` the middles.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        As ``tp.patch``, with the dim ``width`` where there are several, and the coordinates ``first`` and ``last``, the
        layers of each window.

    Raises:
        RecipeError: A width is no number of layers, or ``by`` has no layer.
    """
    widths = [width] if isinstance(width, int) else list(dict.fromkeys(width))
    if not widths or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in widths):
        raise RecipeError(f"width is a number of layers, 1 or more, or several, not {width!r}.")
    if "layer" not in along(name, by):
        raise RecipeError(f"Windows of layers run over layer: by=('layer', …), not {by!r}.")
    with Patching(model, pairs, metric, **options) as p:
        layers, cells = range(len(p.architecture)), Cells.of(p, name, by, direction, source, only)
        kept = cells.partnered(p)
        for w, (_, labels) in itertools.product(widths, cells.labels(p)):
            inside = [n for n in _window(labels["layer"], w) if n in layers and p.architecture.offers(name, n)]
            with p.row(**(labels if len(widths) == 1 else {"width": w, **labels})):
                write(p, direction, source, *(at(name, {**kept, **labels, "layer": n}) for n in inside))
    found = run(p, progress)
    inner = [[[n for n in _window(middle, w) if n in layers] for middle in found["layer"].values] for w in widths]
    edges = np.array([[(window[0], window[-1]) for window in of_width] for of_width in inner])
    over: tuple[str, ...] = ("width", "layer")
    if len(widths) == 1:
        found = found.assign_coords(width=widths[0])
        over, edges = over[1:], edges[0]
    return found.assign_coords(first=(over, edges[..., 0]), last=(over, edges[..., 1]))


def together(
    model: Model,
    pairs: Pairs,
    sets: Mapping[str, Places],
    metric: Metrics = logit_diff,
    *,
    direction: Direction = "denoising",
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Patches chosen sets of places, each set as one row, and their members one by one.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        sets: Names of the sets, and the places of each.
        metric: What is read.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dim ``set``, and besides: ``singles``, the sum of the members' single effects, and
        ``interaction``, effect − singles. Denoised, it is positive where they do more together than one by one (as both
        inputs of an AND gate), and negative where one does what another does (as those of an OR gate).
        ``interaction_normalized`` is its share of clean − corrupted.
    """
    chosen = {name: named(places) for name, places in sets.items()}
    singles = {label: places for members in chosen.values() for label, places in members.items()}
    with Patching(model, pairs, metric, **options) as p:
        for name, members in chosen.items():
            with p.row(set=name):
                write(p, direction, source, *itertools.chain(*members.values()))
        for label, places in singles.items():
            with p.row(member=label):
                write(p, direction, source, *places)
    tree = p.run(progress)
    found, alone = tree["set"].to_dataset(), tree["member"].to_dataset()["effect"]
    sums = [alone.sel(member=list(members)).sum("member", skipna=False) for members in chosen.values()]
    return _with_interaction(found, xr.concat(sums, xr.DataArray(list(chosen), dims="set")))


def interactions(
    model: Model,
    pairs: Pairs,
    places: Places,
    metric: Metrics = logit_diff,
    *,
    direction: Direction = "denoising",
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Patches every place alone, and every two of them together.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        places: Two or more.
        metric: What is read.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dims ``site`` and ``other``, symmetric, single places on the diagonal; with ``singles``,
        ``interaction`` and ``interaction_normalized`` as of ``together``, NaN on the diagonal.

    Raises:
        RecipeError: There are fewer than two places.
    """
    members = several(places)
    with Patching(model, pairs, metric, **options) as p:
        for one, other in itertools.combinations_with_replacement(members, 2):
            with p.row(site=one, other=other):
                write(p, direction, source, *members[one], *(members[other] if one != other else ()))
    half = run(p, progress).reindex(site=list(members), other=list(members))
    turned, there = half.rename(site="other", other="site"), half["status"] != Status.ABSENT
    there &= half["status"].notnull()
    measured = [v for v in half.data_vars if {"site", "other"} <= set(half[v].dims)]
    whole = {v: half[v].where(there, turned[v].transpose(*half[v].dims)).astype(half[v].dtype) for v in measured}
    found = half.assign({v: whole[v].assign_attrs(half[v].attrs) for v in measured})
    found["status"] = found["status"].astype(np.int8)
    alone = [found["effect"].sel(site=one, other=one, drop=True) for one in members]
    single = xr.concat(alone, xr.DataArray(list(members), dims="site", name="site"))
    return _with_interaction(found, (single + single.rename(site="other")).where(found["site"] != found["other"]))


def leave_one_out(
    model: Model,
    pairs: Pairs,
    places: Places,
    metric: Metrics = logit_diff,
    *,
    direction: Direction = "denoising",
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Patches all places together, and all but each of them: what each adds where the others are patched too.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        places: The set, two or more.
        metric: What is read.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dim ``left_out``: effects of all but that one. Besides ``whole``, the effect of all together,
        and ``contribution``, whole − effect: what is lost without it.

    Raises:
        RecipeError: There are fewer than two places.
    """
    members = several(places)
    with Patching(model, pairs, metric, **options) as p:
        with p.row(name="all"):
            write(p, direction, source, *itertools.chain(*members.values()))
        for one in members:
            with p.row(left_out=one):
                write(p, direction, source, *itertools.chain(*(m for label, m in members.items() if label != one)))
    tree = p.run(progress)
    found, whole = tree["left_out"].to_dataset(), tree["name"].to_dataset()["effect"].sel(name="all", drop=True)
    lost, units = (whole - found["effect"]).transpose(*found["effect"].dims), found["effect"].attrs
    return found.assign(whole=whole.assign_attrs(units), contribution=lost.assign_attrs(units))


def keep_only(
    model: Model,
    pairs: Pairs,
    name: str,
    kept: Mapping[str, Places],
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] | None = None,
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Takes all of a component but some places away from the clean run: do these alone keep the behaviour?

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        name: The component.
        kept: Names of sets, and the places that each keeps: of this component, with the indices that ``by`` runs over.
        metric: What is read.
        by: The dims that tell places apart; layer × head, or layer × pos, by default.
        source: What is written everywhere else; the corrupted run's values if nothing is said.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dim ``kept``, ``"nothing"`` among it. ``empty`` is the value with nothing kept, ``gained``
        value − empty, and ``faithfulness`` gained / (clean − empty) (Mueller et al. 2025): 1 where the set does all
        that the model does.

    Raises:
        RecipeError: A place to be kept is none of the component's, or all are kept.
    """
    dims = along(name, by)
    with Patching(model, pairs, metric, **options) as p:
        if component(name).place in dims:
            p.encoded.require_alike("keep_only by position", "Run over heads, or over by=('layer', 'span').")
        grid = [at(name, dict(zip(dims, index, strict=True))) for index in p.grid(name, dims, base=p.clean)]
        every = {picked(name, dims, place): place for place in grid}
        for label, places in {"nothing": (), **kept}.items():
            left = {
                picked(name, dims, place) for group in (named(places) if places else {}).values() for place in group
            }
            unknown = sorted(left - set(every), key=str)
            if unknown or len(left) == len(every):
                what = f"{unknown[0]}, which is none of {name} by {', '.join(dims)}" if unknown else "everything"
                raise RecipeError(f"{label!r} keeps {what}; a set keeps some places of {name}, and not all.")
            with p.row(kept=label):
                write(p, "noising", source, *(place for key, place in every.items() if key not in left))
    found = run(p, progress)
    empty, units = found["value"].sel(kept="nothing", drop=True), found["effect"].attrs
    gained, gap = found["value"] - empty, found["clean"] - empty
    gap = gap.where(abs(gap) > NOTHING * np.maximum(abs(found["clean"]), abs(empty)))
    told = {"units": "fraction of the clean − empty difference", "of": "gained", "over": "empty"}
    return found.assign(
        empty=empty.assign_attrs(units),
        gained=gained.transpose(*found["effect"].dims).assign_attrs(units),
        faithfulness=(gained / gap).transpose(*found["effect"].dims).assign_attrs(told),
    )


def run(p: Patching, progress: bool | None) -> xr.Dataset:
    """The result of rows that all have the same dims."""
    found = p.run(progress)
    assert isinstance(found, xr.Dataset)
    return found


def _window(middle: int, width: int) -> range:
    return range(middle - width // 2, middle - width // 2 + width)


def several(places: Places) -> dict[str, list[Place]]:
    """Two or more places by their labels.

    Raises:
        RecipeError: There are fewer.
    """
    members = named(places)
    if len(members) < 2:
        raise RecipeError(f"This is about two places or more, and {next(iter(members))} is one.")
    return members


def _with_interaction(found: xr.Dataset, total: xr.DataArray) -> xr.Dataset:
    """Adds the sum of single effects, and what is left of the effect beyond it."""
    units, dims = found["effect"].attrs, found["effect"].dims
    singles = total.transpose(*dims)
    interaction = (found["effect"] - singles).transpose(*dims)
    added = {"singles": singles.assign_attrs(units), "interaction": interaction.assign_attrs(units)}
    if "normalized" in found:
        attrs = found["normalized"].attrs
        gap = (found["clean"] - found[attrs["over"]]).where(found["normalized"].notnull())
        added["interaction_normalized"] = (interaction / gap).transpose(*dims).assign_attrs(**attrs, of="interaction")
    return found.assign(added)
