"""Templates, and named spans that follow the words to their tokens: in tokenizers of every kind, sites, grids, results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import toy
from slow import Sides, Slow, gap
from tiny_models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import tracepatch as tp
from tracepatch import errors
from tracepatch.models import module_of
from tracepatch.spans import characters, spans_of
from tracepatch.tokens import EncodedPairs

IOI = tp.Template("When {first} and {second} went to the {place:store}, {subject} gave the {thing:bag} to")
TEXTS = [
    "When Zoë and Maryam went to the store, Zoë gave the bag to",
    "When Annabel went away, Bartholomew-James said: naïve!",
]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: pieces of bytes, with the blank in front of a word."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["When the girl went to the store, the boy gave the bag and"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words)


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's: a blank is a mark in front of a piece, and may be a piece of its own."""
    pieces = [
        "<unk>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABJMWZëï,-:!",
        "▁went",
        "▁gave",
        "▁the",
        "▁Mar",
        "yam",
        "▁to",
        "▁and",
    ]
    words = Tokenizer(models.Unigram([(w, -1.0 - (len(w) < 2) * 9) for w in pieces], 0, False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    words.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def without_offsets(tokenizer: Any) -> Any:
    """The same tokenizer, that says nothing of characters."""

    class Silent(type(tokenizer)):  # type: ignore[misc]
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            return dict(super().__call__(text, **{**options, "return_offsets_mapping": False}))

    tokenizer.__class__ = Silent
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "words": lambda: toy("gpt2").tokenizer,
    "words with BOS": lambda: toy("llama").tokenizer,
    "byte level, silent": lambda: without_offsets(byte_level()),
    "metaspace, silent": lambda: without_offsets(metaspace()),
    "words, silent": lambda: without_offsets(tp.toys.load_module("gpt2")[1]),
    "bytes": ByT5Tokenizer,
}


# ------------------------------------------------------------------------------------------------ templates


def test_filling_a_template() -> None:
    assert IOI.slots == ("first", "second", "place", "subject", "thing")
    filled = IOI.fill(first="John", second="Mary", subject="John")
    assert str(filled) == "When John and Mary went to the store, John gave the bag to"
    assert [(name, filled.text[a:b]) for name, (a, b) in filled.marks] == [
        ("first", "John"),
        ("second", "Mary"),
        ("place", "store"),
        ("subject", "John"),
        ("thing", "bag"),
    ]
    twice = tp.Template("{name} said that {{{name}}} {adverb}left").fill(name="Anna", adverb="")
    assert twice.text == "Anna said that {Anna} left"
    assert twice.marks == (("name", (0, 4)), ("name_2", (16, 20))), "an empty text makes no span"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{} left", "{} names no slot"),
        ("{first name} left", "{first name} names no slot"),
        ("{name!r} left", "{name} names no slot"),
        ("{name left", "is no template"),
        ("{name} and {name} and {name_2}", "the span 'name_2' is there already"),
        ("to the {end}", "the span 'end' is there already"),
    ],
)
def test_texts_that_are_no_templates(text: str, message: str) -> None:
    with pytest.raises(errors.PromptError) as error:
        tp.Template(text)
    assert message in str(error.value)


def test_slots_that_are_not_filled_are_all_named() -> None:
    with pytest.raises(errors.PromptError) as error:
        IOI.fill(first="John", third="Tom", place=7)  # type: ignore[arg-type]
    assert str(error.value) == (
        f"{IOI.text!r} cannot be filled.\n"
        "  nothing is given for second\n"
        "  nothing is given for subject\n"
        "  there is no slot third\n"
        "  place is filled with 7, which is no text\n"
        "Its slots are first, second, place, subject, thing."
    )
    with pytest.raises(errors.PromptError, match="there are 2 clean, 1 corrupted"):
        IOI.pairs([{"first": "a", "second": "b", "subject": "a"}] * 2, [{"subject": "b"}])


def test_pairs_of_a_template() -> None:
    rows = [{"first": a, "second": b, "subject": a} for a, b in (("John", "Mary"), ("Tom", "Anna"))]
    pairs = IOI.pairs(rows, [{"subject": "Mary"}, {"subject": "Anna"}], " {second}", " {subject}", name="ioi", seed=3)
    assert pairs.clean[1] == "When Tom and Anna went to the store, Tom gave the bag to"
    assert pairs.corrupted == tuple(text.replace(", Tom", ", Anna").replace(", John", ", Mary") for text in pairs.clean)
    assert (pairs.answer, pairs.wrong) == (((" Mary",), (" Anna",)), ((" John",), (" Tom",)))
    assert (pairs.align, pairs.name, pairs.seed) == ("spans", "ioi", 3)
    back = pairs.both_roles()[2:]
    assert back.spans == pairs.spans[::-1]
    assert pairs[[1]].spans == tuple(side[1:] for side in pairs.spans)
    alone = IOI.pairs(rows[0], answer=" {second}")
    assert alone.corrupted is None
    assert alone.answer == ((" Mary",),)


def test_pairs_of_several_templates_are_one_set() -> None:
    other = tp.Template(
        "Then, {first} and {second} had a long day at the {place:park}. {subject} gave a {thing:ring} to"
    )
    words = {"first": "John", "second": "Mary", "subject": "John"}
    one, two = (t.pairs(words, {"subject": "Mary"}, " {second}", " {subject}") for t in (IOI, other))
    both = one + two
    assert (len(both), both.align) == (2, "spans")
    assert both.spans == tuple((*a, *b) for a, b in zip(one.spans, two.spans, strict=True))
    maps = tp.Pairs(["a"], ["b"], align={0: 0}) + tp.Pairs(["c"], ["d"], align={0: 1})
    assert maps.align == (((0, 0),), ((0, 1),))
    mixed = tp.Pairs(["a"], ["b"]) + tp.Pairs(["c d"], ["e d"], spans={"what": [("c", "e")]})
    assert mixed.spans == (((), (("what", (0, 1)),)), ((), (("what", (0, 1)),)))
    with pytest.raises(errors.PromptError, match="cannot be one set: they differ in align"):
        one + tp.Pairs(["a"], ["b"])
    with pytest.raises(errors.PromptError, match="cannot be one set: they differ in corrupted"):
        tp.Pairs(["a"], ["b"]) + tp.Pairs(["a"])


# ------------------------------------------------------------------------------------------------ spans and tokens


@pytest.mark.parametrize("kind", KINDS)
def test_spans_follow_tokens(kind: str) -> None:
    """The tokens of a span, and no others, decode to its words."""
    tokenizer, words = KINDS[kind](), {"first": "John", "second": "Mary", "subject": "John"}
    if "words" not in kind:
        words = {"first": "Zoë", "second": "Maryam", "subject": "Bartholomew"}
    filled = IOI.fill(**words)
    encoded = tp.Pairs(filled.text).encode(tokenizer)
    spans, bad = spans_of(tokenizer, filled.text, encoded.clean[0], filled.marks)
    assert not bad
    for name, (start, end) in filled.marks:
        ids = [encoded.clean[0][p] for p in spans[name]]
        assert tokenizer.decode(ids).strip() == filled.text[start:end], name
        assert list(spans[name]) == list(range(spans[name][0], spans[name][-1] + 1))
    assert spans["end"] == (len(encoded.clean[0]) - 1,)
    counts = {name: len(at) for name, at in spans.items()}
    assert counts["second"] > 1 or "words" in kind, "a test of several tokens"


def test_a_span_has_no_blanks_in_front() -> None:
    """Here a blank is a token of its own in front of a word that is no piece."""
    tokenizer = metaspace()
    text = "When Zoë went"
    encoded = tp.Pairs(text).encode(tokenizer)
    blank = tokenizer.convert_tokens_to_ids("▁")
    for start in (4, 5):
        spans, _ = spans_of(tokenizer, text, encoded.clean[0], (("who", (start, 8)),))
        ids = [encoded.clean[0][p] for p in spans["who"]]
        assert tokenizer.convert_ids_to_tokens(ids) == ["Z", "o", "ë"]
        assert encoded.clean[0][spans["who"][0] - 1] == blank


@pytest.mark.parametrize("kind", [k for k in KINDS if "silent" in k or k == "bytes"])
def test_characters_without_offsets_are_those_with_them(kind: str) -> None:
    tokenizer = KINDS[kind]()
    text = TEXTS[0] if "words" not in kind else "When John and Mary went to the store, John"
    found = characters(tokenizer, text)
    assert found is not None
    if kind == "bytes":
        ends = np.cumsum([len(c.encode()) for c in text])
        assert [a for a, _ in found] == [int((ends <= i).sum()) for i in range(ends[-1])]
        return
    told = KINDS[kind.removesuffix(", silent")]()(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    for (a, b), (start, end) in zip(found, told, strict=True):
        assert text[a:b].strip() == text[start:end].strip()


def test_a_tokenizer_whose_tokens_cannot_be_told_is_said_so() -> None:
    class Riddle(ByT5Tokenizer):
        def decode(self, ids: Any, **options: Any) -> str:
            return "?" * len(ids)

    pairs = IOI.pairs({"first": "a", "second": "b", "subject": "a"}, {"subject": "b"}, align=None)
    encoded = pairs.encode(Riddle())
    assert encoded.unaligned[0].startswith("pair 0: Riddle does not say which characters its tokens stand for")
    with pytest.raises(errors.PromptError, match="1 of 1 pairs cannot be aligned"):
        encoded.require_comparable()


def test_spans_written_by_hand() -> None:
    pairs = tp.Pairs(
        ["When John left , Mary", (9, 8, 7, 6)],
        ["When Tom left , Mary", (9, 5, 7, 6)],
        spans={"who": [("John", "Tom"), (1, 2)], "rest": [(10, 14), ((2, 4), (2, 4))]},
    )
    assert pairs.spans[0][0] == (("who", (5, 9)), ("rest", (10, 14)))
    sides = pairs.encode(toy("gpt2").tokenizer).sides("clean")
    assert {name: at for name, at, _ in sides[0].spans} == {"who": (1,), "rest": (2,), "end": (4,)}
    assert {name: at for name, at, _ in sides[1].spans} == {"who": (1,), "rest": (2, 3), "end": (3,)}
    every = tp.Pairs(["When John left", "When Tom left"], spans={"verb": "left"})
    assert every.spans == (((("verb", (10, 14)),), (("verb", (9, 13)),)),)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"who": ["Mary"]}, "pair 0, who in the clean prompt: 'Mary' stands 0 times in 'John John'"),
        ({"who": ["John"]}, "pair 0, who in the clean prompt: 'John' stands 2 times"),
        ({"who": [""]}, "an empty text"),
        ({"who": [(4, 12)]}, "(4, 12) is no part of 'John John', which has 9 characters"),
        ({"who": ["a", "b"]}, "'who' has 2 entries for 1 pairs"),
        ({"the who": ["John"]}, "'the who' is no name"),
    ],
)
def test_spans_that_are_not_there(spans: Any, message: str) -> None:
    with pytest.raises(errors.PromptError) as error:
        tp.Pairs(["John John"], spans=spans)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------ sites and grids


def model_of_bytes() -> Any:
    """A tiny GPT-2 over pieces of bytes, so that words have several tokens."""
    tokenizer = byte_level()
    return tp.load(build("gpt2", layers=2, vocab_size=len(tokenizer)), tokenizer)


def uneven() -> tp.Pairs:
    """Names of other lengths on both sides, and other lengths of prompts."""
    rows = [
        {"first": "Zoë", "second": "Maryam", "subject": "Zoë"},
        {"first": "Jo", "second": "Annabel", "subject": "Jo"},
    ]
    return IOI.pairs(rows, [{"subject": "Maryam"}, {"subject": "Annabel"}], answer="a", wrong="b")


def plainly(encoded: EncodedPairs) -> list[Sides]:
    """What the oracle is told: the same tokens in front of, between and behind the names; names from their last token."""
    found = []
    for i in range(len(encoded)):
        sides = {world: {name: list(at) for name, at, _ in encoded.sides(world)[i].spans} for world in encoded.worlds}
        clean, corrupted = (sides[world]["subject"] for world in encoded.worlds)
        shift = len(corrupted) - len(clean)
        links = {p: p for p in range(clean[0])}
        links |= dict(zip(reversed(clean), reversed(corrupted), strict=False))
        links |= {p: p + shift for p in range(clean[-1] + 1, len(encoded.clean[i]))}
        found.append(Sides(links, sides))
    return found


def test_a_span_is_its_tokens_in_each_prompt() -> None:
    model = model_of_bytes()
    with tp.patching(model, uneven()) as p:
        number = 0
        for layer in range(2):
            for span in (p.span("subject"), "second", "end", p.span("subject", -1), "subject[0]", "second[-1:]"):
                for base, other in ((p.corrupted, p.clean), (p.clean, p.corrupted)):
                    with p.row(number=number):
                        base.resid_pre[layer, span] = other.resid_pre[layer, span]
                    number += 1
        with p.row(number=number):
            p.corrupted.pattern[1, :, "end", "subject"] = p.clean.pattern[1, :, "end", "subject"]
        with p.row(number=number + 1):
            p.corrupted.z[1, "subject", 0] = 0
    slow = Slow(module_of(model), p.encoded, eager=True, sides=plainly(p.encoded))
    wanted = slow.score(p.rows, gap(p.encoded)).numpy()
    found = p.run()["value"].values.T
    assert {len(at) for side in p.encoded.sides("clean") for name, at, _ in side.spans if name == "subject"} == {2, 4}
    np.testing.assert_allclose(found, wanted, atol=1e-5 * (1 + abs(wanted).max()))
    assert np.ptp(wanted, axis=0).min() > 1e-3


def test_pairs_with_other_token_counts_are_averaged_by_span() -> None:
    model, pairs = model_of_bytes(), uneven()
    result = tp.patch(model, pairs, "resid_pre", by=("layer", "span"))
    assert result["span"].values.tolist() == ["first", "second", "place", "subject", "thing", "end"]
    assert result["effect"].dims == ("pair", "layer", "span")
    assert [t.strip() for t in result["token"].sel(span="subject").values.tolist()] == ["Zoë", "Jo"]
    assert [t.strip() for t in result["corrupted_token"].sel(span="subject").values.tolist()] == ["Maryam", "Annabel"]
    with tp.patching(model, pairs) as p:
        for layer, span in p.grid("resid_pre", by=("layer", "span")):
            with p.row(layer=layer, span=span):
                p.corrupted.resid_pre[layer, span] = p.clean.resid_pre[layer, span]
    np.testing.assert_array_equal(p.run()["value"], result["value"])
    mean = tp.over_pairs(result)
    wanted = result["effect"].mean("pair") / (result["clean"] - result["corrupted"]).mean("pair")
    np.testing.assert_allclose(mean["normalized"], wanted)
    assert result["status"].sel(span=["first", "second", "place"]).values.tolist() == [[[2] * 3] * 2] * 2, "proved"
    few = tp.patch(model, pairs, "z", by=("layer", "head"), only={"span": "subject[-1]"})
    assert float(abs(few["effect"]).max()) > 1e-4
    named = tp.patch(
        model, pairs, "attn_out", by=("span", "layer"), only={"span": ["subject[-1]", "end"], "layer": [1]}
    )
    assert named["span"].values.tolist() == ["subject[-1]", "end"]


def test_grids_of_spans_refuse_what_is_not_there() -> None:
    p = tp.patching(model_of_bytes(), uneven())
    assert p.grid("pattern", by=("layer", "span"), layer=[0])[0] == (0, "first")
    with pytest.raises(
        errors.SiteError, match="These pairs have no span object; they have first, second, place, subject"
    ):
        p.grid("resid_pre", by="span", span=["object"], layer=0)
    with pytest.raises(errors.SiteError, match="span stands for pos; a grid runs over one of them"):
        p.grid("resid_pre", by=("span", "pos"))
    with pytest.raises(errors.SiteError, match="has a span 'object'; the spans of these pairs are first, second"):
        p.clean.resid_pre[0, "object"]
    with pytest.raises(
        errors.SiteError, match="the span 'subject' has no such token in any prompt.\n  pair 0: 4 tokens"
    ):
        p.clean.resid_pre[0, "subject[7]"]
    with (
        pytest.raises(errors.RecipeError, match="The label span='second' contradicts the row's edits"),
        p.row(span="second"),
    ):
        p.clean.resid_pre[0, "subject"] = 0
    plain = tp.patching(toy("gpt2"), tp.Pairs(["When John"], ["When Mary"], " Mary", " John"))
    with pytest.raises(errors.SiteError, match="These pairs have no spans: make them with tp.Template"):
        plain.grid("resid_pre", by="span", layer=0)
    with pytest.raises(errors.SiteError, match="These pairs have no spans"):
        plain.span("subject")


def test_a_pair_without_a_span_is_absent() -> None:
    template = tp.Template("When {first} and {second} {adverb}left, {subject} gave the bag to")
    words = [{"first": "John", "second": "Mary", "subject": "John", "adverb": a} for a in ("", "then ")]
    pairs = template.pairs(words, {"subject": "Mary"}, " {second}", " {subject}")
    result = tp.patch(toy("gpt2"), pairs, "resid_pre", by=("layer", "span"), source=0)
    assert (result["status"].sel(span="adverb")[0] == tp.Status.ABSENT).all()
    assert (result["status"].sel(span="adverb", layer=0)[1] == tp.Status.MEASURED).all()


def test_metrics_read_spans() -> None:
    pairs = uneven()
    attention = tp.metric(lambda x: x.sum(-1), name="looks", component="pattern", index=(1, 2, -1, "subject"))
    with tp.patching(model_of_bytes(), pairs, [tp.logit_diff.at("subject[-1]"), attention]) as p:
        with p.row(name="one"):
            p.corrupted.attn_out[0, "subject"] = p.clean.attn_out[0, "subject"]
        with p.row(name="other"):
            p.clean.attn_out[0, "second"] = 0
    value = p.run()["value"].transpose("name", "pair", "metric").values
    slow = Slow(module_of(p.model), p.encoded, eager=True, sides=plainly(p.encoded))
    for n, row in enumerate(p.rows):
        for i in range(2):
            live = slow.references[row.base, i].values(slow.ids[row.base, i], slow.edits(row, i))
            subject = slow.sides[i].spans[row.base]["subject"]
            logits = live["logits", 0][subject[-1]]
            gap = logits[p.encoded.answer[i][0]] - logits[p.encoded.wrong[i][0]]
            np.testing.assert_allclose(value[n, i], [gap, live["pattern", 1][2, -1, subject].sum()], atol=1e-4)


def test_spans_show_what_they_mean_in_a_picture() -> None:
    result = tp.patch(
        toy("gpt2"),
        IOI.pairs({"first": "John", "second": "Mary", "subject": "John"}, {"subject": "Mary"}, " {second}", " {first}"),
        "resid_pre",
        by=("layer", "span"),
    )
    figure = tp.plots.heatmap(result)
    labels = [text.get_text() for axes in figure.axes for text in axes.get_xticklabels()]
    assert "subject" in " ".join(labels)
