"""Against stock llama.cpp: the pinned source with nothing of ours but what it cannot run without, and its converter."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from engine_eval import EngineRunError, evaluate, nodes, tokenize
from gguf import GGUFReader
from large_model import Large
from large_model import write as write_large
from numpy.typing import NDArray
from stock import peer
from tiny_model import write_model

from hymoe import engine
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

pytestmark = [pytest.mark.stock, pytest.mark.engine]

IDS = [int(token) for token in np.random.default_rng(4).integers(0, 1790, 200)]

# The stock converter asserts that heads are 128 wide, hidden_size / heads, and knows only the real vocabulary.
REAL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_head_kv": 1, "head_dim": 128, "n_embd": 256, "n_expert": 8}
TEXTS = [
    "The lamp at the end of the pier, 1234567890 times; it's DON'T.",
    "一个小女孩拿来一只旧怀表。",
    "🙂 naïve\n\n  café\x00",
]

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS")
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "flash attention": {"flash_attn": True, "kv": "f16"},
    "small batches": {"n_ubatch": 48},
}

# Keys that one converter writes and the other does not, or writes otherwise, and why.
ONLY_OURS = {
    "general.basename": "provenance, as all of hymoe.*",
    "general.sampling.penalty_last_n": "the vendor penalises over the whole context, llama.cpp over 64 tokens",
    "hunyuan-moe.attention.key_length": "heads need not be hidden_size / heads wide",
    "hunyuan-moe.attention.value_length": "as above",
    "hunyuan-moe.rope.dimension_count": "as above",
    "hunyuan-moe.expert_weights_norm": "data, where stock's graph has an assumption",
    "hunyuan-moe.vocab_size": "readers need not count tokens",
    "tokenizer.ggml.add_bos_token": "the vendor's tokenizer adds neither",
    "tokenizer.ggml.add_eos_token": "as above",
    "tokenizer.ggml.eot_token_id": "the second token that ends an answer",
}
ONLY_STOCK = {
    "hunyuan-moe.rope.scaling.factor": "means nothing with rope.scaling.type none",
    "tokenizer.ggml.seperator_token_id": "<|extra_0|> ends a user's turn and separates no sentences",
}
DIFFERENT = {
    "general.name": "made from the folder's name in another way",
    "tokenizer.ggml.merges": "ours has one more",
}
# The one pair that is of higher rank than the token it makes: stock's recovery stops before it.
EXTRA_MERGE = "âĸģ âĪ´"


@pytest.fixture(scope="session")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small checkpoint with the real vocabulary."""
    spec = Spec(**REAL, vocab=data / "a13b" / "hy.tiktoken")
    return write(tmp_path_factory.mktemp("real") / "checkpoint", spec)


@pytest.fixture(scope="session")
def ours_gguf(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "ours.gguf"
    convert(ConvertOptions(real, out))
    return out


@pytest.fixture(scope="session")
def stock_gguf(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    peer.convert(real, folder / "view", folder / "stock.gguf", "bf16")
    return folder / "stock.gguf"


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("name", TYPES)
def test_same_file_same_bits(stock: Path, mini: Path, tmp_path: Path, name: str, run: dict[str, Any]) -> None:
    source, gguf = tmp_path / "F32.gguf", tmp_path / f"{name}.gguf"
    convert(ConvertOptions(mini, source, quant="F32"))
    if name != "F32":
        quantize: list[str | Path] = [engine.find().tool("llama-quantize"), source, gguf, name, "1"]
        subprocess.run(quantize, check=True, capture_output=True)
    assert np.array_equal(one(gguf, engine=stock, **run), one(gguf, **run))


def test_same_file_same_graph(stock: Path, mini_gguf: Path) -> None:
    """Not one operation more: what a mode that drops nothing costs is what stock costs."""
    ours, theirs = (nodes(mini_gguf, IDS[:35], n_prompt=32, engine=which) for which in (None, stock))
    assert sum(node.startswith("MUL_MAT_ID ") for node in ours) == (1 + 3) * 4 * 3  # graphs, layers, products
    assert ours == theirs


@pytest.mark.parametrize("router", ["capacity", "adaptive"])
def test_stock_runs_a_file_with_router_keys(stock: Path, mini: Path, tmp_path: Path, router: str) -> None:
    source, gguf = tmp_path / "F32.gguf", tmp_path / "router.gguf"
    convert(ConvertOptions(mini, source, quant="F32"))
    keys = {"mode": f"str:{router}", "min_experts": "int:1", "threshold": "float:0.9"}
    given = [word for key, value in keys.items() for word in ("--override-kv", f"hunyuan-moe.router.{key}={value}")]
    copy: list[str | Path] = [engine.find().tool("llama-quantize"), *given, source, gguf, "COPY"]
    subprocess.run(copy, check=True, capture_output=True)
    theirs = one(gguf, engine=stock)
    assert np.array_equal(theirs, one(gguf, overrides={"hunyuan-moe.router.mode": "str:topk"}))
    assert not np.array_equal(theirs, one(gguf))


def test_bf16_is_no_worse_than_twice_stock(stock: Path, mini: Path, mini_gguf: Path) -> None:
    wanted = reference.logits(mini, IDS)
    assert reference.kl(wanted, one(mini_gguf)) <= 2 * reference.kl(wanted, one(mini_gguf, engine=stock))


@pytest.mark.data
def test_stock_file_has_our_tensors(ours_gguf: Path, stock_gguf: Path) -> None:
    ours, theirs = tensors(ours_gguf), tensors(stock_gguf)
    assert sorted(ours) == sorted(theirs)
    for name, (kind, value) in theirs.items():
        assert (kind, value.shape) == (ours[name][0], ours[name][1].shape), name
        assert np.array_equal(value, ours[name][1]), name


@pytest.mark.data
def test_metadata_differs_where_we_say(ours_gguf: Path, stock_gguf: Path) -> None:
    ours, theirs = metadata(ours_gguf), metadata(stock_gguf)
    assert set(ours) - set(theirs) == set(ONLY_OURS)
    assert set(theirs) - set(ours) == set(ONLY_STOCK)
    assert {key for key in set(ours) & set(theirs) if ours[key] != theirs[key]} == set(DIFFERENT)
    merges = list(ours["tokenizer.ggml.merges"])
    merges.remove(EXTRA_MERGE)
    assert merges == theirs["tokenizer.ggml.merges"]


@pytest.mark.data
def test_either_file_in_either_engine(stock: Path, ours_gguf: Path, stock_gguf: Path) -> None:
    wanted = one(ours_gguf)
    for gguf, where in ((stock_gguf, None), (ours_gguf, stock), (stock_gguf, stock)):
        assert np.array_equal(one(gguf, engine=where), wanted)
        assert tokenize(gguf, TEXTS, engine=where) == tokenize(ours_gguf, TEXTS)


def one(gguf: Path, **options: Any) -> NDArray[np.float32]:
    (logits,) = evaluate(gguf, [IDS], **options)
    return logits


@cache
def reader(gguf: Path) -> GGUFReader:
    return GGUFReader(gguf)


def tensors(gguf: Path) -> dict[str, tuple[Any, NDArray[Any]]]:
    return {tensor.name: (tensor.tensor_type, tensor.data) for tensor in reader(gguf).tensors}


def metadata(gguf: Path) -> dict[str, Any]:
    fields = reader(gguf).fields
    # GGUF.* is the reader's name for the header; hymoe.* is ours alone and read by nobody else
    return {key: field.contents() for key, field in fields.items() if not key.startswith(("GGUF.", "hymoe."))}


@pytest.mark.parametrize("spec", [Large(), Large(cla=False)], ids=["shared keys and values", "top-1 alone"])
def test_large_is_refused(stock: Path, tmp_path: Path, spec: Large) -> None:
    """Stock has no shared keys and values and no raw top-1 weights: it must not run the file as something else."""
    write_large(tmp_path / "large", spec)
    convert(ConvertOptions(tmp_path / "large", tmp_path / "large.gguf"))
    with pytest.raises(EngineRunError, match="unknown model architecture: 'hunyuan-large'"):
        evaluate(tmp_path / "large.gguf", [[1, 2, 3]], engine=stock)


ROUTERS: dict[str, dict[str, str | int | float]] = {
    "capacity": {"mode": "capacity"},
    "adaptive": {"mode": "adaptive", "min_experts": 1, "threshold": 0.9},
    "one of the future": {"mode": "a-mode-nobody-knows", "temperature": 0.5},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_stock_runs_a_file_whatever_its_router_keys(
    stock: Path, tmp_path: Path, router: dict[str, str | int | float]
) -> None:
    plain = write_model(tmp_path / "plain.gguf")
    keyed = write_model(
        tmp_path / "keyed.gguf", keys={f"hunyuan-moe.router.{key}": value for key, value in router.items()}
    )
    ids = [ord(letter) for letter in "a quick brown fox"]
    (wanted,), (got,) = evaluate(plain, [ids], engine=stock), evaluate(keyed, [ids], engine=stock)
    assert np.array_equal(wanted, got)
