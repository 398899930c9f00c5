"""Features: how an image becomes an encoder's input, what is kept of it, and where that lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .base import Array, Interpolation, Pooling
from .encoders import EncoderSpec, Tap


@dataclass(frozen=True)
class View:
    """How an image becomes the encoder's input. ``crop``: short side to ``resize``, centre crop of
    ``size``. ``squash``: both sides to ``size``, the aspect ratio is lost.
    """

    mode: Literal["crop", "squash"]
    size: int
    resize: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def pixel_bytes(self) -> int:
        """Bytes of an image's pixels before normalisation."""
        return 3 * self.size**2

    @staticmethod
    def crop(spec: EncoderSpec, size: int | None = None, crop_pct: float | None = None) -> View:
        """The classification view: size and crop ratio are the checkpoint's unless given."""
        size = size or spec.image_size
        # Cut to a whole number, as timm, DINO and MAE do; the share may have been worked out from one.
        resize = max(size, int(size / (crop_pct or spec.crop_pct) + 1e-6))
        return View("crop", size, resize, spec.interpolation, spec.mean, spec.std)

    @staticmethod
    def squash(spec: EncoderSpec, size: int) -> View:
        """The dense view: a square of ``size`` pixels, rounded to a multiple of the patch size."""
        size = max(1, round(size / spec.patch_size)) * spec.patch_size
        return View("squash", size, size, "bilinear", spec.mean, spec.std)


@dataclass(frozen=True)
class Column:
    """One kind of feature kept for every image of a split: ``cls@-1``, ``mean@-4``, ``patches@-1:raw``."""

    kind: Literal["cls", "mean", "patches"]
    tap: Tap = field(default_factory=Tap)

    @property
    def id(self) -> str:
        """The name of the column in a bank and on disk."""
        return f"{self.kind}@{self.tap.layer}" + ("" if self.tap.norm else ":raw")

    def numbers(self, view: View, spec: EncoderSpec) -> int:
        """How many numbers, float32 in a bank, the column has for one image."""
        return spec.embed_dim * ((view.size // spec.patch_size) ** 2 if self.kind == "patches" else 1)


def pooled_columns(pooling: Pooling, tap: Tap) -> tuple[Column, ...]:
    """The columns that a pooling needs, in the order in which they are concatenated."""
    kinds: tuple[Literal["cls", "mean"], ...] = ("cls", "mean") if pooling == "cls+mean" else (pooling,)
    return tuple(Column(kind, tap) for kind in kinds)


@dataclass(frozen=True)
class FeatureRequest:
    """What a task wants from the feature engine: these columns, of these splits, through this view."""

    splits: tuple[str, ...]
    view: View
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class FeatureBank:
    """Features of one split. ``columns`` maps a column id to an array, usually memory-mapped: (N, D) for
    ``cls`` and ``mean``, (N, h, w, D) for ``patches``. ``index`` maps rows to positions in the data split
    (they differ only where broken images were left out).
    """

    columns: Mapping[str, Array]
    ids: Sequence[str]
    labels: Array | None
    index: Array
    fingerprint: str = ""
    images_per_second: float | None = None
    """Speed of the encoder in the pass that made the bank, on the device of that pass."""

    def __len__(self) -> int:
        return len(self.index)

    def column(self, column: Column) -> Array:
        """The array of a column. Raises KeyError where the task did not ask for it."""
        return self.columns[column.id]

    def pooled(self, pooling: Pooling, tap: Tap) -> Array:
        """Global features (N, D), or (N, 2D) for ``cls+mean``."""
        parts = [self.column(column) for column in pooled_columns(pooling, tap)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
