"""What attribution costs: ratios to bare PyTorch, and to TransformerLens, measured side by side in one process.

``python tests/attribution_benchmark.py`` prints a table for each model. They are those of ``benchmark.py``: the size of
GPT-2 small, random weights, nothing is downloaded. What is estimated is every head (z), MLP (mlp_out) and residual site
(resid_pre), and, in a version that has ``tp.edges``, every edge between writers and readers.

The bare version is what somebody would write for this one model: hooks, parameters that are not differentiated by, a
forward of the clean prompts without gradients, a forward and a backward of the corrupted ones, logits of the last
position only, and gradient times difference. All pairs are one batch in it, and in tracepatch too (which by default
takes as many at once as fit into a gibibyte). Edges are compared with the same bare run, which has none.

TransformerLens runs ``attribution_patch`` as it is: pair by pair, with all logits, of embeddings, heads and MLPs; of
edges it is given one pair, and tracepatch then too. It is left out where it is not installed:
``pip install -e ".[bench]" torch==2.13.0`` installs it, and the version keeps pip from moving torch.

Times are seconds of the processor with one thread, the best of several rounds in which all take turns; on a machine
that does nothing else they are seconds. Peaks are of all memory that torch allocates beside the weights, from every
allocation and release of its allocator, as its profiler records them.

Numbers that differ from the bare ones by more than ``TOLERANCE`` of the largest one of their kind are an error.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import benchmark
import torch
from benchmark import FAMILIES, HEADS, LAYERS, ONE, OTHER, TOLERANCE, WIDTH, Family, Sweep, joined, table
from numpy.typing import NDArray
from tiny_models import tokenizer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tracepatch as tp

COMPONENTS = ("z", "mlp_out", "resid_pre")
BY_POSITION = ("layer", "pos")
UNBOUNDED = 1 << 40  # bytes: all pairs at once
BARE = "bare"

Scores = dict[str, NDArray[Any]]
"""Estimates ``[pair, layer, …]`` by what they are of: ``heads``, or a component by position."""


# ---------------------------------------------------------------------------------------------------- who estimates


class Bare:
    """Two forwards and one backward with plain hooks."""

    def __init__(self, module: Any, family: Family) -> None:
        self.module, self.family = module.requires_grad_(False), family

    def scores(self, clean: Tensor, corrupted: Tensor) -> Scores:
        """Estimates of all sites."""
        with torch.no_grad():
            _, known = self._forward(clean)
        metric, values = self._forward(corrupted)
        slopes = torch.autograd.grad(metric.sum(), list(values.values()))
        with torch.no_grad():
            found = {k: (known[k] - x) * slope for (k, x), slope in zip(values.items(), slopes, strict=True)}
            products = {name: torch.stack([found[name, layer] for layer in range(LAYERS)], 1) for name in COMPONENTS}
            heads = products["z"].unflatten(-1, (HEADS, -1)).sum((2, 4))
            by_position = {name: product.sum(-1) for name, product in products.items()}
        return {name: x.numpy() for name, x in {"heads": heads, **by_position}.items()}

    def _forward(self, ids: Tensor) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """The metric ``[pair]``, and what passes by at each component of each layer."""
        kept: dict[tuple[str, int], Tensor] = {}
        handles = [self._hook(name, layer, kept) for layer in range(LAYERS) for name in COMPONENTS]
        last = torch.tensor([ids.shape[1] - 1])  # an index, for a slice would be unembedded by a slower product
        logits = self.module(ids, logits_to_keep=last, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits[:, ONE] - logits[:, OTHER], kept

    def _hook(self, name: str, layer: int, kept: dict[tuple[str, int], Tensor]) -> Any:
        place = self.family.places[name]
        module = self.module.get_submodule(joined(self.family.blocks, layer, place.path))

        def given(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = args[0]
            if torch.is_grad_enabled() and not x.requires_grad:  # nothing below it is differentiated
                x = x.detach().requires_grad_(True)
            kept[name, layer] = x
            return (x, *args[1:])

        def made(module: Any, args: Any, output: Tensor) -> None:
            kept[name, layer] = output

        return module.register_forward_pre_hook(given) if place.side == "input" else module.register_forward_hook(made)


class Ours:
    """tracepatch, as a user calls it."""

    def __init__(self, module: Any) -> None:
        self.model = tp.load(module, tokenizer())
        self.metric = tp.metric(lambda logits: logits[:, ONE] - logits[:, OTHER], name="difference")

    def one_call(self, pairs: tp.Pairs) -> Scores:
        """All components by layer and position."""
        options: Any = {"by": BY_POSITION, "memory": UNBOUNDED}
        found = tp.attribute(self.model, pairs, COMPONENTS, self.metric, **options)["estimate"]
        found = found.transpose("pair", "component", *BY_POSITION)
        return {name: found.sel(component=name).values for name in COMPONENTS}

    def saved(self, pairs: tp.Pairs) -> Scores:
        """Gradients that are kept, and from them heads, and the others by layer and position."""
        kept = tp.gradients(self.model, pairs, self.metric, COMPONENTS, memory=UNBOUNDED)  # type: ignore[attr-defined]
        heads = kept.attribute("z")["estimate"].transpose("pair", "layer", "head")
        found = kept.attribute(COMPONENTS[1:])["estimate"].transpose("pair", "component", *BY_POSITION)
        return {"heads": heads.values, **{name: found.sel(component=name).values for name in COMPONENTS[1:]}}

    def edges(self, pairs: tp.Pairs) -> Scores:
        """Every edge, and of these, heads: what the edges out of each sum to is its own estimate."""
        found = tp.edges(self.model, pairs, self.metric, memory=UNBOUNDED)["estimate"]  # type: ignore[attr-defined]
        heads = found.sum("reader").sel(writer=found["writer_component"] == "head_out").transpose("pair", "writer")
        return {"heads": heads.values.reshape(-1, LAYERS, HEADS)}


class Bridge(benchmark.Bridge):
    """TransformerLens's attribution patching, the mean over pairs."""

    def nodes(self, clean: Tensor, corrupted: Tensor) -> Scores:
        """Heads, and MLPs by position; of the embeddings nothing is taken."""
        scores = self._run(clean, corrupted, "node").node_scores
        found = {"heads": torch.zeros(LAYERS, HEADS), "mlp_out": torch.zeros(LAYERS, clean.shape[1])}
        for node, score in scores.items():
            if node.kind == "attn_head_out":
                found["heads"][node.layer, node.head] += score
            elif node.kind == "mlp_out":
                found["mlp_out"][node.layer, node.position] = score
        return {name: x.numpy() for name, x in found.items()}

    def edges(self, clean: Tensor, corrupted: Tensor) -> Scores:
        """Heads: what all edges out of each sum to."""
        scores = self._run(clean, corrupted, "edge").node_scores
        found = torch.zeros(LAYERS, HEADS)
        for node, score in scores.items():
            if node.kind == "attn_head_out":
                found[node.layer, node.head] += score
        return {"heads": found.numpy()}

    def _run(self, clean: Tensor, corrupted: Tensor, granularity: Any) -> Any:
        from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

        how = EdgeAttributionConfig(granularity=granularity)
        return attribution_patch(
            self.bridge, clean, corrupted, lambda logits: logits[0, -1, ONE] - logits[0, -1, OTHER], how
        )


# ---------------------------------------------------------------------------------------------------- what it costs


def cost(contenders: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Seconds of the processor that each takes at best; all take turns, after a first call that does not count."""
    for function in contenders.values():
        function()
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, function in contenders.items():
            for _ in range(2):  # the first one finds caches and the allocator as another left them
                gc.collect()
                began = time.process_time()
                function()
                best[name] = min(best[name], time.process_time() - began)
    return best


def peak(function: Callable[[], Any]) -> int:
    """Bytes that torch allocates during a call, at their most."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def gap(found: Scores, wanted: Scores, mean: bool = False) -> float:
    """The largest difference to the bare numbers, in units of the largest of the same kind."""
    gaps = []
    for name, ours in found.items():
        theirs = wanted[name].mean(0) if mean else wanted[name]
        gaps.append(float(abs(ours - theirs).max() / abs(theirs).max()))
    return max(gaps)


# ---------------------------------------------------------------------------------------------------- what is printed


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        name: What is estimated, and by which call.
        pairs: Of how many pairs at once.
        ours: Estimates of pairs.
        lens: The same by TransformerLens, if it does that.
    """

    name: str
    pairs: int
    ours: Callable[[tp.Pairs], Scores]
    lens: Callable[[Tensor, Tensor], Scores] | None


def cases(ours: Ours, bridge: Bridge | None, pairs: int, grouped: bool) -> list[Case]:
    """What this version of tracepatch does."""
    nodes, edges = (bridge.nodes, None if grouped else bridge.edges) if bridge else (None, None)
    found = [Case("nodes, attribute", pairs, ours.one_call, nodes)]
    if hasattr(tp, "gradients"):
        found.append(Case("nodes, gradients", pairs, ours.saved, nodes))
    if hasattr(tp, "edges"):
        found += [Case("edges", pairs, ours.edges, None), Case("edges", 1, ours.edges, edges)]
    return found


def section(name: str, lengths: Sequence[int], pairs: int, rounds: int, lens: bool) -> list[str]:
    """The table of a model, and where numbers differ."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    module = family.build().eval()
    bare, ours = Bare(copy.deepcopy(module), family), Ours(copy.deepcopy(module))
    bridge = Bridge(copy.deepcopy(module), family) if lens else None
    print(
        f"\n{name}: {LAYERS} layers, width {WIDTH}, {HEADS} heads ({family.kv_heads} of keys and values), one thread\n"
    )
    head = "estimated", "tokens", "pairs", "tracepatch", "time / bare", "peak", "peak / bare", "difference"
    line = table((*head, "TransformerLens / ours", "its difference"))
    wrong = []
    for tokens in lengths:
        listed = cases(ours, bridge, pairs, family.kv_heads < HEADS)
        for number in dict.fromkeys(case.pairs for case in listed):
            same = [case for case in listed if case.pairs == number]
            for cells, gaps in lines(bare, same, tokens, number, rounds):
                line(cells)
                wrong += [f"{name}, {cells[0]}, {tokens} tokens: {g:.1e}" for g in gaps if not g <= TOLERANCE]
    return wrong


def lines(
    bare: Bare, listed: Sequence[Case], tokens: int, pairs: int, rounds: int
) -> Iterator[tuple[list[str], list[float]]]:
    """The lines of cases with the same prompts, and how far from the bare numbers those of each tool are."""
    clean, corrupted = Sweep("prompts", "z", (), tokens=tokens, pairs=pairs).prompts()
    prompts = tp.Pairs(clean.tolist(), corrupted.tolist())
    calls: dict[Any, Callable[[], Scores]] = {BARE: partial(bare.scores, clean, corrupted)}
    for case in listed:
        calls[case.ours] = partial(case.ours, prompts)
        if case.lens:
            calls[case.lens] = partial(case.lens, clean, corrupted)
    took = cost(calls, rounds)
    scores = {name: call() for name, call in calls.items()}
    peaks = {name: peak(calls[name]) for name in (BARE, *(case.ours for case in listed))}
    for case in listed:
        own, base = took[case.ours], took[BARE]
        gaps = [gap(scores[case.ours], scores[BARE])]
        gaps += [gap(scores[case.lens], scores[BARE], mean=True)] if case.lens else []
        cells = [
            case.name,
            str(tokens),
            str(pairs),
            f"{own:.3f} s",
            f"{own / base:.2f}",
            f"{peaks[case.ours] / 1e6:.0f} MB",
            f"{peaks[case.ours] / peaks[BARE]:.2f}",
            f"{gaps[0]:.1e}",
            *((f"{took[case.lens] / own:.1f}×", f"{gaps[1]:.1e}") if case.lens else ("", "")),
        ]
        yield cells, gaps


def main() -> None:
    """Prints what the command line asks for."""
    parser = argparse.ArgumentParser(description="What attribution costs, beside bare PyTorch and TransformerLens.")
    parser.add_argument("--model", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 40, 120], help="lengths of the prompts")
    parser.add_argument("--pairs", type=int, default=8, help="how many are one batch")
    parser.add_argument("--rounds", type=int, default=5, help="how often each takes its turn")
    parser.add_argument("--without-lens", action="store_true", help="without TransformerLens")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lens = not asked.without_lens and find_spec("transformer_lens") is not None
    if not lens:
        print("TransformerLens is left out.")
    wrong = [m for name in asked.model for m in section(name, asked.tokens, asked.pairs, asked.rounds, lens)]
    if hasattr(os, "getloadavg"):
        print(f"\nLoad of the machine in the last minutes: {', '.join(f'{x:.1f}' for x in os.getloadavg())}.")
    if wrong:
        sys.exit("Numbers differ.\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
