"""What a user passes as prompts, answers and alignments, as plain tuples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from tracepatch.alignment import WAYS, Way
from tracepatch.errors import PromptError, listing
from tracepatch.tokens import Answer, Prompt

Prompts: TypeAlias = str | Sequence[Prompt] | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Maps: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""Per pair, (clean position, corrupted position) as written."""
SEPARATOR = "|"  # between several answers in one cell of a table


def prompts_of(given: Any, side: str) -> tuple[Prompt, ...]:
    """Prompts, each a string or a tuple of token ids.

    Raises:
        PromptError: There are none, or some are neither; all of them are listed.
    """
    given = _plain(given)
    prompts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if prompts and all(map(_is_id, prompts)):
        prompts = [prompts]
    if not prompts:
        raise PromptError(
            f"There are no {side} prompts: the list is empty. If words were filtered with tp.one_token, none of them "
            "was one token here: take others, or pass after= where the tokenizer writes a first word otherwise."
        )
    found: list[Prompt] = []
    bad: list[str] = []
    for i, prompt in enumerate(map(_plain, prompts)):
        if isinstance(prompt, str):
            found.append(prompt)
        elif isinstance(prompt, (list, tuple)) and all(map(_is_id, prompt)):
            found.append(tuple(int(t) for t in prompt))
        else:
            bad.append(f"prompt {i}: {prompt!r}")
    if bad:
        raise PromptError(f"{side} prompts are strings, or lists of token ids.\n{listing(bad)}")
    return tuple(found)


def answers_of(given: Any, count: int, side: str) -> tuple[tuple[Answer, ...], ...]:
    """Per pair its answers, each a string or a token id.

    Raises:
        PromptError: Some are neither; all of them are listed.
    """
    given = _plain(given)
    if given is None:
        return ((),) * count
    if isinstance(given, str) or _is_id(given):
        return ((given,),) * count
    if not isinstance(given, Iterable):
        raise PromptError(f"{side} takes strings or token ids, not {given!r}.")
    plain = [_plain(entry) for entry in given]
    entries = [tuple(e) if isinstance(e, (list, tuple)) else (e,) for e in plain]
    bad = [f"pair {i}: {t!r}" for i, e in enumerate(entries) for t in e if not isinstance(t, str) and not _is_id(t)]
    if bad:
        raise PromptError(f"{side} takes strings or token ids.\n{listing(bad)}")
    return tuple(tuple(t if isinstance(t, str) else int(t) for t in entry) for entry in entries)


def aligned_by(given: Any, count: int) -> Way | Maps | None:
    """How pairs are aligned: in one of the ways that have a name, or by a map for each pair.

    Raises:
        PromptError: It is something else.
    """
    if given is None or given in WAYS:
        return given  # type: ignore[no-any-return]  # what it is has just been seen
    if not isinstance(given, str) and isinstance(given, Iterable):
        entries = [given] * count if isinstance(given, Mapping) else list(given)
        maps = [_links(entry) for entry in entries]
        if len(maps) == count and None not in maps:
            return tuple(links for links in maps if links is not None)
        if None not in maps:
            raise PromptError(f"align has {len(maps)} maps for {count} pairs: one for each, or one for all.")
    raise PromptError(
        f"align is one of {', '.join(map(repr, WAYS))}, or for each pair a map of clean to corrupted positions such as "
        f"{{0: 0, 1: 2}}, not {given!r}."
    )


def _links(entry: Any) -> tuple[tuple[int, int], ...] | None:
    """A map of positions as pairs of integers; ``None`` if it is something else."""
    items = list(entry.items()) if isinstance(entry, Mapping) else entry
    if isinstance(items, str) or not isinstance(items, Iterable):
        return None
    links = [tuple(link) if isinstance(link, (tuple, list)) else link for link in items]
    if not all(isinstance(link, tuple) and len(link) == 2 and all(map(_is_id, link)) for link in links):
        return None
    return tuple((int(a), int(b)) for a, b in links)


def column(cells: Any) -> list[Any]:
    """A column of a table, cell by cell."""
    return list(cells) if isinstance(cells, Iterable) and not isinstance(cells, str) else [cells]


def missing(cell: Any) -> bool:
    """Whether nothing stands in a cell."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def several(cell: Any) -> list[Any]:
    """The answers in a cell."""
    cell = _plain(cell)
    return cell.split(SEPARATOR) if isinstance(cell, str) else list(cell) if isinstance(cell, (list, tuple)) else [cell]


def _plain(given: Any) -> Any:
    """Arrays, tensors and series as lists, their scalars as numbers."""
    return given.tolist() if hasattr(given, "tolist") else given


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool)
