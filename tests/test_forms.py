"""Packed, staggered and flat batches: the same numbers, whatever rows say, however they are seated and split."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ioi_pairs, toy
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import Slow, gap, made_up_pairs
from test_oracle import INSIDE
from test_twins import without_weights
from tiny_models import build, config, tokenizer

import tracepatch as tp
from tracepatch import costs, entrance, errors, forms, masks, packing, steps, trace
from tracepatch.architecture import architecture_of
from tracepatch.climb import standing
from tracepatch.forms import allowed
from tracepatch.jobs import EAGER, Job
from tracepatch.sites import SCALES
from tracepatch.table import FORMS, Form, Table, seat

OWN = ("gpt_neo", "mpt")  # attention in code of their own
WORDS = [f"w{i}" for i in range(30, 60)]
Record = Callable[[tp.Patching], None]


def numbers(p: tp.Patching) -> np.ndarray:
    """[row, pair, metric], of rows that are numbered."""
    value = p.run(progress=False)["value"]
    value = value if "metric" in value.dims else value.expand_dims("metric")
    return np.asarray(value.transpose("number", "pair", "metric").values)


def each_form(
    model: Any,
    pairs: tp.Pairs,
    record: Record,
    metric: Any = tp.logit_diff,
    forms: Sequence[Form] = FORMS,
    **options: Any,
) -> dict[Form, tp.Patching]:
    found = {}
    for form in forms:
        with tp.patching(model, pairs, metric, form=form, **options) as p:
            record(p)
        found[form] = p
    return found


def agree(
    model: Any, pairs: tp.Pairs, record: Record, metric: Any = tp.logit_diff, **options: Any
) -> dict[Form, tp.Patching]:
    """Every form gives the same, and what one plain forward a row gives, where the metric is the oracle's."""
    found = each_form(model, pairs, record, metric, **options)
    values = {form: numbers(p) for form, p in found.items()}
    first = values["flat"] if "flat" in values else next(iter(values.values()))
    scale = 1 + np.nanmax(np.abs(first))
    for form, value in values.items():
        np.testing.assert_allclose(value, first, atol=1e-5 * scale, rtol=0, err_msg=form)
    if metric is tp.logit_diff:
        p = next(iter(found.values()))
        said = " ".join(map(str, (*p.rows, *p.edited.values())))  # what is pruned is in the oracle's rows all the same
        eager = any(name in said for name in EAGER)
        slow = Slow(tp.models.module_of(model), p.encoded, eager=eager, edited=p.edited)
        np.testing.assert_allclose(first[..., 0], slow.score(p.rows, gap(p.encoded)), atol=2e-5 * scale, rtol=0)
    return found


def tiny(model_type: str, layers: int = 2, **sizes: Any) -> Any:
    return tp.load(build(model_type, layers=layers, dtype=torch.float64, **sizes), tokenizer())


def batches(p: tp.Patching, form: Form) -> list[Any]:
    return [batch for group in p.plan.groups for batch in group.batches if batch.form == form]


# ------------------------------------------------------------------------------------------------- against the oracle


def thin(p: tp.Patching, names: Sequence[str]) -> None:
    """A few sites of each component in each layer, into the corrupted run and into the clean one by turns."""
    number = 0
    for name in names:
        kind = tp.COMPONENTS[name]
        for layer in range(len(p.architecture)) if kind.layered else (0,):
            units = p.architecture.units(name, layer)
            whole: list[tuple[Any, ...]] = [(slice(None),), (9,), ([10, -1],), (slice(9, None, 2),)]
            sites = [
                (*pos, *unit) for pos in whole for unit in ([(units - 1,), ([0, units // 2],)] if kind.unit else [()])
            ]
            if kind.attends:
                sites = [
                    (0, slice(9, None), slice(None)),
                    (slice(None), -1, [0, 9]),
                    ([0, units - 1], 9, 2),
                    (1, slice(None), slice(1, 10)),
                ]
            for site in sites[number % 2 :: 2]:
                base, other = ((p.corrupted, p.clean), (p.clean, p.corrupted))[number // 2 % 2]
                at = (layer, *site) if kind.layered else site
                with p.row(number=number):
                    getattr(base, name)[at] = getattr(other, name)[at]
                number += 1


@pytest.mark.parametrize("name", tp.toys.NAMES)
def test_each_form_equals_one_forward_per_patch(name: str) -> None:
    """Every component: those of which a table has no values, those that are seen only step by step, the others."""
    offered = [c for c in tp.COMPONENTS if c not in SCALES and architecture_of(toy(name)).offers(c, 0)]
    flat, eager = [c for c in offered if c in entrance.OUTSIDE], [c for c in offered if c in EAGER]
    others = [c for c in offered if c not in (*flat, *eager)]
    assert len(flat) >= 3
    assert len(eager) == 2
    assert len(others) >= 13
    for names, batch_size in ((flat, None), (eager, 3), (eager, None), (others, None)):
        found = agree(toy(name), ioi_pairs(1), lambda p, n=names: thin(p, n), batch_size=batch_size)
        for form, p in found.items():
            assert {b.form for g in p.plan.groups for b in g.batches} == {"flat" if names is flat else form}


def swept(p: tp.Patching) -> None:
    number = 0
    for name in ("resid_pre", "z", "mlp_out"):
        for layer in range(len(p.architecture)):
            for pos in range(0, p.lengths[0], 2):
                for base, other in ((p.clean, p.corrupted), (p.corrupted, p.clean)):
                    with p.row(number=number):
                        getattr(base, name)[layer, pos] = getattr(other, name)[layer, pos]
                    number += 1


@pytest.mark.parametrize("ride", [0, 20, 320])
def test_rows_that_ride_with_their_worlds_and_rows_that_do_not(ride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of two lengths that differ at the start, in the middle and at two places."""
    monkeypatch.setattr(packing.Packer._riding, "__defaults__", (ride,))
    monkeypatch.setattr(costs, "TOKENS", 60)
    model = tiny("llama")
    p = agree(model, made_up_pairs(WORDS), swept)["packed"]
    worlds = [b.table.worlds for b in batches(p, "packed")]
    assert (any(worlds), all(worlds)) == {0: (False, False), 20: (True, False), 320: (True, True)}[ride]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_any_number_of_rows_a_run(batch_size: int) -> None:
    found = agree(tiny("gpt_neox"), made_up_pairs(WORDS), swept, batch_size=batch_size)
    for form, p in found.items():
        assert max(len(b.jobs) for b in batches(p, form)) == batch_size


@pytest.mark.parametrize("memory", [1, 100_000, 1_000_000])
def test_tables_that_memory_has_no_room_for_are_split(memory: int) -> None:
    model, pairs = tiny("gemma2"), made_up_pairs(WORDS)
    large = each_form(model, pairs, swept, forms=["packed"])["packed"]
    p = agree(model, pairs, swept, memory=memory)["packed"]
    assert len(batches(p, "packed")) > len(batches(large, "packed"))
    for batch in batches(p, "packed"):
        size = costs.table_bytes(
            p.architecture, batch.table, len(p.plan.groups[0].reads) * 6
        )  # 3 answers, 3 wrong ones
        assert size <= memory / 2 or len(batch.jobs) == 1


METRICS = {
    "before the row's start": lambda: [tp.logit_diff.at(slice(None)), tp.logit.at([0, 2])],
    "the first and the last": lambda: [tp.logit_diff.at([1, -1]), tp.kl.at([0, -1])],
    "the first": lambda: [tp.logit_diff.at(0)],
    "the last but one": lambda: [tp.logit_diff.at(-2), tp.log_prob.at(slice(0, -1))],
    "distributions": lambda: {"a": tp.kl, "b": tp.kl.at(slice(None)), "c": tp.cross_entropy, "d": tp.prob},
    "few of the vocabulary": lambda: [tp.metric(lambda logits: logits[:, 1] - logits[:, 0], "pair", vocab=(41, 7)).at(slice(1, None))],
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
@pytest.mark.parametrize("read", METRICS)
def test_whatever_metrics_read(model_type: str, read: str) -> None:
    agree(tiny(model_type), made_up_pairs(WORDS), swept, METRICS[read](), prune=read != "the first")


# ------------------------------------------------------------------------------------------------- one by one, once wrong


def test_a_world_of_edited_keys_and_values_is_not_in_a_cache() -> None:
    """A cache has them as they were before the edit."""

    def record(p: tp.Patching) -> None:
        for number, name in enumerate(("k", "v")):
            world = p.world(f"no_{name}", of=p.corrupted)
            getattr(world, name)[1, 2] = 0
            with p.row(number=2 * number):
                world.resid_pre[1, -1] = p.clean.resid_pre[1, -1]
            with p.row(number=2 * number + 1):
                world.resid_pre[2, -1] = p.clean.resid_pre[2, -1]

    agree(toy("gpt2"), ioi_pairs(2), record)


def test_staggered_rows_redo_what_an_edited_world_does_before_them() -> None:
    """They start at the first position that is read, however late their own edits are."""

    def record(p: tp.Patching) -> None:
        world = p.world("w", of=p.clean)
        world.z[0, :, 3] = 0
        with p.row(number=0):
            world.q[0, 5:, 1] += 1.0

    agree(toy("gpt2"), ioi_pairs(2), record, [tp.logit_diff.at(slice(1, None))])


def test_a_world_that_acts_after_the_last_position_that_is_read() -> None:
    def record(p: tp.Patching) -> None:
        world, other = p.world("w", of=p.clean), p.world("o", of=p.clean)
        world.mlp_out[1, :] = 0.5
        other.mlp_out[1, :] = lambda live: live.flip(1)
        for number, base in enumerate((world, other)):
            with p.row(number=number):
                base.resid_pre[1, 9] = p.corrupted.resid_pre[1, 9]

    agree(toy("gpt2"), ioi_pairs(2), record, [tp.logit_diff.at(9)], prune=False)


def test_the_unpatched_witness_of_an_edited_world() -> None:
    """It has the world's own keys, values, scores and functions, wherever they are."""

    def record(p: tp.Patching) -> None:
        number = 0
        for name in ("k", "v", "scores", "z"):
            for layer in (1, 2):
                world = p.world(f"w_{name}{layer}", of=p.corrupted)
                if name == "z":
                    world.z[layer, 4:9] = lambda live: live.flip(1)
                else:
                    getattr(world, name)[layer, 1] = 0.5
                for start in (0, 3):
                    with p.row(number=number):
                        world.resid_pre[1, start] = 2 * world.resid_pre[1, start] - p.clean.resid_pre[2, start]
                    number += 1
                with p.row(number=number):
                    world.resid_post[2, -1] = p.clean.resid_post[2, -1]
                number += 1

    agree(toy("gpt2"), ioi_pairs(1), record, [tp.logit_diff], batch_size=1)  # functions are beyond the oracle


def test_an_edited_worlds_attention_among_rows_of_others() -> None:
    def record(p: tp.Patching) -> None:
        world = p.world("w", of=p.corrupted)
        world.scores[0, 0] = p.clean.scores[0, 0]
        with p.row(number=0):
            world.scores[0, 3, -1, 0] += p.clean.scores[0, 3, -1, 0]
        with p.row(number=1):
            p.corrupted.pattern[1, 0, -1, :] = 2 * p.clean.pattern[1, 0, -1, :]
        with p.row(number=2):
            world.z[0, 9:, 1] = 0

    agree(toy("gemma2"), ioi_pairs(2), record, prune=False)


@pytest.mark.parametrize("name", ["embed", "logits_in_scale", "logits", "module"])
def test_values_that_no_table_has_keep_rows_from_riding(name: str) -> None:
    """A table grows after the embedding, and leaves before the last norm."""

    def record(p: tp.Patching) -> None:
        with p.row(number=0):
            p.corrupted.resid_pre[1, 9] = p.clean.resid_pre[1, 9]
        with p.row(number=1):
            if name == "module":
                p.corrupted.output("transformer.ln_f")[-1] = p.clean.output("transformer.ln_f")[-1]
            else:
                getattr(p.corrupted, name)[-1 if name != "embed" else 9] = getattr(p.clean, name)[
                    -1 if name != "embed" else 9
                ]

    found = agree(toy("gpt2"), ioi_pairs(2), record, [tp.logit_diff])
    assert not any(b.table.worlds for b in batches(found["packed"], "packed"))


def test_values_that_pass_by_later_are_not_written_in_the_run_that_computes_them() -> None:
    """Of a later layer, of a later component of the same layer; and, in that run, of an earlier one."""

    def record(p: tp.Patching) -> None:
        sources = (p.clean.resid_pre[2, 9], p.clean.mlp_out[1, 9], p.clean.attn_out[1, 9], p.clean.mlp_out[0, 9])
        for number, source in enumerate(sources):
            with p.row(number=number):
                p.corrupted.attn_out[1, 9] = source

    p = agree(toy("gpt2"), ioi_pairs(2), record)["packed"]
    riding = [b for b in batches(p, "packed") if b.table.worlds]
    assert {job.row for b in riding for job in b.jobs} == {2, 3}


def test_a_function_of_the_stream_above_the_last_layer_is_given_all_of_it() -> None:
    """Although the last MLP is computed for the tokens alone that are read."""

    def record(p: tp.Patching) -> None:
        with p.row(number=0):
            p.corrupted.resid_post[2, :] = lambda live: live.mean(1, keepdim=True).expand_as(live)
        with p.row(number=1):
            p.corrupted.logits_in[3:] = lambda live: live.flip(1)

    agree(toy("gpt2"), ioi_pairs(2), record, [tp.logit_diff])


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_edited_beside_rows_that_read_streams_of_single_heads(form: Form) -> None:
    """Shadow rows have logits too."""

    def record(p: tp.Patching) -> None:
        with p.row(number=0):
            p.corrupted.logits[-1] = 2 * p.clean.logits[-1]
        with p.row(number=1):
            p.corrupted.q_in[1, :, [0, 2]] = p.clean.q_in[1, :, [0, 2]]
        with p.row(number=2):
            p.corrupted.resid_pre[1, 9:] = p.clean.resid_pre[1, 9:]
            p.corrupted.logits[-1] += p.clean.logits[-1]

    p = each_form(toy("gpt2"), ioi_pairs(2), record, forms=[form])[form]
    slow = Slow(tp.models.module_of(toy("gpt2")), p.encoded)
    np.testing.assert_allclose(numbers(p)[..., 0], slow.score(p.rows, gap(p.encoded)), atol=3e-4)


# ------------------------------------------------------------------------------------------------- whatever rows say


def flipped(live: torch.Tensor) -> torch.Tensor:
    return live.flip(1) if live.ndim > 2 else -live


def averaged(live: torch.Tensor) -> torch.Tensor:
    return live.mean(1, keepdim=True).expand_as(live) if live.ndim > 2 else live / 2


def mixed(live: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    return live + 0.7 * clean.flip(1) - 0.2 * corrupted if clean.ndim > 2 else live - 0.4 * corrupted


class Chance:
    """Pairs, metrics and rows by chance; ``plain`` ones are those that the oracle can measure."""

    def __init__(self, model_type: str, seed: int, plain: bool) -> None:
        self.model_type = model_type
        self.random, self.plain = random.Random(f"{seed} {plain}"), plain
        self.length = 9

    def pairs(self) -> tp.Pairs:
        """Of equal or unequal lengths, that differ at the start, at the end, or in between."""
        r, sides = self.random, ([], [])
        lengths = r.choice([[6], [6, 6], [5, 8], [4, 7, 7]])
        self.length = min(lengths)
        for length in lengths:
            ids = [r.randint(10, 58) for _ in range(length)]
            places = r.choice([[0], [length - 1], [r.randrange(length)], sorted({1, r.randrange(length)})])
            sides[0].append(ids)
            sides[1].append([(x - 3) % 48 + 10 if i in places else x for i, x in enumerate(ids)])
        picks = r.sample(range(10, 59), 2 * len(lengths))
        return tp.Pairs(*sides, [[i] for i in picks[::2]], [[i] for i in picks[1::2]])

    def metrics(self) -> Any:
        if self.plain:
            return tp.logit_diff
        at = self.random.choice([-1, slice(None), [1, -1], 0, -2, slice(1, None)])
        few = tp.metric(lambda logits: logits[:, 0] - 2 * logits[:, 1], "few", vocab=(33, 12)).at(at)
        several = [
            tp.logit_diff,
            tp.logit_diff.at(at),
            tp.logit,
            few,
            tp.kl.at(at),
            tp.cross_entropy,
            tp.log_prob.at(at),
        ]
        found = self.random.sample(several, self.random.randint(1, 2))
        return {f"{i}": m for i, m in enumerate(found)}

    def options(self) -> dict[str, Any]:
        r = self.random
        return {
            "batch_size": r.choice([None, None, 1, 2, 7]),
            "memory": r.choice([None, None, 1, 300_000]),
            "prune": r.random() < 0.8,
        }

    def index(self, count: int) -> Any:
        r = self.random
        start = r.randrange(count)
        several = sorted(r.sample(range(count), r.randint(1, min(3, count))))
        return r.choice([start, start, -1, slice(None), slice(start, None), slice(None, start + 1), several])

    def edit(self, p: tp.Patching, base: Any, worlds: Sequence[Any], names: Sequence[str]) -> None:
        r, name = self.random, self.random.choice(names)
        kind, depth = tp.COMPONENTS[name], len(p.architecture)
        layer = r.choice([i for i in range(depth) if p.architecture.offers(name, i)])
        sizes = {"pos": self.length, "dest": self.length, "src": self.length}
        units = p.architecture.units(name, layer)
        site = tuple(layer if dim == "layer" else self.index(sizes[dim]) if dim in sizes else r.choice([r.randrange(units), slice(None), [0, units - 1]]) for dim in kind.index)  # fmt: skip
        mine, theirs = getattr(base, name), getattr(r.choice(worlds), name)
        if name in SCALES:
            mine[site] = r.choice([theirs[site], 2 * mine[site]])
            return
        number = name in ("mlp_act", "router_logits") or kind.attends
        vector = torch.randn(
            p.architecture.width(name, layer), generator=torch.Generator().manual_seed(r.randrange(99))
        )
        values: list[Callable[[], Any]] = [
            lambda: theirs[site], lambda: theirs[site], lambda: mine[site], lambda: 0,
            lambda: 2 * theirs[site] - mine[site] / 2, lambda: 0.25 if number else vector, lambda: p.gaussian(0.5, seed=3),
        ]  # fmt: skip
        if not self.plain:
            values += [lambda: flipped, lambda: averaged, lambda: mixed]
        if kind.index == ("layer", "pos") and not number:
            values.append(lambda: p.corrupted.resid_pre[r.randrange(depth), site[1]])
        value = r.choice(values)()
        if r.random() < 0.25 and not callable(value):
            mine[site] += value
        else:
            mine[site] = value

    def record(self, p: tp.Patching) -> None:
        r, depth = self.random, len(p.architecture)
        names = [n for n in tp.COMPONENTS if any(p.architecture.offers(n, i) for i in range(depth))]
        if self.plain:  # what is beyond the oracle
            names = [n for n in names if n not in SCALES and (self.model_type not in OWN or n not in INSIDE)]
        streams = [
            n for n in names if n in ("resid_pre", "resid_post", "resid_mid", "z", "mlp_out", "attn_out", "k", "v")
        ]
        names = r.choice([names, streams])
        worlds = [p.clean, p.corrupted]
        for i in range(r.choice([0, 0, 1, 2])):
            world = p.world(f"w{i}", of=r.choice(worlds))
            world.resid_pre[0, 0] += 0.5
            for _ in range(2):
                self.attempt(lambda w=world: self.edit(p, w, worlds, names))
            worlds.append(world)
        for number in range(r.choice([4, 12])):
            base = r.choice(worlds)

            def row(base: Any = base, number: int = number) -> None:
                with p.row(number=number, renormalize=not self.plain and r.random() < 0.1):
                    for _ in range(r.choice([1, 1, 2, 3])):
                        self.edit(p, base, worlds, names)

            self.attempt(row)
        with p.row(number=99):
            p.corrupted.resid_pre[0, :] = p.clean.resid_pre[0, :]

    def attempt(self, write: Callable[[], None]) -> None:
        """Leaves out what is refused in words."""
        with contextlib.suppress(errors.TracepatchError):
            write()


def by_chance(model_type: str, seed: int, plain: bool) -> None:
    chance = Chance(model_type, seed, plain)
    model = tiny(model_type, layers=chance.random.choice([2, 3]))
    pairs, metrics, options = chance.pairs(), chance.metrics(), chance.options()
    state = chance.random.getstate()

    def record(p: tp.Patching) -> None:
        chance.random.setstate(state)
        chance.record(p)

    forms = [form for form in FORMS if form not in allowed(model, architecture_of(model)).refused]
    try:
        agree(model, pairs, record, metrics, forms=forms, **options)
    except errors.MeasurementError as error:
        if "gave NaN or inf" not in str(error):  # a pattern that is renormalized to 0
            raise


@pytest.mark.filterwarnings("ignore:The patches change nothing")
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("model_type", "seed"), [(t, s) for t in ("gpt2", "llama", "gpt_neo") for s in range(3)])
def test_random_recipes(model_type: str, seed: int, plain: bool) -> None:
    by_chance(model_type, seed, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The patches change nothing")
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "mixtral", "gpt_oss", "opt", "phi", "falcon", "gpt_neo", "mpt"])  # fmt: skip
def test_many_random_recipes(model_type: str, plain: bool) -> None:
    for seed in range(100, 120):
        by_chance(model_type, seed, plain)


# ------------------------------------------------------------------------------------------------- seats, and who sees whom


@st.composite
def seated(draw: st.DrawFn) -> tuple[list[Job], list[Job], Form, int, int, int]:
    """Rows of several pairs and worlds, with worlds in front where they are computed in the same run."""
    form, depth, end = draw(st.sampled_from(["packed", "staggered"])), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    pairs = list(range(draw(st.integers(1, 3))))
    worlds: list[Job] = []
    if form == "packed" and draw(st.booleans()):
        for pair in pairs:
            names = draw(st.permutations(["clean", "corrupted"]))
            worlds += [Job(-1, pair, names[0], (), 0, 0), Job(-1, pair, names[1], (), draw(st.integers(1, end)), 0)]
    rows = draw(st.lists(st.tuples(st.sampled_from(pairs), st.sampled_from(["clean", "corrupted"]), st.integers(0, end - 1), st.integers(0, depth)), min_size=1, max_size=12))  # fmt: skip
    start = rows[0][2]
    jobs = [Job(n, p, b, (), start if form == "staggered" else at, birth) for n, (p, b, at, birth) in enumerate(rows)]
    return worlds, jobs, form, depth, end, draw(st.integers(1, 6))


def cells_of(table: Table) -> dict[tuple[int, int], tuple[int, int]]:
    """(lane, slot) → (job's number, position)."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for number, job in enumerate(table.jobs):
        for position in range(job.start, table.end):
            cell = table.cell(number, position)
            assert cell not in found, "two tokens share a seat"
            found[cell] = number, position
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seated())
def test_seats(case: tuple[list[Job], list[Job], Form, int, int, int]) -> None:
    worlds, jobs, form, depth, end, lanes = case
    table = seat(jobs, form, depth, end, worlds=worlds, lanes=lanes)
    cells = cells_of(table)
    assert len(table.shape) == depth + 1
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(table.shape, table.shape[1:], strict=False)), "it shrinks"
    for (lane, slot), (number, _) in cells.items():
        job = table.jobs[number]
        for layer in range(job.birth, depth + 1):
            assert lane < table.shape[layer][0], "born, and without a lane"
            assert slot < table.shape[layer][1], "born, and without a slot"
        assert form == "staggered" or worlds or table.lanes[lane] == (job.pair, job.base), (
            "beside a world that is not its own"
        )
    assert table.first == (0 if worlds else min(depth - 1, *(job.birth for job in jobs)))
    assert table.prefix == (0 if worlds else max(job.start for job in jobs))
    assert len(table.lanes) == table.shape[-1][0]
    assert table.tokens >= len(cells)
    assert set(table.paths) == {(job.pair, job.base) for job in worlds}
    for (pair, base), (lane, slots) in table.paths.items():
        assert len(slots) == end
        for position, slot in enumerate(slots):
            number, found = cells[lane, slot]
            assert found == position
            world = table.jobs[number]
            assert number < len(worlds)
            assert world.pair == pair
            # Before the first token that differs it is the other world's.
            own = next(job for job in worlds if (job.pair, job.base) == (pair, base))
            assert (world is own) == (position >= own.start)
            assert world is own or world.start == 0
    if form == "staggered":
        assert all(lane == n and slot == 0 for n, (lane, slot) in enumerate(sorted(table.seats)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seated())
def test_who_sees_whom(case: tuple[list[Job], list[Job], Form, int, int, int]) -> None:
    """A token sees its own row and, before the row's start, its base: in the cache, or the world's own tokens."""
    worlds, jobs, form, depth, end, lanes = case
    if form == "staggered":
        return
    table = seat(jobs, form, depth, end, worlds=worlds, lanes=lanes)
    stands = standing(table)
    at = masks.positions(stands)
    cells = cells_of(table)
    seen = masks.visible(stands, at)
    own_lanes, slots = table.shape[-1]
    assert seen.shape == (own_lanes, slots, table.prefix + slots)
    for lane in range(own_lanes):
        for slot in range(slots):
            found = set(seen[lane, slot].nonzero().ravel().tolist())
            if (lane, slot) not in cells:
                assert found, "a row of a softmax must see something"
                assert not found & set(range(table.prefix))
                continue
            number, position = cells[lane, slot]
            job = table.jobs[number]
            assert at[lane, slot] == position
            wanted = {table.prefix + table.cell(number, p)[1] for p in range(job.start, end)}
            before = range(job.start)
            wanted |= {table.paths[job.pair, job.base][1][p] for p in before} if worlds else set(before)
            assert found == wanted
            for p in range(end):
                assert table.key(number, p) in wanted


def test_masks_and_tables_of_packed_tokens() -> None:
    """A window cuts off by position, not by seat; a mask of numbers forbids with the lowest of them."""
    job = Job(0, 0, "clean", (), 3, 0)
    table = seat([job, Job(1, 0, "clean", (), 1, 0)], "packed", 2, 5)
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    turns = torch.arange(10.0).view(5, 2)
    lowest = torch.finfo(torch.float32).min
    numbers_too = torch.where(window, 0.0, lowest)
    wires = (((0, "mask", window), ("position_embeddings", "table", (turns, -turns))), ((0, "mask", numbers_too), ("position_ids", "table", torch.arange(5))))  # fmt: skip
    given = masks.wired(standing(table), wires, torch.device("cpu"))
    at = masks.positions(standing(table))
    visible = masks.visible(standing(table), at)
    for lane in range(table.shape[0][0]):
        for slot in range(table.shape[0][1]):
            for key in range(table.prefix + table.shape[0][1]):
                place = key if key < table.prefix else int(at[lane, key - table.prefix])
                lets = bool(visible[lane, slot, key] and window[at[lane, slot], place])
                assert bool(given[0][0][lane, 0, slot, key]) == lets
                assert float(given[1][0][lane, 0, slot, key]) == (0 if lets else lowest)
    assert torch.equal(given[0]["position_embeddings"][1], -turns[at])
    assert torch.equal(given[1]["position_ids"], at)


# ------------------------------------------------------------------------------------------------- without enough memory


def cramped(monkeypatch: pytest.MonkeyPatch, most: int, times: int = 1 << 30) -> list[int]:
    """A machine without memory for runs of more than so many measured rows, so many times; the rows of those that ran."""
    whole, ran, failed = steps.Here._operated, [], []

    def refused(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    def cramped_run(self: Any, step: Any, number: int, known: Any) -> Any:
        call = step.ops[number][1]
        rows = sum(job.row >= 0 for job in call.jobs) if call else 0
        with monkeypatch.context() as patched:
            if rows > most and len(failed) < times:
                failed.append(rows)
                patched.setattr(steps, "operate", refused)
            else:
                ran.append(rows)
            return whole(self, step, number, known)

    monkeypatch.setattr(steps.Here, "_operated", cramped_run)
    return ran


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("most", "times"), [(2, 1 << 30), (5, 1 << 30), (0, 1)])
def test_a_batch_that_does_not_fit_is_split(form: Form, most: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny("llama"), made_up_pairs(WORDS)
    (wanted,) = each_form(model, pairs, swept, forms=[form]).values()
    expected = numbers(wanted)
    (p,) = each_form(model, pairs, swept, forms=[form]).values()
    with monkeypatch.context() as patched:
        ran = cramped(patched, most, times)
        np.testing.assert_allclose(numbers(p), expected, atol=1e-5)
    assert max(ran) <= most if times > 1 else max(ran) > 1
    result, other = p.run(progress=False), wanted.run(progress=False)
    np.testing.assert_allclose(result["corrupted"], other["corrupted"], atol=1e-5)
    np.testing.assert_allclose(result["clean"], other["clean"], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_that_does_not_fit(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = each_form(tiny("llama"), made_up_pairs(WORDS), swept, forms=[form]).values()
    cramped(monkeypatch, most=0)
    with pytest.raises(
        errors.MeasurementError,
        match=r"not enough memory for a traced run of \d rows: no room\n  pair \d, row(.|\n)*batch_size=",
    ):
        p.run(progress=False)


def test_halves_keep_their_worlds_and_their_witness() -> None:
    p = each_form(tiny("llama"), made_up_pairs(WORDS), swept, forms=["packed"])["packed"]
    riding = next(b for b in batches(p, "packed") if b.table.worlds)
    for half in packing.halves(riding):
        assert half.table.worlds == riding.table.worlds
        assert half.table.jobs[: half.table.worlds + 1] == riding.table.jobs[: half.table.worlds + 1]
        assert half.table.jobs[half.table.worlds + 1 :] == half.jobs
    assert sum(len(half.jobs) for half in packing.halves(riding)) == len(riding.jobs)


# ------------------------------------------------------------------------------------------------- what models allow


@pytest.mark.parametrize(
    ("model_type", "form", "why"),
    [
        ("gpt2", "packed", {}), ("gpt_oss", "packed", {}),
        ("gpt_neo", "staggered", {"packed": "the model's code fails (RuntimeError: The size of tensor a"}),
        ("mpt", "staggered", {"packed": "the model's code fails"}),
        ("bloom", "flat", {"packed": "the model's code fails", "staggered": "the model's code fails"}),
        ("mamba", "flat", dict.fromkeys(FORMS[:-1], "layers without softmax attention keep a state of their own")),
        ("t5", "flat", dict.fromkeys(FORMS[:-1], "an encoder reads the prompts")),
    ],
)  # fmt: skip
def test_what_models_allow(model_type: str, form: Form, why: dict[Form, str]) -> None:
    model = tp.load(build(model_type, layers=2), tokenizer())
    found = allowed(model, architecture_of(model))
    assert found.form == form
    assert found.refused.keys() == why.keys()
    assert all(text in found.refused[name] for name, text in why.items())
    assert allowed(model, architecture_of(model)) is found, "tried once"
    p = tp.patching(model, made_up_pairs(WORDS), form="packed")
    with p.row():
        p.corrupted.resid_pre[0, -1] = 0
    if form == "packed":
        assert {b.form for g in p.make_plan().groups for b in g.batches} == {"packed"}
        return
    for faster in FORMS[: FORMS.index(form)]:
        p = tp.patching(model, made_up_pairs(WORDS), form=faster)
        with p.row():
            p.corrupted.resid_pre[0, -1] = 0
        with pytest.raises(errors.RecipeError, match=rf"form='{faster}' does not do on this model: .*Leave form= out"):
            p.make_plan()
    with tp.patching(model, made_up_pairs(WORDS)) as p, p.row():
        p.corrupted.resid_pre[0, -1] = 0
    assert {b.form for g in p.plan.groups for b in g.batches} == {form}
    assert model_type == "t5" or f"not packed: {found.refused['packed']}" in p.plan.explain()


def test_what_fails_for_want_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = tp.load(build("gpt2", layers=4), tokenizer()), forms.run
    calls = iter(range(99))

    def cramped(*given: Any, **options: Any) -> Any:
        if next(calls) == 1:  # the first trial of the packed form
            raise errors.MeasurementError("no room") from torch.OutOfMemoryError("no room")
        return own(*given, **options)

    monkeypatch.setattr(forms, "run", cramped)
    found = allowed(model, architecture_of(model))
    assert (found.form, list(found.refused)) == ("staggered", ["packed"])
    assert allowed(model, architecture_of(model)).form == "packed"


def test_a_form_that_does_not_exist(gpt2: Any, pairs: tp.Pairs) -> None:
    with pytest.raises(errors.RecipeError, match="form is one of packed, staggered, flat, not 'paked'; without it"):
        tp.patching(gpt2, pairs, form="paked")
    with pytest.raises(errors.RecipeError, match="form is one of"):
        tp.patch(gpt2, pairs, "z", form="paked")


def test_models_without_weights_are_planned_in_tables() -> None:
    for model_type, form in (("llama", "packed"), ("bloom", "flat")):
        model = tp.load(without_weights(config(model_type)), tokenizer())
        with tp.patching(model, made_up_pairs(WORDS)) as p:
            swept(p)
        assert {b.form for g in p.plan.groups for b in g.batches} == {form}
        with tp.patching(tp.load(build(model_type), tokenizer()), made_up_pairs(WORDS)) as real:
            swept(real)
        assert [b.table and b.table.seats for g in p.plan.groups for b in g.batches] == [
            b.table and b.table.seats for g in real.plan.groups for b in g.batches
        ]


# ------------------------------------------------------------------------------------------------- columns of the vocabulary


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0] - 2 * logits[:, 1]


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("form", ["packed", "flat"])
def test_metrics_of_few_columns_equal_those_of_all(
    model_type: str, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softcaps and multipliers come after the columns are picked; ids in any order; padded answers."""
    pairs = made_up_pairs(WORDS)
    pairs = tp.Pairs(pairs.clean, pairs.corrupted, [["w35", "w31"], ["w33"], ["w35"]], ["w40", "w31", "w40"])
    few = {"m": tp.metric(difference, vocab=(41, 7)), "d": tp.logit_diff.at(slice(2, None)), "l": tp.logit}
    whole = {
        "m": tp.metric(lambda logits: difference(logits[:, [41, 7]])),
        "d": tp.metric(
            lambda logits, given: tp.logit_diff.function(logits, given)[:, 0],
            positions=slice(2, None),
            needs=("answer", "wrong"),
        ),
        "l": tp.metric(lambda logits, given: tp.logit.function(logits[:, None], given), needs=("answer",)),
    }
    computed = []
    original = trace.only_columns
    monkeypatch.setattr(
        trace,
        "only_columns",
        lambda head, columns, apart: (computed.append(columns.tolist()), original(head, columns, apart)),
    )
    found = [
        numbers(each_form(tiny(model_type, layers=2), pairs, swept, metric, forms=[form])[form])
        for metric in (few, whole)
    ]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert bool(computed) == (form != "flat"), "whole prompts have all logits, of which these are taken"
    assert {tuple(ids) for ids in computed} <= {(7, 31, 33, 35, 40, 41), (7, 35, 40, 41)}, "those of the pairs at hand"


def test_columns_that_cannot_be_read(gpt2: Any, pairs: tp.Pairs) -> None:
    for vocab in ((1, 1), (), (-1,), (1.5,)):
        with pytest.raises(errors.MetricError, match="vocab is a list of different token ids, such as"):
            tp.metric(difference, vocab=vocab)
    with pytest.raises(errors.MetricError, match="speaks of the whole vocabulary. Leave out vocab= or needs="):
        tp.metric(difference, vocab=(1, 2), needs=("answer",))
    with pytest.raises(errors.MetricError, match=r"reads token ids \[161\], and the vocabulary has 161"):
        tp.patching(gpt2, pairs, tp.metric(difference, vocab=(160, 161)))
