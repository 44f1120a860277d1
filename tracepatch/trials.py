"""Functions that will run inside a forward, tried on made-up values when they are recorded.

A mistake is then raised at the line that made it, and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch

from tracepatch.architecture import Architecture
from tracepatch.errors import MetricError, RecipeError, SiteError
from tracepatch.metrics import Metric
from tracepatch.portions import Features
from tracepatch.references import ReferenceWorld
from tracepatch.rows import RESERVED, EditedWorld, Row, Save
from tracepatch.sites import ALL, COMPONENTS, SPLIT_READERS, Site, component
from tracepatch.sources import Function, Part, Sum, Value, WorldName, summed

Dims: TypeAlias = tuple[tuple[str, int], ...]
"""Names and sizes, as indexing a site gives them."""
TAKEN = frozenset(
    (*RESERVED, *(dim for kind in COMPONENTS.values() for dim in (*kind.index, *kind.dims)), "name", "component")
)


def require_measure(
    metric: Metric, vocab: int, lengths: Sequence[int], shape: Callable[[Site, int], Dims | None], device: Any
) -> None:
    """Tries a metric on made-up values, of each shape that it will be given.

    Args:
        metric: The metric.
        vocab: How many logits there are.
        lengths: Of the prompts.
        shape: Dims and sizes of a site in prompts of a length, which may lack it.
        device: Where a metric of an activation is computed.

    Raises:
        MetricError: It fails, has the wrong shape, or mixes rows.
    """
    if metric.site is None:
        require_sound(metric, vocab, len(metric.positions.resolve(lengths[0]) or (0,)))
        return
    for dims in dict.fromkeys(shape(metric.site, length) for length in lengths):
        if dims is not None:
            require_sound(metric, vocab, 1, dims, device)


def require_sound(chosen: Metric, vocab: int, reads: int, dims: Dims = (), device: Any = "cpu") -> None:
    """Tries a metric on made-up logits, or on a made-up activation.

    Args:
        chosen: The metric.
        vocab: How many logits there are.
        reads: At how many positions it reads them.
        dims: Names and sizes of the activation, if it reads one.
        device: Where it will be called with that.

    Raises:
        MetricError: It raises, has the wrong shape, or mixes rows.
    """
    rows = 3
    beyond = [i for i in chosen.vocab or () if isinstance(i, int) and i >= vocab]
    if beyond:
        raise MetricError(f"Metric {chosen.name!r} reads token ids {beyond}, and the vocabulary has {vocab}.")
    vocab = len(chosen.vocab) if isinstance(chosen.vocab, tuple) else vocab
    generator = torch.Generator().manual_seed(0)
    shape = (reads, vocab) if chosen.site is None else tuple(n for _, n in dims)
    logits = torch.randn(rows, *shape, generator=generator).to(device if chosen.site else "cpu")
    everything = {
        "answer": torch.zeros(rows, 1, dtype=torch.long),
        "wrong": torch.ones(rows, 1, dtype=torch.long),
        "next": torch.zeros(rows, reads, dtype=torch.long),
        "continuation": torch.zeros(rows, reads, dtype=torch.long),
        "tokens": torch.arange(max((n for dim, n in dims if dim in ("dest", "src")), default=4)).repeat(rows, 1),
        "direct": torch.randn(rows, dict(dims).get("d_model", 1), generator=generator),
    }
    if chosen.site is None:
        everything |= dict.fromkeys(("clean", "corrupted"), logits.flip(0).log_softmax(-1))
    given = {need: everything[need].to(logits.device) for need in chosen.needs}
    try:
        found = chosen.function(logits.clone(), dict(given))
    except Exception as error:
        seen = (
            f"{[rows, vocab]} [row, vocab] (one position is read)"
            if chosen.squeezed
            else f"{[rows, reads, vocab]} [row, read, vocab]"
        )
        what = f"logits of shape {seen}" if chosen.site is None else _values(chosen.site, rows, dims)
        raise MetricError(f"Metric {chosen.name!r} fails on {what}: {type(error).__name__}: {error}") from error
    wanted = [[rows]] if not chosen.parts else [[rows, 1 + len(chosen.parts)]]
    if not isinstance(found, torch.Tensor) or list(found.shape) not in wanted:
        got = f"shape {list(found.shape)}" if isinstance(found, torch.Tensor) else repr(type(found).__name__)
        raise MetricError(
            f"Metric {chosen.name!r} must return one number a row: a tensor of shape {wanted[0]} for {rows} rows; it "
            f"returned {got}. Keep the row dim: reduce over the others only."
        )
    alone = [chosen.function(logits[i : i + 1], {k: v[i : i + 1] for k, v in given.items()}) for i in range(rows)]
    if not torch.allclose(found.float(), torch.cat(alone).float(), atol=1e-4, rtol=1e-4, equal_nan=True):
        raise MetricError(
            f"Metric {chosen.name!r} mixes rows: a row alone gives another number than among others. Each row "
            "is a run of "
            f"its own; reduce over {'positions and vocabulary' if chosen.site is None else 'the other dims'} only."
        )


def _values(site: Site, rows: int, dims: Dims) -> str:
    return f"values of {site}, [{', '.join(f'{dim} {n}' for dim, n in (('row', rows), *dims))}]"


def require_result(source: Function, site: Site, dims: Dims) -> None:
    """Refuses a function whose result cannot be written at a site of this shape.

    Raises:
        RecipeError: It fails, returns something that does not fit, or mixes rows.
    """
    shape = tuple(n for _, n in dims)
    made_up = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = _called(source.function, made_up[: source.arguments], str(source), dims)
    if not isinstance(found, torch.Tensor) or not fits(tuple(found.shape), (2, *shape)):
        raise RecipeError(
            f"{source} must return a tensor that fits {site}, [{_named(dims)}]; it returned {_described(found)}."
        )
    alone = [source.function(*(value[i : i + 1] for value in made_up[: source.arguments])) for i in range(2)]
    together = found.expand(2, *shape)
    if not all(torch.allclose(a.expand(1, *shape)[0], b, atol=1e-4) for a, b in zip(alone, together, strict=True)):
        raise RecipeError(f"{source} mixes rows: each row is a run of its own; reduce over the other dims only.")


def saved(row: Row, value: Any, reduce: Callable[..., Any] | None, name: str, shapes: Sequence[Dims]) -> Save:
    """What `p.save` records, checked.

    Args:
        row: The row that saves it.
        value: The site, as a value of the row's world.
        reduce: What is made of it before it is kept.
        name: The variable that it becomes.
        shapes: The site in prompts of each length that has it.

    Raises:
        RecipeError: The name cannot be a variable or is taken, or `reduce` fails on made-up values.
    """
    if not isinstance(value, Value):
        raise RecipeError(
            f"p.save takes a site of the row's world, such as p.{row.base}.resid_post[0, -1], not "
            f"{type(value).__name__}. Arithmetic on it goes into reduce=."
        )
    if (row.edits or row.saves) and value.world != row.base:
        raise RecipeError(
            f"A row's live values are those of the world that it edits: this row runs on {row.base}, so save "
            f"{row.base}.{value.site}. The {value.world} world as it is: a row of its own, without edits."
        )
    if not isinstance(name, str) or not name.isidentifier() or name in TAKEN or name in row.labels:
        raise RecipeError(f"{name!r} cannot be a variable's name: use a word that is neither a dim nor a label.")
    if any(save.name == name for save in row.saves):
        raise RecipeError(f"This row saves {name!r} already. Tell the two apart with name='…'.")
    if reduce is not None and not callable(reduce):
        raise RecipeError(f"reduce is a function of the live value [row, …], not {reduce!r}.")
    dims = [tuple(dim for dim, _ in shape) if reduce is None else _reduced(reduce, shape) for shape in shapes]
    if len({len(found) for found in dims}) > 1:
        raise RecipeError(f"{_name(reduce)} returns different dims for prompts of different lengths.")
    row.base = value.world
    return Save(value.world, value.site, name, dims[-1], reduce)


@lru_cache(maxsize=256)
def _reduced(reduce: Callable[..., Any], dims: Dims) -> tuple[str, ...]:
    """The dims that a function returns: the site's own where one has its size and grows with it, else ``reduced_0``.

    Raises:
        RecipeError: It fails, returns no tensor with rows in front, or mixes rows.
    """
    made_up = torch.randn(2, *(n for _, n in dims), generator=torch.Generator().manual_seed(0))
    found = _called(reduce, [made_up], _name(reduce), dims)
    if not isinstance(found, torch.Tensor) or not found.ndim or len(found) != 2:
        raise RecipeError(
            f"{_name(reduce)} must return a tensor [row, …]: it was given [{_named(dims)}] and returned "
            f"{_described(found)}. Reduce over the other dims only."
        )
    for i, together in enumerate(found):
        alone = reduce(made_up[i : i + 1])
        same = alone.shape == (1, *together.shape) and torch.allclose(
            alone[0].float(), together.float(), atol=1e-4, equal_nan=True
        )
        if not same:
            raise RecipeError(
                f"{_name(reduce)} mixes rows: each row is a run of its own; reduce over the other dims only."
            )
    shape = tuple(found.shape[1:])
    claims: list[list[str]] = [[] for _ in shape]
    for i, (dim, size) in enumerate(dims):
        wider = [n + (i == j) for j, (_, n) in enumerate(dims)]
        try:
            grown = tuple(reduce(torch.randn(2, *wider, generator=torch.Generator().manual_seed(0))).shape[1:])
        except Exception:  # made for this size, as a product with a direction is: then the dim is gone
            continue
        if len(grown) == len(shape):
            for j, n in enumerate(shape):
                if n == size and grown[j] == size + 1:
                    claims[j].append(dim)
    names = [claim[0] if len(claim) == 1 and claims.count(claim) == 1 else "" for claim in claims]
    left = iter(range(len(names)))
    return tuple(dim or f"reduced_{next(left)}" for dim in names)


def require_portion(what: str, site: Site, source: Part, add: bool, architecture: Architecture) -> Part:
    """A portion of a site, tried on vectors of its width.

    Args:
        what: The site, with its world.
        site: Where it is written.
        source: What is written.
        add: Whether it is added.
        architecture: Of the model.

    Raises:
        RecipeError: It is added, or the site has no vectors of that width, whole, in which it would be a portion.
    """
    if add:
        raise RecipeError(f"{what}: {source} says what a portion of the site becomes, so write =, and not +=.")
    total = summed(source)
    assert total is not None
    for one in (site, *(value.site for _, value in total.values)):
        kind = component(one.component)
        split = kind.dims[-1] in kind.index and not one.unit.all
        if kind.attends or kind.dims[-1] == "scale" or split:
            raise RecipeError(
                f"{what}: {source} is a portion of vectors, and {one} is not one: "
                f"{'take all of it, ' if split else ''}or pick what is written by its index."
            )
    width = architecture.width(site.component, site.layer)
    if component(site.component).unit == component(site.component).dims[-1]:
        width = architecture.units(site.component, site.layer)
    if isinstance(source.portion, Features):
        return replace(source, portion=source.portion.fitted(width))
    if source.portion.width != width:
        raise RecipeError(f"{what} has vectors of {width}, and {source} speaks of vectors of {source.portion.width}.")
    return source


def require_fit(
    site: Site,
    source: Sum,
    length: int,
    shape: Callable[[Site], Dims | None],
    references: Mapping[WorldName, ReferenceWorld],
) -> None:
    """Refuses values and tensors that do not fit a site in prompts of some length.

    Raises:
        RecipeError: With the dims of both, or with the positions that a reference lacks.
    """
    target = shape(site)
    if target is None:
        return
    for _, value in source.values:
        world = references.get(value.world)
        dims = shape(value.site if world is None or not world.over else replace(value.site, pos=ALL))
        if world is not None and dims is not None:
            dims = _given_by(world, value, length, dims)
        _require_value(site, value, length, dict(target), dims)
    if source.constant is None:
        return
    given = tuple(source.constant.tensor.shape)
    if not fits(given, tuple(n for _, n in target)):
        wanted = ", ".join(f"{dim} {n}" for dim, n in target)
        raise RecipeError(
            f"A tensor of shape {list(given)} does not fit {site}, which is [{wanted}] in prompts of {length} tokens."
        )


def _given_by(world: ReferenceWorld, value: Value, length: int, dims: Dims) -> Dims:
    """The dims of a reference's value, for prompts of some length."""
    kind = component(value.site.component)
    if kind.name == "logits" or (world.over and kind.attends):
        raise RecipeError(
            f"{value} cannot be a source: a reference has no mean of logits, and of scores and patterns none over "
            "positions. Write a tensor, or take the mean position by position."
        )
    try:
        world.located(value.site, length)
    except SiteError as error:
        raise RecipeError(f"{value} cannot be a source: {error}.") from None
    return tuple(dim for dim in dims if not (world.over and dim[0] == "pos"))


def _require_value(site: Site, value: Value, length: int, target: dict[str, int], given: Dims | None) -> None:
    if given is None:
        return
    ends = [component(s.component).dims[-1] for s in (site, value.site)]
    if "width" in ends and set(ends) <= {"width", "d_model"}:  # where the sizes agree
        given = tuple((ends[0] if dim == ends[1] else dim, n) for dim, n in given)
    elif ends[0] != ends[1]:
        raise RecipeError(f"{value} is a vector over {ends[1]} and does not fit {site}, a vector over {ends[0]}.")
    for dim, count in given:
        if count not in (1, target.get(dim, 1)):
            raise RecipeError(
                f"{value} has {count} {dim} entries and does not fit {site}, which has {target.get(dim, 1)} "
                f"(in prompts of {length} tokens)."
            )


def require_unmoved(
    site: Site,
    source: Sum,
    length: int,
    architecture: Architecture,
    references: Mapping[WorldName, ReferenceWorld],
) -> None:
    """Refuses rotated queries and keys at another position than their own.

    Raises:
        RecipeError: With what to move instead.
    """
    for _, value in source.values:
        if not {site.component, value.site.component} <= {"q", "k"} or not architecture.rotated(value.site.layer):
            continue
        here, there = site.pos.resolve(length), value.site.pos.resolve(length)
        reference = references.get(value.world)
        moved = reference is not None and reference.moves(value.site, length)
        if here and there and (here != there or moved):
            raise RecipeError(
                f"{site} cannot take {value}: this model turns queries and keys by their position, so that they mean "
                f"something else elsewhere. Move what they are made of: {site.component}_in."
            )


def require_plain(source: Sum, edited: Mapping[WorldName, EditedWorld]) -> None:
    """Refuses what single heads read in a world that edits it: it has no one value there, as it has elsewhere.

    Raises:
        RecipeError: With the world.
    """
    for _, value in source.values:
        place, world = (value.site.component, value.site.layer), edited.get(value.world)
        while world is not None:
            if place[0] in SPLIT_READERS and any((e.site.component, e.site.layer) == place for e in world.edits):
                raise RecipeError(
                    f"{value} cannot be a source: {world.name} edits {place[0]} of layer {place[1]} itself. Write the "
                    "source that it was edited with."
                )
            world = edited.get(world.of)


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to another, as arrays do."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _called(function: Callable[..., Any], values: Sequence[torch.Tensor], name: str, dims: Dims) -> Any:
    try:
        return function(*values)
    except Exception as error:
        raise RecipeError(f"{name} fails on values [{_named(dims)}]: {type(error).__name__}: {error}") from error


def _named(dims: Dims) -> str:
    return ", ".join(f"{dim} {n}" for dim, n in (("row", 2), *dims))


def _described(found: Any) -> str:
    return f"a tensor of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)


def _name(function: Any) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}(…)"
