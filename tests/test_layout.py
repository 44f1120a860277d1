"""The shape of the package: imports go up only, modules stay readable, nothing reaches into nnsight, and "
"lint and types hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tracepatch as tp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tracepatch"
ORDER = re.findall(r"``(\w+)``", (tp.__doc__ or "").split("in this order:")[1])
MAY_IMPORT_NNSIGHT = {"models", "requests", "trace", "backward"}
SHIPPED = {
    "norms": set(),
    "replacing": set(),
    "writing": {"tracepatch.norms", "tracepatch.replacing"},
    "masks": set(),
    "taps": {"tracepatch.norms"},
    "tallies": set(),
    "trace": {"tracepatch.norms", "tracepatch.writing", "tracepatch.masks", "tracepatch.taps"},
    "heads": {"tracepatch.norms", "tracepatch.writing"},
    "differences": {"tracepatch.norms"},
    "attention_weights": {"tracepatch.norms", "tracepatch.differences"},
    "contractions": {
        "tracepatch.norms",
        "tracepatch.writing",
        "tracepatch.heads",
        "tracepatch.differences",
        "tracepatch.attention_weights",
    },
    "backward": {
        "tracepatch.norms",
        "tracepatch.writing",
        "tracepatch.taps",
        "tracepatch.trace",
        "tracepatch.heads",
        "tracepatch.differences",
        "tracepatch.contractions",
    },
    "program": {"tracepatch.tallies", "tracepatch.trace", "tracepatch.backward", "tracepatch.contractions"},
}
LONG = {
    "probe": "one algorithm, whose steps make no sense alone: split blocks into branches, close the sum",
    "recording": "what is written inside a block: rows, worlds and their sites, each refused where it stands",
    "architecture": "one class: what was found, what is offered and why not, and how it is printed",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | (
                {f"tracepatch.{a.name}" for a in node.names} if node.module == "tracepatch" else set()
            )
    return found


def test_the_order_names_every_module() -> None:
    assert sorted(ORDER) == sorted([m.stem for m in modules() if m.stem != "__init__"] + ["toys"])


@pytest.mark.parametrize("path", [m for m in modules() if m.stem not in ("__init__", "__main__")], ids=lambda p: p.stem)
def test_imports_go_up_only(path: Path) -> None:
    above = set(ORDER[: ORDER.index(path.stem)])
    siblings = {name.split(".")[1] for name in imported(path) if name.startswith("tracepatch.")}
    assert siblings & set(ORDER) <= above, f"{path.stem} imports {sorted(siblings & set(ORDER) - above)} from below"


def test_what_runs_in_a_trace_needs_nothing_of_ours() -> None:
    """So that it can be shipped to a server by its text."""
    for name, allowed in SHIPPED.items():
        path = PACKAGE / f"{name}.py"
        assert {n for n in imported(path) if n.startswith("tracepatch")} <= allowed
        assert not re.search(r"^\s*@|super\(\)|^class ", path.read_text(), re.M)


def test_nnsight_stays_in_four_modules() -> None:
    users = {m.stem for m in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "nnsight" for n in imported(m))}
    assert users == MAY_IMPORT_NNSIGHT
    deep = [n for m in modules() for n in imported(m) if n.startswith("nnsight.")]
    assert not deep, "nnsight's internals change with every release"


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")], ids=lambda p: p.stem)
def test_modules_stay_readable(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or path.stem in LONG, f"{path.stem} has {lines} lines: two rooms in one?"


def test_the_top_level_is_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked}
    assert {t for t in top if not t.startswith(".")} == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tracepatch",
        "tests",
        "recipes",
        "docs",
    }


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_lint_format_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
