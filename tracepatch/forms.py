"""Which forms of a batch a model allows: found by trying each on the model itself, or on its shrunken twin.

A few rows of a few made-up tokens are measured as whole prompts, and again in each form. A form that gives other
logits, or fails, is not used, and the plan says so. It is tried once for each class and config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.architecture import Architecture, architecture_of
from tracepatch.errors import MeasurementError, RecipeError
from tracepatch.executors import run
from tracepatch.jobs import EAGER
from tracepatch.layout import stops
from tracepatch.metrics import Given, Metric
from tracepatch.models import Model, module_of, remote_of
from tracepatch.planner import make_plan
from tracepatch.probe import resolution
from tracepatch.recording import Recorder
from tracepatch.sites import Site
from tracepatch.table import FORMS, Form
from tracepatch.tokens import BosPolicy, EncodedPairs
from tracepatch.trace import PLAIN, forward, named
from tracepatch.twins import Twin
from tracepatch.weights import weightless

LENGTH, DIFFER = 9, (2, 5)  # of the prompts that are tried, and where the two of each pair differ
READ = 8  # logits that are compared
_ENDS: dict[tuple[str, str], str] = {}
_KNOWN: dict[tuple[str, str, bool, Form | None, str], Allowed] = {}


@dataclass(frozen=True)
class Allowed:
    """What a model allows.

    Attributes:
        form: The fastest form that gives the same numbers, of those that were tried.
        refused: Each faster one → why it is not used, in one clause.
        passing: Whether it may be otherwise another time: memory ran out in a trial.
    """

    form: Form
    refused: dict[Form, str]
    passing: bool = False


def chosen(
    model: Model, architecture: Architecture, sites: Iterable[Site], wanted: Form | None, worlds: bool = False
) -> tuple[Form, tuple[str, ...]]:
    """The form of a plan's batches: the fastest that the model allows, or the one that was asked for.

    Args:
        model: The model.
        architecture: Of it.
        sites: What is edited and saved.
        wanted: The form that was asked for, if one was.
        worlds: Whether there are edited worlds, whose keys and values a server's sandbox does not give away.

    Returns:
        The form, and why it is not a faster one.

    Raises:
        RecipeError: The model does not allow what was asked for.
    """
    if wanted is None and worlds and remote_of(model):
        return "flat", (
            "not packed: ordinary keys run in a sandbox, which keeps no keys and values of edited worlds; where the "
            "server trusts yours, pass form='packed'",
        )
    found = allowed(model, architecture, any(site.component in EAGER for site in sites), wanted)
    if wanted is None:
        return found.form, tuple(f"not {form}: {reason}" for form, reason in found.refused.items())
    if wanted in found.refused:
        raise RecipeError(
            f"form={wanted!r} does not do on this model: {found.refused[wanted]}. Leave form= out: then it is the "
            "fastest that does."
        )
    return wanted, ()


def allowed(model: Model, architecture: Architecture, eager: bool = False, only: Form | None = None) -> Allowed:
    """The forms that a model allows, tried once for each class and config.

    Args:
        model: The model; one without weights here is tried on its twin.
        architecture: Of the model.
        eager: Whether attention is computed step by step.
        only: The one form to try, instead of all from the fastest on.
    """
    module = module_of(model)
    config = {k: v for k, v in module.config.to_dict().items() if not k.startswith("_name")}
    kind = f"{type(module).__name__} {architecture.dtype} {module.config._attn_implementation}"
    reason = _never(architecture)  # of this model: what was proved of it need not hold of others of its class
    key = kind, json.dumps(config, sort_keys=True, default=str), eager, only, reason
    if key not in _KNOWN:
        tables = FORMS[:-1] if only is None else tuple(form for form in FORMS[:-1] if form == only)
        found = Allowed("flat", dict.fromkeys(tables, reason)) if reason else _tried(model, architecture, eager, tables)
        if found.passing:
            return found
        _KNOWN[key] = found
    return _KNOWN[key]


def unending(model: Model, architecture: Architecture) -> str:
    """Why a forward of a model cannot end below its last layer, in words; empty if it can. Tried once, as forms are.

    What is above is skipped: every block hands on what it was given. Some models take more of a block than that.
    """
    module = module_of(model)
    config = {k: v for k, v in module.config.to_dict().items() if not k.startswith("_name")}
    key = type(module).__name__, json.dumps(config, sort_keys=True, default=str)
    if key not in _ENDS:
        if weightless(module):
            model = Twin(model).model
            architecture = architecture_of(model)
        ids = torch.ones(1, LENGTH, dtype=torch.long)
        visited = stops(architecture, [("resid_pre", 1)], {}, until=1)
        inputs = named(ids, ids if architecture.encodes else None)
        try:
            forward(model, (inputs, visited, ("none", None), *PLAIN), {})
            _ENDS[key] = ""
        except Exception as error:  # whatever the model's code raises
            _ENDS[key] = _failed(error)
    return _ENDS[key]


def _failed(error: Exception) -> str:
    """A failure of the model's code, in a clause."""
    cause = error.__cause__ or error
    said = (str(cause).strip().splitlines() or [""])[0].split(".")[0]
    said = said if len(said) <= 60 else said[:59] + "…"
    return f"the model's code fails ({type(cause).__name__}: {said})"


def _never(architecture: Architecture) -> str:
    """Why a model allows no tables, whatever its code does; empty if it may."""
    if architecture.encodes:
        return "an encoder reads the prompts"
    if not architecture.causal:
        return "what stands before an edit is not proved to be unmoved by it"
    if any(layer.sublayer("attn") is None for layer in architecture.layers):
        return "layers without softmax attention keep a state of their own"
    return ""


def _tried(model: Model, architecture: Architecture, eager: bool, tables: tuple[Form, ...]) -> Allowed:
    if not tables:
        return Allowed("flat", {})
    if weightless(module_of(model)):
        model = Twin(model).model
        architecture = architecture_of(model)
    recorder = _rows(architecture, eager)
    if not recorder.rows:
        return Allowed("flat", dict.fromkeys(tables, "nothing is offered that could be tried"))
    try:
        wanted = _measured(model, recorder, "flat")
    except MeasurementError as error:
        said = str(error).splitlines()[0]
        why = f"it could not be tried, for {said[0].lower()}{said[1:]}"
        return Allowed("flat", dict.fromkeys(tables, why), _passes(error))
    few = [row.number for row in recorder.rows if row.sites[0].component == "resid_pre"]
    scale = 1 + np.abs(wanted).max()
    refused: dict[Form, str] = {}
    passing = False
    for form in tables:
        try:
            # Rows are tried in the run that computes their worlds, and in one that sees these in a cache; some without
            # those of an MLP, in whose batch the last one is computed for the tokens alone that are read.
            ways = (True, False) if form == "packed" else (False,)
            gaps = [np.abs(_measured(model, recorder, form, rides) - wanted) for rides in ways]
            gaps += [np.abs(_measured(model, recorder, form, rides, few) - wanted[few]) for rides in ways]
        except Exception as error:  # whatever the model's code raises
            refused[form], passing = _failed(error), passing or _passes(error)
            continue
        gap = max(one.max() for one in gaps) / scale
        if gap <= 2 * resolution(architecture.dtype):
            return Allowed(form, refused, passing)
        refused[form] = f"it gives other logits (off by {gap:.1g} of their scale)"
    return Allowed("flat", refused, passing)


def _passes(error: Exception) -> bool:
    """Whether a failure says nothing of the model, as memory had no room at that time."""
    return isinstance(error.__cause__ or error, (torch.OutOfMemoryError, MemoryError))


def _rows(architecture: Architecture, eager: bool) -> Recorder:
    """Rows of several starts, layers, bases and pairs."""
    generator = torch.Generator().manual_seed(0)
    low, high = architecture.vocab // 4, max(architecture.vocab // 2, architecture.vocab // 4 + 2)
    clean = torch.randint(low, high, (2, LENGTH), generator=generator)
    corrupted = clean.clone()
    for pair, position in enumerate(DIFFER):
        corrupted[pair, position] = low + (clean[pair, position] + 1 - low) % (high - low)
    sides: list[Any] = [tuple(map(tuple, ids.tolist())) for ids in (clean, corrupted)]
    encoded = EncodedPairs(
        clean_prompts=sides[0],
        corrupted_prompts=sides[1],
        tokenizer=None,
        clean=sides[0],
        corrupted=sides[1],
        answer=((), ()),
        wrong=((), ()),
        bos=BosPolicy((), "", "token ids are taken as they are"),
    )
    recorder, depth = Recorder(architecture, encoded), len(architecture)
    names = ("resid_pre", "z", "mlp_out", *(("scores", "pattern") if eager else ()))
    number = 0
    for layer in sorted({0, depth // 2, depth - 1}):
        for name in (n for n in names if architecture.offers(n, layer)):
            for position in (DIFFER[0], DIFFER[1], LENGTH - 1):
                for base, other in ((recorder.clean, recorder.corrupted), (recorder.corrupted, recorder.clean)):
                    unit = position % max(1, architecture.units(name, layer))
                    attends = name in ("scores", "pattern")
                    where: Any = (unit, position) if attends else (position, unit) if name == "z" else (position,)
                    with recorder.row(number=number):
                        getattr(base, name)[(layer, *where)] = getattr(other, name)[(layer, *where)]
                    number += 1
    return recorder


def _measured(
    model: Model, recorder: Recorder, form: Form, rides: bool = True, numbers: list[int] | None = None
) -> NDArray[np.float64]:
    architecture = recorder.architecture
    rows = recorder.rows if numbers is None else [recorder.rows[number] for number in numbers]
    ids = tuple(range(1, architecture.vocab, max(1, architecture.vocab // READ)))[:READ]

    def each(logits: torch.Tensor, given: Given) -> torch.Tensor:
        return logits[:, 0]

    read = Metric("logits", "logits", each, parts=tuple(map(str, ids[1:])), vocab=ids)
    plan = make_plan(architecture, recorder.encoded, rows, (read,), form=form, rides=rides)
    return run(model, architecture, recorder.encoded, plan, checks=False).values
