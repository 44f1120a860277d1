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
from dataclasses import dataclass
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import SiteError
from tracepatch.jobs import Read, Term, Write, narrowed
from tracepatch.plan import Proof
from tracepatch.reach import LAST, canonical, indices, of_logits, reached, read_at
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.sites import SPLIT_READERS, Site, component, shape_of, stage
from tracepatch.sources import Constant, Function, Sum, Value, WorldName

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
        by_unit: Whether its units are written one by one, also where all are.
    """

    place: tuple[str, int]
    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None
    scalar: tuple[bool, bool, bool]
    split: bool
    attends: bool
    by_unit: bool


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
        self.targets = profile.seen + ((of_logits(profile.reads, self.depth),) if profile.reads else ())
        self.edited = edited or {}
        self.standing = {name: [edit for _, edit in standing(name, self.edited)] for name in self.edited}
        # The first position that a world's standing edits touch.
        self.first_edit = {
            name: min((min(e.site.pos.resolve(profile.length) or (0,)) for e in edits), default=profile.length)
            for name, edits in self.standing.items()
        }
        self._targeted = {(read.component, read.layer) for read in self.targets}
        # What many rows share is found once.
        self._cells_of: dict[Site, Cells] = {}
        self._known: dict[int, tuple[Site, Cells]] = {}  # the same by identity: a site's hash takes longer than it
        self._moments: dict[tuple[str, int], tuple[float, int, int]] = {}
        self._reach: dict[Any, frozenset[int]] = {}
        self._agreement: dict[Any, frozenset[int]] = {}

    def unpruned(self) -> Lowering:
        """The same, with every write left in."""
        return Lowering(self.architecture, self.profile, False, self.worlds, self.edited)

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
        edits = [(edit, False) for edit in row.edits]
        if row.base in self.standing:
            edits = [(edit, True) for edit in self.standing[row.base]] + edits
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
        acting = [n for n, w in enumerate(writes) if w.function is not None]
        mixing = [n for n in acting if len(writes[n].positions) > 1]
        for number, write in enumerate(writes):
            positions = write.positions
            if write.standing:
                if write.function is not None and len(positions) > 1:  # it may mix positions
                    live = min(live, *positions)
                kept.append(write)
                continue
            # A function may carry what it is given to other positions of its site.
            carried = bool(mixing) and number < mixing[-1]
            inside = self._reached(write, carried, mixed=bool(acting))
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
        here, constant, function = self._cells(site), None, None
        values: tuple[tuple[float, Value], ...]
        if isinstance(source, Value):
            values = ((1.0, source),)
        elif isinstance(source, Function):
            values = tuple([(1.0, Value(world, site)) for world in self.worlds[: source.arguments - 1]])
            function = source
        else:
            total = source.terms()
            values, constant = total.values, self._constant(site, total)
        places = [here if value.site is site else self._cells(value.site) for _, value in values]
        units = self._every(site) if here.units is None and here.by_unit else here.units
        srcs = here.srcs
        for there in places:
            if units is None and there.units and len(there.units) > 1:
                units = self._every(site)
            if srcs is None and there.srcs:
                srcs = tuple(range(self.profile.length))
        terms = []
        for (factor, value), there in zip(values, places, strict=True):
            heads, attended = there.units, there.srcs
            if units is not None and heads is None and there.split:
                heads = self._every(value.site)
            if srcs is not None and attended is None and there.attends:
                attended = tuple(range(self.profile.length))
            name, layer = there.place
            if name in SPLIT_READERS:
                name, heads = "attn_in", None
            terms.append(Term(factor, value.world, name, layer, there.positions, heads, attended))
        written, layer = ("logits", self.depth) if site.component == "logits" else here.place
        return Write(
            written,
            layer,
            here.positions,
            here.offsets,
            units,
            edit.add,
            tuple(terms),
            constant,
            len(here.positions),
            here.scalar,
            function,
            srcs,
            edit.renormalize,
            standing,
        )

    def _constant(self, site: Site, source: Sum) -> Constant | None:
        """The constant summand, with the noise drawn."""
        if not source.noise:
            return source.constant
        architecture, name, layer = self.architecture, site.component, site.layer
        dims = shape_of(site, self.profile.length, architecture.units(name, layer), architecture.width(name, layer))
        if dims is None:
            raise SiteError(str(site))
        shape = [size for _, size in dims]
        total = torch.zeros(shape) if source.constant is None else source.constant.tensor
        for factor, noise in source.noise:
            total = total + factor * noise.draw(f"pair {self.profile.pair}, {site}", shape)
        return Constant.of(total)

    def _cells(self, site: Site) -> Cells:
        """What a site is in these prompts; found once, as many edits write and take the same."""
        known = self._known.get(id(site))
        if known is not None and known[0] is site:
            return known[1]
        found = self._cells_of.get(site)
        if found is None:
            positions, units, srcs = indices(site, self.architecture, self.profile.length)
            kind = component(site.component)
            found = self._cells_of[site] = Cells(
                canonical(site, self.depth),
                positions,
                tuple(range(len(positions))),
                units,
                srcs,
                (site.pos.scalar, site.unit.scalar, site.src.scalar),
                kind.unit is not None,
                kind.attends,
                kind.attends or site.component in SPLIT_READERS,
            )
        self._known[id(site)] = site, found
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

    def _inert(self, write: Write, base: WorldName) -> Collection[int]:
        """The positions at which the source equals the base, given that no earlier edit has reached them."""
        split = write.component in SPLIT_READERS  # every head reads the same stream
        name, units = ("attn_in", None) if split else (write.component, write.units)
        here = name, write.layer, units, write.srcs
        if len(write.terms) == 1 and write.constant is None and not write.add:
            term = write.terms[0]
            same_place = (term.component, term.layer, term.units, term.srcs) == here
            if same_place and term.positions == write.positions:  # what most edits are
                return self._agreed(term.world, base, term.component, term.layer) if term.factor == 1 else ()
        if write.constant is not None and bool(write.constant.tensor.any()):
            return ()
        agreed = [self._agreed(term.world, base, term.component, term.layer) for term in write.terms]
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
    return write.function is not None or write.renormalize
