"""What a GGUF's head says about a model: sizes, chat template, and which matrices an importance file can speak of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hymoe.errors import ModelFileError
from hymoe.gguf_head import Scalar, cursor
from hymoe.imatrix.weights import read_part

if TYPE_CHECKING:
    from hymoe.imatrix.files import Imatrix

ARCHITECTURES: Final = ("hunyuan-moe", "hunyuan-large")
# Of 45 GB the fingerprint reads this much in each of so many places.
SAMPLE_BYTES: Final = 1 << 16
SAMPLES: Final = 64


@dataclass(frozen=True)
class Model:
    """A GGUF of this family: every key whose value is no array, and row-major shapes by tensor.

    files: the parts of a split model, else the one file.
    """

    path: Path
    files: tuple[Path, ...]
    keys: Mapping[str, Scalar]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """Give `general.architecture`, which is also what the model's own keys begin with."""
        return str(self.keys["general.architecture"])

    @property
    def name(self) -> str:
        """Give the model's own name, or the file's."""
        return str(self.keys.get("general.name") or self.path.name)

    @property
    def n_expert(self) -> int:
        """Give the number of routed experts of a layer."""
        return self._number("expert_count")

    @property
    def n_expert_used(self) -> int:
        """Give the number of routed experts that a token gets."""
        return self._number("expert_used_count")

    @property
    def chat_template(self) -> str | None:
        """Give the chat template's text, None where there is none."""
        found = self.keys.get("tokenizer.chat_template")
        return found if isinstance(found, str) and found else None

    def _number(self, key: str) -> int:
        value = self.keys.get(f"{self.architecture}.{key}")
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(f"{self.path}: {self.architecture}.{key}", got=value, expected="a positive number")
        return value

    def fingerprint(self) -> str:
        """Hash the parts' sizes, their heads and samples of their data: another model, or another state of this one.

        Reading all of a large model would take minutes.
        """
        total = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            total.update(size.to_bytes(8, "little"))
            with file.open("rb") as raw:
                for i in range(SAMPLES):
                    total.update(os.pread(raw.fileno(), SAMPLE_BYTES, size * i // SAMPLES))
        return total.hexdigest()

    def check(self, imatrix: Imatrix) -> None:
        """Raise ModelFileError naming the first tensor of `imatrix` that this model does not have as it says."""
        from hymoe.imatrix.files import WITHOUT_DATA

        other = f"{imatrix.name}: the importance matrix of another model"
        for name, entry in imatrix.entries.items():
            shape = self.shapes.get(name)
            if shape is None and name not in WITHOUT_DATA:
                raise ModelFileError(other, got=f"an entry for {name}", expected=f"the tensors of {self.path.name}")
            if shape is None:
                continue
            n_slice = shape[0] if len(shape) > 2 else 1
            if entry.sums.size != n_slice * shape[-1] or len(entry.counts) not in (1, n_slice):
                raise ModelFileError(
                    other,
                    got=f"{entry.sums.size} values in {len(entry.counts)} slices for {name}",
                    expected=f"{n_slice} × {shape[-1]}",
                )
        missing = [name for name in self.shapes if name.endswith("_exps.weight") and name not in imatrix.entries]
        if missing:
            raise ModelFileError(other, got=f"no entry for {missing[0]}", expected="one")


def read(path: Path) -> Model:
    """Read the head of a GGUF of this family, of a split one the heads of all parts.

    Raises ModelFileError for what is missing, damaged, a later part, or of another architecture.
    """
    keys, shapes = _head(path)
    require_family(path, keys)
    files = _parts(path, keys)
    for file in files[1:]:
        shapes |= _head(file)[1]
    return Model(path, files, keys, shapes)


def require_family(path: Path, keys: Mapping[str, Scalar]) -> None:
    """Raise ModelFileError for a GGUF of another architecture, or of none."""
    if (found := keys.get("general.architecture", "none")) not in ARCHITECTURES:
        raise ModelFileError(
            f"{path}: architecture", got=found, expected=" or ".join(ARCHITECTURES), fix="make a model with hy-convert"
        )


def _parts(path: Path, keys: Mapping[str, Scalar]) -> tuple[Path, ...]:
    count = int(keys.get("split.count", 0) or 0)
    if count < 2:
        return (path,)
    first = f"-00001-of-{count:05d}.gguf"
    if not path.name.endswith(first):
        raise ModelFileError(f"{path}: a part of a split model", expected=f"the one that ends in {first}")
    stem = path.name.removesuffix(first)
    return tuple(path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))


def _head(path: Path) -> tuple[dict[str, Scalar], dict[str, tuple[int, ...]]]:
    if path.is_dir():
        raise ModelFileError(f"{path}: model", got="a folder", expected="a GGUF file", fix="make one with hy-convert")
    with cursor(path) as at:
        part = read_part(at)
    return part.keys, {name: tensor.shape for name, tensor in part.tensors.items()}
