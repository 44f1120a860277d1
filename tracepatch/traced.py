"""Traced runs: jobs as what ``trace.forward`` takes, and what it gives back as values of those jobs.

A flat run has a whole prompt for each job. A table's jobs share lanes, start where they first differ, and see what
stands before that in a cache of the worlds. What a metric is given does not depend on the form.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tracepatch import trace
from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.climb import entering, looked, standing, world_cells
from tracepatch.errors import MeasurementError
from tracepatch.firing import failure, listed, once, require_fired
from tracepatch.jobs import Job
from tracepatch.layout import Seats, at_reads, columns, read_columns, saved_at_reads, stops
from tracepatch.masks import positions
from tracepatch.metrics import Metric, columns_read
from tracepatch.models import Model, module_of
from tracepatch.plan import Group, Plan, Reading
from tracepatch.reach import scored_at
from tracepatch.shadows import shadow_columns
from tracepatch.sources import WorldName
from tracepatch.table import Run, Table
from tracepatch.tokens import EncodedPairs

NEEDS_ANSWER = ("answer", "wrong")


@dataclass(frozen=True)
class Outcome:
    """What a traced run gave.

    Attributes:
        scores: The metrics' values, ``[job, column]`` in float32.
        fired: Edits that were seen to fire.
        saved: (row, its save's number, pair) → the live value.
    """

    scores: torch.Tensor
    fired: int
    saved: dict[tuple[int, int, int], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """A traced run, ready to be made here or elsewhere, and what it takes to read what it gives.

    Attributes:
        group: Of the jobs.
        prompts: What is read of their prompts.
        jobs: What is measured.
        run: As ``trace.forward`` takes it.
        saving: For each value that is saved, the (job's number, its save's number) of its rows.
        wires: What it takes to wire the blocks of a packed table, see ``trace.wires``; nothing for other runs.
        ran: Layer → rows that traced tensors have there; -1 for the logits.
        once: Modules that must run once.
        places: The modules that are visited, in their order.
    """

    group: Group
    prompts: Reading
    jobs: tuple[Job, ...]
    run: tuple[Any, ...]
    saving: list[list[tuple[int, int]]]
    wires: tuple[Any, ...]
    ran: dict[int, int]
    once: frozenset[str]
    places: tuple[str, ...]


class Tracer:
    """Makes the calls of one plan, and reads what they give."""

    def __init__(
        self, model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, *, checks: bool = True
    ) -> None:
        self.architecture, self.encoded, self.plan, self.checks = architecture, encoded, plan, checks
        self.roots = {world.name: world.root for world in plan.edited}
        module: Any = module_of(model)
        head = module.get_submodule(architecture.unembed) if architecture.unembed else None
        self._linear = type(head) is nn.Linear
        self._positioned = "position_ids" in inspect.signature(module.forward).parameters

    def call(
        self,
        group: Group,
        jobs: Sequence[Job],
        metrics: Iterable[Metric],
        *,
        table: Table | None = None,
        keep: Sequence[tuple[str, int]] = (),
        keep_logits: bool = False,
        keep_past: bool = False,
        slopes: Mapping[Any, Any] | None = None,
    ) -> Call:
        """One traced run with a row a job, or with the jobs of a table.

        Args:
            group: Of the jobs.
            jobs: What is measured; all of a table's. Where a pair's prompts are not read alike, of one world's prompts.
            metrics: What is read.
            table: Where the jobs' tokens stand, if they are no whole prompts.
            keep: What of the worlds is kept, if this run computes them.
            keep_logits: Whether to keep the logits at the reads too.
            keep_past: Whether to keep the worlds' keys and values too.
            slopes: What a backward needs at the places; see ``slopes.Slopes``.
        """
        prompts, packed = group.of(self.root(jobs[0])), table if table is not None and table.form == "packed" else None
        seats = Seats(self.places(group), prompts.length, table)
        writes = columns(jobs, self.architecture, seats)
        reads, saving = read_columns(jobs)
        seen = looked(self.architecture, prompts.seen, jobs, table, seats.world_of, prompts.length)
        reads |= {key: (*reads.get(key, ()), *found) for key, found in seen.items()}
        shadows, count = shadow_columns(jobs, self.architecture, seats, first=len(jobs), reads=reads)
        logit_edits = tuple(
            at_reads(prompts.reads, w)
            for key, found in writes.items()
            if key[0] == "logits" and prompts.reads
            for w in found
        )
        elsewhere = {key: found for key, found in writes.items() if key[0] != "logits"}
        visited = stops(
            self.architecture, keep, elsewhere, shadows, reads, seats, prompts.reads, self.plan.until, slopes
        )
        saved_logits = tuple(
            saved_at_reads(prompts.reads, r) for key, found in reads.items() if key[0] == "logits" for r in found
        )
        rows = [*jobs, *[jobs[0]] * count]
        few = None if table is None or logit_edits or not prompts.reads else self._few(group)
        inputs, top = self._inputs(prompts.reads, rows, table)
        run = (
            inputs,
            visited,
            (*top, None if few is None else (self.architecture.unembed, few)),
            logit_edits,
            self.measures(metrics, group, rows, few),
            (keep_logits, saved_logits),
            self._past(jobs, table, seats, keep_past),
            None if packed is None else standing(packed),
            len(jobs) if table is None else None,  # without the shadows
        )
        return Call(
            group=group,
            prompts=prompts,
            jobs=tuple(jobs),
            run=run,
            saving=saving,
            wires=() if packed is None else self._wires(group, self.root(jobs[0]), packed.end),
            ran={layer: seats.lanes(layer, len(rows)) for layer in range(len(self.architecture) + 1)} | {-1: len(rows)},
            once=frozenset(once(visited, self.architecture)) if self.checks else frozenset(),
            places=tuple(path for (path, *_), _ in visited) or tuple(s.path for s in self.architecture.layers),
        )

    def side(self, job: Job) -> Side:
        """The positions of a run's prompt."""
        return self.encoded.alignments[job.pair].side(self.root(job))

    def outcome(self, call: Call, scores: torch.Tensor, told: dict[Any, Any]) -> Outcome:
        """What a traced run gave, as ``program.operate`` returned it.

        Raises:
            MeasurementError: An edit did not fire.
        """
        saved = {
            (call.jobs[number].row, save, call.jobs[number].pair): live
            for n, whose in enumerate(call.saving)
            for (number, save), live in zip(whose, told["save", n], strict=True)
        }
        fired = require_fired(self.plan.rows, call.prompts.reads, call.jobs, told, call.ran) if self.checks else 0
        return Outcome(scores, fired if call.jobs[-1].row >= 0 else 0, saved)

    def failed(self, call: Call, error: Exception, op: tuple[Any, ...]) -> MeasurementError:
        """An error of a traced run in words: where, for which rows, and what to do."""
        if op[0] == "add":
            return MeasurementError(failure(error, call.places, f"  prompts of {op[1]}", len(op[3])))
        of = listed(self.plan.rows, [job for job in call.jobs if job.writes]) or "  the unpatched runs"
        return MeasurementError(failure(error, call.places, of, call.ran[-1]))

    def order(self, group: Group) -> list[Run]:
        """The runs whose values are kept, as they stand in what is known."""
        pristine = [(pair, world) for pair in group.pairs for world in self.plan.worlds]
        return pristine + [(job.pair, job.base) for world in group.edited for job in world]

    @property
    def pristine(self) -> tuple[WorldName, ...]:
        """The worlds of the pairs' own prompts."""
        return ("clean",) if self.encoded.corrupted is None else ("clean", "corrupted")

    def places(self, group: Group) -> dict[Run, int]:
        """Where the values of each pair's worlds stand in what is known: of a reference world, in its own tables."""
        found = {run: i for i, run in enumerate(self.order(group))}
        worlds = [survey.world for survey in self.plan.surveys]
        return found | {(pair, world.name): world.row_of[pair] for pair in group.pairs for world in worlds}

    def root(self, job: Job) -> WorldName:
        """The pristine world whose prompts a run has."""
        return self.roots.get(job.base, job.base)

    def named(self, rows: Sequence[Job]) -> dict[str, torch.Tensor]:
        """The prompts of these runs as arguments of a forward."""
        ids = torch.tensor([self.encoded.world(self.root(row))[row.pair] for row in rows])
        if not self.encoded.encoder:
            return trace.named(ids)
        read = [self.encoded.encoded(self.root(row), row.pair) for row in rows]
        return trace.named(ids, torch.tensor(read))

    def alike(self, group: Group, job: Job) -> tuple[int, ...]:
        """What runs of worlds must agree in to share a forward: the prompt's length, and what is read of it."""
        root = self.root(job)
        return len(self.encoded.encoded(root, job.pair)), group.corrupted is not None and root == "corrupted"

    def joined(
        self, group: Group, jobs: Sequence[Job], late: Sequence[Metric], edits_logits: bool = False
    ) -> tuple[Any, ...]:
        """Where the logits of worlds stand that were kept, how long a prompt is, and metrics that compare them."""
        if group.corrupted is None:
            measures = self.measures(late, group, jobs)
            return torch.tensor(group.reads), group.length * edits_logits, ((None, measures),)
        prompts = [group.of(self.root(job)) for job in jobs]
        longest, most = max(group.length, group.corrupted.length), max(len(p.reads) for p in prompts)
        # Beyond its last read a world's logits stand behind the prompt.
        reads = torch.tensor([[*p.reads, *[longest] * (most - len(p.reads))] for p in prompts])
        blocks = []
        for which in (group.of("clean"), group.corrupted):
            rows = [i for i, p in enumerate(prompts) if p == which]
            if rows:
                blocks.append((torch.tensor(rows), self.measures(late, group, [jobs[i] for i in rows])))
        return reads, longest * edits_logits, tuple(blocks)

    # ------------------------------------------------------------------------------------------------ of a table

    def _inputs(
        self, read: tuple[int, ...], rows: Sequence[Job], table: Table | None
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """What the forward takes, and how its logits become ``[row, read, vocab]``."""
        reads = torch.tensor(read or (0,))
        if table is None:
            top = ("kept",) if self.architecture.keeps_logits else ("of", reads)
            keep = {"logits_to_keep": reads} if self.architecture.keeps_logits else {}
            return {**self.named(rows), **keep}, top if read else ("none",)
        if table.worlds:  # one by one, so that a table of any shape may leave at the top
            ids = torch.zeros(entering(table), dtype=torch.long)
            for (lane, slot), job in zip(table.seats[: table.worlds], table.jobs, strict=False):
                found = self.encoded.world(job.base)[job.pair][job.start : table.end]
                ids[lane, slot : slot + len(found)] = torch.tensor(found, dtype=torch.long)
            at = positions(standing(table))[: ids.shape[0], : ids.shape[1]]
            ids, at = ids.reshape(-1, 1), at.reshape(-1, 1)
        else:
            first = table.jobs[0]
            last = table.prefix + 1 if table.form == "packed" else table.end
            ids = torch.tensor([self.encoded.world(self.root(first))[first.pair][table.prefix : last]])
            at = torch.arange(table.prefix, last)[None]
        inputs = {"input_ids": ids}
        if self._positioned:
            inputs["position_ids"] = at
        return inputs, ("each", len(reads)) if read else ("none",)

    def _past(self, jobs: Sequence[Job], table: Table | None, seats: Seats, keep: bool) -> tuple[Any, ...] | None:
        """What a run keeps of keys and values, or takes of them."""
        depth = min(self.plan.until, len(self.architecture))
        if keep:
            runs = {(job.pair, job.base): job for job in (jobs if table is None else table.jobs[: table.worlds])}
            alone = self.named(sorted(runs.values(), key=lambda job: seats.world_of[job.pair, job.base]))
            less = {"logits_to_keep": 1} if self.architecture.keeps_logits else {}
            cells = None if table is None else world_cells(table, seats.world_of, "keys")
            # What edits do to the keys is not in a forward of the worlds alone.
            return "keep", depth, cells, None if any(job.writes for job in runs.values()) else alone | less
        if table is None or not table.prefix:
            return None
        worlds = torch.tensor([seats.world_of[run] for run in table.lanes])
        # A model asks its first layers how many tokens there are before it.
        return "take", tuple(worlds[: max(1, table.shape[layer][0])] for layer in range(depth)), table.prefix

    def _wires(self, group: Group, root: WorldName, end: int) -> tuple[Any, ...]:
        """The paths of the blocks, whether they give tuples, the unembedding, and a prompt of a table's length."""
        layers, world = self.architecture.layers, "clean" if group.corrupted is None else root
        ids = self.named([Job(-1, group.pairs[0], world, (), 0, 0)])["input_ids"][:, :end]
        return tuple(layer.path for layer in layers), layers[0].post.key is not None, self.architecture.unembed, ids

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
        few: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """For each metric: its function, which of the reads it takes, what it needs of the pairs, and its columns.

        The rows are of one length, and read at the same positions.

        Args:
            metrics: What is read.
            group: Of the rows.
            rows: What is measured.
            few: The only vocabulary columns that are computed, sorted; all otherwise.
        """
        root, names, side = self.root(rows[0]), [m.name for m in self.plan.metrics], self.side(rows[0])
        place, numbers = ({x: i for i, x in enumerate(of)} for of in (group.of(root).reads, names))
        found: list[tuple[Any, ...]] = []
        for metric in metrics:
            if metric.site is not None:
                given = {need: self._given(need, metric, group, rows) for need in metric.needs}
                found.append((metric.function, ("metric", numbers[metric.name]), given, None))
                continue
            at = torch.tensor([place[p] for p in scored_at(metric, side) or ()])
            given = {need: self._given(need, metric, group, rows) for need in metric.needs}
            picked = None
            if few is not None:  # ids become places among the columns
                given = {n: torch.where(v < 0, v, torch.searchsorted(few, v.clamp(min=0))) for n, v in given.items()}
            if isinstance(metric.vocab, tuple):
                picked = torch.tensor(metric.vocab)
                picked = picked if few is None else torch.searchsorted(few, picked)
            found.append((metric.function, at, given, picked))
        return tuple(found)

    def _answer(self, pair: int) -> tuple[int, ...]:
        """An answer of several tokens, of which all but the last stand at the end of the prompts."""
        ids, appended = self.encoded.clean[pair], self.encoded.appended[pair]
        return (*ids[len(ids) - appended :], *self.encoded.answer[pair])

    def _given(self, need: str, metric: Metric, group: Group, rows: Sequence[Job]) -> Any:
        """A tensor, or which worlds' log-probabilities, and at which of their reads; see ``trace.needs``."""
        if need in NEEDS_ANSWER:
            ids = [getattr(self.encoded, need)[row.pair] for row in rows]
            widest = max(len(i) for i in ids)
            return torch.tensor([[*i, *[-1] * (widest - len(i))] for i in ids])
        if need == "tokens":
            return torch.tensor([self.encoded.world(self.root(row))[row.pair] for row in rows])
        if need == "continuation":
            wide = len(scored_at(metric, self.side(rows[0])) or ())
            answers = [self._answer(row.pair) for row in rows]
            return torch.tensor([(-1,) * (wide - len(ids)) + ids for ids in answers])
        if need == "direct":
            worlds, count = self.pristine, len(self.encoded)
            places = [worlds.index(self.root(row)) * count + row.pair for row in rows]
            return "known", direct_key(metric), torch.tensor(places)
        if need == "next":
            side = self.side(rows[0])
            read, world = scored_at(metric, side) or (), side.world
            return torch.tensor([[self.encoded.following(row.pair, world, p) or 0 for p in read] for row in rows])
        order = {run: i for i, run in enumerate(self.order(group))}
        other = self.encoded.alignments[rows[0].pair].side(need)
        place = {p: i for i, p in enumerate(group.of(need).reads)}
        at = torch.tensor([place[p] for p in scored_at(metric, other) or ()])
        return "reference", torch.tensor([order[row.pair, need] for row in rows]), at


def direct_key(metric: Metric) -> tuple[str, ...]:
    """What the directions of a metric's position are known by."""
    assert metric.site is not None
    return "tally", "direct", str(metric.site.pos)
