"""Images as patches: where they lie, how they are cut out, and how positions are coded. Pure functions."""

from __future__ import annotations

import torch

from .sections import Positions


def sincos_positions(dim: int, grid: int, style: Positions = "sincos") -> torch.Tensor:
    """Fixed two-dimensional sine-cosine positions, (grid * grid, dim), counted row by row.

    The first half of the channels encodes the column, the second the row, each as sines then cosines over
    geometric frequencies. ``sincos`` counts 0, 1, ..., grid - 1 (facebookresearch/mae); ``latent_mim``
    spreads the same number of positions evenly over 0 to grid, ends included (yibingwei-1/LatentMIM).

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    last = grid if style == "latent_mim" else grid - 1
    # transformers may leave torch.linspace deaf to ``with torch.device``.
    steps = torch.linspace(0, last, grid, dtype=torch.float64, device=torch.get_default_device())
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    halves = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def draw_offsets(noise: torch.Tensor, gap: int) -> torch.Tensor:
    """Offsets of patches inside their cells from uniform noise in [0, 1), as int64 of the same shape.

    Uniform over 0..gap-1, as in the official code (a patch could move by ``gap``, but never does): a gap
    of one pixel is therefore always on the lower right side.
    """
    return (noise * gap).long()


def cut_patches(images: torch.Tensor, patch: int, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """One patch out of each cell of images (B, 3, H, W).

    Args:
        images: the cells tile the image; without offsets a cell is a patch.
        patch: side of a patch, pixels.
        offsets: (B, N, 2) row and column of each patch inside its cell, with N the number of cells, a
            square; or None where patches tile the image.

    Returns:
        (B, N, patch * patch * 3), pixels in (row, column, channel) order.
    """
    b, c, height, width = images.shape
    if offsets is None:
        cells = images.reshape(b, c, height // patch, patch, width // patch, patch)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)
    grid = round(offsets.shape[1] ** 0.5)
    corners = torch.arange(grid, device=images.device) * (height // grid)
    top = offsets[..., 0] + corners.repeat_interleave(grid)  # (B, N)
    left = offsets[..., 1] + corners.repeat(grid)
    windows = images.permute(0, 2, 3, 1).unfold(1, patch, 1).unfold(2, patch, 1)  # a view of all windows
    chosen = windows[torch.arange(b, device=images.device)[:, None], top, left]  # (B, N, 3, p, p)
    return chosen.permute(0, 1, 3, 4, 2).reshape(b, grid * grid, -1)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x (B, N, D) at index (B, M), as (B, M, D)."""
    b, n, d = x.shape
    # Selecting whole rows: the gradient of an element-wise gather is several times slower on the CPU.
    rows = index + n * torch.arange(b, device=index.device)[:, None]
    return x.reshape(b * n, d).index_select(0, rows.reshape(-1)).reshape(b, -1, d)


def standardise(x: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit (unbiased) variance over the last axis, as MAE does to the pixels of a patch."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
