"""Attribution: the effect of patching every site, estimated from a few forwards and backwards.

``tp.attribute`` takes what ``tp.patch`` takes and returns a dataset of the same dims and labels, so that the two can be
subtracted. It holds an ``estimate`` where the other holds an ``effect``; ``tp.audit`` says how far to trust it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from tracepatch.cells import Cells, Direction, base_of
from tracepatch.errors import RecipeError
from tracepatch.estimates import labelled, picked, requested, resting_on
from tracepatch.estimators import AtP, AtPStar, IntegratedGradients, RelP, held_of, require_movable
from tracepatch.jobs import EAGER
from tracepatch.layout import Key
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model, require_ready, require_weights
from tracepatch.plan import Group
from tracepatch.prompts import Pairs
from tracepatch.reach import canonical
from tracepatch.recipe import Patching
from tracepatch.rows import Edit, EditedWorld
from tracepatch.sides import Op, Sides
from tracepatch.sites import Select, Site, component
from tracepatch.slopes import Slopes
from tracepatch.sources import OTHER, Value, WorldName, as_source

LINES = ("embed", "resid_pre", "q", "k", "v", "z", "attn_out", "mlp_act", "mlp_out")
"""Components that can be moved along a line as a whole."""


def attribute(
    model: Model,
    pairs: Pairs,
    components: str | Sequence[str],
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] | None = None,
    direction: Direction = "denoising",
    source: Any = None,
    only: dict[str, Any] | None = None,
    estimator: AtP | None = None,
    renormalize: bool = False,
    value_bias: bool = True,
    memory: int | None = None,
) -> xr.Dataset:
    """Estimates the effect of patching every site of a component: for all sites, two forwards and one backward.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        components: One component, or several with the same dims.
        metric: What is read, and differentiated.
        by: The dims to run over, as in ``tp.patch``; estimates of what is left out add up.
        direction: ``"denoising"``: gradients of the corrupted run, as clean values would be written into it;
            ``"noising"``: gradients of the clean run.
        source: Something else that would be written, as in ``tp.patch``: a number, a tensor, a function. 0 estimates
            zero ablation.
        only: Dims and the indices to keep, as in ``tp.patch``.
        estimator: How: ``tp.AtP()``, ``tp.AtPStar()``, ``tp.IntegratedGradients(steps=…)`` or ``tp.RelP()``.
        renormalize: Of patterns: after one weight is written, its destination's are scaled to the sum that they had.
        value_bias: Of patterns: ``False`` leaves out what the values' bias adds to the gradient by a weight.
        memory: Bytes that may be taken; pairs are chunked accordingly. 1 GiB, or half of what an accelerator has.

    Returns:
        A dataset with the dims and coordinates of the same exact sweep. Variables: ``estimate``, in the metric's unit,
        positive where the patch raises the metric; ``normalized``, the same as a fraction of clean − corrupted;
        ``base``, ``clean`` and ``corrupted``, the metric in those runs; ``status``, 4 where it is estimated.

    Raises:
        RecipeError: The request contradicts itself, or the estimator cannot do it.
        ComponentError: The model does not have the component.
    """
    require_ready(model)
    require_weights(model)
    base_of(direction)
    p = Patching(model, pairs, metric, memory=memory)
    cells, how = Cells.of(p, components, by, direction, source, only), estimator or AtP()
    if "logits" in cells.names:
        raise RecipeError("logits are what the metric reads; write a metric that reads what a patch would give.")
    if (renormalize or not value_bias) and set(cells.names) != {"pattern"}:
        raise RecipeError("renormalize= and value_bias= speak of attention weights: estimate 'pattern' alone.")
    number = source is None or (isinstance(source, Real) and not isinstance(source, bool))
    by_site = isinstance(how, IntegratedGradients) and how.along == "site"
    if isinstance(how, AtPStar) or (isinstance(how, IntegratedGradients) and not by_site):
        instead = "Take tp.AtP(), tp.RelP() or tp.IntegratedGradients(steps=…, along='site'), or patch."
        cells.require_plain(p, how.name, instead)
    if not number or by_site or not (cells.plain or _partners(cells, p, how)):
        if not value_bias:
            raise RecipeError(
                "value_bias=False is of AtP at positions that are the same in both prompts, written from there or a "
                "number."
            )
        with p:
            cells.record(p, renormalize=renormalize)
        return p.estimate(how).assign_attrs(request=requested(cells, direction, renormalize, value_bias))
    return _Study(p, cells, how, renormalize, value_bias, memory).dataset(direction)


def _partners(cells: Cells, p: Patching, how: AtP) -> bool:
    """Whether cells of aligned prompts are estimated all at once; what is rotated, or attends, as rows."""
    one_by_one = {"q", "k"} & set(cells.names) or any(component(name).attends for name in cells.names)
    return type(how) in (AtP, RelP) and not one_by_one and cells.partnered_positions(p)


def is_vector(name: str) -> bool:
    """Whether a component has a vector at each of its indices."""
    kind = component(name)
    return kind.dims[-1] not in kind.index


@dataclass
class _Study:
    """One estimation: the runs it takes, and what they give."""

    p: Patching
    wanted: Cells
    how: AtP
    renormalize: bool
    value_bias: bool
    memory: int | None
    found: dict[Key, dict[int, NDArray[np.float64]]] = field(default_factory=dict)
    values: dict[WorldName, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p, how = self.p, self.how
        self.base, self.source = self.wanted.base, self.wanted.source
        self.architecture, self.encoded = p.architecture, p.encoded
        self.canonical = {key: self._canonical(*key) for key in self.wanted.keys}
        self.other = OTHER[self.base] if self.encoded.corrupted is not None else None
        self._require_possible()
        self.slopes = Slopes(self.architecture, *held_of(how, self.architecture))
        self.fixed = [key for key in self.wanted.keys if isinstance(how, AtPStar) and key[0] in ("q", "k")]
        self.edited = self._fixes()
        integrated = isinstance(how, IntegratedGradients)
        both = integrated or self.edited or self._biased
        pristine = [w for w in ("clean", "corrupted") if w == "clean" or self.encoded.corrupted is not None]
        compared = any(need in ("clean", "corrupted") for m in p.metrics for need in m.needs)
        self.worlds = pristine if both or compared else [w for w in pristine if w != self.base]
        sites = [Site("pattern", layer) for layer in range(len(self.architecture))] if self.edited else []
        touched = [*self.taps, *(canonical(site, len(self.architecture)) for site in sites)]
        self.sides = Sides(
            p.model, self.architecture, self.encoded, p.metrics, self.worlds, self.edited, touched, self.memory
        )
        self.values = {w: np.full((len(p.metrics), len(self.encoded)), np.nan) for w in {self.base, *pristine}}

    @property
    def _biased(self) -> bool:
        return not self.value_bias

    @property
    def taps(self) -> list[Key]:
        """The components whose gradients are taken."""
        keys = [k for k in self.canonical.values() if k not in self.fixed]
        keys += [("pattern", layer) for layer in sorted({layer for _, layer in self.fixed})]
        keys += [("scores", layer) for name, layer in self.fixed if name == "k"]
        keys += [("z", layer) for layer in self.wanted.layers.get("pattern", ()) if self._biased]
        if isinstance(self.how, AtPStar) and self.how.drop:
            keys += [key for drop in self._drops for key in drop]
        return list(dict.fromkeys(keys))

    @property
    def _drops(self) -> list[list[Key]]:
        """What each further backward of GradDrop leaves out."""
        return [
            [(name, layer) for name in ("attn_out", "mlp_out") if self.architecture.offers(name, layer)]
            for layer in range(len(self.architecture))
        ]

    def _canonical(self, name: str, layer: int) -> Key:
        return canonical(Site(name, layer), len(self.architecture))

    def _require_possible(self) -> None:
        how = self.how
        if isinstance(how, IntegratedGradients):
            if self.source is not None and how.along == "inputs":
                raise RecipeError(
                    "along='inputs' moves the embeddings from one prompt to the other, and source= is no prompt. Pass "
                    "along='layer' or along='site'."
                )
            if how.along == "inputs":
                require_movable(self.architecture)
            wrong = sorted({k[0] for k in self.canonical.values()} - set(LINES)) if how.along == "layer" else []
            if wrong or (how.along == "layer" and self.source is not None):
                what = f"{', '.join(wrong)} cannot" if wrong else "a component cannot, to source=,"
                raise RecipeError(
                    f"{what} be moved along a line as a whole. along='layer' takes {', '.join(LINES)} between the two "
                    "prompts; along='site' takes any component."
                )
        if isinstance(how, AtPStar):
            if how.drop and len(self.architecture) < 2:
                raise RecipeError("GradDrop drops one layer of several, and this model has one: pass drop=False.")
            if self.source is not None and {"q", "k"} & set(self.wanted.names):
                raise RecipeError(
                    "AtP* computes patterns with the other prompt's queries and keys; source= is none. Pass "
                    "estimator=tp.AtP(), or leave source= out."
                )

    def _fixes(self) -> list[EditedWorld]:
        """Worlds in which queries, or keys, are the other prompts' in every layer, and nothing else is."""
        found = []
        for name in ("q", "k"):
            layers = sorted(layer for n, layer in self.fixed if n == name)
            if not layers:
                continue
            edits = []
            for layer in layers:
                self.architecture.require("pattern", layer)
                for part in ("q", "k"):
                    site = Site(part, layer)
                    edits.append(Edit(site, Value(OTHER[self.base] if part == name else self.base, site)))
            found.append(EditedWorld(f"{name}_fix", self.base, self.base, edits, used=True))
        if self._biased:
            edits = []
            for layer in self.wanted.layers["pattern"]:
                paths = [f"{m.place.path}.input" for m in self.architecture.projections(layer)]
                if not paths:
                    raise RecipeError(
                        f"value_bias=False: in layer {layer} of this {self.architecture.model_type} no linear map is "
                        "known that makes the values. Leave it out."
                    )
                for path in paths:
                    where = Site(path, self.architecture.modules.tap(path).layer)
                    edits.append(Edit(where, as_source(0.0)))
            found.append(EditedWorld("no_input", self.base, self.base, edits, used=True))
        return found

    # ------------------------------------------------------------------------------------------------ what is run

    def dataset(self, direction: Direction) -> xr.Dataset:
        """Runs everything, and labels what it gives."""
        began = time.perf_counter()
        steps = self.how.steps if isinstance(self.how, IntegratedGradients) else 1
        groups = self.sides.groups([*self.taps, *self.canonical.values()], steps)
        eager = self.slopes.eager or any(name in EAGER for name, _ in (*self.taps, *self.canonical.values()))
        self.sides.take(groups, self._build, self._read, eager=eager)
        attrs = self._attrs(direction, time.perf_counter() - began)
        given = self.p.metrics, self.architecture, self.encoded, attrs
        return labelled(self.wanted, self.found, self.values, *given)

    def _build(self, group: Group) -> list[Op]:
        sides, how = self.sides, self.how
        keep: set[Key] = set()
        if self.source is None:
            keep = {stream_of(key) for key in self.canonical.values() if key not in self.fixed}
        if self.edited:
            keep |= {("pattern", layer) for _, layer in self.fixed}
            keep |= {("scores", layer) for name, layer in self.fixed if name == "k"}
            keep |= {("v", layer) for layer in self.wanted.layers.get("pattern", ()) if self._biased}
        if isinstance(how, IntegratedGradients):
            keep |= {("embed", 0)} if how.along == "inputs" else set()
        ops = sides.known(group, keep)
        if isinstance(how, IntegratedGradients):
            return [*ops, *self._integrated(group, how)]
        drops = self._drops if isinstance(how, AtPStar) and how.drop else ()
        ops.append(sides.backward(group, self.base, self.slopes, self.taps, drops=drops))
        items = [item for key in self.wanted.keys for item in self._items(group, key)]
        return [*ops, (("contract", tuple(items)), None)]

    def _integrated(self, group: Group, how: IntegratedGradients) -> list[Op]:
        """Values of the base run, then gradients averaged over the line, for all components or one at a time."""
        sides, count = self.sides, how.steps
        settled = (("contract", (sides.settled(group, self.base, self.canonical.values()),)), None)
        moved: list[tuple[Key, list[Key]]]
        if how.along == "inputs":
            moved = [(("embed", 0), list(self.canonical.values()))]
        else:
            moved = [(key, [key]) for key in dict.fromkeys(self.canonical.values())]
        rows = [job for job in sides.unpatched(group, self.base) for _ in range(count)]
        other = sides.where(group, OTHER[self.base]).repeat_interleave(count)
        weights = torch.tensor(how.weights * len(group.pairs), dtype=torch.float64)
        ops: list[Op] = [settled]
        for what, wanted in moved:
            ops.append(
                sides.backward(
                    group,
                    self.base,
                    self.slopes,
                    wanted,
                    values=False,
                    jobs=rows,
                    line=(what, other, weights),
                    steps=(count, 1 / count),
                )
            )
        items = [item for key in self.wanted.keys for item in self._items(group, key)]
        return [*ops, (("contract", tuple(items)), None)]

    def _items(self, group: Group, key: Key) -> list[tuple[Any, ...]]:
        """The contractions of a component, one for each metric, and with GradDrop one for each drop too."""
        name, layer = key
        own, kind = self.canonical[key], component(name)
        sums, found = self.wanted.summed(kind), []
        drops = range(len(self._drops)) if isinstance(self.how, AtPStar) and self.how.drop else (None,)
        for number in range(len(self.p.metrics)):
            for drop in drops:
                slope = ("gradient", self.base, number) if drop is None else ("dropped", self.base, number, drop)
                if key in self.fixed:
                    found.append(self._fixed(group, key, slope, sums))
                    continue
                value = ("value", self.base, *own)
                source = self._source(group, own)
                if name == "pattern" and (self.renormalize or self._biased):
                    bias = None
                    if self._biased:
                        groups = self.architecture.units("z", layer) // self.architecture.units("v", layer)
                        still = ("still", layer)
                        found.append(("take", still, ("v", layer), self.sides.where(group, "no_input")))
                        bias = (*slope, "z", layer), still, groups
                    found.append(("weights", value, source, (*slope, *own), bias, self.renormalize, sums))
                else:
                    found.append(("product", value, (*slope, *own), source, is_vector(name), sums))
        return found

    def _fixed(self, group: Group, key: Key, slope: tuple[Any, ...], sums: tuple[int, ...]) -> tuple[Any, ...]:
        name, layer = key
        here, by = ("value", self.base, "pattern", layer), (*slope, "pattern", layer)
        if name == "q":
            return "query_fix", here, ("pattern", layer), self.sides.where(group, "q_fix"), by, sums
        groups = self.architecture.units("q", layer) // self.architecture.units("k", layer)
        together = None
        if "pos" not in self.wanted.by:
            chosen = self.wanted.picked.get("pos", Select()).resolve(group.length) or ()
            together = torch.tensor(chosen)
            sums = () if "kv_head" in self.wanted.kept(component(name)) else (1,)
        scores = ("value", self.base, "scores", layer), ("scores", layer)
        return "key_fix", here, *scores, self.sides.where(group, "k_fix"), by, groups, together, sums

    def _source(self, group: Group, own: Key) -> tuple[Any, ...]:
        if self.source is not None:
            return "number", float(self.source)
        assert self.other is not None
        return "world", stream_of(own), self.sides.where(group, self.other), self.sides.agreeing(group, self.base)

    # ------------------------------------------------------------------------------------------------ what it gives

    def _read(self, group: Group, ops: list[Op], found: list[Any]) -> None:
        for job, values in self.sides.values(ops, found):
            if job.base in self.values:
                self.values[job.base][:, job.pair] = values
        results = [r for r in found[-1] if r is not None]
        count = len(self.p.metrics)
        per = len(self._drops) if isinstance(self.how, AtPStar) and self.how.drop else 1
        alone = self.sides.alone(group, self.base) if self.source is None else None
        lost = {} if alone is None else {"pos": alone}
        for number, key in enumerate(self.wanted.keys):
            own = results[number * count * per : (number + 1) * count * per]
            arrays = np.stack([r.double().numpy() for r in own])  # [metric × drop, row, …]
            arrays = arrays.reshape(count, per, *arrays.shape[1:])
            together = key in self.fixed and key[0] == "k" and "pos" not in self.wanted.by  # keys are patched as one
            without = ("pos",) if together else ()
            at = picked(self.wanted, key[0], arrays, group.of(self.base).length, without, lost)
            if per > 1:
                at = np.abs(at).sum(1, keepdims=True) / (len(self.architecture) - 1)
            for i, pair in enumerate(group.pairs):
                self.found.setdefault(key, {})[pair] = at[:, 0, i]

    def _attrs(self, direction: Direction, seconds: float) -> dict[str, Any]:
        return resting_on(
            self.p.model,
            self.encoded,
            self.p.metrics,
            self.how,
            base=self.base,
            written=self.other or "other" if self.source is None else str(self.source),
            component=", ".join(self.wanted.names),
            cost=self.sides.cost,
            request=requested(self.wanted, direction, self.renormalize, self.value_bias),
            seconds=seconds,
        )


def stream_of(key: Key) -> Key:
    """Under what a world's value is kept: what single heads read is one stream."""
    return ("attn_in", key[1]) if key[0] in ("q_in", "k_in", "v_in") else key
