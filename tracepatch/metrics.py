"""From logits, or from an activation, to numbers with a unit.

Each metric declares what it reads, positions of the logits or one site, so that nothing else is computed, and what it
needs to know of a pair. Values are computed in float32, one a row; a metric never mixes rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from tracepatch.errors import MetricError, SiteError, listing
from tracepatch.sites import Select, Site, component, select, split_index
from tracepatch.tokens import Answer, EncodedPairs, answer_id, pieces

Given: TypeAlias = dict[str, torch.Tensor]
NEEDS = ("answer", "wrong", "next", "clean", "corrupted", "tokens", "continuation", "direct")
OF_TOKENS = ("answer", "wrong", "tokens", "direct")  # what an activation may be compared with
JUMPS = ("rank", "accuracy")  # units that no gradient leads through, and that rounding may move by a whole step
_NAMED = ("logit_diff", "logit", "log_prob", "prob", "prob_diff", "kl", "cross_entropy", "accuracy", "rank")
LAST = Select((-1,), scalar=True)
FEW = 8  # computing columns of the vocabulary pays off where they are fewer than all divided by this


@dataclass(frozen=True)
class Metric:
    """A number read from the logits of a run, or from one of its activations.

    Attributes:
        name: Its name in results.
        unit: What the number counts.
        function: ``(logits [row, read, vocab], given) → [row]``, or ``[row, 1 + parts]`` for a metric with parts; of an
            activation ``(live [row, …], given) → [row]``.
        positions: The positions it reads, in each prompt's own counting.
        parts: Names of further columns that the function returns, such as the two sides of a difference.
        needs: What it needs of ``given``: ``answer`` and ``wrong`` (ids ``[row, n]``, padded with -1), ``next`` (ids
            ``[row, read]``: the clean prompt's next token, after the last one the answer), ``clean`` or ``corrupted``
            (that run's log-probabilities ``[row, read, vocab]``), ``tokens`` (ids of the row's own prompt
            ``[row, pos]``), ``continuation`` (ids ``[row, read]`` of the answer that ``tp.continued`` appends, -1
            before it), ``direct`` (what each dim of the stream adds to the logit difference at the site's position,
            ``[row, d_model]``, with the final norm's scale as it is in the unpatched run of the row's prompt).
        note: What it does, in one line.
        vocab: The only token ids whose logits it reads: the function is given just these columns, in this order;
            ``"given"`` for those of the answers; ``None`` for all. Fewer columns make runs faster.
        squeezed: Whether the function wants ``[row, vocab]`` instead, because it reads one position.
        site: The activation that it reads instead of logits; ``None`` for logits. Its layer is as written until the
            model is known.
        words: Makes the metric of token ids, where it is about texts: those, and what makes it of them.
    """

    name: str
    unit: str
    function: Callable[[torch.Tensor, Given], torch.Tensor]
    positions: Select = LAST
    parts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""
    squeezed: bool = False
    vocab: tuple[int, ...] | Literal["given"] | None = None
    site: Site | None = None
    words: tuple[tuple[Answer, ...], Callable[[tuple[int, ...]], Metric]] | None = None

    def __post_init__(self) -> None:
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise MetricError(f"Metric {self.name!r} needs {', '.join(unknown)}; what there is: {', '.join(NEEDS)}.")

    def __repr__(self) -> str:
        return f"<metric {self.name} [{self.unit or 'no unit'}]>"

    @property
    def differentiable(self) -> bool:
        """Whether it changes smoothly with what it reads."""
        return self.unit not in JUMPS

    def fitted(self, encoded: EncodedPairs) -> Metric:
        """The metric for some pairs: of the ids of the texts that it is about, at the positions of their answers.

        Raises:
            MetricError: A text is not one token, or no answer is appended.
        """
        if self.words is not None:
            texts, make = self.words
            ids = [answer_id(encoded.tokenizer, text, "") for text in texts]
            bad = [f"{t!r} is {pieces(encoded.tokenizer, t)}" for t, i in zip(texts, ids, strict=True) if i is None]
            if bad:
                raise MetricError(f"Metric {self.name!r} reads texts that are not one token.\n{listing(bad)}")
            return replace(make(tuple(i for i in ids if i is not None)), name=self.name)
        if "continuation" not in self.needs:
            return self
        if not encoded.appended:
            raise MetricError(
                f"Metric {self.name!r} reads answers of several tokens, which stand at the end of the prompts: pass "
                "tp.continued(pairs) instead of the pairs."
            )
        return replace(self, positions=Select(bounds=(-1 - max(encoded.appended), None, None)))

    @property
    def reads(self) -> str:
        """What it reads, in words."""
        return f"at position {self.positions}" if self.site is None else f"of {self.site}"

    @property
    def compares(self) -> bool:
        """Whether it compares with the logits of a world, which must be known before."""
        return any(need in ("clean", "corrupted") for need in self.needs)

    @property
    def told(self) -> str:
        """What it does, with the activation that it reads."""
        return self.note if self.site is None else f"{self.reads}: {self.note}".rstrip(": ")

    def at(self, positions: Any) -> Metric:
        """The same metric read at other positions (an integer, slice, list or mask), averaged over them.

        Raises:
            MetricError: It reads an activation.
        """
        if self.site is not None:
            raise MetricError(
                f"Metric {self.name!r} reads {self.site}, and at() moves what is read of the logits. Make another one, "
                "with the positions in index=."
            )
        return replace(self, positions=select(positions, "pos"))

    def __call__(self, logits: torch.Tensor, given: Given) -> torch.Tensor:
        """The values and parts, ``[row, 1 + parts]``, of logits ``[row, read, vocab]``."""
        found = self.function(logits, given)
        return found if found.ndim == 2 else found[:, None]


def metric(
    function: Callable[..., torch.Tensor],
    name: str | None = None,
    unit: str = "",
    positions: Any = -1,
    needs: tuple[str, ...] = (),
    vocab: Iterable[int] | None = None,
    component: str = "",
    index: Any = None,
) -> Metric:
    """A function of logits, or of an activation, as a metric.

    Args:
        function: ``f(logits)``, or ``f(logits, given)`` with ``needs``, → one number a row. ``logits`` is
            ``[row, vocab]`` at one position, and ``[row, read, vocab]`` where ``positions`` is a slice, list or mask.
            With ``component`` it is given the live value ``[row, …]`` instead.
        name: Its name in results; the function's own otherwise.
        unit: What the number counts.
        positions: What it reads; the last position otherwise. ``metric.at([…])`` averages a function of one position.
        needs: What it wants in ``given``: ``answer``, ``wrong``, ``next``, ``clean``, ``corrupted``, ``tokens``, …; see
            ``Metric``.
        vocab: The only token ids whose logits it reads. ``logits`` then has just these columns, in this order, and no
            others are computed: ``tp.metric(lambda logits: logits[:, 0] - logits[:, 1], vocab=(11, 22))``.
        component: The activation that it reads instead of logits, in the patched run, after the row's edits.
        index: Where, as in the brackets of ``p.clean.z[9, -1, 6]``: ``component="z", index=(9, -1, 6)``. The function
            is given what indexing gives, with rows in front, in float32.

    Raises:
        MetricError: It is no function, or what it reads is not said, or said twice.
        ComponentError: There is no such component.
        SiteError: The component has no such index.
    """
    if not callable(function):
        raise MetricError(_no_metric(function))
    if component or index is not None:
        return _of_activation(function, name, unit, positions, vocab, needs, component, index)
    picked = select(positions, "pos")

    def call(logits: torch.Tensor, given: Given) -> torch.Tensor:
        return function(logits, given) if needs else function(logits)

    def each(logits: torch.Tensor, given: Given) -> torch.Tensor:
        if logits.shape[1] == 1:
            return call(logits[:, 0], given)
        return torch.stack([call(logits[:, i], given) for i in range(logits.shape[1])]).mean(0)

    label, note = _labelled(function, name)
    return Metric(
        label,
        unit,
        each if picked.scalar else call,
        picked,
        needs=needs,
        note=note,
        squeezed=picked.scalar,
        vocab=None if vocab is None else _ids(label, vocab, needs),
    )


def _of_activation(
    function: Callable[..., torch.Tensor],
    name: str | None,
    unit: str,
    positions: Any,
    vocab: Iterable[int] | None,
    needs: tuple[str, ...],
    kind: str,
    index: Any,
) -> Metric:
    label, note = _labelled(function, name)
    if not kind or index is None:
        raise MetricError(
            f"Metric {label!r} reads an activation: say which and where, as in component='z', index=(9, -1, 6) for "
            "p.clean.z[9, -1, 6]."
        )
    if not (isinstance(positions, int) and positions == -1) or vocab is not None:
        raise MetricError(
            f"Metric {label!r} reads {kind}: positions= and vocab= speak of logits. Its positions stand in index=."
        )
    if kind == "logits":
        raise MetricError(f"Metric {label!r}: logits are what is read without component=; say where with positions=.")
    wrong = [need for need in needs if need not in OF_TOKENS]
    if wrong:
        raise MetricError(
            f"Metric {label!r} reads {kind} and needs {', '.join(wrong)}, which speaks of logits. Of a pair it can be "
            f"given {' and '.join(OF_TOKENS)}."
        )
    layers, *picked = split_index(component(kind), index)
    if not layers.scalar or layers.items is None:
        raise SiteError(
            f"Metric {label!r}: {kind}[{layers}, …] is several layers; a metric reads one. Make one for each."
        )

    def call(live: torch.Tensor, given: Given) -> torch.Tensor:
        return function(live, given) if needs else function(live)

    return Metric(label, unit, call, needs=needs, note=note, site=Site(kind, layers.items[0], *picked))


def _labelled(function: Callable[..., Any], name: str | None) -> tuple[str, str]:
    """What a function is called, and what it says of itself in a line."""
    label = name or str(getattr(function, "__name__", type(function).__name__))
    return label, (inspect.getdoc(function) or "").split("\n")[0]


def _ids(name: str, vocab: Iterable[int], needs: tuple[str, ...]) -> tuple[int, ...]:
    ids = tuple(vocab)
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise MetricError(f"Metric {name!r}: vocab is a list of different token ids, such as (11, 22), not {vocab!r}.")
    if needs:
        raise MetricError(
            f"Metric {name!r}: what is given ({', '.join(needs)}) speaks of the whole vocabulary. Leave out vocab= or "
            "needs=."
        )
    return ids


MetricLike: TypeAlias = Metric | Callable[..., torch.Tensor]
Metrics: TypeAlias = MetricLike | Iterable[MetricLike] | Mapping[str, MetricLike]


def as_metrics(given: Metrics | Any) -> tuple[Metric, ...]:
    """One metric, several, or a mapping of names to metrics, as a tuple.

    Raises:
        MetricError: None, two of one name, or something that is no metric.
    """
    if isinstance(given, Mapping):
        found = tuple(replace(_one(m), name=str(name)) for name, m in given.items())
    elif isinstance(given, Metric) or callable(given):
        found = (_one(given),)
    else:
        found = tuple(
            _one(m) for m in ([given] if isinstance(given, str) or not isinstance(given, Iterable) else given)
        )
    names = [m.name for m in found]
    if not found:
        raise MetricError("There is no metric: pass tp.logit_diff, another metric, or a function of logits.")
    if len(set(names)) < len(names):
        raise MetricError(f"Two metrics share a name: {', '.join(names)}. Pass a mapping of names to metrics.")
    return found


def columns_read(
    metrics: Iterable[Metric], encoded: EncodedPairs, pairs: Iterable[int], vocab: int
) -> tuple[int, ...] | None:
    """The only vocabulary columns that metrics read on these pairs, sorted; ``None`` where all of them are computed."""
    ids: set[int] = set()
    for chosen in (m for m in metrics if m.site is None):
        if chosen.vocab is None:
            return None
        if chosen.vocab == "given":
            ids |= {i for need in chosen.needs for pair in pairs for i in getattr(encoded, need)[pair]}
        else:
            ids |= set(chosen.vocab)
    return tuple(sorted(ids)) if ids and len(ids) * FEW <= vocab else None


def require_smooth(metrics: Iterable[Metric]) -> None:
    """Refuses metrics that no gradient leads through.

    Raises:
        MetricError: There are some.
    """
    jumping = [one.name for one in metrics if not one.differentiable]
    if jumping:
        raise MetricError(
            f"{', '.join(jumping)} jumps, so that no gradient leads through it: estimate tp.logit_diff, or another "
            "metric that changes smoothly, or measure this one with tp.patch."
        )


def _no_metric(given: Any) -> str:
    example = f"tp.{given}, without quotes" if str(given) in _NAMED else "tp.logit_diff"
    return f"{given!r} is no metric: pass {example}, another metric, or a function of logits."


def _one(given: Any) -> Metric:
    return given if isinstance(given, Metric) else metric(given)


def _gather(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Values [row, read, vocab] at ids [row, n] → [row, read, n]; 0 where an id is padding."""
    picked = values.gather(-1, ids.clamp(min=0)[:, None].expand(-1, values.shape[1], -1))
    return picked * (ids >= 0)[:, None]


def _mean_over(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (_gather(values, ids).sum(-1) / (ids >= 0).sum(-1)[:, None]).mean(1)


def _logit(logits: torch.Tensor, given: Given) -> torch.Tensor:
    return _mean_over(logits, given["answer"])


def _logit_diff(logits: torch.Tensor, given: Given) -> torch.Tensor:
    right, wrong = _mean_over(logits, given["answer"]), _mean_over(logits, given["wrong"])
    return torch.stack([right - wrong, right, wrong], 1)


def _prob(logits: torch.Tensor, given: Given) -> torch.Tensor:
    return _gather(logits.softmax(-1), given["answer"]).sum(-1).mean(1)


def _log_prob(logits: torch.Tensor, given: Given) -> torch.Tensor:
    ids = given["answer"]
    picked = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    return picked.masked_fill((ids < 0)[:, None], -torch.inf).logsumexp(-1).mean(1)


def _rank(logits: torch.Tensor, given: Given) -> torch.Tensor:
    ids = given["answer"]
    picked = logits.gather(-1, ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
    best = picked.masked_fill((ids < 0)[:, None], -torch.inf).max(-1, keepdim=True).values
    return (logits > best).sum(-1).float().mean(1)


def _cross_entropy(logits: torch.Tensor, given: Given) -> torch.Tensor:
    return -logits.log_softmax(-1).gather(-1, given["next"][..., None])[..., 0].mean(1)


def _kl(logits: torch.Tensor, given: Given) -> torch.Tensor:
    reference = given["clean"]
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean(1)


logit_diff = Metric(
    "logit_diff",
    "logits",
    _logit_diff,
    parts=("answer", "wrong"),
    needs=("answer", "wrong"),
    vocab="given",
    note="mean logit of the answers minus mean logit of the wrong ones; its two sides are kept beside it",
)
logit = Metric("logit", "logits", _logit, needs=("answer",), vocab="given", note="mean logit of the answers")
prob = Metric("prob", "probability", _prob, needs=("answer",), note="summed probability of the answers")
log_prob = Metric("log_prob", "nats", _log_prob, needs=("answer",), note="log of the summed probability of the answers")
rank = Metric("rank", "rank", _rank, needs=("answer",), note="how many tokens have a larger logit than the best answer")
kl = Metric("kl", "nats", _kl, needs=("clean",), note="KL divergence of the run's distribution from the clean run's")
cross_entropy = Metric(
    "cross_entropy",
    "nats",
    _cross_entropy,
    Select(),
    needs=("next",),
    note="mean loss on the clean prompt's next tokens, and on the answer after its last one",
)
