"""A stand-in for a chat server where only time matters: it says words at a chosen pace and notes when it sent each.

A real server on a tiny model is too fast and too irregular to measure what a client adds; everything else about the
protocol is tested with the real one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pace:
    """What the server says and when: words `seconds` apart; `sent` holds the time (time.monotonic) of each word."""

    def __init__(self, words: list[str], seconds: float, *, wait: float = 0.0) -> None:
        self.words = words
        self.seconds = seconds
        self.wait = wait  # before the first word
        self.sent: list[float] = []


@contextmanager
def paced_server(pace: Pace) -> Iterator[str]:
    """Run the server for the length of the block; give its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            time.sleep(pace.wait)
            for word in pace.words:
                pace.sent.append(time.monotonic())
                self._event({"choices": [{"delta": {"content": word}}]})
                time.sleep(pace.seconds)
            self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, event: object) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
