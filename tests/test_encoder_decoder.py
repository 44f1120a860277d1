"""Encoder–decoder models: every component of the decoder against the oracle, the proof, the prompts and the labels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from slow import Slow, gap
from test_oracle import sweep
from tiny_models import ENCODER_DECODER, build, randomise, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    OpenAIGPTConfig,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import tracepatch as tp
from tracepatch import errors, trace
from tracepatch.architecture import architecture_of
from tracepatch.jobs import EAGER
from tracepatch.layout import stops
from tracepatch.models import module_of
from tracepatch.sites import SCALES

OFFERED = (
    *("embed", "resid_pre", "attn_in", "q_in", "k_in", "v_in", "q", "k", "v", "scores", "pattern", "z", "head_out"),
    *("attn_out", "cross_attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post", "logits_in", "logits"),
)
ENCODER_IDS = torch.tensor([[7, 21, 5, 30]])
IDS = torch.tensor([[2, 9, 33, 14, 50]])


@cache
def tiny(model_type: str) -> Any:
    return tp.load(build(model_type, layers=2), tokenizer())


def uneven() -> tp.Pairs:
    """Encoder prompts of several lengths, within pairs and between them; decoders of two lengths."""
    return tp.Pairs(
        ["w30 w31 w32 w33", "w34 w35 w36 w37 w38", "w40 w41 w42"],
        ["w30 w41 w32 w33", "w34 w35 w36", "w50 w52 w51 w53"],
        ["w35", "w36", "w37"],
        ["w40", "w41", "w42"],
        decoder=["w5 w6", "w3 w9 w12", "w7 w8"],
    )


def compare(model: Any, p: tp.Patching, pos: int = -1) -> tuple[float, float]:
    """The largest error against the oracle, and how far the patches moved the metric."""
    eager = any(e.site.component in EAGER for row in p.rows for e in row.edits)
    slow = Slow(module_of(model), p.encoded, eager=eager)
    read = gap(p.encoded)

    def metric(logits: torch.Tensor, pair: int) -> torch.Tensor:
        return read(logits[[pos]], pair)

    wanted = slow.score(p.rows, metric)
    found = torch.tensor(p.run()["value"].isel(component=0).values).T
    bases = torch.stack([metric(slow.base(p.rows[0].base, i), i) for i in range(len(p.encoded))])
    present = ~found.isnan()
    error = (found - wanted)[present].abs().max() / (1 + wanted.abs().max())
    return float(error), float((wanted - bases)[present].abs().max())


@pytest.mark.parametrize("base", ["corrupted", "clean"])
@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_every_component_equals_one_forward_per_patch(model_type: str, base: str) -> None:
    model = tiny(model_type)
    for component in OFFERED:
        with tp.patching(model, uneven(), batch_size=5) as p:
            sweep(p, component, base, thin=2)
        error, moved = compare(model, p)
        assert error < 1e-5, f"{component}: {error:.2g}"
        if component == "embed":
            assert moved == 0, "the decoder's tokens are the same in both worlds"
            assert p.plan.jobs == 0, "which is known without a forward"
        else:
            assert moved > 1e-2, f"{component}: no patch moved the metric, so this compared nothing"


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_the_metric_at_another_position_of_the_decoder(model_type: str) -> None:
    model = tiny(model_type)
    with tp.patching(model, uneven(), tp.logit_diff.at(1)) as p:
        sweep(p, "resid_pre", "corrupted")
    error, moved = compare(model, p, pos=1)
    assert error < 1e-5
    assert moved > 1e-2
    with tp.patching(model, uneven(), tp.logit_diff.at(1)) as p, p.row(pos=2):
        p.corrupted.cross_attn_out[0, 2:] = p.clean.cross_attn_out[0, 2:]
    assert p.plan.jobs == 0, "what stands after the position that is read cannot reach it"


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_pruning_changes_nothing(model_type: str) -> None:
    for component in ("embed", "resid_pre", "cross_attn_out", "z"):
        values = []
        for prune in (True, False):
            with tp.patching(tiny(model_type), uneven(), prune=prune) as p:
                sweep(p, component, "corrupted", thin=2)
            values.append(torch.tensor(p.run()["value"].values))
        torch.testing.assert_close(*values, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_nothing_is_padded_and_pairs_are_measured_as_if_alone(model_type: str) -> None:
    model, pairs = tiny(model_type), uneven()
    with tp.patching(model, pairs, [tp.logit_diff, tp.kl]) as p:
        for layer, pos in p.grid("cross_attn_out", pos=[0, 2]):
            both_ways(p, layer, pos)
    for group in p.plan.groups:
        for batch in group.batches:
            assert len({len(p.encoded.encoded(job.base, job.pair)) for job in batch.jobs}) == 1
    assert "4 of them for the 6 unpatched worlds" in p.plan.explain(), p.plan.explain()
    together = p.run()
    for i in range(len(pairs)):
        with tp.patching(model, pairs[i], [tp.logit_diff, tp.kl]) as p:
            for layer, pos in p.grid("cross_attn_out", pos=[0, 2]):
                both_ways(p, layer, pos)
        values = together["value"].isel(pair=i).values, p.run()["value"].isel(pair=0).values
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=1e-5)


def both_ways(p: tp.Patching, layer: int, pos: int) -> None:
    with p.row(layer=layer, pos=pos, way="denoising"):
        p.corrupted.cross_attn_out[layer, pos] = p.clean.cross_attn_out[layer, pos]
    with p.row(layer=layer, pos=pos, way="noising"):
        p.clean.cross_attn_out[layer, pos] = p.corrupted.cross_attn_out[layer, pos]


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_the_encoder_reaches_the_decoder_through_cross_attention_alone(model_type: str) -> None:
    """So patching it everywhere exchanges the worlds; noising is that with the sign turned."""
    with tp.patching(tiny(model_type), uneven()) as p:
        for base, other in ((p.corrupted, p.clean), (p.clean, p.corrupted)):
            with p.row(name=f"into {base._name}"):
                for layer in range(2):
                    base.cross_attn_out[layer] = other.cross_attn_out[layer]
            with p.row(name=f"the last layer into {base._name}"):
                base.resid_post[1, -1] = other.resid_post[1, -1]
    normalized = p.run()["normalized"]
    for name, sign in (("into corrupted", 1), ("into clean", -1)):
        for prefix in ("", "the last layer "):
            torch.testing.assert_close(
                torch.tensor(normalized.sel(name=prefix + name).values),
                torch.full((3,), float(sign), dtype=torch.float64),
                rtol=1e-4,
                atol=1e-4,
            )


def test_divergence_and_loss_belong_to_their_own_pair() -> None:
    """The worlds are run by length of what the encoder reads, and kept in the order of the pairs."""
    model, pairs = tiny("bart"), uneven()
    with tp.patching(model, pairs, [tp.kl, tp.cross_entropy]) as p, p.row(name="all"):
        p.corrupted.resid_post[1] = p.clean.resid_post[1]
    result, slow = p.run(), Slow(module_of(model), p.encoded)
    assert float(abs(result["value"].sel(metric="kl")).max()) < 1e-5, "the clean logits, put back"
    for i in range(len(pairs)):
        clean, corrupted = (slow.base(world, i).double().log_softmax(-1) for world in ("clean", "corrupted"))
        divergence = (clean[-1].exp() * (clean[-1] - corrupted[-1])).sum()
        assert float(result["base"].sel(metric="kl")[i]) == pytest.approx(float(divergence), rel=1e-4)
        follow = [*p.encoded.clean[i][1:], p.encoded.answer[i][0]]
        loss = -corrupted[range(len(follow)), follow].mean()
        assert float(result["base"].sel(metric="cross_entropy")[i]) == pytest.approx(float(loss), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_what_is_offered(model_type: str) -> None:
    found = architecture_of(tiny(model_type))
    assert [c for c in tp.COMPONENTS if found.offers(c, 1) and c not in SCALES] == list(OFFERED)
    assert [c for c in SCALES if found.offers(c, 1)] == (
        ["attn_in_scale", "mlp_in_scale", "logits_in_scale"] if model_type == "t5" else []
    )
    assert [layer.error for layer in found.layers] == [0, 0], "the sum closes bitwise"
    assert [s.kind for s in found.layers[0].sublayers] == ["attn", "cross", "mlp"]
    assert (found.causal, found.local_embedding, found.keeps_logits, found.encodes) == (True, True, False, True)
    on_stream = [s.stream_norm.rsplit(".", 1)[-1] for s in found.layers[1].sublayers]
    norms = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
    assert on_stream == (norms if model_type == "bart" else ["", "", ""])
    assert all(bool(s.pre_norm) == (model_type == "t5") for s in found.layers[1].sublayers)
    why = {
        "t5": "attention to the encoder stands between attention and the MLP",
        "bart": "norms stand on the stream itself",
    }
    with pytest.raises(errors.ComponentError, match=f"has no resid_mid: {why[model_type]}"):
        found.require("resid_mid", 0)
    assert "an encoder reads the prompts; layers and positions are the decoder's" in str(found)
    assert ("then encoder_attn_layer_norm on the stream" in str(found)) == (model_type == "bart")


def test_a_decoder_without_encoder_has_no_cross_attention(gpt2: Any) -> None:
    with pytest.raises(errors.ComponentError, match="has no cross_attn_out: it attends to no encoder"):
        architecture_of(gpt2).require("cross_attn_out", 0)
    assert "cross_attn_out" not in str(architecture_of(gpt2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_other_dtypes(model_type: str, dtype: torch.dtype) -> None:
    found = tp.Architecture(tp.load(build(model_type, layers=2, dtype=dtype), tokenizer()))
    assert [layer.error for layer in found.layers] == [0, 0]
    assert all(found.offers(c, 0) for c in OFFERED)


@pytest.mark.parametrize("model_type", ENCODER_DECODER)
def test_the_residual_sum_closes(model_type: str) -> None:
    model, module = tiny(model_type), module_of(tiny(model_type))
    names = ("resid_pre", "attn_out", "cross_attn_out", "mlp_out")
    visited = stops(architecture_of(model), [(n, i) for n in names for i in range(2)] + [("resid_pre", 2)], {})
    read = ("of", torch.arange(5), None)
    kept, _ = trace.forward(
        model, (trace.named(IDS, ENCODER_IDS), visited, read, (), (), (True, ()), *trace.PLAIN[3:]), {}
    )
    for i in range(2):
        x = kept["resid_pre", i]
        block = module.get_submodule(architecture_of(model).layers[i].path)
        for name, norm in zip(
            names[1:], ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"), strict=True
        ):
            x = x + kept[name, i]
            x = getattr(block, norm)(x) if model_type == "bart" else x
        torch.testing.assert_close(x, kept["resid_pre", i + 1], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        plain = module(input_ids=ENCODER_IDS, decoder_input_ids=IDS, use_cache=False).logits
    assert torch.equal(kept["logits", 0], plain), "reading changes nothing"


def test_norms_on_the_stream_without_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT-350m and the first GPT: x = norm(x + f(x)); against the oracle for OPT."""
    places = replace(reference.PLACES["opt"], last_read="lm_head", attn_norm=None, mlp_norm=None, mid=False)
    monkeypatch.setitem(reference.PLACES, "opt", places)
    model = tp.load(build("opt", layers=2, do_layer_norm_before=False), tokenizer())
    found = architecture_of(model)
    assert [layer.error for layer in found.layers] == [0, 0]
    assert "adds fc2.output, 48 neurons, then final_layer_norm on the stream" in str(found)
    assert not found.offers("resid_mid", 0)
    pairs = tp.Pairs("w30 w31 w32 w33 w34", "w30 w41 w32 w33 w34", "w35", "w36")
    for base in ("clean", "corrupted"):
        for component in ("resid_pre", "z", "head_out", "attn_out", "mlp_act", "mlp_out", "resid_post"):
            with tp.patching(model, pairs) as p:
                sweep(p, component, base, thin=2)
            error, moved = compare(model, p)
            assert error < 1e-5, f"{component}: {error:.2g}"
            assert moved > 1e-2
    config = OpenAIGPTConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    first = AutoModelForCausalLM.from_config(config).eval()
    randomise(first)
    found = tp.Architecture(tp.load(first, tokenizer()))
    assert [layer.error for layer in found.layers] == [0, 0]
    assert [s.stream_norm for s in found.layers[1].sublayers] == ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]


def test_what_cannot_be_proved_before_a_norm_on_the_stream_is_not_offered() -> None:
    """A gate that no module shows, on what attention adds; the rest of the block is still proved."""
    module = build("bart", layers=2)
    for block in module.model.decoder.layers:
        gate = torch.linspace(0.5, 1.5, 32)

        def forward(
            x: Any, mask: Any = None, read: Any = None, *_: Any, block: Any = block, gate: Any = gate, **__: Any
        ):
            x = block.self_attn_layer_norm(x + gate * block.self_attn(x, attention_mask=mask)[0])
            x = block.encoder_attn_layer_norm(x + block.encoder_attn(x, key_value_states=read)[0])
            return block.final_layer_norm(x + block.fc2(block.activation_fn(block.fc1(x))))

        block.forward = forward
    found = tp.Architecture(module)
    assert [found.offers(c, 0) for c in ("attn_out", "head_out", "cross_attn_out", "mlp_out")] == [0, 0, 1, 1]
    with pytest.raises(errors.ComponentError, match=r"no attn_out: the residual sum of this layer does not close"):
        found.require("attn_out", 0)


def test_streams_of_another_shape_are_refused() -> None:
    """ProphetNet's decoder carries a stream for each token that it predicts ahead."""
    sizes = {"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60, "ngram": 2}
    depth = {"num_encoder_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    module = ProphetNetForConditionalGeneration(ProphetNetConfig(**sizes, **depth, **heads)).eval()
    with pytest.raises(errors.ArchitectureError, match=r"the stream of its blocks is \[3, 21, 32\] for 3 prompts of 7"):
        tp.Architecture(module)


def test_an_embedding_that_both_sides_share_is_not_offered() -> None:
    module = build("bart", layers=2)
    module.model.encoder.embed_tokens = module.model.decoder.embed_tokens
    found = tp.Architecture(module)
    with pytest.raises(errors.ComponentError, match="has no embed: its module is called 2 times in a forward"):
        found.require("embed", 0)
    assert found.offers("resid_pre", 0)


def test_a_decoder_that_looks_ahead_is_not_pruned() -> None:
    module = build("bart", layers=2)
    for layer in module.model.decoder.layers:
        original = layer.self_attn.forward
        layer.self_attn.forward = lambda x, attention_mask=None, original=original, **k: original(
            x, attention_mask=torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool), **k
        )
    model = tp.load(module, tokenizer())
    assert not architecture_of(model).causal
    with tp.patching(model, uneven()) as p, p.row():
        p.corrupted.embed[0] = p.clean.embed[0]
    assert p.plan.jobs == 3


def test_an_encoder_that_reaches_the_first_layer_otherwise_is_noticed() -> None:
    """The stream entering layer 0 is then no function of the decoder's tokens, and patching it is measured."""
    module, seen = build("bart", layers=2), {}
    module.model.encoder.register_forward_hook(lambda m, a, out: seen.update(read=out.last_hidden_state))
    module.model.decoder.layernorm_embedding.register_forward_hook(
        lambda m, a, out: out + seen["read"].mean(1)[:, None]
    )
    model = tp.load(module, tokenizer())
    assert architecture_of(model).causal
    assert not architecture_of(model).local_embedding
    result = tp.patch(model, uneven(), "resid_pre", only={"layer": [0], "pos": [-1]})
    assert float(abs(result["effect"]).min()) > 1e-4


# ---------------------------------------------------------------------------------------------------- the prompts


def with_special_tokens() -> Any:
    """Encoder prompts start with w1 and end with w2."""
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    return words


def test_what_the_encoder_reads_and_the_decoder_has_written() -> None:
    pairs = uneven()
    encoded = pairs.encode(with_special_tokens(), start=0)
    assert encoded.encoder == (
        ((1, 30, 31, 32, 33, 2), (1, 34, 35, 36, 37, 38, 2), (1, 40, 41, 42, 2)),
        ((1, 30, 41, 32, 33, 2), (1, 34, 35, 36, 2), (1, 50, 52, 51, 53, 2)),
    )
    assert encoded.clean == encoded.corrupted == ((0, 5, 6), (0, 3, 9, 12), (0, 7, 8)), (
        "no special tokens but the start"
    )
    assert str(encoded.bos) == (
        "every prompt starts with w1 (the tokenizer does so); every prompt ends with w2 (the tokenizer does so)"
    )
    assert encoded.clean_prompts == pairs.clean
    assert encoded.differing(0) == (1 + 1,)
    plain = tp.Pairs("w30 w31", "w30 w41", "w5", "w6").encode(with_special_tokens())
    assert plain.clean == ((1, 30, 31),), "a decoder's own prompt is open-ended"
    alone = tp.Pairs("w30 w31", "w30 w41", "w5", "w6").encode(tokenizer(), start=0)
    assert (alone.clean, alone.corrupted, alone.decoder_prompts) == (((0,),), ((0,),), ())
    spelled = tp.Pairs("w1 w30 w2", "w41", decoder="w0 w7").encode(with_special_tokens(), start=0)
    assert (spelled.clean, spelled.encoder[0]) == (((0, 7),), ((1, 30, 2),)), "special tokens that are spelled out"
    ids = tp.Pairs([[30, 31]], [[30, 41]], decoder=[[4, 5]]).encode(tokenizer(), start=0)
    assert (ids.clean, ids.encoder) == (((4, 5),), (((30, 31),), ((30, 41),))), "ids are taken as they are"


def test_pairs_keep_their_decoders() -> None:
    pairs = uneven()
    assert pairs[[2, 0]].decoder == ("w7 w8", "w5 w6")
    assert pairs.both_roles().decoder == (*pairs.decoder, *pairs.decoder)
    assert tp.Pairs(["a", "b"], decoder="so far").decoder == ("so far", "so far")
    assert "    decoder   'w5 w6'" in str(pairs)
    table = {"clean": ["w1", "w2"], "corrupted": ["w3", "w4"], "decoder": ["w5", "w6"]}
    assert tp.Pairs.from_frame(table).decoder == ("w5", "w6")


def test_errors_are_in_words(gpt2: Any) -> None:
    model = tiny("t5")
    with pytest.raises(
        errors.PromptError, match=r"decoder= is what an encoder–decoder model has written .* no encoder"
    ):
        tp.patch(gpt2, tp.Pairs("John", "Mary", " Mary", " John", decoder="so"), "z")
    with pytest.raises(errors.PromptError, match="2 clean, 1 decoder, 2 answer, 2 wrong"):
        tp.Pairs(["w1", "w2"], decoder=["w3"])
    with pytest.raises(errors.PromptError, match=r"1 prompts have no tokens.\n  pair 0: \[\]"):
        tp.patch(model, tp.Pairs("w30", "w31", "w5", "w6", decoder=[[]]), "z")
    with pytest.raises(
        errors.PromptError, match="In 1 of 2 pairs the clean and the corrupted prompt are the same tokens"
    ):
        tp.patch(model, tp.Pairs(["w30", "w31 w32"], ["w30", "w31"], "w5", "w6"), "z")
    with pytest.raises(errors.PromptError, match="pair 0: the corrupted prompt has ids beyond 0 to 59"):
        tp.patch(model, tp.Pairs([[30]], [[77]], "w5", "w6"), "z")
    with pytest.raises(errors.PromptError, match="pair 0: the decoder's prompt has 70 tokens, the model takes 64"):
        tp.patch(tiny("bart"), tp.Pairs("w30", "w31", "w5", "w6", decoder=[[3] * 70]), "z")
    short = tp.Pairs("w30 w31 w32 w33", "w34", "w5", "w6")
    whose = r"position 3 is in no prompt(.|\n)*An encoder reads the prompts; positions are the decoder's"
    with pytest.raises(errors.SiteError, match=whose), tp.patching(model, short) as p, p.row():
        p.clean.z[0, 3] = 0
    with pytest.raises(errors.SiteError, match=r"grid: pos=\[3\]: the longest prompt has 1 tokens.\nAn encoder reads"):
        tp.patch(model, short, "resid_pre", only={"pos": [3]})


def test_a_decoder_that_starts_with_nothing() -> None:
    module = build("t5")
    module.config.decoder_start_token_id = module.generation_config.decoder_start_token_id = None
    with pytest.raises(errors.ModelError, match="does not say what its decoder starts with: set model.config.decoder_"):
        tp.patch(tp.load(module, tokenizer()), tp.Pairs("w30", "w31", "w5", "w6"), "z")


def test_loading(tmp_path: Path) -> None:
    for model_type in ENCODER_DECODER:
        module_of(tiny(model_type)).save_pretrained(tmp_path / model_type)
        tokenizer().save_pretrained(tmp_path / model_type)
        model = tp.load(tmp_path / model_type)
        assert type(module_of(model)) is type(module_of(tiny(model_type)))
        values = [tp.patch(m, uneven(), "resid_post")["value"].values for m in (model, tiny(model_type))]
        torch.testing.assert_close(*map(torch.tensor, values), equal_nan=True)
        with pytest.raises(errors.ModelError, match="is an encoder–decoder model, and those run here only"):
            tp.load(tmp_path / model_type, remote=True)
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = WhisperForConditionalGeneration(WhisperConfig(**small, **heads, **ids, max_source_positions=10))
    with pytest.raises(
        errors.ModelError, match="WhisperForConditionalGeneration .* does not take input_ids and decoder_"
    ):
        tp.load(whisper, tokenizer())


def test_labels_are_the_decoders_tokens() -> None:
    result = tp.patch(tiny("t5"), uneven(), "cross_attn_out")
    assert dict(result["effect"].sizes) == {"pair": 3, "layer": 2, "pos": 4}
    assert result["token"].values.tolist() == [
        ["w0", "w5", "w6", ""],
        ["w0", "w3", "w9", "w12"],
        ["w0", "w7", "w8", ""],
    ]
    assert result["corrupted_token"].equals(result["token"].rename("corrupted_token"))
    assert result["clean_prompt"].values.tolist() == list(uneven().clean)
    assert result["corrupted_prompt"].values.tolist() == list(uneven().corrupted)
    assert result["decoder_prompt"].values.tolist() == ["w5 w6", "w3 w9 w12", "w7 w8"]
    assert (result["status"].sel(pair=0, pos=3) == 0).all(), "this decoder has no fourth token"
    alone = tp.patch(tiny("t5"), tp.Pairs("w30 w31", "w41 w31 w32", "w5", "w6"), "cross_attn_out")
    assert alone["token"].values.tolist() == ["w0"]
    assert "decoder_prompt" not in alone.coords
    assert "an encoder reads the prompts: layers and positions are the decoder's" in alone.attrs["plan"]


def test_the_checklist() -> None:
    said = str(uneven().check(tiny("t5")))
    for part in (
        "an encoder reads the prompts, so that those of a pair may differ in length",
        "positions are the decoder's, which has written 'w0' 'w5' 'w6' or 'w0' 'w3' 'w9' 'w12'",
        "clean: the model prefers the answer in",
    ):
        assert part in said, said
    even = tp.Pairs(["w30 w31", "w32 w33"], ["w30 w41", "w42 w33"], "w5", "w6")
    said = str(even.check(tiny("t5")))
    assert "position 1 in 1 pair, as in pair 0: 'w31' → 'w41'" in said, said
    assert "which has written 'w0'" in said
    assert "mixes different things" not in said, "positions are the decoder's, so that nothing is mixed"
    logits = [
        module_of(tiny("t5"))(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0]]))
        .logits[0, -1]
        .tolist()
        for ids in ([30, 31], [32, 33])
    ]
    mean = sum(values[5] - values[6] for values in logits) / 2
    assert f"mean logit difference {mean:+.2f} on clean" in said, said
