"""Steps of a run, and how they are taken here: operations on the model, and what is made of what they return.

A step is taken whole: its operations (``program.operate``) follow each other, and its numbers are read when the last
one has returned. Where there is not enough memory for a step, smaller ones are taken instead.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, TracepatchError
from tracepatch.firing import each_once
from tracepatch.meter import Meter, metered
from tracepatch.models import Model, eager_attention, module_of
from tracepatch.plan import Batch
from tracepatch.program import LASTING, operate
from tracepatch.traced import Call


@dataclass(frozen=True)
class Step:
    """Operations that belong together.

    Attributes:
        ops: As ``program.operate`` takes them, each with the call that it makes, if it makes one.
        failed: An error of one of them, by its number, in words.
        digest: What is made of what they returned: of the step, or of the smaller ones that were taken instead.
        smaller: Steps that do the same and need less memory, if there are any.
        batch: The batch that is run, if one is.
        at_once: Of the worlds, how many prompts a run has, where that is not left to the budget.
        instead: Smaller steps that are taken from the start, as an earlier run had to, so that all rounds alike.
    """

    ops: tuple[tuple[tuple[Any, ...], Call | None], ...]
    failed: Callable[[int, Exception], MeasurementError]
    digest: Callable[[list[Taken]], None] = field(default=lambda taken: None)
    smaller: Callable[[], list[Step]] = field(default=list)
    batch: Batch | None = None
    at_once: int = 0
    instead: tuple[Step, ...] = ()

    @property
    def rows(self) -> int:
        """Patched rows that it measures."""
        return len(self.batch.jobs) if self.batch else 0


Taken = tuple[Step, list[Any]]
"""A step, and what each of its operations returned."""


class Runner(Protocol):
    """What takes steps, here or elsewhere."""

    ran: dict[str, str]
    """Where the model runs, as a server says; empty here."""
    forwards: float | None
    """Whole forwards that were traced, counted in tokens and layers; ``None`` where they cannot be seen."""
    peak: int | None
    """Bytes taken beside the model; ``None`` where that cannot be seen."""

    def ready(self) -> Any:
        """A context in which steps are taken."""

    def go(self, groups: Iterable[tuple[Step, Iterable[Step]]]) -> None:
        """Of each group, takes the step that makes the worlds known, and then those that need them.

        Each step is digested once it is taken.

        Raises:
            MeasurementError: One failed.
        """


class Here:
    """Takes steps in this process."""

    def __init__(self, model: Model, architecture: Architecture, eager: bool) -> None:
        self._model, self._architecture, self._eager = model, architecture, eager
        self._lasting: dict[Any, Any] = {}
        self.ran: dict[str, str] = {}
        self.forwards: float | None = None
        self._meter: Meter | None = None
        self.peak: int | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """With attention as it is needed, and little for the collector to look through after each run."""
        gc.freeze()
        try:
            with eager_attention(module_of(self._model)) if self._eager else nullcontext():
                yield
        finally:
            gc.unfreeze()

    def go(self, groups: Iterable[tuple[Step, Iterable[Step]]]) -> None:
        """Takes one operation after the other; see ``Runner``."""
        self.forwards = 0.0
        with metered(self._model, self._architecture) as self._meter:
            for lead, steps in groups:
                known = dict(self._lasting)
                for step in itertools.chain([lead], steps):
                    step.digest(self._taken(step, known))
        self.forwards, self.peak = None if self._meter.cells is None else self.forwards, self._meter.peak

    @property
    def _counted(self) -> int:
        return 0 if self._meter is None or self._meter.cells is None else self._meter.cells

    def _taken(self, step: Step, known: dict[Any, Any]) -> list[Taken]:
        several: Sequence[Step] = step.instead
        if not several:
            before = set(known)
            try:
                return [(step, [self._operated(step, number, known) for number in range(len(step.ops))])]
            except MeasurementError as error:
                several = step.smaller() if isinstance(error.__cause__, torch.OutOfMemoryError) else ()
                if not several:
                    raise
            for key in set(known) - before:  # what was begun
                del known[key]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return [taken for one in several for taken in self._taken(one, known)]

    def _operated(self, step: Step, number: int, known: dict[Any, Any]) -> Any:
        op, call = step.ops[number]
        cells = self._counted
        try:
            with each_once(module_of(self._model), call.once if call else ()):
                found = operate(self._model, op, known)
        except TracepatchError:
            raise
        except Exception as error:
            raise step.failed(number, error) from error
        whole = len(self._architecture) * (call.prompts.length if call else _length(op))
        self.forwards = (self.forwards or 0.0) + (self._counted - cells) / whole
        gc.collect()  # a trace ends as a circle, with every activation of its run in it
        self._lasting |= {key: value for key, value in known.items() if key[0] in LASTING}
        return found


def _length(op: tuple[Any, ...]) -> int:
    """Tokens of a prompt that an operation runs; 1 of one that runs none."""
    inputs = op[2][0] if op[0] == "add" else op[1] if op[0] == "raw" else {}
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return 1 if ids is None else int(ids.shape[-1])
