"""What a model hub answers to transformers and nnsight, for folders ``ROOT/organisation/name``, on loopback.

::

    python hub.py ROOT PORT
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from typing import Any


def commit(folder: Path) -> str:
    """A name for the present content of a folder, so that clients fetch it again when it changes."""
    digest = hashlib.sha1()
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def parameters(folder: Path) -> int:
    """How many parameters a folder's weights have; the server asks before it decides where to put them."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


class Hub(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        """Answers with a body."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answers without."""
        self._answer()

    def _answer(self) -> None:
        match self.path.split("?")[0].strip("/").split("/"):
            case ["api", "models", organisation, name, *rest]:
                self._describe(self.root / organisation / name, rest)
            case [organisation, name, "resolve", _, *path] if path:
                self._file(self.root / organisation / name, "/".join(path))
            case _:
                self._reply(404)

    def _describe(self, folder: Path, rest: list[str]) -> None:
        if not folder.is_dir():
            self._reply(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path.name for path in folder.iterdir())
        found: Any
        if rest[:1] == ["tree"]:
            found = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
        else:
            repo, count = f"{folder.parent.name}/{folder.name}", parameters(folder)
            found = {
                **{"_id": "0", "id": repo, "modelId": repo, "sha": commit(folder), "private": False, "tags": []},
                **{"downloads": 0, "likes": 0, "pipeline_tag": "text-generation", "library_name": "transformers"},
                "siblings": [{"rfilename": file} for file in files],
                "safetensors": {"parameters": {"F32": count}, "total": count},
            }
        self._reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, path: str) -> None:
        if not folder.is_dir():
            self._reply(404, headers={"X-Error-Code": "RepoNotFound"})
        elif not (folder / path).is_file():
            self._reply(404, headers={"X-Repo-Commit": commit(folder), "X-Error-Code": "EntryNotFound"})
        else:
            body = (folder / path).read_bytes()
            self._reply(200, body, {"X-Repo-Commit": commit(folder), "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Hub).serve_forever()
