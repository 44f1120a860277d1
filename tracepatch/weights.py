"""Where the weights of a module are: with it, nowhere but in their shapes, or brought whenever they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tracepatch.errors import ModelError


def weightless(module: torch.nn.Module) -> bool:
    """Whether some parameters of a module are shapes only, on the meta device, and nothing brings their values."""
    here = (part for part in module.modules() if bringer_of(part) is None)
    return any(p.is_meta for part in here for p in part.parameters(recurse=False))


def brought(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that accelerate brings from elsewhere whenever they are needed, by name, with their values."""
    found = {}
    for path, part in module.named_modules():
        bringer = bringer_of(part)
        for name, _ in part.named_parameters(recurse=False) if bringer is not None else ():
            found[f"{path}.{name}"] = bringer.weights_map[name]
    return found


def untied(module: torch.nn.Module) -> list[str]:
    """The tied parameters that accelerate should bring from elsewhere and cannot: it keeps them under one name only.

    It notices no sooner than in a forward, with a ``KeyError``.
    """
    parts, found = dict(module.named_modules()), []
    for path in getattr(module, "all_tied_weights_keys", None) or ():
        part, _, name = path.rpartition(".")
        bringer = bringer_of(parts[part]) if part in parts else None
        if bringer is not None and name not in bringer.weights_map:
            found.append(path)
    return found


def bringer_of(part: torch.nn.Module) -> Any:
    """What brings a module's own parameters whenever it is called, where ``device_map`` left them elsewhere."""
    hook = getattr(part, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """The module with parameters that are not differentiated by, so that nothing is kept for their sake."""
    changed = [p for p in module.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def require_dtype(dtype: Any) -> None:
    """Refuses a word that names no dtype of weights.

    Raises:
        ModelError: It does not.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"{dtype!r} is no dtype; there are float32, bfloat16, float16, float64 and 'auto'.")
