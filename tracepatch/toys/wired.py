"""A GPT-2 wired by hand: an induction circuit whose every edge is known.

A stock `GPT2LMHeadModel` with 2 layers of 4 heads, built in code. Given `... A B ... A` it predicts `B`.

The residual stream has 96 dimensions, in five blocks:

| dimensions | holds | written by |
|---|---|---|
| 0 to 23 | `token`: which word stands here, one-hot | token embedding |
| 24 to 46 | `position`: where it stands, one-hot | position embedding |
| 47 to 70 | `previous`: which word stands one before, one-hot | head L0H1 |
| 71 to 94 | `output`: how much attention each word gets | head L1H2 |
| 95 | `balance`: minus the sum of all others | everyone who writes |

Head L0H1 copies the previous word. Its query at position i is 60·onehot(i−1) and its key at j is onehot(j), so its
scores are 60 at j = i−1 and 0 elsewhere: but for e⁻⁶⁰ it attends to the token before (at position 0 to itself). Its
value is `token`, and it writes it to `previous`.

Head L1H2 is the induction head. Its query is β·`token` and its key is `previous`, so the last token, A, gives score β
to each token after an earlier A and 0 to all others. Its value is `token`, and it writes it to `output`. The logit of a
word is 10 times its `output`. At the last token that is 10·e^β/Z for B, 20/Z for A, which stands there twice, and 10/Z
for every other word of the prompt, with Z = e^β + (number of tokens − 1). So B has the highest logit if β > log 2.

All other weights are exactly 0: six heads and both MLPs write nothing. `wiring` says why LayerNorm does not disturb the
blocks, and what `balance` is for.

In `wired_pairs` the clean prompt is `... A B ... X C ... A` and the corrupted prompt `... X B ... A C ... A`, or the
same with the two halves in the other order. The last token, the words B and C and where they stand are the same in
both; only the words before B and C differ. Between the 11 writers (the embeddings, 8 heads, 2 MLPs) and the later
readers (the query, key and value input of each head, each MLP's input, the logits) there are 110 edges. Exactly three
carry something that the difference of the logits of B and C depends on, and each of them carries all of it:

    embeddings → L0H1 value    which word stands at a place
    L0H1 → L1H2 key            which word stands before a place
    L1H2 → logits              which word followed the last token before

The words A and X also change the values that L1H2 reads where they stand, but those reach the logits of A and X only.

All this holds for every β, in both directions, for each pair alone. A gradient taken in the corrupted prompt, however,
sees a softmax that is the flatter the larger β is: of the true effect of L0H1 and of the first two edges it estimates
the fraction β·(p(1−p) + 2pq + q(1−q)) / (2(q−p)) with p = 1/Z and q = e^β/Z, which for large β goes to 0 like 9β·e^−β.
"""

import random

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from . import tasks, vocabulary, wiring

LENGTH = 16
"""Tokens in each prompt of `wired_pairs`."""

WORDS = tasks.WORDS[:20]
"""The words of these prompts."""

_VOCAB, _POSITIONS, _HEADS = 4 + len(WORDS), 23, 4
_TOKEN = 0
_POSITION = _TOKEN + _VOCAB
_PREVIOUS = _POSITION + _POSITIONS
_OUTPUT = _PREVIOUS + _VOCAB
_BALANCE = _OUTPUT + _VOCAB
_D_MODEL = _BALANCE + 1
_D_HEAD = _D_MODEL // _HEADS
_SHARPNESS, _LOGIT_SCALE = 60.0, 10.0


def wired(saturation: float = 1.0) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The hand-wired induction model, in eval mode and float32, and its tokenizer.

    Args:
        saturation: β, the score that the induction head gives to its target, positive. The exact effects of the
            circuit do not depend on it. Attribution patching's estimate for L0H1, as a fraction of its effect, does:
            it is 1.03 for 1, .53 for 4, .13 for 6 and .0007 for 12, in the prompts of `wired_pairs`.

    Raises:
        ValueError: `saturation` is not positive.
    """
    if not saturation > 0:
        raise ValueError(f"saturation is {saturation}; it must be positive, or the induction head finds nothing.")
    model = wiring.blank(words=_VOCAB, positions=_POSITIONS, d_model=_D_MODEL, layers=2, heads=_HEADS, neurons=_HEADS)
    with torch.no_grad():
        wiring.one_hot(model.transformer.wte.weight, _TOKEN)
        wiring.one_hot(model.transformer.wpe.weight, _POSITION)
        # Attention divides scores by sqrt(d_head), so the queries are multiplied by it.
        sharp, soft = _SHARPNESS * _D_HEAD**0.5, saturation * _D_HEAD**0.5
        query, key, value, output = wiring.head(model, layer=0, head=1)
        query[torch.arange(_POSITION + 1, _PREVIOUS), torch.arange(_POSITIONS - 1)] = sharp
        key[torch.arange(_POSITION, _PREVIOUS), torch.arange(_POSITIONS)] = 1.0
        value[torch.arange(_VOCAB), torch.arange(_VOCAB)] = 1.0
        wiring.one_hot(output, _PREVIOUS)
        query, key, value, output = wiring.head(model, layer=1, head=2)
        query[torch.arange(_VOCAB), torch.arange(_VOCAB)] = soft
        key[torch.arange(_PREVIOUS, _OUTPUT), torch.arange(_VOCAB)] = 1.0
        value[torch.arange(_VOCAB), torch.arange(_VOCAB)] = 1.0
        wiring.one_hot(output, _OUTPUT)
        model.lm_head.weight[torch.arange(_VOCAB), torch.arange(_OUTPUT, _BALANCE)] = _LOGIT_SCALE
    return model, vocabulary.tokenizer(WORDS, prepend_bos=False, max_length=_POSITIONS)


def wired_pairs(n: int, seed: int = 0) -> tasks.Prompts:
    """Prompts of 16 words for which exactly three edges of the wired model matter, each with normalized effect 1.

    Clean is `... A B ... X C ... A` with the answer B, corrupted is `... X B ... A C ... A` with the answer C, or the
    same with the halves in the other order. Every word but A stands once in a prompt.

    Args:
        n: How many pairs.
        seed: The same seed gives the same pairs.
    """
    rng = random.Random(f"wired {seed}")
    prompts = tasks.Prompts([], [], [], [])
    for _ in range(n):
        a, x, *others = rng.sample(WORDS, LENGTH - 1)
        # Not at position 0, whose previous word is itself; two apart, so that each is followed by one of the others.
        first, second = sorted(rng.sample(range(1, LENGTH - 3), 2))
        second += 1
        one, other = (a, x) if rng.random() < 0.5 else (x, a)
        clean = [*others[:first], one, *others[first : second - 1], other, *others[second - 1 :], a]
        corrupted = [*others[:first], other, *others[first : second - 1], one, *others[second - 1 :], a]
        prompts.clean.append(" ".join(clean))
        prompts.corrupted.append(" ".join(corrupted))
        prompts.answer.append(f" {clean[clean.index(a) + 1]}")
        prompts.wrong.append(f" {corrupted[corrupted.index(a) + 1]}")
    return prompts
