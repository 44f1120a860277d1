"""Functions that will run inside a forward, tried on made-up values when they are recorded.

A mistake is then raised at the line that made it, and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch

from tracepatch.alignment import Alignment, Side
from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.metrics import Metric, require_sound
from tracepatch.rows import RESERVED, EditedWorld, Row, Save
from tracepatch.shapes import shape_of
from tracepatch.sites import COMPONENTS, SPLIT_READERS, Site, component
from tracepatch.sources import Function, Sum, Value, WorldName

Dims: TypeAlias = tuple[tuple[str, int], ...]
"""Names and sizes, as indexing a site gives them."""
TAKEN = frozenset(
    (*RESERVED, *(dim for kind in COMPONENTS.values() for dim in (*kind.index, *kind.dims)), "name", "component")
)


def require_measure(
    metric: Metric, vocab: int, sides: Sequence[Side], shape: Callable[[Site, Side], Dims | None], device: Any
) -> None:
    """Tries a metric on made-up values, of each shape that it will be given.

    Args:
        metric: The metric.
        vocab: How many logits there are.
        sides: The prompts.
        shape: Dims and sizes of a site in a prompt, which may lack it.
        device: Where a metric of an activation is computed.

    Raises:
        MetricError: It fails, has the wrong shape, or mixes rows.
    """
    if metric.site is None:
        require_sound(metric, vocab, len(metric.positions.on(sides[0]) or (0,)))
        return
    for dims in dict.fromkeys(shape(metric.site, side) for side in sides):
        if dims is not None:
            require_sound(metric, vocab, 1, dims, device)


def require_result(source: Function, site: Site, dims: Dims) -> None:
    """Refuses a function whose result cannot be written at a site of this shape.

    Raises:
        RecipeError: It fails, returns something that does not fit, or mixes rows.
    """
    shape = tuple(n for _, n in dims)
    made_up = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = _called(source.function, made_up[: source.arguments], str(source), dims)
    if not isinstance(found, torch.Tensor) or not fits(tuple(found.shape), (2, *shape)):
        raise RecipeError(
            f"{source} must return a tensor that fits {site}, [{_named(dims)}]; it returned {_described(found)}."
        )
    alone = [source.function(*(value[i : i + 1] for value in made_up[: source.arguments])) for i in range(2)]
    together = found.expand(2, *shape)
    if not all(torch.allclose(a.expand(1, *shape)[0], b, atol=1e-4) for a, b in zip(alone, together, strict=True)):
        raise RecipeError(f"{source} mixes rows: each row is a run of its own; reduce over the other dims only.")


def saved(row: Row, value: Any, reduce: Callable[..., Any] | None, name: str, shapes: Sequence[Dims]) -> Save:
    """What `p.save` records, checked.

    Args:
        row: The row that saves it.
        value: The site, as a value of the row's world.
        reduce: What is made of it before it is kept.
        name: The variable that it becomes.
        shapes: The site in prompts of each length that has it.

    Raises:
        RecipeError: The name cannot be a variable or is taken, or `reduce` fails on made-up values.
    """
    if not isinstance(value, Value):
        raise RecipeError(
            f"p.save takes a site of the row's world, such as p.{row.base}.resid_post[0, -1], not "
            f"{type(value).__name__}. Arithmetic on it goes into reduce=."
        )
    if (row.edits or row.saves) and value.world != row.base:
        raise RecipeError(
            f"A row's live values are those of the world that it edits: this row runs on {row.base}, so save "
            f"{row.base}.{value.site}. The {value.world} world as it is: a row of its own, without edits."
        )
    if not isinstance(name, str) or not name.isidentifier() or name in TAKEN or name in row.labels:
        raise RecipeError(f"{name!r} cannot be a variable's name: use a word that is neither a dim nor a label.")
    if any(save.name == name for save in row.saves):
        raise RecipeError(f"This row saves {name!r} already. Tell the two apart with name='…'.")
    if reduce is not None and not callable(reduce):
        raise RecipeError(f"reduce is a function of the live value [row, …], not {reduce!r}.")
    dims = [tuple(dim for dim, _ in shape) if reduce is None else _reduced(reduce, shape) for shape in shapes]
    if len({len(found) for found in dims}) > 1:
        raise RecipeError(f"{_name(reduce)} returns different dims for prompts of different lengths.")
    row.base = value.world
    return Save(value.world, value.site, name, dims[-1], reduce)


@lru_cache(maxsize=256)
def _reduced(reduce: Callable[..., Any], dims: Dims) -> tuple[str, ...]:
    """The dims that a function returns: the site's own where one has its size and grows with it, else ``reduced_0``.

    Raises:
        RecipeError: It fails, returns no tensor with rows in front, or mixes rows.
    """
    made_up = torch.randn(2, *(n for _, n in dims), generator=torch.Generator().manual_seed(0))
    found = _called(reduce, [made_up], _name(reduce), dims)
    if not isinstance(found, torch.Tensor) or not found.ndim or len(found) != 2:
        raise RecipeError(
            f"{_name(reduce)} must return a tensor [row, …]: it was given [{_named(dims)}] and returned "
            f"{_described(found)}. Reduce over the other dims only."
        )
    for i, together in enumerate(found):
        alone = reduce(made_up[i : i + 1])
        same = alone.shape == (1, *together.shape) and torch.allclose(
            alone[0].float(), together.float(), atol=1e-4, equal_nan=True
        )
        if not same:
            raise RecipeError(
                f"{_name(reduce)} mixes rows: each row is a run of its own; reduce over the other dims only."
            )
    shape = tuple(found.shape[1:])
    claims: list[list[str]] = [[] for _ in shape]
    for i, (dim, size) in enumerate(dims):
        wider = [n + (i == j) for j, (_, n) in enumerate(dims)]
        try:
            grown = tuple(reduce(torch.randn(2, *wider, generator=torch.Generator().manual_seed(0))).shape[1:])
        except Exception:  # made for this size, as a product with a direction is: then the dim is gone
            continue
        if len(grown) == len(shape):
            for j, n in enumerate(shape):
                if n == size and grown[j] == size + 1:
                    claims[j].append(dim)
    names = [claim[0] if len(claim) == 1 and claims.count(claim) == 1 else "" for claim in claims]
    left = iter(range(len(names)))
    return tuple(dim or f"reduced_{next(left)}" for dim in names)


@dataclass(frozen=True)
class Meeting:
    """An edit of one prompt of a pair with values of the same or the other one: where both are indexed.

    Attributes:
        pair: The alignment of the two prompts.
        root: The world whose prompt is edited.
        architecture: Of the model.
        roots: Edited world → the world whose prompt it has; of others the world itself.
    """

    pair: Alignment
    root: WorldName
    architecture: Architecture
    roots: Mapping[WorldName, WorldName]

    def crosses(self, source: Sum) -> bool:
        """Whether some value is of the other prompt."""
        return any(self.side(value) is not self.here for _, value in source.values)

    @property
    def here(self) -> Side:
        """The prompt that is edited."""
        return self.pair.side(self.root)

    def side(self, value: Value) -> Side:
        """The prompt that a value is of."""
        return self.pair.side(self.roots.get(value.world, value.world))

    def shape(self, site: Site, side: Side, crossing: bool) -> Dims | None:
        """Dims and sizes as indexing a site in a prompt gives them."""
        name, layer = site.component, site.layer
        return shape_of(
            site, side, self.architecture.units(name, layer), self.architecture.width(name, layer), crossing
        )


def require_fit(site: Site, source: Sum, meeting: Meeting) -> bool:
    """Refuses values and tensors that do not fit a site in a pair, and rotated ones at other positions than their own.

    Returns:
        Whether the pair has all the positions.

    Raises:
        RecipeError: With the dims of both, or with what to move instead.
    """
    crossing = meeting.crosses(source)
    target = meeting.shape(site, meeting.here, crossing)
    given = [meeting.shape(value.site, meeting.side(value), crossing) for _, value in source.values]
    if target is None or None in given:
        return False
    for (_, value), dims in zip(source.values, given, strict=True):
        _require_unmoved(site, value, meeting, crossing)
        _require_value(site, value, meeting, dict(target), dims or ())
    if source.constant is None:
        return True
    shape = tuple(source.constant.tensor.shape)
    if not fits(shape, tuple(n for _, n in target)):
        told = ", ".join(f"{dim} {n}" for dim, n in target)
        raise RecipeError(
            f"A tensor of shape {list(shape)} does not fit {site}, which is [{told}] in {_counted(meeting, crossing)}."
        )
    return True


def _require_value(site: Site, value: Value, meeting: Meeting, target: dict[str, int], given: Dims) -> None:
    ends = [component(s.component).dims[-1] for s in (site, value.site)]
    if "width" in ends and set(ends) <= {"width", "d_model"}:  # where the sizes agree
        given = tuple((ends[0] if dim == ends[1] else dim, n) for dim, n in given)
    elif ends[0] != ends[1]:
        raise RecipeError(f"{value} is a vector over {ends[1]} and does not fit {site}, a vector over {ends[0]}.")
    for dim, count in given:
        if count not in (1, target.get(dim, 1)):
            of = _counted(meeting, meeting.side(value) is not meeting.here)
            raise RecipeError(
                f"{value} has {count} {dim} entries and does not fit {site}, which has {target.get(dim, 1)} (in {of})."
            )


def _counted(meeting: Meeting, crossing: bool) -> str:
    """Which prompts an edit is about, in words."""
    clean, corrupted = meeting.pair.clean.length, meeting.pair.corrupted.length
    if crossing and clean != corrupted:
        return f"a pair of {clean} clean and {corrupted} corrupted tokens"
    return f"prompts of {meeting.here.length} tokens"


def _require_unmoved(site: Site, value: Value, meeting: Meeting, crossing: bool) -> None:
    """Refuses rotated queries and keys at another position than their own."""
    rotated = {site.component, value.site.component} <= {"q", "k"} and meeting.architecture.rotated(value.site.layer)
    if not rotated:
        return
    here, there = site.pos.on(meeting.here, crossing), value.site.pos.on(meeting.side(value), crossing)
    if here and there and here != there:
        moved = next(((a, b) for a, b in zip(there, here, strict=False) if a != b), (there[0], here[0]))
        raise RecipeError(
            f"{site} cannot take {value}: this model turns queries and keys by their position, so that they mean "
            f"something else elsewhere (here from position {moved[0]} to {moved[1]}). Move what they are made of: "
            f"{site.component}_in."
        )


def require_plain(source: Sum, edited: Mapping[WorldName, EditedWorld]) -> None:
    """Refuses what single heads read in a world that edits it: it has no one value there, as it has elsewhere.

    Raises:
        RecipeError: With the world.
    """
    for _, value in source.values:
        place, world = (value.site.component, value.site.layer), edited.get(value.world)
        while world is not None:
            if place[0] in SPLIT_READERS and any((e.site.component, e.site.layer) == place for e in world.edits):
                raise RecipeError(
                    f"{value} cannot be a source: {world.name} edits {place[0]} of layer {place[1]} itself. Write the "
                    "source that it was edited with."
                )
            world = edited.get(world.of)


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another, as arrays do."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _called(function: Callable[..., Any], values: Sequence[torch.Tensor], name: str, dims: Dims) -> Any:
    try:
        return function(*values)
    except Exception as error:
        raise RecipeError(f"{name} fails on values [{_named(dims)}]: {type(error).__name__}: {error}") from error


def _named(dims: Dims) -> str:
    return ", ".join(f"{dim} {n}" for dim, n in (("row", 2), *dims))


def _described(found: Any) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)


def _name(function: Any) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}(…)"
