"""Whether what an edit writes fits where it is written, in each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from tracepatch.alignment import Alignment, Side
from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError, SiteError
from tracepatch.portions import Features
from tracepatch.references import ReferenceWorld
from tracepatch.shapes import shape_of
from tracepatch.sites import ALL, Site, component
from tracepatch.sources import Part, Sum, Value, WorldName, summed

Dims: TypeAlias = tuple[tuple[str, int], ...]
"""Names and sizes, as indexing a site gives them."""


def require_portion(what: str, site: Site, source: Part, add: bool, architecture: Architecture) -> Part:
    """A portion of a site, tried on vectors of its width.

    Args:
        what: The site, with its world.
        site: Where it is written.
        source: What is written.
        add: Whether it is added.
        architecture: Of the model.

    Raises:
        RecipeError: It is added, or the site has no vectors of that width, whole, in which it would be a portion.
    """
    if add:
        raise RecipeError(f"{what}: {source} says what a portion of the site becomes, so write =, and not +=.")
    total = summed(source)
    assert total is not None
    for one in (site, *(value.site for _, value in total.values)):
        kind = component(one.component)
        split = kind.dims[-1] in kind.index and not one.unit.all
        if kind.attends or kind.dims[-1] == "scale" or split:
            raise RecipeError(
                f"{what}: {source} is a portion of vectors, and {one} is not one: "
                f"{'take all of it, ' if split else ''}or pick what is written by its index."
            )
    width = architecture.width(site.component, site.layer)
    if component(site.component).unit == component(site.component).dims[-1]:
        width = architecture.units(site.component, site.layer)
    if isinstance(source.portion, Features):
        return replace(source, portion=source.portion.fitted(width))
    if source.portion.width != width:
        raise RecipeError(f"{what} has vectors of {width}, and {source} speaks of vectors of {source.portion.width}.")
    return source


@dataclass(frozen=True)
class Meeting:
    """An edit of one prompt of a pair with values of the same or the other one: where both are indexed.

    Attributes:
        pair: The alignment of the two prompts.
        root: The world whose prompt is edited.
        architecture: Of the model.
        roots: Edited world → the world whose prompt it has; of others the world itself.
        references: The reference worlds, whose values are indexed as those of the prompt that is edited.
        pairs: The numbers of the pairs that are aligned so.
    """

    pair: Alignment
    root: WorldName
    architecture: Architecture
    roots: Mapping[WorldName, WorldName]
    references: Mapping[WorldName, ReferenceWorld]
    pairs: Sequence[int]

    def crosses(self, source: Sum) -> bool:
        """Whether some value is of the other prompt."""
        return any(self.side(value) is not self.here for _, value in source.values)

    @property
    def here(self) -> Side:
        """The prompt that is edited."""
        return self.pair.side(self.root)

    def side(self, value: Value) -> Side:
        """The prompt that a value is of."""
        return self.here if value.world in self.references else self.pair.side(self.roots.get(value.world, value.world))

    def shape(self, site: Site, side: Side, crossing: bool) -> Dims | None:
        """Dims and sizes as indexing a site in a prompt gives them."""
        name, layer = site.component, site.layer
        return shape_of(
            site, side, self.architecture.units(name, layer), self.architecture.width(name, layer), crossing
        )

    def given(self, value: Value, crossing: bool) -> Dims | None:
        """Dims and sizes of what is written; of a mean over positions without these."""
        world = self.references.get(value.world)
        if world is None:
            return self.shape(value.site, self.side(value), crossing)
        dims = self.shape(replace(value.site, pos=ALL) if world.over else value.site, self.here, crossing)
        return dims and _given_by(world, value, self, crossing, dims)


def require_fit(site: Site, source: Sum, meeting: Meeting) -> bool:
    """Refuses values and tensors that do not fit a site in a pair, and rotated ones at other positions than their own.

    Returns:
        Whether the pair has all the positions.

    Raises:
        RecipeError: With the dims of both, with what to move instead, or with the positions that a reference lacks.
    """
    crossing = meeting.crosses(source)
    target = meeting.shape(site, meeting.here, crossing)
    given = [None if target is None else meeting.given(value, crossing) for _, value in source.values]
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


def _given_by(world: ReferenceWorld, value: Value, meeting: Meeting, crossing: bool, dims: Dims) -> Dims:
    """The dims of a reference's value, for a prompt of a pair."""
    kind = component(value.site.component)
    if kind.name == "logits" or (world.over and kind.attends):
        raise RecipeError(
            f"{value} cannot be a source: a reference has no mean of logits, and of scores and patterns none over "
            "positions. Write a tensor, or take the mean position by position."
        )
    try:
        world.require_values(value.site, meeting.here, crossing, meeting.pairs)
    except SiteError as error:
        raise RecipeError(f"{value} cannot be a source: {error}.") from None
    return tuple(dim for dim in dims if not (world.over and dim[0] == "pos"))


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
    reference = meeting.references.get(value.world)
    moved = reference is not None and reference.moves(value.site, meeting.here)
    if here and there and (here != there or moved):
        told = ""
        if not moved:
            old, new = next(((a, b) for a, b in zip(there, here, strict=False) if a != b), (there[0], here[0]))
            told = f" (here from position {old} to {new})"
        raise RecipeError(
            f"{site} cannot take {value}: this model turns queries and keys by their position, so that they mean "
            f"something else elsewhere{told}. Move what they are made of: {site.component}_in."
        )


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another, as arrays do."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
