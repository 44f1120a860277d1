"""Rows as they are recorded: edits of one base world, with the labels that place their result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.sites import COMPONENTS, Site
from tracepatch.sources import Source, WorldName

Label: TypeAlias = int | float | str
# Names that results use themselves.
RESERVED = frozenset(
    (
        *("pair", "metric", "model", "row", "rows", "depth", "status"),
        *("effect", "normalized", "value", "base", "clean", "corrupted"),
        *("token", "corrupted_token", "answer", "wrong", "clean_prompt", "corrupted_prompt", "decoder_prompt"),
    )
)


@dataclass(frozen=True, slots=True)
class Edit:
    """``site ← source``, or ``site += source``."""

    site: Site
    source: Source
    add: bool = False

    def __str__(self) -> str:
        return f"{self.site} {'+=' if self.add else '='} {self.source}"


@dataclass(slots=True)
class Row:
    """One patched forward for every pair: a base world, its edits, and the labels that place it in the result."""

    number: int
    labels: dict[str, Label]
    base: WorldName = "clean"
    edits: list[Edit] = field(default_factory=list)

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
    split = (e.site for e in row.edits if COMPONENTS[e.site.component].unit == name)
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
    elif name == "pos":
        touched = any(_selects(e.site, "pos", label, n) for e in row.edits for n in lengths)
    elif name in ("head", "kv_head", "neuron"):
        split = [e.site for e in row.edits if COMPONENTS[e.site.component].unit == name]
        touched = any(_selects(s, "unit", label, architecture.units(s.component, s.layer)) for s in split)
    else:
        return
    if not touched:
        raise RecipeError(
            f"The label {name}={label!r} contradicts the row's edits, none of which touches it: "
            + "; ".join(f"{row.base}.{e}" for e in row.edits[:3])
        )


def _selects(site: Site, which: str, label: Any, length: int) -> bool:
    picked = site.pos if which == "pos" else site.unit
    if picked.items is not None and label in picked.items:
        return True
    found = picked.resolve(length) or ()
    return isinstance(label, int) and -length <= label < length and label % length in found
