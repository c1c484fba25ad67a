"""The prompt that a served model sees is the one the vendor's own stack would build."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates.conversations import vendor_template
from jinja2.exceptions import SecurityError
from served import client_of
from tiny_model import write_model

from hymoe.chat_templates import fallback, render, repair

pytestmark = pytest.mark.engine

ROLES = ("system", "user", "assistant", "tool")
CONTENTS = ("", "Hello.\n", "{{ x }} 你好")
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})

Messages = list[dict[str, str]]

# What the engine does not render as the vendor's stack does: name -> (messages, what the engine answers).
# A last message of the assistant is the beginning of the answer for the engine, not a finished turn
# (`hy-serve … -- --no-prefill-assistant` changes that), and two of them are refused.
NOT_RENDERED: dict[str, tuple[Messages, str]] = {
    "answer begun": (
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        "<|startoftext|>Hello<|extra_0|><think>\n\n</think>\n<answer>\nHi",
    ),
    "two answers": (
        [{"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        "Cannot have 2 or more assistant messages at the end of the list.",
    ),
}


def conversations() -> list[Messages]:
    kinds = list(product(ROLES, CONTENTS))
    short = [turns for n in (1, 2) for turns in product(kinds, repeat=n)]
    long = [tuple(kinds[(7 * i + 5 * j) % len(kinds)] for j in range(6)) for i in range(12)]
    return [[{"role": role, "content": content} for role, content in turns] for turns in [*short, *long]]


def engine_renders(messages: Messages) -> bool:
    return bool(messages[0]["content"]) and messages[-1]["role"] != "assistant"


@pytest.fixture(scope="module")
def vendor(data: Path) -> str:
    return vendor_template(data)


@pytest.fixture(scope="module")
def vendors_server(llama_server: Path, vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of a model that carries the vendor's template, which is repaired as it is loaded."""
    model = write_model(tmp_path_factory.mktemp("model") / "vendor.gguf", template=vendor)
    with client_of(model) as client:
        yield client


@pytest.fixture(scope="module")
def our_server(llama_server: Path, tiny: Path) -> Iterator[httpx.Client]:
    """A server of a model that carries our template."""
    with client_of(tiny) as client:
        yield client


def served(client: httpx.Client, messages: Messages, variables: dict[str, Any] | None = None) -> str:
    """The prompt, or the message of the error."""
    body: dict[str, Any] = {"messages": messages, **({"chat_template_kwargs": variables} if variables else {})}
    answer = client.post("/apply-template", json=body).json()
    return str(answer["prompt"] if "prompt" in answer else answer["error"]["message"])


@pytest.mark.data
def test_the_vendors_template_as_served(vendors_server: httpx.Client, vendor: str) -> None:
    compared = 0
    for messages, variables in product(filter(engine_renders, conversations()), THINKING):
        assert served(vendors_server, messages, variables) == render(vendor, messages, **variables), messages
        compared += 1
    assert compared == 252


@pytest.mark.data
@pytest.mark.parametrize("name", NOT_RENDERED)
def test_what_the_engine_does_not_render(vendors_server: httpx.Client, name: str) -> None:
    messages, answer = NOT_RENDERED[name]
    assert not engine_renders(messages)
    assert served(vendors_server, messages).startswith(answer)


@pytest.mark.data
def test_what_the_vendors_own_stack_does_not_render(vendors_server: httpx.Client, vendor: str) -> None:
    user = {"role": "user", "content": "Hello"}
    for messages in ([{"role": "system", "content": ""}, user], [{"role": "user", "content": ""}]):
        with pytest.raises(SecurityError):
            render(vendor, messages)
        assert served(vendors_server, messages) == render(repair(vendor).text, messages)


def test_our_template_as_served(our_server: httpx.Client) -> None:
    """All of it renders in the engine, empty first messages too."""
    compared = 0
    for messages, variables in product(conversations(), THINKING):
        if messages[-1]["role"] != "assistant":
            assert served(our_server, messages, variables) == render(fallback(), messages, **variables), messages
            compared += 1
    assert compared == 378


def test_a_template_is_served_byte_for_byte(our_server: httpx.Client) -> None:
    """But for one line end at its end, which Jinja drops from a template and the engine as well."""
    assert fallback().endswith("\n")
    assert our_server.get("/props").json()["chat_template"] == fallback().removesuffix("\n")
