"""Running CMake and ninja: the flags, the progress line, the log, and what an error in the log says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from hymoe import console
from hymoe.engine import pin
from hymoe.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTRA_VARIABLE: Final = "HYMOE_CMAKE_ARGS"
TARGETS: Final = (
    "llama-server",
    "llama-imatrix",
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "ggml-rpc-server",
)
OUR_TARGETS: Final = ("hymoe-measure",)  # which the stock source does not have
ERROR_LINES: Final = 12

_COMMON: Final = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    # libraries are looked for beside the executable, so that the folder can be moved
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    # the web page would be fetched at build time
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    # else CMake asks git about whatever repository the cache folder happens to lie in
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": pin.LLAMA_CPP_COMMIT,
}
_BACKEND: Final = {
    "cpu": {"GGML_CUDA": "OFF", "GGML_VULKAN": "OFF"},
    "cuda": {"GGML_CUDA": "ON", "GGML_CUDA_FA_ALL_QUANTS": "ON"},
    "vulkan": {"GGML_VULKAN": "ON"},
    # Only in exported sources: never tried here.
    "metal": {"GGML_METAL": "ON", "GGML_METAL_EMBED_LIBRARY": "ON"},
}

_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
_ERROR = re.compile(r"\berror: |^CMake Error|undefined reference|^ninja: (?!Entering)|No space left|\bfatal +: ")


class CompileError(EngineError):
    """CMake or a compiler gave up. `details` are its error lines but the first, which the message has."""

    def __init__(self, reason: str, details: Sequence[str], log: Path) -> None:
        super().__init__("the engine could not be built", got=reason, fix=f"the full log is {log}")
        self.reason = reason
        self.details = details


def common_flags() -> dict[str, str]:
    """Give the variables that every build sets."""
    return dict(_COMMON)


def backend_flags(backend: str) -> dict[str, str]:
    """Give the variables that a backend sets besides."""
    return dict(_BACKEND[backend])


def flags(backend: str) -> list[str]:
    """Give CMake's arguments for a backend, with those that HYMOE_CMAKE_ARGS adds."""
    table = _COMMON | _BACKEND[backend]
    return [f"-D{name}={value}" for name, value in table.items()] + shlex.split(os.environ.get(EXTRA_VARIABLE, ""))


def compile_tree(
    source: Path, build: Path, *, arguments: Sequence[str], targets: Sequence[str], jobs: int, log: Path, label: str
) -> None:
    """Configure `source` into `build` and make `targets`, with a progress line; everything said goes to `log`.

    Raises CompileError with the error lines and the log's path.
    """
    import cmake
    import ninja

    program = Path(ninja.BIN_DIR) / "ninja"
    configure = [str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program}", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        console.status("configuring the engine")
        with _running(configure, out) as lines:
            for _ in lines:
                pass
        with (
            console.progress(label, 100, unit="%") as tick,
            _running([str(program), "-C", str(build), "-j", str(jobs), *targets], out) as lines,
        ):
            done = 0.0
            for line in lines:
                if (now := percent(line)) is not None and now > done:
                    tick(now - done)
                    done = now


def percent(line: str) -> float | None:
    """Read the share of steps done (0 to 100) from a line of ninja's; None for any other line."""
    match = _STEP.match(line)
    return 100 * int(match[1]) / int(match[2]) if match and int(match[2]) else None


def error_lines(log: str) -> list[str]:
    """Pick the lines of a build log that tell what went wrong, in order, the first dozen of them."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _ERROR.search(line):
            # CMake writes the place on one line and the reason on the next
            found.append(f"{line} {following}" if line.startswith("CMake Error") else line)
    return found[:ERROR_LINES]


@contextmanager
def _running(command: list[str], log: IO[str]) -> Iterator[Iterator[str]]:
    """Give the output of `command` line by line while it goes to `log`; leaving the block early ends the process."""
    log.write(shlex.join(command) + "\n")
    log.flush()
    begun = log.tell()
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        process_group=0,
    )
    assert process.stdout
    with process.stdout as output:
        try:
            yield _copied(output, log)
            process.wait()
        except BaseException:
            _end(process)
            raise
    log.flush()
    if process.returncode:
        _explain(Path(log.name), begun, process.returncode)


def _copied(lines: IO[str], log: IO[str]) -> Iterator[str]:
    for line in lines:
        log.write(line)
        yield line


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue


def _explain(log: Path, begun: int, status: int) -> None:
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(begun)
        lines = error_lines(text.read())
    raise CompileError(lines[0] if lines else f"exit status {status}", lines[1:], log)
