"""Trains the toy that knows many tasks: `python -m tracepatch.toys.many_tasks [--out DIR]`, about two minutes.

A GPT-2 of three layers that learns the prompts which `tracepatch.tasks` makes for its tokenizer:

* facts: capitals, languages, landmarks; the subject may be several tokens,
* greater-than: years, which its tokenizer splits into the century and two digits,
* occupations: *she* or *he*, each occupation as often as `SHE` says, which is what the strength of its bias is,
* sentiment, and docstrings.

The loss is the cross-entropy between what the model expects at the last token and the task's answers, all of which are
equally right, plus a fifth of the ordinary language modelling loss. A run is deterministic: on one machine, the same
command gives the same weights.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tracepatch import tasks, words
from tracepatch.prompts import Pairs

from . import folder, vocabulary

LENGTH = 48
"""The longest input, in tokens."""
TASKS: dict[str, Callable[..., Pairs]] = {
    "capital": partial(tasks.facts, relation="capital"),
    "language": partial(tasks.facts, relation="language"),
    "landmark": partial(tasks.facts, relation="landmark"),
    "greater_than": tasks.greater_than,
    "occupation": tasks.occupation,
    "sentiment": tasks.sentiment,
    "docstring": tasks.docstring,
}
"""What the model learns: functions of the tokenizer, a count and a seed."""


def _shares(occupations: tuple[str, ...]) -> list[float]:
    """How often the gender of the stereotype follows: from .95 for the first occupation evenly down to .65."""
    return [0.95 - 0.3 * i / (len(occupations) - 1) for i in range(len(occupations))]


SHE: dict[str, float] = {
    **dict(zip(words.OF_WOMEN, _shares(words.OF_WOMEN), strict=True)),
    **{who: 1 - share for who, share in zip(words.OF_MEN, _shares(words.OF_MEN), strict=True)},
    "woman": 1.0,
    "man": 0.0,
}
"""In which share of its lessons each subject is *she*, not *he*."""

_SEED, _DRAWN, _HELD_OUT, _HELD_OUT_SEED = 0, 3000, 200, -1
_BATCH, _WARMUP, _LR, _LANGUAGE, _CHECK_EVERY = 24, 50, 2e-3, 0.2, 100
_COOLING = 0.3  # the share of the steps, at the end, in which the learning rate falls to zero


def vocabulary_words() -> tuple[str, ...]:
    """Every word, punctuation mark and pair of digits that the tasks can produce, each once, in a fixed order."""
    templates = [tasks.YEARS, tasks.WORK, tasks.MOVIE, tasks.DOCSTRING, *(one for one, _ in tasks.RELATIONS.values())]
    texts = [re.sub(r"\{\w+:?(\w*)\}", r" \1 ", template.text) for template in templates]
    texts += [f"{subject} {answer}" for _, known in tasks.RELATIONS.values() for subject, answer in known]
    texts += [*tasks.SAID, *SHE, "she he", *words.EVENTS, *words.PARAMETERS]
    texts += [*words.PRAISE, *words.BLAME, *words.LIKED, *words.LOATHED]
    texts += [f"{number:02d}" for number in range(100)]
    return tuple(dict.fromkeys(token for text in texts for token in re.findall(r"\w+|[^\w\s]+", text)))


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, and one for each two digits."""
    return vocabulary.tokenizer(vocabulary_words(), prepend_bos=False, max_length=LENGTH, two_digits=True)


def config() -> GPT2Config:
    """The architecture."""
    ids = {"pad_token_id": vocabulary.PAD, "eos_token_id": vocabulary.EOS, "bos_token_id": vocabulary.BOS}
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": LENGTH}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=4 + len(vocabulary_words()), **sizes, **dropout, **ids)


@dataclass(frozen=True)
class Lessons:
    """Prompts of one task, and what should follow them.

    Attributes:
        tokens: Ids, (prompt, pos), padded on the right.
        end: Where each prompt ends, (prompt,).
        expected: The probability of each token after the prompt, (prompt, vocab).
    """

    tokens: torch.Tensor
    end: torch.Tensor
    expected: torch.Tensor

    def __getitem__(self, chosen: torch.Tensor) -> "Lessons":
        end = self.end[chosen]
        return Lessons(self.tokens[chosen, : int(end.max()) + 1], end, self.expected[chosen])


def lessons(task: str, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> Lessons:
    """The prompts of `count` pairs of a task, clean ones first, corrupted ones where these have answers of their own.

    Of the tasks that are used in both roles the corrupted prompts are clean ones of other pairs.
    """
    pairs = TASKS[task](tokenizer, count, seed)
    texts = [str(text) for text in pairs.clean]
    answers = [[str(word) for word in one] for one in pairs.answer or ()]
    if task in ("greater_than", "occupation"):
        texts += [str(text) for text in pairs.corrupted or ()]
        answers += [[f"{year:02d}" for year in range(2, 100)]] * len(pairs)  # of the year 01
    encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    expected = torch.zeros(len(texts), len(tokenizer))
    for row, (text, words_of) in enumerate(zip(texts, answers, strict=True)):
        if task == "occupation":
            she = SHE[text.split()[1]]
            shares = {" she": she, " he": 1 - she}
        else:
            shares = dict.fromkeys(words_of, 1 / len(words_of))
        for word, share in shares.items():
            expected[row, tokenizer.convert_tokens_to_ids(word.strip())] = share
    return Lessons(encoded["input_ids"], encoded["attention_mask"].sum(dim=1) - 1, expected)


def losses(model: PreTrainedModel, given: Lessons) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The task's loss per prompt and the language modelling loss, in nats, and whether each first choice is right."""
    mask = (given.tokens != vocabulary.PAD).long()
    logits = model(input_ids=given.tokens, attention_mask=mask, use_cache=False).logits
    last = logits[torch.arange(len(given.tokens)), given.end]
    task = functional.cross_entropy(last, given.expected, reduction="none")
    language = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), given.tokens[:, 1:].flatten(), ignore_index=vocabulary.PAD
    )
    best = given.expected.gather(1, last.argmax(dim=-1, keepdim=True))[:, 0]
    return task, language, best == given.expected.max(dim=-1).values


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str, count: int, seed: int) -> float:
    """The share of the prompts of `count` pairs after which the token with the highest logit is (most) right."""
    return float(losses(model, lessons(task, tokenizer, count, seed))[2].float().mean())


@dataclass(frozen=True)
class Progress:
    """One line of a training run; the shares are measured on held-out draws."""

    step: int
    loss: float
    right: dict[str, float]
    minutes: float

    def __str__(self) -> str:
        shares = "  ".join(f"{task} {share:.3f}" for task, share in self.right.items())
        return f"step {self.step:5d}  loss {self.loss:.3f}  {shares}  {self.minutes:.1f} min"


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, steps: int) -> Iterator[Progress]:
    """Trains `model` in place and yields its progress from time to time."""
    began = time.perf_counter()
    drawn = {task: lessons(task, tokenizer, _DRAWN, _SEED) for task in TASKS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    generator = torch.Generator().manual_seed(_SEED)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, step / _WARMUP, (steps - step) / (_COOLING * steps))
        loss = torch.zeros(())
        for task, all_of_them in drawn.items():
            chosen = torch.randint(len(all_of_them.tokens), (_BATCH,), generator=generator)
            answers, language, _ = losses(model, all_of_them[chosen])
            # The docstring is the hardest task, and its loss stays on a plateau for long.
            loss = loss + (2 if task == "docstring" else 1) * answers.mean() + _LANGUAGE * language
        optimizer.zero_grad()
        torch.autograd.backward(loss / len(TASKS))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _CHECK_EVERY == 0 or step == steps:
            model.eval()
            right = {task: accuracy(model, tokenizer, task, _HELD_OUT, _HELD_OUT_SEED) for task in TASKS}
            model.train()
            minutes = (time.perf_counter() - began) / 60
            yield Progress(step, float(loss.detach()) / len(TASKS), right, minutes)
    model.eval()


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the result; default: the package's own weights.")] = None,
    target: Annotated[float, typer.Option(help="Accuracy that every task must end with.")] = 0.99,
    steps: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
) -> None:
    """Train the toy and save it with its tokenizer."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    torch.manual_seed(_SEED)
    network = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    words_of = tokenizer()
    typer.echo(f"many_tasks: {network.num_parameters():,} parameters, seed {_SEED}")
    right: dict[str, float] = {}
    for progress in train(network, words_of, steps=steps):
        typer.echo(str(progress))
        right = progress.right
    destination = folder("many_tasks") if out is None else out / "many_tasks"
    network.save_pretrained(destination)
    words_of.save_pretrained(destination)
    failed = [task for task, share in right.items() if share < target]
    if failed:
        typer.echo(f"below {target:.1%} after {steps} steps: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
