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

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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

Node = tuple[str, int, int | None]  # component, layer, unit


# --------------------------------------------------------------------------------------------------------- one forward


class _Run(reference._Forward):
    """One forward with edits, with things held constant in its backward pass, and with a leaf at every component."""

    def __init__(
        self,
        of: Textbook,
        edits: Iterable[Edit] = (),
        frozen: Collection[Any] = (),
        rules: Collection[str] = (),
        keys: Collection[Key] | None = None,
    ) -> None:
        super().__init__(of.reference, list(edits))
        unknown = [name for name in frozen if isinstance(name, str) and name not in ("norms", "pattern")]
        unknown += [name for name in rules if name not in RULES]
        if unknown:
            raise ValueError(f"nothing is called {unknown}: frozen takes norms, pattern and (component, layer)")
        self.of = of
        self.frozen = set(frozen)
        self.rules = set(rules)
        self.keys = keys
        self.leaves: dict[Key, Tensor] = {}
        self.value_bias: dict[int, Tensor] | None = None  # what the value projection makes of 0, if that is asked for

    def leads(self, key: Key) -> bool:
        """Whether there is to be a leaf at this component."""
        return torch.is_grad_enabled() and (self.keys is None or key in self.keys)

    def tap(self, component: str, layer: int, live: Tensor) -> Tensor:
        """Edits a component, holds it constant if it is frozen, and adds its leaf."""
        live = super().tap(component, layer, live)
        if (component, layer) in self.frozen or (component == "pattern" and "pattern" in self.frozen | self.rules):
            live = live.detach()
        if not self.leads((component, layer)):
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
        if component is None:  # a norm inside attention, of q or k
            return live
        if "norms" in self.frozen or "norm" in self.rules or (component, layer) in self.frozen:
            live = live.detach()
        if self.leads((component, layer)):
            if (component, layer) not in self.leaves:
                self.leaves[component, layer] = torch.zeros(self.length, dtype=live.dtype, requires_grad=True)
            live = live + self.leaves[component, layer].reshape(live.shape)
        self.values.setdefault((component, layer), live.reshape(-1))
        return live

    def before_attention(self, layer: int) -> Callable[..., Any]:
        """Also notes what the value projection gives for a zero input."""
        plain = super().before_attention(layer)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if self.value_bias is not None:
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
            if self.rules & {"identity", "half"}:
                for block in self.reference.blocks:
                    self.rules_in_mlp(block, stack)
            stack.enter_context(softmax_in_its_own_dtype())
            values = super().run(ids)
        unknown = [key for key in self.frozen if isinstance(key, tuple) and key not in values]
        if unknown:
            raise ValueError(f"this forward has no {unknown}")
        return values

    def norm(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """A norm, written out: (x − mean) / scale · gain + bias, or without the mean."""
        centred, eps, gain, bias = norm_parts(module)

        def forward(x: Tensor) -> Tensor:
            if centred:
                x = x - x.mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            return x / self.tap_scale(module, scale) * gain + bias

        return forward

    def rules_in_mlp(self, block: nn.Module, stack: ExitStack) -> None:
        """Puts the identity rule and the half rule of RelP into one MLP.

        Identity: act(x) is x times a constant. Half: of act(gate) · up each factor gets half of its gradient.
        """
        inside = dict(block.mlp.named_children()) if hasattr(block, "mlp") else {}
        activation = inside.get("act", inside.get("act_fn"))
        up = inside.get("up_proj") if "gate_proj" in inside else None  # else it stands before the nonlinearity
        if activation is None or (up is None and ("gate_up_proj" in inside or "experts" in inside)):
            raise ValueError(f"there are no rules for {type(block).__name__}")
        act, linear = activation.forward, up.forward if up is not None else None

        def activated(x: Tensor) -> Tensor:
            y = act(x)
            if "identity" in self.rules:
                y = x * torch.where(x == 0, 0.0, y / x).detach()  # at 0 there is nothing to hand on
            return halved(y) if "half" in self.rules and up is not None else y

        stack.enter_context(mock.patch.object(activation, "forward", activated))
        if "half" in self.rules and up is not None:
            stack.enter_context(mock.patch.object(up, "forward", lambda x: halved(linear(x))))


def halved(x: Tensor) -> Tensor:
    """The same numbers with half of their gradient."""
    return x / 2 + (x / 2).detach()


RULES = ("norm", "identity", "half", "pattern")
POSITION_EMBEDDINGS = {"gpt2": "transformer.wpe", "gpt_neo": "transformer.wpe", "opt": "model.decoder.embed_positions"}


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
        keys: Collection[Key] | None = None,
    ) -> dict[Key, Tensor]:
        """Takes the gradient of the metric at every component of one forward.

        Args:
            ids: Token ids [pos].
            metric: Of the logits.
            frozen: What is constant in the backward pass: "norms" (what any norm of the stream divides by), "pattern" (of every
                layer), or (component, layer). Nothing flows through it to what lies before it; its own gradient is the
                slope of the metric in that constant.
            rules: Of `relp`.
            edits: Applied in the forward.
            keys: At these components and layers only, which is faster.

        Returns:
            Gradients with the dims of `values`; zeros where the metric does not depend on a component.
        """
        with torch.enable_grad():
            run = _Run(self, edits, frozen, rules, keys)
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

    def relp(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        rules: Collection[str] = ("norm", "identity", "half"),
        source: str | dict[Key, Tensor] = "other",
    ) -> dict[Key, Tensor]:
        """RelP (Rezaei Jafari et al., 2508.21258): attribution with the coefficients of LRP instead of gradients.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean".
            rules: "norm": what a norm of the stream divides by is constant. "identity": act(x) / x is constant, for the activation
                function of an MLP. "half": in act(gate) · up each factor gets half of the gradient. "pattern": the
                attention pattern is constant (there called the AH rule). Softcaps have their gradient.
            source: As in `attribution`.

        Returns:
            Estimates like those of `attribution`.
        """
        return self.attribution(clean, corrupted, metric, base, source, rules=rules)

    @torch.no_grad()
    def exact(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        keys: Iterable[Key],
        base: str = "corrupted",
        source: str | dict[Key, Tensor] = "other",
        whole: bool = False,
        positions: Collection[int] | None = None,
    ) -> dict[Key, Tensor]:
        """The effects themselves: one forward for each site.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            keys: Components and layers.
            base: "corrupted" or "clean".
            source: As in `attribution`.
            whole: Write a whole component at once, at all positions and units.
            positions: Sites at these positions (destinations) only; others are NaN.

        Returns:
            metric(patched) − metric(base), shaped like the estimates; 0-dim if `whole`. NaN where a source comes
            after its destination.
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change = self.values(ids), self.change(ids, other_ids, source)
        before = metric(values["logits", 0])
        effects = {}
        for key in keys:
            target = values[key] + change[key]
            if whole:
                effects[key] = self.metric(ids, metric, [Edit(*key, target)]) - before
                continue
            effects[key] = torch.full_like(summed(key, target), torch.nan)
            for site, chosen in sites(key, effects[key], positions):
                edit = Edit(*key, target[chosen], **site)
                effects[key][chosen] = self.metric(ids, metric, [edit]) - before
        return effects

    # ----------------------------------------------------------------------------------------------------------- AtP*

    def qk_fix(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        source: str | dict[Key, Tensor] = "other",
        frozen: Collection[Any] = (),
        whole: bool = False,
    ) -> dict[Key, Tensor]:
        """QK-fix of AtP* (2403.00745, eq. 6 to 10): the pattern as it is with one query or key swapped, · gradient.

        The pattern is that of a forward in which this one query or key has the source's value. For a key it changes
        at every destination that sees it, in every head of its group.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean".
            source: As in `attribution`.
            frozen: As in `gradients`, for the gradient at the pattern.
            whole: Swap the queries or keys of all positions of a head at once.

        Returns:
            Estimates for ("q", layer) [pos, head] and ("k", layer) [pos, kv_head]; [head] and [kv_head] if `whole`.
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change = self.values(ids), self.change(ids, other_ids, source)
        gradients = self.gradients(ids, metric, frozen)
        estimates = {}
        for key in [key for key in change if key[0] in ("q", "k")]:
            pattern = ("pattern", key[1])
            target = values[key] + change[key]  # [pos, unit, d_head]
            length, units, _ = target.shape
            choices = [list(range(length))] if whole else [[pos] for pos in range(length)]
            estimates[key] = torch.zeros(len(choices), units, dtype=target.dtype)
            for row, chosen in enumerate(choices):
                for unit in range(units):
                    swapped = Edit(*key, target[chosen, unit], chosen, unit)
                    moved = self.values(ids, [swapped])[pattern] - values[pattern]
                    estimates[key][row, unit] = (moved * gradients[pattern]).sum()
            if whole:
                estimates[key] = estimates[key][0]
        return estimates

    def dropped(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        method: str = "attribution",
        **options: Any,
    ) -> list[dict[Key, Tensor]]:
        """Estimates with the attention and MLP outputs of one layer held constant, for each layer in turn.

        Attention and MLP outputs of the layer itself are constants too: their estimates are 0, like those of all that
        lies inside of them.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean".
            method: "attribution" or "qk_fix".
            **options: Of that method.

        Returns:
            The method's estimates, signed, by dropped layer.
        """
        found = []
        for layer in range(self.layers):
            outputs = [("attn_out", layer), ("mlp_out", layer)]
            estimates = getattr(self, method)(clean, corrupted, metric, base, frozen=outputs, **options)
            estimates |= {key: torch.zeros_like(estimates[key]) for key in outputs if key in estimates}
            found.append(estimates)
        return found

    def grad_drop(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        method: str = "attribution",
        **options: Any,
    ) -> dict[Key, Tensor]:
        """GradDrop of AtP* (2403.00745, eq. 11): 1 / (layers − 1) · Σ over dropped layers of |estimate|.

        Takes what `dropped` takes, and returns magnitudes shaped like the estimates.
        """
        if self.layers == 1:
            raise ValueError("with one layer there is nothing left to average over")
        found = self.dropped(clean, corrupted, metric, base, method, **options)
        return {key: sum(estimates[key].abs() for estimates in found) / (self.layers - 1) for key in found[0]}

    # ------------------------------------------------------------------------------------------ integrated gradients

    def mean_gradients(
        self,
        ids: Tensor,
        metric: Metric,
        line: Callable[[float], list[Edit]],
        n: int,
        rule: str,
        keys: Collection[Key] | None = None,
    ) -> dict[Key, Tensor]:
        """The gradients of n forwards, whose edits are points of a line, averaged by the weights of a rule.

        What moves along the line is set to constants: what lies before it has no gradient through it.
        """
        total: dict[Key, Tensor] = {}
        for t, weight in points(n, rule):
            for key, gradient in self.gradients(ids, metric, edits=line(t), keys=keys).items():
                total[key] = total.get(key, 0) + weight * gradient
        return total

    def integrated(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        along: str = "inputs",
        keys: Iterable[Key] | None = None,
        base: str = "corrupted",
        n: int = 20,
        rule: str = "midpoint",
        positions: Collection[int] | None = None,
    ) -> dict[Key, Tensor]:
        """Integrated gradients from the base to the other run: gradient averaged over a line · (other − base).

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            along: Which line. "inputs": the input embeddings move, and with them everything else. "component": one
                whole (component, layer) moves, at all positions and units, and what is after it; over a full cut such
                as resid_pre the estimates sum to the whole difference. "site": one position, or one head at one
                position, moves alone; its estimate converges to its effect.
            keys: For which components and layers. All if None, with "inputs" only.
            base: "corrupted" or "clean".
            n: Number of steps.
            rule: Where on the line gradients are taken, from the base (0) to the other run (1): see `points`.
            positions: With "site", at these positions (destinations) only; others are NaN.

        Returns:
            Estimates; along "site" NaN where a source comes after its destination.
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change = self.values(ids), self.change(ids, other_ids)
        if along == "inputs":
            keys = list(change if keys is None else keys)
            mean = self.mean_gradients(ids, metric, self.line(("embed", 0), values, change), n, rule, keys)
            return {key: summed(key, mean[key] * change[key]) for key in keys}
        if keys is None or along not in ("component", "site"):
            raise ValueError(f"along {along!r}, for the keys {keys}")
        estimates = {}
        for key in keys:
            if along == "component":
                mean = self.mean_gradients(ids, metric, self.line(key, values, change), n, rule, [key])
                estimates[key] = summed(key, mean[key] * change[key])
                continue
            estimates[key] = torch.full_like(summed(key, change[key]), torch.nan)
            for site, chosen in sites(key, estimates[key], positions):
                line = self.line(key, values, change, site, chosen)
                mean = self.mean_gradients(ids, metric, line, n, rule, [key])
                estimates[key][chosen] = (mean[key][chosen] * change[key][chosen]).sum()
        return estimates

    def line(
        self,
        key: Key,
        values: dict[Key, Tensor],
        change: dict[Key, Tensor],
        site: dict[str, Any] | None = None,
        chosen: Any = slice(None),
    ) -> Callable[[float], list[Edit]]:
        """The straight line on which a component, or one site of it, goes from the base's value to the other's."""
        return lambda t: [Edit(*key, values[key][chosen] + t * change[key][chosen], **(site or {}))]

    # ------------------------------------------------------------------------------------------------------ attention

    def attention_attribution(self, ids: Tensor, metric: Metric) -> dict[Key, Tensor]:
        """Pattern · gradient: minus the estimate of setting one weight to zero.

        Args:
            ids: Token ids [pos].
            metric: Of the logits.

        Returns:
            By ("pattern", layer): [head, dest, src].
        """
        values, gradients = self.values(ids), self.gradients(ids, metric)
        return {key: values[key] * gradients[key] for key in values if key[0] == "pattern"}

    def pattern_patching(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        kind: str = "plain",
        source: str | dict[Key, Tensor] = "other",
    ) -> dict[Key, Tensor]:
        """Estimates of writing one weight of the pattern.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean".
            kind: "plain": gradient · (source − base). "renormalised": the weight is set, then all weights of its
                destination are scaled to the sum that they had before, and the change of them all is multiplied with
                the gradient. "centred": plain, but with v − b in place of v in the gradient at the pattern, which is
                (gradient at z[dest]) · v[src]; b is what the value projection gives for a zero input.
            source: As in `attribution`.

        Returns:
            By ("pattern", layer): [head, dest, src].
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change, gradients = self.values(ids), self.change(ids, other_ids, source), self.gradients(ids, metric)
        estimates = {}
        for key in [key for key in change if key[0] == "pattern"]:
            if kind == "plain":
                estimates[key] = gradients[key] * change[key]
            elif kind == "renormalised":
                estimates[key] = torch.zeros_like(change[key])
                for head, dest, src in visible(change[key]):
                    row = values[key][head, dest]
                    new = row.clone()
                    new[src] += change[key][head, dest, src]
                    if new.sum() != 0:  # a destination that has nothing left is not scaled
                        new *= row.sum() / new.sum()
                    estimates[key][head, dest, src] = ((new - row) * gradients[key][head, dest]).sum()
            elif kind == "centred":
                v = values["v", key[1]] - self.value_bias(key[1])  # [pos, kv_head, d_head]
                slope = torch.einsum("dhe,she->hds", gradients["z", key[1]], self.by_head(v))
                estimates[key] = slope * change[key]
            else:
                raise ValueError(f"kind {kind!r}")
        return estimates

    def value_flow(
        self, clean: Tensor, corrupted: Tensor, metric: Metric, base: str = "corrupted"
    ) -> dict[Key, Tensor]:
        """Where the change of the values goes: pattern[dest, src] · (Δv[src] · gradient at z[dest]).

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted" or "clean": where pattern and gradient are taken.

        Returns:
            By ("v", layer): [head, dest, src]. Summed over destinations and the heads of a group: the estimates of v.
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change, gradients = self.values(ids), self.change(ids, other_ids), self.gradients(ids, metric)
        flows = {}
        for key in [key for key in change if key[0] == "v"]:
            slope = torch.einsum("dhe,she->hds", gradients["z", key[1]], self.by_head(change[key]))
            flows[key] = values["pattern", key[1]] * slope
        return flows

    def by_head(self, x: Tensor) -> Tensor:
        """[pos, kv_head, d_head] -> [pos, head, d_head]: to each head what its group has."""
        return x.repeat_interleave(self.reference.heads // self.reference.kv_heads, 1)

    @torch.no_grad()
    def value_bias(self, layer: int) -> Tensor:
        """What the value projection gives for a zero input, [kv_head, d_head]."""
        run = _Run(self)
        run.value_bias = {}
        run.run(torch.tensor([0]))
        return run.value_bias[layer]

    # ------------------------------------------------------------------------------------------ direct contributions

    def direct(self, ids: Tensor, metric: Metric) -> dict[Key, Tensor]:
        """Direct logit attribution: what each writer brings to the metric by itself, with this run's last scale.

        Args:
            ids: Token ids [pos].
            metric: Of the logits before their softcap, if there is one; linear, without a constant.

        Returns:
            By embed, pos_embed (where positions are embedded), mlp_out (with its bias), attn_bias (of the output
            projection), final_norm_bias and unembed_bias, all [pos], and head_out [pos, head]. Their sum is the metric
            of these logits.
        """
        model, at = self.reference.model, self.reference.places
        values = self.values(ids)
        writers = {("embed", 0): values["embed", 0]}
        if model.config.model_type in POSITION_EMBEDDINGS:
            writers["pos_embed", 0] = self.output_of(POSITION_EMBEDDINGS[model.config.model_type], ids)
        for layer, block in enumerate(self.reference.blocks):
            writers["head_out", layer] = values["head_out", layer]
            writers["mlp_out", layer] = values["mlp_out", layer]
            bias = getattr(block.get_submodule(at.o_proj), "bias", None)
            if bias is not None:
                rows = bias.expand(len(ids), -1) * self.reference.multiplier
                if at.attn_post_norm:
                    gain = norm_parts(block.get_submodule(at.attn_adds))[2]
                    rows = rows * gain / values["attn_out_scale", layer][:, None]
                writers["attn_bias", layer] = rows
        centred, _, gain, norm_bias = norm_parts(model.get_submodule(at.last_read))
        scale = values["logits_in_scale", 0]
        unembed = model.get_output_embeddings()
        weight = unembed.weight * (
            getattr(model.config, "logit_scale", None) or 1.0
        )  # Cohere multiplies, Granite divides
        weight = weight / getattr(model.config, "logits_scaling", 1.0)

        def at_position(logits: Tensor, pos: int) -> Tensor:
            """The metric if there were no logits anywhere else, [vocab] -> []."""
            alone = torch.zeros_like(values["logits", 0])
            alone[pos] = logits
            return metric(alone)

        def of(row: Tensor, pos: int) -> Tensor:
            """What one write [d_model] to the last residual brings."""
            row = row - row.mean() if centred else row
            return at_position(weight @ (row / scale[pos] * gain), pos)

        found = {}
        with torch.no_grad():
            for key, rows in writers.items():
                found[key] = torch.zeros(rows.shape[:-1], dtype=rows.dtype)
                for index in torch.cartesian_prod(*map(torch.arange, rows.shape[:-1])).reshape(-1, rows.ndim - 1):
                    where = tuple(index.tolist())
                    found[key][where] = of(rows[where], where[0])
            biases = {"final_norm_bias": weight @ (norm_bias + torch.zeros_like(values["embed", 0][0]))}
            if getattr(unembed, "bias", None) is not None:
                biases["unembed_bias"] = unembed.bias
            for name, logits in biases.items():
                found[name, 0] = torch.stack([at_position(logits, pos) for pos in range(len(ids))])
        return found

    def output_of(self, path: str, ids: Tensor) -> Tensor:
        """What a module gives in one forward, [pos, d_model]."""
        seen: list[Tensor] = []
        module = self.reference.model.get_submodule(path)
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        try:
            self.values(ids)
        finally:
            handle.remove()
        return seen[0].reshape(len(ids), -1)

    # ---------------------------------------------------------------------------------------------------------- edges

    def writers(self) -> list[Node]:
        """What writes to the stream: the embeddings, each head (without the output bias), each MLP."""
        found: list[Node] = [("embed", 0, None)]
        for layer in range(self.layers):
            found += [("head_out", layer, head) for head in range(self.reference.heads)]
            found += [("mlp_out", layer, None)]
        return found

    def readers(self) -> list[Node]:
        """What reads the stream: queries of each head, keys and values of each group, MLPs, the logits."""
        found: list[Node] = []
        for layer in range(self.layers):
            found += [("q_in", layer, head) for head in range(self.reference.heads)]
            found += [(name, layer, head) for name in ("k_in", "v_in") for head in range(self.reference.kv_heads)]
            found += [("mlp_in", layer, None)]
        return [*found, ("logits_in", 0, None)]

    def reaches(self, writer: Node, reader: Node) -> bool:
        """Whether the reader reads what the writer has written."""

        def moment(node: Node) -> float:
            component, layer, _ = node
            if component in ("embed", "logits_in"):
                return -1 if component == "embed" else float("inf")
            late = component.startswith("mlp") and not self.reference.places.parallel
            return 2 * layer + late

        return moment(writer) < moment(reader)

    def edges(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        base: str = "corrupted",
        method: str = "eap",
        n: int = 5,
        rule: str = "left",
    ) -> dict[tuple[Node, Node], Tensor]:
        """Edge attribution patching (Syed et al., 2310.10348): (other − base) of the writer · gradient at the reader.

        Under a post-norm a head writes what that norm makes of it at the scale of its own run; its gradient is that
        of the stream, so the post-norm's scale does not move. Biases and positions write the same in both runs.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            base: "corrupted", or "clean" as in that paper.
            method: "eap": gradients at the base. "ig_inputs" (EAP-IG, Hanna et al., 2403.17806): averaged over the
                line of the input embeddings from the base to the other run. "ig_activations": lines of the outputs of
                the embedding, of each layer's heads together and of each MLP, one after the other, in the base; every
                edge gets the mean over all the passes of all these lines, most of which do not move its writer. In a
                pass what moves is a constant, so readers before it have no gradient through it.
                "ig_own": the same lines, but an edge gets the mean over the passes of its own writer's line only, so
                that the edges from a writer sum to its own integrated gradients.
            n: Steps of a line.
            rule: See `points`. t is 0 at the base, 1 at the other run. The code of EAP-IG has the base "clean", and
                takes embeddings at corrupted + k/n (clean − corrupted) for k = 0 to n − 1: that is "right" here. It
                takes activations at k = 1 to n: that is "left".

        Returns:
            By (writer, reader), for each pair that is joined: [pos].
        """
        ids, other_ids = ordered(clean, corrupted, base)
        values, change = self.values(ids), self.change(ids, other_ids)

        def mean_along(key: Key) -> dict[Key, Tensor]:
            return self.mean_gradients(ids, metric, self.line(key, values, change), n, rule, read)

        read = {(component, layer) for component, layer, _ in self.readers()}
        lines = sorted({(component, layer) for component, layer, _ in self.writers()})
        if method == "eap":
            slopes = dict.fromkeys(lines, self.gradients(ids, metric, keys=read))
        elif method == "ig_inputs":
            slopes = dict.fromkeys(lines, mean_along(("embed", 0)))
        elif method in ("ig_activations", "ig_own"):
            slopes = {key: mean_along(key) for key in lines}
            if method == "ig_activations":
                mean = {key: sum(slope[key] for slope in slopes.values()) / len(lines) for key in read}
                slopes = dict.fromkeys(lines, mean)
        else:
            raise ValueError(f"method {method!r}")

        scores = {}
        for writer in self.writers():
            for reader in self.readers():
                if self.reaches(writer, reader):
                    slope = of_unit(slopes[writer[:2]], reader)
                    scores[writer, reader] = (of_unit(change, writer) * slope).sum(-1)
        return scores

    @torch.no_grad()
    def exact_edge(
        self,
        clean: Tensor,
        corrupted: Tensor,
        metric: Metric,
        writer: Node,
        reader: Node,
        base: str = "corrupted",
        positions: Sequence[int] | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """The effect of one edge: other − base of the writer, added to what this one reader reads in the base.

        Args:
            clean: Token ids [pos].
            corrupted: Token ids [pos].
            metric: Of the logits.
            writer: One of `writers`.
            reader: One of `readers` that it reaches.
            base: "corrupted" or "clean".
            positions: At these; at all if None.
            share: How much of the difference is added.

        Returns:
            metric(patched) − metric(base), 0-dim.
        """
        if not self.reaches(writer, reader):
            raise ValueError(f"{reader} does not read {writer}")
        ids, other_ids = ordered(clean, corrupted, base)
        where = list(range(len(ids)) if positions is None else positions)
        added = share * of_unit(self.change(ids, other_ids), writer)[where]
        component, layer, unit = reader
        edit = Edit(component, layer, added, where, unit, mode="add")
        return self.metric(ids, metric, [edit]) - self.metric(ids, metric)


def of_unit(values: dict[Key, Tensor], node: Node) -> Tensor:
    """A node's part of a component, [pos, d_model]."""
    component, layer, unit = node
    return values[component, layer] if unit is None else values[component, layer][:, unit]


def points(n: int, rule: str) -> list[tuple[float, float]]:
    """Where gradients are taken between 0 and 1, and their weights, which sum to 1.

    "left": 0, 1/n, ... "right": 1/n, ..., 1. "midpoint": halfway between. "trapezoid": the mean of left and right,
    n + 1 points; with n = 1 the mean of both ends.
    """
    if rule == "trapezoid":
        return [(k / n, (1.0 if 0 < k < n else 0.5) / n) for k in range(n + 1)]
    offset = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return [((k + offset) / n, 1 / n) for k in range(n)]


def visible(pattern: Tensor) -> list[tuple[int, int, int]]:
    """Heads, destinations and the sources up to them, from [head, dest, src]."""
    heads, length, _ = pattern.shape
    return [(h, dest, src) for h in range(heads) for dest in range(length) for src in range(dest + 1)]


def sites(key: Key, estimates: Tensor, positions: Collection[int] | None = None) -> list[tuple[dict[str, Any], Any]]:
    """The single sites of a component: how an `Edit` names each, and the index of its value in the component."""
    if "dest" in DIMS.get(key[0], ()):
        return [
            ({"unit": h, "positions": [dest], "sources": [src]}, (h, slice(dest, dest + 1), slice(src, src + 1)))
            for h, dest, src in visible(estimates)
            if positions is None or dest in positions
        ]
    chosen = [(pos, slice(pos, pos + 1)) for pos in (range(len(estimates)) if positions is None else positions)]
    if estimates.ndim == 1:
        return [({"positions": [pos]}, here) for pos, here in chosen]
    return [({"positions": [pos], "unit": u}, (here, u)) for pos, here in chosen for u in range(estimates.shape[1])]


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
