"""Importance matrices on disk: llama-imatrix's GGUF form, and the legacy `.dat` form.

For every matrix of a model they hold, per input column, the sum of the squared activations that met it, and how many
tokens were counted. A stack of experts [n_expert, n_out, n_per_row] has a slice and a count for each expert.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from hymoe.errors import ModelFileError, OutputError

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
Note = str | int | Sequence[str]

SUMS: Final = ".in_sum2"
COUNTS: Final = ".counts"
DATASETS: Final = "imatrix.datasets"
CHUNK_COUNT: Final = "imatrix.chunk_count"
CHUNK_SIZE: Final = "imatrix.chunk_size"
NOTES: Final = "hymoe."
# A `.dat` does not tell how many tokens a chunk has; llama-imatrix takes its own default, too.
LEGACY_CHUNK_SIZE: Final = 512
LEGACY_SUFFIX: Final = ".dat"
# llama-imatrix has no entries for these, or has them on request, and llama-quantize takes no offence.
WITHOUT_DATA: Final = ("token_embd.weight", "output.weight")

# What a legacy file may claim before it is taken for something else: the format has no magic number.
MAX_ENTRIES: Final = 1 << 20
MAX_NAME: Final = 1 << 12


class Entry(NamedTuple):
    """One matrix: `sums` [n_slice * n_per_row] and `counts` [n_slice]; a slice is an expert, or the whole."""

    sums: Floats
    counts: Counts


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: entries by tensor name, and what they were collected from.

    n_chunks of chunk_size tokens of the texts `datasets`; legacy: from a `.dat`, whose sums are means already, times
    the one count. name and sha256 are those of the file. notes: metadata of ours, by keys that begin with "hymoe.".
    """

    name: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    legacy: bool = False
    sha256: str = ""
    notes: Mapping[str, Note] = field(default_factory=dict)

    def importance(self, tensor: str) -> Floats:
        """Mean squared activation per column [n_slice * n_per_row], as llama-quantize takes it from the file.

        A slice without data is all ones. Raises KeyError for a tensor without an entry.
        """
        sums, counts = self.entries[tensor]
        if self.legacy:
            return sums / np.float32(counts[0]) if counts[0] > 0 else sums
        slices = sums.reshape(len(counts), -1)
        known = (counts > 0)[:, None]
        divisors = np.where(known, counts[:, None], 1).astype(np.float32)
        return np.where(known, slices / divisors, np.float32(1)).reshape(-1)

    def n_empty(self, tensor: str) -> int:
        """Give the number of slices (experts, mostly) without data; a legacy file does not tell, hence 0."""
        return 0 if self.legacy else int((self.entries[tensor].counts <= 0).sum())


def read(path: Path) -> Imatrix:
    """Read an importance matrix of either form.

    Raises ModelFileError for a file that is truncated or something else, naming the entry where there is one, and for
    values that no sum of squares has.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        imatrix = _read_gguf(path, digest) if is_gguf else _read_legacy(path, digest)
    except OSError as exc:
        raise ModelFileError(f"{path}: {exc.strerror}", fix="pass an imatrix that llama-imatrix wrote") from exc
    for name, entry in imatrix.entries.items():
        _check(path, name, entry)
    return imatrix


def save(path: Path, imatrix: Imatrix) -> None:
    """Write the form that the path's suffix names: `.dat` the legacy one, else GGUF.

    Raises OutputError where it cannot be written; what was there stays until the new file is whole.
    """
    part = path.with_name(path.name + ".new")
    try:
        if path.suffix == LEGACY_SUFFIX:
            write_legacy(part, imatrix)
        else:
            write(part, modern(imatrix))
        part.replace(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written", got=exc.strerror or exc) from exc


def write_text(path: Path, text: str) -> None:
    """Write a small file of text. Raises OutputError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise OutputError(f"{path}: cannot be written", got=exc.strerror or exc) from exc


def write(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF form, as llama-imatrix does. Raises ValueError for a legacy one, which has no sums to write."""
    if imatrix.legacy:
        raise ValueError(f"{imatrix.name} holds means and not sums")
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(imatrix.datasets) or ["unknown"])
    writer.add_uint32(CHUNK_COUNT, imatrix.n_chunks)
    writer.add_uint32(CHUNK_SIZE, imatrix.chunk_size)
    for key, value in imatrix.notes.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint64(key, value)
        elif value:
            writer.add_array(key, list(value))
    for name, (sums, counts) in imatrix.entries.items():
        writer.add_tensor(name + SUMS, sums.reshape(len(counts), -1))
        writer.add_tensor(name + COUNTS, counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modern(imatrix: Imatrix) -> Imatrix:
    """Give a legacy matrix sums and counts, as llama-imatrix does when it reads one: the same importance.

    A chunk of a power of two makes that exact, there and back. All slices of a stack share the one count.
    """
    if not imatrix.legacy:
        return imatrix
    entries = {
        # Without a count the values are the means themselves.
        name: Entry(sums * np.float32(LEGACY_CHUNK_SIZE), np.maximum(counts, 1) * LEGACY_CHUNK_SIZE)
        for name, (sums, counts) in imatrix.entries.items()
    }
    return replace(imatrix, entries=entries, chunk_size=LEGACY_CHUNK_SIZE, legacy=False)


def write_legacy(path: Path, imatrix: Imatrix) -> None:
    """Write the `.dat` form, as llama-imatrix does: mean times chunks, one count, and ones where nothing was counted.

    Entries without any data are left out. What a `.dat` cannot hold is lost: counts of single experts, and our notes.
    """
    matrix = modern(imatrix)
    kept = {name: entry for name, entry in matrix.entries.items() if entry.counts.any()}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(kept)))
        for name, (sums, counts) in kept.items():
            n_call = -(-int(counts.max()) // max(matrix.chunk_size, 1))
            # The quotient first: it is a power of two where the values came from a .dat, and they are the same again.
            scales = n_call / np.maximum(counts, 1).astype(np.float64)
            slices = sums.reshape(len(counts), -1)
            values = np.where((counts > 0)[:, None], slices * scales[:, None], n_call)
            text = name.encode()
            file.write(struct.pack(f"<i{len(text)}sii", len(text), text, n_call, values.size))
            file.write(values.astype("<f4").tobytes())
        dataset = matrix.datasets[-1].encode() if matrix.datasets else b""
        file.write(struct.pack(f"<ii{len(dataset)}s", matrix.n_chunks, len(dataset), dataset))
        file.flush()
        os.fsync(file.fileno())


def _read_gguf(path: Path, digest: str) -> Imatrix:
    try:
        with np.errstate(all="ignore"):
            reader = GGUFReader(path)
            keys = {name: reader.fields[name].contents() for name in (DATASETS, CHUNK_COUNT, CHUNK_SIZE)
                    if name in reader.fields}  # fmt: skip
            notes = {name: found for name, value in reader.fields.items()
                     if name.startswith(NOTES) and isinstance(found := value.contents(), str | int | list)}  # fmt: skip
    except Exception as exc:  # gguf-py has no error of its own: any exception is what the file did to it
        raise ModelFileError(f"{path}: a damaged GGUF", got=f"{exc}"[:80], fix="download or make it again") from exc
    entries = _pair(path, reader)
    lacking = [name for name in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if name not in keys]
    if lacking:
        raise _not_one(path, f"no {lacking[0]}")
    texts, n_chunks, chunk_size = keys[DATASETS], keys[CHUNK_COUNT], keys[CHUNK_SIZE]
    if not isinstance(n_chunks, int) or not isinstance(chunk_size, int):
        raise _not_one(path, f"{CHUNK_COUNT} {n_chunks!r}, {CHUNK_SIZE} {chunk_size!r}")
    datasets = tuple(map(str, texts)) if isinstance(texts, list) else (str(texts),)
    return Imatrix(path.name, entries, datasets, n_chunks, chunk_size, sha256=digest, notes=notes)


def _pair(path: Path, reader: GGUFReader) -> dict[str, Entry]:
    parts: dict[str, dict[str, Floats]] = {}
    for tensor in reader.tensors:
        for suffix in (SUMS, COUNTS):
            if tensor.name.endswith(suffix):
                if tensor.tensor_type != GGMLQuantizationType.F32:
                    raise ModelFileError(f"{path}: {tensor.name}", got=tensor.tensor_type.name, expected="F32")
                parts.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = np.array(tensor.data).reshape(-1)
    if not parts:
        raise _not_one(path, f"a GGUF without tensors {SUMS}")
    entries = {}
    for name, pair in parts.items():
        if len(pair) < 2:
            raise ModelFileError(f"{path}: {name}", got=f"only {next(iter(pair))}", expected=f"{SUMS} and {COUNTS}")
        counts = pair[COUNTS]
        if not np.isfinite(counts).all() or (counts < 0).any() or (counts >= 2**63).any():
            raise ModelFileError(f"{path}: {name}{COUNTS}", got="a value that counts nothing", expected="0 or more")
        entries[name] = Entry(pair[SUMS], np.floor(counts + 0.5).astype(np.int64))
    return entries


def _read_legacy(path: Path, digest: str) -> Imatrix:
    entries: dict[str, Entry] = {}
    with path.open("rb") as file:
        size = path.stat().st_size
        n_entries = _integer(path, file)
        if not 0 < n_entries <= MAX_ENTRIES:
            raise _not_one(path, "another kind of file")
        for _ in range(n_entries):
            name = _text(path, file)
            n_call, n_value = _integer(path, file), _integer(path, file)
            if not name or n_value < 1:
                raise _not_one(path, f"{name or 'an entry without a name'} with {n_value} values")
            if (left := size - file.tell()) < 4 * n_value:
                raise _not_one(path, f"a file that ends in {name}, {left} of {4 * n_value} bytes")
            entries[name] = Entry(np.frombuffer(file.read(4 * n_value), "<f4").astype(np.float32), np.array([n_call]))
        # Older files end here.
        if file.tell() == size:
            return Imatrix(path.name, entries, legacy=True, sha256=digest)
        n_chunks = _integer(path, file)
        datasets = (_text(path, file),) if file.tell() < size else ()
    return Imatrix(path.name, entries, datasets, n_chunks, legacy=True, sha256=digest)


def _integer(path: Path, file: BinaryIO) -> int:
    raw = file.read(4)
    if len(raw) < 4:
        raise _not_one(path, "a truncated file")
    return int(struct.unpack("<i", raw)[0])


def _text(path: Path, file: BinaryIO) -> str:
    length = _integer(path, file)
    raw = file.read(length) if 0 <= length <= MAX_NAME else b""
    try:
        if len(raw) == length:
            return raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise _not_one(path, "another kind of file, or a truncated one")


def _check(path: Path, name: str, entry: Entry) -> None:
    sums, counts = entry
    if not sums.size or not counts.size or sums.size % counts.size:
        raise ModelFileError(
            f"{path}: {name}", got=f"{sums.size} sums", expected=f"a multiple of its {counts.size} counts"
        )
    wrong = ~(np.isfinite(sums) & (sums >= 0))
    if wrong.any():
        index = int(wrong.argmax())
        raise ModelFileError(
            f"{path}: {name}, value {index}", got=sums[index], expected="0 or more", fix="collect the imatrix again"
        )


def _not_one(path: Path, got: str) -> ModelFileError:
    return ModelFileError(f"{path}: no importance matrix", got=got, expected="a file that llama-imatrix wrote")
