"""Our changes to llama.cpp: whole new files and a series of small patches, applied strictly.

A patch is a unified diff with a line or more of plain text above it that says why it exists. Line
numbers count in the file as the patches before have left it. Nothing is searched for: a hunk that
does not sit exactly where it says, line for line, is an error.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe.errors import EngineError

if TYPE_CHECKING:
    from unidiff.patch import Hunk, PatchedFile

FOLDER: Final = Path(__file__).parent / "llama.cpp"

# What the stock engine, the peer of tests and benchmarks, needs to run at all.
STOCK: Final = ("0001-amx-tile-config",)


@dataclass(frozen=True)
class Patch:
    """One file of the series."""

    path: Path
    why: str

    @property
    def name(self) -> str:
        """The patch's number and title, as `0001-title`."""
        return self.path.stem


def series(folder: Path = FOLDER, *, stock: bool = False) -> list[Patch]:
    """List the patches in the order they apply. Raises EngineError for one that does not say why it exists."""
    paths = sorted((folder / "patches").glob("*.patch"))
    return [Patch(path, _why(path)) for path in paths if not stock or path.stem in STOCK]


def new_files(folder: Path = FOLDER, *, stock: bool = False) -> list[Path]:
    """List our own files, relative to the top of the source."""
    if stock:
        return []
    top = folder / "new"
    return sorted(file.relative_to(top) for file in top.rglob("*") if file.is_file())


def digest(folder: Path = FOLDER, *, stock: bool = False) -> str:
    """Hash names and contents of everything that `apply` would use."""
    total = hashlib.sha256()
    ours = [folder / "new" / name for name in new_files(folder, stock=stock)]
    for file in [*ours, *(patch.path for patch in series(folder, stock=stock))]:
        content = file.read_bytes()
        total.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def apply(tree: Path, folder: Path = FOLDER, *, stock: bool = False) -> None:
    """Put our files into `tree` and apply the series (of it, for a stock engine, what it cannot run without).

    Raises EngineError that names the patch, the file and the line where something does not fit.
    """
    for name in new_files(folder, stock=stock):
        target = tree / name
        if not target.parent.is_dir():
            raise EngineError(f"new file {name}", got="no folder for it in the source", expected=f"{name.parent}/")
        content = (folder / "new" / name).read_bytes()
        if target.is_file() and target.read_bytes() == content:
            raise EngineError(f"new file {name} changes nothing", fix="the source has the same file: remove ours")
        shutil.copyfile(folder / "new" / name, target)
    for patch in series(folder, stock=stock):
        _apply_one(tree, patch)


def _why(path: Path) -> str:
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(("--- ", "diff ")):
            break
        lines.append(line)
    if why := " ".join(" ".join(lines).split()):
        return why
    raise EngineError(f"patch {path.stem}", got="no text above the diff", expected="a line that says why it exists")


def _apply_one(tree: Path, patch: Patch) -> None:
    from unidiff.errors import UnidiffParseError
    from unidiff.patch import PatchSet

    try:
        files = PatchSet(patch.path.read_text(encoding="utf-8"))
    except UnidiffParseError as exc:
        raise EngineError(f"patch {patch.name} is no unified diff", got=exc) from exc
    if not files:
        raise EngineError(f"patch {patch.name} changes nothing", got="no file in it")
    # All files are worked out before the first is written: a patch applies whole or not at all.
    results = [_patched(tree, patch, file) for file in files]
    for target, content in results:
        target.write_bytes(content)


def _patched(tree: Path, patch: Patch, file: PatchedFile) -> tuple[Path, bytes]:
    where = f"patch {patch.name}, {file.path}"
    target = _target(tree, where, file)
    before = target.read_bytes()
    lines = before.decode("utf-8").splitlines(keepends=True)
    taken = 0  # lines of the source that are used up
    after: list[str] = []
    for hunk in file:
        start = hunk.source_start - 1 if hunk.source_length else hunk.source_start
        if start < taken:
            raise EngineError(f"{where}: hunk at line {hunk.source_start} overlaps the one before")
        after += lines[taken:start]
        after += _replacement(where, hunk, lines, start)
        taken = start + hunk.source_length
    content = "".join(after + lines[taken:]).encode("utf-8")
    if content == before:
        raise EngineError(f"{where}: changes nothing", fix="remove it from the series")
    return target, content


def _target(tree: Path, where: str, file: PatchedFile) -> Path:
    if file.is_added_file or file.is_removed_file or file.is_rename or file.is_binary_file:
        raise EngineError(
            where,
            got="a file that is added, removed, renamed or binary",
            expected="changed text (new files go to new/)",
        )
    target = tree / file.path
    if not target.resolve().is_relative_to(tree.resolve()):
        raise EngineError(where, got="a path outside the source", expected="a file of llama.cpp")
    if not target.is_file():
        raise EngineError(where, got="no such file in the source", expected="a file of llama.cpp")
    return target


def _replacement(where: str, hunk: Hunk, lines: list[str], start: int) -> Iterator[str]:
    if not hunk.is_valid():
        raise EngineError(f"{where}: hunk at line {hunk.source_start}", got="other line counts than its header says")
    for offset, line in enumerate(hunk.source_lines()):
        got = lines[start + offset] if start + offset < len(lines) else None
        if got is None or got.rstrip("\n") != line.value.rstrip("\n"):
            found = "the end of the file" if got is None else repr(got.strip())
            raise EngineError(
                f"{where}: hunk at line {hunk.source_start} does not match line {start + offset + 1}",
                got=found,
                expected=repr(line.value.strip()),
                fix="the pinned source is not the one this patch was made for",
            )
    yield from (line.value for line in hunk.target_lines())
