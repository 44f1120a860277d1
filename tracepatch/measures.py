"""Ready-made metrics beside those of ``metrics``: of several tokens, of long answers, and of activations.

Those of activations stop the forward where they read. All but ``accuracy`` change smoothly with what they read, so that
they can be differentiated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from tracepatch.errors import MetricError
from tracepatch.metrics import Given, Metric, metric
from tracepatch.sources import as_source
from tracepatch.tokens import Answer

Scale: TypeAlias = Literal["logit", "prob", "log_prob"]
UNITS: dict[Scale, str] = {"logit": "logits", "prob": "probability", "log_prob": "nats"}


def _prob_diff(logits: torch.Tensor, given: Given) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    sides = []
    for need in ("answer", "wrong"):
        ids = given[need]
        picked = probabilities.gather(-1, ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
        sides.append((picked * (ids >= 0)[:, None]).sum(-1).mean(1))
    return torch.stack([sides[0] - sides[1], *sides], 1)


def _accuracy(logits: torch.Tensor, given: Given) -> torch.Tensor:
    ids = given["answer"]
    picked = logits.gather(-1, ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    best = picked.masked_fill((ids < 0)[:, None], -torch.inf).amax(-1, keepdim=True)
    return (logits > best).sum(-1).eq(0).float().mean(1)


def _continuation(logits: torch.Tensor, given: Given) -> torch.Tensor:
    ids = given["continuation"]
    found = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return (found * (ids >= 0)).sum(1)


prob_diff = Metric(
    "prob_diff",
    "probability",
    _prob_diff,
    parts=("answer", "wrong"),
    needs=("answer", "wrong"),
    note="summed probability of the answers minus that of the wrong ones; its two sides are kept beside it",
)
accuracy = Metric(
    "accuracy",
    "accuracy",
    _accuracy,
    needs=("answer",),
    note="1 where no token has a larger logit than the best answer",
)
continuation = Metric(
    "continuation",
    "nats",
    _continuation,
    needs=("continuation",),
    note="log-probability of the whole answer after the prompt, summed over its tokens",
)


def basket(
    tokens: Mapping[Answer, float] | Iterable[Answer], of: Scale = "logit", name: str = "basket", positions: Any = -1
) -> Metric:
    """A weighted sum over chosen tokens, the same for all pairs: of logits, probabilities, or their logarithms.

    ``tp.basket({" she": 1, " he": -1})`` is the logit of " she" minus that of " he".

    Args:
        tokens: Texts or ids with their weights; a list of them is averaged.
        of: What is summed. Of logits no other columns of the vocabulary are computed.
        name: Its name in results.
        positions: Where it is read; several are averaged.

    Raises:
        MetricError: There are none, or one stands twice. Texts that are not one token are refused when the model is
            known.
    """
    if of not in UNITS:
        raise MetricError(f"Metric {name!r}: of is one of {', '.join(UNITS)}, not {of!r}.")
    weights = dict(tokens) if isinstance(tokens, Mapping) else {}
    if not weights:
        listed = [tokens] if isinstance(tokens, (str, int)) else list(tokens)
        weights = dict.fromkeys(listed, 1 / max(1, len(listed)))
        if len(weights) < len(listed):
            raise MetricError(f"Metric {name!r} names a token twice: {listed}.")
    if not weights or not all(isinstance(token, (str, int)) for token in weights):
        raise MetricError(
            f"Metric {name!r} takes tokens, as texts or ids, with their weights; it was given {tokens!r}."
        )
    told = ", ".join(f"{weight:+g} {token!r}" for token, weight in list(weights.items())[:6])
    note = f"weighted {UNITS[of]} of {told}" + (", …" if len(weights) > 6 else "")

    def make(ids: tuple[int, ...]) -> Metric:
        if len(set(ids)) < len(ids):
            raise MetricError(f"Metric {name!r}: two of its texts are the same token.")
        factors = torch.tensor([float(weight) for weight in weights.values()])
        chosen = torch.tensor(ids)

        def summed(logits: torch.Tensor) -> torch.Tensor:
            if of == "logit":
                picked = logits
            else:
                picked = (logits.softmax(-1) if of == "prob" else logits.log_softmax(-1))[..., chosen.to(logits.device)]
            found: torch.Tensor = picked @ factors.to(logits)
            return found if found.ndim == 1 else found.mean(1)

        made = metric(summed, name, UNITS[of], positions, vocab=ids if of == "logit" else None)
        return replace(made, note=note)

    def unresolved(logits: torch.Tensor) -> torch.Tensor:
        raise MetricError(f"Metric {name!r} is about texts, and becomes one of ids when the model is known.")

    if all(isinstance(token, int) for token in weights):
        return make(tuple(int(token) for token in weights))
    found = metric(unresolved, name, UNITS[of], positions)
    return replace(found, note=note, words=(tuple(weights), make))


# ------------------------------------------------------------------------------------------------ of activations


def attention(layer: int, head: int, src: Any, dest: Any = -1) -> Metric:
    """How much a head attends from one position to others: its weights there, summed; over several ``dest`` averaged.

    Args:
        layer: Of the head.
        head: Which.
        src: The positions attended to: an integer, slice, list or mask.
        dest: From where.
    """

    def attended(pattern: torch.Tensor) -> torch.Tensor:
        rows = pattern.reshape(len(pattern), 1 if isinstance(dest, int) else pattern.shape[1], -1)
        return rows.sum(2).mean(1)

    return metric(
        attended, f"attention {layer}.{head}", "attention", component="pattern", index=(layer, head, dest, src)
    )


def _looking(name: str, layer: int, head: int, note: str, wanted: Any) -> Metric:
    def looked(pattern: torch.Tensor, given: Given) -> torch.Tensor:
        chosen = wanted(given["tokens"]).to(pattern)  # [row, dest, src]
        has_one = chosen.any(-1)
        looks = (pattern * chosen).sum(-1) * has_one
        found: torch.Tensor = looks.sum(-1) / has_one.sum(-1).clamp(min=1)
        return found

    label = f"{name} {layer}.{head}"
    found = metric(looked, label, "attention", needs=("tokens",), component="pattern", index=(layer, head))
    return replace(found, note=note)


def _same(tokens: torch.Tensor) -> torch.Tensor:
    """Whether an earlier token is the same, ``[row, dest, src]``."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def _after_same(tokens: torch.Tensor) -> torch.Tensor:
    """Whether the token before is an earlier one that is the same."""
    return torch.nn.functional.pad(_same(tokens), (1, 0))[..., :-1]


def _before(tokens: torch.Tensor) -> torch.Tensor:
    """Whether it is the token before."""
    count = tokens.shape[1]
    return torch.eye(count, dtype=torch.bool, device=tokens.device).roll(-1, 1).tril(-1).expand(len(tokens), -1, -1)


def prefix_matching(layer: int, head: int) -> Metric:
    """The prefix-matching score of a head (Olsson et al. 2022): its attention to what followed the same token before.

    For each token that stood earlier in the prompt, the head's weights on the tokens right after those earlier ones are
    summed; the mean over such tokens is between 0 and 1. Induction heads have a high score. A prompt that repeats
    nothing has 0.
    """
    note = "attention to the tokens that followed earlier occurrences of the same token"
    return _looking("prefix matching", layer, head, note, _after_same)


def duplicate_token(layer: int, head: int) -> Metric:
    """A head's attention to earlier occurrences of the same token, averaged over tokens that have one."""
    return _looking("duplicate token", layer, head, "attention to earlier occurrences of the same token", _same)


def previous_token(layer: int, head: int) -> Metric:
    """A head's attention to the token before, averaged over all but the first."""
    return _looking("previous token", layer, head, "attention to the token before", _before)


def neuron(layer: int, number: int, pos: int = -1) -> Metric:
    """A neuron's activation: what it hands to the MLP's last projection."""

    def activation(live: torch.Tensor) -> torch.Tensor:
        return live

    return metric(activation, f"neuron {layer}.{number}", "activation", component="mlp_act", index=(layer, pos, number))


def direction(vector: Any, component: str, index: Any, name: str = "direction", *, unit: bool = True) -> Metric:
    """How far an activation goes along a vector: their product.

    Args:
        vector: ``[d]``.
        component: Of what, such as ``"resid_post"``.
        index: Where, as in the brackets of a component: one position, and one head where there are heads.
        name: Its name in results.
        unit: Whether the vector is divided by its length, so that the result is a length in the activation's unit.

    Raises:
        MetricError: It is no vector, or 0.
    """
    constant = as_source(vector).terms().constant
    along = torch.zeros(0) if constant is None else constant.tensor
    if along.ndim != 1 or not bool(along.any()):
        raise MetricError(f"Metric {name!r} takes a vector [d] that is not 0; it was given {list(along.shape)}.")
    along = along / along.norm() if unit else along

    def projection(live: torch.Tensor) -> torch.Tensor:
        if live.ndim != 2:
            raise MetricError("pick one position, and one head where there are heads")
        return live @ along.to(live)

    return metric(projection, name, "activation", component=component, index=index)


def direct_logit_diff(component: str, index: Any, name: str = "") -> Metric:
    """Direct logit attribution: what a write to the stream adds to the logit difference, past all later layers.

    The write is projected onto the unembedding of the answers minus that of the wrong ones, through the final norm with
    its scale as it is in the unpatched run of the row's prompt. So the contributions of all writers and biases sum to
    the logit difference there (before a softcap, where a model has one). In a patched run it shows what *this* writer
    makes of the patch, and not what later ones do.

    Args:
        component: What writes to the stream: ``head_out``, ``attn_out``, ``mlp_out``, ``embed``; or the stream itself.
        index: Where, as in the brackets of the component: one position, and one head of ``head_out``.
        name: Its name in results.
    """

    def contribution(live: torch.Tensor, given: Given) -> torch.Tensor:
        if live.ndim != 2:
            raise MetricError("pick one position, and one head where there are heads")
        return (live * given["direct"].to(live)).sum(-1)

    numbers = ".".join(str(i) for i in (index if isinstance(index, tuple) else (index,)))
    found = metric(
        contribution,
        name or f"direct {component} {numbers}",
        "logits",
        needs=("direct",),
        component=component,
        index=index,
    )
    return replace(found, note="its direct contribution to the logit difference")
