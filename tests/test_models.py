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
from tracepatch.models import module_of, name_of, remote_of


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


def test_attention_is_handed_through() -> None:
    model = tp.toys.load("gpt2", attn_implementation="eager")
    assert module_of(model).config._attn_implementation == "eager"
    assert tp.Architecture(model).eager_error == 0


def test_a_remote_model_has_no_weights_here() -> None:
    model = tp.load(tp.toys.folder("gpt2"), remote="http://127.0.0.1:9")
    assert remote_of(model) == "http://127.0.0.1:9"
    assert {p.device.type for p in module_of(model).parameters()} == {"meta"}
    assert remote_of(tp.toys.load("gpt2")) is False
