"""Pairs whose answers are several tokens: these stand at the end of the prompts, where they are read.

A model says an answer token by token. Its log-probability is the sum over its tokens, each given the prompt and those
before it, so all but the last one are appended to both prompts of a pair, and one forward reads them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tracepatch.alignment import lengthened
from tracepatch.errors import PromptError, listing
from tracepatch.prompts import Pairs, revised
from tracepatch.tokens import Answer, EncodedPairs, Prompt, pieces


@dataclass(frozen=True, init=False)
class Continued(Pairs):
    """Pairs with the tokens of an answer at the end of both prompts, all but the last one; from ``continued``.

    Attributes:
        pairs: As they were.
        of: Whose tokens: the right answer's, or the wrong one's.
    """

    pairs: Pairs
    of: Literal["answer", "wrong"]

    def __init__(self, pairs: Pairs, of: Literal["answer", "wrong"]) -> None:
        for name, value in {**vars(pairs), "pairs": pairs, "of": of}.items():
            object.__setattr__(self, name, value)

    def __getitem__(self, index: Any) -> Pairs:
        return Continued(self.pairs[index], self.of)

    def both_roles(self) -> Pairs:
        """As of any pairs."""
        return Continued(self.pairs.both_roles(), self.of)

    def unencodable(self, tokenizer: PreTrainedTokenizerBase, start: int | None = None) -> list[str]:
        """The answers that are no tokens at all."""
        return [
            f"pair {i}: {text!r} is {pieces(tokenizer, text)}"
            for i, (text,) in enumerate(getattr(self, self.of))
            if not (ids := _ids(tokenizer, text, self.clean[i])) or tokenizer.unk_token_id in ids
        ]

    def encode(self, tokenizer: PreTrainedTokenizerBase, start: int | None = None) -> EncodedPairs:
        """The pairs as token ids; see ``Pairs.encode``.

        Raises:
            PromptError: An answer cannot be appended, or an encoder reads the prompts.
        """
        if start is not None:
            raise PromptError("Answers cannot be appended where an encoder reads the prompts: write them in decoder=.")
        offenders = self.unencodable(tokenizer)
        if offenders:
            raise PromptError(f"Some answers cannot be appended.\n{listing(offenders)}\nUse other words.")
        none = ((),) * len(self)
        plain = revised(self.pairs, answer=none, wrong=none).encode(tokenizer)
        answers = [
            _ids(tokenizer, text, prompt) for (text,), prompt in zip(getattr(self, self.of), self.clean, strict=True)
        ]
        clean, corrupted = (
            None if side is None else tuple(ids + more[:-1] for ids, more in zip(side, answers, strict=True))
            for side in (plain.clean, plain.corrupted)
        )
        assert clean is not None
        last, appended = tuple(ids[-1:] for ids in answers), tuple(len(ids) - 1 for ids in answers)
        longer = tuple(map(lengthened, plain.alignments, appended))
        return replace(plain, clean=clean, corrupted=corrupted, answer=last, appended=appended, alignments=longer)


def continued(pairs: Pairs, of: Literal["answer", "wrong"] = "answer") -> Pairs:
    """Pairs whose prompts end with the tokens of their answer, all but the last one, so that it may have several.

    ``tp.continuation`` is then the log-probability of the whole answer after the prompt. Positions count what is
    appended: of an answer of three tokens the prompt's own last token is -3, and the metric reads the last three.

    Args:
        pairs: With one answer each, of any number of tokens.
        of: Whose tokens: the right answer's, or the wrong one's. These are runs of their own, as the texts differ.

    Raises:
        PromptError: A pair has no such answer, or several.
    """
    if of not in ("answer", "wrong"):
        raise PromptError(f"of is 'answer' or 'wrong', not {of!r}.")
    wrong = [f"pair {i}: {len(one)}" for i, one in enumerate(getattr(pairs, of)) if len(one) != 1]
    if wrong:
        raise PromptError(f"A pair is continued by one {of}; some have another number of them.\n{listing(wrong)}")
    return Continued(pairs, of)


def _ids(tokenizer: PreTrainedTokenizerBase, answer: Answer, prompt: Prompt) -> tuple[int, ...]:
    """An answer as it continues the prompt, else on its own; nothing for an id that there is not."""
    if not isinstance(answer, str):
        return (int(answer),) if 0 <= answer < len(tokenizer) else ()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    if isinstance(prompt, str) and prompt:
        before, after = ids(prompt), ids(prompt + answer)
        if after[: len(before)] == before and len(after) > len(before):
            return after[len(before) :]
    return ids(answer)
