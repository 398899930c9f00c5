"""The self test of a checkpoint: every task, small, on embedded scenes, beside random weights.

It answers whether a checkpoint loads, encodes and is scored by every task, and whether it is told apart from
an untrained network of the same architecture. Sizes are cut so that a ViT-B takes less than a minute on one
CPU thread; the numbers are those of no benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .api import run
from .comparison import Difference, compare, holm, sentence
from .config import CheckpointConfig, RunConfig, validate
from .context import generator
from .data.embedded import Sizes, generate
from .encoders import load_encoder
from .errors import CheckpointError, LmimBenchError
from .progress import Reporter
from .results import Result, RunFile
from .types import Encoder, Metric, Tap

CONTROL = "random weights"

_SIDE = 96
# Whole sequences are exchanged in the test of videos: with fewer than eight it could never come out clear.
_SIZES = Sizes(train_per_class=6, val_per_class=6, segmentation=(1, 24), sequences=8)
_FRAMES = 8
_LIMIT = 100  # more than there are: it marks the results and the report as no full run
_LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """A task's headline against random weights. ``above``: better, by more than chance explains."""

    task: str
    above: bool
    text: str


@dataclass(frozen=True)
class SelfTest:
    """What a self test found."""

    run: RunFile
    verdicts: tuple[Verdict, ...]
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
    verdicts = tuple(_verdicts(finished, checkpoint.label, out)) if len(rows) > 1 else ()
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


def _verdicts(finished: RunFile, label: str, out: Path) -> Iterator[Verdict]:
    """The paired comparison of each headline, with p values corrected for there being several tasks."""
    scored = {(r.checkpoint.label, r.task, r.data.name): r for r in finished.results if r.status == "ok"}
    compared = [
        (result, _difference(scored[CONTROL, task, data], result, out))
        for (name, task, data), result in scored.items()
        if name == label and (CONTROL, task, data) in scored
    ]
    corrected = iter(holm([found.p for _, found in compared if found.p is not None]))
    for result, found in compared:
        p = None if found.p is None else next(corrected)
        metric = Metric(id=result.headline, **result.metrics[result.headline.split("@")[0]])
        gain = found.value if metric.higher_is_better else -found.value
        text = sentence(CONTROL, label, found, p, metric.unit, metric.higher_is_better)
        yield Verdict(result.task, p is not None and p < _LEVEL and gain > 0, text)


def _difference(control: Result, result: Result, out: Path) -> Difference:
    before, clusters = _items(control, out)
    after, _ = _items(result, out)
    score = result.score(result.headline)
    assert score is not None
    # One row a draw of the training images, one column a test image: both are samples.
    crossed = after.ndim == 2 and after.shape[1] == score.n
    rng = generator(result.seed, result.task, "selftest", result.headline)
    return compare(before, after, rng, clusters=clusters, crossed=crossed)


def _items(result: Result, out: Path) -> tuple[Any, Any]:
    """The per-item numbers of the headline whose mean is its value, and their clusters or None."""
    with np.load(out / "items" / f"{result.cell}.npz") as arrays:
        name = result.headline
        items = arrays[f"{name}/terms" if f"{name}/terms" in arrays else name]
        clusters = arrays.get(f"{name}/clusters")
    return items, clusters
