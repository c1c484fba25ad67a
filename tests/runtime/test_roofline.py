"""Which rates are counted with: measured on the model, on the machine, or from data sheets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hymoe.runtime.bandwidth import Pace
from hymoe.runtime.machine import Device, Machine
from hymoe.runtime.roofline import OPS_PER_CORE, PRODUCTS, READ_SHARE, Source, device_rates, host_rates
from hymoe.runtime.tune import Tuned

ON_PAPER = Machine.paper(vram=[24 << 30], ram=64 << 30)
HERE = replace(ON_PAPER, is_paper=False, stored=Pace(20e9, 400e9), repacked=Pace(30e9, 200e9))
TUNED = Tuned(repack=True, threads=2, threads_batch=2, ubatch=512, flash=True)
CARD = HERE.devices[0]


def test_data_sheets_where_nothing_was_measured() -> None:
    for tuned in (None, TUNED):
        rates = host_rates(ON_PAPER, tuned)
        assert rates.source is Source.SHEETS
        assert rates.read == READ_SHARE["host"] * ON_PAPER.bandwidth
        assert rates.ops == OPS_PER_CORE * ON_PAPER.n_core
    assert device_rates(CARD, ON_PAPER).source is Source.SHEETS


@pytest.mark.parametrize(("busy", "source"), [(False, Source.MACHINE), (True, Source.BUSY)])
def test_the_machines_own(busy: bool, source: Source) -> None:
    """Of products alone; the engine does other things too."""
    machine = replace(HERE, was_busy=busy)
    rates = host_rates(machine, TUNED)  # tuned before there were paces
    assert (rates.read, rates.ops, rates.source) == (PRODUCTS * 20e9, PRODUCTS * 400e9, source)
    card = replace(CARD, pace=Pace(500e9, 3e13), bandwidth=None)
    rates = device_rates(card, machine)
    assert (rates.read, rates.ops, rates.link, rates.source) == (PRODUCTS * 500e9, PRODUCTS * 3e13, CARD.link, source)


def test_weights_of_which_some_are_repacked() -> None:
    """Half of the weights at one pace and half at the other take the mean of both times."""
    rates = host_rates(HERE, repacked=0.5)
    assert PRODUCTS / rates.read == pytest.approx((1 / 20e9 + 1 / 30e9) / 2)
    assert PRODUCTS / rates.ops == pytest.approx((1 / 400e9 + 1 / 200e9) / 2)
    assert host_rates(HERE, repacked=1.0).read == pytest.approx(PRODUCTS * 30e9)
    assert host_rates(replace(HERE, repacked=None), repacked=1.0).read == pytest.approx(PRODUCTS * 20e9)


def test_the_models_own_come_first() -> None:
    stored, repacked = Pace(18e9, 300e9), Pace(25e9, 250e9)
    tuned = replace(TUNED, stored=stored, repacked=repacked)
    for share, pace in ((0.0, stored), (0.8, repacked)):
        rates = host_rates(HERE, tuned, repacked=share)
        assert (rates.read, rates.ops, rates.source) == (pace.read, pace.ops, Source.MODEL)


def test_an_integrated_gpu_reads_as_the_processor_does() -> None:
    igpu = Device("Vulkan0", "", "igpu", 1 << 30, 1 << 30, None, None)
    assert device_rates(igpu, ON_PAPER).read == READ_SHARE["igpu"] * ON_PAPER.bandwidth
