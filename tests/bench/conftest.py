"""Fixtures for the tests of checkpoints and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.results import RunFile
from lmim_bench.bench.vit import build_vit, vit_spec


@pytest.fixture
def folder(layouts: ModuleType, tmp_path: Path) -> Callable[[str], Path]:
    """Write a recorded layout; returns its folder."""

    def written(name: str) -> Path:
        layouts.write(name, tmp_path)
        return tmp_path / name

    return written


@pytest.fixture
def save_vit() -> Callable[..., str]:
    """Save a small ViT with every parameter random as a native checkpoint; returns its path."""

    def saved(path: Path, **variant: Any) -> str:
        shape = {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 8, "image_size": 32}
        spec = vit_spec("lmim-bench", **{**shape, **variant})
        model = build_vit(spec.arch)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_checkpoint(path, spec, model.state_dict())
        return str(path)

    return saved


@pytest.fixture
def save_tiny() -> Callable[..., Path]:
    """Save the smallest ViT that all tasks can use as a native checkpoint; returns its path."""

    def saved(path: Path, seed: int = 1) -> Path:
        spec = vit_spec("lmim-bench", embed_dim=24, depth=4, num_heads=2, patch_size=8, image_size=32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = build_vit(spec.arch).state_dict()
        save_checkpoint(path, spec, state)
        return path

    return saved


@pytest.fixture
def checkpoint(save_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of random weights."""
    return save_tiny(tmp_path / "one.pth")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three classes that differ in colour, 12 images to train and 8 to test each."""
    rng = np.random.default_rng(0)
    colours = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    for split, n in (("train", 12), ("val", 8)):
        for name, colour in colours.items():
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                cast = np.array(colour) + rng.normal(0, 70, 3)  # some pictures are taken for another class
                pixels = np.clip(cast + rng.normal(0, 40, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return tmp_path / "colours"


@pytest.fixture
def options(tmp_path: Path, images: Path) -> dict[str, Any]:
    """The options of a run of k-NN on ``images`` that keeps to the test's own folder."""
    return {
        "data": [str(images)],
        "tasks": ["knn"],
        "out": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "device": "cpu",
    }


@pytest.fixture
def values() -> Callable[[RunFile], dict[tuple[str, str], tuple[Any, ...]]]:
    """Every score of a run with its interval, by cell and metric."""

    def found(finished: RunFile) -> dict[tuple[str, str], tuple[Any, ...]]:
        return {(r.cell, s.metric): (s.value, s.low, s.high) for r in finished.results for s in r.scores}

    return found
