"""What an encoder is trained for: labels, or the pixels that it does not see.

An objective is a module that holds the encoder and maps a batch to its loss. The encoder is always a
plain vision transformer under the names that the loader knows, so that what is trained here is scored
without conversion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


def sincos_positions(dim: int, grid: int) -> torch.Tensor:
    """Fixed two-dimensional sine-cosine positions, (grid * grid, dim): the first half of the channels
    encodes the column, the second the row, each as sines then cosines over geometric frequencies
    (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; facebookresearch/mae).

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    steps = torch.arange(grid, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    halves = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Images (B, 3, H, W) to flattened patches (B, N, patch * patch * 3), pixels in (row, column, channel)
    order as in MAE.
    """
    b, c, height, width = images.shape
    cells = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


class Supervised(nn.Module):
    """Cross-entropy with label smoothing 0.1 on mean-pooled patch tokens."""

    def __init__(self, encoder: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch, a scalar."""
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        loss: torch.Tensor = F.cross_entropy(self.head(tokens.mean(1)), labels, label_smoothing=0.1)
        return loss


class MaskedAutoencoder(nn.Module):
    """MAE: the encoder sees a random quarter of the patches, a small decoder paints the rest.

    The loss is the mean squared error on the masked patches, each patch's pixels standardised
    (He et al., CVPR 2022; facebookresearch/mae).

    Args:
        encoder: plain vision transformer with a class token; its position table is set to fixed
            sine-cosine positions.
        mask_ratio: share of the patches that is hidden.
        decoder_dim, decoder_depth, decoder_heads: shape of the decoder.
    """

    decoder_positions: torch.Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.patch = int(encoder.patch_embed.patch_size[0])
        grid = int(encoder.patch_embed.grid_size[0])
        assert encoder.pos_embed is not None
        with torch.no_grad():
            encoder.pos_embed.zero_()
            encoder.pos_embed[0, encoder.num_prefix_tokens :] = sincos_positions(encoder.embed_dim, grid)
        encoder.pos_embed.requires_grad_(False)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("decoder_positions", sincos_positions(decoder_dim, grid)[None])
        self.decoder = nn.Sequential(
            *(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)),
            nn.LayerNorm(decoder_dim),
        )
        self.decoder_pred = nn.Linear(decoder_dim, self.patch**2 * 3)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch, a scalar; the labels are not used."""
        tokens = self.encoder.patch_embed(images)
        b, n, _ = tokens.shape
        visible = round(n * (1 - self.mask_ratio))
        order = torch.rand(b, n, generator=generator).argsort(dim=1).to(images.device)
        latents = self._encode(tokens, order[:, :visible])
        predictions = self._decode(latents, order)
        target = patchify(images, self.patch)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        hidden = order[:, visible:]
        error = _take(predictions, hidden) - _take(target, hidden)
        return error.square().mean()

    def _encode(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        assert encoder.pos_embed is not None
        assert encoder.cls_token is not None
        x = _take(tokens + encoder.pos_embed[:, encoder.num_prefix_tokens :], visible)
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        latents: torch.Tensor = encoder.norm(encoder.blocks(x))
        return latents

    def _decode(self, latents: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = self.decoder_embed(latents)
        b, n = order.shape
        patches = torch.cat([x[:, 1:], self.mask_token.expand(b, n - (x.shape[1] - 1), -1)], dim=1)
        restored = _take(patches, order.argsort(dim=1)) + self.decoder_positions
        decoded = self.decoder(torch.cat([x[:, :1], restored], dim=1))
        predictions: torch.Tensor = self.decoder_pred(decoded[:, 1:])
        return predictions


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x (B, N, D) at index (B, M), as (B, M, D)."""
    b, n, d = x.shape
    # Selecting whole rows: the gradient of an element-wise gather is several times slower on the CPU.
    rows = index + n * torch.arange(b, device=index.device)[:, None]
    return x.reshape(b * n, d).index_select(0, rows.reshape(-1)).reshape(b, -1, d)
