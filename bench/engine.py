"""Where and how the encoder runs: device, precision, batches that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config import Precision
from .errors import ConfigError, TaskError
from .types import Encoder, Features, PosInterpolation, Tap

if TYPE_CHECKING:
    import torch

_REFERENCE_AREA = 224 * 224
_BATCH = {"cpu": 32, "cuda": 256}


class Engine:
    """One encoder on one device, in inference mode; features come back in fp32."""

    def __init__(self, encoder: Encoder, device: str, precision: Precision, batch_size: int | None) -> None:
        self.encoder = encoder.to(device)
        self.device = device
        self.precision = precision
        self.batch_size = batch_size or _BATCH[device.split(":")[0]]

    def batch_for(self, height: int, width: int) -> int:
        """Images a batch at this size: the batch at 224 x 224, scaled by the area."""
        return max(1, round(self.batch_size * _REFERENCE_AREA / (height * width)))

    def encode(
        self, images: torch.Tensor, taps: Sequence[Tap], pos_interpolation: PosInterpolation | None = None
    ) -> dict[Tap, Features]:
        """Features of normalised images (B, 3, H, W) at all taps, fp32, on the engine's device.

        A batch that does not fit on the GPU is halved until it does.

        Raises:
            TaskError: features that are not finite.
        """
        import torch

        images = images.to(self.device, non_blocking=True)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        kind = self.device.split(":")[0]
        try:
            with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                found = self.encoder(images, taps, pos_interpolation)
        except torch.cuda.OutOfMemoryError:
            if len(images) == 1:
                raise
            torch.cuda.empty_cache()
            halves = [self.encode(half, taps, pos_interpolation) for half in images.chunk(2)]
            return {tap: _join([half[tap] for half in halves]) for tap in halves[0]}
        features = {tap: _float(f) for tap, f in found.items()}
        for tap, f in features.items():
            if not bool(torch.isfinite(f.patches.sum())) and not bool(torch.isfinite(f.patches).all()):
                raise TaskError(
                    f"the encoder's features at layer {tap.layer} are not finite in {self.precision}; "
                    "try --precision fp32"
                )
        return features


def _float(f: Features) -> Features:
    return Features(None if f.cls is None else f.cls.float(), f.patches.float(), f.mean.float())


def _join(parts: list[Features]) -> Features:
    import torch

    classes = [part.cls for part in parts if part.cls is not None]
    return Features(
        torch.cat(classes) if classes else None,
        torch.cat([part.patches for part in parts]),
        torch.cat([part.mean for part in parts]),
    )


def resolve_device(name: str) -> str:
    """``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: the named GPU is not there.
    """
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"there is no device {name!r}: {torch.cuda.device_count()} GPUs found; use --device auto"
            )
        return f"cuda:{index}"
    return name
