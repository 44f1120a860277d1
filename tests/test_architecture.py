"""What the probe finds, proved again from outside: by plain hooks, by the oracle's hand-written tables, and "
"through traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference
from slow import untouched
from tiny_models import EIGHT, build, tokenizer
from torch import nn
from transformers import BertConfig, BertLMHeadModel

import tracepatch as tp
from tracepatch import errors, trace
from tracepatch.architecture import architecture_of
from tracepatch.forms import allowed
from tracepatch.layout import Seats, stops
from tracepatch.sites import SCALES

IDS = torch.tensor([[7, 33, 41, 12, 50, 8, 29]])
# Single heads read what attention reads; scores and pattern pass by only where attention is computed step by step.
ELSEWHERE = ("q_in", "k_in", "v_in", "scores", "pattern", "logits_in", "logits")
CAPTURED = [c for c in tp.COMPONENTS if c not in (*ELSEWHERE, *SCALES)]


def captured(
    model: Any, writes: dict[Any, Any] | None = None, keep: bool = True
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """Every offered component of one traced forward, and its logits."""
    architecture = architecture_of(model)
    keys = [
        (c, i)
        for c in CAPTURED
        for i in range(len(architecture))
        if architecture.offers(c, i) and (i == 0 or tp.COMPONENTS[c].layered)
    ]
    keys = [k for k in keys if k[0] != "resid_post"] + [("resid_pre", len(architecture))]
    visited = stops(architecture, keys if keep else (), writes or {}, seats=Seats({}, 7))
    kept, _ = trace.forward(
        model,
        (
            trace.named(IDS),
            visited,
            ("of", torch.arange(7), None),
            (),
            ((lambda logits, given: logits[:, -1, 0], torch.arange(7), {}, None),),
            (True, ()),
            *trace.PLAIN[3:],
        ),
        {},
    )
    return kept, kept["logits", 0][0]


@pytest.fixture(params=EIGHT)
def model(request: pytest.FixtureRequest) -> Any:
    """Eight very different types; llama with more than ten layers."""
    return tp.load(build(request.param, layers=11 if request.param == "llama" else 3), tokenizer())


def test_places_agree_with_a_table_written_by_hand(model: Any) -> None:
    architecture, slow = architecture_of(model), Reference(untouched(tp.models.module_of(model)))
    assert all(layer.error == 0 for layer in architecture.layers), "the residual sum closes bitwise in all eight types"
    form = {layer.form for layer in architecture.layers}
    assert form == ({"sequential"} if "resid_mid" in slow.components() else {"parallel"})
    assert architecture.causal
    assert architecture.local_embedding
    assert architecture.keeps_logits
    kept, _ = captured(model)
    values = slow.values(IDS[0])
    compared = 0
    for (component, layer), value in kept.items():
        if component == "aside":
            continue
        name, at = (
            ("resid_post", layer - 1) if (component, layer) == ("resid_pre", len(architecture)) else (component, layer)
        )
        wanted = values[name, at]
        assert value[0].shape == wanted.shape
        assert (value[0] - wanted).abs().max() <= 2e-6 * (1 + wanted.abs().max()), (component, layer)
        compared += 1
    assert compared >= 7 * len(architecture)


def test_the_residual_sum_closes(model: Any) -> None:
    kept, _ = captured(model)
    for i in range(len(architecture_of(model))):
        total = kept["resid_pre", i] + kept["attn_out", i] + kept["mlp_out", i]
        assert (total - kept["resid_pre", i + 1]).abs().max() <= 1e-6 * (1 + total.abs().max())
        if ("resid_mid", i) in kept:
            assert torch.equal(kept["resid_mid", i], kept["resid_pre", i] + kept["attn_out", i])


def test_heads_sum_to_attention(model: Any) -> None:
    kept, _ = captured(model)
    module = tp.models.module_of(model)
    for i in range(len(architecture_of(model))):
        projection = module.get_submodule(architecture_of(model).head_projection(i).projection)
        bias = getattr(projection, "bias", None)
        total = kept["head_out", i].sum(2) + (0 if bias is None else bias)
        assert (total - kept["attn_out", i]).abs().max() <= 3e-6 * (1 + total.abs().max())


def test_reading_changes_nothing(model: Any) -> None:
    module = tp.models.module_of(model)
    with torch.no_grad():
        plain = module(IDS, use_cache=False).logits[0]
    assert torch.equal(captured(model)[1], plain)
    assert torch.equal(captured(model, keep=False)[1], plain)


def test_writing_back_changes_nothing_and_noise_moves_the_logits(model: Any) -> None:
    architecture = architecture_of(model)
    kept, plain = captured(model)
    noise = torch.Generator().manual_seed(1)
    everything = (torch.zeros(7, dtype=torch.long), torch.arange(7))
    for (component, layer), value in kept.items():
        if component in ("aside", "logits"):
            continue
        back = {(component, layer): ((False, (*everything, None, None), (), value[0], None, None, False),)}
        moved = (captured(model, back, keep=False)[1] - plain).abs().max()
        assert moved <= (2e-6 if component == "head_out" else 0), (component, layer)
        loud = value[0] + torch.randn(value[0].shape, generator=noise)
        written = {(component, layer): ((False, (*everything, None, None), (), loud, None, None, False),)}
        moved = (captured(model, written, keep=False)[1] - plain).abs().max()
        assert moved > 1e-3, f"{component} of layer {layer} of {len(architecture)} was written and nothing happened"


GPT2_PRINTED = """\
GPT2LMHeadModel (gpt2): 3 layers, d_model 64, vocabulary 161, float32
  embed      transformer.wte.output
  layers 0–2: transformer.h.N, GPT2Block, sequential
    attn   attn, adds attn.c_proj.output, 4 heads of 16, reads through ln_1
    mlp    mlp, adds mlp.c_proj.output, 256 neurons, reads through ln_2
    offers embed, resid_pre, attn_in, q_in, k_in, v_in, attn_in_scale, q, k, v, scores, pattern, z, head_out,
      attn_out, resid_mid, mlp_in, mlp_in_scale, mlp_act, mlp_out, resid_post, logits_in, logits_in_scale, logits
    no attn_out_scale, mlp_out_scale: there is no norm
  final norm transformer.ln_f, unembedding lm_head
  residual sum: closes bitwise in 3 of 3 layers, largest error 0
  causal: yes (a changed last token moves nothing before it)
"""


def test_it_prints_what_it_found(gpt2: Any) -> None:
    assert str(tp.Architecture(gpt2)).startswith(GPT2_PRINTED)
    printed = str(tp.Architecture(tp.toys.load("gemma2")))
    for part in (
        "writes through post_attention_layernorm",
        "2 kv heads",
        "4 heads of 16",
        "reads through pre_feedforward_layernorm",
    ):
        assert part in printed, printed


def test_probing_leaves_the_model_alone(gpt2: Any) -> None:
    module = tp.models.module_of(gpt2)
    before = (
        module.config._attn_implementation,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )
    state = torch.random.get_rng_state()
    tp.Architecture(gpt2)
    assert before == (
        module.config._attn_implementation,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert not module.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model = tp.toys.load(name, dtype=dtype)
    architecture = tp.Architecture(model)
    assert architecture.dtype == dtype
    assert all(layer.error == 0 for layer in architecture.layers)
    assert architecture.offers("head_out", 0)


class Doubled(nn.Module):
    """A block's MLP whose contribution is changed by code that no module shows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def hidden_gate(module: Any) -> None:
    """Multiplies what the MLP adds by a factor of each dim, outside every module."""
    for block in module.transformer.h:
        block.mlp = Doubled(block.mlp)
        original, gate = block.forward, torch.linspace(0.5, 1.5, module.config.n_embd)

        def forward(
            x: torch.Tensor, *args: Any, block: Any = block, original: Any = original, gate: Any = gate, **kwargs: Any
        ) -> Any:
            middle = x + block.attn(block.ln_1(x), *args, **kwargs)[0]
            return middle + gate * block.mlp(block.ln_2(middle))

        block.forward = forward


def test_a_layer_that_cannot_be_proved(pairs: tp.Pairs) -> None:
    module, words = tp.toys.load_module("gpt2")
    hidden_gate(module)
    model = tp.load(module, words)
    architecture = tp.Architecture(model)
    assert architecture.layers[1].form == "unproved"
    assert architecture.offers("resid_pre", 1)
    assert architecture.offers("attn_out", 1)
    with pytest.raises(errors.ComponentError) as error, tp.patching(model, pairs) as p, p.row():
        p.clean.mlp_out[1, 0] = 0
    for part in (
        "Layer 1 of this gpt2 (GPT2Block) has no mlp_out: the residual sum of this layer does not close.",
        "transformer.h.1.mlp.inner.c_proj.output leaves the sum open by ",
        "found = tp.Architecture(model, overrides={'attn_out': 'PATH.output', …})",
        "tp.adopt(model, found)",
        "It has: embed, resid_pre, ",
    ):
        assert part in str(error.value), str(error.value)
    result = tp.patch(model, pairs, "resid_pre")
    assert float(result["normalized"].max()) > 0.9, "what is proved stays usable"


def test_parts_that_read_no_stream_prove_nothing() -> None:
    """BERT's output projection stands in a module of its own and reads neurons, where a branch would read the stream."""
    configuration = BertConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        is_decoder=True,
        use_cache=False,
    )
    architecture = tp.Architecture(BertLMHeadModel(configuration).eval())
    assert {layer.form for layer in architecture.layers} == {"unproved"}
    assert architecture.offers("resid_post", 1)
    assert not architecture.offers("mlp_out", 1)


def test_overrides_go_through_the_same_proof() -> None:
    module = build("gpt2")
    right = tp.Architecture(module, {"stack": "transformer.h", "attn_out": "transformer.h.{layer}.attn.c_proj.output"})
    assert [str(layer.sublayers[0].out) for layer in right.layers] == [
        f"transformer.h.{i}.attn.c_proj.output" for i in range(3)
    ]
    wrong = tp.Architecture(module, {"attn_out": "transformer.h.{layer}.ln_1.output"})
    assert not wrong.offers("attn_out", 0)
    with pytest.raises(errors.ComponentError, match=r"transformer.h.0.ln_1.output leaves the sum open"):
        wrong.require("attn_out", 0)
    absent = tp.Architecture(module, {"attn_out": "transformer.h.{layer}.nothing.output"})
    with pytest.raises(errors.ComponentError, match="no module of that path gave a tensor of the stream's shape"):
        absent.require("attn_out", 0)
    with pytest.raises(errors.ArchitectureError, match="has no list of blocks at 'transformer.blocks'"):
        tp.Architecture(module, {"stack": "transformer.blocks"})
    with pytest.raises(
        errors.ArchitectureError, match="Overrides are attn_out, cross_attn_out, mlp_out, stack; not attention"
    ):
        tp.Architecture(module, {"attention": "x"})


def test_an_adopted_architecture_is_the_one_that_is_used(pairs: tp.Pairs) -> None:
    model = tp.load(*tp.toys.load_module("gpt2"))
    narrow = tp.Architecture(model, {"attn_out": "transformer.h.{layer}.ln_1.output"})
    tp.adopt(model, narrow)
    with pytest.raises(errors.ComponentError, match="no attn_out"):
        tp.patch(model, pairs, "attn_out")


def test_a_model_without_causality_is_not_pruned() -> None:
    """An attention that looks ahead: the probe sees it, and every row is measured."""
    module = build("llama")
    for layer in module.model.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda hidden_states, attention_mask=None, original=original, **k: original(
            hidden_states,
            attention_mask=torch.ones(1, 1, hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool),
            **k,
        )
    model = tp.load(module, tokenizer())
    assert not tp.Architecture(model).causal
    pairs = tp.Pairs("w30 w31 w32 w33", "w30 w31 w40 w33", "w35", "w36")
    with tp.patching(model, pairs) as p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    assert p.plan is not None
    assert p.plan.jobs == len(p.rows)
    assert "nothing is pruned" in p.plan.explain()
    assert float(abs(p.run()["effect"].sel(pos=0, layer=2)).max()) > 1e-3, "before the difference, and yet not zero"
    causal = tp.load(build("llama"), tokenizer())
    assert allowed(causal, tp.Architecture(causal)).form == "packed", (
        "others of its class and config are not judged by it"
    )
