"""What runs inside an nnsight trace, the only place where a plan touches a model.

Nothing is decided here. Functions take nested tuples of builtins and tensors and return tensors in builtins, use only
torch and nnsight (and ``writing``, which uses only torch), and have no decorators, so that they mean the same wherever
they are executed.
"""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from tracepatch.writing import edited, module_at, perform, retain

KEPT_LATE = ("plain", "weights")


def forward(
    model: Any,
    ids: torch.Tensor,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    reads: torch.Tensor,
    options: dict[str, Any],
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    remote: Any = False,
    encoder: torch.Tensor | None = None,
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """One traced forward.

    Args:
        model: The nnsight model.
        ids: Token ids ``[row, pos]``; the decoder's, where there is an encoder.
        stops: The places to visit, from ``layout.stops``.
        known: Values of the worlds, ``(component, layer)`` → ``[world, pos, …]``.
        reads: The positions whose logits are scored.
        options: Further arguments of the model's forward.
        logit_edits: Indexed writes of logits.
        measures: ``(function, indices into reads, given)`` for each metric.
        keep_logits: Whether to keep the logits at ``reads`` too, and what rows save of them.
        remote: As nnsight takes it.
        encoder: Token ids ``[row, pos]`` that an encoder reads.

    Returns:
        What was kept, and the metrics' values ``[row, column]`` in float32.
    """
    with torch.no_grad():
        with model.trace(**named(ids, encoder), use_cache=False, remote=remote, **options):
            result = nnsight.save(
                inside(model, ids.shape[1], stops, known, reads, bool(options), logit_edits, measures, keep_logits)
            )
    kept, scores = result
    return kept, scores


def named(ids: torch.Tensor, encoder: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Token ids as the arguments of a forward."""
    return {"input_ids": ids} if encoder is None else {"input_ids": encoder, "decoder_input_ids": ids}


def raw(
    model: Any,
    inputs: dict[str, torch.Tensor],
    function: Any,
    reads: torch.Tensor,
    measures: tuple[Any, ...],
    remote: Any = False,
) -> torch.Tensor:
    """A traced forward in which a function, or nothing, acts: the metrics' values ``[row, column]``."""
    with torch.no_grad():
        with model.trace(**inputs, use_cache=False, remote=remote):
            if function is not None:
                function(model)
            scores = nnsight.save(scored(model.output.logits[:, reads.to(model.output.logits.device)], measures))
    return scores  # type: ignore[no-any-return]  # nnsight has no types


def scored(logits: torch.Tensor, measures: tuple[Any, ...]) -> torch.Tensor:
    """The metrics' values ``[row, column]`` of logits ``[row, read, vocab]``."""
    scores = []
    for function, at, given in measures:
        found = function(logits[:, at].float(), {name: value.to(logits.device) for name, value in given.items()})
        scores.append(found if found.ndim == 2 else found[:, None])
    return torch.cat(scores, 1).float().cpu() if scores else torch.zeros(len(logits), 0)


def inside(
    model: Any,
    length: int,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    reads: torch.Tensor,
    only_reads: bool,
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """The body of the trace."""
    kept: dict[Any, torch.Tensor] = {}
    for stop in stops:
        visit(model, stop, length, known, kept)
    logits = model.output.logits
    if not only_reads:
        logits = logits[:, reads.to(logits.device)]
    logits = edited(logits, logit_edits, known)
    if logit_edits:
        kept["fired", ("logits", 0)] = fired(logit_edits, len(logits))
    retain(("logits", 0), keep_logits, logits, kept)
    kept = {key: value for key, value in kept.items() if key[0] != "aside"}  # what this forward alone needed
    return kept, scored(logits, measures)


def read(model: Any, places: list[Any], ids: torch.Tensor, encoder: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What passes by at some places, in forward order, in a plain forward."""
    with torch.no_grad():
        with model.trace(**named(ids, encoder), use_cache=False):
            kept: dict[Any, torch.Tensor] = {}
            for number, place in enumerate(places):
                visit(model, (place, (("aside", number),)), ids.shape[1], {}, kept)
            taken = nnsight.save([kept["aside", number] for number in range(len(places))])
    return list(taken)


def visit(
    model: Any, stop: tuple[Any, ...], length: int, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> None:
    """Keeps and writes what is to be kept and written at one place."""
    (path, operation, side, key, flat), tasks = stop
    envoy = module_at(model, path)
    for name in operation.split(".") if operation else ():  # a call inside the module's own forward
        envoy = getattr(envoy.source, name)
    whole = envoy.output if side == "output" else envoy.inputs if key is not None else envoy.input
    if side == "output":
        found = whole if key is None else whole[key]
    else:
        found = whole if key is None else whole[1][key] if isinstance(key, str) else whole[0][key]
    x = found[0] if isinstance(found, (tuple, list)) else found
    shape = x.shape
    if flat:
        x = x.unflatten(0, (-1, length))
    before = x
    first, last = [t for t in tasks if t[0] != "resid_mid"], [t for t in tasks if t[0] == "resid_mid"]
    for task in first:
        x = perform(model, without_keeping(task), x, known, kept)
    for task in first:  # what is kept is what passes by after all edits of the place
        if task[0] in KEPT_LATE and any(task[3]):
            perform(model, (*task[:2], (), *task[3:]), x, known, kept)
    for task in last:  # what attention adds is not what an edit of the sum makes of it
        x = perform(model, task, x, known, kept)
    if x is before:
        return
    rows = len(x)
    x = x.reshape(shape)
    if isinstance(found, (tuple, list)):
        x = type(found)([x, *found[1:]])
    if side == "output":
        envoy.output = x if key is None else replaced(whole, key, x)
    elif key is None:
        envoy.input = x
    else:
        args, kwargs = whole
        envoy.inputs = (args, {**kwargs, key: x}) if isinstance(key, str) else (replaced(args, key, x), kwargs)
    for task in tasks:
        if task[0] not in ("aside", "allowed", "from_shadows") and task[2]:
            kept["fired", task[1]] = fired(task[2], rows)


def without_keeping(task: tuple[Any, ...]) -> tuple[Any, ...]:
    """The task of writing alone, where what is kept can be told from what passes by in the end."""
    return (*task[:3], (False, ()), *task[4:]) if task[0] in KEPT_LATE else task


def fired(writes: tuple[Any, ...], rows: int) -> torch.Tensor:
    """What the caller compares with its plan: how many cells were written, and of how many rows the value was."""
    return torch.tensor([sum(len(write[1][0]) for write in writes), rows])


def replaced(values: Any, key: Any, value: torch.Tensor) -> Any:
    """A tuple or mapping with one entry exchanged."""
    if isinstance(key, str):
        return type(values)(**{**values, key: value})
    return (*values[:key], value, *values[key + 1 :])
