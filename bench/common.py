"""What the benchmarks share: checkpoints of A13B's shape, the state of disk and page cache around a run, printing.

Standard library only: a process inherits its parent's ru_maxrss, so a benchmark stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DATA = Path(os.environ.get("HYMOE_TEST_DATA", ROOT.parent / "shared" / "data"))
WORK = ROOT / "build" / "bench"

A13B = {"n_embd": 4096, "n_head": 32, "n_head_kv": 8, "head_dim": 128, "n_ff": 3072, "max_shard_bytes": 4 << 30}

WRITE = """
import sys, json
from pathlib import Path
from hymoe.convert.miniature import Spec, write
options = json.loads(sys.argv[2])
write(Path(sys.argv[1]), Spec(**options | {"vocab": Path(options["vocab"]) if options["vocab"] else None}))
"""


def checkpoint(folder: Path, vocab: Path | None, shape: Mapping[str, int]) -> Path:
    """Write a checkpoint of random weights; `shape` are fields of hymoe.convert.miniature.Spec."""
    options: dict[str, Any] = {**shape, "vocab": str(vocab or "")}
    subprocess.run([sys.executable, "-c", WRITE, folder, json.dumps(options)], check=True)
    return folder


def our_command(source: Path, quant: str) -> list[str]:
    return [str(BIN / "hy-convert"), "--quant", quant, "--quiet", str(source)]


def files_of(source: Path) -> list[Path]:
    """The weights: a checkpoint's files, or the one GGUF."""
    return sorted(source.glob("*.safetensors")) if source.is_dir() else [source]


def size_of(source: Path) -> int:
    return sum(file.stat().st_size for file in files_of(source))


def settle(source: Path) -> None:
    """Bring what will be read into the page cache and everything written so far to the disk."""
    for file in files_of(source):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass
    os.sync()


def sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
