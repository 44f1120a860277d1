"""Which portion of a live value a source replaces: what lies in a subspace, or some features of a dictionary.

They are declared, not written as functions of a user's, so that a row whose source equals its base is still proved to
be without effect, and a plan can be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from tracepatch.constants import Constant
from tracepatch.errors import RecipeError
from tracepatch.replacing import replaced
from tracepatch.sites import Select, select

Activation: TypeAlias = Literal["relu", "jumprelu", "topk"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "jumprelu", "topk")


@dataclass(frozen=True, slots=True)
class Subspace:
    """The span of some vectors.

    Attributes:
        basis: Orthonormal vectors that span it, ``[k, d]``.
        given: How many vectors it was made of.
    """

    basis: Constant
    given: int

    @classmethod
    def of(cls, vectors: Any) -> Subspace:
        """The span of vectors ``[k, d]``, or of one ``[d]``.

        Raises:
            RecipeError: They are no vectors, hold NaN or inf, or are all 0.
        """
        tensor = _numbers(vectors, "vectors").double()
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        if tensor.ndim != 2 or not tensor.numel():
            raise RecipeError(f"A subspace is given by vectors [k, d], or one [d], not by {list(tensor.shape)}.")
        _, sizes, rows = torch.linalg.svd(tensor, full_matrices=False)
        rank = int((sizes > sizes[0] * max(tensor.shape) * torch.finfo(torch.float32).eps).sum())
        if not rank:
            raise RecipeError("The vectors of a subspace are all 0: they span nothing.")
        return cls(Constant.of(rows[:rank].float()), len(tensor))

    @property
    def width(self) -> int:
        """Numbers of a vector that it speaks of."""
        return int(self.basis.tensor.shape[1])

    @property
    def whole(self) -> bool:
        """Whether it is all there is."""
        return len(self.basis.tensor) == self.width

    @property
    def columns(self) -> tuple[Any, ...]:
        """As ``replacing`` takes it."""
        return "subspace", self.basis.tensor

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """Code of a user's in it."""
        return ()

    def __call__(self, live: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
        """Live values ``[…, d]`` with what lies in it as in a source's."""
        return replaced(self.columns, live, torch.as_tensor(value))

    def __str__(self) -> str:
        count = len(self.basis.tensor)
        return f"along {count} direction{'' if count == 1 else 's'}"


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of an activation, such as those of a sparse autoencoder: encode to them, decode from them.

    Given as functions, or as weights (``Dictionary.of_weights``). Patching a feature leaves what the dictionary does
    not explain as it is: the live value changes by decode(changed features) − decode(its features).

    Attributes:
        encode: ``[cell, d] → [cell, feature]``.
        decode: ``[cell, feature] → [cell, d]``.
        name: What to call it.
        weights: Instead of functions: encoder, its bias, decoder, and what is subtracted before.
        activation: Of the features, where weights are given.
        parameter: Of the activation: a threshold, or how many are active.
    """

    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    name: str = "dictionary"
    weights: tuple[Constant | None, ...] = ()
    activation: Activation = "relu"
    parameter: Constant | int | None = None

    def __post_init__(self) -> None:
        if not self.weights and not (callable(self.encode) and callable(self.decode)):
            raise RecipeError(
                "A dictionary is tp.Dictionary(encode, decode), two functions, or tp.Dictionary.of_weights(…)."
            )

    @classmethod
    def of_weights(
        cls,
        encoder: Any,
        decoder: Any,
        encoder_bias: Any = None,
        pre_bias: Any = None,
        *,
        activation: Activation = "relu",
        threshold: Any = None,
        k: int | None = None,
        name: str = "dictionary",
    ) -> Dictionary:
        """A sparse autoencoder: features are activation((x − pre_bias) @ encoder + encoder_bias).

        The decoder's bias does not matter, as only differences are decoded. Only the chosen features are computed, but
        for ``"topk"``.

        Args:
            encoder: ``[d, feature]``.
            decoder: ``[feature, d]``.
            encoder_bias: ``[feature]``.
            pre_bias: ``[d]``, subtracted before the encoder: the decoder's bias, in many.
            activation: ``"relu"``; ``"jumprelu"``, 0 up to ``threshold``; or ``"topk"``, 0 but for the ``k`` largest.
            threshold: A number, or ``[feature]``.
            k: How many features are active.
            name: What to call it.

        Raises:
            RecipeError: Shapes do not fit, or the activation lacks what it needs.
        """
        given = {"encoder": encoder, "encoder_bias": encoder_bias, "decoder": decoder, "pre_bias": pre_bias}
        tensors = {k: None if v is None else _numbers(v, k) for k, v in given.items()}
        first = tensors["encoder"]
        d, n = first.shape if first is not None and first.ndim == 2 else (-1, -1)
        wanted = {"encoder": [d, n], "encoder_bias": [n], "decoder": [n, d], "pre_bias": [d]}
        wrong = [f"{k} is {list(t.shape)}" for k, t in tensors.items() if t is not None and list(t.shape) != wanted[k]]
        if wrong or d < 0:
            raise RecipeError(
                f"Weights of a dictionary do not fit: {', '.join(wrong)}; encoder is [d, feature], decoder "
                "[feature, d], encoder_bias [feature], pre_bias [d]."
            )
        if activation not in ACTIVATIONS:
            raise RecipeError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}; or pass functions.")
        parameter: Constant | int | None = None
        if activation == "jumprelu":
            if threshold is None or (limit := _numbers(threshold, "threshold")).shape not in ((), (n,)):
                raise RecipeError("jumprelu needs threshold=, a number or one for each feature.")
            parameter = Constant.of(limit)
        elif activation == "topk":
            if not isinstance(k, int) or not 1 <= k <= n:
                raise RecipeError(f"topk needs k=, 1 to {n}, not {k!r}.")
            parameter = k
        constants = tuple(None if t is None else Constant.of(t) for t in tensors.values())
        return cls(None, None, name, constants, activation, parameter)

    def clamp(self, features: Any, values: Any = 0.0) -> Features:
        """Some of its features set to numbers: a source, as in ``p.clean.resid_pre[5, -1] = sae.clamp([3, 17], 0)``.

        Args:
            features: An integer, slice, list or mask.
            values: A number, or one for each of them; 0 switches them off.

        Raises:
            RecipeError: They are no features, or no numbers.
        """
        return Features(self, select(features, "feature"), Constant.of(_numbers(values, "values")))

    def portion(self, features: Any) -> Features:
        """Some of its features: an integer, slice, list or mask.

        Raises:
            RecipeError: They are no features.
        """
        return Features(self, select(features, "feature"))

    @lru_cache(maxsize=64)  # noqa: B019  # a dictionary that is held a little longer
    def count(self, width: int) -> int:
        """How many features it has, tried on made-up vectors of a width.

        Raises:
            RecipeError: It does not take them, or gives back something else.
        """
        if self.weights:
            first = self.weights[0]
            assert first is not None
            if first.tensor.shape[0] != width:
                raise RecipeError(
                    f"{self.name} encodes vectors of {first.tensor.shape[0]}, and is given vectors of {width}."
                )
            return int(first.tensor.shape[1])
        assert self.encode is not None
        assert self.decode is not None
        made_up = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        found = _tried(self.encode, made_up, f"{self.name}: encode")
        back = _tried(self.decode, found, f"{self.name}: decode")
        if found.ndim != 2 or len(found) != 3 or back.shape != made_up.shape:
            raise RecipeError(
                f"{self.name}: encode takes [cell, {width}] to [cell, feature] and decode back; of {[3, width]} they "
                f"made {list(found.shape)} and {list(back.shape)}."
            )
        alone = torch.cat([self.decode(self.encode(made_up[i : i + 1])) for i in range(3)])
        if not torch.allclose(alone, back, atol=1e-4):
            raise RecipeError(f"{self.name} mixes rows: each vector is to be encoded and decoded on its own.")
        return found.shape[1]


@dataclass(frozen=True)
class Features:
    """Some features of a dictionary: those that a source's replace, or that are set to numbers.

    Attributes:
        dictionary: Whose.
        chosen: Which, as written.
        clamp: What they are set to; ``None`` where a source says it.
        count: How many the dictionary has; 0 before it has been tried.
    """

    dictionary: Dictionary
    chosen: Select
    clamp: Constant | None = None
    count: int = 0

    def fitted(self, width: int) -> Features:
        """The same for vectors of a width.

        Raises:
            RecipeError: The dictionary does not take them, or has no such feature.
        """
        count = self.dictionary.count(width)
        picked = self.chosen.resolve(count)
        if not picked:
            raise RecipeError(f"{self.dictionary.name} has {count:,} features, 0 to {count - 1}; not {self.chosen}.")
        shape = () if self.clamp is None else tuple(self.clamp.tensor.shape)
        if shape not in ((), (len(picked),)):
            raise RecipeError(
                f"{len(picked)} features are clamped to {list(shape)} values: give a number, or one each."
            )
        return replace(self, count=count)

    @property
    def columns(self) -> tuple[Any, ...]:
        """As ``replacing`` takes it."""
        of, clamp = self.dictionary, None if self.clamp is None else self.clamp.tensor
        chosen = torch.tensor(self.chosen.resolve(self.count))
        if not of.weights:
            return "functions", of.encode, of.decode, chosen, clamp
        encoder, bias, decoder, before = (None if c is None else c.tensor for c in of.weights)
        parameter = of.parameter.tensor if isinstance(of.parameter, Constant) else of.parameter
        return "weights", encoder, bias, decoder, before, of.activation, parameter, chosen, clamp

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """Code of a user's in it."""
        return tuple(f for f in (self.dictionary.encode, self.dictionary.decode) if f is not None)

    def __call__(self, live: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
        """Live values ``[…, d]`` with these features as in a source's."""
        return replaced(self.columns, live, torch.as_tensor(value))

    def __str__(self) -> str:
        clamped = "" if self.clamp is None else f" = {self.clamp}"
        return f"{self.dictionary.name}[{self.chosen}]{clamped}"


Portion: TypeAlias = Subspace | Features


def _numbers(given: Any, what: str) -> torch.Tensor:
    """A tensor of finite real numbers on the CPU.

    Raises:
        RecipeError: It is something else.
    """
    try:
        tensor = given if isinstance(given, torch.Tensor) else torch.as_tensor(np.asarray(given, dtype=float))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} are numbers, not {given!r}.") from error
    if tensor.is_complex() or tensor.dtype == torch.bool or not torch.isfinite(tensor).all():
        raise RecipeError(f"{what} are real numbers, and some are not, or are NaN or inf.")
    return tensor.detach().cpu()


def _tried(function: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor, what: str) -> torch.Tensor:
    try:
        found = function(given)
    except Exception as error:
        raise RecipeError(f"{what} fails on {list(given.shape)}: {type(error).__name__}: {error}") from error
    if not isinstance(found, torch.Tensor):
        raise RecipeError(f"{what} gives a {type(found).__name__}, and not a tensor.")
    return found
