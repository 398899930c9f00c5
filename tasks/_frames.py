"""Frames of videos through the encoder, decoded ahead of it, also over the borders of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..bench.errors import DataError
from ..bench.types import Context, Features, VideoSequence

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A sequence, what its first mask says, and the size at which its frames are encoded."""

    sequence: VideoSequence
    first: Pixels
    objects: tuple[int, ...]
    size: tuple[int, int]

    def check(self, i: int, array: Pixels, what: str) -> None:
        """Raise DataError where a frame's picture or mask has another size than the first mask."""
        if array.shape[:2] != self.first.shape:
            found, expected = (f"{shape[0]} x {shape[1]}" for shape in (array.shape, self.first.shape))
            raise DataError(
                f"the {what} of frame {self.sequence.frame_ids[i]} of {self.sequence.name} is {found}, but "
                f"the first mask is {expected}; one sequence has one size"
            )


def embed(
    ctx: Context,
    clips: Sequence[Clip],
    pool: ThreadPoolExecutor,
    resize: Callable[[Pixels, tuple[int, int]], Pixels],
    std: tuple[float, float, float],
    encode: Callable[[torch.Tensor], Features],
) -> Iterator[torch.Tensor]:
    """Patch features (h, w, D) of each frame of each sequence, one after the other.

    Args:
        ctx: where the device is, the batch size, and the mean colour.
        clips: the sequences.
        pool: decodes and resizes.
        resize: a frame (H, W, 3) to the size at which it is encoded.
        std: the deviation that colours are divided by.
        encode: features of normalised images.

    Raises:
        DataError: a frame of another size than the first of its sequence.
    """
    import torch

    from ..bench.data.views import standardise

    for batch in _batches(ctx.batch_size, clips, pool, resize):
        frames = [frame.result() for frame in batch]
        shape = len(frames), *frames[0].shape
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=ctx.device.startswith("cuda"))
        np.stack(frames, out=pixels.numpy())
        pixels = pixels.to(ctx.device, non_blocking=True).permute(0, 3, 1, 2)
        yield from encode(standardise(pixels, ctx.spec.mean, std)).patches


def _batches(
    batch_size: int,
    clips: Sequence[Clip],
    pool: ThreadPoolExecutor,
    resize: Callable[[Pixels, tuple[int, int]], Pixels],
) -> Iterator[list[Future[Pixels]]]:
    """The frames as they enter the encoder, each batch of one sequence.

    One batch ahead is being decoded, be it of the next sequence.
    """

    def load(clip: Clip, i: int) -> Pixels:
        frame = clip.sequence.frame(i)
        clip.check(i, frame, "picture")
        return resize(frame, clip.size)

    ahead: list[Future[Pixels]] = []
    for clip in clips:
        # The run's batch size is meant for images of 224 x 224.
        step = max(1, batch_size * 224 * 224 // (clip.size[0] * clip.size[1]))
        for start in range(0, len(clip.sequence), step):
            stop = min(start + step, len(clip.sequence))
            batch = [pool.submit(load, clip, i) for i in range(start, stop)]
            if ahead:
                yield ahead
            ahead = batch
    yield ahead
