"""A bar over rows, for people at a terminal: how many are done, how fast, and how long the rest will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


@dataclass(frozen=True)
class Told:
    """What a run is told to call while it runs.

    Attributes:
        advance: With the number of rows that have been done.
        say: With a few words on what is being waited for.
    """

    advance: Callable[[int], None] = lambda done: None
    say: Callable[[str], None] = lambda words: None


@contextmanager
def bar(total: int, what: str, wanted: bool | None = None, stored: int = 0) -> Iterator[Told]:
    """A progress bar on stderr; nothing where it is not a terminal.

    Args:
        total: All rows.
        what: What they are run on.
        wanted: Whether to show it; by default only on a terminal.
        stored: Rows that are done before it begins, which say nothing about the rate.

    Yields:
        What is called with the number of rows that have been done, and with words on what is being waited for.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield Told()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Pace(stored))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total, completed=stored)
        yield Told(
            lambda done: shown.advance(task, done), lambda words: shown.update(task, description=f"{what}: {words}")
        )


class _Pace(ProgressColumn):
    """The words behind the bar."""

    def __init__(self, stored: int) -> None:
        super().__init__()
        self._stored = stored

    def render(self, task: Task) -> Text:
        """The words for a task."""
        return Text(pace(int(task.completed), int(task.total or 0), task.elapsed or 0.0, self._stored))


def pace(done: int, total: int, seconds: float, stored: int = 0) -> str:
    """Rows done, rate, time left and time taken, in words.

    Args:
        done: Rows that are done, those that were stored among them.
        total: All rows.
        seconds: Since the run began.
        stored: Rows that were done before.
    """
    words = [f"{done:,}/{total:,} rows"]
    rate = (done - stored) / seconds if seconds else 0.0
    if rate:
        words += [f"{rate:,.0f} rows/s" if rate >= 10 else f"{rate:.2g} rows/s", f"{_time((total - done) / rate)} left"]
    return " · ".join([*words, f"{_time(seconds)} so far"])


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
