"""Places to patch as plain tuples, so that sets of them can be listed, named and swept.

A *place* is a component with its index, ``("z", 9, slice(None), 6)`` for ``z[9, :, 6]``. Where prompts are aligned, its
positions are those of the run that is edited, and what comes from the other run comes from their partners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tracepatch.alignment import Aligned
from tracepatch.cells import Direction, base_of, crosses, default_by, index_of, partnered, taken
from tracepatch.errors import RecipeError
from tracepatch.grids import SPAN
from tracepatch.recording import Recorder
from tracepatch.sites import component, hashable
from tracepatch.worlds import World

Place: TypeAlias = tuple[Any, ...]
Places: TypeAlias = Sequence[Place] | Mapping[str, Place | Sequence[Place]]


def along(name: str, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """The dims that a sweep of a component runs over."""
    return default_by(component(name)) if by is None else (by,) if isinstance(by, str) else tuple(by)


def at(name: str, labels: Mapping[str, Any]) -> Place:
    """The place of a component with these indices; all along the dims that are left out."""
    return (name, *index_of(component(name), labels, {}))


def write(p: Recorder, direction: Direction, source: Any, *places: Place) -> None:
    """The edits of the open row at these places: the other run's values, or a source's.

    Args:
        p: The recording.
        direction: Which run is edited, as in ``tp.patch``.
        source: What is written; ``None`` for the other run's values.
        places: Where.

    Raises:
        RecipeError: There is no such direction.
    """
    base = base_of(direction)
    given, crossing = taken(p, base, source), crosses(source, base)
    for name, *index in places:
        if crossing:
            index = list(partnered(p, base, dict(zip(component(name).index, index, strict=False))).values())
        where = tuple(index) if len(index) > 1 else index[0]
        target = getattr(getattr(p, base), name)
        target[where] = getattr(given, name)[where] if isinstance(given, World) else given


def named(places: Places) -> dict[str, list[Place]]:
    """Labels, and the places that each stands for.

    Args:
        places: A list of places, each labelled by what it is, or a mapping of labels to one or several.

    Raises:
        RecipeError: One is no place, or two have one label.
    """
    if isinstance(places, Mapping):
        found = {str(k): [v] if is_place(v) else list(v) for k, v in places.items()}
    else:
        listed = [(label(place) if is_place(place) else "", [place]) for place in places]
        found = dict(listed)
        if len(found) < len(listed):
            raise RecipeError("A place is named twice, or is none: a place is ('z', 9, slice(None), 6).")
    bad = [place for group in found.values() for place in group if not is_place(place)]
    if bad or not found:
        what = repr(bad[0]) if bad else "nothing"
        raise RecipeError(f"{what} is no place: a component with its index is, such as ('z', 9, slice(None), 6).")
    return {name: [tuple(place) for place in group] for name, group in found.items()}


def is_place(value: Any) -> bool:
    """Whether something is a component with an index."""
    return isinstance(value, tuple) and len(value) > 1 and isinstance(value[0], str)


def label(place: Place) -> str:
    """A place as it would be written."""

    def written(part: Any) -> str:
        if not isinstance(part, slice):
            return str(part)
        return ":".join("" if bound is None else str(bound) for bound in (part.start, part.stop))

    return f"{place[0]}[{', '.join(map(written, place[1:]))}]"


def picked(name: str, dims: Sequence[str], place: Place) -> Any:
    """What a place picks along some dims of a component, as something to look it up by.

    Raises:
        RecipeError: It is a place of another component.
    """
    if place[0] != name:
        raise RecipeError(f"{label(place)} is no place of {name}.")
    kind = component(name)
    found = dict(zip(kind.index, place[1:], strict=False))
    key = [found.get(kind.place if dim == SPAN else dim) for dim in dims]
    # A number is one of the run that is edited, the clean one.
    return hashable(tuple(int(i) if isinstance(i, Aligned) and i.of == "clean" else i for i in key))
