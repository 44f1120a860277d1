"""Faults that other packages had, each planted once and seen by the test here that names it.

The numbers to compare with come from plain hooks on an untouched copy of the model, written down in each test anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from slow import Slow, gap, made_up_pairs, untouched
from test_checks import shifted
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors, traced

WORDS = [f"w{i}" for i in range(30, 60)]
Edit = Callable[[torch.Tensor], torch.Tensor]


def tiny(model_type: str, layers: int = 3) -> Any:
    return tp.load(build(model_type, layers=layers), tokenizer())


def by_hand(model: Any, p: tp.Patching, path: str, edit: Edit, base: str = "corrupted", side: str = "output") -> float:
    """The logit difference of pair 0 with one module's output, or input, changed by a plain hook."""
    module = untouched(tp.models.module_of(model))
    place = module.get_submodule(path)
    if side == "output":
        place.register_forward_hook(
            lambda m, args, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        )
    else:
        place.register_forward_pre_hook(lambda m, args: (edit(args[0]), *args[1:]))
    with torch.no_grad():
        logits = module(torch.tensor([p.encoded.world(base)[0]]), use_cache=False).logits[0]
    return float(gap(p.encoded)(logits, 0))


def clean_value(model: Any, p: tp.Patching, path: str, side: str = "output") -> torch.Tensor:
    """What passes by in the clean run of pair 0."""
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x

    by_hand(model, p, path, look, "clean", side)
    return seen[0]


def values(p: tp.Patching) -> list[float]:
    """The values of the rows on pair 0."""
    return [float(v) for v in p.run()["value"].isel(pair=0).values.ravel()]


def near(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 1e-5 * (1 + abs(wanted))


def test_a_patch_is_no_zero_ablation() -> None:
    """nnpatch: the flag that asks for zeros was inverted."""
    model = tiny("gpt2")
    with tp.patching(model, made_up_pairs(WORDS)[:1]) as p:
        with p.row(what="patch"):
            p.corrupted.mlp_out[1, :] = p.clean.mlp_out[1, :]
        with p.row(what="zero"):
            p.corrupted.mlp_out[1, :] = 0
    path = "transformer.h.1.mlp"
    clean = clean_value(model, p, path)
    wanted = by_hand(model, p, path, lambda x: clean), by_hand(model, p, path, torch.zeros_like)
    patch, zero = values(p)
    assert abs(wanted[0] - wanted[1]) > 0.01
    assert near(patch, wanted[0])
    assert near(zero, wanted[1])
    for source, value, written in ((None, patch, "clean"), (0, zero, "0")):
        swept = tp.patch(model, made_up_pairs(WORDS)[:1], "mlp_out", by="layer", source=source)
        assert near(float(swept["value"].sel(layer=1, pair=0)), value)
        assert swept.attrs["written"] == written


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_heads_z_stands_before_the_output_projection(model_type: str) -> None:
    """nnpatch: a head was a slice of the projection's output, which mixes all heads."""
    model = tiny(model_type)
    path = {"gpt2": "transformer.h.1.attn.c_proj", "llama": "model.layers.1.self_attn.o_proj"}[model_type]
    with tp.patching(model, made_up_pairs(WORDS)[:1]) as p:
        for name in ("z", "head_out"):
            with p.row(component=name):
                getattr(p.corrupted, name)[1, :, 2] = getattr(p.clean, name)[1, :, 2]
    clean = clean_value(model, p, path, "input")
    size = clean.shape[-1] // 4

    def slice_of(clean: torch.Tensor) -> Edit:
        return lambda x: torch.cat([x[..., : 2 * size], clean[..., 2 * size : 3 * size], x[..., 3 * size :]], -1)

    wanted = by_hand(model, p, path, slice_of(clean), side="input")
    z, head_out = values(p)
    assert near(z, wanted)
    assert near(head_out, wanted)
    wrong = by_hand(model, p, path, slice_of(clean_value(model, p, path)))
    assert abs(wrong - wanted) > 1e-3, "the slice of the output is something else"


def test_layers_from_ten_on_are_layers_of_their_own() -> None:
    """path_patching: a pattern that reads one digit takes layer 10 for layer 1, or for none."""
    model = tiny("gpt2", layers=12)
    with tp.patching(model, made_up_pairs(WORDS)[:1]) as p:
        for layer in p.grid("attn_out", by="layer"):
            with p.row(layer=layer):
                p.corrupted.attn_out[layer, :] = 0
    result = p.run()
    assert result["layer"].values.tolist() == list(range(12))
    wanted = [by_hand(model, p, f"transformer.h.{i}.attn.c_proj", torch.zeros_like) for i in range(12)]
    np.testing.assert_allclose(result["value"].isel(pair=0), wanted, atol=1e-5)
    assert len({round(w, 4) for w in wanted}) == 12, "each layer has a number of its own"


def test_a_path_is_not_its_node() -> None:
    """A port of path_patching ignored the receivers: holding everything else must change the effect."""
    model, pairs = tiny("gpt2"), made_up_pairs(WORDS)[:1]
    with tp.patching(model, pairs) as p:
        for name in ("node", "path"):
            with p.row(through=name):
                p.corrupted.z[0, :, 1] = p.clean.z[0, :, 1]
                if name == "path":  # straight to the logits: what is later writes what it wrote before
                    p.corrupted.mlp_out[0, :] = p.corrupted.mlp_out[0, :]
                    for layer in (1, 2):
                        p.corrupted.attn_out[layer, :] = p.corrupted.attn_out[layer, :]
                        p.corrupted.mlp_out[layer, :] = p.corrupted.mlp_out[layer, :]
    node, path = values(p)
    wanted = Slow(tp.models.module_of(model), p.encoded).score(p.rows, gap(p.encoded))
    assert near(node, float(wanted[0, 0]))
    assert near(path, float(wanted[1, 0]))
    assert abs(node - path) > 1e-3


def test_padding_is_in_no_mean() -> None:
    """EAP-IG: sums without the padding were divided by the padded length. Answers are what is padded here."""
    model, made = tiny("gpt2"), made_up_pairs(WORDS)[:2]
    pairs = tp.Pairs(made.clean, made.corrupted, [["w33"], ["w30", "w41", "w52"]], made.wrong)
    for metric in (tp.logit_diff, tp.logit, tp.prob, tp.log_prob):
        together = tp.patch(model, pairs, "resid_pre", metric)["value"]
        alone = [tp.patch(model, pairs[i], "resid_pre", metric)["value"].isel(pair=0) for i in range(2)]
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_batch_in_which_only_row_0_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnsight's tutorial: ``output[0]`` was the tensor and became the first row, so the patch of a batch did nothing.

    Row 0 is the unpatched witness, so here it shows; a patch that reaches no row is in ``test_checks.py``.
    """
    model = tiny("gpt2")
    tp.patch(model, made_up_pairs(WORDS)[:1], "z")
    monkeypatch.setattr(traced, "columns", shifted(torch.zeros_like))
    with pytest.raises(errors.MeasurementError, match="Unpatched rows of the patched runs drift by"):
        tp.patch(model, made_up_pairs(WORDS)[:1], "z", form="flat")


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("bloom", "transformer.h.1.self_attention.dense"),
        ("olmo2", "model.layers.1.post_attention_layernorm"),
        ("gemma2", "model.layers.1.post_attention_layernorm"),
    ],
)
def test_attn_out_is_what_attention_adds(model_type: str, path: str) -> None:
    """TransformerLens: attn_out held the residual too (bloom), or stood before the norm that follows (olmo2)."""
    model = tiny(model_type)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with tp.patching(model, made_up_pairs(WORDS)[:1]) as p:
        with p.row(what="zero"):
            p.corrupted.attn_out[1, :] = 0
        with p.row(what="patch"):
            p.corrupted.attn_out[1, :] = p.clean.attn_out[1, :]
        with p.row(what="shift"):
            p.corrupted.attn_out[1, :] += shift
        with p.row(what="stream"):
            p.corrupted.resid_mid[1, :] = p.corrupted.resid_pre[1, :] + p.corrupted.attn_out[1, :] + shift
    zero, patch, shifted_by, stream = values(p)
    clean = clean_value(model, p, path)
    assert near(zero, by_hand(model, p, path, torch.zeros_like))
    assert near(patch, by_hand(model, p, path, lambda x: clean))
    assert near(shifted_by, by_hand(model, p, path, lambda x: x + shift))
    assert near(stream, shifted_by)


def test_grouped_heads_have_no_cells_that_are_0() -> None:
    """TransformerLens: keys and values of grouped heads were swept over all heads, and the missing ones stood as 0."""
    model, many = tiny("llama"), tiny("gpt2")
    for name in ("k", "v"):
        result = tp.patch(model, made_up_pairs(WORDS), name)
        assert dict(result.sizes) == {"pair": 3, "layer": 3, "kv_head": 2}
        assert (result["status"] == tp.Status.MEASURED).all()
        assert (abs(result["effect"]).max("pair") > 0).all()
    with (
        pytest.raises(errors.SiteError, match="has 2 kv heads|2 kv_heads"),
        tp.patching(model, made_up_pairs(WORDS)) as p,
    ):
        with p.row():
            p.clean.k[1, :, 2] = 0
    joined = tp.concat([tp.patch(model, made_up_pairs(WORDS), "v"), tp.patch(many, made_up_pairs(WORDS), "v")])
    missing = joined.isel(model=0).sel(kv_head=[2, 3])
    assert np.isnan(missing["effect"]).all()
    assert (missing["status"] == tp.Status.ABSENT).all()


def test_the_stream_between_attention_and_mlp_reaches_both() -> None:
    """TransformerLens: what starts at resid_mid went through the MLP only, and the skip branch was missing."""
    model, pairs = tiny("llama"), made_up_pairs(WORDS)[:1]
    with tp.patching(model, pairs) as p:
        with p.row(way="both"):
            p.corrupted.resid_mid[-1, -1] = p.clean.resid_mid[-1, -1]
        with p.row(way="skip"):
            p.corrupted.resid_mid[-1, -1] = p.clean.resid_mid[-1, -1]
            p.corrupted.mlp_out[-1, -1] = p.corrupted.mlp_out[-1, -1]
        with p.row(way="mlp"):
            p.corrupted.mlp_out[-1, -1] = p.clean.mlp_out[-1, -1]
    result = p.run()
    both, skip, mlp = (float(e) for e in result["effect"].isel(pair=0).values)
    assert near(float(result["value"].sel(way="both", pair=0)), float(result["clean"].sel(pair=0))), "a full cut"
    assert min(abs(skip), abs(mlp), abs(both - skip), abs(both - mlp)) > 1e-3
    wanted = Slow(tp.models.module_of(model), p.encoded).score(p.rows, gap(p.encoded))[:, 0]
    np.testing.assert_allclose(result["value"].isel(pair=0), wanted, atol=1e-5)
