"""The calls of one forward: what went into every module and came out, and every softmax attention as it ran."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Side: TypeAlias = Literal["input", "output"]
Key: TypeAlias = int | str | None

PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")
POSITIONS = 7  # of the probe's prompts: unlike any other size, so that shapes tell dims apart
ENCODED = 5  # of what an encoder reads meanwhile


@dataclass(frozen=True)
class Place:
    """Where a value passes by: the input or output of a module.

    Attributes:
        path: The module.
        side: Its input or its output.
        key: Index or name of the value among several; ``None`` where there is only one.
        order: When it passes by; values must be taken in this order. Two calls inside one forward may share a number's
            whole part.
        scale: The component is this multiple of what passes by.
        flat: Rows and positions are one dim there.
        operation: The call inside the module's own forward, as nnsight's ``.source`` names it, with a dot before the
            name of a call inside that call; empty for the module.
    """

    path: str
    side: Side
    key: Key = None
    order: float = 0
    scale: float = 1.0
    flat: bool = False
    operation: str = ""

    def __str__(self) -> str:
        key = "" if self.key is None else f"[{self.key!r}]"
        inside = f".source.{self.operation.replace('.', '.source.')}" if self.operation else ""
        return f"{self.path}{inside}.{self.side}{key}" + ("" if self.scale == 1 else f" × {self.scale:.4g}")


@dataclass
class Call:
    """One call of a module, with clones of the tensors that went in and out."""

    name: str
    module: nn.Module
    start: int
    inputs: list[tuple[Key, torch.Tensor]]
    outputs: list[tuple[Key, torch.Tensor]] = field(default_factory=list)
    end: int = 0
    raw: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def entering(self) -> torch.Tensor | None:
        """The first tensor that went in."""
        return self.inputs[0][1] if self.inputs else None

    @property
    def leaving(self) -> torch.Tensor | None:
        """The first tensor that came out."""
        return self.outputs[0][1] if self.outputs else None

    def under(self, path: str) -> bool:
        """Whether the module is at or below a path."""
        return self.name == path or self.name.startswith(path + ".")

    def place(self, side: Side, rows: int) -> Place:
        """Where the first tensor passes by; ``rows`` is rows × positions of the probe."""
        key, tensor = (self.inputs if side == "input" else self.outputs)[0]
        key = None if side == "input" and key == 0 else key
        return Place(self.name, side, key, self.start if side == "input" else self.end, flat=_flat(tensor, rows))


@dataclass(frozen=True)
class Attended:
    """One softmax attention, seen as it was computed: who called it, q, k and v, the pattern, and pattern · v.

    Keys and values may have been repeated over their query groups. A fused call shows no pattern.
    """

    name: str
    heads: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    z: torch.Tensor
    pattern: torch.Tensor | None
    began: int
    ended: int


class _AttentionWatch(TorchFunctionMode):
    """Sees every softmax attention, whichever code computes it: step by step or in one fused call."""

    def __init__(self, stack: list[Call], rows: int, clock: Iterator[int]) -> None:
        super().__init__()
        self.stack, self.rows, self.clock, self.found = stack, rows, clock, []
        self.pattern: torch.Size | None = None
        self.product: tuple[torch.Tensor, torch.Tensor] | None = None
        self.began = 0

    found: list[Attended]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.began = next(self.clock)
            self._keep(given["query"], given["key"], given["value"], result, None)
        elif name == "softmax" and result.ndim >= 3 and result.shape[-2] == POSITIONS:
            self.pattern = result.shape
        elif name in PRODUCTS:
            given = kwargs or {}
            left, right = (*args, *(given[n] for n in ("batch1", "batch2", "other", "mat2") if n in given))[-2:]
            self._multiplied(left, right, result)
        return result

    def _multiplied(self, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> None:
        if left.ndim < 3 or right.ndim < 3:
            return
        if self.pattern is None:
            self.product, self.began = (left, right.transpose(-1, -2)), next(self.clock)
        # An attention sink is dropped between the softmax and here, so the last dim may be shorter by one.
        elif left.shape[:-1].numel() == self.pattern[:-1].numel() and right.shape[-2] == left.shape[-1]:
            if self.product is not None:
                self._keep(*self.product, right, result, left)
            self.pattern = self.product = None

    def _keep(self, *tensors: torch.Tensor | None) -> None:
        # Some models have batch and heads in one dim.
        q, k, v, z, pattern = (None if t is None else t.reshape(self.rows, -1, *t.shape[-2:]).clone() for t in tensors)
        assert q is not None and k is not None and v is not None and z is not None  # noqa: PT018  # for mypy
        self.found.append(Attended(self.stack[-1].name, z.shape[1], q, k, v, z, pattern, self.began, next(self.clock)))


def record(model: nn.Module, run: Callable[[], Any], rows: int) -> tuple[list[Call], list[Attended], Any]:
    """One forward: every call of a module in order of its start, every softmax attention, and the output."""
    calls: list[Call] = []
    stack: list[Call] = []
    clock = itertools.count(1)
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [(key, t.detach().clone()) for key, t in (*floats(args), *floats(kwargs))]
            stack.append(Call(name, module, next(clock), inputs, raw=(args, kwargs)))

        return hook

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = stack.pop()
        call.outputs = [(key, t.detach().clone()) for key, t in floats(output)]
        call.end = next(clock)
        calls.append(call)

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    watch = _AttentionWatch(stack, rows, clock)
    try:
        with torch.no_grad(), watch:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda c: c.start), watch.found, output


def floats(value: Any) -> Iterator[tuple[Key, torch.Tensor]]:
    """The activations in what a module takes or returns, each with its index or name."""
    if isinstance(value, torch.Tensor):
        pairs: Iterable[tuple[Key, Any]] = [(None, value)]
    elif isinstance(value, (tuple, list)):
        pairs = enumerate(value)
    elif isinstance(value, Mapping):
        pairs = value.items()
    else:
        pairs = []
    return ((k, v) for k, v in pairs if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1)


def _flat(tensor: torch.Tensor | None, rows: int) -> bool:
    return tensor is not None and tensor.ndim == 2 and len(tensor) == rows
