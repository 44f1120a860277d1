"""How an effect is estimated without running its patch: what is differentiated where, and what it costs.

An *estimate* is a number in the metric's unit that approximates an effect. Each estimator is a value: printable,
comparable, and the same for any model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError
from tracepatch.reach import canonical
from tracepatch.sites import Select, Site, component, layers_of
from tracepatch.slopes import RULES

Rule: TypeAlias = Literal["midpoint", "left", "right"]
Along: TypeAlias = Literal["inputs", "layer", "site"]
Hold: TypeAlias = tuple[str | tuple[str, int], ...]


@dataclass(frozen=True)
class AtP:
    """Attribution patching: gradient at the base run · (source − base value).

    The first-order Taylor term of a patch's effect (Nanda 2023; Kramár et al. 2024, arXiv:2403.00745, equation 4). Two
    forwards and one backward for all sites of all components. It is linear: over positions, heads, neurons and parts of
    a sum it adds up.

    Attributes:
        hold: What is constant in the backward pass: ``"norms"`` (what every norm of the stream divides by; those of
            queries and keys, inside attention, are not among them), ``"pattern"``, or (component, layer).
    """

    hold: Hold = field(default=(), kw_only=True)

    @property
    def signed(self) -> bool:
        """Whether its estimates have the sign of the effect; else they are magnitudes."""
        return True

    @property
    def name(self) -> str:
        """What it is called in results."""
        return "AtP" + (f", {' and '.join(map(str, self.hold))} held" if self.hold else "")


@dataclass(frozen=True)
class AtPStar(AtP):
    """AtP with its two known failures mended (Kramár et al. 2024, arXiv:2403.00745).

    For queries and keys, whose softmax saturates, the pattern is computed exactly with that one query or key patched,
    and only what follows is linear (equations 6 to 10); q and k of all positions of a head together likewise. Costs a
    forward more for queries, and one for keys, both with attention computed step by step.

    Attributes:
        drop: GradDrop (equation 11), for gradients that cancel: the mean, over layers, of the absolute estimate with
            the gradient through that layer's attention and MLP stopped. Costs a backward a layer. Such estimates have
            no sign.
    """

    drop: bool = False

    @property
    def signed(self) -> bool:
        """Whether its estimates have the sign of the effect; else they are magnitudes."""
        return not self.drop

    @property
    def name(self) -> str:
        """What it is called in results."""
        return "AtP*" + (" with GradDrop" if self.drop else "") + super().name.removeprefix("AtP")


@dataclass(frozen=True)
class IntegratedGradients(AtP):
    """The gradient averaged along the straight line from the base to the source, times the difference.

    Attributes:
        steps: Points on the line. Each is a forward and a backward.
        along: What moves. ``"inputs"``: the token embeddings, for all components at once (Hanna et al. 2024,
            arXiv:2403.17806); ``"layer"``: a whole component of a layer, so that over it estimates sum to the effect
            of patching all of it; ``"site"``: the patched site alone, which converges to its exact effect.
        rule: Where the points lie: in the ``"midpoint"`` of equal parts (error O(1/steps²)), or at their ``"left"`` or
            ``"right"`` ends, the base being left.
    """

    steps: int = 10
    along: Along = "inputs"
    rule: Rule = "midpoint"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise RecipeError(f"steps is a number of points, 1 or more, not {self.steps!r}.")
        if self.along not in ("inputs", "layer", "site"):
            raise RecipeError(f"along is 'inputs', 'layer' or 'site', not {self.along!r}.")
        if self.rule not in ("midpoint", "left", "right"):
            raise RecipeError(f"rule is 'midpoint', 'left' or 'right', not {self.rule!r}.")

    @property
    def weights(self) -> tuple[float, ...]:
        """How far along the line the points lie: 0 is the base, 1 the source."""
        offset = {"midpoint": 0.5, "left": 0.0, "right": 1.0}[self.rule]
        return tuple((i + offset) / self.steps for i in range(self.steps))

    @property
    def name(self) -> str:
        """What it is called in results."""
        where = {"inputs": "the inputs", "layer": "each layer", "site": "each site"}[self.along]
        told = f"integrated gradients along {where}, {self.steps} {self.rule} steps"
        return told + super().name.removeprefix("AtP")


@dataclass(frozen=True)
class RelP(AtP):
    """Relevance patching: AtP with the gradient replaced by relevance coefficients (Jafari et al. 2025, 2508.21258).

    Attributes:
        rules: ``"norm"``: what norms of the stream divide by is constant; ``"identity"``: a nonlinearity multiplies by
            the constant f(x)/x; ``"half"``: each factor of a gated MLP's product gets half the gradient; ``"pattern"``:
            attention weights are constant. The paper's default are the first three.
    """

    rules: tuple[str, ...] = ("norm", "identity", "half")

    def __post_init__(self) -> None:
        rules: Any = self.rules
        if isinstance(rules, str) or set(rules) - set(RULES):
            raise RecipeError(f"rules are {', '.join(RULES)}, as in rules=('norm', 'identity'), not {self.rules!r}.")

    @property
    def name(self) -> str:
        """What it is called in results."""
        return f"RelP ({', '.join(self.rules)})" + super().name.removeprefix("AtP")


def held_of(how: AtP, architecture: Architecture) -> tuple[frozenset[Any], frozenset[str]]:
    """What an estimator holds in one model, with layers counted from 0, and the rules of propagation that it follows.

    Raises:
        RecipeError: It holds something that is none.
        SiteError: The model has no such layer.
        ComponentError: It does not have the component there.
    """
    found: list[Any] = []
    for entry in how.hold:
        if isinstance(entry, str):
            if entry not in ("norms", "pattern"):
                raise RecipeError(
                    f"hold takes 'norms', 'pattern' or (component, layer), such as ('attn_out', 3), not {entry!r}."
                )
            found.append(entry)
            continue
        name, layer = entry
        (counted,) = layers_of(component(name), Select((layer,), scalar=True), len(architecture))
        architecture.require(name, counted)
        found.append(canonical(Site(name, counted), len(architecture)))
    return frozenset(found), frozenset(how.rules) if isinstance(how, RelP) else frozenset()


def require_movable(architecture: Architecture) -> None:
    """Refuses ``along="inputs"`` where the token embeddings are not all that differs between the two runs.

    Raises:
        RecipeError: An encoder reads the prompts.
        ComponentError: The model does not have ``embed``.
    """
    if architecture.encodes:
        raise RecipeError(
            "along='inputs' moves the decoder's embeddings, and here an encoder reads the prompts: pass along='layer'."
        )
    architecture.require("embed", 0)
