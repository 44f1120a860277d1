"""A batch as plain columns: which cells of which activation are written with what, in the order of the forward.

What leaves this module is nested tuples of builtins and index tensors, so that ``trace`` needs nothing of ours to run
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.plan import Job, Term, Write
from tracepatch.sites import COMPONENTS, STAGES

Columns: TypeAlias = tuple[Any, ...]
"""``(add, rows, slots, units, terms, constant, function)``: one indexed write; see ``trace.edited``."""
Stop: TypeAlias = tuple[Any, ...]
"""``(place, tasks)``: where values are kept or written; see ``trace.visit``."""
Key: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class Seats:
    """Where the tokens of each batch element stand.

    Attributes:
        row_of: A job's number in the batch → its row of the traced tensors.
        slot_of: A component and a position of the prompt → its slot in that row.
        world_of: (pair, world) → its index in what was kept of the worlds.
    """

    row_of: Callable[[int], int]
    slot_of: Callable[[str, int], int]
    world_of: dict[tuple[int, str], int]


def stops(architecture: Architecture, keep: Iterable[Key], writes: dict[Key, tuple[Columns, ...]]) -> tuple[Stop, ...]:
    """The places to visit, in the order in which they pass by, each with what is kept and written there."""
    keep = set(keep)
    tasks: dict[Place, list[tuple[int, tuple[Any, ...]]]] = defaultdict(list)
    for name, layer in sorted(keep | set(writes)):
        if name == "logits":
            continue
        stage, task = STAGES[name], (writes.get((name, layer), ()), (name, layer) in keep)
        if name == "head_out":
            _head_out(architecture, layer, tasks, task)
        elif name == "resid_mid":
            tasks[architecture.stream(layer)].append((99, ("aside", ("stream", layer))))
            out = architecture.place("attn_out", layer)
            tasks[out].append((stage, ("resid_mid", (name, layer), *task, ("stream", layer), out.scale)))
        elif name == "resid_pre":
            place = architecture.stream(layer)
            tasks[place].append((stage, ("plain", (name, layer), *task, 0, place.scale)))
        else:
            place = architecture.place(name, layer)
            heads = architecture.units(name, layer) if name == "z" else "first" if place.operation else 0
            tasks[place].append((stage, ("plain", (name, layer), *task, heads, place.scale)))
    return tuple(
        (
            (place.path, place.operation, place.side, place.key, place.flat),
            tuple(task for _, task in sorted(found, key=lambda t: t[0])),
        )
        for place, found in sorted(tasks.items(), key=lambda item: item[0].order)
    )


def _head_out(architecture: Architecture, layer: int, tasks: Any, task: tuple[Any, ...]) -> None:
    how, heads = architecture.head_projection(layer), architecture.units("head_out", layer)
    z, out = architecture.place("z", layer), architecture.place("attn_out", layer)
    # After edits of z itself, which come first in a block.
    tasks[z].append((99, ("aside", ("z", layer))))
    factor = None
    if how.post_norm:
        factor = ("normed", layer)
        tasks[Place(how.post_norm, "input", order=out.order - 1)].append((99, ("aside", factor)))
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


def columns(jobs: Iterable[Job], architecture: Architecture, seats: Seats) -> dict[Key, tuple[Columns, ...]]:
    """Every edit of a batch as a few indexed writes for each component and layer.

    Edits that write the same kind of source are one write. Two edits of one row at the same component and layer stay in
    their order.
    """
    found: dict[Any, list[tuple[int, Write, Job]]] = defaultdict(list)
    for number, job in enumerate(jobs):
        turns: dict[Key, int] = defaultdict(int)
        for write in job.writes:
            place = write.component, write.layer
            signature = tuple((t.factor, t.component, t.layer, t.units is None) for t in write.terms)
            found[
                turns[place],
                place,
                write.add,
                write.units is None,
                signature,
                write.constant is None,
                _number(write),
                _shape(write),
            ].append((number, write, job))
            turns[place] += 1
    result: dict[Key, list[Columns]] = defaultdict(list)
    for (_, place, add, *_), members in sorted(found.items(), key=lambda item: item[0][0]):
        result[place].append(_columns(add, members, architecture, seats))
    return {place: tuple(groups) for place, groups in result.items()}


def _columns(add: bool, members: list[tuple[int, Write, Job]], architecture: Architecture, seats: Seats) -> Columns:
    rows: list[int] = []
    slots: list[int] = []
    units: list[int] = []
    sample = members[0][1]
    terms: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in sample.terms]
    for number, write, job in members:
        cells = [(i, j) for i in range(len(write.positions)) for j in range(len(write.units or (0,)))]
        rows += [seats.row_of(number)] * len(cells)
        slots += [seats.slot_of(write.component, write.positions[i]) for i, _ in cells]
        if write.units is not None:
            units += [write.units[j] for _, j in cells]
        for (worlds, positions, heads), term in zip(terms, write.terms, strict=True):
            worlds += [seats.world_of[job.pair, term.world]] * len(cells)
            positions += [seats.slot_of(term.component, _at(term.positions, i)) for i, _ in cells]
            if term.units is not None:
                heads += [_at(term.units, j) for _, j in cells]
    lowered = tuple(
        (t.factor, (t.component, t.layer), _index(w), _index(p), _index(h) if h else None, _lifted(t, sample))
        for t, (w, p, h) in zip(sample.terms, terms, strict=True)
    )
    if sample.constant is None or _number(sample) is not None:
        constant = None if sample.constant is None else sample.constant.tensor
    else:
        constant = torch.cat([_cells(write, architecture) for _, write, _ in members])
    made = sample.function
    function = None if made is None else (made.function, made.arguments, len(members), *_shape(sample)[1:])
    return add, _index(rows), _index(slots), _index(units) if units else None, lowered, constant, function


def _shape(write: Write) -> tuple[Any, ...]:
    """A function, and the dims of the values that it takes of each row; ``None`` for dims that its index dropped."""
    if write.function is None:
        return ()
    one_position, one_unit = write.scalar
    units = () if write.units is None else (None if one_unit else len(write.units),)
    return write.function, None if one_position else len(write.positions), *units


def _number(write: Write) -> float | None:
    """The constant, where it is one number."""
    constant = write.constant
    return None if constant is None or constant.tensor.shape else float(constant.tensor)


def _lifted(term: Term, write: Write) -> bool:
    """Whether the term is one vector a position where the write has every head: it needs a dim to be broadcast."""
    whole = write.units is None and COMPONENTS[write.component].unit is not None
    return whole and (term.units is not None or COMPONENTS[term.component].unit is None)


def _cells(write: Write, architecture: Architecture) -> torch.Tensor:
    """The constant, one entry a cell: ``[cell, …]``."""
    assert write.constant is not None
    kind, layer = COMPONENTS[write.component], min(write.layer, len(architecture) - 1)
    one_position, one_unit = write.scalar
    shape = [] if one_position else [write.recorded]
    if kind.unit is not None and not one_unit:
        shape.append(len(write.units) if write.units is not None else architecture.units(write.component, layer))
    if kind.dims[-1] != kind.unit:
        shape.append(architecture.width(write.component, layer))
    full = write.constant.tensor.broadcast_to(shape)
    if one_position:
        full = full[None]
    if kind.unit is not None and one_unit:
        full = full[:, None]
    full = full[list(write.offsets)]
    return full.flatten(0, 1) if write.units is not None else full


def _at(indices: tuple[int, ...], i: int) -> int:
    return indices[i] if len(indices) > 1 else indices[0]


def _index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
