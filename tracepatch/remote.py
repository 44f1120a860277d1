"""Steps taken on a server: as many in one request as are worth waiting for together, after the worlds that they need.

What is known of the worlds lives as long as a request does, so each begins with the step that makes it. What a request
gives is read, and kept, before the next is sent. Where a server does not say which step failed, it is found by sending
fewer at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from tracepatch.costs import REQUEST_BYTES, REQUEST_ROWS, REQUEST_STEPS
from tracepatch.errors import ServerError
from tracepatch.models import Model, eager_attention, module_of, name_of
from tracepatch.requests import JobError, ask, place
from tracepatch.steps import Step, Taken

SECONDS = 60.0  # after which a request begins no further step: what it has is brought home first
MEMORY = ("out of memory", "can't allocate memory")
# A job that is out of time is told so, or is interrupted in a trace, which then has no result.
TIME = ("execution timeout", "local variable 'result'")


@dataclass(eq=False)
class _Task:
    """A step, the parts that are taken instead where it does not fit, and the lead that it needs.

    Attributes:
        step: What was asked for.
        lead: What makes the worlds known that it needs; ``None`` of a lead itself.
        parts: What is left to take of it.
        taken: What its other parts gave.
        alone: Whether its parts go into requests of their own, so that it is known which one fails.
        read: Whether it has been digested: a lead may be needed again.
    """

    step: Step
    lead: _Task | None
    parts: list[Step] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    alone: bool = False
    read: bool = False

    def __post_init__(self) -> None:
        self.parts = list(self.step.instead) or [self.step]

    @property
    def ops(self) -> list[tuple[Any, ...]]:
        """All operations; a lead begins by forgetting what was known."""
        own = [op for part in self.parts[: 1 if self.alone else None] for op, _ in part.ops]
        return own if self.lead is not None else [("forget",), *own]

    def take(self, found: list[Any]) -> bool:
        """Reads what the operations returned, once all parts have been taken; whether they have."""
        rest = iter(found if self.lead is not None else found[1:])
        several = self.parts[: 1 if self.alone else None]
        taken: list[Taken] = [(part, list(itertools.islice(rest, len(part.ops)))) for part in several]
        if self.read:
            return True
        self.taken += taken
        left = self.parts[len(several) :]
        if left:
            self.parts = left
            return False
        if self.lead is None:  # it is needed again
            self.parts = [part for part, _ in self.taken]
        self.read, self.alone = True, False
        self.step.digest(self.taken)
        self.taken = []
        return True

    def divided(self, number: int | None, error: JobError) -> None:
        """Takes smaller steps instead of the part whose operation did not fit.

        Args:
            number: Of the operation that failed, if that is known.
            error: Of it.

        Raises:
            MeasurementError: It failed for another reason, or cannot be made smaller.
        """
        several = self.parts[: 1 if self.alone else None]
        if number is None and len(several) > 1:
            self.alone = True
            return
        ends = list(itertools.accumulate(len(part.ops) for part in several))
        number = ends[-1] - 1 if number is None else max(0, number - (self.lead is None))
        at = next(i for i, end in enumerate(ends) if number < end)
        part = several[at]
        short = error.kind == "OutOfMemoryError" or any(words in str(error) for words in MEMORY)
        smaller = part.smaller() if short or any(words in str(error) for words in TIME) else []
        if not smaller:
            cause = torch.OutOfMemoryError(str(error)) if short else error
            raise part.failed(number - ends[at] + len(part.ops), cause) from error
        self.parts[at : at + 1] = smaller


class There:
    """Takes steps on the server that the model was loaded for."""

    def __init__(self, model: Model, eager: bool, say: Callable[[str], None]) -> None:
        self._model, self._eager, self._say = model, eager, say
        self.ran: dict[str, str] = {}
        self.forwards: float | None = None
        self.peak: int | None = None
        self.requests = 0

    def ready(self) -> AbstractContextManager[None]:
        """With the client's attention as it is needed: the server's follows."""
        return eager_attention(module_of(self._model)) if self._eager else nullcontext()

    def go(self, groups: Iterable[tuple[Step, Iterable[Step]]]) -> None:
        """Takes the steps of all groups in a few requests; see ``steps.Runner``.

        Raises:
            MeasurementError: A step failed.
            ServerError: The server cannot be asked, or runs something else than was planned on.
        """
        source, waiting, most = _tasks(groups), deque[_Task](), REQUEST_STEPS
        while True:
            tasks = list(_chunk(waiting, source, most))
            if not tasks:
                return
            again = [tasks[0].lead] if tasks[0].lead is not None else []
            try:
                done, failed = self._asked([*again, *tasks])
            except JobError as error:  # which does not say where
                if len(tasks) > 1:
                    most = len(tasks) // 2
                    waiting.extendleft(reversed(tasks))
                    continue
                done, failed = len(again), (tasks[0], None, error)
            most = min(REQUEST_STEPS, 2 * most)
            waiting.extendleft(reversed(tasks[max(0, done - len(again)) :]))
            if failed is not None:
                task, number, why = failed
                task.divided(number, why)

    def _asked(self, tasks: list[_Task]) -> tuple[int, tuple[_Task, int | None, JobError] | None]:
        """Reads what these tasks gave; how many did, and the one that failed, with the number of its operation."""
        ops = [task.ops for task in tasks]
        sure = sum(map(len, ops[:2]))
        answer = ask(self._model, list(itertools.chain(*ops)), sure, SECONDS, self._say)
        self.requests += 1
        self._require_same(answer["ran"])
        if answer["error"] is not None and answer["error"][0] == "Sandbox":
            raise ServerError(
                f"{place(self._model)} runs what your key sends in a sandbox, and {answer['error'][1]}. Or ask for a "
                "key that it trusts, or run the model here."
            )
        found, end = answer["found"], 0
        if len(found) < sure and answer["error"] is None:
            raise ServerError(
                f"{place(self._model)} returned {len(found)} of {sure} results, and no error: report this."
            )
        for done, (task, own) in enumerate(zip(tasks, ops, strict=True)):
            if end + len(own) > len(found):
                failed = answer["error"]
                told = None if failed is None else (task, len(found) - end, JobError(failed[1], failed[0]))
                return done, told
            if not task.take(found[end : end + len(own)]):
                return done, None
            end += len(own)
        return len(tasks), None

    def _require_same(self, ran: dict[str, str]) -> None:
        self.ran = ran
        wanted = str(module_of(self._model).dtype)
        if ran["dtype"] != wanted:
            raise ServerError(
                f"{place(self._model)} runs {name_of(self._model)} in {ran['dtype']}, and it was planned on in "
                f"{wanted}: load it with tp.load(…, dtype={ran['dtype'].removeprefix('torch.')!r})."
            )


def _tasks(groups: Iterable[tuple[Step, Iterable[Step]]]) -> Iterator[_Task]:
    """All steps in order, each group's lead before those that need it."""
    for lead, steps in groups:
        first = _Task(lead, None)
        yield first
        yield from (_Task(step, first) for step in steps)


def _chunk(waiting: deque[_Task], source: Iterator[_Task], most: int) -> Iterator[_Task]:
    """The next tasks that fit in one request."""
    rows = size = 0
    for count in range(most):
        task = waiting.popleft() if waiting else next(source, None)
        if task is None:
            return
        rows, size = rows + task.step.rows, size + sum(map(_size, task.ops))
        if count and (rows > REQUEST_ROWS or size > REQUEST_BYTES):
            waiting.appendleft(task)
            return
        yield task


def _size(value: Any) -> int:
    """Bytes of the tensors in an operation, about."""
    if isinstance(value, torch.Tensor):
        return value.numel() * (value.element_size() if value.is_floating_point() else 2)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0
