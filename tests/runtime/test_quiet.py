"""Whether others had the processors while something was measured: on machines made of a file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hymoe.runtime import quiet

N_CPU = 4
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's counters of a machine with four processors, on which a second has passed at every look."""
    monkeypatch.setattr(os, "cpu_count", lambda: N_CPU)
    seconds = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("cpu  100 0 50 90000 80 1 2 0 60 0\ncpu0 1 2 3\n")
    return tmp_path / "proc" / "stat"


# user, nice, system, idle, iowait, irq, softirq, steal, guest (of user), guest_nice
@pytest.mark.parametrize(
    ("field", "busy"),
    [(0, True), (1, True), (2, True), (3, False), (4, False), (5, True), (6, True), (7, True), (8, False), (9, False)],
)
def test_what_is_work(stat: Path, field: int, busy: bool) -> None:
    watch = quiet.Watch(stat.parents[1])
    words = stat.read_text().splitlines()[0].split()
    words[1 + field] = str(int(words[1 + field]) + TICKS)  # a quarter of the processors
    stat.write_text(" ".join(words))
    assert watch.busy() is busy


def test_a_little_is_nothing(stat: Path) -> None:
    watch = quiet.Watch(stat.parents[1])
    stat.write_text(stat.read_text().replace("cpu  100 ", f"cpu  {100 + TICKS // 4} "))
    assert not watch.busy()


def test_own_work_is_not_others(stat: Path) -> None:
    watch = quiet.Watch(stat.parents[1])
    before = sum(os.times()[:4])
    while sum(os.times()[:4]) - before < 0.6:  # more than SHARE of what four processors have in a second
        sum(range(10000))
    used = round(TICKS * (sum(os.times()[:4]) - before))
    stat.write_text(stat.read_text().replace("cpu  100 ", f"cpu  {100 + used} "))
    assert not watch.busy()


def test_without_counters_the_load_before_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: N_CPU)
    for load, busy in ((0.3, False), (0.5, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert quiet.is_quiet() is not busy
        assert quiet.Watch(tmp_path).busy() is busy


def test_a_system_that_knows_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    assert not quiet.is_quiet()
