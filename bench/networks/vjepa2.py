"""The encoder of V-JEPA 2 for images (Assran et al. 2025; facebookresearch/vjepa2, src/models).

A plain pre-norm transformer on tubelets without a position table: queries and keys are rotated by the
position along time, height and width, a third of a head each (rounded down to even), and the rest is not
rotated. The frequencies are tiled over the two halves while neighbouring numbers are the pairs that turn;
the published weights were trained with that, so it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.mlp import Mlp
from torch import nn

from ..errors import CheckpointError
from ..types import EncoderSpec, Features, Frozen, PosInterpolation
from .network import Network, read_arch

FRAMES = 16
"""Copies of the image that the official image evaluation makes a video of."""
_EPS = 1e-6
_BASE = 10000.0
Rotations = list[tuple[torch.Tensor, torch.Tensor]]


class JepaArch(Frozen):
    """The numbers that shape an encoder of either V-JEPA."""

    builder: str
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    tubelet: int = Field(2, gt=0)
    """Frames that make one token."""
    hidden: int = Field(gt=0)
    """Width of the MLP."""
    frames: int = Field(FRAMES, gt=0)


class VJepa2Arch(JepaArch):
    """The numbers that shape a V-JEPA 2 encoder."""

    builder: Literal["vjepa2"] = "vjepa2"


def vjepa2_spec(image_size: int = 256, **arch: Any) -> EncoderSpec:
    """The spec of an encoder with the official image preprocessing; ``arch`` goes to ``VJepa2Arch``."""
    return jepa_spec(_arch(arch), image_size)


def jepa_spec(numbers: JepaArch, image_size: int) -> EncoderSpec:
    """The spec of an encoder of either V-JEPA with the official image preprocessing."""
    return EncoderSpec(
        family=numbers.builder,
        arch=numbers.model_dump(),
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        patch_size=numbers.patch_size,
        image_size=image_size // numbers.patch_size * numbers.patch_size,
        interpolation="bilinear",
        pooling="mean",
        has_cls=False,
    )


def build_vjepa2(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return VJepa2(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> VJepa2Arch:
    arch = read_arch(VJepa2Arch, fields, "a V-JEPA 2 encoder")
    if arch.embed_dim % arch.num_heads or arch.embed_dim // arch.num_heads < 6:
        raise CheckpointError(f"not a V-JEPA 2 encoder: {arch.num_heads} heads for width {arch.embed_dim}")
    return arch


class VJepa2(Network):
    """See the module's docstring. The tokens are in the order (time, row, column)."""

    def __init__(self, arch: JepaArch) -> None:
        super().__init__()
        self.arch = arch
        self.frames = max(1, arch.frames // arch.tubelet)
        """Positions in time."""
        kernel = (arch.tubelet, arch.patch_size, arch.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, arch.embed_dim, kernel, stride=kernel)})
        self.blocks = nn.ModuleList(_Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.embed_dim, eps=_EPS)

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, Rotations]:
        """All frames are alike, so one tubelet is embedded and repeated."""
        proj: Any = self.patch_embed["proj"]
        weight = proj.weight.sum(dim=2)
        tokens = F.conv2d(images, weight, proj.bias, stride=proj.stride[1:]).flatten(2).transpose(1, 2)
        return tokens.repeat(1, self.frames, 1), self._rotations(grid, tokens)

    def block(self, index: int, tokens: torch.Tensor, context: Rotations) -> torch.Tensor:
        """The tokens after a block."""
        after: torch.Tensor = self.blocks[index](tokens, context)
        return after

    def read(self, tokens: torch.Tensor, grid: tuple[int, int]) -> Features:
        """The patches are the mean over time; the mean over all tokens stands for the image."""
        body = tokens.reshape(len(tokens), self.frames, *grid, -1).mean(dim=1)
        return Features(cls=None, patches=body, mean=body.mean(dim=(1, 2)))

    def _rotations(self, grid: tuple[int, int], like: torch.Tensor) -> Rotations:
        """Cosine and sine (tokens, d) for time, height and width."""
        size = self.arch.embed_dim // self.arch.num_heads // 3 // 2 * 2
        frequency = _BASE ** -(torch.arange(size // 2, device=like.device) / (size / 2))
        axes = torch.meshgrid(
            *(torch.arange(n, device=like.device) for n in (self.frames, *grid)), indexing="ij"
        )
        angles = [torch.outer(axis.reshape(-1).float(), frequency).repeat(1, 2) for axis in axes]
        return [(angle.cos().to(like.dtype), angle.sin().to(like.dtype)) for angle in angles]


class _Block(nn.Module):
    def __init__(self, arch: JepaArch) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.heads = arch.num_heads
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, arch.hidden)

    def forward(self, x: torch.Tensor, rotations: Rotations) -> torch.Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = _rotate(qkv[0], rotations), _rotate(qkv[1], rotations), qkv[2]
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](out)
        after: torch.Tensor = x + self.mlp(self.norm2(x))
        return after


def _rotate(x: torch.Tensor, rotations: Rotations) -> torch.Tensor:
    """Turn each pair of neighbours of x (B, heads, tokens, d) by the angles of its axis."""
    size = rotations[0][0].shape[-1] if rotations else 0
    parts = []
    for i, (cos, sin) in enumerate(rotations):
        part = x[..., i * size : (i + 1) * size]
        first, second = part[..., ::2], part[..., 1::2]
        parts.append(part * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin)
    return torch.cat([*parts, x[..., len(rotations) * size :]], dim=-1)
