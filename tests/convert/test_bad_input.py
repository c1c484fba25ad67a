"""Every bad input: one line that says what, got, expected and what to do; exit status 1; no output file."""

from __future__ import annotations

import json
import shutil
import struct
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.miniature import Spec
from hymoe.convert.vocab import PATTERN

SPEC = Spec(n_layer=2, n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_ff=32, n_expert=4, n_expert_used=2, n_rank=300)
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("pristine") / "in", SPEC)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "in"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], name: str = SHARD) -> None:
    """Change a safetensors header in place of the old one; the data stay as they are."""
    raw = (folder / name).read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])


def fails(folder: Path, capsys: pytest.CaptureFixture[str], *parts: str, out: str = "out.gguf") -> None:
    """Converting `folder` must fail with one line that has all `parts`, and leave nothing."""
    before = sorted(path.name for path in folder.parent.iterdir())
    assert main([str(folder), str(folder.parent / out)]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert sorted(path.name for path in folder.parent.iterdir()) == before


CONFIG_CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "architecture": (
        {"architectures": ["LlamaForCausalLM"]},
        ("architecture: got LlamaForCausalLM", "HunYuanMoEV1ForCausalLM"),
    ),
    "no architecture": ({"architectures": None}, ("config.json: architectures: got None",)),
    "vocabulary size": ({"vocab_size": 511}, ("shape of model.embed_tokens.weight", "[510, 64]", "[511, 64]")),
    "experts per layer differ": (
        {"moe_intermediate_size": [32, 48]},
        ("moe_intermediate_size: got 48 for layer 1 and 32 for layer 0", "one value"),
    ),
    "top-k per layer differ": ({"moe_topk": [2, 1]}, ("moe_topk: got 1 for layer 1 and 2 for layer 0",)),
    "list too short": ({"num_shared_expert": [1]}, ("num_shared_expert: got 1 values, expected 2, one per layer",)),
    "top-k above the number of experts": ({"moe_topk": 5}, ("moe_topk: got 5, expected at most num_experts 4",)),
    "top-1": ({"moe_topk": 1}, ("moe_topk: got 1, expected at least 2",)),
    "top-0": ({"moe_topk": 0}, ("moe_topk: got 0, expected an integer of at least 1",)),
    "top-k no number": ({"moe_topk": "2"}, ('moe_topk: got "2", expected an integer',)),
    "absurdly many experts": (
        {"num_experts": 2**31 - 1},
        ("config.json: number of experts: got 2147483647, expected at most 1024",),
    ),
    "absurdly many layers": (
        {"num_hidden_layers": 513, "moe_topk": 2, "moe_intermediate_size": 32, "num_shared_expert": 1},
        ("config.json: number of layers: got 513, expected at most 512",),
    ),
    "more than a file can say": (
        {"max_position_embeddings": 2**31},
        ("max_position_embeddings: got 2147483648, expected an integer of at most 2147483647",),
    ),
    "half a surrogate pair": ({"model_type": "\ud800"}, ("config.json: not valid JSON", "surrogates not allowed")),
    "one expert": ({"num_experts": 1, "moe_topk": 1}, ("num_experts: got 1, expected at least 2",)),
    "experts missing": ({"num_experts": None}, ("num_experts or num_local_experts: got nothing",)),
    "more experts than stored": ({"num_experts": 5}, ("mlp.gate.wg.weight", "[4, 64]", "[5, 64]")),
    "more layers than stored": (
        {
            "num_hidden_layers": 3,
            "moe_topk": 2,
            "moe_intermediate_size": 32,
            "num_shared_expert": 1,
        },
        ("missing tensor model.layers.2.input_layernorm.weight", "download the whole repository"),
    ),
    "fewer layers than stored": (
        {"num_hidden_layers": 1, "moe_topk": 2, "moe_intermediate_size": 32, "num_shared_expert": 1},
        ("unexpected tensor model.layers.1.", "(model.safetensors) and 23 more"),
    ),
    "rope kind": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("rope_scaling: type: got yarn",)),
    "rope factor": (
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 2.0}},
        ("rope_scaling: factor: got 2.0, expected 1.0",),
    ),
    "rope alpha": (
        {"rope_scaling": {"type": "dynamic", "alpha": "x"}},
        ("rope_scaling: alpha: got x, expected a positive number",),
    ),
    "rope theta": ({"rope_theta": -1}, ("rope_theta: got -1, expected a positive number",)),
    "rope shape": ({"rope_scaling": [1]}, ("rope_scaling: got [1], expected a JSON object",)),
    "head size": ({"attention_head_dim": 33, "head_dim": 33}, ("head_dim: got 33, expected an even number",)),
    "heads": (
        {"num_key_value_heads": 3},
        ("num_key_value_heads: got 3, expected a divisor of 2",),
    ),
    "cross-layer attention": ({"use_cla": True}, ("use_cla: got true, expected false", "not implemented")),
    "no qk-norm": ({"use_qk_norm": False}, ("use_qk_norm: got false, expected true",)),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act: got gelu",)),
    "biases": ({"attention_bias": True}, ("attention_bias: got true",)),
    "quantized": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        ("quantization_config: quant_method: got bitsandbytes, expected one of fp8, compressed-tensors, gptq, awq",),
    ),
    "head size of 2": ({"attention_head_dim": 2}, ("head_dim: got 2, expected an even number of at least 4",)),
    "experts per layer": ({"num_experts": [4, 8]}, ("num_experts: got 8 for layer 1 and 4 for layer 0",)),
    "too many experts": ({"num_experts": 1025}, ("number of experts: got 1025, expected at most 1024",)),
    "too many layers": (
        {"num_hidden_layers": 50_000_000, "moe_topk": 2, "moe_intermediate_size": 32, "num_shared_expert": 1},
        ("number of layers: got 50000000, expected at most 512",),
    ),
    "theta beyond float": ({"rope_theta": 10**400}, ("rope_theta: got 1", "expected a positive number")),
    "theta beyond float32": ({"rope_theta": 1e39}, ("rope_theta: got 1e+39, expected a positive number",)),
    "theta with alpha beyond float32": ({"rope_theta": 1e37}, ("rope_theta with alpha: base: got 1",)),
    "no theta": ({"rope_theta": None}, ("rope_theta: got nothing",)),
    "epsilon that float32 makes 0": ({"rms_norm_eps": 1e-60}, ("rms_norm_eps: got 1e-60",)),
    "context beyond 32 bits": ({"max_position_embeddings": 1 << 40}, ("max_position_embeddings: got 1099511627776",)),
    "end token outside": (
        {"eos_token_id": 9999},
        ("eos_token_id: got 9999, expected an id below vocab_size 510",),
    ),
}


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_config(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, parts = CONFIG_CASES[name]
    edit_config(folder, **changes)
    fails(folder, capsys, *parts)


def test_no_folder_and_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(tmp_path / "absent", capsys, "absent: got no such folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", capsys, "got no config.json, expected the folder of a HunYuan checkpoint")


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "not valid JSON"), ("[1]", "got a JSON list"), ("[" * 100000, "not valid JSON"), ("\xff", "not valid JSON")],
)
def test_broken_config(text: str, part: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    fails(folder, capsys, "config.json", part)


NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def renamed(header: dict[str, Any]) -> None:
    header["model.layers.1.mlp.experts.2.up_proj.wait"] = header.pop(NAME)


def reshaped(header: dict[str, Any]) -> None:
    header[NAME]["shape"] = header[NAME]["shape"][::-1]


def integer(header: dict[str, Any]) -> None:
    header[NAME]["dtype"] = "I16"


def unknown_dtype(header: dict[str, Any]) -> None:
    header[NAME]["dtype"] = "BF17"


def beyond(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"] = [n + (1 << 40) for n in header[NAME]["data_offsets"]]


def overlapping(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"] = header["model.layers.1.mlp.experts.1.up_proj.weight"]["data_offsets"]


def backwards(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"] = header[NAME]["data_offsets"][::-1]


def wrong_length(header: dict[str, Any]) -> None:
    header[NAME]["shape"] = [1, 1]


def negative(header: dict[str, Any]) -> None:
    header[NAME]["shape"] = [-32, -64]


def no_entry(header: dict[str, Any]) -> None:
    header[NAME] = 7


HEADER_CASES: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    "missing": (renamed, (f"missing tensor {NAME}", "download the whole repository")),
    "misshapen": (reshaped, (f"shape of {NAME} (model.safetensors): got [64, 32], expected [32, 64]",)),
    "wrong dtype": (integer, (f"dtype of {NAME} (model.safetensors): got I16, expected BF16 or F16 or F32",)),
    "unknown dtype": (unknown_dtype, (f"header entry {NAME}", "'BF17'")),
    "beyond the end": (beyond, ("corrupt header", "gap")),
    "overlapping": (overlapping, ("corrupt header", "overlaps")),
    "backwards": (backwards, (f"header entry {NAME}", "data_offsets")),
    "wrong length": (wrong_length, (f"header entry {NAME}: got 4096 bytes, expected 2 for BF16 [1, 1]",)),
    "negative": (negative, (f"header entry {NAME}", "shape [-32, -64]")),
    "no object": (no_entry, (f"header entry {NAME}: got int",)),
}


@pytest.mark.parametrize("name", HEADER_CASES)
def test_header(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, parts = HEADER_CASES[name]
    rewrite(folder, change)
    fails(folder, capsys, SHARD if name != "missing" else "", *parts)


def test_unexpected_tensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(extra).encode()
    (folder / "extra.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    fails(folder, capsys, "unexpected tensor model.layers.0.self_attn.q_proj.bias (extra.safetensors)")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_file(keep: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:keep])
    fails(folder, capsys, SHARD, "truncated", "download the file again")


@pytest.mark.parametrize("junk", [b"{", b'{"a": 1, "a": 2}', b"[]", b"\xff\xff", b"[" * 200_000])
def test_corrupt_header(junk: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", len(junk)) + junk)
    fails(folder, capsys, SHARD, "header")


def test_header_of_absurd_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    fails(folder, capsys, SHARD, "truncated or not safetensors", str(1 << 60))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    from dataclasses import replace

    return miniature.write(tmp_path / "in", replace(SPEC, max_shard_bytes=100_000))


def edit_index(folder: Path, name: str, shard: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index), encoding="utf-8")


def test_absent_shard(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    fails(sharded, capsys, f"shard {shard.name} of ", "is absent", f"download {shard.name} into")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "..\\x"])
def test_shard_outside_the_folder(shard: object, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_index(sharded, "model.norm.weight", shard)
    fails(sharded, capsys, "shard of model.norm.weight", repr(shard), "inside the model folder")


def test_index_that_names_another_shard(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    path = sharded / "model.safetensors.index.json"
    right = json.loads(path.read_text(encoding="utf-8"))["weight_map"]["model.norm.weight"]
    wrong = next(shard for shard in shards if shard != right)
    edit_index(sharded, "model.norm.weight", wrong)
    fails(sharded, capsys, f"model.norm.weight: got found in {right}, expected in {wrong}")


def test_index_with_an_invented_tensor(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(file.name for file in sharded.glob("*.safetensors"))[0]
    edit_index(sharded, "model.invented", shard)
    fails(sharded, capsys, f"model.invented: got found in no shard, expected in {shard}")


def test_tensor_in_two_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / SHARD, folder / "again.safetensors")
    fails(folder, capsys, "stored in again.safetensors and model.safetensors")


def test_no_weights_and_pickles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / SHARD).unlink()
    fails(folder, capsys, "no *.safetensors file", "download the whole repository")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    fails(folder, capsys, "PyTorch pickle files", "a pickle can run code")


def test_no_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hy.tiktoken").unlink()
    fails(
        folder,
        capsys,
        "vocabulary: got none, expected one of hy.tiktoken, hunyuan.tiktoken, tokenizer.model, tokenizer.json",
    )


def test_vocabulary_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "hy.tiktoken").read_text().splitlines()
    (folder / "hy.tiktoken").write_text("\n".join(lines[:-1]) + "\n")
    fails(folder, capsys, "hy.tiktoken: got 509 tokens with the special ones, expected vocab_size 510 of config.json")


@pytest.mark.parametrize("text", ["nonsense\n", "IQ== 1\n", "IQ==\n", "I 0\n", "IQ== 0\nIQ== 1\n", "IQ== x\n"])
def test_broken_vocabulary(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hy.tiktoken").write_text(text)
    fails(folder, capsys, "hy.tiktoken: ")


HUNYUAN = {"type": "Split", "pattern": {"Regex": PATTERN}}
TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "added without id": ({"added_tokens": [{"content": "x"}]}, "tokenizer.json: id of 'x': got null"),
    "added strings": ({"added_tokens": ["x"]}, 'tokenizer.json: added_tokens: got "x"'),
    "added an object": ({"added_tokens": {"a": 1}}, 'tokenizer.json: added_tokens: got {"a": 1}, expected a list'),
    "string id": ({"model": {"type": "BPE", "vocab": {"a": "0"}}}, "tokenizer.json: id of 'a': got \"0\""),
    "list id": ({"model": {"type": "BPE", "vocab": {"a": [0]}}}, "tokenizer.json: id of 'a': got [0]"),
    "gap": ({"model": {"type": "BPE", "vocab": {"a": 1}}}, "tokenizer.json: token ids: got gaps"),
    "merge of numbers": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[1, 2]]}}, "merges: got [1, 2]"),
    "merge a number": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}}, "merges: got 1"),
    "half a surrogate": ({"model": {"type": "BPE", "vocab": {"\ud800": 0}}}, "surrogates not allowed"),
    "pre-tokenizer": ({"pre_tokenizer": {"pretokenizers": 5}}, "pre_tokenizer: got []"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizer_json(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, part = TOKENIZERS[name]
    (folder / "hy.tiktoken").unlink()
    good = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": HUNYUAN}
    (folder / "tokenizer.json").write_text(json.dumps(good | changes))
    fails(folder, capsys, part)


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (
            [{"name": ["x"], "template": 7}, {"name": "default", "template": 7}],
            "chat_template: got int, expected a string",
        ),
        ("\ud800", "tokenizer_config.json: not valid JSON"),
    ],
)
def test_broken_template(template: object, part: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    fails(folder, capsys, part)


def test_absurd_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda header: header[NAME].update(shape=[10**4000, 10**4000]))
    fails(folder, capsys, f"header entry {NAME}", "a list of sizes")


def test_sampling_that_switches_something_off_is_legal(folder: Path) -> None:
    settings = {"temperature": 0.0, "top_k": 0, "min_p": 0, "top_p": 1.0, "repetition_penalty": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert main([str(folder), str(folder.parent / "out.gguf"), "-q"]) == 0


def test_tokenizer_json_of_another_family(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hy.tiktoken").unlink()
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(folder, capsys, "tokenizer.json: pre_tokenizer: got []", "HunYuan's pattern")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    fails(folder, capsys, "tokenizer.json: model: got Unigram, expected a BPE model")


def test_output_exists_or_cannot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "there.gguf").write_bytes(b"precious")
    fails(folder, capsys, "there.gguf exists", "--overwrite", out="there.gguf")
    assert (folder.parent / "there.gguf").read_bytes() == b"precious"
    fails(folder, capsys, "no such folder", out="nowhere/out.gguf")
    fails(folder, capsys, "got the ending '.bin', expected .gguf", out="out.bin")
    (folder.parent / "dir.gguf").mkdir()
    fails(folder, capsys, "got a folder", out="dir.gguf")


def test_disk_too_small(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk cannot be had in a test without privileges: the free space that the system reports is set instead."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1000))
    fails(folder, capsys, "disk too small: got 1.0 KB free, expected ", "free some or choose another folder")


def test_value_too_large_for_f16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found while writing: the half-written file goes too."""
    from dataclasses import replace

    folder = miniature.write(tmp_path / "in", replace(SPEC, dtype="F32"))
    raw = bytearray((folder / SHARD).read_bytes())
    n = struct.unpack("<Q", raw[:8])[0]
    begin = json.loads(raw[8 : 8 + n])[NAME]["data_offsets"][0]
    raw[8 + n + begin : 12 + n + begin] = np.float32(1e6).tobytes()
    (folder / SHARD).write_bytes(raw)
    assert main([str(folder), str(tmp_path / "out.gguf"), "--quant", "F16"]) == 1
    assert f"{NAME} (model.safetensors) as F16: got the value 1e+06, expected at most 65504" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
