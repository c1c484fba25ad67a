"""A loopback stand-in for the hub: the part of its HTTP API that huggingface_hub uses to read models, and its faults.

Two origins, as on the real one: the hub itself, and the place that LFS files are redirected to.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PIECE = 64 << 10
FIRST_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    """What was asked for and how much of it went out."""

    where: str  # "hub" or "cdn"
    method: str
    path: str
    start: int | None
    token: str | None
    sent: int = 0

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass
class Faults:
    """What goes wrong, by file name; every list is used up one entry a request."""

    drop_after: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    corrupt: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    status: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ignore_range: bool = False
    seconds_per_piece: float = 0.0
    token: str | None = None  # without it: gated
    down: bool = False  # closes every connection


@dataclass(frozen=True)
class Content:
    """One version of a repository."""

    commit: str
    folder: Path

    def names(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir() if file.is_file())

    @cached_property
    def siblings(self) -> list[dict[str, Any]]:
        return [self._sibling(name) for name in self.names()]

    def _sibling(self, name: str) -> dict[str, Any]:
        raw = (self.folder / name).read_bytes()
        entry: dict[str, Any] = {"rfilename": name, "size": len(raw)}
        if is_lfs(name):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(raw)}\nsize {len(raw)}\n"
            entry["blobId"] = blob_id(pointer.encode())
            entry["lfs"] = {"sha256": sha256(raw), "size": len(raw), "pointerSize": len(pointer)}
        else:
            entry["blobId"] = blob_id(raw)
        return entry


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", "tokenizer.json"))


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def blob_id(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


class Hub:
    """A hub with one repository "tencent/Mini"; `versions` are its revisions, "main" the default."""

    repo = "tencent/Mini"

    def __init__(self, folder: Path, commit: str = FIRST_COMMIT) -> None:
        self.versions = {"main": Content(commit, folder)}
        self.faults = Faults()
        self.requests: list[Request] = []
        self._servers = {where: _Server(self, where) for where in ("hub", "cdn")}

    @property
    def url(self) -> str:
        return self._servers["hub"].url

    @property
    def cdn(self) -> str:
        return self._servers["cdn"].url

    def version(self, revision: str) -> Content | None:
        by_commit = {content.commit: content for content in self.versions.values()}
        return self.versions.get(revision) or by_commit.get(revision)

    def served(self, file: str) -> int:
        """Bytes of a file that went out."""
        return sum(request.sent for request in self.requests if request.file == file)

    @contextmanager
    def running(self) -> Iterator[Hub]:
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers.values()]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server in self._servers.values():
                server.shutdown()
                server.server_close()
            for thread in threads:
                thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, where: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.where = where
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(self.path.split("?")[0])
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        token = self.headers.get("Authorization")
        record = Request(self.server.where, self.command, path, int(found[1]) if found else None, token)
        hub.requests.append(record)
        if hub.faults.down:
            self._hang_up()
            return
        statuses = hub.faults.status[record.file]
        if statuses and (status := statuses.pop(0)):
            self._error(status)
        elif self.server.where == "cdn":
            self._send_file(record, found)
        elif hub.faults.token and token != f"Bearer {hub.faults.token}":
            self._error(403 if token else 401, "GatedRepo")
        else:
            self._route(path, record, found)

    def _route(self, path: str, record: Request, span: re.Match[str] | None) -> None:
        hub = self.server.hub
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        asked = api or resolve
        if asked is None or asked[1] != hub.repo:
            self._error(404, "RepoNotFound")
            return
        content = hub.version(asked[2] or "main")
        if content is None:
            self._error(404, "RevisionNotFound")
        elif api:
            self._send_json({"id": hub.repo, "modelId": hub.repo, "sha": content.commit, "siblings": content.siblings})
        elif asked[3] not in content.names():
            self._error(404, "EntryNotFound")
        elif is_lfs(asked[3]):
            self._redirect(content, asked[3])
        else:
            self._send_file(record, span)

    def _redirect(self, content: Content, name: str) -> None:
        entry = next(sibling for sibling in content.siblings if sibling["rfilename"] == name)
        self.send_response(302)
        self.send_header("Location", f"{self.server.hub.cdn}/{content.commit}/{name}?Signature=abc")
        self.send_header("X-Repo-Commit", content.commit)
        self.send_header("X-Linked-ETag", f'"{entry["lfs"]["sha256"]}"')
        self.send_header("X-Linked-Size", str(entry["size"]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _send_file(self, record: Request, span: re.Match[str] | None) -> None:
        hub, name = self.server.hub, record.file
        commit = record.path.split("/")[-2]
        content = hub.version(commit)
        assert content is not None
        raw = (content.folder / name).read_bytes()
        start, end = 0, len(raw)
        if span and not hub.faults.ignore_range:
            start, end = int(span[1]), min(int(span[2] or len(raw)) + 1, len(raw))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(raw)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.faults.corrupt[name] and hub.faults.corrupt[name].pop(0):
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        drops = hub.faults.drop_after[name]
        self._send(record, raw[start:end], drops.pop(0) if drops else None)

    def _send(self, record: Request, raw: bytes, drop_after: int | None) -> None:
        for begin in range(0, len(raw), PIECE):
            piece = raw[begin : begin + PIECE]
            if drop_after is not None and begin + len(piece) > drop_after:
                piece = piece[: max(drop_after - begin, 0)]
            if self.server.hub.faults.seconds_per_piece:
                time.sleep(self.server.hub.faults.seconds_per_piece)
            self.wfile.write(piece)
            record.sent += len(piece)
            if drop_after is not None and begin + PIECE > drop_after:
                self._hang_up()
                return

    def _error(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        raw = json.dumps({"error": f"a page of text about {status}"}).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
