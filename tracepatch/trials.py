"""Functions that will run inside a forward, tried on made-up values when they are recorded.

A mistake is then raised at the line that made it, and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from tracepatch.alignment import Side
from tracepatch.errors import MetricError, RecipeError
from tracepatch.fitting import Dims, fits
from tracepatch.metrics import Metric
from tracepatch.rows import RESERVED, EditedWorld, Row, Save
from tracepatch.sites import COMPONENTS, SPLIT_READERS, Site
from tracepatch.sources import Function, Sum, Value, WorldName

TAKEN = frozenset(
    (*RESERVED, *(dim for kind in COMPONENTS.values() for dim in (*kind.index, *kind.dims)), "name", "component")
)


def require_measure(
    metric: Metric, vocab: int, sides: Sequence[Side], shape: Callable[[Site, Side], Dims | None], device: Any
) -> None:
    """Tries a metric on made-up values, of each shape that it will be given.

    Args:
        metric: The metric.
        vocab: How many logits there are.
        sides: The prompts.
        shape: Dims and sizes of a site in a prompt, which may lack it.
        device: Where a metric of an activation is computed.

    Raises:
        MetricError: It fails, has the wrong shape, or mixes rows.
    """
    if metric.site is None:
        require_sound(metric, vocab, len(metric.positions.on(sides[0]) or (0,)))
        return
    for dims in dict.fromkeys(shape(metric.site, side) for side in sides):
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
