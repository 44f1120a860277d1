"""What a run says about itself, in one line: noise, a row measured alone, edits that fired, patches without effect.

Rounding is the yardstick. The metrics in logits, nats or probabilities move by at most twice the largest change of a
logit (a difference of two logits, or of log-probabilities, whose gradient by the logits sums to 2 in absolute value).
So ``2 · resolution(dtype) · (1 + scale)`` is more than rounding explains, where ``resolution`` allows for the sums of a
whole forward (float32 forwards of 32 layers, alone and among others, stayed 15 times below it) and the scale is that of
the logits. Other metrics may be steeper, or jump: above the limit they are warned of, and ranks, which always jump,
are only reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, MeasurementWarning, plural
from tracepatch.journal import Journal, Measured
from tracepatch.metrics import JUMPS
from tracepatch.plan import PROVED, Plan, Proof
from tracepatch.planner import make_plan
from tracepatch.probe import resolution
from tracepatch.rows import Row
from tracepatch.sources import Value
from tracepatch.tokens import EncodedPairs

BOUNDED = ("logits", "nats", "probability")  # units in which a metric follows the logits, at most twice as fast


def verify(architecture: Architecture, encoded: EncodedPairs, plan: Plan, measured: Measured, journal: Journal) -> str:
    """Checks a run that has ended; the line that says what was found.

    Raises:
        MeasurementError: Unpatched witnesses drift, or a row alone has another value than in the run, by more than
            rounding explains. The journal has forgotten the batches in which that is so.
    """
    checks = _Checks(architecture, encoded, plan, measured)
    try:
        found = [checks.eager(), checks.noise(), *checks.alone(), checks.fired(), checks.unchanged()]
    except MeasurementError:
        journal.distrust(checks.limits())
        raise
    return "; ".join(found)


@dataclass(frozen=True)
class _Checks:
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
        """A measured row, and one proved to be zero, as whole prompts with every edit left in."""
        for job, value in zip(self.plan.sample, self.measured.again, strict=True):
            yield self._compared(self.plan.rows[job.row], job.row, job.pair, value)

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

    def fired(self) -> str:
        """The run has raised already if one did not."""
        return f"all {plural(self.measured.fired, 'edit')} fired" if self.measured.fired != 1 else "the edit fired"

    def unchanged(self) -> str:
        """Measured rows without any effect, up to rounding, although their edits do not write what was there."""
        took = self.plan.proofs == Proof.NONE
        still = self.measured.still & took
        numbers = np.flatnonzero(still.any(1))
        if len(numbers):
            rows = [replace(self.plan.rows[number], saves=[]) for number in numbers]
            # Without pruning, rows are measured that had to be without effect.
            edited, references = self.plan.edited, self.plan.references
            given = self.architecture, self.encoded, rows, self.plan.metrics
            plan = make_plan(*given, edited=edited, references=references)
            inert = np.isin(plan.proofs, PROVED)
            inert |= np.array([[_own(row)] for row in rows])
            took[numbers] &= ~(inert & still[numbers])
            still &= took
        count, total = int(still.sum()), int(took.sum())
        if not count or count < total or all(m.unit in JUMPS for m in self.plan.metrics):
            return f"{plural(count, 'row')} unchanged"
        which = f"all {plural(count, 'row')} unchanged" if count > 1 else "its one row is unchanged"
        warnings.warn(
            f"The patches change nothing: {which}, up to rounding, in {', '.join(m.name for m in self.plan.metrics)}. "
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

    def limits(self) -> NDArray[np.float64]:
        """What rounding may change, per column; without end where a metric may jump."""
        units = {metric.name: metric.unit for metric in self.plan.metrics}
        bounded = [units[name] in BOUNDED for name, _ in self.measured.columns]
        return np.where(bounded, self._allowed(), np.inf)

    def _judge(self, gap: NDArray[np.float64], what: str, advice: str) -> None:
        units = {metric.name: metric.unit for metric in self.plan.metrics}
        over = [
            (name, part, limit)
            for (name, part), found, limit in zip(self.measured.columns, gap, self._allowed(), strict=True)
            if found > limit and units[name] not in JUMPS
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


def _own(row: Row) -> bool:
    """Whether a row writes its base's own values where they are."""
    return all(not edit.add and edit.source == Value(row.base, edit.site) for edit in row.edits)


def _short(number: float) -> str:
    return f"{number:.1g}".replace("e-0", "e-")
