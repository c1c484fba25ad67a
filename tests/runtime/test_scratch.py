"""Compute buffers by formula against what the engine says it needs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import paper
import pytest

from hymoe.runtime import buffers, layout, scratch
from hymoe.runtime.buffers import HOST

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("own_cache")]

MODELS = {"a13b": paper.A13B, "large": paper.LARGE}
N_IN_RAM = 20  # layers
KINDS = [("a13b", "f16"), ("a13b", "q8_0"), ("large", "f16")]
SIZES = list(product((8192, 131072), (512, 4096)))  # context, ubatch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("paper")
    return {name: paper.write(folder / f"{name}.gguf", model) for name, model in MODELS.items()}


def arguments(n_ctx: int, n_ubatch: int, kv_type: str) -> list[str]:
    asked = ["--fit", "off", "--ctx-size", str(n_ctx), "--batch-size", "4096", "--ubatch-size", str(n_ubatch)]
    return [*asked, "--cache-type-k", kv_type, "--cache-type-v", kv_type, "--flash-attn", "on"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sent", [True, False])
def test_a_card(kind: tuple[str, str], size: tuple[int, int], sent: bool, files: dict[str, Path]) -> None:
    (model, kv_type), (n_ctx, n_ubatch) = kind, size
    about = layout.read(files[model])
    in_ram = "|".join(map(str, range(N_IN_RAM)))
    asked = [*arguments(n_ctx, n_ubatch, kv_type), "--gpu-layers", "99"]
    asked += ["--override-tensor", rf"blk\.({in_ram})\.ffn_\w+_exps\.=CPU", *([] if sent else ["--no-op-offload"])]
    found = buffers.measure(files[model], asked, cards={"GPU0": 24 << 30}, min_batch=256 if sent else None)
    card = scratch.on_device(about, n_ctx, n_ubatch, kv_type, flash=True, sent=sent)
    assert card == pytest.approx(found["GPU0"].compute, rel=0.04)
    host = scratch.on_host(about, n_ctx, n_ubatch, flash=True, has_layers=False, has_experts=not sent)
    assert found[HOST].compute <= 1.01 * host


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_processor(kind: tuple[str, str], size: tuple[int, int], files: dict[str, Path]) -> None:
    (model, kv_type), (n_ctx, n_ubatch) = kind, size
    found = buffers.measure(files[model], [*arguments(n_ctx, n_ubatch, kv_type), "--device", "none"])
    host = scratch.on_host(layout.read(files[model]), n_ctx, n_ubatch, flash=True, has_layers=True, has_experts=True)
    assert found[HOST].compute <= 1.01 * host <= 1.34 * found[HOST].compute
