"""What is kept, and what is written, at one place of a forward: the tasks of a trace, one function for each kind.

As in ``trace``, nothing is decided here, and only torch is used: no decorators, classes or imports of our own, so that
the functions mean the same wherever they are executed. Values are cloned when they are kept: some models add into a
module's output in place after it has passed by.
"""

from __future__ import annotations

from typing import Any

import torch

from tracepatch.norms import module_at, norm_parts, normed, post_weight, wide
from tracepatch.replacing import replaced


def perform(
    model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """One task at a place: keep its value aside, or write a component there and keep it."""
    if task[0] == "aside":
        kept["aside", task[1]] = x.clone()
        return x
    if task[0] == "allowed":
        kept["aside", task[1]] = (x > task[2]).transpose(1, 2)
        return x
    if task[0] == "weights":
        return weights(task, x, known, kept)
    if task[0] == "reader":
        return reader(model, task, x, known, kept)
    if task[0] == "scale":
        return scaled(model, task, x, known, kept)
    if task[0] == "shadows":
        return shadows(model, task, x, known, kept)
    if task[0] == "from_shadows":
        rows, slots, units, sources = on(x.device, task[1:])
        x = x.clone()
        x[rows, units, slots] = x[sources, units, slots]
        return x
    if task[0] == "head_out":
        return head_out(model, task, x, known, kept)
    if task[0] == "grow":
        return grown(task, x, known)
    if task[0] == "top":
        return chosen(task, x, known)
    if task[0] == "narrow":
        return x[on(x.device, task[1])][None]
    if task[0] == "widen":
        after = x.new_zeros(*task[2], x.shape[-1])
        after[on(x.device, task[1])] = x[0]
        return after
    if task[0] == "resid_mid":
        _, name, writes, keep, stream, scale = task
        entering = kept["aside", stream]
        middle = entering + (x if scale == 1 else x * scale)
        after = through(name, writes, keep, middle, known, kept)
        # An edit of the sum is an edit of its last summand; what is not edited stays as it is to the last bit.
        if after is middle:
            return x
        needed = after - entering
        needed = needed + (after - (entering + needed))  # once more, for what the first subtraction rounded off
        return torch.where(after == middle, x, needed / scale)
    _, name, writes, keep, heads, scale = task
    value = x if scale == 1 else x * scale
    if heads == "first":
        value = value.transpose(1, 2)
    elif heads:
        value = value.unflatten(-1, (heads, -1))
    after = through(name, writes, keep, value, known, kept)
    if after is value:
        return x
    if heads == "first":
        return after.transpose(1, 2).contiguous()
    return after.reshape(x.shape) if scale == 1 else x + (after - value).reshape(x.shape) / scale


def weights(
    task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Keeps, or edits, attention's scores or pattern ``[row, head, dest, src]``; masked keys stay as they are."""
    _, name, writes, keep, allowed = task
    value = x.transpose(1, 2)
    meet(name, keep, value, known, kept)
    after = value
    for write in writes:
        before, after = after, torch.where(kept["aside", allowed], edited(after, (write,), known), after)
        if write[-1]:  # each edited destination's weights keep their sum
            rows, slots, units = on(x.device, write[1][:3])
            changed = torch.zeros_like(after[..., :1], dtype=torch.bool)
            changed[rows, slots, units] = True
            wanted, found = before.sum(-1, keepdim=True), after.sum(-1, keepdim=True)
            after = torch.where(changed, after * (wanted / found), after)
    retain(name, keep, after, known, kept)
    return x if after is value else after.transpose(1, 2).contiguous()


def reader(
    model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Keeps, or edits, the stream that one branch reads; x is what the branch takes, the stream behind its norm."""
    _, name, writes, keep, stream, norm = task
    before = kept["aside", stream]
    after = through(name, writes, keep, before, known, kept)
    if after is before:
        return x
    kept["aside", stream] = after
    x = x.clone()
    for write in writes:
        rows, slots = on(x.device, write[1][:2])
        read = normed(model, norm, after[rows, slots][None])[0]
        same = (after[rows, slots] == before[rows, slots]).all(-1, keepdim=True)
        x[rows, slots] = torch.where(same, x[rows, slots], read)
    return x


def shadows(
    model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Gives shadow rows an edited stream to read, from which single heads' queries, keys or values are then taken.

    So norms, fused projections and rotations are the model's own, and the row itself stays untouched.
    """
    _, name, writes, stream, norm, count, rows, saves, seats, members, units = task
    live = kept["aside", stream][rows.to(x.device)]
    after = edited(live[:, :, None].expand(-1, -1, count, -1).contiguous(), writes, known)
    retain(name, (False, saves), after, known, kept)
    if seats is None:
        return x
    seats, members, units = on(x.device, (seats, members, units))
    x, whole = x.clone(), kept["aside", stream].clone()
    whole[seats] = after[members, :, units]
    kept["aside", stream] = whole
    x[seats] = normed(model, norm, whole[seats])
    return x


def scaled(
    model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Keeps, or edits, what a norm divides by; x is the stream behind that norm, or what its reader takes of it."""
    _, name, writes, keep, stream, norm, seats, owners = task
    entering = wide(kept["aside", stream])
    weight, bias, centred = norm_parts(model, norm, entering)
    spread = (entering - entering.mean(-1, keepdim=True) if centred else entering) * weight
    squared = (spread * spread).sum(-1, keepdim=True)
    # Shadow rows divide by what the rows do that they belong to, so x is not asked what was divided by.
    plain = wide(normed(model, norm, kept["aside", stream]))
    before = squared / ((plain - bias) * spread).sum(-1, keepdim=True)
    before = torch.where(squared == 0, torch.ones_like(before), before)
    after = through(name, writes, keep, before, known, kept)
    if after is before:
        return x
    x = x.clone()
    for write in writes:
        rows, slots = on(x.device, write[1][:2])
        x[rows, slots] = (spread[rows, slots] / after[rows, slots] + bias).to(x.dtype)
        for seat, owner in zip(seats, owners):  # noqa: B905  # of equal length
            own = slots[rows == owner]
            x[seat, own] = (spread[seat, own] / after[owner, own] + bias).to(x.dtype)
    return x


def grown(task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor]) -> torch.Tensor:
    """The table of tokens ``[lane, slot, d_model]`` with the rows that are born here, each as its base is here."""
    _, before, shape, cells, source, origin = task
    x = x.reshape(*before, x.shape[-1]) if before[0] * before[1] else x.new_zeros(*before, x.shape[-1])
    after = x.new_zeros(*shape, x.shape[-1])
    after[: before[0], : before[1]] = x
    lanes, slots = on(x.device, cells)
    # A batch that computes the worlds has them here; otherwise they are known.
    found = x if source is None else known[source]
    after[lanes, slots] = found[on(found.device, origin)].to(x.device)
    return after


def chosen(task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor]) -> torch.Tensor:
    """What is read of the stream above the last layer, ``[1, token, d_model]``; before a row's start its base's."""
    _, at, cells, others, source, origin = task
    after = x.new_zeros(len(at) + len(others), x.shape[-1])
    at, others = on(x.device, (at, others))
    after[at] = x[on(x.device, cells)]
    if len(others):
        found = x if source is None else known[source]
        after[others] = found[on(found.device, origin)].to(x.device)
    return after[None]


def through(
    name: Any,
    writes: tuple[Any, ...],
    keep: tuple[Any, ...],
    value: torch.Tensor,
    known: dict[Any, torch.Tensor],
    kept: dict[Any, torch.Tensor],
) -> torch.Tensor:
    """Edits a value, and keeps of it what is to be kept."""
    meet(name, keep, value, known, kept)
    after = edited(value, writes, known)
    retain(name, keep, after, known, kept)
    return after


def meet(
    name: Any, keep: tuple[Any, ...], value: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> None:
    """In a batch that computes the worlds: keeps their value ``[world, pos, …]`` before rows of the batch write it."""
    if not isinstance(keep[0], tuple):
        return
    cells = on(value.device, keep[0])
    found = value[cells] if len(cells) == 2 else value[cells[0], cells[1], :, cells[2]].transpose(2, 3)
    known[name] = kept[name] = found


def retain(
    name: Any, keep: tuple[Any, ...], value: Any, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> None:
    """Keeps a value whole, and the cells of it ``[row, …]`` in float32: those that rows save, reduced where they are.

    Those that metrics read stay where they are: all metrics are computed at the end.
    """
    whole, saves = keep
    if whole is True:
        kept[name] = value.clone()
    for key, cells, base, swap, dropped, reduce in saves:
        # A copy: the cells are indexed.
        found = (value[on(value.device, cells)] if base is None else seated(value, cells, base, known)).float()
        found = (found.transpose(1, 2) if swap else found).squeeze(dropped)
        if key[0] == "metric":
            kept[key] = found
        else:
            kept[key] = found.cpu() if reduce is None else reduce(found).float().clone().cpu()


def seated(value: Any, cells: tuple[Any, ...], base: tuple[Any, ...], known: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Cells of a table, row by row ``[row, pos, …]``; where a row has none of its own, its base's."""
    at, others, source, origin, rows = base
    worlds = value if source is None else known[source]
    parts = [value[on(value.device, cells)]] if len(at) else []
    parts += [worlds[on(worlds.device, origin)]] if len(others) else []
    found = torch.cat([part.to(parts[0].device) for part in parts])
    order = torch.cat([at, others]).argsort().to(found.device)
    return found[order].reshape(rows, -1, *found.shape[1:])


def on(device: Any, indices: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Index tensors on a device, without those that are ``None``."""
    return tuple(i.to(device) for i in indices if i is not None)


def edited(x: torch.Tensor, writes: tuple[Any, ...], known: dict[Any, torch.Tensor]) -> torch.Tensor:
    """An activation ``[row, pos, …]`` with indexed writes applied to a copy; x itself if there are none."""
    if not writes:
        return x
    x = x.clone()
    for add, cells, terms, constant, function, portion, _ in writes:
        at = on(x.device, cells)
        value = written(terms, constant, known, x) if function is None else made(function, x[at], terms, known)
        if portion is not None:
            value = replaced(portion, x[at], value)
        if add:
            x.index_put_(at, value.expand(x[at].shape), accumulate=True)
        else:
            x[at] = value
    return x


def made(
    function: tuple[Any, ...], live: torch.Tensor, terms: tuple[Any, ...], known: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """What a function makes of the live values ``[cell, …]`` and the worlds', row by row; one entry a cell."""
    call, arguments, rows, *dims = function
    shape = (rows, *(n for n in dims if n is not None), *live.shape[1:])
    worlds = [written((term,), None, known, live).reshape(shape) for term in terms]
    found: torch.Tensor = call(live.reshape(shape), *worlds, *[None] * (arguments - 1 - len(worlds)))
    return found.to(live.dtype).expand(shape).reshape(live.shape)


def written(
    terms: tuple[Any, ...], constant: torch.Tensor | None, known: dict[Any, torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """The value of a source, one entry a cell."""
    total = None if constant is None else constant.to(like.device, like.dtype)
    for factor, name, cells, lift in terms:
        table = known[name]
        if cells is None:  # one number, times fixed ones
            value = factor.to(like.device) * table.to(like.device)
            total = value.to(like.dtype) if total is None else total + value.to(like.dtype)
            continue
        value = table[on(table.device, cells)].to(like.device)
        value = value.unsqueeze(1) if lift else value
        value = value if factor == 1 else value * factor
        value = value.to(like.dtype)  # some models keep their stream wider than their weights
        total = value if total is None else total + value
    return total if total is not None else like.new_zeros(())


def head_out(
    model: Any, task: tuple[Any, ...], x: torch.Tensor, known: dict[Any, torch.Tensor], kept: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Keeps, or edits, what single heads add to the stream, at the place x where all of attention adds to it."""
    _, name, writes, keep, z_name, heads, projection, post_norm, factor_name, scale = task
    z: torch.Tensor = kept["aside", z_name].unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]  # torch's
    project = module_at(model, projection)
    weight = post_weight(model, post_norm, kept["aside", factor_name]) if post_norm else None
    if any(keep):
        parts = []
        for head in range(heads):
            parts.append(head_write(project, z, torch.tensor(head), weight) * scale)
        through(name, writes, keep, torch.stack(parts, 2), known, kept)
    if not writes:
        return x
    after = x.clone()
    repeated, changed = rows_of_several(writes, x, heads)
    for add, (rows, slots, units, _), terms, constant, function, portion, _ in writes:
        rows, slots = rows.to(x.device), slots.to(x.device)
        whole = units is None  # every head of each cell
        if whole:
            units = torch.arange(heads, device=x.device).repeat(len(rows))
            rows, slots = rows.repeat_interleave(heads), slots.repeat_interleave(heads)
        else:
            units = units.to(x.device)
        again = repeated[rows] >= 0
        cells = repeated[rows[again]], slots[again], units[again]
        live = torch.zeros(0)
        if not add or function is not None:
            live = head_write(project, z[rows, slots], units, None if weight is None else weight[rows, slots]) * scale
            live[again] = live[again] + changed[cells]
        if function is None:
            value = written(terms, constant, known, x)
        else:
            value = made(function, live.reshape(-1, heads, live.shape[-1]) if whole else live, terms, known)
        value = value.expand(-1, heads, -1).flatten(0, 1) if whole and value.ndim == 3 else value
        value = value.expand(len(rows), x.shape[-1])
        if portion is not None:
            value = replaced(portion, live, value)
        if not add:
            value = value - live
        changed.index_put_(cells, value[again], accumulate=True)
        after.index_put_((rows, slots), value / scale, accumulate=True)
    return after


def rows_of_several(writes: tuple[Any, ...], x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that several writes edit, and room for what those have changed so far.

    Returns:
        ``[row]``: a row's number among them, or -1; zeros ``[such a row, pos, head, d_model]``.
    """
    counts = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for write in writes:
        counts[write[1][0].to(x.device).unique()] += 1
    several = counts > 1
    number = torch.where(several, several.cumsum(0) - 1, -1)
    return number, x.new_zeros(int(several.sum()), x.shape[1], heads, x.shape[-1])


def head_write(project: Any, z: torch.Tensor, heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """What one head (or one for each cell) writes, without the bias: z ``[…, head, d_head]`` → ``[…, d_model]``."""
    only = torch.zeros_like(z)
    if heads.ndim:
        cell = torch.arange(len(z), device=z.device)
        only[cell, heads] = z[cell, heads]
    else:
        only[..., heads, :] = z[..., heads, :]
    flat = only.flatten(-2)
    found: torch.Tensor = project(flat) - project(torch.zeros_like(flat[..., :1, :] if flat.ndim > 2 else flat[:1]))
    return found if weight is None else found * weight
