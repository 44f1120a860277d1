"""Pairs of unequal length: which positions correspond, and patches between them against one plain forward each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import Sides, Slow, gap, uneven_pairs
from test_scripts import agree
from tiny_models import ALL, ENCODER_DECODER, build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.alignment import Aligned, Alignment, explicit, linked, paired
from tracepatch.architecture import architecture_of
from tracepatch.forms import allowed
from tracepatch.jobs import EAGER
from tracepatch.models import module_of
from tracepatch.sites import SCALES
from tracepatch.sources import OTHER
from tracepatch.table import FORMS

WORDS = [f"w{i}" for i in range(30, 60)]
UNSEEN = ("q_in", "k_in", "v_in", "q", "k", "v", "scores", "pattern")  # by the oracle, in attention of its own code
LONGER = "When John and Mary and Tom went to the store, Mary gave the bag to"


def uneven() -> tp.Pairs:
    """Toy prompts: at first of 14 and 16 tokens, then of 11 and 11."""
    return tp.Pairs(
        [
            "When John and Mary went to the store, John gave the bag to",
            "After Tom and Anna left the store, Tom gave the",
        ],
        [LONGER, "After Tom and Anna left the store, Anna gave the"],
        [" Mary", " Anna"],
        [" John", " Tom"],
        align=[{**{i: i for i in range(4)}, **{i: i + 2 for i in range(4, 14)}}, {i: i for i in range(11)}],
    )


# ------------------------------------------------------------------------------------------------ which correspond


@pytest.mark.parametrize(
    ("way", "clean", "corrupted", "links"),
    [
        ("prefix", "abcd", "abxycd", {0: 0, 1: 1, 2: 2, 3: 3}),
        ("suffix", "abcd", "abxycd", {0: 2, 1: 3, 2: 4, 3: 5}),
        ("ends", "abcd", "abxycd", {0: 0, 1: 1, 2: 4, 3: 5}),
        ("ends", "abcd", "axyd", {0: 0, 1: 1, 2: 2, 3: 3}),  # between the ends equally many: one by one
        ("ends", "abcd", "axyzd", {0: 0, 3: 4}),
        ("ends", "aab", "aaab", {0: 0, 1: 1, 2: 3}),  # never one token twice
        ("ends", "xb", "yyb", {1: 2}),
        ("suffix", "abc", "c", {2: 0}),
    ],
)
def test_ways_to_align(way: Any, clean: str, corrupted: str, links: dict[int, int]) -> None:
    found = linked(way, [ord(c) for c in clean], [ord(c) for c in corrupted], ({}, {}))
    assert dict(found) == links  # type: ignore[arg-type]


def test_spans_are_aligned_from_their_last_tokens_and_the_text_between_one_by_one() -> None:
    clean, corrupted = [1, 20, 21, 3, 4, 5], [1, 30, 3, 4, 40, 41, 5]
    spans = {"subject": (1, 2), "end": (5,)}, {"subject": (1,), "end": (6,)}
    assert linked("spans", clean, corrupted, spans) == ((0, 0), (2, 1), (3, 2), (4, 3), (5, 6))
    exchanged = {"a": (1,), "b": (3, 4)}, {"a": (3,), "b": (1,)}
    assert linked("spans", [0, 1, 2, 3, 4], [0, 1, 2, 3], exchanged) == ((1, 3), (4, 1)), "what stands between does not"
    assert linked("spans", clean, corrupted, ({}, {})) == "the prompts have no spans"
    shared = {"a": (1, 2), "b": (2, 3)}, {"a": (1,), "b": (2,)}
    assert linked("spans", clean, corrupted, shared) == "spans share tokens of the clean prompt (position 2)"


def test_a_map_may_count_from_the_end_and_must_be_one_to_one() -> None:
    assert explicit([(0, 0), (-1, -1)], (5, 7)) == ((0, 0), (4, 6))
    assert explicit([(5, 0)], (5, 7)) == "the map has position 5 of a clean prompt of 5 tokens"
    assert explicit([(0, 6), (1, -1)], (5, 7)) == "the map has position 6 of the corrupted prompt twice"
    assert explicit([], (5, 7)) == "the map is empty"


def test_a_side_knows_partners_and_shared_spans() -> None:
    spans = {"s": (1, 2, 3)}, {"s": (1, 2)}
    pair = paired((5, 4), ((0, 0), (2, 1), (3, 2), (4, 3)), spans)
    assert pair.mapped
    assert not pair.even
    assert [pair.clean.here(p, "corrupted") for p in range(4)] == [0, 2, 3, 4]
    assert [pair.corrupted.here(p, "clean") for p in range(5)] == [0, None, 1, 2, 3]
    assert pair.clean.here(1, "clean") is None, "it has no partner"
    assert (pair.clean.span("s"), pair.clean.span("s", crossing=True)) == ((1, 2, 3), (2, 3))
    assert pair.corrupted.span("s", crossing=True) == (1, 2)
    assert paired((3, 3), ((0, 0), (1, 1), (2, 2))) == paired((3, 3)), "an identity map is no map"
    assert paired((3, 3), ((0, 0),)).mapped, "part of one is"


def test_pairs_that_cannot_be_aligned_are_all_named() -> None:
    tokenizer = toy("gpt2").tokenizer
    pairs = tp.Pairs(
        ["When John left", "When John left", "When Mary"],
        ["When John", "Tom gave the bag", "When Tom"],
        " Mary",
        " John",
        align="ends",
    )
    with pytest.raises(errors.PromptError) as error:
        tp.patching(toy("gpt2"), pairs)
    assert str(error.value) == (
        "1 of 3 pairs cannot be aligned.\n"
        "  pair 1: the prompts share no token at either end   'When John left' / 'Tom gave the bag'\n"
        "Reword them, leave them out, or align them in another way: align= takes 'ends', 'prefix', 'suffix', 'spans', or "
        "for each pair a map of clean to corrupted positions."
    )
    maps = tp.Pairs(pairs.clean, pairs.corrupted, " Mary", align=[{0: 2}, {}, {0: 0, 1: 0}])
    assert maps.encode(tokenizer).unaligned == (
        "pair 0: the map has position 2 of a corrupted prompt of 2 tokens   'When John left' / 'When John'",
        "pair 1: the map is empty   'When John left' / 'Tom gave the bag'",
        "pair 2: the map has position 0 of the corrupted prompt twice   'When Mary' / 'When Tom'",
    )
    checklist = maps.check(toy("gpt2"))
    assert not checklist.passed
    assert "FAIL  3 of 3 pairs cannot be aligned." in str(checklist)


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ("middle", "align is one of 'ends', 'prefix', 'suffix', 'spans', or for each pair a map"),
        ([{0: 0}], "align has 1 maps for 2 pairs"),
        ([{0: "a"}, {0: 0}], "align is one of"),
        (7, "align is one of"),
    ],
)
def test_alignments_that_say_nothing(align: Any, message: str) -> None:
    with pytest.raises(errors.PromptError, match=message):
        tp.Pairs(["a", "b"], ["c", "d"], align=align)


def test_some_pairs_and_both_roles_keep_their_maps() -> None:
    pairs = tp.Pairs(["a b c", "a b"], ["a c", "a b d"], "a", "b", align=[{0: 0, 2: 1}, {1: 2}])
    assert pairs[[1]].align == (((1, 2),),)
    assert pairs.both_roles().align == (((0, 0), (2, 1)), ((1, 2),), ((0, 0), (1, 2)), ((2, 1),))
    assert tp.Pairs("a b", "b", align="suffix").both_roles().align == "suffix"


def test_the_checklist_says_what_has_no_partner() -> None:
    text = str(uneven().check(toy("gpt2")))
    assert (
        "note  prompts are aligned position by position: 11 to 16 tokens; in 1 pair some tokens have no partner" in text
    )
    assert "      pair 0: 'and' 'Tom' of the corrupted prompt\n" in text
    assert "      position 9 → 11 in 1 pair, as in pair 0: 'John' → 'Mary'\n" in text
    assert "      position 8 in 1 pair, as in pair 1: 'Tom' → 'Anna'\n" in text
    apart = tp.Pairs(["When John and Mary left"], ["When Mary left"], " Mary", " John", align="ends")
    assert "note  the prompts of a pair differ only in tokens that have no partner" in str(apart.check(toy("gpt2")))


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("align", ["ends", "prefix", "suffix", {i: i for i in range(14)}])
def test_an_identity_map_is_no_map_to_the_last_bit(name: str, align: Any) -> None:
    plain = ioi_pairs(2)
    length = plain.encode(toy(name).tokenizer).lengths[0]
    align = {i: i for i in range(length)} if isinstance(align, dict) else align
    aligned = tp.Pairs(plain.clean, plain.corrupted, plain.answer, plain.wrong, align=align)
    found = []
    for pairs in (plain, aligned):
        with tp.patching(toy(name), pairs, [tp.logit_diff, tp.kl, tp.cross_entropy]) as p:
            for layer, pos in p.grid("resid_pre"):
                assert type(pos) is int
                with p.row(layer=layer, pos=pos):
                    p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
            for head in range(4):
                with p.row(head=head):
                    p.clean.z[1, :, head] = p.corrupted.z[1, :, head]
                with p.row(head=head, name="pattern"):
                    p.clean.pattern[1, head] = p.corrupted.pattern[1, head]
        told = [line for line in p.plan.explain().splitlines() if not line.startswith("  time")]
        found.append((told, p.run()))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1].subtree, found[1][1].subtree, strict=True):
        xr.testing.assert_identical(one.to_dataset().drop_attrs(), other.to_dataset().drop_attrs())


# ------------------------------------------------------------------------------------------------ the oracle


def rows_of(p: tp.Patching, name: str, base: str) -> None:
    """Rows for every kind of index of a component, between prompts of unequal length."""
    kind = tp.COMPONENTS[name]
    world, other = getattr(p, base), getattr(p, OTHER[base])
    live, source = getattr(world, name), getattr(other, name)
    count, number = p.architecture.units(name, 0), 0
    units: list[Any] = [()] if not kind.unit else [(0,), (slice(None),), ([0, count - 1],)]
    spots: list[Any] = [slice(None), -1, [-3, -1], slice(0, 2), slice(-2, None), p.aligned([0, 2], of=world)]
    if kind.attends:
        sites = [(0, slice(None)), (slice(None), -1), (0, -1, slice(None)), (0, slice(None), slice(None))]
        sites += [(count - 1, dest, src) for dest, src in p.grid(name, ("dest", "src"), base=world, layer=0)][::3]
        sites += [([0, 1], p.aligned([2, 3], of=p.clean), slice(None)), (0, slice(None), 0)]
    else:
        spots += [i[0] for i in p.grid(name, ("pos",), base=world, **({"layer": 0} if kind.layered else {}))]
        sites = [(spot, *unit) for unit in units for spot in (spots if unit in ((), (0,)) else [slice(None), -1])]
    for layer in range(2) if kind.layered else [None]:
        for site in sites if layer in (None, 0) else sites[::2]:
            at = site if layer is None else (layer, *site)
            with p.row(component=name, number=number):
                live[at] = source[at]
            number += 1


def compare(p: tp.Patching, sides: list[Sides], eager: bool = False) -> None:
    """Every value against the oracle's; a row that it cannot write is one that a pair does not have."""
    slow = Slow(module_of(p.model), p.encoded, eager=eager, edited=p.edited, sides=sides)
    values, metric = p.run()["value"].isel(component=0, missing_dims="ignore").values, gap(p.encoded)
    wanted = np.full(values.shape, np.nan)
    for row in p.rows:
        for pair in range(len(p.encoded)):
            try:
                wanted[pair, row.number] = float(metric(slow.logits(row, pair), pair))
            except (KeyError, IndexError):  # no such position, or none that corresponds
                continue
    assert (np.isnan(values) == np.isnan(wanted)).all(), "each knows which rows a pair has"
    assert np.nanmax(abs(values - wanted)) / (1 + np.nanmax(abs(wanted))) < 1e-5
    bases = np.array([float(metric(slow.base(p.rows[0].base, i), i)) for i in range(len(p.encoded))])
    assert np.nanmax(abs(wanted - bases[:, None])) > 1e-3, "no patch moved the metric, so this compared nothing"


def every_component(model_type: str, base: str, forms: tuple[Any, ...] = (None,)) -> Iterator[str]:
    """Every component that can be patched between positions, in each of the forms that the model allows."""
    model, (pairs, sides) = tp.load(build(model_type, layers=2), tokenizer()), uneven_pairs(WORDS)
    architecture = architecture_of(model)
    for name in (
        c for c in tp.COMPONENTS if c not in SCALES and architecture.offers(c, 0) and architecture.offers(c, 1)
    ):
        own_code = name in UNSEEN and model_type in ("gptj", "gpt_neo", "bloom", "falcon", "mpt")
        if (
            own_code
            or (name in ("q", "k") and architecture.rotated(0))
            or (name == "attn_in" and model_type == "mamba")
        ):
            continue
        for form in forms:
            if form in allowed(model, architecture, name in EAGER).refused:
                continue
            with tp.patching(model, pairs, form=form) as p:
                rows_of(p, name, base)
            compare(p, sides, eager=name in EAGER)
        yield name


@pytest.mark.parametrize(("model_type", "base"), [("gpt2", "corrupted"), ("gemma2", "clean")])
def test_every_component_between_prompts_of_unequal_length(model_type: str, base: str) -> None:
    assert len(list(every_component(model_type, base))) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", [t for t in ALL if t not in ENCODER_DECODER])
def test_unequal_lengths_on_every_decoder_in_every_form(model_type: str, base: str) -> None:
    assert len(list(every_component(model_type, base, FORMS))) >= 4


SPOTS = st.one_of(
    st.integers(-6, 5),
    st.just(slice(None)),
    st.sampled_from([slice(0, 2), slice(-2, None)]),
    st.sampled_from([0, 2, 3, 5]).map(lambda n: Aligned(n, "corrupted")),
    st.sampled_from([0, 2]).map(lambda n: Aligned(n, "clean")),
    st.sampled_from([[0, 1], [-2, 3]]),
)


@pytest.mark.filterwarnings("ignore:The patches change nothing")
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_recipes_between_prompts_of_unequal_length(model_type: str, data: st.DataObject) -> None:
    random_recipes(model_type, data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The patches change nothing")
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "gemma2"])
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_thousand_random_recipes_between_prompts_of_unequal_length(model_type: str, data: st.DataObject) -> None:
    random_recipes(model_type, data)


def random_recipes(model_type: str, data: st.DataObject) -> None:
    """Rows of up to three random edits, with sums, additions and standing edits, against the oracle."""
    model, (pairs, sides) = tp.load(build(model_type, layers=2), tokenizer()), uneven_pairs(WORDS, seed=1)
    architecture = architecture_of(model)
    offered = [c for c in tp.COMPONENTS if architecture.offers(c, 0) and c not in SCALES]
    offered = [c for c in offered if not (c in ("q", "k") and architecture.rotated(0))]
    base = data.draw(st.sampled_from(["clean", "corrupted", "edited"]))
    with tp.patching(model, pairs, batch_size=5) as p:
        if base == "edited":
            world = p.world("edited", of=p.corrupted)
            at = p.aligned(2, of=p.clean)  # which every pair has
            world.resid_pre[0, at] += 0.5 * p.clean.resid_pre[0, at]
        live = world if base == "edited" else getattr(p, base)
        other = p.clean if base != "clean" else p.corrupted
        for number in range(data.draw(st.integers(1, 3))):
            with p.row(number=number):
                for _ in range(data.draw(st.integers(1, 3))):
                    name = data.draw(st.sampled_from(offered))
                    kind = tp.COMPONENTS[name]
                    heads = min(4, architecture.units(name, 0))
                    unit = st.one_of(st.integers(0, max(0, heads - 1)), st.just(slice(None)))
                    ranges = {"layer": st.integers(0, 1), **dict.fromkeys(("pos", "dest", "src"), SPOTS)}
                    site = tuple(data.draw(ranges.get(dim, unit)) for dim in kind.index)
                    mine, theirs = getattr(live, name), getattr(other, name)
                    how = data.draw(st.sampled_from(["other", "base", "zero", "mix"]))
                    split_reader = base == "edited" and how == "base" and name in ("q_in", "k_in", "v_in")
                    value = {
                        "other": lambda t=theirs, s=site: t[s],
                        "base": lambda m=mine, s=site: m[s],
                        "zero": lambda: 0,
                        "mix": lambda m=mine, t=theirs, s=site: 2 * t[s] - m[s] / 2,
                    }["zero" if split_reader else how]()
                    if data.draw(st.booleans()):
                        mine[site] += value
                    else:
                        mine[site] = value
    compare_quietly(p, sides, any(e.site.component in EAGER for row in p.rows for e in row.edits))


def compare_quietly(p: tp.Patching, sides: list[Sides], eager: bool) -> None:
    """As ``compare``, of rows that may well do nothing."""
    slow = Slow(module_of(p.model), p.encoded, eager=eager, edited=p.edited, sides=sides)
    values, metric = p.run()["value"].values, gap(p.encoded)
    for row in p.rows:
        for pair in range(len(p.encoded)):
            try:
                wanted = float(metric(slow.logits(row, pair), pair))
            except (KeyError, IndexError):
                assert np.isnan(values[pair, row.number])
                continue
            assert abs(values[pair, row.number] - wanted) < 1e-5 * (1 + abs(wanted)), f"pair {pair}, {row}"


# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_a_map_is_manual_indexing(base: str) -> None:
    """Pair by pair: `:`, the positions of a grid and a whole sweep against lists and numbers written by hand."""
    model, (pairs, sides) = toy("llama"), uneven_pairs(list(tp.toys.tasks.WORDS), seed=2)
    for i, side in enumerate(sides):
        one, bos = pairs[[i]], 1  # the tokenizer puts a BOS token in front
        links = {0: 0} | {a + bos: b + bos for a, b in side.links.items()}
        one = tp.Pairs(one.clean, one.corrupted, one.answer, one.wrong, align=links)
        own, other = ((b, a) for a, b in links.items()), base
        places = {(b, a)[other == "clean"]: (a, b)[other == "clean"] for a, b in links.items()}
        del own
        with tp.patching(model, one) as aligned:
            world, there = getattr(aligned, base), getattr(aligned, OTHER[base])
            for layer, pos in aligned.grid("attn_out", base=world):
                assert isinstance(pos, Aligned)
                with aligned.row(layer=layer, pos=pos):
                    world.attn_out[layer, pos] = there.attn_out[layer, pos]
            with aligned.row(layer=1):
                world.z[1, :, 2] = there.z[1, :, 2]
        with tp.patching(model, tp.Pairs(one.clean, one.corrupted, one.answer, one.wrong, align="prefix")) as manual:
            world, there = getattr(manual, base), getattr(manual, OTHER[base])
            for layer in range(len(manual.architecture)):
                for here, partner in sorted(places.items()):
                    with manual.row(layer=layer, pos=here):
                        world.attn_out[layer, here] = there.attn_out[layer, partner]
            with manual.row(layer=1):
                world.z[1, list(places), 2] = there.z[1, list(places.values()), 2]
        found, wanted = aligned.run(), manual.run()
        for name in ("value", "status"):
            for part in ("layer_pos", "layer"):
                np.testing.assert_array_equal(found[part][name].values, wanted[part][name].values)
        sweep = tp.patch(model, one, "attn_out", direction={"corrupted": "denoising", "clean": "noising"}[base])
        np.testing.assert_allclose(sweep["value"].values, found["layer_pos"]["value"].values, atol=1e-5)


def test_a_number_is_each_prompts_own_and_minus_one_its_last() -> None:
    with tp.patching(toy("gpt2"), uneven()) as p:
        with p.row(name="own"):
            p.corrupted.resid_post[2, 13] = p.clean.resid_post[2, 13]
        with p.row(name="last"):
            p.corrupted.resid_post[2, -1] = p.clean.resid_post[2, -1]
        with p.row(name="partner"):
            p.corrupted.resid_post[2, 15] = p.clean.resid_post[2, p.aligned(15)]
    result = p.run()
    own, last, partner = (result.sel(name=name) for name in ("own", "last", "partner"))
    assert result["status"].sel(name="own").values.tolist() == [tp.Status.PROVED_ZERO, tp.Status.ABSENT]
    assert float(own["effect"][0]) == 0, "position 13 of the corrupted prompt is not its last"
    np.testing.assert_allclose(last["value"], last["clean"], atol=1e-4)
    np.testing.assert_array_equal(partner["value"][0], last["value"][0])
    assert np.isnan(partner["value"][1])


def test_zeroing_everywhere_is_everywhere() -> None:
    """`:` means aligned positions only where values go from one prompt to the other."""
    with tp.patching(toy("gpt2"), uneven()) as p:
        with p.row(name="all"):
            p.corrupted.attn_out[0, :] = 0
        with p.row(name="each"):
            p.corrupted.attn_out[0, list(range(16))] = 0
        with p.row(name="own"):
            p.corrupted.attn_out[0, :] = p.corrupted.attn_out[1, :]
    result = p.run()
    np.testing.assert_array_equal(result["value"].sel(name="all")[0], result["value"].sel(name="each")[0])
    assert result["status"].sel(name="own").values.tolist() == [1, 1]
    swept = tp.patch(toy("gpt2"), uneven(), "attn_out", source=0)
    assert swept["pos"].values.tolist() == list(range(16)), "what has no partner can be zeroed too"
    np.testing.assert_array_equal(swept["status"].isel(layer=0)[0] != tp.Status.ABSENT, True)


def test_labels_carry_the_tokens_of_both() -> None:
    denoised = tp.patch(toy("gpt2"), uneven(), "resid_pre", direction="denoising")
    assert denoised["pos"].values.tolist() == [0, 1, 2, 3, *range(4, 16)], "in the corrupted prompts' counting"
    first = denoised.isel(pair=0).sel(pos=[3, 11, 12, 15])
    assert first["corrupted_token"].values.tolist() == ["Mary", "Mary", "gave", "to"]
    assert first["token"].values.tolist() == ["Mary", "John", "gave", "to"]
    assert denoised["token"].isel(pair=0).sel(pos=4).item() == "", "'and' has no partner"
    assert np.isnan(denoised["effect"].isel(pair=0).sel(pos=4)).all()
    noised = tp.patch(toy("gpt2"), uneven(), "resid_pre", direction="noising")
    assert noised["pos"].values.tolist() == list(range(14))
    assert noised.isel(pair=0).sel(pos=[3, 9])["corrupted_token"].values.tolist() == ["Mary", "Mary"]
    assert noised.isel(pair=0).sel(pos=[3, 9])["token"].values.tolist() == ["Mary", "John"]
    held = tp.patch(toy("gpt2"), uneven(), "z", by=("layer", "head"), only={"pos": 11})
    with tp.patching(toy("gpt2"), uneven()) as p:
        for layer, head in p.grid("z", by=("layer", "head")):
            with p.row(layer=layer, head=head):
                p.corrupted.z[layer, 11, head] = p.clean.z[layer, p.aligned(11), head]
    np.testing.assert_array_equal(held["value"], p.run()["value"])


def test_what_a_grid_offers() -> None:
    p = tp.patching(toy("gpt2"), uneven())
    assert p.grid("resid_pre", "pos", pos=[4, 11], layer=0) == [4, 11]  # 4 of the second pair has a partner
    assert p.grid("resid_pre", "pos", pos=[-1]) == [-1]
    assert [type(n) for n in p.grid("resid_pre", "pos", pos=[-1])] == [int]
    assert p.grid("resid_pre", "pos", base=p.clean, pos=slice(10, None)) == [10, 11, 12, 13]
    assert {n.of for n in p.grid("resid_pre", "pos", base=p.clean)} == {"clean"}
    assert {type(n) for n in p.grid("resid_pre", "pos", aligned=False)} == {int}
    short = tp.Pairs([LONGER], ["When Mary"], " Mary", align={0: 0, 15: 1})
    p = tp.patching(toy("gpt2"), short)
    with pytest.raises(errors.SiteError) as error:
        p.grid("resid_pre", "pos", base=p.clean, pos=[0, 9])
    assert str(error.value) == (
        "grid: pos=[0, 9]: position 9 of the clean prompts has a partner in no pair; those that have one: 0, 15. "
        "aligned=False runs over all of them."
    )


def test_counts_that_differ_are_refused_where_they_are_written() -> None:
    p = tp.patching(toy("gpt2"), uneven())
    with pytest.raises(errors.RecipeError) as error, p.row():
        p.corrupted.resid_pre[0, 4:] = p.clean.resid_pre[0, 4:]
    assert str(error.value) == (
        "clean.resid_pre[0, 4:] has 10 pos entries and does not fit resid_pre[0, 4:], which has 12 (in a pair of 14 clean "
        "and 16 corrupted tokens)."
    )
    with pytest.raises(
        errors.RecipeError, match="takes resid_pre\\[0, 4:\\] of both prompts, which is not equally many"
    ):
        with p.row():
            p.corrupted.resid_pre[0, 4:] = lambda live, clean, corrupted: clean
    with pytest.raises(errors.SiteError, match="mixes positions of different prompts"), p.row():
        p.corrupted.resid_pre[0, [p.aligned(3), 4]] = 0
    with (
        pytest.raises(errors.SiteError, match="position 20 of corrupted has a partner in no pair; aligned are"),
        p.row(),
    ):
        p.corrupted.resid_pre[0, p.aligned(20)] = 0


def test_rotated_queries_and_keys_are_not_moved() -> None:
    for name, base in (("q", "corrupted"), ("k", "clean")):
        p = tp.patching(toy("llama"), uneven_toy("llama"))
        live, other = getattr(getattr(p, base), name), getattr(getattr(p, OTHER[base]), name)
        with pytest.raises(errors.RecipeError) as error, p.row():
            live[1, :] = other[1, :]
        text = str(error.value)
        assert "turns queries and keys by their position" in text
        assert "(here from position " in text
        assert f"Move what they are made of: {name}_in." in text
        with p.row(name="same place"):  # before the prompts part
            live[1, 2] = other[1, 2]
    with tp.patching(toy("llama"), uneven_toy("llama")) as p, p.row(name="what they are made of"):
        p.corrupted.q_in[1, :] = p.clean.q_in[1, :]
    assert abs(p.run()["effect"]).max() > 1e-3


def uneven_toy(name: str) -> tp.Pairs:
    """As ``uneven``, counted with a BOS token where there is one."""
    bos = len(tp.Pairs("When").encode(toy(name).tokenizer).bos.prefix)
    pairs = uneven()
    assert isinstance(pairs.align, tuple)
    maps = [{i: i for i in range(bos)} | {a + bos: b + bos for a, b in links} for links in pairs.align]
    return tp.Pairs(pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, align=maps)


@pytest.mark.parametrize("component", ["resid_pre", "attn_out", "pattern"])
def test_pruned_is_unpruned_and_only_the_common_start_is_proved(component: str) -> None:
    model, pairs = toy("gpt2"), uneven()[:1]
    by = ("layer", "head", "dest") if component == "pattern" else ("layer", "pos")
    found = [tp.patch(model, pairs, component, by=by, prune=prune) for prune in (True, False)]
    np.testing.assert_allclose(found[0]["value"], found[1]["value"], atol=1e-4)
    dim = by[-1]
    proved = (found[0]["status"] == tp.Status.PROVED_ZERO).isel(pair=0, layer=0, head=0, missing_dims="ignore")
    local = set(range(12, 16)) & set() if component != "resid_pre" else set()
    assert {int(n) for n in proved[dim][proved]} == {0, 1, 2, 3} | local, "the tokens agree so far, and no further"
    assert (found[1]["status"] == tp.Status.MEASURED).all()


def test_what_follows_a_prompt_may_move_what_stands_before() -> None:
    """A model whose positions turn otherwise in longer prompts agrees nowhere with a shorter one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 7, "factor": 2.0}
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    module = build("llama", layers=2, rope_parameters=rope | factors)
    model, (pairs, sides) = tp.load(module, tokenizer()), uneven_pairs(WORDS)
    assert architecture_of(model).causal
    assert not architecture_of(model).extends
    assert architecture_of(tp.load(build("llama", layers=2), tokenizer())).extends
    with tp.patching(model, pairs[[1]]) as p:
        for layer, pos in p.grid("z", ("layer", "pos")):
            with p.row(component="z", number=len(p.rows)):
                p.corrupted.z[layer, pos] = p.clean.z[layer, pos]
    compare(p, [sides[1]])
    assert p.plan.jobs == 7, "in the first of two layers every position counts"


# ------------------------------------------------------------------------------------------------ metrics, saves, text


def test_metrics_that_compare_with_the_other_prompt() -> None:
    model, pairs = toy("gpt2"), uneven()
    metrics = [tp.kl, tp.cross_entropy, tp.kl.at(slice(None)), tp.logit_diff.at(-2)]
    metrics = [
        tp.Metric(**{f: getattr(m, f) for f in m.__dataclass_fields__} | {"name": f"m{i}"})
        for i, m in enumerate(metrics)
    ]
    with tp.patching(model, pairs, metrics) as p:
        with p.row(name="noised"):
            p.clean.attn_out[0, :] = p.corrupted.attn_out[0, :]
        with p.row(name="denoised"):
            p.corrupted.attn_out[0, :] = p.clean.attn_out[0, :]
    found = p.run()["value"].transpose("metric", "name", "pair").values
    links = [dict(one) for one in pairs.align]  # type: ignore[union-attr,arg-type]
    slow = Slow(module_of(model), p.encoded, sides=[Sides(one) for one in links])
    for n, row in enumerate(p.rows):
        for i in range(2):
            logits, clean = slow.logits(row, i).double().log_softmax(-1), slow.base("clean", i).double().log_softmax(-1)
            own, there = (list(side) for side in zip(*sorted(links[i].items()), strict=True))
            here = own if row.base == "clean" else there
            after = [*p.encoded.clean[i][1:], p.encoded.answer[i][0]]

            def divergence(at: list[int], reference: list[int]) -> float:
                return float((clean[reference].exp() * (clean[reference] - logits[at])).sum(-1).mean())  # noqa: B023

            assert abs(found[0, n, i] - divergence([-1], [-1])) < 1e-5
            assert abs(found[2, n, i] - divergence(here, own)) < 1e-5
            loss = -np.mean([float(logits[p, after[q]]) for p, q in zip(here, own, strict=True)])
            assert abs(found[1, n, i] - loss) < 1e-5
            answer, wrong = p.encoded.answer[i][0], p.encoded.wrong[i][0]
            raw = slow.logits(row, i)[-2]
            assert abs(found[3, n, i] - float(raw[answer] - raw[wrong])) < 1e-4


def test_metrics_that_cannot_compare() -> None:
    with pytest.raises(errors.MetricError, match="compares runs of pair 0 at 12 clean and 14 corrupted positions"):
        with tp.patching(toy("gpt2"), uneven()[:1], tp.kl.at(slice(2, None))) as p, p.row():
            p.corrupted.resid_pre[0, 0] = 0
    with pytest.raises(errors.MetricError, match="position 4 of the corrupted prompt of pair 0 has no partner there"):
        with tp.patching(toy("gpt2"), uneven(), tp.cross_entropy.at(4)) as p, p.row():
            p.corrupted.resid_pre[0, 0] = 0


def test_logits_are_written_between_prompts() -> None:
    with tp.patching(toy("gpt2"), uneven(), [tp.logit_diff, tp.kl]) as p:
        with p.row(name="all"):
            p.corrupted.logits[:] = p.clean.logits[:]
        with p.row(name="last"):
            p.clean.logits[-1] = p.corrupted.logits[-1]
    result = p.run()
    np.testing.assert_allclose(
        result["value"].sel(metric="logit_diff", name="all"), result["clean"].sel(metric="logit_diff"), atol=1e-4
    )
    np.testing.assert_allclose(
        result["value"].sel(metric="logit_diff", name="last"), result["corrupted"].sel(metric="logit_diff"), atol=1e-4
    )
    np.testing.assert_allclose(result["value"].sel(metric="kl", name="all"), 0, atol=1e-5)
    # The first of five tokens is their fifth from the end: the shorter prompt is read at fewer positions.
    pairs = tp.Pairs("Tom gave the bag to", "When Anna gave the bag to", " Mary", " John", align="suffix")
    first, fifth = tp.logit_diff.at(0), replace(tp.logit_diff.at(-5), name="fifth")
    with tp.patching(toy("gpt2"), pairs, [first, fifth]) as p, p.row():
        p.corrupted.logits[0] = p.clean.logits[0]
    result = p.run()
    np.testing.assert_allclose(result["value"][0, 0], result["clean"][0], atol=1e-5)
    np.testing.assert_allclose(result["value"][1, 0], result["corrupted"][1], atol=1e-5)
    assert (abs(result["clean"] - result["corrupted"]) > 1e-2).all()


def test_saves_count_in_the_prompt_of_their_row() -> None:
    with tp.patching(toy("gpt2"), uneven()) as p:
        with p.row(name="corrupted"):
            p.corrupted.z[0, :] = p.clean.z[0, :]
            there = p.save(p.corrupted.resid_post[1, :])
            own = p.save(p.corrupted.pattern[1, 0, -1], name="looks")
        with p.row(name="clean"):
            here = p.save(p.clean.resid_post[1, :])
    p.run()
    slow = Slow(module_of(p.model), p.encoded, sides=[Sides(dict(links)) for links in p_links(p)])
    assert there.values.sizes["pos"] == 16
    assert here.values.sizes["pos"] == 14
    np.testing.assert_allclose(here.values[0], slow.values["clean", 0]["resid_pre", 2], atol=1e-4)
    np.testing.assert_allclose(here.values[1, :11], slow.values["clean", 1]["resid_pre", 2], atol=1e-4)
    live = slow.references["corrupted", 0].values(slow.ids["corrupted", 0], slow.edits(p.rows[0], 0))
    np.testing.assert_allclose(there.values[0], live["resid_pre", 2], atol=1e-4)
    assert there.values["corrupted_token"].isel(pair=0).sel(pos=[4, 11]).values.tolist() == ["and", "Mary"]
    assert there.values["token"].isel(pair=0).sel(pos=[4, 11]).values.tolist() == ["", "John"]
    assert here.values["corrupted_token"].isel(pair=0).sel(pos=9).item() == "Mary"
    assert own.values.sizes["src"] == 16
    assert set(p.saved.dims) >= {"pair", "name"}


def p_links(p: tp.Patching) -> list[tuple[tuple[int, int], ...]]:
    found = []
    for alignment in p.encoded.alignments:
        here = alignment.clean
        own = tuple(range(here.length)) if here.aligned is None else here.aligned
        found.append(tuple(zip(own, own if here.partners is None else here.partners, strict=True)))
    return found


def test_scripts_index_each_prompt_by_its_own_positions(tmp_path: Path) -> None:
    model, pairs = toy("gpt2"), uneven()
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with tp.patching(model, pairs, tp.kl) as p:
        with p.row(number=0):
            p.corrupted.z[0, :, 1] = p.clean.z[0, :, 1]
        with p.row(number=1):
            p.clean.resid_pre[1, p.aligned(11)] = 2 * p.corrupted.resid_pre[1, 11] - p.clean.resid_pre[1, -1]
        with p.row(number=2):
            p.corrupted.pattern[1, 2, :, :] = p.clean.pattern[1, 2, :, :]
        with p.row(number=3):
            p.corrupted.attn_out[1, :] = lambda live, clean, corrupted: live + clean - corrupted
        with p.row(number=4):
            p.corrupted.mlp_out[0, :] += p.gaussian(0.5) + p.clean.mlp_out[0, :]
        with p.row(number=5):
            p.clean.mlp_out[0, 11:13] = vectors
    assert agree(p, 0, tmp_path) > 1e-3
    assert "resid_pre[0, 9] = 2 * corrupted_resid_pre_1[0, 11]" in p.rows[1].as_nnsight(0), (
        "9 is the clean prompt's own number for position 11"
    )
    with pytest.raises(errors.RecipeError, match="its prompts have 11 tokens, which are too few for mlp_out"):
        p.rows[5].as_nnsight(1)


def test_explain_says_how_they_run() -> None:
    model = toy("gpt2")
    with tp.patching(model, uneven()) as p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    text = p.plan.explain()
    assert "\n  batches      2 packed (tokens side by side, from each row's first edit on)" in text
    assert "\n  traced runs  4, 2 of them for the 4 unpatched worlds\n" in text
    assert (
        "\n  note         1 pair of prompts that differ in length, or in where metrics read: their worlds run first, by "
        "themselves, and a batch has rows of clean or of corrupted prompts alone" in text
    )
    p.run()
    assert "2 of them" in p.plan.explain()


def test_a_raw_trace_runs_on_either_prompt() -> None:
    def silence(model: Any) -> None:
        model.transformer.h[0].attn.c_proj.output = 0 * model.transformer.h[0].attn.c_proj.output

    with tp.patching(toy("gpt2"), uneven()) as p:
        with p.row(name="raw"):
            p.trace(silence)
        with p.row(name="row"):
            p.corrupted.attn_out[0, :] = 0
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="raw"), value.sel(name="row"), atol=1e-3)


def test_alignments_are_data() -> None:
    one = uneven().encode(toy("gpt2").tokenizer).alignments[0]
    assert isinstance(one, Alignment)
    assert one.corrupted.aligned == (0, 1, 2, 3, *range(6, 16))
    assert one.clean.partners == one.corrupted.aligned
