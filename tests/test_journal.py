"""Finished batches are kept and taken up again: to the last bit, whatever ended the run, and nothing else's."""

from __future__ import annotations

import functools
import math
import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from typer.testing import CliRunner

import tracepatch as tp
from tracepatch import entries, journal, steps, writing
from tracepatch.__main__ import app
from tracepatch.errors import MeasurementError, MeasurementWarning, RecipeError
from tracepatch.identity import Identities, UnidentifiedError, context
from tracepatch.models import module_of
from tracepatch.progress import Told, bar, pace

SCALE = 2.0
whole = steps.Here._taken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "ioi"


@contextmanager
def modules_called() -> Iterator[list[int]]:
    """Counts forwards of any module."""
    count = [0]

    def seen(*_: Any) -> None:
        count[0] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        yield count
    finally:
        handle.remove()


def heads(p: tp.Patching, value: Any = None) -> None:
    """Rows over the heads, in both directions, with a saved value and an edited world."""
    for layer, head in p.grid("z", by=("layer", "head"), layer=slice(0, 2)):
        with p.row(layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head] if value is None else value
            if head == 1:
                p.save(p.corrupted.resid_post[2, -1], name="end")


def recorded(model: Any, pairs: tp.Pairs, **options: Any) -> tp.Patching:
    with tp.patching(model, pairs, **{"batch_size": 3, **options}) as p:
        heads(p)
    return p


def same(a: xr.Dataset, b: xr.Dataset) -> bool:
    """To the last bit."""
    return a.drop_attrs().identical(b.drop_attrs()) and a.attrs["noise_floor"] == b.attrs["noise_floor"]


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Lets the progress callback raise, as Ctrl-C does, after so many batches."""
    done = [0]

    @contextmanager
    def interrupting(*_: Any) -> Iterator[Told]:
        def advance(_: int) -> None:
            done[0] += 1
            if done[0] == batches:
                raise error

        yield Told(advance)

    monkeypatch.setattr(sys.modules["tracepatch.recipe"], "bar", interrupting)


def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that will be run from now on, but for those of the checks."""
    rows: list[int] = []

    def taken(self: Any, step: Any, known: Any) -> Any:
        rows.extend(job.row for job in (step.batch.jobs if step.batch else ()))
        return whole(self, step, known)

    monkeypatch.setattr(steps.Here, "_taken", taken)
    return rows


# ------------------------------------------------------------------------------------------------ continuing


@pytest.mark.parametrize("kept_in", ["directory", "memory"])
def test_interrupted_at_every_batch(gpt2: Any, pairs: tp.Pairs, kept_in: str, tmp_path: Path) -> None:
    whole = recorded(gpt2, pairs)
    wanted, saved = whole.run(), whole.saved
    assert whole.plan.batches == 8
    for stop in range(1, whole.plan.batches + 1):
        options = {"directory": tmp_path / str(stop)} if kept_in == "directory" else {}
        p = recorded(gpt2, pairs, **options)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as error:
            stop_after(stop, patch)
            p.run()
        done = sum(len(b.jobs) for g in p.plan.groups for b in g.batches[:stop])
        assert f"{done} of {p.plan.jobs} rows are measured and kept" in error.value.__notes__[0]
        again = recorded(gpt2, pairs, **options)  # another recording: what is kept is known by its contents
        assert same(again.run(), wanted)
        assert again.saved.drop_attrs().identical(saved.drop_attrs())
        assert again.plan.measured["checks"] == whole.plan.measured["checks"]


def without_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """So many runs of more than two jobs do not fit; how many jobs those have that do."""
    plain, sizes, left = steps.Here._operated, [], [times]

    def operated(self: Any, step: Any, number: int, known: Any) -> Any:
        call = step.ops[number][1]
        if call is not None and len(call.jobs) > 2 and left[0]:
            left[0] -= 1
            error = torch.OutOfMemoryError("no room")
            raise step.failed(number, error) from error
        sizes.extend([len(call.jobs)] if call is not None else [])
        return plain(self, step, number, known)

    monkeypatch.setattr(steps.Here, "_operated", operated)
    return sizes


@pytest.mark.parametrize("form", ["packed", "staggered", "flat"])
@pytest.mark.parametrize("kept_in", ["directory", "memory"])
def test_what_was_divided_is_divided_again(form: Any, kept_in: str, gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    """Where memory ran out while the worlds were run, what goes on later takes them as they came out then."""
    options: dict[str, Any] = {"batch_size": 8, "form": form}
    once = recorded(gpt2, pairs, **options)  # which tries the form
    with pytest.MonkeyPatch.context() as patch:
        sizes = without_memory(patch, times=2)
        wanted = once.run()
    assert not same(once.run(), wanted), "this test would notice nothing"
    options |= {"directory": tmp_path} if kept_in == "directory" else {}
    p = recorded(gpt2, pairs, **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        without_memory(patch, times=2)
        stop_after(1, patch)
        p.run()
    with pytest.MonkeyPatch.context() as patch:
        again = without_memory(patch, times=0)
        assert same(recorded(gpt2, pairs, **options).run(), wanted)
    assert again[:3] == sizes[:3]


@pytest.mark.parametrize("kept_in", ["directory", "memory"])
def test_what_the_checks_refuse_is_measured_again(kept_in: str, gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    """A batch whose witness drifts is not kept, or the same call would find the same fault for ever."""
    wanted = recorded(gpt2, pairs, form="staggered").run()
    options: dict[str, Any] = {"directory": tmp_path} if kept_in == "directory" else {}
    p = recorded(gpt2, pairs, form="staggered", **options)
    plain, (*_, drifting, _) = steps.Here._operated, p.plan.groups[0].batches

    def operated(self: Any, step: Any, number: int, known: Any) -> Any:
        found = plain(self, step, number, known)
        return (found[0] + 1, *found[1:]) if step.batch is drifting else found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MeasurementError, match="drift by 1 logits") as error:
        patch.setattr(steps.Here, "_operated", operated)
        p.run()
    kept = p.plan.jobs - len(drifting.jobs)
    assert kept - 3 <= int(error.value.__notes__[0].split()[0]) <= kept, "but for the batch of the row measured alone"
    again = recorded(gpt2, pairs, form="staggered", **options)
    with pytest.MonkeyPatch.context() as patch:
        rows = ran(patch)
        assert same(again.run(), wanted)
    assert {job.row for job in drifting.jobs} <= set(rows)
    assert len(rows) <= 2 * 3


def test_only_what_is_missing_is_run(gpt2: Any, pairs: tp.Pairs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = recorded(gpt2, pairs, directory=folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(5, patch)
        p.run()
    told = ran(monkeypatch)
    p.run()
    first, *rest = p.plan.groups[0].batches
    # The first once more: what the others write is computed in it.
    assert told == [job.row for batch in (first, *rest[4:]) for job in batch.jobs]


def test_a_second_run_runs_nothing(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    first = recorded(gpt2, pairs, directory=folder)
    wanted, saved = first.run(), first.saved
    assert "stored" not in first.plan.explain()
    second = recorded(gpt2, pairs, directory=folder)
    assert f"  stored       24 rows of earlier runs are taken from {folder}" in second.plan.explain()
    with modules_called() as count:
        found = second.run()
    assert count == [0]
    assert same(found, wanted)
    assert second.saved.drop_attrs().identical(saved.drop_attrs())
    assert found.attrs["checks"] == wanted.attrs["checks"]
    assert "nothing was run" in second.plan.explain()
    assert same(second.run(), wanted), "the same recording again"


def test_a_directory_holds_several_recipes_models_and_pairs(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    llama = toy("llama")
    alone = [tp.patch(m, q, "z", **o) for m in (gpt2, llama) for q, o in ((pairs, {}), (ioi_pairs(2, 1), {}))]
    for _ in range(2):
        both = [tp.patch(m, q, "z", directory=folder) for m in (gpt2, llama) for q in (pairs, ioi_pairs(2, 1))]
        assert all(same(a, b) for a, b in zip(alone, both, strict=True))


def test_what_a_batch_leaves_behind_is_put_back(gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    """Every kind of it, with numbers that no run of a toy gives."""
    p, store = recorded(gpt2, pairs), entries.Directory(tmp_path)
    batches = p.plan.groups[0].batches
    shape = len(p.plan.rows), p.plan.pairs

    def empty() -> Any:
        noise, still = np.array([0.5, 0, 0]), np.zeros(shape, bool)
        ends = {world: np.arange(9.0).reshape(3, 3) for world in ("clean", "corrupted")}
        given = {"values": np.full((*shape, 3), np.nan), "still": still, "noise": noise, "baselines": ends}
        return SimpleNamespace(**given, fired=1, saved={})

    filled = empty()
    for n, batch in enumerate(batches[:2]):
        with journal.Journal(p.plan, gpt2, p.encoded, store).batch(filled, batch, [(3,), (2, 1)][n]):
            assert not filled.noise.any(), "of this batch alone"
            for job in batch.jobs:
                filled.values[job.row, job.pair] = math.pi * (1 + job.row)
                filled.still[job.row, job.pair] = job.pair == 1
                filled.saved[job.row, 0, job.pair] = torch.arange(6.0).reshape(2, 3).T * job.row
            filled.noise = np.array([0.1, 0.2, math.e]) / (n + 1)
            filled.fired += 3 + n
    assert filled.noise.tolist() == [0.5, 0.2, math.e]
    assert filled.fired == 1 + 3 + 4
    found, again = empty(), journal.Journal(p.plan, gpt2, p.encoded, store)
    assert again.load() == 6
    assert [again.runs(batch) for batch in batches[:3]] == [[], [2, 1], []]
    assert again.todo(found, p.plan.groups[0]) == list(batches[2:])
    for name in ("values", "still", "noise", "fired"):
        assert np.array_equal(getattr(found, name), getattr(filled, name), equal_nan=True), name
    journal.Journal(p.plan, gpt2, p.encoded, store).worlds(filled, p.plan.groups[0], at_once=2)
    assert again.at_once(p.plan.groups[0]) == 0
    again.load()
    assert again.at_once(p.plan.groups[0]) == 2
    found.baselines["clean"][:] = 7  # as if the worlds had been run again, on a device that rounds anew each time
    again.worlds(found, p.plan.groups[0])
    assert np.array_equal(found.baselines["clean"], filled.baselines["clean"]), "what the batches were compared to"
    assert found.saved.keys() == filled.saved.keys()
    assert all(torch.equal(found.saved[key], filled.saved[key]) for key in found.saved)


def test_edited_worlds_functions_and_raw_traces(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    noise = torch.linspace(-1, 1, 64)

    def record() -> tp.Patching:
        with tp.patching(gpt2, pairs, [tp.logit_diff, tp.kl], batch_size=2, directory=folder) as p:
            noisy = p.world("noisy", of=p.clean)
            noisy.resid_pre[0, 3] += noise
            with p.row(name="restored"):
                noisy.resid_pre[1, 3] = p.clean.resid_pre[1, 3]
            with p.row(name="halved"):
                p.corrupted.mlp_out[1, -1] = lambda live: live * 0.5
            with p.row(name="scaled"):
                p.corrupted.mlp_out[0, -1] = lambda x: x * SCALE
            with p.row(name="traced"):
                p.trace(halve)
        return p

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        record().run()
    found = record().run()
    with modules_called() as count:
        again = record().run()
    assert count == [0]
    assert same(again, found)
    for file in folder.iterdir():
        file.unlink()
    assert same(record().run(), found)


def halve(model: Any) -> None:
    model.transformer.h[1].ln_2.output[:, -1] *= 0.5


KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be told to ignore it
import torch
torch.set_num_threads(1)
import tracepatch as tp
from tracepatch import steps
sys.path.insert(0, {tests!r})
from conftest import ioi_pairs, toy
from test_journal import heads
real = steps.Here._taken
def slow(self, step, known):
    taken = real(self, step, known)
    if step.batch:
        print("batch", flush=True)
        time.sleep({pause})
    return taken
with tp.patching(toy("gpt2"), ioi_pairs(), batch_size=3, directory={folder!r}) as p:
    heads(p)
steps.Here._taken = slow  # not before: what the model allows was tried when the block ended
p.run()
"""


def test_processes_that_are_ended(gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    """By kill -9, and by a real Ctrl-C."""
    complained = {}
    for how in (signal.SIGKILL, signal.SIGINT):
        code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / how.name), pause=0.3)
        given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", code], **given) as process:
            for _ in range(4):
                assert process.stdout.readline() == "batch\n"
            process.send_signal(how)
            _, complained[how] = process.communicate(timeout=60)
        assert process.returncode == -how
    told = complained[signal.SIGINT].splitlines()
    assert told[-2] == "KeyboardInterrupt"
    assert re.match(r"\d+ of 24 rows are measured and kept in ", told[-1]), told
    wanted = recorded(gpt2, pairs).run()
    for how in complained:
        p = recorded(gpt2, pairs, directory=tmp_path / how.name)
        assert 9 <= p.plan.measured["stored"] < 24
        assert same(p.run(), wanted)


@pytest.mark.slow
def test_two_processes_in_one_directory(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), pause=0)
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    p = recorded(gpt2, pairs, directory=folder)
    with modules_called() as count:
        found = p.run()
    assert count == [0]
    assert same(found, recorded(gpt2, pairs).run())


# ------------------------------------------------------------------------------------------------ files


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _other(path: Path) -> None:
    path.write_bytes(next(f for f in sorted(path.parent.iterdir()) if f != path).read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _flipped,
        _other,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not ours"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["truncated", "flipped bit", "another's content", "empty", "foreign", "a folder"],
)
def test_damaged_files_are_measured_again(
    gpt2: Any, pairs: tp.Pairs, folder: Path, damage: Callable[[Path], Any]
) -> None:
    wanted = recorded(gpt2, pairs, directory=folder).run()
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 1 + 8 + 1, "the worlds, the batches, the checks"
    for file in (files[0], files[4], files[-1]):
        damage(file)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert same(recorded(gpt2, pairs, directory=folder).run(), wanted)
        told = [str(w.message) for w in found]
        assert told[0] == f"{file} is damaged or was cut off: its batch is measured again, and the file replaced."
        if file.is_dir():
            file.rmdir()
            assert "cannot be written to" in told[1]
            recorded(gpt2, pairs, directory=folder).run()
        with modules_called() as count:
            assert same(recorded(gpt2, pairs, directory=folder).run(), wanted)
        assert count == [0], "the file is whole again"


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    store = entries.Directory(tmp_path)
    entry = entries.Entry({"values": torch.arange(6.0).reshape(2, 3)}, {"fired": "2"})
    store.keep("key", entry)
    (file,) = tmp_path.iterdir()
    content, wrong = file.read_bytes(), 0
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            taken = store.take("key")
        wrong += len(found)
        assert taken is None or (
            taken.facts == entry.facts and torch.equal(taken.tensors["values"], entry.tensors["values"])
        )
    assert wrong > 0.9 * len(content)


def test_leftovers_are_ignored_and_cleaned_up(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    folder.mkdir(parents=True)
    old, new, foreign = (folder / name for name in (".a.1.b.safetensors.part", ".c.2.d.safetensors.part", "notes.txt"))
    for file in (old, new, foreign):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    recorded(gpt2, pairs, directory=folder).run()
    assert not old.exists()
    assert new.exists(), "its writer may be alive"
    assert foreign.read_bytes() == b"half"


def test_no_pickle(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    recorded(gpt2, pairs, directory=folder).run()
    for file in folder.iterdir():
        content = file.read_bytes()
        assert content[8:9] == b"{"
        assert file.suffix == ".safetensors"


def test_a_full_disk(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    wanted = recorded(gpt2, pairs).run()
    real, calls = entries.write, [0]

    def full(file: Any, content: bytes) -> None:
        calls[0] += 1
        if calls[0] in (3, 4, 6):
            file.write(content[:10])
            raise OSError(28, "No space left on device")
        real(file, content)

    p = recorded(gpt2, pairs, directory=folder)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        patch.setattr(entries, "write", full)
        with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
            stop_after(6, inner)
            p.run()
    assert [str(w.message) for w in found] == [
        f"{folder} cannot be written to (No space left on device). The run goes on, but what is not in that folder is "
        "lost when this process ends."
    ]
    assert len(list(folder.iterdir())) == 4, "nothing half-written is left"
    assert (p.partial()["status"] == tp.Status.MEASURED).sum() == 18
    with pytest.MonkeyPatch.context() as patch:
        told = ran(patch)
        assert same(p.run(), wanted)
    assert len(told) == 3 + 6, "what the disk did not take is still in memory; the first run is there for its worlds"


def test_a_directory_that_cannot_be_one(gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="file is a file. Pass a folder for the finished batches"):
        tp.patching(gpt2, pairs, directory=tmp_path / "file" / "below")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match="nothing can be written in"):
        patch.setattr(os, "access", lambda *_: False)
        tp.patching(gpt2, pairs, directory=tmp_path / "new")
    p = recorded(gpt2, pairs, directory=tmp_path / "new")
    assert not (tmp_path / "new").exists(), "planning writes nothing"
    (tmp_path / "new").write_text("x")
    with pytest.raises(RecipeError, match="nothing can be written there .File exists"):
        p.run()


# ------------------------------------------------------------------------------------------------ what is another key


def keys(
    model: Any, pairs: tp.Pairs, record: Callable[[tp.Patching], None], metric: Any = tp.logit_diff, **options: Any
) -> set[str]:
    with tp.patching(model, pairs, metric, **options) as p:
        record(p)
    found = journal.Journal(p.plan, model, p.encoded, entries.Memory(), p._checks)
    assert not found.reasons, found.reasons
    return {found._keys[id(batch)] for group in p.plan.groups for batch in group.batches}


def one(value: Any, add: bool = False) -> Callable[[tp.Patching], None]:
    def record(p: tp.Patching) -> None:
        with p.row(name="one"):
            if add:
                p.corrupted.mlp_out[1, -1] += (
                    value(p) if callable(value) and not isinstance(value, torch.Tensor) else value
                )
            else:
                p.corrupted.mlp_out[1, -1] = value

    return record


def tracing(function: Any) -> Callable[[tp.Patching], None]:
    def record(p: tp.Patching) -> None:
        with p.row(name="one"):
            p.trace(function)

    return record


def saving(position: int, reduce: Any = None) -> Callable[[tp.Patching], None]:
    def record(p: tp.Patching) -> None:
        with p.row(name="one"):
            p.corrupted.mlp_out[1, -1] = 0.5
            p.save(p.corrupted.resid_post[2, position], reduce=reduce)

    return record


def closing(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda live: live * number


def defaulting(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda live, *, by=number: live * by


def holding(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def outer(live: torch.Tensor) -> torch.Tensor:
        return closing(2.0)(live) + tensor

    return outer


def globally(live: torch.Tensor) -> torch.Tensor:
    return scaled(live)


def scaled(live: torch.Tensor) -> torch.Tensor:
    return live * SCALE


def mean_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits.mean(-1)


def test_equal_contents_have_equal_keys(gpt2: Any, pairs: tp.Pairs) -> None:
    for make in (
        lambda: 0.5,
        lambda: torch.ones(64),
        lambda: closing(2.0),
        lambda: defaulting(2.0),
        lambda: holding(torch.ones(64)),
        lambda: globally,
        lambda: torch.relu,
        lambda: functools.partial(scaled),
    ):
        assert keys(gpt2, pairs, one(make())) == keys(tp.toys.load("gpt2"), ioi_pairs.__wrapped__(), one(make()))


def test_any_change_is_another_key(gpt2: Any, pairs: tp.Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tp.Pairs(pairs.clean, pairs.corrupted, pairs.answer, pairs.clean and [" Anna", " Paul", " Mary"])
    given: list[tuple[str, Any]] = [
        ("a number", (gpt2, pairs, one(0.5))),
        ("another number", (gpt2, pairs, one(0.25))),
        ("added", (gpt2, pairs, one(0.5, add=True))),
        ("a tensor", (gpt2, pairs, one(torch.ones(64)))),
        ("another tensor", (gpt2, pairs, one(torch.ones(64).index_fill(0, torch.tensor([17]), 1 + 1e-6)))),
        ("a closure", (gpt2, pairs, one(closing(2.0)))),
        ("another closure", (gpt2, pairs, one(closing(3.0)))),
        ("a default", (gpt2, pairs, one(defaulting(2.0)))),
        ("another default", (gpt2, pairs, one(defaulting(3.0)))),
        ("a held tensor", (gpt2, pairs, one(holding(torch.ones(64))))),
        ("another held tensor", (gpt2, pairs, one(holding(torch.zeros(64))))),
        ("a body", (gpt2, pairs, one(lambda live: live + 2.0))),
        ("another body", (gpt2, pairs, one(lambda live: live - 2.0))),
        ("a builtin", (gpt2, pairs, one(torch.relu))),
        ("another builtin", (gpt2, pairs, one(torch.tanh))),
        ("a global", (gpt2, pairs, one(globally))),
        ("a metric", (gpt2, pairs, one(0.5), tp.prob)),
        ("its position", (gpt2, pairs, one(0.5), tp.prob.at(-2))),
        ("several metrics", (gpt2, pairs, one(0.5), [tp.prob, tp.logit_diff])),
        ("a function as metric", (gpt2, pairs, one(0.5), mean_logit)),
        ("another function as metric", (gpt2, pairs, one(0.5), lambda logits: logits.max(-1).values)),
        ("fewer pairs", (gpt2, pairs[:2], one(0.5))),
        ("other pairs", (gpt2, ioi_pairs(3, seed=5), one(0.5))),
        ("other wrong answers", (gpt2, wrong, one(0.5))),
        ("another model", (toy("llama"), pairs, one(0.5))),
        ("a raw trace", (gpt2, pairs, tracing(halve))),
        ("another raw trace", (gpt2, pairs, tracing(lambda model: halve(model.model)))),
        ("a saved value", (gpt2, pairs, saving(-1))),
        ("another saved value", (gpt2, pairs, saving(-2))),
        ("a reduced one", (gpt2, pairs, saving(-1, lambda x: x.norm(dim=-1)))),
        ("one reduced otherwise", (gpt2, pairs, saving(-1, lambda x: x.amax(dim=-1)))),
    ]
    found = {name: keys(*arguments) for name, arguments in given}
    found["no checks"] = keys(gpt2, pairs, one(0.5), checks=False)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    found["another global"] = keys(gpt2, pairs, one(globally))
    seen: dict[str, str] = {}
    for name, several in found.items():
        for key in several:
            assert key not in seen, f"{name} has a key of {seen[key]}"
        seen |= dict.fromkeys(several, name)


def test_each_pair_has_a_key_of_its_own(gpt2: Any, pairs: tp.Pairs) -> None:
    assert len(keys(gpt2, pairs, heads, batch_size=1)) == 24


def test_another_world_is_another_key(gpt2: Any, pairs: tp.Pairs) -> None:
    def source(number: float) -> Callable[[tp.Patching], None]:
        def inside(p: tp.Patching) -> None:
            noisy = p.world("noisy", of=p.clean)
            noisy.resid_pre[0, 3] += number
            with p.row(name="taken over"):
                p.corrupted.resid_pre[1, 3] = noisy.resid_pre[1, 3]

        return inside

    def record(number: float) -> Callable[[tp.Patching], None]:
        def inside(p: tp.Patching) -> None:
            noisy = p.world("noisy", of=p.clean)
            noisy.resid_pre[0, 3] += number
            with p.row(name="restored"):
                noisy.resid_pre[1, 3] = p.clean.resid_pre[1, 3]

        return inside

    assert keys(gpt2, pairs, record(1.0)) == keys(gpt2, pairs, record(1.0))
    assert not keys(gpt2, pairs, record(1.0)) & keys(gpt2, pairs, record(2.0))
    assert keys(gpt2, pairs, source(1.0)) == keys(gpt2, pairs, source(1.0))
    assert not keys(gpt2, pairs, source(1.0)) & keys(gpt2, pairs, source(2.0))


def test_any_weight_and_setting_of_the_model_counts() -> None:
    model = tp.toys.load("gpt2")
    module = module_of(model)
    before = context(model, False)
    assert before == context(tp.toys.load("gpt2", name="another name"), False)
    for name, tensor in module.named_parameters():
        with torch.no_grad():
            kept = tensor.view(-1)[-1].item()
            tensor.view(-1)[-1] = math.nextafter(kept, 9e9) if kept == 0 else kept * (1 + 2e-7)
            assert context(model, False) != before, name
            tensor.view(-1)[-1] = kept
    assert context(model, False) == before
    module.transformer.h[0].ln_1.eps *= 2
    assert context(model, False) != before, "what is no weight"
    module.transformer.h[0].ln_1.eps /= 2
    assert context(model, True) != before, "attention step by step"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        assert context(model, False) != before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert context(model, False) != before
    assert context(tp.toys.load("gpt2", dtype="bfloat16"), False) != before
    handle = module.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnidentifiedError, match="module transformer.h.0 has the hook"):
        context(model, False)
    handle.remove()
    assert context(model, False) == before


class Holder:
    def __call__(self, live: torch.Tensor) -> torch.Tensor:
        return live

    def method(self, live: torch.Tensor) -> torch.Tensor:
        return live


def _counting() -> Callable[[torch.Tensor], torch.Tensor]:
    count = 0

    def function(live: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return live * count

    return function


def _listing() -> Callable[[torch.Tensor], torch.Tensor]:
    chosen = [1, 2]
    return lambda live: live * chosen[0]


def _drawing() -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator()
    return lambda live: live * float(generator.initial_seed())


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_counting(), "changes count, which stands outside it"),
        (_listing(), "holds a list, which may change"),
        (_drawing(), "holds a Generator, which may change"),
        (lambda live: live + torch.randn_like(live), "draws random numbers (randn_like)"),
        (torch.rand_like, "draws random numbers (rand_like)"),
        (lambda live: live * random.random(), "draws random numbers (random)"),
        (lambda live: live * float(os.environ["X"]), "reads from outside (environ)"),
        (Holder(), "is an object of the class Holder"),
        (Holder().method, "is an object of the class Holder"),
        (lambda live: live * Holder.x, "uses the class Holder"),
        (lambda live: live + tiny_models.WIDTH, "contents may change"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_identified_is_refused(function: Any, why: str) -> None:
    with pytest.raises(UnidentifiedError) as error:
        Identities().of(function)
    assert why in str(error.value)


import tiny_models  # noqa: E402 (a module of ours, which a function above uses)


def test_what_can_be_identified() -> None:
    who = Identities()
    recursive = lambda n: 1 if n < 1 else n * recursive(n - 1)  # noqa: E731  # its own name is what it closes over
    given = [None, 1, 1.0, True, "1", b"1", (1,), ((1,),), slice(1), range(1), np.float32(1), np.ones(1), torch.ones(1)]
    given += [torch.ones(1, dtype=torch.bfloat16), np.sin, np.cos, math.sin, operator.mul, torch.float32, "int:1", 1j]
    given += [
        recursive,
        torch.nn.functional.normalize,
        functools.partial(scaled),
        frozenset({"a", "b"}),
        torch.ones(1, 1),
    ]
    found = [who.of(value) for value in given]
    assert len(set(found)) == len(found), "all different"
    assert found == [Identities().of(value) for value in given]


def test_rows_that_are_not_kept_are_said(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    seen: list[int] = []

    def counted(live: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return live * 0

    def record() -> tp.Patching:
        with tp.patching(gpt2, pairs, batch_size=3, directory=folder) as p:
            heads(p)
            with p.row(name="counted"):
                p.corrupted.mlp_out[2, -1] = counted
        return p

    p = record()
    note = "  not stored   3 rows, measured anew each time: test_rows_that_are_not_kept_are_said.<locals>.counted holds a list"
    assert note in p.plan.explain()
    p.run()
    seen.clear()
    again = record()
    assert again.plan.measured["stored"] == 24
    again.run()
    assert seen, "measured again"


# ------------------------------------------------------------------------------------------------ partial results


def test_partial_results(gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    wanted = recorded(gpt2, pairs).run()
    p = recorded(gpt2, pairs)
    nothing = p.partial()
    assert (nothing["status"] == tp.Status.PENDING).all()
    assert nothing["effect"].isnull().all()
    assert nothing.attrs["pairs_too_close"] == "[]"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(3, patch)
        p.run()
    with modules_called() as count:
        part = p.partial()
    assert count == [0]
    done = part["status"] == tp.Status.MEASURED
    assert done.sum() == 9
    assert ((part["status"] == tp.Status.PENDING) == ~done).all()
    for name in ("effect", "value", "normalized"):
        assert np.array_equal(part[name].where(done), wanted[name].where(done), equal_nan=True)
        assert part[name].where(~done).isnull().all()
    assert part["clean"].equals(wanted["clean"])
    assert part["status"].attrs["flag_meanings"] == "absent measured proved_zero pending estimated"
    assert part.attrs["checks"] == "not run: the result is partial"
    opened = tp.open_result(tp.save_result(part, tmp_path / "part.nc"))
    assert opened.identical(part)
    mean = tp.over_pairs(opened)
    assert set(np.unique(mean["status"])) == {tp.Status.MEASURED, tp.Status.PENDING}
    figure = tp.plots.heatmap(part)
    assert "not measured yet" in [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert {c.get_gid() for c in figure.axes[0].collections} == {None, "pending"}
    tp.plots.bars(part.isel(layer=0))
    assert same(p.partial(), part)
    assert same(p.run(), recorded(gpt2, pairs).run())
    assert same(p.partial(), recorded(gpt2, pairs).run()), "the whole"


def test_proved_cells_wait_for_their_baseline(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs, form="flat") as p:  # in the others worlds and rows share a run
        with p.row(pos=0):
            p.corrupted.resid_pre[1, 0] = p.clean.resid_pre[1, 0]
        with p.row(pos=9):
            p.corrupted.resid_pre[1, 9] = p.clean.resid_pre[1, 9]
    assert (p.partial()["status"] == tp.Status.PENDING).all()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(self: Any, step: Any, known: Any) -> Any:
            return _raise(KeyboardInterrupt()) if step.batch else whole(self, step, known)

        patch.setattr("tracepatch.steps.Here._taken", interrupted)
        p.run()
    assert p.partial()["status"].values.tolist() == [[2, 3]] * 3


def _raise(error: BaseException) -> None:
    raise error


def test_another_process_may_look(gpt2: Any, pairs: tp.Pairs, folder: Path) -> None:
    p, watching = recorded(gpt2, pairs, directory=folder), recorded(gpt2, pairs, directory=folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        p.run()
    assert (watching.partial()["status"] == tp.Status.MEASURED).sum() == 6
    assert "6 rows of earlier runs" in watching.plan.explain()
    p.run()
    assert (watching.partial()["status"] == tp.Status.MEASURED).all()


def test_an_error_loses_nothing(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs, batch_size=3, form="flat") as p:  # those that save come last in the others
        heads(p)
        with p.row(layer=2, head=0):
            p.corrupted.z[2, -1, 0] = 3e38
    with pytest.raises(MeasurementError, match="NaN") as error:
        p.run()
    assert "24 of 27 rows are measured and kept while this process lives" in error.value.__notes__[0]
    assert (p.partial()["status"] == tp.Status.MEASURED).sum() == 24


def test_a_changed_model_does_not_continue(pairs: tp.Pairs) -> None:
    model = tp.toys.load("gpt2")
    p = recorded(model, pairs)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(6, patch)
        p.run()
    with torch.no_grad():
        module_of(model).transformer.h[2].mlp.c_proj.weight[3, 5] += 1
    assert same(p.run(), recorded(model, pairs).run())


def test_warnings_of_checks_come_each_time(
    gpt2: Any, pairs: tp.Pairs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "edited", lambda x, writes, known: x.clone() if writes else x)
    for _ in range(2):
        with pytest.warns(MeasurementWarning, match="The patches change nothing") as found:
            recorded(gpt2, pairs, directory=folder).run()
        assert found[0].filename == __file__


# ------------------------------------------------------------------------------------------------ progress


def test_pace() -> None:
    assert pace(0, 1200, 0.0) == "0/1,200 rows · 0:00:00 so far"
    assert pace(300, 1200, 10.0) == "300/1,200 rows · 30 rows/s · 0:00:30 left · 0:00:10 so far"
    assert pace(5, 10, 20.0) == "5/10 rows · 0.25 rows/s · 0:00:20 left · 0:00:20 so far"
    told = "what was stored counts at once, and not for the rate"
    assert pace(1100, 1200, 10.0, 1000) == "1,100/1,200 rows · 10 rows/s · 0:00:10 left · 0:00:10 so far", told


def test_the_bar_is_quiet_where_nobody_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bar(10, "toy") as told:
        told.advance(3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with bar(10, "toy", True, stored=4) as told:
        told.advance(3)
        told.say("queued, 3 s")
    said, complained = capsys.readouterr()
    assert said == ""
    assert "7/10 rows" in complained
    assert "toy: queued, 3 s" in complained


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text('''"""Mine."""
import tracepatch as tp
from tracepatch.recipes.ioi import prompts

@tp.recipe
def ends(p):
    """Ablate attention at the end."""
    for layer in p.grid("attn_out", by="layer"):
        with p.row(layer=layer):
            p.clean.attn_out[layer, -1] = 0
''')
    monkeypatch.chdir(tmp_path)

    def call(*more: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, ["run", "mine.py", "--model", "toy:gpt2", *more], catch_exceptions=False)
        assert done.exit_code == status, done.output
        return done.stderr

    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        assert call(status=130) == "Interrupted. To keep what is finished, pass --directory.\n"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        told = call("--directory", "kept", status=130)
    assert told.startswith("Interrupted. 24 of 24 rows are measured and kept in kept: the same call continues there")
    call("--directory", "kept")
    files = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "kept").iterdir()}
    assert len(files) == 3, "the worlds, a batch, the checks"
    with pytest.MonkeyPatch.context() as patch:
        told = ran(patch)
        call("--directory", "kept")
    assert told == []
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "kept").iterdir()} == files
    with pytest.raises(RecipeError, match="mine.py is a file. Pass a folder"):
        call("--directory", "mine.py")
