"""Swin transformers: timm's files, the official ones (microsoft/Swin-Transformer) and SimMIM's
pre-training.

The official names count the merging of patches to the stage before it, timm's to the stage after. Heads
and windows follow from the tables of position biases; the size of the image from the attention masks where
they are stored.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ...errors import CheckpointError
from ...types import IMAGENET_MEAN, IMAGENET_STD
from ...vit import ratio_of
from ..family import Draft, Family, Root, Tensors
from ..siblings import BESIDE, PREFER
from ..timm_build import timm_draft

_ANCHORS = (
    "layers.0.blocks.0.attn.relative_position_bias_table",
    "layers.0.blocks.0.attn.qkv.weight",
    "patch_embed.proj.weight",
)


def _draft(family: str, root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if heads is not None:
        raise CheckpointError(
            f"the tables of position biases say the number of heads; leave out heads={heads}"
        )
    stages = sorted({int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))})
    tables = [tensors[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    depths = [
        len({m[1] for name in tensors if (m := re.match(rf"layers\.{i}\.blocks\.(\d+)\.", name))})
        for i in stages
    ]
    side = math.isqrt(tables[0].shape[0])
    window = (side + 1) // 2
    if side * side != tables[0].shape[0] or side % 2 == 0:
        raise CheckpointError(
            f"a table of position biases has {len(tables[0])} rows, which is no square window"
        )
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    size, said = _image_size(root, patch, window, len(stages))
    kwargs: dict[str, Any] = {
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": window,
        "patch_size": patch,
        "img_size": size,
        "mlp_ratio": ratio_of(tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0], dim),
    }
    official = any(name.startswith("layers.0.downsample.") for name in tensors)
    if official:
        tensors = {re.sub(r"^layers\.(\d+)\.downsample\.", _next, name): t for name, t in tensors.items()}
    return timm_draft(
        family,
        "swin_tiny_patch4_window7_224",
        kwargs,
        tensors,
        notes=(f"windows of {window}x{window}", said, "other image sizes keep the windows and pad"),
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bicubic",
        crop_pct=0.875,
        pooling="mean",
    )


def _next(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample."


def _image_size(root: Root, patch: int, window: int, stages: int) -> tuple[int, str]:
    """The side of the image, and how it is known: published models end in one window."""
    mask = next(
        (root.tensors[n] for n in root.tensors if re.fullmatch(r"layers\.0\.blocks\.1\.attn_mask", n)), None
    )
    if mask is not None:
        size = math.isqrt(mask.shape[0]) * window * patch
        return size, f"trained at {size} pixels, from the attention masks"
    size = patch * 2 ** (stages - 1) * window
    return size, f"{size} pixels, where the last stage is one window; set #image_size= if that is wrong"


def _family(name: str, title: str, rank: int, **rest: Any) -> Family:
    return Family(
        name=name,
        title=title,
        rank=rank,
        anchors=_ANCHORS,
        draft=lambda root, tensors, heads: _draft(name, root, tensors, heads),
        evaluated="mean of the last map after the norm",
        prefer=PREFER,
        drop={
            r"(?:.*\.)?relative_position_index": "positions that follow from the windows",
            r"(?:.*\.)?attn_mask": "masks that follow from the windows",
            r"head\..*": "classifier head",
            r"head_dense\..*": "projection head",
            r"mask_token": "mask token",
        },
        **rest,
    )


def _is_simmim(root: Root) -> bool:
    return "mask_token" in root.tensors


FAMILIES = (
    _family(
        "swin",
        "Swin transformers, official and timm's",
        40,
        known_by="layers.0.blocks.0.attn.relative_position_bias_table",
        source="microsoft/Swin-Transformer",
        matches=lambda root: not _is_simmim(root),
        siblings=BESIDE,
    ),
    _family(
        "simmim_swin",
        "SimMIM with a Swin transformer, pre-training",
        76,
        known_by="Swin's keys with a mask token",
        source="microsoft/SimMIM",
        matches=_is_simmim,
        siblings={"decoder": "decoder"},
    ),
)
