"""`hy-imatrix quality` against numpy on the engine's logits, and what it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import engine_eval
import numpy as np
import pytest
from numpy.typing import NDArray

from hymoe.convert import miniature
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec
from hymoe.engine.evaluator import Evaluator
from hymoe.imatrix import heldout
from hymoe.imatrix.cli import main
from hymoe.imatrix.plot import Point, svg
from hymoe.imatrix.weights import GgufWeights

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def coarse(mini_checkpoint: Path) -> Path:
    out = mini_checkpoint.with_name("Q3_K_M.gguf")
    convert(ConvertOptions(mini_checkpoint, out, "Q3_K_M"))
    return out


def run(*arguments: object) -> int:
    return main(["quality", "--threads", "1", *map(str, arguments)])


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    y = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    return result


def test_the_numbers_are_numpys(gguf: Path, coarse: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(gguf, coarse, gguf, "--tokens", 600, "--json") == 0
    found, same = (row["quality"] for row in json.loads(capfd.readouterr().out))
    with GgufWeights(gguf) as weights, Evaluator(gguf, n_ctx=2048, n_threads=1) as model:
        ids = heldout.tokens(model, heldout.documents((), weights.chat_template), 600)
    p, q = (
        [log_softmax(logits) for logits in engine_eval.evaluate(file, ids, n_ubatch=128)] for file in (gguf, coarse)
    )
    kl = np.concatenate([(np.exp(a) * (a - b)).sum(1) for a, b in zip(p, q, strict=True)])
    first = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(p, q, strict=True)])
    surprise = -np.concatenate([b[np.arange(len(i) - 1), i[1:]] for b, i in zip(q, ids, strict=True)])
    expected = {
        "mean": kl.mean(), "error": kl.std(ddof=1) / np.sqrt(len(kl)), "p99": np.quantile(kl, 0.99),
        "largest": kl.max(), "top1": first.mean(), "perplexity": np.exp(surprise.mean()), "n_tokens": len(kl),
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4)
    assert found["mean"] > 1e-4
    assert (same["largest"], same["top1"]) == (0.0, 1.0)


def test_a_table_and_a_plot(gguf: Path, coarse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    assert run(gguf, coarse, "--tokens", 300, "--plot", plot) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "size", "bits/weight", "mean", "KL", "±", "99", "%", "max", "top-1"]
    assert lines[1].split()[0] == "Q3_K_M.gguf"
    assert "Q3_K_M" in [node.text for node in ET.parse(plot).iter() if node.tag.endswith("text")]
    assert run(gguf, coarse, "--tokens", 300, "--perplexity") == 0
    assert capfd.readouterr().out.splitlines()[0].split()[-1] == "perplexity"
    assert run(gguf, coarse, "--plot", tmp_path / "plot.png") == 1
    assert "plot.png: got the ending '.png', expected .svg" in capfd.readouterr().err
    assert run(coarse, gguf, "--tokens", 300) == 0
    assert "warning: Q3_K_M.gguf has Q3_K, Q4_K, Q5_K, Q6_K: what a reference lost itself does not show" in (
        capfd.readouterr().err
    )
    nowhere = tmp_path / "nowhere"
    assert run(gguf, coarse, "--plot", nowhere / "plot.svg") == 1
    assert (said := capfd.readouterr()).out == ""
    assert f"no folder {nowhere}" in said.err
    assert run(gguf, coarse, "--work", nowhere) == 1
    assert f"error: {nowhere}: no place for the logits" in capfd.readouterr().err


def test_files_are_told_apart_however_narrow_it_is(
    gguf: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    names = [f"a-name-as-long-as-those-that-people-give-{i}.gguf" for i in range(2)]
    for name in names:
        (tmp_path / name).symlink_to(coarse)
    assert run(gguf, *(tmp_path / name for name in names), "--tokens", 300) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]] == names


def test_a_plot_holds_every_point_in_its_frame() -> None:
    series = {"a & b": [Point(2.0, 0.5, "<2>"), Point(4.5, 0.0, "zero")], "c": [Point(8.5, 3e-7, "")]}
    root = ET.fromstring(svg(series))
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 3
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    places = [(float(node.attrib["cx"]), float(node.attrib["cy"])) for node in circles]
    assert all(0 < x < width and 0 < y < height for x, y in places)
    assert places[0][1] < places[2][1] < places[1][1] + 60
    assert {node.text for node in root.iter()} >= {"a & b", "<2>"}


def test_other_models_and_texts(
    gguf: Path, mini_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deeper, words = tmp_path / "deeper.gguf", tmp_path / "words.gguf"
    convert(ConvertOptions(miniature.write(tmp_path / "a", Spec(n_layer=3, n_expert=5, n_expert_used=2)), deeper))
    more, shape = tmp_path / "more.gguf", Spec(n_layer=3, n_expert=4, n_expert_used=2)
    convert(ConvertOptions(miniature.write(tmp_path / "c", shape), more))
    assert run(gguf, more) == 1
    assert "more.gguf: another model: blk.2.attn_" in capfd.readouterr().err
    vocabulary = Spec(n_layer=2, n_expert=4, n_expert_used=2, n_rank=1700)
    convert(ConvertOptions(miniature.write(tmp_path / "b", vocabulary), words))
    assert run(gguf, deeper) == 1
    assert "deeper.gguf: another model: blk.0.ffn_gate_inp.weight: got [5, 256], expected [4, 256]" in (
        capfd.readouterr().err
    )
    assert run(gguf, words) == 1
    assert "words.gguf: another model: token_embd.weight: got [1910, 256]" in capfd.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert run(gguf, gguf, "--text", short) == 1
    assert "error: text: got" in (said := capfd.readouterr().err)
    assert "expected at least 256; give more --text" in said
    assert run(gguf, tmp_path / "none.gguf") == 1
    assert "none.gguf: no such file" in capfd.readouterr().err


def test_the_same_sizes_and_another_vocabulary(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the tokens themselves tell such a file: two of them change places."""
    raw = gguf.read_bytes()
    a, b = (len(word).to_bytes(8, "little") + word for word in ("Ġthe".encode(), "Ġand".encode()))
    assert raw.count(a) == raw.count(b) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(raw.replace(a, b"@" * len(a)).replace(b, a).replace(b"@" * len(a), b))
    assert run(gguf, other, "--tokens", 600) == 1
    assert "other.gguf: another vocabulary" in capfd.readouterr().err


def test_a_damaged_model(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(gguf.read_bytes())
    with GgufWeights(gguf) as weights:
        _, offset = weights.place("output_norm.weight")
    raw[offset : offset + 4] = np.float32(np.nan).tobytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(raw)
    for pair in ((bad, gguf), (gguf, bad)):
        assert run(*pair, "--tokens", 300) == 1
        assert "NaN or infinity in its logits; its weights are damaged" in capfd.readouterr().err
