"""Router modes where the layers are on one device and the experts on another: the same text as on the CPU alone.

The device is the first Vulkan device that the engine in use lists, such as Mesa's llvmpipe: with it the scheduler
may copy expert weights to the device and compute there, for batches from a threshold on. An engine without Vulkan gets
an RPC worker on this machine: its memory is not ours either, so graphs are split and values copied as for a GPU, but
no operation is ever offloaded to it.

What is said is decided clearly (tests/clear_model.py), so that roundings of a device turn nothing over, and depends on
the experts that a mode keeps: each mode has an answer of its own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import clear_model
import httpx
import pytest
from clear_model import Clear
from rpc_worker import rpc_worker

from hymoe import engine
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.runtime.router import Router
from hymoe.runtime.server import ServerOptions, serve

pytestmark = pytest.mark.engine

TIMEOUT = 300.0
MODES = {"topk": Router("topk"), "capacity": Router("capacity"), "adaptive": Router("adaptive", 2, 0.3)}
RECIPES = {"F32": "_exps = F32\n", "Q4_K": "_exps = Q4_K\n"}
# Tokens from which on a product with weights in host memory is computed by the device. The prompt has 512, then comes
# one at a time: neither is offloaded, the prompt alone (32 is the engine's default), both.
THRESHOLDS = {"nothing offloaded": 4096, "the prompt offloaded": 32, "all offloaded": 1}
EXPERTS_ON_CPU = ("--gpu-layers", "99", "--override-tensor", "exps=CPU")
ALL_ON_CPU = ("--device", "none")
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--parallel", "1", "--fit", "off")


class Device(NamedTuple):
    """A device, the arguments that choose it, the workers it is on, and whether operations may be offloaded to it."""

    name: str
    arguments: tuple[str, ...]
    workers: tuple[str, ...]
    offloads: bool


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    done = subprocess.run([engine.find().tool("llama-server"), "--list-devices"], capture_output=True, check=True)
    if found := re.search(r"^ *(Vulkan\d+):", done.stdout.decode(), re.MULTILINE):
        yield Device(found[1], ("--device", found[1]), (), offloads=True)
    else:
        with rpc_worker() as address:
            yield Device("RPC", (), (address,), offloads=False)


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Clear:
    return clear_model.write(tmp_path_factory.mktemp("clear") / "checkpoint")


@pytest.fixture(scope="module", params=list(RECIPES.values()), ids=list(RECIPES))
def gguf(clear: Clear, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    recipe = folder / "recipe"
    recipe.write_text(request.param)
    convert(ConvertOptions(clear.checkpoint, folder / "clear.gguf", quant="F32", recipe=recipe))
    return folder / "clear.gguf"


def text(gguf: Path, ids: list[int], router: Router, *extra: str, workers: tuple[str, ...] = ()) -> list[int]:
    """Give 32 tokens after the prompt, by their ids, and check that the prompt went in whole."""
    options = ServerOptions(gguf, port=0, ctx=1024, threads=1, router=router, extra=(*EXACT, *extra), rpc=workers)
    body = {"prompt": ids, "n_predict": 32, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
    with serve(options) as endpoint:
        answer = httpx.post(f"{endpoint.url}/completion", json=body, trust_env=False, timeout=TIMEOUT).json()
    assert answer["timings"]["prompt_n"] == len(ids)
    tokens: list[int] = answer["tokens"]
    return tokens


def thresholds(device: Device) -> dict[str, int]:
    return THRESHOLDS if device.offloads else {"nothing can be offloaded": 32}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_text_everywhere(
    gguf: Path, clear: Clear, device: Device, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere it is the answer of the float64 reference."""

    def said(*extra: str, workers: tuple[str, ...] = device.workers) -> list[int]:
        return text(gguf, clear.prompt, MODES[mode], "--flash-attn", "off", *extra, workers=workers)

    assert said(*ALL_ON_CPU, workers=()) == clear.answers[mode]
    assert said(*device.arguments, "--gpu-layers", "99") == clear.answers[mode], "all on the device"
    for name, tokens in thresholds(device).items():
        monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", str(tokens))
        assert said(*device.arguments, *EXPERTS_ON_CPU) == clear.answers[mode], name


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_large(flash_attn: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hunyuan-Large: shared keys and values, heads of 80, one expert per token."""
    large, gguf = clear_model.write_large(tmp_path / "checkpoint"), tmp_path / "large.gguf"
    convert(ConvertOptions(large.checkpoint, gguf, quant="F32"))

    def said(*extra: str, workers: tuple[str, ...] = device.workers) -> list[int]:
        return text(gguf, large.prompt, MODES["topk"], "--flash-attn", flash_attn, *extra, workers=workers)

    assert said(*ALL_ON_CPU, workers=()) == large.answers["topk"]
    assert said(*device.arguments, "--gpu-layers", "99") == large.answers["topk"], "all on the device"
    for name, tokens in thresholds(device).items():
        monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", str(tokens))
        assert said(*device.arguments, *EXPERTS_ON_CPU) == large.answers["topk"], name
