"""What attribution takes is what two forwards and one backward take: the benchmark's comparison, on a small model."""

from __future__ import annotations

import numpy as np
import torch
from attribution_benchmark import Bare, Ours, peak
from benchmark import FAMILIES, HEADS, LAYERS, TOLERANCE, Sweep
from transformers import GPT2Config, GPT2LMHeadModel

import tracepatch as tp

MORE = 1.05  # of the bare version's peak


def test_attribution_takes_the_memory_of_two_forwards_and_one_backward() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=96, vocab_size=100, bos_token_id=0, eos_token_id=0)
    bare = Bare(GPT2LMHeadModel(config).eval(), FAMILIES["gpt2"])
    ours = Ours(bare.module)
    ids = Sweep("prompts", "z", (), tokens=40, pairs=3).prompts()
    clean, corrupted = (side % config.vocab_size for side in ids)
    pairs = tp.Pairs(clean.tolist(), corrupted.tolist())
    wanted = bare.scores(clean, corrupted)
    least = peak(lambda: bare.scores(clean, corrupted))
    for call in (ours.one_call, ours.saved):
        for name, found in call(pairs).items():
            np.testing.assert_allclose(found, wanted[name], atol=TOLERANCE * abs(wanted[name]).max(), err_msg=name)
        assert peak(lambda call=call: call(pairs)) <= MORE * least
