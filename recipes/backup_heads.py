"""Backup heads: knock out the strongest heads one after another, and see who takes over.

Knocking out all name movers of the IOI circuit costs GPT-2 small only about 5 % of its logit difference, because heads
that were quiet before begin to write the name: backup name movers (Wang et al. 2022, arXiv:2211.00593). McGrath et al.
(2023, arXiv:2307.15771) find the same in a 7B model, where about 70 % of what an attention layer brought is restored by
later ones, and Rushing & Nanda (2024, arXiv:2402.15390) across model families, imperfect and noisy.

Heads are ranked by their *direct contribution*: what a head adds to the logit difference past all later layers, with
the final norm as it is in the intact run. The strongest is knocked out by writing its mean over the prompts of both
sides, and all heads are read again; then the strongest of those left, and so on. A head that contributes once others
are gone is a backup. *Compensation* is the share of a head's direct contribution that the logit difference
does not lose when this head alone is knocked out.

What to expect. In a model without backups the logit difference falls by what is knocked out. With backups it falls by
less, and single knock-outs rank the heads wrongly: the one that does most seems to do little. The toy ``backup_heads``
is built like that: its primary head brings 10 logits and costs 1 (compensation 0.9), and its backup, which costs
nothing alone, brings 9 from then on. In GPT-2 small on IOI, expect 9.9, 9.6 and 10.0 to go first, the backups (10.10,
10.6, 10.2, 10.1, 11.2, 9.7, 9.0, 11.9) to rise, and the negative name movers 10.7 and 11.10 to write less against the
answer, which makes good as well. Where the final norm divides by less because less is written, that is a part of the
compensation too: up to 30 % of a direct contribution (Rushing & Nanda 2024).

Prompts are those of IOI with three other names on the corrupted side, or of induction with another answer, where the
tokenizer has no words for IOI.
"""

from __future__ import annotations

import json

import pandas as pd
import xarray as xr

import tracepatch as tp

TOYS = ("backup_heads", "gpt2", "llama")
LEAST = 0.1  # logits: less is not told of


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """IOI with three other names, or induction with another answer, where the tokenizer has no words for IOI."""
    try:
        return tp.tasks.ioi(tokenizer, count, seed, corruption="abc")
    except tp.errors.PromptError:
        return tp.tasks.induction(tokenizer, count, seed, corruption="BA")


def heads_of(model) -> dict[str, tuple[int, int]]:
    """Name, layer and number of every head whose write to the stream is known."""
    found = tp.Architecture(model)
    layers = [layer for layer in range(len(found)) if found.offers("head_out", layer)]
    return {f"L{layer}H{head}": (layer, head) for layer in layers for head in range(found.units("head_out", layer))}


@tp.study
def single_knock_outs(model, pairs, metric=tp.logit_diff, **options):
    """Knock out each head alone."""
    mean = tp.mean([*pairs.clean, *pairs.corrupted])
    return tp.patch(model, pairs, "z", metric, source=mean, direction="noising", **options)


@tp.study
def rounds(model, pairs, metric=tp.logit_diff, count: int = 3, **options):
    """Knock out the strongest head that is left, round by round, and read what the others contribute.

    Returns:
        In logits, by round, layer and head: ``value``, the direct contribution of a head in that round, ``clean``, that
        in the intact run, and ``effect``, the change. By round: ``gone``, the head that went, and ``left``, the logit
        difference.
    """
    heads, prompts_of_both = heads_of(model), [*pairs.clean, *pairs.corrupted]
    read = {name: tp.direct_logit_diff("head_out", (layer, -1, head)) for name, (layer, head) in heads.items()}
    intact = tp.direct_attribution(model, pairs)["share"].mean("pair").to_series()
    contributions, gone, found = intact[list(heads)], [], []
    for number in range(1, min(count, len(heads) - 1) + 1):
        gone.append(contributions.drop(gone).idxmax())
        with tp.patching(model, pairs, {"logit_diff": tp.logit_diff, **read}, **options) as p, p.row(round=number):
            for layer, head in (heads[name] for name in gone):
                p.clean.z[layer, :, head] = p.mean(prompts_of_both).z[layer, :, head]
        found.append(p.run())
        contributions = found[-1]["value"].sel(metric=list(heads)).mean(("pair", "round")).to_series()
    return by_head(xr.concat(found, "round", data_vars="all"), heads).assign_coords(gone=("round", gone))


def by_head(found: xr.Dataset, heads: dict[str, tuple[int, int]]) -> xr.Dataset:
    """Contributions that were read as metrics, by layer and head, and the logit difference beside."""
    left = found[["value", "clean"]].sel(metric="logit_diff", drop=True)
    index = pd.MultiIndex.from_tuples(heads.values(), names=("layer", "head"))
    read = found[["effect", "value", "clean", "base", "status"]].sel(metric=list(heads)).drop_vars("metric")
    split = read.assign_coords(xr.Coordinates.from_pandas_multiindex(index, "metric")).unstack("metric")
    split["status"] = found["status"].broadcast_like(split["effect"]).where(split["effect"].notnull(), 0).astype("int8")
    split = split.assign(left=left["value"], intact=left["clean"].isel(round=0)).assign_coords(metric="direct")
    noise = max(json.loads(found.attrs["noise_floor"]).values())
    told = {
        "metrics": {"direct": "what a head adds to the logit difference by itself"},
        "noise_floor": {"direct": noise},
    }
    split = split.assign_attrs({name: json.dumps(value) for name, value in told.items()})
    return split.transpose("pair", "round", "layer", "head")


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """What each round left and who rose, and single knock-outs over direct contributions: what is made good."""
    found, alone = results["rounds"].mean("pair"), single_knock_outs(model, pairs)
    lines = [f"  {'intact':<24}logit difference {float(found['intact']):+6.2f}"]
    for number in found["round"].values:
        one = found.sel(round=number)
        risen = one["effect"].to_series().nlargest(2)
        told = [
            f"L{layer}H{head} {float(one['clean'].sel(layer=layer, head=head)):+.2f} → "
            f"{float(one['value'].sel(layer=layer, head=head)):+.2f}"
            for layer, head in risen[risen > LEAST].index
        ]
        gone = f"{'without' if number == 1 else 'and'} {one['gone'].item()}"
        lines.append(f"  {gone:<24}logit difference {float(one['left']):+6.2f}   rose: {', '.join(told) or 'none'}")
    brings, costs = found["clean"].isel(round=0, drop=True), -alone["effect"].mean("pair")
    for layer, head in brings.to_series().nlargest(3).index:
        direct, lost = (float(one.sel(layer=layer, head=head)) for one in (brings, costs))
        if direct > LEAST:
            lines.append(
                f"  L{layer}H{head} alone brings {direct:+.2f}, costs {lost:+.2f}: "
                + (f"compensation {1 - lost / direct:.2f}" if lost < direct else "others read it")
            )
    figure = tp.plots.scatter(
        brings.assign_attrs(units="logits", long_name="direct contribution in the intact run"),
        costs.assign_attrs(units="logits", long_name="lost when the head alone is knocked out"),
        title="below the line: made good by others",
        color="layer",
    )
    figure.savefig(f"{path}.compensation.png", dpi=110)
    return [*lines, f"  picture {path}.compensation.png"]
