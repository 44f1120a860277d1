"""Models that several test modules share, loaded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import tracepatch as tp
from tracepatch.toys import tasks

torch.set_num_threads(1)


@cache
def toy(name: str) -> Any:
    """A trained toy."""
    return tp.toys.load(name)


@cache
def ioi_pairs(count: int = 3, template: int = 0, seed: int = 0) -> tp.Pairs:
    """IOI pairs of one template."""
    prompts = tasks.ioi(count, seed=seed, templates=[tasks.TEMPLATES[template]])
    return tp.Pairs(prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong, name="ioi", seed=seed)


@pytest.fixture
def gpt2() -> Any:
    return toy("gpt2")


@pytest.fixture
def pairs() -> tp.Pairs:
    return ioi_pairs()
