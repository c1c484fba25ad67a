"""The rows of docs about clients that concern HunYuan's format: what the stock server does with the same model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from format_client import Book, ask, function, message_of
from format_reader import Message
from format_shapes import Call

from hymoe.engine.build import BuildOptions, build
from hymoe.runtime.server import ServerOptions, serve

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]

STOCK_VARIABLE = "HYMOE_STOCK_ENGINE"
TURN = function("turn", side={"enum": ["left", "right"]})
THINK = "<think>\nHm.\n</think>\n"
CALL = Call("turn", '{"side": "left"}')
Ask = Callable[..., Message]


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the vendor's template that answers each word below in its own way."""
    book = Book()
    book.add("slow;", f"{THINK}<answer>\nYes.\n</answer>")
    book.add("fast;", "<answer>\nAt once.\n</answer>", closed=True)
    calls = '<tool_calls>[{"name": "turn", "arguments": {"side": "left"}}]</tool_calls>'
    book.add("call;", f"<think>\nLeft?\n</think>\n<answer>\n{calls}\n</answer>")
    book.add("reply;", "<think>\nNo tool.\n</think>\n<answer>\n助手：Nothing to turn.\n</answer>")
    book.add("talk;", "<think>\nTalk.\n</think>\n<answer>\nLet us talk.\n</answer>")
    book.add("mixed;", "<think>\nMixed up.\n</answer>\n<answer>\nAn answer.\n</answer>")
    template = json.loads((data / "a13b" / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return book.write(tmp_path_factory.mktemp("rows") / "m.gguf", template)


@pytest.fixture(scope="module", params=["ours", "stock"])
def server(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[str, bool]]:
    """Either engine with the same file: its address, and whether it is ours."""
    ours = request.param == "ours"
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            given = os.environ.get(STOCK_VARIABLE)
            folder = Path(given) if given else build(BuildOptions(backend="cpu", bindings=False, stock=True)).bin
            patch.setenv("HYMOE_ENGINE", str(folder))
        with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
            yield endpoint.url, ours


REQUIRED: dict[str, Any] = {"tools": [TURN], "tool_choice": "required", "parallel_tool_calls": False}
NAMED: dict[str, Any] = REQUIRED | {"tool_choice": {"type": "function", "function": {"name": "turn"}}}
THINKING_ON: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
TOOLS: dict[str, Any] = {"tools": [TURN], **THINKING_ON}
THINKING_OFF: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
LEFT_OR_RIGHT = tuple(Message("Talk.", "", (call,)) for call in (CALL, Call("turn", '{"side": "right"}')))
# What a client does, the word and the fields it sends, and the messages that are right.
ROWS: dict[str, tuple[str, dict[str, Any], tuple[Message, ...]]] = {
    "chat with no extra parameters": ("slow;", {}, (Message("Hm.", "Yes.", ()),)),
    "thinking on": ("slow;", THINKING_ON, (Message("Hm.", "Yes.", ()),)),
    "thinking off": ("fast;", THINKING_OFF, (Message("", "At once.", ()),)),
    "tool call": ("call;", TOOLS, (Message("Left?", "", (CALL,)),)),
    "plain reply in tool mode": ("reply;", TOOLS, (Message("No tool.", "Nothing to turn.", ()),)),
    "tool_choice: required": ("talk;", REQUIRED | THINKING_ON, LEFT_OR_RIGHT),
    "tool_choice: a function": ("talk;", NAMED | THINKING_ON, LEFT_OR_RIGHT),
    "a thought closed by </answer>": ("mixed;", THINKING_ON, (Message("Mixed up.", "An answer.", ()),)),
    "a thinking budget": ("slow;", THINKING_ON | {"reasoning_budget_tokens": 0}, (Message("", "At once.", ()),)),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_clients(server: tuple[str, bool], row: str) -> None:
    url, ours = server
    words, more, right = ROWS[row]
    assert (message_of(ask(url, words, **more)) in right) == ours, "stock fails, ours does not"
