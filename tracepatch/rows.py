"""Rows as they are recorded: edits of one base world, with the labels that place their result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import xarray as xr

from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.portions import Portion
from tracepatch.sites import UNITS, Select, Site, component
from tracepatch.sources import Function, Part, Source, WorldName, summed

Label: TypeAlias = int | float | str
# Names that results use themselves.
RESERVED = frozenset(
    (
        *("pair", "metric", "model", "row", "rows", "depth", "status"),
        *("effect", "normalized", "value", "base", "clean", "corrupted"),
        *(
            "token",
            "corrupted_token",
            "answer",
            "wrong",
            "clean_prompt",
            "corrupted_prompt",
            "decoder_prompt",
            "corruption",
        ),
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
        total = summed(self.source)
        constant = None if total is None else total.constant
        return None if constant is None or not constant.tensor.shape else constant.tensor


class Edits:
    """What is edited, and what of it a script cannot write down."""

    __slots__ = ()
    edits: list[Edit]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The fixed tensors of its edits, in the order of the edits; single numbers are left out."""
        return [e.tensor for e in self.edits if e.tensor is not None]

    @property
    def portions(self) -> list[Portion]:
        """Which portions of live values its edits replace, in their order; those that replace all are left out."""
        return [e.source.portion for e in self.edits if isinstance(e.source, Part)]

    @property
    def functions(self) -> list[Callable[..., torch.Tensor]]:
        """The functions of its edits, in the order of the edits."""
        return [e.source.function for e in self.edits if isinstance(e.source, Function)]


@dataclass(slots=True)
class EditedWorld(Edits):
    """A clean or corrupted run with standing edits, which is a world of its own: a base and a source of values.

    Attributes:
        name: What it is called.
        of: The world that it edits.
        root: The pristine world below all edited ones: its prompts.
        edits: What always happens in it, in the order of recording.
        used: Whether a row or another world has used it, after which it cannot change.
        origin: The world that it is a further draw of; empty for one that was recorded.
        draw: Which draw of it.
    """

    name: WorldName
    of: WorldName
    root: WorldName
    edits: list[Edit] = field(default_factory=list)
    used: bool = False
    origin: WorldName = ""
    draw: int = 0

    def __str__(self) -> str:
        return f"{self.name} is {self.of} with " + "; ".join(map(str, self.edits))


def standing(world: WorldName, edited: Mapping[WorldName, EditedWorld]) -> list[tuple[WorldName, Edit]]:
    """The edits that always happen in a world, those of the worlds below it first, each with the world it is of."""
    here = edited.get(world)
    return [] if here is None else [*standing(here.of, edited), *((world, edit) for edit in here.edits)]


@dataclass(slots=True, eq=False)
class Save:
    """A live value that a row keeps, and the handle to it: after the run ``values`` is the labelled array.

    Attributes:
        world: The base of the row.
        site: Where.
        name: The variable that it becomes in ``p.saved``.
        dims: Of ``values``, behind ``pair``.
        reduce: What is made of the value ``[row, …]`` before it is kept.
        labelled: Makes the array; there once the row has run.
    """

    world: WorldName
    site: Site
    name: str
    dims: tuple[str, ...]
    reduce: Callable[..., Any] | None = None
    labelled: Callable[[], xr.DataArray] | None = field(default=None, repr=False)

    @property
    def values(self) -> xr.DataArray:
        """The value after the row's edits, ``[pair, …]``; ``tracepatch.saves.labelled`` describes it.

        Raises:
            RecipeError: The row has not run yet.
        """
        if self.labelled is None:
            raise RecipeError(f"{self} has no values yet: they are there after p.run().")
        return self.labelled()

    def __str__(self) -> str:
        if self.reduce is None:
            return f"save {self.world}.{self.site}"
        return f"save {getattr(self.reduce, '__name__', type(self.reduce).__name__)}({self.world}.{self.site})"


@dataclass(slots=True)
class Row(Edits):
    """One patched forward for every pair: a base world, its edits, and the labels that place it in the result."""

    number: int
    labels: dict[str, Label]
    base: WorldName = "clean"
    edits: list[Edit] = field(default_factory=list)
    renormalize: bool = False
    raw: Callable[[Any], Any] | None = None  # the body of a trace, instead of edits
    saves: list[Save] = field(default_factory=list)
    _script: Callable[[Row, int, str | None], str] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def sites(self) -> list[Site]:
        """What its labels speak of: the sites that it edits, or, where it only looks, those that it saves."""
        return [e.site for e in self.edits] or [s.site for s in self.saves]

    @property
    def described(self) -> str:
        """The labels as they were written."""
        return ", ".join(f"{k}={v!r}" for k, v in self.labels.items())

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
        if self.raw is not None:
            return f"row({self.described}): trace({called(self.raw)}) of {self.base}"
        return f"row({self.described}): " + "; ".join(_done(self))


def _done(row: Row) -> list[str]:
    return [f"{row.base}.{e}" for e in row.edits] + [str(s) for s in row.saves]


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
    split = (site for site in row.sites if component(site.component).unit == name)
    counts = [architecture.units(site.component, site.layer) for site in split]
    return label + counts[0] if counts else label


def require_label(row: Row, name: str, label: Label, architecture: Architecture, sides: Sequence[Side]) -> None:
    """Refuses a label that none of the row's edits touches, or, in a row without edits, nothing that it saves.

    Raises:
        RecipeError: The label contradicts the edits.
    """
    if row.raw is not None:  # what it touches is not known
        return
    if name == "layer":
        touched = any(label in (site.layer, site.layer - len(architecture)) for site in row.sites)
    elif name == "component":
        touched = any(site.component == label for site in row.sites)
    elif name in ("pos", "dest", "src"):
        along = [site for site in row.sites if name == "pos" or name in component(site.component).index]
        touched = any(_stands_at(site.picked(name), label, side) for site in along for side in sides)
    elif name == "span":
        touched = any(str(site.picked(dim)) == label for site in row.sites for dim in ("pos", "src"))
    elif name in UNITS:
        split = [site for site in row.sites if component(site.component).unit == name]
        touched = any(_selects(s.unit, label, architecture.units(s.component, s.layer)) for s in split)
    else:
        return
    if not touched:
        what = "edits" if row.edits else "saves"
        raise RecipeError(
            f"The label {name}={label!r} contradicts the row's {what}, none of which touches it: "
            + "; ".join(_done(row)[:3])
        )


def require_separate(what: str, edits: Sequence[Edit]) -> None:
    """Refuses head_out beside attn_out_scale: what a head writes is taken with the live scale of the norm after it.

    Args:
        what: Whose edits they are.
        edits: Of a row and the world that it edits.

    Raises:
        RecipeError: Both are edited in one layer.
    """
    names = {(e.site.component, e.site.layer) for e in edits}
    both = [layer for name, layer in names if name == "head_out" and ("attn_out_scale", layer) in names]
    if both:
        raise RecipeError(
            f"{what}: head_out and attn_out_scale of layer {both[0]} cannot be edited in one row, as what a head "
            "writes depends on that scale. Edit z instead of head_out."
        )


def require_apart(what: str, edits: Sequence[Edit], architecture: Architecture) -> None:
    """Refuses an edit of what a module takes or gives inside the span of another edit, where both claim one place.

    Args:
        what: Whose edits they are.
        edits: Of a row and the world that it edits.
        architecture: Of the model.

    Raises:
        RecipeError: The order of the two is not that of the forward.
    """
    modules = [e.site for e in edits if component(e.site.component).module]
    for site in modules:
        moment = architecture.modules.tap(site.component).place.order
        for other in (e.site for e in edits if not component(e.site.component).module):
            first, last = architecture.span(other.component, other.layer)
            # resid_mid is written at its first place and belongs to the last.
            inside = first < moment < last or (other.component == "resid_mid" and first == moment)
            if inside:
                raise RecipeError(
                    f"{what}: {other} and {site} cannot be edited in one row: {other.component} acts "
                    "from before to after that module. Edit them in rows of their own, or edit modules alone."
                )


def require_fresh(what: str, edits: Sequence[Edit], taken: Sequence[Site], architecture: Architecture) -> None:
    """Refuses to take a component's value where a module around it is edited after the value has passed by.

    Args:
        what: Who takes it.
        edits: What is edited there.
        taken: Whose values are saved, or written elsewhere.
        architecture: Of the model.

    Raises:
        RecipeError: The value would be the one before the edit.
    """
    modules = [e.site for e in edits if component(e.site.component).module]
    for site in taken if modules else ():
        since = architecture.span(site.component, site.layer)[0]
        until = architecture.settled(site.component, site.layer)
        late = [m for m in modules if since < architecture.modules.tap(m.component).place.order <= until]
        if late:
            raise RecipeError(
                f"{what} takes {site}, which has passed by when {late[0].component} is edited. Take that module's "
                f"output instead, or edit {site.component} itself."
            )


def _stands_at(picked: Select, label: Any, side: Side) -> bool:
    if picked.items is not None and not picked.span and label in picked.items:
        return True
    found, length = picked.on(side) or (), side.length
    return isinstance(label, int) and -length <= label < length and label % length in found


def _selects(picked: Select, label: Any, length: int) -> bool:
    if picked.items is not None and label in picked.items:
        return True
    found = picked.resolve(length) or ()
    return isinstance(label, int) and -length <= label < length and label % length in found
