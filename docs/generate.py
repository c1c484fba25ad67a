"""Write what every command answers to --help into the pages that show it; `--check` only says whether they are true.

A page asks for a text with a pair of comments, `<!-- help: hy-convert -->` and `<!-- end -->`; what stands between
them is replaced. The commands' typer apps run in this process at a fixed width.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/commands.md")
WIDTH = 100
HELP = re.compile(r"(<!-- help: (?P<command>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
TYPER = re.compile(r"(<!-- typer )[\d.]+( -->)")


def commands() -> dict[str, str]:
    """Give every console command of pyproject.toml and its module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    begins = {name: metadata.EntryPoint(name, target, "").load() for name, target in sorted(project["scripts"].items())}
    return {name: begin.module for name, begin in begins.items()}


def help_text(command: str) -> str:
    """Give what `command --help` prints; `command` may name a subcommand as well ("hy-engine build")."""
    from typer.testing import CliRunner

    name, *rest = command.split()
    app = import_module(commands()[name]).app
    done = CliRunner().invoke(app, [*rest, "--help"], prog_name=name, terminal_width=WIDTH, catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(f"{command} --help: exit status {done.exit_code}")
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


def subcommands(name: str) -> list[str]:
    """Give "hy-engine build", … for a command that has subcommands."""
    import typer

    group = typer.main.get_command(import_module(commands()[name]).app)
    return [f"{name} {sub}" for sub in getattr(group, "commands", {})]


def rendered(page: str) -> str:
    """Give `page` with every help text replaced by the present one."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}```text\n{help_text(found['command'])}\n```\n{found[3]}"

    return TYPER.sub(rf"\g<1>{metadata.version('typer')}\g<2>", HELP.sub(replace, page))


def shown(page: str) -> list[str]:
    """Give the commands whose help `page` shows."""
    return [found["command"] for found in HELP.finditer(page)]


def main(argv: list[str]) -> int:
    """Rewrite the pages, or with --check give 1 where one is stale."""
    stale = [page for page in PAGES if (text := (ROOT / page).read_text(encoding="utf-8")) != rendered(text)]
    if "--check" not in argv:
        for page in stale:
            (ROOT / page).write_text(rendered((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for page in stale:
        sys.stderr.write(f"{page} shows an old --help: run `make docs`\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
