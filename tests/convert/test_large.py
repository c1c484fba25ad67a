"""Hunyuan-Large: shared keys and values, one expert a token, heads of 80, spare rows in the embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from large_model import N_TOKENS, Array, Large, write
from published_names import SINGLE

from hymoe.convert.cli import main
from hymoe.convert.convert import preview

ARCH = "hunyuan-large"


def expected(source: dict[str, Array], spec: Large) -> dict[str, Array]:
    """What the GGUF must hold, written out once more and on purpose."""
    found = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }
    if not spec.tied:
        found["output.weight"] = source["lm_head.weight"]
    for il in range(spec.n_layer):
        for ours, theirs in SINGLE.items():
            name = f"model.layers.{il}.{theirs}.weight"
            if name in source:
                found[f"blk.{il}.{ours}.weight"] = source[name]
        for part in ("gate", "up", "down"):
            experts = [source[f"model.layers.{il}.mlp.experts.{e}.{part}_proj.weight"] for e in range(spec.n_expert)]
            found[f"blk.{il}.ffn_{part}_exps.weight"] = np.stack(experts)
    return found


@pytest.mark.parametrize(
    "spec",
    [Large(), Large(n_layer=7, factor=3), Large(cla=False), Large(tied=False, n_spare=0)],
    ids=["pairs", "threes", "none shared", "untied, no spare rows"],
)
def test_every_tensor_equals_its_source(spec: Large, tmp_path: Path) -> None:
    wanted = expected(write(tmp_path / "in", spec), spec)
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf"), "--quant", "F32", "-q"]) == 0
    reader = GGUFReader(tmp_path / "out.gguf")
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(wanted)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, wanted[tensor.name], err_msg=tensor.name)
    with_keys = [il for il in range(spec.n_layer) if f"blk.{il}.attn_k.weight" in wanted]
    assert with_keys == list(range(0, spec.n_layer, spec.factor if spec.cla else 1))
    assert reader.fields[f"{ARCH}.attention.shared_kv_factor"].contents() == (spec.factor if spec.cla else 1)


def test_every_key(tmp_path: Path) -> None:
    write(tmp_path / "in", Large())
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf"), "-q"]) == 0
    fields = GGUFReader(tmp_path / "out.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert {name.removeprefix(f"{ARCH}."): value for name, value in found.items() if name.startswith(ARCH)} == {
        "block_count": 4,
        "context_length": 131072,
        "embedding_length": 160,
        "feed_forward_length": 96,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 80,
        "attention.value_length": 80,
        "attention.shared_kv_factor": 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 80,
        "rope.freq_base": np.float32(10000 * 1000 ** (80 / 78)),
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": 131072,
        "expert_count": 5,
        "expert_used_count": 1,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 96,
        "expert_shared_feed_forward_length": 96,
        "expert_gating_func": 1,
        "expert_weights_norm": False,
        "vocab_size": N_TOKENS + 18,
    }
    assert found["general.architecture"] == ARCH
    assert found["general.sampling.top_p"] == pytest.approx(0.6)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == N_TOKENS + 18
    assert tokens[N_TOKENS - 1] == "<|extra_203|>"
    assert tokens[N_TOKENS:] == [f"[PAD{i + 1}]" for i in range(18)]
    assert types[N_TOKENS - 1 :] == [3, *[5] * 18]
    assert tokens[found["tokenizer.ggml.bos_token_id"]] == "<|startoftext|>"
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|eos|>"
    assert tokens[found["tokenizer.ggml.eot_token_id"]] == "<|extra_5|>"


def changed(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"num_experts": 1}, "config.json: num_experts: got 1, expected at least 2; a dense HunYuan model"),
    "no factor": ({"cla_share_factor": None}, "config.json: cla_share_factor"),
    "factor 0": ({"cla_share_factor": 0}, "config.json: cla_share_factor: got 0"),
    "another activation": ({"hidden_act": "gelu"}, "config.json: hidden_act"),
    "no norms of queries": ({"use_qk_norm": False}, "config.json: use_qk_norm"),
    "latent attention": ({"use_mla": True}, "config.json: use_mla"),
    "heads of 2": ({"head_dim": 2}, "config.json: head_dim: got 2, expected an even number of at least 4"),
    "heads of 79": ({"head_dim": 79}, "config.json: head_dim: got 79, expected an even number"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of 2"),
    "more experts than there are": ({"moe_topk": 6}, "config.json: moe_topk: got 6"),
    "nothing shared": ({"use_cla": False}, "missing tensor model.layers.1.self_attn.k_proj.weight"),
    "shared by four": ({"cla_share_factor": 4}, "unexpected tensor model.layers.2.self_attn.k_proj.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, part = REFUSED[name]
    write(tmp_path / "in", Large())
    changed(tmp_path / "in", **changes)
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf")]) == 1
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


def test_more_tokens_than_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", Large(n_spare=-1))
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf")]) == 1
    assert f"got {N_TOKENS} tokens with the special ones, expected vocab_size {N_TOKENS - 1}" in capsys.readouterr().err


def test_end_token_that_is_a_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a generation config only the class's default is left, which is token 2."""
    write(tmp_path / "in", Large())
    (tmp_path / "in" / "generation_config.json").unlink()
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf")]) == 1
    assert "eos_token_id: got 2, which is '#', expected a special token" in capsys.readouterr().err


def test_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Pretrain repository may hold them: they are never opened."""
    write(tmp_path / "in", Large())
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf")]) == 1
    error = capsys.readouterr().err
    assert "PyTorch pickle files (pytorch_model.bin)" in error
    assert "a pickle can run code" in error
    assert "save_pretrained" in error


def test_experts_used_more_than_one(tmp_path: Path) -> None:
    """Only top-1 weighs with the raw probability."""
    write(tmp_path / "in", Large())
    changed(tmp_path / "in", moe_topk=2)
    assert main([str(tmp_path / "in"), str(tmp_path / "out.gguf"), "-q"]) == 0
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields[f"{ARCH}.expert_used_count"].contents() == 2
    assert fields[f"{ARCH}.expert_weights_norm"].contents() is True


@pytest.mark.data
def test_published_config(data: Path) -> None:
    """The published values: every weight is counted, and rope and vocabulary come out as computed by hand."""
    looked = preview(data / "large", "BF16")
    attention = 64 * (2 * 6400 * 6400 + 2 * 80) + 32 * 2 * (8 * 80) * 6400
    experts = 64 * (1 + 16) * 3 * 6400 * 18304 + 64 * 16 * 6400
    assert looked.plan.n_params == 129024 * 6400 + attention + experts + (1 + 2 * 64) * 6400
    assert len(looked.plan.tensors) == 2 + 64 * 15 - 32 * 2
    keys = {key.key: key.value for key in looked.keys}
    assert keys[f"{ARCH}.rope.freq_base"] == pytest.approx(11937766.4171, rel=1e-9)
    assert keys[f"{ARCH}.vocab_size"] == 129024
    assert keys["general.sampling.top_p"] == 0.6


@pytest.mark.data
def test_published_vocabulary(data: Path) -> None:
    from hymoe.convert.vocab import read_vocabulary

    vocabulary = read_vocabulary(data / "a13b", 129024, 204, padded=True, merges=False)
    assert vocabulary.tokens.index("[PAD1]") == 128166
    assert vocabulary.types[128166:] == [5] * 858
    assert vocabulary.tokens[127960] == "<|eos|>"
    assert vocabulary.tokens[127967] == "<|extra_5|>"
