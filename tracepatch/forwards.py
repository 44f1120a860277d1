"""The forwards of a script, line by line: what is edited and what is kept, each where it passes by.

Unpatched runs, edited worlds and the patched row are all written by the same code; they differ in their edits.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TypeAlias

from tracepatch.alignment import Side
from tracepatch.architecture import Architecture
from tracepatch.constants import Constant
from tracepatch.literals import along, joined, literal, number, plus
from tracepatch.references import ReferenceWorld
from tracepatch.rows import Edit, EditedWorld, Row, standing
from tracepatch.shapes import shape_of
from tracepatch.sites import COMPONENTS, SPLIT_READERS, STAGES, Site
from tracepatch.sources import Function, Noise, Part, Sum, Value, WorldName, summed
from tracepatch.spelling import STOPS, Spot
from tracepatch.tokens import EncodedPairs

WIDTH = 120
INLINE = 8  # numbers of a tensor that are written out
NAMED = 3  # positions whose tokens are named beside an edit
PRISTINE: tuple[WorldName, ...] = ("clean", "corrupted")
Key: TypeAlias = tuple[str, int]
Visit: TypeAlias = tuple[tuple[float, int, int, int], tuple[str, ...]]
"""Lines of a trace with their moment: what passes by is taken as it was, then edited, then taken as it is."""


@dataclass
class Common:
    """What the forwards of one script share.

    Attributes:
        row: What is patched.
        pair: Number of the pair.
        architecture: Where the components live.
        encoded: The pairs.
        edited: The edited worlds.
        parameters: What has to be passed to the script, with what a user passes.
        wanted: World → the values that are taken from it.
        defines: Functions that the lines call.
        references: The reference worlds.
        averages: What is taken of them: a value, and whether it is the spread of its numbers → its variable.
    """

    row: Row
    pair: int
    architecture: Architecture
    encoded: EncodedPairs
    edited: dict[WorldName, EditedWorld]
    parameters: dict[str, str] = field(default_factory=dict)
    wanted: dict[WorldName, dict[Key, None]] = field(default_factory=lambda: defaultdict(dict))
    defines: dict[str, None] = field(default_factory=dict)
    references: dict[WorldName, ReferenceWorld] = field(default_factory=dict)
    averages: dict[tuple[Value, bool], str] = field(default_factory=dict)

    def side(self, world: WorldName) -> Side:
        """The positions of a world's prompt."""
        return self.encoded.alignments[self.pair].side(self.root(world))

    def crosses(self, edit: Edit, world: WorldName) -> bool:
        """Whether an edit of a world takes values of the other prompt."""
        if isinstance(edit.source, Function):
            return edit.source.arguments > 1
        total = summed(edit.source) or Sum((), None)
        worlds = {value.world for _, value in total.values} - {*self.references}
        return any(self.root(other) != self.root(world) for other in worlds)

    def root(self, world: WorldName) -> WorldName:
        """The world whose prompts it runs on."""
        return self.edited[world].root if world in self.edited else world

    def standing(self, world: WorldName) -> list[tuple[WorldName, Edit]]:
        """The edits that always happen in a world, each with the world that it is an edit of."""
        return standing(world, self.edited)

    def kept(self, world: WorldName, name: str, layer: int) -> str:
        """The variable with a value of another run, which is taken from now on."""
        self.wanted[world][name, layer] = None
        return f"{self.named(world)}_{name}" + (f"_{layer}" if COMPONENTS[name].layered else "")

    def named(self, world: WorldName) -> str:
        """A world in the names of variables."""
        return f"reference_{list(self.references).index(world)}" if world in self.references else world

    def averaged(self, value: Value, spread: bool = False) -> str:
        """The variable with the mean of a reference's value, all its units, or with the spread of its numbers."""
        word = "std" if spread else "mean"
        return self.averages.setdefault((value, spread), f"{word}_{len(self.averages)}")

    def passed(self, owner: WorldName, what: str) -> str:
        """The parameter for what the edits of the row (or of a world, the owner) hold and cannot be written down."""
        name = f"{owner}_{what}" if owner else what
        self.parameters[name] = f"p.edited['{owner}'].{what}" if owner else f"p.rows[{self.row.number}].{what}"
        return name

    def edits_of(self, owner: WorldName) -> list[Edit]:
        """Those of the row, or of a world."""
        return self.edited[owner].edits if owner else self.row.edits


class Forward:
    """One run of a world with edits, in the making."""

    def __init__(self, common: Common, world: WorldName, edits: list[tuple[WorldName, Edit]]) -> None:
        self.common, self.architecture, self.world = common, common.architecture, world
        self.here = common.side(world)
        self.groups: dict[Key, list[tuple[WorldName, Edit]]] = {}
        for owner, edit in edits:
            self.groups.setdefault((edit.site.component, edit.site.layer), []).append((owner, edit))
        self.shadows = {key: self._shadows(edits) for key, edits in self.groups.items() if key[0] in SPLIT_READERS}
        self.rows = 1  # of the batch
        for (name, layer), found in self.shadows.items():
            before = sum(len(f) for (n, i), f in self.shadows.items() if i == layer and STAGES[n] < STAGES[name])
            self.shadows[name, layer] = [(row + before, heads) for row, heads in found]
            self.rows = max(self.rows, 1 + before + len(found))

    def lines(self, last: str = "", seen: Site | None = None) -> list[str]:
        """The trace, with what other forwards want of it, or the site that a metric reads, and the line at its end."""
        visits: dict[Visit, None] = {}
        live = None if seen is None else (seen.component, seen.layer)
        wanted = self.common.wanted[self.world] if not last else {}
        for name, layer in {**self.groups, **wanted, **({} if live is None else {live: None})}:
            edits = self.groups.get((name, layer), [])
            shadows = tuple(self.shadows.get((name, layer), ()))
            stop = STOPS[name](Spot(self.architecture, name, layer, self.rows, bool(edits), shadows))
            self.common.defines |= dict.fromkeys(stop.defines)
            visits |= {((order, -1, 0, STAGES[name]), lines): None for order, lines in stop.first}
            visits |= {((order, 1, 0, 0), lines): None for order, lines in stop.asides}
            lines = list(stop.before)
            value = stop.value
            if edits:
                lines.append(f"{name} = {value}  # [{stop.dims}]")
                lines += [line for owner, edit in edits for line in self._edit(owner, edit, stop.after)]
                value = f"{name}.clone()"
            if (name, layer) in wanted:
                lines.append(f"{self.common.kept(self.world, name, layer)} = nnsight.save({value})")
            if (name, layer) == live:
                saved = f"{_live(name, layer)} = nnsight.save({stop.value if stop.passes else value})"
                if stop.passes:  # after all that is edited at its place
                    visits[(stop.order, 1, 0, 0), (*stop.before, saved)] = None
                else:
                    lines.append(saved)
            if edits:
                lines += stop.back
            late = len(self.architecture) if name.startswith("logits") else layer
            visits[(stop.order, 0, late, STAGES[name]), tuple(lines)] = None
        if last:
            visits[(float("inf"), 1, 0, 0), (last,)] = None
        alone = self.world in self.common.references
        ids = "ids_tokens" if alone else f"{self.common.root(self.world)}_tokens"
        ids += f".repeat({self.rows}, 1)" if self.rows > 1 else ""
        found = [line for _, part in sorted(visits, key=lambda visit: visit[0]) for line in part]
        given = f"input_ids={ids}"
        if self.common.encoded.encoder:
            read = ids.replace("_tokens", "_read")
            given = f"input_ids={read}, decoder_input_ids={ids}"
        return [f"with torch.no_grad(), model.trace({given}, use_cache=False):", *indented(found)]

    def live(self, site: Site) -> str:
        """What a metric reads, with the row in front."""
        name = _live(site.component, site.layer)
        parts = self._weight_parts(site, self.here) if COMPONENTS[site.component].attends else []
        if not any(part.startswith("[") for part in parts):
            return f"{name}[{self._index(site, self.here, rows=':1')}]"
        head, dest, src = parts  # one after the other: beside a list a number would change the order of dims
        return f"{name}[:1, ..., {src}][:, :, {dest}][:, {head}]"

    def _shadows(self, edits: list[tuple[WorldName, Edit]]) -> list[tuple[int, tuple[int, ...]]]:
        """Rows of the batch from 1 on, with the heads that read the same stream in each."""
        site = edits[0][1].site
        count, alike = self.architecture.units(site.component, site.layer), defaultdict(list)
        same = [self._same_for_heads(edit) for _, edit in edits]
        for unit in range(count):
            touching = [i for i, (_, e) in enumerate(edits) if unit in (e.site.unit.resolve(count) or ())]
            if touching:
                alike[tuple((i, None if same[i] else unit) for i in touching)].append(unit)
        return [(row, tuple(units)) for row, units in enumerate(alike.values(), 1)]

    def _same_for_heads(self, edit: Edit) -> bool:
        """Whether every head is made to read the same."""
        if isinstance(edit.source, Function):
            return False
        source = summed(edit.source) or Sum((), None)
        sites = [v.site for _, v in source.values if v.site.component not in SPLIT_READERS]
        one = [len(s.unit.resolve(self.architecture.units(s.component, s.layer)) or (0,)) == 1 for s in sites]
        tensor = edit.tensor
        return all(one) and not source.noise and (tensor is None or tensor.ndim < 2 or tensor.shape[-2] == 1)

    # ------------------------------------------------------------------------------------------------ one edit

    def _edit(self, owner: WorldName, edit: Edit, after: tuple[str, ...]) -> list[str]:
        site, source, name = edit.site, edit.source, edit.site.component
        common, crossing, about = self.common, self.common.crosses(edit, self.world), ""
        positions = site.pos.on(self.here, crossing) or ()
        ids = common.encoded.world(common.root(self.world))[common.pair]
        if len(positions) <= NAMED:
            words = common.encoded.words(ids[p] for p in positions)
            about = ": " + ", ".join(f"position {p} is {w!r}" for p, w in zip(positions, words, strict=True))
        one = ":" if self.rows == 1 else ":1"
        # Rows from which heads' queries, keys or values are taken divide by what the run itself does.
        together = name == "attn_in_scale" and any(layer == site.layer for _, layer in self.shadows)
        rows = one if together or isinstance(source, Function) else "0"
        live = self._index(site, self.here, crossing, rows)
        cells = self._index(site, self.here, crossing, ":") if together else live
        made = (
            self._made(owner, edit, source, live) if isinstance(source, Function) else self._sum(owner, edit, crossing)
        )
        if isinstance(source, Part):
            own = [e for e in common.edits_of(owner) if isinstance(e.source, Part)]
            which = [e is edit for e in own].index(True)
            made = f"{common.passed(owner, 'portions')}[{which}]({name}[{live}], {made})"
        if together and edit.add:
            made = f"{name}[{live}] + {made}"
        lines = [f"{name}[{cells}] {'+=' if edit.add and not together else '='} {made}", *after]
        if edit.renormalize:
            at = joined("0", self._weight_parts(site, self.here, crossing)[:2])
            lines = ["kept = pattern.sum(-1, keepdim=True)", *lines]
            lines.append(f"pattern[{at}] *= (kept / pattern.sum(-1, keepdim=True))[{at}]")
        return [*comment(f"{owner}{': ' if owner else ''}{written(edit)}{about}", WIDTH - 8), *lines]

    def _made(self, owner: WorldName, edit: Edit, source: Function, cells: str) -> str:
        """A call of a function with the live value, or with the worlds' as well; rows in front."""
        common, site = self.common, edit.site
        own = [e for e in common.edits_of(owner) if isinstance(e.source, Function)]
        which = [e is edit for e in own].index(True)
        values = [
            "None"
            if world == "corrupted" and common.encoded.corrupted is None
            else f"{common.kept(world, site.component, site.layer)}[{self._index(site, common.side(world), True, ':')}]"
            for world in PRISTINE[: source.arguments - 1]
        ]
        return f"{common.passed(owner, 'functions')}[{which}]({', '.join([f'{site.component}[{cells}]', *values])})"

    def _sum(self, owner: WorldName, edit: Edit, crossing: bool) -> str:
        source, found = summed(edit.source) or Sum((), None), ""
        for factor, value in source.values:
            term = self._value(value, edit.site, crossing)
            found = plus(found, factor, term if abs(factor) == 1 else f"{number(abs(factor))} * {term}")
        for factor, noise in source.noise:
            unit = "" if noise.unit is None else f" * {self.common.averaged(noise.unit, spread=True)}"
            drawn = self._noise(abs(factor), noise, edit.site, crossing) + unit
            found = plus(found, factor * noise.scale, drawn)
        return found if source.constant is None else self._plus_constant(found, source.constant, owner, edit)

    def _value(self, value: Value, target: Site, crossing: bool) -> str:
        if value.world in self.common.references:
            cells = self._in_line(value.site, target, self.here, False, self.common.references[value.world])
            return f"{self.common.averaged(value)}[{cells}]"
        kept = self.common.kept(value.world, value.site.component, value.site.layer)
        there = self.common.side(value.world), crossing
        same = value.site == target
        return f"{kept}[{self._index(target, *there) if same else self._in_line(value.site, target, *there)}]"

    def _noise(self, factor: float, noise: Noise, site: Site, crossing: bool) -> str:
        """The same numbers, drawn again."""
        name, layer = site.component, site.layer
        units, width = self.architecture.units(name, layer), self.architecture.width(name, layer)
        shape = [size for _, size in shape_of(site, self.here, units, width, crossing) or ()]
        seed = noise.seed_at(f"pair {self.common.pair}, {site}", shape)
        sizes = ", ".join(map(str, shape)) or "()"
        drawn = f"torch.randn({sizes}, generator=torch.Generator().manual_seed({seed})).to({name})"
        return f"{number(factor * noise.scale)} * {drawn}"

    def _plus_constant(self, found: str, constant: Constant, owner: WorldName, edit: Edit) -> str:
        tensor, name = constant.tensor, edit.site.component
        if not tensor.shape:
            return plus(found, float(tensor), number(abs(float(tensor)))) if tensor or not found else found
        if tensor.numel() <= INLINE:
            return plus(found, 1, f"{name}.new_tensor({literal(tensor.tolist())})")
        which = [e is edit for e in self.common.edits_of(owner) if e.tensor is not None].index(True)
        return plus(found, 1, f"{self.common.passed(owner, 'tensors')}[{which}].to({name})")

    # ------------------------------------------------------------------------------------------------ indices

    def _index(self, site: Site, side: Side, crossing: bool = False, rows: str = "0") -> str:
        """A site's cells in a prompt, with the dims that the recorded index gives."""
        if COMPONENTS[site.component].attends:
            return joined(rows, self._weight_parts(site, side, crossing))
        parts = [along(site.pos.on(side, crossing) or (), site.pos.scalar, side.length)]
        if COMPONENTS[site.component].unit:
            parts.append(self._units(site, site.unit.scalar))
        return joined(rows, parts)

    def _weight_parts(self, site: Site, side: Side, crossing: bool = False, like: Site | None = None) -> list[str]:
        """Heads, destinations and sources, with the dims of another site that they are to line up with."""
        count, like, length = self.architecture.units(site.component, site.layer), like or site, side.length
        found = [
            (site.unit.resolve(count) or (), like.unit.scalar, count),
            (site.pos.on(side, crossing) or (), like.pos.scalar, length),
            (site.src.on(side, crossing) or (), like.src.scalar, length),
        ]
        parts = [along(*f) for f in found]
        if sum(part.startswith("[") for part in parts) > 1:  # a slice between lists would change the order of dims
            parts = [p if scalar else str(list(indices)) for p, (indices, scalar, _) in zip(parts, found, strict=True)]
        return parts

    def _in_line(self, site: Site, target: Site, side: Side, crossing: bool, mean: ReferenceWorld | None = None) -> str:
        """A source's cells with its dims in line with the target's; single ones are left out, or broadcast.

        A mean has just the positions that are taken, and all units.
        """
        if COMPONENTS[site.component].attends:
            parts = self._weight_parts(site, side, crossing, target)
            if mean is None:
                return joined("0", parts)
            return joined(parts[0], ["0" if select.scalar else ":" for select in (target.pos, target.src)])
        positions = site.pos.on(side, crossing) or ()
        several = len(positions) > 1 and not (mean and mean.over)
        # Where the target has several heads, a dim for them has to stand behind the positions.
        behind = COMPONENTS[target.component].unit is not None and not target.unit.scalar and several
        parts = [along(positions, not several, side.length) if mean is None else ":" if several else "0"]
        if COMPONENTS[site.component].unit:
            count = self.architecture.units(site.component, site.layer)
            parts.append(self._units(site, len(site.unit.resolve(count) or ()) == 1 and not behind))
        elif behind:
            parts.append("None")
        return joined("0", parts) if mean is None else joined(parts[0], parts[1:])

    def _units(self, site: Site, scalar: bool) -> str:
        count = self.architecture.units(site.component, site.layer)
        return along(site.unit.resolve(count) or (), scalar, count)


# ------------------------------------------------------------------------------------------------------ pieces of text


def _live(name: str, layer: int) -> str:
    return f"live_{name}" + (f"_{layer}" if COMPONENTS[name].layered else "")


def written(edit: Edit) -> str:
    """An edit as recorded, in plain letters."""
    return safe(str(edit)).replace("·", " * ").replace("…", "...")


def safe(text: str) -> str:
    """A name in one line that ends no string."""
    return " ".join(text.splitlines()).replace("\\", "/").replace('"', "'")


def comment(text: str, width: int = WIDTH) -> list[str]:
    """Comment lines."""
    lines = textwrap.wrap(text, width - 2, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def indented(lines: list[str]) -> list[str]:
    """Lines one step further in."""
    return ["    " + line if line else "" for line in lines]
