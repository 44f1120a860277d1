"""What a traced run left behind, in memory or as a file of its own: whole, or not there at all.

A file is safetensors: numbers as they are, and no code. It is written under a temporary name and then renamed, and
holds a hash of its contents, so that a process may die, or a bit turn, at any moment: what is not whole is measured
again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tracepatch.errors import MeasurementWarning, RecipeError

FORMAT = 1
ENDING = ".safetensors"
ABANDONED = 600  # seconds after which a temporary file is nobody's


@dataclass(frozen=True)
class Entry:
    """What a traced run left behind.

    Attributes:
        tensors: Numbers by name, on the CPU.
        facts: What else there is, in text.
    """

    tensors: dict[str, torch.Tensor]
    facts: dict[str, str]


class Store(Protocol):
    """Where entries are kept, by the identity of what they depend on."""

    def __contains__(self, key: str) -> bool: ...

    def take(self, key: str) -> Entry | None:
        """What is kept under a key, if it is whole."""

    def keep(self, key: str, entry: Entry) -> None:
        """Keeps an entry."""

    def drop(self, key: str) -> None:
        """Keeps it no more."""


class Memory(dict[str, Entry]):
    """Entries of a run that was interrupted in this process."""

    def take(self, key: str) -> Entry | None:
        """What is kept under a key."""
        return self.get(key)

    def keep(self, key: str, entry: Entry) -> None:
        """Keeps an entry."""
        self[key] = entry

    def drop(self, key: str) -> None:
        """Keeps it no more."""
        self.pop(key, None)


class Directory:
    """Entries as files of one folder, which several recipes, models and processes may share.

    Args:
        path: The folder; it is made when the first entry is.

    Raises:
        RecipeError: Nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._complained = False
        there = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise RecipeError(
                f"directory={str(self.path)!r}: {there} is a file. Pass a folder for the finished batches; it need not "
                "exist yet."
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise RecipeError(
                f"directory={str(self.path)!r}: nothing can be written in {there}. Pass a folder of yours."
            )

    def open(self) -> None:
        """Makes the folder, and removes what writers left that were ended long ago.

        Raises:
            RecipeError: Nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk may still be read from
                raise RecipeError(
                    f"directory={str(self.path)!r}: nothing can be written there ({error.strerror}). Pass a folder of "
                    "yours."
                ) from error
        for left in self.path.glob(f".*{ENDING}.part"):
            try:
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
            except OSError:  # another process was faster
                continue

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def take(self, key: str) -> Entry | None:
        """What is kept under a key; where the file is not whole, a warning and nothing."""
        path = self._file(key)
        try:
            with safe_open(path, "pt") as file:
                facts = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            whole = facts.pop("hash", None) == _hash(key, tensors, facts)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            whole = False
        if whole:
            return Entry(tensors, facts)
        warnings.warn(
            f"{path} is damaged or was cut off: its batch is measured again, and the file replaced.",
            MeasurementWarning,
            stacklevel=2,
        )
        return None

    def keep(self, key: str, entry: Entry) -> None:
        """Writes an entry; where that fails, one warning, and the run goes on."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in entry.tensors.items()}
        content = save(tensors, {**entry.facts, "hash": _hash(key, tensors, entry.facts)})
        partial = self.path / f".{key}.{os.getpid()}.{secrets.token_hex(4)}{ENDING}.part"
        try:
            with partial.open("xb") as file:
                write(file, content)
            partial.replace(self._file(key))
        except OSError as error:
            if not self._complained:
                warnings.warn(
                    f"{self.path} cannot be written to ({error.strerror or error}). The run goes on, but what is not "
                    "in that folder is lost when this process ends.",
                    MeasurementWarning,
                    stacklevel=2,
                )
            self._complained = True
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def drop(self, key: str) -> None:
        """Keeps it no more, if it may be removed."""
        with suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{ENDING}"

    def __str__(self) -> str:
        return str(self.path)


def write(file: Any, content: bytes) -> None:
    """Writes bytes through to the disk."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _hash(key: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> str:
    """Of everything in a file, and of the name it must have."""
    digest = hashlib.sha256(json.dumps([FORMAT, key, sorted(facts.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
