"""Running a plan: worlds first, then the batches, with every number checked before it is kept.

What is run, and what is made of the numbers, is the same wherever it runs; a ``steps.Runner`` takes the steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, listing
from tracepatch.jobs import Job, order_of, parts, unpatched
from tracepatch.journal import Journal, Measured
from tracepatch.models import Model, remote_of
from tracepatch.packing import divided, halves
from tracepatch.plan import Batch, Group, Plan, Proof
from tracepatch.remote import There
from tracepatch.sources import WorldName
from tracepatch.steps import Here, Runner, Step, Taken
from tracepatch.surveying import surveyed
from tracepatch.tokens import EncodedPairs
from tracepatch.traced import Call, Tracer

STEADY = 8  # times the last bit, or the drift of the unpatched witness, that a row without effect may be off


def run(
    model: Model,
    architecture: Architecture,
    encoded: EncodedPairs,
    plan: Plan,
    advance: Callable[[int], None] | None = None,
    *,
    checks: bool = True,
    journal: Journal | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Measured:
    """Executes a plan in this process, or on the server that the model was loaded for.

    Args:
        model: What is patched.
        architecture: Of the model.
        encoded: The pairs the plan was made for.
        plan: What to trace.
        advance: Called with the number of rows done after each traced run.
        checks: Whether every edit must be seen to fire, and the plan's sample is measured once more.
        journal: What is finished already, and where what gets finished is kept.
        say: Called with a few words on how a request stands, while the server is waited for.

    Raises:
        MeasurementError: A number came out NaN or inf, an edit never fired, or a forward failed; the rows are named.
        ServerError: The server cannot be reached, or does not do what it is asked.
    """
    ready = journal or Journal(plan)
    return _Run(model, architecture, encoded, plan, advance or (lambda done: None), checks, ready, say).whole()


def so_far(model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, journal: Journal) -> Measured:
    """What a journal holds of a plan, without running anything: NaN where nothing was measured yet."""
    return _Run(model, architecture, encoded, plan, lambda done: None, False, journal).known()


class _Run:
    """One execution of one plan."""

    def __init__(
        self,
        model: Model,
        architecture: Architecture,
        encoded: EncodedPairs,
        plan: Plan,
        advance: Callable[[int], None],
        checks: bool,
        journal: Journal,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.model, self.encoded, self.plan, self.advance = model, encoded, plan, advance
        self.checks, self.journal = checks, journal
        self.tracer = Tracer(model, architecture, encoded, plan, checks=checks)
        self.columns = tuple((m.name, part) for m in plan.metrics for part in ("", *m.parts))
        self.metric_of = [[i for i, (m, _) in enumerate(self.columns) if m == name] for name, _ in self.columns]
        self.values = np.full((len(plan.rows), plan.pairs, len(self.columns)), np.nan)
        self.baselines: dict[WorldName, NDArray[np.float64]] = {
            world: np.full((plan.pairs, len(self.columns)), np.nan)
            for world in (*plan.worlds, *(world.name for world in plan.edited))
        }
        self.noise = np.zeros(len(self.columns))
        self.still = np.zeros((len(plan.rows), plan.pairs), bool)
        self.fired = 0
        self.saved: dict[tuple[int, int, int], torch.Tensor] = {}
        self.again: tuple[NDArray[np.float64], ...] = ()
        here = not remote_of(model)
        self.runner: Runner = Here(model, architecture, plan.eager) if here else There(model, plan.eager, say)

    def whole(self) -> Measured:
        """Everything the plan asks for."""
        began = time.perf_counter()
        with self.runner.ready():
            self.runner.go(found for group in self.plan.groups if (found := self._group(group)) is not None)
        return self._measured(time.perf_counter() - began)

    def known(self) -> Measured:
        """What the journal has of it."""
        for group in self.plan.groups:
            self.journal.todo(self, group)
        return self._measured(0.0)

    def _group(self, group: Group) -> tuple[Step, Iterable[Step]] | None:
        """What is not finished of a group, and what makes its worlds known before; ``None`` if all is."""
        todo = self.journal.todo(self, group)
        sampled = self.checks and self.journal.checks is None and self.plan.sample
        again = bool(sampled and self.plan.sample[0].pair in group.pairs)
        if not (todo or again or self.journal.needs_worlds(group)):
            return None
        riding = group.batches[0] if group.rides else None
        if riding is None:
            lead = self._worlds(group, partial(self._known_worlds, group), self.journal.at_once(group))
        elif riding in todo:
            lead = self._batch(group, riding, partial(self._finished, group, riding))
        else:  # for its worlds, which must round as they did before
            lead = self._batch(group, riding, partial(self._once_more, group), self.journal.runs(riding))
        rest = (batch for batch in todo if batch is not riding)
        steps = (self._batch(group, batch, partial(self._finished, group, batch)) for batch in rest)
        return lead, itertools.chain(steps, [self._again(group)] if again else [])

    def _measured(self, seconds: float) -> Measured:
        self._fill()
        return Measured(
            self.columns,
            self.values,
            self.baselines,
            self.noise,
            seconds,
            self.still,
            self.fired,
            self.saved,
            self.again,
            self.runner.ran,
            self.runner.forwards,
            self.runner.peak,
        )

    # --------------------------------------------------------------------------------------------- what is to be done

    def _worlds(self, group: Group, digest: Callable[[list[Taken]], None], at_once: int = 0) -> Step:
        """Runs the worlds of a group, edited ones last; their baselines, and the values that edits will write.

        A run has so many prompts at once, or as many as the budget has room for.
        """
        needed = sorted(group.needed)
        edits_logits = ("logits", 0) in needed
        late = [m for m in self.plan.metrics if m.compares]  # a divergence needs the clean logits first
        direct = [m for m in self.plan.metrics if not m.compares]
        most = at_once or max(1, int(self.plan.budget // 2 // max(1, self.plan.row_bytes)))
        ops: list[tuple[tuple[Any, ...], Call | None]] = [(op, None) for op in surveyed(self.tracer)]
        largest = 0
        for jobs in group.stages(self.plan.worlds):
            split = parts(jobs, partial(self.tracer.alike, group), most)
            largest = max(largest, *map(len, split))
            for part in split:
                call = self.tracer.call(
                    group, part, direct, keep=needed, keep_logits=bool(late) or edits_logits, keep_past=group.cached
                )
                ops.append((("run", call.run, "piece"), call))
            order = order_of(jobs, split)
            joined = self.tracer.joined(group, jobs, late, edits_logits)
            ops.append((("join", None if order is None else torch.tensor(order), *joined), None))

        def smaller() -> list[Step]:
            return [self._worlds(group, digest, largest // 2)] if largest > 1 else []

        return Step(tuple(ops), partial(self._failed, ops), digest, smaller, at_once=at_once)

    def _batch(
        self, group: Group, batch: Batch, digest: Callable[[list[Taken]], None], runs: Sequence[int] = ()
    ) -> Step:
        """One traced run: an unpatched witness in front, then the rows; the worlds before, where they ride in it.

        Or several, of so many rows each, as an earlier run of this batch had to be divided.
        """
        raw = self.plan.rows[batch.jobs[0].row].raw if batch.jobs else None
        if raw is not None:
            return self._raw(group, batch, raw, digest)
        table = batch.table
        if table is not None:
            everyone: tuple[Job, ...] = table.jobs
        else:
            base, pair = batch.jobs[0].base, batch.jobs[0].pair
            edited = (job for world in group.edited for job in world if (job.base, job.pair) == (base, pair))
            everyone = (next(edited, unpatched(pair, base)), *batch.jobs)
        rides = batch.computes_worlds
        keep = sorted(group.needed) if rides else ()
        call = self.tracer.call(
            group, everyone, self.plan.metrics, table=table, keep=keep, keep_past=rides and group.cached
        )

        def as_parts(several: Iterable[Batch]) -> list[Step]:
            return [self._batch(group, part, digest) for part in several]

        def smaller() -> list[Step]:
            return as_parts(halves(batch)) if len(batch.jobs) > 1 else []

        before = [*(surveyed(self.tracer) if rides else ()), *([("wires", *call.wires)] if call.wires else ())]
        ops = [*[(op, None) for op in before], (("run", call.run, "worlds" if rides else ""), call)]
        instead = tuple(as_parts(divided(batch, runs))) if len(runs) > 1 else ()
        return Step(tuple(ops), partial(self._failed, ops), digest, smaller, batch, instead=instead)

    def _raw(
        self, group: Group, batch: Batch, function: Callable[[Any], Any], digest: Callable[[list[Taken]], None]
    ) -> Step:
        """A row's raw trace, and before it the same run without it: what they differ by is what the row did."""
        (job,) = batch.jobs
        reads = torch.tensor(group.of(self.tracer.root(job)).reads)
        given = reads, self.tracer.measures(self.plan.metrics, group, [job])
        ops = tuple(((("raw", self.tracer.named([job]), act, *given)), None) for act in (None, function))

        def failed(number: int, error: Exception) -> MeasurementError:
            what = "the function failed inside the trace" if number else "the run without the function failed"
            return MeasurementError(
                f"pair {job.pair}, {self.plan.rows[job.row]}: {what} ({type(error).__name__}). Its own error is above."
            )

        return Step(ops, failed, digest, batch=batch)

    def _again(self, group: Group) -> Step:
        """Measures the plan's sample as whole prompts, without a cache, in a run of its own."""
        call = self.tracer.call(group, self.plan.sample, self.plan.metrics)
        ops = [(("run", call.run, ""), call)]

        def digest(taken: list[Taken]) -> None:
            ((_, found),) = taken
            self.again = tuple(self.tracer.outcome(call, *found[0]).scores.double().numpy())

        return Step(tuple(ops), partial(self._failed, ops), digest)

    def _failed(self, ops: Sequence[tuple[Any, Call | None]], number: int, error: Exception) -> MeasurementError:
        before, after = reversed(ops[: number + 1]), ops[number:]
        call = next(call for _, call in itertools.chain(before, after) if call is not None)
        return self.tracer.failed(call, error, ops[number][0])

    # --------------------------------------------------------------------------------------------- what came of it

    def _known_worlds(self, group: Group, taken: list[Taken]) -> None:
        """Reads the baselines, and keeps them."""
        self._read_worlds(group, taken)
        ((step, _),) = taken
        self.journal.worlds(self, group, step.at_once)

    def _finished(self, group: Group, batch: Batch, taken: list[Taken]) -> None:
        """Reads a batch that was run for its rows, and keeps what it gave."""
        with self.journal.batch(self, batch, [step.rows for step, _ in taken]):
            self._read(group, taken)
        if batch.computes_worlds:
            self.journal.worlds(self, group)
        self.advance(len(batch.jobs))

    def _once_more(self, group: Group, taken: list[Taken]) -> None:
        """Reads a batch that was finished before and is run for its worlds."""
        fired = self.fired
        self._read(group, taken)
        self.fired = fired
        self.journal.worlds(self, group)

    def _read_worlds(self, group: Group, taken: list[Taken]) -> None:
        ((step, found),) = taken
        scores: list[torch.Tensor] = []
        stages = iter(group.stages(self.plan.worlds))
        for (op, call), given in zip(step.ops, found, strict=True):
            if call is not None:
                scores.append(self.tracer.outcome(call, *given).scores)
            if op[0] != "join":
                continue
            order = op[1]
            together = torch.cat(scores) if order is None else torch.cat(scores)[order]
            self._baselines(next(stages), together, given)
            scores = []

    def _baselines(self, jobs: Sequence[Job], direct: torch.Tensor, late: torch.Tensor) -> None:
        """Puts down the values of worlds: of metrics read in their runs, and of those that compare with them."""
        found, taken = [], [0, 0]
        for metric in self.plan.metrics:
            which, width = int(metric.compares), 1 + len(metric.parts)
            found.append((direct, late)[which][:, taken[which] : taken[which] + width])
            taken[which] += width
        values = torch.cat(found, 1).double().numpy()
        bad = [
            f"pair {job.pair}, {job.base} run: {self._describe(v)}"
            for job, v in zip(jobs, values, strict=True)
            if not np.isfinite(v).all()
        ]
        if bad:
            edited = any(job.writes for job in jobs)
            raise MeasurementError(
                f"The metric of {'edited worlds' if edited else 'unpatched runs'} is not finite.\n{listing(bad)}\n"
                "No row was patched yet: look at the metric, "
                f"{'at what the worlds stand for, ' if edited else ''}and at the model's dtype (float16 overflows in "
                "some models; try bfloat16 or float32)."
            )
        for job, value in zip(jobs, values, strict=True):
            self.baselines[job.base][job.pair] = value

    def _read(self, group: Group, taken: list[Taken]) -> None:
        """Reads the values of a batch, or of the parts of it that were run instead."""
        for step, found in taken:
            assert step.batch is not None
            call = step.ops[-1][1]
            if call is None:
                self._read_raw(step.batch.jobs[0], found)
                continue
            outcome, table = self.tracer.outcome(call, *found[-1]), step.batch.table
            if table is not None and not bool(outcome.scores.isfinite().all()):
                self._blame(group, step.batch)
            self.fired += outcome.fired
            self.saved |= outcome.saved
            worlds = table.worlds if table is not None else 0
            if worlds:
                self._baselines(call.jobs[:worlds], outcome.scores[:worlds], outcome.scores[:worlds, :0])
            self._rows(step.batch.jobs, call.jobs[worlds:], outcome.scores[worlds:].double().numpy())

    def _read_raw(self, job: Job, found: list[torch.Tensor]) -> None:
        base = self.baselines[job.base][job.pair]
        witness, value = (scores[0].double().numpy() for scores in found)
        self.noise = np.fmax(self.noise, np.abs(witness - base))
        if not np.isfinite(value).all():
            raise MeasurementError(
                f"pair {job.pair}, {self.plan.rows[job.row]}: {self._describe(value)}. The unpatched runs were finite: "
                "look at what the function writes."
            )
        # Runs of another shape round differently; a function that does nothing has no effect to the last bit.
        self.values[job.row, job.pair] = base + (value - witness)

    def _blame(self, group: Group, batch: Batch) -> None:
        """Finds the rows whose values are not finite: in a table they spread to all that share a lane.

        Raises:
            MeasurementError: There are some; or the unpatched runs are not finite themselves.
        """
        worlds = self._worlds(group, partial(self._read_worlds, group))
        if group.rides:
            self.runner.go([(worlds, [])])
        bad, spoilt = [], [batch]
        while spoilt:
            bad += [job for part in spoilt if len(part.jobs) == 1 for job in part.jobs]
            smaller = [half for part in spoilt if len(part.jobs) > 1 for half in halves(part)]
            spoilt = []
            if smaller:
                steps = (self._batch(group, part, partial(_judged, part, spoilt)) for part in smaller)
                self.runner.go([(worlds, steps)])
        self._refuse(bad)

    def _refuse(self, bad: Sequence[Job]) -> None:
        if bad:
            lines = [f"pair {j.pair}, {self.plan.rows[j.row]}" for j in bad]
            raise MeasurementError(
                f"{len(bad)} patched rows gave NaN or inf.\n{listing(lines)}\nThe unpatched runs were finite: "
                "look at what is written there."
            )

    def _rows(self, jobs: Sequence[Job], everyone: Sequence[Job], scores: NDArray[np.float64]) -> None:
        """Puts down the values of a batch's rows, and how far the unpatched witness before them drifts."""
        values = scores[len(everyone) - len(jobs) :]
        witness = everyone[0] if len(everyone) > len(jobs) else None
        if witness is not None:
            self.noise = np.fmax(self.noise, np.abs(scores[0] - self.baselines[witness.base][witness.pair]))
        self._refuse([j for j, v in zip(jobs, values, strict=True) if not np.isfinite(v).all()])
        eps = STEADY * float(torch.finfo(self.tracer.architecture.dtype).eps)
        for job, value in zip(jobs, values, strict=True):
            self.values[job.row, job.pair] = value
            base = self.baselines[job.base][job.pair]
            # Kernels round in ways that depend on the batch, by the size of what a difference is made of.
            limit = eps * np.array([np.abs(base[of]).max() for of in self.metric_of])
            limit = np.fmax(limit, np.fmin(STEADY * self.noise, STEADY * limit))
            self.still[job.row, job.pair] = (np.abs(value - base) <= limit).all()

    def _fill(self) -> None:
        """Values of rows that were not measured: the base's where that was proved, a twin's for the same edits."""
        for number, row in enumerate(self.plan.rows):
            for pair in range(self.plan.pairs):
                proof = self.plan.proofs[number, pair]
                if proof in (Proof.EQUAL, Proof.UNREACHABLE, Proof.BOTH):
                    self.values[number, pair] = self.baselines[row.base][pair]
                elif proof == Proof.IDENTICAL:
                    self.values[number, pair] = self.values[self.plan.twins[number, pair] // self.plan.pairs, pair]

    def _describe(self, values: NDArray[np.float64]) -> str:
        return ", ".join(f"{m}{'.' + p if p else ''} = {v}" for (m, p), v in zip(self.columns, values, strict=True))


def _judged(part: Batch, spoilt: list[Batch], taken: list[Taken]) -> None:
    """Adds a batch to the spoilt ones if it gave numbers that are not finite."""
    if not all(bool(found[-1][0].isfinite().all()) for _, found in taken):
        spoilt.append(part)
