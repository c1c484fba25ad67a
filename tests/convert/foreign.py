"""A GGUF as llama.cpp's own converter writes it, made from one of ours with gguf-py.

tests/stock compares with that converter's real output, so this list of differences cannot drift unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

ARCH = "hunyuan-moe"

# What ours has and the other lacks.
ABSENT = (
    *(f"{ARCH}.{name}" for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")),
    *(f"{ARCH}.{name}" for name in ("expert_weights_norm", "vocab_size")),
    *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "eot_token_id")),
    *("general.basename", "general.sampling.penalty_last_n"),
)
EXTRA = ((f"{ARCH}.rope.scaling.factor", 1.0, "FLOAT32"), ("tokenizer.ggml.seperator_token_id", 127962, "UINT32"))
# The merge that it does not find, and files of 2025 have no sampling defaults either.
MISSING_MERGE = "âĸģ âĪ´"


def write_foreign(ours: Path, out: Path, *, template: str, old: bool = False, changes: Mapping[str, Any] = {}) -> Path:
    """Write `out` with the tensors of `ours` and the other converter's metadata.

    old: without sampling defaults. changes: keys with other values; None leaves one out.
    """
    reader = GGUFReader(ours)
    writer = GGUFWriter(out, ARCH)
    for name, field in reader.fields.items():
        gone = name in ABSENT or name.startswith(("GGUF.", "hymoe.")) or (old and "sampling" in name)
        if gone or name == "general.architecture" or name in changes:
            continue
        value = template if name == "tokenizer.chat_template" else field.contents()
        if name == "tokenizer.ggml.merges":
            value = [merge for merge in value if merge != MISSING_MERGE]
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value, kind in EXTRA:
        writer.add_key_value(name, value, GGUFValueType[kind])
    for name, value in changes.items():
        if value is not None:
            writer.add_key_value(name, value, reader.fields[name].types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
