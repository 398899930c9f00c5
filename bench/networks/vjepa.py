"""The encoder of V-JEPA for images (Bardes et al. 2024; facebookresearch/jepa, src/models).

The transformer on tubelets of V-JEPA 2, with a fixed table of positions in time, row and column in place of
the rotations. Other image sizes resample the table along all three axes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ..errors import CheckpointError
from ..types import EncoderSpec, PosInterpolation
from .network import Network, read_arch
from .vjepa2 import JepaArch, Rotations, VJepa2, jepa_spec


class VJepaArch(JepaArch):
    """The numbers that shape a V-JEPA encoder; its frames are those of the position table."""

    builder: Literal["vjepa"] = "vjepa"
    side: int = Field(gt=0)
    """Rows, and columns, of the position table."""


def vjepa_spec(**arch: Any) -> EncoderSpec:
    """The spec of an encoder with the official image preprocessing; ``arch`` goes to ``VJepaArch``."""
    numbers = _arch(arch)
    return jepa_spec(numbers, numbers.side * numbers.patch_size)


def build_vjepa(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return VJepa(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> VJepaArch:
    arch = read_arch(VJepaArch, fields, "a V-JEPA encoder")
    if arch.embed_dim % arch.num_heads:
        raise CheckpointError(f"not a V-JEPA encoder: {arch.num_heads} heads for width {arch.embed_dim}")
    return arch


class VJepa(VJepa2):
    """See the module's docstring. The table (1, time * rows * columns, D) is in the order of the tokens."""

    def __init__(self, arch: VJepaArch) -> None:
        super().__init__(arch)
        self.side = arch.side
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.frames * self.side**2, arch.embed_dim))

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, Rotations]:
        """Tokens with their positions; the resampling of the table is V-JEPA's own, whatever ``method``."""
        tokens, _ = super().embed(images, grid, method)
        return tokens + self._positions(grid).to(tokens.dtype), []

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        own = (self.frames, self.side, self.side)
        if grid == own[1:]:
            return self.pos_embed
        table = self.pos_embed.reshape(1, *own, -1).permute(0, 4, 1, 2, 3)
        return F.interpolate(table, size=(self.frames, *grid), mode="trilinear").flatten(2).transpose(1, 2)
