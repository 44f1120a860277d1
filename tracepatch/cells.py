"""Which cells a sweep over components has: as they are asked for, laid out along labelled axes, and recorded as rows.

An exact sweep and an estimate of it are asked for in the same words, so that they have the same cells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tracepatch.errors import RecipeError
from tracepatch.grids import SPAN
from tracepatch.layout import Key
from tracepatch.recording import Recorder
from tracepatch.references import Reference
from tracepatch.sites import PLACES, Component, Select, component, select
from tracepatch.sources import OTHER, Function, WorldName, as_source
from tracepatch.worlds import World

Direction: TypeAlias = Literal["denoising", "noising"]
BASES: dict[Direction, WorldName] = {"denoising": "corrupted", "noising": "clean"}


@dataclass(frozen=True)
class Cells:
    """What is asked of a sweep.

    Attributes:
        names: The components.
        by: The dims to run over, ``component`` not among them.
        base: The run that is edited.
        source: What is written instead of the other run's values, if something is.
        only: Dims and the indices to keep, as they were written.
        axes: Each dim's labels.
        layers: Per component, its layers.
        plain: Whether the cells are numbered positions, the same in both prompts: no spans, and nothing aligned.
    """

    names: tuple[str, ...]
    by: tuple[str, ...]
    base: WorldName
    source: Any
    only: dict[str, Any]
    axes: dict[str, list[Any]]
    layers: dict[str, list[int]]
    plain: bool

    @classmethod
    def of(
        cls,
        recorder: Recorder,
        components: str | Sequence[str],
        by: str | Sequence[str] | None,
        direction: Direction,
        source: Any,
        only: dict[str, Any] | None,
    ) -> Cells:
        """As a user asks for them.

        Raises:
            RecipeError: The components have different dims, a layer is not said, or there is nothing to write.
            SiteError: A dim or an index does not exist.
            ComponentError: No layer of the model has the component.
        """
        base, kinds = base_of(direction), kinds_of(components)
        if recorder.encoded.corrupted is None and (base == "corrupted" or source is None):
            raise RecipeError(
                "These pairs have no corrupted prompts. To ablate in the clean run, pass direction='noising' and what "
                "to write, such as source=0."
            )
        if by is None and len({default_by(kind) for kind in kinds}) > 1:
            raise RecipeError(
                f"{', '.join(kind.name for kind in kinds)} have different dims: take them one by one, or pass "
                "by=('layer', 'pos')."
            )
        chosen = only or {}
        dims = default_by(kinds[0]) if by is None else (by,) if isinstance(by, str) else tuple(by)
        for kind in kinds:
            if kind.layered and "layer" not in dims and not isinstance(chosen.get("layer"), int):
                raise RecipeError(
                    f"Take {kind.name} layer by layer (by=('layer', …)), or in one layer (only={{'layer': 3}})."
                )
        axes: dict[str, list[Any]] = {dim: [] for dim in dims}
        layers: dict[str, list[int]] = {}
        found = cls(
            tuple(kind.name for kind in kinds), dims, base, source, chosen, axes, layers, _plain(recorder, dims, chosen)
        )
        world, crossing = getattr(recorder, base), found.crossing
        for kind in kinds:
            ranges = recorder.ranges(kind.name, dims, found.partnered(recorder), world, crossing)
            layers[kind.name] = ranges["layers"]
            for dim in dims:
                axes[dim] += ranges["layers" if dim == "layer" else dim]
        for dim, labels in axes.items():
            once = list(dict.fromkeys(labels))
            axes[dim] = once if any(isinstance(label, str) for label in once) else sorted(once)
        return found

    @property
    def keys(self) -> list[Key]:
        """Every component at every layer."""
        return [(name, layer) for name in self.names for layer in self.layers[name]]

    @property
    def crossing(self) -> bool:
        """Whether values come from the other prompt."""
        return crosses(self.source, self.base)

    def partnered(self, recorder: Recorder) -> dict[str, Any]:
        """The indices that are kept; where prompts are aligned, positions of the base mean partners in the other."""
        return partnered(recorder, self.base, self.only) if self.crossing else self.only

    def partnered_positions(self, recorder: Recorder) -> bool:
        """Whether the cells are positions of the base that mean their partners in the other prompt, and no spans."""
        kept = [given for dim, given in self.only.items() if dim in PLACES]
        counted = [
            select(given, dim) for dim, given in self.only.items() if dim in PLACES and not isinstance(given, str)
        ]
        whole = len(kept) == len(counted) and all(
            s.items is not None and min(s.items) >= 0 and not s.of for s in counted
        )
        return recorder.encoded.mapped and whole and SPAN not in (*self.by, *self.only)

    def require_plain(self, recorder: Recorder, what: str, instead: str) -> None:
        """Refuses cells that are no numbered positions, the same in both prompts.

        Args:
            recorder: Of the pairs.
            what: What needs that, to stand at the start of the message.
            instead: What to do.

        Raises:
            RecipeError: So it is.
        """
        recorder.encoded.require_alike(what, instead)
        if not self.plain:
            raise RecipeError(f"{what} takes positions, not spans. {instead}")

    @property
    def picked(self) -> dict[str, Select]:
        """The indices that are kept of dims but for the layer."""
        return {dim: select(index, dim) for dim, index in self.only.items() if dim != "layer"}

    def kept(self, kind: Component) -> tuple[str, ...]:
        """The dims that a component's estimates keep where they are computed; the others are summed there."""
        return tuple(dim for dim in dims_of(kind) if dim in self.by or dim in self.only)

    def summed(self, kind: Component) -> tuple[int, ...]:
        """The dims that are summed there, counted with rows in front."""
        return tuple(i for i, dim in enumerate(dims_of(kind), 1) if dim not in self.kept(kind))

    def labels(self, recorder: Recorder) -> Iterator[tuple[Component, dict[str, Any]]]:
        """Every cell: its component, and its labels, ``component`` among them where there are several."""
        kept, world = self.partnered(recorder), getattr(recorder, self.base)
        for name in self.names:
            named = {"component": name} if len(self.names) > 1 else {}
            for index in recorder.grid(name, self.by, base=world, aligned=self.crossing, **kept):
                yield component(name), {**named, **dict(zip(self.by, index, strict=True))}

    def record(
        self, recorder: Recorder, among: Collection[tuple[Any, ...]] | None = None, renormalize: bool = False
    ) -> list[tuple[Any, ...]]:
        """Records a row for each cell, or for those with certain labels, in the order of the dims; their labels."""
        world, given, found = getattr(recorder, self.base), taken(recorder, self.base, self.source), []
        kept = self.partnered(recorder)
        for kind, labels in self.labels(recorder):
            if among is not None and tuple(labels.values()) not in among:
                continue
            found.append(tuple(labels.values()))
            site = index_of(kind, labels, kept)
            with recorder.row(renormalize=renormalize, **labels):
                target = getattr(world, kind.name)
                target[site] = getattr(given, kind.name)[site] if isinstance(given, World) else given
        return found


def _plain(recorder: Recorder, dims: Sequence[str], only: dict[str, Any]) -> bool:
    """Whether cells are numbered positions, the same in both prompts."""
    spans = [dim for dim, given in only.items() if dim in PLACES and isinstance(given, str)]
    return not (recorder.encoded.mapped or SPAN in (*dims, *only) or spans)


def index_of(kind: Component, labels: Mapping[str, Any], kept: Mapping[str, Any]) -> tuple[Any, ...]:
    """The index of a component: along each dim that of the row, or what all rows keep to, or everything."""
    found = []
    for dim in kind.index:
        names = (dim, SPAN) if dim == kind.place else (dim,)
        given = [where[name] for where in (labels, kept) for name in names if name in where]
        found.append(given[0] if given else slice(None))
    return tuple(found)


def crosses(source: Any, base: WorldName) -> bool:
    """Whether what is written comes from the other prompt; what is the same for both has no partner to come from."""
    if isinstance(source, Reference):
        return False
    if isinstance(source, World):
        name, recorded = source._name, source._recorder
        root = recorded.edited[name].root if name in recorded.edited else name
        return name not in recorded.references and root != base
    given = None if source is None else as_source(source)
    return given is None or (isinstance(given, Function) and given.arguments > 1)


def partnered(recorder: Recorder, base: WorldName, chosen: dict[str, Any]) -> dict[str, Any]:
    """Indices by their dims; where prompts are aligned, numbered positions of a run mean partners in the other one."""
    if not recorder.encoded.mapped:
        return chosen
    whole = {dim: given for dim, given in chosen.items() if dim in PLACES and not isinstance(given, (slice, str))}
    counted = {dim: select(given, dim) for dim, given in whole.items()}
    moved = {dim for dim, s in counted.items() if not s.of and s.items is not None and min(s.items) >= 0}
    found = dict(chosen)
    for dim in moved:
        items = counted[dim].items or ()
        found[dim] = recorder.aligned(items[0] if counted[dim].scalar else items, of=getattr(recorder, base))
    return found


def taken(recorder: Recorder, base: WorldName, source: Any) -> Any:
    """What is written in a sweep: the world that values are taken from, or what stands at every site alike.

    Args:
        recorder: The recording.
        base: The run that is edited.
        source: As a user gives it: ``None`` for the other run, or ``tp.mean``, a world, a number, a tensor.
    """
    if source is None:
        return getattr(recorder, OTHER[base])
    return recorder.reference(source) if isinstance(source, Reference) else source


def base_of(direction: Any) -> WorldName:
    """The run that is edited.

    Raises:
        RecipeError: There is no such direction.
    """
    if direction not in BASES:
        raise RecipeError(f"direction is 'denoising' or 'noising', not {direction!r}.")
    found: WorldName = BASES[direction]
    return found


def kinds_of(components: Any) -> list[Component]:
    """The components that are asked for.

    Raises:
        RecipeError: They are no names.
        ComponentError: One is unknown.
    """
    several = isinstance(components, Sequence) and not isinstance(components, str)
    names = list(components) if several else [components]
    if not names or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"components is a name or several, such as 'resid_pre', not {components!r}.")
    return [component(name) for name in names]


def default_by(kind: Component) -> tuple[str, ...]:
    """The dims that a sweep of a component runs over unless it is told: layer × pos, or layer × unit."""
    return kind.index if kind.unit is None else (kind.index[0], kind.unit)


def dims_of(kind: Component) -> tuple[str, ...]:
    """The dims of a component's numbers at a layer, as they stand: those that are indexed, but for the layer."""
    return tuple(dim for dim in kind.index if dim != "layer")
