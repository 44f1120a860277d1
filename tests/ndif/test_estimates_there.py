"""Attribution on a real server: the numbers of a run here, scores alone come home; in a sandbox it says that it cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Served
from test_patching import away, counted, here, kind, prompts  # noqa: F401  # fixtures

import tracepatch as tp
from tracepatch import requests
from tracepatch.errors import ServerError

pytestmark = [
    pytest.mark.ndif,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
TOYS = tp.toys.NAMES
STUDIES: dict[str, Any] = {
    "heads": lambda m, p: tp.attribute(m, p, "z", by=("layer", "pos", "head")),
    "stream, noising": lambda m, p: tp.attribute(m, p, "resid_pre", direction="noising"),
    "several": lambda m, p: tp.attribute(m, p, ("attn_out", "mlp_out")),
    "readers": lambda m, p: tp.attribute(m, p, "q_in"),
    "edges": tp.edges,
    "edges, integrated": lambda m, p: tp.edges(m, p, estimator=tp.IntegratedGradients(2, along="layer")),
    "zero ablation": lambda m, p: tp.attribute(m, p, "mlp_act", direction="noising", source=0),
    "held": lambda m, p: tp.attribute(m, p, "z", estimator=tp.AtP(hold=("norms", "pattern"))),
    "AtP*": lambda m, p: tp.attribute(m, p, ("q", "k"), by=("layer",), estimator=tp.AtPStar(drop=True)),
    "integrated": lambda m, p: tp.attribute(m, p, "z", estimator=tp.IntegratedGradients(3)),
    "RelP": lambda m, p: tp.attribute(m, p, "z", estimator=tp.RelP()),
    "weights": lambda m, p: tp.attribute(m, p, "pattern", renormalize=True),
    "attention": tp.attention_attribution,
    "flow": tp.value_flow,
    "metric of one's own": lambda m, p: tp.attribute(m, p, "z", tp.metric(surprise)),
}


def surprise(logits: Any) -> Any:
    return logits.log_softmax(-1)[:, 7].tanh()


@pytest.fixture
def only_trusted(ndif: Served) -> None:
    if ndif.kind != "trusted":
        pytest.skip("gradients fail in a sandbox")


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", TOYS)
def test_estimates_are_those_of_a_run_here(only_trusted: None, counted: list[int], name: str, study: str) -> None:  # noqa: F811
    ours = STUDIES[study](here(name), prompts())
    assert not counted
    theirs = STUDIES[study](away(name), prompts())
    assert len(counted) == 1, "one request"
    scale = max(1.0, float(abs(ours["estimate"]).max()))
    np.testing.assert_allclose(theirs["estimate"], ours["estimate"], atol=1e-5 * scale)
    assert theirs.attrs["cost"] == ours.attrs["cost"]


@pytest.mark.usefixtures("only_trusted")
def test_recorded_rows_are_estimated_there() -> None:
    from tracepatch.recipes import ioi

    ours, theirs = (ioi.heads.estimate(model, prompts()) for model in (here("gpt2"), away("gpt2")))
    np.testing.assert_allclose(theirs["estimate"], ours["estimate"], atol=1e-4)


@pytest.mark.usefixtures("only_trusted")
def test_scores_alone_come_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kilobytes, where the activations and gradients are megabytes."""
    sizes: list[int] = []
    plain = requests._waited

    def waited(*given: Any) -> Any:
        answer = plain(*given)
        sizes.append(sum(t.numel() * t.element_size() for t in _tensors(answer)))
        return answer

    monkeypatch.setattr(requests, "_waited", waited)
    tp.attribute(away("gpt2"), prompts(), ("z", "head_out"))
    whole = tp.gradients(away("gpt2"), prompts(), components=("z", "head_out"))
    assert sizes[0] < 4_000
    assert sizes[1] > 50 * sizes[0]
    assert abs(sizes[1] - whole.bytes) < 2_000
    local = tp.gradients(here("gpt2"), prompts(), components=("z", "head_out"))
    np.testing.assert_allclose(whole.attribute("z")["estimate"], local.attribute("z")["estimate"], atol=1e-4)


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return [value] if hasattr(value, "element_size") else []


def test_a_sandbox_says_so_and_what_to_do_instead(ndif: Served) -> None:
    if ndif.kind != "sandbox":
        pytest.skip("trusted")
    with pytest.raises(ServerError, match=r"sandbox, and gradients fail there. Patch exactly instead \(tp\.patch\)"):
        tp.attribute(away("gpt2"), prompts(), "z")
