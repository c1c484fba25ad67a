"""MUL_MAT_ID of ggml's CPU backend with id -1: the slot's answer is zero and nothing is read for it.

The operation is called through libggml itself, for every kind of weights: as stored (with the vector kernels, and
tiled ones for many tokens) and repacked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from hymoe import engine
from hymoe.engine.bindings import quantize_rows

pytestmark = pytest.mark.engine

N_IN, N_OUT, N_EXPERT, N_USED = 256, 64, 6, 4
F32, I32 = 0, 26
N_THREADS = 3
# Of the largest answer: how kernels may differ that sum in another order, or round the activations as the type does.
TOLERANCE = {Type.F32: 1e-5, Type.F16: 1e-3, Type.BF16: 1e-2}
Q8_TOLERANCE = 1e-2  # block types take activations of 8 bits
KINDS = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q6_K, Type.Q4_K, Type.Q4_0, Type.IQ4_NL)


class InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def ggml() -> ctypes.CDLL:
    """libggml with the result types of what is called here: pointers, where ctypes would guess int."""
    folder = engine.find().bin
    for name in ("libggml-base.so", "libggml-cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
    for name in (
        *("ggml_init", "ggml_new_tensor_3d", "ggml_mul_mat_id", "ggml_new_graph", "ggml_backend_cpu_init"),
        *("ggml_backend_cpu_buffer_type", "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_backend_cpu_reg"),
        *("ggml_backend_reg_get_proc_address", "ggml_backend_reg_dev_get", "ggml_backend_buft_name"),
    ):
        getattr(library, name).restype = ctypes.c_void_p
    library.ggml_backend_buft_name.restype = ctypes.c_char_p
    library.ggml_backend_dev_supports_op.restype = ctypes.c_bool
    return library


def pointer(value: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def cpu_device() -> int:
    device: int = ggml().ggml_backend_reg_dev_get(pointer(ggml().ggml_backend_cpu_reg()), ctypes.c_size_t(0))
    return device


def repack_buffer() -> int | None:
    """Give the buffer type whose weights are repacked when they are set; None where this CPU has none."""
    lib = ggml()
    registry = pointer(lib.ggml_backend_cpu_reg())
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    found = extra(cpu_device())
    for buffer in iter_pointers(found):
        if lib.ggml_backend_buft_name(pointer(buffer)) == b"CPU_REPACK":
            return buffer
    return None


def iter_pointers(array: Any) -> Iterator[int]:
    index = 0
    while array[index]:
        yield array[index]
        index += 1


def context() -> ctypes.c_void_p:
    return pointer(ggml().ggml_init(InitParams(1 << 20, None, True)))


def tensor(where: ctypes.c_void_p, kind: int, *shape: int) -> ctypes.c_void_p:
    """Make a tensor; `shape` in ggml's order, the fastest first."""
    sizes = [ctypes.c_int64(size) for size in (*shape, 1, 1)[:3]]
    return pointer(ggml().ggml_new_tensor_3d(where, kind, *sizes))


def put(target: ctypes.c_void_p, values: NDArray[Any]) -> None:
    flat = np.ascontiguousarray(values)
    ggml().ggml_backend_tensor_set(target, pointer(flat.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(flat.nbytes))


def encoded(values: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    """Give weights [N_EXPERT, N_OUT, N_IN] in a type; an expert of NaN is NaN in all its blocks."""
    rows = quantize_rows(np.nan_to_num(values).reshape(-1, N_IN), kind).reshape(N_EXPERT, -1)
    for expert in np.flatnonzero(np.isnan(values).any(axis=(1, 2))):
        rows[expert] = 0xFF  # scales, which are F16 in every block type, and floats alike
    return rows


def multiply(
    weights: NDArray[np.uint8], kind: Type, x: NDArray[np.float32], ids: NDArray[np.int32], buffer: int | None = None
) -> NDArray[np.float32]:
    """Compute [n_tokens, N_USED, N_OUT] of x [n_tokens, 1 or N_USED, N_IN] and ids [n_tokens, N_USED]."""
    lib = ggml()
    plain = lib.ggml_backend_cpu_buffer_type()
    own, other = context(), context()
    w = tensor(own, int(kind), N_IN, N_OUT, N_EXPERT)
    b = tensor(other, F32, x.shape[2], x.shape[1], x.shape[0])
    i = tensor(other, I32, ids.shape[1], ids.shape[0])
    result = pointer(lib.ggml_mul_mat_id(other, w, b, i))
    kept = lib.ggml_backend_alloc_ctx_tensors_from_buft(own, pointer(buffer or plain))
    rest = lib.ggml_backend_alloc_ctx_tensors_from_buft(other, pointer(plain))
    if buffer and not lib.ggml_backend_dev_supports_op(pointer(cpu_device()), result):
        pytest.skip(f"this CPU has no kernels for repacked {kind.name}")
    put(w, weights)
    put(b, x)
    put(i, ids)
    out = np.full((*ids.shape, N_OUT), 7.0, np.float32)
    put(result, out)  # so that a zero is one that was written
    graph_memory = context()
    graph = pointer(lib.ggml_new_graph(graph_memory))
    lib.ggml_build_forward_expand(graph, result)
    backend = pointer(lib.ggml_backend_cpu_init())
    lib.ggml_backend_cpu_set_n_threads(backend, N_THREADS)
    assert lib.ggml_backend_graph_compute(backend, graph) == 0
    size = ctypes.c_size_t(out.nbytes)
    lib.ggml_backend_tensor_get(result, pointer(out.ctypes.data), ctypes.c_size_t(0), size)
    lib.ggml_backend_free(backend)
    for block in (kept, rest):
        lib.ggml_backend_buffer_free(pointer(block))
    for memory in (own, other, graph_memory):
        lib.ggml_free(memory)
    return out


@pytest.mark.parametrize("repacked", [False, True], ids=["stored", "repacked"])
@pytest.mark.parametrize("n_tokens", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("own_rows", [False, True], ids=["gate and up", "down"])
def test_skipped_slots(kind: Type, n_tokens: int, repacked: bool, own_rows: bool) -> None:
    buffer = repack_buffer() if repacked else None
    if repacked and buffer is None:
        pytest.skip("this CPU repacks nothing")
    random = np.random.default_rng(n_tokens)
    weights = random.standard_normal((N_EXPERT, N_OUT, N_IN)).astype(np.float32)
    x = random.standard_normal((n_tokens, N_USED if own_rows else 1, N_IN)).astype(np.float32)
    ids = np.array([random.permutation(N_EXPERT - 1)[:N_USED] for _ in range(n_tokens)], np.int32)
    whole = multiply(encoded(weights, kind), kind, x, ids, buffer)
    dropped = random.random(ids.shape) < 0.4
    dropped[0, 0], dropped[-1, -1], dropped[0, 1] = True, True, False
    # what nobody asks for may be anything: the last expert, and every one that only dropped slots name
    weights[np.setdiff1d(np.arange(N_EXPERT), ids[~dropped])] = np.nan
    got = multiply(encoded(weights, kind), kind, x, np.where(dropped, -1, ids).astype(np.int32), buffer)
    assert not got[dropped].any()
    assert np.isfinite(got).all()
    # rows of an expert may go through another kernel when they are fewer
    assert np.abs(got - whole)[~dropped].max() <= TOLERANCE.get(kind, Q8_TOLERANCE) * np.abs(whole).max()
    if n_tokens == 1:
        assert got[~dropped].tobytes() == whole[~dropped].tobytes()


def test_nobody_gets_any() -> None:
    kind = Type.Q8_0
    weights = np.full((N_EXPERT, N_OUT, N_IN), np.nan, np.float32)
    x = np.ones((2, 1, N_IN), np.float32)
    assert not multiply(encoded(weights, kind), kind, x, np.full((2, N_USED), -1, np.int32)).any()
