"""A batch as plain columns: which cells of which activation are written with what, in the order of the forward.

What leaves this module is nested tuples of builtins and index tensors, so that ``trace`` needs nothing of ours to run
it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.climb import KNOWN, between, ending, growth, leaving, narrowed, top, whole_prompts, world_cells
from tracepatch.constants import Constant
from tracepatch.jobs import CACHED, EAGER, Job, Read, Term, Write
from tracepatch.sites import SCALES, SPLIT_READERS, STAGES, component
from tracepatch.sites import stage as stage_of
from tracepatch.table import Table

Columns: TypeAlias = tuple[Any, ...]
"""``(add, cells, terms, constant, function, portion, renormalize)``: one indexed write; see ``writing.edited``."""
Stop: TypeAlias = tuple[Any, ...]
"""``(place, tasks)``: where values are kept or written; see ``trace.visit``."""
Key: TypeAlias = tuple[str, int]
Shadows: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]
"""What is edited, which shadow rows read it, and what is taken from those; see ``shadows``."""
FIRST, LAST = -1, 99  # before and after whatever is written at a place
GROW, TOP = -2, 100  # a table grows before that, and what is read is taken from it after


@dataclass(frozen=True)
class Seats:
    """Where the tokens of each batch element stand.

    Attributes:
        world_of: (pair, world) → its index in what was kept of the worlds.
        length: Tokens of a prompt.
        table: The seats, where rows are not whole prompts.
    """

    world_of: dict[tuple[int, str], int]
    length: int
    table: Table | None = None

    def cell(self, number: int, name: str, position: int) -> tuple[int, int]:
        """Row and slot of a job's position, for a component."""
        if self.table is None or name == "logits":  # which are put back into rows first
            return number, position
        lane, slot = self.table.cell(number, position)
        return lane, slot + self.table.prefix * (name in CACHED)

    def key(self, number: int, position: int) -> int:
        """Where attention finds the key of a position."""
        return position if self.table is None else self.table.key(number, position)

    def slots(self, layer: int) -> int:
        """How many slots a row of traced tensors has in a layer."""
        return self.length if self.table is None else self.table.in_layer(layer)[1]

    def lanes(self, layer: int, rows: int) -> int:
        """How many rows traced tensors have in a layer, or, at -1, the logits, of a batch with so many rows."""
        return rows if self.table is None or layer < 0 else self.table.in_layer(layer)[0]


def stops(
    architecture: Architecture,
    keep: Iterable[Key],
    writes: dict[Key, tuple[Columns, ...]],
    shadows: dict[Key, Shadows] | None = None,
    reads: dict[Key, tuple[Columns, ...]] | None = None,
    seats: Seats | None = None,
    chosen: Sequence[int] = (),
    until: int | None = None,
    slopes: Mapping[Place, Sequence[tuple[int, tuple[Any, ...]]]] | None = None,
) -> tuple[Stop, ...]:
    """The places to visit, in the order in which they pass by, each with what is kept, written and saved there.

    With ``slopes``, of ``slopes.Slopes``, also with what a backward needs.
    """
    keep, shadows, reads = set(keep), shadows or {}, dict(reads or {})
    known = reads.pop(KNOWN, ())
    tasks: dict[Place, list[tuple[int, tuple[Any, ...]]]] = defaultdict(list)
    found: list[tuple[float, int, Stop]] = [(FIRST, 0, (("", "", "known", None, 0), known))] if known else []
    for name, layer in sorted(keep | set(writes) | set(shadows) | set(reads)):
        if name == "logits":
            continue
        kept = _whole(name, seats) if (name, layer) in keep else False, reads.get((name, layer), ())
        stage, task = stage_of(name), (writes.get((name, layer), ()), kept)
        if name == "head_out":
            _head_out(architecture, layer, tasks, task)
        elif name in ("attn_in", "mlp_in"):
            stream, norm, place = architecture.reader(name, layer)
            tasks[stream].append((keep_before(stream, place), ("aside", (name, layer))))
            tasks[place].append((stage, ("reader", (name, layer), *task, (name, layer), norm)))
        elif name in SCALES:
            stream, norm, place = architecture.scaled(name, layer)
            aside = (name.removesuffix("_scale"), layer)
            tasks[stream].append((keep_before(stream, place), ("aside", aside)))
            tasks[place].append((stage, ("scale", (name, layer), *task, aside, norm, *_owners(name, layer, shadows))))
        elif name in SPLIT_READERS:
            stream, norm, place = architecture.reader(name, layer)
            tasks[stream].append((keep_before(stream, place), ("aside", ("attn_in", layer))))
            edited, reading, taken = shadows[name, layer]
            rows, changed, saves = edited
            count = architecture.units(name, layer)
            place_of = ("attn_in", layer), norm, count, rows, saves
            tasks[place].append((stage, ("shadows", (name, layer), changed, *place_of, *reading)))
            if taken:
                made = SPLIT_READERS[name]
                tasks[architecture.place(made, layer)].append((FIRST, ("from_shadows", *taken)))
        elif name in EAGER:
            allowed = "allowed", layer
            lowest = torch.finfo(architecture.dtype).min / 2
            tasks[architecture.place("scores", layer)].append((FIRST, ("allowed", allowed, lowest)))
            tasks[architecture.place(name, layer)].append((stage, ("weights", (name, layer), *task, allowed)))
        elif name == "resid_mid":
            tasks[architecture.layers[layer].pre].append((LAST, ("aside", ("stream", layer))))
            out = architecture.place("attn_out", layer)
            tasks[out].append((stage, ("resid_mid", (name, layer), *task, ("stream", layer), out.scale)))
        elif name == "resid_pre":
            place = architecture.stream(layer)
            tasks[place].append((stage, ("plain", (name, layer), *task, 0, place.scale)))
        else:
            place = architecture.place(name, layer)
            heads = heads_of(architecture, name, layer)
            tasks[place].append((stage, ("plain", (name, layer), *task, heads, place.scale)))
    for place, several in (slopes or {}).items():
        tasks[place] += several
    if until is not None:
        found += ending(architecture, until)
    if seats and seats.table:
        for place, task in growth(architecture, seats.table, seats.world_of):
            tasks[place].append((GROW, task))
        found += between(architecture, seats.table)
        if chosen:
            tasks[leaving(architecture, seats.table)].append((TOP, top(seats.table, seats.world_of, chosen)))
            found += narrowed(architecture, seats.table, chosen, {*keep, *reads}, writes)
    for place, several in tasks.items():
        several.sort(key=lambda t: t[0])
        at = place.path, place.operation, place.side, place.key, _slots(architecture, place, seats)
        found.append((place.order, several[0][0], (at, tuple(dict.fromkeys(t for _, t in several)))))
    return tuple(stop for *_, stop in sorted(found, key=lambda f: f[:2]))


def _whole(name: str, seats: Seats | None) -> Any:
    """What to keep of a component for the worlds: all of it, or where a table has them."""
    return world_cells(seats.table, seats.world_of, name) if seats and seats.table else True


def _slots(architecture: Architecture, place: Place, seats: Seats | None) -> int:
    """How many slots stand in one dim with the rows at a place; 0 where they have a dim of their own."""
    if not place.flat or seats is None:
        return 0
    layer = sum(layer.pre.order <= place.order for layer in architecture.layers) - 1
    return seats.slots(layer)


def heads_of(architecture: Architecture, name: str, layer: int) -> Any:
    """How heads stand in what passes by: so many side by side, before the positions (``"first"``), or none (0)."""
    return architecture.units(name, layer) if name == "z" else "first" if name in ("q", "k", "v") else 0


def keep_before(stream: Place, reads: Place) -> int:
    """When to keep the stream for one reader: after what is written at its norm, before what is written at itself."""
    return FIRST if stream == reads else LAST


def _head_out(architecture: Architecture, layer: int, tasks: Any, task: tuple[Any, ...]) -> None:
    how, heads = architecture.head_projection(layer), architecture.units("head_out", layer)
    z, out = architecture.place("z", layer), architecture.place("attn_out", layer)
    # After edits of z itself, which come first in a block.
    tasks[z].append((LAST, ("aside", ("z", layer))))
    factor = None
    if how.post_norm:
        factor = ("normed", layer)
        tasks[Place(how.post_norm, "input", order=out.order - 1)].append((LAST, ("aside", factor)))
    stage = STAGES["head_out"]
    tasks[out].append(
        (
            stage,
            (
                "head_out",
                ("head_out", layer),
                *task,
                ("z", layer),
                heads,
                how.projection,
                how.post_norm,
                factor,
                out.scale,
            ),
        )
    )


def _owners(name: str, layer: int, shadows: dict[Key, Shadows]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shadow rows that read through a norm, and the rows that they belong to."""
    seats: list[int] = []
    owners: list[int] = []
    for split in SPLIT_READERS if name == "attn_in_scale" else ():
        if (split, layer) in shadows:
            (rows, *_), (reading, members, _), taken = shadows[split, layer]
            seats += reading.tolist() if taken else []
            owners += rows[members].tolist() if taken else []
    return tuple(seats), tuple(owners)


def columns(
    jobs: Iterable[Job], architecture: Architecture, seats: Seats, split: bool = False
) -> dict[Key, tuple[Columns, ...]]:
    """Every edit of a batch as a few indexed writes for each component and layer.

    With ``split`` the edits of what single heads read, otherwise all others.

    Edits that write the same kind of source are one write. Two edits of one row at the same component and layer stay in
    their order.
    """
    found: dict[Any, list[tuple[int, Write, Job]]] = defaultdict(list)
    for number, job in enumerate(jobs):
        turns: dict[Key, int] = defaultdict(int)
        for write in job.writes:
            place = write.component, write.layer
            if (write.component in SPLIT_READERS) is not split:
                continue
            signature = tuple((t.factor, t.key, t.units is None, t.srcs is None) for t in write.terms)
            found[
                turns[place],
                place,
                write.add,
                write.units is None,
                write.srcs is None,
                write.renormalize,
                write.portion,
                signature,
                tuple(tally for tally, _ in write.spread),
                write.constant is None,
                _number(write),
                _shape(write),
            ].append((number, write, job))
            turns[place] += 1
    result: dict[Key, list[Columns]] = defaultdict(list)
    for (_, place, add, *_), members in sorted(found.items(), key=lambda item: item[0][0]):
        result[place].append(_columns(add, members, architecture, seats))
    return {place: tuple(groups) for place, groups in result.items()}


def read_columns(
    jobs: Iterable[Job],
) -> tuple[dict[Key, tuple[Columns, ...]], list[list[tuple[int, int]]]]:
    """What the rows of a flat batch save: one indexed read for all that save the same cells.

    Returns:
        (component, layer) → ``(key, cells, base, swap, dropped, reduce)`` as ``writing.retain`` takes them, and for
        each number of a key the (job's number, its save's number) of its rows.
    """
    alike: dict[Read, list[tuple[int, int]]] = defaultdict(list)
    for number, job in enumerate(jobs):
        for read in job.reads:
            alike[replace(read, number=0)].append((number, read.number))
    found: dict[Key, list[Columns]] = defaultdict(list)
    for order, (read, whose) in enumerate(alike.items()):
        cells, swap = whole_prompts(read, [number for number, _ in whose]), component(read.component).attends
        column = ("save", order), cells, None, swap, read.dropped, read.reduce
        found[read.component, read.layer].append(column)
    return {key: tuple(several) for key, several in found.items()}, list(alike.values())


def at_reads(reads: Sequence[int], write: Columns) -> Columns:
    """A write of logits, counted among the positions that are read."""
    add, (rows, slots, *_), terms, constant, function, portion, _ = write
    place = {p: i for i, p in enumerate(reads)}
    inside = torch.tensor([p in place for p in slots.tolist()])
    kept = torch.tensor([place[p] for p in slots.tolist() if p in place], dtype=torch.long)
    chosen = tuple(
        (f[inside], n, None, lift) if at is None else (f, n, (at[0][inside], at[1][inside], *at[2:]), lift)
        for f, n, at, lift in terms
    )
    if constant is not None and constant.ndim:
        constant = constant[inside]
    assert function is None or bool(inside.all()), "the planner has its positions read"
    return add, (rows[inside], kept, None, None), chosen, constant, function, portion, False


def saved_at_reads(reads: Sequence[int], read: Columns) -> Columns:
    """A read of logits, counted among the positions whose logits are computed."""
    number, (rows, slots, *rest), *how = read
    return number, (rows, torch.searchsorted(torch.tensor(reads), slots), *rest), *how


def _columns(add: bool, members: list[tuple[int, Write, Job]], architecture: Architecture, seats: Seats) -> Columns:
    cells: list[list[int]] = [[], [], [], []]
    sample = members[0][1]
    terms: list[list[list[int]]] = [[[], [], [], []] for _ in sample.terms]
    for number, write, job in members:
        for i, j, k in _each_cell(write):
            row, slot = seats.cell(number, write.component, write.positions[i])
            cells[0].append(row)
            cells[1].append(slot)
            if write.units is not None:
                cells[2].append(write.units[j])
            if write.srcs is not None:
                cells[3].append(seats.key(number, write.srcs[k]))
            for found, term in zip(terms, write.terms, strict=True):
                found[0].append(seats.world_of[job.pair, term.world])
                found[1].append(_at(term.positions, i))
                if term.units is not None:
                    found[2].append(_at(term.units, j))
                if term.srcs is not None:
                    found[3].append(_at(term.srcs, k))
    lowered: tuple[Any, ...] = tuple(
        (t.factor, t.key, tuple(index(i) for i in found), _lifted(t, sample))
        for t, found in zip(sample.terms, terms, strict=True)
    )
    writes = [write for _, write, _ in members]
    if sample.constant is None or _number(sample) is not None:
        constant = None if sample.constant is None else sample.constant.tensor
    else:
        constant = torch.cat([_cells(w, w.constant, architecture, seats.length) for w in writes if w.constant])
    for n, (tally, _) in enumerate(sample.spread):  # a number that is known in the run, times fixed ones
        fixed = torch.cat([_cells(w, w.spread[n][1], architecture, seats.length) for w in writes])
        lowered += ((fixed, tally.key, None, False),)
    made = sample.function
    function = None if made is None else (made.function, made.arguments, len(members), *_shape(sample)[1:])
    portion = None if sample.portion is None else sample.portion.columns
    return add, tuple(index(i) for i in cells), lowered, constant, function, portion, sample.renormalize


def _each_cell(write: Write) -> Iterable[tuple[int, int, int]]:
    """Places of a write's cells among its positions, units and sources, in the order of the component's dims."""
    counts = {"pos": len(write.positions), "unit": len(write.units or (0,)), "src": len(write.srcs or (0,))}
    if component(write.component).attends:  # heads come before destinations
        order = itertools.product(range(counts["unit"]), range(counts["pos"]), range(counts["src"]))
        return ((i, j, k) for j, i, k in order)
    return itertools.product(range(counts["pos"]), range(counts["unit"]), range(counts["src"]))


def _shape(write: Write) -> tuple[Any, ...]:
    """A function, and the dims of the values that it takes of each row; ``None`` for dims that its index dropped."""
    if write.function is None:
        return ()
    kind = component(write.component)
    sizes = {kind.place: len(write.positions), kind.unit: write.units and len(write.units)}
    sizes["src"] = write.srcs and len(write.srcs)
    dropped = dict(zip((kind.place, kind.unit, "src"), write.scalar, strict=True))
    dims = [dim for dim in kind.index if dim != "layer" and sizes[dim] is not None]
    return write.function, *(None if dropped[dim] else sizes[dim] for dim in dims)


def _number(write: Write) -> float | None:
    """The constant, where it is one number."""
    constant = write.constant
    return None if constant is None or constant.tensor.shape else float(constant.tensor)


def _lifted(term: Term, write: Write) -> bool:
    """Whether the term is one vector a position where the write has every head: it needs a dim to be broadcast."""
    whole = write.units is None and component(write.component).unit is not None
    return whole and (term.units is not None or component(term.component).unit is None)


def _cells(write: Write, constant: Constant, architecture: Architecture, length: int) -> torch.Tensor:
    """A constant, one entry a cell: ``[cell, …]``."""
    kind, layer = component(write.component), min(write.layer, len(architecture) - 1)
    units = len(write.units) if write.units is not None else architecture.units(write.component, layer)
    sizes = {kind.place: write.recorded, kind.unit: units, "src": len(write.srcs) if write.srcs is not None else length}
    dropped = dict(zip((kind.place, kind.unit, "src"), write.scalar, strict=True))
    dims = [dim for dim in kind.index if dim != "layer"]
    if kind.dims[-1] not in kind.index:
        sizes[kind.dims[-1]] = architecture.width(write.component, layer)
        dims.append(kind.dims[-1])
    kept = [dim for dim in dims if not dropped.get(dim)]
    full = constant.tensor.broadcast_to([sizes[dim] for dim in kept])
    for i, dim in enumerate(dims):
        if dropped.get(dim):
            full = full.unsqueeze(i)
    full = full.index_select(dims.index(kind.place), torch.tensor(write.offsets))
    explicit = 1 + (write.units is not None) + (write.srcs is not None)  # leading dims that are indexed cell by cell
    return full.flatten(0, explicit - 1)


def _at(indices: tuple[int, ...], i: int) -> int:
    return indices[i] if len(indices) > 1 else indices[0]


def index(values: list[int]) -> torch.Tensor | None:
    """Indices as a tensor; ``None`` where there are none."""
    return torch.tensor(values, dtype=torch.long) if values else None
