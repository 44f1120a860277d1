"""Whether a site is there in the model and the prompts at hand, and the shape of its value."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tracepatch.alignment import Side
from tracepatch.errors import SiteError, listing
from tracepatch.sites import Component, Select, Site, component


def units_of(kind: Component, layer: int, picked: Select, count: int) -> None:
    """Checks that the heads or neurons an index picks exist.

    Raises:
        SiteError: One does not exist.
    """
    if picked.all:
        return
    found = picked.resolve(count)
    if found:
        require_once(found, f"{kind.name}[{layer}, …, {picked}]", f"a layer of {count} {kind.unit}s")
    else:
        raise SiteError(
            f"{kind.name}[{layer}, …, {picked}]: layer {layer} has {count} {kind.unit}s, 0 to {count - 1} "
            f"(or -{count} to -1)."
        )


def require_once(indices: tuple[int, ...], what: str, where: str) -> None:
    """Refuses indices that are the same ones where they are counted from 0.

    Raises:
        SiteError: With the indices.
    """
    twice = sorted({i for i in indices if indices.count(i) > 1}) if len(set(indices)) < len(indices) else []
    if twice:
        raise SiteError(f"{what} names {twice} twice in {where}; an edit writes each index once.")


def require_somewhere(site: Site, sides: Sequence[Side]) -> None:
    """Refuses a site whose positions are in none of the prompts.

    Args:
        site: The place.
        sides: The prompts, one a pair.

    Raises:
        SiteError: With the positions that there are.
    """
    for picked in (site.pos, site.src):
        found = [picked.on(side) or None for side in sides]
        for side, positions in zip(sides, found, strict=True):
            require_once(positions or (), str(site), f"a prompt of {side.length} tokens")
        if not any(found):
            raise SiteError(f"{site}: {_absent(picked, sides)}")


def _absent(picked: Select, sides: Sequence[Side]) -> str:
    """Why no prompt has some positions, in words."""
    if picked.span:
        known = dict.fromkeys(name for side in sides for name, *_ in side.spans)
        if picked.span not in known:
            return f"no prompt has a span {picked.span!r}; {_spans(list(known))}"
        counts = [f"pair {i}: {len(side.span(picked.span) or ())} tokens" for i, side in enumerate(sides)]
        return f"the span {picked.span!r} has no such token in any prompt.\n{listing(counts)}"
    if picked.of:
        partners = [f"pair {i}: {_partnered(side, picked.of)}" for i, side in enumerate(sides)]
        return f"position {picked} has a partner in no pair; aligned are\n{listing(partners)}"
    lengths = sorted({side.length for side in sides})
    tokens = f"{lengths[0]} tokens" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens"
    what = f"a mask of {picked.mask} positions" if picked.mask is not None else f"position {picked}"
    counts = [f"pair {i}: {n} tokens, 0 to {n - 1} (or -{n} to -1)" for i, n in enumerate(s.length for s in sides)]
    return f"{what} is in no prompt; the prompts have {tokens}.\n{listing(counts)}"


def _spans(names: Sequence[str]) -> str:
    if names:
        return f"the spans of these pairs are {', '.join(names)}."
    return "these pairs have no spans: make them with tp.Template, or pass spans= to tp.Pairs."


def _partnered(side: Side, of: str) -> str:
    found = side.aligned if of == side.world else side.partners
    return ", ".join(map(str, sorted(found))) if found is not None else f"0 to {side.length - 1}"


@lru_cache(maxsize=1 << 14)
def shape_of(
    site: Site, side: Side, units: int, width: int, crossing: bool = False
) -> tuple[tuple[str, int], ...] | None:
    """Dims and sizes as indexing gives them; ``None`` where the prompt lacks the positions.

    Args:
        site: The place.
        side: The prompt.
        units: Heads or neurons of that layer.
        width: Size of the component's last dim.
        crossing: Whether values go from one prompt of the pair to the other; see ``Select.on``.
    """
    kind = component(site.component)
    sizes = {kind.place: len(site.pos.on(side, crossing) or ()), kind.unit: len(site.unit.resolve(units) or ())}
    if kind.attends:
        sizes["src"] = len(site.src.on(side, crossing) or ())
    if not sizes[kind.place] or sizes.get("src") == 0:
        return None
    dims = [(dim, sizes[dim]) for dim in kind.index if dim != "layer" and not site.picked(dim).scalar]
    return tuple(dims) if kind.dims[-1] in kind.index else (*dims, (kind.dims[-1], width))
