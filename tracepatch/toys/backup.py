"""A GPT-2 wired by hand with a head that takes over when another one is knocked out.

Given `... A B ... A` it predicts `B`, as the model of `wired` does. Layer 0 finds the previous word, and then there are
two heads for the same task:

* L1H0, the primary head, attends from A to the word after the earlier A and writes it to `output`.
* L2H1, the backup head, does the same, unless the word is in `output` already: then it attends to `<bos>`, of which
  there is nothing to write. What it writes is `share` times a word.

Backup heads of this kind were found in GPT-2 small (Wang et al. 2022, arXiv:2211.00593). The logit of a word is 10
times its `output`. Between B and C, the answers of the clean and the corrupted prompt of `wired.wired_pairs`, the
difference of the logits in the clean prompt is

| knocked out (set to zero, or to a mean over prompts in which B is rare) | difference |
|---|---|
| nothing | 10 |
| L1H0 | 10·share |
| L2H1 | 10 |
| L1H0 and L2H1 | 0 |
| L0H1 | 0 |

So with a share of 0.9 the primary head, which does everything, seems to do a tenth, the backup head nothing, and both
together everything. Patches have normalized effects that follow from the same rule: with what L1H0 writes in the
corrupted prompt, the backup head still says B, so that noising L1H0 has the effect −(2 − share) / 2; denoising it
(2 − share) / 2; L2H1 has none in either direction.

The residual stream has the blocks of `wired`: `token`, `position`, `previous`, `output` and `balance`. Scores are sums
of three parts: 80 where the word before is the one that asks, 30 at `<bos>`, and, for backup heads only, −140 times how
much of the word is in `output` where the question stands. So a head attends to the word after the earlier A (80 against
30) unless half of it or more is in `output` (10 against 30), but for e⁻²⁰. At words that did not occur before, all
heads of later layers attend to `<bos>` and write nothing.
"""

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from . import vocabulary, wiring
from .wired import WORDS

_SPECIAL = 4
_VOCAB, _POSITIONS, _HEADS = _SPECIAL + len(WORDS), 23, 2
_TOKEN = 0
_POSITION = _TOKEN + _VOCAB
_PREVIOUS = _POSITION + _POSITIONS
_OUTPUT = _PREVIOUS + _VOCAB
_BALANCE = _OUTPUT + _VOCAB
_SHARPNESS, _MATCH, _REST, _PRESENT, _LOGIT_SCALE = 60.0, 80.0, 30.0, 140.0, 10.0


def backup_heads(share: float = 0.9) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model with a primary and a backup head, in eval mode and float32, and its tokenizer, which prepends `<bos>`.

    Args:
        share: What the backup head makes good of what the primary head did, at least a half: 0.9 leaves 9 of the 10
            that the logits differ by. More than 1 makes good too much.

    Raises:
        ValueError: `share` is less than a half.
    """
    if not share >= 0.5:
        raise ValueError(
            f"share is {share}; it must be at least 0.5, the share at which the backup head is quiet again."
        )
    model = wiring.blank(
        words=_VOCAB, positions=_POSITIONS, d_model=_BALANCE + 1, layers=3, heads=_HEADS, neurons=_HEADS
    )
    tokens, positions = torch.arange(_TOKEN, _POSITION), torch.arange(_POSITION, _PREVIOUS)
    with torch.no_grad():
        wiring.one_hot(model.transformer.wte.weight, _TOKEN)
        wiring.one_hot(model.transformer.wpe.weight, _POSITION)
        query, key, value, output = wiring.head(model, layer=0, head=1)
        root = query.shape[1] ** 0.5  # attention divides scores by it
        query[positions[1:], torch.arange(_POSITIONS - 1)] = _SHARPNESS * root
        key[positions, torch.arange(_POSITIONS)] = 1.0
        value[tokens, torch.arange(_VOCAB)] = 1.0
        wiring.one_hot(output[:_VOCAB], _PREVIOUS)
        for layer, number, written in ((1, 0, 1.0), (2, 1, share)):
            _induction(*wiring.head(model, layer, number), written=written, present=0.0 if layer == 1 else _PRESENT)
        model.lm_head.weight[torch.arange(_VOCAB), torch.arange(_OUTPUT, _BALANCE)] = _LOGIT_SCALE
    return model, vocabulary.tokenizer(WORDS, prepend_bos=True, max_length=_POSITIONS)


def _induction(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    written: float,
    present: float,
) -> None:
    """Fills views of one head's weights; a word that is in `output` already loses `present` of its score."""
    words, root = torch.arange(len(WORDS)), query.shape[1] ** 0.5
    match, there, rest = words, len(WORDS) + words, 2 * len(WORDS)
    tokens = _TOKEN + _SPECIAL + words
    query[tokens, match] = _MATCH * root
    key[_PREVIOUS + _SPECIAL + words, match] = 1.0
    query[_OUTPUT + _SPECIAL + words, there] = -present * root
    key[tokens, there] = 1.0
    query[_POSITION : _POSITION + _POSITIONS, rest] = _REST * root
    key[_TOKEN + vocabulary.BOS, rest] = 1.0
    value[tokens, words] = 1.0
    output[words, _OUTPUT + _SPECIAL + words] = written
    wiring.balance(output)
