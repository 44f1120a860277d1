"""What a measurement depends on, as text that is the same for the same contents: values, functions and models.

Two things have one identity only if a measurement cannot tell them apart. Where that cannot be known, as for a function
that holds a list or draws random numbers, there is no identity, and what depends on it is measured every time.
"""

from __future__ import annotations

import dis
import hashlib
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracepatch.constants import Constant
from tracepatch.models import Model, module_of, remote_of, source_of, versions
from tracepatch.weights import brought, weightless

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size})
OURS = frozenset({"tracepatch", "nnsight", "transformers", "torch", "numpy", "math", "builtins", "einops", "operator"})
CHANCE = re.compile(
    r"(.*_)?rand(n|int|perm|om)?(_like|_)?|(alpha_|feature_)?dropout\w*|(log_)?normal_?|(std_)?normal|uniform_?"
    r"|bernoulli_?|multinomial|exponential_?|cauchy_|geometric_?|poisson|shuffle|choices?|r?sample|gauss|default_rng"
)
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
OUTSIDE = frozenset({"open", "environ", "getenv", "time", "perf_counter", "monotonic", "input", "globals", "locals"})
BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)


class UnidentifiedError(Exception):
    """Why something has no identity, in words; whether they name the function that is to blame."""

    def __init__(self, why: str, named: bool = False) -> None:
        super().__init__(why)
        self.named = named


class Identities:
    """Identities of the values of one model's plan.

    Args:
        model: Functions may hold it, or its modules: its own identity stands for them.
        skipped: Names of fields of our own classes that do not matter.
    """

    def __init__(self, model: Model | None = None, skipped: frozenset[str] = frozenset()) -> None:
        modules = [] if model is None else [("", model), *module_of(model).named_modules()]
        self._known = {id(module): f"<module {name!r} of the model>" for name, module in modules}
        self._skipped = skipped
        self._functions: dict[int, str | UnidentifiedError] = {}
        self._alive: list[Any] = []  # an id stands for an object while that lives

    def of(self, value: Any) -> str:
        """The identity of a value.

        Raises:
            UnidentifiedError: It has none.
        """
        kind = type(value)
        if kind in PLAIN:
            return f"{kind.__name__}:{value!r}"
        inner = getattr(value, "_module", None)  # of what nnsight makes of a module
        for one in (value, inner):
            if id(one) in self._known:
                return f"{self._known[id(one)]} as {kind.__name__}"
        if kind is tuple:
            return f"({','.join([self.of(one) for one in value])})"
        if kind is frozenset:
            return f"{{{','.join(sorted(self.of(one) for one in value))}}}"
        if isinstance(value, Constant):
            return f"{kind.__name__}:{value.tensor.dtype}:{value.digest}"
        if is_dataclass(value) and kind.__module__.startswith("tracepatch."):
            told = [
                f"{n}={self._field(getattr(value, n))}" for n in kind.__dataclass_fields__ if n not in self._skipped
            ]
            return f"{kind.__name__}({','.join(told)})"
        if kind in (torch.Tensor, torch.nn.Parameter):
            return f"tensor:{value.device.type}:{tuple(value.shape)}:{contents(value)}"
        if kind is np.ndarray and value.dtype.kind in "biufc":
            return f"array:{value.shape}:{value.dtype}:{hashlib.sha256(value.tobytes()).hexdigest()}"
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return f"{value.dtype}:{value.item()!r}"
        if kind in (slice, range):
            return f"{kind.__name__}:({self.of(value.start)},{self.of(value.stop)},{self.of(value.step)})"
        if isinstance(value, types.ModuleType):
            return _module(value.__name__)
        if isinstance(value, type):
            if value.__module__.split(".")[0] not in OURS:
                raise UnidentifiedError(f"uses the class {value.__qualname__}")
            return f"class:{value.__module__}.{value.__qualname__}"
        if callable(value):
            return self._function(value)
        raise UnidentifiedError(
            f"holds a {kind.__name__}, which may change (of fixed contents are numbers, text, tensors, tuples)"
        )

    def _field(self, value: Any) -> str:
        """The identity of what a class of ours holds: nothing changes its lists."""
        kind = type(value)
        if kind in (int, str, bool) or (kind is tuple and all(type(one) is int for one in value)):
            return repr(value)  # what most fields are
        if kind is dict:
            return self.of(tuple(value.items()))
        return self.of(tuple(value) if kind is list else value)

    def _function(self, function: Any) -> str:
        found = self._functions.get(id(function))
        if found is None:
            name = getattr(function, "__qualname__", type(function).__name__)
            self._alive.append(function)
            self._functions[id(function)] = f"<the function {name} itself>"  # while what it holds is told
            try:
                found = self._told(function)
            except UnidentifiedError as error:
                found = error if error.named else UnidentifiedError(f"{name} {error}", True)
            self._functions[id(function)] = found
        if isinstance(found, UnidentifiedError):
            raise found
        return found

    def _told(self, function: Any) -> str:
        called = getattr(function, "__qualname__", None) or getattr(function, "__name__", type(function).__name__)
        name = f"{getattr(function, '__module__', None)}.{called}"
        if isinstance(function, BUILTINS):
            _require_pure(name.split("."), name)
            holder = getattr(function, "__self__", None)
            if holder is None or isinstance(holder, (type, types.ModuleType)):
                return f"builtin:{type(holder).__name__}:{name}"
            return f"builtin:{name} of {self.of(holder)}"
        if isinstance(function, partial):
            words = tuple(sorted(function.keywords.items()))
            return f"partial({self.of(function.func)},{self.of(function.args)},{self.of(words)})"
        if isinstance(function, types.MethodType):
            return f"method({self.of(function.__func__)},{self.of(function.__self__)})"
        if not isinstance(function, types.FunctionType):
            raise UnidentifiedError(f"is an object of the class {type(function).__qualname__}, not a plain function")
        if (
            function.__module__
            and function.__module__.split(".")[0] in OURS - {"tracepatch"}
            and not function.__closure__
            and "<" not in name
        ):
            _require_pure(name.split("."), name)
            return f"function:{name}"
        code = function.__code__
        held = []
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held.append((variable, cell.cell_contents))
            except ValueError:
                raise UnidentifiedError(f"uses {variable} before it has a value") from None
        used = [(key, function.__globals__[key]) for key in sorted(globals_of(code)) if key in function.__globals__]
        defaults = (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items()))
        parts = [_code(code, name), self.of(defaults), *(f"{key}={self.of(value)}" for key, value in (*held, *used))]
        return f"function({','.join(parts)})"


def context(model: Model, eager: bool) -> str:
    """Everything beside the plan that decides a measurement: model, versions, and settings of torch.

    Args:
        model: What is patched.
        eager: Whether attention is computed step by step.

    Raises:
        UnidentifiedError: Something in the model may change unseen.
    """
    module = module_of(model)
    config = {k: v for k, v in module.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    states = {**dict(module.named_parameters()), **dict(module.named_buffers()), **brought(module)}
    if weightless(module):
        weights = [f"{source_of(model)} at {getattr(module.config, '_commit_hash', None)} on {remote_of(model)}"]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python to other threads
            weights = list(pool.map(contents, states.values()))
    devices = sorted({tensor.device.type for tensor in states.values()})
    attention = "eager" if eager else module.config._attn_implementation
    settings: Any = torch.backends
    kernels = (
        *(torch.get_float32_matmul_precision(), settings.fp32_precision, settings.cuda.matmul.fp32_precision),
        *(settings.cuda.flash_sdp_enabled(), settings.cuda.mem_efficient_sdp_enabled()),
        *(settings.cuda.math_sdp_enabled(), settings.cuda.cudnn_sdp_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), settings.cudnn.benchmark),
    )
    casts = [(d, torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in devices if d != "meta"]
    told = [
        *(sorted(versions().items()), np.__version__, sys.version, _own_code()),
        *(ADDRESS.sub("", f"{module} {json.dumps(config, sort_keys=True, default=str)}"), attention),
        *(devices, kernels, casts),
        *([f"{name} {tuple(states[name].shape)} {states[name].dtype}" for name in states], weights),
        sorted(_classes(module)),
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def contents(tensor: torch.Tensor) -> str:
    """A hash of all the numbers of a tensor, and their dtype."""
    digest = hashlib.sha256(str(tensor.dtype).encode())
    try:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in torch.split(flat, 1 << 28):
            digest.update(piece.cpu().numpy().data)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnidentifiedError(f"holds a tensor of a kind that cannot be read as bytes ({tensor.dtype})") from error
    return digest.hexdigest()


def _classes(module: torch.nn.Module) -> Iterator[str]:
    """The code of modules that come with no library; refuses what users hung into a model."""
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        hooks += [part.__dict__["forward"]] if "forward" in part.__dict__ else []
        foreign = [hook for hook in hooks if _root(hook) not in OURS | {"accelerate"}]
        if foreign:
            what = getattr(foreign[0], "__qualname__", type(foreign[0]).__name__)
            raise UnidentifiedError(f"the model's module {name or 'itself'} has the hook {what}")
    for kind in {type(part) for part in module.modules()}:
        if kind.__module__.split(".")[0] not in OURS:
            path = getattr(sys.modules.get(kind.__module__), "__file__", None)
            if path is None:
                raise UnidentifiedError(f"the model has modules of {kind.__qualname__}, whose code is in no file")
            yield f"{kind.__qualname__} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def _root(function: Any) -> str:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__module__", None) or type(inner).__module__).split(".")[0]


@cache
def _own_code() -> str:
    """Our own code: a version says too little while it is being worked on."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def _module(name: str) -> str:
    root = name.partition(".")[0]
    module = sys.modules.get(root)
    installed = "site-packages" in str(getattr(module, "__file__", "")) and hasattr(module, "__version__")
    if root not in OURS and root not in sys.stdlib_module_names and not installed:
        raise UnidentifiedError(f"uses the module {name}, whose contents may change: import from it what you use")
    return f"module:{name}:{getattr(module, '__version__', '')}"


def _code(code: types.CodeType, name: str) -> str:
    """What a function does: instructions, constants and names, and those of the functions inside it."""
    _require_pure(code.co_names, name)
    writes = [i for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]
    writes += [i for i in dis.get_instructions(code) if i.opname == "STORE_DEREF" and i.argval in code.co_freevars]
    if writes:
        raise UnidentifiedError(f"changes {writes[0].argval}, which stands outside it")
    constants = [_code(c, name) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    shape = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return repr((code.co_code, getattr(code, "co_exceptiontable", b""), constants, shape, names))


def _constant(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_constant, value)))}}}"
    return f"({','.join(map(_constant, value))})" if isinstance(value, tuple) else f"{type(value).__name__}:{value!r}"


def globals_of(code: types.CodeType) -> set[str]:
    """The names that a function, or one inside it, looks up outside of all functions."""
    found = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        found |= globals_of(constant) if isinstance(constant, types.CodeType) else set()
    return found


def _require_pure(names: Any, what: str) -> None:
    wrong = [n for n in names if n in OUTSIDE or CHANCE.fullmatch(n)]
    if wrong:
        kind = "reads from outside" if wrong[0] in OUTSIDE else "draws random numbers"
        raise UnidentifiedError(f"{kind} ({wrong[0]})")
