"""A llama-server's endpoints, as hy-chat uses them; of another server the chat alone will do."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from hymoe.errors import ServerError
from hymoe.runtime.conversation import Message
from hymoe.runtime.endpoint import Endpoint, is_loopback
from hymoe.runtime.stream import ChatStream, Piece, Progress, refusal

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
QUICK_SECONDS = 10.0  # for answers that need no model


class LostServerError(ServerError):
    """The server cannot be reached, or went away before the answer was complete."""


class Client:
    """A connection to one server. Every method raises LostServerError or ServerError unless it says otherwise."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http = _connection(endpoint)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def move(self, endpoint: Endpoint) -> None:
        """Talk to another address from now on."""
        await self._http.aclose()
        self.endpoint = endpoint
        self._http = _connection(endpoint)

    async def chat(
        self, messages: Sequence[Message], fields: Mapping[str, Any], stream: ChatStream
    ) -> AsyncGenerator[Piece | Progress, None]:
        """Stream the answer to `messages`; cancelling, or closing the generator early, stops the server's work too.

        fields: further fields of the request. `stream` is a fresh ChatStream that the caller asks afterwards how the
        answer ended. Raises ContextFullError besides.
        """
        import httpx

        body = {"messages": list(messages), "stream": True, **fields}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refused(response.status_code, await response.aread())
                async for chunk in response.aiter_bytes():
                    for piece in stream.feed(chunk):
                        yield piece
                if not (stream.finished or stream.reason):
                    raise httpx.RemoteProtocolError("the answer broke off")
        except httpx.HTTPError as exc:
            raise self._lost(exc) from exc

    async def props(self) -> dict[str, Any]:
        """Give what a llama-server says of itself; nothing where the server is another."""
        try:
            return await self._ask("GET", "/props")
        except LostServerError:
            raise
        except ServerError:
            return {}

    async def is_healthy(self) -> bool:
        """Whether the server answers and has loaded its model. Raises nothing."""
        try:
            await self._ask("GET", "/v1/models")
        except ServerError:
            return False
        return True

    async def count_tokens(self, text: str) -> int | None:
        """Count the tokens of a text; None where the server has no tokenizer to ask."""
        try:
            tokens = (await self._ask("POST", "/tokenize", {"content": text})).get("tokens")
        except ServerError:
            return None
        return len(tokens) if isinstance(tokens, list) else None

    async def slot(self, action: str, filename: str) -> dict[str, Any]:
        """Save or restore what the server has read: `action` is "save" or "restore", the file in its own folder."""
        return await self._ask("POST", f"/slots/0?action={action}", {"filename": filename}, seconds=None)

    async def _ask(
        self, method: str, path: str, body: object = None, *, seconds: float | None = QUICK_SECONDS
    ) -> dict[str, Any]:
        import httpx

        try:
            response = await self._http.request(method, path, json=body, timeout=seconds)
        except httpx.HTTPError as exc:
            raise self._lost(exc) from exc
        if response.status_code != httpx.codes.OK:
            raise self._refused(response.status_code, response.content)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        return answer if isinstance(answer, dict) else {}

    def _lost(self, exc: httpx.HTTPError) -> LostServerError:
        import httpx

        if isinstance(exc, httpx.ConnectError):
            return LostServerError(f"no server at {self.endpoint.url}", got=_reason(exc), fix="start one with hy-serve")
        return LostServerError(f"lost the server at {self.endpoint.url}", got=str(exc) or type(exc).__name__)

    def _refused(self, status: int, raw: bytes) -> ServerError:
        if status == 401:
            what = "a wrong API key" if self.endpoint.api_key else "no API key"
            return ServerError(f"{self.endpoint.url}: got {what}", fix="set HYMOE_API_KEY to the server's")
        try:
            body = json.loads(raw)
            error = body.get("error") if isinstance(body, dict) else None
            if status == 503 and isinstance(error, dict) and error.get("type") == "unavailable_error":
                # As good as lost: what it is cannot be asked, and in a moment it is back.
                return LostServerError(f"{self.endpoint.url} is still loading its model", fix="try again in a moment")
            return refusal(body)
        except ValueError:
            return ServerError(
                f"{self.endpoint.url}: got HTTP {status}", expected="a chat answer", fix="is it a llama-server?"
            )


def _reason(exc: BaseException) -> str:
    """Give the system's own word for what went wrong, where there is one: it says what a network library hides."""
    behind: BaseException | None = exc
    while behind and not (isinstance(behind, OSError) and behind.errno):
        behind = behind.__cause__ or behind.__context__
    return os.strerror(behind.errno or 0) if isinstance(behind, OSError) else str(exc)


def _connection(endpoint: Endpoint) -> httpx.AsyncClient:
    import httpx

    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    host = urlsplit(endpoint.url).hostname or ""
    return httpx.AsyncClient(
        base_url=endpoint.url,
        headers=headers,
        # No limit on reading: a long prompt is silent for minutes, and Ctrl-C is there.
        timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        # A fresh connection for each question: the server closes idle ones, and may do so as we write.
        limits=httpx.Limits(max_keepalive_connections=0),
        # A proxy from the environment must not come between us and our own machine.
        trust_env=not is_loopback(host),
    )
