"""DINOv2 as transformers saves it (Dinov2Model, Dinov2WithRegistersModel).

Registers have no position: the class token takes up its own row of the table, which is exact, and the table
is then the patches'.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..family import Draft, Family, Root, Tensors
from ..hf import ATTENTION, BLOCK, CLASSIFIERS, RANK, SOURCE, hf_draft
from ..hf_images import IMAGENET
from ..plain_vit import without_row_for_class
from .hf_vit import EMBEDDINGS

_NAME = "hf_dinov2"


def _timm_layout(tensors: Tensors) -> Tensors:
    """Gate and value of a SwiGLU in one matrix, and the class token with its position beside registers."""
    packed = dict(tensors)
    for name in [name for name in packed if ".mlp.gate." in name]:
        value = packed.pop(name.replace(".gate.", ".value."))
        packed[name.replace(".gate.", ".fc1.")] = torch.cat([packed.pop(name), value])
    if "reg_token" in packed and packed["pos_embed"].ndim == 3:
        return without_row_for_class(packed)
    return packed


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    registers = "reg_token" in tensors
    return hf_draft(
        _NAME,
        eps=1e-6,
        preprocessing=lambda root, config: replace(IMAGENET, image_size=224),
        prepare=_timm_layout,
        says=("registers have no position: the class token's is added to the token",) if registers else (),
        no_embed_class=registers,
        pos_interpolation="antialias" if registers else "bicubic",
    )(root, tensors, heads)


FAMILY = Family(
    name=_NAME,
    title="DINOv2 of transformers, also with registers",
    rank=RANK,
    anchors=(
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.position_embeddings",
        "encoder.layer.0.layer_scale1.lambda1",
    ),
    draft=_draft,
    known_by="embeddings.patch_embeddings.projection and layer_scale1.lambda1",
    evaluated="cls after the norm",
    source=SOURCE,
    rename=(
        *EMBEDDINGS,
        (r"embeddings\.register_tokens", "reg_token"),
        *ATTENTION,
        (rf"{BLOCK}norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (rf"{BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"{BLOCK}mlp\.(?:fc1|weights_in)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (rf"{BLOCK}mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.gate.\2"),
        (rf"{BLOCK}mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.value.\2"),
        (rf"{BLOCK}mlp\.(?:fc2|weights_out|down_proj)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ),
    drop={r"embeddings\.mask_token": "mask token of the pre-training"},
    siblings=CLASSIFIERS,
)
