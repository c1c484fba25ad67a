"""The engine's own template language against jinja2: the prompts that the real server makes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from chat_templates.conversations import Message, conversations, vendor_template
from tiny_model import write_model

from hymoe import engine
from hymoe.chat_templates import fallback, render, repair
from hymoe.errors import EngineError
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import ServerOptions, serve

CLOCK = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

pytestmark = [pytest.mark.engine, pytest.mark.data]


@pytest.fixture(scope="module", params=["a13b", "large", "fallback"])
def template(request: pytest.FixtureRequest, data: Path) -> str:
    name = str(request.param)
    return fallback() if name == "fallback" else repair(vendor_template(data, name)).text


@pytest.fixture(scope="module")
def endpoint(template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    try:
        engine.find()
    except EngineError as exc:
        pytest.skip(str(exc))
    model = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", template=template)
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
        yield endpoint


def sendable(messages: list[Message]) -> list[Message]:
    """What the server takes: tool results are text there, and no assistant has the last word."""
    made = copy.deepcopy(messages)
    if made[-1]["role"] == "assistant":
        made.append({"role": "user", "content": "More."})
    for message in made:
        if not isinstance(message.get("content"), str | None):
            message["content"] = json.dumps(message["content"], ensure_ascii=False)
    return made


def as_the_engine_sees(messages: list[Message]) -> list[Message]:
    """Arguments of calls as objects: the engine parses them for a template that takes either."""
    made = copy.deepcopy(messages)
    for function in (call["function"] for message in made for call in message.get("tool_calls") or ()):
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    return made


def test_the_server_renders_what_jinja2_renders(endpoint: Endpoint, template: str) -> None:
    compared = 0
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=60) as client:
        for messages, variables in conversations(250, seed=3):
            asked = sendable(messages)
            keep = len(messages) % 2 == 0
            given = {key: value for key, value in variables.items() if key != "tools"} | {"keep_thoughts": keep}
            body = {"messages": asked, "chat_template_kwargs": given} | (
                {"tools": variables["tools"]} if "tools" in variables else {}
            )
            answer = client.post("/apply-template", json=body)
            assert answer.status_code == 200, (answer.text, body)
            prompt = answer.json()["prompt"]
            clock = CLOCK.search(prompt)
            now = datetime.fromisoformat(clock[0]) if clock else None
            wanted = render(template, as_the_engine_sees(asked), now=now, keep_thoughts=keep, **variables)
            assert prompt == wanted, body
            compared += 1
    assert compared == 250
