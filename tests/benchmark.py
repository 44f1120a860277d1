"""Ratios measured in one run: what planning saves against one forward per patch, and what recording and planning cost.

``python tests/benchmark.py`` runs on a GPT-2 of the size of GPT-2 small with random weights, on one thread. The pair's first
differing token stands at two thirds of the prompt. Both sides compute the same numbers; the largest difference is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import tracepatch as tp

LAYERS, HEADS, WIDTH, VOCAB = 12, 12, 768, 50257


def one_forward_per_patch(module: Any, clean: torch.Tensor, corrupted: torch.Tensor, heads: bool) -> torch.Tensor:
    """The sweep with plain hooks, in the order of the result."""
    kept: dict[int, torch.Tensor] = {}
    blocks = module.transformer.h
    places = [b.attn.c_proj for b in blocks] if heads else list(blocks)

    def keep(i: int) -> Callable[..., None]:
        return lambda m, args: kept.__setitem__(i, args[0].clone())

    handles = [m.register_forward_pre_hook(keep(i)) for i, m in enumerate(places)]
    module(clean)
    for handle in handles:
        handle.remove()
    found = []
    for i, place in enumerate(places):
        for j in range(HEADS if heads else clean.shape[1]):

            def write(m: Any, args: Any, i: int = i, j: int = j) -> Any:
                x = args[0].clone()
                if heads:
                    size = WIDTH // HEADS
                    x[..., j * size : (j + 1) * size] = kept[i][..., j * size : (j + 1) * size]
                else:
                    x[:, j] = kept[i][:, j]
                return (x, *args[1:])

            handle = place.register_forward_pre_hook(write)
            logits = module(corrupted).logits[0, -1]
            handle.remove()
            found.append(logits[11] - logits[22])
    return torch.stack(found)


def sweeps() -> None:
    """Both sweeps, both ways, in one process."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config).eval()
    model = tp.load(module, tokenizer())
    tp.Architecture(model)
    print(f"GPT-2 with {LAYERS} layers, width {WIDTH}, vocabulary {VOCAB}, random weights, one thread")
    print("sweep                        rows  measured   one a patch   planned   ratio   largest difference")
    for tokens, heads in ((15, False), (15, True), (40, False)):
        ids = torch.randint(0, VOCAB, (tokens,)).tolist()
        where = tokens * 2 // 3
        other = [*ids[:where], (ids[where] + 17) % VOCAB, *ids[where + 1 :]]
        pairs = tp.Pairs([ids], [other])
        metric = tp.metric(lambda logits: logits[:, 11] - logits[:, 22], name="difference")

        def planned(pairs: tp.Pairs = pairs, metric: Any = metric, heads: bool = heads) -> Any:
            return tp.patch(model, pairs, "z" if heads else "resid_pre", metric)

        planned()
        began = time.perf_counter()
        result = planned()
        fast = time.perf_counter() - began
        began = time.perf_counter()
        with torch.no_grad():
            slow_values = one_forward_per_patch(module, torch.tensor([ids]), torch.tensor([other]), heads)
        slow = time.perf_counter() - began
        gap = abs(result["value"].values.reshape(-1) - slow_values.double().numpy()).max()
        name = "heads, all positions" if heads else "residual stream"
        done = int((result["status"] == tp.Status.MEASURED).sum())
        print(
            f"{name + f', {tokens} tokens':<27} {result['value'].size:>5} {done:>9} {slow:>11.2f} s {fast:>7.2f} s {slow / fast:>6.1f}×"
            f"   {gap:.1e}"
        )


def recording() -> None:
    """Seconds for recording and planning many rows."""
    model = tp.toys.load("gpt2")
    pairs = tp.Pairs(
        "When John and Mary went to the store, John gave the bag to",
        "When John and Mary went to the store, Mary gave the bag to",
        " Mary",
        " John",
    )
    for count in (2_000, 100_000):
        p = tp.patching(model, pairs)
        began = time.perf_counter()
        for number in range(count):
            layer, head, pos = number % 3, number // 3 % 4, number // 12 % 14
            with p.row(number=number, layer=layer, head=head, pos=pos):
                p.corrupted.z[layer, pos, head] = p.clean.z[layer, pos, head]
        recorded = time.perf_counter()
        p.make_plan()
        print(
            f"{count:>7,} rows: recorded in {recorded - began:.2f} s, planned in {time.perf_counter() - recorded:.2f} s"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    recording()
    sweeps()
