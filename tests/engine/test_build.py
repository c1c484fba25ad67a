"""Building: what is checked before, the cache, what a failure says, what an interruption leaves.

The builds here are of a tiny CMake project with the pinned source's layout and target names: the whole way from the
archive to the installed folder runs as it does for the real one, in seconds.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from unidiff.patch import PatchSet

from hymoe.engine import cmake, installed, patches, pin, source, toolchain
from hymoe.engine.build import recipe_for
from hymoe.engine.cli import main
from hymoe.errors import EngineError

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.21)
project(tiny CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name llama-server llama-imatrix llama-perplexity llama-bench llama-quantize ggml-rpc-server hymoe-measure)
    add_executable(${name} tool.cpp)
endforeach()
if(GGML_CUDA AND NOT DEFINED ENV{TINY_MENDED})
    message(FATAL_ERROR "this toolkit is too old")
endif()
if(DEFINED ENV{TINY_SLOW})
    add_custom_command(TARGET llama-bench PRE_LINK COMMAND sleep 61.7)
endif()
"""
# llama-bench's answer from every tool, or the end that the environment asks for
TOOL = r"""
#include <cstdio>
#include <cstdlib>
#ifdef TINY_BROKEN
#error the tool is broken
#endif
int main() {
    if (getenv("TINY_CRASH")) { abort(); }
    puts("[{\"n_prompt\": 1, \"avg_ts\": 1.0}, {\"n_prompt\": 512, \"avg_ts\": 1.0}]");
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that `hy-engine` uses."""
    for name in (installed.ENGINE_VARIABLE, source.SDIST_VARIABLE, cmake.EXTRA_VARIABLE, "CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(installed.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine"


@pytest.fixture
def tiny(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny project as sdist, pinned in place of the real one; gives the cache's engine folder."""
    sdist = tmp_path / pin.SDIST
    write_sdist(sdist)
    monkeypatch.setenv(source.SDIST_VARIABLE, str(sdist))
    monkeypatch.setattr(pin, "SHA256", source.sha256(sdist))
    return cache


def write_sdist(file: Path) -> None:
    """Write an archive that our files and the series fit on: blank lines, with theirs in between."""
    contents = {"CMakeLists.txt": CMAKE_LISTS, "src/tool.cpp": "", "docs/left-out.md": "x"}
    contents["CMakeLists.txt"] = CMAKE_LISTS.replace("tool.cpp", "src/tool.cpp")
    contents["src/tool.cpp"] = TOOL
    contents |= {name.as_posix(): "// stock\n" for name in patches.new_files()} | patched_files()
    with tarfile.open(file, "w:gz") as archive:
        for name, text in contents.items():
            member = tarfile.TarInfo(pin.VENDORED + name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def patched_files() -> dict[str, str]:
    """Files that the series fits on: a line that a patch wants and no earlier one has put there is in the source."""
    stock: dict[str, list[list[str]]] = {}  # a line is a list of its text, which may be filled in later
    now: dict[str, list[list[str]]] = {}
    for patch in patches.series():
        for changed in PatchSet(patch.path.read_text()):
            lines, first = now.setdefault(changed.path, []), stock.setdefault(changed.path, [])
            missing = [
                ["\n"] for _ in range(max(hunk.source_start + hunk.source_length for hunk in changed) - len(lines))
            ]
            lines += missing
            first += missing
            for hunk in reversed(changed):
                start = hunk.source_start - 1
                for i, line in enumerate(hunk.source_lines()):
                    lines[start + i][0] = line.value
                kept = iter(lines[start : start + hunk.source_length])
                after = []
                for line in hunk:
                    if line.is_added:
                        after.append([line.value])
                    elif (same := next(kept)) and line.is_context:
                        after.append(same)
                lines[start : start + hunk.source_length] = after
    return {path: "".join(line[0] for line in lines) for path, lines in stock.items()}


def put_tool(folder: Path, name: str, script: str) -> Path:
    """Write a shell script as a program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


def leftovers(engine_folder: Path) -> list[str]:
    """What looks like a build or the beginning of one."""
    return sorted(entry.name for entry in engine_folder.iterdir() if entry.name not in ("lock", "logs", "sdist"))


def test_build_then_find_then_build_again(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--backend", "cpu", "--no-bindings", "-j", "2"]) == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert "the engine is ready" in said.err
    engine = installed.find()
    assert engine.tool("llama-server").is_file()
    assert engine.manifest["patches"] == {patch.name: patch.why for patch in patches.series()}
    assert leftovers(tiny) == [engine.manifest["key"]]
    made = engine.tool("llama-server").stat().st_mtime_ns

    begun = time.monotonic()
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 0
    assert time.monotonic() - begun < 2
    assert installed.find().tool("llama-server").stat().st_mtime_ns == made

    capfd.readouterr()
    assert main(["path"]) == 0
    assert capfd.readouterr().out == f"{engine.bin}\n"

    assert main(["build", "--backend", "cpu", "--no-bindings", "--force"]) == 0
    assert installed.find().tool("llama-server").stat().st_mtime_ns > made
    assert leftovers(tiny) == [engine.manifest["key"]]


def test_a_processor_that_changes_gets_a_build_of_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a new kernel or microcode, or where machines share a home: the compiler says the same for both."""
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 0
    for module in ("installed", "build"):
        monkeypatch.setattr(f"hymoe.engine.{module}.host", lambda: "pdp-11")
    with pytest.raises(EngineError, match="builds of other sources or processors only"):
        installed.find()
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 0
    assert installed.find().manifest["host"] == "pdp-11"
    assert len(leftovers(tiny)) == 2


def test_auto_takes_the_processor_where_the_backend_it_finds_does_not_build(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put_tool(tmp_path / "tools", "nvcc", "echo release 7.5")
    put_tool(tmp_path / "tools", "nvidia-smi", "echo GPU 0: the only one")
    monkeypatch.setenv("PATH", str(tmp_path / "tools"), prepend=os.pathsep)
    monkeypatch.setitem(toolchain.ROOM, "cuda", 0)

    def build(*arguments: str) -> tuple[int, list[str]]:
        status = main(["build", "--no-bindings", *arguments])
        return status, capfd.readouterr().err.splitlines()

    status, said = build()
    assert status == 0
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert warning.startswith("warning: cuda does not build here (CMake Error at CMakeLists.txt:")
    assert "this toolkit is too old; the log is " in warning
    assert "`hy-engine build --backend cuda` tries again" in warning
    assert installed.find().manifest["backend"] == "cpu"

    status, said = build()  # knows it already
    assert status == 0
    assert sum(line.startswith("warning: cuda does not build here (as before;") for line in said) == 1
    assert not any("configuring" in line for line in said)

    status, said = build("--backend", "cuda")  # asked for by name
    assert status == 1
    assert said[-1].startswith("error: the engine could not be built: got CMake Error")

    monkeypatch.setenv("TINY_MENDED", "1")
    assert build("--backend", "cuda")[0] == 0
    status, said = build()
    assert status == 0
    assert not any(line.startswith("warning: ") for line in said)
    assert installed.find().manifest["backend"] == "cuda"


def test_a_launcher_in_front_of_the_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = put_tool(tmp_path / "tools", "launcher", f'echo "$1" >> {tmp_path}/launched; exec "$@"')
    monkeypatch.setenv("CXX", f"{launcher} c++")
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 0
    compiler = installed.find().manifest["compiler"]["path"]
    assert compiler == shutil.which("c++")
    assert compiler in (tmp_path / "launched").read_text().splitlines()


def test_a_crash_in_the_smoke_run_installs_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINY_CRASH", "1")
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the new engine crashes (prompts of 1,512 tokens on F16): got SIGABRT")
    assert leftovers(tiny) == []
    with pytest.raises(EngineError, match="hy-engine build"):
        installed.find()


def test_a_failed_compile_names_the_error_and_the_log(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cmake.EXTRA_VARIABLE, "-DCMAKE_CXX_FLAGS=-DTINY_BROKEN")
    assert main(["build", "--backend", "cpu", "--no-bindings"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the engine could not be built: got ")
    assert "#error the tool is broken" in error
    (log,) = (tiny / "logs").iterdir()
    assert f"the full log is {log}" in error
    assert "FAILED" in log.read_text()
    assert leftovers(tiny) == []


def started(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """`hy-engine build` of the tiny project in a process of its own."""
    runner = folder / "runner.py"
    runner.write_text(
        "import sys\nfrom hymoe.engine import pin\nfrom hymoe.engine.cli import main\n"
        f"pin.SHA256 = {pin.SHA256!r}\n"
        "sys.exit(main(['build', '--backend', 'cpu', '--no-bindings', '-j', '1']))\n"
    )
    return subprocess.Popen([sys.executable, runner], env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tiny: Path, tmp_path: Path) -> None:
    process = started(tmp_path, TINY_SLOW="1")
    deadline = time.monotonic() + 60
    while not sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sleepers()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert sleepers() == []
    assert leftovers(tiny) == []


def test_two_builds_at_a_time_are_one_build(tiny: Path, tmp_path: Path) -> None:
    processes = [started(tmp_path), started(tmp_path)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("another build is running" in text for text in said) == 1
    assert sum("configuring the engine" in text for text in said) == 1
    assert len(leftovers(tiny)) == 1


def sleepers() -> list[str]:
    """The processes that TINY_SLOW starts."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if line == b"sleep\x0061.7\x00":
            found.append(entry.parent.name)
    return found


def test_no_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["build"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: no C++ compiler: got none of c++, g++, clang++ on the PATH; install one")
    assert "apt install g++" in error
    assert error.count("\n") == 1
    assert not cache.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no-such-compiler", "CXX=no-such-compiler, which is no program"),
        ("env no-such-compiler", "CXX=env no-such-compiler, which is no program"),
        ("c++ -m32", "CXX=c++ -m32, which is no program; unset CXX or correct it (flags go into CXXFLAGS and CFLAGS)"),
        ("c++ '", "CXX=c++ ', which is no program"),
        ("false", "false does not work"),
    ],
)
def test_a_wrong_cxx(
    value: str, says: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", value)
    assert main(["build"]) == 1
    assert says in capfd.readouterr().err
    assert not cache.exists()


def test_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(toolchain.ROOM, "cpu", 10**18)
    assert main(["build", "--backend", "cpu"]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: free disk in {cache}: got ")
    assert "expected 1000000.00 TB for the build; make room or set HYMOE_CACHE" in error
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_made(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert main(["build", "--backend", "cpu"]) == 1
    assert "set HYMOE_CACHE to a folder that can be written" in capfd.readouterr().err


def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert main(["build", "--backend", "cpu"]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: llama-cpp-python {pin.VERSION} could not be downloaded: got no answer from the package index"
    )
    assert "set HYMOE_SDIST=FILE" in error
    assert leftovers(cache) == []


def test_a_wrong_sdist(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(source.SDIST_VARIABLE, str(tmp_path / "none.tar.gz"))
    assert main(["build", "--backend", "cpu"]) == 1
    assert "which is no file" in capfd.readouterr().err
    (tmp_path / "none.tar.gz").write_bytes(b"other bytes")
    assert main(["build", "--backend", "cpu"]) == 1
    assert f"expected {pin.SHA256}" in capfd.readouterr().err


def test_a_truncated_archive(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar.gz"
    write_sdist(whole)
    half = tmp_path / "half.tar.gz"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(EngineError, match="cannot be unpacked"):
        source.extract(half, tmp_path / "tree")


def test_only_what_the_build_reads_is_unpacked(tmp_path: Path) -> None:
    write_sdist(tmp_path / "a.tar.gz")
    source.extract(tmp_path / "a.tar.gz", tmp_path / "tree")
    assert (tmp_path / "tree" / "CMakeLists.txt").is_file()
    assert not (tmp_path / "tree" / "docs").exists()


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(pin.VENDORED + "src/../../outside.txt"), io.BytesIO())
    with pytest.raises(EngineError, match="cannot be unpacked"):
        source.extract(tmp_path / "evil.tar.gz", tmp_path / "tree")
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize(
    "arguments", [["build", "--backend", "abacus"], ["build", "--jobs", "0"], ["no-such-command"], ["path", "extra"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_a_backend_without_its_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for tool in ("c++", "cc"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["build", "--backend", "vulkan"]) == 1
    assert "error: --backend vulkan: got no glslc on the PATH" in capfd.readouterr().err
    assert main(["build", "--backend", "cuda"]) == 1
    assert "error: --backend cuda: got no nvcc on the PATH" in capfd.readouterr().err


def test_the_key_follows_everything_a_build_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cmake.EXTRA_VARIABLE, raising=False)
    compiler = toolchain.Compiler(
        Path("/usr/bin/c++"), "c++ 12.2.0", Path("/usr/bin/cc"), "cc 12.2.0", ("AVX2",), "0" * 64
    )
    keys = [recipe_for(backend, compiler).key for backend in toolchain.BACKENDS]
    keys.append(recipe_for("cpu", compiler, stock=True).key)
    keys.append(recipe_for("cpu", replace(compiler, version="c++ 13.0.0")).key)
    keys.append(recipe_for("cpu", replace(compiler, cxx=Path("/usr/bin/clang++"))).key)
    keys.append(recipe_for("cpu", replace(compiler, cc_version="cc 13.0.0")).key)
    keys.append(recipe_for("cpu", replace(compiler, macros="1" * 64)).key)
    monkeypatch.setenv("CXXFLAGS", "-g")
    keys.append(recipe_for("cpu", compiler).key)
    monkeypatch.delenv("CXXFLAGS")
    monkeypatch.setenv(cmake.EXTRA_VARIABLE, "-DGGML_LTO=ON")
    keys.append(recipe_for("cpu", compiler).key)
    monkeypatch.delenv(cmake.EXTRA_VARIABLE)
    assert recipe_for("cpu", compiler).key == keys[0]
    monkeypatch.setenv("PATH", str(tmp_path / "tools"), prepend=os.pathsep)
    tools = [
        ("cuda", "nvcc", "13.0"),
        ("cuda", "nvcc", "13.1"),
        ("cuda", "nvidia-smi", "8.9"),
        ("vulkan", "glslc", "1"),
    ]
    for backend, name, says in tools:
        put_tool(tmp_path / "tools", name, f"echo {says}")
        keys.append(recipe_for(backend, compiler).key)
    monkeypatch.setattr("hymoe.engine.build.host", lambda: "pdp-11")
    keys.append(recipe_for("cpu", compiler).key)
    monkeypatch.setattr(pin, "SHA256", "0" * 64)
    keys.append(recipe_for("cpu", compiler).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("[1/4] Building CXX object a.o", 25.0),
        ("[200/200] Linking CXX executable bin/x", 100.0),
        ("[0/0] nothing", None),
        ("note: [1/4] inside", None),
        ("ninja: no work to do.", None),
        ("-- Found Threads: TRUE", None),
    ],
)
def test_progress_is_read_from_ninja(line: str, percent: float | None) -> None:
    assert cmake.percent(line) == percent


def test_error_lines_are_the_ones_that_say_why() -> None:
    log = """[1/3] Building CXX object src/error.o
cc1plus -Werror=format -o check-error.o
src/a.cpp:3:2: warning: unused variable 'error' [-Wunused]
src/a.cpp:9:5: error: expected ';' before '}' token
CMake Error at CMakeLists.txt:7 (message):
  Vulkan is missing

ninja: build stopped: subcommand failed.
"""
    assert cmake.error_lines(log) == [
        "src/a.cpp:9:5: error: expected ';' before '}' token",
        "CMake Error at CMakeLists.txt:7 (message): Vulkan is missing",
        "ninja: build stopped: subcommand failed.",
    ]


def test_find_without_an_engine(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["path"]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == f"error: no engine in {cache}: nothing is built yet; run `hy-engine build`\n"


def test_find_passes_over_what_does_not_fit(cache: Path) -> None:
    fitting = {"source": installed.source_digest(), "host": installed.host()}
    for name, manifest in {"a": fitting | {"source": "0"}, "b": fitting | {"host": "pdp-11"}, "c.new": fitting}.items():
        (cache / name / "bin").mkdir(parents=True)
        (cache / name / installed.MANIFEST).write_text(json.dumps(manifest))
    (cache / "half").mkdir()
    (cache / "half" / installed.MANIFEST).write_text(json.dumps(fitting))
    (cache / "torn" / "bin").mkdir(parents=True)
    (cache / "torn" / installed.MANIFEST).write_text("{")
    with pytest.raises(EngineError, match="builds of other sources or processors only"):
        installed.find()
    (cache / "d" / "bin").mkdir(parents=True)
    (cache / "d" / installed.MANIFEST).write_text(json.dumps(fitting))
    assert installed.find().bin == cache / "d" / "bin"


def test_the_environment_names_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(installed.ENGINE_VARIABLE, str(tmp_path))
    assert installed.find().bin == tmp_path
    with pytest.raises(EngineError, match="has no llama-server"):
        installed.find().tool("llama-server")
    with pytest.raises(EngineError, match="has no library ggml-base"):
        installed.find().library("ggml-base")
    monkeypatch.setenv(installed.ENGINE_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(EngineError, match="which is no folder"):
        installed.find()
