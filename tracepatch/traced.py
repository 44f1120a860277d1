"""One traced run: jobs as what ``trace.forward`` takes, and what it gives back as values of those jobs.

A flat run has a whole prompt for each job. A table's jobs share lanes, start where they first differ, and see what
stands before that in a cache of the worlds. What a metric is given does not depend on the form.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tracepatch import trace
from tracepatch.architecture import Architecture
from tracepatch.climb import entering, world_cells
from tracepatch.errors import MeasurementError, TracepatchError
from tracepatch.firing import each_once, failure, named, once, require_fired
from tracepatch.jobs import Job
from tracepatch.layout import Seats, at_reads, columns, read_columns, saved_at_reads, stops
from tracepatch.masks import Wires, positions, wired
from tracepatch.metrics import Metric, columns_read
from tracepatch.models import Model, module_of, remote_of
from tracepatch.plan import Group, Plan
from tracepatch.shadows import shadow_columns
from tracepatch.sources import WorldName
from tracepatch.table import Run, Table
from tracepatch.tokens import EncodedPairs

NEEDS_ANSWER = ("answer", "wrong")


@dataclass(frozen=True)
class Outcome:
    """What a traced run gave.

    Attributes:
        kept: Values of worlds, ``(component, layer)`` → ``[world, pos, …]``.
        scores: The metrics' values, ``[job, column]`` in float32.
        fired: Edits that were seen to fire.
        saved: (row, its save's number, pair) → the live value.
    """

    kept: dict[Any, torch.Tensor]
    scores: torch.Tensor
    fired: int
    saved: dict[tuple[int, int, int], torch.Tensor]


class Tracer:
    """Makes traced runs of one plan."""

    def __init__(
        self, model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, *, checks: bool = True
    ) -> None:
        self.model, self.architecture, self.encoded, self.plan, self.checks = model, architecture, encoded, plan, checks
        self.roots = {world.name: world.root for world in plan.edited}
        module: Any = module_of(model)
        device = module.get_input_embeddings().weight.device
        self.device = torch.device("cpu") if device.type == "meta" else device  # a server moves what it is sent
        head = module.get_submodule(architecture.unembed) if architecture.unembed else None
        self._linear = type(head) is nn.Linear
        self._positioned = "position_ids" in inspect.signature(module.forward).parameters
        self._wires: dict[int, Wires] = {}

    def run(
        self,
        group: Group,
        jobs: Sequence[Job],
        known: dict[Any, torch.Tensor],
        metrics: Iterable[Metric],
        *,
        table: Table | None = None,
        keep: Sequence[tuple[str, int]] = (),
        keep_logits: bool = False,
        keep_past: bool = False,
    ) -> Outcome:
        """One traced run with a row a job, or with the jobs of a table.

        Args:
            group: Of the jobs.
            jobs: What is measured; all of a table's.
            known: What was kept of the worlds.
            metrics: What is read.
            table: Where the jobs' tokens stand, if they are no whole prompts.
            keep: What of the worlds is kept, if this run computes them.
            keep_logits: Whether to keep the logits at the reads too.
            keep_past: Whether to keep the worlds' keys and values too.
        """
        seats = Seats({run: i for i, run in enumerate(self.order(group))}, group.length, table)
        writes = columns(jobs, self.architecture, seats)
        reads, saving = read_columns(jobs)
        shadows, count = shadow_columns(jobs, self.architecture, seats, first=len(jobs), reads=reads)
        logit_edits = tuple(
            at_reads(group.reads, w) for key, found in writes.items() if key[0] == "logits" for w in found
        )
        elsewhere = {key: found for key, found in writes.items() if key[0] != "logits"}
        wires = self._wired(group, table, rows=jobs)
        visited = stops(self.architecture, keep, elsewhere, shadows, reads, seats, group.reads, wires)
        saved_logits = tuple(
            saved_at_reads(group.reads, r) for key, found in reads.items() if key[0] == "logits" for r in found
        )
        rows = [*jobs, *[jobs[0]] * count]
        few = None if table is None or logit_edits else self._few(group)
        measures = self.measures(metrics, group, rows, known, few)
        inputs, top = self._inputs(group, rows, table)
        narrowed = (*top, None if few is None else (self.architecture.unembed, few))
        past = self._past(table, seats, keep_past)
        counted = once(visited, self.architecture) if self.checks and not remote_of(self.model) else ()
        given = (inputs, visited, known, narrowed, logit_edits, measures, (keep_logits, saved_logits), past)
        try:
            with each_once(module_of(self.model), counted):
                kept, scores = trace.forward(self.model, *given, remote_of(self.model))
        except TracepatchError:
            raise
        except Exception as error:
            of = named(self.plan.rows, [row for row in rows if row.writes]) or "  the unpatched runs"
            where = [path for (path, *_), _ in visited]
            raise MeasurementError(failure(error, where, of, len(rows))) from error
        gc.collect()  # a trace ends as a circle, with every activation of its run in it
        saved = {
            (jobs[number].row, save, jobs[number].pair): live
            for n, whose in enumerate(saving)
            for (number, save), live in zip(whose, kept["save", n], strict=True)
        }
        fired = 0
        if self.checks:
            ran = {layer: seats.lanes(layer, len(rows)) for layer in range(len(self.architecture) + 1)}
            fired = require_fired(self.plan.rows, group, jobs, kept, ran | {-1: len(rows)})
        own = {key: value for key, value in kept.items() if key[0] not in ("save", "fired")}
        if table is None:  # without the shadows
            own = {key: value[: len(jobs)] for key, value in own.items()}
        return Outcome(own, scores[: len(jobs)], fired if jobs[-1].row >= 0 else 0, saved)

    def order(self, group: Group) -> list[Run]:
        """The runs whose values are kept, as they stand in what is known."""
        pristine = [(pair, world) for pair in group.pairs for world in self.plan.worlds]
        return pristine + [(job.pair, job.base) for world in group.edited for job in world]

    def root(self, job: Job) -> WorldName:
        """The pristine world whose prompts a run has."""
        return self.roots.get(job.base, job.base)

    def named(self, rows: Sequence[Job]) -> dict[str, torch.Tensor]:
        """The prompts of these runs as arguments of a forward."""
        ids = torch.tensor([self.encoded.world(self.root(row))[row.pair] for row in rows], device=self.device)
        if not self.encoded.encoder:
            return trace.named(ids)
        read = [self.encoded.encoded(self.root(row), row.pair) for row in rows]
        return trace.named(ids, torch.tensor(read, device=self.device))

    # ------------------------------------------------------------------------------------------------ of a table

    def _inputs(self, group: Group, rows: Sequence[Job], table: Table | None) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """What the forward takes, and how its logits become ``[row, read, vocab]``."""
        reads = torch.tensor(group.reads)
        if table is None:
            if self.architecture.keeps_logits:
                return {**self.named(rows), "logits_to_keep": reads.to(self.device)}, ("kept",)
            return self.named(rows), ("of", reads)
        if table.worlds:  # one by one, so that a table of any shape may leave at the top
            ids = torch.zeros(entering(table), dtype=torch.long)
            for (lane, slot), job in zip(table.seats[: table.worlds], table.jobs, strict=False):
                found = self.encoded.world(job.base)[job.pair][job.start : table.end]
                ids[lane, slot : slot + len(found)] = torch.tensor(found, dtype=torch.long)
            at = positions(table)[: ids.shape[0], : ids.shape[1]]
            ids, at = ids.reshape(-1, 1), at.reshape(-1, 1)
        else:
            first = table.jobs[0]
            last = table.prefix + 1 if table.form == "packed" else table.end
            ids = torch.tensor([self.encoded.world(self.root(first))[first.pair][table.prefix : last]])
            at = torch.arange(table.prefix, last)[None]
        inputs = {"input_ids": ids.to(self.device)}
        if self._positioned:
            inputs["position_ids"] = at.to(self.device)
        return inputs, ("each", len(reads))

    def _past(self, table: Table | None, seats: Seats, keep: bool) -> tuple[Any, ...] | None:
        """What a run keeps of keys and values, or takes of them."""
        depth = len(self.architecture)
        if keep and table is None:
            return "keep", depth, None
        if keep and table is not None:
            return "keep", depth, world_cells(table, seats.world_of, "keys")
        if table is None or not table.prefix:
            return None
        worlds = torch.tensor([seats.world_of[run] for run in table.lanes])
        # A model asks its first layers how many tokens there are before it.
        return "take", tuple(worlds[: max(1, table.shape[layer][0])] for layer in range(depth)), table.prefix

    def _wired(self, group: Group, table: Table | None, rows: Sequence[Job]) -> dict[int, dict[Any, Any]] | None:
        """What the blocks of a packed table take from outside."""
        if table is None or table.form != "packed":
            return None
        try:
            wires = self._wiring(group, table.end)
        except Exception as error:
            paths = [layer.path for layer in self.architecture.layers]
            raise MeasurementError(failure(error, paths, "  the unpatched runs", len(rows))) from error
        return wired(table, wires, self.device)

    def _wiring(self, group: Group, end: int) -> Wires:
        """What the model hands to its blocks for a prompt of this length."""
        if end not in self._wires:
            job = Job(-1, group.pairs[0], "clean", (), 0, 0)
            ids = self.named([job])["input_ids"][:, :end]
            layers = self.architecture.layers
            found = trace.wiring(
                self.model,
                [layer.path for layer in layers],
                layers[0].post.key is not None,
                self.architecture.unembed,
                {"input_ids": ids},
            )
            self._wires[end] = tuple(found)
        return self._wires[end]

    # ------------------------------------------------------------------------------------------------ of the metrics

    def _few(self, group: Group) -> torch.Tensor | None:
        """The only vocabulary columns that are computed; ``None`` for all."""
        found = columns_read(self.plan.metrics, self.encoded, group.pairs, self.architecture.vocab)
        return torch.tensor(found) if found is not None and self._linear else None

    def measures(
        self,
        metrics: Iterable[Metric],
        group: Group,
        rows: Sequence[Job],
        known: dict[Any, torch.Tensor],
        few: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """For each metric: its function, which of the reads it takes, what it needs of the pairs, and its columns.

        Args:
            metrics: What is read.
            group: Of the rows.
            rows: What is measured.
            known: What was kept of the worlds.
            few: The only vocabulary columns that are computed, sorted; all otherwise.
        """
        place = {p: i for i, p in enumerate(group.reads)}
        found = []
        for metric in metrics:
            at = torch.tensor([place[p] for p in metric.positions.resolve(group.length) or ()])
            given = {need: self._given(need, metric, at, group, rows, known) for need in metric.needs}
            picked = None
            if few is not None:  # ids become places among the columns
                given = {n: torch.where(v < 0, v, torch.searchsorted(few, v.clamp(min=0))) for n, v in given.items()}
            if isinstance(metric.vocab, tuple):
                picked = torch.tensor(metric.vocab)
                picked = picked if few is None else torch.searchsorted(few, picked)
            found.append((metric.function, at, given, picked))
        return tuple(found)

    def _given(
        self,
        need: str,
        metric: Metric,
        at: torch.Tensor,
        group: Group,
        rows: Sequence[Job],
        known: dict[Any, torch.Tensor],
    ) -> torch.Tensor:
        if need in NEEDS_ANSWER:
            ids = [getattr(self.encoded, need)[row.pair] for row in rows]
            widest = max(len(i) for i in ids)
            return torch.tensor([[*i, *[-1] * (widest - len(i))] for i in ids])
        if need == "next":
            read = metric.positions.resolve(group.length) or ()
            follow = []
            for row in rows:
                ids_after = (*self.encoded.clean[row.pair][1:], *(self.encoded.answer[row.pair][:1] or (0,)))
                follow.append([ids_after[p] for p in read])
            return torch.tensor(follow)
        order = {run: i for i, run in enumerate(self.order(group))}
        reference = known["reference", 0]
        index = torch.tensor([order[row.pair, need] for row in rows], device=reference.device)
        return reference[index][:, at.to(reference.device)]
