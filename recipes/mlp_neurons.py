"""MLP neurons: attribution finds the ones that matter, patching confirms them.

A layer of GPT-2 small has 3,072 neurons, and patching each of them takes a forward each. Attribution patching (Nanda
2023; for neurons Kramár et al. 2024, AtP*, arXiv:2403.00745) estimates all of them from two forwards and one
backward. This experiment patches the 20 largest estimates exactly, and a random sample of the others, so that it can
say how many of the top are confirmed, and how many large ones may have been missed (``tp.audit``). The prompts are
those of ``ioi``; clean values are written into the corrupted run (denoising) at all positions.

What to expect. Single neurons are small beside the stream, which is where a first-order estimate is good: most of the
top is confirmed, with the right sign and about the right size, even where the estimate of a whole MLP is poor (in
GPT-2 small estimates of MLP outputs correlate with effects at .2 to .4 on IOI). Exceptions are to be expected in early
layers, whose neurons go through all that is above them. Effects of single neurons need not add up to that of all
together: ``together`` says what the confirmed ones do as one patch. On IOI attention does most of the work in GPT-2
small (Wang et al. 2022), and each neuron brings back little; ``tp.tasks.facts`` and ``tp.tasks.greater_than`` are
tasks to try.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from tracepatch.recipes import ioi

import tracepatch as tp
from tracepatch.agreement import TOP

prompts = ioi.prompts


@tp.study
def neurons(model, pairs, metric, top=20, sample=40, seed=0, **options):
    """Estimate the patch of every neuron, and patch the largest and a random sample of the others exactly."""
    estimate = tp.attribute(model, pairs, "mlp_act", metric, by=("layer", "neuron"))
    return tp.audit(model, pairs, estimate, metric=metric, top=top, sample=sample, seed=seed, **options)


def confirmed(audited: xr.Dataset, least: float = 0.5) -> xr.DataArray:
    """Of the largest estimates, whether patching confirms each: ``[site]``, with layer and neuron, the largest first.

    A neuron is confirmed if its effect has the sign of its estimate, and each is at least ``least`` of the other.
    """
    mean = tp.over_pairs(audited).stack(site=["layer", "neuron"])
    top = mean.isel(site=(mean["audited"] == TOP).values)
    ratio = (top["effect"] / top["estimate"])[np.argsort(abs(top["estimate"].values))[::-1]]
    return ((ratio >= least) & (ratio <= 1 / least)).rename("confirmed")


def together(model, pairs, chosen, metric=tp.logit_diff, **options) -> xr.Dataset:
    """The effect of denoising several neurons, (layer, neuron) each, as one patch: ``[pair, name]``."""
    with tp.patching(model, pairs, metric, **options) as p, p.row(name="together"):
        for layer, neuron in chosen:
            p.corrupted.mlp_act[layer, :, neuron] = p.clean.mlp_act[layer, :, neuron]
    return p.run(progress=False)


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Counts what is confirmed, patches it as one, and tells the audit: what ``tracepatch run`` adds to its summary.

    Args:
        model: Of the results.
        pairs: The prompts.
        metrics: What was read; the first one is told.
        results: ``neurons`` → the audited estimates.
        path: Where pictures go; none is drawn here.

    Returns:
        Lines for the summary.
    """
    audited = results["neurons"]
    sure = confirmed(audited)
    chosen = sure["site"][sure.values].values.tolist()
    lines = [f"  {len(chosen)} of the {sure.size} neurons with the largest estimates are confirmed by patching"]
    if chosen:
        mean, whole = tp.over_pairs(audited), tp.over_pairs(together(model, pairs, chosen, metrics[0]))
        apart = float(mean["normalized"].stack(site=["layer", "neuron"]).sel(site=chosen).sum())
        lines.append(
            f"  as one patch they restore {whole['normalized'].item():.2f} of the clean − corrupted difference; "
            f"one by one their effects sum to {apart:.2f}"
        )
    return [*lines, *(f"  {line}" for line in audited.attrs["audit"].splitlines())]
