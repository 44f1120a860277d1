"""Corruptions: does the answer to "where?" depend on how the prompt was corrupted?

What a corruption changes is all that patching can locate. Zhang & Nanda (2023), *Towards Best Practices of Activation
Patching* (arXiv:2309.16042), find on IOI that corrupting the second subject alone misses at least two of the three name
movers under every metric, that corrupting all names mostly finds them but no S-inhibition head, and that noise and
replaced tokens detect different heads. So an effect is a finding about one corruption, until others agree.

Each clean IOI prompt is corrupted in several ways: the second subject is the other name (*as given*), the first two
names have changed places too, three words are replaced by chance, or the last three are. The same sites are patched
under each (denoising), by span, so that prompts of all kinds can be averaged. Effects are shares of what a corruption
takes away. Sites agree if under all corruptions they have one sign, and sizes within a factor of two.

What to expect. All agree on the end of the prompt: what decides the answer has to be there in late layers. They
disagree on where it comes from: the second subject carries everything if nothing else is changed, and the other names
as well if they are. Words by chance may miss every name; then a corruption takes little away, its shares are of little,
and heads show up that have to do with those words and not with the task. In GPT-2 small, heads that compare names
(duplicate token, S-inhibition) matter where the pattern of names changes, and heads that move a name where the names
themselves do.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import tracepatch as tp


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """IOI prompts, each corrupted in four ways."""
    given = tp.tasks.ioi(tokenizer, count, seed)
    return (
        given
        + tp.corruptions.exchanged(given, "first", "second")
        + tp.corruptions.random_tokens(given, tokenizer, 3, seed)
        + tp.corruptions.last_tokens(given, tokenizer, 3, seed)
    )


@tp.study
def residual_stream(model, pairs, metric=tp.logit_diff, **options):
    """Denoise the residual stream entering each layer, one span at a time, under each corruption."""
    return tp.by_corruption(tp.patch(model, pairs, "resid_pre", metric, by=("layer", "span"), **options))


@tp.study
def heads(model, pairs, metric=tp.logit_diff, **options):
    """Denoise each head's output at all positions, under each corruption."""
    return tp.by_corruption(tp.patch(model, pairs, "z", metric, **options))


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """What each corruption takes away, and on which sites they agree; drawn against the first of them."""
    ways = results["heads"]["corruption"].values.tolist()
    values = tp.over_pairs(results["heads"])
    lines = [f"  clean {float(values['clean'].mean()):+.2f}; corrupted:"]
    lines += [f"    {way:<28}{float(values['corrupted'].sel(corruption=way)):+.2f}" for way in ways]
    for name, effects in results.items():
        verdicts = tp.agreement_over(effects)["verdict"].values
        told = [
            f"{int((verdicts == i).sum())} {word}"
            for i, word in enumerate(("nothing", "agree", "size differs", "sign differs"))
        ]
        lines.append(f"  {name.replace('_', ' '):<16}{', '.join(told)}")
    figure = Figure(figsize=(4.8 * (len(ways) - 1), 5.2), layout="constrained")
    for part, way in zip(np.ravel(figure.subfigures(1, len(ways) - 1)), ways[1:], strict=True):
        one, other = (results["heads"].sel(corruption=name, drop=True) for name in (ways[0], way))
        tp.plots.scatter(one, other, xlabel=ways[0], ylabel=way, title="heads", figure=part)
    figure.savefig(f"{path}.corruptions.png", dpi=110)
    return [*lines, f"  picture {path}.corruptions.png"]
