"""What goes wrong with a file as llama.cpp's converter writes it: one check for each row, for both servers.

The file has the vendor's template and one end token; its model says what the scripts below say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from clients_rows import post
from format_client import function
from scripted_model import STOP, STOP_2, Script, cut, write_scripted

ENDS_OTHERWISE = "This ends in the other way."
USER = {"role": "user", "content": "Go."}
# Greedy and without penalties, so that what it says is the script.
SAID = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 60}


def write_model(path: Path, template: str) -> Path:
    """Write it: an answer that ends with the second end token, and goes on where that ends nothing."""
    runs_on = Script([*cut(ENDS_OTHERWISE), STOP_2, *cut(" And more follows.")])
    return write_scripted(path, [runs_on], template=template, end_tokens=(STOP,), sampling=(), full_vocabulary=True)


def empty_system(client: httpx.Client) -> None:
    """An empty system message."""
    _answered(client, [{"role": "system", "content": ""}, USER])


def empty_first_user_message(client: httpx.Client) -> None:
    """An empty first message of the user's."""
    _answered(client, [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hm?"}, USER])


def _answered(client: httpx.Client, messages: list[dict[str, Any]]) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": messages, **SAID})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"].startswith(ENDS_OTHERWISE)


CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I look.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "It rains."},
]
TOOLS = [function("look", city={"type": "string"})]


def history_with_thoughts_and_calls(client: httpx.Client) -> None:
    """Thoughts of the past, the calls they led to and the results: all in the prompt where a client wants that."""
    turn = '<tool_calls>[{"name": "look", "arguments": {"city": "Rome"}}]</tool_calls>\n</answer><|eos|>'
    result = "<tool_response>It rains.</tool_response><|extra_0|>"
    keep = {"chat_template_kwargs": {"keep_thoughts": True}}
    prompt = post(client, "/apply-template", messages=CALLED, tools=TOOLS, **keep)["prompt"]
    assert f"<think>\nI look.\n</think>\n<answer>\n{turn}{result}" in prompt, prompt.split("Weather?")[1]
    assert "I look." not in post(client, "/apply-template", messages=CALLED, tools=TOOLS)["prompt"]


def second_end_token(client: httpx.Client) -> None:
    """<|extra_5|> ends an answer."""
    answer = post(client, "/completion", prompt="Go.<|extra_0|>", n_predict=60, temperature=0, repeat_penalty=1.0)
    assert answer["content"] == ENDS_OTHERWISE, answer["content"]
    assert answer["stop_type"] == "eos"


ROWS: Mapping[str, Callable[[httpx.Client], None]] = {
    check.__name__: check
    for check in (*(empty_system, empty_first_user_message, history_with_thoughts_and_calls, second_end_token),)
}
