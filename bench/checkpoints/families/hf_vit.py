"""ViT, DeiT, MAE, MSN and I-JEPA as transformers saves them (ViTModel, DeiTModel, ViTMAEModel, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..family import Family, Root
from ..hf import ATTENTION, BLOCK, CLASSIFIERS, RANK, SOURCE, hf_draft
from ..hf_images import HALF, IMAGENET, Preprocessing

ANCHORS = (
    "embeddings.patch_embeddings.projection.weight",
    ("encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"),
    ("encoder.layer.0.attention.attention.query.weight", "layers.0.attention.q_proj.weight"),
)
BLOCKS = (
    *ATTENTION,
    (rf"{BLOCK}layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (rf"{BLOCK}layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (rf"{BLOCK}(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{BLOCK}(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)
EMBEDDINGS = (
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"layernorm\.(\w+)", r"norm.\1"),
)


def is_beit(root: Root) -> bool:
    """BEiT and data2vec have no bias for the keys, where ViT has three biases or none."""
    return any(
        f"{block}{query}.bias" in root.tensors and f"{block}{key}.bias" not in root.tensors
        for block, query, key in (
            ("encoder.layer.0.attention.", "attention.query", "attention.key"),
            ("layers.0.attention.", "q_proj", "k_proj"),
        )
    )


def _preprocessing(root: Root, config: Mapping[str, Any]) -> Preprocessing:
    if not config:
        return replace(IMAGENET, why="WARNING: ImageNet's mean and std are assumed (Google's ViT has 0.5)")
    return HALF if config.get("model_type") == "vit" else IMAGENET


FAMILY = Family(
    name="hf_vit",
    title="ViT, DeiT, MAE, MSN and I-JEPA of transformers",
    rank=RANK,
    anchors=(*ANCHORS, "embeddings.position_embeddings"),
    matches=lambda root: not is_beit(root),
    draft=hf_draft("hf_vit", eps=1e-12, preprocessing=_preprocessing, pos_interpolation="bicubic"),
    known_by="embeddings.patch_embeddings.projection and layernorm_before",
    evaluated="cls after the norm; without a class token (I-JEPA) the mean",
    source=SOURCE,
    rename=(*EMBEDDINGS, (r"embeddings\.distillation_token", "reg_token"), *BLOCKS),
    drop={
        r"pooler\..*": "pooler, which no self-supervised method trains",
        r"embeddings\.mask_token": "mask token",
    },
    siblings={**CLASSIFIERS, "decoder": "decoder"},
)
