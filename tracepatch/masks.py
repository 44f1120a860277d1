"""What packed tokens see: each layer's own mask and rotary table, taken apart by position and put together by token.

A forward of one prompt with every block skipped (``trace.wiring``) shows what the model hands to its blocks. A layer's
mask says which positions see which; a packed token sees the tokens of its own row and, before the row's start, its
base, as far as that mask lets their positions. So sliding windows, scaled rotary tables and the like stay what the
model makes of them.

As in ``trace``, only torch is used, so that the functions mean the same wherever they are executed. A *standing* is a
table as plain columns: ``(jobs, end, prefix, first, shape, paths)``, with the lane, first slot, first position and base
of each job in ``jobs`` ``[job, 4]``, and in ``paths`` the lane and slots of each world that is computed there; see
``climb.standing``.
"""

from __future__ import annotations

from typing import Any

import torch


def positions(standing: tuple[Any, ...]) -> torch.Tensor:
    """The position of the token at each seat, ``[lane, slot]``; 0 where nobody sits."""
    jobs, end, _, _, shape, _ = standing
    found = torch.zeros(shape[-1], dtype=torch.long)
    for lane, slot, start, _ in jobs.tolist():
        found[lane, slot : slot + end - start] = torch.arange(start, end)
    return found


def visible(standing: tuple[Any, ...], pos: torch.Tensor) -> torch.Tensor:
    """Which tokens belong to what a token may see, ``[lane, slot, cached positions and slots]``, masks aside."""
    jobs, end, prefix, _, shape, paths = standing
    lanes, slots = shape[-1]
    owner = torch.full((lanes, slots), -1)
    starts = torch.zeros(lanes, slots, dtype=torch.long)
    base = torch.full((lanes, slots), len(paths))
    path = torch.zeros(len(paths) + 1, lanes, slots, dtype=torch.bool)
    for world, (lane, seats) in enumerate(paths):
        path[world, lane, seats] = True
    for number, (lane, slot, start, world) in enumerate(jobs.tolist()):
        own = slice(slot, slot + end - start)
        owner[lane, own], starts[lane, own], base[lane, own] = number, start, world
    sees = owner[:, :, None] == owner[:, None, :]
    if paths:
        sees |= path[base, torch.arange(lanes)[:, None]] & (pos[:, None, :] < starts[:, :, None])
    cached = torch.arange(prefix) < starts[:, :, None]
    # Where nobody sits, a token sees its equals: a row of a softmax must see something.
    return torch.cat([cached & (owner >= 0)[:, :, None], sees], -1)


def wired(standing: tuple[Any, ...], wires: Any, device: Any) -> dict[int, dict[Any, Any]]:
    """What the blocks of a packed batch take instead: layer → argument → mask or table of the tokens alive there.

    Args:
        standing: Of the table.
        wires: Per layer, what its block takes from outside; see ``trace.wiring``.
        device: Where the first block is.
    """
    _, _, prefix, first, shape, _ = standing
    pos = positions(standing)
    sees = visible(standing, pos)[:, None].to(device)
    keys = torch.cat([torch.arange(prefix).expand(len(pos), -1), pos], -1)
    pos, keys = pos.to(device), keys.to(device)
    made: dict[int, Any] = {}  # layers share masks, and tables
    found: dict[int, dict[Any, Any]] = {}
    for layer in range(first, len(shape) - 1):
        lanes, slots = shape[layer]
        given = {}
        for argument, kind, value in wires[layer]:
            if id(value) not in made:
                made[id(value)] = masked(value, pos, keys, sees) if kind == "mask" else each(value, pos)
            whole = made[id(value)]
            if kind == "mask":
                given[argument] = whole[:lanes, :, :slots, : prefix + slots]
            else:
                given[argument] = (
                    tuple(t[:lanes, :slots] for t in whole) if isinstance(whole, tuple) else whole[:lanes, :slots]
                )
        found[layer] = given
    return found


def masked(mask: Any, pos: torch.Tensor, keys: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """A layer's mask ``[query, key]``, or none, as one of tokens ``[lane, 1, slot, key]``."""
    if mask is None:
        mask = torch.ones(2 * [int(keys.max()) + 1], dtype=torch.bool, device=pos.device).tril()
    here: torch.Tensor = mask.to(pos.device)[pos[:, :, None], keys[:, None, :]][:, None]
    if here.dtype == torch.bool:
        return here & sees
    return here.masked_fill(~sees, torch.finfo(here.dtype).min)


def each(value: Any, pos: torch.Tensor) -> Any:
    """A table with an entry a position, or several, as one with an entry a token ``[lane, slot, …]``."""
    if isinstance(value, tuple):
        return tuple(t.to(pos.device)[pos] for t in value)
    return value.to(pos.device)[pos]
