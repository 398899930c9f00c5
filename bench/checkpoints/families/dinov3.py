"""DINOv3: hub files and the teacher that training writes (facebookresearch/dinov3).

Positions are rotary, so any image size will do, and the file's own table of periods says the number of heads.
The bias of the keys is masked in the official models. Files of the satellite models (SAT-493M) have the same keys
and another mean and deviation.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, infer_heads
from ..timm_build import ratio_of, timm_draft

_BASE = 100.0
_SATELLITE = "0.430:0.411:0.296,std=0.213:0.156:0.143"


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if "cls_norm.weight" in tensors:
        raise CheckpointError("this DINOv3 has a norm of its own for the class token, which is not supported")
    tensors = dict(tensors)
    periods = tensors.pop("rope_embed.periods").float()
    depth = depth_of(tensors)
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    n_heads, note = infer_heads(
        dim, depth, heads, stated=(dim // (4 * len(periods)), "the table of rotary periods")
    )
    steps = torch.arange(len(periods)) / len(periods)
    if not torch.allclose(periods, _BASE**steps, rtol=1e-2):
        raise CheckpointError(f"the rotary periods are not those of base {_BASE:g}; this variant is not known")
    biased = _split_bias(tensors, depth)
    swiglu = "blocks.0.mlp.fc1_g.weight" in tensors
    hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    size = 224 // patch * patch
    return timm_draft(
        "dinov3",
        "vit_small_plus_patch16_dinov3_qkvb" if swiglu else "vit_small_patch16_dinov3_qkvb",
        {
            "embed_dim": dim,
            "depth": depth,
            "num_heads": n_heads,
            "patch_size": patch,
            "img_size": size,
            "mlp_ratio": ratio_of(hidden, dim),
            "num_reg_tokens": tensors["reg_token"].shape[1],
            "qkv_bias": biased,
            "global_pool": "token",
            **({"swiglu_align_to": 1} if swiglu else {}),
        },
        tensors,
        notes=(
            note,
            "rotary positions: any image size",
            f"ImageNet's mean and std (LVD-1689M); for SAT-493M set #mean={_SATELLITE}",
        ),
        image_size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.875,
        pooling="cls",
    )


def _split_bias(tensors: dict[str, torch.Tensor], depth: int) -> bool:
    """Put the biases of queries and values in timm's names; returns whether there are any.

    Raises:
        CheckpointError: the keys have a bias, for which timm's model has no place.
    """
    for i in range(depth):
        mask = tensors.pop(f"blocks.{i}.attn.qkv.bias_mask", None)
        bias = tensors.pop(f"blocks.{i}.attn.qkv.bias", None)
        if bias is None:
            continue
        query, key, value = bias.chunk(3)
        if mask is None and key.any():
            raise CheckpointError(
                "this DINOv3 was trained with a bias of the keys (mask_k_bias: false), which is not supported"
            )
        tensors[f"blocks.{i}.attn.q_bias"], tensors[f"blocks.{i}.attn.v_bias"] = query, value
    return "blocks.0.attn.q_bias" in tensors


FAMILY = Family(
    name="dinov3",
    title="DINOv3, hub files and training teachers",
    rank=82,
    anchors=("rope_embed.periods", "storage_tokens", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    draft=_draft,
    known_by="storage_tokens and rope_embed.periods",
    evaluated="cls after the norm",
    source="facebookresearch/dinov3",
    prefer=("teacher", "model_ema", "student"),
    rename=(
        (r"storage_tokens", "reg_token"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.gamma_\2"),
        (r"blocks\.(\d+)\.mlp\.w1\.(\w+)", r"blocks.\1.mlp.fc1_g.\2"),
        (r"blocks\.(\d+)\.mlp\.w2\.(\w+)", r"blocks.\1.mlp.fc1_x.\2"),
        (r"blocks\.(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ),
    drop={r"mask_token": "mask token", r"local_cls_norm\..*": "norm that only training uses"},
    siblings={
        "dino_head": "projection head",
        "ibot_head": "projection head",
        "gram_backbone": "the teacher of the Gram loss",
        "student": "the other network of the pair",
        "teacher": "the other network of the pair",
    },
)
