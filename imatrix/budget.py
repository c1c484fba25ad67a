"""What a machine's two memories leave for a model's weights.

On the card: attention, shared experts, norms, routers and output of all layers, their keys and values, what the
engine computes in, and whole layers of experts. In RAM: the other experts, the embeddings, the server. The margins are
those of hy-plan, which must find a placement for the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from hymoe import sizes
from hymoe.errors import UnsupportedError
from hymoe.sizes import DESKTOP_VRAM, MIB, SYSTEM_RAM, parse_size

# Compute buffers for prompts in ubatches of 2048, to which experts are sent from RAM.
COMPUTE_BYTES: Final = 2304 * MIB
# The server beside its model, and its buffers.
SERVER_BYTES: Final = 1024 * MIB

# Types of keys and values, the exact one first.
KV_TYPES: Final = ("F16", "Q8_0")
KV_BLOCK: Final = 32
FIT: Final = re.compile(r"([^+]+)\+([^+]+)")


class Budget(NamedTuple):
    """Bytes for weights on the card and in RAM, and what was taken off the card: keys and values of `kv_type`."""

    card: int
    ram: int
    kv_bytes: int
    kv_type: str


def parse_fit(text: str) -> tuple[int, int]:
    """Read "24G+64G": bytes of the card and of RAM. Raises ValueError."""
    found = FIT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no pair of memories: give card+RAM, such as 24G+64G")
    return parse_size(found[1]), parse_size(found[2])


def budget(fit: tuple[int, int], n_ctx: int, kv_type: str, hparams: Mapping[str, int]) -> Budget:
    """Take off what is not for weights. What is left may be negative."""
    card, ram = fit
    free = max(0, card - DESKTOP_VRAM)
    kv = kv_bytes(hparams, n_ctx, kv_type)
    for_card = free - sizes.margin(free, sizes.DEVICE_MARGIN) - COMPUTE_BYTES - kv
    usable = max(0, ram - SYSTEM_RAM)
    for_ram = usable - sizes.margin(usable, sizes.RAM_MARGIN) - SERVER_BYTES
    return Budget(for_card, for_ram, kv, kv_type)


def kv_types(hparams: Mapping[str, int]) -> tuple[str, ...]:
    """Give the types that the model's keys can have: heads that are no multiple of 32 take F16 only."""
    return KV_TYPES if hparams["attention.key_length"] % KV_BLOCK == 0 else KV_TYPES[:1]


def kv_bytes(hparams: Mapping[str, int], n_ctx: int, kv_type: str) -> int:
    """Bytes of all layers' keys and values. Raises UnsupportedError for a file that lacks a key."""
    try:
        n_layer = -(-hparams["block_count"] // hparams.get("attention.shared_kv_factor", 1))
        n_embd_kv = hparams["attention.head_count_kv"] * hparams["attention.key_length"]
    except KeyError as exc:
        raise UnsupportedError("the model", got=f"no {exc.args[0]}", expected="a HunYuan model") from exc
    return n_layer * sizes.kv_bytes(n_embd_kv, n_ctx, kv_type)
