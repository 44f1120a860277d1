"""Grids of sites: which places of a component there are in a model and some pairs, as index tuples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from tracepatch.alignment import Aligned
from tracepatch.architecture import Architecture
from tracepatch.errors import SiteError
from tracepatch.shapes import units_of
from tracepatch.sites import ALL, PLACES, Component, component, layers_of, select
from tracepatch.tokens import EncodedPairs

SPAN = "span"
"""The dim of named spans: it stands for the one along the prompt, ``pos`` or ``dest``."""


@dataclass(frozen=True)
class Grid:
    """What the indices of a grid are made of.

    Attributes:
        architecture: Of the model.
        encoded: The pairs.
        base: The world whose positions are counted, where those of a pair's prompts differ.
        aligned: Whether positions then are those that have partners, and mean these in the other prompt.
    """

    architecture: Architecture
    encoded: EncodedPairs
    base: str = "corrupted"
    aligned: bool = True

    def indices(self, name: str, dims: Sequence[str], only: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The places of a component along some dims; ``Recorder.grid`` describes it.

        Args:
            name: The component.
            dims: The dims to run over.
            only: A dim and the indices to keep.
        """
        kind = component(name)
        offered, along = self._offered(kind, dims, only), self._along(kind, dims, only)
        found: list[tuple[Any, ...]] = []
        for n in offered if "layer" in dims else offered[:1]:
            units = self._units(kind, n, only)
            ranges: dict[str, tuple[Any, ...]] = {"layer": (n,), **along, kind.unit or "": units}
            indices: Iterable[tuple[Any, ...]] = product(*(ranges[dim] for dim in dims))
            if {"dest", "src"} <= set(dims):
                dest, src = dims.index("dest"), dims.index("src")
                indices = (i for i in indices if self._attends(i[dest], i[src]))
            found += indices
        return found

    def ranges(self, name: str, dims: Sequence[str], only: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The labels along each dim of a component, and under ``layers`` the layers that have it; as ``indices``."""
        kind = component(name)
        offered = self._offered(kind, dims, only)
        found = {dim: list(labels) for dim, labels in self._along(kind, dims, only).items()}
        if kind.unit:
            found[kind.unit] = sorted({unit for layer in offered for unit in self._units(kind, layer, only)})
        return {**found, "layers": offered}

    def _offered(self, kind: Component, dims: Sequence[str], only: Mapping[str, Any]) -> list[int]:
        """The layers that have a component, of those that are asked for."""
        known = (*kind.index, SPAN)
        wrong = [dim for dim in (*dims, *only) if dim not in known]
        if wrong or len(set(dims)) < len(dims):
            raise SiteError(
                f"{kind.name} has the dims {', '.join(kind.index)}; it has no {', '.join(wrong) or 'dim twice'}."
            )
        if SPAN in dims and kind.place in dims:
            raise SiteError(f"{kind.name}: span stands for {kind.place}; a grid runs over one of them.")
        picked = select(only["layer"], "layer") if "layer" in only else ALL
        layers = layers_of(kind, picked, len(self.architecture))
        offered = [n for n in layers if self.architecture.offers(kind.name, n)]
        if not offered:
            self.architecture.require(kind.name, layers[0])
        return offered

    def _along(self, kind: Component, dims: Sequence[str], only: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """The labels of the dims along the prompts."""
        along: dict[str, tuple[Any, ...]] = {dim: self._positions(dim, only) for dim in kind.index if dim in PLACES}
        return along | ({SPAN: self._spans(only)} if SPAN in dims else {})

    def _positions(self, dim: str, only: Mapping[str, Any]) -> tuple[Any, ...]:
        chosen = select(only[dim], dim) if dim in only else ALL
        if chosen.span:
            return (str(chosen),)
        if chosen.of:
            return tuple(Aligned(i, chosen.of) for i in chosen.items or ())
        sides = self.encoded.sides(self.base)
        lengths = sorted({side.length for side in sides})
        several = len(lengths) > 1 or self.encoded.mapped
        if several and chosen.items is not None and min(chosen.items) < 0:
            return chosen.items  # each prompt counts from its own end
        found = chosen.resolve(lengths[-1])
        if found is None:
            hint = self.encoded.hint
            raise SiteError(f"grid: {dim}={only[dim]!r}: the longest prompt has {lengths[-1]} tokens.{hint}")
        if not (self.aligned and self.encoded.mapped):
            return found
        partnered = set().union(*self._partnered)
        alone = sorted(set(found) - partnered)
        if alone and chosen.items is not None:
            raise SiteError(
                f"grid: {dim}={only[dim]!r}: position {alone[0]} of the {self.base} prompts has a partner in no pair; "
                f"those that have one: {', '.join(map(str, sorted(partnered)))}. aligned=False runs over all of them."
            )
        return tuple(Aligned(p, self.base) for p in found if p in partnered)

    @cached_property
    def _partnered(self) -> list[frozenset[int]]:
        """Per pair, the positions of the base that have a partner."""
        sides = self.encoded.sides(self.base)
        return [frozenset(range(side.length) if side.aligned is None else side.aligned) for side in sides]

    def _attends(self, dest: Any, src: Any) -> bool:
        """Whether a position may attend to another in some pair, as far as their numbers say: to none after it."""
        if isinstance(src, str) or isinstance(dest, str):
            return True
        if isinstance(src, Aligned) and isinstance(dest, Aligned) and src.of == dest.of == self.base:
            return src <= dest and any(src in one and dest in one for one in self._partnered)
        return bool(src <= dest or min(src, dest) < 0)

    def _spans(self, only: Mapping[str, Any]) -> tuple[str, ...]:
        names = list(dict.fromkeys(name for side in self.encoded.sides(self.base) for name, *_ in side.spans))
        given = only.get(SPAN, names)
        wanted = [given] if isinstance(given, str) else list(given)
        wrong = [str(one) for one in wanted if not isinstance(one, str) or select(one, "pos").span not in names]
        if wrong or not names:
            what = f"these pairs have no span {', '.join(wrong)}; they have {', '.join(names)}."
            none = "these pairs have no spans: make them with tp.Template, or pass spans= to tp.Pairs."
            said = what if names else none
            raise SiteError(f"{said[0].upper()}{said[1:]}{self.encoded.hint}")
        return tuple(wanted)

    def _units(self, kind: Component, layer: int, only: Mapping[str, Any]) -> tuple[int, ...]:
        count = self.architecture.units(kind.name, layer)
        if kind.unit is None or kind.unit not in only:
            return tuple(range(count))
        picked = select(only[kind.unit], kind.unit)
        units_of(kind, layer, picked, count)
        return picked.resolve(count) or ()
