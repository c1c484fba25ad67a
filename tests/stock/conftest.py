"""The stock engine: the pinned source with nothing of ours but what it cannot run without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
import served

from hymoe.engine.build import BuildOptions, build

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
        with served.direct(stock / "llama-server", model, *flags) as (_, client):
            yield client

    return start
