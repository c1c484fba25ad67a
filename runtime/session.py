"""What `hy-chat` does between its options and its end: find a server, then one answer or a conversation."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hymoe import console
from hymoe.errors import HyError
from hymoe.runtime import hosts
from hymoe.runtime.chat import N_ALTERNATIVES, Chat, Display
from hymoe.runtime.client import LostServerError
from hymoe.runtime.conversation import Answer, Conversation
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.hosts import AttachedHost, PrivateHost
from hymoe.runtime.placing import place
from hymoe.runtime.process import signals_as_exceptions
from hymoe.runtime.server import Server, ServerOptions
from hymoe.runtime.settings import Settings


@dataclass(frozen=True)
class ChatOptions:
    """One conversation; `prompt` None asks on the terminal, otherwise one answer is all, as JSON with `as_json`."""

    prompt: str | None = None
    system: str | None = None
    files: tuple[Path, ...] = ()
    load: Path | None = None
    as_json: bool = False
    settings: Settings = field(default_factory=Settings)


def private(server_options: ServerOptions, options: ChatOptions) -> None:
    """Talk to a server of our own, started on a free port with a random key and stopped afterwards."""
    with signals_as_exceptions(), hosts.slot_folder() as slots:
        server_options = hosts.private_options(server_options, slots)
        console.status(f"loading {server_options.model}")
        server_options = place(server_options)
        with Server(server_options) as server:
            console.status(f"ready (context {server.n_ctx})")
            _talk(hosts.private(server, server_options, slots), options)


def attached(endpoint: Endpoint, options: ChatOptions) -> None:
    """Talk to a server that runs already."""
    with signals_as_exceptions():
        _talk(hosts.attached(endpoint), options)


def read_prompt(source: BinaryIO) -> str:
    """Read a prompt from a pipe. Raises HyError where it is empty or no UTF-8."""
    try:
        text = source.read().decode("utf-8").strip("\n")
    except UnicodeDecodeError as exc:
        raise HyError("stdin", got=f"byte {exc.object[exc.start]:#04x} at {exc.start}", expected="UTF-8 text") from exc
    if not text.strip():
        raise HyError(
            "stdin", got="nothing", expected="a prompt", fix="give one with -p, or none on a terminal to talk"
        )
    return text


def _talk(entering: AbstractAsyncContextManager[AttachedHost], options: ChatOptions) -> None:
    for flag, text in (("--prompt", options.prompt), ("--system", options.system)):
        # Python hands on an argument's bytes that are no UTF-8 as surrogates, which no JSON can carry.
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise HyError(flag, got="bytes that are no UTF-8", expected="UTF-8 text")
    with asyncio.Runner() as runner:
        host = runner.run(_enter(entering))
        try:
            if options.prompt is not None:
                runner.run(_one_answer(host, options, options.prompt))
            elif _has_a_screen():
                runner.run(_on_the_screen(host, options))
            else:
                _plainly(host, options, runner)
        finally:
            runner.run(_leave(entering))


async def _enter(entering: AbstractAsyncContextManager[AttachedHost]) -> AttachedHost:
    return await entering.__aenter__()


async def _leave(entering: AbstractAsyncContextManager[AttachedHost]) -> None:
    await entering.__aexit__(None, None, None)


def _has_a_screen() -> bool:
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return on_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


async def _chat(host: AttachedHost, display: Display, options: ChatOptions, *, with_probabilities: bool) -> Chat:
    """Make the conversation that the options ask for."""
    await host.learn()
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}}
    if host.is_llama_server:
        # Another server may refuse what it does not know.
        fields |= {"return_progress": True, "timings_per_token": True, "expert_usage": True}
    if host.is_llama_server and with_probabilities:
        fields |= {"logprobs": True, "top_logprobs": N_ALTERNATIVES}
    chat = Chat(host, display, Conversation(options.system), options.settings, fields)
    if options.load:
        await chat.load(options.load)
        chat.settings.take(options.settings)
        chat.conversation.system = options.system or chat.conversation.system
    for path in options.files:
        await chat.attach(str(path))
    return chat


async def _one_answer(host: AttachedHost, options: ChatOptions, prompt: str) -> None:
    from hymoe.runtime.chat_plain import PlainDisplay, SilentDisplay

    display = SilentDisplay() if options.as_json else PlainDisplay()
    try:
        chat = await _chat(host, display, options, with_probabilities=False)
        # A script wants to know that the server is gone, and an @ in its prompt is an @.
        answer = await chat.ask_once(prompt)
    except LostServerError:
        if isinstance(host, PrivateHost):
            host.explain()
        raise
    if options.as_json:
        console.result(as_json(answer))


def as_json(answer: Answer) -> str:
    """Give an answer as one line of JSON, under the names of the API."""
    import json

    told = {
        "content": answer.text,
        "reasoning_content": answer.thought,
        "finish_reason": answer.reason,
        "usage": answer.usage,
        "timings": answer.timings,
    }
    return json.dumps(told, ensure_ascii=False)


async def _on_the_screen(host: AttachedHost, options: ChatOptions) -> None:
    from hymoe.runtime.chat_terminal import TerminalChat

    screen = TerminalChat()
    chat = await _chat(host, screen.display, options, with_probabilities=True)
    await screen.run(chat)


def _plainly(host: AttachedHost, options: ChatOptions, runner: asyncio.Runner) -> None:
    from hymoe.runtime.chat_plain import PlainDisplay, repl

    chat = runner.run(_chat(host, PlainDisplay(), options, with_probabilities=True))
    repl(chat, runner)
