"""Numbers and indices as one would write them in code."""

from __future__ import annotations

from typing import Any


def number(value: float) -> str:
    """A number as short as it can be written exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def along(indices: tuple[int, ...], scalar: bool, size: int) -> str:
    """Indices along a dim as one would write them: a number, a slice, or a list."""
    if scalar:
        return str(indices[0])
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step < 1 or (step > 1 and len(indices) < 3) or indices != tuple(range(indices[0], indices[-1] + 1, step)):
        return str(list(indices))
    stop = "" if indices[-1] + step >= size else str(indices[-1] + 1)
    return f"{indices[0] or ''}:{stop}" + (f":{step}" if step > 1 else "")


def joined(rows: str, parts: list[str]) -> str:
    """An index; several lists pick every combination."""
    lists = [i for i, part in enumerate(parts) if part.startswith("[")]
    for behind, i in enumerate(reversed(lists)):
        wrapped = (f"{'[' * behind}{n}{']' * behind}" for n in parts[i][1:-1].split(", "))
        parts = [*parts[:i], f"[{', '.join(wrapped)}]", *parts[i + 1 :]]
    return ", ".join([rows, *parts])


def plus(before: str, factor: float, term: str) -> str:
    """A sum with one more term, of which only the factor's sign is written here."""
    if not before:
        return f"-{term}" if factor < 0 else term
    return f"{before} {'-' if factor < 0 else '+'} {term}"


def literal(value: Any) -> str:
    """Nested lists of numbers as code."""
    return f"[{', '.join(map(literal, value))}]" if isinstance(value, list) else number(value)
