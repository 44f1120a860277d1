"""What rows save: every component against the oracle's live values, labels, reductions, and that looking changes nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, made_up_pairs, one_name, pick
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors
from tracepatch.rows import Row
from tracepatch.sites import COMPONENTS, SCALES
from tracepatch.toys import tasks

TINY = ("gemma2", "olmo2", "mixtral", "gpt_oss")
EAGER = ("scores", "pattern")


@cache
def subject(name: str) -> tuple[Any, tp.Pairs]:
    """A model, and pairs of two lengths for it."""
    if name.startswith("toy-"):
        made = tasks.ioi(6, seed=3)
        return toy(name.removeprefix("toy-")), tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)[[0, 3]]
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
        for i, name in enumerate(("q", "v", "z", "head_out", "resid_mid", "mlp_in", "q_in", "k_in")):
            if offers(name, 1):
                site = (1, slice(2, None), [0]) if COMPONENTS[name].unit else (1, slice(2, None))
                getattr(mine, name)[site] = (1 + i / 4) * getattr(other, name)[site]  # none follows from another
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
        offered = [c for c in COMPONENTS if p.architecture.offers(c, 1) and c not in SCALES]
        for number, edit in enumerate(edits(p, base)):
            with p.row(number=number):
                edit()
                for component in offered:
                    for i, spot in enumerate(spots(p, component)[:: 1 if base == "corrupted" else 2]):
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
    assert moved == set(offered), "these were compared only where no edit had reached them"


def heads(p: tp.Patching, look: bool) -> None:
    """A sweep over heads, whose rows look at what comes later or not."""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]
            if look:
                for name in ("resid_post", "head_out", "mlp_act", "attn_in", "v_in", "q"):
                    p.save(getattr(p.corrupted, name)[-1, 5:])
                p.save(p.corrupted.logits[-1], reduce=lambda x: x.zero_(), name="wiped")
                middle = (
                    "resid_mid" if p.architecture.offers("resid_mid", 0) else "resid_pre"
                )  # none in a parallel block
                p.save(getattr(p.corrupted, middle)[-1], reduce=lambda x: x.fill_(7)[:, 0], name="filled")


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_looking_changes_no_number(name: str) -> None:
    results = []
    for look in (False, True):
        # Rows that save are whole prompts.
        with tp.patching(toy(name), ioi_pairs(2), prune=False, batch_size=8, form="flat") as p:
            heads(p, look)
        results.append(p.run())
    for variable in ("value", "clean", "corrupted", "status"):
        np.testing.assert_array_equal(results[0][variable], results[1][variable])


def test_a_row_without_edits_is_its_base(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        for layer in range(3):
            with p.row(layer=layer):
                p.save(p.clean.resid_post[layer, -1])
        with p.row(name="corrupted"):
            other = p.save(p.corrupted.z[1, :, 2])
    result = p.run()
    assert (result["layer"]["status"] == tp.Status.MEASURED).all()
    assert (result["name"]["status"] == tp.Status.MEASURED).all()
    assert result["name"].attrs["base"] == other.values.attrs["base"] == "corrupted"
    assert float(abs(result["layer"]["effect"]).max()) < 1e-4
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    for pair in range(len(pairs)):
        np.testing.assert_allclose(other.values[pair], slow.values["corrupted", pair]["z", 1][:, 2], atol=1e-5)
        for layer in range(3):
            right = (
                slow.values["clean", pair]["resid_pre", layer + 1]
                if layer < 2
                else slow.values["clean", pair]["logits_in", 0]
            )
            np.testing.assert_allclose(p.saved["layer"]["resid_post"].sel(layer=layer)[pair], right[-1], atol=1e-4)
    assert tp.open_result  # a tree of two sets of labels, as the result is
    assert sorted(p.saved.children) == ["layer", "name"]


def test_no_proof_hides_what_is_saved(gpt2: Any, pairs: tp.Pairs) -> None:
    """Edits that cannot reach the metric reach what is saved, and rows with equal edits are both looked at."""
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="beside the metric"):
            p.corrupted.mlp_out[2, 5] = 0
            beside = p.save(p.corrupted.resid_post[2, 5])
        with p.row(name="writes what is there"):
            p.corrupted.resid_pre[1, 2] = p.clean.resid_pre[1, 2]
            same = p.save(p.corrupted.resid_post[1, 2])
        with p.row(name="twin"):
            p.corrupted.z[1, -1, 0] = 0
            first = p.save(p.corrupted.z[1, -1, 0])
        with p.row(name="other twin"):
            p.corrupted.z[1, -1, 0] = 0
            second = p.save(p.corrupted.attn_out[1, -1])
        with p.row(name="pruned"):
            p.corrupted.mlp_out[2, 5] = 0
    result = p.run()
    assert result["status"].sel(pair=0).values.tolist() == [1, 1, 1, 1, int(tp.Status.PROVED_ZERO)]
    assert (first.values == 0).all()
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    for pair in range(len(pairs)):
        np.testing.assert_allclose(beside.values[pair], live(slow, p.rows[0], pair)["logits_in", 0][5], atol=1e-5)
        np.testing.assert_allclose(same.values[pair], slow.values["corrupted", pair]["resid_post", 1][2], atol=1e-5)
        np.testing.assert_allclose(second.values[pair], live(slow, p.rows[3], pair)["attn_out", 1][-1], atol=1e-5)
    assert float(abs(beside.values - result["value"].mean()).max()) > 0


def test_a_whole_sweep_is_one_array(gpt2: Any, pairs: tp.Pairs, tmp_path: Path) -> None:
    handles = {}
    with tp.patching(gpt2, pairs) as p:
        for layer, head in p.grid("z", by=("layer", "head"), layer=slice(0, 2)):
            with p.row(layer=layer, head=head):
                p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]
                handles[layer, head] = p.save(p.corrupted.pattern[2])
                p.save(p.corrupted.pattern[2, 1, -1], name="last")
                p.save(p.corrupted.resid_post[layer, head + 3], name="moving")
                p.save(p.corrupted.resid_post[2, head + 3 : head + 6], name="sliding")
                p.save(p.corrupted.resid_post[2, -1], reduce=lambda x: x.norm(dim=-1), name="norm")
                p.save(p.corrupted.logits[-1], reduce=lambda x: x.topk(3).indices, name="top")
    p.run()
    saved = p.saved
    assert saved["pattern"].dims == ("pair", "layer", "head", "pattern_head", "dest", "src")
    assert saved["last"].dims == ("pair", "layer", "head", "src")
    assert saved["moving"].dims == ("pair", "layer", "head", "d_model")
    assert saved["sliding"].dims == ("pair", "layer", "head", "pos", "d_model")
    assert saved["norm"].dims == ("pair", "layer", "head")
    assert saved["top"].dims == ("pair", "layer", "head", "top_reduced_0")
    assert saved["pos"].values.tolist() == list(range(3, 9))
    assert (saved["sliding"].sel(layer=1, head=2).notnull().any(("pair", "d_model")).values == [0, 0, 1, 1, 1, 0]).all()
    for (layer, head), handle in handles.items():
        assert handle.values.dims == ("pair", "head", "dest", "src")
        np.testing.assert_array_equal(saved["pattern"].sel(layer=layer, head=head).values, handle.values.values)
    np.testing.assert_array_equal(saved["last"], saved["pattern"].sel(pattern_head=1, dest=13))
    np.testing.assert_allclose(saved["pattern"].sum("src"), 1, atol=1e-5)
    assert saved["src_token"].values[0, :2].tolist() == p.encoded.words(p.encoded.clean[0])[:2]
    assert saved["depth"].values.tolist() == [0, 0.5]
    assert saved.attrs["model"] == "toy-gpt2"
    assert tp.open_result(tp.save_result(saved, tmp_path / "saved.nc")).identical(saved)
    one = handles[0, 1].values
    one.to_netcdf(tmp_path / "one.nc", engine="h5netcdf")


def test_pairs_of_several_lengths(gpt2: Any) -> None:
    _, pairs = subject("toy-gpt2")
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="a"):
            p.corrupted.mlp_out[0, 12] = 0
            whole, ends = p.save(p.corrupted.resid_post[0]), p.save(p.corrupted.z[1, -3:, 1:3])
            attended = p.save(p.corrupted.pattern[1, 0, -2:, :4])
            uneven = p.save(p.corrupted.mlp_act[0, ::3, :5])
        with p.row(name="not everywhere"):
            p.corrupted.mlp_out[0, max(p.lengths) - 1] = 0
            absent = p.save(p.corrupted.mlp_out[0, 2])
        with p.row(name="nothing to see everywhere"):
            late = p.save(p.clean.resid_post[0, max(p.lengths) - 1], name="late")
    result = p.run()
    lengths = np.array(p.encoded.lengths)
    assert len(set(lengths)) > 1
    longest = lengths.max()
    assert (whole.values.isnull().all("d_model").sum("pos").values == longest - lengths).all()
    assert whole.values["pos"].values.tolist() == list(range(longest))
    assert whole.values["token"].dims == ("pair", "pos")
    words = [p.encoded.words(ids) for ids in p.encoded.clean]
    assert [[t for t in row if t] for row in whole.values["token"].values.tolist()] == words
    assert ends.values["pos"].values.tolist() == [-3, -2, -1]
    assert ends.values["head"].values.tolist() == [1, 2]
    assert ends.values["token"].dims == ("pos",), "counted from the end these prompts agree"
    assert ends.values["token"].values.tolist() == words[0][-3:] == words[1][-3:]
    assert not ends.values.isnull().any()
    assert attended.values.dims == ("pair", "dest", "src")
    assert attended.values["dest"].values.tolist() == [-2, -1]
    assert attended.values["src"].values.tolist() == [0, 1, 2, 3]
    assert uneven.values["neuron"].values.tolist() == list(range(5))
    short = lengths < longest
    for handle in (absent, late):
        assert handle.values.dims == ("pair", "d_model")
        assert handle.values[short].isnull().all()
        assert handle.values[~short].notnull().all()
    assert (result["status"].sel(name="nothing to see everywhere").values == np.where(short, 0, 1)).all()
    assert p.saved["resid_post"].sel(name="not everywhere").isnull().all()
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    for pair in range(len(pairs)):
        value = live(slow, p.rows[0], pair)["z", 1]
        np.testing.assert_allclose(ends.values[pair], value[-3:, 1:3], atol=1e-5)


REDUCTIONS = [
    ("resid_post", (1,), lambda x: x.norm(dim=-1), ("pos",)),
    ("resid_post", (1,), lambda x: x.mean(1), ("d_model",)),
    ("resid_post", (1, -1), lambda x: x @ torch.ones(64).to(x), ()),
    ("resid_post", (1,), lambda x: x[:, 3:5], ("reduced_0", "d_model")),
    ("pattern", (1,), lambda x: x.mean(-2), ("head", "src")),
    ("pattern", (1,), lambda x: x.argmax(-1), ("head", "dest")),
    ("pattern", (1, slice(None), -1), lambda x: -(x * x.log()).nansum(-1), ("head",)),
    ("z", (1,), lambda x: x.softmax(-1), ("pos", "head", "d_head")),
    ("mlp_act", (1, -1), lambda x: x.topk(4).values, ("reduced_0",)),
    ("attn_out", (1, [2, 5]), lambda x: x @ x.transpose(1, 2), ("reduced_0", "reduced_1")),
]


@pytest.mark.parametrize(("component", "site", "reduce", "dims"), REDUCTIONS)
def test_reductions_are_those_of_the_whole_value(gpt2: Any, component: str, site: Any, reduce: Any, dims: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        for number in range(3):
            with p.row(number=number):
                p.corrupted.mlp_out[0, number + 9 :] = 0
                whole = p.save(getattr(p.corrupted, component)[site])
                less = p.save(getattr(p.corrupted, component)[site], reduce=reduce, name="less")
    p.run()
    assert less.values.dims == ("pair", *dims)
    assert less.values.dtype == np.float32
    np.testing.assert_allclose(less.values, reduce(torch.tensor(whole.values.values)), atol=1e-5)
    if "src" in dims:
        assert less.values["src"].values.tolist() == list(range(14))
    assert p.saved["less"].dims[:2] == ("pair", "number")


def test_functions_and_additions_before_the_look(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p, p.row(name="x"):
        before = p.save(p.clean.resid_pre[1, 4], name="before")
        p.clean.mlp_out[1, 4] = lambda live: 3 * live
        p.clean.mlp_out[1, 4] += 1
        tripled, after = p.save(p.clean.mlp_out[1, 4]), p.save(p.clean.resid_post[1, 4])
        middle = p.save(p.clean.resid_mid[1, 4])
    p.run()
    slow = Slow(tp.models.module_of(gpt2), p.encoded)
    for pair in range(len(pairs)):
        pristine = slow.values["clean", pair]
        np.testing.assert_allclose(tripled.values[pair], 3 * pristine["mlp_out", 1][4] + 1, atol=1e-4)
        np.testing.assert_allclose(before.values[pair], pristine["resid_pre", 1][4], atol=1e-5)
    np.testing.assert_allclose(after.values, middle.values + tripled.values, atol=1e-4)


def test_memory_counts_what_is_saved(gpt2: Any, pairs: tp.Pairs) -> None:
    def plan(look: bool) -> tp.Plan:
        with tp.patching(gpt2, pairs, memory=2_000_000) as p:
            for layer, head in p.grid("z", by=("layer", "head")):
                with p.row(layer=layer, head=head):
                    p.corrupted.z[layer, :, head] = 0
                    for i in range(3 * look):
                        p.save(p.corrupted.head_out[i], name=f"head_out_{i}")
        return p.plan

    plain, looking = plan(False), plan(True)
    assert looking.row_bytes > plain.row_bytes + 3 * 14 * 4 * 64 * 8
    assert looking.batches > plain.batches
    assert "saves        108 live values, 1.55 MB" in looking.explain()
    assert "saves" not in plain.explain()


def test_what_cannot_be_saved(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    site = p.corrupted.z[1, :, 2]

    def refused(message: str, *given: Any, **options: Any) -> None:
        with pytest.raises(errors.RecipeError) as error, p.row():
            p.corrupted.mlp_out[0] = 0
            p.save(*given, **options)
        assert message in str(error.value)

    with pytest.raises(errors.RecipeError, match="saved outside a row"):
        p.save(site)
    refused("this row runs on corrupted, so save corrupted.z[1, :, 2]", p.clean.z[1, :, 2])
    refused("not Sum. Arithmetic on it goes into reduce=", 2 * site)
    refused("not Tensor", torch.zeros(3))
    refused("'pos' cannot be a variable's name", site, name="pos")
    refused("'a b' cannot be a variable's name", site, name="a b")
    refused("reduce is a function of the live value [row, …], not 3", site, reduce=3)
    refused(
        "must return a tensor [row, …]: it was given [row 2, pos 14, d_head 16] and returned a tensor of shape [14, 16]",
        site,
        reduce=lambda x: x.mean(0),
    )
    refused("returned 1.0", site, reduce=lambda x: 1.0)
    refused("mixes rows", site, reduce=lambda x: x - x.mean(0))
    refused("mixes rows", p.corrupted.z[1, :2, 2], reduce=lambda x: x.mean(0))
    refused("fails on values [row 2, pos 14, d_head 16]: RuntimeError", site, reduce=lambda x: x @ torch.ones(3))
    with pytest.raises(errors.RecipeError, match="saves 'z' already"), p.row():
        p.save(site)
        p.save(site)
    with pytest.raises(errors.RecipeError, match=r"this one saves corrupted.z\[1, :, 2\], so clean.z"), p.row():
        p.save(site)
        p.clean.z[0] = 0
    with (
        pytest.raises(errors.RecipeError, match=r"contradicts the row's saves, none of which touches it: save corr"),
        p.row(layer=0),
    ):
        p.save(site)
    with pytest.raises(errors.RecipeError, match="other dims \\(pos, head, d_head\\)"):
        with p.row(i=0):
            p.save(site)
        with p.row(i=1):
            p.save(p.corrupted.z[1])


def test_values_are_there_after_the_run(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="x"):
            p.corrupted.z[1, :, 0] = 0
            p.corrupted.z[1, :, 0] = 0
    p.run()
    with pytest.raises(errors.RecipeError, match="No row saves anything"):
        p.saved  # noqa: B018 (asking for it is what fails)
    with tp.patching(gpt2, pairs) as p, p.row():
        handle = p.save(p.corrupted.z[1, :, 0])
    with pytest.raises(errors.RecipeError, match="Nothing has run yet"):
        p.saved  # noqa: B018 (asking for it is what fails)
    with pytest.raises(
        errors.RecipeError, match=r"save corrupted.z\[1, :, 0\] has no values yet: they are there after p.run"
    ):
        handle.values  # noqa: B018 (asking for it is what fails)
    result = p.run()
    assert p.saved["z"].dims == ("pair", "row", "pos", "d_head")
    assert handle.values.dims == ("pair", "pos", "d_head")
    assert float(abs(result["effect"]).max()) < 1e-4
