"""Tiny models with random weights, one for every architecture that the tests speak about.

They run in milliseconds and hide nothing: biases are not zero, norm weights are not one, grouped heads are grouped,
the width of a head is not d_model / heads where the architecture allows that, sliding windows are shorter than the
prompts, and multipliers and softcaps bind. A library that is wrong about any of these is wrong here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

DEVICE = os.environ.get("TRACEPATCH_DEVICE", "cpu")  # where the tests' models run; their oracles stay on the CPU
VOCAB = 60
D_MODEL = 32
HEADS = 4
KV_HEADS = 2
WINDOW = 4

# Special tokens lie inside the vocabulary: transformers warns about ids outside of it. w0 is the padding token, so
# prompts that start or end with w0 make transformers ask for an attention mask.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_WIDTHS = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_attention_heads": HEADS, "max_position_embeddings": 64}
_DENSE = {**_WIDTHS, "intermediate_size": 48}
_GROUPED = {**_DENSE, "num_key_value_heads": KV_HEADS}
_WIDE = {**_GROUPED, "head_dim": 16}  # heads * head_dim = 64 != d_model
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_head": HEADS, "n_positions": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neo": {
        **_WIDTHS,
        "intermediate_size": 48,
        "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]],  # repeated to the number of layers in build()
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neox": _DENSE,
    "opt": {**_WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL},
    "bloom": {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_head": HEADS},
    "falcon": {**_WIDTHS, "ffn_hidden_size": 48},
    "mpt": {"vocab_size": VOCAB, "d_model": D_MODEL, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2},
    "llama": _WIDE,
    "mistral": {**_WIDE, "sliding_window": WINDOW},
    "mixtral": {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3": _WIDE,
    "qwen3_moe": {**_WIDE, **_EXPERTS},
    "gemma": _WIDE,
    "gemma2": {
        **_WIDE,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {**_WIDE, "sliding_window": WINDOW, "query_pre_attn_scalar": 10},
    "phi": {**_GROUPED, "qk_layernorm": True},
    "phi3": _GROUPED,
    "stablelm": {**_GROUPED, "qk_layernorm": True, "use_qkv_bias": True},
    "olmo": {**_GROUPED, "clip_qkv": 1.5},
    "olmo2": _GROUPED,
    "cohere": {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {**_GROUPED, "sliding_window": WINDOW, "logit_scale": 0.5},
    "starcoder2": {**_GROUPED, "sliding_window": WINDOW},
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.5,
    },
    "deepseek_v3": {
        **_DENSE,
        "num_key_value_heads": HEADS,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 12,
    },
    "gpt_oss": {
        **_WIDE,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # The default extends a context of 4096, which contradicts a maximum of 64 positions.
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "smollm3": {**_GROUPED, "no_rope_layer_interval": 2},
    "glm4": _WIDE,
    "nemotron": _WIDE,
    "exaone4": {**_GROUPED, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "mamba": {"vocab_size": VOCAB, "hidden_size": D_MODEL, "state_size": 6, "time_step_rank": 4},
    "t5": {
        "vocab_size": VOCAB,
        "d_model": D_MODEL,
        "num_heads": HEADS,
        "d_kv": 12,
        "d_ff": 48,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "vocab_size": VOCAB,
        "d_model": D_MODEL,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
}

ALL: tuple[str, ...] = tuple(CONFIGS)
EIGHT: tuple[str, ...] = ("gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "opt", "falcon", "mixtral")
EXPERTS: tuple[str, ...] = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
ENCODER_DECODER: tuple[str, ...] = ("t5", "bart")


def config(model_type: str, layers: int = 3, **overrides: Any) -> Any:
    """Makes the configuration that `build` builds from.

    Args:
        model_type: One of `ALL`.
        layers: Number of blocks (of the encoder too, where there is one).
        **overrides: Configuration values that replace the tiny ones.

    Returns:
        A transformers configuration.
    """
    depth = {"num_hidden_layers": layers}
    if model_type == "gpt_neo":
        kinds = ["global" if layer % 2 == 0 else "local" for layer in range(layers)]
        depth = {"num_layers": layers, "attention_types": [[kinds, 1]]}
    elif model_type == "t5":
        depth = {"num_layers": layers, "num_decoder_layers": layers}
    elif model_type == "bart":
        depth = {"encoder_layers": layers, "decoder_layers": layers}
    elif model_type in ("gemma2", "gemma3_text", "cohere2", "gpt_oss", "exaone4"):
        # Alternate, so that even three layers hold both kinds (some types have one full layer in four or six).
        kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
        depth = {"num_hidden_layers": layers, "layer_types": kinds}
    return AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **SPECIAL, **depth, **overrides})


def build(
    model_type: str, layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any
) -> PreTrainedModel:
    """Builds a tiny model with random weights, in eval mode, on ``DEVICE``.

    The weights depend on the arguments only; the global random state is left alone.

    Args:
        model_type: One of `ALL`.
        layers: Number of blocks.
        dtype: The weights are drawn in float32 and cast, so that two dtypes hold the same model.
        seed: Of the weights.
        **config_overrides: Configuration values that replace the tiny ones. `attn_implementation` chooses the
            attention kernel ("eager", "sdpa").

    Returns:
        The model.
    """
    implementation = config_overrides.pop("attn_implementation", None)
    auto = AutoModelForSeq2SeqLM if model_type in ENCODER_DECODER else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = {} if implementation is None else {"attn_implementation": implementation}
        model = auto.from_config(config(model_type, layers, **config_overrides), dtype=torch.float32, **chosen)
        randomise(model)
    if dtype == torch.float64 and model_type in EXPERTS:
        model.set_experts_implementation("eager")  # the default, grouped matrix products, knows no float64
    return model.to(DEVICE, dtype).eval()


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Replaces the initial weights by ones that make every part of the model matter.

    Args:
        model: Changed in place.
    """
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter is embedding:
            parameter.copy_(0.5 * noise)
        elif name.endswith("sinks"):
            parameter.copy_(noise)  # of the size of the attention scores
        elif parameter.ndim == 1 or "norm" in name or name.endswith("A_log"):
            parameter.add_(0.2 * noise)  # biases start at 0, norm weights at 1 (or at 0, where 1 is added to them)
        else:
            parameter.copy_(0.25 * noise)  # a gain of 0.25 * sqrt(32) = 1.4 per projection
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # weights of DeepSeek's router, although a buffer
            buffer.copy_(0.1 * torch.randn_like(buffer))


def tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer whose tokens are the words "w0" to "w59" between white space, with no BOS.

    Returns:
        The tokenizer. " w7" and "w7" are the same token, so that answers may be written with a leading space.
    """
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2")
