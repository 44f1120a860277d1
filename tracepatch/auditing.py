"""Estimates checked against exact patches: ``tp.audit``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.agreement import AUDITED, NOT, PROVED, SAMPLED, TOP, require_confidence, require_threshold
from tracepatch.errors import RecipeError
from tracepatch.findings import Audit
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model
from tracepatch.population import population
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.sampling import drawn_by_rank


def audit(
    model: Model | Patching,
    pairs: Pairs | None = None,
    estimate: xr.Dataset | None = None,
    *,
    metric: Metrics = logit_diff,
    top: int = 20,
    sample: int = 50,
    seed: int = 0,
    confidence: float = 0.95,
    threshold: float | None = None,
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Checks an estimate: patches its largest cells and a random sample of the others exactly, in one plan.

    Args:
        model: The model that was estimated; or the recording ``p`` whose rows were, without ``pairs``.
        pairs: The same pairs.
        estimate: What ``tp.attribute`` or ``p.estimate`` returned; of a recording it is made if left out.
        metric: The same metric.
        top: How many cells are patched because their estimates, averaged over pairs, are the largest.
        sample: How many of the others, drawn by chance from five bands of ranks, as many from each.
        seed: The same seed draws the same cells.
        confidence: Of the bound on how many cells that were not patched have large effects.
        threshold: What a large effect is: a share of clean − corrupted, or in the metric's unit where pairs have no
            corrupted prompts. By default the ``top``-th largest effect that was patched, or where there are few cells
            the last of the largest quarter of them, but no less than 0.001 of the largest.
        source: The tensor that would be written, where the estimate was of one.
        progress: Whether to show a bar; by default only on a terminal.
        options: Those of ``tp.patching``.

    Returns:
        The estimate's dataset. ``effect`` and ``normalized`` are exact, NaN where nothing was patched, 0 where that is
        proved; ``estimate`` and ``normalized_estimate`` stand beside them. ``audited``: 0 not patched, 1 patched for
        its estimate, 2 one of the sample, 3 proved. ``stands_for``: for how many cells a patched one stands.
        ``patch_size``, ``saturation`` and ``layers_above`` say how doubtful an estimate is: see
        ``tracepatch.doubts.doubts_of``. ``attrs["audit"]`` says what was found, in words; ``tp.Audit.of(dataset)``
        gives the numbers, for other thresholds and confidences too.

    Raises:
        ResultError: The estimate is of another model, other pairs or another metric.
        RecipeError: What was estimated has no exact patch.
    """
    level = require_confidence(confidence)
    limit: float | str = "" if threshold is None else require_threshold(threshold)
    for name, count, least in (("top", top, 1), ("sample", sample, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise RecipeError(f"{name} is a number of cells, {least} or more, not {count!r}.")
    cells = population(model, pairs, estimate, metric, source, options)
    order = cells.ranked
    chosen, stands, strata = drawn_by_rank(order[top:], sample, np.random.default_rng(seed))
    exact = cells.patched([*order[:top], *chosen], progress)
    state = np.where(cells.proved, PROVED, NOT).astype(np.int8)
    state[order[:top]], state[chosen] = TOP, SAMPLED
    weights = np.zeros(len(state))
    weights[order[:top]], weights[chosen] = 1.0, stands
    flags = {"flag_values": list(AUDITED.values()), "flag_meanings": " ".join(AUDITED)}
    found = cells.filled([exact]).assign(
        {
            "audited": (*cells.spread(state, np.int8(NOT)), flags),
            "stands_for": cells.spread(weights, 0.0),
            **cells.doubts([*order[:top], *chosen]),
        }
    )
    found.attrs |= {
        "strata": json.dumps(strata),
        "seed_of_sample": seed,
        "confidence": level,
        "threshold_given": limit,
        "threshold_rank": min(top, -(-len(order) // 4)),
        "patched_forwards": exact.forwards,
        "sweep_forwards": cells.patches,
    }
    return found.assign_attrs(audit=str(Audit.of(found)))
