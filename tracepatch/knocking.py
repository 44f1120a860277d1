"""Knock-outs one on top of the other: what a behaviour still rests on, and which places step in for those that are out.

A backup is a component that does little until another one is gone (Wang et al. 2022, appendix E; McGrath et al. 2023
call it the Hydra effect). One knock-out after the other finds it, as its own effect grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.combining import over_pairs
from tracepatch.errors import RecipeError
from tracepatch.joint import run, several
from tracepatch.measures import direct_logit_diff
from tracepatch.metrics import Metric, Metrics, logit_diff
from tracepatch.models import Model
from tracepatch.places import Place, Places, label, named, write
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.sites import Select, component, select

WRITES = {"z": "head_out", "head_out": "head_out", "attn_out": "attn_out", "mlp_out": "mlp_out"}
"""What is knocked out, and as what it writes to the stream."""


def knock_outs(
    model: Model,
    pairs: Pairs,
    places: Places,
    metric: Metrics = logit_diff,
    *,
    rounds: int = 2,
    first: Sequence[str] = (),
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Knocks places out one after the other, and measures in each round every place that is still there.

    The clean run is edited. Round 0 knocks every place out alone. The place whose loss is largest over all pairs stays
    out, and round 1 knocks each of the others out on top of it, and so on. Each round is a plan of its own.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        places: Two or more.
        metric: What is read; of several the first one decides what stays out.
        rounds: How many rounds there are after round 0.
        first: Labels of places that are out together from round 1 on, instead of the one with the largest loss: the
            known components of a circuit, whose backups are looked for.
        source: What is written, as in ``tp.patch``; the corrupted run's values if nothing is said.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dims ``round`` and ``place``: ``effect``, value − base, what knocking a place out changes on
        top of what is out (NaN for what is out already); ``base``, the metric with nothing else out, by round;
        ``alone``, the effect of round 0; and ``taken_over``, alone − effect: what the place does beyond what it did
        when all others were there, positive for a backup. By round ``joint``, the effect of all that is out,
        ``singles``, the sum of their effects alone, and ``interaction``, joint − singles: negative where they did the
        same work. The coordinate ``out`` names what is out, joined by " + ".

    Raises:
        RecipeError: There are fewer than two places, a label of ``first`` is unknown, or rounds is no number of rounds.
    """
    members = several(places)
    unknown = [one for one in first if one not in members]
    if isinstance(first, str) or unknown:
        raise RecipeError(f"first is a list of labels of places, of {', '.join(members)}; not {first!r}.")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise RecipeError(f"rounds is a number of rounds after the first one, 1 or more, not {rounds!r}.")
    out: list[str] = []
    found: list[xr.Dataset] = []
    while len(found) <= rounds and len(out) < len(members):
        own = _round(model, pairs, members, out, metric, source, progress, options)
        found.append(own.reindex(place=list(members)).assign_coords(out=" + ".join(out)))
        out = [*out, *(first if first and not out else [_weakest(own)])]
    return _stacked(found, [part["out"].item() for part in found])


def _round(
    model: Model,
    pairs: Pairs,
    members: dict[str, list[Place]],
    out: list[str],
    metric: Metrics,
    source: Any,
    progress: bool | None,
    options: dict[str, Any],
) -> xr.Dataset:
    """Every place that is not out, knocked out on top of those that are; ``base``: the metric with these out alone."""
    gone = [place for one in out for place in members[one]]
    with Patching(model, pairs, metric, **options) as p:
        for one, own in members.items():
            if one not in out:
                with p.row(place=one):
                    write(p, "noising", source, *gone, *own)
        if out:
            with p.row(name="out"):
                write(p, "noising", source, *gone)
    if not out:
        found = run(p, progress)
        return found.assign(base=found["clean"].assign_attrs(found["effect"].attrs))
    tree = p.run(progress)
    found = tree["place"].to_dataset().assign_attrs({**tree.attrs, **tree["place"].attrs})
    base = tree["name"].to_dataset()["value"].sel(name="out", drop=True)
    units = found["effect"].attrs
    effect = (found["value"] - base).transpose(*found["effect"].dims)
    return found.assign(effect=effect.assign_attrs(units), base=base.assign_attrs(units))


def _weakest(found: xr.Dataset) -> str:
    """The place without which the metric is lowest, over all pairs."""
    mean = over_pairs(found.drop_vars("normalized", errors="ignore"))["value"]
    mean = mean.isel(metric=0) if "metric" in mean.dims else mean
    if bool(mean.isnull().all()):
        raise RecipeError("No place exists in any prompt, so that nothing can be knocked out.")
    return str(mean["place"].values[int(mean.argmin("place"))])


def _stacked(found: list[xr.Dataset], out: list[str]) -> xr.Dataset:
    """Rounds as a dim, with what each place did alone, and what is interaction."""
    units, dims = found[0]["effect"].attrs, found[0]["effect"].dims
    lead = [dim for dim in dims if dim != "place"]
    index = xr.DataArray(np.arange(len(found)), dims="round", name="round")
    kept = ["effect", "value", "base", "status"]
    whole = xr.concat([part[kept].reset_coords("out", drop=True) for part in found], index)
    whole["status"] = whole["status"].fillna(0).astype(np.int8).assign_attrs(found[0]["status"].attrs)
    alone = found[0]["effect"]
    joint = whole["base"] - found[0]["clean"]
    gone = [[one for one in alone["place"].values if one in part.split(" + ")] for part in out]
    singles = xr.concat([alone.sel(place=part).sum("place", skipna=False) for part in gone], index)
    order = [*lead, "round"]
    added = {
        "alone": alone,
        "taken_over": (alone - whole["effect"]).transpose(*order, "place"),
        "joint": joint.transpose(*order),
        "singles": singles.transpose(*order),
        "interaction": (joint - singles).transpose(*order),
        "clean": found[0]["clean"],
    }
    whole = whole.assign({name: part.assign_attrs(units) for name, part in added.items()})
    for name in ("effect", "value", "status"):
        whole[name] = whole[name].transpose(*order, "place")
    whole["base"] = whole["base"].transpose(*order)
    attrs = {**found[0].attrs, "base": "clean", "rounds": len(found)}
    return whole.assign_coords(out=("round", [part or "nothing" for part in out])).assign_attrs(attrs)


def compensation(
    model: Model,
    pairs: Pairs,
    knocked: Places,
    *,
    pos: int = -1,
    source: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.Dataset:
    """Knocks sets of heads and MLPs out, and sees what all others then write towards the answer themselves.

    What a set writes straight to the logits is its direct effect; what the logit difference loses without it is its
    total effect. The difference is what later components give back, or lose with it (McGrath et al. 2023, eq. 2).
    Direct contributions are taken through the final norm with its scale as it is in the clean run, so that what the
    norm itself gives back (Rushing & Nanda 2024) stands apart, in ``norm``.

    Args:
        model: From ``tp.load``.
        pairs: The prompts, with answers and wrong ones.
        knocked: What is knocked out, each set in a row of its own: places of z, head_out, attn_out or mlp_out.
        pos: The position that the logit difference is read at.
        source: What is written, as in ``tp.patch``; the corrupted run's values if nothing is said.
        progress: Whether to show a bar.
        options: Those of ``tp.patching``.

    Returns:
        A result with the dims ``knocked`` and ``writer``, every head and MLP of the model: ``effect``, how much more
        each writes towards the answer than in the clean run, ``clean`` and ``value``. And by ``knocked``: ``total``,
        the change of the logit difference; ``direct``, that of what was knocked out itself; ``norm``, what of the total
        is no writer's; and ``compensation``, total − direct: above 0 where the rest gives back.

    Raises:
        RecipeError: Something else is to be knocked out.
        ComponentError: The model has no heads whose writes can be told apart.
    """
    sets = named(knocked)
    wrong = [label(place) for group in sets.values() for place in group if place[0] not in WRITES]
    if wrong:
        raise RecipeError(f"{', '.join(wrong)}: what is knocked out writes to the stream: {', '.join(WRITES)}.")
    from_model = Patching(model, pairs, logit_diff).architecture
    writers: dict[str, tuple[str, int, int | None]] = {}
    for layer in range(len(from_model)):
        from_model.require("head_out", layer)
        for head in range(from_model.units("head_out", layer)):
            writers[f"{layer}.{head}"] = "head_out", layer, head
        writers[f"mlp {layer}"] = "mlp_out", layer, None
    metrics: dict[str, Metric] = {"total": logit_diff.at(pos)}
    for one, (name, layer, unit) in writers.items():
        metrics[one] = direct_logit_diff(name, (layer, pos) if unit is None else (layer, pos, unit))
    with Patching(model, pairs, metrics, **options) as p:
        for one, group in sets.items():
            with p.row(knocked=one):
                write(p, "noising", source, *group)
    found = run(p, progress)
    units = {"units": "logits"}
    change = found["effect"].sel(metric=list(writers)).rename(metric="writer")
    total = found["effect"].sel(metric="total", drop=True)
    own = xr.concat(
        [change.sel(knocked=one, writer=_written(group, writers)).sum("writer") for one, group in sets.items()],
        xr.DataArray(list(sets), dims="knocked", name="knocked"),
    ).transpose(*total.dims)
    kept = {name: found[name].sel(metric=list(writers)).rename(metric="writer") for name in ("value", "clean")}
    whole = xr.Dataset({"effect": change, **kept, "status": found["status"]}, attrs=found.attrs)
    summed = change.sum("writer").transpose(*total.dims)
    parts = {"total": total, "direct": own, "compensation": total - own, "norm": total - summed}
    return whole.assign({name: part.assign_attrs(units) for name, part in parts.items()})


def _written(group: list[Place], writers: dict[str, tuple[str, int, int | None]]) -> list[str]:
    """The writers that places are."""
    found = []
    for name, layer, *index in group:
        picked: Select = select(index[1], "head") if component(name).unit and len(index) > 1 else Select()
        for one, (kind, at, unit) in writers.items():
            whole = unit is None or name == "attn_out" or unit in (picked.resolve(unit + 1) or ())
            if at == layer and kind == ("head_out" if name == "attn_out" else WRITES[name]) and whole:
                found.append(one)
    return list(dict.fromkeys(found))
