"""Parts of an experiment that are more than rows of patches: estimates, audits, sweeps, scores."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tracepatch.metrics import Metrics, logit_diff
from tracepatch.models import Model
from tracepatch.prompts import Pairs, require_pairs
from tracepatch.results import Result


class Study:
    """A part of an experiment without a model in it: a function of a model, pairs and a metric that gives a result."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        named = inspect.signature(function).parameters.values()
        self._takes = {one.name for one in named if one.kind is not one.VAR_KEYWORD}
        self._any = any(one.kind is one.VAR_KEYWORD for one in named)
        functools.update_wrapper(self, function)

    def __call__(self, model: Model, pairs: Pairs, metric: Metrics = logit_diff, **options: Any) -> Result:
        """Runs it on a model and pairs.

        Args:
            model: From ``tp.load``.
            pairs: The prompts.
            metric: What is read.
            options: Its own arguments, and those of ``tp.patching`` where it hands them on.
        """
        return self.function(model, require_pairs(pairs), metric, **options)

    def taken(self, **options: Any) -> dict[str, Any]:
        """Those of the options of ``tp.patching`` that it hands on: what only estimates has no use for them."""
        return {name: value for name, value in options.items() if self._any or name in self._takes}

    def __repr__(self) -> str:
        summary = (self.function.__doc__ or "").strip().split("\n")[0]
        return f"<study {self.__name__}: {summary}>"  # type: ignore[attr-defined]  # update_wrapper sets it


def study(function: Callable[..., Result]) -> Study:
    """Makes ``function(model, pairs, metric) -> result`` a part of a recipe file, which ``tracepatch run`` runs.

    Patches that can be written down row by row are a ``tp.recipe``, which can be planned and combined; a study is for
    what takes more, such as an attribution, an audit or a sweep in both directions. Its result is a labelled dataset
    with ``effect`` or ``estimate``. With ``**options`` it is given those of ``tp.patching``, to hand on.
    """
    return Study(function)
