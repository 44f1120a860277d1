"""Means, drawn prompts and noise, in pairs of unequal length and by named spans, against the oracle."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow import Sides, Slow, gap
from test_alignment import p_links
from test_references import setattr_, values
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.jobs import EAGER
from tracepatch.models import module_of
from tracepatch.prompts import revised
from tracepatch.sites import SCALES
from tracepatch.table import FORMS

TEMPLATES = {
    "one": tp.Template("w30 w31 {subject} w32 {verb} w33 {extra}w34"),
    "other": tp.Template("w35 {verb} w36 w37 w38 {subject} w39 w40 w41 w30"),
}
Words = Mapping[str, str]
CLEAN = (
    {"subject": "w42 w43", "verb": "w44"},
    {"subject": "w45", "verb": "w46 w47"},
    {"subject": "w42", "verb": "w48"},
)
CORRUPTED = ({"subject": "w49 w50 w51"}, {"subject": "w52", "verb": "w53"}, {"subject": "w54", "extra": "w59 "})
OTHERS = (
    ("one", {"subject": "w55 w56 w57", "verb": "w44 w58"}),
    ("other", {"subject": "w58", "verb": "w42"}),
    ("other", {"subject": "", "verb": "w51 w43 w42"}),
    ("one", {"subject": "w47 w46", "verb": "w45", "extra": "w50 w30 "}),
    ("one", {"subject": "w31 w32 w33 w59", "verb": "w45", "extra": "w51 w33 w38 "}),
)


def filled(name: str, words: Words) -> tuple[str, dict[str, list[int]]]:
    """A prompt, and where the words of its slots stand: word by word, as every word is a token."""
    text, spans = "", {}
    for part in TEMPLATES[name].text.replace("{", "|{").replace("}", "}|").split("|"):
        said = {"extra": "", **words}[part[1:-1]] if part.startswith("{") else part
        if part.startswith("{") and said:
            spans[part[1:-1]] = list(range(len(text.split()), len(text.split()) + len(said.split())))
        text += said
    return text, spans | {"end": [len(text.split()) - 1]}


def unequal() -> tuple[tp.Pairs, list[dict[str, dict[str, list[int]]]]]:
    """Pairs of 8 and 9, 8 and 7, and 7 and 8 tokens, and the spans of each."""
    words = [{"extra": "", **one} for one in CLEAN]
    options = {"answer": ["w40", "w41", "w50"], "wrong": ["w51", "w52", "w53"]}
    pairs = TEMPLATES["one"].pairs(words, CORRUPTED, **options, name="unequal")
    sides = [
        {"clean": filled("one", one)[1], "corrupted": filled("one", one | other)[1]}
        for one, other in zip(words, CORRUPTED, strict=True)
    ]
    return pairs, sides


def others(picked: Sequence[int] = range(len(OTHERS)), name: str = "others") -> tp.Pairs:
    """Prompts of two templates: spans of other lengths, at other places, and missing in some."""
    given = [(TEMPLATES[key], words) for key, words in (OTHERS[i] for i in picked)]
    found = [template.fill(**dict.fromkeys(template.slots, "") | dict(words)) for template, words in given]
    return revised(tp.Pairs([one.text for one in found], name=name), spans=(tuple(one.marks for one in found),))


MARKS = {tuple(int(word[1:]) for word in text.split()): spans for text, spans in (filled(*one) for one in OTHERS)}


def oracle(p: tp.Patching, spans: list[Any]) -> Slow:
    """The slow way; it knows from the words where spans stand."""
    sides = [Sides(dict(links), own) for links, own in zip(p_links(p), spans, strict=True)]
    said = " ".join(map(str, (*p.rows, *p.edited.values())))
    eager = any(name in said for name in EAGER)
    return Slow(module_of(p.model), p.encoded, eager, p.edited, sides, p.references, MARKS)


def agrees(p: tp.Patching, spans: list[Any]) -> Any:
    """Every row in every pair equals the oracle's, or neither has it."""
    slow, metric = oracle(p, spans), gap(p.encoded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.MeasurementWarning)
        result = p.run(progress=False)
    found, most = values(p, result), 0.0
    for number, row in enumerate(p.rows):
        for pair in range(len(p.encoded)):
            try:
                wanted = float(metric(slow.logits(row, pair), pair))
            except (KeyError, IndexError):  # a position that the pair lacks
                assert np.isnan(found[number, pair]), f"pair {pair} lacks {row}"
                continue
            assert abs(found[number, pair] - wanted) < 2e-5 * (1 + abs(wanted)), (
                f"pair {pair}, {row}: {found[number, pair]} instead of {wanted}"
            )
            most = max(most, abs(wanted - float(metric(slow.base(row.base, pair), pair))))
    assert most > 1e-3, "no row did anything"
    for name in p.edited:
        baseline = [float(metric(slow.base(name, i), i)) for i in range(len(p.encoded))]
        np.testing.assert_allclose(p._measured.baselines[name][:, 0], baseline, atol=1e-4)
    return result


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tp.load(build("gpt2", layers=2), tokenizer())


SPOTS: tuple[Any, ...] = (
    "subject",
    "subject[-1]",
    "subject[0]",
    "subject[1:]",
    "verb",
    "end",
    "extra",
    slice(None),
    -1,
    0,
    [0, -1],
    [-2, -1],
    slice(-3, None),
    slice(2, 6),
    "partner",
)


def random_rows(p: tp.Patching, seed: int) -> None:
    """Rows of up to two edits with values of references, alone and in sums, in pristine and in edited worlds."""
    rng, architecture = random.Random(seed), p.architecture
    offered = [c for c in tp.COMPONENTS if architecture.offers(c, 0) and c not in (*SCALES, "logits")]
    offered = [c for c in offered if not (c in ("q", "k") and architecture.rotated(0))]
    offered = [c for c in offered if c not in EAGER] if seed % 2 else offered
    references = [p.mean(others()), p.mean(others([4], "long")), p.mean(others(), over="positions")]
    references += [p.resample(others([0, 3, 4], "drawn"), seed=seed), p.mean(others([4, 1], "two"))]

    def edit(live: Any, other: Any, somewhere: Any) -> bool:
        """Whether an edit was written; one that cannot be is refused in words."""
        name = rng.choice(offered)
        kind, units = tp.COMPONENTS[name], architecture.units(name, 0)
        picked = {"layer": rng.randrange(2), **{dim: rng.choice(somewhere) for dim in ("pos", "dest", "src")}}
        for dim in ("pos", "dest", "src"):
            if picked[dim] == "partner":
                picked[dim] = p.aligned(rng.choice([0, 1, 4, 5]), of=live)
        unit = rng.choice([slice(None), 0, [0, 1]])
        site = tuple(picked.get(dim, unit) for dim in kind.index)
        width = units if kind.dims[-1] in kind.index else architecture.width(name, 0)
        vectors = torch.randn(width, 20, generator=torch.Generator().manual_seed(seed))
        features = tp.Dictionary.of_weights(vectors / 5, vectors.T / 5)
        how = rng.choice(["alone", "alone", "base", "crossing", "subspace", "features", "noise"])
        try:
            mine, theirs, taken = (getattr(world, name) for world in (live, other, rng.choice(references)))
            value = {
                "alone": lambda: taken[site],
                "base": lambda: 0.5 * taken[site] - mine[site] / 4,
                "crossing": lambda: theirs[site] - 0.5 * taken[site],
                "subspace": lambda: (theirs[site] + 0.5 * taken[site]).along(vectors.T[:3]),
                "features": lambda: rng.choice([theirs, taken])[site].features(features, [0, 3, 7]),
                "noise": lambda: taken[site] + p.gaussian(1.5, of=other.embed[rng.choice(["subject", "verb[-1]"])]),
            }[how]()
            if how not in ("subspace", "features") and rng.random() < 0.3:
                mine[site] += value
            else:
                mine[site] = value
        except (errors.RecipeError, errors.SiteError):
            return False
        return True

    worlds = p.world("edited", of=p.clean), p.world("mended", of=p.corrupted)
    for world, other in zip(worlds, (p.corrupted, p.clean), strict=True):
        edit(world, other, ["subject", "verb[-1]", slice(None), -1])
        world.resid_pre[0, 1] += 0.5
    clean, corrupted = (p.clean, worlds[0]), (p.corrupted, worlds[1])
    bases = [*itertools.product(clean, corrupted), *itertools.product(corrupted, clean)]
    while len(p.rows) < 6:
        with p.row(number=len(p.rows)):
            base = rng.choice(bases)
            written = [edit(*base, SPOTS) for _ in range(rng.choice([1, 2]))]
            if not any(written):
                base[0].resid_pre[1, -1] += 0.5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_random_recipes_with_references_by_span(model_type: str, seed: int) -> None:
    random_recipe(tp.load(build(model_type, layers=2), tokenizer()), seed)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("start", range(1000, 1200, 50))
def test_hundreds_of_random_recipes_with_references_by_span(model_type: str, start: int) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    for seed in range(start, start + 50):
        random_recipe(model, seed)


def random_recipe(model: Any, seed: int) -> None:
    """In one of the forms, pruned or not, in one batch or in small ones."""
    pairs, spans = unequal()
    options = {"form": FORMS[seed % 3], "prune": seed % 4 > 0, "batch_size": (None, 5)[seed % 5 == 0]}
    with tp.patching(model, pairs, **options) as p:
        random_rows(p, seed)
    agrees(p, spans)


@pytest.mark.parametrize("over", [None, "positions"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_sweep_over_spans_takes_the_mean_of_each(gpt2: Any, over: Any, direction: Any) -> None:
    pairs, spans = unequal()
    source = tp.mean(others(), over=over)
    swept = tp.patch(gpt2, pairs, "z", by=("layer", "span"), source=source, direction=direction)
    with tp.patching(gpt2, pairs) as p:
        base = {"noising": p.clean, "denoising": p.corrupted}[direction]
        for layer, span in p.grid("z", by=("layer", "span"), base=base):
            with p.row(layer=layer, span=span):
                base.z[layer, span] = p.mean(others(), over=over).z[layer, span]
    found = agrees(p, spans)
    assert found["span"].values.tolist() == ["subject", "verb", "end", *["extra"] * (direction == "denoising")]
    np.testing.assert_allclose(swept["value"], found["value"], atol=1e-5)


def test_estimates_take_means_by_span(gpt2: Any) -> None:
    """A gradient times the distance to the mean is the slope of a small step towards it."""
    pairs, _ = unequal()
    source, step = tp.mean(others()), 1e-2
    found = tp.attribute(gpt2, pairs, "resid_pre", by=("layer", "span"), source=source, direction="denoising")
    with tp.patching(gpt2, pairs) as p:
        live, mean = p.corrupted.resid_pre, p.mean(others()).resid_pre
        for layer, span in p.grid("resid_pre", by=("layer", "span"), base=p.corrupted):
            for sign in (-1, 1):
                with p.row(layer=layer, span=span, sign=sign):
                    live[layer, span] += sign * step * (mean[layer, span] - live[layer, span])
    slope = p.run()["value"].sel(sign=1) - p.run()["value"].sel(sign=-1)
    np.testing.assert_allclose(found["estimate"].squeeze(drop=True), slope / (2 * step), atol=5e-3)
    assert float(abs(slope).max()) > step


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_integrated_gradients_to_a_mean_by_span_are_the_whole_effect(gpt2: Any, direction: Any) -> None:
    pairs, _ = unequal()
    given = {"by": ("layer", "span"), "source": tp.mean(others()), "direction": direction}
    whole = tp.patch(gpt2, pairs, "resid_pre", **given)["effect"]
    along = tp.IntegratedGradients(steps=50, along="site")
    found = tp.attribute(gpt2, pairs, "resid_pre", **given, estimator=along)["estimate"]
    np.testing.assert_allclose(found.squeeze(drop=True), whole.squeeze(drop=True), atol=2e-3)


def test_references_of_the_same_words_with_other_spans_are_two(gpt2: Any) -> None:
    pairs, _ = unequal()
    with tp.patching(gpt2, pairs) as p:
        for word in ("w55", "w56"):
            named = tp.Pairs(["w30 w55 w56 w57"], spans={"subject": word})
            with p.row(kind="span", word=word):
                p.clean.attn_out[1, -1] = p.mean(named).attn_out[1, "subject[-1]"]
            with p.row(kind="number", word=word):
                at = ["w55", "w56"].index(word) + 1
                p.clean.attn_out[1, -1] = p.mean(list(named.clean)).attn_out[1, at]
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(kind="span"), value.sel(kind="number"), atol=1e-5)
    assert float(abs(value.diff("word")).max()) > 1e-3


def test_noise_on_spans_is_drawn_for_each_token(gpt2: Any) -> None:
    pairs, spans = unequal()
    with tp.patching(gpt2, pairs) as p:
        noised, other = p.world("noised", of=p.clean), p.world("other", of=p.corrupted)
        noised.embed["subject"] += p.gaussian(3, of="embed", draws=3)
        other.embed["subject[-1]"] += (
            p.gaussian(2, of=p.corrupted.embed["subject"]) + p.mean(others()).embed["subject[-1]"]
        )
        for layer, span in p.grid("resid_pre", by=("layer", "span"), base=p.clean):
            with p.row(layer=layer, span=span, world="noised"):
                noised.resid_pre[layer, span] = p.clean.resid_pre[layer, span]
            with p.row(layer=layer, span=span, world="other"):
                other.resid_pre[layer, span] = p.clean.resid_pre[layer, span] - p.mean(others()).resid_pre[layer, span]
    result = agrees(p, spans)
    assert {group["draw"].size for group in result.subtree if "draw" in group.coords} == {3}


# ------------------------------------------------------------------------------------------------ found by these


def test_a_span_called_end_is_not_the_end_of_a_prompt(gpt2: Any) -> None:
    """The tables of both stand side by side."""
    pairs, spans = unequal()
    with tp.patching(gpt2, pairs) as p:
        for number, pos in enumerate(("end", -2)):
            with p.row(number=number):
                p.corrupted.resid_pre[1, pos] = p.mean(others()).resid_pre[1, pos]
    agrees(p, spans)


def test_prompts_are_drawn_that_have_the_spans_of_a_pair(gpt2: Any) -> None:
    """Where there are any; otherwise it is said, and never are zeros written."""
    pairs, spans = unequal()
    with tp.patching(gpt2, pairs) as p:
        for draw in range(5):
            drawn = p.resample(others([0, 1, 2, 4]), seed=draw)
            with p.row(number=draw):
                p.corrupted.z[0, "subject"] = drawn.z[0, "subject"]
    agrees(p, spans)
    known, taken = list(others().encode(gpt2.tokenizer).clean), p.references.values()
    chosen = [{known.index(world.ids[world.row_of[pair]]) for world in taken} for pair in range(3)]
    assert chosen == [{0, 4}, {0}, {4}]
    with pytest.raises(errors.RecipeError) as error, tp.patching(gpt2, pairs) as p, p.row():
        p.clean.z[1, "subject"] = p.resample(others([1, 2, 3], "drawn"), seed=3).z[1, "subject"]
    assert str(error.value) == (
        "resample(drawn, seed=3).z[1, subject, :] cannot be a source: the prompt drawn for pair 1 lacks some of its "
        "tokens. Prompts that have as many in all spans of the pair are drawn first: add such ones."
    )


def test_weights_that_no_prompt_has_are_refused(gpt2: Any) -> None:
    pairs, _ = unequal()
    with pytest.raises(errors.RecipeError) as error, tp.patching(gpt2, pairs) as p, p.row():
        p.clean.pattern[1, 0, "verb", "subject"] = p.mean(others([2, 3], "apart")).pattern[1, 0, "verb", "subject"]
    assert str(error.value) == (
        "mean(apart).pattern[1, 0, verb, subject] cannot be a source: no prompt of the reference has all these "
        "destinations and sources, as a prompt of the pairs with 8 tokens has: pick fewer."
    )


def test_partners_are_counted_in_each_pair(gpt2: Any) -> None:
    """Prompts that are alike but for their partners do not run as one."""
    maps = [{0: 0, 1: 1, 2: 3, 3: 2, 4: 4}, {0: 0, 1: 1, 2: 2, 3: 4, 4: 3}]
    clean, corrupted = ["w30 w31 w32 w33 w34", "w35 w31 w42 w43 w44"], ["w50 w51 w52 w53 w54", "w55 w31 w49 w48 w47"]
    with tp.patching(gpt2, tp.Pairs(clean, corrupted, "w40", "w41", align=maps)) as p:
        with p.row(number=0):
            p.clean.embed[1] += p.gaussian(2, of=p.clean.embed[p.aligned(3, of=p.corrupted)])
    agrees(p, [{"clean": {}, "corrupted": {}}] * 2)


def test_a_partner_may_stand_beyond_the_prompts_of_a_reference(gpt2: Any) -> None:
    """What counts is where the pair's own token stands."""
    texts, short = ("w30 w31 w32 w33 w34 w35 w36 w37 w38", "w30 w34 w38"), ["w50 w51 w52 w53"]
    with tp.patching(gpt2, tp.Pairs(*texts, "w40", "w41", align={0: 0, 3: 1, 8: 2})) as p:
        for number, pos in enumerate((p.aligned(8, of=p.clean), 2)):
            with p.row(number=number):
                p.corrupted.z[0, pos] = p.mean(short).z[0, pos]
        with pytest.raises(errors.RecipeError, match="counts in clean prompts, which the mean is not of"), p.row():
            pos = p.aligned(3, of=p.clean)
            p.corrupted.z[0, pos] = p.mean(short, over="positions").z[0, pos]
    value = p.run()["value"]
    np.testing.assert_array_equal(value.sel(number=0), value.sel(number=1))


def test_a_directory_knows_a_reference_by_its_spans(gpt2: Any, tmp_path: Path) -> None:
    pairs, _ = unequal()
    stored = []
    for word in ("w55", "w56", "w55"):
        named = tp.Pairs(["w30 w55 w56 w57"], spans={"subject": word})
        with tp.patching(gpt2, pairs, directory=tmp_path) as p, p.row():
            p.clean.attn_out[1, -1] = p.mean(named).attn_out[1, "subject[-1]"]
        stored.append(p.plan.measured["stored"])
        p.run()
    assert stored == [0, 0, 3]


def test_scripts_say_no_to_spans_of_other_prompts(gpt2: Any) -> None:
    words = [{"subject": "w42 w43", "verb": "w44", "extra": ""}]
    pairs = TEMPLATES["one"].pairs(words, {"subject": "w49 w50"}, answer="w40", wrong="w51")
    edits = (
        lambda p: setattr_(p.clean.z, (0, "subject"), p.mean(others()).z[0, "subject"]),
        lambda p: setattr_(p.clean.z, (0, 3), p.mean(others(), over="positions").z[0, "verb"]),
        lambda p: setattr_(p.clean.pattern, (0, 1, -1, 2), p.mean(others()).pattern[0, 1, -1, "subject[-1]"]),
        lambda p: setattr_(p.clean.embed, 3, p.gaussian(2, of=p.clean.embed["subject"])),
    )
    for edit in edits:
        with tp.patching(gpt2, pairs) as p, p.row():
            edit(p)
        with pytest.raises(errors.RecipeError, match=r"No script is written for .*(subject|verb)"):
            p.rows[0].as_nnsight(0)
    with tp.patching(gpt2, pairs) as p:
        edited = p.world("edited", of=p.clean)
        edited.embed[3] = p.mean(others()).embed["verb[-1]"]
        with p.row():
            edited.z[1, -1] = p.mean(others()).z[1, -1]
    with pytest.raises(errors.RecipeError, match=r"No script is written for mean\(others\)\.embed\[verb\[-1\]\]"):
        p.rows[0].as_nnsight(0)
