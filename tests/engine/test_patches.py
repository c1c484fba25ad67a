"""The strict applier, and our own series on the pinned source."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from hymoe.engine import patches, source, toolchain
from hymoe.engine.installed import engine_root
from hymoe.errors import EngineError

TEXT = "one\ntwo\nthree\nfour\nfive\nsix\n"
GOOD = """Why it is there.
--- a/src/file.txt
+++ b/src/file.txt
@@ -2,2 +2,3 @@
 two
+two and a half
 three
@@ -5,2 +6,1 @@
-five
 six
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "file.txt").write_text(TEXT)
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    (folder / "patches").mkdir(parents=True)
    (folder / "new" / "src").mkdir(parents=True)
    return folder


def put(ours: Path, text: str, name: str = "0001-test") -> None:
    (ours / "patches" / f"{name}.patch").write_text(text)


def test_hunks_land_where_they_say(tree: Path, ours: Path) -> None:
    put(ours, GOOD)
    patches.apply(tree, ours)
    assert (tree / "src" / "file.txt").read_text() == "one\ntwo\ntwo and a half\nthree\nfour\nsix\n"


def test_a_patch_counts_lines_as_the_one_before_left_them(tree: Path, ours: Path) -> None:
    put(ours, GOOD)
    put(ours, "Why.\n--- a/src/file.txt\n+++ b/src/file.txt\n@@ -3,1 +3,1 @@\n-two and a half\n+2.5\n", "0002-next")
    patches.apply(tree, ours)
    assert (tree / "src" / "file.txt").read_text() == "one\ntwo\n2.5\nthree\nfour\nsix\n"


def test_new_files_are_copied(tree: Path, ours: Path) -> None:
    (ours / "new" / "src" / "own.cpp").write_text("int own;\n")
    (ours / "new" / "src" / "file.txt").write_text("replaced\n")
    patches.apply(tree, ours)
    assert (tree / "src" / "own.cpp").read_text() == "int own;\n"
    assert (tree / "src" / "file.txt").read_text() == "replaced\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD.replace(" three", " tree"),
            "patch 0001-test, src/file.txt: hunk at line 2 does not match line 3: got 'three', expected 'tree'",
        ),
        (GOOD.replace("-five", "-FIVE"), "hunk at line 5 does not match line 5: got 'five', expected 'FIVE'"),
        (GOOD.replace(" two\n", "  two\n"), "hunk at line 2 does not match line 2"),
        (GOOD.replace("@@ -2,2 +2,3", "@@ -3,2 +3,3"), "hunk at line 3 does not match line 3"),
        (GOOD.replace("@@ -5,2 +6,1", "@@ -6,2 +7,1"), "hunk at line 6 does not match line 6"),
        (GOOD.replace("@@ -5,2 +6,1", "@@ -70,2 +71,1"), "does not match line 70: got the end of the file"),
        (GOOD.replace("@@ -5,2 +6,1", "@@ -2,2 +3,1"), "hunk at line 2 overlaps the one before"),
        (GOOD.replace("src/file", "src/none"), "patch 0001-test, src/none.txt: got no such file in the source"),
        (
            GOOD.replace("src/file.txt", "../outside.txt"),
            "patch 0001-test, ../outside.txt: got a path outside the source",
        ),
        (GOOD.replace("a/src/file.txt", "/dev/null"), "src/file.txt: got a file that is added"),
        (
            "Why.\n--- a/src/file.txt\n+++ b/src/file.txt\n@@ -2,1 +2,1 @@\n-two\n+two\n",
            "src/file.txt: changes nothing",
        ),
        ("Why.\n--- a/src/file.txt\n+++ b/src/file.txt\n", "changes nothing"),
        ("Only words.\n", "patch 0001-test changes nothing"),
        (GOOD.replace("@@ -2,2 +2,3 @@", "@@ -2,9 +2,3 @@"), "patch 0001-test"),
        (GOOD.partition("\n")[2], "patch 0001-test: got no text above the diff"),
    ],
)
def test_what_does_not_fit_is_an_error_and_writes_nothing(tree: Path, ours: Path, text: str, says: str) -> None:
    (tree.parent / "outside.txt").write_text(TEXT)
    put(ours, text)
    with pytest.raises(EngineError) as caught:
        patches.apply(tree, ours)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tree / "src" / "file.txt").read_text() == TEXT
    assert (tree.parent / "outside.txt").read_text() == TEXT


def test_one_bad_file_keeps_the_whole_patch_out(tree: Path, ours: Path) -> None:
    put(ours, GOOD + GOOD.partition("\n")[2].replace("src/file.txt", "src/none.txt"))
    with pytest.raises(EngineError, match=r"src/none\.txt"):
        patches.apply(tree, ours)
    assert (tree / "src" / "file.txt").read_text() == TEXT


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("src/file.txt", TEXT, "changes nothing"),
        ("lib/own.cpp", "int own;\n", "got no folder for it in the source, expected lib/"),
    ],
)
def test_new_files_must_fit_as_well(tree: Path, ours: Path, name: str, content: str, says: str) -> None:
    (ours / "new" / name).parent.mkdir(exist_ok=True)
    (ours / "new" / name).write_text(content)
    with pytest.raises(EngineError) as caught:
        patches.apply(tree, ours)
    assert f"new file {name}" in str(caught.value)
    assert says in str(caught.value)


def test_the_digest_follows_names_and_contents(ours: Path) -> None:
    put(ours, GOOD)
    seen = {patches.digest(ours)}
    put(ours, GOOD.replace("half", "bit"))
    seen.add(patches.digest(ours))
    (ours / "patches" / "0001-test.patch").rename(ours / "patches" / "0002-test.patch")
    seen.add(patches.digest(ours))
    (ours / "new" / "src" / "own.cpp").write_text("int own;\n")
    seen.add(patches.digest(ours))
    assert len(seen) == 4


def test_every_change_has_a_row_in_the_readme() -> None:
    readme = (patches.FOLDER / "README.md").read_text()
    names = [f"patches/{patch.name}.patch" for patch in patches.series()]
    names += [f"new/{name.as_posix()}" for name in patches.new_files()]
    assert names
    assert [name for name in names if f"`{name}`" not in readme] == []


def test_the_stock_engine_has_nothing_of_ours_but_the_barrier() -> None:
    assert [patch.name for patch in patches.series(stock=True)] == ["0001-amx-tile-config"]
    assert patches.new_files(stock=True) == []
    assert patches.digest(stock=True) != patches.digest()


@pytest.mark.engine
@pytest.mark.parametrize("stock", [False, True])
def test_ours_apply_to_the_pinned_source(tmp_path: Path, stock: bool) -> None:
    source.extract(source.fetch(engine_root() / "sdist"), tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(source.NEEDED)
    patches.apply(tmp_path, stock=stock)
    for name in patches.new_files(stock=stock):
        assert (tmp_path / name).read_bytes() == (patches.FOLDER / "new" / name).read_bytes()
    mmq = (tmp_path / "ggml/src/ggml-cpu/amx/mmq.cpp").read_text()
    assert mmq.index("__asm__ volatile") < mmq.index("_tile_loadconfig(&tc)")


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is an instruction set of x86-64")
def test_the_barrier_keeps_the_tile_configuration(tmp_path: Path) -> None:
    """Read from the machine code, since few machines have AMX: what the 64 bytes hold when they are loaded."""
    compiler = toolchain.find_compiler().cxx
    stored = {}
    for name in ("patched", "pinned"):
        source.extract(source.fetch(engine_root() / "sdist"), tmp_path / name)
        if name == "patched":
            patches.apply(tmp_path / name)
        command: list[str | Path] = [
            compiler,
            "-std=gnu++17",
            "-O3",
            "-DNDEBUG",
            "-march=sapphirerapids",
            "-I.",
            "-I../include",
            "-Iggml-cpu",
        ]
        command += ["-S", "-o", "-", "ggml-cpu/amx/mmq.cpp"]
        done = subprocess.run(command, cwd=tmp_path / name / "ggml/src", capture_output=True, text=True, check=False)
        if "bad value" in done.stderr or "unknown target CPU" in done.stderr:
            pytest.skip(f"{compiler} cannot build for AMX")
        assert done.returncode == 0, done.stderr
        stored[name] = stores_before_the_load(done.stdout)
    assert {0, 16, 48} <= stored["patched"]  # palette, bytes per row, rows
    if stored["pinned"] >= stored["patched"]:
        pytest.skip(f"{compiler} does not have the defect: nothing to tell the patch from")


def stores_before_the_load(assembly: str) -> set[int]:
    """Offsets into the tile configuration that get a value in the block that ends in its load."""
    lines = assembly.splitlines()
    at = next(i for i, line in enumerate(lines) if "ldtilecfg" in line)
    base = int(re.findall(r"(-?\d+)\(%r", lines[at])[0])
    offsets = [re.findall(r"mov\w*\s+[^,]+, (-?\d+)\(%r[sb]p\)", line) for line in lines[at - 25 : at]]
    return {int(found[0]) - base for found in offsets if found and 0 <= int(found[0]) - base < 64}
