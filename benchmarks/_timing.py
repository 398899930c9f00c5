"""Our training step, and blocks of steps of several sides in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lmim_bench.pretrain.engine import make_fabric
from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.model import Fed
from lmim_bench.pretrain.patches import draw_offsets
from lmim_bench.pretrain.recipe import Recipe
from lmim_bench.pretrain.step import Stepper

_DONE = 0.01
"""Share of the schedule at which our steps are taken: in the warm-up of the rate, so losses stay finite."""


class Side(Protocol):
    label: str

    def block(self, steps: int) -> None:
        """Some training steps."""


class Ours:
    """The trainer's own step on images that are already cropped and on the device.

    Masks and offsets are drawn in the step: the trainer leaves that to worker processes beside a GPU, but the
    official code draws them in its own step too.
    """

    def __init__(self, recipe: Recipe, images: torch.Tensor) -> None:
        self.recipe, self.images = recipe, images
        fabric = make_fabric(recipe.engine)
        fabric.launch()
        self.stepper = Stepper(recipe, fabric)
        self.label = f"ours, {'compiled' if self.stepper.compiled else 'not compiled'}"
        self.generator = torch.Generator().manual_seed(0)

    def block(self, steps: int) -> None:
        for _ in range(steps):
            self.stepper(_DONE, [self._fed()])

    def _fed(self) -> Fed:
        recipe, batch = self.recipe, len(self.images)
        offsets = None
        if recipe.masking.gap:
            places = torch.rand(batch, recipe.grid**2, 2, generator=self.generator)
            offsets = self._upload(draw_offsets(places, recipe.masking.gap))
        masks = draw_masks(recipe, batch, slice(0, batch), self.generator)
        return Fed(self.images, offsets, Masks(*map(self._upload, masks)))

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        """To the device as the trainer does it: from pinned memory, without waiting."""
        device = self.images.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Speed:
    """One side of a comparison.

    Attributes:
        label: whose code it is.
        images_per_second: over the blocks; ``every`` holds each of them, in order.
        memory: most bytes allocated beyond those before the side was made, up to the end of its first block
            (where a pass that is replayed later is recorded: replaying allocates nothing); None on the CPU.
    """

    label: str
    images_per_second: Spread
    every: list[float]
    memory: int | None


def time_sides(
    builders: Mapping[str, Callable[[], Side]],
    images: torch.Tensor,
    steps: int,
    repeats: int,
    look: Callable[[str, Side], None] | None = None,
) -> dict[str, Speed]:
    """Blocks of steps of each side in turn, after a block each that is not counted; at the end ``look`` gets
    each side.
    """
    device = images.device
    sides: dict[str, Side] = {}
    peaks: dict[str, int | None] = {}
    for name, build in builders.items():
        before = _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        sides[name] = build()
        _seconds(sides[name], steps, device)
        peaks[name] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(len(images) * steps / _seconds(side, steps, device))
    if look is not None:
        for name, side in sides.items():
            look(name, side)
    return {
        name: Speed(side.label, Spread.of(rates[name]), rates[name], peaks[name])
        for name, side in sides.items()
    }


def ratios(speeds: Mapping[str, Speed]) -> dict[str, Spread]:
    """Ours over each other side, each block over the block beside it."""
    ours = speeds["ours"].every
    return {
        name: Spread.of([a / b for a, b in zip(ours, speed.every, strict=True)])
        for name, speed in speeds.items()
        if name != "ours"
    }


def release(device: torch.device) -> None:
    """Give memory and compiled code back, so that one recipe does not lean on the other."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _seconds(side: Side, steps: int, device: torch.device) -> float:
    """How long a block of steps takes, to the end of its work on the device."""
    _wait(device)
    begun = time.perf_counter()
    side.block(steps)
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0
