"""What a table needs besides its edits: where it grows, what its blocks take from outside, and what is read at the top.

As in ``layout``, what leaves this module is nested tuples of builtins and tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.jobs import EAGER
from tracepatch.table import Run, Table

Cells = list[tuple[int, int]]
OF_MLP = ("mlp", "router", "experts")
ABOVE = 2 * 10**9  # after whatever is written


def growth(
    architecture: Architecture, table: Table, world_of: dict[Run, int]
) -> Iterator[tuple[Place, tuple[Any, ...]]]:
    """Where rows join, and the tasks that seat them there; see ``writing.grown``."""
    born: dict[int, list[int]] = defaultdict(list)
    for number, job in enumerate(table.jobs[table.worlds :], start=table.worlds):
        born[job.birth].append(number)
    before = entering(table)
    for layer in range(table.first, len(architecture) + 1):
        shape, cells, origin = table.shape[layer], [], []
        for number in born[layer]:
            job = table.jobs[number]
            cells += [table.cell(number, p) for p in range(job.start, table.end)]
            origin += [_base(table, world_of, job, p) for p in range(job.start, table.end)]
        if layer == table.first or shape != before or cells:
            source = None if table.worlds else ("resid_pre", layer)
            yield architecture.stream(layer), ("grow", before, shape, _columns(cells), source, _columns(origin))
        before = shape


def entering(table: Table) -> tuple[int, int]:
    """Lanes and slots of the tokens that enter the model: those of the worlds."""
    ends = [(lane + 1, slot + table.length(n)) for n, (lane, slot) in enumerate(table.seats[: table.worlds])]
    return max((lane for lane, _ in ends), default=0), max((slot for _, slot in ends), default=0)


def standing(table: Table) -> tuple[Any, ...]:
    """Who stands where, as plain columns; see ``masks``."""
    known = {run: number for number, run in enumerate(table.paths)}
    jobs = [
        (*seat, job.start, known.get((job.pair, job.base), len(known)))
        for seat, job in zip(table.seats, table.jobs, strict=True)
    ]
    paths = tuple((lane, torch.tensor(slots)) for lane, slots in table.paths.values())
    return torch.tensor(jobs), table.end, table.prefix, table.first, table.shape, paths


def between(architecture: Architecture, table: Table) -> Iterator[tuple[float, int, tuple[Any, ...]]]:
    """The blocks that are skipped, and those that take masks and tables from us, as ``(order, stage, stop)``."""
    for layer in architecture.layers:
        place = layer.pre
        if layer.index < table.first:
            yield place.order, 0, ((layer.path, "", "skip", layer.post.key, 0), ())
        elif table.form == "packed":
            yield place.order, 101, ((layer.path, "", "wire", None, 0), (("wire", layer.index),))


def leaving(architecture: Architecture, table: Table) -> Place:
    """Where what is read is taken: above the last layer, or, where rows must keep their length, before the logits."""
    if table.form == "packed":
        return architecture.stream(len(architecture))
    return Place(architecture.unembed, "input", order=ABOVE)


def narrowed(
    architecture: Architecture,
    table: Table,
    reads: Sequence[int],
    keep: Iterable[tuple[str, int]],
    writes: Mapping[tuple[str, int], Sequence[tuple[Any, ...]]],
) -> Iterator[tuple[float, int, tuple[Any, ...]]]:
    """The last MLP for the tokens alone that are read: above it no other matters; as ``(order, stage, stop)``."""
    last = len(architecture) - 1
    mlp = architecture.mlp(last)
    inside = any(layer == last and name.startswith(OF_MLP) for name, layer in (*keep, *writes))
    inside = inside or any(layer > last for _, layer in keep)
    # A function of the stream above may be given all of it.
    inside = inside or any(w[4] is not None for (_, layer), found in writes.items() if layer > last for w in found)
    own_module = mlp is not None and mlp.kind == "mlp" and mlp.path != architecture.layers[last].path
    if table.form != "packed" or inside or mlp is None or not own_module or mlp.reads is None or mlp.out is None:
        return
    born = [n for n, job in enumerate(table.jobs) if job.birth <= last]
    cells = [table.cell(n, p) for n in born for p in reads if p >= table.jobs[n].start]
    at, within = _columns(cells), mlp.out.path == mlp.path or mlp.out.path.startswith(f"{mlp.path}.")
    yield mlp.reads.order - 0.25, 0, ((mlp.path, "", "input", None, 0), (("narrow", at),))
    wide = mlp.out.order + (0.25 if within else -0.25)
    yield wide, 0, ((mlp.path, "", "output", None, 0), (("widen", at, table.shape[last]),))


def top(table: Table, world_of: dict[Run, int], reads: Sequence[int]) -> tuple[Any, ...]:
    """What is read, job by job, of the stream above the last layer; see ``writing.chosen``."""
    at: list[int] = []
    cells: Cells = []
    others: list[int] = []
    origin: Cells = []
    depth = len(table.shape) - 1
    for number, job in enumerate(table.jobs):
        for i, position in enumerate(reads):
            if position >= job.start:
                at.append(number * len(reads) + i)
                cells.append(table.cell(number, position))
            else:
                others.append(number * len(reads) + i)
                origin.append(_base(table, world_of, job, position))
    source = None if table.worlds else ("resid_pre", depth)
    return "top", _index(at), _columns(cells), _index(others), source, _columns(origin)


def world_cells(table: Table, world_of: dict[Run, int], name: str) -> tuple[torch.Tensor, ...]:
    """Where the worlds stand that a batch computes: ``[world, pos]``; for scores and pattern ``[world, pos, src]``."""
    runs = sorted(table.paths, key=world_of.__getitem__)
    lanes = torch.tensor([[table.paths[run][0]] for run in runs])
    slots = torch.tensor([table.paths[run][1] for run in runs])
    return (lanes[:, None], slots[:, :, None], slots[:, None]) if name in EAGER else (lanes, slots)


def _base(table: Table, world_of: dict[Run, int], job: Any, position: int) -> tuple[int, int]:
    """Where a job's base has a position: in the table, or among the known worlds."""
    if not table.worlds:
        return world_of[job.pair, job.base], position
    lane, slots = table.paths[job.pair, job.base]
    return lane, slots[position]


def _columns(cells: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(list(cells), dtype=torch.long).reshape(-1, 2).T)


def _index(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
