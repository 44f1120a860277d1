"""Estimates are what the textbook says, on every architecture, and shaped like the effects that they estimate."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import xarray as xr
from conftest import ioi_pairs, toy
from slow import made_up_pairs, untouched
from textbook import DIMS, Textbook

import tracepatch as tp
from tracepatch.errors import ComponentError, RecipeError
from tracepatch.models import start_token
from tracepatch.plan import Status

FOUR = ("gpt2", "llama", "gpt_neox", "gemma2")  # LayerNorm; GQA; parallel blocks; post-norms, softcaps and windows
MORE = tuple(n for n in tiny_models.ALL if n not in (*FOUR, *tiny_models.ENCODER_DECODER, "mamba", "gpt_oss"))
EVERYWHERE = [*FOUR, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
SHARED = ("gptj", "falcon", "phi", "cohere", "cohere2")  # one norm for both branches
SOME = ["gpt2", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_neox", *MORE))]
WORDS = [f"w{i}" for i in range(30, 60)]
BASES = {"denoising": "corrupted", "noising": "clean"}


@cache
def model_of(name: str) -> Any:
    """A tiny model with random weights, in float64."""
    return tp.load(tiny_models.build(name, dtype=torch.float64), tiny_models.tokenizer(), name=name)


@cache
def book(name: str) -> Textbook:
    module = untouched(model_of(name)._module)
    module.set_attn_implementation("eager")
    return Textbook(module)


PAIRS = made_up_pairs(WORDS)


@cache
def encoded() -> Any:
    return PAIRS.encode(tiny_models.tokenizer())


def gap(pair: int) -> Any:
    """The logit difference of a pair at the last position."""
    answer, wrong = list(encoded().answer[pair]), list(encoded().wrong[pair])
    return lambda logits: logits[-1, answer].mean() - logits[-1, wrong].mean()


def surprise(logits: torch.Tensor) -> torch.Tensor:
    """A metric that is not linear in the logits."""
    return torch.tanh(logits.log_softmax(-1)[:, 7] / 3)


def wanted(name: str, of: str, pair: int, base: str, metric: Any = None, **options: Any) -> dict[Any, torch.Tensor]:
    """What the textbook says."""
    clean, corrupted = torch.tensor(encoded().clean[pair]), torch.tensor(encoded().corrupted[pair])
    found: dict[Any, torch.Tensor] = getattr(book(name), of)(
        clean, corrupted, metric or gap(pair), base=base, **options
    )
    return found


def finest(name: str) -> tuple[str, ...]:
    return tp.COMPONENTS[name].index


def of_pair(dataset: xr.Dataset, pair: int, layer: int) -> np.ndarray[Any, Any]:
    """The estimates of one pair and layer, without positions that it lacks."""
    length = len(encoded().clean[pair])
    found = dataset["estimate"].sel(pair=pair)
    if "layer" in found.dims:
        found = found.sel(layer=layer)
    found = found.isel({dim: slice(0, length) for dim in ("pos", "dest", "src") if dim in found.dims})
    return np.nan_to_num(found.values)


def alike(dataset: xr.Dataset, component: str, expected: list[dict[Any, torch.Tensor]], tolerance: float) -> None:
    layers = dataset["layer"].values.tolist() if "layer" in dataset.dims else [0]
    for pair, by_key in enumerate(expected):
        scale = max(float(v.abs().max()) for v in by_key.values())
        for layer in layers:
            theirs = by_key[component, layer].numpy()
            np.testing.assert_allclose(
                of_pair(dataset, pair, layer), theirs, atol=tolerance * max(1.0, scale), rtol=0, err_msg=f"{component} of layer {layer}, pair {pair}"
            )  # fmt: skip


def require_seen(expected: list[dict[Any, torch.Tensor]]) -> None:
    """Skips a type of model whose patterns the oracle does not see."""
    if not all(expected):
        pytest.skip("the oracle sees no patterns there")


def rounding(name: str) -> float:
    """Some models rotate, norm or attend in float32, whatever their dtype."""
    return 1e-11 if name == "gpt2" else 1e-5


def offered(name: str) -> list[str]:
    found = tp.Architecture(model_of(name))
    return [c for c in tp.COMPONENTS if c != "logits" and any(found.offers(c, i) for i in range(len(found)))]


# ------------------------------------------------------------------------------------------------- the textbook


@pytest.mark.parametrize("direction", BASES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_attribution_patching_of_every_component(name: str, direction: str) -> None:
    expected = [wanted(name, "attribution", pair, BASES[direction]) for pair in range(len(PAIRS))]
    known = {c for c, _ in expected[0]}
    compared = [c for c in offered(name) if c in known]
    assert len(compared) >= 9
    for component in compared:
        dataset = tp.attribute(model_of(name), PAIRS, component, by=finest(component), direction=direction)  # type: ignore[arg-type]
        if component == "attn_in_scale" and name in SHARED:  # here what one branch alone divides by; there what both do
            other = tp.attribute(model_of(name), PAIRS, "mlp_in_scale", by=finest(component), direction=direction)  # type: ignore[arg-type]
            dataset = dataset.assign(estimate=dataset["estimate"] + other["estimate"])
        if component != "mlp_in_scale" or name not in SHARED:
            alike(dataset, component, expected, rounding(name))


HOLDS = ("norms", "pattern", ("attn_out", 1), ("mlp_in", 2))
RULES = (("norm", "identity", "half"), ("norm",), ("identity",), ("half",), ("pattern",))


def some(choices: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Each choice on two architectures; with the slow tests on four, and the first choice on all."""
    found = []
    for name in (*FOUR, *MORE):
        for choice in choices if name in FOUR else choices[:1]:
            slow = [] if name in ("gpt2", "gemma2") else [pytest.mark.slow]
            found.append(pytest.param(name, choice, marks=slow, id=f"{name}-{choice}"))
    return pytest.mark.parametrize(("name", "choice"), found)


@some(HOLDS)
def test_what_is_held(name: str, choice: Any) -> None:
    try:
        datasets = {
            c: tp.attribute(model_of(name), PAIRS, c, by=finest(c), estimator=tp.AtP(hold=(choice,)))
            for c in ("resid_pre", "z", "mlp_act", "q_in")
            if c in offered(name)
        }
    except ComponentError as error:
        pytest.skip(str(error)[:80])
    expected = [wanted(name, "attribution", pair, "corrupted", frozen=[choice]) for pair in range(len(PAIRS))]
    for component, dataset in datasets.items():
        if (component, 0) in expected[0]:  # the oracle does not see all readers of all types
            alike(dataset, component, expected, rounding(name))


@some(RULES)
def test_relp(name: str, choice: tuple[str, ...]) -> None:
    try:
        datasets = {
            c: tp.attribute(model_of(name), PAIRS, c, by=finest(c), estimator=tp.RelP(choice))
            for c in ("resid_pre", "z", "mlp_out")
            if c in offered(name)
        }
    except ComponentError as error:
        pytest.skip(str(error)[:80])
    try:
        expected = [wanted(name, "relp", pair, "corrupted", rules=choice) for pair in range(len(PAIRS))]
    except ValueError as error:
        pytest.skip(f"the oracle says: {error}")
    for component, dataset in datasets.items():
        alike(dataset, component, expected, rounding(name))


@pytest.mark.parametrize("direction", BASES)
@pytest.mark.parametrize("name", SOME)
def test_queries_and_keys_are_fixed(name: str, direction: str) -> None:
    if not {"q", "pattern"} <= set(offered(name)):
        pytest.skip("its attention cannot be entered")
    expected = [wanted(name, "qk_fix", pair, BASES[direction]) for pair in range(len(PAIRS))]
    require_seen(expected)
    together = [wanted(name, "qk_fix", pair, BASES[direction], whole=True) for pair in range(len(PAIRS))]
    star = tp.AtPStar()
    for component in ("q", "k"):
        fine = tp.attribute(model_of(name), PAIRS, component, by=finest(component), direction=direction, estimator=star)  # type: ignore[arg-type]
        alike(fine, component, expected, rounding(name))
        whole = tp.attribute(model_of(name), PAIRS, component, direction=direction, estimator=star)  # type: ignore[arg-type]
        alike(whole, component, together, rounding(name))


@pytest.mark.parametrize("name", SOME)
def test_grad_drop(name: str) -> None:
    star = tp.AtPStar(drop=True)
    expected = [wanted(name, "grad_drop", pair, "corrupted") for pair in range(len(PAIRS))]
    for component in ("resid_pre", "resid_mid", "attn_out", "z", "mlp_act"):
        if component in offered(name):
            dataset = tp.attribute(model_of(name), PAIRS, component, by=finest(component), estimator=star)
            alike(dataset, component, expected, rounding(name))


def test_grad_drop_of_fixed_queries() -> None:
    for component in ("q", "k"):
        expected = [wanted("gpt2", "grad_drop", pair, "corrupted", method="qk_fix") for pair in range(len(PAIRS))]
        dataset = tp.attribute(
            model_of("gpt2"), PAIRS, component, by=finest(component), estimator=tp.AtPStar(drop=True)
        )
        alike(dataset, component, expected, 1e-11)


@pytest.mark.parametrize("rule", ["midpoint", "left", "right"])
@pytest.mark.parametrize("name", SOME[:4])
def test_integrated_gradients_along_the_inputs(name: str, rule: Any) -> None:
    expected = [wanted(name, "integrated", pair, "corrupted", n=3, rule=rule) for pair in range(len(PAIRS))]
    for component in ("resid_pre", "z", "k_in", "mlp_act", "resid_mid", "pattern"):
        if component in offered(name):
            how = tp.IntegratedGradients(steps=3, rule=rule)
            dataset = tp.attribute(model_of(name), PAIRS, component, by=finest(component), estimator=how)
            alike(dataset, component, expected, rounding(name))


@pytest.mark.parametrize("component", ["resid_pre", "q", "z", "attn_out", "mlp_act", "embed"])
@pytest.mark.parametrize("name", SOME[:4])
def test_integrated_gradients_along_each_layer(name: str, component: str) -> None:
    how = tp.IntegratedGradients(steps=3, along="layer")
    dataset = tp.attribute(model_of(name), PAIRS, component, by=finest(component), estimator=how)
    keys = [(component, layer) for layer in (dataset["layer"].values.tolist() if "layer" in dataset.dims else [0])]
    given = {"along": "component", "keys": keys, "n": 3}
    alike(
        dataset,
        component,
        [wanted(name, "integrated", pair, "corrupted", **given) for pair in range(3)],
        rounding(name),
    )


@pytest.mark.parametrize("name", SOME)
def test_single_weights(name: str) -> None:
    if "pattern" not in offered(name):
        pytest.skip("its patterns cannot be seen")
    kinds = {"plain": {}, "renormalised": {"renormalize": True}, "centred": {"value_bias": False}}
    for kind, options in kinds.items():
        try:
            dataset = tp.attribute(model_of(name), PAIRS, "pattern", by=finest("pattern"), **options)  # type: ignore[arg-type]
        except RecipeError:
            assert kind == "centred"
            continue
        expected = [wanted(name, "pattern_patching", pair, "corrupted", kind=kind) for pair in range(len(PAIRS))]
        require_seen(expected)
        alike(dataset, "pattern", expected, rounding(name))


def test_a_metric_that_is_not_linear_and_several_metrics() -> None:
    several = [tp.logit_diff, tp.metric(surprise), tp.log_prob, tp.kl]
    dataset = tp.attribute(model_of("gpt2"), PAIRS, "z", several, by=finest("z"), direction="noising")
    assert dataset["estimate"].dims == ("metric", "pair", "layer", "pos", "head")
    metrics = (gap, lambda pair: lambda logits: surprise(logits[-1:])[0])
    for number, metric in enumerate(metrics):
        expected = [wanted("gpt2", "attribution", pair, "clean", metric(pair)) for pair in range(len(PAIRS))]
        alike(dataset.isel(metric=number), "z", expected, 1e-6)
    assert abs(dataset.sel(metric="kl")["estimate"]).max() < 1e-6, "the divergence from the clean run is flat there"


@pytest.mark.parametrize("source", [0, 0.5])
def test_ablation(source: float) -> None:
    values = [book("llama").values(torch.tensor(encoded().clean[pair])) for pair in range(len(PAIRS))]
    for component in ("z", "resid_pre", "mlp_act", "v_in"):
        written = [{k: torch.full_like(v, source) for k, v in value.items() if k[0] == component} for value in values]
        expected = [wanted("llama", "attribution", pair, "clean", source=w) for pair, w in enumerate(written)]
        dataset = tp.attribute(
            model_of("llama"), PAIRS, component, by=finest(component), direction="noising", source=source
        )
        alike(dataset, component, expected, 1e-5)


def test_a_tensor_is_written_where_a_patch_writes_it() -> None:
    """One of ``[pos, d_head]`` fits the sites of a sweep over heads, whatever dims it would broadcast along."""
    model = model_of("llama")
    steer = torch.arange(7 * 16.0, dtype=torch.float64).reshape(7, 16) / 50
    given: Any = {"by": ("layer", "head"), "direction": "noising"}
    found = tp.attribute(model, PAIRS[:2], "z", source=steer, **given)
    values, slopes = (getattr(book("llama"), of) for of in ("values", "gradients"))
    for pair in range(2):
        prompt = torch.tensor(encoded().clean[pair])
        change = steer[:, None] - values(prompt)["z", 1]
        expected = (change * slopes(prompt, gap(pair))["z", 1]).sum((0, 2))
        np.testing.assert_allclose(found["estimate"].sel(pair=pair, layer=1), expected.numpy(), atol=1e-5)
    halved = tp.attribute(model, PAIRS, "z", source=lambda live: live / 2, **given)["estimate"]
    zero = tp.attribute(model, PAIRS, "z", source=0, **given)["estimate"]
    np.testing.assert_allclose(halved, zero / 2, atol=1e-6)
    with pytest.raises(RecipeError, match="does not fit"):
        tp.attribute(model, PAIRS, "z", source=torch.ones(5), **given)


# ------------------------------------------------------------------------------------------------- shapes and labels


@pytest.mark.parametrize(
    ("component", "options"),
    [
        ("resid_pre", {}),
        ("z", {}),
        ("z", {"by": ("head", "layer", "pos"), "only": {"pos": [1, -1], "layer": slice(1, 3)}}),
        ("k", {"only": {"pos": [3]}}),
        ("mlp_act", {"by": ("layer", "neuron"), "only": {"neuron": [0, 5]}}),
        ("pattern", {"by": ("layer", "head", "dest", "src")}),
        ("embed", {}),
        (("attn_out", "mlp_out", "resid_mid"), {"direction": "noising"}),
        ("z", {"direction": "noising", "source": 0}),
    ],
    ids=str,
)
def test_an_estimate_has_the_cells_of_the_exact_sweep(component: Any, options: dict[str, Any]) -> None:
    given = toy("llama"), ioi_pairs(2)
    exact = tp.patch(*given, component, checks=False, **options)
    found = tp.attribute(*given, component, **options)
    error = found["estimate"] - exact["effect"]
    assert error.shape == exact["effect"].shape == found["estimate"].shape
    assert error.dims == exact["effect"].dims
    np.testing.assert_array_equal(np.isnan(found["estimate"]), np.isnan(exact["effect"]))
    for name in set(exact.coords):
        assert (found[name].values == exact[name].values).all(), name
    for name in ("clean", "corrupted", "base"):
        np.testing.assert_allclose(found[name], exact[name], atol=1e-4)
    np.testing.assert_allclose(
        found["normalized"], found["estimate"] / (found["clean"] - found["corrupted"]), atol=1e-6
    )
    assert (found["status"].values == np.where(np.isnan(exact["effect"]), Status.ABSENT, Status.ESTIMATED)).all()
    assert np.isfinite(found["estimate"].values[~np.isnan(exact["effect"].values)]).all()


def test_pairs_of_several_lengths_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one pair, and of all pairs of a length, give the same numbers."""
    made = tp.toys.tasks.ioi(4, templates=tp.toys.tasks.TEMPLATES[:2])
    pairs = tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong)
    whole = tp.attribute(toy("gpt2"), pairs, "z", by=finest("z"))
    chunked = tp.attribute(toy("gpt2"), pairs, "z", by=finest("z"), memory=1)
    assert set(encoded_lengths(pairs)) != {encoded_lengths(pairs)[0]}
    np.testing.assert_allclose(whole["estimate"], chunked["estimate"], atol=1e-4)


def encoded_lengths(pairs: tp.Pairs) -> tuple[int, ...]:
    return pairs.encode(toy("gpt2").tokenizer, start_token(toy("gpt2"))).lengths


def test_before_the_first_differing_position_estimates_are_exactly_0() -> None:
    dataset = tp.attribute(toy("gpt2"), ioi_pairs(3), "resid_pre")
    first = min(ioi_pairs(3).encode(toy("gpt2").tokenizer).differing(0))
    assert first > 0
    assert not dataset["estimate"].isel(pair=0, pos=slice(0, first)).values.any()
    assert dataset["estimate"].isel(pair=0, pos=first).values.any()


@pytest.mark.parametrize(
    ("cost", "component", "how"),
    [
        ("2 forwards and 1 backward", "z", None),
        ("4 forwards and 1 backward", "q", tp.AtPStar()),
        ("5 forwards and 1 backward", ("q", "k"), tp.AtPStar()),
        ("2 forwards and 4 backwards", "z", tp.AtPStar(drop=True)),
        ("6 forwards and 4 backwards", "z", tp.IntegratedGradients(steps=4)),
        ("14 forwards and 12 backwards", "z", tp.IntegratedGradients(steps=4, along="layer")),
    ],
    ids=str,
)
def test_costs_are_counted(cost: str, component: Any, how: Any) -> None:
    found = tp.attribute(toy("gpt2"), ioi_pairs(2), component, by=("layer",), estimator=how)
    assert found.attrs["cost"] == f"{cost} a pair"


def test_nothing_of_the_model_is_left_changed() -> None:
    model = toy("gpt2")
    before = [p.requires_grad for p in model._module.parameters()], model._module.config._attn_implementation
    tp.attribute(model, ioi_pairs(2), "q", estimator=tp.AtPStar())
    after = [p.requires_grad for p in model._module.parameters()], model._module.config._attn_implementation
    assert before == after
    assert all(p.grad is None for p in model._module.parameters())


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("components", "options", "words"),
    [
        ("logits", {}, "logits are what the metric reads"),
        ("z", {"renormalize": True}, "speak of attention weights"),
        ("z", {"direction": "up"}, "'denoising' or 'noising'"),
        ("z", {"estimator": tp.AtP(hold=("norm",))}, "hold takes 'norms'"),
        ("z", {"estimator": tp.AtP(hold=(("head_out", 0),))}, "Stop it at z or attn_out"),
        ("resid_mid", {"estimator": tp.IntegratedGradients(along="layer")}, "along='site' takes any"),
        ("z", {"estimator": tp.IntegratedGradients(), "source": 0}, "source= is no prompt"),
        ("q", {"estimator": tp.AtPStar(), "source": 0}, "source= is none"),
        (("z", "resid_pre"), {}, "have different dims"),
        ("z", {"by": ("head",)}, "layer by layer"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(components: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tp.attribute(toy("gpt2"), ioi_pairs(2), components, **options)


def test_rules_that_a_model_does_not_allow() -> None:
    with pytest.raises(ComponentError, match="no identity and half rules"):
        tp.attribute(tp.load(tiny_models.build("mixtral"), tiny_models.tokenizer()), PAIRS, "z", estimator=tp.RelP())


@pytest.mark.parametrize("steps", [0, True, 1.5])
def test_steps_are_a_number(steps: Any) -> None:
    with pytest.raises(RecipeError, match="number of points"):
        tp.IntegratedGradients(steps=steps)


def test_dims_are_those_of_the_oracle() -> None:
    for name, dims in DIMS.items():
        assert (
            tuple(d for d in tp.COMPONENTS[name].index if d != "layer")
            == tuple(d for d in dims if not d.startswith("d_") and d != "vocab")
            or name == "logits"
        )
