"""Building the engine: once per source, flags, compiler and processor, in a folder that other checkouts find again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hymoe import console
from hymoe.engine import cmake, patches, pin, smoke, source, toolchain
from hymoe.engine.installed import MANIFEST, Engine, engine_root, host, manifest_of, source_digest
from hymoe.errors import EngineError

KEY_DIGITS: Final = 20
FLAG_VARIABLES: Final = (
    *("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDAARCHS", "VULKAN_SDK"),
)


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    backend: auto, cpu, cuda or vulkan. jobs: compiler processes at a time, None for as many as fit.
    force: build even what is there. bindings: install llama-cpp-python into the running environment as well.
    stock: build the unchanged peer of tests and benchmarks (of our changes only those it cannot run without).
    """

    backend: str = "auto"
    jobs: int | None = None
    force: bool = False
    bindings: bool = True
    stock: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of a build."""

    source: str  # source_digest()
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]  # what CMake reads there
    backend: str
    compilers: tuple[tuple[str, str], ...]  # path and version
    macros: str
    host: str  # host(), which `find` asks for
    tools: tuple[tuple[str, str], ...]  # toolchain.backend_tools()

    @property
    def key(self) -> str:
        """Name of the build's folder in the cache."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def build(options: BuildOptions) -> Engine:
    """Make the engine ready to use and give it; a build that is there already is taken as it is.

    Raises EngineError for a missing compiler, room, download or backend, a failed build or a failed smoke run:
    nothing that looks finished is left behind.
    """
    if options.jobs is not None and options.jobs < 1:
        raise EngineError("--jobs", got=options.jobs, expected="1 or more")
    compiler = toolchain.find_compiler()
    try:
        entry = _chosen(compiler, options)
    except cmake.CompileError as exc:
        for line in exc.details:
            console.status(f"  {line}")
        raise
    os.utime(entry / MANIFEST)  # `find` takes the engine that was asked for last
    engine = Engine(entry / "bin", manifest_of(entry) or {})
    if options.bindings and not options.stock:
        from hymoe.engine import bindings

        bindings.install(engine_root() / "sdist")
    return engine


def _chosen(compiler: toolchain.Compiler, options: BuildOptions) -> Path:
    """Give the folder of the build asked for; where auto finds a backend that does not build, of the processor's."""
    recipe = recipe_for(toolchain.choose_backend(options.backend), compiler, stock=options.stock)
    if options.backend != "auto" or recipe.backend == "cpu":
        return _made(recipe, compiler, options)
    # `make test` builds as well: it must not spend minutes on the same failure each time
    reason = "as before"
    if options.force or not _unfit(recipe).exists():
        try:
            return _made(recipe, compiler, options)
        except cmake.CompileError as exc:
            _unfit(recipe).touch()
            reason = exc.reason
    console.warn(
        f"{recipe.backend} does not build here ({reason}; the log is {_log(recipe)}): "
        f"building for the processor alone; `hy-engine build --backend {recipe.backend}` tries again"
    )
    return _made(recipe_for("cpu", compiler, stock=options.stock), compiler, options)


def _made(recipe: Recipe, compiler: toolchain.Compiler, options: BuildOptions) -> Path:
    """Give the recipe's folder in the cache, made where it is not there yet."""
    entry = engine_root() / recipe.key
    begun = time.time_ns()
    if options.force or not manifest_of(entry):
        toolchain.check_room(engine_root(), recipe.backend)
        with _alone(engine_root() / "lock"):
            if not _made_since(entry, begun if options.force else 0):
                _make(recipe, compiler, entry, options)
    return entry


def recipe_for(backend: str, compiler: toolchain.Compiler, *, stock: bool = False) -> Recipe:
    """Say what a build for `backend` by `compiler` is made of."""
    return Recipe(
        source=source_digest(stock=stock),
        flags=tuple(cmake.flags(backend)),
        environment=tuple((name, os.environ[name]) for name in FLAG_VARIABLES if os.environ.get(name)),
        backend=backend,
        compilers=((str(compiler.cxx), compiler.version), (str(compiler.cc), compiler.cc_version)),
        macros=compiler.macros,
        host=host(),
        tools=toolchain.backend_tools(backend),
    )


def _log(recipe: Recipe) -> Path:
    return engine_root() / "logs" / f"{recipe.key}.log"


def _unfit(recipe: Recipe) -> Path:
    """The mark of a recipe that auto has tried in vain."""
    return _log(recipe).with_suffix(".unfit")


def _made_since(entry: Path, moment: int) -> bool:
    """Say whether another process has finished this very build after `moment` (ns since the epoch)."""
    return manifest_of(entry) is not None and (entry / MANIFEST).stat().st_mtime_ns > moment


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One build at a time: wait for the other, with a line that says so."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.status("another build is running; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(recipe: Recipe, compiler: toolchain.Compiler, entry: Path, options: BuildOptions) -> None:
    # One place for every build: compiler caches recognise sources by path, and the lock keeps builds apart.
    scratch = engine_root() / "scratch"
    jobs = options.jobs or toolchain.default_jobs()
    sdist = source.fetch(engine_root() / "sdist")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        source.extract(sdist, scratch / "source")
        patches.apply(scratch / "source", stock=options.stock)
        manifest = _manifest(recipe, compiler, stock=options.stock)
        begun = time.monotonic()
        cmake.compile_tree(
            scratch / "source",
            scratch / "build",
            arguments=[*compiler.arguments, *recipe.flags],
            targets=cmake.TARGETS if options.stock else (*cmake.TARGETS, *cmake.OUR_TARGETS),
            jobs=jobs,
            log=_log(recipe),
            label=f"building the engine ({recipe.backend}, {jobs} {'job' if jobs == 1 else 'jobs'})",
        )
        seconds = round(time.monotonic() - begun)
        # tried where it has not been built: a library that is still looked for in the build folder shows here
        (scratch / "build" / "bin").rename(scratch / "bin")
        shutil.rmtree(scratch / "build")
        console.status("trying the engine on a tiny model")
        smoke.run(Engine(scratch / "bin", {}), scratch)
        _install(scratch / "bin", entry, manifest | {"build_seconds": seconds})
        _unfit(recipe).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _manifest(recipe: Recipe, compiler: toolchain.Compiler, *, stock: bool) -> dict[str, Any]:
    return {
        "key": recipe.key,
        "source": recipe.source,
        "sdist": {"package": pin.PACKAGE, "version": pin.VERSION, "sha256": pin.SHA256},
        "llama.cpp": {"version": pin.LLAMA_CPP_VERSION, "commit": pin.LLAMA_CPP_COMMIT},
        "patches": {patch.name: patch.why for patch in patches.series(stock=stock)},
        "new_files": [file.as_posix() for file in patches.new_files(stock=stock)],
        "backend": recipe.backend,
        "flags": list(recipe.flags),
        "environment": dict(recipe.environment),
        "compiler": {"path": str(compiler.cxx), "version": compiler.version},
        "c_compiler": {"path": str(compiler.cc), "version": compiler.cc_version},
        "instruction_set": {"names": list(compiler.isa), "macros_sha256": compiler.macros},
        "host": recipe.host,
        "backend_tools": dict(recipe.tools),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _install(binaries: Path, entry: Path, manifest: dict[str, Any]) -> None:
    """Move a finished build into place: the folder appears whole, or not at all."""
    fresh = entry.with_suffix(".new")
    old = entry.with_suffix(".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    binaries.rename(fresh / "bin")
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if entry.exists():
        entry.rename(old)
    fresh.rename(entry)
    shutil.rmtree(old, ignore_errors=True)
