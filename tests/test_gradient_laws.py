"""Laws that gradients and estimates obey exactly, whatever the model has learned; and where estimates fail, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import toy
from test_attribution import FOUR, PAIRS, model_of

import tracepatch as tp
from tracepatch.toys.wired import wired, wired_pairs

DOUBLE = {"gpt2": 1e-12, "llama": 1e-5, "gpt_neox": 1e-5, "gemma2": 1e-5}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_heads_sum_to_attention(name: str) -> None:
    """Σ over heads of AtP(z) = AtP(attn_out): the output bias cancels (law 13). Not under post-norms."""
    by: Any = ("layer", "pos")
    heads = tp.attribute(model_of(name), PAIRS, "z", by=by)["estimate"]
    whole = tp.attribute(model_of(name), PAIRS, "attn_out", by=by)["estimate"]
    np.testing.assert_allclose(heads, whole, atol=DOUBLE[name])
    fine = tp.attribute(model_of(name), PAIRS, "z", by=("layer", "pos", "head"))["estimate"]
    np.testing.assert_allclose(fine.sum("head", skipna=False), heads, atol=DOUBLE[name])


def test_under_post_norms_they_do_not() -> None:
    by: Any = ("layer", "pos")
    heads, whole = (tp.attribute(model_of("gemma2"), PAIRS, c, by=by)["estimate"] for c in ("z", "attn_out"))
    assert abs(heads - whole).max() > 1e-2
    written = tp.attribute(model_of("gemma2"), PAIRS, "head_out", by=by)["estimate"]
    np.testing.assert_allclose(written, whole, atol=1e-5)  # without biases, heads behind the norm are all that it adds


def test_a_layernorm_hides_the_mean_from_every_gradient() -> None:
    """The gradient's sum over d_model is 0 at every residual site (law 14). Not so under RMSNorm."""
    for name, hidden in (("gpt2", True), ("llama", False)):
        found = tp.gradients(model_of(name), PAIRS, components=("resid_pre", "resid_mid", "logits_in"))
        sums = [
            abs(found.gradient(c, 1 if c != "logits_in" else 0).sum("d_model")).max().item() for c in found.components
        ]
        assert (max(sums) < 1e-12) is hidden, sums


@pytest.mark.parametrize("name", FOUR)
def test_a_softmax_hides_the_mean_of_its_scores(name: str) -> None:
    """The gradient at scores sums to 0 over the keys of each destination (law 15)."""
    found = tp.gradients(model_of(name), PAIRS, components=("scores",))
    for layer in range(3):
        gradient = found.gradient("scores", layer)
        assert abs(gradient.sum("src")).max() < 1e-6
        assert abs(gradient).max() > 1e-4 or layer == 2


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("component", ["embed", "resid_pre", "attn_out"])
def test_integrated_gradients_over_a_full_cut_are_the_whole(name: str, component: str) -> None:
    """They sum to the effect of patching all of it, with an error of O(1/n²) (law 20)."""
    by: Any = ("pos",) if component == "embed" else ("layer", "pos")
    only = {} if component == "embed" else {"layer": [1]}
    with tp.patching(model_of(name), PAIRS, checks=False) as p, p.row(name="whole"):
        site = (slice(None),) if component == "embed" else (1, slice(None))
        getattr(p.corrupted, component)[site] = getattr(p.clean, component)[site]
    exact = p.run()["effect"].sel(name="whole")
    errors = []
    for steps in (5, 20):
        how = tp.IntegratedGradients(steps, along="layer")
        found = tp.attribute(model_of(name), PAIRS, component, by=by, only=only, estimator=how)
        errors.append(abs(found["estimate"].sum(["pos", *(["layer"] if only else [])]) - exact).max().item())
    assert errors[1] < 5e-3 * max(1.0, abs(exact).max().item())
    assert errors[1] < errors[0] / 6 or errors[0] < 1e-5


@pytest.mark.parametrize("saturation", [1.0, 4.0, 12.0, 30.0])
def test_where_attention_is_saturated_the_gradient_sees_nothing_and_the_fixed_key_everything(saturation: float) -> None:
    """On the wired model a previous-token head has the effect 1 at every saturation (law 23; B5)."""
    module, tokenizer = wired(saturation)
    model = tp.load(module.double(), tokenizer, name="wired")
    made = wired_pairs(6)
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    naive = tp.attribute(model, pairs, ("z",), by=("layer", "head"))
    share = float(naive["normalized"].sel(layer=0, head=1).mean())
    expected = {1.0: 1.03, 4.0: 0.53, 12.0: 0.0007, 30.0: 0.0}[saturation]
    assert abs(share - expected) < 0.01, "as toys/wired.py derives it"
    keys = tp.attribute(model, pairs, "k", estimator=tp.AtPStar())["normalized"].sel(layer=1, kv_head=2)
    np.testing.assert_allclose(keys, 1, atol=1e-6)
    plain = tp.attribute(model, pairs, "k")["normalized"].sel(layer=1, kv_head=2)
    assert abs(float(plain.mean()) - expected) < 0.01
    effects = tp.patch(model, pairs, ("z", "k"), by=("layer",), checks=False)["normalized"]
    np.testing.assert_allclose(effects.sel(component="k", layer=1), 1, atol=1e-5)


def test_keys_of_a_group_have_the_gradient_of_all_its_queries() -> None:
    """GQA (law 22): copied to every query head, a key's gradient would be that of each copy, summed."""
    model = model_of("llama")
    found = tp.gradients(model, PAIRS, components=("q", "k", "scores"))
    for layer in range(3):
        q, k, g = found.values("q", layer, "corrupted"), found.gradient("k", layer), found.gradient("scores", layer)
        each = np.einsum("phds,pdhc->pshc", np.nan_to_num(g.values), np.nan_to_num(q.values))
        heads, kv_heads = q.sizes["head"], k.sizes["kv_head"]
        assert heads > kv_heads
        grouped = each.reshape(*each.shape[:2], kv_heads, heads // kv_heads, -1).sum(3) * q.sizes["d_head"] ** -0.5
        np.testing.assert_allclose(grouped, np.nan_to_num(k.values), atol=1e-5)


def test_intervals_of_estimates() -> None:
    """Estimates are kept by pair, so that they have intervals and a test over pairs, as effects have."""
    found = tp.attribute(toy("llama"), tp.toys.pairs("ioi", 8), "z")
    shown = tp.intervals(found, draws=200)
    mean = tp.over_pairs(found)
    assert (shown["low"] <= mean["estimate"] + 1e-9).all()
    assert (shown["high"] >= mean["estimate"] - 1e-9).all()
    assert set(np.unique(shown["status"])) == {4}
    assert torch.isfinite(torch.tensor(shown["p"].values)).all()
