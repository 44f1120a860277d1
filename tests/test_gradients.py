"""Saved activations and gradients: what is computed from them is what runs of their own give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from test_attribution import PAIRS, book, encoded, finest, model_of

import tracepatch as tp
from tracepatch import shelf
from tracepatch.errors import RecipeError, ResultError

SAVED = ("resid_pre", "attn_out", "mlp_out", "z", "head_out", "q_in", "mlp_act", "logits_in", "resid_mid")


def saved(name: str = "gpt2", **options: Any) -> tp.Gradients:
    return tp.gradients(model_of(name), PAIRS, components=SAVED, **{"direction": "both", **options})


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_every_partition_is_what_attribute_gives(name: str) -> None:
    found = saved(name)
    for direction in ("denoising", "noising"):
        for component in SAVED:
            for by in {finest(component), ("layer",) if "layer" in finest(component) else finest(component)}:
                options: Any = {"by": by, "direction": direction}
                ours, theirs = (
                    found.attribute(component, **options),
                    tp.attribute(model_of(name), PAIRS, component, **options),
                )
                np.testing.assert_allclose(ours["estimate"], theirs["estimate"], atol=1e-9, err_msg=component)
                np.testing.assert_allclose(ours["normalized"], theirs["normalized"], atol=1e-5)
                assert ours["estimate"].dims == theirs["estimate"].dims
    zero: Any = {"direction": "noising", "source": 0, "only": {"layer": [1, 2]}}
    np.testing.assert_allclose(
        found.attribute("z", **zero)["estimate"],
        tp.attribute(model_of(name), PAIRS, "z", **zero)["estimate"],
        atol=1e-9,
    )


def test_what_was_saved_is_the_textbooks() -> None:
    found = saved()
    values = book("gpt2").values(torch.tensor(encoded().clean[2]))
    np.testing.assert_allclose(found.values("z", 1).sel(pair=2), values["z", 1].numpy(), atol=1e-9)
    assert found.values("z", 1).dims == ("pair", "pos", "head", "d_head")
    assert np.isnan(found.values("resid_pre", 0).isel(pair=0, pos=-1)).all(), "a shorter prompt"
    answer, wrong = list(encoded().answer[0]), list(encoded().wrong[0])
    gap = lambda logits: logits[-1, answer].mean() - logits[-1, wrong].mean()  # noqa: E731
    slopes = book("gpt2").gradients(torch.tensor(encoded().clean[0]), gap)
    own = found.gradient("mlp_out", 1, world="clean").sel(pair=0).isel(pos=slice(0, 7))
    np.testing.assert_allclose(own, slopes["mlp_out", 1].numpy(), atol=1e-9)
    assert found.values("q_in", 1).dims == ("pair", "pos", "d_model"), "one stream for all heads"


def test_a_folder_has_everything_and_is_read_when_it_is_needed(tmp_path: Path) -> None:
    whole = saved()
    kept = saved(folder=tmp_path / "kept", memory=1)
    later = tp.open_gradients(whole.save(tmp_path / "saved"), model_of("gpt2"), PAIRS)
    again = tp.open_gradients(tmp_path / "kept", model_of("gpt2"), PAIRS)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3, "a pair each, as memory says"
    assert all(part.file is not None and not part.arrays for part in (*kept._parts, *later._parts))
    wanted = whole.attribute("z", by=finest("z"))["estimate"]
    for found in (kept, later, again):
        np.testing.assert_allclose(found.attribute("z", by=finest("z"))["estimate"], wanted, atol=1e-9)
    assert "MB in" in repr(later)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")], "nothing half-written is left"


def test_what_is_large_goes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "LARGE", 10_000)
    found = saved(memory=1)
    assert all(part.file is not None for part in found._parts)
    np.testing.assert_allclose(found.attribute("z")["estimate"], saved().attribute("z")["estimate"], atol=1e-9)
    folder = found._parts[0].file.parent  # type: ignore[union-attr]
    assert folder.is_dir()


def test_fewer_bits_are_nearly_as_good() -> None:
    half = saved(dtype="bfloat16")
    assert half.bytes < saved().bytes / 3
    whole, found = (g.attribute("z", by=finest("z"))["estimate"] for g in (saved(), half))
    assert abs(whole - found).max() < 0.03 * abs(whole).max()


@pytest.mark.parametrize("component", ["resid_pre", "mlp_out"])
def test_directions_of_a_basis_sum_to_the_whole(component: str) -> None:
    found = saved()
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    along = found.along(component, 3 * basis)
    whole = found.attribute(component, by=("layer", "pos"))["estimate"]
    np.testing.assert_allclose(along["estimate"].sum("feature").values, np.nan_to_num(whole.values), atol=1e-6)
    one = found.along(component, basis[:1])
    np.testing.assert_allclose(one["estimate"].isel(feature=0), along["estimate"].isel(feature=0), atol=1e-6)


def test_a_direction_is_what_patching_only_it_is_estimated_to_do() -> None:
    """As a recorded row that adds the projection of the difference."""
    model, found = model_of("gpt2"), saved(direction="denoising")
    u = torch.nn.functional.normalize(torch.arange(32.0, dtype=torch.float64) - 7, dim=0)
    with tp.patching(model, PAIRS) as p, p.row(layer=1, pos=-1):
        p.corrupted.resid_pre[1, -1] = lambda live, clean, corrupted: (
            live + ((clean - corrupted) @ u.to(live))[..., None] * u.to(live)
        )
    rows = p.estimate()["estimate"].values.ravel()
    along = found.along("resid_pre", u[None])["estimate"].sel(layer=1).isel(feature=0)
    own = [along.sel(pair=i).values[n - 1] for i, n in enumerate(encoded().lengths)]
    np.testing.assert_allclose(rows, own, atol=1e-6)


def test_a_dictionary_that_reconstructs_is_the_whole() -> None:
    found = saved()
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    features = found.features("resid_pre", lambda x: x @ basis.T, basis)
    whole = found.attribute("resid_pre", by=("layer", "pos"))["estimate"]
    np.testing.assert_allclose(features["estimate"].sum("feature").values, np.nan_to_num(whole.values), atol=1e-6)
    relu = found.features("resid_pre", lambda x: (x @ basis.T).relu(), basis)
    assert abs(relu["estimate"] - features["estimate"]).max() > 1e-3


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_stream_is_the_sum_of_its_writers(layer: int) -> None:
    found = saved().decomposed(layer)
    bias = 0  # output biases are the same in both runs
    np.testing.assert_allclose(found["estimate"].sum("writer"), np.nan_to_num(found["whole"]), atol=1e-9)
    assert found.sizes["writer"] == 1 + layer * 5 + bias
    heads = saved(direction="denoising")
    without = tp.gradients(model_of("gpt2"), PAIRS, components=[c for c in SAVED if c != "head_out"])
    np.testing.assert_allclose(heads.decomposed(layer)["whole"], without.decomposed(layer)["whole"], atol=1e-9)
    assert without.decomposed(layer).sizes["writer"] == 1 + 2 * layer


def test_one_run_a_side() -> None:
    assert saved(direction="denoising").attrs["cost"] == "2 forwards and 1 backward a pair"
    assert saved().attrs["cost"] == "2 forwards and 2 backwards a pair"


def test_held_norms_and_relp() -> None:
    for how in (tp.AtP(hold=("norms",)), tp.RelP()):
        found = saved(estimator=how, direction="denoising").attribute("z")
        wanted = tp.attribute(model_of("gpt2"), PAIRS, "z", estimator=how)
        np.testing.assert_allclose(found["estimate"], wanted["estimate"], atol=1e-9)
        assert found.attrs["estimator"] == wanted.attrs["estimator"]


def test_several_metrics() -> None:
    several = [tp.logit_diff, tp.kl]
    found = tp.gradients(toy("llama"), ioi_pairs(2), several, "z", direction="noising")
    wanted = tp.attribute(toy("llama"), ioi_pairs(2), "z", several, direction="noising")
    np.testing.assert_allclose(found.attribute("z")["estimate"], wanted["estimate"], atol=1e-5)
    assert found.gradient("z", 1, metric="kl").shape == found.gradient("z", 1).shape


def test_refusals(tmp_path: Path) -> None:
    found = saved(direction="denoising")
    for call, words in (
        (lambda: found.attribute("k"), "k was not saved; there is resid_pre"),
        (lambda: found.attribute("z", direction="noising"), "direction='both'"),
        (lambda: found.gradient("z", 1, world="clean"), "of the corrupted run, not of 'clean'"),
        (lambda: found.gradient("z", 1, metric="x"), "There is no metric 'x'"),
        (lambda: found.along("z", torch.eye(8)), "one vector a position"),
        (lambda: found.along("resid_pre", torch.eye(5)), "is 32 wide, and the vectors 5"),
        (lambda: found.along("resid_pre", torch.zeros(1, 32)), "none of them 0"),
        (lambda: found.decomposed(9), "layer is 0 to 3"),
        (lambda: saved(estimator=tp.IntegratedGradients()), "no property of two runs"),
        (lambda: tp.gradients(model_of("gpt2"), PAIRS, components="logits"), "save logits_in"),
    ):
        with pytest.raises(RecipeError, match=words):
            call()
    found.save(tmp_path / "a")
    with pytest.raises(ResultError, match="is there already"):
        found.save(tmp_path / "a")
    with pytest.raises(ResultError, match=r"(?s)does not fit.*other weights.*"):
        tp.open_gradients(tmp_path / "a", model_of("llama"), PAIRS)
    with pytest.raises(ResultError, match="their tokens are others"):
        tp.open_gradients(tmp_path / "a", model_of("gpt2"), PAIRS[:2])
    with pytest.raises(ResultError, match="holds no gradients"):
        tp.open_gradients(tmp_path, model_of("gpt2"), PAIRS)
    part = next((tmp_path / "a").glob("part-*"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(ResultError, match="is damaged"):
        tp.open_gradients(tmp_path / "a", model_of("gpt2"), PAIRS)
