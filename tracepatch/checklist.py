"""Whether a set of pairs can answer a question on a model, as a list of checks a person reads before patching."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from tracepatch.errors import PromptError, listing, plural
from tracepatch.models import Model, limits, require_ready, require_weights
from tracepatch.requests import operated
from tracepatch.tokens import EncodedPairs, shown
from tracepatch.trace import PLAIN, named

Verdict: TypeAlias = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One check: its verdict, one sentence, and the offenders or details, one a line."""

    verdict: Verdict
    sentence: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict:>4}  {self.sentence}" + (
            "\n" + listing(["  " * 2 + d for d in self.details]) if self.details else ""
        )


@dataclass(frozen=True)
class Checklist:
    """The checks of some pairs on a model."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; notes do not count."""
        return all(c.verdict != "FAIL" for c in self.checks)

    @property
    def failure(self) -> str:
        """What failed, in words: a sentence for each check, with its offenders."""
        return "\n".join(str(c).removeprefix("FAIL  ") for c in self.checks if c.verdict == "FAIL")

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def check_pairs(model: Model, encoded: EncodedPairs | None, offenders: list[str]) -> Checklist:
    """All checks; those that need tokens are left out where an answer has none.

    Args:
        model: From ``tp.load``.
        encoded: The pairs as tokens, or ``None`` if they have answers that are not one token.
        offenders: Those answers.
    """
    require_ready(model)
    require_weights(model)
    if encoded is None:
        return Checklist((Check("FAIL", f"{plural(len(offenders), 'answer')} not one token", tuple(offenders)),))
    try:
        encoded.require_within(*limits(model))
    except PromptError as error:
        first, *rest = str(error).splitlines()
        return Checklist((Check("FAIL", first, tuple(line.strip() for line in rest)),))
    checks = [
        Check("ok", f"{plural(len(encoded), 'pair')}; {encoded.bos}"),
        _lengths(encoded),
        *_decoder(encoded),
        *_unknown_words(encoded),
    ]
    if any(encoded.answer) or any(encoded.wrong):
        checks += _answers(encoded)
    if checks[1].verdict != "FAIL" and _alike(encoded):
        checks += _differences(encoded)
    checks += _behaviour(model, encoded)
    return Checklist(tuple(checks))


def _lengths(encoded: EncodedPairs) -> Check:
    try:
        encoded.require_comparable()
    except PromptError as error:
        first, *rest = str(error).splitlines()
        return Check("FAIL", first, tuple(line.strip() for line in rest))
    if encoded.encoder:
        return Check("ok", "an encoder reads the prompts, so that those of a pair may differ in length")
    shared = sorted({side.length for world in encoded.worlds for side in encoded.sides(world)})
    tokens = f"{shared[0]} tokens each" if len(shared) == 1 else f"{shared[0]} to {shared[-1]} tokens"
    if not encoded.mapped:
        same = "" if len(shared) == 1 else ", the same on both sides of each pair"
        return Check("ok", f"prompts can be compared position by position: {tokens}{same}")
    alone = [f"pair {i}: {said}" for i in range(len(encoded)) if (said := _alone(encoded, i))]
    sentence = f"prompts are aligned position by position: {tokens}"
    if not alone:
        return Check("ok", sentence)
    return Check(
        "note",
        f"{sentence}; in {plural(len(alone), 'pair')} some tokens have no partner, so that no patch goes there",
        tuple(alone),
    )


def _alone(encoded: EncodedPairs, pair: int) -> str:
    """The tokens of a pair that have no partner in its other prompt, in words."""
    said = []
    for which, world in enumerate(encoded.worlds):
        ids = encoded.world(world)[pair]
        found = [swap[which] for swap in encoded.swapped(pair) if swap[1 - which] is None]
        words = encoded.words(ids[p] for p in found if p is not None)
        said += [f"{' '.join(map(repr, words))} of the {world} prompt"] if words else []
    return ", ".join(said)


def _decoder(encoded: EncodedPairs) -> list[Check]:
    """What a decoder has written before the answer."""
    if not encoded.encoder:
        return []
    texts = dict.fromkeys(" ".join(map(repr, encoded.words(ids))) for ids in encoded.clean)
    return [Check("ok", "positions are the decoder's, which has written " + " or ".join(list(texts)[:3]))]


def _alike(encoded: EncodedPairs) -> bool:
    """Whether the prompts of every pair can be compared token by token."""
    if encoded.corrupted is None:
        return True
    lengths = (len(a) == len(b) for a, b in zip(*encoded.written, strict=True))
    return all(same or pair.mapped for same, pair in zip(lengths, encoded.alignments, strict=True))


def _unknown_words(encoded: EncodedPairs) -> list[Check]:
    unknown = encoded.tokenizer.unk_token_id
    prompts = (encoded.clean_prompts, encoded.corrupted_prompts)
    texts = [pair for ids, side in zip(encoded.written, prompts, strict=False) for pair in zip(ids, side, strict=True)]
    if encoded.decoder_prompts:
        # The start token may be the padding token, and that the unknown one.
        texts += [(ids[1:], text) for ids, text in zip(encoded.clean, encoded.decoder_prompts, strict=True)]
    bad = tuple(shown(prompt) for ids, prompt in texts if unknown is not None and unknown in ids)
    return (
        [Check("FAIL", f"{plural(len(bad), 'prompt')} with tokens that are not in the vocabulary", bad)] if bad else []
    )


def _answers(encoded: EncodedPairs) -> list[Check]:
    checks = []
    same = [
        f"pair {i}: {encoded.words(set(a) & set(w))}"
        for i, (a, w) in enumerate(zip(encoded.answer, encoded.wrong, strict=True))
        if set(a) & set(w)
    ]
    if same:
        checks.append(Check("FAIL", f"in {plural(len(same), 'pair')} a token is both right and wrong", tuple(same)))
    spaceless, ending = [], []
    for i, ids in enumerate(encoded.answer):
        prompt = encoded.continued(i)
        if not isinstance(prompt, str) or not prompt:
            continue
        if prompt.endswith(" "):
            ending.append(f"pair {i}: {shown(prompt)}")
            continue
        for token, word in zip(ids, encoded.words(ids), strict=True):
            spaced = encoded.tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"]
            if len(spaced) == 1 and spaced[0] != token:
                say = f"a model that continues the prompt would say {' ' + word.strip()!r}"
                spaceless.append(f"pair {i}: {word!r}; {say}")
    if ending:
        sentence = f"{plural(len(ending), 'prompt')} ending in a space, which most tokenizers put before the next word"
        checks.append(Check("note", sentence, tuple(ending)))
    if spaceless:
        checks.append(Check("note", f"{plural(len(spaceless), 'answer')} without a leading space", tuple(spaceless)))
    return checks or [Check("ok", "every answer is one token")]


def _differences(encoded: EncodedPairs) -> list[Check]:
    """Where the prompts differ, and how often each swapped token stands on either side."""
    if encoded.corrupted is None:
        return [Check("note", "no corrupted prompts: only ablations (zero, tensors) are possible")]
    where: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    sides = Counter[str](), Counter[str]()
    examples: dict[tuple[tuple[int, int], ...], str] = {}
    clean, corrupted = encoded.written
    for i in range(len(encoded)):
        swapped = encoded.swapped(i)
        for which, (side, ids) in enumerate(zip(sides, (clean[i], corrupted[i]), strict=True)):
            side.update(encoded.words(ids[p] for swap in swapped if (p := swap[which]) is not None))
        at = tuple((a, b) for a, b in swapped if a is not None and b is not None)  # the rest is told already
        where[at].append(i)
        texts = zip(
            encoded.words(clean[i][a] for a, _ in at), encoded.words(corrupted[i][b] for _, b in at), strict=True
        )
        examples.setdefault(at, f"pair {i}: " + ", ".join(f"{a!r} → {b!r}" for a, b in texts))
    details = tuple(
        f"position {', '.join(map(_where, at))} in {plural(len(pairs), 'pair')}, as in {examples[at]}"
        for at, pairs in where.items()
        if at
    )
    counts = sorted({len(at) for at in where})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sentence = f"{many} {'token differs' if counts == [1] else 'tokens differ'} between the prompts of a pair"
    if not any(where):
        sentence = "the prompts of a pair differ only in tokens that have no partner in the other one"
    checks = [Check("ok" if any(where) else "note", sentence, details)]
    if len(where) > 1 and not encoded.encoder:
        sentence = (
            f"the differing positions are not the same in all pairs ({len(where)} patterns): an average over pairs, "
            "position by position, mixes different things; look at single pairs, or use one template"
        )
        checks.append(Check("note", sentence))
    lopsided = [
        f"{word!r}: {sides[0][word]} × in clean, {sides[1][word]} × in corrupted prompts"
        for word in sorted(sides[0] | sides[1], key=lambda w: -abs(sides[0][w] - sides[1][w]))
        if sides[0][word] != sides[1][word]
    ]
    if lopsided:
        sentence = (
            "swapped tokens are not equally frequent on both sides, so an effect may be one of the "
            "words themselves; pairs.both_roles() balances them"
        )
        checks.append(Check("note", sentence, tuple(lopsided)))
    else:
        checks.append(Check("ok", "every swapped token is as frequent in the clean as in the corrupted prompts"))
    return checks


def _where(swap: tuple[int, int]) -> str:
    """Where two prompts differ: a position, or where it is not the same in both, that of the clean → the corrupted."""
    return str(swap[0]) if swap[0] == swap[1] else f"{swap[0]} → {swap[1]}"


def _looked_at(encoded: EncodedPairs, side: str, pair: int, differing: tuple[int, ...]) -> tuple[Any, ...]:
    """A forward of one prompt, as ``program.operate`` takes it, of which only ``_seen`` comes back."""
    ids = encoded.world(side)[pair]
    read = torch.tensor([encoded.encoded(side, pair)]) if encoded.encoder else None
    before = [p for p in differing if p > 0]
    given = {
        "right": torch.tensor([encoded.answer[pair]], dtype=torch.long),
        "wrong": torch.tensor([encoded.wrong[pair]], dtype=torch.long),
        "at": torch.tensor([[p - 1 for p in before]], dtype=torch.long),
        "token": torch.tensor([[ids[p] for p in before]], dtype=torch.long),
    }
    everywhere = torch.arange(len(ids))
    measures = ((_seen, everywhere, given, None),)
    return "run", (named(torch.tensor([ids]), read), (), ("of", everywhere, None), (), measures, *PLAIN[2:]), ""


def _seen(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of one prompt: are the last logits finite, the largest, answers less wrong ones; log-probabilities of tokens."""
    last = logits[0, -1]
    gap = last[given["right"][0]].mean() - last[given["wrong"][0]].mean()
    logs = logits[0].log_softmax(-1)[given["at"][0], given["token"][0]]
    return torch.cat([torch.stack([last.isfinite().all().to(gap), last.argmax().to(gap), gap]), logs])[None]


def _behaviour(model: Model, encoded: EncodedPairs) -> list[Check]:
    """Whether the model does the task on both sides, and how surprising the swapped tokens are to it."""
    sides = ["clean"] if encoded.corrupted is None else ["clean", "corrupted"]
    gaps: dict[str, dict[int, float]] = {side: {} for side in sides}
    tops: dict[str, list[str]] = {side: [] for side in sides}
    surprise: dict[str, list[float]] = {side: [] for side in sides}
    comparable = not encoded.encoder and _alike(encoded)
    asked = [(side, i) for side in sides for i in range(len(encoded))]
    swapped = {i: encoded.swapped(i) if comparable else () for i in range(len(encoded))}
    at = {
        (side, i): tuple(p for swap in swapped[i] if (p := swap[side == "corrupted"]) is not None) for side, i in asked
    }
    found = operated(model, [_looked_at(encoded, side, i, at[side, i]) for side, i in asked])
    for (side, i), (scores, _) in zip(asked, found, strict=True):
        finite, top, gap, *logs = scores[0].tolist()
        if not finite:
            return [Check("FAIL", f"the model's logits are NaN or inf on the {side} prompt of pair {i}")]
        tops[side].append(encoded.words([int(top)])[0])
        if encoded.answer[i] and encoded.wrong[i]:
            gaps[side][i] = gap
        surprise[side] += logs
    checks = [_task(side, gaps[side], tops[side], encoded) for side in sides if gaps[side]]
    checks += _lacking(*(list(gaps[side].values()) for side in sides)) if gaps["clean"] else []
    if gaps["clean"] and len(sides) == 2:
        checks += _contrast(gaps["clean"], gaps["corrupted"])
    if surprise["clean"] and surprise.get("corrupted"):
        nats = {side: sum(v) / len(v) for side, v in surprise.items()}
        far = nats["clean"] - nats["corrupted"] > 3
        sentence = (
            f"swapped tokens have mean log-probability {nats['clean']:.1f} in clean and "
            f"{nats['corrupted']:.1f} in corrupted prompts (nats)"
        )
        ending = ": the corrupted ones surprise the model" if far else ""
        checks.append(Check("note" if far else "ok", sentence + ending))
    return checks


def _task(side: str, gaps: dict[int, float], tops: list[str], encoded: EncodedPairs) -> Check:
    sign = 1 if side == "clean" else -1
    wanted = "the answer" if side == "clean" else "the wrong answer"
    failing = [
        f"pair {i}: logit difference {gap:+.2f}, the model says {tops[i]!r}"
        for i, gap in gaps.items()
        if gap * sign <= 0
    ]
    right = encoded.answer if side == "clean" else encoded.wrong
    first = sum(tops[i] in encoded.words(right[i]) for i in gaps)
    sentence = (
        f"{side}: the model prefers {wanted} in {len(gaps) - len(failing)} of {plural(len(gaps), 'pair')}; it is "
        f"its first choice in {first}"
    )
    return Check("note" if failing else "ok", sentence, tuple(failing))


def _lacking(clean: list[float], corrupted: list[float] | None = None) -> list[Check]:
    """Whether the behaviour is not there at all, so that there is nothing to locate."""
    right, chance, error = sum(gap > 0 for gap in clean), len(clean) / 2, math.sqrt(len(clean)) / 2
    if right < chance + error:
        sentence = (
            "the model does not do the task: it prefers the answer on "
            f"{right} of {plural(len(clean), 'clean prompt')}, and a coin would on {chance:g} ± {error:.1f}"
        )
        return [Check("FAIL", sentence)]
    if corrupted and sum(clean) <= sum(corrupted):
        sentence = (
            "the corrupted prompts do not take the behaviour away: the mean logit difference is "
            f"{sum(corrupted) / len(corrupted):+.2f} on them and {sum(clean) / len(clean):+.2f} on the clean ones"
        )
        return [Check("FAIL", sentence)]
    return []


def _contrast(clean: dict[int, float], corrupted: dict[int, float]) -> list[Check]:
    """Whether the two sides give opposite outputs, far enough apart to divide by."""
    means = [sum(side.values()) / len(side) for side in (clean, corrupted)]
    opposite = means[0] * means[1] < 0 and abs(sum(means)) <= 0.5 * max(map(abs, means))
    sentence = f"mean logit difference {means[0]:+.2f} on clean and {means[1]:+.2f} on corrupted prompts"
    ending = "opposite outputs" if opposite else "the outputs are not opposite"
    checks = [Check("ok" if opposite else "note", f"{sentence}: {ending}")]
    apart = {i: clean[i] - corrupted[i] for i in clean}
    largest = max(map(abs, apart.values()))
    weak = [f"pair {i}: clean − corrupted is {gap:+.3g}" for i, gap in apart.items() if gap < max(0.05 * largest, 0.1)]
    if weak:
        sentence = (
            "clean and corrupted give nearly the same output, or the wrong way round, in "
            f"{plural(len(weak), 'pair')}: read `effect` there, not `normalized`"
        )
        checks.append(Check("note", sentence, tuple(weak)))
    return checks
