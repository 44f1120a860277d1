"""What the recipe files claim, on models that have it, and their parts against slow copies of what they say."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import toy
from slow import untouched
from tracepatch.recipes import (
    across_architectures,
    attention_attribution,
    induction,
    ioi,
    mlp_neurons,
    necessity_sufficiency,
)

import tracepatch as tp
from tracepatch.errors import MeasurementWarning, PromptError
from tracepatch.models import module_of
from tracepatch.toys.wired import wired_pairs

FILES = (across_architectures, attention_attribution, induction, ioi, mlp_neurons, necessity_sufficiency)


def share(result: xr.Dataset, variable: str = "normalized") -> xr.DataArray:
    return tp.over_pairs(result)[variable]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.split(".")[-1])
def test_prompts_are_those_of_their_seed_and_the_toys_solve_them(file: ModuleType) -> None:
    given = toy("llama").tokenizer
    made = file.prompts(given, 6, 3)
    assert made == file.prompts(given, 6, 3)
    assert made != file.prompts(given, 6, 4)
    assert len(made) == 6
    assert made.seed == 3
    assert made.check(toy("llama")).passed


# ------------------------------------------------------------------------------------------------ ioi


@pytest.mark.parametrize(
    ("part", "component", "unit"),
    [
        (ioi.queries, "q", "head"),
        (ioi.keys, "k", "kv_head"),
        (ioi.values, "v", "kv_head"),
        (ioi.patterns, "pattern", "head"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_parts_are_the_sweeps_that_they_say(part: tp.Recipe, component: str, unit: str) -> None:
    model, pairs = toy("llama"), ioi.prompts(toy("llama").tokenizer, 2)
    own, swept = part(model, pairs), tp.patch(model, pairs, component, by=("layer", unit))
    xr.testing.assert_equal(own["effect"], swept["effect"])


def test_what_of_the_copying_head_it_is() -> None:
    """In the GPT-2 toy it looks at the subject's second mention, whatever stands there, and carries it to the end."""
    model, pairs = toy("gpt2"), ioi.prompts(toy("gpt2").tokenizer, 4)
    whole = share(ioi.heads(model, pairs))
    at = {"layer": 0, "head": 1}
    assert float(whole.sel(at)) == float(whole.max()) > 0.9
    assert float(share(ioi.values(model, pairs)).sel(layer=0, kv_head=1)) > 0.9 * float(whole.sel(at))
    for other in (ioi.queries, ioi.patterns):
        assert abs(float(share(other(model, pairs)).sel(at))) < 0.1


# ------------------------------------------------------------------------------------------------ induction


def slow_attention(model: Any, prompt: str) -> torch.Tensor:
    """The weights of a plain forward with eager attention, [layer, head, dest, src]."""
    module = untouched(module_of(model))
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(**model.tokenizer(prompt, return_tensors="pt"), output_attentions=True)
    return torch.stack([layer[0] for layer in out.attentions])


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # without and with a start token in front
def test_scores_are_those_of_a_plain_forward(name: str) -> None:
    model, length = toy(name), 6
    prompts = induction.repeated(model.tokenizer, 2, 5, length)
    front = name == "llama"
    prefix, previous = [], []
    for prompt in prompts.clean:
        words = prompt.split()
        assert words[:length] == words[length:]
        seen = slow_attention(model, prompt)
        for i in range(length, 2 * length):
            prefix.append(seen[:, :, i + front, words.index(words[i]) + 1 + front])
        for i in range(1, 2 * length):
            previous.append(seen[:, :, i + front, i - 1 + front])
    found = induction.prefix_matching(model, 2, 5, length), induction.previous_token(model, 2, 5, length)
    for score, slow in zip(found, (prefix, previous), strict=True):
        np.testing.assert_allclose(score.transpose("layer", "head"), torch.stack(slow).mean(0), atol=1e-5)


def test_the_wired_circuit_is_found() -> None:
    """Its previous-token head is L0H1 and its induction head L1H2: known scores, and all of the effect in each."""
    model, length = toy("wired"), 10
    known = xr.zeros_like(induction.previous_token(model)).drop_vars("kv_head", errors="ignore")
    e = math.e
    expected = (e / (2 * e + length - 1) + sum(e / (e + length + k) for k in range(1, length))) / length
    assert float(induction.prefix_matching(model).sel(layer=1, head=2)) == pytest.approx(expected, abs=1e-5)
    assert float(induction.previous_token(model).sel(layer=0, head=1)) == pytest.approx(1, abs=1e-5)
    made = wired_pairs(4)
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    known.loc[{"layer": 0, "head": 1}] = known.loc[{"layer": 1, "head": 2}] = 1
    np.testing.assert_allclose(share(induction.heads(model, pairs)), known, atol=1e-4)
    copied = induction.copying(model).transpose("layer", "head").values
    assert copied[1, 2] > 0.5
    assert abs(np.delete(copied.ravel(), 6)).max() < 1e-5


def test_what_is_corrupted_decides_what_of_a_head_matters() -> None:
    """Another question is in the query of the wired induction head, another answer in its key; and nowhere else."""
    model = toy("wired")
    for corruption, matters, does_not in (
        ("AB", induction.queries, induction.keys),
        ("BA", induction.keys, induction.queries),
    ):
        pairs = induction.prompts(model.tokenizer, 4, corruption=corruption)
        found = share(matters(model, pairs)).values
        assert found[1, 2] == pytest.approx(1, abs=1e-3)
        assert abs(np.delete(found.ravel(), 6)).max() < 1e-3
        with pytest.warns(MeasurementWarning, match="patches change nothing"):
            does_not(model, pairs)


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_the_head_with_the_highest_score_is_one_that_matters(name: str) -> None:
    """Of those above the first layer, patching the head that matches prefixes restores the most, or as much."""
    model = toy(name)
    effect = share(induction.heads(model, induction.prompts(model.tokenizer, 8)))[1:]
    score = induction.prefix_matching(model)[1:]
    best = np.unravel_index(int(score.values.argmax()), score.shape)
    assert score.values[best] > 0.8
    assert effect.values[best] > 0.9 * effect.values.max() > 0.2
    assert np.corrcoef(score.values.ravel(), effect.values.ravel())[0, 1] > 0.8


def test_prompts_of_induction() -> None:
    made = induction.prompts(toy("gpt2").tokenizer, 40, 1)
    orders = set()
    for clean, corrupted, (answer,), (wrong,) in zip(
        made.clean, made.corrupted or (), made.answer, made.wrong, strict=True
    ):
        words, changed = str(clean).split(), str(corrupted).split()
        a = words[-1]
        one, two = (i for i, (w, c) in enumerate(zip(words, changed, strict=True)) if w != c)
        assert {words[one], words[two]} == {changed[one], changed[two]}
        assert (words[words.index(a) + 1], changed[changed.index(a) + 1]) == (answer.strip(), wrong.strip())
        orders.add(words.index(a) == one)
    assert orders == {True, False}
    with pytest.raises(PromptError, match=r"20 of \d+ words as one token; 30 are needed"):
        induction.repeated(toy("wired").tokenizer, length=30)


# ------------------------------------------------------------------------------------------------ attention, neurons


def test_the_largest_attributions_are_what_zeroing_loses() -> None:
    model, pairs = toy("gpt2"), ioi.prompts(toy("gpt2").tokenizer, 4)
    found = attention_attribution.weights(model, pairs)
    chosen = attention_attribution.largest(found, 5)
    mean = tp.over_pairs(found)["estimate"].values
    np.testing.assert_array_equal(abs(chosen.values), np.sort(abs(mean[np.isfinite(mean)]))[::-1][:5])
    changed = pairs.encode(model.tokenizer).differing(0)[0]
    assert [int(chosen[0][dim]) for dim in attention_attribution.WEIGHT] == [0, 1, 13, changed], "the copying head"
    lost = -share(attention_attribution.zeroed(model, pairs, chosen), "effect")
    assert lost.values.argmax() == 0
    assert (np.sign(lost) == np.sign(chosen.values)).all()
    only = {"layer": [0], "head": [1], "dest": [13], "src": [changed]}
    swept = tp.patch(model, pairs, "pattern", by=attention_attribution.WEIGHT, source=0, direction="noising", only=only)
    assert float(swept["effect"].mean()) == pytest.approx(-float(lost[0]), abs=1e-5)


def test_neurons_that_attribution_finds_are_confirmed() -> None:
    """Against an exact sweep over all of them."""
    model, pairs = toy("llama"), ioi.prompts(toy("llama").tokenizer, 2)
    audited = mlp_neurons.neurons(model, pairs, top=10, sample=5)
    sure = mlp_neurons.confirmed(audited)
    exact = share(tp.patch(model, pairs, "mlp_act", by=("layer", "neuron")), "effect").stack(site=["layer", "neuron"])
    estimate = share(audited, "estimate").stack(site=["layer", "neuron"])
    order = abs(estimate).fillna(0).values.argsort()[::-1][:10]
    assert sure["site"].values.tolist() == estimate["site"].values[order].tolist()
    ratio = (exact / estimate).values[order]
    np.testing.assert_array_equal(sure, (ratio > 0.5) & (ratio < 2))
    assert sure.sum() >= 9
    assert abs(exact).values.argmax() in order, "the largest effect is among the largest estimates"


def test_what_is_not_confirmed() -> None:
    """A wrong sign, an effect far too small, and one far too large."""
    model, pairs = toy("llama"), ioi.prompts(toy("llama").tokenizer, 2)
    audited = mlp_neurons.neurons(model, pairs, top=4, sample=0)
    for factor, expected in ((-1, False), (0.3, False), (2.5, False), (0.6, True), (1.8, True)):
        made = audited.assign(effect=factor * audited["estimate"])
        assert mlp_neurons.confirmed(made).values.tolist() == [expected] * 4
    assert mlp_neurons.confirmed(audited.assign(effect=2.5 * audited["estimate"]), least=0.3).all()


def test_all_neurons_of_a_layer_are_its_mlp() -> None:
    model, pairs = toy("llama"), ioi.prompts(toy("llama").tokenizer, 2)
    count = tp.Architecture(model).units("mlp_act", 1)
    whole = mlp_neurons.together(model, pairs, [(1, neuron) for neuron in range(count)])
    output = tp.patch(model, pairs, "mlp_out", by="layer", only={"layer": [1]})
    np.testing.assert_allclose(whole["effect"].values, output["effect"].values, atol=1e-4)


# ------------------------------------------------------------------------------------------------ depth, directions


def test_where_the_last_token_takes_over() -> None:
    """After the first layer in the GPT-2 toy, after the last one in the Llama toy; the last token ends with all."""
    found = []
    for name in ("gpt2", "llama"):
        model = toy(name)
        pairs = ioi.prompts(model.tokenizer, 2)
        found.append(across_architectures.by_depth(model, pairs))
        swept = share(tp.patch(model, pairs, "resid_post"))
        changed = pairs.encode(model.tokenizer).differing(0)[0]
        own = share(found[-1])
        for place, pos in (("changed", changed), ("last", swept.sizes["pos"] - 1)):
            np.testing.assert_allclose(own.sel(name=f"stream at the {place} token"), swept.sel(pos=pos), atol=1e-6)
        assert float(own.sel(name="stream at the last token")[-1]) == pytest.approx(1, abs=1e-5)
        attended = tp.patch(model, pairs, "attn_out", by="layer")
        np.testing.assert_allclose(own.sel(name="attn_out"), share(attended), atol=1e-6)
    assert across_architectures.crossing(found[0]).item() == 0
    assert across_architectures.crossing(found[1]).item() == 1
    assert across_architectures.crossing(tp.concat(found)).values.tolist() == [0, 1]


def test_prompts_of_three_other_names() -> None:
    made = necessity_sufficiency.prompts(toy("gpt2").tokenizer, 30)
    for clean, corrupted, (answer,), (wrong,) in zip(
        made.clean, made.corrupted or (), made.answer, made.wrong, strict=True
    ):
        words, changed = str(clean).split(), str(corrupted).split()
        swapped = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
        assert len(swapped) == 3
        assert sorted(a for a, _ in swapped) == sorted([answer.strip(), wrong.strip(), wrong.strip()])
        assert len({b for _, b in swapped}) == 3
        assert not {answer.strip(), wrong.strip()} & set(changed)


def test_each_head_of_the_wired_circuit_is_necessary_and_sufficient() -> None:
    made = wired_pairs(4)
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    both = necessity_sufficiency.heads(toy("wired"), pairs)
    assert isinstance(both, xr.Dataset)
    expected = np.full((2, 4), "irrelevant", dtype=object)
    expected[0, 1] = expected[1, 2] = "necessary and sufficient"
    np.testing.assert_array_equal(necessity_sufficiency.verdicts(both).transpose("layer", "head"), expected)
    swept = tp.patch(toy("wired"), pairs, "z", direction="noising")
    np.testing.assert_allclose(both["effect"].sel(direction="noising"), swept["effect"], atol=1e-6)
    told = necessity_sufficiency.conclude(None, pairs, None, {"heads": both}, "")
    assert [line.split() for line in told[1:]] == [
        ["0.1", "necessary", "and", "sufficient", "+1.00", "+1.00"],
        ["1.2", "necessary", "and", "sufficient", "+1.00", "+1.00"],
    ]
