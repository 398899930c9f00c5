"""The transformer of BEiT (Bao et al. 2021; microsoft/unilm, beit) and of the code bases that grew out of it.

BEiT v2, the vision part of data2vec, the ViT of SimMIM and EVA-02 are one pre-norm transformer with options:
biases of attention by relative position (one table for all blocks, or one a block), rotary positions, layer
scale, and a gated MLP. Keys have no bias. Tables of relative positions are resampled as the fine-tuning
scripts of these repositories do it for square images; here each axis follows that rule by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.mlp import Mlp
from torch import nn

from ..backbones import resample_positions
from ..errors import CheckpointError, TaskError
from ..types import EncoderSpec, Frozen, PosInterpolation
from .network import Network, read_arch

_BASE = 10000.0
_TOKENS = 3
"""Last entries of a relative table: class token to patch, patch to class token, class token to itself."""
Rotation = tuple[torch.Tensor, torch.Tensor]


class BeitArch(Frozen):
    """What shapes a transformer of the BEiT code bases."""

    builder: Literal["beit"] = "beit"
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    image_size: int = Field(gt=0)
    """Side of the image that the tables of positions were made for."""
    hidden: int = Field(gt=0)
    """Width of the MLP."""
    positions: bool = False
    """There is a table of absolute positions, the class token's first."""
    relative: Literal["none", "shared", "blocks"] = "none"
    """Biases by relative position: none, one table for all blocks, or a table in each block."""
    rotary: int = Field(0, ge=0)
    """Side of the grid that rotary positions count in, whatever the image; 0: there are none."""
    qkv_bias: bool = True
    split_qkv: bool = False
    """Queries, keys and values have a matrix each."""
    layer_scale: bool = True
    mlp: Literal["gelu", "swiglu", "swiglu_packed"] = "gelu"
    mlp_norm: bool = False
    """A norm before the last matrix of a SwiGLU."""
    attn_norm: bool = False
    """A norm before the last matrix of the attention."""
    mean_norm: bool = False
    """The norm comes after the mean of the patches, in place of the norm of all tokens."""
    final_norm: bool = True
    """There is a norm of the tokens or of their mean at all."""
    eps: float = Field(1e-6, gt=0)
    bilinear: bool = False
    """Tables of relative positions are resampled bilinearly."""


def beit_spec(family: str, arch: Mapping[str, Any], **fields: Any) -> EncoderSpec:
    """The spec of an encoder; ``arch`` goes to ``BeitArch``, ``fields`` to ``EncoderSpec``.

    Raises:
        CheckpointError: the numbers do not go together.
    """
    numbers = _arch(arch)
    return EncoderSpec(
        family=family,
        arch=numbers.model_dump(),
        embed_dim=numbers.embed_dim,
        depth=numbers.depth,
        patch_size=numbers.patch_size,
        image_size=numbers.image_size,
        has_cls=True,
        **{"pos_interpolation": "bicubic", **fields},
    )


def build_beit(arch: Mapping[str, Any]) -> Network:
    """The encoder that ``arch`` describes. Raises CheckpointError where its numbers do not go together."""
    return Beit(_arch(arch))


def _arch(fields: Mapping[str, Any]) -> BeitArch:
    arch = read_arch(BeitArch, fields, "a transformer of the BEiT kind")
    per_head = 4 if arch.rotary else 1
    if arch.embed_dim % (arch.num_heads * per_head):
        raise CheckpointError(
            f"not a transformer of the BEiT kind: {arch.num_heads} heads for width {arch.embed_dim}"
        )
    if arch.image_size % arch.patch_size:
        raise CheckpointError(f"image_size {arch.image_size} is no multiple of the patch {arch.patch_size}")
    return arch


def growing_positions(count: int, target: int) -> list[float]:
    """``count`` positions (odd, centre 0), in steps that grow by one factor to the edges of ``target``.

    The factor is searched in [1.01, 1.5], as the fine-tuning script of BEiT does: near the centre an entry
    keeps its distance, and the outermost are spread to the new edge.
    """
    half, edge = count // 2, target // 2
    low, high = 1.01, 1.5
    factor = low
    while high - low > 1e-6:
        factor = (low + high) / 2
        if sum(factor**i for i in range(half)) > edge:
            high = factor
        else:
            low = factor
    side = np.cumsum([factor**i for i in range(half)])
    return [*(-side[::-1]).tolist(), 0.0, *side.tolist()]


@lru_cache(maxsize=64)
def resampling_matrix(source: int, target: int) -> torch.Tensor:
    """The matrix (target, source) that takes relative positions along an axis to another number of places.

    An interpolating cubic spline through the source entries at ``growing_positions``, read at whole steps.

    Raises:
        TaskError: the source has too few places for a cubic spline.
    """
    from scipy.interpolate import make_interp_spline

    if source < 4:
        raise TaskError("a table of relative positions of 2x2 patches or less cannot be resampled")
    at = growing_positions(source, target)
    places = np.clip(np.arange(target) - target // 2, at[0], at[-1])
    return torch.from_numpy(make_interp_spline(at, np.eye(source), k=3)(places)).float()


def relative_bias(
    table: torch.Tensor, side: int, grid: tuple[int, int], bilinear: bool = False
) -> torch.Tensor:
    """Biases (heads, 1 + h*w, 1 + h*w) of attention, class token first.

    Args:
        table: ((2 * side - 1)**2 + 3, heads).
        side: of the square grid that the table was made for.
        grid: rows h and columns w at hand.
        bilinear: resample by plain bilinear interpolation.
    """
    height, width = grid
    rows, columns = 2 * height - 1, 2 * width - 1
    field = table[:-_TOKENS].float().T.reshape(-1, 2 * side - 1, 2 * side - 1)  # (heads, 2s-1, 2s-1)
    if bilinear:
        field = F.interpolate(field[None], size=(rows, columns), mode="bilinear")[0]
    else:
        if height != side:
            field = resampling_matrix(2 * side - 1, rows).to(field) @ field
        if width != side:
            field = field @ resampling_matrix(2 * side - 1, columns).to(field).T
    y = torch.arange(height, device=table.device).repeat_interleave(width)
    x = torch.arange(width, device=table.device).repeat(height)
    index = (y[:, None] - y + height - 1) * columns + (x[:, None] - x + width - 1)
    bias = F.pad(field.flatten(1)[:, index], (1, 0, 1, 0))
    to_patch, to_token, to_itself = table[-_TOKENS:].float()
    bias[:, 0] = to_patch[:, None]
    bias[:, :, 0] = to_token[:, None]
    bias[:, 0, 0] = to_itself
    return bias


def rotations(grid: tuple[int, int], side: int, size: int, like: torch.Tensor) -> Rotation:
    """Cosine and sine (h*w, size) of rotary positions: rows turn half of a head, columns the other half.

    Positions are scaled so that every grid spans ``side`` places; neighbouring numbers turn as a pair.
    """
    half = size // 2
    frequency = _BASE ** -(torch.arange(0, half, 2, device=like.device).float() / half)
    rows, columns = (torch.arange(n, device=like.device) / n * side for n in grid)
    by_row, by_column = (torch.outer(p, frequency).repeat_interleave(2, dim=1) for p in (rows, columns))
    angle = torch.cat(
        [by_row.repeat_interleave(grid[1], dim=0), by_column.repeat(grid[0], 1)], dim=1
    )  # (h*w, size)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


@dataclass(frozen=True)
class Context:
    """What every block is given beside the tokens."""

    grid: tuple[int, int]
    bias: torch.Tensor | None
    """Biases of attention that all blocks share."""
    rotation: Rotation | None


class Beit(Network):
    """See the module's docstring. The first token is the class token."""

    n_prefix = 1

    def __init__(self, arch: BeitArch) -> None:
        super().__init__()
        self.arch = arch
        dim, patch = arch.embed_dim, arch.patch_size
        self.side = arch.image_size // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if arch.positions:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.side**2, dim))
        if arch.relative == "shared":
            self.rel_pos_bias = _Table(arch, self.side)
        self.blocks = nn.ModuleList(_Block(arch, self.side) for _ in range(arch.depth))
        norms = [nn.LayerNorm(dim, eps=arch.eps) if arch.final_norm else nn.Identity(), nn.Identity()]
        self.fc_norm, self.norm = norms if arch.mean_norm else norms[::-1]

    def embed(
        self, images: torch.Tensor, grid: tuple[int, int], method: PosInterpolation
    ) -> tuple[torch.Tensor, Context]:
        """The class token and the patches, with their absolute positions where there are any."""
        tokens = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        cls: torch.Tensor = self.cls_token
        if self.arch.positions:
            cls = cls + self.pos_embed[:, :1]
            tokens = tokens + resample_positions(self.pos_embed[:, 1:], (self.side, self.side), grid, method)
        tokens = torch.cat([cls.expand(len(images), -1, -1).to(tokens.dtype), tokens], dim=1)
        bias = rotation = None
        if self.arch.relative == "shared":
            bias = relative_bias(
                self.rel_pos_bias.relative_position_bias_table, self.side, grid, self.arch.bilinear
            )
        if self.arch.rotary:
            size = self.arch.embed_dim // self.arch.num_heads
            rotation = rotations(grid, self.arch.rotary, size, tokens)
        return tokens, Context(grid, bias, rotation)

    def block(self, index: int, tokens: torch.Tensor, context: Context) -> torch.Tensor:
        """The tokens after a block."""
        after: torch.Tensor = self.blocks[index](tokens, context)
        return after

    def global_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The class token."""
        return tokens[:, 0]

    def norm_of_mean(self, mean: torch.Tensor) -> torch.Tensor:
        """``fc_norm`` of models that were fine-tuned with mean pooling."""
        normed: torch.Tensor = self.fc_norm(mean)
        return normed


class _Table(nn.Module):
    def __init__(self, arch: BeitArch, side: int) -> None:
        super().__init__()
        entries = (2 * side - 1) ** 2 + _TOKENS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, arch.num_heads))


class _Attention(nn.Module):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None
    relative_position_bias_table: nn.Parameter | None

    def __init__(self, arch: BeitArch, side: int) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.heads, self.side, self.bilinear = arch.num_heads, side, arch.bilinear
        if arch.split_qkv:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(dim)) if arch.qkv_bias else None)
        table = _Table(arch, side).relative_position_bias_table if arch.relative == "blocks" else None
        self.register_parameter("relative_position_bias_table", table)
        self.split = arch.split_qkv
        self.inner_attn_ln = nn.LayerNorm(dim, eps=arch.eps) if arch.attn_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        batch, count, _ = x.shape
        query, key, value = (t.view(batch, count, self.heads, -1).transpose(1, 2) for t in self._project(x))
        if context.rotation is not None:
            query, key = _rotate(query, context.rotation), _rotate(key, context.rotation)
        bias = context.bias
        if self.relative_position_bias_table is not None:
            bias = relative_bias(self.relative_position_bias_table, self.side, context.grid, self.bilinear)
        bias = None if bias is None else bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        after: torch.Tensor = self.proj(self.inner_attn_ln(out.transpose(1, 2).flatten(2)))
        return after

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.split:
            return (
                F.linear(x, self.q_proj.weight, self.q_bias),
                F.linear(x, self.k_proj.weight),
                F.linear(x, self.v_proj.weight, self.v_bias),
            )
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)


def _rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the neighbours of x (B, heads, 1 + h*w, d) by their angles; the class token is not turned."""
    cos, sin = rotation
    token, body = x[:, :, :1], x[:, :, 1:]
    turned = torch.stack((-body[..., 1::2], body[..., ::2]), dim=-1).flatten(-2)
    return torch.cat([token, (body * cos + turned * sin).to(x.dtype)], dim=2)


class _SwiGLU(nn.Module):
    """The gate is the first matrix; a packed one has gate and value below one another."""

    def __init__(self, dim: int, hidden: int, packed: bool, norm_eps: float | None) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.w12 = nn.Linear(dim, 2 * hidden)
        else:
            self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.ffn_ln = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1) if self.packed else (self.w1(x), self.w2(x))
        after: torch.Tensor = self.w3(self.ffn_ln(F.silu(gate) * value))
        return after


class _Block(nn.Module):
    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, arch: BeitArch, side: int) -> None:
        super().__init__()
        dim = arch.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=arch.eps)
        self.attn = _Attention(arch, side)
        self.norm2 = nn.LayerNorm(dim, eps=arch.eps)
        self.mlp: nn.Module = (
            Mlp(dim, arch.hidden)
            if arch.mlp == "gelu"
            else _SwiGLU(dim, arch.hidden, arch.mlp == "swiglu_packed", arch.eps if arch.mlp_norm else None)
        )
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.full((dim,), 0.1)) if arch.layer_scale else None)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        update: torch.Tensor = self.attn(self.norm1(x), context)
        x = x + (update if self.gamma_1 is None else self.gamma_1 * update)
        update = self.mlp(self.norm2(x))
        return x + (update if self.gamma_2 is None else self.gamma_2 * update)
