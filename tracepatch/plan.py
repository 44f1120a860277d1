"""A plan: what will be traced, as data. Printed before anything runs, compared by tests, executed by an executor."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracepatch.errors import plural
from tracepatch.metrics import Metric
from tracepatch.rows import EditedWorld, Row
from tracepatch.sites import SPLIT_READERS
from tracepatch.sources import Constant, Function, WorldName


class Status(IntEnum):
    """What a cell of a result rests on."""

    ABSENT = 0
    MEASURED = 1
    PROVED_ZERO = 2


class Proof(IntEnum):
    """Why a row needs no forward of its own."""

    NONE = 0
    EQUAL = 1
    UNREACHABLE = 2
    BOTH = 3
    IDENTICAL = 4
    ABSENT = 5


PROOFS = {
    Proof.EQUAL: (
        "writes what is there: the worlds' tokens agree so far and attention is causal, or it is the base's own value"
    ),
    Proof.UNREACHABLE: (
        "cannot reach the metric: after the last position read, or beside it with no attention left to carry it"
    ),
    Proof.BOTH: "each of its positions falls under one of the two proofs above",
    Proof.IDENTICAL: "the same edits on the same pair are measured once",
}


EAGER = frozenset({"scores", "pattern"})
"""What can be seen only where attention is computed step by step."""


def parts(items: Sequence[Any], length: Callable[[Any], int], most: int) -> list[list[Any]]:
    """Items in parts of at most ``most`` that share a length, so that nothing is padded; in order within a length."""
    same: dict[int, list[Any]] = {}
    for item in items:
        same.setdefault(length(item), []).append(item)
    return [found[i : i + most] for _, found in sorted(same.items()) for i in range(0, len(found), most)]


def order_of(items: Sequence[Any], split: Sequence[Sequence[Any]]) -> list[int] | None:
    """Where each item stands among those of the parts, one part after the other; ``None`` if in the same order."""
    found = {id(item): i for i, item in enumerate(itertools.chain(*split))}
    order = [found[id(item)] for item in items]
    return None if order == sorted(order) else order


@dataclass(frozen=True, slots=True)
class Term:
    """A multiple of a world's activation at given positions, units and sources; single ones are broadcast."""

    factor: float
    world: WorldName
    component: str
    layer: int
    positions: tuple[int, ...]
    units: tuple[int, ...] | None
    srcs: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
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
    """A live value that a row saves, with every index resolved as in ``Write``.

    Attributes:
        number: Which of the row's saves it is.
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


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A row on a pair that must be measured.

    Attributes:
        row: Number of the recorded row; -1 for a run of an edited world.
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


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One traced forward: an unpatched witness, then one batch element a job. A raw trace is alone, after a witness."""

    jobs: tuple[Job, ...]

    @property
    def raw(self) -> bool:
        """Whether it is one row's raw trace."""
        return self.jobs[0].raw


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Pairs of one length whose worlds are run, kept, and used together.

    Attributes:
        length: Tokens of each prompt.
        pairs: Their numbers.
        reads: The positions whose logits are computed.
        needed: The (component, layer) of worlds' values that some edit writes.
        edited: The runs of edited worlds, world by world in the order in which they were made.
        batches: The patched forwards.
        captures: Traced runs of the unpatched worlds: one for each length of what an encoder reads.
    """

    length: int
    pairs: tuple[int, ...]
    reads: tuple[int, ...]
    needed: frozenset[tuple[str, int]]
    batches: tuple[Batch, ...]
    edited: tuple[tuple[Job, ...], ...] = ()
    captures: int = 1

    @property
    def writes(self) -> Iterator[Write]:
        """All that is written."""
        jobs = itertools.chain(*self.edited, *(b.jobs for b in self.batches))
        return (w for job in jobs for w in job.writes)


@dataclass(frozen=True, eq=False)
class Plan:
    """The traced forwards that answer a recipe, and every row that was proved to need none.

    Attributes:
        model: What the model is called.
        layers: Its depth.
        rows: The rows as recorded.
        pairs: How many pairs each is run on.
        worlds: The pristine worlds that are run for each pair.
        edited: The edited worlds that are run for each pair, in the order in which they were made.
        metrics: What is read.
        groups: What will be traced.
        proofs: Per recorded row and pair, why it needs no forward (``Proof``).
        twins: Per recorded row and pair, the flat index of the row whose value it shares, or -1.
        row_bytes: Estimated memory of one batch element at its peak.
        budget: Bytes that a batch may take.
        notes: Anything a user should know before running.
        remote: Where it runs, if not here.
        measured: After a run, its ``seconds``, and the line of its ``checks``.
    """

    model: str
    layers: int
    rows: tuple[Row, ...]
    pairs: int
    worlds: tuple[WorldName, ...]
    metrics: tuple[Metric, ...]
    groups: tuple[Group, ...]
    proofs: NDArray[np.int8]
    twins: NDArray[np.int64]
    row_bytes: int
    budget: int
    notes: tuple[str, ...] = ()
    remote: str = ""
    edited: tuple[EditedWorld, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def eager(self) -> bool:
        """Whether attention must be computed step by step."""
        read = (name for g in self.groups for name, _ in g.needed)
        written = (w.component for g in self.groups for w in g.writes)
        saved = (r.component for g in self.groups for b in g.batches for j in b.jobs for r in j.reads)
        return any(name in EAGER for name in (*read, *written, *saved))

    @property
    def batches(self) -> int:
        """Traced forwards with patched rows."""
        return sum(len(g.batches) for g in self.groups)

    @property
    def jobs(self) -> int:
        """Patched rows that are measured."""
        return sum(len(b.jobs) for g in self.groups for b in g.batches)

    def explain(self) -> str:
        """What will be traced and what will not, and why: a table for people.

        After the plan has run, it says how long that took and what the checks found.
        """
        total, counts = self.proofs.size, Counter(self.proofs.ravel().tolist())
        worlds = (len(self.worlds) + len(self.edited)) * self.pairs
        captures = sum(group.captures for group in self.groups) * (1 + len(self.edited))
        forwards = self.jobs + worlds + self.batches
        read = "; ".join(f"{m.name} [{m.unit or 'no unit'}] at position {m.positions}" for m in self.metrics)
        absent = counts[Proof.ABSENT]
        alone = total - absent + worlds
        lines = [
            f"{plural(len(self.rows), 'row')} × {plural(self.pairs, 'pair')} on {self.model} "
            f"({plural(self.layers, 'layer')})",
            f"  metric       {read}",
            f"  patches      {total - absent:,}"
            + (f" ({absent:,} more have no such position in their pair)" if absent else ""),
        ]
        for proof in (Proof.EQUAL, Proof.UNREACHABLE, Proof.BOTH, Proof.IDENTICAL):
            if counts[proof]:
                lines.append(f"    {-counts[proof]:>9,}  {PROOFS[proof]}")
        largest = max((sum(j.seats for j in b.jobs) + 1 for g in self.groups for b in g.batches), default=0)
        raw = sum(b.raw for g in self.groups for b in g.batches)
        shadows = sum(j.seats - 1 for g in self.groups for b in g.batches for j in b.jobs)
        lines += [
            f"    {self.jobs:>9,}  to be measured",
            f"  traced runs  {captures + self.batches:,}: {captures:,} for {self._worlds()}, "
            f"{self.batches:,} of up to "
            f"{largest:,} rows (one of them an unpatched witness)",
            f"  forwards     {forwards:,}{_ratio(alone, forwards)}",
            f"  memory       about {_size(largest * self.row_bytes)} a run, budget {_size(self.budget)}",
        ]
        if raw:
            lines.append(f"  raw traces   {raw:,} of these runs, each of one row, beside an unpatched run of its own")
        if shadows:
            lines.append(f"  shadows      {shadows:,} rows more, of which single heads read an edited stream")
        reads = [read for g in self.groups for b in g.batches for j in b.jobs for read in j.reads]
        if reads:
            size = _size(4 * sum(read.size for read in reads))
            less = ", less where they are reduced" if any(read.reduce for read in reads) else ""
            lines.append(f"  saves        {plural(len(reads), 'live value')}, {size}{less}")
        if self.eager:
            lines.append("  attention    computed step by step, as scores and patterns can be seen only there")
        lines += [f"  world        {world}" for world in self.edited]
        if self.remote:
            lines.append(f"  runs on      {self.remote}")
        lines += [f"  note         {note}" for note in self.notes]
        if self.measured:
            seconds = self.measured["seconds"]
            rate = (self.jobs + worlds) / max(seconds, 1e-9)
            lines.append(f"  took         {seconds:.2f} s, {rate:,.0f} rows a second")
            lines.append(f"  checks       {self.measured['checks']}")
        return "\n".join(lines)

    def _worlds(self) -> str:
        pristine, edited = (n * self.pairs for n in (len(self.worlds), len(self.edited)))
        more = f" and {edited:,} edited ones" if edited else ""
        return f"the {pristine:,} unpatched worlds{more}"

    def __str__(self) -> str:
        return self.explain()


def _ratio(before: int, after: int) -> str:
    if before > 1.05 * after:
        return f" instead of {before:,} ({before / after:.1f} × fewer)"
    return f" (one for each patch and world would be {before:,}; each run has a witness on top)"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
