"""What a figure will show, as values: datasets to panels of numbers, masks, labels and words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.combining import main_variable, over_pairs
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
BROUGHT = "pattern × gradient"  # the estimator of what is there, not of a patch
INTERVALS = {
    "normalized": ("normalized_low", "normalized_high"),
    "effect": ("low", "high"),
    "estimate": ("low", "high"),
}
DOWN = ("layer", "name", "", "neuron", "kv_head", "head", "pos", "component", "model")


class Label(NamedTuple):
    """A tick label, and what its type face says of it."""

    text: str
    differs: bool = False  # the clean and the corrupted token do
    varies: bool = False  # the pairs' tokens do


@dataclass(frozen=True)
class Panel:
    """What one panel shows, [down, across] or [down], and a label for each entry of its dims.

    Attributes:
        title: The entry of the dim that has panels.
        values: The numbers; NaN where there is none.
        masks: Where the textures are; beside theirs, ``"blank"``: where nothing can be.
        labels: Per dim.
        pairs: The same before it was averaged.
        gap: The smallest clean − corrupted difference, or 0 where it is not known.
        ends: The ends of the values' intervals, [low or high, down, across] or [low or high, down]; ``None`` if the
            result has none.
    """

    title: str
    values: NDArray[np.float64]
    masks: dict[str, NDArray[np.bool_]]
    labels: list[list[Label]]
    pairs: xr.DataArray
    gap: float
    ends: NDArray[np.float64] | None = None

    @property
    def unsure(self) -> NDArray[np.bool_]:
        """Measured values whose interval includes 0."""
        if self.ends is None:
            return np.zeros(self.values.shape, bool)
        measured = ~np.any(list(self.masks.values()), 0)
        return np.asarray(measured & (self.ends[0] <= 0) & (self.ends[1] >= 0))


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
    main = main_variable(effects)
    single = mean = effects
    known = effects["pair"].values.tolist() if "pair" in effects[main].dims else []
    if pair is not None and pair not in known:
        raise ResultError(f"There is no pair {pair!r}; there are {', '.join(map(str, known)) or 'none: one mean'}.")
    if pair is not None:
        single = mean = effects.sel(pair=pair)
    elif known and "pair" not in (*axes.values(), columns):
        mean = over_pairs(effects)
    name = named(mean, variable)
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
        blank = absent & ~pending & _impossible(part, chosen)
        absent &= ~pending & ~blank
        proved = (own == Status.PROVED_ZERO) & ~absent & ~pending
        masks = {"proved": proved, "pending": pending, "absent": absent, "blank": blank}
        ends = [part[end].transpose(*chosen).values for end in INTERVALS.get(name, ()) if end in part]
        labels = [_labels(one, dim) for dim in chosen]
        panels.append(
            Panel(text, values.values, masks, labels, one[name], gap, np.array(ends) if len(ends) == 2 else None)
        )
    undefined = bool((data.isnull() & ~status.isin([Status.ABSENT, Status.PENDING])).any())
    names = {"proved": "no effect (proved)", "pending": "not measured yet"}
    names["absent"] = "absent or undefined" if undefined else "absent"
    legend = {key: text for key, text in names.items() if any(p.masks[key].any() for p in panels)}
    words = [dim in (*PLACES, "row") or data[dim].dtype.kind in "OUT" for dim in chosen]
    return View(name, chosen, columns, words, mean, panels, title_of(mean), legend)


def title_of(result: xr.Dataset) -> str:
    """What a result is of: model, component, pairs, what was selected beforehand, how many pairs it averages."""
    coords, main = result.coords, result[main_variable(result)]
    model = coords["model"] if "model" in coords else result.attrs.get("model", "")
    what = str(result.attrs.get("component", "")) if "component" not in coords else ""
    facts = ["" if "model" in main.dims else str(np.asarray(model)), what, str(result.attrs.get("pairs", ""))]
    for dim in ("component", "name", "layer", "pos", "head", "neuron", "pair"):
        if dim in coords and not coords[dim].dims:
            facts.append(f"{dim} {coords[dim].item()}".removeprefix("component ").removeprefix("name "))
    averaged = int(result.attrs.get("averaged_pairs", 0))
    if averaged > 1 and "pair" not in main.dims:
        facts.append(f"mean over {averaged} pairs")
    return " · ".join(filter(None, facts))


def named(result: xr.Dataset, variable: str | None) -> str:
    """The variable to show: the one asked for, or ``normalized`` where there is one, else what the result is about."""
    name = variable or ("normalized" if "normalized" in result else main_variable(result))
    if name not in result or name == "status":
        offered = ", ".join(str(v) for v in result.data_vars if v != "status")
        raise ResultError(f"There is no variable {name!r} to plot; there are {offered}.")
    return name


def _impossible(part: xr.Dataset, dims: list[str]) -> NDArray[np.bool_]:
    """Where no cell can be, [down, across] or [down]: attention to a later token, or what a picture leaves blank."""
    found = part["blank"] if "blank" in part.coords else xr.DataArray(False)
    if {"dest", "src"} <= set(dims):
        found = found | (part["src"] > part["dest"])
    shape = xr.DataArray(np.zeros([part.sizes[dim] for dim in dims], bool), dims=dims)
    return np.asarray((found | shape).transpose(*dims).values)


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
    """What the numbers of a panel are, in lines: variable and metric, unit, direction."""
    return told(view.mean, view.name, title if view.columns == "metric" and view.name != "normalized" else "")


def told(result: xr.Dataset, name: str, metric: str = "") -> list[str]:
    """What the numbers of a variable are, in lines: variable and metric, unit, direction."""
    data, attrs = result[name], result.attrs
    names, units = list(json.loads(attrs.get("metrics", "{}"))), data.attrs.get("units", "").split(", ")
    if "metric" in result.coords and not result["metric"].dims:
        metric = str(result["metric"].item())
    unit = dict(zip(names, units, strict=False)).get(metric, "") if len(names) == len(units) else ""
    unit = units[0] if len(units) == 1 else unit  # a unit that metrics share, or that of a fraction
    kind, _, part = name.partition("_")
    exact = "effect" in result and part != "estimate" and kind != "estimate"
    how = "" if exact else str(attrs.get("estimator", ""))
    estimated, part = "" if exact else f"{how} estimate of the ".lstrip(), part.removesuffix("estimate")
    of = f"the {part} part of" if part else ""
    texts = {"normalized": f"{estimated}normalized effect on", "effect": f"effect on {of}".rstrip()}
    texts["estimate"] = f"{estimated}effect on {of}".rstrip()
    if how == BROUGHT:  # minus the effect of writing zero, so that no direction can be said
        texts |= dict.fromkeys(("estimate", "normalized"), f"{how}: what a weight brings to")
    text = f"{texts.get(kind, name + ':')} {metric}" if metric else texts.get(kind, name).removesuffix(" on")
    base, written = attrs.get("base", ""), attrs.get("written", "")
    ways = {("corrupted", "clean"): "denoising: clean", ("clean", "corrupted"): "noising: corrupted"}
    number = written.replace(".", "").replace("-", "").isdigit()
    way = ways.get((base, written), f"{written} written" if number else "patched")
    way = "in" if how == BROUGHT else f"{way} into"
    return [text, *([f"[{unit}]"] if unit else []), *([f"{way} the {base} run"] if base else [])]


def _labels(data: xr.Dataset, dim: str) -> list[Label]:
    """A label for each entry of a dim: for positions the tokens, for the rows of a sparse result what names them."""
    prefix = "" if dim == "pos" else f"{dim}_"
    if dim in PLACES and f"{prefix}token" in data.coords:
        names = (f"{prefix}token", f"{prefix}corrupted_token")
        arrays = [data[side] for side in names if side in data.coords]
        sides = [array.transpose(..., dim).values.reshape(-1, data.sizes[dim]).T for array in arrays]
        found, averaged = [], data.attrs.get("averaged_pairs", 1) > 1
        for position, *both in zip(data[dim].values, sides[0].tolist(), sides[-1].tolist(), strict=True):
            clean, corrupted = both
            differs, varies = clean != corrupted, any(len(set(side)) > 1 for side in both)
            if averaged and any(side[0].endswith("…") for side in both):  # over_pairs has marked them
                varies, clean, corrupted = True, *([side[0].removesuffix("…")] for side in both)
            # No token stands for what all pairs have there.
            if differs and any(a == b for a, b in zip(clean, corrupted, strict=True)):
                found.append(Label(f"{position}…", varies=True))
                continue
            other = "→" + readable(corrupted[0]) * bool(clean[0] != corrupted[0]) if differs else ""
            found.append(Label(readable(clean[0]) + other + "…" * varies, differs, varies))
        return found
    if dim == "row":
        parts = [data[c] for c in data.coords if c != dim and data[c].dims == (dim,)]
        rows = zip(*([f"{part.name} {v}" for v in part.values] for part in parts), strict=True)
        return [Label(" ".join(row)) for row in rows]
    return [Label(f"{v:g}" if isinstance(v, float) else str(v)) for v in data[dim].values.tolist()]


def readable(text: str) -> str:
    """A token as a label: without white space around it, which is shown where there is nothing else."""
    bare = text.strip() or text.translate({32: "␣", 9: "⇥", 10: "⏎", 13: "⏎"})
    return bare if len(bare) <= 16 else f"{bare[:12]}⋯{bare[-3:]}"
