"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy.py`` beside this file: a Context over arrays (test folders are no packages)."""
    path = Path(__file__).with_name("toy.py")
    spec = importlib.util.spec_from_file_location("lmim_bench_test_toy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
