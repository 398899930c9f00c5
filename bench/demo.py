"""The demonstration: train a tiny MAE and a tiny Latent MIM on the embedded scenes, and compare them."""

from __future__ import annotations

from pathlib import Path

from ..pretrain.api import open_images
from ..pretrain.studies import Row, Scale, row_recipe
from .config import CheckpointConfig, RunConfig
from .progress import Reporter
from .trainings import Trainer, plan_row

_DATA = "scenes"
_SIDE = 64
_SCALE = Scale(
    arch="vit_tiny",
    depth=4,
    batch_size=64,
    learning_rate=1.5e-3,
    epochs=20,
    decoder_depth=2,
    limit=None,
    looks=3,
)
_LOOK = ("watch.knn_train=600", "watch.knn_test=240")
"""Half of the scenes, so that looking takes half of the time."""
_ROWS = (
    Row(label="Latent MIM", recipe="latent-mim"),
    Row(label="MAE", recipe="mae"),
    Row(label="random weights"),
)


def demo_config(
    out: Path,
    steps: int,
    limit: int | None,
    device: str,
    cache_dir: Path | None,
    reporter: Reporter,
    command: str,
) -> RunConfig:
    """Train what is not trained yet, and return the run that compares it with random weights on all tasks.

    Args:
        out: run folder; the trainings are kept in it.
        steps: optimiser steps of each training; the same number gives the same encoders everywhere.
        limit: at most so many images a split, for a quick look.
        device: auto, cpu, cuda or cuda:N.
        cache_dir: where the embedded data are kept.
        reporter: receives the progress.
        command: recorded in the trainings.

    Raises:
        KeyboardInterrupt: a training was told to stop; it is saved.
    """
    data = open_images(_DATA, reporter, cache_dir)
    rows = [
        plan_row(row, row_recipe(row, _SCALE, _SIDE, (f"optim.steps={steps}", *_LOOK), device), data, out)
        for row in _ROWS
    ]
    Trainer(data, _DATA, cache_dir, command).train_all(rows, reporter)
    checkpoints = [
        CheckpointConfig(label=trained.row.label, reference=str(trained.folder / "encoder.pth"))
        for trained in rows
    ]
    return RunConfig(
        checkpoints=tuple(checkpoints),
        out=out,
        limit=limit,
        device=device,
        cache_dir=cache_dir,
        keep_pixels=True,  # the three see the same views
    )
