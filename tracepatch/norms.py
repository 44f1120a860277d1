"""A model's modules by their path, and what its norms do.

As in ``trace``, only torch is used, and there are no decorators, classes or imports of our own.
"""

from __future__ import annotations

from typing import Any

import torch

DIMS = 256  # of the stream that are unembedded at once


def module_at(model: Any, path: str) -> Any:
    """The envoy of a module."""
    for part in path.split(".") if path else ():
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def normed(model: Any, norm: str, x: torch.Tensor) -> torch.Tensor:
    """What a branch reads of a stream ``[…, d_model]``."""
    found: torch.Tensor = module_at(model, norm)(x) if norm else x
    return found


def directions(
    model: Any, apart: bool, norm: str, unembed: str, at: int, columns: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """What each dim of the stream adds to a sum of logits at a position, ``[row, d_model]``; called in a forward.

    The final norm's scale is held as it is there.

    Args:
        model: The nnsight model.
        apart: Whether this code runs apart from the model's weights.
        norm: Path of the final norm; empty where there is none.
        unembed: Path of the unembedding.
        at: The position.
        columns: Token ids.
        shares: How much each of their logits counts, ``[row, column]``.
    """
    head = module_at(model, unembed)
    entering = module_at(model, norm).input[:, at] if norm else None
    scored = head.output
    weight = unembedding(head, columns, apart, model)
    logits = model.output.logits
    last = scored[:, min(at, scored.shape[1] - 1)].float()
    shown = logits[:, min(at, logits.shape[1] - 1)].float()
    factor = (shown * last).sum() / (last * last).sum()
    # A multiplier of all logits counts; a softcap is left out.
    factor = factor if bool((shown - factor * last).abs().max() < 1e-3 * shown.abs().max()) else 1.0
    found: torch.Tensor = shares.to(weight) @ weight * factor
    if entering is None:
        return found
    entering = entering.float()
    scales, bias, centred = norm_parts(model, norm, entering)
    spread = (entering - entering.mean(-1, keepdim=True) if centred else entering) * scales
    plain = normed(model, norm, entering[None].to(scored.dtype))[0].float()
    scale = (spread * spread).sum(-1, keepdim=True) / ((plain - bias) * spread).sum(-1, keepdim=True)
    found = found.to(scales) * scales
    found = found - found.mean(-1, keepdim=True) if centred else found
    scaled: torch.Tensor = found / scale
    return scaled


def unembedding(head: Any, columns: torch.Tensor, apart: bool, model: Any) -> torch.Tensor:
    """Rows of the unembedding ``[column, d_model]``; where there are no weights, what it makes of each dim alone."""
    if not apart and getattr(head._module, "weight", None) is not None:
        weight: torch.Tensor = head._module.weight
        return weight[columns.to(weight.device)].detach().float()
    width = model._module.get_input_embeddings().weight.shape[-1]
    dtype = model._module.get_input_embeddings().weight.dtype
    bias = head(torch.zeros(1, 1, width, dtype=dtype))[0, 0, columns].float()
    pieces = torch.split(torch.eye(width, dtype=dtype)[None], DIMS, 1)
    found: torch.Tensor = torch.cat([head(piece)[0][:, columns].float() for piece in pieces]) - bias
    return found.T


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
