"""Where the components live in one model, and what its code allows: measured, printed, and looked up by the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from textwrap import wrap
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import nn

from tracepatch.attention import INSIDE, Inside
from tracepatch.calls import ENCODED, POSITIONS, Attended, Call, Place, record
from tracepatch.errors import ArchitectureError, ComponentError, listing
from tracepatch.experiments import (
    ROWS,
    allows,
    equal,
    is_division,
    is_scaling,
    require_finite,
    rotations,
    stack_of,
    tokens,
    with_another_last,
)
from tracepatch.experts import ROUTED, Experts, Search
from tracepatch.factors import Nonlinearity, Projection, nonlinearity, projections, turned
from tracepatch.models import Model, eager_attention, module_of
from tracepatch.modules import Modules, see
from tracepatch.probe import Blocks, Layer, Overrides, Sublayer, is_norm, resolution
from tracepatch.sites import COMPONENTS, SCALES, component
from tracepatch.trace import named
from tracepatch.twins import Twin
from tracepatch.weights import weightless

EAGER = 5.0  # times the rounding of one sum: by how much two ways to compute attention may differ, layer upon layer
END = 10**9  # after all that passes by in the stack
READERS = ("attn_in", "q_in", "k_in", "v_in", "mlp_in")


@dataclass(frozen=True)
class HeadProjection:
    """What turns one head's z into what it writes to the stream.

    Attributes:
        projection: Path of the output projection; it is linear up to a bias.
        post_norm: Path of the norm between it and the stream, applied with its scale frozen; empty where there is none.
        scale: Multiplier between the projection (or norm) and the stream.
        turned: Whether the projection's weight is ``[in, out]``; ``None`` where it is no plain linear map.
    """

    projection: str
    post_norm: str
    scale: float
    turned: bool | None


class Architecture:
    """What a probe found out about a model, and proved.

    A model without weights here is proved on its shrunken twin: a small model of its class, with its config's choices.

    Printing it shows the kinds of layers, where each component lives, the block form, heads, norms, how exactly the
    residual sum closes, and whether attention is causal.

    Attributes:
        model_type: As the config says.
        name: The class.
        layers: The blocks, with the proof of each.
        embed: Where token embeddings leave.
        d_model: Width of the residual stream.
        vocab: Width of the logits.
        causal: Whether a changed last token moves nothing before it.
        extends: Whether one token less moves nothing either: prompts of any lengths agree as far as their tokens do.
        local_embedding: Whether the stream entering layer 0 depends on the token at its own position alone, and on no
            encoder.
        keeps_logits: Whether the forward takes ``logits_to_keep``.
        encodes: Whether an encoder reads the prompts; layers, components and positions are then the decoder's.
        modules: What each module takes and gives, where that can be patched.
        dtype: Of the parameters.
        eager_error: Largest difference of the logits between the model as it runs and its step-by-step attention.
        logit_scale: The largest logit of the probe.
        twin: The sizes that differ in the twin on which everything was proved; empty if the model itself was measured.
    """

    model_type: str
    name: str
    layers: tuple[Layer, ...]
    embed: Place
    final_norm: str
    unembed: str
    d_model: int
    vocab: int
    causal: bool
    extends: bool
    local_embedding: bool
    keeps_logits: bool
    encodes: bool
    modules: Modules
    dtype: torch.dtype
    eager_error: float
    logit_scale: float
    twin: str
    _experts: list[Experts | None]

    def __init__(self, model: Model | nn.Module, overrides: dict[str, str] | None = None) -> None:
        """Probes a model with a few tiny forwards.

        Args:
            model: From ``tp.load``, or a Hugging Face module.
            overrides: Where things are that the probe cannot find: ``stack`` (path of the list of blocks),
                ``attn_out``, ``cross_attn_out`` and ``mlp_out`` (``"path.output"`` with ``{layer}`` for the layer).
                They go through the same proof.

        Raises:
            ArchitectureError: There is no stack of blocks, an override is not understood, or a model without weights
                here has no twin that proves anything about it.
            ModelError: A plain forward gives NaN or inf.
        """
        module = model if isinstance(model, nn.Module) else module_of(model)
        self._traced = not isinstance(model, nn.Module)
        real, twin = module, Twin(model) if weightless(module) else None
        if twin is not None:
            model = twin.model
            module = model if isinstance(model, nn.Module) else module_of(model)
        self._model = model  # while probing only: kept, it would keep itself alive
        known = {"stack", "attn_out", "cross_attn_out", "mlp_out"}
        unknown = sorted(set(overrides or {}) - known)
        if unknown:
            raise ArchitectureError(f"Overrides are {', '.join(sorted(known))}; not {', '.join(unknown)}.")
        given = dict(overrides or {})
        self._probe(module, Overrides(given.pop("stack", ""), given))
        self.twin = "" if twin is None else twin.summary
        if twin is not None:
            found = twin.sizes(self.layers, self.d_model, self.vocab)
            self._experts = [experts and experts.resized(real) for experts in self._experts]
            self.modules.refuse_all("the model has no weights here, and a twin does not show how wide it is")
            self.layers, self.d_model, self.vocab = found.layers, found.d_model, found.vocab
            self._embed_width, self.dtype = found.embed, found.dtype

    def _probe(self, module: Any, overrides: Overrides) -> None:
        training = module.training
        module.eval()
        try:
            ids = tokens(module)
            self.encodes = bool(module.config.is_encoder_decoder)
            self._encoder = tokens(module, ENCODED) if self.encodes else None
            inputs = named(ids, self._encoder)
            with torch.no_grad():
                plain = module(**inputs, use_cache=False).logits
            require_finite(module, plain)
            with eager_attention(module):
                calls, attended, output = record(module, lambda: module(**inputs, use_cache=False), ROWS)
                logits = output.logits
                self._read(module, calls, attended, logits, overrides)
                search = Search(self._model, calls, ids)
                self._experts = [None if self.encodes else search.layer(layer) for layer in self.layers]
                inside = Inside(self._model, ids, self._encoder)
                self._inside = [inside.layer(module, layer) if self._traced else {} for layer in self.layers]
                self._rotated = rotations(module, self.layers, ids, self._encoder, self.dtype)
            self.eager_error, self.logit_scale = (logits - plain).abs().max().item(), plain.abs().max().item()
            stack = module.get_submodule(self.layers[0].path.rsplit(".", 1)[0])
            found = allows(module, stack, ids, self._encoder, plain)
            self.causal, self.extends, self.local_embedding, self.keeps_logits = found
            self.modules = self._see_modules(module, ids, calls)
        finally:
            module.train(training)
            del self._model, self._encoder

    def _read(
        self, module: Any, calls: list[Call], attended: list[Attended], logits: Any, overrides: Overrides
    ) -> None:
        self.model_type, self.name = module.config.model_type, type(module).__name__
        self.dtype = next(module.parameters()).dtype
        path, count = stack_of(module, overrides.stack)
        blocks = Blocks(calls, attended, path, overrides)
        absent = [f"{path}.{i}" for i in range(count) if f"{path}.{i}" not in blocks.by_name]
        if absent:
            raise ArchitectureError(
                f"{self.name}: {len(absent)} of {count} blocks were not called in a plain forward.\n{listing(absent)}\n"
                "Pass overrides={'stack': PATH} with the list of blocks that the forward runs through."
            )
        self.layers = tuple(blocks.layer(i) for i in range(count))
        first, last = (blocks.by_name[f"{path}.{i}"] for i in (0, count - 1))
        assert first.entering is not None
        assert last.leaving is not None
        self.d_model, self.vocab = first.entering.shape[-1], logits.shape[-1]
        if first.entering.shape[:-1] not in ((ROWS, POSITIONS), (ROWS * POSITIONS,)):
            sizes = list(first.entering.shape)
            raise ArchitectureError(
                f"{self.name}: the stream of its blocks is {sizes} for {ROWS} prompts of {POSITIONS} tokens, and not "
                "one vector for each token of each prompt, in that order. It cannot be patched by position."
            )
        self._broken = [
            i
            for i in range(1, count)
            if not equal(blocks.by_name[f"{path}.{i - 1}"].leaving, blocks.by_name[f"{path}.{i}"].entering)
        ]
        names = {id(m): n for n, m in module.named_modules()}
        owner = module.get_decoder() if self.encodes else module
        embedder = owner.get_input_embeddings() if hasattr(owner, "get_input_embeddings") else None
        embedding = blocks.by_name.get(names.get(id(embedder), ""))
        if embedding is None or embedding.leaving is None:
            whose = f"{type(owner).__name__}." if self.encodes else ""
            raise ArchitectureError(f"{self.name}: {whose}get_input_embeddings() is not called in a plain forward.")
        self.embed = embedding.place("output", ROWS * POSITIONS)
        self.unembed = names.get(id(module.get_output_embeddings()), "")
        after = (c for c in calls if c.start > last.end and is_norm(c, self.d_model))
        self.final_norm = next((c.name for c in after if equal(c.entering, last.leaving)), "")
        self._embed_width = embedding.leaving.shape[-1]
        norms = {n for layer in self.layers for s in layer.sublayers for n in (s.pre_norm, s.post_norm) if n}
        self._scalings = {n for n in (*norms, self.final_norm) if n and is_division(blocks.by_name[n])}
        self._embed_calls = sum(c.name == embedding.name for c in calls)
        self._head_out = [self._head_projection(module, blocks, layer) for layer in self.layers]
        parts = ROWS * POSITIONS
        self._projections = [projections(blocks.by_name, self.attention(i), parts) for i in range(count)]
        self._nonlinear = [nonlinearity(blocks.by_name, self.mlp(i), parts) for i in range(count)]

    def _head_projection(self, module: Any, blocks: Blocks, layer: Layer) -> HeadProjection | str:
        """How a head writes to the stream, or why that is not offered."""
        attention = layer.sublayer("attn")
        if attention is None or attention.inner is None or attention.out is None:
            return "z or attn_out is not proved there"
        call = blocks.by_name[attention.projection]
        z, plain = call.entering, call.leaving
        assert z is not None
        assert plain is not None
        heads = rearrange(z, "row pos (head d_head) -> row pos head d_head", head=attention.heads)
        with torch.no_grad():
            bias = call.module(torch.zeros_like(z))
            parts = torch.zeros_like(plain)
            for head in range(attention.heads):
                one = torch.zeros_like(heads)
                one[..., head, :] = heads[..., head, :]
                parts = parts + (call.module(one.flatten(-2)) - bias)
        gap = (parts + bias - plain).abs().max().item() / (1 + plain.abs().max().item())
        # One rounding a head on both sides of the sum.
        if gap > attention.heads * resolution(plain.dtype):
            return f"its heads do not sum to the projection's output (off by {gap:.2g})"
        if attention.post_norm and not is_scaling(blocks.by_name[attention.post_norm]):
            return "the norm after the projection is no pure scaling"
        return HeadProjection(attention.projection, attention.post_norm, attention.out.scale, turned(call.module))

    def rotated(self, layer: int) -> bool:
        """Whether queries and keys of a layer are turned by an angle that depends on their position."""
        return self._rotated[layer]

    def _see_modules(self, module: Any, ids: torch.Tensor, calls: list[Call]) -> Modules:
        options = {"logits_to_keep": torch.tensor([2, 5], device=ids.device)} if self.keeps_logits else {}
        changed = (with_another_last(ids, self.vocab) if self.causal else ids).flip(0)
        turned = None if self._encoder is None else self._encoder.flip(0)
        inputs = named(ids, self._encoder), named(changed, turned)
        plain, other = (see(module, partial(module, **given, use_cache=False, **options), ROWS) for given in inputs)
        stack = self.layers[0].path.rsplit(".", 1)[0], len(self.layers)
        found = Modules(module, calls, stack, ROWS, plain, other, self.causal, resolution(self.dtype))
        for experts in self._experts:
            if experts and isinstance(experts.router, Place) and experts.router.operation:
                found.refuse(f"{experts.router.path}.output", "its choice is made by then; patch router_logits")
        return found

    # ------------------------------------------------------------------------------------------------ looking up

    def __len__(self) -> int:
        return len(self.layers)

    def attention(self, layer: int) -> Sublayer | None:
        """The branch that mixes positions."""
        return self.layers[layer].sublayer("attn", "mixer")

    def cross(self, layer: int) -> Sublayer | None:
        """The branch that attends to an encoder."""
        return self.layers[layer].sublayer("cross")

    def mlp(self, layer: int) -> Sublayer | None:
        """The branch that does not."""
        return self.layers[layer].sublayer("mlp", "moe")

    def why_not(self, name: str, layer: int) -> str:
        """Why a component is not offered at a layer, in one clause; empty if it is."""
        if component(name).module:
            return self.modules.why_not(name)
        here, attention, mlp = self.layers[layer], self.attention(layer), self.mlp(layer)
        unproved = "the residual sum of this layer does not close"
        if name == "embed" and self._embed_width != self.d_model:
            return f"the embedding is {self._embed_width} wide and projected to the stream"
        if name == "embed" and self._embed_calls > 1:
            return f"its module is called {self._embed_calls} times in a forward, so a trace cannot tell which is meant"
        if name in ("embed", "logits", "logits_in", "resid_pre", "resid_post"):
            return ""
        if name == "resid_mid":
            if here.form == "parallel":
                return "attention and MLP read the same stream in a parallel block, so there is nothing between them"
            if any(s.stream_norm for s in here.sublayers):
                return "norms stand on the stream itself, so what the MLP reads is no sum that attention adds to"
            if self.cross(layer):
                return "attention to the encoder stands between attention and the MLP, so there is no one stream there"
            kinds = [s.kind for s in here.sublayers]
            if here.form != "sequential" or len(kinds) != 2 or kinds[0] not in ("attn", "mixer"):
                return f"the block is not attention and then an MLP ({here.form}: {', '.join(kinds) or 'no branches'})"
            return ""
        if name == "cross_attn_out":
            cross = self.cross(layer)
            return "it attends to no encoder" if cross is None else "" if cross.out else unproved
        if name in ("attn_out", "z", "head_out"):
            if attention is None:
                return "it has no attention"
            if name == "attn_out":
                return "" if attention.out else unproved
            if attention.kind == "mixer":
                return "its mixer has no heads with a softmax pattern"
            if name == "z":
                return (
                    ""
                    if attention.inner
                    else "the output projection's input is not pattern · v (a gate or norm stands between)"
                )
            found = self._head_out[layer]
            return found if isinstance(found, str) else ""
        if name in SCALES:
            return self._why_no_scale(name, layer)
        if name in ("q_in", "k_in", "v_in"):
            return self.why_not(name[0], layer) or self.why_not("attn_in", layer)
        if name in INSIDE:
            if attention is None or attention.kind == "mixer":
                return "it has no softmax attention"
            if not self._traced:
                return "they are seen in traces only: pass the model through tp.load"
            allowed = EAGER * resolution(self.dtype) * (1 + self.logit_scale)
            if name in ("scores", "pattern") and self.eager_error > allowed:
                return (
                    "attention computed step by step, where they can be seen, gives other logits than the model's own "
                    f"(off by {self.eager_error:.2g})"
                )
            # Which weights are masked is seen in the scores.
            needed = {"scores", name} if name == "pattern" else {name}
            if needed <= set(self._inside[layer]):
                return ""
            return "its attention computes them in code of its own, which no trace can enter"
        if name == "attn_in":
            if attention is None:
                return "it has no attention"
            return "" if attention.reads else "what its attention reads is not the stream behind one norm"
        if mlp is None:
            return "it has no MLP"
        if name in ROUTED:
            experts = self._experts[layer]
            if experts is None:
                return "its MLP has no experts to choose among"
            routed = experts.router if name == "router_logits" else experts.out
            return routed if isinstance(routed, str) else ""
        if name == "mlp_in":
            return "" if mlp.reads else "what its MLP reads is not the stream behind one norm"
        if name == "mlp_out":
            return "" if mlp.out else unproved
        if mlp.kind == "moe":
            return "routed experts have no neurons of their own at a position"
        return "" if mlp.inner else "its MLP has no last projection"

    def _why_no_scale(self, name: str, layer: int) -> str:
        """As ``why_not``, of what a norm divides by."""
        if name == "logits_in_scale":
            norm, branch = self.final_norm, None
        else:
            branch = self.mlp(layer) if name.startswith("mlp") else self.attention(layer)
            if branch is None:
                return "it has no " + ("MLP" if name.startswith("mlp") else "attention")
            if name.endswith("in_scale") and not branch.reads:
                return self.why_not(name.removesuffix("_scale"), layer)
            norm = branch.pre_norm if name.endswith("in_scale") else branch.post_norm
        if not norm:
            return "there is no norm"
        if branch is not None and name.endswith("out_scale") and branch.out and branch.out.scale != 1:
            return "what the norm gives is multiplied before it is added to the stream"
        return "" if norm in self._scalings else "its norm is no division by one number a position"

    def offers(self, name: str, layer: int) -> bool:
        """Whether a component is proved at a layer."""
        return not self.why_not(component(name).name, layer)

    def require(self, name: str, layer: int) -> None:
        """Refuses a component that is not offered at a layer.

        Raises:
            ComponentError: It is unknown or not proved there.
        """
        why = self.why_not(component(name).name, layer)
        if why and component(name).module:
            raise ComponentError(why)
        if why:
            offered = ", ".join(c for c in COMPONENTS if self.offers(c, layer))
            branches = self.attention(layer), self.cross(layer), self.mlp(layer)
            tried = [t for s in branches if s is not None and s.out is None for t in s.tried]
            details = (
                f"\nTried:\n{listing(tried)}\nIf you know the place: "
                "found = tp.Architecture(model, overrides={'attn_out': 'PATH.output', …}) puts it to the same proof, "
                "and tp.adopt(model, found) makes patching use it."
                if tried and "close" in why
                else ""
            )
            raise ComponentError(
                f"Layer {layer} of this {self.model_type} ({self.layers[layer].block}) has no {name}: {why}. "
                f"It has: {offered}.{details}"
            )

    def stream(self, layer: int) -> Place:
        """Where the residual stream enters a layer; at ``len(self)``, where it leaves the last one."""
        if layer == 0 or (layer in self._broken and layer < len(self)):
            return self.layers[layer].pre
        return self.layers[layer - 1].post

    def place(self, name: str, layer: int) -> Place:
        """Where a component that is read and written as it stands passes by."""
        if component(name).module:
            return self.modules.tap(name).place
        if name == "embed":
            return self.embed
        if name in ("resid_pre", "resid_post"):
            return self.stream(layer + (name == "resid_post"))
        if name in INSIDE:
            return self._inside[layer][name]
        if name in ROUTED:
            experts = self._experts[layer]
            routed = experts and (experts.router if name == "router_logits" else experts.out)
            assert isinstance(routed, Place), f"{name} is not offered at layer {layer}"
            return routed
        branch = self.mlp(layer) if name.startswith("mlp") else self.attention(layer)
        if name == "cross_attn_out":
            branch = self.cross(layer)
        found = None
        if branch is not None:
            found = branch.reads if name in READERS else branch.out if name.endswith("_out") else branch.inner
        assert found is not None, f"{name} is not offered at layer {layer}"
        return found

    def settled(self, name: str, layer: int) -> float:
        """Until when, as ``Place.order`` counts, a module around a component may still change what it comes to."""
        last = self.span(name, layer)[1]
        if name == "resid_mid":
            return last
        branch = {"attn_out": self.attention, "head_out": self.attention, "cross_attn_out": self.cross}.get(name)
        branch = self.mlp if name in ("mlp_out", "experts_out") else branch
        found = branch(layer) if branch is not None else None
        around = "" if found is None else f"{found.path}.output"
        return max(last, self.modules.tap(around).place.order) if around in self.modules else last

    def scaled(self, name: str, layer: int) -> tuple[Place, str, Place]:
        """Of a norm whose scale is a component: what it takes, its path, and where what it gives is written."""
        if name == "logits_in_scale":
            norm = self.final_norm
            return Place(norm, "input", order=END), norm, Place(norm, "output", order=END + 1)
        if name in ("attn_in_scale", "mlp_in_scale"):
            return self.reader(name.removesuffix("_scale"), layer)
        branch = self.mlp(layer) if name.startswith("mlp") else self.attention(layer)
        assert branch is not None and branch.out is not None  # noqa: PT018  # for mypy
        return Place(branch.post_norm, "input", order=branch.out.order - 0.5), branch.post_norm, branch.out

    def span(self, name: str, layer: int) -> tuple[float, float]:
        """From when, as ``Place.order`` counts, to when in a forward an edit of a component acts.

        What a module takes or gives in between belongs to neither side of the edit.
        """
        if name in ("logits", "logits_in"):
            return (float("inf"),) * 2 if name == "logits" else (self.stream(len(self)).order,) * 2
        if name in SCALES:
            stream, _, place = self.scaled(name, layer)
            return stream.order, place.order
        if name in READERS:
            stream, _, place = self.reader(name, layer)
            return stream.order, place.order
        if name == "head_out":
            return self.place("z", layer).order, self.place("attn_out", layer).order
        if name == "resid_mid":
            # It is written as what attention adds, and read where the MLP reads it.
            mlp, out = self.mlp(layer), self.place("attn_out", layer).order
            return out, max(out, mlp.stream.order if mlp is not None and mlp.stream is not None else out)
        order = self.place(name, layer).order
        return order, order

    def reader(self, name: str, layer: int) -> tuple[Place, str, Place]:
        """Of a branch that reads the stream: where the stream passes by, its norm, and where it takes what it reads."""
        branch = self.mlp(layer) if name == "mlp_in" else self.attention(layer)
        assert branch is not None and branch.stream is not None and branch.reads is not None  # noqa: PT018  # for mypy
        return branch.stream, branch.pre_norm, branch.reads

    def head_projection(self, layer: int) -> HeadProjection:
        """What turns a head's z into its write to the stream."""
        found = self._head_out[layer]
        assert isinstance(found, HeadProjection), found
        return found

    def projections(self, layer: int) -> tuple[Projection, ...]:
        """The linear maps that take what attention reads; none where they are not known."""
        return self._projections[layer]

    def nonlinearity(self, layer: int) -> Nonlinearity | str:
        """Where an MLP is not linear, or why that is not known."""
        return self._nonlinear[layer]

    def units(self, name: str, layer: int) -> int:
        """How many heads, neurons or experts a component has at a layer; 0 if it is not split."""
        unit, attention = component(name).unit, None if component(name).module else self.attention(layer)
        if unit in ("head", "kv_head"):
            heads = (attention.heads if unit == "head" else attention.kv_heads) if attention else 0
            return heads
        if unit == "expert":
            experts = self._experts[layer]
            return experts.count if experts else 0
        return self.layers[layer].width if unit == "neuron" else 0

    def width(self, name: str, layer: int) -> int:
        """The size of a component's last dim."""
        if component(name).module:
            return self.modules.tap(name).width
        attention = self.attention(layer)
        sizes = {
            "d_model": self.d_model,
            "vocab": self.vocab,
            "neuron": self.layers[layer].width,
            "expert": self.units("router_logits", layer),
            "d_head": self._head_width(name, attention),
            "src": 0,  # as many as the prompt has tokens
            "scale": 1,
        }
        return sizes[component(name).dims[-1]]

    @staticmethod
    def _head_width(name: str, attention: Sublayer | None) -> int:
        if attention is None:
            return 0
        # Keys and queries may be wider than values.
        seen = attention.attended
        return seen.queries.shape[-1] if name in ("q", "k") and seen is not None else attention.d_head

    # ------------------------------------------------------------------------------------------------ printing

    def __str__(self) -> str:
        exact = sum(layer.error == 0 for layer in self.layers)
        worst = max((layer.error for layer in self.layers), default=0.0)
        lines = [
            f"{self.name} ({self.model_type}): {len(self)} layers, d_model {self.d_model}, vocabulary {self.vocab}, "
            f"{str(self.dtype).removeprefix('torch.')}",
            f"  embed      {self.embed}",
        ]
        causal = "a changed last token moves nothing before it" + ("" if self.extends else ", but one token more may")
        if self.twin:
            lines.insert(1, f"  proved on a twin with random weights in float32, shrunken: {self.twin}")
        if self.encodes:
            lines.append("  an encoder reads the prompts; layers and positions are the decoder's")
        for _, group in groupby(self.layers, self._signature):
            members = list(group)
            lines += self._describe(members)
        lines += [
            f"  final norm {self.final_norm or 'none'}, unembedding {self.unembed}",
            f"  residual sum: closes bitwise in {exact} of {len(self)} layers, largest error {worst:.2g}",
            f"  causal: {f'yes ({causal})' if self.causal else 'NO: nothing is pruned'}",
            f"  step-by-step attention differs from the default by {self.eager_error:.2g} in the logits",
        ]
        return "\n".join(lines)

    def _signature(self, layer: Layer) -> tuple[Any, ...]:
        def relative(place: Any) -> str:
            return str(place).replace(layer.path, "")

        branches = tuple(
            (
                s.kind,
                relative(s.out),
                relative(s.inner),
                relative(s.pre_norm),
                relative(s.post_norm),
                relative(s.stream_norm),
                s.heads,
                s.kv_heads,
                s.d_head,
            )
            for s in layer.sublayers
        )
        return layer.block, layer.form, branches, layer.width, tuple(self.offers(c, layer.index) for c in COMPONENTS)

    def _describe(self, members: list[Layer]) -> list[str]:
        one, path = members[0], members[0].path

        def relative(text: Any) -> str:
            return str(text).removeprefix(path + ".")

        span = str(one.index) if len(members) == 1 else f"{one.index}–{members[-1].index}"
        lines = [f"  layers {span}: {path.rsplit('.', 1)[0]}.N, {one.block}, {one.form}"]
        for s in one.sublayers:
            norms = [f"reads through {relative(s.pre_norm)}"] if s.pre_norm else []
            norms += [f"writes through {relative(s.post_norm)}"] if s.post_norm else []
            norms += [f"then {relative(s.stream_norm)} on the stream"] if s.stream_norm else []
            heads = [f"{s.heads} heads of {s.d_head}"] if s.heads else []
            heads += [f"{s.kv_heads} kv heads"] if s.heads != s.kv_heads else []
            width = [f"{one.width} neurons"] if s.kind == "mlp" else []
            where = f"adds {relative(s.out)}" if s.out else "contribution unproved"
            lines.append(f"    {s.kind:6} {', '.join([relative(s.path), where, *heads, *width, *norms])}")
        hidden = (*(() if any(self._experts) else ROUTED), *(() if self.encodes else ("cross_attn_out",)))
        offered = ", ".join(c for c in COMPONENTS if self.offers(c, one.index))
        lines += wrap(f"offers {offered}", 116, initial_indent=" " * 4, subsequent_indent=" " * 6)
        missed = [c for c in COMPONENTS if c not in hidden and not self.offers(c, one.index)]
        for why, several in groupby(missed, lambda c: self.why_not(c, one.index)):
            lines.append(f"    no {', '.join(several)}: {why}")
        return lines

    def __repr__(self) -> str:
        return f"<Architecture {self.model_type}, {len(self)} layers>"


_KNOWN: WeakKeyDictionary[nn.Module, Architecture] = WeakKeyDictionary()


def architecture_of(model: Model) -> Architecture:
    """The architecture of a model, probed once."""
    module = module_of(model)
    if module not in _KNOWN:
        _KNOWN[module] = Architecture(model)
    return _KNOWN[module]


def adopt(model: Model, found: Architecture) -> None:
    """Makes an architecture, probed with overrides perhaps, the one that patching this model uses."""
    _KNOWN[module_of(model)] = found
