"""Audits say what exact patches say: against full sweeps, enumerations and simulated draws; and in words."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import ioi_pairs, toy
from matplotlib.text import Text
from test_plots import drawn as painted

import tracepatch as tp
from tracepatch.agreement import correlation, ranks
from tracepatch.errors import RecipeError, ResultError
from tracepatch.plan import Proof, Status
from tracepatch.population import Exact, Population
from tracepatch.sampling import Stratum, binomial, drawn_by_rank, hypergeometric, likely, most, needed
from tracepatch.toys import tasks
from tracepatch.toys.wired import wired, wired_pairs
from tracepatch.verifying import Search

BY = ("layer", "pos", "head")


@cache
def swapped_keys(count: int = 8, seed: int = 0) -> tp.Pairs:
    """Induction prompts ``… X A … Y B … X`` with X and Y exchanged but for the last: what tells A is what stands before.

    The previous-token head carries all of that to the keys of the induction head.
    """
    chance = random.Random(f"keys {seed}")
    columns: list[list[str]] = [[], [], [], []]
    while len(columns[0]) < count:
        made = tasks.induction(1, seed=chance.randrange(10**6))
        words, answer = made.clean[0].split(), made.answer[0].strip()
        last, repeated = words[-1], sorted(w for w in set(words) if words.count(w) > 1)
        other = chance.choice([w for w in repeated if w not in (words[-1], answer)])
        exchanged = [{last: other, other: last}.get(w, w) for w in words[:-1]] + [last]
        before = max(i for i, w in enumerate(exchanged[:-1]) if w == last)
        wrong = exchanged[before + 1]
        if wrong in (answer, last):
            continue
        for column, entry in zip(
            columns, (" ".join(words), " ".join(exchanged), f" {answer}", f" {wrong}"), strict=True
        ):
            column.append(entry)
    return tp.Pairs(*columns, name="induction, keys")


@cache
def swept(component: str = "z", by: tuple[str, ...] = BY) -> tuple[xr.Dataset, xr.Dataset]:
    """An estimate and the exact sweep of one toy."""
    given = toy("gpt2"), ioi_pairs(3)
    return tp.attribute(*given, component, by=by), tp.patch(*given, component, by=by)


@cache
def audited(top: int = 4, sample: int = 12, seed: int = 0, **options: Any) -> xr.Dataset:
    return tp.audit(toy("gpt2"), ioi_pairs(3), swept()[0], top=top, sample=sample, seed=seed, **options)


def over_pairs(dataset: xr.Dataset, variable: str) -> np.ndarray[Any, Any]:
    """Ratios of means, the slow way: ``[*cells]``."""
    values, gaps = dataset[variable].transpose("pair", ...).values, (dataset["clean"] - dataset["corrupted"]).values
    out = np.full(values.shape[1:], np.nan)
    for at in np.ndindex(*out.shape):
        there = [pair for pair in range(len(values)) if not np.isnan(values[(pair, *at)])]
        if there:
            out[at] = sum(values[(pair, *at)] for pair in there) / sum(gaps[pair] for pair in there)
    return out


# ------------------------------------------------------------------------------------------------------ the statistics


def test_tails_are_sums_of_fractions() -> None:
    for cells, marked, drawn, found in itertools.product((7, 12), (0, 3, 6), (0, 2, 5), (0, 1, 2)):
        ways = [
            Fraction(math.comb(marked, i) * math.comb(cells - marked, drawn - i), math.comb(cells, drawn))
            for i in range(min(found, drawn) + 1)
            if drawn - i <= cells - marked
        ]
        assert hypergeometric(cells, marked, drawn, found) == pytest.approx(float(sum(ways)), abs=1e-12)
    for trials, chance, found in itertools.product((1, 6, 40), (0.0, 0.3, 1.0), (0, 1, 5)):
        exact = sum(
            math.comb(trials, i) * chance**i * (1 - chance) ** (trials - i) for i in range(min(found, trials) + 1)
        )
        assert binomial(trials, chance, found) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("strata", [((9, 4),), ((3, 1), (4, 2), (5, 2)), ((4, 2), (4, 2), (4, 1)), ((5, 3), (6, 4))])
def test_a_tail_bounds_every_way_to_spread_marked_cells(strata: tuple[tuple[int, int], ...]) -> None:
    """Enumerated: the probability under each allocation to the strata, by convolution."""
    given = [Stratum(*s) for s in strata]
    tight = 0
    for spread in itertools.product(*(range(s.cells + 1) for s in given)):
        whole = [Fraction(1)]
        for s, marked in zip(given, spread, strict=True):
            own = [
                Fraction(math.comb(marked, i) * math.comb(s.cells - marked, s.drawn - i), math.comb(s.cells, s.drawn))
                for i in range(s.drawn + 1)
            ]
            whole = [
                sum((whole[j] * own[i - j] for j in range(len(whole)) if 0 <= i - j < len(own)), Fraction(0))
                for i in range(len(whole) + len(own) - 1)
            ]
        for found in range(sum(s.drawn for s in given) + 1):
            exact, bound = float(sum(whole[: found + 1])), likely(given, sum(spread), found)
            assert bound >= exact - 1e-12, (spread, found)
            tight += 0.02 < exact < bound < 1.6 * exact or (len(given) == 1 and bound == pytest.approx(exact))
    assert tight > 10, "the bound is not idle"


def test_the_bound_is_the_largest_number_that_is_not_unlikely() -> None:
    for cells, drawn, found in ((40, 10, 0), (40, 10, 3), (124, 50, 1), (40, 40, 7), (40, 0, 0)):
        bound = most([Stratum(cells, drawn)], found, 0.95)
        assert found <= bound <= cells - (drawn - found)
        assert bound == found or hypergeometric(cells, bound, drawn, found) > 0.05
        if bound < cells - (drawn - found):
            assert hypergeometric(cells, bound + 1, drawn, found) <= 0.05
    assert most([Stratum(124, 50)], 0, 0.95) == 5
    assert most([Stratum(25, 10)] * 4 + [Stratum(24, 10)], 0, 0.95) == 5, "strata cost nearly nothing"
    assert most([Stratum(10, 10)] * 2, 3, 0.95) == 3
    for allowed in (0, 1, 6):
        count = needed(100, 0.95, allowed)
        assert most([Stratum(100, count)], 0, 0.95) <= allowed < most([Stratum(100, count - 1)], 0, 0.95)


def test_samples_are_spread_over_ranks_and_all_cells_are_alike_in_a_band() -> None:
    order = np.arange(100, 153)
    counts = np.zeros(200)
    for seed in range(2000):
        chosen, stands, strata = drawn_by_rank(order, 12, np.random.default_rng(seed))
        assert len(set(chosen)) == 12
        assert [s.drawn for s in strata] == [3, 3, 2, 2, 2]
        assert sum(s.cells for s in strata) == 53
        assert stands.sum() == pytest.approx(53)
        counts[chosen] += 1
    shares = counts[100:153] / 2000
    np.testing.assert_allclose(
        shares, np.repeat([3 / 11, 3 / 11, 2 / 11, 2 / 10, 2 / 10], [11, 11, 11, 10, 10]), atol=0.05
    )
    everything, stands, strata = drawn_by_rank(order, 99, np.random.default_rng(0))
    assert sorted(everything) == list(order)
    assert set(stands) == {1.0}
    assert strata == (Stratum(53, 53),)
    assert drawn_by_rank(order, 0, np.random.default_rng(0))[2] == (Stratum(53, 0),)


HIDDEN = {
    "nothing is hidden": np.concatenate([np.linspace(2, 1, 5), np.linspace(0.5, 0.1, 55)]),
    "a few are": np.concatenate([np.linspace(2, 1, 5), np.linspace(3, 2.5, 8), np.linspace(0.5, 0.1, 47)]),
    "the estimates are useless": np.random.default_rng(1).random(60),
    "every fifth is": np.concatenate([np.linspace(2, 1, 5), *[[2.5 - i / 9, 0.4, 0.3, 0.2, 0.1] for i in range(11)]]),
}


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("name", HIDDEN)
def test_the_claim_beyond_the_kth_largest_that_was_patched_holds_as_often_as_said(name: str, rank: int) -> None:
    """The threshold is an effect that was patched, so it depends on the draw: simulated for all that may be hidden."""
    effects, order, chance = HIDDEN[name], np.arange(60), np.random.default_rng(0)
    wrong, draws, confidence = 0, 1500, 0.9
    for _ in range(draws):
        chosen, _, strata = drawn_by_rank(order[5:], 15, chance)
        threshold = np.sort(effects[[*order[:5], *chosen]])[-rank]
        found = int((effects[chosen] >= threshold).sum())
        hidden = (effects[np.setdiff1d(order[5:], chosen)] > threshold).sum()
        wrong += hidden > most(strata, found, confidence) - found
    assert wrong / draws <= 1 - confidence + 3 * math.sqrt(0.09 / draws)
    if name == "the estimates are useless" and rank == 5:
        assert wrong, "a bound that always holds would be too wide"


def test_ranks_and_correlations_weigh_a_cell_as_often_as_it_stands() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.integers(0, 6, 40).astype(float), chance.normal(size=40)
    y += x / 3
    frame = pd.DataFrame({"x": x, "y": y})
    assert correlation(x, y) == pytest.approx(frame.corr().loc["x", "y"])
    slow = [(sum(x < v) + (sum(x == v) + 1) / 2) for v in x]
    np.testing.assert_allclose(ranks(x), slow)
    assert correlation(ranks(x), ranks(y)) == pytest.approx(frame.rank().corr().loc["x", "y"])
    weights = chance.integers(1, 5, 40)
    often = frame.loc[frame.index.repeat(weights)]
    assert correlation(x, y, weights.astype(float)) == pytest.approx(often.corr().loc["x", "y"])
    weighted = (ranks(v, weights.astype(float)) for v in (x, y))
    assert correlation(*weighted, weights.astype(float)) == pytest.approx(often.rank().corr().loc["x", "y"])
    assert math.isnan(correlation(np.ones(5), y[:5]))
    assert math.isnan(correlation(x[:2], y[:2]))


# -------------------------------------------------------------------------------------------- against the exact sweep


def test_an_audit_patches_the_largest_estimates_and_some_of_the_others() -> None:
    (estimate, exact), found = swept(), audited()
    state = found["audited"].values
    assert found["audited"].dims == BY
    assert (found["audited"].attrs["flag_values"], found["audited"].attrs["flag_meanings"]) == (
        [0, 1, 2, 3],
        "not top sample proved",
    )
    zero = (exact["status"] == Status.PROVED_ZERO).all("pair").values
    np.testing.assert_array_equal(state == 3, zero)
    sizes = np.where(zero, -1, abs(over_pairs(estimate, "estimate")))
    largest = sorted(np.ndindex(*sizes.shape), key=lambda at: -sizes[at])[:4]
    assert {tuple(at) for at in np.argwhere(state == 1).tolist()} == set(largest)
    assert (state == 2).sum() == 12
    patched = np.isin(state, (1, 2, 3))
    np.testing.assert_array_equal(found["effect"].isnull().values, np.broadcast_to(~patched, found["effect"].shape))
    np.testing.assert_allclose(found["effect"].values[:, patched], exact["effect"].values[:, patched], atol=1e-4)
    np.testing.assert_allclose(
        found["normalized"].values[:, patched], exact["normalized"].values[:, patched], atol=1e-5
    )
    assert not found["effect"].values[:, state == 3].any()
    np.testing.assert_array_equal(found["estimate"], estimate["estimate"])
    np.testing.assert_array_equal(found["normalized_estimate"], estimate["normalized"])
    expected = np.where(state == 3, Status.PROVED_ZERO, np.where(patched, Status.MEASURED, Status.ESTIMATED))
    np.testing.assert_array_equal(
        found["status"].values[:, ~zero], np.broadcast_to(expected, found["status"].shape)[:, ~zero]
    )
    assert found["stands_for"].sum() == (~zero).sum()
    assert found.attrs["patched_forwards"] == 16 * 3
    assert found.attrs["sweep_forwards"] == (exact["status"] == Status.MEASURED).sum()


def test_the_numbers_of_an_audit_are_those_of_its_cells() -> None:
    """Everything once more, slowly, from the dataset's variables."""
    found = audited()
    audit = tp.Audit.of(found)
    state, stands = found["audited"].values.ravel(), found["stands_for"].values.ravel()
    estimates, effects = (over_pairs(found, name).ravel() for name in ("estimate", "effect"))
    chosen = [i for i in range(len(state)) if state[i] in (1, 2)]
    assert (audit.cells, audit.proved, audit.top, audit.sampled) == (sum(state != 3), sum(state == 3), 4, 12)
    assert audit.unverified == audit.cells - 16
    assert audit.rule == "the 4th largest that was"
    assert audit.threshold == pytest.approx(sorted((abs(effects[i]) for i in chosen), reverse=True)[3])
    large = [i for i in chosen if abs(effects[i]) >= audit.threshold - 1e-9]
    assert audit.flips == (sum(estimates[i] * effects[i] < 0 for i in large), len(large))
    others = [i for i in chosen if i not in large]
    assert audit.small_flips == (sum(estimates[i] * effects[i] < 0 for i in others), len(others))
    drawn = [i for i in chosen if state[i] == 2]
    frame = pd.DataFrame({"x": estimates[drawn], "y": effects[drawn]})
    assert audit.sample_pearson == pytest.approx(frame.corr().loc["x", "y"])
    assert audit.sample_spearman == pytest.approx(frame.rank().corr().loc["x", "y"])
    mean = {n: np.average(v[chosen], weights=stands[chosen]) for n, v in (("x", estimates), ("y", effects))}
    x, y, w = estimates[chosen] - mean["x"], effects[chosen] - mean["y"], stands[chosen]
    assert audit.pearson == pytest.approx((w * x * y).sum() / math.sqrt((w * x * x).sum() * (w * y * y).sum()))
    order = sorted((i for i in range(len(state)) if state[i] != 3), key=lambda i: -abs(estimates[i]))
    places = {i: place for place, i in enumerate(order, 1)}
    whole = sum(stands[i] for i in large)
    for patches, share in audit.recall:
        assert share == pytest.approx(sum(stands[i] for i in large if places[i] <= patches) / whole)
    assert [patches for patches, _ in audit.recall] == sorted(places[i] for i in large)
    strata = [Stratum(*s) for s in json.loads(found.attrs["strata"])]
    middle = float(np.median(abs(effects[drawn])))
    for one, least in ((audit, audit.threshold), (tp.Audit.of(found, threshold=middle), middle)):
        hits = sum(abs(effects[i]) >= least - 1e-9 for i in drawn)
        assert one.bound == most(strata, hits, 0.95) - hits
    assert hits == 6, "some of those drawn are large"


def test_an_audit_of_everything_is_the_sweep() -> None:
    estimate, exact = swept()
    found = audited(top=1000)
    audit = tp.Audit.of(found)
    there = (found["audited"] != 3).values
    a, b = over_pairs(estimate, "estimate")[there], over_pairs(exact, "effect")[there]
    assert audit.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
    assert audit.spearman == pytest.approx(pd.Series(a).rank().corr(pd.Series(b).rank()), abs=1e-2)
    assert (audit.bound, audit.unverified) == (0, 0)
    size, order = abs(b), np.argsort(-abs(a))
    large = size >= np.sort(size)[-11]
    for patches, share in audit.recall:
        assert share == pytest.approx(large[order[:patches]].sum() / large.sum())
    assert "nothing: every cell is verified" in found.attrs["audit"]


def test_no_more_is_hidden_than_audits_say() -> None:
    """Over many draws of one sweep, with the true number of cells beyond each threshold."""
    exact = abs(over_pairs(swept()[1], "effect"))
    wrong = 0
    for seed in range(12):
        audit, found = tp.Audit.of(audited(seed=seed, checks=False), confidence=0.8), audited(seed=seed, checks=False)
        unseen = (found["audited"] == 0).values
        wrong += (exact[unseen] > audit.threshold).sum() > audit.bound
    assert wrong <= 6


def test_other_thresholds_and_confidences_need_no_further_patch(tmp_path: Path) -> None:
    found = audited()
    tp.save_result(found, tmp_path / "audit.nc")
    again = tp.open_result(tmp_path / "audit.nc")
    assert str(tp.Audit.of(again)) == found.attrs["audit"]
    wide, narrow = (tp.Audit.of(again, confidence=c) for c in (0.999, 0.5))
    assert wide.bound > narrow.bound
    fixed = tp.Audit.of(again, threshold=0.5)
    assert (fixed.threshold, fixed.rule) == (0.5, "the threshold")
    assert "beyond 0.500 [of clean − corrupted], the threshold" in str(fixed)
    asked = tp.audit(toy("gpt2"), ioi_pairs(3), swept()[0], top=4, sample=12, threshold=0.5)
    assert asked.attrs["audit"] == str(fixed)
    for wrong in (0, 1, "much"):
        with pytest.raises(ResultError, match="confidence is a probability"):
            tp.Audit.of(again, confidence=wrong)  # type: ignore[arg-type]
    with pytest.raises(ResultError, match="threshold is the size of an effect"):
        tp.Audit.of(again, threshold=-1.0)
    with pytest.raises(ResultError, match="not audited"):
        tp.Audit.of(swept()[0])


def test_means_over_pairs_of_an_audit_are_ratios_of_means() -> None:
    found = audited()
    mean = tp.over_pairs(found)
    for name, main in (("normalized", "effect"), ("normalized_estimate", "estimate")):
        np.testing.assert_allclose(mean[name], over_pairs(found, main), rtol=1e-9)
    state = found["audited"].values
    np.testing.assert_array_equal(mean["status"].values == Status.ESTIMATED, state == 0)


@pytest.mark.parametrize(
    ("component", "options"),
    [
        ("resid_pre", {}),
        ("mlp_act", {"only": {"neuron": slice(0, 40), "layer": [0, -1]}}),
        (("attn_out", "mlp_out"), {"direction": "noising"}),
        ("pattern", {"by": ("dest", "head", "src"), "only": {"layer": 1, "dest": [-1]}}),
        ("pattern", {"by": ("layer", "head", "dest"), "renormalize": True}),
        ("z", {"direction": "noising", "source": 0}),
        ("k", {"estimator": tp.IntegratedGradients(2), "by": ("layer", "kv_head")}),
        ("embed", {"estimator": tp.IntegratedGradients(2, along="site")}),
        ("q", {"estimator": tp.AtPStar()}),
    ],
    ids=str,
)
def test_whatever_was_asked_for_is_patched(component: Any, options: dict[str, Any]) -> None:
    given = toy("llama"), ioi_pairs(2)
    estimate = tp.attribute(*given, component, **options)
    found = tp.audit(*given, estimate, top=3, sample=6, checks=False)
    asked = {k: v for k, v in options.items() if k not in ("estimator", "renormalize")}
    if "renormalize" in options:
        with tp.patching(*given, checks=False) as p:
            for layer, head, dest in p.grid("pattern", by=options["by"]):
                with p.row(layer=layer, head=head, dest=dest, renormalize=True):
                    p.corrupted.pattern[layer, head, dest] = p.clean.pattern[layer, head, dest]
        exact = p.run()
    else:
        exact = tp.patch(*given, component, checks=False, **asked)
    patched = np.broadcast_to(np.isin(found["audited"], (1, 2)), found["effect"].shape)
    assert patched.any()
    theirs = exact["effect"].transpose(*found["effect"].dims).values
    np.testing.assert_allclose(found["effect"].values[patched], theirs[patched], atol=1e-4)


def test_a_tensor_is_asked_for_again() -> None:
    import torch

    given, vector = (toy("gpt2"), ioi_pairs(2)), torch.linspace(-1, 1, 64)
    estimate = tp.attribute(*given, "resid_pre", source=vector, direction="noising", only={"layer": [1]})
    with pytest.raises(RecipeError, match="pass the same source= again"):
        tp.audit(*given, estimate)
    found = tp.audit(*given, estimate, source=vector)
    exact = tp.patch(*given, "resid_pre", source=vector, direction="noising", only={"layer": [1]})
    there = np.broadcast_to(np.isin(found["audited"], (1, 2)), exact["effect"].shape)
    np.testing.assert_allclose(found["effect"].values[there], exact["effect"].values[there], atol=1e-4)


def test_a_part_of_an_estimate_is_a_population_of_its_own() -> None:
    estimate = swept()[0]
    found = tp.audit(toy("gpt2"), ioi_pairs(3), estimate.isel(layer=1), top=2, sample=4)
    assert found["effect"].dims == ("pair", "pos", "head")
    exact = swept()[1].isel(layer=1)
    there = np.broadcast_to(np.isin(found["audited"], (1, 2)), exact["effect"].shape)
    np.testing.assert_allclose(found["effect"].values[there], exact["effect"].values[there], atol=1e-4)


def test_prompts_of_several_lengths() -> None:
    made = tasks.ioi(4, templates=tasks.TEMPLATES[:2])
    given = toy("gpt2"), tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    options: dict[str, Any] = {"by": BY, "only": {"pos": [-1, -2, -5]}}
    estimate = tp.attribute(*given, "z", **options)
    found = tp.audit(*given, estimate, top=5, sample=5)
    exact = tp.patch(*given, "z", **options)
    there = np.broadcast_to(np.isin(found["audited"], (1, 2)), exact["effect"].shape)
    np.testing.assert_allclose(found["effect"].values[there], exact["effect"].values[there], atol=1e-4)
    whole = tp.audit(*given, tp.attribute(*given, "resid_pre"), top=90)  # the last position is not in every pair
    sweep = tp.patch(*given, "resid_pre")
    assert sweep["effect"].isnull().any()
    np.testing.assert_allclose(whole["effect"], sweep["effect"], atol=1e-4)
    np.testing.assert_array_equal(whole["status"], sweep["status"])
    mean = abs(over_pairs(sweep, "effect"))
    audit = tp.Audit.of(whole)
    place = math.ceil(audit.cells / 4)
    assert audit.rule.startswith(f"the {place}")
    assert audit.threshold == pytest.approx(np.sort(mean[mean > 0])[-place], abs=1e-4)


# ---------------------------------------------------------------------------------------------------- what it tells


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a_head_that_attribution_misses_is_named(direction: Any) -> None:
    """A trained model: its previous-token head has the whole effect, and next to none by its gradient."""
    given = toy("gpt2"), swapped_keys()
    exact = tp.over_pairs(tp.patch(*given, "z", direction=direction))["normalized"]
    assert abs(exact.sel(layer=0, head=1)).item() > 0.95
    estimate = tp.attribute(*given, "z", direction=direction)
    found = tp.audit(*given, estimate, top=3)
    audit = tp.Audit.of(found)
    missed = {one.name: one for one in audit.missed}
    assert abs(missed["L0H1"].estimate) < 0.02
    assert missed["L0H1"].effect == pytest.approx(exact.sel(layer=0, head=1).item(), abs=1e-4)
    assert audit.missed[0].name == "L0H1"
    sign = "" if direction == "denoising" else "−"
    said = rf"  missed     L0H1: estimated −?0\.0\d\d, exact {sign}(0\.9|1\.0)\d\d \(.*: attribution misses it\n"
    assert re.search(said, found.attrs["audit"])
    assert audit.flips == ((0, 3) if direction == "denoising" else (1, 3)), "its sign is wrong too, one way"
    assert audit.recall[-1][0] > 3, "its rank is low"
    fine = tp.attribute(*given, "z", by=BY, direction=direction)
    spread = tp.Audit.of(tp.audit(*given, fine, checks=False))
    assert len(spread.missed) >= 3
    assert {one.name[:8] for one in spread.missed} == {"L0H1 pos"}, "position by position the sample finds it"


@pytest.mark.parametrize("saturation", [6.0, 12.0])
def test_a_saturated_head_is_missed_and_the_query_key_fix_is_exact(saturation: float) -> None:
    """A circuit that is known: L0H1 → keys of L1H2 → logits, each with the whole effect."""
    made = wired_pairs(6)
    given = tp.load(*wired(saturation), name="wired"), tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    heads = tp.Audit.of(tp.audit(*given, tp.attribute(*given, "z"), checks=False))
    (missed,) = heads.missed
    assert missed.name == "L0H1"
    assert missed.effect == pytest.approx(1, abs=1e-4)
    assert missed.estimate == pytest.approx({6.0: 0.13, 12.0: 0.0007}[saturation], rel=0.1)
    keys = tp.audit(*given, tp.attribute(*given, "k"), checks=False)
    assert [one.name for one in tp.Audit.of(keys).missed] == ["L1KV2"]
    queries = tp.audit(*given, tp.attribute(*given, "q", by=BY), top=1, sample=0, checks=False)["saturation"]
    assert (queries.sel(layer=1, head=2, pos=15) > {6.0: 0.95, 12.0: 0.9999}[saturation]).all(), "it looks at one word"
    assert (queries.sel(layer=0, head=1, pos=slice(1, None)) > 0.9999).all(), "the previous-token head always does"
    assert (queries.sel(layer=1, head=0, pos=9) < 0.11).all(), "a head without weights looks at all alike"
    fixed = tp.audit(*given, tp.attribute(*given, "k", estimator=tp.AtPStar()), checks=False)
    np.testing.assert_allclose(fixed["estimate"], fixed["effect"], atol=1e-3)
    audit = tp.Audit.of(fixed)
    assert audit.missed == ()
    assert audit.pearson == pytest.approx(1)
    assert "missed     none" in fixed.attrs["audit"]


def test_magnitudes_are_compared_where_estimates_have_no_sign() -> None:
    given = toy("gpt2"), swapped_keys(4)
    estimate = tp.attribute(*given, "z", estimator=tp.AtPStar(drop=True), direction="noising")
    found = tp.audit(*given, estimate)
    audit, exact = tp.Audit.of(found), tp.patch(*given, "z", direction="noising")
    gap = abs((exact["clean"] - exact["corrupted"]).mean()).item()
    magnitudes = abs(exact["effect"]).mean("pair") / gap
    assert audit.flips is None
    assert "no sign    these estimates have none" in found.attrs["audit"]
    assert "signs" not in found.attrs["audit"]
    assert audit.pearson == pytest.approx(
        np.corrcoef((estimate["estimate"].mean("pair") / gap).values.ravel(), magnitudes.values.ravel())[0, 1], abs=1e-4
    )
    assert all(one.effect > 0 for one in audit.missed)


def test_an_audit_in_words() -> None:
    text = audited(top=2, sample=5).attrs["audit"]
    lines = [line.split("  ")[1] for line in text.splitlines()[1:]]
    assert text.startswith(
        "Audit of AtP: z on logit_diff, 44 cells, 3 pairs\n  patched    the 2 largest estimates, and 5 of the other 42 drawn by rank; 124 more have no effect by proof\n"
    )
    assert (
        lines == ["patched", "agreement", "signs", "missed", "rest", "recall", "spent", "doubtful"]
        or "inflated" in lines
    )
    assert "with 95 % confidence at most" in text
    assert "the 2nd largest that was" in text
    assert "21 of 132 patched forwards; the estimate took 2 forwards and 1 backward a pair" in text


# ---------------------------------------------------------------------------------------------------- recorded rows


def test_recorded_rows_are_audited_as_a_sweep_is() -> None:
    with tp.patching(toy("gpt2"), ioi_pairs(3)) as p:
        for layer, pos, head in p.grid("z", by=BY):
            with p.row(layer=layer, pos=pos, head=head):
                p.corrupted.z[layer, pos, head] = p.clean.z[layer, pos, head]
    ours, theirs = tp.audit(p, estimate=p.estimate(), top=4, sample=12), audited()
    for name in ("effect", "estimate", "normalized", "normalized_estimate", "audited", "stands_for", "status"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    there = np.broadcast_to(np.isin(ours["audited"], (1, 2)), ours["effect"].shape)
    np.testing.assert_allclose(ours["patch_size"].values[there], theirs["patch_size"].values[there], atol=1e-5)
    assert np.allclose(tp.Audit.of(ours).recall, tp.Audit.of(theirs).recall)
    with pytest.raises(RecipeError, match="pairs, prune= belong to the recording already"):
        tp.audit(p, ioi_pairs(3), prune=False)
    with pytest.raises(ResultError, match="does not say what was asked for"):
        tp.audit(toy("gpt2"), ioi_pairs(3), p.estimate())
    with tp.patching(toy("gpt2"), ioi_pairs(3)) as other:
        with other.row(name="one"):
            other.corrupted.z[1, :, 0] = 0
    with pytest.raises(ResultError, match="not of these rows"):
        tp.audit(other, estimate=p.estimate())


def test_rows_of_any_edits_are_audited_by_name() -> None:
    with tp.patching(toy("llama"), ioi_pairs(2)) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[:] += p.gaussian(0.2)
        for layer in (0, 1):
            with p.row(name=f"queries {layer}"):
                p.corrupted.q_in[layer, -1, 1] += p.clean.resid_pre[layer, -1] - p.corrupted.resid_pre[layer, -1]
                p.corrupted.k[layer, :, 1] = p.clean.k[layer, :, 1]
            with p.row(name=f"noise {layer}"):
                noised.mlp_act[layer, :] = p.clean.mlp_act[layer, :]
            with p.row(name=f"twice {layer}"):
                p.corrupted.z[layer] = lambda live: live * 2
            with p.row(name=f"twice {layer} again"):
                p.corrupted.k[layer, :, 1] = p.clean.k[layer, :, 1]
                p.corrupted.q_in[layer, -1, 1] += p.clean.resid_pre[layer, -1] - p.corrupted.resid_pre[layer, -1]
        with p.row(name="nothing"):
            p.corrupted.resid_pre[0, 0] = p.clean.resid_pre[0, 0]
    found, exact = tp.audit(p, top=3, sample=2), p.run()
    names = found["name"].values.tolist()
    assert found["audited"].values[names.index("nothing")] == 3
    there = np.isin(found["audited"], (1, 2, 3))
    np.testing.assert_allclose(found["effect"].values[:, there], exact["effect"].values[:, there], atol=1e-4)
    assert found["patch_size"].dims == ("pair", "name")
    whole = tp.audit(p)
    twice = whole.sel(name=["twice 0", "twice 1"])
    np.testing.assert_allclose(twice["patch_size"], 1, rtol=1e-5)
    assert whole["saturation"].sel(name="queries 0").notnull().all()
    assert whole["saturation"].sel(name="noise 0").isnull().all()
    np.testing.assert_array_equal(whole["layers_above"].sel(name=["queries 0", "noise 1"]).values, [[1, 0]] * 2)
    for name in ("patch_size", "saturation"):
        a, b = (whole[name].sel(name=n).values for n in ("queries 1", "twice 1 again"))
        np.testing.assert_allclose(a, b, err_msg=name)


# ------------------------------------------------------------------------------------------------------------- doubts


@cache
def saved(component: str) -> xr.Dataset:
    """Values of the clean and the corrupted run, by another way: rows that only look."""
    with tp.patching(toy("llama"), ioi_pairs(2)) as p:
        for world in ("clean", "corrupted"):
            for layer in range(2):
                with p.row(layer=layer, world=world):
                    p.save(getattr(getattr(p, world), component)[layer], name="x")
    p.run()
    found = p.saved
    assert isinstance(found, xr.Dataset)
    return found


@pytest.mark.parametrize(
    "component", ["z", "k", "q", "mlp_act", "head_out", "attn_out", "resid_pre", "scores", "pattern"]
)
def test_sizes_of_patches(component: str) -> None:
    by = tp.COMPONENTS[component].index
    given = toy("llama"), ioi_pairs(2)
    kind = tp.COMPONENTS[component]
    unit = kind.unit or "nothing"
    fine = tuple(dim for dim in by if dim != "neuron")
    found = tp.audit(*given, tp.attribute(*given, component, by=fine), top=1, sample=0)
    coarse = tp.audit(*given, tp.attribute(*given, component, by=("layer",)), top=1, sample=0)["patch_size"]
    values = saved(component)["x"].astype(float)
    values = values.where(values > -1e30, 0.0)
    clean, corrupted = values.sel(world="clean"), values.sel(world="corrupted")
    last = [dim for dim in clean.dims if dim not in ("pair", *by)] or [by[-1]]
    change, there = ((v**2).sum(last) for v in (clean - corrupted, corrupted))
    if component in ("head_out", "attn_out"):
        there = (saved("resid_post")["x"].astype(float).sel(world="corrupted") ** 2).sum("d_model")
    first = min(ioi_pairs(2).encode(toy("llama").tokenizer).differing(0))
    along = kind.place
    change = change.where(change[along] >= first, 0.0)
    there = there.where(change.max([d for d in change.dims if d not in there.dims]) > 0, 0.0)
    summed = [d for d in change.dims if d not in ("pair", "layer")]
    whole = np.sqrt(change.sum(summed) / there.sum([d for d in summed if d in there.dims]))
    np.testing.assert_allclose(coarse, whole.transpose("pair", "layer"), rtol=2e-3)
    if component in ("scores", "pattern"):
        return
    ratio = np.sqrt((change / there).where(change > 0, 0.0))
    np.testing.assert_allclose(found["patch_size"], ratio.transpose("pair", *fine), rtol=2e-3, atol=1e-5)
    assert unit in (*found.dims, "nothing", "neuron")


def test_sizes_of_patches_of_single_neurons_and_of_some() -> None:
    given = toy("llama"), ioi_pairs(2)
    values = saved("mlp_act")["x"].astype(float)
    clean, corrupted = values.sel(world="clean"), values.sel(world="corrupted")
    first = min(ioi_pairs(2).encode(toy("llama").tokenizer).differing(0))
    change = ((clean - corrupted) ** 2).where(clean["pos"] >= first, 0.0)
    there = (corrupted**2).sum("neuron").where(change.sum("neuron") > 0, 0.0)
    one = tp.audit(*given, tp.attribute(*given, "mlp_act"), top=1, sample=0)["patch_size"]
    np.testing.assert_allclose(
        one, np.sqrt(change.sum("pos") / there.sum("pos")).transpose("pair", "layer", "neuron"), rtol=2e-3, atol=1e-5
    )
    only: dict[str, Any] = {"neuron": [3, 4, 9]}
    some = tp.attribute(*given, "mlp_act", by=("layer", "pos"), only=only)
    found = tp.audit(*given, some, top=1, sample=0)["patch_size"]
    part = np.sqrt((change.sel(neuron=[3, 4, 9]).sum("neuron") / there).where(there > 0, 0.0))
    np.testing.assert_allclose(found, part.transpose("pair", "layer", "pos"), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("component", ["q", "q_in", "k", "scores"])
def test_saturation(component: str) -> None:
    given = toy("llama"), ioi_pairs(2)
    by = tuple(dim for dim in tp.COMPONENTS[component].index if dim != "src")
    found = tp.audit(*given, tp.attribute(*given, component, by=by), top=1, sample=0)["saturation"]
    whole = tp.audit(*given, tp.attribute(*given, component, by=("layer",)), top=1, sample=0)["saturation"]
    peaks = saved("pattern")["x"].sel(world="corrupted").max("src").transpose("pair", "layer", "head", "dest").values
    length = peaks.shape[-1]
    if component == "k":
        grouped = peaks.reshape(2, 2, 2, 2, length).mean(3)
        expected = np.stack(
            [grouped[..., max(1, n) :].mean(-1) for n in range(length)], 2
        )  # [pair, layer, pos, kv_head]
        reach = [peaks[..., max(1, n) :].sum((2, 3)) for n in range(length)]
        np.testing.assert_allclose(whole, sum(reach) / sum(4 * (length - max(1, n)) for n in range(length)), atol=1e-5)
    else:
        expected = peaks.copy()
        expected[..., 0] = np.nan
        expected = expected.swapaxes(2, 3) if component != "scores" else expected
        np.testing.assert_allclose(whole, peaks[..., 1:].mean((2, 3)), atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_distances_from_the_metric() -> None:
    given = toy("gpt2"), ioi_pairs(2)
    found = audited()["layers_above"]
    np.testing.assert_array_equal(found.max(("pos", "head")), [2, 1, 0])
    embed = tp.audit(*given, tp.attribute(*given, "embed"), top=1, sample=0)
    assert (embed["layers_above"] == 3).all()

    def size(value: Any) -> Any:
        return value[:, 0].sum(-1)

    reads = tp.metric(size, component="resid_post", index=(1, [-1]))
    below = tp.audit(*given, tp.attribute(*given, "z", reads), metric=reads, top=1, sample=0)
    np.testing.assert_array_equal(below["layers_above"].max("head")[:2], [1, 0])


# ------------------------------------------------------------------------------------------------------------- picture


def written(figure: Any) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.findobj(Text)).split())


def test_a_picture_of_an_audit_has_a_point_for_each_patched_site() -> None:
    given = toy("gpt2"), ioi_pairs(3)
    found = tp.audit(*given, tp.attribute(*given, ("attn_out", "mlp_out")), top=3, sample=7)
    figure = painted(tp.plots.audit(found, label=2))
    ax = next(one for one in figure.axes if one.collections)
    entries = {c.get_gid(): np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid()}
    assert set(entries) <= {"attn_out", "mlp_out"}
    patched = np.isin(found["audited"], (1, 2))
    x, y = over_pairs(found, "estimate"), over_pairs(found, "effect")
    for number, name in enumerate(("attn_out", "mlp_out")):
        expected = np.stack([v[number][patched[number]] for v in (x, y)], 1)
        np.testing.assert_allclose(entries[name], expected)
    audit = tp.Audit.of(found)
    (corner,) = [t.get_text() for t in ax.texts if "Pearson" in t.get_text()]
    assert corner == f"Pearson r = {audit.pearson:.2f}\nSpearman ρ = {audit.spearman:.2f}\n10 of 22 sites"
    assert ax.get_xlabel() == "estimate by AtP\n[of clean − corrupted]"
    assert ax.get_ylabel() == "exact effect\n[of clean − corrupted]"
    assert "toy-gpt2" in ax.get_title()
    heat = painted(tp.plots.heatmap(found))
    assert "estimate" not in written(heat)
    other = painted(tp.plots.heatmap(found, "normalized_estimate"))
    assert "estimate of the normalized effect on logit_diff" in written(other)
    with pytest.raises(ResultError, match="not audited"):
        tp.plots.audit(swept()[0])


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_audited_is_refused() -> None:
    model, pairs, estimate = toy("gpt2"), ioi_pairs(3), swept()[0]
    weights = tp.attribute(model, pairs, "pattern", value_bias=False)
    with pytest.raises(RecipeError, match="no patch has the effect that is estimated"):
        tp.audit(model, pairs, weights)
    with pytest.raises(ResultError, match=r"other entries of clean_prompt\n.*other entries of corrupted_prompt"):
        tp.audit(model, ioi_pairs(3, seed=5), estimate)
    with pytest.raises(ResultError, match="its model is toy-gpt2, with other weights"):
        tp.audit(toy("llama"), pairs, estimate)
    with pytest.raises(ResultError, match="it is of the metric logit_diff, not of log_prob"):
        tp.audit(model, pairs, estimate, metric=tp.log_prob)
    shifted = estimate.assign(base=estimate["base"] + 100)
    with pytest.raises(ResultError, match="unpatched runs logit_diff differs by up to 100"):
        tp.audit(model, pairs, shifted, top=1, sample=0)
    two = tp.attribute(model, pairs, "z", [tp.logit_diff, tp.log_prob])
    with pytest.raises(ResultError, match=r"estimate.sel\(metric='logit_diff'\)"):
        tp.audit(model, pairs, two)
    one = tp.audit(model, pairs, two.sel(metric="log_prob"), metric=tp.log_prob, top=2, sample=2)
    exact = tp.patch(model, pairs, "z", tp.log_prob)
    there = np.broadcast_to(np.isin(one["audited"], (1, 2)), one["effect"].shape)
    np.testing.assert_allclose(one["effect"].values[there], exact["effect"].values[there], atol=1e-4)
    for wrong, words in (
        (swept()[1], "not Dataset without it"),
        (None, "not NoneType"),
        (audited(), "audited already"),
        (estimate.mean("pair"), "no dim `pair`"),
        (xr.DataTree.from_dict({"name": estimate}), r"tree\[…\].to_dataset"),
        (estimate.drop_vars("layer"), "lost its coordinates layer"),
    ):
        with pytest.raises(ResultError, match=words):
            tp.audit(model, pairs, wrong)  # type: ignore[arg-type]
    for options, words in (({"top": 0}, "top is a number of cells, 1 or more"), ({"sample": -1}, "sample is a number")):
        with pytest.raises(RecipeError, match=words):
            tp.audit(model, pairs, estimate, **options)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- verified_top


class Made(Population):
    """A population whose effects are made up: nothing is run."""

    def patched(self, cells: Any, progress: bool | None = None) -> Exact:
        numbers = np.array(cells, np.intp)
        effect = self.estimate["truth"].values[:, numbers]
        return Exact(numbers, effect, np.full(effect.shape, Status.MEASURED, np.int8), effect.size)


def made(effects: np.ndarray[Any, Any], estimates: np.ndarray[Any, Any]) -> Population:
    data = {name: (("pair", "cell"), values[None]) for name, values in (("estimate", estimates), ("truth", effects))}
    dataset = xr.Dataset(data, {"cell": np.arange(len(effects))})
    dataset = dataset.assign(status=(("pair", "cell"), np.full((1, len(effects)), Status.ESTIMATED, np.int8)))
    proofs = np.full((len(effects), 1), Proof.NONE, np.int8)
    return Made(dataset, (np.arange(len(effects)),), proofs, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("quality", ["good", "bad", "misleading"])
def test_what_is_claimed_of_the_largest_holds_as_often_as_said(quality: str) -> None:
    """The whole search, with its looks, on made-up effects: estimates cost patches, not confidence."""
    chance = np.random.default_rng(0)
    effects = np.exp(chance.normal(size=150) * 2)
    order = {
        "good": effects * np.exp(chance.normal(size=150) / 3),
        "bad": chance.random(150),
        "misleading": np.where(effects > np.sort(effects)[-13], 0.0, effects),
    }[quality]
    cells, wrong, spent, draws, confidence = made(effects, order), 0, [], 100, 0.8
    for seed in range(draws):
        search = Search(cells, 5, confidence, 10, np.random.default_rng(seed), None)
        search.run()
        sizes = search.sizes()
        least = np.sort(sizes[~np.isnan(sizes)])[-5]
        hidden = (effects[np.isnan(sizes)] > least).sum()
        assert search.bound <= 10
        wrong += hidden > search.bound
        spent.append(int((~np.isnan(sizes)).sum()))
    assert wrong / draws <= 1 - confidence + 3 * math.sqrt(0.16 / draws)
    assert np.mean(spent) < {"good": 50, "bad": 151, "misleading": 145}[quality]


@pytest.mark.parametrize(("tolerance", "saved_some"), [(0.0, False), (0.2, True)])
def test_the_largest_effects_are_those_of_the_sweep(tolerance: float, saved_some: bool) -> None:
    exact = swept()[1]
    found = tp.verified_top(toy("gpt2"), ioi_pairs(3), "z", 3, by=BY, tolerance=tolerance)
    sizes = abs(over_pairs(exact, "effect"))
    wanted = sorted(np.ndindex(*sizes.shape), key=lambda at: -sizes[at])[:3]
    for place, at in enumerate(wanted, 1):
        assert found["verified"].values[at] == place, "the estimates are good here"
    assert (found["verified"] > 0).sum() == 3
    state = found["audited"].values
    patched = np.isin(state, (1, 2))
    np.testing.assert_allclose(found["effect"].values[:, patched], exact["effect"].values[:, patched], atol=1e-4)
    forwards, sweep = found.attrs["patched_forwards"], found.attrs["sweep_forwards"]
    assert forwards == 3 * patched.sum()
    assert sweep == (exact["status"] == Status.MEASURED).sum()
    assert (forwards < 0.8 * sweep) == saved_some
    assert found.attrs["unverified"] == (state == 0).sum()
    hidden = (sizes[state == 0] > sizes[wanted[-1]]).sum()
    assert hidden <= found.attrs["bound"] <= max(1, tolerance * (state != 3).sum())
    text = found.attrs["verified"]
    assert text.startswith("The 3 largest effects of z on logit_diff [of clean − corrupted]\n    1  L0H1 pos 13")
    assert (
        f"spent    {forwards} of {sweep} patched forwards; the estimate took 2 forwards and 1 backward a pair" in text
    )
    assert ("not patched have a larger effect than the 3rd, 0." in text) == bool(found.attrs["unverified"])


def test_few_cells_are_all_patched() -> None:
    found = tp.verified_top(toy("gpt2"), swapped_keys(4), "z", 2, direction="noising", estimator=tp.AtPStar(drop=True))
    exact = tp.patch(toy("gpt2"), swapped_keys(4), "z", direction="noising")
    np.testing.assert_allclose(found["effect"], exact["effect"], atol=1e-4)
    assert "these are the largest: all 12 cells are patched" in found.attrs["verified"]
    assert found["verified"].sel(layer=0, head=1) <= 2
    many = tp.verified_top(toy("gpt2"), ioi_pairs(2), "embed", 99)
    assert (many["verified"] > 0).sum() == (many["audited"] != 3).sum()
    for options, words in (
        ({"k": 0}, "k is a number"),
        ({"tolerance": 1}, "tolerance is a share"),
        ({"metric": [tp.logit, tp.log_prob]}, "pass one"),
    ):
        with pytest.raises(RecipeError, match=words):
            tp.verified_top(toy("gpt2"), ioi_pairs(2), "z", **options)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- drill


def test_a_drill_looks_only_inside_what_matters() -> None:
    given = toy("gpt2"), ioi_pairs(3)
    tree = tp.drill(*given, "z")
    assert list(tree.children) == ["layer", "layer_head", "layer_head_pos"]
    inside: np.ndarray[Any, Any] | None = None
    spent = 0
    for by in (("layer",), ("layer", "head"), ("layer", "head", "pos")):
        found, exact = tree["_".join(by)].to_dataset(), tp.patch(*given, "z", by=by)
        looked = np.ones(found["split"].shape, bool) if inside is None else np.broadcast_to(inside[..., None], found["split"].shape)  # fmt: skip
        assert found["effect"].dims == ("pair", *by)
        np.testing.assert_array_equal(found["effect"].notnull().values, np.broadcast_to(looked, found["effect"].shape))
        np.testing.assert_allclose(found["effect"].values[:, looked], exact["effect"].values[:, looked], atol=1e-4)
        np.testing.assert_allclose(
            found["normalized"].values[:, looked], exact["normalized"].values[:, looked], atol=1e-4
        )
        np.testing.assert_array_equal(found["status"].values[:, looked], exact["status"].values[:, looked])
        assert (found["status"].values[:, ~looked] == Status.PENDING).all()
        spent += int((exact["status"].values[:, looked] == Status.MEASURED).sum())
        for name in set(exact.coords):
            assert (found[name].values == exact[name].values).all(), name
        big = looked & (abs(over_pairs(exact, "effect")) >= 0.1)
        np.testing.assert_array_equal(
            found["split"].values.astype(bool), big if by != ("layer", "head", "pos") else False & big
        )
        inside = big
    assert tree.attrs["patched_forwards"] == spent
    text = tree.attrs["drill"]
    assert text.startswith("Drill into z on logit_diff [of clean − corrupted], split from 0.100 on\n")
    assert "what cancels in there does not show" in text
    assert f"{spent} patched forwards" in text


def test_a_drill_splits_no_more_than_it_is_told() -> None:
    given = toy("llama"), ioi_pairs(2)
    tree = tp.drill(*given, "pattern", levels=("layer", ("head", "dest"), "src"), top=1)
    assert list(tree.children) == ["layer", "layer_head_dest", "layer_head_dest_src"]
    assert [int(tree[name]["split"].sum()) for name in tree.children] == [1, 1, 0]
    last = tree["layer_head_dest_src"].to_dataset()
    future = xr.DataArray(last["src"] > last["dest"])
    assert (last["status"].where(future) == Status.ABSENT).sum() == future.sum() * 2 * 2 * 4
    best = tp.over_pairs(tp.patch(*given, "pattern", by=("layer", "head", "dest")))["effect"]
    layer = int(abs(tp.over_pairs(tp.patch(*given, "pattern", by="layer"))["effect"].values).argmax())
    at = np.unravel_index(int(abs(best.values[layer]).argmax()), best.shape[1:])
    assert tree["layer_head_dest"]["split"].values[(layer, *at)] == 1
    nothing = tp.drill(*given, "resid_pre", threshold=5.0)
    assert list(nothing.children) == ["layer"]
    assert "split:" not in nothing.attrs["drill"].replace("not split:", "")
    assert "inside 2 of 2 cells by layer" in nothing.attrs["drill"]
    neurons = tp.drill(*given, ("attn_out", "mlp_out"), top=1)
    assert neurons["component_layer_pos"]["effect"].dims == ("pair", "component", "layer", "pos")
    alone = tp.drill(*given, "embed")
    assert "unseen" not in alone.attrs["drill"]


def test_a_drill_without_corrupted_prompts_has_to_be_told_what_matters() -> None:
    pairs = tp.Pairs(clean=ioi_pairs(2).clean, answer=ioi_pairs(2).answer, wrong=ioi_pairs(2).wrong)
    options: dict[str, Any] = {"direction": "noising", "source": 0}
    with pytest.raises(RecipeError, match=r"threshold= or top="):
        tp.drill(toy("gpt2"), pairs, "z", **options)
    tree = tp.drill(toy("gpt2"), pairs, "z", threshold=2.0, **options)
    exact = tp.patch(toy("gpt2"), pairs, "z", by="layer", **options)
    np.testing.assert_array_equal(tree["layer"]["split"].values == 1, abs(exact["effect"].mean("pair")).values >= 2)
    assert "[logits]" in tree.attrs["drill"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": ()}, "levels says which dims"),
        ({"levels": "layer"}, "levels says which dims"),
        ({"top": 0}, "top is a number of cells"),
        ({"metric": [tp.logit, tp.log_prob]}, "pass one"),
        ({"components": ("z", "attn_out")}, "have different dims"),
    ],
    ids=str,
)
def test_a_drill_refuses_what_it_cannot_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tp.drill(toy("gpt2"), ioi_pairs(2), **{"components": "z", **options})
