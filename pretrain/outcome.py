"""What a training is, and what it leaves behind.

runs/lmim/
  recipe.json       the recipe as resolved, the data set, the command
  encoder.pth       the encoder as of the last save: what ``run --ckpt`` takes
  encoders/         an encoder a save (``watch.keep_encoders``)
  states/           the last states of the training, to go on from
  metrics.jsonl     losses, rates, similarities, speed; k-NN and the collapse monitor
  tensorboard/      the same for TensorBoard
  summary.json      what it came to
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import Field

from ..bench.atomic import read_json, write_json
from ..bench.errors import ConfigError, DataError
from ..bench.types import Frozen
from .recipe import Recipe


class Training(Frozen):
    """``recipe.json``: what a training folder is the training of."""

    recipe: Recipe
    data: str = Field(description="the reference of the data set")
    fingerprint: str = Field(description="identity of its content")
    command: str = ""


@dataclass(frozen=True)
class Summary:
    """What a training came to; ``summary.json`` holds the same.

    Attributes:
        finished: False where it was told to stop.
        step, steps: optimiser steps done and planned.
        loss: mean loss since the line of the log before the last, or None where nothing was left to do.
        images_per_second: over this sitting, evaluations and saves left out; None, as the next three are,
            where every step had been done before it.
        waiting: share of that time in which the device waited for data.
        flops_per_second: of matrix products, all processes.
        utilisation: the same as a share of the devices' peak (bf16, dense), where that is known.
        seconds: wall time of all sittings; one that was killed wrote no summary, and is not counted.
        health: the collapse monitor's last measures.
        knn: last online k-NN accuracy, a fraction, or None without labels.
        warnings: what the collapse monitor says.
    """

    finished: bool
    step: int
    steps: int
    loss: float | None
    images_per_second: float | None
    waiting: float | None
    flops_per_second: float | None
    utilisation: float | None
    seconds: float
    health: dict[str, float] | None
    knn: float | None
    warnings: tuple[str, ...]


def start_training(training: Training, out: Path) -> None:
    """Claim a folder for a training. One that ended before it began (a wrong setting) holds nothing to lose.

    Raises:
        ConfigError: the folder already holds one.
    """
    if any((out / name).exists() for name in ("metrics.jsonl", "states", "encoder.pth", "summary.json")):
        raise ConfigError(
            f"{out} already holds a training; --resume {out} goes on with it, or give another --out"
        )
    write_json(out / "recipe.json", training.model_dump(mode="json"))


def read_summary(out: Path) -> Summary | None:
    """What the last sitting of a folder's training wrote, or None where none came to its end.

    Raises:
        DataError: the file is damaged.
    """
    path = out / "summary.json"
    if not path.is_file():
        return None
    try:
        payload = json.loads(path.read_bytes())
        known = {one.name: payload[one.name] for one in fields(Summary)}
        return Summary(**{**known, "warnings": tuple(known["warnings"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; delete it, and --resume writes it anew at its end") from error


def read_training(out: Path) -> Training:
    """The training of a folder. Raises ConfigError where there is none."""
    if not (out / "recipe.json").is_file():
        raise ConfigError(
            f"{out} holds no training (no recipe.json); start one with --recipe and --out {out}"
        )
    return read_json(out / "recipe.json", Training)
