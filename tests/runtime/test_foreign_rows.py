"""A file as llama.cpp's converter writes it, in hy-serve: each row of `foreign_rows` holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import foreign_rows
import httpx
import pytest
from chat_templates.conversations import vendor_template
from served import client_of

from hymoe.runtime import overrides

pytestmark = [pytest.mark.engine, pytest.mark.data]


@pytest.fixture(scope="module")
def client(llama_server: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("foreign")
    model = foreign_rows.write_model(folder / "foreign.gguf", vendor_template(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overrides, "cache", lambda: folder)
        with client_of(model) as client:
            yield client


@pytest.mark.parametrize("row", foreign_rows.ROWS)
def test_row(client: httpx.Client, row: str) -> None:
    foreign_rows.ROWS[row](client)
