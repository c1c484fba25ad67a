"""A tiny model and a server that runs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_model

from hymoe import engine
from hymoe.chat_templates import fallback
from hymoe.errors import EngineError
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import ServerOptions, serve

KEY = "the-key"
UNWANTED = ("HYMOE_API_KEY", "NO_COLOR", "FORCE_COLOR")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with our chat template."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", template=fallback())


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """The engine's server; a visible skip where none is built."""
    try:
        return engine.find().tool("llama-server")
    except EngineError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module's own cache folder: nothing that was measured before counts. The engine stays the one that is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYMOE_ENGINE", str(engine.find().bin))
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HYMOE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def endpoint(llama_server: Path, tiny: Path) -> Iterator[Endpoint]:
    """A healthy server with a key, shared by a module's tests."""
    with serve(ServerOptions(tiny, port=0, api_key=KEY, threads=1)) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of the developer's own settings and places, and a terminal that knows no sequences."""
    for name in os.environ:
        if name.startswith(("LLAMA_", "AIP_")) or name.upper().endswith("_PROXY") or name in UNWANTED:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HYMOE_LOGS", str(tmp_path_factory.getbasetemp() / "logs"))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
