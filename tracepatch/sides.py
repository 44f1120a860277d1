"""The runs that gradients take, for pairs of the same lengths: unpatched and edited worlds, backwards, contractions.

Operations are made here and taken as those of a plan are, in this process or on a server. Nothing is pruned: gradients
are of whole prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tracepatch.architecture import Architecture
from tracepatch.backward import MOVED
from tracepatch.costs import backward_bytes, kept_bytes
from tracepatch.errors import MeasurementError, MetricError, listing, plural
from tracepatch.forms import unending
from tracepatch.jobs import EAGER, Job, order_of, parts
from tracepatch.layout import Key, Seats, heads_of
from tracepatch.lowering import Lowering
from tracepatch.metrics import Metric
from tracepatch.models import Model, module_of, name_of, remote_of, room_of
from tracepatch.plan import Group, Plan, Reading
from tracepatch.planner import MEMORY, world_job
from tracepatch.profiles import profile_of, require_given
from tracepatch.reach import layers_of
from tracepatch.references import ReferenceWorld, Survey
from tracepatch.remote import There
from tracepatch.rows import EditedWorld
from tracepatch.slopes import LINE, Between, Slopes
from tracepatch.sources import WorldName
from tracepatch.steps import Here, Step, Taken
from tracepatch.surveying import surveyed
from tracepatch.surveys import cost
from tracepatch.tokens import EncodedPairs
from tracepatch.traced import Call, Tracer
from tracepatch.weights import frozen

Op: TypeAlias = tuple[tuple[Any, ...], Call | None]

_MUTATING: set[type] = set()  # classes of models that change tensors in place after they have passed by
INPLACE = ("modified by an inplace operation", "used in an in-place operation")  # as autograd says it


class _MovedError(MeasurementError):
    """The model changes tensors in place: what is differentiated by must be copies."""


class Sides:
    """Makes the operations for one model, set of pairs and metrics.

    Attributes:
        architecture: Of the model.
        encoded: The pairs.
        metrics: What is differentiated.
        worlds: The pristine worlds that are run, without those that are only differentiated.
        edited: Worlds with standing edits.
        columns: Of the metrics' values, where each metric's own stands.
    """

    def __init__(
        self,
        model: Model,
        architecture: Architecture,
        encoded: EncodedPairs,
        metrics: tuple[Metric, ...],
        worlds: Sequence[WorldName],
        edited: Sequence[EditedWorld] = (),
        wanted: Iterable[Key] = (),
        memory: int | None = None,
        references: Sequence[ReferenceWorld] = (),
        surveys: Sequence[Survey] = (),
    ) -> None:
        require_given(metrics, encoded)
        jumping = [metric.name for metric in metrics if not metric.differentiable]
        if jumping:
            raise MetricError(
                f"{', '.join(jumping)} jumps, so that no gradient leads through it: estimate a metric that changes "
                "smoothly, such as tp.logit_diff, or measure this one with tp.patch."
            )
        self.model, self.architecture, self.encoded, self.metrics = model, architecture, encoded, metrics
        self.worlds, self.edited = tuple(worlds), tuple(edited)
        self._profiles = [profile_of(architecture, encoded, metrics, pair) for pair in range(len(encoded))]
        self._profiles = [replace(profile, pair=n) for n, profile in enumerate(self._profiles)]
        named, others = {world.name: world for world in edited}, {world.name: world for world in references}
        pristine = ("clean",) if encoded.corrupted is None else ("clean", "corrupted")
        self._lowering = [Lowering(architecture, p, False, pristine, named, others) for p in self._profiles]
        self._memory = memory or room_of(model) or MEMORY
        widths = np.cumsum([0, *(1 + len(m.parts) for m in metrics)])
        self.columns = tuple(int(n) for n in widths[:-1])
        reads_logits = any(m.site is None for m in metrics)
        reached = {layers_of(architecture, name, layer) for name, layer in wanted}
        reached |= {
            layers_of(architecture, r.component, r.layer) for p in self._profiles for seen in p.seen for r in seen
        }
        whole = reads_logits or not reached or bool(unending(model, architecture))
        until = 1 << 30 if whole else max(1, *reached)
        self.plan = Plan(
            model=name_of(model),
            layers=len(architecture),
            rows=(),
            pairs=len(encoded),
            worlds=self.worlds,
            metrics=metrics,
            groups=(),
            proofs=np.zeros((0, len(encoded)), np.int8),
            twins=np.zeros((0, len(encoded)), np.int64),
            row_bytes=0,
            budget=self._memory,
            edited=self.edited,
            until=until,
            references=tuple(references),
            surveys=tuple(surveys),
        )
        self.tracer = Tracer(model, architecture, encoded, self.plan)
        self._surveyed = sum(cost(architecture, survey) for survey in surveys) / len(encoded)
        self.counted: dict[str, float] = defaultdict(float)  # forwards and backwards, in prompts
        self.counted["forwards"] = self._surveyed

    @property
    def cost(self) -> str:
        """What was run so far, in words: forwards and backwards of a prompt, a pair."""
        counts = []
        for word in ("forward", "backward"):
            number = self.counted[f"{word}s"]
            whole = abs(number - round(number)) < 1e-6
            counts.append(plural(round(number), word) if whole else f"{number:.1f} {word}s")
        return f"{' and '.join(counts)} a pair"

    def groups(self, keys: Iterable[Key], rows: int = 1) -> Iterator[Group]:
        """Pairs of the same lengths, as many as the memory allows with these components kept, and so many rows each."""
        keys = list(keys)
        alike: dict[Any, list[int]] = defaultdict(list)
        for pair, profile in enumerate(self._profiles):
            lengths = profile.alignment.clean.length, profile.alignment.corrupted.length
            read = tuple(len(side[pair]) for side in self.encoded.encoder)
            alike[lengths, read, profile.scored, profile.seen].append(pair)
        for (lengths, *_), pairs in sorted(alike.items(), key=lambda item: item[0][:2]):
            most = max(1, int(self._memory // max(1, self.pair_bytes(keys, max(lengths), rows))))
            for several in parts(pairs, lambda pair: 0, most):
                yield self.group(several)

    def group(self, pairs: Sequence[int]) -> Group:
        """Some pairs of the same lengths."""
        profile = self._profiles[pairs[0]]
        clean, corrupted = (
            Reading(profile.alignment.side(root).length, profile.reads_of(root), profile.seen_of(root))
            for root in ("clean", "corrupted")
        )
        edited = tuple(tuple(world_job(self._lowering[pair], pair, world) for pair in pairs) for world in self.edited)
        return Group(
            clean.length,
            tuple(pairs),
            clean.reads,
            frozenset(),
            (),
            edited,
            seen=clean.seen,
            corrupted=None if profile.shared else corrupted,
        )

    def pair_bytes(self, keys: Iterable[Key], length: int, rows: int = 1) -> int:
        """Memory of one pair: what a backward keeps of each layer, and values and gradients of components."""
        kept = sum(kept_bytes(self.architecture, name, layer, length) for name, layer in keys)
        reads = max(len(self._profiles[0].reads_of(root)) for root in ("clean", "corrupted"))
        layer_bytes, logits = backward_bytes(self.architecture, length), 3 * reads * self.architecture.vocab * 4
        return int(rows * (layer_bytes + logits + kept) + 3 * kept)

    # ------------------------------------------------------------------------------------------------ operations

    def known(self, group: Group, keep: Iterable[Key]) -> list[Op]:
        """Runs reference prompts, the unpatched worlds of pairs, then the edited ones; keeps some of their values."""
        keep = sorted({*keep, *(key for w in self._writes(group) for key in w.needed)})
        late = [m for m in self.metrics if m.compares]
        direct = [m for m in self.metrics if not m.compares]
        ops: list[Op] = [(op, None) for op in surveyed(self.tracer)]
        pristine = [Job(-1, pair, world, (), 0, 0) for pair in group.pairs for world in self.worlds]
        for jobs in (pristine, *group.edited):
            if not jobs:
                continue
            split = parts(jobs, partial(self.tracer.alike, group), len(jobs))
            for part in split:
                call = self.tracer.call(group, part, direct, keep=keep, keep_logits=bool(late))
                ops.append((("run", call.run, "piece"), call))
            order = order_of(jobs, split)
            joined = self.tracer.joined(group, jobs, late)
            ops.append((("join", None if order is None else torch.tensor(order), *joined), None))
            self.counted["forwards"] += len(jobs) / len(self.encoded)
        return ops

    def backward(
        self,
        group: Group,
        base: WorldName,
        slopes: Slopes,
        wanted: Sequence[Key],
        *,
        drops: Sequence[Sequence[Any]] = (),
        values: bool = True,
        jobs: Sequence[Job] | None = None,
        line: tuple[Key, torch.Tensor, torch.Tensor] | None = None,
        steps: tuple[int, float] | None = None,
        edges: Between | None = None,
    ) -> Op:
        """A forward of one world, or of other jobs, with backwards of all metrics.

        Args:
            group: The pairs.
            base: The world; an edited one has its standing edits.
            slopes: What is held, and how gradients pass.
            wanted: The components, ``resid_post`` and ``logits_in`` as ``resid_pre`` of the layer above.
            drops: The taps that are zeroed together, for each of several further backwards.
            values: Whether values are wanted too.
            jobs: Other rows than one a pair.
            line: The component, and for each row the world and the weight of its value there.
            steps: Where rows are steps of an integral, their number and weight; see ``backward.backward``.
            edges: The edges that are wanted too.
        """
        jobs = self.unpatched(group, base) if jobs is None else jobs
        slopes.copies = slopes.copies or type(module_of(self.model)) in _MUTATING
        tasks, how = slopes.asked([*wanted, *(edges.touched if edges else ())])
        if line is not None:
            (name, layer), worlds, weights = line
            heads = heads_of(self.architecture, name, layer)
            place = self.architecture.stream(layer) if name == "resid_pre" else self.architecture.place(name, layer)
            moved = LINE, ("line", (name, layer), worlds, weights, heads, place.scale)
            tasks = {**tasks, place: [moved, *tasks.get(place, ())]}
        scales = [key for key in slopes.written if key in {w for _, w in _scales(how)}]
        call = self.tracer.call(group, jobs, self.metrics, keep=scales, slopes=tasks)
        call = replace(call, once=call.once - self._called())
        share = len(jobs) / len(self.encoded)
        self.counted["forwards"] += share
        self.counted["backwards"] += share * len(self.metrics) * (1 + len(drops))
        between = None if edges is None else edges.asked(self.architecture, dict(how))
        asked = base, how[: len(wanted)], self.columns, tuple(map(tuple, drops)), values, steps, between
        return ("backward", call.run, asked), call

    def values(self, ops: Sequence[Op], found: Sequence[Any]) -> Iterator[tuple[Job, NDArray[np.float64]]]:
        """Of each run of a world, the metrics' own values ``[metric]``; steps of integrals are none."""
        late = [m.compares for m in self.metrics]
        pieces: list[torch.Tensor] = []
        jobs: list[Job] = []
        for (op, call), given in zip(ops, found, strict=True):
            if op[0] == "backward" and call is not None and op[2][5] is None:
                own = given[0].double().numpy()[:, list(self.columns)]
                yield from zip(call.jobs, own, strict=True)
            elif op[0] == "run" and call is not None:
                pieces.append(given[0])
                jobs += call.jobs
            elif op[0] == "join":
                order = range(len(jobs)) if op[1] is None else op[1].tolist()
                direct = torch.cat(pieces).double().numpy()[list(order)]
                own = np.zeros((len(jobs), len(self.metrics)))
                starts = [0, 0]
                for number, metric in enumerate(self.metrics):
                    which = late[number]
                    own[:, number] = (given.double().numpy() if which else direct)[:, starts[which]]
                    starts[which] += 1 + len(metric.parts)
                yield from zip((jobs[i] for i in order), own, strict=True)
                pieces, jobs = [], []

    def seats(self, group: Group, root: WorldName) -> Seats:
        """Where what is known of each pair's worlds stands, for runs of its clean or corrupted prompts."""
        return Seats(self.tracer.places(group), group.of(root).length)

    @staticmethod
    def unpatched(group: Group, base: WorldName) -> list[Job]:
        """The runs of a world, one a pair; of an edited one with its standing edits."""
        standing = [job for world in group.edited for job in world if job.base == base]
        return standing or [Job(-1, pair, base, (), 0, 0) for pair in group.pairs]

    def where(self, group: Group, world: WorldName) -> torch.Tensor:
        """Where each pair's run of a world stands in what is known."""
        order = {run: i for i, run in enumerate(self.tracer.order(group))}
        return torch.tensor([order[pair, world] for pair in group.pairs])

    def settled(self, group: Group, world: WorldName, keys: Iterable[Key]) -> tuple[Any, ...]:
        """The contraction that makes values kept of a world's run those that differences are taken from."""
        apart = group.corrupted is not None
        length = group.of(self.tracer.roots.get(world, world)).length if apart else None
        return "settle", world, self.where(group, world), tuple(keys), length

    def agreeing(self, group: Group, base: WorldName) -> torch.Tensor | None:
        """Before which position the two worlds of each pair are the same ``[row]``; ``None`` where that is not proved.

        Where other positions correspond, of each position of the base its partner in the other prompt ``[row, pos]``,
        and -1 where it has none, or both are the same.
        """
        proved = self.architecture.causal and not self.encoded.encoder
        profiles = [self._profiles[pair] for pair in group.pairs]
        if any(profile.alignment.mapped for profile in profiles):
            return torch.tensor([profile.changing(base, proved, self.architecture.extends) for profile in profiles])
        return torch.tensor([profile.first for profile in profiles]) if proved else None

    def alone(self, group: Group, base: WorldName) -> NDArray[np.bool_] | None:
        """Which positions of the base have no partner ``[row, pos]``; ``None`` where all positions correspond."""
        sides = [self._profiles[pair].alignment.side(base) for pair in group.pairs]
        mapped = any(side.aligned is not None for side in sides)
        return np.array([[q is None for q in side.met] for side in sides]) if mapped else None

    def _writes(self, group: Group) -> Iterator[Any]:
        return (write for world in group.edited for job in world for write in job.writes)

    def _called(self) -> frozenset[str]:
        """The modules that a backward may call itself."""
        branches = [s for layer in self.architecture.layers for s in layer.sublayers]
        paths = {path for s in branches for path in (s.pre_norm, s.post_norm, s.projection)}
        return frozenset({*paths, self.architecture.final_norm})

    def take(
        self,
        groups: Iterable[Group],
        build: Callable[[Group], list[Op]],
        read: Callable[[Group, list[Op], list[Any]], None],
        *,
        eager: bool,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Runs the operations of each group, and reads what they return.

        Args:
            groups: Of pairs.
            build: The operations of a group.
            read: Is given a group, its operations, and what each of them returned.
            eager: Whether attention must be computed step by step.
            say: Is told how a request stands.

        Raises:
            MeasurementError: A run failed, or a metric is not finite.
            ServerError: The server cannot be reached, or does not do what it is asked.
        """
        eager = eager or any(m.site is not None and m.site.component in EAGER for m in self.metrics)
        here = not remote_of(self.model)
        runner = Here(self.model, self.architecture, eager) if here else There(self.model, eager, say)
        asked = list(groups)
        with runner.ready(), frozen(module_of(self.model)):
            try:
                runner.go((self._step(group, build, read), ()) for group in asked)
            except _MovedError:
                _MUTATING.add(type(module_of(self.model)))
                self.counted.clear()
                self.counted["forwards"] = self._surveyed
                runner.go((self._step(group, build, read), ()) for group in asked)

    def _step(
        self, group: Group, build: Callable[[Group], list[Op]], read: Callable[[Group, list[Op], list[Any]], None]
    ) -> Step:
        ops = build(group)

        def digest(taken: list[Taken]) -> None:
            for step, found in taken:
                (own,) = {id(call.group): call.group for _, call in step.ops if call is not None}.values()
                self._look(step, found)
                read(own, list(step.ops), found)

        def smaller() -> list[Step]:
            half = len(group.pairs) // 2
            halves = (group.pairs[:half], group.pairs[half:]) if half else ()
            return [self._step(self.group(pairs), build, read) for pairs in halves]

        return Step(tuple(ops), partial(self._failed, ops), digest, smaller)

    def _look(self, step: Step, found: list[Any]) -> None:
        """Refuses metrics that are not finite."""
        bad = []
        for (_, call), given in zip(step.ops, found, strict=True):
            if call is None:
                continue
            for job, row in zip(call.jobs, given[0], strict=False):
                if not bool(row.isfinite().all()):
                    bad.append(f"pair {job.pair}, the {job.base} run: {', '.join(f'{v:g}' for v in row.tolist())}")
        if bad:
            raise MeasurementError(
                f"The metric is not finite in some runs.\n{listing(bad)}\nLook at the metric, and at the model's dtype "
                "(float16 overflows in some models; try bfloat16 or float32)."
            )

    def _failed(self, ops: Sequence[Op], number: int, error: Exception) -> MeasurementError:
        if any(words in str(error) for words in (MOVED, *INPLACE)):
            return _MovedError(MOVED)
        call = next(call for _, call in (*reversed(ops[: number + 1]), *ops[number:]) if call is not None)
        return self.tracer.failed(call, error, ops[number][0])


def _scales(how: Iterable[tuple[Key, tuple[Any, ...]]]) -> Iterator[tuple[Key, Any]]:
    """The norms' scales that gradients need as they were written, each with whose."""
    for key, (kind, *given) in how:
        held = given[-1] if kind in ("reader", "heads") else None
        if isinstance(held, tuple):
            yield key, held
