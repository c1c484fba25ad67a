"""The real `openai` client: chat, streams, tools, probabilities, stop strings, thinking, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from clients_rows import ADD
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from talker import BUDGETED, HELLO, REPLY, SHORT, SIDES, THOUGHT, write_talker

from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def client(llama_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server that runs the scripted model."""
    model = write_talker(tmp_path_factory.mktemp("model") / "talker.gguf")
    with (
        serve(ServerOptions(model, port=0, threads=1, api_key="the-key")) as endpoint,
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="the-key", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, text: str = "hi", **more: Any) -> ChatCompletion:
    answer = client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **more)
    assert isinstance(answer, ChatCompletion)
    return answer


def stream(client: openai.OpenAI, text: str = "hi", **more: Any) -> list[ChatCompletionChunk]:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
    return list(client.chat.completions.create(model="any", messages=messages, stream=True, **more))


def thought_of(answer: ChatCompletion) -> str:
    thought = getattr(answer.choices[0].message, "reasoning_content", None) or ""
    assert isinstance(thought, str)
    return thought


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert thought_of(answer) == THOUGHT
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert ask(client, max_tokens=2).choices[0].finish_reason == "length"


def test_streaming(client: openai.OpenAI) -> None:
    chunks = stream(client)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == REPLY
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THOUGHT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    usage = stream(client, stream_options={"include_usage": True})[-1]
    assert usage.choices == []
    assert usage.usage is not None


def test_completions(client: openai.OpenAI) -> None:
    create = client.completions.create
    answer = create(model="any", prompt="hi<|extra_0|>", logprobs=2, echo=False)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (HELLO, "stop")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == HELLO
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert HELLO[offset:].startswith(token)
    assert create(model="any", prompt="hi<|extra_0|>", echo=True).choices[0].text == "hi<|extra_0|>" + HELLO
    with pytest.raises(openai.BadRequestError, match="echo with logprobs"):
        create(model="any", prompt="hi", echo=True, logprobs=1)


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="must not be empty") as caught:
        client.chat.completions.create(model="any", messages=[])
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="unknown role"):
        client.chat.completions.create(model="any", messages=[{"role": "x", "content": ""}])  # type: ignore[list-item, misc]


def entries(choice: Any, name: str) -> list[Entry]:
    """The logprobs' list `name` of a choice; empty where there is none."""
    logprobs = choice.logprobs.model_dump() if choice.logprobs else {}
    found = logprobs.get(name) or []
    assert isinstance(found, list)
    return found


def text_of(found: list[Entry]) -> str:
    """The tokens joined, which are the bytes joined."""
    text = "".join(entry["token"] for entry in found)
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == text
    return text


@pytest.mark.parametrize("question", ["hi", "addition", "answered", "weather", "halves", "tagged"])
def test_logprobs_are_those_of_content_and_thought(client: openai.OpenAI, question: str) -> None:
    """Nothing held back is lost, no tag is in them, and a stream has the same ones."""
    answer = ask(client, question, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    content, thought = entries(choice, "content"), entries(choice, "reasoning_content")
    assert text_of(content) == (choice.message.content or "")
    assert text_of(thought) == thought_of(answer)
    assert {entry["kind"] for entry in content} <= {"answer"}
    assert {entry["kind"] for entry in thought} <= {"thought"}
    for entry in [*content, *thought]:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= 0
    chunks = [chunk.choices[0] for chunk in stream(client, question, logprobs=True, top_logprobs=3)]
    for name, whole in (("content", content), ("reasoning_content", thought)):
        assert [entry for chunk in chunks for entry in entries(chunk, name)] == whole


def test_logprobs_ride_with_their_delta(client: openai.OpenAI) -> None:
    """No text of an entry comes before the delta that has it, and none is late by more than the entry's own token."""
    sent = given = ""
    for chunk in stream(client, "tagged", logprobs=True, top_logprobs=1):
        (choice,) = chunk.choices
        sent += choice.delta.content or ""
        given += text_of(entries(choice, "content"))
        assert sent.startswith(given)
        assert len(sent) - len(given) < 8
    assert sent == given != ""


def test_logprobs_stop_where_a_stop_string_does(client: openai.OpenAI) -> None:
    for question, stop, content in (("hi", "lo!", "Hel"), ("hi", "user", ""), ("alphabet", "bcd", "a")):
        answer = ask(client, question, logprobs=True, top_logprobs=1, stop=[stop])
        assert answer.choices[0].message.content == content
        assert text_of(entries(answer.choices[0], "content")) == content
        chunks = stream(client, question, logprobs=True, top_logprobs=1, stop=[stop])
        assert text_of([entry for chunk in chunks for entry in entries(chunk.choices[0], "content")]) == content


def test_thoughts_in_the_content_have_their_logprobs_there(client: openai.OpenAI) -> None:
    (choice,) = ask(client, logprobs=True, top_logprobs=1, extra_body={"reasoning_format": "none"}).choices
    assert choice.message.content is not None
    assert THOUGHT in choice.message.content
    assert text_of(entries(choice, "content")) == THOUGHT + REPLY
    assert entries(choice, "content")[0]["kind"] == "thought"


def test_stop_strings(client: openai.OpenAI) -> None:
    answer = ask(client, stop=["!"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
    chunks = stream(client, stop="!")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"


def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI) -> None:
    tools: Any = [ADD]
    messages: list[Any] = [{"role": "user", "content": "addition"}]
    create = client.chat.completions.create
    (choice,) = create(model="any", messages=messages, tools=tools).choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 17, "b": 25})
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "answered"},
    ]
    (answer,) = create(model="any", messages=messages, tools=tools).choices
    assert (answer.message.content, answer.finish_reason) == ("The sum is 42.", "stop")


def test_a_tool_call_streams(client: openai.OpenAI) -> None:
    chunks = stream(client, "addition", tools=[ADD])
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert {part.index for part in parts} == {0}
    functions = [part.function for part in parts if part.function]
    assert "".join(function.name or "" for function in functions) == "add"
    assert json.loads("".join(function.arguments or "" for function in functions)) == {"a": 17, "b": 25}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_tool_call_streams_with_the_thoughts_probabilities(client: openai.OpenAI) -> None:
    chunks = stream(client, "addition", tools=[ADD], logprobs=True, top_logprobs=1)
    choices = [chunk.choices[0] for chunk in chunks]
    thought = [entry for choice in choices for entry in entries(choice, "reasoning_content")]
    assert text_of(thought) == "I add."
    assert not any(entries(choice, "content") for choice in choices)


def test_thinking_on_off_and_with_a_budget(client: openai.OpenAI) -> None:
    on = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert (thought_of(on), on.choices[0].message.content) == (THOUGHT, REPLY)
    off = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert (thought_of(off), off.choices[0].message.content) == ("", BUDGETED)
    short = ask(client, extra_body={"thinking_budget_tokens": 4})
    assert THOUGHT.startswith(thought_of(short))
    assert len(thought_of(short)) < len(THOUGHT)
    assert short.choices[0].message.content == BUDGETED


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"side": {"enum": SIDES}}, "required": ["side"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "turn", "schema": schema, "strict": True}}
    answer = ask(client, SHORT, response_format=wanted, max_tokens=200)
    assert json.loads(answer.choices[0].message.content or "")["side"] in SIDES
