"""A row on a pair with every index resolved: what it writes and reads, and what must be computed for it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from tracepatch.constants import Constant
from tracepatch.portions import Portion
from tracepatch.references import Tally
from tracepatch.sites import SPLIT_READERS, component
from tracepatch.sources import Function, WorldName

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def _many(cls: type[T]) -> type[T]:
    """A dataclass that mypy takes for frozen: plans make very many, and frozen ones take five times as long to make."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


EAGER = frozenset({"scores", "pattern"})
"""What can be seen only where attention is computed step by step."""
CACHED = frozenset({"k", "v"})
"""What a cache holds: where earlier tokens stand in one, they come before a table's own."""


@_many
class Term:
    """A multiple of a world's activation at given positions, units and sources; single ones are broadcast.

    Of a reference world positions and sources are places in a table, the ``tally``.
    """

    factor: float
    world: WorldName
    component: str
    layer: int
    positions: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None = None
    tally: Tally | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What the values are known by where plans run."""
        return (self.component, self.layer) if self.tally is None else self.tally.key


@_many
class Write:
    """One edit of one row with every index resolved: the sum of its terms and constant is set, or added, at its cells.

    Attributes:
        component: What is written; ``resid_post`` of a layer is ``resid_pre`` of the next.
        layer: Where; the stream leaving the last layer is the one entering layer ``n``.
        positions: The positions that survived pruning.
        offsets: Their places among the positions of the edit as recorded, which constants and terms are aligned with.
        units: Heads or neurons; ``None`` for all, or where there are none.
        srcs: The positions attended to, for scores and pattern; ``None`` for all, or where there are none.
        add: Whether it adds to the live value.
        terms: Worlds' values.
        constant: A fixed summand; it broadcasts to the activation at the recorded index, as arrays do.
        recorded: How many positions the recorded index picked.
        scalar: Whether the recorded index was one integer, and so dropped the dim: for positions, units, sources.
        function: What makes the value of the live one and the terms, which are then the clean and the corrupted one.
        renormalize: Whether the pattern is scaled, after the edit, to the sum that it had before.
        standing: Whether it belongs to the base, an edited world, and not to the row.
        spread: Fixed summands like the constant, each in multiples of a standard deviation.
        portion: What of the live value is replaced, if not all of it.
    """

    component: str
    layer: int
    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    units: tuple[int, ...] | None
    add: bool
    terms: tuple[Term, ...]
    constant: Constant | None
    recorded: int
    scalar: tuple[bool, bool, bool]
    function: Function | None = None
    srcs: tuple[int, ...] | None = None
    renormalize: bool = False
    standing: bool = False
    spread: tuple[tuple[Tally, Constant], ...] = ()
    portion: Portion | None = None

    @property
    def tallies(self) -> Iterator[Tally]:
        """What it takes of reference worlds."""
        yield from (term.tally for term in self.terms if term.tally is not None)
        yield from (tally for tally, _ in self.spread)

    @property
    def needed(self) -> Iterator[tuple[str, int]]:
        """The (component, layer) of worlds' values that it takes."""
        return ((term.component, term.layer) for term in self.terms if term.tally is None)

    @property
    def same_for_units(self) -> bool:
        """Whether every unit is written with the same value."""
        tensors = [c.tensor for c in (self.constant, *(c for _, c in self.spread)) if c is not None]
        one = all(tensor.ndim < 2 or tensor.shape[-2] == 1 for tensor in tensors)
        return self.function is None and all(t.units is None for t in self.terms) and (one or self.scalar[1])


@dataclass(frozen=True, slots=True)
class Read:
    """A live value that a row saves, or that a metric reads, with every index resolved as in ``Write``.

    Attributes:
        number: Which of the row's saves, or of the plan's metrics, it is.
        component: What is read.
        layer: Where.
        positions: The positions.
        units: Heads or neurons; ``None`` for all, or where there are none.
        srcs: The positions attended to; ``None`` for all, or where there are none.
        scalar: Whether the recorded index was one integer, and so dropped the dim: for positions, units, sources.
        reduce: What is made of the value ``[row, …]`` before it is kept.
        size: How many numbers it is before that, in one row.
    """

    number: int
    component: str
    layer: int
    positions: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None
    scalar: tuple[bool, bool, bool]
    reduce: Callable[..., Any] | None
    size: int

    @property
    def dropped(self) -> tuple[int, ...]:
        """The dims that integers drop of its value, rows in front, in the order of the index."""
        kind = component(self.component)
        scalar = dict(zip((kind.place, kind.unit, "src"), self.scalar, strict=True))
        return tuple(i for i, dim in enumerate((d for d in kind.index if d != "layer"), start=1) if scalar[dim])


def narrowed(write: Write, chosen: Sequence[int]) -> Write:
    """The write at some of its positions."""
    terms = tuple(
        t if len(t.positions) == 1 and len(write.positions) > 1 else _narrowed(t, chosen) for t in write.terms
    )
    positions, offsets = (tuple([along[i] for i in chosen]) for along in (write.positions, write.offsets))
    return Write(
        write.component,
        write.layer,
        positions,
        offsets,
        write.units,
        write.add,
        terms,
        write.constant,
        write.recorded,
        write.scalar,
        write.function,
        write.srcs,
        write.renormalize,
        write.standing,
        write.spread,
        write.portion,
    )


def _narrowed(term: Term, chosen: Sequence[int]) -> Term:
    positions = tuple([term.positions[i] for i in chosen])
    return Term(term.factor, term.world, term.component, term.layer, positions, term.units, term.srcs, term.tally)


def streams(writes: Iterable[Write]) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """The edited streams that single heads read in one row: (component, layer) → units that read the same one."""
    split: dict[tuple[str, int], list[Write]] = defaultdict(list)
    for write in writes:
        if write.component in SPLIT_READERS:
            split[write.component, write.layer].append(write)
    found = {}
    for place, several in split.items():
        alike: dict[Any, list[int]] = defaultdict(list)
        for unit in sorted({unit for write in several for unit in write.units or ()}):
            touching = [(i, w) for i, w in enumerate(several) if unit in (w.units or ())]
            alike[tuple((i, None if w.same_for_units else unit) for i, w in touching)].append(unit)
        found[place] = [tuple(units) for units in alike.values()]
    return found


@dataclass(slots=True, eq=False)
class Job:
    """A row on a pair that must be measured.

    Attributes:
        row: Number of the recorded row; -1 for a world's run, and for an unpatched witness.
        pair: Number of the pair.
        base: The world that is edited.
        writes: Its edits in forward order.
        start: The first position that differs from the base; what stands before it need not be computed.
        birth: The first layer that differs from the base.
        reads: The live values that it saves.
        raw: Whether it is a row's raw trace instead of edits.
    """

    row: int
    pair: int
    base: WorldName
    writes: tuple[Write, ...]
    start: int
    birth: int
    reads: tuple[Read, ...] = ()
    raw: bool = False

    @property
    def seats(self) -> int:
        """Batch elements it takes: itself, and a shadow for each edited stream that single heads of a layer read."""
        layers: dict[int, int] = defaultdict(int)
        for (_, layer), found in streams(self.writes).items():
            layers[layer] += len(found)
        return 1 + max(layers.values(), default=0)


def parts(items: Sequence[Any], length: Callable[[Any], Any], most: int) -> list[list[Any]]:
    """Items in parts of at most ``most`` of one length, so that nothing is padded; in order within a length."""
    same: dict[Any, list[Any]] = {}
    for item in items:
        same.setdefault(length(item), []).append(item)
    return [found[i : i + most] for _, found in sorted(same.items()) for i in range(0, len(found), most)]


def unpatched(pair: int, world: WorldName) -> Job:
    """A run of a world as it is."""
    return Job(-1, pair, world, (), 0, 0)


def order_of(items: Sequence[Any], split: Sequence[Sequence[Any]]) -> list[int] | None:
    """Where each item stands among those of the parts, one part after the other; ``None`` if in the same order."""
    found = {id(item): i for i, item in enumerate(itertools.chain(*split))}
    order = [found[id(item)] for item in items]
    return None if order == sorted(order) else order


def without_overwritten(writes: list[Write]) -> list[Write]:
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
