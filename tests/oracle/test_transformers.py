"""transformers' HunYuanMoEV1 as a second opinion: on our reference, on the engine, and as a writer of checkpoints.

It keeps its norms and router in float32 whatever the model's type, so that even in float64 it is no better than 1e-12.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from engine_eval import evaluate
from gguf import GGUFReader

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


N_TOKENS = 200
IDS = [int(token) for token in np.random.default_rng(3).integers(0, 2000, N_TOKENS)]
STYLES: tuple[Any, ...] = ("2025", "transformers5")
F32_BOUND = 1e-9


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Set before transformers is first imported, and only where these tests run: others talk to a hub of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield


def checkpoint(folder: Path, style: Any) -> Path:
    small: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "head_dim": 32, "n_ff": 96, "n_expert": 8}
    return write(folder / "checkpoint", Spec(**small, dtype="F32", config_style=style))


def load(folder: Path, dtype: str) -> Any:
    """Load a checkpoint as transformers' own class, whichever keys its config.json uses."""
    import torch
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["head_dim"] = raw.get("head_dim") or raw["attention_head_dim"]
    for key in ("auto_map", "model_type"):
        raw.pop(key, None)
    return HunYuanMoEV1ForCausalLM.from_pretrained(
        folder,
        config=HunYuanMoEV1Config(**raw),
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
    )


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        result: np.ndarray = model(torch.tensor([IDS])).logits[0].double().numpy()
    return result


@pytest.mark.parametrize("style", STYLES)
def test_reference(tmp_path: Path, style: str) -> None:
    folder = checkpoint(tmp_path, style)
    assert reference.kl(logits(load(folder, "float64")), reference.logits(folder, IDS)) <= 1e-11


@pytest.mark.engine
@pytest.mark.parametrize("style", STYLES)
def test_engine(tmp_path: Path, style: str) -> None:
    folder = checkpoint(tmp_path, style)
    convert(ConvertOptions(folder, tmp_path / "F32.gguf", quant="F32"))
    (got,) = evaluate(tmp_path / "F32.gguf", [IDS])
    for dtype in ("float64", "float32"):
        assert reference.kl(logits(load(folder, dtype)), got) <= F32_BOUND


@pytest.mark.parametrize("style", STYLES)
def test_saved_again_converts_to_the_same_tensors(tmp_path: Path, style: str) -> None:
    folder = checkpoint(tmp_path, style)
    again = tmp_path / "again"
    load(folder, "float32").save_pretrained(again)
    for file in (*folder.glob("*.tiktoken"), *folder.glob("tokenizer*.json"), *folder.glob("*.jinja")):
        shutil.copy(file, again)
    convert(ConvertOptions(folder, tmp_path / "first.gguf", quant="F32"))
    convert(ConvertOptions(again, tmp_path / "second.gguf", quant="F32"))
    first, second = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("first", "second"))
    assert [tensor.name for tensor in first.tensors] == [tensor.name for tensor in second.tensors]
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert a.tensor_type == b.tensor_type
        assert np.array_equal(a.data, b.data), a.name
    keys = [name for name in first.fields if name.startswith("hunyuan-moe.") or name.startswith("tokenizer.ggml.")]
    assert keys
    for name in keys:
        assert first.fields[name].contents() == second.fields[name].contents(), name
