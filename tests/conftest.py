"""Models that several test modules share, loaded once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import nnsight
import pytest
import torch
from tiny_models import DEVICE

import tracepatch as tp
from tracepatch.models import module_of
from tracepatch.toys import tasks

torch.set_num_threads(1)


@cache
def toy(name: str) -> Any:
    """A trained toy."""
    model = tp.toys.load(name)
    module_of(model).to(DEVICE)
    return model


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


PATIENCE = 300  # seconds for a test on a server


class Served(NamedTuple):
    """A real NDIF server: where it is, and how it runs what it is sent now (``"trusted"`` or ``"sandbox"``)."""

    host: str
    kind: str


@pytest.fixture(params=["trusted", "sandbox"])
def ndif(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server that has the toys as ``toys/gpt2`` and so on; only tests marked ndif may ask for it."""
    host = os.environ.get("TRACEPATCH_NDIF")
    if host is None:
        pytest.skip("there is no server here: python tests/ndif/server.py test")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", request.param)  # by which the server decides
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    return Served(host, request.param)


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest) -> Iterator[None]:
    """An end to each test on a server."""
    if request.node.get_closest_marker("ndif") is None:
        yield
        return
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


def _give_up(*_: object) -> None:
    # No Exception: what waits for a server takes those for a line that broke.
    pytest.fail(f"no answer in {PATIENCE} s: a server may wait for ever, and a client of it")
