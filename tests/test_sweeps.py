"""Sweeps of several sites at once against rows written by hand, and their verdicts on gates that are known."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import ioi_pairs, toy

import tracepatch as tp
from tracepatch import errors

ALL = slice(None)
HEADS = {f"0.{head}": ("z", 0, ALL, head) for head in (0, 1, 3)}


@cache
def gates() -> tuple[tp.Pairs, dict[str, Any]]:
    """A pair, and metrics that are an AND, an OR and a sum of what two heads of layer 0 say: 1 clean, 0 corrupted."""
    pairs = ioi_pairs(1)
    with tp.patching(toy("gpt2"), pairs) as p:
        with p.row(name="clean"):
            clean = p.save(p.clean.z[0, -1, [0, 1]])
        with p.row(name="corrupted"):
            corrupted = p.save(p.corrupted.z[0, -1, [0, 1]])
    p.run()
    low = torch.tensor(corrupted.values.values[0])
    gap = torch.tensor(clean.values.values[0]) - low

    def said(live: torch.Tensor) -> torch.Tensor:
        share: torch.Tensor = ((live - low) * gap).sum(-1) / (gap * gap).sum(-1)
        return share

    made = {
        "and": lambda live: said(live).prod(-1),
        "or": lambda live: 1 - (1 - said(live)).prod(-1),
        "sum": lambda live: said(live).mean(-1),
    }
    index = (0, -1, [0, 1])
    return pairs, {name: tp.metric(f, name, component="z", index=index) for name, f in made.items()}


def by_hand(pairs: tp.Pairs, rows: dict[str, list[tuple[Any, ...]]], base: str = "corrupted", **options: Any) -> Any:
    """Effects of rows, each of which writes the other run's values at some places."""
    with tp.patching(toy("gpt2"), pairs, **options) as p:
        world, other = getattr(p, base), p.corrupted if base == "clean" else p.clean
        for name, places in rows.items():
            with p.row(name=name):
                for component, *index in places:
                    getattr(world, component)[tuple(index)] = getattr(other, component)[tuple(index)]
    return p.run(progress=False)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_windows_of_width_1_are_single_patches(pairs: tp.Pairs, direction: Any) -> None:
    single = tp.patch(toy("gpt2"), pairs, "mlp_out", direction=direction)
    window = tp.sweeps.windows(toy("gpt2"), pairs, "mlp_out", 1, direction=direction)
    for name in ("effect", "normalized", "status", "clean", "corrupted"):
        np.testing.assert_array_equal(single[name], window[name])
    assert window["effect"].dims == single["effect"].dims
    assert window["width"].item() == 1
    assert window["first"].values.tolist() == window["last"].values.tolist()


def test_a_window_is_a_row_of_its_layers(pairs: tp.Pairs) -> None:
    found = tp.sweeps.windows(toy("gpt2"), pairs, "attn_out", [2, 3], only={"pos": [8, 13]})
    assert found["effect"].sizes == {"pair": 3, "width": 2, "layer": 3, "pos": 2}
    wanted = {(2, 0): [0], (2, 1): [0, 1], (2, 2): [1, 2], (3, 0): [0, 1], (3, 1): [0, 1, 2], (3, 2): [1, 2]}
    rows = {
        f"{width} {layer} {pos}": [("attn_out", n, pos) for n in inside]
        for (width, layer), inside in wanted.items()
        for pos in (8, 13)
    }
    hand = by_hand(pairs, rows)["effect"]
    for (width, layer), inside in wanted.items():
        cell = found.sel(width=width, layer=layer)
        assert (cell["first"].item(), cell["last"].item()) == (inside[0], inside[-1])
        for pos in (8, 13):
            np.testing.assert_allclose(cell["effect"].sel(pos=pos), hand.sel(name=f"{width} {layer} {pos}"), atol=1e-5)


def test_together_is_a_row_of_all_and_the_rest_interaction(pairs: tp.Pairs) -> None:
    places = {"early": [("z", 0, ALL, 1), ("mlp_out", 0, ALL)], "late": [("z", 1, -1, 3), ("z", 1, -1, 0)]}
    found = tp.sweeps.together(toy("gpt2"), pairs, places)
    rows = places | {f"{name} {n}": [place] for name, members in places.items() for n, place in enumerate(members)}
    hand = by_hand(pairs, rows)["effect"]
    for name in places:
        joint, singles = hand.sel(name=name), hand.sel(name=f"{name} 0") + hand.sel(name=f"{name} 1")
        np.testing.assert_allclose(found["effect"].sel(set=name), joint, atol=1e-5)
        np.testing.assert_allclose(found["singles"].sel(set=name), singles, atol=1e-5)
        np.testing.assert_allclose(found["interaction"].sel(set=name), joint - singles, atol=1e-5)
    mean = tp.over_pairs(found)
    gap = (found["clean"] - found["corrupted"]).mean("pair")
    np.testing.assert_allclose(mean["interaction_normalized"], found["interaction"].mean("pair") / gap, rtol=1e-5)


def test_interactions_of_every_two_are_symmetric_and_rows_by_hand(pairs: tp.Pairs) -> None:
    found = tp.sweeps.interactions(toy("gpt2"), pairs, HEADS)
    rows = {f"{a} {b}": [HEADS[a]] if a == b else [HEADS[a], HEADS[b]] for a, b in itertools.product(HEADS, HEADS)}
    hand = by_hand(pairs, rows)["effect"]
    for a, b in itertools.product(HEADS, HEADS):
        cell = found.sel(site=a, other=b)
        np.testing.assert_allclose(cell["effect"], hand.sel(name=f"{a} {b}"), atol=1e-5)
        if a == b:
            assert bool(cell["interaction"].isnull().all())
            continue
        apart = hand.sel(name=f"{a} {b}") - hand.sel(name=f"{a} {a}") - hand.sel(name=f"{b} {b}")
        np.testing.assert_allclose(cell["interaction"], apart, atol=1e-5)


def test_gates_interact_as_they_must() -> None:
    pairs, metrics = gates()
    found = tp.sweeps.interactions(toy("gpt2"), pairs, HEADS, metrics).squeeze("pair")
    apart = found["interaction"].sel(site="0.0", other="0.1")
    np.testing.assert_allclose(apart.sel(metric=["and", "or", "sum"]), [1, -1, 0], atol=1e-4)
    np.testing.assert_allclose(found["interaction"].sel(site="0.0", other="0.3"), 0, atol=1e-4)


def test_leaving_one_out_is_what_it_adds(pairs: tp.Pairs) -> None:
    found = tp.sweeps.leave_one_out(toy("gpt2"), pairs, HEADS)
    rows = {f"not {one}": [place for name, place in HEADS.items() if name != one] for one in HEADS}
    hand = by_hand(pairs, {"all": list(HEADS.values()), **rows})["effect"]
    np.testing.assert_allclose(found["whole"], hand.sel(name="all"), atol=1e-5)
    for one in HEADS:
        np.testing.assert_allclose(found["effect"].sel(left_out=one), hand.sel(name=f"not {one}"), atol=1e-5)
        lost = hand.sel(name="all") - hand.sel(name=f"not {one}")
        np.testing.assert_allclose(found["contribution"].sel(left_out=one), lost, atol=1e-5)


def test_keeping_only_some_takes_all_others_away(pairs: tp.Pairs) -> None:
    circuit = [("z", 0, ALL, 1), ("z", 1, ALL, 0), ("z", 1, ALL, 3)]
    found = tp.sweeps.keep_only(toy("gpt2"), pairs, "z", {"circuit": circuit})
    every = [("z", layer, ALL, head) for layer in range(3) for head in range(4)]
    rows = {"nothing": every, "circuit": [place for place in every if place not in circuit]}
    hand = by_hand(pairs, rows, base="clean")
    for name in rows:
        np.testing.assert_allclose(found["value"].sel(kept=name), hand["value"].sel(name=name), atol=1e-5)
    empty, kept = hand["value"].sel(name="nothing"), hand["value"].sel(name="circuit")
    np.testing.assert_allclose(found["empty"], empty, atol=1e-5)
    share = (kept - empty) / (hand["clean"] - empty)
    np.testing.assert_allclose(found["faithfulness"].sel(kept="circuit"), share, rtol=1e-4)
    mean = tp.over_pairs(found)["faithfulness"].sel(kept="circuit")
    np.testing.assert_allclose(mean, (kept - empty).mean() / (hand["clean"] - empty).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("gate", "verdict"), [("and", "necessary only"), ("or", "redundant"), ("sum", "necessary and sufficient")]
)
def test_both_directions_tell_gates_apart(gate: str, verdict: str) -> None:
    pairs, metrics = gates()
    found = tp.sweeps.both_directions(toy("gpt2"), pairs, "z", metrics[gate], only={"layer": [0, 1]})
    numbers = found["verdict"]
    names = [word.replace("_", " ") for word in numbers.attrs["flag_meanings"].split()]
    assert tuple(names) == tp.sweeps.VERDICTS
    said = {(layer, head): names[int(numbers.sel(layer=layer, head=head))] for layer in (0, 1) for head in range(4)}
    assert {site for site, word in said.items() if word == verdict} == {(0, 0), (0, 1)}
    assert set(said.values()) == {verdict, "irrelevant"}


def test_a_site_that_works_against_is_called_so(pairs: tp.Pairs) -> None:
    found = tp.sweeps.both_directions(toy("gpt2"), pairs, "z", sufficient=0.001, necessary=0.001)
    share = {
        d: tp.over_pairs(tp.patch(toy("gpt2"), pairs, "z", direction=d))["normalized"] for d in ("denoising", "noising")
    }
    back, lost = share["denoising"], -share["noising"]
    wanted = xr.where(back >= 0.001, 2, 0) + xr.where(lost >= 0.001, 1, 0)
    wanted = wanted.where((back > -0.001) & (lost > -0.001), 4)
    np.testing.assert_array_equal(found["verdict"], wanted.transpose(*found["verdict"].dims))
    assert {0, 4} <= set(np.unique(wanted))


def test_knock_outs_are_a_loop_of_joint_rows(pairs: tp.Pairs) -> None:
    places = {f"{layer}.{head}": ("z", layer, ALL, head) for layer in (0, 1) for head in range(4)}
    found = tp.sweeps.knock_outs(toy("gpt2"), pairs, places, rounds=2)
    out: list[str] = []
    alone: dict[str, Any] = {}
    for number in range(3):
        rows = {one: [places[name] for name in [*out, one]] for one in places if one not in out}
        rows |= {"out": [places[name] for name in out]} if out else {}
        hand = by_hand(pairs, rows, base="clean")
        base = hand["value"].sel(name="out") if out else hand["clean"]
        part = found.sel(round=number)
        assert part["out"].item() == (" + ".join(out) or "nothing")
        np.testing.assert_allclose(part["base"], base, atol=1e-5)
        for one in places:
            effect = part["effect"].sel(place=one)
            if one in out:
                assert bool(effect.isnull().all())
                continue
            wanted = hand["value"].sel(name=one) - base
            alone.setdefault(one, wanted)
            np.testing.assert_allclose(effect, wanted, atol=1e-5)
            np.testing.assert_allclose(part["taken_over"].sel(place=one), alone[one] - wanted, atol=2e-5)
        singles = sum((alone[one] for one in out), start=0 * base)
        np.testing.assert_allclose(part["singles"], singles, atol=2e-5)
        np.testing.assert_allclose(part["interaction"], base - hand["clean"] - singles, atol=2e-5)
        out.append(
            min((one for one in places if one not in out), key=lambda one: float(hand["value"].sel(name=one).mean()))
        )


def test_a_backup_shows_once_the_other_is_out() -> None:
    """Of an OR neither head matters alone, and each takes over all that the other did."""
    pairs, metrics = gates()
    with pytest.warns(errors.MeasurementWarning, match="The patches change nothing"):  # so it looks at first
        found = tp.sweeps.knock_outs(toy("gpt2"), pairs, HEADS, metrics["or"], first=["0.0"]).squeeze("pair")
    np.testing.assert_allclose(found["alone"], 0, atol=1e-4)
    second = found.sel(round=1)
    assert second["out"].item() == "0.0"
    np.testing.assert_allclose(second["taken_over"].sel(place=["0.1", "0.3"]), [1, 0], atol=1e-4)
    np.testing.assert_allclose(found["interaction"], [0, 0, -1], atol=1e-4)
    assert found["out"].values[2] == "0.0 + 0.1"


def test_compensation_is_total_less_direct(pairs: tp.Pairs) -> None:
    """Against the difference of direct attributions of two unpatched-norm runs, writer by writer."""
    places = {"heads": [("z", 0, ALL, 1), ("z", 1, -1, 3)], "mlp": [("mlp_out", 0, ALL)]}
    found = tp.sweeps.compensation(toy("gpt2"), pairs, places)
    writers = found["writer"].values.tolist()
    assert writers[:6] == ["0.0", "0.1", "0.2", "0.3", "mlp 0", "1.0"]
    hand = by_hand(pairs, places, base="clean")["effect"]
    np.testing.assert_allclose(found["total"], hand.rename(name="knocked").transpose(*found["total"].dims), atol=1e-4)
    own = found["effect"].sel(knocked="heads", writer=["0.1", "1.3"]).sum("writer")
    np.testing.assert_allclose(found["direct"].sel(knocked="heads"), own, atol=1e-5)
    np.testing.assert_allclose(found["direct"].sel(knocked="mlp"), found["effect"].sel(knocked="mlp", writer="mlp 0"))
    np.testing.assert_allclose(found["compensation"], found["total"] - found["direct"], atol=1e-5)
    for one in writers:  # a metric by hand
        layer, head = (int(one[4:]), None) if one.startswith("mlp") else map(int, one.split("."))
        name, index = ("mlp_out", (layer, -1)) if head is None else ("head_out", (layer, -1, head))
        with tp.patching(toy("gpt2"), pairs, tp.direct_logit_diff(name, index)) as p, p.row():
            p.clean.mlp_out[0, :] = p.corrupted.mlp_out[0, :]
        effect = p.run()["effect"].squeeze("row")
        np.testing.assert_allclose(found["effect"].sel(knocked="mlp", writer=one), effect, atol=1e-4)
    with pytest.raises(errors.RecipeError, match=r"k\[0, :, 1\]: what is knocked out writes to the stream"):
        tp.sweeps.compensation(toy("gpt2"), pairs, [("k", 0, ALL, 1)])


REFUSED: dict[str, Any] = {
    "width is a number of layers": lambda m, p: tp.sweeps.windows(m, p, "mlp_out", 0),
    "Windows of layers run over layer": lambda m, p: tp.sweeps.windows(m, p, "mlp_out", 2, by="pos"),
    "direction is 'denoising' or": lambda m, p: tp.sweeps.windows(m, p, "mlp_out", 2, direction="up"),
    "This is about two places or more": lambda m, p: tp.sweeps.interactions(m, p, [("z", 0, ALL, 1)]),
    "is no place": lambda m, p: tp.sweeps.leave_one_out(m, p, {"a": ["z"]}),
    "A place is named twice": lambda m, p: tp.sweeps.leave_one_out(m, p, [("z", 0, ALL, 1)] * 2),
    "keeps everything": lambda m, p: tp.sweeps.keep_only(m, p, "z", {"x": [("z", n, ALL, h) for n in range(3) for h in range(4)]}),
    "is no place of z": lambda m, p: tp.sweeps.keep_only(m, p, "z", {"x": [("k", 0, ALL, 1)]}),
    "A share of the difference": lambda m, p: tp.sweeps.both_directions(m, p, "z", sufficient=0),
    "take pairs with corrupted prompts": lambda m, p: tp.sweeps.both_directions(m, tp.Pairs(p.clean), "z"),
    "first is a list of labels": lambda m, p: tp.sweeps.knock_outs(m, p, HEADS, first=["9.9"]),
    "rounds is a number of rounds": lambda m, p: tp.sweeps.knock_outs(m, p, HEADS, rounds=0),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_sweep_is_refused(pairs: tp.Pairs, message: str) -> None:
    with pytest.raises(errors.RecipeError, match=message):
        REFUSED[message](toy("gpt2"), pairs)


def test_windows_have_a_picture(pairs: tp.Pairs) -> None:
    """Of one width and of several, each point over the middle of the layers that its window has."""
    several = tp.sweeps.windows(toy("gpt2"), pairs, "mlp_out", [1, 3], by="layer")
    lines = {line.get_gid(): line for line in tp.plots.windows(several).axes[0].lines if line.get_gid() in ("1", "3")}
    np.testing.assert_allclose(lines["1"].get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(lines["3"].get_xdata(), [0.5, 1, 1.5])
    mean = tp.over_pairs(several)["normalized"]
    for width, line in lines.items():
        np.testing.assert_allclose(line.get_ydata(), mean.sel(width=int(width)), rtol=1e-6)
    one = tp.plots.windows(tp.sweeps.windows(toy("gpt2"), pairs, "mlp_out", 3, by="layer"))
    (line,) = (line for line in one.axes[0].lines if line.get_gid() == "3")
    np.testing.assert_allclose(line.get_ydata(), lines["3"].get_ydata(), rtol=1e-6)


def test_both_directions_have_a_picture(pairs: tp.Pairs) -> None:
    """One argument is both; its thresholds are those of the verdicts, and so are the groups of points."""
    both = tp.sweeps.both_directions(toy("gpt2"), pairs, "z", sufficient=0.001, necessary=0.002)
    figure = tp.plots.quadrants(both)
    two = [tp.patch(toy("gpt2"), pairs, "z", direction=d) for d in ("denoising", "noising")]
    other = tp.plots.quadrants(*two, sufficient=0.001, necessary=0.002)
    counts = []
    for shown in (figure, other):
        points = {c.get_gid(): np.asarray(c.get_offsets()) for c in shown.axes[0].collections if c.get_gid()}
        counts.append({name: len(at) for name, at in points.items()})
    assert counts[0] == counts[1]
    found = {word: int((both["verdict"] == number).sum()) for number, word in enumerate(tp.sweeps.VERDICTS)}
    assert {word: counts[0].get(word, 0) for word in found} == found
    assert sum(found.values()) == 12
    with pytest.raises(errors.ResultError, match="both_directions"):
        tp.plots.quadrants(two[0])


def test_interactions_have_a_picture() -> None:
    """Its second matrix is the interaction of the result."""
    pairs, metrics = gates()
    found = tp.sweeps.interactions(toy("gpt2"), pairs, HEADS, metrics["and"])
    figure = tp.plots.interactions(found, "effect")
    shown = np.ma.filled(figure.axes[1].collections[0].get_array(), np.nan).reshape(3, 3)
    np.testing.assert_allclose(shown, found["interaction"].squeeze("pair"), atol=1e-6)


def test_sweeps_of_prompts_of_unequal_length_go_by_partners() -> None:
    """As ``tp.patch`` does; a verdict by position has no positions in common."""
    model = toy("gpt2")
    made = tp.toys.pairs("ioi", 2)
    longer = [text.replace("When ", "Then When ", 1) for text in made.corrupted or ()]
    pairs = tp.Pairs(made.clean, longer, made.answer, made.wrong, align="suffix")
    for direction in ("denoising", "noising"):
        way: Any = direction
        single = tp.patch(model, pairs, "mlp_out", direction=way, only={"pos": [12, 13]})
        window = tp.sweeps.windows(model, pairs, "mlp_out", 1, direction=way, only={"pos": [12, 13]})
        np.testing.assert_array_equal(single["effect"], window["effect"])
        assert single["pos"].values.tolist() == window["pos"].values.tolist()
    both = tp.sweeps.both_directions(model, pairs, "z")
    for direction in ("denoising", "noising"):
        way = direction
        single = tp.patch(model, pairs, "z", direction=way)
        np.testing.assert_allclose(both["effect"].sel(direction=direction), single["effect"], atol=1e-5)
    with pytest.raises(errors.RecipeError, match="A verdict by position compares the two prompts"):
        tp.sweeps.both_directions(model, pairs, "mlp_out")
