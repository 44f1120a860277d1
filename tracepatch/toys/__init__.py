"""Four tiny trained models and one wired by hand, with their tokenizers: real answers in milliseconds, offline.

`gpt2`, `llama`, `gpt_neox` and `gemma2` are stock Hugging Face models of two or three layers that solve the tasks in
`tasks`; `train` is the script that trained them. `wired` is a GPT-2 whose circuit is known exactly.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracepatch import models
from tracepatch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tracepatch.models import Model

NAMES: tuple[str, ...] = ("gpt2", "llama", "gpt_neox", "gemma2")
"""The trained toys."""


def folder(name: str) -> Path:
    """The folder of a trained toy, which `AutoModelForCausalLM.from_pretrained` takes.

    Raises:
        ModelError: No trained toy has this name.
    """
    if name not in NAMES:
        raise ModelError(f"No toy is called {name!r}; the trained ones are {', '.join(NAMES)}.")
    return Path(__file__).parent / "weights" / name


def load_module(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """A toy as a Hugging Face module in eval mode and float32, and its tokenizer; nothing is downloaded.

    Args:
        name: One of `NAMES`, or `"wired"` for the model of `wired.wired` with its default saturation.

    Raises:
        ModelError: No toy has this name.
    """
    if name == "wired":
        from .wired import wired

        return wired()
    if name not in NAMES:
        raise ModelError(f"No toy is called {name!r}; there are {', '.join(NAMES)} and wired.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = folder(name)
    model = AutoModelForCausalLM.from_pretrained(where, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(where, local_files_only=True)


def load(name: str, **options: Any) -> "Model":
    """A toy, loaded as `tracepatch.load` loads any model.

    Args:
        name: One of `NAMES`, or `"wired"`.
        options: Those of `tracepatch.load`.

    Raises:
        ModelError: No toy has this name.
    """
    if name == "wired":
        return models.load(*load_module(name), **options)
    return models.load(folder(name), **options)
