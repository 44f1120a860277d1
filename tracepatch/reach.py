"""Whether what is written can reach what is read, and how many layers a forward must compute for it.

Three facts carry it. What a forward has computed is not changed by what it computes later. Between positions only
attention carries, and only to later ones, as the probe proved. And an edit writes its own cells.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.errors import SiteError
from tracepatch.jobs import Job, Read, Write
from tracepatch.metrics import Metric
from tracepatch.sites import SPLIT_READERS, Site, component

# What attention of the same layer carries to other positions.
CARRIED = frozenset({"embed", "resid_pre", "attn_in", "k_in", "v_in", "attn_in_scale", "k", "v"})
# What of a layer rests on its own position of the stream that enters.
ENTERING = frozenset({"embed", "resid_pre", "attn_in", "q_in", "k_in", "v_in", "attn_in_scale"})
BESIDE = ENTERING | set(SPLIT_READERS.values())  # what single heads read leaves alone, but for one
EVERY = range(sys.maxsize)  # any position
LAST = frozenset({"logits_in", "logits_in_scale", "logits"})  # after the last layer
COMPARED = frozenset({"next", "clean", "corrupted"})  # what a metric may need of another prompt's positions


@dataclass(frozen=True, slots=True)
class Cells:
    """What a site is in prompts of one length.

    Attributes:
        place: Component and layer, one name for each place of the stream.
        positions: The positions.
        offsets: As many numbers from 0 on.
        units: Heads or neurons; ``None`` for all, or where there are none.
        srcs: The positions attended to; ``None`` for all, or where there are none.
        scalar: Whether the index was one integer: for positions, units, sources.
        split: Whether it has units.
        attends: Whether it has positions that are attended to.
    """

    place: tuple[str, int]
    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None
    scalar: tuple[bool, bool, bool]
    split: bool
    attends: bool


def canonical(site: Site, depth: int) -> tuple[str, int]:
    """Component and layer, one name for each place of the stream."""
    if site.component == "resid_post":
        return "resid_pre", site.layer + 1
    if site.component == "logits_in":
        return "resid_pre", depth
    return site.component, depth if site.component == "logits_in_scale" else site.layer


def indices(
    site: Site, architecture: Architecture, side: Side, crossing: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]:
    """Positions, units and sources of a site in a prompt; ``None`` for all units or sources, or where there are none.

    Args:
        site: The place.
        architecture: Of the model.
        side: The prompt.
        crossing: Whether values go from one prompt of the pair to the other; see ``Select.on``.

    Raises:
        SiteError: The prompt has no such position.
    """
    positions = site.pos.on(side, crossing)
    if not positions:
        raise SiteError(str(site))
    units = None if site.unit.all else site.unit.resolve(architecture.units(site.component, site.layer))
    partly = crossing and side.aligned is not None and component(site.component).attends
    if site.src.all and not partly:
        return positions, units, None
    srcs = site.src.on(side, crossing)
    if not srcs:
        raise SiteError(str(site))
    return positions, units, srcs


def read_at(number: int, site: Site, reduce: Callable[..., Any] | None, architecture: Architecture, side: Side) -> Read:
    """A site that is saved, or read by a metric, in a prompt.

    Raises:
        SiteError: It has no such position.
    """
    kind = component(site.component)
    positions, units, srcs = indices(site, architecture, side)
    count = architecture.units(site.component, site.layer)
    if srcs is not None and units is None:  # indexed dims stand side by side
        units = tuple(range(count))
    size = len(positions) * (len(units) if units is not None else max(1, count))
    if kind.attends:
        size *= side.length if srcs is None else len(srcs)
    elif kind.dims[-1] not in kind.index:
        size *= architecture.width(site.component, site.layer)
    depth = len(architecture)
    name, layer = ("logits", depth) if site.component == "logits" else canonical(site, depth)
    scalar = site.pos.scalar, site.unit.scalar, site.src.scalar
    return Read(number, name, layer, positions, units, srcs, scalar, reduce, size)


def scored_at(metric: Metric, side: Side) -> tuple[int, ...] | None:
    """The positions whose logits a metric reads in a prompt; ``None`` if it lacks one of them.

    Where it compares a run with another prompt, ``:`` are the positions that have a partner there.
    """
    return metric.positions.on(side, bool(COMPARED & set(metric.needs)))


def of_logits(positions: tuple[int, ...], depth: int) -> Read:
    """Logits, as something that is read."""
    return Read(-1, "logits", depth, positions, None, None, (False, False, False), None, 0)


def reached(
    architecture: Architecture, write: Write, read: Read, carried: bool = False, mixed: bool = False
) -> Container[int]:
    """The positions at which what is written may change what is read.

    Args:
        architecture: Of the model.
        write: The edit; its positions do not matter.
        read: What is read.
        carried: Whether a later function of the row may carry the edit to other positions.
        mixed: Whether a function of the row may carry it to other units.
    """
    if architecture.span(write.component, write.layer)[0] > architecture.span(read.component, read.layer)[1]:
        return ()  # it has passed by
    if carried:
        return EVERY
    if (write.component, write.layer) == (read.component, read.layer):
        apart = None not in (write.units, read.units) and not {*(write.units or ())} & {*(read.units or ())}
        return read.positions if mixed or not apart else ()
    if write.component in SPLIT_READERS and read.layer == write.layer and read.component in BESIDE:
        made = SPLIT_READERS[write.component]
        return read.positions if read.component == made else ()  # of which it alone is taken
    depth = len(architecture)
    # The first attention that may carry it to other positions, and the last one before what is read.
    first = write.layer + (write.component not in CARRIED)
    last = read.layer - (read.component in ENTERING or read.layer >= depth)
    unknown = component(write.component).module or component(read.component).module
    return range(max(read.positions) + 1) if unknown or first <= last else read.positions


def cells(
    site: Site,
    depth: int,
    positions: tuple[int, ...],
    units: tuple[int, ...] | None,
    srcs: tuple[int, ...] | None,
) -> Cells:
    """What a site is, given its positions, units and sources; see ``indices``."""
    kind, scalar = component(site.component), (site.pos.scalar, site.unit.scalar, site.src.scalar)
    offsets, split = tuple(range(len(positions))), kind.unit is not None
    return Cells(canonical(site, depth), positions, offsets, units, srcs, scalar, split, kind.attends)


def layers_of(architecture: Architecture, name: str, layer: int) -> int:
    """How many layers a forward computes until a value is there; one more than there are for what is above them all."""
    depth = len(architecture)
    if name in LAST:
        return depth + 1
    return layer if name == "resid_pre" else 0 if name == "embed" else layer + 1


def layers_needed(architecture: Architecture, reads: Iterable[Read], jobs: Iterable[Job]) -> int:
    """How many layers the forwards of a plan compute; one more than there are where also what is above them all.

    Args:
        architecture: Of the model.
        reads: What metrics read.
        jobs: The rows that are measured, and edited worlds.
    """
    jobs = list(jobs)
    reached = {(read.component, read.layer) for read in (*reads, *(r for job in jobs for r in job.reads))}
    reached |= {(w.component, w.layer) for job in jobs for w in job.writes}
    reached |= {key for job in jobs for w in job.writes for key in w.needed}
    return max(1, *(layers_of(architecture, name, layer) for name, layer in reached))
