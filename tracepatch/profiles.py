"""What lowering and planning need to know of a pair: its two prompts, where they differ, and what is read of them."""

from __future__ import annotations

from dataclasses import dataclass

from tracepatch.alignment import Alignment, Side
from tracepatch.architecture import Architecture
from tracepatch.errors import MetricError, SiteError, listing, plural
from tracepatch.jobs import Read
from tracepatch.metrics import Metric
from tracepatch.reach import read_at, scored_at
from tracepatch.sources import WorldName
from tracepatch.tokens import EncodedPairs


@dataclass(frozen=True)
class Profile:
    """What lowering needs to know of a pair; pairs that share it are lowered once.

    Attributes:
        alignment: The positions of the two prompts.
        differing: Positions at which the two prompts differ, in their tokens or in having one.
        scored: Positions whose logits each metric reads, in the clean and in the corrupted prompt.
        seen: Activations that the metrics read, in the clean and in the corrupted prompt.
        pair: Number of the pair, where something is drawn anew for each.
        encoded: Whether an encoder reads the prompts: the worlds may then differ at every position, whatever its token.
    """

    alignment: Alignment
    differing: tuple[int, ...]
    scored: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    seen: tuple[tuple[Read, ...], tuple[Read, ...]] = ((), ())
    pair: int = -1
    encoded: bool = False

    @property
    def first(self) -> int:
        """The first position at which the worlds may differ."""
        if self.encoded:
            return 0
        return min(self.differing, default=self.alignment.clean.length)

    @property
    def shared(self) -> bool:
        """Whether the two prompts are equally long and read at the same positions, so that runs hold rows of both."""
        return self.alignment.even and self.scored[0] == self.scored[1] and self.seen[0] == self.seen[1]

    def changing(self, base: WorldName, causal: bool, extends: bool) -> list[int]:
        """Of each position of a world, its partner in the other one; -1 where it has none, or both are the same.

        Args:
            base: The world.
            causal: Whether what stands at a position is known to depend on no later one.
            extends: Whether what stands there is known not to depend on how long the prompt is.
        """
        same = self.first if causal and (self.alignment.even or extends) else 0
        met = self.alignment.side(base).met
        return [-1 if other is None or position == other < same else other for position, other in enumerate(met)]

    def reads_of(self, root: WorldName) -> tuple[int, ...]:
        """The positions whose logits are read, in the clean or in the corrupted prompt."""
        return tuple(sorted({p for positions in self.scored[root == "corrupted"] for p in positions}))

    def seen_of(self, root: WorldName) -> tuple[Read, ...]:
        """The activations that are read, in the clean or in the corrupted prompt."""
        return self.seen[root == "corrupted"]


def require_given(metrics: tuple[Metric, ...], encoded: EncodedPairs) -> None:
    """Refuses metrics that need what the pairs do not have.

    Raises:
        MetricError: So it is.
    """
    for metric in metrics:
        offenders, lacking = [], {}
        for need in metric.needs:
            if need == "corrupted" and encoded.corrupted is None:
                lacking["corrupted"] = "tp.Pairs(…, corrupted=…)"
                offenders.append("the pairs have no corrupted prompts")
            for side in (need,) if need in ("answer", "wrong") else ("answer", "wrong") * (need == "direct"):
                empty = [i for i, ids in enumerate(getattr(encoded, side)) if not ids]
                if empty:
                    what = "wrong answer" if side == "wrong" else side
                    lacking[side] = f"tp.Pairs(…, {side}=…)"
                    offenders.append(
                        f"no {what} in {len(empty)} of {plural(len(encoded), 'pair')}, first in {empty[0]}"
                    )
        if offenders:
            raise MetricError(
                f"Metric {metric.name!r} cannot be read.\n{listing(offenders)}\n"
                f"Pass {' and '.join(lacking.values())}, or a metric that does not need it."
            )


def profile_of(architecture: Architecture, encoded: EncodedPairs, metrics: tuple[Metric, ...], pair: int) -> Profile:
    """What lowering needs to know of a pair, in both of its prompts.

    Raises:
        MetricError: A metric reads what the pair does not have.
    """
    alignment = encoded.alignments[pair]
    sides = [alignment.clean, alignment.corrupted][: len(encoded.worlds)]
    found = [_read_of(architecture, encoded, metrics, pair, side) for side in sides]
    for metric in metrics if len(sides) > 1 else ():
        counts = [len(scored_at(metric, side) or ()) for side in sides]
        if metric.site is None and counts[0] != counts[1] and metric.compares:
            raise MetricError(
                f"Metric {metric.name!r} compares runs of pair {pair} at {counts[0]} clean and {counts[1]} corrupted "
                f"positions ({metric.positions}). Read single positions, `:`, or spans of equally many tokens."
            )
    (scored, seen), (other, other_seen) = found[0], found[-1]
    # The decoder's tokens are the same on both sides.
    differing = () if encoded.encoder else encoded.differing(pair)
    return Profile(alignment, differing, (scored, other), (seen, other_seen), encoded=bool(encoded.encoder))


def _read_of(
    architecture: Architecture, encoded: EncodedPairs, metrics: tuple[Metric, ...], pair: int, side: Side
) -> tuple[tuple[tuple[int, ...], ...], tuple[Read, ...]]:
    """Of one prompt, the positions whose logits each metric reads, and the activations that metrics read."""
    length, scored, seen = side.length, [], []
    for number, metric in enumerate(metrics):
        if metric.site is not None:
            try:
                seen.append(read_at(number, metric.site, None, architecture, side))
            except SiteError:
                raise MetricError(
                    f"Metric {metric.name!r} reads {metric.site}, which pair {pair} does not have ({length} tokens)."
                ) from None
            continue
        found = scored_at(metric, side)
        if not found:
            raise MetricError(
                f"Metric {metric.name!r} reads position {metric.positions}, which pair {pair} does not have "
                f"({length} tokens)."
            )
        if "next" in metric.needs and length - 1 in found and not encoded.answer[pair]:
            raise MetricError(
                f"Metric {metric.name!r} reads the loss after the last token, and pair {pair} has no answer. "
                "Give it one, or read "
                f"other positions: tp.{metric.name}.at(slice(0, -1))."
            )
        if "next" in metric.needs and length - 1 in found and len(encoded.answer[pair]) > 1:
            raise MetricError(
                f"Metric {metric.name!r} reads the loss on the answer, and pair {pair} has several. Give it one, or "
                f"read other positions: tp.{metric.name}.at(slice(0, -1))."
            )
        lost = [p for p in found if "next" in metric.needs and encoded.following(pair, side.world, p) is None]
        if lost:
            raise MetricError(
                f"Metric {metric.name!r} reads the loss on the clean prompt's next token, and position {lost[0]} of "
                f"the corrupted prompt of pair {pair} has no partner there. Read `:`: those positions that have one."
            )
        if len(set(found)) < len(found):
            raise MetricError(
                f"Metric {metric.name!r} reads a position twice in pair {pair}: {metric.positions} of {length}."
            )
        scored.append(found)
    return tuple(scored), tuple(seen)
