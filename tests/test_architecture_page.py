"""The page of architectures says what the probe says today."""

from __future__ import annotations

import architecture_page
import pytest
from tiny_models import ALL

import tracepatch as tp


@pytest.mark.slow
def test_the_page_is_what_the_command_writes() -> None:
    made, committed = architecture_page.page(), architecture_page.PAGE.read_text(encoding="utf-8")
    assert made == committed, "run python tests/architecture_page.py --write"


def test_every_type_and_component_stands_in_it() -> None:
    text = architecture_page.PAGE.read_text(encoding="utf-8")
    for model_type in ALL:
        assert text.count(f"| `{model_type}` |") == 2
    for name in tp.COMPONENTS:
        assert text.count(f" `{name}` |") >= 1, f"{name}: run python tests/architecture_page.py --write"


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "deepseek_v3"])
def test_a_row_is_what_is_measured(model_type: str) -> None:
    """Numbers of notes differ here, where the other types have not been asked before."""
    notes = architecture_page.Notes()
    facts, marks = architecture_page.rows(model_type, notes)
    lines = architecture_page.PAGE.read_text(encoding="utf-8").splitlines()
    first, second = (line for line in lines if line.startswith(f"| `{model_type}` |"))
    assert first == architecture_page.table([], [[f"`{model_type}`", *facts]]).splitlines()[-1]
    ticks = [mark.split(",")[0] if "✓" in mark else "" for mark in marks]
    assert [cell.strip().split(",")[0] if "✓" in cell else "" for cell in second.split("|")[2:-1]] == ticks
