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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tracepatch.alignment import Alignment
from tracepatch.architecture import Architecture
from tracepatch.errors import SiteError
from tracepatch.jobs import Read, Term, Write, narrowed
from tracepatch.plan import Proof
from tracepatch.reach import LAST, canonical, indices, of_logits, reaches, read_at
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.shapes import shape_of
from tracepatch.sites import SPLIT_READERS, Site, component, stage
from tracepatch.sources import Constant, Function, Sum, Value, WorldName

# What in layer 0 depends on its own token alone, where the probe proved it.
LOCAL = frozenset({"embed", "resid_pre", "attn_in", "attn_in_scale"})


@dataclass(frozen=True)
class Profile:
    """What lowering needs to know of a pair; pairs that share it are lowered once.

    Attributes:
        alignment: The positions of the two prompts.
        differing: Positions at which the two prompts differ, in their tokens or in having one.
        scored: Positions whose logits each metric reads, in the clean and in the corrupted prompt.
        seen: Activations that the metrics read, in the clean and in the corrupted prompt.
        pair: Number of the pair, where something is drawn anew for each.
        encoded: Whether an encoder reads the prompts: the worlds may then differ at every position, whatever its token.
    """

    alignment: Alignment
    differing: tuple[int, ...]
    scored: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    seen: tuple[tuple[Read, ...], tuple[Read, ...]] = ((), ())
    pair: int = -1
    encoded: bool = False

    @property
    def first(self) -> int:
        """The first position at which the worlds may differ."""
        if self.encoded:
            return 0
        return min(self.differing, default=self.alignment.clean.length)

    @property
    def shared(self) -> bool:
        """Whether the two prompts are equally long and read at the same positions, so that runs hold rows of both."""
        return self.alignment.even and self.scored[0] == self.scored[1] and self.seen[0] == self.seen[1]

    def reads_of(self, root: WorldName) -> tuple[int, ...]:
        """The positions whose logits are read, in the clean or in the corrupted prompt."""
        return tuple(sorted({p for positions in self.scored[root == "corrupted"] for p in positions}))

    def seen_of(self, root: WorldName) -> tuple[Read, ...]:
        """The activations that are read, in the clean or in the corrupted prompt."""
        return self.seen[root == "corrupted"]


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
        try:
            edits.sort(key=lambda pair: self._moment(pair[0]))
            writes = [self._write(edit, row.base, old) for edit, old in edits]
        except SiteError:
            return (), Proof.ABSENT
        if not row.edits and not self.reads(row):
            return (), Proof.ABSENT
        if len(writes) > 1:
            writes = _drop_overwritten(writes)
        if not self.prune or row.saves:  # the proofs speak of the metric; what is saved may see the edit
            return tuple(writes), Proof.NONE
        targets, side = self.targets[self.root(row.base)], self.profile.alignment.side(self.root(row.base))
        kept, live, equal, unreachable = [], side.length, False, False
        mixing = [n for n, w in enumerate(writes) if w.function is not None and len(w.positions) > 1]
        mixed = any(w.function is not None for w in writes)
        for number, write in enumerate(writes):
            if write.standing:
                if write.function is not None and len(write.positions) > 1:  # it may mix positions
                    live = min(live, *write.positions)
                kept.append(write)
                continue
            # A function may carry what it is given to other positions of its site.
            carried = bool(mixing) and number < mixing[-1]
            reach = [i for i, p in enumerate(write.positions) if self._reaches(write, p, targets, carried, mixed)]
            if write.function is not None and reach:  # it may mix positions
                live = min(live, *write.positions)
                kept.append(write)
                continue
            alive = [i for i in reach if write.positions[i] >= live or not self._inert(write, i, row.base)]
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
        site = edit.site
        last = site.component in LAST or component(site.component).module
        layer = self.depth if last else site.layer
        return self.architecture.span(site.component, site.layer)[1], layer, stage(site.component)

    def _write(self, edit: Edit, base: WorldName, standing: bool = False) -> Write:
        site, source, kind = edit.site, edit.source, component(edit.site.component)
        root = self.root(base)
        if isinstance(source, Function):
            values = [(1.0, Value(world, site)) for world in self.worlds[: source.arguments - 1]]
        elif isinstance(source, Value):
            values = [(1.0, source)]
        else:
            values = list(source.terms().values)
        crossing = any(self.root(value.world) != root for _, value in values)
        positions, units, srcs = self._indices(site, root, crossing)
        constant = None
        if not isinstance(source, (Function, Value)):
            constant = self._constant(site, source.terms(), root, crossing)
        places = [
            (positions, units, srcs)
            if v.site == site and self.root(v.world) == root
            else self._indices(v.site, self.root(v.world), crossing)
            for _, v in values
        ]
        by_unit = kind.attends or site.component in SPLIT_READERS
        if units is None and (by_unit or any(heads is not None and len(heads) > 1 for _, heads, _ in places)):
            units = tuple(range(self.architecture.units(site.component, site.layer)))
        # What is kept of prompts of unequal length has one size.
        apart = kind.attends and bool(values) and not self.profile.alignment.even
        if srcs is None and (apart or any(attended is not None for _, _, attended in places)):
            srcs = tuple(range(self._length(root)))
        terms = []
        for (factor, value), (here, heads, attended) in zip(values, places, strict=True):
            if units is not None and heads is None and component(value.site.component).unit:
                heads = tuple(range(self.architecture.units(value.site.component, value.site.layer)))
            if srcs is not None and attended is None and component(value.site.component).attends:
                attended = tuple(range(self._length(self.root(value.world))))
            name, layer = canonical(value.site, self.depth)
            if name in SPLIT_READERS:
                name, heads = "attn_in", None
            terms.append(Term(factor, value.world, name, layer, here, heads, attended))
        return Write(
            *(("logits", self.depth) if site.component == "logits" else canonical(site, self.depth)),
            positions=positions,
            offsets=tuple(range(len(positions))),
            units=units,
            add=edit.add,
            terms=tuple(terms),
            constant=constant,
            recorded=len(positions),
            scalar=(site.pos.scalar, site.unit.scalar, site.src.scalar),
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

    def _indices(
        self, site: Site, root: WorldName, crossing: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]:
        return indices(site, self.architecture, self.profile.alignment.side(root), crossing)

    def _length(self, root: WorldName) -> int:
        return self.profile.alignment.side(root).length

    def _reaches(self, write: Write, position: int, targets: tuple[Read, ...], carried: bool, mixed: bool) -> bool:
        return any(reaches(self.architecture, write, position, read, carried, mixed) for read in targets)

    def _inert(self, write: Write, i: int, base: WorldName) -> bool:
        """Whether the source equals the base at the i-th position, given that no earlier edit has reached it."""
        position = write.positions[i]
        split = write.component in SPLIT_READERS  # every head reads the same stream
        name, units = ("attn_in", None) if split else (write.component, write.units)
        here = name, write.layer, units, write.srcs
        if len(write.terms) == 1 and write.constant is None and not write.add:
            term = write.terms[0]
            alike = (term.component, term.layer, term.units) == here[:-1]
            if term.factor == 1 and alike and _same_sources(write.srcs, term.srcs, position):
                same_place = term.positions[min(i, len(term.positions) - 1)] == position
                return same_place and self._agrees(term.world, base, term.component, term.layer, position)
        left: dict[tuple[Any, ...], float] = defaultdict(float)
        for term in write.terms:
            p = term.positions[min(i, len(term.positions) - 1)]
            world = base if self._agrees(term.world, base, term.component, term.layer, p) else term.world
            left[world, p, term.component, term.layer, term.units, term.srcs] += term.factor
        if not write.add:
            left[base, position, *here] -= 1.0
        return not any(left.values()) and (write.constant is None or not bool(write.constant.tensor.any()))

    def _agrees(self, one: WorldName, other: WorldName, name: str, layer: int, position: int) -> bool:
        """Whether two worlds have the same value at the same position, which both have."""
        if one == other:
            return True
        roots = {self.root(one), self.root(other)}
        length = min(map(self._length, roots))
        if position >= min(length, self.first_edit.get(one, length), self.first_edit.get(other, length)):
            return False
        if len(roots) == 1:
            return True
        even = self.profile.alignment.even
        # Scores may count distances from a prompt's end, which a softmax does not see.
        if not even and (name == "scores" or not self.architecture.extends):
            return False
        pristine = one not in self.edited and other not in self.edited
        local = pristine and self.architecture.local_embedding and layer == 0 and name in LOCAL
        return position not in self.profile.differing if local else position < self.profile.first

    def root(self, name: WorldName) -> WorldName:
        """The world whose prompts a world has."""
        return self.edited[name].root if name in self.edited else name


def _drop_overwritten(writes: list[Write]) -> list[Write]:
    """A later `=` overrides what the row wrote there before, unless something in between depends on that."""
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
