"""What `hy-chat` does between its options and its end: find a server, then one answer or a conversation."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from typing import BinaryIO

from hymoe import console
from hymoe.errors import HyError
from hymoe.runtime.chat import Chat, repl
from hymoe.runtime.client import Client
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.process import signals_as_exceptions
from hymoe.runtime.server import Server, ServerOptions

# A connection breaks a moment before its process can be seen to have ended.
REAP_SECONDS = 1.0
PRIVATE_ARGUMENTS = ("--no-ui", "--parallel", "1")


@dataclass(frozen=True)
class ChatOptions:
    """One conversation; `prompt` None asks on the terminal, otherwise one answer is all."""

    prompt: str | None = None
    system: str | None = None
    max_tokens: int | None = None


def private(server_options: ServerOptions, options: ChatOptions) -> None:
    """Talk to a server of our own, started on a free port with a random key and stopped afterwards."""
    server_options = replace(
        server_options, port=0, api_key=secrets.token_urlsafe(32), extra=PRIVATE_ARGUMENTS + server_options.extra
    )
    with signals_as_exceptions():
        console.status(f"loading {server_options.model}")
        with Server(server_options) as server, Client(server.endpoint, on_lost=lambda: _explain(server)) as client:
            console.status(f"ready (context {server.n_ctx})")
            _talk(client, options)


def attached(endpoint: Endpoint, options: ChatOptions) -> None:
    """Talk to a server that runs already."""
    with Client(endpoint) as client:
        _talk(client, options)


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


def _talk(client: Client, options: ChatOptions) -> None:
    for flag, text in (("--prompt", options.prompt), ("--system", options.system)):
        # Python hands on an argument's bytes that are no UTF-8 as surrogates, which no JSON can carry.
        if text and any("\ud800" <= character <= "\udfff" for character in text):
            raise HyError(flag, got="bytes that are no UTF-8", expected="UTF-8 text")
    chat = Chat(client, system=options.system, max_tokens=options.max_tokens)
    if options.prompt is None:
        repl(chat)
    else:
        chat.ask(options.prompt)


def _explain(server: Server) -> None:
    """Say how our own server ended, if it did; raises ServerExitError then."""
    deadline = time.monotonic() + REAP_SECONDS
    while time.monotonic() < deadline:
        server.check()
        time.sleep(0.05)
