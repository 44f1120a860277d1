"""What attention does, seen through gradients: by head, destination and source."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from tracepatch.cells import Cells, Direction
from tracepatch.errors import RecipeError
from tracepatch.estimates import labelled, picked
from tracepatch.estimators import AtP, held_of
from tracepatch.layout import Key
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model, require_ready, require_weights
from tracepatch.plan import Group
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.results import origin
from tracepatch.sides import Op, Sides
from tracepatch.sites import component
from tracepatch.slopes import Slopes
from tracepatch.sources import OTHER, WorldName

BY = ("layer", "head", "dest", "src")


def attention_attribution(
    model: Model,
    pairs: Pairs,
    metric: Metrics = logit_diff,
    *,
    world: WorldName = "clean",
    by: tuple[str, ...] = BY,
    only: dict[str, Any] | None = None,
    memory: int | None = None,
) -> xr.Dataset:
    """How much each attention weight brings to the metric: pattern · gradient, in one run, without a second prompt.

    It is minus the estimate of setting the weight to zero (Nanda 2023). Summed over a head's weights it is what the
    head's output, its values, and its weights bring alike.

    Args:
        model: From ``tp.load``.
        pairs: The prompts; corrupted ones are not needed for ``world="clean"``.
        metric: What is read, and differentiated.
        world: ``"clean"`` or ``"corrupted"``: the run.
        by: The dims to keep; what is left out is summed.
        only: Dims and the indices to keep, as in ``tp.patch``.
        memory: Bytes that may be taken.

    Returns:
        A dataset as of ``tp.attribute``. ``estimate`` is positive where the weight raises the metric.
    """
    direction = _direction(world)
    study = _Weights(model, pairs, metric, world, by, direction, only, memory)
    found = study.dataset("pattern × gradient", lambda group, key, number: study.zeroed(key, number))
    negative = {name: -found[name] for name in ("estimate", "normalized") if name in found}
    for name, values in negative.items():
        values.attrs = found[name].attrs
    return found.assign(negative)


def value_flow(
    model: Model,
    pairs: Pairs,
    metric: Metrics = logit_diff,
    *,
    direction: Direction = "denoising",
    by: tuple[str, ...] = BY,
    only: dict[str, Any] | None = None,
    memory: int | None = None,
) -> xr.Dataset:
    """What patching the value at ``src`` does through each destination alone: pattern · (difference · gradient by z).

    Patterns and gradients are the base run's, differences those of its values. Summed over destinations, and over the
    query heads of a value, it is the AtP estimate of patching ``v`` at ``src``.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        metric: What is read, and differentiated.
        direction: ``"denoising"`` or ``"noising"``, as in ``tp.attribute``.
        by: The dims to keep; what is left out is summed.
        only: Dims and the indices to keep.
        memory: Bytes that may be taken.

    Returns:
        A dataset as of ``tp.attribute``, by ``layer``, ``head``, ``dest`` and ``src``.
    """
    world = "corrupted" if direction == "denoising" else "clean"
    study = _Weights(model, pairs, metric, world, by, direction, only, memory, values=True)
    return study.dataset("value flow", study.flow)


def _direction(world: WorldName) -> Direction:
    if world not in ("clean", "corrupted"):
        raise RecipeError(f"world is 'clean' or 'corrupted', not {world!r}.")
    return "noising" if world == "clean" else "denoising"


class _Weights:
    """Runs of one world in which patterns, values and gradients are seen."""

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        metric: Metrics,
        world: WorldName,
        by: tuple[str, ...],
        direction: Direction,
        only: dict[str, Any] | None,
        memory: int | None,
        values: bool = False,
    ) -> None:
        require_ready(model)
        require_weights(model)
        self.began = time.perf_counter()
        self.p = p = Patching(model, pairs, metric, memory=memory)
        # Weights set to zero are what is estimated, with the sign turned; what values do needs the other run.
        self.cells = Cells.of(p, "pattern", by, direction, None if values else 0, only)
        self.base, self.direction, self.values = world, direction, values
        if not (self.cells.plain or self.cells.partnered_positions(p)):
            raise RecipeError(
                "Attention's weights take positions, counted from 0 where prompts are aligned, not spans or slices. "
                "Estimate the weights themselves: tp.attribute(…, 'pattern')."
            )
        self.other: WorldName | None = OTHER[world] if p.encoded.corrupted is not None else None
        self.slopes = Slopes(p.architecture, *held_of(AtP(), p.architecture))
        worlds = [self.other] if self.other else []
        given = model, p.architecture, p.encoded, p.metrics
        self.sides = Sides(*given, worlds, wanted=self.taps, memory=memory)
        names = {world} | ({self.other} if self.other else set())
        self.scores = {name: np.full((len(p.metrics), len(p.encoded)), np.nan) for name in names}
        self.found: dict[Key, dict[int, Any]] = {}

    @property
    def taps(self) -> list[Key]:
        layers = self.cells.layers["pattern"]
        return [(name, layer) for layer in layers for name in (("pattern", "v", "z") if self.values else ("pattern",))]

    def zeroed(self, key: Key, number: int) -> tuple[Any, ...]:
        """The contraction for weights set to zero."""
        value, slope = ("value", self.base, *key), ("gradient", self.base, number, *key)
        return "product", value, slope, ("number", 0.0), False, self._sums

    def flow(self, group: Group, key: Key, number: int) -> tuple[Any, ...]:
        """The contraction for values."""
        assert self.other is not None
        layer = key[1]
        units = self.p.architecture.units
        groups = units("q", layer) // units("v", layer)
        source = "world", ("v", layer), self.sides.where(group, self.other), self.sides.agreeing(group, self.base)
        slope = "gradient", self.base, number, "z", layer
        pattern, value = (("value", self.base, name, layer) for name in ("pattern", "v"))
        return "flow", pattern, value, source, slope, groups, self._sums

    @property
    def _sums(self) -> tuple[int, ...]:
        return self.cells.summed(component("pattern"))

    def dataset(self, name: str, contraction: Any) -> xr.Dataset:
        """Runs everything, and labels what it gives."""
        keys, metrics = self.cells.keys, range(len(self.p.metrics))

        def build(group: Group) -> list[Op]:
            keep = [("v", layer) for layer in self.cells.layers["pattern"]] if self.values else []
            ops = self.sides.known(group, keep)
            ops.append(self.sides.backward(group, self.base, self.slopes, self.taps))
            items = tuple(contraction(group, key, number) for key in keys for number in metrics)
            return [*ops, (("contract", items), None)]

        def read(group: Group, ops: list[Op], found: list[Any]) -> None:
            for job, values in self.sides.values(ops, found):
                self.scores[job.base][:, job.pair] = values
            results = iter(found[-1])
            for key in keys:
                arrays = np.stack([next(results).double().numpy() for _ in metrics])
                alone = self.sides.alone(group, self.base) if self.values else None
                length, lost = group.of(self.base).length, {} if alone is None else {"src": alone}
                at = picked(self.cells, "pattern", arrays, length, lost=lost)
                for i, pair in enumerate(group.pairs):
                    self.found.setdefault(key, {})[pair] = at[:, i]

        self.sides.take(self.sides.groups(self.taps), build, read, eager=True)
        attrs = {
            **origin(self.p.model, self.p.encoded, {}),
            "base": self.base,
            "written": self.other or "other" if self.values else "0",
            "component": "v" if self.values else "pattern",
            "estimator": name,
            "cost": self.sides.cost,
            "metrics": json.dumps({m.name: m.told for m in self.p.metrics}),
            "seconds": round(time.perf_counter() - self.began, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        given = self.p.metrics, self.p.architecture, self.p.encoded, attrs
        return labelled(self.cells, self.found, self.scores, *given)
