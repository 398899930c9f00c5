"""Fixtures for the whole suite."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

COUNTS = pytest.StashKey[dict[str, int]]()
MARKS = ("slow", "gpu", "realdata", "browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count the marked tests, for the summary."""
    config.stash[COUNTS] = {mark: sum(1 for i in items if i.get_closest_marker(mark)) for mark in MARKS}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many of the collected tests carry a mark."""
    counts = config.stash.get(COUNTS, {})
    marked = ", ".join(f"{mark} {n}" for mark, n in counts.items())
    terminalreporter.write_line(f"marked among the collected tests: {marked}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the suite caches out of the user's folder, unless ``LMIM_BENCH_CACHE`` names another."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("LMIM_BENCH_CACHE"):
            patch.setenv("LMIM_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy.py``: a Context over arrays."""
    return _module("toy.py")


@pytest.fixture(scope="session")
def layouts() -> ModuleType:
    """The module ``checkpoints/layouts.py``: checkpoints as their trainers write them."""
    return _module("checkpoints/layouts.py")


@pytest.fixture(scope="session")
def pretended() -> ModuleType:
    """The module ``pretended_gpu.py``: a GPU where there is none."""
    return _module("pretended_gpu.py")


def _module(path: str) -> ModuleType:
    """A module beside this file (test folders are no packages)."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(f"lmim_bench_test_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_sets() -> tuple[str, ...]:
    """The changes that make a recipe train in milliseconds: a small model on 32 pixels, 16 images a step."""
    return (
        *("model.embed_dim=24", "model.depth=2", "model.num_heads=2", "model.patch_size=8"),
        *("data.image_size=32", "decoder.width=16", "decoder.depth=1", "decoder.num_heads=2"),
        *("projector.hidden_dim=32", "optim.batch_size=16"),
    )


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of noise that differ in colour, 24 images each and split."""
    root = tmp_path_factory.mktemp("images") / "colours"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, name in enumerate(("red", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for j in range(24):
                pixels = rng.integers(0, 100, (40, 48, 3))
                pixels[..., 2 * i] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return root
