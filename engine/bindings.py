"""The engine from Python: llama-cpp-python over our libraries, and ggml's quantizer by itself.

llama-cpp-python is installed from the pinned sdist without compiling anything: it loads the very
libraries that the server and the tools run, so there is one engine and not two.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from hymoe import console
from hymoe.engine import pin, source
from hymoe.engine.installed import BUILD_IT, find
from hymoe.errors import EngineError
from hymoe.sizes import row_bytes

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

LIBRARY_VARIABLE: Final = "LLAMA_CPP_LIB_PATH"
# Elements of a block of the K and IQ types. They weigh the errors of a block in float32, and some abort the process
# where that overflows. No scale reaches LARGEST_WEIGHT; LARGEST_ERROR leaves room for the sum over a block.
SUPER_BLOCK: Final = 256
LARGEST_WEIGHT: Final = 1e9
LARGEST_ERROR: Final = 1e34


def install(sdists: Path) -> None:
    """Install llama-cpp-python into the running environment unless its pinned version is there.

    sdists: the folder where the sdist is kept. Raises EngineError where pip fails.
    """
    if _installed() == pin.VERSION:
        return
    sdist = source.fetch(sdists)
    console.status(f"installing {pin.PACKAGE} {pin.VERSION} (Python only)")
    environment = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        # what the sdist builds with is among our dependencies: nothing is fetched that nobody pinned
        "--no-build-isolation",
        str(sdist),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        console.detail(done.stderr)
        raise EngineError(
            f"the engine is built, but {pin.PACKAGE} could not be installed into {sys.prefix}",
            got=source.pip_reason(done.stderr),
            fix="try again, or leave it out with `hy-engine build --no-bindings`",
        )


def load() -> ModuleType:
    """Import llama_cpp over the libraries of the engine that `find` gives.

    Raises EngineError where the engine or the package is missing.
    """
    if "llama_cpp" not in sys.modules:
        if _installed() is None:
            raise EngineError(f"{pin.PACKAGE} is not installed", fix=BUILD_IT)
        os.environ[LIBRARY_VARIABLE] = str(find().bin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, about what it will drop some day
        return import_module("llama_cpp")


def quantize_rows(
    data: NDArray[np.float32], qtype: GGMLQuantizationType, *, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize float32 rows [n_rows, n_per_row] with ggml's own code into bytes [n_rows, row_bytes].

    importance: weight of each column's error [n_per_row], which the smallest types cannot do without.
    The interpreter lock is free meanwhile, so that threads share the work. Raises ValueError for a
    type, shape or element type that ggml cannot take, FloatingPointError for values that its scales cannot hold.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES

    if data.ndim != 2 or data.dtype != np.float32:
        raise ValueError(f"quantize_rows takes float32 [n_rows, n_per_row], got {data.dtype} {list(data.shape)}")
    n_rows, n_per_row = data.shape
    out = np.empty((n_rows, row_bytes(n_per_row, qtype)), dtype=np.uint8)
    base = _ggml_base()
    if importance is None and requires_importance(qtype):
        raise ValueError(f"{qtype.name} cannot be made without importance")
    if importance is not None and (importance.dtype != np.float32 or importance.shape != (n_per_row,)):
        raise ValueError(f"importance is float32 [{n_per_row}], got {importance.dtype} {list(importance.shape)}")
    if not out.size:
        return out
    rows = np.ascontiguousarray(data)
    if GGML_QUANT_SIZES[qtype][0] == SUPER_BLOCK:
        _check_range(rows, qtype, importance)
    weights = None if importance is None else np.ascontiguousarray(importance)
    pointer = None if weights is None else weights.ctypes.data
    made = base.ggml_quantize_chunk(qtype, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_per_row, pointer)
    if made != out.nbytes:
        raise ValueError(f"{qtype.name}: ggml made {made} bytes of {n_rows} x {n_per_row}, expected {out.nbytes}")
    if not base.ggml_validate_row_data(qtype, out.ctypes.data, out.nbytes):
        raise FloatingPointError(f"{qtype.name} cannot hold values of up to {np.abs(rows).max():g}")
    return out


def dequantize_rows(data: NDArray[np.uint8], qtype: GGMLQuantizationType, n_per_row: int) -> NDArray[np.float32]:
    """Decode rows of bytes [n_rows, row_bytes] with ggml's own code into float32 [n_rows, n_per_row].

    The interpreter lock is free meanwhile. Raises ValueError for a type or shape that does not fit.
    """
    import numpy as np

    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] != row_bytes(n_per_row, qtype):
        raise ValueError(f"{n_per_row} elements as {qtype.name}: got rows of {data.dtype} {list(data.shape)}")
    rows = np.ascontiguousarray(data)
    out = np.empty((len(rows), n_per_row), dtype=np.float32)
    _ggml_base().ggml_get_type_traits(qtype).contents.to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def _check_range(
    rows: NDArray[np.float32], qtype: GGMLQuantizationType, importance: NDArray[np.float32] | None
) -> None:
    largest = max(float(rows.max()), -float(rows.min()))
    heaviest = 1.0 if importance is None else float(importance.max())
    if not (largest < LARGEST_WEIGHT and heaviest * largest**3 < LARGEST_ERROR):
        raise FloatingPointError(f"{qtype.name} cannot hold values of up to {largest:g} of importance {heaviest:g}")


def requires_importance(qtype: GGMLQuantizationType) -> bool:
    """Whether ggml cannot make this type without importance at all."""
    return bool(_ggml_base().ggml_quantize_requires_imatrix(qtype))


def _installed() -> str | None:
    try:
        return metadata.version(pin.PACKAGE)
    except metadata.PackageNotFoundError:
        return None


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h, up to what is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def _ggml_base() -> ctypes.CDLL:
    library = ctypes.CDLL(str(find().library("ggml-base")))
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # float32 rows
        ctypes.c_void_p,  # where the bytes go
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # n_rows
        ctypes.c_int64,  # n_per_row
        ctypes.c_void_p,  # importance [n_per_row] or null
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library
