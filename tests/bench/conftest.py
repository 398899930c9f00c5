"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def folder(layouts: ModuleType, tmp_path: Path) -> Callable[[str], Path]:
    """Write a recorded layout; returns its folder."""

    def written(name: str) -> Path:
        layouts.write(name, tmp_path)
        return tmp_path / name

    return written
