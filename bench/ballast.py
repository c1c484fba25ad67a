"""Memory of an NVIDIA card held by this process, so that a large card has no more to give than a small one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHUNK = 1 << 30
GRAIN = 2 << 20  # what the driver hands out at least
LIBRARY = "libcuda.so.1"


@contextmanager
def leave(n_bytes: int) -> Iterator[None]:
    """Hold so much of the first card's memory that `n_bytes` of it stay free.

    Plain allocations of the driver: every program that asks what is free sees them. Raises SystemExit where there is
    no driver, or where it refuses.
    """
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as exc:
        raise SystemExit(f"no NVIDIA driver to hold memory with: {exc}") from exc
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call(cuda, "cuInit", ctypes.c_uint(0))
    call(cuda, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call(cuda, "cuCtxSetCurrent", context)
        while (more := free(cuda) - n_bytes) >= GRAIN:
            held = ctypes.c_void_p()
            call(cuda, "cuMemAlloc_v2", ctypes.byref(held), ctypes.c_size_t(min(more, CHUNK)))
        yield
    finally:  # what the context holds goes with it
        call(cuda, "cuDevicePrimaryCtxRelease_v2", device)


def free(cuda: ctypes.CDLL) -> int:
    """Give the bytes that the card has left."""
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    call(cuda, "cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
    return left.value


def call(cuda: ctypes.CDLL, name: str, *arguments: Any) -> None:
    status = getattr(cuda, name)(*arguments)
    if status:
        raise SystemExit(f"{name}: the driver's error {status}")
