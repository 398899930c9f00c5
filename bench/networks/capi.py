"""The encoder of CAPI (Darcet et al. 2025; facebookresearch/capi) and the decoder block of its evaluation.

Pre-norm blocks with RMS norms and without biases. Queries and keys are rotated by the position in the unit
square (rows, then columns) with frequencies that are stored; registers sit on the square's edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ..errors import CheckpointError
from ..types import EncoderSpec, Features, Frozen, PosInterpolation
from .network import Network, read_arch

_EPS = 1e-5
# Turns over the unit square.
_FASTEST, _SLOWEST = 7.0, 7e-4


class CapiArch(Frozen):
    """The numbers that shape a CAPI encoder and the block of its decoder."""

    builder: Literal["capi"] = "capi"
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    registers: int = Field(16, ge=0, multiple_of=4)
    hidden: int = Field(gt=0)
    decoder_dim: int = Field(gt=0)
    decoder_heads: int = Field(gt=0)
    decoder_hidden: int = Field(gt=0)


def capi_spec(image_size: int = 224, **arch: Any) -> EncoderSpec:
    """The spec of an encoder with the official image preprocessing; ``arch`` goes to ``CapiArch``."""
    numbers = _arch(arch)
    return EncoderSpec(
        family="capi",
        arch=numbers.model_dump(),
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        patch_size=numbers.patch_size,
        image_size=image_size // numbers.patch_size * numbers.patch_size,
        pooling="cls",
        has_cls=True,
    )


def build_capi(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return Capi(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> CapiArch:
    arch = read_arch(CapiArch, fields, "a CAPI encoder")
    if arch.embed_dim % arch.num_heads or arch.decoder_dim % arch.decoder_heads:
        raise CheckpointError(f"not a CAPI encoder: {arch.num_heads} heads for width {arch.embed_dim}")
    if arch.decoder_dim != arch.embed_dim:
        raise CheckpointError(
            f"this CAPI has a decoder of width {arch.decoder_dim} on an encoder of width {arch.embed_dim}; "
            "the published ones are alike, others are not supported"
        )
    return arch


class Capi(Network):
    """See the module's docstring."""

    def __init__(self, arch: CapiArch) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.n_prefix = arch.registers
        self.registers = nn.Parameter(torch.zeros(1, arch.registers, dim))
        self.patch_embed = nn.Conv2d(3, dim, arch.patch_size, stride=arch.patch_size)
        self.blocks = nn.ModuleList(_Block(dim, arch.num_heads, arch.hidden) for _ in range(arch.depth))
        self.norm = nn.RMSNorm(dim, eps=_EPS, elementwise_affine=False)
        self.mask_token = nn.Parameter(torch.zeros(1, arch.decoder_dim))
        self.decoder = _Block(arch.decoder_dim, arch.decoder_heads, arch.decoder_hidden)

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Registers and patches, and the place of each in the unit square (tokens, 2)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.registers.expand(len(images), -1, -1).to(patches.dtype), patches], dim=1)
        return tokens, self._places(grid, patches.device)

    def block(self, index: int, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The tokens after a block."""
        after: torch.Tensor = self.blocks[index](tokens, context)
        return after

    def read(self, tokens: torch.Tensor, grid: tuple[int, int]) -> Features:
        """The global token is the mean of what the decoder's block predicts from the normed tokens."""
        places = self._places(grid, tokens.device)
        queries = self.mask_token[None].expand(len(tokens), grid[0] * grid[1], -1).to(tokens.dtype)
        seen = self.decoder(queries, places[self.n_prefix :], self.norm(tokens), places)
        body = tokens[:, self.n_prefix :]
        return Features(self.norm(seen).mean(dim=1), body.reshape(len(body), *grid, -1), body.mean(dim=1))

    def _places(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        rows, columns = (torch.linspace(0, 1, n, device=device) for n in grid)
        patches = torch.cartesian_prod(rows, columns)
        side = self.n_prefix // 4
        step = torch.arange(side, device=device) / max(1, side)
        zero, one = torch.zeros_like(step), torch.ones_like(step)
        edge = torch.cat(
            [
                torch.stack(pair, dim=1)
                for pair in ((step, zero), (one, step), (1 - step, one), (zero, 1 - step))
            ]
        )
        low, high = patches.amin(dim=0), patches.amax(dim=0)
        return torch.cat([low + edge * (high - low), patches])


class _Block(nn.Module):
    """Attention and MLP, each behind an RMS norm; attention to ``seen`` where that is given."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=_EPS)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=_EPS)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, hidden, bias=False), "fc2": nn.Linear(hidden, dim, bias=False)}
        )

    def forward(
        self,
        x: torch.Tensor,
        places: torch.Tensor,
        seen: torch.Tensor | None = None,
        seen_places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = self.norm1(x)
        if seen is None or seen_places is None:
            seen, seen_places = normed, places
        x = x + self.attn(normed, places, seen, seen_places)
        after: torch.Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return after


def _frequencies(head_dim: int) -> torch.Tensor:
    """The angular frequencies (2, d) that training starts from: rows turn one half, columns the other."""
    # transformers may leave torch.linspace deaf to ``with torch.device``.
    steps = torch.linspace(0, -1, head_dim // 4, device=torch.get_default_device())
    one_axis = 2 * torch.pi * _FASTEST * (_FASTEST / _SLOWEST) ** steps
    pair, none = one_axis.repeat(2), torch.zeros(2 * len(one_axis))
    return torch.stack([torch.cat([pair, none]), torch.cat([none, pair])])


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.rope = nn.ParameterDict({"freqs": nn.Parameter(_frequencies(dim // heads))})

    def forward(
        self, x: torch.Tensor, places: torch.Tensor, seen: torch.Tensor, seen_places: torch.Tensor
    ) -> torch.Tensor:
        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)

        query = self._rotate(split(self.q_proj(x)), places)
        key = self._rotate(split(self.k_proj(seen)), seen_places)
        out = F.scaled_dot_product_attention(query, key, split(self.v_proj(seen)))
        projected: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected

    def _rotate(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        # In fp32 whatever x is, and no matrix product, which autocast rounds: angles reach 44.
        rows, columns = self.rope["freqs"].float()
        angle = places[:, :1] * rows + places[:, 1:] * columns
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        turned: torch.Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
        return turned
