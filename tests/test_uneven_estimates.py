"""Attribution, audits and searches on pairs of unequal length: differences are taken between partners, or refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from slow import Sides, uneven_pairs, untouched
from test_attribution import WORDS, model_of
from tiny_models import tokenizer

import tracepatch as tp
from tracepatch import plots
from tracepatch.errors import RecipeError
from tracepatch.plan import Status
from tracepatch.sources import OTHER

PAIRS, SIDES = uneven_pairs(WORDS)
DIRECTIONS = {"corrupted": "denoising", "clean": "noising"}


@cache
def streams(name: str, world: str, pair: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The stream entering each layer of one prompt, and the logit difference's gradient by it, by autograd alone."""
    encoded = PAIRS.encode(tokenizer())
    module = untouched(model_of(name)._module)
    out = module(torch.tensor([encoded.world(world)[pair]]), output_hidden_states=True)
    entering = out.hidden_states[:-1]
    gap = out.logits[0, -1, list(encoded.answer[pair])].mean() - out.logits[0, -1, list(encoded.wrong[pair])].mean()
    slopes = torch.autograd.grad(gap, entering)
    return [x[0].detach() for x in entering], [x[0] for x in slopes]


def partners(side: Sides, base: str) -> dict[int, int]:
    """Position of the base → its partner in the other prompt."""
    return dict(side.links) if base == "clean" else {b: a for a, b in side.links.items()}


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_differences_are_taken_between_partners(base: str) -> None:
    """(other at the partner − base) · gradient, by indices written by hand; what has no partner is absent."""
    model, direction = model_of("gpt2"), DIRECTIONS[base]
    found = tp.attribute(model, PAIRS, "resid_pre", direction=direction)  # type: ignore[arg-type]
    whole = tp.attribute(model, PAIRS, "resid_pre", direction=direction, by="layer")  # type: ignore[arg-type]
    for pair, side in enumerate(SIDES):
        (here, slopes), (there, _) = streams("gpt2", base, pair), streams("gpt2", OTHER[base], pair)
        met = partners(side, base)
        for layer in range(len(here)):
            cells = {p: float(slopes[layer][p] @ (there[layer][q] - here[layer][p])) for p, q in met.items()}
            for pos in found["pos"].values.tolist():
                cell = found.sel(pair=pair, layer=layer, pos=pos)
                if pos in met:
                    np.testing.assert_allclose(cell["estimate"], cells[pos], atol=1e-7)
                else:
                    assert np.isnan(cell["estimate"])
                    assert cell["status"] == Status.ABSENT
            np.testing.assert_allclose(whole["estimate"].sel(pair=pair, layer=layer), sum(cells.values()), atol=1e-7)
    assert abs(found["estimate"]).max() > 0.01


def test_integrals_reach_the_exact_effect() -> None:
    """Of an edit of one site they converge to what the exact patch does, between whatever positions."""
    model = model_of("gpt2")
    how = tp.IntegratedGradients(steps=8, along="site")
    for component, by in (("resid_pre", ("layer", "pos")), ("z", ("layer", "head")), ("pattern", ("layer", "head"))):
        exact = tp.patch(model, PAIRS, component, by=by)
        found = tp.attribute(model, PAIRS, component, by=by, estimator=how)
        assert exact["effect"].dims == found["estimate"].dims
        np.testing.assert_allclose(found["estimate"], exact["effect"], atol=2e-3 * float(abs(exact["effect"]).max()))
        assert [exact[name].values.tolist() for name in ("token", "corrupted_token") if name in exact.coords] == [
            found[name].values.tolist() for name in ("token", "corrupted_token") if name in found.coords
        ]
    held = tp.patch(model, PAIRS, "pattern", by=("layer", "head"), source=0.1, only={"layer": [1]})
    found = tp.attribute(model, PAIRS, "pattern", by=("layer", "head"), source=0.1, only={"layer": [1]}, estimator=how)
    np.testing.assert_allclose(found["estimate"], held["effect"], atol=2e-3 * float(abs(held["effect"]).max()))


@pytest.mark.parametrize("how", [tp.AtP(), tp.RelP()])
def test_every_pair_alone_gives_the_same(how: Any) -> None:
    """Pairs of several lengths in one call, in few runs, are those pairs one by one; metrics may compare prompts."""
    model = model_of("gemma2")
    metrics = [tp.logit_diff, tp.kl]
    for component in ("z", "mlp_act"):
        found = tp.attribute(model, PAIRS, component, metrics, by=("layer",), estimator=how)
        for pair in (1, 2):
            alone = tp.attribute(model, PAIRS[pair], component, metrics, by=("layer",), estimator=how)
            for name in ("estimate", "base", "clean", "corrupted"):
                np.testing.assert_allclose(found[name].isel(pair=pair), alone[name].isel(pair=0), atol=1e-9)


def test_audits_and_searches_patch_partners() -> None:
    model = model_of("gpt2")
    exact = tp.patch(model, PAIRS, "resid_pre")
    estimate = tp.attribute(model, PAIRS, "resid_pre")
    audit = tp.audit(model, PAIRS, estimate, top=6, sample=6)
    known = audit["effect"].notnull()
    assert known.sum() > 20
    np.testing.assert_allclose(audit["effect"].where(known), exact["effect"].where(known), atol=1e-9)
    pair, layer = 1, 1
    (here, _), (there, _) = streams("gpt2", "corrupted", pair), streams("gpt2", "clean", pair)
    sizes = audit["patch_size"].sel(pair=pair, layer=layer)
    met = partners(SIDES[pair], "corrupted")
    seen = [pos for pos in sizes["pos"].values.tolist() if not np.isnan(sizes.sel(pos=pos))]
    for pos in seen:
        change, own = there[layer][met[pos]] - here[layer][pos], here[layer][pos]
        size = float(change.norm() / own.norm())
        np.testing.assert_allclose(sizes.sel(pos=pos), size, rtol=1e-6)
    assert seen

    best = tp.verified_top(model, PAIRS, "resid_pre", k=3, tolerance=0.0)
    order = np.sort(abs(tp.over_pairs(exact)["normalized"]).values.ravel())[::-1]
    ranked = abs(tp.over_pairs(best)["normalized"]).where(best["verified"] > 0).values.ravel()
    np.testing.assert_allclose(np.sort(ranked[~np.isnan(ranked)])[::-1], order[:3], atol=1e-9)

    tree = tp.drill(model, PAIRS, "resid_pre", top=2)
    fine = tree["layer_pos"].to_dataset()
    there_too = fine["effect"].notnull()
    np.testing.assert_allclose(fine["effect"].where(there_too), exact["effect"].where(there_too), atol=1e-9)
    assert fine["token"].values.tolist() == exact["token"].values.tolist()
    assert fine["corrupted_token"].values.tolist() == exact["corrupted_token"].values.tolist()


@pytest.mark.parametrize("function", [tp.direct_attribution, tp.attention_attribution])
@pytest.mark.parametrize("world", ["clean", "corrupted"])
def test_what_looks_at_one_run_does_not_mind_the_other(world: Any, function: Any) -> None:
    """The same prompts in pairs without corrupted ones, of one length in each call."""
    model = model_of("gpt2")
    metrics = [tp.logit_diff, tp.kl] if function is tp.direct_attribution else [tp.logit_diff]  # kl keeps both runs
    found = function(model, PAIRS, metrics, world=world)
    name = "share" if "share" in found else "estimate"
    for pair, prompt in enumerate(PAIRS.clean if world == "clean" else PAIRS.corrupted or ()):
        one = slice(pair, pair + 1)
        alone = function(model, tp.Pairs([prompt], None, PAIRS.answer[one], PAIRS.wrong[one]))
        ours, theirs = found[name].isel(pair=pair), alone[name].isel(pair=0)
        ours = ours.isel(metric=0) if "metric" in ours.dims else ours
        theirs = theirs.reindex({dim: ours[dim] for dim in ours.dims if dim in ("dest", "src")})
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_spans_are_estimated_as_the_sum_of_their_tokens() -> None:
    model = model_of("gpt2")
    pairs = tp.Pairs(
        ["w31 w32 w33 w34 w35 w36"],
        ["w41 w33 w34 w45 w46 w36"],
        "w50",
        "w51",
        align={0: 0, 2: 1, 3: 2, 4: 4, 5: 5},
        spans={"first": [("w31 w32", "w41")], "late": [("w34 w35", "w34 w45 w46")]},
    )
    spans = tp.attribute(model, pairs, "mlp_out", by=("layer", "span"))
    by_token = tp.attribute(model, pairs, "mlp_out")
    np.testing.assert_allclose(
        spans["estimate"].sel(span="late"), by_token["estimate"].sel(pos=[2, 4]).sum("pos"), atol=1e-9
    )
    np.testing.assert_allclose(spans["estimate"].sel(span="first"), by_token["estimate"].sel(pos=0), atol=1e-9)
    audit = tp.audit(model, pairs, spans, top=3, sample=2)
    exact = tp.patch(model, pairs, "mlp_out", by=("layer", "span"))
    known = audit["effect"].notnull()
    np.testing.assert_allclose(audit["effect"].where(known), exact["effect"].where(known), atol=1e-9)


@pytest.mark.parametrize("pair", [0, 1, 2, 3])
def test_edges_are_patched_between_partners(pair: int) -> None:
    """Of the row that is recorded for an edge, against the sum over positions that is written out by hand."""
    ends = {("L0H1", "MLP 1"): (("head_out", (0, 1)), "mlp_in"), ("MLP 0", "L1H2.q"): (("mlp_out", (0,)), "q_in")}
    with tp.patching(model_of("gpt2"), PAIRS[pair]) as p:
        tp.edge_rows(p, list(ends))
        for number, ((writer, (layer, *head)), reader) in enumerate(ends.values()):
            with p.row(by_hand=number):
                for here, there in partners(SIDES[pair], "corrupted").items():
                    into = (1, here, 2) if reader == "q_in" else (1, here)
                    mine = getattr(p.corrupted, writer)[(layer, here, *head)]
                    others = getattr(p.clean, writer)[(layer, there, *head)]
                    getattr(p.corrupted, reader)[into] += others - mine
    tree = p.run()
    named = tree["writer_reader"].to_dataset()["effect"].isel(pair=0)
    edges = [float(named.sel(writer=w, reader=r)) for w, r in ends]
    np.testing.assert_allclose(edges, tree["by_hand"]["effect"].isel(pair=0), atol=1e-9)
    assert np.abs(edges).max() > 1e-4


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_estimates_of_edges_are_those_of_the_rows_of_edges(base: str) -> None:
    """All at once, against the first-order term of each recorded row; summed and by position, of two architectures."""
    direction: Any = DIRECTIONS[base]
    for name in ("gpt2", "gemma2"):
        model = model_of(name)
        found = tp.edges(model, PAIRS, direction=direction)["estimate"]
        both = found.stack(edge=("writer", "reader")).dropna("edge")
        chosen = both["edge"].values.tolist()[:: max(1, both.sizes["edge"] // 12)]
        with tp.patching(model, PAIRS) as p:
            tp.edge_rows(p, chosen, direction=direction)
        rows = p.estimate()["estimate"]
        rows = (
            rows.set_index(row=["writer", "reader"]).rename(row="edge")
            if "row" in rows.dims
            else rows.stack(edge=("writer", "reader"))
        )
        for edge in chosen:
            np.testing.assert_allclose(both.sel(edge=edge), rows.sel(edge=edge), atol=1e-9, err_msg=str(edge))
        assert abs(both.sel(edge=chosen)).max() > 1e-4
        placed = tp.edges(model, PAIRS, direction=direction, by_position=True)
        by_position = placed["estimate"]
        np.testing.assert_allclose(by_position.sum("pos").where(found.notnull()), found, atol=1e-9)
        for pair, side in enumerate(SIDES):
            met = partners(side, base)
            there = by_position.sel(pair=pair).isel(writer=0, reader=-1).notnull()
            assert [pos for pos in placed["pos"].values.tolist() if there.sel(pos=pos)] == sorted(met)
            clean, corrupted = (ids[pair].split() for ids in (PAIRS.clean, PAIRS.corrupted or ()))
            words = {"token": clean, "corrupted_token": corrupted}
            mine, others = ("corrupted_token", "token") if base == "corrupted" else ("token", "corrupted_token")
            for here, partner in met.items():
                at = placed.isel(pair=pair).sel(pos=here)
                assert (at[mine].item(), at[others].item()) == (words[mine][here], words[others][partner])


@pytest.mark.parametrize("base", ["corrupted", "clean"])
def test_all_at_once_is_row_by_row(base: str) -> None:
    """Of every component that is estimated as a whole, from the worlds' values at once, with its labels and absences."""
    model, direction = model_of("gemma2"), DIRECTIONS[base]
    for component in ("resid_mid", "q_in", "v", "mlp_act", "attn_in_scale"):
        by = tp.COMPONENTS[component].index
        found = tp.attribute(model, PAIRS, component, by=by, direction=direction)  # type: ignore[arg-type]
        live, other = ("corrupted", "clean") if base == "corrupted" else ("clean", "corrupted")
        with tp.patching(model, PAIRS) as p:
            for index in p.grid(component, by, base=getattr(p, live)):
                with p.row(**dict(zip(by, index, strict=True))):
                    getattr(getattr(p, live), component)[index] = getattr(getattr(p, other), component)[index]
        rows = p.estimate()
        for name in ("estimate", "normalized"):
            np.testing.assert_allclose(found[name], rows[name], atol=1e-7, err_msg=f"{component} {name}")
        assert found["token"].values.tolist() == rows["token"].values.tolist()
        assert found["corrupted_token"].values.tolist() == rows["corrupted_token"].values.tolist()


def test_what_flows_sums_to_the_estimate_of_the_values() -> None:
    model = model_of("gpt2")
    flow = tp.value_flow(model, PAIRS)
    found = tp.attribute(model, PAIRS, "v", by=("layer", "pos"))
    wanted = found["estimate"].rename(pos="src")
    whole = flow["estimate"].sum(("dest", "head"), skipna=True)
    np.testing.assert_allclose(whole.where(wanted.notnull()), wanted, atol=1e-8)
    assert (flow["estimate"].notnull().any(("dest", "head")) == wanted.notnull()).all()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_sweeps_of_several_sites_patch_partners(direction: Any) -> None:
    """Windows of one layer are single patches, and sets are rows with partners written by hand."""
    model, base = model_of("gpt2"), {v: k for k, v in DIRECTIONS.items()}[direction]
    for options in ({}, {"source": 0}, {"only": {"pos": [2]}, "by": ("layer",)}):
        one = tp.patch(model, PAIRS, "mlp_out", direction=direction, **options)  # type: ignore[arg-type]
        window = tp.sweeps.windows(model, PAIRS, "mlp_out", 1, direction=direction, **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(window["effect"], one["effect"], atol=1e-9)
        assert one.coords.get("pos") is None or (one["token"] == window["token"]).all()
    sets = {"both": [("mlp_out", 0, 2), ("z", 1, slice(None), 3)], "late": [("mlp_out", 1, 2), ("mlp_out", 1, 0)]}
    found = tp.sweeps.together(model, PAIRS, sets, direction=direction)["effect"]
    with tp.patching(model, PAIRS[0]) as p:
        mine, other = getattr(p, base), getattr(p, OTHER[base])
        met = partners(SIDES[0], base)
        with p.row(set="both"):
            mine.mlp_out[0, 2] = other.mlp_out[0, met[2]]
            mine.z[1, sorted(met), 3] = other.z[1, [met[q] for q in sorted(met)], 3]
        with p.row(set="late"):
            mine.mlp_out[1, 2] = other.mlp_out[1, met[2]]
            mine.mlp_out[1, 0] = other.mlp_out[1, met[0]]
    np.testing.assert_allclose(found.isel(pair=0), p.run()["effect"].isel(pair=0), atol=1e-9)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("edges", lambda m: tp.edges(m, PAIRS, estimator=tp.IntegratedGradients(steps=2))),
        ("counted from 0", lambda m: tp.edges(m, PAIRS, only={"pos": -1})),
        ("tp.gradients", lambda m: tp.gradients(m, PAIRS)),
        ("slices", lambda m: tp.value_flow(m, PAIRS, only={"src": slice(2)})),
        ("AtP\\*", lambda m: tp.attribute(m, PAIRS, "v", estimator=tp.AtPStar())),
        ("integrated", lambda m: tp.attribute(m, PAIRS, "z", estimator=tp.IntegratedGradients(steps=2))),
        ("value_bias", lambda m: tp.attribute(m, PAIRS, "pattern", value_bias=False)),
    ],
)
def test_what_is_not_aligned_is_refused(what: str, call: Any) -> None:
    with pytest.raises(RecipeError, match=what):
        call(model_of("gpt2"))


def test_rotated_queries_are_refused_in_estimates_too() -> None:
    with pytest.raises(RecipeError, match="turn"):
        tp.attribute(model_of("llama"), PAIRS, "k")


def test_pictures_and_intervals_of_unequal_lengths() -> None:
    effects = tp.patch(model_of("gpt2"), PAIRS, "resid_pre")
    mean = tp.over_pairs(effects)
    np.testing.assert_allclose(mean["effect"], np.nanmean(effects["effect"], 0), atol=1e-12)
    figure = plots.heatmap(effects)
    assert figure.axes
    found = tp.intervals(effects, seed=0)
    both = found["low"] <= found["high"] if "low" in found else mean["effect"].notnull()
    assert both.any()


def test_answers_of_several_tokens_stand_at_the_end_of_both_prompts() -> None:
    """The appended tokens correspond one by one: a map that goes on behind both prompts gives the same."""
    model = model_of("gpt2")
    answers = ["w50 w51 w52", "w41", "w45 w44", "w33 w34 w35"]
    pairs = tp.Pairs(PAIRS.clean, PAIRS.corrupted, answers, align=[dict(side.links) for side in SIDES])
    found = tp.patch(model, tp.continued(pairs), "resid_pre", tp.continuation, by="layer")
    for pair, (side, answer) in enumerate(zip(SIDES, answers, strict=True)):
        *before, last = answer.split()
        clean, corrupted = (ids[pair].split() for ids in (PAIRS.clean, PAIRS.corrupted or ()))
        links = {**side.links, **{len(clean) + i: len(corrupted) + i for i in range(len(before))}}
        longer = tp.Pairs(" ".join([*clean, *before]), " ".join([*corrupted, *before]), last, align=links)
        vocab = model.tokenizer(answer, add_special_tokens=False)["input_ids"]

        def said(logits: torch.Tensor, ids: list[int] = vocab) -> torch.Tensor:
            own = logits.log_softmax(-1)
            return sum((own[:, i, t] for i, t in enumerate(ids)), torch.zeros_like(own[:, 0, 0]))

        metric = tp.metric(said, "said", positions=slice(-len(vocab), None))
        by_hand = tp.patch(model, longer, "resid_pre", metric, by="layer")
        np.testing.assert_allclose(found["value"].isel(pair=pair), by_hand["value"].isel(pair=0), atol=1e-6)
