"""Running a plan here: worlds first, then the batches, with progress, and every number checked before it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch import trace
from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, TracepatchError, listing
from tracepatch.firing import each_once, failure, named, once, require_fired
from tracepatch.layout import Seats, at_reads, columns, read_columns, saved_at_reads, shadow_columns, stops
from tracepatch.metrics import Metric
from tracepatch.models import Model, eager_attention, module_of, remote_of
from tracepatch.plan import Group, Job, Plan, Proof, order_of, parts
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs

NEEDS_ANSWER = ("answer", "wrong")


@dataclass(frozen=True)
class Measured:
    """Numbers of a plan that has run.

    Attributes:
        columns: (metric, part) of each column; a metric's own value has the part "".
        values: ``[row, pair, column]``; NaN where a row has no such position in a pair.
        baselines: World → ``[pair, column]``.
        noise: Largest drift of the unpatched witnesses from their baseline, per column.
        seconds: Wall time.
        still: ``[row, pair]``: whether a measured row has, to the last bit, the value of its unpatched base.
        fired: Edits that were seen to fire.
        saved: (row, its save's number, pair) → the live value ``[…]`` in float32.
    """

    columns: tuple[tuple[str, str], ...]
    values: NDArray[np.float64]
    baselines: dict[WorldName, NDArray[np.float64]]
    noise: NDArray[np.float64]
    seconds: float
    still: NDArray[np.bool_]
    fired: int
    saved: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)


def run(
    model: Model,
    architecture: Architecture,
    encoded: EncodedPairs,
    plan: Plan,
    advance: Callable[[int], None] | None = None,
    *,
    checks: bool = True,
    witness: bool = True,
) -> Measured:
    """Executes a plan in this process, or trace by trace on the server the model was loaded for.

    Args:
        model: What is patched.
        architecture: Of the model.
        encoded: The pairs the plan was made for.
        plan: What to trace.
        advance: Called with the number of rows done after each traced run.
        checks: Whether every edit must be seen to fire.
        witness: Whether each traced run has an unpatched row in front.

    Raises:
        MeasurementError: A number came out NaN or inf, an edit never fired, or a forward failed; the rows are named.
    """
    return _Run(model, architecture, encoded, plan, advance or (lambda done: None), checks, witness).whole()


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
        witness: bool,
    ) -> None:
        self.model, self.architecture, self.encoded = model, architecture, encoded
        self.plan, self.advance = plan, advance
        self.checks, self.witness = checks, witness
        self.columns = tuple((m.name, part) for m in plan.metrics for part in ("", *m.parts))
        self.values = np.full((len(plan.rows), plan.pairs, len(self.columns)), np.nan)
        self.baselines: dict[WorldName, NDArray[np.float64]] = {
            world: np.full((plan.pairs, len(self.columns)), np.nan)
            for world in (*plan.worlds, *(world.name for world in plan.edited))
        }
        self.roots = {world.name: world.root for world in plan.edited}
        self.noise = np.zeros(len(self.columns))
        self.still = np.zeros((len(plan.rows), plan.pairs), bool)
        self.fired = 0
        self.saved: dict[tuple[int, int, int], torch.Tensor] = {}
        device = module_of(model).get_input_embeddings().weight.device
        self.device = torch.device("cpu") if device.type == "meta" else device  # a server moves what it is sent

    def whole(self) -> Measured:
        """Everything the plan asks for."""
        began = time.perf_counter()
        with eager_attention(module_of(self.model)) if self.plan.eager else nullcontext():
            for group in self.plan.groups:
                known = self._worlds(group)
                for batch in group.batches:
                    self._batch(group, batch.jobs, known)
                    self.advance(len(batch.jobs))
        self._fill()
        seconds = time.perf_counter() - began
        return Measured(
            self.columns, self.values, self.baselines, self.noise, seconds, self.still, self.fired, self.saved
        )

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
            pieces: list[dict[Any, torch.Tensor]] = []
            scores = []
            split = parts(jobs, lambda job: len(self.encoded.encoded(self._root(job), job.pair)), at_once)
            for part in split:
                kept, found = self._patched(group, part, known, direct, needed, want_logits)
                scores.append(found)
                pieces.append(kept)
            order = order_of(jobs, split)
            gained = {key: _joined([p[key] for p in pieces], order) for key in pieces[0]}
            logits = gained.get(("logits", 0))
            if logits is not None:
                gained["reference", 0] = logits.float().log_softmax(-1)
                if ("logits", 0) in needed:
                    spread = logits.new_zeros(len(jobs), group.length, logits.shape[-1])
                    spread[:, list(group.reads)] = logits
                    gained["logits", 0] = spread
            known = {key: torch.cat([known[key], new]) if key in known else new for key, new in gained.items()}
            self._baselines(group, jobs, _joined(scores, order), logits, known)
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
                ((_, at, given),) = self._measures([metric], group, jobs, known)
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

    def _batch(self, group: Group, jobs: tuple[Job, ...], known: dict[Any, torch.Tensor]) -> None:
        """One traced run: the base of the first job as an unpatched witness in front, then a row a job."""
        raw = self.plan.rows[jobs[0].row].raw
        if raw is not None:
            self._raw(group, jobs[0], raw, known)
            return
        base, pair = jobs[0].base, jobs[0].pair
        edited = (job for world in group.edited for job in world if (job.base, job.pair) == (base, pair))
        lead = (next(edited, _unpatched(pair, base)),) if self.witness else ()
        _, scores = self._patched(group, (*lead, *jobs), known, self.plan.metrics)
        found = scores.double().numpy()
        values, unpatched = found[len(lead) :], found[0]
        if lead:
            self.noise = np.fmax(self.noise, np.abs(unpatched - self.baselines[base][pair]))
        bad = [j for j, v in zip(jobs, values, strict=True) if not np.isfinite(v).all()]
        if bad:
            lines = [f"pair {j.pair}, {self.plan.rows[j.row]}" for j in bad]
            raise MeasurementError(
                f"{len(bad)} patched rows gave NaN or inf.\n{listing(lines)}\nThe unpatched runs were finite: "
                "look at what is written there."
            )
        for job, value in zip(jobs, values, strict=True):
            self.values[job.row, job.pair] = value
            # Kernels round in ways that depend on the batch, so the row's own batch is asked too.
            witnessed = bool(lead) and (job.pair, job.base) == (pair, base) and np.array_equal(value, unpatched)
            self.still[job.row, job.pair] = witnessed or np.array_equal(value, self.baselines[job.base][job.pair])

    def _patched(
        self,
        group: Group,
        jobs: Sequence[Job],
        known: dict[Any, torch.Tensor],
        metrics: Iterable[Metric],
        keep: Sequence[tuple[str, int]] = (),
        keep_logits: bool = False,
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        """One traced run with a row a job: what is kept, and the metrics ``[job, column]``."""
        seats = Seats(
            row_of=lambda number: number,
            slot_of=lambda component, position: position,
            world_of={run: i for i, run in enumerate(self._order(group))},
            length=group.length,
        )
        writes = columns(jobs, self.architecture, seats)
        reads, saving = read_columns(jobs, seats)
        shadows, count = shadow_columns(jobs, self.architecture, seats, first=len(jobs), reads=reads)
        logit_edits = tuple(
            at_reads(group.reads, w) for key, found in writes.items() if key[0] == "logits" for w in found
        )
        elsewhere = {key: found for key, found in writes.items() if key[0] != "logits"}
        visited = stops(self.architecture, keep, elsewhere, shadows, reads)
        saved_logits = tuple(
            saved_at_reads(group.reads, r) for key, found in reads.items() if key[0] == "logits" for r in found
        )
        rows = [*jobs, *[jobs[0]] * count]
        measures = self._measures(metrics, group, rows, known)
        kept, scores = self._forward(group, rows, visited, known, logit_edits, measures, (keep_logits, saved_logits))
        for number, whose in enumerate(saving):
            for (job_number, save), live in zip(whose, kept["save", number], strict=True):
                self.saved[jobs[job_number].row, save, jobs[job_number].pair] = live
        if self.checks:
            fired = require_fired(self.plan.rows, group, jobs, kept, len(rows))
            self.fired += fired if jobs[-1].row >= 0 else 0  # edits of rows, not those that make the worlds
        own = {key: value[: len(jobs)] for key, value in kept.items() if key[0] not in ("save", "fired")}
        return own, scores[: len(jobs)]

    def _order(self, group: Group) -> list[tuple[int, WorldName]]:
        """The runs whose values are kept, as they stand in what is known."""
        pristine = [(pair, world) for pair in group.pairs for world in self.plan.worlds]
        return pristine + [(job.pair, job.base) for world in group.edited for job in world]

    def _raw(self, group: Group, job: Job, function: Callable[[Any], Any], known: dict[Any, torch.Tensor]) -> None:
        """A row's raw trace, and the same run without it: what they differ by is what the row did."""
        row = self.plan.rows[job.row]
        inputs = trace.named(self._tokens([job]), self._read_by([job]))
        measures = self._measures(self.plan.metrics, group, [job], known)
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

    def _forward(
        self,
        group: Group,
        rows: Sequence[Job],
        visited: tuple[Any, ...],
        known: dict[Any, torch.Tensor],
        logit_edits: tuple[Any, ...],
        measures: tuple[Any, ...],
        keep_logits: tuple[Any, ...],
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        reads = torch.tensor(group.reads)
        options = {"logits_to_keep": reads.to(self.device)} if self.architecture.keeps_logits else {}
        remote, encoder = remote_of(self.model), self._read_by(rows)
        counted = once(visited, self.architecture) if self.checks and not remote else ()
        tokens = self._tokens(rows)
        given = (tokens, visited, known, reads, options, logit_edits, measures, keep_logits, remote, encoder)
        try:
            with each_once(module_of(self.model), counted):
                return trace.forward(self.model, *given)
        except TracepatchError:
            raise
        except Exception as error:
            of = named(self.plan.rows, [row for row in rows if row.writes]) or "  the unpatched runs"
            raise MeasurementError(failure(error, [path for (path, *_), _ in visited], of, len(rows))) from error

    def _tokens(self, rows: Sequence[Job]) -> torch.Tensor:
        """The prompts of these runs, ``[row, pos]``; the decoder's, where the model has an encoder."""
        ids = [self.encoded.world(self._root(row))[row.pair] for row in rows]
        return torch.tensor(ids, device=self.device)

    def _read_by(self, rows: Sequence[Job]) -> torch.Tensor | None:
        """What an encoder reads in these runs, ``[row, pos]``; nothing where the model has none."""
        if not self.encoded.encoder:
            return None
        return torch.tensor([self.encoded.encoded(self._root(row), row.pair) for row in rows], device=self.device)

    def _root(self, job: Job) -> WorldName:
        """The pristine world whose prompts a run has."""
        return self.roots.get(job.base, job.base)

    def _measures(
        self, metrics: Iterable[Metric], group: Group, rows: Sequence[Job], known: dict[Any, torch.Tensor]
    ) -> tuple[Any, ...]:
        """For each metric: its function, which of the reads it takes, and what it needs of the pairs."""
        place = {p: i for i, p in enumerate(group.reads)}
        found = []
        for metric in metrics:
            positions = metric.positions.resolve(group.length) or ()
            at = torch.tensor([place[p] for p in positions])
            given = {need: self._given(need, positions, at, group, rows, known) for need in metric.needs}
            found.append((metric.function, at, given))
        return tuple(found)

    def _given(
        self,
        need: str,
        positions: tuple[int, ...],
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
            follow = []
            for row in rows:
                ids_after = (*self.encoded.clean[row.pair][1:], *(self.encoded.answer[row.pair][:1] or (0,)))
                follow.append([ids_after[p] for p in positions])
            return torch.tensor(follow)
        order = {run: i for i, run in enumerate(self._order(group))}
        reference = known["reference", 0]
        index = torch.tensor([order[row.pair, need] for row in rows], device=reference.device)
        return reference[index][:, at.to(reference.device)]

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


def _unpatched(pair: int, world: WorldName) -> Job:
    return Job(-1, pair, world, (), 0, 0)


def _joined(pieces: list[torch.Tensor], order: list[int] | None) -> torch.Tensor:
    whole = torch.cat(pieces)
    return whole if order is None else whole[order]


def _references(metric: Metric) -> bool:
    return any(need in ("clean", "corrupted") for need in metric.needs)
