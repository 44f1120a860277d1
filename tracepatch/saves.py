"""Live values that rows saved, as labelled arrays: one for each handle, and all of them together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.results import Result, pair_coords, placed, site_coords, word_at
from tracepatch.rows import Row, Save
from tracepatch.sites import PLACES, UNITS, Select
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs

Pieces: TypeAlias = dict[int, torch.Tensor]
"""Pair → a live value ``[…]``; a pair that lacks the positions is not in it."""


def hand_out(
    rows: Sequence[Row],
    saved: dict[tuple[int, int, int], torch.Tensor],
    architecture: Architecture,
    encoded: EncodedPairs,
    roots: Mapping[WorldName, WorldName],
) -> None:
    """Gives every handle its values; ``saved`` is that of ``executors.Measured``, ``roots`` of edited worlds."""
    prompts = _Tokens(encoded, dict(roots))
    for (number, order), pieces in _by_save(rows, saved).items():
        row = rows[number]
        row.saves[order].labelled = partial(labelled, row, row.saves[order], pieces, architecture, prompts)


@dataclass(frozen=True)
class _Tokens:
    """The prompts that saved positions count in.

    Attributes:
        encoded: The pairs.
        roots: Edited world → the world whose prompts it has.
    """

    encoded: EncodedPairs
    roots: Mapping[WorldName, WorldName]

    @cached_property
    def words(self) -> dict[str, list[list[str]]]:
        """Per world, each pair's tokens as text."""
        return {world: [self.encoded.words(ids) for ids in self.encoded.world(world)] for world in self.encoded.worlds}

    def root(self, world: WorldName) -> WorldName:
        """The world whose prompts a world has."""
        return self.roots.get(world, world)

    def tokens(self, dim: str, label: str, axis: list[int], world: WorldName) -> dict[str, Any]:
        """Tokens along a dim of a world's positions, and their partners' in the other prompt."""
        if dim not in PLACES:
            return {}
        front = "" if label == "pos" else f"{label}_"
        found: dict[str, Any] = {}
        for of, words in self.words.items():
            other = of != self.root(world) and self.encoded.mapped and min(axis, default=0) >= 0
            counted = self.root(world) if other else ""
            sides = self.encoded.sides(of)
            picked = [[word_at(p, counted, *one) for p in axis] for one in zip(sides, words, strict=True)]
            shared = all(p == picked[0] for p in picked)
            name = front + ("token" if of == "clean" else "corrupted_token")
            found[name] = (label, picked[0]) if shared else (("pair", label), picked)
        return found


def labelled(row: Row, save: Save, pieces: Pieces, architecture: Architecture, prompts: _Tokens) -> xr.DataArray:
    """What one row saved: ``[pair, …]`` in float32, with the dims of the indexed site, or of what it was reduced to.

    Positions and units carry their numbers: counted from 0 where all pairs agree in them, else from the end of each
    prompt. Positions carry tokens as those of a result do: ``token`` and ``corrupted_token``, by pair where they
    differ; for ``dest`` and ``src`` with these in front. What a pair does not have is NaN.
    """
    axes = {dim: _axis(dim, save, architecture, prompts) for dim in save.dims}
    shape = [_size(i, dim, axes[dim], pieces) for i, dim in enumerate(save.dims)]
    values = np.full((len(prompts.encoded), *shape), np.nan, np.float32)
    for pair, piece in pieces.items():
        _put(values[(pair, ...)], piece, [None] * piece.ndim, [None] * piece.ndim)
    coords: dict[str, Any] = {"pair": np.arange(len(values))}
    for dim, axis in axes.items():
        if axis is not None:
            coords |= {dim: axis} | prompts.tokens(dim, dim, axis, save.world)
    attrs = {"site": str(save.site), "row": row.described, "base": save.world}
    return xr.DataArray(values, dims=("pair", *save.dims), coords=coords, name=save.name, attrs=attrs)


def together(
    rows: Sequence[Row],
    saved: dict[tuple[int, int, int], torch.Tensor],
    architecture: Architecture,
    encoded: EncodedPairs,
    roots: Mapping[WorldName, WorldName],
    attrs: dict[str, Any],
) -> Result:
    """What all rows saved: one variable a name, ``[pair, *labels, …]``; a tree where rows have several sets of labels.

    Where rows save other positions or units under one name, the variable has all of them, and NaN where a row has none.
    A dim that a label or another variable has with other entries has the variable's name in front, as in
    ``pattern_head``; so have the dims that only a reduction has.

    Args:
        rows: The rows of the plan.
        saved: (row, its save's number, pair) → the live value.
        architecture: Of the model.
        encoded: The pairs.
        roots: Edited world → the world whose prompts it has.
        attrs: Provenance.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row.saves:
            sets.setdefault(tuple(row.labels), []).append(number)
    pieces = _by_save(rows, saved)
    found: dict[str, xr.Dataset] = {}
    for names, numbers in sets.items():
        joined = "_".join(names) or "unlabelled"
        taken = sum(key.rstrip("_") == joined for key in found)
        found[joined + "_" * taken] = _dataset(rows, numbers, pieces, architecture, _Tokens(encoded, roots), attrs)
    if len(found) == 1:
        return next(iter(found.values()))
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs)} | found)


def _dataset(
    rows: Sequence[Row],
    numbers: list[int],
    pieces: dict[tuple[int, int], Pieces],
    architecture: Architecture,
    prompts: _Tokens,
    attrs: dict[str, Any],
) -> xr.Dataset:
    dims, shape, at, coords = placed([rows[n] for n in numbers])
    members: dict[str, list[tuple[int, Save, Pieces]]] = {}
    for place, number in enumerate(numbers):
        for order, save in enumerate(rows[number].saves):
            members.setdefault(save.name, []).append((place, save, pieces[number, order]))
    encoded, labels = prompts.encoded, frozenset(coords)
    used: dict[str, list[int] | int] = {}
    data: dict[str, Any] = {}
    for name, several in members.items():
        sites = list(dict.fromkeys((save.site, prompts.root(save.world)) for _, save, _ in several))
        first = {key: next(s for _, s, _ in several if (s.site, prompts.root(s.world)) == key) for key in sites}
        own = several[0][1].dims  # the recorder saw to it that they are the same in all rows
        axes = {key: [_axis(dim, save, architecture, prompts) for dim in own] for key, save in first.items()}
        named, sizes, whole = [], [], []
        for i, dim in enumerate(own):
            union = _union([axes[site][i] for site in sites])
            size = max(_size(i, dim, union, found) for _, _, found in several)
            entry = size if union is None else union
            plain = dim not in labels and not dim.startswith("reduced_")
            label = dim if plain and used.setdefault(dim, entry) == entry else f"{name}_{dim}"
            named.append(label)
            sizes.append(size)
            whole.append(union)
            if union is not None:
                world = several[0][1].world
                coords |= {label: union} | prompts.tokens(dim, label, union, world) if label not in coords else {}
        values = np.full((len(encoded), *shape, *sizes), np.nan, np.float32)
        for place, save, found in several:
            for pair, piece in found.items():
                _put(
                    values[(pair, *(index[place] for index in at), ...)],
                    piece,
                    axes[save.site, prompts.root(save.world)],
                    whole,
                )
        told = {"site": ", ".join(dict.fromkeys(str(site) for site, _ in sites))}
        data[name] = (("pair", *dims, *named), values, told)
    about = {"saves": json.dumps({name: found[2]["site"] for name, found in data.items()})}
    bases = sorted({rows[n].base for n in numbers})
    dataset = xr.Dataset(data, pair_coords(encoded) | coords, attrs | {"base": " and ".join(bases)} | about)
    return site_coords(dataset, architecture, encoded, [rows[n] for n in numbers]) if dims != ("row",) else dataset


def _by_save(rows: Sequence[Row], saved: dict[tuple[int, int, int], torch.Tensor]) -> dict[tuple[int, int], Pieces]:
    found: dict[tuple[int, int], Pieces] = {(n, i): {} for n, row in enumerate(rows) for i in range(len(row.saves))}
    for (number, order, pair), value in saved.items():
        found[number, order][pair] = value
    return found


def _axis(dim: str, save: Save, architecture: Architecture, prompts: _Tokens) -> list[int] | None:
    """The numbers along a dim: positions or units; ``None`` where it has none that all pairs share."""
    site = save.site
    if dim in UNITS:
        return list(site.unit.resolve(architecture.units(site.component, site.layer)) or ())
    return _positions(site.picked(dim), prompts.encoded.sides(prompts.root(save.world))) if dim in PLACES else None


def _positions(picked: Select, sides: Sequence[Side]) -> list[int] | None:
    found = [(picked.on(side) or (), side.length) for side in sides]
    longest = max((positions for positions, _ in found), key=len)
    if all(positions == longest[: len(positions)] for positions, _ in found):
        return list(longest)
    ends = {tuple(p - n for p in positions) for positions, n in found if positions}
    return list(ends.pop()) if len(ends) == 1 else None


def _size(i: int, dim: str, axis: list[int] | None, pieces: Pieces) -> int:
    return len(axis) if axis is not None else max((piece.shape[i] for piece in pieces.values()), default=0)


def _union(axes: Sequence[list[int] | None]) -> list[int] | None:
    if any(axis is None for axis in axes):
        return None
    first = axes[0]
    return first if all(a == first for a in axes) else sorted({n for axis in axes for n in axis or ()})


def _put(
    target: NDArray[np.float32],
    piece: torch.Tensor,
    axes: Sequence[list[int] | None],
    whole: Sequence[list[int] | None],
) -> None:
    """Writes a value at the places of its own positions and units among those of its variable."""
    at = [
        np.arange(n) if axis is None or union is None else np.array([union.index(p) for p in axis[:n]], dtype=int)
        for n, axis, union in zip(piece.shape, axes, whole, strict=True)
    ]
    if at:
        target[np.ix_(*at)] = piece.numpy()
    else:
        target[...] = piece.numpy()
