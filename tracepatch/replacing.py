"""A portion of a live value is replaced by a source's: what lies in a subspace, or some features of a dictionary.

As in ``trace``, only torch is used, and there are no decorators, classes or imports of our own.
"""

from __future__ import annotations

from typing import Any

import torch

AT_ONCE = 1 << 24  # numbers of features that are computed at once, where it is known how many there are
CELLS = 256  # vectors that functions are given at once, of which that is not known


def replaced(portion: tuple[Any, ...], live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Live values ``[…, d]`` with a portion of them as it is in a source's.

    Args:
        portion: ``("subspace", basis)`` with orthonormal rows ``[k, d]``; ``("functions", encode, decode, chosen,
            clamp)``; or ``("weights", encoder [d, n], its bias, decoder [n, d], what is subtracted before, activation,
            its parameter, chosen, clamp)``, where ``chosen`` are features, and ``clamp`` the numbers that they are set
            to instead of the source's, if any.
        live: As they are.
        value: As they are in the source; broadcasts to the live ones.
    """
    wide = live if live.dtype == torch.float64 else live.float()
    other = value.to(wide).expand(wide.shape)
    if portion[0] == "subspace":
        basis = portion[1].to(wide)
        patched: torch.Tensor = wide + ((other - wide) @ basis.T) @ basis
        return patched.to(live.dtype)
    flat, given = (x.reshape(-1, x.shape[-1]) for x in (wide, other))
    at_once = CELLS if portion[0] == "functions" else max(1, AT_ONCE // portion[1].shape[1])
    changed = [featured(portion, flat[i : i + at_once], given[i : i + at_once]) for i in range(0, len(flat), at_once)]
    return torch.cat(changed).reshape(wide.shape).to(live.dtype)


def featured(portion: tuple[Any, ...], live: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Vectors ``[cell, d]`` with some of their features changed; what a dictionary does not explain stays."""
    *_, chosen, clamp = portion
    chosen = chosen.to(live.device)
    if portion[0] == "functions":
        _, encode, decode, *_ = portion
        before = encode(live)
        after = before.clone()
        after[:, chosen] = encode(other)[:, chosen] if clamp is None else clamp.to(before)
        moved: torch.Tensor = (decode(after) - decode(before)).to(live.dtype)
        return live + moved
    before = activated(portion, live, chosen)
    after = activated(portion, other, chosen) if clamp is None else clamp.to(live)
    moved = (after - before) @ portion[3].to(live)[chosen]
    return live + moved


def activated(portion: tuple[Any, ...], x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The activations of some features ``[cell, chosen]`` of vectors ``[cell, d]``."""
    _, encoder, bias, _, before, activation, parameter, *_ = portion
    x = x if before is None else x - before.to(x)
    if activation == "topk":  # which features are active depends on all of them
        whole = (x @ encoder.to(x) + (0 if bias is None else bias.to(x))).relu()
        best = whole.topk(int(parameter), -1)
        kept: torch.Tensor = torch.zeros_like(whole).scatter(-1, best.indices, best.values)
        return kept[:, chosen]
    found: torch.Tensor = x @ encoder.to(x)[:, chosen] + (0 if bias is None else bias.to(x)[chosen])
    if activation == "jumprelu":
        threshold = parameter.to(x)
        return found.where(found > (threshold[chosen] if threshold.ndim else threshold), 0)
    return found.relu()
