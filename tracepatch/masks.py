"""What packed tokens see: each layer's own mask and rotary table, taken apart by position and put together by token.

A forward of one prompt with every block skipped (``trace.wiring``) shows what the model hands to its blocks. A layer's
mask says which positions see which; a packed token sees the tokens of its own row and, before the row's start, its
base, as far as that mask lets their positions. So sliding windows, scaled rotary tables and the like stay what the
model makes of them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from tracepatch.table import Table

Wire: TypeAlias = tuple[Any, str, Any]
"""``(argument, kind, value)``: a block's argument, ``mask`` ``[query, key]`` or ``table`` with one entry a position."""
Wires: TypeAlias = tuple[tuple[Wire, ...], ...]
"""Per layer, what its block takes from outside; see ``trace.wiring``."""


def positions(table: Table) -> torch.Tensor:
    """The position of the token at each seat, ``[lane, slot]``; 0 where nobody sits."""
    found = torch.zeros(table.shape[-1], dtype=torch.long)
    for number, job in enumerate(table.jobs):
        lane, slot = table.seats[number]
        found[lane, slot : slot + table.length(number)] = torch.arange(job.start, table.end)
    return found


def visible(table: Table, pos: torch.Tensor) -> torch.Tensor:
    """Which tokens belong to what a token may see, ``[lane, slot, cached positions and slots]``, masks aside."""
    lanes, slots = table.shape[-1]
    owner = torch.full((lanes, slots), -1)
    start = torch.zeros(lanes, slots, dtype=torch.long)
    known = {run: number for number, run in enumerate(table.paths)}
    path = torch.zeros(len(known) + 1, lanes, slots, dtype=torch.bool)
    for run, (lane, seats) in table.paths.items():
        path[known[run], lane, list(seats)] = True
    base = torch.full((lanes, slots), len(known))
    for number, job in enumerate(table.jobs):
        lane, slot = table.seats[number]
        own = slice(slot, slot + table.length(number))
        owner[lane, own], start[lane, own] = number, job.start
        base[lane, own] = known.get((job.pair, job.base), len(known))
    sees = owner[:, :, None] == owner[:, None, :]
    if known:
        sees |= path[base, torch.arange(lanes)[:, None]] & (pos[:, None, :] < start[:, :, None])
    cached = torch.arange(table.prefix) < start[:, :, None]
    # Where nobody sits, a token sees its equals: a row of a softmax must see something.
    return torch.cat([cached & (owner >= 0)[:, :, None], sees], -1)


def wired(table: Table, wires: Wires, device: torch.device) -> dict[int, dict[Any, Any]]:
    """What the blocks of a packed batch take instead: layer → argument → mask or table of the tokens alive there."""
    pos = positions(table)
    sees = visible(table, pos)[:, None].to(device)
    keys = torch.cat([torch.arange(table.prefix).expand(len(pos), -1), pos], -1)
    pos, keys = pos.to(device), keys.to(device)
    made: dict[int, Any] = {}  # layers share masks, and tables
    found: dict[int, dict[Any, Any]] = {}
    for layer in range(table.first, len(wires)):
        lanes, slots = table.shape[layer]
        given = {}
        for argument, kind, value in wires[layer]:
            if id(value) not in made:
                made[id(value)] = _masked(value, pos, keys, sees) if kind == "mask" else _each(value, pos)
            whole = made[id(value)]
            if kind == "mask":
                given[argument] = whole[:lanes, :, :slots, : table.prefix + slots]
            else:
                given[argument] = (
                    tuple(t[:lanes, :slots] for t in whole) if isinstance(whole, tuple) else whole[:lanes, :slots]
                )
        found[layer] = given
    return found


def _masked(mask: torch.Tensor | None, pos: torch.Tensor, keys: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    if mask is None:
        mask = torch.ones(2 * [int(keys.max()) + 1], dtype=torch.bool, device=pos.device).tril()
    here = mask.to(pos.device)[pos[:, :, None], keys[:, None, :]][:, None]
    if here.dtype == torch.bool:
        return here & sees
    return here.masked_fill(~sees, torch.finfo(here.dtype).min)


def _each(value: Any, pos: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(t.to(pos.device)[pos] for t in value)
    return value.to(pos.device)[pos]
