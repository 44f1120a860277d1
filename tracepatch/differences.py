"""What patches add to values: differences between runs, and the values that they are taken from.

As in ``trace``, nothing is decided, and only torch is used: no decorators, classes or imports of our own but of what
ships with it.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.norms import wide

WEIGHTS = ("scores", "pattern")
SPLIT = ("q_in", "k_in", "v_in")  # which are one stream


def home(x: torch.Tensor) -> torch.Tensor:
    """A result as it travels."""
    return x.detach().float().cpu() if x.dtype != torch.float64 else x.detach().cpu()


def difference(known: dict[Any, Any], value: Any, source: tuple[Any, ...]) -> torch.Tensor:
    """What a patch adds to the value of a component, ``[row, pos, …]``.

    Args:
        known: With the worlds' values.
        value: The name of the value; ``None`` for nothing.
        source: ``("world", name, worlds, agreeing)``: the values of those worlds, which agree with the rows' before
            positions ``[row]``, or whose positions ``[row, pos]`` correspond to the rows', -1 where nothing is changed;
            ``("value", name, agreeing)``: another value with the same rows; or ``("number", x)``, a number or tensor.
    """
    here = wide(known[value])
    kind, *given = source
    along = 2 if value[-2] in WEIGHTS else 1
    if kind == "number":
        return (given[0].to(here) if isinstance(given[0], torch.Tensor) else given[0]) - here
    if kind == "value":
        return apart(wide(known[given[0]]).to(here.device) - here, given[1], along)
    other = wide(facing(of_worlds(known, given[0], given[1]), given[2])).to(here.device)
    return apart(other - here, given[2], along)


def of_worlds(known: dict[Any, Any], name: Any, worlds: torch.Tensor) -> torch.Tensor:
    """Some worlds' value of a component as gradients have it: heads come first in scores and patterns."""
    whole: torch.Tensor = known[name]
    found = whole[worlds.to(whole.device)]
    return found.transpose(1, 2) if name[0] in WEIGHTS else found


def facing(found: torch.Tensor, agreeing: Any) -> torch.Tensor:
    """Other prompts' values ``[row, pos, …]``, where their positions are said, at those; see ``difference``."""
    if agreeing is None or agreeing.ndim == 1:
        return found
    rows = torch.arange(len(found), device=found.device)[:, None]
    return found[rows, agreeing.clamp(min=0).to(found.device)]


def settle(known: dict[Any, Any], world: str, worlds: torch.Tensor, keys: tuple[Any, ...], length: Any = None) -> None:
    """Makes values that were kept of a world's run those that differences are taken from.

    Args:
        known: With the values.
        world: Whose run it was.
        worlds: Where its runs stand.
        keys: Component and layer of the values.
        length: Positions of its prompts, where those of others that were kept with them are longer.
    """
    for key in keys:
        found = of_worlds(known, ("attn_in", key[1]) if key[0] in SPLIT else key, worlds)
        if length is not None:
            found = found[..., :length, :length] if key[0] in WEIGHTS else found[:, :length]
        known["value", world, key[0], key[1]] = found


def take(known: dict[Any, Any], into: Any, name: Any, worlds: torch.Tensor) -> None:
    """Makes some worlds' value known by a name of its own."""
    known[into] = of_worlds(known, name, worlds)


def drop(known: dict[Any, Any], world: Any) -> None:
    """Forgets the values and gradients of a world."""
    for key in [key for key in known if len(key) > 2 and key[1] == world]:
        del known[key]


def apart(found: torch.Tensor, agreeing: Any, along: int) -> torch.Tensor:
    """A difference of two worlds, exactly 0 where they agree along a dim of positions; see ``difference``."""
    if agreeing is None:
        return found
    same = torch.arange(found.shape[along])[None] < agreeing[:, None] if agreeing.ndim == 1 else agreeing < 0
    shape = [len(same), *[1] * (found.ndim - 1)]
    shape[along] = same.shape[1]
    return found.masked_fill(same.to(found.device).reshape(shape), 0.0)


def summed(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """A sum over some dims, or the tensor where there are none."""
    return x.sum(dims) if dims else x
