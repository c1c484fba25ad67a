"""Files that go with a question: @path in its text, and /file."""

from __future__ import annotations

import re
from pathlib import Path

from hymoe import console
from hymoe.errors import HyError
from hymoe.runtime.conversation import Attachment
from hymoe.runtime.wrap import harmless, printable

# About a million tokens of English; what the context holds is for the server to say.
MAX_BYTES = 4 << 20
# An @ at the start of a word; quotes for a path with spaces.
_MENTION = re.compile(r'(?<![^\s(（「“])@(?:"([^"\n]+)"|([^\s"]+))')
# What may follow a path in a sentence, and would be no part of it.
_PUNCTUATION = ".,;:!?)]}。，；：！？）」”、"


def read_file(given: str) -> Attachment:
    """Read a text file. Raises HyError where there is none, or it is too large, a folder, or not text."""
    try:
        path = Path(given).expanduser()
        size = path.stat().st_size
        if path.is_file() and size > MAX_BYTES:
            limit = console.format_bytes(MAX_BYTES)
            raise HyError(str(path), got=console.format_bytes(size), expected=f"at most {limit} of text")
        # A pipe or a device has no end; a folder says itself what it is.
        raw = path.read_bytes() if path.is_file() or path.is_dir() else b"\0"
    except (OSError, ValueError, RuntimeError) as exc:
        raise HyError(f"{given}: cannot read", got=getattr(exc, "strerror", None) or exc) from exc
    if b"\0" in raw:
        raise HyError(str(path), got="a binary file", expected="a text file in UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise HyError(str(path), got="bytes that are no UTF-8", expected="a text file in UTF-8") from exc
    # A name may hold any byte but NUL and a slash: newlines would break out of its line, and JSON carries no bytes.
    name = " ".join(printable(harmless(path.name)).split())
    return Attachment(name, text.replace("\r\n", "\n"))


def mentioned(text: str) -> tuple[list[Attachment], list[str]]:
    """Give the files that `text` mentions with @, and the mentions that name no file.

    Raises HyError for a file that cannot be sent.
    """
    files: dict[str, Attachment] = {}
    missing = []
    for quoted, plain in _MENTION.findall(text):
        name = _existing(quoted or plain, trim=not quoted)
        if name is None:
            missing.append(quoted or plain.rstrip(_PUNCTUATION))
        elif name not in files:
            files[name] = read_file(name)
    return list(files.values()), missing


def _existing(name: str, *, trim: bool) -> str | None:
    for candidate in (name, name.rstrip(_PUNCTUATION)) if trim else (name,):
        try:
            if candidate and Path(candidate).expanduser().exists():
                return candidate
        except (OSError, ValueError, RuntimeError):
            continue
    return None
