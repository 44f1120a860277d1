"""Every bad input has its own message: what is wrong, what would be right, the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy
from tiny_models import build, tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2Model

import tracepatch as tp
from tracepatch import errors


def says(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value), str(error.value)


# ------------------------------------------------------------------------------------------------ prompts


def test_unequal_lengths(gpt2: Any) -> None:
    pairs = tp.Pairs(
        clean=["When John and Mary left, John", "When Tom and Dan left, Tom"],
        corrupted=["When John and Mary left, John", "When Tom and Dan left the store, Tom"],
        answer=" Mary",
        wrong=" John",
    )
    with pytest.raises(errors.PromptError) as error, tp.patching(gpt2, pairs):
        pass
    assert str(error.value) == (
        "1 of 2 pairs cannot be compared position by position.\n"
        "  pair 1: clean has 7 tokens, corrupted has 9   'When Tom and Dan left, Tom' / 'When Tom and Dan "
        "left the store, Tom'\n"
        "Reword one prompt of each pair until the counts agree, or say which positions correspond: align='ends', "
        "'prefix', 'suffix', 'spans', or a map for each pair."
    )


def test_clean_equals_corrupted(gpt2: Any) -> None:
    pairs = tp.Pairs(["When John and Mary", "When Tom"], ["When John and Dan", "When Tom"], " Mary", " Dan")
    with pytest.raises(errors.PromptError) as error, tp.patching(gpt2, pairs):
        pass
    says(
        error,
        "In 1 of 2 pairs the clean and the corrupted prompt are the same tokens",
        "pair 1: 'When Tom'",
        "leave the pair out",
    )


def test_answers_that_are_not_one_token(gpt2: Any) -> None:
    pairs = tp.Pairs(["When John", "When Mary"], ["When Tom", "When Dan"], [" Mary Ann", 10_000], [" Maryam", " Dan"])
    with pytest.raises(errors.PromptError) as error:
        pairs.encode(gpt2.tokenizer)
    says(
        error,
        "3 answers not one token of this tokenizer.",
        "pair 0: ' Mary Ann' is",
        "pair 1: 10000 is no id of a vocabulary of 161",
        "' Maryam' is not in the",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clean": []}, "There are no clean prompts: the list is empty."),
        ({"clean": ["a", "b"], "corrupted": ["c"]}, "there are 2 clean, 1 corrupted, 2 answer, 2 wrong."),
        ({"clean": ["a", "b"], "answer": [" x"]}, "1 answer"),
        ({"clean": ["a"], "answer": [[1.5]]}, "answer takes strings or token ids."),
    ],
)
def test_pairs_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.PromptError) as error:
        tp.Pairs(**arguments)
    says(error, message)


def test_no_corrupted_prompts(gpt2: Any) -> None:
    pairs = tp.Pairs("When John and Mary", answer=" Mary", wrong=" John")
    with (
        pytest.raises(errors.PromptError, match="no corrupted prompts: patch from other sources"),
        tp.patching(gpt2, pairs) as p,
    ):
        p.corrupted  # noqa: B018 (asking for it is what fails)
    with pytest.raises(errors.PromptError, match="no roles to exchange"):
        pairs.both_roles()


# ------------------------------------------------------------------------------------------------ sites


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("resid_pre", (3, 0), "resid_pre[3, …]: this model has 3 layers, 0 to 2 (or -3 to -1)."),
        ("resid_pre", (0, 14), "resid_pre[0, 14]: position 14 is in no prompt; the prompts have 14 tokens."),
        ("resid_pre", (0, [True] * 3), "resid_pre[0, [0, 1, 2]]: a mask of 3 positions is in no prompt"),
        ("resid_pre", (0, [1, 1]), "names [1] twice"),
        ("resid_pre", (0, 1, 2), "resid_pre has the indices [layer, pos]; 3 were given: [0, 1, 2]."),
        ("resid_pre", (slice(0, 2), 1), "resid_pre[0:2, …]: one layer at a time"),
        ("resid_pre", (0, "the end"), "'the end' is no index along pos: a span is written as its name"),
        ("resid_pre", (0, "subject"), "no prompt has a span 'subject'; these pairs have no spans"),
        ("z", (0, -1, "subject"), "'subject' is no index along head"),
        ("z", (0, -1, 4), "z[0, …, 4]: layer 0 has 4 heads, 0 to 3 (or -4 to -1)."),
        ("mlp_act", (0, -1, 256), "mlp_act[0, …, 256]: layer 0 has 256 neurons, 0 to 255 (or -256 to -1)."),
    ],
)
def test_sites_that_do_not_exist(gpt2: Any, pairs: tp.Pairs, name: str, index: Any, message: str) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.SiteError) as error, p.row():
        getattr(p.corrupted, name)[index] = 0
    says(error, message)
    assert not p.rows, "a row that failed must not be kept"


def test_unknown_component(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.ComponentError) as error:
        p.clean.residual[0, 0]
    assert str(error.value) == f"There is no component 'residual'. Components: {', '.join(tp.COMPONENTS)}."
    assert not hasattr(p.clean, "residual")


def test_resid_mid_in_a_parallel_block(pairs: tp.Pairs) -> None:
    p = tp.patching(toy("gpt_neox"), pairs)
    with pytest.raises(errors.ComponentError) as error:
        p.clean.resid_mid[0, 0]
    says(
        error,
        "Layer 0 of this gpt_neox (GPTNeoXLayer) has no resid_mid: attention and MLP read the same stream in "
        "a parallel block",
        "It has: embed, resid_pre, ",
    )


# ------------------------------------------------------------------------------------------------ recipes


def test_an_empty_recipe(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.RecipeError, match="The recipe recorded no rows"), tp.patching(gpt2, pairs):
        pass


def test_an_edit_outside_a_row(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.RecipeError) as error, tp.patching(gpt2, pairs) as p:
        p.corrupted.z[0, :, 1] = 0
    says(error, "corrupted.z[0, :, 1] is edited outside a row.", "with p.row(...)")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"layer": 1},
            "The label layer=1 contradicts the row's edits, none of which touches it: corrupted.z[0, -1, 2] = 0",
        ),
        ({"pos": 3}, "The label pos=3 contradicts"),
        ({"head": 1}, "The label head=1 contradicts"),
        ({"neuron": 2}, "The label neuron=2 contradicts"),
        ({"component": "mlp_out"}, "The label component='mlp_out' contradicts"),
        ({"pair": 0}, "pair cannot be a row's label"),
        ({"layer": (0, 2)}, "layer=(0, 2). A grid over several dims gives one index for each: for layer, head in"),
        ({"name": [1]}, "Labels are numbers or strings, and their names are words: name=[1]."),
    ],
)
def test_labels_that_contradict(gpt2: Any, pairs: tp.Pairs, labels: dict[str, Any], message: str) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError) as error, p.row(**labels):
        p.corrupted.z[0, -1, 2] = 0
    says(error, message)


def test_labels_that_agree(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    for labels in (
        {"layer": 0, "head": 2},
        {"layer": -3, "pos": 13},
        {"pos": -1},
        {"head": -2},
        {"component": "z"},
        {"window": 3},
    ):
        with p.row(**labels):
            p.corrupted.z[0, -1, 2] = 0
    assert len(p.rows) == 6


def test_rows_that_cannot_be(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError, match=r"row\(name='x'\) has no edits"), p.row(name="x"):
        pass
    with pytest.raises(errors.RecipeError, match="A row cannot be opened inside another"), p.row(a=1), p.row(a=2):
        pass
    with pytest.raises(errors.RecipeError, match="One row edits one world"), p.row(name="y"):
        p.clean.z[0, :, 0] = 0
        p.corrupted.z[0, :, 0] = 0
    with pytest.raises(errors.RecipeError, match="Say where: corrupted.z"), p.row(name="z"):
        p.corrupted.z = 0
    with p.row(name="once"):
        p.corrupted.z[0, :, 0] = 0
    with pytest.raises(errors.RecipeError, match="Two rows have the labels name='once'"), p.row(name="once"):
        p.corrupted.z[1, :, 0] = 0
    with pytest.raises(errors.RecipeError, match="still being recorded"):
        p.run()
    assert [r.labels for r in p.rows] == [{"name": "once"}]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p: p.clean.mlp_act[0, -1],
            "is a vector over neuron and does not fit z[0, -1, 2], a vector over d_head",
        ),
        (lambda p: p.clean.z[0, :, 2], "clean.z[0, :, 2] has 14 pos entries and does not fit z[0, -1, 2], which has 1"),
        (lambda p: torch.zeros(15), "A tensor of shape [15] does not fit z[0, -1, 2], which is [d_head 16]"),
        (lambda p: "mean", "'mean' cannot be written at a site"),
        (lambda p: None, "None cannot be written at a site"),
        (lambda p: float("nan"), "holds NaN or inf"),
        (lambda p: torch.zeros(16, dtype=torch.bool), "A tensor of dtype torch.bool cannot be written"),
        (lambda p: p.clean.z[0, -1, 2] * p.clean.z[0, -1, 2], "multiplied by numbers, not by Value"),
        (lambda p: p.clean.z[0, -1, 2] * torch.ones(16), "multiplied by numbers, not by Tensor"),
        (lambda p: torch.ones(16) * p.clean.z[0, -1, 2], "multiplied by numbers, not by Tensor"),
        (lambda p: torch.relu(p.clean.z[0, -1, 2]), "torch.relu has nothing to compute with yet. To compute"),
        (lambda p: torch.cat([p.clean.z[0, -1, 2]]), "write a function: lambda live, clean, corrupted"),
    ],
)
def test_sources_that_do_not_fit(gpt2: Any, pairs: tp.Pairs, write: Any, message: str) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError) as error, p.row():
        p.corrupted.z[0, -1, 2] = write(p)
    says(error, message)


def test_adding_to_another_site(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    value = p.clean.z[0, -1, 1]
    value += p.clean.z[0, -1, 2]
    with pytest.raises(errors.RecipeError, match=r"\+= must add to the same site of the same world"), p.row():
        p.corrupted.z[0, -1, 1] = value


def test_grids_that_do_not_exist(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.SiteError, match="resid_pre has the dims layer, pos; it has no head"):
        p.grid("resid_pre", by=("layer", "head"))
    with pytest.raises(errors.SiteError, match="this model has 3 layers"):
        p.grid("resid_pre", layer=[7])
    with pytest.raises(errors.ComponentError, match="no resid_mid"):
        tp.patching(toy("gpt_neox"), pairs).grid("resid_mid")


def test_wrong_arguments(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.RecipeError, match="direction is 'denoising' or 'noising'"):
        tp.patch(gpt2, pairs, "z", direction="backwards")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(errors.RecipeError, match=r"Pass the prompts as tp.Pairs"):
        tp.patch(gpt2, ["When John"], "z")  # type: ignore[arg-type]  # what is refused


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits: logits, "it returned shape [3, 161]"),
        (lambda logits: logits.mean(), "it returned shape []"),
        (lambda logits: 3.0, "it returned 'float'"),
        (lambda logits: logits[:, 0] - logits[:, 0].mean(0), "mixes rows"),
        (
            lambda logits: logits[:, 500],
            "fails on logits of shape [3, 161] [row, vocab] (one position is read): IndexError",
        ),
    ],
)
def test_metrics_of_the_wrong_shape(gpt2: Any, pairs: tp.Pairs, metric: Any, message: str) -> None:
    with pytest.raises(errors.MetricError) as error:
        tp.patch(gpt2, pairs, "z", metric)
    says(error, message)


def test_metrics_that_lack_something(gpt2: Any, pairs: tp.Pairs) -> None:
    bare = tp.Pairs(pairs.clean, pairs.corrupted)
    with pytest.raises(errors.MetricError) as error:
        tp.patch(gpt2, bare, "z")
    says(error, "Metric 'logit_diff' cannot be read.", "no answer in 3 of 3 pairs, first in 0")
    says(error, "Pass tp.Pairs(…, answer=…) and tp.Pairs(…, wrong=…), or a metric that does not need it.")
    with pytest.raises(errors.MetricError, match=r"'prob' is no metric: pass tp.prob, without quotes, another metric"):
        tp.patch(gpt2, pairs, "z", "prob")  # type: ignore[arg-type]
    with pytest.raises(errors.MetricError, match=r"reads position 99, which pair 0 does not have \(14 tokens\)"):
        tp.patch(gpt2, pairs, "z", tp.logit.at(99))
    with pytest.raises(errors.MetricError, match="There is no metric"):
        tp.patch(gpt2, pairs, "z", [])
    with pytest.raises(errors.MetricError, match="Two metrics share a name"):
        tp.patch(gpt2, pairs, "z", [tp.logit, tp.logit.at(-2)])
    with pytest.raises(errors.MetricError, match="'logit' is no metric"):
        tp.patch(gpt2, pairs, "z", "logit")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(errors.MetricError, match="pair 0 has no answer"):
        tp.patch(gpt2, bare, "z", tp.cross_entropy)


# ------------------------------------------------------------------------------------------------ models


def test_training_mode(pairs: tp.Pairs) -> None:
    model = tp.load(build("gpt2"), tokenizer())
    tp.models.module_of(model).train()
    with pytest.raises(errors.ModelError, match=r"modules are in training mode .*Call model.eval\(\)"):
        tp.patching(model, pairs)


def test_not_a_traced_model(pairs: tp.Pairs) -> None:
    with pytest.raises(errors.ModelError, match="GPT2LMHeadModel is not a traced model: pass it through tp.load first"):
        tp.patching(build("gpt2"), pairs)


def test_models_without_logits(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(errors.ModelError, match="BertModel has no language-model head, so it gives no logits"):
        tp.load(BertModel(config), tokenizer())
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(errors.ModelError, match=r"is an encoder \(BertForMaskedLM\): it has no next-token logits"):
        tp.load(tmp_path / "bert")
    GPT2Model(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "base"
    )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(errors.ModelError, match=r"lacks 1 weights of GPT2LMHeadModel.*\n  lm_head.weight"):
        tp.load(tmp_path / "base")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        errors.ModelError, match="a folder without config.json. Pass a folder written by save_pretrained"
    ):
        tp.load(tmp_path)
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(errors.ModelError, match="is not a model: it is a file"):
        tp.load(tmp_path / "file.bin")
    with pytest.raises(errors.ModelError, match="There is no folder .*, and it is no Hugging Face repo id"):
        tp.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ModelError, match="No model could be read from the folder"):
        tp.load(tmp_path)


def test_a_module_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=r"comes without a tokenizer: pass tokenizer="):
        tp.load(build("gpt2"))
    build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(errors.ModelError, match="holds no tokenizer: pass tokenizer="):
        tp.load(tmp_path)


def test_an_unknown_toy() -> None:
    with pytest.raises(errors.ModelError, match="No toy is called 'gpt3'"):
        tp.toys.load("gpt3")


def test_nan_in_the_model(pairs: tp.Pairs) -> None:
    module, words = tp.toys.load_module("gpt2")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_proj.bias[0] = float("nan")
    with pytest.raises(errors.ModelError) as error:
        tp.patch(tp.load(module, words), pairs, "resid_pre")
    says(
        error, "gives NaN or inf on a plain forward", "These weights are not finite:\n  transformer.h.1.mlp.c_proj.bias"
    )


def test_nan_in_the_unpatched_metric(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.MeasurementError) as error:
        tp.patch(gpt2, pairs, "resid_pre", lambda logits: (logits[:, 0] - 1e9).log())
    says(
        error,
        "The metric of unpatched runs is not finite.",
        "pair 0, clean run: <lambda> = nan",
        "try bfloat16 or float32",
    )


def test_nan_from_a_patch(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        for pos in (2, 13):
            with p.row(pos=pos):
                p.corrupted.resid_pre[0, pos] = torch.full((64,), 3e38) * torch.tensor([1.0, -1.0] * 32)
    with pytest.raises(errors.MeasurementError) as error:
        p.run()
    says(error, "patched rows gave NaN or inf", "pair 0, row(pos=13): corrupted.resid_pre[0, 13] = tensor[64]")


# ------------------------------------------------------------------------------------------------ results


def test_files_that_are_no_result(tmp_path: Path, gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.ResultError, match="There is no file"):
        tp.open_result(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("no netCDF")
    with pytest.raises(errors.ResultError, match="is not a result: it is no netCDF file"):
        tp.open_result(tmp_path / "text.nc")
    result = tp.patch(gpt2, pairs, "resid_pre")
    result[["effect"]].assign_attrs({}).drop_attrs().to_netcdf(tmp_path / "bare.nc", engine="h5netcdf")
    with pytest.raises(errors.ResultError, match="is netCDF, but not a tracepatch result"):
        tp.open_result(tmp_path / "bare.nc")
    whole = tp.save_result(result, tmp_path / "half.nc").read_bytes()
    (tmp_path / "half.nc").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.ResultError, match="is not a result"):
        tp.open_result(tmp_path / "half.nc")


def test_results_that_do_not_join(gpt2: Any, pairs: tp.Pairs) -> None:
    result, heads = tp.patch(gpt2, pairs, "resid_pre"), tp.patch(gpt2, pairs, "z")
    with pytest.raises(errors.ResultError, match="Two results are of one model: toy-gpt2, toy-gpt2"):
        tp.concat([result, result])
    with pytest.raises(errors.ResultError, match="Results with different dims cannot be joined"):
        tp.concat([result, heads.assign_attrs(model="other")])
    with pytest.raises(errors.ResultError, match=r"Pass a list of results, one for each model: tp.concat\(\["):
        tp.concat(result)  # type: ignore[arg-type]
    several = tp.concat([result, result.assign_attrs(model="other")])
    with pytest.raises(
        errors.ResultError, match=r"too many: select of pos, .*, or give one panels, as in columns='pos'"
    ):
        tp.plots.depth(several)
    with pytest.raises(errors.ResultError, match="There are no results"):
        tp.concat([])
    with pytest.raises(errors.ResultError, match="This is no tracepatch result"):
        tp.over_pairs(result[["value"]])


def test_the_next_step_of_common_slips(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.ComponentError, match="'mlp'. Did you mean mlp_in or mlp_act or mlp_out?"):
        tp.patch(gpt2, pairs, "mlp")
    with pytest.raises(errors.RecipeError) as error:
        tp.patch(gpt2, pairs, "z", source=tp.mean(["Tom and Anna"]))
    says(
        error, "cannot be a source: the longest prompt of the reference has 3 tokens, and a prompt of the pairs has 14:"
    )
    assert str(error.value).count("mean('Tom and Anna')") == 1
    with pytest.raises(errors.SiteError, match=r"^These pairs have no spans: make them with tp.Template"):
        tp.patching(gpt2, pairs).span("subject")
    with pytest.raises(errors.PromptError, match=r"columns clean, corrupt, answers: should it say .* and 'answer' for"):
        tp.Pairs.from_frame({"clean": ["a"], "corrupt": ["b"], "answers": ["c"]})
    assert tp.Pairs.from_frame({"clean": ["a"], "order": ["b"], "note": [None]}).corrupted is None, (
        "columns of one's own"
    )
    for task in (tp.tasks.ioi, tp.tasks.greater_than, tp.tasks.docstring, tp.tasks.facts, tp.tasks.sentiment):
        with pytest.raises(errors.PromptError, match="Pass the tokenizer of a model, as model.tokenizer, not Transf"):
            task(gpt2)
    with pytest.raises(errors.PromptError, match="as model.tokenizer, not str"):
        tp.one_token("gpt2", [" Mary"])  # type: ignore[arg-type]
    with pytest.raises(errors.ResultError, match=r"Pass results by the names of their parts: tp.write_report\(path, "):
        tp.write_report("none.html", tp.patch(gpt2, pairs, "attn_out"))  # type: ignore[arg-type]
