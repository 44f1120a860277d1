"""One request to a server: operations sent as one session, waited for without holding a line, and tried again.

What ships is ``program`` and what it calls, by source, with the operations as plain columns. A job is submitted and
then asked for, so that a line that breaks while it runs loses nothing. What is worth trying again is tried again after
a pause that grows; everything else is an error that says what to do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import nnsight
import torch

from tracepatch.errors import ServerError
from tracepatch.models import Model, name_of, remote_of
from tracepatch.program import operate, program

nnsight.register("tracepatch")  # the server need not have it

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # seconds before each further try
ASK_FIRST, ASK_AT_MOST = 0.02, 2.0  # seconds between two questions for a result
SILENCE = 60.0  # seconds without a word about a job, or without an answer, after which it counts as lost
RUNNING, WAITING = 1800.0, 3600.0  # seconds without a change after which a job counts as stuck; each ends in a minute
WORTH = (
    "reconnecting",
    "evicted",
    "error submitting",
    "bad gateway",
    "service unavailable",
    "gateway time",
    "runner socket",
)
NAMED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Warning): ")
KEY = re.compile(r"\bapi[ _-]?key\b|\bunauthorized\b", re.IGNORECASE)
LINE = ("httpx", "httpcore", "websocket", "ssl", "socket")  # libraries whose errors are of the line, not of the job


class _TryAgainError(Exception):
    """Something that another try may mend."""


def ask(
    model: Model,
    ops: list[tuple[Any, ...]],
    first: int,
    seconds: float,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """What ``program.program`` returns for operations on a model that is on a server.

    Args:
        model: The model, from ``tp.load(…, remote=…)``.
        ops: As ``program.operate`` takes them.
        first: How many of them are done whatever time they take.
        seconds: After which no further operation is begun.
        say: Is told how it stands, in a few words.

    Raises:
        ServerError: The server cannot be reached, does not run the model, or failed.
    """
    tree, numbers = packed(ops)
    for pause in (*PAUSES, None):
        try:
            found = _asked(model, (tree, numbers, first, seconds), say)
            if isinstance(found.get("result"), dict) and found["result"].keys() == {"found", "error", "ran"}:
                return dict(found["result"])
            # Seen after jobs that were cut off: done, and nothing in it.
            raise _TryAgainError("the server said that the job is done, and returned nothing of it")
        except _TryAgainError as error:
            if pause is None:
                raise ServerError(
                    f"{place(model)} could not be asked in {len(PAUSES) + 1} tries: {error}. What is measured is kept; "
                    "run it again later, and it continues there."
                ) from error
            say(f"{error}; again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def operated(model: Model, ops: list[tuple[Any, ...]]) -> list[Any]:
    """What operations return, here or, in one request, on the server that the model was loaded for.

    Args:
        model: The model.
        ops: As ``program.operate`` takes them.

    Raises:
        ServerError: The server cannot be reached, does not run the model, or failed.
    """
    if not remote_of(model):
        known: dict[Any, Any] = {}
        return [operate(model, op, known) for op in ops]
    try:
        answer = ask(model, ops, len(ops), 0)
    except JobError as error:
        raise ServerError(f"The model failed on {place(model)}: {error.kind}: {error}") from error
    if answer["error"] is not None:
        raise ServerError(f"The model failed on {place(model)}: {': '.join(answer['error'])}")
    return list(answer["found"])


def place(model: Model) -> str:
    """Where a model runs, for people."""
    remote = remote_of(model)
    return nnsight.CONFIG.API.HOST if remote is True else str(remote)


def _asked(model: Model, given: tuple[Any, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """One try: what the job left, by name."""
    logged, nnsight.CONFIG.APP.REMOTE_LOGGING = nnsight.CONFIG.APP.REMOTE_LOGGING, False  # we say it ourselves
    try:
        try:
            backend = _submitted(model, remote_of(model), *given)
        except (ServerError, _TryAgainError):
            raise
        except Exception as error:
            raise _sorted_out(model, error) from error
        return _waited(model, backend, say)
    finally:
        nnsight.CONFIG.APP.REMOTE_LOGGING = logged


def _submitted(model: Model, remote: Any, tree: Any, numbers: Any, first: int, seconds: float) -> Any:
    """Sends a job; what can be asked for it.

    nnsight sends the attention of the client's model along, and has the server's switched to it.
    """
    try:
        model.to_model_key()
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if _of_the_line(error) and _status(error) is None:
            raise _TryAgainError(f"the model hub does not answer ({said})") from error
        raise ServerError(
            f"{name_of(model)} could not be looked up on the model hub, where servers take models from: {said}"
        ) from error
    with model.session(remote=remote, blocking=False) as session:
        result = nnsight.save(program(model, tree, numbers, first, seconds))  # noqa: F841  # the server's
    return session.backend


def _waited(model: Model, backend: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """What a job left, once it is done; it is asked for again and again."""
    began = heard = changed = time.monotonic()
    pause, last = ASK_FIRST, None
    while True:
        time.sleep(pause)
        pause = min(1.3 * pause, ASK_AT_MOST)
        backend.status = None
        found, why = None, "it knows nothing of the job any more"
        try:
            found = backend()
        except Exception as error:
            refused = _status(error) in (401, 403) and "/response/" in _address(error)
            if type(error).__name__ == "RemoteError" or refused:
                raise _sorted_out(model, error) from error
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"  # a line that breaks does no harm
        if found is not None:
            return dict(found)
        now, status = time.monotonic(), None if backend.status is None else backend.status.value
        if status == "COMPLETED":
            return {}
        heard = heard if status is None else now
        if now - heard > SILENCE:
            raise _TryAgainError(f"{place(model)} has not been heard of for {SILENCE:.0f} s ({why})")
        changed, last = (changed, last) if status in (None, last) else (now, status)
        if now - changed > (RUNNING if last == "RUNNING" else WAITING):
            raise _TryAgainError(
                f"{place(model)} has left the job {(last or 'alone').lower()} for {now - changed:.0f} s"
            )
        say(f"{status.lower() if status else 'waiting for an answer'}, {now - began:.0f} s")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _of_the_line(error: BaseException) -> bool:
    """Whether an error is of the connection, not of the job."""
    lines = (ConnectionError, TimeoutError)
    return any(type(e).__module__.split(".")[0] in LINE or isinstance(e, lines) for e in _chain(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    found = (getattr(getattr(e, "response", None), "status_code", None) for e in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


def _address(error: BaseException) -> str:
    """What was asked for when an HTTP error came back."""
    found = (getattr(getattr(e, "response", None), "url", None) for e in _chain(error))
    return next((str(url) for url in found if url is not None), "")


def _sorted_out(model: Model, error: Exception) -> Exception:
    """An error of a request as what it means: another try, a server that does not serve, or a job that failed."""
    said, name, where, status = str(error).strip(), name_of(model), place(model), _status(error)
    lines = said.splitlines() or [type(error).__name__]
    remote = type(error).__name__ == "RemoteError"
    if remote and (lines[0].startswith("Traceback") or (len(lines) > 1 and NAMED.match(lines[-1]))):
        return JobError(error)
    key = status in (401, 403) or (status is None and remote and KEY.search(said))
    if key:
        return ServerError(
            f"{where} refused the key: {lines[0]}\nSet yours once with nnsight.CONFIG.set_default_api_key('…'), or in "
            "the environment as NDIF_API_KEY."
        )
    if status is not None and (status >= 500 or status in (408, 429)):
        return _TryAgainError(lines[0])
    if status is None and _of_the_line(error):
        return _TryAgainError(lines[0])
    lowered = said.lower()
    if remote and status is None and any(word in lowered for word in WORTH):
        return _TryAgainError(lines[0])
    if status is not None or said.startswith("Failed to send request: "):
        return ServerError(f"{where} did not take the request: {lines[0]}\n{_advice(lowered)}")
    if not remote:
        return ServerError(f"The request to {where} could not be made: {type(error).__name__}: {lines[0]}")
    if "could not deploy" in lowered or "error starting model" in lowered:
        return ServerError(
            f"{where} does not run {name}: {lines[0]}\nprint(nnsight.status()) lists what it has; or load the weights "
            "here, without remote=."
        )
    if "could not be read" in lowered:
        return ServerError(
            f"{where} could not read the request: {lines[0]}\nA function or metric uses a module that the server does "
            "not have: define it in your own file, or call nnsight.register('its module') first."
        )
    return JobError(error)


def _advice(lowered: str) -> str:
    if re.search(r"\bversions?\b", lowered):
        return "Client and server need versions that fit: print(nnsight.compare()) shows both."
    return "print(nnsight.status()) says whether it is up, and what it runs."


class JobError(Exception):
    """A job that failed where it ran.

    Attributes:
        kind: The type of the error there.
    """

    def __init__(self, error: Any, kind: str = "") -> None:
        said = str(error).strip()
        last = said.splitlines()[-1] if said else type(error).__name__
        name, colon, rest = last.partition(": ")
        told = bool(colon) and name.replace(".", "").isidentifier()
        self.kind = kind or (name.rpartition(".")[2] if told else type(error).__name__)
        super().__init__(said if kind else rest if told else last)


def packed(ops: list[tuple[Any, ...]]) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Operations as a tree without tensors, and their tensors of each kind in one; ``program.unpacked`` undoes it.

    Equal tensors are sent once. Integers take as many bytes as the largest needs.
    """
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    seen: dict[Any, tuple[Any, ...]] = {}
    sizes: dict[torch.dtype, int] = {}

    def reduced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reduced(one) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(reduced(one) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        kind = value.dtype
        content = torch.empty(value.numel(), dtype=kind).copy_(value.detach().flatten())
        key = kind, tuple(value.shape), content.view(torch.uint8).numpy().tobytes()
        if key not in seen:
            start = sizes.get(kind, 0)
            sizes[kind] = start + value.numel()
            kinds.setdefault(kind, []).append(content)
            seen[key] = ("@", list(kinds).index(kind), start, tuple(value.shape))
        return seen[key]

    tree = reduced(ops)
    return tree, tuple(_narrow(torch.cat(parts)) for parts in kinds.values())


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    if numbers.dtype != torch.long or not len(numbers):
        return numbers
    low, high = int(numbers.min()), int(numbers.max())
    fits = (t for t in (torch.int16, torch.int32) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return numbers.to(next(fits, torch.long))
