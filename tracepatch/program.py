"""What a run does to a model, one operation after the other: here one by one, on a server all of them in one request.

As in ``trace``, nothing is decided, and there are no decorators, classes or imports of our own but of what ships with
it. What is known of the worlds stays where the model runs; only what was asked for is returned.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from tracepatch.backward import backward
from tracepatch.contractions import contracted
from tracepatch.tallies import add, finish
from tracepatch.trace import direct, forward, raw, sandboxed, scored, wires

LASTING = ("wires", "tally", "tallied")  # the same for all groups of pairs


def operate(model: Any, op: tuple[Any, ...], known: dict[Any, Any]) -> Any:
    """One operation of a program, and what it adds to what is known of the worlds.

    Args:
        model: The nnsight model.
        op: ``("run", run, into)``, a traced forward, whose kept values become what is known (``"worlds"``), a piece of
            it (``"piece"``), or nothing; ``("join", …)``, which puts pieces together; ``("wires", …)``, which looks
            what blocks take from outside; ``("raw", …)``, a forward in which a function acts; ``("backward", run,
            asked)``, a forward whose metrics are differentiated; ``("contract", items)``, numbers from what is known;
            ``("add", …)``, a forward of prompts of a reference, and ``("finish", …)`` once all of them have run;
            ``("direct", …)``, a forward of a pair's own prompts that shows what the stream adds to logits; or
            ``("forget",)``, after which only what lasts is known.
        known: Values of the worlds, ``(component, layer)`` → ``[world, pos, …]``; changed in place.

    Returns:
        Of a run, the metrics' values ``[row, column]`` in float32, and what else was asked for, by name; of a join the
        values of metrics that need all pieces; of a raw trace, the metrics' values.
    """
    kind, *given = op
    if kind == "run":
        run, into = given
        kept, scores = forward(model, run, known)
        told = {key: value for key, value in kept.items() if key[0] in ("save", "fired")}
        values = {key: value for key, value in kept.items() if key not in told}
        if into == "piece":
            known.setdefault("pieces", []).append(values)
        elif into == "worlds":
            known.update(values)
        return scores, told
    if kind == "join":
        return joined(known, *given)
    if kind == "backward":
        return backward(model, given[0], known, given[1])
    if kind == "contract":
        return contracted(known, given[0])
    if kind == "forget":
        for key in [key for key in known if key[0] not in LASTING]:
            del known[key]
        return None
    if kind in ("add", "finish"):
        return referred(model, op, known)
    if kind == "direct":
        key, *given, rows, count = given
        if ("tallied", *key, rows[0].item()) not in known:
            found = direct(model, *given)
            table = known.get(key, found.new_zeros(count, found.shape[1]))
            table[rows.to(table.device)] = found
            known.update({key: table, ("tallied", *key, rows[0].item()): rows})
        return None
    if kind == "wires":
        return wires(model, known, *given)
    return raw(model, known, *given)


def referred(model: Any, op: tuple[Any, ...], known: dict[Any, Any]) -> None:
    """A forward of prompts of a reference, or the end of them; nothing where they have run before."""
    kind, name, *given = op
    if ("tallied", name) in known:
        return
    if kind == "add":
        run, rows, moves = given
        kept, _ = forward(model, run, known)
        add(known, kept, rows, moves)
    else:
        finish(known, name, *given)


def program(model: Any, tree: Any, numbers: tuple[torch.Tensor, ...], first: int, seconds: float) -> dict[str, Any]:
    """The body of a session: operations one after the other, until they are done or have taken so long.

    Args:
        model: The nnsight model.
        tree: The operations, as ``unpacked`` takes them.
        numbers: Their tensors of each kind, one after the other.
        first: How many operations are done whatever time they take.
        seconds: After which no further one is begun; the rest is for another request.

    Returns:
        What each operation returned that was reached; the type and text of the ``error`` of the one after that, if it
        failed; and where the model ran.
    """
    began, away = time.monotonic(), sandboxed(model)
    told = ran(model)
    known: dict[Any, Any] = {}
    found: list[Any] = []
    failed = None
    ops = unpacked(tree, numbers)
    if away and cannot(ops):
        return {"found": [], "error": ("Sandbox", cannot(ops)), "ran": told}
    for op in ops:
        if len(found) >= first and time.monotonic() - began > seconds:
            break
        if away:  # an error that is caught here would leave the sandbox's host out of step
            found.append(operate(model, op, known))
            continue
        try:
            found.append(operate(model, op, known))
        except Exception as error:  # what came before still comes back
            failed = type(error).__name__, str(error)[:2000]
            break
    return {"found": found, "error": failed, "ran": told}


def cannot(ops: tuple[Any, ...]) -> str:
    """What a sandbox does not do; empty if it does all of it."""
    if any(op[0] == "backward" for op in ops):
        return "gradients fail there. Patch exactly instead (tp.patch), which costs a row a site"
    pasts = [op[1][6] for op in ops if op[0] == "run"]
    if any(past is not None and past[0] == "keep" and past[3] is None for past in pasts):
        return "keys and values of an edited world cannot be kept there: pass form='flat'"
    return ""


def ran(model: Any) -> dict[str, str]:
    """Where a model runs, and in what."""
    weight = model._module.get_input_embeddings().weight
    return {
        "sandbox": str(sandboxed(model)),
        "dtype": str(weight.dtype),
        "device": str(weight.device),
        "attention": str(model._module.config._attn_implementation),
        "torch": str(torch.__version__),
    }


def unpacked(tree: Any, numbers: tuple[torch.Tensor, ...]) -> Any:
    """A tree of tuples and dicts in which ``("@", kind, start, shape)`` stands for tensors, with these in place."""
    if isinstance(tree, dict):
        return {key: unpacked(value, numbers) for key, value in tree.items()}
    if not isinstance(tree, tuple):
        return tree
    if len(tree) == 4 and isinstance(tree[0], str) and tree[0] == "@":
        _, kind, start, shape = tree
        found = numbers[kind][start : start + math.prod(shape)].reshape(shape)
        return found if found.is_floating_point() or found.dtype == torch.bool else found.long()
    return tuple(unpacked(part, numbers) for part in tree)


def joined(
    known: dict[Any, Any], order: Any, reads: torch.Tensor, length: int, blocks: tuple[Any, ...]
) -> torch.Tensor:
    """Adds the pieces of some worlds to what is known, and scores the metrics that compare with known logits.

    Args:
        known: With the ``pieces``, in the order in which they ran.
        order: Where each run stands in them, if not in their order.
        reads: The positions whose logits were kept, the same for all or ``[world, read]``, which may be ``length``.
        length: Positions of a prompt, for logits that rows will write; 0 if none will.
        blocks: ``(rows, measures)``: of which worlds, ``None`` for all, which metrics, as ``forward`` takes them.
    """
    pieces = known.pop("pieces")
    gained = {key: stacked([piece[key] for piece in pieces]) for key in pieces[0]}
    if order is not None:
        gained = {key: value[order.to(value.device)] for key, value in gained.items()}
    logits = gained.get(("logits", 0))
    if logits is not None:
        gained["reference", 0] = logits.float().log_softmax(-1)
        if length:
            spread = logits.new_zeros(len(logits), length + 1, logits.shape[-1])
            rows = torch.arange(len(logits), device=logits.device)[:, None]
            spread[rows, reads.to(logits.device).expand(len(logits), -1)] = logits
            gained["logits", 0] = spread[:, :length]
    for key, value in gained.items():
        known[key] = stacked([known[key], value]) if key in known else value
    if logits is None:
        return torch.zeros(0)
    found = [(rows, scored(logits if rows is None else logits[rows], measures, {}, known)) for rows, measures in blocks]
    if found[0][0] is None:
        return found[0][1]
    scores = torch.zeros(len(logits), found[0][1].shape[1])
    for rows, values in found:
        scores[rows] = values
    return scores


def stacked(values: list[torch.Tensor]) -> torch.Tensor:
    """Values of several runs as one; of prompts of several lengths with zeros behind the shorter ones."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values))]  # noqa: B905  # of equal length
    if all(list(value.shape[1:]) == shape for value in values):
        return torch.cat(values)
    found = values[0].new_zeros(sum(map(len, values)), *shape)
    start = 0
    for value in values:
        inside = tuple(slice(0, size) for size in value.shape[1:])
        found[(slice(start, start + len(value)), *inside)] = value
        start += len(value)
    return found
