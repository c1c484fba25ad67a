"""An RPC worker on this machine: a device whose memory is not ours."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from children import child

from hymoe import engine
from hymoe.runtime import process

SECONDS = 300.0


@contextmanager
def rpc_worker() -> Iterator[str]:
    """Run a worker that computes with this machine's CPU; gives its host:port."""
    port = process.free_port("127.0.0.1")
    command: list[str | Path] = [engine.find().tool("ggml-rpc-server"), "--host", "127.0.0.1"]
    # What it computes with: the engine's own first choice may be a GPU.
    command += ["--device", "CPU", "--port", str(port), "--threads", "1"]
    with child(command):
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
