"""Importance from hy-imatrix and from the stock llama-imatrix, on the same tokens; and each reads the other's files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from hymoe.imatrix import collect, files, model
from hymoe.imatrix.cli import main

pytestmark = [pytest.mark.engine, pytest.mark.stock]

N_CTX, N_CHUNKS = 512, 4


def run(stock: Path, *arguments: object) -> None:
    command = [str(stock / "llama-imatrix"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def pair(stock: Path, mini_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ours and stock's, of the calibration set in the model's template."""
    folder = tmp_path_factory.mktemp("pair")
    ours, theirs, text = folder / "ours.gguf", folder / "theirs.gguf", folder / "text.txt"
    chunks = ["--chunks", str(N_CHUNKS), "--threads", "1"]
    assert main(["collect", str(mini_gguf), "-o", str(ours), "--ctx", str(N_CTX), *chunks]) == 0
    text.write_text(collect.prepare(model.read(mini_gguf), ()).content, encoding="utf-8")
    options = ("-c", N_CTX, *chunks, "--parse-special", "--no-ppl")
    run(stock, "-m", mini_gguf, "-f", text, "-o", theirs, *options)
    return ours, theirs


def test_both_agree(pair: tuple[Path, Path]) -> None:
    ours, theirs = map(files.read, pair)
    assert set(ours.entries) == set(theirs.entries)
    assert (ours.n_chunks, ours.chunk_size) == (theirs.n_chunks, theirs.chunk_size) == (N_CHUNKS, N_CTX)
    for name, entry in theirs.entries.items():
        np.testing.assert_array_equal(ours.entries[name].counts, entry.counts)
        np.testing.assert_allclose(ours.entries[name].sums, entry.sums, rtol=1e-5)


def test_stock_reads_both_forms_of_ours_and_we_its_dat(
    stock: Path, mini_gguf: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, dat = pair[0], tmp_path / "ours.dat"
    assert main(["convert", str(ours), str(dat)]) == 0
    combine = ("-m", mini_gguf, "-c", N_CTX)
    run(stock, *combine, "--in-file", ours, "-o", tmp_path / "again.gguf")
    run(stock, *combine, "--in-file", ours, "-o", tmp_path / "again.dat", "--output-format", "dat")
    run(stock, *combine, "--in-file", dat, "-o", tmp_path / "from-dat.gguf")
    wanted = files.read(ours)
    for name in ("again.gguf", "again.dat", "from-dat.gguf"):
        found = files.read(tmp_path / name)
        assert set(found.entries) == set(wanted.entries)
        for tensor in wanted.entries:
            np.testing.assert_allclose(found.importance(tensor), wanted.importance(tensor), rtol=1e-6)
