"""Edges: what each writer to the stream does through each of its readers, estimated all at once, or patched exactly.

``tp.edges`` takes two forwards and one backward for all edges of a model; ``tp.edge_rows`` records some of them as rows
that the planner measures. See ``graph`` for what writes and what reads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from tracepatch.cells import Direction, base_of
from tracepatch.errors import RecipeError
from tracepatch.estimates import as_json, dataset_of, resting_on
from tracepatch.estimators import AtP, AtPStar, IntegratedGradients, held_of, require_movable
from tracepatch.graph import Graph, Node, graph_of
from tracepatch.layout import Key
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model, require_ready, require_weights
from tracepatch.plan import Group
from tracepatch.prompts import Pairs
from tracepatch.reach import canonical
from tracepatch.recipe import Patching
from tracepatch.recording import Recorder
from tracepatch.sides import Op, Sides
from tracepatch.sites import Site, select
from tracepatch.slopes import Between, Slopes
from tracepatch.sources import OTHER, WorldName


def edges(
    model: Model,
    pairs: Pairs,
    metric: Metrics = logit_diff,
    *,
    direction: Direction = "denoising",
    estimator: AtP | None = None,
    by_position: bool = False,
    only: dict[str, Any] | None = None,
    memory: int | None = None,
) -> xr.Dataset:
    """Estimates the effect of patching every edge: what one writer adds to the stream, in what one reader reads.

    Edge attribution patching (Syed et al. 2023, arXiv:2310.10348): (other − base) of the writer · the metric's gradient
    by what the reader reads, before its norm. Two forwards and one backward for all edges, in products of matrices.

    Writers are ``embed`` (what enters the first block, positions included), each head (``L3H4``, its ``head_out``) and
    each MLP (``MLP 3``; of a mixture, the sum of its experts). Readers are the query, key and value inputs of each head
    (``L3H4.q``, ``.k``, ``.v``; of grouped heads ``L3KV1.k``), each MLP (``MLP 3``) and the unembedding (``logits``).
    Where heads are not offered, attention as a whole writes, and reads, as ``L3 attention``; so does what stands in its
    place in other architectures. Over the readers of a writer, estimates sum to that of the writer by ``tp.attribute``;
    over the writers into a reader, to that of what it reads.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        metric: What is read, and differentiated. What one that reads an activation takes of the stream itself goes
            through no reader.
        direction: ``"denoising"``: gradients of the corrupted run, as what clean prompts write would be added to what
            is read in it; ``"noising"``: the other way round.
        estimator: ``tp.AtP()``, ``tp.RelP()`` or ``tp.IntegratedGradients(steps=…)``: along the inputs (EAP-IG, Hanna
            et al. 2024, arXiv:2403.17806) or, with ``along="layer"``, each writer along its own line, the heads of a
            layer together, so that edges sum to the writer's own integrated gradients. (The code of Hanna et al. gives
            every edge the mean over the lines of all writers.)
        by_position: Whether positions are kept; they are summed otherwise.
        only: ``{"writer": …, "reader": …, "pos": …}``: one or several names, or components for all who have them, as in
            ``{"writer": "head_out", "reader": ["logits", "MLP 2"]}``, and positions as in ``tp.patch``.
        memory: Bytes that may be taken; pairs are chunked accordingly. 1 GiB, or half of what an accelerator has.

    Returns:
        A dataset with the dims ``pair``, ``writer``, ``reader`` (``metric`` in front where there are several, ``pos``
        behind with ``by_position``). Variables as of ``tp.attribute``: ``estimate``, in the metric's unit,
        ``normalized``, ``base``, ``clean``, ``corrupted``, and ``status``, 0 with NaN where the reader is not
        downstream of the writer. Coordinates ``writer_component``, ``writer_layer`` and ``writer_head``, and the same
        of readers, say who it is; the head is -1 where there is none. ``attrs["post_norms"]`` says where heads write
        through a norm, whose scale is frozen at that of each run, and ``attrs["missing"]`` lists what writes or reads
        without a component of its own.

    Raises:
        RecipeError: The request contradicts itself, or the estimator is not for edges.
        SiteError: ``only`` names what does not exist.
        ComponentError: The stream is no sum of what is written to it, or was not proved to be.
    """
    require_ready(model)
    require_weights(model)
    base = base_of(direction)
    p, how = Patching(model, pairs, metric, memory=memory), estimator or AtP()
    if p.encoded.corrupted is None:
        raise RecipeError("These pairs have no corrupted prompts, so that nothing is written otherwise in another run.")
    if isinstance(how, AtPStar):
        raise RecipeError(
            "AtP* is of queries and keys that are patched themselves: tp.attribute(model, pairs, 'q', "
            "estimator=tp.AtPStar()). Of edges take tp.AtP(), tp.RelP() or tp.IntegratedGradients()."
        )
    if isinstance(how, IntegratedGradients):
        p.encoded.require_alike(f"{how.name} of edges", "Take tp.AtP() or tp.RelP(), or patch: tp.edge_rows.")
    if isinstance(how, IntegratedGradients) and how.along == "site":
        raise RecipeError("An edge is no site that moves: pass along='inputs', or along='layer' for each writer's own.")
    if isinstance(how, IntegratedGradients) and how.along == "inputs":
        require_movable(p.architecture)
    chosen = dict(only or {})
    if set(chosen) - {"writer", "reader", "pos"}:
        raise RecipeError(f"only takes 'writer', 'reader' and 'pos', not {', '.join(map(repr, chosen))}.")
    graph = graph_of(p.architecture)
    if p.encoded.mapped and "pos" in chosen:
        counted = select(chosen["pos"], "pos")
        if counted.items is None or min(counted.items) < 0:
            raise RecipeError("Where prompts are aligned, edges take positions of the base run, counted from 0.")
    where = {k: v for k, v in chosen.items() if k == "pos"}
    positions = p.ranges("resid_pre", (), where, getattr(p, base))["pos"]
    ends = graph.chosen("writer", chosen.get("writer")), graph.chosen("reader", chosen.get("reader"))
    request = {
        "direction": direction,
        "by_position": by_position,
        "only": {side: index if side != "pos" else as_json(index) for side, index in chosen.items()},
    }
    study = _Study(p, graph, *ends, how, base, positions if by_position else None, chosen.get("pos"), memory)
    return study.dataset(json.dumps(request, default=list))


def edge_rows(p: Recorder, edges: Sequence[Sequence[Any]], *, direction: Direction = "denoising") -> None:
    """Records the exact patch of each of some edges, as a row with the labels ``writer`` and ``reader``.

    Added to what the reader reads is what the writer writes in the other run beyond what it writes in the base::

        with tp.patching(model, pairs) as p:
            tp.edge_rows(p, [("L0H1", "L1H2.k"), ("MLP 0", "logits")])
        effects = p.run()

    Args:
        p: The recording.
        edges: ``(writer, reader)`` of each, by the names that ``tp.edges`` gives them, or ``(writer, reader, pos)``
            for one position, which is then a label too; where prompts are aligned, one of the base's, with its partner.
        direction: As in ``tp.edges``.

    Raises:
        RecipeError: Something is no edge.
        SiteError: There is no such writer, reader or position, or a reader comes before its writer.
        ComponentError: The stream is no sum of what is written to it.
    """
    base = base_of(direction)
    given = [tuple(edge) if isinstance(edge, (tuple, list)) else (edge,) for edge in edges]
    wrong = [edge for edge, parts in zip(edges, given, strict=True) if len(parts) not in (2, 3)]
    if wrong or not given:
        what = f"not {wrong[0]!r}" if wrong else "and there are none"
        raise RecipeError(f"edges are ('L0H1', 'MLP 2') or, at a position, ('L0H1', 'MLP 2', -1), {what}.")
    live, other = getattr(p, base), getattr(p, OTHER[base])
    ends = graph_of(p.architecture).ends([(parts[0], parts[1]) for parts in given])
    for (writer, reader), parts in zip(ends, given, strict=True):
        where = {"pos": parts[2]} if len(parts) == 3 else {}
        if where and p.encoded.mapped and where["pos"] >= 0:
            where = {"pos": p.aligned(where["pos"], of=live)}
        read, written = reader.index(where.get("pos", slice(None))), writer.index(where.get("pos", slice(None)))
        with p.row(writer=writer.name, reader=reader.name, **where):
            mine, others = (getattr(world, writer.component)[written] for world in (live, other))
            getattr(live, reader.component)[read] += others - mine


@dataclass(frozen=True)
class _Part:
    """The edges that one backward gives: from some writers to some readers, whole components of each.

    Attributes:
        name: What its run is called.
        keys: What is known of the writers, see ``slopes.Between``.
        writers: They.
        reading: What is read.
        readers: By whom.
        line: What moves, for integrated gradients.
    """

    name: str
    keys: tuple[Key, ...]
    writers: tuple[Node, ...]
    reading: tuple[Key, ...]
    readers: tuple[Node, ...]
    line: Key | None = None


@dataclass
class _Study:
    """One estimation: the runs it takes, and what they give."""

    p: Patching
    graph: Graph
    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    how: AtP
    base: WorldName
    labels: list[int] | None  # of positions, where they are kept
    pos: Any
    memory: int | None

    def __post_init__(self) -> None:
        p, how, self.other = self.p, self.how, OTHER[self.base]
        self.architecture, self.encoded = p.architecture, p.encoded
        self.slopes = Slopes(self.architecture, *held_of(how, self.architecture))
        self.along = how.along if isinstance(how, IntegratedGradients) else None
        self.parts = self._parts()
        compared = any(need in ("clean", "corrupted") for m in p.metrics for need in m.needs)
        worlds: list[WorldName] = ["clean", "corrupted"] if self.along or compared else [self.other]
        read = [self._canonical(key) for part in self.parts for key in part.reading]
        self.sides = Sides(p.model, self.architecture, self.encoded, p.metrics, worlds, (), read, self.memory)
        lead = len(p.metrics), len(self.encoded)
        self.values: dict[WorldName, NDArray[np.float64]] = {w: np.full(lead, np.nan) for w in ("clean", "corrupted")}
        sizes = [len(self.writers), len(self.readers), *([] if self.labels is None else [len(self.labels)])]
        self.estimates = np.full((*lead, *sizes), np.nan)

    def _parts(self) -> list[_Part]:
        """All edges at once, or those from one branch's writers after those from another's."""
        # Where a part of a component is wanted, all of it is computed.
        written, read = {node.key for node in self.writers}, {node.key for node in self.readers}
        writers = [node for node in self.graph.writers if node.key in written]
        readers = [node for node in self.graph.readers if node.key in read]
        if self.along != "layer":
            line = ("embed", 0) if self.along else None
            return [_part(self.base, writers, readers, line)]
        found = []
        for key in dict.fromkeys(node.key for node in writers):
            own = [node for node in writers if node.key == key]
            after = [node for node in readers if self.graph.joined(own[0], node)]
            line = ("attn_out", key[1]) if key[0] == "head_out" else key
            found += [_part(f"{self.base} {key}", own, after, line)] if after else []
        return found

    def _canonical(self, key: Key) -> Key:
        return canonical(Site(*key), len(self.architecture))

    def _at(self, length: int) -> tuple[int, ...] | None:
        """The positions of a prompt that count, in the order of their labels; ``None`` for all."""
        if self.labels is not None:
            return tuple(label % length for label in self.labels if -length <= label < length)
        return None if self.pos is None else select(self.pos, "pos").resolve(length) or ()

    # ------------------------------------------------------------------------------------------------ what is run

    def dataset(self, request: str) -> xr.Dataset:
        """Runs everything, and labels what it gives."""
        began = time.perf_counter()
        steps = self.how.steps if isinstance(self.how, IntegratedGradients) else 1
        # The changes of all writers are there at once, and the gradients of one component that reads at a time.
        kept = [node.key for part in self.parts for node in part.writers if not node.unit]
        first = {key[0]: self._canonical(key) for part in self.parts for key in part.reading}
        groups = self.sides.groups([*kept, *first.values()], steps)
        self.sides.take(groups, self._build, self._read, eager=self.slopes.eager)
        attrs = resting_on(
            self.p.model,
            self.encoded,
            self.p.metrics,
            self.how,
            base=self.base,
            written=self.other,
            component="edges",
            cost=self.sides.cost,
            request=request,
            seconds=time.perf_counter() - began,
        )
        attrs |= {"post_norms": self._post_norms(), "missing": json.dumps(self.graph.missing)}
        coords: dict[str, Any] = {} if self.labels is None else {"pos": self.labels}
        for side, nodes in (("writer", self.writers), ("reader", self.readers)):
            coords[side] = [node.name for node in nodes]
            coords[f"{side}_component"] = side, [node.component for node in nodes]
            coords[f"{side}_layer"] = side, [node.layer for node in nodes]
            coords[f"{side}_head"] = side, [-1 if node.unit is None else node.unit for node in nodes]
        given = self.p.metrics, self.architecture, self.encoded, attrs
        dims = ["writer", "reader", *([] if self.labels is None else ["pos"])]
        counted = self.base if self.encoded.mapped else ""
        return dataset_of(self.estimates, dims, coords, self.base, self.values, *given, counted)

    def _post_norms(self) -> str:
        layers = sorted({node.layer for node in self.writers if node.component == "head_out"})
        normed = [str(layer) for layer in layers if self.architecture.head_projection(layer).post_norm]
        if not normed:
            return ""
        return (
            f"heads of layers {', '.join(normed)} write through the norm behind their projection, its scale frozen at "
            "that of each run"
        )

    def _build(self, group: Group) -> list[Op]:
        sides = self.sides
        moved = {part.line for part in self.parts if part.line is not None}
        ops = sides.known(group, {*(key for part in self.parts for key in part.keys), *moved})
        for part in self.parts:
            between = self._between(group, part)
            ops.append(self._backward(group, part, between))
            kept = [("kept", ("edges", part.name, number)) for number in range(len(self.p.metrics))]
            ops.append((("contract", (*kept, ("drop", part.name))), None))
        return ops

    def _between(self, group: Group, part: _Part) -> Between:
        sides, at = self.sides, self._at(group.of(self.base).length)
        reader = {node.key: node for node in part.readers}
        upstream = [sum(self.graph.joined(writer, reader[key]) for writer in part.writers) for key in part.reading]
        return Between(
            writers=part.keys,
            readers=tuple(zip(map(self._canonical, part.reading), upstream, strict=True)),
            other=sides.where(group, self.other),
            here=None if part.line is None else sides.where(group, self.base),
            agreeing=sides.agreeing(group, self.base),
            at=None if at is None else torch.tensor(at, dtype=torch.long),
            by_position=self.labels is not None,
        )

    def _backward(self, group: Group, part: _Part, between: Between) -> Op:
        sides, how = self.sides, self.how
        given = group, part.name, self.slopes, ()
        if part.line is None or not isinstance(how, IntegratedGradients):
            return sides.backward(*given, edges=between)
        rows = [job for job in sides.unpatched(group, self.base) for _ in range(how.steps)]
        weights = torch.tensor(how.weights * len(group.pairs), dtype=torch.float64)
        line = part.line, between.other.repeat_interleave(how.steps), weights
        steps = how.steps, 1 / how.steps
        return sides.backward(*given, values=False, jobs=rows, line=line, steps=steps, edges=between)

    # ------------------------------------------------------------------------------------------------ what it gives

    def _read(self, group: Group, ops: list[Op], found: list[Any]) -> None:
        for job, values in self.sides.values(ops, found):
            self.values[job.base][:, job.pair] = values
        given = [results for (op, _), results in zip(ops, found, strict=True) if op[0] == "contract"]
        for part, results in zip(self.parts, given, strict=True):
            for number in range(len(self.p.metrics)):
                self._place(group, part, number, results[number].double().numpy())

    def _place(self, group: Group, part: _Part, number: int, array: NDArray[np.float64]) -> None:
        """Numbers ``[row, (pos), writer, reader]`` of a part, at their places; NaN where there is no such edge."""
        length, alone = group.of(self.base).length, self.sides.alone(group, self.base)
        if self.labels is None and self._at(length) == ():
            return
        writers, readers = ({node: i for i, node in enumerate(nodes)} for nodes in (part.writers, part.readers))
        starts = [(i, writers[node]) for i, node in enumerate(self.writers) if node in writers]
        ends = [(i, readers[node]) for i, node in enumerate(self.readers) if node in readers]
        here = array[..., [j for _, j in starts], :][..., [j for _, j in ends]]
        moments = [np.array([node.moment for node in nodes]) for nodes in (self.writers, self.readers)]
        joined = moments[0][[i for i, _ in starts], None] < moments[1][None, [j for j, _ in ends]]
        here = np.where(joined, here, np.nan)
        at: list[Any] = [[i for i, _ in starts], [j for j, _ in ends]]
        if self.labels is not None:
            here = np.moveaxis(here, 1, -1)
            at.append([i for i, label in enumerate(self.labels) if -length <= label < length])
        for row, pair in enumerate(group.pairs):
            own = here[row]
            if alone is not None and self.labels is not None:
                own = np.where(alone[row, [self.labels[i] % length for i in at[-1]]], np.nan, own)
            self.estimates[number, pair][np.ix_(*at)] = own


def _part(name: str, writers: Sequence[Node], readers: Sequence[Node], line: Key | None) -> _Part:
    known = (("z", node.layer) if node.component == "head_out" else node.key for node in writers)
    reading = tuple(dict.fromkeys(node.key for node in readers))
    return _Part(name, tuple(dict.fromkeys(known)), tuple(writers), reading, tuple(readers), line)
