"""Saved arrays by name: parts of some pairs each, in memory or in safetensors files that are memory-mapped."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tracepatch.errors import ResultError
from tracepatch.plan import Group

LARGE = 1 << 30  # bytes of saved arrays beyond which they are kept on disk


@dataclass
class Part:
    """What was saved of some pairs of one length, in memory or in a file that is read when it is needed.

    Attributes:
        pairs: Their numbers.
        length: Tokens of each prompt.
        agreeing: Before which position the two worlds of each pair are the same; ``None`` where that is not proved.
        arrays: By name, as ``contractions`` takes them; empty where they are in a file.
        file: Where they are, if not in memory.
    """

    pairs: tuple[int, ...]
    length: int
    agreeing: torch.Tensor | None
    arrays: dict[Any, torch.Tensor] = field(default_factory=dict)
    file: Path | None = None

    @property
    def known(self) -> dict[Any, torch.Tensor]:
        """The arrays by name, as ``contractions`` takes them."""
        return self.arrays if self.file is None else Lazy(self.file)

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        if self.file is not None:
            return self.file.stat().st_size
        return sum(t.numel() * t.element_size() for t in self.arrays.values())

    def rows(self, name: Any) -> Iterator[tuple[int, torch.Tensor]]:
        """An array by pair."""
        return zip(self.pairs, self.known[name], strict=True)

    def keep(self, file: Path) -> None:
        """Writes the arrays, and lets go of them."""
        self.write(file)
        self.file, self.arrays = file, {}

    def write(self, file: Path) -> None:
        """Writes the arrays."""
        if self.file is not None:
            shutil.copy(self.file, file)
        else:
            save_file({_word(key): value.contiguous() for key, value in self.arrays.items()}, file)


class Lazy(dict[Any, torch.Tensor]):
    """Arrays of a safetensors file, each read from the memory-mapped file when it is asked for."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def __missing__(self, key: Any) -> torch.Tensor:
        with safe_open(self._file, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(_word(key))
        return found


def _word(key: Any) -> str:
    return "/".join(map(str, key))


class Parts(list[Part]):
    """A list whose end can be waited for."""


class Store:
    """Keeps parts as they come: in memory, or in files of a folder that appears when all are there."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and folder.exists():
            raise ResultError(f"{folder} is there already: choose another folder, or remove it.")
        self._target = folder
        self.working = None if folder is None else _beside(folder)
        self.parts = Parts()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None and self.working is not None:
            shutil.rmtree(self.working, ignore_errors=True)

    def add(self, group: Group, agreeing: torch.Tensor | None, arrays: dict[Any, torch.Tensor]) -> None:
        """One more part, written at once where there is a folder, or where memory would not do."""
        part = Part(tuple(group.pairs), group.length, agreeing, arrays)
        self.parts.append(part)
        if self.working is None and sum(p.bytes for p in self.parts) > LARGE:
            self.working = Path(tempfile.mkdtemp(prefix="tracepatch-gradients-"))
            weakref.finalize(self.parts, shutil.rmtree, self.working, ignore_errors=True)
        if self.working is None:
            return
        for number, one in enumerate(self.parts):
            if one.file is None:
                one.keep(self.working / part_name(number))

    def finish(self, write_index: Callable[[Path], None]) -> None:
        """Makes the folder appear, with its index."""
        if self._target is None or self.working is None:
            return
        write_index(self.working)
        self.working.replace(self._target)
        for part in self.parts:
            assert part.file is not None
            part.file = self._target / part.file.name


def _beside(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05}.safetensors"
