"""The vision transformer of DINOv3 (Siméoni et al. 2025; facebookresearch/dinov3, dinov3/models).

A pre-norm transformer with layer scale, a class token and registers, and no position table: queries and keys
of the patches are turned by their row and column, both scaled to [-1, 1], by angles of fixed periods. The
periods are in the file. The published ones were rounded to bfloat16, so they are not what a formula in
float32 gives, and that shows in the features; the network therefore takes them from the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.mlp import Mlp, SwiGLU
from torch import nn

from ..errors import CheckpointError
from ..types import EncoderSpec, Frozen, PosInterpolation
from .network import Network, read_arch

_BASE = 100.0
Rotation = tuple[torch.Tensor, torch.Tensor]


class DinoV3Arch(Frozen):
    """The numbers that shape a DINOv3 transformer."""

    builder: Literal["dinov3"] = "dinov3"
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    hidden: int = Field(gt=0)
    """Width of the MLP, of the gate alone where it is a SwiGLU."""
    swiglu: bool = False
    registers: int = Field(4, ge=0)
    qkv_bias: bool = True
    layer_scale: bool = True
    untied_norm: bool = False
    """The class token and the registers have a final norm of their own."""
    rope_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of coordinates, angles and the turn itself."""
    eps: float = Field(1e-5, gt=0)


def dinov3_spec(image_size: int = 224, **arch: Any) -> EncoderSpec:
    """The spec of an encoder with the official preprocessing; ``arch`` goes to ``DinoV3Arch``."""
    numbers = _arch(arch)
    return EncoderSpec(
        family="dinov3",
        arch=numbers.model_dump(),
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        patch_size=numbers.patch_size,
        image_size=max(1, image_size // numbers.patch_size) * numbers.patch_size,
    )


def build_dinov3(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return DinoV3(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> DinoV3Arch:
    arch = read_arch(DinoV3Arch, fields, "a DINOv3 encoder")
    if arch.embed_dim % (4 * arch.num_heads):
        raise CheckpointError(f"not a DINOv3 encoder: {arch.num_heads} heads for width {arch.embed_dim}")
    return arch


class DinoV3(Network):
    """See the module's docstring. The tokens are the class token, the registers, the patches."""

    def __init__(self, arch: DinoV3Arch) -> None:
        super().__init__()
        dim, patch = arch.embed_dim, arch.patch_size
        self.n_prefix = 1 + arch.registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        if arch.registers:
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, arch.registers, dim))
        self.rope = _Rope(dim // arch.num_heads, getattr(torch, arch.rope_dtype))
        self.blocks = nn.ModuleList(_Block(arch) for _ in range(arch.depth))
        self.norm = _UntiedNorm(arch, self.n_prefix) if arch.untied_norm else nn.LayerNorm(dim, eps=arch.eps)

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, Rotation]:
        """There is no position table, so ``method`` has no effect."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        registers = [self.reg_token] if self.n_prefix > 1 else []
        prefix = torch.cat([self.cls_token, *registers], dim=1).expand(len(images), -1, -1)
        return torch.cat([prefix.to(patches.dtype), patches], dim=1), self.rope(grid)

    def block(self, index: int, tokens: torch.Tensor, context: Rotation) -> torch.Tensor:
        """The tokens after a block."""
        after: torch.Tensor = self.blocks[index](tokens, context)
        return after

    def global_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The class token."""
        return tokens[:, 0]


class _Rope(nn.Module):
    """Sine and cosine (h*w, d) of the angles of every patch, in the precision of the original."""

    periods: torch.Tensor

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        exponents = 2 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2)
        self.register_buffer("periods", (_BASE**exponents).to(dtype))
        self.dtype = dtype

    def forward(self, grid: tuple[int, int]) -> Rotation:
        like: dict[str, Any] = {"device": self.periods.device, "dtype": self.dtype}
        centres = (torch.arange(0.5, n, **like) / n for n in grid)
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
        angles = 2 * math.pi * (2 * places - 1)[:, :, None] / self.periods  # (h*w, 2, d/4)
        angles = angles.flatten(1).tile(2)
        return angles.sin(), angles.cos()


class _UntiedNorm(nn.Module):
    """One norm for the class token and the registers, another for the patches."""

    def __init__(self, arch: DinoV3Arch, n_prefix: int) -> None:
        super().__init__()
        self.n_prefix = n_prefix
        self.prefix = nn.LayerNorm(arch.embed_dim, eps=arch.eps)
        self.patches = nn.LayerNorm(arch.embed_dim, eps=arch.eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = self.n_prefix
        return torch.cat([self.prefix(tokens[:, :n]), self.patches(tokens[:, n:])], dim=1)


class _Block(nn.Module):
    def __init__(self, arch: DinoV3Arch) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.heads = arch.num_heads
        self.norm1 = nn.LayerNorm(dim, eps=arch.eps)
        qkv = nn.Linear(dim, 3 * dim, bias=arch.qkv_bias)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=arch.eps)
        self.mlp = SwiGLU(dim, arch.hidden) if arch.swiglu else Mlp(dim, arch.hidden)
        self.ls1 = _Scale(dim) if arch.layer_scale else nn.Identity()
        self.ls2 = _Scale(dim) if arch.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _turn(qkv[0], rotation), _turn(qkv[1], rotation)
        out = F.scaled_dot_product_attention(query, key, qkv[2]).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](out))
        after: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return after


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def _turn(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the patches of x (B, heads, prefix + h*w, d); the tokens before them stay."""
    sin, cos = rotation
    prefix = x.shape[2] - len(sin)
    # The original rounds the tokens before the patches to this precision too.
    rounded = x.to(sin.dtype)
    body = rounded[:, :, prefix:]
    first, second = body.chunk(2, dim=-1)
    body = body * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rounded[:, :, :prefix], body], dim=2).to(x.dtype)
