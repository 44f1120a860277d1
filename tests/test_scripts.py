"""Rows as plain nnsight scripts: each is written to a file, imported and run, and must give the plan's number."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import made_up_pairs
from tiny_models import ALL, ENCODER_DECODER, build, tokenizer

import tracepatch as tp
from tracepatch import errors, literals, scripts, spelling
from tracepatch.architecture import architecture_of
from tracepatch.calls import Place
from tracepatch.models import module_of
from tracepatch.sites import SCALES
from tracepatch.sources import OTHER

# Multipliers, norms behind attention or only there, tuples, flat MLPs, grouped heads, experts, attention sinks.
TINY = ("gemma2", "gpt_oss", "opt", "granite")
MORE = ("gpt2", "llama", "gpt_neox", "olmo2", "bloom", "mixtral")


def run(text: str, file: Path, model: Any, **given: Any) -> tuple[float, torch.Tensor]:
    """What a script's ``patched`` returns. Each file has a name of its own, as the script's header asks for."""
    assert not file.exists()
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    value, logits = module.patched(model, **given)
    return value, logits


def values(p: tp.Patching, pair: int, metric: str | None = None) -> np.ndarray:
    """The plan's numbers, one a row; the rows are labelled ``number``."""
    found = p.run()["value"]
    return (found if metric is None else found.sel(metric=metric)).sel(pair=pair).values


def handed(p: tp.Patching, row: Any) -> dict[str, Any]:
    """What a script may ask to be passed, by name."""
    of_worlds = {
        f"{name}_{what}": getattr(w, what) for name, w in p.edited.items() for what in ("functions", "tensors")
    }
    return {"functions": row.functions, "tensors": row.tensors, **of_worlds}


def agree(p: tp.Patching, pair: int, folder: Path, shortest: bool = False, metric: str | None = None) -> float:
    """Runs every row's script; the largest difference between two rows' numbers says that there was something to see."""
    wanted = values(p, pair, metric)
    scale, attention = 1 + np.abs(wanted).max(), module_of(p.model).config._attn_implementation
    for row, number in zip(p.rows, wanted, strict=True):
        text = row.as_nnsight(pair, metric)
        assert "tracepatch" not in text.split("import torch\n")[1], "the code needs nothing of ours"
        assert {line for line in text.splitlines() if "import " in line and line[0] != "#"} == {
            "import nnsight",
            "import torch",
        }
        if shortest:
            assert text.count("\n") < 60, text
        file = folder / f"row_{row.number}_pair_{pair}_{row.base}_{metric}.py"
        given = {n: v for n, v in handed(p, row).items() if re.search(rf"[( ]{n}=", text)}
        if "metric=" in text:
            given["metric"] = p.metrics[[m.name for m in p.metrics].index(metric) if metric else 0]
        found, logits = run(text, file, p.model, **given)
        assert module_of(p.model).config._attn_implementation == attention, "what was switched is put back"
        root = p.edited[row.base].root if row.base in p.edited else row.base
        assert logits.shape == (len(p.encoded.world(root)[pair]), p.architecture.vocab)
        assert abs(found - number) < 1e-5 * scale, f"{row}: {found} instead of {number}\n{text}"
    return float(np.ptp(wanted))


def sites_of(p: tp.Patching, name: str) -> list[Any]:
    """Indices: all positions in its first layer, single and several ones in its last."""
    kind, found = tp.COMPONENTS[name], []
    layers = [n for n in range(len(p.architecture)) if p.architecture.offers(name, n)]
    for number, (pos, layer) in enumerate(((slice(None), layers[0]), (-1, layers[-1]), ([0, 4], layers[-1]))):
        units = p.architecture.units(name, layer)
        unit = (units - 1, [0, units - 1] if units > 1 else 0, slice(None))[number]
        if kind.attends:
            found.append((layer, unit, pos, (slice(None), slice(2, None), [0, 3])[number]))
        else:
            found.append((*((layer,) if kind.layered else ()), pos, *((unit,) if kind.unit else ())))
    return found


def record(p: tp.Patching, name: str, base: str, thin: bool) -> None:
    """Rows that set, add and zero a component at its sites; thinned out, one of each."""
    live, other = getattr(getattr(p, base), name), getattr(getattr(p, OTHER[base]), name)
    for number, site in enumerate(sites_of(p, name)):
        if number == 0 or not thin:
            with p.row(number=3 * number):
                live[site] = other[site]
        if number == 1 or not thin:
            with p.row(number=3 * number + 1):
                live[site] += 0.5 * other[site] - 0.5 * live[site]
        if number == 2 or not thin:
            with p.row(number=3 * number + 2):
                live[site] = 2 if name in SCALES else 0


def every_component(
    model: Any, pairs: tp.Pairs, base: str, pair: int, folder: Path, thin: bool = False
) -> tuple[list[str], list[str]]:
    """The scripts of all components that are offered, against the plan; returns those, and which moved the metric."""
    found = architecture_of(model)
    offered = [n for n in tp.COMPONENTS if any(found.offers(n, i) for i in range(2))]
    moved = []
    for name in offered:
        # Whole prompts, as a script has: what a norm makes of a stream set to 0 is rounding alone.
        with tp.patching(model, pairs, form="flat") as p:
            record(p, name, base, thin)
        (folder / name).mkdir()
        if agree(p, pair, folder / name, shortest=True) > 1e-4:
            moved.append(name)
    return offered, moved


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_every_component_of_the_toys(name: str, tmp_path: Path) -> None:
    offered, moved = every_component(toy(name), ioi_pairs(2), ("corrupted", "clean")[name > "gpt2"], 1, tmp_path, True)
    assert moved == offered
    assert len(offered) >= 23


@pytest.mark.slow
@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_every_component_of_the_toys_in_both_directions(name: str, base: str, tmp_path: Path) -> None:
    offered, moved = every_component(toy(name), ioi_pairs(2), base, 0, tmp_path)
    assert moved == offered


@pytest.mark.parametrize(
    "model_type", [t if t in TINY else pytest.param(t, marks=pytest.mark.slow) for t in (*TINY, *MORE)]
)
def test_every_component_of_other_architectures(model_type: str, tmp_path: Path) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    base = ("corrupted", "clean")[model_type == "gpt_oss"]
    pairs = made_up_pairs([f"w{i}" for i in range(30, 60)])
    _, moved = every_component(model, pairs, base, 0 if base == "corrupted" else 2, tmp_path, model_type in TINY)
    assert len(moved) >= 15, moved


@pytest.mark.slow
@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", [t for t in ALL if t not in ENCODER_DECODER])
def test_every_component_of_all_decoders(model_type: str, base: str, tmp_path: Path) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    offered, moved = every_component(model, made_up_pairs([f"w{i}" for i in range(30, 60)]), base, 2, tmp_path)
    assert offered
    assert moved


def test_every_component_has_words() -> None:
    assert set(spelling.STOPS) == set(tp.COMPONENTS)


def test_an_encoder_reads_in_a_script_too(tmp_path: Path) -> None:
    model = tp.load(build("t5", layers=2), tokenizer())
    pairs = tp.Pairs(["w30 w31 w32"], ["w30 w41 w32 w33"], ["w35"], ["w40"], decoder=["w5 w6"])
    for base in ("corrupted", "clean"):
        (tmp_path / base).mkdir()
        with tp.patching(model, pairs) as p:
            live, other = getattr(p, base), getattr(p, OTHER[base])
            for i, name in enumerate(("cross_attn_out", "resid_pre", "z")):
                with p.row(number=i):
                    getattr(live, name)[1, :] = getattr(other, name)[1, :]
        assert agree(p, 0, tmp_path / base) > 1e-4


@pytest.mark.parametrize(
    ("model_type", "base"),
    [
        ("gpt2", "corrupted"),
        ("gemma2", "clean"),
        *(pytest.param(t, b, marks=pytest.mark.slow) for t in ("granite", "mixtral", "opt") for b in OTHER),
    ],
)
def test_many_edits_in_one_row(model_type: str, base: str, tmp_path: Path) -> None:
    """Every component at once, written in the wrong order; several edits at one place, of which later ones see earlier."""
    model = tp.load(build(model_type, layers=3), tokenizer())
    with tp.patching(model, made_up_pairs([f"w{i}" for i in range(30, 60)])) as p:
        mine, other = getattr(p, base), getattr(p, OTHER[base])
        found = [n for n in tp.COMPONENTS if p.architecture.offers(n, 1) and n != "attn_out_scale"]
        with p.row(number=0):
            for name in reversed(found):
                late = (slice(None), slice(2, None)) if tp.COMPONENTS[name].attends else (slice(2, None),)
                site = (1, *late) if tp.COMPONENTS[name].layered else late
                getattr(mine, name)[site] += 0.3 * getattr(other, name)[site]
        with p.row(number=1):
            mine.resid_pre[2, 4] += 0.5 * other.resid_pre[2, 4]  # the same place as resid_post[1]
            mine.resid_post[1, 4] = 2 * other.resid_post[1, 4]
            mine.resid_pre[2, 4:] += 0.25
        with p.row(number=2):
            mine.head_out[1, 3:, 2] = other.head_out[1, 3:, 2]
            mine.head_out[1, -1, [2, 3]] += 0.5
            mine.z[1, :, 2] = 0
            mine.attn_out[1, -1] += other.head_out[1, -1, 0]
        with p.row(number=3):
            mine.resid_mid[1, -1] = other.resid_mid[1, -1]
            mine.resid_pre[1, 5] = 0
            mine.head_out[1, -1] = 0
        with p.row(number=4):
            mine.v[1, 1:3, 0] = other.v[2, 1:3, 1]
            mine.k[1, 1:3, 0] = other.k[2, 1:3, 1]
            mine.q[1, 1:, 0] = 2 * other.q[2, 1:, 1]
            mine.logits[-1] = 3 * mine.logits[-1] - other.logits[0]
    assert agree(p, 2, tmp_path) > 1e-3


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_readers_and_weights_do_beside_each_other(model_type: str, tmp_path: Path) -> None:
    """Streams of heads, some shared; scales of norms that they go through; masks, sums of weights, other layers."""
    model = tp.load(build(model_type, layers=2), tokenizer())
    with tp.patching(model, made_up_pairs([f"w{i}" for i in range(30, 60)])) as p:
        mine, other = p.corrupted, p.clean
        last = p.architecture.units("v_in", 1) - 1
        with p.row(number=0):  # heads 0 and 3 read one stream, 1 another, and 2 its own; one row is enough in layer 0
            mine.q_in[1, 2:] = other.q_in[1, 2:]
            mine.q_in[1, 4, [1, 2]] += other.head_out[0, 4, [1, 2]] - mine.head_out[0, 4, [1, 2]]
            mine.k_in[1, 3:, 0] += 0.5 * other.attn_in[1, -1]
            mine.v_in[0, :, last] = other.resid_pre[1, :]
        with p.row(number=1):
            mine.attn_in[1, 2:] += other.mlp_out[0, 2:]
            mine.v_in[1, 3:, last] = 0
            mine.q_in[1, -1, :] = other.k_in[1, -1, 0] - other.v_in[1, 4, [last]]
            mine.attn_in_scale[1, 4:] = other.attn_in_scale[1, 4:]
            mine.attn_in_scale[1, [3, 5]] += 0.5 * mine.attn_in_scale[1, [3, 5]]
            mine.attn_in_scale[1, :] = lambda live: live.flip(1)
        with p.row(number=2, renormalize=True):
            mine.pattern[1, [1, 3], [3, -1], [0, 2]] = torch.arange(1.0, 9).view(2, 2, 2) / 10
            mine.pattern[1, [1, 3], :, [0, 2]] += torch.tensor([[[0.5, 0.2]]])
            mine.pattern[1, 2, -1, :] = lambda live, clean, corrupted: clean + live.flip(1)
            mine.pattern[1, 0, 2:, 1:4] = other.pattern[0, 3, 2:, 1:4] + 0.1 * other.pattern[1, 0, [-1], [0]]
        with p.row(number=3):
            mine.scores[0, :] = 3
            mine.scores[0, :, :, :] = lambda live: live + torch.tensor(live.shape[-1]).sqrt()
            mine.scores[1, 2, -1, :5] = other.scores[1, 1, -1, [3]] + torch.arange(5.0)
            mine.scores[1, 3, -1, 2] += p.gaussian(0.5)
            mine.q[0, 3:, 1] = other.q[0, 3:, 1]
        with p.row(number=4):
            mine.mlp_in[1, 2:] = other.mlp_in[1, 2:]
            mine.mlp_in_scale[1, 3] = lambda live, clean, corrupted: (live + clean + corrupted) / 2
            mine.logits_in[:] += other.resid_pre[1, :]
            mine.logits_in_scale[-1] = 2 * other.logits_in_scale[0]
            mine.resid_post[1, -1] = mine.logits_in[0] + 0.5
        with p.row(number=5):
            mine.k_in[1, :, [0, last]] = lambda live, clean, corrupted: 0.5 * clean + live.flip(1, 2)
            mine.q_in[1, 3, [0, 2]] = torch.tensor([[1.0], [0.5]])
            mine.z[1, 3:, 1] = lambda live: 2 * live
        with p.row(number=6):  # a norm of nothing
            mine.embed[3] = 0
            mine.attn_in_scale[0, 4:] += 0.5
    assert agree(p, 2, tmp_path) > 1e-3
    assert ".repeat(5, 1)" in p.rows[0].as_nnsight(2)
    assert ".repeat" not in p.rows[4].as_nnsight(2)


def same(live: torch.Tensor) -> torch.Tensor:
    return 1.5 * live


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_rows_of_edited_worlds(name: str, tmp_path: Path) -> None:
    """As base and as source, one upon another; noise, functions and tensors of their own."""
    with tp.patching(toy(name), ioi_pairs(2)) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[2:5] += p.gaussian(0.5, seed=1)
        noised.z[0, -1, :] += 2 * p.gaussian(0.2) - p.clean.z[0, 3, :] + p.gaussian(0.1)
        off = p.world("off", of=p.corrupted)
        off.z[0, :, 1] = 0
        off.v_in[1, 3:, 0] = p.clean.v_in[1, 3:, 0]
        off.resid_mid[1, 3] += torch.linspace(-1, 1, p.architecture.d_model)
        off.mlp_out[0, :] = same
        both = p.world("both", of=off)
        both.attn_out[1, -1] = p.clean.attn_out[1, -1] - off.attn_out[1, -1]
        both.resid_pre[1, 3:] += p.gaussian(0.1) + noised.resid_pre[1, 3:]
        held = p.world("held", of=p.corrupted)
        held.freeze("pattern", "mlp_in_scale", at=noised, layers=[0])
        both.mlp_in[1, 2:] = lambda live, clean, corrupted: live + clean - corrupted
        with p.row(number=0):
            noised.resid_pre[1, 4] = p.clean.resid_pre[1, 4]
        with p.row(number=1):
            off.z[0, :, :] = p.clean.z[0, :, :]
            off.v_in[1, 4:, 0] += noised.attn_in[1, 4:]
            off.mlp_out[0, -1] = same
            off.mlp_out[1, :] += torch.linspace(-1, 1, p.architecture.d_model)
        with p.row(number=2):
            both.resid_pre[0, 4:7] = p.clean.resid_pre[0, 4:7]
        with p.row(number=3):
            p.clean.resid_post[1, :] = both.resid_post[1, :]
            p.clean.resid_pre[0, 2:5] += 0.5 * both.attn_out[0, 2:5]
        with p.row(number=4):
            held.z[1, :, 0] = held.z[1, :, 0] + off.z[0, :, 1]
        with p.row(number=5):
            both.logits[-1] = off.logits[-1] - noised.logits[-1]
        with p.row(number=6):
            p.corrupted.attn_in[1, :] = noised.attn_in[1, :]
            p.corrupted.scores[1, :, -1] = off.scores[1, :, -1]
            p.corrupted.mlp_in_scale[1, :] = both.mlp_in_scale[1, :]
    assert agree(p, 1, tmp_path) > 0.1
    text = p.rows[2].as_nnsight(1)
    assert "patched(model, both_functions=p.edited['both'].functions, off_functions=p.edited['off'].functions," in text
    assert "off is corrupted with z[0, :, 1] = 0" in text


def test_dims_line_up_as_in_a_recipe(gpt2: Any, tmp_path: Path) -> None:
    """Single positions and heads broadcast to several, whichever way they were written."""
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        mine, clean = p.corrupted, p.clean
        sums = [
            (mine.z, (1, slice(3, None), [1, 2]), clean.z[1, -1, 0]),
            (mine.z, (1, slice(3, None), [1, 2]), clean.z[1, 3:, 0]),
            (mine.z, (1, slice(3, None), [1, 2]), clean.z[1, [9], [0, 3]]),
            (mine.z, (1, [3, 9], [1, 3]), clean.z[1, [9, 3], [3, 1]]),
            (mine.z, (1, -1), clean.z[1, [9], [0]]),
            (mine.z, (1, [9], slice(None)), clean.z[1, 8]),
            (mine.z, (1, slice(None, None, 3), 2), clean.z[1, [0, 4, 2, 7, 1], [0]]),
            (mine.head_out, (1, slice(3, None)), clean.resid_pre[1, 3:] - mine.resid_pre[1, -1]),
            (mine.head_out, (1, slice(3, None), [0, 2]), clean.attn_out[1, [9]]),
            (mine.head_out, (1, -1, [0, 2]), clean.attn_out[1, -1] + 0.5 * clean.head_out[1, -1, [1, 3]]),
            (mine.resid_mid, (1, slice(8, None)), clean.head_out[1, 8:, 2] - clean.head_out[0, 9, [1]]),
            (mine.mlp_act, (1, slice(3, None)), clean.mlp_act[1, 3:, 7]),
            (mine.mlp_act, (1, slice(3, None), [1, 2]), clean.mlp_act[1, -1, 4] - clean.mlp_act[1, 3:, [1, 5]]),
            (mine.mlp_act, (1, -1, slice(4, 40, 4)), 0.1 - clean.mlp_act[1, -1, 5:14]),
            (mine.embed, (slice(3, None),), clean.resid_post[1, 3:]),
            (mine.logits, (-1,), -clean.logits[0]),
        ]  # fmt: skip
        for number, (live, site, source) in enumerate(sums):
            with p.row(number=2 * number):
                live[site] = source
            with p.row(number=2 * number + 1):
                live[site] += source
    assert agree(p, 0, tmp_path) > 1


def test_tensors_are_written_out_or_passed(gpt2: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ones = [torch.randn(*shape, generator=generator) for shape in ((64,), (14, 64), (4, 16), (2, 1, 16), (1, 4, 64))]
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        with p.row(number=0):
            p.corrupted.mlp_act[1, -1, [3, 5]] = torch.tensor([0.1, 20.0])
            p.corrupted.resid_pre[1, 9] = ones[0]
            p.corrupted.resid_pre[2, :] += ones[1]
        with p.row(number=1):
            p.corrupted.mlp_act[1, 8:, 3:5] = p.clean.mlp_act[1, 8:, 3:5] + np.array([[1.0, 2.0]] * 6)
        with p.row(number=2):
            p.corrupted.z[1, -1] = ones[2] - 2 * p.clean.z[1, -1]
        with p.row(number=3):
            p.corrupted.z[1, [3, 9], [0, 3]] = ones[3]
        with p.row(number=4):
            p.corrupted.head_out[1, [9], :] += ones[4] + 1
    assert agree(p, 1, tmp_path) > 0.1
    first, second = p.rows[0].as_nnsight(), p.rows[1].as_nnsight()
    assert "mlp_act.new_tensor([0.10000000149011612, 20])" in first
    assert "= tensors[1].to(resid_pre)" in first
    assert "+= tensors[2].to(resid_pre)" in first
    assert "patched(model, tensors=p.rows[0].tensors)" in first
    assert [t.shape for t in p.rows[0].tensors] == [(2,), (64,), (14, 64)]
    assert "tensors" in second, "twelve numbers are too many to be read"


def test_functions_are_passed(gpt2: Any, tmp_path: Path) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        with p.row(number=0):
            p.corrupted.z[1, :, 3] = lambda live: live - live.mean(1, keepdim=True)
        with p.row(number=1):
            p.corrupted.attn_out[0, 4:] = torch.zeros_like
            p.corrupted.head_out[1, -1, [0, 2]] += lambda live, clean, corrupted: clean - corrupted + 0.1 * live
            p.corrupted.mlp_out[1, [3, -1]] = lambda live, clean, corrupted: live.flip(1) + clean
        with p.row(number=2):
            p.corrupted.z[1, [3, -1], [1, 2]] = lambda live, clean, corrupted: clean.flip(1, 2)
    assert agree(p, 0, tmp_path) > 0.1
    assert "functions[1](head_out[:, 13, [0, 2]], clean_head_out_1[:, 13, [0, 2]]" in p.rows[1].as_nnsight()
    alone = tp.Pairs("When John and Mary went to the store, John gave the bag to", answer=" Mary", wrong=" John")
    with tp.patching(gpt2, alone) as p, p.row(number=0):
        p.clean.z[1, :, 0] = lambda live, clean, corrupted: clean * (0 if corrupted is None else 1)
    (tmp_path / "alone").mkdir()
    agree(p, 0, tmp_path / "alone")


def largest(logits: torch.Tensor) -> torch.Tensor:
    return logits.max(-1).values


def further(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    following = logits.log_softmax(-1).gather(-1, given["next"][..., None])[..., 0]
    return (following - given["corrupted"].max(-1).values).sum(1) + logits[:, 0].gather(-1, given["wrong"]).sum(-1)


@pytest.mark.parametrize("at", [None, 3, -2, [2, 5], slice(None)])
@pytest.mark.parametrize("answers", [1, 2])
def test_every_metric(answers: int, at: Any, tmp_path: Path) -> None:
    model = tp.load(build("gpt2", layers=2), tokenizer())
    words = made_up_pairs([f"w{i}" for i in range(30, 60)])
    right, wrong = ([[a, f"w{7 + i}"][:answers] for i, (a,) in enumerate(side)] for side in (words.answer, words.wrong))
    pairs = tp.Pairs(words.clean, words.corrupted, right, wrong)
    built_in: list[tp.Metric] = [tp.logit_diff, tp.logit, tp.prob, tp.log_prob, tp.rank, tp.kl]
    built_in += [tp.cross_entropy] if answers == 1 else []  # after the last token stands the answer
    mine: list[tp.Metric] = [
        tp.metric(largest),
        tp.metric(further, positions=[0, 3], needs=("next", "corrupted", "wrong")),
    ]
    metrics = [m if at is None else m.at(at) for m in built_in] + [
        m if at is None or i else m.at(at) for i, m in enumerate(mine)
    ]
    with tp.patching(model, pairs, metrics) as p, p.row(number=0):
        p.clean.resid_pre[0, :] = p.corrupted.resid_pre[1, :]
    for metric in metrics:
        agree(p, 2, tmp_path, metric=metric.name)
    assert f"metric=p.metrics[{len(built_in)}]" in p.rows[0].as_nnsight(metric="largest")
    with pytest.raises(errors.RecipeError, match="no metric 'loss' here; there is logit_diff, logit"):
        p.rows[0].as_nnsight(metric="loss")


def test_one_script_word_for_word(gpt2: Any) -> None:
    pairs = tp.Pairs(
        "When John and Mary went to the store, John gave the bag to",
        "When John and Mary went to the store, Mary gave the bag to",
        " Mary",
        " John",
    )
    with tp.patching(gpt2, pairs) as p, p.row(layer=1, head=3):
        p.corrupted.z[-2, -1, 3] = p.clean.z[1, -1, 3]
    assert p.rows[0].as_nnsight() == GOLDEN


GOLDEN = '''\
# Row 0 (layer=1, head=3) on pair 0 in plain nnsight. The model: toy-gpt2, layers 0 to 2.
#   corrupted.z[1, -1, 3] = clean.z[1, -1, 3]
# Save it as row_0_pair_0.py: nnsight reads a trace from its file, and a file once in a session. Then run
#   from row_0_pair_0 import patched
#   value, logits = patched(model)  # what tracepatch measures

import nnsight
import torch

# 'When John and Mary went to the store , John gave the bag to'
clean_tokens = torch.tensor([[4, 33, 5, 34, 6, 7, 8, 97, 9, 33, 10, 8, 105, 7]])
# 'When John and Mary went to the store , Mary gave the bag to'
corrupted_tokens = torch.tensor([[4, 33, 5, 34, 6, 7, 8, 97, 9, 34, 10, 8, 105, 7]])


def patched(model):
    """The logit_diff of the patched run, and its logits [pos, vocab]."""
    # The unpatched clean run. Values are cloned: a model may change in place what has passed by.
    with torch.no_grad(), model.trace(input_ids=clean_tokens, use_cache=False):
        clean_z_1 = nnsight.save(model.transformer.h[1].attn.c_proj.input.clone().unflatten(-1, (4, 16)))

    # The corrupted run, edited: each activation where it passes by, in the order of the forward.
    with torch.no_grad(), model.trace(input_ids=corrupted_tokens, use_cache=False):
        z = model.transformer.h[1].attn.c_proj.input.clone().unflatten(-1, (4, 16))  # [batch, pos, head, d_head]
        # z[1, -1, 3] = clean.z[1, -1, 3]: position 13 is 'to'
        z[0, 13, 3] = clean_z_1[0, 13, 3]
        model.transformer.h[1].attn.c_proj.input = z.flatten(-2)
        logits = nnsight.save(model.output.logits[0].clone())

    last = logits[-1].float()  # [vocab]
    value = last[34] - last[33]  # 34 is 'Mary', 33 is 'John'
    return value.item(), logits
'''


def test_before_the_recording_has_ended(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="x") as row:
            p.clean.resid_pre[0, 0] = 0
        with pytest.raises(errors.RecipeError, match="name='x'.* has no script yet: the recording has not ended"):
            row.as_nnsight()
    assert "def patched(model):" in row.as_nnsight()


def test_rows_that_a_pair_lacks(tmp_path: Path) -> None:
    model = tp.load(build("gpt2", layers=2), tokenizer())
    with tp.patching(model, made_up_pairs([f"w{i}" for i in range(30, 60)])) as p:
        with p.row(number=0):
            p.clean.resid_pre[1, 7] = p.corrupted.resid_pre[1, 7]
        with p.row(number=1):
            p.clean.resid_pre[1, -1] = p.corrupted.resid_pre[1, -1]
        with p.row(number=2):
            p.clean.pattern[1, 0, -1, 7] = 0
    with pytest.raises(errors.RecipeError, match=r"too few for pattern\[1, 0, -1, 7\]\. Pairs .*positions: 2\."):
        p.rows[2].as_nnsight()
    with pytest.raises(errors.RecipeError, match=r"7 tokens, which are too few for resid_pre\[1, 7\].*positions: 2\."):
        p.rows[0].as_nnsight()
    run(p.rows[0].as_nnsight(2), tmp_path / "seven.py", model)
    assert "resid_pre[0, 6] = corrupted_resid_pre_1[0, 6]" in p.rows[1].as_nnsight(0)
    assert "resid_pre[0, 7] = corrupted_resid_pre_1[0, 7]" in p.rows[1].as_nnsight(2)
    for pair in (3, -1, "0", True):
        with pytest.raises(errors.RecipeError, match="pairs are numbered 0 to 2"):
            p.rows[0].as_nnsight(pair)  # type: ignore[arg-type]  # wrong on purpose


def test_components_without_words(gpt2: Any, pairs: tp.Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    with tp.patching(gpt2, pairs) as p, p.row():
        p.clean.embed[0] = p.clean.resid_mid[1, 0]
    monkeypatch.delitem(scripts.STOPS, "resid_mid")
    with pytest.raises(
        errors.RecipeError,
        match=r"1 edit of this row cannot be written as a plain script.\n  embed\[0\] = clean.resid_mid",
    ):
        p.rows[0].as_nnsight()


@pytest.mark.parametrize(
    ("place", "read", "put"),
    [
        (Place("h.1", "output", 1), "model.h[1].output[1].clone()", ["model.h[1].output = (*model.h[1].output[:1], x, *model.h[1].output[2:])"]),
        (Place("h.1", "output", "y"), "model.h[1].output['y'].clone()", ["model.h[1].output = {**model.h[1].output, 'y': x}"]),
        (Place("h.1", "input", 1), "model.h[1].inputs[0][1].clone()", ["given, options = model.h[1].inputs", "model.h[1].inputs = ((*given[:1], x, *given[2:]), options)"]),
        (Place("h.1", "input", "y"), "model.h[1].inputs[1]['y'].clone()", ["given, options = model.h[1].inputs", "model.h[1].inputs = (given, {**options, 'y': x})"]),
        (Place("h.1", "output", scale=0.5, flat=True), "(model.h[1].output[None] * 0.5)", ["model.h[1].output = (x / 0.5)[0]"]),
    ],
)  # fmt: skip
def test_places_that_few_models_have(place: Place, read: str, put: list[str]) -> None:
    assert spelling._read(place) == read
    assert list(spelling._put(place, "x")) == put


@pytest.mark.parametrize(
    ("indices", "scalar", "text"),
    [
        ((3,), True, "3"), ((3,), False, "3:4"), ((9,), False, "9:"), (tuple(range(10)), False, ":"), ((0, 1, 2), False, ":3"), ((7, 8, 9), False, "7:"),
        ((1, 3, 5), False, "1:6:2"), ((1, 5, 9), False, "1::4"), ((2, 5), False, "[2, 5]"), ((4, 3, 2), False, "[4, 3, 2]"), ((1, 2, 4), False, "[1, 2, 4]"),
    ],
)  # fmt: skip
def test_indices_as_one_would_write_them(indices: tuple[int, ...], scalar: bool, text: str) -> None:
    found = literals.along(indices, scalar, 10)
    assert found == text
    if not scalar:
        assert tuple(eval(f"torch.arange(10)[{found}]").tolist()) == indices


def test_text_of_users_stays_a_comment(
    gpt2: Any, pairs: tp.Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names may hold quotes, line breaks and backslashes."""

    class Odd:
        __name__ = 'two\nlines """ \\'

        def __call__(self, live: torch.Tensor) -> torch.Tensor:
            return 0 * live

    metric: Callable[..., Any] = lambda logits: logits[..., 0]  # noqa: E731  # a script cannot print it
    with tp.patching(gpt2, pairs, {'a """ \\': metric}) as p, p.row(name='""" \\ # é', number=0):
        p.clean.mlp_out[1, -1] = Odd()
    value, _ = run(
        p.rows[0].as_nnsight(), tmp_path / "odd.py", gpt2, functions=p.rows[0].functions, metric=p.metrics[0]
    )
    assert abs(value - float(p.run()["value"].sel(pair=0).values.item())) < 1e-4
