"""Portions of a live value: subspaces and features of dictionaries, against whole matrices and the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from test_references import agrees, setattr_, values
from test_remote import Server, away, server  # noqa: F401  # a fixture
from test_scripts import handed, run

import tracepatch as tp
from tracepatch import errors, replacing
from tracepatch.portions import Subspace
from tracepatch.table import FORMS


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(d: int) -> torch.Tensor:
    return torch.linalg.qr(random(d, d, seed=5))[0]


def perfect(d: int) -> tp.Dictionary:
    """Features in both directions of an orthonormal basis: nothing is left unexplained."""
    basis = orthogonal(d)
    return tp.Dictionary.of_weights(torch.cat([basis, -basis], 1), torch.cat([basis.T, -basis.T]))


def poor(d: int, n: int, activation: Any = "relu", **parameter: Any) -> tp.Dictionary:
    """Random weights, which explain next to nothing."""
    encoder, decoder = random(d, n, seed=1) / math.sqrt(d), random(n, d, seed=2) / math.sqrt(n)
    given = {"encoder_bias": 0.1 * random(n, seed=3), "pre_bias": 0.1 * random(d, seed=4)}
    return tp.Dictionary.of_weights(encoder, decoder, **given, activation=activation, **parameter)


def functions(d: int, n: int) -> tp.Dictionary:
    """Neither linear, nor as wide as what it is given."""
    into, out = random(d, n, seed=6) / math.sqrt(d), random(n, d, seed=7) / math.sqrt(n)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ into.to(x))

    def decode(f: torch.Tensor) -> torch.Tensor:
        return torch.tanh(f) @ out.to(f)

    return tp.Dictionary(encode, decode, name="curved")


def several(p: tp.Patching) -> None:
    """Portions of every kind of place."""
    last = len(p.architecture) - 1
    rows: list[Any] = []
    for name in (
        "resid_pre",
        "attn_in",
        "q_in",
        "v",
        "z",
        "head_out",
        "attn_out",
        "mlp_in",
        "mlp_act",
        "mlp_out",
        "resid_mid",
    ):
        if not p.architecture.offers(name, last):
            continue
        layer = 1
        units = p.architecture.units(name, layer)
        d = units if name == "mlp_act" else p.architecture.width(name, layer)
        target, source = getattr(p.corrupted, name), getattr(p.clean, name)
        rows += [
            (target, (layer, slice(5, None)), source[layer, 5:].along(random(3, d))),
            (target, (layer, -1), source[layer, -1].features(poor(d, 50), slice(0, 20))),
        ]
        if units and name != "mlp_act":
            rows += [
                (target, (layer, [9, -1], 1), source[layer, [9, -1], 1].along(random(d, seed=9))),
                (target, (layer, -1, [0, 1]), source[layer, -1, [0, 1]].features(functions(d, 10), [3, 7])),
            ]
    resid, clean, d = p.corrupted.resid_pre, p.clean.resid_pre, p.architecture.width("resid_pre", 0)
    for kind in (poor(d, 40, "topk", k=5), poor(d, 40, "jumprelu", threshold=0.2), functions(d, 20)):
        rows.append((resid, (last, -1), clean[last, -1].features(kind, range(0, 20, 2))))
        rows.append((resid, (last, slice(8, None)), kind.clamp([1, 3, 5])))
        rows.append((resid, (last, -1), kind.clamp([1, 3], [2.0, -1.0])))
    rows.append(
        (resid, (0, slice(None)), (clean[0, :] - 0.5 * p.corrupted.resid_pre[0, :] + 0.2).along(random(d // 2, d)))
    )
    rows.append((p.corrupted.embed, (9,), p.clean.embed[9].along(random(2, d))))
    for number, (target, index, source) in enumerate(rows):
        with p.row(number=number):
            target[index] = source
    with p.row(number=len(rows)):  # what a portion leaves is live: of earlier edits too
        p.corrupted.z[0, :, 1] = p.clean.z[0, :, 1]
        p.corrupted.resid_post[0, -1] += 0.3
        p.corrupted.resid_post[0, -1] = p.clean.resid_post[0, -1].along(random(4, d))
        p.corrupted.resid_pre[1, -1] = p.clean.resid_pre[1, -1].features(poor(d, 50), [0, 1, 2])


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_portions_equal_the_oracle(name: str) -> None:
    with tp.patching(toy(name), ioi_pairs(2)) as p:
        several(p)
    agrees(p, toy(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("form", FORMS)
def test_portions_equal_the_oracle_in_every_form(name: str, form: Any) -> None:
    with tp.patching(toy(name), ioi_pairs(2), form=form) as p:
        several(p)
    agrees(p, toy(name))


def test_the_basis_spans_what_it_was_given() -> None:
    for vectors in (random(1, 8), random(5, 8), torch.cat([random(3, 8), random(3, 8) * 2, torch.zeros(1, 8)])):
        basis = Subspace.of(vectors).basis.tensor
        torch.testing.assert_close(basis.T @ basis, torch.linalg.pinv(vectors) @ vectors, atol=1e-5, rtol=0)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-6, rtol=0)
    assert len(basis) == 3
    one = random(8)
    torch.testing.assert_close(Subspace.of(one).basis.tensor.abs(), (one / one.norm()).abs()[None])


@pytest.mark.parametrize("form", ["packed", "flat"])
def test_a_subspace_of_full_rank_is_a_full_patch_to_the_last_bit(gpt2: Any, form: Any) -> None:
    found = []
    for along in (False, True):
        with tp.patching(gpt2, ioi_pairs(2), form=form) as p:
            for layer, pos in p.grid("resid_pre"):
                with p.row(layer=layer, pos=pos):
                    value = p.clean.resid_pre[layer, pos]
                    p.corrupted.resid_pre[layer, pos] = value.along(random(80, 64)) if along else value
        found.append(p.run()["value"].values)
    np.testing.assert_array_equal(*found)


def test_a_subspace_and_its_complement_make_a_full_patch(gpt2: Any) -> None:
    basis = orthogonal(64)
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        for layer in range(3):
            value = p.clean.resid_pre[layer, 9:]
            with p.row(layer=layer, what="both"):
                p.corrupted.resid_pre[layer, 9:] = value.along(basis[:20])
                p.corrupted.resid_pre[layer, 9:] = value.along(basis[20:])
            with p.row(layer=layer, what="one"):
                p.corrupted.resid_pre[layer, 9:] = value.along(basis[:20])
            with p.row(layer=layer, what="all"):
                p.corrupted.resid_pre[layer, 9:] = value
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(what="both"), value.sel(what="all"), atol=1e-4)
    assert float(abs(value.sel(what="one") - value.sel(what="all")).min()) > 0.01


def rotation(d: int) -> tp.Dictionary:
    basis = orthogonal(d)
    return tp.Dictionary(lambda x: x @ basis.to(x), lambda f: f @ basis.T.to(f), name="rotation")


@pytest.mark.parametrize("kind", [perfect, rotation])
def test_a_perfect_autoencoder_with_all_features_is_a_full_patch(gpt2: Any, kind: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        for layer, pos in p.grid("resid_pre", pos=[9, -1]):
            value = p.clean.resid_pre[layer, pos]
            for what, source in {
                "full": value,
                "all": value.features(kind(64), slice(None)),
                "half": value.features(kind(64), slice(0, 32)),
            }.items():
                with p.row(layer=layer, pos=pos, what=what):
                    p.corrupted.resid_pre[layer, pos] = source
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(what="all"), value.sel(what="full"), atol=1e-4)
    assert float(abs(value.sel(what="half") - value.sel(what="full")).max()) > 0.1


def test_what_a_dictionary_does_not_explain_stays(gpt2: Any) -> None:
    """All features of one that explains nothing: a full patch of them is next to no patch."""
    nothing = tp.Dictionary(lambda x: x * 0, lambda f: f * 0)
    with tp.patching(gpt2, ioi_pairs(2)) as p, p.row():
        p.corrupted.resid_pre[0, :] = p.clean.resid_pre[0, :].features(nothing, slice(None))
    with pytest.warns(errors.MeasurementWarning, match="change nothing"):
        np.testing.assert_allclose(p.run()["effect"], 0, atol=1e-5)


def test_portions_are_pruned_like_the_sources_that_they_are_of(gpt2: Any) -> None:
    proofs = []
    for portion in (lambda v: v, lambda v: v.along(random(3, 64)), lambda v: v.features(functions(64, 10), [1, 2])):
        with tp.patching(gpt2, ioi_pairs(2)) as p:
            for layer, pos in p.grid("resid_pre"):
                with p.row(layer=layer, pos=pos):
                    p.corrupted.resid_pre[layer, pos] = portion(p.clean.resid_pre[layer, pos])
            with p.row(layer=0, pos=0, name="clamped"):
                p.corrupted.resid_pre[0, 0] = functions(64, 10).clamp(3)
        proofs.append(p.plan.proofs[:-1])
        assert (p.plan.proofs[-1] == 0).all(), "a clamped feature is not what is there"
    for found in proofs[1:]:
        np.testing.assert_array_equal(found, proofs[0])
    assert 0 < (proofs[0] != 0).sum() < proofs[0].size


def test_cells_in_pieces_are_the_same(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pieces in (None, 3):
        if pieces:
            monkeypatch.setattr(replacing, "CELLS", pieces)
            monkeypatch.setattr(replacing, "AT_ONCE", 7 * 50)
        with tp.patching(gpt2, ioi_pairs(2)) as p:
            for layer in range(3):
                with p.row(layer=layer, kind="weights"):
                    p.corrupted.resid_pre[layer] = p.clean.resid_pre[layer].features(poor(64, 50), slice(0, 9))
                with p.row(layer=layer, kind="functions"):
                    p.corrupted.resid_pre[layer] = p.clean.resid_pre[layer].features(functions(64, 10), slice(0, 9))
        found.append(p.run()["value"].values)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_steering_with_a_named_vector(gpt2: Any) -> None:
    v = random(64)
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        towards = tp.vector(v, "refusal", unit=True)
        for coefficient in (-8.0, 0.0, 4.0, 8.0):
            with p.row(coefficient=coefficient):
                p.clean.resid_pre[1, :] += coefficient * towards
        with p.row(coefficient=99.0):
            p.clean.resid_pre[1, :] += 8 * v / v.norm()
        others = [p.mean(ioi_pairs(3, seed=s)).resid_pre[1, -1] for s in (1, 2)]
        with p.row(coefficient=100.0):
            p.clean.resid_pre[1, :] += 4 * (others[0] - others[1])
    assert str(p.rows[2]) == "row(coefficient=4.0): clean.resid_pre[1, :] += 4·refusal"
    assert str(towards + 1) == "refusal + 1"
    assert str(-towards) == "-1·refusal"
    value = agrees(p, gpt2)["value"]
    np.testing.assert_allclose(value.sel(coefficient=8.0), value.sel(coefficient=99.0), atol=1e-5)
    with pytest.raises(errors.RecipeError, match="has no direction"):
        tp.vector(torch.zeros(3), unit=True)


def added(target: Any, index: Any, source: Any) -> None:
    target[index] += source


REFUSED = {
    "write =, and not \\+=": lambda p: added(p.corrupted.resid_pre, (0, 3), p.clean.resid_pre[0, 3].along(random(64))),
    "speaks of vectors of 32": lambda p: setattr_(
        p.corrupted.resid_pre, (0, 3), p.clean.resid_pre[0, 3].along(random(32))
    ),
    "is a portion of vectors, and pattern": lambda p: setattr_(
        p.corrupted.pattern, (0, 1, 3), p.clean.pattern[0, 1, 3].along(random(14))
    ),
    "take all of it": lambda p: setattr_(
        p.corrupted.mlp_act, (0, 3, [1, 2]), p.clean.mlp_act[0, 3, [1, 2]].along(random(2))
    ),
    "cannot be added to other values": lambda p: p.clean.resid_pre[0, 3].along(random(64)) + 1,
    "is a portion already": lambda p: p.clean.resid_pre[0, 3].along(random(64)).along(random(64)),
    "are all 0": lambda p: p.clean.resid_pre[0, 3].along(torch.zeros(2, 64)),
    "given by vectors": lambda p: p.clean.resid_pre[0, 3].along(random(2, 2, 2)),
    "vectors are real numbers": lambda p: p.clean.resid_pre[0, 3].along([1.0, float("nan")]),
    "has 10 features, 0 to 9; not": lambda p: setattr_(
        p.corrupted.resid_pre, (0, 3), p.clean.resid_pre[0, 3].features(functions(64, 10), 10)
    ),
    "encodes vectors of 32": lambda p: setattr_(
        p.corrupted.resid_pre, (0, 3), p.clean.resid_pre[0, 3].features(poor(32, 10), 1)
    ),
    "encode fails on": lambda p: setattr_(p.corrupted.resid_pre, (0, 3), functions(32, 10).clamp(1)),
    "mixes rows": lambda p: setattr_(
        p.corrupted.resid_pre, (0, 3), tp.Dictionary(lambda x: x - x.mean(0), lambda f: f).clamp(1)
    ),
    "give a number, or one each": lambda p: setattr_(
        p.corrupted.resid_pre, (0, 3), functions(64, 10).clamp([1, 2], [1, 2, 3])
    ),
    "says which features": lambda p: setattr_(p.corrupted.resid_pre, (0, 3), functions(64, 10).portion([1])),
    "two functions, or": lambda p: tp.Dictionary(lambda x: x),
    "do not fit: decoder is": lambda p: tp.Dictionary.of_weights(random(4, 6), random(4, 6)),
    "needs k=": lambda p: tp.Dictionary.of_weights(random(4, 6), random(6, 4), activation="topk", k=7),
    "needs threshold=": lambda p: tp.Dictionary.of_weights(random(4, 6), random(6, 4), activation="jumprelu"),
    "activation is one of": lambda p: tp.Dictionary.of_weights(random(4, 6), random(6, 4), activation="gelu"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_portion(gpt2: Any, message: str) -> None:
    with pytest.raises(errors.RecipeError, match=message), tp.patching(gpt2, ioi_pairs(1)) as p, p.row(name="x"):
        REFUSED[message](p)


def test_a_server_replaces_portions_there(server: Server) -> None:  # noqa: F811
    numbers = []
    for model in (toy("gpt2"), away()):
        with tp.patching(model, ioi_pairs(2)) as p:
            several(p)
        numbers.append(p.run()["value"].values)
    np.testing.assert_allclose(*numbers, atol=1e-4)
    assert server.jobs == 1
    wrapped = pytest.importorskip("functools").lru_cache(lambda x: x)
    with pytest.raises(errors.RecipeError, match="would not mean the same on the server"):
        with tp.patching(away(), ioi_pairs(1)) as p, p.row():
            p.corrupted.resid_pre[0, 3] = tp.Dictionary(wrapped, lambda f: f).clamp(1)


def test_a_directory_knows_dictionaries_by_what_they_hold(gpt2: Any, tmp_path: Path) -> None:
    stored = []
    for width, of in ((10, functions), (10, functions), (12, functions), (10, poor), (10, poor)):
        with tp.patching(gpt2, ioi_pairs(2), directory=tmp_path) as p, p.row():
            p.corrupted.resid_pre[1, 9] = p.clean.resid_pre[1, 9].features(of(64, width), [0, 1])
        stored.append(p.plan.measured["stored"])
        p.run()
    assert stored == [0, 2, 0, 0, 2]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_scripts_are_handed_portions(name: str, tmp_path: Path) -> None:
    with tp.patching(toy(name), ioi_pairs(2)) as p:
        several(p)
    found = values(p, p.run())
    for row, wanted in list(zip(p.rows, found, strict=True))[:: 3 if name == "gpt2" else 7]:
        text = row.as_nnsight(1)
        given = {
            n: v
            for n, v in {**handed(p, row), "portions": row.portions}.items()
            if f" {n}" in text.split("def patched(")[1].split("\n")[0]
        }
        value, _ = run(text, tmp_path / f"portion_{name}_{row.number}.py", toy(name), **given)
        assert abs(value - wanted[1]) < 1e-4, f"{row}: {value} instead of {wanted[1]}\n{text}"
