"""The rules of the house, read from the code: packaging, who may import whom, who prints, pages that stay true."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymoe import entry

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
ROOMS = sorted(name.removeprefix("hymoe.") for name in PACKAGE_DIR if name != "hymoe")
SOURCES = sorted(file for folder in PACKAGE_DIR.values() for file in (ROOT / folder).rglob("*.py"))
COMMANDS: dict[str, str] = PYPROJECT["project"]["scripts"]

# What each room must not know (docs/architecture.md); `hymoe` itself is what all share and knows no room.
MUST_NOT_IMPORT = {
    "src": set(ROOMS),
    "chat_templates": set(ROOMS) - {"chat_templates"},
    "convert": {"runtime"},
    "engine": set(ROOMS) - {"engine"},
    "imatrix": {"convert", "runtime"},
    "runtime": {"convert", "imatrix"},
}
# The one place that may all the same: hy-plan asks what a checkpoint would become.
MAY_IMPORT = {"runtime/plan_cli.py": {"convert"}}
# Libraries that belong to one place.
OWNERS = {
    "PIL": "imatrix/",
    "google": "convert/vocab",
    "httpx2": "convert/hub",
    "huggingface_hub": "convert/hub",
    "sentencepiece": "convert/vocab",
    "llama_cpp": "engine/",
    "unidiff": "engine/",
}
HEAVY = (
    *("PIL", "gguf", "httpx", "httpx2", "huggingface_hub", "jinja2", "numpy", "openai", "safetensors", "sentencepiece"),
    *("tokenizers", "torch"),
)


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def where(file: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if isinstance(node, ast.expr | ast.stmt) else ""
    return f"{file.relative_to(ROOT).as_posix()}{line}"


def imports(file: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every absolute module name that `file` imports, at the top or inside functions."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(file, node)}: relative import"
            yield node, str(node.module)
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def test_packages_are_the_folders_on_disk() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    top = {"hymoe": ROOT / "src" / "hymoe"} | {f"hymoe.{p.parent.name}": p.parent for p in ROOT.glob("*/__init__.py")}
    found = set(top)
    for name, folder in top.items():
        inner = (file.parent.relative_to(folder) for file in folder.rglob("*/__init__.py"))
        found |= {".".join([name, *path.parts]) for path in inner}
    assert listed == sorted(found)
    assert {name: ROOT / folder for name, folder in PACKAGE_DIR.items()} == top


def test_version_is_in_the_changelog() -> None:
    from hymoe import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_rooms_import_only_what_they_may_know() -> None:
    wrong = []
    for file in SOURCES:
        room = file.relative_to(ROOT).parts[0]
        forbidden = MUST_NOT_IMPORT[room] - MAY_IMPORT.get(where(file), set())
        for node, module in imports(file):
            parts = module.split(".")
            if parts[0] == "hymoe" and len(parts) > 1 and parts[1] in forbidden:
                wrong.append(f"{where(file, node)} imports {module}")
    assert not wrong


def test_dependencies_are_what_the_product_imports() -> None:
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in PYPROJECT["project"]["dependencies"]}
    # run as a command; what the bindings, which are installed with the engine, build with and import
    unimported = {"pip", "scikit_build_core", "diskcache"}
    imported = {module.partition(".")[0] for file in SOURCES for _, module in imports(file)}
    imported = {{"google": "protobuf", "PIL": "pillow"}.get(name, name) for name in imported}
    assert imported - sys.stdlib_module_names - {"hymoe", "llama_cpp"} == declared - unimported


def test_libraries_stay_with_their_owners() -> None:
    wrong = [
        f"{where(file, node)} imports {module}"
        for file in SOURCES
        for node, module in imports(file)
        if (owner := OWNERS.get(module.split(".")[0])) and not where(file).startswith(owner)
    ]
    assert not wrong


def test_only_the_engine_names_llama_cpp_source() -> None:
    pattern = re.compile(r"llama[_-]cpp[_-]python|vendor/llama\.cpp|ggml/src|src/llama-")
    wrong = [
        where(file, node)
        for file in SOURCES
        if file.relative_to(ROOT).parts[0] != "engine"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.search(node.value)
    ]
    assert not wrong


def test_only_the_console_prints() -> None:
    streams = {f"sys.{name}" for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
    calls = {"print", "typer.echo", "typer.secho", "click.echo"}

    def prints(file: Path) -> Iterator[str]:
        nodes = list(ast.walk(tree(file)))
        # Asking whether a stream is a terminal writes nothing.
        asked = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "isatty"}
        for node in nodes:
            stream = isinstance(node, ast.Attribute) and ast.unparse(node) in streams and id(node) not in asked
            if stream or (isinstance(node, ast.Call) and ast.unparse(node.func) in calls):
                yield where(file, node)

    assert not [place for file in SOURCES if where(file) != "src/hymoe/console.py" for place in prints(file)]


def test_nine_functions_in_ten_are_short() -> None:
    functions = [
        (node.end_lineno - node.lineno + 1, where(file, node), node.name)
        for file in SOURCES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    lengthy = sorted((entry for entry in functions if entry[0] >= 35), reverse=True)
    assert len(functions) > 100
    assert len(lengthy) <= 0.1 * len(functions), lengthy


def test_every_command_begins_at_the_entry() -> None:
    begun = {name: value for name, value in vars(entry).items() if isinstance(value, entry.Command)}
    assert {name.replace("_", "-"): f"hymoe.entry:{name}" for name in begun} == COMMANDS


@pytest.mark.parametrize("name", [target.partition(":")[2] for target in COMMANDS.values()])
def test_help_comes_without_heavy_imports(name: str) -> None:
    script = (
        f"import sys; from hymoe.entry import {name} as run; sys.argv[1:] = ['--help']; status = run()\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: hy-")
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.fixture(scope="module")
def pages() -> dict[str, Any]:
    """The names of docs/generate.py, which writes the --help texts."""
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_pages_show_the_present_help(pages: dict[str, Any]) -> None:
    import typer

    recorded = re.search(r"<!-- typer ([\d.]+) -->", (ROOT / "docs/commands.md").read_text(encoding="utf-8"))
    assert recorded
    for page in pages["PAGES"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        fresh = pages["rendered"](text)
        if recorded[1] == typer.__version__:
            assert text == fresh, f"{page}: run `make docs`"
        else:  # another typer may lay its help out differently; the flags are the same
            assert flags(text) == flags(fresh), f"{page}: run `make docs`"


def flags(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)


def test_every_command_is_in_the_docs(pages: dict[str, Any]) -> None:
    commands = [command for name in COMMANDS for command in (name, *pages["subcommands"](name))]
    assert sorted(pages["shown"]((ROOT / "docs/commands.md").read_text(encoding="utf-8"))) == sorted(commands)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{where(page)} links to {target}"


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / ".ci" / "run"]
    named = {name for page in pages for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert named
    assert named <= targets


def test_continuous_integration_runs_what_a_stranger_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
