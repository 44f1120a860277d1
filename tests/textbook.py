"""The oracle of attribution: every method as its paper writes it, one forward and one backward at a time.

Where components live, and how a forward is edited, is taken from `reference` (the oracle of exact patching): plain
hooks on stock modules. Nothing is shared with the library.

Gradients. At every component of a forward a tensor of zeros, shaped like the component, is added: a leaf of autograd.
The gradient at the component is the metric's gradient with respect to that leaf. So it is by definition the slope of
the metric when something is *added* at that place, which is also what an `Edit` with mode "add" does.

Words used throughout

- base: the run in which a gradient is taken or into which something is written. With "corrupted" clean values are
  written into the corrupted run (denoising), with "clean" corrupted values into the clean run (noising). *Other* is
  the run that is not the base.
- estimate: what a method says that metric(base with the other's value at a site) − metric(base) is.
- metric: a function logits [pos, vocab] -> 0-dim tensor.
- A result is a dict from (component, layer) to a tensor with the component's dims (`reference.DIMS`) but for the last
  one if that is d_model, d_head or vocab, over which estimates are summed: [pos], [pos, head], [pos, neuron],
  [head, dest, src]. The layer of embed, logits_in and logits is 0.
- A `*_scale` component [pos] is what a norm divides by: attn_in_scale (the norm in front of attention; of the MLP
  too, where they share it), attn_out_scale (after attention), mlp_in_scale, mlp_out_scale, logits_in_scale.

Norms are written out here, in the model's dtype, because their divisor must be seen, held constant and edited; so is
the dtype of the softmax. transformers does both in float32 in some models: values then differ from the model's own by
its rounding, and all laws hold in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import reference
import torch
from reference import DIMS, Edit, Reference
from torch import Tensor, nn
from transformers import PreTrainedModel

Key = tuple[str, int]  # component, layer
Metric = Callable[[Tensor], Tensor]

SCALES = ("attn_in_scale", "attn_out_scale", "mlp_in_scale", "mlp_out_scale", "logits_in_scale")
SUMMED = ("d_model", "d_head", "vocab")  # the dims over which an estimate is summed


# --------------------------------------------------------------------------------------------------------- one forward


class _Run(reference._Forward):
    """One forward with edits, with things held constant in its backward pass, and with a leaf at every component."""

    def __init__(
        self, of: Textbook, edits: Iterable[Edit] = (), frozen: Collection[Any] = (), rules: Collection[str] = ()
    ) -> None:
        super().__init__(of.reference, list(edits))
        unknown = [name for name in frozen if isinstance(name, str) and name not in ("norms", "pattern")]
        unknown += [name for name in rules if name not in RULES]
        if unknown:
            raise ValueError(f"nothing is called {unknown}: frozen knows norms, pattern and (component, layer)")
        self.of = of
        self.frozen = set(frozen)
        self.rules = set(rules)
        self.leaves: dict[Key, Tensor] = {}
        self.value_bias: dict[int, Tensor] = {}  # what the value projection makes of a zero, [kv_head, d_head]

    def tap(self, component: str, layer: int, live: Tensor) -> Tensor:
        """Edits a component, holds it constant if it is frozen, and adds its leaf."""
        live = super().tap(component, layer, live)
        if (component, layer) in self.frozen or (component == "pattern" and "pattern" in self.frozen):
            live = live.detach()
        if not torch.is_grad_enabled():
            return live
        leaf = torch.zeros_like(live, requires_grad=True)
        self.leaves[component, layer] = leaf
        self.values[component, layer] = live + leaf
        return self.values[component, layer]

    def tap_scale(self, module: nn.Module, live: Tensor) -> Tensor:
        """The same for what a norm divides by, [..., pos, 1].

        One norm may run several times, for each reader that has an input of its own. It has one leaf, and its value is
        that of the first run, on the stream itself.
        """
        component, layer = self.of.scale_of.get(module, (None, 0))
        for n, edit in enumerate(self.edits):
            if (edit.component, edit.layer) == (component, layer):
                where = slice(None) if edit.positions is None else list(edit.positions)
                flat = live.reshape(-1).clone()
                flat[where] = edit.value if edit.mode == "set" else flat[where] + edit.value
                live = flat.reshape(live.shape)
                self.applied.add(n)
        if "norms" in self.frozen or "norm" in self.rules or (component, layer) in self.frozen:
            live = live.detach()
        if component is None:  # a norm of q or k
            return live
        if torch.is_grad_enabled():
            if (component, layer) not in self.leaves:
                self.leaves[component, layer] = torch.zeros(self.length, dtype=live.dtype, requires_grad=True)
            live = live + self.leaves[component, layer].reshape(live.shape)
        self.values.setdefault((component, layer), live.reshape(-1))
        return live

    def before_attention(self, layer: int) -> Callable[..., Any]:
        """Also notes what the value projection gives for a zero input."""
        plain = super().before_attention(layer)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if self.reference.places.interface:
                nothing = torch.zeros_like(reference._first(args, kwargs))
                _, _, v = self.capture(module, *reference._with_first(args, kwargs, nothing))
                self.value_bias[layer] = v[0].detach()
            return plain(module, args, kwargs)

        return hook

    def run(self, ids: Tensor) -> dict[Key, Tensor]:
        """Runs the model once, with its norms written out and with the rules of RelP that are asked for."""
        with ExitStack() as stack:
            for module in self.of.norms:
                stack.enter_context(mock.patch.object(module, "forward", self.norm(module)))
            stack.enter_context(softmax_in_its_own_dtype())
            return super().run(ids)

    def norm(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """A norm, written out: (x − mean) / scale · gain + bias, or without the mean."""
        centred, eps, gain, bias = norm_parts(module)

        def forward(x: Tensor) -> Tensor:
            if centred:
                x = x - x.mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            return x / self.tap_scale(module, scale) * gain + bias

        return forward


RULES = ("norm", "identity", "half", "pattern")


def norm_parts(module: nn.Module) -> tuple[bool, float, Tensor | float, Tensor | float]:
    """Whether a norm subtracts the mean, its epsilon, what it multiplies by and what it adds."""
    kind = type(module).__name__
    centred = "LayerNorm" in kind and kind != "T5LayerNorm"
    eps = 1e-5 if kind == "OlmoLayerNorm" else getattr(module, "eps", None) or module.variance_epsilon
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    gain = 1.0 if weight is None else weight
    if kind in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "NemotronLayerNorm1P"):
        gain = 1 + gain
    return centred, eps, gain, 0.0 if bias is None else bias


def is_norm(module: nn.Module) -> bool:
    """Whether this is one of the norms that `norm_parts` knows."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm", "LayerNorm1P"))


@contextmanager
def softmax_in_its_own_dtype() -> Iterator[None]:
    """Lets a softmax of float64 numbers be one in float64, whatever the model asks for."""
    original = nn.functional.softmax

    def softmax(x: Tensor, dim: int, **options: Any) -> Tensor:
        return original(x, dim=dim) if x.dtype == torch.float64 else original(x, dim=dim, **options)

    with mock.patch.object(nn.functional, "softmax", softmax):
        yield


# --------------------------------------------------------------------------------------------------------- the methods


class Textbook:
    """A model, and what attribution methods say about it.

    Attributes:
        reference: The model with its places.
        norms: Its norms.
        scale_of: Which `*_scale` component a norm is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Looks up where things are.

        Args:
            model: A decoder of a type in `reference.PLACES`, in eval mode, with eager attention.
        """
        self.reference = Reference(model)
        if self.reference.places.interface and not self.reference.eager:
            raise ValueError("attention is not eager: there are no scores and no pattern")
        self.norms = [module for module in model.modules() if is_norm(module)]
        self.scale_of: dict[nn.Module, Key] = {}
        at = self.reference.places
        places = [(at.last_read, "logits_in_scale", model, 0)]
        for layer, block in enumerate(self.reference.blocks):
            places += [
                (at.mlp_norm, "mlp_in_scale", block, layer),
                (at.attn_norm, "attn_in_scale", block, layer),
                (at.attn_adds, "attn_out_scale", block, layer),
                (at.mlp_adds, "mlp_out_scale", block, layer),
            ]
        for path, component, root, layer in places:
            if path is not None and is_norm(root.get_submodule(path)):
                self.scale_of[root.get_submodule(path)] = (component, layer)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.reference.layers

    # ------------------------------------------------------------------------------------- values, gradients, effects

    @torch.no_grad()
    def values(self, ids: Tensor, edits: Iterable[Edit] = ()) -> dict[Key, Tensor]:
        """Reads every component of one forward, scales included.

        Args:
            ids: Token ids [pos].
            edits: Applied meanwhile.

        Returns:
            Whole components, nothing summed: dims as in `DIMS`, [pos] for scales.
        """
        return _Run(self, edits).run(ids)

    def metric(self, ids: Tensor, metric: Metric, edits: Iterable[Edit] = ()) -> Tensor:
        """The metric of one forward with edits."""
        return metric(self.values(ids, edits)["logits", 0])

    def gradients(
        self,
        ids: Tensor,
        metric: Metric,
        frozen: Collection[Any] = (),
        rules: Collection[str] = (),
        edits: Iterable[Edit] = (),
    ) -> dict[Key, Tensor]:
        """Takes the gradient of the metric at every component of one forward.

        Args:
            ids: Token ids [pos].
            metric: Of the logits.
            frozen: What is constant in the backward pass: "norms" (what any norm divides by), "pattern" (of every
                layer), or (component, layer). Nothing flows through it to what lies before it; its own gradient is the
                slope of the metric in that constant.
            rules: Of `relp`.
            edits: Applied in the forward.

        Returns:
            Gradients with the dims of `values`; zeros where the metric does not depend on a component.
        """
        with torch.enable_grad():
            run = _Run(self, edits, frozen, rules)
            value = metric(run.run(ids)["logits", 0])
            found = torch.autograd.grad(value, list(run.leaves.values()), allow_unused=True)
        return {
            key: torch.zeros_like(leaf) if gradient is None else gradient
            for (key, leaf), gradient in zip(run.leaves.items(), found, strict=True)
        }

    def attribution(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        source: str | dict[Key, Tensor] = "other",
        frozen: Collection[Any] = (),
        rules: Collection[str] = (),
    ) -> dict[Key, Tensor]:
        """Attribution patching: gradient at the base · (source − base).

        Nanda, "Attribution Patching" (2023), takes the base "corrupted"; Kramár et al., AtP* (2403.00745), eq. 4,
        takes "clean".

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean".
            source: What is written: "other" for the other run's values, "zero", or values by component and layer (a
                mean, for instance), and then only of these.
            frozen: As in `gradients`.
            rules: As in `relp`.

        Returns:
            Estimates of the effect of writing the source at one site: [pos], [pos, unit] or [head, dest, src].
        """
        ids, other_ids = ordered(clean, corrupted, base)
        gradients = self.gradients(ids, metric, frozen, rules)
        change = self.change(ids, other_ids, source)
        return {key: summed(key, gradients[key] * change[key]) for key in change}

    def change(self, ids: Tensor, other_ids: Tensor, source: str | dict[Key, Tensor] = "other") -> dict[Key, Tensor]:
        """Source − base, of whole components."""
        values = self.values(ids)
        if source == "other":
            source = self.values(other_ids)
        elif source == "zero":
            source = {key: torch.zeros_like(value) for key, value in values.items()}
        return {key: value - values[key] for key, value in source.items()}


def ordered(clean: Tensor, corrupted: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """The base's ids and the other's."""
    if base not in ("clean", "corrupted"):
        raise ValueError(f"base {base!r}")
    if len(clean) != len(corrupted):
        raise ValueError(f"{len(clean)} clean tokens and {len(corrupted)} corrupted ones")
    return (corrupted, clean) if base == "corrupted" else (clean, corrupted)


def summed(key: Key, product: Tensor) -> Tensor:
    """A product of gradient and change, summed over d_model, d_head or vocab."""
    return product.sum(-1) if DIMS.get(key[0], ("pos",))[-1] in SUMMED else product
