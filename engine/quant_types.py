"""Which type every tensor of a model gets, by libllama's own rules: `hymoe_quant_types` of our engine.

A name such as Q4_K_M stands for rules that depend on each tensor's name, shape and place among the others, on the
model's layers, heads and experts, and on whether there is an importance matrix. They are asked, not copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

from hymoe.engine.installed import find
from hymoe.errors import EngineError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, LlamaFileType

MAX_DIMS: Final = 4
ERROR_BYTES: Final = 512


@dataclass(frozen=True)
class ModelShape:
    """What the rules know of a model; `architecture` is a name that llama.cpp has."""

    architecture: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int
    head_dim: int


class Tensor(NamedTuple):
    """A tensor to choose for: row-major `shape`, and the type it keeps where the rules leave it alone.

    fixed: `qtype` is chosen already; the rules count the tensor and are not asked about it.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    fixed: bool = False


class Choice(NamedTuple):
    """A tensor's type; requires_imatrix: llama-quantize refuses to make it without importance data."""

    qtype: GGMLQuantizationType
    requires_imatrix: bool


class Choices(NamedTuple):
    """One Choice per tensor; n_fallback rows are no whole number of the wanted type's blocks and got another type."""

    tensors: tuple[Choice, ...]
    n_fallback: int


def choose(model: ModelShape, file_type: LlamaFileType, tensors: Sequence[Tensor], *, imatrix: bool) -> Choices:
    """Choose the type of every tensor of a file, as llama-quantize does for that file type.

    imatrix: whether there is an importance matrix. Raises EngineError where the engine is missing or refuses.
    """
    from gguf import GGMLQuantizationType

    about = _Model(*(_plain(value) for value in vars(model).values()))
    asked = (_Tensor * len(tensors))(*map(_row, tensors))
    error = ctypes.create_string_buffer(ERROR_BYTES)
    n_fallback = _library().hymoe_quant_types(
        ctypes.byref(about), int(file_type), imatrix, asked, len(tensors), error, ERROR_BYTES
    )
    if n_fallback < 0:
        said = error.value.decode("utf-8", "replace")
        raise EngineError(f"the engine cannot choose types for {file_type.name}", got=said)
    found = (Choice(GGMLQuantizationType(one.type), bool(one.requires_imatrix)) for one in asked)
    return Choices(tuple(found), n_fallback)


class _Model(ctypes.Structure):
    """hymoe_quant_model of the engine's hymoe-quant-types.cpp; fields in the order of ModelShape's."""

    _fields_ = (
        ("architecture", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert")),
        ("n_embd_head", ctypes.c_uint32),
    )


class _Tensor(ctypes.Structure):
    """hymoe_quant_tensor of the same file."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("type", ctypes.c_int32),
        ("fixed", ctypes.c_int32),
        ("requires_imatrix", ctypes.c_int32),
    )


def _plain(value: str | int) -> bytes | int:
    return value.encode() if isinstance(value, str) else value


def _row(tensor: Tensor) -> _Tensor:
    ne = (*reversed(tensor.shape), *[1] * (MAX_DIMS - len(tensor.shape)))
    return _Tensor(tensor.name.encode(), ne, int(tensor.qtype), tensor.fixed, False)


@cache
def _library() -> ctypes.CDLL:
    engine = find()
    library = ctypes.CDLL(str(engine.library("llama")))
    if not hasattr(library, "hymoe_quant_types"):
        raise EngineError(
            f"the engine in {engine.bin} is not ours: it has no hymoe_quant_types", fix="run `hy-engine build`"
        )
    library.hymoe_quant_types.argtypes = [
        ctypes.POINTER(_Model),
        ctypes.c_int32,  # file type
        ctypes.c_bool,  # is there an importance matrix?
        ctypes.POINTER(_Tensor),
        ctypes.c_size_t,  # tensors
        ctypes.c_char_p,  # where an error goes
        ctypes.c_size_t,  # and how long it may be
    ]
    library.hymoe_quant_types.restype = ctypes.c_int32
    return library
