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
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.constants import Constant
from tracepatch.errors import SiteError
from tracepatch.jobs import Read, Term, Write, narrowed, without_overwritten
from tracepatch.plan import Proof
from tracepatch.profiles import Profile
from tracepatch.reach import LAST, Cells, canonical, cells, indices, of_logits, reached, read_at
from tracepatch.references import ReferenceWorld, Tally
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.shapes import shape_of
from tracepatch.sites import SPLIT_READERS, Site, component, stage
from tracepatch.sources import Function, Part, Sum, Value, WorldName, summed

# What in layer 0 depends on its own token alone, where the probe proved it.
LOCAL = frozenset({"embed", "resid_pre", "attn_in", "attn_in_scale"})


class Lowering:
    """Rows → writes, for pairs of one profile."""

    def __init__(
        self,
        architecture: Architecture,
        profile: Profile,
        prune: bool,
        worlds: tuple[WorldName, ...],
        edited: Mapping[WorldName, EditedWorld] | None = None,
        references: Mapping[WorldName, ReferenceWorld] | None = None,
    ) -> None:
        self.architecture, self.profile, self.prune, self.worlds = architecture, profile, prune, worlds
        self.depth = len(architecture)
        self.edited, self.references = edited or {}, references or {}
        self.standing = {name: [edit for _, edit in standing(name, self.edited)] for name in self.edited}
        self.targets = {root: self._targets(root) for root in ("clean", "corrupted")}
        # The first position that a world's standing edits touch.
        self.first_edit = {name: self._first_of(name, edits) for name, edits in self.standing.items()}
        self._targeted = {(read.component, read.layer) for found in self.targets.values() for read in found}
        # What many rows share is found once.
        self._sites: dict[tuple[Site, WorldName, bool], Cells] = {}
        # The same by identity: to hash a site takes longer.
        self._known: dict[tuple[int, WorldName, bool], tuple[Site, Cells]] = {}
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
        return Lowering(self.architecture, self.profile, False, self.worlds, self.edited, self.references)

    def world(self, name: WorldName) -> tuple[Write, ...]:
        """The writes of an edited world, those of the worlds below it first.

        Raises:
            SiteError: The prompt has no such position.
        """
        edits = sorted(self.standing[name], key=self._moment)
        return tuple(without_overwritten([self._write(edit, name, standing=True) for edit in edits]))

    def row(self, row: Row) -> tuple[tuple[Write, ...], Proof]:
        """The writes of a row that survive pruning; where none does, the proof."""
        if row.raw is not None:  # nothing is known of it
            return (), Proof.NONE
        edits = [(edit, False) for edit in row.edits]
        if row.base in self.standing:
            edits = [(edit, True) for edit in self.standing[row.base]] + edits
        if len(edits) > 1:
            edits.sort(key=lambda pair: self._moment(pair[0]))
        try:
            writes = [self._write(edit, row.base, old) for edit, old in edits]
        except SiteError:
            return (), Proof.ABSENT
        if not row.edits and not self.reads(row):
            return (), Proof.ABSENT
        if len(writes) > 1:
            writes = without_overwritten(writes)
        if not self.prune or row.saves:  # the proofs speak of the metric; what is saved may see the edit
            return tuple(writes), Proof.NONE
        root = self.root(row.base)
        kept, live, equal, unreachable = [], self._length(root), False, False
        acting = [w for w in writes if w.function is not None or w.portion is not None]
        mixing = [n for n, w in enumerate(writes) if acting and w.function is not None and len(w.positions) > 1]
        for number, write in enumerate(writes):
            positions = write.positions
            if write.standing:
                if write.function is not None and len(positions) > 1:  # it may mix positions
                    live = min(live, *positions)
                kept.append(write)
                continue
            # A function may carry what it is given to other positions of its site.
            carried = bool(mixing) and number < mixing[-1]
            inside = self._reached(write, root, carried, bool(acting))
            reach: Sequence[int] = range(len(positions))
            if not inside.issuperset(positions):
                reach = [i for i in reach if positions[i] in inside]
            if write.function is not None and reach:  # it may mix positions
                live = min(live, *positions)
                kept.append(write)
                continue
            inert = self._inert(write, row.base)
            alive = [i for i in reach if positions[i] >= live or positions[i] not in inert] if inert else reach
            unreachable |= len(reach) < len(positions)
            equal |= len(alive) < len(reach)
            if not alive:
                continue
            if len(alive) < len(positions):
                write = narrowed(write, alive)
            live = min(live, *write.positions)
            kept.append(write)
        if kept and not (row.base in self.standing and all(write.standing for write in kept)):
            return tuple(kept), Proof.NONE
        return (), Proof.BOTH if equal and unreachable else Proof.EQUAL if equal else Proof.UNREACHABLE

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
        site, source, root = edit.site, edit.source, self.root(base)
        constant: Constant | None = None
        spread: tuple[tuple[Tally, Constant], ...] = ()
        total: Sum | None = None
        values: Sequence[tuple[float, Value]] = ((1.0, source),) if isinstance(source, Value) else ()
        if isinstance(source, Function):
            values = [(1.0, Value(world, site)) for world in self.worlds[: source.arguments - 1]]
        elif not values and (total := summed(source)) is not None:
            values = total.values
        crossing = False
        for _, value in values:
            crossing |= value.world not in self.references and self.root(value.world) != root
        here = self._cells(site, root, crossing)
        if total is not None:
            constant, spread = self._fixed(site, total, root, crossing)
        places = [self._placed(value, root, crossing) for _, value in values]
        units, srcs = here.units, here.srcs
        if units is None and (here.attends or site.component in SPLIT_READERS):
            units = self._every(site)
        if srcs is None and here.attends and not self.profile.alignment.even:
            srcs = tuple(range(self._length(root)))  # what is kept of prompts of unequal length has one size
        for there, _ in places:
            if units is None and there.units and len(there.units) > 1:
                units = self._every(site)
            if srcs is None and there.srcs:
                srcs = tuple(range(self._length(root)))
        terms = []
        for (factor, value), (there, tally) in zip(values, places, strict=True):
            heads, attended = there.units, there.srcs
            if units is not None and heads is None and there.split:
                heads = self._every(value.site)
            if srcs is not None and attended is None and there.attends:
                attended = tuple(range(self._length(self.root(value.world))))
            name, layer = there.place
            if name in SPLIT_READERS:
                name, heads = "attn_in", None
            if tally is not None:
                tally = replace(tally, component=name, layer=layer)
            terms.append(Term(factor, value.world, name, layer, there.positions, heads, attended, tally))
        component, layer = ("logits", self.depth) if site.component == "logits" else here.place
        return Write(
            component,
            layer,
            here.positions,
            here.offsets,
            units,
            edit.add,
            tuple(terms),
            constant,
            len(here.positions),
            here.scalar,
            source if isinstance(source, Function) else None,
            srcs,
            edit.renormalize,
            standing,
            spread=spread,
            portion=source.portion if isinstance(source, Part) else None,
        )

    def _placed(self, value: Value, root: WorldName, crossing: bool) -> tuple[Cells, Tally | None]:
        """Where a value stands, and the table of a reference world that it is in."""
        if value.world not in self.references:
            return self._cells(value.site, self.root(value.world), crossing), None
        side = self.profile.alignment.side(root)
        positions, srcs, tally = self.references[value.world].located(value.site, side, crossing)
        return cells(value.site, self.depth, positions, self._units(value.site), srcs), tally

    def _fixed(
        self, site: Site, source: Sum, root: WorldName, crossing: bool
    ) -> tuple[Constant | None, tuple[tuple[Tally, Constant], ...]]:
        """The constant summand, with the noise drawn; and the noise whose unit is known only in the run."""
        if not source.noise:
            return source.constant, ()
        architecture, name, layer = self.architecture, site.component, site.layer
        units, width = architecture.units(name, layer), architecture.width(name, layer)
        dims = shape_of(site, self.profile.alignment.side(root), units, width, crossing)
        if dims is None:
            raise SiteError(str(site))
        shape = [size for _, size in dims]
        total = torch.zeros(shape) if source.constant is None else source.constant.tensor
        spread = []
        for factor, noise in source.noise:
            drawn = factor * noise.draw(f"pair {self.profile.pair}, {site}", shape)
            if noise.unit is None:
                total = total + drawn
            elif factor * noise.scale:
                spread.append((self._tally_of(noise.unit), Constant.of(drawn)))
        plain = source.constant is None and all(noise.unit is not None for _, noise in source.noise)
        return None if plain and spread else Constant.of(total), tuple(spread)

    def _tally_of(self, unit: Value) -> Tally:
        """What the standard deviation of some values is known by."""
        name, layer = canonical(unit.site, self.depth)
        if name in SPLIT_READERS:
            return Tally(unit.world, "attn_in", layer, unit.site.pos, spread=True)
        return Tally(unit.world, name, layer, unit.site.pos, None, unit.site.unit, spread=True)

    def _units(self, site: Site) -> tuple[int, ...] | None:
        return None if site.unit.all else site.unit.resolve(self.architecture.units(site.component, site.layer))

    def _cells(self, site: Site, root: WorldName, crossing: bool) -> Cells:
        """What a site is in a world's prompt; found once, as many edits write and take the same."""
        known = self._known.get((id(site), root, crossing))
        if known is not None:
            return known[1]
        key = site, root, crossing
        found = self._sites.get(key)
        if found is None:
            positions, units, srcs = indices(site, self.architecture, self.profile.alignment.side(root), crossing)
            found = self._sites[key] = cells(site, self.depth, positions, units, srcs)
        self._known[id(site), root, crossing] = site, found
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

    def _inert(self, write: Write, base: WorldName) -> Collection[int]:
        """The positions at which the source equals the base, given that no earlier edit has reached them."""
        split = write.component in SPLIT_READERS  # every head reads the same stream
        name, units = ("attn_in", None) if split else (write.component, write.units)
        here = name, write.layer, units, write.srcs
        if write.spread:
            return ()
        agreed = [
            frozenset() if term.tally is not None else self._agreed(term.world, base, term.component, term.layer)
            for term in write.terms
        ]
        if len(write.terms) == 1 and write.constant is None and not write.add:
            term = write.terms[0]
            alike = (term.component, term.layer, term.units) == here[:-1] and term.tally is None
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
                    left[world, off, term.component, term.layer, term.units, term.srcs, term.tally] += term.factor
                if not write.add:
                    left[base, 0, *here, None] -= 1.0
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


def _same_sources(written: tuple[int, ...] | None, taken: tuple[int, ...] | None, dest: int) -> bool:
    """Whether a destination's weights are taken where they are written; of later positions none is ever written."""
    if written is None or taken is None or len(written) != len(taken):
        return written == taken
    return all(here == there for here, there in zip(written, taken, strict=True) if here <= dest)
