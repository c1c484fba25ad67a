"""The OpenAI-style chat endpoint, as seen by hy-chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from hymoe.errors import ServerError
from hymoe.runtime.endpoint import Endpoint, is_loopback
from hymoe.runtime.stream import ChatStream, Piece, error_text

if TYPE_CHECKING:
    import httpx

Message = Mapping[str, str]

CONNECT_SECONDS = 10.0


class Client:
    """A connection to one server. `on_lost` may raise a better error than "connection lost"."""

    def __init__(self, endpoint: Endpoint, *, on_lost: Callable[[], None] = lambda: None) -> None:
        import httpx

        self.endpoint = endpoint
        self._on_lost = on_lost
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        host = urlsplit(endpoint.url).hostname or ""
        self._http = httpx.Client(
            base_url=endpoint.url,
            headers=headers,
            # No limit on reading: a long prompt is silent for minutes, and Ctrl-C is there.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            # A fresh connection for each question: the server closes idle ones, and may do so as we write.
            limits=httpx.Limits(max_keepalive_connections=0),
            # A proxy from the environment must not come between us and our own machine.
            trust_env=not is_loopback(host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._http.close()

    def chat(
        self, messages: Sequence[Message], *, stream: ChatStream, max_tokens: int | None = None
    ) -> Generator[Piece, None, None]:
        """Stream the answer to `messages`; closing the generator early stops the server's work too.

        `stream` is a fresh ChatStream that the caller asks afterwards how the answer ended. Raises ServerError
        where the server cannot be reached, refuses, or is lost before the answer is complete.
        """
        import httpx

        body: dict[str, Any] = {"messages": list(messages), "stream": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refused(response)
                for chunk in response.iter_bytes():
                    yield from stream.feed(chunk)
                if not (stream.finished or stream.reason):
                    raise httpx.RemoteProtocolError("the answer broke off")
        except httpx.ConnectError as exc:
            self._on_lost()
            raise ServerError(f"no server at {self.endpoint.url}", got=exc, fix="start one with hy-serve") from exc
        except httpx.HTTPError as exc:
            self._on_lost()
            raise ServerError(f"lost the server at {self.endpoint.url}", got=str(exc) or type(exc).__name__) from exc

    def _refused(self, response: httpx.Response) -> ServerError:
        if response.status_code == 401:
            what = "a wrong API key" if self.endpoint.api_key else "no API key"
            return ServerError(f"{self.endpoint.url}: got {what}", fix="set HYMOE_API_KEY to the server's")
        raw = response.read()
        try:
            return ServerError(error_text(json.loads(raw)))
        except ValueError:
            return ServerError(
                f"{self.endpoint.url}: got HTTP {response.status_code}",
                expected="a chat answer",
                fix="is it a llama-server?",
            )
