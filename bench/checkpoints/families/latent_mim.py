"""Latent MIM as the official code saves it (yibingwei-1/LatentMIM, main_lmim.py, vits.py).

The patch embedding is a linear map of flattened patches in the order (row, column, colour), which becomes
the equal convolution. The position table is a buffer whose positions are spread over the grid otherwise
than MAE's, so the stored one is used. The official nearest-neighbour evaluation takes the mean of the patch
tokens before the final norm.
"""

from __future__ import annotations

import math

import torch

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import infer_spec


def linear_to_conv(weight: torch.Tensor) -> torch.Tensor:
    """The convolution (D, 3, p, p) that equals a linear map (D, p*p*3) of patches flattened (p, p, 3).

    Raises:
        CheckpointError: the input width is not that of square RGB patches.
    """
    dim, width = weight.shape
    patch = math.isqrt(width // 3)
    if 3 * patch * patch != width:
        raise CheckpointError(f"embed.proj.weight has {width} inputs, which is no square RGB patch")
    return weight.reshape(dim, patch, patch, 3).permute(0, 3, 1, 2)


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    weight, table = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if weight.ndim != 2 or table.ndim != 2:
        raise CheckpointError("the linear patch embedding or the position table has an unknown shape")
    converted = {
        **tensors,
        "patch_embed.proj.weight": linear_to_conv(weight),
        "pos_embed": table[None],
    }
    spec, notes = infer_spec("latent_mim", converted, heads, pooling="mean", final_norm=False)
    return Draft(
        converted,
        spec,
        (
            *notes,
            "linear patch embedding (row, column, colour) turned into the equal convolution",
            "position table taken from the file's buffer",
            "evaluated as its authors do: mean of the patch tokens before the final norm",
        ),
    )


FAMILY = Family(
    name="latent_mim",
    title="Latent MIM, official pre-training",
    rank=90,
    anchors=(
        "pos_embed.pos_embeds",
        "embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    ),
    draft=_draft,
    known_by="pos_embed.pos_embeds and a linear embed.proj",
    evaluated="mean of the patches before the final norm",
    source="yibingwei-1/LatentMIM",
    prefer=("encoder", "target_encoder"),
    rename=(
        (r"pos_embed\.pos_embeds", "pos_embed"),
        (r"embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
    ),
    drop={r"head\..*": "projector", r"mask_token": "mask token"},
    siblings={
        "encoder": "the other encoder of the pair",
        "target_encoder": "the other encoder of the pair",
        "decoder": "decoder and predictor",
    },
)
