"""What a run says about itself, and that each of its checks finds what it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ioi_pairs
from slow import made_up_pairs
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors, forms, lowering, program, trace, traced, writing
from tracepatch.architecture import architecture_of

WORDS = [f"w{i}" for i in range(30, 60)]
NUMBER = r"\d(\.\d+|e-\d+)?"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of its own, already probed, to be spoilt before its forms are tried."""
    monkeypatch.setattr(forms, "_KNOWN", {})
    model = tp.load(build("gpt2", layers=3), tokenizer())
    architecture_of(model)
    return model


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all ids that are traced."""
    shapes: list[tuple[int, ...]] = []
    forward = trace.forward

    def counted(model: Any, run: tuple[Any, ...], known: dict[Any, Any]) -> Any:
        shapes.append(tuple(run[0]["input_ids"].shape))
        return forward(model, run, known)

    monkeypatch.setattr(program, "forward", counted)
    return shapes


def shifted(by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The layout of a batch with the rows of every write changed."""
    plain = traced.columns

    def columns(*given: Any) -> Any:
        found = plain(*given)
        return {
            key: tuple((add, (by(cells[0]), *cells[1:]), *rest) for add, cells, *rest in value)
            for key, value in found.items()
        }

    return columns


class Shortened(torch.nn.ModuleList):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[:2])


class Looped(torch.nn.ModuleList):
    def __iter__(self) -> Iterator[Any]:
        first, *rest = super().__iter__()
        return iter([first, first, *rest])


def test_one_line_says_what_was_checked(gpt2: Any, tmp_path: Path) -> None:
    result = tp.patch(gpt2, ioi_pairs(2), "resid_pre", [tp.logit_diff, tp.kl], batch_size=5)
    line = result.attrs["checks"]
    amounts = f"{NUMBER} logits, {NUMBER} nats"
    assert re.fullmatch(
        rf"eager attention differs by {NUMBER}; witnesses drift by {amounts}; "
        rf"row (\d+) \(layer=\d, pos=\d+\) of pair (\d) alone gives the same to {amounts}; "
        rf"row \d+ \(layer=\d, pos=\d+\) of pair \d, proved zero, is its base to {amounts}; "
        r"all 22 edits fired; 0 rows unchanged",
        line,
    )
    assert result.attrs["plan"].endswith(f"\n  checks       {line}")
    again = tp.open_result(tp.save_result(result, tmp_path / "x.nc"))
    assert again.attrs["checks"] == line
    repeated = tp.patch(gpt2, ioi_pairs(2), "resid_pre", [tp.logit_diff, tp.kl], batch_size=5).attrs["checks"]
    assert re.findall(r"row \d+", repeated) == re.findall(r"row \d+", line), "the same row is chosen again"


def test_the_checks_cost_one_small_forward(gpt2: Any, forwards: list[tuple[int, ...]]) -> None:
    length = 14
    tp.patch(gpt2, ioi_pairs(3), "resid_pre", checks=False, form="flat")
    assert forwards == [(6, length), (34, length)]
    forwards.clear()
    tp.patch(gpt2, ioi_pairs(3), "resid_pre", form="flat")
    assert forwards == [(6, length), (34, length), (2, length)], "a measured row and one proved to be zero"
    forwards.clear()
    tp.patch(gpt2, ioi_pairs(3), "resid_pre")
    whole, own = length, 5  # the corrupted prompts bring their tokens from the first that differs on
    assert forwards == [(3 * (whole + own), 1), (2, length)], "tokens of the worlds alone enter a table"


def test_checks_are_turned_off_everywhere(gpt2: Any) -> None:
    @tp.recipe
    def one(p: tp.Patching, layer: int) -> None:
        with p.row():
            p.corrupted.z[layer, :, 0] = 0

    pairs = ioi_pairs(1)
    with tp.patching(gpt2, pairs, checks=False) as p:
        one(p, layer=0)
    found = (p.run(), tp.patch(gpt2, pairs, "z", checks=False), one(gpt2, pairs, layer=1, checks=False))
    assert {result.attrs["checks"] for result in found} == {"off"}
    assert found[0].attrs["plan"].endswith("\n  checks       off")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(dtype: str) -> None:
    for name in tp.toys.NAMES:
        tp.patch(tp.toys.load(name, dtype=dtype), ioi_pairs(2), ["resid_pre", "attn_out"], batch_size=7)


# ---------------------------------------------------------------------------------------------- edits that never fired


def test_a_layer_that_the_model_leaves_out(tiny: Any) -> None:
    tiny._module.transformer.h.__class__ = Shortened
    for component in ("resid_post", "mlp_out", "z", "q"):
        wanted = r"transformer\.h\.2\S* did not run when its turn came.*unpatched runs.*leaves it out"
        with pytest.raises(errors.MeasurementError, match=re.compile(wanted, re.S)):
            tp.patch(tiny, made_up_pairs(WORDS), component, only={"layer": [2]})
    with pytest.raises(errors.MeasurementError, match=r"did not run(.|\n)*pair 0, row\(layer=2, head=0\): clean\.z"):
        tp.patch(tiny, made_up_pairs(WORDS), "z", only={"layer": [2]}, source=0, direction="noising")
    tp.patch(tiny, made_up_pairs(WORDS), "z", only={"layer": [1]})


@pytest.mark.parametrize("component", ["resid_post", "z", "q", "head_out"])
def test_a_layer_that_runs_twice(tiny: Any, component: str) -> None:
    tiny._module.transformer.h.__class__ = Looped
    with pytest.raises(errors.MeasurementError, match=r"only the first time(.|\n)*transformer\.h\.0\S*: 2 times"):
        tp.patch(tiny, made_up_pairs(WORDS), component, only={"layer": [0]})
    tp.patch(tiny, made_up_pairs(WORDS), "mlp_out", only={"layer": [2]})


def test_a_module_that_sees_other_rows(tiny: Any) -> None:
    mlp = tiny._module.transformer.h[1].mlp
    mlp.forward = lambda x: mlp.c_proj(torch.cat([mlp.act(mlp.c_fc(x))] * 2))[: len(x)]
    with pytest.raises(
        errors.MeasurementError, match="mlp_out of layer 1: it was computed for 22 rows of 11, so that they were mixed"
    ):
        tp.patch(tiny, made_up_pairs(WORDS), "mlp_out", only={"layer": [1]}, form="flat")
    tp.patch(tiny, made_up_pairs(WORDS), "mlp_out", only={"layer": [1]}, form="flat", checks=False)


def test_an_edit_that_is_lost(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = traced.columns

    def without(*given: Any) -> Any:
        return {key: value for key, value in plain(*given).items() if key != ("z", 1)}

    monkeypatch.setattr(traced, "columns", without)
    with pytest.raises(errors.MeasurementError) as error:
        tp.patch(gpt2, ioi_pairs(1), "z", by="layer")
    assert str(error.value) == (
        "Edits never fired.\n"
        "z of layer 1: 0 of 5 cells were written, for\n"
        "  pair 0, row(layer=1): corrupted.z[1, :, :] = clean.z[1, :, :]\n"
        "Such rows look like patches without effect, so nothing of this run is kept. Patch another component or layer; if "
        "the model computes this one in every forward, report it."
    )


def test_failures_inside_a_trace_are_words(tiny: Any) -> None:
    calls: list[int] = []

    def late(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) > 5:
            raise ValueError("too late")
        return logits[:, 0]

    with pytest.raises(
        errors.MeasurementError, match=r"rows? failed: ValueError: too late\n  pair \d, row\(layer=\d, head"
    ):
        tp.patch(tiny, made_up_pairs(WORDS), "z", late)

    def full(module: Any, given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    tiny._module.transformer.h[1].register_forward_pre_hook(full)
    with pytest.raises(
        errors.MeasurementError, match="not enough memory for a traced run of 1 row: no room(.|\n)*batch_size="
    ):
        tp.patch(tiny, made_up_pairs(WORDS), "z", form="flat")


# ------------------------------------------------------------------------------------------------- numbers that differ


def test_a_row_that_gets_its_neighbours_patch(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 12
    monkeypatch.setattr(traced, "columns", shifted(lambda r: r if not r.max() else (r % rows) + 1))
    with pytest.raises(errors.MeasurementError) as error:
        tp.patch(gpt2, ioi_pairs(1), "z", form="flat")
    said = str(error.value)
    assert re.match(r"Pair 0, row\(layer=\d, head=\d\): corrupted\.z\[.*\] gives logit_diff\S* = \S+ where it is", said)
    assert "in its batch; rounding in float32 explains 0.00" in said
    assert "measure with batch_size=1" in said
    tp.patch(gpt2, ioi_pairs(1), "z", checks=False, form="flat")


def test_a_row_that_was_pruned_in_error(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering.Profile, "first", property(lambda self: self.alignment.clean.length))
    with pytest.raises(errors.MeasurementError, match=r"was proved to change nothing, but gives(.|\n)*prune=False"):
        tp.patch(gpt2, ioi_pairs(1), "z", by="layer")


def large(unit: str) -> tp.Metric:
    """A metric that sees how many rows there are, if they are more than a trial of it has."""
    return tp.metric(lambda logits: logits[:, 7] + (len(logits) > 8), name="large", unit=unit)


def test_noise_beyond_rounding(gpt2: Any) -> None:
    wanted = r"Unpatched rows of the patched runs drift by 1 logits .*; rounding in float32 explains 0\.000\d of large"
    with pytest.raises(errors.MeasurementError, match=wanted):
        tp.patch(gpt2, ioi_pairs(1), "z", large("logits"), form="flat")
    with pytest.warns(errors.MeasurementWarning, match="The metric may jump") as seen:
        tp.patch(gpt2, ioi_pairs(1), "z", large(""), form="flat")
    assert "drift by 1 from the same prompts run unpatched" in str(seen[0].message)
    assert "where it is measured alone" in str(seen[1].message)
    assert "witnesses drift by 1 rank" in tp.patch(gpt2, ioi_pairs(1), "z", large("rank"), form="flat").attrs["checks"]


def test_rows_that_depend_on_each_other(gpt2: Any) -> None:
    """In a table the witness depends on them too: a row that is measured alone tells."""
    with pytest.raises(errors.MeasurementError, match=r"gives large = \S+ where it is measured alone, and \S+ in its"):
        tp.patch(gpt2, ioi_pairs(8), "z", large("logits"))


# ----------------------------------------------------------------------------------------- patches that change nothing


def test_patches_that_change_nothing(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "edited", lambda x, writes, known: x.clone() if writes else x)
    with pytest.warns(errors.MeasurementWarning, match="The patches change nothing: all 24 rows") as seen:
        result = tp.patch(gpt2, ioi_pairs(2), "z")
    assert result.attrs["checks"].endswith("patches change nothing: all 24 rows unchanged")
    assert len(seen) == 1
    tp.patch(gpt2, ioi_pairs(2), "z", checks=False)


def test_rows_that_must_be_without_effect_do_not_count(gpt2: Any) -> None:
    """Self-patches and rows that pruning would have left out; only a row of which something was expected counts."""
    pairs = ioi_pairs(1)
    with tp.patching(gpt2, pairs, prune=False) as p:
        with p.row(name="own"):
            p.corrupted.z[0, :, 0] = p.corrupted.z[0, :, 0]
        with p.row(name="before"):
            p.corrupted.z[0, 0, 0] = p.clean.z[0, 0, 0]
        with p.row(name="after"):
            p.corrupted.mlp_out[-1, 0] = 0
    assert p.run().attrs["checks"].endswith("all 3 edits fired; 0 rows unchanged")
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="a query of position 0"):
            p.corrupted.q[0, 0, 0] = 0
        with p.row(name="another"):
            p.corrupted.q[0, -1, 0] = 0
    assert p.run().attrs["checks"].endswith("all 2 edits fired; 1 row unchanged")


def test_ranks_may_all_stay(gpt2: Any) -> None:
    """The best answer stays the best whatever is added to the end of a long way up."""
    with tp.patching(gpt2, ioi_pairs(1), tp.rank) as p, p.row():
        p.clean.mlp_out[0, -1] += 1e-9 * torch.ones(64)
    assert p.run().attrs["checks"].endswith("1 row unchanged")


def test_a_function_of_logits_nobody_reads(gpt2: Any) -> None:
    """Proved to be without effect, and measured unpruned all the same."""
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        with p.row(name="unread"):
            p.corrupted.logits[0] = lambda live: 0 * live
        with p.row(name="read"):
            p.corrupted.z[0, :, 0] = 0
    assert "proved zero, is its base" in p.run().attrs["checks"]
