"""Freezes: patterns, components and what norms divide by, held at a world's values, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap, made_up_pairs
from tiny_models import build, tokenizer
from torch import Tensor, nn

import tracepatch as tp
from tracepatch import errors
from tracepatch.sites import SCALES

TYPES = ("gpt2", "llama", "gpt_neox", "gemma2", "olmo2")


def parts(norm: nn.Module) -> tuple[Tensor, Tensor | float, float, bool]:
    """Weight, bias, epsilon, and whether the mean is subtracted: from the classes' own attributes."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight, norm.bias, norm.eps, True
    shifted = "Gemma" in type(norm).__name__
    eps = norm.eps if shifted else norm.variance_epsilon
    return norm.weight + 1 if shifted else norm.weight, 0.0, float(eps), False  # type: ignore[arg-type]  # a module's float


def divisor(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm divides x [..., d_model] by."""
    _, _, eps, centred = parts(norm)
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@contextmanager
def frozen(module: nn.Module, held: dict[str, Tensor]) -> Iterator[None]:
    """The model with some norms dividing by given numbers [pos, 1]."""
    norms = {path: module.get_submodule(path) for path in held}
    for path, norm in norms.items():
        weight, bias, _, centred = parts(norm)

        def forward(
            x: Tensor, weight: Any = weight, bias: Any = bias, centred: bool = centred, by: Any = held[path]
        ) -> Any:
            return (x - x.mean(-1, keepdim=True) if centred else x) / by * weight + bias

        norm.forward = forward  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        for norm in norms.values():
            del norm.forward


def divisors(module: nn.Module, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What norms divide by in a plain forward."""
    found: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda norm, args, path=path: found.__setitem__(path, divisor(norm, args[0])[0])
        )
        for path in paths
    ]
    with torch.no_grad():
        module(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def norms_of(model: Any) -> list[str]:
    """Paths of every norm that a scale is offered for."""
    found = tp.Architecture(model)
    layers = range(len(found))
    names = ("attn_in_scale", "attn_out_scale", "mlp_in_scale", "mlp_out_scale")
    return [found.scaled(n, i)[1] for i in layers for n in names if found.offers(n, i)] + [found.final_norm]


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", TYPES)
def test_frozen_norms_equal_the_oracles(model_type: str, base: str) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    other = "clean" if base == "corrupted" else "corrupted"
    with tp.patching(model, pairs) as p:
        live, given = getattr(p, base), getattr(p, other)
        components = ("resid_pre", "attn_out", "mlp_in", "q_in", "k_in", "resid_post")
        offered = [c for c in components if p.architecture.offers(c, 0)]
        for component in offered:
            with p.row(patched=component):
                getattr(live, component)[0, :] = getattr(given, component)[0, :]
                live.freeze("norms")
        with p.row(patched="norms of the other run"):
            live.freeze("norms", at=given)
    result = p.run()
    slow = Slow(tp.models.module_of(model), p.encoded)
    norms = norms_of(model)
    assert len(norms) == {"gpt2": 5, "llama": 5, "gpt_neox": 5, "gemma2": 9, "olmo2": 5}[model_type]
    for pair in range(len(p.encoded)):
        held = {w: divisors(slow.reference.model, norms, slow.ids[w, pair]) for w in (base, other)}
        for row in p.rows:
            edits = slow.edits_but(row, pair, SCALES)
            with frozen(slow.reference.model, held[base if edits else other]):
                logits = slow.reference.logits(slow.ids[base, pair], edits)
            found = float(result["value"].sel(patched=row.labels["patched"]).isel(pair=pair))
            wanted = float(gap(p.encoded)(logits, pair))
            assert abs(found - wanted) <= 1e-5 * (1 + abs(wanted)), (row.labels, pair, found, wanted)
    free = tp.patch(
        model,
        pairs,
        "resid_pre",
        by="layer",
        only={"layer": [0]},
        direction={"corrupted": "denoising", "clean": "noising"}[base],
    )
    moved = abs(free["value"].isel(layer=0) - result["value"].sel(patched="resid_pre"))
    assert float(moved.max()) > 1e-3, "freezing changed nothing, so this compared nothing"


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_frozen_patterns_and_components(name: str) -> None:
    model, pairs = toy(name), ioi_pairs(2)
    with tp.patching(model, pairs) as p:
        with p.row(name="patterns"):
            p.corrupted.embed[:] = p.clean.embed[:]
            p.corrupted.freeze("pattern")
        with p.row(name="later MLPs"):
            p.corrupted.embed[:] = p.clean.embed[:]
            p.corrupted.freeze("mlp_out", layers=slice(1, None))
        held = p.world("held", of=p.clean)
        held.freeze("pattern", at=p.corrupted)
        with p.row(name="as a world"):
            held.z[1, :, 0] = 0
    result = p.run()
    slow = Slow(tp.models.module_of(model), p.encoded, eager=True, edited=p.edited)
    wanted = slow.score(p.rows, gap(p.encoded)).numpy()
    np.testing.assert_allclose(result["value"].transpose("name", "pair"), wanted, atol=1e-4)
    layers = len(p.architecture)
    assert len(p.rows[1].edits) == layers
    assert len(p.edited["held"].edits) == layers


def test_a_scale_is_the_norms_own_divisor(gpt2: Any, pairs: tp.Pairs) -> None:
    """Half the divisor, twice the normed stream: the last norm's scale acts on the logits as a temperature does."""
    with tp.patching(gpt2, pairs, metric=tp.logit_diff) as p:
        with p.row(name="half"):
            p.clean.logits_in_scale[-1] = lambda live: live / 2
        with p.row(name="same"):
            p.clean.logits_in_scale[-1] += 0.0
    result = p.run()
    module = tp.models.module_of(gpt2)
    shift = module.lm_head(module.transformer.ln_f.bias).detach()
    encoded = p.encoded
    for pair in range(len(encoded)):
        own = float(shift[list(encoded.answer[pair])].mean() - shift[list(encoded.wrong[pair])].mean())
        clean, half = float(result["clean"][pair]), float(result["value"].sel(name="half")[pair])
        assert abs((half - own) - 2 * (clean - own)) < 1e-3
        assert abs(float(result["value"].sel(name="same")[pair]) - clean) < 1e-4


def test_freezing_what_is_not_there(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p, p.row():
        with pytest.raises(errors.ComponentError, match="no attn_out_scale: there is no norm"):
            p.clean.freeze("attn_out_scale")
        with pytest.raises(errors.RecipeError, match="Say what is held"):
            p.clean.freeze()
        p.clean.z[0, 0, 0] = 0
    gemma = toy("gemma2")
    with (
        pytest.raises(errors.RecipeError, match="cannot be edited in one row"),
        tp.patching(gemma, pairs) as p,
        p.row(),
    ):
        p.clean.freeze("norms")
        p.clean.head_out[0, :, 0] = 0
