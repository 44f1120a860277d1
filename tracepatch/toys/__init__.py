"""Four tiny trained models and one wired by hand, with their tokenizers: real answers in milliseconds, offline.

`gpt2`, `llama`, `gpt_neox` and `gemma2` are stock Hugging Face models of two or three layers that solve the tasks in
`tasks`; `train` is the script that trained them. `wired` is a GPT-2 whose circuit is known exactly.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracepatch import models
from tracepatch.errors import ModelError, PromptError
from tracepatch.prompts import Pairs
from tracepatch.toys import tasks

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


def load(toy: str, **options: Any) -> "Model":
    """A toy, loaded as `tracepatch.load` loads any model.

    Args:
        toy: One of `NAMES`, or `"wired"`.
        options: Those of `tracepatch.load`.

    Raises:
        ModelError: No toy has this name.
    """
    options = {"name": f"toy-{toy}", **options}
    if toy == "wired":
        return models.load(*load_module(toy), **options)
    return models.load(folder(toy), **options)


def pairs(task: str, count: int = 8, *, seed: int = 0) -> "Pairs":
    """Prompts of a task that the trained toys solve, of equal lengths and in both roles.

    Args:
        task: ``"ioi"`` (one template) or ``"induction"``; `tasks` makes more kinds.
        count: How many pairs; half of them are the other half with clean and corrupted exchanged.
        seed: The same seed gives the same pairs.

    Raises:
        PromptError: There is no such task.
    """
    if task == "ioi":
        made = tasks.ioi((count + 1) // 2, seed=seed, templates=tasks.TEMPLATES[:1])
    elif task == "induction":
        made = tasks.induction((count + 1) // 2, seed=seed)
    else:
        raise PromptError(f"There is no task {task!r}; the toys solve 'ioi' and 'induction'.")
    return Pairs(made.clean, made.corrupted, made.answer, made.wrong, name=task, seed=seed).both_roles()
