"""--verify: what is right passes in every type, what is wrong is found, and by name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from interruptible import interrupt, run

from hymoe import engine
from hymoe.convert import miniature, verify
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec

SPEC = Spec(
    n_layer=2, n_embd=256, n_head=2, n_head_kv=1, head_dim=128, n_ff=256, n_expert=4, n_expert_used=2, n_rank=300
)
# ggml makes its tables for the types of one bit in 20 seconds.
QUANTIZED = [pytest.param(name, marks=[pytest.mark.long] * name.startswith("IQ1")) for name in verify.TYPICAL]
Array = np.ndarray[Any, np.dtype[Any]]
Damaged = Callable[[str], tuple[Path, GGUFReader]]
EXACT_LINE = r"blk\.\*\.attn_norm\.weight +BF16 +F32 +exact +0 *"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("verify") / "in", SPEC)


@pytest.fixture(scope="module")
def files(folder: Path) -> Path:
    """A folder of right files: one for each type that is asked for."""
    (folder.parent / "right").mkdir()
    return folder.parent / "right"


def right(folder: Path, files: Path, quant: str) -> Path:
    out = files / f"{quant}.gguf"
    if not out.exists():
        assert main([str(folder), str(out), "--quant", quant, "-q"]) == 0
    return out


@pytest.fixture
def damaged(folder: Path, files: Path, tmp_path: Path) -> Damaged:
    """Gives a copy of a right file of some type, open for changes."""

    def copy(quant: str) -> tuple[Path, GGUFReader]:
        out = Path(shutil.copy(right(folder, files, quant), tmp_path / "out.gguf"))
        return out, GGUFReader(out, "r+")

    return copy


def tensor(reader: GGUFReader, name: str) -> Array:
    """The bytes of a tensor in the file, [n_expert, …] or [n_rows, …]."""
    found = next(each for each in reader.tensors if each.name == name)
    data: Array = reader.data[found.data_offset : found.data_offset + found.n_bytes]
    return data.reshape(*found.shape[::-1][:-1].tolist(), -1)


def fails(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *parts: str) -> str:
    """Verifying must fail with one line that has all parts; gives what stdout had."""
    capsys.readouterr()
    assert main([str(folder), str(out), "--verify"]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    return captured.out


@pytest.mark.parametrize(
    "quant", ["F32", "F16", "BF16", *(pytest.param(q, marks=pytest.mark.engine) for q in ("Q8_0", "Q4_K_M", "Q2_K"))]
)
def test_right_files_pass(quant: str, folder: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = right(folder, files, quant)
    before = out.stat().st_mtime_ns
    assert main([str(folder), str(out), "--verify"]) == 0
    captured = capsys.readouterr()
    assert re.search(EXACT_LINE, captured.out)
    line = next(line for line in captured.out.splitlines() if "ffn_up_exps" in line)
    if quant in ("F32", "BF16"):
        assert line.split()[1:] == ["BF16", quant, "exact", "0"]
    else:
        kind = {"Q4_K_M": "Q4_K", "Q2_K": "Q2_K", "F16": "F16"}.get(quant, "Q8_0")
        assert line.split()[1:3] == ["BF16", kind]
        if quant != "F16":  # which holds nearly all of these BF16 values exactly
            assert float(line.split()[3]) == pytest.approx(verify.TYPICAL[kind], rel=0.15)
        assert 0 < float(line.split()[4]) < 0.1
    assert captured.err == f"{out.name}: every tensor is what the checkpoint says, within its type\n"
    assert out.stat().st_mtime_ns == before


def test_errors_are_those_of_the_weights(folder: Path, files: Path) -> None:
    """The table's numbers, from gguf-py's values and in float64."""
    from hymoe.convert.convert import verify as verify_file

    out = right(folder, files, "F16")
    source = {each.name: each.data for each in GGUFReader(right(folder, files, "F32")).tensors}
    tally = verify_file(folder, out)
    for (kind, _, qtype), error in tally.kinds.items():
        pattern = re.escape(kind).replace(r"blk\.\*", r"blk\.\d+")
        found = [each for each in GGUFReader(out).tensors if re.fullmatch(pattern, each.name)]
        was = np.concatenate([source[each.name].astype(np.float64).reshape(-1) for each in found])
        now = np.concatenate([dequantize(each.data, each.tensor_type).astype(np.float64).reshape(-1) for each in found])
        assert {each.tensor_type.name for each in found} == {qtype}
        assert error.count == was.size
        assert error.largest == np.abs(was - now).max()
        assert error.relative == pytest.approx(np.sqrt(np.square(was - now).sum() / np.square(was).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16"])
def test_rounding_passes(dtype: miniature.DType, quant: str, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = miniature.write(tmp_path / "in", replace(SPEC, dtype=dtype, n_layer=1))
    assert main([str(folder), str(tmp_path / "out.gguf"), "--quant", quant, "--verify", "-q"]) == 0


@pytest.mark.parametrize(
    "quant", ["F32", "BF16", *(pytest.param(q, marks=pytest.mark.engine) for q in ("Q8_0", "Q4_K_S", "Q2_K"))]
)
@pytest.mark.parametrize("kind", ["gate", "up", "down"])
def test_swapped_experts(
    kind: str, quant: str, folder: Path, damaged: Damaged, capsys: pytest.CaptureFixture[str]
) -> None:
    out, reader = damaged(quant)
    data = tensor(reader, f"blk.1.ffn_{kind}_exps.weight")
    data[[1, 3]] = data[[3, 1]]
    reader.data.flush()
    expert = f"model.layers.1.mlp.experts.1.{kind}_proj.weight"
    fails(capsys, folder, out, f"blk.1.ffn_{kind}_exps.weight, rows 0 to 255 of {expert} (model.safetensors): wrong we")


@pytest.mark.parametrize("bit", range(16))
def test_one_flipped_bit(bit: int, folder: Path, damaged: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    out, reader = damaged("BF16")
    data = tensor(reader, "blk.0.attn_q.weight")
    data[17, 10 + bit // 8] ^= 1 << bit % 8
    reader.data.flush()
    fails(
        capsys,
        folder,
        out,
        "blk.0.attn_q.weight, rows 0 to 255 of model.layers.0.self_attn.q_proj.weight",
        "nearest BF16",
    )


@pytest.mark.engine
@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_wrong_scale(
    factor: float, quant: str, folder: Path, damaged: Damaged, capsys: pytest.CaptureFixture[str]
) -> None:
    out, reader = damaged(quant)
    block = {"Q8_0": 34, "Q4_0": 18}[quant]
    expert = tensor(reader, "blk.0.ffn_up_exps.weight")[2]
    scales = expert.reshape(-1, block)[:, :2]
    scales[:] = (scales.copy().view(np.float16) * np.float16(factor)).view(np.uint8)
    reader.data.flush()
    fails(
        capsys,
        folder,
        out,
        "blk.0.ffn_up_exps.weight",
        "experts.2.up_proj",
        "got a relative RMS error of ",
        "at most 0.",
    )


def test_several_faults_and_the_table(folder: Path, damaged: Damaged, capsys: pytest.CaptureFixture[str]) -> None:
    out, reader = damaged("BF16")
    for name in ("blk.0.attn_k.weight", "blk.1.attn_k.weight", "output_norm.weight"):
        tensor(reader, name)[..., 0] ^= 0x7
    reader.data.flush()
    table = fails(capsys, folder, out, "output_norm.weight", "(2 more tensors are wrong)")
    assert re.search(EXACT_LINE, table)
    assert not re.search(r"attn_k.weight +BF16 +BF16 +exact", table)


def test_another_checkpoint(folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    out = right(folder, files, "BF16")
    other = miniature.write(tmp_path / "seed", replace(SPEC, seed=1))
    fails(capsys, other, out, "token_embd.weight")
    wider = miniature.write(tmp_path / "wide", replace(SPEC, n_expert=5))
    fails(capsys, wider, out, "shape of blk.0.ffn_gate_inp.weight: got [4, 256], expected [5, 256]")
    deeper = miniature.write(tmp_path / "deep", replace(SPEC, n_layer=3))
    fails(capsys, deeper, out, "blk.2.attn_norm.weight: got no such tensor")
    shallow = miniature.write(tmp_path / "shallow", replace(SPEC, n_layer=1))
    fails(capsys, shallow, out, "blk.1.attn_norm.weight: got a tensor, expected none, as in the checkpoint")


@pytest.mark.parametrize("keep", [0, 3, 24, 1000, 5000, -1])
def test_truncated_or_no_gguf(
    keep: int, folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(right(folder, files, "BF16").read_bytes()[:keep])
    assert fails(capsys, folder, out, "out.gguf: no GGUF, or a damaged one") == ""
    out.write_bytes(b"something else altogether, long enough to be read")
    assert fails(capsys, folder, out, "out.gguf: no GGUF, or a damaged one") == ""


def test_split_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name of the whole or of the first part; with a part too few it fails."""
    assert main([str(folder), str(tmp_path / "m.gguf"), "--split-max-size", "1M", "--verify"]) == 0
    table = capsys.readouterr().out
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2
    for name in ("m.gguf", parts[0].name):
        assert main([str(folder), str(tmp_path / name), "--verify"]) == 0
        assert capsys.readouterr().out == table
    fails(capsys, folder, parts[1], "one of ", "expected the first: a name that ends in -00001-of-")
    parts[-1].unlink()
    fails(capsys, folder, tmp_path / "m.gguf", f"{parts[-1].name}: no such file")


def test_which_of_the_two_it_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An OUT that is not there is written; one that is there is only compared, unless something asks for a new one."""
    out = tmp_path / "out.gguf"
    assert main([str(folder), str(out), "--verify"]) == 0
    first = out.stat()
    written = capsys.readouterr()
    assert "out.gguf: " in written.err
    assert main([str(folder), str(out), "--verify"]) == 0
    assert capsys.readouterr().out == written.out
    assert out.stat().st_mtime_ns == first.st_mtime_ns
    assert main([str(folder), str(out), "--verify", "--quant", "BF16"]) == 1
    assert "out.gguf exists; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert main([str(folder), str(out), "--verify", "--overwrite"]) == 0
    assert out.stat().st_ino != first.st_ino


def test_fault_while_writing_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    status, out, err = run([folder, tmp_path / "out.gguf", "--verify", "-q"], piece=1 << 16, flip=30)
    assert status == 1
    assert out == ""
    assert re.fullmatch(
        r"error: out\.gguf: blk\.0\.[\w.]+, rows .*: wrong weights: got .* for .*, expected the near.*\n", err
    )
    assert list(tmp_path.iterdir()) == []
    # The same without --verify goes unnoticed: it was the comparison that found it.
    assert run([folder, tmp_path / "out.gguf", "-q"], piece=1 << 16, flip=30)[0] == 0


def test_interrupted_verifying_counts_everything_once(folder: Path, tmp_path: Path) -> None:
    pace = {"piece": 1 << 16, "pace": 0.02, "sync": 0.03}
    _, table, _ = run([folder, tmp_path / "whole.gguf", "--quant", "F16", "--verify"], piece=1 << 16)
    for options in (["--verify"], []):  # begun with it or without, continued with it
        out = tmp_path / f"out{len(options)}.gguf"
        status, err = interrupt([folder, out, "--quant", "F16", *options], 0.3, signal.SIGINT, **pace)
        assert status == 130, err
        status, found, err = run([folder, out, "--quant", "F16", "--verify"], piece=1 << 16)
        assert status == 0, err
        assert ("continuing: " in err) == bool(options)
        assert found == table
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# -- the numbers ------------------------------------------------------------------------------------------------------


def quantized(name: str, values: Array) -> Array:
    from hymoe.engine.bindings import quantize_rows

    importance = np.ones(values.shape[1], np.float32)
    return quantize_rows(values, GGMLQuantizationType[name], importance=importance)


@pytest.mark.engine
@pytest.mark.parametrize("name", QUANTIZED)
def test_typical_errors_are_ggmls(name: str) -> None:
    """The table, measured again; and whatever distribution weights have, the right ones pass and unrelated do not.

    gguf-py's own code decodes the same.
    """
    from hymoe.engine.bindings import dequantize_rows

    chance, qtype = np.random.default_rng(5), GGMLQuantizationType[name]
    shape = (16, 1024)
    distributions = {
        "normal": chance.standard_normal(shape),
        "uniform": chance.uniform(-1, 1, shape),
        "laplace": chance.laplace(size=shape),
        "outliers": chance.standard_normal(shape) * np.where(chance.random(shape) < 0.002, 40, 1),
        "shifted": chance.standard_normal(shape) + 0.5,
    }
    for kind, drawn in distributions.items():
        values = (0.02 * drawn).astype(np.float32)
        written = quantized(name, values)
        finding = verify.compare(values.copy(), written, qtype)
        assert finding.fault is None, (kind, finding)
        decoded = dequantize_rows(written, qtype, shape[1])
        np.testing.assert_array_equal(decoded, dequantize(written, qtype).reshape(shape))
        if kind == "normal":
            assert finding.error.relative == pytest.approx(verify.TYPICAL[name], rel=0.05)
        other = values[::-1].copy()
        assert verify.compare(other, written, qtype).fault is not None, kind
    with pytest.raises(ValueError, match="1024 elements"):
        dequantize_rows(written[:, 1:], qtype, shape[1])


@pytest.mark.engine
def test_zeros_and_weights_that_are_next_to_nothing() -> None:
    """Zeros must stay zeros; what is lost in the scale's smallest step is the type's doing."""
    name, qtype = "Q4_K", GGMLQuantizationType.Q4_K
    zeros = np.zeros((4, 256), np.float32)
    assert verify.compare(zeros.copy(), quantized(name, zeros), qtype).fault is None
    ones = quantized(name, zeros + 1)
    assert verify.compare(zeros.copy(), ones, qtype).fault is not None
    tiny = 1e-9 * np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    finding = verify.compare(tiny.copy(), quantized(name, tiny), qtype)
    assert finding.fault is None
    assert finding.error.relative > 0.9


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_nearest_and_no_other(name: str) -> None:
    """Every float of 16 bits that is a number: right as it is, and found wrong one step away in either direction."""
    kind = GGMLQuantizationType[name]
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    decode = verify.FLOATS[name][1]
    bits = bits[np.isfinite(decode(bits)) & (np.abs(decode(bits)) > 0)]
    values = decode(bits).reshape(1, -1)
    assert verify.compare(values.copy(), bits.view(np.uint8), kind).fault is None
    for wrong in (bits + np.uint16(1), bits - np.uint16(1), bits ^ np.uint16(0x8000)):
        for at in (0, 1, 100, len(bits) // 2, len(bits) - 1):
            changed = bits.copy()
            changed[at] = wrong[at]
            assert verify.compare(values.copy(), changed.view(np.uint8), kind).fault is not None
    # Halfway between two numbers either is right; a little off, only one is.
    low, high = np.uint16(0x3C01), np.uint16(0x3C02)
    a, b = (float(decode(np.array([each], np.uint16))[0]) for each in (low, high))
    for value, right_ones in (((a + b) / 2, {low, high}), ((a + b) / 2 * (1 + 1e-6), {high})):
        for written in (low, high):
            finding = verify.compare(np.array([[value]], np.float32), np.array([written]).view(np.uint8), kind)
            assert (finding.fault is None) == (written in right_ones)


@pytest.mark.engine
def test_files_of_llama_quantize(folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = engine.find().tool("llama-quantize")
    for quant in ("Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_S"):
        out = tmp_path / f"{quant}.gguf"
        command = [tool, right(folder, files, "BF16"), out, quant, "1"]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(engine.find().bin)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        assert main([str(folder), str(out), "--verify"]) == 0
        assert "ffn_down_exps" in capsys.readouterr().out
