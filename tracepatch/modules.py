"""What every module takes and gives: which of it holds one vector a position, so that it can be read and patched.

A forward calls hundreds of modules. Seen at all are those that it calls exactly once. Whether what passes by has rows
and positions, in that order, is not read off shapes alone: the prompts are run once more in reverse order and with
another last token, and the values must follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import nn

from tracepatch.calls import ENCODED, POSITIONS, Call, Place, Side, floats
from tracepatch.errors import ComponentError
from tracepatch.sites import SIDES

Passed: TypeAlias = tuple[str, Side]


@dataclass(frozen=True)
class Tap:
    """A module's input or output that can be patched.

    Attributes:
        place: Where it passes by.
        layer: The layer that it belongs to; 0 before the stack, the number of layers after it.
        width: The size of its vectors.
    """

    place: Place
    layer: int
    width: int


@dataclass
class Seen:
    """What passed by in one forward.

    Attributes:
        counts: How often each module was called.
        shapes: Of the first activation that each took and gave.
        values: Those activations, where they have rows and positions ``[row, pos, width]``.
    """

    counts: Counter[str] = field(default_factory=Counter)
    shapes: dict[Passed, list[int]] = field(default_factory=dict)
    values: dict[Passed, torch.Tensor] = field(default_factory=dict)


def see(model: nn.Module, run: Callable[[], Any], rows: int) -> Seen:
    """One forward of ``rows`` prompts of the probe, module by module."""
    seen = Seen()

    def keep(name: str, side: Side, value: Any) -> None:
        tensor = next((t for _, t in floats(value)), None)
        if tensor is not None:
            seen.shapes[name, side] = list(tensor.shape)
            vectors = _vectors(tensor, rows)
            if vectors is not None:
                seen.values[name, side] = vectors.detach().clone()

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.counts[name] += 1
            keep(name, "input", [*args, *kwargs.values()])

        return hook

    def after(name: str) -> Any:
        return lambda _, args, output: keep(name, "output", output)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _vectors(tensor: torch.Tensor, rows: int) -> torch.Tensor | None:
    """The tensor as ``[row, pos, width]``, if it has that many rows and positions and nothing else."""
    if tensor.ndim == 2 and len(tensor) == rows * POSITIONS:
        tensor = tensor.reshape(rows, POSITIONS, -1)
    return tensor if tensor.ndim == 3 and tuple(tensor.shape[:2]) == (rows, POSITIONS) else None


class Modules:
    """What every module takes and gives in one model."""

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        stack: tuple[str, int],
        rows: int,
        plain: Seen,
        changed: Seen,
        causal: bool,
        tolerance: float,
    ) -> None:
        """Judges what a few forwards showed.

        Args:
            model: The model.
            calls: The recorded forward, with attention computed step by step.
            stack: Path of the list of blocks, and how many there are.
            rows: Prompts of the probe.
            plain: What passed by in a forward as patched runs have it: only some positions' logits, the model's own
                attention.
            changed: The same for the prompts in reverse order, each with another last token.
            causal: Whether that token moves nothing before it.
            tolerance: Relative error that rounding may cause.
        """
        self.name = type(model).__name__
        self._paths = [name for name, _ in model.named_modules() if name]
        self._taps: dict[str, Tap] = {}
        self._reasons: dict[str, str] = {}
        once = {c.name: c for c in calls}
        stepwise = Counter(c.name for c in calls)
        ends = [once[f"{stack[0]}.{i}"].end for i in range(stack[1])]
        before = slice(None, -1) if causal else slice(None)
        for path in self._paths:
            for side in SIDES:
                name, passed = f"{path}.{side}", (path, side)
                why = _why_not(passed, stepwise[path], plain, rows)
                if not why:
                    own, other = plain.values[passed], changed.values.get(passed)
                    if other is None or not _follows(own[:, before], other.flip(0)[:, before], tolerance):
                        why = "its values do not follow the prompts row by row and position by position"
                if why:
                    self._reasons[name] = why
                    continue
                place = once[path].place(side, rows * POSITIONS)
                within = _layer(path, stack[0])
                layer = sum(end < place.order for end in ends) if within is None else within
                self._taps[name] = Tap(place, layer, plain.values[passed].shape[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """What can be patched, in the order of the model's modules."""
        return tuple(self._taps)

    def __contains__(self, name: str) -> bool:
        return name in self._taps

    def tap(self, name: str) -> Tap:
        """A module's input or output, by its path with ``.input`` or ``.output``.

        Raises:
            ComponentError: There is no such module, or it cannot be patched.
        """
        if name not in self._taps:
            raise ComponentError(self.why_not(name))
        return self._taps[name]

    def refuse(self, name: str, why: str) -> None:
        """Takes something from the offer."""
        self._taps.pop(name, None)
        self._reasons[name] = why

    def refuse_all(self, why: str) -> None:
        """Takes everything from the offer."""
        for name in self.names:
            self.refuse(name, why)

    def why_not(self, name: str) -> str:
        """Why something is not offered, in a sentence or two; empty if it is."""
        if name in self._taps:
            return ""
        path, _, side = name.rpartition(".")
        if name in self._reasons:
            return f"The {side} of {path} cannot be patched in this {self.name}: {self._reasons[name]}."
        close = get_close_matches(path, self._paths, 3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Its modules are those of {self.name}'s printout."
        return f"This {self.name} has no module {path!r}. {hint}"


def _why_not(passed: Passed, stepwise: int, plain: Seen, rows: int) -> str:
    path, side = passed
    count = plain.counts[path]
    if not count:
        only = " unless attention is computed step by step" if stepwise else ""
        return f"a forward does not call it{only}"
    if count > 1:
        return f"a forward calls it {count} times"
    if stepwise != 1:
        return "how often it is called depends on how attention is computed"
    shape = plain.shapes.get(passed)
    if shape is None:
        return f"no activation is among {'its arguments' if side == 'input' else 'what it returns'}"
    if passed in plain.values:
        return ""
    if len(shape) == 3 and shape[0] == rows and shape[1] == ENCODED:
        return (
            "it runs over what the encoder reads, and positions are the decoder's; cross_attn_out is what comes of it"
        )
    if len(shape) == 3 and shape[0] == rows and shape[1] < POSITIONS:
        return "it is given only the positions that metrics read; patch the logits, or a module before it"
    return f"what passes by is {shape} for {rows} prompts of {POSITIONS} tokens, not [row, pos, width]"


def _follows(own: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return own.shape == other.shape and bool((own - other).abs().max() <= tolerance * (1 + own.abs().max()))


def _layer(path: str, stack: str) -> int | None:
    """The layer that a path lies in."""
    number = path.removeprefix(stack + ".").split(".")[0] if path.startswith(stack + ".") else ""
    return int(number) if number.isdigit() else None
