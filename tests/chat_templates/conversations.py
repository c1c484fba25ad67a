"""Conversations for templates: random ones from a seed, and the vendors' templates to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

Message = dict[str, Any]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": '今天的天气 <b>&</b> "tomorrow\'s"',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]
TEXTS = ("", "Hello.\n", "你好，世界", "{{ x }} <|eos|> {% if %}", " /no_think <think>\n\n</think>\n", 'a\\n\'"b"\t')
RESULTS = (*TEXTS, {"t": 21.5, "说": "晴"}, ["a", 1, None], 7, True)
ARGUMENTS: tuple[Any, ...] = ({"city": "北京", "days": 1}, {}, {"text": 'say "hi"\n', "deep": {"list": [1, 2.5, None]}})


def vendor_template(data: Path, folder: str = "a13b") -> str:
    """The template of the model whose files are in that folder of `data`: Hunyuan-A13B-Instruct's."""
    template = json.loads((data / folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    assert isinstance(template, str)
    return template


def call(random: Random) -> dict[str, Any]:
    arguments = random.choice(ARGUMENTS)
    if random.random() < 0.5:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{random.randrange(1000)}",
        "type": "function",
        "function": {"name": random.choice(("weather", "now")), "arguments": arguments},
    }


def message(random: Random, role: str) -> Message:
    """One message; content may be absent, null, or, of a tool, anything."""
    made: Message = {"role": role, "content": random.choice(RESULTS if role == "tool" else TEXTS)}
    if random.random() < 0.05:
        made["content"] = None
    if role == "assistant":
        if random.random() < 0.5:
            made["reasoning_content"] = random.choice(TEXTS)
        if random.random() < 0.5:
            made["tool_calls"] = [call(random) for _ in range(random.choice((1, 1, 2, 3)))]
            made["content"] = random.choice((None, "", "I look.", ...))
            if made["content"] is ...:
                del made["content"]
        elif random.random() < 0.2:
            made["tool_calls"] = None
    return made


def conversations(
    n: int, *, seed: int, roles: tuple[str, ...] = ("system", "user", "assistant", "tool")
) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    """Give `n` conversations, ordinary and odd ones, each with the variables of its request."""
    random = Random(seed)
    for _ in range(n):
        if random.random() < 0.5:  # as they come: a system message or none, then turns
            order = ["system"] * random.choice((0, 1)) + ["user", "assistant", "tool", "assistant"] * 3
            order = order[: random.randrange(1, len(order))]
        else:
            order = [random.choice(roles) for _ in range(random.randrange(1, 7))]
        variables: dict[str, Any] = {"tools": TOOLS} if random.random() < 0.5 else {}
        if random.random() < 0.6:
            variables["enable_thinking"] = random.choice((True, False))
        yield [message(random, role) for role in order], variables
