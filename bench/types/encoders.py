"""Encoders: how one is built and prepared for, what is known of a checkpoint, and what an encoder gives.

Its own tensors are named for type checkers alone: nothing here imports torch at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import Field

from .base import Frozen, Interpolation, Pooling, PosInterpolation

if TYPE_CHECKING:
    import torch

_Positive = Annotated[float, Field(gt=0)]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EncoderSpec(Frozen):
    """How an encoder is built and how its images are prepared. Preprocessing belongs to the checkpoint.

    ``arch`` is what the builder needs (JSON only): ``{"builder": "vit", "embed_dim": 384, ...}`` for a
    plain vision transformer, ``{"builder": "timm", "name": ..., "kwargs": {...}}`` for a named timm model.
    """

    family: str
    arch: dict[str, Any]
    embed_dim: int = Field(ge=1)
    depth: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[_Positive, _Positive, _Positive] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    pooling: Pooling = "cls"
    final_norm: bool = True
    has_cls: bool = True
    """There is a global token: a class token, or what the family's own pooling makes of the tokens."""
    pos_interpolation: PosInterpolation = "timm"
    """How position embeddings are resampled to another grid, as the family's own code does."""


class TrainingPoint(Frozen):
    """When in its training a checkpoint was saved."""

    run: str
    """The same for all checkpoints of one training, and for no other training."""
    epoch: float
    """As the file says: some trainers count the epochs that were finished, others name the last one."""


class CheckpointInfo(Frozen):
    """What is known of a loaded checkpoint: where it came from, what was used, what was dropped."""

    source: str
    sha256: str | None
    format: str
    container: str
    parameters: int
    loaded_tensors: int
    encoder_tensors: int
    dropped: dict[str, str] = {}
    """Keys or key patterns of the file that were not used, each with the reason."""
    notes: tuple[str, ...] = ()
    """Choices and conversions that a reader should know (heads and their source, position tables...)."""
    random_weights: bool = False
    training: TrainingPoint | None = None
    """None where the file does not say at which epoch it was saved."""


@dataclass(frozen=True)
class Tap:
    """A place where features are read: the output of a block, with or without the final norm.

    ``layer`` counts from the end: -1 is the last block.
    """

    layer: int = -1
    norm: bool = True


@dataclass(frozen=True)
class Features:
    """Features of a batch at one tap.

    Attributes:
        cls: class token, (B, D), or None where the encoder has none.
        patches: patch tokens with their spatial axes, (B, h, w, D).
        mean: mean-pooled patches, (B, D), after the family's own norm of the mean where it has one.
    """

    cls: torch.Tensor | None
    patches: torch.Tensor
    mean: torch.Tensor


@runtime_checkable
class Encoder(Protocol):
    """An encoder as the tasks see it: normalised images in, features at the asked taps out."""

    spec: EncoderSpec
    info: CheckpointInfo
    fingerprint: str
    """Hash of the weights as loaded and of the spec; the feature cache is keyed by it."""

    def to(self, device: str | torch.device) -> Encoder:
        """Move to a device; returns self."""

    def __call__(
        self,
        images: torch.Tensor,
        taps: Sequence[Tap] = (Tap(),),
        pos_interpolation: PosInterpolation | None = None,
    ) -> dict[Tap, Features]:
        """Encode images (B, 3, H, W), H and W multiples of the patch size, in one forward pass.

        ``pos_interpolation`` names how position embeddings are resampled to another grid than the
        checkpoint's own: ``timm`` and ``antialias`` are bicubic with antialias, ``bicubic`` is without,
        ``dino`` is bicubic by scale factor with the 0.1 offset, no antialias. None means the spec's.
        """
