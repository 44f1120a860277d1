"""The claims of recipes whose models are known: gates, backups, facts, years, pronouns, sentiment, several corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tracepatch.recipes import (
    and_or_gates,
    backup_heads,
    factual_recall,
    gender_bias,
    greater_than,
    ioi,
    prompt_corruptions,
    steering_and_features,
)
from typer.testing import CliRunner

import tracepatch as tp
from tracepatch.__main__ import app
from tracepatch.catalogue import parts_of


@pytest.fixture(scope="module")
def many() -> Any:
    return tp.toys.load("many_tasks")


def mean(result: Any, variable: str = "normalized") -> Any:
    return tp.over_pairs(tp.over_draws(result))[variable]


def logits(model: Any, prompt: str) -> torch.Tensor:
    """The plain model's logits after a prompt."""
    module = tp.models.module_of(model)
    with torch.no_grad():
        found: torch.Tensor = module(**model.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits
    return found[0, -1].double()


# ------------------------------------------------------------------------------------------------------------- gates


@pytest.fixture(scope="module")
def gates() -> Any:
    return tp.toys.load("gates")


def test_gates_give_the_verdicts_of_theory(gates: Any) -> None:
    pairs = and_or_gates.prompts(gates.tokenizer, 3, 1)
    back, lost = (mean(part(gates, pairs))[:, 0, :2].values for part in (and_or_gates.denoising, and_or_gates.noising))
    np.testing.assert_allclose(back, [[0, 0], [1, 1], [1, 0]], atol=1e-4)
    np.testing.assert_allclose(lost, [[-1, -1], [0, 0], [-1, 0]], atol=1e-4)
    verdicts = and_or_gates.in_both_directions(gates, pairs)["verdict"][:, 0, :2].values
    words = [[tp.sweeps.VERDICTS[i] for i in row] for row in verdicts]
    assert words == [["necessary only"] * 2, ["redundant"] * 2, ["necessary and sufficient", "irrelevant"]]


def test_two_inputs_interact_as_their_gate_says(gates: Any) -> None:
    pairs = and_or_gates.prompts(gates.tokenizer, 3, 1)
    assert and_or_gates.inputs(gates, pairs) == ["L0H0", "L0H1"]
    for part in (and_or_gates.two_denoised, and_or_gates.two_noised):
        found = part(gates, pairs)["interaction_normalized"].mean("pair").sel(set="L0H0, L0H1")
        assert found["gate"].values.tolist() == ["AND", "OR", "one input"]
        np.testing.assert_allclose(found.values, [1, -1, 0], atol=1e-4)


def test_gates_become_truth_tables_for_other_tokenizers(many: Any) -> None:
    pairs = and_or_gates.prompts(many.tokenizer, 2, 0)
    chosen = and_or_gates.by_gate(pairs)
    assert {gate: len(some) for gate, some in chosen.items()} == {"AND": 2, "OR": 2, "one input": 2}
    for gate, yes in (("AND", 1), ("OR", 3), ("one input", 2)):
        for clean, corrupted in zip(chosen[gate].clean, chosen[gate].corrupted, strict=True):
            *rows, asked = clean.split(". ")
            assert sum(row.endswith(" yes") for row in rows) == yes
            assert next(row for row in rows if row.startswith(f"{asked} ")).endswith(" yes")
            asked = corrupted.split(". ")[-1]
            assert next(row for row in rows if row.startswith(f"{asked} ")).endswith(" no")


# ----------------------------------------------------------------------------------------------------------- backups


def test_knock_outs_expose_the_backup() -> None:
    model = tp.toys.load("backup_heads")
    pairs = backup_heads.prompts(model.tokenizer, 8, 0)
    cost = -mean(backup_heads.single_knock_outs(model, pairs), "effect")
    np.testing.assert_allclose([cost[1, 0], cost[2, 1]], [1, 0], atol=0.3)
    assert cost[0, 1] > 9
    found = backup_heads.rounds(model, pairs, count=2)
    assert found["gone"].values.tolist() == ["L1H0", "L2H1"]
    np.testing.assert_allclose(found["intact"], 10, atol=1e-3)
    np.testing.assert_allclose(found["left"].mean("pair"), [9, 0], atol=0.5)
    np.testing.assert_allclose(found["effect"].mean("pair").sel(round=1, layer=2, head=1), 9, atol=0.3)
    np.testing.assert_allclose(found["clean"].mean("pair").sel(layer=1, head=0), 10, atol=1e-3)


def test_without_a_backup_what_is_knocked_out_is_lost() -> None:
    model = tp.toys.load("wired")
    found = backup_heads.rounds(model, tp.toys.pairs("wired"), count=1)
    assert found["gone"].item() == "L1H2"
    assert float(found["left"].mean()) < 1
    assert float(found["effect"].mean("pair").max()) < 0.1


# ------------------------------------------------------------------------------------------------------------- facts


def test_windows_of_one_layer_restore_single_layers(many: Any) -> None:
    pairs = factual_recall.prompts(many.tokenizer, 4, 0)
    windows = factual_recall.mlp_windows(many, pairs, width=1, draws=2)
    with tp.patching(many, pairs) as p:
        world = factual_recall.noised(p, draws=2)
        for layer in p.grid("mlp_out", by="layer"):
            for place, pos in factual_recall.PLACES.items():
                with p.row(layer=layer, place=place):
                    world.mlp_out[layer, pos] = p.clean.mlp_out[layer, pos]
    np.testing.assert_allclose(windows["effect"], p.run()["effect"], atol=1e-5)
    wider = factual_recall.mlp_windows(many, pairs, width=3, draws=2)
    assert not np.allclose(windows["effect"], wider["effect"], atol=1e-3)


def test_facts_move_from_the_subject_to_the_end(many: Any) -> None:
    pairs = factual_recall.prompts(many.tokenizer, 8, 0)
    found = mean(factual_recall.states(many, pairs, draws=3)).sel(place=["last subject token", "last token"])
    assert found[0, 0] > found[0, 1]
    np.testing.assert_allclose(found[-1], [0, 1], atol=1e-3)
    severed = factual_recall.severed(many, pairs, draws=3)
    np.testing.assert_allclose(mean(severed).sel(place=["last subject token", "last token"])[-1], [0, 1], atol=1e-3)
    again = factual_recall.states(many, pairs, draws=3)
    assert again.identical(factual_recall.states(many, pairs, draws=3).assign_attrs(again.attrs))
    replaced = mean(factual_recall.replaced(many, pairs)).sel(place="last token")
    np.testing.assert_allclose(replaced[-1], 1, atol=1e-3)


def test_severed_mlps_stay_as_they_are_in_the_noised_run(many: Any) -> None:
    pairs = factual_recall.prompts(many.tokenizer, 4, 0)
    with tp.patching(many, pairs) as p:
        factual_recall.severed(p, draws=1)
    row = p.rows[1]
    assert row.labels == {"layer": 0, "place": "last subject token"}
    assert list(map(str, row.edits)) == [
        "resid_post[0, subject[-1]] = clean.resid_post[0, subject[-1]]",
        "mlp_out[1, subject[-1]] = noised.mlp_out[1, subject[-1]]",
        "mlp_out[2, subject[-1]] = noised.mlp_out[2, subject[-1]]",
    ]
    plain, severed = (
        mean(part(many, pairs, draws=3)).sel(place="last subject token")
        for part in (factual_recall.states, factual_recall.severed)
    )
    np.testing.assert_allclose(plain[-1], severed[-1], atol=1e-5)
    assert plain[0] > severed[0] + 0.01


# ------------------------------------------------------------------------------------------------------------- years


def test_in_the_last_layer_all_of_an_mlp_is_direct(many: Any) -> None:
    pairs = greater_than.prompts(many.tokenizer, 4, 0)
    every = greater_than.layers(many, pairs, tp.prob_diff)["effect"].sel(component="mlp_out")
    direct = greater_than.direct(many, pairs, tp.prob_diff)["effect"].sel(writer="mlp_out")
    np.testing.assert_allclose(every[:, -1], direct[:, -1], atol=1e-5)
    assert not np.allclose(every[:, 1], direct[:, 1], atol=1e-3)
    heads = greater_than.direct_heads(many, pairs, tp.prob_diff)["effect"]
    assert set(heads.dims) == {"pair", "writer_layer", "writer_head"}
    assert float(heads.min()) < -0.05


def test_the_difference_of_probabilities_is_what_the_years_say(many: Any) -> None:
    pairs = greater_than.prompts(many.tokenizer, 3, 0)
    found = greater_than.probabilities(many, pairs, 1, 2)["clean"]
    assert found.sizes["year"] == 100
    with tp.patching(many, pairs, tp.prob_diff) as p, p.row():
        p.clean.z[1, -1, 2] = p.corrupted.z[1, -1, 2]
    whole = p.run()["clean"]
    for i, answers in enumerate(pairs.answer):
        own = logits(many, pairs.clean[i]).softmax(-1)
        ids = many.tokenizer.convert_tokens_to_ids(list(found["year"].values))
        np.testing.assert_allclose(found.sel(pair=i), own[ids], atol=1e-6)
        later = found["year"].isin(list(answers))
        sides = [float(found.sel(pair=i).where(where, 0).sum()) for where in (later, ~later)]
        np.testing.assert_allclose(whole.sel(pair=i), sides[0] - sides[1], atol=1e-5)
        assert whole.sel(pair=i) > 0.8


# ------------------------------------------------------------------------------------------------------------ gender


def test_odds_are_those_of_the_pronouns(many: Any) -> None:
    pairs = gender_bias.prompts(many.tokenizer, 6, 0)
    found = gender_bias.odds(gender_bias.heads(many, pairs))
    totals = []
    for i in range(len(pairs)):
        ids = many.tokenizer.convert_tokens_to_ids([pairs.wrong[i][0].strip(), pairs.answer[i][0].strip()])
        null, exchanged = (logits(many, side[i]).softmax(-1)[ids].tolist() for side in (pairs.clean, pairs.corrupted))
        totals.append((exchanged[0] / exchanged[1]) / (null[0] / null[1]) - 1)
    np.testing.assert_allclose(found["total"], np.mean(totals), rtol=1e-3)
    assert set(found) == {"total", "indirect", "direct"}


def test_all_heads_together_mediate_all_and_the_first_is_the_strongest(many: Any) -> None:
    pairs = gender_bias.prompts(many.tokenizer, 6, 0)
    alone, together = gender_bias.heads(many, pairs), gender_bias.strongest_heads(many, pairs)
    indirect = alone["effect"].sel(side="indirect").mean("pair")
    np.testing.assert_allclose(together["effect"].mean("pair")[0], indirect.min(), atol=1e-5)
    assert together["strongest"].values.tolist() == [1, 2, 4, 8, 12]
    np.testing.assert_allclose(mean(together)[-1], -1, atol=1e-3)  # nothing but heads moves the word to the end
    assert mean(together)[0] < -0.3


# --------------------------------------------------------------------------------------------- directions, features


def test_sentiment_is_one_direction(many: Any) -> None:
    pairs = steering_and_features.prompts(many.tokenizer, 8, 0)
    found = mean(steering_and_features.subspaces(many, pairs))
    assert found.sel(along="mean difference")[1:].min() > 0.8
    assert abs(found.sel(along="1 by chance")).max() < 0.15
    whole = tp.patch(many, pairs, "resid_post", only={"pos": [-1]})["normalized"].mean("pair")[:, 0]
    np.testing.assert_allclose(found.sel(along="everything"), whole, atol=0.02)
    steered = mean(steering_and_features.steering(many, pairs))
    assert (np.diff(steered.sel(coefficient=[-1.0, 0.5, 1.0, 2.0]), axis=1) > 0).all()
    assert steered.sel(coefficient=1.0).min() > 0.5


def test_few_features_do_most_and_all_do_what_they_explain(many: Any) -> None:
    pairs = steering_and_features.prompts(many.tokenizer, 8, 0)
    found = mean(steering_and_features.features(many, pairs))
    single = found.drop_sel(feature=["all", "everything"])
    assert single.sel(feature=["0", "1"]).sum() > 0.8 * float(found.sel(feature="everything"))
    assert abs(single.sel(feature=[str(i) for i in range(2, 24)])).max() < 0.2
    assert abs(found.sel(feature="all") - found.sel(feature="everything")) < 0.1


# -------------------------------------------------------------------------------------------------------- corruptions


def test_as_given_is_what_the_plain_recipe_gives() -> None:
    model = tp.toys.load("gpt2")
    pairs = prompt_corruptions.prompts(model.tokenizer, 4, 0)
    found = prompt_corruptions.heads(model, pairs)
    assert found["corruption"].values.tolist() == ["as given", "first and second exchanged", "random", "last 3"]
    plain = ioi.heads(model, tp.tasks.ioi(model.tokenizer, 4, 0))
    np.testing.assert_allclose(found["effect"].sel(corruption="as given"), plain["effect"], atol=1e-5)
    verdict = tp.agreement_over(prompt_corruptions.residual_stream(model, pairs))["verdict"]
    assert (verdict.sel(layer=2, span="end") == 1).all()
    assert (verdict == 2).any() or (verdict == 3).any()


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "name",
    [
        "and_or_gates",
        "backup_heads",
        "factual_recall",
        "gender_bias",
        "greater_than",
        "prompt_corruptions",
        "steering_and_features",
    ],
)
def test_run_says_what_it_found(name: str, tmp_path: Path) -> None:
    module = __import__(f"tracepatch.recipes.{name}", fromlist=["prompts"])
    [toy, *_] = getattr(module, "TOYS", ("gpt2",))
    call = ["run", name, "--model", f"toy:{toy}", "--count", "4", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, call, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "no picture" not in found.output
    for part in parts_of(module):
        assert (tmp_path / name / f"toy-{toy}.{part}.nc").is_file()
    summary = (tmp_path / name / "summary.txt").read_text(encoding="utf-8")
    assert "nan" not in summary
    pictures = [line.split()[1].rstrip(":") for line in summary.splitlines() if line.startswith("  picture ")]
    assert all(Path(picture).is_file() for picture in pictures)


def test_a_model_without_the_words_is_refused_in_words(tmp_path: Path) -> None:
    for name in ("greater_than", "gender_bias", "factual_recall", "steering_and_features"):
        call = ["run", name, "--model", "toy:llama", "--out", str(tmp_path)]
        with pytest.raises(tp.errors.PromptError, match="tokenizer"):
            CliRunner().invoke(app, call, catch_exceptions=False)
