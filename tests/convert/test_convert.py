"""What the converter writes: every tensor, every key, read back with gguf-py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from published_names import SINGLE

from hymoe.convert import miniature
from hymoe.convert.cli import main
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
ARCH = "hunyuan-moe"

VARIANTS = {
    "bf16": Spec(n_layer=2),
    "f32": Spec(n_layer=2, dtype="F32"),
    "f16": Spec(n_layer=1, dtype="F16", router_dtype="F16"),
    "router bf16": Spec(n_layer=1, router_dtype="BF16"),
    "untied": Spec(n_layer=1, tied=False),
    "two shared": Spec(n_layer=1, n_shared=2),
    "narrow experts": Spec(n_layer=1, n_ff_exp=128),
    "plain rope": Spec(n_layer=1, alpha=None),
    "sharded": Spec(n_layer=2, max_shard_bytes=3 << 20),
    "transformers 5": Spec(n_layer=2, config_style="transformers5"),
    "transformers 5, sharded, untied": Spec(
        n_layer=2, config_style="transformers5", max_shard_bytes=3 << 20, tied=False
    ),
    "hunyuan.tiktoken": Spec(n_layer=1, vocab_file="hunyuan.tiktoken"),
}


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read every tensor of a checkpoint as float64, without the converter's code."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + n]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            values = np.frombuffer(raw[8 + n + begin : 8 + n + end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


def expected_tensors(folder: Path, spec: Spec) -> dict[str, np.ndarray[Any, Any]]:
    """What the GGUF must hold, from the published names, written out once more and on purpose."""
    source = stored(folder)
    result = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": source["model.norm.weight"],
    }
    if not spec.tied:
        result["output.weight"] = source["lm_head.weight"]
    for il in range(spec.n_layer):
        for ours, theirs in SINGLE.items():
            result[f"blk.{il}.{ours}.weight"] = source[f"model.layers.{il}.{theirs}.weight"]
        for part in ("gate", "up", "down"):
            experts = [source[f"model.layers.{il}.mlp.experts.{e}.{part}_proj.weight"] for e in range(spec.n_expert)]
            result[f"blk.{il}.ffn_{part}_exps.weight"] = np.stack(experts)
    return result


def values(tensor: Any) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type)
    return result.astype(np.float64).reshape(tensor.shape[::-1].tolist())


def keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_equals_its_source(name: str, tmp_path: Path) -> None:
    spec = VARIANTS[name]
    folder = miniature.write(tmp_path / "in", spec)
    # F32 holds any source exactly; the type of a BF16 source's matrices is compared in the next test.
    convert(ConvertOptions(folder, tmp_path / "out.gguf", "F32"))
    expected = expected_tensors(folder, spec)
    reader = GGUFReader(tmp_path / "out.gguf")
    assert sorted(tensor.name for tensor in reader.tensors) == sorted(expected)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(values(tensor), expected[tensor.name], err_msg=tensor.name)


@pytest.mark.parametrize("quant", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_types_and_rounding(dtype: miniature.DType, quant: str, tmp_path: Path) -> None:
    """Matrices get the type asked for, rounded to nearest even; norms and the router stay F32."""
    folder = miniature.write(tmp_path / "in", Spec(n_layer=1, dtype=dtype))
    convert(ConvertOptions(folder, tmp_path / "out.gguf", quant))
    expected = expected_tensors(folder, Spec(n_layer=1))
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        want = expected[tensor.name]
        small = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if small else quant), tensor.name
        if not small:
            # An oracle of its own: BF16 is F32 cut to 8 bits of mantissa, so round the mantissa with frexp.
            mantissa, exponent = np.frexp(want)
            want = np.ldexp(np.rint(mantissa * 256) / 256, exponent) if quant == "BF16" else want.astype(np.float16)
        np.testing.assert_array_equal(values(tensor), want, err_msg=tensor.name)


@pytest.mark.engine
def test_q8_0_equals_gguf_pys(mini: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    convert(ConvertOptions(mini, tmp_path / "out.gguf", "Q8_0"))
    expected = expected_tensors(mini, Spec())
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q8_0:
            want = quantize(expected[tensor.name].astype(np.float32), GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(tensor.data.reshape(-1), want.reshape(-1), err_msg=tensor.name)
        else:
            assert len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name


def test_metadata(mini: Path, mini_gguf: Path) -> None:
    found = keys(GGUFReader(mini_gguf))
    tokens = found["tokenizer.ggml.tokens"]
    base = tokens.index("<|endoftext|>")
    expected = {
        "general.architecture": ARCH,
        "general.type": "model",
        "general.name": "HunYuan Miniature",
        f"{ARCH}.block_count": 4,
        f"{ARCH}.context_length": 262144,
        f"{ARCH}.embedding_length": 256,
        f"{ARCH}.feed_forward_length": 256,
        f"{ARCH}.attention.head_count": 4,
        f"{ARCH}.attention.head_count_kv": 2,
        f"{ARCH}.attention.key_length": 64,
        f"{ARCH}.attention.value_length": 64,
        f"{ARCH}.rope.dimension_count": 64,
        f"{ARCH}.rope.scaling.type": "none",
        f"{ARCH}.expert_count": 12,
        f"{ARCH}.expert_used_count": 3,
        f"{ARCH}.expert_shared_count": 1,
        f"{ARCH}.expert_feed_forward_length": 256,
        f"{ARCH}.expert_shared_feed_forward_length": 256,
        f"{ARCH}.expert_weights_norm": True,
        f"{ARCH}.vocab_size": 2000,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_last_n": -1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "hunyuan",
        "tokenizer.ggml.bos_token_id": base + 2,
        "tokenizer.ggml.eos_token_id": base + 3,
        "tokenizer.ggml.eot_token_id": base + 10,
        "tokenizer.ggml.padding_token_id": base + 4,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert tokens[base + 10] == "<|extra_5|>"
    assert tokens[-1] == "<|extra_204|>"
    assert found[f"{ARCH}.rope.freq_base"] == pytest.approx(10000 * 1000 ** (64 / 62), rel=1e-7)
    for key, value in {"temp": 0.7, "top_p": 0.8, "penalty_repeat": 1.05}.items():
        assert found[f"general.sampling.{key}"] == pytest.approx(value, rel=1e-6)
    template = json.loads((mini / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert found["tokenizer.chat_template"] == template


def test_transformers5_style_means_the_same(tmp_path: Path) -> None:
    """The same model saved by a newer transformers gives the same metadata; a tokenizer.json lists every merge."""
    found = {}
    for style in ("2025", "transformers5"):
        folder = miniature.write(tmp_path / style / "Same-Model", Spec(n_layer=1, config_style=style))
        convert(ConvertOptions(folder, tmp_path / f"{style}.gguf"))
        found[style] = keys(GGUFReader(tmp_path / f"{style}.gguf"))
    ours, every = (found[style].pop("tokenizer.ggml.merges") for style in ("2025", "transformers5"))
    assert found["2025"] == found["transformers5"]
    assert len(ours) == 1790 - 256
    assert set(ours) < set(every)


@pytest.mark.data
def test_published_config(data: Path, tmp_path: Path) -> None:
    """The real config, generation config, vocabulary and template, with the weights' names and shapes only."""
    from hymoe.convert import architectures
    from hymoe.convert.config import Config
    from hymoe.convert.metadata import tokenizer
    from hymoe.convert.vocab import read_vocabulary

    folder = data / "a13b"
    arch = architectures.load(Config.load(folder / "config.json"), Config.load(folder / "generation_config.json"))
    vocabulary = read_vocabulary(folder, arch.n_vocab, arch.n_extra)
    found = {key.key: key.value for key in (*arch.metadata, *tokenizer(vocabulary, arch, folder, keep_template=True))}
    assert found[f"{ARCH}.rope.freq_base"] == pytest.approx(11158839.92507748, rel=1e-12)
    assert found[f"{ARCH}.context_length"] == 262144
    assert found["tokenizer.ggml.bos_token_id"] == 127959
    assert found["tokenizer.ggml.eos_token_id"] == 127960
    assert found["tokenizer.ggml.eot_token_id"] == 127967
    assert vocabulary.tokens[127962] == "<|extra_0|>"
    assert len(vocabulary.merges) == 127699
    # The template's bytes, compared without our reading of JSON strings: encode it again.
    raw = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.dumps(found["tokenizer.chat_template"], ensure_ascii=False) in raw


def test_template_file_wins_and_pretrain_gets_ours(mini: Path, tmp_path: Path) -> None:
    from hymoe import chat_templates
    from hymoe.convert.metadata import template, vendors_template

    assert vendors_template(tmp_path) is None
    assert next(template(None, keep=False)).value == chat_templates.fallback()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "A"}]}')
    assert vendors_template(tmp_path) == "A"
    (tmp_path / "chat_template.jinja").write_bytes("{{ '你好' }}\r\n\n".encode())
    assert vendors_template(tmp_path) == "{{ '你好' }}\r\n\n"


def test_dropped_lm_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantizers write the tied head again; it is dropped, and -v says so."""
    folder = miniature.write(tmp_path / "in", Spec(n_layer=1, tied=False))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert main([str(folder), str(tmp_path / "out.gguf"), "-v"]) == 0
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert "dropped lm_head.weight" in capsys.readouterr().err


def test_provenance(mini: Path, tmp_path: Path) -> None:
    """A folder of the hub's cache tells repository and revision; so does a --local-dir download."""
    revision = "2798f3c0" * 5
    cached = tmp_path / "models--tencent--Hunyuan-A13B-Instruct" / "snapshots" / revision
    cached.mkdir(parents=True)
    for file in mini.iterdir():
        (cached / file.name).symlink_to(file)
    convert(ConvertOptions(cached, tmp_path / "a.gguf"))
    found = keys(GGUFReader(tmp_path / "a.gguf"))
    assert found["general.name"] == "Hunyuan A13B Instruct"
    assert found["general.source.repo_url"] == "https://huggingface.co/tencent/Hunyuan-A13B-Instruct"
    assert found["hymoe.source.revision"] == revision
    local = Path(shutil.copytree(mini, tmp_path / "Hunyuan-A13B-Pretrain"))
    note = local / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{revision}\netag\n1.0\n")
    convert(ConvertOptions(local, tmp_path / "b.gguf"))
    found = keys(GGUFReader(tmp_path / "b.gguf"))
    assert found["general.name"] == "Hunyuan A13B Pretrain"
    assert found["hymoe.source.revision"] == revision
    note.write_bytes(b"\xff" * 40 + b"\n")
    convert(ConvertOptions(local, tmp_path / "c.gguf"))
    assert "hymoe.source.revision" not in keys(GGUFReader(tmp_path / "c.gguf"))


def test_cli_prints_plan_and_writes_nothing(mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mini), "--dry-run", "--quant", "F16"]) == 0
    out = capsys.readouterr().out
    assert "blk.*.ffn_gate_exps.weight   12 × 256 × 256  BF16    F16" in out
    assert "F16: 62 tensors, 0.012 B weights" in out
    assert not list(tmp_path.iterdir())


def test_usage_errors(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mini)]) == 2
    assert main([]) == 2
    assert main([str(mini), "x.gguf", "--quant", "Q9"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_output_is_the_same_twice_and_value_types_fit(mini: Path, mini_gguf: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(mini, tmp_path / "again.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == mini_gguf.read_bytes()
    fields = GGUFReader(mini_gguf).fields
    assert fields["general.sampling.penalty_last_n"].types == [GGUFValueType.INT32]
    assert fields[f"{ARCH}.rope.freq_base"].types == [GGUFValueType.FLOAT32]
    assert fields["tokenizer.ggml.token_type"].types == [GGUFValueType.ARRAY, GGUFValueType.INT32]


def test_overwrite(mini: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    assert main([str(mini), str(out)]) == 1
    assert out.read_bytes() == b"old"
    assert main([str(mini), str(out), "--overwrite", "-q"]) == 0
    assert out.read_bytes()[:4] == b"GGUF"
