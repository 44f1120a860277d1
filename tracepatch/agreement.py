"""The cells of an audited dataset one beside the other, and how far estimates and exact effects agree there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from tracepatch.errors import ResultError, plural
from tracepatch.sampling import Floats

NOT, TOP, SAMPLED, PROVED = range(4)
AUDITED = {"not": NOT, "top": TOP, "sample": SAMPLED, "proved": PROVED}
"""What ``audited`` says of a cell: not patched, patched for its estimate, or as one of the sample; 0 by proof."""
MATTERS = 0.1  # of the largest effect that was patched: smaller ones are not called missed
MISSED = 0.25  # an estimate below this part of the effect misses it
BIG, SATURATED = 0.5, 0.9  # beyond which patches and softmaxes are called so
SHORT = {"layer": "L", "head": "H", "kv_head": "KV", "neuron": "N", "expert": "E"}


@dataclass(frozen=True)
class Compared:
    """A cell whose estimate stands beside its exact effect."""

    name: str
    estimate: float
    effect: float
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" ({', '.join(self.doubts)})" if self.doubts else ""
        return f"{self.name}: estimated {short(self.estimate)}, exact {short(self.effect)}{why}"


@dataclass(frozen=True)
class View:
    """Cells of an audited dataset, one after the other, means over pairs.

    Attributes:
        names: Makes the name of a cell from its number.
        estimate: NaN where there is no such cell.
        effect: NaN where it was not patched.
        audited: One of ``AUDITED``.
        stands: For how many cells a patched one stands.
        signed: Whether estimates have signs.
        unit: Of both.
        doubts: The variables that say how doubtful a cell is, as far as there are any.
    """

    dataset: xr.Dataset
    dims: tuple[str, ...]
    estimate: Floats
    effect: Floats
    audited: NDArray[np.int8]
    stands: Floats
    signed: bool
    unit: str
    doubts: Mapping[str, Floats]

    @classmethod
    def of(cls, audited: xr.Dataset) -> View:
        """The cells of a dataset."""
        signed = bool(audited.attrs.get("signed", 1))
        dims = cell_dims(audited)
        doubts = {}
        for name in ("patch_size", "saturation", "layers_above"):
            if name in audited:
                found = audited[name].mean("pair") if "pair" in audited[name].dims else audited[name]
                doubts[name] = found.transpose(*dims).values.ravel()
        return cls(
            audited,
            dims,
            means(audited, "estimate", signed).ravel(),
            means(audited, "effect", signed).ravel(),
            audited["audited"].transpose(*dims).values.ravel(),
            audited["stands_for"].transpose(*dims).values.ravel(),
            signed,
            unit_of(audited),
            doubts,
        )

    def count(self, name: str, cells: NDArray[np.bool_], limit: float) -> tuple[int, int]:
        """How many of some cells are beyond a limit, and of how many that is known."""
        if name not in self.doubts:
            return 0, 0
        values = self.doubts[name][cells]
        return int((values > limit).sum()), int(np.isfinite(values).sum())

    def compared(self, number: int) -> Compared:
        """A cell by name, with what makes it doubtful."""
        told, found = [], {name: float(values[number]) for name, values in self.doubts.items()}
        if found.get("patch_size", 0) > BIG:
            told.append(f"the patch is {found['patch_size']:.1f} of what stands there")
        if found.get("saturation", 0) > SATURATED:
            told.append(f"its softmax gives {found['saturation']:.2f} to one key")
        if found.get("layers_above", 0) >= 1:
            told.append(f"{plural(int(found['layers_above']), 'layer')} below what is measured")
        name = named(self.dataset, self.dims, number)
        return Compared(name, float(self.estimate[number]), float(self.effect[number]), tuple(told))


def cell_dims(dataset: xr.Dataset) -> tuple[str, ...]:
    """The dims of a dataset's cells: all but those of pairs."""
    main = "estimate" if "estimate" in dataset else "effect"
    return tuple(str(dim) for dim in dataset[main].dims if dim != "pair")


def means(dataset: xr.Dataset, variable: str, signed: bool = True) -> Floats:
    """Means over pairs, ``[*cells]``: in shares of clean − corrupted, as a ratio of means, where that is known.

    Args:
        dataset: With the variable.
        variable: ``estimate`` or ``effect``.
        signed: ``False`` takes the mean of magnitudes.
    """
    dims = cell_dims(dataset)
    values = dataset[variable].transpose("pair", *dims)
    present = values.notnull()
    total = (values if signed else abs(values)).mean("pair")
    if "normalized" in dataset:
        gap = dataset["clean"] - dataset[dataset["normalized"].attrs.get("over", "corrupted")]
        whole = gap.where(present).mean("pair")
        total = total / (whole if signed else abs(whole))
    return np.asarray(total.transpose(*dims).values, dtype=np.float64)


def unit_of(dataset: xr.Dataset) -> str:
    """The unit of ``means``."""
    if "normalized" in dataset:
        return f"of clean − {dataset['normalized'].attrs.get('over', 'corrupted')}"
    main = "estimate" if "estimate" in dataset else "effect"
    return str(dataset[main].attrs.get("units", ""))


def named(dataset: xr.Dataset, dims: Sequence[str], number: int) -> str:
    """The name of a cell: ``L0H1``, ``mlp_out L3 pos 5 (Mary)``, ``L0H1 dest 9 src 4``, or its labels."""
    sizes = [dataset.sizes[dim] for dim in dims]
    at = dict(zip(dims, (int(i) for i in np.unravel_index(number, sizes)), strict=True))
    labels = {dim: dataset[dim].values[i].item() for dim, i in at.items()}
    if "row" in labels and dataset["row"].dims == ("row",):
        own = [n for n, c in dataset.coords.items() if c.dims == ("row",) and n != "row"]
        labels = {str(name): dataset[name].values[at["row"]].item() for name in own}
    elif "component" in dataset.coords and "component" not in labels:
        labels = {"component": str(dataset["component"].item()), **labels}
    front = [str(labels.pop(dim)) for dim in ("component", "name") if dim in labels]
    short = "".join(f"{letters}{labels.pop(dim)}" for dim, letters in SHORT.items() if dim in labels)
    rest = []
    for dim, label in labels.items():
        token = dataset.coords.get("token")
        words = ""
        if dim == "pos" and token is not None and token.dims == ("pos",) and dim in at:
            words = f" ({str(token.values[at[dim]]).strip()})"
        rest.append(f"{dim} {label}{words}")
    return " ".join(filter(None, [*front, short, *rest]))


def ranks(values: Floats, weights: Floats | None = None) -> Floats:
    """The rank of each value, ties in the middle; with weights, as if each stood there so often."""
    if weights is None:
        return np.asarray(pd.Series(values).rank(), dtype=np.float64)
    _, which = np.unique(values, return_inverse=True)
    of_value = np.bincount(which, weights)
    return np.asarray((np.cumsum(of_value) - of_value / 2)[which])


def correlation(x: Floats, y: Floats, weights: Floats | None = None) -> float:
    """Pearson's correlation; NaN where one of the two does not vary, or there are fewer than three."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    w = np.ones(len(x)) if weights is None else weights
    x, y = (v - np.average(v, weights=w) for v in (x, y))
    return float((w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum()))


def ordered(estimates: Floats) -> NDArray[np.intp]:
    """Cells by the magnitude of their estimates, the largest first, those without one left out."""
    order = np.argsort(-np.nan_to_num(abs(estimates)), kind="stable")
    return order[~np.isnan(estimates[order])]


def flips(view: View, cells: NDArray[np.bool_]) -> tuple[int, int] | None:
    """How many of some cells have another sign than their estimate, and how many there are."""
    if not view.signed:
        return None
    return int((view.estimate * view.effect < 0)[cells].sum()), int(cells.sum())


def recall(view: View, beyond: NDArray[np.bool_]) -> tuple[tuple[int, float], ...]:
    """After how many patches in the order of the estimates each share of the large effects is found."""
    may = np.where(view.audited == PROVED, np.nan, view.estimate)
    place = np.zeros(len(may), np.intp)
    order = ordered(may)
    place[order] = np.arange(1, len(order) + 1)
    found = np.flatnonzero(beyond)
    found = found[np.argsort(place[found])]
    shares = np.cumsum(view.stands[found]) / max(view.stands[found].sum(), 1e-300)
    return tuple(zip(place[found].tolist(), shares.tolist(), strict=True))


def missed(view: View, patched: NDArray[np.bool_]) -> tuple[Compared, ...]:
    """The patched cells whose estimates fall short of their effects the most."""
    effect, estimate = (np.where(patched, abs(v), 0.0) for v in (view.effect, view.estimate))
    short_of = (effect >= MATTERS * effect.max(initial=0)) & (estimate < MISSED * effect)
    chosen = [n for n in np.argsort(estimate - effect, kind="stable") if short_of[n]]
    return tuple(view.compared(int(n)) for n in chosen)


def inflated(view: View, patched: NDArray[np.bool_]) -> tuple[Compared, ...]:
    """The patched cells whose estimates exceed their effects the most."""
    effect, estimate = (np.where(patched, abs(v), 0.0) for v in (view.effect, view.estimate))
    above = (estimate >= MATTERS * effect.max(initial=0)) & (effect < MISSED * estimate)
    chosen = [n for n in np.argsort(effect - estimate, kind="stable") if above[n]]
    return tuple(view.compared(int(n)) for n in chosen)


def require_confidence(confidence: Any) -> float:
    """A probability between 0 and 1.

    Raises:
        ResultError: It is none.
    """
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ResultError(f"confidence is a probability between 0 and 1, such as 0.95, not {confidence!r}.")
    return float(confidence)


def require_threshold(threshold: Any) -> float:
    """An effect's magnitude.

    Raises:
        ResultError: It is none.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not threshold > 0:
        raise ResultError(f"threshold is the size of an effect, a positive number, not {threshold!r}.")
    return float(threshold)


def short(value: float) -> str:
    """An effect with three decimals, or its order of magnitude."""
    return f"{value:.3f}".replace("-", "−") if abs(value) >= 0.0005 or value == 0 else f"{value:.1g}".replace("-", "−")


def rounded(value: float) -> str:
    """A correlation with two decimals."""
    return "undefined" if np.isnan(value) else f"{value:.2f}".replace("-", "−")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
