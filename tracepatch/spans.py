"""Named spans of prompts: from characters to the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from tracepatch.alignment import END, Alignment, Spans, Way, explicit, linked, paired
from tracepatch.errors import PromptError, listing
from tracepatch.tokens import Prompt, shown

Range: TypeAlias = tuple[int, int]
Marks: TypeAlias = tuple[tuple[str, Range], ...]
"""The spans of one prompt: their names, and where they start and end, in characters; in tokens where it is ids."""


def marked(given: Any, prompts: Sequence[Prompt], others: Sequence[Prompt] | None) -> tuple[tuple[Marks, ...], ...]:
    """The spans that a user names, for the clean and the corrupted prompts, one entry a pair.

    Args:
        given: Name → for every pair, or for each one entry: a text that stands in the prompt once, ``(start, end)``, or
            two of these, for the clean and the corrupted prompt.
        prompts: The clean prompts.
        others: The corrupted prompts, if there are any.

    Raises:
        PromptError: A span is not there, or not said; all of them are listed.
    """
    sides = [prompts] if others is None else [prompts, others]
    found: list[list[list[tuple[str, Range]]]] = [[[] for _ in prompts] for _ in sides]
    bad: list[str] = []
    for name, entries in dict(given).items():
        if not isinstance(name, str) or not name.isidentifier():
            raise PromptError(f"spans: {name!r} is no name: use a word, as for a variable.")
        several = [entries] * len(prompts) if isinstance(entries, str) or _is_range(entries) else list(entries)
        if len(several) != len(prompts):
            raise PromptError(f"spans: {name!r} has {len(several)} entries for {len(prompts)} pairs.")
        for i, entry in enumerate(several):
            both = [entry, entry] if isinstance(entry, str) or _is_range(entry) else list(entry)
            for side, of_side, world, what in zip(sides, found, ("clean", "corrupted"), both, strict=False):
                place = _place(what, side[i])
                if isinstance(place, str):
                    bad.append(f"pair {i}, {name} in the {world} prompt: {place}")
                else:
                    of_side[i].append((name, place))
    if bad:
        raise PromptError(
            f"{len(bad)} spans are not in their prompts.\n{listing(bad)}\nA span is a text that stands there once, or "
            "(start, end) in characters; of prompts that differ in it, (clean, corrupted)."
        )
    return tuple(tuple(tuple(marks) for marks in side) for side in found)


def aligned(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[Prompt]],
    ids: Sequence[Sequence[tuple[int, ...]]],
    marks: tuple[tuple[Marks, ...], ...],
    align: Way | tuple[Sequence[tuple[int, int]], ...] | None,
) -> tuple[tuple[Alignment, ...], tuple[str, ...]]:
    """Which positions of each pair's prompts correspond and where its spans stand; and why some cannot be aligned.

    Args:
        tokenizer: Of the model.
        texts: The clean and the corrupted prompts, as written.
        ids: Their tokens.
        marks: Their spans; empty where there are none.
        align: How to align them; ``None``: position by position.
    """
    found: list[Alignment] = []
    bad: list[str] = []
    for i, (clean, *others) in enumerate(zip(*ids, strict=True)):
        corrupted = others[0] if others else clean
        own = [side[i] for side in marks] or [()] * len(texts)
        told = [spans_of(tokenizer, t[i], s[i], m) for t, s, m in zip(texts, ids, own, strict=True)]
        spans, lengths, links = (told[0][0], told[-1][0]), (len(clean), len(corrupted)), None
        if align is not None and others:
            of = align if isinstance(align, str) else align[i]
            links = linked(of, clean, corrupted, spans) if isinstance(of, str) else explicit(of, lengths)
        why = [*told[0][1], *(told[1][1] if others else ()), *([links] if isinstance(links, str) else [])]
        if why:
            bad.append(f"pair {i}: {', '.join(why)}   {shown(texts[0][i], 40)} / {shown(texts[-1][i], 40)}")
        found.append(paired(lengths, None if isinstance(links, str) else links, spans))
    return tuple(found), tuple(bad)


def spans_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int], marks: Marks
) -> tuple[Spans, list[str]]:
    """The tokens of a prompt's spans, and what is wrong with those that have none.

    A token belongs to a span if it stands for one of its characters; blanks in front do not count.

    Args:
        tokenizer: Of the model.
        prompt: As written.
        ids: Its tokens, with what stands before every prompt.
        marks: Its spans.
    """
    if not marks:
        return {}, []
    found: dict[str, tuple[int, ...]] = {}
    if not isinstance(prompt, str):
        found = {name: tuple(range(*bounds)) for name, bounds in marks}
    else:
        offsets = characters(tokenizer, prompt)
        if offsets is None:
            return {}, [f"{type(tokenizer).__name__} does not say which characters its tokens stand for"]
        first = len(ids) - len(offsets)
        for name, (start, end) in marks:
            at = [first + i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            while len(at) > 1 and not tokenizer.decode([ids[at[0]]]).strip():
                del at[0]
            found[name] = tuple(at)
    empty = [f"the span {name} has no tokens in {shown(prompt)}" for name, at in found.items() if not at]
    if END not in found:
        found[END] = (len(ids) - 1,)
    return found, empty


def characters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Range] | None:
    """Where the characters start and end that each token of a text stands for; ``None`` if that cannot be told.

    By the tokenizer's own offsets, or, where it has none, by what its tokens decode to.
    """
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if "offset_mapping" in told:
        return [(int(start), int(end)) for start, end in told["offset_mapping"]]
    ids = list(told["input_ids"])
    read = [_decoded(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    if read and read[-1] == text and all(map(text.startswith, read)):
        ends = [len(part) for part in read]
        # A token that is part of a character stands for the one that it completes.
        after = [next(end for end in ends[i:] if end > start) for i, start in enumerate([0, *ends[:-1]])]
        return list(zip([0, *ends[:-1]], after, strict=True))
    found: list[Range] = []
    for one in ids:
        piece, start = _decoded(tokenizer, [one]).strip(), found[-1][1] if found else 0
        at = text.lower().find(piece.lower(), start)
        if at < 0 or text[start:at].strip():
            return None
        found.append((at, at + len(piece)))
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, without a character that is not complete."""
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


def _place(what: Any, prompt: Prompt) -> Range | str:
    """Where a span stands, or why that is not known."""
    if isinstance(what, str) and isinstance(prompt, str):
        count = prompt.count(what)
        if count != 1 or not what:
            return f"{what!r} stands {count} times in {shown(prompt)}" if what else "an empty text"
        return prompt.index(what), prompt.index(what) + len(what)
    if _is_range(what) and 0 <= what[0] < what[1] <= len(prompt):
        return int(what[0]), int(what[1])
    unit = "characters" if isinstance(prompt, str) else "tokens"
    return f"{what!r} is no part of {shown(prompt)}, which has {len(prompt)} {unit}"


def _is_range(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2 and all(type(bound) is int for bound in entry)
