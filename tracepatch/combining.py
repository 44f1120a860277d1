"""Results averaged over pairs, and several results as one: ratios of means, and NaN where something does not exist."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.errors import MeasurementWarning, ResultError, listing
from tracepatch.plan import Status

MAIN = ("effect", "estimate")  # what a result is about: measured, or approximated
CANCEL = 0.1  # of the size of differences, below which their mean is no yardstick
NOTHING = 1e-5  # of the size of what it is a difference of, below which a difference is none


def over_pairs(effects: xr.Dataset) -> xr.Dataset:
    """The same result averaged over pairs, ``normalized`` as a ratio of means.

    A mean of the pairs' own normalized effects would let a pair with a small clean − corrupted difference outvote the
    others; here each pair counts in the metric's unit. Pairs too close to divide by still count.
    Tokens that differ between pairs are those of the first one, with ``…``. A result without pairs comes back as it is.
    """
    main = main_variable(effects)
    if "pair" not in effects[main].dims:
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
    if "draw" not in effects[main_variable(effects)].dims:
        return effects
    return _over(effects, "draw").assign_attrs({**effects.attrs, "averaged_draws": effects.sizes["draw"]})


def _over(effects: xr.Dataset, dim: str) -> xr.Dataset:
    """Averaged over a dim of the effects."""
    main = main_variable(effects)
    own = {"normalized": main, "normalized_estimate": "estimate"}
    ratios = {name: effects[name].attrs.get("of", own.get(name)) for name in map(str, effects.data_vars)}
    ratios = {name: of for name, of in ratios.items() if of is not None}
    numeric = [
        v for v in effects.data_vars if v not in ("status", *ratios) and np.issubdtype(effects[v].dtype, np.number)
    ]
    present = effects[main].notnull()
    chosen = effects[numeric]
    if not present.all():  # where a pair has no such cell, its baselines do not count either
        baselines = [name for name in ("base", "clean", "corrupted") if name in chosen]
        chosen = chosen.assign({name: chosen[name].where(present) for name in baselines})
    mean = chosen.mean(dim, keep_attrs=True)
    for name, of in ratios.items():  # of a mean, over a mean difference of unpatched runs
        there = effects[of].notnull()
        scale: Any = np.maximum(abs(effects["clean"]), abs(effects[_other(effects, name)]))
        gap = _yardstick(
            whole_difference(effects, name).where(there), scale.where(there), dim, warn=name == "normalized"
        )
        mean = mean.assign({name: (mean[of] / gap).transpose(*mean[of].dims)})
        mean[name].attrs = dict(effects[name].attrs)
    if "status" in effects:
        mean = mean.assign(status=_status(effects["status"], dim))
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


def whole_difference(effects: xr.Dataset, name: str = "normalized") -> xr.DataArray:
    """What a fraction divides by, for each pair: clean − corrupted, or − the world that stands in for it."""
    found: xr.DataArray = effects["clean"] - effects[_other(effects, name)]
    return found


def _other(effects: xr.Dataset, name: str) -> str:
    return str(effects[name].attrs.get("over", "corrupted"))


def _status(status: xr.DataArray, dim: str) -> xr.DataArray:
    """The status of a mean over a dim: of what is in it, measured before estimated before proved."""
    if dim not in status.dims:
        return status
    found = xr.zeros_like(status.isel({dim: 0}, drop=True))
    # What is pending leaves a mean of what there is; a mean is a proved zero if all that is in it was proved.
    for kind in (Status.PENDING, Status.PROVED_ZERO, Status.ESTIMATED, Status.MEASURED):
        found = found.where(~(status == kind).any(dim), int(kind))
    return found.astype(np.int8).assign_attrs(status.attrs)


def concat(results: Sequence[xr.Dataset]) -> xr.Dataset:
    """Results of several models, or of one model on several sets, along a new dim ``model``.

    What one model lacks (a head, a layer, a position) is NaN with status 0. ``depth`` tells how far up a layer stands
    in its own model.

    Raises:
        ResultError: Nothing to join, results with different dims, or two of one model.
    """
    alone: Any = results
    if isinstance(alone, xr.Dataset):
        raise ResultError("Pass a list of results, one for each model: tp.concat([first, second]).")
    results = list(results)
    if not results:
        raise ResultError("There are no results to concatenate.")
    dims = [tuple(sorted(map(str, r[main_variable(r)].dims))) for r in results]
    names = [str(r.attrs["model"]) for r in results]
    if len(set(dims)) > 1:
        raise ResultError(
            "Results with different dims cannot be joined.\n"
            + listing([f"{n}: {', '.join(d)}" for n, d in zip(names, dims, strict=True)])
        )
    if len(set(names)) < len(names):
        raise ResultError(f"Two results are of one model: {', '.join(names)}. Rename one: result.attrs['model'] = '…'.")
    for what in ("variable", "metric", "base", "component"):
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
    if what == "variable":
        return main_variable(result)
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


def by_metric(result: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """A result for each of its metrics, with the metric's name; ``""`` where it has one."""
    if "metric" not in result.dims:
        yield "", result
        return
    for name in result["metric"].values.tolist():
        yield str(name), result.sel(metric=name)


def in_words(result: xr.Dataset, count: int = 5, least: float = 0.02) -> list[str]:
    """The largest effects of the first metric, averaged over pairs, in words; those near zero are left out."""
    mean = over_pairs(next(iter(by_metric(result)))[1])
    name = "normalized" if "normalized" in mean else "effect"
    flat = mean[name].stack(_cell=[str(d) for d in mean[name].dims])
    order = abs(flat).fillna(-1).argsort().values[::-1][:count]
    lines = []
    for i in order:
        cell = flat[int(i)]
        labels = dict(zip(map(str, mean[name].dims), cell["_cell"].item(), strict=True))
        if "pos" in labels and "token" in mean.coords and mean["token"].dims == ("pos",):
            labels["pos"] = f"{labels['pos']} ({str(mean['token'].sel(pos=labels['pos']).item()).strip()})"
        if abs(float(cell)) >= least:
            lines.append(f"    {float(cell):+.3f}  {', '.join(f'{d} {v}' for d, v in labels.items())}")
    read = f" on {mean['metric'].item()}" if "metric" in mean.coords else ""
    base, written = mean.attrs["base"], mean.attrs["written"]
    return [f"    largest {name} effects{read} ({written} into the {base} run):", *(lines or ["    none of note"])]


def datasets_of(result: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """The datasets of a result, with its provenance: itself, called ``""``, or those of a tree by their names."""
    if not isinstance(result, xr.DataTree):
        require_dataset(result)
        return {"": result}
    found = {name: child.to_dataset() for name, child in result.children.items()}
    return {name: dataset.assign_attrs({**result.attrs, **dataset.attrs}) for name, dataset in found.items()}


def labels_at(data: xr.DataArray | xr.Dataset, at: Mapping[str, int]) -> dict[str, Any]:
    """The coordinates of a cell, by the index of each dim; of a row of a sparse result, those that name it."""
    found: dict[str, Any] = {}
    for dim, index in at.items():
        own = [str(name) for name in data.coords if data[name].dims == (dim,) and name != "row"]
        for name in own if dim == "row" else [dim]:
            found[name] = data[name].values[index]
    return found


def by_site(data: xr.DataArray) -> xr.DataArray:
    """The rows of a sparse result by what names them, not by their numbers."""
    names = [str(name) for name in data.coords if data[name].dims == ("row",) and name != "row"]
    if len(names) == 1:
        return data.swap_dims(row=names[0]).drop_vars("row")
    return data.set_index(row=names) if names else data


def main_variable(result: Any) -> str:
    """The name of what a result is about: ``effect``, or ``estimate`` where it is an approximation.

    Raises:
        ResultError: As for ``require_dataset``.
    """
    require_dataset(result)
    return next(name for name in MAIN if name in result)


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
    ours = isinstance(result, xr.Dataset) and "tracepatch_format" in result.attrs
    if not ours or not any(name in result for name in MAIN):
        raise ResultError(
            f"This is no tracepatch result, but {type(result).__name__} without `effect` and its provenance."
        )


def by_corruption(effects: xr.Dataset) -> xr.Dataset:
    """A result of several corruptions of each clean prompt, with ``corruption`` as a dim, and ``pair`` a clean prompt.

    Pairs of the same clean prompt and answers become one. What a prompt does not have is NaN with status 0. So
    ``tp.over_pairs`` of it averages over prompts, corruption by corruption.

    Raises:
        ResultError: The pairs' corruptions have no names, or a clean prompt has two of one name.
    """
    require_dataset(effects)
    if "corruption" not in effects.coords or effects["corruption"].dims != ("pair",):
        raise ResultError(
            "These pairs' corruptions have no names: make them with tp.corruptions, or pass corruption=… to tp.Pairs."
        )
    identity = [name for name in ("clean_prompt", "answer", "wrong") if name in effects.coords]
    prompts = list(zip(*(effects[name].values.tolist() for name in identity), strict=True))
    unique, names = list(dict.fromkeys(prompts)), effects["corruption"].values.tolist()
    at = [(unique.index(prompt), name) for prompt, name in zip(prompts, names, strict=True)]
    twice = [f"pair {i}: {name!r} of {prompts[i][0]!r}" for i, (_, name) in enumerate(at) if at.index(at[i]) < i]
    if twice:
        raise ResultError(f"Some prompts have two corruptions of one name.\n{listing(twice)}\nName them apart.")
    labels = list(dict.fromkeys(names))
    grid = np.full((len(labels), len(unique)), -1)
    for i, (prompt, name) in enumerate(at):
        grid[labels.index(name), prompt] = i
    chosen = xr.DataArray(grid, dims=("corruption", "prompt"))
    found = effects.drop_vars("corruption").isel(pair=chosen.clip(0)).drop_vars("pair")
    for name in (str(n) for n in (*found.data_vars, *found.coords) if "prompt" in found[n].dims):
        empty = "" if found[name].dtype.kind in "OUT" else 0 if name == "status" else np.nan
        found[name] = found[name].where(chosen >= 0, empty)
    for name in identity:  # the same whatever the corruption
        found = found.drop_vars(name).assign_coords({name: ("prompt", effects[name].values[grid.max(0)])})
    found = found.rename(prompt="pair").assign_coords(pair=np.arange(len(unique)), corruption=labels)
    return found.transpose("metric", "pair", "corruption", ..., missing_dims="ignore")


AGREEMENT = ("nothing", "agree", "size", "sign")


def agreement_over(
    effects: xr.Dataset, over: str = "corruption", least: float = 0.05, factor: float = 2.0, variable: str | None = None
) -> xr.Dataset:
    """On which cells several corruptions agree, in sign and size; what only one of them shows is its own finding.

    Values are averaged over pairs, as in ``tp.over_pairs``.

    Args:
        effects: A result or an estimate, with corruptions as pairs' labels or as a dim.
        over: The dim to compare along; ``corruption``, or another one, such as ``metric`` or ``model``.
        least: The smallest size that counts: below it a value is nothing.
        factor: By how much the largest size may exceed the smallest.
        variable: What is compared: ``normalized``, where there is one, unless said otherwise. Corruptions that hardly
            change the output have nothing to divide by: compare their ``effect``.

    Returns:
        Without the dim: ``verdict``: 0 nothing (every value is below `least`), 1 agree (one sign, all at least `least`,
        sizes within `factor`), 2 size (no opposite signs, but sizes differ by more, or some are nothing), 3 sign (some
        pull one way and some the other); ``mean``, ``smallest`` and ``largest`` (by size, with sign), and ``count``,
        how many there are. A cell that fewer than two have is NaN, with the verdict -1.

    Raises:
        ResultError: The result has no such dim or variable.
    """
    main = main_variable(effects)
    if over == "corruption" and over not in effects.dims:
        effects = by_corruption(effects)
    if over not in effects.dims:
        raise ResultError(f"This result has no dim {over!r}; it has {', '.join(map(str, effects[main].dims))}.")
    mean = over_pairs(effects)
    name = variable or ("normalized" if "normalized" in mean else main)
    if name not in mean or over not in mean[name].dims:
        raise ResultError(f"This result has no variable {name!r} along {over}; compare its {main}.")
    values = mean[name]
    count = values.notnull().sum(over)
    size, enough = abs(values), count >= 2
    counts = size >= least
    up, down = ((counts & (sign * values > 0)).any(over) for sign in (1, -1))
    largest, smallest = size.max(over), size.min(over)
    alike = (smallest >= least) & (largest <= factor * smallest)
    verdict = (2 - alike.astype(np.int8)).where(~(up & down), 3).where(counts.any(over), 0).where(enough, -1)
    verdict = verdict.astype(np.int8)
    verdict.attrs.update(flag_values=[-1, *range(4)], flag_meanings=f"absent {' '.join(AGREEMENT)}")

    def at(extreme: xr.DataArray) -> xr.DataArray:
        return values.where(size == extreme).max(over).where(enough)

    found = {"mean": values.mean(over).where(enough), "smallest": at(smallest), "largest": at(largest)}
    return xr.Dataset(
        {"verdict": verdict, **found, "count": count},
        attrs={**effects.attrs, "compared": name, "over": over, "least": least, "factor": factor},
    )
