"""What all types build on: arrays, immutable configuration, and the names of a few fixed choices."""

from __future__ import annotations

from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Pooling = Literal["cls", "mean", "cls+mean"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]
PosInterpolation = Literal["timm", "bicubic", "dino", "antialias"]
DataKind = Literal["classification", "segmentation", "video"]
Array = NDArray[Any]


class Frozen(BaseModel):
    """Base of all declared configuration: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
