"""Which run measures which row: rows become tables of tokens, tables become batches, under a budget of memory.

A row enters a table in the layer of its first edit, at its first changed position. Rows that a table cannot hold (they
save values, touch modules or single heads' readers, or what ``entrance.entered`` names besides) are whole prompts of a
flat batch, as is everything on a model that allows no table. A row's raw trace is a run of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from tracepatch.architecture import Architecture
from tracepatch.costs import Costs, kept_bytes, seen_bytes, table_bytes
from tracepatch.entrance import BEFORE, above, attended, entered, explicit, looks_back, outside, standing_in
from tracepatch.errors import plural
from tracepatch.jobs import Job, Read, parts
from tracepatch.plan import Batch, Group, Reading
from tracepatch.profiles import Profile
from tracepatch.sources import WorldName
from tracepatch.table import ORDER, Form, Table, seat, shapes
from tracepatch.tokens import EncodedPairs

RIDE = 320  # tokens a pair that are measured in the run that computes its worlds
LANES = (2, 4, 8, 16, 32)


@dataclass
class Packer:
    """Makes batches of the jobs of pairs of one length.

    Attributes:
        architecture: Of the model.
        encoded: The pairs.
        form: What the model allows.
        costs: What a run costs.
        budget: Bytes that may be taken: half by the worlds' values, half by a run.
        batch_size: Rows a run; without it, as many as pay off.
        standing: Per edited world and pair, its run.
        roots: Edited world → the pristine world below it.
        rides: Whether rows may be measured in the run that computes their worlds.
        sample: Rows that are measured once more as whole prompts.
        columns: Of the vocabulary, how many are read; 0 for all.
        depth: Layers that are computed.
        seen: Activations that metrics read, of the pairs at hand.
        reads: Positions that the metrics read, of the pairs at hand.
        refused: Why rows are flat where tables are allowed, counted.
    """

    architecture: Architecture
    encoded: EncodedPairs
    form: Form
    costs: Costs
    budget: int
    batch_size: int | None
    standing: list[list[Job]]
    roots: dict[WorldName, WorldName]
    rides: bool = True
    sample: tuple[Job, ...] = ()
    columns: int = 0
    depth: int = 0
    seen: tuple[Read, ...] = field(default=(), init=False)
    reads: int = field(default=0, init=False)
    refused: Counter[str] = field(default_factory=Counter)

    def groups(self, pairs: Sequence[int], profiles: Sequence[Profile], jobs: dict[int, list[Job]]) -> Iterator[Group]:
        """Pairs of the same lengths, as many together as memory has room for, or as one run computes with its riders.

        Args:
            pairs: Their numbers; their metrics read the same positions.
            profiles: Of all pairs.
            jobs: Per pair, the rows to measure.
        """
        chunk: list[int] = []
        tokens = 0
        most = self._worlds_at_once(profiles[pairs[0]], pairs, jobs)
        for pair in pairs:
            size = self._riding_tokens(profiles[pair], jobs[pair])
            if chunk and (len(chunk) >= most or (size and tokens + size > self.costs.tokens)):
                yield self._group(profiles[pairs[0]], chunk, jobs)
                chunk, tokens = [], 0
            chunk.append(pair)
            tokens += size
        if chunk:
            yield self._group(profiles[pairs[0]], chunk, jobs)

    def root(self, job: Job) -> WorldName:
        """The world whose prompts a run has."""
        return self.roots.get(job.base, job.base)

    def slower(self, why: tuple[str, ...]) -> Iterator[str]:
        """Why some batches are not of the fastest form."""
        yield from why
        for reason, count in sorted(self.refused.items()):
            if reason:
                yield f"{plural(count, 'row')} {'is' if count == 1 else 'are'} flat: tables hold no rows that {reason}"

    def _worlds_at_once(self, profile: Profile, pairs: Sequence[int], jobs: dict[int, list[Job]]) -> int:
        every = [job for pair in pairs for job in self._everything(pair, jobs)]
        length = max(profile.alignment.clean.length, profile.alignment.corrupted.length)
        needed = {key for job in every for w in job.writes for key in w.needed}
        if self.form != "flat":
            needed |= {("resid_pre", layer) for layer in range(self.depth + 1)}
            needed |= {(name, layer) for layer in range(self.depth) for name in ("keys", "values")}
            needed |= {(read.component, read.layer) for seen in profile.seen for read in seen}
        kept = sum(kept_bytes(self.architecture, name, layer, length) for name, layer in needed)
        worlds = (1 if self.encoded.corrupted is None else 2) + len(self.standing)
        return max(1, int(self.budget / 2 // max(1, worlds * (kept + self.costs.row_bytes))))

    def _riding_tokens(self, profile: Profile, jobs: list[Job]) -> int:
        """Tokens of a pair's worlds with those of its rows that ride with them; 0 where none do."""
        if self.form != "packed" or self.standing or not self.rides or not profile.shared:
            return 0
        length = profile.alignment.clean.length
        return 2 * length + min(RIDE, sum(length - job.start for job in jobs))

    def _everything(self, pair: int, jobs: dict[int, list[Job]]) -> list[Job]:
        sample = (job for job in self.sample if job.pair == pair)
        return [*jobs[pair], *sample, *(world[pair] for world in self.standing)]

    def _group(self, profile: Profile, pairs: list[int], jobs: dict[int, list[Job]]) -> Group:
        every = [job for pair in pairs for job in self._everything(pair, jobs)]
        ready = sorted((job for pair in pairs for job in jobs[pair]), key=lambda j: (j.birth, j.row, j.pair))
        sample = [job for job in self.sample if job.pair in pairs]
        shared = profile.shared
        found: dict[WorldName, Reading] = {}
        batches: list[Batch] = []
        for root in ("clean",) if shared else ("clean", "corrupted"):
            found[root] = self._read(profile, root, every)
            own, sampled = ([j for j in some if shared or self.root(j) == root] for some in (ready, sample))
            batches += self._batches(found[root], pairs, own, sampled, every, shared)
        batches += [Batch((job,)) for job in ready if job.raw]
        clean, corrupted = found["clean"], found.get("corrupted")
        first_read = min((p for prompts in found.values() for p in prompts.reads), default=clean.length)
        lengths = {len(side[pair]) for side in self.encoded.encoder for pair in pairs}
        return Group(
            length=clean.length,
            pairs=tuple(pairs),
            reads=clean.reads,
            needed=frozenset(self._needed(every, batches, first_read)),
            batches=tuple(batches),
            edited=tuple(tuple(world[pair] for pair in pairs) for world in self.standing),
            captures=max(1, len(lengths), len(found)),
            seen=clean.seen,
            corrupted=corrupted,
        )

    def _read(self, profile: Profile, root: WorldName, every: Sequence[Job]) -> Reading:
        """What is read of a world's prompts, or of both where they are read alike; also to be written elsewhere."""
        reads, both = set(profile.reads_of(root)), profile.shared
        for job in every:
            own = both or self.root(job) == root
            for write in job.writes:
                for t in write.terms:
                    if t.component == "logits" and (both or self.roots.get(t.world, t.world) == root):
                        reads |= set(t.positions)
                if own and write.component == "logits" and write.function is not None:
                    reads |= set(write.positions)
            reads |= {p for read in job.reads if own and read.component == "logits" for p in read.positions}
        return Reading(profile.alignment.side(root).length, tuple(sorted(reads)), profile.seen_of(root))

    def _batches(
        self,
        prompts: Reading,
        pairs: list[int],
        ready: Sequence[Job],
        sample: Sequence[Job],
        every: Sequence[Job],
        shared: bool,
    ) -> list[Batch]:
        """The runs of rows of prompts of one length, but for raw traces."""
        length, reads, self.seen = prompts.length, prompts.reads, prompts.seen
        positions = {*reads, *(p for read in self.seen for p in (*read.positions, *attended(read, length)))}
        end = max(positions, default=length - 1) + 1
        tabled: list[Job] = []
        flat: list[Job] = []
        for job in (job for job in ready if not job.raw):
            found = "" if self.form == "flat" else self._entered(job, prompts, end, shared)
            if isinstance(found, Job):
                tabled.append(above(found, self.architecture, self.seen))
            else:
                self.refused[found] += 1
                flat.append(job)
        batches: list[Batch] = []
        self.reads = len(reads)
        sampled = any(isinstance(self._entered(job, prompts, end, shared), str) for job in sample)
        whole_prompts = flat or self.standing or sampled or any(job.raw for job in ready)
        # What a table does not have: it grows after the embedding, and what is read of it leaves before the logits.
        beyond = any(outside(name) for job in every for w in job.writes for name, _ in w.needed)
        beyond |= any(outside(read.component) for read in self.seen)
        rides = self.rides and shared and not (self.standing or beyond) and (end == length or not whole_prompts)
        if self.form == "packed" and tabled and rides:
            riding, tabled = self._riding(pairs, tabled, end)
            batches += [riding] if riding else []
        batches += self._tables(tabled, end)
        batches += self._flat(flat, length)
        return batches

    def _entered(self, job: Job, prompts: Reading, end: int, shared: bool) -> Job | str:
        """As it enters a table; staggered ones have no logits of what stands before a row's start."""
        length, reads = prompts.length, prompts.reads
        hidden = [read.component for read in self.seen if read.component not in BEFORE and outside(read.component)]
        if hidden:
            return f"are read in {hidden[0]}"
        first = min(reads, default=length) if self.form == "staggered" else length
        # A run that computes the worlds too has them only as far as they are read.
        return entered(job, length, end, first, end if shared else 1 << 30)

    def _needed(self, every: list[Job], batches: list[Batch], first_read: int) -> Iterator[tuple[str, int]]:
        """What of the worlds is written somewhere, or where rows are born on top of them in a run of its own."""
        for write in (w for job in every for w in job.writes):
            yield from write.needed
        tables = [b.table for b in batches if b.table]
        for write in (w for table in tables for job in table.jobs for w in job.writes):
            yield from write.needed
        for table in (table for table in tables if not table.worlds):
            yield from {("resid_pre", job.birth) for job in table.jobs}
            yield from ((read.component, read.layer) for read in self.seen)
            if any(job.start > first_read for job in table.jobs):
                yield "resid_pre", len(self.architecture)

    def _riding(self, pairs: list[int], jobs: list[Job], end: int, ride: int = RIDE) -> tuple[Batch | None, list[Job]]:
        """The run that computes the worlds, with the rows that ride in it, if they fit; the other rows."""
        room, count = dict.fromkeys(pairs, ride), self.batch_size or len(jobs)
        riding: list[Job] = []
        later: list[Job] = []
        for job in sorted(jobs, key=ORDER):
            if room[job.pair] >= end - job.start and len(riding) < count and _rides(job):
                riding.append(job)
                room[job.pair] -= end - job.start
            else:
                later.append(job)
        worlds = [world for pair in pairs for world in self._worlds(pair, riding, end)]
        if not riding:
            return None, jobs
        table = seat([self._witness(riding, end), *riding], "packed", self.depth, end, worlds=worlds)
        if self._too_large(table):
            return self._riding(pairs, jobs, end, ride // 2)
        return Batch(tuple(riding), table), later

    def _worlds(self, pair: int, riding: list[Job], end: int) -> list[Job]:
        """A pair's worlds, that of most rows whole, the other from the first token that differs."""
        bases = Counter(job.base for job in riding if job.pair == pair)
        names = ["clean"] if self.encoded.corrupted is None else sorted(("clean", "corrupted"), key=lambda b: -bases[b])
        start = min((*self.encoded.differing(pair), end)) if len(names) > 1 else 0
        return [Job(-1, pair, name, (), start if i else 0, 0) for i, name in enumerate(names)]

    def _witness(self, jobs: list[Job], end: int) -> Job:
        """The unpatched base of the first row: its last token alone, from the first row's birth on."""
        first, birth = jobs[0], min(self.depth - 1, *(job.birth for job in jobs))
        start = end - 1 if self.form == "packed" else first.start
        writes = next((w[first.pair].writes for w in self.standing if w[first.pair].base == first.base), ())
        if any(looks_back(w) for w in writes):  # the row itself stands where that does no harm
            start, birth = first.start, min(self.depth - 1, first.birth)
        length = self.encoded.alignments[first.pair].side(self.root(first)).length
        own = tuple(explicit(w, length) for w in standing_in(writes, start, birth, end))
        return Job(-1, first.pair, first.base, own, start, birth)

    def _tables(self, jobs: list[Job], end: int) -> Iterator[Batch]:
        if self.form == "flat":
            return
        packed = self.form == "packed"
        jobs = sorted(jobs, key=ORDER if packed else attrgetter("start", "birth"))
        taken: list[Job] = []
        load = 0
        for job in jobs:
            more = load + end - job.start
            full = len(taken) >= self.batch_size if self.batch_size else more > self.costs.tokens
            if taken and (full or (not packed and job.start != taken[0].start)):
                yield from self._table(taken, end)
                taken, more = [], end - job.start
            taken.append(job)
            load = more
        if taken:
            yield from self._table(taken, end)

    def _table(self, jobs: list[Job], end: int) -> Iterator[Batch]:
        """The table of some rows, or several where memory has no room for one."""
        everyone = [self._witness(jobs, end), *jobs]
        best, least = 1, float("inf")
        if self.form == "packed":
            first, prefix = min([job.birth for job in everyone]), max([job.start for job in everyone])
            runs = len({(job.pair, job.base) for job in jobs})
            lanes = [1, *(n for n in LANES if runs < n <= len(jobs))]
            for count, shape in zip(lanes, shapes(everyone, self.depth, end, lanes), strict=True):
                seconds = self.costs.seconds(shape[first:-1], prefix, len(everyone))
                if seconds >= least:
                    break
                best, least = count, seconds
        table = seat(everyone, self.form, self.depth, end, lanes=best)
        if self._too_large(table) and len(jobs) > 1:
            middle = len(jobs) // 2
            yield from self._table(jobs[:middle], end)
            yield from self._table(jobs[middle:], end)
        else:
            yield Batch(tuple(jobs), table)

    def _too_large(self, table: Table) -> bool:
        every = not self.columns or any(w.component == "logits" for job in table.jobs for w in job.writes)
        columns = self.architecture.vocab if every else self.columns
        taken = table_bytes(self.architecture, table, self.reads * columns)
        return taken + seen_bytes(self.architecture, table, self.seen) > self.budget / 2

    def _flat(self, jobs: list[Job], length: int) -> Iterator[Batch]:
        """Whole prompts in runs of so many batch elements, or of one job that needs more."""
        read = max((len(ids) for side in self.encoded.encoder for ids in side), default=0)

        def read_by(job: Job) -> int:
            return len(self.encoded.encoded(self.roots.get(job.base, job.base), job.pair))

        most = self.batch_size or max(
            1, min(int(self.budget / 2 // self.costs.row_bytes) - 1, max(8, self.costs.flat_tokens // (length + read)))
        )
        for part in parts(jobs, read_by, max(1, len(jobs))):
            taken: list[Job] = []
            seats = 0
            for job in part:
                if taken and seats + job.seats > most:
                    yield Batch(tuple(taken))
                    taken, seats = [], 0
                taken.append(job)
                seats += job.seats
            if taken:
                yield Batch(tuple(taken))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """A batch in two, for when there was not enough memory; the worlds are then computed in both."""
    middle = len(batch.jobs) // 2
    one, two = divided(batch, (middle, len(batch.jobs) - middle))
    return one, two


def divided(batch: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """A batch in parts of so many rows, as it was halved, and halved again."""
    rest, table = iter(batch.jobs), batch.table
    for size in sizes:
        jobs = tuple(itertools.islice(rest, size))
        if table is None:
            yield Batch(jobs)
            continue
        worlds, witness = table.jobs[: table.worlds], table.jobs[table.worlds]
        yield Batch(jobs, seat([witness, *jobs], table.form, len(table.shape) - 1, table.end, worlds=worlds))


def _rides(job: Job) -> bool:
    """Whether what a row writes has passed by, in the forward that computes the worlds, when it is written."""
    return all(
        (name, layer) == (w.component, w.layer) or layer < w.layer for w in job.writes for name, layer in w.needed
    )
