"""Whether other programs use the processors: what is measured beside them comes out too slow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

# Share of all processors that others may use for a measurement to count as undisturbed.
SHARE: Final = 0.1
# Fields of the first line of /proc/stat that are no work: idle, iowait; and what "user" and "nice" have counted before.
_NO_WORK: Final = frozenset({3, 4, 8, 9})


class Watch:
    """Tells afterwards whether others worked since it was made. Children count as our own once they have ended."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._quiet = is_quiet()
        self._begun = _now(root)

    def busy(self) -> bool:
        """Whether others used more than SHARE of the processors, or another machine on the same hardware did."""
        ended = _now(self._root)
        if self._begun is None or ended is None:  # no Linux
            return not self._quiet
        seconds, others = (after - before for before, after in zip(self._begun, ended, strict=True))
        return others > SHARE * seconds * (os.cpu_count() or 1)


def is_quiet() -> bool:
    """Whether nothing much has run in the last minute; False where the system does not say."""
    try:
        return os.getloadavg()[0] <= SHARE * (os.cpu_count() or 1)
    except (AttributeError, OSError):  # AttributeError: Windows
        return False


def _now(root: Path) -> tuple[float, float] | None:
    """Give the clock, and the processor time of all others since the system began, in seconds."""
    try:
        line = (root / "proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    ticks = sum(int(word) for field, word in enumerate(line.split()[1:]) if field not in _NO_WORK)
    own = sum(os.times()[:4])
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - own
