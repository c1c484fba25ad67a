"""mikupad's requests, byte for byte, and every field that it reads of the answers.

Source: mikupad.html of lmg-anon/mikupad at b2a2a3e, by line.

| body | fields, in the order they are sent | line |
|---|---|---|
| /completion | model, prompt, samplers, n_predict, n_probs, post_sampling_probs, stream, stop, cache_prompt | 7340 |
| OpenAI modes | model, prompt or messages, samplers, stream; then the fields of RENAMES, in its order | 1971 |

Which fields are sent, their values and their names are from those lines. Not certain is the order of the samplers among
themselves, and the place of `stop`: no server here depends on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from talker import ENDLESS, HELLO, REPLY, THOUGHT, write_talker
from terminal import TIMEOUT

from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

KEY = "the-key"
PROMPT = "<|startoftext|>hi<|extra_0|>"
SAMPLERS = {
    **{"temperature": 0.7, "repeat_penalty": 1.1, "repeat_last_n": 256, "penalize_nl": False, "ignore_eos": False},
    **{"presence_penalty": 0, "frequency_penalty": 0, "top_p": 0.95, "top_k": 40, "min_p": 0},
}
RENAMES = (
    *(("n_predict", "max_tokens"), ("repeat_penalty", "repetition_penalty")),
    *(("repeat_last_n", "repetition_penalty_range"), ("ignore_eos", "ban_eos_token")),
)


@dataclass(frozen=True)
class Token:
    """A chunk of mikupad's text: what it shows, and the alternatives of its popup."""

    content: str
    alternatives: Mapping[str, float]


@pytest.fixture(scope="module")
def endpoint(llama_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server of the scripted model, with a key."""
    model = write_talker(tmp_path_factory.mktemp("model") / "talker.gguf", trained=ENDLESS)
    with serve(ServerOptions(model, port=0, threads=1, api_key=KEY, ctx=0)) as endpoint:
        yield endpoint


class Page:
    """The page's `fetch`: its headers, and a body exactly as JSON.stringify writes it."""

    def __init__(self, endpoint: Endpoint, key: str | None = KEY) -> None:
        headers = {"Origin": "null", **({"Authorization": f"Bearer {key}"} if key is not None else {})}
        self.client = httpx.Client(base_url=endpoint.url, headers=headers, trust_env=False, timeout=TIMEOUT)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def stringify(self, body: Mapping[str, Any]) -> bytes:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = self.client.post(path, content=self.stringify(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["Access-Control-Allow-Origin"] == "null"
        return answer.json()

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """Each event's JSON; comments are skipped, every other line of data must be JSON or [DONE]."""
        headers = {"Content-Type": "application/json"}
        with self.client.stream("POST", path, content=self.stringify(body), headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


def llama_cpp_body(prompt: str, *, stream: bool, post_sampling: bool, **set_by_user: Any) -> dict[str, Any]:
    samplers = {**SAMPLERS, **set_by_user}
    stop = {"stop": samplers.pop("stop")} if "stop" in samplers else {}
    lengths = {"n_predict": samplers.pop("n_predict", -1), "n_probs": 10, "post_sampling_probs": post_sampling}
    return {"model": "", "prompt": prompt, **samplers, **lengths, "stream": stream, **stop, "cache_prompt": True}


def openai_body(asked: Mapping[str, Any], *, stream: bool, **set_by_user: Any) -> dict[str, Any]:
    chat = "messages" in asked
    body = {"model": "", **asked, **SAMPLERS, **set_by_user}
    body |= {"n_predict": body.pop("n_predict", 1024), "n_probs": 10, "stream": stream}
    body["max_tokens"] = body.pop("n_predict")
    body |= {"logprobs": True, "top_logprobs": body.pop("n_probs")} if chat else {"logprobs": body.pop("n_probs")}
    for ours, theirs in RENAMES[1:]:
        body[theirs] = body.pop(ours)
    return body


def read_completion(chunk: Mapping[str, Any]) -> Token | None:
    """One event of /completion, or one entry of completion_probabilities with its token as content."""
    content = chunk.get("content") or chunk.get("token")
    if not content:
        return None
    entry = chunk.get("completion_probabilities", [chunk])[0]
    if top := entry.get("top_probs"):
        return Token(content, {item["token"]: item["prob"] for item in top})
    return Token(content, {item["token"]: item["logprob"] for item in entry["top_logprobs"]})


def read_choice(choice: Mapping[str, Any]) -> Token | None:
    """One event of OpenAI mode; the list is looked for before the legacy map."""
    content = choice["delta"].get("content") if "delta" in choice else choice["text"]
    if not content:
        return None
    logprobs = choice.get("logprobs") or {}
    if content_list := logprobs.get("content"):
        return Token(content, {item["token"]: item["logprob"] for item in content_list[0]["top_logprobs"]})
    return Token(content, (logprobs.get("top_logprobs") or [{}])[0])


def text_of(tokens: list[Token]) -> str:
    return "".join(token.content for token in tokens)


def test_the_bodies_are_mikupads() -> None:
    body = Page.stringify(None, llama_cpp_body("a", stream=True, post_sampling=True))  # type: ignore[arg-type]
    assert body == (
        b'{"model":"","prompt":"a","temperature":0.7,"repeat_penalty":1.1,"repeat_last_n":256,"penalize_nl":false,'
        b'"ignore_eos":false,"presence_penalty":0,"frequency_penalty":0,"top_p":0.95,"top_k":40,"min_p":0,'
        b'"n_predict":-1,"n_probs":10,"post_sampling_probs":true,"stream":true,"cache_prompt":true}'
    )
    body = Page.stringify(None, openai_body({"prompt": "a"}, stream=False))  # type: ignore[arg-type]
    assert body == (
        b'{"model":"","prompt":"a","temperature":0.7,"penalize_nl":false,"presence_penalty":0,"frequency_penalty":0,'
        b'"top_p":0.95,"top_k":40,"min_p":0,"stream":false,"max_tokens":1024,"logprobs":10,"repetition_penalty":1.1,'
        b'"repetition_penalty_range":256,"ban_eos_token":false}'
    )


@pytest.mark.parametrize("post_sampling", [True, False])
def test_llama_cpp_mode_streaming(endpoint: Endpoint, post_sampling: bool) -> None:
    with Page(endpoint) as page:
        body = llama_cpp_body(PROMPT, stream=True, post_sampling=post_sampling)
        tokens = [token for event in page.events("/completion", body) if (token := read_completion(event))]
    assert text_of(tokens) == HELLO
    assert len(tokens) > 10
    for token in tokens:
        assert token.content in token.alternatives
        # Ten of them; tokens without text, as special ones, are one name of the map.
        assert len(token.alternatives) == 1 if post_sampling else len(token.alternatives) > 5


@pytest.mark.parametrize("post_sampling", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT, "halves<|extra_0|>"])
def test_llama_cpp_mode_at_once(endpoint: Endpoint, post_sampling: bool, prompt: str) -> None:
    """Only the probabilities are read: their tokens are the text."""
    with Page(endpoint) as page:
        answer = page.post("/completion", llama_cpp_body(prompt, stream=False, post_sampling=post_sampling))
    tokens = [token for entry in answer["completion_probabilities"] if (token := read_completion(entry))]
    assert text_of(tokens) == answer["content"] == (HELLO if prompt == PROMPT else "x你!")


def test_llama_cpp_mode_with_everything_set(endpoint: Endpoint) -> None:
    """Each field that a user can set is taken: none makes an error, and those that act are in the settings."""
    sampling = {
        **{"seed": 5, "dynatemp_range": 0.1, "dynatemp_exponent": 1, "logit_bias": [[3, 0.5], [4, False]]},
        **{"grammar": 'root ::= "ZZZZ"', "xtc_threshold": 0.1, "xtc_probability": 0, "typical_p": 1, "tfs_z": 1},
        **{"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1},
        **{"dry_sequence_breakers": ["\n", ":", '"', "*"], "banned_tokens": ["x"], "stop": ["ZZZ"], "n_predict": 20},
    }
    with Page(endpoint) as page:
        answer = page.post("/completion", llama_cpp_body(PROMPT, stream=False, post_sampling=True, **sampling))
        mirostat = {"mirostat": 2, "mirostat_tau": 5, "mirostat_eta": 0.1, "n_predict": 3}
        other = page.post("/completion", llama_cpp_body(PROMPT, stream=False, post_sampling=True, **mirostat))
    assert (answer["content"], answer["stopping_word"]) == ("", "ZZZ")
    settings = answer["generation_settings"]
    unknown = {"banned_tokens", "tfs_z", "penalize_nl", "n_predict", "logit_bias", "dry_penalty_last_n", "stop"}
    for name in set(sampling) - unknown:
        wanted = sampling[name]
        assert settings[name] == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), name
    assert other["generation_settings"]["mirostat"] == 2


def test_llama_cpp_mode_counts_and_names_tokens(endpoint: Endpoint) -> None:
    with Page(endpoint) as page:
        tokens = page.post("/tokenize", {"content": PROMPT + "你好"})["tokens"]
        words = [page.post("/detokenize", {"tokens": [token]})["content"] for token in tokens[:3]]
    assert words == ["<|startoftext|>", "h", "i"]


@pytest.mark.parametrize("stream", [True, False])
def test_openai_text_mode(endpoint: Endpoint, stream: bool) -> None:
    with Page(endpoint) as page:
        body = openai_body({"prompt": PROMPT}, stream=stream, dry_multiplier=0.8, dry_sequence_breakers='["\\n", ":"]')
        if stream:
            choices = [event["choices"][0] for event in page.events("/v1/completions", body)]
        else:
            logprobs = page.post("/v1/completions", body)["choices"][0]["logprobs"]
            pairs = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
            choices = [{"text": token, "logprobs": {"top_logprobs": [top]}} for token, top in pairs]
    tokens = [token for choice in choices if (token := read_choice(choice))]
    assert text_of(tokens) == HELLO
    assert all(len(token.alternatives) > 5 and token.content in token.alternatives for token in tokens)


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [True, False])
def test_chat_mode(endpoint: Endpoint, stream: bool) -> None:
    """The answer alone, without tags: with streaming from the deltas, without from the tokens of the probabilities."""
    with Page(endpoint) as page:
        body = openai_body(CHAT, stream=stream)
        if stream:
            choices = [event["choices"][0] for event in page.events("/v1/chat/completions", body)]
        else:
            entries = page.post("/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
            choices = [{"delta": {"content": entry["token"]}, "logprobs": {"content": [entry]}} for entry in entries]
    tokens = [token for choice in choices if (token := read_choice(choice))]
    assert text_of(tokens) == REPLY
    assert sum(len(token.alternatives) > 5 for token in tokens) >= len(tokens) - 1


@pytest.mark.parametrize("format_flag", ["none", "deepseek-legacy"])
def test_chat_mode_with_thoughts(llama_server: Path, tmp_path: Path, format_flag: str) -> None:
    """Who wants to see thoughts there starts the server with --reasoning-format."""
    extra = ("--reasoning-format", format_flag)
    with (
        serve(ServerOptions(write_talker(tmp_path / "m.gguf"), port=0, threads=1, extra=extra)) as endpoint,
        Page(endpoint, None) as page,
    ):
        events = page.events("/v1/chat/completions", openai_body(CHAT, stream=True))
        tokens = [token for event in events if (token := read_choice(event["choices"][0]))]
    assert text_of(tokens) == f"<think>\n{THOUGHT}\n</think>\n{REPLY}"


def test_openai_mode_counts_and_names_tokens(endpoint: Endpoint) -> None:
    text = "Hello, 你好"
    with Page(endpoint) as page:
        count = len(page.post("/tokenize", {"content": text})["tokens"])
        assert page.post("/v1/token/encode", {"prompt": text})["length"] == count
        assert page.post("/v1/token/encode", {"text": text})["length"] == count
        assert page.post("/v1/internal/token-count", {"text": text})["length"] == count
        tokens = page.post("/v1/internal/encode", {"text": text})["tokens"]
        assert page.post("/v1/token/encode", {"text": text})["tokens"] == tokens
        for path in ("/v1/internal/decode", "/v1/token/decode"):
            assert "".join(page.post(path, {"tokens": [token]})["text"] for token in tokens[:7]) == "Hello, "
        assert page.client.get("/v1/models").json()["data"][0]["id"]
        # Cancel: no body, and the answer is not read.
        assert page.client.post("/v1/internal/stop-generation").status_code == 200


def test_errors_that_it_shows(endpoint: Endpoint) -> None:
    with Page(endpoint, "wrong") as page:
        answer = page.client.post("/completion", json={"prompt": "a"})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (401, "null")
    with Page(endpoint) as page:
        answer = page.client.post("/v1/completions", content=b'{"prompt":')
        assert "parse error" in answer.json()["error"]["message"]


MODES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama.cpp": ("/completion", llama_cpp_body("count<|extra_0|>", stream=True, post_sampling=True, repeat_penalty=1)),
    "text": ("/v1/completions", openai_body({"prompt": "count<|extra_0|>"}, stream=True, top_k=1)),
    "chat": (
        "/v1/chat/completions",
        openai_body({"messages": [{"role": "user", "content": "count"}]}, stream=True, top_k=1),
    ),
}


@pytest.mark.parametrize(("path", "body"), MODES.values(), ids=MODES)
def test_cancel_frees_the_slot(endpoint: Endpoint, path: str, body: Mapping[str, Any]) -> None:
    with Page(endpoint) as page:
        stream = page.events(path, {**body, "n_predict": -1, "max_tokens": -1, "repeat_penalty": 1})
        assert next(stream)
        assert busy(page)
        stream.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + TIMEOUT
        while busy(page):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def busy(page: Page) -> bool:
    return any(slot["is_processing"] for slot in page.client.get("/slots").json())
