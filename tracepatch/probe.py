"""Where the activations of a model live, found by one tiny forward and proved by closing the residual sum.

No table of models: a forward on a few random tokens is recorded module by module. What a block adds to the residual
stream is the first of (the sublayer's last projection, its module, the norm that consumes either) for which
``stream + contribution == next stream`` holds bitwise in the model's own dtype, or, where a norm stands on the stream
itself, ``norm(stream + contribution) == next stream``. Names are not trusted: in 33 of 63 architecture variants
``post_attention_layernorm`` is the norm before the MLP, and modules called attention return the residual stream, are
mutated in place, or are followed by another norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from einops import rearrange, repeat
from torch import nn

from tracepatch.calls import ENCODED, Attended, Call, Place, floats


@dataclass(frozen=True)
class Sublayer:
    """An attention, an MLP or another branch of a block.

    Attributes:
        kind: ``attn``, ``cross`` (attends to an encoder), ``mixer`` (mixes positions without softmax attention),
            ``mlp`` or ``moe``.
        path: Its module; the block itself where it has none of its own.
        out: What it adds to the stream, if that was proved.
        inner: The input of its last projection: z, or the neurons.
        projection: That projection.
        pre_norm: The norm that it reads through.
        post_norm: The norm between it and the stream.
        stream_norm: The norm on the stream after it: what follows is not stream + out, but the norm of that.
        heads: Query heads.
        kv_heads: Key and value heads.
        d_head: Width of a head's value.
        tried: What was tried to close the sum, with the errors.
        reads: Where it takes what it reads, after that norm, if that was proved to be the stream's.
        stream: Where that passes by before the norm.
        turn: How many sums of its block come before the one that it adds to; branches that read the same stream share
            it.
        attended: The softmax attention of the probe's prompts, with keys and values as they were before they were
            repeated over their query groups.
    """

    kind: str
    path: str
    out: Place | None = None
    inner: Place | None = None
    projection: str = ""
    pre_norm: str = ""
    post_norm: str = ""
    heads: int = 0
    kv_heads: int = 0
    d_head: int = 0
    tried: tuple[str, ...] = ()
    stream_norm: str = ""
    reads: Place | None = None
    stream: Place | None = None
    turn: int = 0
    attended: Attended | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Layer:
    """One block of the stack.

    Attributes:
        index: Its number.
        path: Its module.
        block: Its class.
        form: ``sequential``, ``parallel`` or, where the sum does not close, ``unproved``.
        pre: The stream entering it.
        post: The stream leaving it.
        sublayers: Its branches, in the order in which they run.
        error: Largest error of the residual sum; 0 where it closes bitwise.
        width: Neurons of its MLP.
    """

    index: int
    path: str
    block: str
    form: str
    pre: Place
    post: Place
    sublayers: tuple[Sublayer, ...]
    error: float
    width: int = 0

    def sublayer(self, *kinds: str) -> Sublayer | None:
        """The first branch of one of these kinds."""
        for sublayer in self.sublayers:  # asked several times for each row that is recorded
            if sublayer.kind in kinds:
                return sublayer
        return None


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and a.shape[-1] == b.shape[-1]
        and torch.equal(a.reshape(-1), b.reshape(-1))
    )


def resolution(dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause in one sum of this dtype."""
    return 2e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps


def _is_linear(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 2
        and not isinstance(call.module, nn.Embedding)
        and call.entering is not None
        and call.leaving is not None
        and {call.entering.shape[-1], call.leaving.shape[-1]} == set(weight.shape)
    )


def _has_experts(call: Call) -> bool:
    return any(p.ndim == 3 and p.shape[0] > 1 for p in call.module.parameters(recurse=False))


def is_norm(call: Call, width: int) -> bool:
    """Whether a call is a norm: it changes values, keeps their shape, and has no matrix."""
    inp, out = call.entering, call.leaving
    if inp is None or out is None or not inp.shape[-1] == out.shape[-1] == width or inp.numel() != out.numel():
        return False
    if _same(inp, out) or any(p.ndim >= 2 for p in call.module.parameters()):
        return False
    named = "norm" in (type(call.module).__name__ + call.name.rsplit(".", 1)[-1]).lower()
    return named or any(p.numel() == width for p in call.module.parameters())


def _mixes_positions(call: Call) -> bool:
    """Whether the output at the last position moves when the input at the one before it does."""
    (key, x), (args, kwargs) = call.inputs[0], call.raw
    bumped = x.clone()
    bumped[:, -2] += torch.randn(bumped[:, -2].shape, generator=torch.Generator().manual_seed(0)).to(x)

    def last(value: torch.Tensor) -> torch.Tensor:
        if isinstance(key, int):
            out = call.module(*args[:key], value, *args[key + 1 :], **kwargs)
        else:
            out = call.module(*args, **{**kwargs, str(key): value})
        return next(t for _, t in floats(out)).reshape(*x.shape[:2], -1)[:, -1]

    with torch.no_grad():
        a, b = last(x.clone()), last(bumped)
    return bool((a - b).abs().max() > 1e-5 * a.abs().max())


_Point: TypeAlias = tuple[torch.Tensor, Call | None]
"""A point of the stream, and the norm on the stream that stands there."""


@dataclass(frozen=True)
class Overrides:
    """What a user says about a model that the probe cannot resolve; it goes through the same proof.

    Attributes:
        stack: Path of the list of blocks.
        out: ``attn_out``, ``cross_attn_out`` and ``mlp_out`` as ``path.output``, with ``{layer}`` for the layer.
    """

    stack: str = ""
    out: Mapping[str, str] = field(default_factory=dict)


class Blocks:
    """The recorded forward of a stack of blocks, resolved layer by layer."""

    def __init__(self, calls: list[Call], attended: list[Attended], stack: str, overrides: Overrides) -> None:
        self.calls, self.attended, self.stack, self.overrides = calls, attended, stack, overrides
        self.by_name: dict[str, Call] = {}
        for call in calls:
            self.by_name.setdefault(call.name, call)

    def layer(self, index: int) -> Layer:
        """One block: its branches, what each adds to the stream, and the proof."""
        path = f"{self.stack}.{index}"
        block = self.by_name[path]
        assert block.entering is not None
        assert block.leaving is not None
        x, y = block.entering, block.leaving.reshape(block.entering.shape)
        rows = x[..., 0].numel()
        branches = [_Branch(self, path, calls, kind) for kind, calls in self._branches(block)]
        for branch in branches:
            branch.collect_candidates(self._override(branch.kind, index))
        form, error = _close(x, y, branches)
        act = next((b.inner_width for b in branches if b.kind == "mlp"), 0)
        return Layer(
            index=index,
            path=path,
            block=type(block.module).__name__,
            form=form,
            pre=block.place("input", rows),
            post=block.place("output", rows),
            sublayers=tuple(b.resolved(rows) for b in branches),
            error=error,
            width=act,
        )

    def _override(self, kind: str, index: int) -> str:
        names = {"attn": "attn_out", "mixer": "attn_out", "cross": "cross_attn_out"}
        return self.overrides.out.get(names.get(kind, "mlp_out"), "").format(layer=index)

    def _branches(self, block: Call) -> list[tuple[str, list[Call]]]:
        """The parts of a block that hold weights other than norms', each with the calls inside it."""
        own = [c for c in self.calls if c.under(block.name) and c is not block]
        called = {c.name for c in own} | {block.name}
        assert block.entering is not None
        width = block.entering.shape[-1]

        def parent(call: Call) -> str:
            name = call.name.rsplit(".", 1)[0]
            while name not in called:
                name = name.rsplit(".", 1)[0]
            return name

        queue = [c for c in own if parent(c) == block.name]
        found: list[tuple[str, list[Call]]] = []
        while queue:
            call = queue.pop(0)
            inner = [c for c in own if c.under(call.name)]
            if is_norm(call, width) or not any(_is_linear(c) or _has_experts(c) for c in inner):
                continue
            if self._adds_residual(call, inner):
                queue = [c for c in own if parent(c) == call.name] + queue
                continue
            if _is_linear(call):  # fc1, fc2 without a module around them
                if found and found[-1][0] == "mlp" and all(_is_linear(c) for c in found[-1][1]):
                    found[-1][1].append(call)
                else:
                    found.append(("mlp", [call]))
                continue
            found.append((self._kind(call, inner), inner))
        return found

    @staticmethod
    def _adds_residual(call: Call, inner: list[Call]) -> bool:
        if call.entering is None or call.leaving is None or call.entering.shape != call.leaving.shape:
            return False
        difference = call.leaving - call.entering
        bound = resolution(difference.dtype) * (1 + call.leaving.abs().max())
        return any(
            c is not call
            and c.leaving is not None
            and c.leaving.numel() == difference.numel()
            and bool((c.leaving.reshape(-1) - difference.reshape(-1)).abs().max() <= bound)
            for c in inner
        )

    def _kind(self, call: Call, inner: list[Call]) -> str:
        seen = next((a for a in self.attended if a.name == call.name or a.name.startswith(call.name + ".")), None)
        if seen is not None:
            return "cross" if seen.keys.shape[-2] == ENCODED else "attn"
        if any(_has_experts(c) for c in inner):
            return "moe"
        return "mixer" if call.inputs and call.inputs[0][1].ndim == 3 and _mixes_positions(call) else "mlp"


class _Branch:
    """One branch of a block while it is being resolved."""

    def __init__(self, blocks: Blocks, block: str, calls: list[Call], kind: str) -> None:
        self.blocks, self.block, self.calls, self.kind = blocks, block, calls, kind
        bare = all(_is_linear(c) for c in calls)
        self.path = block if bare else calls[0].name
        self.first, self.module = calls[0], calls[-1] if bare else calls[0]
        assert self.first.entering is not None
        self.width = blocks.by_name[block].entering.shape[-1]  # type: ignore[union-attr]  # a block takes the stream
        last = [c for c in calls if _is_linear(c) and c.leaving is not None and c.leaving.shape[-1] == self.width]
        self.projection = max(last, key=lambda c: c.end, default=None) if kind != "moe" else None
        self.candidates: list[Call] = []
        self.chosen: Call | None = None
        self.scale = 1.0
        self.reads_stream = False
        self.tried: list[str] = []
        self.stream_norm = ""
        self.turn = 0
        own = [c for c in blocks.calls if c.under(block)]
        inside = {id(c) for c in calls}
        self.outside = [c for c in own if id(c) not in inside and c.name != block]
        norms = [c for c in self.outside if is_norm(c, self.width) and c.start < self.first.start]
        self.pre_norm = next((c for c in norms if _same(c.leaving, self.first.entering)), None)

    @property
    def reads(self) -> torch.Tensor:
        """The stream where this branch reads it, before its norm."""
        tensor = self.pre_norm.entering if self.pre_norm else self.first.entering
        assert tensor is not None
        return tensor

    @property
    def inner_width(self) -> int:
        return self.projection.entering.shape[-1] if self.projection and self.projection.entering is not None else 0

    def collect_candidates(self, override: str) -> None:
        """What could be added to the stream: the projection, the module, then whatever consumes either."""
        size = self.blocks.by_name[self.block].entering.numel()  # type: ignore[union-attr]
        if override:
            path = override.removesuffix(".output")
            self.candidates = [
                c for c in self.blocks.calls if c.name == path and c.leaving is not None and c.leaving.numel() == size
            ]
            if not self.candidates:
                self.tried.append(f"{override}: no module of that path gave a tensor of the stream's shape")
            return
        pool = [
            c
            for c in (self.projection, self.module)
            if c is not None and c.leaving is not None and c.leaving.numel() == size
        ]
        for call in self.outside:
            if call.leaving is None or call.leaving.numel() != size or call.start < self.module.end:
                continue
            if any(_same(call.entering, c.leaving) for c in pool):
                pool.append(call)
        self.candidates = list({id(c): c for c in pool}.values())

    def resolved(self, rows: int) -> Sublayer:
        """The branch as a value."""
        out = None
        if self.chosen is not None:
            out = replace(self.chosen.place("output", rows), scale=self.scale)
        found = Sublayer(
            kind=self.kind,
            path=self.path,
            out=out,
            pre_norm=self.pre_norm.name if self.pre_norm else "",
            post_norm=self.chosen.name if self.chosen is not None and is_norm(self.chosen, self.width) else "",
            tried=tuple(self.tried),
            stream_norm=self.stream_norm,
            turn=self.turn,
        )
        if self.reads_stream:
            place = self.first.place("input", rows)
            found = replace(found, reads=place, stream=self.pre_norm.place("input", rows) if self.pre_norm else place)
        if self.projection is None:
            return found
        inner = self.projection.place("input", rows)
        found = replace(found, projection=self.projection.name)
        if self.kind == "mlp":
            return replace(found, inner=inner)
        if self.kind not in ("attn", "cross"):
            return found
        seen = next(a for a in self.blocks.attended if a.name == self.path or a.name.startswith(self.path + "."))
        z = rearrange(seen.z, "row head pos d_head -> row pos (head d_head)")
        entering = self.projection.entering
        assert entering is not None
        kv_heads = max(_different_heads(seen.keys), _different_heads(seen.values))
        exact = z.numel() == entering.numel() and close(z, entering.reshape(z.shape), resolution(z.dtype))
        return replace(
            found,
            inner=inner if exact else None,  # a gate or norm stands between pattern · v and the projection
            heads=seen.heads,
            kv_heads=kv_heads,
            d_head=seen.z.shape[-1],
            attended=replace(
                seen,
                keys=seen.keys[:, :: seen.keys.shape[1] // kv_heads],
                values=seen.values[:, :: seen.values.shape[1] // kv_heads],
            ),
        )


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether activations differ by at most a fraction of their scale."""
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def _different_heads(values: torch.Tensor) -> int:
    """How many different heads there are before they were repeated over their query groups."""
    heads = values.shape[1]
    groups = [n for n in range(heads, 0, -1) if heads % n == 0]
    spread = "row kv_head pos d_head -> row (kv_head n) pos d_head"
    return next(heads // n for n in groups if torch.equal(values, repeat(values[:, ::n], spread, n=n)))


def _close(x: torch.Tensor, y: torch.Tensor, branches: list[_Branch]) -> tuple[str, float]:
    """Chooses each branch's contribution such that the residual sum closes; the block's form and the largest error."""
    if any(branch.reads.numel() != x.numel() for branch in branches):
        return "unproved", float("inf")  # it reads something else than the stream
    current, error = x, 0.0
    group: list[_Branch] = []
    before: list[_Branch] = []
    forms: list[str] = []
    for i, branch in enumerate(branches):
        group.append(branch)
        branch.reads_stream, branch.turn = _same(branch.reads, current), len(forms)
        later = branches[i + 1] if i + 1 < len(branches) else None
        if later is not None and (_same(later.reads, current) or _same(later.first.entering, branch.first.entering)):
            continue  # it reads the same stream: a parallel branch
        target = y if later is None else later.reads.reshape(x.shape)
        gap = _close_group(_starts(current, before, group), _ends(target, later, group), before, group)
        forms.append("unproved" if gap is None else "parallel" if len(group) > 1 else "sequential")
        error = max(error, float("inf") if gap is None else gap)
        current, before, group = target, group, []
    if not branches:
        return ("sequential", 0.0) if torch.equal(x, y) else ("unproved", float("inf"))
    return next((f for f in ("unproved", "parallel") if f in forms), "sequential"), error


def _starts(current: torch.Tensor, before: list[_Branch], group: list[_Branch]) -> list[_Point]:
    """Where the sum may start: at the stream or, after the first branch, at the norm of it that this branch reads."""
    points: list[_Point] = [(current, None)]
    norm = group[0].pre_norm
    if before and norm is not None and norm.leaving is not None and _same(norm.entering, current):
        points.append((norm.leaving.reshape(current.shape), norm))
    return points


def _ends(target: torch.Tensor, later: _Branch | None, group: list[_Branch]) -> list[_Point]:
    """Where the sum may end: at the stream or, where the block ends, before a norm that gives the stream."""
    points: list[_Point] = [(target, None)]
    if later is None:
        norms = (c for c in group[0].outside if is_norm(c, group[0].width) and _same(c.leaving, target))
        points += [(c.entering.reshape(target.shape), c) for c in norms if c.entering is not None]
    return points


def _close_group(starts: list[_Point], ends: list[_Point], before: list[_Branch], group: list[_Branch]) -> float | None:
    combinations = list(itertools.product(*[b.candidates for b in group]))
    for (start, norm_before), (end, norm_after), combination in itertools.product(starts, ends, combinations):
        parts = [c.leaving.reshape(start.shape) for c in combination if c.leaving is not None]
        if any(torch.equal(total, end) for total in _sums(start, parts)):
            _choose(group, combination, [1.0] * len(group))
            _norms_on_stream(norm_before, norm_after, before, group)
            return 0.0
    start, end = starts[0][0], ends[0][0]
    for combination in combinations:  # the contribution may be scaled by a constant
        parts = [c.leaving.reshape(start.shape) for c in combination if c.leaving is not None]
        fitted = _fit(end.double() - start.double(), parts)
        # A multiplier in a config has few digits; with the true one the sum closes to the last bit.
        for digits in range(1, 7):
            scales = [float(f"{s:.{digits}g}") for s in fitted]
            if any(
                torch.equal(total, end) for total in _sums(start, [p * s for p, s in zip(parts, scales, strict=True)])
            ):
                _choose(group, combination, scales)
                return 0.0
        gap = (
            (end.double() - start.double() - sum(p.double() * s for p, s in zip(parts, scales, strict=True)))
            .abs()
            .max()
        )
        if gap <= resolution(start.dtype) * end.abs().max():
            _choose(group, combination, scales)
            return gap.item()
        for branch, call in zip(group, combination, strict=True):
            branch.tried.append(f"{call.name}.output leaves the sum open by {gap:.2g}")
    return None


def _sums(start: torch.Tensor, parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The sum in every order of addition that a block might use."""
    if len(parts) == 1:
        yield start + parts[0]
    elif len(parts) == 2:
        yield parts[0] + parts[1] + start
        yield start + parts[0] + parts[1]
        yield start + parts[1] + parts[0]


def _norms_on_stream(first: Call | None, last: Call | None, before: list[_Branch], group: list[_Branch]) -> None:
    """Notes the norms that stand on the stream itself, before and after a group: x = norm(x + f(x))."""
    if first is not None:
        for branch in before:
            branch.stream_norm = first.name
    for branch in group:
        branch.pre_norm = None if branch.pre_norm is first else branch.pre_norm
        branch.stream_norm = last.name if last is not None else ""


def _choose(group: list[_Branch], combination: tuple[Call, ...], scales: list[float]) -> None:
    for branch, call, scale in zip(group, combination, scales, strict=True):
        branch.chosen, branch.scale = call, scale


def _fit(target: torch.Tensor, parts: list[torch.Tensor]) -> list[float]:
    """The multiples of the parts whose sum is nearest to a target."""
    matrix = torch.stack([p.reshape(-1).double() for p in parts], 1)
    wanted = target.reshape(-1)
    if not (matrix.isfinite().all() and wanted.isfinite().all()):
        return [1.0] * len(parts)
    return [float(s) for s in torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]]
