"""How a plain nnsight script reads and writes each component, and computes each metric: one function of code for each.

The same lines take a component's value in an unpatched run and make it editable in a patched one. To give another
component a script, write its function and add it to ``STOPS``; a metric without one in ``READINGS`` is passed to the
script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tracepatch import metrics
from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.sites import COMPONENTS


@dataclass(frozen=True)
class Stop:
    """How a trace reads a component of one layer, and puts a changed one back.

    Attributes:
        order: When it passes by.
        value: A fresh tensor with its value.
        dims: Of that tensor.
        before: Lines that the value needs.
        back: Lines that give the variable, named like the component, back to the model.
        asides: When, and by which line, something is taken that passes by earlier.
        defines: Functions that the lines call.
    """

    order: float
    value: str
    dims: str
    before: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    asides: tuple[tuple[float, str], ...] = ()
    defines: tuple[str, ...] = ()


def _plain(architecture: Architecture, name: str, layer: int) -> Stop:
    """Read and written as it stands."""
    place = architecture.place(name, layer)
    return Stop(place.order, _read(place), "batch, pos, " + COMPONENTS[name].dims[-1], back=_put(place, name))


def _z(architecture: Architecture, name: str, layer: int) -> Stop:
    """Heads lie side by side in one dim."""
    place = architecture.place(name, layer)
    heads = f".unflatten(-1, ({architecture.units(name, layer)}, {architecture.width(name, layer)}))"
    return Stop(place.order, _read(place) + heads, "batch, pos, head, d_head", back=_put(place, f"{name}.flatten(-2)"))


def _taken_by_attention(architecture: Architecture, name: str, layer: int) -> Stop:
    """An argument of the call that computes attention, ``[batch, head, pos, d_head]``."""
    place = architecture.place(name, layer)
    assert isinstance(place.key, int)
    before = f"attention = {_module(place.path)}.source.{place.operation}  # (module, q, k, v, ...)"
    given = f"(*given[:{place.key}], {name}.transpose(1, 2), *given[{place.key + 1}:])"
    return Stop(
        place.order,
        f"attention.inputs[0][{place.key}].transpose(1, 2).clone()",
        f"batch, pos, {COMPONENTS[name].unit}, d_head",
        (before,),
        ("given, options = attention.inputs", f"attention.inputs = ({given}, options)"),
    )


HEADS = '''\
def heads(project, z):
    """What each head adds: its z [batch, pos, head, d_head] alone through the projection, less the bias."""
    alone = torch.eye(z.shape[2]).to(z)[:, :, None] * z[:, :, None]  # one head at a time, the others at 0
    return project(alone.flatten(-2)) - project(torch.zeros_like(alone).flatten(-2))
'''
FROZEN = '''\
def frozen(norm):
    """What a norm multiplies its input by; with this held fixed the heads still add up behind it."""
    x = torch.where(norm.input == 0, 1e-6, norm.input)  # at 0 it is the limit
    return (norm(x) / x)[:, :, None]
'''


def _head_out(architecture: Architecture, name: str, layer: int) -> Stop:
    """Each head's z through the output projection alone; a changed head changes the sum of all by as much."""
    how, out = architecture.head_projection(layer), architecture.place("attn_out", layer)
    z = _z(architecture, "z", layer)
    asides = [(z.order, f"z_{layer} = {z.value}")]
    factor = _times(out.scale)
    defines = [HEADS]
    if how.post_norm:
        # A norm without submodules starts one tick before it ends.
        asides.append((out.order - 1, f"factor_{layer} = frozen({_module(how.post_norm)})"))
        factor += f" * factor_{layer}"
        defines.append(FROZEN)
    before = (f"each = heads({_module(how.projection)}, z_{layer}){factor}",)
    after = f"attn_out = {_passing(out)} + ({name} - each).sum(2){_over(out.scale)}"
    back = (after, *_put(out, "attn_out", scale=1))
    dims = "batch, pos, head, d_model"
    return Stop(out.order, "each.clone()", dims, before, back, tuple(asides), tuple(defines))


def _resid_mid(architecture: Architecture, name: str, layer: int) -> Stop:
    """No module gives it: the stream entering the block plus what attention adds, and written as the latter."""
    stream, out, entering = architecture.stream(layer), architecture.place("attn_out", layer), f"entering_{layer}"
    return Stop(
        out.order,
        f"{entering} + {_passing(out)}{_times(out.scale)}",
        "batch, pos, d_model",
        back=_put(out, f"({name} - {entering})" if out.scale != 1 else f"{name} - {entering}"),
        asides=((stream.order, f"{entering} = {_read(stream)}"),),
    )


def _logits(architecture: Architecture, name: str, layer: int) -> Stop:
    """The end of the forward: what is read of them is the edited copy."""
    return Stop(float("inf"), "model.output.logits.clone()", "batch, pos, vocab")


STOPS: dict[str, Callable[[Architecture, str, int], Stop]] = {
    "embed": _plain,
    "resid_pre": _plain,
    "q": _taken_by_attention,
    "k": _taken_by_attention,
    "v": _taken_by_attention,
    "z": _z,
    "head_out": _head_out,
    "attn_out": _plain,
    "resid_mid": _resid_mid,
    "mlp_act": _plain,
    "mlp_out": _plain,
    "resid_post": _plain,
    "logits": _logits,
}


def _module(path: str) -> str:
    """A module's path as attribute access."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def _passing(place: Place) -> str:
    """What passes by at a place, with rows and positions apart."""
    module = _module(place.path)
    if place.side == "output":
        found = f"{module}.output" + ("" if place.key is None else f"[{place.key!r}]")
    elif place.key is None:
        found = f"{module}.input"
    else:
        found = f"{module}.inputs[{int(isinstance(place.key, str))}][{place.key!r}]"
    return found + ("[None]" if place.flat else "")  # rows and positions are one dim there


def _read(place: Place) -> str:
    return f"{_passing(place)}.clone()" if place.scale == 1 else f"({_passing(place)}{_times(place.scale)})"


def _put(place: Place, value: str, scale: float = 0) -> tuple[str, ...]:
    """The lines that replace what passes by."""
    value += _over(scale or place.scale)
    if place.flat:
        value = f"({value})[0]" if " " in value else f"{value}[0]"
    module, key = _module(place.path), place.key
    if key is None:
        return (f"{module}.{place.side} = {value}",)
    whole = f"{module}.output" if place.side == "output" else "given"
    if isinstance(key, str):
        new = f"{{**{whole if place.side == 'output' else 'options'}, {key!r}: {value}}}"
    else:
        new = f"({f'*{whole}[:{key}], ' if key else ''}{value}, *{whole}[{key + 1}:])"
    if place.side == "output":
        return (f"{module}.output = {new}",)
    both = f"given, {new}" if isinstance(key, str) else f"{new}, options"
    return f"given, options = {module}.inputs", f"{module}.inputs = ({both})"


def _times(scale: float) -> str:
    return "" if scale == 1 else f" * {number(scale)}"


def _over(scale: float) -> str:
    return "" if scale == 1 else f" / {number(scale)}"


# ----------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Read:
    """The logits that a metric reads, as a variable ``[vocab]``, or ``[position, vocab]`` where it reads several.

    Attributes:
        name: The variable.
        several: Whether it has the dim of positions.
        given: What the metric needs of the pair: ids, or log-probabilities as code.
    """

    name: str
    several: bool
    given: dict[str, Any]

    def at(self, need: str, step: str = "", over: str = "") -> str:
        """Entries at the given ids, after a step; where there are several ids, what becomes of them."""
        ids = self.given[need]
        picked = str(list(ids)) if len(ids) > 1 else str(ids[0])
        return f"{self.name}{step}[{':, ' if self.several else ''}{picked}]" + (over if len(ids) > 1 else "")

    @property
    def mean(self) -> str:
        """The mean over positions, where there are several."""
        return ".mean()" if self.several else ""


def _logit(read: Read, need: str = "answer") -> str:
    return read.at(need, over=".mean(-1)") + read.mean


def _rank(read: Read) -> str:
    best = read.at("answer", over=".max(-1).values")
    return (
        f"({read.name} > {best}[:, None]).sum(-1).float().mean()" if read.several else f"({read.name} > {best}).sum()"
    )


def _kl(read: Read) -> str:
    clean, here = read.given["clean"], f"{read.name}.log_softmax(-1)"
    return f"torch.nn.functional.kl_div({here}, {clean}, reduction='none', log_target=True).sum(-1){read.mean}"


def _cross_entropy(read: Read) -> str:
    ids = list(read.given["next"]) if read.several else read.given["next"][0]
    return f"torch.nn.functional.cross_entropy({read.name}, torch.tensor({ids}).to({read.name}.device))"


READINGS: dict[Callable[..., torch.Tensor], Callable[[Read], str]] = {
    metrics.logit_diff.function: lambda read: f"{_logit(read)} - {_logit(read, 'wrong')}",
    metrics.logit.function: _logit,
    metrics.prob.function: lambda read: read.at("answer", ".softmax(-1)", ".sum(-1)") + read.mean,
    metrics.log_prob.function: lambda read: read.at("answer", ".log_softmax(-1)", ".logsumexp(-1)") + read.mean,
    metrics.rank.function: _rank,
    metrics.kl.function: _kl,
    metrics.cross_entropy.function: _cross_entropy,
}


# ------------------------------------------------------------------------------------------------- numbers and indices


def number(value: float) -> str:
    """A number as short as it can be written exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def along(indices: tuple[int, ...], scalar: bool, size: int) -> str:
    """Indices along a dim as one would write them: a number, a slice, or a list."""
    if scalar:
        return str(indices[0])
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step < 1 or (step > 1 and len(indices) < 3) or indices != tuple(range(indices[0], indices[-1] + 1, step)):
        return str(list(indices))
    stop = "" if indices[-1] + step >= size else str(indices[-1] + 1)
    return f"{indices[0] or ''}:{stop}" + (f":{step}" if step > 1 else "")


def joined(rows: str, parts: list[str]) -> str:
    """An index; two lists pick every combination."""
    if sum(part.startswith("[") for part in parts) > 1:
        parts = ["[" + ", ".join(f"[{i}]" for i in parts[0][1:-1].split(", ")) + "]", *parts[1:]]
    return ", ".join([rows, *parts])


def plus(before: str, factor: float, term: str) -> str:
    """A sum with one more term, of which only the factor's sign is written here."""
    if not before:
        return f"-{term}" if factor < 0 else term
    return f"{before} {'-' if factor < 0 else '+'} {term}"


def literal(value: Any) -> str:
    """Nested lists of numbers as code."""
    return f"[{', '.join(map(literal, value))}]" if isinstance(value, list) else number(value)
