"""Where a backward must look so that it finds the gradients of components: taps, rules and stops at a model's places.

What leaves this module is plain columns, as ``backward`` takes them; nothing is computed here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tracepatch.architecture import Architecture
from tracepatch.calls import Place
from tracepatch.errors import ComponentError, RecipeError
from tracepatch.jobs import EAGER
from tracepatch.layout import LAST, Key, heads_of, keep_before
from tracepatch.sites import SCALES, SPLIT_READERS, component

Tasks: TypeAlias = dict[Place, list[tuple[int, tuple[Any, ...]]]]
"""Place → ``(when, task)``, as ``layout.stops`` takes them."""
LINE, RULE, TAP = 90, 101, 102  # a line comes before edits of the stream between; rules, then taps, after everything
RULES = ("norm", "identity", "half", "pattern")


@dataclass
class Slopes:
    """What a backward looks at.

    Attributes:
        architecture: Of the model.
        held: What is constant in the backward pass: ``"norms"``, ``"pattern"``, or (component, layer).
        rules: Of ``RULES``: how gradients pass what is not linear.
        written: Norms' scales that the world itself holds at written values.
        copies: Whether taps are copies, as the model changes tensors in place.
    """

    architecture: Architecture
    held: frozenset[Any] = frozenset()
    rules: frozenset[str] = frozenset()
    written: frozenset[Key] = frozenset()
    copies: bool = False
    _tasks: Tasks = field(default_factory=lambda: defaultdict(list))

    def asked(self, wanted: Iterable[Key]) -> tuple[Tasks, tuple[tuple[Key, tuple[Any, ...]], ...]]:
        """The tasks at each place, and of each component how its gradient is found; see ``backward.found_at``."""
        self._tasks = defaultdict(list)
        for name, layer in self._stopped():
            self._hold(name, layer)
        for layer in range(len(self.architecture)):
            self._rules(layer)
        found = tuple(((name, layer), self._how(name, layer)) for name, layer in wanted)
        return {place: list(dict.fromkeys(tasks)) for place, tasks in self._tasks.items()}, found

    @property
    def eager(self) -> bool:
        """Whether attention must be computed step by step for what is held."""
        return any(name in EAGER for name, _ in self._stopped())

    # ------------------------------------------------------------------------------------------------ what is wanted

    def _tap(self, place: Place, key: Any) -> Any:
        self._tasks[place].append((TAP, ("tap", key, self.copies)))
        return key

    def _aside(self, place: Place, key: Any, when: int) -> Any:
        self._tasks[place].append((when, ("aside", key)))
        return key

    def _how(self, name: str, layer: int) -> tuple[Any, ...]:
        architecture = self.architecture
        if name == "resid_pre":
            place = architecture.stream(layer)
            return "plain", self._tap(place, (name, layer)), 0, place.scale
        if name == "resid_mid":
            place = architecture.place("attn_out", layer)
            stream = self._aside(architecture.layers[layer].pre, ("stream", layer), LINE)
            return "middle", self._tap(place, ("attn_out", layer)), stream, place.scale
        if name in EAGER:
            return "weights", self._tap(architecture.place(name, layer), (name, layer))
        if name in ("attn_in", "mlp_in"):
            stream, norm, place = architecture.reader(name, layer)
            aside = self._aside(stream, (name, layer), keep_before(stream, place))
            return "reader", self._tap(place, ("reads", name, layer)), aside, norm, self._constant(name, layer)
        if name in SPLIT_READERS:
            stream, norm, place = architecture.reader(name, layer)
            aside = self._aside(stream, ("attn_in", layer), keep_before(stream, place))
            made = SPLIT_READERS[name]
            read = self._tap(place, ("reads", "attn_in", layer))
            maps = tuple(
                (self._tap(p.place, ("made", p.place.path)), p.place.path, p.turned)
                for p in architecture.projections(layer)
            )
            tap = self._tap(architecture.place(made, layer), (made, layer))
            return "heads", tap, maps, read, aside, norm, self._constant("attn_in", layer)
        if name in SCALES:
            stream, norm, place = architecture.scaled(name, layer)
            aside = self._aside(stream, (name.removesuffix("_scale"), layer), keep_before(stream, place))
            return "scale", self._tap(place, ("reads", name.removesuffix("_scale"), layer)), aside, norm
        if name == "head_out":
            return self._head_out(layer)
        place = architecture.place(name, layer)
        return "plain", self._tap(place, (name, layer)), heads_of(architecture, name, layer), place.scale

    def _head_out(self, layer: int) -> tuple[Any, ...]:
        architecture = self.architecture
        how, out = architecture.head_projection(layer), architecture.place("attn_out", layer)
        normed = None
        if how.post_norm:
            place = Place(how.post_norm, "input", order=out.order - 1)
            normed = self._aside(place, ("normed", layer), LINE)
        tap = self._tap(out, ("attn_out", layer))
        z = self._tap(architecture.place("z", layer), ("z", layer))
        heads = architecture.units("head_out", layer)
        return "head_out", tap, z, heads, how.projection, how.post_norm, normed, how.scale

    def _constant(self, reader: str, layer: int) -> Any:
        """Whether what a reader's norm divides by is constant: at its own value, or at what was written."""
        scale = f"{reader}_scale", layer
        if "norms" in self.held or "norm" in self.rules or scale in self.held:
            return True
        return scale if scale in self.written else None

    # ------------------------------------------------------------------------------------------------ what is held

    def _stopped(self) -> Iterator[Key]:
        """The components at which the gradient ends."""
        if "norms" in self.held or "norm" in self.rules:
            yield from self._everywhere(SCALES)
        if "pattern" in self.held or "pattern" in self.rules:
            yield from self._everywhere(("q", "k") if self._inside else ("pattern",))
        yield from sorted(entry for entry in self.held if isinstance(entry, tuple))

    def _everywhere(self, names: Iterable[str]) -> Iterator[Key]:
        for name in names:
            for layer in range(len(self.architecture) if component(name).layered else 1):
                if self.architecture.offers(name, layer):
                    yield name, layer
                elif name not in SCALES and self.architecture.units("z", layer):
                    self.architecture.require(name, layer)

    @property
    def _inside(self) -> bool:
        """Whether queries and keys can be held instead of the pattern, under any attention kernel."""
        attending = (i for i in range(len(self.architecture)) if self.architecture.units("z", i))
        return all(self.architecture.offers("q", layer) for layer in attending)

    def _hold(self, name: str, layer: int) -> None:
        architecture = self.architecture
        if name in SCALES:
            stream, norm, place = architecture.scaled(name, layer)
            aside = self._aside(stream, (name.removesuffix("_scale"), layer), keep_before(stream, place))
            self._tasks[place].append((RULE, ("norm_rule", norm, aside)))
            return
        if name in ("attn_in", "mlp_in"):
            place = architecture.reader(name, layer)[2]
        elif name in (*SPLIT_READERS, "head_out", "resid_mid", "logits"):
            other = "z or attn_out" if name == "head_out" else "q, k or v" if name in SPLIT_READERS else "attn_out"
            raise RecipeError(
                f"The gradient cannot be stopped at {name}, which has no place of its own. Stop it at {other}, or hold "
                "its value in an edited world: world.freeze(…)."
            )
        else:
            place = architecture.stream(layer) if name == "resid_pre" else architecture.place(name, layer)
        self._tasks[place].append((RULE, ("hold", (name, layer))))

    def _rules(self, layer: int) -> None:
        if not {"identity", "half"} & self.rules or self.architecture.mlp(layer) is None:
            return
        found = self.architecture.nonlinearity(layer)
        if isinstance(found, str):
            raise ComponentError(
                f"Layer {layer} of this {self.architecture.model_type} has no identity and half rules: {found}. Leave "
                "these rules out, or take gradients as they are."
            )
        if "identity" in self.rules:
            aside = self._aside(found.entering, ("entering", layer), LAST)
            self._tasks[found.leaving].append((RULE, ("identity_rule", aside)))
        if "half" in self.rules and found.gated:
            self._tasks[self.architecture.place("mlp_act", layer)].append((RULE, ("half_rule", None)))
