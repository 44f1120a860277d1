"""How much faster patching gets by planning: ratios between tools, measured side by side in one process.

``python tests/benchmark.py`` prints a table for each model and number of threads. The models have the size of GPT-2
small and random weights, so that nothing is downloaded. Sweeps are run by tracepatch (with its self-checks, which cost
one run of two prompts more and which the others have none of; ``--unchecked`` leaves them out), and by three others, one forward per patch: TransformerLens with its usual loop (``run_with_cache``, then ``run_with_hooks``), plain
hooks on the Hugging Face module, and nnsight traces. TransformerLens computes all logits, as it does by default; hooks
and nnsight those of the last position only. Several pairs are one batch for all of them; ``rows`` and ``measured`` count
each pair. TransformerLens is left out where it is not installed: ``pip install -e ".[bench]" torch==2.13.0`` installs
it, and the version keeps pip from moving torch. Run this on a machine that does nothing else: tools that run at the
same time distort each other, and two threads on busy cores most. ``--device cuda`` runs everything on an accelerator.

Times are the best of several rounds, in which all tools take turns. The others run an even sample of the patches; the
time of one patch is multiplied by the number of patches and the clean run is added. Each tool must give the same
numbers: a difference above ``TOLERANCE`` times the largest logit is an error, and ``difference`` is that to hooks.

The floor is what the patches cost if nothing but arithmetic took time: over the measured rows and the two unpatched
worlds (whole), the sum of (tokens from the first changed position on) × (layers from the first edit on, or after it for
``mlp_out``) × (seconds that one token takes in one bare block of a large batch), plus (rows + worlds) × (seconds of one
row of a large unembedding, with all columns or those that the metric declares). All of it is measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import nnsight
import torch
from tiny_models import tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tracepatch as tp

LAYERS, HEADS, KV_HEADS, D_HEAD, VOCAB = 12, 12, 4, 64, 50257
WIDTH = HEADS * D_HEAD
ONE, OTHER = 11, 22  # the metric is the difference of their logits at the last position
TOLERANCE = 1e-5
FULL, DECLARED = "all logits", "2 columns"
CHECKS = [True]  # whether tracepatch checks itself


# ---------------------------------------------------------------------------------------------------- what is patched


@dataclass(frozen=True)
class Site:
    """One activation: a component in a layer, at one position or all, of one head or the whole width."""

    component: str
    layer: int
    pos: int | None = None
    head: int | None = None


Patch = tuple[Site, ...]


@dataclass(frozen=True)
class Sweep:
    """Patches that are measured together, and the prompts they are measured on.

    Attributes:
        name: What to call it on the command line and in the table.
        component: What is patched.
        by: The dims it runs over; what is left out is patched whole.
        tokens: Length of the prompts.
        start: Whether the first token differs instead of the one at two thirds of the prompt.
        pairs: How many pairs of prompts.
        joint: Instead of one head at a time, this many random pairs of heads.
        declares: Whether the metric that declares its columns is measured too.
        vocab: From how many tokens the prompts are drawn.
    """

    name: str
    component: str
    by: tuple[str, ...]
    tokens: int = 15
    start: bool = False
    pairs: int = 1
    joint: int = 0
    declares: bool = False
    vocab: int = VOCAB

    @property
    def differs(self) -> int:
        """The one position at which the prompts of a pair differ."""
        return 0 if self.start else self.tokens * 2 // 3

    def patches(self, kv_heads: int) -> list[Patch]:
        """Every patch, in the order of the result."""
        sizes = {"layer": LAYERS, "pos": self.tokens, "head": HEADS, "kv_head": kv_heads}
        found = [
            self._site(dict(zip(self.by, index, strict=True)))
            for index in itertools.product(*(range(sizes[dim]) for dim in self.by))
        ]
        if not self.joint:
            return [(site,) for site in found]
        return random.Random(0).sample(list(itertools.combinations(found, 2)), self.joint)

    def _site(self, index: dict[str, int]) -> Site:
        return Site(self.component, index["layer"], index.get("pos"), index.get("head", index.get("kv_head")))

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Ids of the clean and the corrupted prompts, ``[pair, pos]``."""
        shape = self.pairs, self.tokens
        clean = torch.randint(self.vocab, shape, generator=torch.Generator().manual_seed(self.tokens))
        corrupted = clean.clone()
        corrupted[:, self.differs] = (clean[:, self.differs] + 17) % self.vocab
        return clean, corrupted

    def run(self, model: Any, pairs: tp.Pairs, metric: Any, patches: Sequence[Patch]) -> Any:
        """The sweep as a user of tracepatch writes it, from recording to the labelled result."""
        if not self.joint:
            return tp.patch(model, pairs, self.component, metric, by=self.by, progress=False, checks=CHECKS[0])
        with tp.patching(model, pairs, metric, checks=CHECKS[0]) as p:
            for number, patch in enumerate(patches):
                with p.row(number=number):
                    for site in patch:
                        p.corrupted.z[site.layer, :, site.head] = p.clean.z[site.layer, :, site.head]
        return p.run(progress=False)


_RESIDUAL, _HEADS, _KV_HEADS = ("layer", "pos"), ("layer", "head"), ("layer", "kv_head")
SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep("residual-15", "resid_pre", _RESIDUAL, declares=True),
        Sweep("residual-15-start", "resid_pre", _RESIDUAL, start=True, declares=True),
        Sweep("residual-40", "resid_pre", _RESIDUAL, tokens=40),
        Sweep("residual-120", "resid_pre", _RESIDUAL, tokens=120),
        Sweep("residual-15-pairs", "resid_pre", _RESIDUAL, pairs=8),
        Sweep("mlp-15", "mlp_out", _RESIDUAL),
        Sweep("heads", "z", _HEADS, declares=True),
        Sweep("heads-start", "z", _HEADS, start=True, declares=True),
        Sweep("heads-by-position", "z", ("layer", "pos", "head")),
        Sweep("heads-joint", "z", _HEADS, joint=500),
        Sweep("queries", "q", _HEADS),
        Sweep("keys", "k", _KV_HEADS),
        Sweep("values", "v", _KV_HEADS),
    )
}
QUICK = ("residual-15", "heads", "heads-joint")


# ---------------------------------------------------------------------------------------------------- in which models


@dataclass(frozen=True)
class Place:
    """Where a component lives in a Hugging Face module: what a submodule takes or gives, from one column on."""

    path: str
    side: str
    column: int = 0
    d_head: int = D_HEAD

    def at(self, site: Site) -> tuple[slice, slice, slice]:
        """The part of ``[pair, pos, width]`` that a site is."""
        first = self.column + (site.head or 0) * self.d_head
        columns = slice(None) if site.head is None else slice(first, first + self.d_head)
        return slice(None), slice(None) if site.pos is None else slice(site.pos, site.pos + 1), columns


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build it, and where things are."""

    build: Callable[[], Any]
    trunk: str
    blocks: str
    kv_heads: int
    places: dict[str, Place]


def gpt2() -> Any:
    """A GPT-2 small; weights are larger than usual, so that patches matter more than rounding."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=WIDTH,
            vocab_size=VOCAB,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> Any:
    """A Llama of the same size with grouped heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            hidden_size=WIDTH,
            intermediate_size=2048,  # three matrices have as many weights as GPT-2's two
            vocab_size=VOCAB,
            max_position_embeddings=1024,
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


FAMILIES = {
    "gpt2": Family(
        gpt2,
        "transformer",
        "transformer.h",
        HEADS,
        {
            "resid_pre": Place("", "input"),
            "q": Place("attn.c_attn", "output"),
            "k": Place("attn.c_attn", "output", WIDTH),
            "v": Place("attn.c_attn", "output", 2 * WIDTH),
            "z": Place("attn.c_proj", "input"),
            "mlp_out": Place("mlp", "output"),
        },
    ),
    # Queries and keys are patched at all positions, so that it does not matter that these are not rotated yet.
    "llama": Family(
        llama,
        "model",
        "model.layers",
        KV_HEADS,
        {
            "resid_pre": Place("", "input"),
            "q": Place("self_attn.q_proj", "output"),
            "k": Place("self_attn.k_proj", "output"),
            "v": Place("self_attn.v_proj", "output"),
            "z": Place("self_attn.o_proj", "input"),
            "mlp_out": Place("mlp", "output"),
        },
    ),
}


# ---------------------------------------------------------------------------------------------------- by which tools


class Tool(Protocol):
    """One forward per patch."""

    name: str

    def remember(self, clean: Tensor, component: str) -> None:
        """Runs the clean prompts and keeps the component of every layer."""

    def last_logits(self, corrupted: Tensor, patch: Patch) -> Tensor:
        """Logits ``[pair, vocab]`` at the last position, with the patch."""


class Hooks:
    """Plain hooks on the Hugging Face module."""

    name = "hooks"

    def __init__(self, module: Any, family: Family) -> None:
        self.module, self.family = module, family
        self.kept: dict[int, Tensor] = {}

    def _forward(self, ids: Tensor, hooks: Iterable[tuple[Site, Callable[[Tensor], None]]]) -> Tensor:
        """The last position's logits, while functions are called with what passes by at sites."""
        handles = [self._hook(site, function) for site, function in hooks]
        logits: Tensor = self.module(ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits

    def _hook(self, site: Site, function: Callable[[Tensor], None]) -> Any:
        place = self.family.places[site.component]
        module = self.module.get_submodule(joined(self.family.blocks, site.layer, place.path))
        if place.side == "input":
            return module.register_forward_pre_hook(lambda module, args: function(args[0]))
        return module.register_forward_hook(lambda module, args, output: function(output))

    def remember(self, clean: Tensor, component: str) -> None:
        def keep(layer: int) -> Callable[[Tensor], None]:
            return lambda x: self.kept.__setitem__(layer, x.clone())

        layers = range(len(self.module.get_submodule(self.family.blocks)))
        self._forward(clean, [(Site(component, layer), keep(layer)) for layer in layers])

    def last_logits(self, corrupted: Tensor, patch: Patch) -> Tensor:
        def write(site: Site) -> Callable[[Tensor], None]:
            at = self.family.places[site.component].at(site)
            return lambda x: x.__setitem__(at, self.kept[site.layer][at])

        return self._forward(corrupted, [(site, write(site)) for site in patch])


class Traces:
    """nnsight traces."""

    name = "nnsight"

    def __init__(self, module: Any, family: Family) -> None:
        self.model, self.family = tp.load(module, tokenizer()), family  # an nnsight model
        self.kept: dict[int, Tensor] = {}

    def _envoy(self, site: Site) -> Any:
        place = self.family.places[site.component]
        return self.model.get(joined(self.family.blocks, site.layer, place.path))

    def remember(self, clean: Tensor, component: str) -> None:
        envoys = [self._envoy(Site(component, layer)) for layer in range(LAYERS)]
        read = self.family.places[component].side
        with self.model.trace(clean, logits_to_keep=1, use_cache=False):
            found = nnsight.save([getattr(envoy, read).clone() for envoy in envoys])
        self.kept = dict(enumerate(found))

    def last_logits(self, corrupted: Tensor, patch: Patch) -> Tensor:
        writes = []
        for site in patch:
            place = self.family.places[site.component]
            at = place.at(site)
            writes.append((self._envoy(site), place.side, at, self.kept[site.layer][at]))
        with self.model.trace(corrupted, logits_to_keep=1, use_cache=False):
            for envoy, side, at, value in writes:
                getattr(envoy, side)[at] = value
            logits = nnsight.save(self.model.output.logits)
        last: Tensor = logits[:, -1]
        return last


class Bridge:
    """TransformerLens 4: a bridge over the Hugging Face module, and its loop over patches.

    The bridge computes with the model's own weights; its compatibility mode, which folds them, is no faster. Its module
    ``patching`` does the same for sweeps of single sites, behind a progress bar.
    """

    name = "TransformerLens"
    hooks: dict[str, str] = {  # noqa: RUF012  # a constant
        "resid_pre": "hook_resid_pre",
        "q": "attn.hook_q",
        "k": "attn.hook_k",
        "v": "attn.hook_v",
        "z": "attn.hook_z",
        "mlp_out": "hook_mlp_out",
    }

    def __init__(self, module: Any, family: Family) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge = TransformerBridge.boot_transformers(
            module.config.model_type, hf_model=module, tokenizer=tokenizer(), device=str(module.device)
        )
        self.cache: Any = None

    def remember(self, clean: Tensor, component: str) -> None:
        _, self.cache = self.bridge.run_with_cache(clean)

    def last_logits(self, corrupted: Tensor, patch: Patch) -> Tensor:
        hooks: list[Any] = [(f"blocks.{site.layer}.{self.hooks[site.component]}", self._write(site)) for site in patch]
        logits: Tensor = self.bridge.run_with_hooks(corrupted, fwd_hooks=hooks)
        return logits[:, -1]

    def _write(self, site: Site) -> Callable[..., Tensor]:
        at: tuple[int | slice, ...] = (slice(None), slice(None) if site.pos is None else site.pos)
        at = at if site.head is None else (*at, site.head)

        def write(x: Tensor, hook: Any) -> Tensor:
            x[at] = self.cache[hook.name][at]
            return x

        return write


def joined(*parts: str | int) -> str:
    """A module's path."""
    return ".".join(str(part) for part in parts if part != "")


def tools(module: Any, family: Family) -> list[Tool]:
    """Every tool that is installed, each with a copy of the model: bridges and nnsight change theirs."""
    found: list[Tool] = [Hooks(copy.deepcopy(module), family), Traces(copy.deepcopy(module), family)]
    try:
        found.insert(0, Bridge(copy.deepcopy(module), family))
    except ImportError as error:
        print(f"TransformerLens is left out, for it cannot be imported ({error}).\n")
    return found


# ---------------------------------------------------------------------------------------------------- how long it takes


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes, and what it left for an accelerator to do."""
    began = time.perf_counter()
    function()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    """Waits until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fastest(function: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest of several calls, after one that does not count."""
    function()
    return min(seconds(function) for _ in range(rounds))


@dataclass(frozen=True)
class Floor:
    """What arithmetic costs: seconds of one token in one block, and of one row of the unembedding, by metric."""

    token_layer: float
    unembedding: dict[str, float]

    def of(self, sweep: Sweep, patches: Sequence[Patch], measured: Any, metric: str) -> float:
        """The floor of a sweep; ``measured`` says which ``[pair, row]`` were."""
        rows = (measured.sum(0) * [work(sweep, patch) for patch in patches]).sum()
        worlds = 2 * sweep.pairs
        cells = rows + worlds * sweep.tokens * LAYERS
        return float(cells * self.token_layer + (measured.sum() + worlds) * self.unembedding[metric])


def work(sweep: Sweep, patch: Patch) -> int:
    """In how many layers how many tokens change."""
    first = min(max(site.pos or 0, sweep.differs) for site in patch)
    layer = min(site.layer + (site.component == "mlp_out") for site in patch)
    return (sweep.tokens - first) * (LAYERS - layer)


def floor(module: Any, family: Family, prompts: int = 64, tokens: int = 8, rows: int = 256) -> Floor:
    """Measures what arithmetic costs, in batches that are large enough to be efficient."""
    blocks, device = module.get_submodule(family.blocks), module.device
    stream = torch.randn(prompts, tokens, WIDTH, device=device)
    rotary = getattr(module.get_submodule(family.trunk), "rotary_emb", None)
    places = torch.arange(tokens, device=device)[None]
    given = {} if rotary is None else {"position_embeddings": rotary(stream, places)}

    def trunk() -> None:
        x = stream
        for block in blocks:
            x = block(x, **given)

    last, weight = torch.randn(rows, WIDTH, device=device), module.lm_head.weight
    columns = weight[[ONE, OTHER]].clone()
    return Floor(
        fastest(trunk) / (prompts * tokens * LAYERS),
        {
            FULL: fastest(lambda: last @ weight.T) / rows,
            DECLARED: fastest(lambda: last @ columns.T) / rows,
        },
    )


def metrics() -> dict[str, Any]:
    """The metric as a function of all logits, and of the columns that it declares."""
    found = {FULL: tp.metric(lambda logits: logits[:, ONE] - logits[:, OTHER], name="difference")}
    declared: dict[str, Any] = {"vocab": (ONE, OTHER)}
    try:
        found[DECLARED] = tp.metric(lambda logits: logits[:, 0] - logits[:, 1], name="difference", **declared)
    except TypeError as error:
        print(f"Metrics that declare their columns are left out, for tp.metric has no such argument ({error}).\n")
    return found


@dataclass(frozen=True)
class Effort:
    """How much is run: patches of each other tool, rounds, and seconds of each of them in a round, at least."""

    samples: int
    rounds: int
    least: float


THOROUGH, SHORT = Effort(36, 3, 0.7), Effort(6, 2, 0.0)


@dataclass
class Measured:
    """Both sides of a sweep.

    Attributes:
        ours: The result of tracepatch, by metric.
        best: Its seconds, by metric.
        clean: Seconds of each tool's clean run.
        patch: Seconds of each tool for one patch.
        theirs: Values of each tool, ``[pair]`` by patch.
        scale: The largest logit.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    clean: dict[str, float] = field(default_factory=dict)
    patch: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    scale: float = 0.0


def measure(
    model: Any, others: list[Tool], sweep: Sweep, patches: list[Patch], read: dict[str, Any], effort: Effort
) -> Measured:
    """Runs a sweep with every tool in turn, several times.

    Args:
        model: From ``tp.load``.
        others: The tools that run one forward per patch.
        sweep: What is measured.
        patches: Its patches.
        read: The metrics.
        effort: How often. What the others sample is dealt to the rounds, so that each sees the whole range.

    Returns:
        The best of all rounds.
    """
    clean, corrupted = (ids.to(model.device) for ids in sweep.prompts())
    pairs = tp.Pairs(clean.tolist(), corrupted.tolist())
    sample = [round(i) for i in torch.linspace(0, len(patches) - 1, min(effort.samples, len(patches))).tolist()]
    found = Measured()
    for name, metric in read.items():
        found.ours[name] = sweep.run(model, pairs, metric, patches)
        found.best[name] = float("inf")
    for tool in others:
        found.clean[tool.name] = fastest(partial(tool.remember, clean, sweep.component), 2)
        found.scale = max(found.scale, float(tool.last_logits(corrupted, patches[sample[0]]).abs().max()))
        found.patch[tool.name], found.theirs[tool.name] = float("inf"), {}
    for turn in range(effort.rounds):
        for name, metric in read.items():
            took = seconds(partial(sweep.run, model, pairs, metric, patches))
            found.best[name] = min(found.best[name], took)
        for tool in others:
            chosen = {i: patches[i] for i in sample[turn :: effort.rounds]}
            took, values = pace(tool, corrupted, chosen, effort.least)
            found.patch[tool.name] = min(found.patch[tool.name], took)
            found.theirs[tool.name] |= values
    return found


def pace(tool: Tool, corrupted: Tensor, patches: dict[int, Patch], least: float) -> tuple[float, dict[int, Tensor]]:
    """Seconds that a patch takes, from patches that are run again until ``least`` seconds are over, and their values."""
    values, count, began = {}, 0, time.perf_counter()
    while count == 0 or time.perf_counter() - began < least:
        for number, patch in patches.items():
            logits = tool.last_logits(corrupted, patch)
            values[number] = logits[:, ONE] - logits[:, OTHER]
        count += len(patches)
    settle()
    return (time.perf_counter() - began) / count, {number: value.cpu() for number, value in values.items()}


# ---------------------------------------------------------------------------------------------------- what is printed


def table(header: Sequence[str]) -> Callable[[Sequence[str]], None]:
    """Prints the head of a markdown table and returns what prints a line of it."""
    widths = [max(len(name), 18 if i == 0 else 10) for i, name in enumerate(header)]

    def line(cells: Sequence[str]) -> None:
        padded = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print(f"| {' | '.join(padded)} |", flush=True)

    line(header)
    line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return line


def lines(sweep: Sweep, patches: list[Patch], found: Measured, costs: Floor) -> Iterator[tuple[list[str], float]]:
    """A line of the table for each metric, and the largest difference between any two tools."""
    for name, result in found.ours.items():
        values = result["value"].transpose("pair", ...).values.reshape(sweep.pairs, -1)
        measured = (result["status"] == tp.Status.MEASURED).transpose("pair", ...).values.reshape(sweep.pairs, -1)
        least, best = costs.of(sweep, patches, measured, name), found.best[name]
        gaps = {
            tool: max(abs(values[:, i] - theirs.numpy()).max() for i, theirs in given.items()) / found.scale
            for tool, given in found.theirs.items()
        }
        ratios = [(found.clean[tool] + len(patches) * found.patch[tool]) / best for tool in found.theirs]
        yield (
            [
                sweep.name,
                f"{sweep.differs} of {sweep.tokens}",
                name,
                str(values.size),
                str(int(measured.sum())),
                f"{best:.3f} s",
                *(f"{ratio:.1f}×" for ratio in ratios),
                f"{least:.3f} s",
                f"{best / least:.2f}",
                f"{gaps[Hooks.name]:.1e}",
            ],
            max(gaps.values()),
        )


def section(name: str, chosen: Sequence[str], threads: Sequence[int], effort: Effort, device: str) -> list[str]:
    """The tables of a model, and the sweeps on which tools disagree."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    module = family.build().eval().to(device)
    model, others, read = tp.load(copy.deepcopy(module), tokenizer()), tools(module, family), metrics()
    wrong = []
    for count in threads:
        torch.set_num_threads(count)
        costs = floor(module, family)
        print(
            f"\n{name}: {LAYERS} layers, width {WIDTH}, {HEADS} heads ({family.kv_heads} of keys and values), vocabulary "
            f"{VOCAB}, {processor(device, count)}. A token costs {1e6 * costs.token_layer:.3g} µs a layer, a row "
            f"{1e6 * costs.unembedding[FULL]:.3g} µs to unembed.\n"
        )
        ratios = (f"vs {tool.name} ({effort.samples} rows, scaled)" for tool in others)
        head = ("sweep", "differs at", "metric", "rows", "measured", "tracepatch", *ratios)
        line = table((*head, "floor", "time / floor", "difference"))
        for sweep in map(SWEEPS.__getitem__, chosen):
            patches = sweep.patches(family.kv_heads)
            found = measure(
                model, others, sweep, patches, {k: m for k, m in read.items() if k == FULL or sweep.declares}, effort
            )
            for cells, gap in lines(sweep, patches, found, costs):
                line(cells)
                if not gap <= TOLERANCE:
                    wrong.append(f"{name}, {sweep.name}, {count} threads: tools differ by {gap:.1e} of the logit scale")
    return wrong


def processor(device: str, threads: int) -> str:
    """Where models run."""
    if device == "cpu":
        return f"{threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def recording() -> None:
    """Prints how many rows are recorded and planned in a second."""
    model = tp.toys.load("gpt2")
    pairs = tp.Pairs(
        "When John and Mary went to the store, John gave the bag to",
        "When John and Mary went to the store, Mary gave the bag to",
        " Mary",
        " John",
    )
    line = table(("rows", "recorded", "planned", "recorded a second", "planned a second"))
    for count in (2_000, 100_000):
        p = tp.patching(model, pairs)
        began = time.perf_counter()
        for number in range(count):
            layer, head, pos = number % 3, number // 3 % 4, number // 12 % 14
            with p.row(number=number, layer=layer, head=head, pos=pos):
                p.corrupted.z[layer, pos, head] = p.clean.z[layer, pos, head]
        recorded = time.perf_counter() - began
        planned = seconds(p.make_plan)
        line(
            (
                f"{count:,}",
                f"{recorded:.2f} s",
                f"{planned:.2f} s",
                f"{count / recorded:,.0f}",
                f"{count / planned:,.0f}",
            )
        )


def main() -> None:
    """Prints what the command line asks for."""
    parser = argparse.ArgumentParser(description="Ratios between tracepatch and other tools, measured in one process.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, one after another")
    parser.add_argument("--model", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, metavar="NAME", help=", ".join(SWEEPS))
    parser.add_argument("--quick", action="store_true", help=f"few samples, and of the sweeps only {', '.join(QUICK)}")
    parser.add_argument("--device", default="cpu", help="where models run, such as cuda")
    parser.add_argument("--unchecked", action="store_true", help="without tracepatch's self-checks")
    parser.add_argument("--recording", action="store_true", help="instead: how fast rows are recorded and planned")
    asked = parser.parse_args()
    CHECKS[0] = not asked.unchecked
    if asked.recording:
        torch.set_num_threads(asked.threads[0])
        recording()
        return
    chosen = asked.sweep or (QUICK if asked.quick else list(SWEEPS))
    effort, threads = SHORT if asked.quick else THOROUGH, asked.threads if asked.device == "cpu" else [1]
    with torch.no_grad():
        wrong = [message for name in asked.model for message in section(name, chosen, threads, effort, asked.device)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
