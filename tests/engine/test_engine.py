"""The built engine: the smoke run, the tools, files it refuses, the quantizer, the bindings."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from hymoe.engine import bindings, cmake, find, smoke
from hymoe.engine.cli import main

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("smoke") / "model.gguf"
    smoke.write_model(file)
    return file


def edited(model: Path, to: Path, changes: dict[str, Any]) -> Path:
    """A copy of `model` with scalar metadata overwritten in place."""
    to.write_bytes(model.read_bytes())
    reader = GGUFReader(to, "r+")
    for key, value in changes.items():
        field = reader.fields[f"hunyuan-moe.{key}"]
        field.parts[field.data[0]][0] = value
    del reader
    return to


def bench(model: Path) -> subprocess.CompletedProcess[str]:
    options = ["-v", "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-o", "json"]
    command: list[str | Path] = [find().tool("llama-bench"), "-m", model, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_smoke_run_passes(tmp_path: Path) -> None:
    smoke.run(find(), tmp_path)


def test_all_tools_are_there_and_start() -> None:
    engine = find()
    for name in cmake.TARGETS:
        done = subprocess.run([engine.tool(name), "--help"], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), name
        assert "usage" in (done.stdout + done.stderr).lower(), name


def test_info_tells_what_the_engine_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert f"folder:           {find().bin}" in said.out
    assert "devices:" in said.out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expert_used_count": 9}, "hunyuan-moe.expert_used_count is 9: expected 1 to expert_count, which is 4"),
        ({"expert_used_count": 0}, "hunyuan-moe.expert_used_count is 0: expected 1"),
        ({"block_count": 0}, "hunyuan-moe.block_count is 0: expected 1 to 512"),
        ({"block_count": 100000}, "hunyuan-moe.block_count is 100000: expected 1 to 512"),
        (
            {"attention.key_length": 63, "attention.value_length": 63},
            "hunyuan-moe.attention.key_length is 63: expected an even number",
        ),
        ({"attention.key_length": 0}, "hunyuan-moe.attention.key_length is 0: expected 2 or more"),
        (
            {"attention.layer_norm_rms_epsilon": float("nan")},
            "hunyuan-moe.attention.layer_norm_rms_epsilon is nan: expected 0 or more",
        ),
        ({"attention.value_length": 32}, "hunyuan-moe.attention.value_length is 32: expected 64"),
        (
            {"expert_shared_feed_forward_length": 0},
            "hunyuan-moe.expert_shared_feed_forward_length is 0: expected 1 or more",
        ),
        ({"expert_feed_forward_length": 0}, "hunyuan-moe.expert_feed_forward_length is 0: expected 1 or more"),
        (
            {"attention.head_count_kv": 3},
            "hunyuan-moe.attention.head_count_kv is 3: expected a divisor of head_count, which is 4",
        ),
    ],
)
def test_files_it_cannot_run_are_load_errors(model: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    done = bench(edited(model, tmp_path / "bad.gguf", changes))
    assert done.returncode == 1, done.stderr  # no abort
    assert says in done.stderr


def test_the_width_of_experts_is_their_own(model: Path, tmp_path: Path) -> None:
    assert bench(edited(model, tmp_path / "other.gguf", {"feed_forward_length": 1024})).returncode == 0


def test_q8_0_rows_are_gguf_pys_bit_for_bit() -> None:
    rng = np.random.default_rng(7)
    data = rng.standard_normal((33, 512), dtype=np.float32)
    data[3] = 0
    data[4] *= 1e-30
    data[5, :7] *= 1e4
    ours = bindings.quantize_rows(data, GGMLQuantizationType.Q8_0)
    assert ours.dtype == np.uint8
    assert ours.shape == (33, 512 // 32 * 34)
    np.testing.assert_array_equal(ours, gguf.quants.quantize(data, GGMLQuantizationType.Q8_0))
    np.testing.assert_array_equal(ours[::2], bindings.quantize_rows(data[::2], GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("qtype", [GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.IQ4_XS])
def test_other_types_come_back_close(qtype: GGMLQuantizationType) -> None:
    data = np.random.default_rng(1).standard_normal((4, 512), dtype=np.float32)
    back = gguf.quants.dequantize(bindings.quantize_rows(data, qtype), qtype)
    assert np.sqrt(np.mean((back - data) ** 2)) < 0.1


def test_types_that_need_importance_take_it() -> None:
    data = np.random.default_rng(1).standard_normal((2, 256), dtype=np.float32)
    with pytest.raises(ValueError, match="IQ2_XXS cannot be made without importance"):
        bindings.quantize_rows(data, GGMLQuantizationType.IQ2_XXS)
    with pytest.raises(ValueError, match=r"importance is float32 \[256\], got float32 \[128\]"):
        bindings.quantize_rows(data, GGMLQuantizationType.IQ2_XXS, importance=np.ones(128, np.float32))
    made = bindings.quantize_rows(data, GGMLQuantizationType.IQ2_XXS, importance=np.ones(256, np.float32))
    assert np.mean((gguf.quants.dequantize(made, GGMLQuantizationType.IQ2_XXS) - data) ** 2) < 0.5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (np.zeros((2, 31), np.float32), "31 elements is no multiple of Q8_0's block of 32"),
        (np.zeros(32, np.float32), r"takes float32 \[n_rows, n_per_row\], got float32 \[32\]"),
        (np.zeros((2, 32), np.float64), "got float64"),
    ],
)
def test_what_cannot_be_quantized(data: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bindings.quantize_rows(data, GGMLQuantizationType.Q8_0)


def test_no_rows_make_no_bytes() -> None:
    assert bindings.quantize_rows(np.zeros((0, 64), np.float32), GGMLQuantizationType.Q8_0).shape == (0, 68)


def test_threads_quantize_alike() -> None:
    data = np.random.default_rng(3).standard_normal((64, 1024), dtype=np.float32)
    alone = bindings.quantize_rows(data, GGMLQuantizationType.Q4_K)
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        results[i] = bindings.quantize_rows(data, GGMLQuantizationType.Q4_K)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, alone)


def test_the_bindings_run_on_our_libraries() -> None:
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "from hymoe.engine import bindings, find\n"
        "llama = bindings.load(); llama.llama_backend_init()\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert str(find().bin / 'libllama.so') in maps, maps\n"
        "print(llama.llama_print_system_info().decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CPU" in done.stdout
