"""Necessity and sufficiency: which heads are enough, which are needed, and which are both?

Denoising writes clean values into the corrupted run: a site whose patch brings the answer back is *sufficient*, given
all that is the same in both prompts. Noising writes corrupted values into the clean run: a site whose patch loses the
answer is *necessary*. Heimersheim & Nanda (2024), *How to use and interpret activation patching* (arXiv:2404.15255),
show why one does not follow from the other. Of the inputs of an AND each is necessary and none is sufficient; of those
of an OR each is sufficient and none is necessary.

The two directions say different things only where the corrupted prompt has lost the behaviour instead of having the
opposite one. So the corrupted prompts of this experiment, indirect object identification (Wang et al. 2022), have three
other names in the three places (ABC): neither answer is favoured. Each site gets a verdict at stated thresholds, by
default a fifth of the clean − corrupted difference.

What to expect. Early heads that everything later depends on are necessary and sufficient. Name movers are sufficient in
part and hardly necessary: without them, backup name movers do their work. In GPT-2 small, taking away all three name
movers costs 5 % of the logit difference (Wang et al. 2022). Heads that only help another one to look at the right place
are necessary and not sufficient: the name is not there in the corrupted prompt. A threshold decides what is called
what: look at the figure, not only at the words.
"""

from __future__ import annotations

import random

import xarray as xr
from tracepatch.recipes import ioi

import tracepatch as tp

SUFFICIENT, NECESSARY = 0.2, 0.2  # of the clean − corrupted difference


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """IOI prompts, and the same with three other names.

    Args:
        tokenizer: The model's.
        count: How many pairs.
        seed: The same seed gives the same pairs, as long as the same words are one token.
    """
    made, rng = ioi.prompts(tokenizer, 2 * count, seed)[:count], random.Random(seed)
    names = [name.strip() for name in tp.one_token(tokenizer, [f" {name}" for name in ioi.NAMES])]
    corrupted = []
    for prompt, (answer,), (wrong,) in zip(made.clean, made.answer, made.wrong, strict=True):
        first, second, third = rng.sample([name for name in names if f" {name}" not in (answer, wrong)], 3)
        words = [{answer: first, wrong: second}.get(f" {word}", word) for word in prompt.split()]
        words[len(words) - 1 - words[::-1].index(second)] = third
        corrupted.append(" ".join(words))
    return tp.Pairs(made.clean, corrupted, made.answer, made.wrong, name="IOI, three other names", seed=seed)


@tp.recipe
def denoising(p):
    """Write each head's clean output into the corrupted run, at all positions: is it enough?"""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]


@tp.recipe
def noising(p):
    """Write each head's corrupted output into the clean run, at all positions: is it needed?"""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.clean.z[layer, :, head] = p.corrupted.z[layer, :, head]


def verdicts(enough: xr.Dataset, needed: xr.Dataset) -> xr.DataArray:
    """What both directions say of each site, in words: ``[layer, head]``.

    Args:
        enough: The result of ``denoising``.
        needed: The result of ``noising``.
    """
    back, lost = tp.over_pairs(enough)["normalized"], -tp.over_pairs(needed)["normalized"]
    found = xr.full_like(back, "neither", dtype=object)
    found = found.where(back < SUFFICIENT, "redundant").where(lost < NECESSARY, "necessary only")
    found = found.where((back < SUFFICIENT) | (lost < NECESSARY), "necessary and sufficient")
    return found.where((back > -SUFFICIENT) & (lost > -NECESSARY), "works against").where(back.notnull(), "")


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Gives the verdicts, and draws both directions against each other: what ``tracepatch run`` adds to its summary.

    Args:
        model: Of the results.
        pairs: The prompts.
        metrics: What was read; the first one is told.
        results: ``denoising`` and ``noising`` → effects.
        path: Where pictures go: a folder and the beginning of their names.

    Returns:
        Lines for the summary.
    """
    both = [results[name] for name in ("denoising", "noising")]
    back, lost = tp.over_pairs(both[0])["normalized"], -tp.over_pairs(both[1])["normalized"]
    lines = [f"  {f'at least {SUFFICIENT:g} restored, {NECESSARY:g} lost':<34}restored  lost"]
    for site in verdicts(*both).stack(site=["layer", "head"]):
        at = dict(zip(("layer", "head"), site["site"].item(), strict=True))
        if site.item() not in ("neither", ""):
            told = f"{float(back.sel(at)):+8.2f}  {float(lost.sel(at)):+.2f}"
            lines.append(f"  {at['layer']}.{at['head']:<6}{site.item():<26}{told}")
    picture = f"{path}.quadrants.png"
    tp.plots.quadrants(*both, sufficient=SUFFICIENT, necessary=NECESSARY).savefig(picture, dpi=110)
    return [*lines, f"  picture {picture}"]
