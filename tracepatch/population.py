"""The cells of an estimate as a population of which any part can be patched exactly, in one plan.

Whatever was estimated is recorded again as rows: a sweep from its request, recorded rows as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from tracepatch.agreement import cell_dims, means, ordered
from tracepatch.cells import Cells
from tracepatch.doubts import Variables, doubts_of, doubts_of_rows
from tracepatch.errors import RecipeError, ResultError, listing
from tracepatch.estimates import asked_again
from tracepatch.metrics import Metrics
from tracepatch.models import Model, fingerprint
from tracepatch.plan import PROVED as PROOFS
from tracepatch.plan import Proof, Status
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.results import normalize, pair_coords, placed
from tracepatch.sampling import Floats
from tracepatch.sites import UNITS

TOLERANCE = 0.05  # by which the unpatched runs of an estimate and of its audit may differ, beside their size


@dataclass(frozen=True)
class Exact:
    """Exact effects of some cells.

    Attributes:
        cells: Their numbers.
        effect: ``[pair, cell]``.
        status: The same, of ``Status``.
        forwards: Patched forwards that were run for them.
    """

    cells: NDArray[np.intp]
    effect: Floats
    status: NDArray[np.int8]
    forwards: int


@dataclass(frozen=True)
class Population:
    """The cells of an estimate.

    Attributes:
        estimate: The dataset.
        at: Where each cell stands in it, an index for each of its dims but ``pair``.
        proofs: ``[cell, pair]``: why a patch needs no forward, see ``plan.Proof``.
        record: Makes planned rows of some cells: the rows, and the cell of each.
        doubts: Makes the variables of ``doubts.doubts_of``.
    """

    estimate: xr.Dataset
    at: tuple[NDArray[np.intp], ...]
    proofs: NDArray[np.int8]
    record: Callable[[Sequence[int]], tuple[Patching, Sequence[int]]]
    doubts: Callable[[Sequence[int]], Variables]

    @property
    def proved(self) -> NDArray[np.bool_]:
        """Which cells are without effect by proof, in every pair that has them."""
        return np.asarray((np.isin(self.proofs, PROOFS) | (self.proofs == Proof.ABSENT)).all(1))

    @property
    def patches(self) -> int:
        """Patched forwards that all cells take together, but for those that are proved to be without effect."""
        return int((self.proofs == Proof.NONE).sum())

    @property
    def ranked(self) -> NDArray[np.intp]:
        """The cells that may have an effect, by the size of their estimates, the largest first."""
        size = means(self.estimate, "estimate", bool(self.estimate.attrs.get("signed", 1)))[self.at]
        return ordered(np.where(self.proved, np.nan, size))

    def patched(self, cells: Sequence[int] | NDArray[np.intp], progress: bool | None = None) -> Exact:
        """Patches some cells exactly.

        Raises:
            ResultError: The unpatched runs are not those of the estimate.
        """
        if not len(cells):
            none = np.zeros((self.estimate.sizes["pair"], 0))
            return Exact(np.zeros(0, np.intp), none, none.astype(np.int8), 0)
        p, numbers = self.record([int(n) for n in cells])
        result = p.run(progress)
        assert isinstance(result, xr.Dataset)
        self._require_same_base(result)
        at: Any = (slice(None), *placed(p.rows)[2])
        effect, status = (result[name].transpose("pair", ...).values[at] for name in ("effect", "status"))
        return Exact(np.array(numbers, np.intp), effect, status, p.plan.jobs)

    def _require_same_base(self, result: xr.Dataset) -> None:
        ours, theirs = self.estimate["base"], result["base"]
        if ours.dims != ("pair",) or theirs.dims != ("pair",):
            return
        gap = float(abs(ours.values - theirs.values).max())
        if gap > TOLERANCE * (1 + float(abs(theirs).max())):
            raise ResultError(
                f"In the unpatched runs {self.estimate['metric'].item()} differs by up to {gap:.3g} from what it was "
                "when the effects were estimated. Audit an estimate with the model, pairs and metric that it was made "
                "with."
            )

    def filled(self, exact: Sequence[Exact]) -> xr.Dataset:
        """The estimate's dataset with the exact effects that are known beside it.

        ``effect`` and ``normalized`` are exact, NaN where nothing was patched; ``normalized_estimate`` is what
        ``normalized`` was. Cells that are proved to be without effect have 0.
        """
        dims = ("pair", *cell_dims(self.estimate))
        dataset = self.estimate.transpose(*dims, missing_dims="ignore")
        if "normalized" in dataset:
            dataset = dataset.rename(normalized="normalized_estimate")
        there = dataset["estimate"].notnull().values
        effect = np.full(there.shape, np.nan)
        status = dataset["status"].values.copy()
        zero = self.proofs.T[:, self.proved]
        at: Any = (slice(None), *(index[self.proved] for index in self.at))
        effect[at] = np.where(zero == Proof.ABSENT, np.nan, 0.0)
        status[at] = np.where(zero == Proof.ABSENT, Status.ABSENT, Status.PROVED_ZERO)
        for one in exact:
            at = (slice(None), *(index[one.cells] for index in self.at))
            effect[at], status[at] = one.effect, one.status
        units = dataset["estimate"].attrs
        data = {"effect": (dims, effect, dict(units)), "status": (dims, status, dict(dataset["status"].attrs))}
        dataset = dataset.assign(data)
        if "normalized_estimate" in dataset:
            over = str(dataset["normalized_estimate"].attrs.get("over", "corrupted"))
            dataset = normalize(dataset, [0.0], over)
        front = [n for n in ("effect", "normalized", "estimate", "normalized_estimate") if n in dataset]
        return dataset[[*front, *(n for n in dataset.data_vars if n not in front)]]

    def spread(self, values: NDArray[Any], empty: Any) -> tuple[tuple[str, ...], NDArray[Any]]:
        """A number for each cell as a variable: dims and array."""
        dims = cell_dims(self.estimate)
        array = np.full([self.estimate.sizes[dim] for dim in dims], empty, values.dtype)
        array[self.at] = values
        return dims, array


def population(
    target: Any, pairs: Pairs | None, estimate: Any, metric: Metrics, source: Any, options: dict[str, Any]
) -> Population:
    """The population of an estimate; see ``tp.audit`` for the arguments.

    Raises:
        ResultError: It is no estimate, or one of something else.
        RecipeError: What was estimated has no exact patch.
    """
    if not isinstance(target, Patching):
        return _asked(target, pairs, require_estimate(estimate), metric, source, options)
    given = {"pairs": pairs, "source": source, **options}
    extra = sorted(name for name, value in given.items() if value is not None)
    if extra:
        raise RecipeError(
            f"{', '.join(extra)}= belong to the recording already: audit recorded rows by tp.audit(p, estimate=…)."
        )
    return _recorded(target, require_estimate(target.estimate() if estimate is None else estimate))


def require_estimate(estimate: Any) -> xr.Dataset:
    """An estimate of one metric, with its pairs.

    Raises:
        ResultError: It is something else.
    """
    if isinstance(estimate, xr.DataTree):
        raise ResultError(
            "This estimate is a tree of several datasets: audit one after the other, as in "
            f"estimate={next(iter(estimate.children), '…')!r} of it: tree[…].to_dataset()."
        )
    if not isinstance(estimate, xr.Dataset) or "estimate" not in estimate:
        raise ResultError(
            "Pass what tp.attribute or p.estimate returned: a dataset with `estimate`, not "
            f"{type(estimate).__name__}{' without it' if isinstance(estimate, xr.Dataset) else ''}."
        )
    if "audited" in estimate:
        raise ResultError("This estimate is audited already: pass the dataset that tp.attribute returned.")
    if "metric" in estimate["estimate"].dims:
        first = estimate["metric"].values[0].item()
        raise ResultError(
            "The estimate has several metrics, and an audit is of one: select it, as in "
            f"estimate.sel(metric={first!r}), and pass the same metric=."
        )
    if "pair" not in estimate["estimate"].dims:
        raise ResultError("The estimate has no dim `pair`: audit it as tp.attribute returned it, with all its pairs.")
    return estimate


def require_made_by(estimate: xr.Dataset, p: Patching) -> None:
    """Refuses an estimate of another model, other pairs or another metric.

    Raises:
        ResultError: It is one; all differences are named.
    """
    wrong = []
    if estimate.attrs["fingerprint"] != fingerprint(p.model):
        wrong.append(f"its model is {estimate.attrs['model']}, with other weights")
    for name, (_, values) in ((n, c) for n, c in pair_coords(p.encoded).items() if n != "pair"):
        if name not in estimate.coords or estimate[name].values.tolist() != list(values):
            wrong.append(f"its pairs have other entries of {name}")
    known = json.loads(estimate.attrs["metrics"])
    own, name = {m.name: m.told for m in p.metrics}, str(estimate["metric"].item())
    if list(own) != [name] or own[name] != known[name]:
        wrong.append(f"it is of the metric {name}, not of {', '.join(own)}")
    if wrong:
        raise ResultError(f"The estimate cannot be audited here.\n{listing(wrong)}\nPass what it was made with.")


def _asked(
    model: Model, pairs: Pairs | None, estimate: xr.Dataset, metric: Metrics, source: Any, options: dict[str, Any]
) -> Population:
    """A sweep, asked for once more."""
    if "request" not in estimate.attrs:
        raise ResultError(
            "The estimate does not say what was asked for: it is of recorded rows, which are audited with their "
            "recording, tp.audit(p, estimate=…)."
        )
    quiet = {name: value for name, value in options.items() if name != "directory"}
    p = Patching(model, pairs, metric, **quiet)  # type: ignore[arg-type]  # it refuses what is no pairs
    require_made_by(estimate, p)
    cells, renormalize = asked_again(p, estimate.attrs["request"], source)
    names = (*(("component",) if len(cells.names) > 1 else ()), *cells.by)
    dims = cell_dims(estimate)
    if "draw" in dims:
        raise ResultError("The estimate has several draws, and an audit is of one: estimate with draws=1.")
    lost = [name for name in names if name not in estimate.coords or estimate[name].dims not in ((), (name,))]
    if lost or set(dims) - set(names):
        raise ResultError(f"The estimate has lost its coordinates {', '.join(lost or dims)}: audit it as it came.")
    at = np.nonzero(estimate["estimate"].transpose("pair", *dims).notnull().any("pair").values)
    columns = []
    for name in names:
        values = np.atleast_1d(estimate[name].values)
        columns.append(values[at[dims.index(name)]].tolist() if name in dims else values.tolist() * len(at[0]))
    labels = list(zip(*columns, strict=True)) if columns else [()] * len(at[0])

    def record(numbers: Sequence[int], **more: Any) -> tuple[Patching, Sequence[int]]:
        among = {labels[n]: n for n in numbers}
        with Patching(model, pairs, metric, **{**options, **more}) as rows:  # type: ignore[arg-type]
            order = cells.record(rows, among, renormalize)
        return rows, [among[label] for label in order]

    def of_rows(chosen: Sequence[int]) -> Variables:
        part, order = record(chosen, prune=False)
        shape = estimate.sizes["pair"], *(estimate.sizes[dim] for dim in dims)
        return _spread(doubts_of_rows(part, options.get("memory")), dims, shape, [index[order] for index in at])

    # What is proved of a site is proved of each of its heads or neurons.
    by = tuple(dim for dim in cells.by if dim not in UNITS)
    coarse = Cells.of(p, cells.names, by, json.loads(estimate.attrs["request"])["direction"], cells.source, cells.only)
    with p:
        known = {label: n for n, label in enumerate(coarse.record(p, None, renormalize))}
    inside = [i for i, name in enumerate(names) if name not in UNITS]
    whole = np.array([known[tuple(label[i] for i in inside)] for label in labels], np.intp)

    def doubts(chosen: Sequence[int]) -> Variables:
        number = cells.source is None or isinstance(cells.source, (Real, np.ndarray, torch.Tensor))
        if not (cells.plain and number):  # rows know what is written where
            return of_rows(chosen)
        axes: dict[str, Any] = {"component": list(cells.names), **cells.axes}
        found: Variables = {}
        for name, (own, values) in doubts_of(p, cells, options.get("memory")).items():
            array = xr.DataArray(values, dims=own, coords={dim: axes[dim] for dim in own if dim != "pair"})
            array = array.sel({dim: estimate[dim].values for dim in own if dim != "pair"})
            found[name] = (
                (*(("pair",) if "pair" in own else ()), *dims),
                array.transpose("pair", *dims, missing_dims="ignore").values,
            )
        return found

    places = tuple(np.asarray(index, np.intp) for index in at)
    return Population(estimate, places, p.plan.proofs[whole], record, doubts)


def _recorded(p: Patching, estimate: xr.Dataset) -> Population:
    """Recorded rows, or those of them that have the estimate's labels."""
    require_made_by(estimate, p)
    dims = cell_dims(estimate)
    sets: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(p.plan.rows):
        sets.setdefault(tuple(row.labels), []).append(number)
    for numbers in sets.values():
        own, shape, at, coords = placed([p.rows[n] for n in numbers])
        same = own == dims and shape == tuple(estimate.sizes[dim] for dim in dims)
        if same and all(name in estimate.coords and _equal(estimate[name], axis) for name, axis in coords.items()):
            break
    else:
        raise ResultError(
            "The estimate is not of these rows: none of them have its labels. Pass what p.estimate() returned."
        )

    def record(chosen: Sequence[int]) -> tuple[Patching, Sequence[int]]:
        return part_of(p, [numbers[n] for n in chosen]), chosen

    def doubts(chosen: Sequence[int]) -> Variables:
        part = part_of(p, [numbers[n] for n in chosen], prune=False)
        ratios = doubts_of_rows(part, part._limits["memory"])
        return _spread(ratios, dims, (estimate.sizes["pair"], *shape), [index[list(chosen)] for index in at])

    return Population(estimate, at, p.plan.proofs[numbers], record, doubts)


def _spread(
    ratios: Mapping[str, NDArray[np.float64]], dims: Sequence[str], shape: tuple[int, ...], at: Sequence[Any]
) -> Variables:
    """Numbers of chosen rows ``[pair, row]`` at their cells, NaN at all others."""
    found: Variables = {}
    for name, values in ratios.items():
        array = np.full(shape, np.nan)
        where: Any = (slice(None), *at)
        array[where] = values
        found[name] = ("pair", *dims), array
    return found


def _equal(coordinate: xr.DataArray, axis: Any) -> bool:
    values = axis[1] if isinstance(axis, tuple) else axis
    return bool(coordinate.values.tolist() == np.asarray(values).tolist())


def part_of(p: Patching, numbers: Sequence[int], **limits: Any) -> Patching:
    """Some of the rows of a recording, as one of its own, with other limits than that if so wished."""
    found = copy(p)
    found._limits = {**p._limits, **limits}
    found.rows = [replace(p.rows[n], number=i) for i, n in enumerate(numbers)]
    found._measured = found._journal = None
    found._plan = found.make_plan()
    return found
