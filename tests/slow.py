"""Recorded rows, measured the slow way: what each row says, evaluated with array indexing, one oracle forward a row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from reference import Edit, Reference
from torch import Tensor

from tracepatch.portions import Subspace
from tracepatch.prompts import Pairs
from tracepatch.rows import EditedWorld, Row
from tracepatch.sites import Select, Site, select
from tracepatch.sources import Part, summed
from tracepatch.tokens import EncodedPairs

ATTENDING = ("scores", "pattern")  # [head, dest, src]
SPLIT = ("mlp_act", "router_logits")  # [pos, unit], one number a unit


def index(select: Select) -> Any:
    """The index as the user wrote it."""
    if select.items is None:
        return slice(*select.bounds)
    return select.items[0] if select.scalar else list(select.items)


@dataclass(frozen=True)
class Sides:
    """What a test says of the two prompts of a pair, in the plainest form.

    Attributes:
        links: Clean position → corrupted position.
        spans: World → span → positions.
    """

    links: Mapping[int, int]
    spans: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    def partner(self, world: str, position: int) -> int:
        """The position of the other prompt that corresponds to one of a world's."""
        forth = self.links if world == "clean" else {b: a for a, b in self.links.items()}
        return forth[position]

    def place(self, select: Select, world: str, crossing: bool) -> Any:
        """The index into the prompt of a world that a recorded one stands for."""
        other = {"clean": "corrupted", "corrupted": "clean"}[world]
        if select.span:
            own = list(self.spans[world][select.span])
            if crossing and select.items is None and select.bounds == (None, None, None):
                there = self.spans[other][select.span]
                clean = own if world == "clean" else there
                met = [(a, b) for a, b in sorted(self.links.items()) if a in clean]
                own = [p for p, q in (m if world == "clean" else m[::-1] for m in met) if p in own and q in there]
            return within(own, select)
        if select.of:
            found = [(self.partner(select.of, p), p)[select.of == world] for p in select.items or ()]
            return found[0] if select.scalar else found
        if crossing and select.all:
            return [(a, b)[world == "corrupted"] for a, b in sorted(self.links.items())]
        return index(select)


def within(span: Sequence[int], select: Select) -> Any:
    """The tokens of a span that an index picks.

    Raises:
        IndexError: The span has none of them.
    """
    found = torch.tensor(span)[index(replace(select, span=""))].tolist()
    if found == []:
        raise IndexError(f"{span} has no {select}")
    return found


def placed(site: Site, sides: Sides | None, world: str, crossing: bool) -> Site:
    """The site with the positions of one prompt written out."""
    if sides is None:
        return site
    found = {}
    for dim in ("pos", "src"):
        at = sides.place(getattr(site, dim), world, crossing)
        found[dim] = select(at, "pos")
    return replace(site, **found)


def pick(value: Tensor, site: Site, split: bool) -> Tensor:
    """What indexing an activation [pos, (unit), …] gives at a site, with integers dropping their dim."""
    if site.component in ATTENDING:
        found = value
        for dim, picked in reversed(tuple(enumerate((site.unit, site.pos, site.src)))):
            found = found[(*[slice(None)] * dim, index(picked))]
        return found
    found = value[index(site.pos)]
    if not split:
        return found
    return found[index(site.unit)] if site.pos.scalar else found[:, index(site.unit)]


def one_name(component: str, layer: int, depth: int) -> tuple[str, int]:
    """The stream that leaves a block is the one that enters the next, whatever it is called."""
    after = layer + (component == "resid_post")
    return (
        ("resid_pre", after)
        if component == "resid_post" and after < depth
        else ("logits_in", 0)
        if component == "resid_post"
        else (component, layer)
    )


def untouched(module: Any) -> Any:
    """A copy that no trace has instrumented, with the same weights and attention."""
    config = copy.deepcopy(module.config)
    config._attn_implementation = module.config._attn_implementation
    fresh = type(module)._from_config(config, dtype=module.dtype)
    fresh.load_state_dict(module.state_dict())
    return fresh.eval()


def attending(edit: Any, site: Site, live: Tensor, value: Tensor) -> Edit:
    """The oracle's edit of scores or a pattern [head, dest, src]."""
    for dim, picked in enumerate((site.unit, site.pos, site.src)):
        value = value.unsqueeze(dim) if picked.scalar else value
    picks = (site.unit, site.pos, site.src)
    at = [torch.arange(n)[index(s)].reshape(-1).tolist() for s, n in zip(picks, live.shape, strict=True)]
    mode = "add" if edit.add else "set"
    return Edit(site.component, site.layer, value, positions=at[1], unit=at[0], sources=at[2], mode=mode)


def portioned(portion: Any, value: Tensor, live: Tensor) -> Tensor:
    """A live value with a portion of it as in a source: the textbook formula, whole matrices, one vector at a time."""
    if isinstance(portion, Subspace):
        span = portion.basis.tensor.to(live.dtype)
        return live + (value.expand_as(live) - live) @ (torch.linalg.pinv(span) @ span)
    encode, decode = coder(portion.dictionary, live.dtype)
    flat, other = live.reshape(-1, live.shape[-1]), value.expand_as(live).reshape(-1, live.shape[-1])
    out = []
    for one, given in zip(flat, other, strict=True):
        before = encode(one[None])
        after, taken = before.clone(), encode(given[None])
        chosen = torch.arange(before.shape[1])[index(portion.chosen)].reshape(-1).tolist()
        for n, i in enumerate(chosen):
            clamp = None if portion.clamp is None else portion.clamp.tensor.expand(len(chosen))[n]
            after[0, i] = taken[0, i] if clamp is None else clamp
        out.append(decode(after)[0] + one - decode(before)[0])
    return torch.stack(out).reshape(live.shape)


def coder(of: Any, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A dictionary as two functions."""
    if not of.weights:
        return of.encode, of.decode
    encoder, bias, decoder, before = (None if c is None else c.tensor.to(dtype) for c in of.weights)

    def encode(x: Tensor) -> Tensor:
        found = (x if before is None else x - before) @ encoder
        found = found if bias is None else found + bias
        if of.activation == "relu":
            return found.clamp(min=0)
        if of.activation == "jumprelu":
            return found * (found > of.parameter.tensor.to(dtype))
        least = found.sort(-1).values[:, -of.parameter, None]
        return (found * (found >= least)).clamp(min=0)

    return encode, lambda f: f @ decoder


def within_prompt(select: Select, length: int, spans: Mapping[str, Sequence[int]]) -> list[int]:
    """The positions of a prompt of a reference that an index picks; none where it lacks one of them."""
    try:
        found = within(spans[select.span], select) if select.span else torch.arange(length)[index(select)].tolist()
    except (KeyError, IndexError):
        return []
    return found if isinstance(found, list) else [found]


def counterpart(select: Select, position: int, own: list[int], length: int, there: list[int], other: int) -> int | None:
    """Where another prompt has what stands at a position of a pair's prompt; ``None`` if it does not.

    Args:
        select: The index; it counts from the start, from the end, or, in lists with both, says which is which. Tokens
            of spans are counted from the span's last one.
        position: In the pair's prompt.
        own: All that the index picks there.
        length: Tokens of the pair's prompt.
        there: What the index picks in the other prompt.
        other: Tokens of it.
    """
    if select.span:
        back = len(own) - own.index(position)
        return there[-back] if back <= len(there) else None
    if select.items is not None and len({i < 0 for i in select.items}) > 1:
        return there[own.index(position)] if there else None
    at_end = (select.bounds[0] or 0) < 0 if select.items is None else select.items[0] < 0
    found = position + other - length if at_end else position
    return found if 0 <= found < other else None


def mean_of(values: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape."""
    return torch.stack(list(values)).mean(0)


class Slow:
    """The oracle for recorded rows of one model on some pairs."""

    def __init__(
        self,
        model: Any,
        encoded: EncodedPairs,
        eager: bool = False,
        edited: Mapping[str, EditedWorld] | None = None,
        sides: Sequence[Sides] | None = None,
        references: Mapping[str, Any] | None = None,
        marks: Mapping[tuple[int, ...], Mapping[str, Sequence[int]]] | None = None,
    ) -> None:
        self.marks = marks or {}  # ids of a prompt of a reference → its spans
        self.encoded, module = encoded, untouched(model)
        self.sides = [None] * len(encoded) if sides is None else list(sides)
        self.root = {"clean": "clean", "corrupted": "corrupted"} | {w.name: w.root for w in (edited or {}).values()}
        if eager:
            module.set_attn_implementation("eager")
        sides = {"clean": encoded.clean, "corrupted": encoded.corrupted or ()}
        self.ids = {(w, i): torch.tensor(ids) for w, side in sides.items() for i, ids in enumerate(side)}
        # An encoder runs once for each prompt that it reads.
        if encoded.encoder:
            worlds = zip(sides, encoded.encoder, strict=False)
            read = {(w, i): torch.tensor(ids) for w, side in worlds for i, ids in enumerate(side)}
            self.references = {key: Reference(module, ids) for key, ids in read.items()}
        else:
            self.references = dict.fromkeys(self.ids, Reference(module))
        self.reference = next(iter(self.references.values()))
        self.values = {key: self.references[key].values(ids) for key, ids in self.ids.items()}
        self.worlds, self.module = references or {}, module
        self.prompts: dict[tuple[str, int], Any] = {}  # of references: the values of each prompt, alone
        self.standing: dict[tuple[str, int], list[Edit]] = {key: [] for key in self.ids}
        for world in (edited or {}).values():
            for pair in range(len(encoded)):
                below, here = (world.of, pair), (world.name, pair)
                self.ids[here], self.references[here] = self.ids[below], self.references[below]
                self.standing[here] = [*self.standing[below], *self.translated(world.edits, world.of, pair)]
                self.values[here] = self.references[here].values(self.ids[here], self.standing[here])

    def edits(self, row: Row, pair: int) -> list[Edit]:
        """The oracle's edits for a row."""
        return [*self.standing[row.base, pair], *self.translated(row.edits, row.base, pair)]

    def edits_but(self, row: Row, pair: int, left_out: Iterable[str]) -> list[Edit]:
        """The oracle's edits for a row, without those of some components."""
        return self.translated([e for e in row.edits if e.site.component not in left_out], row.base, pair)

    def translated(self, edits: Iterable[Any], base: str, pair: int) -> list[Edit]:
        """Recorded edits as the oracle's."""
        found = []
        for edit in edits:
            recorded, source = edit.site, summed(edit.source)
            root, sides = self.root[base], self.sides[pair]
            crossing = any(self.root[part.world] != root for _, part in source.values if part.world in self.root)
            site = placed(recorded, sides, root, crossing)
            live = self.values[base, pair][site.component, site.layer]
            split = live.ndim == 3 or site.component in SPLIT
            target = pick(live, site, split)
            value = torch.zeros_like(target)
            for factor, part in source.values:
                term = self.value(part, pair, root, crossing)
                if part.world in self.worlds and self.worlds[part.world].over and not site.pos.scalar:
                    term = term[None]
                value = value + factor * (
                    term[..., None, :] if term.ndim == target.ndim - 1 and split and term.ndim > 1 else term
                )
            if source.constant is not None:
                value = value + source.constant.tensor.to(value.dtype)
            for factor, noise in source.noise:
                unit = 1.0 if noise.unit is None else self.picks(noise.unit).std()
                value = value + factor * unit * noise.draw(f"pair {pair}, {recorded}", target.shape)
            value = value.expand(target.shape)
            if site.component in ATTENDING:
                found.append(attending(edit, site, live, value))
                continue
            if site.pos.scalar:
                value = value[None]
            if split and site.unit.scalar:
                value = value[:, None]
            at = torch.arange(len(live))[index(site.pos)].reshape(-1).tolist()
            units = torch.arange(live.shape[1])[index(site.unit)].reshape(-1).tolist() if split else None
            mode = "add" if edit.add else "set"
            if isinstance(edit.source, Part):
                mode, value = "of", partial(portioned, edit.source.portion, value)
            found.append(Edit(site.component, site.layer, value, positions=at, unit=units, mode=mode))
        return found

    def value(self, part: Any, pair: int, base: str, crossing: bool = False) -> Tensor:
        """What a value of a world, or of a reference for the prompt of ``base``, is in a pair."""
        site, place = part.site, one_name(part.site.component, part.site.layer, self.reference.layers)
        if part.world not in self.worlds:
            world = self.values[part.world, pair][place]
            there = placed(site, self.sides[pair], self.root[part.world], crossing)
            return pick(world, there, world.ndim == 3 or site.component in SPLIT)
        world = self.worlds[part.world]
        numbers = [i for i in range(len(world.ids)) if world.rows[i] == world.row_of[pair]]
        if world.over:
            found = [one for i in numbers if (one := self.picked(world, i, site)) is not None]
            return torch.cat([one[None] if site.pos.scalar else one for one in found]).mean(0)
        tables = [self.alone(world, i)[place] for i in numbers]
        if site.component not in ATTENDING:
            where = self.met(world, numbers, site.pos, pair, base, crossing)
            found = torch.stack(
                [mean_of(t[q] for t, q in zip(tables, at, strict=True) if q is not None) for at in where]
            )
            here = select(0 if site.pos.scalar else list(range(len(where))), "pos")
            return pick(found, replace(site, pos=here), found.ndim == 3 or site.component in SPLIT)
        dests, srcs = (self.met(world, numbers, picked, pair, base, crossing) for picked in (site.pos, site.src))
        cells = [
            mean_of(t[:, d, s] for t, d, s in zip(tables, dest, src, strict=True) if None not in (d, s))
            for dest in dests
            for src in srcs
        ]
        found = torch.stack(cells, -1).unflatten(-1, (len(dests), len(srcs)))[index(site.unit)]
        if site.src.scalar:
            found = found[..., 0]
        if site.pos.scalar:
            found = found.select(found.ndim - 1 - (not site.src.scalar), 0)
        return found

    def met(
        self, world: Any, numbers: list[int], picked: Select, pair: int, base: str, crossing: bool
    ) -> list[list[int | None]]:
        """For each position that an index picks in a pair's prompt, where each prompt of a reference has it."""
        length, sides = len(self.ids[base, pair]), self.sides[pair] or Sides({})
        # Arrays refuse positions that there are not.
        own, taken = (
            torch.arange(length)[sides.place(picked, base, way)].reshape(-1).tolist() for way in (False, crossing)
        )
        found = []
        for position in taken:
            each = []
            for i in numbers:
                ids = world.ids[i]
                there = within_prompt(picked, len(ids), self.marks.get(ids, {}))
                each.append(counterpart(picked, position, own, length, there, len(ids)))
            found.append(each)
        return found

    def alone(self, world: Any, number: int) -> Any:
        """The values of one prompt of a reference."""
        if (world.name, number) not in self.prompts:
            ids = torch.tensor(world.ids[number])
            runs = Reference(self.module, torch.tensor(world.encoder[number])) if world.encoder else self.reference
            self.prompts[world.name, number] = runs.values(ids)
        return self.prompts[world.name, number]

    def picked(self, world: Any, number: int, site: Site) -> Tensor | None:
        """What a site is in one prompt of a reference; ``None`` where it lacks the positions."""
        value = self.alone(world, number)[one_name(site.component, site.layer, self.reference.layers)]
        at = within_prompt(site.pos, len(world.ids[number]), self.marks.get(world.ids[number], {}))
        if not at:
            return None
        site = replace(site, pos=select(at[0] if site.pos.scalar else at, "pos"))
        return pick(value, site, value.ndim == 3 or site.component in SPLIT)

    def picks(self, unit: Any) -> Tensor:
        """All numbers of a value in all prompts of a reference."""
        world, own = self.worlds[unit.world], unit.world.removesuffix(" prompts")
        found = []
        for i in range(len(world.ids)):
            site = unit.site
            if own in self.root and self.sides[i] is not None:  # the pairs' own prompts
                try:
                    site = placed(site, self.sides[i], own, False)
                except (KeyError, IndexError):
                    continue
            found.append(self.picked(world, i, site))
        return torch.cat([one.flatten() for one in found if one is not None])

    def logits(self, row: Row, pair: int) -> Tensor:
        """The logits [pos, vocab] of a row."""
        return self.references[row.base, pair].logits(self.ids[row.base, pair], self.edits(row, pair))

    def base(self, world: str, pair: int) -> Tensor:
        """The logits [pos, vocab] of an unpatched world."""
        return self.values[world, pair]["logits", 0]

    def score(self, rows: Iterable[Row], metric: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[row, pair], with ``metric(logits [pos, vocab], pair)``."""
        return torch.stack(
            [torch.stack([metric(self.logits(r, i), i) for i in range(len(self.encoded))]) for r in rows]
        )


def gap(encoded: EncodedPairs) -> Callable[[Tensor, int], Tensor]:
    """The logit difference at the last position, written down once more."""

    def metric(logits: Tensor, pair: int) -> Tensor:
        last = logits[-1].double()
        return last[list(encoded.answer[pair])].mean() - last[list(encoded.wrong[pair])].mean()

    return metric


def made_up_pairs(words: list[str], seed: int = 0) -> Pairs:
    """Three pairs of two lengths from a model's words; tokens differ in the middle, at the start and at two places."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = [], []
    for length, differing in ((7, (4,)), (7, (0,)), (8, (2, 5))):
        ids = torch.randint(len(words), (length,), generator=generator).tolist()
        other = [(i + 5) % len(words) if p in differing else i for p, i in enumerate(ids)]
        clean.append(" ".join(words[i] for i in ids))
        corrupted.append(" ".join(words[i] for i in other))
    picks = torch.randperm(len(words), generator=generator).tolist()
    return Pairs(clean, corrupted, [words[i] for i in picks[:3]], [words[i] for i in picks[3:6]], name="made up")


def uneven_pairs(words: list[str], seed: int = 0) -> tuple[Pairs, list[Sides]]:
    """Four pairs, three of them of unequal length, aligned by maps, one of which exchanges two positions; and the maps.

    Tokens differ where nothing is aligned, and at one aligned position; the first two are shared in each pair.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = (
        {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 6: 5},  # 7 to 6
        {0: 0, 1: 1, 2: 3, 3: 4, 5: 6, 6: 7},  # 7 to 8
        {0: 0, 1: 1, 2: 4, 4: 2, 5: 5, 6: 6},  # 7 to 7, exchanged
        {0: 0, 2: 3, 3: 2, 7: 5},  # 8 to 6
    )
    clean, corrupted = [], []
    for links, (long, other) in zip(maps, ((7, 6), (7, 8), (7, 7), (8, 6)), strict=True):
        ids = torch.randint(len(words), (long,), generator=generator).tolist()
        others = [(i + 11) % len(words) for i in torch.randint(len(words), (other,), generator=generator).tolist()]
        for a, b in links.items():
            others[b] = ids[a]
        others[links.get(3, links[2])] = (ids[3] + 7) % len(words)
        others[1] = ids[1]
        clean.append(" ".join(words[i] for i in ids))
        corrupted.append(" ".join(words[i] for i in others))
    picks = torch.randperm(len(words), generator=generator).tolist()
    answers = [[words[i] for i in picks[:4]], [words[i] for i in picks[4:8]]]
    return Pairs(clean, corrupted, *answers, name="uneven", align=list(maps)), [Sides(links) for links in maps]
