"""A file as llama.cpp's converter writes it, in the stock server started by hand: each row of `foreign_rows` fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import foreign_rows
import httpx
import pytest
from chat_templates.conversations import vendor_template
from stock.conftest import Direct

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]

# row -> what the failure says
FAILURES = {
    "empty_system": r'"code":400,"message":"Unable to generate parser.*context\.update',
    "empty_first_user_message": r'"code":400,"message":"Unable to generate parser.*context\.update',
    "history_with_thoughts_and_calls": r'^<\|extra_0\|><tool_calls>\[{"name": "look", "arguments": {"city": "Rome"}}\]',
    "second_end_token": r"^This ends in the other way\. And more follows\.$",
}


@pytest.fixture(scope="module")
def client(direct: Direct, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = foreign_rows.write_model(tmp_path_factory.mktemp("foreign") / "foreign.gguf", vendor_template(data))
    with direct(model) as client:
        yield client


@pytest.mark.parametrize("row", foreign_rows.ROWS)
def test_stock_falls_short(client: httpx.Client, row: str) -> None:
    with pytest.raises(AssertionError, match=FAILURES[row]):
        foreign_rows.ROWS[row](client)
