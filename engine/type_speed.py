"""How many weights of each type this processor multiplies per second, where experts lie in RAM: measured."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

from gguf import GGMLQuantizationType

from hymoe.engine.installed import find
from hymoe.errors import EngineError

# Experts for one measurement: more bytes than caches hold, of any type.
N_EXPERT: Final = 16
N_USED: Final = 4
SECONDS: Final = 0.2


def measure(types: Sequence[str], n_embd: int, n_ff: int, n_threads: int) -> dict[str, float]:
    """Give weights per second by type, of experts [n_ff, n_embd]; a type that its rows cannot have is left out.

    Raises EngineError where the engine cannot, or lacks memory.
    """
    from gguf import GGML_QUANT_SIZES

    engine = find()
    library = ctypes.CDLL(str(engine.library("llama")))
    if not hasattr(library, "hymoe_type_speed"):
        raise EngineError(f"the engine in {engine.bin} has no hymoe_type_speed", fix="run `hy-engine build`")
    speed = library.hymoe_type_speed
    speed.restype = ctypes.c_double
    speed.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.c_double]
    found = {}
    for name in types:
        qtype = GGMLQuantizationType[name]
        if n_embd % GGML_QUANT_SIZES[qtype][0]:
            continue
        found[name] = float(speed(int(qtype), n_embd, n_ff, N_EXPERT, N_USED, n_threads, SECONDS))
        if not found[name]:
            raise EngineError(f"the speed of {name} could not be measured", fix="free some memory, or pass --no-speed")
    return found
