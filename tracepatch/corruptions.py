"""Corrupted prompts made automatically: tokens replaced one by one, by chance, at the end, or names exchanged.

Each function takes pairs, of which only the clean prompts, answers and spans count, and gives pairs of the same clean
prompts, several for each where there are several corruptions, with the name of each in ``corruption``. Sets are added:
``random_tokens(…) + last_tokens(…)``. ``pairs.both_roles()`` of such a set has each corrupted prompt in the clean role
too. ``tp.by_corruption`` and ``tp.agreement_over`` compare what they show.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from transformers import PreTrainedTokenizerBase

from tracepatch.errors import PromptError, listing
from tracepatch.prompts import Pairs, revised
from tracepatch.spans import Marks, spans_of
from tracepatch.tokens import Prompt, bos_policy, encode_prompt, shown

Kind: TypeAlias = tuple[bool, str]
"""Whether a token begins with a blank, and what it is made of: letters, digits, or other signs."""
Choice: TypeAlias = Callable[[list[int], random.Random], Iterable[tuple[str, list[int]]]]
"""Of the positions that may change: names of corruptions, and the positions that each changes."""
BLANKS: Final = (" ", "▁", "Ġ")


def each_token(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, seed: int = 0, draws: int = 1) -> Pairs:
    """Every token of every prompt replaced in turn, by another of its kind: a pair for each.

    Tokens are of one kind if both or neither begin with a blank, and both are letters, digits or other signs. Special
    tokens stay.

    Args:
        pairs: The clean prompts, with their answers.
        tokenizer: Of the model.
        seed: Of the choice of tokens.
        draws: How many replacements of each token.

    Returns:
        The pairs; a corruption is called after the position that it changes, such as ``token 4``.

    Raises:
        PromptError: A prompt has no token that can be replaced.
    """
    return _replaced(
        pairs, tokenizer, seed, draws, lambda free, rng: ((f"token {position}", [position]) for position in free)
    )


def random_tokens(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, count: int = 3, seed: int = 0, draws: int = 1
) -> Pairs:
    """Some tokens of each prompt, chosen by chance, replaced by others of their kind (see ``each_token``).

    Args:
        pairs: The clean prompts, with their answers.
        tokenizer: Of the model.
        count: How many tokens of each prompt.
        seed: Of the choice of tokens.
        draws: How many corruptions of each prompt.

    Returns:
        The pairs; their corruptions are called ``random``, or ``random, draw 0`` and so on.

    Raises:
        PromptError: A prompt has fewer tokens that can be replaced.
    """
    return _replaced(
        pairs, tokenizer, seed, draws, lambda free, rng: [("random", rng.sample(free, count))], least=count
    )


def last_tokens(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, count: int = 3, seed: int = 0, draws: int = 1
) -> Pairs:
    """The last tokens of each prompt replaced by others of their kind (see ``each_token``).

    Args:
        pairs: The clean prompts, with their answers.
        tokenizer: Of the model.
        count: How many tokens.
        seed: Of the choice of tokens.
        draws: How many corruptions of each prompt.

    Returns:
        The pairs; their corruptions are called ``last 3``, or ``last 3, draw 0`` and so on.

    Raises:
        PromptError: A prompt has fewer tokens that can be replaced.
    """
    return _replaced(pairs, tokenizer, seed, draws, lambda free, rng: [(f"last {count}", free[-count:])], least=count)


def exchanged(pairs: Pairs, one: str, other: str) -> Pairs:
    """The words of two spans exchanged wherever they stand: *John … Mary … John* becomes *Mary … John … Mary*.

    Words may have other numbers of tokens than those that they replace: the pairs are aligned by their spans.

    Args:
        pairs: Clean prompts with spans, as templates make them.
        one: A span.
        other: Another.

    Returns:
        The pairs; their corruption is called after the spans, ``first and second exchanged``.

    Raises:
        PromptError: A prompt is not a text, lacks one of the spans, or has the same words in both.
    """
    texts, marks, bad = [], [], []
    for i, prompt in enumerate(pairs.clean):
        own: Marks = pairs.spans[0][i] if pairs.spans else ()
        places = dict(own)
        if not isinstance(prompt, str) or not {one, other} <= set(places):
            bad.append(f"pair {i}: {shown(prompt)} has the spans {', '.join(places) or 'none'}")
            continue
        here, there = (prompt[slice(*places[name])] for name in (one, other))
        if here == there:
            bad.append(f"pair {i}: both are {here!r} in {shown(prompt)}")
            continue
        text, moved = _swapped(prompt, own, here, there)
        texts.append(text)
        marks.append(moved)
    if bad:
        raise PromptError(
            f"{one} and {other} cannot be exchanged in {len(bad)} of {len(pairs)} prompts.\n{listing(bad)}\nMake the "
            "prompts with tp.Template, or name their spans with tp.Pairs(…, spans=…)."
        )
    names = (f"{one} and {other} exchanged",) * len(pairs)
    spans = pairs.spans[0], tuple(marks)
    return revised(pairs, corrupted=tuple(texts), corruption=names, spans=spans, align="spans")


# ------------------------------------------------------------------------------------------------ tokens


def _replaced(
    pairs: Pairs, tokenizer: PreTrainedTokenizerBase, seed: int, draws: int, choose: Choice, least: int = 1
) -> Pairs:
    """Pairs in whose corrupted prompts chosen tokens are others of their kind.

    Args:
        pairs: The clean prompts.
        tokenizer: Of the model.
        seed: Of all choices.
        draws: How often to choose.
        choose: What to change.
        least: How many positions a prompt must have that may change.
    """
    for what, number in (("draws", draws), ("count", least)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise PromptError(f"{what} is a number, 1 or more, not {number!r}.")
    if pairs.decoder is not None:
        raise PromptError(
            "Tokens are replaced in prompts that the model reads itself; these have a text for a decoder."
        )
    policy, rng = bos_policy(tokenizer, pairs.bos), random.Random(seed)
    kinds, of = _kinds(tokenizer)
    ids = [encode_prompt(tokenizer, prompt, policy) for prompt in pairs.clean]
    free = [[p for p, token in enumerate(own) if token in of and len(kinds[of[token]]) > 1] for own in ids]
    bad = [f"pair {i}: {shown(pairs.clean[i])} has {len(own)}" for i, own in enumerate(free) if len(own) < least]
    if bad:
        raise PromptError(
            f"{least} tokens are to be replaced, and {len(bad)} of {len(pairs)} prompts have fewer that can be.\n"
            f"{listing(bad)}\nAsk for fewer, or leave these prompts out."
        )
    numbers: list[int] = []
    corrupted: list[tuple[int, ...]] = []
    names: list[str] = []
    for i, own in enumerate(ids):
        for draw in range(draws):
            for name, positions in choose(free[i], rng):
                changed = list(own)
                for p in positions:
                    changed[p] = rng.choice([token for token in kinds[of[own[p]]] if token != own[p]])
                numbers.append(i)
                corrupted.append(tuple(changed))
                names.append(name if draws == 1 else f"{name}, draw {draw}")
    own_marks = [
        _in_tokens(tokenizer, pairs.clean[i], ids[i], pairs.spans[0][i]) for i in range(len(ids)) if pairs.spans
    ]
    sides = [(*pairs.spans[:1], own_marks)] if pairs.spans else []
    return revised(
        pairs,
        **{name: tuple(getattr(pairs, name)[i] for i in numbers) for name in ("clean", "answer", "wrong")},
        corrupted=tuple(corrupted),
        corruption=tuple(names),
        spans=tuple(tuple(side[i] for i in numbers) for both in sides for side in both),
        align="spans" if pairs.spans else None,  # as of those whose words are exchanged, to be added to them
        seed=seed,
    )


def _kinds(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[Kind, list[int]], dict[int, Kind]]:
    """The tokens of each kind, and the kind of each token that has one."""
    special = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    kinds: dict[Kind, list[int]] = defaultdict(list)
    for i, token, text in zip(
        ids, tokenizer.convert_ids_to_tokens(ids), tokenizer.batch_decode([[i] for i in ids]), strict=True
    ):
        made_of = "letters" if text.strip().isalpha() else "digits" if text.strip().isdigit() else "signs"
        if text.strip() and text.isprintable() and "\ufffd" not in text:
            kinds[token[:1] in BLANKS, made_of].append(i)
    return kinds, {i: kind for kind, members in kinds.items() for i in members}


def _in_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int], marks: Marks) -> Marks:
    """The spans of a prompt as parts of its tokens."""
    spans, _ = spans_of(tokenizer, prompt, ids, marks)
    return tuple((name, (at[0], at[-1] + 1)) for name, at in spans.items() if at and name in dict(marks))


# ------------------------------------------------------------------------------------------------ words


def _swapped(prompt: str, marks: Marks, one: str, other: str) -> tuple[str, Marks]:
    """A text with two words exchanged wherever they stand, and where its spans stand in it."""
    both = sorted((one, other), key=len, reverse=True)
    found = list(re.finditer(rf"(?<!\w)({'|'.join(map(re.escape, both))})(?!\w)", prompt))
    text, end = "", 0
    for match in found:
        text += prompt[end : match.start()] + (other if match[0] == one else one)
        end = match.end()

    def moved(place: int) -> int:
        before = (match[0] for match in found if match.end() <= place)
        return place + sum((len(other) - len(one)) * (1 if word == one else -1) for word in before)

    return text + prompt[end:], tuple((name, (moved(start), moved(stop))) for name, (start, stop) in marks)
