"""Generators of prompts: what they make for tokenizers that have the words, and what they say of those that have not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import toy
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tracepatch.recipes import ioi
from transformers import PreTrainedTokenizerFast

import tracepatch as tp
from tracepatch import errors, tasks, words

TWO, ONE = r" ?\d{2}", r" ?\d"  # digits of a token
ALL = ("ioi", "greater_than", "docstring", "facts", "sentiment", "occupation", "induction")


def tokenizer(digits: str = TWO, without: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words with the blank before them are tokens, as in GPT-2; some words may be missing, and are then ``<unk>``."""
    lists = (value for name, value in vars(words).items() if name.isupper())
    every = [
        part
        for value in lists
        for one in value
        for text in ([one] if isinstance(one, str) else one)
        for part in text.split()
    ]
    texts = [
        t.text
        for t in (tasks.IOI, tasks.YEARS, tasks.DOCSTRING, tasks.MOVIE, *(t for t, _ in tasks.RELATIONS.values()))
    ]
    texts += [f"The man {said} woman she he" for said in tasks.SAID]
    texts = [re.sub(r"\{\w+:?(\w*)\}", lambda m: m[1] or "load", text) for text in texts]
    pattern = digits + r"| ?[A-Za-z]+|\s+| ?[^\sA-Za-z\d]+"
    pieces = {piece for text in texts for piece in re.findall(pattern, text)}
    pieces |= {f" {word}" for word in every} | set(every)
    widths = {ONE: (1,), TWO: (2,)}.get(digits, (1, 2, 3))
    pieces |= {blank + str(n).zfill(w) for w in widths for n in range(10**w) for blank in ("", " ")} | {" "}
    pieces = {piece for piece in pieces if piece.strip() not in without}
    found = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(["<unk>", *sorted(pieces)])}, unk_token="<unk>")
    )
    found.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def follower(prompt: str) -> str | None:
    """What followed the last word of a prompt where it stood before."""
    *before, last = prompt.split()
    return before[before.index(last) + 1] if last in before else None


@pytest.mark.parametrize("task", ALL)
def test_seeds_and_counts(task: str) -> None:
    make, known = getattr(tasks, task), tokenizer()
    pairs = make(known, 6, seed=1)
    assert (len(pairs), pairs.seed) == (6, 1)
    assert pairs == make(known, 6, seed=1)
    assert pairs != make(known, 6, seed=2)
    assert make(known, 2, seed=1).clean[0] == pairs.clean[0]
    encoded = pairs.encode(known)
    encoded.require_comparable()
    assert not any(known.unk_token_id in ids for side in encoded.written for ids in side)
    for clean, corrupted, answer, wrong in zip(
        pairs.clean, pairs.corrupted or (), pairs.answer, pairs.wrong, strict=True
    ):
        assert clean != corrupted
        assert answer
        assert wrong
        assert not set(answer) & set(wrong)
        assert {name for name, _ in pairs.spans[0][0]}
    assert make(known, 0 + 3).encode(known)


def test_ioi_is_what_the_recipe_asks() -> None:
    known = tokenizer()
    pairs = tasks.ioi(known, 5)
    assert pairs == ioi.prompts(known, 5)
    assert pairs.name == "IOI, 57 of 57 names are one token here, both roles"
    assert len(pairs) == 6
    for clean, corrupted, (answer,), (wrong,) in zip(
        pairs.clean, pairs.corrupted or (), pairs.answer, pairs.wrong, strict=True
    ):
        names = [word.strip(",") for word in clean.split() if word.strip(",") in words.NAMES]
        assert sorted(names[:2]) == sorted([answer.strip(), wrong.strip()])
        assert names[2] == wrong.strip()
        assert corrupted == clean.replace(f", {names[2]} ", f", {answer.strip()} ")
    first = [re.findall(r"When (\w+) and (\w+) .*, (\w+) gave", text)[0] for text in pairs.clean[:2]]
    assert first[0][2] == first[0][1], "ABBA"
    assert first[1][2] == first[1][0], "BABA"
    three = tasks.ioi(known, 3, corruption="abc")
    for clean, corrupted in zip(three.clean, three.corrupted or (), strict=True):
        old, new = ([w.strip(",") for w in text.split() if w.strip(",") in words.NAMES] for text in (clean, corrupted))
        assert len({*old, *new}) == 5


@pytest.mark.parametrize("digits", [TWO, ONE])
def test_greater_than(digits: str) -> None:
    known, width = tokenizer(digits), 2 if digits == TWO else 1
    pairs = tasks.greater_than(known, 12)
    for clean, corrupted, answer, wrong in zip(
        pairs.clean, pairs.corrupted or (), pairs.answer, pairs.wrong, strict=True
    ):
        century, year, again = re.findall(r"from the year (\d\d)(\d\d) to the year (\d\d)$", clean)[0]
        assert again == century
        assert corrupted == clean.replace(f"{century}{year}", f"{century}01")
        later = [f"{n:02d}" for n in range(int(year) + 1, 100)]
        assert {n[:width] for n in later} >= set(answer)
        assert not {n[:width] for n in later} & set(wrong), "no year that is later begins with a wrong answer"
        assert len(answer) + len(wrong) == 10**width
    encoded = pairs.encode(known)
    assert not encoded.mapped
    assert len(encoded.differing(0)) in (1, 2)
    spans = {name: at for name, at, _ in encoded.sides("clean")[0].spans}
    assert len(spans["year"]) == 2 // width
    assert list(spans) == ["event", "century", "year", "century_2", "end"]


def test_docstring() -> None:
    known = tokenizer()
    for corruption in ("order", "random"):
        pairs = tasks.docstring(known, 4, corruption=corruption)  # type: ignore[arg-type]
        assert len(pairs) == 4
        for clean, corrupted, (answer,), (wrong,) in zip(
            pairs.clean, pairs.corrupted or (), pairs.answer, pairs.wrong, strict=True
        ):
            defined = re.findall(r"def \w+\(self, (.*)\):", clean)[0].split(", ")
            changed = re.findall(r"def \w+\(self, (.*)\):", corrupted)[0].split(", ")
            assert re.findall(r":param (\w+):", clean) == defined[1:3], "two are described, in their order"
            assert clean.endswith(":param")
            assert (defined[3], defined[4]) == (answer.strip(), wrong.strip())
            assert changed[:3] == defined[:3]
            assert changed[3:] == defined[:2:-1] if corruption == "order" else not {*changed[3:]} & {*clean.split()}


@pytest.mark.parametrize("relation", ["capital", "language", "landmark"])
def test_facts(relation: Any) -> None:
    known = tokenizer()
    pairs, table = tasks.facts(known, 30, relation=relation), dict(tasks.RELATIONS[relation][1])
    for clean, corrupted, (answer,), (wrong,) in zip(
        pairs.clean, pairs.corrupted or (), pairs.answer, pairs.wrong, strict=True
    ):
        mine = [subject for subject in table if subject in clean]
        other = [subject for subject in table if subject in corrupted]
        assert answer.strip() in {table[subject] for subject in mine}
        assert wrong.strip() in {table[subject] for subject in other}
    encoded = pairs.encode(known)
    assert encoded.mapped == any(a.clean.length != a.corrupted.length for a in encoded.alignments)
    assert encoded.mapped, "subjects of one and of several tokens"
    assert all(table.values())
    assert len(table) == len(tasks.RELATIONS[relation][1]), "no subject twice"


def test_sentiment_and_occupation() -> None:
    known = tokenizer()
    pairs = tasks.sentiment(known, 4)
    for clean, answer, wrong in zip(pairs.clean[:2], pairs.answer, pairs.wrong, strict=False):
        adjective, verb = re.findall(r"movie was (\w+), I (\w+) it", clean)[0]
        assert adjective in words.PRAISE
        assert verb in words.LIKED
        assert f" {adjective}" not in answer
        assert {a.strip() for a in answer} <= set(words.PRAISE)
        assert {w.strip() for w in wrong} <= set(words.BLAME)
    assert pairs.clean[2] == (pairs.corrupted or ())[0], "both roles"
    jobs = tasks.occupation(known, 6)
    for i, (clean, corrupted) in enumerate(zip(jobs.clean, jobs.corrupted or (), strict=True)):
        job = clean.split()[1]
        assert job in (words.OF_WOMEN, words.OF_MEN)[i % 2]
        assert corrupted == clean.replace(job, ("man", "woman")[i % 2])
        assert jobs.answer[i] == ((" she",), (" he",))[i % 2]
    assert not set(words.OF_WOMEN) & set(words.OF_MEN)


@pytest.mark.parametrize(("corruption", "right"), [("AB", "wrong"), ("BA", "wrong"), ("BB", "answer"), ("BC", None)])
def test_induction(corruption: Any, right: str | None) -> None:
    pairs = tasks.induction(tokenizer(), 20, corruption=corruption, length=9)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted or (), strict=True)):
        assert len(clean.split()) == len(corrupted.split()) == 10
        assert len(set(clean.split())) == 9
        assert f" {follower(clean)}" == pairs.answer[i][0]
        assert follower(corrupted) == (None if right is None else getattr(pairs, right)[i][0].strip())
        last, before = (text.split()[-1] for text in (clean, corrupted))
        changed = [k for k, (a, b) in enumerate(zip(clean.split(), corrupted.split(), strict=True)) if a != b]
        assert (changed == [9]) if corruption == "AB" else (len(changed) == 2 + (corruption != "BA"))
        assert (last == before) == (corruption == "BA")
        assert pairs.answer[i][0].strip() in corrupted.split()


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_the_toys_do_what_was_made_for_them(name: str) -> None:
    for pairs in (tasks.ioi(toy(name).tokenizer, 8), tasks.induction(toy(name).tokenizer, 8)):
        checklist = pairs.check(toy(name))
        assert checklist.passed
        (clean,) = (c.sentence for c in checklist.checks if c.sentence.startswith("clean: "))
        assert "the model prefers the answer in 8 of 8 pairs" in clean or "in 7 of 8 pairs" in clean, clean
    with pytest.raises(
        errors.PromptError, match="greater-than cannot be written.*\n  not in its vocabulary: 'The', 'war'"
    ):
        tasks.greater_than(toy(name).tokenizer)


def test_words_that_are_not_one_token_are_left_out() -> None:
    few = tokenizer(without=(*words.NAMES[4:], *words.PLACES[1:], *words.CAPITALS[0][1:]))
    pairs = tasks.ioi(few, 20)
    assert pairs.name.startswith("IOI, 4 of 57 names")
    assert {answer for (answer,) in pairs.answer} == {f" {name}" for name in words.NAMES[:4]}
    assert all(" store," in text for text in pairs.clean)
    assert (" Paris",) not in tasks.facts(few, 60).answer
    assert (" Rome",) in tasks.facts(few, 60).answer


@pytest.mark.parametrize(
    ("task", "without", "lines"),
    [
        (
            "ioi",
            (*words.NAMES[1:], *words.OBJECTS),
            ("names: 1 of 57 are one token, 2 are needed", "objects: 0 of 8 are one token, 1 is needed"),
        ),
        ("docstring", words.PARAMETERS[10:], ("parameters: 10 of 55 are one token, 11 are needed",)),
        ("facts", tuple(answer for _, answer in words.CAPITALS[1:]), ("answers: 1 of 39 are one token, 2 are needed",)),
        ("sentiment", ("liked", "loved", "conclusion", "Conclusion"), ("not in its vocabulary: 'Conclusion'",)),
        ("occupation", ("she",), ("pronouns: 1 of 2 (she, he) are one token, 2 are needed",)),
        ("induction", words.NOUNS, ("words: 0 of 70 are one token, 13 are needed",)),
        ("greater_than", ("lasted",), ("not in its vocabulary: 'lasted'",)),
    ],
)
def test_what_a_tokenizer_cannot_express_is_said(task: str, without: tuple[str, ...], lines: tuple[str, ...]) -> None:
    with pytest.raises(errors.PromptError) as error:
        getattr(tasks, task)(tokenizer(without=without))
    text = str(error.value)
    assert "cannot be written for this tokenizer.\n" in text
    for line in lines:
        assert f"\n  {line}\n" in text
    assert text.endswith("Use a model with a larger vocabulary, or write pairs of your own with tp.Template.")


def test_years_that_are_split_in_other_ways() -> None:
    with pytest.raises(errors.PromptError) as error:
        tasks.greater_than(tokenizer(r" ?\d{1,3}"))
    assert "It needs years whose last two digits are one token, or one each.\n  'the year 1732' is " in str(error.value)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("ioi", {"corruption": "xyz"}, "corruption is one of 'swap', 'abc', not 'xyz'"),
        ("docstring", {"corruption": "swap"}, "corruption is one of 'order', 'random'"),
        ("facts", {"relation": "food"}, "relation is one of 'capital', 'language', 'landmark'"),
        ("induction", {"corruption": "AA"}, "corruption is one of 'AB', 'BA', 'BB', 'BC'"),
        ("induction", {"length": 3}, "at least 4, not 3"),
    ],
)
def test_choices_that_do_not_exist(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.PromptError, match=message):
        getattr(tasks, task)(tokenizer(), **options)
