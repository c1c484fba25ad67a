"""Tensors cut into pieces that fit in memory, and doing all of them in threads.

A piece is some rows of one source; in a quantized file rows are whole blocks, so every piece stands for itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from hymoe import sizes
from hymoe.convert.checkpoint import Checkpoint, TensorRef
from hymoe.convert.plan import PlannedTensor
from hymoe.convert.sources import Source

# Bytes of a piece as float32. Larger buffers come fresh from the kernel each time, which costs more than the copying.
PIECE_BYTES = 2 << 20
# A worker holds at most some six such pieces: stored, exact, encoded, decoded again, and their temporaries.
MAX_WORKERS = (256 << 20) // (6 * PIECE_BYTES)
# How often `in_parallel` looks up while it waits.
PATIENCE_SECONDS = 1.0

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of source `index` of a tensor, and where their bytes are: at byte `offset` of file `file` of the output.

    `number` is its place among all pieces of the output, by which the journal knows it.
    """

    number: int
    tensor: PlannedTensor
    index: int
    rows: range
    file: int
    offset: int

    @property
    def source(self) -> Source:
        """What is read."""
        return self.tensor.sources[self.index]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The stored tensors it is read from."""
        return self.source.refs

    @property
    def n_source_bytes(self) -> float:
        """Stored bytes of the rows, for progress."""
        return self.source.n_bytes * len(self.rows) / self.source.n_rows

    @property
    def n_bytes(self) -> int:
        """Bytes of the rows in the output."""
        return len(self.rows) * sizes.row_bytes(self.tensor.shape[-1], self.tensor.qtype)


def cut(tensor: PlannedTensor, number: int, file: int, offset: int) -> Iterator[Piece]:
    """Cut a tensor that lies at byte `offset` of a file into pieces; the first one is `number`."""
    step = max(1, PIECE_BYTES // (4 * tensor.shape[-1]))
    for index, source in enumerate(tensor.sources):
        for first in range(0, source.n_rows, step):
            piece = Piece(number, tensor, index, range(first, min(first + step, source.n_rows)), file, offset)
            yield piece
            number += 1
            offset += piece.n_bytes


def n_workers() -> int:
    """Number of threads: the processors that this process may use, as far as memory allows."""
    # Absent outside Linux; a container or taskset may leave us fewer than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, allowed)


def in_parallel(
    checkpoint: Checkpoint,
    pieces: Sequence[Piece],
    work: Callable[[Piece], ResultT],
    done: Callable[[Piece, ResultT], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Do `work` on every piece in threads, a bounded number at a time, and give the results in order to `done`.

    `meanwhile` is called between results and while they are waited for: a checkpoint that is being downloaded may wait
    for room that only finished pieces make. Stops at the first error.
    """
    pieces = checkpoint.arrange(pieces)
    waiting = iter(pieces)
    in_flight: deque[Future[ResultT]] = deque()
    workers = n_workers()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for piece in pieces:
                in_flight.extend(pool.submit(work, each) for each in islice(waiting, 4 * workers - len(in_flight)))
                while not wait([in_flight[0]], timeout=PATIENCE_SECONDS).done:
                    meanwhile()
                done(piece, in_flight.popleft().result())
                meanwhile()
        except BaseException:
            checkpoint.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
