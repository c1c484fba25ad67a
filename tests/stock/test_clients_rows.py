"""The rows of `clients_rows` on the stock server, run as ours is: what it answers to each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from chat_templates.conversations import vendor_template
from clients_rows import REFUSED_TYPES, ROWS, WRONG, wrong_field
from served import client_of
from stock.conftest import Direct
from talker import write_talker

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]

# What the stock server answers to wrong requests, by path; OTHER for the paths that are not named.
OTHER = ""
MISSING = dict.fromkeys(
    (
        *("/v1/token/encode", "/v1/token/decode"),
        *(f"/v1/internal/{name}" for name in ("encode", "decode", "token-count")),
    ),
    404,
)
STATUS: Mapping[str, Mapping[str, int]] = {
    "broken JSON": {OTHER: 500, **MISSING},
    "values of another type": {"/tokenize": 500, "/v1/chat/completions": 400},
    "values of another type that stock drops without a word": {OTHER: 200},
    "token ids that are none": {"/detokenize": 500, **MISSING},
    "a role that no template has a place for": {OTHER: 200},
    "nothing to answer": {OTHER: 200},
    "keys are not moved": {OTHER: 200},
}
# It takes 1.5 for an id.
TAKEN = [{"tokens": [1, 1.5]}]
# These are refused by both; stock's words for the second are not ours.
REFUSED = [{"messages": 5}, {"messages": ["hi"]}, *(wrong_field(key, value).body for key, value in REFUSED_TYPES)]
# What is wrong with the answers that the other rows ask for.
FAILURES: Mapping[str, tuple[type[Exception], str]] = {
    "legacy_logprobs": (KeyError, "^'tokens'$"),
    "chat_logprobs": (KeyError, "^'reasoning_content'$"),
    "logprobs_up_to_a_stop_string": (KeyError, "^'completion_probabilities'$"),
    "echo": (AssertionError, "^not echoed"),
    "token_endpoints": (AssertionError, '"code":404'),
    "breakers_in_a_string": (AssertionError, '"code":400.*must be a non-empty array of strings'),
    "penalty_over_the_whole_context": (AssertionError, "^not penalised: one two$"),
    "frozen_clock": (AssertionError, "^the clock went on"),
}


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripted model with the vendor's template."""
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", vendor_template(data))


@pytest.fixture(scope="module")
def stock_server(stock: Path, model: Path) -> Iterator[httpx.Client]:
    """The stock server, run as ours is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYMOE_ENGINE", str(stock))
        with client_of(model) as client:
            yield client


@pytest.mark.parametrize("row", WRONG)
def test_stock_does_not_refuse(stock_server: httpx.Client, row: str) -> None:
    for wrong in WRONG[row]:
        wanted = STATUS[row].get(wrong.path, STATUS[row].get(OTHER))
        assert wrong.send(stock_server).status_code == (
            200 if wrong.path == "/detokenize" and wrong.body in TAKEN else wanted
        )
        assert wanted != 400 or wrong.body in REFUSED


@pytest.mark.parametrize("row", ROWS)
def test_stock_falls_short(stock_server: httpx.Client, row: str) -> None:
    error, words = FAILURES[row]
    with pytest.raises(error, match=words):
        ROWS[row](stock_server)


def test_stock_shifts_the_context(direct: Direct, model: Path) -> None:
    """It serves with it; ours refuses to (tests/runtime/test_api_manners.py)."""
    with direct(model, "--context-shift"):
        pass
