"""Quantized checkpoints: the exact values in, whatever the format; and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert.quantized import SCHEMES, SHARD, SPEC, Awq, Fp8, Gptq, Stored, edit_settings, edit_tensors, float8
from convert.test_bad_input import fails
from convert.test_convert import expected_tensors, values
from gguf import GGMLQuantizationType, GGUFReader

from convert import quantized
from hymoe.convert import miniature
from hymoe.convert.checkpoint import Folder, open_checkpoint
from hymoe.convert.cli import main
from hymoe.convert.config import Config
from hymoe.convert.convert import ConvertOptions, convert, prepare
from hymoe.convert.sources import Source, gather
from hymoe.convert.sources.fp8 import E4M3
from hymoe.convert.weights import encoded
from hymoe.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module", params=SCHEMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.write(tmp_path_factory.mktemp("quantized"), SCHEMES[request.param])


def test_every_value_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(checkpoint, tmp_path / "out.gguf", "F32"))
    expected = expected_tensors(checkpoint.parent / "exact", SPEC)
    found = GGUFReader(tmp_path / "out.gguf").tensors
    assert sorted(tensor.name for tensor in found) == sorted(expected)
    for tensor in found:
        np.testing.assert_array_equal(values(tensor), expected[tensor.name], err_msg=tensor.name)


def test_bf16_is_rounded_once(checkpoint: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(checkpoint, tmp_path / "out.gguf", "BF16"))
    expected = expected_tensors(checkpoint.parent / "exact", SPEC)
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        want = expected[tensor.name]
        if tensor.tensor_type.name == "BF16":
            mantissa, exponent = np.frexp(want)
            want = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
        np.testing.assert_array_equal(values(tensor), want, err_msg=tensor.name)


def source_of(folder: Path, name: str) -> tuple[Any, Source]:
    opened = open_checkpoint(Folder(folder))
    return opened, gather(opened, Config.load(folder / "config.json"))[0][name]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (3, 10), (7, 2), (8, 8), (9, 30), (63, 1), (0, 64)])
def test_rows_may_start_anywhere(first: int, count: int, checkpoint: Path) -> None:
    opened, source = source_of(checkpoint, f"{UP}.weight")
    want = quantized.read_stored(checkpoint.parent / "exact" / SHARD)[f"{UP}.weight"][1]
    with opened:
        found = source.read(opened, first, count)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want[first : first + count])


def test_float8_by_its_definition() -> None:
    np.testing.assert_array_equal(E4M3, np.array([float8(byte) for byte in range(256)], np.float32))
    assert E4M3[0x7E] == 448
    assert E4M3[0xFE] == -448
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    assert E4M3[1] == 2.0**-9
    assert np.signbit(E4M3[0x80])
    assert E4M3[0x38] == 1


def test_formats_are_named_in_the_plan(checkpoint: Path) -> None:
    plan = prepare(checkpoint, "BF16").plan
    formats = {tensor.name: {source.format for source in tensor.sources} for tensor in plan.tensors}
    assert formats["token_embd.weight"] == {"BF16"}
    assert formats["blk.0.ffn_gate_inp.weight"] == {"F32"}
    assert formats["blk.1.ffn_up_exps.weight"] <= {"FP8", "GPTQ-Int4", "GPTQ-Int8", "AWQ-Int4"}


def added(new: dict[str, Stored]) -> Callable[[dict[str, Stored]], None]:
    return lambda stored: stored.update(new)


def test_stored_lm_head_of_a_tied_model_is_dropped(tmp_path: Path) -> None:
    """Quantizers write it though it is the embedding; quantized as well, it is dropped all the same."""
    for scheme in (Fp8(), Gptq(), Awq()):
        folder = quantized.write(tmp_path / type(scheme).__name__, scheme)
        members, _ = scheme.pack(np.random.default_rng(1), 512, SPEC.n_embd)
        n_vocab = quantized.read_stored(folder / SHARD)["model.embed_tokens.weight"][1].shape[0]
        if isinstance(scheme, Fp8):
            members = scheme.pack(np.random.default_rng(1), n_vocab, SPEC.n_embd)[0]
        else:
            members = {"weight": ("BF16", np.ones((n_vocab, SPEC.n_embd), np.uint16))}
        edit_tensors(folder, added({f"lm_head.{suffix}": member for suffix, member in members.items()}))
        plan = prepare(folder, "BF16").plan
        assert "lm_head.weight" in {item.name for item in plan.dropped}
        assert "output.weight" not in {tensor.name for tensor in plan.tensors}


def test_scales_of_activations_and_cache_are_dropped(tmp_path: Path) -> None:
    folder = quantized.write(tmp_path, Fp8())
    extra = [f"{Q}.output_scale", "model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    extra += ["model.layers.0.self_attn.kv_scale"]
    edit_tensors(folder, added({name: ("F32", np.ones(1, np.float32)) for name in extra}))
    dropped = {item.name for item in prepare(folder, "BF16").plan.dropped}
    assert dropped > {*extra, f"{Q}.input_scale"}


# -- bad input -------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, scheme: quantized.Scheme) -> Path:
    """Give a checkpoint alone in a folder, as `fails` wants it."""
    folder = quantized.write(tmp_path / "made", scheme)
    folder = folder.rename(tmp_path / "in")
    shutil.rmtree(tmp_path / "made")
    return folder


COMPRESSED = Fp8("1", compressed=True)
SETTINGS_CASES: dict[str, tuple[quantized.Scheme, dict[str, Any], tuple[str, ...]]] = {
    "fp8 blocks": (Fp8(), {"weight_block_size": [128, 128]}, ("weight_block_size: got [128, 128]", "not implemented")),
    "fp8 scheme": (Fp8(), {"activation_scheme": "odd"}, ("activation_scheme: got odd",)),
    "fp8 other float": (Fp8(), {"fmt": "e5m2"}, ("quantization_config: fmt: got e5m2",)),
    "int8": (COMPRESSED, {"format": "int-quantized"}, ("format: got int-quantized, expected",)),
    "packed": (COMPRESSED, {"format": "pack-quantized"}, ("format: got pack-quantized, expected",)),
    "no groups": (COMPRESSED, {"config_groups": {}}, ("config_groups: got 0 groups, expected one",)),
    "groups": (COMPRESSED, {"config_groups": {"a": {}, "b": {}}}, ("config_groups: got 2 groups, expected one",)),
    "no weights": (COMPRESSED, {"config_groups": {"a": {"targets": []}}}, ("weights: type: got nothing",)),
    "a list": (COMPRESSED, {"config_groups": [1]}, ("config_groups: got [1], expected a JSON object",)),
    "rotated": (COMPRESSED, {"transform_config": {"a": 1}}, ('transform_config: got {"a": 1}', "not implemented")),
    "sparse": (COMPRESSED, {"sparsity_config": {"format": "sparse-24"}}, ("sparsity_config: format: got sparse-24",)),
    "3 bits": (Gptq(), {"bits": 3}, ("bits: got 3, expected 4 or 8 (others are not implemented)",)),
    "2 bits": (Gptq(), {"bits": 2}, ("bits: got 2, expected 4 or 8",)),
    "no bits": (Gptq(), {"bits": None}, ("quantization_config: bits: got nothing, expected a value",)),
    "no number": (Gptq(), {"bits": "4"}, ('bits: got "4", expected 4 or 8',)),
    "marlin": (Gptq(), {"checkpoint_format": "marlin"}, ("checkpoint_format: got marlin",)),
    "modules differ": (Gptq(), {"dynamic": {"+:.*down": {"bits": 8}}}, ("quantization_config: dynamic: got {",)),
    "no group size": (Gptq(), {"group_size": None}, ("group_size: got nothing, expected a value",)),
    "group of 0": (Gptq(), {"group_size": 0}, ("group_size: got 0, expected an integer of at least 1",)),
    "group of -2": (Gptq(), {"group_size": -2}, ("group_size: got -2, expected an integer",)),
    "group of 48": (
        Gptq(),
        {"group_size": 48},
        (".qweight (model.safetensors): ", " columns: expected a multiple of group_size 48"),
    ),
    "group of 64": (
        Gptq(),
        {"group_size": 64},
        ("shape of ", "_proj.qzeros (model.safetensors): got [2, 16], expected [1, 16] beside "),
    ),
    "8 for 4": (
        Gptq(),
        {"bits": 8},
        ("shape of ", "_proj.qzeros (model.safetensors): got [2, 16], expected [1, 32] beside "),
    ),
    "desc_act": (Gptq(), {"desc_act": "yes"}, ("desc_act: got yes, expected true or false",)),
    "awq 3 bits": (Awq(), {"bits": 3}, ("bits: got 3, expected 4 (others are not implemented)",)),
    "awq 8 bits": (Awq(), {"bits": 8}, ("bits: got 8, expected 4 (others are not implemented)",)),
    "awq gemv": (Awq(), {"version": "gemv"}, ('version: got gemv, expected "gemm"', "not implemented")),
    "awq group": (
        Awq(),
        {"group_size": 48},
        (".qweight (model.safetensors): ", " columns: expected a multiple of group_size 48"),
    ),
    "awq no group": (Awq(), {"group_size": None}, ("group_size or q_group_size: got nothing",)),
    "method": (Awq(), {"quant_method": "bitsandbytes"}, ("quant_method: got bitsandbytes, expected one of fp8",)),
    "no method": (Awq(), {"quant_method": None}, ("quant_method", "expected one of fp8")),
    "odd method": (Awq(), {"quant_method": ["awq"]}, ("quant_method: got ['awq'], expected one of fp8",)),
    "gptq as awq": (
        Gptq(),
        {"quant_method": "awq", "version": "gemm"},
        (" 8 columns: expected a multiple of group_size 32",),
    ),
    "awq as gptq": (Awq(), {"quant_method": "gptq"}, ("shape of ", "beside")),
    "fp8 as gptq": (Fp8(), {"quant_method": "gptq", "bits": 4, "group_size": 32}, (".weight (", "got F8_E4M3")),
    "gptq as fp8": (Gptq(), {"quant_method": "fp8"}, ("missing tensor", "_proj.weight")),
}


@pytest.mark.parametrize("name", SETTINGS_CASES)
def test_settings(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme, changes, parts = SETTINGS_CASES[name]
    folder = broken(tmp_path, scheme)
    edit_settings(folder, lambda settings: settings | changes)
    fails(folder, capsys, *parts)


def test_compressed_tensors_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the one group says of its weights is refused by key."""
    folder = broken(tmp_path, COMPRESSED)
    text = (folder / "config.json").read_text(encoding="utf-8")
    cases: list[tuple[str, Any]] = [
        ("type", "int"), ("num_bits", 4), ("strategy", "block"), ("strategy", "group"), ("symmetric", False),
        ("dynamic", True), ("group_size", 128), ("block_structure", [128, 128]), ("actorder", "group"),
    ]  # fmt: skip
    for key, value in cases:
        config = json.loads(text)
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        fails(folder, capsys, f"group_0: weights: {key}: got ", "not implemented")


def replaced(name: str, change: Callable[[Any], Any], dtype: str | None = None) -> Callable[[dict[str, Stored]], None]:
    def edit(stored: dict[str, Stored]) -> None:
        old, array = stored[name]
        stored[name] = dtype or old, change(array.copy())

    return edit


def removed(*names: str) -> Callable[[dict[str, Stored]], None]:
    def edit(stored: dict[str, Stored]) -> None:
        for name in names:
            del stored[name]

    return edit


def put(value: Any, *at: int) -> Callable[[Any], Any]:
    """Set one element; the rest stays."""

    def change(array: Any) -> Any:
        array[at] = value
        return array

    return change


def doubled(stored: dict[str, Stored]) -> None:
    stored[f"{UP}.weight"] = "BF16", np.zeros((64, 128), np.uint16)


GROUPED = ("qweight", "qzeros", "scales")
TENSOR_CASES: dict[str, tuple[quantized.Scheme, Callable[[dict[str, Stored]], None], tuple[str, ...]]] = {
    "fp8 no scale": (Fp8(), removed(f"{UP}.weight_scale"), (f"missing tensor {UP}.weight_scale", "download the whole")),
    "fp8 no weight": (Fp8(), removed(f"{UP}.weight"), (f"missing tensor {UP}.weight",)),
    "fp8 inverse scale": (
        Fp8(),
        lambda stored: stored.update({f"{UP}.weight_scale_inv": stored.pop(f"{UP}.weight_scale")}),
        (f"missing tensor {UP}.weight_scale: got {UP}.weight (model.safetensors) of F8_E4M3",),
    ),
    "fp8 scale shape": (
        Fp8(), replaced(f"{UP}.weight_scale", lambda _: np.ones(3, np.float32)),
        (f"shape of {UP}.weight_scale (model.safetensors): got [3], expected one scale, or 64",),
    ),
    "fp8 scale blocks": (
        Fp8(), replaced(f"{UP}.weight_scale", lambda _: np.ones((2, 4), np.float32)),
        (f"shape of {UP}.weight_scale (model.safetensors): got [2, 4]",),
    ),
    "fp8 scale dtype": (
        Fp8(), replaced(f"{UP}.weight_scale", lambda _: np.ones((), np.int32), "I32"),
        (f"dtype of {UP}.weight_scale (model.safetensors): got I32, expected BF16 or F16 or F32",),
    ),
    "fp8 scale of bf16": (
        Fp8(), replaced(f"{UP}.weight", lambda _: np.zeros((64, 128), np.uint16), "BF16"),
        (f"dtype of {UP}.weight (model.safetensors): got BF16, expected F8_E4M3",),
    ),
    "fp8 vector": (
        Fp8(), replaced(f"{UP}.weight", lambda array: array.reshape(-1)),
        (f"shape of {UP}.weight (model.safetensors): got [8192], expected a matrix",),
    ),
    "fp8 shape": (
        Fp8(), replaced(f"{UP}.weight", lambda array: array.reshape(128, 64)),
        (f"shape of {UP}.weight (model.safetensors): got [128, 64], expected [64, 128]",),
    ),
    "fp8 negative scale": (
        Fp8(), replaced(f"{UP}.weight_scale", lambda _: np.float32(-0.5).reshape(())),
        (f"{UP}.weight_scale (model.safetensors): got the scale -0.5, expected a finite number that is not negative",),
    ),
    "fp8 nan scale": (
        Fp8("outx1"), replaced(f"{UP}.weight_scale", put(np.nan, 7, 0)),
        (f"{UP}.weight_scale (model.safetensors) at [7, 0]: got the scale nan",),
    ),
    "fp8 infinite scale": (
        Fp8("1"), replaced(f"{UP}.weight_scale", put(np.inf, 0)),
        (f"{UP}.weight_scale (model.safetensors) at [0]: got the scale inf",),
    ),
    "fp8 nan": (
        Fp8(), replaced(f"{UP}.weight", put(0xFF, 5, 9)),
        (f"{UP}.weight (model.safetensors) at [5, 9]: got the weight nan, expected a finite number",),
    ),
    "fp8 overflow": (
        Fp8(), replaced(f"{UP}.weight_scale", lambda _: np.float32(3e38).reshape(())),
        (f"{UP}.weight (model.safetensors) at [", "got the weight ", "inf"),
    ),
    **{
        f"{kind} no {member}": (
            scheme, removed(f"{UP}.{member}"), (f"missing tensor {UP}.{member}", f"got {UP}.", "download the whole")
        )
        for kind, scheme in (("gptq", Gptq()), ("awq", Awq())) for member in GROUPED
    },
    "gptq lost g_idx": (Gptq(), removed(f"{UP}.g_idx"), (f"missing tensor {UP}.g_idx", "desc_act")),
    "gptq all lost": (
        Gptq(), removed(*(f"{UP}.{member}" for member in (*GROUPED, "g_idx"))),
        (f"missing tensor {UP}.weight",),
    ),
    "gptq twice": (Gptq(), doubled, (f"{UP}.weight (model.safetensors): got {UP}.qweight", "expected one of them")),
    "gptq bias": (
        Gptq(), added({f"{UP}.bias": ("F32", np.zeros(64, np.float32))}),
        (f"unexpected tensor {UP}.bias",),
    ),
    "gptq qweight dtype": (
        Gptq(), replaced(f"{UP}.qweight", lambda array: array.view(np.float32), "F32"),
        (f"dtype of {UP}.qweight (model.safetensors): got F32, expected I32",),
    ),
    "gptq qweight vector": (
        Gptq(), replaced(f"{UP}.qweight", lambda array: array.reshape(-1)),
        (f"shape of {UP}.qweight (model.safetensors): got [1024], expected a matrix",),
    ),
    "gptq qweight empty": (
        Gptq(), replaced(f"{UP}.qweight", lambda array: array[:0]),
        (f"shape of {UP}.qweight (model.safetensors): got [0, 64], expected a matrix",),
    ),
    "gptq qweight half": (
        Gptq(), replaced(f"{UP}.qweight", lambda array: array[:8]),
        ("shape of ", f"{UP}.qzeros", "got [4, 8], expected [2, 8] beside"),
    ),
    "gptq scales shape": (
        Gptq(), replaced(f"{UP}.scales", lambda array: array.T.copy()),
        (f"shape of {UP}.scales (model.safetensors): got [64, 4], expected [4, 64] beside {UP}.qweight",),
    ),
    "gptq scales dtype": (
        Gptq(), replaced(f"{UP}.scales", lambda array: array.astype(np.int32), "I32"),
        (f"dtype of {UP}.scales (model.safetensors): got I32",),
    ),
    "gptq g_idx shape": (
        Gptq(), replaced(f"{UP}.g_idx", lambda array: array[:64]),
        (f"shape of {UP}.g_idx (model.safetensors): got [64], expected [128]",),
    ),
    "gptq g_idx above": (
        Gptq(), replaced(f"{UP}.g_idx", put(4, 17)),
        (f"{UP}.g_idx (model.safetensors) at [17]: got 4, expected a group from 0 to 3",),
    ),
    "gptq g_idx below": (
        Gptq(), replaced(f"{UP}.g_idx", put(-1, 3)), (f"{UP}.g_idx (model.safetensors) at [3]: got -1, expected",)
    ),
    "gptq negative scale": (
        Gptq(scale_dtype="F32"), replaced(f"{UP}.scales", put(-1.0, 2, 5)),
        (f"{UP}.scales (model.safetensors) at [2, 5]: got the scale -1, expected a finite number",),
    ),
    "gptq nan scale": (
        Gptq(scale_dtype="F16"), replaced(f"{UP}.scales", put(np.nan, 3, 63)),
        (f"{UP}.scales (model.safetensors) at [3, 63]: got the scale nan",),
    ),
    "awq infinite scale": (
        Awq(), replaced(f"{UP}.scales", put(np.inf, 1, 13)),
        (f"{UP}.scales (model.safetensors) at [1, 13]: got the scale inf",),
    ),
    "awq overflow": (
        Awq(scale_dtype="F32"), replaced(f"{UP}.scales", put(3e38, 1, 13)),
        (f"{UP}.weight (model.safetensors) at [13, ", "got the weight ", "inf"),
    ),
    "awq shape": (
        Awq(), replaced(f"{UP}.qweight", lambda array: array[:64]),
        ("shape of ", f"{UP}.qzeros", "got [4, 8], expected [2, 8] beside"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_CASES)
def test_tensors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme, change, parts = TENSOR_CASES[name]
    folder = broken(tmp_path, scheme)
    edit_tensors(folder, change)
    fails(folder, capsys, *parts)


# -- values ----------------------------------------------------------------------------------------------------------

PLAIN_BAD: dict[str, tuple[miniature.DType, Any]] = {
    "bf16 nan": ("BF16", 0x7FC1), "bf16 negative nan": ("BF16", 0xFFFF),
    "bf16 inf": ("BF16", 0x7F80), "bf16 negative inf": ("BF16", 0xFF80),
    "f16 nan": ("F16", np.nan), "f16 inf": ("F16", -np.inf),
    "f32 nan": ("F32", np.nan), "f32 inf": ("F32", np.inf), "f32 negative inf": ("F32", -np.inf),
}  # fmt: skip


@pytest.mark.parametrize("quant", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", PLAIN_BAD)
def test_plain_weights_that_are_no_numbers(
    name: str, quant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether bytes are copied or converted: tensor and first index, and no file."""
    dtype, bad = PLAIN_BAD[name]
    folder = miniature.write(tmp_path / "in", replace(SPEC, dtype=dtype))

    def change(stored: dict[str, Stored]) -> None:
        for at in ((9, 7), (9, 8), (40, 0)):
            stored[f"{UP}.weight"][1][at] = bad

    edit_tensors(folder, change)
    assert main([str(folder), str(tmp_path / "out.gguf"), "--quant", quant]) == 1
    err = capsys.readouterr().err
    assert f"error: {UP}.weight (model.safetensors) at [9, 7]: got the weight " in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_first_of_a_tensor_in_pieces(tmp_path: Path) -> None:
    """Threads convert the pieces of a tensor in any order; whichever comes first names the tensor's first bad value."""
    folder = miniature.write(tmp_path / "in", SPEC)

    def change(stored: dict[str, Stored]) -> None:
        stored["model.embed_tokens.weight"][1][100:400:3, 5] = 0x7FC0

    edit_tensors(folder, change)
    opened, source = source_of(folder, "model.embed_tokens.weight")
    with opened:
        assert encoded(opened, source, range(90, 100), GGMLQuantizationType.BF16).size
        for quant in ("F32", "BF16"):
            with pytest.raises(CheckpointError, match=r"safetensors\) at \[100, 5\]: got the weight nan"):
                encoded(opened, source, range(200, 207), GGMLQuantizationType[quant])


def test_scales_of_a_tensor_in_pieces(tmp_path: Path) -> None:
    """The place is that in the stored tensor, whatever rows are read."""
    folder = broken(tmp_path, Gptq(scale_dtype="F32"))
    edit_tensors(folder, replaced(f"{UP}.scales", put(-1.0, 2, 50)))
    opened, source = source_of(folder, f"{UP}.weight")
    with opened:
        assert source.read(opened, 0, 50).size
        with pytest.raises(CheckpointError, match=r"scales \(model.safetensors\) at \[2, 50\]: got the scale -1"):
            source.read(opened, 49, 3)


def test_norm_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = miniature.write(tmp_path / "in", SPEC)
    edit_tensors(folder, replaced("model.norm.weight", put(0x7F80, 100)))
    fails(folder, capsys, "model.norm.weight (model.safetensors) at [100]: got the weight inf")


def test_largest_numbers_are_numbers(tmp_path: Path) -> None:
    """One below infinity, on both sides, and every kind of zero beside them."""
    folder = miniature.write(tmp_path / "in", SPEC)

    def change(stored: dict[str, Stored]) -> None:
        stored[f"{UP}.weight"][1][0, :4] = 0x7F7F, 0xFF7F, 0x8000, 0x0001

    edit_tensors(folder, change)
    convert(ConvertOptions(folder, tmp_path / "out.gguf", "BF16"))
    expected = expected_tensors(folder, SPEC)["blk.1.ffn_up_exps.weight"]
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(values(found["blk.1.ffn_up_exps.weight"]), expected)


@pytest.mark.parametrize("quant", ["BF16", "F32"])
def test_zeros_are_legal_and_told(quant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per kind of tensor, however many there are; a tensor with one weight left is none of them."""
    folder = miniature.write(tmp_path / "in", SPEC)

    def change(stored: dict[str, Stored]) -> None:
        for expert in range(3):
            stored[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][1][:] = 0x8000 if expert else 0
        stored["model.layers.0.self_attn.o_proj.weight"][1][:] = 0
        stored["model.layers.1.self_attn.o_proj.weight"][1][:-1] = 0
        stored["model.layers.0.self_attn.q_proj.weight"][1][:] = 0xBF80

    edit_tensors(folder, change)
    assert main([str(folder), str(tmp_path / "out.gguf"), "-q", "--quant", quant]) == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "warning: model.layers.*.mlp.experts.*.up_proj.weight: 3 tensors are all zeros, such as "
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "warning: model.layers.0.self_attn.o_proj.weight is all zeros",
    ]


@pytest.mark.parametrize("scheme", [Fp8(), Gptq(sym=False), Awq()], ids=lambda scheme: type(scheme).__name__)
def test_zero_scales_are_legal_and_told(
    scheme: quantized.Scheme, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(tmp_path, scheme)
    name = f"{UP}.weight_scale" if isinstance(scheme, Fp8) else f"{UP}.scales"
    edit_tensors(folder, replaced(name, np.zeros_like))
    assert main([str(folder), str(tmp_path / "out.gguf"), "-q"]) == 0
    assert capsys.readouterr().err == f"warning: {UP}.weight is all zeros\n"


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Fp8(), Gptq(group_size=128), Awq(group_size=128)], ids=lambda s: type(s).__name__)
def test_memory_of_a_large_matrix(scheme: quantized.Scheme, tmp_path: Path) -> None:
    """Hunyuan-Large's widest matrix, 6400 × 18304, by the writer's steps of 16 MB."""
    n_out, n_in = 6400, 18304
    rng = np.random.default_rng(0)
    members = {suffix: (dtype, array) for suffix, (dtype, array) in scheme.pack(rng, 64, n_in)[0].items()}
    stored: dict[str, Stored] = {}
    for suffix, (dtype, array) in members.items():
        axis = 0 if isinstance(scheme, Fp8) else array.ndim - 1
        wide = array.ndim == 2
        stored[f"{UP}.{suffix}"] = dtype, np.repeat(array, n_out // 64, axis=axis) if wide else array
    quantized.write_stored(tmp_path / SHARD, stored)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": scheme.settings()}), encoding="utf-8")
    stored.clear()
    opened, source = source_of(tmp_path, f"{UP}.weight")
    assert source.shape == (n_out, n_in)
    step = (16 << 20) // (4 * n_in)
    with opened:
        tracemalloc.start()
        for first in (0, step, n_out - n_out % step):
            source.read(opened, first, min(step, n_out - first))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100e6
