"""What the literature warns of, as far as a plan shows it: said before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tracepatch.metrics import Metric
from tracepatch.rows import Edit, Row
from tracepatch.sources import WorldName, summed

PROBABILITY = (
    "a probability near 0 cannot fall and one near 1 cannot rise: what works against the answer stays invisible "
    "(Zhang & Nanda 2023). A logit difference shows it"
)
HALFWAY = (
    "normalized ±0.5 may mean that nothing is left: rows here write neither prompt's values, and a run that knows "
    "neither answer is halfway between opposite prompts"
)


def cautions(
    metrics: Iterable[Metric], rows: Iterable[Row], references: Iterable[WorldName], paired: bool
) -> Iterator[str]:
    """Notes for a plan.

    Args:
        metrics: What is read.
        rows: The recorded rows.
        references: Worlds that have no run.
        paired: Whether the pairs have corrupted prompts.
    """
    metrics, without = tuple(metrics), frozenset(references)
    bounded = [m.name for m in metrics if m.unit == "probability"]
    if bounded:
        yield f"{', '.join(bounded)}: {PROBABILITY}"
    differences = [m.name for m in metrics if m.parts == ("answer", "wrong")]
    if paired and differences and any(_takes_away(row, without) for row in rows):
        yield f"{', '.join(differences)}: {HALFWAY}"


def _takes_away(row: Row, references: frozenset[WorldName]) -> bool:
    return bool(row.edits) and all(_replaces(edit, references) for edit in row.edits)


def _replaces(edit: Edit, references: frozenset[WorldName]) -> bool:
    """Whether what was there is replaced by something that is neither run's."""
    total = None if edit.add else summed(edit.source)
    return total is not None and all(value.world in references for _, value in total.values)
