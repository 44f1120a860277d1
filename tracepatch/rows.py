"""Rows as they are recorded: edits of one base world, with the labels that place their result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.sites import UNITS, Select, Site, component
from tracepatch.sources import Source, WorldName

Label: TypeAlias = int | float | str
# Names that results use themselves.
RESERVED = frozenset(
    (
        *("pair", "metric", "model", "row", "rows", "depth", "status"),
        *("effect", "normalized", "value", "base", "clean", "corrupted"),
        *("token", "corrupted_token", "answer", "wrong", "clean_prompt", "corrupted_prompt"),
    )
)


@dataclass(frozen=True, slots=True)
class Edit:
    """``site ← source``, or ``site += source``."""

    site: Site
    source: Source
    add: bool = False
    renormalize: bool = False

    def __str__(self) -> str:
        after = ", renormalized" if self.renormalize else ""
        return f"{self.site} {'+=' if self.add else '='} {self.source}{after}"


@dataclass(slots=True)
class Row:
    """One patched forward for every pair: a base world, its edits, and the labels that place it in the result."""

    number: int
    labels: dict[str, Label]
    base: WorldName = "clean"
    edits: list[Edit] = field(default_factory=list)
    renormalize: bool = False
    raw: Callable[[Any], Any] | None = None  # the body of a trace, instead of edits

    @property
    def described(self) -> str:
        """The labels as they were written."""
        return ", ".join(f"{k}={v!r}" for k, v in self.labels.items())

    def __str__(self) -> str:
        if self.raw is not None:
            return f"row({self.described}): trace({called(self.raw)}) of {self.base}"
        return f"row({self.described}): " + "; ".join(f"{self.base}.{e}" for e in self.edits)


def called(function: Callable[..., Any]) -> str:
    """What to call a function in messages."""
    return str(getattr(function, "__name__", type(function).__name__))


def takes_one(function: Any) -> bool:
    """Whether something can be called with one argument."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin does not say
        return callable(function)
    return True


def counted_from_0(row: Row, name: str, label: Label, architecture: Architecture) -> Label:
    """A layer or unit as results label it; a position stays as it is, -1 being each prompt's own last."""
    if not isinstance(label, int) or label >= 0:
        return label
    if name == "layer":
        return label + len(architecture)
    split = (e.site for e in row.edits if component(e.site.component).unit == name)
    counts = [architecture.units(site.component, site.layer) for site in split]
    return label + counts[0] if counts else label


def require_label(row: Row, name: str, label: Label, architecture: Architecture, lengths: tuple[int, ...]) -> None:
    """Refuses a label that none of the row's edits touches.

    Raises:
        RecipeError: The label contradicts the edits.
    """
    if row.raw is not None:  # what it touches is not known
        return
    if name == "layer":
        touched = any(e.site.layer == label for e in row.edits) or any(
            e.site.layer - len(architecture) == label for e in row.edits
        )
    elif name == "component":
        touched = any(e.site.component == label for e in row.edits)
    elif name in ("pos", "dest", "src"):
        along = [e.site for e in row.edits if name == "pos" or name in component(e.site.component).index]
        touched = any(_selects(site.picked(name), label, n) for site in along for n in lengths)
    elif name in UNITS:
        split = [e.site for e in row.edits if component(e.site.component).unit == name]
        touched = any(_selects(s.unit, label, architecture.units(s.component, s.layer)) for s in split)
    else:
        return
    if not touched:
        raise RecipeError(
            f"The label {name}={label!r} contradicts the row's edits, none of which touches it: "
            + "; ".join(f"{row.base}.{e}" for e in row.edits[:3])
        )


def require_apart(row: Row, architecture: Architecture) -> None:
    """Refuses an edit of what a module takes or gives inside the span of another edit, where both claim one place.

    Raises:
        RecipeError: The order of the two is not that of the forward.
    """
    modules = [e.site for e in row.edits if component(e.site.component).module]
    for site in modules:
        moment = architecture.modules.tap(site.component).place.order
        for other in (e.site for e in row.edits if not component(e.site.component).module):
            first, last = architecture.span(other.component, other.layer)
            # resid_mid is written at its first place and belongs to the last.
            inside = first < moment < last or (other.component == "resid_mid" and first == moment)
            if inside:
                raise RecipeError(
                    f"{row.base}.{other} and {row.base}.{site} cannot be edited in one row: {other.component} acts "
                    "from before to after that module. Edit them in rows of their own, or edit modules alone."
                )


def _selects(picked: Select, label: Any, length: int) -> bool:
    if picked.items is not None and label in picked.items:
        return True
    found = picked.resolve(length) or ()
    return isinstance(label, int) and -length <= label < length and label % length in found
