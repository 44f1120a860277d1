"""Models without weights: what a shrunken twin proves equals what the real weights prove."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ioi_pairs
from tiny_models import ALL, CONFIGS, EIGHT, ENCODER_DECODER, HEADS, build, config, tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tracepatch as tp
from tracepatch import errors
from tracepatch.calls import Place
from tracepatch.twins import Twin
from tracepatch.weights import weightless

DECODERS = [t for t in ALL if t not in ENCODER_DECODER]

# Every size of the tiny models made so large that the twin has to shrink it.
LARGER = {
    "vocab_size": 300,
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "word_embed_proj_dim": 128,
    "num_attention_heads": 8,
    "n_head": 8,
    "n_heads": 8,
    "head_dim": 24,
    "intermediate_size": 200,
    "ffn_dim": 200,
    "ffn_hidden_size": 200,
    "moe_intermediate_size": 72,
    "shared_expert_intermediate_size": 88,
    "rotary_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 16,
    "q_lora_rank": 40,
    "kv_lora_rank": 36,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 20,
    "v_head_dim": 24,
    "state_size": 20,
    "time_step_rank": 20,
}


def larger(model_type: str) -> dict[str, Any]:
    given = CONFIGS[model_type]
    kv = {"num_key_value_heads": 8 if given.get("num_key_value_heads") == HEADS else 4}
    return {k: v for k, v in (LARGER | kv).items() if k in given}


def without_weights(configuration: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration, dtype=dtype).eval()


def facts(architecture: tp.Architecture) -> dict[str, Any]:
    """Everything an architecture says but what was measured in numbers; places in their order, not by their clock."""
    found = {k: v for k, v in vars(architecture).items() if k not in ("eager_error", "logit_scale", "twin", "modules")}
    clock = {order: rank for rank, order in enumerate(sorted(set(orders(found))))}
    offered = {c: [architecture.why_not(c, i) for i in range(len(architecture))] for c in tp.COMPONENTS}
    units = {c: [architecture.units(c, i) for i in range(len(architecture))] for c in tp.COMPONENTS}
    widths = {c: [architecture.width(c, i) for i in range(len(architecture))] for c in tp.COMPONENTS}
    return {"offered": offered, "units": units, "widths": widths} | plain(found, clock)


def orders(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from orders(item)
    elif dataclasses.is_dataclass(value):
        yield from ([value.order] if isinstance(value, Place) else [])
        yield from orders([getattr(value, f.name) for f in dataclasses.fields(value)])


MEASURED = ("error", "tried", "began", "ended", "z", "pattern")


def plain(value: Any, clock: dict[float, int]) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {k: plain(v, clock) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item, clock) for item in value]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if "order" in fields:
            fields["order"] = clock[fields["order"]]
        return plain({k: v for k, v in fields.items() if k not in MEASURED}, clock)
    return value


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_twin_proves_what_the_weights_prove(model_type: str) -> None:
    layers = 2 if model_type in EIGHT else 3
    sizes = larger(model_type)
    real = tp.Architecture(tp.load(build(model_type, layers, **sizes), tokenizer()))
    model = tp.load(without_weights(config(model_type, layers, **sizes)), tokenizer())
    twin = tp.Architecture(model)
    assert not real.twin
    assert twin.twin.count("→") >= 3, "nothing was shrunk, so this compared a model with itself"
    assert facts(twin) == facts(real)
    assert "proved on a twin with random weights in float32, shrunken: " in str(twin)
    assert weightless(tp.models.module_of(model)), "the real model was left alone"


# ---------------------------------------------------------------------------------------------------- at full size

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LITERALS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024, "eos_token_id": 50256},
    ),
    "llama-3.1-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
        },
    ),
    "gemma-2-27b": (
        "gemma2",
        {
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "vocab_size": 256000,
            "sliding_window": 4096,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
    ),
    "qwen3-32b": (
        "qwen3",
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "vocab_size": 129280,
        },
    ),
    "falcon-40b": (
        "falcon",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
            "vocab_size": 65024,
        },
    ),
    "phi-3-mini-128k": (
        "phi3",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.01 * i for i in range(48)],
                "long_factor": [1.0 + 0.5 * i for i in range(48)],
                "original_max_position_embeddings": 4096,
            },
        },
    ),
}
# layers, d_model, vocab, heads, kv_heads, d_head of values, d_head of keys, neurons (0: routed experts have none)
SIZES = {
    "gpt2": (12, 768, 50257, 12, 12, 64, 64, 3072),
    "llama-3.1-70b": (80, 8192, 128256, 64, 8, 128, 128, 28672),
    "gemma-2-27b": (46, 4608, 256000, 32, 16, 128, 128, 36864),
    "mixtral-8x7b": (32, 4096, 32000, 32, 8, 128, 128, 0),
    "qwen3-32b": (64, 5120, 151936, 64, 8, 128, 128, 25600),
    "gpt-oss-120b": (36, 2880, 201088, 64, 8, 64, 64, 0),
    "deepseek-v3": (61, 7168, 129280, 128, 128, 128, 192, 0),
    "falcon-40b": (60, 8192, 65024, 128, 8, 64, 64, 32768),
    "phi-3-mini-128k": (32, 3072, 32064, 32, 32, 96, 96, 8192),
}


def literal(name: str) -> Any:
    model_type, values = LITERALS[name]
    return AutoConfig.for_model(model_type, **values)


QUICK = ("gpt2", "llama-3.1-70b", "mixtral-8x7b", "gpt-oss-120b")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LITERALS])
def test_models_that_fit_on_no_laptop(name: str) -> None:
    module = without_weights(literal(name), torch.bfloat16)
    began = time.process_time()
    twin = Twin(module)
    architecture = tp.Architecture(tp.load(module, tokenizer()))
    assert time.process_time() - began < 20, "seconds of work"
    attention, last = architecture.attention(0), len(architecture) - 1
    assert attention is not None
    assert (
        len(architecture),
        architecture.d_model,
        architecture.vocab,
        attention.heads,
        attention.kv_heads,
        architecture.width("v", last),
        architecture.width("k", last),
        architecture.units("mlp_act", last) if architecture.offers("mlp_act", last) else 0,
    ) == SIZES[name]
    assert architecture.dtype == torch.bfloat16
    in_traces = () if name == "falcon-40b" else ("q", "k", "v")  # falcon attends in code of its own
    assert all(architecture.offers(c, i) for c in (*in_traces, "z", "head_out") for i in (0, last))
    assert all(layer.error == 0 for layer in architecture.layers)
    small = sum(p.numel() for p in twin.model.parameters())
    assert small < 20e6, f"{small:,} parameters"


# ---------------------------------------------------------------------------------------------------- plans


def test_a_plan_needs_no_weights() -> None:
    """The same rows, the same proofs of what cannot matter, the same forwards."""
    pairs = ioi_pairs(2)

    @tp.recipe
    def sweep(p: tp.Patching) -> None:
        for component in ("resid_pre", "z", "q", "mlp_out"):
            for index in p.grid(component, tp.COMPONENTS[component].index):
                with p.row(component=component, number=len(p.rows)):
                    getattr(p.corrupted, component)[index] = getattr(p.clean, component)[index]

    here = sweep.plan(tp.toys.load("gpt2"), pairs)
    away = sweep.plan(tp.load(tp.toys.folder("gpt2"), remote="http://127.0.0.1:9"), pairs)
    assert away.rows == here.rows
    assert repr(away.groups) == repr(here.groups), "jobs are compared by identity"
    assert (away.jobs, away.row_bytes) == (here.jobs, here.row_bytes)


def test_without_weights_there_is_a_plan_and_no_run() -> None:
    model = tp.load(without_weights(config("llama")), tokenizer())
    pairs = tp.Pairs("w30 w31 w32 w33", "w30 w31 w40 w33", "w35", "w36")
    with tp.patching(model, pairs) as p, p.row():
        p.corrupted.z[0, -1, 0] = p.clean.z[0, -1, 0]
    assert p.plan.jobs == 1
    for refused in (p.run, lambda: pairs.check(model)):
        with pytest.raises(errors.ModelError, match="LlamaForCausalLM has no weights here: it can be planned on, not "):
            refused()


# ---------------------------------------------------------------------------------------------------- what is left alone


def test_a_twin_leaves_everything_alone() -> None:
    module = without_weights(literal("gpt-oss-120b"), torch.bfloat16)
    before, state = module.config.to_dict(), torch.random.get_rng_state()
    tp.Architecture(module)
    assert module.config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.device.type for p in module.parameters()} == {"meta"}


def test_overrides_are_proved_on_the_twin() -> None:
    right = tp.Architecture(without_weights(literal("gpt2")), {"attn_out": "transformer.h.{layer}.attn.c_proj.output"})
    assert right.offers("attn_out", 11)
    wrong = tp.Architecture(without_weights(literal("gpt2")), {"attn_out": "transformer.h.{layer}.ln_1.output"})
    assert not wrong.offers("attn_out", 0)


# ---------------------------------------------------------------------------------------------------- refusals


def refusal(module: Any) -> str:
    with pytest.raises(errors.ArchitectureError) as error:
        tp.Architecture(module)
    assert f"{type(module).__name__} has no weights here" in str(error.value)
    assert str(error.value).endswith("Load it with its weights.")
    return str(error.value)


def llama(**sizes: Any) -> Any:
    return without_weights(config("llama", **(larger("llama") | sizes)))


def test_a_module_that_its_config_does_not_describe() -> None:
    module = llama()
    module.model.layers[1].mlp.extra = nn.Linear(128, 128, device="meta")
    said = refusal(module)
    assert "its parameters are not those that its config describes" in said
    assert "model.layers.1.mlp.extra.weight (2 dims): only in the model" in said
    fewer = llama()
    fewer.model.layers = fewer.model.layers[:2]
    assert "model.layers.2.self_attn.q_proj.weight (2 dims): only in the twin" in refusal(fewer)


def test_sizes_that_the_parameters_do_not_confirm() -> None:
    module = llama()
    module.lm_head = nn.Linear(128, 301, bias=False, device="meta")
    assert "do not confirm its vocabulary: vocab_size is 300, and the unembedding has 301 rows" in refusal(module)
    module = llama()
    module.config.hidden_size = 256
    assert "do not confirm its d_model: hidden_size is 256, and what blocks add to the stream is [128] " in refusal(
        module
    )
    module = llama()
    module.config.num_attention_heads = 7
    assert "do not confirm its heads of model.layers.0.self_attn: num_attention_heads is 7, the output " in refusal(
        module
    )
    module = llama()
    module.config.num_key_value_heads = 2
    assert "do not confirm its kv_heads of model.layers.0.self_attn: none of its weights has the rows that " in refusal(
        module
    )


def test_a_class_that_cannot_be_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracepatch.twins.LARGEST", 1000)
    said = refusal(llama())
    assert "no small model of its class could be built from its config (num_attention_heads 8 → 4, " in said
    assert "the largest are model." in said
