"""Weights that are not here: what a plan needs to know of them, from the config and the index alone.

Names come from the index where there is one, shapes from the architecture, formats from config.json. Nothing of it
has been compared with a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hymoe.convert.architectures import Architecture
from hymoe.convert.checkpoint import Checkpoint
from hymoe.convert.config import Config
from hymoe.convert.sources import FORMATS, Floats, Gathered, Source
from hymoe.convert.sources.grouped import read_group_size
from hymoe.errors import CheckpointError, UnsupportedError

# config.json's torch_dtype -> format, bits of a weight
DTYPES = {"bfloat16": ("BF16", 16), "float16": ("F16", 16), "float32": ("F32", 32)}
QUANTIZED = ("qweight", "weight_scale")
PARTS = ("qzeros", "scales", "g_idx", "input_scale", "output_scale", "k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class Expected(Source):
    """A tensor as the config describes it: `bits` of a weight, and of a group's scale and zero point `group_bits`.

    order_bits: of each column's group, where a GPTQ checkpoint stores that.
    """

    stored: str
    bits: int
    group_size: int = -1
    group_bits: int = 0
    order_bits: int = 0

    @property
    def format(self) -> str:
        """What config.json says."""
        return self.stored

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes, about."""
        n_groups = -(-self.n_per_row // self.group_size) if self.group_size > 0 else 1
        of_row = self.n_per_row * self.bits + n_groups * self.group_bits
        return (self.n_rows * of_row + self.n_per_row * self.order_bits) // 8

    def read(self, checkpoint: Checkpoint, _first: int, _count: int) -> Floats:
        """Raise CheckpointError: there is nothing to read."""
        raise CheckpointError(f"{checkpoint.folder}: {self.name}", got="no weights", fix="download them")

    def __str__(self) -> str:
        """Name the tensor."""
        return self.name


def gather(arch: Architecture, config: Config, stored_names: Iterable[str] | None) -> Gathered:
    """Give the sources that a checkpoint with these stored tensors has; None: all that the architecture asks for.

    Raises UnsupportedError for a format that is not implemented.
    """
    stored_names = None if stored_names is None else list(stored_names)
    plain, quantized = _formats(config, ordered=any(name.endswith(".g_idx") for name in stored_names or ()))
    shapes: dict[str, tuple[int, ...]] = {}
    matrices: dict[str, bool] = {}
    for row, layer in arch.unrolled():
        for name in arch.stored_names(row, layer):
            shapes[name] = arch.shape(row)
            if stored_names is None and not row.optional:
                matrices[name] = quantized is not None and row.precision == "target" and "embed" not in name
    for name in stored_names or ():
        base, _, suffix = name.rpartition(".")
        if suffix in QUANTIZED:
            matrices[f"{base}.weight"] = True
        elif suffix not in PARTS:
            matrices.setdefault(name, False)
    return {
        name: Expected(name, shapes.get(name, (1,)), (), *(quantized if is_quantized and quantized else plain))
        for name, is_quantized in matrices.items()
    }, ()


def _formats(config: Config, *, ordered: bool) -> tuple[tuple[str, int], tuple[str, int, int, int, int] | None]:
    """Read the formats of plain and, where there are any, of quantized tensors: what Expected says of them.

    ordered: columns have their group stored.
    """
    dtype = config.data.get("torch_dtype", config.data.get("dtype", "bfloat16"))
    if dtype not in DTYPES:
        raise UnsupportedError(f"{config.source}: torch_dtype", got=dtype, expected=" or ".join(DTYPES))
    if not config.has("quantization_config"):
        return DTYPES[dtype], None
    settings = config.sub("quantization_config")
    method = settings.data.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedError(f"{settings.source}: quant_method", got=method, expected=f"one of {', '.join(FORMATS)}")
    if method in ("gptq", "awq"):
        bits = settings.integer("bits")
        size = read_group_size(settings, "group_size", "q_group_size")
        of_group = DTYPES[dtype][1] + bits
        return DTYPES[dtype], (f"{method.upper()}-Int{bits}", bits, size, of_group, 32 if ordered else 0)
    return DTYPES[dtype], ("FP8", 8, -1, 0, 0)
