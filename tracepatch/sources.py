"""What an edit writes: values of worlds, numbers, tensors, and sums of them.

A *world* is a forward whose values are known. On the right-hand side of an edit a world gives its pristine values,
those of an unpatched run; sums and multiples of them are values too.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from tracepatch.constants import Constant
from tracepatch.errors import RecipeError
from tracepatch.portions import Dictionary, Features, Portion, Subspace
from tracepatch.sites import Site

WorldName: TypeAlias = str  # "clean", "corrupted", or the name of an edited world
_COMPUTED = "To compute with the numbers of a run, write a function: lambda live, clean, corrupted: …"
OTHER: dict[str, WorldName] = {"clean": "corrupted", "corrupted": "clean"}


class Source:
    """Something an edit can write: supports ``a + b``, ``a - b``, ``-a`` and multiples by numbers."""

    __slots__ = ()
    __array_priority__ = 1000  # numpy arrays and tensors on the left leave the arithmetic to us
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch functions cannot be applied to what has no numbers yet; operators leave the arithmetic to us."""
        if getattr(torch.Tensor, getattr(function, "__name__", ""), None) is function:
            return NotImplemented
        raise RecipeError(
            f"torch.{getattr(function, '__name__', function)} has nothing to compute with yet. {_COMPUTED}"
        )

    def terms(self) -> Sum:
        """The source as a sum."""
        raise TypeError(type(self).__name__)

    def __add__(self, other: Any) -> Sum:
        return _plus(self.terms(), as_source(other).terms())

    def __radd__(self, other: Any) -> Sum:
        return _plus(as_source(other).terms(), self.terms())

    def __sub__(self, other: Any) -> Sum:
        return _plus(self.terms(), _times(as_source(other).terms(), -1.0))

    def __rsub__(self, other: Any) -> Sum:
        return _plus(as_source(other).terms(), _times(self.terms(), -1.0))

    def __neg__(self) -> Sum:
        return _times(self.terms(), -1.0)

    def __mul__(self, factor: Any) -> Sum:
        return _times(self.terms(), _number(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Sum:
        number = _number(divisor)
        if number == 0:
            raise RecipeError("A value cannot be divided by 0.")
        return _times(self.terms(), 1.0 / number)

    def __iadd__(self, other: Any) -> Increment:  # += on a site records an addition to the live value
        return Increment(self, as_source(other))

    def __isub__(self, other: Any) -> Increment:  # as above
        return Increment(self, -as_source(other))

    def __imul__(self, factor: Any) -> Sum:
        raise RecipeError(
            "`site *= factor` would multiply the pristine value, not the row's live one. To set it, write "
            "`site = factor * value`."
        )

    __itruediv__ = __imul__

    def along(self, vectors: Any) -> Source:
        """Its projection onto the span of vectors ``[k, d]``, or of one ``[d]``: all else of the site stays live.

        ``p.corrupted.resid_pre[5, -1] = p.clean.resid_pre[5, -1].along(v)``. Vectors that span everything give the
        source itself.

        Raises:
            RecipeError: They are no vectors, or are all 0.
        """
        span = Subspace.of(vectors)
        return self if span.whole else Part(self, span)

    def features(self, dictionary: Dictionary, chosen: Any) -> Part:
        """Some features of it in a dictionary: all others, and what the dictionary does not explain, stay live.

        Args:
            dictionary: Which.
            chosen: An integer, slice, list or mask.

        Raises:
            RecipeError: They are no features.
        """
        return Part(self, dictionary.portion(chosen))


@dataclass(frozen=True, slots=True)
class Value(Source):
    """The pristine value of a site in a world."""

    world: WorldName
    site: Site

    def terms(self) -> Sum:
        """The value alone."""
        return Sum(((1.0, self),), None)

    def __str__(self) -> str:
        return f"{self.world}.{self.site}"


@dataclass(frozen=True, slots=True)
class Noise(Source):
    """Gaussian noise: drawn anew for each pair and site, and the same each time for the same seed.

    Attributes:
        scale: Its standard deviation, in the activation's own unit, or in that of ``unit``.
        seed: Which draw.
        unit: What the scale is a multiple of the standard deviation of; ``None`` where it is a number as it stands.
        draws: How often it is drawn, in rows of their own.
        number: Which of these draws it is.
    """

    scale: float
    seed: int
    unit: Value | None = None
    draws: int = 1
    number: int = 0

    @classmethod
    def of(cls, scale: Any, seed: Any, unit: Value | None = None, draws: int = 1) -> Noise:
        """Noise as a user asks for it.

        Raises:
            RecipeError: It is not a standard deviation, or not a seed.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise RecipeError(f"gaussian takes a standard deviation, 0 or more, not {scale!r}.")
        return cls(float(scale), require_seed("gaussian", seed), unit, require_draws("gaussian", draws))

    def terms(self) -> Sum:
        """The noise alone."""
        return Sum((), None, ((1.0, self),))

    def draw(self, place: str, shape: Sequence[int]) -> torch.Tensor:
        """The noise of a shape at a place (any text), in float32; without its unit where it has one."""
        generator = torch.Generator().manual_seed(self.seed_at(place, shape))
        return self.scale * torch.randn(tuple(shape), generator=generator)

    def seed_at(self, place: str, shape: Sequence[int]) -> int:
        """The generator's seed for a shape at a place."""
        seed = f"{self.seed}" if self.number == 0 else f"{self.seed}, draw {self.number}"
        digest = hashlib.blake2b(f"{seed} {place} {tuple(shape)}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def __str__(self) -> str:
        of = "" if self.unit is None else f" × std of {self.unit}"
        drawn = f", draw {self.number} of 0 to {self.draws - 1}" if self.draws > 1 else ""
        return f"gaussian({self.scale:g}{of}, seed={self.seed}{drawn})"


def require_seed(who: str, seed: Any) -> int:
    """A seed as a user gives it.

    Raises:
        RecipeError: It is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise RecipeError(f"The seed of {who} is an integer, not {seed!r}.")
    return seed


def require_draws(who: str, draws: Any) -> int:
    """A number of draws as a user gives it.

    Raises:
        RecipeError: It is no number of them.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise RecipeError(f"draws of {who} is how often to draw, 1 or more, not {draws!r}.")
    return draws


@dataclass(frozen=True, slots=True)
class Sum(Source):
    """Multiples of worlds' values, plus a constant, plus multiples of noise."""

    values: tuple[tuple[float, Value], ...]
    constant: Constant | None
    noise: tuple[tuple[float, Noise], ...] = ()

    def terms(self) -> Sum:
        """Itself."""
        return self

    def __str__(self) -> str:
        parts = [f"{one}" if factor == 1 else f"{factor:g}·{one}" for factor, one in (*self.values, *self.noise)]
        return " + ".join(parts + ([str(self.constant)] if self.constant or not parts else [])).replace("+ -1·", "- ")


@dataclass(frozen=True, slots=True)
class Part(Source):
    """What is written of a source: a portion of the live value becomes as it is there, the rest stays."""

    source: Source
    portion: Portion

    def terms(self) -> Sum:
        """Nothing: it depends on the live value."""
        raise RecipeError(f"{self} replaces a portion of the live value, so it cannot be added to other values.")

    def along(self, vectors: Any) -> Source:
        """Refused: it is a portion already."""
        raise RecipeError(f"{self} is a portion already; give one subspace, or one set of features.")

    def features(self, dictionary: Dictionary, chosen: Any) -> Part:
        """Refused, as ``along``."""
        raise RecipeError(f"{self} is a portion already; give one subspace, or one set of features.")

    def __str__(self) -> str:
        if isinstance(self.portion, Features) and self.portion.clamp is not None:
            return f"{self.portion}"
        return (
            f"{self.source} {self.portion}"
            if isinstance(self.portion, Subspace)
            else f"{self.source} in {self.portion}"
        )


@dataclass(frozen=True, slots=True)
class Function(Source):
    """What a function makes of the site's values: ``f(live)``, or ``f(live, clean, corrupted)``.

    Each argument is ``[row, …]`` with the dims that indexing the site gives; ``live`` is the row's own value, after its
    earlier edits. ``corrupted`` is ``None`` where the pairs have no corrupted prompts.
    """

    function: Callable[..., torch.Tensor]
    arguments: int

    def terms(self) -> Sum:
        """Nothing: what a function returns is not known before the run."""
        raise RecipeError(f"{self} cannot be added to other values: do the arithmetic inside the function.")

    def __str__(self) -> str:
        return f"{getattr(self.function, '__name__', type(self.function).__name__)}(…)"


@dataclass(frozen=True, slots=True)
class Increment:
    """What ``site += source`` hands to the site: an addition to its live value."""

    target: Source
    source: Source


def summed(source: Source) -> Sum | None:
    """What is written, wholly or in part, as a sum; ``None`` of a function, which is not known before the run."""
    if isinstance(source, Part):
        return source.source.terms()
    return None if isinstance(source, Function) else source.terms()


def noises(source: Source) -> bool:
    """Whether a source is drawn anew for each pair."""
    total = None if isinstance(source, Value) else summed(source)
    return total is not None and bool(total.noise)


def vector(values: Any, name: str = "", *, unit: bool = False) -> Sum:
    """A fixed vector with a name, as a source: ``p.clean.resid_pre[6, :] += 4 * tp.vector(v, "refusal")``.

    Without a name a tensor may stand in an edit as it is.

    Args:
        values: ``[d]``, or whatever fits the site.
        name: What rows and plans call it.
        unit: Whether to divide it by its length, so that a coefficient is in the activation's unit.

    Raises:
        RecipeError: It is no tensor of finite numbers, or of length 0.
    """
    constant = as_source(values).terms().constant
    assert constant is not None
    tensor = constant.tensor
    if unit:
        length = tensor.norm()
        if not length:
            raise RecipeError(f"The vector {name or 'given'} is 0 and has no direction.")
        tensor = tensor / length
    return Sum((), Constant.of(tensor, name))


def as_source(given: Any) -> Source:
    """A right-hand side as a source: another source, a number, a tensor or array of numbers, or a function.

    Raises:
        RecipeError: It is something else, or not finite.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, Features):
        if given.clamp is None:
            raise RecipeError(f"{given} says which features, not what they become: value.features(…), or clamp(…).")
        return Part(Sum((), Constant.of(torch.zeros(()))), given)
    if isinstance(given, Increment):
        raise RecipeError("The result of += is no value; write `site += source` as a statement of its own.")
    if callable(given) and not isinstance(given, torch.Tensor):
        return Function(given, _arguments(given))
    if isinstance(given, (bool, str)) or given is None:
        raise RecipeError(f"{given!r} cannot be written at a site: pass a world's value, a number or a tensor.")
    try:
        tensor = given if isinstance(given, torch.Tensor) else torch.as_tensor(np.asarray(given, dtype=float))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{given!r} cannot be written at a site: pass a world's value, a number or a tensor."
        ) from error
    if tensor.layout != torch.strided:
        raise RecipeError(f"A tensor of layout {tensor.layout} cannot be written at a site: pass tensor.to_dense().")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise RecipeError(f"A tensor of dtype {tensor.dtype} cannot be written at a site: pass real numbers.")
    if not torch.isfinite(tensor).all():
        raise RecipeError("The tensor to be written holds NaN or inf.")
    return Sum((), Constant.of(tensor))


def _arguments(function: Callable[..., Any]) -> int:
    """Whether a function takes the live value alone, or the clean and corrupted ones too."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        taken = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.default is p.empty]
    except ValueError:  # a builtin such as torch.relu
        return 1
    if len(taken) not in (1, 3):
        raise RecipeError(
            f"{function!r} takes {len(taken)} values. A function that is written at a site takes the live value, or "
            "the live, the clean and the corrupted one."
        )
    return len(taken)


def _number(factor: Any) -> float:
    if isinstance(factor, (torch.Tensor, np.ndarray)) and factor.ndim == 0:
        factor = factor.item()
    if isinstance(factor, bool) or not isinstance(factor, (int, float, np.integer, np.floating)):
        raise RecipeError(f"Values of worlds are multiplied by numbers, not by {type(factor).__name__}. {_COMPUTED}")
    if not math.isfinite(factor):
        raise RecipeError(f"{factor} times a value is not finite.")
    return float(factor)


def _plus(a: Sum, b: Sum) -> Sum:
    values, noise = a.values + b.values, a.noise + b.noise
    if a.constant is None or b.constant is None:
        return Sum(values, a.constant or b.constant, noise)
    try:
        total = a.constant.tensor + b.constant.tensor
    except RuntimeError as error:
        shapes = [list(c.tensor.shape) for c in (a.constant, b.constant)]
        raise RecipeError(f"Tensors of the shapes {shapes[0]} and {shapes[1]} cannot be added.") from error
    names = [str(c) for c in (a.constant, b.constant)] if a.constant.name or b.constant.name else []
    return Sum(values, Constant.of(total, " + ".join(names)), noise)


def _times(a: Sum, factor: float) -> Sum:
    fixed = a.constant
    name = "" if fixed is None or not fixed.name else fixed.name if factor == 1 else f"{factor:g}·{fixed.name}"
    constant = None if fixed is None else Constant.of(fixed.tensor * factor, name)
    return Sum(
        tuple((factor * f, value) for f, value in a.values), constant, tuple((factor * f, n) for f, n in a.noise)
    )
