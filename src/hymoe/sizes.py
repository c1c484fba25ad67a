"""Bytes of tensors and files by shape and type: the one calculator that plans and placement share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MIB: Final = 1 << 20
# What the system keeps of a machine's RAM, and a desktop of its card.
SYSTEM_RAM: Final = 3 << 30
DESKTOP_VRAM: Final = 512 * MIB
# What stays free of a device and of RAM: a part, and bytes. Kernels, the driver's own buffers and other programs live
# there.
DEVICE_MARGIN: Final = (0.04, 256 * MIB)
RAM_MARGIN: Final = (0.05, 512 * MIB)
# GGUF's default: every tensor starts on a multiple of this many bytes, counted from the start of the data.
ALIGNMENT = 32
# llama.cpp rounds the context up to a multiple of this many tokens.
CTX_MULTIPLE = 256


def margin(n_bytes: int, rule: tuple[float, int]) -> int:
    """Give the bytes that stay free of a memory of `n_bytes`, by DEVICE_MARGIN or RAM_MARGIN."""
    return int(rule[0] * n_bytes + rule[1])


def padded(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    """Round `n_bytes` up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def parse_size(text: str) -> int:
    """Read a number of bytes, with K, M or G for powers of 1000, as llama.cpp's tools count. Raises ValueError."""
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise ValueError(f"{text!r} is no size: give bytes, or a number with K, M or G such as 48G")
    factor: int = 1000 ** " KMG".index(found[2] or " ")
    return int(found[1]) * factor


def row_bytes(n_per_row: int, qtype: GGMLQuantizationType) -> int:
    """Bytes of one row of `n_per_row` elements. Raises ValueError where the row is no whole number of blocks."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[qtype]
    if n_per_row % block:
        raise ValueError(f"a row of {n_per_row} elements is no multiple of {qtype.name}'s block of {block}")
    return int(n_per_row // block * size)


def tensor_bytes(shape: tuple[int, ...], qtype: GGMLQuantizationType) -> int:
    """Bytes of a tensor of row-major `shape` (the last dimension is the row)."""
    return prod(shape[:-1]) * row_bytes(shape[-1], qtype)


def data_bytes(tensors: Iterable[tuple[tuple[int, ...], GGMLQuantizationType]]) -> int:
    """Bytes of a GGUF data section that holds these (shape, type) tensors, padding included."""
    return sum(padded(tensor_bytes(shape, qtype)) for shape, qtype in tensors)


def kv_bytes(n_embd_kv: int, n_ctx: int, kv_type: str) -> int:
    """Bytes of one layer's keys and values, [n_ctx, n_embd_kv] each, in the type that llama.cpp calls `kv_type`.

    Raises ValueError where a row is no whole number of the type's blocks.
    """
    from gguf import GGMLQuantizationType

    rows = (padded(n_ctx, CTX_MULTIPLE), n_embd_kv)
    return 2 * tensor_bytes(rows, GGMLQuantizationType[kv_type.upper()])
