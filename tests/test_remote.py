"""Running on a server: requests, what they bring home, and what goes wrong, with a server that is in this process.

``tests/ndif`` runs the same on a real one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import toy

import tracepatch as tp
from tracepatch import program, remote, requests
from tracepatch.errors import MeasurementError, ModelError, RecipeError, ServerError
from tracepatch.models import eager_attention
from tracepatch.toys import tasks

HOST = "http://127.0.0.1:9"
ENOUGH = 100_000  # questions for one result; nobody pauses here, and whoever asks more often would ask for ever


class Status(Enum):
    """As the server's client has them."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    ERROR = "ERROR"


class RemoteError(Exception):
    """As the server's client raises it."""


class ConnectError(Exception):
    """As the HTTP client raises it."""


ConnectError.__module__ = "httpx"
Fault = Callable[["Job"], Any]


@dataclass
class Job:
    """What is asked for a result: a fault answers instead, as long as it returns something."""

    result: dict[str, Any]
    fault: Fault | None = None
    status: Status | None = None
    asked: int = 0

    def __call__(self) -> dict[str, Any] | None:
        self.asked += 1
        if self.asked > ENOUGH:
            raise RemoteError(f"asked {ENOUGH:,} times")
        if self.fault is not None:
            return self.fault(self)
        self.status = Status.RUNNING if self.asked < 2 else Status.COMPLETED
        return None if self.asked < 2 else {"result": self.result}


@dataclass
class Server:
    """Takes jobs, and does them at once on a model with weights.

    Attributes:
        model: With weights.
        faults: Of the next jobs; ``None`` for one that goes well.
        refuse: Raised when the next jobs are sent.
        sandbox: Whether it lets errors go, instead of saying which operation failed.
        jobs: How many it took.
        sent: Bytes of each.
    """

    model: Any
    faults: list[Fault | None] = field(default_factory=list)
    refuse: list[Exception | None] = field(default_factory=list)
    sandbox: bool = False
    jobs: int = 0
    sent: list[int] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)

    def submitted(self, model: Any, where: Any, *given: Any) -> Job:
        assert where == HOST
        refused = self.refuse.pop(0) if self.refuse else None
        if refused is not None:
            raise refused
        self.jobs += 1
        fault = self.faults.pop(0) if self.faults else None
        self.sent.append(len(cloudpickle.dumps(given)))
        tree, *rest = given
        arrived = cloudpickle.loads(cloudpickle.dumps(tree)), *cloudpickle.loads(cloudpickle.dumps(tuple(rest)))
        wanted = model._module.config._attn_implementation
        with eager_attention(self.model._module) if wanted == "eager" else contextlib.nullcontext():
            result = program.program(self.model, *arrived)
        self.runs.update(op[0] for op in program.unpacked(*arrived[:2]))
        if self.sandbox and result["error"] is not None:
            kind, said = result["error"]

            def failed(job: Job) -> None:
                raise RemoteError(f"Traceback (most recent call last):\n  File x\n{kind}: {said}")

            fault = failed
        buffer = io.BytesIO()
        torch.save(result, buffer)
        return Job(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False), fault)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of the toy GPT-2, where nobody has to wait."""
    found = Server(toy("gpt2"))
    monkeypatch.setattr(requests, "_submitted", found.submitted)
    for name, value in {"PAUSES": (0.0, 0.0), "ASK_FIRST": 0.0, "ASK_AT_MOST": 0.0, "SILENCE": 0.05}.items():
        monkeypatch.setattr(requests, name, value)
    return found


@functools.cache
def away(name: str = "gpt2") -> Any:
    return tp.load(tp.toys.folder(name), remote=HOST)


@functools.cache
def here() -> Any:
    return toy("gpt2")


def prompts() -> tp.Pairs:
    """Pairs of two lengths."""
    made = tasks.ioi(4, templates=tasks.TEMPLATES[:2])
    return tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)


PAIRS = prompts()


def halved(live: torch.Tensor) -> torch.Tensor:
    return live / 2


def everything(p: tp.Patching) -> None:
    """Rows of every kind: heads, positions, sums, constants, functions, edited worlds, saves."""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(kind="heads", layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]
    noised = p.world("noised", of=p.clean)
    noised.embed[0, 2] += p.gaussian(0.5)
    with p.row(kind="of a noised world"):
        noised.resid_pre[1, 2] = p.clean.resid_pre[1, 2]
    with p.row(kind="constant"):
        p.clean.mlp_out[1, -1] = torch.arange(64.0) / 64
    with p.row(kind="sum"):
        p.clean.resid_mid[1, -1] += p.corrupted.attn_out[1, -1] - p.clean.attn_out[1, -1]
    with p.row(kind="function"):
        p.clean.attn_out[0, :] = halved
    with p.row(kind="query"):
        p.corrupted.q_in[1, -1, 2] = p.clean.q_in[1, -1, 2]
    with p.row(kind="looked at"):
        p.corrupted.attn_out[1, -1] = p.clean.attn_out[1, -1]
        p.save(p.corrupted.resid_post[2, -1], name="end")


def alike(a: xr.Dataset | xr.DataTree, b: xr.Dataset | xr.DataTree, atol: float = 1e-5) -> None:
    trees = [x if isinstance(x, xr.DataTree) else xr.DataTree(x) for x in (a, b)]
    for one, two in zip(*(t.subtree for t in trees), strict=True):
        assert set(one.data_vars) == set(two.data_vars)
        for name in one.data_vars:
            np.testing.assert_allclose(one[name].values, two[name].values, atol=atol, rtol=0)


def recorded(model: Any, metric: Any = tp.logit_diff, form: Any = "packed", **options: Any) -> tp.Patching:
    with tp.patching(model, PAIRS, metric, form=form, **options) as p:
        everything(p)
    return p


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("form", ["packed", "staggered", "flat"])
def test_rows_of_every_kind_in_one_request(server: Server, form: Any) -> None:
    wanted, found = recorded(here(), form=form), recorded(away(), form=form)
    alike(found.run(), wanted.run())
    assert server.jobs == 1, "pairs of all lengths"
    assert server.runs["forget"] == len(found.plan.groups) == 2
    alike(found.saved, wanted.saved)
    assert found.plan.measured["checks"].split("; ")[1:] == wanted.plan.measured["checks"].split("; ")[1:]


def probability(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)[:, 5]


def test_metrics(server: Server) -> None:
    metrics = [tp.logit_diff, tp.kl, tp.rank, tp.cross_entropy, tp.metric(lambda x: x[:, 0] - x[:, 1], "few", vocab=(3, 9)), tp.metric(probability, positions=-2)]  # fmt: skip
    alike(recorded(away(), metrics).run(), recorded(here(), metrics).run())
    assert server.jobs == 1


@pytest.mark.parametrize("component", ["scores", "pattern"])
def test_step_by_step_attention(server: Server, component: str) -> None:
    """It is switched on there, and off again."""
    before = server.model._module.config._attn_implementation
    given = PAIRS, component
    alike(tp.patch(away(), *given), tp.patch(here(), *given))
    assert server.model._module.config._attn_implementation == before != "eager"
    assert away()._module.config._attn_implementation == before


def test_raw_traces(server: Server) -> None:
    def silence(model: Any) -> None:
        model.transformer.h[1].mlp.output[:] = 0

    found = []
    for model in (away(), here()):
        with tp.patching(model, PAIRS) as p:
            with p.row(name="silence"):
                p.trace(silence)
            with p.row(name="edit"):
                p.corrupted.mlp_out[1, :] = 0
        found.append(p.run())
    alike(*found)
    assert found[0]["effect"].values.any()


def test_a_checklist_is_one_request(server: Server) -> None:
    assert str(PAIRS.check(away())) == str(PAIRS.check(here()))
    assert server.jobs == 1


def test_only_numbers_come_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = requests.ask

    def asked(*given: Any) -> dict[str, Any]:
        answer = plain(*given)
        sizes.append(sum(t.numel() for t in _tensors(answer["found"])))
        return answer

    monkeypatch.setattr(remote, "ask", asked)
    p = tp.patching(away(), PAIRS)
    with p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    p.run()
    runs = len(p.plan.groups) * 4  # worlds, and a sample of at most two rows
    assert sizes == [pytest.approx(3 * p.plan.jobs, abs=3 * (2 * len(PAIRS) + p.plan.batches + runs))]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


# ------------------------------------------------------------------------------------------------- what is sent


def test_operations_arrive_as_they_were() -> None:
    nested = (
        ("run", {"ids": torch.tensor([[1, 2], [3, -4]]), "none": None}, (torch.arange(5), slice(2), "@")),
        [torch.tensor(2.5), torch.tensor([True, False]), torch.zeros(0, dtype=torch.long), torch.tensor(1 << 40)],
        (torch.arange(10)[3:9:2], torch.tensor([[1.0], [2.0]], dtype=torch.float64), {("a", 0): (torch.arange(5),)}),
    )
    tree, numbers = requests.packed(nested)  # type: ignore[arg-type]
    back = program.unpacked(tree, numbers)
    ours, theirs = list(_tensors(nested)), list(_tensors(back))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not list(_tensors(tree))
    assert tree[0][2][0] == tree[2][2]["a", 0][0], "equal tensors are sent once"


def test_a_plan_says_what_is_sent(server: Server) -> None:
    p = recorded(away())
    line = next(line for line in p.plan.explain().splitlines() if "runs on" in line)
    assert re.fullmatch(r"  runs on      http://127.0.0.1:9: 1 request, about [\d.]+ kB up and [\d.]+ kB down", line)
    assert server.jobs == 0, "nothing is sent before it runs"


class Pair(NamedTuple):
    one: int


@dataclass
class Settings:
    scale: float = 2.0


class Scaler:
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0] * self.scale


class Inherits(Scaler):
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return super().__call__(logits)


class Private:
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.__hidden(logits)

    def __hidden(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0]


SETTINGS, PAIR = Settings(), Pair(1)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outer(*given: Any) -> Any:
        return 2 * function(*given)

    return outer


@wrapped
def doubled(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0]


def calls_doubled(logits: torch.Tensor) -> torch.Tensor:
    return doubled(logits)


def with_settings(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0] * SETTINGS.scale


def with_pair(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, PAIR.one]


@functools.lru_cache
def chosen() -> int:
    return 1


def with_cache(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, chosen()]


def made_elsewhere() -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec("def f(logits): return logits[:, 0]", scope)
    return scope["f"]


def closed_over(value: Any) -> Callable[..., Any]:
    return lambda logits: logits[:, 0] * (value is not None)


REFUSED = [
    (doubled, "uses doubled, which a decorator wraps: only what is inside would run there"),
    (calls_doubled, "uses doubled, which a decorator wraps"),
    (with_cache, "uses chosen, which a decorator wraps"),
    (with_settings, "uses Settings, a dataclass or named tuple"),
    (with_pair, "uses Pair, a dataclass or named tuple"),
    (Inherits(2.0), r"uses Inherits.__call__, with super\(\)"),
    (Private(), r"uses Private.__call__, with super\(\) or private names"),
    (made_elsewhere(), "uses f, whose source cannot be found"),
    (closed_over(threading.Lock()), r"uses a lock, which cannot be sent \(TypeError"),
    (functools.partial(calls_doubled), "uses doubled, which a decorator wraps"),
]


@pytest.mark.parametrize(("function", "why"), REFUSED, ids=range(len(REFUSED)))
def test_functions_that_would_arrive_changed(server: Server, function: Any, why: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"(?s)not mean the same on the server.\n  metric 'it' {why}.*plain functions"
    ):
        recorded(away(), {"it": function})
    with (
        pytest.raises(RecipeError, match=rf"row\(name='f'\).* {why}"),
        tp.patching(away(), PAIRS) as p,
        p.row(name="f"),
    ):
        p.clean.attn_out[0, :] = lambda live, f=function: live * (f is not None)
    recorded(here(), {"it": Scaler(1.0)})
    assert server.jobs == 0


def test_functions_that_ship(server: Server) -> None:
    direction, net, weights = torch.randn(len(here().tokenizer)), torch.nn.Linear(3, 1), np.arange(3.0)

    def along(logits: torch.Tensor) -> torch.Tensor:
        return logits @ direction[: logits.shape[-1]]

    metrics = {
        "closure": along,
        "lambda": lambda logits: logits[:, 1] - logits[:, 0],
        "object": Scaler(3.0),
        "partial": functools.partial(lambda scale, logits: scale * logits[:, 0], 2.0),
        "module": lambda logits: net(logits[:, :3])[:, 0],
        "array": lambda logits: logits[:, :3] @ torch.from_numpy(weights).float(),
    }
    alike(recorded(away(), metrics).run(), recorded(here(), metrics).run())


def test_a_function_whose_file_has_changed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is the text as it is now."""
    (tmp_path / "edited.py").write_text("def first(logits):\n    return logits[:, 0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edited = importlib.import_module("edited")
    recorded(away(), edited.first)
    (tmp_path / "edited.py").write_text("# moved\n\ndef first(logits):\n    return logits[:, 0]\n")
    recorded(away(), edited.first)
    (tmp_path / "edited.py").write_text("def first(logits):\n    return logits[:, 1] + 0\n")
    with pytest.raises(RecipeError, match="uses first, whose file has changed since"):
        recorded(away(), edited.first)


# ------------------------------------------------------------------------------------------------- what goes wrong


def never(job: Job) -> None:
    """The server knows nothing of the job."""
    job.status = None


def empty(job: Job) -> dict[str, Any]:
    """Seen after jobs that were cut off."""
    return {}


def cut(job: Job) -> Any:
    """The line is cut twice while the job runs, which does no harm."""
    if job.asked < 3:
        raise ConnectError("Connection refused")
    return {"result": job.result}


def error(said: str) -> Fault:
    def failed(job: Job) -> None:
        raise RemoteError(said)

    return failed


@pytest.mark.parametrize(
    "fault", [never, empty, cut, error("Model evicted: try again"), error("Replica is reconnecting.")]
)
def test_faults_that_pass(server: Server, fault: Fault) -> None:
    server.faults = [fault]
    alike(recorded(away()).run(), recorded(here()).run())
    assert server.jobs == (1 if fault is cut else 2)


def test_a_request_that_is_not_taken_at_first(server: Server) -> None:
    cause = ConnectError("Connection refused")
    first = RemoteError("Failed to send request: [Errno 111] Connection refused")
    first.__cause__ = cause
    server.refuse = [first, cause, None]
    alike(recorded(away()).run(), recorded(here()).run())
    assert server.jobs == 1


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (empty, r"asked in 3 tries: the server said that the job is done, and returned nothing of it\. What is measured is kept"),
        (never, r"has not been heard of for 0 s \(it knows nothing of the job any more\)\. What is measured"),
        (error("Could not deploy this model.\nNo room."), r"(?s)does not run .*: Could not deploy this model\..*nnsight\.status\(\)"),
        (error("Your request payload could not be read (ModuleNotFoundError: x)"), r"(?s)could not read the request.*nnsight.register"),
        (error("401 Unauthorized: bad API key"), r"(?s)refused the key.*NDIF_API_KEY"),
        (error("Failed to send request: your nnsight version 0.8.1 is too old"), r"(?s)did not take the request.*nnsight.compare\(\)"),
    ],
    ids=["empty", "never", "deploy", "payload", "key", "version"],
)  # fmt: skip
def test_faults_that_stay(server: Server, fault: Fault, why: str, tmp_path: Path) -> None:
    server.faults = [fault] * 5
    p = recorded(away(), directory=tmp_path)
    with pytest.raises(ServerError, match=why) as caught:
        p.run()
    assert "NDIF_API_KEY='" not in str(caught.value)
    server.faults = []
    alike(p.run(), recorded(here()).run())


def test_a_traceback_is_of_the_job_whatever_numbers_are_in_it(server: Server) -> None:
    said = "Traceback (most recent call last):\n  File x.py, line 403, in f\nKeyError: 4010"
    server.faults = [error(said)] * 9
    with pytest.raises(MeasurementError, match="failed: KeyError: 4010"):
        recorded(away()).run()


def test_a_job_that_waits_for_ever(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(job: Job) -> None:
        job.status = Status.RUNNING

    monkeypatch.setattr(requests, "RUNNING", 0.05)
    server.faults = [waits]
    alike(recorded(away()).run(), recorded(here()).run())
    assert server.jobs == 2


def test_rows_of_edited_worlds_are_whole_prompts(server: Server) -> None:
    """A sandbox keeps no keys and values of edited worlds, and most keys run in one."""
    plan = recorded(away(), form=None).plan
    assert {batch.form for group in plan.groups for batch in group.batches} == {"flat"}
    assert (
        "\n               not packed: ordinary keys run in a sandbox, which keeps no keys and values" in plan.explain()
    )
    for other in (recorded(away()), recorded(here(), form=None)):
        assert "sandbox" not in other.plan.explain()
        assert "packed" in {batch.form for group in other.plan.groups for batch in group.batches}


def test_where_a_server_is() -> None:
    for wrong in ("localhost:8001", "", 5):
        with pytest.raises(ModelError, match="remote is True for NDIF, or the URL of a server"):
            tp.load(tp.toys.folder("gpt2"), remote=wrong)  # type: ignore[arg-type]  # on purpose
    assert tp.models.remote_of(tp.load(tp.toys.folder("gpt2"), remote="ndif")) is True


def limited(most: int) -> Callable[..., Any]:
    """A server without memory for runs of more than so many batch elements."""
    plain = program.forward

    def forward(model: Any, run: tuple[Any, ...], known: dict[Any, Any]) -> Any:
        if len(run[0]["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return plain(model, run, known)

    return forward


@pytest.mark.parametrize("sandbox", [False, True])
@pytest.mark.parametrize("most", [4, 2])
def test_a_server_without_memory(server: Server, most: int, sandbox: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recorded(here(), form="flat").run()
    server.sandbox = sandbox
    monkeypatch.setattr(program, "forward", limited(most))
    p = recorded(away(), form="flat")
    if most == 2:  # one row and its witness, and shadows
        with pytest.raises(
            MeasurementError, match=r"(?s)not enough memory for a traced run.*kind='query'.*batch_size="
        ):
            p.run()
        return
    alike(p.run(), wanted)


ARMED = [False]


def explodes(live: torch.Tensor) -> torch.Tensor:
    if ARMED[0]:  # not where functions are tried
        raise ValueError("this row is wrong")
    return live


@pytest.mark.parametrize("sandbox", [False, True])
def test_a_row_that_fails_is_named_and_the_others_are_kept(
    server: Server, sandbox: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sandbox = sandbox
    options: dict[str, Any] = {"form": "flat", "batch_size": 2, "directory": tmp_path}
    with tp.patching(away(), PAIRS, **options) as p:
        everything(p)
        with p.row(kind="wrong"):
            p.clean.attn_out[2, :] = explodes
    monkeypatch.setattr(sys.modules[__name__], "ARMED", [True])
    with pytest.raises(
        MeasurementError, match=r"(?s)failed: ValueError: this row is wrong.*row\(kind='wrong'\)"
    ) as caught:
        p.run()
    kept = int(re.search(r"(\d+) of \d+ rows are measured and kept", caught.value.__notes__[0])[1])  # type: ignore[index]
    assert kept >= p.plan.jobs / 3
    before = server.jobs
    again = recorded(away(), **options)
    assert again.plan.measured["stored"] >= kept - 2
    alike(again.run(), recorded(here(), form="flat").run())
    assert server.jobs == before + 1


def test_requests_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recorded(here(), batch_size=3).run()
    for name, value in (("REQUEST_ROWS", 10), ("REQUEST_STEPS", 3), ("REQUEST_BYTES", 2000)):
        with monkeypatch.context() as patched:
            server.jobs = 0
            patched.setattr(remote, name, value)
            alike(recorded(away(), batch_size=3).run(), wanted)
            assert server.jobs > 2, name


def test_what_is_run_again_for_its_worlds_counts_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worlds ride in the first batch, which every request needs; its rows are read from the first one only."""
    told = []
    for model in (here(), away()):
        with tp.patching(model, PAIRS[:2], form="packed", batch_size=3) as p:
            for layer, head in p.grid("z", by=("layer", "head")):
                with p.row(layer=layer, head=head):
                    p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]
        assert all(group.rides for group in p.plan.groups)
        monkeypatch.setattr(remote, "REQUEST_STEPS", 2)
        p.run()
        told += re.findall(r"all \d+ edits fired", p.plan.explain())
    assert server.jobs > 2
    assert told == ["all 24 edits fired"] * 2


def test_a_request_ends_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left goes into another one; each brings something home."""
    wanted = recorded(here(), batch_size=3).run()
    monkeypatch.setattr(remote, "SECONDS", 0.0)
    p = recorded(away(), batch_size=3)
    alike(p.run(), wanted)
    assert 3 < server.jobs <= p.plan.batches + 2 * len(p.plan.groups)


def test_ctrl_c_leaves_a_run_that_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "REQUEST_STEPS", 3)

    def interrupted(job: Job) -> None:
        raise KeyboardInterrupt

    server.faults = [None, None, interrupted]
    p = recorded(away(), batch_size=3, directory=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        p.run()
    assert re.match(r"[1-9]\d* of \d+ rows are measured and kept in ", caught.value.__notes__[0])
    assert p.partial() is not None
    other = recorded(away(), batch_size=3, directory=tmp_path)
    assert other.plan.measured["stored"] > 0
    alike(other.run(), recorded(here()).run())


def test_another_dtype_than_was_planned_on(server: Server) -> None:
    server.model = tp.toys.load("gpt2", dtype="bfloat16")
    with pytest.raises(
        ServerError, match=r"runs .* in torch.bfloat16, .* planned on in torch.float32: .*dtype='bfloat16'"
    ):
        recorded(away()).run()


def test_a_server_that_does_something_else_is_noticed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that change the others of their run drift from their unpatched world."""
    plain = program.forward

    def forward(model: Any, run: tuple[Any, ...], known: dict[Any, Any]) -> Any:
        kept, scores = plain(model, run, known)
        return kept, scores + 0.1 * len(scores)

    with monkeypatch.context() as patch, pytest.raises(MeasurementError, match="drift by") as caught:
        patch.setattr(program, "forward", forward)
        recorded(away(), form="flat").run()
    assert caught.value.__notes__[0].startswith("0 of 72 rows are measured and kept")
    alike(recorded(away(), form="flat").run(), recorded(here(), form="flat").run())


def test_what_is_said_while_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = [empty]
    said: list[str] = []
    ops = [("wires", *())]
    monkeypatch.setattr(program, "operate", lambda *given: None)
    requests.ask(away(), ops, 1, 1.0, said.append)
    assert said[0] == "the server said that the job is done, and returned nothing of it; again in 0 s"
    assert re.fullmatch(r"running, \d s", said[1])


def test_the_key_is_never_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a-secret")
    result = recorded(away(), directory=tmp_path).run()
    texts = [str(x.attrs) for x in result.subtree] + [p.read_bytes().decode("latin1") for p in tmp_path.rglob("*.*")]
    assert texts
    assert not any("a-secret" in text for text in texts)
