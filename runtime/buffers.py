"""What a model takes of every memory, as the engine itself counts it: nothing is allocated, no weight is read.

The engine loads the file's head, makes the graph of the largest batch and plans its buffers, as it does before it
allocates them; on Hunyuan-A13B's head that takes half a second. The devices may be cards that are not there (`cards`):
the tool then puts a device in their place that takes the operations and asks for the memory that a CUDA card does.
A file whose data are a hole, without weights, is measured like any other.

What a placement has to know about these numbers:

* Weights in RAM that a device works on (experts, in batches of `offload_batch` tokens or more) are copied to it one
  tensor at a time, into the device's *compute* buffer: with experts in RAM it is larger by the largest stack of
  experts (gate, up or down of one layer) than without. Nothing more is allocated on the host for that: copies start
  where the weights lie, which is fast where the card can read that memory by itself (`--load-mode none`, which puts
  them into pinned memory) and about half as fast out of a mapped file.
* Only weights in plain RAM are copied. Repacked ones (buffer CPU_REPACK) are always worked on by the CPU; beside a
  CUDA card the engine repacks nothing, since it prefers memory that the card can read.
* Quantized keys and values are converted to F16 for flash attention, in the compute buffer too: up to 2 bytes per
  element of one layer's keys and values.
* Without flash attention, scores of a whole batch are held: n_head * n_ctx * ubatch * 4 bytes.
* What a driver takes for itself (a CUDA context is some 300 to 500 MB, pools of kernels some 100 MB) is in no report:
  that is what a margin is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hymoe.runtime import header, measuring

HOST: Final = "CPU"
# The engine offloads from 32 tokens on as if every weight were used; of experts a token uses a few.
DENSE_OFFLOAD_BATCH: Final = 32


@dataclass(frozen=True)
class Breakdown:
    """Bytes in one memory. compute: graphs, at the largest batch."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.kv + self.compute


def offload_batch(n_expert: int, n_expert_used: int) -> int:
    """Tokens from which sending experts to a device pays: 256 for Hunyuan-A13B.

    A batch of n tokens reads every expert about n * n_expert_used / n_expert times; a weight that is read 32 times is
    worth sending, by the engine's own default for matrices that every token uses. The engine reads the number from
    the environment (measuring.MIN_BATCH_VARIABLE), in its CUDA, Vulkan and Metal backends alike; an RPC worker is
    never sent weights.
    """
    return DENSE_OFFLOAD_BATCH * n_expert // n_expert_used


def measure(
    model: Path, arguments: Sequence[str], *, cards: Mapping[str, int] | None = None, min_batch: int | None = None
) -> Mapping[str, Breakdown]:
    """Give the bytes in every memory: the devices in the engine's order, then the host's RAM as HOST.

    arguments: llama-server's, without the model. cards: names and bytes of devices to plan for in place of those that
    are here; names that no device here has ("GPU0"). min_batch: the value that MIN_BATCH_VARIABLE will have.
    Answers are remembered, for all files of the same shape. Raises ModelFileError for what is no GGUF, EngineError with
    the engine's reason where it refuses file or arguments.
    """
    key = {"model": _shape(model), "arguments": list(arguments), "cards": cards or {}, "min_batch": min_batch}

    def ask() -> dict[str, Any]:
        paper = [",".join(f"{name}={size}" for name, size in cards.items())] if cards else []
        answer = measuring.ask("memory", *paper, "-m", str(model), *arguments, min_batch=min_batch)
        return {name: asdict(memory) for name, memory in _memories(answer).items()}

    return {name: Breakdown(**memory) for name, memory in measuring.remembered("buffers", key, ask).items()}


def _memories(answer: Mapping[str, Any]) -> dict[str, Breakdown]:
    found = {name: Breakdown(0, 0, 0) for name in (*answer["devices"], HOST)}
    for buffer in answer["buffers"]:
        before = found[buffer["device"]]
        found[buffer["device"]] = Breakdown(
            before.weights + buffer["weights"], before.kv + buffer["kv"], before.compute + buffer["compute"]
        )
    return found


def _shape(model: Path) -> list[Any]:
    """What buffers depend on: the architecture's numbers, and every tensor's shape and type."""
    first = header.read(model)
    numbers = {key: value for key, value in first.scalars.items() if key.startswith(f"{first.architecture}.")}
    return [first.architecture, numbers, [(info.name, info.shape, info.kind) for info in header.tensors(first)]]
