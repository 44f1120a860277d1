"""Pairs of prompts.

A pair is a clean and a corrupted prompt that differ in one thing, with the tokens that would be a right and a wrong
answer to the clean one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tracepatch.alignment import Way
from tracepatch.checklist import Checklist, check_pairs
from tracepatch.errors import PromptError, RecipeError, listing, plural
from tracepatch.given import Maps, Prompts, aligned_by, answers_of, column, missing, prompts_of, several
from tracepatch.models import Model, start_token
from tracepatch.sites import select
from tracepatch.spans import Marks, aligned, marked
from tracepatch.tokens import (
    Answer,
    BosPolicy,
    EncodedPairs,
    Prompt,
    answer_id,
    bos_policy,
    decoder_ids,
    encode_prompt,
    encoder_policy,
    pieces,
    shown,
)

BY_PAIR = ("clean", "corrupted", "answer", "wrong", "decoder", "corruption")


@dataclass(frozen=True, init=False)
class Pairs:
    """Clean and corrupted prompts with their answers, one entry a pair.

    For an encoder–decoder model the prompts are what the encoder reads; they may then differ in length. The decoder has
    written its start token so far or, with ``decoder``, that and a text, the same on both sides.

    Prompts are strings or sequences of token ids. ``answer`` and ``wrong`` are one token (a string or an id) or several
    for each pair; a single string or id serves every pair. Without ``corrupted`` only ablations are possible.

    Attributes:
        clean: The prompts whose behaviour is asked about.
        corrupted: The prompts in which one thing is different, or ``None``.
        answer: Per pair, the tokens that continue the clean prompt rightly.
        wrong: Per pair, the tokens that would be right for the corrupted prompt.
        bos: ``None``: the tokenizer's own habit; ``True``: a beginning-of-sequence token always; ``False``: never.
        name: What to call the set in results.
        seed: The seed it was made from, for the provenance of results.
        decoder: Per pair, what the decoder of an encoder–decoder model has written before the answer, or ``None``.
        align: Which positions of a pair's prompts correspond: ``None``: the same ones, so that the prompts must have
            equally many tokens; ``"ends"``, ``"prefix"``, ``"suffix"``, ``"spans"`` (``alignment.linked`` says what
            they do), or for each pair a map of clean to corrupted positions, counted with the BOS token if there is
            one.
        spans: For the clean and for the corrupted prompts, per pair: its named spans.
        corruption: Per pair, what its corruption is called, where clean prompts have several (``corruptions``).
    """

    clean: tuple[Prompt, ...]
    corrupted: tuple[Prompt, ...] | None
    answer: tuple[tuple[Answer, ...], ...]
    wrong: tuple[tuple[Answer, ...], ...]
    bos: bool | None
    name: str
    seed: int | None
    decoder: tuple[Prompt, ...] | None
    align: Way | Maps | None
    spans: tuple[tuple[Marks, ...], ...]
    corruption: tuple[str, ...]

    def __init__(
        self,
        clean: Prompts,
        corrupted: Prompts | None = None,
        answer: Answer | Sequence[Answer] | Sequence[Sequence[Answer]] | None = None,
        wrong: Answer | Sequence[Answer] | Sequence[Sequence[Answer]] | None = None,
        *,
        bos: bool | None = None,
        name: str = "pairs",
        seed: int | None = None,
        decoder: Prompts | None = None,
        align: Way | Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        spans: Mapping[str, Any] | None = None,
        corruption: str | Sequence[str] | None = None,
    ) -> None:
        sides = {"clean": prompts_of(clean, "clean")}
        if corrupted is not None:
            sides["corrupted"] = prompts_of(corrupted, "corrupted")
        count = len(sides["clean"])
        if decoder is not None:
            sides["decoder"] = prompts_of([decoder] * count if isinstance(decoder, str) else decoder, "decoder")
        names = (corruption,) * count if isinstance(corruption, str) else tuple(corruption or ())
        answers = {"answer": answers_of(answer, count, "answer"), "wrong": answers_of(wrong, count, "wrong")}
        counts = {k: len(v) for k, v in (sides | answers | ({"corruption": names} if names else {})).items()}
        if len(set(counts.values())) > 1:
            raise PromptError(
                "Every pair needs one entry in each list; there are "
                + ", ".join(f"{n} {side}" for side, n in counts.items())
                + "."
            )
        _put(self, clean=sides["clean"], corrupted=sides.get("corrupted"), bos=bos, name=name, seed=seed, **answers)
        marks = () if spans is None else marked(spans, sides["clean"], sides.get("corrupted"))
        _put(self, decoder=sides.get("decoder"), align=aligned_by(align, count), spans=marks, corruption=names)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: Any) -> Pairs:
        """Some of the pairs, as pairs: an integer, slice, list or mask."""
        picked = select(index, "pair").resolve(len(self))
        if not picked:
            raise PromptError(f"There are {len(self)} pairs, 0 to {len(self) - 1}; {index!r} picks none, or others.")

        def some(entries: Any) -> Any:
            return entries and tuple(entries[i] for i in picked)

        own = {name: some(getattr(self, name)) for name in BY_PAIR}
        align = some(self.align) if isinstance(self.align, tuple) else self.align
        return revised(self, **own, align=align, spans=tuple(map(some, self.spans)))

    def __str__(self) -> str:
        corrupted = "without corrupted prompts" if self.corrupted is None else "with corrupted prompts"
        lines = [f"{self.name}: {plural(len(self), 'pair')} {corrupted}"]
        for i in range(min(len(self), 3)):
            lines.append(f"  {i} clean     {shown(self.clean[i])} → {', '.join(map(repr, self.answer[i])) or '?'}")
            if self.corrupted is not None:
                wrong = ", ".join(map(repr, self.wrong[i])) or "?"
                lines.append(f"    corrupted {shown(self.corrupted[i])} → {wrong}")
            if self.decoder is not None:
                lines.append(f"    decoder   {shown(self.decoder[i])}")
        return "\n".join(lines + ([f"  … and {len(self) - 3} more"] if len(self) > 3 else []))

    def __add__(self, other: Pairs) -> Pairs:
        """These pairs and then the others, such as those of another template.

        Raises:
            PromptError: They differ in what holds for a whole set: BOS tokens, alignment, or what they have.
        """
        if not isinstance(other, Pairs):
            return NotImplemented
        maps = isinstance(self.align, tuple) and isinstance(other.align, tuple)
        apart = [name for name in ("bos", "align") if getattr(self, name) != getattr(other, name)]
        apart = [name for name in apart if name != "align" or not maps]
        has = ("corrupted", "decoder")
        apart += [name for name in has if (getattr(self, name) is None) != (getattr(other, name) is None)]
        if apart:
            raise PromptError(f"{self.name} and {other.name} cannot be one set: they differ in {', '.join(apart)}.")
        count, both = 1 if self.corrupted is None else 2, (self, other)
        marks = [pairs.spans or (((),) * len(pairs),) * count for pairs in both]
        names = [pairs.corruption or ("as given",) * len(pairs) for pairs in both]
        return revised(
            self,
            **{name: getattr(self, name) and (*getattr(self, name), *getattr(other, name)) for name in BY_PAIR[:-1]},
            align=(*self.align, *other.align) if maps else self.align,  # type: ignore[misc]  # maps
            spans=tuple((*one, *two) for one, two in zip(*marks, strict=True)) if self.spans or other.spans else (),
            corruption=(*names[0], *names[1]) if self.corruption or other.corruption else (),
            name=self.name if self.name == other.name else f"{self.name} and {other.name}",
            seed=self.seed if self.seed == other.seed else None,
        )

    def both_roles(self) -> Pairs:
        """These pairs, then the same with clean and corrupted, answer and wrong, exchanged.

        In such a set neither prompt of a pair is special, so that the mean metric of the clean runs is minus that of
        the corrupted ones.
        """
        if self.corrupted is None:
            raise PromptError("These pairs have no corrupted prompts, so there are no roles to exchange.")
        maps = self.align if isinstance(self.align, tuple) else ()
        return revised(
            self,
            clean=(*self.clean, *self.corrupted),
            corrupted=(*self.corrupted, *self.clean),
            answer=(*self.answer, *self.wrong),
            wrong=(*self.wrong, *self.answer),
            decoder=self.decoder and (*self.decoder, *self.decoder),
            align=(*maps, *(tuple((b, a) for a, b in links) for links in maps)) or self.align,
            spans=tuple((*one, *two) for one, two in zip(self.spans, self.spans[::-1], strict=True)),
            corruption=(*self.corruption, *self.corruption),
            name=f"{self.name}, both roles",
        )

    def without_corrupted(self) -> Pairs:
        """The clean prompts alone, as for runs with noise, which is then what effects are a share of."""
        return revised(self, corrupted=None, align=None, spans=self.spans[:1], corruption=())

    def encode(self, tokenizer: PreTrainedTokenizerBase, start: int | None = None) -> EncodedPairs:
        """The pairs as token ids.

        Args:
            tokenizer: Of the model.
            start: What the decoder starts with where an encoder reads the prompts; ``None`` where there is no encoder.

        Raises:
            PromptError: An answer that is not one token, a prompt without tokens (all of them are listed), or a text
                for a decoder that reads the prompts itself.
        """
        if start is None and self.decoder is not None:
            raise PromptError(
                "decoder= is what an encoder–decoder model has written before the answer, and this model has no "
                "encoder. Write it at the end of the prompts."
            )
        texts = any(isinstance(p, str) for side in (self.clean, self.corrupted or ()) for p in side)
        habit = bos_policy if start is None else encoder_policy
        policy = habit(tokenizer, self.bos) if texts else BosPolicy((), "", "token ids are taken as they are")
        sides = [self.clean] if self.corrupted is None else [self.clean, self.corrupted]
        ids = [tuple(encode_prompt(tokenizer, prompt, policy) for prompt in side) for side in sides]
        read: list[tuple[tuple[int, ...], ...]] = []
        if start is not None:
            so_far = self.decoder or ("",) * len(self)
            read, ids = ids, [tuple(decoder_ids(tokenizer, text, start) for text in so_far)] * len(ids)
            sides = [*sides, so_far]
        empty = [
            f"pair {i}: {shown(side[i])}"
            for side, got in zip(sides, [*read, *ids[-1:]] if read else ids, strict=True)
            for i, t in enumerate(got)
            if not t
        ]
        if empty:
            raise PromptError(f"{len(empty)} prompts have no tokens.\n{listing(empty)}")
        offenders = self.unencodable(tokenizer, start)
        if offenders:
            raise PromptError(
                f"{plural(len(offenders), 'answer')} not one token of this tokenizer.\n{listing(offenders)}\n"
                "Pick words that are one token (mind the leading space), or pass token ids; answers of several tokens "
                "are read with tp.continued(pairs) and tp.continuation."
            )
        answers = [
            tuple(
                tuple(dict.fromkeys(answer_id(tokenizer, t, self._continued(i, start)) or 0 for t in tokens))
                for i, tokens in enumerate(which)
            )
            for which in (self.answer, self.wrong)
        ]
        texts_of = [self.clean] if self.corrupted is None else [self.clean, self.corrupted]
        alignments, unaligned = aligned(tokenizer, texts_of, ids, self.spans, self.align) if start is None else ((), ())
        way = (
            "by a map"
            if isinstance(self.align, tuple)
            else f"by {self.align}"
            if self.align
            else "position by position"
        )
        return EncodedPairs(
            clean_prompts=self.clean,
            corrupted_prompts=self.corrupted or (),
            tokenizer=tokenizer,
            clean=ids[0],
            corrupted=ids[1] if len(ids) > 1 else None,
            answer=answers[0],
            wrong=answers[1],
            bos=policy,
            name=self.name,
            seed=self.seed,
            encoder=tuple(read),
            decoder_prompts=self.decoder or (),
            alignments=alignments,
            unaligned=unaligned,
            corruption=self.corruption,
            align=way,
        )

    def check(self, model: Model) -> Checklist:
        """Whether these pairs can answer a question on this model: token counts, answers, and whether it does the task.

        Args:
            model: From ``tp.load``.

        Returns:
            A checklist to print; ``checklist.passed`` says whether nothing stands in the way of patching.
        """
        start = start_token(model)
        offenders = self.unencodable(model.tokenizer, start)
        return check_pairs(model, None if offenders else self.encode(model.tokenizer, start), offenders)

    def _continued(self, pair: int, start: int | None) -> Prompt:
        """What an answer continues: the prompt, or what a decoder has written so far."""
        return self.clean[pair] if start is None else self.decoder[pair] if self.decoder is not None else ""

    def unencodable(self, tokenizer: PreTrainedTokenizerBase, start: int | None = None) -> list[str]:
        """The answers that are not one token, each with what it is instead; arguments as for ``encode``."""
        return [
            f"pair {i}: {t!r} is {pieces(tokenizer, t)}"
            for which in (self.answer, self.wrong)
            for i, tokens in enumerate(which)
            for t in tokens
            if answer_id(tokenizer, t, self._continued(i, start)) is None
        ]

    @classmethod
    def from_frame(cls, frame: Any, **options: Any) -> Pairs:
        """Pairs from a table with the column ``clean`` and any of ``corrupted``, ``answer``, ``wrong``, ``decoder``.

        A cell may hold several answers, as a list or separated by ``|``.

        Args:
            frame: A pandas frame, or a mapping of columns.
            options: As for ``Pairs``.
        """
        columns = {str(name): column(frame[name]) for name in frame}
        known = ("clean", "corrupted", "answer", "wrong", "decoder")
        close = {
            name: get_close_matches(name, set(columns) - set(known), 1, 0.8)
            for name in known[:4]
            if name not in columns
        }
        meant = [f"{name!r} for {wrong[0]!r}" for name, wrong in close.items() if wrong]
        if "clean" not in columns or meant:
            lacks = f"should it say {' and '.join(meant)}" if meant else "there is no column 'clean'"
            raise PromptError(f"The table has the columns {', '.join(columns) or '(none)'}: {lacks}.")
        picked: dict[str, Any] = {}
        for name in known:
            if name not in columns:
                continue
            cells = columns[name]
            absent = [f"row {i}" for i, cell in enumerate(cells) if missing(cell)]
            if absent:
                raise PromptError(f"Column {name!r} is empty in {len(absent)} rows.\n{listing(absent)}")
            picked[name] = [several(cell) for cell in cells] if name in ("answer", "wrong") else cells
        return cls(**picked, **options)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], **options: Any) -> Pairs:
        """Pairs from a CSV file with the columns of ``from_frame``; leading spaces in cells are kept."""
        import pandas as pd

        source = _readable(path)
        try:
            frame = pd.read_csv(source, dtype=str, keep_default_na=False, na_values=[""])
        except (ValueError, UnicodeDecodeError) as error:
            raise PromptError(f"{source} is not a CSV table: {error}") from error
        return cls.from_frame(frame, **{"name": source.stem, **options})

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], **options: Any) -> Pairs:
        """Pairs from a file with one JSON object a line, its keys as the columns of ``from_frame``."""
        source = _readable(path)
        rows, offenders = [], []
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = error.msg
            if isinstance(row, dict):
                rows.append(row)
            else:
                offenders.append(f"line {number}: {row}")
        if offenders or not rows:
            raise PromptError(
                f"{source}: {len(offenders)} lines are not JSON objects.\n{listing(offenders)}"
                if offenders
                else f"{source} holds no pairs."
            )
        keys = dict.fromkeys(key for row in rows for key in row)
        return cls.from_frame({key: [row.get(key) for row in rows] for key in keys}, **{"name": source.stem, **options})


def revised(pairs: Pairs, **changed: Any) -> Pairs:
    """The same set with something else in it, which is known to be sound: attributes by their names."""
    found = object.__new__(Pairs)
    _put(found, **{field.name: getattr(pairs, field.name) for field in fields(pairs)} | changed)
    return found


def _readable(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    if not source.is_file():
        raise PromptError(f"There is no file {source}.")
    return source


def _put(instance: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def require_pairs(pairs: Any) -> Pairs:
    """Refuses what is no pairs.

    Raises:
        RecipeError: So it is.
    """
    if not isinstance(pairs, Pairs):
        raise RecipeError(
            f"Pass the prompts as tp.Pairs(clean=…, corrupted=…, answer=…, wrong=…), not {type(pairs).__name__}."
        )
    return pairs
