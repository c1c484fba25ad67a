"""What hy-chat makes of a server that is there and does not answer as yet."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hymoe.runtime.client import Client, LostServerError
from hymoe.runtime.endpoint import Endpoint

# llama-server's own words, to any request, until its model is loaded.
LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'


class Loading(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", str(len(LOADING)))
        self.end_headers()
        self.wfile.write(LOADING)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_loads_is_no_stranger() -> None:
    """A chat without probabilities, context and speed would be the end of it: it is as good as lost, and waited for."""

    async def ask(url: str) -> None:
        async with Client(Endpoint(url)) as client:
            assert not await client.is_healthy()
            await client.props()

    with HTTPServer(("127.0.0.1", 0), Loading) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(LostServerError, match="is still loading its model; try again in a moment"):
                asyncio.run(ask(f"http://127.0.0.1:{server.server_address[1]}"))
        finally:
            server.shutdown()
