"""What a user writes: ``tp.patching``, ``@tp.recipe`` and ``tp.patch``."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from tracepatch.architecture import architecture_of
from tracepatch.cells import Cells, Direction, base_of
from tracepatch.checks import verify
from tracepatch.entries import Directory
from tracepatch.errors import RecipeError, plural
from tracepatch.estimators import AtP
from tracepatch.executors import run, so_far
from tracepatch.forms import chosen, unending
from tracepatch.journal import Journal, Measured
from tracepatch.metrics import Metrics, as_metrics, logit_diff
from tracepatch.models import (
    Model,
    device_of,
    limits,
    module_of,
    name_of,
    remote_of,
    require_ready,
    require_weights,
    room_of,
    start_token,
)
from tracepatch.plan import Plan
from tracepatch.planner import make_plan
from tracepatch.progress import bar
from tracepatch.prompts import Pairs, require_pairs
from tracepatch.recording import Recorder
from tracepatch.requests import place
from tracepatch.results import Result, provenance, to_result
from tracepatch.rowwise import estimated
from tracepatch.saves import hand_out, together
from tracepatch.scripts import script
from tracepatch.shipping import require_shippable
from tracepatch.sources import WorldName
from tracepatch.table import FORMS, Form
from tracepatch.trials import require_measure
from tracepatch.weights import weightless
from tracepatch.worlds import fitted

_PACES: WeakKeyDictionary[Model, float] = WeakKeyDictionary()


class Patching(Recorder):
    """A recording context that is planned when its block ends, and run when asked to."""

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        metric: Metrics = logit_diff,
        *,
        prune: bool = True,
        batch_size: int | None = None,
        memory: int | None = None,
        checks: bool = True,
        form: Form | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if form is not None and form not in FORMS:
            raise RecipeError(f"form is one of {', '.join(FORMS)}, not {form!r}; without it, the fastest is taken.")
        self._wanted = form
        require_ready(model)
        self._directory = None if directory is None else Directory(directory)
        self.model = model
        encoded = require_pairs(pairs).encode(model.tokenizer, start_token(model))
        super().__init__(architecture_of(model), encoded)
        self.encoded.require_within(*limits(model))
        self.metrics = tuple(fitted(one, self.architecture, encoded) for one in as_metrics(metric))
        self.seen = tuple(one.site for one in self.metrics if one.site is not None)
        device = "cpu" if weightless(module_of(model)) else device_of(model)
        for one in self.metrics:
            require_measure(one, self.architecture.vocab, self.sides, self._shape, device)
        memory = room_of(model) if memory is None else memory
        self._limits: dict[str, Any] = {"prune": prune, "batch_size": batch_size, "memory": memory}
        self._checks = checks
        self._plan: Plan | None = None
        self._measured: Measured | None = None
        self._journal: Journal | None = None  # of a run that did not end

    @property
    def plan(self) -> Plan:
        """What will be traced; there once the block has ended."""
        if self._plan is None:
            raise RecipeError("The recipe is still being recorded: it has a plan, and can run, after the `with` block.")
        return self._plan

    def __enter__(self) -> Patching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._plan = self.make_plan()
            self._ended = True
            if self._directory is not None:
                self._tell(self._new_journal(), None)
            # Without the model: rows may outlive it.
            write = partial(
                script,
                architecture=self.architecture,
                encoded=self.encoded,
                metrics=self.metrics,
                model=name_of(self.model),
                edited=self.edited,
                references=self.references,
            )
            for row in self.rows:
                row._script = write

    @property
    def remote(self) -> bool:
        """Whether it runs on a server."""
        return bool(remote_of(self.model))

    def make_plan(self) -> Plan:
        """The plan of the rows recorded so far."""
        edits = [e for row in (*self.rows, *self.edited.values()) for e in row.edits]
        sites = [e.site for e in edits] + [s.site for row in self.rows for s in row.saves] + [*self.seen]
        form, why = chosen(self.model, self.architecture, sites, self._wanted, bool(self.edited))
        of_logits = any(one.site is None for one in self.metrics)
        plan = make_plan(
            self.architecture,
            self.encoded,
            self.rows,
            self.metrics,
            model=name_of(self.model),
            remote=place(self.model) if remote_of(self.model) else "",
            edited=tuple(self.edited.values()),
            form=form,
            why=why,
            device=device_of(self.model).type,
            pace=_PACES.get(self.model),
            ends="" if of_logits and not self.references else unending(self.model, self.architecture),
            references=tuple(self.references.values()),
            **self._limits,
        )
        if plan.remote:
            require_shippable(plan)
        return plan

    def run(self, progress: bool | None = None) -> Result:
        """Traces what the plan says and returns the labelled result (``tp.results.to_result`` describes it).

        What is finished when it fails, or is interrupted by Ctrl-C, is kept: the next call continues there. With
        ``directory=`` that holds for other processes too, whatever ended this one.

        Args:
            progress: Whether to show a bar; by default only on a terminal.

        Raises:
            RecipeError: The block has not ended, or nothing can be written in the directory.
            ModelError: The model is in training mode, or has no weights here and is on no server.
            MeasurementError: A number came out NaN or inf, or a check failed.
        """
        plan = self.plan
        require_ready(self.model)
        require_weights(self.model)
        if self._directory is not None:
            self._directory.open()
        journal = self._journal = self._new_journal()
        self._measured = None
        plan.measured.clear()
        stored = journal.load()
        try:
            with bar(plan.jobs, name_of(self.model), progress, stored) as told_to:
                given = self.architecture, self.encoded, plan
                measured = run(
                    self.model, *given, told_to.advance, checks=self._checks, journal=journal, say=told_to.say
                )
            told = journal.checks
            found: list[warnings.WarningMessage] = []
            if told is None:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    told = verify(*given, measured, journal) if self._checks else "off"
        except BaseException as error:  # Ctrl-C too
            error.add_note(journal.interrupted())
            raise
        self._tell(journal, stored)
        journal.finished(told, found)
        plan.measured.update(seconds=measured.seconds, forwards=measured.forwards, peak=measured.peak, checks=told)
        if plan.jobs and not stored and not plan.remote:  # a queue says nothing of the model
            _PACES[self.model] = measured.seconds / plan.estimate.seconds * (plan.estimate.pace or 1)
        self._measured, self._journal = measured, None
        hand_out(plan.rows, measured.saved, self.architecture, self.encoded, self._roots)
        return to_result(self.model, self.architecture, self.encoded, plan, measured)

    def estimate(self, estimator: AtP | None = None) -> Result:
        """Estimates the effect of every row from a few forwards and backwards, instead of measuring it.

        The first-order term of each edit: gradient at the base world · (what would be written − what is there), summed
        over a row's edits. In an edited world it is the gradient there, so that what is frozen in it stays. The result
        has the labels of ``run`` and ``estimate`` in place of ``effect``; ``tp.audit`` says how far to trust it.

        Args:
            estimator: ``tp.AtP()`` unless said otherwise, ``tp.RelP()``, or
                ``tp.IntegratedGradients(steps=…, along="site")``, which converges to the exact effect.

        Raises:
            RecipeError: A row cannot be estimated; each is named, with the reason.
        """
        plan = self.plan
        require_ready(self.model)
        require_weights(self.model)
        given = self.model, self.architecture, self.encoded, plan
        return estimated(*given, estimator or AtP(), self._limits["memory"])

    def partial(self) -> Result:
        """The result as far as it is measured; nothing is run.

        After Ctrl-C or an error in ``run`` it has what that run finished; with ``directory=`` what any run has, even
        one that goes on in another process. A cell that is not measured yet has ``status`` 3 and NaN. What rows save is
        there only after a whole run.

        Raises:
            RecipeError: The block has not ended.
        """
        plan, measured = self.plan, self._measured
        if measured is None:
            journal = self._journal or self._new_journal()
            if self._journal is None:
                self._tell(journal, journal.load())
            measured = so_far(self.model, self.architecture, self.encoded, plan, journal)
        return to_result(self.model, self.architecture, self.encoded, plan, measured)

    @property
    def _roots(self) -> dict[WorldName, WorldName]:
        """Edited world → the world whose prompts it has."""
        return {name: world.root for name, world in self.edited.items()}

    def _new_journal(self) -> Journal:
        return Journal(self.plan, self.model, self.encoded, self._directory, self._checks)

    def _tell(self, journal: Journal, stored: int | None) -> None:
        """Adds to the plan what is taken from earlier runs, and what cannot be kept in the directory."""
        self.plan.measured["stored"] = journal.stored if stored is None else stored
        if self._directory is not None:
            why = (f"{plural(n, 'row')}, measured anew each time: {text}" for text, n in journal.reasons.items())
            self.plan.measured.update(directory=str(self._directory), unstored=tuple(why))

    @property
    def saved(self) -> Result:
        """Everything that rows saved, by name: ``tracepatch.saves.together`` describes it.

        Raises:
            RecipeError: Nothing is saved, or nothing has run yet.
        """
        if not any(row.saves for row in self.rows):
            raise RecipeError("No row saves anything: write `p.save(...)` inside `with p.row(...):`.")
        if self._measured is None:
            raise RecipeError("Nothing has run yet: what rows save is there after p.run().")
        attrs = provenance(self.model, self.encoded, self.plan, self._measured)
        given = self.architecture, self.encoded, self._roots
        return together(self.plan.rows, self._measured.saved, *given, attrs)


def patching(model: Model, pairs: Pairs, metric: Metrics = logit_diff, **options: Any) -> Patching:
    """A context in which assignments between worlds are recorded as patches.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        metric: What is read, of the logits or of activations: one metric or function, several, or a mapping of names.
        options: ``prune=False`` measures every row; ``batch_size`` rows bound a traced run, and
            ``memory`` bytes what is taken, half by the worlds' values and half by a run;
            ``checks=False`` leaves out the self-checks, about one forward of two rows; ``form`` is ``"packed"``,
            ``"staggered"`` or ``"flat"`` instead of the fastest that the model allows (``tracepatch.table``);
            ``directory`` is a folder where finished batches are kept, so that a run that was interrupted, even killed,
            continues where it stopped, and one that ran before runs nothing.

    Raises:
        ModelError: The model is in training mode or is no traced model.
        PromptError: The pairs cannot be compared.
        MetricError: A metric has the wrong shape.
    """
    return Patching(model, pairs, metric, **options)


class Recipe:
    """An experiment without a model in it, to be applied to any: a function of the recording context.

    Called with a recording context it records into it, so that recipes can be combined; called with a model and pairs
    it is planned and run.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(
        self, target: Recorder | Model, pairs: Pairs | None = None, metric: Metrics = logit_diff, **options: Any
    ) -> Any:
        """Runs the recipe on a model and pairs, or records it into a context.

        Args:
            target: A model from ``tp.load``, or the context of ``tp.patching``.
            pairs: The prompts.
            metric: What is read.
            options: The recipe's own arguments, and those of ``tp.patching``; ``progress`` as in ``Patching.run``.

        Returns:
            The result; nothing where it was recorded into a context.
        """
        if isinstance(target, Recorder):
            self.function(target, **options)
            return None
        progress = options.pop("progress", None)
        return self._record(target, pairs, metric, options).run(progress)

    def plan(self, model: Model, pairs: Pairs, metric: Metrics = logit_diff, **options: Any) -> Plan:
        """What running the recipe would trace; nothing is traced."""
        return self._record(model, pairs, metric, options).plan

    def estimate(
        self,
        model: Model,
        pairs: Pairs,
        metric: Metrics = logit_diff,
        *,
        estimator: AtP | None = None,
        **options: Any,
    ) -> Result:
        """The recipe's rows on a model, estimated instead of measured; see ``Patching.estimate``."""
        return self._record(model, pairs, metric, options).estimate(estimator)

    def _record(self, model: Model, pairs: Pairs | None, metric: Metrics, options: dict[str, Any]) -> Patching:
        own = ("prune", "batch_size", "memory", "checks", "form", "directory")
        limits = {k: options.pop(k) for k in own if k in options}
        with Patching(model, require_pairs(pairs), metric, **limits) as p:
            self.function(p, **options)
        return p

    def __repr__(self) -> str:
        summary = (self.function.__doc__ or "").strip().split("\n")[0]
        return f"<recipe {self.__name__}: {summary}>"  # type: ignore[attr-defined]  # update_wrapper sets it


def recipe(function: Callable[..., None]) -> Recipe:
    """Makes a function of a recording context into a recipe that can be applied to any model."""
    return Recipe(function)


def patch(
    model: Model,
    pairs: Pairs,
    components: str | Sequence[str],
    metric: Metrics = logit_diff,
    *,
    by: str | Sequence[str] | None = None,
    direction: Direction = "denoising",
    source: Any = None,
    only: dict[str, Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Any:
    """Patches every site of a component, one at a time: the sweep that most questions start with.

    Args:
        model: From ``tp.load``.
        pairs: The prompts.
        components: One component, or several with the same dims.
        metric: What is read.
        by: The dims to run over; positions, heads and neurons that are left out are patched whole. By default layer ×
            pos, for heads layer × head, for neurons layer × neuron. ``span`` instead of ``pos`` runs over the named
            spans of the pairs.
        direction: ``"denoising"`` writes clean values into the corrupted run, ``"noising"`` corrupted values into the
            clean run.
        source: Something else to write: ``0``, a tensor, ``tp.mean(prompts)`` or ``tp.resample(prompts)``; the
            direction still says which run is edited.
        only: Dims and the indices to keep, as in ``{"layer": slice(0, 4)}``.
        progress: Whether to show a bar; by default only on a terminal.
        options: Those of ``tp.patching``.

    Where the positions of a pair's prompts do not correspond one to one (``align=…`` of ``tp.Pairs``), positions are
    those of the run that is edited, and what is written is their partners' value.

    Returns:
        The result, with a dim for each of ``by``, and ``component`` where there are several.
    """
    base_of(direction)  # before anything is loaded into the recorder
    with Patching(model, pairs, metric, **options) as p:
        Cells.of(p, components, by, direction, source, only).record(p)
    return p.run(progress)
