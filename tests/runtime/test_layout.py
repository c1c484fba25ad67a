"""What a layout says of a file: against gguf-py's reader, and against the engine's own count."""

from __future__ import annotations

from pathlib import Path

import paper
import pytest
from gguf import GGUFReader, GGUFWriter
from large_model import Large
from large_model import write as write_large
from tiny_model import N_EXPERT, N_EXPERT_USED, N_LAYER, TRAINED, add_hparams, tensors, write_model

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.errors import ModelFileError
from hymoe.runtime import layout
from hymoe.runtime.layout import Entry, Layout, Role

ROLES = {
    "token_embd.weight": Role.EMBEDDING,
    "output.weight": Role.OUTPUT,
    "output_norm.weight": Role.NORM,
    "blk.1.attn_q.weight": Role.ATTENTION,
    "blk.1.attn_output.weight": Role.ATTENTION,
    "blk.1.attn_norm.weight": Role.NORM,
    "blk.1.attn_k_norm.weight": Role.NORM,
    "blk.1.ffn_norm.weight": Role.NORM,
    "blk.1.ffn_gate_inp.weight": Role.ROUTER,
    "blk.1.ffn_down_shexp.weight": Role.SHARED,
    "blk.1.ffn_gate_exps.weight": Role.EXPERTS,
    "blk.1.ffn_up_exps.weight": Role.EXPERTS,
    "blk.1.ffn_down_exps.weight": Role.EXPERTS,
}


def as_read(path: Path) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Every tensor by gguf-py: name, row-major shape, type, bytes."""
    return [
        (str(t.name), tuple(reversed([int(n) for n in t.shape])), str(t.tensor_type.name), int(t.n_bytes))
        for t in GGUFReader(path).tensors
    ]


def as_laid_out(found: Layout) -> list[tuple[str, tuple[int, ...], str, int]]:
    return [(t.name, t.shape, t.type, t.n_bytes) for t in found.tensors]


@pytest.mark.parametrize("model", [paper.A13B, paper.LARGE], ids=["a13b", "large"])
def test_every_tensor_is_what_gguf_py_reads(model: paper.Paper, tmp_path: Path) -> None:
    file = paper.write(tmp_path / "model.gguf", model)
    found = layout.read(file)
    assert as_laid_out(found) == as_read(file)
    assert (found.shape.n_layer, found.shape.head_dim) == (model.n_layer, model.head_dim)
    assert (found.shape.n_expert, found.shape.n_expert_used) == (model.n_expert, model.n_expert_used)
    assert (found.shape.n_vocab, found.n_ff_exp) == (model.n_vocab, model.n_ff)
    assert found.n_bytes == sum(layer.dense + layer.experts for layer in found.layers) + found.output
    assert found.is_tied


def test_roles(tmp_path: Path) -> None:
    found = {t.name: t for t in layout.read(write_model(tmp_path / "tiny.gguf")).tensors}
    assert {name: found[name].role for name in ROLES} == ROLES
    assert found["blk.1.attn_q.weight"].layer == 1
    assert found["output.weight"].layer is None


def test_an_untied_model_has_an_output_matrix(tmp_path: Path) -> None:
    found = layout.read(write_model(tmp_path / "tiny.gguf"))
    by_name = {t.name: t.n_bytes for t in found.tensors}
    assert not found.is_tied
    assert found.output == by_name["output.weight"] + by_name["output_norm.weight"]
    assert found.shape.n_ctx_train == TRAINED


def test_all_parts_of_a_split_model_count(mini: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(mini, tmp_path / "whole.gguf"))
    parts = convert(ConvertOptions(mini, tmp_path / "split.gguf", split_max_bytes=200_000)).files
    assert len(parts) > 2
    assert as_laid_out(layout.read(parts[0])) == as_laid_out(layout.read(tmp_path / "whole.gguf"))
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=rf"parts: got {len(parts) - 1}, expected {len(parts)}"):
        layout.read(parts[0])


def test_large_shares_its_cache(tmp_path: Path) -> None:
    write_large(tmp_path / "large", Large(n_layer=7, factor=3))
    convert(ConvertOptions(tmp_path / "large", tmp_path / "large.gguf"))
    found = layout.read(tmp_path / "large.gguf")
    assert [layer.owns_kv for layer in found.layers] == [True, False, False, True, False, False, True]
    assert found.n_kv_layers == 3
    # one head of 80 elements, keys and values of two bytes, 1000 tokens rounded up to 1024
    assert found.kv_bytes(1000, "f16") == 1024 * 80 * 2 * 2
    assert found.kv_types() == ("f16",)


@pytest.mark.parametrize(("kv_type", "n_bytes"), [("f16", 4 << 30), ("q8_0", 34 << 26), ("q4_0", 18 << 26)])
def test_cache_of_a13b(kv_type: str, n_bytes: int, tmp_path: Path) -> None:
    """128 KiB for each token in F16, blocks of 34 and 18 bytes for 32 elements in the others."""
    found = layout.read(paper.write(tmp_path / "model.gguf", paper.A13B))
    assert found.n_kv_layers * found.kv_bytes(32768, kv_type) == n_bytes
    assert kv_type in found.kv_types()


def test_a_table_is_enough(tmp_path: Path) -> None:
    read = layout.read(paper.write(tmp_path / "model.gguf", paper.A13B))
    scalars = {
        "hunyuan-moe.block_count": 32,
        "hunyuan-moe.embedding_length": 4096,
        "hunyuan-moe.attention.head_count": 32,
        "hunyuan-moe.attention.head_count_kv": 8,
        "hunyuan-moe.expert_count": 64,
        "hunyuan-moe.expert_used_count": 8,
        "hunyuan-moe.context_length": 262144,
    }
    made = layout.of("model.gguf", "hunyuan-moe", scalars, [Entry(t.name, t.shape, t.type) for t in read.tensors])
    assert made == read


def test_experts_of_another_type(tmp_path: Path) -> None:
    found = layout.read(paper.write(tmp_path / "model.gguf", paper.A13B)).with_experts("Q2_K")
    assert {t.type for t in found.tensors if t.role is Role.EXPERTS} == {"Q2_K"}
    # 2.625 bits for each weight
    assert found.layers[0].experts == 3 * 64 * 3072 * 4096 * 84 // 256
    large = layout.read(paper.write(tmp_path / "large.gguf", paper.LARGE)).with_experts("Q6_K")
    types = {t.name.split(".")[2]: t.type for t in large.tensors if t.layer == 0 and t.role is Role.EXPERTS}
    assert types == {"ffn_gate_exps": "Q6_K", "ffn_up_exps": "Q6_K", "ffn_down_exps": "Q8_0"}


def write_part(path: Path, *, left_out: str = "") -> Path:
    """The tiny model without the tensors whose names begin so."""
    writer = GGUFWriter(path, "hunyuan-moe")
    add_hparams(writer, N_LAYER, 64, 64, heads=(4, 2, 16), experts=(N_EXPERT, N_EXPERT_USED))
    for name, tensor in tensors(300):
        if not name.startswith(left_out) or not left_out:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no token_embd\.weight"):
        layout.read(write_part(tmp_path / "a.gguf", left_out="token_embd"))
    with pytest.raises(ModelFileError, match="layers: got tensors of 1, expected 2"):
        layout.read(write_part(tmp_path / "b.gguf", left_out="blk.1."))
    with pytest.raises(ModelFileError, match=r"hunyuan-moe\.embedding_length: got nothing"):
        layout.of("c", "hunyuan-moe", {"hunyuan-moe.block_count": 1}, [Entry("token_embd.weight", (4, 32), "F32")])


def test_a_type_that_ggml_lacks_is_refused(tmp_path: Path) -> None:
    file = write_part(tmp_path / "a.gguf")
    raw = bytearray(file.read_bytes())
    at = raw.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8  # one dimension; then the type
    raw[at : at + 4] = (4000).to_bytes(4, "little")
    file.write_bytes(raw)
    with pytest.raises(ModelFileError, match="tensor table"):
        layout.read(file)
