"""Shadow rows: batch elements that read an edited stream, so that single heads' q, k or v are taken of it.

A head's reader has no place of its own: norms and projections are shared. So the edited stream goes through the model's
own code in a row of its own, and only the head's part of what comes out is written into the row that is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from tracepatch.architecture import Architecture
from tracepatch.jobs import Job, streams
from tracepatch.layout import Columns, Key, Seats, Shadows, columns, index
from tracepatch.sites import SPLIT_READERS


def shadow_columns(
    jobs: Iterable[Job],
    architecture: Architecture,
    seats: Seats,
    first: int,
    reads: dict[Key, tuple[Columns, ...]] | None = None,
) -> tuple[dict[Key, Shadows], int]:
    """The edits of what single heads read, with the shadow rows, from ``first`` on, that read the edited streams.

    Rows that only save what single heads read are among the members, and have no shadows.

    Returns:
        (component, layer) → its shadows, and how many shadow rows there are.
    """
    jobs = list(jobs)
    members: dict[Key, list[int]] = defaultdict(list)  # the jobs that edit there
    seen = {key for key, found in (reads or {}).items() for (kind, _), *_ in found if kind == "metric"}
    seen = {key for key in seen if key[0] in SPLIT_READERS}
    for number, job in enumerate(jobs):
        saved = {(read.component, read.layer) for read in job.reads if read.component in SPLIT_READERS}
        for place in saved | seen | set(streams(job.writes)):
            members[place].append(number)
    found: dict[Key, Shadows] = {}
    taken: dict[int, int] = defaultdict(int)
    for (name, layer), numbers in sorted(members.items()):
        own = [
            replace(jobs[n], writes=tuple(w for w in jobs[n].writes if (w.component, w.layer) == (name, layer)))
            for n in numbers
        ]
        writes = columns(own, architecture, seats, split=True).get((name, layer), ())
        rows, reading, member_of, unit_of = [], [], [], []
        cells: list[tuple[int, int, int, int]] = []
        for member, (number, job) in enumerate(zip(numbers, own, strict=True)):
            rows.append(number)
            for units in streams(job.writes).get((name, layer), ()):
                seat = first + taken[layer]
                taken[layer] += 1
                reading.append(seat)
                member_of.append(member)
                unit_of.append(units[0])
                for unit in units:
                    positions = sorted({p for w in job.writes if unit in (w.units or ()) for p in w.positions})
                    cells += [(number, p, unit, seat) for p in positions]
        saves = tuple(
            (n, (torch.searchsorted(torch.tensor(rows), at[0]), *at[1:]), *how)
            for n, at, *how in (reads or {}).get((name, layer), ())
        )
        found[name, layer] = (
            (index(rows), writes, saves),
            (index(reading), index(member_of), index(unit_of)),
            tuple(index(list(column)) for column in zip(*cells, strict=True)),
        )
    return found, max(taken.values(), default=0)
