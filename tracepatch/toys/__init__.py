"""Tiny models with their tokenizers, offline and in milliseconds: five trained ones, and three wired by hand.

`gpt2`, `llama`, `gpt_neox` and `gemma2` are stock Hugging Face models of two or three layers that solve the two tasks
in `tasks`; `train` is the script that trained them. `many_tasks` is a GPT-2 that knows facts, compares years, has
stereotypes, tells praise from blame and completes docstrings, trained by `many_tasks`.

The circuits of the others are known exactly, as they were put there: `wired` does induction, `gates` has inputs that
are necessary only and inputs that are sufficient only, and `backup_heads` has a head that takes over from another.
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
"""The trained toys that solve the tasks of `tasks`, one of each architecture."""
TRAINED: tuple[str, ...] = (*NAMES, "many_tasks")
"""All trained toys."""
WIRED: tuple[str, ...] = ("wired", "gates", "backup_heads")
"""The toys wired by hand."""
TASKS: tuple[str, ...] = ("ioi", "induction", "and_gate", "or_gate", "one_input", "wired", "backup_heads")
"""What `pairs` makes; the prompts of `many_tasks` are made by `tracepatch.tasks`."""


def folder(name: str) -> Path:
    """The folder of a trained toy, which `AutoModelForCausalLM.from_pretrained` takes.

    Raises:
        ModelError: No trained toy has this name.
    """
    if name not in TRAINED:
        raise ModelError(f"No toy is called {name!r}; the trained ones are {', '.join(TRAINED)}.")
    return Path(__file__).parent / "weights" / name


def load_module(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """A toy as a Hugging Face module in eval mode and float32, and its tokenizer; nothing is downloaded.

    Args:
        name: One of `TRAINED`, or of `WIRED` for a model wired by hand with its default numbers.

    Raises:
        ModelError: No toy has this name.
    """
    if name in WIRED:
        from .backup import backup_heads
        from .gates import gates
        from .wired import wired

        return {"wired": wired, "gates": gates, "backup_heads": backup_heads}[name]()
    if name not in TRAINED:
        raise ModelError(f"No toy is called {name!r}; there are {', '.join(TRAINED + WIRED)}.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = folder(name)
    model = AutoModelForCausalLM.from_pretrained(where, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(where, local_files_only=True)


def load(toy: str, **options: Any) -> "Model":
    """A toy, loaded as `tracepatch.load` loads any model.

    Args:
        toy: One of `TRAINED` or `WIRED`.
        options: Those of `tracepatch.load`.

    Raises:
        ModelError: No toy has this name.
    """
    options = {"name": f"toy-{toy}", **options}
    if toy in TRAINED:
        return models.load(folder(toy), **options)
    return models.load(*load_module(toy), **options)


def pairs(task: str, count: int = 8, *, seed: int = 0) -> "Pairs":
    """Prompts of a task that some of the toys solve, of equal lengths.

    They are in both roles, half of them being the other half with clean and corrupted exchanged; those of the gates
    are not, as an AND with its roles exchanged is an OR.

    Args:
        task: One of `TASKS`: ``"ioi"`` (one template) and ``"induction"`` for the models of `NAMES`, ``"and_gate"``,
            ``"or_gate"`` and ``"one_input"`` for ``"gates"``, ``"wired"`` and ``"backup_heads"`` for the models of that
            name.
        count: How many pairs.
        seed: The same seed gives the same pairs.

    Raises:
        PromptError: There is no such task.
    """
    from .gates import GATES, gate_pairs
    from .wired import wired_pairs

    if task not in TASKS:
        raise PromptError(f"There is no task {task!r}; the toys solve {', '.join(map(repr, TASKS))}.")
    if task in GATES:
        made = gate_pairs(task, count, seed=seed)
        return Pairs(made.clean, made.corrupted, made.answer, made.wrong, name=task, seed=seed)
    half = (count + 1) // 2
    if task == "ioi":
        made = tasks.ioi(half, seed=seed, templates=tasks.TEMPLATES[:1])
    elif task == "induction":
        made = tasks.induction(half, seed=seed)
    else:
        made = wired_pairs(half, seed=seed)
    return Pairs(made.clean, made.corrupted, made.answer, made.wrong, name=task, seed=seed).both_roles()
