"""Prompts for the two tasks that the toy models were trained on.

Indirect object identification (Wang et al. 2022): two people are named, one of them, the subject, is named again,
and the sentence asks for the other one, the indirect object. Induction (Olsson et al. 2022): random words repeat, and
the next word is the one that followed the last word before.

Every word is a single token of the toys' tokenizers, so clean and corrupted prompts always have equal token counts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NAMES: tuple[str, ...] = tuple(
    """
    John Mary Tom James Dan Sean Mark Alice Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew
    Anthony Steven Paul Andrew Kevin Brian George Edward Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen
    Larry Justin Scott Brandon Benjamin Samuel Frank Jennifer Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy
    Sandra Ashley Kimberly Emily Michelle Laura Rebecca Rachel Anna Amy Kate Jane Emma
    """.split()  # noqa: SIM905
)
PLACES: tuple[str, ...] = ("store", "park", "school", "office", "garden", "house", "station", "restaurant")
OBJECTS: tuple[str, ...] = ("bag", "drink", "book", "ring", "ball", "snack", "key", "letter")
WORDS: tuple[str, ...] = tuple(
    """
    apple river stone cloud tiger piano candle bridge forest silver window dragon pepper rocket island butter hammer
    orange mirror basket summer winter castle pencil rabbit coffee engine flower guitar helmet jacket lemon monkey
    needle ocean planet queen ribbon salad tunnel valley wagon yellow zebra anchor button carpet doctor
    """.split()  # noqa: SIM905
)

_SENTENCES = (
    "When {first} and {second} went to the {place}, {S} gave the {object} to",
    "Then, {first} and {second} had a long day at the {place}. {S} gave a {object} to",
    "After {first} and {second} left the {place}, {S} decided to give a {object} to",
    "While {first} and {second} were working at the {place}, {S} handed the {object} to",
    "Yesterday {first} and {second} met at the {place}, and {S} offered a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {S} passed it to",
)
ABBA: tuple[str, ...] = tuple(text.replace("{first}", "{IO}").replace("{second}", "{S}") for text in _SENTENCES)
BABA: tuple[str, ...] = tuple(text.replace("{first}", "{S}").replace("{second}", "{IO}") for text in _SENTENCES)
TEMPLATES: tuple[str, ...] = ABBA + BABA

_MAX_PREFIX = 8
_SEGMENT = (5, 12)
_MIN_LENGTH = _MAX_PREFIX + _SEGMENT[1] + 2  # the answer must have followed the prompt's last word once before


@dataclass(frozen=True)
class Prompts:
    """Pairs of prompts, with the word that continues the clean one and the word to compare it with.

    Attributes:
        clean: Prompts whose continuation is `answer`.
        corrupted: The same prompts, word by word, with the task's information changed.
        answer: One word for each pair, with a leading space.
        wrong: One word for each pair, with a leading space; the continuation of the corrupted prompt where it has one.
    """

    clean: list[str]
    corrupted: list[str]
    answer: list[str]
    wrong: list[str]

    def __len__(self) -> int:
        return len(self.clean)


def ioi(
    n: int,
    *,
    seed: int = 0,
    templates: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    corruption: Literal["swap", "abc"] = "swap",
) -> Prompts:
    """Random prompts of the indirect object task; `answer` is the indirect object, `wrong` the subject.

    Args:
        n: How many pairs.
        seed: The same seed gives the same pairs.
        templates: Texts with the fields `{IO}`, `{S}`, `{place}` and `{object}`; default `TEMPLATES`. Prompts of one
            template all have the same number of tokens, prompts of different templates may not.
        names: First names to draw from; default `NAMES`.
        corruption: `"swap"` replaces the second mention of the subject by the indirect object: one token differs, and
            the roles of `answer` and `wrong` are exchanged. `"abc"` puts three other names in the three places, so
            that no name is right.

    Raises:
        ValueError: Unknown corruption, no template, or too few names.
    """
    if corruption not in ("swap", "abc"):
        raise ValueError(f"corruption is {corruption!r}; use 'swap' or 'abc'.")
    texts = TEMPLATES if templates is None else tuple(templates)
    pool = NAMES if names is None else tuple(names)
    needed = 2 if corruption == "swap" else 5
    if not texts:
        raise ValueError("templates is empty; give at least one, or leave it out to use all of TEMPLATES.")
    if len(set(pool)) < needed:
        raise ValueError(
            f"names has {len(set(pool))} different names, corruption={corruption!r} needs {needed}; give more names."
        )
    rng = random.Random(f"ioi {seed}")
    prompts = Prompts([], [], [], [])
    for _ in range(n):
        before, s2, after = rng.choice(texts).rpartition("{S}")
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        if corruption == "swap":
            io, s = rng.sample(pool, 2)
            first, second, third = io, s, io
        else:
            io, s, first, second, third = rng.sample(pool, 5)
        prompts.clean.append((before + s2 + after).format(IO=io, S=s, place=place, object=thing))
        prompts.corrupted.append(
            (before + "{S2}" + after).format(IO=first, S=second, S2=third, place=place, object=thing)
        )
        prompts.answer.append(f" {io}")
        prompts.wrong.append(f" {s}")
    return prompts


def induction(n: int, *, seed: int = 0, length: int = 32, words: Sequence[str] | None = None) -> Prompts:
    """Random prompts in which a segment of words repeats; `answer` is the word that continues the repetition.

    A prompt is a prefix of 0 to 8 words and then a segment of 5 to 12 words, all different, over and over until there
    are `length - 1` words. The segment's length varies from prompt to prompt, so that position alone does not solve the
    task. In the corrupted prompt every earlier occurrence of the answer is `wrong`, a word which is not in the clean
    prompt.

    Args:
        n: How many pairs.
        seed: The same seed gives the same pairs.
        length: Words in a prompt together with its answer, at least 22.
        words: Words to draw from, at least 21; default `WORDS`.

    Raises:
        ValueError: `length` or the number of different words is too small.
    """
    pool = WORDS if words is None else tuple(dict.fromkeys(words))
    if length < _MIN_LENGTH:
        raise ValueError(
            f"length is {length}; at least {_MIN_LENGTH} is needed for the longest segment to begin its repetition."
        )
    if len(pool) <= _MAX_PREFIX + _SEGMENT[1]:
        raise ValueError(
            f"words has {len(pool)} different words; at least {_MAX_PREFIX + _SEGMENT[1] + 1} are needed, "
            "so that no word of a prompt is used twice."
        )
    rng = random.Random(f"induction {seed}")
    prompts = Prompts([], [], [], [])
    for _ in range(n):
        prefix_length, segment_length = rng.randint(0, _MAX_PREFIX), rng.randint(*_SEGMENT)
        wrong, *drawn = rng.sample(pool, 1 + prefix_length + segment_length)
        prefix, segment = drawn[:prefix_length], drawn[prefix_length:]
        repeated = length - 1 - prefix_length
        clean = prefix + [segment[i % segment_length] for i in range(repeated)]
        answer = segment[repeated % segment_length]
        prompts.clean.append(" ".join(clean))
        prompts.corrupted.append(" ".join(wrong if word == answer else word for word in clean))
        prompts.answer.append(f" {answer}")
        prompts.wrong.append(f" {wrong}")
    return prompts
