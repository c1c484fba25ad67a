"""What a server is doing, from its own /slots and /metrics: the line at the foot of `hy-serve`'s terminal."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from hymoe.runtime.endpoint import Endpoint

SECONDS = 1.0
# Less than a busy engine may take to answer: then the line stays as it is.
ANSWER_SECONDS = 0.5
PATIENT_SECONDS = 5.0
_READ = re.compile(r"^llamacpp:prompt_tokens_total (\S+)$", re.MULTILINE)
_WRITTEN = re.compile(r"^llamacpp:tokens_predicted_total (\S+)$", re.MULTILINE)


class Monitor:
    """Asks a server once a second at most."""

    def __init__(self, endpoint: Endpoint, n_ctx: int) -> None:
        self._endpoint = endpoint
        self._n_ctx = n_ctx
        self._asked = -math.inf
        self._counted: tuple[float, dict[str, float]] | None = None

    def line(self) -> str | None:
        """Give a new line, None where it is too early for one or the server does not answer."""
        if time.monotonic() - self._asked < SECONDS:
            return None
        self._asked = time.monotonic()
        slots, text = self._get("/slots", ANSWER_SECONDS), self._get("/metrics", ANSWER_SECONDS)
        if not isinstance(slots, list) or not isinstance(text, str):
            return None
        return describe(slots, self._rates(totals(slots, text)), self._n_ctx)

    def running(self) -> int:
        """Count the slots that answer; 0 where the server does not say."""
        slots = self._get("/slots", PATIENT_SECONDS)
        return sum(bool(slot.get("is_processing")) for slot in slots) if isinstance(slots, list) else 0

    def _rates(self, counters: dict[str, float]) -> dict[str, float]:
        """Give tokens per second since the call before."""
        now, before = time.monotonic(), self._counted
        self._counted = (now, counters)
        if before is None or now <= before[0]:
            return dict.fromkeys(counters, 0.0)
        return {name: max(value - before[1][name], 0.0) / (now - before[0]) for name, value in counters.items()}

    def _get(self, path: str, seconds: float) -> Any:
        import httpx

        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"} if self._endpoint.api_key else {}
        try:
            answer = httpx.get(self._endpoint.url + path, headers=headers, trust_env=False, timeout=seconds)
            if answer.status_code != httpx.codes.OK:
                return None
            return answer.json() if path == "/slots" else answer.text
        except (httpx.HTTPError, ValueError):
            return None


def totals(slots: list[dict[str, Any]], metrics: str) -> dict[str, float]:
    """Give the tokens `read` and `written` so far, from the answers of /slots and /metrics.

    The counters of /metrics know a prompt when it has an answer's first token, and an answer when it has ended; what is
    under way comes from the slots.
    """
    read, written = _value(_READ, metrics), _value(_WRITTEN, metrics)
    for slot in slots:
        if slot.get("is_processing"):
            answered = sum(part.get("n_decoded") or 0 for part in slot.get("next_token") or [])
            read += 0 if answered else slot.get("n_prompt_tokens_processed") or 0
            written += answered
    return {"read": read, "written": written}


def describe(slots: list[dict[str, Any]], rates: dict[str, float], n_ctx: int) -> str:
    """Say it in one line. slots: as /slots gives them; rates: tokens per second, `read` and `written`."""
    busy = sum(bool(slot.get("is_processing")) for slot in slots)
    used = sum(slot.get("n_prompt_tokens") or 0 for slot in slots)
    return (
        f"slots {busy}/{len(slots)} · reading {rates['read']:.0f}, writing {rates['written']:.1f} tokens/s · "
        f"context {used:,} of {n_ctx:,}"
    )


def _value(pattern: re.Pattern[str], text: str) -> float:
    found = pattern.search(text)
    return float(found[1]) if found else 0.0
