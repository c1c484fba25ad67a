"""Our fallback against the vendor's template, both rendered as transformers renders."""

from __future__ import annotations

import sys
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_templates.conversations import TOOLS, vendor_template
from chat_templates.conversations import conversations as conversations_of
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from hymoe.chat_templates import fallback, render, repair
from hymoe.chat_templates.render import _compiled
from hymoe.errors import UnsupportedError

ROLES = ("system", "user", "assistant", "tool", "stranger")
CONTENTS = ("", "Hello.\n", "{{ x }} 你好 <|eos|>", None)  # None: no content at all
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})

Messages = list[dict[str, str]]


def conversations(longest: int) -> list[Messages]:
    kinds = [(role, content) for role in ROLES for content in CONTENTS]
    return [
        [{"role": role} if content is None else {"role": role, "content": content} for role, content in turns]
        for n in range(longest + 1)
        for turns in product(kinds, repeat=n)
    ]


@pytest.mark.data
def test_fallback_equals_the_vendors_template(data: Path) -> None:
    vendor = vendor_template(data)
    compared = refused = 0
    for messages, variables in product(conversations(2), THINKING):
        if messages and not messages[0].get("content"):
            with pytest.raises(SecurityError, match="'update' of 'dict'"):
                render(vendor, messages, **variables)
            refused += 1
        else:
            assert render(fallback(), messages, **variables) == render(vendor, messages, **variables), messages
            compared += 1
    assert (compared, refused) == (3 * 211, 3 * 210)


@pytest.mark.data
@pytest.mark.parametrize("folder", ["a13b", "large"])
def test_fallback_equals_the_vendors_over_long_conversations(data: Path, folder: str) -> None:
    vendor = vendor_template(data, folder)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}\n 中文"} for i in range(7)]
    for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns], turns[:1], turns[1:]):
        assert render(fallback(), messages) == render(vendor, messages)


def test_a_conversation_word_for_word() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
    ]
    expected = "<|startoftext|>S<|extra_4|>U1<|extra_0|>A1<|eos|><|startoftext|>U2<|extra_0|>"
    assert render(fallback(), messages) == expected
    assert render(fallback(), messages, enable_thinking=False) == expected + "<think>\n\n</think>\n"


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {}], ids=str)
def test_an_empty_first_message_changes_nothing(empty: dict[str, str | None]) -> None:
    user = {"role": "user", "content": "U"}
    assert render(fallback(), [{"role": "system", **empty}, user]) == render(fallback(), [user])
    assert render(fallback(), [{"role": "user", **empty}]) == "<|startoftext|><|extra_0|>"


def test_the_environment_is_the_one_of_transformers() -> None:
    template = (
        "{% for m in messages %}\n    {% if loop.index0 == 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n"
        "{% endfor %}\n{{ strftime_now('%Y-%m-%d') }}"
    )
    messages = [{"role": "user", "content": "<你>"}, {"role": "user", "content": "unseen"}]
    shown = render(template, messages, now=datetime(2025, 6, 27))
    assert shown == '{"role": "user", "content": "<你>"}\n2025-06-27'
    with pytest.raises(TemplateError, match="no such role"):
        render("{{ raise_exception('no such role') }}", [])
    with pytest.raises(SecurityError):
        render("{{ messages.append(1) }}", [])


def test_without_jinja2_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UnsupportedError, match="needs jinja2; pip install jinja2"):
        render("", [])


CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
    {"type": "function", "function": {"name": "now", "arguments": {}}},
]


def test_fallback_with_tools_word_for_word() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "Hm."},
        {"role": "tool", "content": {"t": 21}},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "A", "tool_calls": None},
        {"role": "user", "content": "U2"},
    ]
    head, rest = render(fallback(), messages, tools=TOOLS).split("<|extra_4|>")
    assert head.startswith("<|startoftext|>You can call")
    assert render("{{ tools | tojson }}", [], tools=TOOLS) in head
    assert head.endswith("\n\nS")
    assert rest == (
        '用户：U1<|extra_0|><tool_calls>[{"name": "weather", "arguments": {"city": "Paris"}}, '
        '{"name": "now", "arguments": {}}]</tool_calls><|eos|><tool_response>{"t": 21}</tool_response><|extra_0|>'
        "<tool_response>noon</tool_response><|extra_0|>助手：A<|eos|>用户：U2<|extra_0|>"
    )
    assert render(fallback(), messages[1:], tools=TOOLS).split("<|extra_4|>")[1] == rest


@pytest.mark.data
def test_fallback_has_the_vendors_wire_form_with_tools(data: Path) -> None:
    """All but the prose at the head."""
    vendor = repair(vendor_template(data)).text
    compared = 0
    for messages, variables in conversations_of(2000, seed=5):
        if variables.get("tools") and messages[0]["role"] in ("system", "user"):
            ours, theirs = (render(template, messages, **variables) for template in (fallback(), vendor))
            # The prose ends where the functions do; a text of a conversation may hold anything, but not this token.
            assert ours.split("<|extra_4|>", 1)[1] == theirs.split("<|extra_4|>", 1)[1]
            compared += 1
    assert compared > 500
