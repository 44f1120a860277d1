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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tracepatch.jobs import Job

Form: TypeAlias = Literal["packed", "staggered", "flat"]
FORMS: tuple[Form, ...] = ("packed", "staggered", "flat")
Run: TypeAlias = tuple[int, str]
"""A pair and one of its worlds."""


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
    shape: tuple[tuple[int, int], ...]
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
    owners: list[Run] = []
    at: dict[int, tuple[int, int]] = {}
    lanes_of: dict[Run, list[int]] = defaultdict(list)
    paths: dict[Run, tuple[int, tuple[int, ...]]] = {}
    whole: dict[int, Run] = {}
    for world in worlds:
        run = world.pair, world.base
        if world.pair not in whole:
            whole[world.pair] = run
            fill.append(0)
            owners.append(run)
        lane = len(fill) - 1  # the other world too, or its lane would be as long and nearly empty
        lanes_of[run] = [lane]
        at[id(world)] = lane, fill[lane]
        before = paths[whole[world.pair]][1][: world.start] if world.start else ()
        paths[run] = lane, (*before, *range(fill[lane], fill[lane] + end - world.start))
        fill[lane] += end - world.start
    if form == "packed" and not worlds:
        load: dict[Run, int] = defaultdict(int)
        for job in jobs:
            load[job.pair, job.base] += end - job.start
        for _ in range(max(lanes, len(load))):  # where there is most to hold
            run = max(load, key=lambda r: (not lanes_of[r], load[r] / max(1, len(lanes_of[r]))))
            lanes_of[run].append(len(fill))
            fill.append(0)
            owners.append(run)
    waiting = sorted(jobs, key=lambda job: (job.birth, job.start))
    shape, turn = [], 0
    for layer in range(depth + 1):
        while turn < len(waiting) and waiting[turn].birth <= layer:
            job = waiting[turn]
            turn += 1
            if form == "packed":
                lane = min(lanes_of[job.pair, job.base], key=fill.__getitem__)
            else:
                lane = len(fill)
                fill.append(0)
                owners.append((job.pair, job.base))
            at[id(job)] = lane, fill[lane]
            fill[lane] += end - job.start
        shape.append((len(fill), max(fill, default=0)))
    everyone = (*worlds, *jobs)
    return Table(
        form=form,
        jobs=everyone,
        worlds=len(worlds),
        end=end,
        prefix=0 if worlds else max(job.start for job in jobs),
        first=0 if worlds else min(waiting[0].birth, depth - 1),
        seats=tuple(at[id(job)] for job in everyone),
        shape=tuple(shape),
        lanes=tuple(owners),
        paths=paths,
    )
