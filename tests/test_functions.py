"""Functions as sources: what they are given, what they may return, and that their rows share batches with others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap

import tracepatch as tp
from tracepatch import errors

SITES = [
    ("resid_pre", (1, 5)), ("resid_pre", (1, slice(3, None))), ("z", (1, slice(None), 2)), ("z", (1, -1, [0, 3])), ("z", (0, slice(None), slice(None))),
    ("head_out", (1, slice(None), 1)), ("head_out", (0, -1, slice(None))), ("mlp_act", (1, -1, [3, 5])), ("mlp_act", (1, slice(None))), ("attn_out", (0, [2, 9])),
    ("k", (1, slice(None), 0)), ("resid_mid", (1, -1)), ("embed", (slice(None),)), ("logits", (-1,)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [3, None])
def test_a_function_that_adds_is_a_sum(name: str, batch_size: int | None) -> None:
    """The same row written with arithmetic, measured by the oracle."""
    model = toy(name)
    with tp.patching(model, ioi_pairs(2), batch_size=batch_size) as p:
        for number, (component, site) in enumerate(SITES):
            mine, clean = getattr(p.corrupted, component), getattr(p.clean, component)
            with p.row(number=number, way=0):
                mine[site] = lambda live, clean, corrupted: 2 * clean - corrupted / 2 + 0 * live
            with p.row(number=number, way=1):
                mine[site] = 2 * clean[site] - mine[site] / 2
            with p.row(number=number, way=2):
                p.corrupted.resid_pre[0, 4:] = p.clean.resid_pre[0, 4:]
                mine[site] = lambda live: 3 * live
            with p.row(number=number, way=3):
                p.corrupted.resid_pre[0, 4:] = p.clean.resid_pre[0, 4:]
                mine[site] += lambda live: 2 * live
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(way=0), value.sel(way=1), atol=3e-4)
    np.testing.assert_allclose(value.sel(way=2), value.sel(way=3), atol=3e-4)
    slow = Slow(tp.models.module_of(model), p.encoded)
    sums = [row for row in p.rows if row.labels["way"] == 1]
    np.testing.assert_allclose(value.sel(way=1).values.T, slow.score(sums, gap(p.encoded)), atol=3e-4)
    assert float(abs(value.sel(way=2) - value.sel(way=1)).max()) > 0.1


def test_what_a_function_is_given(gpt2: Any, pairs: tp.Pairs) -> None:
    """Rows in front, the site's own dims behind, the base's value as the live one where nothing came before."""
    seen: list[tuple[torch.Size, bool]] = []

    def look(live: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        seen.append((live.shape, bool(torch.allclose(live, corrupted, atol=1e-4)) and not torch.allclose(live, clean)))
        return live

    with tp.patching(gpt2, pairs) as p:
        for head in range(4):
            with p.row(head=head):
                p.corrupted.z[1, 9:, head] = look
    with pytest.warns(errors.MeasurementWarning, match="all 12 rows unchanged"):
        result = p.run()
    assert ((4 * len(pairs), 5, 16), True) in seen
    assert float(abs(result["effect"]).max()) < 1e-4, "writing the live value back changes nothing"


def test_a_function_sees_all_positions_even_those_that_prune(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="mean"):
            p.corrupted.mlp_out[-1, :] = lambda live: live.mean(1, keepdim=True).expand_as(live)
        with p.row(name="unreachable"):
            p.corrupted.mlp_out[-1, :-1] = lambda live: 0 * live
    result = p.run()
    kept = Slow(tp.models.module_of(gpt2), p.encoded).values["corrupted", 0]["mlp_out", 2].mean(0)
    with tp.patching(gpt2, pairs[0]) as q, q.row(name="by hand"):
        q.corrupted.mlp_out[-1, -1] = kept
    np.testing.assert_allclose(
        result["value"].sel(name="mean", pair=0), q.run()["value"].sel(name="by hand", pair=0), atol=1e-4
    )
    assert (result["status"].sel(name="unreachable") == tp.Status.PROVED_ZERO).all()


def test_without_corrupted_prompts_there_is_none(gpt2: Any) -> None:
    pairs = tp.Pairs("When John and Mary went to the store, John gave the bag to", answer=" Mary", wrong=" John")
    with tp.patching(gpt2, pairs) as p, p.row(name="x"):
        p.clean.z[1, :, 0] = lambda live, clean, corrupted: clean * (0 if corrupted is None else 1)
    zero = tp.patch(gpt2, pairs, "z", direction="noising", source=0, only={"layer": [1], "head": [0]})
    np.testing.assert_allclose(p.run()["value"].values.ravel(), zero["value"].values.ravel(), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: a, "takes 2 values"),
        (lambda live: live[0, 0, 0].item(), "must return a tensor that fits"),
        (lambda live: live.mean(0), None),
        (
            lambda live: live[:, :2],
            "must return a tensor that fits z[1, 9:, 2], [row 2, pos 5, d_head 16]; it returned a tensor of shape [2, 2, 16]",
        ),
        (lambda live: live @ torch.ones(3), "fails on values [row 2, pos 5, d_head 16]: RuntimeError"),
    ],
)
def test_functions_that_do_not_fit(gpt2: Any, pairs: tp.Pairs, function: Any, message: str | None) -> None:
    p = tp.patching(gpt2, pairs)
    if message is None:  # it broadcasts, but mixes rows
        message = "mixes rows"
    with pytest.raises(errors.RecipeError) as error, p.row():
        p.corrupted.z[1, 9:, 2] = function
    assert message in str(error.value)


def test_functions_are_not_added_to(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError, match="do the arithmetic inside the function"), p.row():
        p.corrupted.z[1, :, 2] = p.clean.z[1, :, 2] + (lambda live: live)


def test_a_function_takes_the_live_value_after_the_rows_earlier_edits_of_the_same_site(
    gpt2: Any, pairs: tp.Pairs
) -> None:
    """Setting what a function then reads is not overridden by it: the function needs it."""
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="both"):
            p.corrupted.z[1, :, 2] = p.clean.z[1, :, 2]
            p.corrupted.z[1, :, 2] = lambda live: 2 * live
        with p.row(name="at once"):
            p.corrupted.z[1, :, 2] = 2 * p.clean.z[1, :, 2]
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="both"), value.sel(name="at once"), atol=1e-5)


def test_a_function_carries_what_was_written_after_the_last_position_read(gpt2: Any, pairs: tp.Pairs) -> None:
    """Nothing reaches back to the metric by itself; a function that turns the positions round takes it there."""
    values = []
    for prune in (True, False):
        with tp.patching(gpt2, pairs, metric=tp.logit_diff.at(3), prune=prune) as p, p.row():
            p.corrupted.resid_pre[0, 12] = 0
            p.corrupted.resid_pre[1, :] = lambda live: live.flip(1)
        values.append(p.run()["value"].values)
    np.testing.assert_allclose(*values, atol=1e-5)
