"""A conversation as a file that a person can read: Markdown with comments that say what each part is.

    <!-- hy-chat conversation, version 1 -->
    <!-- settings {"model": {…}, "think": "on", "left_out": 0} -->

    <!-- system -->
    Be brief.

    <!-- user -->
    Hello

    <!-- file notes.txt -->
    <!-- thought {"seconds": 2.5, "tokens": 40} -->
    <!-- assistant {"reason": "stop"} -->

A part's text stands between its comment and the blank line before the next, byte for byte; a line of it that looks like
such a comment is written with a backslash before it, which reading takes away.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymoe.errors import HyError, OutputError
from hymoe.runtime.conversation import Attachment, Conversation, Exchange

VERSION = 1
MAX_BYTES = 1 << 28  # far more than any conversation; a model's file, given by mistake, has gigabytes
_HEAD = re.compile(r"<!-- hy-chat conversation, version (\d+) -->")
_PART = re.compile(r"<!-- (system|user|file|thought|assistant|settings)(?: (.*))? -->")
_LOOKS_LIKE_ONE = re.compile(r"\\*<!-- ")


@dataclass
class Transcript:
    """A conversation and what was set while it was held."""

    conversation: Conversation
    settings: dict[str, Any]


def write(path: Path, transcript: Transcript) -> None:
    """Write the file, private to its owner; it may replace a conversation, but nothing else. Raises OutputError."""
    part = None
    try:
        if path.exists() and not _is_one(path):
            raise OutputError(f"{path}: is there, and no conversation", fix="choose another name")
        # A name of our own: who can foresee it could lay a link there.
        number, name = tempfile.mkstemp(".part", f"{path.name}.", path.parent)
        part = Path(name)
        with os.fdopen(number, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(dumps(transcript))
        part.replace(path)
    except OSError as exc:
        raise OutputError(f"{path}: cannot write", got=exc.strerror or exc) from exc
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def read(path: Path) -> Transcript:
    """Read a file that `write` wrote, by hand edited or not. Raises HyError."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise HyError(str(path), got="a device or a pipe", expected="a conversation that /save wrote")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise HyError(str(path), got=f"{size} bytes", expected="a conversation that /save wrote")
        return loads(path.read_bytes().decode("utf-8"), str(path))
    except OSError as exc:
        raise HyError(f"{path}: cannot read", got=exc.strerror or exc) from exc
    except UnicodeDecodeError as exc:
        raise HyError(str(path), got="bytes that are no UTF-8", expected="a conversation that /save wrote") from exc


def dumps(transcript: Transcript) -> str:
    """Give the file's text."""
    talk = transcript.conversation
    settings = transcript.settings | {"left_out": talk.n_left_out}
    parts = [f"<!-- hy-chat conversation, version {VERSION} -->\n{_comment('settings', settings)}\n"]
    if talk.system is not None:
        parts.append(_part("system", None, talk.system))
    for exchange in talk.exchanges:
        answer = exchange.answer
        parts.append(_part("user", None, exchange.question))
        parts += [_part("file", file.name, file.text) for file in exchange.files]
        if answer.thought:
            cost = {"seconds": round(answer.thought_seconds, 1), "tokens": answer.thought_tokens}
            parts.append(_part("thought", cost, answer.thought))
        parts.append(_part("assistant", {"reason": answer.reason}, answer.text))
    return "\n".join(parts)


def loads(text: str, name: str) -> Transcript:
    """Read the file's text; `name` is the file in errors. Raises HyError where it is no such file."""
    head, _, body = text.partition("\n")
    found = _HEAD.fullmatch(head.strip())
    if not found:
        raise HyError(name, got="no conversation", expected=f"a file that /save wrote (version {VERSION})")
    if found[1] != str(VERSION):
        raise HyError(
            name, got=f"version {found[1][:20]}", expected=f"version {VERSION}", fix="a newer hy-chat wrote it"
        )
    result = Transcript(Conversation(), {})
    for kind, extra, content in _parts(body):
        try:
            _add(result, kind, extra, content)
        except IndexError as exc:
            raise HyError(f"{name}: part {kind!r}", got="no user before it") from exc
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
            raise HyError(f"{name}: part {kind!r}", got=str(exc)) from exc
    left_out = result.settings.pop("left_out", 0)
    if isinstance(left_out, int):
        result.conversation.n_left_out = max(0, min(left_out, len(result.conversation.exchanges)))
    return result


def _is_one(path: Path) -> bool:
    """Whether the file is empty, or begins as a conversation does. Raises OSError."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.readline(200).decode("utf-8", "replace")
    return not head or bool(_HEAD.fullmatch(head.strip()))


def _add(result: Transcript, kind: str, extra: str, content: str) -> None:
    talk = result.conversation
    if kind == "settings":
        result.settings = dict(json.loads(extra))
    elif kind == "system":
        talk.system = content
    elif kind == "user":
        talk.exchanges.append(Exchange(content))
    elif kind == "file":
        file_name = json.loads(extra)
        # Half of a surrogate pair, which JSON can hold, no request can.
        file_name.encode("utf-8")
        talk.exchanges[-1].files += (Attachment(file_name, content),)
    elif kind == "thought":
        cost = json.loads(extra or "{}")
        answer = talk.exchanges[-1].answer
        answer.thought = content
        answer.thought_seconds, answer.thought_tokens = float(cost.get("seconds", 0)), int(cost.get("tokens", 0))
    else:
        answer = talk.exchanges[-1].answer
        answer.text, answer.reason = content, str(json.loads(extra or "{}").get("reason", ""))


def _parts(body: str) -> Iterator[tuple[str, str, str]]:
    """Give (kind, what stands beside it, text) of every part."""
    kind = extra = ""
    lines: list[str] = []
    for line in body.split("\n"):
        found = _PART.fullmatch(line)
        if not found:
            lines.append(line[1:] if line.startswith("\\") and _LOOKS_LIKE_ONE.match(line) else line)
            continue
        if kind:
            yield kind, extra, _content(lines)
        kind, extra, lines = found[1], found[2] or "", []
    if kind:
        yield kind, extra, _content(lines)


def _content(lines: list[str]) -> str:
    # The blank line before the next comment, or the newline at the end of the file, is no part of the text.
    return "\n".join(lines[:-1] if lines and not lines[-1] else lines)


def _part(kind: str, extra: Mapping[str, object] | str | None, text: str) -> str:
    lines = [f"\\{line}" if _LOOKS_LIKE_ONE.match(line) else line for line in text.split("\n")]
    return "\n".join([_comment(kind, extra), *lines, ""])


def _comment(kind: str, extra: Mapping[str, object] | str | None) -> str:
    if extra is None:
        return f"<!-- {kind} -->"
    # A comment ends at the first "-->", in a file's name too; JSON may write any character as an escape.
    packed = json.dumps(extra, ensure_ascii=False).replace(">", "\\u003e")
    return f"<!-- {kind} {packed} -->"
