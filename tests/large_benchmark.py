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
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark import settle, table
from tiny_models import tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tracepatch as tp

ONE, OTHER = 11, 22  # the metric is the difference of their logits at the last position
METRIC = tp.metric(lambda logits: logits[:, 0] - logits[:, 1], name="difference", vocab=(ONE, OTHER))
GIGABYTE = 1e9


def built(dtype: torch.dtype, device: str, layers: int, width: int) -> Any:
    """A Llama with random weights, drawn where it lies."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        intermediate_size=width * 43 // 16,
        vocab_size=32_000,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def prompts(tokens: int) -> tuple[Tensor, Tensor]:
    """A pair ``[pair, pos]`` that differs at two thirds of its length."""
    clean = torch.randint(32_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    corrupted = clean.clone()
    corrupted[0, tokens * 2 // 3] = (clean[0, tokens * 2 // 3] + 17) % 32_000
    return clean, corrupted


class Hooks:
    """One forward per patch: inputs of blocks, or of the matrix that heads are written through."""

    def __init__(self, module: Any, component: str) -> None:
        paths = {"resid_pre": "", "z": ".self_attn.o_proj"}
        self.module = module
        self.sites = [
            module.get_submodule(f"model.layers.{i}{paths[component]}") for i in range(len(module.model.layers))
        ]
        self.width = module.config.hidden_size // module.config.num_attention_heads
        self.kept: list[Tensor] = []

    def logits(self, ids: Tensor) -> Tensor:
        """Of the last position, ``[prompt, vocab]``."""
        found: Tensor = self.module(ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        return found

    def remember(self, clean: Tensor) -> None:
        """Keeps what passes each site of the clean prompt."""
        handles = [
            site.register_forward_pre_hook(lambda _, args: self.kept.append(args[0].clone())) for site in self.sites
        ]
        self.logits(clean)
        for handle in handles:
            handle.remove()

    def patched(self, corrupted: Tensor, layer: int, pos: int | None, head: int | None) -> Tensor:
        """The logits with the clean value in one place."""
        columns = slice(None) if head is None else slice(head * self.width, (head + 1) * self.width)
        at = (0, slice(None) if pos is None else pos, columns)
        handle = self.sites[layer].register_forward_pre_hook(
            lambda _, args: args[0].__setitem__((slice(None), *at[1:]), self.kept[layer][at])
        )
        found = self.logits(corrupted)
        handle.remove()
        return found


def timed(device: str, function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and the bytes that it took at most."""
    gc.collect()
    before = 0
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    found = function()
    settle()
    taken = time.perf_counter() - began
    return found, taken, torch.cuda.max_memory_allocated() - before if device != "cpu" else float("nan")


def sweeps(module: Any, device: str, samples: int, line: Callable[[Any], None]) -> None:
    """Patches positions and heads, under two budgets, and prints a line for each."""
    model = tp.load(module, tokenizer())
    for component, by, tokens in (("resid_pre", ("layer", "pos"), 40), ("z", ("layer", "head"), 40)):
        clean, corrupted = prompts(tokens)
        pairs, hooks = tp.Pairs(clean.tolist(), corrupted.tolist()), Hooks(module, component)
        clean, corrupted = clean.to(device), corrupted.to(device)
        hooks.remember(clean)
        layers, units = len(hooks.sites), tokens if component == "resid_pre" else module.config.num_attention_heads
        places = [(i % layers, i * 7 % units) for i in range(0, layers * units, max(1, layers * units // samples))]
        chosen = [(layer, unit, None) if component == "resid_pre" else (layer, None, unit) for layer, unit in places]
        hooks.patched(corrupted, *chosen[0])
        theirs, took, _ = timed(device, lambda: [hooks.patched(corrupted, *c)[0] for c in chosen])  # noqa: B023
        scale = float(max(one.abs().max() for one in theirs))
        beside = [hooks.patched(corrupted.expand(8, -1), *one)[0] for one in chosen]
        read = [float(one[ONE] - one[OTHER]) for one in theirs]
        alone = max(abs(float(b[ONE] - b[OTHER]) - r) for b, r in zip(beside, read, strict=True)) / scale
        for memory in (None, int(2 * GIGABYTE)):

            def ours(component: str = component, pairs: Any = pairs, by: Any = by, memory: Any = memory) -> Any:
                return tp.patch(model, pairs, component, METRIC, by=by, memory=memory, progress=False)

            found = ours()
            found, seconds, peak = timed(device, ours)
            values = found["value"].transpose("pair", *by).values[0]
            gap = max(abs(float(values[place]) - r) for place, r in zip(places, read, strict=True)) / scale
            measured = int((found["status"] == tp.Status.MEASURED).sum())
            budget = memory or tp.models.room_of(model) or float("nan")
            per = took / len(chosen)
            line(
                (
                    f"{component} by {by[1]}",
                    str(values.size),
                    str(measured),
                    f"{seconds:.2f} s",
                    f"{1e3 * per:.1f} ms",
                    f"{per * values.size / seconds:.1f}×",
                    f"{peak / GIGABYTE:.2f} GB",
                    f"{budget / GIGABYTE:.1f} GB",
                    f"{gap:.1e}",
                    f"{alone:.1e}",
                )
            )


def estimates(module: Any, device: str) -> None:
    """Attributes all heads and prints what it took beside two forwards and a backward."""
    model = tp.load(module, tokenizer())
    clean, corrupted = prompts(40)
    pairs = tp.Pairs(clean.tolist(), corrupted.tolist())
    tp.attribute(model, pairs, "z", METRIC, by=("layer", "head"))
    _, seconds, peak = timed(device, lambda: tp.attribute(model, pairs, "z", METRIC, by=("layer", "head")))
    print(f"\nattribution of all heads: {seconds:.2f} s, {peak / GIGABYTE:.2f} GB beside the model")


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
