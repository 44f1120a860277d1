"""Both directions of every site, and what the two together say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.cells import BASES, Cells
from tracepatch.combining import main_variable, over_pairs
from tracepatch.errors import RecipeError, ResultError
from tracepatch.joint import run
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model
from tracepatch.places import along, at, write
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.sites import component

VERDICTS = ("irrelevant", "necessary only", "redundant", "necessary and sufficient", "opposing")
"""What both directions together say of a site, see ``both_directions``; their places are the numbers in ``verdict``."""


def both_directions(
    model: Model,
    pairs: Pairs,
    name: str,
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] | None = None,
    sufficient: float = 0.2,
    necessary: float = 0.2,
    only: dict[str, Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Denoising and noising of every site in one plan, and what the two together say (Heimersheim & Nanda 2024).

    A site is *sufficient* if denoising it restores at least the given share of the clean − corrupted difference, and
    *necessary* if noising it loses at least that share, over all pairs. Sufficient alone is one input of an OR gate:
    others do the same (redundant). Necessary alone is one input of an AND gate.

    Args:
        model: From ``tp.load``.
        pairs: With corrupted prompts in which the behaviour is gone. Where they are clean prompts of other pairs, with
            exchanged answers, the two directions are the same runs.
        name: The component.
        metric: What is read.
        by: As in ``tp.patch``.
        sufficient: The share that must come back.
        necessary: The share that must be lost.
        only: As in ``tp.patch``.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dim ``direction``, and ``verdict`` by site: the number of one of ``VERDICTS``, which
        ``flag_meanings`` names too; -1 where a site does not exist. "opposing" is a site that moves the
        metric the other way, in one direction at least, by as much as that direction's share.
        ``tp.plots.quadrants`` draws it.

    Raises:
        RecipeError: A share is not between 0 and 1, or the pairs have no corrupted prompts.
    """
    shares = {"sufficient": sufficient, "necessary": necessary}
    wrong = [f"{k}={v!r}" for k, v in shares.items() if isinstance(v, bool) or not 0 < v <= 1]
    if wrong:
        raise RecipeError(f"A share of the difference is a number above 0, up to 1: {', '.join(wrong)}.")
    if not isinstance(pairs, Pairs) or pairs.corrupted is None:
        raise RecipeError("Both directions take pairs with corrupted prompts: tp.Pairs(clean=…, corrupted=…, …).")
    with Patching(model, pairs, metric, **options) as p:
        if component(name).place in along(name, by):
            p.encoded.require_alike("A verdict by position", "Run over heads, or over by=('layer', 'span').")
        for direction in BASES:
            cells = Cells.of(p, name, by, direction, None, only)
            kept = cells.partnered(p)
            for _, labels in cells.labels(p):
                with p.row(direction=direction, **labels):
                    write(p, direction, None, at(name, {**kept, **labels}))
    found = run(p, progress)
    share = over_pairs(found)["normalized"]
    back, lost = share.sel(direction="denoising", drop=True), -share.sel(direction="noising", drop=True)
    enough, needed = back >= sufficient, lost >= necessary
    against = (back <= -sufficient) | (lost <= -necessary)
    verdict = (needed * 1 + enough * 2).where(~against, 4).where(back.notnull() & lost.notnull(), -1).astype(np.int8)
    meanings = " ".join(word.replace(" ", "_") for word in VERDICTS)
    return found.assign(
        verdict=verdict.assign_attrs(flag_values=list(range(len(VERDICTS))), flag_meanings=meanings, **shares)
    ).assign_attrs(written="corrupted and clean")  # into the clean and the corrupted run


def directions_of(both: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset, dict[str, float]]:
    """A result of ``both_directions`` as one of denoising and one of noising, and its thresholds.

    Raises:
        ResultError: It is something else, or of several models.
    """
    main_variable(both)
    if "verdict" not in both or "direction" not in both.dims or "model" in both.dims:
        raise ResultError(
            "quadrants(result) takes what tp.sweeps.both_directions gives, of one model; else pass two results, "
            "quadrants(denoising, noising)."
        )
    ways = {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")}
    parts = [
        both.sel(direction=way, drop=True).drop_vars("verdict").assign_attrs(base=base, written=written)
        for way, (base, written) in ways.items()
    ]
    return parts[0], parts[1], {share: float(both["verdict"].attrs[share]) for share in ("sufficient", "necessary")}
