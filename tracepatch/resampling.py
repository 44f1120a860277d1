"""How sure a mean over pairs is: bootstrap intervals, and sign-flip tests with their corrections.

What is resampled, and what has its sign flipped, is a *cluster* of pairs: those that share a prompt, such as a pair
and the same in exchanged roles, say nearly the same thing and count as one piece of evidence. With ``s`` the sum of a
cluster's effects, ``n`` its number of pairs and ``g`` the sum of its clean − corrupted differences, a draw that takes
each cluster ``w`` times has the mean effect ``Σws / Σwn`` and the normalized effect ``Σws / Σwg``. So a draw is a
weighted sum, and all draws of all cells are one matrix product, taken a block of cells at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.combining import main_variable, over_pairs, whole_difference
from tracepatch.errors import ResultError, plural
from tracepatch.plan import Status

Correction: TypeAlias = Literal["holm", "bh"]
Floats: TypeAlias = NDArray[np.float64]
CORRECTIONS = {"holm": "Holm: familywise error rate", "bh": "Benjamini–Hochberg: false discovery rate"}
BLOCK = 1 << 21  # numbers held at a time for each quantity: 16 MB
TIE = 1e-9  # sums of the same numbers in another order are equal


def intervals(
    effects: xr.Dataset,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    *,
    clusters: str | Sequence[Any] | None = "prompts",
    correction: Correction | Sequence[Correction] = (),
) -> xr.Dataset:
    """The mean over pairs of every cell, with an interval and a p-value.

    The interval is a percentile interval of the bootstrap over clusters of pairs. With few clusters percentile
    intervals are too narrow; this one goes out to the percentiles that make it as wide as Student's t for data that are
    normal (Hesterberg 2015, *What Teachers Should Know About the Bootstrap*, "expanded percentile interval"), but never
    beyond the clusters' own means. So three, four and five clusters of normal data have 75, 87 and 92 % where 95 % are
    asked for. ``normalized`` is a ratio of means in every draw. A draw is the same for all cells.

    The test flips the signs of clusters: where a site does nothing, an effect is as likely as its opposite. The p-value
    is two-sided: the share of all sign patterns that give a mean at least as far from 0. Where there are more patterns
    than ``draws``, it is that of random ones, with the observed pattern among them (Phipson & Smyth 2010). With ``n``
    clusters it cannot be below 2^(1−n): six are needed to get below 0.05.

    Args:
        effects: A result with a dim ``pair``: of exact patches, or of an estimate.
        level: How often such intervals should contain the mean of the distribution that the prompts were drawn from.
        draws: Bootstrap draws, and the most sign patterns.
        seed: The same seed gives the same draws.
        clusters: Which pairs belong together: ``"prompts"``, those that share a prompt, as both roles of a pair do;
            ``None``, each is alone; the name of a coordinate along ``pair``; or a label for each pair.
        correction: ``"holm"`` (Holm 1979) or ``"bh"`` (Benjamini & Hochberg 1995), or both. The family of tests is all
            cells of the result that were measured, in all metrics and models; a cell that was proved to be zero is no
            test.

    Returns:
        The dataset of ``tp.over_pairs`` and, with the dims of ``effect``: ``low`` and ``high``, the ends of its
        interval in the metric's unit; ``normalized_low`` and ``normalized_high`` where there is ``normalized``; ``p``;
        and ``p_holm``, ``p_bh`` where asked for. ``attrs`` say how they were made: ``interval``, ``test`` and
        ``clusters``, how many (of several models, the fewest). A cell that is 0 by proof has the interval [0, 0] and
        p = 1, an absent one NaN.

    Raises:
        ResultError: The result has no pairs, or they are one cluster; or an argument is not what it has to be.
    """
    main = main_variable(effects)
    asked = _asked(level, draws, correction)
    if "pair" not in effects[main].dims:
        raise ResultError(
            "This result has no dim `pair`, and an interval is about the spread between pairs: pass the result as it "
            "was before tp.over_pairs."
        )
    taken = [name for name in ("low", "high", "p") if name in effects.dims]
    if taken:
        raise ResultError(f"The result has a dim {taken[0]!r}, which intervals use themselves: rename it.")
    mean = over_pairs(effects)
    dims = list(mean[main].dims)
    apart = [effects.sel(model=[name]) for name in effects["model"].values] if "model" in effects.dims else [effects]
    drawn = [_resampled(part, main, level, draws, seed, clusters) for part in apart]
    for name in drawn[0]:
        owner = main if name in ("low", "high", "p") else "normalized"
        joined = xr.concat([part[name] for part in drawn], "model") if len(drawn) > 1 else drawn[0][name]
        end = {"w": "lower", "h": "upper"}.get(name[-1])
        what = f"{end} end of the {100 * level:g} % interval of" if end else "two-sided sign-flip test of"
        mean[name] = (dims, joined.transpose(*dims).values, {"long_name": f"{what} {owner}"})
        if end and "units" in mean[owner].attrs:
            mean[name].attrs["units"] = mean[owner].attrs["units"]
    known = mean["status"].isin([Status.MEASURED, Status.ESTIMATED]) if "status" in mean else mean[main].notnull()
    family = (known & mean["p"].notnull()).transpose(*dims).values
    for name in asked:
        corrected = mean["p"].values.copy()
        corrected[family] = (_holm if name == "holm" else _bh)(corrected[family])
        mean[f"p_{name}"] = (dims, corrected, {"long_name": CORRECTIONS[name], "tests": int(family.sum())})
    for what in ("interval", "test"):
        mean.attrs[what] = "; ".join(dict.fromkeys(part["p"].attrs[what] for part in drawn))
    mean.attrs |= {"interval_level": level, "clusters": min(part["p"].attrs["clusters"] for part in drawn)}
    return mean


def cluster_count(effects: xr.Dataset) -> int:
    """How many pairs of one model's result say something of their own: those that share a prompt count as one."""
    return len(np.unique(_sharing(effects)[_there(effects)]))


def _there(effects: xr.Dataset) -> NDArray[np.bool_]:
    """The pairs that have any number."""
    present = effects[main_variable(effects)].notnull().transpose("pair", ...)
    return np.asarray(present.values.reshape(len(present), -1).any(1))


def _resampled(
    effects: xr.Dataset, main: str, level: float, draws: int, seed: int, clusters: str | Sequence[Any] | None
) -> dict[str, xr.DataArray]:
    """The ends of intervals and the p-values of one model, with what the attributes will say."""
    values = effects[main].transpose("pair", ...)
    labels = _labels(effects, clusters)
    there = _there(effects)
    values, labels = values.isel(pair=there), np.unique(labels[there], return_inverse=True)[1]
    count = len(np.unique(labels))
    if count < 2:
        raise ResultError(
            f"{plural(len(labels), 'pair')} in one cluster: there is no spread to draw from. (Pairs that share a "
            "prompt, such as both roles of one, count as one.) Use several that share none, or pass clusters=None."
        )
    gaps = whole_difference(effects).isel(pair=there).broadcast_like(values) if "normalized" in effects else None
    data = _Data.of(values, gaps, labels, count)
    random = np.random.default_rng(seed)
    weights = random.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)  # [draw, cluster]
    signs, exact = _signs(count, draws, random)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student((1 + level) / 2, count - 1))
    together = _said(clusters, len(labels), count)
    patterns = f"all {len(signs):,} patterns" if exact else f"{len(signs):,} random patterns"
    least = 1 / (len(signs) if exact else len(signs) + 1)
    made = f"{100 * level:g} % bootstrap percentiles, widened for few clusters"
    told = {
        "interval": f"{made}: {together}, {draws:,} draws, seed {seed}",
        "test": f"sign flips: {together}, {patterns}; the least possible p is {least:.2g}",
        "clusters": count,
    }
    like = values.isel(pair=0, drop=True)
    found = data.over_blocks(weights, signs, exact, tail)
    return {name: like.copy(data=cells.reshape(like.shape)).assign_attrs(told) for name, cells in found.items()}


@dataclass(frozen=True)
class _Data:
    """Sums over the pairs of each cluster, ``[cluster, cell]``: effects, how many, and clean − corrupted if known."""

    sums: Floats
    counts: Floats
    gaps: Floats | None

    @classmethod
    def of(cls, values: xr.DataArray, gaps: xr.DataArray | None, labels: NDArray[np.intp], count: int) -> _Data:
        flat = values.values.reshape(len(labels), -1)
        member = (labels == np.arange(count)[:, None]).astype(float)  # [cluster, pair]
        present = ~np.isnan(flat)
        each = None if gaps is None else np.nan_to_num(gaps.transpose(*values.dims).values.reshape(flat.shape))
        return cls(
            member @ np.where(present, flat, 0),
            member @ present.astype(float),
            None if each is None else member @ np.where(present, each, 0),
        )

    def over_blocks(self, weights: Floats, signs: Floats, exact: bool, tail: float) -> dict[str, Floats]:
        cells = self.sums.shape[1]
        step = max(1, BLOCK // max(len(weights), len(signs)))
        parts = [self._block(slice(at, at + step), weights, signs, exact, tail) for at in range(0, cells, step)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _block(self, cells: slice, weights: Floats, signs: Floats, exact: bool, tail: float) -> dict[str, Floats]:
        sums, counts = self.sums[:, cells], self.counts[:, cells]
        drawn, found = weights @ sums, dict[str, Floats]()
        found["low"], found["high"] = _ends(drawn, weights @ counts, tail)
        if self.gaps is not None:
            ends = _ends(drawn, weights @ self.gaps[:, cells], tail)
            found["normalized_low"], found["normalized_high"] = ends
        flipped, observed = abs(signs @ sums), abs(sums.sum(0))
        as_far = (flipped >= observed - TIE * abs(sums).sum(0)).sum(0)
        p = as_far / len(signs) if exact else (as_far + 1) / (len(signs) + 1)
        found["p"] = np.where(counts.sum(0) > 0, p, np.nan)
        return found


def _ends(numerator: Floats, denominator: Floats, tail: float) -> list[Floats]:
    """The two percentiles of ``[draw, cell]`` quotients; draws without any pair of a cell do not count for it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = numerator / denominator
    undefined = np.isnan(drawn)
    some, none = undefined.any(0), undefined.all(0)
    ends = np.full((2, drawn.shape[1]), np.nan)
    choose: list[tuple[Any, Any]] = [(~some, np.quantile), (some & ~none, np.nanquantile)]
    for cells, quantile in choose:
        if cells.any():  # percentiles that are draws themselves: between a number and infinity there is none
            ends[:, cells] = quantile(drawn[:, cells], [tail, 1 - tail], axis=0, method="inverted_cdf")
    return [ends[0], ends[1]]


def _signs(count: int, draws: int, random: np.random.Generator) -> tuple[Floats, bool]:
    """Sign patterns ``[pattern, cluster]``, and whether they are all: a pattern and its opposite give the same."""
    if count - 1 <= math.log2(draws):
        return np.array([(1, *rest) for rest in itertools.product((1.0, -1.0), repeat=count - 1)]), True
    return random.choice([1.0, -1.0], size=(draws, count)), False


def _student(probability: float, freedom: int) -> float:
    """A quantile of Student's t, by its expansion at the normal one (Abramowitz & Stegun 26.7.5).

    Within 1 % for two degrees of freedom and far less for more; with one, both are beyond any draw.
    """
    z, v = NormalDist().inv_cdf(probability), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / v**power for power, term in enumerate(terms, 1)))


def _holm(p: Floats) -> Floats:
    order = np.argsort(p)
    corrected = np.empty_like(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def _bh(p: Floats) -> Floats:
    order = np.argsort(p)[::-1]
    corrected = np.empty_like(p)
    corrected[order] = np.minimum.accumulate(p[order] * len(p) / (len(p) - np.arange(len(p))))
    return np.minimum(corrected, 1)


def _labels(effects: xr.Dataset, clusters: str | Sequence[Any] | None) -> NDArray[np.intp]:
    """The cluster of each pair, as a number."""
    pairs = effects.sizes["pair"]
    if clusters is None:
        return np.arange(pairs)
    if isinstance(clusters, str) and clusters == "prompts":
        return _sharing(effects)
    if isinstance(clusters, str):
        if clusters not in effects.coords or effects[clusters].dims != ("pair",):
            along = [str(name) for name, coord in effects.coords.items() if coord.dims == ("pair",)]
            raise ResultError(
                f"clusters={clusters!r} is no coordinate along `pair` alone; those are {', '.join(along)}. Or pass "
                "'prompts', None or a label for each pair."
            )
        clusters = effects[clusters].values.tolist()
    given = list(clusters)
    if len(given) != pairs:
        raise ResultError(f"clusters has {plural(len(given), 'label')} for {plural(pairs, 'pair')}; give each one.")
    known = list(dict.fromkeys(given))
    return np.array([known.index(label) for label in given])


def _sharing(effects: xr.Dataset) -> NDArray[np.intp]:
    """Pairs that share a prompt, directly or through others, have the same number."""
    names = [name for name in ("clean_prompt", "corrupted_prompt") if name in effects.coords]
    names += [name for name in ("decoder_prompt",) if name in effects.coords]
    pairs = effects.sizes["pair"]
    texts = {}  # per pair; several where a prompt has several corruptions
    for name in names:
        found = effects[name].isel(model=0, missing_dims="ignore").transpose("pair", ...)
        texts[name] = found.values.reshape(pairs, -1).tolist()
    written = texts.pop("decoder_prompt", [[""]] * pairs)
    cluster, first = list(range(pairs)), dict[tuple[Any, ...], int]()
    for side in texts.values():
        for pair, several in enumerate(side):
            for text in filter(None, several):
                old, new = cluster[pair], cluster[first.setdefault((text, *written[pair]), pair)]
                cluster = [new if label == old else label for label in cluster]
    return np.array(cluster)


def _said(clusters: str | Sequence[Any] | None, pairs: int, count: int) -> str:
    if count == pairs:
        return plural(pairs, "pair")
    what = "that share a prompt" if isinstance(clusters, str) and clusters == "prompts" else "that belong together"
    return f"{plural(count, 'cluster')} of pairs {what} ({plural(pairs, 'pair')})"


def _asked(level: Any, draws: Any, correction: str | Iterable[str]) -> tuple[str, ...]:
    """The corrections asked for; refuses what is not a level, a number of draws or a correction."""
    asked = (correction,) if isinstance(correction, str) else tuple(correction)
    wrong = [f"level is a share between 0 and 1, such as 0.95, not {level!r}"] if not 0 < level < 1 else []
    if not isinstance(draws, int) or draws < 1:
        wrong.append(f"draws is a number of draws, not {draws!r}")
    elif draws * (1 - level) < 2:
        wrong.append(
            f"{draws:,} draws have nothing outside a level of {level:g}: draw at least {math.ceil(2 / (1 - level)):,}"
        )
    wrong += [
        f"there is no correction {name!r}; there are 'holm' and 'bh'" for name in asked if name not in CORRECTIONS
    ]
    if wrong:
        raise ResultError("; ".join(wrong) + ".")
    return asked
