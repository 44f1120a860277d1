"""Mixtures of experts: where the router's logits can be written so that the routing follows, and what experts add.

A router usually returns its logits next to the choice that it has made of them, so that writing what it returns changes
nothing. The logits must be written inside its forward. That a place is the right one is tried: the logits of every
position are given to the next one, and what the experts are told to do must move along with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tracepatch.calls import Call, Key, Place, floats
from tracepatch.models import Model
from tracepatch.probe import Layer, Sublayer, resolution
from tracepatch.trace import PLAIN, forward, named, read

ROUTED = ("router_logits", "experts_out")
# What a router may return as it is, or compute first of all; nnsight names the calls of a forward like this.
OPERATIONS = ("", "F_linear_0", "nn_functional_linear_0", "torch_nn_functional_linear_0", "super_forward_0")
UNKNOWN = "no place was found where writing the router's logits changes what the experts are told to do"


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        count: How many there are to choose among.
        router: Where the router's logits can be written, or why that is not offered.
        out: Where what the experts add passes by, or why that is not offered.
    """

    count: int
    router: Place | str
    out: Place | str

    def resized(self, real: nn.Module) -> Experts:
        """The same experts of a larger model, as many as its parameters say."""
        if isinstance(self.out, str):
            return replace(self, router="the number of its experts is not known without its weights")
        return replace(self, count=len(_expert_weights(real.get_submodule(self.out.path))[0]))


class Search:
    """The experts of every layer of a model, from its recorded forward and a few traces."""

    def __init__(self, model: Model | nn.Module, calls: list[Call], ids: torch.Tensor) -> None:
        self.model, self.calls, self.ids = model, calls, ids
        self.traced = not isinstance(model, nn.Module)
        self.tokens = ids.numel()
        self._operations: dict[tuple[type, type], tuple[str, str, Key] | None] = {}

    def layer(self, layer: Layer) -> Experts | None:
        """The experts of a layer; ``None`` where it has none."""
        branch = layer.sublayer("moe")
        if branch is None:
            return None
        inside = [c for c in self.calls if c.under(branch.path)]
        experts = next((c for c in inside if _expert_weights(c.module)), None)
        if experts is None:
            return None
        count = len(_expert_weights(experts.module)[0])
        return Experts(count, self._router(inside, experts, count), self._added(branch, inside[0], experts))

    def _router(self, inside: list[Call], experts: Call, count: int) -> Place | str:
        if not self.traced:
            return "they are seen in traces only: pass the model through tp.load"
        block = inside[0]
        routers = {c.name: c for c in inside if not c.under(experts.name) and _scores(c, count, self.tokens)}
        kinds = type(block.module), type(experts.module)
        if kinds not in self._operations:  # a class has one forward, so that the names are the same in every layer
            tried = (
                (call.name.removeprefix(block.name), operation, key)
                for call in routers.values()
                for operation in OPERATIONS
                for key, logits in _scores(call, count, self.tokens)
                if self._routes(block, experts, _place(call, operation, key, logits), logits)
            )
            self._operations[kinds] = next(tried, None)
        found = self._operations[kinds]
        if found is None or block.name + found[0] not in routers:
            return UNKNOWN
        call = routers[block.name + found[0]]
        logits = dict(_scores(call, count, self.tokens))[found[2]]
        return _place(call, found[1], found[2], logits)

    def _routes(self, block: Call, experts: Call, place: Place, logits: torch.Tensor) -> bool:
        """Whether the routing at a position follows from what is written at a place there."""
        told = list(_told(experts, self.tokens))
        if not told:
            return False
        rows, slots = (i.flatten() for i in torch.meshgrid(*map(torch.arange, self.ids.shape), indexing="ij"))
        moved = self._moved(logits).reshape(self.tokens, -1)
        writes = ((False, (rows, slots, None, None), (), moved, None, None, False),)
        written = ("plain", ("router_logits", 0), writes, (False, ()), 0, 1)
        long, first = self.ids.shape[1], ("of", torch.tensor([0]), None)
        stops: list[Any] = [(_spot(place, long), (written,))]
        stops += [((experts.name, "", "input", key, 0), (_kept(("told", key)),)) for key, _ in told]
        stops += [(_spot(block.place("output", self.tokens), long), (_kept(("out", 0)),))]
        try:
            (was,) = read(self.model, [_spot(place, long)], self.ids)
            kept, _ = forward(self.model, (named(self.ids), tuple(stops), first, *PLAIN), {})
        except Exception:  # no such call, or a forward without source
            return False
        follows = all(_close(kept["told", key], self._moved(value)) for key, value in told)
        out, before = kept["out", 0], block.leaving
        changed = before is not None and not _close(out.reshape(before.shape), before)
        return _close(was.reshape(logits.shape), logits) and follows and changed

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        """The values of every position at the next one."""
        return value.reshape(*self.ids.shape, -1).roll(1, 1).reshape(value.shape)

    def _added(self, branch: Sublayer, block: Call, experts: Call) -> Place | str:
        if branch.out is None:
            return "the residual sum of this layer does not close"
        if branch.out.path != block.name:
            return "a norm stands between its experts and the stream"
        whole, part = block.leaving, experts.leaving
        if whole is None or part is None or whole.numel() != part.numel():
            return "its experts do not give one vector a position"

        def silent(_: nn.Module, args: Any, output: Any) -> Any:
            return torch.zeros_like(output) if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])

        args, kwargs = block.raw
        handle = experts.module.register_forward_hook(silent)
        try:
            with torch.no_grad():
                rest = next(t for _, t in floats(block.module(*args, **kwargs)))
        finally:
            handle.remove()
        if not _close(rest.reshape(part.shape) + part, whole.reshape(part.shape)):
            return "what its experts give is changed before it is added"
        return replace(experts.place("output", self.tokens), scale=branch.out.scale)


def _expert_weights(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.ndim == 3 and len(p) > 1]


def _scores(call: Call, count: int, tokens: int) -> list[tuple[Key, torch.Tensor]]:
    """What a call gives that has one number for each expert and token."""
    return [(k, t) for k, t in call.outputs if t.shape[-1] == count and t.numel() == tokens * count]


def _told(experts: Call, tokens: int) -> Iterator[tuple[Key, torch.Tensor]]:
    """What experts are given for each token besides its activation: which of them take it, with which weights."""
    args, kwargs = experts.raw
    given: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if key != 0 and isinstance(value, torch.Tensor) and len(value) == tokens:
            yield key, value


def _place(call: Call, operation: str, key: Key, logits: torch.Tensor) -> Place:
    if not operation:
        return Place(call.name, "output", key, call.end, flat=logits.ndim == 2)
    return Place(call.name, "output", None, call.start + 0.5, flat=logits.ndim == 2, operation=operation)


def _kept(name: tuple[str, Any]) -> tuple[Any, ...]:
    """The task of keeping a value as it passes by."""
    return "plain", name, (), (True, ()), 0, 1


def _spot(place: Place, slots: int) -> tuple[Any, ...]:
    return place.path, place.operation, place.side, place.key, slots if place.flat else 0


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool(
        (a.double() - b.double()).abs().max() <= resolution(b.dtype if b.is_floating_point() else torch.float32)
    )
