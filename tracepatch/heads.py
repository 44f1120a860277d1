"""What single heads write to the stream, and gradients by what they read of it, for all heads of a layer at once.

As in ``trace``, nothing is decided, and there are no decorators, classes or imports of our own but of what ships with
it.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.norms import module_at, post_weight, wide
from tracepatch.writing import head_write


def by_heads(model: Any, heads: tuple[Any, ...], z: torch.Tensor) -> torch.Tensor:
    """What each head writes, without the projection's bias: ``[row, head, pos, d_model]``, at least in float32.

    Args:
        model: The nnsight model.
        heads: Path of the output projection; whether its weight is ``[in, out]``, or ``None`` where it is no plain
            linear map; path of the norm behind it, which is applied with its scale frozen at what it is here, if there
            is one; and the multiplier in front of the stream.
        z: ``[row, pos, head, d_head]``.
    """
    path, turned, post_norm, scale = heads
    project = module_at(model, path)._module
    dtype = next(iter(project.parameters()), z).dtype
    rows, pos, count, width = z.shape
    if turned is None or project.weight.is_meta:  # what is elsewhere is brought when the module is called
        alone = [head_write(project, z.to(dtype), torch.tensor(head), None) for head in range(count)]
        found = wide(torch.stack(alone, 1))
    else:
        weight = wide(project.weight.detach())
        weight = (weight if turned else weight.T).reshape(count, width, -1)
        found = torch.bmm(z.movedim(2, 0).reshape(count, -1, width), weight).reshape(count, rows, pos, -1)
        found = found.transpose(0, 1)
    if post_norm:
        found = found * wide(post_weight(model, post_norm, project(z.flatten(-2).to(dtype)))).unsqueeze(1)
    return found if scale == 1 else found * scale


def back_to_stream(
    model: Any,
    x: torch.Tensor,
    slope: torch.Tensor,
    projections: tuple[tuple[Any, str, bool], ...],
    taps: dict[Any, torch.Tensor],
    read: torch.Tensor,
) -> torch.Tensor:
    """The gradient by what attention reads, behind its norm, through each head alone, ``[head, row, pos, d_model]``.

    Args:
        model: The nnsight model.
        x: Queries, keys or values ``[row, head, pos, d_head]``.
        slope: The gradient by them.
        projections: The linear maps that take what is read, ``(tap of what they give, path, weight stored as [in,
            out])``. Where each of their columns goes to one head, all heads take a handful of backwards.
        taps: The tapped tensors.
        read: What attention reads.
    """
    given = [taps[tap] for tap, _, _ in projections]
    weights = [module_at(model, path)._module.weight.detach() for _, path, _ in projections]
    if any(weight.is_meta for weight in weights):  # what is elsewhere, autograd alone has kept
        given, weights = [], []
    weights = [weight.T if turned else weight for weight, (_, _, turned) in zip(weights, projections)]  # noqa: B905  # of equal length
    owned = owners(x, slope, given) if given else None
    if owned is None:
        return torch.stack([one_back(x, slope, head, given, weights, read) for head in range(x.shape[1])])
    total = None
    for (part, owner), weight in zip(owned, weights):  # noqa: B905  # of equal length
        if bool(part.any()):
            found = by_columns(part, owner, weight, x.shape[1])
            total = found if total is None else total + found
    return read.new_zeros(x.shape[1], *read.shape) if total is None else total


def one_back(
    x: torch.Tensor,
    slope: torch.Tensor,
    head: int,
    given: list[torch.Tensor],
    weights: list[torch.Tensor],
    read: torch.Tensor,
) -> torch.Tensor:
    """The same through one head, ``[row, pos, d_model]``, whatever lies between: a backward of its own."""
    only = torch.zeros_like(slope)
    only[:, head] = slope[:, head]
    parts = slopes_by(given or [read], x, only)
    if not given:
        return parts[0]
    total = torch.zeros_like(read)
    for part, weight in zip(parts, weights):  # noqa: B905  # of equal length
        columns = part.flatten(0, -2).any(0).nonzero()[:, 0]
        total = total + part[..., columns] @ weight[columns]
    return total


def slopes_by(given: list[torch.Tensor], x: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """Gradients by some tensors through x; zeros by those that do not reach it."""
    found = torch.autograd.grad(x, given, slope, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(by) if one is None else one for one, by in zip(found, given)]  # noqa: B905  # of equal length


def owners(
    x: torch.Tensor, slope: torch.Tensor, given: list[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Gradients by what linear maps give through all heads at once, and which head alone each of their columns is of.

    Heads are told apart by the bits of their numbers. A column is of one head if, whichever bit it is, its gradient
    through the heads whose numbers have that bit is all of it, or nothing.

    Args:
        x: Queries, keys or values ``[row, head, pos, d_head]``.
        slope: The gradient by them.
        given: What the maps give, ``[row, pos, column]``.

    Returns:
        The gradient, and the head of each column, -1 where its gradient is 0, of each map; ``None`` if some column is
        of several heads.
    """
    whole = slopes_by(given, x, slope)
    found = [part.flatten(0, -2).any(0).long() - 1 for part in whole]
    numbers = torch.arange(x.shape[1], device=x.device).reshape(-1, 1, 1)
    for bit in range((x.shape[1] - 1).bit_length()):
        parts = slopes_by(given, x, slope * (numbers >> bit & 1))
        for part, total, head in zip(parts, whole, found):  # noqa: B905  # of equal length
            everything = (part == total).flatten(0, -2).all(0)
            nothing = (part == 0).flatten(0, -2).all(0)
            if not bool((everything | nothing).all()):
                return None
            head += (everything & ~nothing).long() << bit
    return list(zip(whole, found))  # noqa: B905  # of equal length


def by_columns(part: torch.Tensor, owner: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A gradient back through a linear map, each head's columns alone: ``[head, row, pos, d_model]``.

    Args:
        part: By what the map gives, ``[row, pos, column]``.
        owner: The head of each column, -1 for none; some have one.
        weight: ``[column, d_model]``.
        heads: How many there are.
    """
    order = owner.argsort(stable=True)[int((owner < 0).sum()) :]
    own = owner[order]
    counts = own.bincount(minlength=heads)
    place = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own]
    at = order.new_full((heads, int(counts.max())), -1)  # -1 where a head has fewer columns than another
    at[own, place] = order
    mine = part[..., at].masked_fill(at < 0, 0.0)  # [row, pos, head, column]
    first, step = int(at[0, 0]), int(at[-1, 0] - at[0, 0]) // max(1, heads - 1)
    even = torch.arange(heads, device=at.device)[:, None] * step + torch.arange(at.shape[1], device=at.device) + first
    if first >= 0 and step >= 0 and bool((at == even).all()):  # blocks at equal distances are seen without a copy
        down, along = weight.stride()
        start = weight.storage_offset() + first * down
        columns = weight.as_strided((*at.shape, weight.shape[1]), (step * down, down, along), start)
    else:
        columns = weight[at]
    rows, pos = part.shape[:2]
    found = torch.bmm(mine.movedim(2, 0).reshape(heads, rows * pos, -1), columns)
    return found.reshape(heads, rows, pos, -1)
