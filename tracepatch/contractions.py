"""Numbers from saved values and gradients, by contraction: what estimates come to, computed where the model runs.

As in ``trace``, nothing is decided, and there are no decorators, classes or imports of our own but of what ships with
it. Each function takes what is known, see ``backward.backward``, and returns float32 tensors on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.attention_weights import LOWEST, flow, key_fix, peaks, query_fix, weight_change
from tracepatch.differences import apart, difference, drop, facing, home, of_worlds, settle, summed, take
from tracepatch.heads import by_heads
from tracepatch.norms import wide
from tracepatch.writing import edited


def contracted(known: dict[Any, Any], items: tuple[Any, ...]) -> list[Any]:
    """The results of some contractions ``(kind, …)``, in order; each kind is a function below."""
    kinds: dict[str, Any] = {
        "product": product,
        "sizes": sizes,
        "peaks": peaks,
        "query_fix": query_fix,
        "key_fix": key_fix,
        "weights": weight_change,
        "flow": flow,
        "rows": rows,
        "row_sizes": row_sizes,
        "edges": edges,
        "kept": kept,
        "settle": settle,
        "take": take,
        "drop": drop,
    }
    return [kinds[kind](known, *given) for kind, *given in items]


def product(
    known: dict[Any, Any], value: Any, slope: Any, source: tuple[Any, ...], vector: bool, dims: tuple[int, ...]
) -> torch.Tensor:
    """Gradient times difference, summed over the last dim where that is a ``vector``, then over ``dims``."""
    by, change = wide(known[slope]), difference(known, value, source)
    if change.ndim < by.ndim:  # what single heads read is one stream
        change = change.unsqueeze(2)
    if by.ndim < change.ndim:  # what several heads write has one gradient
        by = by.unsqueeze(2)
    found = by * change
    return home(summed(found.sum(-1) if vector else found, dims))


def sizes(
    known: dict[Any, Any],
    value: Any,
    stream: Any,
    floor: float,
    source: tuple[Any, ...],
    vector: bool,
    dims: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms of a difference, as ``product`` sums them, and of what stands where something changes.

    Args:
        known: With all of these.
        value: Of the component.
        stream: The stream that it is part of; ``None`` for itself, whose last dim is summed.
        floor: Squared differences below so much of what stands there are rounding.
        source: Of the difference; see ``difference``.
        vector: Whether the last dim of the difference is summed.
        dims: To sum over, of the difference alone.
    """
    change = difference(known, value, source).square()
    there = standing(wide(known[value] if stream is None else known[stream]), change.sum(-1), floor)
    return home(summed(change.sum(-1) if vector else change, dims)), home(there)


def standing(there: torch.Tensor, moved: torch.Tensor, floor: float) -> torch.Tensor:
    """Squared norms over the last dim, 0 where no more than rounding is added to it."""
    size = there.masked_fill(there < LOWEST, 0.0).square().sum(-1)
    moved = moved.amax(2) if size.ndim < moved.ndim else moved  # heads of one stream
    return torch.where(moved > floor * size, size, 0.0)


def rows(
    known: dict[Any, Any],
    value: Any,
    slope: Any,
    pairs: torch.Tensor,
    slots: torch.Tensor,
    writes: tuple[Any, ...],
    weights: bool,
    most: int,
) -> torch.Tensor:
    """Of recorded rows: what their edits of one component at one layer change, times the gradient, ``[row]``.

    Args:
        known: With the values and gradients, and the worlds' values that are written.
        value: Of the component.
        slope: By it.
        pairs: Where each row's pair stands in the values.
        slots: Where each row stands in the gradients.
        writes: Of each part of so many rows, as ``writing.edited`` takes them.
        weights: Whether it is scores or patterns: masked ones stay, and edited ones may be renormalized.
        most: Rows of a part.
    """
    by = wide(known[slope])
    heads = by.shape[2] if known[value].ndim < by.ndim else 0
    found = []
    for chosen, _, change in changes(known, value, pairs, writes, weights, most, heads):
        found.append((change * by[slots[chosen].to(by.device)]).flatten(1).sum(1))
    return home(torch.cat(found))


def row_sizes(known: dict[Any, Any], value: Any, stream: Any, floor: float, edits: tuple[Any, ...]) -> torch.Tensor:
    """The same as ``sizes`` of recorded rows, over all that they edit of a component: ``[row, 2]``."""
    found = []
    for chosen, before, change in changes(known, value, *edits):
        there = before
        if stream is not None:
            there = wide(known[stream])
            there = there[edits[0][chosen].to(there.device)]
        change = change.square()
        moved = standing(there, change.sum(-1), floor)
        found.append(torch.stack([change.flatten(1).sum(1), moved.flatten(1).sum(1)], 1))
    return home(torch.cat(found))


def changes(
    known: dict[Any, Any],
    value: Any,
    pairs: torch.Tensor,
    writes: tuple[Any, ...],
    weights: bool,
    most: int,
    heads: int,
) -> Any:
    """Part by part of recorded rows: which they are, what stands there, and what their edits add; see ``rows``."""
    base = known[value]
    for number, part in enumerate(writes):
        chosen = slice(number * most, (number + 1) * most)
        live = base[pairs[chosen].to(base.device)]
        if heads:  # what single heads read is one stream
            live = live.unsqueeze(2).expand(-1, -1, heads, -1).contiguous()
        before = live.transpose(1, 2) if weights else live
        after = before
        for write in part:
            now = edited(after, (write,), known)
            if weights:
                seen = torch.ones_like(now[0, :, 0], dtype=torch.bool).tril()[:, None]  # [dest, 1, src]
                now = torch.where(seen, now, after)
                if write[-1]:
                    changed = (now != after).any(-1, keepdim=True)
                    now = torch.where(changed, now * (after.sum(-1, keepdim=True) / now.sum(-1, keepdim=True)), now)
            after = now
        change = wide(after) - wide(before)
        yield chosen, wide(live), change.transpose(1, 2) if weights else change


def written(
    model: Any,
    known: dict[Any, Any],
    writers: tuple[tuple[Any, Any], ...],
    here: list[torch.Tensor],
    worlds: torch.Tensor,
    agreeing: Any,
) -> torch.Tensor:
    """What each writer adds to the stream in other worlds beyond what it adds here, ``[row, writer, pos, d_model]``.

    Args:
        model: The nnsight model.
        known: With the values of the other worlds.
        writers: ``(name, heads)`` of each: what is known of it, and, where that is z, how its heads write (see
            ``heads.by_heads``), or ``None``.
        here: What that is here.
        worlds: The other world of each row.
        agreeing: See ``difference``.
    """
    found: list[torch.Tensor] = []
    for (name, heads), value in zip(writers, here):  # noqa: B905  # of equal length
        mine = wide(value.detach())
        other = wide(facing(of_worlds(known, name, worlds), agreeing)).to(mine.device)
        if heads is None:
            change = (other - mine).unsqueeze(1)
        elif heads[2]:  # each run's own scale
            change = by_heads(model, heads, other) - by_heads(model, heads, mine)
        else:
            change = by_heads(model, heads, other - mine)
        found.append(apart(change, agreeing, 2).to(found[0].device if found else mine.device))
    return torch.cat(found, 1)


def products(changes: torch.Tensor, slopes: torch.Tensor, by_position: bool) -> torch.Tensor:
    """Every writer's change times every reader's gradient, as one product of matrices a row, or a position.

    Args:
        changes: ``[row, writer, pos, d_model]``; with ``by_position`` ``[row, pos, writer, d_model]``.
        slopes: ``[row, reader, pos, d_model]``.
        by_position: Whether positions are kept.

    Returns:
        ``[row, writer, reader]``, or with positions ``[row, pos, writer, reader]``.
    """
    if by_position:
        return torch.matmul(changes, slopes.permute(0, 2, 3, 1))
    return torch.bmm(changes.flatten(2), slopes.flatten(2).mT)


def edges(known: dict[Any, Any], writers: tuple[Any, ...], readers: tuple[Any, ...], by_position: bool) -> torch.Tensor:
    """Every writer's difference times every reader's gradient, both of which are known; see ``products``.

    Args:
        known: With all of these.
        writers: ``(value, source)`` of each, see ``difference``; heads give several.
        readers: The names of gradients ``[row, pos, (head), d_model]``.
        by_position: Whether positions are kept.
    """
    given = [difference(known, value, source) for value, source in writers]
    taken = [wide(known[name]) for name in readers]
    left = torch.cat([x if x.ndim == 4 else x.unsqueeze(2) for x in given], 2)
    right = torch.cat([(x if x.ndim == 4 else x.unsqueeze(2)).to(left.device) for x in taken], 2)
    return home(products(left if by_position else left.movedim(2, 1), right.movedim(2, 1), by_position))


def kept(known: dict[Any, Any], name: Any, worlds: Any = None) -> torch.Tensor:
    """Something known as it is."""
    value: torch.Tensor = known[name] if worlds is None else of_worlds(known, name, worlds)
    return value.detach().cpu().clone()
