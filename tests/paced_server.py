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

from terminal import Terminal, command

WORDS = [f"word{n:03} " for n in range(300)]


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
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            # A loop that goes on polls a number that is soon another file's, and keeps that one's port taken.
            server.shutdown()


def first_token_delays(env: dict[str, str], n: int) -> list[float]:
    """Ask hy-chat `n` times; give the seconds from a first word's being sent until it is on the screen."""
    delays = []
    pace = Pace([], 0.2, wait=0.3)
    with paced_server(pace) as url, Terminal(command("hy-chat", "--url", url), env=env) as terminal:
        terminal.expect("context 0")
        for word in WORDS[:n]:
            pace.words = [word]
            pace.sent.clear()
            begun = len(terminal.screen)
            terminal.type("Hello\r")
            terminal.expect(word.strip(), after=begun)
            delays.append(time.monotonic() - pace.sent[0])
            time.sleep(0.5)
        terminal.type("\x04")
        assert terminal.wait() == 0
    return delays


def typing_delays(env: dict[str, str], keys: str, seconds: float = 0.01) -> list[float]:
    """Type while a word comes every `seconds`; give the seconds from each key until it shows.

    What was typed must be asked when the answer is complete.
    """
    delays = []
    with paced_server(Pace(WORDS, seconds)) as url, Terminal(command("hy-chat", "--url", url), env=env) as terminal:
        terminal.expect("context 0")
        terminal.type("Hello\r")
        at = terminal.expect("word010")
        for key in keys:
            typed = time.monotonic()
            terminal.type(key)
            at = terminal.expect(key, after=at)
            delays.append(time.monotonic() - typed)
        assert "word299" not in terminal.screen
        terminal.type("\r")
        terminal.expect("1 waiting")
        terminal.expect("word299")
        terminal.expect("word299", after=terminal.expect("word000", after=len(terminal.screen)))
        terminal.type("\x04")
        assert terminal.wait() == 0
    return delays
