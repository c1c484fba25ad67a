"""What this machine can build with: compilers, the processor's instruction set, backends, room."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hymoe import console
from hymoe.errors import EngineError

BACKENDS: Final = ("cpu", "cuda", "vulkan")

# What a backend's part of a build depends on, by command: the shader or GPU compiler, the GPUs it compiles for.
BACKEND_TOOLS: Final = {
    "cpu": (),
    "cuda": (("nvcc", "--version"), ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")),
    "vulkan": (("glslc", "--version"),),
}
CXX_NAMES: Final = ("c++", "g++", "clang++")
CC_NAMES: Final = ("cc", "gcc", "clang")
GET_COMPILER: Final = (
    "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: `xcode-select --install`)"
)

# Objects, source and results of a build, with room to spare: bytes by backend.
ROOM: Final = {"cpu": 2_000_000_000, "vulkan": 2_500_000_000, "cuda": 8_000_000_000}
# A compiler process on the largest source of the tree.
JOB_BYTES: Final = 1_500_000_000

# Instruction sets that ggml has kernels for, by the macro that the compiler sets: what `hy-engine info` shows.
INSTRUCTION_SETS: Final = {
    "__AVX__": "AVX",
    "__AVX2__": "AVX2",
    "__FMA__": "FMA",
    "__F16C__": "F16C",
    "__AVXVNNI__": "AVX-VNNI",
    "__AVX512F__": "AVX512F",
    "__AVX512VNNI__": "AVX512-VNNI",
    "__AVX512BF16__": "AVX512-BF16",
    "__AMX_INT8__": "AMX-INT8",
    "__ARM_NEON": "NEON",
    "__ARM_FEATURE_DOTPROD": "DOTPROD",
    "__ARM_FEATURE_MATMUL_INT8": "I8MM",
    "__ARM_FEATURE_SVE": "SVE",
}


@dataclass(frozen=True)
class Compiler:
    """A working pair of compilers.

    cxx, cc: the executables. version, cc_version: the first line of each about itself. isa: the instruction sets
    they build for here, by name. macros: hash of everything that `-march=native` sets, the exact form of `isa`.
    cxx_launcher, cc_launcher: the programs to run them through, as ccache.
    """

    cxx: Path
    version: str
    cc: Path
    cc_version: str
    isa: tuple[str, ...]
    macros: str
    cxx_launcher: tuple[Path, ...] = ()
    cc_launcher: tuple[Path, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """Tell CMake which compilers to take."""
        languages = (("CXX", self.cxx, self.cxx_launcher), ("C", self.cc, self.cc_launcher))
        given = [f"-DCMAKE_{language}_COMPILER={compiler}" for language, compiler, _ in languages]
        return given + [
            f"-DCMAKE_{language}_COMPILER_LAUNCHER={';'.join(map(str, launcher))}"
            for language, _, launcher in languages
            if launcher
        ]


def find_compiler() -> Compiler:
    """Find the C++ compiler that CXX names, or c++, g++ or clang++, and a C compiler (CC; cc, gcc, clang).

    CXX and CC may put launchers in front, as in `ccache g++`.
    Raises EngineError with the remedy where there is none, or where it does not work.
    """
    *cxx_launcher, cxx = _programs("C++ compiler", "CXX", CXX_NAMES)
    *cc_launcher, cc = _programs("C compiler", "CC", CC_NAMES)
    macros = _native_macros(cxx)
    defined = set(re.findall(r"^#define (\S+)", macros, re.MULTILINE))
    isa = tuple(name for macro, name in INSTRUCTION_SETS.items() if macro in defined)
    digest = hashlib.sha256(macros.encode()).hexdigest()
    return Compiler(cxx, _version(cxx), cc, _version(cc), isa, digest, tuple(cxx_launcher), tuple(cc_launcher))


def choose_backend(wanted: str) -> str:
    """Turn `auto` into the backend that this machine can build and use; check the tools of one asked for by name."""
    if wanted == "auto":
        if shutil.which("nvcc") and _lists_a_gpu(["nvidia-smi", "-L"], r"^GPU \d"):
            return "cuda"
        if shutil.which("glslc") and _lists_a_gpu(
            ["vulkaninfo", "--summary"], r"deviceType\s*=\s*\w*_(DISCRETE|INTEGRATED)_GPU"
        ):
            return "vulkan"
        return "cpu"
    if wanted not in BACKENDS:
        raise EngineError("--backend", got=wanted, expected="auto, " + ", ".join(BACKENDS))
    compiler, package = {"cuda": ("nvcc", "the CUDA toolkit"), "vulkan": ("glslc", "glslc and libvulkan-dev")}.get(
        wanted, ("", "")
    )
    if compiler and not shutil.which(compiler):
        raise EngineError(
            f"--backend {wanted}",
            got=f"no {compiler} on the PATH",
            expected=package,
            fix="install it or take --backend cpu",
        )
    return wanted


def backend_tools(backend: str) -> tuple[tuple[str, str], ...]:
    """Say what the tools of a backend tell about themselves and the GPUs: pairs of command and sorted lines."""
    asked = [(command, _output(list(command))) for command in BACKEND_TOOLS[backend]]
    return tuple((" ".join(command), "\n".join(sorted(set((said or "").splitlines())))) for command, said in asked)


def check_room(folder: Path, backend: str) -> None:
    """Raise EngineError where the disk of `folder` has no room for a build, or the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        raise EngineError(
            f"the cache folder {folder}", got=exc.strerror, fix="set HYMOE_CACHE to a folder that can be written"
        ) from exc
    if not os.access(folder, os.W_OK):
        raise EngineError(f"the cache folder {folder} cannot be written", fix="set HYMOE_CACHE to one that can")
    if free < ROOM[backend]:
        expected = f"{console.format_bytes(ROOM[backend])} for the build"
        raise EngineError(
            f"free disk in {folder}",
            got=console.format_bytes(free),
            expected=expected,
            fix="make room or set HYMOE_CACHE to a folder on another disk",
        )


def default_jobs() -> int:
    """Give as many compiler processes as there are processors to run and memory to hold them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        available = None
    by_memory = int(available[1]) * 1024 // JOB_BYTES if available else processors
    return max(1, min(processors, by_memory))


def _programs(what: str, variable: str, names: Sequence[str]) -> list[Path]:
    """Give the compiler, and in front of it the launchers that the variable names."""
    given = os.environ.get(variable)
    for words in ([given], _words(given)) if given else [[name] for name in names]:
        found = [Path(program) for word in words if (program := shutil.which(word))]
        if found and len(found) == len(words):
            return found
    got = f"{variable}={given}, which is no program" if given else f"none of {', '.join(names)} on the PATH"
    fix = f"unset {variable} or correct it (flags go into CXXFLAGS and CFLAGS)" if given else GET_COMPILER
    raise EngineError(f"no {what}", got=got, fix=fix)


def _words(given: str) -> list[str]:
    try:
        return shlex.split(given)
    except ValueError:  # a quotation mark that is not closed
        return []


def _version(compiler: Path) -> str:
    return _ask(compiler, "--version").partition("\n")[0].strip()


def _native_macros(compiler: Path) -> str:
    # clang for ARM knows the running processor as -mcpu only; a compiler that knows neither builds for its default.
    for flags in (["-march=native"], ["-mcpu=native"], []):
        try:
            return _ask(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
        except EngineError:
            if not flags:
                raise
    raise AssertionError("unreachable")


def _ask(compiler: Path, *arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [*done.stderr.split("\n"), *done.stdout.split("\n")]
        reason = next((line for line in lines if line.strip()), f"exit status {done.returncode}")
        raise EngineError(f"the compiler {compiler} does not work", got=reason, fix=GET_COMPILER)
    return done.stdout


def _lists_a_gpu(command: list[str], pattern: str) -> bool:
    said = _output(command)
    return said is not None and re.search(pattern, said, re.MULTILINE) is not None


def _output(command: list[str]) -> str | None:
    """Run a command that may be missing, hang or fail; None where it does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
