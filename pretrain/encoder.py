"""The encoder in training: a plain vision transformer that is shown some patches of an image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..bench.vit import build_vit
from .patches import sincos_positions
from .recipe import Recipe
from .sections import ModelConfig, ProjectorConfig

_STD = 0.02


class PatchEncoder(nn.Module):
    """A timm ``VisionTransformer`` on flattened patches, and the latent projector behind it.

    Only the patches that are passed in are embedded and attended to. ``vit`` is what is scored afterwards.

    Args:
        recipe: shape, positions and initialisation; the global random state is drawn from.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.vit: VisionTransformer = build_vit(recipe.spec().arch, str(torch.get_default_device()))
        self.projector = build_projector(recipe.projector, self.vit.embed_dim)
        self.recompute = recipe.engine.activation_checkpointing
        initialise(self, recipe.model)
        _set_positions(self.vit, recipe.model, recipe.grid)

    @property
    def prefix(self) -> int:
        """Class and register tokens, which come before the patches."""
        return int(self.vit.num_prefix_tokens)

    def forward(self, patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Projected latents (B, prefix + M, D) of patches (B, M, p*p*3) at grid positions index (B, M)."""
        latents: torch.Tensor = self.projector(
            self.vit.norm(run_blocks(self.vit.blocks, self.embed(patches, index), self.recompute))
        )
        return latents

    def top_blocks(self, patches: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
        """The mean of the layer-normed outputs of the last ``count`` blocks, (B, prefix + M, D): data2vec's
        target (facebookresearch/data2vec_vision, ``layer_results end``, ``target_layer_norm_last``).
        """
        x = self.embed(patches, index)
        blocks = list(self.vit.blocks)
        total = torch.zeros_like(x, dtype=torch.float32)
        for i, block in enumerate(blocks):
            x = run_blocks([block], x, self.recompute)
            if i >= len(blocks) - count:
                total = total + F.layer_norm(x.float(), x.shape[-1:])
        return total / count

    def embed(self, patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Tokens (B, prefix + M, D) with their positions."""
        vit = self.vit
        weight = vit.patch_embed.proj.weight  # a convolution whose stride is its size is a linear map
        x = F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), vit.patch_embed.proj.bias)
        assert vit.pos_embed is not None
        positions = vit.pos_embed[0]
        # The residual stream is fp32 under autocast too, as in the official codes: positions promote it.
        x = x + positions[self.prefix :][index]
        first: list[torch.Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if not first:
            return x
        prefix = torch.cat(first, dim=1) + positions[: self.prefix]
        return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)


def run_blocks(
    blocks: Iterable[nn.Module], x: torch.Tensor, recompute: bool, *seen: torch.Tensor
) -> torch.Tensor:
    """Transformer blocks one after another; with ``recompute`` their activations are not kept.

    ``seen`` is handed to every block beside ``x``: what cross-attention looks at.
    """
    for block in blocks:
        again = recompute and x.requires_grad
        x = checkpoint(block, x, *seen, use_reentrant=False) if again else block(x, *seen)
    return x


class Projector(nn.Sequential):
    """Layers one after another, with a ``forward`` of its own: torch 2.11 compiles none of a plain
    ``nn.Sequential``, and does not say so.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project tokens (..., D)."""
        for layer in self:
            x = layer(x)
        return x


def build_projector(config: ProjectorConfig, dim: int) -> Projector:
    """The projector of the official code: linear maps without bias, each followed by a layer norm, GELU
    between them; the identity where its depth is 0 (yibingwei-1/LatentMIM, models_lmim.py).
    """
    layers: list[nn.Module] = []
    for i in range(config.depth):
        last = i == config.depth - 1
        width = dim if i == 0 else config.hidden_dim
        out = dim if last else config.hidden_dim
        layers += [nn.Linear(width, out, bias=False), nn.LayerNorm(out)]
        if not last:
            layers.append(nn.GELU())
    return Projector(*layers)


def initialise(module: nn.Module, config: ModelConfig) -> None:
    """Initialise as the methods do: Xavier-uniform linear maps (MAE, Latent MIM), normal with standard
    deviation 0.02 (I-JEPA, whose ``init_model`` overrules the networks' own), or that with the output of
    block i divided by sqrt(2 i) (BEiT, data2vec); biases 0, tokens 0.02.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            if config.init == "xavier":
                # The patch embedding counts as the linear map that it is.
                nn.init.xavier_uniform_(part.weight.data.view(part.weight.shape[0], -1))
            else:
                nn.init.trunc_normal_(part.weight, std=_STD)
                block = name.split("blocks.")[-1].split(".")[0]
                if config.init == "beit" and block.isdigit() and name.endswith(("attn.proj", "mlp.fc2")):
                    part.weight.data.div_((2.0 * (int(block) + 1)) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "reg_token", "mask_token")):
            nn.init.normal_(parameter, std=_STD)


def _set_positions(vit: VisionTransformer, config: ModelConfig, grid: int) -> None:
    assert vit.pos_embed is not None
    with torch.no_grad():
        if config.positions == "learned":
            nn.init.trunc_normal_(vit.pos_embed, std=_STD)
            return
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = sincos_positions(vit.embed_dim, grid, config.positions)
    vit.pos_embed.requires_grad_(False)
