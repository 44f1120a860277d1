"""From recorded rows to a plan: lower, prune, pack. Decides everything and touches no tensor of the model.

Pruning is exact and uses only declarations. Two facts carry it, both proved by the probe before they are used:

* Attention is causal: an activation at a position depends on the tokens up to it. So where the clean and the corrupted
  tokens agree up to a position, the worlds agree there, and writing one world's value into the other changes nothing,
  as long as no earlier edit of the same row has reached the place.
* The metric reads declared positions. What stands after the last of them cannot reach it; in the last layer nothing is
  left to carry a value to another position but what attention there still reads (the stream entering it, its keys and
  values).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracepatch.architecture import Architecture
from tracepatch.errors import MetricError, RecipeError, SiteError, listing
from tracepatch.metrics import Metric
from tracepatch.plan import Batch, Group, Job, Plan, Proof, Term, Write
from tracepatch.rows import Edit, Row
from tracepatch.sites import COMPONENTS, STAGES, Site
from tracepatch.sources import Value, WorldName
from tracepatch.tokens import EncodedPairs

CARRIED = frozenset({"embed", "resid_pre", "k", "v"})  # what attention of the same layer carries to other positions
LOCAL = frozenset({"embed", "resid_pre"})  # what depends on its own token alone in layer 0, where the probe proved it
TOKENS = 4096  # tokens a run beyond which batching gains nothing on the devices tried
MEMORY = 1 << 30


@dataclass(frozen=True)
class Profile:
    """What lowering needs to know of a pair; pairs that share it are lowered once.

    Attributes:
        length: Tokens of each prompt.
        differing: Positions at which the two prompts differ.
        reads: Positions that the metrics read.
    """

    length: int
    differing: tuple[int, ...]
    reads: tuple[int, ...]

    @property
    def first(self) -> int:
        """The first position at which the worlds may differ."""
        return min(self.differing, default=self.length)


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
    notes = []
    if prune and not architecture.causal:
        prune = False
        notes.append(
            "nothing is pruned: this model's attention is not causal (a changed last token moved earlier positions)"
        )
    halved = architecture.dtype.itemsize < 4
    if halved and any(e.site.component == "resid_mid" for row in rows for e in row.edits):
        notes.append(
            "resid_mid is written as what attention adds: in a dtype of 16 bits the sum is off by its last bit or two"
        )
    lowering = {profile: _Lowering(architecture, profile, prune) for profile in dict.fromkeys(profiles)}
    lowered = {profile: [low.row(row) for row in rows] for profile, low in lowering.items()}
    proofs = np.zeros((len(rows), len(encoded)), np.int8)
    twins = np.full((len(rows), len(encoded)), -1, np.int64)
    jobs: dict[int, list[Job]] = {}
    for pair, profile in enumerate(profiles):
        seen: dict[Any, int] = {}
        jobs[pair] = []
        for number, (writes, proof) in enumerate(lowered[profile]):
            proofs[number, pair] = proof
            if not writes:
                continue
            key = (rows[number].base, writes)
            if prune and key in seen:
                proofs[number, pair], twins[number, pair] = Proof.IDENTICAL, seen[key] * len(encoded) + pair
                continue
            seen[key] = number
            start = min(p for w in writes for p in w.positions)
            jobs[pair].append(Job(number, pair, rows[number].base, writes, start, min(w.layer for w in writes)))
    row_bytes = max(_row_bytes(architecture, profile) for profile in lowering)
    budget = memory or MEMORY
    plan = Plan(
        model=model,
        layers=len(architecture),
        rows=tuple(rows),
        pairs=len(encoded),
        worlds=("clean",) if encoded.corrupted is None else ("clean", "corrupted"),
        metrics=metrics,
        groups=tuple(_pack(architecture, encoded, profiles, jobs, row_bytes, budget, batch_size)),
        proofs=proofs,
        twins=twins,
        row_bytes=row_bytes,
        budget=budget,
        notes=tuple(notes),
        remote=remote,
    )
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """Refuses a plan that does not account for every recorded row exactly once; a fault of ours, never of a user's."""
    jobs = [(job.row, job.pair) for group in plan.groups for batch in group.batches for job in batch.jobs]
    counted = int((plan.proofs == Proof.NONE).sum())
    assert len(jobs) == len(set(jobs)) == counted, f"{len(jobs)} jobs for {counted} rows that need one"


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
    return Profile(length, encoded.differing(pair), tuple(sorted(reads)))


class _Lowering:
    """Rows → writes, for pairs of one profile."""

    def __init__(self, architecture: Architecture, profile: Profile, prune: bool) -> None:
        self.architecture, self.profile, self.prune = architecture, profile, prune
        self.depth = len(architecture)

    def row(self, row: Row) -> tuple[tuple[Write, ...], Proof]:
        """The writes of a row that survive pruning; where none does, the proof."""
        try:
            writes = [self._write(edit) for edit in sorted(row.edits, key=self._moment)]
        except SiteError:
            return (), Proof.ABSENT
        if len(writes) > 1:
            writes = _drop_overwritten(writes)
        if not self.prune:
            return tuple(writes), Proof.NONE
        kept, live, equal, unreachable = [], self.profile.length, False, False
        for write in writes:
            reach = [i for i, p in enumerate(write.positions) if self._reaches(write, p)]
            alive = [i for i in reach if write.positions[i] >= live or not self._inert(write, i, row.base)]
            unreachable |= len(reach) < len(write.positions)
            equal |= len(alive) < len(reach)
            if not alive:
                continue
            live = min(live, *(write.positions[i] for i in alive))
            if len(alive) < len(write.positions):
                write = _narrow(write, alive)
            kept.append(write)
        proof = (
            Proof.NONE if kept else Proof.BOTH if equal and unreachable else Proof.EQUAL if equal else Proof.UNREACHABLE
        )
        return tuple(kept), proof

    def _moment(self, edit: Edit) -> tuple[int, int]:
        """When an edit acts in the forward."""
        site = edit.site
        return self.depth if site.component == "logits" else site.layer, STAGES[site.component]

    def _write(self, edit: Edit) -> Write:
        site, source = edit.site, edit.source
        positions, units = self._indices(site)
        values: Iterable[tuple[float, Value]] = ((1.0, source),) if isinstance(source, Value) else source.terms().values
        places = [(positions, units) if v.site == site else self._indices(v.site) for _, v in values]
        if units is None and any(heads is not None and len(heads) > 1 for _, heads in places):
            units = tuple(range(self.architecture.units(site.component, site.layer)))
        terms = []
        for (factor, value), (here, heads) in zip(values, places, strict=True):
            if units is not None and heads is None and COMPONENTS[value.site.component].unit:
                heads = tuple(range(self.architecture.units(value.site.component, value.site.layer)))
            terms.append(Term(factor, value.world, *_canonical(value.site), here, heads))
        return Write(
            *_canonical(site, self.depth),
            positions=positions,
            offsets=tuple(range(len(positions))),
            units=units,
            add=edit.add,
            terms=tuple(terms),
            constant=None if isinstance(source, Value) else source.terms().constant,
            recorded=len(positions),
            scalar=(site.pos.scalar, site.unit.scalar),
        )

    def _indices(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        positions = site.pos.resolve(self.profile.length)
        if not positions:
            raise SiteError(str(site))
        units = None if site.unit.all else site.unit.resolve(self.architecture.units(site.component, site.layer))
        return positions, units

    def _reaches(self, write: Write, position: int) -> bool:
        reads = self.profile.reads
        beside = write.layer >= self.depth or (write.layer == self.depth - 1 and write.component not in CARRIED)
        return position in reads if beside else position <= reads[-1]

    def _inert(self, write: Write, i: int, base: WorldName) -> bool:
        """Whether the source equals the base at the i-th position, given that no earlier edit has reached it."""
        position = write.positions[i]
        if len(write.terms) == 1 and write.constant is None and not write.add:
            term = write.terms[0]
            if term.factor == 1 and (term.component, term.layer, term.units) == (
                write.component,
                write.layer,
                write.units,
            ):
                same_place = term.positions[min(i, len(term.positions) - 1)] == position
                return same_place and (term.world == base or self._agrees(term.component, term.layer, position))
        left: dict[tuple[Any, ...], float] = defaultdict(float)
        for term in write.terms:
            p = term.positions[min(i, len(term.positions) - 1)]
            world = base if self._agrees(term.component, term.layer, p) else term.world
            left[world, term.component, term.layer, p, term.units] += term.factor
        if not write.add:
            left[base, write.component, write.layer, position, write.units] -= 1.0
        return not any(left.values()) and (write.constant is None or not bool(write.constant.tensor.any()))

    def _agrees(self, component: str, layer: int, position: int) -> bool:
        """Whether the clean and the corrupted world have the same value there."""
        local = self.architecture.local_embedding and layer == 0 and component in LOCAL
        return position not in self.profile.differing if local else position < self.profile.first


def _canonical(site: Site, depth: int = 0) -> tuple[str, int]:
    if site.component == "resid_post":
        return "resid_pre", site.layer + 1
    return site.component, depth if site.component == "logits" else site.layer


def _drop_overwritten(writes: list[Write]) -> list[Write]:
    """A later `=` overrides what the row wrote there before."""
    kept: list[Write] = []
    for write in writes:
        if not write.add:
            for i, before in enumerate(kept):
                if (before.component, before.layer) != (write.component, write.layer):
                    continue
                covered = write.units is None or (before.units is not None and set(before.units) <= set(write.units))
                overlap = set(before.positions) & set(write.positions)
                if covered and overlap:
                    kept[i] = _narrow(before, [j for j, p in enumerate(before.positions) if p not in overlap])
            kept = [w for w in kept if w.positions]
        kept.append(write)
    return kept


def _narrow(write: Write, chosen: Sequence[int]) -> Write:
    """The write at some of its positions."""
    terms = tuple(
        t
        if len(t.positions) == 1 and len(write.positions) > 1
        else replace(t, positions=tuple(t.positions[i] for i in chosen))
        for t in write.terms
    )
    return replace(
        write,
        positions=tuple(write.positions[i] for i in chosen),
        offsets=tuple(write.offsets[i] for i in chosen),
        terms=terms,
    )


def _row_bytes(architecture: Architecture, profile: Profile) -> int:
    """Peak memory of one batch element: the widest activations of a layer, attention scores, logits that are read."""
    size = architecture.dtype.itemsize
    width = max(layer.width for layer in architecture.layers)
    heads = max((architecture.units("z", i) for i in range(len(architecture))), default=0)
    wide = 6 * architecture.d_model + 3 * width
    return profile.length * (wide + heads * profile.length * 2) * size + len(profile.reads) * architecture.vocab * (
        size + 8
    )


def _pack(
    architecture: Architecture,
    encoded: EncodedPairs,
    profiles: list[Profile],
    jobs: dict[int, list[Job]],
    row_bytes: int,
    budget: int,
    batch_size: int | None,
) -> Iterable[Group]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for pair, profile in enumerate(profiles):
        by_length[profile.length].append(pair)
    worlds = 1 if encoded.corrupted is None else 2
    for length, pairs in sorted(by_length.items()):
        needed = {(t.component, t.layer) for p in pairs for job in jobs[p] for w in job.writes for t in w.terms}
        kept = sum(_kept_bytes(architecture, name, layer, length) for name, layer in needed)
        together = max(1, min(len(pairs), int(budget / 2 // max(1, worlds * (kept + row_bytes)))))
        for i in range(0, len(pairs), together):
            chunk = pairs[i : i + together]
            reads = {p for pair in chunk for p in profiles[pair].reads}
            reads |= {
                q
                for pair in chunk
                for job in jobs[pair]
                for w in job.writes
                for t in w.terms
                if t.component == "logits"
                for q in t.positions
            }
            ready = sorted((job for pair in chunk for job in jobs[pair]), key=lambda j: (j.birth, j.row, j.pair))
            used = {(t.component, t.layer) for job in ready for w in job.writes for t in w.terms}
            most = (
                max(1, min(int(budget / 2 // row_bytes) - 1, max(8, TOKENS // length)))
                if batch_size is None
                else batch_size
            )
            batches = tuple(Batch(tuple(ready[j : j + most])) for j in range(0, len(ready), most))
            yield Group(length, tuple(chunk), tuple(sorted(reads)), frozenset(used), batches)


def _kept_bytes(architecture: Architecture, name: str, layer: int, length: int) -> int:
    inside = min(layer, len(architecture) - 1)
    kind = COMPONENTS[name]
    count = architecture.units(name, inside) if kind.unit and kind.unit != kind.dims[-1] else 1
    return int(length * count * architecture.width(name, inside) * architecture.dtype.itemsize)
