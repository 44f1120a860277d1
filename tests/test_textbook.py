"""Is the oracle of attribution right? Laws that hold exactly, slopes and limits that it must reach."""

from __future__ import annotations

import math
from functools import cache

import pytest
import tiny_models
import torch
from reference import DIMS, Edit, Reference
from textbook import SCALES, Key, Metric, Textbook, norm_parts, points
from torch import Tensor

from tracepatch import toys
from tracepatch.toys import tasks
from tracepatch.toys.wired import wired, wired_pairs

torch.set_num_threads(1)

CLEAN = torch.tensor([5, 9, 11, 3, 40, 22, 17, 8])
CORRUPTED = torch.tensor([5, 9, 31, 3, 50, 22, 16, 8])
BASES = ("corrupted", "clean")
MOSTLY_CORRUPTED = ("corrupted", pytest.param("clean", marks=pytest.mark.slow))
FOUR = ("gpt2", "llama", "gpt_neox", "gemma2")  # LayerNorm; GQA; parallel blocks; post-norms, softcaps and windows
MORE = tuple(n for n in tiny_models.ALL if n not in (*FOUR, *tiny_models.ENCODER_DECODER, "mamba"))
POST_NORMS = ("gemma2", "gemma3_text", "olmo2", "glm4", "exaone4")
# They rotate, attend or route in float32 whatever the dtype, so that small steps drown in its rounding.
SINGLE = ("gpt_neo", "gptj", "mpt", "cohere", "cohere2", "mixtral", "deepseek_v3")


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


@cache
def gradients_of(name: str, base: str = "clean") -> dict[Key, Tensor]:
    """The gradients of `wavy` in one of the two runs. Not to be changed."""
    return book(name).gradients(CLEAN if base == "clean" else CORRUPTED, wavy)


@cache
def estimates_of(name: str, base: str = "corrupted") -> dict[Key, Tensor]:
    """Attribution of `wavy`. Not to be changed."""
    return book(name).attribution(CLEAN, CORRUPTED, wavy, base)


def linear(name: str) -> Metric:
    """A metric that is linear in the logits before their softcap."""
    return (lambda logits: logit_diff(6 * torch.atanh(logits / 6))) if name == "gemma2" else logit_diff


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
    close(t.values(CLEAN)["logits", 0], own, 1e-13 if name == "gpt2" else 1e-5)


@everywhere()
def test_gradients_are_those_of_every_component(name: str) -> None:
    """Reading gradients changes no value, and there is one for everything that there is to patch, and for scales."""
    t = book(name)
    values, gradients = t.values(CLEAN), gradients_of(name)
    assert set(gradients) == set(values)
    assert {c for c, _ in values} - set(SCALES) == set(t.reference.components())
    assert all(gradients[key].shape == value.shape for key, value in values.items())
    inner = {c: sum(gradients[k].abs().sum() for k in gradients if k[0] == c) for c, _ in values}
    assert all(total > 0 for total in inner.values()), inner


@everywhere(more=tuple(n for n in MORE if n not in SINGLE))
@pytest.mark.parametrize("component", [c for c in (*DIMS, *SCALES) if c != "logits"])
def test_finite_differences(name: str, component: str) -> None:
    """(m(x + aΔ) − m(x)) / a -> gradient · Δ, with an error that shrinks like a."""
    t = book(name)
    at_base, at_other = t.values(CORRUPTED), t.values(CLEAN)
    gradients = gradients_of(name, "corrupted")
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
    rounding = 1e-13 if name in tiny_models.EXPERTS else 0  # tokens are sorted by expert
    for key, estimate in estimates_of(name).items():
        early = estimate[:, :2] if "dest" in DIMS.get(key[0], ()) else estimate[:2]
        assert (early.abs() <= rounding).all(), key
    gradients = t.gradients(CLEAN, lambda logits: logits[3, 7])
    for key, gradient in gradients.items():
        late = gradient[:, 4:] if "dest" in DIMS.get(key[0], ()) else gradient[4:]
        assert (late.abs() <= rounding).all(), key


@everywhere()
def test_the_same_prompt_twice_has_no_effect(name: str) -> None:
    assert all((estimate == 0).all() for estimate in book(name).attribution(CLEAN, CLEAN, wavy).values())


# ---------------------------------------------------------------------------------------------------- attribution


@everywhere()
@pytest.mark.parametrize("base", BASES)
def test_estimates_add_up(name: str, base: str) -> None:
    """Law 13: over heads to attention's output, over what attention reads to its input. Not under a post-norm."""
    t = book(name)
    estimates = estimates_of(name, base)
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
    estimates = estimates_of("gemma2")
    assert (estimates["z", 1].sum(1) - estimates["attn_out", 1]).abs().max() > 1e-2


@everywhere()
def test_the_stream_adds_up(name: str) -> None:
    """The gradient at a block's input is that at its output, plus what its readers add."""
    t = book(name)
    g = gradients_of(name)
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
        gradients = gradients_of(name)
        for (component, _), gradient in gradients.items():
            if component in ("resid_pre", "resid_mid", "logits_in", "q_in", "mlp_in", "attn_out", "mlp_out"):
                assert (gradient.sum(-1).abs().max() < 1e-13) == holds


@everywhere()
def test_softmax_ignores_a_shift(name: str) -> None:
    """Law 15: the gradient at the scores sums to 0 over keys, but for sinks, which are keys too."""
    for (component, _), gradient in gradients_of(name).items():
        if component == "scores":
            assert (gradient.sum(-1).abs().max() < 1e-13) == (name != "gpt_oss")


@everywhere()
def test_attention_attribution_is_complete(name: str) -> None:
    """Law 16: per head Σ pattern · gradient = Σ z · gradient = Σ v · gradient, v being shared by a group."""
    t = book(name)
    values, gradients = t.values(CLEAN), gradients_of(name)
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
    metric = linear(name)
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
    free, frozen = gradients_of(name), t.gradients(CLEAN, wavy, frozen=["norms"])
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
    free = gradients_of(name)
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
    values, gradients = t.values(CORRUPTED), gradients_of(name, "corrupted")
    zero = t.attribution(CLEAN, CORRUPTED, wavy, source="zero")
    for layer in range(t.layers):
        close(zero["pattern", layer], -values["pattern", layer] * gradients["pattern", layer])
    mean = {("z", 1): values["z", 1].mean(0, keepdim=True).expand_as(values["z", 1])}
    given = t.attribution(CLEAN, CORRUPTED, wavy, source=mean)
    assert set(given) == {("z", 1)}
    close(given["z", 1], ((mean["z", 1] - values["z", 1]) * gradients["z", 1]).sum(-1))
    other = {("z", 1): t.values(CLEAN)["z", 1]}
    named = estimates_of(name)
    close(t.attribution(CLEAN, CORRUPTED, wavy, source=other)["z", 1], named["z", 1])
    assert not math.isnan(sum(float(x.sum()) for x in zero.values()))


# ------------------------------------------------------------------------------------------------------------- exact


@everywhere(more=())
@pytest.mark.parametrize("base", MOSTLY_CORRUPTED)
def test_exact_effects_are_the_references(name: str, base: str) -> None:
    """One site after the other, as `tests/reference.py` patches it; in float32 norms where the model has them."""
    t = book(name)
    plain = Reference(t.reference.model)
    ids, other_ids = (CORRUPTED, CLEAN) if base == "corrupted" else (CLEAN, CORRUPTED)
    keys = [("z", 1), ("resid_pre", 2), ("pattern", 0), ("k_in", 1)]
    effects = t.exact(CLEAN, CORRUPTED, wavy, keys, base, positions=[4])
    assert all(
        torch.isfinite(effects[key]).sum() == n
        for key, n in zip(keys, (4, 1, 4 * 5, t.reference.kv_heads), strict=True)
    )
    at_base, at_other = plain.values(ids), plain.values(other_ids)
    for key, position, unit in [("z", 4, 3), ("k_in", 4, 1)]:
        edit = Edit(key, 1, at_other[key, 1][[position], unit], [position], unit)
        after = wavy(plain.logits(ids, [edit]))
        close(effects[key, 1][position, unit], after - wavy(at_base["logits", 0]), 1e-5)
    edit = Edit("pattern", 0, at_other["pattern", 0][2, 4:5, 2:3], [4], 2, sources=[2])
    close(effects["pattern", 0][2, 4, 2], wavy(plain.logits(ids, [edit])) - wavy(at_base["logits", 0]), 1e-5)
    edit = Edit("resid_pre", 2, at_other["resid_pre", 2][[4]], [4])
    close(effects["resid_pre", 2][4], wavy(plain.logits(ids, [edit])) - wavy(at_base["logits", 0]), 1e-5)
    whole = t.exact(CLEAN, CORRUPTED, wavy, [("resid_pre", 1), ("embed", 0)], base, whole=True)
    for effect in whole.values():
        close(effect, t.metric(other_ids, wavy) - t.metric(ids, wavy))


# --------------------------------------------------------------------------------------------------------------- AtP*


@everywhere(more=())
@pytest.mark.parametrize("base", MOSTLY_CORRUPTED)
def test_qk_fix_is_exact_if_all_after_the_softmax_is_affine(name: str, base: str) -> None:
    """Law 23: in the last layer, with its MLP and all scales held, the pattern alone is curved."""
    t, metric = book(name), linear(name)
    last = t.layers - 1
    ids, other_ids = (CORRUPTED, CLEAN) if base == "corrupted" else (CLEAN, CORRUPTED)
    at_base, at_other = t.values(ids), t.values(other_ids)
    constant = [("mlp_out", last), *[key for key in at_base if key[0] in SCALES]]
    held = [Edit(*key, at_base[key]) for key in constant]
    for whole in (False, True):
        source = {(component, last): at_other[component, last] for component in "qk"}
        fixed = t.qk_fix(CLEAN, CORRUPTED, metric, base, source, constant, whole)
        for component in ("q", "k"):
            for unit in range(fixed[component, last].shape[-1]):
                chosen = list(range(8)) if whole else [7 if component == "q" else 4]
                edit = Edit(component, last, at_other[component, last][chosen, unit], chosen, unit)
                effect = t.metric(ids, metric, [edit, *held]) - metric(at_base["logits", 0])
                assert abs(effect) > 1e-6
                estimate = fixed[component, last][unit] if whole else fixed[component, last][chosen[0], unit]
                close(estimate, effect)


@everywhere(more=())
def test_qk_fix_of_a_small_change_is_attribution(name: str) -> None:
    """To first order swapping a query moves the pattern as its gradient says."""
    t = book(name)
    at_base, change, a = t.values(CORRUPTED), t.change(CORRUPTED, CLEAN), 1e-6
    keys = [("q", 1), ("k", 1)]
    plain = estimates_of(name)
    fixed = t.qk_fix(CLEAN, CORRUPTED, wavy, source={key: at_base[key] + a * change[key] for key in keys})
    large = t.qk_fix(CLEAN, CORRUPTED, wavy, source={key: at_base[key] + change[key] for key in keys})
    for key in keys:
        close(fixed[key] / a, plain[key], 1e-4)
        assert (large[key] - plain[key]).abs().max() > 1e-4


@everywhere(more=())
def test_all_queries_of_a_head_are_its_queries_one_by_one(name: str) -> None:
    """A query moves its own row of the pattern only; keys share rows."""
    t = book(name)
    source = {key: t.values(CLEAN)[key] for key in [("q", 1), ("k", 1)]}
    one_by_one = t.qk_fix(CLEAN, CORRUPTED, wavy, source=source)
    at_once = t.qk_fix(CLEAN, CORRUPTED, wavy, source=source, whole=True)
    close(at_once["q", 1], one_by_one["q", 1].sum(0))
    assert (at_once["k", 1] - one_by_one["k", 1].sum(0)).abs().max() > 1e-4


@everywhere()
def test_grad_drop_in_the_last_layer_is_the_magnitude(name: str) -> None:
    """Dropping the layer itself leaves nothing, dropping an earlier one takes nothing: hence 1 / (layers − 1)."""
    t = book(name)
    last = t.layers - 1
    plain, drop = estimates_of(name), t.grad_drop(CLEAN, CORRUPTED, wavy)
    for component in ("attn_in", "q", "k", "v", "z", "head_out", "attn_out", "mlp_in", "mlp_act", "mlp_out"):
        if (component, last) in plain:
            close(drop[component, last], plain[component, last].abs())
    close(drop["logits_in", 0], plain["logits_in", 0].abs() * t.layers / last)


@everywhere(more=())
def test_grad_drop_counts_each_dropped_layer_once(name: str) -> None:
    """In the middle layer of three: what the last layer does not carry, and everything, by 2."""
    t = book(name)
    plain = estimates_of(name)
    dropped, drop = t.dropped(CLEAN, CORRUPTED, wavy), t.grad_drop(CLEAN, CORRUPTED, wavy)
    assert len(dropped) == 3
    for component in ("q", "v", "z", "mlp_act", "mlp_out", "head_out"):
        key = (component, 1)
        close(dropped[0][key], plain[key])
        assert (dropped[1][key] == 0).all()
        close(drop[key], (plain[key].abs() + dropped[2][key].abs()) / 2)
    of_keys = {("k", 2): t.values(CLEAN)["k", 2]}
    fixed = t.qk_fix(CLEAN, CORRUPTED, wavy, source=of_keys, whole=True)
    drop = t.grad_drop(CLEAN, CORRUPTED, wavy, method="qk_fix", source=of_keys, whole=True)
    close(drop["k", 2], fixed["k", 2].abs())


def test_what_a_dropped_layer_leaves_is_what_its_constants_leave() -> None:
    """The slope of the metric with the last layer's outputs held at the base's values, by finite differences."""
    t, a = book("gemma2"), 1e-5
    at_base, change = t.values(CORRUPTED), t.change(CORRUPTED, CLEAN)
    held = [Edit(*key, at_base[key]) for key in [("attn_out", 2), ("mlp_out", 2)]]
    left = t.dropped(CLEAN, CORRUPTED, wavy)[2]
    for key in [("z", 1), ("mlp_act", 0), ("resid_pre", 2), ("embed", 0)]:
        after = t.metric(CORRUPTED, wavy, [Edit(*key, a * change[key], mode="add"), *held])
        close((after - wavy(at_base["logits", 0])) / a, left[key].sum(), 1e-3)


# ----------------------------------------------------------------------------------------------- integrated gradients


@everywhere(more=())
@pytest.mark.parametrize("base", MOSTLY_CORRUPTED)
def test_one_step_at_the_base_is_attribution(name: str, base: str) -> None:
    t = book(name)
    plain = estimates_of(name, base)
    for key, estimate in t.integrated(CLEAN, CORRUPTED, wavy, "inputs", None, base, 1, "left").items():
        close(estimate, plain[key])
    for along in ("component", "site"):
        keys = [("resid_pre", 1), ("z", 1), ("k", 0)]
        found = t.integrated(CLEAN, CORRUPTED, wavy, along, keys, base, 1, "left", positions=[4])
        assert all((found[key] - plain[key])[4].abs().max() < 1e-10 for key in keys)


@everywhere(more=())
@pytest.mark.parametrize("cut", ["inputs", "resid_pre"])
def test_integrated_gradients_are_complete_over_a_cut(name: str, cut: str) -> None:
    """Law 20: their sum goes to m(clean) − m(corrupted), with an error that shrinks like 1/n² at midpoints."""
    t = book(name)
    whole = t.metric(CLEAN, wavy) - t.metric(CORRUPTED, wavy)

    def error(rule: str, n: int) -> Tensor:
        key = ("embed", 0) if cut == "inputs" else (cut, 1)
        along = "inputs" if cut == "inputs" else "component"
        return t.integrated(CLEAN, CORRUPTED, wavy, along, [key], n=n, rule=rule)[key].sum() - whole

    fine = error("midpoint", 40)
    assert abs(fine) < 2e-3 * abs(whole)
    assert abs(fine) < 0.3 * abs(error("midpoint", 20))
    if cut == "resid_pre":
        assert 0.4 < error("left", 20) / error("left", 10) < 0.6


def test_points_of_the_rules() -> None:
    """Weights sum to 1; midpoints and trapezoids are right for straight slopes, the others off by half a step."""
    assert points(4, "left") == [(0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]
    assert points(1, "trapezoid") == [(0.0, 0.5), (1.0, 0.5)]
    for rule, mean in [("left", 0.4), ("right", 0.6), ("midpoint", 0.5), ("trapezoid", 0.5)]:
        assert math.isclose(sum(weight for _, weight in points(5, rule)), 1)
        assert math.isclose(sum(t * weight for t, weight in points(5, rule)), mean)


@everywhere(more=())
@pytest.mark.parametrize("base", MOSTLY_CORRUPTED)
def test_one_sites_integrated_gradient_converges_to_its_effect(name: str, base: str) -> None:
    t = book(name)
    for key in [("z", 1), ("attn_out", 0), ("pattern", 1)]:
        where = [2 if key[0] == "pattern" else 4]
        if key[0] == "pattern" and name != "gpt2":
            continue  # twelve lines
        effect = t.exact(CLEAN, CORRUPTED, wavy, [key], base, positions=where)[key]
        plain = estimates_of(name, base)[key]
        errors = {"plain": plain - effect}
        for n in (4, 8):
            errors[n] = t.integrated(CLEAN, CORRUPTED, wavy, "site", [key], base, n, positions=where)[key] - effect
        worst = {n: error.nan_to_num().abs().max() for n, error in errors.items()}
        assert worst[8] < 0.5 * worst[4]
        assert worst[8] < 0.1 * worst["plain"]
    whole = t.exact(CLEAN, CORRUPTED, wavy, [("attn_out", 1)], base, whole=True)["attn_out", 1]
    got = t.integrated(CLEAN, CORRUPTED, wavy, "component", [("attn_out", 1)], base, n=20)["attn_out", 1]
    assert abs(got.sum() - whole) < 5e-3 * abs(whole)


@everywhere(more=())
def test_the_line_of_the_inputs_has_no_direction(name: str) -> None:
    """From clean to corrupted every estimate changes its sign; left becomes right."""
    t = book(name)
    for rule, mirrored in [("midpoint", "midpoint"), ("left", "right")]:
        there = t.integrated(CLEAN, CORRUPTED, wavy, n=3, rule=rule)
        back = t.integrated(CLEAN, CORRUPTED, wavy, base="clean", n=3, rule=mirrored)
        assert all((there[key] + back[key]).abs().max() < 1e-9 for key in there)


# ---------------------------------------------------------------------------------------------------------- attention


@everywhere(more=())
def test_attention_attribution_is_minus_the_estimate_of_zeroing(name: str) -> None:
    t = book(name)
    zeroed = t.attribution(CLEAN, CORRUPTED, wavy, "clean", source="zero")
    for key, product in t.attention_attribution(CLEAN, wavy).items():
        close(product, -zeroed[key])
        assert product.abs().max() > 1e-3


@everywhere(more=())
@pytest.mark.parametrize("base", BASES)
def test_a_renormalised_weight(name: str, base: str) -> None:
    """Against the closed form, and against the slope of the metric when a whole row is written."""
    t, a = book(name), 1e-6
    ids = CORRUPTED if base == "corrupted" else CLEAN
    at_base, change = t.values(ids), t.change(ids, CLEAN if base == "corrupted" else CORRUPTED)
    gradients = gradients_of(name, base)
    estimates = t.pattern_patching(CLEAN, CORRUPTED, wavy, base, "renormalised")
    key = ("pattern", 1)
    p, g, d = at_base[key], gradients[key], change[key]
    share = 1 / (1 + d)
    mean = (p * g).sum(-1, keepdim=True)
    close(estimates[key], torch.where(p > 0, share * (mean + d * g) - mean, 0.0))
    assert (estimates[key][:, 0].abs() < 1e-12).all()  # the only weight of its row
    small = t.pattern_patching(CLEAN, CORRUPTED, wavy, base, "renormalised", {key: p + a * d})[key]
    row = p[2, 5] + a * d[2, 5] * torch.eye(8)[3]
    written = Edit("pattern", 1, (row / row.sum())[None], [5], 2)
    slope = (t.metric(ids, wavy, [written]) - t.metric(ids, wavy)) / a
    close(small[2, 5, 3] / a, slope, 1e-4)


@everywhere(more=())
def test_the_value_bias_is_what_all_sources_share(name: str) -> None:
    """A row that keeps its sum does not move it: over a destination both gradients say the same; a weight alone does."""
    t = book(name)
    plain = t.pattern_patching(CLEAN, CORRUPTED, wavy, kind="plain")
    centred = t.pattern_patching(CLEAN, CORRUPTED, wavy, kind="centred")
    assert set(plain) == {("pattern", layer) for layer in range(3)}
    for key in plain:
        close(centred[key].sum(-1), plain[key].sum(-1))
        has_bias = name in ("gpt2", "gpt_neox")
        assert ((centred[key] - plain[key]).abs().max() > 1e-3) == has_bias
    assert all((t.value_bias(layer) != 0).any() == has_bias for layer in range(3))
    if name == "gpt2":
        bias = t.reference.blocks[1].attn.c_attn.bias[-32:].reshape(4, 8)
        close(t.value_bias(1), bias.detach())


@everywhere(more=())
def test_plain_pattern_patching_is_attribution(name: str) -> None:
    t = book(name)
    plain, estimates = t.pattern_patching(CLEAN, CORRUPTED, wavy), estimates_of(name)
    assert all((plain[key] == estimates[key]).all() for key in plain)


@everywhere(more=())
@pytest.mark.parametrize("base", BASES)
def test_values_flow_along_the_pattern(name: str, base: str) -> None:
    """Summed over destinations and the heads of a group: what patching the values is estimated to do."""
    t = book(name)
    estimates = estimates_of(name, base)
    for key, flow in t.value_flow(CLEAN, CORRUPTED, wavy, base).items():
        by_source = flow.sum(1).unflatten(0, (t.reference.kv_heads, -1)).sum(1)  # [kv_head, src]
        close(by_source.T, estimates[key])
        assert (flow.triu(1) == 0).all()


# ----------------------------------------------------------------------------------------------- direct contributions


@everywhere(
    more=("opt", "gpt_neo", "gptj", "qwen2", "qwen3", "gemma", "phi", "stablelm", "olmo2", "starcoder2", "glm4")
)
def test_direct_contributions_are_complete(name: str) -> None:
    """Law 18: embeddings, heads, MLPs and all biases are the whole metric."""
    t, metric = book(name), linear(name)
    found = t.direct(CLEAN, lambda logits: logit_diff(logits) + 2 * logits[3, 5])
    capped = metric(t.values(CLEAN)["logits", 0]) + 2 * linear_logit(name, t.values(CLEAN)["logits", 0][3, 5])
    close(sum(value.sum() for value in found.values()), capped)
    assert (found["head_out", 1] != 0).any(0).all()
    if name == "gpt2":
        assert {"pos_embed", "attn_bias", "final_norm_bias"} < {component for component, _ in found}


def linear_logit(name: str, logit: Tensor) -> Tensor:
    """A logit before its softcap."""
    return 6 * torch.atanh(logit / 6) if name == "gemma2" else logit


@everywhere(more=())
def test_difference_of_direct_contributions_at_one_scale(name: str) -> None:
    """Law 17 by parts: what freezing the last norm estimates is the difference of what the writers bring."""
    t, metric = book(name), linear(name)
    estimates = t.attribution(CLEAN, CORRUPTED, metric, frozen=[("logits_in_scale", 0)])["logits_in", 0]
    scales = [t.values(ids)["logits_in_scale", 0][-1] for ids in (CLEAN, CORRUPTED)]
    biases = ("final_norm_bias", "unembed_bias")
    at_clean, at_corrupted = (t.direct(ids, logit_diff) for ids in (CLEAN, CORRUPTED))
    at_one_scale = [
        sum(value.sum() for key, value in found.items() if key[0] not in biases) * scale / scales[1]
        for found, scale in zip((at_clean, at_corrupted), scales, strict=True)
    ]
    close(at_one_scale[0] - at_one_scale[1], estimates.sum())


# ---------------------------------------------------------------------------------------------------------------- RelP


@everywhere(more=())
def test_rules_of_relp_by_themselves(name: str) -> None:
    """No rule is attribution; the rule for norms freezes norms, and that for patterns patterns."""
    t = book(name)
    for rules, frozen in [((), ()), (("norm",), ("norms",)), (("pattern",), ("pattern",))]:
        got = t.relp(CLEAN, CORRUPTED, wavy, rules=rules)
        expected = t.attribution(CLEAN, CORRUPTED, wavy, frozen=frozen)
        assert all((got[key] == expected[key]).all() for key in got)


@everywhere(more=())
def test_relp_conserves_relevance(name: str) -> None:
    """With every rule the model is linear in each cut: without biases Σ value · coefficient is the metric itself."""
    model = tiny_models.build(name, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
    t, metric = Textbook(model), linear(name)
    values = t.values(CLEAN)
    cuts = [(c, layer) for layer in range(3) for c in ("resid_pre", "resid_post", "resid_mid") if (c, layer) in values]
    gated = name in ("llama", "gemma2")
    for rules, holds in [
        (("norm", "identity", "half", "pattern"), True),
        (("norm", "identity", "pattern"), not gated),
        (("norm", "identity", "half"), False),
        (("norm", "half", "pattern"), False),
        (("identity", "half", "pattern"), False),
    ]:
        coefficients = t.gradients(CLEAN, metric, rules=rules)
        sums = torch.stack([(values[cut] * coefficients[cut]).sum() for cut in [*cuts, ("logits_in", 0)]])
        error = (sums - metric(values["logits", 0])).abs().max()
        assert (error < 1e-10) == holds, rules


@everywhere(more=())
def test_the_half_rule_halves_what_enters_the_product(name: str) -> None:
    t = book(name)
    plain, halved = gradients_of(name), t.gradients(CLEAN, wavy, rules=["half"])
    factor = 0.5 if name in ("llama", "gemma2") else 1.0
    close(halved["mlp_act", 2], plain["mlp_act", 2])
    close(halved["mlp_in", 2], factor * plain["mlp_in", 2])


def test_rules_that_a_block_cannot_follow_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is called"):
        book("gpt2").relp(CLEAN, CORRUPTED, wavy, rules=["identity", "three quarters"])
    with pytest.raises(ValueError, match="no rules for Phi3"):
        book("phi3").relp(CLEAN, CORRUPTED, wavy)
    with pytest.raises(ValueError, match="no .*attn_out.*7"):
        book("gpt2").gradients(CLEAN, wavy, frozen=[("attn_out", 7)])


# --------------------------------------------------------------------------------------------------------------- edges


@everywhere(more=("qwen3", "olmo2", "phi", "starcoder2"))
@pytest.mark.parametrize("base", BASES)
def test_edges_add_up(name: str, base: str) -> None:
    """Law 21: over readers to the writer's estimate, over writers to the estimate of what the reader reads."""
    t = book(name)
    estimates = estimates_of(name, base)
    edges = t.edges(CLEAN, CORRUPTED, wavy, base)

    def of(node: tuple) -> Tensor:
        component, layer, unit = node
        return estimates[component, layer] if unit is None else estimates[component, layer][:, unit]

    for writer in t.writers():
        close(sum(score for (source, _), score in edges.items() if source == writer), of(writer))
    for reader in t.readers():
        close(sum(score for (_, target), score in edges.items() if target == reader), of(reader))


@everywhere(more=())
@pytest.mark.parametrize("base", BASES)
def test_an_edges_estimate_is_the_slope_of_its_effect(name: str, base: str) -> None:
    t, a = book(name), 1e-6
    edges = t.edges(CLEAN, CORRUPTED, wavy, base)
    chosen = [
        (("embed", 0, None), ("q_in", 1, 3)),
        (("head_out", 0, 2), ("k_in", 1, 1)),
        (("head_out", 1, 3), ("v_in", 2, 0)),
        (("mlp_out", 0, None), ("v_in", 2, 1)),
        (("head_out", 0, 1), ("mlp_in", 1, None)),
        (("mlp_out", 1, None), ("logits_in", 0, None)),
    ]
    for writer, reader in chosen:
        slope = t.exact_edge(CLEAN, CORRUPTED, wavy, writer, reader, base, share=a) / a
        close(slope, edges[writer, reader].sum(), 1e-4)
        slope = t.exact_edge(CLEAN, CORRUPTED, wavy, writer, reader, base, positions=[4], share=a) / a
        close(slope, edges[writer, reader][4], 1e-4)


def test_which_edges_there_are() -> None:
    """Parallel blocks have no edge from a head to the MLP beside it; nobody reads what is written later."""
    layers, heads = 3, 4
    for name, parallel in (("gpt2", False), ("gpt_neox", True)):
        t = book(name)
        edges = set(t.edges(CLEAN, CORRUPTED, wavy))
        for (writer, layer, _), (reader, later, _) in edges:
            if writer != "embed" and reader != "logits_in":
                beside = (writer, reader, layer) == ("head_out", "mlp_in", later)
                assert layer < later or (beside and not parallel)
        readers = [layer * (heads + 1) + 1 for layer in range(layers)]  # writers before each layer
        expected = sum(n * 3 * heads + n + (0 if parallel else heads) for n in readers) + 1 + layers * (heads + 1)
        assert len(edges) == expected
    with pytest.raises(ValueError, match="does not read"):
        book("gpt2").exact_edge(CLEAN, CORRUPTED, wavy, ("mlp_out", 1, None), ("q_in", 1, 0))


@everywhere(more=())
@pytest.mark.parametrize("base", MOSTLY_CORRUPTED)
def test_integrated_edges(name: str, base: str) -> None:
    """One step at the base is EAP; edges of a writer sum to its integrated gradients, along the same line."""
    t = book(name)
    plain = t.edges(CLEAN, CORRUPTED, wavy, base)
    for method in ("ig_inputs", "ig_own"):
        one = t.edges(CLEAN, CORRUPTED, wavy, base, method, n=1)
        assert max((one[edge] - plain[edge]).abs().max() for edge in plain) < 1e-10
    by_method = {m: t.edges(CLEAN, CORRUPTED, wavy, base, m, 2, "right") for m in ("ig_inputs", "ig_own")}
    lines = sorted({writer[:2] for writer in t.writers()})
    integrated = {
        "ig_inputs": t.integrated(CLEAN, CORRUPTED, wavy, "inputs", lines, base, 2, "right"),
        "ig_own": t.integrated(CLEAN, CORRUPTED, wavy, "component", lines, base, 2, "right"),
    }
    for method, edges in by_method.items():
        for component, layer, unit in t.writers():
            expected = integrated[method][component, layer]
            expected = expected if unit is None else expected[:, unit]
            got = sum(score for (writer, _), score in edges.items() if writer == (component, layer, unit))
            close(got, expected)


@everywhere(more=())
def test_published_integrated_activations_average_over_all_lines(name: str) -> None:
    """Each of their passes counts for every edge: the mean over the lines of the embedding, heads and MLPs."""
    t = book(name)
    edges = t.edges(CLEAN, CORRUPTED, wavy, "clean", "ig_activations", n=2)
    at_base, change = t.values(CLEAN), t.change(CLEAN, CORRUPTED)
    total = 0
    for key in [("embed", 0), *[(c, layer) for layer in range(3) for c in ("head_out", "mlp_out")]]:
        for moved in (0.0, 0.5):
            edit = Edit(*key, at_base[key] + moved * change[key])
            total = total + t.gradients(CLEAN, wavy, edits=[edit], keys=[("k_in", 2)])["k_in", 2][:, 1]
    expected = (change["head_out", 1][:, 3] * total / 14).sum(-1)
    close(edges[("head_out", 1, 3), ("k_in", 2, 1)], expected)


# ------------------------------------------------------------------------------------------------- toys, real answers


@cache
def prompt(name: str) -> tuple[Textbook, Tensor, Tensor, int, int]:
    """A trained toy and one IOI pair: clean and corrupted ids, answer, wrong answer."""
    model, tokenizer = toys.load_module(name)
    model.set_attn_implementation("eager")
    made = tasks.ioi(1, seed=3, templates=tasks.TEMPLATES[:1])
    clean, corrupted = (torch.tensor(tokenizer(text[0]).input_ids) for text in (made.clean, made.corrupted))
    answers = [tokenizer(text[0].strip(), add_special_tokens=False).input_ids[0] for text in (made.answer, made.wrong)]
    return Textbook(model.double()), clean, corrupted, *answers


@pytest.mark.parametrize("name", toys.NAMES)
def test_trained_toys(name: str) -> None:
    """Completeness where it matters: a model that knows the answer, by 5 logits at least."""
    t, clean, corrupted, answer, wrong = prompt(name)

    def difference(logits: Tensor) -> Tensor:
        return logits[-1, answer] - logits[-1, wrong]

    whole = t.metric(clean, difference) - t.metric(corrupted, difference)
    assert whole > 10
    edges = t.edges(clean, corrupted, difference)
    writers = t.attribution(clean, corrupted, difference)
    total = sum(writers[key].sum() for key in {writer[:2] for writer, _ in edges})
    close(sum(score.sum() for score in edges.values()), total)
    integrated = t.integrated(clean, corrupted, difference, "component", [("resid_pre", 1)], n=40)["resid_pre", 1]
    assert abs(integrated.sum() - whole) < 0.01 * whole
    if t.reference.model.config.to_dict().get("final_logit_softcapping") is None:
        parts = t.direct(clean, difference)
        close(sum(part.sum() for part in parts.values()), t.metric(clean, difference))


# ------------------------------------------------------------------------------------------------------- the wired one


@cache
def wired_book(saturation: float) -> tuple[Textbook, Tensor, Tensor, int, int]:
    """The wired model and a pair: clean and corrupted ids, answer, wrong answer."""
    model, tokenizer = wired(saturation)
    model.set_attn_implementation("eager")
    made = wired_pairs(1, seed=1)
    clean, corrupted = (torch.tensor(tokenizer(text[0]).input_ids) for text in (made.clean, made.corrupted))
    answers = [tokenizer(text[0].strip()).input_ids[0] for text in (made.answer, made.wrong)]
    return Textbook(model.double()), clean, corrupted, *answers


@pytest.mark.parametrize("saturation", [1.0, 2.0, 4.0, 6.0, 12.0, 30.0])
def test_attribution_fails_as_attention_saturates_and_qk_fix_does_not(saturation: float) -> None:
    """Law 23: L0H1 has the effect 1; its estimate is what the softmax's slope makes of it. QK-fix is exactly 1."""
    t, clean, corrupted, answer, wrong = wired_book(saturation)

    def metric(logits: Tensor) -> Tensor:
        return logits[-1, answer] - logits[-1, wrong]

    whole = t.metric(clean, metric) - t.metric(corrupted, metric)
    edit = Edit("head_out", 0, t.values(clean)["head_out", 0][:, 1], unit=1)
    close((t.metric(corrupted, metric, [edit]) - t.metric(corrupted, metric)) / whole, torch.tensor(1.0).double())

    fixed = t.qk_fix(clean, corrupted, metric, whole=True)["k", 1] / whole
    assert abs(fixed[2] - 1) < 1e-9
    assert abs(fixed[[0, 1, 3]]).max() < 1e-12

    estimates = t.attribution(clean, corrupted, metric)
    got = estimates["head_out", 0][:, 1].sum() / whole
    z = math.exp(saturation) + len(clean) - 1
    p, q = 1 / z, math.exp(saturation) / z
    expected = saturation * (p * (1 - p) + 2 * p * q + q * (1 - q)) / (2 * (q - p))
    assert abs(got - expected) < 1e-6
    assert abs(estimates["k", 1][:, 2].sum() / whole - expected) < 1e-6
    integrated = t.integrated(clean, corrupted, metric, "component", [("k", 1)], n=40)["k", 1][:, 2].sum() / whole
    assert abs(integrated - 1) < 0.01


def test_exactly_three_edges_of_the_wired_model_matter() -> None:
    t, clean, corrupted, answer, wrong = wired_book(4.0)

    def metric(logits: Tensor) -> Tensor:
        return logits[-1, answer] - logits[-1, wrong]

    whole = t.metric(clean, metric) - t.metric(corrupted, metric)
    edges = t.edges(clean, corrupted, metric)
    assert len(edges) == 110
    effects = {edge: t.exact_edge(clean, corrupted, metric, *edge) / whole for edge in edges}
    circuit = {
        (("embed", 0, None), ("v_in", 0, 1)),
        (("head_out", 0, 1), ("k_in", 1, 2)),
        (("head_out", 1, 2), ("logits_in", 0, None)),
    }
    assert {edge for edge, effect in effects.items() if abs(effect) > 1e-6} == circuit
    assert all(abs(effects[edge] - 1) < 1e-9 for edge in circuit)
