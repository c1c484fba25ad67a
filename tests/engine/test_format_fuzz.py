"""The format's reader on random tag soup: it never falls over, leaks no tag, loses nothing and takes nothing back."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import pytest
from format_reader import kinds, parse, stream

pytestmark = pytest.mark.engine

N_SOUPS, N_SOUPS_LONG = 3000, 100_000
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_calls>", "</tool_calls>")
TAG = re.compile("|".join(TAGS))
SPACES = ("\n", " ", "\n\n", "\r\n", "\t", "\n  ")
WORDS = (
    "Hm",
    "好",
    "no.",
    "😀",
    "a<b",
    "<",
    "</",
    "<t",
    "<think",
    "/answer>",
    "think>",
    "<answer",
    "<tool_call>",
    "助手：",
    "助",
)
CALL = '[{"name": "f", "arguments": {"x": 1}}]'
JSON = (CALL, '[{"name": "f"', ', "arguments": {"x": "<y>', '\\"\\n', "}", "]", "[", "{",
        '{"name": "g", "arguments": {}}', ",", "[]", '"', '{"a": ', "null")  # fmt: skip
CODE = ("`", "```", "\n```\n", "``")


def soup(rng: random.Random, *ingredients: Sequence[str]) -> str:
    """A few to some dozen pieces, a third of them tags."""
    other = [piece for group in ingredients for piece in group]
    return "".join(rng.choice(TAGS) if rng.random() < 0.35 else rng.choice(other) for _ in range(rng.randrange(1, 40)))


def letters(text: str) -> Counter[str]:
    return Counter(text.translate({ord(space): None for space in " \t\r\n"}))


def check_pieces(text: str, rng: random.Random, mode: str, begun: str) -> None:
    """However `text` is cut, a client puts the same message together."""
    data = text.encode()
    whole = parse(data, mode=mode, begun=begun)
    ends = sorted(rng.sample(range(len(data)), rng.randrange(len(data))))
    for cut in (ends, range(1, len(data))):
        assert stream(data, cut, mode=mode, begun=begun) == whole, (text, mode, begun)


def check_without_calls(text: str, mode: str, begun: str) -> None:
    """Without code and calls every tag is dropped and every other character comes once."""
    message = parse(text.encode(), mode=mode, begun=begun)
    assert not message.calls
    for part in (message.reasoning, message.content):
        assert not TAG.search(part), (text, mode, begun)
    expected = TAG.sub("", text)
    if mode == "plain":
        assert letters(message.reasoning + message.content) == letters(expected), (text, begun)


def check_with_calls(text: str, begun: str) -> None:
    """Outside the JSON of calls, the same."""
    data = text.encode()
    message, marks = parse(data, mode="tools", begun=begun), kinds(data, mode="tools", begun=begun)
    outside = bytes(byte if kind != "tool" else 0 for byte, kind in zip(data, marks, strict=True)).decode()
    for part in (message.reasoning, message.content):
        assert not TAG.search(part), (text, begun)
    expected = letters(TAG.sub("", outside).replace("\0", ""))
    got = letters(message.reasoning + message.content)
    # "助手：" is a tag in front of an answer; nothing else may be missing
    assert not got - expected, (text, begun)
    assert set(expected - got) <= set("助手："), (text, begun)


def run(n_soups: int, seed: int) -> None:
    rng = random.Random(seed)
    for i in range(n_soups):
        begun = ("", "", "<think>\n", "<think>\n\n</think>\n")[i % 4]
        text = soup(rng, SPACES, WORDS)
        for mode in ("plain", "no_calls"):
            check_without_calls(text, mode, begun)
        check_pieces(text, rng, ("plain", "tools", "no_calls")[i % 3], begun)
        text = soup(rng, SPACES, WORDS, JSON)
        check_with_calls(text, begun)
        check_pieces(text, rng, "tools", begun)
        check_pieces(soup(rng, SPACES, WORDS, CODE, JSON), rng, "tools", begun)


def test_soup() -> None:
    run(N_SOUPS, seed=1)


@pytest.mark.long
def test_much_soup() -> None:
    run(N_SOUPS_LONG, seed=2)


def test_random_bytes_do_no_harm() -> None:
    rng = random.Random(3)
    for _ in range(N_SOUPS):
        data = b"".join(rng.choice((rng.randbytes(3), rng.choice(TAGS).encode(), b'[{"name":"')) for _ in range(20))
        whole = parse(data, mode="tools")
        assert stream(data, range(1, len(data)), mode="tools") == whole, data
