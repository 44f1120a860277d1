"""Each metric against its definition, written down once more in numpy; what is read; parts and units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slow import Slow

import tracepatch as tp
from tracepatch.trials import require_sound


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def several(pairs: tp.Pairs) -> tp.Pairs:
    """Several answers in some pairs, one in others."""
    answers = [[*pairs.answer[0], " Kate"], list(pairs.answer[1]), list(pairs.answer[2])]
    return tp.Pairs(pairs.clean, pairs.corrupted, answers, pairs.wrong)


def definitions(encoded: Any, clean: list[np.ndarray], corrupted: list[np.ndarray]) -> dict[str, Any]:
    """name → (metric, f(logits [pos, vocab], pair))"""

    def loss(x: np.ndarray, i: int, positions: Any) -> float:
        targets = [*encoded.clean[i][1:], encoded.answer[i][0]]
        logs = np.log(softmax(x))
        return float(np.mean([-logs[p, targets[p]] for p in positions]))

    return {
        "logit": (tp.logit, lambda x, i: x[-1, list(encoded.answer[i])].mean()),
        "logit_diff": (
            tp.logit_diff,
            lambda x, i: x[-1, list(encoded.answer[i])].mean() - x[-1, list(encoded.wrong[i])].mean(),
        ),
        "prob": (tp.prob, lambda x, i: softmax(x[-1])[list(encoded.answer[i])].sum()),
        "log_prob": (tp.log_prob, lambda x, i: np.log(softmax(x[-1])[list(encoded.answer[i])].sum())),
        "rank": (tp.rank, lambda x, i: (x[-1] > x[-1, list(encoded.answer[i])].max()).sum()),
        "kl": (
            tp.kl,
            lambda x, i: (softmax(clean[i][-1]) * (np.log(softmax(clean[i][-1])) - np.log(softmax(x[-1])))).sum(),
        ),
        "cross_entropy": (tp.cross_entropy.at(slice(0, -1)), lambda x, i: loss(x, i, range(len(x) - 1))),
        "two positions": (tp.logit.at([2, -1]), lambda x, i: x[[2, -1]][:, list(encoded.answer[i])].mean()),
        "spread": (lambda logits: logits.std(-1), lambda x, i: x[-1].std(ddof=1)),
        "drop": (tp.metric(lambda logits: logits.amax((1, 2)), positions=slice(-3, None)), lambda x, i: x[-3:].max()),
        "two, averaged": (tp.metric(lambda logits: logits[:, 7]).at([2, -1]), lambda x, i: x[[2, -1], 7].mean()),
        "given": (
            tp.metric(lambda logits, given: logits.gather(1, given["wrong"][:, :1])[:, 0], needs=("wrong",)),
            lambda x, i: x[-1, encoded.wrong[i][0]],
        ),
    }


def test_every_metric_is_its_definition(gpt2: Any, several: tp.Pairs) -> None:
    encoded = several.encode(gpt2.tokenizer)
    slow = Slow(tp.models.module_of(gpt2), encoded)
    worlds = [[slow.base(w, i).double().numpy() for i in range(3)] for w in ("clean", "corrupted")]
    defined = definitions(encoded, *worlds)
    with tp.patching(gpt2, several, {name: m for name, (m, _) in defined.items()}) as p:
        for layer in range(3):
            with p.row(layer=layer):
                p.corrupted.resid_pre[layer, 5:] = p.clean.resid_pre[layer, 5:]
    result = p.run()
    for name, (_, definition) in defined.items():
        wanted = [[definition(slow.logits(row, i).double().numpy(), i) for row in p.rows] for i in range(3)]
        np.testing.assert_allclose(result["value"].sel(metric=name), wanted, atol=2e-4, rtol=1e-4, err_msg=name)
        for world, logits in zip(("clean", "corrupted"), worlds, strict=True):
            wanted_base = [definition(logits[i], i) for i in range(3)]
            np.testing.assert_allclose(
                result[world].sel(metric=name), wanted_base, atol=2e-4, rtol=1e-4, err_msg=f"{name}, {world}"
            )
    assert float(abs(result["clean"].sel(metric="kl")).max()) < 1e-5, "nothing diverges from itself"


def test_the_loss_after_the_last_token_is_the_answers(gpt2: Any, pairs: tp.Pairs) -> None:
    result = tp.patch(
        gpt2, pairs, "attn_out", {"end": tp.cross_entropy.at([-1]), "log": tp.log_prob, "all": tp.cross_entropy}
    )
    np.testing.assert_allclose(result["value"].sel(metric="end"), -result["value"].sel(metric="log"), atol=1e-5)
    slow = Slow(tp.models.module_of(gpt2), pairs.encode(gpt2.tokenizer))
    for i in range(3):
        targets = [*slow.encoded.clean[i][1:], slow.encoded.answer[i][0]]
        logs = np.log(softmax(slow.base("corrupted", i).double().numpy()))
        np.testing.assert_allclose(
            result["corrupted"].sel(metric="all")[i], -np.mean([logs[p, t] for p, t in enumerate(targets)]), rtol=1e-5
        )


def test_a_metric_that_needs_a_reference_may_stand_alone(gpt2: Any, pairs: tp.Pairs) -> None:
    bare = tp.Pairs(pairs.clean, pairs.corrupted)
    alone = tp.patch(gpt2, bare, "z", tp.kl)
    beside = tp.patch(gpt2, pairs, "z", [tp.kl, tp.logit_diff]).sel(metric="kl")
    np.testing.assert_allclose(alone["value"], beside["value"], atol=1e-6)


def test_the_parts_of_a_difference(gpt2: Any, pairs: tp.Pairs) -> None:
    """Breaking (the answer falls) and boosting (the wrong answer rises) can be told apart."""
    result = tp.patch(gpt2, pairs, "z", tp.logit_diff, direction="noising")
    np.testing.assert_allclose(result["effect_answer"] - result["effect_wrong"], result["effect"], atol=1e-5)
    answer = tp.patch(gpt2, pairs, "z", tp.logit, direction="noising")
    np.testing.assert_allclose(result["effect_answer"], answer["effect"], atol=1e-5)


def test_units_and_notes() -> None:
    assert [(m.name, m.unit) for m in (tp.logit_diff, tp.logit, tp.prob, tp.log_prob, tp.rank, tp.kl, tp.cross_entropy)] == [
        ("logit_diff", "logits"), ("logit", "logits"), ("prob", "probability"), ("log_prob", "nats"), ("rank", "rank"), ("kl", "nats"),
        ("cross_entropy", "nats"),
    ]  # fmt: skip
    for metric in (tp.logit_diff, tp.logit, tp.prob, tp.log_prob, tp.rank, tp.kl, tp.cross_entropy):
        require_sound(metric, 11, 2)
        assert metric.note


def test_a_function_reads_the_last_position(gpt2: Any, pairs: tp.Pairs) -> None:
    seen = []

    def first_logit(logits: torch.Tensor) -> torch.Tensor:
        """The logit of token 0."""
        seen.append(logits.shape[1:])
        return logits[:, 0]

    result = tp.patch(gpt2, pairs, "z", first_logit)
    assert set(seen) == {(161,)}
    assert str(result["metric"].item()) == "first_logit"
    assert "The logit of token 0." in result.attrs["metrics"]
