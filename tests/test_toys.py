"""The toys do their tasks, and the wired model has exactly the circuit that its docstring claims."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tracepatch import toys
from tracepatch.errors import ModelError
from tracepatch.toys import tasks, train, vocabulary
from tracepatch.toys.train import accuracy, encode, losses
from tracepatch.toys.wired import LENGTH, wired, wired_pairs

FRESH = 20_000  # neither a training seed nor the held-out one


@pytest.fixture(scope="module", params=toys.NAMES)
def trained(request):
    return toys.load_module(request.param)


# ---------------------------------------------------------------------------------------------------------- prompts


def test_generators_are_deterministic_in_their_seed():
    random.seed(1)
    before = random.getstate()
    for make in (tasks.ioi, tasks.induction, wired_pairs):
        assert make(20, seed=4) == make(20, seed=4)
        assert make(20, seed=4) != make(20, seed=5)
    assert tasks.ioi(20, seed=4, corruption="abc") == tasks.ioi(20, seed=4, corruption="abc")
    assert random.getstate() == before


def test_word_lists():
    assert [len(set(words)) for words in (tasks.NAMES, tasks.PLACES, tasks.OBJECTS)] == [64, 8, 8]
    assert len(tasks.ABBA) == len(tasks.BABA) >= 5
    assert all(re.fullmatch(r"\w+", word) for word in vocabulary.task_words() if word not in (",", "."))


def test_ioi_swap_flips_the_answer_by_one_word():
    prompts = tasks.ioi(300, seed=1)
    for clean, corrupted, answer, wrong in zip(
        prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong, strict=True
    ):
        a, b = clean.split(), corrupted.split()
        assert len(a) == len(b)
        [(was, now)] = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
        assert (f" {was}", f" {now}") == (wrong, answer)
        assert clean.count(answer) == 1
        assert clean.count(wrong) == 2
        assert corrupted.count(answer) == 2
        assert corrupted.count(wrong) == 1


def test_ioi_orders_places_and_objects_all_occur():
    text = " ".join(tasks.ioi(600, seed=2).clean)
    assert all(word in text for word in (*tasks.NAMES, *tasks.PLACES, *tasks.OBJECTS))
    first = tasks.ioi(1, templates=["When {IO} and {S} went to the {place}, {S} gave the {object} to"])
    _, io, _, s, *_ = first.clean[0].split()
    assert (first.answer, first.wrong) == ([f" {io}"], [f" {s}"])


def test_ioi_abc_has_three_unrelated_names():
    prompts = tasks.ioi(200, seed=3, corruption="abc")
    names = set(tasks.NAMES)
    for clean, corrupted, answer, wrong in zip(
        prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong, strict=True
    ):
        before, after = (set(re.findall(r"\w+", text)) & names for text in (clean, corrupted))
        assert before == {answer.strip(), wrong.strip()}
        assert len(after) == 3
        assert not before & after


def test_induction_repeats_a_segment_and_its_corruption_changes_the_answer():
    prompts = tasks.induction(300, seed=1)
    lags = set()
    for clean, corrupted, answer, wrong in zip(
        prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong, strict=True
    ):
        a, b = clean.split(), corrupted.split()
        assert len(a) == len(b) == 31
        right, other = answer.strip(), wrong.strip()
        follows = {y for x, y in itertools.pairwise(a) if x == a[-1]}
        assert follows == {right}
        assert {y for x, y in itertools.pairwise(b) if x == b[-1]} == {other}
        assert other not in a
        assert [x if x != right else other for x in a] == b
        lags.add(len(a) - a.index(right))
    assert len(lags) > 5
    assert len(tasks.induction(1, length=40).clean[0].split()) == 39


def test_generators_refuse_what_they_cannot_make():
    with pytest.raises(ValueError, match="corruption is 'cba'; use 'swap' or 'abc'"):
        tasks.ioi(1, corruption="cba")
    with pytest.raises(ValueError, match="names has 4 different names, corruption='abc' needs 5"):
        tasks.ioi(1, names=["Ann", "Bob", "Cy", "Dee", "Dee"], corruption="abc")
    with pytest.raises(ValueError, match="templates is empty"):
        tasks.ioi(1, templates=[])
    with pytest.raises(ValueError, match="length is 21; at least 22"):
        tasks.induction(1, length=21)
    with pytest.raises(ValueError, match="words has 20 different words; at least 21"):
        tasks.induction(1, words=tasks.WORDS[:20])


# -------------------------------------------------------------------------------------------------- trained toys


@pytest.mark.parametrize("task", ["ioi", "induction"])
def test_trained_toys_solve_fresh_prompts(trained, task):
    model, tokenizer = trained
    assert accuracy(model, tokenizer, task, 1000, seed=FRESH) >= 0.99


@pytest.mark.parametrize("task", ["ioi", "induction"])
@torch.no_grad()
def test_trained_toys_always_prefer_the_answer_and_flip_with_the_corruption(trained, task):
    model, tokenizer = trained
    prompts = getattr(tasks, task)(500, seed=FRESH + 1)
    answer, wrong = (one_id(tokenizer, words) for words in (prompts.answer, prompts.wrong))
    assert bool((difference(model, tokenizer, prompts.clean, answer, wrong) > 0).all())
    assert bool((difference(model, tokenizer, prompts.corrupted, answer, wrong) < 0).float().mean() >= 0.99)


def test_an_untrained_toy_does_not_solve_the_tasks(trained):
    model, tokenizer = trained
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert accuracy(fresh, tokenizer, "ioi", 200, seed=FRESH) < 0.1


def test_tokens_of_a_pair_are_equal_in_number_and_known(trained):
    _, tokenizer = trained
    batches = [tasks.ioi(100), tasks.ioi(100, corruption="abc"), tasks.induction(100)]
    batches += [tasks.ioi(20, templates=[template]) for template in tasks.TEMPLATES]
    for prompts in batches:
        clean, corrupted = (tokenizer(texts)["input_ids"] for texts in (prompts.clean, prompts.corrupted))
        assert [len(ids) for ids in clean] == [len(ids) for ids in corrupted]
        assert vocabulary.UNK not in {i for ids in clean + corrupted for i in ids}
        one_id(tokenizer, prompts.answer + prompts.wrong)
    for template in tasks.TEMPLATES:
        prompts = tasks.ioi(20, templates=[template])
        assert len({len(ids) for ids in tokenizer(prompts.clean)["input_ids"]}) == 1


def test_tokenizer(trained):
    model, tokenizer = trained
    bos = [tokenizer.bos_token_id] if model.config.model_type in ("llama", "gemma2") else []
    ids = tokenizer("When John and Mary went to the store, John gave the bag to")["input_ids"]
    words = ["When", "John", "and", "Mary", "went", "to", "the", "store", ",", "John", "gave", "the", "bag", "to"]
    assert ids == bos + tokenizer.convert_tokens_to_ids(words)
    assert tokenizer("  Mary ")["input_ids"] == tokenizer("Mary")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids[len(bos) :]] == words
    assert tokenizer("zyzzyva", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) == model.config.vocab_size
    for token in ("pad", "eos", "bos"):
        assert getattr(model.config, f"{token}_token_id") == getattr(tokenizer, f"{token}_token_id") is not None


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
        ("gpt_neox", "GPTNeoXForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
    ],
)
def test_a_folder_loads_by_itself_without_a_word(name, architecture, capfd):
    model = AutoModelForCausalLM.from_pretrained(toys.folder(name))
    tokenizer = AutoTokenizer.from_pretrained(toys.folder(name))
    with torch.no_grad():
        model.generate(**tokenizer("When John and Mary", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    noise = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line and "Loading weights" not in line]
    assert noise == []
    assert type(model).__name__ == architecture
    assert model.config.architectures == [architecture]
    assert {weight.dtype for weight in load_file(toys.folder(name) / "model.safetensors").values()} == {torch.float32}


def test_load_module_gives_models_ready_to_use(trained):
    model, _ = trained
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_unknown_names_are_refused():
    with pytest.raises(
        ModelError, match="No toy is called 'gpt3'; there are gpt2, llama, gpt_neox, gemma2, many_tasks, wired"
    ):
        toys.load_module("gpt3")
    for unknown in (toys.folder, train.recipe):
        with pytest.raises(ModelError, match="No toy is called 'wired'; the trained ones are gpt2, llama, gpt_neox"):
            unknown("wired")


def test_all_weights_together_are_small():
    files = [file for name in toys.NAMES for file in toys.folder(name).rglob("*") if file.is_file()]
    assert len(files) == 5 * len(toys.NAMES)
    assert sum(file.stat().st_size for file in files) <= 3_000_000


def test_padding_on_the_right_changes_nothing(trained):
    model, tokenizer = trained
    prompts = tasks.ioi(20, seed=FRESH)
    tokens, end = encode(tokenizer, prompts)
    assert len(set(end.tolist())) > 1
    with torch.no_grad():
        together = losses(model, tokens, end)[1]
        alone = [model(tokens[i : i + 1, : end[i]]).logits[0, -1].argmax() for i in range(20)]
    assert together.all()
    assert [int(i) for i in alone] == [int(tokens[i, end[i]]) for i in range(20)]


# -------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_is_grouped(name):
    model, _ = toys.load_module(name)
    for layer in model.model.layers:
        widths = [getattr(layer.self_attn, f"{part}_proj").out_features for part in "qkv"]
        assert widths == [4 * 16, 2 * 16, 2 * 16]


def test_gpt_neox_is_parallel_and_partly_rotary():
    config = toys.load_module("gpt_neox")[0].config
    assert config.use_parallel_residual
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


@torch.no_grad()
def test_sliding_window_binds():
    model, tokenizer = toys.load_module("gemma2")
    model.set_attn_implementation("eager")
    config = model.config
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    tokens = tokenizer(tasks.ioi(8, templates=tasks.TEMPLATES[:1]).clean, return_tensors="pt")["input_ids"]
    length = tokens.shape[1]
    assert length > config.sliding_window
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < config.sliding_window)}
    for pattern, kind in zip(model(tokens, output_attentions=True).attentions, config.layer_types, strict=True):
        assert bool((pattern[..., ~seen[kind]] == 0).all())
        assert bool((pattern[..., seen[kind]] > 0).all())
    assert changed(tokens, sliding_window=length) > 1


@torch.no_grad()
def test_both_softcaps_bind():
    _, tokenizer = toys.load_module("gemma2")
    tokens = tokenizer(tasks.ioi(50, templates=tasks.TEMPLATES[:1]).clean, return_tensors="pt")["input_ids"]
    assert changed(tokens, attn_logit_softcapping=None) > 1
    assert changed(tokens, final_logit_softcapping=None) > 1


def changed(tokens: torch.Tensor, **config: object) -> float:
    """How much Gemma's last logits change with the configuration."""
    model, other = (
        AutoModelForCausalLM.from_pretrained(toys.folder("gemma2"), **change).eval() for change in ({}, config)
    )
    return float((model(tokens).logits[:, -1] - other(tokens).logits[:, -1]).abs().max())


# -------------------------------------------------------------------------------------------------- training script


def test_training_runs_and_is_deterministic(tmp_path):
    app = train.typer.Typer()
    app.command()(train.main)
    for folder in ("a", "b"):
        arguments = ["--model", "gpt2", "--out", str(tmp_path / folder), "--steps", "3", "--target", "0"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert re.search(r"step +3 +12 names", result.output)
    a, b = (load_file(tmp_path / folder / "gpt2" / "model.safetensors") for folder in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    ours = toys.folder("gpt2")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        made, shipped = (json.loads((place / file).read_text()) for place in (tmp_path / "a" / "gpt2", ours))
        differing = {key for key in made | shipped if made.get(key) != shipped.get(key)}
        assert differing <= {"transformers_version"}
    short = CliRunner().invoke(app, ["--model", "gpt2", "--out", str(tmp_path / "c"), "--steps", "1"])
    assert short.exit_code == 1
    assert "below 99.0%" in short.output


# ------------------------------------------------------------------------------------------------------ wired model

WRITERS = ["embed", *(f"L0H{h}" for h in range(4)), "M0", *(f"L1H{h}" for h in range(4)), "M1"]


def edges() -> Iterator[tuple[str, str]]:
    for reader in [f"L{layer}H{h}.{part}" for layer in (0, 1) for h in range(4) for part in "QKV"]:
        yield from ((writer, reader) for writer in (WRITERS[:1] if reader[1] == "0" else WRITERS[:6]))
    yield from ((writer, "M0") for writer in WRITERS[:5])
    yield from ((writer, "M1") for writer in WRITERS[:10])
    yield from ((writer, "logits") for writer in WRITERS)


def writes(model, tokens, edge=None, value=None):
    """Every writer's contribution and the logits, with `value` for what the edge's reader reads of its writer."""
    core, n_head = model.transformer, model.config.n_head
    pos = tokens.shape[1]
    out = {"embed": core.wte(tokens) + core.wpe(torch.arange(pos))}

    def read(reader):
        return sum(value if (writer, reader) == edge else what for writer, what in out.items())

    for i, block in enumerate(core.h):
        entering = dict(out)
        results = {}
        for h in range(n_head):
            out = dict(entering)
            d_head = model.config.n_embd // n_head
            q, k, v = (
                block.attn.c_attn(block.ln_1(read(f"L{i}H{h}.{part}"))).split(model.config.n_embd, dim=-1)[
                    "QKV".index(part)
                ][..., h * d_head : (h + 1) * d_head]
                for part in "QKV"
            )
            scores = q @ k.mT / math.sqrt(d_head)
            scores = scores.masked_fill(torch.ones(pos, pos).tril() == 0, -torch.inf)
            results[f"L{i}H{h}"] = scores.softmax(-1) @ v @ block.attn.c_proj.weight[h * d_head : (h + 1) * d_head]
        out = entering | results
        out[f"M{i}"] = block.mlp(block.ln_2(read(f"M{i}")))
    return out, model.lm_head(core.ln_f(read("logits")))


def one_id(tokenizer, words):
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert {len(one) for one in ids} == {1}
    assert all(tokenizer.decode(one) == word.strip() for one, word in zip(ids, words, strict=True))
    return torch.tensor([one[0] for one in ids])


def difference(model, tokenizer, texts, answer, wrong):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    last = model(**batch).logits[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]
    return last.gather(1, answer[:, None])[:, 0] - last.gather(1, wrong[:, None])[:, 0]


def wired_case(saturation, n=16, seed=7):
    model, tokenizer = wired(saturation)
    prompts = wired_pairs(n, seed)
    clean, corrupted = (
        tokenizer(texts, return_tensors="pt")["input_ids"] for texts in (prompts.clean, prompts.corrupted)
    )
    answer, wrong = one_id(tokenizer, prompts.answer), one_id(tokenizer, prompts.wrong)
    return model.double(), clean, corrupted, answer, wrong


def last_difference(logits, answer, wrong):
    return logits[:, -1].gather(1, answer[:, None])[:, 0] - logits[:, -1].gather(1, wrong[:, None])[:, 0]


@pytest.mark.parametrize("saturation", [1.0, 6.0, 12.0])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@torch.no_grad()
def test_exactly_three_of_110_edges_carry_the_whole_effect(saturation, direction):
    model, clean, corrupted, answer, wrong = wired_case(saturation)
    source, base = (clean, corrupted) if direction == "denoising" else (corrupted, clean)
    (from_source, source_logits), (_, base_logits) = writes(model, source), writes(model, base)
    assert torch.allclose(base_logits, model(base).logits, atol=1e-10, rtol=0)
    start, end = (last_difference(logits, answer, wrong) for logits in (base_logits, source_logits))
    effects = {}
    for edge in edges():
        _, logits = writes(model, base, edge, from_source[edge[0]])
        effects[edge] = (last_difference(logits, answer, wrong) - start) / (end - start)
    assert len(effects) == 110
    circuit = {("embed", "L0H1.V"), ("L0H1", "L1H2.K"), ("L1H2", "logits")}
    for edge, effect in effects.items():
        assert torch.allclose(effect, torch.full_like(effect, float(edge in circuit)), atol=1e-6, rtol=0), edge


@torch.no_grad()
def test_wired_model_solves_its_prompts():
    for saturation in (1.0, 6.0):
        model, clean, corrupted, answer, wrong = wired_case(saturation, n=200)
        assert torch.equal(model(clean).logits[:, -1].argmax(-1), answer)
        assert torch.equal(model(corrupted).logits[:, -1].argmax(-1), wrong)


def test_wired_pairs_are_what_the_circuit_needs():
    prompts = wired_pairs(200, seed=1)
    halves = set()
    for clean, corrupted, answer, wrong in zip(
        prompts.clean, prompts.corrupted, prompts.answer, prompts.wrong, strict=True
    ):
        a, b = clean.split(), corrupted.split()
        assert len(a) == len(b) == LENGTH
        assert a[a.index(a[-1]) + 1] == answer.strip()
        assert b[b.index(b[-1]) + 1] == wrong.strip()
        differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        assert len(differing) == 2
        assert differing[0] > 0
        halves.add(a[differing[0]] == a[-1])
        assert len(set(a)) == len(set(b)) == LENGTH - 1
    assert halves == {True, False}


def estimate(saturation, direction="denoising"):
    """Attribution patching of L0H1's z as a fraction of its effect, which is 1."""
    model, clean, corrupted, answer, wrong = wired_case(saturation)
    seen = []
    projection = model.transformer.h[0].attn.c_proj
    with projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
        end = last_difference(model(clean).logits, answer, wrong)
        start = last_difference(model(corrupted).logits, answer, wrong)
    [gradient] = torch.autograd.grad(start.sum(), seen[1])
    return ((seen[0] - seen[1]) * gradient).sum((1, 2)) / (end - start)


def test_gradients_lose_the_circuit_as_the_head_saturates():
    for beta in (1.0, 2.0, 3.0, 4.0, 6.0, 12.0):
        z = math.exp(beta) + LENGTH - 1
        p, q = 1 / z, math.exp(beta) / z
        expected = beta * (p * (1 - p) + 2 * p * q + q * (1 - q)) / (2 * (q - p))
        got = estimate(beta)
        assert torch.allclose(got, torch.full_like(got, expected), atol=1e-6, rtol=0)
    assert [round(float(estimate(beta)[0].detach()), 4) for beta in (1.0, 4.0, 6.0, 12.0)] == [
        1.0335,
        0.5344,
        0.1296,
        0.0007,
    ]


@torch.no_grad()
def test_wired_model_is_stock_and_nearly_empty():
    model, tokenizer = toys.load_module("wired")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not model.training
    assert not model.config.tie_word_embeddings
    live = {
        (i, h)
        for i, block in enumerate(model.transformer.h)
        for h, weight in enumerate(block.attn.c_proj.weight.split(24))
        if bool((weight != 0).any())
    }
    assert live == {(0, 1), (1, 2)}
    assert not any(bool(p.any()) for block in model.transformer.h for p in block.mlp.parameters())
    stream = model(torch.arange(4, 20)[None], output_hidden_states=True).hidden_states
    assert all(float(x.sum(-1).abs().max()) < 1e-5 for x in stream[:-1])
    assert tokenizer.vocab_size == model.config.vocab_size
    with pytest.raises(ValueError, match="saturation is 0; it must be positive"):
        wired(0)
