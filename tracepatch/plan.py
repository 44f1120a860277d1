"""A plan: what will be traced, as data. Printed before anything runs, compared by tests, executed by an executor."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracepatch.costs import NOTHING, Estimate, Traffic
from tracepatch.errors import plural
from tracepatch.jobs import EAGER, Job, Read, Write, unpatched
from tracepatch.metrics import Metric
from tracepatch.references import ReferenceWorld, Survey
from tracepatch.rows import EditedWorld, Row
from tracepatch.sources import WorldName
from tracepatch.table import Form, Table


class Status(IntEnum):
    """What a cell of a result rests on."""

    ABSENT = 0
    MEASURED = 1
    PROVED_ZERO = 2
    PENDING = 3
    ESTIMATED = 4


class Proof(IntEnum):
    """Why a row needs no forward of its own."""

    NONE = 0
    EQUAL = 1
    UNREACHABLE = 2
    BOTH = 3
    IDENTICAL = 4
    ABSENT = 5


PROVED = (Proof.EQUAL, Proof.UNREACHABLE, Proof.BOTH)
"""Proofs that a row is without effect."""
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
LATER = (
    "cannot reach what is read: later in the forward, after its last position, or beside it with no attention left to "
    "carry it"
)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One traced forward: an unpatched witness, then the rows. A raw trace is alone, after a witness.

    Attributes:
        jobs: The rows.
        table: Who sits where, where rows are not whole prompts.
    """

    jobs: tuple[Job, ...]
    table: Table | None = None

    @property
    def form(self) -> Form:
        """How its rows stand."""
        return "flat" if self.table is None else self.table.form

    @property
    def computes_worlds(self) -> bool:
        """Whether the worlds of its rows are computed in it too."""
        return self.table is not None and self.table.worlds > 0

    @property
    def raw(self) -> bool:
        """Whether it is one row's raw trace."""
        return self.jobs[0].raw


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read of the prompts of one length.

    Attributes:
        length: Tokens of each prompt.
        reads: The positions whose logits are computed; none where nothing reads logits.
        seen: The activations that metrics read.
    """

    length: int
    reads: tuple[int, ...]
    seen: tuple[Read, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Pairs of the same lengths whose worlds are run, kept, and used together.

    Attributes:
        length: Tokens of each prompt; where those of a pair differ, of the clean ones.
        pairs: Their numbers.
        reads: The positions whose logits are computed; none where nothing reads logits.
        seen: The activations that metrics read.
        needed: The (component, layer) of worlds' values that some edit writes.
        edited: The runs of edited worlds, world by world in the order in which they were made.
        batches: The patched forwards.
        captures: Traced runs of the unpatched worlds, where they do not ride: one for each length of what is read, by
            an encoder where there is one.
        corrupted: The corrupted prompts, where they have another length than the clean ones.
    """

    length: int
    pairs: tuple[int, ...]
    reads: tuple[int, ...]
    needed: frozenset[tuple[str, int]]
    batches: tuple[Batch, ...]
    edited: tuple[tuple[Job, ...], ...] = ()
    captures: int = 1
    seen: tuple[Read, ...] = ()
    corrupted: Reading | None = None

    def of(self, root: WorldName) -> Reading:
        """The prompts of a world, clean or corrupted."""
        if self.corrupted is not None and root == "corrupted":
            return self.corrupted
        return Reading(self.length, self.reads, self.seen)

    @property
    def captured(self) -> int:
        """Traced runs of all its worlds, edited ones too, where they do not ride."""
        return self.captures + len(self.edited) * (self.captures if self.corrupted is None else 1)

    @property
    def rides(self) -> bool:
        """Whether its first batch computes the worlds."""
        return bool(self.batches) and self.batches[0].computes_worlds

    def stages(self, worlds: Sequence[WorldName]) -> list[list[Job]]:
        """Runs of its worlds that need not wait for each other: unpatched ones, then edited ones after those they take.

        Pair by pair, and of edited worlds one after the other.
        """
        found = [[unpatched(pair, world) for pair in self.pairs for world in worlds]]
        for world in self.edited:
            taken = {t.world for job in world for w in job.writes for t in w.terms}
            if len(found) == 1 or taken & {job.base for job in found[-1]}:
                found.append([])
            found[-1] += world
        return found

    @property
    def cached(self) -> bool:
        """Whether some batch sees keys and values of the worlds."""
        return any(b.table is not None and b.table.prefix > 0 for b in self.batches)

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
        budget: Bytes that may be taken: half by the worlds' values that are kept, half by a run.
        notes: Anything a user should know before running.
        remote: Where it runs, if not here.
        traffic: What goes there and comes back.
        sample: A row that is measured, and one on the same pair that was proved to be without effect, if there is one,
            to be measured once more as whole prompts with every edit left in.
        estimate: What it costs.
        slower: Why batches are not of the fastest form, in words.
        until: How many layers are computed; more than there are where also what is above them all.
        references: The reference worlds, whose values rows may take.
        surveys: What is run of them.
        measured: After a run, its ``seconds``, ``forwards`` and ``peak`` of memory, as far as they were seen, and the
            line of its ``checks``. Where finished batches are kept, before and after it: ``stored``, rows of earlier
            runs; their ``directory``; ``unstored``, why some are not kept.
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
    traffic: Traffic | None = None
    edited: tuple[EditedWorld, ...] = ()
    sample: tuple[Job, ...] = ()
    estimate: Estimate = NOTHING
    slower: tuple[str, ...] = ()
    until: int = 1 << 30
    references: tuple[ReferenceWorld, ...] = ()
    surveys: tuple[Survey, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def eager(self) -> bool:
        """Whether attention must be computed step by step."""
        read = (name for g in self.groups for name, _ in g.needed)
        written = (w.component for g in self.groups for w in g.writes)
        saved = (r.component for g in self.groups for b in g.batches for j in b.jobs for r in j.reads)
        seen = (m.site.component for m in self.metrics if m.site is not None)
        referred = (tally.component for survey in self.surveys for tally in survey.tallies)
        return any(name in EAGER for name in (*read, *written, *saved, *seen, *referred))

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

        After the plan has run, what was measured stands beside what was estimated, and what the checks found below.
        """
        total, counts = self.proofs.size, Counter(self.proofs.ravel().tolist())
        references = sum(len(survey.world.ids) for survey in self.surveys)
        worlds = (len(self.worlds) + len(self.edited)) * self.pairs + references
        captures = sum(group.captured for group in self.groups if not group.rides)
        surveyed = sum(len(survey.runs) for survey in self.surveys)
        read = "; ".join(f"{m.name} [{m.unit or 'no unit'}] {m.reads}" for m in self.metrics)
        absent = counts[Proof.ABSENT]
        lines = [
            f"{plural(len(self.rows), 'row')} × {plural(self.pairs, 'pair')} on {self.model} "
            f"({plural(self.layers, 'layer')})",
            f"  metric       {read}",
            f"  patches      {total - absent:,}"
            + (f" ({absent:,} more have no such position in their pair)" if absent else ""),
        ]
        for proof in (Proof.EQUAL, Proof.UNREACHABLE, Proof.BOTH, Proof.IDENTICAL):
            if counts[proof]:
                told = LATER if proof == Proof.UNREACHABLE and any(m.site for m in self.metrics) else PROOFS[proof]
                lines.append(f"    {-counts[proof]:>9,}  {told}")
        raw = sum(b.raw for g in self.groups for b in g.batches)
        shadows = sum(j.seats - 1 for g in self.groups for b in g.batches for j in b.jobs)
        lines += [
            f"    {self.jobs:>9,}  to be measured",
            *self._forms(),
            *self._end(),
            f"  traced runs  {captures + surveyed + self.batches:,}"
            + (f", {captures:,} of them for {self._worlds()}" if captures else "")
            + (f", {surveyed:,} for {plural(references, 'prompt')} of references" if surveyed else ""),
            *self._costs(total - absent + worlds, worlds),
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
        lines += [f"  world        {world}" for world in self.edited if not world.origin]
        lines += [f"  reference    {_surveyed(survey)}" for survey in self.surveys]
        if self.traffic is not None:
            sent = f"about {_size(self.traffic.up)} up and {_size(self.traffic.down)} down"
            lines.append(f"  runs on      {self.remote}: {plural(self.traffic.requests, 'request')}, {sent}")
        lines += [f"  note         {note}" for note in self.notes]
        stored = self.measured.get("stored", 0)
        if stored and "directory" in self.measured:
            lines.append(f"  stored       {stored:,} rows of earlier runs are taken from {self.measured['directory']}")
        lines += [f"  not stored   {why}" for why in self.measured.get("unstored", ())]
        if "checks" in self.measured:
            lines.append(f"  checks       {self.measured['checks']}")
        return "\n".join(lines)

    def _costs(self, whole: int, worlds: int) -> Iterator[str]:
        """What the plan costs: as estimated and, once it has run, as measured beside that.

        Args:
            whole: Forwards that one for each patch and each unpatched world would be.
            worlds: How many of them are those of worlds.
        """
        pace = "going by the last run of this model" if self.estimate.pace else "before any run of this model"
        lines = {
            "forwards": f"{_count(self.estimate.forwards)}, counted in tokens and layers, instead of {whole:,}"
            f"{_ratio(whole, self.estimate.forwards)}",
            "memory": f"about {_size(self.estimate.bytes)} a run, budget {_size(self.budget)}",
            "time": f"about {_seconds(self.estimate.seconds)}, {pace}",
        }
        found = dict.fromkeys(lines, "")
        if "seconds" in self.measured:
            seconds, forwards, peak = (self.measured[name] for name in ("seconds", "forwards", "peak"))
            ran = self.jobs - self.measured.get("stored", 0)
            rate = f"{(ran + worlds) / max(seconds, 1e-9):,.0f} rows a second" if ran else "nothing was run"
            found["forwards"] = "not measured here" if forwards is None else f"measured {_count(forwards)}"
            found["memory"] = "measured on CUDA devices only" if peak is None else f"measured {_size(peak)}"
            found["time"] = f"measured {seconds:.2f} s, {rate}"
        width = max(map(len, lines.values()))
        for title, line in lines.items():
            yield f"  {title:<13}{line:<{width}}  {found[title]}".rstrip()

    def _end(self) -> Iterator[str]:
        """Where the forwards end, if that is not above all layers."""
        if self.until <= self.layers:
            upper = self.layers - self.until
            what = f"{plural(upper, 'layer')} and the unembedding are" if upper else "the unembedding is"
            yield f"  ends         above layer {self.until - 1}: nothing later is read, so {what} not computed"

    def _forms(self) -> Iterator[str]:
        """The batches of each form: how many, how large, and why they are not of a faster one."""
        told = {
            "packed": "tokens side by side, from each row's first edit on",
            "staggered": "a lane a row, from the first edit on",
            "flat": "whole prompts",
        }
        title = "batches      "
        for form, words in told.items():
            batches = [b for g in self.groups for b in g.batches if b.form == form and not b.raw]
            if not batches:
                continue
            rows, tokens = max(len(b.jobs) for b in batches), max(b.table.tokens if b.table else 0 for b in batches)
            size = f"up to {plural(rows, 'row')}" + (f" in {tokens:,} tokens" if tokens else "")
            riding = sum(b.computes_worlds for b in batches)
            worlds = f", {riding:,} with the worlds" if riding else ""
            yield f"  {title}{len(batches):,} {form} ({words}) of {size}{worlds}"
            title = " " * len(title)
        yield from (f"  {title}{why}" for why in self.slower)

    def _worlds(self) -> str:
        pristine, edited = (n * self.pairs for n in (len(self.worlds), len(self.edited)))
        more = f" and {edited:,} edited ones" if edited else ""
        return f"the {pristine:,} unpatched worlds{more}"

    def __str__(self) -> str:
        return self.explain()


def _surveyed(survey: Survey) -> str:
    taken = dict.fromkeys(f"{t.component}" for t in survey.tallies)
    what = "the spread" if all(t.spread for t in survey.tallies) else "values"
    return f"{survey.world.name}: {what} of {', '.join(taken)} in {plural(len(survey.world.ids), 'prompt')}"


def _ratio(before: float, after: float) -> str:
    return f" ({before / after:.1f} × fewer)" if before > 1.05 * after else ""


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _seconds(number: float) -> str:
    return f"{number:.1g} s" if number < 1 else f"{number:,.0f} s" if number < 120 else f"{number / 60:,.0f} min"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
