"""Which tables of reference worlds a plan takes values of, and the runs that make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from tracepatch.architecture import Architecture
from tracepatch.jobs import Job, parts
from tracepatch.reach import layers_of
from tracepatch.references import ReferenceWorld, Survey, Tally
from tracepatch.sites import Select


def surveys(
    architecture: Architecture, references: Sequence[ReferenceWorld], jobs: Iterable[Job], at_once: int, ends: bool
) -> Iterator[Survey]:
    """The surveys of a plan: of each reference world the tables that its rows and worlds take values of.

    Args:
        architecture: Of the model.
        references: The reference worlds.
        jobs: The rows that are measured, and edited worlds.
        at_once: Prompts that memory has room for in one run.
        ends: Whether forwards of the model may end above the last layer that is read.
    """
    taken: dict[str, dict[Tally, None]] = {}
    for tally in (t for job in jobs for write in job.writes for t in write.tallies):
        taken.setdefault(tally.world, {})[tally] = None
    for world in references:
        tallies = tuple(sorted(taken.get(world.name, ()), key=lambda t: t.key))
        if not tallies:
            continue
        until = max(1, *(layers_of(architecture, t.component, t.layer) for t in tallies))
        partners = any(isinstance(way, Select) and way.of for t in tallies for way in (t.along, t.src))
        alike = parts(range(len(world.ids)), partial(_size, world, partners), at_once)
        yield Survey(world, tallies, tuple(map(tuple, alike)), until if ends else len(architecture) + 1)


def cost(architecture: Architecture, found: Survey) -> float:
    """Whole forwards that a survey is, each of one of its prompts."""
    depth = len(architecture)
    return len(found.world.ids) * min(found.until, depth) / depth


def _size(world: ReferenceWorld, partners: bool, number: int) -> tuple[Any, ...]:
    """The same for prompts that can be run side by side: equally long, with what is taken at the same places."""
    read, side = len(world.encoder[number]) if world.encoder else 0, world.sides[number]
    return side.length, read, side.spans, (side.aligned, side.partners) if partners else None
