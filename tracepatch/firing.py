"""Whether every edit of a traced run happened, and a failed run in words.

A model may leave a module out for some inputs, run it twice, or give it other rows than the probe saw; a fault of ours
may lose an edit on its way from the plan to the trace. Each looks like a patch without effect, so each is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import MeasurementError, listing, plural
from tracepatch.jobs import Job, Write
from tracepatch.layout import Stop
from tracepatch.rows import Row


def require_fired(
    rows: Sequence[Row], reads: Sequence[int], jobs: Sequence[Job], kept: dict[Any, Any], ran: dict[int, int]
) -> int:
    """Compares what a traced run says it wrote with the plan itself, not with what was made of it since.

    Args:
        rows: The recorded rows.
        reads: The positions whose logits it computed.
        jobs: Its rows.
        kept: What it returned; ``("fired", (component, layer))`` → cells written, and rows of the value there.
        ran: Layer → rows that traced tensors had there; -1 for the logits.

    Returns:
        How many edits fired.

    Raises:
        MeasurementError: An edit never fired, or hit a value of other rows.
    """
    wanted: Counter[tuple[str, int]] = Counter()
    for write in (w for job in jobs for w in job.writes):
        read = [p for p in write.positions if write.component != "logits" or p in reads]
        if read:
            wanted[_key(write)] += len(read) * len(write.units or (0,)) * len(write.srcs or (0,))
    told = {key[1]: value for key, value in kept.items() if key[0] == "fired"}
    wrong = []
    for key, count in wanted.items():
        lanes = ran[-1] if key[0] == "logits" else ran[key[1]]
        written, seen = told.get(key, (0, lanes))
        where = key[0] if key[0] == "logits" else f"{key[0]} of layer {key[1]}"
        if written == count and seen == lanes:
            continue
        of = listed(rows, [job for job in jobs if any(_key(w) == key for w in job.writes)])
        if written != count:
            wrong.append(f"{where}: {written:,} of {count:,} cells were written, for\n{of}")
        if seen != lanes:
            wrong.append(f"{where}: it was computed for {seen:,} rows of {lanes:,}, so that they were mixed up\n{of}")
    if wrong:
        raise MeasurementError(
            "Edits never fired.\n"
            + "\n".join(wrong)
            + "\nSuch rows look like patches without effect, so nothing of this "
            "run is kept. Patch another component or layer; if the model computes this one in every forward, report it."
        )
    return sum(len(job.writes) for job in jobs)


def listed(rows: Sequence[Row], jobs: Sequence[Job]) -> str:
    """Measured rows as they were recorded, one to a line."""
    return listing([f"pair {job.pair}, {_row(rows, job)}" for job in jobs])


def _row(rows: Sequence[Row], job: Job) -> str:
    """A row as it was recorded, or which of the worlds it is."""
    return str(rows[job.row]) if 0 <= job.row < len(rows) else f"the {job.base} run"


def _key(write: Write) -> tuple[str, int]:
    return write.component, 0 if write.component == "logits" else write.layer


@contextmanager
def each_once(module: torch.nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Refuses a forward in which one of the modules runs more than once: only its first time is read and written.

    Raises:
        MeasurementError: One did.
    """
    calls: Counter[str] = Counter()

    def count(path: str) -> Callable[..., None]:
        return lambda module, args: calls.update((path,))

    handles = [module.get_submodule(path).register_forward_pre_hook(count(path)) for path in dict.fromkeys(paths)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    several = [f"{path}: {count} times" for path, count in calls.items() if count > 1]
    if several:
        raise MeasurementError(
            "Modules ran more than once in one forward, and only the first time can be read and written.\n"
            f"{listing(several)}\nPatch components that live elsewhere (print(tp.Architecture(model)) shows where); if "
            "the first time is what you mean, pass checks=False."
        )


def once(visited: Sequence[Stop], architecture: Architecture) -> set[str]:
    """The modules that must run once; instead of those that a trace calls itself, to split heads, the block."""
    paths = {path for (path, _, side, *_), _ in visited if side not in ("skip", "known")}
    for layer in {name[1] for _, tasks in visited for kind, name, *_ in tasks if kind == "head_out"}:
        how = architecture.head_projection(layer)
        paths = (paths - {how.projection, how.post_norm}) | {architecture.layers[layer].path}
    for task in (task for _, tasks in visited for task in tasks if task[0] in ("reader", "shadows", "scale")):
        paths -= {task[4 if task[0] == "shadows" else 5]}  # the norm
    return paths


def failure(error: Exception, places: Sequence[str], of: str, ran: int) -> str:
    """What went wrong in a traced run: where, for which rows, and what to do.

    Args:
        error: As it was raised inside the trace.
        places: The modules to be visited, in their order.
        of: The rows, one to a line.
        ran: How many there were.
    """
    what = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"There was not enough memory for a traced run of {plural(ran, 'row')}: {what}\n{of}\n"
            "Pass a smaller batch_size=, or in memory= how many bytes may be taken."
        )
    kind = getattr(error, "kind", type(error).__name__)  # a server's error keeps its name
    # nnsight names the value that it waited for, as in 'model.transformer.h.2.output.i0'.
    missed = max((path for path in places if f".{path}." in what), key=len, default="")
    if missed:
        return (
            f"{missed} did not run when its turn came, so nothing could be read or written there.\n{of}\n"
            f"The model leaves it out for these inputs, or runs it in another order than in the probe ({what}). Patch "
            "other layers, or switch off what makes the model leave modules out."
        )
    return (
        f"A traced run of {plural(ran, 'row')} failed: {kind}: {what}\n{of}\n"
        "If a metric or a function of yours raised this, mend it; if not, batch_size=1 finds the row."
    )
