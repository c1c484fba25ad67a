"""What the API must do where the stock server falls short: one check for each row, for our server and for stock's.

A check asks a server of the model that `talker` writes, with the vendor's template, and asserts what must hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx
from talker import REPLY, THOUGHT

HELLO = "hi<|extra_0|>"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    """The answer's JSON; raises AssertionError where the status is not 200."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer: httpx.Response, words: str) -> None:
    """A request that is wrong: status 400 and OpenAI's form of an error, which says `words`."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert words in error["message"]


JSON_PATHS = (
    *("/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions/input_tokens"),
    *("/tokenize", "/detokenize", "/apply-template", "/v1/token/encode", "/v1/token/decode"),
    *("/v1/internal/encode", "/v1/internal/decode", "/v1/internal/token-count", "/lora-adapters"),
)


class Wrong(NamedTuple):
    """A request that is wrong: its body as JSON, or as bytes, and what the refusal says."""

    path: str
    body: Any
    words: str

    def send(self, client: httpx.Client) -> httpx.Response:
        """Post it."""
        return client.post(self.path, content=self.body if isinstance(self.body, bytes) else json.dumps(self.body))


def wrong_field(key: str, value: Any) -> Wrong:
    """A chat with one field more."""
    body = {"messages": [{"role": "user", "content": "hi"}], key: value}
    return Wrong("/v1/chat/completions", body, f"'{key}' must be")


# Fields of a chat: what stock takes for absent, and what it refuses as well.
DROPPED_TYPES: tuple[tuple[str, Any], ...] = (
    *(("stop", 5), ("stop", {"a": 1}), ("chat_template_kwargs", 5), ("chat_template_kwargs", [1])),
    *(("thinking_budget_tokens", [1]), ("reasoning_budget_message", 5)),
    *(("add_generation_prompt", "x"), ("parallel_tool_calls", "x")),
)
REFUSED_TYPES: tuple[tuple[str, Any], ...] = (
    *(("stop", ["a", 5]), ("reasoning_budget_tokens", "x"), ("reasoning_control", "x")),
)
TOKENIZE_FLAGS = ("add_special", "parse_special", "with_pieces")
CHAT_PATHS = ("/v1/chat/completions", "/apply-template", "/v1/chat/completions/input_tokens")
DETOKENIZE_PATHS = ("/detokenize", "/v1/internal/decode", "/v1/token/decode")
NO_IDS = (10**9, -1, 10**30, 2**64 - 1, 1.5, "1", None)
# What a client does wrong -> its requests.
WRONG: Mapping[str, tuple[Wrong, ...]] = {
    "broken JSON": tuple(Wrong(path, b'{"prompt": "a", ', "parse error") for path in JSON_PATHS),
    "values of another type": (
        Wrong("/tokenize", {"content": 5}, "must be string"),
        Wrong("/v1/chat/completions", {"messages": 5}, "to be an array"),
        Wrong("/v1/chat/completions", {"messages": ["hi"]}, "must be an object"),
        *(wrong_field(key, value) for key, value in REFUSED_TYPES),
    ),
    "values of another type that stock drops without a word": (
        *(wrong_field(key, value) for key, value in DROPPED_TYPES),
        Wrong("/completion", {"prompt": HELLO, "stop": 5}, "'stop' must be"),
        *(Wrong("/tokenize", {"content": "a", key: "x"}, f"'{key}' must be a boolean") for key in TOKENIZE_FLAGS),
    ),
    "token ids that are none": (
        *(Wrong(path, {"tokens": [1, token]}, "token") for path in DETOKENIZE_PATHS for token in NO_IDS),
        *(Wrong(path, {"tokens": 1}, "must be an array") for path in DETOKENIZE_PATHS),
    ),
    "a role that no template has a place for": tuple(
        Wrong(path, {"messages": [{"role": role, "content": "hi"}]}, "unknown role")
        for role in ("wizard", "", "User", "function")
        for path in CHAT_PATHS
    ),
    "nothing to answer": tuple(Wrong(path, {"messages": []}, "must not be empty") for path in CHAT_PATHS[:2]),
    "keys are not moved": (Wrong("/completion", {"prompt": HELLO, "n_cache_reuse": 16}, "absolute positions"),),
}


def legacy_logprobs(client: httpx.Client) -> None:
    """/v1/completions without streaming."""
    (choice,) = post(client, "/v1/completions", prompt=HELLO, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    tokens = logprobs["tokens"]
    assert "".join(tokens) == choice["text"] != ""
    assert [logprobs["text_offset"][i] for i in range(len(tokens))] == [
        len("".join(tokens[:i])) for i in range(len(tokens))
    ]
    assert all(-0.1 < value <= 0 for value in logprobs["token_logprobs"])
    for token, top in zip(tokens, logprobs["top_logprobs"], strict=True):
        assert len(top) == 3
        assert max(top, key=lambda word: float(top[word])) == token or not token


def chat_logprobs(client: httpx.Client) -> None:
    """A chat's probabilities are those of its content, and stream with it."""
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    (choice,) = post(client, "/v1/chat/completions", **body)["choices"]
    content, thought = choice["logprobs"]["content"], choice["logprobs"]["reasoning_content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"] == REPLY
    assert "".join(entry["token"] for entry in thought) == choice["message"]["reasoning_content"] == THOUGHT


def logprobs_up_to_a_stop_string(client: httpx.Client) -> None:
    """The tokens of an answer that a stop string ended in the middle of a token."""
    answer = post(client, "/completion", prompt="alphabet<|extra_0|>", n_probs=2, stop=["bcd"], temperature=0)
    assert answer["content"] == "a"
    assert [entry["token"] for entry in answer["completion_probabilities"]] == ["a"]


def echo(client: httpx.Client) -> None:
    """The prompt in front of the text."""
    text = post(client, "/v1/completions", prompt=HELLO)["choices"][0]["text"]
    echoed = post(client, "/v1/completions", prompt=HELLO, echo=True)["choices"][0]["text"]
    assert echoed == HELLO + text, f"not echoed: {echoed}"


def token_endpoints(client: httpx.Client) -> None:
    """The tokenizer under the names that UIs try."""
    text = "Hello there, 你好"
    wanted = post(client, "/tokenize", content=text)["tokens"]
    for path, key in (("/v1/token/encode", "prompt"), ("/v1/token/encode", "text"), ("/v1/internal/encode", "text")):
        assert post(client, path, **{key: text}) == {"tokens": wanted, "length": len(wanted)}
    assert post(client, "/v1/internal/token-count", text=text) == {"length": len(wanted)}
    for path in ("/v1/token/decode", "/v1/internal/decode"):
        assert post(client, path, tokens=wanted) == {"text": text}
    assert client.post("/v1/internal/stop-generation").status_code == 200


def breakers_in_a_string(client: httpx.Client) -> None:
    """dry_sequence_breakers as UIs of other servers send them."""
    for breakers in ('["\\n", ":", "\\"", "*"]', '"\\n", ":", "\\"", "*"', ["\n", ":", '"', "*"]):
        answer = post(
            client, "/completion", prompt=HELLO, n_predict=1, dry_multiplier=0.5, dry_sequence_breakers=breakers
        )
        assert answer["generation_settings"]["dry_sequence_breakers"] == ["\n", ":", '"', "*"]
    wrong: Any
    for wrong in ("", "[1]", '"a', 5, []):
        refused(client.post("/completion", json={"prompt": HELLO, "dry_sequence_breakers": wrong}), "breakers")


def penalty_over_the_whole_context(client: httpx.Client) -> None:
    """A window of -1, in the file: what was said more than 64 tokens ago is penalised too."""
    first = post(client, "/completion", prompt="count<|extra_0|>", n_predict=2, return_tokens=True, repeat_penalty=1.0)
    assert first["content"] == "one two"
    said = [first["tokens"][1], *post(client, "/tokenize", content="x" * 200)["tokens"]]
    prompt = [said + post(client, "/tokenize", content="count<|extra_0|>")["tokens"]]
    said_then = post(client, "/completion", prompt=prompt, n_predict=2)["content"]
    assert said_then == "one deux", f"not penalised: {said_then}"
    for window, wanted in ((64, "one two"), (-1, "one deux"), (0, "one two")):
        answer = post(client, "/completion", prompt=prompt, n_predict=2, repeat_last_n=window)
        assert answer["content"] == wanted, window


def frozen_clock(client: httpx.Client) -> None:
    """A tool prompt's clock stands still while a conversation goes on, and the next one has its own time."""
    messages = [{"role": "user", "content": f"What is it? {time.time_ns()}"}]
    body = {"tools": [ADD], "max_tokens": 1, "temperature": 0}

    def prompt(messages: list[dict[str, str]]) -> str:
        return str(post(client, "/apply-template", messages=messages, **body)["prompt"])

    opening = prompt(messages)
    other = prompt([{"role": "user", "content": "Another."}])
    assert clock(opening)
    first = post(client, "/v1/chat/completions", messages=messages, **body)
    time.sleep(1.1)  # the template prints seconds
    messages += [{"role": "assistant", "content": "It is."}, {"role": "user", "content": "And now?"}]
    assert prompt(messages).startswith(opening), "the clock went on"
    second = post(client, "/v1/chat/completions", messages=messages, **body)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1
    assert clock(prompt([{"role": "user", "content": f"New. {time.time_ns()}"}])) > clock(other)


def clock(prompt: str) -> str:
    """The time that the vendor's template has printed."""
    return prompt.split("当前时间：", 1)[1].split("<|", 1)[0]


ROWS: Mapping[str, Callable[[httpx.Client], None]] = {
    check.__name__: check
    for check in (
        *(legacy_logprobs, chat_logprobs, logprobs_up_to_a_stop_string, echo, token_endpoints, breakers_in_a_string),
        *(penalty_over_the_whole_context, frozen_clock),
    )
}
