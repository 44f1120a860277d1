"""What rows save: every component against the oracle's live values, labels, reductions, and that looking changes nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, made_up_pairs, pick
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.rows import Row
from tracepatch.sites import COMPONENTS
from tracepatch.toys import tasks

TINY = ("gemma2", "olmo2", "mixtral", "gpt_oss")
EAGER = ("scores", "pattern")


@cache
def subject(name: str) -> tuple[Any, tp.Pairs]:
    """A model, and pairs of two lengths for it."""
    if name.startswith("toy-"):
        made = tasks.ioi(3, seed=3)
        return toy(name.removeprefix("toy-")), tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    return tp.load(build(name, layers=3), tokenizer()), made_up_pairs([f"w{i}" for i in range(30, 60)])


def edits(p: tp.Patching, base: str) -> list[Any]:
    """What rows do before they save: nothing, edits in one layer, edits of several components in several layers."""
    mine, other = getattr(p, base), p.clean if base == "corrupted" else p.corrupted
    offers = p.architecture.offers

    def one() -> None:
        mine.resid_pre[1, 2:] = other.resid_pre[1, 2:]

    def joint() -> None:
        mine.embed[-2:] += 0.5
        mine.attn_out[0, 1:4] = 2 * other.attn_out[0, 1:4]
        for name in ("q", "v", "z", "head_out", "resid_mid", "mlp_in", "q_in", "k_in"):
            if offers(name, 1):
                site = (1, slice(2, None), [0]) if COMPONENTS[name].unit else (1, slice(2, None))
                getattr(mine, name)[site] = getattr(other, name)[site]
        mine.mlp_out[1, -1] += 0.25 * mine.mlp_out[1, -1]
        mine.logits[-1] += 1

    def inside() -> None:
        for name in ("attn_in", "k_in", "pattern", "scores"):
            if offers(name, 0):
                site = (0, slice(None), 0) if name == "k_in" else (0, 1) if name in EAGER else (0, slice(1, None))
                getattr(mine, name)[site] = getattr(other, name)[site]
        mine.logits_in[-1] = 0.5 * other.logits_in[-1]

    return [lambda: None, one, joint, inside]


def spots(p: tp.Patching, name: str) -> list[Any]:
    """Sites of a component to save: whole ones, single positions and units, slices and lists."""
    kind, layers = COMPONENTS[name], [i for i in range(len(p.architecture)) if p.architecture.offers(name, i)]
    if not kind.layered:
        return [(slice(None),), (-1,), ([0, 3],)]
    if kind.attends:
        return [(layers[0],), (layers[-1], 1, -1), (1, slice(None), slice(2, 5), 0), (1, [0, 1], [1, 3], slice(1, 4))]
    found: list[Any] = [(layers[0],), (layers[-1], -1), (1, slice(2, None)), (1, [1, 3])]
    if kind.unit:
        found += [(1, slice(None), 0), (1, -1, [1, 0]), (layers[-1], 2, 1)]
    return found


def live(slow: Slow, row: Row, pair: int) -> dict[Any, torch.Tensor]:
    """Every component of a patched forward, by the oracle."""
    return slow.reference.values(slow.ids[row.base, pair], slow.edits(row, pair))


def one_name(component: str, layer: int, depth: int) -> tuple[str, int]:
    """The stream that leaves a block is the one that enters the next, whatever it is called."""
    after = layer + (component == "resid_post")
    return (
        ("resid_pre", after)
        if component == "resid_post" and after < depth
        else ("logits_in", 0)
        if component == "resid_post"
        else (component, layer)
    )


def padded(pieces: list[torch.Tensor]) -> np.ndarray:
    """[pair, …], NaN where a pair has no such entry."""
    shape = np.max([p.shape for p in pieces], 0) if pieces[0].ndim else ()
    found = np.full((len(pieces), *shape), np.nan, np.float32)
    for i, piece in enumerate(pieces):
        found[(i, *(slice(n) for n in piece.shape))] = piece
    return found


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("name", [*(f"toy-{n}" for n in tp.toys.NAMES), *TINY])
def test_every_component_is_the_oracles_live_value(name: str, base: str) -> None:
    model, pairs = subject(name)
    with tp.patching(model, pairs, batch_size=3 if base == "clean" else None) as p:
        offered = [c for c in COMPONENTS if p.architecture.offers(c, 1)]
        for number, edit in enumerate(edits(p, base)):
            with p.row(number=number):
                edit()
                for component in offered:
                    for i, spot in enumerate(spots(p, component)):
                        p.save(getattr(getattr(p, base), component)[spot], name=f"{component}_{i}")
    value = p.run()["value"]
    slow = Slow(tp.models.module_of(model), p.encoded, eager=True)
    worst: dict[str, float] = {}
    moved = set()
    for row in p.rows:
        wanted = [live(slow, row, pair) for pair in range(len(p.encoded))]
        for save in row.saves:
            site = save.site
            key = one_name(site.component, site.layer, len(p.architecture))
            split = COMPONENTS[site.component].unit is not None
            found = save.values.values
            right = padded([pick(values[key], site, split) for values in wanted])
            assert found.shape == right.shape, f"{row.described}, {save}: {found.shape} instead of {right.shape}"
            assert found.dtype == np.float32
            masked = right < -1e30  # scores of masked keys
            assert (found[masked] < -1e30).all()
            scale = 1 + np.nanmax(np.abs(np.where(masked, 0, right)))
            np.testing.assert_array_equal(np.isnan(found), np.isnan(right))
            error = np.nanmax(np.abs(np.where(masked, 0, found - right))) / scale
            worst[site.component] = max(worst.get(site.component, 0), float(error))
            assert error < 1e-5, f"{row.described}, {save}: {error:.2g}"
            before = padded([pick(slow.values[row.base, i][key], site, split) for i in range(len(wanted))])
            if np.nanmax(np.abs(np.where(masked, 0, right - before))) > 1e-3:
                moved.add(site.component)
        for pair, values in enumerate(wanted):
            last = values["logits", 0][-1].double()
            answer, wrong = (last[list(ids[pair])].mean() for ids in (p.encoded.answer, p.encoded.wrong))
            assert abs(float(value[pair, row.number]) - float(answer - wrong)) < 1e-4 * (1 + float(last.abs().max()))
    assert moved >= set(offered) - {"embed"} - ({"embed"} if base else set()), sorted(set(offered) - moved)
    print(name, base, {k: f"{v:.1g}" for k, v in worst.items()})
