"""Every number against one plain forward per patch: each component, both directions, four trained toys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap, made_up_pairs
from tiny_models import ALL, EIGHT, ENCODER_DECODER, build, tokenizer

import tracepatch as tp
from tracepatch.architecture import architecture_of
from tracepatch.forms import allowed
from tracepatch.jobs import EAGER
from tracepatch.sites import SCALES
from tracepatch.sources import OTHER
from tracepatch.table import FORMS, Form

INSIDE = ("q_in", "k_in", "v_in", "q", "k", "v", "scores", "pattern")
BATCHES = {"gpt2": 7, "llama": None, "gpt_neox": 1, "gemma2": 64}


def sweep(p: tp.Patching, name: str, base: str, thin: int = 1) -> None:
    """Rows for every site of a component: single positions, all positions, slices, lists, single and "
    "several heads or neurons."""
    kind = tp.COMPONENTS[name]
    live, other = getattr(getattr(p, base), name), getattr(getattr(p, OTHER[base]), name)
    length = p.lengths[0]
    count = len(p.architecture) if kind.layered else 1
    layers = range(count) if count < 4 else (0, 2, count - 1)
    number = 0
    for layer in layers:
        if not p.architecture.offers(name, layer):
            continue
        spots: list[Any] = [
            *range(0, length, thin),
            -1,
            slice(None),
            slice(1, None, 2),
            [0, length - 1],
            slice(-3, None),
        ]
        count = p.architecture.units(name, layer)
        if kind.attends:
            for site in attending(length, count, thin):
                with p.row(component=name, number=number):
                    live[layer, *site] = other[layer, *site]
                number += 1
            continue
        units: list[Any] = [()] if not kind.unit else [(0,), (slice(None),)]
        if kind.unit and count > 1:
            units += [(count - 1,), ([0, count // 2],)]
        if kind.unit == "head":
            units += [(h,) for h in range(1, count - 1)]
        for unit in units:
            for spot in spots if unit in ((), (0,)) else [slice(None), -1]:
                site = (layer, spot, *unit) if kind.layered else (spot,)
                with p.row(component=name, number=number):
                    live[site] = other[site]
                number += 1


def attending(length: int, heads: int, thin: int) -> list[Any]:
    """Indices [head, dest, src]: single weights, whole destinations, whole heads, lists, and everything."""
    last = length - 1
    found: list[Any] = [(h, last, slice(None)) for h in range(heads)]
    found += [(0, length // 2, slice(None)), (heads - 1, slice(None), slice(None))]
    found += [(0, last, src) for src in range(0, length, thin)]
    found += [(slice(None), -1, slice(None)), (slice(None), slice(None), slice(None)), ([0, heads - 1], -1, [0, last])]
    return [
        *found,
        (0, slice(1, None), slice(2, -1)),
        (slice(None), sorted({last // 2, last}), 1),
        (heads - 1, slice(None), 0),
    ]


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_every_component_equals_one_forward_per_patch(name: str, base: str) -> None:
    model, pairs = toy(name), ioi_pairs(2)
    worst: dict[str, float] = {}
    for component in tp.COMPONENTS:
        # What norms divide by has an oracle of its own, in test_freezes.
        if component in SCALES or not any(architecture_of(model).offers(component, i) for i in range(2)):
            continue
        with tp.patching(model, pairs, batch_size=BATCHES[name]) as p:
            sweep(p, component, base, thin=5)
        compare(model, [p], worst)
    assert len(worst) >= 19, worst


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", EIGHT)
def test_every_component_on_eight_architectures(model_type: str, base: str) -> None:
    """Random weights, so that nothing is hidden by a trained model's habits; 11 layers once, for digits in paths."""
    one_architecture(model_type, base, layers=11 if model_type == "llama" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", [t for t in ALL if t not in ENCODER_DECODER])
def test_every_form_on_every_decoder(model_type: str, base: str) -> None:
    one_architecture(model_type, base, layers=2, forms=FORMS)


def one_architecture(model_type: str, base: str, layers: int, forms: Sequence[Form | None] = (None,)) -> None:
    """Every component that is offered, against the oracle, in every form that the model allows of those asked for."""
    module = build(model_type, layers=layers)
    model = tp.load(module, tokenizer())
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    worst: dict[str, float] = {}
    places = reference.PLACES[model_type]
    for component in (c for c in tp.COMPONENTS if c not in SCALES):
        if component in INSIDE and not places.interface:
            continue  # attention in code of its own is beyond the oracle: test_readers has laws for it
        if component == "attn_in" and not places.attn:
            continue  # so is what a mixer reads
        if not any(architecture_of(model).offers(component, i) for i in range(2)):
            continue
        recorded = []
        for form in forms:
            if form in allowed(model, architecture_of(model), component in EAGER).refused:
                continue
            with tp.patching(model, pairs, form=form) as p:
                sweep(p, component, base, thin=4)
            recorded.append(p)
        compare(model, recorded, worst)


def compare(model: Any, recorded: Sequence[tp.Patching], worst: dict[str, float]) -> None:
    """The numbers of some plans of the same rows against the oracle's; also that something happened at all."""
    p = recorded[0]
    slow = Slow(tp.models.module_of(model), p.encoded, eager=p.rows[0].labels["component"] in ("scores", "pattern"))
    wanted = slow.score(p.rows, gap(p.encoded))
    scale = 1 + wanted.abs().max()
    name = str(p.rows[0].labels["component"])
    for one in recorded:
        found = torch.tensor(one.run()["value"].isel(component=0).values).T
        error = (found - wanted).abs().max() / scale
        worst[name] = max(worst.get(name, 0), float(error))
        assert error < 1e-5, f"{name}, {one.plan.groups[0].batches[0].form}: {error:.2g}"
    bases = torch.stack([gap(p.encoded)(slow.base(p.rows[0].base, i), i) for i in range(len(p.encoded))])
    assert (wanted - bases).abs().max() > 1e-3, f"{name}: no patch moved the metric, so this compared nothing"
