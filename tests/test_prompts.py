"""Pairs: where they come from, what they are as tokens, and what the checklist says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ioi_pairs, toy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tracepatch as tp
from tracepatch import errors
from tracepatch.toys import tasks

ROWS = [
    {
        "clean": "When John and Mary left, John",
        "corrupted": "When John and Mary left, Mary",
        "answer": " Mary",
        "wrong": " John",
    },
    {
        "clean": "When Tom and Dan left, Tom",
        "corrupted": "When Tom and Dan left, Dan",
        "answer": " Dan| Sean",
        "wrong": " Tom",
    },
]


def test_from_files_and_frames(tmp_path: Path, gpt2: Any) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps(row | {"answer": row["answer"].split("|")}) for row in ROWS) + "\n\n"
    )
    wanted = tp.Pairs(
        [r["clean"] for r in ROWS],
        [r["corrupted"] for r in ROWS],
        [[" Mary"], [" Dan", " Sean"]],
        [" John", " Tom"],
        name="pairs",
    )
    for found in (
        tp.Pairs.from_frame(frame),
        tp.Pairs.from_csv(tmp_path / "pairs.csv"),
        tp.Pairs.from_jsonl(tmp_path / "pairs.jsonl"),
    ):
        assert found == wanted
    encoded = wanted.encode(gpt2.tokenizer)
    assert [len(a) for a in encoded.answer] == [1, 2]
    assert encoded.words(encoded.clean[0]) == ["When", "John", "and", "Mary", "left", ",", "John"]
    assert encoded.differing(0) == (6,)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"clean": "a"}\nnot json\n[1]\n')
    with pytest.raises(errors.PromptError, match=r"2 lines are not JSON objects.\n  line 2: .*\n  line 3:"):
        tp.Pairs.from_jsonl(path)
    path.write_text("")
    with pytest.raises(errors.PromptError, match="holds no pairs"):
        tp.Pairs.from_jsonl(path)
    with pytest.raises(errors.PromptError, match="There is no file"):
        tp.Pairs.from_csv(tmp_path / "none.csv")
    with pytest.raises(errors.PromptError, match="columns prompt: there is no column 'clean'"):
        tp.Pairs.from_frame({"prompt": ["a"]})
    with pytest.raises(errors.PromptError, match=r"Column 'corrupted' is empty in 1 rows.\n  row 1"):
        tp.Pairs.from_frame({"clean": ["a", "b"], "corrupted": ["c", None]})


def test_token_ids_are_taken_as_they_are(gpt2: Any) -> None:
    pairs = tp.Pairs([[9, 8, 7]], [[9, 5, 7]], 12, 13)
    encoded = pairs.encode(gpt2.tokenizer)
    assert (encoded.clean, encoded.answer, encoded.wrong) == (((9, 8, 7),), ((12,),), ((13,),))
    assert tp.Pairs([9, 8, 7]).clean == ((9, 8, 7),), "one prompt of ids"


def test_both_roles(gpt2: Any) -> None:
    pairs = ioi_pairs(3)
    both = pairs.both_roles()
    assert len(both) == 6
    assert both.clean[3:] == pairs.corrupted
    assert both.corrupted == (*pairs.corrupted, *pairs.clean)  # type: ignore[misc]
    assert both.answer == pairs.answer + pairs.wrong
    back = both[3:].both_roles()[3:]
    assert (back.clean, back.corrupted, back.answer, back.wrong) == (
        pairs.clean,
        pairs.corrupted,
        pairs.answer,
        pairs.wrong,
    )


def test_bos_policies() -> None:
    text = "When John and Mary"
    for name, habit in (("gpt2", False), ("llama", True)):
        tokenizer = toy(name).tokenizer
        bos = tokenizer.bos_token_id
        assert (tp.Pairs(text).encode(tokenizer).clean[0][0] == bos) is habit
        assert tp.Pairs(text, bos=True).encode(tokenizer).clean[0][:2].count(bos) == 1
        assert bos not in tp.Pairs(text, bos=False).encode(tokenizer).clean[0]
        assert tp.Pairs("<bos>" + text).encode(tokenizer).clean[0].count(bos) == 1, "never twice"
    assert (
        str(tp.Pairs(text).encode(toy("llama").tokenizer).bos)
        == "every prompt starts with <bos> (the tokenizer does so)"
    )
    assert str(tp.Pairs(text, bos=False).encode(toy("llama").tokenizer).bos) == "no BOS token (you asked for it)"


def test_no_bos_token_to_add() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(errors.PromptError, match="has no BOS token"):
        tp.Pairs("a a", bos=True).encode(PreTrainedTokenizerFast(tokenizer_object=words))


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's habit: a leading space is a token of its own, unless a word follows a word."""
    vocab = {"<unk>": 0, "▁": 1, "▁gave": 2, "▁it": 3, "▁to": 4, "▁Mary": 5, "Mary": 6}
    words = Tokenizer(models.Unigram([(w, -1.0 - i / 10) for w, i in vocab.items()], 0, False))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_an_answer_is_what_continues_the_prompt() -> None:
    encoded = tp.Pairs("gave it to", answer=" Mary").encode(metaspace())
    assert encoded.answer == ((5,),)


def test_one_token_words() -> None:
    assert tp.one_token(toy("gpt2").tokenizer, [" Mary", " Maryam", " Tom", " John Mary"]) == [" Mary", " Tom"]


# ------------------------------------------------------------------------------------------------ the checklist

GOOD = """\
  ok  4 pairs; no BOS token (the tokenizer adds none)
  ok  prompts can be compared position by position: 14 tokens each
  ok  every answer is one token
  ok  1 token differs between the prompts of a pair
      position 9 in 4 pairs, as in pair 0: {first} → {second}
  ok  every swapped token is as frequent in the clean as in the corrupted prompts
  ok  clean: the model prefers the answer in 4 of 4 pairs; it is its first choice in 4
  ok  corrupted: the model prefers the wrong answer in 4 of 4 pairs; it is its first choice in 4
"""


def test_a_good_set(gpt2: Any) -> None:
    pairs = ioi_pairs(2).both_roles()
    checklist = pairs.check(gpt2)
    encoded = pairs.encode(gpt2.tokenizer)
    first, second = (repr(encoded.words(side[0])[9]) for side in (encoded.clean, encoded.corrupted or ()))
    assert checklist.passed
    assert str(checklist).startswith(GOOD.format(first=first, second=second)), str(checklist)
    assert "opposite outputs" in str(checklist)


def test_a_bad_set(gpt2: Any) -> None:
    d = tasks.ioi(3, seed=1, templates=tasks.TEMPLATES[:1])
    lopsided = tp.Pairs(d.clean, d.corrupted, d.wrong, d.answer).check(gpt2)
    text = str(lopsided)
    assert "note  clean: the model prefers the answer in 0 of 3 pairs" in text
    assert "pair 0: logit difference -" in text
    assert "swapped tokens are not equally frequent" in text
    unequal = tp.Pairs([d.clean[0], d.clean[1]], [d.corrupted[0], "When John"], " John", " Mary").check(gpt2)
    assert not unequal.passed
    assert "FAIL  1 of 2 pairs cannot be compared position by position." in str(unequal)
    same = tp.Pairs(d.clean[:1], d.corrupted[:1], " John", " John").check(gpt2)
    assert not same.passed
    assert "FAIL  in 1 pair a token is both right and wrong" in str(same)
    split = tp.Pairs(d.clean[:1], d.corrupted[:1], " John Mary", " John").check(gpt2)
    assert not split.passed
    assert "FAIL  1 answer not one token\n" in str(split)
    unknown = tp.Pairs("When Xerxes and Mary", "When Tom and Mary", " Mary", " Tom").check(gpt2)
    assert not unknown.passed
    assert "FAIL  1 prompt with tokens that are not in the vocabulary" in str(unknown)


def test_without_corrupted_prompts(gpt2: Any) -> None:
    checklist = tp.Pairs(
        "When John and Mary went to the store, John gave the bag to", answer=" Mary", wrong=" John"
    ).check(gpt2)
    assert checklist.passed
    assert "note  no corrupted prompts: only ablations (zero, tensors) are possible" in str(checklist)
