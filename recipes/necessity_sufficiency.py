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

import xarray as xr

import tracepatch as tp


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """IOI prompts, and the same with three other names."""
    return tp.tasks.ioi(tokenizer, count, seed, corruption="abc")


@tp.study
def heads(model, pairs, metric, **options):
    """Denoise and noise the output of each head at all positions: is it enough, and is it needed?"""
    return tp.sweeps.both_directions(model, pairs, "z", metric, sufficient=0.2, necessary=0.2, **options)


def verdicts(both: xr.Dataset) -> xr.DataArray:
    """The verdict on each site in words, ``[layer, head]``, empty where there is none; ``both`` is of ``heads``."""
    words = {**dict(enumerate(tp.sweeps.VERDICTS)), -1: ""}
    return xr.apply_ufunc(words.get, both["verdict"], vectorize=True)


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Tells the verdicts, but for heads that are irrelevant: what ``tracepatch run`` adds to its summary.

    Args:
        model: Of the results.
        pairs: The prompts.
        metrics: What was read.
        results: ``heads`` → effects in both directions, with verdicts.
        path: Where pictures go; the one of this experiment is drawn from its results.

    Returns:
        Lines for the summary.
    """
    share = tp.over_pairs(results["heads"])["normalized"]
    lines = [f"  {'verdict':<36}restored  lost"]
    for one in verdicts(results["heads"]).stack(site=["layer", "head"]):
        layer, head = one["site"].item()
        if one.item() not in ("irrelevant", ""):
            back, lost = (float(share.sel(layer=layer, head=head, direction=way)) for way in ("denoising", "noising"))
            lines.append(f"  {f'{layer}.{head}':<8}{one.item():<26}{back:+10.2f}  {-lost:+.2f}")
    return lines
