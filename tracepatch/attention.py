"""Where queries, keys, values, scores and the pattern pass by inside an attention's forward, found by trying.

nnsight can enter a module's forward, and the functions called there. Which of their names a model has differs; so a few
are tried, and a place counts only if what passes by there is what the probe saw multiplied.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.calls import Attended, Key, Place, Side
from tracepatch.models import Model
from tracepatch.probe import Layer, close, resolution
from tracepatch.trace import read

# The call that takes q, k and v, with the place of q among its arguments. nnsight counts assignments of a name too, so
# the number varies. Which of these names a class has is tried, and the values are compared with those of the probe.
CALLS = (*((f"attention_interface_{n}", 1) for n in range(4)), ("self__attn_0", 0))
SOFTMAX = ("nn_functional_softmax_0", "F_softmax_0", "F_softmax_1", "torch_cat_0")  # the last where a sink is added
WEIGHTED = ("nn_functional_dropout_0", "self_attn_dropout_0", "self_attention_dropout_0", "F_softmax_0", "F_softmax_1")
INSIDE = ("q", "k", "v", "scores", "pattern")


class Inside:
    """What can be reached inside the attention of a model's layers, by traces of the probe's prompts."""

    def __init__(self, model: Model, ids: torch.Tensor, encoder: torch.Tensor | None) -> None:
        self.model, self.ids, self.encoder = model, ids, encoder
        self._found: dict[type, dict[str, tuple[str, Side, Key]]] = {}

    def layer(self, module: Any, layer: Layer) -> dict[str, Place]:
        """Where q, k, v, scores and pattern pass by inside a layer's attention, as far as a trace can go there."""
        attention = layer.sublayer("attn")
        seen = attention.attended if attention else None
        if seen is None:
            return {}
        kind = type(module.get_submodule(seen.name))
        if kind not in self._found:  # a class has one forward, so that the names are the same in every layer
            self._found[kind] = self._find(seen)
        times = dict.fromkeys(("q", "k", "v", "scores"), seen.began) | {"pattern": seen.ended}
        return {
            name: Place(seen.name, side, key, times[name] + INSIDE.index(name) / 10, operation=operation)
            for name, (operation, side, key) in self._found[kind].items()
        }

    def _find(self, seen: Attended) -> dict[str, tuple[str, Side, Key]]:
        found: dict[str, tuple[str, Side, Key]] = {}
        prefixes = [""]
        for operation, first in CALLS:
            values = self._values(seen.name, [(operation, "input", first + i) for i in range(3)])
            if all(_alike(a, b) for a, b in zip(values, (seen.queries, seen.keys, seen.values), strict=True)):
                found |= {name: (operation, "input", first + i) for i, name in enumerate("qkv")}
                prefixes = [operation + ".", ""]
                break
        pattern = seen.pattern
        if pattern is None:
            return found
        normed = pattern / pattern.sum(-1, keepdim=True)  # with a sink the weights sum to less than 1
        for prefix in prefixes:
            for name in SOFTMAX:
                (scores,) = self._values(seen.name, [(prefix + name, "input", 0)])
                alike = scores is not None and _alike(scores.float().softmax(-1).to(normed.dtype), normed)
                if "scores" not in found and alike:
                    found["scores"] = prefix + name, "input", 0
            for name in WEIGHTED:
                (weights,) = self._values(seen.name, [(prefix + name, "output", None)])
                if "pattern" not in found and _alike(weights, pattern):
                    found["pattern"] = prefix + name, "output", None
        return found

    def _values(self, path: str, spots: list[tuple[str, Side, Key]]) -> list[torch.Tensor] | list[None]:
        """What passes by inside a module's forward; ``None`` where a trace cannot get there."""
        places = [(path, operation, side, key, False) for operation, side, key in spots]
        try:
            return read(self.model, places, self.ids, self.encoder)
        except Exception:  # no such call, an assignment of that name, a branch not taken, a forward without source
            return [None] * len(spots)


def _alike(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    return a is not None and a.shape == b.shape and close(a, b, resolution(b.dtype))
