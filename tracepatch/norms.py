"""A model's modules by their path, and what its norms do: weight and bias, what they divide by, and their way back.

As in ``trace``, only torch is used: no decorators, classes or imports of our own, so that the functions mean the same
wherever they are executed.
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


def wide(x: torch.Tensor) -> torch.Tensor:
    """Numbers in at least float32, in which products are summed."""
    return x if x.dtype == torch.float64 else x.float()


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
    weight = unembedding(head, columns.to(scored.device), apart, model)
    logits = model.output.logits
    last = wide(scored[:, min(at, scored.shape[1] - 1)])
    shown = wide(logits[:, min(at, logits.shape[1] - 1)])
    factor: Any = (shown * last).sum() / (last * last).sum()
    # A multiplier of all logits counts; a softcap is left out.
    factor = factor if bool((shown - factor * last).abs().max() < 1e-3 * shown.abs().max()) else 1.0
    found: torch.Tensor = shares.to(weight) @ weight * factor
    if entering is None:
        return found
    entering = wide(entering)
    scales, bias, centred = norm_parts(model, norm, entering)
    spread = (entering - entering.mean(-1, keepdim=True) if centred else entering) * scales
    plain = wide(normed(model, norm, entering[None].to(scored.dtype))[0])
    scale = (spread * spread).sum(-1, keepdim=True) / ((plain - bias) * spread).sum(-1, keepdim=True)
    found = found.to(scales) * scales
    found = found - found.mean(-1, keepdim=True) if centred else found
    scaled: torch.Tensor = found / scale
    return scaled


def unembedding(head: Any, columns: torch.Tensor, apart: bool, model: Any) -> torch.Tensor:
    """Rows of the unembedding ``[column, d_model]``; where there are no weights, what it makes of each dim alone."""
    if not apart and getattr(head._module, "weight", None) is not None:
        weight: torch.Tensor = head._module.weight
        return wide(weight[columns.to(weight.device)].detach())
    width = model._module.get_input_embeddings().weight.shape[-1]
    dtype = model._module.get_input_embeddings().weight.dtype
    alone = torch.eye(width, dtype=dtype, device=columns.device)[None]
    bias = wide(head(torch.zeros_like(alone[:, :1]))[0, 0, columns])
    pieces = torch.split(alone, DIMS, 1)
    found: torch.Tensor = torch.cat([wide(head(piece)[0][:, columns]) for piece in pieces]) - bias
    return found.T


def norm_parts(model: Any, norm: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A norm's weight and bias ``[d_model]``, and whether it subtracts the mean, as three of its outputs show."""
    envoy, width, dtype = module_at(model, norm), like.shape[-1], next(module_at(model, norm).parameters(), like).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sign = torch.ones(width, device=like.device, dtype=wide)
    sign[1::2] = -1
    if width % 2:  # the sum must be 0, and no entry
        sign[0], sign[-1] = 2.0, -1.0
        sign[2:-1:2] = 1.0
    size = sign.square().mean().sqrt()
    given = torch.stack([torch.zeros_like(sign), 100 * sign, 100 * torch.ones_like(sign)])[None].to(dtype)
    bias, signed, same = envoy(given).to(wide)[0]
    return (signed - bias) / sign * size, bias, bool((same - bias).abs().max() < 0.01 * (signed - bias).abs().max())


def divided(
    model: Any, norm: str, stream: torch.Tensor, normed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A norm taken apart: what it divides, weight included, what it adds, and what it divides by ``[row, pos, 1]``.

    Args:
        model: The nnsight model.
        norm: Path of the norm.
        stream: What went in, ``[row, pos, d_model]``.
        normed: What came out.
    """
    stream = wide(stream)
    weight, bias, centred = norm_parts(model, norm, stream)
    weight, bias = weight.detach().to(stream.dtype), bias.detach().to(stream.dtype)
    spread = (stream - stream.mean(-1, keepdim=True) if centred else stream) * weight
    squared = (spread * spread).sum(-1, keepdim=True)
    scale = squared / ((normed.to(stream.dtype) - bias) * spread).sum(-1, keepdim=True)
    return spread, bias, torch.where(squared == 0, torch.ones_like(scale), scale)


def post_weight(model: Any, norm: str, entering: torch.Tensor) -> torch.Tensor:
    """What a norm with its scale frozen multiplies by, a factor a position × a weight a dim ``[row, pos, d_model]``."""
    envoy = module_at(model, norm)
    weight: torch.Tensor = envoy(torch.ones_like(entering))
    silent = entering.abs().amax(-1, keepdim=True) == 0
    entering = torch.where(silent, torch.full_like(entering, 1e-6), entering)  # the factor's limit at 0
    weighted = entering * weight
    ratio = (envoy(entering) * weighted).sum(-1, keepdim=True) / (weighted * weighted).sum(-1, keepdim=True)
    found: torch.Tensor = weight * ratio
    return found


def pulled_back(model: Any, norm: str, stream: torch.Tensor, slopes: torch.Tensor, scale: Any) -> torch.Tensor:
    """Gradients by what a norm gives, ``[…, row, pos, d_model]``, as gradients by the stream that it takes.

    Args:
        model: The nnsight model.
        norm: Path of the norm; empty where there is none.
        stream: What it takes, ``[row, pos, d_model]``.
        slopes: By what it gives.
        scale: What it divides by, where that is constant; ``None`` where it follows the stream.
    """
    if not norm:
        return slopes
    if scale is not None:
        weight, _, centred = norm_parts(model, norm, stream.detach())
        spread: torch.Tensor = slopes * weight.to(slopes.dtype) / scale.to(slopes.dtype)
        return spread - spread.mean(-1, keepdim=True) if centred else spread
    x = stream.detach().expand(slopes.shape).requires_grad_(True)
    with torch.enable_grad():
        given = module_at(model, norm)._module(x)
    found: torch.Tensor = torch.autograd.grad(given, x, slopes.to(given.dtype))[0]
    return found
