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
from dataclasses import dataclass, replace
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.constants import Constant
from tracepatch.errors import SiteError
from tracepatch.jobs import Read, Term, Write, narrowed
from tracepatch.plan import Proof
from tracepatch.reach import LAST, Cells, canonical, cells, indices, of_logits, reached, read_at
from tracepatch.references import ReferenceWorld, Tally
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.sites import SPLIT_READERS, Site, component, shape_of, stage
from tracepatch.sources import Function, Part, Sum, Value, WorldName, summed

# What in layer 0 depends on its own token alone, where the probe proved it.
LOCAL = frozenset({"embed", "resid_pre", "attn_in", "attn_in_scale"})


@dataclass(frozen=True)
class Profile:
    """What lowering needs to know of a pair; pairs that share it are lowered once.

    Attributes:
        length: Tokens of each prompt.
        differing: Positions at which the two prompts differ.
        reads: Positions whose logits the metrics read.
        seen: Activations that the metrics read.
        pair: Number of the pair, where something is drawn anew for each.
        encoded: Whether an encoder reads the prompts: the worlds may then differ at every position, whatever its token.
    """

    length: int
    differing: tuple[int, ...]
    reads: tuple[int, ...]
    seen: tuple[Read, ...] = ()
    pair: int = -1
    encoded: bool = False

    @property
    def first(self) -> int:
        """The first position at which the worlds may differ."""
        if self.encoded:
            return 0
        return min(self.differing, default=self.length)


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
        self.targets = profile.seen + ((of_logits(profile.reads, self.depth),) if profile.reads else ())
        self.edited, self.references = edited or {}, references or {}
        self.standing = {name: [edit for _, edit in standing(name, self.edited)] for name in self.edited}
        # The first position that a world's standing edits touch.
        self.first_edit = {
            name: min((min(e.site.pos.resolve(profile.length) or (0,)) for e in edits), default=profile.length)
            for name, edits in self.standing.items()
        }
        self._targeted = {(read.component, read.layer) for read in self.targets}
        # What many rows share is found once.
        self._sites: dict[Site, Cells] = {}
        self._moments: dict[tuple[str, int], tuple[float, int, int]] = {}
        self._reach: dict[Any, frozenset[int]] = {}
        self._agreement: dict[Any, frozenset[int]] = {}

    def unpruned(self) -> Lowering:
        """The same, with every write left in."""
        return Lowering(self.architecture, self.profile, False, self.worlds, self.edited, self.references)

    def world(self, name: WorldName) -> tuple[Write, ...]:
        """The writes of an edited world, those of the worlds below it first.

        Raises:
            SiteError: The prompt has no such position.
        """
        edits = sorted(self.standing[name], key=self._moment)
        return tuple(_drop_overwritten([self._write(edit, standing=True) for edit in edits]))

    def row(self, row: Row) -> tuple[tuple[Write, ...], Proof]:
        """The writes of a row that survive pruning; where none does, the proof."""
        if row.raw is not None:  # nothing is known of it
            return (), Proof.NONE
        edits = [(edit, True) for edit in self.standing.get(row.base, ())] + [(edit, False) for edit in row.edits]
        if len(edits) > 1:
            edits.sort(key=lambda pair: self._moment(pair[0]))
        try:
            writes = [self._write(edit, old) for edit, old in edits]
        except SiteError:
            return (), Proof.ABSENT
        if not row.edits and not self.reads(row):
            return (), Proof.ABSENT
        if len(writes) > 1:
            writes = _drop_overwritten(writes)
        if not self.prune or row.saves:  # the proofs speak of the metric; what is saved may see the edit
            return tuple(writes), Proof.NONE
        kept, live, equal, unreachable = [], self.profile.length, False, False
        mixing = [n for n, w in enumerate(writes) if w.function is not None and len(w.positions) > 1]
        mixed = any(w.function is not None or w.portion is not None for w in writes)
        for number, write in enumerate(writes):
            if write.standing:
                if write.function is not None and len(write.positions) > 1:  # it may mix positions
                    live = min(live, *write.positions)
                kept.append(write)
                continue
            # A function may carry what it is given to other positions of its site.
            carried = bool(mixing) and number < mixing[-1]
            inside = self._reached(write, carried, mixed)
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
                found.append(read_at(number, save.site, save.reduce, self.architecture, self.profile.length))
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

    def _write(self, edit: Edit, standing: bool = False) -> Write:
        site, source = edit.site, edit.source
        here = self._cells(site)
        constant: Constant | None = None
        spread: tuple[tuple[Tally, Constant], ...] = ()
        if isinstance(source, Function):
            values = [(1.0, Value(world, site)) for world in self.worlds[: source.arguments - 1]]
        elif isinstance(source, Value):
            values = [(1.0, source)]
        elif (total := summed(source)) is not None:
            values = list(total.values)
            constant, spread = self._fixed(site, total)
        places = [
            (here, None) if value.site is site and value.world not in self.references else self._taken(value)
            for _, value in values
        ]
        units, srcs = here.units, here.srcs
        by_unit = here.attends or site.component in SPLIT_READERS
        if units is None and (by_unit or any(there.units and len(there.units) > 1 for there, _ in places)):
            units = self._every(site)
        if srcs is None and any(there.srcs for there, _ in places):
            srcs = tuple(range(self.profile.length))
        terms = []
        for (factor, value), (there, tally) in zip(values, places, strict=True):
            heads, attended = there.units, there.srcs
            if units is not None and heads is None and there.split:
                heads = self._every(value.site)
            if srcs is not None and attended is None and there.attends:
                attended = tuple(range(self.profile.length))
            name, layer = there.place
            if name in SPLIT_READERS:
                name, heads = "attn_in", None
            if tally is not None:
                tally = replace(tally, component=name, layer=layer)
            terms.append(Term(factor, value.world, name, layer, there.positions, heads, attended, tally))
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
            spread=spread,
            portion=source.portion if isinstance(source, Part) else None,
        )

    def _taken(self, value: Value) -> tuple[Cells, Tally | None]:
        """Where a value stands, and the table of a reference world that it is in."""
        if value.world not in self.references:
            return self._cells(value.site), None
        positions, srcs, tally = self.references[value.world].located(value.site, self.profile.length)
        return cells(value.site, self.depth, positions, self._units(value.site), srcs), tally

    def _fixed(self, site: Site, source: Sum) -> tuple[Constant | None, tuple[tuple[Tally, Constant], ...]]:
        """The constant summand, with the noise drawn; and the noise whose unit is known only in the run."""
        if not source.noise:
            return source.constant, ()
        architecture, name, layer = self.architecture, site.component, site.layer
        dims = shape_of(site, self.profile.length, architecture.units(name, layer), architecture.width(name, layer))
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

    def _cells(self, site: Site) -> Cells:
        """What a site is in these prompts; found once, as many edits write and take the same."""
        found = self._sites.get(site)
        if found is None:
            positions, units, srcs = indices(site, self.architecture, self.profile.length)
            found = self._sites[site] = cells(site, self.depth, positions, units, srcs)
        return found

    def _every(self, site: Site) -> tuple[int, ...]:
        return tuple(range(self.architecture.units(site.component, site.layer)))

    def _reached(self, write: Write, carried: bool, mixed: bool) -> frozenset[int]:
        """The positions at which a write may change what is read."""
        place = write.component, write.layer
        key = place, write.units if place in self._targeted else None, carried, mixed
        found = self._reach.get(key)
        if found is None:
            each = [reached(self.architecture, write, read, carried, mixed) for read in self.targets]
            found = frozenset(p for p in range(self.profile.length) if any(p in one for one in each))
            self._reach[key] = found
        return found

    def _inert(self, write: Write, base: WorldName) -> Container[int]:
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
            same_place = (term.component, term.layer, term.units, term.srcs) == here
            if same_place and term.tally is None and term.positions == write.positions:  # what most edits are
                return agreed[0] if term.factor == 1 else ()
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

    def _agreed(self, one: WorldName, other: WorldName, name: str, layer: int) -> frozenset[int]:
        """The positions at which two worlds have the same value there."""
        local = self.architecture.local_embedding and layer == 0 and name in LOCAL
        found = self._agreement.get((one, other, local))
        if found is None:
            found = frozenset(p for p in range(self.profile.length) if self._agrees(one, other, local, p))
            self._agreement[one, other, local] = found
        return found

    def _agrees(self, one: WorldName, other: WorldName, local: bool, position: int) -> bool:
        """Whether two worlds agree at a position, where what stands there depends on its own token alone or on all."""
        if one == other:
            return True
        length = self.profile.length
        if position >= min(self.first_edit.get(one, length), self.first_edit.get(other, length)):
            return False
        if self._root(one) == self._root(other):
            return True
        pristine = one not in self.edited and other not in self.edited
        if local and pristine:
            return position not in self.profile.differing
        return position < self.profile.first

    def _root(self, name: WorldName) -> WorldName:
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


def _within(old: tuple[int, ...] | None, new: tuple[int, ...] | None) -> bool:
    """Whether indices are among others, of which ``None`` are all."""
    return new is None or (old is not None and set(old) <= set(new))


def _depends(write: Write) -> bool:
    """Whether a write makes its value, or its neighbours', of what is there."""
    return write.function is not None or write.renormalize or write.portion is not None
