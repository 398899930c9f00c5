"""Where and how the encoder runs: device, precision, batches that fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .config import Precision
from .errors import ConfigError, NotFiniteError, TaskError
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
        self.batch_size = batch_size or _BATCH[self.kind]
        self._most: dict[tuple[int, int], int] = {}
        if precision == "fp32" and self.kind == "cuda":
            _convolve_in_fp32()

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.split(":")[0]

    def batch_for(self, height: int, width: int) -> int:
        """Images a batch at this size: the batch at 224 x 224, scaled by the area."""
        return max(1, round(self.batch_size * _REFERENCE_AREA / (height * width)))

    def encode(
        self, images: torch.Tensor, taps: Sequence[Tap], pos_interpolation: PosInterpolation | None = None
    ) -> dict[Tap, Features]:
        """Features of normalised images (B, 3, H, W) at all taps, fp32, on the engine's device.

        Raises:
            NotFiniteError: features that are not finite.
        """
        return self.launch(images, taps, pos_interpolation).checked()

    def launch(
        self, images: torch.Tensor, taps: Sequence[Tap], pos_interpolation: PosInterpolation | None = None
    ) -> Launched:
        """Start to encode; on a GPU this does not wait for the features.

        A batch that does not fit on the GPU is halved until it does, and so are later ones of its size.
        """
        import torch

        images = images.to(self.device, non_blocking=True)
        height, width = images.shape[-2:]
        parts: list[dict[Tap, Features]] = []
        while len(images):
            count = min(len(images), self._most.get((height, width), len(images)))
            found = self._forward(images[:count], taps, pos_interpolation)
            if found is None:
                if count == 1:
                    raise TaskError(
                        f"an image of {height} x {width} does not fit on {self.device}; take a smaller size, "
                        "or --device cpu"
                    )
                torch.cuda.empty_cache()
                self._most[height, width] = count // 2
                continue
            parts.append(found)
            images = images[count:]
        features = {tap: _join([_float(part[tap]) for part in parts]) for tap in parts[0]}
        finite = {tap: torch.isfinite(f.patches.sum()) for tap, f in features.items()}
        return Launched(features, finite, self.precision)

    def _forward(
        self, images: torch.Tensor, taps: Sequence[Tap], pos_interpolation: PosInterpolation | None
    ) -> dict[Tap, Features] | None:
        """Features, or None where the GPU has no room: its memory is free again once this has returned."""
        import torch

        dtype = torch_dtype(self.precision)
        try:
            with torch.inference_mode(), torch.autocast(self.kind, dtype, enabled=dtype != torch.float32):
                return dict(self.encoder(images, taps, pos_interpolation))
        except torch.cuda.OutOfMemoryError:
            return None

    def moment(self) -> Moment:
        """Now, in the order of what the device was given to do."""
        return Moment(self.kind == "cuda")


@dataclass(frozen=True)
class Launched:
    """Features that a device may still be computing."""

    features: Mapping[Tap, Features]
    finite: Mapping[Tap, torch.Tensor]
    """Whether the sum of the patch features of a tap is finite."""
    precision: Precision

    def asked(self) -> Launched:
        """The same, with what ``checked`` looks at on its way to the CPU: once it is there (``Moment.wait``),
        looking waits for nothing that the device was given to do since.
        """
        finite = {tap: flag.to("cpu", non_blocking=True) for tap, flag in self.finite.items()}
        return replace(self, finite=finite)

    def checked(self) -> dict[Tap, Features]:
        """The features. Raises NotFiniteError where they are not finite."""
        import torch

        for tap, finite in self.finite.items():
            if not bool(finite) and not bool(torch.isfinite(self.features[tap].patches).all()):
                raise NotFiniteError(
                    f"the encoder's features at layer {tap.layer} are not finite in {self.precision}; "
                    "try --precision fp32"
                )
        return dict(self.features)


class Moment:
    """A point in a device's work: on a GPU an event, which is over when all that was asked before is done."""

    def __init__(self, on_gpu: bool) -> None:
        import torch

        event: Any = torch.cuda.Event
        self._event = event(enable_timing=True) if on_gpu else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Time of the device's work between the two, both of which are over."""
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time - earlier._time


def torch_dtype(precision: Precision) -> torch.dtype:
    """What autocast computes in."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _convolve_in_fp32() -> None:
    """cuDNN rounds the inputs of fp32 convolutions to 10 bits (TF32) unless told not to."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newer way to say it, which older versions lack
        torch.backends.cudnn.allow_tf32 = False


def _float(f: Features) -> Features:
    return Features(None if f.cls is None else f.cls.float(), f.patches.float(), f.mean.float())


def _join(parts: list[Features]) -> Features:
    import torch

    if len(parts) == 1:
        return parts[0]
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
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        index = int(number or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"there is no device {name!r}: {torch.cuda.device_count()} GPUs found; use --device auto"
            )
        return f"cuda:{index}"
    return name
