"""How a plain script takes means over prompts: these run one after the other, before everything else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tracepatch.errors import RecipeError
from tracepatch.forwards import WIDTH, Common, Forward, comment, indented
from tracepatch.references import ReferenceWorld
from tracepatch.sites import COMPONENTS, Select
from tracepatch.sources import Value, WorldName


def prompts(common: Common) -> Iterator[str]:
    """The tokens of the references' prompts that a script runs."""
    for world in _used(common):
        name = common.named(world)
        for side, ids in {"tokens": _own(common, world), "read": _own(common, world, read=True)}.items():
            if ids:
                yield f"# {world}"
                yield from textwrap.wrap(f"{name}_{side} = {ids}", WIDTH, subsequent_indent=" " * 4)


def averages(common: Common) -> Iterator[str]:
    """The lines that run the prompts and average what is taken of them.

    Raises:
        RecipeError: A mean that no script is written for.
    """
    for world in _used(common):
        name, count = common.named(world), len(_own(common, world))
        taken = [value for value, _ in common.averages if value.world == world]
        kept = {common.kept(world, v.site.component, v.site.layer): None for v in taken}
        yield from comment(f"{world}: {count} prompts, one after the other.", WIDTH - 4)
        yield f"{', '.join(f'{variable}_each' for variable in kept)} = {', '.join('[]' for _ in kept)}"
        pair = f"for read, ids in zip({name}_read, {name}_tokens):" if common.encoded.encoder else ""
        yield pair or f"for ids in {name}_tokens:"
        yield from indented(["ids_tokens = torch.tensor([ids])"])
        yield from indented(["ids_read = torch.tensor([read])"] if pair else [])
        yield from indented([*Forward(common, world, []).lines(), *(f"{v}_each.append({v})" for v in kept)])
    for (value, spread), variable in common.averages.items():
        yield f"{variable} = {_averaged(common, value, spread)}  # {value}"


def _averaged(common: Common, value: Value, spread: bool) -> str:
    world, site = common.references[value.world], value.site
    own = _numbers(common, world)
    having = [i for i, n in enumerate(own) if site.pos.resolve(len(world.ids[n])) is not None]
    found = f"{common.kept(value.world, site.component, site.layer)}_each"
    each = f"for v in {found}" if len(having) == len(own) else f"for v in [{found}[i] for i in {having}]"
    if spread:
        units = f"[:, {_index(site.unit)}]" if not site.unit.all else ""
        return f"torch.cat([v[0, {_index(site.pos)}]{units}.flatten() {each}]).std()"
    if COMPONENTS[site.component].attends:
        return _of_weights(common, world, value, each)
    picked = f"[v[0, {_index(site.pos)}] {each}]"
    if world.over:
        return f"torch.cat({picked}).mean(0, keepdim=True)"
    counts = {len(site.pos.resolve(len(world.ids[own[i]])) or ()) for i in having}
    wanted, at_end = len(site.pos.resolve(common.side(common.row.base).length) or ()), (site.pos.bounds[0] or 0) < 0
    cut = "" if counts == {wanted} else f"[-{wanted}:]" if at_end else f"[:{wanted}]"
    if len(counts) == 1:
        return f"torch.stack({picked}).mean(0){cut}"
    side = ', padding_side="left"' if at_end else ""
    padded = f"torch.nn.utils.rnn.pad_sequence({picked}, batch_first=True, padding_value=torch.nan{side})"
    return f"{padded}.nanmean(0){cut}"


def _of_weights(common: Common, world: ReferenceWorld, value: Value, each: str) -> str:
    site, lengths = value.site, {len(world.ids[n]) for n in _numbers(common, world)}
    if len(lengths | {common.side(common.row.base).length}) > 1 and not (site.pos.items and site.src.items):
        raise RecipeError(
            f"No script is written for {value}: the mean of attention's weights over prompts of unequal length. Take a "
            "reference of prompts as long as the pair's."
        )
    return f"torch.stack([v[0][:, {_index(site.pos)}][:, :, {_index(site.src)}] {each}]).mean(0)"


def _index(picked: Select) -> str:
    """As it was written, with its dim."""
    return str(picked) if picked.items is None else str(list(picked.items))


def _used(common: Common) -> dict[WorldName, None]:
    return dict.fromkeys(value.world for value, _ in common.averages)


def _numbers(common: Common, world: ReferenceWorld) -> list[int]:
    """The prompts that count for the pair."""
    return [n for n, row in enumerate(world.rows) if row == world.row_of[common.pair]]


def _own(common: Common, name: WorldName, read: bool = False) -> list[list[int]]:
    world = common.references[name]
    ids = world.encoder if read else world.ids
    return [list(ids[n]) for n in _numbers(common, world) if ids]
