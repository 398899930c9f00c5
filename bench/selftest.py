"""The self test of a checkpoint: every task, small, on embedded scenes, beside random weights.

It answers whether a checkpoint loads, encodes and is scored by every task, and whether it is told apart from
an untrained network of the same architecture. Sizes are cut so that a ViT-B takes less than a minute on one
CPU thread; the numbers are those of no benchmark.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reports.model import make_report
from ..reports.verdicts import Verdict, comparisons
from .api import run
from .config import CheckpointConfig, RunConfig, validate
from .data.embedded import Sizes, generate
from .encoders import load_encoder
from .errors import CheckpointError, LmimBenchError
from .progress import Reporter
from .results import RunFile
from .types import Encoder, Tap

CONTROL = "random weights"

_SIDE = 96
# Whole sequences are exchanged in the test of videos: with fewer than eight it could never come out clear.
_SIZES = Sizes(train_per_class=6, val_per_class=5, segmentation=(1, 24), sequences=8)
_FRAMES = 6
_LIMIT = 100  # more than there are: it marks the results and the report as no full run


@dataclass(frozen=True)
class SelfTest:
    """What a self test found."""

    run: RunFile
    verdicts: tuple[Verdict, ...]
    """The headline of each task against random weights; none where there is no such row."""
    notes: tuple[str, ...]
    """Why nothing is compared, or how the test differs from the usual one."""
    seconds: float

    @property
    def failed(self) -> int:
        """How many cells have no score."""
        return sum(result.status == "failed" for result in self.run.results)


def self_test(
    checkpoint: CheckpointConfig,
    out: Path,
    working: Path,
    reporter: Reporter,
    command: str,
    debug: bool = False,
) -> SelfTest:
    """Score a checkpoint on all tasks on the CPU, beside random weights of its architecture, and compare.

    Args:
        checkpoint: what is tested.
        out: run folder.
        working: where the pictures and features go, which are not needed afterwards.
        reporter: where progress goes.
        command: recorded in the result file.
        debug: let an unexpected error of a task through, with its traceback.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    started = time.perf_counter()
    encoder = load_encoder(checkpoint.reference)
    side, notes = _side(encoder)
    rows = [checkpoint]
    if encoder.info.random_weights:
        notes.append(f"{checkpoint.label} has random weights itself, so there is nothing to compare it with")
    else:
        control = CheckpointConfig(label=CONTROL, reference=f"random:{checkpoint.reference}")
        try:
            load_encoder(control.reference)
            rows.append(control)
        except CheckpointError as error:
            notes.append(f"no row of random weights: {error}")
    del encoder
    config = validate(
        RunConfig,
        {
            "checkpoints": rows,
            "tasks": tuple(_protocol(side)),
            "data": _draw(working / "data"),
            "overrides": _protocol(side),
            "limit": _LIMIT,
            "device": "cpu",
            "out": out,
            "cache_dir": working / "cache",
        },
        "",
    )
    finished = run(config=config, reporter=reporter, command=command, debug=debug)
    verdicts = compared(finished, checkpoint.label, out)
    return SelfTest(finished, verdicts, tuple(notes), time.perf_counter() - started)


def _draw(folder: Path) -> list[str]:
    """Draw the pictures, and return the data sets made of them."""
    generate(folder, _SIZES)
    for frame in (folder / "scenes-video").rglob("*.png"):
        if int(frame.stem) >= _FRAMES:
            frame.unlink()
    return [str(folder / name) for name in ("scenes", "scenes-seg", "scenes-video")]


def _side(encoder: Encoder) -> tuple[int, list[str]]:
    """The side of all images: about 96 pixels, or the checkpoint's own where it takes no other."""
    import torch

    spec = encoder.spec
    side = max(1, round(_SIDE / spec.patch_size)) * spec.patch_size
    try:
        with torch.inference_mode():
            encoder(torch.zeros(1, 3, side, side), (Tap(),))
    except LmimBenchError as error:
        return spec.image_size, [f"images of {spec.image_size} pixels, which takes longer: {error}"]
    return side, []


def _protocol(side: int) -> dict[str, dict[str, Any]]:
    """The protocol fields that make each task small; all others are the defaults."""
    return {
        "knn": {"size": side, "k": [1, 5]},
        "linear": {"size": side, "c": [1e-3, 1e-2, 1e-1, 1.0]},
        "few_shot": {"size": side, "shots": [1, 5], "draws": 5, "classifiers": ["ncm"], "episodes": 100},
        "unsup_seg": {"size": side, "over_clusters": [50], "seeds": 2, "nredo": 2},
        "vos": {"size": side, "size_rule": "patch-ceil"},
    }


def compared(finished: RunFile, label: str, out: Path) -> tuple[Verdict, ...]:
    """The paired comparison of each headline with random weights; p values hold for all tasks together."""
    report = make_report([(finished, out)])
    if CONTROL not in {checkpoint.label for checkpoint in report.checkpoints}:
        return ()
    # The folder may hold earlier self tests.
    mine = [found for found in comparisons(report, CONTROL) if found.challenger.label == label]
    return tuple(verdict for found in mine for verdict in found.verdicts)


def is_above(verdict: Verdict) -> bool:
    """Whether the checkpoint is better than random weights by more than noise explains."""
    return verdict.clear and verdict.better is verdict.challenger
