"""How a plain nnsight script reads and writes each component: one function of code for each.

The same lines take a component's value in an unpatched run and make it editable in a patched one. To give another
component a script, write its function and add it to ``STOPS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.literals import along, number
from tracepatch.sites import COMPONENTS, SPLIT_READERS

Moments: TypeAlias = tuple[tuple[float, tuple[str, ...]], ...]
"""Lines, each with when they are due."""


@dataclass(frozen=True)
class Spot:
    """A component of one layer in one forward of a script.

    Attributes:
        architecture: Where the components live.
        name: The component.
        layer: Its layer.
        rows: Of the batch: the run itself, then those that read what only single heads of it read.
        edited: Whether it is edited there, and not only kept.
        shadows: For what single heads read: such a row, and the heads that read the same.
    """

    architecture: Architecture
    name: str
    layer: int
    rows: int = 1
    edited: bool = False
    shadows: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def place(self) -> Place:
        """Where it passes by."""
        if self.name == "logits_in":
            return self.architecture.stream(len(self.architecture))
        return self.architecture.place(self.name, self.layer)

    @property
    def units(self) -> int:
        """Its heads or neurons."""
        return self.architecture.units(self.name, self.layer)


@dataclass(frozen=True)
class Stop:
    """How a trace reads a component of one layer, and puts a changed one back.

    Attributes:
        order: When it passes by.
        value: A fresh tensor with its value.
        dims: Of that tensor.
        before: Lines that the value needs.
        after: Lines behind each edit.
        back: Lines that give the variable, named like the component, back to the model.
        first: What is done at other moments, before anything is edited there.
        asides: What is taken at other moments, after everything that is edited there.
        defines: Functions that the lines call.
        passes: Whether the value is what passes by, with all that is edited there, and not made of other things.
    """

    order: float
    value: str
    dims: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    first: Moments = ()
    asides: Moments = ()
    defines: tuple[str, ...] = ()
    passes: bool = False


def _plain(spot: Spot) -> Stop:
    """Read and written as it stands."""
    place, dims = spot.place, "batch, pos, " + COMPONENTS[spot.name].dims[-1]
    back = _put(place, spot.name, rows=spot.rows)
    return Stop(place.order, _read(place, spot.rows), dims, back=back, passes=True)


def _z(spot: Spot) -> Stop:
    """Heads lie side by side in one dim."""
    place = spot.architecture.place("z", spot.layer)
    heads = f".unflatten(-1, ({spot.units}, {spot.architecture.width('z', spot.layer)}))"
    back = _put(place, "z.flatten(-2)", rows=spot.rows)
    return Stop(place.order, _read(place, spot.rows) + heads, "batch, pos, head, d_head", back=back, passes=True)


def _taken_by_attention(spot: Spot) -> Stop:
    """An argument of the call that computes attention, ``[batch, head, pos, d_head]``."""
    place, name = spot.place, spot.name
    return Stop(
        place.order,
        f"attention.inputs[0][{place.key}].transpose(1, 2).clone()",
        f"batch, pos, {COMPONENTS[name].unit}, d_head",
        (_call(place),),
        back=_given_to_attention(place, f"{name}.transpose(1, 2)"),
        passes=True,
    )


def _call(place: Place) -> str:
    return f"attention = {_module(place.path)}.source.{place.operation}  # (module, q, k, v, ...)"


def _given_to_attention(place: Place, value: str) -> tuple[str, str]:
    assert isinstance(place.key, int)
    given = f"(*given[:{place.key}], {value}, *given[{place.key + 1}:])"
    return "given, options = attention.inputs", f"attention.inputs = ({given}, options)"


def _weights(spot: Spot) -> Stop:
    """Scores and patterns, ``[batch, head, dest, src]``, inside attention computed step by step."""
    place, name, allowed = spot.place, spot.name, f"allowed_{spot.layer}"
    scores = spot.architecture.place("scores", spot.layer)
    found = "step.output" if place.side == "output" else f"step.inputs[0][{place.key}]{_listed(place)}"
    mask = f"{allowed} = step.inputs[0][{scores.key}]{_listed(scores)} > torch.finfo({spot.architecture.dtype}).min / 2"
    if place.side == "output":
        back: tuple[str, ...] = (f"step.output = {name}",)
    else:
        given = f"[{name}, *given[0][1:]]" if _listed(place) else name
        back = "given, options = step.inputs", f"step.inputs = (({given}, *given[1:]), options)"
    return Stop(
        place.order,
        f"{found}.clone()",
        "batch, head, dest, src",
        (f"step = {_step(place)}",),
        (f"{name} = torch.where({allowed}, {name}, {found})  # masked keys stay",),
        back,
        ((scores.order, (f"step = {_step(scores)}", mask)),) if spot.edited else (),
        passes=True,
    )


def _step(place: Place) -> str:
    """A call inside attention, or inside one of its calls."""
    return f"{_module(place.path)}.source.{place.operation.replace('.', '.source.')}"


def _listed(place: Place) -> str:
    """Whether the value is the first of a list that is put together: the scores, with an attention sink behind them."""
    return "[0]" if place.operation.endswith("cat_0") and place.side == "input" else ""


APART = '''\
def apart(norm, x):
    """A norm's input x [batch, pos, d_model] weighted, but not divided yet; what it is divided by; the norm's bias."""
    bias = norm(torch.zeros_like(x)).float()
    if torch.allclose(norm(torch.ones_like(x)).float(), bias, atol=1e-3):  # it subtracts the mean
        x = x - x.mean(-1, keepdim=True)
    size = x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    weighted = (norm((100 / size * x).to(x)) - bias) * size  # at the size 100 the norm's eps is nothing
    scale = weighted.square().sum(-1, keepdim=True) / (weighted * (norm(x) - bias)).sum(-1, keepdim=True)
    return weighted, scale.nan_to_num(1.0), bias
'''


def _reading(spot: Spot) -> tuple[str, str, Place, Moments]:
    """What a norm takes: its variable, the norm, where what the norm gives is written, and when it is taken."""
    look = spot.architecture.scaled if spot.name.endswith("_scale") else spot.architecture.reader
    stream, norm, place = look(spot.name, spot.layer)
    verb, branch = "writes" if "_out" in spot.name else "reads", "mlp" if spot.name.startswith("mlp") else "attn"
    variable = "final_reads" if spot.name == "logits_in_scale" else f"{branch}_{verb}_{spot.layer}"
    return variable, norm, place, ((stream.order, (f"{variable} = {_passing(stream, spot.rows)}.clone()",)),)


def _normed(norm: str, value: str) -> str:
    return f"{_module(norm)}({value})" if norm else value


def _reader(spot: Spot) -> Stop:
    """The stream that enters a branch's norm, edited for that branch alone."""
    variable, norm, place, first = _reading(spot)
    back = _put(place, _normed(norm, spot.name), 1, spot.rows)
    return Stop(place.order, variable, "batch, pos, d_model", back=back, first=first)


def _split_reader(spot: Spot) -> Stop:
    """The stream once for each head; other rows read the edited ones, and queries, keys or values come from those."""
    variable, norm, place, first = _reading(spot)
    made = SPLIT_READERS[spot.name]
    call, kind = spot.architecture.place(made, spot.layer), COMPONENTS[spot.name].unit
    back: tuple[str, ...] = ()
    if spot.shadows:
        several = "other rows of the batch" if len(spot.shadows) > 1 else "another row of the batch"
        taken = [(row, along(heads, len(heads) == 1, spot.units)) for row, heads in spot.shadows]
        back = (
            f"# The heads of a row read one stream, so this one is read by {several}, from which {made} is then taken.",
            *(f"{variable}[{row}] = {spot.name}[0, :, {heads[0]}]" for row, heads in spot.shadows),
            *_put(place, _normed(norm, variable), 1, spot.rows),
        )
        lines = (
            _call(call),
            f"{made} = attention.inputs[0][{call.key}].clone()  # [batch, {kind}, pos, d_head]",
            *(f"{made}[0, {at}] = {made}[{row}, {at}]" for row, at in taken),
            *_given_to_attention(call, made),
        )
        first = (*first, (call.order, lines))
    value = f"{variable}[:, :, None].repeat(1, 1, {spot.units}, 1)"
    return Stop(place.order, value, f"batch, pos, {kind}, d_model", back=back, first=first)


def _scale(spot: Spot) -> Stop:
    """What a norm divides by: the norm is written out behind the division."""
    variable, norm, place, first = _reading(spot)
    return Stop(
        place.order,
        "scale",
        "batch, pos, 1",
        (f"weighted, scale, bias = apart({_module(norm)}, {variable})",),
        back=_put(place, f"(weighted / {spot.name} + bias).to({variable})", 1, spot.rows),
        first=first,
        defines=(APART,),
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


def _head_out(spot: Spot) -> Stop:
    """Each head's z through the output projection alone; a changed head changes the sum of all by as much."""
    how, out = spot.architecture.head_projection(spot.layer), spot.architecture.place("attn_out", spot.layer)
    z = _z(replace(spot, name="z"))
    asides = [(z.order, (f"z_{spot.layer} = {z.value}",))]
    factor = _times(out.scale)
    defines = [HEADS]
    if how.post_norm:
        # A norm without submodules starts one tick before it ends.
        asides.append((out.order - 1, (f"factor_{spot.layer} = frozen({_module(how.post_norm)})",)))
        factor += f" * factor_{spot.layer}"
        defines.append(FROZEN)
    before = (f"each = heads({_module(how.projection)}, z_{spot.layer}){factor}",)
    after = f"attn_out = {_passing(out, spot.rows)} + ({spot.name} - each).sum(2){_over(out.scale)}"
    return Stop(
        out.order,
        "each.clone()",
        "batch, pos, head, d_model",
        before,
        back=(after, *_put(out, "attn_out", 1, spot.rows)),
        asides=tuple(asides),
        defines=tuple(defines),
    )


def _resid_mid(spot: Spot) -> Stop:
    """No module gives it: the stream entering the block plus what attention adds, and written as the latter."""
    stream, out = spot.architecture.stream(spot.layer), spot.architecture.place("attn_out", spot.layer)
    name, entering = spot.name, f"entering_{spot.layer}"
    value = f"({name} - {entering})" if out.scale != 1 else f"{name} - {entering}"
    return Stop(
        out.order,
        f"{entering} + {_passing(out, spot.rows)}{_times(out.scale)}",
        "batch, pos, d_model",
        back=_put(out, value, rows=spot.rows),
        asides=((stream.order, (f"{entering} = {_read(stream, spot.rows)}",)),),
    )


def _logits(spot: Spot) -> Stop:
    """The end of the forward: what is read of them is the edited copy."""
    return Stop(float("inf"), "model.output.logits.clone()", "batch, pos, vocab")


STOPS: dict[str, Callable[[Spot], Stop]] = {
    "embed": _plain,
    "resid_pre": _plain,
    "attn_in": _reader,
    "q_in": _split_reader,
    "k_in": _split_reader,
    "v_in": _split_reader,
    "attn_in_scale": _scale,
    "q": _taken_by_attention,
    "k": _taken_by_attention,
    "v": _taken_by_attention,
    "scores": _weights,
    "pattern": _weights,
    "z": _z,
    "attn_out_scale": _scale,
    "head_out": _head_out,
    "attn_out": _plain,
    "cross_attn_out": _plain,
    "resid_mid": _resid_mid,
    "mlp_in": _reader,
    "mlp_in_scale": _scale,
    "router_logits": _plain,
    "experts_out": _plain,
    "mlp_act": _plain,
    "mlp_out_scale": _scale,
    "mlp_out": _plain,
    "resid_post": _plain,
    "logits_in": _plain,
    "logits_in_scale": _scale,
    "logits": _logits,
}


def _module(path: str) -> str:
    """A module's path as attribute access."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))


def _at(place: Place) -> str:
    """A place's module, or the call inside its forward."""
    return _module(place.path) + "".join(f".source.{name}" for name in place.operation.split(".") if name)


def _passing(place: Place, rows: int = 1) -> str:
    """What passes by at a place, with rows and positions apart."""
    module = _at(place)
    if place.side == "output":
        found = f"{module}.output" + ("" if place.key is None else f"[{place.key!r}]")
    elif place.key is None:
        found = f"{module}.input"
    else:
        found = f"{module}.inputs[{int(isinstance(place.key, str))}][{place.key!r}]"
    apart = "[None]" if rows == 1 else f".unflatten(0, ({rows}, -1))"
    return found + (apart if place.flat else "")  # rows and positions are one dim there


def _read(place: Place, rows: int = 1) -> str:
    found = _passing(place, rows)
    return f"{found}.clone()" if place.scale == 1 else f"({found}{_times(place.scale)})"


def _put(place: Place, value: str, scale: float = 0, rows: int = 1) -> tuple[str, ...]:
    """The lines that replace what passes by."""
    value += _over(scale or place.scale)
    if place.flat:
        value = (f"({value})" if " " in value else value) + ("[0]" if rows == 1 else ".flatten(0, 1)")
    module, key = _at(place), place.key
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
