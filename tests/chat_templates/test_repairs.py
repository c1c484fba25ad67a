"""Repaired templates against the vendors' own, both rendered by jinja2 as transformers renders."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_templates.conversations import TOOLS, conversations, vendor_template
from jinja2 import Environment, TemplateError
from jinja2.exceptions import SecurityError

from hymoe.chat_templates import REPAIRS, fallback, render, repair

NOW = datetime(2025, 6, 27, 8, 9, 10)
ROLES = ("system", "user", "assistant", "tool", "stranger")
FOLDERS = ("a13b", "large")
CALL = {"type": "function", "id": "1", "function": {"name": "now", "arguments": {"zone": "北京"}}}

pytestmark = pytest.mark.data


def rendered(template: str, messages: list[Any], **variables: Any) -> str | None:
    """The text, or None where the template refuses or fails."""
    try:
        return render(template, messages, now=NOW, **variables)
    except (TemplateError, SecurityError, TypeError):
        return None


def has_null(messages: list[dict[str, Any]]) -> bool:
    """A null that is printed at all is the word None, which no repair keeps."""
    return any("content" in message and message["content"] is None for message in messages)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_bytes_of_the_vendor_wherever_its_template_renders(data: Path, folder: str) -> None:
    vendor = vendor_template(data, folder)
    repaired = repair(vendor).text
    compared = mended = 0
    for messages, variables in conversations(4000, seed=1, roles=ROLES):
        wanted, ours = rendered(vendor, messages, **variables), rendered(repaired, messages, **variables)
        if wanted is None:
            mended += ours is not None
        elif not has_null(messages):
            assert ours == wanted, (messages, variables)
            compared += 1
    assert compared > 1000
    assert mended > 1000


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_short_conversation(data: Path, folder: str) -> None:
    """All sequences of up to three messages, empty and not, with and without tools."""
    vendor = vendor_template(data, folder)
    repaired = repair(vendor).text
    kinds = [{"role": role, "content": content} for role in ROLES for content in ("", "X")]
    compared = 0
    for n, tools in product(range(4), (None, TOOLS)):
        for messages in product(kinds, repeat=n):
            wanted = rendered(vendor, list(messages), tools=tools)
            assert wanted is not None or not messages[0]["content"]
            if wanted is not None:
                assert rendered(repaired, list(messages), tools=tools) == wanted
                compared += 1
            else:
                assert rendered(repaired, list(messages), tools=tools) is not None
    assert compared > 1000


def test_nothing_fails_that_a_client_may_send(data: Path) -> None:
    repaired = repair(vendor_template(data)).text
    for messages, variables in conversations(2000, seed=2, roles=ROLES):
        text = rendered(repaired, messages, **variables)
        assert text is not None, (messages, variables)
        # With tools a first message that is a tool's is printed raw, as the vendor does.
        assert "None" not in text or messages[0]["role"] == "tool", (messages, variables)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("opening", [{"role": "system", "content": ""}, {"role": "system", "content": None}], ids=str)
def test_an_empty_opening_changes_nothing(data: Path, folder: str, opening: dict[str, str | None]) -> None:
    vendor = vendor_template(data, folder)
    repaired = repair(vendor).text
    user = {"role": "user", "content": "U"}
    assert rendered(vendor, [opening, user]) is None
    assert rendered(repaired, [opening, user]) == rendered(vendor, [user]) == "<|startoftext|>U<|extra_0|>"
    assert rendered(repaired, [{"role": "user", "content": ""}]) == "<|startoftext|><|extra_0|>"


def test_why_one_start_token_is_a_repair(data: Path) -> None:
    """Where dict.update is allowed, in plain jinja2, the vendor's template begins such a user's turn twice."""
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "U"}]
    plain = Environment(trim_blocks=True, lstrip_blocks=True).from_string(vendor_template(data))
    assert plain.render(messages=messages) == "<|startoftext|><|startoftext|>U<|extra_0|>"


@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tools", "no tools"])
@pytest.mark.parametrize("result", [{"t": 21.5, "说": "晴"}, ["a", 1, None], 7, False], ids=str)
def test_tool_results_that_are_no_text_are_their_json(data: Path, result: object, tools: Any) -> None:
    vendor = vendor_template(data)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": result},
    ]
    assert rendered(vendor, messages, tools=tools) is None
    as_text = [*messages[:2], {"role": "tool", "content": json.dumps(result, ensure_ascii=False)}]
    assert rendered(repair(vendor).text, messages, tools=tools) == rendered(vendor, as_text, tools=tools)


@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tools", "no tools"])
def test_past_thoughts_are_dropped_or_kept_as_the_model_wrote_them(data: Path, tools: Any) -> None:
    vendor = vendor_template(data)
    repaired = repair(vendor).text
    plain = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    with_thought = [plain[0], {**plain[1], "reasoning_content": "Hm."}]
    wanted = rendered(vendor, plain, tools=tools)
    assert wanted is not None
    assert rendered(repaired, with_thought, tools=tools) == wanted
    assert rendered(repaired, plain, tools=tools, keep_thoughts=True) == wanted
    said = "助手：A" if tools else "A"
    assert wanted.endswith(f"{said}<|eos|>")
    kept = wanted.removesuffix(f"{said}<|eos|>") + f"<think>\nHm.\n</think>\n<answer>\n{said}\n</answer><|eos|>"
    assert rendered(repaired, with_thought, tools=tools, keep_thoughts=True) == kept


def test_calls_with_a_thought(data: Path) -> None:
    messages = [
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL, CALL]},
    ]
    one = '{"name": "now", "arguments": {"zone": "北京"}}'
    called = f"<tool_calls>[{one}, {one}]</tool_calls>"
    for template in (repair(vendor_template(data)).text, fallback()):
        dropped = rendered(template, messages, tools=TOOLS)
        kept = rendered(template, messages, tools=TOOLS, keep_thoughts=True)
        assert dropped is not None
        assert dropped.endswith(f"用户：U<|extra_0|>{called}<|eos|>")
        assert kept is not None
        assert kept.endswith(f"<|extra_0|><think>\nHm.\n</think>\n<answer>\n{called}\n</answer><|eos|>")


@pytest.mark.parametrize("folder", FOLDERS)
def test_repairing_twice_changes_nothing(data: Path, folder: str) -> None:
    once = repair(vendor_template(data, folder))
    assert once.applied
    assert not once.still_mutates
    again = repair(once.text)
    assert (again.text, again.applied) == (once.text, ())


def test_every_repair_is_needed_and_has_a_reason(data: Path) -> None:
    applied = [name for folder in FOLDERS for name in repair(vendor_template(data, folder)).applied]
    assert {each.name for each in REPAIRS} == set(applied)
    assert all(each.reason for each in REPAIRS)


def test_what_is_not_found_is_kept(data: Path) -> None:
    assert repair(fallback()).applied == ()
    assert repair("{{ messages }}") == repair(repair("{{ messages }}").text)
    other = vendor_template(data).replace("{'has_head': true}", "{'has_head': True}")
    assert repair(other).still_mutates
    assert "{'has_head': True}" in repair(other).text
