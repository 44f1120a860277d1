"""Figures show the dataset's own numbers, in the right places, and keep proved, measured and absent cells apart."""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import tracepatch as tp
from tracepatch.errors import ResultError
from tracepatch.plots import FLOOR, bars, heatmap
from tracepatch.toys import folder, tasks

PAIRS, LAYERS, POS = 3, 4, 5
CLEAN = [["When", name, " met", "\n", " to"] for name in (" John", " Anna", " Paul")]
CORRUPTED = [["When", name, " met", "\n", " to"] for name in (" Mary", " Kate", " Dan")]


def result(dims=("layer", "pos"), sizes=(LAYERS, POS), seed=0, model="toy", base="corrupted", **coords):
    """A result like that of ``tp.patch``, with effects that are all different."""
    rng = np.random.default_rng(seed)
    gap = np.array([2.0, 4.0, 6.0])
    effect = rng.normal(size=(PAIRS, *sizes))
    ends = {"clean": ("pair", gap / 2), "corrupted": ("pair", -gap / 2), "base": ("pair", -gap / 2)}
    status = ("pair", *dims), np.ones(effect.shape, np.int8)
    found = xr.Dataset({"effect": (("pair", *dims), effect), **ends, "status": status}, {"pair": np.arange(PAIRS)})
    found["normalized"] = found["effect"] / (found["clean"] - found["corrupted"])
    found["normalized"].attrs["units"] = "fraction of the clean − corrupted difference"
    found["effect"].attrs["units"] = "logits"
    numbers = {d: np.arange(n) for d, n in zip(dims, sizes, strict=True)}
    found = found.assign_coords(numbers | coords | {"metric": "logit_diff"})
    if "pos" in dims and POS in sizes:
        found = found.assign_coords(token=(("pair", "pos"), CLEAN), corrupted_token=(("pair", "pos"), CORRUPTED))
    written = {"corrupted": "clean", "clean": "corrupted"}[base]
    found.attrs = {"tracepatch_format": 1, "model": model, "pairs": "set", "base": base, "written": written}
    return found.assign_attrs(metrics='{"logit_diff": ""}')


def mark(data, status, *cells):
    """Gives cells (layer, pos) a status, with the values that go with it, in all pairs."""
    for cell in cells:
        data["status"][:, *cell] = status
        for name in ("effect", "normalized"):
            data[name][:, *cell] = 0.0 if status == 2 else np.nan
    return data


@pytest.fixture(scope="module")
def toys():
    """Two real results with different shapes and tokens: one model begins with a special token."""
    d = tasks.ioi(3, seed=1, templates=tasks.TEMPLATES[:1])
    pairs = tp.Pairs(d.clean, d.corrupted, d.answer, d.wrong, name="ioi")
    return [tp.patch(tp.load(folder(name)), pairs, "resid_pre") for name in ("gpt2", "llama")]


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    assert plt.get_fignums() == []


def drawn(figure):
    """The figure, once everything that is computed while drawing has been."""
    figure.savefig(io.BytesIO(), format="png", dpi=60)
    return figure


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def scales(figure):
    return [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]


def label(figure, number=0):
    return " ".join(scales(figure)[number].get_ylabel().split())


def mesh(ax):
    return next(c for c in ax.collections if type(c).__name__ == "QuadMesh")


def shown(ax):
    return np.ma.filled(mesh(ax).get_array().astype(float), np.nan)


def hatched(ax, key, shape):
    """The cells under a texture, read back from the rectangles."""
    mask = np.zeros(shape, bool)
    for collection in (c for c in ax.collections if c.get_gid() == key):
        for path in collection.get_paths():
            (left, low), (right, high) = path.get_extents().min, path.get_extents().max
            mask[round(low + 0.5) : round(high + 0.5), round(left + 0.5) : round(right + 0.5)] = True
    return mask


def names(labels):
    return [label.get_text() for label in labels]


def legend(figure):
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


# ------------------------------------------------------------------------------------------------------------ heatmap


@pytest.mark.parametrize("variable", ["normalized", "effect"])
def test_cells_are_the_average_over_pairs_and_early_layers_are_at_the_bottom(variable):
    data = result()
    ax = panels(drawn(heatmap(data, variable)))[0]
    assert np.array_equal(shown(ax), tp.over_pairs(data)[variable].values)
    bottom, top = ax.get_ylim()
    assert bottom < top
    assert names(ax.get_yticklabels()) == ["0", "1", "2", "3"]
    assert list(ax.get_yticks()) == [0, 1, 2, 3]
    corners = mesh(ax).get_coordinates()
    assert corners[0, 0].tolist() == [-0.5, -0.5]
    assert corners[-1, -1].tolist() == [POS - 0.5, LAYERS - 0.5]


def test_normalized_is_a_ratio_of_means_and_not_a_mean_of_ratios():
    data = result()
    wrong = data["normalized"].mean("pair").values
    assert not np.allclose(shown(panels(heatmap(data))[0]), wrong)


def test_one_pair():
    data = result()
    figure = drawn(heatmap(data, pair=1))
    ax = panels(figure)[0]
    assert np.array_equal(shown(ax), data["normalized"].values[1])
    assert names(ax.get_xticklabels()) == ["When", "Anna→Kate", "met", "⏎", "to"]
    assert legend(figure) == ["clean→corrupted token"]
    assert ax.get_title() == "toy · set · pair 1"
    assert np.array_equal(shown(panels(heatmap(data.isel(pair=1)))[0]), shown(ax))


def test_tokens_say_where_prompts_and_where_pairs_differ():
    figure = drawn(heatmap(result()))
    labels = panels(figure)[0].get_xticklabels()
    assert names(labels) == ["When", "John→Mary…", "met", "⏎", "to"]
    assert [label.get_fontweight() == "bold" for label in labels] == [False, True, False, False, False]
    assert [label.get_fontstyle() == "italic" for label in labels] == [False, True, False, False, False]
    assert legend(figure) == ["clean→corrupted token", "pairs differ: first pair's token"]


def test_a_difference_in_later_pairs_only_is_marked():
    data = result()
    data["corrupted_token"][0] = data["token"][0]
    assert names(panels(heatmap(data))[0].get_xticklabels())[1] == "1…"


def test_white_space_long_tokens_and_formulas_are_only_text():
    data = result()
    tokens = ["  ", "\t\n", " $x_", "$y^$", "-" * 40]
    data = data.drop_vars("corrupted_token").assign_coords(token=("pos", tokens))
    found = names(panels(drawn(heatmap(data)))[0].get_xticklabels())
    assert found == ["␣␣", "⇥⏎", "$x_", "$y^$", "------------⋯---"]


def test_the_colour_scale_is_symmetric_and_labelled():
    data = result()
    figure = drawn(heatmap(data))
    norm = mesh(panels(figure)[0]).norm
    largest = abs(tp.over_pairs(data)["normalized"]).max().item()
    assert (norm.vmin, norm.vmax) == (-largest, largest)
    assert mesh(panels(figure)[0]).cmap(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)
    assert label(figure) == (
        "normalized effect on logit_diff [fraction of the clean − corrupted difference] "
        "denoising: clean into the corrupted run"
    )
    found = label(heatmap(result(base="clean"), "effect"))
    assert found == "effect on logit_diff [logits] noising: corrupted into the clean run"


def test_without_corrupted_prompts_no_direction_is_claimed():
    data = result(base="clean").drop_vars(["corrupted", "normalized", "corrupted_token"]).assign_attrs(written="other")
    assert label(heatmap(data)) == "effect on logit_diff [logits] patched into the clean run"


@pytest.mark.parametrize("variable", ["normalized", "effect"])
def test_noise_is_not_blown_up(variable):
    data = result()
    data["effect"] *= 1e-6
    data["normalized"] *= 1e-6
    gap = {"normalized": 1, "effect": 4}[variable]
    assert mesh(panels(heatmap(data, variable))[0]).norm.vmax == pytest.approx(FLOOR * gap)
    assert mesh(panels(heatmap(data, variable, limit=1e-5))[0]).norm.vmax == 1e-5


def test_a_result_of_nothing_but_zeros_has_a_scale():
    data = result().drop_vars(["clean", "corrupted", "normalized"])
    data["effect"] *= 0
    assert mesh(panels(drawn(heatmap(data)))[0]).norm.vmax == 1


def test_proved_and_absent_cells_are_marked_and_nothing_else():
    proved, absent = [(0, 0), (0, 1), (0, 3), (2, 2)], [(3, 4), (2, 4)]
    data = mark(mark(result(), 2, *proved), 0, *absent)
    data["status"][0, 1, 1] = 2  # proved for one pair only, so that the average is a measured number
    figure = drawn(heatmap(data))
    for key, cells in (("proved", proved), ("absent", absent)):
        wanted = np.zeros((LAYERS, POS), bool)
        wanted[tuple(zip(*cells, strict=True))] = True
        assert np.array_equal(hatched(panels(figure)[0], key, (LAYERS, POS)), wanted)
    assert legend(figure)[:2] == ["no effect (proved)", "absent"]
    one = panels(heatmap(data, pair=0))[0]
    assert hatched(one, "proved", (LAYERS, POS)).sum() == len(proved) + 1


def test_textures_differ_in_the_picture_from_a_measured_zero():
    data = mark(mark(result(), 2, (0, 0)), 0, (0, 4))
    data["effect"][:, 0, 2] = 0.0
    figure = heatmap(data, annotate=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=100)
    width, height = (int(n) for n in figure.get_size_inches() * 100)
    image = np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)[::-1, :, :3].astype(int)
    ax, found = panels(figure)[0], []
    for pos in (0, 2, 4):
        left, low = ax.transData.transform((pos - 0.4, -0.4)).astype(int)
        right, high = ax.transData.transform((pos + 0.4, 0.4)).astype(int)
        cell = image[low:high, left:right]
        found.append((cell.mean(), cell.std()))
    (_, hatch), (zero, flat), (grey, _) = found
    assert hatch > 5 * flat + 1
    assert zero > 240 > grey + 10


def test_an_undefined_number_is_not_drawn_as_a_zero():
    data = result()
    data["normalized"][1] = np.nan  # a pair that is too close to divide by
    data["status"][1, 0, 0] = 2
    figure = drawn(heatmap(data, pair=1))
    assert hatched(panels(figure)[0], "absent", (LAYERS, POS)).all()
    assert not hatched(panels(figure)[0], "proved", (LAYERS, POS)).any()
    assert "absent or undefined" in legend(figure)


def test_numbers_in_cells():
    data = mark(result(sizes=(2, POS)), 2, (0, 0))
    data["effect"][:, 0, 1] = 1e-9
    values = tp.over_pairs(data)["normalized"].values
    found = {t.get_position()[::-1]: t.get_text() for t in panels(heatmap(data))[0].texts}
    assert set(found) == {(i, j) for i, j in np.ndindex(2, POS) if abs(values[i, j]) >= 0.005}
    assert len(found) == 6
    assert all(float(text.replace("−", "-")) == pytest.approx(values[at], abs=0.00501) for at, text in found.items())
    assert len(panels(heatmap(data, annotate=False))[0].texts) == 0
    assert "0.00" in names(panels(heatmap(data, annotate=True))[0].texts)
    assert len(panels(heatmap(result(("layer", "head"), (30, 30))))[0].texts) == 0


def test_panels_of_components_share_scale_and_labels():
    data = result(("component", "layer", "pos"), (3, LAYERS, POS), component=["resid_pre", "attn_out", "mlp_out"])
    figure = drawn(heatmap(data))
    mean = tp.over_pairs(data)["normalized"]
    assert names([ax.title for ax in panels(figure)]) == ["resid_pre", "attn_out", "mlp_out"]
    for n, ax in enumerate(panels(figure)):
        assert np.array_equal(shown(ax), mean.values[n])
        assert mesh(ax).norm.vmax == abs(mean).max()
    assert len(scales(figure)) == 1
    assert figure.get_suptitle() == "toy · set · mean over 3 pairs"


def test_panels_of_models_with_their_own_tokens(toys):
    gpt2, llama = panels(drawn(heatmap(tp.concat(toys))))
    assert [gpt2.get_title(), llama.get_title()] == ["gpt2", "llama"]
    assert names(llama.get_xticklabels())[:2] == ["<bos>", "When"]
    assert names(gpt2.get_xticklabels())[0] == "When"
    assert names(gpt2.get_xticklabels())[-1] == ""
    assert hatched(gpt2, "absent", (3, 15)).tolist() == [[False] * 14 + [True]] * 3
    assert hatched(llama, "absent", (3, 15)).tolist() == [[False] * 15] * 2 + [[True] * 15]
    for n, ax in enumerate((gpt2, llama)):
        rows, cells = (toys[n].sizes[dim] for dim in ("layer", "pos"))
        assert np.array_equal(shown(ax)[:rows, :cells], tp.over_pairs(toys[n])["normalized"].values)
        wanted = tp.over_pairs(toys[n])["status"].values == 2
        assert np.array_equal(hatched(ax, "proved", (3, 15))[:rows, :cells], wanted)


def test_metrics_in_their_own_units_have_a_scale_each():
    parts, dim = [result(seed=1), result(seed=2)], xr.Variable("metric", ["logit_diff", "prob"])
    both = xr.concat(parts, dim=dim, data_vars="all", coords="minimal", compat="override")
    both["status"] = both["status"].isel(metric=0, drop=True)
    both.attrs["metrics"] = '{"logit_diff": "", "prob": ""}'
    both["effect"].attrs["units"] = "logits, probability"
    assert len(scales(drawn(heatmap(both)))) == 1
    figure = drawn(heatmap(both, "effect"))
    found = [label(figure, n).partition(" denoising")[0] for n in (0, 1)]
    assert found == ["effect on logit_diff [logits]", "effect on prob [probability]"]
    limits = abs(both["effect"].mean("pair")).max(["layer", "pos"]).values
    assert [mesh(ax).norm.vmax for ax in panels(figure)] == pytest.approx(limits)
    one = heatmap(both.sel(metric="prob"), "effect")
    assert label(one).startswith("effect on prob [probability]")


def test_dims_can_be_chosen():
    data = result(("layer", "head", "pos"), (2, 3, POS))
    figure = drawn(heatmap(data, columns="head"))
    assert names([ax.title for ax in panels(figure)]) == ["head 0", "head 1", "head 2"]
    ax = panels(drawn(heatmap(data.sel(head=1), x="layer", y="pos")))[0]
    assert np.array_equal(shown(ax), tp.over_pairs(data)["normalized"].values[:, 1].T)
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "a prompt is read from the top"
    assert ax.get_title() == "toy · set · head 1 · mean over 3 pairs"
    ax = panels(heatmap(data.sel(head=1, layer=0), y="pair"))[0]
    assert np.array_equal(shown(ax), data["normalized"].values[:, 0, 1])


@pytest.mark.parametrize(("rows", "cells"), [(48, 64), (3, 256), (1, 1), (120, 12)])
def test_number_labels_do_not_touch(rows, cells):
    ax = panels(drawn(heatmap(result(("layer", "head"), (rows, cells)))))[0]
    assert_apart([t.get_window_extent() for t in ax.get_xticklabels()], "x")
    assert_apart([t.get_window_extent() for t in ax.get_yticklabels()], "y")


@pytest.mark.parametrize("cells", [15, 40, 120])
def test_turned_tokens_do_not_touch(cells):
    data = result(sizes=(3, cells)).assign_coords(token=("pos", [f" token{n}" for n in range(cells)]))
    figure = drawn(heatmap(data))
    labels = panels(figure)[0].get_xticklabels()
    assert len(labels) == cells
    points = np.array([panels(figure)[0].transData.transform((n, 0))[0] for n in range(cells)])
    line = labels[0].get_fontsize() / 72 * figure.dpi
    turned = {round(label.get_rotation()) for label in labels}
    assert np.diff(points).min() * np.sin(np.radians(max(turned))) > line


def assert_apart(boxes, axis):
    ends = sorted((getattr(b, f"{axis}0"), getattr(b, f"{axis}1")) for b in boxes)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


def test_title_and_a_given_figure():
    assert panels(heatmap(result(), title="Mine"))[0].get_title() == "Mine"
    assert panels(heatmap(result(), title=""))[0].get_title() == ""
    whole = Figure(figsize=(10, 4), layout="constrained")
    left, right = whole.subfigures(1, 2)
    assert heatmap(result(), figure=left) is whole
    assert bars(result(("name",), (2,), name=["a", "b"]), figure=right) is whole
    assert len(panels(drawn(whole))) == 2


def test_a_notebook_shows_the_figure():
    assert heatmap(result())._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_vector_files(kind):
    figure = heatmap(mark(result(), 2, (0, 0)))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    assert buffer.tell() > 1000


# --------------------------------------------------------------------------------------------------------------- bars


def test_bars_are_averages_with_a_dot_for_each_pair():
    data = result(("name",), (3,), name=["first", "second", "third"])
    ax = panels(drawn(bars(data)))[0]
    assert np.allclose([bar.get_width() for bar in ax.patches], tp.over_pairs(data)["normalized"].values)
    assert names(ax.get_yticklabels()) == ["first", "second", "third"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "names are read from the top"
    dots = next(c for c in ax.collections if type(c).__name__ == "PathCollection").get_offsets()
    assert np.allclose(np.sort(dots[:, 0]), np.sort(data["normalized"].values.ravel()))
    assert np.allclose(np.round(dots[:, 1]).reshape(PAIRS, 3), [[0, 1, 2]] * PAIRS)
    assert "normalized effect on logit_diff" in ax.get_xlabel()


def test_bars_of_layers_and_of_panels():
    data = mark(result(("layer",), (LAYERS,)), 2, (1,))
    figure = drawn(bars(data))
    assert panels(figure)[0].get_ylim()[0] < panels(figure)[0].get_ylim()[1]
    assert hatched(panels(figure)[0], "proved", (LAYERS, 1)).any(1).tolist() == [False, True, False, False]
    other = result(("layer",), (2,), seed=3, model="small")
    figure = drawn(bars(tp.concat([data, other])))
    assert names([ax.title for ax in panels(figure)]) == ["toy", "small"]
    assert len({ax.get_xlim() for ax in panels(figure)}) == 1
    assert legend(figure) == ["no effect (proved)", "absent"]


def test_bars_of_a_sparse_result():
    data = result(("row",), (2,)).assign_coords(layer=("row", [0, 5]), neuron=("row", [17, 3]))
    assert names(panels(drawn(bars(data)))[0].get_yticklabels()) == ["layer 0 neuron 17", "layer 5 neuron 3"]


# ------------------------------------------------------------------------------------------------------------- errors


def refused(call, *parts):
    with pytest.raises(ResultError) as raised:
        call()
    for part in parts:
        assert part in str(raised.value)


def test_errors_say_what_would_be_right():
    data = result(("layer", "head", "pos"), (2, 3, POS))
    tree = xr.DataTree.from_dict({"layer_pos": result(), "name": result(("name",), (2,))})
    refused(lambda: heatmap(tree), "tree", "result['layer_pos']")
    refused(lambda: heatmap(xr.Dataset()), "no tracepatch result")
    refused(lambda: heatmap(data, "efect"), "'efect'", "effect, ", "normalized")
    refused(lambda: heatmap(data, "status"), "'status'")
    refused(lambda: heatmap(data), "layer (2), head (3), pos (5)", "effects.sel(head=0)", "columns='head'")
    refused(lambda: heatmap(data, x="neuron"), "neuron", "layer (2), head (3), pos (5)")
    refused(lambda: heatmap(data, x="pos", y="pos"), "different", "pos, pos")
    refused(lambda: heatmap(result(("layer",), (2,))), "layer (2)", "tp.plots.bars")
    refused(lambda: heatmap(data, "clean"), "(none)", "choose a variable with more")
    refused(lambda: bars(result()), "pos", "tp.plots.heatmap")
    refused(lambda: heatmap(result(), pair=7), "pair 7", "0, 1, 2")
    refused(lambda: heatmap(tp.over_pairs(result()), pair=0), "pair 0")
    refused(lambda: heatmap(result(), limit=0), "limit", "0")
