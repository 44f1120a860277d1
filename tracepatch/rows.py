"""Rows as they are recorded: edits of one base world, with the labels that place their result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.sites import UNITS, Select, Site, component
from tracepatch.sources import Function, Source, WorldName

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

    @property
    def tensor(self) -> torch.Tensor | None:
        """The fixed tensor that it writes, alone or in a sum; ``None`` if there is none, or it is one number."""
        constant = None if isinstance(self.source, Function) else self.source.terms().constant
        return None if constant is None or not constant.tensor.shape else constant.tensor


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

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The fixed tensors of its edits, in the order of the edits; single numbers are left out."""
        return [e.tensor for e in self.edits if e.tensor is not None]

    @property
    def functions(self) -> list[Callable[..., torch.Tensor]]:
        """The functions of its edits, in the order of the edits."""
        return [e.source.function for e in self.edits if isinstance(e.source, Function)]

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
    _script: Callable[[Row, int, str | None], str] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def described(self) -> str:
        """The labels as they were written."""
        return ", ".join(f"{k}={v!r}" for k, v in self.labels.items())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The fixed tensors of its edits, in the order of the edits; single numbers are left out."""
        return [e.tensor for e in self.edits if e.tensor is not None]

    @property
    def functions(self) -> list[Callable[..., torch.Tensor]]:
        """The functions of its edits, in the order of the edits."""
        return [e.source.function for e in self.edits if isinstance(e.source, Function)]

    def as_nnsight(self, pair: int = 0, metric: str | None = None) -> str:
        """The row on one pair as a short script of plain nnsight, to check us by, to learn from and to start from.

        The text is a Python module that needs torch and nnsight only. Its ``patched(model)`` takes the nnsight model
        and returns the metric's value, the plan's up to rounding, and the logits ``[pos, vocab]``. What cannot be
        written down is passed: ``tensors=row.tensors`` (those of more than a few numbers),
        ``functions=row.functions``, the same of edited worlds, and ``metric=p.metrics[0]`` where it is a function of
        yours; the text says so. Noise is drawn again by its seed.

        Write it to a file and import that: nnsight reads the source of a trace from its file, so ``exec`` does not do,
        and it reads a file once in a session, so that every script needs a name of its own.

        Args:
            pair: Number of the pair; positions and tokens are those of its prompts.
            metric: Name of the metric to compute; the first one otherwise.

        Raises:
            RecipeError: The recording has not ended, there is no such pair or metric, the pair lacks the row's
                positions, or the row holds what no script is written for.
        """
        if self._script is None:
            raise RecipeError(
                f"row({self.described}) has no script yet: the recording has not ended. "
                "Ask for it after the `with tp.patching(...)` block."
            )
        return self._script(self, pair, metric)

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
