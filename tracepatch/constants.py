"""Fixed tensors, compared by what they hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Constant:
    """A fixed tensor, compared by its contents.

    Attributes:
        tensor: In float32 or wider.
        digest: Of its contents.
        name: What it is called in words.
    """

    tensor: torch.Tensor = field(compare=False)
    digest: str
    name: str = field(default="", compare=False)

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "") -> Constant:
        """The constant with these contents, in float32 or wider."""
        kept = tensor.detach().cpu()
        kept = kept.clone() if kept.dtype == torch.float64 else kept.to(torch.float32, copy=True)
        content = str(tuple(kept.shape)).encode() + kept.contiguous().numpy().tobytes()
        return cls(kept, hashlib.blake2b(content, digest_size=12).hexdigest(), name)

    def __str__(self) -> str:
        shape = tuple(self.tensor.shape)
        return self.name or (f"{self.tensor.item():g}" if not shape else f"tensor{list(shape)}")
