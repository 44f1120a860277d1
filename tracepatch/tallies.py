"""What is added up over the prompts of a reference: means of activations, and how widely their numbers spread.

As in ``trace``, nothing is decided, only torch is used, and there are no decorators, classes or imports of our own. A
*move* is ``(key, name, here, there, units, shape)``: of the kept values ``name`` ``[prompt, pos, …]`` the positions
``here`` are added at ``there`` of the table ``key``, which has the rows and positions ``shape``. For attention's
weights ``here`` and ``there`` are pairs, destinations and sources. Of a spread ``there`` is none.
"""

from __future__ import annotations

from typing import Any

import torch


def add(known: dict[Any, Any], kept: dict[Any, torch.Tensor], rows: torch.Tensor, moves: tuple[Any, ...]) -> None:
    """Adds what a run of prompts kept to the tables that are in the making.

    Args:
        known: With the tables, as ``("adding", key)``; changed in place.
        kept: (component, layer) → values ``[prompt, pos, …]``.
        rows: Per prompt, its row of the tables.
        moves: What goes where.
    """
    for key, name, here, there, units, shape in moves:
        value = kept[name]
        if there is None:
            known["adding", key] = spread_so_far(known.get(("adding", key)), value, here, units)
            continue
        wide = value.double() if value.dtype == torch.float64 else value.float()
        attends = isinstance(here, tuple)
        if attends:  # [prompt, dest, head, src] → [prompt, dest, src, head]
            wide = wide.transpose(2, 3)[:, here[0].to(value.device)][:, :, here[1].to(value.device)]
        else:
            wide = wide[:, here.to(value.device)]
        total, count, _ = known.get(("adding", key)) or begun(wide, shape)
        at = (rows.to(value.device), *(part.to(value.device) for part in (there if attends else (there,))))
        cells = tuple(part.view(-1, *[1] * (len(at) - 1 - i)) for i, part in enumerate(at))
        total.index_put_(cells, wide, accumulate=True)
        ones = torch.ones(wide.shape[: len(at)], device=value.device)
        count.index_put_(cells, ones, accumulate=True)
        known["adding", key] = total, count, value.dtype


def begun(like: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """An empty table ``[row, pos, …]``, how many values each of its cells is the sum of, and the dtype of the mean."""
    return like.new_zeros(*shape, *like.shape[len(shape) :]), torch.zeros(shape, device=like.device), like.dtype


def spread_so_far(before: Any, value: torch.Tensor, here: torch.Tensor, units: Any) -> tuple[int, float, float]:
    """How many numbers there were, their mean, and the sum of their squared distances from it."""
    picked = value[:, here.to(value.device)]
    numbers = (picked if units is None else picked[:, :, units.to(value.device)]).cpu().double()
    count, mean = numbers.numel(), float(numbers.mean())
    squares = float((numbers - mean).square().sum())
    if before is None:
        return count, mean, squares
    seen, old, sum_old = before
    both = seen + count
    return both, old + (mean - old) * count / both, sum_old + squares + (mean - old) ** 2 * seen * count / both


def finish(known: dict[Any, Any], name: str, keys: tuple[Any, ...]) -> None:
    """Makes means and standard deviations of what was added up; from now on they are known under their keys.

    Args:
        known: Changed in place.
        name: Of the reference world, all of whose prompts have run.
        keys: Of its tables.
    """
    for key in keys:
        found = known.pop(("adding", key))
        if not isinstance(found[0], torch.Tensor):
            known[key] = torch.tensor((found[2] / max(1, found[0] - 1)) ** 0.5)
            continue
        total, count, dtype = found
        mean = total / count.clamp(min=1).reshape(*count.shape, *[1] * (total.ndim - count.ndim)).to(total.dtype)
        if count.ndim == 3:  # weights of attention
            mean = mean.transpose(2, 3)
        known[key] = mean.to(dtype)
    known["tallied", name] = keys
