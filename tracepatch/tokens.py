"""Prompts as token ids: what stands before them, what continues them, and where two of them differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from tracepatch.alignment import Alignment, Side, paired
from tracepatch.errors import PromptError, RecipeError, SiteError, listing
from tracepatch.shapes import require_somewhere
from tracepatch.sites import Site

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
        alignments: Per pair, which positions of its prompts correspond, and its spans; position by position, if none
            are given.
        unaligned: Why pairs could not be aligned as asked, a line for each.
        corruption: Per pair, what its corruption is called; empty where they have no names.
        align: How the positions of a pair's prompts correspond, in a word.
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
    alignments: tuple[Alignment, ...] = ()
    unaligned: tuple[str, ...] = ()
    corruption: tuple[str, ...] = ()
    align: str = "position by position"
    appended: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.alignments:
            lengths = zip(self.clean, self.clean if self.corrupted is None else self.corrupted, strict=True)
            object.__setattr__(self, "alignments", tuple(paired((len(a), len(b))) for a, b in lengths))

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

    def sides(self, world: str) -> tuple[Side, ...]:
        """Per pair, the positions of its clean or corrupted prompt."""
        return tuple(alignment.side(world) for alignment in self.alignments)

    @property
    def worlds(self) -> tuple[str, ...]:
        """The worlds whose prompts there are."""
        return ("clean",) if self.corrupted is None else ("clean", "corrupted")

    @property
    def mapped(self) -> bool:
        """Whether some pair's positions do not all correspond to the same positions of its other prompt."""
        return any(alignment.mapped for alignment in self.alignments)

    def require_alike(self, what: str, instead: str) -> None:
        """Refuses pairs whose prompts do not correspond position by position.

        Args:
            what: What needs that, to stand at the start of the message.
            instead: What to do.

        Raises:
            RecipeError: There are some.
        """
        count = sum(alignment.mapped for alignment in self.alignments)
        if count:
            raise RecipeError(
                f"{what} compares the two prompts of a pair at the same positions, and in {count} of {len(self)} pairs "
                f"other ones correspond (aligned {self.align}). {instead}"
            )

    @property
    def hint(self) -> str:
        """Whose the positions are, to be added to a message about them where an encoder reads the prompts."""
        if not self.encoder:
            return ""
        return "\nAn encoder reads the prompts; positions are the decoder's, and tp.Pairs(…, decoder=…) gives it more."

    def require_positions(self, site: Site, world: str) -> None:
        """Refuses a site whose positions are in no prompt of a world.

        Raises:
            SiteError: With the positions that there are.
        """
        try:
            require_somewhere(site, self.sides(world))
        except SiteError as error:
            raise SiteError(f"{error}{self.hint}") from None

    def differing(self, pair: int) -> tuple[int, ...]:
        """The positions at which a pair's prompts, as they were written, differ: in their tokens, or in having one."""
        if self.corrupted is None:
            return ()
        return tuple(p for p, (a, b) in enumerate(zip_longest(*(side[pair] for side in self.written))) if a != b)

    def swapped(self, pair: int) -> tuple[tuple[int | None, int | None], ...]:
        """Where a pair's prompts, as they were written, differ: partners of different tokens, and what has no partner.

        Each is (clean position, corrupted position), ``None`` for the partner that is not there.
        """
        alignment = self.alignments[pair]
        here, there = alignment.clean.aligned, alignment.clean.partners
        if here is None or there is None:
            return tuple((p, p) for p in self.differing(pair))
        clean, corrupted = (side[pair] for side in self.written)
        found: list[tuple[int | None, int | None]] = [
            (a, b) for a, b in zip(here, there, strict=True) if clean[a] != corrupted[b]
        ]
        found += [(p, None) for p in range(len(clean)) if p not in here]
        return (*found, *((None, p) for p in range(len(corrupted)) if p not in there))

    def following(self, pair: int, world: str, position: int) -> int | None:
        """What the clean prompt goes on with after a position of a prompt: its next token; after the last the answer.

        ``None`` where the position has no partner in the clean prompt.
        """
        side = self.alignments[pair].side(world)
        if position == side.length - 1:
            return (*self.answer[pair], 0)[0]
        there = position if world == "clean" else self.alignments[pair].clean.here(position, world)
        after = (*self.clean[pair][1:], *(self.answer[pair][:1] or (0,)))
        return None if there is None else after[there]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Each id as text, special tokens included."""
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]

    def text(self, ids: Iterable[int]) -> str:
        """Ids as one text."""
        found: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return found

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
        """Refuses pairs that cannot be compared position by position, nor aligned, or that do not differ.

        Raises:
            PromptError: Unequal token counts, no alignment, or identical prompts; all offenders are listed.
        """
        if self.corrupted is None:
            return
        if self.unaligned:
            raise PromptError(
                f"{len(self.unaligned)} of {len(self)} pairs cannot be aligned.\n{listing(self.unaligned)}\nReword "
                "them, leave them out, or align them in another way: align= takes 'ends', 'prefix', 'suffix', 'spans', "
                "or for each pair a map of clean to corrupted positions."
            )
        unequal, same = [], []
        for i, (a, b) in enumerate(zip(*self.written, strict=True)):
            texts = f"{shown(self.clean_prompts[i], 40)} / {shown(self.corrupted_prompts[i], 40)}"
            comparable = len(a) == len(b) or self.alignments[i].mapped
            if not comparable and not self.encoder:  # positions are the decoder's, and its text is the same
                unequal.append(f"pair {i}: clean has {len(a)} tokens, corrupted has {len(b)}   {texts}")
            elif a == b:
                same.append(f"pair {i}: {shown(self.clean_prompts[i])}")
        if unequal:
            raise PromptError(
                f"{len(unequal)} of {len(self)} pairs cannot be compared position by position.\n{listing(unequal)}\n"
                "Reword one prompt of each pair until the counts agree, or say which positions correspond: "
                "align='ends', 'prefix', 'suffix', 'spans', or a map for each pair."
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


def one_token(tokenizer: PreTrainedTokenizerBase, words: Iterable[str], after: str = "") -> list[str]:
    """Those of the words that are one token, in order.

    Args:
        tokenizer: Of the model.
        words: With a leading space, as they stand in a text.
        after: A text that they continue: a SentencePiece tokenizer gives " Mary" on its own two tokens, and after a
            word one.

    Raises:
        PromptError: It is no tokenizer.
    """
    require_tokenizer(tokenizer)
    return [word for word in words if answer_id(tokenizer, word, after) is not None]


def require_tokenizer(tokenizer: Any) -> None:
    """Refuses a name, and a model, which could be called as a tokenizer is and would run.

    Raises:
        PromptError: It is one.
    """
    if not callable(tokenizer) or hasattr(tokenizer, "tokenizer") or hasattr(tokenizer, "forward"):
        raise PromptError(f"Pass the tokenizer of a model, as model.tokenizer, not {type(tokenizer).__name__}.")


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
