"""What can go wrong with a server, on purpose. For tests that run where the server does."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import server
import torch
import zstandard

# ------------------------------------------------------------------------------------------------------------- processes


def kill(*pids: int) -> None:
    """Ends processes without a word to them, and returns when they have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < until, f"{pids} go on"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def kill_api() -> None:
    """Ends what clients talk to, and what hands their requests on. Jobs that run go on; those that wait are lost."""
    kill(*server.services("api"))


def restart_api() -> None:
    """Starts it again, after ``kill_api``; returns when requests are taken, not where it only says so from before."""
    with socket.create_connection(("127.0.0.1", server.REDIS)) as redis:
        redis.sendall(b"DEL ray:connected\r\n")
        redis.recv(64)
    server.start("api")
    server.wait_for_api()


def actors() -> list[int]:
    """The processes that have models in them."""
    return [pid for pid in server.services() if _title(pid).startswith("ray::ModelActor")]


def kill_actors() -> None:
    """Ends every process that has a model in it. Ray starts them again, each time later."""
    found = actors()
    assert found, "no model is deployed"
    kill(*found)


def kill_server() -> None:
    """Ends the whole server: jobs and results are gone, and no job's id means anything to the next one."""
    for _ in range(3):  # what was just being started
        kill(*server.services())


def restart_server() -> None:
    """Starts it again, after ``kill_server``."""
    server.start_all()


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------- limits and storage


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Jobs that start meanwhile may not take longer."""
    place = server.STATE / "time-limit"
    place.write_text(str(seconds))
    try:
        yield
    finally:
        place.unlink()


@contextmanager
def full_disk(folder: Path, room: int = 64 << 10) -> Iterator[Path]:
    """The folder is a disk of its own meanwhile, with so many bytes: a page for each file and folder, and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# --------------------------------------------------------------------------------------------------------- the connection


@dataclass
class Fault:
    """What happens to requests.

    Attributes:
        on: What a request's first line begins with: ``"POST /request"``, ``"GET /response"``, ``"GET /subscribe"``
            (the websocket of a blocking run), ``"GET /ndif-results"`` (a result).
        what: ``"refuse"``: it never arrives. ``"drop"``: it arrives, and the answer does not; a websocket is cut at
            the first word about the job. ``"delay"``: it takes ``seconds`` more. ``"empty"``: a finished job has no result in it.
            ``"status"``: the answer is ``status``, with a detail.
        times: How often; ever again if ``None``.
        after: How many such requests pass before.
    """

    on: str
    what: str
    times: int | None = 1
    after: int = 0
    seconds: float = 0.0
    status: int = 503
    happened: int = 0


@dataclass
class Proxy:
    """The server, seen through a connection that can fail: use ``url`` as the host.

    Results are fetched through it as well. Every request has a connection of its own, so that each can fail alone.

    Attributes:
        faults: What happens; see ``fail``.
        sent: Bytes that went up.
        received: Bytes that came down.
        polled: How many of both were questions for a result, and answers to them: as many as there is time for.
        requests: The first words of all requests, in order.
    """

    faults: list[Fault] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    polled: tuple[int, int] = (0, 0)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def fail(self, on: str, what: str, **how: float | None) -> Fault:
        """Lets requests fail from now on; gives what says how often they did."""
        self.faults.append(Fault(on, what, **how))  # type: ignore[arg-type]
        return self.faults[-1]

    def heal(self) -> None:
        """No more faults."""
        self.faults.clear()

    def cut(self) -> None:
        """Ends all connections that are open now."""
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if line.startswith(fault.on) and (fault.times is None or fault.happened < fault.times):
                    if fault.after:
                        fault.after -= 1
                        return None
                    fault.happened += 1
                    return fault
        return None

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head, body = _message(client)
            line = head.split(b"\r\n")[0].decode()
            fault = self._fault(line)
            with self._lock:
                self.requests.append(" ".join(line.split()[:2]))
                asked = len(head) + len(body)
                self.sent += asked
            if fault and fault.what == "refuse":
                return
            if fault and fault.what == "delay":
                time.sleep(fault.seconds)
            if line.startswith("GET /empty-result"):
                self._answer(client, _nothing())
                return
            if fault and fault.what == "status":
                self._answer(client, json.dumps({"detail": "It was made to fail."}).encode(), fault.status)
                return
            port = server.STORE if line.startswith("GET /ndif-results") else server.API
            with socket.create_connection(("127.0.0.1", port)) as upstream:
                with self._lock:
                    self._open |= {client, upstream}
                try:
                    if b"upgrade: websocket" in head.lower():
                        self._splice(client, upstream, head, cut=fault is not None and fault.what == "drop")
                    else:
                        upstream.sendall(_with_header(head, "Connection", "close") + body)
                        head, body = _message(upstream)
                        if fault is None or fault.what != "drop":
                            head, body = self._seen_through(head, body, fault)
                            with self._lock:
                                self.received += len(head) + len(body)
                                if line.startswith("GET /response"):
                                    self.polled = self.polled[0] + asked, self.polled[1] + len(head) + len(body)
                            client.sendall(head + body)
                finally:
                    with self._lock:
                        self._open -= {client, upstream}

    def _seen_through(self, head: bytes, body: bytes, fault: Fault | None) -> tuple[bytes, bytes]:
        """An answer that leads to results by way of this proxy."""
        store = f"http://127.0.0.1:{server.STORE}/".encode()
        if store not in body:
            return head, body
        if fault and fault.what == "empty":
            answer = json.loads(body)
            body = json.dumps({**answer, "data": f"{self.url}/empty-result"}).encode()
        body = body.replace(store, f"{self.url}/".encode())
        return _with_header(head, "Content-Length", str(len(body))), body

    def _splice(self, client: socket.socket, upstream: socket.socket, head: bytes, *, cut: bool) -> None:
        """A websocket, to its end; or to the session's name, which is the first that a server says on it."""
        upstream.sendall(head)

        def up() -> None:
            with suppress(OSError):
                while data := client.recv(1 << 16):
                    self.sent += len(data)
                    upstream.sendall(data)
                upstream.shutdown(socket.SHUT_WR)

        threading.Thread(target=up, daemon=True).start()
        said = b""
        while data := upstream.recv(1 << 16):
            if cut:
                said += data
                handshake = said.find(b"\r\n\r\n") + 4
                named = len(said) > handshake + 1 > 4 and handshake + 2 + said[handshake + 1]  # a short frame's length
                if named and len(said) > named:
                    break
            self.received += len(data)
            client.sendall(data)
        for end in (client, upstream):  # to close them is not enough while the other thread listens
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, body: bytes, status: int = 200) -> None:
        client.sendall(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        )


def _message(end: socket.socket) -> tuple[bytes, bytes]:
    """One HTTP message: its head with the empty line, and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = end.recv(1 << 16)
        if not more:
            raise ConnectionResetError
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    fields = {name.lower(): value for name, _, value in (x.partition(b": ") for x in head.split(b"\r\n")[1:])}
    length = int(fields[b"content-length"]) if b"content-length" in fields else None
    if length is None and (head.startswith((b"GET", b"HEAD")) or b" 101 " in head[:16]):
        length = 0
    while length is None or len(body) < length:
        more = end.recv(1 << 20)
        if not more:
            break
        body += more
    return head + b"\r\n\r\n", body


def _with_header(head: bytes, name: str, value: str) -> bytes:
    lines = [x for x in head.split(b"\r\n") if x and not x.lower().startswith(name.lower().encode() + b":")]
    return b"\r\n".join([*lines, f"{name}: {value}".encode(), b"", b""])


def _nothing() -> bytes:
    """The result of a job that saved nothing, as a server sends it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())
