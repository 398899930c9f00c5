"""One training loop for every objective: AdamW, warm-up and cosine, random resized crops and flips.

The images are decoded once into memory, which suits the small sets that this loop is for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from PIL.Image import Resampling
from pydantic import Field

from ..bench.checkpoints import save_checkpoint
from ..bench.progress import Reporter
from ..bench.types import Array, Dataset, EncoderSpec, Frozen, ImageSplit
from ..bench.vit import build_vit, vit_spec
from .objectives import MaskedAutoencoder, Supervised


class Recipe(Frozen):
    """What is trained, and for how long."""

    objective: Literal["supervised", "mae"] = Field("mae", description="what the encoder is trained for")
    image_size: int = Field(64, description="side of the training images, pixels")
    patch_size: int = Field(8, description="side of a patch, pixels")
    embed_dim: int = Field(128, description="width of the encoder")
    depth: int = Field(4, description="blocks of the encoder")
    num_heads: int = Field(4, description="attention heads")
    steps: int = Field(300, ge=1, description="optimiser steps; the schedule spans them")
    batch_size: int = Field(64, ge=2, description="images a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak, for the batch as given")
    weight_decay: float = Field(0.05, ge=0, description="of the weight matrices")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the schedule")
    min_scale: float = Field(0.3, gt=0, le=1, description="smallest area of a random crop")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that MAE hides")
    seed: int = Field(0, description="of the initial weights, the order and the crops")

    def spec(self) -> EncoderSpec:
        """The encoder that the recipe trains."""
        return vit_spec(
            "lmim-bench",
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            image_size=self.image_size,
            pooling="mean",
        )


@dataclass(frozen=True)
class TrainingLog:
    """What a training left behind: the loss of each step, and how long it took."""

    losses: tuple[float, ...]
    seconds: float


def train(recipe: Recipe, data: Dataset, out: Path, device: str, reporter: Reporter) -> TrainingLog:
    """Train an encoder on the training split of a classification set and save it as a checkpoint.

    Args:
        recipe: what is trained, and for how long.
        data: classification data set; MAE ignores its labels.
        out: the checkpoint file, written at the end.
        device: where to train.
        reporter: receives the progress.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_vit(recipe.spec().arch)
        model = (
            Supervised(encoder, len(data.classes))
            if recipe.objective == "supervised"
            else MaskedAutoencoder(encoder, mask_ratio=recipe.mask_ratio)
        ).to(device)
    pixels, labels = load_pixels(data.splits[data.train_split], round(recipe.image_size * 1.15))
    mean = torch.tensor(recipe.spec().mean).view(1, 3, 1, 1)
    std = torch.tensor(recipe.spec().std).view(1, 3, 1, 1)
    optimizer = _optimizer(model, recipe)
    losses: list[float] = []
    started = time.monotonic()
    batches = islice(_batches(len(pixels), recipe.batch_size, generator), recipe.steps)
    with reporter.progress(recipe.steps, f"training {recipe.objective} on {data.name}") as bar:
        for index in batches:
            _set_rate(optimizer, recipe, len(losses) / recipe.steps)
            batch = augment(pixels[index.numpy()], recipe.image_size, recipe.min_scale, generator)
            images = ((batch.float() / 255 - mean) / std).to(device)
            loss = model(images, labels[index].to(device), generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of step {len(losses)} is {loss.item()}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.advance()
    seconds = time.monotonic() - started
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_checkpoint(out, recipe.spec(), state, {**recipe.model_dump(mode="json"), "data": data.name})
    return TrainingLog(tuple(losses), seconds)


def load_pixels(split: ImageSplit, size: int) -> tuple[Array, torch.Tensor]:
    """All images of a split as uint8 (N, size, size, 3), short side resized and centre cropped, and the
    labels (N,), zeros where there are none.
    """
    pixels = np.empty((len(split), size, size, 3), dtype=np.uint8)
    for i in range(len(split)):
        image = split.image(i)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels[i] = np.asarray(image.crop((left, top, left + size, top + size)))
    labels = np.zeros(len(split), dtype=np.int64) if split.labels is None else split.labels
    return pixels, torch.as_tensor(labels, dtype=torch.int64)


def augment(images: Array, size: int, min_scale: float, generator: torch.Generator) -> torch.Tensor:
    """Random resized crops (aspect 3/4 to 4/3) and horizontal flips of uint8 images (B, S, S, 3), as
    uint8 (B, 3, size, size).
    """
    side = images.shape[1]
    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    draws = torch.rand(len(images), 5, generator=generator)
    for i, (area, aspect, top, left, flip) in enumerate(draws.tolist()):
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        scale = side * side * (min_scale + area * (1 - min_scale))
        height = min(side, max(1, round(math.sqrt(scale / ratio))))
        width = min(side, max(1, round(math.sqrt(scale * ratio))))
        y, x = int(top * (side - height + 1)), int(left * (side - width + 1))
        method = cv2.INTER_AREA if min(height, width) > size else cv2.INTER_CUBIC
        crop = cv2.resize(images[i, y : y + height, x : x + width], (size, size), interpolation=method)
        out[i] = crop[:, ::-1] if flip < 0.5 else crop
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    batch_size = min(batch_size, n)
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Linear warm-up, then half a cosine to zero; ``done`` is the share of the training that is over."""
    if done < recipe.warmup:
        factor = done / recipe.warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup)))
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * max(factor, 1e-3)
