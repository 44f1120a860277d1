"""What recipes index: worlds, and the components of a world waiting for an index."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Protocol

from tracepatch.architecture import Architecture
from tracepatch.errors import ComponentError, RecipeError, SiteError
from tracepatch.metrics import Metric
from tracepatch.references import ReferenceWorld
from tracepatch.rows import EditedWorld, Row
from tracepatch.shapes import units_of
from tracepatch.sites import (
    ALL,
    COMPONENTS,
    SCALES,
    SIDES,
    Component,
    Select,
    Site,
    component,
    hashable,
    layers_of,
    select,
    split_index,
)
from tracepatch.sources import Value, WorldName
from tracepatch.tokens import EncodedPairs


class Records(Protocol):
    """What a world asks of the recording that it belongs to.

    Attributes:
        architecture: Of the model.
        encoded: The pairs, as tokens.
        edited: The edited worlds, by name.
        sites: Per component, the sites that were written down, by their index: the same for all worlds.
        references: The reference worlds, by name.
        opened: The row that is being written down, if any.
    """

    architecture: Architecture
    encoded: EncodedPairs
    edited: dict[WorldName, EditedWorld]
    sites: dict[str, dict[Any, Site]]
    references: dict[WorldName, ReferenceWorld]
    opened: Row | None

    def write(self, world: WorldName, site: Site, given: Any) -> None:
        """Records one assignment."""


class World:
    """One world of a recording: ``world.component[layer, pos, head]``."""

    __slots__ = ("_components", "_name", "_recorder")
    _components: dict[str, Activations]
    _name: WorldName
    _recorder: Records

    def __init__(self, recorder: Records, name: WorldName) -> None:
        object.__setattr__(self, "_recorder", recorder)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_components", {})

    def __getattr__(self, name: str) -> Activations:
        found = self._components.get(name)
        if found is None:
            if name.startswith("__"):
                raise AttributeError(name)
            found = self._components[name] = Activations(self._recorder, self._name, component(name))
        return found

    def input(self, path: str) -> Activations:
        """What a module takes, by its path, waiting for positions: ``world.input("transformer.h.3.mlp.c_fc")[pos]``.

        Of several arguments it is the first activation.

        Raises:
            ComponentError: There is no such module, or what it takes does not have one vector a position.
        """
        return self._module(path, "input")

    def output(self, path: str) -> Activations:
        """What a module gives, by its path, waiting for positions: ``world.output("transformer.h.3.mlp.c_fc")[pos]``.

        Of several values it is the first activation.

        Raises:
            ComponentError: There is no such module, or what it gives does not have one vector a position.
        """
        return self._module(path, "output")

    def _module(self, path: str, side: str) -> Activations:
        if not isinstance(path, str) or not path:
            raise ComponentError(
                f"Say whose {side}: pass a module's path, such as 'transformer.h.3.mlp', not {path!r}."
            )
        name = f"{path}.{side}"
        self._recorder.architecture.modules.tap(name)
        return self.__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SIDES:
            raise RecipeError(f"Say whose, and where: {self._name}.{name}('PATH OF A MODULE')[pos] = ….")
        index = ", ".join(component(name).index)
        raise RecipeError(f"Say where: {self._name}.{name}[{index}] = … (`:` for everywhere).")

    def freeze(self, *names: str, at: World | None = None, layers: Any = ALL) -> None:
        """Holds components at a world's values: in a row, or as standing edits of an edited world.

        Args:
            names: Components, such as ``"pattern"``; ``"norms"`` for what every norm of the model divides by.
            at: The world whose values are held; without it, those of the world that is edited.
            layers: Which layers, as an index; all that have the component by default.

        Raises:
            ComponentError: No layer has it.
            RecipeError: Nothing is named.
        """
        if not names:
            raise RecipeError(f"Say what is held: {self._name}.freeze('pattern'), or 'norms' for what norms divide by.")
        recorder, standing = self._recorder, self._recorder.edited.get(self._name)
        if at is None:
            at = World(recorder, standing.of) if standing and recorder.opened is None else self
        architecture = recorder.architecture
        for name in itertools.chain.from_iterable(SCALES if name == "norms" else (name,) for name in names):
            kind = component(name)
            picked = layers if isinstance(layers, Select) else select(layers, "layer")
            chosen = layers_of(kind, picked, len(architecture))
            offered = [layer for layer in chosen if architecture.offers(name, layer)]
            if not offered and "norms" not in names:
                architecture.require(name, chosen[0])
            for layer in offered:
                index = (layer, *[slice(None)] * (len(kind.index) - 1)) if kind.layered else slice(None)
                getattr(self, name)[index] = getattr(at, name)[index]

    def __dir__(self) -> list[str]:
        return ["freeze", "input", "output", *COMPONENTS]


class Activations:
    """One component of a world, waiting for an index."""

    __slots__ = ("kind", "recorder", "sites", "world")

    def __init__(self, recorder: Records, world: WorldName, kind: Component) -> None:
        self.recorder, self.world, self.kind = recorder, world, kind
        # A reference has prompts of its own, and so positions.
        self.sites = {} if world in recorder.references else recorder.sites.setdefault(kind.name, {})

    def __getitem__(self, index: Any) -> Value:
        return Value(self.world, self._site(index))

    def __setitem__(self, index: Any, given: Any) -> None:
        self.recorder.write(self.world, self._site(index), given)

    def _site(self, index: Any) -> Site:
        key = hashable(index)
        found = self.sites.get(key)
        if found is None:
            found = self._resolve(index)
            if key is not None:
                self.sites[key] = found
        return found

    def _resolve(self, index: Any) -> Site:
        layers, *picked = split_index(self.kind, index)
        if not layers.scalar or layers.items is None:
            raise SiteError(
                f"{self.kind.name}[{layers}, …]: one layer at a time; several layers are several edits in one row."
            )
        site = Site(self.kind.name, layers.items[0], *picked)
        found = self.recorder.references.get(self.world)
        if found is not None:
            return located(site, self.recorder.architecture, found)
        edited = self.recorder.edited.get(self.world)
        root = self.world if edited is None else edited.root
        return located(site, self.recorder.architecture, self.recorder.encoded, root)


def located(
    site: Site, architecture: Architecture, prompts: EncodedPairs | ReferenceWorld, world: WorldName = "clean"
) -> Site:
    """A site as it was written, in one model and for some prompts: with its layer counted from 0.

    Args:
        site: As written.
        architecture: Of the model.
        prompts: The pairs, or the prompts of a reference.
        world: Whose prompts must have its positions, in some pair.

    Raises:
        SiteError: The model has no such layer or unit, or no prompt has such a position.
        ComponentError: The component is not offered there.
    """
    kind = component(site.component)
    (layer,) = layers_of(kind, Select((site.layer,), scalar=True), len(architecture))
    architecture.require(kind.name, layer)
    if kind.module:
        layer = architecture.modules.tap(kind.name).layer
    if kind.unit:
        units_of(kind, layer, site.unit, architecture.units(kind.name, layer))
    site = replace(site, layer=layer)
    prompts.require_positions(site, world)
    return site


def fitted(metric: Metric, architecture: Architecture, encoded: EncodedPairs) -> Metric:
    """A metric for one model and some pairs: of their ids, at the place of this model that it reads."""
    metric = metric.fitted(encoded)
    return metric if metric.site is None else replace(metric, site=located(metric.site, architecture, encoded))
