"""Recipe files: which there are, what is in them, and whether the command line can run them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from tracepatch.errors import MetricError, RecipeError, listing
from tracepatch.measures import accuracy, prob_diff
from tracepatch.metrics import Metric, as_metrics, cross_entropy, kl, log_prob, logit, logit_diff, prob, rank
from tracepatch.prompts import Pairs
from tracepatch.recipe import Recipe
from tracepatch.studies import Study
from tracepatch.toys import NAMES

Part: TypeAlias = Recipe | Study
METRICS = (logit_diff, logit, log_prob, prob, prob_diff, kl, cross_entropy, accuracy, rank)
"""What the command line reads by name."""
TABLES = (".csv", ".jsonl", ".json")
"""How the names of files end that hold pairs."""


def bundled() -> list[str]:
    """The names of the recipe files that come with tracepatch."""
    package = importlib.import_module("tracepatch.recipes")
    return [entry.name for entry in pkgutil.iter_modules(package.__path__)]


def opened(recipe: str) -> ModuleType:
    """A recipe file as a module.

    Args:
        recipe: The name of a bundled one, or the path of a Python file.

    Raises:
        RecipeError: There is none, it cannot be imported, or it lacks what the command line needs.
    """
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise RecipeError(f"There is no file {recipe}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does, so that it finds files beside it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
            raise RecipeError(f"{recipe} cannot be imported: line {line}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(str(path.resolve().parent))
    elif path.suffix in TABLES:
        raise RecipeError(
            f"{recipe} holds pairs, and no recipe: `tracepatch check {recipe}` looks at them, and prompts() of a "
            f"recipe file may return tp.Pairs.from_{'csv' if path.suffix == '.csv' else 'jsonl'}({recipe!r})."
        )
    else:
        names = bundled()
        if recipe not in names:
            raise RecipeError(f"There is no recipe {recipe!r}. Recipes: {', '.join(names)}; or pass a Python file.")
        module = importlib.import_module(f"tracepatch.recipes.{recipe}")
    missing = [] if parts_of(module) else ["a function with @tp.recipe"]
    missing += [] if hasattr(module, "prompts") else ["a function prompts(tokenizer, count, seed) -> tp.Pairs"]
    if missing:
        raise RecipeError(f"{recipe} cannot be run: it lacks {' and '.join(missing)}.")
    bare = [f"{name}: {', '.join(left)}" for name, part in parts_of(module).items() if (left := _unset(part))]
    if bare:
        raise RecipeError(
            f"{recipe} cannot be run: the command line passes no arguments of your own. Give them a default.\n"
            + listing(bare)
        )
    return module


def _unset(part: Part) -> list[str]:
    """The arguments of a recipe's own that have no default; of a study those that every study is given have none."""
    given = 1 if isinstance(part, Recipe) else 3
    own = [
        p
        for p in inspect.signature(part.function).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return [p.name for p in own[given:] if p.default is p.empty]


def parts_of(module: ModuleType) -> dict[str, Part]:
    """The parts of an experiment by name, in the order of the file."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (Recipe, Study))}


def prompts_of(module: ModuleType, model: Any, count: int, seed: int) -> Pairs:
    """The prompts of an experiment for a model.

    Raises:
        RecipeError: Its ``prompts`` takes something else, or returns no pairs.
    """
    should = "prompts(tokenizer, count, seed) -> tp.Pairs is what a recipe file needs"
    try:
        inspect.signature(module.prompts).bind(model.tokenizer, count, seed)
    except TypeError as error:
        raise RecipeError(f"{should}; its own cannot be called so: {error}.") from None
    pairs = module.prompts(model.tokenizer, count, seed)
    if not isinstance(pairs, Pairs):
        raise RecipeError(f"{should}; its own returned {type(pairs).__name__}.")
    return pairs


def toys_of(module: ModuleType | None) -> tuple[str, ...]:
    """The toys that have the behaviour, as the command line names models: ``TOYS`` of the file, or the four of ioi."""
    return tuple(f"toy:{name}" for name in getattr(module, "TOYS", NAMES))


def metrics_of(module: ModuleType, names: Sequence[str] | None = None) -> list[Metric]:
    """Metrics by their names; if none is named, ``METRIC`` of the file, or the logit difference.

    Raises:
        MetricError: There is no such metric.
    """
    known = {one.name: one for one in METRICS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise MetricError(f"There is no metric {', '.join(unknown)}. Metrics: {', '.join(known)}.")
    own = getattr(module, "METRIC", logit_diff)
    if isinstance(own, str) and own not in known:
        raise MetricError(f"METRIC of the file is {own!r}, which is no metric. Metrics: {', '.join(known)}.")
    return [known[name] for name in names or ()] or list(as_metrics(known[own] if isinstance(own, str) else own))


def headline(module: ModuleType) -> str:
    """The first line of a recipe file."""
    return (inspect.getdoc(module) or module.__name__).split("\n")[0]


def first_line(part: Part) -> str:
    """What a part does, in a line."""
    return (inspect.getdoc(part.function) or "").split("\n")[0]
