"""Edited worlds: standing edits with a baseline of their own, as base and as source, against the oracle."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import Slow, gap

import tracepatch as tp
from tracepatch import errors

COMPONENTS = ("embed", "resid_pre", "attn_in", "q", "v", "z", "head_out", "attn_out", "mlp_in", "mlp_out", "resid_post")


def agrees(p: tp.Patching, model: Any, tolerance: float = 2e-5) -> None:
    """Every row, and every edited world's baseline, equals the oracle's."""
    slow = Slow(tp.models.module_of(model), p.encoded, edited=p.edited)
    with warnings.catch_warnings():  # chance may make rows that all write what is there
        warnings.simplefilter("ignore", errors.MeasurementWarning)
        result = p.run(progress=False)
    wanted = slow.score(p.rows, gap(p.encoded)).numpy()
    found = result["value"].transpose("pair", ...).values.reshape(len(p.encoded), -1).T
    scale = 1 + np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=0)
    for name in p.edited:
        base = [float(gap(p.encoded)(slow.base(name, pair), pair)) for pair in range(len(p.encoded))]
        np.testing.assert_allclose(result[name].values, base, atol=tolerance * scale, rtol=0)


def whole(world: Any, name: str, layer: int, pos: Any) -> tuple[Any, tuple[Any, ...]]:
    """A component and the index of everything at some positions."""
    return getattr(world, name), (layer, pos) if tp.COMPONENTS[name].layered else (pos,)


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_causal_tracing(name: str) -> None:
    """A corrupted run that is the clean one plus noise at the subject, restored site by site."""
    model, pairs = toy(name), ioi_pairs(2)
    pairs = tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)
    with tp.patching(model, pairs) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[2:5] += p.gaussian(0.5, seed=1)
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                noised.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    agrees(p, model)
    result = p.run()
    assert float(abs(result["noised"] - result["clean"]).min()) > 0.05
    np.testing.assert_allclose(
        result["normalized"], (result["value"] - result["noised"]) / (result["clean"] - result["noised"]), rtol=1e-6
    )
    mean = tp.over_pairs(result)
    np.testing.assert_allclose(mean["normalized"], mean["effect"] / (mean["clean"] - mean["noised"]), rtol=1e-6)
    # Before the subject the noised run is the clean one.
    assert (result["status"].sel(pos=[0, 1]) == tp.Status.PROVED_ZERO).all()
    assert (result["status"].isel(layer=1).sel(pos=5) == tp.Status.MEASURED).all()


def test_noise_is_drawn_for_each_pair_and_again_the_same_for_a_seed(gpt2: Any) -> None:
    pairs = ioi_pairs(3)
    found = []
    for seed in (0, 0, 1):
        with tp.patching(gpt2, pairs) as p:
            noised = p.world("noised", of=p.clean)
            noised.embed[3] += p.gaussian(1.0, seed=seed)
            with p.row():
                noised.resid_pre[0, 3] += 0.0
        found.append(p.run()["noised"].values)
        drawn = [job.writes[0].constant.tensor for job in p.plan.groups[0].edited[0]]
        assert not torch.equal(drawn[0], drawn[1])
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).all()
    noise = p.gaussian(2.0).draw("here", [40000])
    assert abs(float(noise.std()) - 2) < 0.05
    assert abs(float(noise.mean())) < 0.05


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_worlds_of_worlds_as_bases_and_as_sources(name: str) -> None:
    model, pairs = toy(name), ioi_pairs(2)
    with tp.patching(model, pairs) as p:
        off = p.world("off", of=p.corrupted)
        off.z[0, :, 1] = 0
        both = p.world("both", of=off)
        both.attn_out[1, -1] = p.clean.attn_out[1, -1] - off.attn_out[1, -1]
        both.resid_pre[1, 3:] += p.gaussian(0.1)
        with p.row(name="a standing edit is overridden"):
            off.z[0, :, :] = p.clean.z[0, :, :]
        with p.row(name="an earlier edit, later ones stand"):
            both.resid_pre[0, 4:7] = p.clean.resid_pre[0, 4:7]
        with p.row(name="an edited world's value in another"):
            p.clean.resid_post[1, :] = both.resid_post[1, :]
        with p.row(name="its own value"):
            both.resid_pre[1, :] = both.resid_pre[1, :]
        with p.row(name="its own value, after an edit"):
            both.mlp_out[0, 5] = p.clean.mlp_out[0, 5]
            both.resid_pre[1, :] = both.resid_pre[1, :]
        with p.row(name="overridden by what is there"):
            off.z[0, :, 1] = off.z[0, :, 1]
            off.z[0, -1, 0] = p.clean.z[0, -1, 0]
    agrees(p, model)
    result = p.run()
    assert (result["status"].sel(name="its own value") == tp.Status.PROVED_ZERO).all()
    np.testing.assert_allclose(result["value"].sel(name="its own value"), result["both"])
    np.testing.assert_allclose(
        result["value"].sel(name="an edited world's value in another"), result["both"], atol=1e-4
    ) if name == "gpt2" else None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(["gpt2", "llama"]), st.integers(0, 1 << 30), st.booleans())
def test_random_worlds_equal_the_oracle_pruned_or_not(name: str, seed: int, prune: bool) -> None:
    model, pairs, random = toy(name), ioi_pairs(2), np.random.default_rng(seed)
    length = pairs.encode(model.tokenizer).lengths[0]

    def edit(p: tp.Patching, world: Any, sources: list[Any]) -> None:
        component = str(random.choice(COMPONENTS))
        layer, split = int(random.integers(2)), int(random.integers(length))
        pos = [slice(None), split, slice(split, None), slice(0, split + 1)][random.integers(4)]
        live, index = whole(world, component, layer, pos)
        value = getattr(sources[random.integers(len(sources))], component)[index]
        if random.integers(3) == 0:
            live[index] += value - getattr(sources[0], component)[index]
        else:
            live[index] = value

    with tp.patching(model, pairs, prune=prune) as p:
        worlds = [p.clean, p.corrupted]
        for i in range(int(random.integers(1, 3))):
            world = p.world(f"w{i}", of=worlds[random.integers(len(worlds))])
            for _ in range(int(random.integers(3))):
                edit(p, world, worlds)
            worlds.append(world)
        for i in range(6):
            with p.row(i=i):
                base = worlds[random.integers(len(worlds))]
                for _ in range(int(random.integers(1, 3))):
                    edit(p, base, worlds)
    agrees(p, model)


def test_a_world_may_take_values_of_one_that_was_made_later(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        first, second = p.world("first", of=p.corrupted), p.world("second", of=p.clean)
        second.z[0, :, 1] = 0
        first.resid_pre[1, :] = second.resid_pre[1, :]
        with p.row(name="of the first"):
            first.z[1, -1, 0] = 0
        with p.row(name="of the second"):
            second.z[1, -1, 0] = first.z[1, -1, 0]
    agrees(p, gpt2)


def test_a_heads_write_beside_a_standing_scale() -> None:
    with tp.patching(toy("gemma2"), ioi_pairs(1)) as p:
        frozen = p.world("frozen", of=p.clean)
        frozen.freeze("norms")
        with pytest.raises(errors.RecipeError, match="head_out and attn_out_scale of layer 0"):
            frozen.head_out[0, :, 0] = 0
        with pytest.raises(errors.RecipeError, match="head_out and attn_out_scale of layer 1"), p.row(name="in a row"):
            frozen.head_out[1, :, 0] = 0
        with p.row(name="instead"):
            frozen.z[1, :, 0] = 0


def test_mistakes(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with pytest.raises(errors.RecipeError, match="A world cannot be called 'clean'"):
            p.world("clean", of=p.corrupted)
        with pytest.raises(errors.RecipeError, match="of= is a world of this recording"):
            p.world("w", of="clean")  # type: ignore[arg-type]  # on purpose
        world = p.world("w", of=p.clean)
        with pytest.raises(errors.RecipeError, match="cannot take w's own values"):
            world.z[0, :, 0] = world.z[1, :, 0]
        world.z[0, :, 0] = 0
        with p.row(name="used"):
            world.z[1, -1, 0] = 0
        with pytest.raises(errors.RecipeError, match="w has been used already, so w.z"):
            world.z[1, :, 0] = 0
        with pytest.raises(errors.RecipeError, match="edited outside a row"):
            p.clean.z[0, :, 0] = 0
        with pytest.raises(errors.RecipeError, match="standard deviation"):
            p.gaussian(-1)
    assert "w is clean with z[0, :, 0] = 0" in p.plan.explain()
    with pytest.raises(errors.RecipeError, match="has ended"):
        p.world("late", of=p.clean)
