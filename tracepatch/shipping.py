"""Whether functions mean the same on a server as here, before they are sent.

What ships is source text with the names that it uses. Some constructs arrive changed, or crash the server's Python, and
none of that is said by anyone; so they are refused here, with the reason.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import re
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch

from tracepatch.errors import RecipeError, listing
from tracepatch.identity import globals_of
from tracepatch.plan import Plan

THERE = frozenset({"torch", "numpy", "einops", "transformers", "nnsight", "builtins"}) | frozenset(
    sys.stdlib_module_names
)
PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.Tensor,
    torch.dtype,
    torch.device,
    np.ndarray,
    np.generic,
)
MANGLED = re.compile(r"\bself\.__\w*[^_\W]_?\b(?!__)")


def require_shippable(plan: Plan) -> None:
    """Refuses functions and metrics that a server would not run as they are written.

    Raises:
        RecipeError: There are some, each with the reason.
    """
    reasons = {who: why for who, function in _functions(plan) for why in _reasons(function, set())}
    if reasons:
        raise RecipeError(
            "Some functions would not mean the same on the server.\n"
            f"{listing([f'{who} {why}' for who, why in reasons.items()])}\n"
            "Write them as plain functions in a file, of torch and of values that they are given or close over; or run "
            "the model here."
        )


def _functions(plan: Plan) -> Iterator[tuple[str, Any]]:
    """All code of a user's that a plan would send, and what to call it."""
    for metric in plan.metrics:
        yield f"metric {metric.name!r}", metric.function
    owners: Iterable[tuple[str, Any]] = [(str(row), row) for row in plan.rows]
    for name, owner in [*owners, *((f"world {world.name!r}", world) for world in plan.edited)]:
        for edit in owner.edits:
            function = getattr(edit.source, "function", None)
            if function is not None:
                yield name, function
            yield from ((name, code) for code in getattr(getattr(edit.source, "portion", None), "functions", ()))
        for save in getattr(owner, "saves", ()):
            if save.reduce is not None:
                yield name, save.reduce
        raw = getattr(owner, "raw", None)
        if raw is not None:
            yield name, raw


def _reasons(value: Any, seen: set[int]) -> Iterator[str]:
    """Why something would arrive changed, or not at all; the first reason that is found in it."""
    if id(value) in seen or isinstance(value, PLAIN):
        return
    seen.add(id(value))
    found = next(_inside(value, seen), None)
    if found is not None:
        yield found


def _inside(value: Any, seen: set[int]) -> Iterator[str]:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    root = str(getattr(value, "__module__", None) or "").split(".")[0]
    if isinstance(value, types.ModuleType):
        return
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _reasons(part, seen)
    elif isinstance(value, (list, tuple, set, frozenset, dict)) and type(value).__module__ == "builtins":
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _reasons(part, seen)
    elif root in THERE and not _object(value):
        return
    elif hasattr(value, "__wrapped__"):
        yield f"uses {name}, which a decorator wraps: only what is inside would run there"
    elif isinstance(value, types.MethodType):
        yield from _reasons(value.__self__, seen)
        yield from _reasons(value.__func__, seen)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, name, seen)
    elif isinstance(value, type):
        yield from _of_class(value, name, seen)
    else:
        yield from _reasons(type(value), seen)
        if root not in THERE:
            for part in getattr(value, "__dict__", {}).values():
                yield from _reasons(part, seen)
        yield from _unpicklable(value, name)


def _object(value: Any) -> bool:
    """Whether something is sent as it is: neither a function nor a class, which a library's name stands for."""
    return not isinstance(value, type) and not callable(value)


def _of_function(function: types.FunctionType, name: str, seen: set[int]) -> Iterator[str]:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        yield f"uses {name}, whose source cannot be found: as bytecode it crashes another Python"
        return
    if _changed(function):
        yield f"uses {name}, whose file has changed since: the new text would be sent. Import it anew"
    if "super()" in source or MANGLED.search(source):
        yield f"uses {name}, with super() or private names of a class, which do not survive being sent"
    used = (function.__globals__[key] for key in globals_of(function.__code__) if key in function.__globals__)
    for cell in function.__closure__ or ():
        try:
            yield from _reasons(cell.cell_contents, seen)
        except ValueError:
            yield f"uses {name}, which closes over a variable before it has a value"
    for part in (*used, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield from _reasons(part, seen)


def _changed(function: types.FunctionType) -> bool:
    """Whether the file of a function says something else now than what was loaded."""
    file, loader = function.__code__.co_filename, type(function.__globals__.get("__loader__")).__name__
    linecache.checkcache(file)
    if loader == "AssertionRewritingHook":  # pytest compiles in a way of its own
        return False
    try:
        now = compile("".join(linecache.getlines(file)), file, "exec", dont_inherit=True)
    except SyntaxError:
        return True
    alike = [code for code in _codes(now) if code.co_qualname == function.__code__.co_qualname]
    return bool(alike) and not any(_same(code, function.__code__) for code in alike)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two pieces of code do the same, wherever they stand."""
    if (a.co_code, a.co_names, len(a.co_consts)) != (b.co_code, b.co_names, len(b.co_consts)):
        return False
    both = zip(a.co_consts, b.co_consts, strict=True)
    return all(
        _same(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else x == y for x, y in both
    )


def _of_class(kind: type, name: str, seen: set[int]) -> Iterator[str]:
    if is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        yield f"uses {name}, a dataclass or named tuple: it is sent as bytecode, which crashes another Python"
        return
    for part in vars(kind).values():
        if isinstance(part, types.FunctionType) and part.__name__ != "__init__":  # objects are sent as they are
            yield from _of_function(part, part.__qualname__, seen)


def _unpicklable(value: Any, name: str) -> Iterator[str]:
    try:
        cloudpickle.dumps(value)
    except Exception as error:
        yield f"uses a {name}, which cannot be sent ({type(error).__name__}: {error})"
