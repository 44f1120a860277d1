"""Saved activations and gradients, from which any linear partition and decomposition is computed later.

The estimate of patching a sum is the sum of the estimates, so what was saved of two runs says what every position,
head, neuron, writer, direction or dictionary feature is estimated to do, without another forward.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from tracepatch.architecture import Architecture
from tracepatch.cells import BASES, Cells, Direction, base_of
from tracepatch.contractions import contracted
from tracepatch.direct import name_of
from tracepatch.errors import RecipeError, plural
from tracepatch.estimates import labelled, picked, requested
from tracepatch.layout import Key
from tracepatch.reach import canonical
from tracepatch.recording import Recorder
from tracepatch.shelf import Part, Store, part_name
from tracepatch.sites import Site, component
from tracepatch.sources import OTHER, WorldName
from tracepatch.tokens import EncodedPairs

INDEX = "gradients.json"
FORMAT = 1


@dataclass
class Gradients:
    """Values of the clean and corrupted runs, and the metrics' gradients in one or both of them.

    From ``tp.gradients`` or ``tp.open_gradients``. Arrays are read when they are needed; where they are on disk, only
    then.

    Attributes:
        components: What was saved.
        bases: The runs whose gradients were saved.
        encoded: The pairs.
        architecture: Of the model.
        attrs: What it rests on.
    """

    components: tuple[str, ...]
    bases: tuple[WorldName, ...]
    encoded: EncodedPairs
    architecture: Architecture
    attrs: dict[str, Any]
    _metrics: tuple[Any, ...]
    _scores: dict[WorldName, Any]
    _parts: list[Part] = field(default_factory=list, repr=False)
    _recorder: Recorder | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        where = next((str(p.file.parent) for p in self._parts if p.file is not None), "memory")
        return (
            f"<gradients of {self.attrs['model']}: {', '.join(self.components)}; {plural(len(self.encoded), 'pair')}, "
            f"by the {' and '.join(self.bases)} run, {self.bytes / 1e6:,.1f} MB in {where}>"
        )

    @property
    def bytes(self) -> int:
        """Of all saved arrays."""
        return sum(part.bytes for part in self._parts)

    # ------------------------------------------------------------------------------------------------ what is saved

    def values(self, name: str, layer: int = 0, world: WorldName = "clean") -> xr.DataArray:
        """A component's activations in one run, ``[pair, pos, …]`` as saved; NaN beyond a prompt's end."""
        return self._array("value", world, (), name, layer)

    def gradient(
        self, name: str, layer: int = 0, world: WorldName | None = None, metric: str | None = None
    ) -> xr.DataArray:
        """The gradient of a metric by a component, ``[pair, pos, …]``.

        Args:
            name: The component.
            layer: Its layer.
            world: The run in which it was taken; the only one otherwise.
            metric: Its name, where there are several.
        """
        world = self.bases[0] if world is None else world
        if world not in self.bases:
            raise RecipeError(f"Gradients were saved of the {' and '.join(self.bases)} run, not of {world!r}.")
        names = [m.name for m in self._metrics]
        if metric is not None and metric not in names:
            raise RecipeError(f"There is no metric {metric!r}; there are {', '.join(names)}.")
        return self._array("gradient", world, (0 if metric is None else names.index(metric),), name, layer)

    def _array(self, what: str, world: WorldName, number: tuple[int, ...], name: str, layer: int) -> xr.DataArray:
        own = self._require(name, layer)
        pieces = {pair: row for part in self._parts for pair, row in part.rows((what, world, *number, *own))}
        longest = max(pieces.values(), key=lambda row: row.numel())
        wide = torch.float64 if longest.dtype == torch.float64 else torch.float32
        found = np.full((len(self.encoded), *longest.shape), np.nan, str(wide).removeprefix("torch."))
        for pair, row in pieces.items():
            at: Any = (pair, *(slice(0, n) for n in row.shape))
            found[at] = row.to(wide).numpy()
        dims = component(name).dims
        shared = found.ndim - 1 < len(dims)  # what single heads read is one stream
        dims = tuple(d for d in dims if not (shared and d in ("head", "kv_head")))
        coords = {"pair": np.arange(len(found))}
        return xr.DataArray(
            found, dims=("pair", *dims), coords=coords, name=name, attrs={"layer": layer, "world": world}
        )

    # ------------------------------------------------------------------------------------------------ estimates

    def attribute(
        self,
        components: str | Sequence[str],
        *,
        by: str | Sequence[str] | None = None,
        direction: Direction | None = None,
        source: Any = None,
        only: dict[str, Any] | None = None,
    ) -> xr.Dataset:
        """What ``tp.attribute`` gives with ``tp.AtP()``, from what was saved.

        Args:
            components: Of those that were saved.
            by: The dims to run over.
            direction: ``"denoising"`` where gradients of the corrupted run were saved; that of the saved run otherwise.
            source: A number or tensor to be written instead of the other run's values.
            only: Dims and the indices to keep.
        """
        direction = self._direction(direction)
        cells = Cells.of(self._rows, components, by, direction, source, only)
        cells.require_plain(self._rows, "What was saved", "Estimate without saving: tp.attribute takes spans.")
        self._require_saved(cells.names)
        return self._estimated(cells, direction, lambda part, key, number: [self._product(part, cells, key, number)])

    def along(self, name: str, directions: Any, *, direction: Direction | None = None) -> xr.Dataset:
        """The estimate of patching only what lies along given directions of a component with ``d_model`` numbers.

        For each unit vector u: (gradient · u) × (difference · u); for an orthonormal basis they sum to the whole.

        Args:
            name: A component whose values are vectors, such as ``"resid_pre"``.
            directions: Vectors ``[feature, d]``; they are scaled to length 1.
            direction: As in ``attribute``.

        Returns:
            A dataset by ``layer``, ``pos`` and ``feature``.
        """
        found = torch.as_tensor(directions, dtype=torch.float64)
        if found.ndim != 2 or not bool((found.norm(dim=-1) > 0).all()):
            raise RecipeError(f"directions are vectors [feature, d], none of them 0; given were {list(found.shape)}.")
        unit = found / found.norm(dim=-1, keepdim=True)
        return self._features(name, direction, lambda change: change @ unit.T, unit)

    def features(
        self,
        name: str,
        encode: Callable[[torch.Tensor], torch.Tensor],
        decoder: Any,
        *,
        direction: Direction | None = None,
    ) -> xr.Dataset:
        """The estimate of patching each feature of a dictionary alone, such as a sparse autoencoder's.

        (f(other) − f(base)) × (gradient · the feature's decoder vector); what the dictionary leaves out stays.

        Args:
            name: The component that the dictionary is of.
            encode: Gives features ``[…, feature]`` of activations ``[…, d]``.
            decoder: A vector for each feature, ``[feature, d]``.
            direction: As in ``attribute``.

        Returns:
            A dataset by ``layer``, ``pos`` and ``feature``.
        """
        vectors = torch.as_tensor(decoder)
        if vectors.ndim != 2:
            raise RecipeError(f"decoder has a vector for each feature, [feature, d]; given was {list(vectors.shape)}.")
        return self._features(name, direction, None, vectors.double(), encode)

    def decomposed(self, layer: int, *, direction: Direction | None = None) -> xr.Dataset:
        """The estimate of patching the stream entering a layer, split into what its writers bring to it.

        The stream is the first one plus everything that was added since; so is the difference between two runs. Needs
        ``resid_pre``, ``attn_out`` and ``mlp_out`` among the saved components (``head_out`` for single heads).

        Args:
            layer: The layer; the number of layers for the stream that leaves the last.
            direction: As in ``attribute``.

        Returns:
            A dataset by ``writer`` and ``pos``: ``estimate``, and ``whole`` of the stream itself, their sum.
        """
        direction = self._direction(direction)
        base, depth = BASES[direction], len(self.architecture)
        if not 0 <= layer <= depth:
            raise RecipeError(f"layer is 0 to {depth}, not {layer!r}.")
        top = self._stream_key(layer)
        writers = self._writers(layer)
        self._require_saved([top[1], *(name for _, name, _ in writers)])
        longest = max(self.encoded.lengths)
        count = len(self._metrics)
        parts = np.full((count, len(self.encoded), len(writers), longest), np.nan)
        whole = np.full((count, len(self.encoded), longest), np.nan)
        keys = list(dict.fromkeys([top[0], *(key for key, _, _ in writers)]))
        for part in self._parts:
            for number in range(count):
                slope = ("gradient", base, number, *top[0])
                items = (
                    ("product", ("value", base, *key), slope, self._source(part, base, key), True, ()) for key in keys
                )
                results = dict(zip(keys, contracted(part.known, tuple(items)), strict=True))
                pairs = list(part.pairs)
                whole[number, pairs, : part.length] = results[top[0]].numpy()
                for i, (key, _, head) in enumerate(writers):
                    found = results[key] if head < 0 else results[key][:, :, head]
                    parts[number, pairs, i, : part.length] = found.numpy()
        lead = ("metric", "pair") if count > 1 else ("pair",)
        data = {
            "estimate": ((*lead, "writer", "pos"), parts if count > 1 else parts[0]),
            "whole": ((*lead, "pos"), whole if count > 1 else whole[0]),
        }
        names = [name_of(key, head) for key, _, head in writers]
        coords = {"writer": names, "pos": np.arange(longest), "pair": np.arange(len(self.encoded))}
        return xr.Dataset(data, coords, {**self.attrs, "base": base, "layer": layer})

    # ------------------------------------------------------------------------------------------------ on disk

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes everything into a folder: safetensors, and an index; the folder appears whole or not at all.

        Returns:
            The folder, to be opened with ``tp.open_gradients(folder, model, pairs)``.
        """
        target = Path(folder)
        with Store(target) as store:
            assert store.working is not None
            for number, part in enumerate(self._parts):
                part.write(store.working / part_name(number))
            store.finish(self.write_index)
        return target

    def write_index(self, folder: Path) -> None:
        """Writes what the arrays are of."""
        index = {
            "format": FORMAT,
            "components": self.components,
            "bases": self.bases,
            "metrics": [m.name for m in self._metrics],
            "scores": {world: array.tolist() for world, array in self._scores.items()},
            "parts": [{"pairs": part.pairs, "length": part.length} for part in self._parts],
            "tokens": [self.encoded.clean, self.encoded.corrupted],
            "attrs": self.attrs,
        }
        (folder / INDEX).write_text(json.dumps(index, default=str), encoding="utf-8")

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def _rows(self) -> Recorder:
        if self._recorder is None:
            self._recorder = Recorder(self.architecture, self.encoded)
        return self._recorder

    def _direction(self, direction: Direction | None) -> Direction:
        if direction is None:
            return next(d for d, base in BASES.items() if base in self.bases)
        if base_of(direction) not in self.bases:
            raise RecipeError(
                f"direction={direction!r} needs gradients of the {BASES[direction]} run, and those of the "
                f"{' and '.join(self.bases)} run were saved: tp.gradients(…, direction='both')."
            )
        return direction

    def _require_saved(self, names: Iterable[str]) -> None:
        missing = sorted(set(names) - set(self.components))
        if missing:
            raise RecipeError(f"{', '.join(missing)} was not saved; there is {', '.join(self.components)}.")

    def _require(self, name: str, layer: int) -> Key:
        self._require_saved([name])
        self.architecture.require(name, layer)
        return canonical(Site(name, layer), len(self.architecture))

    def _source(self, part: Part, base: WorldName, key: Key) -> tuple[Any, ...]:
        return "value", ("value", OTHER[base], *key), part.agreeing

    def _product(self, part: Part, cells: Cells, key: Key, number: int) -> tuple[Any, ...]:
        own, kind = canonical(Site(*key), len(self.architecture)), component(key[0])
        source = self._source(part, cells.base, own) if cells.source is None else ("number", cells.source)
        vector = kind.dims[-1] not in kind.index
        slope = "gradient", cells.base, number, *own
        return "product", ("value", cells.base, *own), slope, source, vector, cells.summed(kind)

    def _estimated(self, cells: Cells, direction: Direction, items: Callable[..., list[tuple[Any, ...]]]) -> xr.Dataset:
        found: dict[Key, dict[int, Any]] = {}
        for part in self._parts:
            for key in cells.keys:
                asked = [item for number in range(len(self._metrics)) for item in items(part, key, number)]
                arrays = np.stack([r.double().numpy() for r in contracted(part.known, tuple(asked))])
                at = picked(cells, key[0], arrays, part.length)
                for row, pair in enumerate(part.pairs):
                    found.setdefault(key, {})[pair] = at[:, row]
        attrs = {
            **self.attrs,
            "base": cells.base,
            "written": OTHER[cells.base] if cells.source is None else str(cells.source),
            "component": ", ".join(cells.names),
            "request": requested(cells, direction),
        }
        return labelled(cells, found, self._scores, self._metrics, self.architecture, self.encoded, attrs)

    def _features(
        self,
        name: str,
        direction: Direction | None,
        project: Callable[[torch.Tensor], torch.Tensor] | None,
        vectors: torch.Tensor,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> xr.Dataset:
        direction = self._direction(direction)
        base, kind, count = BASES[direction], component(name), len(self._metrics)
        self._require_saved([name])
        if kind.unit or kind.attends:
            raise RecipeError(f"{name} is split by {kind.unit}; features are of components with one vector a position.")
        layers = [n for n in range(len(self.architecture) if kind.layered else 1) if self.architecture.offers(name, n)]
        longest = max(self.encoded.lengths)
        found = np.full((count, len(self.encoded), len(layers), longest, len(vectors)), np.nan)
        for part in self._parts:
            for i, layer in enumerate(layers):
                own = canonical(Site(name, layer), len(self.architecture))
                here, there = (part.known["value", world, *own] for world in (base, OTHER[base]))
                if here.shape[-1] != vectors.shape[1]:
                    raise RecipeError(
                        f"{name} of layer {layer} is {here.shape[-1]} wide, and the vectors {vectors.shape[1]}."
                    )
                if encode is None:
                    assert project is not None
                    change = project(there.double() - here.double())
                else:
                    change = (encode(there) - encode(here)).double()
                if change.shape[-1] != len(vectors):
                    raise RecipeError(f"encode gives {change.shape[-1]} features, and the decoder has {len(vectors)}.")
                for number in range(count):
                    slope = part.known["gradient", base, number, *own].double() @ vectors.T
                    found[number, list(part.pairs), i, : part.length] = (slope * change).detach().numpy()
        lead = ("metric", "pair") if count > 1 else ("pair",)
        data = {"estimate": ((*lead, "layer", "pos", "feature"), found if count > 1 else found[0])}
        coords = {
            "layer": layers,
            "pos": np.arange(longest),
            "feature": np.arange(len(vectors)),
            "pair": np.arange(len(self.encoded)),
        }
        return xr.Dataset(data, coords, {**self.attrs, "base": base, "component": name})

    def _stream_key(self, layer: int) -> tuple[Key, str]:
        """The stream entering a layer, and the component that has it."""
        if layer < len(self.architecture):
            return ("resid_pre", layer), "resid_pre"
        return ("resid_pre", layer), next((n for n in ("logits_in", "resid_post") if n in self.components), "logits_in")

    def _writers(self, layer: int) -> list[tuple[Key, str, int]]:
        """What was added to the stream before a layer: its key, component and head."""
        found: list[tuple[Key, str, int]] = [(("resid_pre", 0), "resid_pre", -1)]
        heads = "head_out" in self.components
        for below in range(layer):
            if self.architecture.attention(below) is not None:
                if heads and self.architecture.offers("head_out", below):
                    count = self.architecture.units("head_out", below)
                    found += [(("head_out", below), "head_out", head) for head in range(count)]
                else:
                    found.append((("attn_out", below), "attn_out", -1))
            if self.architecture.mlp(below) is not None:
                found.append((("mlp_out", below), "mlp_out", -1))
        return found
