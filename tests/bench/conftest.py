"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lmim_bench.bench.checkpoints import save_checkpoint
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
