"""What the endpoint answers to good and bad requests, beside the format of the answers."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates.conversations import vendor_template
from clients_rows import ADD, HELLO, JSON_PATHS, ROWS, WRONG, clock, post, refused
from scripted_model import VENDOR_SAMPLING
from served import client_of
from talker import HELLO as SAID
from talker import write_talker
from terminal import TIMEOUT, run

pytestmark = pytest.mark.engine

KEY = "the-key"
ORIGINS = ("null", "http://127.0.0.1:9999", "http://localhost", "https://example.org")
UI_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/completion", "/tokenize", "/detokenize", "/v1/models"),
    *("/v1/token/encode", "/v1/token/decode", "/v1/internal/encode", "/v1/internal/decode"),
    *("/v1/internal/token-count", "/v1/internal/stop-generation"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("model") / "talker.gguf")


@pytest.fixture(scope="module")
def client(llama_server: Path, model: Path) -> Iterator[httpx.Client]:
    """A server of the scripted model with our template."""
    with client_of(model) as client:
        yield client


@pytest.fixture(scope="module")
def vendors(llama_server: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The same with the vendor's template."""
    template = vendor_template(data)
    with client_of(write_talker(tmp_path_factory.mktemp("model") / "vendors.gguf", template)) as client:
        yield client


@pytest.fixture(scope="module")
def keyed(llama_server: Path, model: Path) -> Iterator[httpx.Client]:
    """A server with a key, asked without it."""
    with client_of(model, api_key=KEY) as client:
        yield client


@pytest.mark.data
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_rows(vendors: httpx.Client, row: Callable[[httpx.Client], None]) -> None:
    row(vendors)


@pytest.mark.data
@pytest.mark.parametrize("row", WRONG)
def test_wrong_requests_are_refused(vendors: httpx.Client, row: str) -> None:
    for wrong in WRONG[row]:
        refused(wrong.send(vendors), wrong.words)


def test_requests_that_are_wrong_otherwise(client: httpx.Client) -> None:
    user = {"role": "user", "content": "hi"}
    chat = "/v1/chat/completions"
    refused(client.post(chat, json={"messages": [user], "reasoning_format": "no such"}), "reasoning format")
    refused(client.post(chat, json={"messages": [user], "json_schema": {}, "grammar": "x"}), "Cannot use both")
    refused(client.post(chat, json={"messages": [user], "tools": [{"type": "function"}]}), "Missing tool function")
    refused(client.post(chat, json={"messages": [{"role": "user", "content": [{"text": "a"}]}]}), "content")
    refused(client.post("/completion", json={"prompt": [[1, 10**8]]}), "invalid tokens")
    refused(client.post("/completion", json={"prompt": HELLO, "grammar": "root ::= ("}), "grammar")
    refused(client.post("/v1/completions", json={"prompt": HELLO, "echo": True, "logprobs": 2}), "echo with logprobs")
    long = client.post("/completion", json={"prompt": "x" * 5000})
    assert (long.status_code, long.json()["error"]["type"]) == (400, "exceed_context_size_error")
    assert long.json()["error"]["n_ctx"] == 4096


DEEP = 10**6
LEVELS = 256
# Where a client's JSON may be deep: %s.
DEEP_BODIES = (
    '{"prompt": "a", "content": "a", "text": "a", "x": %s}',
    '{"prompt": "a", "content": %s, "text": "a", "tokens": %s}',
    '{"messages": [{"role": "user", "content": "a", "x": %s}], "max_tokens": 1}',
    '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "tool_choice": %s}',
    '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "tools": [%s]}',
    '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "json_schema": %s}',
    '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "chat_template_kwargs": {"x": %s}}',
    '{"input": %s, "max_output_tokens": 1}',
)


@pytest.mark.parametrize("path", JSON_PATHS)
def test_deep_json(client: httpx.Client, path: str) -> None:
    for value in ("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP):
        refused(client.post(path, content='{"x": ' + value + "}"), "levels")
    for body in DEEP_BODIES:
        refused(client.post(path, content=body.replace("%s", "[" * DEEP + "]" * DEEP)), "levels")
        most = "[" * (LEVELS - 1) + "]" * (LEVELS - 1)  # what is refused now is so for other reasons
        answer = client.post(path, content=body.replace("%s", most if body.count("[") == 0 else "[]"))
        assert answer.status_code in (200, 400, 500), answer.text
        assert "levels" not in answer.text
    assert client.get("/health").status_code == 200


def test_deep_json_in_strings(client: httpx.Client) -> None:
    deep = "[" * DEEP + "]" * DEEP
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": deep}}
    messages = [{"role": "user", "content": deep}, {"role": "assistant", "content": "a", "tool_calls": [call]}]
    body = {"messages": [*messages, {"role": "tool", "tool_call_id": "1", "content": "a"}], "max_tokens": 1}
    refused(client.post("/v1/chat/completions", json=body), "levels")
    refused(client.post("/completion", json={"prompt": HELLO, "dry_sequence_breakers": deep}), "levels")
    assert len(post(client, "/tokenize", content='\\"' + "[" * 1000)["tokens"]) == 1002


def test_wrong_values_are_quoted_in_part(client: httpx.Client) -> None:
    user, long = {"role": "user", "content": "hi"}, "长" * 10**5
    chat = "/v1/chat/completions"
    for path, body in (
        (chat, {"messages": [user], "tool_choice": {"a": long}}),
        (chat, {"messages": [user], "stop": {"a": long}}),
        (chat, {"messages": [{**user, "role": long}]}),
        ("/detokenize", {"tokens": [long]}),
    ):
        answer = client.post(path, json=body)
        refused(answer, "长...")
        assert len(answer.content) < 400


def test_a_full_context_ends_the_answer(client: httpx.Client) -> None:
    """Nothing is shifted: the answer stops, and says so."""
    body = {"prompt": "x" * 4000 + "count<|extra_0|>", "n_predict": -1, "repeat_penalty": 1}
    answer = post(client, "/completion", **body)
    assert (answer["stop_type"], answer["truncated"]) == ("limit", True)
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] <= 4096


@pytest.mark.parametrize("flags", [["--context-shift"], ["--cache-reuse", "16"]], ids=" ".join)
def test_moved_keys_are_refused_at_start(llama_server: Path, model: Path, flags: list[str]) -> None:
    command = [str(llama_server), "--model", str(model), "--port", "0", *flags]
    done = run(command)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "refused" in line]
    assert len(lines) == 1
    assert "--context-shift and --cache-reuse are refused: moved keys give wrong answers with hunyuan-moe" in lines[0]


@pytest.mark.parametrize(("question", "answer", "stop"), [("hi", SAID, "<|eos|>"), ("weather", "It rains.", "extra_5")])
def test_both_end_tokens_stop(client: httpx.Client, question: str, answer: str, stop: str) -> None:
    done = post(client, "/completion", prompt=f"{question}<|extra_0|>", return_tokens=True)
    assert (done["content"], done["stop_type"]) == (answer, "eos")
    (text,) = post(client, "/v1/internal/decode", tokens=done["tokens"][-1:]).values()
    assert stop in text


def test_the_files_sampling_is_the_default_and_the_client_wins(llama_server: Path, tmp_path: Path) -> None:
    wanted = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repeat_penalty": 1.05}
    with client_of(write_talker(tmp_path / "m.gguf", sampling=VENDOR_SAMPLING)) as client:
        default = client.get("/props").json()["default_generation_settings"]["params"]
        assert {name: pytest.approx(default[name]) for name in wanted} == wanted
        assert default["repeat_last_n"] == -1
        asked = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "repeat_penalty": 1.5, "repeat_last_n": 3}
        for body, settings in (({}, wanted | {"repeat_last_n": 4096}), (asked, asked)):
            used = post(client, "/completion", prompt=HELLO, n_predict=1, **body)["generation_settings"]
            assert {name: pytest.approx(used[name]) for name in settings} == settings
        # What the client leaves out stays the file's.
        used = post(client, "/completion", prompt=HELLO, n_predict=1, top_k=7)["generation_settings"]
        assert (used["top_k"], used["temperature"]) == (7, pytest.approx(0.7))


@pytest.mark.parametrize("path", UI_PATHS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_every_page_may_ask(keyed: httpx.Client, path: str, origin: str) -> None:
    """The preflight of a browser, which sends no key, and the answer to a wrong key: both can be read by the page."""
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = keyed.options(path, headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == origin
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert preflight.headers["Access-Control-Allow-Headers"] == "*"
    rejected = keyed.post(path, json={}, headers={"Origin": origin, "Authorization": "Bearer wrong"})
    assert (rejected.status_code, rejected.headers["Access-Control-Allow-Origin"]) == (401, origin)


def test_the_key_opens_every_path_and_only_health_is_open(keyed: httpx.Client) -> None:
    for path in UI_PATHS:
        assert keyed.post(path, json={}).status_code == 401
    assert keyed.get("/health").status_code == 200
    bearer = {"Authorization": f"Bearer {KEY}"}
    counted = keyed.post("/v1/internal/token-count", json={"text": "XYZ"}, headers=bearer)
    assert counted.json() == {"length": 3}


def events(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    """The data of a stream's events, without the last, which must be [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_chunk_without_choices_unless_asked_for(client: httpx.Client, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": HELLO}
    chunks = events(client, path, **body)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    last = events(client, path, **body, stream_options={"include_usage": True})[-1]
    assert last["usage"]["completion_tokens"] > 1
    assert not last["choices"] or "chat" not in path


def test_legacy_logprobs_stream_as_they_come_at_once(client: httpx.Client) -> None:
    (whole,) = post(client, "/v1/completions", prompt=HELLO, logprobs=2)["choices"]
    chunks = [chunk["choices"][0] for chunk in events(client, "/v1/completions", prompt=HELLO, logprobs=2)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] == SAID
    streamed = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for logprobs in streamed for item in logprobs[key]] == whole["logprobs"][key]


def test_half_a_character_is_an_entry_of_its_own(client: httpx.Client) -> None:
    (choice,) = post(client, "/v1/completions", prompt="halves<|extra_0|>", logprobs=1)["choices"]
    assert choice["text"] == "x你!"
    assert choice["logprobs"]["tokens"] == ["x", "", "你!", ""]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 3]


def test_echo_streams_the_prompt_first(client: httpx.Client) -> None:
    chunks = events(client, "/v1/completions", prompt=HELLO, echo=True)
    assert chunks[0]["choices"][0]["text"] == HELLO
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == HELLO + SAID


def test_probabilities_before_and_after_sampling(client: httpx.Client) -> None:
    body = {"prompt": "count<|extra_0|>", "n_predict": 2, "n_probs": 2, "temperature": 1, "top_k": 5, "seed": 1}
    before = post(client, "/completion", **body, repeat_penalty=1)["completion_probabilities"][1]
    assert [entry["token"] for entry in before["top_logprobs"]] == [" two", " deux"]
    after = post(client, "/completion", **body, repeat_penalty=1, post_sampling_probs=True)
    assert sum(entry["prob"] for entry in after["completion_probabilities"][1]["top_probs"]) == pytest.approx(1)
    (choice,) = post(client, "/v1/completions", **body, repeat_penalty=1, post_sampling_probs=True)["choices"]
    assert choice["logprobs"]["top_logprobs"][1].keys() == {" two", " deux"}


def test_what_passes_with_the_stock_server_too(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"]
    assert client.get("/props").json()["total_slots"] >= 1
    assert post(client, "/completion", prompt=HELLO, stop=["user"])["stopping_word"] == "user"
    text = "Hello <|extra_0|> 你好 🙂\n"
    tokens = post(client, "/tokenize", content=text)["tokens"]
    assert post(client, "/detokenize", tokens=tokens)["content"] == text
    assert post(client, "/tokenize", content="Z", add_special=True)["tokens"] == [token_of(client, "Z")]
    assert post(client, "/completion", prompt=text, n_predict=1)["tokens_evaluated"] == len(tokens)  # no token more
    biased = post(client, "/completion", prompt=HELLO, n_predict=1, logit_bias=[[token_of(client, "Z"), 10000]])
    assert biased["content"] == "Z"


def token_of(client: httpx.Client, text: str) -> int:
    (token,) = post(client, "/tokenize", content=text)["tokens"]
    assert isinstance(token, int)
    return token


@pytest.mark.data
def test_the_clock_of_a_retry_and_of_other_tools(vendors: httpx.Client) -> None:
    """An opening asked again keeps its time; other tools, or another system message, are another conversation."""
    user = {"role": "user", "content": f"What time is it? {time.time_ns()}"}
    other = {**ADD, "function": {**ADD["function"], "name": "other"}}  # type: ignore[dict-item]

    def prompt(tools: list[Any], *messages: dict[str, str]) -> str:
        return str(post(vendors, "/apply-template", messages=messages, tools=tools)["prompt"])

    first = prompt([ADD], user)
    time.sleep(1.1)
    assert prompt([ADD], user) == first
    assert clock(prompt([other], user)) > clock(first)
    assert clock(prompt([ADD], {"role": "system", "content": "Be brief."}, user)) > clock(first)


@pytest.mark.data
def test_the_clock_remembers_a_bounded_number_of_conversations(vendors: httpx.Client) -> None:
    def prompt(question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "tools": [ADD]}
        return str(post(vendors, "/apply-template", **body)["prompt"])

    first = prompt("bounded")
    begun = time.monotonic()
    for i in range(1024):
        prompt(f"other {i}")
    time.sleep(max(0.0, 1.1 - (time.monotonic() - begun)))
    assert clock(prompt("bounded")) > clock(first)


def test_a_stream_leaves_its_connection_open(client: httpx.Client) -> None:
    """It was closed, in a race with the next request of a client that keeps connections."""
    url = httpx.URL(client.base_url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=TIMEOUT)
    connection.connect()
    connection.auto_open = 0  # a closed connection is an error, not a new one
    for _ in range(3):
        connection.request("POST", "/completion", json.dumps({"prompt": HELLO, "stream": True}))
        assert b'"stop":true' in connection.getresponse().read()
        time.sleep(0.05)
    connection.close()
