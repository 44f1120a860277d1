"""Is the oracle of attribution right? Laws that hold exactly, slopes and limits that it must reach."""

from __future__ import annotations

import math
from functools import cache

import pytest
import tiny_models
import torch
from reference import DIMS, Edit
from textbook import SCALES, Textbook, norm_parts
from torch import Tensor

torch.set_num_threads(1)

CLEAN = torch.tensor([5, 9, 11, 3, 40, 22, 17, 8])
CORRUPTED = torch.tensor([5, 9, 31, 3, 50, 22, 16, 8])
BASES = ("corrupted", "clean")
FOUR = ("gpt2", "llama", "gpt_neox", "gemma2")  # LayerNorm; GQA; parallel blocks; post-norms, softcaps and windows
MORE = tuple(n for n in tiny_models.ALL if n not in (*FOUR, *tiny_models.ENCODER_DECODER, "mamba", "gpt_oss"))
POST_NORMS = ("gemma2", "gemma3_text", "olmo2", "glm4", "exaone4")


def everywhere(names: tuple[str, ...] = FOUR, more: tuple[str, ...] = MORE) -> pytest.MarkDecorator:
    """Runs a test on some architectures, and with the slow tests on more."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in more]
    return pytest.mark.parametrize("name", [*names, *slow])


@cache
def book(name: str) -> Textbook:
    """A tiny model in float64."""
    return Textbook(tiny_models.build(name, dtype=torch.float64, attn_implementation="eager"))


def logit_diff(logits: Tensor) -> Tensor:
    """Of two tokens, at the last position."""
    return logits[-1, 7] - logits[-1, 9]


def wavy(logits: Tensor) -> Tensor:
    """A metric that is not linear and reads two positions."""
    return torch.log_softmax(logits[-1], -1)[7] + torch.tanh(logits[-3, 4] / 3)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Asserts equality up to rounding, relative to the largest element."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"off by {error:.1e}"


# ------------------------------------------------------------------------------------------------- values, gradients


@everywhere()
def test_values_are_the_models_own(name: str) -> None:
    """Norms and softmax in float64 change nothing but the rounding of models that take them in float32."""
    t = book(name)
    with torch.no_grad():
        own = t.reference.model(CLEAN[None]).logits[0]
    close(t.values(CLEAN)["logits", 0], own, 1e-13 if name in ("gpt2", "gptj", "bloom") else 1e-5)


@everywhere()
def test_gradients_are_those_of_every_component(name: str) -> None:
    """Reading gradients changes no value, and there is one for everything that there is to patch, and for scales."""
    t = book(name)
    values, gradients = t.values(CLEAN), t.gradients(CLEAN, wavy)
    assert set(gradients) == set(values)
    assert {c for c, _ in values} - set(SCALES) == set(t.reference.components())
    assert all(gradients[key].shape == value.shape for key, value in values.items())
    inner = {c: sum(gradients[k].abs().sum() for k in gradients if k[0] == c) for c, _ in values}
    assert all(total > 0 for total in inner.values()), inner


@everywhere()
@pytest.mark.parametrize("component", [c for c in (*DIMS, *SCALES) if c != "logits"])
def test_finite_differences(name: str, component: str) -> None:
    """(m(x + aΔ) − m(x)) / a -> gradient · Δ, with an error that shrinks like a."""
    t = book(name)
    at_base, at_other = t.values(CORRUPTED), t.values(CLEAN)
    gradients = t.gradients(CORRUPTED, wavy)
    before = wavy(at_base["logits", 0])
    for key in [k for k in gradients if k[0] == component]:
        change = at_other[key] - at_base[key]
        expected = (gradients[key] * change).sum()
        errors = []
        for a in (1e-4, 1e-5):
            after = t.metric(CORRUPTED, wavy, [Edit(*key, value=a * change, mode="add")])
            errors.append(abs((after - before) / a - expected))
        scale = max(1.0, abs(expected))
        assert errors[1] < 1e-3 * scale
        assert errors[1] < 0.2 * errors[0] + 1e-8 * scale


@everywhere()
def test_the_gradient_of_a_token_that_does_not_matter_is_zero(name: str) -> None:
    """Law 3: before the first difference every estimate is 0; after the metric's position every gradient is."""
    t = book(name)
    for key, estimate in t.attribution(CLEAN, CORRUPTED, wavy).items():
        if "dest" in DIMS.get(key[0], ()):
            assert (estimate[:, :2] == 0).all()
        else:
            assert (estimate[:2] == 0).all(), key
    gradients = t.gradients(CLEAN, lambda logits: logits[3, 7])
    for key, gradient in gradients.items():
        late = gradient[:, 4:] if "dest" in DIMS.get(key[0], ()) else gradient[4:]
        assert (late == 0).all(), key


@everywhere()
def test_the_same_prompt_twice_has_no_effect(name: str) -> None:
    assert all((estimate == 0).all() for estimate in book(name).attribution(CLEAN, CLEAN, wavy).values())


# ---------------------------------------------------------------------------------------------------- attribution


@everywhere()
@pytest.mark.parametrize("base", BASES)
def test_estimates_add_up(name: str, base: str) -> None:
    """Law 13: over heads to attention's output, over what attention reads to its input. Not under a post-norm."""
    t = book(name)
    estimates = t.attribution(CLEAN, CORRUPTED, wavy, base)
    for layer in range(t.layers):
        if name not in POST_NORMS and name != "granite":
            close(estimates["z", layer].sum(1), estimates["attn_out", layer])
            close(estimates["head_out", layer], estimates["z", layer])
        close(estimates["head_out", layer].sum(1), estimates["attn_out", layer])
        if ("q_in", layer) in estimates:
            readers = sum(estimates[c, layer].sum(1) for c in ("q_in", "k_in", "v_in"))
            close(readers, estimates["attn_in", layer])


def test_heads_do_not_add_up_under_a_post_norm() -> None:
    """Its scale depends on all heads together."""
    estimates = book("gemma2").attribution(CLEAN, CORRUPTED, wavy)
    assert (estimates["z", 1].sum(1) - estimates["attn_out", 1]).abs().max() > 1e-2


@everywhere()
def test_the_stream_adds_up(name: str) -> None:
    """The gradient at a block's input is that at its output, plus what its readers add."""
    t = book(name)
    g = t.gradients(CLEAN, wavy)
    for layer in range(t.layers):
        after, readers = g["resid_post", layer], g["attn_in", layer]
        if t.reference.places.parallel:
            readers = readers + g["mlp_in", layer]
        elif t.reference.places.mid:
            close(g["resid_mid", layer], after + g["mlp_in", layer])
            after = g["resid_mid", layer]
        else:
            continue
        close(g["resid_pre", layer], after + readers)
        close(g["attn_out", layer], after)
        close(g["mlp_out", layer], g["resid_post", layer])


def test_layer_norm_ignores_the_mean() -> None:
    """Law 14: so on GPT-2 the gradient's sum over d_model is 0 on the stream; with an RMSNorm it is not."""
    for name, holds in (("gpt2", True), ("gpt_neox", True), ("llama", False), ("gemma2", False)):
        gradients = book(name).gradients(CLEAN, wavy)
        for (component, _), gradient in gradients.items():
            if component in ("resid_pre", "resid_mid", "logits_in", "q_in", "mlp_in", "attn_out", "mlp_out"):
                assert (gradient.sum(-1).abs().max() < 1e-13) == holds


@everywhere()
def test_softmax_ignores_a_shift(name: str) -> None:
    """Law 15: the gradient at the scores sums to 0 over keys."""
    for (component, _), gradient in book(name).gradients(CLEAN, wavy).items():
        if component == "scores":
            close(gradient.sum(-1), torch.zeros_like(gradient[..., 0]), 1e-13)


@everywhere()
def test_attention_attribution_is_complete(name: str) -> None:
    """Law 16: per head Σ pattern · gradient = Σ z · gradient = Σ v · gradient, v being shared by a group."""
    t = book(name)
    values, gradients = t.values(CLEAN), t.gradients(CLEAN, wavy)
    product = {key: values[key] * gradients[key] for key in values if key[0] in ("pattern", "z", "v")}
    for layer in range(t.layers):
        by_head = product["z", layer].sum((0, 2))
        if ("pattern", layer) in product:
            close(product["pattern", layer].sum((1, 2)), by_head)
            groups = by_head.reshape(t.reference.kv_heads, -1).sum(1)
            close(product["v", layer].sum((0, 2)), groups)


@everywhere(more=())
def test_final_residual_with_a_frozen_norm_is_exact(name: str) -> None:
    """Law 17: with the last scale held at the base's, a patch of the last residual does what its estimate says."""
    t = book(name)
    metric = (lambda logits: 6 * torch.atanh(logits[-1, 7] / 6)) if name == "gemma2" else logit_diff  # undo the softcap
    at_base, at_other = t.values(CORRUPTED), t.values(CLEAN)
    frozen = t.attribution(CLEAN, CORRUPTED, metric, frozen=[("logits_in_scale", 0)])["logits_in", 0]
    held = Edit("logits_in_scale", 0, at_base["logits_in_scale", 0])
    patched = [Edit("logits_in", 0, at_other["logits_in", 0]), held]
    close(frozen.sum(), t.metric(CORRUPTED, metric, patched) - metric(at_base["logits", 0]))
    free = t.attribution(CLEAN, CORRUPTED, metric)["logits_in", 0]
    assert abs(free.sum() - frozen.sum()) > 1e-2


@everywhere(more=())
def test_what_a_scale_does_is_what_freezing_it_takes_away(name: str) -> None:
    """Gradient at the last residual = frozen gradient + gradient at the scale · gradient of the scale."""
    t = book(name)
    free, frozen = t.gradients(CLEAN, wavy), t.gradients(CLEAN, wavy, frozen=["norms"])
    (eps,) = [norm_parts(norm)[1] for norm, key in t.scale_of.items() if key == ("logits_in_scale", 0)]
    x = t.values(CLEAN)["logits_in", 0].requires_grad_()
    centred = x - x.mean(-1, keepdim=True) if name in ("gpt2", "gpt_neox") else x
    scale = (centred.pow(2).mean(-1) + eps).sqrt()
    (slope,) = torch.autograd.grad(scale, x, free["logits_in_scale", 0])
    close(free["logits_in", 0], frozen["logits_in", 0] + slope)


@everywhere(more=())
def test_frozen_things_let_nothing_through(name: str) -> None:
    t = book(name)
    frozen = t.gradients(CLEAN, wavy, frozen=["pattern"])
    for layer in range(t.layers):
        for component in ("q", "k", "scores", "q_in", "k_in"):
            assert (frozen[component, layer] == 0).all()
        assert (frozen["pattern", layer] != 0).any()
        assert (frozen["v_in", layer] != 0).any()
    cut = t.gradients(CLEAN, wavy, frozen=[("attn_out", 1), ("mlp_out", 1)])
    free = t.gradients(CLEAN, wavy)
    for component in ("z", "head_out", "q", "k", "v", "attn_in", "mlp_in", "mlp_act"):
        assert (cut[component, 1] == 0).all()
        assert (cut[component, 0] != 0).any()
        assert (cut[component, 2] == free[component, 2]).all()
    close(cut["resid_pre", 1], free["resid_post", 1])  # what is left of the block is its skip branch


def test_with_norms_and_patterns_frozen_only_the_mlp_is_curved() -> None:
    """All norms and patterns frozen, attention is linear: from an attention output on, with the MLPs cut, the
    estimate is exact."""
    t = book("gpt2")
    cut = [("mlp_out", layer) for layer in range(3)]
    estimates = t.attribution(CLEAN, CORRUPTED, logit_diff, frozen=["norms", "pattern", *cut])
    at_base, at_other = t.values(CORRUPTED), t.values(CLEAN)
    held = [Edit(*key, value=value) for key, value in at_base.items() if key[0] in (*SCALES, "pattern", "mlp_out")]
    for key in [("embed", 0), ("attn_out", 0), ("attn_out", 1), ("z", 1), ("v", 1), ("resid_pre", 2)]:
        patched = t.metric(CORRUPTED, logit_diff, [Edit(*key, value=at_other[key]), *held])
        close(patched - logit_diff(at_base["logits", 0]), estimates[key].sum())


def test_a_key_value_heads_gradient_is_the_sum_over_its_group() -> None:
    """Law 22: giving each query head a copy of its key and value head splits the gradient among the copies."""
    grouped = book("llama")
    copied = tiny_models.build(
        "llama", dtype=torch.float64, attn_implementation="eager", num_key_value_heads=tiny_models.HEADS
    )
    state = grouped.reference.model.state_dict()
    for key, value in state.items():
        if "k_proj" in key or "v_proj" in key:
            heads = value.reshape(tiny_models.KV_HEADS, -1, value.shape[-1])
            state[key] = heads.repeat_interleave(tiny_models.HEADS // tiny_models.KV_HEADS, 0).flatten(0, 1)
    copied.load_state_dict(state)
    split = Textbook(copied)
    close(split.values(CLEAN)["logits", 0], grouped.values(CLEAN)["logits", 0])
    whole, parts = grouped.gradients(CLEAN, wavy), split.gradients(CLEAN, wavy)
    for layer in range(3):
        for component in ("k", "v", "k_in", "v_in"):
            close(parts[component, layer].unflatten(1, (tiny_models.KV_HEADS, -1)).sum(2), whole[component, layer])
        close(parts["q", layer], whole["q", layer])


@everywhere(more=())
def test_other_sources(name: str) -> None:
    """Zero, the other run, and given values: three ways to name what is written; only the difference matters."""
    t = book(name)
    values, gradients = t.values(CORRUPTED), t.gradients(CORRUPTED, wavy)
    zero = t.attribution(CLEAN, CORRUPTED, wavy, source="zero")
    for layer in range(t.layers):
        close(zero["pattern", layer], -values["pattern", layer] * gradients["pattern", layer])
    mean = {("z", 1): values["z", 1].mean(0, keepdim=True).expand_as(values["z", 1])}
    given = t.attribution(CLEAN, CORRUPTED, wavy, source=mean)
    assert set(given) == {("z", 1)}
    close(given["z", 1], ((mean["z", 1] - values["z", 1]) * gradients["z", 1]).sum(-1))
    other = {("z", 1): t.values(CLEAN)["z", 1]}
    named = t.attribution(CLEAN, CORRUPTED, wavy)
    close(t.attribution(CLEAN, CORRUPTED, wavy, source=other)["z", 1], named["z", 1])
    assert not math.isnan(sum(float(x.sum()) for x in zero.values()))
