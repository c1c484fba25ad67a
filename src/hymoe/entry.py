"""Where every command begins: from here on Ctrl-C ends it without a traceback, also while the rest is imported.

The one file of the root that names rooms; each is imported when its command runs. What is imported at the top of this
one lengthens the time in which Ctrl-C still shows a traceback.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module

_INTERRUPTED = 128 + signal.SIGINT  # as a shell says it


class Command:
    """A command of pyproject.toml: called, it runs `main` of its module and gives the exit status."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __call__(self) -> int:
        """Run it; Ctrl-C gives 130 wherever it comes."""
        usual = signal.getsignal(signal.SIGINT)
        # A job in the background ignores it, which must stay so.
        quiet = _leave if usual is signal.default_int_handler else usual
        # Not an exception: where an import catches one it is lost, and there is nothing to undo yet.
        signal.signal(signal.SIGINT, quiet)
        main = import_module(self.module).main
        try:
            signal.signal(signal.SIGINT, usual)
            status: int = main()
        except KeyboardInterrupt:
            status = _INTERRUPTED
        finally:
            signal.signal(signal.SIGINT, quiet)  # the interpreter's own end takes a while too
        return status


def _leave(_number: int, _frame: object) -> None:
    os._exit(_INTERRUPTED)


hy_chat = Command("hymoe.runtime.chat_cli")
hy_convert = Command("hymoe.convert.cli")
hy_engine = Command("hymoe.engine.cli")
hy_imatrix = Command("hymoe.imatrix.cli")
hy_plan = Command("hymoe.runtime.plan_cli")
hy_serve = Command("hymoe.runtime.serve_cli")
