"""Loading: everything that can be loaded, and what is handed through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from conftest import ioi_pairs
from slow import made_up_pairs
from tiny_models import EIGHT, build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.models import fingerprint, module_of, name_of, remote_of


@pytest.mark.parametrize("model_type", EIGHT)
def test_folders_of_the_eight_types(tmp_path: Path, model_type: str) -> None:
    module = build(model_type, layers=2)
    module.save_pretrained(tmp_path / model_type)
    tokenizer().save_pretrained(tmp_path / model_type)
    model = tp.load(tmp_path / model_type)
    assert not module_of(model).training
    assert name_of(model) == model_type
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    result = tp.patch(model, pairs, "resid_pre")
    again = tp.patch(tp.load(module, tokenizer()), pairs, "resid_pre")
    torch.testing.assert_close(
        torch.tensor(result["value"].values), torch.tensor(again["value"].values), equal_nan=True
    )
    assert result.attrs["fingerprint"] == again.attrs["fingerprint"]


def test_a_folder_a_module_and_a_traced_model_are_one(gpt2: Any) -> None:
    pairs = ioi_pairs(1)
    module, words = tp.toys.load_module("gpt2")
    module.train()
    traced = nnsight.TransformersModel(tp.toys.load_module("gpt2")[0], task="text-generation", tokenizer=words)
    models = [
        tp.load(str(tp.toys.folder("gpt2"))),
        tp.load(module, words),
        tp.load(module, tp.toys.folder("gpt2")),
        tp.load(traced),
        gpt2,
    ]
    values = [tp.patch(m, pairs, "z")["value"] for m in models]
    assert all((v == values[0]).all() for v in values)
    assert not module.training, "loading puts a model in eval mode"


def test_dtype_is_handed_through() -> None:
    pairs = ioi_pairs(2)
    exact = tp.patch(tp.toys.load("gpt2", dtype="float64"), pairs, "resid_pre")
    for dtype in ("float32", "bfloat16", "float16"):
        model = tp.toys.load("gpt2", dtype=dtype)
        assert module_of(model).dtype == getattr(torch, dtype)
        found = tp.patch(model, pairs, "resid_pre")
        assert found["value"].dtype == "float64", "metrics are computed in float32 and kept wider"
        assert float(abs(found["normalized"] - exact["normalized"]).max()) < {"float32": 1e-5}.get(dtype, 0.1)


def test_device_map_is_handed_through() -> None:
    """It needs accelerate, which is not ours to require; without it transformers' reason is passed on."""
    try:
        model = tp.toys.load("gpt2", device_map="cpu")
    except errors.ModelError as error:
        assert "accelerate" in str(error)  # noqa: PT017
    else:
        assert module_of(model).device.type == "cpu"


def test_weights_that_are_brought_when_needed(tmp_path: Path) -> None:
    """Where a model does not fit on its devices, accelerate brings parts of it from a disk: the same, but slower."""
    pytest.importorskip("accelerate")
    plain, pairs = tp.toys.load("llama"), ioi_pairs(2)
    places = {"model.embed_tokens": "cpu", "model.layers.1": "cpu", "model.rotary_emb": "cpu"}
    places |= dict.fromkeys(("model.layers.0", "model.norm", "lm_head"), "disk")
    model = tp.toys.load("llama", device_map=places, offload_folder=tmp_path / "weights")
    assert {p.device.type for p in module_of(model).parameters()} == {"cpu", "meta"}
    assert fingerprint(model) == fingerprint(plain)
    for component in ("resid_pre", "z", "q", "head_out", "mlp_in", "mlp_in_scale", "logits_in"):
        assert tp.Architecture(model).offers(component, 0)
        found = tp.patch(model, pairs, component, directory=tmp_path / "runs")
        wanted = tp.patch(plain, pairs, component)
        assert (found["status"] == wanted["status"]).all()
        assert float(abs(found["value"] - wanted["value"]).max()) < 1e-4
    assert float(abs(tp.edges(model, pairs)["estimate"] - tp.edges(plain, pairs)["estimate"]).max()) < 1e-4
    with tp.patching(model, pairs, directory=tmp_path / "runs") as p, p.row(layer=0):
        p.corrupted.z[0, :, 0] = p.clean.z[0, :, 0]
    assert not p.plan.measured["unstored"]


def test_an_embedding_that_is_brought_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(errors.ModelError, match="device_map leaves the token embedding on a disk"):
        tp.toys.load("llama", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path)


def test_tied_weights_that_are_parted_are_refused(tmp_path: Path) -> None:
    """Accelerate would find out in the first forward, with a KeyError."""
    pytest.importorskip("accelerate")
    places = {"transformer": "cpu", "lm_head": "disk"}
    with pytest.raises(errors.ModelError) as caught:
        tp.toys.load("gpt2", device_map=places, offload_folder=tmp_path)
    assert str(caught.value) == (
        "device_map parts weights that are one: lm_head.weight shares the token embedding's, and would not be found on "
        "the disk where it is left. Give both the same place."
    )
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "transformer.h": "disk"}
    model = tp.toys.load("gpt2", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path)
    found = tp.patch(model, ioi_pairs(1), "resid_pre", only={"layer": [1]})
    wanted = tp.patch(tp.toys.load("gpt2"), ioi_pairs(1), "resid_pre", only={"layer": [1]})
    assert float(abs(found["value"] - wanted["value"]).max()) < 1e-5


def test_attention_is_handed_through() -> None:
    model = tp.toys.load("gpt2", attn_implementation="eager")
    assert module_of(model).config._attn_implementation == "eager"
    assert tp.Architecture(model).eager_error == 0


def test_a_remote_model_has_no_weights_here() -> None:
    model = tp.load(tp.toys.folder("gpt2"), remote="http://127.0.0.1:9")
    assert remote_of(model) == "http://127.0.0.1:9"
    assert {p.device.type for p in module_of(model).parameters()} == {"meta"}
    assert remote_of(tp.toys.load("gpt2")) is False
