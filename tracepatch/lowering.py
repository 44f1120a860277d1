"""From recorded rows to writes with every index resolved, without those that provably change nothing.

Pruning is exact and uses only declarations. Two facts carry it, both proved by the probe before they are used:

* Attention is causal: an activation at a position depends on the tokens up to it. So where the clean and the corrupted
  tokens agree up to a position, the worlds agree there, and writing one world's value into the other changes nothing,
  as long as no earlier edit of the same row has reached the place.
* Metrics read declared positions, of the logits or of an activation. What stands after the last of them cannot reach
  them, nor what is written after the activation has passed by; see ``reach``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import SiteError
from tracepatch.jobs import Read, Term, Write, narrowed
from tracepatch.plan import Proof
from tracepatch.profiles import Profile
from tracepatch.reach import LAST, canonical, indices, of_logits, reached, read_at
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.shapes import shape_of
from tracepatch.sites import SPLIT_READERS, Site, component, stage
from tracepatch.sources import Constant, Function, Sum, Value, WorldName

# What in layer 0 depends on its own token alone, where the probe proved it.
LOCAL = frozenset({"embed", "resid_pre", "attn_in", "attn_in_scale"})


@dataclass(frozen=True, slots=True)
class Cells:
    """What a site is in one prompt.

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


class Lowering:
    """Rows → writes, for pairs of one profile."""

    def __init__(
        self,
        architecture: Architecture,
        profile: Profile,
        prune: bool,
        worlds: tuple[WorldName, ...],
        edited: Mapping[WorldName, EditedWorld] | None = None,
    ) -> None:
        self.architecture, self.profile, self.prune, self.worlds = architecture, profile, prune, worlds
        self.depth = len(architecture)
        self.edited = edited or {}
        self.standing = {name: [edit for _, edit in standing(name, self.edited)] for name in self.edited}
        self.targets = {root: self._targets(root) for root in ("clean", "corrupted")}
        # The first position that a world's standing edits touch.
        self.first_edit = {name: self._first_of(name, edits) for name, edits in self.standing.items()}
        self._targeted = {(read.component, read.layer) for found in self.targets.values() for read in found}
        # What many rows share is found once.
        self._sites: dict[tuple[Site, WorldName, bool], Cells] = {}
        self._moments: dict[tuple[str, int], tuple[float, int, int]] = {}
        self._reach: dict[Any, frozenset[int]] = {}
        self._agreement: dict[Any, frozenset[int]] = {}

    def _targets(self, root: WorldName) -> tuple[Read, ...]:
        """What metrics read, in the prompts of a world."""
        reads = self.profile.reads_of(root)
        return self.profile.seen_of(root) + ((of_logits(reads, self.depth),) if reads else ())

    def _first_of(self, name: WorldName, edits: list[Edit]) -> int:
        side = self.profile.alignment.side(self.root(name))
        return min((min(e.site.pos.on(side) or (0,)) for e in edits), default=side.length)

    def unpruned(self) -> Lowering:
        """The same, with every write left in."""
        return Lowering(self.architecture, self.profile, False, self.worlds, self.edited)

    def world(self, name: WorldName) -> tuple[Write, ...]:
        """The writes of an edited world, those of the worlds below it first.

        Raises:
            SiteError: The prompt has no such position.
        """
        edits = sorted(self.standing[name], key=self._moment)
        return tuple(_drop_overwritten([self._write(edit, name, standing=True) for edit in edits]))

    def row(self, row: Row) -> tuple[tuple[Write, ...], Proof]:
        """The writes of a row that survive pruning; where none does, the proof."""
        if row.raw is not None:  # nothing is known of it
            return (), Proof.NONE
        edits = [(edit, True) for edit in self.standing.get(row.base, ())] + [(edit, False) for edit in row.edits]
        if len(edits) > 1:
            edits.sort(key=lambda pair: self._moment(pair[0]))
        try:
            writes = [self._write(edit, row.base, old) for edit, old in edits]
        except SiteError:
            return (), Proof.ABSENT
        if not row.edits and not self.reads(row):
            return (), Proof.ABSENT
        if len(writes) > 1:
            writes = _drop_overwritten(writes)
        if not self.prune or row.saves:  # the proofs speak of the metric; what is saved may see the edit
            return tuple(writes), Proof.NONE
        root = self.root(row.base)
        kept, live, equal, unreachable = [], self._length(root), False, False
        acting = [n for n, w in enumerate(writes) if w.function is not None]
        mixing = [n for n in acting if len(writes[n].positions) > 1]
        for number, write in enumerate(writes):
            if write.standing:
                if write.function is not None and len(write.positions) > 1:  # it may mix positions
                    live = min(live, *write.positions)
                kept.append(write)
                continue
            # A function may carry what it is given to other positions of its site.
            carried = bool(mixing) and number < mixing[-1]
            inside = self._reached(write, root, carried, mixed=bool(acting))
            reach = [i for i, p in enumerate(write.positions) if p in inside]
            if write.function is not None and reach:  # it may mix positions
                live = min(live, *write.positions)
                kept.append(write)
                continue
            inert = self._inert(write, row.base)
            alive = [i for i in reach if write.positions[i] >= live or write.positions[i] not in inert]
            unreachable |= len(reach) < len(write.positions)
            equal |= len(alive) < len(reach)
            if not alive:
                continue
            live = min(live, *(write.positions[i] for i in alive))
            if len(alive) < len(write.positions):
                write = narrowed(write, alive)
            kept.append(write)
        if all(write.standing for write in kept):
            kept = []
        proof = (
            Proof.NONE if kept else Proof.BOTH if equal and unreachable else Proof.EQUAL if equal else Proof.UNREACHABLE
        )
        return tuple(kept), proof

    def reads(self, row: Row) -> tuple[Read, ...]:
        """The live values that a row saves, as far as the prompt has them."""
        found = []
        for number, save in enumerate(row.saves):
            with suppress(SiteError):
                side = self.profile.alignment.side(self.root(save.world))
                found.append(read_at(number, save.site, save.reduce, self.architecture, side))
        return tuple(found)

    def _moment(self, edit: Edit) -> tuple[float, int, int]:
        """When an edit acts in the forward; the stream leaving a layer comes before the same one entering the next."""
        name, layer = place = edit.site.component, edit.site.layer
        found = self._moments.get(place)
        if found is None:
            last = name in LAST or component(name).module
            found = self.architecture.span(name, layer)[1], self.depth if last else layer, stage(name)
            self._moments[place] = found
        return found

    def _write(self, edit: Edit, base: WorldName, standing: bool = False) -> Write:
        site, source, root, constant = edit.site, edit.source, self.root(base), None
        if isinstance(source, Function):
            values = [(1.0, Value(world, site)) for world in self.worlds[: source.arguments - 1]]
        elif isinstance(source, Value):
            values = [(1.0, source)]
        else:
            values = list(source.terms().values)
        crossing = any(self.root(value.world) != root for _, value in values)
        here = self._cells(site, root, crossing)
        if not isinstance(source, (Function, Value)):
            constant = self._constant(site, source.terms(), root, crossing)
        places = [self._cells(value.site, self.root(value.world), crossing) for _, value in values]
        units, srcs = here.units, here.srcs
        by_unit = here.attends or site.component in SPLIT_READERS
        if units is None and (by_unit or any(there.units and len(there.units) > 1 for there in places)):
            units = self._every(site)
        # What is kept of prompts of unequal length has one size.
        apart = here.attends and not self.profile.alignment.even
        if srcs is None and (apart or any(there.srcs for there in places)):
            srcs = tuple(range(self._length(root)))
        terms = []
        for (factor, value), there in zip(values, places, strict=True):
            heads, attended = there.units, there.srcs
            if units is not None and heads is None and there.split:
                heads = self._every(value.site)
            if srcs is not None and attended is None and there.attends:
                attended = tuple(range(self._length(self.root(value.world))))
            name, layer = there.place
            if name in SPLIT_READERS:
                name, heads = "attn_in", None
            terms.append(Term(factor, value.world, name, layer, there.positions, heads, attended))
        return Write(
            *(("logits", self.depth) if site.component == "logits" else here.place),
            positions=here.positions,
            offsets=here.offsets,
            units=units,
            add=edit.add,
            terms=tuple(terms),
            constant=constant,
            recorded=len(here.positions),
            scalar=here.scalar,
            function=source if isinstance(source, Function) else None,
            srcs=srcs,
            renormalize=edit.renormalize,
            standing=standing,
        )

    def _constant(self, site: Site, source: Sum, root: WorldName, crossing: bool) -> Constant | None:
        """The constant summand, with the noise drawn."""
        if not source.noise:
            return source.constant
        architecture, name, layer = self.architecture, site.component, site.layer
        units, width = architecture.units(name, layer), architecture.width(name, layer)
        dims = shape_of(site, self.profile.alignment.side(root), units, width, crossing)
        if dims is None:
            raise SiteError(str(site))
        shape = [size for _, size in dims]
        total = torch.zeros(shape) if source.constant is None else source.constant.tensor
        for factor, noise in source.noise:
            total = total + factor * noise.draw(f"pair {self.profile.pair}, {site}", shape)
        return Constant.of(total)

    def _cells(self, site: Site, root: WorldName, crossing: bool) -> Cells:
        """What a site is in a world's prompt; found once, as many edits write and take the same."""
        key = site, root, crossing
        found = self._sites.get(key)
        if found is None:
            positions, units, srcs = indices(site, self.architecture, self.profile.alignment.side(root), crossing)
            kind = component(site.component)
            found = self._sites[key] = Cells(
                canonical(site, self.depth),
                positions,
                tuple(range(len(positions))),
                units,
                srcs,
                (site.pos.scalar, site.unit.scalar, site.src.scalar),
                kind.unit is not None,
                kind.attends,
            )
        return found

    def _every(self, site: Site) -> tuple[int, ...]:
        return tuple(range(self.architecture.units(site.component, site.layer)))

    def _length(self, root: WorldName) -> int:
        return self.profile.alignment.side(root).length

    def _reached(self, write: Write, root: WorldName, carried: bool, mixed: bool) -> frozenset[int]:
        """The positions at which a write may change what is read."""
        place = write.component, write.layer
        key = place, write.units if place in self._targeted else None, root, carried, mixed
        found = self._reach.get(key)
        if found is None:
            each = [reached(self.architecture, write, read, carried, mixed) for read in self.targets[root]]
            found = frozenset(p for p in range(self._length(root)) if any(p in one for one in each))
            self._reach[key] = found
        return found

    def _inert(self, write: Write, base: WorldName) -> Container[int]:
        """The positions at which the source equals the base, given that no earlier edit has reached them."""
        split = write.component in SPLIT_READERS  # every head reads the same stream
        name, units = ("attn_in", None) if split else (write.component, write.units)
        here = name, write.layer, units, write.srcs
        agreed = [self._agreed(term.world, base, term.component, term.layer) for term in write.terms]
        if len(write.terms) == 1 and write.constant is None and not write.add:
            term = write.terms[0]
            alike = (term.component, term.layer, term.units) == here[:-1]
            if alike and term.srcs == write.srcs and term.positions == write.positions:  # what most edits are
                return agreed[0] if term.factor == 1 else ()
            if alike and term.factor == 1 and write.srcs is not None and term.srcs is not None:
                pairs = list(zip(write.positions, self._taken(write, term), strict=True))
                return {p for p, q in pairs if p == q and p in agreed[0] and _same_sources(write.srcs, term.srcs, p)}
        if write.constant is not None and bool(write.constant.tensor.any()):
            return ()
        known: dict[Any, bool] = {}  # which terms agree with the base decides, and how far off they are taken
        found = set()
        for i, position in enumerate(write.positions):
            at = [term.positions[min(i, len(term.positions) - 1)] for term in write.terms]
            key = tuple((p - position, p in same) for p, same in zip(at, agreed, strict=True))
            if key not in known:
                left: dict[tuple[Any, ...], float] = defaultdict(float)
                for term, (off, same) in zip(write.terms, key, strict=True):
                    world = base if same else term.world
                    left[world, off, term.component, term.layer, term.units, term.srcs] += term.factor
                if not write.add:
                    left[base, 0, *here] -= 1.0
                known[key] = not any(left.values())
            if known[key]:
                found.add(position)
        return found

    @staticmethod
    def _taken(write: Write, term: Term) -> list[int]:
        """For each position that is written, where a term is taken."""
        return [term.positions[min(i, len(term.positions) - 1)] for i in range(len(write.positions))]

    def _agreed(self, one: WorldName, other: WorldName, name: str, layer: int) -> frozenset[int]:
        """The positions that two worlds both have and at which they have the same value there."""
        local = self.architecture.local_embedding and layer == 0 and name in LOCAL
        # Scores may count distances from a prompt's end, which a softmax does not see.
        counted = name == "scores" or not self.architecture.extends
        found = self._agreement.get((one, other, local, counted))
        if found is None:
            positions = range(self._length(self.root(one)))
            found = frozenset(p for p in positions if self._agrees(one, other, local, counted, p))
            self._agreement[one, other, local, counted] = found
        return found

    def _agrees(self, one: WorldName, other: WorldName, local: bool, counted: bool, position: int) -> bool:
        """Whether two worlds agree at a position.

        Args:
            one: A world.
            other: Another.
            local: Whether what stands there depends on its own token alone.
            counted: Whether it may depend on how long the prompt is.
            position: That both have.
        """
        if one == other:
            return True
        ends = (self.first_edit.get(world, self._length(self.root(world))) for world in (one, other))
        if position >= min(ends):
            return False
        if self.root(one) == self.root(other):
            return True
        if counted and not self.profile.alignment.even:
            return False
        pristine = one not in self.edited and other not in self.edited
        if local and pristine:
            return position not in self.profile.differing
        return position < self.profile.first

    def root(self, name: WorldName) -> WorldName:
        """The world whose prompts a world has."""
        return self.edited[name].root if name in self.edited else name


def _drop_overwritten(writes: list[Write]) -> list[Write]:
    """A later `=` overrides what the row wrote there before, unless something in between depends on that."""
    if len({(w.component, w.layer) for w in writes}) == len(writes):
        return writes
    kept: list[Write] = []
    for write in writes:
        if not (write.add or _depends(write)):
            for i in range(len(kept) - 1, -1, -1):
                before = kept[i]
                if (before.component, before.layer) != (write.component, write.layer):
                    continue
                if _depends(before):
                    break
                if before.standing is not write.standing:  # the row's edit may yet be pruned
                    continue
                overlap = set(before.positions) & set(write.positions)
                if overlap and _within(before.units, write.units) and _within(before.srcs, write.srcs):
                    kept[i] = narrowed(before, [j for j, p in enumerate(before.positions) if p not in overlap])
        kept = [*(w for w in kept if w.positions), write]
    return kept


def _same_sources(written: tuple[int, ...] | None, taken: tuple[int, ...] | None, dest: int) -> bool:
    """Whether a destination's weights are taken where they are written; of later positions none is ever written."""
    if written is None or taken is None or len(written) != len(taken):
        return written == taken
    return all(here == there for here, there in zip(written, taken, strict=True) if here <= dest)


def _within(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> bool:
    """Whether indices are among others, of which ``None`` are all."""
    return new is None or (old is not None and set(old) <= set(new))


def _depends(write: Write) -> bool:
    """Whether a write makes its value, or its neighbours', of what is there."""
    return write.function is not None or write.renormalize
