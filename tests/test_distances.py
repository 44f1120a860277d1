"""How far a stream is off its distribution, against covariances that are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from numpy.typing import NDArray

import tracepatch as tp
from tracepatch import errors
from tracepatch.distances import Usual
from tracepatch.toys import tasks

ALL = slice(None)
Floats = NDArray[np.float64]


def prompts(count: int, seed: int = 0) -> list[str]:
    return list(tasks.ioi(count, seed=seed, templates=[tasks.TEMPLATES[0]]).clean)


def slowly(known: Floats, vectors: Floats) -> Floats:
    """Squared distances, with the whole covariance and sample by sample (Ledoit & Wolf 2004, section 3.3)."""
    count, d = known.shape
    mean = known.mean(0)
    apart = known - mean
    sample = sum(np.outer(x, x) for x in apart) / count
    middle = np.trace(sample) / d
    target = middle * np.eye(d)
    spread = ((sample - target) ** 2).sum() / d
    noise = sum(((np.outer(x, x) - sample) ** 2).sum() / d for x in apart) / count**2
    shrunk = min(noise, spread) / spread
    inverse = np.linalg.inv(shrunk * target + (1 - shrunk) * sample)
    found: Floats = np.array([(v - mean) @ inverse @ (v - mean) for v in vectors])
    return found


@pytest.mark.parametrize("shape", [(30, 7), (9, 20), (200, 4)])
def test_distances_are_mahalanobis_with_a_shrunk_covariance(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(shape, generator=generator, dtype=torch.float64) @ torch.randn(
        shape[1], shape[1], generator=generator, dtype=torch.float64
    )
    others = torch.randn(5, shape[1], generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(Usual.of(known).squared(others), slowly(known.numpy(), others.numpy()), rtol=1e-8)


def test_the_metric_is_the_distance_of_the_patched_stream(gpt2: Any) -> None:
    pairs, known = ioi_pairs(2), prompts(40, seed=5)
    away = tp.off_distribution(gpt2, known)
    with tp.patching(gpt2, pairs, {"away": away, "logit_diff": tp.logit_diff}) as p:
        with p.row(name="nothing"):
            p.corrupted.mlp_out[0, :] = p.corrupted.mlp_out[0, :]
            same = p.save(p.corrupted.logits_in[-1])
        with p.row(name="far"):
            p.corrupted.resid_post[1, -1] = 5.0 * p.clean.resid_post[1, -1]
            far = p.save(p.corrupted.logits_in[-1])
    found = p.run(progress=False).sel(metric="away")
    with tp.patching(gpt2, tp.Pairs(known), tp.metric(lambda x: x[:, 0], component="logits_in", index=-1)) as q:
        with q.row():
            seen = q.save(q.clean.logits_in[-1])
    q.run(progress=False)
    values = seen.values.values.astype(float)
    held = [np.arange(40) % 8 == fold for fold in range(8)]
    typical = np.sqrt(np.concatenate([slowly(values[~out], values[out]) for out in held]).mean())
    for name, save in (("nothing", same), ("far", far)):
        wanted = np.sqrt(slowly(values, save.values.values.astype(float))) / typical
        np.testing.assert_allclose(found["value"].sel(name=name), wanted, rtol=1e-3)
    assert (found["value"].sel(name="far") > 3).all()
    np.testing.assert_allclose(found["value"].sel(name="nothing"), found["corrupted"], rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_unseen_prompt_is_about_1_and_a_stream_too_long_beyond_it(name: str) -> None:
    model, prompted = toy(name), tasks.ioi(30, seed=9, templates=[tasks.TEMPLATES[0]])
    pairs = tp.Pairs(prompted.clean, prompted.corrupted, prompted.answer, prompted.wrong)
    away = tp.off_distribution(model, prompts(60, seed=5))
    with tp.patching(model, pairs, away) as p, p.row(name="off"):
        p.clean.resid_post[1, -1] = 5 * p.clean.resid_post[1, -1]
    found = p.run(progress=False)
    assert 0.7 < float((found["clean"] ** 2).mean()) ** 0.5 < 1.4
    assert float(found["value"].mean()) > 2


def test_it_can_be_differentiated_and_swept(gpt2: Any) -> None:
    away, pairs = tp.off_distribution(gpt2, prompts(16, seed=5)), ioi_pairs(2)
    estimate = tp.attribute(
        gpt2, pairs, "mlp_out", away, source=0, direction="noising", only={"layer": [1], "pos": [-1]}
    )
    step = 1e-2
    ends = []
    for sign in (step, -step):
        with tp.patching(gpt2, pairs, away, checks=False) as p, p.row(name="x"):
            p.clean.mlp_out[1, -1] += -sign * p.clean.mlp_out[1, -1]
        ends.append(p.run(progress=False)["effect"].values)
    np.testing.assert_allclose(estimate["estimate"].values.ravel(), ((ends[0] - ends[1]) / 2 / step).ravel(), rtol=2e-2)
    swept = tp.sweeps.windows(gpt2, pairs, "mlp_out", [1, 2], {"logit_diff": tp.logit_diff, "away": away}, by="layer")
    assert bool((swept["value"].sel(metric="away") > 0).all())


def test_what_is_no_distribution(gpt2: Any) -> None:
    with pytest.raises(errors.MetricError, match="pass 8 or more, not 3"):
        tp.off_distribution(gpt2, prompts(3))
    with pytest.raises(errors.MetricError, match="takes one vector a prompt"):
        tp.off_distribution(gpt2, prompts(8), "resid_post", (1, ALL))
    with pytest.raises(errors.MetricError, match="nothing is unusual"):
        tp.off_distribution(gpt2, prompts(1) * 9)
