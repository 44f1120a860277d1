"""Numbers from saved values and gradients, by contraction: what estimates come to, computed where the model runs.

As in ``trace``, nothing is decided, and there are no decorators, classes or imports of our own but of what ships with
it. Each function takes what is known, see ``backward.backward``, and returns float32 tensors on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.heads import by_heads
from tracepatch.norms import wide
from tracepatch.writing import edited

WEIGHTS = ("scores", "pattern")
SPLIT = ("q_in", "k_in", "v_in")  # which are one stream
LOWEST = -1e30  # scores below that are masked


def contracted(known: dict[Any, Any], items: tuple[Any, ...]) -> list[Any]:
    """The results of some contractions ``(kind, …)``, in order; each kind is a function below."""
    kinds: dict[str, Any] = {
        "product": product,
        "sizes": sizes,
        "query_fix": query_fix,
        "key_fix": key_fix,
        "weights": weight_change,
        "flow": flow,
        "rows": rows,
        "edges": edges,
        "kept": kept,
        "settle": settle,
        "take": take,
        "drop": drop,
    }
    return [kinds[kind](known, *given) for kind, *given in items]


def home(x: torch.Tensor) -> torch.Tensor:
    """A result as it travels."""
    return x.detach().float().cpu() if x.dtype != torch.float64 else x.detach().cpu()


def difference(known: dict[Any, Any], value: Any, source: tuple[Any, ...]) -> torch.Tensor:
    """What a patch adds to the value of a component, ``[row, pos, …]``.

    Args:
        known: With the worlds' values.
        value: The name of the value; ``None`` for nothing.
        source: ``("world", name, worlds, agreeing)``: the values of those worlds, which agree with the rows' before
            positions ``[row]``; ``("value", name, agreeing)``: another value with the same rows; or ``("number", x)``,
            a number or tensor.
    """
    here = wide(known[value])
    kind, *given = source
    along = 2 if value[-2] in WEIGHTS else 1
    if kind == "number":
        return (given[0].to(here) if isinstance(given[0], torch.Tensor) else given[0]) - here
    if kind == "value":
        return apart(wide(known[given[0]]).to(here.device) - here, given[1], along)
    other = wide(of_worlds(known, given[0], given[1])).to(here.device)
    return apart(other - here, given[2], along)


def of_worlds(known: dict[Any, Any], name: Any, worlds: torch.Tensor) -> torch.Tensor:
    """Some worlds' value of a component as gradients have it: heads come first in scores and patterns."""
    whole: torch.Tensor = known[name]
    found = whole[worlds.to(whole.device)]
    return found.transpose(1, 2) if name[0] in WEIGHTS else found


def settle(known: dict[Any, Any], world: str, worlds: torch.Tensor, keys: tuple[Any, ...]) -> None:
    """Makes values that were kept of a world's run those that differences are taken from."""
    for key in keys:
        known["value", world, key[0], key[1]] = of_worlds(
            known, ("attn_in", key[1]) if key[0] in SPLIT else key, worlds
        )


def take(known: dict[Any, Any], into: Any, name: Any, worlds: torch.Tensor) -> None:
    """Makes some worlds' value known by a name of its own."""
    known[into] = of_worlds(known, name, worlds)


def apart(found: torch.Tensor, agreeing: Any, along: int) -> torch.Tensor:
    """A difference of two worlds, exactly 0 before the positions ``[row]``, along a dim, at which they part."""
    if agreeing is None:
        return found
    same = torch.arange(found.shape[along])[None] < agreeing[:, None]
    shape = [len(same), *[1] * (found.ndim - 1)]
    shape[along] = same.shape[1]
    return found.masked_fill(same.to(found.device).reshape(shape), 0.0)


def summed(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """A sum over some dims, or the tensor where there are none."""
    return x.sum(dims) if dims else x


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
    known: dict[Any, Any], value: Any, stream: Any, source: tuple[Any, ...], vector: bool, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms of the difference, as ``product`` sums them, and of the stream at each position ``[row, pos]``."""
    found = difference(known, value, source).square()
    there = torch.zeros(0) if stream is None else home(wide(known[stream]).square().sum(-1))
    return home(summed(found.sum(-1) if vector else found, dims)), there


def query_fix(
    known: dict[Any, Any], pattern: Any, fixed: Any, worlds: Any, slope: Any, dims: tuple[int, ...]
) -> torch.Tensor:
    """AtP* for queries: the exact change of the pattern where a query is another's, times the gradient by it.

    Kramár et al. 2024 (arXiv:2403.00745), equations 6 and 7: ``[row, pos, head]``, summed over ``dims``.

    Args:
        known: With all of these.
        pattern: Of the rows, ``[row, head, dest, src]``.
        fixed: With the other world's queries and the rows' own keys.
        worlds: Where these rows stand in it.
        slope: By the pattern.
        dims: To sum over.
    """
    change = wide(of_worlds(known, fixed, worlds)) - wide(known[pattern])
    return home(summed((change * wide(known[slope])).sum(-1).transpose(1, 2), dims))


def key_fix(
    known: dict[Any, Any],
    pattern: Any,
    scores: Any,
    fixed: Any,
    worlds: Any,
    slope: Any,
    groups: int,
    together: Any,
    dims: tuple[int, ...],
) -> torch.Tensor:
    """AtP* for keys: the exact change of the pattern where keys are another's, times the gradient by it.

    Kramár et al. 2024 (arXiv:2403.00745), equations 8 to 10: ``[row, pos, kv_head]`` for each key alone,
    ``[row, kv_head]`` for several together, summed over ``dims``.

    Args:
        known: With all of these.
        pattern: Of the rows, ``[row, head, dest, src]``.
        scores: Of the rows.
        fixed: The scores with the other world's keys and the rows' own queries.
        worlds: Where these rows stand in it.
        slope: By the pattern.
        groups: Query heads of a key.
        together: The positions whose keys are patched together; ``None`` for each alone.
        dims: To sum over, of what is returned.
    """
    p, g, s = wide(known[pattern]), wide(known[slope]), wide(known[scores])
    new = wide(of_worlds(known, fixed, worlds)).to(s.device)
    masked = s < LOWEST
    s, new = s.masked_fill(masked, -torch.inf), new.masked_fill(masked, -torch.inf)
    # What a softmax gives to nobody, where attention has a sink.
    given = p.sum(-1, keepdim=True)
    sink = torch.where(given < 1 - 1e-4, s.logsumexp(-1, keepdim=True) + ((1 - given) / given).log(), -torch.inf)
    if together is not None:
        mixed = s.clone()
        mixed[..., together.to(s.device)] = new[..., together.to(s.device)]
        after = torch.cat([mixed, sink], -1).softmax(-1)[..., :-1]
        by_head = ((after - p) * g).sum((2, 3))
        by_key = by_head.unflatten(1, (-1, groups)).sum(2)  # type: ignore[no-untyped-call]  # torch's
        return home(summed(by_key, dims))
    # The other keys' weights among themselves: of all but the largest score that is what is left beside it; the
    # largest is masked, as nothing may be left beside it in floating point.
    rest = torch.where(p == 1, torch.ones_like(p), 1 - p)
    others, beside = ((p * g).sum(-1, keepdim=True) - p * g) / rest, torch.log1p(-p.clamp(max=1 - 1e-7))
    beside = beside + torch.cat([s, sink], -1).logsumexp(-1, keepdim=True)
    top = s.argmax(-1, keepdim=True)
    less = torch.cat([s.scatter(-1, top, -torch.inf), sink], -1)
    alone = less.logsumexp(-1, keepdim=True)
    shared = torch.where(alone.isinf(), torch.zeros_like(less), less.softmax(-1))[..., :-1]
    others = others.scatter(-1, top, (shared * g).sum(-1, keepdim=True))
    beside = beside.scatter(-1, top, alone)
    after = torch.sigmoid(new - beside).masked_fill(masked, 0.0)
    found = after * g + (1 - after) * others - (p * g).sum(-1, keepdim=True)
    by_key = found.masked_fill(masked, 0.0).sum(2).unflatten(1, (-1, groups)).sum(2)  # type: ignore[no-untyped-call]  # torch's
    return home(summed(by_key.transpose(1, 2), dims))


def weight_change(
    known: dict[Any, Any],
    pattern: Any,
    source: tuple[Any, ...],
    slope: Any,
    bias: Any,
    renormalize: bool,
    dims: tuple[int, ...],
) -> torch.Tensor:
    """Each attention weight alone set to another, times the gradient: ``[row, head, dest, src]``, summed over ``dims``.

    Args:
        known: With all of these.
        pattern: Of the rows.
        source: Of the other weights; see ``difference``.
        slope: By the pattern.
        bias: ``(z's gradient, values for an input of 0, groups)``: what the bias of values adds to the gradient is
            taken away; ``None`` to leave it.
        renormalize: Whether the destination's weights are scaled to the sum that they had.
        dims: To sum over.
    """
    p, g = wide(known[pattern]), wide(known[slope])
    if bias is not None:
        by_z, still, groups = wide(known[bias[0]]), wide(known[bias[1]])[:1], bias[2]
        constant = still[:, :1].repeat_interleave(groups, 2)  # [1, 1, head, d_head]
        g = g - (by_z * constant).sum(-1).transpose(1, 2).unsqueeze(-1)
    change = difference(known, pattern, source)
    change = change.masked_fill(torch.ones_like(change[0, 0], dtype=torch.bool).triu(1), 0.0)
    if not renormalize:
        return home(summed(change * g, dims))
    whole = p.sum(-1, keepdim=True)
    ratio = whole / (whole + change)
    others = (p * g).sum(-1, keepdim=True) - p * g
    return home(summed(others * (ratio - 1) + ((p + change) * ratio - p) * g, dims))


def flow(
    known: dict[Any, Any],
    pattern: Any,
    value: Any,
    source: tuple[Any, ...],
    slope: Any,
    groups: int,
    dims: tuple[int, ...],
) -> torch.Tensor:
    """What a change of values at src does through each destination alone: ``[row, head, dest, src]``.

    Args:
        known: With all of these.
        pattern: Of the rows.
        value: Their values, ``[row, pos, kv_head, d_head]``.
        source: Of the other values; see ``difference``.
        slope: By z.
        groups: Query heads of a value.
        dims: To sum over.
    """
    change = difference(known, value, source).repeat_interleave(groups, 2)
    moved = torch.einsum("bdhc,bshc->bhds", wide(known[slope]), change)
    return home(summed(wide(known[pattern]) * moved, dims))


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
    base, by = known[value], wide(known[slope])
    found = []
    for number, part in enumerate(writes):
        chosen = slice(number * most, (number + 1) * most)
        live = base[pairs[chosen].to(base.device)]
        if live.ndim < by.ndim:  # what single heads read is one stream
            live = live.unsqueeze(2).expand(-1, -1, by.shape[2], -1).contiguous()
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
        change = change.transpose(1, 2) if weights else change
        found.append((change * by[slots[chosen].to(by.device)]).flatten(1).sum(1))
    return home(torch.cat(found))


def drop(known: dict[Any, Any], world: Any) -> None:
    """Forgets the values and gradients of a world."""
    for key in [key for key in known if len(key) > 2 and key[1] == world]:
        del known[key]


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
        other = wide(of_worlds(known, name, worlds)).to(mine.device)
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
