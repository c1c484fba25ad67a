"""Text as the model will meet it: conversations, rendered in its own chat template.

What a model of this family is used for begins with a start token, ends its turns with tokens of its own and thinks
between tags; importance collected on bare prose misses all of these. So even plain text is given turns: a passage's
first part is what a user says, the rest is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hymoe.chat_templates import render
from hymoe.chat_templates.repairs import repair
from hymoe.errors import UnsupportedError
from hymoe.imatrix import calibration

# A passage fills about a chunk of 512 tokens; a user says about this much of it.
PASSAGE_CHARACTERS: Final = 1500
QUESTION_SHARE: Final = 0.25
MAX_TEXT_BYTES: Final = 1 << 30

Message = Mapping[str, Any]
_PARAGRAPH = re.compile(r"\n\s*\n")
_END = re.compile(r"[\n。！？!?]|\. ")
_SPEAKERS: Final = {"User:": "user", "用户：": "user", "Assistant:": "assistant", "助手：": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, and the tools that are offered."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = field(default=())


@dataclass(frozen=True)
class Source:
    """Conversations of one file."""

    name: str
    conversations: tuple[Conversation, ...]


def calibration_set() -> list[Source]:
    """Give our own texts and conversations, in the order of the manifest."""
    plain = [
        Source(text.file, tuple(dialogues(text.content) if text.kind == "dialogue" else passages(text.content)))
        for text in calibration.texts()
    ]
    return plain + [Source(text.file, tuple(_lines(text.file, text.content))) for text in calibration.conversations()]


def read(path: Path) -> Source:
    """Read a user's file: `.jsonl` has a conversation a line, anything else is plain text.

    Raises UnsupportedError for what cannot be read, is no UTF-8 or empty, and names a line that is no conversation.
    """
    text = read_text(path)
    return Source(path.name, tuple(_lines(str(path), text) if path.suffix == ".jsonl" else passages(text)))


def read_text(path: Path) -> str:
    """Read a text file. Raises UnsupportedError as `read` does."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as exc:
        raise UnsupportedError(f"{path}: {exc.strerror}", fix="name a text file") from exc
    except UnicodeDecodeError as exc:
        raise UnsupportedError(f"{path}: text", got="no UTF-8", expected="text, or a .jsonl of messages") from exc
    if len(raw) > MAX_TEXT_BYTES:
        raise UnsupportedError(f"{path}: text", got=f"over {MAX_TEXT_BYTES} bytes", expected="less; 1 MB is plenty")
    if not text.strip():
        raise UnsupportedError(f"{path}: text", got="an empty file", expected="some thousand words")
    return text


def rendered(sources: Sequence[Source], template: str) -> str:
    """Give all conversations in the template, one after the other, files taking turns in proportion to their length.

    So any beginning of the text has something of every file. Raises UnsupportedError for a template that fails.
    """
    from jinja2 import TemplateError

    placed = [
        ((i + 0.5) / len(source.conversations), order, conversation)
        for order, source in enumerate(sources)
        for i, conversation in enumerate(source.conversations)
    ]
    text = repair(template).text
    try:
        return "".join(
            render(text, each.messages, tools=each.tools or None, keep_thoughts=True)
            for _, _, each in sorted(placed, key=lambda entry: entry[:2])
        )
    except (TemplateError, TypeError, ValueError) as exc:
        raise UnsupportedError(
            "the model's chat template fails", got=f"{exc}"[:200], fix="pass --no-template, or convert the model again"
        ) from exc


def passages(text: str) -> Iterator[Conversation]:
    """Cut plain text into passages of whole paragraphs; the first part of each is the user's."""
    passage = ""
    for paragraph in _PARAGRAPH.split(text.strip("\n")):
        for piece in _pieces(paragraph):
            if passage and len(passage) + len(piece) > PASSAGE_CHARACTERS:
                yield _as_turns(passage)
                passage = ""
            passage = f"{passage}\n\n{piece}" if passage else piece
    if passage:
        yield _as_turns(passage)


def dialogues(text: str) -> Iterator[Conversation]:
    """Read dialogues: an empty line between two, each turn behind its speaker."""
    for block in _PARAGRAPH.split(text.strip()):
        messages: list[dict[str, str]] = []
        for line in block.splitlines():
            speaker = next((each for each in _SPEAKERS if line.startswith(each)), None)
            if speaker:
                messages.append({"role": _SPEAKERS[speaker], "content": line.removeprefix(speaker).strip()})
            elif messages:
                messages[-1]["content"] += "\n" + line
        if messages:
            yield Conversation(messages)


def _pieces(paragraph: str) -> Iterator[str]:
    """Cut what is longer than a passage: at the last end of a line or sentence, else anywhere."""
    while len(paragraph) > PASSAGE_CHARACTERS:
        ends = [found.end() for found in _END.finditer(paragraph, PASSAGE_CHARACTERS // 2, PASSAGE_CHARACTERS)]
        at = ends[-1] if ends else PASSAGE_CHARACTERS
        yield paragraph[:at]
        paragraph = paragraph[at:]
    yield paragraph


def _as_turns(passage: str) -> Conversation:
    found = _END.search(passage, int(len(passage) * QUESTION_SHARE))
    at = found.end() if found else int(len(passage) * QUESTION_SHARE)
    turns = {"user": passage[:at].strip(), "assistant": passage[at:].strip()}
    return Conversation([{"role": role, "content": content} for role, content in turns.items() if content])


def _lines(name: str, text: str) -> Iterator[Conversation]:
    # Not splitlines(): U+2028 and the like may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _conversation(f"{name}, line {number}", line)


def _conversation(where: str, line: str) -> Conversation:
    expected = 'a JSON list of messages, or {"messages": […], "tools": […]}'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise UnsupportedError(where, got=f"no JSON ({exc})"[:200], expected=expected) from exc
    whole = {"messages": found} if isinstance(found, list) else found
    messages, tools = (whole.get("messages"), whole.get("tools") or ()) if isinstance(whole, dict) else (None, ())
    if not isinstance(messages, list) or not messages or not isinstance(tools, list | tuple):
        raise UnsupportedError(where, got="no conversation", expected=expected)
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise UnsupportedError(where, got="a message without a role", expected=expected)
    return Conversation(messages, tools)
