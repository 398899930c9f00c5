"""The image encoder of data2vec 2.0 (Baevski et al. 2022; fairseq, examples/data2vec/models).

Post-norm blocks: the norms follow the sums, the last block's norm is the final one. A norm stands before the
first block. The first blocks (the prenet) belong to the image and the others to all modalities; here they are
one column. Positions are a fixed table added to the patches only; extra tokens stand first and have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.mlp import Mlp
from torch import nn

from ..backbones import resample_positions
from ..errors import CheckpointError
from ..types import EncoderSpec, Frozen, PosInterpolation
from .network import Network, read_arch

_EPS = 1e-6


class Data2Vec2Arch(Frozen):
    """The numbers that shape a data2vec 2.0 encoder of images."""

    builder: Literal["data2vec2"] = "data2vec2"
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    """All blocks, those of the prenet first."""
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    image_size: int = Field(gt=0)
    """Side of the image that the stored position table was made for."""
    hidden: int = Field(gt=0)
    extra_tokens: int = Field(1, ge=0)


def data2vec2_spec(**arch: Any) -> EncoderSpec:
    """The spec of an encoder with the official image preprocessing; ``arch`` goes to ``Data2Vec2Arch``."""
    numbers = _arch(arch)
    return EncoderSpec(
        family="data2vec2",
        arch=numbers.model_dump(),
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        patch_size=numbers.patch_size,
        image_size=numbers.image_size,
        pooling="mean",
        has_cls=numbers.extra_tokens > 0,
        pos_interpolation="bicubic",
    )


def build_data2vec2(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return Data2Vec2(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> Data2Vec2Arch:
    arch = read_arch(Data2Vec2Arch, fields, "a data2vec 2.0 encoder")
    if arch.embed_dim % arch.num_heads or arch.image_size % arch.patch_size:
        raise CheckpointError(
            f"not a data2vec 2.0 encoder: {arch.num_heads} heads for width {arch.embed_dim}, patches of "
            f"{arch.patch_size} for an image of {arch.image_size}"
        )
    return arch


class Data2Vec2(Network):
    """See the module's docstring."""

    def __init__(self, arch: Data2Vec2Arch) -> None:
        super().__init__()
        dim, self.side = arch.embed_dim, arch.image_size // arch.patch_size
        self.n_prefix = arch.extra_tokens
        patch = arch.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.side**2, dim))
        if self.n_prefix:
            self.extra_tokens = nn.Parameter(torch.randn(1, self.n_prefix, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=_EPS)
        self.blocks = nn.ModuleList(_Block(arch) for _ in range(arch.depth))
        self.norm = nn.Identity()

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, None]:
        """Extra tokens and patches after the norm before the blocks."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = tokens + resample_positions(self.pos_embed, (self.side, self.side), grid, method)
        if self.n_prefix:
            extra = self.extra_tokens.expand(len(images), -1, -1).to(tokens.dtype)
            tokens = torch.cat([extra, tokens], dim=1)
        return self.norm_pre(tokens), None

    def block(self, index: int, tokens: torch.Tensor, context: None) -> torch.Tensor:
        """The tokens after a block."""
        after: torch.Tensor = self.blocks[index](tokens)
        return after

    def global_token(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The last extra token, which the training makes predict the mean of the targets."""
        return tokens[:, self.n_prefix - 1] if self.n_prefix else None


class _Block(nn.Module):
    def __init__(self, arch: Data2Vec2Arch) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.heads = arch.num_heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, arch.hidden)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attn["qkv"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.attn["proj"](out))
        after: torch.Tensor = self.norm2(x + self.mlp(x))
        return after
