"""Any module's input and output, experts, and raw traces, against plain hooks on a copy that no trace has touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import gap, made_up_pairs, untouched
from test_oracle import compare, sweep
from tiny_models import EXPERTS, build, tokenizer
from torch import Tensor, nn

import tracepatch as tp
from tracepatch import program
from tracepatch.errors import ComponentError, MeasurementError, RecipeError
from tracepatch.plan import Proof

WORDS = [f"w{i}" for i in range(30, 60)]
# Flat activations inside (OPT, experts), additions in place (Falcon), a multiplier (Granite), no attention (Mamba).
TYPES = ("gpt2", "llama", "opt", "falcon", "granite", "gemma2", "qwen2_moe", "mamba")


def loaded(model_type: str, layers: int = 2) -> tuple[Any, nn.Module]:
    """A tiny model, and its copy for hooks."""
    module = build(model_type, layers=layers)
    return tp.load(module, tokenizer()), untouched(module)


def first(values: Sequence[Any]) -> int:
    """Which of several values is the first activation."""
    return next(i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 1)


@contextmanager
def hooked(module: nn.Module, name: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, a module's input or output [pos, width] goes through a function; ``None`` leaves it alone."""
    path, side = name.rsplit(".", 1)

    def through(x: Tensor) -> Tensor:
        new = change(x.reshape(-1, x.shape[-1]).clone())
        return x if new is None else new.reshape(x.shape)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [*args, *kwargs.values()]
        i = first(values)
        values[i] = through(values[i])
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return through(output)
        if isinstance(output, dict):
            output[next(iter(output))] = through(output[next(iter(output))])
            return output
        i = first(output)
        return (*output[:i], through(output[i]), *output[i + 1 :])

    target = module.get_submodule(path)
    if side == "input":
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """Of one plain forward, [pos, vocab]."""
    found: Tensor = module(torch.tensor([ids]), use_cache=False).logits[0]
    return found


def value(module: nn.Module, name: str, ids: Sequence[int]) -> Tensor:
    """What passes by, [pos, width]."""
    seen: list[Tensor] = []
    with hooked(module, name, seen.append):
        logits(module, ids)
    return seen[0]


def patched(module: nn.Module, name: str, ids: Sequence[int], new: Tensor, positions: Any) -> Tensor:
    """Logits where some positions of what passes by are exchanged."""

    def change(x: Tensor) -> Tensor:
        x[positions] = new[positions]
        return x

    with hooked(module, name, change):
        return logits(module, ids)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_tap_equals_a_plain_hook(model_type: str) -> None:
    model, slow = loaded(model_type)
    spots: list[Any] = [-1, slice(None), [2, 5]]
    with tp.patching(model, made_up_pairs(WORDS)) as p:
        names = [f"{n}.{side}" for n, _ in slow.named_modules() for side in ("input", "output") if n]
        names = [n for n in names if n in p.architecture.modules]
        for number, name in enumerate(names):
            path, side = name.rsplit(".", 1)
            spot = spots[number % 3]
            with p.row(name=name):
                getattr(p.corrupted, side)(path)[spot] = getattr(p.clean, side)(path)[spot]
    assert len(names) > 20
    result = p.run()
    assert p.encoded.corrupted is not None
    score, worst, moved = gap(p.encoded), 0.0, 0
    for pair, (clean, corrupted) in enumerate(zip(p.encoded.clean, p.encoded.corrupted, strict=True)):
        plain = score(logits(slow, corrupted), pair)
        for number, name in enumerate(names):
            new = value(slow, name, clean)
            wanted = score(patched(slow, name, corrupted, new, spots[number % 3]), pair)
            found = result["value"].sel(name=name).values[pair]
            worst = max(worst, abs(float(wanted) - found) / (1 + abs(float(wanted))))
            moved += bool(abs(wanted - plain) > 1e-4)
    assert worst < 1e-5
    assert moved > len(names)


def test_rows_of_modules_and_components_act_in_the_order_of_the_forward() -> None:
    """Edits of named components and of modules around them in one row, against two hooks at once."""
    model, slow = loaded("llama", layers=3)
    block, pairs = "model.layers.1", made_up_pairs(WORDS)
    joint = [  # the module's site, the component, where the component is in a plain hook
        (f"{block}.input", "resid_mid", f"{block}.post_attention_layernorm.input"),
        (f"{block}.input_layernorm.input", "attn_out", f"{block}.self_attn.o_proj.output"),
        (f"{block}.mlp.up_proj.output", "mlp_out", f"{block}.mlp.output"),
        (f"{block}.self_attn.q_proj.output", "resid_pre", f"{block}.input"),
        ("model.norm.input", "resid_post", f"{block}.output"),
        (f"{block}.self_attn.o_proj.output", "z", f"{block}.self_attn.o_proj.input"),
    ]
    with tp.patching(model, pairs) as p:
        for number, (name, component, _) in enumerate(joint):
            path, side = name.rsplit(".", 1)
            for swapped in (False, True):  # recorded in either order
                with p.row(number=number, swapped=int(swapped)):
                    for what in ("module", "component")[:: -1 if swapped else 1]:
                        if what == "module":
                            getattr(p.corrupted, side)(path)[2:5] = getattr(p.clean, side)(path)[2:5]
                        else:
                            getattr(p.corrupted, component)[1, 3:] = 0.5
    found = p.run()["value"]
    assert p.encoded.corrupted is not None
    for pair, (clean, corrupted) in enumerate(zip(p.encoded.clean, p.encoded.corrupted, strict=True)):
        for number, (name, component, hook) in enumerate(joint):
            new = value(slow, name, clean)

            def change(x: Tensor, new: Tensor = new) -> Tensor:
                x[2:5] = new[2:5]
                return x

            def half(x: Tensor) -> Tensor:
                x[3:] = 0.5
                return x

            # resid_mid of the stream itself: what attention adds makes up for it.
            if component == "resid_mid":
                stream = value(slow, name, corrupted)
                stream[2:5] = new[2:5]
                hook = f"{block}.self_attn.o_proj.output"

                def half(x: Tensor, stream: Tensor = stream) -> Tensor:
                    x[3:] = 0.5 - stream[3:]
                    return x

            with hooked(slow, name, change), hooked(slow, hook, half):
                wanted = gap(p.encoded)(logits(slow, corrupted), pair)
            for swapped in (0, 1):
                got = float(found.sel(number=number, swapped=swapped)[pair])
                assert got == pytest.approx(float(wanted), abs=1e-5 * (1 + abs(float(wanted)))), (name, component)


def test_pruning_changes_no_number() -> None:
    """Single sites and pairs of them, with and without pruning; what is pruned is exactly zero."""
    model, _ = loaded("gpt2", layers=2)
    pairs = made_up_pairs(WORDS)
    results = []
    for prune in (True, False):
        with tp.patching(model, pairs, tp.logit_diff.at(-2), prune=prune) as p:
            for name in sorted(n for n in p.architecture.modules.names if ".h.1." in n or "ln_f" in n or "wte" in n):
                path, side = name.rsplit(".", 1)
                live, other = getattr(p.corrupted, side)(path), getattr(p.clean, side)(path)
                for pos in range(p.lengths[0]):
                    with p.row(name=name, pos=pos, before=0):
                        live[pos] = other[pos]
                    with p.row(name=name, pos=pos, before=1):  # reaches the site before it is written
                        p.corrupted.resid_pre[0, 0] = 0
                        live[pos] = other[pos]
            for pos in range(p.lengths[0]):
                with p.row(name="attention first", pos=pos, before=2):  # before the MLP of its layer
                    p.corrupted.output("transformer.h.0.attn.c_attn")[0] = 0
                    p.corrupted.mlp_out[0, pos] = p.clean.mlp_out[0, pos]
        results.append(p)
    pruned, whole = (p.run() for p in results)
    assert (results[0].plan.proofs != Proof.NONE).sum() > 100
    assert abs(pruned["value"] - whole["value"]).max() < 1e-5
    assert bool((pruned["status"] == tp.Status.PROVED_ZERO).any())
    assert abs(whole["effect"].where(pruned["status"] == tp.Status.PROVED_ZERO)).max() < 1e-5


def test_a_value_in_the_last_layer_may_reach_positions_after_it() -> None:
    """Keys of the last layer, as the projection gives them: never taken for a write beside the position read."""
    model, _ = loaded("llama", layers=2)
    name = "model.layers.1.self_attn.k_proj.output"
    result = tp.patch(model, made_up_pairs(WORDS)[[0]], name, by="pos", direction="noising")
    assert result["status"].values[0, 4] == tp.Status.MEASURED
    assert abs(result["effect"].values[0, 4]) > 1e-3


def test_sums_numbers_functions_and_labels() -> None:
    model, slow = loaded("gpt2")
    path = "transformer.h.1.mlp.c_fc"
    pairs = made_up_pairs(WORDS)[[0]]
    with tp.patching(model, pairs) as p:
        here, clean = p.corrupted.output(path), p.clean.output(path)
        with p.row(name="sum", layer=1):
            here[2:] += 2 * clean[2:] - p.corrupted.output(path)[2:]
        with p.row(name="function", layer=1):
            here[[0, -1]] = lambda live: live.flip(1)
        with p.row(name="mask", layer=-1):
            here[[False] * 6 + [True]] = torch.arange(128.0) / 100
        with p.row(name="stream", layer=1):  # as wide as the stream
            p.corrupted.output("transformer.h.1.mlp")[3] = p.clean.resid_pre[1, 3] - p.corrupted.attn_out[0, 3]
        assert str(p.rows[0].edits[0].site) == f"{path}.output[2:]"
    assert p.encoded.corrupted is not None
    old, new = value(slow, f"{path}.output", p.encoded.corrupted[0]), value(slow, f"{path}.output", p.encoded.clean[0])
    stream = value(slow, "transformer.h.1.input", p.encoded.clean[0])
    added = value(slow, "transformer.h.0.attn.c_proj.output", p.encoded.corrupted[0])
    flipped, ramp = old.clone(), old.clone()
    flipped[[0, -1]] = old[[-1, 0]]
    ramp[-1] = torch.arange(128.0) / 100
    changes = {"sum": 2 * new, "function": flipped, "mask": ramp, "stream": stream - added}
    result = p.run()["value"].sel(pair=0).isel(layer=0)
    for label, written in changes.items():
        where, name = (3, "transformer.h.1.mlp.output") if label == "stream" else (slice(None), f"{path}.output")
        at = slice(2, None) if label == "sum" else where
        wanted = gap(p.encoded)(patched(slow, name, p.encoded.corrupted[0], written, at), 0)
        assert float(result.sel(name=label)) == pytest.approx(float(wanted), abs=1e-5), label


def test_what_cannot_be_patched_is_refused_in_words() -> None:
    model, _ = loaded("qwen2_moe")
    with tp.patching(model, made_up_pairs(WORDS)) as p:
        for path, why in {
            "model.layers.0.mlp.gat": r"has no module 'model.layers.0.mlp.gat'. Did you mean model.layers.0.mlp.gate",
            "model.layers.0.mlp.experts.act_fn": r"what passes by is \[42, 24\] for 3 prompts of 7 tokens",
            "model.layers": "a forward does not call it",
            "model.rotary_emb": r"what passes by is \[1, 7, 8\]",
            "lm_head": "only the positions that metrics read; patch the logits",
        }.items():
            with pytest.raises(ComponentError, match=why):
                p.clean.output(path)
        with pytest.raises(ComponentError, match="no activation is among its arguments"):
            p.clean.input("model.embed_tokens")
        with pytest.raises(ComponentError, match="pass a module's path"):
            p.clean.input(3)  # type: ignore[arg-type]  # what is refused
        with pytest.raises(ComponentError, match=r"model.norm.input and model.norm.output"):
            tp.patch(model, made_up_pairs(WORDS), "model.norm")
        with pytest.raises(ComponentError, match="has no module"):
            tp.patch(model, made_up_pairs(WORDS), "model.nrm.output")
        with pytest.raises(RecipeError, match=r"clean.output\('PATH OF A MODULE'\)\[pos\]"), p.row():
            p.clean.output = 3
        with pytest.raises(RecipeError, match=r"resid_mid\[0, 1\] and .*acts from before to after"), p.row():
            p.clean.resid_mid[0, 1] = 0
            p.clean.output("model.layers.0.self_attn.o_proj")[1] = 0
        with pytest.raises(RecipeError, match=r"q_in\[1, :, 0\] and .*in one row: q_in acts"), p.row():
            p.clean.output("model.layers.1.input_layernorm")[1] = 0
            p.clean.q_in[1, :, 0] = 0
        with pytest.raises(RecipeError, match="32 width entries"), p.row():
            p.clean.output("model.layers.0.mlp.shared_expert.up_proj")[1] = p.clean.resid_pre[0, 1]
        with pytest.raises(RecipeError, match="a vector over d_head and does not fit"), p.row():
            p.clean.output("model.norm")[1] = p.clean.z[0, 1, 2]
        with p.row():
            p.clean.output("model.norm")[1] = 0


def test_what_one_branch_reads_sees_an_edit_before_its_norm() -> None:
    model, slow = loaded("llama")
    name = "model.layers.1.input_layernorm.input"
    with tp.patching(model, made_up_pairs(WORDS)[[0]]) as p, p.row(name="both"):
        p.corrupted.attn_in[1, 3:] += 0.5
        p.corrupted.input("model.layers.1.input_layernorm")[:] = p.clean.resid_pre[0]
    assert p.encoded.corrupted is not None
    new = value(slow, "model.layers.0.input", p.encoded.clean[0])
    new[3:] += 0.5
    wanted = gap(p.encoded)(patched(slow, name, p.encoded.corrupted[0], new, slice(None)), 0)
    assert float(p.run()["value"].squeeze()) == pytest.approx(float(wanted), abs=1e-5)


def test_tokens_sorted_by_expert_are_not_positions() -> None:
    """With one expert a token, what an expert's activation takes has as many rows as there are tokens."""
    found = tp.Architecture(build("mixtral", layers=1, num_experts_per_tok=1))
    assert "do not follow the prompts" in found.modules.why_not("model.layers.0.mlp.experts.act_fn.input")


def test_modules_called_twice_are_not_offered() -> None:
    module = build("gpt2", layers=1)
    block = module.transformer.h[0]
    block.mlp.register_module("act", nn.Sequential(block.mlp.act))
    block.mlp.c_proj.register_forward_pre_hook(lambda m, args: (block.mlp.act(args[0]) * 0 + args[0],))
    found = tp.Architecture(tp.load(module, tokenizer())).modules
    assert "a forward calls it 2 times" in found.why_not("transformer.h.0.mlp.act.output")


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_and_their_router_against_the_oracle(model_type: str) -> None:
    model, _ = loaded(model_type)
    worst: dict[str, float] = {}
    for number, name in enumerate(("router_logits", "experts_out")):
        with tp.patching(model, made_up_pairs(WORDS)) as p:
            assert p.architecture.offers(name, 1), p.architecture.why_not(name, 1)
            sweep(p, name, ("corrupted", "clean")[number], thin=4)
        compare(model, [p], worst)
    print(model_type, worst)
    assert max(worst.values()) < 3e-6


def test_the_routing_follows_the_router() -> None:
    """Sums, functions and several edits of one row; each later place sees the earlier edits."""
    model, _ = loaded("qwen2_moe")
    with tp.patching(model, made_up_pairs(WORDS)) as p:
        with p.row(component="router_logits", number=0):
            p.corrupted.router_logits[1, :, 2] += 1e4  # every token goes to this expert
        with p.row(component="router_logits", number=1):
            p.corrupted.router_logits[0, 1:, [0, 3]] = p.clean.router_logits[0, 1:, [0, 3]] * 2 - 1
        with p.row(component="router_logits", number=2):
            p.corrupted.experts_out[1, -1] += p.clean.experts_out[1, -1] - p.corrupted.mlp_out[1, -1]
            p.corrupted.router_logits[1, -1] = -p.clean.router_logits[1, -1]
            p.corrupted.mlp_out[1, -1] += p.clean.mlp_out[0, -1]
        with p.row(component="router_logits", number=3):
            p.corrupted.router_logits[0, 0] = 0
            p.corrupted.experts_out[0, 1:] = 0
    compare(model, [p], {})
    assert list(p.rows[0].edits[0].site.picked("expert").items or ()) == [2]
    result = tp.patch(model, made_up_pairs(WORDS), "router_logits", only={"layer": [1], "expert": [0, -1]})
    assert dict(result.sizes) | {"layer": 1, "expert": 2} == dict(result.sizes)


def test_where_there_are_no_experts() -> None:
    model, _ = loaded("deepseek_v3")
    found = tp.Architecture(model)
    assert found.why_not("router_logits", 0) == "its MLP has no experts to choose among"
    assert found.offers("experts_out", 1)
    assert "pass the model through tp.load" in tp.Architecture(build("mixtral", layers=1)).why_not("router_logits", 0)
    with pytest.raises(ComponentError, match="its choice is made by then; patch router_logits"):
        found.modules.tap("model.layers.1.mlp.gate.output")
    assert "router_logits" not in str(tp.Architecture(build("gpt2", layers=1)))


def deaf(self: Any, hidden_states: Tensor) -> Any:
    """A router's forward that chooses by something else than its logits, and may or may not weigh by them."""
    logits = nn.functional.linear(hidden_states, self.weight)
    weights, indices = torch.topk((hidden_states @ self.weight.T).softmax(-1), 2)
    if self.weighs:
        weights = logits.softmax(-1).gather(1, indices)
    return logits, weights, indices


@pytest.mark.parametrize("weighs", [False, True])
def test_a_router_that_cannot_be_written_is_not_offered(weighs: bool) -> None:
    module = build("mixtral", layers=1)
    gate = module.model.layers[0].mlp.gate
    gate.__class__, gate.weighs = type("Deaf", (type(gate),), {"forward": deaf}), weighs
    model = tp.load(module, tokenizer())
    assert model.model.layers[0].mlp.gate.source.nn_functional_linear_0 is not None  # it can be seen there
    found = tp.Architecture(model)
    assert "no place was found where writing the router's logits" in found.why_not("router_logits", 0)
    assert found.offers("experts_out", 0)


def test_a_raw_trace_equals_the_same_edit_recorded() -> None:
    model, pairs = toy("gpt2"), ioi_pairs(3)

    def silence(m: Any) -> int:
        m.transformer.h[1].attn.c_proj.output[:, -1] = 0
        m.transformer.h[2].mlp.output[:, :, 3] += 0.5
        return 7  # ignored

    bump = torch.zeros(64)
    bump[3] = 0.5
    with tp.patching(model, pairs, [tp.logit_diff, tp.kl, tp.cross_entropy]) as p:
        for number, world in enumerate((p.corrupted, p.clean)):
            with p.row(kind="raw", world=number):
                p.trace(silence, world=world)
            with p.row(kind="edits", world=number):
                world.attn_out[1, -1] = 0
                world.mlp_out[2] += bump
            with p.row(kind="nothing", world=number):
                p.trace(lambda m: None, world=world)
    result = p.run()
    raw, edits, nothing = (result["effect"].sel(kind=kind) for kind in ("raw", "edits", "nothing"))
    assert abs(raw - edits).max() < 1e-6 * (1 + abs(edits).max())
    assert abs(edits).min() > 1e-4
    assert (nothing == 0).all()
    assert (result["status"] == tp.Status.MEASURED).all()
    assert "raw traces   12 of these runs" in p.plan.explain()
    assert "trace(silence) of clean" in str(p.rows[3])
    with tp.patching(model, pairs) as q, q.row(name="default"):
        q.trace(silence)
    assert q.rows[0].base == "corrupted"
    with tp.patching(model, tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)) as q, q.row(name="default"):
        q.trace(silence)
    assert q.rows[0].base == "clean"


def test_a_raw_trace_is_held_against_a_run_of_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one row round differently from runs of many."""
    model, pairs, plain = toy("gpt2"), ioi_pairs(2), program.raw
    monkeypatch.setattr(program, "raw", lambda *given: plain(*given) + 1e-3)
    with tp.patching(model, pairs, checks=False) as p, p.row(name="nothing"):
        p.trace(lambda m: None)
    result = p.run()
    assert (result["effect"] == 0).all()
    assert json.loads(result.attrs["noise_floor"])["logit_diff"] == pytest.approx(1e-3, rel=0.1)


def test_raw_traces_are_refused_in_words() -> None:
    model, pairs = toy("gpt2"), ioi_pairs(2)

    def nothing(m: Any) -> None: ...

    with tp.patching(model, pairs) as p:
        with pytest.raises(RecipeError, match="p.trace is called outside a row"):
            p.trace(nothing)
        with pytest.raises(RecipeError, match="has edits already"), p.row(name="a"):
            p.clean.resid_pre[0, 0] = 0
            p.trace(nothing)
        with pytest.raises(RecipeError, match="is a raw trace, so clean.resid_pre"), p.row(name="a"):
            p.trace(nothing)
            p.clean.resid_pre[0, 0] = 0
        with pytest.raises(RecipeError, match="has a raw trace already"), p.row(name="a"):
            p.trace(nothing)
            p.trace(nothing)
        for wrong in (3, lambda: None, lambda a, b: None):
            with pytest.raises(RecipeError, match="takes a function of the model"), p.row(name="a"):
                p.trace(wrong)  # type: ignore[arg-type]  # what is refused
        with pytest.raises(RecipeError, match="world is p.clean or p.corrupted"), p.row(name="a"):
            p.trace(nothing, world="clean")  # type: ignore[arg-type]  # what is refused
        with p.row(name="a"):
            p.clean.resid_pre[0, 0] = 0


@pytest.mark.parametrize("kind", ["raises", "not finite"])
def test_a_raw_trace_that_fails_names_its_row(kind: str) -> None:
    model, pairs = toy("gpt2"), ioi_pairs(2)

    def broken(m: Any) -> None:
        if kind == "raises":
            raise ZeroDivisionError("on purpose")
        m.transformer.h[1].output[:] = torch.nan

    with tp.patching(model, pairs) as p, p.row(name="the bad one"):
        p.trace(broken)
    with pytest.raises(MeasurementError, match="pair 0, row\\(name='the bad one'\\): (trace\\(broken\\))?") as caught:
        p.run()
    if kind == "raises":
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert np.isfinite(tp.patch(model, pairs, "embed")["value"]).all()  # the model still works
