"""What a run has finished, batch by batch, so that the next one need not begin again.

A batch is known by what it depends on (``identity``): the model with all its weights, the tokens, the worlds of its
pairs, every edit, the metrics, and the versions of what computes. So a batch of another run is taken exactly where it
would come out the same, to the last bit, and one directory serves any number of recipes, models and processes. Where
memory had no room for a run, how it was divided is kept with its numbers, and done again in the same way where others
need its worlds: so what continues a run gives what that run would have given.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.entries import Entry, Memory, Store
from tracepatch.errors import plural
from tracepatch.identity import Identities, UnidentifiedError, context
from tracepatch.models import Model
from tracepatch.plan import Batch, Group, Plan
from tracepatch.references import Survey
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs

_INTERRUPTED: WeakKeyDictionary[Model, dict[Any, Memory]] = WeakKeyDictionary()
PLACES = frozenset(
    {"row", "pair", "pairs", "lanes", "paths"}
)  # where a job stands among others: told apart from what it is
CHECKS = -2


@dataclass(frozen=True)
class Measured:
    """Numbers of a plan that has run.

    Attributes:
        columns: (metric, part) of each column; a metric's own value has the part "".
        values: ``[row, pair, column]``; NaN where a row has no such position in a pair.
        baselines: World → ``[pair, column]``.
        noise: Largest drift of the unpatched witnesses from their baseline, per column.
        seconds: Wall time.
        still: ``[row, pair]``: whether a measured row has, up to rounding, the value of its unpatched base.
        fired: Edits that were seen to fire.
        saved: (row, its save's number, pair) → the live value ``[…]`` in float32.
        again: Of each row of the plan's sample, the columns, measured as whole prompts.
        ran: Where the model ran, as a server says; empty where it ran here.
        forwards: Whole forwards that were traced, counted in tokens and layers; ``None`` where they cannot be seen.
        peak: Bytes taken beside the model; ``None`` where that cannot be seen.
    """

    columns: tuple[tuple[str, str], ...]
    values: NDArray[np.float64]
    baselines: dict[WorldName, NDArray[np.float64]]
    noise: NDArray[np.float64]
    seconds: float
    still: NDArray[np.bool_]
    fired: int
    saved: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    again: tuple[NDArray[np.float64], ...] = ()
    ran: dict[str, str] = field(default_factory=dict)
    forwards: float | None = None
    peak: int | None = None


class Numbers(Protocol):
    """What a run fills in."""

    values: NDArray[np.float64]
    baselines: dict[WorldName, NDArray[np.float64]]
    noise: NDArray[np.float64]
    still: NDArray[np.bool_]
    fired: int
    saved: dict[tuple[int, int, int], torch.Tensor]


class Journal:
    """The finished batches of one plan: those of this run, and those that earlier runs left.

    Without a store it is kept in memory, and what a run that fails or is interrupted has finished is there for the next
    one in this process.

    Args:
        plan: What is run.
        model: What it is run on; nothing is taken from earlier runs without it.
        encoded: The pairs.
        store: Where entries are kept.
        checks: Whether edits must be seen to fire, which is kept beside the numbers.
    """

    def __init__(
        self,
        plan: Plan,
        model: Model | None = None,
        encoded: EncodedPairs | None = None,
        store: Store | None = None,
        checks: bool = True,
    ) -> None:
        self._plan, self._model, self._encoded, self._checks = plan, model, encoded, checks
        self._store = store
        self._shape = len(plan.rows), plan.pairs, plan.jobs, tuple(m.name for m in plan.metrics)
        self._entries: dict[int, Entry] = {}  # by the id of the group (its worlds) or batch
        self._keys: dict[int, str] = {}
        self.reasons: dict[str, int] = {}
        """Why batches are not kept for later runs → rows in such batches."""
        earlier = None if model is None else _INTERRUPTED.get(model, {}).get(self._shape)
        if store is not None or earlier:
            self._identify()
        self._earlier: tuple[Store, ...] = tuple(s for s in (store, earlier) if s is not None)

    @property
    def stored(self) -> int:
        """Rows that earlier runs have measured; files are looked for, not read."""
        return sum(len(b.jobs) for b in self._batches if any(self._keys.get(id(b), "") in s for s in self._earlier))

    def load(self) -> int:
        """Reads what earlier runs left; how many rows that is."""
        for step in (*map(id, self._plan.groups), *map(id, self._batches), CHECKS):
            found = self._take(step)
            if found is not None:
                self._entries[step] = found
        return sum(len(batch.jobs) for batch in self._batches if id(batch) in self._entries)

    def todo(self, numbers: Numbers, group: Group) -> list[Batch]:
        """Fills in what is known of a group; the batches that must be run."""
        self._fill_worlds(numbers, group)
        for batch in group.batches:
            if id(batch) in self._entries:
                _fill(numbers, batch, self._entries[id(batch)])
        return [batch for batch in group.batches if id(batch) not in self._entries]

    def needs_worlds(self, group: Group) -> bool:
        """Whether nothing is known of a group's worlds: no run has finished them."""
        return id(group) not in self._entries

    def runs(self, batch: Batch) -> list[int]:
        """The rows of each run that a finished batch was divided into for lack of memory; nothing if it was not."""
        return self._told(id(batch), "runs", [])  # type: ignore[no-any-return]  # of JSON

    def at_once(self, group: Group) -> int:
        """How many prompts of a group's worlds were run at once, if fewer than the budget allows; else 0."""
        return self._told(id(group), "at once", 0)  # type: ignore[no-any-return]  # of JSON

    def _told(self, step: int, fact: str, otherwise: Any) -> Any:
        found = self._entries.get(step)
        return json.loads(found.facts[fact]) if found is not None and fact in found.facts else otherwise

    def worlds(self, numbers: Numbers, group: Group, at_once: int = 0) -> None:
        """Keeps the baselines of a group once its worlds have run; those that were kept before stay as they were.

        Args:
            numbers: The run's.
            group: Of the worlds.
            at_once: How many prompts were run at once, if fewer than the budget allows.
        """
        if id(group) in self._entries:
            self._fill_worlds(numbers, group)
            return
        found = np.stack([baseline[list(group.pairs)] for baseline in numbers.baselines.values()])
        facts = {"worlds": json.dumps(list(numbers.baselines))} | ({"at once": str(at_once)} if at_once else {})
        self._keep(id(group), Entry({"baselines": torch.from_numpy(found)}, facts))

    @contextmanager
    def batch(self, numbers: Numbers, batch: Batch, runs: Sequence[int]) -> Iterator[None]:
        """Keeps what a batch leaves behind, once the block has ended well.

        Args:
            numbers: The run's.
            batch: What was measured.
            runs: In how many runs of how many rows each: several where memory had no room for one.
        """
        noise, fired, saved = numbers.noise, numbers.fired, numbers.saved
        numbers.noise, numbers.fired, numbers.saved = np.zeros_like(noise), 0, {}
        try:
            yield
            at = [job.row for job in batch.jobs], [job.pair for job in batch.jobs]
            place = {(job.row, job.pair): i for i, job in enumerate(batch.jobs)}
            tensors = {
                "values": torch.from_numpy(numbers.values[at]),
                "still": torch.from_numpy(numbers.still[at]),
                "noise": torch.from_numpy(numbers.noise),
            }
            live = {f"saved.{place[row, pair]}.{n}": one for (row, n, pair), one in numbers.saved.items()}
            facts = {"fired": str(numbers.fired)} | ({"runs": json.dumps(list(runs))} if len(runs) > 1 else {})
            self._keep(id(batch), Entry(tensors | live, facts))
        finally:
            numbers.noise = np.fmax(noise, numbers.noise)
            numbers.fired += fired
            saved.update(numbers.saved)
            numbers.saved = saved

    @property
    def checks(self) -> str | None:
        """What the checks of an earlier run found, if all of this one is of earlier runs."""
        found = self._entries.get(CHECKS)
        return None if found is None else found.facts["checks"]

    def finished(self, told: str, warned: list[warnings.WarningMessage]) -> None:
        """Ends a run: keeps what its checks found, unless they warned, and forgets what is in memory."""
        if self._model is not None:
            _INTERRUPTED.get(self._model, {}).pop(self._shape, None)
        if not warned and self.checks is None:
            self._keep(CHECKS, Entry({}, {"checks": told}))
        for one in warned:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def distrust(self, limits: NDArray[np.float64]) -> None:
        """Forgets what the next run is to measure again.

        That is the batches whose unpatched witness drifts by more than the limits, those of the rows that were measured
        once more, and the worlds that all of these were compared with.
        """
        sampled = {(job.row, job.pair) for job in self._plan.sample}
        for group in self._plan.groups:
            wrong = [
                batch
                for batch in group.batches
                if id(batch) in self._entries
                and (
                    (self._entries[id(batch)].tensors["noise"].numpy() > limits).any()
                    or any((job.row, job.pair) in sampled for job in batch.jobs)
                )
            ]
            for step in (*map(id, wrong), *([id(group)] if wrong else [])):
                self._entries.pop(step, None)
                for store in self._earlier if step in self._keys else ():
                    store.drop(self._keys[step])

    def interrupted(self) -> str:
        """Keeps in this process what no directory has, for the next run; what is there, in words."""
        if self._model is None:
            return ""
        done = sum(len(batch.jobs) for batch in self._batches if id(batch) in self._entries)
        lost = 0
        if self._entries:
            if not self._keys:
                self._identify()
            memory = _INTERRUPTED.setdefault(self._model, {}).setdefault(self._shape, Memory())
            for step, entry in self._entries.items():
                if step in self._keys and (self._store is None or self._keys[step] not in self._store):
                    memory.keep(self._keys[step], entry)
            lost = sum(len(b.jobs) for b in self._batches if id(b) in self._entries and id(b) not in self._keys)
        again = f", {lost:,} of them to be measured again" if lost else ""
        where = f"kept in {self._store}" if self._store is not None else "kept while this process lives"
        return (
            f"{done:,} of {plural(self._plan.jobs, 'row')} are measured and {where}{again}: the same call continues "
            "there. Of a recording p, p.run() does, and p.partial() gives the result so far."
        )

    def _keep(self, step: int, entry: Entry) -> None:
        self._entries[step] = entry
        if self._store is not None and step in self._keys:
            self._store.keep(self._keys[step], entry)

    def _take(self, step: int) -> Entry | None:
        key = self._keys.get(step)
        found = (store.take(key) for store in self._earlier) if key is not None else ()
        return next((entry for entry in found if entry is not None), None)

    @property
    def _batches(self) -> Iterator[Batch]:
        return (batch for group in self._plan.groups for batch in group.batches)

    def _fill_worlds(self, numbers: Numbers, group: Group) -> None:
        entry = self._entries.get(id(group))
        for world, found in (
            zip(json.loads(entry.facts["worlds"]), entry.tensors["baselines"], strict=True) if entry else ()
        ):
            numbers.baselines[world][list(group.pairs)] = found.numpy()

    def _identify(self) -> None:
        """Makes the keys: of the worlds of each group, of each batch, and of the checks of the whole."""
        assert self._model is not None
        assert self._encoded is not None
        plan, who = self._plan, Identities(self._model, PLACES)
        self._keys, self.reasons = {}, {}
        try:
            model = context(self._model, plan.eager)
            shared = who.of((model, plan.metrics, plan.worlds, self._checks, plan.budget, plan.row_bytes))
        except UnidentifiedError as error:
            self.reasons[str(error)] = plan.jobs
            return
        for group in plan.groups:
            rows = sum(len(batch.jobs) for batch in group.batches)
            try:
                place = {pair: i for i, pair in enumerate(group.pairs)}
                tokens = who.of(tuple(_tokens(self._encoded, pair) for pair in group.pairs))
                seated = tuple(place[job.pair] for world in group.edited for job in world)
                roots = tuple((world.name, world.root) for world in plan.edited)
                told = who.of((seated, roots, tuple(_referred(survey, group) for survey in plan.surveys)))
                worlds = _hash(shared, tokens, who.of(replace(group, batches=())), told)
            except UnidentifiedError as error:
                self.reasons[str(error)] = self.reasons.get(str(error), 0) + rows
                continue
            self._keys[id(group)] = worlds
            for batch in group.batches:
                raw = tuple(plan.rows[job.row].raw for job in batch.jobs)
                try:
                    everyone = batch.jobs if batch.table is None else batch.table.jobs
                    seated = tuple(place[job.pair] for job in everyone)
                    self._keys[id(batch)] = _hash(worlds, who.of(batch), who.of((seated, raw)))
                except UnidentifiedError as error:
                    self.reasons[str(error)] = self.reasons.get(str(error), 0) + len(batch.jobs)
        if not self.reasons:  # which rows the checks take depends on all of them, and on their numbers
            numbered = str([(job.row, job.pair) for batch in self._batches for job in batch.jobs])
            told = str([plan.model, plan.pairs, *(row.described for row in plan.rows)])
            self._keys[CHECKS] = _hash(*self._keys.values(), numbered, told, str(plan.proofs.tobytes()))


def _fill(numbers: Numbers, batch: Batch, entry: Entry) -> None:
    """Puts what a batch left behind into place."""
    at = [job.row for job in batch.jobs], [job.pair for job in batch.jobs]
    numbers.values[at] = entry.tensors["values"].numpy()
    numbers.still[at] = entry.tensors["still"].numpy()
    numbers.noise = np.fmax(numbers.noise, entry.tensors["noise"].numpy())
    numbers.fired += int(entry.facts["fired"])
    for name, live in entry.tensors.items():
        if name.startswith("saved."):
            job, number = (int(part) for part in name.split(".")[1:])
            numbers.saved[batch.jobs[job].row, number, batch.jobs[job].pair] = live


def _referred(survey: Survey, group: Group) -> tuple[Any, ...]:
    """Everything of a reference that runs of a group can see."""
    world = survey.world
    rows = tuple(world.row_of[pair] for pair in group.pairs)
    told = world.name, world.ids, world.encoder, world.rows, world.over, world.sides
    return *told, rows, survey.tallies, survey.runs, survey.until


def _tokens(encoded: EncodedPairs, pair: int) -> tuple[Any, ...]:
    """Everything of a pair that a run can see."""
    sides = (encoded.clean, *(() if encoded.corrupted is None else (encoded.corrupted,)), *encoded.encoder)
    return (*(side[pair] for side in sides), encoded.answer[pair], encoded.wrong[pair])


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:40]
