"""The toys' tokenizers: one id for each word, built in code.

Words and punctuation are split as in `"to the store, John"` → `to`, `the`, `store`, `,`, `John`. Spaces only separate,
so `" Mary"` and `"Mary"` have the same id. The special tokens have the ids of Gemma's tokenizer.
"""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from . import tasks

PAD, EOS, BOS, UNK = range(4)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def task_words() -> tuple[str, ...]:
    """Every word and punctuation mark that the tasks can produce, each once, in a fixed order."""
    texts = (re.sub(r"\{\w+\}", " ", text) for text in tasks.TEMPLATES)
    found = [token for text in texts for token in re.findall(r"\w+|[^\w\s]+", text)]
    return tuple(dict.fromkeys([*found, *tasks.NAMES, *tasks.PLACES, *tasks.OBJECTS, *tasks.WORDS]))


def tokenizer(
    words: Iterable[str], *, prepend_bos: bool, max_length: int, two_digits: bool = False
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for `words`; anything else becomes `<unk>`.

    Args:
        words: Single words or punctuation marks; their ids follow the four special tokens, in order.
        prepend_bos: Whether encoding a text puts `<bos>` before it, as Llama's and Gemma's tokenizers do.
        max_length: The longest input, in tokens, that the model takes.
        two_digits: Whether numbers are split into pieces of two digits, as in `"1732"` → `17`, `32`.
    """
    ids = {word: i for i, word in enumerate(dict.fromkeys([*_SPECIAL, *words]))}
    backend = Tokenizer(WordLevel(ids, unk_token=_SPECIAL[UNK]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if two_digits:
        digits = pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, digits])
    if prepend_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[(_SPECIAL[BOS], BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_SPECIAL[PAD],
        eos_token=_SPECIAL[EOS],
        bos_token=_SPECIAL[BOS],
        unk_token=_SPECIAL[UNK],
        model_max_length=max_length,
        padding_side="right",
    )
