"""What runs inside an nnsight trace, the only place where a plan touches a model.

Nothing is decided here. Functions take nested tuples of builtins and tensors and return tensors in builtins, use only
torch and nnsight (and ``writing`` and ``masks``, which use only torch), and have no decorators, so that they mean the
same wherever they are executed.
"""

from __future__ import annotations

import inspect
from typing import Any

import nnsight
import torch

from tracepatch.masks import wired
from tracepatch.norms import directions, module_at
from tracepatch.taps import KINDS, tapped
from tracepatch.writing import edited, on, perform, retain

KEPT_LATE = ("plain", "weights")
PLAIN = ((), (), (False, ()), None, None, None)  # of a forward: no logits are edited, read or kept, nothing is cached
UNWRITTEN = ("aside", "allowed", "from_shadows", "grow", "narrow", "widen", "top", *KINDS)
ABOVE_ALL = ("resid_mid", "top", *KINDS)  # tasks that come after all others at their place


def forward(model: Any, run: tuple[Any, ...], known: dict[Any, Any]) -> tuple[dict[Any, Any], torch.Tensor]:
    """One traced forward.

    Args:
        model: The nnsight model.
        run: What there is to do, nine things:
            what its forward takes, token ids and the like;
            the places to visit, from ``layout.stops``;
            how logits become ``[row, read, …]``: ``("kept",)`` as they are, ``("of", positions)``, ``("each", reads)``
            where a table's tokens stand in one row, ``("none",)`` where nothing reads them, then the vocabulary
            columns to take, if any;
            indexed writes of logits;
            ``(function, indices into reads, given, columns)`` for each metric, instead of indices the key of the
            activation that it reads;
            whether to keep the logits at the reads too, and what rows save of them;
            ``("keep", layers, cells, inputs)`` to keep the worlds' keys and values (where they stand, and what a
            forward of them alone takes), ``("take", lanes, positions)`` to let the tokens of a table see those of so
            many positions before them, for the worlds of each layer's lanes, or none;
            who stands where in a packed table, see ``masks``, or none;
            and how many rows to give back, shadow rows not among them, or none for all.
        known: Values of the worlds, ``(component, layer)`` → ``[world, pos, …]``, and what ``wires`` has found.

    Returns:
        What was kept, and the metrics' values ``[row, column]`` in float32.
    """
    inputs, stops, top, logit_edits, measures, keep_logits, past, standing, rows = run
    device = home(model)
    given = {name: value.to(device) for name, value in inputs.items()}
    given["use_cache"] = past is not None
    if past is not None:
        given["past_key_values"] = cache(past, known)
    values = dict(known)
    if standing is not None:
        values["wired"] = wired(standing, known["wires", standing[1]], device)
    if not sandboxed(model):  # there, looking is done in the trace
        entered(model, stops)
    with torch.no_grad():
        with model.trace(**given):
            result = nnsight.save(inside(model, stops, values, top, logit_edits, measures, keep_logits, past))
    kept, scores = result
    if past is not None and past[0] == "keep" and sandboxed(model):
        # In a sandbox a forward in which a block's input is read fills a copy of the cache.
        with torch.no_grad():
            with model.trace(**past[3], use_cache=True, past_key_values=cache(past, known)):
                filled = nnsight.save(model.output.past_key_values)
        keep_past(filled, None, past[1], kept)
    if rows is not None:
        kept = {key: value if key[0] in ("save", "fired") else value[:rows] for key, value in kept.items()}
        scores = scores[:rows]
    return kept, scores


def entered(model: Any, stops: tuple[Any, ...]) -> None:
    """Makes the calls inside modules' own forwards visible, which cannot be done once such a forward has begun."""
    for (path, operation, *_), _ in stops:
        if operation:
            module_at(model, path).source  # noqa: B018  # looking makes them so


def sandboxed(model: Any) -> bool:
    """Whether this code runs apart from the model's weights."""
    return bool(model._module.get_input_embeddings().weight.is_meta)


def home(model: Any) -> Any:
    """The device where tokens go in, as far as it can be seen from here."""
    return torch.device("cpu") if sandboxed(model) else model._module.get_input_embeddings().weight.device


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


def wires(
    model: Any, known: dict[Any, Any], blocks: tuple[str, ...], wrapped: bool, unembed: str, ids: torch.Tensor
) -> None:
    """What each block takes from outside on a prompt: a mask ``[query, key]`` and tables with an entry a position.

    Every block is skipped, so this costs next to nothing; it is done once for each length.

    Args:
        model: The nnsight model.
        known: Is given, for the length, per block ``(argument, kind, value)``: the argument's place or name, ``mask``
            or ``table``.
        blocks: Their paths.
        wrapped: Whether they give tuples.
        unembed: Path of the unembedding.
        ids: Of the prompt, ``[1, pos]``.
    """
    length = ids.shape[1]
    if ("wires", length) in known:
        return
    with torch.no_grad():
        with model.trace(input_ids=ids.to(home(model)), use_cache=False):
            found = nnsight.save(wires_inside(model, blocks, wrapped, unembed))
    known["wires", length] = found


def wires_inside(model: Any, blocks: tuple[str, ...], wrapped: bool, unembed: str) -> list[Any]:
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


def direct(model: Any, inputs: dict[str, Any], given: tuple[Any, ...]) -> torch.Tensor:
    """A traced forward of some prompts that shows what the stream adds to sums of logits; see ``norms.directions``."""
    taken = {name: value.to(home(model)) for name, value in inputs.items()}
    with torch.no_grad():
        with model.trace(**taken, use_cache=False):
            found = nnsight.save(directions(model, sandboxed(model), *given))
    return found  # type: ignore[no-any-return]  # nnsight has no types


def named(ids: torch.Tensor, encoder: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Token ids as the arguments of a forward."""
    return {"input_ids": ids} if encoder is None else {"input_ids": encoder, "decoder_input_ids": ids}


def raw(
    model: Any,
    known: dict[Any, Any],
    inputs: dict[str, Any],
    function: Any,
    reads: torch.Tensor,
    measures: tuple[Any, ...],
) -> torch.Tensor:
    """A traced forward in which a function, or nothing, acts: the metrics' values ``[row, column]``."""
    given = {name: value.to(home(model)) for name, value in inputs.items()}
    with torch.no_grad():
        with model.trace(**given, use_cache=False):
            if function is not None:
                function(model)
            logits = model.output.logits
            scores = nnsight.save(scored(logits[:, reads.to(logits.device)], measures, {}, known))
    return scores  # type: ignore[no-any-return]  # nnsight has no types


def scored(logits: Any, measures: tuple[Any, ...], kept: dict[Any, Any], known: dict[Any, Any]) -> torch.Tensor:
    """The metrics' values ``[row, column]`` of logits ``[row, read, vocab]``, and of activations that were kept."""
    scores: list[torch.Tensor] = []
    for function, at, given, columns in measures:
        read = kept[at] if isinstance(at, tuple) else logits[:, at.to(logits.device)].float()
        read = read if columns is None else read[..., columns.to(read.device)]
        # Shadow rows, which stand at the end, have logits, but nothing else that metrics read.
        needed = {name: needs(value, known)[: len(read)].to(read.device) for name, value in given.items()}
        found = function(read, needed)
        scores.append((found if found.ndim == 2 else found[:, None]).to(scores[0].device if scores else read.device))
    if not scores:
        return torch.zeros(0 if logits is None else len(logits), 0)
    rows = min(len(found) for found in scores)
    return torch.cat([found[:rows] for found in scores], 1).float().cpu()


def needs(value: Any, known: dict[Any, Any]) -> torch.Tensor:
    """What a metric is given: a tensor, worlds' log-probabilities ``("reference", worlds, at)``, or rows of a table."""
    if isinstance(value, torch.Tensor):
        return value
    if value[0] == "known":
        table: torch.Tensor = known[value[1]]
        return table[value[2].to(table.device)]
    reference: torch.Tensor = known["reference", 0]
    worlds, at = on(reference.device, value[1:])
    return reference[worlds][:, at]


def inside(
    model: Any,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    top: tuple[Any, ...],
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    past: tuple[Any, ...] | None,
) -> tuple[dict[Any, Any], torch.Tensor]:
    """The body of the trace."""
    kept: dict[Any, Any] = {}
    apart = sandboxed(model)
    logits = climbed(model, stops, known, top, logit_edits, keep_logits, kept)
    if past is not None and past[0] == "keep" and not apart:
        keep_past(model.output.past_key_values, past[2], past[1], kept)
    scores = scored(logits, measures, kept, known)
    if apart:
        model.output = torch.zeros(1)  # or logits and cache of every row would be sent to the sandbox
    # Without what this forward alone needed.
    return {key: value for key, value in kept.items() if key[0] not in ("aside", "metric")}, scores


def climbed(
    model: Any,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    top: tuple[Any, ...],
    logit_edits: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    kept: dict[Any, Any],
) -> Any:
    """A forward with all its stops, up to the logits ``[row, read, vocab]``; ``None`` where nothing reads them."""
    for stop in stops:
        visit(model, stop, known, kept)
    how, *which, columns = top
    if columns is not None:
        only_columns(module_at(model, columns[0]), columns[1], sandboxed(model))
    logits: Any = None if how == "none" else model.output.logits
    if how == "of":
        logits = logits[:, which[0].to(logits.device)]
    elif how == "each":
        logits = logits.reshape(-1, which[0], logits.shape[-1])
    if logits is not None:
        logits = edited(logits, logit_edits, known)
        if logit_edits:
            kept["fired", ("logits", 0)] = fired(logit_edits, len(logits))
        retain(("logits", 0), keep_logits, logits, known, kept)
    return logits


def only_columns(head: Any, columns: torch.Tensor, apart: bool) -> None:
    """Computes only some columns of the unembedding; where its weights are not at hand, leaves out the rest."""
    if apart or head._module.weight.is_meta:
        head.skip(head(head.input)[..., columns])
        return
    weight, bias = head._module.weight, head._module.bias
    columns = columns.to(weight.device)
    head.skip(torch.nn.functional.linear(head.input, weight[columns], None if bias is None else bias[columns]))


def keep_past(found: Any, cells: Any, layers: int, kept: dict[Any, Any]) -> None:
    """Keeps keys and values of the worlds, ``[world, head, pos, d_head]`` in each layer."""
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


def visit(model: Any, stop: tuple[Any, ...], known: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Keeps and writes what is to be kept and written at one place.

    A place is ``(path, operation, side, key, slots)``, with slots only where they are one dim with the rows.
    """
    (path, operation, side, key, slots), tasks = stop
    if side == "known":  # of the worlds, by whichever layer
        retain(path, (False, tasks), None, known, kept)
        return
    envoy = module_at(model, path)
    if side == "skip":
        x = envoy.input
        envoy.skip(x if key is None else (x,))
        return
    if side == "wire":
        args, kwargs = envoy.inputs
        given = known["wired"][tasks[0][1]]
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
    first, last = [t for t in tasks if t[0] not in ABOVE_ALL], [t for t in tasks if t[0] == "resid_mid"]
    for task in first:
        x = perform(model, without_keeping(task), x, known, kept)
    for task in first:  # what is kept is what passes by after all edits of the place
        if kept_late(task) and any(task[3]):
            perform(model, (*task[:2], (), (task[3][0] is True, task[3][1]), *task[4:]), x, known, kept)
    for task in last:  # what attention adds is not what an edit of the sum makes of it
        x = perform(model, task, x, known, kept)
    rows = len(x)
    for task in tasks:
        if task[0] == "top":
            x = perform(model, task, x, known, kept)
        elif task[0] in KINDS:
            x = tapped(model, task, x, known, kept)
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
    """The task of writing alone, where what is kept can be told from what passes by in the end.

    Worlds that a table computes are met before its rows write.
    """
    if not kept_late(task):
        return task
    return (*task[:3], (task[3][0] if isinstance(task[3][0], tuple) else False, ()), *task[4:])


def kept_late(task: tuple[Any, ...]) -> bool:
    """Whether what a task keeps is kept once everything is written."""
    return task[0] in KEPT_LATE


def fired(writes: tuple[Any, ...], rows: int) -> tuple[int, int]:
    """What the caller compares with its plan: how many cells were written, and of how many rows the value was."""
    return sum(len(write[1][0]) for write in writes), rows


def replaced(values: Any, key: Any, value: torch.Tensor) -> Any:
    """A tuple or mapping with one entry exchanged."""
    if isinstance(key, str):
        return type(values)(**{**values, key: value})
    return (*values[:key], value, *values[key + 1 :])
