"""What is drawn by chance more than once: each draw is a world, or a row, of its own.

Noise and drawn prompts say how often they are drawn. A row that writes them, or stands on a world that does, is then
as many rows, told apart by the label ``draw``. Everything after the recording sees plain rows and worlds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tracepatch.errors import RecipeError
from tracepatch.references import Reference, ReferenceWorld, encode
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.sources import Part, Source, Sum, Value, WorldName, summed
from tracepatch.tokens import EncodedPairs


class Draws:
    """The draws of one recording.

    Attributes:
        edited: Its edited worlds, by name; those of further draws are added.
        references: Its reference worlds, by name; those of further draws are added.
    """

    def __init__(self, encoded: EncodedPairs) -> None:
        self.edited: dict[WorldName, EditedWorld] = {}
        self.references: dict[WorldName, ReferenceWorld] = {}
        self._encoded = encoded
        self._declared: dict[WorldName, Reference] = {}

    def reference(self, declared: Reference) -> WorldName:
        """The name of a reference's world, which is made when it is first asked for.

        Raises:
            RecipeError: It has another BOS policy than the pairs, or no prompt that can stand for one of them.
            PromptError: A prompt has no tokens.
        """
        known = next((name for name, one in self._declared.items() if one == declared), None)
        if known is not None:
            return known
        name, number = str(declared), 1
        while name in self._declared:
            number += 1
            name = f"{declared} {number}"
        self.references[name] = encode(name, declared, self._encoded)
        self._declared[name] = declared
        return name

    def prompts(self, world: WorldName) -> WorldName:
        """The name of a reference world of the clean or the corrupted prompts themselves."""
        name = f"{world} prompts"
        if name not in self.references:
            ids = self._encoded.world(world)
            read = [self._encoded.encoded(world, pair) for pair in range(len(ids) * bool(self._encoded.encoder))]
            rows = (0,) * len(ids)
            self.references[name] = ReferenceWorld(name, ids, tuple(read), rows, rows, self._encoded.sides(world))
        return name

    def count(self, base: WorldName, edits: Iterable[Edit]) -> int:
        """How often a row of a world is drawn.

        Raises:
            RecipeError: Two of its sources are drawn several times, and not equally often.
        """
        every = [edit.source for edit in edits] + [edit.source for _, edit in standing(base, self.edited)]
        counts = {n for source in every for n in self._counts(source)} - {1}
        if len(counts) > 1:
            raise RecipeError(
                f"A row takes what is drawn {' and '.join(map(str, sorted(counts)))} times: give all its sources the "
                "same draws=, or 1."
            )
        return counts.pop() if counts else 1

    def rows(self, row: Row, number: int) -> list[Row]:
        """A recorded row as one for each draw, numbered from ``number`` on; the first is the row itself.

        Raises:
            RecipeError: It has a label ``draw`` already, or takes what is drawn unequally often.
        """
        draws = self.count(row.base, row.edits)
        if draws == 1:
            return [row]
        if "draw" in row.labels:
            raise RecipeError(f"row({row.described}): draws= labels rows with draw; call your label otherwise.")
        found = [row]
        for draw in range(1, draws):
            saves = [replace(save, world=self.world(save.world, draw), labelled=None) for save in row.saves]
            edits = [self._edit(edit, draw) for edit in row.edits]
            base = self.world(row.base, draw)
            labels = {**row.labels, "draw": draw}
            found.append(Row(number + draw, labels, base, edits, row.renormalize, row.raw, saves))
        row.labels["draw"] = 0
        return found

    def world(self, name: WorldName, draw: int) -> WorldName:
        """The name of a world in one of its draws, which is made when it is first asked for."""
        if name in self._declared and self._declared[name].draws > 1 and draw:
            drawn = f"{name}, draw {draw}"
            if drawn not in self.references:
                self.references[drawn] = encode(drawn, self._declared[name], self._encoded, draw)
            return drawn
        here = self.edited.get(name)
        if here is None or draw == 0 or self.count(name, ()) == 1:
            return name
        drawn = f"{name}_draw_{draw}"
        if drawn not in self.edited:
            edits = [self._edit(edit, draw) for edit in here.edits]
            of = self.world(here.of, draw)
            self.edited[drawn] = EditedWorld(drawn, of, here.root, edits, used=True, origin=name, draw=draw)
        return drawn

    def _edit(self, edit: Edit, draw: int) -> Edit:
        source = edit.source
        if isinstance(source, Value):
            return replace(edit, source=replace(source, world=self.world(source.world, draw)))
        total = summed(source)
        if total is None:
            return edit
        values = tuple((factor, replace(v, world=self.world(v.world, draw))) for factor, v in total.values)
        noise = tuple((factor, replace(n, number=draw) if n.draws > 1 else n) for factor, n in total.noise)
        drawn = Sum(values, total.constant, noise)
        return replace(edit, source=replace(source, source=drawn) if isinstance(source, Part) else drawn)

    def _counts(self, source: Source) -> Iterable[int]:
        total = summed(source)
        if total is None:
            return
        yield from (noise.draws for _, noise in total.noise)
        for _, value in total.values:
            if value.world in self._declared:
                yield self._declared[value.world].draws
            elif value.world in self.edited:
                yield self.count(value.world, ())
