"""The recording context: inside it nothing runs, edits are written down.

Assignments between worlds are recorded as they stand in the code, with plain Python and no source capture, so that they
work in a REPL, a notebook, ``exec``, a function or a comprehension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from types import TracebackType
from typing import Any, overload

import numpy as np
import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError, SiteError
from tracepatch.rows import (
    RESERVED,
    Edit,
    EditedWorld,
    Label,
    Row,
    Save,
    counted_from_0,
    require_apart,
    require_fresh,
    require_label,
    require_separate,
    standing,
    takes_one,
)
from tracepatch.sites import (
    ALL,
    COMPONENTS,
    Component,
    Site,
    component,
    layers_of,
    select,
    shape_of,
    units_of,
)
from tracepatch.sources import Function, Increment, Noise, Value, WorldName, as_source
from tracepatch.tokens import EncodedPairs
from tracepatch.trials import require_fit, require_plain, require_result, require_unmoved, saved
from tracepatch.worlds import World


class Recorder:
    """What a recipe is written against: the worlds, rows, and grids of sites of one model and one set of pairs.

    Attributes:
        architecture: Of the model.
        encoded: The pairs, as tokens.
        clean: The world of the clean prompts. On the left of an assignment it is the row, on the right its pristine
            values.
        rows: What was recorded.
        seen: The activations that metrics read.
    """

    def __init__(self, architecture: Architecture, encoded: EncodedPairs) -> None:
        encoded.require_comparable()
        self.architecture, self.encoded = architecture, encoded
        self.rows: list[Row] = []
        self.clean = World(self, "clean")
        self._corrupted = World(self, "corrupted")
        self.edited: dict[WorldName, EditedWorld] = {}
        self.sites: dict[str, dict[Any, Site]] = {}
        self.opened: Row | None = None
        self._ended = False
        self._tried: set[tuple[Any, ...]] = set()
        self._taken: set[tuple[Any, ...]] = set()
        self._dims: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.lengths = tuple(sorted(set(encoded.lengths)))
        self.seen: tuple[Site, ...] = ()

    @property
    def corrupted(self) -> World:
        """The world of the corrupted prompts."""
        self.encoded.world("corrupted")
        return self._corrupted

    def world(self, name: WorldName, of: World) -> World:
        """A run with standing edits, as a world of its own: its own baseline, a base for rows and a source of values.

        Edits of it outside rows are its standing edits; they are recorded before it is used, and stand in every row
        that edits it further.

        Args:
            name: What to call it, a word of your own.
            of: The world that is edited: clean, corrupted, or another edited one.

        Raises:
            RecipeError: The name is taken or no word, or ``of`` is no world of this recording.
        """
        if self._ended:
            raise RecipeError("The recording has ended with its block: make worlds inside it.")
        known = ("clean", "corrupted", *self.edited)
        if not isinstance(name, str) or not name.isidentifier() or name in (*RESERVED, *known, *COMPONENTS):
            raise RecipeError(
                f"A world cannot be called {name!r}: choose a word that names no other world ({', '.join(known)}), no "
                "component and no variable of a result."
            )
        if not isinstance(of, World) or of._recorder is not self:
            raise RecipeError(f"of= is a world of this recording, such as p.clean, not {of!r}.")
        below = self.edited.get(of._name)
        if below is not None:
            below.used = True
        self.edited[name] = EditedWorld(name, of._name, below.root if below else of._name)
        return World(self, name)

    @staticmethod
    def gaussian(scale: float, seed: int = 0) -> Noise:
        """Gaussian noise of a standard deviation, in the activation's unit: a source, as in ``site += p.gaussian(3)``.

        Every site and pair draws its own; the same seed gives the same noise again.
        """
        return Noise.of(scale, seed)

    def row(self, *, renormalize: bool = False, **labels: Label) -> _RowBlock:
        """A block whose edits are one patched forward.

        Args:
            renormalize: After each edit of a pattern, scale the edited destination's weights to the sum that they had
                before it.
            labels: Where its result stands: ``layer=…, pos=…, head=…``, ``name="…"`` or any other names. A label of a
                site's dim must be touched by one of the edits.

        Raises:
            RecipeError: At the end of the block: no edits, labels that contradict them, or labels used before.
        """
        if self._ended:
            raise RecipeError("The recording has ended: write this row inside `with tp.patching(...) as p:`.")
        return _RowBlock(self, labels, renormalize)

    def save(self, value: Value, reduce: Callable[..., torch.Tensor] | None = None, name: str = "") -> Save:
        """Keeps a live value of the open row: what passes by there after the row's edits.

        Args:
            value: A site of the world that the row edits, such as ``p.corrupted.pattern[5, 2, -1]``. Before the first
                edit, or without any, it says which world the row runs on.
            reduce: What to make of it before it is kept: a function of the live value ``[row, …]`` in float32, with
                the dims that indexing the site gives, that keeps the row dim. What it returns is all that is kept.
            name: The variable that it becomes in ``p.saved``; the component's name if left out.

        Returns:
            A handle, whose ``values`` are there after the run.

        Raises:
            RecipeError: No row is open, the world is not the row's, or `reduce` fails on made-up values.
        """
        if self.opened is None:
            raise RecipeError(f"{value} is saved outside a row. Write p.save(...) inside `with p.row(...):`.")
        if self.opened.raw is not None:
            raise RecipeError("A raw trace saves what it likes itself, with nnsight.save; p.save is for rows of edits.")
        site = value.site if isinstance(value, Value) else None
        shapes = [dims for n in self.lengths if site and (dims := self._shape(site, n)) is not None]
        save = saved(self.opened, value, reduce, name or (site.component.replace(".", "_") if site else ""), shapes)
        self.opened.saves.append(save)
        return save

    def trace(self, function: Callable[[Any], Any], *, world: World | None = None) -> None:
        """Makes the open row a raw trace: ``function(model)`` is called inside an nnsight trace of one prompt.

        What it does to the model's activations, in the order of the forward, is the row; what it returns is ignored.
        The metrics are read afterwards, as for any row. Nothing is known of it, so it is never pruned and never shares
        a run with other rows.

        Args:
            function: Takes the nnsight model. Activations have one row: ``[1, pos, …]``.
            world: Whose prompts are run: the corrupted ones, where there are any, unless said otherwise.

        Raises:
            RecipeError: There is no open row, it has edits or a raw trace already, or a metric reads an activation.
        """
        row = self.opened
        if row is None:
            raise RecipeError("p.trace is called outside a row: write it inside `with p.row(name=…):`, one for each.")
        if row.edits or row.saves or row.raw is not None:
            has = "edits" if row.edits else "saves" if row.saves else "a raw trace"
            raise RecipeError(f"row({row.described}) has {has} already. A raw trace is a row of its own.")
        if self.seen:
            raise RecipeError(
                f"A metric reads {self.seen[0]}, which has passed by when a raw trace is over. Measure raw traces by "
                "metrics that read logits, in a recording of their own."
            )
        if not takes_one(function):
            raise RecipeError(f"p.trace takes a function of the model, not {function!r}.")
        given = world if world is not None else self.clean if self.encoded.corrupted is None else self.corrupted
        if given not in (self.clean, self._corrupted):
            raise RecipeError(f"world is p.clean or p.corrupted, not {given!r}.")
        row.base, row.raw = given._name, function

    @overload
    def grid(self, name: str, by: str, **only: Any) -> list[int]: ...
    @overload
    def grid(self, name: str, by: Sequence[str] = ..., **only: Any) -> list[tuple[int, ...]]: ...
    def grid(self, name: str, by: str | Sequence[str] = ("layer", "pos"), **only: Any) -> list[Any]:
        """The sites of a component that exist in this model, as index tuples (as numbers where ``by`` is one string).

        Args:
            name: The component.
            by: Which of its dims to run over: ``layer``, ``pos``, ``head``, ``neuron``.
            only: A dim and the indices to keep, as in ``layer=slice(0, 4)`` or ``pos=[-1, 3]``.

        Raises:
            SiteError: The component lacks such a dim, or an index does not exist.
            ComponentError: No layer of this model has the component.
        """
        kind = component(name)
        dims = (by,) if isinstance(by, str) else tuple(by)
        offered = self._offered(kind, dims, only)
        places = [dim for dim in kind.index if dim in ("pos", "dest", "src")]
        along = {dim: self._positions(dim, only) for dim in places}
        found: list[Any] = []
        for n in offered if "layer" in dims else offered[:1]:
            units = self._units(kind, n, only)
            ranges: dict[str, tuple[int, ...]] = {"layer": (n,), **along, kind.unit or "": units}
            indices: Iterable[tuple[int, ...]] = product(*(ranges[dim] for dim in dims))
            if {"dest", "src"} <= set(dims):  # a position attends to none after it
                dest, src = dims.index("dest"), dims.index("src")
                indices = (i for i in indices if i[src] <= i[dest] or min(i[src], i[dest]) < 0)
            found += indices
        return [index[0] for index in found] if isinstance(by, str) else found

    def ranges(self, kind: Component, dims: Sequence[str], only: dict[str, Any]) -> dict[str, list[int]]:
        """The labels along each dim of a component, and under ``layers`` the layers that have it.

        Raises:
            SiteError: The component lacks a dim, or an index does not exist.
            ComponentError: No layer of this model has the component.
        """
        offered = self._offered(kind, dims, only)
        found = {dim: list(self._positions(dim, only)) for dim in kind.index if dim in ("pos", "dest", "src")}
        if kind.unit:
            found[kind.unit] = sorted({unit for layer in offered for unit in self._units(kind, layer, only)})
        return {**found, "layers": offered}

    def _offered(self, kind: Component, dims: Sequence[str], only: dict[str, Any]) -> list[int]:
        """The layers that have a component, of those that are asked for."""
        wrong = [dim for dim in (*dims, *only) if dim not in kind.index]
        if wrong or len(set(dims)) < len(dims):
            raise SiteError(
                f"{kind.name} has the dims {', '.join(kind.index)}; it has no {', '.join(wrong) or 'dim twice'}."
            )
        picked = select(only["layer"], "layer") if "layer" in only else ALL
        layers = layers_of(kind, picked, len(self.architecture))
        offered = [n for n in layers if self.architecture.offers(kind.name, n)]
        if not offered:
            self.architecture.require(kind.name, layers[0])
        return offered

    def _positions(self, dim: str, only: dict[str, Any]) -> tuple[int, ...]:
        chosen = select(only[dim], dim) if dim in only else ALL
        if len(self.lengths) > 1 and chosen.items is not None and min(chosen.items) < 0:
            return chosen.items  # each prompt counts from its own end
        found = chosen.resolve(self.lengths[-1])
        if found is None:
            hint = self.encoded.hint
            raise SiteError(f"grid: {dim}={only[dim]!r}: the longest prompt has {self.lengths[-1]} tokens.{hint}")
        return found

    def _units(self, kind: Component, layer: int, only: dict[str, Any]) -> tuple[int, ...]:
        count = self.architecture.units(kind.name, layer)
        if kind.unit not in only:
            return tuple(range(count))
        picked = select(only[kind.unit], kind.unit)
        units_of(kind, layer, picked, count)
        return picked.resolve(count) or ()

    # ------------------------------------------------------------------------------------------------ called by worlds

    def write(self, world: WorldName, site: Site, given: Any) -> None:
        """Records one assignment."""
        row, own = self.opened, self.edited.get(world)
        if row is None and (own is None or self._ended):
            raise RecipeError(
                f"{world}.{site} is edited outside a row. Write the edit inside `with p.row(...):`, one block "
                "for each patched forward. (Standing edits are those of an edited world: p.world(name, of=…).)"
            )
        if row is None and own is not None and own.used:
            raise RecipeError(
                f"{world} has been used already, so {world}.{site} cannot be edited any more: its standing edits come "
                "before the first row or world that uses it."
            )
        if row is not None and row.raw is not None:
            raise RecipeError(
                f"row({row.described}) is a raw trace, so {world}.{site} cannot be edited in it. Open another row."
            )
        add = isinstance(given, Increment)
        if isinstance(given, Increment):
            if not isinstance(given.target, Value) or given.target != Value(world, site):
                raise RecipeError(f"{world}.{site}: += must add to the same site of the same world.")
            source = given.source
        else:
            source = as_source(given)
        if row is not None and (row.edits or row.saves) and row.base != world:
            what = f"edits {row.base}.{row.edits[0].site}" if row.edits else f"saves {row.base}.{row.saves[0].site}"
            raise RecipeError(
                f"One row edits one world: this one {what}, so {world}.{site} "
                "cannot be edited in it. "
                "The world that is assigned into is the base of the forward; open another row."
            )
        if isinstance(source, Function):
            self._require_result(site, source)
        elif not (isinstance(source, Value) and source.site == site):
            for length in self.lengths:
                require_unmoved(site, source.terms(), length, self.architecture)
                require_fit(site, source.terms(), length, partial(self._shape, length=length))
        taken = {} if isinstance(source, Function) else {value.world for _, value in source.terms().values}
        for other in (self.edited[name] for name in taken if name in self.edited):
            if row is None and other is own:
                raise RecipeError(f"{world}.{site}: a standing edit of {world} cannot take {world}'s own values.")
            other.used = True
        if not isinstance(source, Function):
            require_plain(source.terms(), self.edited)
            for _, value in source.terms().values:
                require_fresh(f"{world}.{site}", self._standing(value.world), [value.site], self.architecture)
        if row is None:
            assert own is not None
            edit = Edit(site, source, add)
            require_separate(f"world {world}", [*self._standing(world), edit])
            require_apart(f"world {world}", [*self._standing(world), edit], self.architecture)
            own.edits.append(edit)
            self.edited[world] = self.edited.pop(world)  # after those whose values it takes
            return
        if own is not None:
            own.used = True
        row.base = world
        row.edits.append(Edit(site, source, add, row.renormalize and site.component == "pattern"))

    def _standing(self, name: WorldName) -> list[Edit]:
        return [edit for _, edit in standing(name, self.edited)]

    def _require_result(self, site: Site, source: Function) -> None:
        """Tries a function on made-up values of the site's shape, once for each shape."""
        for length in self.lengths:
            dims = self._shape(site, length)
            if dims is None or (source.function, dims) in self._tried:
                continue
            require_result(source, site, dims)
            self._tried.add((source.function, dims))

    def _shape(self, site: Site, length: int) -> tuple[tuple[str, int], ...] | None:
        """Dims and sizes as indexing gives them; ``None`` where prompts of this length lack the positions."""
        return shape_of(
            site,
            length,
            self.architecture.units(site.component, site.layer),
            self.architecture.width(site.component, site.layer),
        )

    def finish(self, row: Row) -> None:
        """Checks a finished row and keeps it."""
        if row.renormalize and not any(e.renormalize for e in row.edits):
            raise RecipeError(
                f"row({row.described}) renormalizes patterns and edits none. (Scores need it not: the softmax does it.)"
            )
        if not row.edits and not row.saves and row.raw is None:
            raise RecipeError(
                f"row({row.described}) has no edits. A row is one patched forward; without an edit it would be "
                "its base. (It may look at its base with p.save.)"
            )
        every, what = [*self._standing(row.base), *row.edits], f"row({row.described})"
        require_separate(what, every)
        require_fresh(what, every, [save.site for save in row.saves], self.architecture)
        require_fresh(f"{what}: a metric", every, self.seen, self.architecture)
        for save in row.saves:
            if self._dims.setdefault((*row.labels, "", save.name), save.dims) != save.dims:
                raise RecipeError(
                    f"{what} saves {save.name!r} with other dims ({', '.join(save.dims)}) than the rows "
                    "before it. Give it a name of its own: name='…'."
                )
        for name, label in row.labels.items():
            require_label(row, name, label, self.architecture, self.lengths)
            row.labels[name] = counted_from_0(row, name, label, self.architecture)
        require_apart(what, every, self.architecture)
        key = tuple(row.labels.items())
        if key in self._taken:
            labels = ", ".join(f"{k}={v!r}" for k, v in row.labels.items())
            raise RecipeError(
                f"Two rows have the labels {labels or '(none)'}; give each row labels of its own, such as name='…'."
            )
        self._taken.add(key)
        self.rows.append(row)


class _RowBlock:
    """The block of one row."""

    __slots__ = ("recorder", "row")

    def __init__(self, recorder: Recorder, labels: dict[str, Any], renormalize: bool) -> None:
        bad = [f"{k}={v!r}" for k, v in labels.items() if not k.isidentifier() or not _storable(v)]
        if bad:
            raise RecipeError(f"Labels are numbers or strings, and their names are words: {', '.join(bad)}.")
        taken = [name for name in labels if name in RESERVED or name.startswith("effect_")]
        if taken:
            raise RecipeError(f"{', '.join(taken)} cannot be a row's label: results use the name themselves.")
        self.recorder = recorder
        named = {k: v.item() if isinstance(v, np.generic) else v for k, v in labels.items()}
        self.row = Row(len(recorder.rows), named, renormalize=renormalize)

    def __enter__(self) -> Row:
        if self.recorder.opened is not None:
            raise RecipeError("A row cannot be opened inside another; a joint patch is several edits in one row.")
        self.recorder.opened = self.row
        return self.row

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.recorder.opened = None
        if error is None:
            self.recorder.finish(self.row)


def _storable(label: Any) -> bool:
    """Whether a label is a number or text that a netCDF file can hold."""
    if isinstance(label, str):
        return "\0" not in label and label.isprintable()
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return abs(int(label)) < 1 << 63
    return isinstance(label, (float, np.floating))
