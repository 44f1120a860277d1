"""From lowered rows to a plan: which rows are measured, and which run measures them.

Decides everything and touches no tensor of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracepatch.architecture import Architecture
from tracepatch.errors import MetricError, RecipeError, SiteError, listing
from tracepatch.lowering import Lowering, Profile
from tracepatch.metrics import Metric
from tracepatch.plan import Batch, Group, Job, Plan, Proof, Read, Write, parts
from tracepatch.rows import Edit, EditedWorld, Row
from tracepatch.sites import component
from tracepatch.sources import Function, WorldName
from tracepatch.tokens import EncodedPairs

TOKENS = 4096  # tokens a run beyond which batching gains nothing on the devices tried
MEMORY = 1 << 30


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
        memory: Bytes a run may take; 1 GiB otherwise.
        remote: Where the plan will run, if not here.
        edited: The edited worlds.
        numbers: Of the pairs, which noise is drawn for; where they stand among the pairs otherwise.

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
    _require_given(metrics, encoded)
    profiles = [_profile(encoded, metrics, pair) for pair in range(len(encoded))]
    edits = [edit for row in rows for edit in row.edits] + [edit for world in edited for edit in world.edits]
    if any(_draws(edit) for edit in edits):
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
    if halved and any(e.site.component == "resid_mid" for row in rows for e in row.edits):
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
        for number, (writes, proof) in enumerate(lowered[profile]):
            proofs[number, pair] = proof
            if rows[number].raw is not None:
                jobs[pair].append(Job(number, pair, rows[number].base, (), 0, 0, raw=True))
                continue
            if proof != Proof.NONE:
                continue
            reads = saving[profile].get(number, ())
            key = (rows[number].base, writes)
            if prune and key in seen and not reads:
                proofs[number, pair], twins[number, pair] = Proof.IDENTICAL, seen[key] * len(encoded) + pair
                continue
            seen[key] = number
            jobs[pair].append(_job(number, pair, rows[number].base, writes, reads))
    standing = [[_world_job(lowering[profile], pair, w) for pair, profile in enumerate(profiles)] for w in edited]
    row_bytes = max(_row_bytes(architecture, profile) for profile in lowering) + _encoder_bytes(architecture, encoded)
    saved = [_read_bytes(architecture, job, encoded.lengths[pair]) for pair in jobs for job in jobs[pair] if job.reads]
    row_bytes += max(saved, default=0)
    budget = memory or MEMORY
    plan = Plan(
        model=model,
        layers=len(architecture),
        rows=tuple(rows),
        pairs=len(encoded),
        worlds=worlds,
        metrics=metrics,
        groups=tuple(_pack(architecture, encoded, profiles, jobs, standing, roots, row_bytes, budget, batch_size)),
        proofs=proofs,
        twins=twins,
        row_bytes=row_bytes,
        budget=budget,
        notes=tuple(notes),
        remote=remote,
        edited=tuple(edited),
    )
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Refuses a plan that does not account for every recorded row exactly once; a fault of ours, never of a user's."""
    jobs = [(job.row, job.pair) for group in plan.groups for batch in group.batches for job in batch.jobs]
    counted = int((plan.proofs == Proof.NONE).sum())
    assert len(jobs) == len(set(jobs)) == counted, f"{len(jobs)} jobs for {counted} rows that need one"


def _draws(edit: Edit) -> bool:
    return not isinstance(edit.source, Function) and bool(edit.source.terms().noise)


def _job(row: int, pair: int, base: WorldName, writes: tuple[Write, ...], reads: tuple[Read, ...] = ()) -> Job:
    start = min((p for w in writes for p in w.positions), default=0)
    return Job(row, pair, base, writes, start, min((w.layer for w in writes), default=0), reads)


def _world_job(lowering: Lowering, pair: int, world: EditedWorld) -> Job:
    try:
        return _job(-1, pair, world.name, lowering.world(world.name))
    except SiteError as error:
        raise RecipeError(
            f"The world {world.name!r} does not exist in pair {pair}, which has no {error}. Leave such pairs out, or "
            "edit positions that every prompt has."
        ) from error


def _require_given(metrics: tuple[Metric, ...], encoded: EncodedPairs) -> None:
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


def _profile(encoded: EncodedPairs, metrics: tuple[Metric, ...], pair: int) -> Profile:
    length = encoded.lengths[pair]
    reads: set[int] = set()
    for metric in metrics:
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
        return Profile(length, (), tuple(sorted(reads)), encoded=True)
    return Profile(length, encoded.differing(pair), tuple(sorted(reads)))


def _row_bytes(architecture: Architecture, profile: Profile) -> int:
    """Peak memory of one batch element: the widest activations of a layer, attention scores, logits that are read."""
    size = architecture.dtype.itemsize
    width = max(layer.width for layer in architecture.layers)
    heads = max((architecture.units("z", i) for i in range(len(architecture))), default=0)
    wide = 6 * architecture.d_model + 3 * width
    return profile.length * (wide + heads * profile.length * 2) * size + len(profile.reads) * architecture.vocab * (
        size + 8
    )


def _read_bytes(architecture: Architecture, job: Job, length: int) -> int:
    """What a row saves, while it is computed: in the model's dtype and in float32."""
    found = sum(read.size * (architecture.dtype.itemsize + 4) for read in job.reads)
    # Of head_out every head is made at every position, twice where it is edited.
    layers = [read.layer for read in job.reads if read.component == "head_out"]
    return found + 2 * sum(_kept_bytes(architecture, "head_out", layer, length) for layer in layers)


def _encoder_bytes(architecture: Architecture, encoded: EncodedPairs) -> int:
    """The same for what an encoder reads: its activations are taken to be as wide as the decoder's."""
    longest = max((len(ids) for side in encoded.encoder for ids in side), default=0)
    return _row_bytes(architecture, Profile(longest, (), ())) if longest else 0


def _pack(
    architecture: Architecture,
    encoded: EncodedPairs,
    profiles: list[Profile],
    jobs: dict[int, list[Job]],
    standing: list[list[Job]],
    roots: dict[WorldName, WorldName],
    row_bytes: int,
    budget: int,
    batch_size: int | None,
) -> Iterable[Group]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for pair, profile in enumerate(profiles):
        by_length[profile.length].append(pair)
    worlds = (1 if encoded.corrupted is None else 2) + len(standing)
    every = {pair: [*found, *(world[pair] for world in standing)] for pair, found in jobs.items()}
    read = max((len(ids) for side in encoded.encoder for ids in side), default=0)

    def worlds_of(chunk: list[int]) -> tuple[tuple[Job, ...], ...]:
        return tuple(tuple(world[pair] for pair in chunk) for world in standing)

    def read_by(job: Job) -> int:
        return len(encoded.encoded(roots.get(job.base, job.base), job.pair))

    for length, pairs in sorted(by_length.items()):
        needed = {(t.component, t.layer) for p in pairs for job in every[p] for w in job.writes for t in w.terms}
        kept = sum(_kept_bytes(architecture, name, layer, length) for name, layer in needed)
        together = max(1, min(len(pairs), int(budget / 2 // max(1, worlds * (kept + row_bytes)))))
        for i in range(0, len(pairs), together):
            chunk = pairs[i : i + together]
            reads = {p for pair in chunk for p in profiles[pair].reads}
            reads |= {
                q
                for pair in chunk
                for job in every[pair]
                for w in job.writes
                for t in w.terms
                if t.component == "logits"
                for q in t.positions
            }
            reads |= {
                q
                for pair in chunk
                for job in every[pair]
                for w in job.writes
                if w.component == "logits" and w.function is not None
                for q in w.positions
            }
            reads |= {
                q
                for pair in chunk
                for job in jobs[pair]
                for read in job.reads
                if read.component == "logits"
                for q in read.positions
            }
            ready = sorted((job for pair in chunk for job in jobs[pair]), key=lambda j: (j.birth, j.row, j.pair))
            used = {
                (t.component, t.layer) for pair in chunk for job in every[pair] for w in job.writes for t in w.terms
            }
            most = (
                max(1, min(int(budget / 2 // row_bytes) - 1, max(8, TOKENS // (length + read))))
                if batch_size is None
                else batch_size
            )
            split = parts([job for job in ready if not job.raw], read_by, max(1, len(ready)))
            batches = [batch for part in split for batch in _batches(part, most)]
            batches += [Batch((job,)) for job in ready if job.raw]
            lengths = {len(side[pair]) for side in encoded.encoder for pair in chunk}
            yield Group(
                length,
                tuple(chunk),
                tuple(sorted(reads)),
                frozenset(used),
                tuple(batches),
                worlds_of(chunk),
                max(1, len(lengths)),
            )


def _batches(ready: list[Job], most: int) -> Iterable[Batch]:
    """Jobs in runs of so many batch elements, or of one job that needs more."""
    taken: list[Job] = []
    seats = 0
    for job in ready:
        if taken and seats + job.seats > most:
            yield Batch(tuple(taken))
            taken, seats = [], 0
        taken.append(job)
        seats += job.seats
    if taken:
        yield Batch(tuple(taken))


def _kept_bytes(architecture: Architecture, name: str, layer: int, length: int) -> int:
    inside = min(layer, len(architecture) - 1)
    kind = component(name)
    count = architecture.units(name, inside) if kind.unit and kind.unit != kind.dims[-1] else 1
    width = length if kind.attends else architecture.width(name, inside)
    return int(length * count * width * architecture.dtype.itemsize)
