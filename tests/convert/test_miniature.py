"""The miniature checkpoint against independent readers: safetensors, tiktoken, tokenizers."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from safetensors import deserialize, safe_open
from tokenizers import Tokenizer

from hymoe.convert import miniature
from hymoe.convert.miniature import SPECIAL_TOKENS, Spec, write
from hymoe.errors import OutputError
from hymoe.imatrix import calibration

SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 32, "n_ff": 32, "n_expert": 4}


def small(**changes: Any) -> Spec:
    return Spec(**{**SMALL, **changes})


def config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return loaded


def load(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by name as float32, read by the safetensors library from all shards."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
            found[name] = as_float(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])
    return found


def as_float(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def encoding(file: Path) -> tiktoken.Encoding:
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("miniature", pat_str=miniature.PATTERN, mergeable_ranks=ranks, special_tokens=special)


SAMPLES = [
    "The lamp at the end of the pier, 1234567890 times; it's DON'T.",
    "一个小女孩拿来一只旧怀表，說是爺爺留下的。",
    "for (int i = 0; i < n; i++) {\r\n\tx += a[i];\n\n\n}   \n",
    "🙂 naïve café Ω≈ç√ \u200b\u0301 \x00\x7f end ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("miniature") / "model")


def test_tiktoken_reads_the_vocabulary_and_round_trips(folder: Path) -> None:
    tokens = encoding(folder / "hy.tiktoken")
    assert tokens.n_vocab == config(folder)["vocab_size"] == 2000
    for text in (*SAMPLES, calibration.joined()):
        assert tokens.decode(tokens.encode(text)) == text
    assert 2.5 * len(tokens.encode(calibration.joined())) < len(calibration.joined().encode())


def test_byte_alphabet_is_complete_and_ranks_are_lines(folder: Path) -> None:
    lines = [line.split() for line in (folder / "hy.tiktoken").read_bytes().splitlines()]
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert [int(rank) for _, rank in lines] == list(range(len(lines)))
    assert sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens)) == len(tokens)


def test_special_tokens_stand_where_the_published_ones_do(folder: Path) -> None:
    # Published: 127957 ranks, then <|endoftext|> 127957 … <|pad|> 127961, <|extra_0|> 127962, <|extra_204|> 128166.
    ids = {token: 127957 + i for i, token in enumerate(SPECIAL_TOKENS)}
    published = {"<|startoftext|>": 127958, "<|bos|>": 127959, "<|eos|>": 127960, "<|pad|>": 127961}
    published |= {"<|extra_0|>": 127962, "<|extra_4|>": 127966, "<|extra_5|>": 127967, "<|extra_204|>": 128166}
    assert {token: ids[token] for token in published} == published
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [ids["<|eos|>"] - 127957 + 1790, ids["<|extra_5|>"] - 127957 + 1790]


@pytest.mark.parametrize("text", SAMPLES)
def test_tokenizer_json_gives_the_ids_of_tiktoken(tmp_path: Path, folder: Path, text: str) -> None:
    write(tmp_path / "m", small(config_style="transformers5"))
    tokens = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    # tokenizer.json normalises to NFC as the vendor's tokenizer does; the samples are NFC already but for one accent.
    ids = encoding(folder / "hy.tiktoken").encode(tokens.normalizer.normalize_str(text))
    assert tokens.encode(text, add_special_tokens=False).ids == ids
    assert tokens.token_to_id("<|extra_204|>") == 1999


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_shapes_are_the_published_ones(tmp_path: Path, dtype: miniature.DType) -> None:
    """Names and shapes from modeling_hunyuan.py, written out for one small model by hand."""
    write(tmp_path / "m", small(n_layer=1, n_expert=2, n_expert_used=1, n_shared=3, n_ff_exp=48, dtype=dtype))
    mlp = {"mlp.shared_mlp": 96, "mlp.experts.0": 48, "mlp.experts.1": 48}
    expected: dict[str, list[int]] = {
        "self_attn.q_proj": [64, 64],
        "self_attn.k_proj": [32, 64],
        "self_attn.v_proj": [32, 64],
        "self_attn.o_proj": [64, 64],
        "self_attn.query_layernorm": [32],
        "self_attn.key_layernorm": [32],
        "input_layernorm": [64],
        "post_attention_layernorm": [64],
        "mlp.gate.wg": [2, 64],
        **{f"{name}.{side}_proj": [ff, 64] for name, ff in mlp.items() for side in ("gate", "up")},
        **{f"{name}.down_proj": [64, ff] for name, ff in mlp.items()},
    }
    with safe_open(tmp_path / "m" / "model.safetensors", framework="np") as reader:
        shapes = {name: reader.get_slice(name).get_shape() for name in reader.keys()}  # noqa: SIM118
        dtypes = {name: reader.get_slice(name).get_dtype() for name in shapes}
    assert shapes == {
        "model.embed_tokens.weight": [2000, 64],
        "model.norm.weight": [64],
        **{f"model.layers.0.{name}.weight": shape for name, shape in expected.items()},
    }
    assert dtypes == dict.fromkeys(shapes, dtype) | {"model.layers.0.mlp.gate.wg.weight": "F32"}


def test_default_has_what_an_a13b_has(folder: Path) -> None:
    made = config(folder)
    assert made["num_hidden_layers"] == 4
    assert made["num_experts"] == 12
    assert made["moe_topk"] == [3] * 4
    assert made["rope_scaling"]["alpha"] == 1000.0
    assert made["tie_word_embeddings"] is True
    names = load(folder).keys()
    assert len(names) == 2 + 4 * (4 + 4 + 1 + 3 + 3 * 12)
    assert "lm_head.weight" not in names


def test_values_are_lively(folder: Path) -> None:
    weights = load(folder)
    assert all(np.isfinite(values).all() for values in weights.values())
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(3 / 16, rel=0.02)
    assert weights["model.layers.1.mlp.experts.5.up_proj.weight"].std() == pytest.approx(1 / 16, rel=0.02)
    assert weights["model.layers.1.input_layernorm.weight"].mean() == pytest.approx(1, abs=0.1)
    assert len({values.tobytes() for values in weights.values()}) == len(weights)


def test_same_seed_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    def digest(name: str, spec: Spec) -> dict[str, str]:
        files = sorted(write(tmp_path / name, spec).iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    first, again, other = digest("a", small()), digest("b", small()), digest("c", small(seed=1))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    one = load(write(tmp_path / "one", small()))
    folder = write(tmp_path / "many", small(max_shard_bytes=100_000))
    many = load(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, framework="np") as reader:
            assert set(reader.keys()) == {name for name, shard in index["weight_map"].items() if shard == file}


def test_large_checkpoints_are_cut_from_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miniature, "FRESH_PARAMETERS", 0)
    monkeypatch.setattr(miniature, "BLOCK_ELEMENTS", 1009)
    weights = load(write(tmp_path / "m", small()))
    assert weights["model.layers.0.mlp.experts.1.up_proj.weight"].std() == pytest.approx(1 / 8, rel=0.1)
    assert weights["model.norm.weight"].mean() == pytest.approx(1, abs=0.1)
    assert len({values.tobytes() for values in weights.values()}) == len(weights)


def test_untied_head_is_stored(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", small(tied=False))
    assert load(folder)["lm_head.weight"].shape == (2000, 64)
    assert config(folder)["tie_word_embeddings"] is False


def test_newer_transformers_form(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", small(config_style="transformers5"))
    made = config(folder)
    assert made["model_type"] == "hunyuan_v1_moe"
    assert (made["head_dim"], made["dtype"]) == (32, "bfloat16")
    assert made["rope_parameters"]["rope_type"] == "dynamic"
    assert made["rope_parameters"]["rope_theta"] == 10000.0
    assert not {"rope_scaling", "rope_theta", "torch_dtype", "attention_head_dim"} & made.keys()
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert not list(folder.glob("*.tiktoken"))


def test_a_vocabulary_of_your_own(tmp_path: Path, folder: Path) -> None:
    other = write(tmp_path / "m", small(vocab=folder / "hy.tiktoken", vocab_file="hunyuan.tiktoken"))
    assert (other / "hunyuan.tiktoken").read_bytes() == (folder / "hy.tiktoken").read_bytes()


def test_command_writes_refuses_and_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "demo"
    assert miniature.main([str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    before = (target / "model.safetensors").read_bytes()
    assert miniature.main([str(target), "--seed", "1"]) == 1
    assert capsys.readouterr().err == f"error: {target} is not empty; choose another folder or pass --overwrite\n"
    assert (target / "model.safetensors").read_bytes() == before
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    assert miniature.main([str(target), "--seed", "1", "--overwrite"]) == 0
    assert (target / "model.safetensors").read_bytes() != before
    assert (target / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="taken"):
        write(target, small(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_manifest_describes_every_calibration_text() -> None:
    found = {text.file: text for text in calibration.texts()}
    on_disk = (Path(calibration.__file__).parent / "texts").glob("*.txt")
    assert found.keys() == {file.name for file in on_disk}
    for text in found.values():
        assert text.bytes == len(text.content.encode()), text.file
        assert text.licence == "MIT"
