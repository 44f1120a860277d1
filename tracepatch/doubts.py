"""What makes the estimate of a site doubtful before it is patched: how far it is moved, through what, and how far up.

A first-order estimate follows a tangent. It is a guess where the step is large beside what stands there, where a
softmax is so saturated that its slope is nearly 0, and where many layers bend the way to the metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.attribution import is_vector, stream_of
from tracepatch.cells import Cells, dims_of
from tracepatch.estimates import laid_out
from tracepatch.jobs import EAGER, Job, Write
from tracepatch.layout import Key
from tracepatch.plan import Group
from tracepatch.probe import resolution
from tracepatch.reach import canonical, layers_of
from tracepatch.recipe import Patching
from tracepatch.rowwise import by_place, edits_of, jobs_of
from tracepatch.sampling import Floats
from tracepatch.sides import Op, Sides
from tracepatch.sites import SPLIT_READERS, Select, Site, component
from tracepatch.sources import OTHER, WorldName

ADDS = ("embed", "head_out", "attn_out", "cross_attn_out", "experts_out", "mlp_out")
"""Components that are added to the stream: they are small or large beside the stream that leaves their block."""
CHOOSES = {"q": "q", "k": "k", "q_in": "q", "k_in": "k", "scores": "scores"}
"""Components that act through attention's softmax, and as which part of it."""
Variables = dict[str, tuple[tuple[str, ...], Floats]]


def doubts_of(p: Patching, cells: Cells, memory: int | None = None) -> Variables:
    """Variables that say how doubtful estimates of cells are, with their dims.

    * ``patch_size``: the norm of what a patch adds over the norm of what stands there, at the positions that it
      changes: the residual stream that leaves the block, for what is added to it; of anything else, its own.
    * ``saturation``, of q, k, scores, and what single heads read for q and k: the largest weight that attention gives
      to a key, averaged over the destinations that the patch reaches, but for the first position, which has no choice.
      1 is a softmax without a slope.
    * ``layers_above``: how many layers there are between the site's own and what the metric reads.

    Args:
        p: Of the model and pairs; nothing of it is run.
        cells: The cells.
        memory: Bytes that may be taken.
    """
    study = _Doubts(p, cells, memory)
    dims = (*(("component",) if len(cells.names) > 1 else ()), *cells.by)
    found: Variables = {name: (("pair", *dims), array) for name, array in study.run().items()}
    return {**found, "layers_above": (dims, study.above())}


@dataclass
class _Doubts:
    """Two forwards of each pair, and the ratios that they give."""

    p: Patching
    cells: Cells
    memory: int | None
    found: dict[str, dict[Key, dict[int, Floats]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p, cells = self.p, self.cells
        self.architecture, self.base, self.source = p.architecture, cells.base, cells.source
        self.floor = resolution(self.architecture.dtype) ** 2
        depth = len(self.architecture)
        self.own = {key: stream_of(canonical(Site(*key), depth)) for key in cells.keys}
        self.beside = {key: canonical(Site("resid_post", key[1]), depth) for key in cells.keys if key[0] in ADDS}
        self.softmax = {key for key in cells.keys if key[0] in CHOOSES and self.architecture.offers("pattern", key[1])}
        self.kept = {*self.own.values(), *self.beside.values(), *(("pattern", layer) for _, layer in self.softmax)}
        worlds = [self.base] if self.source is not None else ["clean", "corrupted"]
        self.sides = Sides(p.model, p.architecture, p.encoded, p.metrics, worlds, (), self.kept, self.memory)

    def run(self) -> dict[str, Floats]:
        """The ratios, ``[pair, *dims of the cells]``."""
        eager = any(name in EAGER for name, _ in self.kept)
        self.sides.take(self.sides.groups(self.kept), self._build, self._read, eager=eager)
        pairs = len(self.p.encoded)
        return {name: laid_out(self.cells, found, 1, pairs)[0] for name, found in self.found.items()}

    def above(self) -> Floats:
        """Layers above each cell's own, ``[*dims of the cells]``."""
        top, depth = _top(self.p), len(self.architecture)
        inner = [len(self.cells.axes[dim]) for dim in self.cells.by if dim != "layer"]
        found = {}
        for name, layer in self.cells.keys:
            number = float(max(0, top - 1 - _own(name, layer, depth)))
            found[name, layer] = {0: np.full((1, *inner), number)}
        return np.asarray(laid_out(self.cells, found, 1, 1)[0, 0])

    def _build(self, group: Group) -> list[Op]:
        sides = self.sides
        items: list[tuple[Any, ...]] = [sides.settled(group, self.base, sorted(self.kept))]
        for key in self.cells.keys:
            own, beside = self.own[key], self.beside.get(key)
            source: tuple[Any, ...] = ("number", self.source)
            if self.source is None:
                source = ("world", own, sides.where(group, OTHER[self.base]), sides.agreeing(group, self.base))
            sums = tuple(i for i, dim in enumerate(dims_of(component(own[0])), 1) if dim not in self._kept(key))
            stream = None if beside is None else ("value", self.base, *beside)
            value = "value", self.base, *own
            items.append(("sizes", value, stream, self.floor, source, is_vector(own[0]), sums))
            if key in self.softmax:
                items.append(("peaks", ("value", self.base, "pattern", key[1])))
        return [*sides.known(group, self.kept), (("contract", tuple(items)), None)]

    def _kept(self, key: Key) -> list[str]:
        """The dims of what is measured at a place that its cells tell apart, or pick from."""
        told = self.cells.kept(component(key[0]))
        return [dim for dim in dims_of(component(self.own[key][0])) if dim in told]

    def _read(self, group: Group, ops: list[Op], found: list[Any]) -> None:
        results = iter(found[-1][1:])
        for key in self.cells.keys:
            squares, there = (tensor.double().numpy() for tensor in next(results))
            dims = ["pos"] if key in self.beside else list(component(self.own[key][0]).dims[:-1])
            change = xr.DataArray(squares, dims=["row", *self._kept(key)])
            ratio = self._ratio(key[0], change, xr.DataArray(there, dims=["row", *dims]), group.length)
            self._keep("patch_size", key, group, np.sqrt(ratio))
            if key in self.softmax:
                weights, count = self._attended(key, next(results).double().numpy())
                self._keep("saturation", key, group, self._ratio(key[0], weights, count, group.length, np.nan))

    def _attended(self, key: Key, peaks: Floats) -> tuple[xr.DataArray, xr.DataArray]:
        """Sums of largest weights ``[row, head, dest]`` over the destinations that a patch reaches, and how many."""
        part, kind = CHOOSES[key[0]], component(key[0])
        counted = np.ones_like(peaks)
        for array in (peaks, counted):
            array[..., 0] = 0.0  # the first position has no choice
        if part == "k":  # a key is seen by all destinations from its own on, and by a group of heads
            heads = self.architecture.units(key[0], key[1])
            peaks, counted = (
                np.flip(np.cumsum(np.flip(a, -1), -1), -1).reshape(len(a), heads, -1, a.shape[-1]).sum(2)
                for a in (peaks, counted)
            )
        dims = ["row", kind.unit or "", kind.place]
        return xr.DataArray(peaks, dims=dims), xr.DataArray(counted, dims=dims)

    def _ratio(self, name: str, part: xr.DataArray, whole: xr.DataArray, length: int, nothing: float = 0.0) -> Floats:
        """Sums over what each cell patches, one over the other: ``[row, *dims of the cells but the layer]``."""
        part, whole = (self._summed(array, length) for array in (part, whole))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (part / whole).where(part > 0, part + nothing)
        inner = [dim for dim in self.cells.by if dim != "layer"]
        missing = {dim: len(self.cells.axes[dim]) for dim in inner if dim not in ratio.dims}
        return np.asarray(ratio.expand_dims(missing).transpose("row", *inner).values)

    def _summed(self, array: xr.DataArray, length: int) -> xr.DataArray:
        for dim in (str(d) for d in array.dims if d != "row"):
            size = array.sizes[dim]
            if dim in self.cells.by:
                at = [label % size if -size <= label < size else -1 for label in self.cells.axes[dim]]
                there = xr.DataArray([i >= 0 for i in at], dims=dim)
                array = array.isel({dim: at}).where(there)
            else:
                chosen = self.cells.picked.get(dim, Select()).resolve(size) or ()
                array = array.isel({dim: list(chosen)}).sum(dim)
        return array

    def _keep(self, name: str, key: Key, group: Group, array: Floats) -> None:
        for i, pair in enumerate(group.pairs):
            self.found.setdefault(name, {}).setdefault(key, {})[pair] = array[i][None]


def doubts_of_rows(p: Patching, memory: int | None = None) -> dict[str, Floats]:
    """The same of recorded rows, by the place where a row is the most doubtful: ``[pair, row]``.

    Args:
        p: The rows, planned without pruning; nothing of it is run.
        memory: Bytes that may be taken.
    """
    study = _Rows(p, memory)
    study.run()
    for number, pair in np.argwhere(p.plan.twins >= 0).tolist():
        twin, of = divmod(int(p.plan.twins[number, pair]), p.plan.pairs)
        for values in study.found.values():
            values[pair, number] = values[of, twin]
    top, depth = _top(p), len(p.architecture)
    own = [min((_own(e.site.component, e.site.layer, depth) for e in row.edits), default=top - 1) for row in p.rows]
    above = np.broadcast_to(np.array([float(max(0, top - 1 - layer)) for layer in own]), study.shape)
    return {**study.found, "layers_above": above}


@dataclass
class _Rows:
    """Two forwards of each pair, and what each row would change in them."""

    p: Patching
    memory: int | None

    def __post_init__(self) -> None:
        plan, self.architecture = self.p.plan, self.p.architecture
        self.floor = resolution(self.architecture.dtype) ** 2
        self.by_pair = jobs_of(plan)
        jobs = [job for found in self.by_pair.values() for job in found]
        self.bases = tuple(dict.fromkeys(job.base for job in jobs))
        self.keys = sorted({(w.component, w.layer) for job in jobs for w in job.writes})
        depth = len(self.architecture)
        self.own = {key: stream_of(key) for key in self.keys}
        self.beside = {key: canonical(Site("resid_post", key[1]), depth) for key in self.keys if key[0] in ADDS}
        self.softmax = [k for k in self.keys if k[0] in CHOOSES and self.architecture.offers("pattern", k[1])]
        self.settled = {*self.own.values(), *self.beside.values(), *(("pattern", layer) for _, layer in self.softmax)}
        terms = {key for job in jobs for w in job.writes for key in w.needed}
        self.kept = self.settled | terms
        given = self.p.model, self.architecture, self.p.encoded, self.p.metrics
        self.sides = Sides(*given, plan.worlds, plan.edited, self.kept, self.memory, plan.references, plan.surveys)
        self.shape = plan.pairs, len(plan.rows)
        self.found = {"patch_size": np.full(self.shape, np.nan)}
        if self.softmax:
            self.found["saturation"] = np.full(self.shape, np.nan)

    def run(self) -> None:
        """Fills in what is found."""
        standing = (e.site.component for w in self.p.plan.edited for e in w.edits)
        eager = any(name in EAGER for name in (*(name for name, _ in self.kept), *standing))
        self.sides.take(self.sides.groups(self.kept), self._build, self._read, eager=eager)

    def _jobs(self, group: Group, base: WorldName) -> list[Job]:
        return [job for pair in group.pairs for job in self.by_pair[pair] if job.base == base]

    def _build(self, group: Group) -> list[Op]:
        sides, ops = self.sides, self.sides.known(group, self.kept)
        for base in self.bases:
            items: list[tuple[Any, ...]] = []
            for key, _, pairs, writes, most in edits_of(sides, group, self._jobs(group, base), self.memory):
                beside = self.beside.get(key)
                stream = None if beside is None else ("value", base, *beside)
                heads = self.architecture.units(*key) if key[0] in SPLIT_READERS else 0
                edits = pairs, writes, key[0] in EAGER, most, heads
                items.append(("row_sizes", ("value", base, *self.own[key]), stream, self.floor, edits))
            items += [("peaks", ("value", base, "pattern", layer)) for _, layer in self.softmax]
            settled = sides.settled(group, base, sorted(self.settled))
            ops.append((("contract", (settled, *items)), None))
        return ops

    def _read(self, group: Group, ops: list[Op], found: list[Any]) -> None:
        results = [given[1:] for (op, _), given in zip(ops, found, strict=True) if op[0] == "contract"]
        for base, given in zip(self.bases, results, strict=True):
            jobs, parts = self._jobs(group, base), iter(given)
            for numbers in by_place(jobs).values():
                squares = next(parts).double().numpy()
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratios = np.sqrt(np.where(squares[:, 0] > 0, squares[:, 0] / squares[:, 1], 0.0))
                for n, ratio in zip(numbers, ratios.tolist(), strict=True):
                    self._largest("patch_size", jobs[n], ratio)
            for key, peaks in zip(self.softmax, parts, strict=True):
                for job in jobs:
                    row = peaks[group.pairs.index(job.pair)].double().numpy()
                    for write in (w for w in job.writes if (w.component, w.layer) == key):
                        self._largest("saturation", job, self._attended(write, row))

    def _attended(self, write: Write, peaks: Floats) -> float:
        """The mean of the largest weights ``[head, dest]`` where an edit acts; NaN where there is no choice."""
        count, heads = self.architecture.units(write.component, write.layer), len(peaks)
        units = range(count) if write.units is None else sorted(set(write.units))
        picked = peaks.reshape(count, heads // count, -1)[list(units)]
        least = min(write.positions)
        dests = range(least, peaks.shape[1]) if CHOOSES[write.component] == "k" else sorted(set(write.positions))
        chosen = [dest for dest in dests if dest > 0]
        return float(picked[..., chosen].mean()) if chosen else float("nan")

    def _largest(self, name: str, job: Job, value: float) -> None:
        self.found[name][job.pair, job.row] = np.fmax(self.found[name][job.pair, job.row], value)


def _top(p: Patching) -> int:
    """How many layers there are below what the metrics read."""
    depth, sites = len(p.architecture), [m.site for m in p.metrics]
    return max(depth if s is None else min(depth, layers_of(p.architecture, s.component, s.layer)) for s in sites)


def _own(name: str, layer: int, depth: int) -> int:
    """The layer that a component is in: -1 below all of them."""
    return {"embed": -1, "logits_in": depth, "logits_in_scale": depth}.get(name, layer)
