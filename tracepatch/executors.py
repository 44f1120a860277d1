"""Running a plan here: worlds first, then the batches, with progress, and every number checked before it is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch import trace
from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, listing
from tracepatch.layout import Seats, columns, shadow_columns, stops
from tracepatch.metrics import Metric
from tracepatch.models import Model, eager_attention, module_of, remote_of
from tracepatch.plan import Group, Job, Plan, Proof
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
    """

    columns: tuple[tuple[str, str], ...]
    values: NDArray[np.float64]
    baselines: dict[WorldName, NDArray[np.float64]]
    noise: NDArray[np.float64]
    seconds: float


def run(
    model: Model,
    architecture: Architecture,
    encoded: EncodedPairs,
    plan: Plan,
    advance: Callable[[int], None] | None = None,
) -> Measured:
    """Executes a plan in this process, or trace by trace on the server the model was loaded for.

    Args:
        model: What is patched.
        architecture: Of the model.
        encoded: The pairs the plan was made for.
        plan: What to trace.
        advance: Called with the number of rows done after each traced run.

    Raises:
        MeasurementError: A number came out NaN or inf; the rows are named.
    """
    return _Run(model, architecture, encoded, plan, advance or (lambda done: None)).whole()


class _Run:
    """One execution of one plan."""

    def __init__(
        self,
        model: Model,
        architecture: Architecture,
        encoded: EncodedPairs,
        plan: Plan,
        advance: Callable[[int], None],
    ) -> None:
        self.model, self.architecture, self.encoded, self.plan, self.advance = (
            model,
            architecture,
            encoded,
            plan,
            advance,
        )
        self.columns = tuple((m.name, part) for m in plan.metrics for part in ("", *m.parts))
        self.values = np.full((len(plan.rows), plan.pairs, len(self.columns)), np.nan)
        self.baselines: dict[WorldName, NDArray[np.float64]] = {
            world: np.full((plan.pairs, len(self.columns)), np.nan) for world in plan.worlds
        }
        self.noise = np.zeros(len(self.columns))
        self.device = module_of(model).get_input_embeddings().weight.device

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
        return Measured(self.columns, self.values, self.baselines, self.noise, time.perf_counter() - began)

    def _worlds(self, group: Group) -> dict[Any, torch.Tensor]:
        """Runs the unpatched worlds of a group; their baselines, and the values that edits will write."""
        runs = [(pair, world) for pair in group.pairs for world in self.plan.worlds]
        needed = sorted(group.needed)
        want_logits = (
            any(n in ("clean", "corrupted") for m in self.plan.metrics for n in m.needs) or ("logits", 0) in needed
        )
        visited = stops(self.architecture, needed, {})
        pieces: list[dict[Any, torch.Tensor]] = []
        at_once = max(1, int(self.plan.budget // 2 // max(1, self.plan.row_bytes)))
        scores = []
        for i in range(0, len(runs), at_once):
            part = runs[i : i + at_once]
            ids = [self.encoded.world(world)[pair] for pair, world in part]
            # A divergence needs the clean logits first, so it is scored below.
            direct = [m for m in self.plan.metrics if not _references(m)]
            kept, found = self._forward(
                group, ids, visited, {}, (), self._measures(direct, group, part, {}), want_logits
            )
            scores.append(found)
            pieces.append(kept)
        known = {key: torch.cat([p[key] for p in pieces]) for key in pieces[0] if key[0] != "aside"}
        logits = known.get(("logits", 0))
        if logits is not None:
            known["reference", 0] = logits.float().log_softmax(-1)
            if ("logits", 0) in needed:
                spread = logits.new_zeros(len(runs), group.length, logits.shape[-1])
                spread[:, list(group.reads)] = logits
                known["logits", 0] = spread
        self._baselines(group, runs, torch.cat(scores), logits, known)
        return known

    def _baselines(
        self,
        group: Group,
        runs: list[tuple[int, WorldName]],
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
                ((_, at, given),) = self._measures([metric], group, runs, known)
                scored = metric(logits[:, at].float(), {k: v.to(logits.device) for k, v in given.items()})
                found.append(scored.float().cpu())
            else:
                found.append(direct[:, taken : taken + width])
                taken += width
        values = torch.cat(found, 1).double().numpy()
        bad = [
            f"pair {pair}, {world} run: {self._describe(v)}"
            for (pair, world), v in zip(runs, values, strict=True)
            if not np.isfinite(v).all()
        ]
        if bad:
            raise MeasurementError(
                f"The metric of unpatched runs is not finite.\n{listing(bad)}\nNothing was patched yet: look "
                "at the metric, and at the model's dtype "
                "(float16 overflows in some models; try bfloat16 or float32)."
            )
        for (pair, world), value in zip(runs, values, strict=True):
            self.baselines[world][pair] = value

    def _batch(self, group: Group, jobs: tuple[Job, ...], known: dict[Any, torch.Tensor]) -> None:
        """One traced run: the unpatched witness in front, then a row a job."""
        raw = self.plan.rows[jobs[0].row].raw
        if raw is not None:
            self._raw(group, jobs[0], raw, known)
            return
        witness = jobs[0]
        rows: list[tuple[int, WorldName]] = [(witness.pair, witness.base), *((j.pair, j.base) for j in jobs)]
        seats = Seats(
            row_of=lambda number: number + 1,
            slot_of=lambda component, position: position,
            world_of={run: i for i, run in enumerate((p, w) for p in group.pairs for w in self.plan.worlds)},
            length=group.length,
        )
        writes = columns(jobs, self.architecture, seats)
        shadows, count = shadow_columns(jobs, self.architecture, seats, first=len(rows))
        rows += [rows[0]] * count
        logit_edits = tuple(
            self._at_reads(group, w) for key, found in writes.items() if key[0] == "logits" for w in found
        )
        ids = [self.encoded.world(base)[pair] for pair, base in rows]
        elsewhere = {key: found for key, found in writes.items() if key[0] != "logits"}
        visited = stops(self.architecture, (), elsewhere, shadows)
        _, scores = self._forward(
            group, ids, visited, known, logit_edits, self._measures(self.plan.metrics, group, rows, known), False
        )
        values = scores[: 1 + len(jobs)].double().numpy()
        drift = np.abs(values[0] - self.baselines[witness.base][witness.pair])
        self.noise = np.fmax(self.noise, drift)
        bad = [j for j, v in zip(jobs, values[1:], strict=True) if not np.isfinite(v).all()]
        if bad:
            lines = [f"pair {j.pair}, {self.plan.rows[j.row]}" for j in bad]
            raise MeasurementError(
                f"{len(bad)} patched rows gave NaN or inf.\n{listing(lines)}\nThe unpatched runs were finite: "
                "look at what is written there."
            )
        for job, value in zip(jobs, values[1:], strict=True):
            self.values[job.row, job.pair] = value

    def _raw(self, group: Group, job: Job, function: Callable[[Any], Any], known: dict[Any, torch.Tensor]) -> None:
        """A row's raw trace, and the same run without it: what they differ by is what the row did."""
        run, row = [(job.pair, job.base)], self.plan.rows[job.row]
        ids = torch.tensor([self.encoded.world(job.base)[job.pair]], device=self.device)
        measures = self._measures(self.plan.metrics, group, run, known)
        reads, remote = torch.tensor(group.reads), remote_of(self.model)
        base = self.baselines[job.base][job.pair]
        witness = trace.raw(self.model, ids, None, reads, measures, remote)[0].double().numpy()
        self.noise = np.fmax(self.noise, np.abs(witness - base))
        try:
            found = trace.raw(self.model, ids, function, reads, measures, remote)[0].double().numpy()
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

    @staticmethod
    def _at_reads(group: Group, write: tuple[Any, ...]) -> tuple[Any, ...]:
        """A write of logits, counted among the positions that are read."""
        add, (rows, slots, *_), terms, constant, function, _ = write
        place = {p: i for i, p in enumerate(group.reads)}
        inside = torch.tensor([p in place for p in slots.tolist()])
        kept = torch.tensor([place[p] for p in slots.tolist() if p in place], dtype=torch.long)
        chosen = tuple((f, n, (w[inside], p[inside], u, s), lift) for f, n, (w, p, u, s), lift in terms)
        if constant is not None and constant.ndim:
            constant = constant[inside]
        if function is not None and not inside.all():
            raise MeasurementError("A function of logits reads positions that the metric does not: read them too.")
        return add, (rows[inside], kept, None, None), chosen, constant, function, False

    def _forward(
        self,
        group: Group,
        ids: list[tuple[int, ...]],
        visited: tuple[Any, ...],
        known: dict[Any, torch.Tensor],
        logit_edits: tuple[Any, ...],
        measures: tuple[Any, ...],
        keep_logits: bool,
    ) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
        reads = torch.tensor(group.reads)
        options = {"logits_to_keep": reads.to(self.device)} if self.architecture.keeps_logits else {}
        tokens = torch.tensor(ids, device=self.device)
        return trace.forward(
            self.model,
            tokens,
            visited,
            known,
            reads,
            options,
            logit_edits,
            measures,
            keep_logits,
            remote_of(self.model),
        )

    def _measures(
        self, metrics: Iterable[Metric], group: Group, rows: list[tuple[int, WorldName]], known: dict[Any, torch.Tensor]
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
        rows: list[tuple[int, WorldName]],
        known: dict[Any, torch.Tensor],
    ) -> torch.Tensor:
        if need in NEEDS_ANSWER:
            ids = [getattr(self.encoded, need)[pair] for pair, _ in rows]
            widest = max(len(i) for i in ids)
            return torch.tensor([[*i, *[-1] * (widest - len(i))] for i in ids])
        if need == "next":
            follow = []
            for pair, _ in rows:
                ids_after = (*self.encoded.clean[pair][1:], *(self.encoded.answer[pair][:1] or (0,)))
                follow.append([ids_after[p] for p in positions])
            return torch.tensor(follow)
        order = {run: i for i, run in enumerate((p, w) for p in group.pairs for w in self.plan.worlds)}
        reference = known["reference", 0]
        index = torch.tensor([order[pair, need] for pair, _ in rows], device=reference.device)  # type: ignore[index]  # a world's name
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


def _references(metric: Metric) -> bool:
    return any(need in ("clean", "corrupted") for need in metric.needs)
