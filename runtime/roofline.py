"""How long a layer takes, from bytes and rates: the model of speed that plans minimise.

Generating a token reads every weight that the token uses once, so it takes bytes over bandwidth; where that is
slower, weights times two operations over the processor's rate. A prompt goes through in ubatches. There the operations
count, and experts that lie in RAM are either computed by the processor or sent over the link to a GPU, once for every
ubatch; the pinned engine does not send while it computes, so the two add up. Of the last layer a prompt needs attention
alone: logits are only asked for its last token.

The rates are those that were measured on the model, else on the machine. For a machine that is not here they come from
data sheets and from constants, each with where it comes from; docs/placement.md states them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Final

from hymoe.runtime.layout import Layer, Layout
from hymoe.runtime.machine import Device, Machine
from hymoe.runtime.tune import Tuned

# Share of the bandwidth that matrix-vector products reach on quantized weights: 7 B models in Q4_K generate 120 to 165
# tokens/s on an RTX 3090 or 4090, which read 500 to 670 GB/s of their 936 and 1008; processors come nearer.
READ_SHARE: Final = {"host": 0.85, "gpu": 0.6, "igpu": 0.6, "rpc": 0.6}
# Operations per byte of bandwidth in prompt processing: the same two cards reach 70 to 160 T/s.
OPS_PER_BYTE: Final = {"gpu": 75.0, "igpu": 20.0, "rpc": 10.0}
# Operations per second of one core with 256-bit vectors on quantized weights.
OPS_PER_CORE: Final = 60e9
# Share of a layer's time that goes into matrix products; attention, norms and waiting for each other take the rest.
# Measured: four layers of Hunyuan-A13B's size on two cores are so much slower than the products alone.
PRODUCTS: Final = 0.85
# Bytes per second where nothing was measured and nothing is known: a card of the middle class; and what comes over a
# network of 1 Gbit/s or from the host to a card on PCIe 4 × 16.
READ: Final = 400e9
LINK: Final = {"gpu": 24e9, "igpu": 24e9, "rpc": 0.11e9}
# Seconds that it takes to hand a token's activations to another processor, apart from the bytes.
HOP: Final = {"gpu": 30e-6, "igpu": 30e-6, "rpc": 300e-6}
ACTIVATION_BYTES: Final = 4


class Source(StrEnum):
    """Where rates come from."""

    MODEL = "measured on this model"
    MACHINE = "measured on this machine"
    BUSY = "measured on this machine beside other work"
    SHEETS = "taken from data sheets"


@dataclass(frozen=True)
class Use:
    """What a speed is predicted for: a prompt and an answer, in tokens."""

    n_prompt: int
    n_answer: int


@dataclass(frozen=True)
class Rates:
    """What a processor with its memory does per second: bytes read, operations, bytes received from the host.

    hop: seconds for each hand-over. kind is "host" or a device's. source: of `read` and `ops`. attention_token,
    attention_prompt: operations of attention; None: nothing but reading counts, or `ops` does.
    """

    kind: str
    read: float
    ops: float
    link: float = inf
    hop: float = 0.0
    source: Source = Source.SHEETS
    attention_token: float | None = None
    attention_prompt: float | None = None


@dataclass(frozen=True)
class Time:
    """Seconds for a whole prompt, and for one token of the answer."""

    prefill: float
    token: float

    def __add__(self, other: Time) -> Time:
        """Add both."""
        return Time(self.prefill + other.prefill, self.token + other.token)

    def total(self, use: Use) -> float:
        """Give the seconds of the whole use."""
        return self.prefill + use.n_answer * self.token


NOTHING: Final = Time(0.0, 0.0)


def host_rates(machine: Machine, tuned: Tuned | None = None, *, repacked: float = 0.0) -> Rates:
    """Give the rates of processor and RAM. repacked: share of the weights that lie there so."""
    read, ops, source = READ_SHARE["host"] * machine.bandwidth, OPS_PER_CORE * machine.n_core, Source.SHEETS
    if tuned and tuned.stored and tuned.repacked:
        pace = tuned.repacked if repacked else tuned.stored
        read, ops, source = pace.read, pace.ops, Source.MODEL
    elif machine.stored:
        pace = machine.stored.mixed(machine.repacked or machine.stored, repacked)
        read, ops, source = PRODUCTS * pace.read, PRODUCTS * pace.ops, _measured(machine)
    token, prompt = machine.attention_token, machine.attention_prompt
    return Rates("host", read, ops, source=source, attention_token=token, attention_prompt=prompt)


def device_rates(device: Device, machine: Machine) -> Rates:
    """Give a device's rates; without a number of its own an integrated GPU reads what the processor reads."""
    kind, link = device.kind, device.link or LINK[device.kind]
    if pace := device.pace:
        return Rates(kind, PRODUCTS * pace.read, PRODUCTS * pace.ops, link, HOP[kind], _measured(machine))
    bandwidth = device.bandwidth or (machine.bandwidth if kind == "igpu" else READ)
    return Rates(kind, READ_SHARE[kind] * bandwidth, OPS_PER_BYTE[kind] * bandwidth, link, HOP[kind])


def _measured(machine: Machine) -> Source:
    return Source.BUSY if machine.was_busy else Source.MACHINE


@dataclass(frozen=True)
class Roofline:
    """Predicts the time of layers for one use and one way to run prompts.

    stream: the device that experts in RAM are sent to in ubatches of at least `stream_from` tokens; None: never.
    kv_row: bytes of one token's keys and values in one layer. n_ubatch: tokens.
    """

    layout: Layout
    use: Use
    n_ubatch: int
    kv_row: float
    host: Rates
    stream: Rates | None = None
    stream_from: int = 0

    def layer(self, layer: Layer, home: Rates, experts: Rates) -> Time:
        """Time of a layer whose attention, shared expert and cache are with `home`."""
        return Time(self._prefill(layer, home, experts), self._token(layer, home, experts))

    def output(self, home: Rates) -> Time:
        """Time of the output matrix, which only the last token of a prompt needs."""
        once = self.layout.output / home.read
        return Time(once, once)

    def boundary(self, device: Rates) -> Time:
        """Time to hand the activations of all tokens on to a device from another, or from the host."""
        n_bytes = self.layout.shape.n_embd * ACTIVATION_BYTES
        n_ubatch = -(-self.use.n_prompt // self.n_ubatch)
        prefill = self.use.n_prompt * n_bytes / device.link + n_ubatch * device.hop
        return Time(prefill, n_bytes / device.link + device.hop)

    def expert_bytes(self, layer: Layer) -> float:
        """Bytes of experts that one token reads."""
        return layer.experts * self._share_used

    @property
    def _share_used(self) -> float:
        return self.layout.shape.n_expert_used / self.layout.shape.n_expert

    def attention(self, home: Rates) -> float:
        """Time of a token's attention in one layer, halfway through the answer; several heads read each row."""
        shape, depth = self.layout.shape, self.use.n_prompt + self.use.n_answer / 2
        computed = 4 * shape.n_head * shape.head_dim / home.attention_token if home.attention_token else 0.0
        return depth * max(self.kv_row / home.read, computed)

    def _token(self, layer: Layer, home: Rates, experts: Rates) -> float:
        dense = max(layer.dense / home.read, 2 * layer.dense_params / home.ops) + self.attention(home)
        params = layer.expert_params * self._share_used
        routed = max(self.expert_bytes(layer) / experts.read, 2 * params / experts.ops)
        return dense + routed + self._crossings(1, home, experts)

    def _crossings(self, n_tokens: int, home: Rates, experts: Rates) -> float:
        """Activations go to the experts and come back."""
        if home is experts:
            return 0.0
        n_bytes = n_tokens * self.layout.shape.n_embd * ACTIVATION_BYTES
        return 2 * (n_bytes / home.link + home.hop)

    def _prefill(self, layer: Layer, home: Rates, experts: Rates) -> float:
        n_full, rest = divmod(self.use.n_prompt, self.n_ubatch)
        times = n_full * self._ubatch(layer, self.n_ubatch, home, experts)
        shape = self.layout.shape
        attended = 2 * shape.n_head * shape.head_dim * float(self.use.n_prompt) ** 2
        attended /= home.attention_prompt or home.ops
        return times + attended + (self._ubatch(layer, rest, home, experts) if rest else 0.0)

    def _ubatch(self, layer: Layer, n_tokens: int, home: Rates, experts: Rates) -> float:
        if layer.is_last:
            return self._matrices(layer.attention, layer.attention_params * n_tokens, n_tokens, home)
        shape = self.layout.shape
        touched = 1 - (1 - self._share_used) ** n_tokens
        dense = self._matrices(layer.dense, layer.dense_params * n_tokens, n_tokens, home)
        n_routed = layer.expert_params / shape.n_expert * shape.n_expert_used * n_tokens
        if experts is self.host and self.stream is not None and self._streams(n_tokens):
            sent = self._matrices(layer.experts, n_routed, n_tokens, experts)
            return dense + sent + self._crossings(n_tokens, home, self.stream)
        routed = self._matrices(layer.experts * touched, n_routed, n_tokens, experts)
        return dense + routed + self._crossings(n_tokens, home, experts)

    def _matrices(self, n_bytes: float, n_products: float, n_tokens: int, where: Rates) -> float:
        """Seconds for so many bytes of matrices and products of a weight and an activation."""
        if where is self.host and self.stream is not None and self._streams(n_tokens):
            return n_bytes / self.stream.link + 2 * n_products / self.stream.ops
        return max(n_bytes / where.read, 2 * n_products / where.ops)

    def _streams(self, n_tokens: int) -> bool:
        return self.stream is not None and n_tokens >= self.stream_from
