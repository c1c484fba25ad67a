"""Fixtures every room's tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hymoe import console
from hymoe.convert import miniature
from hymoe.convert.convert import ConvertOptions, convert

TIERS = ("long", "stock", "oracle")


def pytest_configure() -> None:
    """Give children the usual signals: a job in the background, or under nohup, would hand on that it ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default tier leaves out what needs minutes or peers; skip, visibly, what needs the real vocabulary."""
    left_out = [tier for tier in TIERS if tier not in config.option.markexpr]
    chosen = [item for item in items if not any(item.get_closest_marker(tier) for tier in left_out)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if data_folder() is None:
        skip = pytest.mark.skip(reason="HYMOE_TEST_DATA names no folder with the real vocabulary and configs")
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _usual_verbosity() -> None:
    """A command that was run with -q leaves the process quiet."""
    console.set_verbosity()


def data_folder() -> Path | None:
    """The folder of real input, or None."""
    folder = os.environ.get("HYMOE_TEST_DATA")
    return Path(folder) if folder and (Path(folder) / "a13b" / "hy.tiktoken").is_file() else None


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real input; tests that use it carry the marker `data`."""
    folder = data_folder()
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded miniature's checkpoint; read only."""
    return miniature.write(tmp_path_factory.mktemp("checkpoint") / "HunYuan-Miniature")


@pytest.fixture(scope="session")
def mini_gguf(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded miniature as BF16 GGUF; read only."""
    out = tmp_path_factory.mktemp("gguf") / "miniature.gguf"
    convert(ConvertOptions(mini, out))
    return out
