"""The stock engine: the pinned source with nothing of ours but what it cannot run without."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from children import child
from terminal import TIMEOUT

from hymoe.engine.build import BuildOptions, build
from hymoe.runtime import process

ENGINE_VARIABLE = "HYMOE_STOCK_ENGINE"
Direct = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="session")
def stock() -> Path:
    """Its folder, built where it is missing."""
    if given := os.environ.get(ENGINE_VARIABLE):
        return Path(given)
    return build(BuildOptions(backend="cpu", bindings=False, stock=True)).bin


@pytest.fixture(scope="session")
def direct(stock: Path) -> Direct:
    """Start its server as a user does, on a file and with flags: nothing of hy-serve's is between."""

    @contextmanager
    def start(model: Path, *flags: str) -> Iterator[httpx.Client]:
        port = process.free_port("127.0.0.1")
        command = [str(stock / "llama-server"), "--model", str(model), "--port", str(port), *flags]
        with (
            child(command) as server,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT) as client,
        ):
            deadline = time.monotonic() + TIMEOUT
            while not healthy(client):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield client

    return start


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
