"""Recipe files at the command line: studies beside recipes, models left out in words, what all models show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from tracepatch.recipes import ioi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tracepatch as tp
from tracepatch import plots
from tracepatch.__main__ import app
from tracepatch.errors import PromptError, RecipeError, ResultError
from tracepatch.toys import tasks


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def untrained(tmp_path: Path) -> str:
    """The GPT-2 toy with random weights."""
    torch.manual_seed(0)
    folder = tp.toys.folder("gpt2")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "untrained")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "untrained")
    return str(tmp_path / "untrained")


def test_a_study_is_run_saved_drawn_and_reported() -> None:
    said = call("run", "attention_attribution", "--model", "toy:gpt2", "--count", "2", "--report")
    folder = Path("out/attention_attribution")
    files = ("summary.txt", "report.html", "weights.png", "toy-gpt2.weights.nc", "toy-gpt2.arcs.png")
    assert {path.name for path in folder.iterdir()} == set(files)
    assert "0.1  13 (to) → 9 (" in said
    assert "checks" not in said, "estimates have no rows to check"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "toy-gpt2.arcs.png" not in page, "pictures are inside, not where they were written"
    assert page.count('<img src="data:image/png;base64,') == 2
    saved = tp.open_result(folder / "toy-gpt2.weights.nc")
    again = tp.attention_attribution(toy("gpt2"), ioi.prompts(toy("gpt2").tokenizer, 2))
    np.testing.assert_array_equal(saved["estimate"].values, again["estimate"].values)


def test_an_audit_is_drawn_over_its_estimates_for_each_model() -> None:
    said = call("run", "mlp_neurons", "--model", "toy:gpt2", "--model", "toy:llama", "--count", "2", "--report")
    told = r"^  \d+ of the 20 neurons with the largest estimates are confirmed by patching$"
    assert len(re.findall(told, said, re.M)) == 2
    names = {path.name for path in Path("out/mlp_neurons").glob("*.png")}
    assert names == {"neurons.toy-gpt2.png", "neurons.toy-llama.png"}
    assert Path("out/mlp_neurons/report.html").read_text(encoding="utf-8").count("<img ") == 2


def test_all_models_are_concluded_upon_and_drawn_together() -> None:
    said = call(
        "run", "across_architectures", "--model", "toy:gpt2", "--model", "toy:llama", "--count", "2", "--report",
        *("--metric", "logit_diff", "--metric", "prob"),
    )  # fmt: skip
    assert re.search(r"takes over from the changed one\n  toy-gpt2 +0\.00\n  toy-llama +1\.00\n", said)
    names = {path.name for path in Path("out/across_architectures").glob("*.png")}
    assert names == {"by_depth.logit_diff.png", "by_depth.prob.png"}
    assert "all models" in Path("out/across_architectures/report.html").read_text(encoding="utf-8")


def test_a_model_without_the_behaviour_is_left_out_in_words(untrained: str) -> None:
    Path("mine.py").write_text('"""Mine."""\nfrom tracepatch.recipes.ioi import heads, prompts\n')
    more = ("--count", "4", "--no-checks")
    said = call("run", "mine.py", "--model", untrained, "--model", "toy:gpt2", *more, "--report")
    why = r"the model does not do the task: it prefers the answer on 2 of 4 clean prompts, and a coin would on 2 ± 1\.0"
    assert re.search(rf"^untrained: left out, because {why}$", said, re.M)
    assert not list(Path("out/mine").glob("untrained*"))
    assert Path("out/mine/toy-gpt2.heads.nc").is_file()
    for file in ("summary.txt", "report.html"):
        assert re.search(f"untrained: left out, because {why}", Path("out/mine", file).read_text(encoding="utf-8"))
    with pytest.raises(RecipeError, match=rf"mine can be run on none of these models\.\nuntrained: .*{why}$"):
        CliRunner().invoke(app, ["run", "mine.py", "--model", untrained, *more], catch_exceptions=False)
    said = call("run", "mine.py", "--model", untrained, *more, "--anyway")
    assert "  FAIL: the model does not do the task" in said
    assert Path("out/mine/untrained.heads.nc").is_file()


@pytest.mark.parametrize(
    ("right", "of", "passed"), [(1, 1, True), (0, 1, False), (1, 2, False), (2, 2, True), (2, 3, False), (5, 8, False), (6, 8, True)]
)  # fmt: skip
def test_the_behaviour_is_there_if_the_answer_wins_more_often_than_by_chance(right: int, of: int, passed: bool) -> None:
    made = ioi_pairs(of)
    answers = [(a, w) if i < right else (w, a) for i, (a, w) in enumerate(zip(made.answer, made.wrong, strict=True))]
    pairs = tp.Pairs(made.clean, None, *map(list, zip(*answers, strict=True)))
    assert pairs.check(toy("gpt2")).passed is passed


def test_corrupted_prompts_must_take_the_behaviour_away() -> None:
    """Those of the first template, and others in which the same name is right, by more."""
    pairs = ioi_pairs(3)
    strong = [f"{prompt.rpartition(',')[0]}, {wrong.strip()} gave the ball to" for prompt, (wrong,) in zip(pairs.clean, pairs.wrong, strict=True)]  # fmt: skip
    gaps = {
        name: tp.Pairs(texts, None, pairs.answer, pairs.wrong) for name, texts in (("a", pairs.clean), ("b", strong))
    }
    mean = {name: float(tp.patch(toy("gpt2"), one, "embed", by="pos", source=0, direction="noising")["clean"].mean()) for name, one in gaps.items()}  # fmt: skip
    weaker, stronger = (pairs.clean, strong) if mean["a"] < mean["b"] else (strong, pairs.clean)
    checklist = tp.Pairs(list(weaker), list(stronger), pairs.answer, pairs.wrong).check(toy("gpt2"))
    assert "the corrupted prompts do not take the behaviour away: the mean logit difference is +" in checklist.failure
    assert tp.Pairs(list(stronger), list(weaker), pairs.answer, pairs.wrong).check(toy("gpt2")).failure == ""


def test_a_tokenizer_that_cannot_write_the_task_is_left_out_beside_others(tmp_path: Path) -> None:
    Path("mine.py").write_text('''"""Mine."""
import tracepatch as tp
from tracepatch.recipes import ioi

def prompts(tokenizer, count, seed):
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        raise tp.errors.PromptError("These words are not for a tokenizer with a start token.")
    return ioi.prompts(tokenizer, count, seed)

heads = ioi.heads
''')
    said = call("run", "mine.py", "--model", "toy:llama", "--model", "toy:gpt2", "--count", "2", "--no-checks")
    assert "toy-llama: left out. These words are not for a tokenizer with a start token.\n" in said
    assert Path("out/mine/toy-gpt2.heads.nc").is_file()
    with pytest.raises(PromptError, match="not for a tokenizer"):
        CliRunner().invoke(app, ["run", "mine.py", "--model", "toy:llama"], catch_exceptions=False)


def test_a_conclusion_that_lacks_a_part_is_left_out() -> None:
    Path("mine.py").write_text('''"""Mine."""
import tracepatch as tp
from tracepatch.recipes.ioi import prompts

@tp.recipe
def experts(p):
    for layer in p.grid("router_logits", by="layer"):
        with p.row(layer=layer):
            p.clean.router_logits[layer] = 0

@tp.study
def heads(model, pairs, metric, **options):
    """Patch."""
    assert set(options) == {"checks", "directory"}
    return tp.patch(model, pairs, "z", metric, **options)

@tp.study
def attention(model, pairs, metric):
    return tp.attention_attribution(model, pairs, metric)

def conclude(model, pairs, metrics, results, path):
    return [str(results["heads"].sizes), str(results["experts"].sizes)]
''')
    said = call("run", "mine.py", "--model", "toy:gpt2", "--count", "2", "--no-checks")
    assert "no conclusion: it needs what is left out ('experts')" in said
    assert "  no plan: what it runs depends on what it finds" in call("explain", "mine.py", "--model", "toy:gpt2")


def test_a_study_takes_what_its_function_takes() -> None:
    @tp.study
    def heads(model, pairs, metric=tp.logit_diff, top=3):  # type: ignore[no-untyped-def]
        """The first line."""
        return top

    assert heads.taken(checks=False, top=2) == {"top": 2}
    assert heads(toy("gpt2"), ioi_pairs(1), top=2) == 2
    assert repr(heads) == "<study heads: The first line.>"
    with pytest.raises(RecipeError, match="Pass the prompts as tp.Pairs"):
        heads(toy("gpt2"), tasks.ioi(1))


def test_pictures_of_several_models() -> None:
    results = [tp.patch(toy(name), ioi_pairs(2), "z", checks=False) for name in ("gpt2", "llama")]
    assert list(plots.pictures(results)) == [""]
    over = [tp.attention_attribution(toy(name), ioi_pairs(2)) for name in ("gpt2", "llama")]
    drawn = plots.pictures(over, title="Weights")
    assert list(drawn) == ["toy-gpt2", "toy-llama"]
    assert drawn["toy-llama"].get_suptitle() == "Weights · toy-llama"
    seen = []
    plots.pictures(results[:1], lambda result: seen.append(result) or tp.over_pairs(result))  # type: ignore[func-returns-value]
    assert seen == results[:1]
    with pytest.raises(ResultError):
        plots.pictures([results[0].expand_dims(a=2, b=2)])
    curves = plots.picture(tp.concat([tp.patch(toy(name), ioi_pairs(2), "attn_out", by="layer", checks=False) for name in ("gpt2", "llama")]))  # fmt: skip
    assert curves.axes[0].get_xlabel().startswith("relative depth")


def test_both_directions_are_told_and_drawn() -> None:
    said = call(
        "run", "necessity_sufficiency", "--model", "toy:llama", "--model", "toy:gpt2", "--report", "--no-checks"
    )
    assert re.search(r"^  1\.0 +necessary and sufficient +\+0\.\d\d  \+0\.\d\d$", said, re.M)
    page = Path("out/necessity_sufficiency/report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 2
    for words in (
        "both: denoising, clean into the corrupted run, and noising",
        "Sufficient, not necessary",
        "Necessary, not sufficient",
    ):
        assert words in page
    assert "One direction" not in page
    both = tp.open_result("out/necessity_sufficiency/toy-llama.heads.nc")
    alone = [
        tp.patch(toy("llama"), pairs_of(both), "z", direction=way, checks=False) for way in ("denoising", "noising")
    ]
    drawn, again = plots.quadrants(both), plots.quadrants(*alone)
    for one, other in zip(drawn.axes[0].collections, again.axes[0].collections, strict=True):
        np.testing.assert_allclose(one.get_offsets(), other.get_offsets(), atol=1e-5)
    with pytest.raises(ResultError, match=r"quadrants\(result\) takes what tp.sweeps.both_directions gives"):
        plots.quadrants(alone[0])


def pairs_of(result: xr.Dataset | xr.DataTree) -> tp.Pairs:
    columns = (result[name].values.tolist() for name in ("clean_prompt", "corrupted_prompt", "answer", "wrong"))
    return tp.Pairs(*columns)
