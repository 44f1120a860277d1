"""From lowered rows to a plan: which rows are measured, and which run measures them.

Decides everything and touches no tensor of the model.
"""

from __future__ import annotations

import gc
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.cautions import cautions
from tracepatch.costs import (
    Estimate,
    default_costs,
    encoder_bytes,
    flat_bytes,
    saved_bytes,
    seen_bytes,
    table_bytes,
    traffic,
)
from tracepatch.errors import RecipeError, SiteError, plural
from tracepatch.jobs import EAGER, Job, Read, Write
from tracepatch.lowering import Lowering
from tracepatch.metrics import Metric, columns_read
from tracepatch.packing import Packer
from tracepatch.plan import PROVED, Group, Plan, Proof
from tracepatch.profiles import Profile, profile_of, require_given
from tracepatch.reach import layers_needed
from tracepatch.references import ReferenceWorld, Survey
from tracepatch.rows import EditedWorld, Row
from tracepatch.sources import WorldName, noises
from tracepatch.surveys import cost, surveys
from tracepatch.table import Form
from tracepatch.tokens import EncodedPairs

MEMORY = 1 << 30
TRIES = 20  # rows among which one is looked for that forwards reach


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: again and again it would look through all rows, and find none of them dead."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def make_plan(
    architecture: Architecture,
    encoded: EncodedPairs,
    rows: Sequence[Row],
    metrics: tuple[Metric, ...],
    *,
    model: str = "",
    prune: bool = True,
    batch_size: int | None = None,
    memory: int | None = None,
    remote: str = "",
    edited: Sequence[EditedWorld] = (),
    numbers: Sequence[int] | None = None,
    form: Form = "flat",
    why: tuple[str, ...] = (),
    rides: bool = True,
    device: str = "cpu",
    pace: float | None = None,
    ends: str = "",
    references: Sequence[ReferenceWorld] = (),
) -> Plan:
    """Lowers, prunes and packs.

    Args:
        architecture: What the model has, and what its code was proved to do.
        encoded: The pairs.
        rows: The recorded rows.
        metrics: What will be read.
        model: What the model is called.
        prune: ``False`` measures every row.
        batch_size: Rows a run; without it, as many as the memory budget allows and as still gain speed.
        memory: Bytes that may be taken: half by the worlds' values that are kept, half by a run; 1 GiB otherwise.
        remote: Where the plan will run, if not here.
        edited: The edited worlds.
        numbers: Of the pairs, which noise is drawn for; where they stand among the pairs otherwise.
        form: The form of a batch that the model allows.
        why: Why not the faster ones, in words.
        rides: Whether rows may be measured in the run that computes their worlds.
        device: The type of device that it runs on.
        pace: How many times longer than estimated a run of this model took here, if there was one.
        ends: Why a forward of the model cannot end below its last layer, in words; empty if it can.
        references: The reference worlds.

    Raises:
        RecipeError: There are no rows.
        MetricError: A metric lacks what it needs of the pairs, or reads positions that a prompt does not have.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise RecipeError(f"batch_size is a number of rows, 1 or more, not {batch_size!r}.")
    if memory is not None and not memory > 0:
        raise RecipeError(f"memory is a number of bytes, not {memory!r}.")
    if not rows:
        raise RecipeError(
            "The recipe recorded no rows: nothing would be patched. Write edits inside `with p.row(...):`."
        )
    require_given(metrics, encoded)
    profiles = [profile_of(architecture, encoded, metrics, pair) for pair in range(len(encoded))]
    edits = [edit for row in rows for edit in row.edits] + [edit for world in edited for edit in world.edits]
    if any(noises(edit.source) for edit in edits):
        profiles = [
            replace(profile, pair=n) for n, profile in zip(numbers or range(len(encoded)), profiles, strict=True)
        ]
    notes = []
    if prune and not architecture.causal:
        prune = False
        notes.append(
            "nothing is pruned: this model's attention is not causal (a changed last token moved earlier positions)"
        )
    if encoded.encoder:
        notes.append("an encoder reads the prompts: layers and positions are the decoder's")
    halved = architecture.dtype.itemsize < 4
    if halved and any(edit.site.component == "resid_mid" for row in rows for edit in row.edits):
        notes.append(
            "resid_mid is written as what attention adds: in a dtype of 16 bits the sum is off by its last bit or two"
        )
    notes += cautions(metrics, rows, (world.name for world in references), encoded.corrupted is not None)
    worlds: tuple[WorldName, ...] = ("clean",) if encoded.corrupted is None else ("clean", "corrupted")
    named, roots = {world.name: world for world in edited}, {world.name: world.root for world in edited}
    others = {world.name: world for world in references}
    lowering = {
        profile: Lowering(architecture, profile, prune, worlds, named, others) for profile in dict.fromkeys(profiles)
    }
    lowered = {profile: [low.row(row) for row in rows] for profile, low in lowering.items()}
    saving = {
        profile: {n: low.reads(row) for n, row in enumerate(rows) if row.saves} for profile, low in lowering.items()
    }
    proofs = np.zeros((len(rows), len(encoded)), np.int8)
    twins = np.full((len(rows), len(encoded)), -1, np.int64)
    jobs: dict[int, list[Job]] = {}
    for pair, profile in enumerate(profiles):
        seen: dict[Any, int] = {}
        jobs[pair] = []
        proofs[:, pair] = np.fromiter((proof for _, proof in lowered[profile]), np.int8, len(rows))
        for number, (row, (writes, proof)) in enumerate(zip(rows, lowered[profile], strict=True)):
            if row.raw is not None:
                jobs[pair].append(Job(number, pair, row.base, (), 0, 0, raw=True))
                continue
            if proof:
                continue
            reads = saving[profile].get(number, ())
            if prune and reads:
                seen[row.base, writes] = number
            elif prune:
                first = seen.setdefault((row.base, writes), number)
                if first != number:
                    proofs[number, pair], twins[number, pair] = Proof.IDENTICAL, first * len(encoded) + pair
                    continue
            jobs[pair].append(_job(number, pair, row.base, writes, reads))
    standing = [[world_job(lowering[profile], pair, w) for pair, profile in enumerate(profiles)] for w in edited]
    measured = [job for found in (*jobs.values(), *standing) for job in found]
    targets = [read for low in lowering.values() for found in low.targets.values() for read in found]
    until = layers_needed(architecture, targets, measured)
    if until <= len(architecture) and ends:
        notes.append(f"the forwards end above the last layer, although nothing there is read: {ends}")
    until = len(architecture) + 1 if ends else until
    depth = min(until, len(architecture))
    sample = _sample(lowering, profiles, rows, jobs, proofs, until)
    measured += sample
    row_bytes = max(
        flat_bytes(architecture, side.length, len(p.reads_of(side.world)))
        + saved_bytes(architecture, p.seen_of(side.world), side.length)
        for p in lowering
        for side in (p.alignment.clean, p.alignment.corrupted)
    ) + encoder_bytes(architecture, encoded)
    saved = [
        saved_bytes(architecture, job.reads, encoded.alignments[pair].side(roots.get(job.base, job.base)).length)
        for pair in jobs
        for job in jobs[pair]
        if job.reads
    ]
    row_bytes += max(saved, default=0)
    budget = memory or MEMORY
    if not architecture.causal or encoded.encoder:
        form, why = "flat", ()
    packer = Packer(
        architecture,
        encoded,
        form,
        default_costs(architecture, row_bytes, device, unembeds=until > depth),
        budget,
        batch_size,
        standing,
        roots,
        rides=rides and not any(m.compares for m in metrics),
        sample=sample,
        columns=len(columns_read(metrics, encoded, range(len(encoded)), architecture.vocab) or ()),
        depth=depth,
    )
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for pair, profile in enumerate(profiles):
        sides = profile.alignment.clean, profile.alignment.corrupted
        alike[sides[0].length, sides[1].length, profile.scored, profile.seen].append(pair)
    together = sorted(alike.items(), key=lambda item: item[0][:2])
    at_once = max(1, int(budget // 2 // max(1, row_bytes)))
    surveyed = tuple(surveys(architecture, references, measured, at_once, not ends))
    groups = tuple(g for _, pairs in together for g in packer.groups(pairs, profiles, jobs))
    uneven = sum(not profile.shared for profile in profiles)
    if uneven:
        notes.append(
            f"{plural(uneven, 'pair')} of prompts that differ in length, or in where metrics read: their worlds run "
            "first, by themselves, and a batch has rows of clean or of corrupted prompts alone"
        )
    steps = sum(1 + len(group.batches) for group in groups) + bool(sample) + sum(len(s.runs) for s in surveyed)
    beside = len(groups) * sum(n for s in surveyed for n in s.world.lengths)
    columns = sum(1 + len(m.parts) for m in metrics)
    measured = [job for group in groups for batch in group.batches for job in batch.jobs]
    plan = Plan(
        model=model,
        layers=len(architecture),
        rows=tuple(rows),
        pairs=len(encoded),
        worlds=worlds,
        metrics=metrics,
        groups=groups,
        proofs=proofs,
        twins=twins,
        row_bytes=row_bytes,
        budget=budget,
        notes=tuple(notes),
        remote=remote,
        traffic=traffic(measured, encoded.lengths, columns, steps, beside) if remote else None,
        edited=tuple(edited),
        sample=sample,
        estimate=_estimate(architecture, packer, groups, worlds, pace, surveyed),
        slower=tuple(packer.slower(why)),
        until=until,
        references=tuple(references),
        surveys=surveyed,
    )
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Refuses a plan that does not account for every recorded row exactly once; a fault of ours, never of a user's."""
    jobs = [(job.row, job.pair) for group in plan.groups for batch in group.batches for job in batch.jobs]
    counted = int((plan.proofs == Proof.NONE).sum())
    assert len(jobs) == len(set(jobs)) == counted, f"{len(jobs)} jobs for {counted} rows that need one"


def _estimate(
    architecture: Architecture,
    packer: Packer,
    groups: Sequence[Group],
    worlds: tuple[WorldName, ...],
    pace: float | None,
    surveyed: Sequence[Survey],
) -> Estimate:
    """What the runs of a plan cost, by their shapes."""
    depth, costs, forwards, seconds, largest = len(architecture), packer.costs, 0.0, 0.0, 0
    computed = packer.depth / depth
    for group in groups:
        rows = len(group.pairs) * (len(worlds) * (not group.rides) + len(group.edited))
        shapes = [rows] if rows else []
        for batch in group.batches:
            if batch.table is None:
                shapes.append(sum(job.seats for job in batch.jobs) + 1)
                continue
            here = group.of(packer.root(batch.jobs[0]))
            inside = batch.table.shape[batch.table.first : -1]
            forwards += sum(lanes * slots for lanes, slots in inside) / (here.length * depth)
            seconds += costs.seconds(inside, batch.table.prefix, len(batch.table.jobs))
            logits = len(here.reads) * (packer.columns or architecture.vocab)
            taken = table_bytes(architecture, batch.table, logits) + seen_bytes(architecture, batch.table, here.seen)
            largest = max(largest, taken)
        forwards += sum(shapes) * computed
        seconds += sum(costs.flat_seconds(n, group.length, packer.depth) for n in shapes)
        largest = max(largest, max(shapes, default=0) * costs.row_bytes)
    for survey in surveyed:
        forwards += cost(architecture, survey)
        seconds += sum(costs.flat_seconds(*shape, min(survey.until, depth)) for shape in survey.shapes)
    return Estimate(forwards, largest, seconds * (pace or 1), pace)


def _sample(
    lowering: dict[Profile, Lowering],
    profiles: list[Profile],
    rows: Sequence[Row],
    jobs: dict[int, list[Job]],
    proofs: NDArray[np.int8],
    until: int,
) -> tuple[Job, ...]:
    """A row to be measured once more, and one on the same pair that was proved to be without effect, by chance."""
    chance = random.Random(f"{len(rows)} rows, {len(profiles)} pairs")
    measured = [job for pair in jobs for job in jobs[pair] if not job.raw]
    proved = np.isin(proofs, PROVED)
    some: list[bool] = np.asarray(proved.any(0)).tolist()
    chosen = [chance.choice([j for j in measured if some[j.pair]] or measured)] if measured else []
    pairs = [job.pair for job in chosen] or np.flatnonzero(some).tolist()
    zeros = np.flatnonzero(proved[:, pairs[0]]).tolist() if pairs else []
    if chosen:  # an encoder may read another length in the other world
        zeros = [number for number in zeros if rows[number].base == rows[chosen[0].row].base]
    # What can be seen only step by step would make the whole run compute attention so.
    seen = {w.component for job in measured for w in job.writes}
    for number in [chance.choice(zeros), *chance.sample(zeros, min(TRIES, len(zeros)))] if zeros else []:
        pair, low = pairs[0], lowering[profiles[pairs[0]]]
        writes, _ = low.unpruned().row(rows[number])
        one = _job(number, pair, rows[number].base, writes)
        # What stands above all that is read has no place in a forward that ends there.
        if layers_needed(low.architecture, low.targets[low.root(rows[number].base)], [one]) <= until:
            chosen += [one] if writes and not {w.component for w in writes} & EAGER - seen else []
            break
    return tuple(chosen)


def _job(row: int, pair: int, base: WorldName, writes: tuple[Write, ...], reads: tuple[Read, ...] = ()) -> Job:
    if len(writes) == 1:  # what most rows are
        (write,) = writes
        return Job(row, pair, base, writes, min(write.positions), write.layer, reads)
    start = min([min(w.positions) for w in writes], default=0)
    return Job(row, pair, base, writes, start, min([w.layer for w in writes], default=0), reads)


def world_job(lowering: Lowering, pair: int, world: EditedWorld) -> Job:
    """The run of an edited world on a pair.

    Raises:
        RecipeError: The pair lacks a position that the world edits.
    """
    try:
        return _job(-1, pair, world.name, lowering.world(world.name))
    except SiteError as error:
        raise RecipeError(
            f"The world {world.name!r} does not exist in pair {pair}, which has no {error}. Leave such pairs out, or "
            "edit positions that every prompt has."
        ) from error
