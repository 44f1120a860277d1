"""The command line as a user meets it: a process of its own, its files, its words and its exit status."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ioi_pairs

import tracepatch as tp
from tracepatch.catalogue import bundled


def call(*arguments: str, cwd: Path, status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tracepatch", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_run_on_the_bundled_models(tmp_path: Path) -> None:
    said, complained = call("run", "ioi", "--count", "4", "--report", cwd=tmp_path)
    assert complained == "", "a run that went well says nothing on stderr when it is not a terminal"
    folder = tmp_path / "out" / "ioi"
    names = ("residual_stream", "attention_out", "mlp_out", "heads", "queries", "keys", "values", "patterns")
    assert {f.name for f in folder.iterdir()} == {
        "summary.txt",
        "report.html",
        *(f"{name}.png" for name in names),
        *(f"toy-{toy}.{name}.nc" for toy in tp.toys.NAMES for name in names),
    }
    assert all(f.stat().st_size > 10_000 for f in folder.glob("*.png"))
    summary = (folder / "summary.txt").read_text()
    assert "57 of 57 names are one token here" in summary
    assert "opposite outputs" in summary
    assert summary.count("    checks: eager attention differs by ") == 8 * len(tp.toys.NAMES)
    lines = re.findall(r"^  checks {11}passed in 8 parts; noise up to (\S+) logits$", said, re.M)
    assert len(lines) == len(tp.toys.NAMES), "one line for all parts"
    assert all(0 <= float(number) < 1e-4 for number in lines)
    top = re.search(
        r"  heads\n    largest normalized effects on logit_diff \(clean into the corrupted run\):\n    \+(\S+)  layer 0, head 1\n",
        summary,
    )
    assert top is not None, "the head that copies the repeated name in the gpt2 toy"
    assert float(top[1]) > 0.9
    assert "toy-gemma2.heads.nc" in said
    assert said.endswith("report out/ioi/report.html\n")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 8
    assert "<h1>Indirect object identification: which activations tell who is given the bag?</h1>" in page
    assert "tracepatch run ioi --count 4 --report</pre>" in page
    assert "Denoise the output of each head at all positions." in page
    assert "swapped tokens have mean log-probability" in page
    result = tp.open_result(folder / "toy-llama.residual_stream.nc")
    assert result.sizes["layer"] == 2
    call("plot", str(folder / "toy-gpt2.heads.nc"), str(folder / "toy-llama.heads.nc"), cwd=tmp_path)
    assert (folder / "toy-gpt2+toy-llama.heads.png").stat().st_size > 10_000


def test_run_on_a_folder_and_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text('''"""My own experiment."""
import tracepatch as tp
from tracepatch.recipes.ioi import prompts

@tp.recipe
def ends(p):
    """Ablate attention at the end."""
    for layer in p.grid("attn_out", by="layer"):
        with p.row(layer=layer):
            p.clean.attn_out[layer, -1] = 0
''')
    call("run", "mine.py", "--model", str(tp.toys.folder("gpt_neox")), "--out", "results", cwd=tmp_path)
    assert {f.name for f in (tmp_path / "results" / "mine").iterdir()} == {
        "gpt_neox.ends.nc",
        "ends.png",
        "summary.txt",
    }


def test_explain_and_recipes(tmp_path: Path) -> None:
    said, _ = call("explain", "ioi", "--model", "toy:gpt_neox", "--metric", "kl", cwd=tmp_path)
    assert "  metric       kl [nats] at position -1\n" in said
    assert "GPTNeoXForCausalLM (gpt_neox): 2 layers" in said
    assert (
        "heads: Denoise the output of each head at all positions.\n8 rows × 8 pairs on toy-gpt_neox (2 layers)" in said
    )
    assert list(tmp_path.iterdir()) == []
    said, _ = call("recipes", cwd=tmp_path)
    assert said.startswith("across_architectures  Across architectures: at which depth is the same task done")
    assert said.count("\nioi  ") == said.count("\nmlp_neurons  ") == 1
    assert "    weights            What each attention weight of the clean run brings to the metric" in said, "a study"
    assert (
        "\nioi  Indirect object identification: which activations tell who is given the bag?\n    "
        "residual_stream    Denoise" in said
    )


def test_check_pairs_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(
        '{"clean": "When John and Mary went to the store, John gave the bag to", '
        '"corrupted": "When John and Mary went to the store, Mary gave the bag to", "answer": " Mary", "wrong": " John"}\n'
    )
    said, _ = call("check", "good.jsonl", cwd=tmp_path)
    assert "ok  clean: the model prefers the answer in 1 of 1 pair" in said
    (tmp_path / "bad.csv").write_text("clean,corrupted,answer,wrong\nWhen John and Mary,When John, Mary, John\n")
    said, _ = call("check", "bad.csv", cwd=tmp_path, status=1)
    assert "FAIL  1 of 1 pairs cannot be compared position by position." in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "ioo"],
            f"RecipeError: There is no recipe 'ioo'. Recipes: {', '.join(bundled())}; or pass a Python file.\n",
        ),
        (["run", "none.py"], "RecipeError: There is no file none.py.\n"),
        (
            ["run", "empty.py"],
            "RecipeError: empty.py cannot be run: it lacks a function with @tp.recipe and a function prompts(tokenizer, count, seed) -> tp.Pairs.\n",
        ),
        (
            ["run", "ioi", "--model", "./none"],
            "ModelError: There is no folder './none', and it is no Hugging Face repo id ('organisation/name').\n",
        ),
        (["plot", "none.nc"], "ResultError: There is no file none.nc.\n"),
        (
            ["run", "pairs.csv"],
            "RecipeError: pairs.csv holds pairs, and no recipe: `tracepatch check pairs.csv` looks at them, and prompts() of a recipe file may return tp.Pairs.from_csv('pairs.csv').\n",
        ),
        (
            ["run", "bare.py"],
            "RecipeError: bare.py cannot be run: the command line passes no arguments of your own. Give them a default.\n  heads: where\n",
        ),
        (
            ["run", "short.py", "--model", "toy:gpt2"],
            "RecipeError: prompts(tokenizer, count, seed) -> tp.Pairs is what a recipe file needs; its own cannot be called so: too many positional arguments.\n",
        ),
        (
            ["run", "ioi", "--dtype", "float31", "--model", "toy:gpt2"],
            "ModelError: 'float31' is no dtype; there are float32, bfloat16, float16, float64 and 'auto'.\n",
        ),
        (
            ["run", "ioi", "--model", "a", "--model", "a"],
            "RecipeError: Two models are called a. Name them: --model NAME=PATH.\n",
        ),
    ],
)
def test_errors_are_words_not_tracebacks(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "bare.py").write_text(
        "import tracepatch as tp\nfrom tracepatch.recipes.ioi import prompts\n@tp.recipe\ndef heads(p, where): ...\n"
    )
    (tmp_path / "short.py").write_text(
        "import tracepatch as tp\nfrom tracepatch.recipes.ioi import heads\ndef prompts(tokenizer): ...\n"
    )
    assert call(*arguments, cwd=tmp_path, status=1) == ("", message)


def test_models_of_one_folder_name_keep_their_results(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        shutil.copytree(tp.toys.folder("gpt2"), tmp_path / parent / "model")
    models = ("--model", "one/model", "--model", "two/model", "--model", "mine=toy:gpt2")
    said, _ = call(
        "run", "ioi", "--count", "2", "--metric", "kl", "--metric", "prob", "--no-checks", *models, cwd=tmp_path
    )
    assert len(re.findall(r"^  checks +off$", said, re.M)) == 3
    found = {f.name for f in (tmp_path / "out" / "ioi").glob("*heads*")}
    labels = ("one-model", "two-model", "mine")
    assert found == {*(f"{label}.heads.nc" for label in labels), "heads.kl.png", "heads.prob.png"}
    _, complained = call("run", "ioi", "--model", "a=toy:gpt2", "--model", "a=toy:llama", cwd=tmp_path, status=1)
    assert complained == "RecipeError: Two models are called a. Name them: --model NAME=PATH.\n"


def test_a_file_finds_its_neighbour_and_has_a_metric_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "mine"  # not where the command runs
    folder.mkdir()
    (folder / "first.py").write_text("from tracepatch.recipes.ioi import heads, prompts  # noqa\n")
    second = "from first import heads, prompts\nimport tracepatch as tp\nMETRIC = {}\n"
    own = '{"certainty": tp.log_prob}'
    for metric, name in ((own, "certainty"), ('"prob"', "prob"), ('"prb"', None)):
        (folder / "second.py").write_text(second.format(metric))
        command = ["run", "mine/second.py", "--model", "toy:gpt2", "--count", "2", "--no-checks"]
        _, complained = call(*command, cwd=tmp_path, status=int(name is None))
        if name is None:
            assert complained.startswith(
                "MetricError: METRIC of the file is 'prb', which is no metric. Metrics: logit_diff,"
            )
        else:
            summary = (tmp_path / "out" / "second" / "summary.txt").read_text()
            assert f"largest normalized effects on {name} (clean into the corrupted run)" in summary
            assert "toy-gpt2: 2 pairs (" in summary


def test_an_error_in_a_recipe_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("""\"\"\"Mine.\"\"\"
import tracepatch as tp
from tracepatch.recipes.ioi import prompts

@tp.recipe
def heads(p):
    with p.row(name="x"):
        p.clean.z[0, :, 9] = 0
""")
    _, complained = call("run", "mine.py", "--model", "toy:gpt2", cwd=tmp_path, status=1)
    assert complained.startswith("mine.py:8, in heads: SiteError: z[0, …, 9]: layer 0 has 4 heads")
    (tmp_path / "broken.py").write_text("x = (\n")
    _, complained = call("run", "broken.py", cwd=tmp_path, status=1)
    assert complained.startswith("RecipeError: broken.py cannot be imported: line 1: SyntaxError:")


def test_places_that_cannot_be_written_to(tmp_path: Path, gpt2: Any) -> None:
    (tmp_path / "file").write_text("")
    command = ("run", "ioi", "--model", "toy:gpt2", "--count", "2", "--out", "file")
    _, complained = call(*command, cwd=tmp_path, status=1)
    assert complained == "NotADirectoryError: [Errno 20] Not a directory: 'file/ioi'\n"
    tp.save_result(tp.patch(gpt2, ioi_pairs(1), "attn_out"), tmp_path / "x.nc")
    _, complained = call("plot", "x.nc", "--out", "x.abc", cwd=tmp_path, status=1)
    assert complained.startswith("ResultError: x.abc cannot be a picture: its name ends in one of ")


def test_a_tree_is_not_drawn(tmp_path: Path, gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        with p.row(name="a"):
            p.clean.z[0, :, 0] = 0
        with p.row(layer=0):
            p.clean.z[0, :, 1] = 0
    tp.save_result(p.run(), tmp_path / "tree.nc")
    _, complained = call("plot", "tree.nc", cwd=tmp_path, status=1)
    assert "tree.nc holds rows with different labels" in complained


def test_a_part_without_a_picture_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("""\"\"\"Mine.\"\"\"
import tracepatch as tp
from tracepatch.recipes.ioi import prompts

@tp.recipe
def cells(p):
    for a in range(2):
        for b in range(2):
            for c in range(2):
                for d in range(2):
                    with p.row(a=a, b=b, c=c, d=d):
                        p.clean.z[0, a, b] = c + 2 * d

@tp.recipe
def tree(p):
    with p.row(name="x"):
        p.clean.z[0, -1, 0] = 0
    with p.row(layer=0):
        p.clean.z[0, -1, 1] = 0

@tp.recipe
def experts(p):
    for layer in p.grid("router_logits", by="layer"):
        with p.row(layer=layer):
            p.clean.router_logits[layer] = 0
""")
    said, _ = call("run", "mine.py", "--model", "toy:gpt2", "--count", "2", "--report", cwd=tmp_path)
    assert "no picture of cells. 'effect' has the dims" in said or "no picture of cells. 'normalized' has" in said
    assert re.search(r"^  checks +passed in 2 parts; noise up to \S+ logits$", said, re.M)
    page = (tmp_path / "out" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "Left out on toy-gpt2. " in page
    assert "No picture of cells" in page
    assert "<h2>tree, by name</h2>" in page
    assert page.count("<img ") == 2
