"""From coarse to fine: exact patches of layers, then of what is inside those that matter: ``tp.drill``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.agreement import means, named, require_threshold, short, unit_of
from tracepatch.cells import Cells, Direction, base_of, kinds_of
from tracepatch.errors import RecipeError, plural
from tracepatch.metrics import Metrics, as_metrics, logit_diff
from tracepatch.models import Model
from tracepatch.plan import Status
from tracepatch.prompts import Pairs, require_pairs
from tracepatch.recipe import Patching
from tracepatch.results import normalize, pair_coords, placed, site_coords
from tracepatch.sampling import Floats

THRESHOLD = 0.1  # of clean − corrupted
SHOWN = 5  # cells of a level that are named


@dataclass(frozen=True)
class Level:
    """One level of a drill.

    Attributes:
        dims: The dims that tell its cells apart.
        dataset: The exact effects of those that were patched.
        cells: How many there are.
        known: Which of them were patched, or are without effect by proof, ``[*dims]``.
        split: Which of them were split further.
        forwards: Patched forwards that were run.
    """

    dims: tuple[str, ...]
    dataset: xr.Dataset
    cells: int
    known: NDArray[np.bool_]
    split: NDArray[np.bool_]
    forwards: int

    @property
    def effects(self) -> Floats:
        """Means over pairs, ``[*dims]``."""
        return means(self.dataset, "effect")

    @property
    def inside(self) -> set[tuple[Any, ...]]:
        """The labels of what was split."""
        axes = [self.dataset[dim].values.tolist() for dim in self.dims]
        return {tuple(axis[i] for axis, i in zip(axes, at, strict=True)) for at in np.argwhere(self.split).tolist()}

    def told(self, finer: Level | None) -> str:
        """The level in words.

        Args:
            finer: The next one, if there is one.
        """
        effects, flat = self.effects, abs(np.nan_to_num(self.effects)).ravel()
        order = np.argsort(-flat, kind="stable")
        words = [f"{int(self.known.sum()):,} of {self.cells:,} patched"]
        parts = None if finer is None else np.nansum(finer.effects, axis=tuple(range(len(self.dims), len(finer.dims))))
        groups = {"split": self.split, "not split" if finer is not None else "largest": self.known & ~self.split}
        for title, mask in groups.items():
            chosen = [int(n) for n in order if mask.ravel()[n]]
            named_ones = []
            for n in chosen[: SHOWN if title != "not split" else 1]:
                also = (
                    f" (its parts add up to {short(parts.ravel()[n])})"
                    if title == "split" and parts is not None
                    else ""
                )
                named_ones.append(f"{named(self.dataset, self.dims, n)} {short(effects.ravel()[n])}{also}")
            more = f" and {len(chosen) - len(named_ones):,} more" if len(chosen) > len(named_ones) else ""
            if chosen:
                count = f"{len(chosen):,} " if title != "largest" else ""
                words.append(f"{count}{title}: {', '.join(named_ones)}{more}")
        return "; ".join(words)


def drill(
    model: Model,
    pairs: Pairs,
    components: str | Sequence[str],
    metric: Metrics = logit_diff,
    *,
    levels: Sequence[str | Sequence[str]] | None = None,
    threshold: float | None = None,
    top: int | None = None,
    direction: Direction = "denoising",
    source: Any = None,
    only: dict[str, Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> xr.DataTree:
    """Patches a component layer by layer, then splits only what matters: into heads, positions or neurons.

    Every number is an exact patch. What is not split is not looked into, and something may hide there: effects inside a
    coarse cell that cancel each other (two heads that pull in opposite directions), or that are there only one at a
    time, since a patch of the whole is not the sum of the patches of its parts. ``tp.attribute`` sees all parts, but
    not exactly; a sweep, ``tp.patch``, sees them all exactly.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        components: One component, or several with the same dims.
        metric: What is read; one metric.
        levels: The dims that each level adds, such as ``("layer", "head", "pos")``, the default for z: a string, or
            several at once. By default the layer, then head or neuron, then position, then what attention looks at.
            Neurons are not split into positions.
        threshold: Split what has at least such an effect, averaged over pairs: a share of clean − corrupted, or in the
            metric's unit where pairs have no corrupted prompts. 0.1 if neither it nor ``top`` is given.
        top: Split no more than so many cells on each level, the largest.
        direction: As in ``tp.patch``.
        source: As in ``tp.patch``.
        only: As in ``tp.patch``.
        progress: Whether to show a bar; by default only on a terminal.
        options: Those of ``tp.patching``.

    Returns:
        A tree with a dataset for each level, named by its dims, as in ``tree["layer_head"]``, with all cells of that
        sweep: ``effect`` and ``normalized``, NaN with ``status`` 3 where it was not looked; ``split``, 1 where the next
        level looks inside. ``attrs["drill"]`` of the tree says what was found and what was not looked at, in words.

    Raises:
        RecipeError: An argument is not what it has to be, or there is nothing to compare a threshold with.
        SiteError: A dim does not exist.
        ComponentError: The model does not have the component.
    """
    base_of(direction)
    if len(as_metrics(metric)) > 1:
        raise RecipeError("What matters is what moves one metric: pass one.")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise RecipeError(f"top is a number of cells on each level, 1 or more, not {top!r}.")
    limit = 0.0 if threshold is None else require_threshold(threshold)
    if threshold is None and top is None:
        limit = THRESHOLD
        if require_pairs(pairs).corrupted is None:
            raise RecipeError(
                "These pairs have no corrupted prompts, so that effects are in the metric's unit: say which of them "
                "matter, with threshold= or top=."
            )
    steps = levels_of(components, levels)
    found: list[Level] = []
    for by in steps:
        with Patching(model, pairs, metric, **options) as p:
            cells = Cells.of(p, components, by, direction, source, only)
            labels = [tuple(one.values()) for _, one in cells.labels(p)]
            if found:
                inside, width = found[-1].inside, len(found[-1].dims)
                rows = cells.record(p, {one for one in labels if one[:width] in inside})
            else:
                rows = cells.record(p)
        result = p.run(progress)
        level = _level(p, cells, labels, rows, result)
        split = np.zeros(level.known.shape, bool) if by == steps[-1] else _chosen(level, limit, top)
        dataset = level.dataset.assign(split=(level.dims, split.astype(np.int8)))
        found.append(replace(level, split=split, dataset=dataset))
        if not split.any():
            break
    attrs = {name: value for name, value in result.attrs.items() if name not in ("plan", "checks", "pairs_too_close")}
    attrs |= {
        "drill": _words(found, len(steps), limit, top),
        "patched_forwards": sum(level.forwards for level in found),
    }
    datasets = {"_".join(level.dims): level.dataset for level in found}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs)} | datasets)


def levels_of(
    components: str | Sequence[str], levels: Sequence[str | Sequence[str]] | None = None
) -> list[tuple[str, ...]]:
    """The dims of each level.

    Args:
        components: What is split.
        levels: The dims that each level adds; by default as ``drill`` says.

    Raises:
        RecipeError: There are no levels, or the components have different dims.
    """
    kinds = kinds_of(components)
    if levels is None:
        if len({kind.index for kind in kinds}) > 1:
            names = ", ".join(kind.name for kind in kinds)
            raise RecipeError(
                f"{names} have different dims: drill into one at a time, or pass levels=('layer', 'pos')."
            )
        kind = kinds[0]
        fine = ("layer", kind.unit, *(() if kind.unit in ("neuron", "expert") else ("pos", "dest", "src")))
        levels = [dim for dim in fine if dim in kind.index]
    added = [(level,) if isinstance(level, str) else tuple(level) for level in levels]
    if isinstance(levels, str) or not added or not all(added):
        raise RecipeError(f"levels says which dims each level adds, such as ('layer', 'head', 'pos'), not {levels!r}.")
    return [tuple(dim for level in added[: n + 1] for dim in level) for n in range(len(added))]


def _level(p: Patching, cells: Cells, labels: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], result: Any) -> Level:
    """All cells of a level, with the exact effects of those that were recorded."""
    several = len(cells.names) > 1
    dims = (*(("component",) if several else ()), *cells.by)
    axes: dict[str, list[Any]] = {"component": list(cells.names)} if several else {}
    axes |= {dim: list(cells.axes[dim]) for dim in cells.by}
    place = {dim: {label: i for i, label in enumerate(axis)} for dim, axis in axes.items()}

    def at(some: list[tuple[Any, ...]]) -> tuple[NDArray[np.intp], ...]:
        return tuple(np.array([place[dim][one[i]] for one in some], np.intp) for i, dim in enumerate(dims))

    shape = len(p.encoded), *(len(axis) for axis in axes.values())
    effect, status = np.full(shape, np.nan), np.full(shape, Status.ABSENT, np.int8)
    known = np.zeros(shape[1:], bool)
    every: Any = (slice(None), *at(labels))
    status[every] = Status.PENDING
    where: Any = at(rows)
    source: Any = (slice(None), *placed(p.rows)[2])
    for array, name in ((effect, "effect"), (status, "status")):
        array[(slice(None), *where)] = result[name].transpose("pair", ...).values[source]
    known[where] = True
    lead = ("pair", *dims)
    baselines = {name: result[name] for name in ("base", "clean", "corrupted") if name in result}
    told = dict(result["effect"].attrs), dict(result["status"].attrs)
    data = {"effect": (lead, effect, told[0]), **baselines, "status": (lead, status, told[1])}
    dataset = xr.Dataset(data, axes | pair_coords(p.encoded), result.attrs)
    dataset = dataset.assign_coords(metric=result["metric"].item())
    if "normalized" in result:
        dataset = normalize(dataset, [0.0], str(result["normalized"].attrs["over"]))
    dataset = site_coords(dataset, p.architecture, p.encoded, p.rows)
    return Level(dims, dataset, len(labels), known, np.zeros_like(known), p.plan.jobs)


def _chosen(level: Level, limit: float, top: int | None) -> NDArray[np.bool_]:
    """Which cells of a level are split."""
    sizes = np.nan_to_num(abs(level.effects))
    matters = level.known & (sizes > 0) & (sizes >= limit)
    if top is not None:
        order = np.argsort(-np.where(matters, sizes, -1.0).ravel(), kind="stable")[:top]
        among = np.zeros(matters.size, bool)
        among[order] = True
        matters &= among.reshape(matters.shape)
    return matters


def _words(found: list[Level], steps: int, limit: float, top: int | None) -> str:
    """What was found, and what was not looked at."""
    first = found[0].dataset
    rule = " and ".join(
        [*([f"from {short(limit)} on"] if limit else []), *([f"the {top:,} largest of a level"] if top else [])]
    )
    component = str(first.attrs["component"])
    lines = [f"Drill into {component} on {first['metric'].item()} [{unit_of(first)}], split {rule}"]
    finer: list[Level | None] = [*found[1:], None]
    width = max(len("unseen"), *(len(" × ".join(level.dims)) for level in found))
    lines += [
        f"  {' × '.join(level.dims):<{width}}  {level.told(below)}" for level, below in zip(found, finer, strict=True)
    ]
    closed = [
        f"{count:,} of {plural(level.cells, 'cell')} by {' × '.join(level.dims)}"
        for level in found[: len(found) - (len(found) == steps)]
        if (count := int((level.known & ~level.split).sum()))
    ]
    if closed:
        lines.append(f"  {'unseen':<{width}}  inside {', '.join(closed)}: what cancels in there does not show")
    lines.append(f"  {'spent':<{width}}  {sum(level.forwards for level in found):,} patched forwards")
    return "\n".join(lines)
