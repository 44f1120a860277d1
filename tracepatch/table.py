"""Where the tokens of a batch stand: rows side by side in lanes, each from the layer and position of its first edit.

A batch is a table ``[lane, slot]`` of tokens that grows as it climbs. A row joins in the layer of its first edit, with
the unpatched stream of its base there, and brings its tokens from its first changed position on: what stands before
that, and below, is the base's and need not be computed again. What earlier tokens are attended to comes from a cache of
the base's keys and values, or, in a batch that computes the worlds too, from the world's own tokens in the same lane.

The forms differ in who sits where, and in who makes the mask. ``packed``: rows of any start and layer share a lane, and
a mask lets a token see its own row and, before the row's start, its base. ``staggered``: one row a lane and one start a
batch, so that the model's own masks are right; for models that do not take masks and rotary tables from outside.
(``flat`` batches have no table: every row is a whole prompt, from the first layer on.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from operator import attrgetter
from typing import Literal, TypeAlias

from tracepatch.jobs import Job

Form: TypeAlias = Literal["packed", "staggered", "flat"]
FORMS: tuple[Form, ...] = ("packed", "staggered", "flat")
Run: TypeAlias = tuple[int, str]
"""A pair and one of its worlds."""
Shape: TypeAlias = tuple[tuple[int, int], ...]
"""Lanes and slots of a table in each layer, and above them."""
ORDER = attrgetter("birth", "start")
"""In which order rows are seated: by layer, the longest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The seats of a batch.

    Attributes:
        form: ``packed`` or ``staggered``.
        jobs: Who sits here: the worlds that are computed here, an unpatched witness, then the patched rows.
        worlds: How many of them are worlds.
        end: One more than the last position that is read: what stands after it is not computed.
        prefix: Cached positions before the table.
        first: The first layer that is computed.
        seats: Per job, its lane and its first slot.
        shape: Lanes and slots in each layer that is computed, and above them.
        lanes: Per lane, whose prefix stands before it.
        paths: Where the positions of a world stand that is computed here: its lane, and a slot for each position.
    """

    form: Form
    jobs: tuple[Job, ...]
    worlds: int
    end: int
    prefix: int
    first: int
    seats: tuple[tuple[int, int], ...]
    shape: Shape
    lanes: tuple[Run, ...]
    paths: dict[Run, tuple[int, tuple[int, ...]]]

    def length(self, number: int) -> int:
        """Tokens that a job brings."""
        return self.end - self.jobs[number].start

    def cell(self, number: int, position: int) -> tuple[int, int]:
        """Where a position of a job stands: lane and slot."""
        lane, slot = self.seats[number]
        return lane, slot + position - self.jobs[number].start

    def key(self, number: int, position: int) -> int:
        """Where attention finds the key of a position, for a job's tokens."""
        job = self.jobs[number]
        if position >= job.start:
            return self.prefix + self.cell(number, position)[1]
        return self.paths[job.pair, job.base][1][position] if self.worlds else position

    def in_layer(self, layer: int) -> tuple[int, int]:
        """Lanes and slots in a layer."""
        return self.shape[min(max(layer, 0), len(self.shape) - 1)]

    @property
    def tokens(self) -> int:
        """Tokens at the top, with those that only fill lanes up."""
        lanes, slots = self.shape[-1]
        return lanes * slots


def seat(jobs: Sequence[Job], form: Form, depth: int, end: int, *, worlds: Sequence[Job] = (), lanes: int = 1) -> Table:
    """Gives every row a lane and a slot: the longest first, in the order of birth, to the emptiest lane of its world.

    Args:
        jobs: The witness and the rows.
        form: ``packed`` or ``staggered``.
        depth: Layers that are computed.
        end: One more than the last position that is read.
        worlds: The worlds that this batch computes, those of one pair one after the other, the whole one first. Only
            packed batches do.
        lanes: How many lanes to use where the worlds are not computed here; at least one for each world.
    """
    fill: list[int] = []
    lanes_of: dict[Run, list[int]] = {}
    at: dict[int, tuple[int, int]] = {}
    paths: dict[Run, tuple[int, tuple[int, ...]]] = {}
    whole: dict[int, Run] = {}
    for world in worlds:
        run = world.pair, world.base
        if world.pair not in whole:
            whole[world.pair] = run
            fill.append(0)
        lane = len(fill) - 1  # the other world too, or its lane would be as long and nearly empty
        lanes_of[run] = [lane]
        at[id(world)] = lane, fill[lane]
        before = paths[whole[world.pair]][1][: world.start] if world.start else ()
        paths[run] = lane, (*before, *range(fill[lane], fill[lane] + end - world.start))
        fill[lane] += end - world.start
    owners = list(whole.values())
    waiting = sorted(jobs, key=ORDER)
    if form == "staggered":
        owners = [(job.pair, job.base) for job in waiting]
        seats, shape = [(lane, 0) for lane in range(len(waiting))], _grown(waiting, depth, end)
    else:
        if not worlds:
            owners, lanes_of = _dealt(_load(jobs, end), lanes)
        seats, shape = _filled(_turns(waiting, lanes_of, end), lanes_of, fill or [0] * len(owners), depth)
    at.update(zip(map(id, waiting), seats, strict=True))
    everyone = (*worlds, *jobs)
    return Table(
        form=form,
        jobs=everyone,
        worlds=len(worlds),
        end=end,
        prefix=0 if worlds else max([job.start for job in jobs]),
        first=0 if worlds else min(waiting[0].birth, depth - 1),
        seats=tuple([at[id(job)] for job in everyone]),
        shape=shape,
        lanes=tuple(owners),
        paths=paths,
    )


def shapes(jobs: Sequence[Job], depth: int, end: int, lanes: Iterable[int]) -> Iterator[Shape]:
    """The shape of each packed table that ``seat`` would make of the same rows with so many lanes."""
    waiting, load = sorted(jobs, key=ORDER), _load(jobs, end)
    turns = _turns(waiting, load, end)
    for count in lanes:
        owners, lanes_of = _dealt(load, count)
        yield _filled(turns, lanes_of, [0] * len(owners), depth)[1]


def _load(jobs: Sequence[Job], end: int) -> dict[Run, int]:
    """Tokens of each world's rows."""
    load: dict[Run, int] = defaultdict(int)
    for job in jobs:
        load[job.pair, job.base] += end - job.start
    return load


def _dealt(load: dict[Run, int], lanes: int) -> tuple[list[Run], dict[Run, list[int]]]:
    """Whose each lane is, and the lanes of each world: more where there is most to hold."""
    owners: list[Run] = []
    lanes_of: dict[Run, list[int]] = {run: [] for run in load}
    for lane in range(max(lanes, len(load))):
        run = max(load, key=lambda r: (not lanes_of[r], load[r] / max(1, len(lanes_of[r]))))
        lanes_of[run].append(lane)
        owners.append(run)
    return owners, lanes_of


def _turns(waiting: Sequence[Job], runs: Iterable[Run], end: int) -> list[tuple[int, int, int]]:
    """Layer and tokens of each row, and which of the worlds is its own."""
    number = {run: i for i, run in enumerate(runs)}
    return [(job.birth, end - job.start, number[job.pair, job.base]) for job in waiting]


def _filled(
    turns: Sequence[tuple[int, int, int]], lanes_of: dict[Run, list[int]], fill: list[int], depth: int
) -> tuple[list[tuple[int, int]], Shape]:
    """Lane and first slot of each row, and the shape of the packed table.

    Args:
        turns: The rows in the order in which they are seated, each with the number of its world among `lanes_of`.
        lanes_of: The lanes of each world.
        fill: How many slots of each lane are taken.
        depth: Layers that are computed.
    """
    many = len(fill)
    longest = max(fill) * many
    # A lane is one number, its slots before its own number, so that the emptiest, and of these the first, is the least.
    lane_alone = [[slots * many + lane] for lane, slots in enumerate(fill)]  # worlds of a pair may share it
    queues = [
        lane_alone[own[0]] if len(own) == 1 else [fill[lane] * many + lane for lane in own] for own in lanes_of.values()
    ]
    taken: list[int] = []
    shape: list[tuple[int, int]] = []
    for birth, tokens, world in turns:
        while len(shape) < birth:
            shape.append((many, longest // many))
        queue = queues[world]
        least = queue[0]
        taken.append(least)
        after = least + tokens * many
        heapreplace(queue, after)
        longest = max(longest, after)
    shape += [(many, longest // many)] * (depth + 1 - len(shape))
    return [(least % many, least // many) for least in taken], tuple(shape)


def _grown(waiting: Sequence[Job], depth: int, end: int) -> Shape:
    """The shape of a staggered table, in which every row has a lane."""
    found = []
    for layer in range(depth + 1):
        inside = [end - job.start for job in waiting if job.birth <= layer]
        found.append((len(inside), max(inside, default=0)))
    return tuple(found)
