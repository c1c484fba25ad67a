"""What to say where nothing fits: how much is missing, and the nearest things that would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from hymoe.console import format_bytes
from hymoe.errors import PlacementError
from hymoe.runtime import plan
from hymoe.runtime.layout import Layout
from hymoe.runtime.machine import Machine
from hymoe.runtime.plan import LEAST_CTX, Compute
from hymoe.runtime.planned import Wish

# Types that a user may convert the experts to, the most exact first.
SMALLER_TYPES: Final = (
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_S",
)
STEP: Final = 64 << 20  # bytes; as fine as the missing amount is said


def shortage(layout: Layout, machine: Machine, wish: Wish, compute: Compute) -> PlacementError:
    """Make the error for a model that no plan fits."""
    memories = [f"{format_bytes(machine.ram_usable)} of RAM"]
    memories += [f"{format_bytes(device.free)} on {device.name}" for device in machine.devices]
    n_ctx = plan.contexts(layout, wish)[-1]
    wish = replace(wish, n_ctx=n_ctx)
    missing = _missing(layout, machine, wish, compute)
    ways = [f"with {format_bytes(missing)} more RAM", *_ways(layout, machine, wish, compute)]
    return PlacementError(
        f"{layout.name} with a context of {n_ctx} tokens does not fit",
        got=f"{' and '.join(memories)} free",
        expected=f"{format_bytes(missing)} more",
        fix=f"it would fit {', or '.join(ways)}",
    )


def _missing(layout: Layout, machine: Machine, wish: Wish, compute: Compute) -> int:
    """Find the bytes of RAM that would be enough, in addition."""
    low, high = 0, 1
    while not _fits(layout, machine, wish, compute, more=high * STEP):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(layout, machine, wish, compute, more=middle * STEP):
            high = middle
        else:
            low = middle
    return high * STEP


def _ways(layout: Layout, machine: Machine, wish: Wish, compute: Compute) -> Iterator[str]:
    assert wish.n_ctx is not None
    n_ctx = wish.n_ctx // 2
    while n_ctx >= LEAST_CTX:
        if _fits(layout, machine, replace(wish, n_ctx=n_ctx), compute):
            yield f"with a context of {n_ctx}"
            break
        n_ctx //= 2
    if wish.flash is False:  # which a coarser cache takes
        coarser: tuple[str, ...] = ()
    elif wish.kv_type is not None:
        coarser = layout.kv_types()[layout.kv_types().index(wish.kv_type) + 1 :]
    else:
        coarser = layout.kv_types()[-1:] if len(layout.kv_types()) > 1 else ()
    for kv_type in coarser:
        if _fits(layout, machine, replace(wish, kv_type=kv_type), compute):
            yield f"with a {kv_type} cache"
            break
    for name in SMALLER_TYPES:
        smaller = layout.with_experts(name)
        if smaller.n_bytes < layout.n_bytes and _fits(smaller, machine, wish, compute):
            yield f"with experts as {name} ({format_bytes(smaller.n_bytes)} in all)"
            break


def _fits(layout: Layout, machine: Machine, wish: Wish, compute: Compute, *, more: int = 0) -> bool:
    return plan.fits(layout, replace(machine, ram_usable=machine.ram_usable + more), wish, compute)
