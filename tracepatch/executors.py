"""Running a plan here: worlds first, then the batches, with progress, and every number checked before it is kept."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch import trace
from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, listing
from tracepatch.jobs import Job
from tracepatch.journal import Journal, Measured
from tracepatch.metrics import Metric
from tracepatch.models import Model, eager_attention, module_of, remote_of
from tracepatch.packing import halves
from tracepatch.plan import Batch, Group, Plan, Proof, order_of, parts
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs
from tracepatch.traced import Outcome, Tracer

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
) -> Measured:
    """Executes a plan in this process, or trace by trace on the server the model was loaded for.

    Args:
        model: What is patched.
        architecture: Of the model.
        encoded: The pairs the plan was made for.
        plan: What to trace.
        advance: Called with the number of rows done after each traced run.
        checks: Whether every edit must be seen to fire, and the plan's sample is measured once more.
        journal: What is finished already, and where what gets finished is kept.

    Raises:
        MeasurementError: A number came out NaN or inf, an edit never fired, or a forward failed; the rows are named.
    """
    ready = journal or Journal(plan)
    return _Run(model, architecture, encoded, plan, advance or (lambda done: None), checks, ready).whole()


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

    def whole(self) -> Measured:
        """Everything the plan asks for."""
        began = time.perf_counter()
        gc.freeze()  # what is there before need not be looked through after each run
        try:
            with eager_attention(module_of(self.model)) if self.plan.eager else nullcontext():
                for group in self.plan.groups:
                    self._group(group)
        finally:
            gc.unfreeze()
        return self._measured(time.perf_counter() - began)

    def known(self) -> Measured:
        """What the journal has of it."""
        for group in self.plan.groups:
            self.journal.todo(self, group)
        return self._measured(0.0)

    def _group(self, group: Group) -> None:
        """What is not finished of a group, with its worlds before."""
        todo = self.journal.todo(self, group)
        sampled = self.checks and self.journal.checks is None and self.plan.sample
        again = bool(sampled and self.plan.sample[0].pair in group.pairs)
        if not (todo or again or self.journal.needs_worlds(group)):
            return
        known: dict[Any, torch.Tensor] = {}
        if group.rides and group.batches[0] not in todo:  # for its worlds, which must round as they did before
            fired = self.fired
            known = self._fitted(group, group.batches[0], known)
            self.fired = fired
        elif not group.rides:
            known = self._worlds(group)
        if not group.rides or known:
            self.journal.worlds(self, group)
        for batch in todo:
            with self.journal.batch(self, batch):
                known = self._fitted(group, batch, known)
            if batch.computes_worlds:
                self.journal.worlds(self, group)
            self.advance(len(batch.jobs))
        if again:
            self._again(group, known)

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
        )

    def _again(self, group: Group, known: dict[Any, torch.Tensor]) -> None:
        """Measures the plan's sample as whole prompts, without a cache, in a run of its own."""
        found = self.tracer.run(group, self.plan.sample, known, self.plan.metrics)
        self.again = tuple(found.scores.double().numpy())

    def _worlds(self, group: Group) -> dict[Any, torch.Tensor]:
        """Runs the worlds of a group, edited ones last; their baselines, and the values that edits will write."""
        pristine = [_unpatched(pair, world) for pair in group.pairs for world in self.plan.worlds]
        needed = sorted(group.needed)
        want_logits = (
            any(n in ("clean", "corrupted") for m in self.plan.metrics for n in m.needs) or ("logits", 0) in needed
        )
        # A divergence needs the clean logits first, so it is scored below.
        direct = [m for m in self.plan.metrics if not _references(m)]
        at_once = max(1, int(self.plan.budget // 2 // max(1, self.plan.row_bytes)))
        known: dict[Any, torch.Tensor] = {}
        for jobs in (pristine, *group.edited):  # an edited world takes values of those before it
            pieces: list[Outcome] = []
            split = parts(jobs, lambda job: len(self.encoded.encoded(self.tracer.root(job), job.pair)), at_once)
            for part in split:
                pieces += self._parted(group, part, known, direct, keep=needed, keep_logits=want_logits)
            order = order_of(jobs, split)
            gained = {key: _joined([p.kept[key] for p in pieces], order) for key in pieces[0].kept}
            logits = gained.get(("logits", 0))
            if logits is not None:
                gained["reference", 0] = logits.float().log_softmax(-1)
                if ("logits", 0) in needed:
                    spread = logits.new_zeros(len(jobs), group.length, logits.shape[-1])
                    spread[:, list(group.reads)] = logits
                    gained["logits", 0] = spread
            known = {key: torch.cat([known[key], new]) if key in known else new for key, new in gained.items()}
            self._baselines(group, jobs, _joined([p.scores for p in pieces], order), logits, known)
        return known

    def _baselines(
        self,
        group: Group,
        jobs: Sequence[Job],
        direct: torch.Tensor,
        logits: torch.Tensor | None,
        known: dict[Any, torch.Tensor],
    ) -> None:
        taken = 0
        found = []
        for metric in self.plan.metrics:
            width = 1 + len(metric.parts)
            if _references(metric):
                assert logits is not None
                ((_, at, given, _),) = self.tracer.measures([metric], group, jobs, known)
                scored = metric(logits[:, at].float(), {k: v.to(logits.device) for k, v in given.items()})
                found.append(scored.float().cpu())
            else:
                found.append(direct[:, taken : taken + width])
                taken += width
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

    def _parted(
        self, group: Group, jobs: Sequence[Job], known: dict[Any, torch.Tensor], metrics: list[Metric], **keep: Any
    ) -> list[Outcome]:
        """Runs worlds, in halves and their halves where there is not enough memory for all."""
        try:
            return [self.tracer.run(group, jobs, known, metrics, keep_past=group.cached, **keep)]
        except MeasurementError as error:
            if not _may_fit_in_halves(error, jobs):
                raise
        middle = len(jobs) // 2
        halved = (self._parted(group, part, known, metrics, **keep) for part in (jobs[:middle], jobs[middle:]))
        return [outcome for part in halved for outcome in part]

    def _fitted(self, group: Group, batch: Batch, known: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Runs a batch, in halves and their halves where there is not enough memory for it."""
        try:
            return self._batch(group, batch, known)
        except MeasurementError as error:
            if not _may_fit_in_halves(error, batch.jobs):
                raise
        for half in halves(batch, self.plan.layers):
            known = self._fitted(group, half, known)
        return known

    def _batch(self, group: Group, batch: Batch, known: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """One traced run: an unpatched witness in front, then the rows; the worlds before, where they ride in it."""
        jobs, table = batch.jobs, batch.table
        raw = self.plan.rows[jobs[0].row].raw if jobs else None
        if raw is not None:
            self._raw(group, jobs[0], raw, known)
            return known
        if table is not None:
            everyone, worlds = table.jobs, table.worlds
        else:
            base, pair = jobs[0].base, jobs[0].pair
            edited = (job for world in group.edited for job in world if (job.base, job.pair) == (base, pair))
            lead = (next(edited, _unpatched(pair, base)),)
            everyone, worlds = (*lead, *jobs), 0
        keep = sorted(group.needed) if worlds else ()
        past = bool(worlds) and group.cached
        found = self.tracer.run(group, everyone, known, self.plan.metrics, table=table, keep=keep, keep_past=past)
        if table is not None and not bool(found.scores.isfinite().all()):
            self._blame(group, batch, known)
        self.fired += found.fired
        self.saved |= found.saved
        if worlds:
            self._baselines(group, everyone[:worlds], found.scores[:worlds], None, found.kept)
            known = found.kept
        scores = found.scores.double().numpy()
        self._rows(jobs, scores[len(everyone) - len(jobs) :], everyone[worlds:], scores[worlds:])
        return known

    def _blame(self, group: Group, batch: Batch, known: dict[Any, torch.Tensor]) -> None:
        """Finds the rows whose values are not finite: in a table they spread to all that share a lane.

        Raises:
            MeasurementError: There are some; or the unpatched runs are not finite themselves.
        """
        if group.rides:
            self._worlds(group)

        def spoilt(part: Batch) -> list[Job]:
            assert part.table is not None
            keep = sorted(group.needed) if part.table.worlds else ()
            scores = self.tracer.run(
                group, part.table.jobs, known, self.plan.metrics, table=part.table, keep=keep
            ).scores
            if bool(scores.isfinite().all()):
                return []
            if len(part.jobs) == 1:
                return list(part.jobs)
            return [job for half in halves(part, self.plan.layers) for job in spoilt(half)]

        self._refuse(spoilt(batch))

    def _refuse(self, bad: Sequence[Job]) -> None:
        if bad:
            lines = [f"pair {j.pair}, {self.plan.rows[j.row]}" for j in bad]
            raise MeasurementError(
                f"{len(bad)} patched rows gave NaN or inf.\n{listing(lines)}\nThe unpatched runs were finite: "
                "look at what is written there."
            )

    def _rows(
        self,
        jobs: Sequence[Job],
        values: NDArray[np.float64],
        everyone: Sequence[Job],
        scores: NDArray[np.float64],
    ) -> None:
        """Puts down the values of a batch's rows, and how far its unpatched witness drifts."""
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

    def _raw(self, group: Group, job: Job, function: Callable[[Any], Any], known: dict[Any, torch.Tensor]) -> None:
        """A row's raw trace, and the same run without it: what they differ by is what the row did."""
        row = self.plan.rows[job.row]
        inputs = self.tracer.named([job])
        measures = self.tracer.measures(self.plan.metrics, group, [job], known)
        reads, remote = torch.tensor(group.reads), remote_of(self.model)
        base = self.baselines[job.base][job.pair]
        witness = trace.raw(self.model, inputs, None, reads, measures, remote)[0].double().numpy()
        self.noise = np.fmax(self.noise, np.abs(witness - base))
        try:
            found = trace.raw(self.model, inputs, function, reads, measures, remote)[0].double().numpy()
        except Exception as error:
            raise MeasurementError(
                f"pair {job.pair}, {row}: the function failed inside the trace ({type(error).__name__}). Its own error "
                "is above."
            ) from error
        if not np.isfinite(found).all():
            raise MeasurementError(
                f"pair {job.pair}, {row}: {self._describe(found)}. The unpatched runs were finite: look at what the "
                "function writes."
            )
        # Runs of another shape round differently; a function that does nothing has no effect to the last bit.
        self.values[job.row, job.pair] = base + (found - witness)

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


def _may_fit_in_halves(error: MeasurementError, jobs: Sequence[Job]) -> bool:
    """Whether a run of jobs failed for want of memory, and can be made smaller; frees what can be freed."""
    if not isinstance(error.__cause__, torch.OutOfMemoryError) or len(jobs) < 2:
        return False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return True


def _unpatched(pair: int, world: WorldName) -> Job:
    return Job(-1, pair, world, (), 0, 0)


def _joined(pieces: list[torch.Tensor], order: list[int] | None) -> torch.Tensor:
    whole = torch.cat(pieces)
    return whole if order is None else whole[order]


def _references(metric: Metric) -> bool:
    return any(need in ("clean", "corrupted") for need in metric.needs)
