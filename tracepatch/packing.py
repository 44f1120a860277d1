"""Which run measures which row: rows become tables of tokens, tables become batches, under a budget of memory.

A row enters a table in the layer of its first edit, at its first changed position. Rows that a table cannot hold (they
save values, touch modules or single heads' readers, or what ``entered`` names besides) are whole prompts of a flat
batch, as is everything on a model that allows no table. A row's raw trace is a run of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tracepatch.architecture import Architecture
from tracepatch.costs import Costs, kept_bytes, table_bytes
from tracepatch.errors import plural
from tracepatch.jobs import CACHED, EAGER, Job, Term, Write, narrowed
from tracepatch.plan import Batch, Group, parts
from tracepatch.sites import SPLIT_READERS, component
from tracepatch.sources import WorldName
from tracepatch.table import Form, Table, seat
from tracepatch.tokens import EncodedPairs

RIDE = 320  # tokens a pair that are measured in the run that computes its worlds
LANES = (1, 2, 4, 8, 16, 32)
BEFORE = frozenset({"embed"})  # what is over when the stream enters the first layer
OUTSIDE = frozenset({"embed", "cross_attn_out", "logits_in_scale"}) | set(SPLIT_READERS)


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
    reads: int = field(default=0, init=False)
    refused: Counter[str] = field(default_factory=Counter)

    def groups(
        self, length: int, pairs: Sequence[int], reads_of: list[tuple[int, ...]], jobs: dict[int, list[Job]]
    ) -> Iterator[Group]:
        """Pairs of one length, as many together as memory has room for, or as one run computes with its riders.

        Args:
            length: Tokens of each prompt.
            pairs: Their numbers.
            reads_of: Per pair, the positions that metrics read.
            jobs: Per pair, the rows to measure.
        """
        chunk: list[int] = []
        tokens = 0
        most = self._worlds_at_once(length, pairs, jobs)
        for pair in pairs:
            size = self._riding_tokens(length, jobs[pair])
            if chunk and (len(chunk) >= most or (size and tokens + size > self.costs.tokens)):
                yield self._group(length, chunk, reads_of, jobs)
                chunk, tokens = [], 0
            chunk.append(pair)
            tokens += size
        if chunk:
            yield self._group(length, chunk, reads_of, jobs)

    def slower(self, why: tuple[str, ...]) -> Iterator[str]:
        """Why some batches are not of the fastest form."""
        yield from why
        for reason, count in sorted(self.refused.items()):
            if reason:
                yield f"{plural(count, 'row')} {'is' if count == 1 else 'are'} flat: tables hold no rows that {reason}"

    def _worlds_at_once(self, length: int, pairs: Sequence[int], jobs: dict[int, list[Job]]) -> int:
        every = [job for pair in pairs for job in self._everything(pair, jobs)]
        needed = {(t.component, t.layer) for job in every for w in job.writes for t in w.terms}
        if self.form != "flat":
            needed |= {("resid_pre", layer) for layer in range(len(self.architecture) + 1)}
            needed |= {(name, layer) for layer in range(len(self.architecture)) for name in ("keys", "values")}
        kept = sum(kept_bytes(self.architecture, name, layer, length) for name, layer in needed)
        worlds = (1 if self.encoded.corrupted is None else 2) + len(self.standing)
        return max(1, int(self.budget / 2 // max(1, worlds * (kept + self.costs.row_bytes))))

    def _riding_tokens(self, length: int, jobs: list[Job]) -> int:
        """Tokens of a pair's worlds with those of its rows that ride with them; 0 where none do."""
        if self.form != "packed" or self.standing or not self.rides:
            return 0
        return 2 * length + min(RIDE, sum(length - job.start for job in jobs))

    def _everything(self, pair: int, jobs: dict[int, list[Job]]) -> list[Job]:
        sample = (job for job in self.sample if job.pair == pair)
        return [*jobs[pair], *sample, *(world[pair] for world in self.standing)]

    def _group(
        self, length: int, pairs: list[int], reads_of: list[tuple[int, ...]], jobs: dict[int, list[Job]]
    ) -> Group:
        every = [job for pair in pairs for job in self._everything(pair, jobs)]
        reads = {p for pair in pairs for p in reads_of[pair]}
        for write in (w for job in every for w in job.writes):
            reads |= {p for t in write.terms if t.component == "logits" for p in t.positions}
            if write.component == "logits" and write.function is not None:
                reads |= set(write.positions)
        reads |= {p for job in every for read in job.reads if read.component == "logits" for p in read.positions}
        end = max(reads) + 1
        ready = sorted((job for pair in pairs for job in jobs[pair]), key=lambda j: (j.birth, j.row, j.pair))
        tabled: list[Job] = []
        flat: list[Job] = []
        for job in (job for job in ready if not job.raw):
            found = "" if self.form == "flat" else self._entered(job, length, reads)
            if isinstance(found, Job):
                tabled.append(above(found, self.architecture))
            else:
                self.refused[found] += 1
                flat.append(job)
        batches: list[Batch] = []
        self.reads = len(reads)
        sampled = any(isinstance(self._entered(job, length, reads), str) for job in self.sample if job.pair in pairs)
        whole_prompts = flat or self.standing or sampled or any(job.raw for job in ready)
        # What a table does not have: it grows after the embedding, and what is read of it leaves before the logits.
        beyond = any(_outside(t.component) for job in every for w in job.writes for t in w.terms)
        rides = self.rides and not (self.standing or beyond) and (end == length or not whole_prompts)
        if self.form == "packed" and tabled and rides:
            riding, tabled = self._riding(pairs, tabled, end)
            batches += [riding] if riding else []
        batches += self._tables(tabled, end)
        batches += self._flat(flat, length)
        batches += [Batch((job,)) for job in ready if job.raw]
        lengths = {len(side[pair]) for side in self.encoded.encoder for pair in pairs}
        return Group(
            length=length,
            pairs=tuple(pairs),
            reads=tuple(sorted(reads)),
            needed=frozenset(self._needed(every, batches, min(reads))),
            batches=tuple(batches),
            edited=tuple(tuple(world[pair] for pair in pairs) for world in self.standing),
            captures=max(1, len(lengths)),
        )

    def _entered(self, job: Job, length: int, reads: set[int]) -> Job | str:
        """As it enters a table; staggered ones do not read what stands before a row's start."""
        return entered(job, length, max(reads) + 1, min(reads) if self.form == "staggered" else length)

    def _needed(self, every: list[Job], batches: list[Batch], first_read: int) -> Iterator[tuple[str, int]]:
        """What of the worlds is written somewhere, or where rows are born on top of them in a run of its own."""
        for write in (w for job in every for w in job.writes):
            yield from ((t.component, t.layer) for t in write.terms)
        tables = [b.table for b in batches if b.table]
        for write in (w for table in tables for job in table.jobs for w in job.writes):
            yield from ((t.component, t.layer) for t in write.terms)
        for table in (table for table in tables if not table.worlds):
            yield from (("resid_pre", job.birth) for job in table.jobs)
            if any(job.start > first_read for job in table.jobs):
                yield "resid_pre", len(self.architecture)

    def _riding(self, pairs: list[int], jobs: list[Job], end: int, ride: int = RIDE) -> tuple[Batch | None, list[Job]]:
        """The run that computes the worlds, with the rows that ride in it, if they fit; the other rows."""
        room, count = dict.fromkeys(pairs, ride), self.batch_size or len(jobs)
        riding: list[Job] = []
        later: list[Job] = []
        for job in sorted(jobs, key=_order):
            if room[job.pair] >= end - job.start and len(riding) < count and _rides(job):
                riding.append(job)
                room[job.pair] -= end - job.start
            else:
                later.append(job)
        worlds = [world for pair in pairs for world in self._worlds(pair, riding, end)]
        if not riding:
            return None, jobs
        table = seat([self._witness(riding, end), *riding], "packed", len(self.architecture), end, worlds=worlds)
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
        first, birth = jobs[0], min(len(self.architecture) - 1, *(job.birth for job in jobs))
        start = end - 1 if self.form == "packed" else first.start
        writes = next((w[first.pair].writes for w in self.standing if w[first.pair].base == first.base), ())
        if any(_looks_back(w) for w in writes):  # the row itself stands where that does no harm
            start, birth = first.start, min(len(self.architecture) - 1, first.birth)
        length = self.encoded.lengths[first.pair]
        explicit = tuple(_explicit(w, length) for w in _standing(writes, start, birth, end))
        return Job(-1, first.pair, first.base, explicit, start, birth)

    def _tables(self, jobs: list[Job], end: int) -> Iterator[Batch]:
        if self.form == "flat":
            return
        packed = self.form == "packed"
        jobs = sorted(jobs, key=_order if packed else lambda j: (j.start, j.birth))
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
        runs = len({(job.pair, job.base) for job in jobs}) if self.form == "packed" else len(jobs)
        lanes = (n for n in LANES if n == 1 or runs < n <= len(jobs))
        tried = [seat(everyone, self.form, len(self.architecture), end, lanes=n) for n in lanes]
        table = min(tried, key=self.costs.seconds)
        if self._too_large(table) and len(jobs) > 1:
            middle = len(jobs) // 2
            yield from self._table(jobs[:middle], end)
            yield from self._table(jobs[middle:], end)
        else:
            yield Batch(tuple(jobs), table)

    def _too_large(self, table: Table) -> bool:
        every = not self.columns or any(w.component == "logits" for job in table.jobs for w in job.writes)
        columns = self.architecture.vocab if every else self.columns
        return table_bytes(self.architecture, table, self.reads * columns) > self.budget / 2

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


def halves(batch: Batch, depth: int) -> tuple[Batch, Batch]:
    """A batch in two, for when there was not enough memory; the worlds are then computed in both."""
    middle = len(batch.jobs) // 2
    parts_of = batch.jobs[:middle], batch.jobs[middle:]
    table = batch.table
    if table is None:
        return Batch(parts_of[0]), Batch(parts_of[1])
    worlds, witness = table.jobs[: table.worlds], table.jobs[table.worlds]
    one, two = (Batch(jobs, seat([witness, *jobs], table.form, depth, table.end, worlds=worlds)) for jobs in parts_of)
    return one, two


def entered(job: Job, length: int, end: int, first: int) -> Job | str:
    """A row as it enters a table: from the layer and the position of its own first edit on; or why it cannot.

    What its base, an edited world, does before that is in the stream that it starts from.

    Args:
        job: The row.
        length: Tokens of its prompt.
        end: One more than the last position that is read.
        first: The latest position that it may start from.
    """
    if job.reads:
        return "save values"
    for write in job.writes:
        if component(write.component).module:
            return "touch modules"
        if write.component in OUTSIDE and not (write.standing and write.component in BEFORE):
            return f"edit {write.component}"
        if write.component in EAGER and end < length:
            return f"edit {write.component} where positions are left out"
    own = [w for w in job.writes if not w.standing]
    start, birth = min(first, *(p for w in own for p in w.positions)), min(w.layer for w in own)
    # A witness stands in the last layer at least.
    late = [w for w in job.writes if w.standing and w.layer >= birth - 1 and _looks_back(w)]
    if any(min(w.positions) < start or (w.function is not None and max(w.positions) >= end) for w in late):
        return "edit a world of edited keys or values, or of functions that reach over positions"
    inside = [
        p for w in own if w.component != "logits" for p in (*w.positions, *(p for t in w.terms for p in t.positions))
    ]
    if max(inside, default=0) >= end:
        return "edit or take positions after the last one that is read"
    since = next(i for i, w in enumerate(job.writes) if not w.standing)
    if any(w.standing and (w.component, w.layer) == ("resid_pre", birth) for w in job.writes[since:]):
        return "edit the stream before a standing edit of it"
    writes = (_explicit(w, length) for w in _standing(job.writes, start, birth, end))
    return replace(job, writes=tuple(writes), start=start, birth=birth)


def above(job: Job, architecture: Architecture) -> Job:
    """The same row, born a layer later where its first edit is all of what an MLP adds: the sum after it is known."""
    first = [w for w in job.writes if w.layer == job.birth]
    layer = architecture.layers[job.birth] if job.birth < len(architecture) else None
    known = layer is not None and layer.error == 0 and not any(s.stream_norm for s in layer.sublayers)
    one = first[0] if len(first) == 1 and first[0].component == "mlp_out" else None
    # In 16 bits a sum that is put together otherwise is off by its last bit.
    exact = architecture.dtype.itemsize >= 4
    if one is None or not (known and exact) or one.function or any(w.standing for w in job.writes):
        return job
    taken = () if one.add else (Term(-1.0, job.base, "mlp_out", job.birth, one.positions, None),)
    write = replace(one, component="resid_pre", layer=one.layer + 1, add=True, terms=(*one.terms, *taken))
    return replace(job, birth=job.birth + 1, writes=(write, *(w for w in job.writes if w is not one)))


def _standing(writes: Iterable[Write], start: int, birth: int, end: int) -> Iterator[Write]:
    """The writes of a row, without what standing ones did before its start: that is in the stream and cache it has."""
    for write in writes:
        if not write.standing or write.component == "logits":
            yield write
        elif write.component not in BEFORE and (write.layer, write.component != "resid_pre") > (birth, False):
            inside = [i for i, p in enumerate(write.positions) if start <= p < end]
            if inside:
                yield narrowed(write, inside) if len(inside) < len(write.positions) else write


def _looks_back(write: Write) -> bool:
    """Whether what an edited world does at earlier positions must be done again in a table.

    A cache has keys and values as they were before edits of them.
    """
    return write.component in CACHED or (write.function is not None and len(write.positions) > 1)


def _explicit(write: Write, length: int) -> Write:
    """With every source written out: in a table they stand apart."""
    if write.component not in EAGER or write.srcs is not None:
        return write
    every = tuple(range(length))
    terms = tuple(replace(t, srcs=every) if t.component in EAGER and t.srcs is None else t for t in write.terms)
    return replace(write, srcs=every, terms=terms)


def _outside(name: str) -> bool:
    """Whether a component has values that no table has."""
    return name in OUTSIDE or name == "logits" or component(name).module


def _rides(job: Job) -> bool:
    """Whether what a row writes has passed by, in the forward that computes the worlds, when it is written."""
    return all(
        (t.component, t.layer) == (w.component, w.layer) or t.layer < w.layer for w in job.writes for t in w.terms
    )


def _order(job: Job) -> tuple[int, int]:
    return job.birth, job.start
