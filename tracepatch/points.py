"""Results against each other, site by site: the points of a picture, and the axes that they stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tracepatch.canvas import SMALL
from tracepatch.combining import MAIN, by_site, labels_at, main_variable
from tracepatch.errors import ResultError
from tracepatch.marks import site_words, tokens_of
from tracepatch.panels import named, told
from tracepatch.plan import Status

DASHES: dict[str, Any] = {"color": "#707070", "linewidth": 0.8, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Axis:
    """One of the two results: its numbers, which of them were measured, its unit and what is said of it."""

    data: xr.DataArray
    measured: xr.DataArray
    unit: str
    words: list[str]

    @classmethod
    def of(cls, given: xr.Dataset | xr.DataArray, variable: str | None) -> Axis:
        """An array as it is, or a variable of a result; its main one if ``None``."""
        if isinstance(given, xr.DataArray):
            unit, name = str(given.attrs.get("units", "")), str(given.attrs.get("long_name", given.name or ""))
            return cls(given, given.notnull(), unit, [name, *([f"[{unit}]"] if unit else [])])
        main = main_variable(given)
        name = main if variable in (None, *MAIN) else named(given, variable)
        data = given[name]
        known = given["status"].isin([Status.MEASURED, Status.ESTIMATED]) if "status" in given else data.notnull()
        lines = told(given, name)
        return cls(data, known.broadcast_like(data), str(data.attrs.get("units", "")), lines)


@dataclass(frozen=True)
class Points:
    """The cells that two results share, one after the other."""

    both: NDArray[np.float64]  # [point, 2]
    measured: NDArray[np.bool_]
    coords: xr.DataArray
    axes: tuple[Axis, Axis]
    alone: int

    @property
    def same(self) -> bool:
        """Whether the axes have one unit."""
        return self.axes[0].unit == self.axes[1].unit

    def names(self, chosen: list[int]) -> list[tuple[float, float, str]]:
        """x, y and the site of some of them."""
        dims, shape = [str(dim) for dim in self.coords.dims], self.coords.shape
        tokens, found = tokens_of(self.coords), []
        for i in chosen:
            at = dict(zip(dims, map(int, np.unravel_index(self.kept[i], shape)), strict=True))
            found.append((*self.both[i].tolist(), site_words(labels_at(self.coords, at), tokens)))
        return found

    @property
    def kept(self) -> NDArray[np.intp]:
        """The number of each among the cells of ``coords``, which has NaN elsewhere."""
        return np.flatnonzero(self.coords.notnull().values)

    @classmethod
    def of(cls, x: Axis, y: Axis) -> Points:
        """The cells in which both have a number, matched by their labels.

        Raises:
            ResultError: There are none, or the dims differ.
        """
        if set(x.data.dims) != set(y.data.dims):
            told = [
                f"{name} has {', '.join(map(str, axis.data.dims)) or 'none'}" for name, axis in (("x", x), ("y", y))
            ]
            raise ResultError(f"Both need the same dims to be matched: {'; '.join(told)}.")
        if "metric" in x.data.dims:
            pick = x.data["metric"].values.tolist()[0]
            raise ResultError(
                f"The results have several metrics: select one of each, as in effects.sel(metric={pick!r})."
            )
        matched = (by_site(array) for array in (x.data, y.data, x.measured, y.measured))
        a, b, m, n = xr.align(*matched, join="inner")
        b, m, n = (array.transpose(*a.dims) for array in (b, m, n))
        there = np.isfinite(a.values) & np.isfinite(b.values)
        if not there.any():
            raise ResultError(
                "The two results have no site with a number in both: their labels, or where they have numbers, differ."
            )
        both = np.stack([a.values[there], b.values[there]], 1).astype(float)
        alone = int(x.data.notnull().sum() + y.data.notnull().sum()) - 2 * len(both)
        return cls(both, (m.values & n.values)[there], a.where(there), (x, y), alone)


def limits(ax: Axes, points: NDArray[np.float64], same: bool) -> None:
    """Room around points and 0; the same on both axes, or on each its own."""
    low, high = np.minimum(points.min(0), 0), np.maximum(points.max(0), 0)
    if same:
        low, high = np.full(2, low.min()), np.full(2, high.max())
        ax.set_aspect("equal", adjustable="box")
    room = 0.1 * np.where(high > low, high - low, 1.0)
    ax.set_xlim(low[0] - room[0], high[0] + room[0])
    ax.set_ylim(low[1] - room[1], high[1] + room[1])
    ax.axhline(0, color="#d8d8d8", linewidth=0.6, zorder=0)
    ax.axvline(0, color="#d8d8d8", linewidth=0.6, zorder=0)
    ax.tick_params(labelsize=SMALL, width=0.5, length=2)
    ax.spines[:].set_linewidth(0.5)
