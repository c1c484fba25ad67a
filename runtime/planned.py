"""A placement plan as a thing: what was asked, where everything lies, how the engine is set, and its command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal

from hymoe.runtime import measuring
from hymoe.runtime.layout import Layout
from hymoe.runtime.machine import Device, Machine
from hymoe.runtime.placement import Run
from hymoe.runtime.roofline import Source, Use
from hymoe.runtime.tune import Tuned

# Purpose -> what is made fast, and the context where none is asked for.
PURPOSES: Final = {
    "default": (Use(4096, 500), 32768),
    "chat": (Use(512, 500), 32768),
    "long-context": (Use(32768, 1000), 131072),
    "prefill": (Use(16384, 100), 32768),
}
N_BATCH: Final = 2048  # llama-server's default; never less than the ubatch
RAM: Final = "RAM"

LoadMode = Literal["none", "mmap", "mmap+mlock"]


@dataclass(frozen=True)
class Wish:
    """What is asked of a plan; None: the plan decides.

    n_ctx: tokens. whole_prompts: prompts go through in one ubatch (the router mode "capacity"). rpc: addresses of the
    workers whose devices the machine has. lockable: bytes that the engine may lock in RAM. flash: flash attention
    or none.
    """

    n_ctx: int | None = None
    purpose: str = "default"
    kv_type: str | None = None
    n_ubatch: int | None = None
    n_parallel: int | None = None
    whole_prompts: bool = False
    rpc: tuple[str, ...] = ()
    lockable: int = 0
    flash: bool | None = None

    def use(self, n_ctx: int) -> Use:
        """Give the purpose's prompt and answer, cut to a context of so many tokens."""
        use = PURPOSES[self.purpose][0]
        n_prompt = max(min(use.n_prompt, n_ctx - use.n_answer), 1)
        return Use(n_prompt, max(min(use.n_answer, n_ctx - n_prompt), 1))


@dataclass(frozen=True)
class Setting:
    """How the engine is set. n_ctx, n_batch, n_ubatch: tokens; cache_ram: MiB for saved prompts.

    stream_from: from so many tokens on, experts in RAM are sent to a GPU; None: never.
    """

    n_ctx: int
    kv_type: str
    n_ubatch: int
    stream_from: int | None
    flash: bool
    repack: bool
    threads: int
    threads_batch: int
    load: LoadMode = "mmap"
    cache_ram: int = 0

    @property
    def n_batch(self) -> int:
        """Tokens that the server hands over at a time."""
        return max(N_BATCH, self.n_ubatch)


@dataclass(frozen=True)
class Memory:
    """What a plan puts into one memory, in bytes; `n_bytes` is what is free for us, `margin` what must stay so.

    name: "RAM" or a device's.
    """

    name: str
    description: str
    n_bytes: int
    margin: int
    layers: int = 0  # attention, shared experts, routers, norms of the layers that live here
    experts: int = 0
    output: int = 0
    embedding: int = 0
    kv: int = 0
    compute: int = 0
    process: int = 0

    @property
    def weights(self) -> int:
        """Bytes of the model."""
        return self.layers + self.experts + self.output + self.embedding

    @property
    def used(self) -> int:
        """Bytes that the plan takes."""
        return self.weights + self.kv + self.compute + self.process

    @property
    def free(self) -> int:
        """Bytes that are left beyond the margin; negative where it does not fit."""
        return self.n_bytes - self.margin - self.used


@dataclass(frozen=True)
class Speeds:
    """Predicted tokens per second for the plan's use, what a token reads from each memory (bytes), and what limits.

    rates: bytes/s counted with, and sources: where they come from, of each memory that is read.
    """

    prefill: float
    generation: float
    read: dict[str, int]
    prefill_limit: str
    generation_limit: str
    rates: dict[str, float]
    sources: dict[str, Source]


@dataclass(frozen=True)
class Plan:
    """A model on a machine: `runs` are the layers of each of `devices`, those in front of the first are the host's."""

    layout: Layout
    machine: Machine
    wish: Wish
    setting: Setting
    devices: tuple[Device, ...]
    runs: tuple[Run, ...]
    memories: tuple[Memory, ...]
    speeds: Speeds
    tuned: Tuned | None = None

    @property
    def use(self) -> Use:
        """The prompt and the answer that the speeds are for."""
        return self.wish.use(self.setting.n_ctx)

    @property
    def ram(self) -> Memory:
        """What lies in RAM."""
        return self.memories[-1]

    @property
    def n_host_layers(self) -> int:
        """Number of layers, the first ones, that no device has."""
        return self.runs[0].first if self.runs else self.layout.shape.n_layer

    @cached_property
    def host_experts(self) -> tuple[int, ...]:
        """Layers on a device whose experts are in RAM."""
        return tuple(layer for run in self.runs for layer in range(run.first, run.last) if layer not in run.experts)

    def arguments(self) -> list[str]:
        """Give llama-server's arguments, all but the model's and the server's own."""
        setting = self.setting
        words: list[object] = ["--fit", "off", *self._placement()]
        words += ["--ctx-size", setting.n_ctx, "--batch-size", setting.n_batch, "--ubatch-size", setting.n_ubatch]
        words += ["--cache-type-k", setting.kv_type, "--cache-type-v", setting.kv_type]
        words += ["--flash-attn", "on" if setting.flash else "off"]
        words += ["--threads", setting.threads, "--threads-batch", setting.threads_batch]
        words += ["--load-mode", setting.load, "--cache-ram", setting.cache_ram]
        words += [] if setting.repack else ["--no-repack"]
        words += ["--no-op-offload"] if self.devices and setting.stream_from is None else []
        if self.wish.n_parallel is not None:
            words += ["--parallel", self.wish.n_parallel, "--kv-unified"]
        return [str(word) for word in words]

    def environment(self) -> dict[str, str]:
        """Give the variables that the engine reads besides."""
        from hymoe import engine

        threshold = self.setting.stream_from
        return engine.WAITING | ({} if threshold is None else {measuring.MIN_BATCH_VARIABLE: str(threshold)})

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON-ready values."""
        return {
            "model": self.layout.name,
            "architecture": self.layout.architecture,
            "model_bytes": self.layout.n_bytes,
            "machine": self.machine.to_json(),
            "setting": asdict(self.setting) | {"n_batch": self.setting.n_batch},
            "layers": {
                "host": self.n_host_layers,
                "experts_in_ram": [*range(self.n_host_layers), *self.host_experts],
                "devices": [
                    {"device": device.name, **run._asdict()}
                    for device, run in zip(self.devices, self.runs, strict=True)
                ],
            },
            "memories": [asdict(memory) | {"used": memory.used, "free": memory.free} for memory in self.memories],
            "speeds": asdict(self.speeds),
            "arguments": self.arguments(),
            "environment": self.environment(),
        }

    def _placement(self) -> Iterator[str]:
        if not self.devices:
            yield from ("--device", "none") if self.machine.devices else ()
            return
        if any(device.kind == "rpc" for device in self.devices):
            yield from ("--rpc", ",".join(self.wish.rpc))
        # the output matrix counts as a layer, the last
        counts = [run.last - run.first for run in self.runs]
        counts[-1] += 1
        yield from ("--device", ",".join(device.name for device in self.devices))
        yield from ("--gpu-layers", str(sum(counts)))
        if len(counts) > 1:
            yield from ("--tensor-split", ",".join(map(str, counts)))
        if self.host_experts:
            layers = "|".join(map(str, self.host_experts))
            yield from ("--override-tensor", rf"blk\.({layers})\.ffn_\w+_exps\.=CPU")
