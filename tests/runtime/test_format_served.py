"""HunYuan's format through the real server: shapes, thinking, budget, tools, JSON; whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates.conversations import vendor_template
from format_client import TIMEOUT, Book, ask, books, function, message_of, stream
from format_reader import Message
from format_rows import ROWS, write_model
from format_shapes import FAST, SHAPES, Call, Shape
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from scripted_model import NEWLINE, Script, write_scripted

from hymoe.chat_templates import fallback
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

WEATHER = function("get_weather", city={"type": "string"}, days={"type": "integer"})
CLOCK = function("get_time", zone={"type": "string"})
# Functions whose arguments may be anything.
ANYTHING = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
STRICT = function("f", x={"enum": ["ab", "cd"]})
OPENED = "<think>\n"
# With these a grammar leaves a model little to say.
SHORT = function("turn", side={"enum": ["left", "right"]})
OTHER = function("halt", at={"enum": ["once", "noon"]})
TWO_CALLS = (Call("get_weather", '{"city": "北京", "days": 3}'), Call("get_time", '{"zone": "Asia"}'))
PARALLEL: dict[str, Any] = {"tools": [WEATHER, CLOCK], "parallel_tool_calls": True}
QUESTION = [{"role": "user", "content": "hi"}]
LONG_THOUGHT = "one two three four five six seven eight nine ten 十一 十二 十三 "
THINK, ANSWER = "<think>\nHm.\n</think>\n", "<answer>\nYes.\n</answer>"


# What begins the output -> the template that puts it there.
TEMPLATES = {"": fallback(), FAST: fallback(), OPENED: fallback() + "{{- '<think>\\n' if add_generation_prompt -}}"}


def fields_of(shape: Shape) -> dict[str, Any]:
    more: dict[str, Any] = {} if shape.mode == "plain" else {**PARALLEL, "tools": [WEATHER, CLOCK, *ANYTHING]}
    more |= {"tool_choice": "none"} if shape.mode == "no_calls" else {}
    return more | ({"chat_template_kwargs": {"enable_thinking": False}} if shape.begun == FAST else {})


def check_shape(url: str, word: str, shape: Shape) -> None:
    """The recorded message, whole and streamed."""
    expected, more = Message(shape.reasoning, shape.content, shape.calls), fields_of(shape)
    assert message_of(ask(url, word, **more)) == expected, shape
    assert stream(url, word, **more)[0] == expected, shape


@pytest.mark.parametrize("opened", [False, True])
def test_every_shape_whole_and_streamed(tmp_path: Path, opened: bool) -> None:
    shapes = [shape for shape in SHAPES if (shape.begun == OPENED) == opened and not shape.grammar]
    seen = 0
    for number, (book, words) in enumerate(books(shapes)):
        model = book.write(tmp_path / f"{number}.gguf", TEMPLATES[shapes[0].begun])
        with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
            for word, shape in words.items():
                check_shape(endpoint.url, word, shape)
                seen += 1
    assert seen == len(shapes)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.grammar], ids=str)
def test_a_shape_that_the_grammar_mends(tmp_path: Path, shape: Shape) -> None:
    """A model that would write it makes the call that its tool allows."""
    ((book, words),) = books([shape])
    more = {"tools": [STRICT], "parallel_tool_calls": False}
    with serve(ServerOptions(book.write(tmp_path / "m.gguf", fallback()), port=0, threads=1)) as endpoint:
        (word,) = words
        message = message_of(ask(endpoint.url, word, **more))
        assert stream(endpoint.url, word, **more)[0] == message
    assert (message.reasoning, message.content) == (shape.reasoning, "")
    (call,) = message.calls
    assert call.name == "f"
    assert json.loads(call.arguments) in [{"x": "ab"}, {"x": "cd"}]


def test_no_shape_is_left_out() -> None:
    """Those above are all: each has a template, and what the grammar mends is a call."""
    assert {shape.begun for shape in SHAPES} == set(TEMPLATES)
    assert all(shape.mode == "tools" and not shape.begun for shape in SHAPES if shape.grammar)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model answers each word below in its own way."""
    book = Book()
    book.add("", THINK + ANSWER)
    book.add("fast;", "<answer>\nAt once.\n</answer>", closed=True)
    book.add("dawdle;", f"<think>\n{LONG_THOUGHT}\n</think>\n<answer>\nDone at last.\n</answer>")
    calls = ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in TWO_CALLS)
    book.add("weather;", f"<think>\nLook.\n</think>\n<answer>\n<tool_calls>[{calls}]</tool_calls>\n</answer>")
    book.add("sunny;", "<think>\nIt says sun.\n</think>\n<answer>\n助手：Sun in Beijing.\n</answer>")
    book.add("chatter;", "<think>\nI would rather talk.\n</think>\n<answer>\nLet us talk.\n</answer>")
    nowhere = '<tool_calls>[{"name": "turn", "arguments": {"side": "nowhere"}}]'
    book.add("lost;", f"<think>\nWhere {nowhere}?\n</think>\n<answer>\n{nowhere}</tool_calls>\n</answer>")
    book.add("fields;", '<think>\nFields.\n</think>\n<answer>\n{"side": "left"}\n</answer>')
    model = book.write(tmp_path_factory.mktemp("format") / "m.gguf", fallback())
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
        yield endpoint.url


def test_thinking_is_on_unless_a_request_turns_it_off(url: str) -> None:
    on: list[dict[str, Any]] = [{}, {"chat_template_kwargs": {"enable_thinking": True}}]
    off: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
    ]
    for more in on + off:
        body = {"messages": QUESTION, **more}
        prompt = httpx.post(f"{url}/apply-template", json=body, timeout=TIMEOUT).json()["prompt"]
        assert prompt == "<|startoftext|>hi<|extra_0|>" + FAST * (more in off)
        words, expected = ("fast;", Message("", "At once.", ())) if more in off else ("hi", Message("Hm.", "Yes.", ()))
        assert message_of(ask(url, words, **more)) == expected
        assert stream(url, words, **more)[0] == expected


@pytest.mark.parametrize("words", ["/no_think hi", "/think hi"])
def test_the_vendor_s_switches_are_the_user_s_text(url: str, words: str) -> None:
    body = {"messages": [{"role": "user", "content": words}]}
    prompt = httpx.post(f"{url}/apply-template", json=body, timeout=TIMEOUT).json()["prompt"]
    assert prompt == f"<|startoftext|>{words}<|extra_0|>"


@pytest.fixture(scope="module")
def dawdler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model never ends a thought by itself, and answers where one has been ended."""
    book = Book()
    book.add("", f"<think>\n{LONG_THOUGHT}", circle=4)
    book.add("", "Done.\n</answer>", closed=True)
    with serve(
        ServerOptions(book.write(tmp_path_factory.mktemp("dawdler") / "m.gguf", fallback()), port=0, threads=1)
    ) as endpoint:
        yield endpoint.url


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 9, 40])
@pytest.mark.parametrize("field", ["reasoning_budget_tokens", "thinking_budget_tokens"])
def test_a_budget_ends_the_thought_in_the_model_s_own_way(dawdler: str, budget: int, field: str) -> None:
    message, deltas = stream(dawdler, "hi", **{field: budget})
    thoughts = [delta["reasoning_content"] for delta in deltas if delta.get("reasoning_content")]
    # one delta for each token of the thought; pieces are four characters or a few more
    assert budget - 2 <= len(thoughts) <= budget
    assert (LONG_THOUGHT * 9).startswith(message.reasoning[: len(LONG_THOUGHT)])
    assert message.content == "Done."
    assert message_of(ask(dawdler, "hi", **{field: budget})) == message


def test_a_budget_that_suffices_changes_nothing(url: str) -> None:
    assert message_of(ask(url, "dawdle;", reasoning_budget_tokens=100)) == Message(
        LONG_THOUGHT.strip(), "Done at last.", ()
    )


def test_a_budget_ends_characters_and_tags_whole(tmp_path: Path) -> None:
    halves: list[str | bytes] = [b"\xe5\x8d", b"\x81\xe4", b"\xb8\x80", "</", "thi", "nk> ", "<answ", "er>", "So."]
    scripts = [Script(["<think", ">", *halves]), Script(["Done."], after=NEWLINE)]
    with serve(
        ServerOptions(write_scripted(tmp_path / "m.gguf", scripts, template=fallback()), port=0, threads=1)
    ) as endpoint:
        said = [message_of(ask(endpoint.url, "hi", reasoning_budget_tokens=budget)) for budget in range(8)]
    ended, by_itself = Message("十一", "Done.", ()), Message("十一", "So.", ())
    assert said == [Message("", "Done.", ()), *[ended] * 3, *[by_itself] * 4]


@pytest.mark.parametrize("begun", ["a", "ab", "abc", "abcd", "abcdefgh", "It is 十一", "`a` is\n\nb", "a " * 40 + "b"])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_and_a_thought_that_was_begun(dawdler: str, begun: str, budget: int) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "reasoning_content": begun}]
    more = {"continue_final_message": "reasoning_content", "add_generation_prompt": False}
    message = message_of(ask(dawdler, history, **more, reasoning_budget_tokens=budget))
    assert message.content == "Done."
    assert message.reasoning.startswith(begun)
    assert "<" not in message.reasoning
    if budget == 0:
        assert message.reasoning == begun


def test_a_budget_and_a_call_that_a_thought_quotes(tmp_path: Path) -> None:
    """Without tools it is no call, and the thought goes on."""
    book = Book()
    book.add(
        "", f'<think>\nSay\n<tool_calls>[{{"name": "f", "arguments": {{}}}}]</tool_calls>\n{LONG_THOUGHT}', circle=16
    )
    book.add("", "Done.\n</answer>", closed=True)
    with serve(ServerOptions(book.write(tmp_path / "m.gguf", fallback()), port=0, threads=1)) as endpoint:
        for budget in (5, 20, 40, 80):
            message = message_of(ask(endpoint.url, "hi", reasoning_budget_tokens=budget))
            assert message.content == "Done.", budget
            assert message.reasoning.startswith("Say")


def test_what_a_budget_says_before_it_ends_the_thought(dawdler: str) -> None:
    more = {"reasoning_budget_tokens": 4, "reasoning_budget_message": "\nEnough."}
    message = message_of(ask(dawdler, "hi", **more))
    assert message.reasoning.endswith("\nEnough.")
    assert message.content == "Done."


def test_a_thought_is_ended_on_request(dawdler: str) -> None:
    body = {"messages": QUESTION, "max_tokens": 3000, "stream": True, "reasoning_control": True}
    said: list[str] = []
    thought = 0
    with httpx.stream("POST", f"{dawdler}/v1/chat/completions", json=body, timeout=TIMEOUT) as lines:
        for line in lines.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            delta = chunk["choices"][0]["delta"]
            said.append(delta.get("content") or "")
            thought += bool(delta.get("reasoning_content"))
            if thought == 20:
                control = {"id": chunk["id"], "action": "reasoning_end"}
                answer = httpx.post(f"{dawdler}/v1/chat/completions/control", json=control, timeout=TIMEOUT)
                assert answer.json()["success"]
    assert "".join(said) == "Done."
    assert thought < 2000


@pytest.mark.parametrize(
    ("reasoning_format", "expected"),
    [
        ("none", Message("", f"{THINK}Yes.", ())),
        ("deepseek", Message("Hm.", "Yes.", ())),
        ("deepseek-legacy", Message("Hm.", f"{THINK}Yes.", ())),
    ],
)
def test_where_a_request_wants_the_thought(url: str, reasoning_format: str, expected: Message) -> None:
    assert message_of(ask(url, "hi", reasoning_format=reasoning_format)) == expected
    assert stream(url, "hi", reasoning_format=reasoning_format)[0] == expected


def test_an_answer_that_is_cut_keeps_what_came(url: str) -> None:
    answer = ask(url, "dawdle;", max_tokens=6)
    message = message_of(answer)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert message.reasoning
    assert LONG_THOUGHT.startswith(message.reasoning)
    assert not message.content


def test_calls_whole_and_streamed(url: str) -> None:
    answer = ask(url, "weather;", **PARALLEL)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert message_of(answer) == Message("Look.", "", TWO_CALLS)
    message, deltas = stream(url, "weather;", **PARALLEL)
    assert message == Message("Look.", "", TWO_CALLS)
    arguments = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert len(arguments) > 4, "arguments grow"


def test_arguments_of_a_call_that_the_model_begins_itself_fit_the_schema(url: str) -> None:
    message = message_of(ask(url, "lost;", tools=[SHORT], parallel_tool_calls=False))
    assert message.reasoning == 'Where[{"name": "turn", "arguments": {"side": "nowhere"}}]?'
    (call,) = message.calls
    assert json.loads(call.arguments)["side"] in ("left", "right")


def test_no_calls_where_none_are_wanted(url: str) -> None:
    message = message_of(ask(url, "weather;", **PARALLEL, tool_choice="none"))
    assert not message.calls
    assert json.loads(message.content)[0]["name"] == "get_weather"


@pytest.mark.parametrize(
    ("tool_choice", "name"),
    [
        ("required", None),
        ({"type": "function", "function": {"name": "halt"}}, "halt"),
        ({"type": "function", "function": {"name": "turn"}}, "turn"),
    ],
)
@pytest.mark.parametrize("words", ["chatter;", "fast;"])
def test_a_call_that_is_required_is_made(url: str, tool_choice: Any, name: str | None, words: str) -> None:
    more = {"tools": [SHORT, OTHER], "tool_choice": tool_choice, "parallel_tool_calls": False}
    more |= {"chat_template_kwargs": {"enable_thinking": words != "fast;"}}
    message = message_of(ask(url, words, **more))
    assert stream(url, words, **more)[0] == message
    assert message.reasoning == ("I would rather talk." if words == "chatter;" else "")
    assert message.content == ""
    (call,) = message.calls
    assert call.name in ([name] if name else ["turn", "halt"])
    (argument,) = json.loads(call.arguments).items()
    assert argument in [("side", "left"), ("side", "right"), ("at", "once"), ("at", "noon")]


def test_a_budget_and_a_required_call(dawdler: str) -> None:
    more = {"tools": [SHORT], "tool_choice": "required", "parallel_tool_calls": False, "reasoning_budget_tokens": 5}
    message = message_of(ask(dawdler, "hi", **more))
    assert message.reasoning
    assert LONG_THOUGHT.startswith(message.reasoning)
    assert [call.name for call in message.calls] == ["turn"]


def post(url: str, path: str, **body: Any) -> Any:
    """The answer's JSON."""
    response = httpx.post(url + path, json={"messages": QUESTION, **body}, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_function_is_named_in_each_api_s_own_way(url: str) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (SHORT, OTHER)}
    plain = [{"type": "function", "name": name, "parameters": schema} for name, schema in schemas.items()]
    theirs = [{"name": name, "input_schema": schema} for name, schema in schemas.items()]
    for name in schemas:
        choice = {"type": "function", "name": name}
        answer = post(url, "/v1/responses", input="hi", tools=plain, tool_choice=choice, max_output_tokens=200)
        assert [item["name"] for item in answer["output"] if item["type"] == "function_call"] == [name]
        more = {"tools": [SHORT, OTHER], "tool_choice": choice, "parallel_tool_calls": False}
        assert [call.name for call in message_of(ask(url, "hi", **more)).calls] == [name]
        choice = {"type": "tool", "name": name}
        answer = post(url, "/v1/messages", tools=theirs, tool_choice=choice, max_tokens=200)
        assert [item["name"] for item in answer["content"] if item["type"] == "tool_use"] == [name]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("mode", "calls"), [("auto", 0), ("required", 1)])
def test_allowed_tools_are_their_mode(url: str, nested: bool, mode: str, calls: int) -> None:
    fields = {"mode": mode, "tools": [{"type": "function", "function": {"name": "turn"}}]}
    choice = {"type": "allowed_tools", **({"allowed_tools": fields} if nested else fields)}
    message = message_of(ask(url, "chatter;", tools=[SHORT], parallel_tool_calls=False, tool_choice=choice))
    assert len(message.calls) == calls
    assert message.content == ("" if calls else "Let us talk.")


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "turn"}}])
@pytest.mark.parametrize("more", [{}, {"tools": []}, {"response_format": {"type": "json_object"}}])
def test_a_call_cannot_be_required_where_there_are_no_tools(url: str, tool_choice: Any, more: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "tool_choice": tool_choice, **more}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 400
    assert "no tools" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "tool_choice",
    [
        *({"type": "function", "function": {"name": "fly"}}, {"function": "turn"}, 3, "sometimes", "function:turn", ""),
        *({"type": "function"}, {"type": "custom", "name": "turn"}, {"type": "allowed_tools"}, {"name": "turn"}),
    ],
)
def test_a_choice_that_means_nothing_is_a_400(url: str, tool_choice: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [SHORT], "tool_choice": tool_choice}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


SCHEMA = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "turn", "schema": SCHEMA}}},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"json_schema": SCHEMA},
]


@pytest.mark.parametrize("wanted", FORMATS, ids=["json_schema", "json_object", "llama.cpp"])
@pytest.mark.parametrize("words", ["fields;", "chatter;", "fast;"])
def test_json_comes_bare_and_the_thought_stays_free(url: str, wanted: dict[str, Any], words: str) -> None:
    more = {**wanted, "chat_template_kwargs": {"enable_thinking": words != "fast;"}}
    message = message_of(ask(url, words, **more))
    assert stream(url, words, **more)[0] == message
    assert message.reasoning == {"fields;": "Fields.", "chatter;": "I would rather talk.", "fast;": ""}[words]
    assert json.loads(message.content)["side"] in ("left", "right")


def test_a_grammar_of_the_request_s_own_is_the_whole_content(url: str) -> None:
    grammar = 'root ::= "left" | "right"'
    message = message_of(ask(url, "chatter;", grammar=grammar))
    assert message.reasoning == ""
    assert message.content in ("left", "right")
    body = {"messages": QUESTION, "grammar": grammar}
    prompt = httpx.post(f"{url}/apply-template", json=body, timeout=TIMEOUT).json()["prompt"]
    assert prompt == f"<|startoftext|>hi<|extra_0|>{FAST}<answer>\n"


def test_tools_round_trip_with_the_openai_client(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        history: list[ChatCompletionMessageParam] = [{"role": "user", "content": "weather;"}]
        first = create(model="any", messages=history, max_tokens=200, **PARALLEL).choices[0].message
        calls = first.tool_calls or []
        assert [call.type for call in calls] == ["function", "function"]
        history.append(first.to_dict())
        history += [{"role": "tool", "tool_call_id": call.id, "content": "sunny;"} for call in calls]
        second = create(model="any", messages=history, max_tokens=200, **PARALLEL).choices[0].message
        assert second.content == "Sun in Beijing."
        assert not second.tool_calls
        chunks = list(create(model="any", messages=history, max_tokens=200, **PARALLEL, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Sun in Beijing."


def test_a_message_is_continued(url: str) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes, and "}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = httpx.post(f"{url}/apply-template", json={"messages": history, **more}, timeout=TIMEOUT).json()["prompt"]
    assert prompt == "<|startoftext|>hi<|extra_0|><think>\n\n</think>\n<answer>\nYes, and "
    whole, streamed = message_of(ask(url, history, **more)), stream(url, history, **more)[0]
    # as llama.cpp does it: the whole message at once has the words that were given, the deltas have not
    assert whole.content == "Yes, and " + streamed.content
    assert streamed.content


CONTINUED: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize("begun", ["{", '{"side', '{"side": ', '{"side": "le'])
@pytest.mark.parametrize("wanted", FORMATS, ids=["json_schema", "json_object", "llama.cpp"])
def test_json_that_was_begun_is_continued(url: str, wanted: dict[str, Any], begun: str) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
    message = message_of(ask(url, history, **CONTINUED, **wanted))
    assert message.content.startswith(begun)
    assert json.loads(message.content)["side"] in ("left", "right")
    assert begun + stream(url, history, **CONTINUED, **wanted)[0].content == message.content


@pytest.mark.parametrize(
    ("begun", "content"),
    [("I turn.", "I turn."), ("I turn. ", "I turn. "), ("<tool_calls>", ""), ('<tool_calls>[{"name": "tu', "")],
)
def test_a_call_that_is_required_of_a_begun_answer(url: str, begun: str, content: str) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
    more = {"tools": [SHORT], "tool_choice": "required", "parallel_tool_calls": False}
    message = message_of(ask(url, history, **CONTINUED, **more))
    assert [call.name for call in message.calls] == ["turn"]
    assert message.content == content


@pytest.mark.parametrize("flood", [" ", "\t", "\n", "\n "])
def test_a_flood_of_spaces_with_tools(tmp_path: Path, flood: str) -> None:
    """Runs of spaces are tokens of the vocabulary, and a model may fall into repeating one."""
    scripts = [Script([flood * (128 // len(flood))], then=flood * (128 // len(flood)))]
    with serve(
        ServerOptions(write_scripted(tmp_path / "m.gguf", scripts, template=fallback()), port=0, threads=1)
    ) as endpoint:
        answer = ask(endpoint.url, "hi", tools=[SHORT], max_tokens=600)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert message_of(answer).calls == ()
        assert httpx.get(f"{endpoint.url}/health", timeout=TIMEOUT).status_code == httpx.codes.OK


@pytest.fixture(scope="module", params=["fallback", pytest.param("vendor", marks=pytest.mark.data)])
def rows_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model answers the words of the rows, with our template and with the vendor's."""
    template = fallback() if request.param == "fallback" else vendor_template(request.getfixturevalue("data"))
    model = write_model(tmp_path_factory.mktemp("rows") / "m.gguf", template)
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint:
        yield endpoint.url


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_clients(rows_url: str, row: str) -> None:
    words, more, right = ROWS[row]
    message = message_of(ask(rows_url, words, **more))
    assert message in right
    assert stream(rows_url, words, **more)[0] == message
