"""What clients do and what the stock server gets wrong: the rows that concern HunYuan's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from format_client import Book, function
from format_reader import Message
from format_shapes import Call

TURN = function("turn", side={"enum": ["left", "right"]})
THINK = "<think>\nHm.\n</think>\n"
CALL = Call("turn", '{"side": "left"}')
LEFT_OR_RIGHT = tuple(Message("Talk.", "", (call,)) for call in (CALL, Call("turn", '{"side": "right"}')))
REQUIRED: dict[str, Any] = {"tools": [TURN], "tool_choice": "required", "parallel_tool_calls": False}
NAMED: dict[str, Any] = REQUIRED | {"tool_choice": {"type": "function", "function": {"name": "turn"}}}
THINKING_ON: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
TOOLS: dict[str, Any] = {"tools": [TURN], **THINKING_ON}
THINKING_OFF: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
# What a client does, the word and the fields it sends, and the messages that are right.
ROWS: dict[str, tuple[str, dict[str, Any], tuple[Message, ...]]] = {
    "chat with no extra parameters": ("hi", {}, (Message("Hm.", "Yes.", ()),)),
    "thinking on": ("hi", THINKING_ON, (Message("Hm.", "Yes.", ()),)),
    "thinking off": ("hi", THINKING_OFF, (Message("", "At once.", ()),)),
    "tool call": ("call;", TOOLS, (Message("Left?", "", (CALL,)),)),
    "plain reply in tool mode": ("reply;", TOOLS, (Message("No tool.", "Nothing to turn.", ()),)),
    "tool_choice: required": ("talk;", REQUIRED | THINKING_ON, LEFT_OR_RIGHT),
    "tool_choice: a function": ("talk;", NAMED | THINKING_ON, LEFT_OR_RIGHT),
    "a thought closed by </answer>": ("mixed;", THINKING_ON, (Message("Mixed up.", "An answer.", ()),)),
    "a thinking budget": ("hi", THINKING_ON | {"reasoning_budget_tokens": 0}, (Message("", "At once.", ()),)),
}  # fmt: skip


def write_model(path: Path, template: str) -> Path:
    """Write a model that answers each word below in its own way, and all others."""
    book = Book()
    book.add("", f"{THINK}<answer>\nYes.\n</answer>")
    book.add("", "<answer>\nAt once.\n</answer>", closed=True)
    calls = '<tool_calls>[{"name": "turn", "arguments": {"side": "left"}}]</tool_calls>'
    book.add("call;", f"<think>\nLeft?\n</think>\n<answer>\n{calls}\n</answer>")
    book.add("reply;", "<think>\nNo tool.\n</think>\n<answer>\n助手：Nothing to turn.\n</answer>")
    book.add("talk;", "<think>\nTalk.\n</think>\n<answer>\nLet us talk.\n</answer>")
    book.add("mixed;", "<think>\nMixed up.\n</answer>\n<answer>\nAn answer.\n</answer>")
    return book.write(path, template)
