"""--dry-run: the plan of a conversion, also where there are no weights, and whether its promises hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec

# Hunyuan-A13B's published sizes.
A13B = Spec(n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, head_dim=128, n_ff=3072, n_expert=64, n_expert_used=8)
N_VOCAB = 128167
N_PARAMS = 80_393_183_232
CLI = "import sys; from hymoe.convert.cli import main; sys.exit(main())"


def names(spec: Spec) -> list[str]:
    """Every tensor of a checkpoint, from the miniature's own table."""
    return [tensor.name for tensor in miniature.tensors(spec, N_VOCAB)]


def write_index(folder: Path, names: list[str], n_shards: int = 33) -> None:
    """An index as published, of shards that are not there."""
    shard = {
        name: f"model-{i * n_shards // len(names) + 1:05d}-of-{n_shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))


@pytest.fixture
def full_size(tmp_path: Path) -> Path:
    """A full-size config and index, and nothing else."""
    small = miniature.write(tmp_path / "small", Spec(n_layer=1, n_embd=64, n_ff=32, n_expert=64, n_expert_used=8))
    folder = tmp_path / "Hunyuan-A13B"
    folder.mkdir()
    config = json.loads((small / "config.json").read_text())
    config |= {
        "attention_head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "moe_intermediate_size": [3072] * 32,
        "moe_topk": [8] * 32,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_shared_expert": [1] * 32,
        "vocab_size": N_VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_bytes((small / "generation_config.json").read_bytes())
    write_index(folder, names(A13B))
    return folder


def timed(*argv: str) -> tuple[float, str]:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CLI, *argv], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - begun, done.stdout


def rows(out: str) -> Iterator[dict[str, str]]:
    """The lines of the table; columns are separated by two spaces or more."""
    for line in out.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == 6 and cells[0].endswith(".weight"):
            yield dict(zip(("tensor", "shape", "source", "type", "count", "bytes"), cells, strict=True))


def gigabytes(out: str, what: str) -> float:
    found = re.search(rf"^{what} +([\d.]+) (MB|GB)", out, re.MULTILINE)
    assert found, what
    return float(found[1]) * {"MB": 1e-3, "GB": 1}[found[2]]


def check_full_size(out: str) -> None:
    assert "80.393 B weights, 16.00 bits each" in out
    assert gigabytes(out, "writes") == pytest.approx(2 * N_PARAMS / 1e9, rel=1e-3)
    assert gigabytes(out, "disk") == gigabytes(out, "writes")
    assert gigabytes(out, "memory") <= 1.5
    assert "Not looked at, because not there: weights" in out
    found = {row["tensor"]: row for row in rows(out)}
    assert found["blk.*.ffn_down_exps.weight"] == {
        "tensor": "blk.*.ffn_down_exps.weight",
        "shape": "64 × 4096 × 3072",
        "source": "BF16",
        "type": "BF16",
        "count": "32",
        "bytes": "51.5 GB",
    }
    assert found["blk.*.ffn_gate_inp.weight"]["type"] == "F32"
    assert sum(int(row["count"]) for row in rows(out)) == 482


def test_full_size_without_weights(full_size: Path) -> None:
    seconds, out = timed(str(full_size), "--dry-run")
    check_full_size(out)
    assert "weights and vocabulary." in out
    assert seconds < 3


@pytest.mark.data
def test_published_config_without_weights(data: Path, tmp_path: Path) -> None:
    """The real config and vocabulary with a fabricated index."""
    for file in (data / "a13b").iterdir():
        (tmp_path / file.name).symlink_to(file)
    write_index(tmp_path, names(A13B))
    seconds, out = timed(str(tmp_path), "--dry-run")
    check_full_size(out)
    assert "Not looked at, because not there: weights." in out
    assert seconds < 3


@pytest.mark.engine
def test_full_size_quantized(full_size: Path) -> None:
    """The types are the engine's choice; 32 layers of 64 experts make the published 4.85 bits."""
    seconds, out = timed(str(full_size), "--dry-run", "--quant", "Q4_K_M")
    assert "80.393 B weights, 4.85 bits each" in out
    assert {row["type"] for row in rows(out)} == {"F32", "Q4_K", "Q6_K"}
    assert seconds < 3


def test_without_an_index(full_size: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (full_size / "model.safetensors.index.json").unlink()
    assert main([str(full_size), "--dry-run"]) == 0
    check_full_size(capsys.readouterr().out)


def quantized_names(method: str, spec: Spec) -> Iterator[str]:
    for name in names(spec):
        base = name.removesuffix(".weight")
        if not base.endswith("_proj"):
            yield name
        elif method == "fp8":
            yield from (name, f"{base}.weight_scale", f"{base}.input_scale")
        else:
            yield from (f"{base}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize(
    ("settings", "source", "size"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8", 80.9),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "GPTQ-Int4", 42.67),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ-Int4", 42.67),
    ],
)
def test_quantized_sources(
    settings: dict[str, Any], source: str, size: float, full_size: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The formats come from the config and the names in the index; sizes are those of the published files."""
    config = json.loads((full_size / "config.json").read_text())
    (full_size / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    write_index(full_size, list(quantized_names(settings["quant_method"], A13B)))
    assert main([str(full_size), "--dry-run"]) == 0
    out = capsys.readouterr().out
    found = {row["tensor"]: row["source"] for row in rows(out)}
    assert {found["blk.*.attn_q.weight"], found["blk.*.ffn_up_exps.weight"]} == {source}
    assert {found["token_embd.weight"], found["blk.*.ffn_gate_inp.weight"], found["output_norm.weight"]} == {"BF16"}
    assert gigabytes(out, "reads") == pytest.approx(size, rel=2e-3)
    assert gigabytes(out, "writes") == pytest.approx(160.8, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda names: names[:-1], "missing tensor model.layers.31.mlp.gate.wg.weight"),
        (lambda names: [*names, "model.layers.32.input_layernorm.weight"], "unexpected tensor model.layers.32"),
    ],
    ids=["missing", "unexpected"],
)
def test_names_of_the_index_are_checked(
    change: Any, part: str, full_size: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index(full_size, change(names(A13B)))
    assert main([str(full_size), "--dry-run"]) == 1
    assert part in capsys.readouterr().err


def test_a_download_that_stopped_is_an_error(full_size: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some shards without the others are no plan but an accident."""
    (full_size / "model-00002-of-00033.safetensors").write_bytes(b"")
    assert main([str(full_size), "--dry-run"]) == 1
    assert "shard model-00001-of-00033.safetensors" in capsys.readouterr().err


def test_only_a_look_does_without_weights(full_size: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(full_size), str(full_size.parent / "out.gguf")]) == 1
    assert "shard model-00001-of-00033.safetensors" in capsys.readouterr().err


def test_nothing_unseen_where_all_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = miniature.write(tmp_path / "in", Spec(n_layer=2))
    assert main([str(folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Not looked at" not in out
    assert main([str(folder), str(tmp_path / "out.gguf"), "-q"]) == 0
    written = (tmp_path / "out.gguf").stat().st_size / 1e9
    assert 0 < written - gigabytes(out, "writes") < 2e-3
    assert gigabytes(out, "reads") == pytest.approx((folder / "model.safetensors").stat().st_size / 1e9, rel=0.01)


# VmHWM and not ru_maxrss, which a child takes over from its parent.
MEASURE = """
import re, sys
from hymoe.convert.cli import main
status = main()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_is_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enough work to keep every worker at full stretch; the promise holds, and is no empty one."""
    spec = Spec(n_layer=2, n_embd=1024, n_ff=1024, n_expert=24, dtype="F32")
    folder = miniature.write(tmp_path / "in", spec)
    assert main([str(folder), "--dry-run", "--quant", "Q8_0"]) == 0
    promised = gigabytes(capsys.readouterr().out, "memory")
    argv = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "out.gguf"), "--quant", "Q8_0", "--verify"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    used = int(done.stdout.splitlines()[-1]) * 1024 / 1e9
    assert used < promised < 4 * used
