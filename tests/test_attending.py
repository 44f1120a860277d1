"""Attention and direct contributions seen through gradients: what the textbook says, and laws that hold exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from test_attribution import (
    BASES,
    EVERYWHERE,
    FOUR,
    PAIRS,
    SOME,
    alike,
    book,
    encoded,
    finest,
    gap,
    model_of,
    offered,
    require_seen,
    rounding,
    wanted,
)

import tracepatch as tp
from tracepatch.errors import ComponentError, MetricError, PromptError


def ids(world: str, pair: int) -> torch.Tensor:
    return torch.tensor(encoded().world(world)[pair])


@pytest.mark.parametrize("world", ["clean", "corrupted"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_attention_attribution(name: str, world: Any) -> None:
    if "pattern" not in offered(name):
        pytest.skip("its patterns cannot be seen")
    found = tp.attention_attribution(model_of(name), PAIRS, world=world)
    expected = [book(name).attention_attribution(ids(world, pair), gap(pair)) for pair in range(len(PAIRS))]
    require_seen(expected)
    alike(found, "pattern", expected, rounding(name))


@pytest.mark.parametrize("name", FOUR)
def test_what_a_heads_weights_values_and_output_bring_is_the_same(name: str) -> None:
    """Σ pattern·g_pattern = Σ z·g_z = Σ v·g_v (law 16), where attention computes no more than pattern · v."""
    model = model_of(name)
    weights = tp.attention_attribution(model, PAIRS, by=("layer", "head"))["estimate"]
    outputs = -tp.attribute(model, PAIRS, "z", direction="noising", source=0)["estimate"]
    np.testing.assert_allclose(weights, outputs, atol=1e-5)
    values = -tp.attribute(model, PAIRS, "v", direction="noising", source=0)["estimate"]
    np.testing.assert_allclose(weights.sum("head"), values.sum("kv_head"), atol=1e-5)


@pytest.mark.parametrize("direction", BASES)
@pytest.mark.parametrize("name", SOME)
def test_value_flow(name: str, direction: Any) -> None:
    if not {"pattern", "v"} <= set(offered(name)):
        pytest.skip("its attention cannot be entered")
    expected = [wanted(name, "value_flow", pair, BASES[direction]) for pair in range(len(PAIRS))]
    require_seen(expected)
    by_pattern = [{("pattern", layer): value for (_, layer), value in flow.items()} for flow in expected]
    alike(tp.value_flow(model_of(name), PAIRS, direction=direction), "pattern", by_pattern, rounding(name))
    summed = tp.value_flow(model_of(name), PAIRS, direction=direction, by=("layer", "src"))["estimate"]
    values = tp.attribute(model_of(name), PAIRS, "v", by=("layer", "pos"), direction=direction)["estimate"]
    np.testing.assert_allclose(summed.values, values.values, atol=1e-5)


@pytest.mark.parametrize("world", ["clean", "corrupted"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", *(n for n in SOME[2:] if n.values != ("gpt_neox",))])
def test_direct_logit_attribution(name: str, world: Any) -> None:
    try:
        found = tp.direct_attribution(model_of(name), PAIRS, world=world)
    except ComponentError as error:
        pytest.skip(str(error)[:80])
    np.testing.assert_allclose(found["share"].sum("writer"), found["value"], atol=1e-9)
    np.testing.assert_allclose(found["value"], tp.patch(model_of(name), PAIRS, "embed", checks=False)[world], atol=1e-5)
    for pair in range(len(PAIRS)):
        expected = {key: value.numpy().sum(0) for key, value in book(name).direct(ids(world, pair), gap(pair)).items()}
        own = found["share"].sel(pair=pair)
        scale = 1e-8 if name == "gpt2" else 1e-4
        for layer in range(3):
            heads = own.values[(found["component"] == "head_out").values & (found["layer"] == layer).values]
            if len(heads):
                np.testing.assert_allclose(heads, expected["head_out", layer], atol=scale)
            np.testing.assert_allclose(own.sel(writer=f"MLP {layer}"), expected["mlp_out", layer], atol=scale)
            if f"L{layer} bias" in found["writer"].values:
                bias = expected.get(("attn_bias", layer), np.zeros(()))
                np.testing.assert_allclose(own.sel(writer=f"L{layer} bias"), bias, atol=scale)
        biases = expected["final_norm_bias", 0] + expected.get(("unembed_bias", 0), 0)
        np.testing.assert_allclose(
            own.sel(writer="final biases"), biases, atol=max(scale, 1e-6)
        )  # metrics are in float32


def test_with_the_last_norm_held_the_last_stream_is_exact() -> None:
    """AtP of the final residual = difference of direct attributions at one scale (law 17)."""
    model = model_of("gpt2")
    held = tp.attribute(model, PAIRS, "logits_in", by=("pos",), estimator=tp.AtP(hold=(("logits_in_scale", 0),)))
    with tp.patching(model, PAIRS) as p:
        frozen = p.world("frozen", of=p.corrupted)
        frozen.freeze("logits_in_scale")
        with p.row(name="all"):
            frozen.logits_in[:] = p.clean.logits_in[:]
    exact = p.run()["effect"].sel(name="all")
    np.testing.assert_allclose(held["estimate"].sum("pos"), exact, atol=1e-6)


def test_pairs_without_corrupted_prompts() -> None:
    alone = tp.Pairs(ioi_pairs(2).clean, answer=ioi_pairs(2).answer, wrong=ioi_pairs(2).wrong)
    assert tp.attention_attribution(toy("llama"), alone).attrs["cost"] == "1 forward and 1 backward a pair"
    assert "corrupted" not in tp.direct_attribution(toy("llama"), alone)
    with pytest.raises(PromptError, match="no corrupted prompts"):
        tp.direct_attribution(toy("llama"), alone, world="corrupted")
    with pytest.raises(MetricError, match="metrics that read logits"):
        tp.direct_attribution(toy("llama"), alone, tp.metric(lambda z: z.sum(-1), "z", component="z", index=(0, -1, 0)))


def test_dims_can_be_summed_and_chosen() -> None:
    whole = tp.attention_attribution(toy("gpt2"), ioi_pairs(2))["estimate"]
    last = tp.attention_attribution(
        toy("gpt2"), ioi_pairs(2), by=("layer", "head", "src"), only={"dest": [-1], "layer": [1]}
    )
    np.testing.assert_allclose(last["estimate"].isel(layer=0), whole.sel(layer=1).isel(dest=-1), atol=1e-5)
    assert finest("pattern") == whole.dims[1:]
