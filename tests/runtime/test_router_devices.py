"""Router modes where the layers are on one device and the experts on another: the same text as on the CPU alone.

The device is an RPC worker on this machine: its memory is not ours, so that split graphs, copies and the choice of
what stands in a dropped slot are those of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from router_cases import N_VOCAB, WIDE, models
from rpc_worker import rpc_worker

from hymoe.runtime.router import Router
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

TIMEOUT = 300.0
IDS = [int(token) for token in np.random.default_rng(3).integers(0, N_VOCAB, 512)]
MODES = {"topk": Router("topk"), "capacity": Router("capacity"), "adaptive": Router("adaptive", 4, 0.3)}
PLACES = {"experts on the CPU": ("--override-tensor", "exps=CPU"), "everything on the device": ()}
EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--parallel", "1", "--fit", "off")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models(tmp_path_factory.mktemp("router"))[WIDE][1]


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    with rpc_worker() as address:
        yield address


def text(gguf: Path, router: Router, *extra: str) -> list[int]:
    """Give 32 tokens after the prompt, by their ids, and check that the prompt went in whole."""
    options = ServerOptions(gguf, port=0, ctx=1024, threads=1, router=router, extra=(*EXACT, *extra))
    body = {"prompt": IDS, "n_predict": 32, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
    with serve(options) as endpoint:
        answer = httpx.post(f"{endpoint.url}/completion", json=body, trust_env=False, timeout=TIMEOUT).json()
    assert answer["timings"]["prompt_n"] == len(IDS)
    tokens: list[int] = answer["tokens"]
    assert len(tokens) == 32
    return tokens


@pytest.mark.parametrize("router", MODES.values(), ids=MODES.keys())
def test_the_same_text_everywhere(gguf: Path, worker: str, router: Router) -> None:
    alone = text(gguf, router, "--gpu-layers", "0")
    for place in PLACES.values():
        assert text(gguf, router, "--rpc", worker, "--gpu-layers", "99", *place) == alone, place
