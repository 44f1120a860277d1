"""What a run needs besides its edits: where a table grows, what its blocks take from outside, what is read, its end.

As in ``layout``, what leaves this module is nested tuples of builtins and tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.jobs import CACHED, EAGER, Job, Read
from tracepatch.sites import component
from tracepatch.table import Run, Table

Cells = list[tuple[int, int]]
OF_MLP = ("mlp", "router", "experts")
ABOVE = 2 * 10**9  # after whatever is written
KNOWN = ("known", 0)  # where what is read of worlds alone stands among what is read


def growth(
    architecture: Architecture, table: Table, world_of: dict[Run, int]
) -> Iterator[tuple[Place, tuple[Any, ...]]]:
    """Where rows join, and the tasks that seat them there; see ``writing.grown``."""
    born: dict[int, list[int]] = defaultdict(list)
    for number, job in enumerate(table.jobs[table.worlds :], start=table.worlds):
        born[job.birth].append(number)
    before = entering(table)
    for layer in range(table.first, len(table.shape)):
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
        elif table.form == "packed" and layer.index < len(table.shape) - 1:
            yield place.order, 101, ((layer.path, "", "wire", None, 0), (("wire", layer.index),))


def ending(architecture: Architecture, until: int) -> Iterator[tuple[float, int, tuple[Any, ...]]]:
    """The blocks above the last layer that is computed, and what is above them, are skipped; as ``between``."""
    for layer in architecture.layers[until:]:
        yield layer.pre.order, 102, ((layer.path, "", "skip", layer.post.key, 0), ())
    above = (architecture.final_norm, architecture.unembed) if until <= len(architecture) else ()
    for order, path in enumerate(above, ABOVE):
        if path:
            yield order, 0, ((path, "", "skip", None, 0), ())


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


def looked(
    architecture: Architecture,
    seen: Iterable[Read],
    jobs: Sequence[Job],
    table: Table | None,
    world_of: dict[Run, int],
    length: int,
) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What metrics read of a batch, row by row: (component, layer) → columns as ``writing.retain`` takes them.

    Args:
        architecture: Of the model.
        seen: What is read.
        jobs: The rows.
        table: Their seats, where they are no whole prompts.
        world_of: (pair, world) → its index in what was kept of the worlds.
        length: Tokens of a prompt.
    """
    found: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for read in seen:
        place, cells, base = (read.component, read.layer), whole_prompts(read, range(len(jobs))), None
        if table is not None:
            units = architecture.units(*place) if read.component in EAGER else 0
            cells, base = _seated(read, table, world_of, units, length)
            place = place if table.worlds or len(base[0]) else KNOWN
        swap = component(read.component).attends
        found[place].append((("metric", read.number), cells, base, swap, read.dropped, None))
    return {place: tuple(several) for place, several in found.items()}


def whole_prompts(read: Read, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The cells of a read in rows that are whole prompts, to be broadcast: ``[row, pos, unit, src]``."""
    parts = [rows, read.positions, *(part for part in (read.units, read.srcs) if part is not None)]
    return tuple(torch.tensor(part).view(-1, *[1] * (len(parts) - 1 - i)) for i, part in enumerate(parts))


def _seated(
    read: Read, table: Table, world_of: dict[Run, int], units: int, length: int
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """The cells of a read in a table, and where its base has those below a row's birth and before its start."""
    eager = read.component in EAGER  # indexed weight by weight: keys stand apart
    own = read.component in CACHED
    srcs = read.srcs or (range(length) if eager else ())
    picked = read.units or (range(units) if eager else None)
    at: list[int] = []
    cells: Cells = []
    keys: list[list[int]] = []
    others: list[int] = []
    origin: Cells = []
    looked_back: list[list[int]] = []
    for number, job in enumerate(table.jobs):
        born = job.birth <= read.layer and read.component != "embed"
        for i, position in enumerate(read.positions):
            here = number * len(read.positions) + i
            if born and position >= job.start:
                lane, slot = table.cell(number, position)
                at.append(here)
                cells.append((lane, table.prefix + slot if own else slot))
                keys.append([table.key(number, src) for src in srcs])
            else:
                others.append(here)
                origin.append(_base(table, world_of, job, position))
                looked_back.append([_base(table, world_of, job, src)[1] for src in srcs])
    source = None if table.worlds else (read.component, read.layer)
    whole = _indexed(cells, picked, keys, eager)
    return whole, (_index(at), _index(others), source, _indexed(origin, picked, looked_back, eager), len(table.jobs))


def _indexed(cells: Cells, units: Sequence[int] | None, keys: list[list[int]], eager: bool) -> tuple[torch.Tensor, ...]:
    """Cells with their units and keys, to be broadcast: ``[cell, unit, src]``."""
    dims = (units is not None) + eager
    found = [column.view(-1, *[1] * dims) for column in _columns(cells)]
    if units is not None:
        found.append(torch.tensor(units).view(1, -1, *[1] * eager))
    if eager:
        found.append(torch.tensor(keys, dtype=torch.long)[:, None])
    return tuple(found)


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
