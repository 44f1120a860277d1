"""Measured rows as labelled arrays: ``xarray.Dataset`` with token labels, baselines, status and provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.alignment import Aligned, Side
from tracepatch.architecture import Architecture
from tracepatch.journal import Measured
from tracepatch.models import Model, fingerprint, name_of, source_of, versions
from tracepatch.plan import Plan, Proof, Status
from tracepatch.rows import Label, Row
from tracepatch.sites import PLACES, select
from tracepatch.sources import Part, Source, Value, WorldName, summed
from tracepatch.tokens import EncodedPairs, Prompt

Result: TypeAlias = xr.Dataset | xr.DataTree
FORMAT = 1
SPARSE = 4  # a grid with more than this many cells a row is kept as a list of rows


def to_result(
    model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, measured: Measured
) -> Result:
    """One dataset for the rows that share their labels' names; a tree of datasets where there are several such sets.

    Dims are ``metric`` (where there are several), ``pair`` and the labels. Variables:

    * ``value``: the metric of the patched run, in its unit.
    * ``effect``: value − value of the unpatched base.
    * ``normalized``: effect / (clean − corrupted): 0 nothing happened, ±1 the whole difference. NaN for a pair whose
      clean and corrupted runs are too close to divide by. Where the pairs have no corrupted prompts and rows edit an
      edited world, such as the clean run with noise, that world stands in for the corrupted one.
    * ``effect_…``: the effect on one part of a metric, such as the answer's logit.
    * ``base``, ``clean``, ``corrupted``, and the name of each edited world: the values without the row's edits.
    * ``status``: 0 absent (NaN elsewhere), 1 measured, 2 proved to be zero, 3 not measured yet (NaN elsewhere), 4
      estimated.
    """
    sets: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(plan.rows):
        sets.setdefault(tuple(row.labels), []).append(number)
    attrs = provenance(model, encoded, plan, measured)
    found: dict[str, xr.Dataset] = {}
    for names, numbers in sets.items():
        joined = "_".join(names) or "unlabelled"
        taken = sum(key.rstrip("_") == joined for key in found)
        found[joined + "_" * taken] = _dataset(names, numbers, architecture, encoded, plan, measured, attrs)
    if len(found) == 1:
        return next(iter(found.values()))
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs)} | found)


def _dataset(
    names: tuple[str, ...],
    numbers: list[int],
    architecture: Architecture,
    encoded: EncodedPairs,
    plan: Plan,
    measured: Measured,
    attrs: dict[str, Any],
) -> xr.Dataset:
    rows = [plan.rows[n] for n in numbers]
    dims, shape, at, coords = placed(rows)

    def spread(values: NDArray[Any], empty: Any) -> NDArray[Any]:
        """[row, pair] → [pair, *labels]."""
        out = np.full((plan.pairs, *shape), empty, values.dtype)
        index: Any = (slice(None), *at)
        out[index] = values.T
        return out

    metrics = [m.name for m in plan.metrics]
    lead = ("metric", "pair") if len(metrics) > 1 else ("pair",)
    bases = {row.base for row in rows}
    base = np.stack([measured.baselines[row.base] for row in rows])  # [row, pair, column]
    values = measured.values[numbers]
    absent = plan.proofs[numbers] == Proof.ABSENT
    base = np.where(absent[..., None], np.nan, base)
    columns = measured.columns

    def variable(array: NDArray[Any], part: str = "") -> NDArray[Any]:
        """[row, pair, column] → [(metric,) pair, *labels]; NaN where a metric has no such part."""
        stacked = [
            spread(array[..., columns.index((m, part))], np.nan)
            if (m, part) in columns
            else np.full((plan.pairs, *shape), np.nan)
            for m in metrics
        ]
        return np.stack(stacked) if len(metrics) > 1 else stacked[0]

    def baseline(world: Any) -> NDArray[np.float64]:
        stacked = [measured.baselines[world][:, columns.index((m, ""))] for m in metrics]
        return np.stack(stacked) if len(metrics) > 1 else stacked[0]

    data: dict[str, Any] = {
        "effect": ((*lead, *dims), variable(values - base)),
        "value": ((*lead, *dims), variable(values)),
    }
    for part in dict.fromkeys(p for m in plan.metrics for p in m.parts):
        data[f"effect_{part}"] = ((*lead, *dims), variable(values - base, part))
    data["base"] = (lead, baseline(next(iter(bases)))) if len(bases) == 1 else ((*lead, *dims), variable(base))
    for world in plan.worlds:
        data[world] = (lead, baseline(world))
    drawn: dict[WorldName, list[WorldName]] = {}
    for edited in plan.edited:
        drawn.setdefault(edited.origin or edited.name, []).append(edited.name)
    for origin, draws in drawn.items():
        if len(draws) == 1:
            data[origin] = (lead, baseline(origin))
            continue
        own = coords.setdefault("draw", list(range(len(draws))))
        alike = isinstance(own, list) and len(own) == len(draws)
        dim = "draw" if alike else f"{origin}_draw"
        data[origin] = ((*lead, dim), np.stack([baseline(draw) for draw in draws], -1))
    proofs = plan.proofs[numbers]
    status = np.where(
        absent,
        Status.ABSENT,
        np.where((proofs == Proof.NONE) | (proofs == Proof.IDENTICAL), Status.MEASURED, Status.PROVED_ZERO),
    )
    status = np.where(np.isnan(values).any(-1) & ~absent, Status.PENDING, status)  # every finished number is finite
    data["status"] = (("pair", *dims), spread(status.astype(np.int8), np.int8(Status.ABSENT)))
    dataset = xr.Dataset(data, coords=coords | pair_coords(encoded), attrs=attrs)
    dataset = dataset.assign_coords(metric=metrics if len(metrics) > 1 else metrics[0])
    if dims == names:
        dataset = site_coords(dataset, architecture, encoded, rows)
    if len(plan.worlds) == 2:
        dataset = normalize(dataset, _own_noise(measured), "corrupted")
    elif plan.edited:
        dataset = normalize(dataset, _own_noise(measured), "base")
    origins = {world.name: world.origin or world.name for world in plan.edited}
    dataset.attrs["base"] = " and ".join(sorted({origins.get(base, base) for base in bases}))
    sources = (e.source for row in rows for e in row.edits)
    written = {_described(s) for s in sources}
    dataset.attrs["written"] = written.pop() if len(written) == 1 else "other"
    dataset.attrs["component"] = ", ".join(dict.fromkeys(e.site.component for row in rows for e in row.edits))
    units = {m.name: m.unit for m in plan.metrics}
    for name in (
        "effect",
        "value",
        "base",
        "clean",
        "corrupted",
        *drawn,
        *(v for v in dataset.data_vars if str(v).startswith("effect_")),
    ):
        if name in dataset:
            dataset[name].attrs["units"] = ", ".join(dict.fromkeys(units.values()))
    dataset["status"].attrs.update(
        flag_values=[int(s) for s in Status], flag_meanings=" ".join(s.name.lower() for s in Status)
    )
    order = [
        "effect",
        "normalized",
        "value",
        *(v for v in dataset.data_vars if str(v).startswith("effect_")),
        "base",
        *plan.worlds,
        *drawn,
        "status",
    ]
    return dataset[[name for name in order if name in dataset]]


def placed(
    rows: Sequence[Row],
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[NDArray[np.intp], ...], dict[str, Any]]:
    """Where rows with the same labels' names stand: in a grid of their labels, or, where that were sparse, in a list.

    Returns:
        Dims, shape, each dim's index of every row, and coordinates.
    """
    names = tuple(rows[0].labels)
    axes = {name: _axis([row.labels[name] for row in rows]) for name in names}
    shape = tuple(len(axis) for axis in axes.values())
    if names and int(np.prod(shape)) <= SPARSE * len(rows):
        at = tuple(np.array([axes[name].index(row.labels[name]) for row in rows]) for name in names)
        return names, shape, at, {name: list(axis) for name, axis in axes.items()}
    listed = {name: ("row", [row.labels[name] for row in rows]) for name in names}
    return ("row",), (len(rows),), (np.arange(len(rows)),), {"row": np.arange(len(rows))} | listed


def _described(source: Source) -> str:
    """What was written, in a word: a world, or a number."""
    if isinstance(source, Value):
        return source.world
    total = summed(source)
    if total is None or isinstance(source, Part):
        return "other"
    number = total.constant is not None and not total.values and not total.constant.tensor.shape
    return str(total) if number else "other"


def _axis(labels: Sequence[Label]) -> list[Label]:
    unique = list(dict.fromkeys(labels))
    return sorted(unique) if all(isinstance(label, (int, float)) for label in unique) else unique


def pair_coords(encoded: EncodedPairs) -> dict[str, Any]:
    """Numbers, prompts and answers along ``pair``."""
    coords: dict[str, Any] = {
        "pair": np.arange(len(encoded)),
        "clean_prompt": ("pair", [_text(encoded, p) for p in encoded.clean_prompts]),
    }
    if encoded.corrupted is not None:
        coords["corrupted_prompt"] = ("pair", [_text(encoded, p) for p in encoded.corrupted_prompts])
    if encoded.corruption:
        coords["corruption"] = ("pair", list(encoded.corruption))
    if encoded.decoder_prompts:
        coords["decoder_prompt"] = ("pair", [_text(encoded, p) for p in encoded.decoder_prompts])
    for name, ids in (("answer", encoded.answer), ("wrong", encoded.wrong)):
        if any(ids):
            coords[name] = ("pair", ["|".join(encoded.words(i)) for i in ids])
    return coords


def _text(encoded: EncodedPairs, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "".join(encoded.words(prompt))


def site_coords(
    dataset: xr.Dataset, architecture: Architecture, encoded: EncodedPairs, rows: Sequence[Row] = (), counted: str = ""
) -> xr.Dataset:
    """Adds the depth of layers, the kv_head of heads, and the tokens of positions and spans, of both prompts.

    A position counts in the prompts of the rows' base; where its partner in the other prompt is another position, the
    other token is the partner's. Without rows it is said in whose prompts it counts.
    """
    if "layer" in dataset.dims:
        depth = dataset["layer"].values / max(1, len(architecture) - 1)
        dataset = dataset.assign_coords(depth=("layer", depth))
    if "head" in dataset.dims:
        groups = {
            (a.heads, a.kv_heads)
            for i in range(len(architecture))
            if (a := architecture.attention(i)) is not None and a.heads
        }
        if len(groups) == 1:
            heads, kv_heads = groups.pop()
            dataset = dataset.assign_coords(kv_head=("head", dataset["head"].values // (heads // kv_heads)))
    for dim in (*PLACES, "span"):
        of = _counted(dim, rows, dataset[dim].values.tolist(), counted) if dim in dataset.coords else None
        if of is None:
            continue
        for world in encoded.worlds:
            name = "token" if world == "clean" else "corrupted_token"
            name = name if dim in ("pos", "span") else f"{dim}_{name}"
            labels, sides = dataset[dim].values.tolist(), zip(encoded.sides(world), encoded.world(world), strict=True)
            if dim == "span":
                picked = [
                    [encoded.text(ids[p] for p in select(s, "pos").on(side) or ()) for s in labels]
                    for side, ids in sides
                ]
            else:
                picked = [
                    [word_at(p, of, side, words) for p in labels]
                    for side, ids in sides
                    for words in [encoded.words(ids)]
                ]
            shared = all(p == picked[0] for p in picked)
            dataset = dataset.assign_coords({name: (dim, picked[0]) if shared else (("pair", dim), picked)})
    return dataset


def _counted(dim: str, rows: Sequence[Row], found: Sequence[Label], counted: str) -> str | None:
    """In whose prompts the labels of a dim count: ``""`` for each in its own; ``None`` where that has no answer."""
    labels = [row.labels[dim] for row in rows if dim in row.labels] or found
    if dim == "span":
        return "" if all(isinstance(label, str) for label in labels) else None
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        return None
    several = {_of(row, dim) for row in rows if dim in row.labels} or {counted}
    return several.pop() if len(several) == 1 else None


def _of(row: Row, dim: str) -> str:
    """In whose prompts a row's label of a dim counts."""
    label = row.labels[dim]
    if isinstance(label, Aligned):
        return label.of
    picked = [site.picked(dim) for site in row.sites]
    return next((one.of for one in picked if one.of and label in (one.items or ())), "")


def word_at(position: int, counted: str, side: Side, words: Sequence[str]) -> str:
    """The token at a position of one prompt; empty where it has none.

    Args:
        position: The position.
        counted: In whose prompt it counts, to be found by its partner in the other; ``""`` for this one.
        side: The prompt.
        words: Its tokens.
    """
    at = select(Aligned(position, counted) if counted else position, "pos").on(side)
    return words[at[0]] if at else ""


def _own_noise(measured: Measured) -> list[float]:
    return [float(n) for n, (_, part) in zip(measured.noise, measured.columns, strict=True) if not part]


def normalize(dataset: xr.Dataset, noise: Sequence[float], other: str) -> xr.Dataset:
    """Adds ``normalized``, and in ``attrs`` the pairs that are too close to divide by.

    Args:
        dataset: With ``effect``, or ``estimate``, ``clean`` and the other baseline.
        noise: The noise floor of each metric.
        other: The baseline that clean is compared with.
    """
    main = dataset["effect" if "effect" in dataset else "estimate"]
    gap = dataset["clean"] - dataset[other]
    floor = xr.DataArray(list(noise), dims="metric")
    drift = floor if "metric" in gap.dims else floor[0]
    usable = abs(gap) > 1e-5 * np.maximum(abs(dataset["clean"]), abs(dataset[other])) + 10 * drift
    normalized = main / gap.where(usable)
    usable |= gap.isnull()  # not measured yet
    normalized = normalized.transpose(*main.dims)
    close = sorted(
        {int(p) for p in dataset["pair"].values[~usable.all([d for d in usable.dims if d != "pair"]).values]}
    )
    dataset = dataset.assign(normalized=normalized)
    dataset["normalized"].attrs.update(units=f"fraction of the clean − {other} difference", over=other)
    dataset.attrs["pairs_too_close"] = json.dumps(close)
    return dataset


def provenance(model: Model, encoded: EncodedPairs, plan: Plan, measured: Measured) -> dict[str, Any]:
    """What a result rests on, as plain numbers and text."""
    return {
        **origin(model, encoded, measured.ran, plan.model, plan.remote),
        "plan": plan.explain(),
        "checks": plan.measured.get("checks", "not run: the result is partial"),
        "metrics": json.dumps({m.name: m.told for m in plan.metrics}),
        "noise_floor": json.dumps(
            {".".join(filter(None, c)): float(n) for c, n in zip(measured.columns, measured.noise, strict=True)}
        ),
        **({"references": json.dumps(_references(plan))} if plan.references else {}),
        "seconds": round(measured.seconds, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _references(plan: Plan) -> dict[WorldName, dict[str, Any]]:
    """What the reference worlds are made of: how many prompts, their tokens by hash, and the first one's."""
    return {
        world.name: {
            "prompts": len(world.ids),
            "hash": hashlib.sha256(repr((world.ids, world.encoder, world.row_of)).encode()).hexdigest()[:16],
            "first": list(world.ids[0]),
        }
        for world in plan.references
    }


def origin(
    model: Model, encoded: EncodedPairs, ran: Mapping[str, str], name: str = "", remote: str = ""
) -> dict[str, Any]:
    """The model, the pairs and the versions that a result comes from."""
    return {
        "tracepatch_format": FORMAT,
        "model": name or name_of(model),
        "source": source_of(model),
        **({"server": json.dumps({"host": remote, **ran})} if ran else {}),
        "fingerprint": fingerprint(model),
        "pairs": encoded.name,
        "bos": str(encoded.bos),
        "align": encoded.align,
        "seed": "none" if encoded.seed is None else encoded.seed,
        "versions": json.dumps(versions()),
    }
