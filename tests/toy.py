"""A toy Context: tasks run on arrays, with no encoder, no data set on disk and no runner."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmim_bench.bench.types import (
    Array,
    Column,
    Dataset,
    EncoderSpec,
    FeatureBank,
    Measurement,
    Tap,
    TaskSpec,
)


def toy_spec(**changes: Any) -> EncoderSpec:
    """A small vision transformer that is never built."""
    values: dict[str, Any] = {
        "family": "toy",
        "arch": {},
        "embed_dim": 16,
        "depth": 6,
        "patch_size": 16,
        "image_size": 32,
    }
    return EncoderSpec(**(values | changes))


@dataclass
class ToySplit:
    """Plain coloured images; the colour follows the position."""

    ids: Sequence[str]
    labels: Array | None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Array:
        return np.full((30, 40, 3), (i % 256, 80, 120), dtype=np.uint8)

    def mask(self, i: int) -> Array:
        raise NotImplementedError

    def subset(self, index: Array) -> ToySplit:
        labels = None if self.labels is None else self.labels[index]
        return ToySplit([self.ids[i] for i in index], labels)


class _Bar:
    done = 0

    def advance(self, n: int = 1) -> None:
        self.done += n


@dataclass
class ToyContext:
    """Holds banks made of arrays, and records what a task asked for and kept."""

    spec: EncoderSpec
    data: Dataset
    banks: dict[str, FeatureBank]
    seed: int = 0
    reference: str = "toy"
    device: str = "cpu"
    batch_size: int = 8
    limited: bool = False
    asked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: dict[str, list[Array]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    similarities: dict[str, Array] = field(default_factory=dict)
    saved: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, tuple[Array, list[str]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    steps: int = 0

    def bank(self, split: str) -> FeatureBank:
        self.asked.append(split)
        return self.banks[split]

    def encode(self, images: Any, tap: Tap, pos_interpolation: Any = None) -> Any:
        raise AssertionError("a task on cached features must not encode")

    def rng(self, *purpose: str | int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(purpose).encode())])

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[_Bar]:
        bar = _Bar()
        yield bar
        assert bar.done == total, f"{label}: {bar.done} of {total} steps were reported"
        self.steps += total

    def note(self, text: str) -> None:
        self.notes.append(text)

    def save_image(
        self,
        name: str,
        images: Sequence[Array],
        title: str,
        caption: str = "",
        downscale: int = 320,
        sequence: bool = False,
        similarity: Array | None = None,
    ) -> None:
        if similarity is not None:
            height, width = similarity.shape[1:3]
            assert similarity.shape == (len(images) // 2, height, width, height, width)
            self.similarities[name] = similarity
        for image in images:
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
        assert name not in self.images
        self.images[name] = list(images)
        self.titles[name] = title

    def save_data(self, name: str, kind: str, title: str, data: dict[str, Any], caption: str = "") -> None:
        assert name not in self.saved
        self.saved[name] = data
        self.titles[name] = title

    def save_features(
        self, name: str, features: Array, ids: Sequence[str], title: str, caption: str = ""
    ) -> None:
        assert name not in self.kept
        assert len(features) == len(ids)
        self.kept[name] = (np.asarray(features), list(ids))

    def save_file(self, relative: str, content: bytes) -> None:
        self.files[relative] = content

    def run(self, task: TaskSpec, **options: Any) -> dict[str, Measurement]:
        """Run a task with these options; checks what the runner relies on; measurements by id."""
        config = task.config(**options)
        for request in task.features(config, self.spec, self.data):
            for split in request.splits:
                missing = {column.id for column in request.columns} - set(self.banks[split].columns)
                assert not missing, f"the toy bank of {split} lacks {missing}"
        found = {m.metric: m for m in task.run(self, config)}
        assert task.headline(config) in found
        for metric in found:
            task.metric(metric)
        return found


def value(measurement: Measurement) -> float:
    """The value of a measurement, by the rule of ``Measurement.items``."""
    items = np.asarray(measurement.items, dtype=np.float64)
    draws = items if measurement.crossed else items[None]
    means = [draw.reshape(len(draw), -1).mean(axis=0) for draw in draws]
    return float(np.mean([measurement.statistic(mean[None])[0] for mean in means]))


def toy_context(
    train: tuple[Array, Array | None],
    test: tuple[Array, Array | None],
    *,
    n_classes: int | None = None,
    spec: EncoderSpec | None = None,
    seed: int = 0,
    columns: dict[str, tuple[Array, Array]] | None = None,
) -> ToyContext:
    """A Context over (features (N, D), labels) of two splits.

    Args:
        columns: other arrays for some column ids, as (train, test); every other global column at every
            block, with and without norm, holds the given features.
    """
    spec = spec or toy_spec()
    splits: dict[str, ToySplit] = {}
    banks: dict[str, FeatureBank] = {}
    highest = 0
    for position, (name, (features, labels)) in enumerate((("train", train), ("val", test))):
        ids = [f"{name}/{i:04d}.png" for i in range(len(features))]
        held: dict[str, Array] = {}
        for kind in ("cls", "mean") if spec.has_cls else ("mean",):
            for layer in range(-spec.depth, 0):
                for norm in (True, False):
                    held[Column(kind, Tap(layer, norm)).id] = features  # type: ignore[arg-type]
        held |= {key: arrays[position] for key, arrays in (columns or {}).items()}
        splits[name] = ToySplit(ids, labels)
        banks[name] = FeatureBank(held, ids, labels, np.arange(len(features)))
        if labels is not None and len(labels):
            highest = max(highest, int(labels.max()) + 1)
    count = highest if n_classes is None else n_classes
    data = Dataset(
        "toy", "classification", "toy", classes=tuple(f"class {c}" for c in range(count)), splits=splits
    )
    return ToyContext(spec, data, banks, seed)


def blobs(
    n_per_class: int, n_classes: int, dim: int = 16, spread: float = 1.0, seed: int = 0, centres: int = 0
) -> tuple[Array, Array]:
    """Gaussian classes in shuffled order; ``centres`` seeds the class means, shared between splits."""
    means = np.random.default_rng(centres).standard_normal((n_classes, dim)) * 2
    rng = np.random.default_rng([seed, 1])
    labels = rng.permutation(np.repeat(np.arange(n_classes), n_per_class))
    features = means[labels] + spread * rng.standard_normal((len(labels), dim))
    return features.astype(np.float32), labels
