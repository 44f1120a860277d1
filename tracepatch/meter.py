"""What a run took, as it was seen: tokens in layers, and the peak of an accelerator's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tracepatch.architecture import Architecture
from tracepatch.calls import floats
from tracepatch.models import Model, device_of, module_of
from tracepatch.weights import weightless


class Meter:
    """What passes by while a run goes on.

    Attributes:
        cells: Tokens that were computed in layers, one for each token and layer; ``None`` where they cannot be seen.
    """

    def __init__(self, model: Model) -> None:
        device = device_of(model)
        self.cells: int | None = None
        self._device = device if device.type == "cuda" and not weightless(module_of(model)) else None
        self._before = 0
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int | None:
        """Bytes beside what was there before, at the peak; ``None`` where an allocator does not tell."""
        return None if self._device is None else torch.cuda.max_memory_allocated(self._device) - self._before


@contextmanager
def metered(model: Model, architecture: Architecture) -> Iterator[Meter]:
    """Watches the layers of a model: a layer's tokens are those that its first branch is given."""
    module, found = module_of(model), Meter(model)
    inside = [[s.path for s in layer.sublayers if s.path != layer.path] for layer in architecture.layers]
    handles: list[Any] = []
    if all(inside) and not weightless(module):
        found.cells = 0
        handles = [
            module.get_submodule(first).register_forward_pre_hook(_counting(found), with_kwargs=True)
            for first, *_ in inside
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _counting(meter: Meter) -> Callable[..., None]:
    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = next((tensor for _, tensor in (*floats(args), *floats(kwargs))), None)
        if stream is not None and meter.cells is not None:
            meter.cells += stream.numel() // stream.shape[-1]

    return count
