"""Quantized checkpoints written from the descriptions of their formats, and what they hold, exactly.

Nothing of the converter is used. Integers are packed bit by bit as the formats' own words say where each bit lies;
8-bit floats are built from sign, exponent and mantissa. Every value is computed in float64 (exact for these products)
and rounded once to float32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hymoe.convert import miniature
from hymoe.convert.miniature import Spec

Array = npt.NDArray[Any]
Stored = tuple[str, Array]  # dtype of safetensors, and an array of the same bytes
Packed = tuple[dict[str, Stored], Array]  # members by suffix ("weight", "scales", …), and the matrix they mean

SPEC = Spec(n_layer=2, n_embd=128, n_head=4, n_head_kv=2, head_dim=32, n_ff=64, n_expert=4, n_expert_used=2, n_rank=300)
SHARD = "model.safetensors"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# -- safetensors -----------------------------------------------------------------------------------------------------


def read_stored(file: Path) -> dict[str, Stored]:
    """Read a safetensors file; BF16 and 8-bit floats come as their bits."""
    numpy = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "F8_E4M3": "u1"}
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found: dict[str, Stored] = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(raw[start + begin : start + end], numpy[entry["dtype"]])
            found[name] = entry["dtype"], values.reshape(entry["shape"]).copy()
    return found


def write_stored(file: Path, tensors: dict[str, Stored]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def exact(stored: Stored) -> Array:
    """Values of a plain tensor as float64."""
    dtype, array = stored
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def as_dtype(values: Array, dtype: str) -> Stored:
    """Round values to a plain type; BF16 by cutting, which is as good as any for a scale."""
    if dtype == "BF16":
        return dtype, (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values.astype({"F32": np.float32, "F16": np.float16}[dtype])


# -- formats ---------------------------------------------------------------------------------------------------------


def float8(byte: int) -> float:
    """The E4M3FN value of a byte, by the definition: bias 7, no infinities, all ones is NaN."""
    sign = -1.0 if byte >> 7 else 1.0
    exponent, mantissa = (byte >> 3) & 0b1111, byte & 0b111
    if exponent == 0b1111 and mantissa == 0b111:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa * 2.0**-9)
    return float(sign * (8 + mantissa) * 2.0 ** (exponent - 10))


def pack_bits(integers: Array, bits: int, places: tuple[int, ...]) -> Array:
    """Pack along the last axis: integer i of every word's worth lies in bits [places[i] * bits, ...)."""
    per_word = 32 // bits
    shape = (*integers.shape[:-1], integers.shape[-1] // per_word, per_word)
    grouped = integers.reshape(shape).astype(np.uint64)
    words = np.zeros(shape[:-1], np.uint64)
    for i, place in enumerate(places):
        for bit in range(bits):
            words |= ((grouped[..., i] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(bits * place + bit)
    return words.astype(np.uint32).view(np.int32)


def straight(bits: int) -> tuple[int, ...]:
    return tuple(range(32 // bits))


@dataclass(frozen=True)
class Fp8:
    """One scale (`shape` "scalar", "1", "1x1") or one per output ("out", "outx1")."""

    shape: str = "scalar"
    scale_dtype: str = "F32"
    compressed: bool = False

    def settings(self) -> dict[str, Any]:
        if not self.compressed:
            return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
        strategy = "channel" if "out" in self.shape else "tensor"
        how = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
        how |= {"group_size": None, "block_structure": None, "actorder": None, "observer": "minmax"}
        group = {"weights": how, "input_activations": {**how, "strategy": "tensor"}, "targets": ["Linear"]}
        return {
            "quant_method": "compressed-tensors",
            "format": "naive-quantized" if strategy == "tensor" else "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "model.layers.0.mlp.gate.wg"],
            "kv_cache_scheme": None,
        }

    def pack(self, rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
        weight = rng.choice(finite, (n_out, n_in)).astype(np.uint8)
        shape: tuple[int, ...] = {"scalar": (), "1": (1,), "1x1": (1, 1), "out": (n_out,), "outx1": (n_out, 1)}[
            self.shape
        ]
        scale = as_dtype(np.asarray(rng.uniform(1e-4, 1e-2, shape)), self.scale_dtype)
        values = np.array([float8(byte) for byte in range(256)])[weight]
        scaled = values * (exact(scale).reshape(-1, 1) if "out" in self.shape else float(exact(scale).reshape(())))
        members = {"weight": ("F8_E4M3", weight), "weight_scale": scale, "input_scale": as_dtype(np.ones(1), "BF16")}
        return members, scaled.astype(np.float32)


@dataclass(frozen=True)
class Gptq:
    """`order`: "shuffled", "plain" or None where there is no g_idx; `v2` stores zero points as they are.

    Scales are uniform up to max_scale.
    """

    bits: int = 4
    group_size: int = 32
    order: str | None = "shuffled"
    desc_act: bool = True
    sym: bool = True
    v2: bool = False
    scale_dtype: str = "BF16"
    max_scale: float = 1e-2

    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
            "damp_percent": 0.01,
            "static_groups": True,
            "true_sequential": True,
        }

    def pack(self, rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        size = n_in if self.group_size == -1 else self.group_size
        n_groups, top = n_in // size, 1 << self.bits
        q = rng.integers(0, top, (n_out, n_in))
        # Without the version's + 1 a zero point of `top` cannot be told from 0: 1 … top are those of the first version.
        zero = rng.integers(0, top, (n_groups, n_out)) + (not self.v2)
        if self.sym:
            zero = np.full((n_groups, n_out), top // 2)
        scales = as_dtype(rng.uniform(1e-4, self.max_scale, (n_groups, n_out)), self.scale_dtype)
        group_of = np.arange(n_in) // size
        if self.order == "shuffled":
            group_of = rng.permutation(group_of)
        value = exact(scales)[group_of].T * (q - zero[group_of].T)
        members: dict[str, Stored] = {
            "qweight": ("I32", pack_bits(q, self.bits, straight(self.bits)).T),
            "qzeros": ("I32", pack_bits(zero - (not self.v2), self.bits, straight(self.bits))),
            "scales": scales,
        }
        if self.order is not None:
            members["g_idx"] = "I32", group_of.astype(np.int32)
        return members, value.astype(np.float32)


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's gemm layout: bits [4i, 4i + 4) of a word hold output AWQ_ORDER[i] of its eight."""

    group_size: int = 32
    zero_point: bool = True
    scale_dtype: str = "F16"
    max_scale: float = 1e-2

    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def pack(self, rng: np.random.Generator, n_out: int, n_in: int) -> Packed:
        size = n_in if self.group_size == -1 else self.group_size
        n_groups = n_in // size
        q = rng.integers(0, 16, (n_out, n_in))
        zero = rng.integers(0, 16, (n_groups, n_out)) if self.zero_point else np.full((n_groups, n_out), 8)
        scales = as_dtype(rng.uniform(1e-4, self.max_scale, (n_groups, n_out)), self.scale_dtype)
        group_of = np.arange(n_in) // size
        value = exact(scales)[group_of].T * (q - zero[group_of].T)
        places = tuple(AWQ_ORDER.index(output) for output in range(8))
        members: dict[str, Stored] = {
            "qweight": ("I32", pack_bits(q.T, 4, places)),
            "qzeros": ("I32", pack_bits(zero, 4, places)),
            "scales": scales,
        }
        return members, value.astype(np.float32)


Scheme = Fp8 | Gptq | Awq

SCHEMES: dict[str, Scheme] = {
    "fp8": Fp8(),
    "fp8 [1] bf16": Fp8("1", "BF16"),
    "fp8 [1, 1] f16": Fp8("1x1", "F16"),
    "fp8 per output": Fp8("out"),
    "fp8 per output, column": Fp8("outx1", "BF16"),
    "compressed-tensors": Fp8("1", compressed=True),
    "compressed-tensors channel": Fp8("outx1", "BF16", compressed=True),
    "gptq": Gptq(),
    "gptq plain g_idx": Gptq(order="plain"),
    "gptq without g_idx": Gptq(order=None, desc_act=False),
    "gptq asymmetric": Gptq(sym=False, scale_dtype="F16"),
    "gptq asymmetric without g_idx": Gptq(sym=False, order=None, desc_act=False),
    "gptq whole columns": Gptq(group_size=-1, order=None, desc_act=False, scale_dtype="F32"),
    "gptq int8": Gptq(bits=8, sym=False),
    "gptq int8 symmetric without g_idx": Gptq(bits=8, order=None, desc_act=False),
    "gptq v2": Gptq(v2=True, sym=False),
    "awq": Awq(),
    "awq without zero points": Awq(zero_point=False, scale_dtype="BF16"),
    "awq whole columns": Awq(group_size=-1, scale_dtype="F32"),
}


# -- checkpoints -----------------------------------------------------------------------------------------------------


def is_linear(name: str) -> bool:
    """Whether quantizers replace this tensor: the layers' projections, not embeddings, norms or the router."""
    return name.endswith("_proj.weight")


def write(folder: Path, scheme: Scheme, spec: Spec = SPEC, seed: int = 0) -> Path:
    """Write `folder`/in, a quantized checkpoint, and `folder`/exact, a plain F32 one of its values; give the first."""
    quantized = miniature.write(folder / "in", spec)
    twin = miniature.write(folder / "exact", replace(spec, dtype="F32", router_dtype="F32"))
    rng = np.random.default_rng(seed)
    stored: dict[str, Stored] = {}
    values: dict[str, Stored] = {}
    for name, tensor in read_stored(quantized / SHARD).items():
        if is_linear(name):
            n_out, n_in = tensor[1].shape
            members, value = scheme.pack(rng, n_out, n_in)
            base = name.removesuffix("weight")
            stored |= {base + suffix: member for suffix, member in members.items()}
        else:
            stored[name] = tensor
            value = exact(tensor).astype(np.float32)
        values[name] = "F32", value
    write_stored(quantized / SHARD, stored)
    write_stored(twin / SHARD, values)
    edit_settings(quantized, lambda settings: settings | scheme.settings())
    return quantized


def edit_settings(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change config.json's quantization_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = change(config.get("quantization_config", {}))
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Stored]], None]) -> None:
    """Change the stored tensors."""
    stored = read_stored(folder / SHARD)
    change(stored)
    write_stored(folder / SHARD, stored)
