"""A real NDIF server on loopback, for tests: installed, started, entered and taken down by one program.

::

    python tests/ndif/server.py test [PYTEST ARGUMENTS]   # up, the tests marked ndif, down
    python tests/ndif/server.py up | down | ports
    python tests/ndif/server.py run COMMAND …             # a client: it must run where the server does

The server (PyPI's ndif: FastAPI, Ray, Redis and an object store) lives in network, mount and process namespaces of its
own, with no interface but loopback. Ray binds the machine's routable addresses whatever it is told, so the namespace is
what keeps it in, and nothing starts outside it. The process that all others descend from is the namespace's first:
when that ends, the kernel ends the rest, and ``test`` ends it even where ``test`` itself is killed, for it then reads the
end of a pipe. ``test`` ends in a bounded time, whatever hangs.

It serves the bundled toys as ``toys/gpt2`` and so on, and whatever ``publish`` adds. Only the standard library is used
here, so that it runs under any Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
STATE = CHECKOUT / ".ndif"  # logs, the model hub, and where the server is; ignored by git

PINS = (
    "torch==2.13.0",
    "transformers==5.22.2",  # the newest that nnsight 0.8.1 loads by repo id
    "nnsight==0.8.1",
    "ray[default]==2.60.0",
    "fastapi==0.163.2",
    "uvicorn[standard]==0.54.0",
    "gunicorn",
    "python-multipart==0.0.34",
    "boto3==1.44.5",
    "redis==8.1.0",
    "click",
    "python-dotenv",
    "pyyaml",
    "accelerate==1.15.0",
    "zstandard",
    "peft==0.21.2",
    "moto[server,s3]==5.2.5",
)
WITHOUT_DEPENDENCIES = ("ndif==0.1.2",)  # declares Python 3.12, and runs on 3.11
PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")  # unpacked, not installed

HUB, REDIS, STORE, API, RAY, RAY_CLIENT, DASHBOARD = 9100, 6390, 9000, 8001, 6385, 10001, 8265
PORTS = {HUB, REDIS, STORE, API, RAY, RAY_CLIENT, DASHBOARD}
HOST = f"http://127.0.0.1:{API}"
KINDS = ("trusted", "sandbox")
"""How the server runs a request: in the process that has the model, or in one without it. Given as the API key."""

IS_SERVICE = "TRACEPATCH_NDIF_SERVICE"  # in the environment of everything that is the server
INSIDE = "TRACEPATCH_NDIF"  # in the environment of its clients


READY = "ready"
LIMIT = 25 * 60  # seconds for all of ``test``; it takes about a third of them where nothing else runs
DOWNLOAD, START, END = 600, 300, 20  # for a download, for a service that starts another one, and for all to end
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


class CannotServe(Exception):
    """Why there can be no server on this machine."""


class DidNotStart(Exception):
    """Why there is none, or why it goes on, on a machine where there can be one."""


def require_able() -> None:
    """Refuses machines where the server cannot be kept to itself.

    Raises:
        CannotServe: So it is.
    """
    if not sys.platform.startswith("linux"):
        raise CannotServe("network namespaces are a thing of Linux")
    for tool in ("unshare", "nsenter", "ip", "ss"):
        if shutil.which(tool) is None:
            raise CannotServe(f"there is no {tool} (util-linux, iproute2)")
    if os.geteuid() != 0:
        raise CannotServe("only root may make namespaces")
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise CannotServe(f"the kernel refuses namespaces: {tried.stderr.strip()}")
    if shutil.which("redis-server") is None and shutil.which("apt-get") is None and not installed():
        raise CannotServe("there is no redis-server, and no apt-get to unpack one with")


# ---------------------------------------------------------------------------------------------------------- installing


def home() -> Path:
    """Where this set of pins is, or will be, installed: outside the checkout, so that fresh ones find it."""
    pins = repr((PINS, WITHOUT_DEPENDENCIES, PACKAGES, sys.version_info[:2]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tracepatch-ndif" / hashlib.sha256(pins.encode()).hexdigest()[:12]


def installed() -> bool:
    """Whether it is there, and whole."""
    return (home() / "complete").exists()


def install() -> None:
    """Puts the server's own virtual environment, and redis, where they are not yet.

    Raises:
        CannotServe: A download failed.
    """
    import fcntl  # not on every system, as this module is

    home().mkdir(parents=True, exist_ok=True)
    with (home() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed():
            return
        print(f"Installing an NDIF server into {home()}: a minute or two, two gigabytes.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home() / "venv"], check=True)
        pip = (home() / "venv/bin/pip", "--disable-pip-version-check", "install", "--quiet")
        try:
            _download(*pip, *PINS)
            _download(*pip, "--no-deps", "--ignore-requires-python", *WITHOUT_DEPENDENCIES)
            if shutil.which("redis-server") is None:
                _unpack_redis()
        except subprocess.SubprocessError as error:
            raise CannotServe(f"installing it failed: {error}") from error
        (home() / "complete").touch()


def _download(*command: Any, folder: str | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=DOWNLOAD)


def _unpack_redis() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # apt downloads as a user of its own
        try:
            _download("apt-get", "-qq", "download", *PACKAGES, folder=folder)
        except subprocess.CalledProcessError:  # the lists may be old, or not there
            _download("apt-get", "-qq", "update")
            _download("apt-get", "-qq", "download", *PACKAGES, folder=folder)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, home() / "redis"], check=True)


# ------------------------------------------------------------------------------------------------- the server's services


def environment() -> dict[str, str]:
    """What the server's processes run with."""
    local = "127.0.0.1,localhost"
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("NDIF_", "RAY_", "PYTHON", "HF_", INSIDE))},
        IS_SERVICE: "1",
        "PATH": f"{home() / 'venv/bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),  # for the actors; tracepatch itself is not there, as on any server
        "HF_HOME": str(STATE / "served"),
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB}",
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{REDIS}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{STORE}",
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{RAY_CLIENT}",
        "NDIF_CONTROLLER_IMPORT_PATH": "cpu_actors.Controller",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_actors.ModelActor",
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_SANDBOX_POOL_SIZE": "2",
        "NNSIGHT_CONFIG": str(STATE / "nnsight.yaml"),
        "TRACEPATCH_NDIF_TIME_LIMIT": str(STATE / "time-limit"),
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_ADDRESS": f"127.0.0.1:{RAY}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": local,
        "no_proxy": local,
    }


def client_environment() -> dict[str, str]:
    """What clients run with besides their own: a model hub of their own, and where the server is."""
    local = "127.0.0.1,localhost"
    return {
        INSIDE: HOST,
        "HF_HOME": str(STATE / "fetched"),
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB}",
        "NO_PROXY": local,
        "no_proxy": local,
    }


def ray_folder() -> Path:
    """Where Ray puts its sockets: their paths may have no more than 107 characters."""
    return Path("/tmp") / f"ndif-{hashlib.sha256(str(STATE).encode()).hexdigest()[:8]}"


def start(service: str) -> None:
    """Starts one service: ``hub``, ``redis``, ``store``, ``ray``, ``controller`` or ``api``; waits for the middle two."""
    require_alone()
    given: dict[str, tuple[Any, ...]] = {
        "hub": (sys.executable, HERE / "hub.py", STATE / "hub", HUB),
        "redis": (*_redis(), "--bind", "127.0.0.1", "--port", REDIS, "--save", "", "--dir", ray_folder()),
        "store": ("moto_server", "-H", "127.0.0.1", "-p", STORE),
        "ray": (
            *("ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={RAY}"),
            *("--num-cpus=16", "--num-gpus=1", "--object-store-memory=100000000"),  # as many as models are deployed
            "--resources=" + json.dumps({"head": 10, "cuda_memory_bytes": 4e9, "cpu_memory_bytes": 4e9}),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}"),
            *(f"--ray-client-server-port={RAY_CLIENT}", f"--temp-dir={ray_folder()}", "--disable-usage-stats"),
        ),
        "controller": ("python", "-m", "ndif.services.ray.deployments.controller.controller"),
        "api": (
            *("gunicorn", "--bind", f"127.0.0.1:{API}", "--config", "python:ndif.services.api.gunicorn_conf"),
            "ndif.services.api.app:app",
        ),
    }
    env = environment()
    if service == "controller":
        env["RAY_ADDRESS"] = f"127.0.0.1:{RAY}"
    command = [str(part) for part in given[service]]
    # Python looks for modules where it is started, and there are none: no server has tracepatch.
    place: dict[str, Any] = {"env": env, "cwd": STATE, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with (STATE / f"{service}.log").open("a") as log:
        if service in ("ray", "controller"):  # these start something and end
            try:
                subprocess.run(command, stdout=log, stderr=log, check=True, timeout=START, **place)
            except subprocess.SubprocessError as error:
                raise DidNotStart(f"{service} did not start: see {STATE / service}.log") from error
            return
        # The shell ends at once, so that its child is nobody's here; the number of the shell names their group.
        leave = ["sh", "-c", '"$@" >&2 & echo $$', "sh", *command]
        group = subprocess.run(leave, stdout=subprocess.PIPE, stderr=log, check=True, **place).stdout
    _pid_file(service).write_text(group.decode().strip())


def start_all(patience: float = 300.0) -> None:
    """Starts the server, and returns when it takes requests.

    Raises:
        DidNotStart: It does not.
    """
    (STATE / "nnsight.yaml").write_text("APP:\n  PYMOUNT: false\n")  # its .save on every object breaks anyio
    ray_folder().mkdir(exist_ok=True)
    for service in ("hub", "redis", "store", "ray", "controller", "api"):
        start(service)
    wait_for_api(patience)


def wait_for_api(patience: float = 300.0) -> None:
    """Returns when the server takes requests.

    Raises:
        DidNotStart: It does not.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{HOST}/connected", timeout=3) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise DidNotStart(f"it does not take requests after {patience:.0f} s: see {STATE}/*.log")


def services(*names: str) -> list[int]:
    """The server's processes, as seen from inside: those of the named services, all of them otherwise."""
    require_alone()
    marked = f"{IS_SERVICE}=1".encode()
    groups = {int(_pid_file(name).read_text()) for name in names}
    found = []
    for pid in processes():
        try:
            is_one = marked in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if is_one and (not names or os.getpgid(pid) in groups):
                found.append(pid)
        except OSError:  # it has ended
            continue
    return found


def publish(repo: str, folder: Path) -> str:
    """Adds a model folder to what the hub has, as ``organisation/name``, or exchanges it there."""
    place = STATE / "hub" / repo
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(folder.resolve(), target_is_directory=True)
    return repo


def _redis() -> tuple[Any, ...]:
    if found := shutil.which("redis-server"):
        return (found,)
    libraries = ":".join(str(path) for path in (home() / "redis/usr/lib").glob("*-linux-*"))
    return "env", f"LD_LIBRARY_PATH={libraries}", home() / "redis/usr/bin/redis-server"


def _pid_file(service: str) -> Path:
    return STATE / f"{service}.pid"


# --------------------------------------------------------------------------------------------------------- the namespace


def require_alone() -> None:
    """Refuses to start or end anything where there is more than loopback.

    Raises:
        CannotServe: So it is here.
    """
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others:
        raise CannotServe(f"this is no place for the server: there is {', '.join(others)} besides loopback")


def processes() -> Iterator[int]:
    """All processes that can be seen from here."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def network_of(pid: int | str) -> str:
    """Which network namespace a process is in; empty if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def first() -> int | None:
    """The first process of this checkout's server, as seen from outside."""
    wanted = [os.fsencode(HERE / "server.py"), b"_first"]
    for pid in processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[1:3] == wanted and network_of(pid) != network_of("self"):
            return pid
    return None


def up(*, hold: bool = False) -> subprocess.Popen[bytes]:
    """Installs what is missing, starts the server and waits until it takes requests; takes down one that is there.

    Args:
        hold: End it when this process ends, however that happens.

    Returns:
        What made the namespaces; its standard input keeps them, if they are held.

    Raises:
        CannotServe: The machine is not able to.
        DidNotStart: It is, and something failed.
    """
    require_able()
    install()
    down()
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir()
    for weights in sorted((CHECKOUT / "tracepatch/toys/weights").iterdir()):
        publish(f"toys/{weights.name}", weights)
    with (STATE / "first.log").open("w") as log:
        maker = subprocess.Popen(
            [*UNSHARE, sys.executable, str(HERE / "server.py"), "_first", "hold" if hold else "stay"],
            stdin=subprocess.PIPE if hold else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,  # what it inherited would stay open as long as the server is up
            start_new_session=True,
        )
    assert maker.stdout is not None
    said = maker.stdout.readline().decode().strip()
    if said != READY:
        down()
        raise DidNotStart(said or f"it ended while it started: see {STATE}/*.log")
    return maker


def down() -> None:
    """Ends the server and everything that runs where it does, and nothing else.

    Raises:
        DidNotStart: Something goes on.
    """
    found = first()
    if found is not None:
        inside = network_of(found)
        # A sandbox's sockets have a fixed folder, and nobody removes those of runners that were killed.
        bound = Path(f"/proc/{found}/net/unix").read_text().split()
        os.kill(found, signal.SIGKILL)  # with the first process of a namespace the kernel ends all
        until = time.monotonic() + END
        while left := [pid for pid in processes() if network_of(pid) == inside]:
            if time.monotonic() > until:
                raise DidNotStart(f"these processes did not end: {left}")
            time.sleep(0.05)
        for path in bound:
            if path.startswith("/tmp/sbx-"):
                Path(path).unlink(missing_ok=True)
    shutil.rmtree(ray_folder(), ignore_errors=True)


def enter(command: list[str]) -> int:
    """Runs a client where the server is, from the same folder; gives its exit status."""
    found = first()
    if found is None:
        raise DidNotStart("there is no server: python tests/ndif/server.py up")
    given = [f"{name}={value}" for name, value in client_environment().items()]
    inside = ["nsenter", "-t", str(found), "--net", "--mount", "--pid"]
    return subprocess.run([*inside, "env", "-C", os.getcwd(), *given, *command], check=False).returncode


def listeners() -> list[str]:
    """The addresses where something listens here, as ``address:port``."""
    found = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True)
    return sorted(line.split()[3] for line in found.stdout.splitlines())


def _first(mode: str) -> None:
    """What the first process does: start the server, bury orphans, and end when it is held no more."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if mode == "hold":
        threading.Thread(target=_end_with_the_holder, daemon=True).start()
    try:
        start_all()
        print(READY, flush=True)
    except (CannotServe, DidNotStart) as error:
        print(error, flush=True)
        return
    while True:
        try:
            os.wait()
        except ChildProcessError:  # a test took all services down
            time.sleep(0.5)


def _end_with_the_holder() -> None:
    sys.stdin.buffer.read()  # until the other end of the pipe closes
    os._exit(1)


def _test(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is left of it is removed, too
    try:
        require_able()
    except CannotServe as error:
        return _skipped(error)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(LIMIT)
    try:
        outside = set(listeners())
        maker = up(hold=True)
        spilled = {address for address in set(listeners()) - outside if int(address.rpartition(":")[2]) in PORTS}
        if spilled:
            raise DidNotStart(f"it listens outside of its namespace: {', '.join(sorted(spilled))}")
        status = enter([sys.executable, "-m", "pytest", "-n", "0", "-m", "ndif", *arguments])
        down()
        maker.wait(END)
        return status
    except CannotServe as error:
        return _skipped(error)
    finally:
        signal.alarm(0)
        down()


def _skipped(error: CannotServe) -> int:
    print(f"The tests of remote runs are skipped: {error}.")
    return 0


def _out_of_time(*_: object) -> None:
    for log in sorted(STATE.glob("*.log")):
        words = log.read_text(errors="replace").splitlines()[-5:]
        print(f"{log.name}:", *words, sep="\n  ", file=sys.stderr)
    raise DidNotStart(f"the tests have not ended in {LIMIT / 60:.0f} minutes, and are ended with it")


def main(command: str, *arguments: str) -> int:
    """What is asked for on the command line; gives the exit status."""
    try:
        if command == "_first":
            _first(*arguments)
        elif command == "up":
            up()
            print(f"{HOST} is up; python tests/ndif/server.py run COMMAND …")
        elif command == "down":
            down()
        elif command == "run":
            return enter(list(arguments))
        elif command == "ports":
            return enter(["ss", "-ltn"])
        elif command == "test":
            return _test(list(arguments))
        else:
            print(__doc__)
            return 2
    except (CannotServe, DidNotStart) as error:
        print(f"No NDIF server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["help"])))
