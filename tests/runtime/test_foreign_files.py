"""Files made elsewhere: recognised by their head, served as hy-convert's own."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates.conversations import vendor_template
from scripted_model import STOP, STOP_2, VENDOR_SAMPLING, Script, cut, write_scripted
from served import client_of
from tiny_model import write_model

from hymoe.chat_templates import fallback, render, repair
from hymoe.errors import OutputError
from hymoe.published import HUNYUAN_A13B
from hymoe.runtime import overrides
from hymoe.runtime.header import peek, token_ids
from hymoe.runtime.server import ServerOptions, serve

# A template of our own with the fault of the vendors': an empty message makes it call dict.update.
OLD_TEMPLATE = (
    "{% set context = {'has_head': true} %}{%- for message in messages -%}"
    "{%- if not message['content'] -%}{% set _ = context.update({'has_head': false}) %}"
    "{%- elif message['role'] == 'user' -%}{{- '<|startoftext|>' + message['content'] + '<|extra_0|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- message['content'] + '<|eos|>' -}}"
    "{%- else -%}{{- message['content'] + '<|extra_4|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n' -}}{%- endif -%}"
)
N_CTX = 4096
HIDDEN_STOP = "The first answer ends in the other way."
# Greedy, so that what it says is the script; penalties would forbid pieces that come twice.
ASK = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 60}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama.cpp's converter makes of a checkpoint: one end token, the vendor's template, no sampling defaults."""
    ends_otherwise = Script([*cut(HIDDEN_STOP), STOP_2, *cut(" And more follows.")])
    thinks = Script(cut("<think>\nHm, 1 + 1.\n</think>\n<answer>\nIt is 2.\n</answer>"), when="sum")
    return write_scripted(
        tmp_path_factory.mktemp("foreign") / "foreign.gguf",
        [ends_otherwise, thinks],
        template=OLD_TEMPLATE,
        end_tokens=(STOP,),
        sampling=(),
        full_vocabulary=True,
    )


@pytest.fixture(scope="module")
def client(llama_server: Path, foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overrides, "cache", lambda: folder)
        with client_of(foreign, threads=2) as client:
            yield client


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own for repaired templates."""
    monkeypatch.setattr(overrides, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def changed(path: Path, **scalars: Any) -> Any:
    """The head of `path` with some keys otherwise; None: absent."""
    header = peek(path)
    wanted = dict(header.scalars) | {key.replace("__", "."): value for key, value in scalars.items()}
    return dataclasses.replace(header, scalars={key: value for key, value in wanted.items() if value is not None})


def test_tokens_are_found_by_their_text(foreign: Path) -> None:
    header = peek(foreign)
    assert header.n_vocab == 128167
    assert token_ids(header, ("<|extra_5|>", "<|eos|>", "no such")) == {"<|eos|>": 127960, "<|extra_5|>": 127967}


def test_what_is_missing_is_given(foreign: Path, cache: Path) -> None:
    found = overrides.find(peek(foreign), N_CTX)
    words = overrides.arguments(found)
    assert words[:4] == [
        *("--override-kv", "tokenizer.ggml.eos_token_id=int:127960"),
        *("--override-kv", "tokenizer.ggml.eot_token_id=int:127967"),
    ]
    assert words[4:14] == [
        *("--temp", "0.7", "--top-k", "20", "--top-p", "0.8", "--repeat-penalty", "1.05", "--repeat-last-n", "4096")
    ]
    assert words[14] == "--chat-template-file"
    file = Path(words[15])
    assert file.parent == cache
    assert file.read_text("utf-8") == repair(OLD_TEMPLATE).text
    assert len(words) == 16
    line = overrides.line(peek(foreign), found)
    assert "\n" not in line
    for what in (
        "foreign.gguf is from another tool",
        "both end tokens",
        "sampling defaults",
        "repaired chat template",
        "--repair",
    ):
        assert what in line


def test_the_template_is_written_once_and_again_where_it_was_changed(foreign: Path) -> None:
    file = Path(overrides.arguments(overrides.find(peek(foreign), N_CTX))[-1])
    os.utime(file, (1, 1))
    overrides.find(peek(foreign), N_CTX)
    assert file.stat().st_mtime == 1
    file.write_text("something else")
    overrides.find(peek(foreign), N_CTX)
    assert file.read_text("utf-8") == repair(OLD_TEMPLATE).text
    assert [other.name for other in file.parent.iterdir()] == [file.name]


def test_an_older_file_of_ours_is_not_called_another_tools(foreign: Path) -> None:
    header = changed(foreign, hymoe__version="0.0.1")
    line = overrides.line(header, overrides.find(header, N_CTX))
    assert line.startswith("foreign.gguf lacks some metadata: served with both end tokens, ")
    assert "another tool" not in line


def test_a_full_disk_leaves_nothing(foreign: Path, cache: Path) -> None:
    """A limit on the size of files stands for it: the system refuses to write on, as ENOSPC does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write the repaired template"):
            overrides.find(peek(foreign), N_CTX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(foreign: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(OutputError, match=r"cannot write the repaired template.*HYMOE_CACHE"):
        overrides.find(peek(foreign), N_CTX)


def test_what_the_file_has_is_left_alone(foreign: Path) -> None:
    sampling = {f"general__sampling__{key}": value for key, value in VENDOR_SAMPLING}
    ends = {"tokenizer__ggml__eot_token_id": 127967}
    whole = changed(foreign, **sampling, **ends, tokenizer__chat_template=fallback())
    assert overrides.find(whole, N_CTX) == []
    # The other way round both end an answer as well.
    turned = {"tokenizer__ggml__eos_token_id": 127967, "tokenizer__ggml__eot_token_id": 127960}
    assert not overrides.arguments(
        overrides.find(changed(foreign, **sampling, **turned, tokenizer__chat_template=None), N_CTX)
    )
    only = changed(foreign, **(sampling | {"general__sampling__penalty_last_n": None}), **ends)
    assert overrides.arguments(overrides.find(only, N_CTX))[:2] == ["--repeat-last-n", "4096"]
    added = changed(foreign, **sampling, **ends, tokenizer__ggml__add_bos_token=True)
    assert overrides.arguments(overrides.find(added, N_CTX))[:2] == [
        "--override-kv",
        "tokenizer.ggml.add_bos_token=bool:false",
    ]


def test_a_template_kept_by_choice_is_kept(foreign: Path) -> None:
    words = overrides.arguments(overrides.find(changed(foreign, hymoe__chat_template="vendor"), N_CTX))
    assert "--chat-template-file" not in words
    for mine in (("--chat-template-file", "mine.jinja"), ("--chat-template=x",)):
        assert "--chat-template-file" not in overrides.arguments(overrides.find(peek(foreign), N_CTX, mine))


def test_another_vocabulary_is_never_guessed_at(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", template=OLD_TEMPLATE)
    assert [override.what for override in overrides.find(peek(model), N_CTX)] == ["a repaired chat template"]
    assert overrides.find(peek(write_model(tmp_path / "own.gguf", template=fallback())), N_CTX) == []


def test_sampling_facts_are_the_ones_that_tests_take_for_the_vendors() -> None:
    assert dict(HUNYUAN_A13B.sampling) == dict(VENDOR_SAMPLING)
    assert set(overrides.SAMPLING_FLAGS) == set(HUNYUAN_A13B.sampling)


@pytest.mark.engine
def test_both_end_tokens_end_an_answer(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Go."}], **ASK}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == HIDDEN_STOP


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_the_thought_and_the_answer_come_apart_without_tags(client: httpx.Client, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "The sum?"}], **ASK, "stream": stream}
    answer = client.post("/v1/chat/completions", json=body)
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    else:
        deltas = [answer.json()["choices"][0]["message"]]
    thought, content = ("".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning_content", "content"))
    assert (thought, content) == ("Hm, 1 + 1.", "It is 2.")


@pytest.mark.engine
def test_the_server_has_the_vendors_sampling_and_the_repaired_template(client: httpx.Client) -> None:
    props = client.get("/props").json()
    params = props["default_generation_settings"]["params"]
    assert (params["top_k"], params["repeat_last_n"]) == (20, 4096)
    for key, wanted in {"temperature": 0.7, "top_p": 0.8, "repeat_penalty": 1.05}.items():
        assert params[key] == pytest.approx(wanted, rel=1e-6)
    assert props["chat_template"] == repair(OLD_TEMPLATE).text
    empty = [{"role": "system", "content": ""}, {"role": "user", "content": "U"}]
    prompt = client.post("/apply-template", json={"messages": empty}).json()["prompt"]
    assert prompt == "<|startoftext|>U<|extra_0|>"


@pytest.mark.engine
def test_the_line_is_said_once(llama_server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "tiny.gguf", template=OLD_TEMPLATE)
    with serve(ServerOptions(model, port=0, threads=1)):
        pass
    said = [line for line in capsys.readouterr().err.splitlines() if "from another tool" in line]
    assert len(said) == 1
    assert "both end tokens" not in said[0]


@pytest.mark.data
def test_the_published_template_with_tools(data: Path, foreign: Path, cache: Path) -> None:
    vendor = vendor_template(data)
    words = overrides.arguments(overrides.find(changed(foreign, tokenizer__chat_template=vendor), N_CTX))
    repaired = Path(words[-1]).read_text("utf-8")
    messages: list[dict[str, Any]] = [{"role": "user", "content": "U"}, {"role": "tool", "content": {"a": 1}}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert render(repaired, messages, tools=tools).endswith('<tool_response>{"a": 1}</tool_response><|extra_0|>')
