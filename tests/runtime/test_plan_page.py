"""The tables of docs/placement.md are what the planner says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "placement.py"


@pytest.mark.engine
@pytest.mark.data
def test_the_tables_are_true(data: Path) -> None:
    main = runpy.run_path(str(PAGE))["main"]
    assert main([str(data / "a13b"), "--check"]) == 0, "run python docs/placement.py CONFIG"
