"""The demonstration: train two tiny encoders briefly on the embedded scenes, and compare them."""

from __future__ import annotations

from pathlib import Path

from .cache import cache_folder
from .config import CheckpointConfig, RunConfig
from .engine import resolve_device
from .progress import Reporter


def demo_config(
    out: Path, steps: int, limit: int | None, device: str, cache_dir: Path | None, reporter: Reporter
) -> RunConfig:
    """Train what is not trained yet, and return the run that scores it beside random weights and pixels.

    Args:
        out: run folder; the checkpoints are kept in it.
        steps: optimiser steps of each training.
        limit: at most so many images a split, for a quick look.
        device: auto, cpu, cuda or cuda:N.
        cache_dir: where the embedded data are kept.
        reporter: receives the progress.
    """
    import torch

    from ..pretrain.trainer import Recipe, train
    from .checkpoints import save_checkpoint
    from .data import load_data
    from .vit import build_vit

    where = resolve_device(device)
    scenes = load_data("scenes", cache_dir=cache_folder(cache_dir))
    checkpoints = []
    for label, recipe in {
        "MAE": Recipe(objective="mae", steps=steps),
        "supervised": Recipe(objective="supervised", steps=steps),
    }.items():
        path = out / "checkpoints" / f"{label}.pth"
        if not path.is_file():
            log = train(recipe, scenes, path, where, reporter)
            reporter.line(
                f"{label}: {len(log.losses)} steps in {log.seconds:.0f} s, loss "
                f"{log.losses[0]:.3f} to {log.losses[-1]:.3f}"
            )
        checkpoints.append(CheckpointConfig(label=label, reference=str(path)))
    random = out / "checkpoints" / "random.pth"
    if not random.is_file():
        recipe = Recipe()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            state = build_vit(recipe.spec().arch).state_dict()
        save_checkpoint(random, recipe.spec(), state, {"objective": "none: random weights"})
    checkpoints.append(CheckpointConfig(label="random weights", reference=str(random)))
    checkpoints.append(CheckpointConfig(label="pixels", reference="pixels"))
    return RunConfig(checkpoints=tuple(checkpoints), out=out, limit=limit, device=device, cache_dir=cache_dir)
