"""The places that can be patched, as names and integers; no torch model in sight.

A *component* is a named kind of activation, a *site* is a component at a layer, at some positions, for some heads or
neurons. Indices read as in an array: ``z[layer, pos, head]``, with integers (negative ones count from the end),
slices, lists and boolean masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np

from tracepatch.alignment import Aligned, Side
from tracepatch.errors import ComponentError, SiteError


@dataclass(frozen=True)
class Component:
    """A named kind of activation.

    Attributes:
        name: The one word for it, everywhere.
        index: The dims a user indexes, in order.
        dims: The dims of its value at one layer, in order; the last one is never indexed unless it is in ``index``.
        meaning: One line for people.
    """

    name: str
    index: tuple[str, ...]
    dims: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str | None:
        """The dim that splits the component at one position: ``head``, ``kv_head``, ``neuron``, ``expert`` or none."""
        return next((dim for dim in self.index if dim in UNITS), None)

    @property
    def place(self) -> str:
        """The dim along the prompt: ``pos``, or ``dest`` where a position attends to others, ``src``."""
        return "dest" if "dest" in self.index else "pos"

    @property
    def attends(self) -> bool:
        """Whether it says how much one position attends to another."""
        return "src" in self.index

    @property
    def layered(self) -> bool:
        """Whether every layer has one."""
        return self.index[0] == "layer"

    @property
    def module(self) -> bool:
        """Whether it is a module's input or output, named by its path."""
        return "." in self.name


UNITS: Final = ("head", "kv_head", "neuron", "expert")
_POS, _HEAD, _KV_HEAD = ("layer", "pos"), ("layer", "pos", "head"), ("layer", "pos", "kv_head")
_WEIGHT = ("layer", "head", "dest", "src")
# In the order of a forward.
_ALL = (
    Component("embed", ("pos",), ("pos", "d_model"), "output of the token embedding"),
    Component("resid_pre", _POS, ("pos", "d_model"), "residual stream entering a block"),
    Component("attn_in", _POS, ("pos", "d_model"), "what attention alone reads of the stream, before its norm"),
    Component("q_in", _HEAD, ("pos", "head", "d_model"), "what a head's query alone reads of the stream"),
    Component("k_in", _KV_HEAD, ("pos", "kv_head", "d_model"), "what a head's key alone reads of the stream"),
    Component("v_in", _KV_HEAD, ("pos", "kv_head", "d_model"), "what a head's value alone reads of the stream"),
    Component("attn_in_scale", _POS, ("pos", "scale"), "what the norm that attention reads through divides by"),
    Component("q", _HEAD, ("pos", "head", "d_head"), "queries as attention takes them: after norms and rotation"),
    Component("k", _KV_HEAD, ("pos", "kv_head", "d_head"), "keys as attention takes them: after norms and rotation"),
    Component("v", _KV_HEAD, ("pos", "kv_head", "d_head"), "values as attention takes them"),
    Component("scores", _WEIGHT, _WEIGHT[1:], "attention scores as the softmax takes them; masked ones stay"),
    Component("pattern", _WEIGHT, _WEIGHT[1:], "attention weights, after the softmax"),
    Component("z", _HEAD, ("pos", "head", "d_head"), "pattern-weighted values of a head, before W_O"),
    Component("attn_out_scale", _POS, ("pos", "scale"), "what the norm that attention writes through divides by"),
    Component("head_out", _HEAD, ("pos", "head", "d_model"), "what one head writes to the stream, z · W_O"),
    Component("attn_out", _POS, ("pos", "d_model"), "what attention adds to the stream"),
    Component("cross_attn_out", _POS, ("pos", "d_model"), "what attention to the encoder adds to the stream"),
    Component("resid_mid", _POS, ("pos", "d_model"), "residual stream between attention and MLP"),
    Component("mlp_in", _POS, ("pos", "d_model"), "what the MLP alone reads of the stream, before its norm"),
    Component("mlp_in_scale", _POS, ("pos", "scale"), "what the norm that the MLP reads through divides by"),
    Component(
        "router_logits", (*_POS, "expert"), ("pos", "expert"), "what the router gives each expert, before the choice"
    ),
    Component("experts_out", _POS, ("pos", "d_model"), "what the routed experts add, before shared ones"),
    Component("mlp_act", (*_POS, "neuron"), ("pos", "neuron"), "neurons: input of the MLP's last projection"),
    Component("mlp_out_scale", _POS, ("pos", "scale"), "what the norm that the MLP writes through divides by"),
    Component("mlp_out", _POS, ("pos", "d_model"), "what the MLP adds to the stream"),
    Component("resid_post", _POS, ("pos", "d_model"), "residual stream leaving a block"),
    Component("logits_in", ("pos",), ("pos", "d_model"), "what the final norm and the unembedding read"),
    Component("logits_in_scale", ("pos",), ("pos", "scale"), "what the final norm divides by"),
    Component("logits", ("pos",), ("pos", "vocab"), "the model's output"),
)
SCALES: Final = tuple(c.name for c in _ALL if c.dims[-1] == "scale")
COMPONENTS: Final[dict[str, Component]] = {c.name: c for c in _ALL}
STAGES: Final[dict[str, int]] = {c.name: stage for stage, c in enumerate(_ALL)}
"""Where in a block a component acts; edits of one row act in this order within a layer."""
SPLIT_READERS: Final = {"q_in": "q", "k_in": "k", "v_in": "v"}
"""What single heads read of the stream, and what they make of it. Pristine, it is ``attn_in``, the same for all."""


SIDES: Final[tuple[Literal["input", "output"], ...]] = ("input", "output")


def stage(name: str) -> int:
    """The stage of a component; a module's input or output comes after whatever else is written at its place."""
    return STAGES.get(name, len(STAGES))


@lru_cache(maxsize=1 << 12)
def _module(name: str) -> Component:
    path, _, side = name.rpartition(".")
    meaning = f"what {path} {'takes' if side == 'input' else 'gives'}"
    return Component(name, ("pos",), ("pos", "width"), meaning)


def component(name: str) -> Component:
    """The component of that name: a key of ``COMPONENTS``, or a module's path with ``.input`` or ``.output``.

    Raises:
        ComponentError: The name is unknown.
    """
    found = COMPONENTS.get(name)
    if found is not None:
        return found
    path, _, side = name.rpartition(".")
    if path and side in SIDES:
        return _module(name)
    if path:
        raise ComponentError(
            f"There is no component {name!r}. A module's activations are {name}.input and {name}.output."
        )
    begun = [known for known in COMPONENTS if known.startswith(f"{name}_") and not known.endswith("_scale")]
    close = begun or get_close_matches(name, COMPONENTS, 1)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ComponentError(f"There is no component {name!r}.{hint} Components: {', '.join(COMPONENTS)}.")


@dataclass(frozen=True, slots=True)
class Select:
    """Which indices along one dim: all of them, one, some, or those where a mask is true.

    Attributes:
        items: The indices as written, ``None`` for a slice.
        bounds: ``(start, stop, step)`` of a slice.
        scalar: Written as one integer, so that the dim is dropped from shapes.
        mask: Length of the boolean mask it came from.
        span: The named span among whose tokens the indices count; empty for a whole prompt.
        of: Whose positions the indices are, where they mean their partners in another world's prompt (``Aligned``).
    """

    items: tuple[int, ...] | None = None
    bounds: tuple[int | None, int | None, int | None] = (None, None, None)
    scalar: bool = False
    mask: int | None = None
    span: str = ""
    of: str = ""

    def __str__(self) -> str:
        if self.span:
            return self.span if self._whole else f"{self.span}[{replace(self, span='')}]"
        if self.items is None:
            start, stop, step = ("" if b is None else str(b) for b in self.bounds)
            return f"{start}:{stop}" + (f":{step}" if step else "")
        found = str(self.items[0]) if self.scalar else str(list(self.items))
        return f"{found} of {self.of}" if self.of else found

    @property
    def _whole(self) -> bool:
        return self.items is None and self.bounds == (None, None, None)

    @property
    def all(self) -> bool:
        """Whether it is a plain ``:``."""
        return self._whole and not self.span

    def resolve(self, length: int) -> tuple[int, ...] | None:
        """The indices along a dim of ``length``, counted from 0; ``None`` if one of them does not exist there."""
        return _resolve(self, length)

    def on(self, side: Side, crossing: bool = False) -> tuple[int, ...] | None:
        """The positions in a prompt; ``None`` if it lacks one of them.

        Args:
            side: The prompt.
            crossing: Whether values go from one prompt of the pair to the other. Then ``:``, or a whole span, are those
                positions that have a partner there, in the order of the clean prompt.
        """
        if not (self.span or self.of or (crossing and side.aligned is not None)):
            return _resolve(self, side.length)
        return _on(self, side, crossing)


@lru_cache(maxsize=1 << 16)
def _resolve(select: Select, length: int) -> tuple[int, ...] | None:
    if select.items is None:
        return tuple(range(length)[slice(*select.bounds)])
    if select.mask is not None and select.mask != length:
        return None
    if any(not -length <= i < length for i in select.items):
        return None
    return tuple(i % length for i in select.items)


@lru_cache(maxsize=1 << 16)
def _on(select: Select, side: Side, crossing: bool) -> tuple[int, ...] | None:
    if select.span:
        tokens = side.span(select.span, crossing and select._whole)
        inside = None if tokens is None else _resolve(replace(select, span=""), len(tokens))
        return tuple(tokens[i] for i in inside) if tokens and inside else None
    if select.of:
        found = [side.here(i, select.of) for i in select.items or ()]
        return None if None in found else tuple(i for i in found if i is not None)
    return side.aligned if crossing and select.all else _resolve(select, side.length)


ALL: Final = Select()
SPAN: Final = re.compile(r"([^\W\d]\w*)(?:\[(-?\d+|-?\d*:-?\d*)\])?")
PLACES: Final = ("pos", "dest", "src")
"""The dims along a prompt."""


def select(index: Any, dim: str) -> Select:
    """An index as a user writes it, along ``dim``: an integer, slice, list, range, integer or boolean array.

    Along a prompt also the name of a span, ``"subject"``, or tokens of one, ``"subject[-1]"``, and ``Aligned``
    positions, one or a list of them.

    Raises:
        SiteError: It is something else, or it names one index twice.
    """
    if type(index) is int:
        return Select(items=(index,), scalar=True)
    if isinstance(index, str) and dim in PLACES:
        return _of_span(index, dim)
    if isinstance(index, slice):
        bounds = []
        for bound in (index.start, index.stop, index.step):
            if bound is not None and not isinstance(bound, (int, np.integer)):
                raise SiteError(f"A slice along {dim} takes integers, not {bound!r}.")
            bounds.append(None if bound is None else int(bound))
        if bounds[2] == 0:
            raise SiteError(f"A slice along {dim} cannot have the step 0.")
        return Select(bounds=(bounds[0], bounds[1], bounds[2])) if any(b is not None for b in bounds) else ALL
    if isinstance(index, (bool, np.bool_, str)) or index is None or index is Ellipsis:
        raise SiteError(f"{index!r} is no index along {dim}: pass an integer, a slice, a list or a mask.")
    if isinstance(index, Aligned):
        return Select(items=(int(index),), scalar=True, of=index.of)
    if hasattr(index, "detach"):
        index = index.detach().cpu().numpy()
    if not isinstance(index, np.ndarray) and isinstance(index, Iterable):
        index = list(index)
        counted = {i.of if isinstance(i, Aligned) else "" for i in index}
        if counted & {"clean", "corrupted"}:
            if len(counted) > 1:
                raise SiteError(f"{index} along {dim} mixes positions of different prompts; an index counts in one.")
            return replace(select([int(i) for i in index], dim), of=counted.pop())
    try:
        array = np.asarray(index)
    except ValueError:
        array = np.empty((0,))  # lists of unequal lengths
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        return Select(items=(int(array),), scalar=True)
    if array.ndim != 1 or array.size == 0 or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer)):
        raise SiteError(
            f"{index!r} is no index along {dim}: pass an integer, a slice, a list of integers, or a boolean mask."
        )
    if array.dtype == bool:
        if not array.any():
            raise SiteError(f"The mask along {dim} selects nothing.")
        return Select(items=tuple(int(i) for i in array.nonzero()[0]), mask=len(array))
    items = tuple(int(i) for i in array)
    if len(set(items)) < len(items):
        twice = sorted({i for i in items if items.count(i) > 1})
        raise SiteError(f"{list(items)} along {dim} names {twice} twice; an edit writes each index once.")
    return Select(items=items)


def _of_span(written: str, dim: str) -> Select:
    found = SPAN.fullmatch(written)
    if found is None:
        raise SiteError(
            f"{written!r} is no index along {dim}: a span is written as its name, or as 'name[-1]' or 'name[1:]' for "
            "some of its tokens."
        )
    name, inside = found.groups()
    if inside is None:
        return Select(span=name)
    if ":" not in inside:
        return Select(items=(int(inside),), scalar=True, span=name)
    start, stop = (int(bound) if bound else None for bound in inside.split(":"))
    return Select(bounds=(start, stop, None), span=name)


@dataclass(frozen=True, slots=True)
class Site:
    """A place: component, layer (0 for embed and logits), positions and, where it has them, heads or neurons.

    For scores and pattern ``pos`` are the destinations, and ``src`` the positions that those attend to.
    """

    component: str
    layer: int
    pos: Select = ALL
    unit: Select = ALL
    src: Select = ALL

    def __str__(self) -> str:
        kind = component(self.component)
        picks = {"layer": self.layer, kind.place: self.pos, "src": self.src, kind.unit: self.unit}
        return f"{self.component}[{', '.join(str(picks[dim]) for dim in kind.index)}]"

    def picked(self, dim: str) -> Select:
        """What it picks along one of its dims, but for the layer."""
        return self.pos if dim in ("pos", "dest") else self.src if dim == "src" else self.unit


def split_index(kind: Component, index: Any) -> tuple[Select, Select, Select, Select]:
    """An index expression as (layers, positions, units, sources).

    Trailing indices that are left out mean all. Components without layers take their layer, 0, or leave it out.

    Raises:
        SiteError: Too many indices, or no layer.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if not kind.layered and len(parts) == len(kind.index) + 1 and isinstance(parts[0], int) and parts[0] == 0:
        parts = parts[1:]
    if len(parts) > len(kind.index):
        raise SiteError(
            f"{kind.name} has the indices [{', '.join(kind.index)}]; {len(parts)} were given: "
            f"[{', '.join(_written(p) for p in parts)}]."
        )
    picks = {dim: select(part, dim) for dim, part in zip(kind.index, parts, strict=False)}
    layers = picks.get("layer", Select((0,), scalar=True))
    return layers, picks.get(kind.place, ALL), picks.get(kind.unit or "", ALL), picks.get("src", ALL)


def hashable(index: Any) -> Any:
    """An index of integers, slices and names as something to look it up by; ``None`` for any other."""
    if type(index) is int:
        return index
    if type(index) is not tuple:
        index = (index,)
    key: list[Any] = []
    for part in index:
        if type(part) in (int, str):
            key.append(part)
        elif type(part) is Aligned:
            key.append((int(part), part.of))
        elif type(part) is slice and all(b is None or type(b) is int for b in (part.start, part.stop, part.step)):
            key.append((part.start, part.stop, part.step))
        else:
            return None
    return tuple(key)


def _written(part: Any) -> str:
    return str(select(part, "index")) if isinstance(part, slice) else str(part)


def layers_of(kind: Component, picked: Select, count: int) -> tuple[int, ...]:
    """The layers an index picks in a model of ``count`` layers.

    Raises:
        SiteError: A layer does not exist.
    """
    layers = picked.resolve(count if kind.layered else 1)
    if not layers:
        raise SiteError(
            f"{kind.name}[{picked}, …]: this model has {count} layers, 0 to {count - 1} (or -{count} to -1)."
        )
    return layers
