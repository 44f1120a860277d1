"""Results averaged over pairs, and several results as one: ratios of means, and NaN where something does not exist."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.errors import MeasurementWarning, ResultError, listing
from tracepatch.plan import Status

CANCEL = 0.1  # of the size of differences, below which their mean is no yardstick
NOTHING = 1e-5  # of the size of what it is a difference of, below which a difference is none


def over_pairs(effects: xr.Dataset) -> xr.Dataset:
    """The same result averaged over pairs, ``normalized`` as a ratio of means.

    A mean of the pairs' own normalized effects would let a pair with a small clean − corrupted difference outvote the
    others; here each pair counts in the metric's unit. Pairs too close to divide by still count.
    Tokens that differ between pairs are those of the first one, with ``…``. A result without pairs comes back as it is.
    """
    require_dataset(effects)
    if "pair" not in effects["effect"].dims:
        return effects
    mean = _over(effects, "pair")
    for name in (str(n) for n in effects.coords if str(n).endswith("token")):
        if name in effects.coords and "pair" in effects[name].dims:
            first = effects[name].isel(pair=0, drop=True)
            shared = (effects[name] == first).all("pair")
            marked = np.where(shared.values, first.values, np.char.add(first.values.astype(str), "…"))
            mean = mean.assign_coords({name: (first.dims, marked)})
    return mean.assign_attrs({**effects.attrs, "averaged_pairs": effects.sizes["pair"]})


def over_draws(effects: xr.Dataset) -> xr.Dataset:
    """The same result averaged over draws of noise, or of prompts: ``normalized`` is again a ratio of means.

    Before or after ``over_pairs``: means of the metric, in its unit, are taken in any order. A result without draws
    comes back as it is.
    """
    require_dataset(effects)
    if "draw" not in effects["effect"].dims:
        return effects
    return _over(effects, "draw").assign_attrs({**effects.attrs, "averaged_draws": effects.sizes["draw"]})


def _over(effects: xr.Dataset, dim: str) -> xr.Dataset:
    """Averaged over a dim of the effects."""
    shares = [v for v in effects.data_vars if "over" in effects[v].attrs]
    numeric = [
        v for v in effects.data_vars if v != "status" and v not in shares and np.issubdtype(effects[v].dtype, np.number)
    ]
    present = effects["effect"].notnull()
    chosen = effects[numeric]
    if not present.all():  # where a pair has no such cell, its baselines do not count either
        baselines = [name for name in ("base", "clean", "corrupted") if name in chosen]
        chosen = chosen.assign({name: chosen[name].where(present) for name in baselines})
    mean = chosen.mean(dim, keep_attrs=True)
    for name in shares:  # effects, or what else they are shares of, over a difference of unpatched runs
        of, clean, other = (
            effects[name].attrs.get("of", "effect"),
            effects["clean"],
            effects[effects[name].attrs["over"]],
        )
        scale = np.maximum(abs(clean), abs(other)).where(present)
        gap = _yardstick((clean - other).where(present), scale, dim, warn=name == "normalized")
        mean = mean.assign({name: (mean[of] / gap).transpose(*mean[of].dims)})
        mean[name].attrs = dict(effects[name].attrs)
    status = effects["status"]
    if dim not in status.dims:
        return mean.assign(status=status)
    measured, proved = ((status == s).any(dim) for s in (Status.MEASURED, Status.PROVED_ZERO))
    # A mean is a proved zero if nothing in it was measured.
    combined = measured * int(Status.MEASURED) + (proved & ~measured) * int(Status.PROVED_ZERO)
    pending = (status == Status.PENDING).any(dim) & ~measured & ~proved  # else it is a mean of what there is
    combined = combined + pending * int(Status.PENDING)
    mean = mean.assign(status=combined.astype(np.int8))
    mean["status"].attrs = dict(status.attrs)
    return mean


def _yardstick(gap: xr.DataArray, scale: xr.DataArray, dim: str, warn: bool) -> xr.DataArray:
    """The mean difference of unpatched runs, by which effects are divided; NaN where there is next to none."""
    mean, size = gap.mean(dim), abs(gap).mean(dim)
    nothing = size <= NOTHING * scale.mean(dim)
    cancels = (abs(mean) < CANCEL * size) & ~nothing
    why = []
    if bool((nothing & size.notnull()).any()):
        why.append("is next to nothing beside what it is a difference of, and normalized NaN")
    if bool(cancels.any()):
        why.append(f"has both signs, and cancels over {dim}s to less than a tenth of its size")
    if why and warn:
        warnings.warn(
            f"The difference of the unpatched runs {', or '.join(why)}. Read effect, not normalized.",
            MeasurementWarning,
            stacklevel=4,
        )
    return mean.where(~nothing)


def concat(results: Sequence[xr.Dataset]) -> xr.Dataset:
    """Results of several models, or of one model on several sets, along a new dim ``model``.

    What one model lacks (a head, a layer, a position) is NaN with status 0. ``depth`` tells how far up a layer stands
    in its own model.

    Raises:
        ResultError: Nothing to join, results with different dims, or two of one model.
    """
    results = list(results)
    for result in results:
        require_dataset(result)
    if not results:
        raise ResultError("There are no results to concatenate.")
    dims = [tuple(sorted(map(str, r["effect"].dims))) for r in results]
    names = [str(r.attrs["model"]) for r in results]
    if len(set(dims)) > 1:
        raise ResultError(
            "Results with different dims cannot be joined.\n"
            + listing([f"{n}: {', '.join(d)}" for n, d in zip(names, dims, strict=True)])
        )
    if len(set(names)) < len(names):
        raise ResultError(f"Two results are of one model: {', '.join(names)}. Rename one: result.attrs['model'] = '…'.")
    for what in ("metric", "base", "component"):
        values = [_compared(r, what) for r in results]
        if len(set(values)) > 1:
            lines = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
            raise ResultError(f"Results that differ in {what} cannot be joined.\n{listing(lines)}")
    prepared = []
    loose: set[str] = set()
    for name, result in zip(names, results, strict=True):
        extra = [str(c) for c in result.coords if c not in result.dims and c != "metric"]
        loose |= set(extra)
        prepared.append(result.reset_coords(extra).expand_dims(model=[name]))
    variables = {str(v) for r in prepared for v in r.data_vars}
    empty: dict[str, Any] = {}
    for name in variables:
        kind = next(r[name].dtype.kind for r in prepared if name in r)
        empty[name] = "" if kind in "OUT" else 0 if name == "status" else np.nan
    wide = _same_dims(prepared)
    joined = xr.concat(
        wide,
        dim="model",
        join="outer",
        fill_value=empty,
        data_vars="all",
        coords="minimal",
        compat="override",
        combine_attrs="drop_conflicts",
    )
    joined = joined.set_coords([c for c in loose if c in joined])
    joined.attrs["model"] = ", ".join(names)
    joined.attrs["sources"] = json.dumps([{k: str(v) for k, v in r.attrs.items()} for r in results])
    return joined


def _compared(result: xr.Dataset, what: str) -> str:
    return (
        ", ".join(map(str, np.atleast_1d(result["metric"].values))) if what == "metric" else str(result.attrs.get(what))
    )


def _same_dims(results: list[xr.Dataset]) -> list[xr.Dataset]:
    """Every variable with the same dims in all results: tokens shared in one set are repeated for another's."""
    out = []
    for result in results:
        for name in list(result.data_vars):
            wanted = max((tuple(r[name].dims) for r in results if name in r), key=len)
            missing = {d: result[d] for d in wanted if d not in result[name].dims and d in result.dims}
            if missing:
                result = result.assign({name: result[name].expand_dims(missing).transpose(*wanted)})
        out.append(result)
    return out


def require_dataset(result: Any) -> None:
    """Refuses anything that is not one of our datasets.

    Raises:
        ResultError: It is something else, or a tree of several.
    """
    if isinstance(result, xr.DataTree):
        raise ResultError(
            "This result is a tree of several datasets: pick one, as in "
            f"result[{next(iter(result.children), '…')!r}].to_dataset()."
        )
    if not isinstance(result, xr.Dataset) or "effect" not in result or "tracepatch_format" not in result.attrs:
        raise ResultError(
            f"This is no tracepatch result, but {type(result).__name__} without `effect` and its provenance."
        )
