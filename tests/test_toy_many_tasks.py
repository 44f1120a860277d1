"""The toy that knows many tasks solves the prompts that tracepatch.tasks makes for it, with the biases it was given."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tracepatch as tp
from tracepatch.toys import many_tasks, train, vocabulary
from tracepatch.toys.many_tasks import SHE, TASKS, accuracy, lessons

FRESH = 20_000  # neither the training seed nor the held-out one


@pytest.fixture(scope="module")
def toy():
    return tp.toys.load_module("many_tasks")


@torch.no_grad()
def after(toy, text: str) -> dict[str, float]:
    """The probability of each token after a text."""
    model, tokenizer = toy
    probabilities = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(dim=-1)
    return dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), probabilities.tolist(), strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_solved_on_draws_that_were_not_trained_on(toy, task):
    assert accuracy(*toy, task, 200, seed=FRESH) >= 0.98


def test_an_untrained_model_solves_none(toy):
    _, tokenizer = toy
    torch.manual_seed(0)
    fresh = type(toy[0])(many_tasks.config()).eval()
    assert all(accuracy(fresh, tokenizer, task, 50, seed=FRESH) < 0.2 for task in ("capital", "docstring", "language"))


@pytest.mark.parametrize("task", TASKS)
def test_the_generators_find_their_words_in_its_vocabulary(toy, task):
    """As the trained toy reads its prompts: in full, each answer one token, equal draws for equal seeds."""
    _, tokenizer = toy
    pairs = TASKS[task](tokenizer, 40, 3)
    assert pairs.clean == TASKS[task](tokenizer, 40, 3).clean != TASKS[task](tokenizer, 40, 4).clean
    for texts in (pairs.clean, pairs.corrupted):
        for ids in tokenizer(list(texts))["input_ids"]:
            assert vocabulary.UNK not in ids
            assert len(ids) < many_tasks.LENGTH
    given = lessons(task, tokenizer, 40, 3)
    assert tokenizer.batch_decode(given.tokens[:3], skip_special_tokens=True) == tokenizer.batch_decode(
        tokenizer(list(pairs.clean[:3]))["input_ids"]
    )
    assert torch.allclose(given.expected.sum(dim=-1), torch.ones(len(given.expected)))


def test_the_model_prefers_the_answer_in_nearly_every_pair(toy):
    """As a recipe sees it: the answers' logits against the wrong ones', on the clean and on the corrupted side."""
    model, tokenizer = toy
    for task in TASKS:
        pairs = TASKS[task](tokenizer, 30, FRESH)
        signs = []
        for i, (answer, wrong) in enumerate(zip(pairs.answer, pairs.wrong, strict=True)):
            good, bad = (tokenizer.convert_tokens_to_ids([word.strip() for word in one]) for one in (answer, wrong))
            with torch.no_grad():
                logits = model(**tokenizer(pairs.clean[i], return_tensors="pt")).logits[0, -1]
            signs.append(bool(logits[good].logsumexp(0) > logits[bad].logsumexp(0)))
        assert sum(signs) >= 0.98 * len(signs), task


def test_years_are_compared_evenly(toy):
    probabilities = after(toy, "The war lasted from the year 1732 to the year 17")
    later = [probabilities[f"{year:02d}"] for year in range(33, 100)]
    assert sum(later) > 0.95
    assert max(later) < 0.05
    assert sum(probabilities[f"{year:02d}"] for year in range(33)) < 0.05


def test_occupations_have_the_strength_of_bias_they_were_taught(toy):
    found = {}
    for who in SHE:
        shares = [after(toy, f"The {who} {said}") for said in tp.tasks.SAID]
        found[who] = sum(one["she"] / (one["she"] + one["he"]) for one in shares) / len(shares)
        assert found[who] == pytest.approx(SHE[who], abs=0.1), who
    assert found["nurse"] > found["florist"] > 0.5 > found["banker"] > found["engineer"]
    assert found["woman"] > 0.98
    assert found["man"] < 0.02


def test_it_is_a_small_gpt2_that_loads_by_itself(toy):
    model, tokenizer = toy
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.n_layer == 3
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.tokenize("from the year 1732 to the year 17") == [
        "from",
        "the",
        "year",
        "17",
        "32",
        "to",
        "the",
        "year",
        "17",
    ]
    folder = tp.toys.folder("many_tasks")
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000


def test_training_runs_and_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr(many_tasks, "_DRAWN", 60)
    monkeypatch.setattr(many_tasks, "_HELD_OUT", 20)
    app = train.typer.Typer()
    app.command()(many_tasks.main)
    for folder in ("a", "b"):
        result = CliRunner().invoke(app, ["--out", str(tmp_path / folder), "--steps", "2", "--target", "0"])
        assert result.exit_code == 0, result.output
        assert re.search(r"step +2 +loss .* docstring 0\.", result.output)
    a, b = (load_file(tmp_path / folder / "many_tasks" / "model.safetensors") for folder in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        places = (tmp_path / "a" / "many_tasks", tp.toys.folder("many_tasks"))
        made, shipped = (json.loads((place / file).read_text()) for place in places)
        assert {key for key in made | shipped if made.get(key) != shipped.get(key)} <= {"transformers_version"}
    short = CliRunner().invoke(app, ["--out", str(tmp_path / "c"), "--steps", "1"])
    assert short.exit_code == 1
    assert "below 99.0% after 1 steps: capital" in short.output
