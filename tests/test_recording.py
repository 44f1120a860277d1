"""Recording works wherever Python runs, and says what the code says."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap

import tracepatch as tp


def test_the_code_is_what_is_recorded(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with p.row(name="joint"):
        p.corrupted.z[1, :, 3] = p.clean.z[1, :, 3]
        p.corrupted.z[2, -1, 0] = 0
        p.corrupted.mlp_out[0, [2, 5]] += p.clean.mlp_out[0, [2, 5]] - p.corrupted.mlp_out[0, [2, 5]]
        p.corrupted.resid_post[1, 2:5] = 2 * p.clean.resid_post[1, 2:5] - p.corrupted.resid_post[1, 2:5] / 4 + 1
        p.corrupted.attn_out[0, -1] -= p.clean.attn_out[0, -1]
    assert str(p.rows[0]) == (
        "row(name='joint'): corrupted.z[1, :, 3] = clean.z[1, :, 3]; corrupted.z[2, -1, 0] = 0; "
        "corrupted.mlp_out[0, [2, 5]] += clean.mlp_out[0, [2, 5]] - corrupted.mlp_out[0, [2, 5]]; "
        "corrupted.resid_post[1, 2:5] = 2·clean.resid_post[1, 2:5] + -0.25·corrupted.resid_post[1, 2:5] + 1; "
        "corrupted.attn_out[0, -1] += -1·clean.attn_out[0, -1]"
    )


def test_masks_arrays_and_tensors_index_alike(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    mask = [i in (2, 5) for i in range(14)]
    for i, index in enumerate(
        (
            [2, 5],
            (2, 5),
            np.array([2, 5]),
            torch.tensor([2, 5]),
            range(2, 6, 3),
            mask,
            np.array(mask),
            torch.tensor(mask),
            slice(2, 6, 3),
        )
    ):
        with p.row(i=i):
            p.corrupted.resid_pre[1, index] = p.clean.resid_pre[1, index]
    with p.row(i=99):
        p.corrupted.resid_pre[np.int64(1), np.int64(-9)] = 0
    with tp.patching(gpt2, pairs) as q:
        q.rows = p.rows
    result = q.run()["value"]
    assert (result.isel(i=slice(0, 9)) == result.isel(i=0)).all()


CODE = """
import tracepatch as tp
from tracepatch.toys import tasks

model = tp.toys.load("gpt2")
d = tasks.ioi(2, templates=tasks.TEMPLATES[:1])
pairs = tp.Pairs(d.clean, d.corrupted, d.answer, d.wrong)

def record(p, layer, head):
    with p.row(layer=layer, head=head):
        p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]

with tp.patching(model, pairs) as p:
    [record(p, layer, head) for layer, head in p.grid("z", by=("layer", "head"))]

value = float(p.run()["effect"].sum())
"""


def in_exec() -> float:
    scope: dict[str, Any] = {}
    exec(CODE, scope)
    return float(scope["value"])


def in_a_function() -> float:
    scope: dict[str, Any] = {}
    exec("def f():\n" + textwrap.indent(CODE, "    ") + "\n    return value", scope)
    return float(scope["f"]())


def in_a_repl() -> float:
    done = subprocess.run(
        [sys.executable, "-i", "-q", "-W", "error"],
        input=CODE.replace("\n\ndef", "\ndef").replace("head]\n\nwith", "head]\n\n\nwith")
        + "\nprint('value', value)\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return float(done.stdout.rsplit("value", 1)[1])


def on_the_command_line() -> float:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE + "\nprint('value', value)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return float(done.stdout.rsplit("value", 1)[1])


def in_a_notebook_cell() -> float:
    """IPython compiles each cell under a name of its own, with its source kept only in linecache."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CODE, "<ipython-input-1-abc>", "exec"), scope)
    return float(scope["value"])


@pytest.mark.parametrize("place", [in_a_function, in_a_repl, on_the_command_line, in_a_notebook_cell])
def test_it_works_wherever_python_runs(place: Any) -> None:
    assert place() == pytest.approx(in_exec(), rel=1e-6)


@tp.recipe
def head_outputs(p: tp.Patching, component: str = "z") -> None:
    """Denoise each head's output, all positions at once."""
    for layer, head in p.grid(component, by=("layer", "head")):
        with p.row(layer=layer, head=head):
            getattr(p.corrupted, component)[layer, :, head] = getattr(p.clean, component)[layer, :, head]


def test_a_recipe_runs_on_any_model() -> None:
    results = [head_outputs(toy(name), ioi_pairs(2)) for name in ("gpt2", "llama")]
    both = tp.concat(results)
    assert both.sizes == {"model": 2, "pair": 2, "layer": 3, "head": 4}
    assert np.isnan(both["effect"].sel(model="toy-llama", layer=2)).all(), "the llama toy has two layers"
    assert (both["status"].sel(model="toy-llama", layer=2) == tp.Status.ABSENT).all()
    assert repr(head_outputs) == "<recipe head_outputs: Denoise each head's output, all positions at once.>"
    assert head_outputs.__doc__ == "Denoise each head's output, all positions at once."


def test_recipes_take_arguments_plan_and_combine(gpt2: Any, pairs: tp.Pairs) -> None:
    plan = head_outputs.plan(gpt2, pairs, component="head_out", batch_size=2)
    assert plan.jobs == 12 * len(pairs)
    with tp.patching(gpt2, pairs) as p:
        head_outputs(p)
        with p.row(name="all of the last layer"):
            p.corrupted.z[-1, :, :] = p.clean.z[-1, :, :]
    tree = p.run()
    assert list(tree.children) == ["layer_head", "name"]
    np.testing.assert_array_equal(tree["layer_head"]["value"], head_outputs(gpt2, pairs)["value"])


def test_both_directions_are_what_the_code_says(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="denoising"):
            p.corrupted.attn_out[2, -1] = p.clean.attn_out[2, -1]
        with p.row(name="noising"):
            p.clean.attn_out[2, -1] = p.corrupted.attn_out[2, -1]
    result = p.run()
    assert result.attrs["base"] == "clean and corrupted"
    np.testing.assert_array_equal(result["base"].sel(name="denoising"), result["corrupted"])
    np.testing.assert_array_equal(result["base"].sel(name="noising"), result["clean"])
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    np.testing.assert_allclose(result["value"].values.T, slow.score(p.rows, gap(p.encoded)), atol=1e-4)


def test_a_bar_where_somebody_watches(gpt2: Any, pairs: tp.Pairs, capsys: pytest.CaptureFixture[str]) -> None:
    with tp.patching(gpt2, pairs, batch_size=2) as p, p.row(name="x"):
        p.clean.z[0, :, 0] = 0
    quiet = p.run()
    assert capsys.readouterr() == ("", "")
    assert (p.run(progress=True)["value"] == quiet["value"]).all()
    assert capsys.readouterr().out == "", "the bar is on stderr"


def test_a_tensor_is_broadcast_as_arrays_are(gpt2: Any, pairs: tp.Pairs) -> None:
    """Numbers, vectors, and one entry a position or a head, each against the oracle."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with tp.patching(gpt2, pairs, batch_size=4) as p:
        for i, (pos, unit, shape) in enumerate(
            [
                (-1, 2, (16,)), (-1, slice(None), (4, 16)), (-1, [0, 2], (2, 1)), (slice(None), 1, (14, 16)), (slice(None), 1, (16,)),
                ([3, 9], [0, 1], (2, 2, 16)), ([3, 9], [0, 1], (2, 1, 1)), (slice(9, None), slice(None), (5, 4, 16)), (slice(9, None), slice(None), ()),
            ]
        ):  # fmt: skip
            with p.row(i=i):
                p.corrupted.z[1, pos, unit] = noise(*shape)
            with p.row(i=i + 0.1):
                p.corrupted.head_out[1, pos, unit] += noise(*shape[:-1], 64 if shape and shape[-1] == 16 else 1)
            with p.row(i=i + 0.2):
                p.corrupted.mlp_act[0, pos, unit] = noise(*(256 if n == 4 else n for n in shape[:-1]))
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    np.testing.assert_allclose(p.run()["value"].values.T, slow.score(p.rows, gap(p.encoded)), atol=2e-4)


def test_values_move_between_places(gpt2: Any, pairs: tp.Pairs) -> None:
    """From another position, layer, head or component of the same width."""
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="position"):
            p.corrupted.resid_pre[1, -1] = p.clean.resid_pre[1, 3]
        with p.row(name="one position everywhere"):
            p.corrupted.resid_pre[1, 8:] = p.clean.resid_pre[1, 3]
        with p.row(name="layer"):
            p.corrupted.resid_pre[2, :] = p.corrupted.resid_pre[0, :]
        with p.row(name="head"):
            p.corrupted.z[1, :, 0] = p.clean.z[2, :, 3]
        with p.row(name="heads reversed"):
            p.corrupted.z[1, :, :] = p.corrupted.z[1, :, [3, 2, 1, 0]]
        with p.row(name="component"):
            p.corrupted.attn_out[2, -1] = p.clean.mlp_out[2, -1] + p.clean.head_out[2, -1, 1]
        with p.row(name="one vector to all heads"):
            p.corrupted.head_out[2, -1, :] += p.clean.attn_out[0, -1] / 4
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    np.testing.assert_allclose(p.run()["value"].values.T, slow.score(p.rows, gap(p.encoded)), atol=2e-4)
