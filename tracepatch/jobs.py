"""A row on a pair with every index resolved: what it writes and reads, and what must be computed for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from tracepatch.sites import SPLIT_READERS, component
from tracepatch.sources import Constant, Function, WorldName

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
    """A multiple of a world's activation at given positions, units and sources; single ones are broadcast."""

    factor: float
    world: WorldName
    component: str
    layer: int
    positions: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None = None


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

    @property
    def same_for_units(self) -> bool:
        """Whether every unit is written with the same value."""
        tensor = None if self.constant is None else self.constant.tensor
        one = tensor is None or tensor.ndim < 2 or tensor.shape[-2] == 1
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
    )


def _narrowed(term: Term, chosen: Sequence[int]) -> Term:
    positions = tuple([term.positions[i] for i in chosen])
    return Term(term.factor, term.world, term.component, term.layer, positions, term.units, term.srcs)


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
