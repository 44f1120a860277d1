"""What a figure will show, as values: datasets to panels of numbers, masks, labels and words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.combining import over_pairs, require_dataset
from tracepatch.errors import ResultError
from tracepatch.plan import Status

PLACES = ("pos", "dest", "src")  # dims along the prompt
PANELS = ("component", "model", "metric")
ACROSS = (
    "pos",
    "head",
    "kv_head",
    "neuron",
    "",
    "name",
    "layer",
    "component",
    "model",
)  # which is taken first; "" is any other
DOWN = ("layer", "name", "", "neuron", "kv_head", "head", "pos", "component", "model")


class Label(NamedTuple):
    """A tick label, and what its type face says of it."""

    text: str
    differs: bool = False  # the clean and the corrupted token do
    varies: bool = False  # the pairs' tokens do


@dataclass(frozen=True)
class Panel:
    """What one panel shows: values and the masks of its textures, [down, across] or [down], and a label for each."""

    title: str
    values: NDArray[np.float64]
    masks: dict[str, NDArray[np.bool_]]
    labels: list[list[Label]]
    pairs: xr.DataArray
    gap: float


@dataclass(frozen=True)
class View:
    """A whole figure: the variable, the dims of a panel (down, across), the panels, and what is said around them."""

    name: str
    dims: list[str]
    columns: str | None
    words: list[bool]  # whether a dim's labels are words, which are read from the top and never left out
    mean: xr.Dataset
    panels: list[Panel]
    title: str
    legend: dict[str, str]


def arrange(
    effects: xr.Dataset, variable: str | None, axes: dict[str, str | None], columns: str | None, pair: int | None
) -> View:
    """What to show, with its dims settled; ``axes`` are those of a panel, y before x, with what the caller chose."""
    require_dataset(effects)
    single = mean = effects
    known = effects["pair"].values.tolist() if "pair" in effects["effect"].dims else []
    if pair is not None and pair not in known:
        raise ResultError(f"There is no pair {pair!r}; there are {', '.join(map(str, known)) or 'none: one mean'}.")
    if pair is not None:
        single = mean = effects.sel(pair=pair)
    elif known and "pair" not in (*axes.values(), columns):
        mean = over_pairs(effects)
    name = variable or ("normalized" if "normalized" in mean else "effect")
    if name not in mean or name == "status":
        offered = ", ".join(str(v) for v in mean.data_vars if v != "status")
        raise ResultError(f"There is no variable {name!r} to plot; there are {offered}.")
    chosen, columns, lone = _settle(mean[name], axes, columns)
    single, mean = single.isel(lone, missing_dims="ignore"), mean.isel(lone, missing_dims="ignore")
    data, coords, panels = mean[name], mean[name].coords, []
    fitting = "status" in mean and set(mean["status"].dims) <= set(data.dims)
    status = mean["status"] if fitting else xr.full_like(data, Status.MEASURED)
    for number in range(data.sizes[columns] if columns else 1):
        here = {columns: number} if columns else {}
        part, one = mean.isel(here, missing_dims="ignore"), single.isel(here, missing_dims="ignore")
        values = part[name].transpose(*chosen)
        absent = values.isnull().values  # never drawn as a zero, even one that was proved
        own = status.isel(here, missing_dims="ignore").broadcast_like(values).transpose(*chosen).values
        entry = coords[columns].values[number] if columns else ""
        text = str(entry) if isinstance(entry, str) else f"{columns} {entry}"
        both = {"clean", "corrupted"} <= set(part.data_vars)
        gap = float(np.nan_to_num(abs(part["clean"] - part["corrupted"]).min())) if both else 0.0
        pending = absent & (own == Status.PENDING)
        absent &= ~pending
        masks = {"proved": (own == Status.PROVED_ZERO) & ~absent & ~pending, "pending": pending, "absent": absent}
        panels.append(Panel(text, values.values, masks, [_labels(one, dim) for dim in chosen], one[name], gap))
    model = "" if columns == "model" else str(coords["model"].item() if "model" in coords else mean.attrs["model"])
    what = str(mean.attrs.get("component", "")) if "component" not in coords else ""
    facts = [model, what, str(mean.attrs.get("pairs", ""))]
    for dim in ("component", "name", "layer", "pos", "head", "neuron", "pair"):  # what was selected beforehand
        if dim in coords and not coords[dim].dims:
            facts.append(f"{dim} {coords[dim].item()}".removeprefix("component ").removeprefix("name "))
    averaged = len(known) if known and pair is None else int(mean.attrs.get("averaged_pairs", 0))
    if averaged > 1 and "pair" not in data.dims:
        facts.append(f"mean over {averaged} pairs")
    undefined = bool((data.isnull() & ~status.isin([Status.ABSENT, Status.PENDING])).any())
    names = {"proved": "no effect (proved)", "pending": "not measured yet"}
    names["absent"] = "absent or undefined" if undefined else "absent"
    legend = {key: text for key, text in names.items() if any(p.masks[key].any() for p in panels)}
    words = [dim in (*PLACES, "row") or data[dim].dtype.kind in "OUT" for dim in chosen]
    return View(name, chosen, columns, words, mean, panels, " · ".join(filter(None, facts)), legend)


def _settle(
    data: xr.DataArray, axes: dict[str, str | None], columns: str | None
) -> tuple[list[str], str | None, dict[str, int]]:
    """The dims of the axes, the dim of the panels if any, and the dims of a single entry that neither needs."""
    dims = {str(dim): size for dim, size in data.sizes.items()}
    what = f"{data.name!r} has the dims {', '.join(f'{dim} ({size})' for dim, size in dims.items()) or '(none)'}"
    wanted = [dim for dim in (*axes.values(), columns) if dim is not None]
    if set(wanted) - set(dims) or len(set(wanted)) < len(wanted):
        raise ResultError(f"{what}: {', '.join(axes)} and columns are different ones of them, not {', '.join(wanted)}.")
    free, chosen = [dim for dim in dims if dim not in wanted and dim != "metric"], list[str]()
    for axis, given in axes.items():
        order = ACROSS if axis == "x" else DOWN
        free.sort(key=lambda dim, order=order: order.index(dim if dim in order else ""))  # type: ignore[misc]  # a default's type is not inferred
        chosen.append(given or (free.pop(0) if free else ""))
    if "" in chosen:
        advice = "tp.plots.bars shows a single one" if len(axes) == 2 and dims else "choose a variable with more"
        raise ResultError(f"{what}, too few: {advice}.")
    rest = [dim for dim in dims if dim not in (*chosen, columns)]
    columns = columns or next((dim for dim in PANELS if dim in rest and dims[dim] > 1), None)
    left = [dim for dim in rest if dims[dim] > 1 and dim != columns]
    if left:
        pick = ", ".join(f"{dim}={data[dim].values.tolist()[0]!r}" for dim in left)
        other = f", or give one panels, as in columns={left[0]!r}" if columns is None else ""
        other += "; tp.plots.heatmap shows two" if len(axes) == 1 else ""
        raise ResultError(f"{what}, too many: select of {', '.join(left)}, as in effects.sel({pick}){other}.")
    return chosen, columns, {dim: 0 for dim in rest if dim != columns}


def scale_words(view: View, title: str) -> list[str]:
    """What the numbers are, in lines: variable and metric, unit, direction."""
    data, attrs = view.mean[view.name], view.mean.attrs
    names, units = list(json.loads(attrs.get("metrics", "{}"))), data.attrs.get("units", "").split(", ")
    metric = title if view.columns == "metric" and view.name != "normalized" else ""
    if "metric" in view.mean.coords and not view.mean["metric"].dims:
        metric = str(view.mean["metric"].item())
    unit = dict(zip(names, units, strict=False)).get(metric, "") if len(names) == len(units) else ""
    unit = units[0] if len(units) == 1 else unit  # a unit that metrics share, or that of a fraction
    kind, _, part = view.name.partition("_")
    texts = {"normalized": "normalized effect on", "effect": f"effect on the {part} part of" if part else "effect on"}
    text = f"{texts.get(kind, view.name + ':')} {metric}" if metric else texts.get(kind, view.name).removesuffix(" on")
    base, written = attrs.get("base", ""), attrs.get("written", "")
    ways = {("corrupted", "clean"): "denoising: clean", ("clean", "corrupted"): "noising: corrupted"}
    number = written.replace(".", "").replace("-", "").isdigit()
    way = ways.get((base, written), f"{written} written" if number else "patched")
    return [text, *([f"[{unit}]"] if unit else []), *([f"{way} into the {base} run"] if base else [])]


def _labels(data: xr.Dataset, dim: str) -> list[Label]:
    """A label for each entry of a dim: for positions the tokens, for the rows of a sparse result what names them."""
    prefix = "" if dim == "pos" else f"{dim}_"
    if dim in PLACES and f"{prefix}token" in data.coords:
        names = (f"{prefix}token", f"{prefix}corrupted_token")
        arrays = [data[side] for side in names if side in data.coords]
        sides = [array.transpose(..., dim).values.reshape(-1, data.sizes[dim]).T for array in arrays]
        found = []
        for position, clean, corrupted in zip(data[dim].values, sides[0], sides[-1], strict=True):
            differs, varies = bool((clean != corrupted).any()), len({*clean}) > 1 or len({*corrupted}) > 1
            if differs and not (clean != corrupted).all():  # no token stands for what all pairs have there
                found.append(Label(f"{position}…", varies=True))
                continue
            other = "→" + _token(corrupted[0]) * bool(clean[0] != corrupted[0]) if differs else ""
            found.append(Label(_token(clean[0]) + other + "…" * varies, differs, varies))
        return found
    if dim == "row":
        parts = [data[c] for c in data.coords if c != dim and data[c].dims == (dim,)]
        rows = zip(*([f"{part.name} {v}" for v in part.values] for part in parts), strict=True)
        return [Label(" ".join(row)) for row in rows]
    return [Label(f"{v:g}" if isinstance(v, float) else str(v)) for v in data[dim].values.tolist()]


def _token(text: str) -> str:
    bare = text.strip() or text.translate({32: "␣", 9: "⇥", 10: "⏎", 13: "⏎"})
    return bare if len(bare) <= 16 else f"{bare[:12]}⋯{bare[-3:]}"
