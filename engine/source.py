"""The pinned source: fetched through pip, checked by hash, unpacked without what no build needs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Final

from hymoe import console
from hymoe.engine import pin
from hymoe.errors import EngineError

SDIST_VARIABLE: Final = "HYMOE_SDIST"

# The rest of the tree (vocabularies, documentation, tests, converters) is three quarters of its size.
NEEDED: Final = frozenset(
    {"CMakeLists.txt", "LICENSE", "cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tools", "vendor"}
)


def sha256(file: Path) -> str:
    """Hash a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(folder: Path) -> Path:
    """Give the pinned sdist: the file that HYMOE_SDIST names, the one in `folder`, or else a download into `folder`.

    Raises EngineError where it cannot be had or is not the pinned one.
    """
    if given := os.environ.get(SDIST_VARIABLE):
        return _given(Path(given))
    kept = folder / pin.SDIST
    if kept.is_file() and sha256(kept) == pin.SHA256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    console.status(f"downloading {pin.PACKAGE} {pin.VERSION} ({console.format_bytes(pin.SDIST_BYTES)})")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _download(Path(scratch))
        fresh = Path(scratch) / pin.SDIST
        if not fresh.is_file() or (got := sha256(fresh)) != pin.SHA256:
            found = got if fresh.is_file() else ", ".join(sorted(os.listdir(scratch)))
            raise EngineError(
                f"the download of {pin.PACKAGE}", got=found, expected=f"{pin.SDIST} with sha256 {pin.SHA256}"
            )
        fresh.replace(kept)
    return kept


def extract(sdist: Path, tree: Path) -> None:
    """Unpack the needed parts of the sdist's llama.cpp into `tree`, whose content becomes the source's top folder."""
    tree.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                if needed(member.name):
                    inside = member.replace(name=member.name.removeprefix(pin.VENDORED), deep=False)
                    archive.extract(inside, tree, filter="data")
    except (tarfile.TarError, EOFError, OSError) as exc:
        raise EngineError(f"{sdist.name} cannot be unpacked", got=exc, fix=f"delete {sdist} and try again") from exc


def needed(member: str) -> bool:
    """Say whether an archive member belongs to what the build reads."""
    if not member.startswith(pin.VENDORED):
        return False
    parts = PurePosixPath(member.removeprefix(pin.VENDORED)).parts
    return bool(parts) and parts[0] in NEEDED


def _given(file: Path) -> Path:
    if not file.is_file():
        raise EngineError(SDIST_VARIABLE, got=f"{file}, which is no file", expected=f"a copy of {pin.SDIST}")
    if (got := sha256(file)) != pin.SHA256:
        raise EngineError(f"{SDIST_VARIABLE}={file}", got=f"sha256 {got}", expected=pin.SHA256)
    return file


def _download(folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin.PACKAGE}=={pin.VERSION} --hash=sha256:{pin.SHA256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--retries",
        "2",
        "--no-deps",
    ]
    command += ["--no-binary", pin.PACKAGE, "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted.unlink()
    if done.returncode:
        console.detail(done.stderr)
        reason = pip_reason(done.stderr)
        fix = f"check the network, or fetch {pin.SDIST} elsewhere and set {SDIST_VARIABLE}=FILE"
        raise EngineError(f"{pin.PACKAGE} {pin.VERSION} could not be downloaded", got=reason, fix=fix)


def pip_reason(stderr: str) -> str:
    """Pick from pip's output the reason why it gave up."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("connection broken by" in line for line in lines):
        return "no answer from the package index"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no message from pip"])[0]
