"""A GPT-2 wired by hand whose heads are the two inputs of an AND gate, an OR gate, or of no gate at all.

A prompt says *hot* or *cold*, later *wet* or *dry*, and ends in a word that says which gate to apply: *both* (is it hot
and wet?), *either* (is it hot or wet?) or *first* (is it hot?). The model answers *yes* or *no*. All other words mean
nothing to it.

Two of the heads read, and one MLP decides:

* Head L0H0 attends to *hot* or *cold*, wherever it stands, and writes a = 1 for *hot*, 0 for *cold*.
* Head L0H1 attends to *wet* or *dry* and writes b = 1 for *wet*, 0 for *dry*.
* The MLP of layer 1 writes f. With ReLU neurons that are off unless the last word is theirs, f is
  2·relu(a + b − 3/2) after *both*, 2·relu(a + b − 1/4) − 2·relu(a + b − 3/4) after *either*, a after *first*.

The logit of *yes* is 10·f and that of *no* is 5, so their difference is 5 where f is 1 and −5 where it is 0. Everything
else writes exactly 0; `wiring` says why LayerNorm does not matter.

In `gate_pairs` the clean prompt says *hot* and *wet*, the corrupted one *cold* and *dry*. Patching what a head writes
at the last token has these normalized effects (Heimersheim & Nanda 2024, arXiv:2404.15255, call the first kind an AND
and the second an OR):

| patched | both: denoising | both: noising | either: denoising | either: noising | first: denoising | first: noising |
|---|---|---|---|---|---|---|
| L0H0 | 0 | −1 | 1 | 0 | 1 | −1 |
| L0H1 | 0 | −1 | 1 | 0 | 0 | 0 |
| L0H0 and L0H1 | 1 | −1 | 1 | −1 | 1 | −1 |
| MLP 1 | 1 | −1 | 1 | −1 | 1 | −1 |

So an input of the AND is necessary and not sufficient, an input of the OR is sufficient and not necessary. With clean
and corrupted exchanged, an AND is an OR (not hot or not wet) and the other way round: these pairs have one role.

Gradients know less. At the prompts themselves the OR is flat, so attribution patching gives its inputs 0 in both
directions; the AND is flat where it is off and has slope 2 where it is on, so that noising is estimated as −2 for each
input; after *first*, estimates are exact.
"""

import random

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from . import tasks, vocabulary, wiring

LENGTH = 8
"""Tokens in each prompt of `gate_pairs`."""
GATES: dict[str, str] = {"and_gate": "both", "or_gate": "either", "one_input": "first"}
"""Each gate, and the last word of its prompts."""

_FILLERS = tasks.WORDS[:12]
_WORDS = ("hot", "cold", "wet", "dry", *GATES.values(), "yes", "no", *_FILLERS)
_POSITIONS, _HEADS = 16, 4
_IS_FIRST, _FIRST, _IS_SECOND, _SECOND, _BOTH, _EITHER, _ONE, _ALWAYS, _A, _B, _F, _BALANCE = range(12)
_MEANINGS = {
    "hot": (_IS_FIRST, _FIRST),
    "cold": (_IS_FIRST,),
    "wet": (_IS_SECOND, _SECOND),
    "dry": (_IS_SECOND,),
    "both": (_BOTH,),
    "either": (_EITHER,),
    "first": (_ONE,),
}
# Per neuron: its gate's word, what it reads besides, its bias after that word (2 less after others), what it adds to f.
_NEURONS = (
    (_BOTH, (_A, _B), -1.5, 2.0),
    (_EITHER, (_A, _B), -0.25, 2.0),
    (_EITHER, (_A, _B), -0.75, -2.0),
    (_ONE, (_A,), 0.5, 1.0),
)
_SHARPNESS, _LOGIT_SCALE = 60.0, 10.0


def gates() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The model with the gates, in eval mode and float32, and its tokenizer."""
    tokenizer = vocabulary.tokenizer(_WORDS, prepend_bos=False, max_length=_POSITIONS)
    model = wiring.blank(
        words=len(tokenizer),
        positions=_POSITIONS,
        d_model=_BALANCE + 1,
        layers=2,
        heads=_HEADS,
        neurons=len(_NEURONS),
        activation="relu",
    )
    with torch.no_grad():
        for word, dimensions in _MEANINGS.items():
            model.transformer.wte.weight[tokenizer.convert_tokens_to_ids(word), list(dimensions)] = 1.0
        wiring.balance(model.transformer.wte.weight)
        model.transformer.wpe.weight[:, _ALWAYS] = 1.0
        wiring.balance(model.transformer.wpe.weight)
        for number, (where, what, result) in enumerate(((_IS_FIRST, _FIRST, _A), (_IS_SECOND, _SECOND, _B))):
            query, key, value, output = wiring.head(model, layer=0, head=number)
            query[_ALWAYS, 0] = _SHARPNESS * query.shape[1] ** 0.5  # attention divides by this root
            key[where, 0] = 1.0
            value[what, 0] = 1.0
            output[0, result] = 1.0
            wiring.balance(output)
        mlp = model.transformer.h[1].mlp
        for neuron, (gate, inputs, bias, added) in enumerate(_NEURONS):
            mlp.c_fc.weight[list(inputs), neuron] = 1.0
            mlp.c_fc.weight[gate, neuron] = 2.0
            mlp.c_fc.bias[neuron] = bias - 2.0
            mlp.c_proj.weight[neuron, _F] = added
        wiring.balance(mlp.c_proj.weight)
        yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        model.lm_head.weight[yes, _F] = _LOGIT_SCALE
        # After "first", f is a + 1/2, so that its neuron is nowhere at its kink.
        model.lm_head.weight[no, [_ALWAYS, _ONE]] = _LOGIT_SCALE / 2
    return model, tokenizer


def gate_pairs(gate: str, n: int, seed: int = 0) -> tasks.Prompts:
    """Prompts of 8 words: clean says *hot* and *wet*, corrupted *cold* and *dry*; the answer is *yes*, wrong is *no*.

    The inputs are the second and the fifth word, so that pairs can be averaged position by position; the heads find
    them anywhere.

    Args:
        gate: Which word they end in, a key of `GATES`.
        n: How many pairs.
        seed: The same seed gives the same pairs; those of all gates differ in their last words only.
    """
    rng = random.Random(f"gates {seed}")
    prompts = tasks.Prompts([], [], [], [])
    for _ in range(n):
        others = rng.sample(_FILLERS, LENGTH - 3)
        for texts, one, other in ((prompts.clean, "hot", "wet"), (prompts.corrupted, "cold", "dry")):
            texts.append(" ".join([others[0], one, *others[1:3], other, *others[3:], GATES[gate]]))
        prompts.answer.append(" yes")
        prompts.wrong.append(" no")
    return prompts
