"""Which positions of a pair's two prompts correspond, and where their named spans stand.

Each side of a pair counts its own tokens. Where a value goes from one prompt to the other, ``:`` means the positions
that have a partner there, and ``Aligned`` means one of them: position 5 of one prompt, its partner in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Positions: TypeAlias = tuple[int, ...]
Links: TypeAlias = tuple[tuple[int, int], ...]
"""(position in the clean prompt, its partner in the corrupted one), in the order of the clean prompt."""
Spans: TypeAlias = Mapping[str, Positions]
"""A span's name → the positions of its tokens, in one prompt."""
Way: TypeAlias = Literal["ends", "prefix", "suffix", "spans"]
WAYS: Final[tuple[Way, ...]] = ("ends", "prefix", "suffix", "spans")
END: Final = "end"  # the span that every prompt with spans has: its last token


class Aligned(int):
    """A position of one prompt that, as an index into another, means its partner there.

    Attributes:
        of: The world whose prompt is counted: ``"clean"`` or ``"corrupted"``.
    """

    of: str

    def __new__(cls, position: int, of: str) -> Aligned:
        """The position, counted from 0 in the prompt of a world."""
        found = super().__new__(cls, position)
        found.of = of
        return found

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]  # int takes one argument, this class two
        return int(self), self.of


@dataclass(frozen=True, slots=True)
class Side:
    """One prompt of a pair, as far as its positions are concerned.

    Attributes:
        world: Which: ``"clean"`` or ``"corrupted"``.
        length: Its tokens.
        aligned: The positions that have a partner in the other prompt, in the order of the clean one; ``None`` where
            every position's partner is the same position.
        partners: Their partners.
        spans: Of each span its name, its positions, and those whose partners are in the other prompt's span.
    """

    world: str
    length: int
    aligned: Positions | None = None
    partners: Positions | None = None
    spans: tuple[tuple[str, Positions, Positions], ...] = ()

    def here(self, position: int, of: str) -> int | None:
        """An aligned position of a world's prompt as one of this prompt; ``None`` if it has no partner."""
        if self.aligned is None or self.partners is None:
            return position if 0 <= position < self.length else None
        counted = self.aligned if of == self.world else self.partners
        return self.aligned[counted.index(position)] if position in counted else None

    @property
    def met(self) -> tuple[int | None, ...]:
        """The partner of each position in the other prompt, ``None`` where it has none."""
        if self.aligned is None or self.partners is None:
            return tuple(range(self.length))
        known = dict(zip(self.aligned, self.partners, strict=True))
        return tuple(known.get(position) for position in range(self.length))

    def span(self, name: str, crossing: bool = False) -> Positions | None:
        """The positions of a span; for values that cross to the other prompt, those with partners in its span."""
        return next((both if crossing else own for known, own, both in self.spans if known == name), None)


@dataclass(frozen=True, slots=True)
class Alignment:
    """The two sides of a pair."""

    clean: Side
    corrupted: Side

    def side(self, world: str) -> Side:
        """The side of the clean or the corrupted world."""
        return self.corrupted if world == "corrupted" else self.clean

    @property
    def mapped(self) -> bool:
        """Whether some position's partner is another position, or none."""
        return self.clean.aligned is not None

    @property
    def even(self) -> bool:
        """Whether the two prompts have equally many tokens."""
        return self.clean.length == self.corrupted.length


def paired(lengths: tuple[int, int], links: Links | None = None, spans: tuple[Spans, Spans] = ({}, {})) -> Alignment:
    """The alignment of two prompts.

    Args:
        lengths: Tokens of the clean and of the corrupted prompt.
        links: Their aligned positions; ``None`` where every position's partner is the same position.
        spans: Their named spans.
    """
    if links is not None and links == tuple((i, i) for i in range(lengths[0])) and lengths[0] == lengths[1]:
        links = None
    same = tuple((i, i) for i in range(min(lengths)))
    clean, corrupted = zip(*(same if links is None else links), strict=True) if links or same else ((), ())
    here = dict(zip(clean, corrupted, strict=True))
    shared = {  # of spans that both have, the positions in the clean prompt whose partners are in the other's span
        name: sorted(p for p in at if here.get(p) in spans[1].get(name, ())) for name, at in spans[0].items()
    }
    told = tuple((name, at, tuple(shared[name])) for name, at in spans[0].items())
    others = tuple((name, at, tuple(here[p] for p in shared.get(name, ()))) for name, at in spans[1].items())
    if links is None:
        return Alignment(Side("clean", lengths[0], spans=told), Side("corrupted", lengths[1], spans=others))
    return Alignment(
        Side("clean", lengths[0], clean, corrupted, told), Side("corrupted", lengths[1], corrupted, clean, others)
    )


def lengthened(pair: Alignment, by: int) -> Alignment:
    """The alignment of the same two prompts with so many more tokens at their ends, which correspond one by one."""
    clean, corrupted = pair.clean, pair.corrupted
    lengths = clean.length + by, corrupted.length + by
    links = None
    if clean.aligned is not None and clean.partners is not None:
        met = zip(clean.aligned, clean.partners, strict=True)
        links = (*met, *((clean.length + i, corrupted.length + i) for i in range(by)))
    here, there = ({name: at for name, at, _ in side.spans} for side in (clean, corrupted))
    for spans, length in zip((here, there), lengths, strict=True):
        if END in spans:
            spans[END] = (length - 1,)
    return paired(lengths, links, (here, there))


def linked(way: Way, clean: Sequence[int], corrupted: Sequence[int], spans: tuple[Spans, Spans]) -> Links | str:
    """The aligned positions of two prompts, or in a few words why there are none.

    * ``"prefix"``: both counted from the start, ``"suffix"``: both from the end, as far as the shorter one goes.
    * ``"ends"``: the tokens that both start with, and those that both end with. What stands between is aligned one by
      one where it is equally long, and has no partners where it is not.
    * ``"spans"``: each span with the one of the same name, both counted from their last token as far as the shorter one
      goes, and what stands between two spans as in ``"ends"``.

    Args:
        way: How to align.
        clean: The tokens of the clean prompt.
        corrupted: Those of the corrupted one.
        spans: Their named spans.
    """
    if way == "spans":
        return _by_spans(clean, corrupted, *spans)
    shorter = min(len(clean), len(corrupted))
    if way == "prefix":
        return tuple((i, i) for i in range(shorter))
    if way == "suffix":
        return tuple((len(clean) - i, len(corrupted) - i) for i in range(shorter, 0, -1))
    return _ends(clean, corrupted) or "the prompts share no token at either end"


def _ends(clean: Sequence[int], corrupted: Sequence[int]) -> Links:
    shorter = min(len(clean), len(corrupted))
    start = _shared(zip(clean, corrupted, strict=False))
    end = min(shorter - start, _shared(zip(reversed(clean), reversed(corrupted), strict=False)))
    if len(clean) == len(corrupted):
        end = shorter - start
    first = [(i, i) for i in range(start)]
    return (*first, *((len(clean) - i, len(corrupted) - i) for i in range(end, 0, -1)))


def _shared(tokens: Iterable[tuple[int, int]]) -> int:
    count = 0
    for one, other in tokens:
        if one != other:
            break
        count += 1
    return count


def _by_spans(clean: Sequence[int], corrupted: Sequence[int], here: Spans, there: Spans) -> Links | str:
    names = [name for name in here if name in there and name != END]
    if not names:
        return "the prompts have no spans"
    found: list[tuple[int, int]] = []
    for name in names:
        found += zip(reversed(here[name]), reversed(there[name]), strict=False)
    for which, side in enumerate((here, there)):
        taken = [p for name in names for p in side[name]]
        twice = sorted({p for p in taken if taken.count(p) > 1})
        if twice:
            prompt = ("clean", "corrupted")[which]
            return f"spans share tokens of the {prompt} prompt (position {', '.join(map(str, twice))})"
    orders = [sorted(names, key=lambda name, side=side: side[name][0]) for side in (here, there)]  # type: ignore[misc]
    if orders[0] == orders[1]:  # what stands between spans that are exchanged belongs together nowhere
        gaps = _between(orders[0], here, len(clean)), _between(orders[1], there, len(corrupted))
        for one, other in zip(*gaps, strict=True):
            links = _ends(clean[one], corrupted[other])
            found += ((a + one.start, b + other.start) for a, b in links)
    return tuple(sorted(found))


def _between(names: Sequence[str], spans: Spans, length: int) -> list[slice]:
    """What stands before, between and after spans, in order."""
    starts = [0, *(spans[name][-1] + 1 for name in names)]
    ends = [*(spans[name][0] for name in names), length]
    return [slice(start, max(start, end)) for start, end in zip(starts, ends, strict=True)]


def explicit(given: Sequence[tuple[int, int]], lengths: tuple[int, int]) -> Links | str:
    """A map of a user's, or in a few words what is wrong with it.

    Args:
        given: (clean position, corrupted position); negative ones count from the end.
        lengths: Tokens of the two prompts.
    """
    for which, world in enumerate(("clean", "corrupted")):
        length, side = lengths[which], [link[which] for link in given]
        beyond = [p for p in side if not -length <= p < length]
        if beyond:
            return f"the map has position {beyond[0]} of a {world} prompt of {length} tokens"
        counted = [p % length for p in side]
        twice = sorted({p for p in counted if counted.count(p) > 1})
        if twice:
            return f"the map has position {twice[0]} of the {world} prompt twice"
    return tuple(sorted((a % lengths[0], b % lengths[1]) for a, b in given)) or "the map is empty"
