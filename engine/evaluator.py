"""A model in this process: token ids in, logits out, one weight exchanged for another.

Runs on the CPU with F32 keys and values and without flash attention, which would convert them to F16: two runs of the
same numbers give the same bits, so that a difference of logits is the weights' doing and nothing else.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from hymoe.engine.bindings import load
from hymoe.errors import EngineError, ModelFileError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Logits of a vocabulary of 128,000 for this many tokens are 64 MB.
N_BATCH: Final = 128
F32: Final = 0  # ggml_type
LOG_ERROR: Final = 4  # ggml_log_level
LOAD_NONE: Final = 0  # llama_load_mode
LOAD_MMAP: Final = 1


class Evaluator:
    """A loaded GGUF and a context of n_ctx tokens; a context manager.

    repack: let the engine rearrange weights for speed, as a server does. A model whose weights are to be exchanged is
    loaded without, and into memory of its own.
    """

    def __init__(self, gguf: Path, *, n_ctx: int, n_threads: int, repack: bool = True) -> None:
        self._llama: ModuleType = load()
        self._log = self._llama.llama_log_callback(self._heard)
        self._said: list[str] = []
        self._llama.llama_log_set(self._log, None)
        self._llama.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        try:
            self._open(gguf, n_ctx, n_threads, repack)
        except BaseException:
            self.close()
            raise

    def _open(self, gguf: Path, n_ctx: int, n_threads: int, repack: bool) -> None:
        llama = self._llama
        model = llama.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = repack
        model.load_mode = LOAD_MMAP if repack else LOAD_NONE
        self._model = llama.llama_model_load_from_file(os.fsencode(gguf), model)
        if not self._model:
            raise ModelFileError(f"{gguf}: the engine cannot load it", got=self._reason())
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        context = llama.llama_context_default_params()
        context.n_ctx = n_ctx
        context.n_batch = context.n_ubatch = min(N_BATCH, n_ctx)
        context.n_threads = context.n_threads_batch = n_threads
        context.type_k = context.type_v = F32
        context.flash_attn_type = 0
        # An engine with a card would compute batches there, in its own precision, even with no layer on it.
        context.offload_kqv = context.op_offload = False
        context.no_perf = True
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            raise EngineError(f"{gguf}: no context of {n_ctx} tokens", got=self._reason())
        self.n_ctx = n_ctx
        self._batch = llama.llama_batch_init(min(N_BATCH, n_ctx), 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model."""
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str) -> list[int]:
        """Give the token ids of a text, special tokens read as such, nothing added around."""
        raw = text.encode()
        ids = (self._llama.llama_token * (len(raw) + 8))()
        n = self._llama.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), False, True)
        if n < 0:
            raise EngineError("the engine cannot tokenize", got=f"{n} for {len(raw)} bytes")
        return list(ids[:n])

    def logits(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Give the logits [n, n_vocab] of the next n tokens, from an empty context on; a view until the next step.

        Raises EngineError where the engine fails.
        """
        import numpy as np

        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        for start in range(0, len(ids), N_BATCH):
            piece = ids[start : start + N_BATCH]
            self._fill(piece, start)
            if status := llama.llama_decode(self._context, self._batch):
                raise EngineError(f"the engine failed at token {start}", got=f"status {status}: {self._reason()}")
            flat = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (len(piece) * self.n_vocab,))
            yield flat.reshape(len(piece), self.n_vocab)

    def _fill(self, ids: Sequence[int], start: int) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, True
            batch.seq_id[i][0] = 0

    def set_weight(self, name: str, data: NDArray[np.uint8]) -> None:
        """Exchange a tensor's bytes for others of its type; not for a repacked model.

        Raises EngineError for an engine that cannot, ValueError for a tensor that is not there or of another size.
        """
        setter = _setter()
        if not setter(ctypes.cast(self._model, ctypes.c_void_p), name.encode(), data.ctypes.data, data.nbytes):
            raise ValueError(f"no tensor {name} of {data.nbytes} bytes")

    def _heard(self, level: int, text: bytes, _data: object) -> None:
        """Keep the engine's errors for the one line that will tell of them."""
        if level == LOG_ERROR:
            self._said.append(text.decode("utf-8", "replace").strip())

    def _reason(self) -> str:
        return self._said[0] if self._said else "no word from it"


def _setter() -> Any:
    from hymoe.engine.installed import find

    engine = find()
    library = ctypes.CDLL(str(engine.library("llama")))
    if not hasattr(library, "hymoe_set_weight"):
        raise EngineError(f"the engine in {engine.bin} has no hymoe_set_weight", fix="run `hy-engine build`")
    library.hymoe_set_weight.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
    library.hymoe_set_weight.restype = ctypes.c_bool
    return library.hymoe_set_weight
