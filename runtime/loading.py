"""How far the engine is with loading a model: what it has read, as the kernel counts it."""

from __future__ import annotations

import re
from pathlib import Path

from hymoe.runtime.header import parts

_READ = re.compile(r"^rchar: (\d+)$", re.MULTILINE)
_MAPPED = re.compile(r"^RssFile:\s+(\d+) kB$", re.MULTILINE)


class Loading:
    """Bytes of a model that process `pid` has read; known on Linux only, from /proc.

    A file that is mapped into memory is not read but populated: its pages count then.
    """

    def __init__(self, pid: int, model: Path) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.total = sum(part.stat().st_size for part in parts(model) if part.exists())
        self.done = 0

    def news(self) -> int:
        """Give the bytes read since the last call; libraries count too, so the sum is cut at the model's size."""
        done = min(max(self._number("io", _READ), 1024 * self._number("status", _MAPPED)), self.total)
        news = max(done - self.done, 0)
        self.done += news
        return news

    def _number(self, file: str, pattern: re.Pattern[str]) -> int:
        try:
            found = pattern.search((self._folder / file).read_text(encoding="ascii"))
        except (OSError, UnicodeDecodeError):  # another system, or the process has ended
            return 0
        return int(found[1]) if found else 0
