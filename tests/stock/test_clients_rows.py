"""Each row of `clients_rows` fails on the stock server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from clients_rows import ROWS
from talker import write_talker
from terminal import TIMEOUT

from hymoe.engine.build import BuildOptions, build
from hymoe.runtime import process
from hymoe.runtime.server import ServerOptions, serve

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]

ENGINE_VARIABLE = "HYMOE_STOCK_ENGINE"


@pytest.fixture(scope="module")
def stock_engine() -> Path:
    """The folder of the stock engine, built where it is missing."""
    if given := os.environ.get(ENGINE_VARIABLE):
        return Path(given)
    return build(BuildOptions(backend="cpu", bindings=False, stock=True)).bin


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model with the vendor's template."""
    template = json.loads((data / "a13b" / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", template)


@pytest.fixture(scope="module")
def stock_server(stock_engine: Path, model: Path) -> Iterator[httpx.Client]:
    """The stock server, run as ours is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYMOE_ENGINE", str(stock_engine))
        with (
            serve(ServerOptions(model, port=0, threads=1)) as endpoint,
            httpx.Client(base_url=endpoint.url, trust_env=False, timeout=TIMEOUT) as client,
        ):
            yield client


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_stock_falls_short(stock_server: httpx.Client, row: object) -> None:
    assert callable(row)
    with pytest.raises((AssertionError, KeyError, TypeError)):
        row(stock_server)


def test_stock_shifts_the_context(stock_engine: Path, model: Path) -> None:
    """It serves with it; ours refuses to (tests/runtime/test_api_manners.py)."""
    port = process.free_port("127.0.0.1")
    command = [str(stock_engine / "llama-server"), "--model", str(model), "--port", str(port), "--context-shift"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as server:
        try:
            deadline = time.monotonic() + TIMEOUT
            while not healthy(port):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            server.terminate()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
