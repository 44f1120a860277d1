"""Rows as they are recorded: edits of one base world, with the labels that place their result."""

from __future__ import annotations

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
class EditedWorld:
    """A clean or corrupted run with standing edits, which is a world of its own: a base and a source of values.

    Attributes:
        name: What it is called.
        of: The world that it edits.
        root: The pristine world below all edited ones: its prompts.
        edits: What always happens in it, in the order of recording.
        used: Whether a row or another world has used it, after which it cannot change.
    """

    name: WorldName
    of: WorldName
    root: WorldName
    edits: list[Edit] = field(default_factory=list)
    used: bool = False

    def __str__(self) -> str:
        return f"{self.name} is {self.of} with " + "; ".join(map(str, self.edits))


@dataclass(slots=True)
class Row:
    """One patched forward for every pair: a base world, its edits, and the labels that place it in the result."""

    number: int
    labels: dict[str, Label]
    base: WorldName = "clean"
    edits: list[Edit] = field(default_factory=list)
    renormalize: bool = False

    @property
    def described(self) -> str:
        """The labels as they were written."""
        return ", ".join(f"{k}={v!r}" for k, v in self.labels.items())

    def __str__(self) -> str:
        return f"row({self.described}): " + "; ".join(f"{self.base}.{e}" for e in self.edits)


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


def _selects(picked: Select, label: Any, length: int) -> bool:
    if picked.items is not None and label in picked.items:
        return True
    found = picked.resolve(length) or ()
    return isinstance(label, int) and -length <= label < length and label % length in found
