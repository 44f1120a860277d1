"""What a forward does for the sake of its gradients: tensors that are differentiated by, and rules of propagation.

As in ``writing``, nothing is decided here, and only torch is used: no decorators, classes or imports of our own but of
what ships with it. Every rule leaves the value as it is, to the last bit, and changes its gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.norms import divided

KINDS = ("tap", "hold", "norm_rule", "identity_rule", "half_rule", "line")


def tapped(model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, Any], kept: dict[Any, Any]) -> Any:
    """One task at a place, after everything that is written there.

    ``("tap", key, copy)`` keeps the tensor that flows on, to differentiate by; where the model changes it in place, a
    copy flows on instead. ``("hold", key)`` stops the gradient. ``("norm_rule", norm, stream)`` lets it pass a norm as
    if what that divides by were constant; ``("identity_rule", entering)`` passes a nonlinearity as if it multiplied by
    a constant; ``("half_rule", None)`` gives each factor of a product half of it. ``("line", name, worlds, weights,
    heads, scale)`` moves the value along the straight line to that of other worlds.
    """
    kind = task[0]
    if kind == "tap":
        if not x.requires_grad:  # a leaf: nothing below it is differentiated
            x = x.detach().requires_grad_(True)
        x = x.view_as(x)  # of its own, for whatever reads it from here on
        kept["tap", task[1]] = x
        kept["version", task[1]] = x._version
        return x.clone() if task[2] else x
    if kind == "hold":
        return x.detach()
    if kind == "line":
        _, name, worlds, weights, heads, scale = task
        other = known[name]
        other = shaped_back(other[worlds.to(other.device)].to(x.device, x.dtype), x, heads) / scale
        return torch.lerp(x.detach(), other, weights.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1)))
    if kind == "half_rule":
        return passing(x, x / 2)
    if kind == "identity_rule":
        entering = kept["aside", task[1]]
        ratio = torch.where(entering == 0, torch.zeros_like(x), x / entering).detach()
        return passing(x, entering * ratio)
    _, norm, stream = task
    entering = kept["aside", stream]
    spread, bias, scale = divided(model, norm, entering, x)
    return passing(x, (spread / scale.detach() + bias).to(x.dtype))


def passing(value: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """A value to the last bit, with the gradient of something else."""
    return value.detach() + (way - way.detach())


def shaped(x: torch.Tensor, heads: Any) -> torch.Tensor:
    """A tensor as it passes by, as its component ``[row, pos, (unit), …]``."""
    if heads == "first":
        return x.transpose(1, 2)
    found: torch.Tensor = x.unflatten(-1, (heads, -1)) if heads else x  # type: ignore[no-untyped-call]  # torch's
    return found


def shaped_back(x: torch.Tensor, like: torch.Tensor, heads: Any) -> torch.Tensor:
    """A component as the tensor that passes by."""
    return x.transpose(1, 2) if heads == "first" else x.reshape(like.shape)
