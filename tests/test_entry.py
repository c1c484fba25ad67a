"""Ctrl-C while a command begins or ends: exit status 130 and nothing on the screen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from terminal import command, run

from hymoe import entry

# What Python runs before a command. INTERRUPTED_AT: the import, or "the end", at which Ctrl-C comes.
SITE = """
import atexit, os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
if os.environ["INTERRUPTED_AT"] == "the end":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""
COMMANDS = {name: value for name, value in vars(entry).items() if isinstance(value, entry.Command)}


def interrupted(name: str, place: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to which Ctrl-C comes at this place."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    words = command(name.replace("_", "-"), *arguments)
    return run(words, env={"PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": place})


@pytest.mark.parametrize("name", COMMANDS)
def test_while_it_is_imported(name: str, tmp_path: Path) -> None:
    for place in (COMMANDS[name].module, "typer"):
        done = interrupted(name, place, tmp_path, "--help")
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_while_it_imports_what_it_needs(tmp_path: Path) -> None:
    done = interrupted("hy_serve", "hymoe.runtime.supervise", tmp_path, "model.gguf")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_while_python_ends(tmp_path: Path) -> None:
    done = interrupted("hy_serve", "the end", tmp_path, "--help")
    assert done.returncode == 130
    assert done.stdout.startswith("Usage: hy-serve")
    assert done.stderr == ""


def test_who_ignores_it_goes_on(tmp_path: Path) -> None:
    """As a job that a script has started in the background."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    words = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command("hy-serve", "--help")]
    done = run(words, env={"PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": "typer"})
    assert (done.returncode, done.stderr) == (0, "")
