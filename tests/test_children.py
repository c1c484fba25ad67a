"""What tests have started is gone when the tests are killed, whichever way they started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import child
from terminal import TIMEOUT, ends

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel ends a child with its parent")

WORDS = """["/bin/sh", "-c", 'echo $$ > "$1.part"; mv "$1.part" "$1"; exec sleep 600', "sh", sys.argv[1]]"""
WAYS = {
    "child": f"with children.child({WORDS}): time.sleep(600)",
    "run": f"terminal.run({WORDS})",
    "Terminal": f"with terminal.Terminal({WORDS}): time.sleep(600)",
    "Tmux": f"with tmux.Tmux({WORDS}, 80, 25, cwd=pathlib.Path()): time.sleep(600)",
}


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_with_the_tests(way: str, tmp_path: Path) -> None:
    if way == "Tmux" and not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    code = f"import sys, time, pathlib, children, terminal, tmux\n{WAYS[way]}"
    started = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with child([sys.executable, "-c", code, str(started)], stderr=subprocess.PIPE, env=environment) as tests:
        deadline = time.monotonic() + TIMEOUT
        while not started.exists():
            assert tests.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        tests.kill()
    assert ends(int(started.read_text()))
