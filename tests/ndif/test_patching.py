"""Patching on a real server: the numbers of a run here, in one request, whatever happens to the connection."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import faults
import nnsight
import numpy as np
import pytest
import server
import torch
import xarray as xr
from conftest import Served
from transformers import GPT2Config, GPT2LMHeadModel

import tracepatch as tp
from tracepatch import remote, requests
from tracepatch.architecture import architecture_of
from tracepatch.cells import default_by
from tracepatch.errors import MeasurementError, MeasurementWarning, ServerError
from tracepatch.models import module_of
from tracepatch.toys import tasks

pytestmark = [
    pytest.mark.ndif,
    # Services that a test starts again live on after it.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[2]
FEW = 10  # rows of a component and direction


@pytest.fixture
def kind(ndif: Served) -> str:
    """Trusted, or in a sandbox, as an ordinary key is."""
    return ndif.kind


@pytest.fixture
def trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that the server trusts."""
    if server.INSIDE not in os.environ:
        pytest.skip("there is no server here: python tests/ndif/server.py test")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "trusted")


@pytest.fixture
def proxy() -> Iterator[faults.Proxy]:
    with faults.Proxy() as found:
        yield found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each request."""
    asked: list[int] = []
    plain = requests._submitted

    def submitted(*given: Any) -> Any:
        asked.append(len(given[2]))
        return plain(*given)

    monkeypatch.setattr(requests, "_submitted", submitted)
    return asked


@cache
def here(name: str) -> Any:
    return tp.toys.load(name)


@cache
def away(name: str, host: str = server.HOST) -> Any:
    return tp.load(f"toys/{name}", remote=host)


@cache
def prompts(count: int = 4, templates: int = 2) -> tp.Pairs:
    """Pairs of two lengths."""
    made = tasks.ioi(count, templates=tasks.TEMPLATES[:templates])
    return tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)


@cache
def twelve() -> tuple[Any, str]:
    """A model of twelve layers and heads, here and there."""
    folder = server.STATE / "twelve"
    torch.manual_seed(0)  # the same for a server that is up already
    module = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=12, n_embd=96, vocab_size=161, initializer_range=0.1))
    module.save_pretrained(folder)
    here("gpt2").tokenizer.save_pretrained(folder)
    return tp.load(folder), server.publish("toys/twelve", folder)


def alike(a: Any, b: Any, atol: float = 1e-5) -> None:
    trees = [x if isinstance(x, xr.DataTree) else xr.DataTree(x) for x in (a, b)]
    for one, two in zip(*(t.subtree for t in trees), strict=True):
        for name in one.data_vars:
            scale = 1 + np.nanmax(np.abs(two[name].values.astype(float)))
            np.testing.assert_allclose(one[name].values, two[name].values, atol=atol * scale, rtol=0, err_msg=str(name))


def every_component(p: tp.Patching) -> None:
    """Some rows of every component, in both directions."""
    for name in tp.COMPONENTS:
        if not p.architecture.offers(name, 0):
            continue
        index = tp.COMPONENTS[name].index
        by = default_by(tp.COMPONENTS[name])
        sites = [site if isinstance(site, tuple) else (site,) for site in p.grid(name, by=by)]
        for number, site in enumerate(sites[:: max(1, len(sites) // FEW)]):
            at = dict(zip(by, site, strict=True))
            where = tuple(at.get(dim, slice(None)) for dim in index)
            for base, other in ((p.corrupted, p.clean), (p.clean, p.corrupted)):
                with p.row(component=name, into=str(base), number=number):
                    getattr(base, name)[where] = getattr(other, name)[where]


def heads(p: tp.Patching) -> None:
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]


def recorded(model: Any, recipe: Callable[[tp.Patching], None], pairs: tp.Pairs | None = None, metric: Any = tp.logit_diff, **options: Any) -> tp.Patching:  # fmt: skip
    with tp.patching(model, pairs or prompts(), metric, **options) as p:
        recipe(p)
    return p


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_every_component_in_both_directions(name: str, kind: str, counted: list[int]) -> None:
    found = recorded(away(name), every_component).run()
    assert len(counted) == 1
    alike(found, recorded(here(name), every_component).run())


@pytest.mark.parametrize("form", ["packed", "staggered", "flat"])
def test_every_form(form: Any, kind: str) -> None:
    """With so few rows a run that some must take the worlds' keys and values out of a cache."""
    options: dict[str, Any] = {"form": form, "batch_size": 20}
    alike(recorded(away("llama"), heads, **options).run(), recorded(here("llama"), heads, **options).run())


def halved(live: torch.Tensor) -> torch.Tensor:
    return live / 2


def more(p: tp.Patching) -> None:
    noised = p.world("noised", of=p.clean)
    noised.embed[0, 2] += p.gaussian(0.5)
    with p.row(what="of a noised world"):
        noised.resid_pre[1, 2] = p.clean.resid_pre[1, 2]
    with p.row(what="function"):
        p.clean.attn_out[0, :] = halved
    with p.row(what="saved"):
        p.corrupted.attn_out[1, -1] = p.clean.attn_out[1, -1]
        p.save(p.corrupted.resid_post[1, -1], name="end")
    with p.row(what="raw"):
        p.trace(silence)


def silence(model: Any) -> None:
    model.transformer.h[1].mlp.output[:] = 0


def first_token(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)[:, 5]


def test_worlds_functions_saves_raw_traces_and_metrics(kind: str) -> None:
    metrics = [tp.logit_diff, tp.kl, tp.rank, tp.metric(first_token)]
    found, wanted = (recorded(m("gpt2"), more, metric=metrics) for m in (away, here))
    assert {batch.form for group in found.plan.groups for batch in group.batches} == {"flat"}, "so in a sandbox, too"
    alike(found.run(), wanted.run())
    alike(found.saved, wanted.saved)
    if kind == "trusted":
        alike(recorded(away("gpt2"), more, metric=metrics, form="packed").run(), wanted.run())
    else:
        with pytest.raises(ServerError, match="in a sandbox, and keys and values of an edited world cannot be kept"):
            recorded(away("gpt2"), more, metric=metrics, form="packed").run()


def test_the_checklist(kind: str, counted: list[int]) -> None:
    assert str(prompts().check(away("gpt2"))) == str(prompts().check(here("gpt2")))
    assert len(counted) == 1


# ------------------------------------------------------------------------------------------------ what it takes


def sent_and_received(p: tp.Patching, proxy: faults.Proxy) -> tuple[xr.Dataset, int, int]:
    """What one request gives, and its bytes up and down, questions for it left out; the plan said so, about."""
    told = re.search(r"1 request, about ([\d.]+) kB up and ([\d.]+) kB down", p.plan.explain())
    assert told is not None
    posted, began = proxy.requests.count("POST /request"), time.monotonic()
    before = proxy.sent - proxy.polled[0], proxy.received - proxy.polled[1]
    found = p.run()
    sent, received = proxy.sent - proxy.polled[0] - before[0], proxy.received - proxy.polled[1] - before[1]
    assert proxy.requests.count("POST /request") == posted + 1
    took = f"{sent:,} bytes up, {received:,} down, {time.monotonic() - began:.1f} s"
    print(f"{p.plan.jobs:,} rows: {took}; {told[0]}, was planned")
    assert float(told[1]) * 1000 == pytest.approx(sent, rel=0.25)
    assert float(told[2]) * 1000 == pytest.approx(received, rel=0.25)
    return found, sent, received


def test_sweeps_are_one_request(kind: str, proxy: faults.Proxy) -> None:
    """All 144 heads; and every layer and position."""
    model, repo = twelve()
    there, pair = tp.load(repo, remote=proxy.url), prompts(1, 1)
    for component, by in (("z", ("layer", "head")), ("resid_pre", ("layer", "pos"))):

        def sweep(p: tp.Patching, component: str = component, by: tuple[str, ...] = by) -> None:
            for index in p.grid(component, by=by):
                site = (index[0], slice(None), index[1]) if component == "z" else index
                with p.row(**dict(zip(by, index, strict=True))):
                    getattr(p.corrupted, component)[site] = getattr(p.clean, component)[site]

        found, sent, _ = sent_and_received(recorded(there, sweep, pair), proxy)
        assert found["effect"].squeeze().shape[0] == 12
        assert sent <= 48 << 10
        alike(found[["value"]], tp.patch(model, pair, component, by=by)[["value"]])


def test_two_thousand_rows(kind: str, proxy: faults.Proxy) -> None:
    """Of one pair: no more than 64 kB up, and no more than twice the numbers down."""
    model, repo = twelve()

    def neurons(p: tp.Patching) -> None:
        for number, (layer, neuron) in enumerate(p.grid("mlp_act", by=("layer", "neuron"))):
            if number < 2000:
                with p.row(number=number):
                    p.corrupted.mlp_act[layer, :, neuron] = p.clean.mlp_act[layer, :, neuron]

    pair = prompts(1, 1)
    found, sent, received = sent_and_received(recorded(tp.load(repo, remote=proxy.url), neurons, pair), proxy)
    numbers = 2000 * 3 * 4  # the metric and its two sides, in float32
    assert sent <= 64 << 10
    assert received <= 2 * numbers
    alike(found[["value"]], recorded(model, neurons, pair).run()[["value"]])


# ------------------------------------------------------------------------------------------------ faults


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time between tries."""
    monkeypatch.setattr(requests, "PAUSES", (0.2, 0.5, 1.0, 5.0, 10.0, 20.0))
    monkeypatch.setattr(requests, "SILENCE", 5.0)


@pytest.mark.parametrize(
    ("on", "what"),
    [
        ("POST /request", "refuse"),
        ("POST /request", "drop"),
        ("POST /request", "status"),
        ("GET /response", "refuse"),
        ("GET /response", "drop"),
        ("GET /response", "status"),
        ("GET /response", "empty"),
        ("GET /ndif-results", "drop"),
    ],
)
def test_a_line_that_fails(on: str, what: str, trusted: None, impatient: None, proxy: faults.Proxy) -> None:
    wanted = recorded(here("gpt2"), heads).run()
    p = recorded(tp.load("toys/gpt2", remote=proxy.url), heads)
    fault = proxy.fail(on, what)
    alike(p.run(), wanted)
    assert fault.happened == 1


def test_a_line_that_is_cut_while_a_job_runs(trusted: None, impatient: None, proxy: faults.Proxy) -> None:
    p = recorded(tp.load("toys/gpt2", remote=proxy.url), every_component)
    stop = threading.Event()

    def cutting() -> None:
        while not stop.wait(0.1):
            proxy.cut()

    thread = threading.Thread(target=cutting)
    thread.start()
    try:
        result = p.run()
    finally:
        stop.set()
        thread.join()
    alike(result, recorded(here("gpt2"), every_component).run())


def interrupted_by(event: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Something happens after the second request; the number of requests."""
    monkeypatch.setattr(remote, "REQUEST_STEPS", 4)
    asked: list[int] = []
    plain = requests._submitted

    def submitted(*given: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            event()
        return plain(*given)

    monkeypatch.setattr(requests, "_submitted", submitted)
    return asked


def test_a_server_that_is_killed_and_comes_back(trusted: None, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    """A run fails when it is gone, keeps what it has, and goes on when it is back."""
    p = recorded(away("gpt2"), heads, batch_size=2, directory=tmp_path)
    monkeypatch.setattr(requests, "PAUSES", (0.1,))
    asked = interrupted_by(faults.kill_server, monkeypatch)
    try:
        with pytest.raises(ServerError, match="What is measured is kept") as caught:
            p.run()
    finally:
        faults.restart_server()
    kept = re.search(r"(\d+) of (\d+) rows are measured and kept", caught.value.__notes__[0])
    assert kept is not None
    assert 0 < int(kept[1]) < int(kept[2])
    monkeypatch.setattr(requests, "PAUSES", (0.2, 0.5, 1.0, 5.0, 10.0, 20.0))
    before = len(asked)
    again = recorded(away("gpt2"), heads, batch_size=2, directory=tmp_path)
    assert again.plan.measured["stored"] == int(kept[1])
    alike(again.run(), recorded(here("gpt2"), heads).run())
    assert len(asked) > before


def test_an_api_that_restarts_in_between(trusted: None, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def restart() -> None:
        faults.kill_api()
        threading.Timer(3.0, faults.restart_api).start()

    interrupted_by(restart, monkeypatch)
    alike(recorded(away("gpt2"), heads, batch_size=2).run(), recorded(here("gpt2"), heads).run())


def test_a_model_that_is_killed(trusted: None, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_by(faults.kill_actors, monkeypatch)
    alike(recorded(away("gpt2"), heads, batch_size=2).run(), recorded(here("gpt2"), heads).run())


def slow(live: torch.Tensor) -> torch.Tensor:
    import time as clock

    if live.shape[0] > 2:
        clock.sleep(8)
    return live / 2


def test_a_job_that_takes_too_long(trusted: None, impatient: None, tmp_path: Path) -> None:
    """Rows are sent in halves until each is done in time."""

    def slowly(p: tp.Patching) -> None:
        for layer in range(2):
            for _ in range(2):
                with p.row(number=len(p.rows)):
                    p.clean.attn_out[layer, :] = slow

    p = recorded(away("gpt2"), slowly, prompts(4, 1), form="flat", checks=False)
    with faults.time_limit(5.0):
        found = p.run()
    alike(found, recorded(here("gpt2"), slowly, prompts(4, 1), form="flat", checks=False).run())


def test_a_full_disk(trusted: None, tmp_path: Path) -> None:
    with faults.full_disk(tmp_path / "runs") as folder:
        p = recorded(away("gpt2"), heads, batch_size=1, directory=folder)
        with pytest.warns(MeasurementWarning, match="cannot be written to"):
            found = p.run()
    alike(found, recorded(here("gpt2"), heads).run())


def fails(live: torch.Tensor) -> torch.Tensor:
    import os

    if "TRACEPATCH_NDIF" not in os.environ:  # not here, where functions are tried
        raise ValueError("this row is wrong")
    return live


def test_a_row_that_fails_is_named(kind: str) -> None:
    def one_wrong(p: tp.Patching) -> None:
        heads(p)
        with p.row(name="wrong"):
            p.clean.attn_out[0, :] = fails

    p = recorded(away("gpt2"), one_wrong, prompts(3, 1), form="flat", batch_size=4)
    with pytest.raises(MeasurementError, match=r"(?s)failed: ValueError: this row is wrong.*row\(name='wrong'\)"):
        p.run()


def test_what_a_server_does_not_have(trusted: None, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "PAUSES", (0.1,))
    folder = shutil.copytree(server.STATE / "hub" / "toys" / "gpt2", server.STATE / "gone", dirs_exist_ok=True)
    model = tp.load(server.publish("toys/gone", folder), remote=server.HOST)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ServerError, match="toys/gone"):
        tp.patch(model, prompts(1, 1), "z")
    with pytest.raises(ServerError, match="could not be asked in 2 tries"):
        tp.patch(away("gpt2", "http://127.0.0.1:1"), prompts(1, 1), "z")


# ------------------------------------------------------------------------------------------------ a new user


def test_a_wheel_at_the_client_and_nothing_at_the_server(trusted: None, tmp_path: Path) -> None:
    """From a script in a folder of its own, with a metric of its own, as an installed package."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("tracepatch-*.whl")
    packages = tmp_path / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel], check=True
    )
    there = server.home() / "venv"
    assert not list(there.rglob("tracepatch*")), "the server must not have it"
    script = tmp_path / "mine.py"
    script.write_text(f'''
import nnsight
import tracepatch as tp
from tracepatch.recipes import ioi

assert "packages" in tp.__file__, tp.__file__
nnsight.CONFIG.API.APIKEY = "trusted"

def first(logits):
    return logits[:, 7] - logits[:, 9]

results = []
for model in (tp.load("toys/gpt2", remote="{server.HOST}"), tp.toys.load("gpt2")):
    pairs = ioi.prompts(model.tokenizer, 2, 0)
    results.append(tp.patch(model, pairs, "z", [tp.logit_diff, tp.metric(first, "mine")]))
print(float(abs(results[0].effect - results[1].effect).max()))
''')
    env = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5


def test_the_model_is_not_here(trusted: None) -> None:
    assert {p.device.type for p in module_of(away("gpt2")).parameters()} == {"meta"}
    there, near = architecture_of(away("llama")), architecture_of(here("llama"))
    assert [there.place(c, 0).path for c in ("z", "q", "mlp_out")] == [
        near.place(c, 0).path for c in ("z", "q", "mlp_out")
    ]
