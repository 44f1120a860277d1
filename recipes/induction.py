"""Induction: which heads continue what has stood there before?

"… tiger lamp … river key … tiger" continues with " lamp", the word that followed the last one before. Olsson et al.
(2022), *In-context Learning and Induction Heads* (arXiv:2209.11895), found two heads in two layers that do this. A
previous-token head writes onto each token which one stood before it. An induction head further up looks for tokens that
were written its own word onto, attends to them, and copies them.

Heads are first known by what they do on random words that stand there twice: ``prefix_matching`` is how much of a
head's attention goes to what followed the same word before, ``previous_token`` how much to the token before, and
``copying`` how much its output alone raises the right next word above another one of the prompt. Then they are patched.
In the corrupted prompt the two words A and B of "A x … B y … A" have changed places, so that y is right instead of x
(corruption BA): keys and values change, while the last word, which asks, does not. With ``prompts(…, corruption="AB")``
only the last word changes, and with it the queries. Clean values are written into the corrupted run (denoising).

What to expect. The head with the highest prefix-matching score is one of those whose patches matter, with its keys and
pattern, and the previous-token head below it matters with its values and output: what changes in the prompt is which
word stands before x. In GPT-2 small, Wang et al. (2022) count 5.5, 5.8, 5.9 and 6.9 as induction heads and 2.2 and 4.11
as previous-token heads. A score is not an effect: with several heads that do the same, each has a high score and a
small effect, because the others suffice.
"""

from __future__ import annotations

import random

import xarray as xr
from matplotlib.figure import Figure
from tracepatch.recipes.ioi import heads, keys, patterns, queries, values  # noqa: F401  # the parts of the experiment

import tracepatch as tp
from tracepatch.words import NOUNS


def prompts(tokenizer, count: int = 8, seed: int = 0, corruption: str = "BA") -> tp.Pairs:
    """Random words, "A x … B y … A" in either order; ``tp.tasks.induction`` says what the corruptions are."""
    return tp.tasks.induction(tokenizer, count, seed, corruption)


def repeated(tokenizer, count: int = 8, seed: int = 0, length: int = 10) -> tp.Pairs:
    """Random words, all of them twice in the same order; the answer is the first word, a wrong one is another of them.

    Args:
        tokenizer: The model's.
        count: How many prompts.
        seed: Of the choice of words.
        length: Different words in a prompt.
    """
    rng, known = random.Random(seed), tp.one_token(tokenizer, [f" {word}" for word in NOUNS], after="the")
    if len(known) < length:
        raise tp.errors.PromptError(
            f"This tokenizer has {len(known)} of {len(NOUNS)} words as one token; {length} are needed."
        )
    drawn = [rng.sample(known, length) for _ in range(count)]
    clean = ["".join(some * 2).strip() for some in drawn]
    return tp.Pairs(clean, None, [w[0] for w in drawn], [w[length // 2] for w in drawn], name="repeated", seed=seed)


def attention(model, pairs: tp.Pairs) -> xr.DataArray:
    """The attention weights of the clean prompts, ``[pair, layer, head, dest, src]``."""
    with tp.patching(model, pairs, tp.logit, checks=False) as p:
        for layer in p.grid("pattern", by="layer"):
            with p.row(layer=layer):
                p.save(p.clean.pattern[layer])
    p.run(progress=False)
    return p.saved["pattern"]


def prefix_matching(model, count: int = 8, seed: int = 0, length: int = 10) -> xr.DataArray:
    """How much attention goes to what followed the same word before (Olsson et al. 2022): ``[layer, head]``, 0 to 1.

    The mean over the second half of ``repeated`` prompts.
    """
    seen = attention(model, repeated(model.tokenizer, count, seed, length))
    return along(seen, length - 1, since=seen.sizes["dest"] - length).rename("prefix matching")


def previous_token(model, count: int = 8, seed: int = 0, length: int = 10) -> xr.DataArray:
    """How much attention goes to the token before: ``[layer, head]``, 0 to 1, the mean over ``repeated`` prompts."""
    seen = attention(model, repeated(model.tokenizer, count, seed, length))
    return along(seen, 1, since=seen.sizes["dest"] - 2 * length + 1).rename("previous token")


def along(seen: xr.DataArray, back: int, since: int) -> xr.DataArray:
    """The mean attention of destinations from ``since`` on to the token so many places back, ``[layer, head]``."""
    dest = xr.DataArray(range(since, seen.sizes["dest"]), dims="place")
    return seen.isel(dest=dest, src=dest - back).mean(("pair", "place")).drop_vars("depth", errors="ignore")


def copying(model, count: int = 8, seed: int = 0, length: int = 10) -> xr.DataArray:
    """How much a head's own output raises the right next word above another one: ``[layer, head]``, in logits.

    The direct logit attribution of the head on ``repeated`` prompts.
    """
    tp.Architecture(model).require("head_out", 0)
    found = tp.direct_attribution(model, repeated(model.tokenizer, count, seed, length))
    share = found["share"].mean("pair")[found["component"].values == "head_out"]
    return share.set_index(writer=["layer", "head"]).unstack("writer").drop_vars("component").rename("copying")


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """Compares scores with effects: what ``tracepatch run`` adds to its summary.

    Args:
        model: Of the results.
        pairs: The prompts.
        metrics: What was read; the first one is compared.
        results: Recipe's name → effects.
        path: Where pictures go: a folder and the beginning of their names.

    Returns:
        Lines for the summary: the heads with the highest scores, and what patching them does.
    """
    mean = tp.over_pairs(results["heads"])
    effect = mean["normalized"].stack(site=["layer", "head"])
    lines = [f"  {'heads with the highest scores':<36}score  effect of its output, and its rank among {effect.size}"]
    figure = Figure(figsize=(13.8, 4.9), layout="constrained")
    for part, measure in zip(figure.subfigures(1, 3), (prefix_matching, previous_token, copying), strict=True):
        score = measure(model)
        name, flat = str(score.name), score.stack(site=["layer", "head"])
        layer, head = flat["site"][int(flat.fillna(0).argmax("site"))].item()
        own = float(effect.sel(site=(layer, head)))
        lines.append(
            f"  {name:<28}{f'{layer}.{head}':<7}{float(flat.max()):6.2f}  {own:+.2f}, "
            f"{int((abs(effect) > abs(own)).sum()) + 1}"
        )
        tp.plots.scatter(score, mean["normalized"], title="", xlabel=name, figure=part)
    picture = f"{path}.scores.png"
    figure.savefig(picture, dpi=110)
    return [*lines, f"  picture {picture}"]
