"""How much arithmetic an image takes: counted by torch's own counter on tensors without content."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from .masking import draw_masks
from .model import MaskedImageModel
from .recipe import Recipe

_BATCH = 4


def training_flops(recipe: Recipe) -> float:
    """FLOPs of matrix products an image in one training step: forward and backward of the online side,
    forward of the target, as the model does them (no credit for recomputed activations). Where the number of
    visible patches is drawn (I-JEPA), it is that of one draw for a few images.
    """
    plain = recipe.model_copy(
        update={"engine": recipe.engine.model_copy(update={"activation_checkpointing": False})}
    )
    masks = draw_masks(plain, _BATCH, slice(0, _BATCH), torch.Generator().manual_seed(0))
    with torch.device("meta"):
        model = MaskedImageModel(plain).to("meta")
        side = recipe.crop_size
        images = torch.empty(_BATCH, 3, side, side)
        offsets = torch.empty(_BATCH, recipe.grid**2, 2, dtype=torch.int64) if recipe.masking.gap else None
        empty = type(masks)(*(torch.empty_like(m, device="meta") for m in masks))
        with FlopCounterMode(display=False) as counter:
            model(images, offsets, empty, 0.0).loss.backward()
    return float(counter.get_total_flops()) / _BATCH
