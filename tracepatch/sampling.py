"""Which cells stand for all others, and how many of the others may be large: draws without return, and their bounds.

The population is finite and known by name: the cells of an estimate. Some are patched because they look large; of the
rest, a random sample. Nothing is assumed of the effects; all chance is in the draw.

Cells are *marked* if their effect is beyond a threshold. The number of marked ones in a sample that is drawn by strata
is a sum of independent hypergeometric numbers, and so a sum of independent trials (Vatutin & Mikhailov 1982). Of such a
sum with mean μ, Hoeffding (1956, theorem 5) says that P(X ≤ x) is at most that of a binomial number of as many trials
and the same mean, where x ≤ μ − 1. Written as trials of the draws, or of the marked cells, that gives two bounds, which
hold however the marked cells are spread over the strata. With one stratum the hypergeometric number itself is taken.

The threshold may be the k-th largest effect that was patched, although that depends on the draw. Let T be the cells
that are patched for certain, R the rest, S the sample of R, y the number of S among the k largest of T ∪ S, t the k-th
of them, and m(y) the most marked cells of R that ``most`` allows for y found ones. The claim that at most m(y) − y
cells of R ∖ S have effects beyond t fails with probability 1 − confidence at most. Proof: let a(y) be the number of
cells of R beyond the (k − y)-th largest of T, which falls as y grows, while m(y) rises. If the claim fails then
a(y − 1) > m(y); let y* be the largest such y. Since y ≤ y*, the sample has at most y* of the m(y*) + 1 largest cells
of R, a set that does not depend on the draw; and m is made so that this has probability 1 − confidence at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BANDS = 5  # of equal numbers of ranks, from each of which a sample takes as many cells


class Stratum(NamedTuple):
    """Cells of which some are drawn, each with the same chance."""

    cells: int
    drawn: int


def drawn_by_rank(
    ranked: Sequence[int] | NDArray[np.intp], count: int, random: np.random.Generator
) -> tuple[NDArray[np.intp], Floats, tuple[Stratum, ...]]:
    """A sample that has as many cells of the upper ranks as of the lower ones.

    Args:
        ranked: The cells, by rank.
        count: How many to draw; all of them if there are no more.
        random: Where chance comes from.

    Returns:
        The drawn cells; for how many cells each stands, itself among them; and the strata.
    """
    bands = np.array_split(np.asarray(ranked, dtype=np.intp), max(1, min(BANDS, count)))
    if count >= len(ranked):
        bands, count = [np.asarray(ranked, dtype=np.intp)], len(ranked)
    least, more = divmod(count, len(bands))
    sizes = [least + (number < more) for number in range(len(bands))]  # the first bands are the larger ones
    parts = [random.choice(band, size, replace=False) for band, size in zip(bands, sizes, strict=True)]
    stands = [np.full(size, len(band) / size) for band, size in zip(bands, sizes, strict=True) if size]
    strata = tuple(Stratum(len(band), size) for band, size in zip(bands, sizes, strict=True))
    return np.concatenate(parts), np.concatenate([np.zeros(0), *stands]), strata


def most(strata: Sequence[Stratum], found: int, confidence: float) -> int:
    """How many of the cells may be marked where a sample has so many: an upper bound at a confidence.

    Whatever the cells are, the bound is below the true number in at most 1 − confidence of all draws.

    Args:
        strata: What was drawn of what.
        found: How many of the drawn cells are marked.
        confidence: Between 0 and 1.
    """
    cells, drawn = sum(s.cells for s in strata), sum(s.drawn for s in strata)
    low, high = found, cells - (drawn - found)
    while low < high:
        middle = (low + high + 1) // 2
        if likely(strata, middle, found) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def likely(strata: Sequence[Stratum], marked: int, found: int) -> float:
    """At most how likely a sample has no more than so many marked cells, where there are ``marked`` of them."""
    cells, drawn = sum(s.cells for s in strata), sum(s.drawn for s in strata)
    if len(strata) == 1:
        return hypergeometric(cells, marked, drawn, found)
    chance = min(s.drawn / s.cells for s in strata if s.cells)
    if found and found > chance * marked - 1:
        return 1.0
    return min(1.0, binomial(drawn, min(1.0, chance * marked / max(1, drawn)), found), binomial(marked, chance, found))


def needed(cells: int, confidence: float, allowed: int) -> int:
    """The smallest sample of some cells after which, if none of it is marked, at most so many may be.

    Args:
        cells: How many there are; the sample is drawn from all of them alike.
        confidence: With which that is then known.
        allowed: How many marked cells are put up with.
    """
    low, high = 0, cells
    while low < high:
        middle = (low + high) // 2
        if most([Stratum(cells, middle)], 0, confidence) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


def hypergeometric(cells: int, marked: int, drawn: int, found: int) -> float:
    """The probability that at most ``found`` of ``drawn`` cells are marked, drawn without return."""
    number = np.arange(max(0, drawn - (cells - marked)), min(found, marked, drawn) + 1)
    logs = _choose(marked, number) + _choose(cells - marked, drawn - number) - _choose(cells, np.array(drawn))
    return float(min(1.0, np.exp(logs).sum()))


def binomial(trials: int, chance: float, found: int) -> float:
    """The probability that at most ``found`` of some independent trials succeed."""
    if found >= trials or chance == 0:
        return 1.0
    if chance == 1:
        return 0.0
    number = np.arange(found + 1)
    logs = _choose(trials, number) + number * math.log(chance) + (trials - number) * math.log1p(-chance)
    return float(min(1.0, np.exp(logs).sum()))


def _choose(of: int, number: NDArray[np.intp]) -> Floats:
    """The logarithm of how many ways there are to choose ``number`` things of some."""
    logs = _factorials(1 << max(4, int(of).bit_length()))
    return np.asarray(logs[of] - logs[number] - logs[of - number])


@lru_cache(maxsize=4)
def _factorials(count: int) -> Floats:
    """The logarithms of 0! to ``count``!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
