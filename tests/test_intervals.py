"""Intervals and p-values are those of slow textbook versions, hold what they promise, and know which pairs are one."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import ioi_pairs, toy

import tracepatch as tp
from tracepatch.errors import ResultError
from tracepatch.resampling import _student


def result(effect: Any, gap: Any = None, name: str = "effect", **coords: Any) -> xr.Dataset:
    """A result whose effects ``[pair, cell]`` are given."""
    effect = np.asarray(effect, float)
    gap = np.ones(len(effect)) if gap is None else np.asarray(gap, float)
    status = np.where(np.isnan(effect), tp.Status.ABSENT, tp.Status.MEASURED).astype(np.int8)
    data = {name: (("pair", "cell"), effect), "status": (("pair", "cell"), status)}
    found = xr.Dataset(data, {"pair": np.arange(len(effect)), "cell": np.arange(effect.shape[1]), **coords})
    found = found.assign(clean=("pair", gap / 2), corrupted=("pair", -gap / 2))
    found["normalized"] = found[name] / (found["clean"] - found["corrupted"])
    return found.assign_attrs(tracepatch_format=1, model="made up")


@pytest.fixture
def mixed() -> xr.Dataset:
    """Seven pairs of unlike differences; cells that all pairs have, some have, one has, and none has."""
    rng = np.random.default_rng(3)
    effect = rng.normal(0.4, 1, size=(7, 5))
    effect[[0, 4, 5], 1] = np.nan
    effect[1:, 2] = np.nan
    effect[:, 3] = np.nan
    return result(effect, rng.uniform(0.5, 4, 7))


# -------------------------------------------------------------------------------------------------- textbook versions


def percentile(values: list[float], share: float) -> float:
    """The smallest value with at least this share of the values at or below it."""
    ordered = sorted(values)
    return next(v for i, v in enumerate(ordered, 1) if i / len(ordered) >= share - 1e-12)


def bootstrap(effect: Any, gap: Any, resamples: Any, tail: float) -> tuple[float, float]:
    """Ends of the interval of Σ effect / Σ gap: one list of pairs for each resample."""
    means = []
    for taken in resamples:
        there = [pair for pair in taken if not np.isnan(effect[pair])]
        if there:
            means.append(sum(effect[p] for p in there) / sum(gap[p] for p in there))
    return (percentile(means, tail), percentile(means, 1 - tail)) if means else (np.nan, np.nan)


def sign_flips(sums: list[float]) -> float:
    """The share of all sign patterns with a sum at least as far from 0 as the observed one."""
    observed, count = abs(sum(sums)), 0
    for signs in itertools.product((1, -1), repeat=len(sums)):
        count += abs(sum(s * x for s, x in zip(signs, sums, strict=True))) >= observed - 1e-12
    return count / 2 ** len(sums)


def holm(p: list[float]) -> list[float]:
    """By the definition: the largest of (m − k + 1) · p_(k) over all k up to the value's rank."""
    m, order = len(p), sorted(range(len(p)), key=lambda i: p[i])
    out = [0.0] * m
    for rank, i in enumerate(order):
        out[i] = min(1, max((m - k) * p[order[k]] for k in range(rank + 1)))
    return out


def benjamini_hochberg(p: list[float]) -> list[float]:
    """By the definition: the smallest of m · p_(k) / k over all k from the value's rank on."""
    m, order = len(p), sorted(range(len(p)), key=lambda i: p[i])
    out = [0.0] * m
    for rank, i in enumerate(order):
        out[i] = min(1, *(m * p[order[k]] / (k + 1) for k in range(rank, m)))
    return out


def tail_of(count: int, quantile: float) -> float:
    """The share below a standard normal quantile −√(n/(n−1)) · t, by counting."""
    z = np.sort(np.random.default_rng(0).normal(size=400_000))
    return float(np.searchsorted(z, -np.sqrt(count / (count - 1)) * quantile) / len(z))


# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("name", ["effect", "estimate"])
def test_intervals_are_those_of_a_loop_over_the_same_draws(mixed: xr.Dataset, name: str) -> None:
    data = mixed.rename(effect=name)
    found = tp.intervals(data, draws=500, seed=5)
    counts = np.random.default_rng(5).multinomial(7, [1 / 7] * 7, size=500)
    resamples = [[pair for pair, n in enumerate(row) for _ in range(n)] for row in counts]
    gap = (data["clean"] - data["corrupted"]).values
    tail = tail_of(7, 2.446912)  # the 97.5 % quantile of t with 6 degrees of freedom, from a table
    for cell in range(5):
        effect = data[name].values[:, cell]
        for variable, over in (("", np.ones(7)), ("normalized_", gap)):
            wanted = bootstrap(effect, over, resamples, tail)
            got = [found[f"{variable}{end}"].values[cell] for end in ("low", "high")]
            np.testing.assert_allclose(got, wanted, rtol=1e-9)
    mean = tp.over_pairs(data)
    xr.testing.assert_identical(found[list(mean.data_vars)].drop_attrs(deep=False), mean.drop_attrs(deep=False))


def test_intervals_are_those_of_all_resamples_there_are() -> None:
    """Four pairs have 256 equally likely resamples; many draws come to the same percentiles."""
    effect, gap = np.array([0.1, 0.5, 0.9, 2.0]), np.array([1.0, 3.0, 0.7, 2.0])
    data = result(np.stack([effect, -effect], 1), gap)
    found = tp.intervals(data, level=0.6, draws=200_000)
    tail = tail_of(4, 0.978472)  # the 80 % quantile of t with 3 degrees of freedom, from a table
    resamples = list(itertools.product(range(4), repeat=4))
    assert bootstrap(effect, np.ones(4), resamples, tail) == (found["low"][0], found["high"][0])
    np.testing.assert_allclose(
        bootstrap(effect, gap, resamples, tail), (found["normalized_low"][0], found["normalized_high"][0]), rtol=1e-12
    )
    assert (found["low"][1], found["high"][1]) == (-found["high"][0], -found["low"][0])


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(2, 4.302653), (3, 3.182446), (5, 2.570582), (7, 2.364624), (30, 2.042272)]
)
def test_quantiles_of_students_t_are_those_of_tables(freedom: int, wanted: float) -> None:
    assert _student(0.975, freedom) == pytest.approx(wanted, rel=0.01 if freedom == 2 else 2e-3)


@pytest.mark.parametrize(("count", "least"), [(8, 0.92), (16, 0.935), (50, 0.935)])
def test_coverage(count: int, least: float) -> None:
    """Each cell is an experiment of its own, with a true mean effect of 0.5 and a true ratio of 0.25."""
    rng = np.random.default_rng(count)
    data = result(rng.normal(0.5, 1, size=(count, 2000)), rng.uniform(1, 3, count))
    found = tp.intervals(data, seed=1)
    for name, truth in (("", 0.5), ("normalized_", 0.5 / float((data.clean - data.corrupted).mean()))):
        covered = ((found[f"{name}low"] <= truth) & (found[f"{name}high"] >= truth)).mean()
        assert least < covered < 0.97
    narrow = tp.intervals(data, level=0.5)
    covered = ((narrow["low"] <= 0.5) & (narrow["high"] >= 0.5)).mean()
    assert 0.45 < covered < 0.55


def test_pairs_in_both_roles_are_one_piece_of_evidence() -> None:
    """Twice the same numbers are no more evidence: the interval and p are those of one half."""
    rng = np.random.default_rng(0)
    effect, gap = rng.normal(0.3, 1, size=(8, 300)), rng.uniform(1, 3, 8)
    a, b = [f"a{i}" for i in range(8)], [f"b{i}" for i in range(8)]
    prompts = {"clean_prompt": ("pair", a + b), "corrupted_prompt": ("pair", b + a)}
    twice = result(np.concatenate([effect, effect]), np.concatenate([gap, gap]), **prompts)
    once, both, apart = (
        tp.intervals(result(effect, gap), seed=2),
        tp.intervals(twice, seed=2),
        tp.intervals(twice, clusters=None),
    )
    for name in ("low", "high", "normalized_low", "normalized_high", "p"):
        np.testing.assert_allclose(both[name], once[name], rtol=1e-9)
    width, wrong = (float((found["high"] - found["low"]).mean()) for found in (both, apart))
    assert wrong < 0.8 * width
    covered = ((apart["low"] <= 0.3) & (apart["high"] >= 0.3)).mean()
    assert covered < 0.85, "as if they were independent, the intervals promise too much"
    assert (both.attrs["clusters"], apart.attrs["clusters"]) == (8, 16)
    assert "8 clusters of pairs that share a prompt (16 pairs)" in both.attrs["interval"]
    assert "16 pairs" in apart.attrs["test"]


def test_which_pairs_belong_together() -> None:
    effect = np.random.default_rng(0).normal(size=(6, 4))
    prompts = {
        "clean_prompt": ("pair", ["a", "b", "c", "a", "e", "f"]),
        "corrupted_prompt": ("pair", ["b", "a", "d", "x", "d", "g"]),
    }
    data = result(effect, **prompts, kind=("pair", ["u", "v", "u", "v", "w", "w"]))
    groups: dict[Any, list[list[int]]] = {
        "prompts": [[0, 1, 3], [2, 4], [5]],
        "kind": [[0, 2], [1, 3], [4, 5]],
        (7, 7, 7, 7, 7, 8): [[0, 1, 2, 3, 4], [5]],
    }
    for given, members in groups.items():
        found = tp.intervals(data, clusters=given)
        assert found.attrs["clusters"] == len(members)
        for cell in range(4):
            sums = [float(effect[group, cell].sum()) for group in members]
            assert found["p"].values[cell] == sign_flips(sums)
    resamples = itertools.product(range(3), repeat=3)
    lists = [[pair for group in taken for pair in groups["prompts"][group]] for taken in resamples]
    found = tp.intervals(data, level=0.5, draws=100_000)
    tail = tail_of(3, 0.816497)  # the 75 % quantile of t with 2 degrees of freedom, from a table
    assert (found["low"][0], found["high"][0]) == pytest.approx(bootstrap(effect[:, 0], np.ones(6), lists, tail))


def test_texts_of_a_decoder_belong_to_the_prompt() -> None:
    prompts = {"clean_prompt": ("pair", ["a", "a", "a"]), "corrupted_prompt": ("pair", ["b", "c", "d"])}
    data = result(np.ones((3, 1)), **prompts, decoder_prompt=("pair", ["x", "y", "x"]))
    assert tp.intervals(data).attrs["clusters"] == 2
    with pytest.raises(ResultError, match="1 pair in one cluster"):
        tp.intervals(data.isel(pair=[1]))


# -------------------------------------------------------------------------------------------------------------- tests


def test_p_is_the_share_of_all_sign_patterns(mixed: xr.Dataset) -> None:
    found = tp.intervals(mixed)
    for cell in range(5):
        effect = np.nan_to_num(mixed["effect"].values[:, cell])
        wanted = sign_flips(effect.tolist()) if cell != 3 else np.nan
        assert found["p"].values[cell] == pytest.approx(wanted, nan_ok=True)
    assert "all 64 patterns; the least possible p is 0.016" in found.attrs["test"]


def test_equal_effects_tie() -> None:
    found = tp.intervals(result(np.array([[0.1, 0.1], [0.1, -0.1], [0.1, 0.2], [0.1, -0.2]])))
    assert found["p"].values.tolist() == [2 / 16, 1]


def test_with_many_pairs_patterns_are_drawn() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(0.45, 1, size=(14, 6))
    exact, drawn = tp.intervals(result(effect), draws=1 << 13), tp.intervals(result(effect), draws=1 << 12)
    assert "all 8,192 patterns" in exact.attrs["test"]
    assert "4,096 random patterns" in drawn.attrs["test"]
    assert exact["p"].values.tolist() == [sign_flips(row.tolist()) for row in effect.T]
    assert abs(exact["p"] - drawn["p"]).max() < 0.03
    assert tp.intervals(result(effect + 9), draws=50)["p"].values == pytest.approx(1 / 51)


def test_p_is_uniform_where_there_is_no_effect() -> None:
    rng = np.random.default_rng(2)
    p = tp.intervals(result(rng.normal(size=(12, 3000)))).p.values
    assert [float((p <= at).mean()) for at in (0.01, 0.05, 0.5)] == pytest.approx([0.01, 0.05, 0.5], abs=0.02)


def test_corrections_are_those_of_the_definitions_and_proved_zeros_are_no_tests() -> None:
    rng = np.random.default_rng(4)
    effect = rng.normal(rng.uniform(0, 2, 40), 1, size=(9, 40))
    effect[:, 5] = np.nan
    effect[:, [7, 8]] = 0
    data = result(effect)
    data["status"][:, [7, 8]] = tp.Status.PROVED_ZERO
    found = tp.intervals(data, correction=("holm", "bh"))
    tested = [cell for cell in range(40) if cell not in (5, 7, 8)]
    p = found["p"].values
    np.testing.assert_allclose(found["p_holm"].values[tested], holm(p[tested].tolist()))
    np.testing.assert_allclose(found["p_bh"].values[tested], benjamini_hochberg(p[tested].tolist()))
    assert found["p_bh"].values[[7, 8]].tolist() == [1, 1]
    assert np.isnan(found["p_holm"].values[5])
    assert found["p_bh"].attrs["tests"] == 37
    assert "p_holm" not in tp.intervals(data, correction="bh")
    assert found["low"].values[[7, 8]].tolist() == found["high"].values[[7, 8]].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------- real results


def test_on_a_real_result(tmp_path: Path) -> None:
    effects = tp.patch(toy("gpt2"), tp.toys.pairs("ioi", 12), "z", [tp.logit_diff, tp.kl])
    found = tp.intervals(effects, correction="holm")
    assert found.attrs["clusters"] == 6
    assert found["low"].dims == found["p"].dims == ("metric", "layer", "head")
    assert found["low"].attrs["units"] == effects["effect"].attrs["units"]
    one = tp.intervals(effects.sel(metric="logit_diff"), correction="holm")
    np.testing.assert_array_equal(found["normalized_high"].sel(metric="logit_diff"), one["normalized_high"])
    assert (found["low"] <= found["effect"] + 1e-9).all()
    assert (found["high"] >= found["effect"] - 1e-9).all()
    copier = found.sel(metric="logit_diff", layer=0, head=1)
    assert copier["normalized_low"] > 0.5
    assert copier["p"] == 2 / 64
    again = tp.open_result(tp.save_result(found, tmp_path / "found.nc"))
    assert isinstance(again, xr.Dataset)
    xr.testing.assert_identical(again, found)


def test_models_side_by_side() -> None:
    """A joined result has every model's own prompts, and pairs that one model lacks."""
    results = [tp.patch(toy(name), ioi_pairs(n).both_roles(), "z") for name, n in (("gpt2", 4), ("llama", 3))]
    found = tp.intervals(tp.concat(results), seed=3)
    alone = tp.intervals(results[0], seed=3)
    for name in ("low", "high", "p"):
        np.testing.assert_allclose(found[name].sel(model="toy-gpt2"), alone[name])
    assert found.attrs["clusters"] == 3
    assert "4 clusters of pairs that share a prompt (8 pairs), all 8 patterns" in found.attrs["test"]
    assert "3 clusters of pairs that share a prompt (6 pairs), all 4 patterns" in found.attrs["test"]
    other = tp.intervals(results[1], seed=3)
    np.testing.assert_allclose(found["normalized_low"].sel(model="toy-llama", layer=[0, 1]), other["normalized_low"])
    assert np.isnan(found["p"].sel(model="toy-llama", layer=2)).all()


def test_memory_is_bounded() -> None:
    """All draws of all cells would be 160 MB, for each of several quantities."""
    data = result(np.random.default_rng(0).normal(size=(12, 10_000)))
    tracemalloc.start()
    tp.intervals(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda d: tp.intervals(tp.over_pairs(d)), ["no dim `pair`", "before tp.over_pairs"]),
        (lambda d: tp.intervals(d[["clean"]]), ["no tracepatch result"]),
        (lambda d: tp.intervals(d.isel(pair=[0])), ["1 pair in one cluster", "several"]),
        (lambda d: tp.intervals(d, clusters=[1] * 7), ["7 pairs in one cluster", "clusters=None"]),
        (lambda d: tp.intervals(d, level=95, draws=0.5), ["between 0 and 1", "not 95", "draws", "0.5"]),
        (lambda d: tp.intervals(d, draws=20), ["20 draws", "at least 40"]),
        (lambda d: tp.intervals(d, correction="fdr"), ["'fdr'", "'holm' and 'bh'"]),
        (lambda d: tp.intervals(d, clusters="template"), ["'template'", "'prompts'"]),
        (lambda d: tp.intervals(d, clusters=[0, 1]), ["2 labels for 7 pairs"]),
        (lambda d: tp.intervals(d.rename(cell="p")), ["a dim 'p'", "rename"]),
    ],
)
def test_errors_say_what_would_be_right(mixed: xr.Dataset, call: Any, parts: list[str]) -> None:
    with pytest.raises(ResultError) as raised:
        call(mixed)
    for part in parts:
        assert part in str(raised.value)
