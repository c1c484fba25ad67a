"""How soon a token shows, and whether typing stays alive: hy-chat on a pseudo-terminal, a stand-in that keeps time.

`bench/chat.py` prints the numbers.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from paced_server import first_token_delays, typing_delays

# Generous: 50 ms is the aim, and a test machine may stand still.
LIMIT_SECONDS = 1.0


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path)}


def test_the_first_token_shows_as_it_comes(env: dict[str, str]) -> None:
    delays = first_token_delays(env, 3)
    assert statistics.median(delays) < LIMIT_SECONDS, delays


def test_typing_stays_alive_at_a_hundred_tokens_a_second(env: dict[str, str]) -> None:
    """Every key shows while words go on coming, and what was typed is asked when the answer is complete."""
    delays = typing_delays(env, "zyxvu")
    assert statistics.median(delays) < LIMIT_SECONDS, delays
