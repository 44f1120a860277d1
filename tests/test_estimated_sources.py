"""Estimates of everything that can be written, and of metrics of activations, against slopes of exact patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from slow import coder
from test_attribution import PAIRS, WORDS, model_of
from test_portions import orthogonal, poor, random

import tracepatch as tp
from tracepatch import errors

STEP = 1e-2  # values are float32, so that smaller steps drown
OTHERS = [" ".join(WORDS[start : start + 16]) for start in (0, 5, 9)]


def means(p: tp.Patching) -> dict[str, tuple[Any, Any, Any]]:
    """Names → where in the clean run, what is written, and the same as a value that can be added to others."""
    mean, over, drawn = p.mean(OTHERS), p.mean(OTHERS, over="positions"), p.resample(OTHERS, seed=3)
    site = (1, slice(None, 7), 1)
    return {
        "mean": (p.clean.z, site, mean.z[site]),
        "over positions": (p.clean.z, site, over.z[site]),
        "one of them": (p.clean.mlp_out, (0, -1), drawn.mlp_out[0, -1]),
        "a mean and a prompt": (p.clean.resid_pre, (1, 3), 2 * mean.resid_pre[1, 3] - p.corrupted.resid_pre[1, 3]),
        "noise": (p.clean.embed, (slice(None),), p.clean.embed[:] + p.gaussian(0.5, of="embed")),
        "a vector": (p.clean.resid_post, (1, -1), tp.vector(torch.linspace(-1, 1, p.architecture.d_model))),
    }


def slope(model: Any, record: Any, metric: Any = tp.logit_diff) -> Any:
    """What edits change, per unit of the way from what is there to what they write, at its beginning."""
    ends = []
    for step in (STEP, -STEP):
        with tp.patching(model, PAIRS, metric, checks=False) as p:
            record(p, step)
        ends.append(p.run(progress=False)["effect"])
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_estimates_of_references_are_slopes_of_exact_patches(name: str) -> None:
    model = model_of(name)
    with tp.patching(model, PAIRS) as p:
        for label, (target, site, source) in means(p).items():
            with p.row(name=label):
                target[site] = source

    def record(exact: Any, step: float) -> None:
        for label, (target, site, source) in means(exact).items():
            with exact.row(name=label):
                target[site] += step * (source - target[site])

    found, wanted = p.estimate(), slope(model, record)
    assert float(abs(wanted).max("pair").min()) > 1e-2
    np.testing.assert_allclose(found["estimate"], wanted, rtol=3e-3, atol=1e-3)
    assert set(np.unique(found["status"])) <= {2, 4}


def test_a_reference_in_a_world_is_there_for_its_gradients() -> None:
    """What is measured and what is estimated in a world of means agree in the slope."""

    def record(p: Any, step: float) -> None:
        world = p.world("means", of=p.clean)
        world.z[0, :7, 1] = p.mean(OTHERS).z[0, :7, 1]
        with p.row(name="x"):
            world.mlp_out[1, -1] += step * (p.mean(OTHERS).mlp_out[1, -1] - world.mlp_out[1, -1])

    model = model_of("gpt2")
    with tp.patching(model, PAIRS) as p:
        record(p, 1.0)
    np.testing.assert_allclose(p.estimate()["estimate"], slope(model, record), rtol=3e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", [tp.AtP(), tp.IntegratedGradients(4, along="site")])
def test_sweeps_are_estimated_with_what_they_write(estimator: Any) -> None:
    """The same rows, recorded by hand; an audit is given the source once more."""
    model, source = model_of("gpt2"), tp.mean(OTHERS)
    options: Any = {"only": {"pos": slice(0, 7)}, "by": ("layer", "head"), "direction": "noising"}
    found = tp.attribute(model, PAIRS, "z", source=source, estimator=estimator, **options)
    with tp.patching(model, PAIRS) as p:
        for layer, head in p.grid("z", by=("layer", "head")):
            with p.row(layer=layer, head=head):
                p.clean.z[layer, :7, head] = p.reference(source).z[layer, :7, head]
    np.testing.assert_allclose(found["estimate"], p.estimate(estimator)["estimate"], atol=1e-9)
    exact = tp.patch(model, PAIRS, "z", source=source, **options)
    assert found["estimate"].dims == exact["effect"].dims
    audited = tp.audit(model, PAIRS, found, source=source, sample=4)
    there = audited["effect"].notnull()
    np.testing.assert_allclose(audited["effect"].where(there), exact["effect"].where(there), atol=1e-5)
    assert int(there.sum()) > 0
    with pytest.raises(errors.RecipeError, match="pass the same source= again"):
        tp.audit(model, PAIRS, found, sample=4)


def lone() -> tp.Pairs:
    return tp.Pairs(PAIRS.clean[:1], PAIRS.corrupted[:1], PAIRS.answer[:1], PAIRS.wrong[:1])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a_mean_over_the_other_prompt_alone_is_the_other_prompt(direction: Any) -> None:
    model, pairs = model_of("gpt2"), lone()
    other = pairs.clean if direction == "denoising" else pairs.corrupted
    plain = tp.attribute(model, pairs, "mlp_out", direction=direction)
    mean = tp.attribute(model, pairs, "mlp_out", direction=direction, source=tp.mean(other))
    np.testing.assert_allclose(plain["estimate"], mean["estimate"], atol=1e-9)


PORTIONS: dict[str, Callable[[int], Any]] = {
    "subspace": lambda d: lambda value: value.along(random(3, d)),
    "features": lambda d: lambda value: value.features(poor(d, 40), slice(0, 20)),
    "clamped": lambda d: lambda value: poor(d, 40).clamp([1, 3], [2.0, -1.0]),
}


def by_features(dictionary: Any, chosen: Any, live: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The textbook's way: features are replaced, and what the dictionary does not explain stays."""
    encode, decode = coder(dictionary, live.dtype)
    before = encode(live)
    after = before.clone()
    after[:, list(chosen)] = other.to(live) if other.ndim == 1 else encode(other)[:, list(chosen)]
    changed: torch.Tensor = live + decode(after) - decode(before)
    return changed


@pytest.mark.parametrize("kind", PORTIONS)
def test_estimates_of_portions_are_slopes_too(kind: str) -> None:
    model = model_of("gpt2")
    with tp.patching(model, PAIRS) as p:
        part = PORTIONS[kind](p.architecture.d_model)(p.clean.resid_pre[1, -1])
        with p.row(name="x"):
            p.corrupted.resid_pre[1, -1] = part
    d = p.architecture.d_model
    span = torch.linalg.pinv(random(3, d).double()) @ random(3, d).double()
    made: Any = {
        "subspace": lambda live, clean: live + (clean - live) @ span.to(live),
        "features": lambda live, clean: by_features(poor(d, 40), range(20), live, clean),
        "clamped": lambda live, clean: by_features(poor(d, 40), [1, 3], live, torch.tensor([2.0, -1.0])),
    }[kind]

    def record(exact: Any, step: float) -> None:
        def moved(live: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
            change: torch.Tensor = live + step * (made(live, clean) - live)
            return change

        with exact.row(name="x"):
            exact.corrupted.resid_pre[1, -1] = moved

    np.testing.assert_allclose(p.estimate()["estimate"], slope(model, record), rtol=3e-3, atol=1e-3)
    line = tp.IntegratedGradients(2, along="site")
    if kind == "subspace":
        assert np.isfinite(p.estimate(line)["estimate"]).all()
    else:
        with pytest.raises(errors.RecipeError, match="features of a dictionary do not follow a line"):
            p.estimate(line)


def test_a_subspace_of_everything_is_estimated_as_the_whole() -> None:
    model = model_of("gpt2")
    with tp.patching(model, PAIRS) as p:
        for number in range(2):
            with p.row(number=number):
                value = p.clean.resid_pre[1, -1]
                p.corrupted.resid_pre[1, -1] = value.along(orthogonal(p.architecture.d_model)) if number else value
    found = p.estimate()["estimate"]
    np.testing.assert_allclose(found.sel(number=0), found.sel(number=1), atol=1e-9)


METRICS: dict[str, Any] = {
    "attention": tp.attention(2, 1, src=3),
    "neuron": tp.neuron(1, 5),
    "direction": tp.direction(torch.linspace(-1, 1, tiny_models.D_MODEL), "resid_post", (1, -1)),
    "direct": tp.direct_logit_diff("mlp_out", (2, -1)),
    "prefix matching": tp.prefix_matching(2, 0),
    "basket": tp.basket({WORDS[0]: 1.0, WORDS[3]: -0.5}, of="log_prob"),
    "prob_diff": tp.prob_diff,
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_can_be_differentiated(kind: str) -> None:
    """Estimates of a metric of an activation are slopes of what is measured of it."""
    model, metric = model_of("gpt2"), METRICS[kind]
    found = tp.attribute(model, PAIRS, "mlp_out", metric, by=("layer", "pos"), only={"layer": [0], "pos": slice(0, 6)})

    def record(p: Any, step: float) -> None:
        for pos in range(6):
            with p.row(layer=0, pos=pos):
                there = p.corrupted.mlp_out[0, pos]
                p.corrupted.mlp_out[0, pos] += step * (p.clean.mlp_out[0, pos] - there)

    wanted = slope(model, record, metric)
    np.testing.assert_allclose(found["estimate"], wanted, rtol=3e-3, atol=2e-3 * float(abs(wanted).max()))
    assert float(abs(wanted).max()) > 0 or kind == "prefix matching"


def test_a_metric_that_jumps_is_not_differentiated() -> None:
    with pytest.raises(errors.MetricError, match="accuracy jumps, so that no gradient"):
        tp.attribute(model_of("gpt2"), PAIRS, "mlp_out", tp.accuracy)
