"""A file as llama.cpp's converter writes it, in hy-serve: each row of `foreign_rows` holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import foreign_rows
import httpx
import pytest
from format_rows import vendor_template
from terminal import TIMEOUT

from hymoe.runtime import overrides
from hymoe.runtime.server import ServerOptions, serve

pytestmark = [pytest.mark.engine, pytest.mark.data]


@pytest.fixture(scope="module")
def client(llama_server: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("foreign")
    model = foreign_rows.write_model(folder / "foreign.gguf", vendor_template(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overrides, "cache", lambda: folder)
        with (
            serve(ServerOptions(model, port=0, threads=1)) as endpoint,
            httpx.Client(base_url=endpoint.url, trust_env=False, timeout=TIMEOUT) as client,
        ):
            yield client


@pytest.mark.parametrize("row", foreign_rows.ROWS)
def test_row(client: httpx.Client, row: str) -> None:
    foreign_rows.ROWS[row](client)
