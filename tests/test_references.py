"""Means over prompts, prompts drawn from a set, and noise in units of a standard deviation, against the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from slow import Slow, gap
from test_forms import tiny
from test_remote import Server, away, server  # noqa: F401  # a fixture
from test_scripts import handed, run
from test_twins import without_weights
from tiny_models import DEVICE

import tracepatch as tp
from tracepatch import errors
from tracepatch.jobs import EAGER
from tracepatch.models import module_of
from tracepatch.table import FORMS
from tracepatch.toys import tasks


def prompts(count: int = 5, seed: int = 7) -> tp.Pairs:
    """Of several templates, so of several lengths."""
    made = tasks.ioi(count, seed=seed)
    return tp.Pairs(made.clean, name="others")


def agrees(p: tp.Patching, model: Any, tolerance: float = 2e-5) -> Any:
    """Every row equals the oracle's, and so does every edited world's baseline."""
    said = " ".join(map(str, (*p.rows, *p.edited.values())))
    eager = any(name in said for name in EAGER)
    slow = Slow(module_of(model), p.encoded, eager=eager, edited=p.edited, references=p.references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.MeasurementWarning)
        result = p.run(progress=False)
    wanted = slow.score(p.rows, gap(p.encoded)).numpy()
    found = values(p, result)
    scale = 1 + np.nanmax(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=0)
    base = np.array(
        [[float(gap(p.encoded)(slow.base(row.base, i), i)) for i in range(len(p.encoded))] for row in p.rows]
    )
    assert np.abs(wanted - base).max() > 0.05, "the rows do something"
    for name in p.edited:
        baseline = [float(gap(p.encoded)(slow.base(name, i), i)) for i in range(len(p.encoded))]
        np.testing.assert_allclose(p._measured.baselines[name][:, 0], baseline, atol=tolerance * scale, rtol=0)
    return result


def values(p: tp.Patching, result: Any) -> np.ndarray:
    """[row, pair]"""
    parts = {tuple(sorted(row.labels)): result for row in p.rows}
    if len(parts) > 1:
        parts = {tuple(sorted(row.labels)): result["_".join(row.labels)].to_dataset() for row in p.rows}
    return np.stack([parts[tuple(sorted(row.labels))]["value"].sel(row.labels).values for row in p.rows])


def several(p: tp.Patching, others: tp.Pairs) -> None:
    """Rows that take means in every way there is; on the clean world, which has no corrupted one."""
    mean, over = p.mean(others), p.mean(others, over="positions")
    last = len(p.architecture) - 1
    number = iter(range(1000))
    for name in (
        "resid_pre",
        "attn_in",
        "q_in",
        "k_in",
        "v",
        "z",
        "head_out",
        "attn_out",
        "mlp_in",
        "mlp_act",
        "mlp_out",
    ):
        target, source = getattr(p.clean, name), getattr(mean, name)
        if not p.architecture.offers(name, last):
            continue
        for pos in (slice(None), -1, 3, slice(-4, None), [2, -1], slice(2, 9)):
            with p.row(number=next(number)):
                target[last - 1, pos] = source[last - 1, pos]
        with p.row(number=next(number)):
            target[last, 2:] = getattr(over, name)[last, 1:]
    with p.row(number=next(number)):
        p.clean.z[0, :, 1] = mean.z[0, :, 1]
        p.clean.z[0, :, [0, 2]] = over.z[0, 1:, [0, 2]]
        p.clean.resid_post[last, -1] += 0.5 * (mean.resid_post[last, -1] - mean.resid_post[last, 1])
    with p.row(number=next(number)):
        p.clean.embed[4] = over.embed[:]
    with p.row(number=next(number)):
        p.clean.attn_out[0, :] += 2 * p.clean.attn_out[0, :] - mean.attn_out[0, :]


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_means_equal_the_oracle(name: str) -> None:
    model, pairs = toy(name), ioi_pairs(2)
    pairs = tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)
    with tp.patching(model, pairs) as p:
        several(p, prompts())
    agrees(p, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("form", FORMS)
def test_means_equal_the_oracle_in_every_form(name: str, form: Any) -> None:
    model, pairs = toy(name), ioi_pairs(2)
    pairs = tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)
    with tp.patching(model, pairs, form=form) as p:
        several(p, prompts())
    assert form in {batch.form for group in p.plan.groups for batch in group.batches}
    agrees(p, model)


@pytest.mark.parametrize("form", FORMS)
def test_means_in_worlds_and_rows_on_pairs_of_two_lengths(gpt2: Any, form: Any) -> None:
    made = tasks.ioi(4, seed=2, templates=[tasks.TEMPLATES[0], tasks.TEMPLATES[1]])
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    with tp.patching(gpt2, pairs, form=form) as p:
        mean = p.mean(prompts(6))
        circuit = p.world("circuit", of=p.clean)
        for layer in range(3):
            for head in (0, 2):
                circuit.z[layer, :, head] = mean.z[layer, :, head]
        for layer, pos in p.grid("attn_out", pos=[9, -1]):
            with p.row(layer=layer, pos=pos):
                circuit.attn_out[layer, pos] = p.corrupted.attn_out[layer, pos]
        for layer, pos in p.grid("mlp_out", pos=[9, -1]):
            with p.row(layer=layer, pos=pos, mean="mlp"):
                p.corrupted.mlp_out[layer, pos] = mean.mlp_out[layer, pos]
    assert len(p.plan.groups) > 1
    assert form in {batch.form for group in p.plan.groups for batch in group.batches}
    agrees(p, gpt2)


@pytest.mark.parametrize("form", ["packed", "flat"])
def test_attention_is_averaged_position_by_position(form: Any) -> None:
    """Of prompts of one length as the oracle has it, of unequal ones as an average by hand."""
    model, pairs = toy("gpt2"), ioi_pairs(2)
    alike = tp.Pairs(tasks.ioi(3, seed=5, templates=tasks.TEMPLATES[:1]).clean)
    with tp.patching(model, pairs, form=form) as p:
        mean = p.mean(alike)
        for number, (head, dest, src) in enumerate(((2, -1, slice(None)), (1, 5, [1, 3]), (3, slice(2, None), 3))):
            with p.row(number=number):
                p.clean.pattern[1, head, dest, src] = mean.pattern[1, head, dest, src]
        with p.row(number=3):
            p.clean.freeze("pattern", at=mean, layers=[0, 1])
    agrees(p, model)


def test_a_shorter_prompt_does_not_count_where_it_has_no_position(gpt2: Any) -> None:
    """The padded mean is the unpadded one: each position has its own count, from the start and from the end."""
    pairs, others = ioi_pairs(1), prompts(6)
    lengths = [len(ids) for ids in others.encode(gpt2.tokenizer).clean]
    assert len(set(lengths)) > 1
    with tp.patching(gpt2, pairs) as p:
        for pos in range(min(14, max(lengths))):
            with p.row(pos=pos, mean="of all"):
                p.clean.resid_pre[1, pos] = p.mean(others).resid_pre[1, pos]
            one = [p.mean(others[i]).resid_pre[1, pos] for i, n in enumerate(lengths) if n > pos]
            total = one[0]
            for value in one[1:]:
                total = total + value
            with p.row(pos=pos, mean="by hand"):
                p.clean.resid_pre[1, pos] = total / len(one)
        with p.row(pos=-1, mean="of all"):
            p.clean.pattern[1, 3, -1, -4:] = p.mean(others).pattern[1, 3, -1, -4:]
        last = p.mean(others[0]).pattern[1, 3, -1, -4:]
        for i in range(1, len(others)):
            last = last + p.mean(others[i]).pattern[1, 3, -1, -4:]
        with p.row(pos=-1, mean="by hand"):
            p.clean.pattern[1, 3, -1, -4:] = last / len(others)
    value = p.run()["value"]
    np.testing.assert_allclose(value.sel(mean="of all"), value.sel(mean="by hand"), atol=1e-4)
    assert float(abs(value - value.isel(pos=0)).max()) > 0.1


def rows_of(p: tp.Patching, world: Any, names: tuple[str, ...]) -> None:
    for name in names:
        for layer in range(len(p.architecture)):
            with p.row(component=name, layer=layer):
                getattr(p.clean, name)[layer] = getattr(world, name)[layer]


NAMES = ("resid_pre", "q", "v", "z", "head_out", "attn_out", "mlp_act", "mlp_out", "pattern")


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_mean_over_one_example_is_a_self_patch(name: str) -> None:
    model, pairs = toy(name), ioi_pairs(1)
    with tp.patching(model, pairs) as p:
        rows_of(p, p.mean(pairs), NAMES)
    with pytest.warns(errors.MeasurementWarning, match="change nothing"):
        result = p.run()
    present = result["status"] == tp.Status.MEASURED
    assert present.all()
    np.testing.assert_allclose(result["effect"], 0, atol=2e-4)


def test_a_set_of_one_prompt_is_resampled_with_itself(gpt2: Any) -> None:
    pairs = ioi_pairs(1)
    with tp.patching(gpt2, pairs) as p:
        rows_of(p, p.resample(pairs, draws=2), ("resid_pre", "z", "mlp_out"))
    with pytest.warns(errors.MeasurementWarning, match="change nothing"):
        result = p.run()
    assert result["effect"].sizes["draw"] == 2
    np.testing.assert_allclose(result["effect"], 0, atol=1e-4)


def test_drawn_prompts_equal_the_oracle_and_come_again_with_their_seed(gpt2: Any) -> None:
    pairs, others = ioi_pairs(3), prompts(8)
    found = {}
    for seed in (0, 0, 1):
        with tp.patching(gpt2, pairs) as p:
            drawn = p.resample(others, seed=seed, draws=3)
            for layer in range(3):
                with p.row(layer=layer):
                    p.corrupted.attn_out[layer, :] = drawn.attn_out[layer, :]
                    p.corrupted.z[layer, -1, 0] = drawn.z[layer, -1, 0] - p.clean.z[layer, -1, 0]
        result = agrees(p, gpt2)
        assert seed not in found or np.array_equal(found[seed], result["value"].values)
        found[seed] = result["value"].values
    assert not np.allclose(found[0], found[1])
    lengths = {len(ids) for ids in others.encode(gpt2.tokenizer).clean}
    assert len(lengths) > 1
    assert all(len(ids) >= 14 for world in p.references.values() for ids in world.ids), "long enough for any position"
    rows = {world.row_of for world in p.references.values()}
    assert len(rows) > 1, "draws differ"
    mean = tp.over_draws(result)
    np.testing.assert_allclose(mean["effect"], result["effect"].mean("draw"))
    np.testing.assert_allclose(mean["normalized"], mean["effect"] / (mean["clean"] - mean["corrupted"]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_noise_in_units_of_the_embedding(name: str) -> None:
    """Causal tracing with several draws: noised runs as worlds, their rows side by side, averaged in the end."""
    model, pairs = toy(name), ioi_pairs(3)
    pairs = tp.Pairs(pairs.clean, answer=pairs.answer, wrong=pairs.wrong)
    with tp.patching(model, pairs) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[2:5] += p.gaussian(3, of="embed", draws=4)
        noised.embed[1] += 0.1 + p.gaussian(0.5, seed=3) - p.gaussian(2, of=p.clean.embed[[3, 4]])
        for layer, pos in p.grid("resid_pre", pos=[3, -1]):
            with p.row(layer=layer, pos=pos):
                noised.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    result = agrees(p, model)
    assert result["effect"].dims == ("pair", "layer", "pos", "draw")
    assert result["noised"].dims == ("pair", "draw")
    assert result.attrs["base"] == "noised"
    std = torch.cat([Slow(module_of(model), p.encoded).values["clean", i]["embed", 0] for i in range(3)]).std()
    drawn = [job.writes[0].spread for world in p.plan.groups[0].edited for job in world]
    assert abs(float(torch.cat([s[0][1].tensor.flatten() for s in drawn]).std()) - 3) < 0.2
    assert float(std) > 0.01
    mean = tp.over_draws(result)
    np.testing.assert_allclose(mean["normalized"], mean["effect"] / (mean["clean"] - mean["noised"]))
    both = tp.over_draws(tp.over_pairs(result)), tp.over_pairs(tp.over_draws(result))
    np.testing.assert_allclose(both[0]["normalized"], both[1]["normalized"])
    assert both[0].attrs["averaged_draws"] == 4
    assert tp.over_draws(both[0]) is both[0]


def test_all_draws_of_a_world_run_side_by_side(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2)) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[3] += p.gaussian(3, of="embed", draws=5)
        after = p.world("after", of=noised)
        after.attn_out[1, -1] = noised.attn_out[1, -1] - p.clean.attn_out[1, -1]
        with p.row(name="on noise"):
            noised.resid_pre[1, 3] = p.clean.resid_pre[1, 3]
        with p.row(name="on a world of it"):
            after.resid_pre[1, 3] = p.clean.resid_pre[1, 3]
        with p.row(name="written elsewhere"):
            p.clean.resid_pre[1, -1] = noised.resid_pre[1, -1]
    assert len(p.rows) == 15
    assert [len(world) for world in p.plan.groups[0].edited] == [2] * 10
    result = agrees(p, gpt2)
    assert result["after"].dims == ("pair", "draw")
    assert all(p.edited[f"after_draw_{n}"].of == f"noised_draw_{n}" for n in range(1, 5))
    assert float(result["noised"].std("draw").min()) > 0.01, "draws differ"
    # Pristine worlds, five draws of one world together, five of the other after them.
    ops = p.plan.explain()
    assert "noised is clean with embed[3] += gaussian(3 × std of clean prompts.embed[:]" in ops
    assert "noised_draw_1 is" not in ops


def test_noise_of_no_width_changes_nothing(gpt2: Any) -> None:
    with tp.patching(gpt2, ioi_pairs(2), prune=False) as p:
        for number, noise in enumerate((p.gaussian(0.0), p.gaussian(0.0, of="embed"))):
            with p.row(number=number):
                p.clean.embed[:] += noise
    np.testing.assert_allclose(p.run()["effect"], 0, atol=1e-5)
    with tp.patching(gpt2, ioi_pairs(2)) as p, p.row():
        p.clean.embed[:] += p.gaussian(0.0, of="embed")
    assert p.plan.jobs == 0


def test_a_reference_runs_once_for_all_pairs_and_no_further_than_it_must(gpt2: Any) -> None:
    made = tasks.ioi(4, seed=2, templates=[tasks.TEMPLATES[0], tasks.TEMPLATES[1]])
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    others = tp.Pairs(tasks.ioi(9, seed=4, templates=tasks.TEMPLATES[:1]).clean, name="others")
    with tp.patching(gpt2, pairs) as p:
        for head in range(4):
            with p.row(head=head):
                p.clean.z[0, -9:, head] = p.mean(others).z[0, -9:, head]
    told = p.plan.explain()
    assert "1 for 9 prompts of references" in told
    assert "  reference    mean(others): values of z in 9 prompts" in told
    (survey,) = p.plan.surveys
    assert (survey.until, len(survey.runs)) == (1, 1)
    p.run()
    assert p.plan.measured["forwards"] == pytest.approx(p.plan.estimate.forwards, rel=0.25)


def test_patch_takes_a_reference_as_its_source(gpt2: Any) -> None:
    pairs, others = ioi_pairs(2), prompts()
    for source in (tp.mean(others), tp.resample(others, seed=2), tp.mean(others, over="positions")):
        found = tp.patch(gpt2, pairs, "z", source=source, direction="noising")
        with tp.patching(gpt2, pairs) as p:
            for layer, head in p.grid("z", by=("layer", "head")):
                with p.row(layer=layer, head=head):
                    p.clean.z[layer, :, head] = p.reference(source).z[layer, :, head]
        np.testing.assert_allclose(found["effect"], p.run()["effect"])
        assert found.attrs["written"] == str(source)
        assert '"prompts": ' in found.attrs["references"]


def test_a_reference_may_be_a_list_of_texts_and_takes_the_pairs_bos(gpt2: Any) -> None:
    llama, pairs, others = toy("llama"), ioi_pairs(1), prompts()
    texts = list(others.clean)
    for model in (gpt2, llama):
        with tp.patching(model, pairs) as p:
            for number, given in enumerate((others, texts)):
                with p.row(number=number):
                    p.clean.z[1, :, 1] = p.mean(given).z[1, :, 1]
        found = p.run()["effect"]
        np.testing.assert_array_equal(found.sel(number=0), found.sel(number=1))
    bare = tp.Pairs(pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, bos=False)
    with tp.patching(llama, bare) as p, p.row():
        p.clean.z[1, :, 1] = p.mean(texts).z[1, :, 1]
    assert [len(ids) for ids in p.references["mean(prompts)"].ids] == [
        len(ids) for ids in tp.Pairs(texts, bos=False).encode(llama.tokenizer).clean
    ]
    with pytest.raises(errors.RecipeError, match="so that positions would not line up"), tp.patching(llama, bare) as p:
        p.mean(tp.Pairs(texts, bos=True))


REFUSED = {
    "is no run, but values": lambda p, m: setattr_(m.z, (0, -1, 0), 0),
    "of= is a world of this recording that has a run": lambda p, m: p.world("x", of=m),
    "the longest prompt of the reference has": lambda p, m: setattr_(p.clean.z, (0, slice(None), 0), m.z[0, :, 0]),
    "has no mean of logits": lambda p, m: setattr_(p.clean.logits, (-1,), m.logits[-1]),
    "over is 'positions'": lambda p, m: p.mean(["When"], over="pos"),
    "no prompt can stand for pair 0": lambda p, m: p.resample(["When Mary"]),
    "how often to draw": lambda p, m: p.resample(["When Mary"], draws=0),
    "seed of resample is an integer": lambda p, m: p.resample(["When Mary"], seed=0.5),
    "has no standard deviation": lambda p, m: p.gaussian(1, of=m.z[0, 0]),
    "give all its sources the same draws": lambda p, m: setattr_(
        p.clean.embed, 3, p.gaussian(1, draws=2) + p.gaussian(1, draws=3)
    ),
    r"mean\('When Mary and John'\)\.resid_pre\[0, 40\]": lambda p, m: m.resid_pre[0, 40],
}


def setattr_(target: Any, index: Any, value: Any) -> None:
    target[index] = value


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_reference_is_not(gpt2: Any, message: str) -> None:
    short = ["When Mary and John"]
    with pytest.raises((errors.RecipeError, errors.SiteError), match=message):
        with tp.patching(gpt2, ioi_pairs(2)) as p, p.row(name="x"):
            REFUSED[message](p, p.mean(short))


def test_a_rows_own_draw_label_is_not_overwritten(gpt2: Any) -> None:
    with pytest.raises(errors.RecipeError, match="draws= labels rows with draw"):
        with tp.patching(gpt2, ioi_pairs(1)) as p, p.row(draw=3):
            p.clean.embed[3] += p.gaussian(1, draws=2)


def test_rotated_queries_of_other_positions_are_refused() -> None:
    model, pairs, others = toy("llama"), ioi_pairs(1), prompts()
    with tp.patching(model, pairs) as p:
        for number, pos in enumerate((14, slice(1, 15))):
            with p.row(number=number):
                p.clean.q[1, pos, 1] = p.mean(others).q[1, pos, 1]
                p.clean.k[0, pos, 1] = p.mean(pairs[0], over=None).k[0, pos, 1]
    agrees(p, model)
    for pos, over in ((-1, None), (slice(None), "positions"), (slice(-3, None), None)):
        with pytest.raises(errors.RecipeError, match="this model turns queries and keys"):
            with tp.patching(model, pairs) as p, p.row():
                p.clean.q[1, pos, 1] = p.mean(others, over=over).q[1, pos, 1]


def test_a_directory_knows_a_reference_by_its_prompts(gpt2: Any, tmp_path: Any) -> None:
    pairs = ioi_pairs(2)
    stored = []
    for seed in (0, 0, 1):  # prompts of one length: they differ in their tokens alone
        others = tp.Pairs(tasks.ioi(4, seed=seed, templates=tasks.TEMPLATES[:1]).clean)
        with tp.patching(gpt2, pairs, directory=tmp_path) as p:
            for layer in range(3):
                with p.row(layer=layer):
                    p.clean.attn_out[layer, -1] = p.mean(others).attn_out[layer, -1]
        stored.append(p.plan.measured["stored"])
        p.run()
    assert stored == [0, 6, 0]


def test_a_plan_with_references_needs_no_weights() -> None:
    model, pairs = tp.load(without_weights(module_of(toy("gpt2")).config), toy("gpt2").tokenizer), ioi_pairs(1)
    with tp.patching(model, pairs) as p:
        noised = p.world("noised", of=p.clean)
        noised.embed[3] += p.gaussian(3, of="embed")
        with p.row():
            noised.z[1, :, 3] = p.mean(prompts()).z[1, :, 3]
    assert "mean(others): values of z in 5 prompts" in p.plan.explain()


def test_a_server_averages_there(server: Server) -> None:  # noqa: F811
    made = tasks.ioi(4, seed=2, templates=[tasks.TEMPLATES[0], tasks.TEMPLATES[1]])
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)

    def record(p: tp.Patching) -> None:
        noised = p.world("noised", of=p.clean)
        noised.embed[[1, 3]] += p.gaussian(2, of="embed", draws=2)
        for layer in range(3):
            with p.row(layer=layer, kind="mean"):
                p.corrupted.z[layer] = p.mean(prompts(), over="positions").z[layer]
            with p.row(layer=layer, kind="end"):
                p.corrupted.attn_out[layer, -1] = p.mean(prompts()).attn_out[layer, -1]
            with p.row(layer=layer, kind="noise"):
                noised.resid_pre[layer, 3] = p.clean.resid_pre[layer, 3]

    values = []
    for model in (toy("gpt2"), away()):
        with tp.patching(model, pairs) as p:
            record(p)
        result = p.run()
        values.append([result[name]["value"].values for name in sorted(result.children)])
    for here, there in zip(*values, strict=True):
        np.testing.assert_allclose(there, here, atol=1e-5, rtol=1e-7 if DEVICE == "cpu" else 1e-5)
    assert server.jobs == 1
    assert server.runs["add"] == sum(len(s.runs) for s in p.plan.surveys) * len(p.plan.groups)
    assert "reference" in p.plan.explain()


def test_encoder_decoder_models_take_means_of_the_decoder() -> None:
    model = tiny("t5")
    pairs = tp.Pairs(["w1 w2 w3"], ["w4 w5"], ["w9"], ["w8"], decoder=["w3 w7"])
    others = tp.Pairs(["w5 w6 w7 w9", "w11 w12"], decoder=["w3 w8", "w2 w6"])
    with tp.patching(model, pairs) as p:
        for layer in range(2):
            with p.row(layer=layer):
                p.clean.cross_attn_out[layer, :] = p.mean(others).cross_attn_out[layer, :]
                p.clean.z[layer, -1, 1] = p.mean(others).z[layer, -1, 1]
    # The softmax of a T5 is of float32 even in a model of float64, and the oracle's is that of the CPU.
    agrees(p, model, 1e-8 if DEVICE == "cpu" else 1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scripts_take_means_and_noise_themselves(name: str, tmp_path: Path) -> None:
    """Each row as plain nnsight, which runs the prompts of a reference one by one."""
    model, pairs = toy(name), ioi_pairs(2)
    alike = tp.Pairs(tasks.ioi(3, seed=5, templates=tasks.TEMPLATES[:1]).clean)
    with tp.patching(model, pairs) as p:
        mean, over = p.mean(prompts()), p.mean(prompts(), over="positions")
        noised = p.world("noised", of=p.clean)
        noised.embed[2:5] += p.gaussian(3, of="embed", draws=2)
        noised.z[0, -1, 1] = mean.z[0, -1, 1]
        edits = (
            lambda: setattr_(p.clean.resid_pre, (1, slice(None)), mean.resid_pre[1, :]),
            lambda: setattr_(p.clean.z, (0, slice(-4, None), [0, 2]), mean.z[0, -4:, [0, 2]]),
            lambda: setattr_(p.corrupted.z, (1, [2, -1], 3), mean.z[1, [2, -1], 3] - over.z[1, 1:, 3]),
            lambda: setattr_(p.clean.v, (1, slice(2, 9)), over.v[1, 1:]),
            lambda: setattr_(p.clean.q_in, (1, -1, [0, 1]), mean.q_in[1, -1, [0, 1]]),
            lambda: setattr_(p.clean.pattern, (1, 2, -1), p.mean(alike).pattern[1, 2, -1]),
            lambda: setattr_(p.clean.pattern, (1, [0, 2], slice(3, None)), p.mean(alike).pattern[1, [0, 2], 3:]),
            lambda: setattr_(p.clean.attn_out, (1, -1), p.resample(prompts(), seed=4).attn_out[1, -1]),
        )
        for number, edit in enumerate(edits):
            with p.row(number=number):
                edit()
        with p.row(number=20):
            p.clean.resid_pre[1, -1] += p.gaussian(2, of=p.clean.z[1, 3:, 1])
        with p.row(number=21):
            noised.resid_pre[1, 3] = p.clean.resid_pre[1, 3]
    found = p.run()
    scale = 30
    for row, wanted in zip(p.rows, values(p, found), strict=True):
        text = row.as_nnsight(1)
        given = {n: v for n, v in handed(p, row).items() if f" {n}" in text.split("def patched(")[1].split("\n")[0]}
        value, _ = run(text, tmp_path / f"reference_{name}_{row.number}.py", model, **given)
        assert abs(value - wanted[1]) < 1e-5 * scale, f"{row}: {value} instead of {wanted[1]}\n{text}"
