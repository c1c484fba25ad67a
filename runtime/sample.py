"""A few layers of a model, its own weights, as a file: what is true of their speed is true of the whole model's."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe import sizes
from hymoe.errors import OutputError
from hymoe.gguf_head import TensorInfo, cursor
from hymoe.runtime import header, layout

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The output matrix is read once for all layers of a model. In front of two it would be most of what is measured.
N_VOCAB: Final = 1024
PREFIX: Final = "sample-"
LEFT_SECONDS: Final = 24 * 3600


@dataclass(frozen=True)
class Source:
    """A tensor and where its bytes lie: in `file`, from byte `offset`."""

    info: TensorInfo
    file: Path
    offset: int


def write(model: Path, out: Path) -> Path:
    """Write a sample of a GGUF. Raises ModelFileError as `layout.read` does, OutputError where it cannot be written."""
    from gguf import GGUFWriter

    first, about = header.peek(model), layout.read(model)
    chosen = layers(about)
    places = {layer: place for place, layer in enumerate(chosen)}
    try:
        writer = GGUFWriter(out, first.architecture)
        _metadata(writer, first, len(chosen), min(N_VOCAB, about.shape.n_vocab))
        for source in _sources(first):
            _add(writer, source, places)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as exc:
        raise OutputError(f"{out}: cannot write a sample of the model", got=exc.strerror or exc) from exc
    return out


def layers(model: layout.Layout) -> list[int]:
    """Choose the layers: the smallest and the largest, or the first that share their keys and values."""
    share = model.shape.shared_kv_factor
    if share > 1:
        return list(range(min(share, model.shape.n_layer)))
    by_size = sorted(range(model.shape.n_layer), key=lambda layer: model.layers[layer].experts)
    return sorted({by_size[0], by_size[-1]})


def n_bytes(model: layout.Layout) -> int:
    """Bytes of a sample, but for its small vocabulary."""
    return sum(model.layers[layer].experts + model.layers[layer].dense for layer in layers(model))


def _metadata(writer: GGUFWriter, first: header.Header, n_layer: int, n_vocab: int) -> None:
    prefix = f"{first.architecture}."
    changed = {f"{prefix}block_count": n_layer, f"{prefix}vocab_size": n_vocab}
    kept = {key: value for key, value in first.scalars.items() if key.startswith(prefix)}
    for key, value in (kept | changed).items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
    writer.add_tokenizer_model("no_vocab")


def _sources(first: header.Header) -> Iterator[Source]:
    for file in header.parts(first.path):
        head = first if file == first.path else header.read(file)
        alignment = int(head.scalars.get("general.alignment", sizes.ALIGNMENT))
        with cursor(file) as at:
            at.at = head.table.offset
            infos = list(at.tensors(head.table.count))
            data = sizes.padded(at.at, alignment)
        yield from (Source(info, file, data + info.offset) for info in infos)


def _add(writer: GGUFWriter, source: Source, places: Mapping[int, int]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    name, shape = source.info.name, source.info.shape
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        if int(layer) not in places:
            return
        name = f"blk.{places[int(layer)]}.{rest}"
    elif name in ("token_embd.weight", "output.weight"):
        shape = (min(N_VOCAB, shape[0]), shape[1])
    kind = GGMLQuantizationType(source.info.kind)
    row = sizes.row_bytes(shape[-1], kind)
    values = np.memmap(source.file, np.uint8, "r", source.offset, (*shape[:-1], row))
    writer.add_tensor(name, values, raw_dtype=kind)


@contextmanager
def sample(model: Path, folder: Path) -> Iterator[Path]:
    """Give a sample in `folder` for the length of a `with` block."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        made = tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder)
    except OSError as exc:
        raise OutputError(f"{folder}: cannot write there", got=exc.strerror or exc) from exc
    with made as inside:
        yield write(model, Path(inside) / "sample.gguf")


def _sweep(folder: Path) -> None:
    """Remove what a process left that was killed: gigabytes. A day later it is nobody's."""
    for left in folder.glob(f"{PREFIX}*"):
        if time.time() - left.stat().st_mtime > LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
