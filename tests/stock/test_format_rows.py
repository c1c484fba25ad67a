"""The stock server with a model that speaks HunYuan's format: it fails every row that ours passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_templates.conversations import vendor_template
from format_client import ask, message_of
from format_rows import ROWS, write_model

from hymoe.runtime.server import ServerOptions, serve

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]


@pytest.fixture(scope="module")
def url(stock: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_model(tmp_path_factory.mktemp("rows") / "m.gguf", vendor_template(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYMOE_ENGINE", str(stock))
        with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
            yield endpoint.url


@pytest.mark.parametrize("row", ROWS)
def test_stock_fails_a_row_of_clients(url: str, row: str) -> None:
    words, more, right = ROWS[row]
    assert message_of(ask(url, words, **more)) not in right
