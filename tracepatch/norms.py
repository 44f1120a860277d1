"""A model's modules by their path, and what its norms do.

As in ``trace``, only torch is used, and there are no decorators, classes or imports of our own.
"""

from __future__ import annotations

from typing import Any

import torch


def module_at(model: Any, path: str) -> Any:
    """The envoy of a module."""
    for part in path.split(".") if path else ():
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def normed(model: Any, norm: str, x: torch.Tensor) -> torch.Tensor:
    """What a branch reads of a stream ``[…, d_model]``."""
    found: torch.Tensor = module_at(model, norm)(x) if norm else x
    return found


def norm_parts(model: Any, norm: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A norm's weight and bias ``[d_model]``, and whether it subtracts the mean, as three of its outputs show."""
    envoy, width, dtype = module_at(model, norm), like.shape[-1], next(module_at(model, norm).parameters(), like).dtype
    sign = torch.ones(width, device=like.device)
    sign[1::2] = -1
    if width % 2:  # the sum must be 0, and no entry
        sign[0], sign[-1] = 2.0, -1.0
        sign[2:-1:2] = 1.0
    size = sign.square().mean().sqrt()
    given = torch.stack([torch.zeros_like(sign), 100 * sign, 100 * torch.ones_like(sign)])[None].to(dtype)
    bias, signed, same = envoy(given).float()[0]
    return (signed - bias) / sign * size, bias, bool((same - bias).abs().max() < 0.01 * (signed - bias).abs().max())
