"""What an audit found, as numbers and in words."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xarray as xr

from tracepatch.agreement import (
    BIG,
    MATTERS,
    MISSED,
    PROVED,
    SAMPLED,
    SATURATED,
    TOP,
    Compared,
    View,
    correlation,
    flips,
    inflated,
    missed,
    ordinal,
    ranks,
    recall,
    require_confidence,
    require_threshold,
    rounded,
    short,
)
from tracepatch.errors import ResultError, plural
from tracepatch.sampling import Stratum, most

SHOWN = 5  # cells of a kind that are listed
NOISE = 1e-3  # of the largest effect that was patched: the least that counts as large unless a threshold is given


@dataclass(frozen=True)
class Audit:
    """What exact patches say of an estimate; printed, it is told in words.

    The pairs are those that there are: all chance is in the draw of the sample, see ``tracepatch.sampling``. Numbers
    are means over pairs, of normalized effects ratios of means.

    Attributes:
        cells: How many cells there are that may have an effect.
        proved: How many more are without effect by proof.
        top: How many were patched because their estimates are the largest.
        sampled: How many more were patched as a random sample of the rest.
        strata: What was drawn of what.
        unit: Of effects and thresholds.
        threshold: What a large effect is at least.
        rule: Where that comes from, in words.
        confidence: Of the bound.
        bound: How many of the cells that were not patched have effects beyond the threshold, at most.
        pearson: Correlation of estimates and effects over all cells: each patched one counts as often as it stands for.
        spearman: The same of their ranks.
        sample_pearson: Correlation over the random sample alone.
        sample_spearman: The same of its ranks.
        flips: How many of the patched cells beyond the threshold have another sign than their estimate, and how many
            such cells there are; ``None`` where estimates have no sign.
        small_flips: The same of the patched cells below it.
        recall: Of the cells beyond the threshold, as far as the sample tells, which share is found by so many patches
            in the order of the estimates: (patches, share), ascending.
        missed: The largest effects, from a tenth of the largest on, whose estimates are below a quarter of them.
        inflated: The estimates that exceed their effects the most, where the effect is below a quarter of them.
        big: How many patches change more than half of what is there, and of how many that is known.
        saturated: How many cells read attention whose largest weights are beyond 0.9, and of how many that is known.
        forwards: Patched forwards that were run, and those that patching every cell would take.
        about: The estimator, the components and the metric, the number of pairs, and what the estimate took.
    """

    cells: int
    proved: int
    top: int
    sampled: int
    strata: tuple[Stratum, ...]
    unit: str
    threshold: float
    rule: str
    confidence: float
    bound: int
    pearson: float
    spearman: float
    sample_pearson: float
    sample_spearman: float
    flips: tuple[int, int] | None
    small_flips: tuple[int, int] | None
    recall: tuple[tuple[int, float], ...]
    missed: tuple[Compared, ...]
    inflated: tuple[Compared, ...]
    big: tuple[int, int]
    saturated: tuple[int, int]
    forwards: tuple[int, int]
    about: tuple[str, str, str, int, str]

    @classmethod
    def of(cls, audited: xr.Dataset, *, threshold: float | None = None, confidence: float | None = None) -> Audit:
        """The numbers of what ``tp.audit`` returned, at its own or another threshold and confidence.

        Args:
            audited: The dataset, or the same read from a file.
            threshold: What a large effect is: a share of clean − corrupted where there is ``normalized``, or in the
                metric's unit.
            confidence: Of the bound, between 0 and 1.

        Raises:
            ResultError: The dataset was not audited, or the threshold or confidence is none.
        """
        if not isinstance(audited, xr.Dataset) or "stands_for" not in audited:
            raise ResultError("This dataset is not audited: pass what tp.audit(model, pairs, estimate) returned.")
        given = audited.attrs
        level = require_confidence(given["confidence"] if confidence is None else confidence)
        view = View.of(audited)
        patched = np.isin(view.audited, (TOP, SAMPLED))
        sampled = view.audited == SAMPLED
        weights, sizes = view.stands[patched], abs(view.effect)
        stored = given["threshold_given"] if threshold is None else threshold
        if stored != "":
            limit, least, rule = *[require_threshold(stored)] * 2, "the threshold"
        else:
            rank = min(int(given["threshold_rank"]), int(patched.sum()))
            least, floor = float(np.sort(sizes[patched])[-rank]), NOISE * float(sizes[patched].max())
            limit, rule = max(least, floor), f"the {ordinal(rank)} largest that was"
            rule = rule if limit == least else f"{NOISE:g} of the largest that was"
        beyond = patched & (sizes >= limit)
        strata = tuple(Stratum(*pair) for pair in json.loads(given["strata"]))
        large = int((sampled & patched & (sizes >= least)).sum())
        bound = most(strata, large, level) - large
        both = [view.estimate[patched], view.effect[patched]]
        alone = [view.estimate[sampled], view.effect[sampled]]
        big, saturated = view.count("patch_size", patched, BIG), view.count("saturation", patched, SATURATED)
        return cls(
            cells=int((~np.isnan(view.estimate) & (view.audited != PROVED)).sum()),
            proved=int((view.audited == PROVED).sum()),
            top=int((view.audited == TOP).sum()),
            sampled=int(sampled.sum()),
            strata=strata,
            unit=view.unit,
            threshold=limit,
            rule=rule,
            confidence=level,
            bound=bound,
            pearson=correlation(both[0], both[1], weights),
            spearman=correlation(ranks(both[0], weights), ranks(both[1], weights), weights),
            sample_pearson=correlation(alone[0], alone[1]),
            sample_spearman=correlation(ranks(alone[0]), ranks(alone[1])),
            flips=flips(view, beyond),
            small_flips=flips(view, patched & ~beyond),
            recall=recall(view, beyond),
            missed=missed(view, patched),
            inflated=inflated(view, patched),
            big=big,
            saturated=saturated,
            forwards=(int(given["patched_forwards"]), int(given["sweep_forwards"])),
            about=(
                str(given["estimator"]),
                str(given.get("component", "")),
                ", ".join(json.loads(given["metrics"])),
                audited.sizes["pair"],
                str(given["cost"]),
            ),
        )

    @property
    def unverified(self) -> int:
        """Cells that were not patched."""
        return self.cells - self.top - self.sampled

    def __str__(self) -> str:
        estimator, components, metric, pairs, cost = self.about
        lines = [
            f"Audit of {estimator}: {components} on {metric}, {plural(self.cells, 'cell')}, {plural(pairs, 'pair')}"
        ]
        rest = f", and {self.sampled:,} of the other {self.cells - self.top:,} drawn by rank" if self.sampled else ""
        every = "every cell" if not self.unverified else f"the {plural(self.top, 'largest estimate')}{rest}"
        proved = f"; {self.proved:,} more have no effect by proof" if self.proved else ""
        lines.append(f"  patched    {every}{proved}")
        if self.flips is None:
            lines.append("  no sign    these estimates have none: the magnitudes of effects are compared")
        lines += [f"  agreement  {self._agreement()}", *self._signs(), *self._found(), f"  rest       {self._rest()}"]
        lines += [f"  recall     {self._recalled()}"] if self.recall else []
        done, whole = self.forwards
        lines.append(f"  spent      {done:,} of {whole:,} patched forwards; the estimate took {cost}")
        lines += self._doubtful()
        return "\n".join(lines)

    def _agreement(self) -> str:
        over = f"Pearson {rounded(self.pearson)}, Spearman {rounded(self.spearman)}"
        if not self.sampled or not self.unverified:
            return f"{over} over {'all cells' if not self.unverified else 'the cells patched, chosen as the largest'}"
        alone = f"{rounded(self.sample_pearson)} and {rounded(self.sample_spearman)} over those drawn alone"
        return f"{over} over all cells, for whom those drawn stand; {alone}"

    def _signs(self) -> list[str]:
        if self.flips is None or self.small_flips is None:
            return []
        (wrong, large), (others, small) = self.flips, self.small_flips
        return [
            f"  signs      {wrong:,} of {plural(large, 'effect')} from {short(self.threshold)} on have another sign "
            f"than the estimate, and {others:,} of {small:,} smaller ones"
        ]

    def _found(self) -> list[str]:
        lines = []
        for title, cells, words in (
            ("missed", self.missed, "attribution misses it"),
            ("inflated", self.inflated, "attribution makes it up"),
        ):
            lines += [f"  {title:<9}  {one}: {words}" for one in cells[:SHOWN]]
            more = cells[SHOWN:]
            lines += [f"  {title:<9}  {len(more):,} more, the first {more[0]}"] if more else []
        if not self.missed:
            lines.append(
                f"  missed     none: every patched effect from {MATTERS:g} of the largest on has an estimate of at "
                f"least {MISSED:g} of it"
            )
        return lines

    def _rest(self) -> str:
        if not self.unverified:
            return "nothing: every cell is verified"
        return (
            f"with {100 * self.confidence:g} % confidence at most {self.bound:,} of the "
            f"{plural(self.unverified, 'cell')} not patched have an effect beyond {short(self.threshold)} "
            f"[{self.unit}], {self.rule}"
        )

    def _recalled(self) -> str:
        """When a half, 0.9 and all of the large effects are found."""
        told = []
        for part in (0.5, 0.9, 1.0):
            patches, found = next((p, s) for p, s in self.recall if s >= part - 1e-9)
            told.append((patches, found))
        steps = ", ".join(f"{patches:,} find {100 * found:.0f} %" for patches, found in dict.fromkeys(told))
        guess = " (as far as those drawn tell)" if self.unverified else ""
        return f"of the effects from {short(self.threshold)} on, patches in the order of the estimate: {steps}{guess}"

    def _doubtful(self) -> list[str]:
        lines = []
        for (many, known), what in (
            (
                self.big,
                f"change more than {BIG:g} of what stands there (patch_size), where a first-order step is a guess",
            ),
            (self.saturated, f"go through a softmax whose largest weight is beyond {SATURATED:g} (saturation)"),
        ):
            if known:
                lines.append(f"  doubtful   {many:,} of {known:,} patched cells {what}")
        return lines
