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
from tracepatch.errors import MetricError, RecipeError, SiteError, listing
from tracepatch.jobs import EAGER, Job, Read, Write
from tracepatch.lowering import Lowering, Profile
from tracepatch.metrics import Metric, columns_read
from tracepatch.packing import Packer
from tracepatch.plan import PROVED, Group, Plan, Proof
from tracepatch.reach import layers_needed, read_at
from tracepatch.rows import EditedWorld, Row
from tracepatch.sources import Noise, Sum, WorldName
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
    edits = [edit for one in (*rows, *edited) for edit in one.edits]
    if any(isinstance(edit.source, (Sum, Noise)) and edit.source.terms().noise for edit in edits):
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
    worlds: tuple[WorldName, ...] = ("clean",) if encoded.corrupted is None else ("clean", "corrupted")
    named, roots = {world.name: world for world in edited}, {world.name: world.root for world in edited}
    lowering = {profile: Lowering(architecture, profile, prune, worlds, named) for profile in dict.fromkeys(profiles)}
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
    until = layers_needed(architecture, [read for low in lowering.values() for read in low.targets], measured)
    if until <= len(architecture) and ends:
        notes.append(f"the forwards end above the last layer, although nothing there is read: {ends}")
    until = len(architecture) + 1 if ends else until
    depth = min(until, len(architecture))
    sample = _sample(lowering, profiles, rows, jobs, proofs, until)
    row_bytes = max(
        flat_bytes(architecture, p.length, len(p.reads)) + saved_bytes(architecture, p.seen, p.length) for p in lowering
    ) + encoder_bytes(architecture, encoded)
    saved = [
        saved_bytes(architecture, job.reads, encoded.lengths[pair]) for pair in jobs for job in jobs[pair] if job.reads
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
    by_length: dict[int, list[int]] = defaultdict(list)
    for pair, profile in enumerate(profiles):
        by_length[profile.length].append(pair)
    reads_of = [profile.reads for profile in profiles]
    groups = tuple(
        g
        for length, pairs in sorted(by_length.items())
        for g in packer.groups(length, pairs, reads_of, jobs, profiles[pairs[0]].seen)
    )
    steps = sum(1 + len(group.batches) for group in groups) + bool(sample)
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
        traffic=traffic(measured, encoded.lengths, sum(1 + len(m.parts) for m in metrics), steps) if remote else None,
        edited=tuple(edited),
        sample=sample,
        estimate=_estimate(architecture, packer, groups, worlds, pace),
        slower=tuple(packer.slower(why)),
        until=until,
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
            inside = batch.table.shape[batch.table.first : -1]
            forwards += sum(lanes * slots for lanes, slots in inside) / (group.length * depth)
            seconds += costs.seconds(inside, batch.table.prefix, len(batch.table.jobs))
            logits = len(group.reads) * (packer.columns or architecture.vocab)
            taken = table_bytes(architecture, batch.table, logits) + seen_bytes(architecture, batch.table, group.seen)
            largest = max(largest, taken)
        forwards += sum(shapes) * computed
        seconds += sum(costs.flat_seconds(n, group.length, packer.depth) for n in shapes)
        largest = max(largest, max(shapes, default=0) * costs.row_bytes)
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
        if layers_needed(low.architecture, low.targets, [one]) <= until:
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


def require_given(metrics: tuple[Metric, ...], encoded: EncodedPairs) -> None:
    """Refuses metrics that need what the pairs do not have.

    Raises:
        MetricError: So it is.
    """
    for metric in metrics:
        offenders = []
        for need in metric.needs:
            if need == "corrupted" and encoded.corrupted is None:
                offenders.append("the pairs have no corrupted prompts")
            if need in ("answer", "wrong"):
                empty = [i for i, ids in enumerate(getattr(encoded, need)) if not ids]
                if empty:
                    offenders.append(
                        f"{len(empty)} of {len(encoded)} pairs have no {need} (the first: pair {empty[0]})"
                    )
        if offenders:
            raise MetricError(
                f"Metric {metric.name!r} cannot be read.\n{listing(offenders)}\nGive the pairs what it needs."
            )


def profile_of(architecture: Architecture, encoded: EncodedPairs, metrics: tuple[Metric, ...], pair: int) -> Profile:
    """What lowering needs to know of a pair.

    Raises:
        MetricError: A metric reads positions that the pair does not have.
    """
    length = encoded.lengths[pair]
    reads: set[int] = set()
    seen = []
    for number, metric in enumerate(metrics):
        if metric.site is not None:
            try:
                seen.append(read_at(number, metric.site, None, architecture, length))
            except SiteError:
                raise MetricError(
                    f"Metric {metric.name!r} reads {metric.site}, which pair {pair} does not have ({length} tokens)."
                ) from None
            continue
        found = metric.positions.resolve(length)
        if not found:
            raise MetricError(
                f"Metric {metric.name!r} reads position {metric.positions}, which pair {pair} does not have "
                f"({length} tokens)."
            )
        if "next" in metric.needs and length - 1 in found and not encoded.answer[pair]:
            raise MetricError(
                f"Metric {metric.name!r} reads the loss after the last token, and pair {pair} has no answer. "
                "Give it one, or read "
                f"other positions: tp.{metric.name}.at(slice(0, -1))."
            )
        if "next" in metric.needs and length - 1 in found and len(encoded.answer[pair]) > 1:
            raise MetricError(
                f"Metric {metric.name!r} reads the loss on the answer, and pair {pair} has several. Give it one, or "
                f"read other positions: tp.{metric.name}.at(slice(0, -1))."
            )
        if len(set(found)) < len(found):
            raise MetricError(
                f"Metric {metric.name!r} reads a position twice in pair {pair}: {metric.positions} of {length}."
            )
        reads.update(found)
    if encoded.encoder:  # the decoder's tokens are the same on both sides
        return Profile(length, (), tuple(sorted(reads)), tuple(seen), encoded=True)
    return Profile(length, encoded.differing(pair), tuple(sorted(reads)), tuple(seen))
