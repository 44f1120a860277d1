"""Recorded rows, estimated: the same rows, the same labels, first-order terms of what their edits change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from test_attribution import PAIRS, book, finest, gap, model_of

import tracepatch as tp
from tracepatch.errors import RecipeError
from tracepatch.plan import Status


def swept(p: tp.Patching, component: str, base: str = "corrupted") -> None:
    live, other = getattr(p, base), {"corrupted": p.clean, "clean": p.corrupted}[base]
    for index in p.grid(component, by=finest(component)):
        with p.row(**dict(zip(finest(component), index, strict=True))):
            getattr(live, component)[index] = getattr(other, component)[index]


@pytest.mark.parametrize("base", ["clean", "corrupted"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_recorded_sweep_is_what_attribute_gives(name: str, base: str) -> None:
    """Of every component, on pairs of two lengths; ``attribute`` is checked against the textbook."""
    model = model_of(name)
    direction: Any = {"corrupted": "denoising", "clean": "noising"}[base]
    for component in (
        *("z", "resid_mid", "q_in", "v_in", "pattern", "mlp_act", "resid_post", "head_out"),
        "attn_in_scale",
    ):
        with tp.patching(model, PAIRS) as p:
            swept(p, component, base)
        rows, whole = p.estimate(), tp.attribute(model, PAIRS, component, by=finest(component), direction=direction)
        assert rows["estimate"].dims == whole["estimate"].dims
        np.testing.assert_allclose(rows["estimate"], whole["estimate"], atol=1e-6, err_msg=component)
        np.testing.assert_allclose(rows["normalized"], whole["normalized"], atol=1e-5)
        assert set(np.unique(rows["status"])) <= {Status.ABSENT, Status.PROVED_ZERO, Status.ESTIMATED}
        assert not whole["estimate"].where(rows["status"] == Status.PROVED_ZERO, 0).values.any() or component == "x"


def differences(p: tp.Patching, share: float) -> np.ndarray[Any, Any]:
    """Effects of rows that go so far on the line to their edits, over that share."""
    return p.run()["effect"].values / share


def everything(p: tp.Patching, share: float = 1.0) -> None:
    """Rows of every kind of source, each a part of the way: sums, constants, noise, functions, additions, weights."""
    c, d = p.clean, p.corrupted
    steer = torch.arange(32.0, dtype=torch.float64) / 32

    def row(name: str) -> Any:
        return p.row(name=name)

    with row("set"):
        d.z[1, -1, 2] = share * c.z[1, -1, 2] + (1 - share) * d.z[1, -1, 2]
    with row("added"):
        d.resid_pre[1, 4] += share * (c.resid_pre[1, 4] - d.resid_pre[1, 3])
    with row("constant"):
        d.mlp_out[0, -1] += share * steer
    with row("zero"):
        d.attn_out[1, :] = (1 - share) * d.attn_out[1, :]
    with row("noise"):
        d.embed[2] += share * p.gaussian(0.3, seed=3)
    with row("edge"):
        d.q_in[2, -1, 1] += share * (c.head_out[0, -1, 2] - d.head_out[0, -1, 2])
    with row("weights"):
        d.pattern[1, 2, -1] = share * c.pattern[1, 2, -1] + (1 - share) * d.pattern[1, 2, -1]
    with row("function"):
        d.mlp_act[1, :] = lambda live: live * (1 - share / 2)
    with row("two edits"):
        d.z[1, -1, 2] = share * c.z[1, -1, 2] + (1 - share) * d.z[1, -1, 2]
        d.mlp_out[2, -1] += share * (c.mlp_out[2, -1] - d.mlp_out[2, -1])
    with row("a module"):
        d.output("transformer.h.1.mlp.c_fc")[-1] += share * (
            c.output("transformer.h.1.mlp.c_fc")[-1] - d.output("transformer.h.1.mlp.c_fc")[-1]
        )
    frozen = p.world("frozen", of=d)
    frozen.freeze("pattern", "norms")
    with row("of a frozen world"):
        frozen.resid_pre[1, -1] = share * c.resid_pre[1, -1] + (1 - share) * d.resid_pre[1, -1]
    noised = p.world("noised", of=c)
    noised.embed[1] += p.gaussian(0.5)
    with row("of a noised world"):
        noised.resid_post[0, 2] += share * (c.resid_post[0, 2] - noised.resid_post[0, 2])


def test_small_edits_of_every_kind_have_the_effect_that_is_estimated() -> None:
    """Finite differences: (m(x + aΔ) − m(x)) / a goes to the estimate with an error of O(a)."""
    model = model_of("gpt2")
    errors = []
    with tp.patching(model, PAIRS[:2]) as whole:
        everything(whole)
    found = whole.estimate()
    scale = abs(found["estimate"]).max().item()
    assert scale > 0.05
    for share in (0.05, 0.0125):
        with tp.patching(model, PAIRS[:2], checks=False) as p:
            everything(p, share)
        exact = p.run()
        assert list(exact["name"].values) == list(found["name"].values)
        errors.append(abs(exact["effect"] / share - found["estimate"]).max("pair"))
    ratio = (errors[1] / errors[0].where(errors[0] > 1e-4)).fillna(0)
    assert (ratio < 0.4).all(), ratio.to_series()
    assert (errors[1] < 0.05 * scale).all(), errors[1].to_series()


def test_a_frozen_world_is_a_world_whose_gradients_stop() -> None:
    """Values held by edits, and gradients stopped by an estimator, are the same estimate."""
    model = model_of("llama")
    with tp.patching(model, PAIRS) as p:
        frozen = p.world("frozen", of=p.corrupted)
        frozen.freeze("pattern", "norms")
        frozen.attn_out[1, :] = p.corrupted.attn_out[1, :]
        for component in ("resid_pre", "mlp_in"):
            for layer, pos in p.grid(component, by=("layer", "pos")):
                with p.row(component=component, layer=layer, pos=pos):
                    getattr(frozen, component)[layer, pos] = getattr(p.clean, component)[layer, pos]
    rows = p.estimate()
    held = tp.AtP(hold=("pattern", "norms", ("attn_out", 1)))
    whole = tp.attribute(model, PAIRS, ("resid_pre", "mlp_in"), by=("layer", "pos"), estimator=held)
    np.testing.assert_allclose(rows["estimate"], whole["estimate"], atol=1e-5)
    plain = tp.attribute(model, PAIRS, ("resid_pre", "mlp_in"), by=("layer", "pos"))
    assert abs(plain["estimate"] - whole["estimate"]).max() > 1e-2


@pytest.mark.parametrize("component", ["z", "resid_mid", "pattern", "v"])
def test_integrated_gradients_along_each_site(component: str) -> None:
    """As the textbook has them, and in the limit the exact effect."""
    model, by = model_of("gpt2"), finest(component)
    only = {"layer": [1], **({"dest": [-1]} if component == "pattern" else {})}
    few = tp.attribute(model, PAIRS[:1], component, by=by, only=only, estimator=tp.IntegratedGradients(3, along="site"))
    clean, corrupted = (torch.tensor(ids[0]) for ids in (PAIRS.encode(model.tokenizer).clean, PAIRS.encode(model.tokenizer).corrupted))  # fmt: skip
    expected = book("gpt2").integrated(clean, corrupted, gap(0), "site", [(component, 1)], n=3)[component, 1]
    expected = expected[:, -1:] if component == "pattern" else expected
    np.testing.assert_allclose(np.nan_to_num(few["estimate"].values[0, 0]), expected.numpy(), atol=1e-9)
    many = tp.attribute(
        model, PAIRS[:1], component, by=by, only=only, estimator=tp.IntegratedGradients(40, along="site")
    )
    exact = tp.patch(model, PAIRS[:1], component, by=by, only=only, checks=False)
    gaps = [abs(found["estimate"] - exact["effect"]).max().item() for found in (few, many)]
    assert gaps[1] < 2e-4
    assert gaps[0] > 20 * gaps[1] or gaps[0] < 1e-5


def test_a_recipe_is_estimated_as_it_is_run() -> None:
    from tracepatch.recipes import ioi

    given = toy("gemma2"), ioi_pairs(2)
    exact, found = ioi.heads(*given), ioi.heads.estimate(*given)
    assert isinstance(found, xr.Dataset)
    assert found["estimate"].dims == exact["effect"].dims
    assert "effect" not in found
    assert "value" not in found
    assert found.attrs["estimator"] == "AtP"
    assert np.corrcoef(found["estimate"].values.ravel(), exact["effect"].values.ravel())[0, 1] > 0.7


def test_rows_with_several_sets_of_labels_are_a_tree() -> None:
    with tp.patching(toy("gpt2"), ioi_pairs(2), [tp.logit_diff, tp.log_prob]) as p:
        with p.row(name="head"):
            p.corrupted.z[1, :, 0] = p.clean.z[1, :, 0]
        with p.row(layer=1):
            p.corrupted.mlp_out[1, :] = p.clean.mlp_out[1, :]
    tree = p.estimate()
    assert isinstance(tree, xr.DataTree)
    assert tree["name"]["estimate"].dims == ("metric", "pair", "name")
    assert tree["layer"].attrs["estimator"] == "AtP"


def test_what_cannot_be_estimated_is_named() -> None:
    with tp.patching(toy("gpt2"), ioi_pairs(2)) as p:
        with p.row(name="fine"):
            p.corrupted.z[1, :, 0] = p.clean.z[1, :, 0]
        with p.row(name="held"):
            p.corrupted.z[0, :, 0] = p.clean.z[0, :, 0]
            p.corrupted.z[1, :, 0] = p.corrupted.z[1, :, 0]
        with p.row(name="raw"):
            p.trace(lambda model: None)
        with p.row(name="top"):
            p.corrupted.logits[-1] = 0
    with pytest.raises(RecipeError, match=r"3 of 4 rows cannot be estimated") as error:
        p.estimate()
    assert all(words in str(error.value) for words in ("holds a site", "raw trace", "what the metric reads"))
    with pytest.raises(RecipeError, match="read in a run beside it"):
        tp.attribute(toy("gpt2"), ioi_pairs(2), "q_in", estimator=tp.IntegratedGradients(along="site"))
    with pytest.raises(RecipeError, match="use tp.attribute"):
        p.estimate(tp.AtPStar())
    with pytest.raises(RecipeError, match="along='site'"):
        p.estimate(tp.IntegratedGradients())
