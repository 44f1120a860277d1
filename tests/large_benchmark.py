"""A model of seven billion parameters on an accelerator: how exact its sweeps are, how fast, and in how much memory.

``python tests/large_benchmark.py`` builds a Llama of that size with random weights, in float32 and in bfloat16, patches
it and prints a table of each. A sample of the patches is also run one forward each through plain hooks, which gives the
ratio and the ``difference``, in parts of the largest logit. ``alone`` is the same difference between hooks and hooks
when the prompt runs in a batch of eight: what rounding does to this model in this dtype. ``peak`` is what the allocator
had given out at most beside the model, ``budget`` what it might. ``--layers 2 --width 256 --device cpu`` tries it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from benchmark import DECLARED, ONE, OTHER, Family, Hooks, Patch, Place, Site, Sweep, metrics, seconds, table
from tiny_models import tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tracepatch as tp

METRIC = metrics()[DECLARED]
GIGABYTE = 1e9
D_HEAD = 128
VOCAB = 32_000
PLACES = {"resid_pre": Place("", "input"), "z": Place("self_attn.o_proj", "input", d_head=D_HEAD)}
SWEEPS = [
    Sweep("residual-40", "resid_pre", ("layer", "pos"), tokens=40, vocab=VOCAB),
    Sweep("heads-40", "z", ("layer", "head"), tokens=40, vocab=VOCAB),
]


def built(dtype: torch.dtype, device: str, layers: int, width: int) -> Any:
    """A Llama with random weights, drawn where it lies."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // D_HEAD,
        num_key_value_heads=width // D_HEAD,
        intermediate_size=width * 43 // 16,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def timed(device: str, function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and the bytes that it took at most."""
    gc.collect()
    before = 0
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    given: list[Any] = []
    taken = seconds(lambda: given.append(function()))
    return given[0], taken, torch.cuda.max_memory_allocated() - before if device != "cpu" else float("nan")


def read(hooks: Hooks, ids: Tensor, patches: Iterable[Patch]) -> list[tuple[float, float]]:
    """Of the first prompt with each patch: the metric's value, and the largest logit."""
    every = (hooks.last_logits(ids, patch)[0].float() for patch in patches)
    return [(float(logits[ONE] - logits[OTHER]), float(logits.abs().max())) for logits in every]


def sweeps(module: Any, device: str, samples: int, line: Callable[[Sequence[str]], None]) -> None:
    """Patches positions and heads, under two budgets, and prints a line for each."""
    model, heads = tp.load(module, tokenizer()), module.config.num_attention_heads
    family = Family(lambda: module, "model", "model.layers", heads, PLACES)
    for sweep in SWEEPS:
        clean, corrupted = (ids.to(device) for ids in sweep.prompts())
        pairs, hooks = tp.Pairs(clean.tolist(), corrupted.tolist()), Hooks(module, family)
        hooks.remember(clean, sweep.component)
        layers, dim = len(module.model.layers), sweep.by[1]
        units = sweep.tokens if dim == "pos" else heads
        places = [(i % layers, i * 7 % units) for i in range(0, layers * units, max(1, layers * units // samples))]
        patches = [(Site(sweep.component, layer, **{dim: unit}),) for layer, unit in places]
        read(hooks, corrupted, patches[:1])
        theirs, took, _ = timed(device, partial(read, hooks, corrupted, patches))
        scale = max(largest for _, largest in theirs)
        beside = read(hooks, corrupted.expand(8, -1), patches)
        alone = max(abs(one[0] - other[0]) for one, other in zip(theirs, beside, strict=True)) / scale
        for memory in (None, int(2 * GIGABYTE)):
            options = {"by": sweep.by, "memory": memory, "progress": False}
            ours = partial(tp.patch, model, pairs, sweep.component, METRIC, **options)
            ours()
            found, best, peak = timed(device, ours)
            values = found["value"].transpose("pair", *sweep.by).values[0]
            gap = max(abs(float(values[place]) - one[0]) for place, one in zip(places, theirs, strict=True)) / scale
            measured = int((found["status"] == tp.Status.MEASURED).sum())
            budget = memory or tp.models.room_of(model) or float("nan")
            per = took / len(patches)
            line(
                (
                    sweep.name,
                    str(values.size),
                    str(measured),
                    f"{best:.2f} s",
                    f"{1e3 * per:.1f} ms",
                    f"{per * values.size / best:.1f}×",
                    f"{peak / GIGABYTE:.2f} GB",
                    f"{budget / GIGABYTE:.1f} GB",
                    f"{gap:.1e}",
                    f"{alone:.1e}",
                )
            )


def estimates(module: Any, device: str) -> None:
    """Attributes all heads and prints what it took beside two forwards and a backward."""
    model = tp.load(module, tokenizer())
    pairs = tp.Pairs(*(ids.tolist() for ids in SWEEPS[1].prompts()))
    estimate = partial(tp.attribute, model, pairs, "z", METRIC, by=("layer", "head"))
    estimate()
    _, took, peak = timed(device, estimate)
    print(f"\nattribution of all heads: {took:.2f} s, {peak / GIGABYTE:.2f} GB beside the model")


def main() -> None:
    """Prints what the command line asks for."""
    parser = argparse.ArgumentParser(description="A large model on an accelerator.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    asked = parser.parse_args()
    for dtype in asked.dtype:
        module = built(getattr(torch, dtype), asked.device, asked.layers, asked.width)
        size = sum(p.numel() for p in module.parameters())
        print(f"\nLlama, {size / 1e9:.2f} billion parameters in {dtype}, {asked.layers} layers, 40 tokens\n")
        head = ("rows", "measured", "tracepatch", "a forward", "vs hooks", "peak", "budget", "difference", "alone")
        with torch.no_grad():
            sweeps(module, asked.device, asked.samples, table(("sweep", *head)))
        estimates(module, asked.device)
        del module
        gc.collect()


if __name__ == "__main__":
    main()
