"""The recording context: inside it nothing runs, edits are written down.

Assignments between worlds are recorded as they stand in the code, with plain Python and no source capture, so that they
work in a REPL, a notebook, ``exec``, a function or a comprehension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import torch

from tracepatch.alignment import Aligned, Alignment, Side
from tracepatch.architecture import Architecture
from tracepatch.draws import Draws
from tracepatch.errors import RecipeError, SiteError
from tracepatch.fitting import Meeting, require_fit, require_portion
from tracepatch.grids import Grid
from tracepatch.prompts import Pairs
from tracepatch.references import Reference, mean, resample
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
from tracepatch.shapes import shape_of
from tracepatch.sites import COMPONENTS, Site, component
from tracepatch.sources import Function, Increment, Noise, Part, Sum, Value, WorldName, as_source, summed
from tracepatch.tokens import EncodedPairs
from tracepatch.trials import require_plain, require_result, saved
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
        edited: The edited worlds, by name.
        references: The reference worlds, by name.
    """

    def __init__(self, architecture: Architecture, encoded: EncodedPairs) -> None:
        encoded.require_comparable()
        self.architecture, self.encoded = architecture, encoded
        self.rows: list[Row] = []
        self.clean = World(self, "clean")
        self._corrupted = World(self, "corrupted")
        self._draws = Draws(encoded)
        self.edited, self.references = self._draws.edited, self._draws.references
        self.sites: dict[str, dict[Any, Site]] = {}
        self.opened: Row | None = None
        self._ended = False
        self._tried: set[tuple[Any, ...]] = set()
        self._taken: set[tuple[Any, ...]] = set()
        self._dims: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.lengths = tuple(sorted(set(encoded.lengths)))
        self.alignments: dict[Alignment, list[int]] = {}  # with the numbers of the pairs that have them
        for number, alignment in enumerate(encoded.alignments):
            self.alignments.setdefault(alignment, []).append(number)
        self.sides = tuple(dict.fromkeys(side for world in encoded.worlds for side in encoded.sides(world)))
        self._by_pair = encoded.mapped or any(side.spans for side in self.sides)  # whether all `:` are the same
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
        if not isinstance(of, World) or of._recorder is not self or of._name in self.references:
            what = of._name if isinstance(of, World) else repr(of)
            raise RecipeError(f"of= is a world of this recording that has a run, such as p.clean, not {what}.")
        below = self.edited.get(of._name)
        if below is not None:
            below.used = True
        self.edited[name] = EditedWorld(name, of._name, below.root if below else of._name)
        return World(self, name)

    def gaussian(self, scale: float, seed: int = 0, *, of: str | Value | None = None, draws: int = 1) -> Noise:
        """Gaussian noise of a standard deviation: a source, as in ``site += p.gaussian(3, of="embed")``.

        Every site and pair draws its own; the same seed gives the same noise again.

        Args:
            scale: The standard deviation: in the activation's unit or, with ``of``, a multiple of another one.
            seed: Which noise.
            of: What the scale is a multiple of: the standard deviation of all numbers of ``"embed"`` in the clean
                prompts, or of a value of the clean or corrupted world, as in ``of=p.clean.embed[subject]``.
            draws: How often the noise is drawn; rows are then measured once for each draw, with the label ``draw``,
                and ``tp.over_draws`` averages them.

        Raises:
            RecipeError: It is no standard deviation, seed, number of draws, or value of an unpatched world.
        """
        return Noise.of(scale, seed, None if of is None else self._unit(of), draws)

    def _unit(self, of: Any) -> Value:
        if isinstance(of, str) and component(of).index == ("pos",):
            of = getattr(self.clean, of)[:]
        attends = isinstance(of, Value) and (component(of.site.component).attends or of.site.component == "logits")
        if not isinstance(of, Value) or of.world not in ("clean", "corrupted") or attends:
            raise RecipeError(
                f"of={of!s} has no standard deviation that noise could be a multiple of: pass 'embed', or a vector's "
                "place in an unpatched world, such as p.clean.resid_pre[3, :]."
            )
        return Value(self._draws.prompts(of.world), of.site)

    def mean(self, prompts: Pairs | Sequence[Any], over: Literal["positions"] | None = None) -> World:
        """The mean over a set of prompts, indexed like a world: ``p.clean.z[5, :, 3] = p.mean(prompts).z[5, :, 3]``.

        ``tracepatch.references.mean`` describes the arguments.
        """
        return self.reference(mean(prompts, over))

    def resample(self, prompts: Pairs | Sequence[Any], seed: int = 0, draws: int = 1) -> World:
        """For each pair a prompt drawn from a set, indexed like a world; all sites of a pair take the same prompt.

        ``tracepatch.references.resample`` describes the arguments.
        """
        return self.reference(resample(prompts, seed, draws))

    def reference(self, declared: Reference) -> World:
        """The world of a reference from ``tp.mean`` or ``tp.resample``: for the right side of edits only."""
        return World(self, self._draws.reference(declared))

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
        of = [] if site is None else self._sides(value.world)
        shapes = [dims for side in of if site and (dims := self._shape(site, side)) is not None]
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
    def grid(self, name: str, by: str, *, base: World | None = ..., aligned: bool = ..., **only: Any) -> list[Any]: ...
    @overload
    def grid(
        self, name: str, by: Sequence[str] = ..., *, base: World | None = ..., aligned: bool = ..., **only: Any
    ) -> list[tuple[Any, ...]]: ...
    def grid(
        self,
        name: str,
        by: str | Sequence[str] = ("layer", "pos"),
        *,
        base: World | None = None,
        aligned: bool = True,
        **only: Any,
    ) -> list[Any]:
        """The sites of a component that exist in this model, as index tuples (as numbers where ``by`` is one string).

        Where not every position of a pair's prompts corresponds to the same one (``align=…`` of ``tp.Pairs``),
        positions are those of the base that have a partner in some pair; in the other prompt they mean the partner, so
        that ``p.corrupted.z[layer, pos] = p.clean.z[layer, pos]`` writes partners' values.

        Args:
            name: The component.
            by: Which of its dims to run over: ``layer``, ``pos``, ``head``, ``neuron``; ``span`` instead of ``pos`` for
                the names of the pairs' spans.
            base: The world whose positions are counted, where those of a pair differ: the corrupted one, where there is
                one, unless said otherwise.
            aligned: ``False`` runs over all positions of the base, which in the other prompt are then its own positions
                of the same number.
            only: A dim and the indices to keep, as in ``layer=slice(0, 4)`` or ``pos=[-1, 3]``.

        Raises:
            SiteError: The component lacks such a dim, or an index does not exist.
            ComponentError: No layer of this model has the component.
        """
        dims = (by,) if isinstance(by, str) else tuple(by)
        found = self._grid(base, aligned).indices(name, dims, only)
        return [index[0] for index in found] if isinstance(by, str) else found

    def ranges(
        self, name: str, dims: Sequence[str], only: dict[str, Any], base: World | None = None, aligned: bool = True
    ) -> dict[str, list[Any]]:
        """The labels along each dim of a component, and under ``layers`` the layers that have it.

        Args:
            name: The component.
            dims: The dims that will be run over.
            only: A dim and the indices to keep.
            base: As for ``grid``.
            aligned: As for ``grid``.

        Raises:
            SiteError: The component lacks a dim, or an index does not exist.
            ComponentError: No layer of this model has the component.
        """
        return self._grid(base, aligned).ranges(name, dims, only)

    def _grid(self, base: World | None, aligned: bool) -> Grid:
        given = self.encoded.worlds[-1] if base is None else self._root(self._world_of(base)._name)
        return Grid(self.architecture, self.encoded, given, aligned)

    def aligned(self, positions: Any, of: World | None = None) -> Any:
        """Positions of one prompt that, as an index into the other, mean their partners there.

        ``p.clean.resid_pre[5, 9]`` is position 9 of the clean prompt; ``p.clean.resid_pre[5, p.aligned(9)]`` is the one
        that corresponds to position 9 of the corrupted prompt.

        Args:
            positions: An integer, or several, counted from 0.
            of: The world whose prompt is counted: the corrupted one, where there is one, unless said otherwise.
        """
        given = self.encoded.worlds[-1] if of is None else self._root(self._world_of(of)._name)
        if isinstance(positions, (int, np.integer)):
            return Aligned(int(positions), given)
        return [Aligned(int(one), given) for one in positions]

    def span(self, name: str, token: int | None = None) -> str:
        """A named span of the pairs, as an index: the tokens that stand for it, in each prompt its own.

        Where values go from one prompt to the other, those of its tokens that are aligned.

        Args:
            name: The span.
            token: One of its tokens only: ``0`` for the first, ``-1`` for the last.

        Raises:
            SiteError: The pairs have no such span.
        """
        written = name if token is None else f"{name}[{token}]"
        return str(Grid(self.architecture, self.encoded).indices("logits", ("span",), {"span": written})[0][0])

    @staticmethod
    def _world_of(given: Any) -> World:
        if not isinstance(given, World):
            raise RecipeError(f"Pass a world of this recording, such as p.clean, not {given!r}.")
        return given

    # ------------------------------------------------------------------------------------------------ called by worlds

    def write(self, world: WorldName, site: Site, given: Any) -> None:
        """Records one assignment."""
        row, own = self.opened, self.edited.get(world)
        if world in self.references:
            raise RecipeError(f"{world}.{site} cannot be edited: it is no run, but values to be written in one.")
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
        total = summed(source)
        if isinstance(source, Function):
            self._require_result(world, site, source)
        else:
            assert total is not None
            own_place = isinstance(source, Value) and source.site == site and source.world not in self.references
            self._require_fit(world, site, total, plain=own_place)
        if isinstance(source, Part):
            source = require_portion(f"{world}.{site}", site, source, add, self.architecture)
        taken = set() if total is None else {value.world for _, value in total.values}
        for other in (self.edited[name] for name in taken if name in self.edited):
            if row is None and other is own:
                raise RecipeError(f"{world}.{site}: a standing edit of {world} cannot take {world}'s own values.")
            other.used = True
        if total is not None:
            require_plain(total, self.edited)
            for _, value in total.values:
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

    def _root(self, world: WorldName) -> WorldName:
        return self.edited[world].root if world in self.edited else world

    def _sides(self, world: WorldName) -> list[Side]:
        """The different prompts of a world."""
        return list(dict.fromkeys(alignment.side(self._root(world)) for alignment in self.alignments))

    def _require_fit(self, world: WorldName, site: Site, source: Sum, plain: bool) -> None:
        """Tries an edit on each different pair, once for those that are alike.

        Raises:
            RecipeError: What is written does not fit.
            SiteError: No pair has all the positions.
        """
        if plain and not self._by_pair:
            return
        layer = site.layer if not plain or site.component in ("q", "k") else -1
        worlds = tuple(value.world for _, value in source.values)
        key = world, worlds, site.component, site.pos, site.src, layer
        if plain and key in self._tried:
            return
        roots = {name: edited.root for name, edited in self.edited.items()}
        own = self._root(world), self.architecture, roots, self.references
        meetings = [Meeting(pair, *own, numbers) for pair, numbers in self.alignments.items()]
        found = [require_fit(site, source, meeting) for meeting in meetings]  # each is tried
        if not any(found):
            raise SiteError(
                f"{world}.{site} = {source}: no pair has all these positions. Where values go from one prompt to the "
                "other, `:` and spans are those tokens that are aligned (align=… of tp.Pairs)."
            )
        self._tried.add(key)

    def _require_result(self, world: WorldName, site: Site, source: Function) -> None:
        """Tries a function on made-up values of the site's shape, once for each shape."""
        crossing = source.arguments > 1
        roots = dict.fromkeys(("clean", "corrupted")) if crossing else {self._root(world): None}
        for alignment in self.alignments:
            shapes = [self._shape(site, alignment.side(root), crossing) for root in roots]
            dims = shapes[list(roots).index(self._root(world))]
            if dims is None or None in shapes or (source.function, dims) in self._tried:
                continue
            if len(set(shapes)) > 1:
                clean, corrupted = alignment.clean.length, alignment.corrupted.length
                raise RecipeError(
                    f"{source} takes {site} of both prompts, which is not equally many tokens in a pair of {clean} "
                    f"clean and {corrupted} corrupted ones: index by `:`, spans or aligned positions."
                )
            require_result(source, site, dims)
            self._tried.add((source.function, dims))

    def _shape(self, site: Site, side: Side, crossing: bool = False) -> tuple[tuple[str, int], ...] | None:
        """Dims and sizes as indexing gives them; ``None`` where a prompt lacks the positions."""
        return shape_of(
            site,
            side,
            self.architecture.units(site.component, site.layer),
            self.architecture.width(site.component, site.layer),
            crossing,
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
            require_label(row, name, label, self.architecture, self._sides(row.base))
            row.labels[name] = counted_from_0(row, name, label, self.architecture)
        require_apart(what, every, self.architecture)
        for one in self._draws.rows(row, len(self.rows)):
            key = tuple(one.labels.items())
            if key in self._taken:
                labels = ", ".join(f"{k}={v!r}" for k, v in one.labels.items())
                raise RecipeError(
                    f"Two rows have the labels {labels or '(none)'}; give each row labels of its own, such as name='…'."
                )
            self._taken.add(key)
            self.rows.append(one)


class _RowBlock:
    """The block of one row."""

    __slots__ = ("recorder", "row")

    def __init__(self, recorder: Recorder, labels: dict[str, Any], renormalize: bool) -> None:
        bad = [f"{k}={v!r}" for k, v in labels.items() if not k.isidentifier() or not _storable(v)]
        if bad:
            several = any(isinstance(value, tuple) for value in labels.values())
            hint = (
                " A grid over several dims gives one index for each: for layer, head in p.grid(…)." if several else ""
            )
            raise RecipeError(f"Labels are numbers or strings, and their names are words: {', '.join(bad)}.{hint}")
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
