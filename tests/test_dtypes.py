"""Models of 16 bits: the same places, the same laws, and numbers that are off by their dtype's rounding and no more."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import PLACES
from slow import Slow, gap, made_up_pairs
from test_architecture import captured
from tiny_models import ALL, EIGHT, ENCODER_DECODER, EXPERTS, build, tokenizer

import tracepatch as tp
from tracepatch.architecture import architecture_of
from tracepatch.attention import INSIDE
from tracepatch.probe import Sublayer
from tracepatch.sites import SCALES, SPLIT_READERS

DECODERS = [t for t in ALL if t not in ENCODER_DECODER]
TYPES = [t if t in EIGHT else pytest.param(t, marks=pytest.mark.slow) for t in DECODERS]
DTYPES = [torch.bfloat16, torch.float16]
named = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
PAIRS = made_up_pairs([f"w{i}" for i in range(30, 60)])


def model_of(model_type: str, dtype: torch.dtype, layers: int = 2) -> Any:
    return tp.load(build(model_type, layers=layers, dtype=dtype), tokenizer())


def everywhere(p: tp.Patching, target: Any, source: Any) -> list[str]:
    """Rows for each component: all of it, one position of it, its first and its last head or neuron; their components."""
    names = []
    for name, kind in tp.COMPONENTS.items():
        places = PLACES[p.architecture.model_type]
        inside = not places.interface and name in (*SPLIT_READERS, *INSIDE)
        # The oracle of scales is in test_freezes; attention in code of its own, and what a mixer reads, has none.
        if name in SCALES or inside or (name == "attn_in" and not places.attn):
            continue
        for layer in range(len(p.architecture)) if kind.layered else range(1):
            if not p.architecture.offers(name, layer):
                continue
            last = p.architecture.units(name, layer) - 1
            for pos, *unit in ((slice(None),), (4, 0), (slice(None), last)) if kind.unit else ((slice(None),), (4,)):
                site = (layer, pos, *unit) if kind.layered else (pos,)
                if kind.attends:
                    site = (layer, *(unit or [slice(None)]), pos)
                with p.row(number=len(p.rows)):
                    getattr(target, name)[site] = getattr(source, name)[site]
                names.append(name)
    return names


def near(off: torch.Tensor, like: torch.Tensor, roundings: float, dtype: torch.dtype) -> bool:
    """Whether differences are at most so many roundings of values as large as these."""
    return bool(off.abs().max() <= roundings * torch.finfo(dtype).eps * (1 + like.abs().max()))


def bare(sublayers: tuple[Sublayer, ...]) -> list[Sublayer]:
    """Mamba keeps its stream in float32 and its norms read it rounded, so what a mixer reads is not that stream."""
    return [replace(s, reads=None, stream=None) if s.kind == "mixer" else s for s in sublayers]


@named
@pytest.mark.parametrize("model_type", TYPES)
def test_the_probe_finds_in_16_bits_what_it_finds_in_32(model_type: str, dtype: torch.dtype) -> None:
    """Every sum closes to the last bit in the model's own dtype, so no tolerance has to tell right from wrong."""
    halved, single = (tp.Architecture(model_of(model_type, d, 3)) for d in (dtype, torch.float32))
    assert halved.dtype == dtype
    assert [layer.error for layer in halved.layers] == [0, 0, 0]
    for a, b in zip(halved.layers, single.layers, strict=True):
        assert (a.form, a.width, bare(a.sublayers)) == (b.form, b.width, bare(b.sublayers))
    mixer = "mixer" in {s.kind for layer in single.layers for s in layer.sublayers}
    for component in tp.COMPONENTS:
        if mixer and component in ("attn_in", "attn_in_scale"):
            continue
        for layer in range(3):
            assert halved.why_not(component, layer) == single.why_not(component, layer)
    assert (halved.causal, halved.local_embedding, halved.keeps_logits) == (True, True, single.keeps_logits)


@named
@pytest.mark.parametrize("model_type", TYPES)
def test_patched_values_equal_the_oracle(model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, dtype)
    with tp.patching(model, PAIRS) as p:
        names = everywhere(p, p.corrupted, p.clean)
    module, metric = tp.models.module_of(model), gap(p.encoded)
    slow = Slow(module, p.encoded, eager=True)
    wanted = slow.score(p.rows, metric)
    single = Slow(copy.deepcopy(module).float(), p.encoded, eager=True).score(p.rows, metric)
    # The same weights computed in 32 bits tell how far rounding alone carries this metric.
    rounding = (wanted - single).abs().max()
    assert rounding < 0.2 * (1 + wanted.abs().max()), "more than rounding: even a router's choice may turn on it"
    found = torch.tensor(p.run()["value"].values).T
    unpatched = torch.stack([metric(slow.base("corrupted", i), i) for i in range(3)])
    for name in dict.fromkeys(names):
        mine = torch.tensor([n == name for n in names])
        error = (found - wanted)[mine].abs().max()
        # Where experts are chosen, rounding may turn the choice.
        allowed = (5 if model_type in EXPERTS else 2) * rounding
        assert error <= allowed, f"{name}: off by {error:.2g}, where rounding explains {rounding:.2g}"
        assert (wanted - unpatched)[mine].abs().max() > error, f"{name}: patches do no more than rounding does"


@named
@pytest.mark.parametrize("model_type", TYPES)
def test_own_values_written_back_change_not_one_bit(model_type: str, dtype: torch.dtype) -> None:
    with tp.patching(model_of(model_type, dtype), PAIRS, prune=False, form="flat") as p:
        everywhere(p, p.corrupted, p.corrupted)
    result = p.run()
    assert (result["effect"] == 0).all()
    assert (result["status"] == tp.Status.MEASURED).all()


@named
@pytest.mark.parametrize("model_type", TYPES)
def test_a_full_cut_gives_the_other_run(model_type: str, dtype: torch.dtype) -> None:
    """To the last bit, but for resid_mid: an edit of the sum is made by what attention adds, whose rounding is its own."""
    names = []
    with tp.patching(model_of(model_type, dtype), PAIRS, form="flat") as p:
        for name in ("embed", "resid_pre", "resid_mid", "resid_post", "logits"):
            for layer in range(len(p.architecture)) if tp.COMPONENTS[name].layered else range(1):
                if p.architecture.offers(name, layer):
                    site = (layer, slice(None)) if tp.COMPONENTS[name].layered else (slice(None),)
                    with p.row(number=len(p.rows)):
                        getattr(p.corrupted, name)[site] = getattr(p.clean, name)[site]
                    names.append(name)
    result = p.run()
    off = torch.tensor((result["value"] - result["clean"]).values)
    middle = torch.tensor([name == "resid_mid" for name in names])
    assert (off[:, ~middle] == 0).all()
    if middle.any():
        assert near(off[:, middle], torch.tensor(result["clean"].values), 12, dtype)
    assert ("off by its last bit or two" in p.plan.explain()) == bool(middle.any())


@named
def test_metrics_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Log-probabilities of 16-bit logits are no numbers of 16 bits."""
    seen = []

    def spread(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return logits.std(-1)

    model = model_of("llama", dtype)
    metrics = {"log_prob": tp.log_prob, "spread": spread, "kl": tp.kl}
    with tp.patching(model, PAIRS, metrics) as p:
        everywhere(p, p.corrupted, p.clean)
    result = p.run()
    assert set(seen) == {torch.float32}
    for metric in metrics:
        values = torch.tensor(result[metric].values if metric in result else result["value"].sel(metric=metric).values)
        assert torch.equal(values.float().double(), values), "float32"
        assert not torch.equal(values.to(dtype).double(), values), f"{metric} was rounded to {dtype}"


@named
@pytest.mark.parametrize("multiplier", [0.6, 0.22, 0.246])
def test_a_multiplier_is_found_to_the_last_digit(multiplier: float, dtype: torch.dtype) -> None:
    """Granite's: a fit to values of 16 bits is off in the third digit, and with the right one the sum closes bitwise."""
    module = build("granite", layers=2, dtype=dtype, residual_multiplier=multiplier)
    layers = tp.Architecture(module).layers
    assert [s.out.scale for layer in layers for s in layer.sublayers if s.out] == [multiplier] * 4
    assert [layer.error for layer in layers] == [0, 0]


@named
@pytest.mark.parametrize("model_type", EIGHT)
def test_reading_and_writing_back_in_one_forward(model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, dtype)
    kept, plain = captured(model)
    assert torch.equal(captured(model, keep=False)[1], plain)
    everything = (torch.zeros(7, dtype=torch.long), torch.arange(7))
    for (component, layer), value in kept.items():
        if component in ("aside", "logits"):
            continue
        assert value.dtype == dtype
        back = {(component, layer): ((False, (*everything, None, None), (), value[0], None, None, False),)}
        off = captured(model, back, keep=False)[1] - plain
        # A head's share is computed alone when it is kept and with others when it is written.
        assert near(off, plain, 2 if component == "head_out" else 0, dtype), (component, layer)
    assert architecture_of(model).dtype == dtype
