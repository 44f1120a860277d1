"""Empty GPT-2s to write weights into by hand, with a LayerNorm that leaves the written blocks alone.

LayerNorm's epsilon is 10¹² and its weight 10⁶, which makes it x − mean(x) up to a relative error of 10⁻¹². Dimension
`balance`, the last one, is minus the sum of all others in whatever is written to the stream, which keeps mean(x) at 0.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from . import vocabulary


def blank(
    *, words: int, positions: int, d_model: int, layers: int, heads: int, neurons: int, activation: str = "gelu_new"
) -> GPT2LMHeadModel:
    """A stock GPT-2 in eval mode and float32 whose weights are exactly 0, but for LayerNorm's.

    Args:
        words: Tokens in the vocabulary, the four special ones included.
        positions: The longest input, in tokens.
        d_model: Width of the stream.
        layers: How many.
        heads: In each layer.
        neurons: In each layer.
        activation: Of the neurons, by its name in transformers.
    """
    config = GPT2Config(
        vocab_size=words,
        n_positions=positions,
        n_embd=d_model,
        n_layer=layers,
        n_head=heads,
        n_inner=neurons,
        activation_function=activation,
        layer_norm_epsilon=1e12,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=vocabulary.PAD,
        eos_token_id=vocabulary.EOS,
        bos_token_id=vocabulary.BOS,
    )
    model = GPT2LMHeadModel(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1e6 if "ln_" in name and name.endswith("weight") else 0.0)
    return model


def one_hot(rows: torch.Tensor, block: int) -> None:
    """Makes row i of (row, d_model) a one-hot of the block's i-th dimension, as far as `balance`, with sum 0."""
    balance = rows.shape[1] - 1
    count = min(len(rows), balance - block)
    rows[torch.arange(count), torch.arange(block, block + count)] = 1.0
    rows[:count, balance] = -1.0


def balance(rows: torch.Tensor) -> None:
    """Sets the last dimension of (row, d_model) to minus the sum of the others."""
    rows[:, -1] = -rows[:, :-1].sum(dim=-1)


def head(
    model: GPT2LMHeadModel, layer: int, head: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of one head's weights: query, key, value (d_model, d_head) and output (d_head, d_model)."""
    attention = model.transformer.h[layer].attn
    d_model, d_head = model.config.n_embd, model.config.n_embd // model.config.n_head
    columns = slice(head * d_head, (head + 1) * d_head)
    query, key, value = attention.c_attn.weight.view(d_model, 3, d_model)[:, :, columns].unbind(dim=1)
    return query, key, value, attention.c_proj.weight[columns]
