"""Hunyuan-Large in the engine: cross-layer attention, top-1 routing and heads of 80 against the float64 reference."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import large_reference
import numpy as np
import pytest
import reference
from engine_eval import EngineRunError, evaluate
from gguf import GGUFReader
from large_model import Large, write
from reference import Array
from router_cases import CLEAR_TOKENS, decide_clearly

from hymoe import engine
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.runtime.chat_cli import main as chat
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.router import Router
from hymoe.runtime.server import ServerExitError, ServerOptions, serve

pytestmark = pytest.mark.engine

N_TOKENS = 100
# F16 keys and values move a probability by 1e-4: closer choices of an expert may turn over.
MARGIN = 3e-4
PUBLISHED = Large(n_expert=16)
TIMEOUT = 120.0

VARIANTS = {
    "pairs": PUBLISHED,
    "threes, the last group not full": Large(n_layer=7, factor=3, n_expert=16),
    "all of one owner": Large(n_layer=3, factor=4),
    "none shared": Large(cla=False),
    "more heads to a key": Large(n_embd=320, n_head=4, n_head_kv=2),
    "heads of 64": Large(n_head=4, n_head_kv=2, head_dim=64),
    "untied head": Large(tied=False),
    "two experts, normalised": Large(n_expert_used=2),
}

# F32 weights and F32 KV, 1e-12 here: what is left is the rounding of float32 sums.
F32_BOUND = 1e-9
# Flash attention rounds K and V to F16: 3e-7 here.
FLASH_BOUND = 1e-5


def converted(folder: Path, spec: Large, quant: str = "F32", **options: Any) -> tuple[Path, Path]:
    checkpoint, gguf = folder / "checkpoint", folder / f"{quant}.gguf"
    write(checkpoint, spec)
    convert(ConvertOptions(checkpoint, gguf, quant=quant, **options))
    return checkpoint, gguf


class Case(NamedTuple):
    """A file, a prompt without close choices, and what the reference says about it."""

    gguf: Path
    ids: list[int]
    wanted: Array


def case(checkpoint: Path, gguf: Path) -> Case:
    """Take the first seed whose prompt leaves no expert closer than MARGIN to being chosen."""
    for seed in range(100):
        ids = [int(token) for token in np.random.default_rng(seed).integers(0, 2000, N_TOKENS)]
        wanted, margin = large_reference.forward(checkpoint, ids)
        if margin >= MARGIN:
            return Case(gguf, ids, wanted)
    raise AssertionError("every prompt has a close choice")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Give the F32 file of the published form."""
    return case(*converted(tmp_path_factory.mktemp("large"), PUBLISHED))


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits(spec: Large, tmp_path: Path) -> None:
    gguf, ids, wanted = case(*converted(tmp_path, spec))
    (plain,) = evaluate(gguf, [ids])
    assert reference.kl(wanted, plain) <= F32_BOUND
    (flash,) = evaluate(gguf, [ids], flash_attn=True)
    assert reference.kl(wanted, flash) <= FLASH_BOUND


@pytest.fixture(scope="module")
def clear_large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give checkpoint and F32 file of the published form with routers that decide nothing narrowly.

    In five of five prompts of 1000 random tokens random ones have a choice closer than MARGIN.
    """
    checkpoint = tmp_path_factory.mktemp("clear") / "checkpoint"
    write(checkpoint, replace(PUBLISHED, tied=False))
    decide_clearly(checkpoint, (PUBLISHED.n_expert, PUBLISHED.n_expert_used))
    gguf = checkpoint.with_suffix(".gguf")
    convert(ConvertOptions(checkpoint, gguf, quant="F32"))
    return checkpoint, gguf


@pytest.mark.parametrize("n_tokens", [8, 64, 200, pytest.param(1000, marks=pytest.mark.long)])
def test_logits_of_short_and_long_prompts(clear_large: tuple[Path, Path], n_tokens: int) -> None:
    checkpoint, gguf = clear_large
    ids = [int(token) for token in np.random.default_rng(0).choice(CLEAR_TOKENS, n_tokens)]
    wanted, margin = large_reference.forward(checkpoint, ids)
    assert margin >= MARGIN
    for flash_attn, bound in ((False, F32_BOUND), (True, FLASH_BOUND)):
        (got,) = evaluate(gguf, [ids], flash_attn=flash_attn)
        assert reference.kl(wanted, got) <= bound


def test_prompt_in_pieces(large: Case) -> None:
    (got,) = evaluate(large.gguf, [large.ids], n_ubatch=37)
    assert reference.kl(large.wanted, got) <= F32_BOUND


# Eight bits in place of eleven, and no close choices where every expert answers.
QUANTIZED_KV_BOUND = 1e-3


def test_quantized_kv(tmp_path: Path) -> None:
    """Heads of 64 may be quantized; the engine then keeps keys and values rotated."""
    gguf, ids, wanted = case(*converted(tmp_path, Large(head_dim=64, n_expert=4, n_expert_used=4)))
    (got,) = evaluate(gguf, [ids], flash_attn=True, kv="q8_0")
    assert reference.kl(wanted, got) <= QUANTIZED_KV_BOUND


@pytest.mark.parametrize("kv", ["q8_0", "bf16"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_heads_of_80_refuse_other_kv_types(large: Case, kv: str, flash_attn: bool) -> None:
    with pytest.raises(EngineRunError, match=f"KV cache type {kv}: heads of 80 values"):
        evaluate(large.gguf, [large.ids], flash_attn=flash_attn, kv=kv)


# -- types, split files ----------------------------------------------------------------------------------------------

# Rows of 384 are blocks of 32, but not of 256: K-quants fall back, as for the published 18304.
# Every expert answers, so that no close choice turns over and hides what the rounding of weights costs.
BLOCKS = Large(n_layer=2, n_embd=256, n_head=4, n_head_kv=2, n_ff=384, n_expert=4, n_expert_used=4)
TYPE_BOUNDS = {"BF16": 1e-3, "Q8_0": 5e-3, "Q4_K_M": 2e-1}  # 7e-5, 8e-4 and 3e-2 here


@pytest.mark.parametrize("quant", TYPE_BOUNDS)
def test_types(quant: str, tmp_path: Path) -> None:
    gguf, ids, wanted = case(*converted(tmp_path, BLOCKS, quant))
    (got,) = evaluate(gguf, [ids])
    assert reference.kl(wanted, got) <= TYPE_BOUNDS[quant]


def test_split_files(large: Case, tmp_path: Path) -> None:
    converted(tmp_path, PUBLISHED, split_max_bytes=2 << 20)
    parts = sorted(tmp_path.glob("F32-*.gguf"))
    assert len(parts) > 2
    assert np.array_equal(evaluate(parts[0], [large.ids])[0], evaluate(large.gguf, [large.ids])[0])


# -- llama.cpp's own tools -------------------------------------------------------------------------------------------


def run(tool: str, *arguments: str | Path) -> str:
    """Run a tool of the engine; give what it says."""
    command = [engine.find().tool(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_tools(tmp_path: Path) -> None:
    """The importance of every matrix is collected, and llama-quantize makes of it what hy-convert makes."""
    checkpoint, gguf = converted(tmp_path, replace(BLOCKS, n_expert_used=1))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} lamps at the end of pier {i * i}" for i in range(60)), encoding="utf-8")
    common = ("-m", gguf, "-f", text, "-c", "128", "-t", "1")
    run("llama-imatrix", *common, "-o", tmp_path / "imatrix.gguf")
    collected = {tensor.name.rsplit(".", 1)[0] for tensor in GGUFReader(tmp_path / "imatrix.gguf").tensors}
    owned, shared = ({name for name in collected if name.startswith(f"blk.{il}.attn")} for il in (0, 1))
    assert owned == {f"blk.0.attn_{part}.weight" for part in ("q", "k", "v", "output")}
    assert shared == {f"blk.1.attn_{part}.weight" for part in ("q", "output")}
    # Not its last line: the tool may end before its log is out.
    assert re.search(r"\[1\]\d+\.\d{4},", run("llama-perplexity", *common))
    assert "hunyuan-large" in run("llama-bench", "-m", gguf, "-p", "32", "-n", "4", "-r", "1", "-t", "1")

    imatrix = tmp_path / "imatrix.gguf"
    run("llama-quantize", "--imatrix", imatrix, gguf, tmp_path / "theirs.gguf", "Q4_K_M", "1")
    convert(ConvertOptions(checkpoint, tmp_path / "ours.gguf", quant="Q4_K_M", imatrix=imatrix))
    theirs, ours = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(file).tensors}
        for file in (tmp_path / "theirs.gguf", tmp_path / "ours.gguf")
    )
    assert theirs == ours


# -- bad files -------------------------------------------------------------------------------------------------------

BAD_NUMBERS = {
    "attention.shared_kv_factor": ("int:0", "hunyuan-large.attention.shared_kv_factor is 0: expected 1 or more"),
    "expert_used_count": ("int:17", "hunyuan-large.expert_used_count is 17: expected 1 to expert_count, which is 16"),
    "attention.head_count_kv": ("int:3", "hunyuan-large.attention.head_count_kv is 3: expected 1 to 2"),
    "block_count": ("int:600", "hunyuan-large.block_count is 600: expected 1 to 512"),
}


@pytest.mark.parametrize("key", BAD_NUMBERS)
def test_numbers_that_no_graph_can_run(key: str, large: Case) -> None:
    value, message = BAD_NUMBERS[key]
    with pytest.raises(EngineRunError, match=re.escape(message)):
        evaluate(large.gguf, [[1]], overrides={f"hunyuan-large.{key}": value})


# -- the server ------------------------------------------------------------------------------------------------------

PROMPTS = [[int(token) for token in np.random.default_rng(seed).integers(0, 2000, 30 + seed)] for seed in range(4)]
SERVERS = {
    "flash attention, a cache each": ("-fa", "on", "--no-kv-unified"),
    "flash attention, one cache": ("-fa", "on", "--kv-unified"),
    "no flash attention, a cache each": ("-fa", "off", "--no-kv-unified"),
    "no flash attention, one cache": ("-fa", "off", "--kv-unified"),
}


def complete(endpoint: Endpoint, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Ask for 24 tokens after `prompt`, the likeliest each."""
    question = {
        "prompt": prompt,
        "n_predict": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
        **options,
    }
    answer: dict[str, Any] = post(endpoint, "/completion", question)
    assert len(answer["tokens"]) == 24
    return answer


def post(endpoint: Endpoint, path: str, content: dict[str, Any]) -> Any:
    response = httpx.post(endpoint.url + path, json=content, timeout=TIMEOUT, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("flags", SERVERS.values(), ids=SERVERS.keys())
def test_parallel_sequences_and_saved_slots(flags: tuple[str, ...], large: Case, tmp_path: Path) -> None:
    with serve(ServerOptions(large.gguf, port=0, ctx=1024, threads=1, extra=flags)) as endpoint:
        alone = [complete(endpoint, prompt, cache_prompt=False)["tokens"] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    extra = (*flags, "--parallel", "4", "--slot-save-path", str(tmp_path))
    with serve(ServerOptions(large.gguf, port=0, ctx=1024, threads=1, extra=extra)) as endpoint:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda one: complete(endpoint, one[1], id_slot=one[0]), enumerate(PROMPTS)))
        assert [answer["tokens"] for answer in together] == alone
        # with one cache for all, a slot that is idle when another begins is emptied
        assert complete(endpoint, PROMPTS[2], id_slot=2)["tokens"] == alone[2]
        post(endpoint, "/slots/2?action=save", {"filename": "two"})
        post(endpoint, "/slots/2?action=erase", {})
        assert post(endpoint, "/slots/0?action=restore", {"filename": "two"})["n_restored"] >= len(PROMPTS[2])
        again = complete(endpoint, PROMPTS[2], id_slot=0)
    assert again["tokens"] == alone[2]
    assert again["timings"]["cache_n"] >= len(PROMPTS[2]) - 1


def kv_mib(gguf: Path, log: Path) -> float:
    """Give the size of the cache as the engine reports it, at 4096 tokens."""
    with serve(ServerOptions(gguf, port=0, ctx=4096, threads=1, log=log, extra=("--log-verbosity", "4"))):
        pass
    sizes = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB \( *4096 cells", log.read_text("utf-8", "replace"))
    return float(sizes[-1])


@pytest.mark.parametrize("router", [Router("adaptive", 4, 0.1), Router("capacity")], ids=str)
def test_every_router_mode_is_topk(large: Case, router: Router) -> None:
    """One expert per token leaves nothing to drop: no number of experts is refused, and no prompt for its length."""
    with serve(ServerOptions(large.gguf, port=0, ctx=1024, threads=1)) as endpoint:
        wanted = complete(endpoint, large.ids)["tokens"]
    extra = ("--ubatch-size", "32")
    with serve(ServerOptions(large.gguf, port=0, ctx=1024, threads=1, router=router, extra=extra)) as endpoint:
        assert complete(endpoint, large.ids, id_slot=0)["tokens"] == wanted
        again = complete(endpoint, large.ids, id_slot=0, expert_usage=True)
    assert again["timings"]["expert_usage"]["mode"] == "topk"
    assert again["timings"]["cache_n"] > 0


def test_an_unknown_router_mode_is_refused(large: Case) -> None:
    with pytest.raises(
        EngineRunError, match=r'hunyuan-large.router.mode is "topp": expected topk, capacity or adaptive'
    ):
        evaluate(large.gguf, [[1]], overrides={"hunyuan-large.router.mode": "str:topp"})


def test_tensors_are_not_split(large: Case) -> None:
    command: list[str | Path] = [
        engine.find().tool("llama-bench"),
        "-m",
        large.gguf,
        "-sm",
        "tensor",
        "-p",
        "1",
        "-t",
        "1",
        "-v",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT)
    assert done.returncode
    assert "LLAMA_SPLIT_MODE_TENSOR not implemented for architecture 'hunyuan-large'" in done.stdout + done.stderr


def test_half_the_cache(tmp_path: Path) -> None:
    sizes = {}
    for cla in (True, False):
        folder = tmp_path / str(cla)
        folder.mkdir()
        _, gguf = converted(folder, Large(cla=cla))
        sizes[cla] = kv_mib(gguf, folder / "log")
    assert sizes[False] == 4 * 2 * 4096 * 80 * 2 / 2**20  # layers, K and V, tokens, a head of F16
    assert sizes[True] == sizes[False] / 2


def test_hy_serve_names_the_kv_type(large: Case) -> None:
    options = ServerOptions(large.gguf, port=0, ctx=512, threads=1, extra=("--cache-type-k", "q8_0"))
    with pytest.raises(ServerExitError, match="KV cache type q8_0: heads of 80 values"), serve(options):
        pass


def test_hy_chat(large: Case, capfd: pytest.CaptureFixture[str]) -> None:
    assert chat([str(large.gguf), "-q", "-p", "Say something.", "--max-tokens", "8", "--threads", "1"]) == 0
    assert capfd.readouterr().out.strip()
