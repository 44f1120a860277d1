"""Prompts as token ids: what stands before them, what continues them, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from tracepatch.errors import PromptError, SiteError, listing
from tracepatch.sites import Site, positions_of

Prompt: TypeAlias = str | tuple[int, ...]
Answer: TypeAlias = str | int


@dataclass(frozen=True)
class BosPolicy:
    """What stands before every prompt.

    Attributes:
        prefix: The special tokens' ids.
        text: The same, decoded.
        why: Who decided.
        suffix: The special tokens' ids after what an encoder reads.
        ending: The same, decoded.
    """

    prefix: tuple[int, ...]
    text: str
    why: Literal["the tokenizer does so", "you asked for it", "token ids are taken as they are"]
    suffix: tuple[int, ...] = ()
    ending: str = ""

    def __str__(self) -> str:
        ends = f"; every prompt ends with {self.ending} (the tokenizer does so)" if self.suffix else ""
        if self.prefix:
            return f"every prompt starts with {self.text} ({self.why}){ends}"
        return f"no BOS token ({'the tokenizer adds none' if self.why == 'the tokenizer does so' else self.why}){ends}"


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as token ids, with the tokenizer that made them.

    Attributes:
        clean_prompts: The clean prompts as written.
        corrupted_prompts: The corrupted prompts as written; empty where there are none.
        tokenizer: Whose ids these are.
        clean: Per pair, its ids; the decoder's, where an encoder reads the prompts.
        corrupted: Per pair, its ids, or ``None``.
        answer: Per pair, the ids of its answers.
        wrong: Per pair, the ids of its wrong answers.
        bos: What stands before every prompt.
        name: What the set is called.
        seed: The seed it was made from, if it was.
        encoder: Per world (clean, then corrupted) and pair, the ids that an encoder reads; empty where there is none.
        decoder_prompts: What the decoder has written so far, as written; empty if it is its start token alone.
        appended: Per pair, how many tokens of its answer stand at the end of its prompts: all but the last one; empty
            where answers are one token.
    """

    clean_prompts: tuple[Prompt, ...]
    corrupted_prompts: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...] | None
    answer: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    bos: BosPolicy
    name: str = "pairs"
    seed: int | None = None
    encoder: tuple[tuple[tuple[int, ...], ...], ...] = ()
    decoder_prompts: tuple[Prompt, ...] = ()
    appended: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.clean)

    def world(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The ids of the clean or the corrupted prompts."""
        ids = self.clean if name == "clean" else self.corrupted
        if ids is None:
            raise PromptError(
                "These pairs have no corrupted prompts: patch from other sources (zero, a tensor), or add them."
            )
        return ids

    def encoded(self, name: str, pair: int) -> tuple[int, ...]:
        """The ids that an encoder reads in a pair's clean or corrupted world; empty where there is no encoder."""
        return self.encoder[("clean", "corrupted").index(name)][pair] if self.encoder else ()

    @property
    def written(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per world and pair, the ids of the prompts as they were written: the encoder's, where there is one."""
        return self.encoder or ((self.clean,) if self.corrupted is None else (self.clean, self.corrupted))

    def continued(self, pair: int) -> Prompt:
        """The prompt that a pair's answers continue; empty where a decoder has nothing but its start token."""
        if self.encoder:
            return self.decoder_prompts[pair] if self.decoder_prompts else ""
        return self.clean_prompts[pair]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each pair's clean prompt; the decoder's, where there is an encoder."""
        return tuple(len(ids) for ids in self.clean)

    @property
    def hint(self) -> str:
        """Whose the positions are, to be added to a message about them where an encoder reads the prompts."""
        if not self.encoder:
            return ""
        return "\nAn encoder reads the prompts; positions are the decoder's, and tp.Pairs(…, decoder=…) gives it more."

    def require_positions(self, site: Site) -> None:
        """Refuses a site whose positions are in no prompt.

        Raises:
            SiteError: With the positions that there are.
        """
        try:
            positions_of(site, self.lengths)
        except SiteError as error:
            raise SiteError(f"{error}{self.hint}") from None

    def differing(self, pair: int) -> tuple[int, ...]:
        """The positions at which a pair's prompts, as they were written, have different tokens."""
        if self.corrupted is None:
            return ()
        clean, corrupted = (side[pair] for side in self.written)
        return tuple(p for p, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b)

    def words(self, ids: Iterable[int]) -> list[str]:
        """Each id as text, special tokens included."""
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]

    def require_within(self, taken: int, scored: int, longest: int | None) -> None:
        """Refuses ids and lengths that the model does not have.

        Args:
            taken: Ids that the model takes.
            scored: Ids that its logits have.
            longest: Positions that it has, if they are bounded.

        Raises:
            PromptError: All offenders are listed.
        """
        bad = []
        sides = [("clean", self.clean), ("corrupted", self.corrupted or ())]
        if self.encoder:
            sides = [("decoder's", self.clean), *zip(("clean", "corrupted"), self.encoder, strict=False)]
        for i in range(len(self)):
            for side, ids in sides:
                if i < len(ids) and not all(0 <= t < taken for t in ids[i]):
                    bad.append(f"pair {i}: the {side} prompt has ids beyond 0 to {taken - 1}")
                if i < len(ids) and longest is not None and len(ids[i]) > longest:
                    bad.append(f"pair {i}: the {side} prompt has {len(ids[i])} tokens, the model takes {longest}")
            for side, answers in (("answer", self.answer), ("wrong", self.wrong)):
                bad += [f"pair {i}: {side} id {t} is beyond the {scored} logits" for t in answers[i] if t >= scored]
        if bad:
            raise PromptError(f"The model cannot take these pairs.\n{listing(bad)}\nIs this its tokenizer?")

    def require_comparable(self) -> None:
        """Refuses pairs that cannot be compared position by position, or that do not differ.

        Raises:
            PromptError: Unequal token counts, or identical prompts; all offenders are listed.
        """
        if self.corrupted is None:
            return
        unequal, same = [], []
        for i, (a, b) in enumerate(zip(*self.written, strict=True)):
            texts = f"{shown(self.clean_prompts[i], 40)} / {shown(self.corrupted_prompts[i], 40)}"
            if len(a) != len(b) and not self.encoder:  # positions are the decoder's, and its text is the same
                unequal.append(f"pair {i}: clean has {len(a)} tokens, corrupted has {len(b)}   {texts}")
            elif a == b:
                same.append(f"pair {i}: {shown(self.clean_prompts[i])}")
        if unequal:
            raise PromptError(
                f"{len(unequal)} of {len(self)} pairs cannot be compared position by position.\n{listing(unequal)}\n"
                "Reword one prompt of each pair until the counts agree."
            )
        if same:
            raise PromptError(
                f"In {len(same)} of {len(self)} pairs the clean and the corrupted prompt are the same tokens, "
                "so no patch can "
                f"have an effect.\n{listing(same)}\nChange one of them, or leave the pair out."
            )


def encoder_policy(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> BosPolicy:
    """What will stand before and after everything that an encoder reads.

    Raises:
        PromptError: A BOS token is asked for and the tokenizer has none.
    """
    plain, full = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a", special=True)
    starts = [n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain]
    suffix = tuple(full[starts[0] + len(plain) :]) if starts else ()
    return replace(bos_policy(tokenizer, bos), suffix=suffix, ending=tokenizer.decode(list(suffix)))


def bos_policy(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> BosPolicy:
    """What will stand before every prompt.

    Raises:
        PromptError: A BOS token is asked for and the tokenizer has none.
    """
    if bos is None:
        plain, full = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a", special=True)
        starts = [n for n in range(len(full) - len(plain) + 1) if full[n : n + len(plain)] == plain]
        prefix = tuple(full[: starts[0]]) if starts else ()
    elif not bos:
        prefix = ()
    elif tokenizer.bos_token_id is None:
        raise PromptError(
            f"bos=True, but {type(tokenizer).__name__} has no BOS token. Leave bos out, or pass bos=False."
        )
    else:
        prefix = (int(tokenizer.bos_token_id),)
    why: Literal["the tokenizer does so", "you asked for it", "token ids are taken as they are"] = (
        "the tokenizer does so" if bos is None else "you asked for it"
    )
    return BosPolicy(prefix, tokenizer.decode(list(prefix)), why)


def one_token(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[str]:
    """Those of the words that are one token, in order."""
    return [word for word in words if answer_id(tokenizer, word, "") is not None]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, policy: BosPolicy) -> tuple[int, ...]:
    """The ids of a prompt; ids are taken as they are."""
    if not isinstance(prompt, str):
        return tuple(prompt)
    ids = tuple(_ids(tokenizer, prompt, special=False))
    if policy.suffix and ids[-len(policy.suffix) :] != policy.suffix:
        ids += policy.suffix
    # A prompt that already spells out the BOS token must not get it twice.
    return ids if policy.prefix and ids[: len(policy.prefix)] == policy.prefix else policy.prefix + ids


def decoder_ids(tokenizer: PreTrainedTokenizerBase, text: Prompt, start: int) -> tuple[int, ...]:
    """The ids of what a decoder has written so far, with its start token in front; ids are taken as they are."""
    if not isinstance(text, str):
        return tuple(text)
    ids = tuple(_ids(tokenizer, text, special=False))
    return ids if ids[:1] == (start,) else (start, *ids)


def answer_id(tokenizer: PreTrainedTokenizerBase, token: Answer, prompt: Prompt) -> int | None:
    """The id of an answer as it continues the prompt, else on its own; ``None`` if neither is one token.

    In context first: a SentencePiece tokenizer gives " Mary" on its own two tokens, and after a prompt one.
    """
    if not isinstance(token, str):
        return int(token) if 0 <= token < len(tokenizer) else None
    if isinstance(prompt, str) and prompt:
        before, after = _ids(tokenizer, prompt, special=False), _ids(tokenizer, prompt + token, special=False)
        if after[: len(before)] == before and len(after) == len(before) + 1:
            return after[-1] if after[-1] != tokenizer.unk_token_id else None
    alone = _ids(tokenizer, token, special=False)
    return alone[0] if len(alone) == 1 and alone[0] != tokenizer.unk_token_id else None


def pieces(tokenizer: PreTrainedTokenizerBase, token: Answer) -> str:
    """Why an answer is not one token."""
    if not isinstance(token, str):
        return f"no id of a vocabulary of {len(tokenizer)}"
    found = _ids(tokenizer, token, special=False)
    if tokenizer.unk_token_id in found:
        return "not in the vocabulary"
    return f"{len(found)} tokens: {' '.join(repr(tokenizer.decode([i])) for i in found)}"


def shown(prompt: Prompt, width: int = 60) -> str:
    """A prompt for an error message, cut to a width."""
    text = repr(prompt) if isinstance(prompt, str) else str(list(prompt))
    return text if len(text) <= width else text[: width - 2] + "…" + text[-1]
