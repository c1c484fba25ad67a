"""Prompt processing at sizes that take different kernels, for every family of weight types.

One token takes the matrix-vector kernels, more take the tiled ones (repacked, AMX where the processor has it), and
the sizes in between their remainders.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
from engine_eval import evaluate
from numpy.typing import NDArray

from hymoe import engine
from hymoe.convert.convert import ConvertOptions, convert

pytestmark = pytest.mark.engine

SIZES = (1, 2, 17, 64, 512)
IDS = [int(token) for token in np.random.default_rng(2).integers(0, 1790, max(SIZES))]
PROMPTS = [IDS[:size] for size in SIZES]

# llama-quantize's type -> bound on the median KL to the F32 file, about twice what is seen. A random model takes every
# lost bit hard; the logits of the position before are at 7. (Median: a close choice of experts that turns over
# moves single positions far.)
TYPES = {
    "F16": 2e-5,
    "BF16": 1e-3,
    "Q8_0": 0.02,
    "Q6_K": 0.15,
    "Q5_K": 0.4,
    "Q4_K": 1.5,
    "IQ4_XS": 1.7,
    "Q3_K": 4.0,
}
# The same file at two prompt sizes: only the order of sums and the rounding of activations differ, 1e-6 at most here.
SAME_FILE_BOUND = 1e-3


@pytest.fixture(scope="module")
def f32(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[np.float32]]]:
    """Give the miniature as F32 file and its logits for every prompt."""
    gguf = tmp_path_factory.mktemp("sizes") / "F32.gguf"
    convert(ConvertOptions(mini, gguf, quant="F32"))
    return gguf, evaluate(gguf, PROMPTS, n_threads=2)


@pytest.mark.parametrize("name", TYPES)
def test_sizes(f32: tuple[Path, list[NDArray[np.float32]]], tmp_path: Path, name: str) -> None:
    source, wanted = f32
    gguf = tmp_path / f"{name}.gguf"
    quantize: list[str | Path] = [engine.find().tool("llama-quantize"), "--pure", source, gguf, name, "1"]
    subprocess.run(quantize, check=True, capture_output=True)
    got = evaluate(gguf, PROMPTS, n_threads=2)
    for logits in got:
        assert np.isfinite(logits).all()
        assert median_kl(got[-1][: len(logits)], logits) <= SAME_FILE_BOUND
    assert median_kl(wanted[-1], got[-1]) <= TYPES[name]


def test_bounds_tell_right_from_wrong(f32: tuple[Path, list[NDArray[np.float32]]]) -> None:
    _, wanted = f32
    assert median_kl(wanted[-1], np.roll(wanted[-1], 1, axis=0)) > 1.5 * max(TYPES.values())


def median_kl(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> float:
    """Median over positions of the KL in nats."""
    return float(np.median([reference.kl(p[None], q[None]) for p, q in zip(p_logits, q_logits, strict=True)]))
