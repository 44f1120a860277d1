"""Labels, baselines, normalisation, provenance, round trips and joins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import ioi_pairs, toy

import tracepatch as tp
from tracepatch.toys import tasks


@pytest.fixture
def result(gpt2: Any, pairs: tp.Pairs) -> xr.Dataset:
    found = tp.patch(gpt2, pairs, "resid_pre")
    assert isinstance(found, xr.Dataset)
    return found


def test_variables_and_dims(result: xr.Dataset) -> None:
    assert list(result.data_vars) == [
        "effect",
        "normalized",
        "value",
        "effect_answer",
        "effect_wrong",
        "base",
        "clean",
        "corrupted",
        "status",
    ]
    assert result["effect"].dims == result["normalized"].dims == ("pair", "layer", "pos")
    assert result["clean"].dims == ("pair",)
    np.testing.assert_allclose(result["effect"], result["value"] - result["corrupted"], atol=1e-12)
    np.testing.assert_allclose(result["normalized"], result["effect"] / (result["clean"] - result["corrupted"]))
    assert result["depth"].values.tolist() == [0, 0.5, 1]
    assert result["effect"].attrs["units"] == "logits"
    assert result["status"].attrs["flag_meanings"] == "absent measured proved_zero pending estimated"


def test_tokens_are_shared_or_by_pair(gpt2: Any, result: xr.Dataset) -> None:
    assert result["token"].dims == ("pair", "pos"), "the names differ from pair to pair"
    one = tp.patch(gpt2, ioi_pairs(1), "resid_pre")
    assert one["token"].dims == ("pos",)
    assert one["token"].values[:3].tolist() == one["corrupted_token"].values[:3].tolist()
    assert one["token"].values[9] != one["corrupted_token"].values[9]


def test_pairs_of_several_lengths(gpt2: Any) -> None:
    d = tasks.ioi(6, seed=3)
    pairs = tp.Pairs(d.clean, d.corrupted, d.answer, d.wrong)
    lengths = pairs.encode(gpt2.tokenizer).lengths
    assert len(set(lengths)) > 1
    result = tp.patch(gpt2, pairs, "resid_pre")
    for i, length in enumerate(lengths):
        assert (result["status"][i, :, length:] == tp.Status.ABSENT).all()
        assert np.isnan(result["value"][i, :, length:]).all()
        assert (result["status"][i, :, :length] != tp.Status.ABSENT).all()
        assert (result["token"][i, length:] == "").all()
        alone = tp.patch(gpt2, pairs[i], "resid_pre")
        np.testing.assert_allclose(result["value"][i, :, :length], alone["value"][0], atol=1e-4)


def test_the_mean_over_pairs_is_a_ratio_of_means(result: xr.Dataset) -> None:
    mean = tp.over_pairs(result)
    wanted = result["effect"].mean("pair") / (result["clean"] - result["corrupted"]).mean("pair")
    np.testing.assert_allclose(mean["normalized"], wanted)
    assert abs(mean["normalized"] - result["normalized"].mean("pair")).max() > 1e-6, "not the mean of ratios"
    assert (mean["status"] == tp.Status.PROVED_ZERO).any()
    assert mean.attrs["model"] == "toy-gpt2"


def test_the_mean_leaves_out_pairs_without_the_position(gpt2: Any) -> None:
    d = tasks.ioi(6, seed=3)
    result = tp.patch(gpt2, tp.Pairs(d.clean, d.corrupted, d.answer, d.wrong), "resid_pre")
    last = int(result.sizes["pos"]) - 1
    has = (result["status"].sel(pos=last, layer=0) != tp.Status.ABSENT).values
    assert has.any()
    assert not has.all()
    gap = (result["clean"] - result["corrupted"]).values[has].mean()
    wanted = result["effect"].sel(pos=last).values[has].mean(0) / gap
    np.testing.assert_allclose(tp.over_pairs(result)["normalized"].sel(pos=last), wanted)


def test_a_pair_too_close_to_divide_by(gpt2: Any, pairs: tp.Pairs) -> None:
    """A metric that does not see the difference: NaN, and listed, never a quotient of noise."""
    with pytest.warns(tp.errors.MeasurementWarning, match="up to rounding, in constant"):
        result = tp.patch(gpt2, pairs, "resid_pre", tp.metric(lambda logits: logits[:, 0] * 0 + 3.0, name="constant"))
    assert np.isnan(result["normalized"]).all()
    assert json.loads(result.attrs["pairs_too_close"]) == [0, 1, 2]
    assert (result["effect"] == 0).all()


def test_a_quotient_of_noise_is_not_given(gpt2: Any, pairs: tp.Pairs) -> None:
    """The runs differ, but by less than rounding leaves of such a number."""
    faint = tp.metric(lambda logits: 3.0 + 1e-6 * logits[:, 7], name="faint")
    result = tp.patch(gpt2, pairs, "resid_pre", faint)
    assert float(abs(result["clean"] - result["corrupted"]).max()) > 0
    assert np.isnan(result["normalized"]).all()
    assert json.loads(result.attrs["pairs_too_close"]) == [0, 1, 2]
    with pytest.warns(tp.errors.MeasurementWarning, match="is next to nothing beside what it is a difference of"):
        assert np.isnan(tp.over_pairs(result)["normalized"]).all()


def test_cells_without_a_row_are_absent_never_zero(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        for layer, head in ((0, 0), (1, 1), (2, 1)):
            with p.row(layer=layer, head=head):
                p.clean.z[layer, :, head] = 0
    result = p.run()
    hole = {"layer": 0, "head": 1}
    assert result["effect"].dims == ("pair", "layer", "head")
    for name in ("effect", "value", "normalized", "effect_answer"):
        assert np.isnan(result[name].sel(hole)).all(), name
    assert (result["status"].sel(hole) == tp.Status.ABSENT).all()


def test_provenance(result: xr.Dataset, gpt2: Any) -> None:
    attrs = result.attrs
    assert attrs["model"] == "toy-gpt2"
    assert len(attrs["fingerprint"]) == 16
    assert attrs["fingerprint"] == tp.models.fingerprint(gpt2) != tp.models.fingerprint(toy("llama"))
    assert set(json.loads(attrs["versions"])) == {"tracepatch", "nnsight", "transformers", "torch"}
    assert attrs["plan"].startswith("42 rows × 3 pairs on toy-gpt2 (3 layers)")
    assert (attrs["seed"], attrs["base"], attrs["bos"]) == (0, "corrupted", "no BOS token (the tokenizer adds none)")
    assert attrs["time"].endswith("+00:00")
    assert 0 <= json.loads(attrs["noise_floor"])["logit_diff"] < 1e-4


def test_a_changed_weight_changes_the_fingerprint() -> None:
    module, words = tp.toys.load_module("gpt2")
    model = tp.load(module, words)
    before = tp.models.fingerprint(model)
    assert before == tp.models.fingerprint(tp.toys.load("gpt2"))
    module.transformer.h[0].mlp.c_fc.bias.data[0] += 1e-3
    assert tp.models.fingerprint(model) != before


def test_round_trips(tmp_path: Path, gpt2: Any, pairs: tp.Pairs, result: xr.Dataset) -> None:
    found = tp.open_result(tp.save_result(result, tmp_path / "deep" / "one.nc"))
    assert isinstance(found, xr.Dataset)
    assert found.identical(result)
    with tp.patching(gpt2, pairs, [tp.logit_diff, tp.kl]) as p:
        with p.row(name="heads"):
            p.clean.z[0, :, :2] = 0
        with p.row(layer=1, head=0):
            p.corrupted.z[1, :, 0] = 0
    tree = p.run()
    assert tree["name"]["effect"].dims == ("metric", "pair", "name")
    found = tp.open_result(tp.save_result(tree, tmp_path / "tree.nc"))
    assert isinstance(found, xr.DataTree)
    assert found.identical(tree)
    assert [f.name for f in tmp_path.iterdir() if f.suffix == ".part"] == []


def test_joining_models_of_different_shapes() -> None:
    results = [tp.patch(toy(name), ioi_pairs(2), "resid_pre") for name in tp.toys.NAMES]
    both = tp.concat(results)
    assert both["model"].values.tolist() == [f"toy-{n}" for n in tp.toys.NAMES]
    assert both.sizes == {"model": 4, "pair": 2, "layer": 3, "pos": 15}
    for name, result in zip(tp.toys.NAMES, results, strict=True):
        one = both.sel(model=f"toy-{name}")
        inside = {"layer": result["layer"].values, "pos": result["pos"].values}
        np.testing.assert_array_equal(one["value"].sel(inside), result["value"])
        assert (one["token"].sel(pos=inside["pos"]).values == result["token"].values).all()
        np.testing.assert_array_equal(one["depth"].sel(layer=inside["layer"]), result["depth"])
        assert np.isnan(one["value"].drop_sel(pos=inside["pos"])).all()
    assert both["status"].dtype == np.int8
    assert both.attrs["model"] == "toy-gpt2, toy-llama, toy-gpt_neox, toy-gemma2"
    assert [json.loads(both.attrs["sources"])[i]["model"] for i in range(4)] == both["model"].values.tolist()
    mean = tp.over_pairs(both)
    np.testing.assert_allclose(mean["normalized"].sel(model="toy-gemma2"), tp.over_pairs(results[3])["normalized"])


def test_shared_and_unshared_tokens_join(gpt2: Any) -> None:
    one = tp.patch(gpt2, ioi_pairs(1), "resid_pre")
    two = tp.patch(toy("llama"), ioi_pairs(2), "resid_pre")
    both = tp.concat([one, two])
    assert both["token"].dims == ("model", "pair", "pos")
    assert both["token"].sel(model="toy-gpt2", pair=0).values[:14].tolist() == one["token"].values.tolist()


def test_sparse_labels_become_rows(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        for i in range(12):
            with p.row(a=i, b=11 - i):
                p.corrupted.z[i // 4, :, i % 4] = 0
    result = p.run()
    assert result["effect"].dims == ("pair", "row")
    assert result["b"].values.tolist() == list(range(11, -1, -1))


def test_without_corrupted_prompts(gpt2: Any) -> None:
    pairs = tp.Pairs("When John and Mary went to the store, John gave the bag to", answer=" Mary", wrong=" John")
    result = tp.patch(gpt2, pairs, "z", direction="noising", source=0)
    assert "normalized" not in result
    assert "corrupted" not in result
    assert float(abs(result["effect"]).max()) > 0.1
