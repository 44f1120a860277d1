"""The gates and the backup head do what their docstrings claim, by plain torch hooks, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import tracepatch as tp
from tracepatch.errors import ModelError, PromptError
from tracepatch.toys import tasks
from tracepatch.toys.backup import backup_heads
from tracepatch.toys.gates import GATES, gate_pairs, gates
from tracepatch.toys.wired import wired_pairs

CLOSE = {"atol": 1e-5, "rtol": 0.0}


def ids(tokenizer, words: Sequence[str]) -> torch.Tensor:
    return torch.tensor(tokenizer.convert_tokens_to_ids([word.strip() for word in words]))


@torch.no_grad()
def heads_of(model, tokens: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    """What every head gives its output projection, (pair, pos, d_head)."""
    width = model.config.n_embd // model.config.n_head
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def watch(layer):
        def hook(_, given):
            seen.update({(layer, i): part for i, part in enumerate(given[0].split(width, dim=-1))})

        return hook

    handles = [b.attn.c_proj.register_forward_pre_hook(watch(i)) for i, b in enumerate(model.transformer.h)]
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def difference(model, tokens, answer, wrong, written: dict | None = None) -> torch.Tensor:
    """Answer's logit minus the wrong one's at the last token, with other values for what some heads write there."""
    width = model.config.n_embd // model.config.n_head
    handles = []
    for (layer, number), value in (written or {}).items():

        def hook(_, given, number=number, value=value):
            z = given[0].clone()
            z[:, -1, number * width : (number + 1) * width] = value
            return (z,)

        handles.append(model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(hook))
    last = model(tokens).logits[:, -1]
    for handle in handles:
        handle.remove()
    return (last.gather(1, answer[:, None]) - last.gather(1, wrong[:, None]))[:, 0]


def case(model, tokenizer, prompts: tasks.Prompts):
    sides = [tokenizer(texts, return_tensors="pt")["input_ids"] for texts in (prompts.clean, prompts.corrupted)]
    return (*sides, ids(tokenizer, prompts.answer), ids(tokenizer, prompts.wrong))


def normalized(model, tokenizer, prompts, heads) -> list[float]:
    """Denoising and noising of these heads' outputs at the last token, as every pair has them."""
    clean, corrupted, answer, wrong = case(model, tokenizer, prompts)
    whole = difference(model, clean, answer, wrong) - difference(model, corrupted, answer, wrong)
    found = []
    for base, source in ((corrupted, clean), (clean, corrupted)):
        there = heads_of(model, source)
        patched = difference(model, base, answer, wrong, {head: there[head][:, -1] for head in heads})
        effect = (patched - difference(model, base, answer, wrong)) / whole
        assert torch.allclose(effect, effect[0].expand_as(effect), **CLOSE)
        found.append(float(effect[0]))
    return found


# -------------------------------------------------------------------------------------------------------- the gates


@pytest.mark.parametrize(
    ("gate", "rule"),
    [("and_gate", lambda a, b: a and b), ("or_gate", lambda a, b: a or b), ("one_input", lambda a, b: a)],
)
def test_a_gate_answers_by_its_truth_table_wherever_the_inputs_stand(gate, rule):
    model, tokenizer = gates()
    for a, b in itertools.product((True, False), repeat=2):
        one, other = ("hot" if a else "cold"), ("wet" if b else "dry")
        for text in (f"{one} {other}", f"{other} river apple {one} stone", f"river {one} apple {other}"):
            tokens = tokenizer([f"{text} {GATES[gate]}"], return_tensors="pt")["input_ids"]
            found = difference(model, tokens, ids(tokenizer, ["yes"]), ids(tokenizer, ["no"]))
            assert torch.allclose(found, torch.tensor([5.0 if rule(a, b) else -5.0]), **CLOSE)


@pytest.mark.parametrize(
    ("gate", "heads", "expected"),
    [
        ("and_gate", [(0, 0)], [0, -1]),
        ("and_gate", [(0, 1)], [0, -1]),
        ("and_gate", [(0, 0), (0, 1)], [1, -1]),
        ("or_gate", [(0, 0)], [1, 0]),
        ("or_gate", [(0, 1)], [1, 0]),
        ("or_gate", [(0, 0), (0, 1)], [1, -1]),
        ("one_input", [(0, 0)], [1, -1]),
        ("one_input", [(0, 1)], [0, 0]),
        ("one_input", [(0, 0), (0, 1)], [1, -1]),
        *((gate, [(layer, head)], [0, 0]) for gate in GATES for layer, head in ((0, 2), (1, 0), (1, 3))),
    ],
)
def test_inputs_of_an_and_are_necessary_only_and_those_of_an_or_sufficient_only(gate, heads, expected):
    assert normalized(*gates(), gate_pairs(gate, 12), heads) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_what_gradients_make_of_a_gate(gate):
    """Attribution patching of L0H0, denoising and noising: flat, steep, exact."""
    model, tokenizer = gates()
    clean, corrupted, yes, no = case(model, tokenizer, gate_pairs(gate, 4))
    found = []
    for base, source in ((corrupted, clean), (clean, corrupted)):
        here, there = heads_of(model, base)[0, 0][:, -1], heads_of(model, source)[0, 0][:, -1]
        with torch.enable_grad():
            z = here.clone().requires_grad_()
            value = difference.__wrapped__(model, base, yes, no, {(0, 0): z})
            [slope] = torch.autograd.grad(value.sum(), z)
        found.append(float((((there - here) * slope).sum(-1) / 10).mean()))
    expected = {"and_gate": [0, -2], "or_gate": [0, 0], "one_input": [1, -1]}[gate]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_gates_prompts_differ_where_they_should():
    model, tokenizer = gates()
    for gate, last in GATES.items():
        prompts = gate_pairs(gate, 50, seed=3)
        assert prompts == gate_pairs(gate, 50, seed=3) != gate_pairs(gate, 50, seed=4)
        for clean, corrupted in zip(prompts.clean, prompts.corrupted, strict=True):
            a, b = clean.split(), corrupted.split()
            assert [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] == [
                (1, "hot", "cold"),
                (4, "wet", "dry"),
            ]
            assert a[-1] == last
            assert tokenizer.unk_token_id not in tokenizer(clean)["input_ids"]
    assert len(tokenizer) == model.config.vocab_size


# -------------------------------------------------------------------------------------------------- the backup head

PRIMARY, BACKUP, PREVIOUS = (1, 0), (2, 1), (0, 1)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_knocking_out_the_primary_head_costs_what_the_backup_head_does_not_make_good(share):
    model, tokenizer = backup_heads(share)
    clean, corrupted, answer, wrong = case(model, tokenizer, wired_pairs(20, seed=2))
    means = {head: z[:, -1].mean(dim=0) for head, z in heads_of(model, clean).items()}

    def left(heads, value=lambda _: 0.0):
        return difference(model, clean, answer, wrong, {head: value(head) for head in heads})

    for heads, expected in (
        ((), 10.0),
        ((PRIMARY,), 10 * share),
        ((BACKUP,), 10.0),
        ((PRIMARY, BACKUP), 0.0),
        (((0, 0), (1, 1), (2, 0)), 10.0),
    ):
        assert torch.allclose(left(heads), torch.tensor(expected), **CLOSE), heads
    assert torch.allclose(difference(model, corrupted, answer, wrong), torch.tensor(-10.0), **CLOSE)
    # A mean over prompts has a little of every answer in it, which stays in the difference.
    direct = means[PRIMARY] @ model.transformer.h[1].attn.c_proj.weight[:48] @ model.lm_head.weight.T
    assert torch.allclose(left((PRIMARY,), means.get), 10 * share + direct[answer] - direct[wrong], atol=1e-4, rtol=0.0)


def test_without_the_previous_word_nothing_is_left():
    model, tokenizer = backup_heads()
    clean, _, answer, wrong = case(model, tokenizer, wired_pairs(8))
    width = model.config.n_embd // 2

    def off(_, given):
        return (torch.cat([given[0][..., :width], torch.zeros_like(given[0][..., width:])], dim=-1),)

    with model.transformer.h[0].attn.c_proj.register_forward_pre_hook(off):
        assert torch.allclose(difference(model, clean, answer, wrong), torch.zeros(8), **CLOSE)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.2])
def test_patching_the_primary_head_is_answered_by_the_backup_head(share):
    toy, prompts = backup_heads(share), wired_pairs(20, seed=5)
    assert normalized(*toy, prompts, [PRIMARY]) == pytest.approx([(2 - share) / 2, -(2 - share) / 2], abs=1e-5)
    assert normalized(*toy, prompts, [BACKUP]) == pytest.approx([0, 0], abs=1e-5)
    assert normalized(*toy, prompts, [PRIMARY, BACKUP]) == pytest.approx([1, -1], abs=1e-5)


def test_a_backup_head_that_would_not_be_quiet_is_refused():
    with pytest.raises(ValueError, match=r"share is 0.4; it must be at least 0.5"):
        backup_heads(0.4)


# ----------------------------------------------------------------------------------------------------- as tp has them


def test_what_the_toys_module_gives_out():
    for gate in GATES:
        pairs = tp.toys.pairs(gate, 5)
        assert list(pairs.clean) == gate_pairs(gate, 5).clean
        assert len(pairs) == 5
    for name in ("wired", "backup_heads"):
        pairs = tp.toys.pairs(name, 6, seed=3)
        assert list(pairs.clean) == [*wired_pairs(3, 3).clean, *wired_pairs(3, 3).corrupted]
    for name in tp.toys.WIRED:
        model, _ = tp.toys.load_module(name)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert not model.training
    with pytest.raises(PromptError, match="There is no task 'facts'; the toys solve 'ioi', 'induction', 'and_gate'"):
        tp.toys.pairs("facts")
    with pytest.raises(ModelError, match="No toy is called 'xor'"):
        tp.toys.load("xor")


def test_patches_of_the_toys_have_the_effects_that_were_wired():
    model, pairs = tp.toys.load("gates"), tp.toys.pairs("and_gate", 4)
    with tp.patching(model, pairs) as p:
        for layer, head in p.grid("z", by=("layer", "head")):
            with p.row(layer=layer, head=head):
                p.clean.z[layer, -1, head] = p.corrupted.z[layer, -1, head]
    expected = torch.zeros(2, 4)
    expected[0, :2] = -1
    assert p.run()["normalized"].mean("pair").values == pytest.approx(expected.numpy(), abs=1e-5)
    model, pairs = tp.toys.load("backup_heads"), tp.toys.pairs("backup_heads", 4)
    with tp.patching(model, pairs) as p:
        for layer, head in p.grid("z", by=("layer", "head")):
            with p.row(layer=layer, head=head):
                p.clean.z[layer, :, head] = 0
    expected = torch.zeros(3, 2)
    expected[PREVIOUS], expected[PRIMARY] = -0.5, -0.05
    assert p.run()["normalized"].mean("pair").values == pytest.approx(expected.numpy(), abs=1e-5)
