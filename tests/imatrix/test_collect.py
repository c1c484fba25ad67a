"""hy-imatrix collect and repair through the engine, on tiny models; what the stock tool says is in tests/stock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from imatrix.reaching_model import FIRST, SECOND, text, write_reaching
from tiny_model import N_EXPERT, N_EXPERT_USED, N_LAYER, write_model

from hymoe import console
from hymoe.convert import miniature
from hymoe.convert.cli import main as hy_convert
from hymoe.imatrix import coverage, files, model, passes, repair
from hymoe.imatrix.cli import main
from hymoe.imatrix.files import Imatrix
from hymoe.runtime.process import death_signal

pytestmark = pytest.mark.engine

N_CTX = 64
CHUNK = ("--ctx", N_CTX, "--threads", 1)
# Saves after every chunk, so that an interruption has something to keep.
OFTEN = ("--", "--override-kv", "hymoe.imatrix.save_seconds=int:0")


def hy_imatrix(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def same(a: Imatrix, b: Imatrix) -> bool:
    return set(a.entries) == set(b.entries) and all(
        np.array_equal(entry.sums, b.entries[name].sums) and np.array_equal(entry.counts, b.entries[name].counts)
        for name, entry in a.entries.items()
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def reaching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reaching(tmp_path_factory.mktemp("reaching") / "reaching.gguf")


@pytest.fixture
def half(reaching: Path, tmp_path: Path) -> Path:
    """Collected on a text that reaches the first half of the experts."""
    return collected(reaching, tmp_path / "half", FIRST, 0)


def collected(gguf: Path, stem: Path, letters: str, seed: int) -> Path:
    words, out = stem.with_suffix(".txt"), stem.with_suffix(".gguf")
    words.write_text(text(letters, 40 * N_CTX, seed))
    assert hy_imatrix("collect", gguf, "-o", out, "--text", words, "--no-template", *CHUNK) == 0
    return out


def test_the_calibration_set_in_the_models_template(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    assert hy_imatrix("collect", tiny, "-o", out, "--chunks", 3, *CHUNK) == 0
    read = files.read(out)
    assert (read.n_chunks, read.chunk_size) == (3, N_CTX)
    assert read.datasets[0].endswith("calibration set")
    assert read.notes["hymoe.imatrix.template"] == "plain"
    assert read.notes["hymoe.imatrix.model_fingerprint"] == model.read(tiny).fingerprint()
    assert {layer.n_tokens for layer in coverage.layers(read)} == {3 * N_CTX}
    assert {layer.counts.sum() for layer in coverage.layers(read)} == {3 * N_CTX * N_EXPERT_USED}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.gguf"]


def test_an_output_is_not_replaced_unasked(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "i.gguf"
    out.write_bytes(b"precious")
    assert hy_imatrix("collect", tiny, "-o", out, *CHUNK) == 1
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"


def process(*arguments: object) -> subprocess.Popen[str]:
    program = "import sys; from hymoe.imatrix.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=death_signal(),  # noqa: PLW1509 - only system calls in it
    )


def interrupted(arguments: Sequence[object], part: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a collection and send it a signal as soon as something is saved, and noted as what."""
    child = process(*arguments)
    deadline = time.monotonic() + 120
    note = part.with_name(part.name + ".json")
    while not (part.exists() and note.stat().st_size):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child.pid, how)
    err = child.communicate(timeout=120)[1]
    return child.returncode, err


def settled(part: Path) -> None:
    """Wait until the tool of a killed parent is gone, too: it ends at its next line."""
    before = None
    while before != (before := part.stat().st_mtime_ns):
        time.sleep(0.3)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on(how: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    words, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    words.write_text(text(FIRST + SECOND, 1500 * N_CTX))
    command = ("collect", tiny, "-o", out, "--text", words, "--no-template", *CHUNK, *OFTEN)
    part = tmp_path / "i.gguf.part"
    status, err = interrupted(command, part, how)
    settled(part)
    assert status == (130 if how == signal.SIGINT else -how)
    assert ("chunks are kept; the same command goes on" in err) == (how == signal.SIGINT)
    assert "Traceback" not in err
    assert not out.exists()
    done = files.read(part).n_chunks
    assert 0 < done < 1500

    going_on = process(*command)
    err = going_on.communicate(timeout=300)[1]
    assert going_on.returncode == 0, err
    assert f"going on after {done} chunks" in err
    assert not part.exists()
    whole = tmp_path / "whole.gguf"
    assert hy_imatrix("collect", tiny, "-o", whole, *command[4:]) == 0
    assert same(files.read(out), files.read(whole))


def test_ctrl_c_interrupts_nothing_but_the_tool(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while we look at what the tool has said, not while we wait for more."""
    words, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    words.write_text(text(FIRST, 1500 * N_CTX))
    presses = iter((True,))

    def detail(line: str) -> None:
        if "done 3" in line and next(presses, False):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(console, "detail", detail)
    assert hy_imatrix("collect", tiny, "-o", out, "--text", words, "--no-template", *CHUNK) == 130
    done = files.read(tmp_path / "i.gguf.part").n_chunks
    assert 3 <= done < 1500
    assert f"{done} of 1500 chunks are kept; the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_run_of_something_else_is_refused_by_name(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    words.write_text(text(FIRST, 1500 * N_CTX))
    command = ["collect", tiny, "-o", out, "--text", words, "--no-template", *CHUNK]
    interrupted([*command, *OFTEN], tmp_path / "i.gguf.part", signal.SIGINT)
    assert hy_imatrix(*command) == 1
    assert "was begun with another engine argument: got none, expected --override-kv" in capsys.readouterr().err
    words.write_text(text(SECOND, 20 * N_CTX))
    assert hy_imatrix(*command, *OFTEN) == 1
    assert "was begun with another text" in capsys.readouterr().err
    assert hy_imatrix(*command, "--restart", *OFTEN) == 0
    assert files.read(out).n_chunks == 20


def test_nan_names_the_tensor(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes())
    for tensor in GGUFReader(broken, "r+").tensors:
        if tensor.name == "blk.1.ffn_norm.weight":
            tensor.data[3] = np.nan
    assert hy_imatrix("collect", broken, "-o", tmp_path / "i.gguf", "--chunks", 2, *CHUNK) == 1
    err = capsys.readouterr().err
    assert "error: " in err
    assert "NaN or infinity in what meets blk.1.ffn_" in err
    assert err.count("\n") <= 2  # one status line before it


def test_an_argument_that_the_tool_refuses(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was begun, so there is nothing to go on with."""
    assert hy_imatrix("collect", tiny, "-o", tmp_path / "i.gguf", *CHUNK, "--", "--nonsense") == 1
    assert "invalid argument: --nonsense; -v shows all it says\n" in capsys.readouterr().err


def test_text_that_is_no_text(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = tmp_path / "t.txt", tmp_path / "i.gguf"
    for content, says in {"": "got an empty file", "abc": "the text is too short: got 3 tokens, expected 64"}.items():
        words.write_text(content)
        assert hy_imatrix("collect", tiny, "-o", out, "--text", words, "--no-template", *CHUNK) == 1
        assert says in capsys.readouterr().err
    assert hy_imatrix("collect", tiny, "-o", out, "--text", tmp_path / "none", *CHUNK) == 1
    assert "none: No such file" in capsys.readouterr().err


def test_a_forced_pass_changes_no_hidden_state(reaching: Path, half: Path, tmp_path: Path) -> None:
    """Everything but the experts meets the same values, to the bit; every expert gets its share of tokens."""
    words = half.with_suffix(".txt")
    options = repair.RepairOptions(half, reaching, tmp_path / "r.gguf", text=(words,), n_ctx=N_CTX, threads=1)
    todo = repair._forced(options, files.read(half), model.read(reaching))
    plain = passes.Pass(reaching, todo.text, tmp_path / "p.gguf", N_CTX, options.n_chunks, threads=1)
    with passes.run(plain, restart=True) as natural, passes.run(todo, restart=True) as forced:
        assert set(natural.entries) == set(forced.entries)
        for name, (sums, counts) in natural.entries.items():
            if "_exps" in name:
                share = N_CTX * N_EXPERT_USED // N_EXPERT
                assert forced.entries[name].counts.tolist() == [options.n_chunks * share] * N_EXPERT
            else:
                np.testing.assert_array_equal(forced.entries[name].sums, sums)
                np.testing.assert_array_equal(forced.entries[name].counts, counts)


def test_repair_predicts_the_experts_that_the_text_did_not_reach(
    reaching: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files.read(half)
    for layer in coverage.layers(before):
        assert layer.below(1) == list(range(N_EXPERT // 2, N_EXPERT))
    true = collected(reaching, tmp_path / "true", SECOND, 1)
    fixed = tmp_path / "fixed.gguf"
    words = half.with_suffix(".txt")
    command = ("repair", half, "--model", reaching, "-o", fixed, "--text", words, *CHUNK, "--against", true)
    assert hy_imatrix(*command) == 0
    assert "all ones" in capsys.readouterr().out

    after = files.read(fixed)
    assert not any(map(after.n_empty, after.entries))
    assert after.notes["hymoe.imatrix.repaired_from"] == before.sha256
    lost = dict.fromkeys(range(N_EXPERT // 2, N_EXPERT), 0)
    names = {f"blk.{il}.ffn_{kind}_exps.weight" for il in range(N_LAYER) for kind in ("gate", "up", "down")}
    assert coverage.repaired(after) == dict.fromkeys(names, lost)
    for name, entry in before.entries.items():
        kept = entry.sums.reshape(len(entry.counts), -1)[entry.counts > 0]
        now = after.entries[name].sums.reshape(len(entry.counts), -1)[entry.counts > 0]
        np.testing.assert_array_equal(now, kept)
    for row in repair.agreement(after, files.read(true), coverage.FLOOR):
        assert row.n_matrices == N_LAYER * N_EXPERT // 2
        assert row.correlation > 0.3, row
        assert 1 - row.cosine < 0.8 * (1 - row.cosine_of_ones), row


def test_repair_knows_when_there_is_nothing_to_do(
    reaching: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out, dat = (
        collected(reaching, tmp_path / "whole", FIRST + SECOND, 2),
        tmp_path / "o.gguf",
        tmp_path / "h.dat",
    )
    assert hy_imatrix("repair", whole, "--model", reaching, "-o", out, *CHUNK) == 0
    assert "every expert met 128 tokens or more: nothing to repair" in capsys.readouterr().err
    assert same(files.read(out), files.read(whole))
    out.unlink()
    repair.repair(repair.RepairOptions(half, reaching, out, text=(half.with_suffix(".txt"),), n_ctx=N_CTX, threads=1))
    assert hy_imatrix("repair", out, "--model", reaching, "-o", tmp_path / "twice.gguf", *CHUNK) == 1
    assert "is repaired already" in capsys.readouterr().err
    assert hy_imatrix("convert", half, dat) == 0
    assert hy_imatrix("repair", dat, "--model", reaching, "-o", tmp_path / "d.gguf", *CHUNK) == 1
    assert "no counts of single experts" in capsys.readouterr().err


def test_repair_refuses_another_models_imatrix(
    reaching: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = files.read(half)
    out = tmp_path / "o.gguf"
    name = "blk.1.ffn_up_exps.weight"
    entry = read.entries[name]
    for changed, says in {
        name: (files.Entry(entry.sums[: len(entry.sums) // 2], entry.counts), f"slices for {name}, expected 4 × 64"),
        "blk.9.attn_q.weight": (entry, "got an entry for blk.9.attn_q.weight, expected the tensors of reaching.gguf"),
    }.items():
        other = tmp_path / "other.gguf"
        files.save(other, Imatrix("x", {**read.entries, changed: says[0]}, ("t",), 1, N_CTX))
        assert hy_imatrix("repair", other, "--model", reaching, "-o", out, *CHUNK) == 1
        assert says[1] in capsys.readouterr().err
        assert not out.exists()


def test_a_second_model_through_the_whole_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another seed, vocabulary and shape: collected, shown, repaired, quantized by type and by recipe, and compared."""
    spec = miniature.Spec(n_layer=2, n_expert=10, n_expert_used=2, n_rank=700, seed=11)
    checkpoint = miniature.write(tmp_path / "Second", spec)
    gguf, raw, fixed = tmp_path / "second.gguf", tmp_path / "i.gguf", tmp_path / "r.gguf"
    quantized, usage, png = tmp_path / "q.gguf", tmp_path / "usage.json", tmp_path / "map.png"
    assert hy_convert([str(checkpoint), str(gguf)]) == 0
    assert hy_imatrix("collect", gguf, "-o", raw, "--chunks", 4, *CHUNK) == 0
    assert hy_imatrix("show", raw, "--json", "--usage", usage, "--png", png) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [sum(layer["counts"]) for layer in shown["layers"]] == [4 * N_CTX * 2] * 2
    assert all(layer["below_floor"] for layer in shown["layers"])
    assert json.loads(usage.read_text())["n_expert_used"] == 2
    assert hy_imatrix("repair", raw, "--model", gguf, "-o", fixed, "--chunks", 8, *CHUNK) == 0
    assert not any(map(files.read(fixed).n_empty, files.read(fixed).entries))
    assert hy_convert([str(checkpoint), str(quantized), "--quant", "IQ2_XXS", "--imatrix", str(fixed)]) == 0
    assert "met no token" not in capsys.readouterr().err
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(quantized).tensors}
    assert types["blk.1.ffn_up_exps.weight"] == "IQ2_XXS"

    recipe, by_recipe = tmp_path / "recipe", tmp_path / "by-recipe.gguf"
    assert hy_imatrix("recipe", gguf, "--imatrix", fixed, "--bpw", 4.2, "-o", recipe, "--threads", 1) == 0
    made = ["--quant", "Q4_K_M", "--imatrix", str(fixed), "--recipe", str(recipe)]
    assert hy_convert([str(checkpoint), str(by_recipe), *made]) == 0
    capsys.readouterr()
    assert hy_imatrix("quality", gguf, by_recipe, quantized, "--json", "--tokens", 512, "--threads", 1) == 0
    ours, coarse = json.loads(capsys.readouterr().out)
    assert 4.0 < ours["bits_per_weight"] <= 4.2
    assert 0 < ours["quality"]["mean"] < coarse["quality"]["mean"]
