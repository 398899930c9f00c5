"""Builders of made-up run folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.atomic import write_json
from lmim_bench.bench.results import CheckpointRecord, DataRecord, Environment, Result, RunFile
from lmim_bench.bench.types import CheckpointInfo, EncoderSpec, Score

METRICS = {
    "top1": {"title": "Top-1 accuracy", "unit": "%", "higher_is_better": True},
    "nll": {"title": "Negative log-likelihood", "unit": "", "higher_is_better": False},
}
SPEC = EncoderSpec(family="vit", arch={}, embed_dim=8, depth=2, patch_size=16, image_size=32)
ENVIRONMENT = Environment(
    lmim_bench="0.1.0",
    python="3.12",
    platform="Linux",
    device="cpu",
    precision="fp32",
    packages={"numpy": "2.0"},
)


def build_score(metric: str, value: float, half: float | None = 0.01, **kwargs: Any) -> Score:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Score(**{"metric": metric, "value": value, "low": low, "high": high, "n": 100, **kwargs})


def build_result(
    label: str = "a", task: str = "knn", data: str = "toy", seed: int = 0, **kwargs: Any
) -> Result:
    """A scored cell; with ``error`` a failed one. Keywords replace fields of the result."""
    weights = kwargs.pop("weights", "")
    info = {"format": "timm", "container": "zip", "parameters": 21_665_664, "loaded_tensors": 150}
    info |= {"source": label, "sha256": "f" * 64, "encoder_tensors": 150} | kwargs.pop("info", {})
    failed = "error" in kwargs
    fields: dict[str, Any] = {
        "cell": f"{label}--{task}--{data}--s{seed}",
        "digest": "0",
        "status": "failed" if failed else "ok",
        "checkpoint": CheckpointRecord(
            label=label,
            reference=f"{label}.pth",
            fingerprint=f"{label}{weights}-fingerprint",
            spec=SPEC,
            info=CheckpointInfo(**info),
        ),
        "task": task,
        "task_version": 1,
        "task_title": f"The {task} task",
        "task_origin": "lmim-bench 0.1.0",
        "data": kwargs.pop("record", None)
        or DataRecord(name=data, kind="classification", fingerprint=f"{data}-hash", counts={"val": 100}),
        "seed": seed,
        "protocol": {"k": [1, 20], "temperature": 0.07},
        "headline": "top1@k=20",
        "metrics": METRICS,
        "scores": () if failed else (build_score("top1@k=20", 0.5, chance=0.1), build_score("nll", 1.5)),
        "seconds": {"features": 1.0, "task": 2.0},
        "environment": ENVIRONMENT,
        "finished": "2026-01-01T00:00:00Z",
    }
    return Result(**(fields | kwargs))


def build_png(width: int = 24, height: int = 16, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def build_run(folder: Path, results: Sequence[Result], limited: bool = False, pictures: bool = True) -> Path:
    """A run folder with ``results.json``, and a PNG for every picture that the results name."""
    run = RunFile(command="lmim-bench run --tasks all", limited=limited, results=tuple(results))
    write_json(folder / "results.json", json.loads(run.model_dump_json()))
    files = [f for r in results for a in r.artefacts for f in a.files]
    for seed, file in enumerate(files if pictures else []):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(build_png(seed=seed))
    return folder


@pytest.fixture
def result() -> Callable[..., Result]:
    return build_result


@pytest.fixture
def score() -> Callable[..., Score]:
    return build_score


@pytest.fixture
def png() -> Callable[..., bytes]:
    return build_png


@pytest.fixture
def write_run() -> Callable[..., Path]:
    return build_run
