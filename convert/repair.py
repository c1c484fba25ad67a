"""`hy-convert --repair`: the metadata of a HunYuan-A13B GGUF that another tool made, as hy-convert writes it.

The head is written anew and the tensors are copied as they are, in pieces, so memory does not grow with the file. The
result has, key for key, what converting the same checkpoint gives, but for provenance: what the file says of its name,
makers, licence and quantization (`general.*` other than the keys below, `quantize.*`, `hymoe.*`) is kept as it was.

Values come from the file's own metadata and the shapes of its tensors. Token ids, sampling defaults and merges are only
touched where the vocabulary is Hunyuan-A13B's.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

import hymoe
from hymoe import console, sizes
from hymoe.chat_templates import repair as template_repair
from hymoe.console import Tick
from hymoe.convert import metadata
from hymoe.convert.architectures import Key, hunyuan_a13b
from hymoe.convert.head import Head, read_head
from hymoe.convert.journal import sync_folder
from hymoe.convert.split import PART_NAME, part_name
from hymoe.convert.vocab import TokenType, byte_alphabet, merges_of, text_form
from hymoe.convert.writer import REMEDIES, check_disk, journal_of
from hymoe.errors import ModelFileError, OutputError, UnsupportedError
from hymoe.gguf_head import shown
from hymoe.published import BY_VOCABULARY, Published

ARCH = hunyuan_a13b.ARCH
COPY_BYTES = 8 << 20

# Keys that other tools write and ours does not, and why they go.
DROPPED = {
    f"{ARCH}.rope.scaling.factor": "means nothing with rope.scaling.type none",
    "tokenizer.ggml.seperator_token_id": "<|extra_0|> ends a user's turn and separates no sentences",
}
# Said of every output, and no reason to write one.
PROVENANCE = ("hymoe.version", "hymoe.repaired")

INTEGERS = {"INT32": (-(2**31), 2**31 - 1), "UINT32": (0, 2**32 - 1)}
MAX_FLOAT32 = float(np.finfo(np.float32).max)
# The longest real token has 128 letters; finding the merge of one takes time with the square of its length.
MAX_TOKEN_LETTERS = 4096

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One key before and after; None: not there."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        """Say both in one line."""
        return f"{self.key}: {_short(self.before)} -> {_short(self.after)}"


@dataclass(frozen=True)
class Repair:
    """What is to be done: the parts of the model, the new head of the first, and how that differs."""

    parts: tuple[Path, ...]
    head: bytes
    data_offset: int
    changes: tuple[Change, ...]


def examine(source: Path, *, keep_template: bool = False) -> Repair:
    """Read a model's metadata and say what of it hy-convert would write otherwise.

    Raises ModelFileError for what is no GGUF, is cut short, or is a later part or an incomplete set of a split model;
    UnsupportedError for another architecture.
    """
    parts = _parts(source)
    heads = [read_head(part) for part in parts]
    first = heads[0]
    values = {key: entry.value for key, entry in first.entries.items()}
    if values.get("general.architecture") != ARCH:
        raise UnsupportedError(
            f"{source}: architecture",
            got=_short(values.get("general.architecture")),
            expected=ARCH,
            fix="--repair knows Hunyuan-A13B, the only model of hymoe's that other tools convert",
        )
    shapes = {name: shape for head in heads for name, shape in head.shapes.items()}
    wanted = {key.key: key for key in _keys(source, values, shapes, keep_template=keep_template)}
    new = [key for key in wanted.values() if not _same(first, key)]
    changes = [Change(key.key, values.get(key.key), key.value) for key in new if key.key not in PROVENANCE]
    changes += [Change(key, values[key], None) for key in DROPPED if key in values]
    return Repair(parts, _head(first, new), first.data_offset, tuple(changes))


def write(repair: Repair, out: Path, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write the repaired model, as many files as there were, and give them.

    Raises OutputError where the output exists, is the input, lies on a disk that is too small or cannot be written;
    nothing of the new model is left then. It is not resumed after an interruption: it is a copy, and begins again.
    """
    outs = _outputs(repair, out)
    _check(repair, out, outs, overwrite=overwrite)
    total = sum(part.stat().st_size for part in repair.parts)
    placed: list[Path] = []
    try:
        check_disk(out, total)
        with console.progress(out.name, total) as tick:
            for i, (part, path) in enumerate(zip(repair.parts, outs, strict=True)):
                head, skip = (b"", 0) if i else (repair.head, repair.data_offset)
                _copy(part, _temporary(path), head, skip, tick)
        for path in reversed(outs):
            _temporary(path).replace(path)
            placed.append(path)
        sync_folder(out.parent)
    except BaseException as exc:
        for path in placed:  # a set without its first part is no model
            path.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise OutputError(f"{out}: {exc.strerror}", fix=REMEDIES.get(exc.errno or 0)) from exc
        raise
    finally:
        for path in outs:
            _temporary(path).unlink(missing_ok=True)
    return outs


# -- the input --------------------------------------------------------------------------------------------------------


def _parts(source: Path) -> tuple[Path, ...]:
    """Give the model's files: itself, or all of a split one whose first part it is."""
    name = PART_NAME.fullmatch(source.name)
    if name is None or int(name["count"]) < 2:
        return (source,)
    if int(name["number"]) != 1:
        raise ModelFileError(f"{source}: a later part of a split model", fix="give the first part")
    whole = source.with_name(f"{name['stem']}.gguf")
    parts = tuple(part_name(whole, i, int(name["count"])) for i in range(int(name["count"])))
    missing = next((part for part in parts if not part.is_file()), None)
    if missing:
        raise ModelFileError(f"{missing}: no such file", expected=f"{len(parts)} parts", fix="download all of them")
    return parts


# -- the metadata -----------------------------------------------------------------------------------------------------


def _keys(source: Path, values: Values, shapes: Mapping[str, tuple[int, ...]], *, keep_template: bool) -> Iterator[Key]:
    """Give what hy-convert writes for the checkpoint that the file was made from."""
    yield Key("general.type", "model", "STRING")
    yield Key("general.quantization_version", GGML_QUANT_VERSION, "UINT32")
    try:
        yield from hunyuan_a13b.metadata(_hparams(values, shapes))
    except KeyError as exc:
        raise ModelFileError(f"{source}: not a complete {ARCH} model", got=f"no {exc.args[0]}") from exc
    tokens = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise ModelFileError(f"{source}: tokenizer.ggml.tokens", got=_short(tokens), expected="a vocabulary")
    model = BY_VOCABULARY.get((ARCH, len(tokens)))
    if model is None:
        console.warn(f"{source.name}: {len(tokens)} tokens are not Hunyuan-A13B's vocabulary: it is left as it is")
    else:
        yield from _vocabulary(source, values, model)
    vendors = values.get("tokenizer.chat_template")
    vendors = vendors if isinstance(vendors, str) else None
    origin = values.get("hymoe.chat_template")
    # A template that was repaired by an older hymoe may need what has been found since.
    if origin is None or (not keep_template and (origin == "vendor" or template_repair(vendors or "").applied)):
        yield from metadata.template(vendors, keep=keep_template)
    yield Key("hymoe.version", hymoe.__version__, "STRING")
    yield Key("hymoe.repaired", True, "BOOL")


def _hparams(values: Values, shapes: Mapping[str, tuple[int, ...]]) -> hunyuan_a13b.HParams:
    """Read the graph's sizes, from tensors where these say them. Raises KeyError naming what is absent."""
    n_ff_exp = _size(shapes, "blk.0.ffn_gate_exps.weight", 1)
    n_ff_shexp = _size(shapes, "blk.0.ffn_gate_shexp.weight", 0)
    n_expert_used = _integer(values, "expert_used_count")
    if n_expert_used < 2:
        raise UnsupportedError(
            f"{ARCH}.expert_used_count", got=n_expert_used, expected="at least 2", fix="convert the checkpoint instead"
        )
    return hunyuan_a13b.HParams(
        n_layer=_integer(values, "block_count"),
        n_embd=_integer(values, "embedding_length"),
        n_head=_integer(values, "attention.head_count"),
        n_head_kv=_integer(values, "attention.head_count_kv"),
        head_dim=_size(shapes, "blk.0.attn_q_norm.weight", 0),
        n_ff_exp=n_ff_exp,
        n_ff_shexp=n_ff_shexp,
        n_expert=_integer(values, "expert_count"),
        n_expert_used=n_expert_used,
        n_shared=max(n_ff_shexp // max(n_ff_exp, 1), 1),
        n_vocab=_size(shapes, "token_embd.weight", 0),
        n_ctx_train=_integer(values, "context_length"),
        rms_eps=_float(values, "attention.layer_norm_rms_epsilon"),
        rope_base=_float(values, "rope.freq_base"),
        tied="output.weight" not in shapes,
    )


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, dimension: int) -> int:
    shape = shapes[name]
    if dimension >= len(shape) or exactly(shape[dimension], "UINT32") is None:
        raise ModelFileError(f"{name}: shape", got=list(shape), expected=f"dimension {dimension} of 32 bits")
    return shape[dimension]


def _integer(values: Values, name: str) -> int:
    value = values[f"{ARCH}.{name}"]
    if not isinstance(value, int) or isinstance(value, bool) or exactly(value, "UINT32") is None:
        raise ModelFileError(f"{ARCH}.{name}", got=_short(value), expected="an integer")
    return value


def _float(values: Values, name: str) -> float:
    value = values[f"{ARCH}.{name}"]
    if not isinstance(value, float) or exactly(value, "FLOAT32") is None:
        raise ModelFileError(f"{ARCH}.{name}", got=_short(value), expected="a finite number of 32 bits")
    return value


def exactly(value: Any, kind: str) -> int | float | None:
    """Give a number as GGUF's INT32, UINT32 or FLOAT32 holds it; None where it does not.

    An integer must be one and in range; a float may lose digits, and must be finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if kind == "FLOAT32":
        return float(value) if abs(value) <= MAX_FLOAT32 else None
    low, high = INTEGERS[kind]
    return int(value) if value == int(value) and low <= value <= high else None


def _vocabulary(source: Path, values: Values, model: Published) -> Iterator[Key]:
    """Give special tokens, sampling and merges. Raises ModelFileError where a token is not in the vocabulary."""
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    places = {token: i for i, token in enumerate(tokens)}
    special = dict(zip(("bos", "eos", "eot", "padding"), (model.begin, *model.end, model.pad), strict=True))
    for name, token in special.items():
        if token not in places:
            raise ModelFileError(f"{source}: vocabulary", got=f"{len(tokens)} tokens without {token}")
        yield Key(f"tokenizer.ggml.{name}_token_id", places[token], "UINT32")
    yield Key("tokenizer.ggml.add_bos_token", False, "BOOL")
    yield Key("tokenizer.ggml.add_eos_token", False, "BOOL")
    merges = _merges(tokens, values.get("tokenizer.ggml.token_type", ()))
    if merges:
        yield Key("tokenizer.ggml.merges", merges, "ARRAY")
    kinds = {key.removeprefix("general.sampling."): kind for _, key, kind in metadata.SAMPLING}
    for name, value in model.sampling.items():
        kind = kinds.get(name, "INT32")
        present = exactly(values.get(f"general.sampling.{name}"), kind)
        yield Key(f"general.sampling.{name}", value if present is None else present, kind)  # type: ignore[arg-type]


def _merges(tokens: list[str], types: list[int]) -> list[str]:
    """Recover the merges from the tokens; none where these are no ranks of bytes."""
    if any(isinstance(token, str) and len(token) > MAX_TOKEN_LETTERS for token in tokens):
        return []
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    try:
        ranks = [
            bytes(byte_of[letter] for letter in token)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.NORMAL
        ]
    except (KeyError, TypeError, ValueError):
        return []
    text = text_form()
    return [f"{text(left)} {text(right)}" for left, right in merges_of(ranks)]


def _same(head: Head, key: Key) -> bool:
    """Whether the file has the key with this value and type; floats as float32 holds them."""
    entry = head.entries.get(key.key)
    if entry is None or entry.kind != GGUFValueType[key.kind]:
        return False
    value = float(np.float32(key.value)) if key.kind == "FLOAT32" else key.value
    return bool(entry.value == value)


def _head(old: Head, new: list[Key]) -> bytes:
    """Give header, metadata and tensor table: new keys, then the old ones and the table byte for byte."""
    replaced = {"general.architecture", *(key.key for key in new), *DROPPED}
    kept = [entry.raw for key, entry in old.entries.items() if key not in replaced]
    stream = io.BytesIO()
    stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(old.shapes), 1 + len(new) + len(kept)))
    writer = GGUFWriter(None, ARCH)  # which writes the architecture first
    for key in new:
        writer.add_key_value(key.key, key.value, GGUFValueType[key.kind])
    writer.fout, writer.state = [stream], WriterState.HEADER
    writer.write_kv_data_to_file()
    stream.write(b"".join((*kept, old.table)))
    head = stream.getvalue()
    return head.ljust(sizes.padded(len(head), old.alignment), b"\0")


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"{len(value)} entries"
    return f"{len(value)} characters" if isinstance(value, str) and len(value) > 60 else shown(str(value))


# -- the output -------------------------------------------------------------------------------------------------------


def _outputs(repair: Repair, out: Path) -> tuple[Path, ...]:
    if len(repair.parts) == 1:
        return (out,)
    name = PART_NAME.fullmatch(out.name)
    whole = out.with_name(f"{name['stem']}.gguf") if name else out
    return tuple(part_name(whole, i, len(repair.parts)) for i in range(len(repair.parts)))


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _check(repair: Repair, out: Path, outs: tuple[Path, ...], *, overwrite: bool) -> None:
    if out.is_dir() or out.suffix != ".gguf":
        raise OutputError(f"{out}", got="no name of a GGUF", expected="a file name such as model.gguf")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder", fix="make it first")
    for path in outs:
        if path.exists() and any(path.samefile(part) for part in repair.parts):
            raise OutputError(f"{path}: the input itself", fix="choose another name; remove the old file afterwards")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists", fix="choose another name, or pass --overwrite")
    if journal_of(out).exists():
        raise OutputError(f"{out}: a conversion to this name is unfinished", fix="finish it, or choose another name")


def _copy(source: Path, target: Path, head: bytes, skip: int, tick: Tick) -> None:
    """Write `head`, then `source` from byte `skip` on; on disk when this returns."""
    buffer = memoryview(bytearray(COPY_BYTES))
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write:
        _write_all(write, memoryview(head))
        read.seek(skip)
        tick(skip)
        while n_read := read.readinto(buffer):
            _write_all(write, buffer[:n_read])
            tick(n_read)
        os.fsync(write.fileno())


def _write_all(file: BinaryIO | io.FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) or 0 :]
