"""What is tried on a model: prompts, forwards of them, and what those show of its code, its norms and its rotations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tracepatch.calls import POSITIONS, Call, record
from tracepatch.errors import ArchitectureError, ModelError, listing
from tracepatch.norms import norm_parts
from tracepatch.probe import Layer, close, resolution
from tracepatch.trace import named
from tracepatch.weights import brought

ROWS = 3  # prompts of the probe


def tokens(module: Any, length: int = POSITIONS) -> torch.Tensor:
    """Random prompts ``[row, pos]``, always the same."""
    weight = module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    # The first ids are often special tokens, which some models treat differently (padding).
    return torch.randint(min(3, len(weight) - 1), len(weight), (ROWS, length), generator=generator).to(weight.device)


def require_finite(module: Any, logits: torch.Tensor) -> None:
    """Refuses a model whose plain forward is not finite.

    Raises:
        ModelError: With the weights that are not, if any.
    """
    if bool(torch.isfinite(logits).all()):
        return
    weights = {**dict(module.named_parameters()), **brought(module)}
    bad = [name for name, p in weights.items() if not torch.isfinite(p).all()]
    raise ModelError(
        f"{type(module).__name__} gives NaN or inf on a plain forward of random tokens. "
        + (
            f"These weights are not finite:\n{listing(bad)}\nLoad another checkpoint."
            if bad
            else "Its weights are finite: try bfloat16 or float32."
        )
    )


def stack_of(module: Any, given: str) -> tuple[str, int]:
    """Path and length of the list of blocks: the outermost ModuleList with most parameters, inside the decoder.

    Raises:
        ArchitectureError: There is none, or not where it was said to be.
    """
    if given:
        try:
            return given, len(module.get_submodule(given))
        except (AttributeError, TypeError) as error:
            raise ArchitectureError(
                f"overrides: {type(module).__name__} has no list of blocks at {given!r}."
            ) from error
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    root = decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else module
    prefix = next(name for name, m in module.named_modules() if m is root)
    lists = {name: m for name, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        raise ArchitectureError(
            f"{type(module).__name__} has no ModuleList that could be its stack of blocks. Pass "
            f"overrides={{'stack': PATH}}."
        )
    name = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
    return ".".join(filter(None, (prefix, name))), len(outer[name])


def streams(
    module: Any, stack: Iterable[nn.Module], ids: torch.Tensor, encoder: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The stream entering every block, and the logits."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)).detach().clone())

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in stack]
    try:
        with torch.no_grad():
            seen.append(module(**named(ids, encoder), use_cache=False).logits)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def with_another_last(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """The prompts with another last token."""
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab
    return changed


def allows(
    module: Any, stack: Iterable[nn.Module], ids: torch.Tensor, encoder: torch.Tensor | None, plain: torch.Tensor
) -> tuple[bool, bool, bool, bool]:
    """What a model's code was seen to do.

    Args:
        module: The model.
        stack: Its blocks.
        ids: Prompts ``[row, pos]``.
        encoder: What its encoder reads, if it has one.
        plain: The logits of a plain forward.

    Returns:
        Whether a changed last token moves nothing before it, whether one token less moves nothing either, whether the
        stream entering the first block depends on the token at its own position alone (and on no encoder), and whether
        the forward takes ``logits_to_keep``.
    """
    vocab, tolerance = plain.shape[-1], resolution(next(module.parameters()).dtype)
    changed = with_another_last(ids, vocab)
    first = changed.clone()
    first[:, 0] = (first[:, 0] + 1) % vocab
    other = None if encoder is None else (encoder + 1) % vocab
    base, late = streams(module, stack, ids, encoder), streams(module, stack, changed, encoder)
    causal = all(close(a[:, :-1], b[:, :-1], tolerance) for a, b in zip(base, late, strict=True))
    shorter = streams(module, stack, ids[:, :-1], encoder)
    extends = not _stretches(module.config.to_dict())
    extends &= all(close(a[:, :-1], b, tolerance) for a, b in zip(base, shorter, strict=True))
    local = close(streams(module, stack, first, other)[0][:, 1:], late[0][:, 1:], tolerance)
    with torch.no_grad():
        try:
            chosen = torch.tensor([2, 5], device=ids.device)
            kept = module(**named(ids, encoder), use_cache=False, logits_to_keep=chosen).logits
            keeps = kept.shape[1] == 2 and close(kept, plain[:, [2, 5]], tolerance)
        except TypeError:
            keeps = False
    return causal, causal and extends, local, keeps


def _stretches(config: Any) -> bool:
    """Whether a config says that rotations depend on how long a prompt is: then long ones turn otherwise."""
    if isinstance(config, dict):
        kind = config.get("rope_type", config.get("type"))
        return (isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")) or any(
            map(_stretches, config.values())
        )
    return isinstance(config, (list, tuple)) and any(map(_stretches, config))


def rotations(
    module: Any, layers: Sequence[Layer], ids: torch.Tensor, encoder: torch.Tensor | None, dtype: torch.dtype
) -> list[bool]:
    """Whether each layer's queries turn with their position: of one token repeated they differ, unlike the stream.

    Where positions are added to the stream, queries differ with it, and are taken not to be rotated as well.
    """
    same = named(ids[:, :1].expand_as(ids).contiguous(), encoder)
    calls, attended, _ = record(module, lambda: module(**same, use_cache=False), ROWS)
    entering = {call.name: call.entering for call in calls}
    found: list[bool | None] = []
    for layer in layers:
        attention, stream = layer.sublayer("attn"), entering[layer.path]
        seen = None if attention is None or attention.attended is None else attention.attended.name
        queries = next((a.queries for a in attended if a.name == seen), None)
        if queries is None or stream is None:
            found.append(False)
            continue
        tolerance = 10 * resolution(dtype)
        moved = not close(queries, queries[:, :, :1].expand_as(queries), tolerance)
        alike = close(stream, stream[:, :1].expand_as(stream), tolerance)
        found.append(moved if alike else None if layer.index else False)
    # Above an attention with sinks the stream differs even so: then what the other layers do is taken.
    return [any(found) if one is None else one for one in found]


def is_scaling(norm: Call) -> bool:
    """Whether a norm is input × (one factor a position) × (one weight a dim): then a frozen scale makes it linear."""
    x, y = norm.entering, norm.leaving
    assert x is not None
    assert y is not None
    with torch.no_grad():
        weighted = x * norm.module(torch.ones_like(x))
    factor = (y * weighted).sum(-1, keepdim=True) / (weighted * weighted).sum(-1, keepdim=True)
    return close(factor * weighted, y, 4 * resolution(x.dtype))


def is_division(norm: Call) -> bool:
    """Whether a norm is (its input, centred or not) × weight ÷ (one number a position) + bias."""
    x, y = norm.entering, norm.leaving
    assert x is not None and y is not None  # noqa: PT018  # for mypy
    with torch.no_grad():
        weight, bias, centred = norm_parts(norm.module, "", x.float())
        spread = (x.float() - x.float().mean(-1, keepdim=True) if centred else x.float()) * weight
        factor = ((y.float() - bias) * spread).sum(-1, keepdim=True) / (spread * spread).sum(-1, keepdim=True)
    return close(factor * spread + bias, y.float(), 4 * resolution(x.dtype))


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two activations are the same to the last bit."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
