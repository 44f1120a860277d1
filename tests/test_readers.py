"""Readers and attention's inside: edges, and what they add up to, independent of any oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import made_up_pairs
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.architecture import architecture_of

ATTENTION = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "olmo2", "mixtral", "gpt_oss")


def writers(p: tp.Patching, base: Any, other: Any, until: int, mlp_until: int) -> list[Any]:
    """The differences of all that writes to the stream before a reader: heads, biases being equal, MLPs, embedding."""
    found = [other.resid_pre[0, :] - base.resid_pre[0, :]]
    for layer in range(until):
        found += [
            other.head_out[layer, :, head] - base.head_out[layer, :, head]
            for head in range(p.architecture.units("head_out", layer))
        ]
    return found + [other.mlp_out[layer, :] - base.mlp_out[layer, :] for layer in range(mlp_until)]


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_all_edges_into_a_reader_together_are_its_input(name: str, base: str) -> None:
    """Every edge at once, added one by one, equals patching what the reader reads; an edge is not the node."""
    model, pairs = toy(name), ioi_pairs(2)
    last = len(architecture_of(model)) - 1
    parallel = name == "gpt_neox"
    with tp.patching(model, pairs) as p:
        live, other = getattr(p, base), getattr(p, "clean" if base == "corrupted" else "corrupted")
        readers = [("attn_in", last, last), ("q_in", last, last), ("k_in", last, last), ("v_in", last, last)]
        readers += [("mlp_in", last if parallel else last + 1, last), ("logits_in", last + 1, last + 1)]
        for reader, until, mlp_until in readers:
            at = (slice(None),) if reader == "logits_in" else (last, slice(None))
            with p.row(reader=reader, how="edges"):
                for difference in writers(p, live, other, until, mlp_until):
                    getattr(live, reader)[at] += difference
            with p.row(reader=reader, how="input"):
                getattr(live, reader)[at] = getattr(other, reader)[at]
        with p.row(reader="one edge", how="edges"):
            live.q_in[last, :, 1] += other.head_out[0, :, 0] - live.head_out[0, :, 0]
        with p.row(reader="one edge", how="input"):
            live.head_out[0, :, 0] = other.head_out[0, :, 0]
    value = p.run()["value"]
    edges, inputs = value.sel(how="edges"), value.sel(how="input")
    for reader, *_ in readers:
        np.testing.assert_allclose(edges.sel(reader=reader), inputs.sel(reader=reader), atol=3e-4)
    assert float(abs(edges - inputs).sel(reader="one edge").max()) > 1e-3


@pytest.mark.parametrize("model_type", ATTENTION)
def test_what_reads_the_stream_reads_all_of_it(model_type: str) -> None:
    """q, k and v of every head are attention; attention and MLP (and what passes them by) are the stream."""
    model = tp.load(build(model_type, layers=2), tokenizer())
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    with tp.patching(model, pairs, prune=False) as p:
        for layer in range(2):
            for name, parts in {"together": ("attn_in",), "apart": ("q_in", "k_in", "v_in")}.items():
                with p.row(layer=layer, name=name):
                    for part in parts:
                        getattr(p.corrupted, part)[layer, :] = getattr(p.clean, part)[layer, :]
            with p.row(layer=layer, name="head by head"):
                for part in ("q_in", "k_in", "v_in"):
                    for unit in range(p.architecture.units(part, layer)):
                        getattr(p.corrupted, part)[layer, :, unit] = getattr(p.clean, part)[layer, :, unit]
            with p.row(layer=layer, name="attention's contribution"):
                p.corrupted.attn_out[layer, :] = p.clean.attn_out[layer, :]
    value = p.run()["value"]
    for name in ("apart", "head by head"):
        np.testing.assert_allclose(value.sel(name=name), value.sel(name="together"), atol=2e-5)
    # In the first layer the stream that attention reads is all there is.
    np.testing.assert_allclose(
        value.sel(name="together").sel(layer=0), value.sel(name="attention's contribution").sel(layer=0), atol=2e-5
    )


@pytest.mark.parametrize("model_type", ATTENTION)
def test_heads_add_up_to_attention(model_type: str) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    with tp.patching(model, pairs) as p:
        for layer in range(2):
            if not p.architecture.offers("head_out", layer):
                continue
            with p.row(layer=layer, name="attn_out"):
                p.corrupted.attn_out[layer, :] += p.clean.attn_out[layer, :] - p.corrupted.attn_out[layer, :]
            with p.row(layer=layer, name="heads"):
                for head in range(p.architecture.units("head_out", layer)):
                    change = p.clean.head_out[layer, :, head] - p.corrupted.head_out[layer, :, head]
                    p.corrupted.head_out[layer, :, head] += change
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="heads"), value.sel(name="attn_out"), atol=2e-5)


def test_masked_keys_are_never_written(gpt2: Any, pairs: tp.Pairs) -> None:
    """Ones everywhere, and weights far above the diagonal: only what may be attended to changes."""
    seen: list[torch.Tensor] = []

    def look(live: torch.Tensor) -> torch.Tensor:
        seen.append(live.clone())
        return live

    with tp.patching(gpt2, pairs, batch_size=1) as p:
        with p.row(name="pattern"):
            p.clean.pattern[0, :, :, :] = 1
            p.clean.pattern[0, :, :, :] = look
        with p.row(name="scores"):
            p.clean.scores[0, :, :, :] = 5
            p.clean.pattern[0, :, :, :] = look
        with p.row(name="future"):
            p.clean.pattern[0, 1, 3, 5] = 1
    seen.clear()
    result = p.run()
    length = p.lengths[0]
    below = torch.tril(torch.ones(length, length))
    patterns = [x for x in seen if x.shape[-1] == length]
    assert len(patterns) >= 2
    torch.testing.assert_close(patterns[0][0], below.expand(4, -1, -1))
    torch.testing.assert_close(patterns[len(pairs)][0], (below / below.sum(-1, keepdim=True)).expand(4, -1, -1))
    assert float(abs(result["effect"].sel(name="future")).max()) < 1e-5


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss"])
def test_renormalizing_keeps_each_destinations_sum(model_type: str) -> None:
    """Under a sink too, where the weights sum to less than one."""
    model = tp.load(build(model_type, layers=2), tokenizer())
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    with tp.patching(model, pairs) as p:
        with p.row(renormalize=True, name="renormalized"):
            p.corrupted.pattern[1, 1, -1, 2] = 0
        with p.row(name="by hand"):
            p.corrupted.pattern[1, 1, -1, :] = without_2
        with p.row(name="not"):
            p.corrupted.pattern[1, 1, -1, 2] = 0
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="renormalized"), value.sel(name="by hand"), atol=1e-5)
    assert float(abs(value.sel(name="renormalized") - value.sel(name="not")).max()) > 1e-4
    with (
        pytest.raises(errors.RecipeError, match="renormalizes patterns and edits none"),
        tp.patching(model, pairs) as p,
    ):
        with p.row(renormalize=True):
            p.corrupted.z[0, :, 0] = 0


def without_2(live: torch.Tensor) -> torch.Tensor:
    """[row, src], scaled to its own sum without the weight at 2."""
    kept = live.clone()
    kept[:, 2] = 0
    return kept * (live.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))


def test_attention_is_switched_and_put_back(gpt2: Any, pairs: tp.Pairs) -> None:
    config = tp.models.module_of(gpt2).config
    before = config._attn_implementation
    assert before == "sdpa"
    with tp.patching(gpt2, pairs) as p, p.row():
        p.corrupted.pattern[0, :, -1, :] = p.clean.pattern[0, :, -1, :]
    assert "attention    computed step by step" in p.plan.explain()
    p.run()
    assert config._attn_implementation == before
    heads = tp.patch(gpt2, pairs, "q", only={"layer": [0]})  # and traces see the fused attention again
    assert float(abs(heads["effect"]).max()) > 0


def test_a_model_whose_step_by_step_attention_differs_offers_no_pattern() -> None:
    found = tp.Architecture(tp.toys.load("gpt2"))
    found.eager_error = 10.0
    assert "gives other logits than the model's own" in found.why_not("pattern", 0)
    assert not found.offers("scores", 1)
    assert found.offers("z", 0)


def test_a_sweep_over_weights_is_labelled(gpt2: Any, pairs: tp.Pairs) -> None:
    result = tp.patch(gpt2, pairs, "pattern", by=("layer", "head", "dest", "src"), only={"layer": [1], "dest": [-1]})
    assert result["effect"].dims == ("pair", "layer", "head", "dest", "src")
    heads = tp.patch(gpt2, pairs, "pattern")
    assert heads["effect"].dims == ("pair", "layer", "head")
    with tp.patching(gpt2, pairs) as p:
        grid = p.grid("pattern", by=("dest", "src"), layer=0)
        with p.row():
            p.clean.pattern[0, :, -1, 0] = 0
    assert (3, 5) not in grid
    assert (5, 3) in grid
    with pytest.raises(errors.SiteError, match=r"pattern has the indices \[layer, head, dest, src\]"):
        p.clean.pattern[0, 0, 0, 0, 0]
    with pytest.raises(errors.SiteError, match="is in no prompt"):
        p.clean.pattern[0, 0, 0, 99]


ROTATED = {
    "gpt2": [False] * 2,
    "llama": [True] * 2,
    "gpt_neox": [True] * 2,
    "gemma2": [True] * 2,
    "gpt_oss": [True] * 2,
}


@pytest.mark.parametrize("model_type", ROTATED)
def test_rotated_queries_stay_where_they_are(model_type: str) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    found = architecture_of(model)
    assert [found.rotated(i) for i in range(2)] == ROTATED[model_type]
    with tp.patching(model, made_up_pairs([f"w{i}" for i in range(30, 60)])) as p, p.row():
        p.corrupted.q[1, 3, 0] = p.clean.q[1, 3, 1]
        p.corrupted.v[1, 3, 0] = p.clean.v[1, 2, 0]
        p.corrupted.q_in[1, 3, 0] = p.clean.q_in[1, 2, 0]
        if model_type == "gpt2":
            p.corrupted.q[1, 3, 0] = p.clean.q[1, 2, 0]
            return
        with pytest.raises(errors.RecipeError, match="turns queries and keys by their position.* Move .*: k_in"):
            p.corrupted.k[1, 3, 0] = p.clean.k[1, 2, 0]


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "gptj", "bloom", "mpt", "llama"])
def test_attention_in_code_of_its_own(model_type: str) -> None:
    """Patterns are those that the model returns itself; a head that attends to the first token alone gets its value."""
    model = tp.load(build(model_type, layers=2), tokenizer())
    module = tp.models.module_of(model)
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])[:1]
    with tp.patching(model, pairs, prune=False) as p:
        with p.row(name="plain"):
            seen = p.save(p.clean.pattern[0, :, :, :])
        with p.row(name="to the first"):
            p.clean.pattern[0, 2, -1, :] = torch.eye(7)[0]
            moved = p.save(p.clean.z[0, :, :])
        with p.row(name="scores"):
            p.clean.scores[0, 2, -1, 1:] = -1e4
            same = p.save(p.clean.z[0, :, :])
        chains = [("q", "k", "v"), ("scores", "v"), ("pattern", "v"), ("z",)] if p.architecture.offers("v", 0) else []
        for parts in chains:
            with p.row(name=" ".join(parts)):
                for part in parts:
                    getattr(p.corrupted, part)[0, :] = getattr(p.clean, part)[0, :]
    value = p.run()["value"]
    with tp.models.eager_attention(module), torch.no_grad():
        ids = torch.tensor([p.encoded.clean[0]])
        wanted = module(ids, output_attentions=True, use_cache=False).attentions[0]
    np.testing.assert_allclose(seen.values.values, wanted.numpy(), atol=1e-6)
    for saved in (moved, same):
        z = saved.values.values[0]
        np.testing.assert_allclose(z[-1, 2], z[0, 2], atol=1e-5)
    for parts in chains:
        np.testing.assert_allclose(value.sel(name=" ".join(parts)), value.sel(name="z"), atol=1e-5)


def test_what_a_mixer_reads_decides_what_it_adds() -> None:
    model = tp.load(build("mamba", layers=2), tokenizer())
    with tp.patching(model, made_up_pairs([f"w{i}" for i in range(30, 60)])) as p:
        for name in ("attn_in", "attn_out"):
            with p.row(name=name):
                getattr(p.corrupted, name)[1, :] = getattr(p.clean, name)[1, :]
        with p.row(name="stream"):
            p.corrupted.resid_pre[1, :] = p.clean.resid_pre[1, :]
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="attn_in"), value.sel(name="attn_out"), atol=1e-5)
    assert float(abs(value.sel(name="attn_in") - value.sel(name="stream")).max()) > 1e-3
