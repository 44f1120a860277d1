"""Contractions over attention weights: queries and keys patched behind a softmax, single weights, what values carry.

As in ``trace``, nothing is decided, and only torch is used: no decorators, classes or imports of our own but of what
ships with it.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.differences import difference, home, of_worlds, summed
from tracepatch.norms import wide

LOWEST = -1e30  # scores below that are masked


def peaks(known: dict[Any, Any], pattern: Any) -> torch.Tensor:
    """The largest attention weight of each destination, ``[row, head, dest]``."""
    return home(wide(known[pattern]).amax(-1))


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
