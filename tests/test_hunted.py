"""Faults that a hostile reading of the code found, each once a wrong number, a lost result or a bare traceback."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap, made_up_pairs
from tiny_models import build, tokenizer

import tracepatch as tp
from tracepatch import errors

WORDS = [f"w{i}" for i in range(30, 60)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agrees(model: Any, p: tp.Patching, tolerance: float = 1e-5) -> None:
    """The plan's numbers, in the order of the rows, against the oracle's."""
    slow = Slow(tp.models.module_of(model), p.encoded)
    wanted = slow.score(p.rows, gap(p.encoded))
    found = torch.tensor(p.run()["value"].values.T)
    assert (found - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_value_alone_and_with_a_tensor_share_a_batch(gpt2: Any, pairs: tp.Pairs, batch_size: int | None) -> None:
    with tp.patching(gpt2, pairs, batch_size=batch_size) as p:
        for i, shift in enumerate((None, noise(64), None, 2 * noise(64), 0.5)):
            with p.row(i=i):
                value = p.clean.attn_out[0, :]
                p.corrupted.attn_out[0, :] = value if shift is None else value + shift
    agrees(gpt2, p)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_later_edits_of_some_heads_override_earlier_ones(name: str) -> None:
    model = toy(name)
    with tp.patching(model, ioi_pairs(2)) as p:
        with p.row(i=0):
            p.corrupted.head_out[0, :, :] = p.clean.head_out[0, :, :]
            p.corrupted.head_out[0, :, 0] = 0
        with p.row(i=1):
            p.corrupted.head_out[0, :, [0, 1]] += noise(64)
            p.corrupted.head_out[0, :, [1, 2]] = 0
        with p.row(i=2):
            p.corrupted.head_out[0, :, [0, 1]] = noise(64)
            p.corrupted.head_out[0, 3:, [1, 2]] = 0
            p.corrupted.head_out[0, -1, 1] += noise(64, seed=1)
        with p.row(i=3):
            p.corrupted.z[0, :, 1] = p.clean.z[0, :, 1]
            p.corrupted.head_out[0, :, 1] = p.corrupted.head_out[0, :, 1]
    agrees(model, p)


def test_one_index_written_twice_is_refused(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.SiteError, match=r"names \[0\] twice in a layer of 4 heads"), p.row():
        p.corrupted.z[0, :, [0, -4]] += 1.0
    with pytest.raises(errors.SiteError, match=r"names \[2\] twice in a prompt of 14 tokens"), p.row():
        p.corrupted.resid_pre[0, [2, -12]] += 1.0
    with pytest.raises(errors.MetricError, match="reads a position twice in pair 0"):
        tp.patch(gpt2, pairs, "z", tp.logit_diff.at([-1, 13]))


def test_labels_that_results_use_are_refused(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    for name in ("answer", "depth", "token", "value", "effect", "clean", "status", "effect_answer", "clean_prompt"):
        with pytest.raises(errors.RecipeError, match=f"{name} cannot be a row's label"), p.row(**{name: 1}):
            p.clean.z[0, :, 0] = 0
    with pytest.raises(errors.RecipeError, match="and their names are words: layer=True"), p.row(layer=True):
        p.clean.z[1, :, 0] = 0


@pytest.mark.parametrize("labels", [{"a/b": 1}, {"name": "a\0b"}, {"name": "\ud800"}, {"name": 1 << 63}])
def test_labels_that_no_file_can_hold(gpt2: Any, pairs: tp.Pairs, labels: dict[str, Any]) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError, match="and their names are words"), p.row(**labels):
        p.clean.z[0, :, 0] = 0


def test_sets_of_labels_that_join_alike_are_all_kept(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        for i, labels in enumerate(({"a": 0, "b": 0}, {"a_b": 0}, {"name": "x"})):
            with p.row(**labels):
                p.clean.z[0, :, i] = 0
    assert [sorted(map(str, child["effect"].dims)) for child in p.run().children.values()] == [
        ["a", "b", "pair"],
        ["a_b", "pair"],
        ["name", "pair"],
    ]


def test_labels_that_count_from_the_end(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with p.row(layer=-1, head=-1):
            p.clean.z[-1, :, -1] = 0
        with p.row(layer=1, head=0):
            p.clean.z[1, :, 0] = 0
    result = p.run()
    assert result["layer"].values.tolist() == [1, 2]
    assert result["head"].values.tolist() == [0, 3]
    assert result["depth"].values.tolist() == [0.5, 1]


def test_the_last_position_is_each_prompts_own() -> None:
    model = tp.load(build("gpt2", layers=2), tokenizer())
    pairs = made_up_pairs(WORDS)
    result = tp.patch(model, pairs, "resid_pre", only={"pos": -1})
    assert (result["status"] != tp.Status.ABSENT).all()
    alone = tp.patch(model, pairs[0], "resid_pre", only={"pos": -1})
    np.testing.assert_allclose(result["value"].isel(pair=0, pos=0), alone["value"].isel(pair=0, pos=0), atol=1e-5)


def test_means_of_absent_cells_fit_together() -> None:
    model = tp.load(build("gpt2", layers=2), tokenizer())
    mean = tp.over_pairs(tp.patch(model, made_up_pairs(WORDS), "resid_pre"))
    np.testing.assert_allclose(mean["value"] - mean["base"], mean["effect"], atol=1e-6)
    assert tp.over_pairs(mean) is mean


def test_what_must_not_be_joined(gpt2: Any, pairs: tp.Pairs) -> None:
    one, other = tp.patch(gpt2, pairs, "resid_pre"), toy("gemma2")
    for what, result in {
        "metric": tp.patch(other, pairs, "resid_pre", tp.prob),
        "base": tp.patch(other, pairs, "resid_pre", direction="noising"),
        "component": tp.patch(other, pairs, "attn_out"),
    }.items():
        with pytest.raises(errors.ResultError, match=f"Results that differ in {what} cannot be joined"):
            tp.concat([one, result])


def test_answers_count_once(gpt2: Any) -> None:
    twice = tp.Pairs("When John and Mary", "When Tom and Mary", [[" Mary", " Mary"]], " Tom").encode(gpt2.tokenizer)
    assert len(twice.answer[0]) == 1
    several = tp.Pairs("When John and Mary", "When Tom and Mary", [[" Mary", " Tom"]], " John")
    with pytest.raises(errors.MetricError, match="pair 0 has several"):
        tp.patch(gpt2, several, "z", tp.cross_entropy)


def test_a_row_after_the_block_is_not_lost_in_silence(gpt2: Any, pairs: tp.Pairs) -> None:
    with tp.patching(gpt2, pairs) as p:
        with pytest.raises(errors.RecipeError, match="still being recorded"):
            p.plan.explain()
        with p.row(name="x"):
            p.clean.z[0, :, 0] = 0
    with pytest.raises(errors.RecipeError, match="The recording has ended"), p.row(name="y"):
        p.clean.z[0, :, 1] = 0


def test_picking_pairs(pairs: tp.Pairs) -> None:
    assert pairs[[True, False, True]].clean == (pairs.clean[0], pairs.clean[2])
    assert pairs[np.int64(1)].clean == (pairs.clean[1],)
    assert pairs[-1].clean == pairs.clean[2:]
    with pytest.raises(errors.PromptError, match="There are 3 pairs, 0 to 2; 3 picks none"):
        pairs[3]


@pytest.mark.parametrize("clean", [[[1.7, 2.2]], None, 5.5, [1, "a"], [b"abc"], [[True, False]], [["a", "b"]], [None]])
def test_prompts_that_are_none(clean: Any) -> None:
    with pytest.raises(errors.PromptError, match="clean prompts are strings, or lists of token ids"):
        tp.Pairs(clean)


def test_prompts_from_arrays(gpt2: Any) -> None:
    ids = np.array([[9, 8, 7], [9, 5, 7]])
    wanted = tp.Pairs([[9, 8, 7], [9, 5, 7]], answer=[12, 13])
    for made in (tp.Pairs(ids, answer=np.array([12, 13])), tp.Pairs(torch.tensor(ids), answer=torch.tensor([12, 13]))):
        assert made == wanted
    assert tp.Pairs(np.array([9, 8, 7])).clean == ((9, 8, 7),)
    assert tp.Pairs.from_frame({"clean": "When John", "answer": 12}).clean == ("When John",)
    with pytest.raises(errors.PromptError, match="answer takes strings or token ids"):
        tp.Pairs("a", answer=True)
    assert str(tp.Pairs(ids, bos=True).encode(gpt2.tokenizer).bos) == "no BOS token (token ids are taken as they are)"


def test_multiplying_in_place_is_refused(gpt2: Any, pairs: tp.Pairs) -> None:
    p = tp.patching(gpt2, pairs)
    with pytest.raises(errors.RecipeError, match="would multiply the pristine value"), p.row():
        p.clean.resid_pre[1, 2] *= 2
    with pytest.raises(errors.RecipeError, match="cannot be divided by 0"), p.row():
        p.clean.resid_pre[1, 2] = p.clean.resid_pre[1, 2] / 0
    with pytest.raises(errors.RecipeError, match=r"shapes \[32\] and \[7\] cannot be added"), p.row():
        p.clean.resid_pre[1, 2] = p.clean.resid_pre[1, 2] + torch.ones(32) + torch.ones(7)


def test_bloom_multiplies_in_a_way_of_its_own() -> None:
    model = tp.load(build("bloom", layers=3), tokenizer())
    architecture = tp.Architecture(model)
    assert all(architecture.offers(c, i) for c in ("z", "head_out", "attn_out", "mlp_out") for i in range(3))
    with tp.patching(model, made_up_pairs(WORDS)[:2]) as p:
        for layer in range(3):
            with p.row(layer=layer):
                p.corrupted.head_out[layer, :, 1] = p.clean.head_out[layer, :, 1]
    agrees(model, p)


def test_a_stream_wider_than_the_weights() -> None:
    model = tp.load(build("mamba", layers=2, dtype=torch.bfloat16), tokenizer())
    with tp.patching(model, made_up_pairs(WORDS)[:2]) as p, p.row(name="shift"):
        p.corrupted.resid_pre[1, :] += p.clean.attn_out[0, :] - p.corrupted.attn_out[0, :]
    assert np.isfinite(p.run()["value"]).all()


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_a_head_where_attention_is_silent(model_type: str) -> None:
    """The frozen scale of a post-norm at 0 is its limit, not 0/0."""
    model = tp.load(build(model_type, layers=2), tokenizer())
    with tp.patching(model, made_up_pairs(WORDS)[:2]) as p, p.row(name="silent"):
        p.corrupted.z[0, :, :] = 0
        p.corrupted.head_out[0, :, 0] = p.clean.head_out[0, :, 0]
    agrees(model, p, 1e-3)


def test_ids_and_lengths_that_the_model_lacks(gpt2: Any) -> None:
    for pairs, message in (
        (tp.Pairs([[5, 161]], [[6, 161]], 7, 8), "the clean prompt has ids beyond 0 to 160"),
        (tp.Pairs([[5, -1]], [[6, -1]], 7, 8), "the corrupted prompt has ids beyond 0 to 160"),
        (tp.Pairs([[5] * 65], [[6] * 65], 7, 8), "the clean prompt has 65 tokens, the model takes 64"),
    ):
        with pytest.raises(errors.PromptError, match=message):
            tp.patch(gpt2, pairs, "z")
        checklist = pairs.check(gpt2)
        assert not checklist.passed
        assert message in str(checklist)
    small = tp.load(build("gpt2", vocab_size=50), tokenizer())
    with pytest.raises(errors.PromptError, match="answer id 55 is beyond the 50 logits"):
        tp.patch(small, tp.Pairs([[40, 41]], [[42, 41]], 55, 30), "z")


def test_bad_options(gpt2: Any, pairs: tp.Pairs) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size is a number of rows, 1 or more, not 0"),
        ({"batch_size": 2.5}, "not 2.5"),
        ({"memory": -1}, "memory is a number of bytes, not -1"),
        ({"by": "pos"}, "Take resid_pre layer by layer"),
    ):
        with pytest.raises(errors.RecipeError, match=message):
            tp.patch(gpt2, pairs, "resid_pre", **options)
    with pytest.raises(errors.RecipeError, match="z, resid_pre have different dims"):
        tp.patch(gpt2, pairs, ["z", "resid_pre"])
    with pytest.raises(errors.RecipeError, match="components is a name or several"):
        tp.patch(gpt2, pairs, 5)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(errors.RecipeError, match="pass direction='noising'"):
        tp.patch(gpt2, tp.Pairs(pairs.clean, None, pairs.answer, pairs.wrong), "z", source=0)
    with pytest.raises(errors.MetricError, match="needs answers; what there is: answer, wrong"):
        tp.metric(lambda logits, given: logits[:, 0], needs=("answers",))
    p = tp.patching(gpt2, pairs)
    for index in (slice(None, None, 0), slice([1], None), [[1], [2, 3]]):
        with pytest.raises(errors.SiteError):
            p.clean.resid_pre[0, index]
    with pytest.raises(errors.ModelError, match="the model comes first, then the pairs"):
        tp.patch(pairs, gpt2, "z")


def test_the_checklist_numbers_the_right_pair(gpt2: Any) -> None:
    made = ioi_pairs(2)
    text = str(tp.Pairs(made.clean, made.corrupted, made.wrong, [[], list(made.answer[1])]).check(gpt2))
    assert "the model prefers the answer in 0 of 1 pair; it is its first choice in 0" in text
    assert "pair 1: logit difference -" in text
    assert "pair 0: logit difference" not in text
    alike = tp.Pairs(made.clean, made.corrupted, " Dan", " Tom").check(gpt2)
    assert "read `effect` there, not `normalized`" in str(alike)
    space = tp.Pairs([f"{c} " for c in made.clean], [f"{c} " for c in made.corrupted], made.answer, made.wrong).check(
        gpt2
    )
    assert "2 prompts ending in a space" in str(space)
    moving = ioi_pairs(1, 0), ioi_pairs(1, 1)
    mixed = tp.Pairs(*([getattr(m, side)[0] for m in moving] for side in ("clean", "corrupted", "answer", "wrong")))
    assert "the differing positions are not the same in all pairs (2 patterns)" in str(mixed.check(gpt2))


def test_others_may_read_a_result(tmp_path: Path, gpt2: Any, pairs: tp.Pairs) -> None:
    path = tp.save_result(tp.patch(gpt2, pairs, "z"), tmp_path / "x.nc")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(errors.ResultError, match="is a folder; pass the file to write"):
        tp.save_result(tp.patch(gpt2, pairs, "z"), tmp_path)


def test_the_stream_leaving_a_layer_is_edited_before_the_same_one_entering_the_next(gpt2: Any, pairs: tp.Pairs) -> None:
    """Two names of one place, written down in the other order."""
    with tp.patching(gpt2, pairs, prune=False) as p, p.row():
        p.corrupted.resid_pre[1, :] = p.clean.resid_pre[1, :]
        p.corrupted.resid_post[0, 13:] = p.corrupted.resid_post[0, 13:]
    result = p.run()
    np.testing.assert_allclose(result["value"].values.ravel(), result["clean"], atol=1e-4)


def test_what_a_function_has_read_is_not_overwritten_afterwards(gpt2: Any) -> None:
    """Set, turned round by a function, and set again: the first value has gone elsewhere by then."""
    values = []
    for last in (lambda p: p.clean.z[0, 3], lambda p: lambda live, clean, corrupted: clean):
        for standing in (False, True):
            with tp.patching(gpt2, ioi_pairs(1), checks=False) as p:
                world = p.world("w", of=p.corrupted)
                if standing:
                    world.z[0, 3] = p.clean.z[0, 3] * 7
                    world.z[0, :] = lambda live: live.flip(1)
                    world.z[0, 3] = last(p)
                with p.row():
                    if not standing:
                        world.z[0, 3] = p.clean.z[0, 3] * 7
                        world.z[0, :] = lambda live: live.flip(1)
                        world.z[0, 3] = last(p)
                    world.z[1, 0, 0] += 0.0
            values.append(p.run()["value"].item())
    np.testing.assert_allclose(values, values[0], atol=1e-5)


def test_a_standing_function_carries_what_a_row_changed(gpt2: Any) -> None:
    values = []
    for prune in (True, False):
        with tp.patching(gpt2, ioi_pairs(2), prune=prune) as p:
            world = p.world("w", of=p.corrupted)
            world.resid_pre[1, :] = lambda live: live.mean(1, keepdim=True).expand_as(live)
            with p.row():
                world.resid_pre[0, 8] = world.resid_pre[0, 8] * 0.5
                world.attn_out[1, 3] = world.attn_out[1, 3]
                world.resid_post[1, -1] = world.resid_post[1, -1]
        values.append(p.run()["value"].values)
    np.testing.assert_allclose(*values, atol=1e-5)


SAME_PLACE = {
    "attn_out": ("output", "transformer.h.0.attn.c_proj"),
    "z": ("input", "transformer.h.0.attn.c_proj"),
    "resid_post": ("output", "transformer.h.0"),
    "mlp_out": ("output", "transformer.h.0.mlp.c_proj"),
    "mlp_act": ("input", "transformer.h.0.mlp.c_proj"),
    "embed": ("output", "transformer.wte"),
}


@pytest.mark.parametrize("name", SAME_PLACE)
def test_what_is_kept_at_a_place_is_what_passes_by_in_the_end(gpt2: Any, name: str) -> None:
    """Whichever of its names it was edited under, as a saved value and as a world's."""
    side, path = SAME_PLACE[name]
    site = (0, slice(None)) if tp.COMPONENTS[name].layered else (slice(None),)
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        world = p.world("w", of=p.corrupted)
        getattr(world, side)(path)[:] = 0.0
        with p.row(name="by the module"):
            getattr(p.corrupted, side)(path)[:] = 0.0
            by_name = p.save(getattr(p.corrupted, name)[site])
        with p.row(name="by the name"):
            getattr(p.corrupted, name)[site] = 0.0
            by_module = p.save(getattr(p.corrupted, side)(path)[:])
        with p.row(name="from the world"):
            getattr(p.corrupted, name)[site] = getattr(world, name)[site]
    value = p.run()["value"]
    assert not by_name.values.values.any()
    assert not by_module.values.values.any()
    np.testing.assert_allclose(value, value.sel(name="by the name").broadcast_like(value), atol=1e-5)
    assert abs(float(value.sel(name="by the name").item()) - float(p.run()["corrupted"].item())) > 1e-3


def test_modules_inside_a_components_span_are_refused_beside_it_in_worlds_too(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        world = p.world("w", of=p.corrupted)
        world.output("transformer.h.0.ln_1")[:] = 0.0
        with pytest.raises(errors.RecipeError, match="world w: attn_in.* cannot be edited in one row"):
            world.attn_in[0, :] = 0.0
        with pytest.raises(errors.RecipeError, match="attn_in.* cannot be edited in one row"), p.row(name="a"):
            world.attn_in[0, :] = 1.0
        with p.row(name="b"):
            world.attn_in[1, :] = 0.0


def test_a_function_of_logits_at_any_position(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        with p.row(name="three"):
            p.corrupted.logits[-3:] = lambda live: live * 2
        with p.row(name="one"):
            p.corrupted.logits[-1] = lambda live: live * 2
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(name="three"), value.sel(name="one"), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path"), [("attn_out", "attn"), ("resid_mid", "attn"), ("head_out", "attn"), ("mlp_out", "mlp")]
)
def test_a_value_that_a_module_changes_after_it_has_passed_by_is_not_taken(gpt2: Any, name: str, path: str) -> None:
    with tp.patching(gpt2, ioi_pairs(1)) as p:
        world = p.world("w", of=p.corrupted)
        world.output(f"transformer.h.0.{path}")[:] = 0.0
        with pytest.raises(
            errors.RecipeError, match=f"takes {name}.* has passed by when transformer.h.0.{path}.output"
        ):
            with p.row(name="source"):
                getattr(p.corrupted, name)[0, :] = getattr(world, name)[0, :]
        with pytest.raises(errors.RecipeError, match=f"takes {name}.* has passed by"), p.row(name="saved"):
            p.corrupted.output(f"transformer.h.0.{path}")[:] = 0.0
            p.save(getattr(p.corrupted, name)[0, :])
        with p.row(name="fine"):
            p.corrupted.resid_post[0, :] = world.resid_post[0, :]
            p.save(p.corrupted.output(f"transformer.h.0.{path}")[:])
