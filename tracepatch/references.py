"""Prompts beside the pairs, whose values are written: the mean over them, or those of a prompt drawn from them.

A *reference world* is a source only: it has no run of its own that could be edited. Its values are tables, each row of
which is the mean over some prompts: one row for all pairs (a mean), or one for each pair (a prompt that was drawn). A
*tally* is one such table: a component of a layer, and how positions of prompts of unequal length line up.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from tracepatch.alignment import Side
from tracepatch.errors import RecipeError, SiteError, plural
from tracepatch.prompts import Pairs, revised
from tracepatch.shapes import require_somewhere
from tracepatch.sites import ALL, Select, Site, component
from tracepatch.sources import WorldName, require_draws, require_seed
from tracepatch.tokens import EncodedPairs, shown

Along: TypeAlias = Literal["start", "end"] | Select
"""How positions line up: counted from the start, from the end, or the ones that an index picks in each prompt."""


@dataclass(frozen=True)
class Reference:
    """Prompts whose values stand in for a world's, as ``mean`` and ``resample`` declare them.

    Attributes:
        prompts: Their clean side is what is run.
        over: Whether the mean is over positions too.
        seed: Of the prompts that are drawn; ``None`` for a mean over all of them.
        draws: How often a prompt is drawn for each pair, in rows of their own.
    """

    prompts: Pairs
    over: bool = False
    seed: int | None = None
    draws: int = 1

    def __str__(self) -> str:
        one = shown(self.prompts.clean[0], 30) if len(self.prompts) == 1 else "prompts"
        name = one if self.prompts.name == "pairs" else self.prompts.name
        if self.seed is not None:
            return f"resample({name}, seed={self.seed})"
        return f"mean({name}, over positions)" if self.over else f"mean({name})"


def mean(prompts: Pairs | Sequence[Any], over: Literal["positions"] | None = None) -> Reference:
    """The mean of activations over a set of prompts, as a source: ``tp.patch(…, source=tp.mean(prompts))``.

    Inside a recording it is ``p.mean(prompts)``, and indexed like a world: ``p.mean(prompts).z[5, -1, 3]``.

    Args:
        prompts: Pairs, of which the clean prompts count, or a list of prompts. Position by position the mean is over
            the prompts that have the position: counted from the start, and from the end for ``-1`` and the like. Tokens
            of a span, ``"subject"``, are those of each prompt's own, counted from the span's last one.
        over: ``"positions"``: one vector, the mean over all positions that the index picks in all prompts.

    Raises:
        RecipeError: There is no such way to take a mean.
    """
    if over not in (None, "positions"):
        raise RecipeError(f"over is 'positions', or left out for a mean position by position, not {over!r}.")
    return Reference(_pairs(prompts), over == "positions")


def resample(prompts: Pairs | Sequence[Any], seed: int = 0, draws: int = 1) -> Reference:
    """Activations of a prompt drawn from a set for each pair: ``tp.patch(…, source=tp.resample(prompts))``.

    Inside a recording it is ``p.resample(prompts)``, and indexed like a world. All sites of a pair take the values of
    one prompt. It is drawn from those that have at least as many tokens as the pair's own, and, if there are such, from
    those that also have as many in each of its named spans.

    Args:
        prompts: Pairs, of which the clean prompts count, or a list of prompts.
        seed: The same seed draws the same prompts.
        draws: How many prompts are drawn for each pair; rows are then measured once for each, with the label ``draw``.

    Raises:
        RecipeError: The seed or the number of draws is none.
    """
    return Reference(_pairs(prompts), False, require_seed("resample", seed), require_draws("resample", draws))


def _pairs(prompts: Any) -> Pairs:
    return prompts if isinstance(prompts, Pairs) else Pairs(prompts)


@dataclass(frozen=True, slots=True)
class Tally:
    """A table of a reference world: one component of one layer, ``[row, pos, …]``; or how widely its numbers spread.

    Attributes:
        world: The reference world.
        component: What is averaged.
        layer: Where.
        along: How positions (destinations, of attention's weights) line up.
        src: How the positions attended to line up; ``None`` where there are none.
        unit: Of a spread, the heads or neurons that count.
        spread: Whether it is one number: the standard deviation of all numbers at the positions and units.
    """

    world: WorldName
    component: str
    layer: int
    along: Along
    src: Along | None = None
    unit: Select = ALL
    spread: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is known by where plans run: builtins alone."""
        ways = (repr(self.along), repr(self.src), repr(self.unit))  # a span may be called "end", too
        return "tally", self.world, self.component, self.layer, *ways, self.spread


@dataclass(frozen=True)
class ReferenceWorld:
    """A reference as the model's tokens.

    Attributes:
        name: What it is called.
        ids: Per prompt, its ids; the decoder's, where an encoder reads the prompts.
        encoder: Per prompt, the ids that an encoder reads; empty where there is none.
        rows: Per prompt, the row of the tables that it counts in.
        row_of: Per pair, the row that stands for it.
        sides: Per prompt, its length and its named spans.
        over: Whether the mean is over positions too.
    """

    name: WorldName
    ids: tuple[tuple[int, ...], ...]
    encoder: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    row_of: tuple[int, ...]
    sides: tuple[Side, ...]
    over: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(map(len, self.ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    def require_positions(self, site: Site, world: str = "") -> None:
        """Refuses a site whose positions none of the prompts has.

        Raises:
            SiteError: With the positions that there are.
        """
        if not self.over:  # partners of a pair's positions are counted in the pair's prompt
            site = replace(site, pos=ALL if site.pos.of else site.pos, src=ALL if site.src.of else site.src)
        try:
            require_somewhere(site, self.sides)
        except SiteError as error:
            told = str(error).replace("pair ", "prompt ").replace("these pairs", "its prompts")
            raise SiteError(f"{self.name}.{told}") from None

    def located(
        self, site: Site, side: Side, crossing: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None, Tally]:
        """Where a site's values stand, for a prompt of a pair: places along a table's positions and sources.

        Args:
            site: As it was written.
            side: The prompt of the pair that is edited.
            crossing: Whether the edit takes values of the pair's other prompt, too; see ``Select.on``.

        Raises:
            SiteError: The pair lacks the positions, or no prompt of the reference has them.
        """
        attends = component(site.component).attends
        along, src = self._along(site.pos), self._along(site.src) if attends else None
        tally = Tally(self.name, site.component, site.layer, along, src)
        places = self._places(site, site.pos, side, crossing)
        return places, self._places(site, site.src, side, crossing) if attends else None, tally

    def require_values(self, site: Site, side: Side, crossing: bool, pairs: Sequence[int]) -> None:
        """Refuses a site that prompts of pairs take values of which no prompt that stands for them has.

        Args:
            site: As it was written.
            side: The prompt of the pairs that is edited; see ``located``.
            crossing: As there.
            pairs: Their numbers.

        Raises:
            SiteError: The pairs lack the positions, or the prompts do.
        """
        at, attended, tally = self.located(site, side, crossing)
        ways = [along for along in (tally.along, tally.src) if along is not None]
        if self.over or not any(isinstance(along, Select) for along in ways) or (len(ways), max(self.rows)) == (1, 0):
            return  # the prompt that has most of them has all
        wanted = {*itertools.product(*([at] if attended is None else [at, attended]))}
        for pair in {self.row_of[pair]: pair for pair in pairs}.values():
            own = [one for one, row in zip(self.sides, self.rows, strict=True) if row == self.row_of[pair]]
            held = {cell for one in own for cell in itertools.product(*(self.picked(way, one)[1] for way in ways))}
            if not wanted <= held:
                if len(own) < len(self.ids):
                    raise SiteError(
                        f"the prompt drawn for pair {pair} lacks some of its tokens. Prompts that have as many in all "
                        "spans of the pair are drawn first: add such ones"
                    )
                raise SiteError(
                    f"no prompt of the reference has all these destinations and sources, as a prompt of the pairs with "
                    f"{plural(side.length, 'token')} has: pick fewer"
                )

    def picked(self, along: Along, side: Side) -> tuple[list[int], list[int]]:
        """The positions of a prompt that count in a tally, and where in the table they do."""
        if isinstance(along, Select):
            here = along.on(side) or ()
            first = self.room(along) - len(here) if along.span else 0
            return list(here), [0] * len(here) if self.over else list(range(first, first + len(here)))
        length = side.length
        return list(range(length)), [p + (self.longest - length) * (along == "end") for p in range(length)]

    def room(self, along: Along) -> int:
        """How many positions a table has."""
        if self.over:
            return 1
        return max(len(along.on(side) or ()) for side in self.sides) if isinstance(along, Select) else self.longest

    def moves(self, site: Site, side: Side) -> bool:
        """Whether some value that a site of a pair's prompt takes was at another position."""
        here = site.pos.on(side)
        if self.over:
            return any((site.pos.on(own) or here) != here or len(here or ()) > 1 for own in self.sides)
        along = self._along(site.pos)
        taken = [along.on(own) or here for own in self.sides] if isinstance(along, Select) else []
        return any(found != here for found in taken) or (along == "end" and {*self.lengths} != {side.length})

    def _along(self, picked: Select) -> Along:
        if self.over or picked.span:  # each prompt its own tokens; those of a span line up by the last one
            return picked
        if picked.items is None:
            return "end" if (picked.bounds[0] or 0) < 0 else "start"
        signs = {item < 0 for item in picked.items}
        return picked if len(signs) > 1 else "end" if signs == {True} else "start"

    def _places(self, site: Site, picked: Select, side: Side, crossing: bool) -> tuple[int, ...]:
        if self.over:  # of its own prompts, whatever the pair has
            if picked.of not in ("", side.world) and side.aligned is not None:
                raise SiteError(f"{self.name}.{site} counts in {picked.of} prompts, which the mean is not of")
            return (0,)
        along, found = self._along(picked), picked.on(side, crossing)
        if not found:
            raise SiteError(str(site))
        if isinstance(along, Select):
            whole = picked.on(side) or ()  # of a span, values that cross take those tokens that are aligned
            first = self.room(along) - len(whole) if along.span else 0
            places = tuple(first + whole.index(p) for p in found)
            if min(places) < 0:
                tokens = plural(len(whole), "token")
                lacking = f"{self.name}.{site} has {self.room(along)} at most, and a prompt of the pairs has {tokens}"
                raise SiteError(f"{lacking}: take some of them, as in '{picked.span}[-1]', or a mean over positions")
            return places
        places = tuple(p + (self.longest - side.length) * (along == "end") for p in found)
        if min(places) < 0 or max(places) >= self.longest:
            raise SiteError(
                f"the longest prompt of the reference has {plural(self.longest, 'token')}, and a prompt of the pairs "
                f"has {side.length}: take longer prompts, positions that all have, or a mean over positions "
                "(over='positions')"
            )
        return places


@dataclass(frozen=True, eq=False)
class Survey:
    """The runs that make the tables of a reference world.

    Attributes:
        world: Whose.
        tallies: Its tables.
        runs: The prompts of each run, by number; those of one run have the same number of tokens.
        until: How many layers are computed, as in a plan.
    """

    world: ReferenceWorld
    tallies: tuple[Tally, ...]
    runs: tuple[tuple[int, ...], ...]
    until: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of each run the number of prompts, and their tokens."""
        return [(len(run), len(self.world.ids[run[0]])) for run in self.runs]


def encode(name: WorldName, reference: Reference, encoded: EncodedPairs, draw: int = 0) -> ReferenceWorld:
    """A reference as a world of its own.

    Args:
        name: What to call it.
        reference: As it was declared.
        encoded: The pairs at hand, whose tokenizer and BOS policy count.
        draw: Which draw it is.

    Raises:
        RecipeError: Another BOS policy was asked for than that of the pairs.
        PromptError: A prompt has no tokens, or none is long enough to stand for a pair.
    """
    given, policy = reference.prompts, encoded.bos
    asked = bool(policy.prefix) if policy.why == "you asked for it" else None
    bos = asked if given.bos is None else given.bos
    start = encoded.clean[0][0] if encoded.encoder else None
    none = ((),) * len(given)
    alone = revised(given, corrupted=None, bos=bos, answer=none, wrong=none, align=None, corruption=())
    made = revised(alone, spans=given.spans[:1]).encode(encoded.tokenizer, start)
    texts = "token ids are taken as they are" not in (policy.why, made.bos.why)
    if texts and made.bos.prefix != policy.prefix:
        raise RecipeError(
            f"{reference}: the pairs have {policy}, the reference has {made.bos}, so that positions would not line up. "
            "Give both the same bos=."
        )
    read = made.encoder[0] if made.encoder else ()
    if reference.seed is None:
        rows = (0,) * len(made), (0,) * len(encoded)
        return ReferenceWorld(name, made.clean, read, *rows, made.sides("clean"), reference.over)
    drawn = [_drawn(reference, made, encoded, pair, draw) for pair in range(len(encoded))]
    chosen = sorted(set(drawn))
    return ReferenceWorld(
        name,
        tuple(made.clean[i] for i in chosen),
        tuple(read[i] for i in chosen) if read else (),
        tuple(range(len(chosen))),
        tuple(map(chosen.index, drawn)),
        tuple(made.sides("clean")[i] for i in chosen),
    )


def _drawn(reference: Reference, made: EncodedPairs, encoded: EncodedPairs, pair: int, draw: int) -> int:
    alignment = encoded.alignments[pair]
    needed = max(alignment.clean.length, alignment.corrupted.length)
    able = [i for i, n in enumerate(made.lengths) if n >= needed]
    if not able:
        raise RecipeError(
            f"{reference}: no prompt can stand for pair {pair} ({shown(encoded.continued(pair))}), which has {needed} "
            f"tokens; the longest of the reference has {max(made.lengths)}. Add longer ones."
        )
    known = {name for side in made.sides("clean") for name, *_ in side.spans}
    spans = [one for side in (alignment.clean, alignment.corrupted) for one in side.spans if one[0] in known]
    fitting = [i for i in able if all(len(made.sides("clean")[i].span(name) or ()) >= len(at) for name, at, _ in spans)]
    return random.Random(f"{reference.seed} {draw} {pair}").choice(fitting or able)
