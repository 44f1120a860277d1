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
from tracepatch.jobs import EAGER
from tracepatch.layout import Key
from tracepatch.plan import Group
from tracepatch.reach import canonical, layers_of
from tracepatch.recipe import Patching
from tracepatch.sampling import Floats
from tracepatch.sides import Op, Sides
from tracepatch.sites import Select, Site, component
from tracepatch.sources import OTHER

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
        depth = len(self.architecture)
        sites = [m.site for m in self.p.metrics]
        top = max(depth if s is None else min(depth, layers_of(self.architecture, s.component, s.layer)) for s in sites)
        inner = [len(self.cells.axes[dim]) for dim in self.cells.by if dim != "layer"]
        found = {}
        for name, layer in self.cells.keys:
            own = {"embed": -1, "logits_in": depth, "logits_in_scale": depth}.get(name, layer)
            found[name, layer] = {0: np.full((1, *inner), float(max(0, top - 1 - own)))}
        return laid_out(self.cells, found, 1, 1)[0, 0]

    def _build(self, group: Group) -> list[Op]:
        sides = self.sides
        items: list[tuple[Any, ...]] = [
            ("settle", self.base, sides.where(group, self.base), tuple(sorted(self.kept)))
        ]
        for key in self.cells.keys:
            own, beside = self.own[key], self.beside.get(key)
            source: tuple[Any, ...] = ("number", self.source)
            if self.source is None:
                source = ("world", own, sides.where(group, OTHER[self.base]), sides.agreeing(group))
            sums = tuple(i for i, dim in enumerate(dims_of(component(own[0])), 1) if dim not in self._kept(key))
            stream = None if beside is None else ("value", self.base, *beside)
            items.append(("sizes", ("value", self.base, *own), stream, source, is_vector(own[0]), sums))
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

    def _ratio(
        self, name: str, part: xr.DataArray, whole: xr.DataArray, length: int, nothing: float = 0.0
    ) -> Floats:
        """Sums over what each cell patches, one over the other: ``[row, *dims of the cells but the layer]``."""
        part, whole = (self._summed(array, length) for array in (part, whole))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = xr.where(part > 0, part / whole, part + nothing)
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
