"""Compute buffers by formula: what the engine's graphs need besides weights and cache, before anything is measured.

A graph's buffer is as large as its hungriest moment; which that is depends on sizes and settings. Fitted to what the
engine reports (`buffers.measure`) for the shapes of Hunyuan-A13B and Hunyuan-Large with flash attention: within 4 % of
it on a device, up to a third above it in RAM. A placement is searched for with these and then measured (`settle`).
"""

from __future__ import annotations

from typing import Final

from hymoe.runtime.layout import Layout

F32, F16 = 4, 2
# Rows of n_embd that attention holds at a time: queries, keys and values before and after rope and norm, the result
# and the residual.
ATTENTION_ROWS: Final = 13


def on_device(layout: Layout, n_ctx: int, n_ubatch: int, kv_type: str, *, flash: bool, sent: bool) -> int:
    """Bytes on a device. sent: experts in RAM are sent there, one stack at a time."""
    moments = [_experts(layout, n_ubatch), _attention(layout, n_ctx, n_ubatch, kv_type, flash=flash)]
    if sent:
        moments.append(_sent(layout, n_ubatch))
    return _mask(n_ctx, n_ubatch, flash=flash) + max(moments)


def on_host(layout: Layout, n_ctx: int, n_ubatch: int, *, flash: bool, has_layers: bool, has_experts: bool) -> int:
    """Bytes in RAM. has_layers, has_experts: the processor computes whole layers, or experts of a device's layers."""
    row = F32 * n_ubatch * layout.shape.n_embd
    inputs = _mask(n_ctx, n_ubatch, flash=flash) + 2 * row
    if has_layers:
        # the processor reads a coarser cache as it is
        return inputs + max(_experts(layout, n_ubatch), _attention(layout, n_ctx, n_ubatch, "f16", flash=flash))
    return inputs + (_experts(layout, n_ubatch) + row if has_experts else 0)


def _mask(n_ctx: int, n_ubatch: int, *, flash: bool) -> int:
    """Which token may see which, [n_ubatch, n_ctx]; flash attention has it in half precision."""
    return (F16 if flash else F32) * n_ctx * n_ubatch


def _experts(layout: Layout, n_ubatch: int) -> int:
    """Gate, up and down of all experts that the tokens use, and the residual."""
    shape = layout.shape
    return F32 * n_ubatch * ((2 * layout.n_ff_exp + shape.n_embd) * shape.n_expert_used + shape.n_embd)


def _sent(layout: Layout, n_ubatch: int) -> int:
    """The largest stack of experts, with what goes into it, what comes out of it, and what waits."""
    shape = layout.shape
    largest = max(layer.largest for layer in layout.layers)
    return largest + F32 * n_ubatch * ((layout.n_ff_exp + shape.n_embd) * shape.n_expert_used + 3 * shape.n_embd)


def _attention(layout: Layout, n_ctx: int, n_ubatch: int, kv_type: str, *, flash: bool) -> int:
    """Rows of the tokens; and of the cache a copy in F16 where it is coarser, or without flash attention all scores."""
    rows = F32 * n_ubatch * ATTENTION_ROWS * layout.shape.n_embd
    if not flash:
        return rows + F32 * n_ubatch * n_ctx * layout.shape.n_head
    return rows + (0 if kv_type == "f16" else 2 * F16 * n_ctx * layout.n_embd_kv)
