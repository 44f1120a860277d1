"""Corrupted prompts made automatically, several for one clean prompt, and whether they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import ioi_pairs, toy
from test_templates import IOI, byte_level

import tracepatch as tp
from tracepatch import corruptions, errors
from tracepatch.resampling import cluster_count

NAMES = (("John", "Mary"), ("Tom", "Anna"), ("Sarah", "Paul"))


def clean() -> tp.Pairs:
    """Clean prompts with spans."""
    words = [{"first": a, "second": b, "subject": a} for a, b in NAMES]
    return IOI.pairs(words, answer=" {second}", wrong=" {first}", name="names")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_token_in_turn(name: str) -> None:
    tokenizer = toy(name).tokenizer
    pairs = corruptions.each_token(clean(), tokenizer, seed=4)
    encoded, bos = pairs.encode(tokenizer), len(pairs.encode(tokenizer).bos.prefix)
    assert len(pairs) == 3 * 14
    assert pairs.corruption[:3] == tuple(f"token {i + bos}" for i in range(3))
    assert pairs.clean == tuple(text for text in clean().clean for _ in range(14))
    assert pairs.answer[14:28] == ((" Anna",),) * 14
    for i in range(len(pairs)):
        position = bos + i % 14
        assert encoded.differing(i) == (position,), "one token, and never the BOS token"
        old, new = (encoded.words([side[i][position]])[0] for side in (encoded.clean, encoded.corrupted or ()))
        assert old.isalpha() == new.isalpha(), "a word for a word, a sign for a sign"
        assert new not in ("<unk>", "<pad>", "<bos>", "<eos>")
    assert pairs == corruptions.each_token(clean(), tokenizer, seed=4)
    assert pairs.corrupted != corruptions.each_token(clean(), tokenizer, seed=5).corrupted
    assert not encoded.mapped, "the same positions"
    assert encoded.sides("corrupted")[20].spans == encoded.sides("clean")[20].spans


def test_random_and_last_tokens() -> None:
    tokenizer = toy("gpt2").tokenizer
    some = corruptions.random_tokens(clean(), tokenizer, 4, draws=2)
    assert some.corruption[:4] == ("random, draw 0", "random, draw 1") * 2
    encoded = some.encode(tokenizer)
    assert {len(encoded.differing(i)) for i in range(6)} == {4}
    assert encoded.differing(0) != encoded.differing(1)
    last = corruptions.last_tokens(clean(), tokenizer, 2)
    assert last.corruption == ("last 2",) * 3
    assert {last.encode(tokenizer).differing(i) for i in range(3)} == {(12, 13)}
    plain = corruptions.last_tokens(ioi_pairs(2), tokenizer, 1)
    assert (plain.spans, plain.align) == ((), None)
    assert plain.encode(tokenizer).differing(0) == (13,)


def test_a_replacement_begins_with_a_blank_where_the_token_does() -> None:
    tokenizer = byte_level()
    pairs = corruptions.each_token(tp.Pairs("When Zoë went, the girl gave: the 7"), tokenizer, seed=1)
    encoded = pairs.encode(tokenizer)
    seen = set()
    for i in range(len(pairs)):
        (position,) = encoded.differing(i)
        old, new = (encoded.words([side[i][position]])[0] for side in (encoded.clean, encoded.corrupted or ()))
        assert old.startswith(" ") == new.startswith(" ")
        assert (old.strip().isalpha(), old.strip().isdigit()) == (new.strip().isalpha(), new.strip().isdigit())
        seen.add((old.startswith(" "), old.strip().isalpha(), old.strip().isdigit()))
    assert len(seen) >= 3
    assert "�" not in "".join(
        w for i in range(len(pairs)) for w in encoded.words(set((encoded.corrupted or ())[i]) - set(encoded.clean[i]))
    )


def test_names_exchanged() -> None:
    pairs = corruptions.exchanged(clean(), "first", "second")
    assert pairs.corrupted == tuple(f"When {b} and {a} went to the store, {b} gave the bag to" for a, b in NAMES), (
        "wherever they stand"
    )
    assert pairs.corruption == ("first and second exchanged",) * 3
    text, marks = pairs.corrupted[2], pairs.spans[1][2]
    assert [(name, str(text)[a:b]) for name, (a, b) in marks][:4] == [
        ("first", "Paul"),
        ("second", "Sarah"),
        ("place", "store"),
        ("subject", "Paul"),
    ]
    inside = tp.Pairs("Ann and Anna met Joanna, Ann", spans={"one": [(0, 3)], "two": [(8, 12)]})
    assert corruptions.exchanged(inside, "one", "two").corrupted == ("Anna and Ann met Joanna, Anna",), "whole words"
    long = IOI.pairs({"first": "Jo", "second": "Annabel", "subject": "Jo"}, answer="a", wrong="b")
    moved = corruptions.exchanged(long, "first", "second").encode(byte_level())
    assert moved.alignments[0].mapped, "other numbers of tokens"
    moved.require_comparable()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: corruptions.exchanged(ioi_pairs(1), "first", "second"),
            "first and second cannot be exchanged in 1 of 1",
        ),
        (
            lambda t: corruptions.exchanged(clean(), "first", "object"),
            "has the spans first, second, place, subject, thing",
        ),
        (lambda t: corruptions.exchanged(clean(), "first", "subject"), "pair 0: both are 'John' in"),
        (
            lambda t: corruptions.last_tokens(clean(), t, 20),
            "20 tokens are to be replaced, and 3 of 3 prompts have fewer",
        ),
        (lambda t: corruptions.random_tokens(clean(), t, 0), "count is a number, 1 or more, not 0"),
        (lambda t: corruptions.each_token(clean(), t, draws=True), "draws is a number, 1 or more, not True"),
        (lambda t: corruptions.each_token(tp.Pairs("a", decoder="b"), t), "these have a text for a decoder"),
    ],
)
def test_corruptions_that_cannot_be_made(make: Any, message: str) -> None:
    with pytest.raises(errors.PromptError) as error:
        make(toy("gpt2").tokenizer)
    assert message in str(error.value)


def several() -> tp.Pairs:
    tokenizer = toy("gpt2").tokenizer
    one, other = corruptions.exchanged(clean(), "first", "second"), corruptions.last_tokens(clean(), tokenizer, 2)
    return one + other[1:]


def test_several_corruptions_are_a_dim(tmp_path: Path) -> None:
    pairs = several()
    assert pairs.corruption == ("first and second exchanged",) * 3 + ("last 2",) * 2
    assert pairs[[4, 0]].corruption == ("last 2", "first and second exchanged")
    effects = tp.patch(toy("gpt2"), pairs, "resid_pre", by=("layer", "span"))
    assert effects["corruption"].values.tolist() == list(pairs.corruption)
    found = tp.by_corruption(effects)
    assert dict(found.sizes) == {"corruption": 2, "pair": 3, "layer": 3, "span": 6}
    for i, (pair, name) in enumerate([(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]):
        for variable in ("effect", "normalized", "status", "clean", "corrupted"):
            np.testing.assert_array_equal(
                found[variable].isel(pair=pair, corruption=name), effects[variable].isel(pair=i)
            )
        assert found["corrupted_prompt"].isel(pair=pair, corruption=name) == effects["corrupted_prompt"][i]
    assert np.isnan(found["effect"].isel(pair=0, corruption=1)).all(), "that prompt has no such corruption"
    assert (found["status"].isel(pair=0, corruption=1) == tp.Status.ABSENT).all()
    assert found["clean_prompt"].values.tolist() == list(clean().clean)
    assert found["answer"].dims == ("pair",)
    mean = tp.over_pairs(found)
    alone = tp.over_pairs(effects.isel(pair=[0, 1, 2]))
    np.testing.assert_allclose(mean["normalized"].isel(corruption=0), alone["normalized"])
    opened = tp.open_result(tp.save_result(effects, tmp_path / "several.nc"))
    assert isinstance(opened, xr.Dataset)
    xr.testing.assert_equal(tp.by_corruption(opened), found)


def test_pairs_that_share_one_of_several_corruptions_belong_together() -> None:
    found = tp.by_corruption(tp.patch(toy("gpt2"), several(), "resid_pre", by="layer"))
    assert cluster_count(found) == 3
    shared = found["corrupted_prompt"].values.copy()  # [pair, corruption]
    shared[2, 1] = shared[1, 0]
    assert cluster_count(found.assign_coords(corrupted_prompt=(found["corrupted_prompt"].dims, shared))) == 2


def test_corruptions_of_ones_own_have_names_too() -> None:
    pairs = ioi_pairs(2)
    named = tp.Pairs(pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, corruption="swap")
    assert named.corruption == ("swap", "swap")
    assert (pairs + named).corruption == ("as given", "as given", "swap", "swap")
    assert named.both_roles().corruption == ("swap",) * 4
    with pytest.raises(errors.PromptError, match="1 corruption"):
        tp.Pairs(pairs.clean, pairs.corrupted, corruption=["swap"])
    effects = tp.patch(toy("gpt2"), named + named, "attn_out", by="layer")
    with pytest.raises(errors.ResultError, match="two corruptions of one name.\n  pair 2: 'swap' of 'When"):
        tp.by_corruption(effects)
    plain = tp.patch(toy("gpt2"), pairs, "attn_out", by="layer")
    for function in (tp.by_corruption, tp.agreement_over):
        with pytest.raises(errors.ResultError, match="These pairs' corruptions have no names"):
            function(plain)


def test_what_agrees() -> None:
    values = np.array([[1.0, 1.0, 0.01, 1.0, 1.0, np.nan, -0.5], [1.5, -1.0, -0.02, 0.01, 3.0, 1.0, -0.8]])
    dims = ("pair", "corruption", "cell")
    made = {
        "effect": (dims, values[None]),
        "normalized": (dims, values[None] / 2),
        "clean": (("pair", "corruption"), [[2.0, 2.0]]),
        "corrupted": (("pair", "corruption"), [[0.0, 0.0]]),
        "status": (dims, np.where(np.isnan(values), 0, 1)[None].astype(np.int8)),
    }
    coords = {"corruption": ["a", "b"], "cell": list("abcdefg"), "pair": [0]}
    result = xr.Dataset(made, coords, {"tracepatch_format": 1, "model": "m"})
    found = tp.agreement_over(result)
    assert found["verdict"].values.tolist() == [1, 3, 0, 2, 2, -1, 1]
    assert found["verdict"].attrs["flag_meanings"] == "absent nothing agree size sign"
    np.testing.assert_allclose(found["mean"], [0.625, 0, -0.0025, 0.2525, 1, np.nan, -0.325])
    np.testing.assert_allclose(found["smallest"].isel(cell=[0, 3, 6]), [0.5, 0.005, -0.25])
    np.testing.assert_allclose(found["largest"].isel(cell=[0, 3, 6]), [0.75, 0.5, -0.4])
    assert found["count"].values.tolist() == [2, 2, 2, 2, 2, 1, 2]
    assert found.attrs["compared"] == "normalized"
    assert tp.agreement_over(result, factor=3.5)["verdict"].values.tolist() == [1, 3, 0, 2, 1, -1, 1]
    assert tp.agreement_over(result, least=0.002)["verdict"].values.tolist() == [1, 3, 3, 2, 2, -1, 1]
    assert tp.agreement_over(result, variable="effect", least=0.6)["verdict"].values.tolist() == [1, 3, 0, 2, 2, -1, 2]
    with pytest.raises(errors.ResultError, match="has no dim 'model'"):
        tp.agreement_over(result, over="model")
    with pytest.raises(errors.ResultError, match="has no variable 'rank' along corruption"):
        tp.agreement_over(result, variable="rank")


def test_agreement_of_a_run_is_that_of_its_corruptions() -> None:
    effects = tp.patch(toy("gpt2"), several(), "resid_pre", by=("layer", "span"))
    verdict = tp.agreement_over(effects)["verdict"]
    per = tp.over_pairs(tp.by_corruption(effects))["normalized"]
    both = per.sel(span="end", layer=1).values
    assert verdict.sel(span="end", layer=1) == 1
    assert both.min() > 0.5
    assert verdict.sel(span="subject", layer=0) == 2, "only one of them changes a name"


def test_both_roles_of_several_corruptions() -> None:
    """What goes into the corrupted run in one role goes into the clean run in the other, and the metric turns round."""
    model, pairs = toy("gpt2"), several()
    there = tp.patch(model, pairs, "resid_pre", by=("layer", "span"), direction="noising")["effect"]
    both = tp.patch(model, pairs.both_roles(), "resid_pre", by=("layer", "span"))
    back = both["effect"].isel(pair=slice(len(pairs), None))
    np.testing.assert_allclose(back.values, -there.values, atol=1e-4)
    found = tp.by_corruption(both)
    assert dict(found.sizes) == {"corruption": 2, "pair": 3 + 5, "layer": 3, "span": 6}, "each is a clean prompt too"
    verdict = tp.agreement_over(both)["verdict"]
    assert verdict.sel(span="end", layer=1) == 1


def test_estimates_of_several_corruptions_agree_or_not() -> None:
    model, pairs = toy("gpt2"), several()
    estimates = tp.attribute(model, pairs, "resid_pre", by=("layer", "span"))
    found = tp.agreement_over(estimates, variable="estimate")
    per = tp.over_pairs(tp.by_corruption(estimates))["estimate"]
    np.testing.assert_allclose(found["mean"], per.mean("corruption"), atol=1e-6)
