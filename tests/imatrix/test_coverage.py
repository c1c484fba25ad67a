"""What the counts say: tables, heatmaps, JSON, and a file that was repaired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hymoe.errors import ModelFileError
from hymoe.imatrix import coverage, files, heatmap
from hymoe.imatrix.cli import main
from hymoe.imatrix.coverage import Layer
from hymoe.imatrix.files import Entry, Imatrix

COUNTS = {0: [100, 100, 100, 100], 3: [0, 10, 90, 300]}
NOTES = {coverage.REPAIRED: ["blk.3.ffn_down_exps.weight 0:0 1:10", "blk.3.ffn_gate_exps.weight 0:0 1:10"]}


def layer(*counts: int) -> Layer:
    return Layer(0, sum(counts) // 2, np.array(counts))


def usage(counts: dict[int, list[int]], **more: dict[str, list[str]]) -> Imatrix:
    entries = {}
    for il, of_layer in counts.items():
        entries[f"blk.{il}.attn_q.weight"] = Entry(np.ones(2, np.float32), np.array([200]))
        for kind in ("gate", "down"):
            entries[f"blk.{il}.ffn_{kind}_exps.weight"] = Entry(np.ones(8, np.float32), np.array(of_layer))
    return Imatrix("x.gguf", entries, ("t",), 2, 100, notes=more.get("notes", {}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    files.save(tmp_path / "x.gguf", usage(COUNTS))
    return tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("counts", "gini"), [((5, 5, 5, 5), 0.0), ((0, 0, 0, 8), 0.75), ((1, 2, 3, 4), 0.25), ((0, 0), 0.0), ((7,), 0.0)]
)
def test_gini(counts: tuple[int, ...], gini: float) -> None:
    assert layer(*counts).gini == pytest.approx(gini)
    # its definition: half of the mean difference of all pairs, as a share of the mean
    pairs = np.abs(np.subtract.outer(counts, counts)).mean() / (2 * max(float(np.mean(counts)), 1e-9))
    assert layer(*counts).gini == pytest.approx(pairs)


def test_shares_and_gaps() -> None:
    of_layer = layer(10, 0, 60, 30)
    assert [of_layer.top_share(n) for n in (1, 2, 9)] == [0.6, 0.9, 1.0]
    assert of_layer.below(30) == [0, 1]
    assert of_layer.n_used == 2


def test_layers(file: Path) -> None:
    found = coverage.layers(files.read(file))
    assert {each.index: each.counts.tolist() for each in found} == COUNTS
    assert [(each.n_tokens, each.n_used) for each in found] == [(200, 2), (200, 2)]


def test_a_repaired_file_shows_what_was_measured() -> None:
    filled = {0: COUNTS[0], 3: [1, 10, 90, 300]}
    found = coverage.layers(usage(filled, notes=NOTES))
    assert found[1].counts.tolist() == COUNTS[3]


def test_what_was_repaired_survives_the_file(tmp_path: Path) -> None:
    files.save(tmp_path / "x.gguf", usage(COUNTS, notes=NOTES))
    read = files.read(tmp_path / "x.gguf")
    assert read.notes == NOTES
    assert coverage.repaired(read)["blk.3.ffn_down_exps.weight"] == {0: 0, 1: 10}
    assert coverage.repaired_note(coverage.repaired(read)) == NOTES[coverage.REPAIRED]


@pytest.mark.parametrize("line", ["blk.3.ffn_down_exps.weight 4:0", "blk.9.x 0:0", "blk.3.ffn_down_exps.weight a:b"])
def test_a_note_that_cannot_be(line: str) -> None:
    with pytest.raises(ModelFileError, match="repaired: got"):
        coverage.repaired(usage(COUNTS, notes={coverage.REPAIRED: [line]}))


def test_show(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["show", str(file), "--floor", "50", "--top", "1"]
    monkeypatch.setenv("COLUMNS", "100")
    assert main(command) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["0", "200", "100", "100", "100", "0.00", "25", "%", "0", "of", "4"]
    assert rows[2] == ["3", "200", "0", "50", "300", "0.61", "75", "%", "2", "of", "4"]
    assert rows[3:] == [["0", "▄▄▄▄"], ["3", "·▁▄█"]]
    assert "2 of 8 experts met fewer than 50 tokens: hy-imatrix repair fills them" in err
    assert "\x1b" not in out
    # A narrow terminal breaks lines itself; no digit is left out.
    monkeypatch.setenv("COLUMNS", "8")
    assert main(command) == 0
    assert capsys.readouterr().out == out


def test_json_usage_and_png(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, exported = tmp_path / "x.png", tmp_path / "u.json"
    assert main(["show", str(file), "--json", "--floor", "50", "--png", str(png), "--usage", str(exported)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layers"][1]["below_floor"] == [0, 1]
    assert shown["tokens"] == 200
    found = json.loads(exported.read_text())
    assert [each["usage"] for each in found["layers"]] == [[0.5] * 4, [0.0, 0.05, 0.45, 1.5]]
    assert found["n_expert_used"] == 2
    with Image.open(png) as image:
        colours = [
            [image.getpixel((heatmap.MARGIN + e * heatmap.CELL + 3, heatmap.MARGIN + row * heatmap.CELL + 3))
             for e in range(4)] for row in range(2)
        ]  # fmt: skip
    assert colours[0] == [heatmap.COLOURS[1]] * 4
    assert colours[1][:2] == [heatmap.TOO_FEW] * 2
    assert colours[1][3] == heatmap.COLOURS[2]


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Path) -> None:
    assert main(["convert", str(file), str(tmp_path / "x.dat")]) == 0
    assert main(["show", str(tmp_path / "x.dat")]) == 1
    assert "a .dat file has no counts of single experts; collect a GGUF file" in capsys.readouterr().err
    assert main(["show", str(file), "--png", str(tmp_path / "none" / "x.png")]) == 1
    assert "x.png: cannot be written: got No such file or directory" in capsys.readouterr().err
