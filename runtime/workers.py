"""RPC workers on other machines: who they are, and whether they are there before the engine asks them."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from hymoe.errors import ServerError

CONNECT_SECONDS = 5.0


class WorkerError(ServerError):
    """A worker does not answer; it may be back later."""


def parse(text: str) -> tuple[str, ...]:
    """Read `host:port,host:port`; nothing for "". Raises ServerError for anything else."""
    workers = tuple(part.strip() for part in text.split(",")) if text else ()
    for worker in workers:
        host, _, port = worker.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ServerError("--rpc", got=worker or "nothing", expected="HOST:PORT, or several with commas between")
    return workers


def check(workers: Sequence[str]) -> None:
    """See that every worker answers. The engine would abort without a word on which. Raises WorkerError."""
    for worker in workers:
        host, _, port = worker.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, UnicodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise WorkerError(
                f"RPC worker {worker} does not answer", got=reason, fix="`hy-engine rpc` starts one there"
            ) from exc
