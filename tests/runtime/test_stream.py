"""Streamed answers cut into chunks of every size give the same pieces."""

from __future__ import annotations

import json

import pytest

from hymoe.errors import ServerError
from hymoe.runtime.stream import ChatStream, ContextFullError, EventDecoder, Piece, Progress, refusal


def chunk(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}, ensure_ascii=False)


def end(reason: str) -> str:
    final = {"choices": [{"delta": {}, "finish_reason": reason}], "timings": {"predicted_n": 3}}
    return "data: " + json.dumps(final)


ANSWER = [
    chunk(role="assistant", content=""),
    chunk(reasoning_content="想 "),
    ": a comment that keeps the connection alive",
    chunk(reasoning_content="🧠"),
    chunk(content="你"),
    chunk(content="好\n\n"),
    chunk(content="data: [DONE]"),
    end("stop"),
    'data: {"choices": [], "usage": {"total_tokens": 9}}',
    "data: [DONE]",
]
PIECES = [
    Piece("thought", "想 "),
    Piece("thought", "🧠"),
    Piece("text", "你"),
    Piece("text", "好\n\n"),
    Piece("text", "data: [DONE]"),
]


def pieces(stream: ChatStream, raw: bytes, size: int) -> list[Piece | Progress]:
    return [piece for at in range(0, len(raw), size) for piece in stream.feed(raw[at : at + size])]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 64, 10**6])
def test_chunk_sizes_do_not_matter(size: int, newline: str) -> None:
    raw = "".join(line + 2 * newline for line in ANSWER).encode() + b"\n"
    stream = ChatStream()
    assert pieces(stream, raw, size) == PIECES
    assert (stream.finished, stream.reason, stream.timings) == (True, "stop", {"predicted_n": 3})


def test_events_of_several_lines_and_other_fields() -> None:
    raw = b"event: x\ndata: a\ndata:b\nid: 1\n\n\n\nretry: 5\n\ndata:  c\n\ndata: unfinished"
    assert list(EventDecoder().feed(raw)) == ["a\nb", " c"]


def test_a_line_end_cut_in_two_is_one_line_end() -> None:
    decoder = EventDecoder()
    assert [data for byte in b"data: a\r\ndata: b\r\n\r\n" for data in decoder.feed(bytes([byte]))] == ["a\nb"]


def test_bytes_that_are_no_utf8_do_not_stop_the_stream() -> None:
    stream = ChatStream()
    raw = b'data: {"choices": [{"delta": {"content": "a\xffb"}}]}\n\n'
    assert pieces(stream, raw, 1) == [Piece("text", "a\ufffdb")]
    assert not stream.finished


def test_half_a_surrogate_pair_can_be_shown() -> None:
    raw = b'data: {"choices": [{"delta": {"content": "a\\ud83d b"}}]}\n\n'
    assert pieces(ChatStream(), raw, 1) == [Piece("text", "a? b")]


def test_an_error_in_the_stream() -> None:
    stream = ChatStream()
    raw = b'data: {"error": {"message": "the GPU is gone", "code": 500}}\n\n'
    with pytest.raises(ServerError, match=r"^the server refused: the GPU is gone$"):
        pieces(stream, raw, 4)


NO_CHUNKS = {
    "no JSON": "<html>",
    "nested without end": "[" * 10**6,
    **{
        value: value
        for value in (
            *("[1]", "null", "5", '"x"'),
            *('{"choices": 5}', '{"choices": {}}', '{"choices": [null]}', '{"choices": ["x"]}'),
            *('{"choices": [{"delta": "x"}]}', '{"choices": [{"delta": [1]}]}'),
            *('{"choices": [{"delta": {"content": 5}}]}', '{"choices": [{"delta": {"reasoning_content": ["x"]}}]}'),
            *('{"choices": [{"finish_reason": 1}]}', '{"timings": [1, 2]}'),
        )
    },
}


@pytest.mark.parametrize("name", NO_CHUNKS)
def test_no_chat_stream(name: str) -> None:
    data = NO_CHUNKS[name]
    with pytest.raises(ServerError) as caught:
        pieces(ChatStream(), f"data: {data}\n\n".encode(), 10**7)
    assert str(caught.value) == (
        f"the server's answer is no chat stream: got {data[:60]!r}, expected a chat completion chunk; "
        "is this a llama-server?"
    )


def test_a_chunk_may_say_little() -> None:
    stream = ChatStream()
    for data in (
        "{}",
        '{"choices": null, "error": null}',
        '{"choices": [{"delta": null}, {"delta": {"content": null}}]}',
    ):
        assert pieces(stream, f"data: {data}\n\n".encode(), 100) == []
    timings = '{"timings": {"a": "x", "b": null, "c": NaN, "d": 1e999, "e": 0.5, "predicted_n": 3}}'
    assert pieces(stream, f"data: {timings}\n\n".encode(), 1) == []
    assert stream.timings == {"e": 0.5, "predicted_n": 3}


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"error": {"message": "no"}}, "the server refused: no"),
        ({"error": "plain"}, "the server refused: plain"),
        ({"detail": "x"}, "the server refused: {'detail': 'x'}"),
        (["odd"], "the server refused: ['odd']"),
        (
            {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 600, "n_ctx": 512, "message": "…"}},
            "context full: the conversation has 600 tokens, the server holds 512; "
            "/reset starts over, a larger --ctx holds more",
        ),
    ],
)
def test_error_bodies(body: object, line: str) -> None:
    assert str(refusal(body)) == line


def test_a_full_context_is_told_in_numbers() -> None:
    error = refusal({"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 600, "n_ctx": 512}})
    assert isinstance(error, ContextFullError)
    assert (error.n_tokens, error.n_ctx) == (600, 512)


def entry(text: str, logprob: float, *others: tuple[str, float]) -> dict[str, object]:
    alternatives = [{"token": other, "logprob": p} for other, p in others]
    return {"token": text, "logprob": logprob, "top_logprobs": alternatives}


def test_probabilities_progress_and_usage() -> None:
    stream = ChatStream()
    ours = {"reasoning_content": [entry("Hm", -0.5)], "content": [entry("Yes", -0.1, ("Yes", -0.1), ("No", -2.5))]}
    events: list[object] = [
        {"choices": [], "prompt_progress": {"total": 30, "cache": 10, "processed": 20}},
        {"choices": [{"delta": {"content": "Yes"}, "logprobs": ours}]},
        {"choices": [{"delta": {"reasoning_content": "so"}, "logprobs": {"content": [entry("so", -0.2)]}}]},
        {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 3, "prompt_tokens_details": {"x": 1}}},
    ]
    raw = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    assert [*stream.feed(raw)] == [Progress(30, 10, 20), Piece("text", "Yes"), Piece("thought", "so")]
    told = [(token.text, token.is_thought) for token in stream.tokens]
    assert told == [("Hm", True), ("Yes", False), ("so", True)]
    assert stream.tokens[1].alternatives == (("Yes", -0.1), ("No", -2.5))
    assert stream.usage == {"prompt_tokens": 30, "completion_tokens": 3}
