"""A forward whose metrics are differentiated: values and gradients of components, kept where the model runs.

As in ``trace``, nothing is decided, and there are no decorators, classes or imports of our own but of what ships with
it. A component's gradient is of one world's run, by the component as it is defined, whatever stands at its place: by
what one reader alone reads of the stream, by the stream between attention and MLP with both its ways, by one head's
write.
"""

from __future__ import annotations

from typing import Any

import nnsight
import torch

from tracepatch.contractions import products, written
from tracepatch.differences import of_worlds
from tracepatch.heads import back_to_stream
from tracepatch.norms import divided, module_at, post_weight, pulled_back, wide
from tracepatch.taps import shaped
from tracepatch.trace import climbed, entered, home, scored
from tracepatch.writing import head_write

MOVED = "a tensor was changed in place after it had passed by"


def backward(model: Any, run: tuple[Any, ...], known: dict[Any, Any], asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """One traced forward, and a backward for each metric.

    Args:
        model: The nnsight model.
        run: As ``trace.forward`` takes it, of whole prompts, with tasks of ``taps`` at its places.
        known: Is given ``("value", world, component, layer)`` and ``("gradient", world, metric, component, layer)``,
            ``[row, pos, …]``; with ``drops``, ``("dropped", world, metric, drop, component, layer)`` too.
        asked: Seven things: what to call the world; ``((component, layer), how)`` for each that is wanted, see
            ``found_at``; which columns of the metrics are differentiated; the taps whose gradients are zeroed
            together, once for each of several further backwards; whether values are wanted; where rows are steps of
            an integral, how many there are of each pair, and the weight of their sum, which is added to what is known,
            or ``None``; and the edges whose estimates are wanted, see ``edges_at``, or ``None``. They become known as
            ``("edges", world, metric)``.

    Returns:
        The metrics' values ``[row, column]``.

    Raises:
        RuntimeError: With ``MOVED``: the model changes a tapped tensor in place, so that taps must be copies.
    """
    found, scores = traced(model, run, known, asked)
    for key, value in found.items():
        if asked[5] is None or key[0] == "edges":
            known[key] = value
            continue
        steps, weight = asked[5]
        total = value.unflatten(0, (-1, steps)).sum(1) * weight
        known[key] = known[key] + total if key in known else total
    return (scores,)


def traced(model: Any, run: tuple[Any, ...], known: dict[Any, Any], asked: tuple[Any, ...]) -> Any:
    """The traced forward, and what its body returns."""
    inputs, stops, top, logit_edits, measures, keep_logits, *_ = run
    given = {name: value.to(home(model)) for name, value in inputs.items()}
    entered(model, stops)
    with model.trace(**given, use_cache=False):
        result = nnsight.save(differentiated(model, stops, dict(known), top, logit_edits, measures, keep_logits, asked))
    return result


def differentiated(
    model: Any,
    stops: tuple[Any, ...],
    known: dict[Any, torch.Tensor],
    top: tuple[Any, ...],
    logit_edits: tuple[Any, ...],
    measures: tuple[Any, ...],
    keep_logits: tuple[Any, ...],
    asked: tuple[Any, ...],
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """The body of the trace."""
    world, wanted, columns, drops, values, steps, edges = asked
    kept: dict[Any, Any] = {}
    logits = climbed(model, stops, known, top, logit_edits, keep_logits, kept)
    scores = scored(logits, measures, kept, known)
    taps = {key[1]: value for key, value in kept.items() if key[0] == "tap"}
    if any(taps[key]._version != kept["version", key] for key in taps):
        raise RuntimeError(MOVED)
    found: dict[Any, torch.Tensor] = {}
    zeroed: list[Any] = []
    arrived: dict[Any, torch.Tensor] = {}
    changes = None
    for key in {key for drop in drops for key in drop}:
        taps[key].register_hook(lambda slope, key=key: dropped(key, slope, zeroed, arrived))
    passes = [(number, drop) for number in range(len(columns)) for drop in (None, *range(len(drops)))]
    # Gradients by what heads read are taken once more, from those of the taps.
    onward = edges is not None or any(how[0] == "heads" for _, how in wanted)
    for number, drop in passes:
        zeroed[:] = () if drop is None else drops[drop]
        keep = onward or (number, drop) != passes[-1]
        slopes = gradients(scores[:, columns[number]].sum(), taps, keep)
        gone, zeroed[:] = tuple(zeroed), ()
        # What is dropped has no gradient of its own, but a sum that it is part of has.
        sums = {**slopes, **{key: arrived[key] for key in gone}}
        slopes |= {key: torch.zeros_like(arrived[key]) for key in gone}
        for (component, layer), how in wanted:
            value, slope = found_at(model, how, taps, sums if how[0] == "middle" else slopes, kept)
            name = ("gradient", world, number) if drop is None else ("dropped", world, number, drop)
            found[(*name, component, layer)] = slope.detach()
            if values and (number, drop) == passes[0]:
                found["value", world, component, layer] = value.detach()
        if edges is not None:
            changes = changes_at(model, edges, taps, slopes, kept, known) if changes is None else changes
            found["edges", world, number] = edges_at(model, edges, changes, taps, slopes, kept, steps)
    return found, scores.detach()


def dropped(key: Any, slope: torch.Tensor, zeroed: list[Any], arrived: dict[Any, torch.Tensor]) -> torch.Tensor:
    """What goes on through a tap: nothing where it is dropped, but what arrived is kept."""
    arrived[key] = slope
    return torch.zeros_like(slope) if key in zeroed else slope


def gradients(total: torch.Tensor, taps: dict[Any, torch.Tensor], keep: bool) -> dict[Any, torch.Tensor]:
    """Of a sum by each tapped tensor; zeros by those that do not reach it.

    Where nothing is differentiated afterwards, what the forward kept is let go of on the way (not ``keep``).
    """
    if not total.requires_grad:
        return {key: torch.zeros_like(tap) for key, tap in taps.items()}
    found = torch.autograd.grad(total, list(taps.values()), retain_graph=keep, allow_unused=True)
    return {
        key: torch.zeros_like(tap) if slope is None else slope
        for (key, tap), slope in zip(taps.items(), found)  # noqa: B905  # of equal length
    }


def found_at(
    model: Any, how: tuple[Any, ...], taps: dict[Any, Any], slopes: dict[Any, Any], kept: dict[Any, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A component's value and gradient, ``[row, pos, (unit), …]``; scores and patterns ``[row, head, dest, src]``.

    ``how`` is ``("plain", tap, heads, scale)``: what passes by, in heads or not, times a number;
    ``("middle", tap, stream, scale)``: the stream after what attention adds; ``("weights", tap)``;
    ``("reader", tap, stream, norm, held)``: the stream that is read behind a norm; ``("heads", tap, projections, read,
    stream, norm, held, first)``: the same by single heads, through what the projections make of it;
    ``("head_out", tap, z, heads, projection, post_norm, normed, scale)``; or ``("scale", tap, stream, norm)``.
    """
    kind, tap, *rest = how
    x, slope = taps[tap], slopes[tap]
    if kind == "plain":
        heads, scale = rest
        value, slope = shaped(x, heads), shaped(slope, heads)
        return (value, slope) if scale == 1 else (value * scale, slope / scale)
    if kind == "weights":
        return x, slope
    if kind == "middle":
        stream, scale = rest
        return kept["aside", stream] + x * scale, slope / scale
    if kind == "reader":
        stream, norm, held = rest
        entering = kept["aside", stream]
        scale = constant(model, norm, entering, x, held, kept)
        return entering, pulled_back(model, norm, entering, slope[None], scale)[0]
    if kind == "heads":
        projections, read, stream, norm, held = rest
        entering = kept["aside", stream]
        scale = constant(model, norm, entering, taps[read], held, kept)
        by_head = back_to_stream(model, x, slope, projections, taps, taps[read])
        return entering, pulled_back(model, norm, entering, by_head, scale).movedim(0, 2)
    if kind == "scale":
        stream, norm = rest
        _, bias, scale = divided(model, norm, kept["aside", stream], x)
        return scale, -(slope * (x - bias.to(x.dtype))).sum(-1, keepdim=True) / scale.to(x.dtype)
    z, heads, projection, post_norm, normed, scale = rest
    inner = taps[z].unflatten(-1, (heads, -1)).detach()
    project = module_at(model, projection)._module
    weight = post_weight(model, post_norm, kept["aside", normed].detach()) if post_norm else None
    parts = [head_write(project, inner, torch.tensor(head), weight) * scale for head in range(heads)]
    return torch.stack(parts, 2), (slope / scale).unsqueeze(2).expand(-1, -1, heads, -1)


def changes_at(
    model: Any,
    edges: tuple[Any, ...],
    taps: dict[Any, Any],
    slopes: dict[Any, Any],
    kept: dict[Any, Any],
    known: dict[Any, Any],
) -> torch.Tensor:
    """What each writer of ``edges``, see ``edges_at``, writes in the other world beyond what it writes here.

    ``[row, writer, pos, d_model]``, or, where positions are kept, ``[row, pos, writer, d_model]``.
    """
    writers, _, worlds, agreeing, chosen, by_position = edges
    here = []
    for name, how, _ in writers:
        known_here = isinstance(how, torch.Tensor)
        here.append(of_worlds(known, name, how) if known_here else found_at(model, how, taps, slopes, kept)[0])
    changes = written(model, known, tuple((name, heads) for name, _, heads in writers), here, worlds, agreeing)
    changes = changes if chosen is None else changes.index_select(2, chosen.to(changes.device))
    return changes.transpose(1, 2).contiguous() if by_position else changes


def edges_at(
    model: Any,
    edges: tuple[Any, ...],
    changes: torch.Tensor,
    taps: dict[Any, Any],
    slopes: dict[Any, Any],
    kept: dict[Any, Any],
    steps: Any,
) -> torch.Tensor:
    """Every writer's change times the gradient by what each reader alone reads, ``[row, (pos), writer, reader]``.

    Gradients are taken one component of one layer at a time, and only their products are kept.

    Args:
        model: The nnsight model.
        edges: Six things: ``(name, how, heads)`` of each writer, see ``written``, where ``how`` says how its value here
            is found, see ``found_at``, or which of the known worlds this is; ``(how, count)`` of each component that
            reads, and how many writers are upstream of it, the others being 0; each row's other world; before which
            positions the worlds agree, see ``difference``; the positions that count, or all; and whether positions are
            kept.
        changes: Of ``changes_at``.
        taps: The tapped tensors.
        slopes: Gradients by them.
        kept: What was kept aside.
        steps: As ``backward`` takes them.
    """
    _, readers, _, _, chosen, by_position = edges
    found = []
    for how, count in readers:
        slope = found_at(model, how, taps, slopes, kept)[1]
        slope = (slope.unsqueeze(2) if slope.ndim == 3 else slope).movedim(2, 1)  # [row, reader, pos, d_model]
        slope = slope if chosen is None else slope.index_select(2, chosen.to(slope.device))
        slope = wide(slope)
        if steps is not None:
            count_of, weight = steps
            slope = slope.reshape(-1, count_of, *slope.shape[1:]).sum(1) * weight
        upstream = changes[..., :count, :] if by_position else changes[:, :count]
        part = products(upstream, slope.to(changes.device), by_position)
        beside = changes.shape[2 if by_position else 1] - count
        found.append(torch.nn.functional.pad(part, (0, 0, 0, beside)))
    return torch.cat(found, -1).detach()


def constant(
    model: Any, norm: str, stream: torch.Tensor, normed: torch.Tensor, held: Any, kept: dict[Any, Any]
) -> torch.Tensor | None:
    """What a norm divides by, where that is held: at what was written there, or at its own value."""
    if not held or not norm:
        return None
    if held is True:
        return divided(model, norm, stream, normed)[2].detach()
    return kept[held].detach()  # type: ignore[no-any-return]  # of tensors
