"""Is the oracle right? Identities that hold for any transformer, on every architecture it has a table for."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import reference
import tiny_models
import torch
from reference import DIMS, PLACES, UNITS, Edit, Reference
from torch import Tensor

torch.set_num_threads(1)

IDS = torch.tensor([5, 9, 11, 3, 40, 22, 17, 8, 33, 12])
OTHER_IDS = torch.tensor([5, 19, 11, 3, 50, 22, 16, 8, 34, 13])
ENCODER_IDS = torch.tensor([7, 21, 5, 30, 44])
LAYER = 1

WITH_ATTENTION = [name for name in tiny_models.ALL if PLACES[name].o_proj]
WITH_INTERFACE = [name for name in tiny_models.ALL if PLACES[name].interface]
OWN_SDPA = [name for name in WITH_INTERFACE if name not in ("gemma2", "gpt_oss")]  # these two have eager only

every = pytest.mark.parametrize("name", tiny_models.ALL)
with_attention = pytest.mark.parametrize("name", WITH_ATTENTION)
with_interface = pytest.mark.parametrize("name", WITH_INTERFACE)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32, attn: str = "eager") -> Reference:
    """A reference for a tiny model."""
    model = tiny_models.build(name, dtype=dtype, attn_implementation=attn)
    return Reference(model, ENCODER_IDS if name in tiny_models.ENCODER_DECODER else None)


@cache
def values_of(name: str, other: bool = False, dtype: torch.dtype = torch.float32) -> dict[tuple[str, int], Tensor]:
    """The values of one of the two prompts. Not to be changed."""
    return model_of(name, dtype).values(OTHER_IDS if other else IDS)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Asserts equality up to rounding, relative to the largest element."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"off by {error:.1e}"


def differ(got: Tensor, expected: Tensor, least: float = 1e-3) -> None:
    """Asserts a difference far above rounding."""
    assert (got - expected).abs().max() > least


def part(component: str, value: Tensor, positions: list[int], unit: int | None) -> Tensor:
    """The value of an edit at some positions and one unit."""
    if "dest" in DIMS[component]:
        return value[unit, positions]
    return value[positions] if unit is None else value[positions, unit]


def unit_of(component: str, value: Tensor) -> int | None:
    """The last unit of a component, None if it has no units."""
    dim = next((n for n, dim in enumerate(DIMS[component]) if dim in UNITS), None)
    return None if dim is None else value.shape[dim] - 1


def noise(value: Tensor, component: str = "", seed: int = 0) -> Tensor:
    """Random values of the shape and dtype of a component."""
    made = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return made.abs() if component == "pattern" else made


# ------------------------------------------------------------------------------------------------------- reading


@every
def test_reading_leaves_the_model_alone(name: str) -> None:
    """With all hooks in place the logits are bitwise the model's own."""
    oracle = model_of(name)
    inputs = {"input_ids": IDS[None]}
    if name in tiny_models.ENCODER_DECODER:
        inputs = {"input_ids": ENCODER_IDS[None], "decoder_input_ids": IDS[None]}
    with torch.no_grad():
        plain = oracle.model(**inputs, use_cache=False).logits[0]
    assert torch.equal(values_of(name)["logits", 0], plain)
    assert torch.isfinite(plain).all()
    assert plain.std() > 0.1


@every
def test_values_have_their_dims(name: str) -> None:
    """Every component is there in every layer that has it, with the sizes that the configuration says."""
    oracle, values = model_of(name), values_of(name)
    assert {component for component, _ in values} == set(oracle.components())
    sizes = {"pos": 10, "dest": 10, "src": 10, "d_model": 32, "vocab": 60, "head": 4, "kv_head": oracle.kv_heads}
    for (component, layer), value in values.items():
        assert component in oracle.components(layer)
        for dim, size in zip(DIMS[component], value.shape, strict=True):
            assert sizes.get(dim, size) == size, (component, layer)
    assert {layer for component, layer in values if component == "resid_pre"} == {0, 1, 2}


@every
def test_eight_and_more_have_their_components(name: str) -> None:
    """What is absent is absent for a reason."""
    absent = set(DIMS) - set(model_of(name).components())
    expected = set()
    if not PLACES[name].interface:
        expected |= {"q_in", "k_in", "v_in", "q", "k", "v", "scores", "pattern"}
    if name in ("gptj", "gpt_neox", "falcon", "phi", "cohere", "cohere2", "t5", "bart"):
        expected |= {"resid_mid"}
    if name in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"):
        expected |= {"mlp_act"}
    if name not in tiny_models.EXPERTS:
        expected |= {"router_logits", "experts_out"}
    if name == "mamba":
        expected |= {"attn_in", "z", "head_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out"}
    if name not in tiny_models.ENCODER_DECODER:
        expected |= {"cross_attn_out"}
    assert absent == expected


@pytest.mark.parametrize("name", [name for name in tiny_models.ALL if name != "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_sum_closes(name: str, dtype: torch.dtype) -> None:
    """attn_out and mlp_out are what is added to the stream, and streams of adjacent blocks are the same."""
    oracle, values = model_of(name, dtype), values_of(name, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 or name == "mamba" else 1e-12  # mamba keeps the stream in float32
    for layer in range(oracle.layers):
        total = values["resid_pre", layer] + values["attn_out", layer]
        total = total + values.get(("cross_attn_out", layer), 0)
        if ("resid_mid", layer) in values:
            close(values["resid_mid", layer], total, tolerance)
        total = total + values.get(("mlp_out", layer), 0)
        close(total, values["resid_post", layer], tolerance)
        after = ("resid_pre", layer + 1) if layer + 1 < oracle.layers else ("logits_in", 0)
        assert torch.equal(values["resid_post", layer], values[after])


def test_bart_normalises_the_stream() -> None:
    """In BART the sum does not close: each sublayer ends in a norm on the stream."""
    block, values = model_of("bart").blocks[LAYER], values_of("bart")
    with torch.no_grad():
        mid = block.self_attn_layer_norm(values["resid_pre", LAYER] + values["attn_out", LAYER])
        mid = block.encoder_attn_layer_norm(mid + values["cross_attn_out", LAYER])
        close(mid, values["mlp_in", LAYER])
        close(block.final_layer_norm(mid + values["mlp_out", LAYER]), values["resid_post", LAYER])


@with_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_sum_to_attention(name: str, dtype: torch.dtype) -> None:
    """The contributions of all heads, and of the output projection's bias, are attn_out; under a post-norm too."""
    oracle, values = model_of(name, dtype), values_of(name, dtype=dtype)
    post_norm = PLACES[name].attn_post_norm is not None
    for layer in range(oracle.layers):
        total = values["head_out", layer].sum(1)
        bias = oracle.blocks[layer].get_submodule(PLACES[name].o_proj).bias
        if bias is not None:
            assert not post_norm
            total = total + bias.detach() * oracle.multiplier
        # Norms compute in float32 whatever the model's dtype.
        close(total, values["attn_out", layer], 1e-5 if dtype == torch.float32 or post_norm else 1e-12)


@with_interface
def test_inside_attention(name: str) -> None:
    """Scores are scaled products of q and k, the pattern their softmax, and z the pattern times v."""
    oracle, values = model_of(name), values_of(name)
    for layer in range(oracle.layers):
        q, k, v = (values[c, layer] for c in "qkv")
        scores, pattern = values["scores", layer], values["pattern", layer]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        close(torch.einsum("hds,shv->dhv", pattern, v), values["z", layer])
        allowed = scores > -1e30
        assert (pattern[~allowed] == 0).all()
        assert not allowed[:, IDS.new_ones(10, 10, dtype=torch.bool).triu(1)].any()
        attention = oracle.blocks[layer].get_submodule(PLACES[name].attn)
        if name == "gpt_oss":  # one more thing to attend to, which brings nothing
            sinks = attention.sinks.detach()[:, None, None].expand(-1, 10, 1)
            close(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], pattern)
            assert (pattern.sum(-1) < 1).all()
            assert pattern.sum(-1).min() < 0.9
        else:
            close(scores.softmax(-1), pattern)
            close(pattern.sum(-1), torch.ones(4, 10))
        products = torch.einsum("dhe,she->hds", q, k)
        if name == "t5":
            continue  # a position bias is added
        scaling = getattr(attention, "scaling", None) or q.shape[-1] ** -0.5
        if name == "opt":
            scaling = 1.0  # q is scaled before it enters attention
        expected = products * scaling
        if name == "gemma2":
            expected = 3.0 * (expected / 3.0).tanh()
        close(scores[allowed], expected[allowed])


@pytest.mark.parametrize("name", ["gpt_oss", "mistral", "gemma2", "gemma3_text", "cohere2", "starcoder2", "exaone4"])
def test_windows_bind(name: str) -> None:
    """Sliding layers of the tiny models see four tokens, the others all."""
    reach = [int((values_of(name)["pattern", layer][:, -1] > 0).any(0).sum()) for layer in range(model_of(name).layers)]
    assert reach == ([4, 4, 4] if name in ("mistral", "starcoder2") else [4, 10, 4])


# ------------------------------------------------------------------------------------------------------- writing


@every
def test_writing_back_changes_nothing(name: str) -> None:
    """Every component, whole, and at two positions of one unit."""
    oracle, values = model_of(name), values_of(name)
    for (component, layer), value in values.items():
        unit = unit_of(component, value)
        whole = Edit(component, layer, value)
        some = Edit(component, layer, part(component, value, [3, 6], unit), positions=[3, 6], unit=unit)
        close(oracle.logits(IDS, [whole]), values["logits", 0])
        if layer == LAYER:
            close(oracle.logits(IDS, [some]), values["logits", 0])


@pytest.mark.parametrize("name", tiny_models.EIGHT)
def test_writing_back_in_float64(name: str) -> None:
    """To the precision of float64, except where the model itself computes in float32."""
    oracle, values = model_of(name, torch.float64), values_of(name, dtype=torch.float64)
    for (component, layer), value in values.items():
        close(oracle.logits(IDS, [Edit(component, layer, value)]), values["logits", 0], 1e-12)


@every
def test_noise_moves_the_logits(name: str) -> None:
    """Nothing that is written is without effect, in any layer, set or added."""
    oracle, values = model_of(name), values_of(name)
    for (component, layer), value in values.items():
        written = noise(value, component)
        differ(oracle.logits(IDS, [Edit(component, layer, written)]), values["logits", 0], 0.02)
        if layer == LAYER:
            differ(oracle.logits(IDS, [Edit(component, layer, written, mode="add")]), values["logits", 0], 0.02)


@every
def test_edits_stay_where_they_are_written(name: str) -> None:
    """An edit of one unit at one position: the logits before it stay, and what the edit names is all that changes."""
    oracle, values = model_of(name), values_of(name)
    for component in oracle.components():
        layer = 0 if component in reference.WITHOUT_LAYER else LAYER
        if (component, layer) not in values:
            continue
        value = values[component, layer]
        unit = unit_of(component, value)
        written = noise(part(component, value, [6], unit), component)
        edited = oracle.values(IDS, [Edit(component, layer, written, positions=[6], unit=unit)])
        close(edited["logits", 0][:6], values["logits", 0][:6])
        # One expert's weight is a small part of what two of them add.
        differ(edited["logits", 0][6:], values["logits", 0][6:], 1e-4 if component == "router_logits" else 1e-3)
        expected = value.clone()
        if "dest" in DIMS[component]:
            reachable = values["scores", layer][unit, 6] > -1e30  # not the future, nor what is out of the window
            expected[unit, 6, reachable] = written[0, reachable]
        elif unit is None:
            expected[6] = written[0]
        else:
            expected[6, unit] = written[0]
        close(edited[component, layer], expected)


@with_interface
def test_masked_keys_are_never_touched(name: str) -> None:
    """Writing what is masked writes nothing: neither the future nor what is out of the window."""
    oracle, values = model_of(name), values_of(name)
    for layer in range(oracle.layers):
        masked = values["scores", layer] < -1e30
        for component in ("scores", "pattern"):
            value = torch.where(masked, 1.0, values[component, layer])
            close(oracle.logits(IDS, [Edit(component, layer, value)]), values["logits", 0])
            add = Edit(component, layer, masked.float(), mode="add")
            close(oracle.logits(IDS, [add]), values["logits", 0])


@every
def test_full_cuts_give_the_other_run(name: str) -> None:
    """Everything passes through the stream: with all of it, one gets the other prompt's logits."""
    oracle, other = model_of(name), values_of(name, other=True)
    differ(other["logits", 0], values_of(name)["logits", 0], 0.1)
    for component, layer in other:
        if component in ("embed", "resid_pre", "resid_mid", "resid_post", "logits_in", "logits"):
            got = oracle.logits(IDS, [Edit(component, layer, other[component, layer])])
            close(got, other["logits", 0])


@every
def test_cut_by_what_is_added(name: str) -> None:
    """Also what all blocks add, together with the stream's start."""
    oracle, other = model_of(name), values_of(name, other=True)
    edits = [
        Edit(component, layer, other[component, layer])
        for component, layer in other
        if component in ("attn_out", "cross_attn_out", "mlp_out")
    ]
    edits.append(Edit("resid_pre", 0, other["resid_pre", 0]))
    close(oracle.logits(IDS, edits), other["logits", 0])


@with_attention
def test_all_heads_are_attention(name: str) -> None:
    """All z of a layer are attn_out (its norm included), and so is what all heads add."""
    oracle, other = model_of(name), values_of(name, other=True)
    attn_out = oracle.logits(IDS, [Edit("attn_out", LAYER, other["attn_out", LAYER])])
    differ(attn_out, values_of(name)["logits", 0])
    close(oracle.logits(IDS, [Edit("z", LAYER, other["z", LAYER])]), attn_out)
    close(oracle.logits(IDS, [Edit("head_out", LAYER, other["head_out", LAYER])]), attn_out)


@every
def test_all_neurons_are_the_mlp(name: str) -> None:
    """All neurons of a layer are mlp_out (its norm included)."""
    oracle, other = model_of(name), values_of(name, other=True)
    for component, layer in other:
        if component == "mlp_act":
            mlp_out = oracle.logits(IDS, [Edit("mlp_out", layer, other["mlp_out", layer])])
            close(oracle.logits(IDS, [Edit("mlp_act", layer, other["mlp_act", layer])]), mlp_out)


@with_attention
def test_one_head(name: str) -> None:
    """One head's z is its head_out, except under a post-norm, whose scale head_out leaves alone."""
    oracle, values, other = model_of(name), values_of(name), values_of(name, other=True)
    where = {"positions": [2, 7], "unit": 2}
    z = oracle.logits(IDS, [Edit("z", LAYER, other["z", LAYER][[2, 7], 2], **where)])
    head_out = oracle.logits(IDS, [Edit("head_out", LAYER, other["head_out", LAYER][[2, 7], 2], **where)])
    if PLACES[name].attn_post_norm:
        differ(head_out, z)
    else:
        close(head_out, z)
    delta = other["head_out", LAYER][[2, 7], 2] - values["head_out", LAYER][[2, 7], 2]
    differ(head_out, values["logits", 0])
    close(oracle.logits(IDS, [Edit("attn_out", LAYER, delta, positions=[2, 7], mode="add")]), head_out)
    close(oracle.logits(IDS, [Edit("head_out", LAYER, delta, mode="add", **where)]), head_out)


@with_interface
def test_attention_from_the_inside_out(name: str) -> None:
    """q and k are the scores, the scores are the pattern, and pattern and v are z: per head and position too."""
    oracle, other = model_of(name), values_of(name, other=True)

    def run(*components: str) -> Tensor:
        return oracle.logits(IDS, [Edit(c, LAYER, other[c, LAYER]) for c in components])

    close(run("q", "k"), run("scores"))
    close(run("scores"), run("pattern"))
    close(run("pattern", "v"), run("z"))
    differ(run("pattern"), run("z"))
    differ(run("pattern"), values_of(name)["logits", 0])

    def one(component: str) -> Tensor:
        written = other[component, LAYER][3, [5, 8]]
        return oracle.logits(IDS, [Edit(component, LAYER, written, positions=[5, 8], unit=3)])

    close(one("scores"), one("pattern"))


# ------------------------------------------------------------------------------------------------------- readers


@every
def test_readers_read_what_they_are_given_and_the_stream_stays(name: str) -> None:
    """With the other run's stream at its input, a reader computes what it computes there."""
    oracle, values, other = model_of(name), values_of(name), values_of(name, other=True)
    if PLACES[name].attn:
        got = oracle.values(IDS, [Edit("attn_in", LAYER, other["resid_pre", LAYER])])
        close(got["attn_out", LAYER], other["attn_out", LAYER])
        differ(got["attn_out", LAYER], values["attn_out", LAYER])
        assert torch.equal(got["resid_pre", LAYER], values["resid_pre", LAYER])
        if PLACES[name].mid:
            close(got["resid_mid", LAYER], values["resid_pre", LAYER] + other["attn_out", LAYER])
        if PLACES[name].parallel:
            assert torch.equal(got["mlp_out", LAYER], values["mlp_out", LAYER])
    if PLACES[name].mlp:
        got = oracle.values(IDS, [Edit("mlp_in", LAYER, other["mlp_in", LAYER])])
        close(got["mlp_out", LAYER], other["mlp_out", LAYER])
        differ(got["mlp_out", LAYER], values["mlp_out", LAYER])
        assert torch.equal(got["attn_out", LAYER], values["attn_out", LAYER])
        if name != "bart":
            before = values["resid_post", LAYER] - values["mlp_out", LAYER]
            close(got["resid_post", LAYER], before + other["mlp_out", LAYER])
    got = oracle.values(IDS, [Edit("logits_in", 0, other["resid_post", oracle.layers - 1])])
    close(got["logits", 0], other["logits", 0])
    assert torch.equal(got["resid_post", 2], values["resid_post", 2])


@with_interface
def test_one_reader_of_attention(name: str) -> None:
    """q_in, k_in or v_in at one head and one position: there q, k or v is the other run's, and nowhere else."""
    oracle, values, other = model_of(name), values_of(name), values_of(name, other=True)
    for reader in "qkv":
        unit = 1
        written = other["resid_pre", LAYER][[6]]
        got = oracle.values(IDS, [Edit(f"{reader}_in", LAYER, written, positions=[6], unit=unit)])
        for name_ in "qkv":
            expected = values[name_, LAYER].clone()
            if name_ == reader:
                expected[6, unit] = other[name_, LAYER][6, unit]
                differ(expected, values[name_, LAYER])
            close(got[name_, LAYER], expected)
        group = oracle.heads // values[reader, LAYER].shape[1]
        reached = range(unit * group, (unit + 1) * group)
        for head in range(oracle.heads):
            z, before = got["z", LAYER][:, head], values["z", LAYER][:, head]
            if head in reached:
                differ(z, before, 1e-4)
            else:
                close(z, before)
        assert torch.equal(got["resid_pre", LAYER], values["resid_pre", LAYER])


@with_interface
def test_attention_reads_with_all_its_readers(name: str) -> None:
    """attn_in is q_in, k_in and v_in of all heads together, at some positions, set or added."""
    oracle, values = model_of(name), values_of(name)
    for mode in ("set", "add"):
        written = noise(values["resid_pre", LAYER])[[2, 5, 8]]
        where = {"positions": [2, 5, 8], "mode": mode}
        whole = oracle.logits(IDS, [Edit("attn_in", LAYER, written, **where)])
        parts = [Edit(f"{reader}_in", LAYER, written, **where) for reader in "qkv"]
        differ(whole, values["logits", 0])
        close(oracle.logits(IDS, parts), whole)
        one_by_one = []
        for reader in "qkv":
            for unit in range(values[f"{reader}_in", LAYER].shape[1]):
                one_by_one.append(Edit(f"{reader}_in", LAYER, written, unit=unit, **where))
        close(oracle.logits(IDS, one_by_one), whole)


@every
def test_readers_together_are_the_stream(name: str) -> None:
    """A change of the stream is a change for all who read it later."""
    oracle, values = model_of(name), values_of(name)
    if not PLACES[name].attn or name == "bart":  # BART's stream goes through norms
        return
    delta = noise(values["resid_pre", 0])[[4]]
    where = {"positions": [4], "mode": "add"}
    edits = [Edit("logits_in", 0, delta, **where)]
    for layer in range(LAYER, oracle.layers):
        edits.append(Edit("attn_in", layer, delta, **where))
        edits.append(Edit("mlp_in", layer, delta, **where))
    if name == "t5":  # attention to the encoder reads it too, and has no name for that
        return
    close(oracle.logits(IDS, edits), oracle.logits(IDS, [Edit("resid_pre", LAYER, delta, **where)]))


# ------------------------------------------------------------------------------------------------- several edits


@every
def test_edits_act_in_forward_order(name: str) -> None:
    """Edits of different sites may be listed in any order."""
    oracle, values = model_of(name), values_of(name)
    edits = []
    for n, component in enumerate(oracle.components()):
        layer = 0 if component in reference.WITHOUT_LAYER else n % 3
        if component != "logits" and (component, layer) in values:
            value = values[component, layer]
            unit = unit_of(component, value)
            delta = 0.1 * noise(part(component, value, [4, 7], unit), component, seed=n)
            edits.append(Edit(component, layer, delta, positions=[4, 7], unit=unit, mode="add"))
    assert torch.equal(oracle.logits(IDS, edits), oracle.logits(IDS, edits[::-1]))


@pytest.mark.parametrize("name", [*tiny_models.EIGHT, "qwen3", "gpt_oss", "granite", "mamba", "t5"])
def test_edits_of_one_site_act_in_list_order(name: str) -> None:
    """A later set replaces, a later add adds."""
    oracle, values = model_of(name), values_of(name)
    for component in oracle.components():
        layer = 0 if component in reference.WITHOUT_LAYER else LAYER
        if (component, layer) not in values:
            continue
        a, b = noise(values[component, layer], component, 1), noise(values[component, layer], component, 2)
        set_a, set_b = Edit(component, layer, a), Edit(component, layer, b)
        add_b = Edit(component, layer, b, mode="add")
        only_b = oracle.logits(IDS, [set_b])
        close(oracle.logits(IDS, [set_a, set_b]), only_b)
        close(oracle.logits(IDS, [add_b, set_b]), only_b)
        sum_ = oracle.logits(IDS, [Edit(component, layer, a + b)])
        close(oracle.logits(IDS, [set_a, add_b]), sum_)
        if component not in ("logits", "logits_in", "scores"):
            differ(sum_, only_b)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "olmo2", "mixtral", "gpt_oss"])
def test_adds_reach_the_live_value(name: str) -> None:
    """An add is to what the edited forward has there, not to what the unedited one had."""
    oracle, values = model_of(name), values_of(name)
    upstream = Edit("resid_pre", LAYER, noise(values["resid_pre", LAYER], seed=3)[[1, 3]], positions=[1, 3])
    live = oracle.values(IDS, [upstream])
    delta = noise(values["resid_pre", LAYER], seed=4)[[3]]
    before = oracle.values(IDS, [Edit("attn_in", LAYER, delta, positions=[3], mode="add")])
    assert not torch.equal(live["resid_pre", LAYER], values["resid_pre", LAYER])
    assert torch.equal(before["resid_pre", LAYER], values["resid_pre", LAYER])
    for component in ("q_in", "k_in", "v_in", "q", "k", "v", "z", "head_out", "attn_in", "attn_out", "mlp_in"):
        for layer in (LAYER, 2):
            now = live[component, layer]
            unit = unit_of(component, now)
            value = part(component, now, [3, 5], unit)
            step = noise(value, seed=5)
            where = {"positions": [3, 5], "unit": unit}
            added = oracle.logits(IDS, [upstream, Edit(component, layer, step, mode="add", **where)])
            was = oracle.logits(IDS, [upstream, Edit(component, layer, value + step, **where)])
            close(added, was)
            stale = part(component, values[component, layer], [3, 5], unit)
            stale = oracle.logits(IDS, [upstream, Edit(component, layer, stale + step, **where)])
            differ(added, stale, 1e-4)
    # Readers of one layer in turn: what attention reads, then what q reads of it.
    joint = [Edit("attn_in", LAYER, delta, positions=[3], mode="add")]
    joint += [Edit(f"{r}_in", LAYER, -delta, positions=[3], mode="add") for r in "qkv"]
    close(oracle.logits(IDS, joint), values["logits", 0])


@with_attention
def test_head_out_after_z(name: str) -> None:
    """head_out replaces what the edited z gives; a post-norm's scale is that of the edited z of all heads."""
    oracle, values = model_of(name), values_of(name)
    z = Edit("z", LAYER, noise(values["z", LAYER], seed=1)[[6]], positions=[6])
    wanted = noise(values["head_out", LAYER], seed=2)[[6], 1]
    live = oracle.values(IDS, [z])
    got = oracle.values(IDS, [z, Edit("head_out", LAYER, wanted, positions=[6], unit=1)])
    expected = live["attn_out", LAYER].clone()
    expected[6] += wanted[0] - live["head_out", LAYER][6, 1]
    close(got["attn_out", LAYER], expected)
    close(got["head_out", LAYER][6, 1], wanted[0])
    differ(live["head_out", LAYER][6, 1], values["head_out", LAYER][6, 1])
    if PLACES[name].attn_post_norm:  # the sum of all heads, so that a stale scale shows
        close(live["head_out", LAYER].sum(1), live["attn_out", LAYER])


# -------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("name", OWN_SDPA)
def test_kernels_agree(name: str) -> None:
    """Under sdpa the same edits give the same logits; scores and pattern do not exist."""
    eager, sdpa = model_of(name), model_of(name, attn="sdpa")
    assert set(eager.components()) - set(sdpa.components()) == {"scores", "pattern"}
    values = values_of(name)
    for component in sdpa.components():
        layer = 0 if component in reference.WITHOUT_LAYER else LAYER
        if (component, layer) in values:
            edit = Edit(component, layer, noise(values[component, layer])[[6]], positions=[6])
            close(sdpa.logits(IDS, [edit]), eager.logits(IDS, [edit]), 1e-4)


def test_nothing_stays_behind() -> None:
    """Hooks and attention functions are gone after a forward, and after one that failed."""
    for attn in ("eager", "sdpa"):
        oracle = model_of("llama", attn=attn)
        modelling = sys.modules[type(oracle.model).__module__]

        def state(oracle: Reference = oracle, modelling: object = modelling) -> tuple:
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in oracle.model.modules()]
            functions = modelling.eager_attention_forward, modelling.ALL_ATTENTION_FUNCTIONS["sdpa"]
            return sum(hooks), *functions, torch.nn.functional.softmax, torch.nn.functional.dropout

        before = state()
        assert before[0] == 0
        oracle.logits(IDS, [Edit("q_in", 1, torch.zeros(()))])
        assert state() == before
        for component in ("resid_pre", "q_in", "z") + (("pattern",) if attn == "eager" else ()):
            with pytest.raises(ValueError, match="for a selection"):
                oracle.logits(IDS, [Edit(component, 1, torch.zeros(7, 7, 7))])
            assert state() == before


def test_wrong_edits_are_refused() -> None:
    """An edit that does nothing, or not what it says, is an error."""
    zero = torch.zeros(())
    oracle = model_of("mixtral")
    for component, layer in [("mlp_act", 0), ("resid_pre", 3), ("resid_pre", -1), ("nonsense", 0), ("embed", 1)]:
        with pytest.raises(ValueError, match="this forward has no"):
            oracle.logits(IDS, [Edit(component, layer, zero)])
    for edit in (
        Edit("resid_pre", 0, zero, unit=0),
        Edit("q", 0, zero, sources=[0]),
        Edit("z", 0, zero, mode="replace"),
        Edit("z", 0, torch.zeros(10, 16)),
        Edit("z", 0, torch.zeros(1, 16), positions=[0, 1], unit=0),
    ):
        with pytest.raises(ValueError, match=r"has dims|mode|for a selection"):
            oracle.logits(IDS, [edit])
    with pytest.raises(IndexError):
        oracle.logits(IDS, [Edit("z", 0, zero, positions=[10])])
    with pytest.raises(IndexError):
        oracle.logits(IDS, [Edit("k", 0, zero, unit=2)])
    with pytest.raises(ValueError, match="encoder_ids"):
        Reference(model_of("t5").model)
    model = tiny_models.build("gpt2").train()
    with pytest.raises(ValueError, match="training"):
        Reference(model)


def test_selections() -> None:
    """Lists of positions, units and sources, negative indices, and scalars."""
    oracle, values = model_of("gpt2"), values_of("gpt2")
    written = noise(values["z", 1])
    got = oracle.values(IDS, [Edit("z", 1, written[[2, 9]][:, [0, 3]], positions=[2, -1], unit=[0, -1])])["z", 1]
    expected = values["z", 1].clone()
    for position in (2, 9):
        for head in (0, 3):
            expected[position, head] = written[position, head]
    assert torch.equal(got, expected)
    edit = Edit("pattern", 1, torch.full((2, 1, 2), 0.5), positions=[6], unit=[1, 2], sources=[0, 4])
    got = oracle.values(IDS, [edit])["pattern", 1]
    expected = values["pattern", 1].clone()
    expected[1:3, 6, 0] = expected[1:3, 6, 4] = 0.5
    assert torch.equal(got, expected)
    got = oracle.values(IDS, [Edit("mlp_act", 1, torch.zeros(()), positions=[4], unit=[7, 100])])["mlp_act", 1]
    expected = values["mlp_act", 1].clone()
    expected[4, 7] = expected[4, 100] = 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_tiny_models(name: str) -> None:
    """They are deterministic, leave the random state alone, and take their arguments."""
    before = torch.get_rng_state()
    model = tiny_models.build(name, layers=2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    again = tiny_models.build(name, layers=2, seed=5, dtype=torch.float64)
    assert not model.training
    assert model.config.vocab_size == tiny_models.VOCAB
    doubled = dict(again.named_parameters())
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter.double(), doubled[path]), path
        assert parameter.std() > 0 or parameter.numel() == 1, path
    assert len(model.get_submodule(PLACES[name].blocks)) == 2
    other = tiny_models.build(name, layers=2, seed=6)
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_tiny_models_take_overrides() -> None:
    """Any configuration value."""
    model = tiny_models.build("llama", num_key_value_heads=1, attn_implementation="eager")
    assert model.config.num_key_value_heads == 1
    assert Reference(model).values(IDS)["k", 0].shape == (10, 1, 16)


def test_tokenizer() -> None:
    """Words are tokens, with or without a leading space, and nothing is put in front."""
    tokenizer = tiny_models.tokenizer()
    assert tokenizer("w5 w9 w11").input_ids == [5, 9, 11]
    assert tokenizer(" w59").input_ids == tokenizer("w59").input_ids == [59]
    assert len(tokenizer) == tiny_models.VOCAB
    assert tokenizer.decode([5, 9]) == "w5 w9"
