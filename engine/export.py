"""The patched source as one archive, for machines without a network: what the build reads, and a script that builds.

The same source gives the same bytes: names are sorted; times, owners and modes are fixed.
"""

from __future__ import annotations

import gzip
import io
import shlex
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from hymoe import console
from hymoe.engine import cmake, patches, pin, source
from hymoe.engine.installed import engine_root
from hymoe.errors import OutputError

TOP: Final = "hymoe-engine"
BACKENDS: Final = ("cpu", "cuda", "vulkan", "metal")
MTIME: Final = 315532800  # 1980-01-01: file systems and tools that know nothing earlier take it

# Folders of the tree that no backend of BACKENDS reads.
_UNREAD: Final = (
    *(f"ggml/src/ggml-{name}" for name in ("cann", "et", "hexagon", "hip", "musa", "opencl", "openvino", "sycl")),
    *(f"ggml/src/ggml-{name}" for name in ("virtgpu", "webgpu", "zdnn", "zendnn")),
    *(f"tools/ui/{name}" for name in ("scripts", "src", "static", "tests")),
    *("tools/server/bench", "tools/server/tests", "tools/server/themes", "scripts"),
)
_READ_THERE: Final = frozenset({"scripts/ui-assets.cmake"})
_UNREAD_SUFFIXES: Final = frozenset({".gif", ".jpg", ".json", ".md", ".mp3", ".mp4", ".png", ".py", ".svg", ".ts"})

README: Final = """\
llama.cpp {version} ({commit}) with hymoe's changes, trimmed to what the build needs.

    sh build.sh cpu|cuda|vulkan|metal DIR [CMake arguments]

builds it for this machine and puts programs and libraries into DIR; then, for hymoe's commands on the same machine,

    export HYMOE_ENGINE=DIR

It takes CMake 3.19 or newer, a C and a C++ compiler, for cuda the CUDA toolkit (nvcc), for vulkan its headers and
glslc. Nothing is fetched. Licences: LICENSE (llama.cpp), licenses/ and vendor/ (what it carries), LICENSE-hymoe (our
changes).
"""

_BUILD: Final = """\
#!/bin/sh
# Build the engine for this machine: sh build.sh cpu|cuda|vulkan|metal DIR [CMake arguments]
# TARGETS names what to build instead of all, JOBS how many compilers run at a time.
set -eu
usage() {{ echo "usage: sh build.sh {backends} DIR [CMake arguments]" >&2; exit 2; }}
[ $# -ge 2 ] || usage
backend=$1 into=$2
shift 2
case $backend in
{cases}
*) usage ;;
esac
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
build=$here/build-$backend
# libraries are looked for beside the executable, so that DIR can be moved
rpath='$ORIGIN'
[ "$(uname)" != Darwin ] || rpath=@loader_path
jobs=${{JOBS:-$(getconf _NPROCESSORS_ONLN)}}
# shellcheck disable=SC2086 # flags and targets are several words
cmake -S "$here" -B "$build" {common} $flags -DCMAKE_INSTALL_RPATH="$rpath" "$@"
# shellcheck disable=SC2086
cmake --build "$build" --parallel "$jobs" --target ${{TARGETS:-{targets}}}
mkdir -p "$into"
cp -R "$build/bin/." "$into/"
echo "built: export HYMOE_ENGINE=$(CDPATH= cd -- "$into" && pwd)"
"""


def export(file: Path) -> int:
    """Write the archive (`.tar.gz`) and give its size in bytes.

    Raises EngineError where the source cannot be had, OutputError where the file cannot be written.
    """
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(b"")  # before the work: it may not be possible
        part.write_bytes(archive := _archive())
        part.replace(file)
    except OSError as exc:
        raise OutputError(f"{file}: cannot be written", got=exc.strerror or exc) from exc
    finally:
        part.unlink(missing_ok=True)
    return len(archive)


def script() -> str:
    """Give the text of build.sh: the flags are those of `hy-engine build`."""
    cases = [f"{name}) flags={shlex.quote(_defines(cmake.backend_flags(name)))} ;;" for name in BACKENDS]
    common = cmake.common_flags()
    del common["CMAKE_INSTALL_RPATH"]  # which the script knows better
    return _BUILD.format(
        backends="|".join(BACKENDS),
        cases="\n".join(cases),
        common=_defines(common),
        targets=" ".join((*cmake.TARGETS, *cmake.OUR_TARGETS)),
    )


def is_read(path: PurePosixPath) -> bool:
    """Say whether the build reads this file of the tree; licences stay."""
    if any(path.is_relative_to(folder) for folder in _UNREAD):
        return path.as_posix() in _READ_THERE
    return path.suffix not in _UNREAD_SUFFIXES or "LICENSE" in path.name


def _defines(flags: dict[str, str]) -> str:
    return shlex.join(f"-D{name}={value}" for name, value in flags.items())


def _archive() -> bytes:
    with tempfile.TemporaryDirectory(prefix="hymoe-") as folder:
        tree = Path(folder)
        source.extract(source.fetch(engine_root() / "sdist"), tree)
        patches.apply(tree)
        return _packed(tree)


def _packed(tree: Path) -> bytes:
    """Pack the tree with our own files beside it."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in sorted({**dict(_files(tree)), **_ours()}.items()):
            member = tarfile.TarInfo(f"{TOP}/{name}")
            member.size, member.mtime = len(content), MTIME
            member.mode = 0o755 if content.startswith(b"#!") else 0o644
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _files(tree: Path) -> Iterator[tuple[str, bytes]]:
    for file in tree.rglob("*"):
        path = PurePosixPath(file.relative_to(tree))
        if file.is_file() and is_read(path):
            yield path.as_posix(), file.read_bytes()


def _ours() -> dict[str, bytes]:
    about = README.format(version=pin.LLAMA_CPP_VERSION, commit=pin.LLAMA_CPP_COMMIT)
    return {
        "README": about.encode(),
        "LICENSE-hymoe": (patches.FOLDER / "LICENSE").read_bytes(),
        "build.sh": script().encode(),
    }


def say(file: Path, size: int) -> None:
    """Say what was written, and what to do with it."""
    console.status(f"{file}: {console.format_bytes(size)}; there: tar xf {file.name}, sh {TOP}/build.sh cpu DIR")
