"""Templates: sentences with slots, whose words are named spans of the prompts that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, TypeAlias

from tracepatch.alignment import END
from tracepatch.errors import PromptError, listing
from tracepatch.prompts import Pairs, revised
from tracepatch.spans import Marks
from tracepatch.tokens import Answer

Words: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Filled:
    """A prompt that a template made.

    Attributes:
        text: The prompt.
        marks: Its spans: name, and where it starts and ends, in characters.
    """

    text: str
    marks: Marks

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Template:
    """A text with slots: ``"When {first} and {second} went to the {place}, {subject} gave the {thing} to"``.

    What fills a slot is a span of the prompt, with the slot's name: it follows the words to whatever tokens a model
    makes of them. ``{verb:gave}`` is a slot that is filled with *gave* unless something else is given, and a way to
    name a part of the sentence that never changes. A slot that stands there twice makes two spans, ``name`` and
    ``name_2``. ``end``, the last token, is a span of every prompt.

    Attributes:
        text: The text.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            fields = [part for part in Formatter().parse(self.text) if part[1] is not None]
        except ValueError as error:
            raise PromptError(
                f"{self.text!r} is no template: {error}. A brace that stands for itself is doubled."
            ) from error
        bad = [
            f"{{{name}}}"
            for _, name, spec, kind in fields
            if not str(name).isidentifier() or kind or "{" in (spec or "")
        ]
        if bad:
            raise PromptError(
                f"{self.text!r}: {', '.join(bad)} names no slot. A slot is a word in braces, {{place}}, or with what "
                "fills it otherwise, {place:store}."
            )
        spans = [name for name, _ in self._spans()]
        twice = sorted({name for name in spans if spans.count(name) > 1} | ({END} & set(spans)))
        if twice:
            raise PromptError(f"{self.text!r}: the span {twice[0]!r} is there already. Call the slot something else.")

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the slots, in order."""
        return tuple(dict.fromkeys(slot for _, slot in self._spans()))

    @property
    def defaults(self) -> dict[str, str]:
        """What fills slots unless something else is given."""
        return {name: spec for _, name, spec, _ in Formatter().parse(self.text) if name is not None and spec}

    def fill(self, **words: str) -> Filled:
        """The prompt with these words in its slots, and where they stand.

        A slot that is filled with an empty text makes no span.

        Raises:
            PromptError: A slot has no words, or there is no such slot; all of them are named.
        """
        given = {**self.defaults, **words}
        missing = [slot for slot in self.slots if slot not in given]
        unknown = [name for name in words if name not in self.slots]
        bad = [name for name, word in words.items() if not isinstance(word, str)]
        if missing or unknown or bad:
            what = [f"nothing is given for {name}" for name in missing]
            what += [f"there is no slot {name}" for name in unknown]
            what += [f"{name} is filled with {given[name]!r}, which is no text" for name in bad if name not in unknown]
            raise PromptError(
                f"{self.text!r} cannot be filled.\n{listing(what)}\nIts slots are {', '.join(self.slots)}."
            )
        text, marks, spans = "", [], iter(self._spans())
        for literal, name, _, _ in Formatter().parse(self.text):
            text += literal
            if name is None:
                continue
            span, _ = next(spans)
            if given[name]:
                marks.append((span, (len(text), len(text) + len(given[name]))))
            text += given[name]
        return Filled(text, tuple(marks))

    def pairs(
        self,
        clean: Words | Sequence[Words],
        corrupted: Words | Sequence[Words] | None = None,
        answer: Answer | Sequence[Answer] | Sequence[Sequence[Answer]] | None = None,
        wrong: Answer | Sequence[Answer] | Sequence[Sequence[Answer]] | None = None,
        *,
        align: Any = "spans",
        **options: Any,
    ) -> Pairs:
        """Pairs of prompts of this template, with its slots as spans.

        Args:
            clean: Per pair, the words of the slots; one mapping makes one pair.
            corrupted: Per pair, those that are different in the corrupted prompt; one mapping serves every pair.
            answer: As for ``tp.Pairs``; a text with slots, such as ``" {second}"``, is filled with the clean words.
            wrong: The same.
            align: Which positions correspond, as for ``tp.Pairs``: span by span otherwise, so that the words of a slot
                may differ in their number of tokens.
            options: As for ``tp.Pairs``.

        Raises:
            PromptError: Slots are not filled, or there are not as many corrupted as clean prompts.
        """
        rows = [clean] if isinstance(clean, Mapping) else list(clean)
        changes: list[Words] = [corrupted] * len(rows) if isinstance(corrupted, Mapping) else list(corrupted or ())
        if corrupted is not None and len(changes) != len(rows):
            raise PromptError(
                f"Every pair needs its words on both sides; there are {len(rows)} clean, {len(changes)} corrupted."
            )
        filled = [[self.fill(**row) for row in rows]]
        if corrupted is not None:
            filled.append([self.fill(**{**row, **changed}) for row, changed in zip(rows, changes, strict=True)])
        texts = [[one.text for one in side] for side in filled]
        answers = [self._answers(given, rows) for given in (answer, wrong)]
        found = Pairs(texts[0], None if corrupted is None else texts[1], *answers, align=align, **options)
        return revised(found, spans=tuple(tuple(one.marks for one in side) for side in filled))

    def _answers(self, given: Any, rows: Sequence[Words]) -> Any:
        """Answers of each pair, where they are written with slots."""
        if not isinstance(given, str) or "{" not in given:
            return given
        return [
            Template(given).fill(**{k: v for k, v in {**self.defaults, **row}.items() if f"{{{k}}}" in given}).text
            for row in rows
        ]

    def _spans(self) -> list[tuple[str, str]]:
        """(span, slot) in the order of the text."""
        seen: Counter[str] = Counter()
        found = []
        for _, name, _, _ in Formatter().parse(self.text):
            if name is not None:
                seen[name] += 1
                found.append((name if seen[name] == 1 else f"{name}_{seen[name]}", name))
        return found

    def __str__(self) -> str:
        return self.text
