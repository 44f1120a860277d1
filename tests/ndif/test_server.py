"""The server that tests of remote runs are made on: it computes what the model computes here, and stays where it is."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import faults
import httpx
import nnsight
import pytest
import server
import torch
from conftest import Served, toy
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

import tracepatch as tp

pytestmark = pytest.mark.ndif

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def logits(model: Any, remote: str, repeat: int = 1, wait: float = 0.0) -> torch.Tensor:
    """Logits at the last position of some traces in one job."""
    with model.session(remote=remote):
        found = nnsight.save(last_logits(model, IDS, repeat, wait))
    return found  # type: ignore[no-any-return]


def submit(model: Any, remote: str, repeat: int = 1, wait: float = 0.0) -> RemoteBackend:
    """The same, without waiting for it; what it gives can be asked for the result."""
    with model.session(remote=remote, blocking=False) as session:
        found = nnsight.save(last_logits(model, IDS, repeat, wait))  # noqa: F841  # a result has names
    return session.backend


def last_logits(model: Any, ids: torch.Tensor, repeat: int, wait: float) -> torch.Tensor:
    found = []
    for _ in range(repeat):
        with torch.no_grad():
            with model.trace(input_ids=ids):
                last = nnsight.save(model.output.logits[:, -1].clone())
        found.append(last)
        time.sleep(wait)
    return torch.stack(found)


def poll(job: RemoteBackend, patience: float = 300.0) -> dict[str, torch.Tensor]:
    """What a job gives when it is done."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        found = job()
        if found is not None:
            return found  # type: ignore[no-any-return]
        time.sleep(0.05)
    raise TimeoutError(f"the job is {job.status} after {patience:.0f} s")


def here(name: str) -> torch.Tensor:
    with torch.no_grad():
        return toy(name)._module(IDS).logits[:, -1]


@pytest.fixture
def gpt2_there(ndif: Served) -> Any:
    return tp.load("toys/gpt2", remote=ndif.host)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_a_trace_there_gives_what_it_gives_here(ndif: Served, name: str) -> None:
    there = tp.load(f"toys/{name}", remote=ndif.host)
    with torch.no_grad(), there.trace(input_ids=IDS, remote=ndif.host):
        found = nnsight.save(there.output.logits[:, -1])
    torch.testing.assert_close(found, here(name), atol=1e-5, rtol=0)


def test_the_key_decides_where_code_runs(ndif: Served, gpt2_there: Any) -> None:
    with gpt2_there.session(remote=ndif.host):
        has_no_weights = nnsight.save(next(gpt2_there._module.parameters()).is_meta)
    assert has_no_weights == (ndif.kind == "sandbox")


def test_the_package_is_not_there(ndif: Served, gpt2_there: Any) -> None:
    with pytest.raises(RemoteError, match="No module named 'tracepatch'"), gpt2_there.session(remote=ndif.host):
        import tracepatch.trace

        found = nnsight.save(tracepatch.trace.__name__)  # noqa: F841


def test_models_of_the_test_can_be_served(ndif: Served, tmp_path: Path) -> None:
    shutil.copytree(server.CHECKOUT / "tracepatch/toys/weights/llama", tmp_path / "copy")
    server.publish(f"own/{ndif.kind}", tmp_path / "copy")
    there = tp.load(f"own/{ndif.kind}", remote=ndif.host)
    torch.testing.assert_close(logits(there, ndif.host)[0], here("llama"), atol=1e-5, rtol=0)


def test_a_job_need_not_be_waited_for(ndif: Served, gpt2_there: Any) -> None:
    job = submit(gpt2_there, ndif.host)
    found = poll(job)
    assert list(found) == ["found"]
    torch.testing.assert_close(found["found"][0], here("gpt2"), atol=1e-5, rtol=0)


def test_nothing_listens_elsewhere_and_all_of_it_is_in_here(ndif: Served) -> None:
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = {line.split()[3].rpartition(":")[0].strip("[]") for line in listening}
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    server.require_alone()
    assert len(server.services()) > 8
    assert {server.network_of(pid) for pid in server.services()} == {server.network_of("self")}


# ------------------------------------------------------------------------------------------------------------ the faults


def test_connections_fail_as_they_are_told_to(ndif: Served, gpt2_there: Any) -> None:
    with faults.Proxy() as proxy:
        torch.testing.assert_close(logits(gpt2_there, proxy.url)[0], here("gpt2"), atol=1e-5, rtol=0)
        assert proxy.sent > 1000
        assert proxy.received > 500

        refused = proxy.fail("POST /request", "refuse")
        with pytest.raises(RemoteError, match="Failed to send request"):
            submit(gpt2_there, proxy.url)
        assert refused.happened == 1

        proxy.fail("POST /request", "status", status=503)
        with pytest.raises(RemoteError, match="It was made to fail"):
            submit(gpt2_there, proxy.url)

        job = submit(gpt2_there, proxy.url)
        proxy.fail("GET /response", "drop")
        with pytest.raises(httpx.TransportError):
            job()
        assert len(poll(job)) == 1

        proxy.fail("GET /ndif-results", "drop")
        with pytest.raises(httpx.TransportError):
            poll(job)
        assert len(poll(job)) == 1

        proxy.fail("GET /response", "empty")
        assert job() == {}

        delayed = proxy.fail("GET /response", "delay", seconds=0.3)
        began = time.monotonic()
        job()
        assert time.monotonic() - began > 0.3
        assert delayed.happened == 1

        proxy.fail("GET /subscribe", "drop")
        with pytest.raises(Exception, match="Connection to remote host was lost"):
            logits(gpt2_there, proxy.url)


def test_a_job_survives_the_api(ndif: Served, gpt2_there: Any) -> None:
    if ndif.kind == "sandbox":
        pytest.skip("the API does not know where a job runs")
    job = submit(gpt2_there, ndif.host, repeat=4, wait=0.5)
    while str(job.status) != "Status.RUNNING":
        job()
        time.sleep(0.05)
    faults.kill_api()
    with pytest.raises(httpx.TransportError):
        job()
    faults.restart_api()
    assert len(poll(job)["found"]) == 4
    logits(gpt2_there, ndif.host)


def test_a_model_that_is_killed_comes_back(ndif: Served, gpt2_there: Any) -> None:
    if ndif.kind == "sandbox":
        pytest.skip("it is one process for both kinds")
    logits(gpt2_there, ndif.host)
    faults.kill_actors()
    with pytest.raises(RemoteError, match="Error submitting request to model deployment"):
        logits(gpt2_there, ndif.host)
    torch.testing.assert_close(poll(submit(gpt2_there, ndif.host))["found"][0], here("gpt2"), atol=1e-5, rtol=0)


def test_jobs_may_have_a_time_limit(ndif: Served, gpt2_there: Any) -> None:
    if ndif.kind == "sandbox":
        pytest.skip("where a sandbox was interrupted, ndif 0.1.2 often runs no further job of the model")
    with faults.time_limit(1.0), pytest.raises(RemoteError, match=r"exceeded the execution timeout of 1.0s"):
        logits(gpt2_there, ndif.host, repeat=4, wait=1.0)
    logits(gpt2_there, ndif.host)


def test_a_disk_can_be_full(ndif: Served, tmp_path: Path) -> None:
    with faults.full_disk(tmp_path / "run") as folder:
        (folder / "small").write_bytes(b"1")
        with pytest.raises(OSError, match="No space left on device"):
            (folder / "large").write_bytes(bytes(1 << 20))
    assert not any((tmp_path / "run").iterdir())


def test_zz_a_server_that_is_killed_forgets_its_jobs(ndif: Served, gpt2_there: Any) -> None:
    if ndif.kind == "sandbox":
        pytest.skip("it is one server for both kinds")
    job = submit(gpt2_there, ndif.host)
    poll(job)
    faults.kill_server()
    with pytest.raises(httpx.ConnectError):
        job()
    faults.restart_server()
    assert job() is None  # as of a job that is not finished
    torch.testing.assert_close(logits(gpt2_there, ndif.host)[0], here("gpt2"), atol=1e-5, rtol=0)
