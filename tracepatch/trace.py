"""What runs inside an nnsight trace, the only place where a plan touches a model.

Nothing is decided here. Functions take nested tuples of builtins and tensors and return tensors in builtins, use only
torch and nnsight (and ``writing``, which uses only torch), and have no decorators, so that they mean the same wherever
they are executed.
"""

from __future__ import annotations

import inspect
from typing import Any

import nnsight
import torch

from tracepatch.writing import edited, module_at, on, perform, retain

KEPT_LATE = ("plain", "weights")
UNWRITTEN = ("aside", "allowed", "from_shadows", "grow", "narrow", "widen", "top")


def forward(
    model: Any,
    inputs: dict[str, Any],
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    top: tuple[Any, ...],
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    past: tuple[Any, ...] | None = None,
    remote: Any = False,
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """One traced forward.

    Args:
        model: The nnsight model.
        inputs: What its forward takes: token ids, and the like.
        stops: The places to visit, from ``layout.stops``.
        known: Values of the worlds, ``(component, layer)`` → ``[world, pos, …]``.
        top: How logits become ``[row, read, …]``: ``("kept",)`` as they are, ``("of", positions)``,
            ``("each", reads)`` where a table's tokens stand in one row; then the vocabulary columns to take, if any.
        logit_edits: Indexed writes of logits.
        measures: ``(function, indices into reads, given, columns)`` for each metric.
        keep_logits: Whether to keep the logits at the reads too, and what rows save of them.
        past: ``("keep", layers, cells)`` keeps the worlds' keys and values; ``("take", lanes, positions)`` lets the
            tokens of a table see those of so many positions before them, for the worlds of each layer's lanes.
        remote: As nnsight takes it.

    Returns:
        What was kept, and the metrics' values ``[row, column]`` in float32.
    """
    given = dict(inputs, use_cache=past is not None)
    if past is not None:
        given["past_key_values"] = cache(past, known)
    with torch.no_grad():
        with model.trace(**given, remote=remote):
            result = nnsight.save(inside(model, stops, known, top, logit_edits, measures, keep_logits, past))
    kept, scores = result
    return kept, scores


def cache(past: tuple[Any, ...], known: dict[Any, torch.Tensor]) -> Any:
    """A stock cache, empty or with the worlds' keys and values before a table, for as many lanes as each layer has.

    It is made without a config, which would cut off what a sliding window does not see.
    """
    from transformers.cache_utils import DynamicCache

    found = DynamicCache()
    if past[0] == "take":
        _, lanes, count = past
        for layer, worlds in enumerate(lanes):
            pair = []
            for name in ("keys", "values"):
                table = known[name, layer]
                alone = len(worlds) > 0 and bool((worlds == worlds[0]).all())
                # One world for all lanes: views, so that nothing is copied before the model does.
                picked = table[worlds[:1]].expand(len(worlds), -1, -1, -1) if alone else table[worlds.to(table.device)]
                pair.append(picked[:, :, :count])
            found.update(*pair, layer)
    return found


def wiring(model: Any, blocks: list[str], wrapped: bool, unembed: str, inputs: dict[str, Any]) -> list[Any]:
    """What each block takes from outside on these inputs: a mask ``[query, key]`` and tables with an entry a position.

    Every block is skipped, so this costs next to nothing.

    Returns:
        Per block, ``(argument, kind, value)``: the argument's place or name, ``mask`` or ``table``.
    """
    with torch.no_grad():
        with model.trace(**inputs, use_cache=False):
            found = nnsight.save(wires_inside(model, blocks, wrapped, unembed))
    return list(found)


def wires_inside(model: Any, blocks: list[str], wrapped: bool, unembed: str) -> list[Any]:
    """The body of that trace."""
    wires = []
    for path in blocks:
        block = module_at(model, path)
        args, kwargs = block.inputs
        names = list(inspect.signature(type(block._module).forward).parameters)[1:]
        here: dict[str, Any] = {name: (i, value) for i, (name, value) in enumerate(zip(names, args))}  # noqa: B905  # fewer
        here.update({name: (name, value) for name, value in kwargs.items()})
        found = []
        if "attention_mask" in here:
            place, value = here["attention_mask"]
            found.append((place, "mask", None if value is None else value[0, 0]))
        for name in ("position_embeddings", "position_ids"):
            place, value = here.get(name, (name, None))
            if value is not None:
                rows = tuple(t[0] for t in value) if isinstance(value, tuple) else value[0]
                found.append((place, "table", rows))
        wires.append(tuple(found))
        x = block.input
        block.skip((x,) if wrapped else x)
    head = module_at(model, unembed)
    head.skip(head.input)
    return wires


def named(ids: torch.Tensor, encoder: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Token ids as the arguments of a forward."""
    return {"input_ids": ids} if encoder is None else {"input_ids": encoder, "decoder_input_ids": ids}


def raw(
    model: Any,
    inputs: dict[str, Any],
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
    for function, at, given, columns in measures:
        read = logits[:, at].float()
        read = read if columns is None else read[..., columns.to(read.device)]
        found = function(read, {name: value.to(logits.device) for name, value in given.items()})
        scores.append(found if found.ndim == 2 else found[:, None])
    return torch.cat(scores, 1).float().cpu() if scores else torch.zeros(len(logits), 0)


def inside(
    model: Any,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    top: tuple[Any, ...],
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    past: tuple[Any, ...] | None,
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """The body of the trace."""
    kept: dict[Any, torch.Tensor] = {}
    for stop in stops:
        visit(model, stop, known, kept)
    how, *which, columns = top
    if columns is not None:
        only_columns(module_at(model, columns[0]), columns[1])
    logits = model.output.logits
    if how == "of":
        logits = logits[:, which[0].to(logits.device)]
    elif how == "each":
        logits = logits.reshape(-1, which[0], logits.shape[-1])
    logits = edited(logits, logit_edits, known)
    if logit_edits:
        kept["fired", ("logits", 0)] = fired(logit_edits, len(logits))
    retain(("logits", 0), keep_logits, logits, kept)
    if past is not None and past[0] == "keep":
        keep_past(model.output.past_key_values, past, kept)
    kept = {key: value for key, value in kept.items() if key[0] != "aside"}  # what this forward alone needed
    return kept, scored(logits, measures)


def only_columns(head: Any, columns: torch.Tensor) -> None:
    """Computes only some columns of the unembedding."""
    weight, bias = head._module.weight, head._module.bias
    columns = columns.to(weight.device)
    head.skip(torch.nn.functional.linear(head.input, weight[columns], None if bias is None else bias[columns]))


def keep_past(found: Any, past: tuple[Any, ...], kept: dict[Any, torch.Tensor]) -> None:
    """Keeps keys and values of the worlds, ``[world, head, pos, d_head]`` in each layer."""
    _, layers, cells = past
    for layer in range(layers):
        for name in ("keys", "values"):
            table = getattr(found.layers[layer], name)
            if cells is None:
                kept[name, layer] = table.clone()
            else:
                lanes, slots = on(table.device, cells)
                kept[name, layer] = table[lanes, :, slots].transpose(1, 2).contiguous()


def read(model: Any, places: list[Any], ids: torch.Tensor, encoder: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What passes by at some places, in forward order, in a plain forward."""
    with torch.no_grad():
        with model.trace(**named(ids, encoder), use_cache=False):
            kept: dict[Any, torch.Tensor] = {}
            for number, place in enumerate(places):
                visit(model, (place, (("aside", number),)), {}, kept)
            taken = nnsight.save([kept["aside", number] for number in range(len(places))])
    return list(taken)


def visit(model: Any, stop: tuple[Any, ...], known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]) -> None:
    """Keeps and writes what is to be kept and written at one place.

    A place is ``(path, operation, side, key, slots)``, with slots only where they are one dim with the rows.
    """
    (path, operation, side, key, slots), tasks = stop
    envoy = module_at(model, path)
    if side == "skip":
        x = envoy.input
        envoy.skip(x if key is None else (x,))
        return
    if side == "wire":
        args, kwargs = envoy.inputs
        given = dict(tasks)
        args = [given.get(place, value) for place, value in enumerate(args)]
        envoy.inputs = (tuple(args), {**kwargs, **{name: v for name, v in given.items() if isinstance(name, str)}})
        return
    for name in operation.split(".") if operation else ():  # a call inside the module's own forward
        envoy = getattr(envoy.source, name)
    whole = envoy.output if side == "output" else envoy.inputs if key is not None else envoy.input
    if side == "output":
        found = whole if key is None else whole[key]
    else:
        found = whole if key is None else whole[1][key] if isinstance(key, str) else whole[0][key]
    x = found[0] if isinstance(found, (tuple, list)) else found
    if slots:
        x = x.unflatten(0, (-1, slots))
    before = x
    first, last = [t for t in tasks if t[0] not in ("resid_mid", "top")], [t for t in tasks if t[0] == "resid_mid"]
    for task in first:
        x = perform(model, without_keeping(task), x, known, kept)
    for task in first:  # what is kept is what passes by after all edits of the place
        if kept_late(task) and any(task[3]):
            perform(model, (*task[:2], (), *task[3:]), x, known, kept)
    for task in last:  # what attention adds is not what an edit of the sum makes of it
        x = perform(model, task, x, known, kept)
    rows = len(x)
    for task in tasks:
        if task[0] == "top":
            x = perform(model, task, x, known, kept)
    if x is before:
        return
    x = x.flatten(0, 1) if slots else x
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
        if task[0] not in UNWRITTEN and task[2]:
            kept["fired", task[1]] = fired(task[2], rows)


def without_keeping(task: tuple[Any, ...]) -> tuple[Any, ...]:
    """The task of writing alone, where what is kept can be told from what passes by in the end."""
    return (*task[:3], (False, ()), *task[4:]) if kept_late(task) else task


def kept_late(task: tuple[Any, ...]) -> bool:
    """Whether what a task keeps is kept once everything is written; not so of cells of a table, which say which."""
    return task[0] in KEPT_LATE and not isinstance(task[3][0], tuple)


def fired(writes: tuple[Any, ...], rows: int) -> torch.Tensor:
    """What the caller compares with its plan: how many cells were written, and of how many rows the value was."""
    return torch.tensor([sum(len(write[1][0]) for write in writes), rows])


def replaced(values: Any, key: Any, value: torch.Tensor) -> Any:
    """A tuple or mapping with one entry exchanged."""
    if isinstance(key, str):
        return type(values)(**{**values, key: value})
    return (*values[:key], value, *values[key + 1 :])
