"""The operations that make the tables of a plan: means over prompts, and what the stream adds to logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tracepatch import trace
from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.jobs import Job, parts, unpatched
from tracepatch.layout import Seats, stops
from tracepatch.metrics import Metric
from tracepatch.references import ReferenceWorld, Survey, Tally
from tracepatch.sites import Select
from tracepatch.traced import Tracer, direct_key


def surveyed(tracer: Tracer) -> Iterator[tuple[Any, ...]]:
    """The operations that make the tables of all references; see ``program.operate``."""
    directed = [_directed(tracer, metric) for metric in tracer.plan.metrics]
    return itertools.chain(*[_survey(tracer.architecture, one) for one in tracer.plan.surveys], *directed)


def _directed(tracer: Tracer, metric: Metric) -> Iterator[tuple[Any, ...]]:
    """The operations that show what the stream adds to a pair's logit difference, where a metric needs it."""
    if "direct" not in metric.needs or metric.site is None:
        return
    runs = [unpatched(pair, world) for world in tracer.pristine for pair in range(len(tracer.encoded))]
    place = {id(job): i for i, job in enumerate(runs)}
    most = max(1, int(tracer.plan.budget // 2 // max(1, tracer.plan.row_bytes)))
    for jobs in parts(runs, partial(_size, tracer), most):
        inputs = tracer.named(jobs)
        (at,) = metric.site.pos.on(tracer.side(jobs[0])) or (0,)
        if tracer.architecture.keeps_logits:
            inputs["logits_to_keep"] = torch.tensor([at])
        sides = [(1.0, tracer.encoded.answer), (-1.0, tracer.encoded.wrong)]
        columns = sorted({i for job in jobs for _, ids in sides for i in ids[job.pair]})
        shares = torch.zeros(len(jobs), len(columns))
        for n, job in enumerate(jobs):
            for sign, ids in sides:
                shares[n, [columns.index(i) for i in ids[job.pair]]] += sign / len(ids[job.pair])
        given = tracer.architecture.final_norm, tracer.architecture.unembed, at, torch.tensor(columns), shares
        yield "direct", direct_key(metric), inputs, given, torch.tensor([place[id(j)] for j in jobs]), len(runs)


def _size(tracer: Tracer, job: Job) -> int:
    """The same for runs that may stand side by side."""
    read = len(tracer.encoded.encoded(tracer.root(job), job.pair))
    return tracer.side(job).length + (read << 32)


def _survey(architecture: Architecture, survey: Survey) -> Iterator[tuple[Any, ...]]:
    world, keep = survey.world, {(t.component, t.layer) for t in survey.tallies}
    for numbers in survey.runs:
        ids = torch.tensor([world.ids[i] for i in numbers])
        inputs = trace.named(ids, torch.tensor([world.encoder[i] for i in numbers]) if world.encoder else None)
        if survey.until > len(architecture) and architecture.keeps_logits:
            inputs |= {"logits_to_keep": torch.tensor([-1])}
        visited = stops(architecture, keep, {}, seats=Seats({}, ids.shape[1]), until=survey.until)
        side = world.sides[numbers[0]]
        moves = tuple(m for t in survey.tallies if (m := _move(architecture, world, t, side)) is not None)
        rows = torch.tensor([world.rows[i] for i in numbers])
        yield "add", world.name, (inputs, visited, ("none", None), *trace.PLAIN), rows, moves
    yield "finish", world.name, tuple(tally.key for tally in survey.tallies)


def _move(architecture: Architecture, world: ReferenceWorld, tally: Tally, side: Side) -> tuple[Any, ...] | None:
    """What of prompts that are alike goes where in a table, see ``tallies``; ``None`` if nothing does."""
    place = tally.key, (tally.component, tally.layer)
    if tally.spread:
        assert isinstance(tally.along, Select)
        here = tally.along.on(side)
        count = architecture.units(tally.component, min(tally.layer, len(architecture) - 1))
        units = None if tally.unit.all else torch.tensor(tally.unit.resolve(count))
        return (*place, torch.tensor(here), None, units, ()) if here else None
    ways = [world.picked(tally.along, side)] + ([] if tally.src is None else [world.picked(tally.src, side)])
    if not all(here for here, _ in ways):
        return None
    taken, put = ([torch.tensor(part) for part in parts] for parts in zip(*ways, strict=True))
    shape = 1 + max(world.rows), *(world.room(way) for way in (tally.along, tally.src) if way is not None)
    one = tally.src is None
    return (*place, taken[0] if one else tuple(taken), put[0] if one else tuple(put), None, shape)
