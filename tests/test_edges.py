"""Edges: what the textbook says of each, the sums that they must have, and exact patches of some of them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from test_attribution import BASES, EVERYWHERE, FOUR, PAIRS, book, encoded, gap, model_of, rounding, surprise
from textbook import Node, of_unit

import tracepatch as tp
from tracepatch import backward, heads
from tracepatch.errors import ComponentError, RecipeError, SiteError
from tracepatch.graph import graph_of
from tracepatch.plan import Status
from tracepatch.toys.wired import LENGTH, wired, wired_pairs

ENDS = {"resid_pre": "embed", "logits_in": "logits_in"}  # the oracle's names, of layer 0
OWN = ("gpt_neo", "gptj")  # whose heads' readers the oracle does not see


def nodes(dataset: xr.Dataset, side: str) -> list[Node]:
    """Writers or readers as the oracle has them."""
    parts = (dataset[f"{side}_{what}"].values.tolist() for what in ("component", "layer", "head"))
    return [
        (ENDS.get(c, c), 0 if c in ENDS else layer, None if head < 0 else head)
        for c, layer, head in zip(*parts, strict=True)
    ]


def alike(dataset: xr.Dataset, pair: int, expected: dict[tuple[Node, Node], torch.Tensor], tolerance: float) -> None:
    """The dataset has these edges at every position, and no others."""
    writers, readers = nodes(dataset, "writer"), nodes(dataset, "reader")
    found = dataset["estimate"].sel(pair=pair).transpose("writer", "reader", "pos").values
    length = len(encoded().clean[pair])
    scale = max(1.0, *(float(v.abs().max()) for v in expected.values()))
    known = set()
    for (writer, reader), values in expected.items():
        i, j = writers.index(writer), readers.index(reader)
        known.add((i, j))
        np.testing.assert_allclose(found[i, j, :length], values.numpy(), atol=tolerance * scale, rtol=0, err_msg=f"{writer} to {reader}")  # fmt: skip
        assert np.isnan(found[i, j, length:]).all()
    others = [(i, j) for i in range(len(writers)) for j in range(len(readers)) if (i, j) not in known]
    assert all(np.isnan(found[i, j]).all() for i, j in others)


@cache
def textbook(name: str, pair: int, base: str, method: str = "eap", rule: str = "left") -> dict[Any, torch.Tensor]:
    clean, corrupted = torch.tensor(encoded().clean[pair]), torch.tensor(encoded().corrupted[pair])
    return book(name).edges(clean, corrupted, gap(pair), base, method, n=2, rule=rule)


def by_hand(name: str, dataset: xr.Dataset, pair: int, base: str) -> dict[tuple[Node, Node], torch.Tensor]:
    """The oracle's difference of each writer times its gradient at each reader; ``embed`` is what enters a block."""
    t = book(name)
    sides = {"clean": torch.tensor(encoded().clean[pair]), "corrupted": torch.tensor(encoded().corrupted[pair])}
    ids = sides.pop(base)
    (other,) = sides.values()
    change, slopes = t.change(ids, other), t.gradients(ids, gap(pair))
    change["embed", 0] = change["resid_pre", 0]
    return {
        (writer, reader): (of_unit(change, writer) * of_unit(slopes, reader)).sum(-1)
        for writer in nodes(dataset, "writer")
        for reader in nodes(dataset, "reader")
        if t.reaches(writer, reader)
    }


# ------------------------------------------------------------------------------------------------- the textbook


BOTH = [(n, d) for n in FOUR for d in BASES if d == "denoising" or n == "gemma2"]
BOTH += [pytest.param(n, "noising", marks=pytest.mark.slow) for n in FOUR if n != "gemma2"]  # type: ignore[list-item]


@pytest.mark.parametrize(("name", "direction"), BOTH)
def test_edges_are_those_of_the_textbook(name: str, direction: Any) -> None:
    dataset = tp.edges(model_of(name), PAIRS, direction=direction, by_position=True)
    for pair in range(len(PAIRS)):
        alike(dataset, pair, textbook(name, pair, BASES[direction]), rounding(name))


@pytest.mark.parametrize("direction", BASES)
@pytest.mark.parametrize("name", [n for n in EVERYWHERE if n not in FOUR])
def test_edges_of_every_architecture(name: str, direction: Any) -> None:
    """Whatever it offers; where heads are not offered, attention as a whole."""
    if name in OWN:
        pytest.skip("the oracle sees attention as a whole, and the library its heads")
    dataset = tp.edges(model_of(name), PAIRS, direction=direction, by_position=True)
    for pair in range(len(PAIRS)):
        alike(dataset, pair, by_hand(name, dataset, pair, BASES[direction]), rounding(name))


LINES = [("inputs", "left"), ("layer", "right"), ("inputs", "midpoint"), ("layer", "midpoint")]
QUICK = {("gpt2", LINES[1]), ("llama", LINES[0]), ("gemma2", LINES[0]), ("gpt_neox", LINES[0])}
INTEGRATED = [
    pytest.param(name, *line, marks=() if (name, line) in QUICK else pytest.mark.slow)
    for name in FOUR
    for line in LINES
]


@pytest.mark.parametrize(("name", "along", "rule"), INTEGRATED)
def test_integrated_gradients_are_those_of_the_textbook(name: str, along: Any, rule: Any) -> None:
    method = {"inputs": "ig_inputs", "layer": "ig_own"}[along]
    how = tp.IntegratedGradients(2, along=along, rule=rule)
    dataset = tp.edges(model_of(name), PAIRS[:1], direction="noising", estimator=how, by_position=True)
    alike(dataset, 0, textbook(name, 0, "clean", method, rule), rounding(name))


def test_models_that_change_what_has_passed_by() -> None:
    """Falcon adds in place; its heads' readers are not offered, so attention reads as a whole."""
    dataset = tp.edges(model_of("falcon"), PAIRS, by_position=True)
    assert {"attn_in", "mlp_in", "logits_in"} == set(dataset["reader_component"].values.tolist())
    alike(dataset, 0, by_hand("falcon", dataset, 0, "corrupted"), 1e-11)


# ------------------------------------------------------------------------------------------------- laws


def sums(name: str, direction: Any, tolerance: float, estimator: Any = None) -> None:
    """Over readers the writer's own estimate, over writers that of what the reader reads (law 21)."""
    model = model_of(name)
    given: dict[str, Any] = {"direction": direction, "estimator": estimator}
    found = tp.edges(model, PAIRS, **given)
    assert json.loads(found.attrs["missing"]) == []
    for side, other in (("writer", "reader"), ("reader", "writer")):
        total = found["estimate"].sum(other)
        alike_by: dict[tuple[str, ...], list[str]] = {}
        for component in dict.fromkeys(found[f"{side}_component"].values.tolist()):
            by = tuple(dim for dim in tp.COMPONENTS[component].index if dim != "pos") or ("pos",)
            alike_by.setdefault(by, []).append(component)
        for by, components in alike_by.items():
            whole = tp.attribute(model, PAIRS, components, by=by, **given)["estimate"].fillna(0)
            whole = whole.sum("pos") if "pos" in whole.dims else whole
            scale = max(1.0, float(abs(whole).max()))
            for node in total[side].values:
                at = {d: found[f"{side}_{d.replace('kv_', '')}"].sel({side: node}).item() for d in by if d != "pos"}
                kind = found[f"{side}_component"].sel({side: node}).item()
                if kind in components:
                    expected = whole.sel(at | ({"component": kind} if len(components) > 1 else {}))
                    np.testing.assert_allclose(total.sel({side: node}), expected, atol=tolerance * scale, err_msg=node)


@pytest.mark.parametrize(("name", "direction"), BOTH)
def test_edges_sum_to_nodes(name: str, direction: str) -> None:
    sums(name, direction, {"gpt2": 1e-9}.get(name, 1e-5))


@pytest.mark.parametrize("name", [*(n for n in EVERYWHERE if n not in FOUR), pytest.param("mamba", marks=pytest.mark.slow)])  # fmt: skip
def test_edges_of_every_architecture_sum_to_nodes(name: str) -> None:
    sums(name, "denoising", 1e-5)


@pytest.mark.parametrize(
    "estimator",
    [tp.AtP(hold=("norms", "pattern")), tp.RelP(), tp.IntegratedGradients(3)],
    ids=["held", "RelP", "integrated"],
)
def test_edges_sum_to_nodes_however_they_are_estimated(estimator: Any) -> None:
    sums("gpt2", "denoising", 1e-9, estimator)


def test_integrated_along_its_own_line_a_writer_sums_to_its_own_estimate() -> None:
    how, model = tp.IntegratedGradients(3, along="layer"), model_of("gpt2")
    found = tp.edges(model, PAIRS, estimator=how)["estimate"].sum("reader")
    own = tp.attribute(model, PAIRS, "mlp_out", by=("layer",), estimator=how)["estimate"]
    np.testing.assert_allclose(found.sel(writer="MLP 1"), own.sel(layer=1), atol=1e-9)
    attention = tp.attribute(model, PAIRS, "attn_out", by=("layer",), estimator=how)["estimate"]
    together = found.sel(writer=[f"L1H{head}" for head in range(4)]).sum("writer")
    np.testing.assert_allclose(together, attention.sel(layer=1), atol=1e-9)


def test_what_cannot_be_told_apart_takes_a_backward_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of several heads, as behind a norm over all of them, and of a single one: the same numbers."""
    quick = tp.edges(model_of("llama"), PAIRS)
    seen = []
    own = heads.owners
    monkeypatch.setattr(heads, "owners", lambda *given: seen.append(own(*given)) or None)
    slow = tp.edges(model_of("llama"), PAIRS)
    assert all(found is not None for found in seen)
    np.testing.assert_allclose(quick["estimate"], slow["estimate"], atol=1e-12)
    seen.clear()
    tp.edges(model_of("olmo2"), PAIRS)
    assert [found is None for found in seen] == [True, True, False] * 6, "queries and keys are normed together"


def test_columns_of_heads_wherever_they_stand() -> None:
    """Blocks, interleaved, scattered, and fewer of one head than of another."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 5, generator=generator)
    for owner in (
        [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1],
        [0, 0, -1, -1, 1, 1, -1, -1, 2, 2, -1, -1],
        [-1, 2, 2, 2, -1, 1, 1, 1, -1, 0, 0, 0],
        [0, 1, 2, 0, 1, 2, -1, 0, 1, 2, 0, 1],
        [1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2],
    ):
        part = torch.randn(2, 3, 12, generator=generator) * (torch.tensor(owner) >= 0)
        for stored in (weight, weight.T.contiguous().T):
            found = heads.by_columns(part, torch.tensor(owner), stored, 3)
            for head in range(3):
                alone = part * (torch.tensor(owner) == head)
                torch.testing.assert_close(found[head], alone @ weight)


def test_nothing_as_large_as_edges_and_positions_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one component are there at a time, and differences of all writers, of every pair."""
    sizes = []

    def watched(changes: torch.Tensor, slopes: torch.Tensor, by_position: bool) -> torch.Tensor:
        found = backward_products(changes, slopes, by_position)
        sizes.append((slopes.shape[1], changes.numel() // changes.shape[0], found.numel() // changes.shape[0]))
        return found

    backward_products = backward.products
    monkeypatch.setattr(backward, "products", watched)
    found = tp.edges(model_of("gpt2"), PAIRS[:2])
    assert max(readers for readers, *_ in sizes) == 4, "one component of one layer"
    assert sum(readers for readers, *_ in sizes) == found.sizes["reader"]
    assert max(numbers for _, numbers, _ in sizes) <= found.sizes["writer"] * 7 * 32
    assert max(numbers for *_, numbers in sizes) <= found.sizes["writer"] * 4


# ------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("gpt2", {"layers": 12, "n_head": 12, "n_embd": 24}, 32491), ("gpt2", {"layers": 3}, 262), ("gpt_neox", {}, 250)],
    ids=str,
)
def test_how_many_edges_there_are(name: str, options: dict[str, Any], count: int) -> None:
    graph = graph_of(tp.Architecture(tp.load(tiny_models.build(name, **options), tiny_models.tokenizer())))
    assert sum(graph.joined(writer, reader) for writer in graph.writers for reader in graph.readers) == count


def test_names_and_places() -> None:
    found = tp.edges(model_of("llama"), PAIRS)
    writers, readers = found["writer"].values.tolist(), found["reader"].values.tolist()
    assert writers[:6] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "MLP 0"]
    assert readers[:9] == [*(f"L0H{h}.q" for h in range(4)), "L0KV0.k", "L0KV1.k", "L0KV0.v", "L0KV1.v", "MLP 0"]
    assert readers[-1] == "logits"
    at = found.sel(writer="L1H2", reader="L2KV1.v")
    assert (str(at.writer_component.values), int(at.writer_layer), int(at.writer_head)) == ("head_out", 1, 2)
    assert (str(at.reader_component.values), int(at.reader_layer), int(at.reader_head)) == ("v_in", 2, 1)
    assert int(found.sel(writer="embed").writer_head) == -1
    assert int(found.sel(reader="logits").reader_layer) == 3


def test_a_parallel_block_has_no_edge_from_its_heads_to_its_mlp() -> None:
    beside = {"writer": "L1H2", "reader": "MLP 1"}
    assert np.isnan(tp.edges(model_of("gpt_neox"), PAIRS)["estimate"].sel(beside)).all()
    assert not np.isnan(tp.edges(model_of("gpt2"), PAIRS)["estimate"].sel(beside)).any()


def test_post_norms_are_said() -> None:
    assert tp.edges(model_of("gpt2"), PAIRS).attrs["post_norms"] == ""
    told = tp.edges(model_of("gemma2"), PAIRS).attrs["post_norms"]
    assert told.startswith("heads of layers 0, 1, 2 write through the norm behind their projection")


def test_an_encoder_is_read_by_nobody_who_is_named() -> None:
    pairs = tp.Pairs(["w5 w6 w7"], ["w5 w9 w7"], ["w3"], ["w4"], decoder=["w8 w9"])
    model = tp.load(tiny_models.build("t5", dtype=torch.float64), tiny_models.tokenizer())
    found = tp.edges(model, pairs)
    assert json.loads(found.attrs["missing"])[0] == "what decoder.block.0.layer.1.EncDecAttention reads"
    assert abs(found["estimate"].sel(writer="L0 cross-attention", reader="MLP 0")).max() > 1e-3
    last = tp.attribute(model, pairs, "cross_attn_out", by=("layer",))["estimate"].sel(layer=2)
    np.testing.assert_allclose(found["estimate"].sel(writer="L2 cross-attention").sum("reader"), last, atol=1e-5)
    norms = tp.load(tiny_models.build("bart", dtype=torch.float64), tiny_models.tokenizer())
    with pytest.raises(ComponentError, match="the stream must be the sum of what is written to it"):
        tp.edges(norms, pairs)


# ------------------------------------------------------------------------------------------------- shapes and labels


def test_positions_sum_up_and_can_be_chosen() -> None:
    model = model_of("gpt2")
    fine, whole = tp.edges(model, PAIRS, by_position=True), tp.edges(model, PAIRS)
    assert fine["estimate"].dims == ("pair", "writer", "reader", "pos")
    assert fine["pos"].values.tolist() == list(range(8))
    np.testing.assert_allclose(fine["estimate"].sum("pos"), whole["estimate"].fillna(0), atol=1e-11)
    assert (fine["status"].sel(pair=0, pos=7) == Status.ABSENT).all(), "this pair has 7 tokens"
    last = tp.edges(model, PAIRS, only={"pos": -1})["estimate"]
    np.testing.assert_allclose(last.isel(pair=0), fine["estimate"].isel(pair=0).sel(pos=6), atol=1e-11)
    np.testing.assert_allclose(last.isel(pair=2), fine["estimate"].isel(pair=2).sel(pos=7), atol=1e-11)
    some = tp.edges(model, PAIRS, by_position=True, only={"pos": [-1, 3]})
    assert some["pos"].values.tolist() == [-1, 3]
    np.testing.assert_allclose(some["estimate"].isel(pos=0), last, atol=1e-11)
    np.testing.assert_allclose(some["estimate"].isel(pos=1), fine["estimate"].sel(pos=3), atol=1e-11)
    late = tp.edges(model, PAIRS, only={"pos": [7]})
    assert late["estimate"].isel(pair=0).isnull().all()
    assert (late["status"].isel(pair=0) == Status.ABSENT).all()
    np.testing.assert_allclose(late["estimate"].isel(pair=2), fine["estimate"].isel(pair=2).sel(pos=7), atol=1e-11)


def test_before_the_first_differing_position_estimates_are_exactly_0() -> None:
    found = tp.edges(model_of("gpt2"), PAIRS, by_position=True)["estimate"].isel(pair=0)
    assert not np.nan_to_num(found.sel(pos=slice(0, 3))).any()
    assert found.sel(pos=4).fillna(0).values.any()


@pytest.mark.parametrize("how", [None, tp.IntegratedGradients(2), tp.IntegratedGradients(2, along="layer")], ids=str)
def test_some_writers_and_readers(how: Any) -> None:
    whole = tp.edges(model_of("gpt2"), PAIRS, estimator=how)
    only: dict[str, Any] = {"writer": ["MLP 1", "head_out"], "reader": ("logits", "L2H3.k")}
    found = tp.edges(model_of("gpt2"), PAIRS, estimator=how, only=only)
    assert found["reader"].values.tolist() == ["L2H3.k", "logits"], "in the order of a forward"
    assert found["writer"].values.tolist() == [w for w in whole["writer"].values if w[0] == "L" or w == "MLP 1"]
    expected = whole["estimate"].sel(writer=found["writer"], reader=found["reader"])
    np.testing.assert_allclose(found["estimate"], expected, atol=1e-11)
    assert json.loads(found.attrs["request"])["only"] == {k: list(v) for k, v in only.items()}
    backwards = tp.edges(model_of("gpt2"), PAIRS, estimator=how, only={"writer": "MLP 2", "reader": "q_in"})
    assert backwards["estimate"].isnull().all()


def test_several_metrics_in_little_memory() -> None:
    metrics = [tp.logit_diff, tp.metric(surprise), tp.kl]
    whole = tp.edges(model_of("gpt2"), PAIRS, metrics)
    assert whole["estimate"].dims == ("metric", "pair", "writer", "reader")
    chunked = tp.edges(model_of("gpt2"), PAIRS, metrics, memory=1)
    np.testing.assert_allclose(whole["estimate"], chunked["estimate"], atol=1e-11)
    alone = tp.edges(model_of("gpt2"), PAIRS)
    np.testing.assert_allclose(whole["estimate"].sel(metric="logit_diff"), alone["estimate"], atol=1e-11)
    assert abs(whole["estimate"].sel(metric="surprise")).max() > 1e-3


def test_a_dataset_like_that_of_attribute() -> None:
    found = tp.edges(toy("llama"), ioi_pairs(3))
    of_nodes = tp.attribute(toy("llama"), ioi_pairs(3), "z")
    assert set(of_nodes.attrs) < set(found.attrs)
    assert found.attrs["estimator"] == "AtP"
    for name in ("base", "clean", "corrupted"):
        np.testing.assert_allclose(found[name], of_nodes[name], atol=1e-6)
    np.testing.assert_allclose(
        found["normalized"], found["estimate"] / (found["clean"] - found["corrupted"]), atol=1e-6
    )
    joined = ~found["estimate"].isnull()
    assert (found["status"].values == np.where(joined, Status.ESTIMATED, Status.ABSENT)).all()
    mean = tp.over_pairs(found)
    np.testing.assert_allclose(mean["estimate"], found["estimate"].mean("pair"))
    assert set(np.unique(mean["status"])) == {Status.ABSENT, Status.ESTIMATED}


@pytest.mark.parametrize(
    ("cost", "how"),
    [
        ("2 forwards and 1 backward", None),
        ("6 forwards and 4 backwards", tp.IntegratedGradients(4)),
        ("16 forwards and 14 backwards", tp.IntegratedGradients(2, along="layer")),
    ],
    ids=str,
)
def test_costs_are_counted(cost: str, how: Any) -> None:
    found = tp.edges(toy("gpt2"), ioi_pairs(2), estimator=how)
    assert found.attrs["cost"] == f"{cost} a pair"


# ------------------------------------------------------------------------------------------------- exact patches


CIRCUIT = [("embed", "L0H1.v"), ("L0H1", "L1H2.k"), ("L1H2", "logits")]


@cache
def wired_case(saturation: float) -> tuple[Any, tp.Pairs]:
    made = wired_pairs(4)
    model = tp.load(*wired(saturation), name=f"wired {saturation:g}")
    return model, tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)


def every_edge(model: Any) -> list[tuple[str, str]]:
    graph = graph_of(tp.Architecture(model))
    return [(w.name, r.name) for w in graph.writers for r in graph.readers if graph.joined(w, r)]


@pytest.mark.parametrize("direction", BASES)
def test_exactly_three_edges_of_the_wired_model_matter(direction: Any) -> None:
    """Patched one by one, each of the circuit's has the effect 1, and every other has none."""
    model, pairs = wired_case(4.0)
    assert tp.toys.load("wired").config == model.config
    edges = every_edge(model)
    assert len(edges) == 110
    with tp.patching(model, pairs) as p:
        tp.edge_rows(p, edges, direction=direction)
    sign = 1 if direction == "denoising" else -1
    found = p.run()["normalized"] * sign
    for writer, reader in edges:
        expected = float((writer, reader) in CIRCUIT)
        np.testing.assert_allclose(
            found.sel(writer=writer, reader=reader), expected, atol=1e-5, err_msg=writer + reader
        )


@pytest.mark.parametrize("saturation", [1.0, 4.0, 12.0])
def test_what_attribution_finds_of_the_wired_model(saturation: float) -> None:
    """Two of the three edges pass a softmax, whose gradient is what the toy's docstring derives; the third does not."""
    model, pairs = wired_case(saturation)
    found = tp.edges(model, pairs)["normalized"]
    z = np.exp(saturation) + LENGTH - 1
    p, q = 1 / z, np.exp(saturation) / z
    share = saturation * (p * (1 - p) + 2 * p * q + q * (1 - q)) / (2 * (q - p))
    for edge, expected in zip(CIRCUIT, (share, share, 1.0), strict=True):
        np.testing.assert_allclose(found.sel(writer=edge[0], reader=edge[1]), expected, atol=2e-3 * max(1, expected))
    others = found.stack(edge=("writer", "reader")).drop_sel(edge=CIRCUIT).fillna(0)
    assert abs(others).max() < 1e-4
    if saturation == 12:
        assert share < 1e-3, "it misses two edges that carry all of the effect"


@pytest.mark.parametrize(("name", "direction"), BOTH)
def test_exact_edges_are_those_of_the_textbook(name: str, direction: Any) -> None:
    q = "L1KV1.k" if name in ("llama", "gemma2") else "L1H1.k"
    edges = [("embed", "MLP 1"), ("L0H2", q), ("MLP 0", "logits"), ("L0H3", "L2H1.q", -2), ("L1H0", "logits", -1)]
    with tp.patching(model_of(name), PAIRS) as p:
        tp.edge_rows(p, edges, direction=direction)
    found = p.run()
    t, estimates = book(name), tp.edges(model_of(name), PAIRS, direction=direction)
    for edge in edges:
        labels = dict(zip(("writer", "reader", "pos"), edge, strict=False))
        measured = found["_".join(labels)].to_dataset()["effect"].sel(labels)
        ends = [
            nodes(estimates, side)[estimates[side].values.tolist().index(labels[side])] for side in ("writer", "reader")
        ]
        for pair in range(len(PAIRS)):
            clean, corrupted = (torch.tensor(side[pair]) for side in (encoded().clean, encoded().corrupted))
            positions = [labels["pos"] % len(clean)] if "pos" in labels else None
            expected = t.exact_edge(clean, corrupted, gap(pair), *ends, BASES[direction], positions)
            np.testing.assert_allclose(measured.sel(pair=pair), expected, atol=1e-5, err_msg=str(edge))


def test_the_largest_estimates_can_be_patched_in_one_go() -> None:
    found = tp.over_pairs(tp.edges(toy("gpt2"), ioi_pairs(3)))["estimate"]
    ranked = abs(found.stack(edge=("writer", "reader")).dropna("edge")).sortby("edge")
    top = ranked.sortby(ranked, ascending=False)["edge"].values[:5]
    with tp.patching(toy("gpt2"), ioi_pairs(3)) as p:
        tp.edge_rows(p, top)
    assert [(row.labels["writer"], row.labels["reader"]) for row in p.rows] == list(top)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"estimator": tp.AtPStar()}, RecipeError, "AtP\\* is of queries and keys"),
        ({"estimator": tp.IntegratedGradients(along="site")}, RecipeError, "An edge is no site that moves"),
        ({"direction": "up"}, RecipeError, "'denoising' or 'noising'"),
        ({"only": {"layer": 3}}, RecipeError, "only takes 'writer', 'reader' and 'pos', not 'layer'"),
        ({"only": {"writer": ["L0H9", "MLP 0", "emb"]}}, SiteError, "'L0H9'; did you mean 'L0H.'"),
        ({"only": {"writer": []}}, SiteError, "none is named"),
        ({"only": {"reader": "head_out"}}, SiteError, "Its readers are called L0H0.q"),
        ({"only": {"pos": 99}}, SiteError, "the longest prompt has"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        tp.edges(toy("gpt2"), ioi_pairs(2), **options)


def test_pairs_without_a_corrupted_side_are_refused() -> None:
    pairs = tp.Pairs(clean=ioi_pairs(1).clean, answer=ioi_pairs(1).answer, wrong=ioi_pairs(1).wrong)
    with pytest.raises(RecipeError, match="no corrupted prompts"):
        tp.edges(toy("gpt2"), pairs)


@pytest.mark.parametrize(
    ("edges", "error", "words"),
    [
        ([], RecipeError, "and there are none"),
        ([("embed", "logits"), "embed"], RecipeError, "not 'embed'"),
        ([("embed", "logits", 1, 2)], RecipeError, "not \\('embed', 'logits', 1, 2\\)"),
        ([("embed", "log"), ("embed", "MLP 9")], SiteError, "no such reader.\n  'log'; did you mean 'logits'\\?\n  'MLP 9'"),
        ([("MLP 1", "L0H0.q"), ("embed", "logits"), ("L2H0", "MLP 1")], SiteError, "2 of 3 edges do not exist.\n  L0H0.q reads before MLP 1 writes\n  MLP 1 reads"),
    ],
    ids=str,
)  # fmt: skip
def test_edges_that_are_none_are_refused(edges: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words), tp.patching(toy("gpt2"), ioi_pairs(2)) as p:
        tp.edge_rows(p, edges)
