"""When a checkpoint was saved, and which checkpoints are of one training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmim_bench.bench.checkpoints.native import save_checkpoint
from lmim_bench.bench.encoders import build_vit, load_encoder, vit_spec
from lmim_bench.bench.types import TrainingPoint

SPEC = vit_spec("mae", patch_size=8, image_size=32, embed_dim=32, depth=1, num_heads=2)


def saved_by_us(path: Path, recipe: dict[str, Any]) -> TrainingPoint | None:
    save_checkpoint(path, SPEC, build_vit(SPEC.arch).state_dict(), recipe)
    return load_encoder(str(path)).info.training


def saved_by_mae(path: Path, epoch: object) -> TrainingPoint | None:
    weights = build_vit(SPEC.arch).state_dict()
    weights["decoder_embed.weight"] = torch.zeros(16, 32)
    weights["decoder_pos_embed"] = torch.zeros(1, 17, 16)
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": weights, "epoch": epoch, "optimizer": {}}, path)
    return load_encoder(f"{path}#heads=2").info.training


def test_one_recipe_on_one_data_set_is_one_training(tmp_path: Path) -> None:
    recipe = {"name": "mae", "seed": 0}
    first = saved_by_us(tmp_path / "a.pth", {"recipe": recipe, "data": "x", "step": 10, "epochs": 1.0})
    later = saved_by_us(tmp_path / "b.pth", {"recipe": recipe, "data": "x", "step": 25, "epochs": 2.5})
    assert first is not None
    assert later is not None
    assert (first.epoch, later.epoch) == (1.0, 2.5)
    assert first.run == later.run
    others = [
        {"recipe": recipe | {"seed": 1}, "data": "x", "step": 10, "epochs": 1.0},
        {"recipe": recipe, "data": "y", "step": 10, "epochs": 1.0},
    ]
    for number, facts in enumerate(others):
        other = saved_by_us(tmp_path / f"{number}.pth", facts)
        assert other is not None
        assert other.run != first.run


def test_a_checkpoint_without_a_recipe_is_of_no_known_training(tmp_path: Path) -> None:
    assert saved_by_us(tmp_path / "a.pth", {}) is None
    assert saved_by_us(tmp_path / "b.pth", {"step": 3}) is None


def test_files_of_one_folder_are_of_one_training(tmp_path: Path) -> None:
    first, later = (saved_by_mae(tmp_path / "run" / f"checkpoint-{n}.pth", n) for n in (399, 799))
    assert first is not None
    assert later is not None
    assert (first.epoch, later.epoch) == (399, 799)
    assert first.run == later.run
    elsewhere = saved_by_mae(tmp_path / "other" / "checkpoint-399.pth", 399)
    assert elsewhere is not None
    assert elsewhere.run != first.run


@pytest.mark.parametrize("epoch", [None, True, "12", float("nan"), float("inf"), [1]])
def test_what_is_no_number_is_no_epoch(tmp_path: Path, epoch: object) -> None:
    assert saved_by_mae(tmp_path / "run" / "checkpoint.pth", epoch) is None
