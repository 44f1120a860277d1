"""Which rows a table holds, and where they enter it: from the layer and the position of their first edit on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tracepatch.architecture import Architecture
from tracepatch.jobs import CACHED, EAGER, Job, Read, Term, Write, narrowed
from tracepatch.sites import COMPONENTS, SPLIT_READERS, component

BEFORE = frozenset({"embed"})  # what is over when the stream enters the first layer
OF_MLP = frozenset({"mlp_out", "experts_out"})  # where an edit of what an MLP adds shows
OUTSIDE = frozenset({"embed", "cross_attn_out", "logits_in_scale"}) | set(SPLIT_READERS)
PLAIN = frozenset(COMPONENTS) - OUTSIDE - EAGER  # what a table has as it is


def entered(job: Job, length: int, end: int, first: int, known: int) -> Job | str:
    """A row as it enters a table: from the layer and the position of its own first edit on; or why it cannot.

    What its base, an edited world, does before that is in the stream that it starts from.

    Args:
        job: The row.
        length: Tokens of its prompt.
        end: One more than the last position that is read.
        first: The latest position that it may start from.
        known: One more than the last position at which worlds' values are known.
    """
    if job.reads:
        return "save values"
    plain = True
    for write in job.writes:
        if write.component in PLAIN and not write.standing:  # what most edits are
            continue
        plain = False
        if component(write.component).module:
            return "touch modules"
        if write.component in OUTSIDE and not (write.standing and write.component in BEFORE):
            return f"edit {write.component}"
        if write.component in EAGER and end < length:
            return f"edit {write.component} where positions are left out"
    if plain and job.start <= first and end == length:
        return job
    own = [w for w in job.writes if not w.standing]
    start, birth = min(first, *[min(w.positions) for w in own]), min([w.layer for w in own])
    if len(own) < len(job.writes):
        # A witness stands in the last layer at least.
        late = [w for w in job.writes if w.standing and w.layer >= birth - 1 and looks_back(w)]
        if any(min(w.positions) < start or (w.function is not None and max(w.positions) >= end) for w in late):
            return "edit a world of edited keys or values, or of functions that reach over positions"
        since = next(i for i, w in enumerate(job.writes) if not w.standing)
        if any(w.standing and (w.component, w.layer) == ("resid_pre", birth) for w in job.writes[since:]):
            return "edit the stream before a standing edit of it"
    if end < length:
        inside = [w for w in own if w.component != "logits"]
        taken = [max(t.positions) for w in inside for t in w.terms if t.tally is None]
        if max([max(w.positions) for w in inside], default=0) >= end or max(taken, default=0) >= known:
            return "edit or take positions after the last one that is read"
    writes = tuple([explicit(w, length) for w in standing_in(job.writes, start, birth, end)])
    return Job(job.row, job.pair, job.base, writes, start, birth)


def attended(read: Read, length: int) -> Sequence[int]:
    """The positions that a table must have so that scores or a pattern can be read; none for others.

    Some models count distances from the end of a prompt: their scores are those of a whole one, up to what a softmax
    does not see.
    """
    if read.component not in EAGER:
        return ()
    return range(length) if read.srcs is None or read.component == "scores" else read.srcs


def above(job: Job, architecture: Architecture, seen: Iterable[Read] = ()) -> Job:
    """The same row, born a layer later where its first edit is all of what an MLP adds: the sum after it is known."""
    if any(read.component in OF_MLP and read.layer == job.birth for read in seen):
        return job
    first = [w for w in job.writes if w.layer == job.birth]
    if len(first) > 1 or first[0].component != "mlp_out":
        return job
    layer = architecture.layers[job.birth] if job.birth < len(architecture) else None
    known = layer is not None and layer.error == 0 and not any(s.stream_norm for s in layer.sublayers)
    (one,) = first
    # In 16 bits a sum that is put together otherwise is off by its last bit.
    exact = architecture.dtype.itemsize >= 4
    if not (known and exact) or one.function or one.portion or any(w.standing for w in job.writes):
        return job
    taken = () if one.add else (Term(-1.0, job.base, "mlp_out", job.birth, one.positions, None),)
    write = replace(one, component="resid_pre", layer=one.layer + 1, add=True, terms=(*one.terms, *taken))
    return replace(job, birth=job.birth + 1, writes=(write, *(w for w in job.writes if w is not one)))


def standing_in(writes: Iterable[Write], start: int, birth: int, end: int) -> Iterator[Write]:
    """The writes of a row, without what standing ones did before its start: that is in the stream and cache it has."""
    for write in writes:
        if not write.standing or write.component == "logits":
            yield write
        elif write.component not in BEFORE and (write.layer, write.component != "resid_pre") > (birth, False):
            inside = [i for i, p in enumerate(write.positions) if start <= p < end]
            if inside:
                yield narrowed(write, inside) if len(inside) < len(write.positions) else write


def looks_back(write: Write) -> bool:
    """Whether what an edited world does at earlier positions must be done again in a table.

    A cache has keys and values as they were before edits of them.
    """
    return write.component in CACHED or (write.function is not None and len(write.positions) > 1)


def explicit(write: Write, length: int) -> Write:
    """With every source written out: in a table they stand apart."""
    if write.component not in EAGER or write.srcs is not None:
        return write
    every = tuple(range(length))
    terms = tuple(replace(t, srcs=every) if t.component in EAGER and t.srcs is None else t for t in write.terms)
    return replace(write, srcs=every, terms=terms)


def outside(name: str) -> bool:
    """Whether a component has values that no table has."""
    return name in OUTSIDE or name == "logits" or component(name).module
