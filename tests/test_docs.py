"""Every code block of the README and the docs runs, and what it is said to print is what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gallery
import planner_picture
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            # Numbers after the fourth digit, times and rates differ between machines.
            assert shape(body) in shape(printed), f"{page.name} shows\n{body}\nbut the code printed\n{printed}"
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(offline(body), f"{page.name}", "exec"), scope)
        printed = said.getvalue()


def offline(code: str) -> str:
    """The same code on the bundled model where it names one on the hub."""
    code = code.replace('tp.load("meta-llama/Llama-3.1-70B", remote=True)', 'tp.toys.load("llama")')
    return code.replace('tp.load("openai-community/gpt2")', 'tp.toys.load("gpt2")')


def shape(text: str) -> str:
    text = re.sub(r"\d+(\.\d+)? s\b", "# s", text)
    text = re.sub(r"\b(by|to) (0|\de-\d+)(?= logits|;)", r"\1 #", text)  # what rounding left
    text = re.sub(r"e-\d\d", "e-##", re.sub(r"(\d\.\d)\d*", r"\1", text))
    return re.sub(r"\s+", " ", text).strip()


def test_the_picture_of_the_planner_is_drawn_from_a_plan() -> None:
    recorded = planner_picture.planned()
    patches, measured, each, cells = planner_picture.numbers(recorded)
    assert (patches, measured) == (len(recorded.rows), recorded.plan.jobs)
    told = " ".join(text.get_text() for text in planner_picture.draw(recorded).texts)
    assert all(f"{number}" in told for number in (patches, patches - measured, each, cells))
    assert f"{cells / (each / (patches + 2)):.1f}, counted" in recorded.plan.explain()


def test_the_reference_is_built_with_the_documented_command(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = re.search(r"^python -m pdoc .*$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert command is not None
    arguments = command[0].replace("-o site", f"-o {tmp_path}").split()[1:]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, env=env, timeout=300)
    page = (tmp_path / "tracepatch.html").read_text()
    for name in ("patching", "Pairs", "over_pairs", "Architecture"):
        assert f'id="{name}"' in page


def test_the_gallery_has_every_recipe() -> None:
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.page(), (
        "python tests/gallery.py --write"
    )
    assert {path.stem for path in gallery.PICTURES.glob("*.png")} == set(gallery.SHOWN) == set(gallery.bundled())
