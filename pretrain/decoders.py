"""What predicts the hidden patches from the visible latents.

All kinds share the ends: latents are embedded to the decoder's width, a mask token (which may start from
visual cues) with its position stands for each hidden patch, and a linear head maps to the target's width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from .encoder import initialise, run_blocks
from .patches import sincos_positions
from .recipe import Recipe

_norm: Any = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """Predictions for hidden patches.

    ``self`` runs blocks over visible latents and mask tokens together (MAE; I-JEPA's predictor). ``cross``
    and ``cross_self`` run blocks over the mask tokens, which look at the visible latents by
    cross-attention, and before that at each other with ``cross_self`` (yibingwei-1/LatentMIM, xvits.py);
    a token of their own goes with them, as in the official code.

    Args:
        recipe: kind, depth, width, heads, cues, positions.
        latent_dim: width of the latents.
        out_dim: width of the targets.
        prefix: class and register tokens among the latents.
    """

    positions: torch.Tensor

    def __init__(self, recipe: Recipe, latent_dim: int, out_dim: int, prefix: int) -> None:
        super().__init__()
        config = recipe.decoder
        width, heads = config.width, config.num_heads
        self.prefix = prefix
        self.cues = config.cues
        self.recompute = recipe.engine.activation_checkpointing
        self.embed = nn.Linear(latent_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        style = "sincos" if recipe.model.positions == "learned" else recipe.model.positions
        self.register_buffer("positions", sincos_positions(width, recipe.grid, style), persistent=False)
        self.query_token: nn.Parameter | None = None
        if config.kind == "self":
            self.blocks = nn.ModuleList(
                Block(width, heads, qkv_bias=True, norm_layer=_norm) for _ in range(config.depth)
            )
        else:
            self.query_token = nn.Parameter(torch.zeros(1, 1, width))
            attends_itself = config.kind == "cross_self"
            self.blocks = nn.ModuleList(CrossBlock(width, heads, attends_itself) for _ in range(config.depth))
        self.norm = _norm(width)
        self.head = nn.Linear(width, out_dim)
        initialise(self, recipe.model)
        if self.query_token is not None:
            nn.init.normal_(self.query_token, std=0.02)
            nn.init.zeros_(self.mask_token)

    def forward(self, latents: torch.Tensor, visible: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Predictions (B, T, out) for the patches at hidden (B, T), from latents (B, prefix + V, D) of the
        patches at visible (B, V).
        """
        x = self.embed(
            latents
        ).float()  # the residual stream is fp32 under autocast too, as in the official codes
        asked = self.positions[hidden]
        known = self.positions[visible]
        masks = self.mask_token.expand(len(x), hidden.shape[1], -1)
        if self.cues:
            masks = masks + visual_cues(asked, known, x[:, self.prefix :])
        masks = masks + asked
        x = torch.cat([x[:, : self.prefix], x[:, self.prefix :] + known], dim=1)
        if self.query_token is None:
            seen = x.shape[1]
            out = run_blocks(self.blocks, torch.cat([x, masks], dim=1), self.recompute)[:, seen:]
        else:
            queries = torch.cat([self.query_token.expand(len(x), -1, -1), masks], dim=1)
            out = run_blocks(self.blocks, queries, self.recompute, x)[:, 1:]
        predictions: torch.Tensor = self.head(self.norm(out))
        return predictions


def visual_cues(asked: torch.Tensor, known: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """What a hidden patch may expect of its surroundings: the visible latents (B, V, W) weighted by the
    softmax of the inner products of positions, asked (B, T, W) with known (B, V, W), over sqrt(W).
    """
    weights = (asked @ known.transpose(1, 2) / asked.shape[-1] ** 0.5).softmax(dim=-1)
    cues: torch.Tensor = weights @ latents
    return cues


class CrossBlock(nn.Module):
    """Pre-norm block of queries that attend to themselves (where asked), then to latents, then an MLP."""

    def __init__(self, width: int, heads: int, attends_itself: bool) -> None:
        super().__init__()
        self.norm1 = _norm(width) if attends_itself else None
        self.self_attn = Attention(width, heads, qkv_bias=True) if attends_itself else None
        self.norm2q = _norm(width)
        self.norm2kv = _norm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm3 = _norm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Queries (B, T, W) after one block, given latents (B, V, W)."""
        if self.norm1 is not None and self.self_attn is not None:
            queries = queries + self.self_attn(self.norm1(queries))
        queries = queries + self.cross_attn(self.norm2q(queries), self.norm2kv(latents))
        out: torch.Tensor = queries + self.mlp(self.norm3(queries))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of queries to latents."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B, T, W) from queries (B, T, W) and latents (B, V, W)."""
        b, t, width = queries.shape
        q = self.q_proj(queries).reshape(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv_proj(latents).reshape(b, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        attended: torch.Tensor = self.proj(out.transpose(1, 2).reshape(b, t, width))
        return attended
