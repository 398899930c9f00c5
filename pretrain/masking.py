"""Which patches the online encoder sees, and which it has to predict.

Everything is drawn for the whole batch of a step from one generator and then cut to this process's part, so
that the number of processes and of accumulated parts never changes what is drawn for an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from .recipe import Recipe
from .sections import MaskingConfig

GROUP = 128
"""Images of a step that see as many patches as the poorest of them, in multi-block masks: what a process has
in I-JEPA's configurations.
"""
_TRIES = 20
Runs = Sequence[tuple[int, int]]
"""Images one after another that see the same number of patches: how many images, and how many patches."""


class Masks(NamedTuple):
    """Positions in the grid, counted row by row.

    Attributes:
        visible: (B, V) patches that the online encoder sees; -1 behind the last one of an image that sees
            fewer than another (multi-block masks of more than ``GROUP`` images).
        hidden: (B, M, T) patches to predict, in M groups that are predicted apart from each other; in random
            order, but for the blocks of I-JEPA.
    """

    visible: torch.Tensor
    hidden: torch.Tensor

    def contiguous(self) -> Masks:
        """The same, each in memory without holes: a copy to a GPU waits for anything else."""
        return Masks(self.visible.contiguous(), self.hidden.contiguous())


def draw_masks(recipe: Recipe, batch: int, part: slice, generator: torch.Generator) -> Masks:
    """Masks for the images of ``part`` out of a step of ``batch`` images."""
    masking, grid = recipe.masking, recipe.grid
    if masking.kind == "multiblock":
        return multiblock_masks(masking, grid, batch, part, generator)
    noise = torch.rand(batch, grid * grid, generator=generator)[part]
    if masking.kind == "random":
        return random_masks(noise, recipe.visible_patches)
    covered = block_cover(grid, batch, recipe.visible_patches, generator)
    masks = random_masks(covered[part] + noise, recipe.visible_patches)
    # So far the hidden patches stand rectangle by rectangle.
    order = torch.rand(batch, masks.hidden.shape[-1], generator=generator)[part].argsort(dim=1)
    return Masks(masks.visible, masks.hidden.gather(2, order[:, None]))


def visible_runs(visible: torch.Tensor) -> Runs:
    """The runs of ``Masks.visible`` (B, V), which lies on the CPU."""
    counts = (visible >= 0).sum(dim=1).tolist()
    return tuple((len(list(run)), count) for count, run in groupby(counts))


def random_masks(noise: torch.Tensor, visible: int) -> Masks:
    """The ``visible`` patches of lowest noise are seen, the others hidden; noise is (B, N)."""
    order = noise.argsort(dim=1)
    return Masks(order[:, :visible], order[:, None, visible:]).contiguous()


def block_cover(grid: int, batch: int, visible: int, generator: torch.Generator) -> torch.Tensor:
    """A rank (B, N) that is higher where earlier rectangles fall: the highest are hidden first.

    Rectangles as in BEiT (Bao et al., ICLR 2022; microsoft/unilm, beit/masking_generator.py): at least 16
    of 196 patches, aspect 0.3 to 1/0.3 log-uniform. Deviations: exactly the wanted number is hidden, the last
    rectangle being thinned at random, where BEiT stops below the number; a rectangle that is longer than the
    grid is cut (theirs: drawn again), and the largest area does not shrink with what is left to hide.
    """
    total = grid * grid
    wanted = total - visible
    rectangles = 4 * math.ceil(wanted / max(1.0, total * 16 / 196))
    draws = torch.rand(4, batch, rectangles, generator=generator)
    low = max(1.0, total * 16 / 196)
    area = low + draws[0] * max(0.0, wanted - low)
    aspect = torch.exp((2 * draws[1] - 1) * math.log(1 / 0.3))
    height = (area * aspect).sqrt().round().clamp(1, grid)
    width = (area / aspect).sqrt().round().clamp(1, grid)
    top = (draws[2] * (grid - height + 1)).floor()
    left = (draws[3] * (grid - width + 1)).floor()
    inside = _rectangle(grid, top, left, height, width)  # (B, R, N)
    rank = (rectangles - torch.arange(rectangles, dtype=torch.float32))[:, None]
    return (inside * rank).amax(dim=1)


def multiblock_masks(
    masking: MaskingConfig, grid: int, batch: int, part: slice, generator: torch.Generator
) -> Masks:
    """I-JEPA's masks: target blocks of one size a step, and a context block without what they cover
    (Assran et al., CVPR 2023; facebookresearch/ijepa, src/masks/multiblock.py).

    Where the context keeps too few patches after 20 tries, the last target block may overlap it, then the
    last two, and so on. Each ``GROUP`` images of the batch, one after another, keep as many context patches
    as the poorest of them. Deviations: the surplus is dropped at random (theirs drops the lowest rows);
    scale and aspect of a block are drawn apart (theirs come from one random number).
    """
    height, width = _block_size(masking.block_scale, masking.block_aspect, grid, generator)
    context = _block_size(masking.context_scale, (1.0, 1.0), grid, generator)
    draws = torch.rand(2, batch, masking.blocks, generator=generator)
    places = torch.rand(2, batch, _TRIES, generator=generator)
    order = torch.rand(batch, grid * grid, generator=generator)
    targets = _placed(grid, draws, height, width)  # (B, M, N)
    contexts = _placed(grid, places, *context)  # (B, tries, N)
    chosen = torch.zeros(batch, grid * grid, dtype=torch.bool)
    still = torch.arange(batch)  # images without a context so far
    for kept in range(masking.blocks, -1, -1):
        free = contexts[still] & ~targets[still, :kept].any(dim=1)[:, None]
        enough = free.sum(-1) > min(masking.min_context, context[0] * context[1] - 1)
        found, first = enough.any(dim=1), enough.int().argmax(dim=1)
        chosen[still[found]] = free[found, first[found]]
        still = still[~found]
    groups = torch.split(chosen.sum(-1), GROUP)
    seen = torch.cat([group.min().expand(len(group)) for group in groups])[part]
    hidden = targets[part].nonzero()[:, 2].reshape(-1, masking.blocks, height * width)
    most = int(seen.max())
    shown = (chosen[part] + order[part]).argsort(dim=1, descending=True)[:, :most]
    shown = shown.masked_fill(torch.arange(most) >= seen[:, None], -1)
    return Masks(shown, hidden).contiguous()


def _block_size(
    scale: tuple[float, float], aspect: tuple[float, float], grid: int, generator: torch.Generator
) -> tuple[int, int]:
    """Height and width of a block; smaller than the grid, so that it can lie in more than one place."""
    share, ratio = torch.rand(2, generator=generator).tolist()
    area = int(grid * grid * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + ratio * (aspect[1] - aspect[0])
    most = max(1, grid - 1)
    return (
        min(most, max(1, round(math.sqrt(area * ratio)))),
        min(most, max(1, round(math.sqrt(area / ratio)))),
    )


def _placed(grid: int, draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Blocks (B, M, N) of one size at random places; ``draws`` is (2, B, M) in [0, 1)."""
    top, left = (draws[0] * (grid - height)).floor(), (draws[1] * (grid - width)).floor()
    return _rectangle(grid, top, left, torch.full_like(top, height), torch.full_like(left, width))


def _rectangle(
    grid: int, top: torch.Tensor, left: torch.Tensor, height: torch.Tensor, width: torch.Tensor
) -> torch.Tensor:
    """Membership (..., N) of the patches in rectangles given by corners and sizes (...)."""
    steps = torch.arange(grid)
    rows = (steps >= top[..., None]) & (steps < (top + height)[..., None])
    columns = (steps >= left[..., None]) & (steps < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)
