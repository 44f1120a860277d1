"""Scatters, quadrants, attention, windows, models by depth, interactions and intervals: the numbers, in their places."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from test_plots import (
    LAYERS,
    PAIRS,
    POS,
    assert_apart,
    drawn,
    hatched,
    legend,
    mark,
    mesh,
    names,
    panels,
    refused,
    result,
    shown,
)

import tracepatch as tp
from tracepatch.marks import PALETTE, looks, site_words
from tracepatch.plots import (
    arcs,
    attention,
    bars,
    depth,
    heatmap,
    interactions,
    picture,
    quadrants,
    scatter,
    windows,
)

COMPONENTS = ["resid_pre", "attn_out", "mlp_out"]


@pytest.fixture(autouse=True)
def no_open_figures() -> Any:
    yield
    assert plt.get_fignums() == []


def points(ax: Any, gid: str) -> Any:
    """The points of one entry, [point, 2]."""
    return np.concatenate([c.get_offsets() for c in ax.collections if c.get_gid() == gid])


def every(ax: Any) -> Any:
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections if c.get_gid()])


def labelled(ax: Any) -> list[str]:
    return [child.get_text() for child in ax.get_children() if isinstance(child, Annotation)]


def corner(ax: Any) -> list[str]:
    return next(t.get_text() for t in ax.texts if "Pearson" in t.get_text()).split("\n")


def estimate(data: Any, noise: float = 0.3, seed: int = 9) -> Any:
    """An estimate of the effects of a result."""
    found = data.rename(effect="estimate")
    change = np.random.default_rng(seed).normal(0, noise, size=found["estimate"].shape)
    found["estimate"] = (found["estimate"] + change).assign_attrs(data["effect"].attrs)
    found["normalized"] = (found["estimate"] / (found["clean"] - found["corrupted"])).assign_attrs(
        data["normalized"].attrs
    )
    return found


# ------------------------------------------------------------------------------------------------------------ scatter


def test_a_point_is_the_average_of_both_and_keeps_its_component() -> None:
    data = result(("component", "layer", "pos"), (3, LAYERS, POS), component=COMPONENTS)
    other = estimate(data)
    figure = drawn(scatter(data, other))
    ax = panels(figure)[0]
    means = [tp.over_pairs(one)["normalized"] for one in (data, other)]
    for number, name in enumerate(COMPONENTS):
        wanted = np.stack([mean.sel(component=name).values.ravel() for mean in means], 1)
        assert np.allclose(points(ax, name), wanted)
        colours = {to_hex(c.get_facecolors()[0][:3]) for c in ax.collections if c.get_gid() == name}
        assert colours == {PALETTE[number].lower()}
    assert legend(figure) == [*COMPONENTS, "y = x"]
    assert ax.get_xlabel().startswith("exact normalized effect on logit_diff\n[fraction of the clean − corrupted")
    assert ax.get_ylabel().startswith("estimate of the normalized effect on logit_diff\n")
    assert "denoising: clean into the corrupted run" in ax.get_ylabel()
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_aspect() == 1


def test_correlations_are_those_of_the_definitions_over_measured_sites() -> None:
    data = mark(result(("layer", "pos"), (LAYERS, POS)), 2, (0, 0), (1, 1), (1, 2))
    other = estimate(data)
    found = [tp.over_pairs(one)["normalized"].values for one in (data, other)]
    known = np.ones((LAYERS, POS), bool)
    known[[0, 1, 1], [0, 1, 2]] = False
    x, y = (values[known] for values in found)

    def pearson(a: Any, b: Any) -> float:
        return float(
            ((a - a.mean()) * (b - b.mean())).sum() / np.sqrt(((a - a.mean()) ** 2).sum() * ((b - b.mean()) ** 2).sum())
        )

    ranks = [np.array([(v < value).sum() for value in v], float) for v in (x, y)]
    figure = drawn(scatter(data, other))
    wanted = [f"Pearson r = {pearson(x, y):.2f}", f"Spearman ρ = {pearson(*ranks):.2f}", "17 sites"]
    assert corner(panels(figure)[0]) == wanted
    rings = points(panels(figure)[0], "proved")
    assert np.allclose(rings, np.stack([values[~known] for values in found], 1))
    assert "no effect (proved)" in legend(figure)


def test_sites_are_matched_by_their_labels() -> None:
    data = result(("layer", "head"), (LAYERS, 6))
    other = data.isel(head=[5, 2, 0], layer=[3, 1]).assign_coords(head=[5, 2, 9])
    ax = panels(drawn(scatter(data, other.transpose("head", "pair", "layer"))))[0]
    assert np.allclose(every(ax)[:, 0], every(ax)[:, 1])
    assert len(every(ax)) == 4
    assert corner(ax)[2] == "4 sites, 22 in one only"


def test_rows_of_sparse_results_are_matched_by_what_names_them() -> None:
    places = [(0, 17), (5, 3), (2, 900), (9, 44)]
    rows = result(("row",), (4,))
    data = rows.assign_coords(layer=("row", [p[0] for p in places]), neuron=("row", [p[1] for p in places]))
    other = data.isel(row=[3, 0, 2]).assign_coords(row=[0, 1, 2]).assign_attrs(model="other")
    for name in ("effect", "normalized"):
        other[name][:, 1] += 5
    ax = panels(drawn(scatter(data, other, label=1)))[0]
    assert corner(ax)[2] == "3 sites, 1 in one only"
    assert labelled(ax) == ["L0N17"]
    one = result(("row",), (3,)).assign_coords(layer=("row", [4, 8, 6]))
    ax = panels(drawn(scatter(one, one.isel(row=[2, 1]).assign_coords(row=[7, 8]))))[0]
    assert np.allclose(every(ax)[:, 0], every(ax)[:, 1])
    assert len(every(ax)) == 2


def test_the_largest_disagreements_are_named_by_their_sites() -> None:
    data = result(("component", "layer", "pos"), (3, LAYERS, POS), component=COMPONENTS)
    other = data.copy(deep=True).assign_attrs(model="other")
    for at, off in (((0, 2, 3), 9.0), ((2, 1, 1), -6.0), ((1, 0, 4), 3.0)):
        for name in ("effect", "normalized"):
            other[name][(slice(None), *at)] += off
    ax = panels(drawn(scatter(data, other, label=2)))[0]
    assert set(labelled(ax)) == {"resid_pre L2 · pos 3 (⏎)", "mlp_out L1 · pos 1 (John…)"}
    assert ax.get_xlabel().startswith("toy: normalized")
    assert ax.get_ylabel().startswith("other: normalized")
    assert labelled(panels(drawn(scatter(data, other, label=0)))[0]) == []
    assert labelled(panels(drawn(scatter(data, data)))[0]) == [], "there are none where both agree"


@pytest.mark.parametrize("many", [12, 400])
def test_names_of_points_cover_neither_each_other_nor_the_edge(many: int) -> None:
    data = result(("layer", "neuron"), (4, many))
    other = estimate(data, 2.0)
    figure = drawn(scatter(data, other, label=8))
    ax = panels(figure)[0]
    texts = [child for child in ax.get_children() if isinstance(child, Annotation)]
    texts += [t for t in ax.texts if "Pearson" in t.get_text()]
    boxes = [text.get_window_extent() if not isinstance(text, Annotation) else _own(text) for text in texts]
    assert len(boxes) >= 4
    for one, other_box in itertools.combinations(boxes, 2):
        assert not one.overlaps(other_box)
    room = ax.get_window_extent()
    assert all(room.x0 <= b.x0 and b.x1 <= room.x1 and room.y0 <= b.y0 and b.y1 <= room.y1 for b in boxes)


def _own(text: Annotation) -> Any:
    """The box of an annotation's text without its line."""
    text.update_positions(text.figure._get_renderer())  # type: ignore[union-attr]
    return super(Annotation, text).get_window_extent()


def test_variables_of_other_units_have_no_identity_line() -> None:
    data = result(("layer", "head"), (LAYERS, 6))
    mean = tp.over_pairs(data)
    other = (mean["effect"] * 100 + 7).assign_attrs(units="percent", long_name="attention")
    other[2, 3] += 900
    figure = drawn(scatter(mean["effect"], other, color="layer", xlabel="mine"))
    ax = panels(figure)[0]
    assert legend(figure) == []
    assert ax.get_xlabel() == "mine"
    assert ax.get_ylabel() == "attention\n[percent]"
    assert labelled(ax)[0] == "L2H3"
    assert ax.get_aspect() == "auto"
    dots = next(c for c in ax.collections if c.get_gid() == "layer")
    assert np.array_equal(np.asarray(dots.get_array()), np.repeat(np.arange(LAYERS), 6))


def test_effects_are_compared_with_estimates_where_one_has_no_normalized() -> None:
    data = result(("layer", "head"), (LAYERS, 6))
    bare = estimate(data).drop_vars("normalized")
    ax = panels(drawn(scatter(data, bare)))[0]
    assert np.allclose(every(ax)[:, 0], tp.over_pairs(data)["effect"].values.ravel())
    assert ax.get_xlabel().startswith("exact effect on logit_diff\n[logits]")
    assert ax.get_ylabel().startswith("estimate of the effect on logit_diff\n[logits]")
    again = panels(drawn(scatter(data, bare, "effect")))[0]
    assert np.array_equal(every(again), every(ax))


def test_a_correlation_that_does_not_exist_is_not_given() -> None:
    data = result(("layer", "head"), (LAYERS, 6))
    data["effect"] *= 0
    assert corner(panels(drawn(scatter(data, estimate(data))))[0])[:2] == [
        "Pearson r undefined",
        "Spearman ρ undefined",
    ]


def test_scatter_errors() -> None:
    data = result(("layer", "head"), (LAYERS, 6))
    refused(lambda: scatter(data, result()), "same dims", "x has layer, head", "y has layer, pos")
    refused(lambda: scatter(data, data.assign_coords(head=np.arange(6) + 50)), "no site")
    refused(lambda: scatter(data, data, color="component"), "'component'", "layer")
    refused(lambda: scatter(data, data, "efect"), "'efect'")
    wide = result(("name", "pos"), (12, POS), name=[f"n{i}" for i in range(12)])
    refused(lambda: scatter(wide, wide, color="name"), "12 entries", "8")


# ---------------------------------------------------------------------------------------------------------- quadrants


def test_verdicts_are_those_of_the_thresholds() -> None:
    """AND and OR of the theory, with both, none, and one that works against."""
    expected = {"AND": (0.0, 1.0), "OR": (1.0, 0.0), "both": (0.9, 0.8), "none": (0.1, -0.1), "against": (-0.5, 0.3)}
    found = {}
    for base, which, sign in (("corrupted", 0, 1), ("clean", 1, -1)):
        data = result(("name",), (5,), base=base, name=list(expected))
        gap = data["clean"] - data["corrupted"]
        share = xr.DataArray([sign * value[which] for value in expected.values()], {"name": list(expected)}, "name")
        data["effect"] = (gap * share).transpose("pair", "name")
        data["normalized"] = (data["effect"] / gap).transpose("pair", "name")
        found[base] = data
    figure = drawn(quadrants(found["corrupted"], found["clean"], sufficient=0.5, necessary=0.25))
    ax = panels(figure)[0]
    wanted = {
        "necessary and sufficient": "both",
        "redundant": "OR",
        "necessary only": "AND",
        "opposing": "against",
        "irrelevant": "none",
    }
    for verdict, name in wanted.items():
        assert np.allclose(points(ax, verdict), [expected[name]])
    assert legend(figure) == [*(f"{verdict} (1)" for verdict in wanted), "thresholds 0.5 and 0.25"]
    assert set(labelled(ax)) == {"AND", "OR", "both", "against"}
    assert "denoising: clean into the corrupted run" in ax.get_xlabel()
    assert "noising: corrupted into the clean run" in ax.get_ylabel()
    figure = drawn(quadrants(found["corrupted"], found["clean"], sufficient=0.95, necessary=0.95))
    assert legend(figure)[0] == "necessary and sufficient (0)"
    refused(lambda: quadrants(found["clean"], found["corrupted"]), "denoising edits the corrupted run", "the clean run")
    refused(lambda: quadrants(*found.values(), sufficient=0), "positive", "0")
    bare = found["clean"].drop_vars("normalized")
    refused(lambda: quadrants(found["corrupted"], bare), "noising has no `normalized`")


# ---------------------------------------------------------------------------------------------------------- attention


def attended(pairs: int = 1) -> Any:
    """Numbers for all weights of 2 layers of 3 heads; what cannot be attended to is absent."""
    data = result(("layer", "head", "dest", "src"), (2, 3, 5, 5)).isel(pair=slice(pairs))
    words = [t.strip() or t for t in CLEAN_WORDS]
    later = data["src"] > data["dest"]
    for name in ("effect", "normalized"):
        data[name] = data[name].where(~later).assign_attrs(data[name].attrs)
    data["status"] = data["status"].where(~later, 0).astype(np.int8)
    changed = [w if i != 1 else " Mary" for i, w in enumerate(words)]
    tokens = {
        f"{dim}_{side}": (dim, text)
        for dim in ("dest", "src")
        for side, text in (("token", words), ("corrupted_token", changed))
    }
    return data.assign_coords(tokens)


CLEAN_WORDS = ["When", " John", " met", "\n", " to"]


def test_the_strongest_heads_have_a_matrix_each() -> None:
    data = attended(PAIRS)
    mean = tp.over_pairs(data)["normalized"]
    strongest = abs(mean).max(("dest", "src")).stack(at=("layer", "head")).sortby(lambda a: -a)["at"].values.tolist()
    figure = drawn(attention(data, count=2))
    assert names([ax.title for ax in panels(figure)]) == [f"L{layer}H{head}" for layer, head in sorted(strongest[:2])]
    for ax, (layer, head) in zip(panels(figure), sorted(strongest[:2]), strict=True):
        assert np.allclose(shown(ax), mean.sel(layer=layer, head=head).values, equal_nan=True)
        assert ax.get_ylim()[0] > ax.get_ylim()[1], "a text is read from the top"
        later = np.triu(np.ones((5, 5), bool), 1)
        assert np.array_equal(hatched(ax, "blank", (5, 5)), later)
        assert not hatched(ax, "absent", (5, 5)).any()
    assert "absent" not in " ".join(legend(figure))
    assert panels(figure)[0].get_ylabel() == "attending token (dest)"
    bound = {mesh(ax).norm.vmax for ax in panels(figure)}
    assert len(bound) == 1
    chosen = drawn(attention(data, heads=[(1, 2), (0, 0)], pair=1))
    assert np.allclose(shown(panels(chosen)[0]), data["normalized"].sel(pair=1, layer=1, head=2), equal_nan=True)
    one = drawn(attention(data.sel(layer=1, head=2)))
    assert names([ax.title for ax in panels(one)]) == ["L1H2"]


def test_arcs_join_the_tokens_of_a_weight() -> None:
    data = attended()
    figure = drawn(arcs(data, heads=[(1, 2)], pair=0))
    ax = figure.axes[0]
    values = data["normalized"].sel(pair=0, layer=1, head=2).values
    bound = np.nanmax(abs(values))
    tokens = [t for t in ax.texts if t.get_position()[1] < 0]
    assert names(tokens) == ["When", "John→Mary", "met", "⏎", "to"]
    assert [t.get_fontweight() == "bold" for t in tokens] == [False, True, False, False, False]
    at = [t.get_position()[0] for t in tokens]
    strong = [(i, j) for i, j in np.argwhere(abs(np.nan_to_num(values)) >= 0.05 * bound)]
    strong.sort(key=lambda cell: abs(values[cell]))
    lines = next(c for c in ax.collections if c.get_gid() == "arcs")
    segments, widths = lines.get_segments(), lines.get_linewidths()
    assert len(segments) == len(strong)
    for (dest, src), line, colour in zip(strong, segments, lines.get_colors(), strict=True):
        assert (to_hex(colour[:3]) == "#b2182b") == (values[dest, src] > 0)
        if dest != src:
            assert line[[0, -1], 0] == pytest.approx([at[src], at[dest]])
            assert line[[0, -1], 1] == pytest.approx([0, 0], abs=1e-9)
            assert line[:, 1].max() > 0.1
        else:
            assert line[:, 0].mean() == pytest.approx(at[src], abs=0.02)
    assert list(widths) == sorted(widths), "the larger, the wider, and on top"
    title = figure.legends[0].get_title().get_text()
    assert title.startswith("normalized effect on logit_diff\n")
    assert "from the token attended to (left)" in title
    assert legend(figure)[:2] == [f"+{bound:.2f}", f"−{bound:.2f}"]


@pytest.mark.parametrize("tokens", [8, 60])
def test_texts_under_arcs_do_not_touch(tokens: int) -> None:
    data = result(("layer", "head", "dest", "src"), (1, 1, tokens, tokens)).isel(pair=[0])
    data["normalized"][..., :-2] *= 0.001
    words = [f"token{n}" if n % 3 else "a" for n in range(tokens)]
    figure = drawn(arcs(data.assign_coords(dest_token=("dest", words), src_token=("src", words))))
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_position()[1] < 0]
    assert_apart(boxes, "x")
    whole = figure.bbox
    assert all(b.x0 >= 0 and b.x1 <= whole.x1 and b.y0 >= 0 for b in boxes)


def test_what_weights_bring_has_no_direction() -> None:
    pairs = tp.toys.pairs("ioi", 2)
    found = tp.attention_attribution(tp.toys.load("gpt2"), pairs)
    title = drawn(arcs(found)).legends[0].get_title().get_text()
    assert title.startswith("pattern × gradient: what a weight brings to logit_diff\n")
    assert "\nin the clean run\n" in title
    estimates = tp.attribute(tp.toys.load("gpt2"), pairs, "z")
    text = panels(drawn(scatter(tp.patch(tp.toys.load("gpt2"), pairs, "z"), estimates)))[0].get_ylabel()
    assert text.startswith("AtP estimate of the normalized effect on logit_diff\n")
    assert text.endswith("denoising: clean into the corrupted run")


def test_attention_errors() -> None:
    data = attended()
    refused(lambda: attention(result()), "layer, head, dest and src", "by=('layer', 'head', 'dest', 'src')")
    refused(lambda: arcs(data, heads=[(5, 0)]), "layer 5, head 0")
    refused(lambda: arcs(data, pair=9), "pair 9")
    refused(lambda: arcs(data, limit=-1), "limit", "-1")
    refused(lambda: attention(data, "efect"), "'efect'")


def test_attention_of_a_real_pattern() -> None:
    pairs = tp.toys.pairs("ioi", 2)
    with tp.patching(tp.toys.load("gpt2"), pairs) as p:
        for dest, src in p.grid("pattern", by=("dest", "src"), dest=[-1]):
            with p.row(layer=1, head=3, dest=dest, src=src):
                p.corrupted.pattern[1, 3, dest, src] = p.clean.pattern[1, 3, dest, src]
    found = p.run()
    ax = panels(drawn(attention(found)))[0]
    assert np.allclose(shown(ax)[0], tp.over_pairs(found)["normalized"].values.ravel())
    ax = drawn(arcs(found)).axes[0]
    at = [t.get_position()[0] for t in ax.texts if t.get_position()[1] < 0]
    assert len(at) == 14
    ends = [line[-1, 0] for line in next(c for c in ax.collections if c.get_gid() == "arcs").get_segments()]
    assert ends == pytest.approx([at[-1]] * len(ends)), "all from the last token, which is the only one patched"


# ------------------------------------------------------------------------------------------------------------- curves


def windowed() -> Any:
    data = result(("width", "layer"), (2, 6)).assign_coords(width=[1, 4])
    return mark_width(data)


def mark_width(data: Any) -> Any:
    for name in ("effect", "normalized"):
        data[name][:, 1, 3:] = np.nan
    data["status"][:, 1, 3:] = 0
    return data


def curves(ax: Any) -> Any:
    return {line.get_gid(): np.array(line.get_data()) for line in ax.lines if line.get_gid()}


def test_windows_stand_at_their_middle() -> None:
    data = windowed()
    mean = tp.over_pairs(data)["normalized"].values
    figure = drawn(windows(data))
    found = curves(panels(figure)[0])
    assert np.allclose(found["1"], [np.arange(6), mean[0]])
    assert np.allclose(found["4"], [[1.5, 2.5, 3.5], mean[1, :3]])
    spans = next(c for c in panels(figure)[0].collections if c.get_gid() == "span" and len(c.get_paths()) == 3)
    assert [path.vertices[:, 0].tolist() for path in spans.get_paths()] == [[-0.4, 3.4], [0.6, 4.4], [1.6, 5.4]]
    assert legend(figure) == ["1 layer", "4 layers"]
    assert panels(figure)[0].get_ylabel().startswith("normalized effect on logit_diff\n")
    middle = curves(panels(drawn(windows(data, layer="middle")))[0])
    assert np.allclose(middle["4"][0], [-0.5, 0.5, 1.5]), "of 4 layers the third is the upper middle one"
    refused(lambda: windows(data, layer="last"), "'first' or 'middle'")
    refused(lambda: windows(result()), "width, layer", "pos (5)")
    refused(lambda: windows(result(("width", "layer", "head"), (2, 6, 3))), "too many", "effects.sel(head=0)")
    refused(lambda: windows(data.assign_coords(width=[0.5, 2])), "whole numbers", "0.5")


def test_bands_are_the_intervals() -> None:
    data = tp.intervals(result(("width", "layer"), (2, 6)).assign_coords(width=[1, 2]))
    figure = drawn(windows(data))
    band = next(c for c in panels(figure)[0].collections if type(c).__name__ == "FillBetweenPolyCollection")
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(float(data["normalized_low"][0].min()))
    assert corners[:, 1].max() == pytest.approx(float(data["normalized_high"][0].max()))
    assert legend(figure)[-1] == "95 % interval over 3 pairs"


def test_models_share_relative_depth() -> None:
    deep, flat = result(("layer",), (7,)), result(("layer",), (3,), seed=4, model="small")
    both = tp.concat(
        [one.assign_coords(depth=("layer", np.linspace(0, 1, one.sizes["layer"]))) for one in (deep, flat)]
    )
    figure = drawn(depth(both))
    found = curves(panels(figure)[0])
    assert np.allclose(found["toy"], [np.linspace(0, 1, 7), tp.over_pairs(deep)["normalized"].values])
    assert np.allclose(found["small"], [[0, 0.5, 1], tp.over_pairs(flat)["normalized"].values])
    assert legend(figure) == ["toy", "small"]
    assert "0: first layer, 1: last" in panels(figure)[0].get_xlabel()
    some = curves(panels(drawn(depth(both.isel(layer=[1, 2]))))[0])
    assert np.allclose(some["toy"][0], [1 / 6, 2 / 6]), "also where not all layers are shown"
    refused(lambda: depth(both.drop_vars("depth")), "no coordinate `depth`")


@pytest.mark.parametrize("how", ["largest", "sum"])
def test_what_is_left_beside_layers_is_reduced_if_that_is_said(how: Any) -> None:
    data = result(("component", "layer", "head"), (2, LAYERS, 3), component=COMPONENTS[:2])
    data = data.assign_coords(depth=("layer", np.linspace(0, 1, LAYERS)))
    mean = tp.over_pairs(data)["normalized"].values
    figure = drawn(depth(data, reduce=how))
    at = abs(mean).argmax(-1)[..., None]
    wanted = np.take_along_axis(mean, at, -1)[..., 0] if how == "largest" else mean.sum(-1)
    for ax, name, values in zip(panels(figure), COMPONENTS[:2], wanted, strict=True):
        assert ax.get_title() == name
        assert np.allclose(curves(ax)["toy"][1], values)
    words = {"largest": "largest normalized effect on logit_diff over head", "sum": "sum of normalized effect on"}[how]
    assert panels(figure)[0].get_ylabel().startswith(words)
    refused(lambda: depth(data), "head (3)", "reduce='largest'")
    refused(lambda: depth(data, reduce="mean"), "'largest', 'sum' or None")
    refused(lambda: depth(result(("name",), (2,), name=["a", "b"])), "needs the dims model, layer", "name (2)")


# ------------------------------------------------------------------------------------------------------- interactions


def test_an_interaction_is_the_joint_effect_less_both_alone() -> None:
    sites = ["L0H1", "L1H0", "L1H3"]
    data = result(("first", "second"), (3, 3), first=sites, second=sites)
    for i, j in itertools.product(range(3), repeat=2):
        if j < i:
            data = mark(data, 0, (i, j))
    figure = drawn(interactions(data.isel(second=[2, 0, 1])))
    mean = tp.over_pairs(data)["normalized"].values
    joint = np.where(np.isnan(mean), mean.T, mean)
    apart = joint - np.diag(joint)[:, None] - np.diag(joint)[None]
    np.fill_diagonal(apart, np.nan)
    together, interaction = panels(figure)
    assert np.allclose(shown(together), joint)
    assert np.allclose(shown(interaction), apart, equal_nan=True)
    assert np.array_equal(hatched(interaction, "blank", (3, 3)), np.eye(3, dtype=bool))
    assert not hatched(together, "blank", (3, 3)).any()
    assert names([ax.title for ax in panels(figure)])[1] == "interaction: together − sum of both alone"
    assert names(interaction.get_xticklabels()) == names(interaction.get_yticklabels()) == sites
    one = panels(drawn(interactions(data, pair=2, variable="effect")))[1]
    alone = data["effect"].values[2]
    assert shown(one)[0, 1] == pytest.approx(alone[0, 1] - alone[0, 0] - alone[1, 1])
    hole = mark(data.copy(deep=True), 0, (1, 1))
    refused(lambda: interactions(hole), "patches these alone", "L1H0", "first=", "second=")
    refused(lambda: interactions(result()), "two dims with the same labels", "layer (4), pos (5)")
    refused(lambda: interactions(data, sites=("first", "pos")), "('first', 'pos')")
    refused(lambda: interactions(data, pair=8), "pair 8")


# ---------------------------------------------------------------------------------------------------------- intervals


def test_cells_whose_interval_includes_0_have_a_ring() -> None:
    data = tp.intervals(mark(result(), 2, (0, 0)))
    figure = drawn(heatmap(data))
    low, high = data["normalized_low"].values, data["normalized_high"].values
    wanted = (low <= 0) & (high >= 0)
    wanted[0, 0] = False
    assert 0 < wanted.sum() < wanted.size - 1
    rings = next(c for c in panels(figure)[0].collections if c.get_gid() == "unsure").get_offsets()
    found = np.zeros((LAYERS, POS), bool)
    found[tuple(np.round(np.asarray(rings)).astype(int).T[::-1])] = True
    assert np.array_equal(found, wanted)
    assert legend(figure)[-1] == "95 % interval over 3 pairs includes 0"
    assert names(panels(figure)[0].get_xticklabels())[1] == "John→Mary…", "tokens of an average are still known as such"
    own = drawn(heatmap(data, "effect"))
    rings = next(c for c in panels(own)[0].collections if c.get_gid() == "unsure").get_offsets()
    assert len(rings) == int(((data["low"] <= 0) & (data["high"] >= 0) & (data["status"] == 1)).sum())


def test_bars_have_whiskers() -> None:
    data = tp.intervals(result(("name",), (3,), name=["a", "b", "c"]))
    data["normalized_high"][1] = np.inf
    figure = drawn(bars(data))
    ax = panels(figure)[0]
    lines = next(c for c in ax.collections if c.get_gid() == "interval").get_paths()
    ends = np.array([path.vertices[:, 0] for path in lines])
    assert np.allclose(ends[:, 0], data["normalized_low"])
    assert np.allclose(ends[[0, 2], 1], data["normalized_high"].values[[0, 2]])
    assert np.isfinite(ends).all()
    assert [line.get_marker() for line in ax.lines if len(line.get_xdata()) and line.get_marker() == ">"] == [">"]
    assert legend(figure) == ["95 % interval over 3 pairs"]


# -------------------------------------------------------------------------------------------------------------- words


def test_sites_in_a_few_letters() -> None:
    assert site_words({"component": "z", "layer": 9, "head": 6}) == "z L9H6"
    assert site_words({"layer": 3, "pos": 9}, {9: "gave"}) == "L3 · pos 9 (gave)"
    assert site_words({"model": "gpt2", "layer": 3, "neuron": 7, "draw": 2}) == "gpt2 L3N7 · draw 2"
    assert site_words({"name": "both off"}) == "both off"
    assert len({look.colour for look in looks(range(8), "n").values()}) == 8


def test_figures_can_be_given() -> None:
    whole = Figure(figsize=(12, 5), layout="constrained")
    left, right = whole.subfigures(1, 2)
    data = result(("layer", "head"), (LAYERS, 6))
    assert scatter(data, estimate(data), figure=left, title="Mine") is whole
    assert windows(windowed(), figure=right) is whole
    assert panels(drawn(whole))[0].get_title() == "Mine"


def test_a_result_has_the_picture_that_fits() -> None:
    heads = result(("layer", "head", "pos"), (2, 3, POS))
    assert names([ax.title for ax in panels(picture(heads))]) == ["head 0", "head 1", "head 2"]
    assert names([ax.title for ax in panels(picture(attended()))])[0].startswith("L0H")
    assert legend(picture(windowed())) == ["1 layer", "4 layers"]
    assert len(panels(picture(result()))) == 1
    assert panels(picture(result(("layer",), (3,))))[0].patches
    refused(lambda: picture(result(("component", *heads["effect"].dims[1:]), (2, 2, 3, POS))), "too many")
