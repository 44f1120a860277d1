"""The shrunken twin: a small model of the same class, to measure a model that has no weights here.

Where things are in a model is decided by its code and by the choices in its config (which norms, which layer types,
parallel or not), not by how wide it is. So a copy of the config with small widths gives a model on which everything can
be proved with random weights. Only sizes differ, and those are read from the shapes of the real model's parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from tracepatch.calls import POSITIONS as PROBE
from tracepatch.errors import ArchitectureError, ModelError, listing
from tracepatch.models import Model, load, module_of
from tracepatch.probe import Layer, Sublayer

VOCAB, POSITIONS, HEAD, WIDTH, INNER, RANK = 128, 64, 16, 48, 96, 16
LARGEST = 100_000_000  # parameters of a twin; one that is larger has a size that was not shrunk

# Names of sizes in configs. A size that none of these finds stays as it is.
_HEADS = re.compile(r"(^|_)(n|num|attention|kv|value|key).*heads?(_kv)?$")
_HEAD_WIDTH = re.compile(r"(^|_)(head_dim|d_kv|kv_channels|d_head|dim_head)$")
_WIDE = re.compile(r"^(hidden_size|n_embd|d_model|word_embed_proj_dim|embedding_size|attention_hidden_size)$")
_INNER = re.compile(r"(intermediate_size(_mlp)?|ffn_hidden_size|ffn_dim|n_inner|d_ff|dff|dim_ff)$")
_RANK = re.compile(r"(^|_)(rank|state_size|d_state|linear_dim)$")
_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len)$")
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")
_CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_k|moe_topk)$")
_TOKEN = re.compile(r"_token_ids?$")


@dataclass(frozen=True)
class Sizes:
    """What a twin has in another size than the real model: the real model's values.

    Attributes:
        layers: The layers as they were proved on the twin, with the real numbers of heads and neurons.
        d_model: Width of the residual stream.
        vocab: Width of the logits.
        embed: Width of the token embedding.
        dtype: Of the parameters.
    """

    layers: tuple[Layer, ...]
    d_model: int
    vocab: int
    embed: int
    dtype: torch.dtype


class Twin:
    """A small model with random weights, of the class and with the choices of one that has no weights here.

    Attributes:
        model: The twin; wrapped for traces if the real model is.
        changed: The sizes in the config, ``name → (real, twin)``.
    """

    def __init__(self, real: Model | nn.Module) -> None:
        """Builds it.

        Args:
            real: An nnsight model or a Hugging Face module on the meta device.

        Raises:
            ArchitectureError: A small model of this class cannot be built, or has other parts than the real one.
        """
        bare = isinstance(real, nn.Module)
        self._real: Any = real if bare else module_of(real)
        self._name = type(self._real).__name__
        self._config: Any = copy.deepcopy(self._real.config)
        self.changed = _shrink(self._config)
        try:
            twin: Any = _built(type(self._real), self._config, self._real.config)
        except Exception as error:
            raise ArchitectureError(
                f"{self._name} has no weights here, and no small model of its class could be built from its config "
                f"({self.summary}): {type(error).__name__}: {error}. Load it with its weights."
            ) from error
        self._require_the_same_parts(twin)
        self._twin: Any = twin
        try:
            self.model: Any = twin if bare else load(twin, real.tokenizer)
        except ModelError as error:
            raise ArchitectureError(f"The twin of {self._name} cannot be traced: {error}") from error

    @property
    def summary(self) -> str:
        """The sizes that differ, in one line."""
        return ", ".join(f"{name} {real} → {small}" for name, (real, small) in self.changed.items()) or "no size"

    def _require_the_same_parts(self, twin: nn.Module) -> None:
        ours, theirs = _parts(twin), _parts(self._real)
        if ours != theirs:
            offenders = [f"{name}: only in the {'twin' if name in ours else 'model'}" for name in sorted(ours ^ theirs)]
            raise ArchitectureError(
                f"{self._name} has no weights here, and its parameters are not those that its config describes, so "
                f"that a twin proves nothing about it.\n{listing(offenders)}\nLoad it with its weights."
            )

    # ------------------------------------------------------------------------------------------------ sizes

    def sizes(self, layers: tuple[Layer, ...], d_model: int, vocab: int) -> Sizes:
        """The real model's sizes, read from its parameters at the places that were proved on the twin.

        Args:
            layers: The twin's.
            d_model: The twin's.
            vocab: The twin's.

        Raises:
            ArchitectureError: A size is not confirmed by the shapes of the real model's parameters.
        """
        real, taken, scored = self._real, self._real.get_input_embeddings(), self._real.get_output_embeddings()
        resized = tuple(self._layer(layer, d_model) for layer in layers)
        widths = {
            out
            for layer in layers
            for s in layer.sublayers
            if s.projection
            for out in [self._projected(s.projection)[1]]
        }
        named = real.config.get_text_config()
        self._require(
            len(widths) == 1 and widths == {named.hidden_size},
            "d_model",
            f"hidden_size is {named.hidden_size}, and what blocks add to the stream is {sorted(widths)} wide",
        )
        rows = None if scored is None else scored.weight.shape[0]
        self._require(
            rows == named.vocab_size and vocab == self._twin.get_output_embeddings().weight.shape[0],
            "vocabulary",
            f"vocab_size is {named.vocab_size}, and the unembedding has {rows} rows",
        )
        return Sizes(resized, widths.pop(), named.vocab_size, taken.weight.shape[1], next(real.parameters()).dtype)

    def _layer(self, layer: Layer, d_model: int) -> Layer:
        dense = layer.sublayer("mlp")
        width = self._projected(dense.projection)[0] if dense is not None and dense.projection else layer.width
        return replace(layer, width=width, sublayers=tuple(self._sublayer(s) for s in layer.sublayers))

    def _sublayer(self, found: Sublayer) -> Sublayer:
        """An attention with the real numbers of heads, where they give the shapes that its weights have."""
        if not found.heads:
            return found
        named, small = self._real.config.get_text_config(), self._config.get_text_config()
        heads, inner = named.num_attention_heads, self._projected(found.projection)[0]
        self._require(
            found.heads == small.num_attention_heads and inner % heads == 0,
            f"heads of {found.path}",
            f"num_attention_heads is {heads}, the output projection takes {inner} values, and a twin whose config says "
            f"{small.num_attention_heads} computes {found.heads}",
        )
        per_value = inner // heads
        attended = found.attended
        assert attended is not None, "heads were counted where attention was seen"
        q, k, v = attended.queries, attended.keys, attended.values
        per_key = self._key_width(k.shape[-1], v.shape[-1], per_value)
        kv_heads = {found.heads: heads, 1: 1}.get(found.kv_heads) or _grouped(named)
        # Keys have rows of their own, or stand among the rows of a projection to queries, keys and values.
        fused = found.heads * q.shape[-1] + found.kv_heads * (k.shape[-1] + v.shape[-1])
        wanted = {
            (found.kv_heads * k.shape[-1], kv_heads * per_key),
            (fused, heads * per_key + kv_heads * (per_key + per_value)),
        }
        self._require(
            any(pair in wanted for pair in self._dims_in(found)),
            f"kv_heads of {found.path}",
            f"none of its weights has the rows that {kv_heads} heads of keys {per_key} wide need",
        )

        def sized(tensor: torch.Tensor, count: int, width: int) -> torch.Tensor:
            return torch.empty(tensor.shape[0], count, tensor.shape[2], width, device="meta")

        queries, keys, values = sized(q, heads, per_key), sized(k, kv_heads, per_key), sized(v, kv_heads, per_value)
        attended = replace(attended, heads=heads, queries=queries, keys=keys, values=values)
        return replace(found, heads=heads, kv_heads=kv_heads, d_head=per_value, attended=attended)

    def _key_width(self, small: int, small_value: int, value: int) -> int:
        """How wide one head's queries and keys are: what two config entries add up to, or as wide as its values."""
        named, twin = self._real.config.get_text_config(), self._config.get_text_config()
        parts = "qk_nope_head_dim", "qk_rope_head_dim"
        if all(hasattr(twin, part) for part in parts):
            return int(sum(getattr(named, part) for part in parts))
        return value if small == small_value else 0

    def _dims_in(self, attention: Sublayer) -> Iterator[tuple[int, int]]:
        """The dims of the matrices before pattern · v, each in the twin and in the real model."""
        theirs = dict(self._real.get_submodule(attention.path).named_parameters())
        after = attention.projection.removeprefix(attention.path + ".")
        for name, parameter in self._twin.get_submodule(attention.path).named_parameters():
            if parameter.ndim == 2 and not name.startswith(after + "."):
                yield from zip(parameter.shape, theirs[name].shape, strict=True)

    def _projected(self, path: str) -> tuple[int, int]:
        """What the real model's projection takes and gives."""
        module = self._real.get_submodule(path)
        rows, columns = module.weight.shape
        return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)  # GPT-2's weights are transposed

    def _require(self, holds: bool, size: str, found: str) -> None:
        if not holds:
            raise ArchitectureError(
                f"{self._name} has no weights here, and the shapes of its parameters do not confirm its {size}: "
                f"{found}. Load it with its weights."
            )


def _grouped(config: Any) -> int:
    return int(next((getattr(config, n) for n in ("num_key_value_heads", "num_kv_heads") if hasattr(config, n)), 0))


def _parts(module: nn.Module) -> set[str]:
    """Names and ranks of the parameters, without numbers inside a block: some have a module for each head or expert."""
    found = set()
    for name, parameter in module.named_parameters():
        stack, *inside = re.split(r"(?<=[.])([0-9]+[.])", name, maxsplit=1)
        found.add(stack + re.sub(r"[.][0-9]+[.]", ".N.", "".join(inside)) + f" ({parameter.ndim} dims)")
    return found


# ---------------------------------------------------------------------------------------------------- shrinking


def _shrink(config: PretrainedConfig, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Makes a config's sizes small in place, such that what divides still divides; what changed, with both values."""
    changed: dict[str, tuple[int, int]] = {}
    for name, part in list(vars(config).items()):
        if isinstance(part, PretrainedConfig) and hasattr(part, "hidden_size"):  # another model's, not some options
            changed |= _shrink(part, f"{prefix}{name}.")
    given = config.to_dict()
    numbers = {k: v for k, v in given.items() if isinstance(v, int) and not isinstance(v, bool)}
    heads = getattr(config, "num_attention_heads", 0)
    head_width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    smaller = {**_heads(numbers, heads), **_head_widths(numbers)}
    if head_width:
        small_width = smaller.get("head_dim", min(head_width, HEAD))
        _shorten_rotations(getattr(config, "rope_parameters", None), small_width / head_width)
    smaller |= _widths(config, numbers, smaller, heads * head_width) | _experts(numbers)
    for name, value in numbers.items():
        if "vocab_size" in name:
            smaller[name] = min(value, VOCAB)
        elif _RANK.search(name):
            smaller[name] = min(value, RANK)
        elif name == "rotary_dim":  # the part of a head that is rotated
            smaller[name] = max(2, value * min(head_width, HEAD) // head_width)
        elif _POSITIONS.match(name) and not given.get("rope_parameters"):  # a table or mask, not just a limit
            smaller[name] = min(value, POSITIONS)
    for name, small in smaller.items():
        if small != numbers[name]:
            setattr(config, name, small)
            changed[prefix + name] = numbers[name], small
    for name, value in given.items():
        if _TOKEN.search(name) and isinstance(value, int) and value >= VOCAB:
            setattr(config, name, value % VOCAB)
        elif _TOKEN.search(name) and isinstance(value, list):
            setattr(config, name, [i % VOCAB for i in value])
    return changed


def _heads(numbers: dict[str, int], heads: int) -> dict[str, int]:
    """Four heads; two of keys and values where they are fewer than the queries' and not one."""
    found = {}
    for name, count in numbers.items():
        if _HEADS.search(name) and heads > 4:
            found[name] = 4 * (count // heads) if count % heads == 0 else 1 if count == 1 else 2
    return found


def _head_widths(numbers: dict[str, int]) -> dict[str, int]:
    """Widths of a head: different ones stay different, in the same order."""
    named = {n: v for n, v in numbers.items() if _HEAD_WIDTH.search(n) and n != "qk_head_dim"}
    steps = sorted(set(named.values()))
    if not steps or steps[-1] <= HEAD:
        return {}
    small = {real: HEAD // 2 * (i + 1) for i, real in enumerate(steps)} if len(steps) > 1 else {steps[0]: HEAD}
    found = {name: small[v] for name, v in named.items()}
    if "qk_head_dim" in numbers:
        found["qk_head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    return found


def _widths(config: Any, numbers: dict[str, int], smaller: dict[str, int], all_heads: int) -> dict[str, int]:
    """The stream's width and the MLPs', with multiples of the stream's width left multiples."""
    real = config.hidden_size
    heads = smaller.get(_name(config, "num_attention_heads"), getattr(config, "num_attention_heads", 0))
    own_width = "head_dim" in numbers and numbers["head_dim"] * heads > 0
    together = heads * (smaller.get("head_dim", numbers["head_dim"]) if own_width else min(HEAD, real // max(heads, 1)))
    stream = min(real, together if all_heads == real else WIDTH)
    found = {name: stream if v == real else stream // 2 for name, v in numbers.items() if _WIDE.match(name)}
    inner = {name: v for name, v in numbers.items() if _INNER.search(name) and v > 0}
    for step, size in enumerate(sorted(set(inner.values()))):
        times = size // real if size % real == 0 and size // real <= 8 else 0
        small = times * stream or min(size, INNER + 8 * step)
        found |= {name: small for name, v in inner.items() if v == size}
    return found


def _experts(numbers: dict[str, int]) -> dict[str, int]:
    """One expert more than are chosen, in every group two at least."""
    chosen = max((v for n, v in numbers.items() if _CHOSEN.match(n)), default=0)
    groups, used = (numbers.get(n) or 1 for n in ("n_group", "topk_group"))
    each = max(2, -(-(chosen + 1) // groups), -(-chosen // used))
    return {name: min(v, groups * each) for name, v in numbers.items() if _EXPERTS.match(name) and chosen}


def _name(config: Any, name: str) -> str:
    return str(config.attribute_map.get(name, name))


def _shorten_rotations(rotations: Any, share: float) -> None:
    """Cuts lists of factors, one for each rotated pair of dims of a head, to the pairs that are left."""
    for key, value in (rotations or {}).items():
        if isinstance(value, dict):  # one entry a kind of layer
            _shorten_rotations(value, share)
        elif isinstance(value, list) and key.endswith("_factor"):
            rotations[key] = value[: max(1, int(len(value) * share))]


def _built(kind: Any, config: Any, real: Any) -> nn.Module:
    """The model of a shrunken config, in float32 on the CPU, with weights that make every part of it matter."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    attention = {"attn_implementation": "eager"} if real._attn_implementation == "eager" else {}
    # Others (flash attention) need hardware that may not be here; q, k and v are the same.
    config._attn_implementation = None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        module: nn.Module = kind._from_config(config, dtype=torch.float32, **attention).eval()
        count = sum(p.numel() for p in module.parameters())
        if count > LARGEST:
            largest = sorted(module.named_parameters(), key=lambda item: -item[1].numel())[:3]
            shown = ", ".join(f"{name} {tuple(p.shape)}" for name, p in largest)
            raise ValueError(f"it would have {count:,} parameters; the largest are {shown}")
        _randomise(module)
        if not config.is_encoder_decoder:  # that takes more than ids
            with torch.no_grad():  # whether sizes fit together shows in a forward only
                token = 1 if config.pad_token_id == 0 else 0  # transformers warns of padding
    module(torch.full((1, PROBE), token), use_cache=False)
    return module


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Draws every weight, such that no norm is the identity, no bias zero, and no layer loud or silent."""
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        spread = parameter.std().item() if parameter.numel() > 1 else 0.0
        if parameter.ndim < 2 or abs(parameter.mean().item()) > spread:  # a norm, a bias, a decay
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise * (1.4 / min(parameter.shape[-2:]) ** 0.5))
