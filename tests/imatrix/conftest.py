"""A tiny checkpoint, its GGUF and an importance matrix, for recipes and their proof."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe_model import write_imatrix

from hymoe.convert import miniature
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec
from hymoe.imatrix.weights import GgufWeights


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, four experts of which two answer."""
    folder = tmp_path_factory.mktemp("recipes") / "Tiny"
    return miniature.write(folder, Spec(n_layer=2, n_expert=4, n_expert_used=2))


@pytest.fixture(scope="session")
def gguf(mini_checkpoint: Path) -> Path:
    out = mini_checkpoint.with_name("BF16.gguf")
    convert(ConvertOptions(mini_checkpoint, out))
    return out


@pytest.fixture(scope="session")
def imatrix(gguf: Path) -> Path:
    with GgufWeights(gguf) as weights:
        return write_imatrix(gguf.with_name("imatrix.gguf"), weights)
