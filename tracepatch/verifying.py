"""The largest effects of a component, found by an estimate and verified by patches: ``tp.verified_top``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.agreement import (
    AUDITED,
    NOT,
    PROVED,
    SAMPLED,
    TOP,
    Compared,
    means,
    named,
    ordinal,
    require_confidence,
    short,
    unit_of,
)
from tracepatch.attribution import attribute
from tracepatch.cells import Direction
from tracepatch.errors import RecipeError, plural
from tracepatch.estimators import AtP
from tracepatch.metrics import Metrics, as_metrics, logit_diff
from tracepatch.models import Model
from tracepatch.population import Exact, Population, population
from tracepatch.prompts import Pairs
from tracepatch.sampling import Floats, Stratum, most, needed


@dataclass(frozen=True)
class Verified:
    """The claim about the largest effects; printed, it is told in words.

    Attributes:
        largest: The cells with the largest effects that were patched, in their order.
        cells: How many cells may have an effect.
        ranked: How many were patched in the order of their estimates.
        drawn: How many more were patched because chance drew them.
        bound: How many of the others have larger effects than the last of ``largest``, at most.
        confidence: With which that is known.
        looks: How many times it was looked whether that is enough.
        unit: Of effects.
        forwards: Patched forwards that were run, and those that patching every cell would take.
        about: The estimator, the components and the metric, and what the estimate took.
    """

    largest: tuple[Compared, ...]
    cells: int
    ranked: int
    drawn: int
    bound: int
    confidence: float
    looks: int
    unit: str
    forwards: tuple[int, int]
    about: tuple[str, str, str, str]

    @property
    def unverified(self) -> int:
        """Cells that were not patched."""
        return self.cells - self.ranked - self.drawn

    def __str__(self) -> str:
        estimator, components, metric, cost = self.about
        count, last = len(self.largest), self.largest[-1]
        lines = [f"The {plural(count, 'largest effect')} of {components} on {metric} [{self.unit}]"]
        lines += [f"  {place:>3}  {one}" for place, one in enumerate(self.largest, 1)]
        if self.unverified:
            claim = (
                f"with {100 * self.confidence:g} % confidence at most {self.bound:,} of the "
                f"{plural(self.unverified, 'cell')} not patched have a larger effect than the {ordinal(count)}, "
                f"{short(abs(last.effect))}"
            )
        else:
            claim = f"these are the largest: all {plural(self.cells, 'cell')} are patched"
        drawn = f", and {self.drawn:,} more drawn by chance" if self.drawn else ""
        done, whole = self.forwards
        return "\n".join(
            [
                *lines,
                f"  claim    {claim}",
                f"  patched  {self.ranked:,} of {self.cells:,} in the order of {estimator}{drawn}, in "
                f"{plural(self.looks, 'look')}",
                f"  spent    {done:,} of {whole:,} patched forwards; the estimate took {cost}",
            ]
        )


def verified_top(
    model: Model,
    pairs: Pairs,
    components: str | Sequence[str],
    k: int = 10,
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] | None = None,
    direction: Direction = "denoising",
    source: Any = None,
    only: dict[str, Any] | None = None,
    estimator: AtP | None = None,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """The k largest effects of a component: estimated, then patched exactly until they are verified.

    What is claimed: with the stated confidence at most m of the N cells that were not patched have a larger effect than
    the k-th largest that was, for these pairs. Cells are patched in the order of their estimates, and a random sample
    of all cells with them, until m is at most ``tolerance`` of all cells that may have an effect, or everything is
    patched. With few cells that is soon everything: of 100 cells, to know 95 without a doubt takes most of them.

    The bound is that of a hypergeometric number (see ``tracepatch.sampling``), whatever the estimates are worth: bad
    ones cost patches, not confidence. How many cells are patched before each look is settled beforehand: twice k in the
    order of the estimates and as many drawn ones as would do if none of them were large, then twice as many, and so on.
    Look number i takes 2^(-i) of the risk, so that all looks together fail as rarely as is said.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        components: One component, or several with the same dims.
        k: How many of the largest effects are asked for.
        metric: What is read; one metric.
        by: The dims to run over, as in ``tp.patch``.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        only: As in ``tp.patch``.
        estimator: As in ``tp.attribute``.
        tolerance: Which share of the cells may be larger and not patched; 0 patches nearly everything.
        confidence: With which that is to be known.
        seed: The same seed draws the same cells.
        progress: Whether to show a bar; by default only on a terminal.
        options: Those of ``tp.patching``.

    Returns:
        The estimate's dataset with ``effect`` and ``audited`` as ``tp.audit`` has them, and ``verified``: the rank of
        the k largest, 0 for all others. ``attrs["verified"]`` says what is claimed, in words; ``attrs`` have the
        ``bound``, the cells left ``unverified``, ``patched_forwards`` and ``sweep_forwards``.

    Raises:
        RecipeError: An argument is not what it has to be, or the estimator cannot do it.
        ComponentError: The model does not have the component.
    """
    level = require_confidence(confidence)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise RecipeError(f"k is a number of cells, 1 or more, not {k!r}.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise RecipeError(f"tolerance is a share of all cells, from 0 to below 1, not {tolerance!r}.")
    if len(as_metrics(metric)) > 1:
        raise RecipeError("The largest effects are those on one metric: pass one.")
    asked = {"by": by, "direction": direction, "source": source, "only": only, "estimator": estimator}
    estimate = attribute(model, pairs, components, metric, memory=options.get("memory"), **asked)
    cells = population(model, pairs, estimate, metric, source, options)
    search = Search(cells, k, level, int(tolerance * len(cells.ranked)), np.random.default_rng(seed), progress)
    search.run()
    return search.dataset()


class Search:
    """Looks, until what is known is enough."""

    def __init__(
        self,
        cells: Population,
        k: int,
        confidence: float,
        allowed: int,
        random: np.random.Generator,
        progress: bool | None,
    ) -> None:
        self.cells, self.confidence, self.allowed, self.progress = cells, confidence, allowed, progress
        self.order = cells.ranked
        self.k = min(k, len(self.order))
        self.shuffled = random.permutation(self.order)
        self.exact: list[Exact] = []
        self.looks, self.ranked, self.bound = 0, min(2 * self.k, len(self.order)), 0
        self.drawn: list[int] = []

    def run(self) -> None:
        """Patches more and more, twice as many of the largest estimates each time."""
        while True:
            self.looks += 1
            surely = 1 - (1 - self.confidence) / 2**self.looks
            certain = {int(n) for n in self.order[: self.ranked]}
            rest = [int(n) for n in self.shuffled if int(n) not in certain]
            kept = sum(n not in certain for n in self.drawn)  # of earlier looks, the first of these
            enough = needed(len(rest), surely, self.allowed) * 2 ** (self.looks - 1)
            count = max(kept, min(len(rest), enough))
            self.drawn = rest[:count]
            known = {int(n) for one in self.exact for n in one.cells}
            self.exact.append(
                self.cells.patched(
                    [n for n in (*self.order[: self.ranked], *self.drawn) if n not in known], self.progress
                )
            )
            sizes = self.sizes()
            least = np.sort(np.nan_to_num(sizes, nan=-1.0))[::-1][: self.k].min(initial=np.inf)
            large = int((sizes[self.drawn] >= least).sum())
            self.bound = most([Stratum(len(rest), count)], large, surely) - large
            if count == len(rest) or self.bound <= self.allowed:
                return
            self.ranked = min(2 * self.ranked, len(self.order))

    def sizes(self) -> Floats:
        """The magnitude of each cell's effect; NaN where it is not patched, and where it is 0 by proof."""
        signed = bool(self.cells.estimate.attrs.get("signed", 1))
        found = abs(means(self.cells.filled(self.exact), "effect", signed))[self.cells.at]
        return np.where(self.cells.proved, np.nan, found)

    def dataset(self) -> xr.Dataset:
        """What was found, with the claim."""
        cells, sizes = self.cells, self.sizes()
        state = np.where(cells.proved, PROVED, NOT).astype(np.int8)
        known = np.flatnonzero(~np.isnan(sizes))
        state[known] = SAMPLED
        state[self.order[: self.ranked]] = TOP
        best = known[np.argsort(-sizes[known], kind="stable")][: self.k]
        places = np.zeros(len(state), np.int32)
        places[best] = np.arange(1, len(best) + 1)
        flags = {"flag_values": list(AUDITED.values()), "flag_meanings": " ".join(AUDITED)}
        found = cells.filled(self.exact).assign(
            audited=(*cells.spread(state, np.int8(NOT)), flags), verified=cells.spread(places, np.int32(0))
        )
        signed = bool(found.attrs.get("signed", 1))
        estimated, effects = (means(found, name, signed) for name in ("estimate", "effect"))
        dims, flat = cells.spread(np.arange(len(state)), -1)
        largest = []
        for number in best:
            at = tuple(index[number] for index in cells.at)
            name = named(found, dims, int(np.ravel_multi_index(at, flat.shape)) if at else 0)
            largest.append(Compared(name, float(estimated[at]), float(effects[at])))
        attrs = found.attrs
        claim = Verified(
            largest=tuple(largest),
            cells=len(self.order),
            ranked=self.ranked,
            drawn=len(known) - self.ranked,
            bound=self.bound,
            confidence=self.confidence,
            looks=self.looks,
            unit=unit_of(found),
            forwards=(sum(one.forwards for one in self.exact), cells.patches),
            about=(attrs["estimator"], attrs["component"], str(found["metric"].item()), attrs["cost"]),
        )
        return found.assign_attrs(
            verified=str(claim),
            bound=claim.bound,
            unverified=claim.unverified,
            confidence=self.confidence,
            patched_forwards=claim.forwards[0],
            sweep_forwards=claim.forwards[1],
        )
