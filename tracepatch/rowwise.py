"""Recorded rows, estimated: what their edits change, times the gradient where they change it.

The same rows that a plan measures, with the same labels: whatever can be written inside ``tp.patching`` can be
estimated by one forward and one backward of each base world. A row of several edits is the sum of its edits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.constants import Constant
from tracepatch.costs import kept_bytes
from tracepatch.errors import RecipeError, listing
from tracepatch.estimators import AtP, AtPStar, IntegratedGradients, held_of
from tracepatch.jobs import EAGER, Job, Term, Write
from tracepatch.journal import Measured
from tracepatch.layout import Key, columns
from tracepatch.models import Model
from tracepatch.plan import PROVED, Group, Plan, Status
from tracepatch.planner import MEMORY
from tracepatch.portions import Features
from tracepatch.results import Result, to_result
from tracepatch.rows import Edit, Row
from tracepatch.sides import Op, Sides
from tracepatch.sites import SPLIT_READERS
from tracepatch.slopes import Slopes
from tracepatch.sources import Function, Part, Value, WorldName
from tracepatch.tokens import EncodedPairs

SHARE = 8  # of the memory, the part that edited copies of values may take


def estimated(
    model: Model, architecture: Architecture, encoded: EncodedPairs, plan: Plan, how: AtP, memory: int | None
) -> Result:
    """The result of a plan with ``estimate`` in place of ``effect``; see ``Patching.estimate``.

    Args:
        model: Of the plan.
        architecture: Of the model.
        encoded: The pairs.
        plan: The rows, lowered.
        how: The estimator.
        memory: Bytes that may be taken.

    Raises:
        RecipeError: A row cannot be estimated, or not so.
    """
    _require_estimable(plan, how)
    study = _Rows(model, architecture, encoded, plan, how, memory)
    measured = study.run()
    return _relabelled(to_result(model, architecture, encoded, plan, measured), study)


def _require_estimable(plan: Plan, how: AtP) -> None:
    if isinstance(how, AtPStar):
        raise RecipeError(
            "AtP* is of whole sweeps of queries and keys: use tp.attribute(model, pairs, 'q', estimator=tp.AtPStar())."
        )
    if isinstance(how, IntegratedGradients) and how.along != "site":
        raise RecipeError(
            "Recorded rows have their own sites to move: pass tp.IntegratedGradients(steps=…, along='site'), or "
            "estimate sweeps with tp.attribute."
        )
    bad = []
    for row in plan.rows:
        why = _why_not(row, how)
        if why:
            bad.append(f"{row}: {why}")
    if bad:
        raise RecipeError(f"{len(bad)} of {len(plan.rows)} rows cannot be estimated.\n{listing(bad)}")


def _why_not(row: Row, how: AtP) -> str:
    if row.raw is not None:
        return "nothing is known of a raw trace; p.run() measures it"
    if any(e.site.component == "logits" for e in row.edits):
        return "logits are what the metric reads; p.run() measures it"
    if len(row.edits) > 1 and any(e.source == Value(row.base, e.site) for e in row.edits):
        return (
            "it holds a site at the base's own value, which blocks the way of its other edits: hold it in an edited "
            "world, p.world(…).freeze(…), whose gradients see that"
        )
    if isinstance(how, IntegratedGradients) and any(isinstance(e.source, Function) for e in row.edits):
        return "a function has no line from the base to it; take tp.AtP(), or p.run()"
    if isinstance(how, IntegratedGradients) and any(_of_features(e) for e in row.edits):
        return "features of a dictionary do not follow a line; take tp.AtP(), or p.run()"
    if isinstance(how, IntegratedGradients) and any(e.site.component in SPLIT_READERS for e in row.edits):
        return "what single heads read is read in a run beside it, which has no line; take tp.AtP(), or p.run()"
    return ""


def _of_features(edit: Edit) -> bool:
    return isinstance(edit.source, Part) and isinstance(edit.source.portion, Features)


@dataclass
class _Rows:
    """One estimation of a plan's rows."""

    model: Model
    architecture: Architecture
    encoded: EncodedPairs
    plan: Plan
    how: AtP
    memory: int | None
    jobs: dict[tuple[int, ...], list[Job]] = field(default_factory=dict)
    counted: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_pair = jobs_of(self.plan)
        everyone = [job for jobs in self.by_pair.values() for job in jobs]
        self.bases: tuple[WorldName, ...] = tuple(dict.fromkeys(job.base for job in everyone))
        self.wanted: dict[WorldName, list[Key]] = {
            base: sorted({(w.component, w.layer) for job in everyone if job.base == base for w in job.writes})
            for base in self.bases
        }
        touched = {key for keys in self.wanted.values() for key in keys}
        plan = self.plan
        self.sides = Sides(
            self.model,
            self.architecture,
            self.encoded,
            plan.metrics,
            plan.worlds,
            plan.edited,
            touched,
            self.memory,
            plan.references,
            plan.surveys,
        )
        held, rules = held_of(self.how, self.architecture)
        scales = {(e.site.component, e.site.layer) for w in plan.edited for e in w.edits}
        written = frozenset(key for key in scales if key[0].endswith("_scale"))
        self.slopes = Slopes(self.architecture, held, rules, written)
        shape = len(plan.rows), plan.pairs, len(plan.metrics)
        self.values: NDArray[np.float64] = np.full(shape, np.nan)
        worlds = (*plan.worlds, *(w.name for w in plan.edited))
        self.baselines = {world: np.full((plan.pairs, len(plan.metrics)), np.nan) for world in worlds}

    def run(self) -> Measured:
        """Estimates of all rows, as values of a run: the base's value and what is estimated on top."""
        began = time.perf_counter()
        keys = [key for keys in self.wanted.values() for key in keys]
        steps = self.how.steps if isinstance(self.how, IntegratedGradients) else 1
        terms = {
            (t.component, t.layer) for jobs in self.by_pair.values() for j in jobs for w in j.writes for t in w.terms
        }
        eager = self.slopes.eager or any(name in EAGER for name, _ in (*keys, *terms))
        eager = eager or any(e.site.component in EAGER for w in self.plan.edited for e in w.edits)
        self.sides.take(self.sides.groups([*keys, *terms], steps), self._build, self._read, eager=eager)
        plan = self.plan
        for number, row in enumerate(plan.rows):
            for pair in range(plan.pairs):
                twin = plan.twins[number, pair]
                if twin >= 0:
                    self.values[number, pair] = self.values[twin // plan.pairs, pair]
                elif plan.proofs[number, pair] in PROVED:
                    self.values[number, pair] = self.baselines[row.base][pair]
        count = len(plan.metrics)
        return Measured(
            tuple((m.name, "") for m in plan.metrics),
            self.values,
            self.baselines,
            np.zeros(count),
            time.perf_counter() - began,
            np.zeros((len(plan.rows), plan.pairs), bool),
            0,
            {},
            (),
            {},
            None,
            None,
        )

    # ------------------------------------------------------------------------------------------------ what is run

    def _build(self, group: Group) -> list[Op]:
        sides = self.sides
        jobs = [job for pair in group.pairs for job in self.by_pair[pair]]
        keep = {key for job in jobs for w in job.writes for key in w.needed}
        if isinstance(self.how, IntegratedGradients):  # lines begin at the base's own values
            keep |= {key for job in jobs for w in job.writes for key in _partly(w, 0.0, job.base).needed}
        ops = sides.known(group, keep)
        for base in self.bases:
            own = [job for job in jobs if job.base == base]
            wanted = self.wanted[base]
            if not own or not wanted:
                continue
            if isinstance(self.how, IntegratedGradients):
                ops += self._along(group, base, own, wanted)
                continue
            ops.append(sides.backward(group, base, self.slopes, wanted))
            items = [item for number in range(len(self.plan.metrics)) for item in self._items(group, base, own, number)]
            ops.append((("contract", tuple(items)), None))
        return ops

    def _along(self, group: Group, base: WorldName, own: list[Job], wanted: Sequence[Key]) -> list[Op]:
        """Each row at each point of its own line: as many rows, and their gradients averaged."""
        how, sides = self.how, self.sides
        assert isinstance(how, IntegratedGradients)
        ops: list[Op] = [sides.backward(group, base, self.slopes, wanted)]  # for the base's values
        standing = {job.pair: job.writes for job in sides.unpatched(group, base)}
        length = group.of(sides.tracer.roots.get(base, base)).length
        most = max(1, int((self.memory or MEMORY) // max(1, sides.pair_bytes(wanted, length, how.steps))))
        for start in range(0, len(own), most):
            part = own[start : start + most]
            moved = [
                replace(job, writes=(*standing[job.pair], *(_partly(w, weight, base) for w in job.writes)))
                for job in part
                for weight in how.weights
            ]
            name = f"{base} moved"
            ops.append((("contract", (("drop", name),)), None))
            given = sides.backward(
                group, name, self.slopes, wanted, values=False, jobs=moved, steps=(how.steps, 1 / how.steps)
            )
            ops.append(given)
            items = [
                item
                for number in range(len(self.plan.metrics))
                for item in self._items(group, base, part, number, name)
            ]
            ops.append((("contract", tuple(items)), None))
        return ops

    def _items(
        self, group: Group, base: WorldName, jobs: list[Job], number: int, at: str = ""
    ) -> list[tuple[Any, ...]]:
        """A contraction for each component and layer that rows write; gradients are the base's, or each row's own."""
        found = []
        for key, numbers, pairs, writes, most in edits_of(self.sides, group, jobs, self.memory):
            slots = torch.tensor(numbers) if at else pairs
            slope = "gradient", at or base, number, *key
            found.append(("rows", ("value", base, *key), slope, pairs, slots, writes, key[0] in EAGER, most))
        return found

    # ------------------------------------------------------------------------------------------------ what it gives

    def _read(self, group: Group, ops: list[Op], found: list[Any]) -> None:
        sides, count = self.sides, len(self.plan.metrics)
        jobs = [job for pair in group.pairs for job in self.by_pair[pair]]
        for pair in group.pairs:
            for job in self.by_pair[pair]:
                self.values[job.row, pair] = 0.0
        totals = list(self._totals(group, jobs, ops))
        for job, values in sides.values(ops, found):
            if job.base in self.baselines:
                self.baselines[job.base][job.pair] = values
        for (op, _), given in zip(ops, found, strict=True):
            if op[0] == "contract" and given and given[0] is not None:
                part = totals.pop(0)
                per = len(given) // count
                by_key = by_place(part)
                for number in range(count):
                    for numbers, estimates in zip(
                        by_key.values(), given[number * per : (number + 1) * per], strict=True
                    ):
                        for n, estimate in zip(numbers, estimates.double().tolist(), strict=True):
                            self.values[part[n].row, part[n].pair, number] += estimate
        for job in jobs:
            self.values[job.row, job.pair] += self.baselines[job.base][job.pair]

    def _totals(self, group: Group, jobs: list[Job], ops: list[Op]) -> Any:
        """The jobs of each contraction, in the order in which they were asked for."""
        for base in self.bases:
            own = [job for job in jobs if job.base == base]
            if not own or not self.wanted[base]:
                continue
            if not isinstance(self.how, IntegratedGradients):
                yield own
                continue
            steps = self.how.steps
            sizes = [
                len(call.jobs) // steps
                for op, call in ops
                if op[0] == "backward" and call and op[2][0] == f"{base} moved"
            ]
            start = 0
            for size in sizes:
                yield own[start : start + size]
                start += size


def jobs_of(plan: Plan) -> dict[int, list[Job]]:
    """The rows that are measured on each pair, without what stands in their base and what they save."""
    found: dict[int, list[Job]] = defaultdict(list)
    for batch in (batch for group in plan.groups for batch in group.batches):
        for job in batch.jobs:
            own = tuple(w for w in job.writes if not w.standing)
            found[job.pair].append(replace(job, writes=own, reads=()))
    return found


def by_place(jobs: Sequence[Job]) -> dict[Key, list[int]]:
    """The numbers of the rows that write each component at each layer."""
    found: dict[Key, list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        for key in dict.fromkeys((w.component, w.layer) for w in job.writes):
            found[key].append(number)
    return dict(sorted(found.items()))


def edits_of(
    sides: Sides, group: Group, jobs: Sequence[Job], memory: int | None
) -> Iterator[tuple[Key, list[int], torch.Tensor, tuple[Any, ...], int]]:
    """What rows of one base write, place by place, as ``contractions.changes`` takes it.

    Yields:
        Component and layer; the numbers of the rows that write there; where their pairs stand; the writes of each part
        of the rows; how many rows a part has.
    """
    place = {pair: i for i, pair in enumerate(group.pairs)}
    if not jobs:
        return
    root = sides.tracer.root(jobs[0])
    length, seats = group.of(root).length, sides.seats(group, root)
    for key, numbers in by_place(jobs).items():
        pairs = torch.tensor([place[jobs[n].pair] for n in numbers])
        size = kept_bytes(sides.architecture, *key, length)
        most = max(1, int((memory or MEMORY) // SHARE // max(1, size)))
        writes = []
        for start in range(0, len(numbers), most):
            part = [replace(jobs[n], writes=_of(jobs[n], key)) for n in numbers[start : start + most]]
            writes.append(columns(part, sides.architecture, seats, split=key[0] in SPLIT_READERS).get(key, ()))
        yield key, numbers, pairs, tuple(writes), most


def _of(job: Job, key: Key) -> tuple[Write, ...]:
    return tuple(w for w in job.writes if (w.component, w.layer) == key)


def _partly(write: Write, weight: float, base: WorldName) -> Write:
    """An edit, done so far on the straight line from the base's own value."""
    terms = tuple(replace(t, factor=t.factor * weight) for t in write.terms)
    constant = None if write.constant is None else Constant.of(write.constant.tensor * weight)
    if not write.add:
        name, units = write.component, write.units
        if name in SPLIT_READERS:
            name, units = "attn_in", None
        own = Term(1 - weight, base, name, write.layer, write.positions, units, write.srcs)
        terms = (*terms, own)
    spread = tuple((tally, Constant.of(numbers.tensor * weight)) for tally, numbers in write.spread)
    return replace(write, terms=terms, constant=constant, spread=spread)


def _relabelled(result: Result, study: _Rows) -> Result:
    """A result whose values are estimates, as one that says so."""

    def one(dataset: xr.Dataset) -> xr.Dataset:
        if "effect" not in dataset:
            return dataset
        parts = [name for name in dataset.data_vars if str(name).startswith("effect_")]
        dataset = dataset.drop_vars(["value", *parts]).rename(effect="estimate")
        status = dataset["status"]
        shown = status.copy(data=np.where(status == Status.MEASURED, Status.ESTIMATED, status).astype(np.int8))
        return dataset.assign(status=shown)

    attrs = {
        "estimator": study.how.name,
        "signed": int(study.how.signed),
        "cost": study.sides.cost,
        "plan": "none: nothing was patched",
        "checks": "none: estimates are checked by tp.audit",
    }
    if isinstance(result, xr.DataTree):
        tree = result.map_over_datasets(one)
        for node in tree.subtree:
            node.attrs = {**node.attrs, **attrs}
        return tree
    return one(result).assign_attrs({**result.attrs, **attrs})
