"""What a run says about itself, in one line: noise, a row measured alone, edits that fired, patches without effect.

Rounding is the yardstick. The metrics in logits, nats or probabilities move by at most twice the largest change of a
logit (a difference of two logits, or of log-probabilities, whose gradient by the logits sums to 2 in absolute value).
So ``2 · resolution(dtype) · (1 + scale)`` is more than rounding explains, where ``resolution`` allows for the sums of a
whole forward (float32 forwards of 32 layers, alone and among others, stayed 15 times below it) and the scale is that of
the logits. Other metrics may be steeper, or jump: above the limit they are warned of, and ranks, which always jump,
are only reported.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, MeasurementWarning, plural
from tracepatch.executors import Measured, run
from tracepatch.models import Model
from tracepatch.plan import Plan, Proof
from tracepatch.planner import make_plan
from tracepatch.probe import resolution
from tracepatch.rows import Row
from tracepatch.sources import Value
from tracepatch.tokens import EncodedPairs

BOUNDED = ("logits", "nats", "probability")  # units in which a metric follows the logits, at most twice as fast
JUMPS = "rank"
PROVED = (Proof.EQUAL, Proof.UNREACHABLE, Proof.BOTH)


def verify(model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, measured: Measured) -> str:
    """Checks a run that has ended; the line that says what was found.

    Raises:
        MeasurementError: Unpatched witnesses drift, or a row alone has another value than in the run, by more than
            rounding explains.
    """
    checks = _Checks(model, architecture, encoded, plan, measured)
    found = [checks.eager(), checks.noise(), *checks.alone(), checks.fired(), checks.unchanged()]
    return "; ".join(found)


@dataclass(frozen=True)
class _Checks:
    model: Model
    architecture: Architecture
    encoded: EncodedPairs
    plan: Plan
    measured: Measured

    def eager(self) -> str:
        """Step-by-step attention, which the probe saw, against the attention that runs."""
        return f"eager attention differs by {_short(self.architecture.eager_error / self.architecture.logit_scale)}"

    def noise(self) -> str:
        """The unpatched witnesses of all batches against their own unpatched run."""
        drift = self.measured.noise
        self._judge(
            drift,
            f"Unpatched rows of the patched runs drift by {self._amounts(drift)} from the same prompts run unpatched",
            "Rows of a run depend on each other, or the model on chance or on the size of the batch. Measure with "
            "batch_size=1 and compare",
        )
        return f"witnesses drift by {self._amounts(drift)}"

    def alone(self) -> Iterator[str]:
        """A measured row, and one proved to be zero, in forwards of their own with every edit left in."""
        for pair, numbers in self._picked().items():
            one = _only(self.encoded, pair)
            rows = [self.plan.rows[number] for number in numbers]
            # No memory for two rows: the worlds run one by one too.
            limits: dict[str, Any] = {"prune": False, "batch_size": 1, "memory": 1}
            edited, metrics = self.plan.edited, self.plan.metrics
            plan = make_plan(self.architecture, one, rows, metrics, edited=edited, numbers=(pair,), **limits)
            found = run(self.model, self.architecture, one, plan, witness=False)
            for world, baseline in found.baselines.items():
                gap = abs(baseline[0] - self.measured.baselines[world][pair])
                what = f"The unpatched {world} run of pair {pair} differs by {self._amounts(gap)} when it is run alone"
                self._judge(gap, what, "The model's rows depend on each other: measure with memory=1, batch_size=1")
            for row, number, value in zip(rows, numbers, found.values[:, 0], strict=True):
                yield self._compared(row, number, pair, value)

    def _compared(self, row: Row, number: int, pair: int, value: NDArray[np.float64]) -> str:
        known = self.measured.values[number, pair]
        gap, proved = abs(value - known), self.plan.proofs[number, pair] in PROVED
        column = int(np.argmax(gap / self._allowed()))
        name = ".".join(filter(None, self.measured.columns[column]))
        numbers = f"{name} = {value[column]:.6g} where it is measured alone, and {known[column]:.6g}"
        if proved:
            what = f"Pair {pair}, {row} was proved to change nothing, but gives {numbers} unpatched"
            advice = "Pass prune=False to measure every row, and report this"
        else:
            what = f"Pair {pair}, {row} gives {numbers} in its batch"
            advice = (
                "Rows of a batch depend on each other: if a function or metric of yours mixes rows or uses random "
                "numbers, mend it; if not, measure with batch_size=1, and report this"
            )
        self._judge(gap, what, advice)
        labels = f" ({row.described})" if row.labels else ""
        where = f"row {number}{labels}" + (f" of pair {pair}" if self.plan.pairs > 1 else "")
        what = f"{where}, proved zero, is its base" if proved else f"{where} alone gives the same"
        return f"{what} to {self._amounts(gap)}"

    def _picked(self) -> dict[int, list[int]]:
        """Pairs and rows to be measured alone: one measured, one proved to be zero, on one pair if that can be."""
        plan, picked = self.plan, {}
        chance = random.Random(f"{plan.model}, {len(plan.rows)} rows, {plan.pairs} pairs, {plan.jobs} jobs")
        jobs = [(job.pair, job.row) for group in plan.groups for batch in group.batches for job in batch.jobs]
        zeros = [(int(pair), int(row)) for row, pair in np.argwhere(np.isin(plan.proofs, PROVED))]
        if jobs:
            pair, row = chance.choice(jobs)
            picked[pair] = [row]
            zeros = [z for z in zeros if z[0] == pair] or zeros
        if zeros:
            pair, row = chance.choice(zeros)
            picked.setdefault(pair, []).append(row)
        return picked

    def fired(self) -> str:
        """The run has raised already if one did not."""
        return f"all {plural(self.measured.fired, 'edit')} fired" if self.measured.fired != 1 else "the edit fired"

    def unchanged(self) -> str:
        """Measured rows without any effect, to the last bit, although their edits do not write what was there."""
        took = self.plan.proofs == Proof.NONE
        still = self.measured.still & took
        numbers = np.flatnonzero(still.any(1))
        if len(numbers):
            rows = [replace(self.plan.rows[number], saves=[]) for number in numbers]
            # Without pruning, rows are measured that had to be without effect.
            plan = make_plan(self.architecture, self.encoded, rows, self.plan.metrics, edited=self.plan.edited)
            inert = np.isin(plan.proofs, PROVED)
            inert |= np.array([[_own(row)] for row in rows])
            took[numbers] &= ~(inert & still[numbers])
            still &= took
        count, total = int(still.sum()), int(took.sum())
        if not count or count < total or all(m.unit == JUMPS for m in self.plan.metrics):
            return f"{plural(count, 'row')} exactly unchanged"
        which = f"all {plural(count, 'row')} exactly unchanged" if count > 1 else "its one row is exactly unchanged"
        warnings.warn(
            f"The patches change nothing: {which}, to the last bit of {', '.join(m.name for m in self.plan.metrics)}. "
            "What they write was there already (a neuron that is off) or cannot matter (a query of position 0), the "
            "metric is saturated, or the model does not use what is written: see whether something large changes it.",
            MeasurementWarning,
            stacklevel=4,
        )
        return f"patches change nothing: {which}"

    def _allowed(self) -> NDArray[np.float64]:
        """What rounding may change, per column."""
        values = np.concatenate(list(self.measured.baselines.values()))
        scale = np.fmax(self.architecture.logit_scale, np.nanmax(abs(values), 0))
        return np.asarray(2 * _rounding(self.architecture.dtype) * (1 + scale))

    def _judge(self, gap: NDArray[np.float64], what: str, advice: str) -> None:
        units = {metric.name: metric.unit for metric in self.plan.metrics}
        over = [
            (name, part, limit)
            for (name, part), found, limit in zip(self.measured.columns, gap, self._allowed(), strict=True)
            if found > limit and units[name] != JUMPS
        ]
        if not over:
            return
        name, part, limit = next((o for o in over if units[o[0]] in BOUNDED), over[0])
        dtype, column = str(self.architecture.dtype).removeprefix("torch."), ".".join(filter(None, (name, part)))
        text = (
            f"{what}; rounding in {dtype} explains {_short(limit)} of {column}.\n{advice}. To take the numbers as they "
            "are, pass checks=False."
        )
        if units[name] in BOUNDED:
            raise MeasurementError(text)
        warnings.warn(
            f"{text} (The metric may jump: a unit such as 'logits' says that it does not.)",
            MeasurementWarning,
            stacklevel=5,
        )

    def _amounts(self, gap: NDArray[np.float64]) -> str:
        """A difference of each metric, with its unit."""
        columns = self.measured.columns
        return ", ".join(f"{_short(gap[columns.index((m.name, ''))])} {m.unit}".strip() for m in self.plan.metrics)


def _rounding(dtype: torch.dtype) -> float:
    """The resolution of a dtype, or of TF32 where products of float32 may use it."""
    settings: Any = torch.backends
    coarse = "tf32" in (settings.cuda.matmul.fp32_precision, settings.fp32_precision) and torch.cuda.is_available()
    return max(resolution(dtype), 4 * 2.0**-10 if coarse else 0.0)


def _only(encoded: EncodedPairs, pair: int) -> EncodedPairs:
    """One of the pairs."""
    here = slice(pair, pair + 1)
    return replace(
        encoded,
        clean_prompts=encoded.clean_prompts[here],
        corrupted_prompts=encoded.corrupted_prompts[here],
        clean=encoded.clean[here],
        corrupted=None if encoded.corrupted is None else encoded.corrupted[here],
        answer=encoded.answer[here],
        wrong=encoded.wrong[here],
        encoder=tuple(side[here] for side in encoded.encoder),
        decoder_prompts=encoded.decoder_prompts[here],
    )


def _own(row: Row) -> bool:
    """Whether a row writes its base's own values where they are."""
    return all(not edit.add and edit.source == Value(row.base, edit.site) for edit in row.edits)


def _short(number: float) -> str:
    return f"{number:.1g}".replace("e-0", "e-")
