"""What is planned: golden texts, exact counts, and that whatever was pruned would have measured zero."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
from conftest import ioi_pairs, toy

import tracepatch as tp
from tracepatch.architecture import architecture_of
from tracepatch.plan import Proof

EXPLAINED = """\
42 rows × 2 pairs on toy-gpt2 (3 layers)
  metric       logit_diff [logits] at position -1
  patches      84
          -62  writes what is there: the worlds' tokens agree so far and attention is causal, or it is the base's own value
           22  to be measured
  batches      1 packed (tokens side by side, from each row's first edit on) of up to 22 rows in 110 tokens, 1 with the worlds
  traced runs  1
  forwards     5.7, counted in tokens and layers, instead of 88 (15.4 × fewer)
  memory       about 726 kB a run, budget 1.07 GB"""

MIXED = """\
9 rows × 2 pairs on toy-gpt2 (3 layers)
  metric       logit_diff [logits] at position -1; kl [nats] at position -1
  patches      17 (1 more have no such position in their pair)
           -2  writes what is there: the worlds' tokens agree so far and attention is causal, or it is the base's own value
           -6  cannot reach the metric: after the last position read, or beside it with no attention left to carry it
           -2  each of its positions falls under one of the two proofs above
           -2  the same edits on the same pair are measured once
            5  to be measured
  batches      5 packed (tokens side by side, from each row's first edit on) of up to 1 row in 2 tokens
  traced runs  7, 2 of them for the 4 unpatched worlds
  forwards     4.5, counted in tokens and layers, instead of 21 (4.6 × fewer)
  memory       about 190 kB a run, budget 1.07 GB
  note         logit_diff: normalized ±0.5 may mean that nothing is left: rows here write neither prompt's values, and a run that knows neither answer is halfway between opposite prompts"""


def timeless(told: str) -> str:
    """Without the line of the estimated time, which depends on what has run before."""
    kept, found = re.subn(
        r"\n  time         about \S+ (s|min), (before any|going by the last) run of this model( +measured .*)?",
        "",
        told,
    )
    assert found == 1
    return kept


def mixed(p: tp.Patching) -> None:
    """A row for each thing that planning can find."""
    longest = p.lengths[-1]
    with p.row(name="equal"):
        p.corrupted.z[1, 2, 0] = p.clean.z[1, 2, 0]
    with p.row(name="beside"):
        p.corrupted.mlp_out[-1, -2] = p.clean.mlp_out[-1, -2]
    with p.row(name="both"):
        p.corrupted.z[1, 2, 0] = p.clean.z[1, 2, 0]
        p.corrupted.mlp_out[-1, :-1] = p.clean.mlp_out[-1, :-1]
    with p.row(name="one"):
        p.corrupted.z[0, -1, 1] = 0
    with p.row(name="twin"):
        p.corrupted.z[0, -1, 1] = 0.0
    with p.row(name="other"):
        p.corrupted.z[0, -1, 1] = p.clean.z[0, -1, 1]
    with p.row(name="not everywhere"):
        p.corrupted.mlp_out[-1, longest - 1] = 0
    with p.row(name="logits"):
        p.corrupted.logits[0] = 0
    with p.row(name="unread"):
        p.corrupted.resid_post[-1, 3] = 0


def test_explain_a_sweep(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    assert p.plan is not None
    assert timeless(p.plan.explain()) == EXPLAINED
    assert [line for line in EXPLAINED.splitlines() if "measured " in line] == []
    p.run()
    told = p.plan.explain()
    number = r"\d(\.\d+|e-\d+)?"
    assert re.search(r"\n  time         about .* +measured [\d.]+ s, [\d,]+ rows a second\n", told)
    told = timeless(told)
    forwards, memory = EXPLAINED.splitlines()[-2:]
    # Beside what was planned, the checks measured two rows as whole prompts.
    assert f"\n{forwards}  measured 7.7\n{memory:<{len(forwards)}}  measured on CUDA devices only\n" in told
    assert told.startswith(EXPLAINED.removesuffix(f"\n{forwards}\n{memory}"))
    assert re.search(
        rf"devices only\n  checks       eager attention differs by {number}; witnesses drift by {number} logits; "
        rf"row \d+ \(layer=\d, pos=\d+\) of pair \d alone gives the same to {number} logits; "
        rf"row \d+ \(layer=\d, pos=\d+\) of pair \d, proved zero, is its base to {number} logits; "
        r"all 22 edits fired; 0 rows unchanged$",
        told,
    )


@pytest.mark.parametrize("form", ["packed", "staggered", "flat"])
def test_what_is_counted_is_what_is_traced(form: Any, gpt2: Any) -> None:
    """The estimate of forwards is made of seats; the measurement counts what the layers are given."""
    for metric in (tp.logit_diff, tp.kl, tp.metric(lambda z: z.sum(-1), component="z", index=(1, -1, 2))):
        with tp.patching(gpt2, ioi_pairs(2), metric, form=form, checks=False) as p:
            p.world("noised", of=p.clean).embed[3] += p.gaussian(1.0)
            for layer, pos in p.grid("resid_mid"):
                with p.row(layer=layer, pos=pos):
                    p.corrupted.resid_mid[layer, pos] = p.clean.resid_mid[layer, pos]
        p.run()
        assert p.plan.measured["forwards"] == pytest.approx(p.plan.estimate.forwards)


def test_explain_everything_else(gpt2: Any) -> None:
    pairs = ioi_pairs(1, 0) + ioi_pairs(1, 1)
    with tp.patching(gpt2, pairs, [tp.logit_diff, tp.kl], batch_size=1) as p:
        mixed(p)
    assert p.plan is not None
    assert timeless(p.plan.explain()) == MIXED
    found = {row.labels["name"]: Proof(p.plan.proofs[i, 1]).name for i, row in enumerate(p.rows)}
    assert found == {
        "equal": "EQUAL",
        "beside": "UNREACHABLE",
        "both": "BOTH",
        "one": "NONE",
        "twin": "IDENTICAL",
        "other": "NONE",
        "not everywhere": "NONE",
        "logits": "UNREACHABLE",
        "unread": "UNREACHABLE",
    }
    result = p.run()
    assert result["status"].sel(name="not everywhere").values.tolist() == [
        int(tp.Status.ABSENT),
        int(tp.Status.MEASURED),
    ]
    assert np.isnan(result["value"].sel(name="not everywhere", pair=0)).all()
    twins = result["value"].sel(name=["one", "twin"]).values
    assert (twins[..., 0] == twins[..., 1]).all()


def test_edits_that_are_equal_on_one_pair_may_differ_on_the_next(gpt2: Any) -> None:
    """The last token of the shorter prompt stands in the midst of the longer one."""
    pairs = ioi_pairs(1, 0) + ioi_pairs(1, 1)
    found = []
    for prune in (True, False):
        with tp.patching(gpt2, pairs, prune=prune) as p:
            for name, pos in (("last", -1), ("of the shorter", min(p.lengths) - 1)):
                with p.row(name=name):
                    p.corrupted.attn_out[0, pos] = 0
        found.append(p.run()["effect"])
    pruned, measured = found
    np.testing.assert_allclose(pruned, measured, atol=1e-5)
    assert (pruned.sel(pair=0) == pruned.sel(pair=0, name="last")).all()
    assert abs(np.diff(pruned.sel(pair=1)))[0] > 1e-3


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_whatever_is_pruned_measures_zero(name: str) -> None:
    model = toy(name)
    pairs = ioi_pairs(1, 2)
    for component in tp.COMPONENTS:
        if not architecture_of(model).offers(component, 0):
            continue
        kind = tp.COMPONENTS[component]
        by = ("layer", kind.place) if kind.layered else (kind.place,)
        for direction in ("denoising", "noising"):
            pruned = tp.patch(model, pairs, component, by=by, direction=direction)
            measured = tp.patch(model, pairs, component, by=by, direction=direction, prune=False)
            zero = pruned["status"] == tp.Status.PROVED_ZERO
            assert zero.any()
            assert (pruned["effect"].where(zero, 0) == 0).all()
            assert float(abs(measured["effect"].where(zero, 0)).max()) < 1e-4, (component, direction)


def test_the_first_layers_stream_is_local() -> None:
    """Before any attention a value depends on its own token, so that positions after the difference are "
    "inert as well."""
    model, pairs = toy("gpt2"), ioi_pairs(1)
    (position,) = pairs.encode(model.tokenizer).differing(0)
    status = tp.patch(model, pairs, "resid_pre", only={"layer": [0]})["status"].values[0, 0]
    assert np.flatnonzero(status == tp.Status.MEASURED).tolist() == [position]


def test_a_later_set_overrides(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="twice"):
            p.corrupted.head_out[1, -1, 2] = 5.0
            p.corrupted.head_out[1, -1, 2] += 1.0
            p.corrupted.head_out[1, -1, 2] = p.clean.head_out[1, -1, 2]
        with p.row(name="once"):
            p.corrupted.head_out[1, -1, 2] = p.clean.head_out[1, -1, 2]
    assert p.plan is not None
    assert p.plan.jobs == len(pairs)


def test_jobs_carry_where_they_begin(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p, p.row(name="joint"):
        p.corrupted.mlp_out[2, -1] = 0
        p.corrupted.z[1, 5:, 0] = 0
    assert p.plan is not None
    (job, *_), *_ = [b.jobs for g in p.plan.groups for b in g.batches]
    assert (job.birth, job.start) == (1, 5)
    assert [w.component for w in job.writes] == ["z", "mlp_out"]


def test_memory_bounds_a_run(gpt2: Any, pairs: tp.Pairs) -> None:
    def largest(**options: Any) -> int:
        with tp.patching(gpt2, pairs, **options) as p:
            for layer, head in p.grid("z", by=("layer", "head")):
                with p.row(layer=layer, head=head):
                    p.corrupted.z[layer, :, head] = 0
        assert p.plan is not None
        return max(len(b.jobs) for g in p.plan.groups for b in g.batches)

    assert largest() == 36
    assert largest(batch_size=5) == 5
    assert largest(memory=300_000) < 12
    assert largest(memory=1) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("count", "limit"), [(2_000, 0.2), (100_000, 2.0)])
def test_planning_takes_no_time(gpt2: Any, count: int, limit: float) -> None:
    """Seconds of this process, and twice as many where others share the core."""
    p = tp.patching(gpt2, ioi_pairs(1))
    for number in range(count):
        layer, head, pos, scale = number % 3, number // 3 % 4, number // 12 % 14, number // 168
        with p.row(number=number):
            p.corrupted.z[layer, pos, head] = (1 + scale) * p.clean.z[layer, pos, head]
    p.make_plan()  # tries the forms of the model
    began = time.process_time()
    plan = p.make_plan()
    assert time.process_time() - began < 2 * limit
    assert plan.jobs > count / 2
