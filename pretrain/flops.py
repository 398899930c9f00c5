"""How much arithmetic an image takes: counted by torch's own counter on tensors without content."""

from __future__ import annotations

from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode

from .masking import GROUP, Masks, draw_masks
from .model import MaskedImageModel
from .recipe import Recipe

_BATCH = 4
_DRAWS = 50
"""Steps whose numbers of patches are averaged over."""


def training_flops(recipe: Recipe) -> float:
    """FLOPs of matrix products an image in one training step: forward and backward of the online side,
    forward of the target, as the model does them (no credit for recomputed activations). Where the numbers of
    patches are drawn (I-JEPA), they are the means of some draws, each for as many images as see the same
    number.
    """
    plain = recipe.model_copy(
        update={"engine": recipe.engine.model_copy(update={"activation_checkpointing": False})}
    )
    group, draws = min(GROUP, recipe.optim.batch_size), torch.Generator().manual_seed(0)
    drawn = [draw_masks(plain, group, slice(0, 1), draws) for _ in range(_DRAWS)]
    seen, asked = (round(fmean(mask.shape[-1] for mask in masks)) for masks in zip(*drawn, strict=True))
    with torch.device("meta"):
        model = MaskedImageModel(plain).to("meta")
        side = recipe.crop_size
        images = torch.empty(_BATCH, 3, side, side)
        offsets = torch.empty(_BATCH, recipe.grid**2, 2, dtype=torch.int64) if recipe.masking.gap else None
        masks = Masks(
            torch.empty(_BATCH, seen, dtype=torch.int64),
            torch.empty(_BATCH, drawn[0].hidden.shape[1], asked, dtype=torch.int64),
        )
        with FlopCounterMode(display=False) as counter:
            model(images, offsets, masks, 0.0).loss.backward()
    return float(counter.get_total_flops()) / _BATCH
