"""What branches are made of, as rules of propagation need it: attention's linear maps, the MLP's nonlinearity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tracepatch.calls import Call, Place
from tracepatch.probe import Sublayer, close, resolution

ROTATED = "nf"  # transformers' Conv1D, whose weight is [in, out], has it


@dataclass(frozen=True)
class Projection:
    """A linear map that takes what attention reads.

    Attributes:
        place: What it gives.
        turned: Whether its weight is ``[in, out]``.
    """

    place: Place
    turned: bool


@dataclass(frozen=True)
class Nonlinearity:
    """Where an MLP is not linear.

    Attributes:
        entering: What it takes.
        leaving: What it gives.
        gated: Whether that is multiplied by a linear map of what the MLP reads, and the neurons are the product.
    """

    entering: Place
    leaving: Place
    gated: bool


def projections(calls: Mapping[str, Call], attention: Sublayer | None, rows: int) -> tuple[Projection, ...]:
    """The linear maps that take what attention reads as it is; none where there are none, or only others.

    Args:
        calls: Of the probe's forward, by name.
        attention: The branch.
        rows: Rows × positions of the probe.
    """
    if attention is None or attention.reads is None:
        return ()
    read = _passing(calls, attention.reads)
    found = []
    for call in calls.values():
        linear = type(call.module) is nn.Linear or hasattr(call.module, ROTATED)
        given = call.entering
        if linear and call.under(attention.path) and given is not None and read is not None:
            same = given.shape == read.shape and torch.equal(given, read)
            if same and call.name != attention.projection:
                found.append(Projection(call.place("output", rows), hasattr(call.module, ROTATED)))
    return tuple(found)


def nonlinearity(calls: Mapping[str, Call], mlp: Sublayer | None, rows: int) -> Nonlinearity | str:
    """Where an MLP is not linear, or why that is not known.

    Args:
        calls: Of the probe's forward, by name.
        mlp: The branch.
        rows: Rows × positions of the probe.
    """
    if mlp is None or mlp.kind == "moe" or mlp.inner is None:
        return "its MLP has no neurons of its own"
    neurons = _passing(calls, mlp.inner)
    assert neurons is not None
    tolerance = resolution(neurons.dtype)
    for call in calls.values():
        x, y = call.entering, call.leaving
        if x is None or y is None or not call.under(mlp.path) or list(call.module.parameters()):
            continue
        if x.shape != y.shape or y.shape != neurons.shape or torch.equal(x, y):
            continue
        where = call.place("input", rows), call.place("output", rows)
        if close(y, neurons, tolerance):
            return Nonlinearity(*where, gated=False)
        if any(close(y * up, neurons, tolerance) for up in _linear_parts(calls, mlp, neurons.shape[-1])):
            return Nonlinearity(*where, gated=True)
    return "its MLP's nonlinearity is no module of its own between two linear maps"


def _linear_parts(calls: Mapping[str, Call], mlp: Sublayer, width: int) -> Iterator[torch.Tensor]:
    """What linear maps inside a branch give, by so many columns."""
    for call in calls.values():
        if call.under(mlp.path) and call.leaving is not None and next(iter(call.module.parameters()), None) is not None:
            whole = call.leaving
            if whole.shape[-1] in (width, 2 * width):
                yield from whole.split(width, -1)  # type: ignore[no-untyped-call]  # torch's


def _passing(calls: Mapping[str, Call], place: Place) -> torch.Tensor | None:
    call = calls[place.path]
    values: Sequence[tuple[object, torch.Tensor]] = call.inputs if place.side == "input" else call.outputs
    key = 0 if place.key is None and place.side == "input" else place.key
    return dict(values).get(key)
