"""Ready-made metrics, each against its definition on the oracle's logits and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow
from test_forms import tiny
from test_metrics import softmax
from test_remote import Server, away, server  # noqa: F401  # a fixture
from test_scripts import run

import tracepatch as tp
from tracepatch import errors
from tracepatch.models import module_of
from tracepatch.table import FORMS
from tracepatch.toys import tasks


def record(p: tp.Patching) -> None:
    for layer in range(len(p.architecture)):
        for pos in (9, -1):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    with p.row(layer=0, pos=3):
        p.clean.z[0, 3] = p.corrupted.z[0, 3] * 2


def agree(p: tp.Patching, definitions: dict[str, Any], tolerance: float = 2e-4, eager: bool = False) -> Any:
    """Each metric of each row and world is its definition: ``f(values, pair, world)`` of the oracle's forward."""
    slow = Slow(module_of(p.model), p.encoded, eager=eager)
    result = p.run(progress=False)
    measured = {
        (row.number, i): slow.references[row.base, i].values(slow.ids[row.base, i], slow.edits(row, i))
        for row in p.rows
        for i in range(len(p.encoded))
    }
    for name, definition in definitions.items():
        chosen = result.sel(metric=name) if "metric" in result.dims else result
        for row in p.rows:
            for pair in range(len(p.encoded)):
                wanted = definition(measured[row.number, pair], pair, row.base)
                found = chosen["value"].sel(row.labels).sel(pair=pair)
                np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=1e-4, err_msg=f"{name} {row} {pair}")
        for world in p.plan.worlds:
            wanted = [definition(slow.values[world, i], i, world) for i in range(len(p.encoded))]
            np.testing.assert_allclose(chosen[world], wanted, atol=tolerance, rtol=1e-4, err_msg=f"{name} {world}")
    return result


def last(values: Any) -> np.ndarray:
    return values["logits", 0][-1].double().numpy()


@pytest.mark.parametrize("form", ["packed", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[1:])])
def test_baskets_differences_of_probability_and_accuracy(gpt2: Any, form: Any) -> None:
    pairs = ioi_pairs(3)
    encoded = pairs.encode(gpt2.tokenizer)
    mary, john, tom = gpt2.tokenizer("Mary John Tom")["input_ids"]
    metrics = {
        "gap": tp.basket({" Mary": 1, " John": -2.5}),
        "mean": tp.basket([" Mary", john]),
        "prob": tp.basket({" Mary": 0.5, " Tom": 2}, "prob"),
        "log": tp.basket({mary: 1, tom: -1}, "log_prob", positions=[3, -1]),
        "prob_diff": tp.prob_diff,
        "accuracy": tp.accuracy,
        "accuracy at 3": tp.accuracy.at(3),
    }
    with tp.patching(gpt2, pairs, metrics, form=form) as p:
        record(p)

    def logs(x: np.ndarray) -> np.ndarray:
        return np.log(softmax(x))

    def sides(x: np.ndarray, i: int) -> float:
        return softmax(x)[list(encoded.answer[i])].sum() - softmax(x)[list(encoded.wrong[i])].sum()

    definitions = {
        "gap": lambda v, i, w: last(v)[mary] - 2.5 * last(v)[john],
        "mean": lambda v, i, w: last(v)[[mary, john]].mean(),
        "prob": lambda v, i, w: 0.5 * softmax(last(v))[mary] + 2 * softmax(last(v))[tom],
        "log": lambda v, i, w: np.mean(
            [logs(x)[mary] - logs(x)[tom] for x in v["logits", 0].double().numpy()[[3, -1]]]
        ),
        "prob_diff": lambda v, i, w: sides(last(v), i),
        "accuracy": lambda v, i, w: float(last(v).argmax() in encoded.answer[i]),
        "accuracy at 3": lambda v, i, w: float(v["logits", 0][3].argmax() in encoded.answer[i]),
    }
    result = agree(p, definitions)
    difference = result.sel(metric="prob_diff")
    np.testing.assert_allclose(
        difference["effect_answer"] - difference["effect_wrong"], difference["effect"], atol=1e-6
    )
    assert {0.0, 1.0} <= set(np.unique(result["value"].sel(metric="accuracy")))
    assert tp.basket([mary]).vocab == (mary,)
    assert "+1 ' Mary', -2.5 ' John'" in result.attrs["metrics"]


def test_a_basket_of_logits_computes_no_other_columns(gpt2: Any) -> None:
    pairs = ioi_pairs(2)
    with tp.patching(gpt2, pairs, tp.basket({" Mary": 1, " John": -1})) as p:
        record(p)
    assert p.metrics[0].vocab == tuple(gpt2.tokenizer("Mary John")["input_ids"])
    assert p.metrics[0].words is None


@pytest.mark.parametrize(("name", "form"), [("gpt2", "packed"), ("llama", "flat")])
def test_answers_of_several_tokens(name: str, form: Any) -> None:
    """log p(answer | prompt) = Σ log p(token | prompt and the tokens before it), each from a forward of its own."""
    model, made = toy(name), ioi_pairs(3)
    answers = [" Mary and John", " Anna", " Paul gave a book to Kate"]
    pairs = tp.Pairs(made.clean, made.corrupted, answers, [" Tom", " Tom gave a", " Kate"])
    for of in ("answer", "wrong"):
        longer = tp.continued(pairs, of)
        with tp.patching(model, longer, [tp.continuation, tp.log_prob], form=form) as p:
            record(p)
        texts = [t for (t,) in getattr(pairs, of)]
        ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert p.encoded.appended == tuple(len(i) - 1 for i in ids)
        assert longer.check(model) is not None

        def definition(values: Any, pair: int, world: str, ids: Any = ids) -> float:
            logits, answer = values["logits", 0].double().numpy(), ids[pair]
            return sum(np.log(softmax(logits[n - len(answer)]))[t] for n, t in enumerate(answer))

        agree(p, {"continuation": definition})
        # The definition reads what stands before each token: the same as one forward for each longer prompt.
        plain = tp.Pairs(made.clean).encode(model.tokenizer)
        slow = Slow(module_of(model), plain)
        for pair in range(3):
            total, prompt = 0.0, list(plain.clean[pair])
            for token in ids[pair]:
                logits = slow.reference.logits(torch.tensor(prompt))[-1].double().numpy()
                total += np.log(softmax(logits))[token]
                prompt.append(token)
            np.testing.assert_allclose(p.run()["clean"].sel(metric="continuation")[pair], total, atol=1e-4)
    both = tp.continued(pairs[[0, 1]])
    assert len(both[1]) == 1
    assert len(tp.continued(made).both_roles()) == 6


def test_one_token_is_a_continuation_too(gpt2: Any, pairs: tp.Pairs) -> None:
    one = tp.patch(gpt2, tp.continued(pairs), "attn_out", tp.continuation)
    np.testing.assert_allclose(one["value"], tp.patch(gpt2, pairs, "attn_out", tp.log_prob)["value"], atol=1e-5)


def repeats() -> tp.Pairs:
    """Prompts in which words come again."""
    made = tasks.induction(2, seed=3)
    return tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)


def matching(kind: str) -> Any:
    def definition(pattern: np.ndarray, ids: list[int]) -> float:
        found = []
        for dest, token in enumerate(ids):
            before = [s for s in range(dest) if ids[s] == token]
            targets = {"prefix": [s + 1 for s in before], "duplicate": before, "previous": [dest - 1] * (dest > 0)}[
                kind
            ]
            if targets:
                found.append(pattern[dest, targets].sum())
        return float(np.mean(found)) if found else 0.0

    return definition


@pytest.mark.parametrize("form", ["packed", "flat"])
def test_what_heads_look_at(form: Any) -> None:
    model, pairs = toy("gpt2"), repeats()
    encoded = pairs.encode(model.tokenizer)
    metrics = {
        "prefix": tp.prefix_matching(1, 2),
        "duplicate": tp.duplicate_token(1, 2),
        "previous": tp.previous_token(0, 1),
        "to two": tp.attention(1, 2, [3, 4]),
        "to one": tp.attention(0, 3, 4, dest=9),
        "from many": tp.attention(0, 3, [2, 4], dest=slice(5, None)),
    }
    with tp.patching(model, pairs, metrics, form=form) as p:
        record(p)

    def of(layer: int, head: int, kind: str) -> Any:
        return lambda v, i, w: matching(kind)(v["pattern", layer][head].numpy(), list(encoded.world(w)[i]))

    agree(
        p,
        {
            "prefix": of(1, 2, "prefix"),
            "duplicate": of(1, 2, "duplicate"),
            "previous": of(0, 1, "previous"),
            "to two": lambda v, i, w: v["pattern", 1][2, -1, [3, 4]].sum(),
            "to one": lambda v, i, w: v["pattern", 0][3, 9, 4],
            "from many": lambda v, i, w: v["pattern", 0][3, 5:, [2, 4]].sum(1).mean(),
        },
        tolerance=2e-6,
        eager=True,
    )


def test_induction_heads_score_high() -> None:
    """On the hand-wired model: the previous-token head and the induction head, and nobody else."""
    from tracepatch.toys.wired import wired, wired_pairs

    model = tp.load(*wired(12.0), name="wired")
    made = wired_pairs(4)
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    metrics = {
        f"{kind.__name__} {layer}.{head}": kind(layer, head)
        for kind in (tp.prefix_matching, tp.previous_token)
        for layer, head in heads
    }
    with tp.patching(model, pairs, metrics) as p, p.row():
        p.corrupted.embed[:] = p.clean.embed[:]
    clean = p.run()["clean"].mean("pair")
    scores = {str(m): float(clean.sel(metric=m)) for m in clean.metric.values}
    assert scores["prefix_matching 1.2"] > 0.95
    assert scores["previous_token 0.1"] > 0.95
    others = [v for k, v in scores.items() if k not in ("prefix_matching 1.2", "previous_token 0.1")]
    assert max(others) < 0.5


def test_prompts_without_repeats_have_no_prefix_to_match(gpt2: Any) -> None:
    pairs = tp.Pairs(["apple river stone"], ["apple cloud stone"], [" tiger"], [" piano"])
    with pytest.warns(errors.MeasurementWarning, match="change nothing"):
        found = tp.patch(gpt2, pairs, "resid_pre", tp.prefix_matching(1, 2), only={"layer": [0]})
    assert (found["clean"] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_neurons_and_directions(name: str) -> None:
    model, pairs, v = toy(name), ioi_pairs(2), torch.randn(64, generator=torch.Generator().manual_seed(0))
    head = torch.randn(16, generator=torch.Generator().manual_seed(1))
    metrics = {
        "neuron": tp.neuron(1, 7),
        "neuron at 3": tp.neuron(0, 9, pos=3),
        "direction": tp.direction(v, "resid_post", (0, -1)),
        "scaled": tp.direction(list(head), "z", (1, -1, 2), unit=False),
    }
    with tp.patching(model, pairs, metrics) as p:
        record(p)
    agree(
        p,
        {
            "neuron": lambda x, i, w: x["mlp_act", 1][-1, 7],
            "neuron at 3": lambda x, i, w: x["mlp_act", 0][3, 9],
            "direction": lambda x, i, w: x["resid_pre", 1][-1] @ (v / v.norm()),
            "scaled": lambda x, i, w: x["z", 1][-1, 2] @ head,
        },
        tolerance=2e-5,
    )


@pytest.mark.parametrize(("name", "form"), [(n, "packed") for n in tp.toys.NAMES] + [("gemma2", "flat")])
def test_direct_logit_attribution_is_the_derivative_of_the_readout(name: str, form: Any) -> None:
    """With the norm's scale held, the readout is linear: its derivative by a write is the difference that this makes."""
    model, pairs = toy(name), ioi_pairs(2)
    last_layer = len(tp.Architecture(model)) - 1
    pairs = tp.Pairs(pairs.clean, pairs.corrupted, [[a, " Kate"] for (a,) in pairs.answer], pairs.wrong)
    places: dict[str, Any] = {
        "head": ("head_out", (0, -1, 1)), "late head": ("head_out", (last_layer, -1, 2)), "attn": ("attn_out", (0, -1)),
        "mlp": ("mlp_out", (last_layer, -1)), "embed": ("embed", (-1,)), "early": ("head_out", (0, 9, 1)),
    }  # fmt: skip
    with tp.patching(model, pairs, {k: tp.direct_logit_diff(*v) for k, v in places.items()}, form=form) as p:
        record(p)
    module = module_of(model)
    slow = Slow(module, p.encoded)
    directions = {}
    for world in ("clean", "corrupted"):
        for pair in range(2):
            for pos in (-1, 9):
                stream = slow.values[world, pair]["logits_in", 0][pos].double()
                # Not the model's own norm: its scale held by hand.
                directions[world, pair, pos] = held_scale(module, stream, p.encoded, pair)

    def of(component: str, index: Any) -> Any:
        layer, pos, *head = index if len(index) > 1 else (0, *index)

        def definition(values: Any, pair: int, world: str) -> float:
            write = values[component, layer][pos].double()
            write = write[head[0]] if head else write
            return float(write @ directions[world, pair, pos])

        return definition

    agree(p, {k: of(*v) for k, v in places.items()}, tolerance=2e-4)


def held_scale(module: Any, stream: torch.Tensor, encoded: Any, pair: int) -> torch.Tensor:
    """d (logit difference before any softcap) / d stream with the final norm's scale held, by autograd in float64."""
    body = getattr(module, "transformer", None) or getattr(module, "gpt_neox", None) or module.model
    norm = next(n for n in (getattr(body, k, None) for k in ("ln_f", "final_layer_norm", "norm")) if n is not None)
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6
    layer_norm = isinstance(norm, torch.nn.LayerNorm)
    gain = norm.weight.to(stream) + ("Gemma" in type(norm).__name__)
    centred = stream - stream.mean() if layer_norm else stream
    scale = (centred.square().mean() + eps).sqrt()
    x = stream.clone().requires_grad_()
    read = (x - x.mean() if layer_norm else x) / scale * gain
    logits = module.get_output_embeddings().weight.to(stream) @ read
    difference = logits[list(encoded.answer[pair])].mean() - logits[list(encoded.wrong[pair])].mean()
    (found,) = torch.autograd.grad(difference, x)
    return found.detach()


def test_all_direct_contributions_sum_to_the_logit_difference(gpt2: Any, pairs: tp.Pairs) -> None:
    """Embeddings, heads, MLPs and all output biases, and the final norm's bias: that run's logit difference."""
    metrics = {"embed": tp.direct_logit_diff("resid_pre", (0, -1))}
    for layer in range(3):
        metrics |= {f"head {layer}.{h}": tp.direct_logit_diff("head_out", (layer, -1, h)) for h in range(4)}
        metrics |= {f"mlp {layer}": tp.direct_logit_diff("mlp_out", (layer, -1))}
    with tp.patching(gpt2, pairs, metrics) as p, p.row():
        p.corrupted.resid_pre[0, :] = p.clean.resid_pre[0, :]
    result = p.run()
    module = module_of(gpt2)
    slow = Slow(module, p.encoded)
    for world in ("clean", "corrupted"):
        for pair in range(3):
            direction = held_scale(module, slow.values[world, pair]["logits_in", 0][-1].double(), p.encoded, pair)
            biases = sum(block.attn.c_proj.bias.detach().double() for block in module.transformer.h)
            weight = module.lm_head.weight.detach().double()
            gap = weight[list(p.encoded.answer[pair])].mean(0) - weight[list(p.encoded.wrong[pair])].mean(0)
            rest = float(biases @ direction + gap @ module.transformer.ln_f.bias.detach().double())
            total = float(result[world].sel(pair=pair).sum()) + rest
            logits = slow.base(world, pair)[-1].double()
            wanted = logits[list(p.encoded.answer[pair])].mean() - logits[list(p.encoded.wrong[pair])].mean()
            assert total == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("model_type", ["granite", "cohere", "olmo2", "opt"])
def test_direct_attribution_of_other_readouts(model_type: str) -> None:
    """Multipliers of the logits, norms without bias or weight: with its scale frozen the readout is linear."""
    model = tiny(model_type)
    pairs = tp.Pairs(["w1 w2 w3 w4"], ["w1 w7 w3 w4"], ["w9"], ["w8"])
    with tp.patching(model, pairs, [tp.direct_logit_diff("resid_post", (1, -1)), tp.logit_diff]) as p:
        for step in (0.0, 0.5):
            with p.row(step=step):
                p.corrupted.resid_post[1, -1] += step * torch.linspace(-1, 1, 32, dtype=torch.float64)
                p.corrupted.logits_in_scale[-1] = p.corrupted.logits_in_scale[-1]
    value = p.run()["value"].squeeze("pair")
    moved = value.sel(step=0.5) - value.sel(step=0.0)
    np.testing.assert_allclose(moved[0], moved[1], rtol=5e-5)
    assert abs(float(moved[0])) > 0.01


def test_metrics_of_several_kinds_on_a_server(server: Server) -> None:  # noqa: F811
    found = []
    for model in (toy("gpt2"), away()):
        metrics = {
            "gap": tp.basket({" Mary": 1, " John": -2.5}),
            "direct": tp.direct_logit_diff("head_out", (1, -1, 3)),
            "prefix": tp.prefix_matching(1, 3),
            "direction": tp.direction(torch.ones(64), "resid_post", (0, -1)),
            "log": tp.basket([" Mary", " Tom"], "log_prob"),
        }
        with tp.patching(model, ioi_pairs(2), metrics) as p:
            record(p)
        found.append(p.run()["value"].values)
    np.testing.assert_allclose(*found, atol=1e-5)
    assert server.jobs == 1


def test_where_there_are_no_weights_the_unembedding_shows_its_rows(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sandbox: each dim of the stream alone through the unembedding."""
    from tracepatch import norms

    plain = norms.unembedding
    found = []
    for apart in (False, True):
        monkeypatch.setattr(
            norms, "unembedding", lambda head, columns, _, model, apart=apart: plain(head, columns, apart, model)
        )
        found.append(tp.patch(gpt2, ioi_pairs(2), "z", tp.direct_logit_diff("head_out", (1, -1, 3)))["value"].values)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_all_but_what_jumps_can_be_differentiated() -> None:
    logits = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    given = {
        "answer": torch.tensor([[1, 2], [3, -1]]),
        "wrong": torch.tensor([[4], [5]]),
        "continuation": torch.tensor([[1], [2]]),
    }
    for metric in (tp.prob_diff, tp.continuation, tp.basket([1, 2], "prob"), tp.logit_diff, tp.log_prob):
        read = logits if metric.vocab is None or metric.vocab == "given" else logits[..., list(metric.vocab)]
        value = metric(read, given)[:, 0].sum()
        (slope,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert metric.differentiable
        assert bool(slope.abs().sum() > 0)
    pattern = torch.rand(2, 5, 5, requires_grad=True)
    value = tp.prefix_matching(0, 0)(pattern, {"tokens": torch.tensor([[1, 2, 1, 2, 1], [3, 4, 5, 3, 4]])}).sum()
    assert bool(torch.autograd.grad(value, pattern)[0].any())
    assert not tp.accuracy.differentiable
    assert not tp.rank.differentiable


REFUSED = {
    "texts that are not one token": lambda m, p: tp.patch(m, p, "z", tp.basket([" Mary John"])),
    "the same token": lambda m, p: tp.patch(m, p, "z", tp.basket([" Mary", "Mary"])),
    "names a token twice": lambda m, p: tp.basket([" Mary", " Mary"]),
    "takes tokens, as texts or ids": lambda m, p: tp.basket([]),
    "of is one of": lambda m, p: tp.basket([1], of="odds"),  # type: ignore[arg-type]
    "pass tp.continued": lambda m, p: tp.patch(m, p, "z", tp.continuation),
    "takes a vector": lambda m, p: tp.direction(torch.zeros(3), "resid_post", (0, -1)),
    "pick one position": lambda m, p: tp.patch(m, p, "z", tp.direction(torch.ones(64), "resid_post", (0, [1, 2]))),
    "one position, and one head": lambda m, p: tp.patch(m, p, "z", tp.direct_logit_diff("head_out", (0, -1))),
    "no wrong answer in": lambda m, p: tp.patch(
        m, tp.Pairs(p.clean, p.corrupted, p.answer), "z", tp.direct_logit_diff("attn_out", (0, -1))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(gpt2: Any, pairs: tp.Pairs, message: str) -> None:
    with pytest.raises(errors.MetricError, match=message):
        REFUSED[message](gpt2, pairs)


def test_answers_that_cannot_be_appended(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.PromptError, match="continued by one answer; some have another number"):
        tp.continued(tp.Pairs(pairs.clean, pairs.corrupted))
    with pytest.raises(errors.PromptError, match="is 'answer' or 'wrong'"):
        tp.continued(pairs, "right")  # type: ignore[arg-type]
    unknown = tp.Pairs(pairs.clean, pairs.corrupted, [" Mary Zebedee"] * 3)
    with pytest.raises(errors.PromptError, match="cannot be appended"):
        tp.patch(gpt2, tp.continued(unknown), "z", tp.continuation)


def test_scripts_of_ready_made_metrics(gpt2: Any, tmp_path: Path) -> None:
    made = ioi_pairs(2)
    pairs = tp.continued(tp.Pairs(made.clean, made.corrupted, [" Mary and John", " Anna"]))
    metrics = {
        "log": tp.continuation,
        "prefix": tp.prefix_matching(1, 3),
        "basket": tp.basket([" Mary"], "prob"),
        "top": tp.accuracy,
    }
    with tp.patching(gpt2, pairs, metrics) as p, p.row():
        p.corrupted.attn_out[0, -1] = p.clean.attn_out[0, -1]
    value = p.run()["value"]
    for number, name in enumerate(metrics):
        text = p.rows[0].as_nnsight(0, name)
        given = {"metric": p.metrics[number]} if "metric)" in text.split("def patched(")[1].split(":")[0] else {}
        found, _ = run(text, tmp_path / f"measure_{number}.py", gpt2, **given)
        assert found == pytest.approx(value.sel(metric=name, pair=0).item(), abs=1e-5)
    with tp.patching(gpt2, made, tp.direct_logit_diff("attn_out", (0, -1))) as p, p.row():
        p.corrupted.attn_out[0, -1] = p.clean.attn_out[0, -1]
    with pytest.raises(errors.RecipeError, match="needs the unembedding's directions"):
        p.rows[0].as_nnsight()


def test_plans_say_what_the_literature_warns_of(gpt2: Any, pairs: tp.Pairs) -> None:
    def told(metric: Any, *sources: Any) -> str:
        with tp.patching(gpt2, pairs, metric) as p:
            for number, source in enumerate(sources):
                with p.row(number=number):
                    p.corrupted.z[1, :, 3] = source(p)
        return p.plan.explain()

    clean, zero = (lambda p: p.clean.z[1, :, 3]), (lambda p: 0)
    mean, mixed = (lambda p: p.mean(pairs).z[1, :, 3]), (lambda p: 0.5 * p.clean.z[1, :, 3])
    assert "  note" not in told(tp.logit_diff, clean, mixed)
    assert "note         prob: a probability near 0 cannot fall" in told([tp.prob, tp.logit_diff], clean)
    for source in (zero, mean, lambda p: p.gaussian(1.0)):
        assert "note         logit_diff: normalized ±0.5 may mean that nothing is left" in told(
            tp.logit_diff, clean, source
        )
    assert "nothing is left" not in told(tp.kl, zero)
    alone = tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)
    with tp.patching(gpt2, alone) as p, p.row():
        p.clean.z[1, :, 3] = 0
    assert "  note" not in p.plan.explain()


def test_zero_logits_are_fifty_percent(gpt2: Any) -> None:
    """What the note is about: on opposite prompts an empty answer looks half right."""
    with tp.patching(gpt2, ioi_pairs(4).both_roles()) as p, p.row():
        p.corrupted.logits[-1] = 0
    assert "halfway between opposite prompts" in p.plan.explain()
    np.testing.assert_allclose(tp.over_pairs(p.run())["normalized"], 0.5, atol=1e-6)


def test_differences_that_cancel_are_warned_of(gpt2: Any) -> None:
    """Half of the pairs in the other role, with answers that are not exchanged: the mean difference is next to nothing."""
    one = ioi_pairs(4)
    mixed = tp.Pairs([*one.clean, *one.corrupted], [*one.corrupted, *one.clean], [*one.answer] * 2, [*one.wrong] * 2)
    result = tp.patch(gpt2, mixed, "resid_pre", only={"layer": [0]})
    with pytest.warns(errors.MeasurementWarning, match="has both signs, and cancels over pairs"):
        tp.over_pairs(result)
    tp.over_pairs(tp.patch(gpt2, one.both_roles(), "resid_pre", only={"layer": [0]}))
