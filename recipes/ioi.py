"""Indirect object identification: which activations tell who is given the bag?

"When John and Mary went to the store, John gave the bag to" continues with " Mary": the name that stands there once,
not the one that is repeated. Wang et al. (2022), *Interpretability in the Wild* (arXiv:2211.00593), found the circuit
that does this in GPT-2 small.

The corrupted prompt replaces the second mention of the subject by the other name, so that the right answer is exchanged
with the wrong one. Clean values are written into the corrupted run (denoising): an effect of 1 says that this
activation suffices to bring the clean answer back. Every pair is used in both roles, so that no name is special.

What to expect. The residual stream carries the information at the changed token in early layers and at the last token
in late ones; where it moves from one to the other, attention outputs and single heads light up. In GPT-2 small these
are the S-inhibition heads (7.3, 7.9, 8.6, 8.10) and the name movers (9.6, 9.9, 10.0); MLPs matter little beyond the
first. Queries, keys, values and patterns say what of a head it is: S-inhibition heads carry other values, and change
the queries, and so the patterns, of the name movers. Negative name movers (10.7, 11.10) show up as effects below 0. A
denoising sweep misses parts that only work together; a noising sweep misses parts whose work others take over.
"""

from __future__ import annotations

import tracepatch as tp


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """Pairs whose names, places and objects are one token in this model's tokenizer, each in both roles.

    Args:
        tokenizer: The model's.
        count: How many pairs; rounded up to an even number.
        seed: The same seed gives the same pairs, as long as the same words are one token.
    """
    return tp.tasks.ioi(tokenizer, count, seed)


@tp.recipe
def residual_stream(p):
    """Denoise the residual stream entering each layer, one position at a time."""
    for layer, pos in p.grid("resid_pre", by=("layer", "pos")):
        with p.row(layer=layer, pos=pos):
            p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]


@tp.recipe
def attention_out(p):
    """Denoise what attention adds to the stream, one layer and position at a time."""
    for layer, pos in p.grid("attn_out", by=("layer", "pos")):
        with p.row(layer=layer, pos=pos):
            p.corrupted.attn_out[layer, pos] = p.clean.attn_out[layer, pos]


@tp.recipe
def mlp_out(p):
    """Denoise what the MLP adds to the stream, one layer and position at a time."""
    for layer, pos in p.grid("mlp_out", by=("layer", "pos")):
        with p.row(layer=layer, pos=pos):
            p.corrupted.mlp_out[layer, pos] = p.clean.mlp_out[layer, pos]


@tp.recipe
def heads(p):
    """Denoise the output of each head at all positions."""
    for layer, head in p.grid("z", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.z[layer, :, head] = p.clean.z[layer, :, head]


@tp.recipe
def queries(p):
    """Denoise the queries of each head: what it looks for."""
    for layer, head in p.grid("q", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.q[layer, :, head] = p.clean.q[layer, :, head]


@tp.recipe
def keys(p):
    """Denoise the keys of each head, or of each group of heads that share them: what it is found by."""
    for layer, head in p.grid("k", by=("layer", "kv_head")):
        with p.row(layer=layer, kv_head=head):
            p.corrupted.k[layer, :, head] = p.clean.k[layer, :, head]


@tp.recipe
def values(p):
    """Denoise the values of each head, or of each group of heads that share them: what it carries."""
    for layer, head in p.grid("v", by=("layer", "kv_head")):
        with p.row(layer=layer, kv_head=head):
            p.corrupted.v[layer, :, head] = p.clean.v[layer, :, head]


@tp.recipe
def patterns(p):
    """Denoise the attention pattern of each head: where it looks."""
    for layer, head in p.grid("pattern", by=("layer", "head")):
        with p.row(layer=layer, head=head):
            p.corrupted.pattern[layer, head] = p.clean.pattern[layer, head]
