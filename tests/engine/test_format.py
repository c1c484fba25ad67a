"""The format's reader: every recorded shape, however it is cut."""

from __future__ import annotations

import random

import pytest
from format_reader import Message, kinds, parse, stream
from format_shapes import SHAPES, Shape

pytestmark = pytest.mark.engine
N_RANDOM = 30


def cuts(n_text: int, name: str) -> list[list[int]]:
    """Ends of pieces of 1 to 12 bytes, and of random ones."""
    rng = random.Random(name)
    even = [list(range(size, n_text, size)) for size in range(1, 13)]
    return even + [sorted(rng.sample(range(1, n_text), rng.randrange(n_text))) for _ in range(N_RANDOM) if n_text > 1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_read_whole(shape: Shape) -> None:
    message = parse(shape.text.encode(), mode=shape.mode, begun=shape.begun)
    assert message == Message(shape.reasoning, shape.content, shape.calls)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reasoning_format", ["deepseek", "none", "deepseek-legacy"])
def test_a_shape_in_pieces_comes_to_the_same_and_takes_nothing_back(shape: Shape, reasoning_format: str) -> None:
    text = shape.text.encode()
    whole = parse(text, mode=shape.mode, begun=shape.begun, reasoning_format=reasoning_format)
    for ends in cuts(len(text), shape.name):
        pieces = stream(text, ends, mode=shape.mode, begun=shape.begun, reasoning_format=reasoning_format)
        assert pieces == whole, ends


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spans_cover_a_shape_and_stay_what_they_are(shape: Shape) -> None:
    text = shape.text.encode()
    final = kinds(text, mode=shape.mode, begun=shape.begun)
    assert "held" not in final
    for end in range(len(text)):
        partial = kinds(text[:end], partial=True, mode=shape.mode, begun=shape.begun)
        held = partial.index("held") if "held" in partial else end
        assert partial[:held] == final[:held]
        assert set(partial[held:]) <= {"held"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thought_and_answer_are_the_bytes_of_their_spans(shape: Shape) -> None:
    text = shape.text.encode()
    marked = list(zip(text, kinds(text, mode=shape.mode, begun=shape.begun), strict=True))
    for part, kind in ((shape.reasoning, "thought"), (shape.content, "answer")):
        # a newline of the reader's own keeps two halves of a tag apart
        assert bytes(byte for byte, is_kind in marked if is_kind == kind) in (
            part.encode(),
            part.replace("\n", "").encode(),
        )


@pytest.mark.parametrize(
    ("reasoning_format", "reasoning", "content"),
    [
        ("deepseek", "Hm.", "Yes."),
        ("auto", "Hm.", "Yes."),
        ("none", "", "<think>\nHm.\n</think>\nYes."),
        ("deepseek-legacy", "Hm.", "<think>\nHm.\n</think>\nYes."),
    ],
)
def test_where_a_thought_goes(reasoning_format: str, reasoning: str, content: str) -> None:
    text = b"<think>\nHm.\n</answer>\n<answer>\nYes.\n</answer>"
    assert parse(text, reasoning_format=reasoning_format) == Message(reasoning, content, ())


def test_bytes_that_are_no_text_are_handed_on() -> None:
    text = b"<answer>\n\xff\xe4\xbd</answer>"
    assert parse(text).content.encode("utf-8", "surrogateescape") == b"\xff\xe4\xbd"
    assert parse(b"<answer>a\xe4\xbd", partial=True).content == "a"
