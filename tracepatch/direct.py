"""Direct logit attribution: what each writer to the stream brings to the metric by itself, past all in between."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.errors import MetricError, RecipeError
from tracepatch.layout import Key
from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model, require_ready, require_weights
from tracepatch.plan import Group
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching
from tracepatch.results import origin, pair_coords
from tracepatch.sides import Op, Sides
from tracepatch.slopes import Slopes
from tracepatch.sources import WorldName


def direct_attribution(
    model: Model,
    pairs: Pairs,
    metric: Metrics = logit_diff,
    *,
    world: WorldName = "clean",
    memory: int | None = None,
) -> xr.Dataset:
    """Splits the metric of a run into what each writer brings through the final norm and the unembedding.

    The value of a writer, summed over positions, times the metric's gradient by the last stream, with what the final
    norm divides by held at that run's own. For a metric that is linear in the logits, such as the logit difference,
    the shares sum to the metric; under a softcap of the logits they are shares of its tangent.

    Args:
        model: From ``tp.load``.
        pairs: The prompts; corrupted ones are not needed for ``world="clean"``.
        metric: What is read of the logits, and differentiated.
        world: ``"clean"`` or ``"corrupted"``: the run.
        memory: Bytes that may be taken.

    Returns:
        A dataset by (metric,) ``pair`` and ``writer``. ``share``, in the metric's unit: of the stream that enters the
        first block ("embed"), of each head ("L0H3", without the output bias; under a post-norm with that norm's scale
        held), of each attention's bias ("L0 bias", where it has one) or of attention as a whole where it has no heads
        of its own ("L0 attention"), of each MLP ("MLP 0"), and of the "final biases", those of the last norm and the
        unembedding, which is what the others leave. ``value`` is the metric. Writers carry ``component``, ``layer`` and
        ``head`` (-1 where there is none).

    Raises:
        MetricError: A metric reads an activation.
        ComponentError: The contribution of some layer is not proved.
    """
    require_ready(model)
    require_weights(model)
    began = time.perf_counter()
    p = Patching(model, pairs, metric, memory=memory)
    if p.seen:
        raise MetricError(f"Direct logit attribution is of metrics that read logits; one reads {p.seen[0]}.")
    if world not in ("clean", "corrupted"):
        raise RecipeError(f"world is 'clean' or 'corrupted', not {world!r}.")
    p.encoded.world(world)
    architecture, top = p.architecture, ("resid_pre", len(p.architecture))
    writers = writers_of(architecture)
    keys = list(dict.fromkeys(key for key, _ in writers))
    keys += [("attn_out", layer) for layer in range(len(architecture)) if ("head_out", layer) in keys]
    compared = any(need in ("clean", "corrupted") for m in p.metrics for need in m.needs)
    worlds = ("clean", "corrupted")[: 2 if p.encoded.corrupted else 1] if compared else (world,)
    sides = Sides(model, architecture, p.encoded, p.metrics, worlds, wanted=[*keys, top], memory=memory)
    held = frozenset({("logits_in_scale", 0)}) if architecture.offers("logits_in_scale", 0) else frozenset()
    slopes = Slopes(architecture, held)
    count = len(p.metrics)
    shares = np.full((count, len(p.encoded), len(writers) + 1), np.nan)
    values = np.full((count, len(p.encoded)), np.nan)

    def build(group: Group) -> list[Op]:
        ops = sides.known(group, keys)
        ops.append(sides.backward(group, world, slopes, [top], values=False))
        settled = sides.settled(group, world, keys)
        given = tuple((("value", world, *key), ("number", 0.0)) for key in keys)
        products = (("edges", given, (("gradient", world, n, *top),), False) for n in range(count))
        return [*ops, (("contract", (settled, *products)), None)]

    def read(group: Group, ops: list[Op], found: list[Any]) -> None:
        for job, scores in sides.values(ops, found):
            if job.base == world:
                values[:, job.pair] = scores
        for number, result in enumerate(found[-1][1:]):
            parts = -result[..., 0].double().numpy()  # [row, part]; differences to 0 are minus the values
            shares[number, list(group.pairs), :-1] = _gathered(architecture, keys, writers, parts)

    sides.take(sides.groups([*keys, top]), build, read, eager=False)
    shares[..., -1] = values - shares[..., :-1].sum(-1)
    attrs = {
        **origin(model, p.encoded, {}),
        "base": world,
        "estimator": "direct logit attribution, the final norm's scale held",
        "cost": sides.cost,
        "metrics": json.dumps({m.name: m.told for m in p.metrics}),
        "seconds": round(time.perf_counter() - began, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lead = ("metric", "pair") if count > 1 else ("pair",)
    named = [*writers, (("biases", -1), -1)]
    data = {
        "share": ((*lead, "writer"), shares if count > 1 else shares[0]),
        "value": (lead, values if count > 1 else values[0]),
    }
    coords = {
        "writer": [*(_called(key, head, writers) for key, head in writers), "final biases"],
        "component": ("writer", [key[0] for key, _ in named]),
        "layer": ("writer", [key[1] for key, _ in named]),
        "head": ("writer", [head for _, head in named]),
    }
    names = [m.name for m in p.metrics]
    dataset = xr.Dataset(data, coords | pair_coords(p.encoded), attrs)
    for variable in ("share", "value"):
        dataset[variable].attrs["units"] = ", ".join(dict.fromkeys(m.unit for m in p.metrics))
    return dataset.assign_coords(metric=names if count > 1 else names[0])


def writers_of(architecture: Architecture) -> list[tuple[Key, int]]:
    """What writes to the stream, in order: (component, layer) and head; a head of -1 where it is the whole.

    ``attn_out`` beside heads is what of it is no head's: the output bias.

    Raises:
        ComponentError: What a branch adds is not proved.
    """
    found: list[tuple[Key, int]] = [(("resid_pre", 0), -1)]
    for layer in range(len(architecture)):
        if architecture.attention(layer) is not None:
            architecture.require("attn_out", layer)
            if architecture.offers("head_out", layer):
                found += [(("head_out", layer), head) for head in range(architecture.units("head_out", layer))]
            found.append((("attn_out", layer), -1))
        if architecture.cross(layer) is not None:
            architecture.require("cross_attn_out", layer)
            found.append((("cross_attn_out", layer), -1))
        if architecture.mlp(layer) is not None:
            architecture.require("mlp_out", layer)
            found.append((("mlp_out", layer), -1))
    return found


def name_of(key: Key, head: int) -> str:
    """What to call a writer."""
    name, layer = key
    if head >= 0:
        return f"L{layer}H{head}"
    kinds = {"resid_pre": "embed", "mlp_out": f"MLP {layer}", "cross_attn_out": f"L{layer} cross-attention"}
    return kinds.get(name, f"L{layer} attention")


def _called(key: Key, head: int, writers: list[tuple[Key, int]]) -> str:
    """A writer's name; what attention adds beside its heads is its bias."""
    beside = key[0] == "attn_out" and (("head_out", key[1]), 0) in writers
    return f"L{key[1]} bias" if beside else name_of(key, head)


def _gathered(
    architecture: Architecture, keys: list[Key], writers: list[tuple[Key, int]], parts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Parts of each component, heads side by side ``[row, part]``, as shares of writers ``[row, writer]``."""
    starts, start = {}, 0
    for key in keys:
        starts[key] = start
        start += architecture.units("head_out", key[1]) if key[0] == "head_out" else 1
    columns = []
    for key, head in writers:
        column = parts[:, starts[key] + max(0, head)]
        heads = starts.get(("head_out", key[1])) if key[0] == "attn_out" else None
        if heads is not None:
            column = column - parts[:, heads : heads + architecture.units("head_out", key[1])].sum(1)
        columns.append(column)
    return np.stack(columns, 1)
