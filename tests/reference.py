"""The oracle: activation patching done the slow and obvious way.

One plain forward per patch: the whole prompt, batch 1, no cache, ordinary torch hooks. Where things live is written
down by hand for every architecture (`PLACES`). Nothing here is shared with the library, which finds the same places
by measuring, so that the two check each other.

How the hooks are built: each of them turns a tensor of the running model into the component that stands there,
calls `_Forward.tap`, which records it and applies the edits of that component and layer, and writes the result back
only if it was edited. Edits therefore act in the order in which the forward reaches their sites, and edits of one
site in list order.

Dims: pos head kv_head neuron dest src d_model d_head vocab, never a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# In the order of a forward: components of one layer are reached in this order.
DIMS: dict[str, tuple[str, ...]] = {
    "embed": ("pos", "d_model"),
    "resid_pre": ("pos", "d_model"),
    "attn_in": ("pos", "d_model"),
    "q_in": ("pos", "head", "d_model"),
    "k_in": ("pos", "kv_head", "d_model"),
    "v_in": ("pos", "kv_head", "d_model"),
    "q": ("pos", "head", "d_head"),
    "k": ("pos", "kv_head", "d_head"),
    "v": ("pos", "kv_head", "d_head"),
    "scores": ("head", "dest", "src"),
    "pattern": ("head", "dest", "src"),
    "z": ("pos", "head", "d_head"),
    "head_out": ("pos", "head", "d_model"),
    "attn_out": ("pos", "d_model"),
    "cross_attn_out": ("pos", "d_model"),
    "resid_mid": ("pos", "d_model"),
    "mlp_in": ("pos", "d_model"),
    "router_logits": ("pos", "expert"),
    "experts_out": ("pos", "d_model"),
    "mlp_act": ("pos", "neuron"),
    "mlp_out": ("pos", "d_model"),
    "resid_post": ("pos", "d_model"),
    "logits_in": ("pos", "d_model"),
    "logits": ("pos", "vocab"),
}
UNITS = ("head", "kv_head", "neuron", "expert")
WITHOUT_LAYER = ("embed", "logits_in", "logits")  # their layer is 0


@dataclass
class Edit:
    """One write into the running forward.

    Attributes:
        component: A key of `DIMS`.
        layer: Which block; 0 for embed, logits_in and logits.
        value: What is written. Its shape is that of the component (`DIMS`) restricted to `positions`, `unit` and
            `sources`; an int `unit` drops that dim. So `Edit(c, l, values[c, l])` writes a component back, and for
            scores and pattern the dims stay [head, dest, src]. A 0-dim tensor goes everywhere. For q_in, k_in and
            v_in the unit dim may be left out: every unit then gets the same value.
        positions: Which positions (destinations, for scores and pattern); all if None.
        unit: Which head, kv_head, neuron or expert, or a list of them; all if None.
        mode: "set" replaces the live value, "add" adds to it; "of" sets what `value`, a function, makes of it, with
            all dims.
        sources: Which source positions, for scores and pattern only; all if None.
    """

    component: str
    layer: int
    value: Any
    positions: Sequence[int] | None = None
    unit: int | Sequence[int] | None = None
    mode: str = "set"
    sources: Sequence[int] | None = None


@dataclass(frozen=True)
class Places:
    """Where the components of one architecture live. Paths with a block in front are relative to that block.

    Attributes:
        embed: The token embedding.
        blocks: The list of blocks.
        last_read: The module that reads the final residual: the last norm, or the unembedding where there is none.
        attn: The module that takes the (normed) stream and attends; None if there is no attention.
        attn_norm: The norm between the block's input and `attn`; None if attention reads the stream itself.
        o_proj: The output projection; its input is z.
        attn_adds: The module whose output is added to the stream, but for `multiplier`.
        attn_post_norm: "rms" (x w / rms) or "rms+1" (x (1 + w) / rms) if `attn_adds` is a norm after `o_proj`.
        cross_adds: Like `attn_adds`, for attention to an encoder.
        mlp: The module that takes the (normed) stream first; None if there is no MLP.
        mlp_norm: The norm in front of it; None if it reads the stream itself.
        mlp_last: The last projection; its input are the neurons. Blocks that lack it (routed experts) have no mlp_act.
        mlp_adds: Like `attn_adds`.
        router: The module that scores the experts with its one linear map; blocks that lack it have no experts.
        experts: The module that holds the experts.
        parallel: Attention and MLP both read the block's input, so there is no stream between them.
        mid: There is a resid_mid (sequential blocks that have nothing but attention and MLP).
        interface: Attention calls transformers' attention interface: q, k, v, scores and pattern can be had.
        multiplier: Name of the configuration value that multiplies what is added to the stream.
    """

    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    last_read: str = "model.norm"
    attn: str | None = "self_attn"
    attn_norm: str | None = "input_layernorm"
    o_proj: str | None = "self_attn.o_proj"
    attn_adds: str = "self_attn.o_proj"
    attn_post_norm: str | None = None
    cross_adds: str | None = None
    mlp: str | None = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_last: str | None = "mlp.down_proj"
    mlp_adds: str | None = "mlp"
    router: str | None = None
    experts: str | None = None
    parallel: bool = False
    mid: bool = True
    interface: bool = True
    multiplier: str | None = None


LLAMA = Places()
EXPERTS = replace(LLAMA, router="mlp.gate", experts="mlp.experts")

GPT2 = Places(
    embed="transformer.wte",
    blocks="transformer.h",
    last_read="transformer.ln_f",
    attn="attn",
    attn_norm="ln_1",
    o_proj="attn.c_proj",
    attn_adds="attn.c_proj",
    mlp="mlp",
    mlp_norm="ln_2",
    mlp_last="mlp.c_proj",
    mlp_adds="mlp",
)

# Norms around attention and MLP. Here `post_attention_layernorm` is what its name says; in Llama it is in front of
# the MLP.
GEMMA2 = replace(
    LLAMA,
    attn_adds="post_attention_layernorm",
    attn_post_norm="rms+1",
    mlp_norm="pre_feedforward_layernorm",
    mlp_adds="post_feedforward_layernorm",
)

# Norms after attention and MLP only: both read the bare stream.
OLMO2 = replace(
    LLAMA,
    attn_norm=None,
    attn_adds="post_attention_layernorm",
    attn_post_norm="rms",
    mlp_norm=None,
    mlp_adds="post_feedforward_layernorm",
)

# One norm for attention and MLP, which both read the block's input.
PARALLEL_LLAMA = replace(LLAMA, mlp_norm="input_layernorm", parallel=True, mid=False)

PLACES: dict[str, Places] = {
    "gpt2": GPT2,
    "gpt_neo": replace(GPT2, o_proj="attn.attention.out_proj", attn_adds="attn.attention.out_proj", interface=False),
    "gptj": replace(
        GPT2,
        o_proj="attn.out_proj",
        attn_adds="attn.out_proj",
        mlp_norm="ln_1",
        mlp_last="mlp.fc_out",
        parallel=True,
        mid=False,
        interface=False,
    ),
    # In a parallel block `post_attention_layernorm` normalises the block's input, for the MLP.
    "gpt_neox": Places(
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        last_read="gpt_neox.final_layer_norm",
        attn="attention",
        o_proj="attention.dense",
        attn_adds="attention.dense",
        mlp_last="mlp.dense_4h_to_h",
        parallel=True,
        mid=False,
    ),
    # The MLP has no module of its own: fc1 and fc2 are in the block.
    "opt": Places(
        embed="model.decoder.embed_tokens",
        blocks="model.decoder.layers",
        last_read="model.decoder.final_layer_norm",
        attn_norm="self_attn_layer_norm",
        o_proj="self_attn.out_proj",
        attn_adds="self_attn.out_proj",
        mlp="fc1",
        mlp_norm="final_layer_norm",
        mlp_last="fc2",
        mlp_adds="fc2",
    ),
    # The modules for attention and MLP add the residual themselves, so what is added is what their projections give.
    "bloom": Places(
        embed="transformer.word_embeddings",
        blocks="transformer.h",
        last_read="transformer.ln_f",
        attn="self_attention",
        o_proj="self_attention.dense",
        attn_adds="self_attention.dense",
        mlp_last="mlp.dense_4h_to_h",
        mlp_adds="mlp.dense_4h_to_h",
        interface=False,
    ),
    # The block adds attention to the MLP's output in place; hooks run before that and `tap` copies.
    "falcon": Places(
        embed="transformer.word_embeddings",
        blocks="transformer.h",
        last_read="transformer.ln_f",
        attn="self_attention",
        o_proj="self_attention.dense",
        attn_adds="self_attention.dense",
        mlp_norm="input_layernorm",
        mlp_last="mlp.dense_4h_to_h",
        parallel=True,
        mid=False,
        interface=False,
    ),
    # `ffn` adds the residual itself.
    "mpt": Places(
        embed="transformer.wte",
        blocks="transformer.blocks",
        last_read="transformer.norm_f",
        attn="attn",
        attn_norm="norm_1",
        o_proj="attn.out_proj",
        attn_adds="attn.out_proj",
        mlp="ffn",
        mlp_norm="norm_2",
        mlp_last="ffn.down_proj",
        mlp_adds="ffn.down_proj",
        interface=False,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": EXPERTS,
    "qwen2": LLAMA,
    "qwen2_moe": EXPERTS,
    "qwen3": LLAMA,
    "qwen3_moe": EXPERTS,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi": replace(
        PARALLEL_LLAMA,
        last_read="model.final_layernorm",
        o_proj="self_attn.dense",
        attn_adds="self_attn.dense",
        mlp_last="mlp.fc2",
    ),
    "phi3": LLAMA,
    "stablelm": LLAMA,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "cohere": PARALLEL_LLAMA,
    "cohere2": PARALLEL_LLAMA,
    "starcoder2": replace(LLAMA, mlp_last="mlp.c_proj"),
    "granite": replace(LLAMA, multiplier="residual_multiplier"),
    "deepseek_v3": EXPERTS,
    "gpt_oss": replace(EXPERTS, router="mlp.router"),
    "smollm3": LLAMA,
    "glm4": replace(LLAMA, attn_adds="post_self_attn_layernorm", attn_post_norm="rms", mlp_adds="post_mlp_layernorm"),
    "nemotron": LLAMA,
    "exaone4": OLMO2,
    # The mixer stands where attention stands elsewhere, and nothing where the MLP stands.
    "mamba": Places(
        embed="backbone.embeddings",
        blocks="backbone.layers",
        last_read="backbone.norm_f",
        attn=None,
        attn_norm="norm",
        o_proj=None,
        attn_adds="mixer",
        mlp=None,
        mlp_norm=None,
        mlp_last=None,
        mlp_adds=None,
        mid=False,
        interface=False,
    ),
    "t5": Places(
        embed="decoder.embed_tokens",
        blocks="decoder.block",
        last_read="decoder.final_layer_norm",
        attn="layer.0.SelfAttention",
        attn_norm="layer.0.layer_norm",
        o_proj="layer.0.SelfAttention.o",
        attn_adds="layer.0.SelfAttention.o",
        cross_adds="layer.1.EncDecAttention.o",
        mlp="layer.2.DenseReluDense",
        mlp_norm="layer.2.layer_norm",
        mlp_last="layer.2.DenseReluDense.wo",
        mlp_adds="layer.2.DenseReluDense",
        mid=False,
    ),
    # Norms on the stream: x = norm(x + f(x)), so contributions do not add up to the block's output.
    "bart": Places(
        embed="model.decoder.embed_tokens",
        blocks="model.decoder.layers",
        last_read="lm_head",
        attn_norm=None,
        o_proj="self_attn.out_proj",
        attn_adds="self_attn.out_proj",
        cross_adds="encoder_attn.out_proj",
        mlp="fc1",
        mlp_norm=None,
        mlp_last="fc2",
        mlp_adds="fc2",
        mid=False,
    ),
}


class Reference:
    """A model with its places, that runs one plain forward for one list of edits.

    Attributes:
        model: The model, in eval mode. Its hooks, configuration and weights are as before after every call.
        places: Where its components live.
    """

    def __init__(self, model: PreTrainedModel, encoder_ids: Tensor | None = None) -> None:
        """Looks up the places of the model.

        Args:
            model: A model of a type in `PLACES`, in eval mode.
            encoder_ids: Token ids [pos] for the encoder of an encoder-decoder model. The encoder runs once, here;
                all components and edits belong to the decoder.
        """
        if model.training:
            raise ValueError("the model is in training mode")
        self.model = model
        self.places = PLACES[model.config.model_type]
        self.heads: int = model.config.num_attention_heads if self.places.attn else 0
        self.kv_heads: int = getattr(model.config, "num_key_value_heads", None) or self.heads
        self.multiplier: float = getattr(model.config, self.places.multiplier) if self.places.multiplier else 1.0
        self.blocks: list[nn.Module] = list(model.get_submodule(self.places.blocks))
        self.encoder_outputs: Any = None
        if self.places.cross_adds:
            if encoder_ids is None:
                raise ValueError("an encoder-decoder model needs encoder_ids")
            with torch.no_grad():
                self.encoder_outputs = model.get_encoder()(encoder_ids[None])

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def eager(self) -> bool:
        """Whether attention probabilities are computed in the open, so that scores and pattern exist."""
        return self.places.interface and self.model.config._attn_implementation == "eager"

    def components(self, layer: int | None = None) -> list[str]:
        """Says what there is to patch, in the order of a forward.

        Args:
            layer: In this block; in any block if None.

        Returns:
            Names of components. scores and pattern are among them only if the model runs eager attention.
        """
        here = self.blocks if layer is None else [self.blocks[layer]]
        at = self.places
        present = {
            "attn_in": at.attn,
            "z": at.o_proj,
            "head_out": at.o_proj,
            "cross_attn_out": at.cross_adds,
            "resid_mid": at.mid,
            "mlp_in": at.mlp,
            "mlp_act": at.mlp_last and any(_has(block, at.mlp_last) for block in here),
            "mlp_out": at.mlp_adds,
            **dict.fromkeys(("router_logits", "experts_out"), at.router and any(_has(b, at.router) for b in here)),
            **dict.fromkeys(("q_in", "k_in", "v_in", "q", "k", "v"), at.interface),
            **dict.fromkeys(("scores", "pattern"), self.eager),
        }
        return [name for name in DIMS if present.get(name, True)]

    @torch.no_grad()
    def values(self, ids: Tensor, edits: Iterable[Edit] = ()) -> dict[tuple[str, int], Tensor]:
        """Reads every component of one forward.

        Args:
            ids: Token ids [pos].
            edits: Applied meanwhile; what is read at an edited site is its value after the edits.

        Returns:
            Tensors by component and layer, with dims `DIMS`. The unit dim of q_in, k_in and v_in is the residual
            stream repeated.
        """
        return _Forward(self, list(edits)).run(ids)

    def logits(self, ids: Tensor, edits: Iterable[Edit] = ()) -> Tensor:
        """Runs one forward with edits.

        Args:
            ids: Token ids [pos].
            edits: Applied in the order in which the forward reaches them, and in list order at one site.

        Returns:
            Logits [pos, vocab].

        Raises:
            ValueError: If an edit has the wrong shape, or names a site that this forward does not have.
        """
        return self.values(ids, edits)["logits", 0]


class _Captured(Exception):
    """Carries q, k and v out of an attention module that is run no further than its attention function."""


class _Forward:
    """One forward with its edits: the hooks, what they recorded, and which edits were applied."""

    def __init__(self, reference: Reference, edits: list[Edit]) -> None:
        self.reference = reference
        self.edits = edits
        self.applied: set[int] = set()
        self.values: dict[tuple[str, int], Tensor] = {}
        self.capturing = False
        self.routing: int | None = None  # the layer whose router is running
        self.layer_of = {
            block.get_submodule(reference.places.attn): layer
            for layer, block in enumerate(reference.blocks)
            if reference.places.attn
        }
        # Live values that a later hook of the same layer needs, after their own edits.
        self.attn_stream: dict[int, Tensor] = {}  # [pos, d_model]
        self.mlp_stream: dict[int, Tensor] = {}  # [pos, d_model]
        self.z: dict[int, Tensor] = {}  # [pos, head, d_head]
        self.recomputed: dict[tuple[str, int], Tensor] = {}  # q, k, v whose inputs were edited, [pos, unit, d_head]

    def run(self, ids: Tensor) -> dict[tuple[str, int], Tensor]:
        """Runs the model once.

        Args:
            ids: Token ids [pos].

        Returns:
            What was recorded.
        """
        model = self.reference.model
        self.length = len(ids)
        if self.reference.encoder_outputs is not None:
            inputs = {"encoder_outputs": self.reference.encoder_outputs, "decoder_input_ids": ids[None]}
        else:
            inputs = {"input_ids": ids[None]}
        handles = self.hook()
        try:
            with self.attention_function_replaced(), self.linear_replaced():
                logits = model(**inputs, use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        self.tap("logits", 0, logits)
        missed = [edit for n, edit in enumerate(self.edits) if n not in self.applied]
        if missed:
            sites = [(edit.component, edit.layer) for edit in missed]
            raise ValueError(f"this forward has no {sites}; it has {self.reference.components()}")
        return self.values

    def tap(self, component: str, layer: int, live: Tensor) -> Tensor:
        """Applies the edits of one site and records the result.

        Args:
            component: Whose value this is.
            layer: Where.
            live: The value [`DIMS`] as the forward has it.

        Returns:
            The edited value; `live` itself, the same object, if no edit is for this site.
        """
        for n, edit in enumerate(self.edits):
            if (edit.component, edit.layer) == (component, layer):
                live = _edited(live, edit)
                self.applied.add(n)
        self.values[component, layer] = live.clone()
        return live

    # ------------------------------------------------------------------------------------------------- the hooks

    def hook(self) -> list[Any]:
        """Registers all hooks.

        Returns:
            Their handles.
        """
        model, at = self.reference.model, self.reference.places
        handles = [
            model.get_submodule(at.embed).register_forward_hook(self.on_output("embed", 0)),
            model.get_submodule(at.last_read).register_forward_pre_hook(
                self.on_input("logits_in", 0), with_kwargs=True
            ),
        ]

        def before(path: str, hook: Callable[..., Any]) -> None:
            handles.append(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

        def after(path: str, hook: Callable[..., Any]) -> None:
            handles.append(block.get_submodule(path).register_forward_hook(hook))

        for layer, block in enumerate(self.reference.blocks):
            before("", self.before_block(layer))
            if at.attn:
                before(at.attn, self.before_attention(layer))
            if at.o_proj:
                before(at.o_proj, self.before_output_projection(layer))
            after(at.attn_adds, self.after_attention(layer))
            if at.cross_adds:
                after(at.cross_adds, self.on_output("cross_attn_out", layer, self.reference.multiplier))
            if at.mlp:
                # The first module that sees the stream between attention and MLP. (Hooks of one module run in the
                # order of registration: where this is the MLP itself, resid_mid comes before mlp_in.)
                before(at.mlp_norm or at.mlp, self.between_attention_and_mlp(layer))
                before(at.mlp, self.before_mlp(layer))
                after(at.mlp_adds, self.on_output("mlp_out", layer, self.reference.multiplier))
            if at.mlp_last and _has(block, at.mlp_last):
                before(at.mlp_last, self.on_input("mlp_act", layer))
            if at.router and _has(block, at.router):
                before(at.router, self.around_router(layer))
                after(at.router, self.around_router(None))
                after(at.experts, self.on_output("experts_out", layer, self.reference.multiplier))
            after("", self.on_output("resid_post", layer))
        return handles

    def flat(self, x: Tensor) -> Tensor:
        """[1, pos, d] or, inside OPT's MLP, [pos, d] -> [pos, d]."""
        return x.reshape(self.length, x.shape[-1])

    def on_input(self, component: str, layer: int) -> Callable[..., Any]:
        """Makes a hook for a component that is a module's input."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            live = self.flat(_first(args, kwargs))
            edited = self.tap(component, layer, live)
            return None if edited is live else _with_first(args, kwargs, edited)

        return hook

    def on_output(self, component: str, layer: int, multiplier: float = 1.0) -> Callable[..., Any]:
        """Makes a hook for a component that is a module's output, times a multiplier."""

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            live = multiplier * self.flat(_main(output))
            edited = self.tap(component, layer, live)
            return None if edited is live else _with_main(output, edited / multiplier)

        return hook

    def before_block(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for resid_pre."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            live = self.flat(_first(args, kwargs))
            edited = self.tap("resid_pre", layer, live)
            self.attn_stream[layer] = edited
            return None if edited is live else _with_first(args, kwargs, edited)

        return hook

    def before_attention(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for attn_in, q_in, k_in and v_in: what attention reads, while the stream stays untouched.

        Norm, projection, norm of q and k, and rotation are the model's own: the attention module is run on the edited
        stream as far as its attention function. For q_in of one head that gives q of all heads, of which this head's
        is kept. (So where a norm spans the heads, as in OLMo 2, its scale is that of the edited stream.)
        """
        reference = self.reference
        norm_path = reference.places.attn_norm

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            norm = reference.blocks[layer].get_submodule(norm_path).forward if norm_path else lambda x: x

            def reading(stream: Tensor) -> tuple[tuple, dict]:
                return _with_first(args, kwargs, norm(stream[None]))

            stream = self.attn_stream[layer]  # [pos, d_model]
            attn_in = self.tap("attn_in", layer, stream)
            if reference.places.interface:
                for n, name in enumerate("qkv"):
                    units = reference.heads if name == "q" else reference.kv_heads
                    live = attn_in[:, None].expand(-1, units, -1)  # [pos, unit, d_model]
                    edited = self.tap(f"{name}_in", layer, live)
                    if edited is not live:
                        runs = [self.capture(module, *reading(edited[:, unit]))[n] for unit in range(units)]
                        self.recomputed[name, layer] = torch.stack([run[:, unit] for unit, run in enumerate(runs)], 1)
            return None if attn_in is stream else reading(attn_in)

        return hook

    def capture(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Runs an attention module as far as its attention function.

        Args:
            attention: The module.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            q [pos, head, d_head], k and v [pos, kv_head, d_head].
        """
        self.capturing = True
        try:
            attention.forward(*args, **kwargs)
        except _Captured as captured:
            return captured.args
        finally:
            self.capturing = False
        raise AssertionError("this attention module does not call an attention function")

    def before_output_projection(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for z."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            live = self.flat(_first(args, kwargs)).unflatten(-1, (self.reference.heads, -1))
            self.z[layer] = edited = self.tap("z", layer, live)
            return None if edited is live else _with_first(args, kwargs, edited.flatten(1))

        return hook

    def after_attention(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for head_out and attn_out, at the module whose output is added to the stream."""
        reference, at = self.reference, self.reference.places
        plain = self.on_output("attn_out", layer, reference.multiplier)

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if not at.o_proj:
                return plain(module, args, output)
            projection = reference.blocks[layer].get_submodule(at.o_proj)
            weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
            weight = weight.unflatten(1, (reference.heads, -1))  # [d_model, head, d_head]
            head_out = torch.einsum("phd,mhd->phm", self.z[layer], weight) * reference.multiplier
            if at.attn_post_norm:
                # That norm, with its scale frozen at what it is for the whole of attention in this forward.
                whole = self.flat(args[0])
                eps = module.eps if at.attn_post_norm == "rms+1" else module.variance_epsilon
                gain = module.weight + 1 if at.attn_post_norm == "rms+1" else module.weight
                rms = (whole.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # [pos, 1]
                head_out = head_out * gain / rms[:, None]
            live = reference.multiplier * self.flat(_main(output))  # attn_out
            edited = live
            edited_heads = self.tap("head_out", layer, head_out)
            if edited_heads is not head_out:
                edited = edited + (edited_heads - head_out).sum(1)
            edited = self.tap("attn_out", layer, edited)
            return None if edited is live else _with_main(output, edited / reference.multiplier)

        return hook

    def between_attention_and_mlp(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for resid_mid.

        The residual is this very tensor, kept by the block for after the MLP: writing in place changes both.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.reference.places.parallel:
                self.mlp_stream[layer] = self.attn_stream[layer]
                return
            x = _first(args, kwargs)
            if self.reference.places.mid:
                live = self.flat(x)
                edited = self.tap("resid_mid", layer, live)
                if edited is not live:
                    x.copy_(edited.reshape(x.shape))
            self.mlp_stream[layer] = self.flat(x).clone()

        return hook

    def before_mlp(self, layer: int) -> Callable[..., Any]:
        """Makes the hook for mlp_in: what the MLP reads, while the stream stays untouched."""
        norm_path = self.reference.places.mlp_norm

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            stream = self.mlp_stream[layer]
            edited = self.tap("mlp_in", layer, stream)
            if edited is stream:
                return None
            norm = self.reference.blocks[layer].get_submodule(norm_path).forward if norm_path else lambda x: x
            return _with_first(args, kwargs, norm(edited[None]))

        return hook

    # ----------------------------------------------------------------------------------- inside of the router

    def around_router(self, layer: int | None) -> Callable[..., None]:
        """Makes a hook that says which layer's router is running from here on."""

        def hook(*_: Any) -> None:
            self.routing = layer

        return hook

    @contextmanager
    def linear_replaced(self) -> Iterator[None]:
        """Taps what the linear map of a router gives, before the router makes anything of it."""
        original = nn.functional.linear

        def linear(*args: Any, **kwargs: Any) -> Tensor:
            found = original(*args, **kwargs)
            if self.routing is None:
                return found
            layer, self.routing = self.routing, None
            return self.tap("router_logits", layer, found.reshape(self.length, -1)).reshape(found.shape)

        with mock.patch.object(nn.functional, "linear", linear):
            yield

    # -------------------------------------------------------------------------------------- inside of attention

    @contextmanager
    def attention_function_replaced(self) -> Iterator[None]:
        """Puts `attend` around the attention function that the model is configured to call."""
        if not self.reference.places.interface:
            yield
            return
        # The modelling file: it defines the eager function, and looks the others up in a table, both by name at the
        # time of the call. Masks depend on the configuration, which stays as it is.
        modelling = sys.modules[type(next(iter(self.layer_of))).__module__]
        table = modelling.ALL_ATTENTION_FUNCTIONS
        name = self.reference.model.config._attn_implementation
        original = modelling.eager_attention_forward if name == "eager" else table[name]

        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            return self.attend(original, module, q, k, v, mask, **kwargs)

        if name == "eager":
            with mock.patch.object(modelling, "eager_attention_forward", attend):
                yield
        else:
            with mock.patch.dict(table._local_mapping, {name: attend}):
                yield

    def attend(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Calls the attention function with edited q, k and v, and edits its scores and pattern.

        Args:
            original: The attention function.
            module: The attention module.
            q: [1, head, pos, d_head].
            k: [1, kv_head, pos, d_head].
            v: [1, kv_head, pos, d_head].
            mask: Added to the scores, [1, 1 or head, dest, src]; something else under other kernels than eager.
            **kwargs: Everything else the function takes.

        Returns:
            What the attention function returns.
        """
        if module not in self.layer_of:  # attention to an encoder
            return original(module, q, k, v, mask, **kwargs)
        by_unit = [x[0].transpose(0, 1) for x in (q, k, v)]  # [pos, unit, d_head]
        if self.capturing:
            raise _Captured(*by_unit)
        layer = self.layer_of[module]
        heads_first = []
        for name, before, live in zip("qkv", (q, k, v), by_unit, strict=True):
            edited = self.tap(name, layer, self.recomputed.get((name, layer), live))
            heads_first.append(before if edited is live else edited.transpose(0, 1)[None])
        if not self.reference.eager:
            return original(module, *heads_first, mask, **kwargs)

        allowed = torch.ones(self.length, self.length, dtype=torch.bool)
        if mask is not None:
            allowed = mask[0] > torch.finfo(mask.dtype).min / 2  # [1 or head, dest, src]
        real_softmax, real_dropout = nn.functional.softmax, nn.functional.dropout

        def softmax(x: Tensor, *args: Any, **options: Any) -> Tensor:
            # [1, head, dest, src], and in gpt_oss one column more: the sink, which every destination may attend to.
            # gpt_oss also subtracts each row's maximum first. The softmax does not see that, but scores of another
            # forward would be off by the difference between the two maxima: it is undone.
            live, sink = x[0, ..., : self.length], x[0, ..., self.length :]
            if sink.shape[-1]:
                live = live - sink + module.sinks[:, None, None]
            edited = self.tap("scores", layer, live)
            if edited is not live:
                edited = torch.where(allowed, edited, live)
                self.values["scores", layer] = edited
                if sink.shape[-1]:
                    edited = torch.cat([edited, module.sinks[:, None, None].expand_as(sink)], -1)
                x = edited[None]
            return real_softmax(x, *args, **options)

        def dropout(x: Tensor, *args: Any, **options: Any) -> Tensor:
            live = x[0]  # what is multiplied into v
            edited = self.tap("pattern", layer, live)
            if edited is not live:
                edited = torch.where(allowed, edited, live)
                self.values["pattern", layer] = edited
                x = edited[None]
            return real_dropout(x, *args, **options)

        with mock.patch.object(nn.functional, "softmax", softmax), mock.patch.object(nn.functional, "dropout", dropout):
            return original(module, *heads_first, mask, **kwargs)


def _edited(live: Tensor, edit: Edit) -> Tensor:
    """Applies one edit to a copy of a component's value.

    Args:
        live: [`DIMS`].
        edit: What to write where.

    Returns:
        The copy.

    Raises:
        ValueError: If the edit does not fit.
    """
    dims = DIMS[edit.component]
    chosen: dict[str, int | Sequence[int] | None] = dict.fromkeys(dims)
    unit_dim = next((dim for dim in dims if dim in UNITS), None)
    if (edit.unit is not None and unit_dim is None) or (edit.sources is not None and "src" not in dims):
        raise ValueError(f"{edit.component} has dims {dims}")
    chosen["dest" if "dest" in dims else "pos"] = edit.positions
    if unit_dim:
        chosen[unit_dim] = edit.unit
    if "src" in dims:
        chosen["src"] = edit.sources
    picked = []
    for dim, size in zip(dims, live.shape, strict=True):
        choice = chosen[dim]
        picked.append(range(size) if choice is None else [choice] if isinstance(choice, int) else choice)
    index = torch.meshgrid(*[torch.tensor(list(p), dtype=torch.long) for p in picked], indexing="ij")
    old = live[index]  # one dim per dim of the component

    if edit.mode == "of":
        out = live.clone()
        out[index] = edit.value(old).to(live.dtype)
        return out
    value = edit.value.to(live.dtype)
    if value.ndim == 0:
        value = value.expand_as(old)
    elif isinstance(edit.unit, int):
        value = value.unsqueeze(dims.index(unit_dim))
    elif edit.component in ("q_in", "k_in", "v_in") and value.ndim == 2:
        value = value[:, None].expand_as(old)
    if value.shape != old.shape:
        raise ValueError(f"{edit.component}: value {tuple(edit.value.shape)} for a selection {tuple(old.shape)}")
    if edit.mode not in ("set", "add"):
        raise ValueError(f"mode {edit.mode!r}")
    out = live.clone()
    out[index] = value if edit.mode == "set" else old + value
    return out


def _has(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule of that path."""
    return path in dict(module.named_modules())


def _first(args: tuple, kwargs: dict) -> Tensor:
    """A module's main input."""
    return args[0] if args else kwargs["hidden_states"]


def _with_first(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """A module's arguments with another main input, in the shape of the present one."""
    x = x.reshape(_first(args, kwargs).shape)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def _main(output: Any) -> Tensor:
    """A module's main output."""
    return output if isinstance(output, Tensor) else output[0]


def _with_main(output: Any, x: Tensor) -> Any:
    """A module's output with another main output, in the shape of the present one."""
    x = x.reshape(_main(output).shape)
    return x if isinstance(output, Tensor) else (x, *output[1:])
