"""Images with hidden patches, as a trained model sees them and fills them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..bench.data.views import normalise, view_pixels
from ..bench.errors import TaskError
from ..bench.types import Array, Context, View
from .masking import Masks, draw_masks
from .patches import cut_patches, draw_offsets, take
from .recipe import Recipe
from .retrieval import directions, pixel_errors
from .trained import Trained

STEP = 16
"""Images that masks are drawn for at once, whatever fits on a device: blocks have one size a step."""
_GREY = 127


@dataclass(frozen=True)
class Look:
    """One image with P predictions of its U distinct hidden patches; blocks may overlap, so P >= U.

    Attributes:
        pixels: what is cut into patches, uint8 (S, S, 3).
        corners: upper left pixel of each patch of the grid, (N, 2).
        visible: (V,) places in the grid that the encoder sees.
        places: (U,) hidden places, ascending.
        own: (P,) the row of ``places`` that each prediction is of.
        predictions: unit vectors (P, D).
        targets: unit vectors (U, D).
        drawn: predicted pixels of ``places``, uint8 (U, p, p, 3); None where latents are predicted.
        errors: squared error of the predicted pixels and of a guess, (2,); None likewise.
    """

    pixels: Array
    corners: Array
    visible: Array
    places: Array
    own: Array
    predictions: torch.Tensor
    targets: torch.Tensor
    drawn: Array | None
    errors: Array | None

    @property
    def asked(self) -> Array:
        """The place of each prediction, (P,)."""
        return np.asarray(self.places[self.own])

    def patch(self, place: int, side: int) -> Array:
        """The pixels of a patch, (side, side, 3)."""
        top, left = self.corners[place]
        return self.pixels[top : top + side, left : left + side]

    def painted(self, side: int, hidden: Sequence[Array] | Array = ()) -> Array:
        """The visible patches on grey, and at the hidden places these patches (U, side, side, 3), if any;
        what is seen stays.
        """
        canvas = np.full_like(self.pixels, _GREY)
        filled = list(zip(self.places, hidden, strict=True)) if len(hidden) else []
        filled += [(place, self.patch(place, side)) for place in self.visible]
        for place, patch in filled:
            top, left = self.corners[place]
            canvas[top : top + side, left : left + side] = patch
        return canvas


def look_at(ctx: Context, view: View, trained: Trained, step: int, positions: Array) -> Iterator[Look]:
    """At most ``STEP`` images of the test split through the model, in fp32.

    Masks and offsets depend on the seed, the recipe's masking and ``step`` alone.

    Raises:
        DataError: a broken image.
        TaskError: predictions that are not finite.
    """
    recipe, model = trained.recipe, trained.model
    split = ctx.data.splits[ctx.data.test_split]
    pixels = np.stack([view_pixels(split.image(int(position)), view) for position in positions])
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), view).to(ctx.device)
    # A last step of fewer images draws as much as the others: more images change none of the first.
    offsets = _offsets(ctx, recipe, step)[: len(positions)]
    masks = draw_masks(recipe, STEP, slice(0, len(positions)), _torch_rng(ctx, "masks", step))
    visible, hidden = masks.visible.numpy(), masks.hidden.flatten(1).numpy()
    masks = Masks(masks.visible.to(ctx.device), masks.hidden.to(ctx.device))

    moved = offsets.to(ctx.device) if recipe.masking.gap else None
    patches = cut_patches(images, recipe.model.patch_size, moved)
    _, predictions = model.predict(patches, masks)
    targets = model.targets(patches, masks).reshape(predictions.shape)
    if not bool(torch.isfinite(predictions).all() and torch.isfinite(targets).all()):
        raise TaskError("the predictions hold NaN or infinity: the training diverged")
    asked, answer = (x.reshape(*hidden.shape, -1) for x in directions(predictions, targets, recipe.objective))
    drawn = errors = None
    if recipe.target.kind == "pixels":
        predictions, targets = (x.reshape(*hidden.shape, -1).float() for x in (predictions, targets))
        seen = None if recipe.target.norm_pixels else take(patches, masks.visible)
        errors = pixel_errors(predictions, targets, seen).cpu().numpy()
        drawn = _as_pixels(predictions, take(patches, masks.hidden.flatten(1)), recipe)

    corners = _corners(recipe, offsets.numpy())
    for i in range(len(positions)):
        places, first, own = np.unique(hidden[i], return_index=True, return_inverse=True)
        yield Look(
            pixels[i],
            corners[i],
            visible[i],
            places,
            own,
            asked[i],
            answer[i][torch.from_numpy(first).to(ctx.device)],
            None if drawn is None else drawn[i][first],
            None if errors is None else errors[i],
        )


def _torch_rng(ctx: Context, *purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(int(ctx.rng(*purpose).integers(2**62)))


def _offsets(ctx: Context, recipe: Recipe, step: int) -> torch.Tensor:
    """Where patches lie in their cells, (STEP, N, 2), as in training."""
    if not recipe.masking.gap or recipe.masking.placement == "contiguous":
        return torch.zeros(STEP, recipe.grid**2, 2, dtype=torch.int64)
    noise = torch.rand(STEP, recipe.grid**2, 2, generator=_torch_rng(ctx, "offsets", step))
    return draw_offsets(noise, recipe.masking.gap)


def _corners(recipe: Recipe, offsets: Array) -> Array:
    """Upper left pixels (B, N, 2) of patches at offsets (B, N, 2) in their cells."""
    rows, columns = np.divmod(np.arange(recipe.grid**2), recipe.grid)
    return np.asarray(np.stack([rows, columns], axis=1) * recipe.cell + offsets)


def _as_pixels(predictions: torch.Tensor, truth: torch.Tensor, recipe: Recipe) -> Array:
    """Predicted pixels, uint8 (B, T, p, p, 3); where the mean and deviation of a patch were taken out of what
    is predicted, those of the true patch are put back.
    """
    if recipe.target.norm_pixels:
        deviation = (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        predictions = predictions * deviation + truth.mean(-1, keepdim=True)
    side = recipe.model.patch_size
    colours = predictions.reshape(*predictions.shape[:2], side, side, 3).cpu().numpy()
    colours = colours * np.array(recipe.data.std) + np.array(recipe.data.mean)
    return np.asarray((colours.clip(0, 1) * 255).round().astype(np.uint8))
