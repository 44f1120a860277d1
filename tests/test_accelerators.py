"""What only an accelerator has: its allocator's peak, its own lack of memory, and models that lie on two devices.

``TRACEPATCH_DEVICE=cuda python -m pytest`` runs the models of most other tests there too, against oracles on the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_memory
import torch
from conftest import ioi_pairs
from test_memory import EVERYTHING, long_pairs

import tracepatch as tp
from tracepatch.architecture import architecture_of
from tracepatch.forms import allowed
from tracepatch.models import module_of, room_of
from tracepatch.table import FORMS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
BUDGET = 40_000_000


@pytest.fixture(autouse=True)
def _all_of_its_memory() -> Iterator[None]:
    """Frees what earlier tests left, and lifts the limit that a test may set."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def wide() -> Any:
    """The model of ``test_memory``, there."""
    model = test_memory.wide()
    module_of(model).cuda()
    return model


def sweep(model: Any, **options: Any) -> Any:
    options = {"by": ("layer", "head", "pos"), "progress": False} | options
    return tp.patch(model, long_pairs(), "z", EVERYTHING, **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_allocators_peak_stays_under_the_budget(form: Any) -> None:
    model = wide()
    sweep(model, only={"layer": [0], "pos": [0]}, memory=BUDGET, form=form)  # what is kept for good comes first
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bounded = sweep(model, memory=BUDGET, form=form)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0 < peak <= BUDGET
    if form == "packed":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        whole = sweep(model, memory=1 << 50, batch_size=1 << 30)
        assert torch.cuda.max_memory_allocated() - before >= 10 * BUDGET
        np.testing.assert_allclose(bounded["value"], whole["value"], rtol=1e-5)


def test_a_plan_tells_the_peak_that_was_seen() -> None:
    with tp.patching(wide(), long_pairs(), EVERYTHING, memory=BUDGET) as p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    assert room_of(p.model) == int(torch.cuda.get_device_properties(0).total_memory - weights(p.model)) // 2
    p.run(progress=False)
    peak = p.plan.measured["peak"]
    assert 0 < peak <= BUDGET
    assert "measured" in p.plan.explain()


def weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module_of(model).parameters())


def test_what_does_not_fit_is_split_and_retried() -> None:
    model = wide()
    wanted = sweep(model, memory=BUDGET)
    gc.collect()
    torch.cuda.empty_cache()
    allowance = torch.cuda.memory_reserved() + 300_000_000
    torch.cuda.set_per_process_memory_fraction(allowance / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(400_000_000, dtype=torch.uint8, device="cuda")
    found = sweep(model, memory=1 << 50, batch_size=1 << 30)
    np.testing.assert_allclose(found["value"], wanted["value"], rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_an_accelerator_gives_the_numbers_of_a_processor(name: str) -> None:
    here, there = tp.toys.load(name), tp.toys.load(name)
    module_of(there).cuda()
    pairs = ioi_pairs(3)
    assert allowed(there, architecture_of(there)).form == allowed(here, architecture_of(here)).form
    for component in ("resid_pre", "z", "q", "k", "v", "pattern", "head_out", "mlp_out"):
        a, b = tp.patch(here, pairs, component), tp.patch(there, pairs, component)
        assert (a["status"] == b["status"]).all()
        scale = float(abs(a["clean"]).max())
        np.testing.assert_allclose(b["value"], a["value"], atol=2e-5 * scale)
        a, b = tp.attribute(here, pairs, component), tp.attribute(there, pairs, component)
        np.testing.assert_allclose(b["estimate"], a["estimate"], atol=1e-4 * scale)
    a, b = tp.edges(here, pairs), tp.edges(there, pairs)
    np.testing.assert_allclose(b["estimate"], a["estimate"], atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_16_bits_are_off_by_their_rounding(name: str, dtype: torch.dtype) -> None:
    single, half = tp.toys.load(name), tp.toys.load(name, dtype=dtype)
    module_of(half).cuda()
    pairs = ioi_pairs(3)
    for component in ("resid_pre", "z"):
        a, b = tp.patch(single, pairs, component), tp.patch(half, pairs, component)
        scale = float(abs(a["clean"]).max())
        assert float(abs(a["value"] - b["value"]).max()) <= 16 * torch.finfo(dtype).eps * scale
        assert float(abs(a["value"] - b["value"]).max()) > 0


def test_a_model_on_two_devices() -> None:
    pytest.importorskip("accelerate")
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "cpu")
    model, plain, pairs = tp.toys.load("llama", device_map=places), tp.toys.load("llama"), ioi_pairs(2)
    for component in ("resid_pre", "z", "q", "head_out", "mlp_in", "logits_in", "pattern"):
        found, wanted = tp.patch(model, pairs, component), tp.patch(plain, pairs, component)
        assert (found["status"] == wanted["status"]).all()
        np.testing.assert_allclose(found["value"], wanted["value"], atol=1e-4)
    found, wanted = tp.attribute(model, pairs, "z"), tp.attribute(plain, pairs, "z")
    np.testing.assert_allclose(found["estimate"], wanted["estimate"], atol=1e-4)


def test_noise_is_the_same_on_every_device() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, pairs = tp.toys.load("gpt2"), ioi_pairs(2)
        module_of(model).to(device)
        with tp.patching(model, pairs) as p:
            noised = p.world("noised", of=p.clean)
            noised.embed[2:5] += p.gaussian(3, of="embed", draws=4)
            for layer, pos in p.grid("resid_pre", pos=[3, -1]):
                with p.row(layer=layer, pos=pos):
                    noised.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
        results.append(p.run(progress=False))
    np.testing.assert_allclose(results[1]["value"], results[0]["value"], atol=1e-4)
