"""Runs whose activations and gradients are saved: ``tp.gradients``, and what it kept opened again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tracepatch.architecture import architecture_of
from tracepatch.attribution import stream_of
from tracepatch.cells import Direction, base_of, kinds_of
from tracepatch.errors import RecipeError, ResultError, listing
from tracepatch.estimators import AtP, RelP, held_of
from tracepatch.jobs import EAGER
from tracepatch.layout import Key
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model, fingerprint, name_of, require_ready, require_weights
from tracepatch.plan import Group
from tracepatch.prompts import Pairs
from tracepatch.reach import canonical
from tracepatch.recipe import Patching
from tracepatch.results import origin
from tracepatch.saved_gradients import INDEX, Gradients
from tracepatch.shelf import Part, Store, part_name
from tracepatch.sides import Op, Sides
from tracepatch.sites import Site, component
from tracepatch.slopes import Slopes


def gradients(
    model: Model,
    pairs: Pairs,
    metric: Metrics = logit_diff,
    components: str | Sequence[str] = ("resid_pre", "attn_out", "mlp_out", "z"),
    *,
    direction: Direction | str = "denoising",
    estimator: AtP | None = None,
    dtype: str | torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory: int | None = None,
) -> Gradients:
    """Saves clean and corrupted activations, and the metrics' gradients, of chosen components: one traced run a side.

    Args:
        model: From ``tp.load``.
        pairs: The prompts, with corrupted ones.
        metric: What is differentiated.
        components: What is saved, at every layer that has it.
        direction: ``"denoising"``: gradients of the corrupted run; ``"noising"``: of the clean run; ``"both"``.
        estimator: ``tp.AtP(hold=…)`` or ``tp.RelP(…)``: what is held in the backward pass, and the rules that
            gradients follow.
        dtype: Of what is saved: ``"float32"``, ``"bfloat16"``; the model's own otherwise.
        folder: Where the arrays are kept; in memory otherwise, or, beyond a gibibyte, in a temporary folder, memory
            mapped.
        memory: Bytes that a run may take; pairs are chunked accordingly.

    Raises:
        RecipeError: The pairs have no corrupted prompts, or the estimator takes more than one backward.
        ComponentError: The model does not have a component.
    """
    require_ready(model)
    require_weights(model)
    if direction != "both":
        base_of(direction)
    bases = ("corrupted", "clean") if direction == "both" else (base_of(direction),)
    how = estimator or AtP()
    if type(how) not in (AtP, RelP):
        raise RecipeError(f"{how.name} is no property of two runs: tp.gradients takes tp.AtP() or tp.RelP().")
    began = time.perf_counter()
    p = Patching(model, pairs, metric, memory=memory)
    p.encoded.world("corrupted")
    p.encoded.require_alike("tp.gradients", "Estimate without saving: tp.attribute aligns what it takes.")
    architecture, depth = p.architecture, len(p.architecture)
    names = tuple(dict.fromkeys(kind.name for kind in kinds_of(components)))
    keys: list[Key] = []
    for name in names:
        layers = range(depth) if component(name).layered else range(1)
        offered = [layer for layer in layers if architecture.offers(name, layer)]
        if not offered or name == "logits":
            architecture.require("logits_in" if name == "logits" else name, 0)
            raise RecipeError("logits are what the metric reads: save logits_in, or other components.")
        keys += [canonical(Site(name, layer), depth) for layer in offered]
    keys = list(dict.fromkeys(keys))
    lone = next((world for world in ("clean", "corrupted") if world not in bases), None)
    compared = any(need in ("clean", "corrupted") for m in p.metrics for need in m.needs)
    worlds = ("clean", "corrupted") if compared else (lone,) if lone else ()
    sides = Sides(model, architecture, p.encoded, p.metrics, worlds, wanted=keys, memory=memory)
    slopes = Slopes(architecture, *held_of(how, architecture))
    wanted = None if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    store = Store(None if folder is None else Path(folder))
    scores = {world: np.full((len(p.metrics), len(p.encoded)), np.nan) for world in ("clean", "corrupted")}
    numbers = range(len(p.metrics))
    labels: list[tuple[Any, ...]] = [("value", world, *key) for world in ("clean", "corrupted") for key in keys]
    labels += [("gradient", base, number, *key) for base in bases for number in numbers for key in keys]

    def build(group: Group) -> list[Op]:
        ops = sides.known(group, map(stream_of, keys) if lone else ())
        items: list[tuple[Any, ...]] = []
        if lone:
            items.append(sides.settled(group, lone, keys))
        ops += [sides.backward(group, base, slopes, keys) for base in bases]
        return [*ops, (("contract", (*items, *(("kept", label) for label in labels))), None)]

    def read(group: Group, ops: list[Op], found: list[Any]) -> None:
        for job, values in sides.values(ops, found):
            scores[job.base][:, job.pair] = values
        arrays = dict(zip(labels, found[-1][-len(labels) :], strict=True))
        store.add(
            group,
            sides.agreeing(group, bases[0]),
            {k: v if wanted is None else v.to(wanted) for k, v in arrays.items()},
        )

    eager = slopes.eager or any(name in EAGER for name, _ in keys)
    with store:
        sides.take(sides.groups(keys), build, read, eager=eager)
        attrs = {
            **origin(model, p.encoded, {}),
            "estimator": how.name,
            "cost": sides.cost,
            "metrics": json.dumps({m.name: m.told for m in p.metrics}),
            "seconds": round(time.perf_counter() - began, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        found = Gradients(names, bases, p.encoded, architecture, attrs, p.metrics, scores, store.parts)
        store.finish(found.write_index)
    return found


def open_gradients(
    folder: str | os.PathLike[str], model: Model, pairs: Pairs, metric: Metrics = logit_diff
) -> Gradients:
    """What ``tp.gradients`` kept in a folder, or ``Gradients.save`` wrote there; arrays are read when they are needed.

    Args:
        folder: The folder.
        model: The same model: its architecture labels the arrays; nothing is run.
        pairs: The same pairs.
        metric: The same metrics; their names are compared.

    Raises:
        ResultError: There is no such folder, it is damaged, or it is of another model, other pairs or other metrics.
    """
    source = Path(folder)
    if not (source / INDEX).is_file():
        raise ResultError(f"{source} holds no gradients: it has no {INDEX}.")
    p = Patching(model, pairs, metric)
    try:
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        tokens = [[list(ids) for ids in side or ()] for side in (p.encoded.clean, p.encoded.corrupted)]
        attrs, names = dict(index["attrs"]), [m.name for m in p.metrics]
        wrong = []
        if attrs["fingerprint"] != fingerprint(model):
            wrong.append(f"the model: it is of {attrs['model']}, with other weights than {name_of(model)}")
        if index["tokens"] != tokens:
            wrong.append("the pairs: their tokens are others")
        if index["metrics"] != names:
            wrong.append(f"the metrics: it is of {', '.join(index['metrics'])}, not of {', '.join(names)}")
        if wrong:
            raise ResultError(f"{source} does not fit.\n{listing(wrong)}")
        differing = [min(p.encoded.differing(pair), default=n) for pair, n in enumerate(p.encoded.lengths)]
        known = architecture_of(model).causal and not p.encoded.encoder
        parts = []
        for number, part in enumerate(index["parts"]):
            agreeing = torch.tensor([differing[pair] for pair in part["pairs"]]) if known else None
            file = source / part_name(number)
            with safe_open(file, "pt") as opened:
                opened.keys()
            parts.append(Part(tuple(part["pairs"]), part["length"], agreeing, file=file))
        scores = {world: np.array(array) for world, array in index["scores"].items()}
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise ResultError(f"{source} is damaged ({type(error).__name__}: {error}): save it once more.") from error
    given = tuple(index["components"]), tuple(index["bases"]), p.encoded, p.architecture, attrs
    return Gradients(*given, p.metrics, scores, parts)
