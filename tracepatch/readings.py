"""How a script computes each metric from the logits: one line of code for each.

To give another metric a line, write its function and add it to ``READINGS``; one without is passed to the script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tracepatch import metrics


@dataclass(frozen=True)
class Read:
    """The logits that a metric reads, as a variable ``[vocab]``, or ``[position, vocab]`` where it reads several.

    Attributes:
        name: The variable.
        several: Whether it has the dim of positions.
        given: What the metric needs of the pair: ids, or log-probabilities as code.
    """

    name: str
    several: bool
    given: dict[str, Any]

    def at(self, need: str, step: str = "", over: str = "") -> str:
        """Entries at the given ids, after a step; where there are several ids, what becomes of them."""
        ids = self.given[need]
        picked = str(list(ids)) if len(ids) > 1 else str(ids[0])
        return f"{self.name}{step}[{':, ' if self.several else ''}{picked}]" + (over if len(ids) > 1 else "")

    @property
    def mean(self) -> str:
        """The mean over positions, where there are several."""
        return ".mean()" if self.several else ""


def _logit(read: Read, need: str = "answer") -> str:
    return read.at(need, over=".mean(-1)") + read.mean


def _rank(read: Read) -> str:
    best = read.at("answer", over=".max(-1).values")
    return (
        f"({read.name} > {best}[:, None]).sum(-1).float().mean()" if read.several else f"({read.name} > {best}).sum()"
    )


def _kl(read: Read) -> str:
    clean, here = read.given["clean"], f"{read.name}.log_softmax(-1)"
    return f"torch.nn.functional.kl_div({here}, {clean}, reduction='none', log_target=True).sum(-1){read.mean}"


def _cross_entropy(read: Read) -> str:
    ids = list(read.given["next"]) if read.several else read.given["next"][0]
    return f"torch.nn.functional.cross_entropy({read.name}, torch.tensor({ids}).to({read.name}.device))"


READINGS: dict[Callable[..., torch.Tensor], Callable[[Read], str]] = {
    metrics.logit_diff.function: lambda read: f"{_logit(read)} - {_logit(read, 'wrong')}",
    metrics.logit.function: _logit,
    metrics.prob.function: lambda read: read.at("answer", ".softmax(-1)", ".sum(-1)") + read.mean,
    metrics.log_prob.function: lambda read: read.at("answer", ".log_softmax(-1)", ".logsumexp(-1)") + read.mean,
    metrics.rank.function: _rank,
    metrics.kl.function: _kl,
    metrics.cross_entropy.function: _cross_entropy,
}
