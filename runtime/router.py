"""`--router`: how many of its experts a token gets, as both commands and Python callers say it; and what came of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from hymoe.errors import ServerError

if TYPE_CHECKING:
    from hymoe.runtime.endpoint import Endpoint
    from hymoe.runtime.header import Header

Mode = Literal["topk", "capacity", "adaptive"]

HELP: Final = "How many experts a token gets: topk, capacity (the published gating) or adaptive[:MIN,T]."
SHOWN_DEFAULT: Final = "what the file says, or topk"
# Tokens. A prompt of mode "capacity" is computed at once, and the engine's buffers for that grow with it.
MAX_WHOLE_PROMPT: Final = 8192

_EXPECTED: Final = "topk, capacity, adaptive or adaptive:MIN,T (such as adaptive:4,0.1)"
_METRIC: Final = re.compile(r"^llamacpp:experts_used_per_token (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Router:
    """A router mode. `minimum` experts are kept, and further ones with p >= threshold * p_max; None: the file's.

    Raises ServerError for one number without the other, and for numbers with another mode than adaptive.
    """

    mode: Mode
    minimum: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = [number is not None for number in (self.minimum, self.threshold)]
        if any(given) and (self.mode != "adaptive" or not all(given)):
            raise ServerError(
                "router",
                got=f"mode {self.mode}, minimum {self.minimum}, threshold {self.threshold}",
                expected="minimum and threshold together, with the mode adaptive, or neither",
                fix="such as Router('adaptive', 4, 0.1)",
            )

    def __str__(self) -> str:
        """Give what `parse` reads."""
        return f"{self.mode}:{self.minimum},{self.threshold:g}" if self.threshold is not None else self.mode


def parse(text: str) -> Router:
    """Read topk, capacity, adaptive or adaptive:MIN,T. Raises ServerError for anything else.

    How many experts the model has is not known here: a MIN above that is refused by the engine when it loads the file.
    """
    mode, colon, numbers = text.partition(":")
    for known in get_args(Mode):
        if mode == known and not colon:
            return Router(known)
    match = re.fullmatch(r"(\d{1,4}),(\d*\.?\d+)", numbers) if mode == "adaptive" else None
    if match is None or int(match[1]) < 1 or not 0 <= float(match[2]) <= 1:
        raise ServerError("--router", got=text, expected=_EXPECTED, fix="MIN is 1 or more, T is 0 to 1")
    return Router("adaptive", int(match[1]), float(match[2]))


def engine_arguments(router: Router | None, header: Header, n_ctx: int) -> list[str]:
    """Give llama-server's arguments for a mode, or for the one that the file asks for where `router` is None."""
    prefix = f"{header.architecture}.router"
    overrides: dict[str, str] = {}
    if router is not None:
        overrides["mode"] = f"str:{router.mode}"
    if router is not None and router.minimum is not None:
        overrides["min_experts"] = f"int:{router.minimum}"
    if router is not None and router.threshold is not None:
        overrides["threshold"] = f"float:{router.threshold!r}"
    arguments = [word for key, value in overrides.items() for word in ("--override-kv", f"{prefix}.{key}={value}")]
    mode = router.mode if router is not None else header.scalars.get(f"{prefix}.mode")
    # with one expert per token there is nothing to drop: the engine runs topk, which needs no whole prompts
    drops = header.scalars.get(f"{header.architecture}.expert_used_count") != 1
    return arguments + (_whole_prompts(n_ctx) if mode == "capacity" and drops else [])


def mean_experts(endpoint: Endpoint) -> float | None:
    """Ask a server how many experts a token got in the mean of all tokens and layers; None where it does not say."""
    import httpx

    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    try:
        answer = httpx.get(f"{endpoint.url}/metrics", headers=headers, trust_env=False, timeout=5.0)
    except httpx.HTTPError:
        return None
    found = _METRIC.search(answer.text)
    value = float(found[1]) if found else 0.0
    return value if value > 0 and math.isfinite(value) else None


def _whole_prompts(n_ctx: int) -> list[str]:
    size = str(min(n_ctx, MAX_WHOLE_PROMPT))
    # nothing computed before can be reused, since who gets an expert depends on the whole prompt: keep no copies
    return ["--batch-size", size, "--ubatch-size", size, "--no-cache-prompt", "--cache-ram", "0"]
