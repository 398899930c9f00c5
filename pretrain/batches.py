"""What a step is fed: images, crops and masks, all a function of the recipe, the step and the place in it.

Nothing is remembered between steps. Every draw comes from a generator named by (seed, purpose, step) for the
whole batch of the step, of which each process and each accumulated part takes its share; so a training that
was interrupted, or that runs on another number of processes, sees the same images through the same crops and
masks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.data import Dataset as TorchDataset

from ..bench.data.workers import in_order
from ..bench.errors import ConfigError, DataError
from .crops import CROP_NOISE, Crops, crop_and_resize, draw_crops
from .masking import Masks, Runs, draw_masks, visible_runs
from .patches import draw_offsets
from .pixels import Pixels, guarded_read
from .recipe import Recipe


class Part(NamedTuple):
    """One process's images of one accumulated part of a step.

    Attributes:
        pixels: uint8 (b, 3, S, S), stored images.
        crops: boxes and flips.
        offsets: (b, N, 2) places of patches in their cells, or None where there is no gap.
        masks: what is seen and what is predicted.
        runs: which images see as many patches; on the CPU, so that nobody waits for a device to know.
    """

    pixels: torch.Tensor
    crops: Crops
    offsets: torch.Tensor | None
    masks: Masks
    runs: Runs

    def to(self, device: torch.device) -> Part:
        """The same on a device."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        return Part(
            move(self.pixels),
            Crops(*map(move, self.crops)),
            None if self.offsets is None else move(self.offsets),
            Masks(*map(move, self.masks)),
            self.runs,
        )


class Schedule(NamedTuple):
    """How a step is shared out.

    Attributes:
        images: images of the data set.
        batch: images of a step, over all processes.
        per_epoch: steps of an epoch; the rest of an epoch is left out.
        total: steps of the training.
        parts: accumulated parts of each process's share.
        processes: number of processes.
    """

    images: int
    batch: int
    per_epoch: int
    total: int
    parts: int
    processes: int

    @property
    def part_size(self) -> int:
        """Images of a part."""
        return self.batch // (self.processes * self.parts)


def plan_steps(recipe: Recipe, images: int, processes: int) -> Schedule:
    """How many steps there are and how each is shared out.

    Raises:
        ConfigError: the batch is larger than the data set, or does not divide.
    """
    batch, parts = recipe.optim.batch_size, recipe.engine.accumulate
    if images < 2:
        raise ConfigError(f"the training split holds {images} image; a training needs two at least")
    if batch > images:
        share = processes * parts
        raise ConfigError(
            f"optim.batch_size {batch} is more than the {images} images of the training split; "
            f"--set optim.batch_size={max(share, images // share * share)} at most"
        )
    if batch % (processes * parts):
        raise ConfigError(
            f"optim.batch_size {batch} cannot be shared by {processes} processes x engine.accumulate {parts}"
        )
    per_epoch = images // batch
    total = recipe.optim.steps or max(1, round(recipe.optim.epochs * per_epoch))
    return Schedule(images, batch, per_epoch, total, parts, processes)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator that depends on the seed and the purpose alone."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, images: int) -> torch.Tensor:
    """The order of the images in an epoch."""
    return torch.randperm(images, generator=generator(seed, "order", epoch))


def draw_part(recipe: Recipe, schedule: Schedule, step: int, share: slice, pixels: Pixels) -> Part | str:
    """The images ``share`` of a step; a broken image comes back as its message."""
    epoch, place = divmod(step, schedule.per_epoch)
    order = epoch_order(recipe.seed, epoch, schedule.images)
    index = order[place * schedule.batch : (place + 1) * schedule.batch][share]
    stored = guarded_read(pixels, index.numpy())
    if isinstance(stored, str):
        return stored
    noise = torch.rand(schedule.batch, CROP_NOISE, generator=generator(recipe.seed, "crops", step))
    data = recipe.data
    crops = draw_crops(stored.sizes, data.min_scale, data.aspect, data.flip, noise[share])
    offsets = None
    if recipe.masking.gap:
        offsets = torch.zeros(len(index), recipe.grid**2, 2, dtype=torch.int64)
        if recipe.masking.placement == "stochastic":
            draws = generator(recipe.seed, "offsets", step)
            places = torch.rand(schedule.batch, recipe.grid**2, 2, generator=draws)
            offsets = draw_offsets(places[share], recipe.masking.gap)
    masks = draw_masks(recipe, schedule.batch, share, generator(recipe.seed, "masks", step))
    return Part(stored.pixels, crops, offsets, masks, visible_runs(masks.visible))


def part_bytes(recipe: Recipe, schedule: Schedule, pixels: Pixels) -> int:
    """What a part takes on its way from the process that makes it, at most."""
    # A patch has its place in the cell (16 bytes), is seen (8) or predicted (8, by four groups at most).
    return schedule.part_size * (3 * pixels.size**2 + 64 * recipe.grid**2)


def parts(
    recipe: Recipe,
    schedule: Schedule,
    pixels: Pixels,
    *,
    start: int,
    process: int,
    workers: int,
    pin: bool,
) -> Generator[Part]:
    """The parts of process ``process`` from step ``start`` to the end, ``schedule.parts`` a step. Close it
    where it is not read to its end.

    Raises:
        DataError: an image is broken; the message names the file.
    """
    items = _Parts(recipe, schedule, pixels, start, process)
    with closing(in_order(items, workers, batch_size=None, pin_memory=pin)) as made:
        for part in made:
            if isinstance(part, str):
                raise DataError(part)
            yield part


class _Parts(TorchDataset["Part | str"]):
    def __init__(self, recipe: Recipe, schedule: Schedule, pixels: Pixels, start: int, process: int) -> None:
        self.recipe, self.schedule, self.pixels = recipe, schedule, pixels
        self.start, self.process = start, process

    def __len__(self) -> int:
        return (self.schedule.total - self.start) * self.schedule.parts

    def __getitem__(self, i: int) -> Part | str:
        step, part = divmod(i, self.schedule.parts)
        size = self.schedule.part_size
        first = (self.process * self.schedule.parts + part) * size
        return draw_part(
            self.recipe, self.schedule, self.start + step, slice(first, first + size), self.pixels
        )


def to_images(part: Part, recipe: Recipe) -> torch.Tensor:
    """Normalised crops (b, 3, S, S), float32, of a part on its device."""
    images = crop_and_resize(part.pixels, part.crops, recipe.crop_size)
    mean, std = (_channels(values, images.device) for values in (recipe.data.mean, recipe.data.std))
    return (images - mean) / std


@lru_cache(maxsize=8)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) on a device; kept, since each copy to a GPU waits for it."""
    return torch.tensor(values, device=device).view(3, 1, 1)
