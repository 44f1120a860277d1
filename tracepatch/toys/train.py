"""Trains the toy models: `python -m tracepatch.toys.train [--model gpt2 ...] [--out DIR]`, a minute or two for each.

Each model learns both tasks of `tasks` at once, from prompts that are drawn anew for every step. The loss is the
cross-entropy of the answer at the last token plus the ordinary language modelling loss. The pool of first names grows
from 12 to 64 as the model masters it: with all 64 from the start, training can stay at guessing between the two names.
When both tasks are mastered with all of them, the learning rate falls to zero. A run is deterministic: on one machine,
the same command gives the same weights.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tracepatch.errors import ModelError

from . import NAMES, folder, tasks, vocabulary

LENGTH = 64
"""The longest input of every toy, in tokens."""

_FIRST_NAMES, _MORE_NAMES, _MASTERED = 12, 4, 0.9
_BATCH, _WARMUP, _SETTLE, _GOOD = 64, 50, 200, 0.99
_CHECK_EVERY, _HELD_OUT, _HELD_OUT_SEED = 50, 512, -1


@dataclass(frozen=True)
class Recipe:
    """How one toy is built and trained.

    Attributes:
        config: The architecture.
        seed: Seeds the initial weights and the prompts.
        lr: AdamW's learning rate after the warm-up.
        prepend_bos: Whether the tokenizer puts `<bos>` before every text.
    """

    config: PreTrainedConfig
    seed: int
    lr: float = 2e-3
    prepend_bos: bool = False


def recipe(name: str) -> Recipe:
    """The recipe of one of `NAMES`.

    Raises:
        ModelError: No trained toy has this name.
    """
    words = 4 + len(vocabulary.task_words())
    ids = {"pad_token_id": vocabulary.PAD, "eos_token_id": vocabulary.EOS, "bos_token_id": vocabulary.BOS}
    common = {
        "vocab_size": words,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        **ids,
    }
    match name:
        case "gpt2":
            sizes = {"vocab_size": words, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": LENGTH}
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return Recipe(GPT2Config(**sizes, **dropout, **ids), seed=2)
        case "llama":
            config = LlamaConfig(**common, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=176)
            return Recipe(config, seed=0, prepend_bos=True)
        case "gpt_neox":
            rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            config = GPTNeoXConfig(**common, num_hidden_layers=2, intermediate_size=256, rope_parameters=rotary)
            return Recipe(config, seed=0)
        case "gemma2":
            config = Gemma2Config(
                **common,
                num_hidden_layers=3,
                num_key_value_heads=2,
                head_dim=16,
                intermediate_size=128,
                query_pre_attn_scalar=24,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                sliding_window=8,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=15.0,
            )
            return Recipe(config, seed=0, prepend_bos=True)
    raise ModelError(f"No toy is called {name!r}; the trained ones are {', '.join(NAMES)}.")


def encode(tokenizer: PreTrainedTokenizerFast, prompts: tasks.Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean prompts with their answers, (pair, pos), padded on the right, and the answers' positions, (pair,)."""
    texts = [text + answer for text, answer in zip(prompts.clean, prompts.answer, strict=True)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].sum(dim=1) - 1


def losses(model: PreTrainedModel, tokens: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss, in nats, and whether each pair's answer has the highest logit of all words, (pair,)."""
    mask = (tokens[:, :-1] != vocabulary.PAD).long()
    logits = model(input_ids=tokens[:, :-1], attention_mask=mask, use_cache=False).logits
    last = logits[torch.arange(len(tokens)), end - 1]
    answer = tokens[torch.arange(len(tokens)), end]
    language = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=vocabulary.PAD)
    return functional.cross_entropy(last, answer) + language, last.argmax(dim=-1) == answer


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Literal["ioi", "induction"], n: int, seed: int
) -> float:
    """The share of `n` clean prompts whose answer has the highest logit of all words."""
    prompts = getattr(tasks, task)(n, seed=seed)
    return float(losses(model, *encode(tokenizer, prompts))[1].float().mean())


@dataclass(frozen=True)
class Progress:
    """One line of a training run; the shares are measured on held-out prompts, with all names."""

    step: int
    loss: float
    names: int
    ioi: float
    induction: float
    settling: bool
    minutes: float

    def __str__(self) -> str:
        phase = "settle" if self.settling else f"{self.names} names"
        return (
            f"step {self.step:5d}  {phase:8s}  loss {self.loss:.3f}  ioi {self.ioi:.4f}  "
            f"induction {self.induction:.4f}  {self.minutes:.1f} min"
        )


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, lr: float, steps: int
) -> Iterator[Progress]:
    """Trains `model` in place and yields its progress from time to time.

    When both tasks reach 99 % with all names, the learning rate falls to zero over the last 200 steps.

    Args:
        model: Initialised, its parameters are changed.
        tokenizer: Fits the model.
        seed: Seeds the prompts.
        lr: AdamW's learning rate after the warm-up.
        steps: Training ends here at the latest.
    """
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    names, end_of_run, settling, learned = _FIRST_NAMES, steps, False, 0.0
    model.train()
    for step in range(1, steps + 1):
        decay = (end_of_run - step) / _SETTLE if settling else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / _WARMUP) * decay
        draw = (seed + 1) * 1_000_000 + step
        ioi_loss, right = losses(model, *encode(tokenizer, tasks.ioi(_BATCH, seed=draw, names=tasks.NAMES[:names])))
        induction_loss, _ = losses(model, *encode(tokenizer, tasks.induction(_BATCH, seed=draw)))
        loss = (ioi_loss + induction_loss) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        learned += 0.1 * (float(right.float().mean()) - learned)
        if learned > _MASTERED and names < len(tasks.NAMES):
            names, learned = min(names + _MORE_NAMES, len(tasks.NAMES)), 0.8
        if step % _CHECK_EVERY == 0 or step == end_of_run:
            model.eval()
            ioi, induction = (
                accuracy(model, tokenizer, task, _HELD_OUT, seed=_HELD_OUT_SEED) for task in ("ioi", "induction")
            )
            model.train()
            if not settling and names == len(tasks.NAMES) and min(ioi, induction) >= _GOOD:
                settling, end_of_run = True, min(step + _SETTLE, steps)
            yield Progress(
                step, float(loss.detach()), names, ioi, induction, settling, (time.perf_counter() - began) / 60
            )
        if step == end_of_run:
            break
    model.eval()


def main(
    model: Annotated[list[str], typer.Option(help="Which toys to train.")] = list(NAMES),  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: the package's own weights.")
    ] = None,
    target: Annotated[float, typer.Option(help="Accuracy that both tasks must end with.")] = 0.99,
    steps: Annotated[int, typer.Option(min=1, help="Training ends here at the latest.")] = 4000,
) -> None:
    """Train toy models on both tasks and save them with their tokenizers."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    failed = []
    for name in model:
        chosen = recipe(name)
        torch.manual_seed(chosen.seed)
        network = AutoModelForCausalLM.from_config(chosen.config, dtype=torch.float32)
        tokenizer = vocabulary.tokenizer(vocabulary.task_words(), prepend_bos=chosen.prepend_bos, max_length=LENGTH)
        typer.echo(f"{name}: {network.num_parameters():,} parameters, seed {chosen.seed}")
        for progress in train(network, tokenizer, seed=chosen.seed, lr=chosen.lr, steps=steps):
            typer.echo(str(progress))
        if min(progress.ioi, progress.induction) < target:
            failed.append(name)
        destination = folder(name) if out is None else out / name
        network.save_pretrained(destination)
        tokenizer.save_pretrained(destination)
    if failed:
        typer.echo(f"below {target:.1%} after {steps} steps or at the end of settling: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
