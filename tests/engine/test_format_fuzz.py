"""The format's reader on random tag soup: it never falls over, leaks no tag, loses nothing and takes nothing back."""

from __future__ import annotations

import random
import re
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


def same(said: str, span: str) -> bool:
    """Whether `said` is `span`, with newlines more only where a tag would go on without them."""
    place = 0
    for i, letter in enumerate(said):
        if span[place : place + 1] == letter:
            place += 1
        elif letter != "\n" or not goes_on(said[:i], said[i + 1 : i + 2]):
            return False
    return place == len(span)


def goes_on(before: str, letter: str) -> bool:
    """Whether `before` ends in the beginning of a tag that has `letter` next."""
    return any(tag[n] == letter and before.endswith(tag[:n]) for tag in TAGS for n in range(1, len(tag)))


def check_spans(text: str, mode: str, begun: str) -> None:
    """Nothing is lost, added or moved: thought and answer are the bytes of their spans, and tags are no more than tags.

    But for a newline of the reader's own that keeps two halves of a tag apart where another was dropped between them.
    """
    data = text.encode()
    message, marks = parse(data, mode=mode, begun=begun), kinds(data, mode=mode, begun=begun)
    spans = {kind: bytes(byte for byte, mark in zip(data, marks, strict=True) if mark == kind) for kind in set(marks)}
    assert set(spans) <= {"thought", "answer", "tool", "tag"}, (text, mode, begun)
    for kind, said in (("thought", message.reasoning), ("answer", message.content)):
        assert same(said, spans.get(kind, b"").decode()), (text, mode, begun, kind)
    apart = bytes(byte if mark == "tag" else 0 for byte, mark in zip(data, marks, strict=True)).decode()
    rest = TAG.sub("", apart).replace("\0", "")
    assert not rest.replace("助手：", "").strip(" \t\r\n"), (text, mode, begun, rest)


def check_pieces(text: str, rng: random.Random, mode: str, begun: str) -> None:
    """However `text` is cut, a client puts the same message together."""
    data = text.encode()
    whole = parse(data, mode=mode, begun=begun)
    ends = sorted(rng.sample(range(len(data)), rng.randrange(len(data))))
    for cut in (ends, range(1, len(data))):
        assert stream(data, cut, mode=mode, begun=begun) == whole, (text, mode, begun)


def check_no_tags(text: str, mode: str, begun: str) -> None:
    """Outside code no tag is in what a client gets, and without tools there are no calls."""
    message = parse(text.encode(), mode=mode, begun=begun)
    assert mode == "tools" or not message.calls
    for part in (message.reasoning, message.content):
        assert not TAG.search(part), (text, mode, begun)


def run(n_soups: int, seed: int) -> None:
    rng = random.Random(seed)
    for i in range(n_soups):
        begun = ("", "", "<think>\n", "<think>\n\n</think>\n")[i % 4]
        text = soup(rng, SPACES, WORDS)
        for mode in ("plain", "no_calls"):
            check_no_tags(text, mode, begun)
            check_spans(text, mode, begun)
        check_pieces(text, rng, ("plain", "tools", "no_calls")[i % 3], begun)
        text = soup(rng, SPACES, WORDS, JSON)
        check_no_tags(text, "tools", begun)
        check_spans(text, "tools", begun)
        check_pieces(text, rng, "tools", begun)
        text = soup(rng, SPACES, WORDS, CODE, JSON)
        check_spans(text, ("plain", "tools", "no_calls")[i % 3], begun)
        check_pieces(text, rng, "tools", begun)


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
