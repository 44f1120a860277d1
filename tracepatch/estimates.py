"""Estimates as labelled arrays: the cells of an exact sweep, with ``estimate`` in place of ``effect``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.alignment import Aligned
from tracepatch.architecture import Architecture
from tracepatch.cells import Cells
from tracepatch.errors import RecipeError
from tracepatch.estimators import AtP
from tracepatch.layout import Key
from tracepatch.metrics import Metric
from tracepatch.models import Model, remote_of
from tracepatch.plan import Status
from tracepatch.recording import Recorder
from tracepatch.requests import place
from tracepatch.results import normalize, origin, pair_coords, site_coords
from tracepatch.sites import component
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs

Found = Mapping[Key, Mapping[int, NDArray[np.float64]]]
"""(component, layer) → pair → ``[metric, *dims of the cells but the layer]``; NaN where there is no such cell."""


def picked(
    cells: Cells,
    name: str,
    arrays: NDArray[np.float64],
    length: int,
    without: tuple[str, ...] = (),
    lost: Mapping[str, NDArray[np.bool_]] | None = None,
) -> NDArray[np.float64]:
    """Numbers of a component at a layer, ``[…, *kept dims]``, at the cells' labels: ``[…, *dims but the layer]``.

    Args:
        cells: What is asked for.
        name: The component.
        arrays: Its numbers, with the dims that ``cells.kept`` says, in their order.
        length: Tokens of the prompts.
        without: Kept dims that the numbers do not have, as they were contracted otherwise.
        lost: Dim → the positions ``[row, pos]`` that have no partner to come from; their cells are NaN.
    """
    kept = [dim for dim in cells.kept(component(name)) if dim not in without]
    lead, taken = arrays.ndim - len(kept), []
    for axis, dim in enumerate(kept, lead):
        size = arrays.shape[axis]
        if dim not in cells.by:
            arrays = np.take(arrays, list(cells.picked[dim].resolve(size) or ()), axis)
            taken.append(axis)
            continue
        at = [label % size if -size <= label < size else -1 for label in cells.axes[dim]]
        gone = np.array([i < 0 for i in at]).reshape(-1, *[1] * (arrays.ndim - axis - 1))
        arrays = np.where(gone, np.nan, np.take(arrays, at, axis))
        if lost and dim in lost:
            there = lost[dim][:, at]
            shape = [
                there.shape[0] if i == lead - 1 else there.shape[1] if i == axis else 1 for i in range(arrays.ndim)
            ]
            arrays = np.where(there.reshape(shape), np.nan, arrays)
    if {"dest", "src"} <= set(kept) & set(cells.by):
        arrays = _seen(cells, arrays, [lead + kept.index(dim) for dim in ("dest", "src")], length)
    arrays = arrays.sum(tuple(taken))
    order = [dim for dim in kept if dim in cells.by]
    places = [order.index(dim) for dim in cells.by if dim != "layer"]
    return arrays.transpose(*range(lead), *(lead + i for i in places))


def _seen(cells: Cells, arrays: NDArray[np.float64], axes: list[int], length: int) -> NDArray[np.float64]:
    """NaN where a position would attend to one after it."""
    dest, src = (np.array([label % length for label in cells.axes[dim]]) for dim in ("dest", "src"))
    future = src[None, :] > dest[:, None]
    shape = [1] * arrays.ndim
    for axis, size in zip(axes, future.shape, strict=True):
        shape[axis] = size
    future = future if axes[0] < axes[1] else future.T
    return np.where(future.reshape(shape), np.nan, arrays)


def laid_out(cells: Cells, found: Found, metrics: int, pairs: int) -> NDArray[np.float64]:
    """The numbers of all cells, ``[metric, pair, (component,) *dims]``."""
    several = len(cells.names) > 1
    sizes = [len(cells.names)] * several + [len(cells.axes[dim]) for dim in cells.by]
    array = np.full((metrics, pairs, *sizes), np.nan)
    for (name, layer), by_pair in found.items():
        at: list[Any] = [cells.names.index(name)] * several
        at += [cells.axes["layer"].index(layer) if dim == "layer" else slice(None) for dim in cells.by]
        for pair, numbers in by_pair.items():
            array[(slice(None), pair, *at)] = numbers
    return array


def labelled(
    cells: Cells,
    found: Found,
    values: Mapping[WorldName, NDArray[np.float64]],
    metrics: Sequence[Metric],
    architecture: Architecture,
    encoded: EncodedPairs,
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """A dataset of estimates; see ``tp.attribute``.

    Args:
        cells: What was asked for.
        found: The numbers.
        values: World → ``[metric, pair]``.
        metrics: What was differentiated.
        architecture: Of the model.
        encoded: The pairs.
        attrs: What it rests on.
    """
    several = len(cells.names) > 1
    dims = (*(("component",) if several else ()), *cells.by)
    estimates = laid_out(cells, found, len(metrics), len(encoded))
    coords: dict[str, Any] = dict(cells.axes) | ({"component": list(cells.names)} if several else {})
    counted = cells.base if encoded.mapped and cells.crossing else ""
    return dataset_of(estimates, dims, coords, cells.base, values, metrics, architecture, encoded, attrs, counted)


def dataset_of(
    estimates: NDArray[np.float64],
    dims: Sequence[str],
    coords: Mapping[str, Any],
    base: WorldName,
    values: Mapping[WorldName, NDArray[np.float64]],
    metrics: Sequence[Metric],
    architecture: Architecture,
    encoded: EncodedPairs,
    attrs: Mapping[str, Any],
    counted: str = "",
) -> xr.Dataset:
    """Estimates with their baselines, normalized, and with labels.

    Args:
        estimates: ``[metric, pair, *dims]``, NaN where there is no such cell.
        dims: Their dims.
        coords: Their labels.
        base: The run that would be edited.
        values: World → ``[metric, pair]``.
        metrics: What was differentiated.
        architecture: Of the model.
        encoded: The pairs.
        attrs: What they rest on.
        counted: In whose prompts positions count, to be found by their partners in the others; ``""`` for each's own.
    """
    lead: tuple[str, ...] = ("metric", "pair") if len(metrics) > 1 else ("pair",)
    status = np.where(np.isnan(estimates[0]), Status.ABSENT, Status.ESTIMATED).astype(np.int8)

    def shaped(array: NDArray[Any]) -> NDArray[Any]:
        return array if len(metrics) > 1 else array[0]

    data: dict[str, Any] = {"estimate": ((*lead, *dims), shaped(estimates))}
    data |= {name: (lead, shaped(value)) for name, value in {"base": values[base], **values}.items()}
    data["status"] = (("pair", *dims), status)
    names = [m.name for m in metrics]
    dataset = xr.Dataset(data, {**coords, **pair_coords(encoded)})
    dataset = dataset.assign_coords(metric=names if len(metrics) > 1 else names[0])
    dataset = site_coords(dataset, architecture, encoded, counted=counted)
    if "corrupted" in data:
        dataset = normalize(dataset, [0.0] * len(metrics), "corrupted")
    for name in ("estimate", "base", "clean", "corrupted"):
        if name in dataset:
            dataset[name].attrs["units"] = ", ".join(dict.fromkeys(m.unit for m in metrics))
    dataset["status"].attrs.update(
        flag_values=[int(s) for s in Status], flag_meanings=" ".join(s.name.lower() for s in Status)
    )
    order = ["estimate", "normalized", "base", "clean", "corrupted", "status"]
    return dataset[[name for name in order if name in dataset]].assign_attrs(attrs)


def resting_on(
    model: Model,
    encoded: EncodedPairs,
    metrics: Sequence[Metric],
    how: AtP,
    *,
    base: WorldName,
    written: str,
    component: str,
    cost: str,
    request: str,
    seconds: float,
) -> dict[str, Any]:
    """What estimates rest on, as plain numbers and text.

    Args:
        model: From ``tp.load``.
        encoded: The pairs.
        metrics: What was differentiated.
        how: The estimator.
        base: The run that would be edited.
        written: What would be written.
        component: Of what they are.
        cost: Forwards and backwards, in words.
        request: What was asked for, as JSON.
        seconds: That it took.
    """
    remote = place(model) if remote_of(model) else ""
    return {
        **origin(model, encoded, {"host": remote} if remote else {}, remote=remote),
        "base": base,
        "written": written,
        "component": component,
        "estimator": how.name,
        "cost": cost,
        "signed": int(how.signed),
        "request": request,
        "metrics": json.dumps({m.name: m.told for m in metrics}),
        "seconds": round(seconds, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def requested(cells: Cells, direction: str, renormalize: bool = False, value_bias: bool = True) -> str:
    """What was asked for, as text from which ``asked_again`` asks for it once more; ``only`` as it was written."""
    written = cells.source is None or isinstance(cells.source, (int, float))
    return json.dumps(
        {
            "components": list(cells.names),
            "by": list(cells.by),
            "direction": direction,
            "source": cells.source if written else "a tensor",
            "only": {dim: as_json(index) for dim, index in cells.only.items()},
            "renormalize": renormalize,
            "value_bias": value_bias,
        }
    )


def asked_again(recorder: Recorder, request: str, source: Any = None) -> tuple[Cells, bool]:
    """The cells that a request speaks of, and whether patterns are renormalized.

    Args:
        recorder: Of the same model and pairs.
        request: As ``requested`` wrote it.
        source: The tensor that would be written, if the request was for one: the text does not hold it.

    Raises:
        RecipeError: There is no exact patch for it, or the tensor is missing.
    """
    asked = json.loads(request)
    if not asked["value_bias"]:
        raise RecipeError(
            "value_bias=False leaves a part of the gradient out, so that no patch has the effect that is estimated. "
            "Estimate with value_bias=True."
        )
    if asked["source"] == "a tensor" and source is None:
        raise RecipeError(
            "The estimate is of writing a tensor, a mean or the like, which it does not hold: pass the same source= "
            "again."
        )
    only = {dim: _from_json(index) for dim, index in asked["only"].items()}
    written = source if asked["source"] == "a tensor" else asked["source"]
    return Cells.of(recorder, asked["components"], asked["by"], asked["direction"], written, only), asked["renormalize"]


def as_json(index: Any) -> Any:
    """An index as JSON: numbers, spans and lists as they are, slices as ``{"slice": [start, stop, step]}``.

    Positions of another prompt are ``{"aligned": …, "of": world}``.
    """
    if isinstance(index, slice):
        return {"slice": [None if b is None else int(b) for b in (index.start, index.stop, index.step)]}
    found = index.tolist() if hasattr(index, "tolist") else index if isinstance(index, (int, str)) else list(index)
    first = found[0] if isinstance(found, list) and found else found
    if isinstance(first, Aligned):
        return {"aligned": [int(i) for i in found] if isinstance(found, list) else int(found), "of": first.of}
    return found


def _from_json(index: Any) -> Any:
    """An index as ``as_json`` wrote it."""
    if not isinstance(index, dict):
        return index
    if "slice" in index:
        return slice(*index["slice"])
    at, of = index["aligned"], index["of"]
    return [Aligned(i, of) for i in at] if isinstance(at, list) else Aligned(at, of)
