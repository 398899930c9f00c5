"""What the tasks on global features share: which feature is read, and how a labelled split is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from ..bench.errors import TaskError
from ..bench.types import (
    Array,
    Context,
    Dataset,
    EncoderSpec,
    FeatureBank,
    Frozen,
    Pooling,
    Tap,
    View,
    pooled_columns,
)

_CHECK_ROWS = 65_536
Name = TypeVar("Name")


def once(names: tuple[Name, ...]) -> tuple[Name, ...]:
    """Names in their order, a repeated one only once: the check of fields that list what is computed."""
    return tuple(dict.fromkeys(names))


class BlockConfig(Frozen):
    """Protocol fields of every task that reads features of whole images."""

    layer: int = Field(-1, le=-1, description="Block that is read, counted from the end: -1 is the last.")
    final_norm: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Final norm on the block's output; auto: as the checkpoint does.",
    )
    size: int | None = Field(
        None, gt=0, description="Side of the centre crop in pixels; none: the checkpoint's own."
    )
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="Crop side over resized short side; none: the checkpoint's own."
    )

    def tap(self, spec: EncoderSpec) -> Tap:
        """Where features are read. Raises TaskError where the encoder has no such block."""
        if -self.layer > spec.depth:
            raise TaskError(
                f"layer {self.layer} is not in this encoder of {spec.depth} blocks; use {-spec.depth} to -1"
            )
        return Tap(self.layer, spec.final_norm if self.final_norm == "auto" else self.final_norm == "on")

    def view(self, spec: EncoderSpec) -> View:
        """The classification view. Raises TaskError where the patch size does not divide the crop."""
        view = View.crop(spec, self.size, self.crop_pct)
        if view.size % spec.patch_size:
            below = max(1, view.size // spec.patch_size) * spec.patch_size
            raise TaskError(
                f"size {view.size} is not a multiple of the patch size {spec.patch_size}; use size={below}"
            )
        return view


class PooledConfig(BlockConfig):
    """``BlockConfig`` with one pooled feature an image."""

    pooling: Literal["auto", "cls", "mean", "cls+mean"] = Field(
        "auto", description="Class token, mean of the patch tokens, or both; auto: as the checkpoint does."
    )

    def pooled(self, spec: EncoderSpec) -> Pooling:
        """The pooling in use. Raises TaskError where it needs a class token that the encoder lacks."""
        pooling = spec.pooling if self.pooling == "auto" else self.pooling
        if "cls" in pooling and not spec.has_cls:
            raise TaskError(f"pooling {pooling!r} needs a class token and this encoder has none; use mean")
        return pooling


def pooled_width(pooling: Pooling, spec: EncoderSpec) -> int:
    """Numbers in a global feature."""
    return spec.embed_dim * len(pooled_columns(pooling, Tap()))


def labelled(ctx: Context, split: str) -> tuple[FeatureBank, Array]:
    """The bank of a split and its class indices, int64 (N,).

    Raises:
        TaskError: the split is empty, has no labels, or a label names no class of the data set.
    """
    bank = ctx.bank(split)
    where = f"the {split} split of {ctx.data.name}"
    if len(bank) == 0:
        raise TaskError(f"{where} holds no image")
    if bank.labels is None:
        raise TaskError(f"{where} has no class labels; give a classification data set")
    labels = np.asarray(bank.labels, dtype=np.int64)
    known = len(ctx.data.classes)
    if labels.min() < 0 or (known and labels.max() >= known):
        raise TaskError(f"{where} has labels outside its {known} classes (0 to {known - 1})")
    return bank, labels


def require_known_classes(data: Dataset) -> None:
    """Raise TaskError where no class of the test split is one of train: no answer could be right."""
    splits = (data.splits.get(name) for name in (data.train_split, data.test_split))
    train, test = (split.labels if split else None for split in splits)
    if train is None or test is None or np.isin(test, train).any():
        return
    names = class_names(data, train, test)
    raise TaskError(
        f"train of {data.name} has no class of its test split ({names[train.min()]!r} ... against "
        f"{names[test.min()]!r} ...): novel classes are scored by episodes alone, "
        "--tasks few_shot --set 'few_shot.shots=[]'"
    )


def require_two_classes(ctx: Context, labels: Array, what: str) -> None:
    """Raise TaskError where train shows a single class: every answer would be right."""
    if len(np.unique(labels)) < 2:
        raise TaskError(f"{what} needs two classes; train of {ctx.data.name} shows one")


def class_names(data: Dataset, *labels: Array) -> list[str]:
    """Names by class index; plain numbers where the data set names none."""
    if data.classes:
        return list(data.classes)
    return [str(c) for c in range(1 + max(int(part.max()) for part in labels))]


def require_finite(rows: Array, ids: Sequence[str], what: str = "features") -> None:
    """Raise TaskError naming the first image whose numbers (N, D) hold NaN or infinity."""
    for start in range(0, len(rows), _CHECK_ROWS):
        good = np.isfinite(rows[start : start + _CHECK_ROWS]).all(axis=1)
        if not good.all():
            broken = ids[start + int(np.argmin(good))]
            raise TaskError(f"the {what} of {broken} hold NaN or infinity; try --precision fp32")


@dataclass(frozen=True)
class PooledRows:
    """Global features of a bank, (N, D): ``rows[index]`` reads these rows of its (mapped) columns."""

    columns: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Array | slice) -> Array:
        parts = [column[index] for column in self.columns]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def mean(self) -> Array:
        """Mean over all rows, float32 (D,), in blocks."""
        starts = range(0, len(self), _CHECK_ROWS)
        total = sum(self[start : start + _CHECK_ROWS].sum(axis=0, dtype=np.float64) for start in starts)
        return np.asarray(total / len(self), dtype=np.float32)


def stored_rows(bank: FeatureBank, pooling: Pooling, tap: Tap) -> PooledRows:
    """Checked global features, (N, D), that are read where they are indexed."""
    columns = tuple(bank.column(column) for column in pooled_columns(pooling, tap))
    for column in columns:
        require_finite(column, bank.ids)
    return PooledRows(columns)


def pooled_rows(bank: FeatureBank, pooling: Pooling, tap: Tap) -> Array:
    """Checked global features, (N, D); memory-mapped where the bank is and one column is enough."""
    columns = stored_rows(bank, pooling, tap).columns
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def majority_share(labels: Array, known: Array, top: int = 1) -> float:
    """Share of the ``top`` most common of the classes ``known``: what the best constant guess among them
    reaches (1/C if all are known and balanced).
    """
    counts = np.sort(np.bincount(labels, minlength=int(known.max()) + 1)[known])[::-1]
    return float(counts[:top].sum() / len(labels))


def mean_class_items(hits: Array, labels: Array) -> Array:
    """Per-item numbers (N,) whose mean is the mean per-class recall, and whose spread is that of it.

    The mean over classes of a per-class mean is a ratio statistic. Item i of class c is its first-order
    (influence) term ``value + (hit_i - recall_c) * N / (C n_c)``: the sum within a class of the second
    part is nought, so the mean is exact, and resampling items gives the interval of the ratio without an
    (N, 2C) table. Few items of a class lie too close to a mean of their own, by (n_c - 1) / n_c in variance,
    which is made up for; classes of one item are taken together. Single terms may lie outside 0..1. Classes
    without a test item do not count.
    """
    counts = np.bincount(labels)
    present = counts > 0
    value = per_class(hits, labels)[present].mean()
    weight = len(labels) / (present.sum() * counts[labels])
    stratum = np.where(counts[labels] > 1, labels, len(counts))
    size, mean = np.bincount(stratum)[stratum], per_class(hits, stratum)[stratum]
    weight = weight * np.sqrt(size / np.maximum(size - 1, 1))
    return np.asarray(value + (hits - mean) * weight, dtype=np.float64)


def per_class(hits: Array, labels: Array, n_classes: int = 0) -> Array:
    """Share of hits in each class, (C,); NaN for a class without items."""
    counts = np.bincount(labels, minlength=n_classes)
    right = np.bincount(labels, weights=hits, minlength=n_classes)
    share: Array = np.full(len(counts), np.nan)
    np.divide(right, counts, out=share, where=counts > 0)
    return share


def save_per_class(ctx: Context, hits: Array, labels: Array, names: list[str], what: str) -> None:
    """Keep per-class accuracy as bars; classes without a test image are left out."""
    share = per_class(hits, labels, len(names))
    kept = np.flatnonzero(~np.isnan(share))
    data = {
        "labels": [names[c] for c in kept],
        "values": [round(float(share[c]), 5) for c in kept],
        "y_label": "accuracy",
        "unit": "%",
    }
    ctx.save_data("per-class", "bars", f"Accuracy by class, {what}", data)
