"""Plain vision transformers in timm's names: timm, DeiT (also distilled, and III), and what is like them."""

from __future__ import annotations

from typing import Any

from ..family import Draft, Family, Root, Tensors
from ..hf_images import CLIP, HALF
from ..plain_vit import ANCHORS, infer_spec
from ..siblings import BESIDE, PREFER

_ASSUMED = (
    "ImageNet's mean and std, norm eps 1e-6 and exact GELU are assumed, as the file does not say them; "
    "name the model by #arch=NAME, or set #mean=a:b:c,std=a:b:c, where it differs (timm's augreg: 0.5)"
)
_SIGLIP = (
    "WARNING: attention pooling, so SigLIP, with mean and std of 0.5, and exact GELU is assumed; name the "
    "model by #arch=NAME where timm has tanh (SigLIP 2 in sizes that came with it)"
)
_CLIP = (
    "WARNING: a norm before the blocks, so CLIP, with its mean and std and norm eps 1e-5, and exact GELU is "
    "assumed; name the model by #arch=NAME where it has QuickGELU (OpenAI's, MetaCLIP's, DFN's)"
)


_GAMMA = (
    "WARNING: layer scale in the names of DeiT III, so a plain transformer with learned positions; name the "
    "model by #arch=NAME if it has rotary ones too, as RoPE-ViT (they leave no trace in the file)"
)
LAYER_SCALE = ((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),)
"""Renames of DeiT III's layer scale to timm's."""


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    fields: dict[str, Any] = {}
    said = _ASSUMED
    if "attn_pool.latent" in tensors:
        said = _SIGLIP
        fields = {"usual_heads": {1536: 16}, "mean": HALF.mean, "std": HALF.std, "crop_pct": 0.9}
    elif "norm_pre.weight" in tensors:
        said = _CLIP
        fields = {"eps": 1e-5, "mean": CLIP.mean, "std": CLIP.std, "crop_pct": 0.9}
    spec, notes = infer_spec("timm", tensors, heads, mixed_heads=True, **fields)
    deit = root.tree.stem.startswith("deit_3") or "blocks.0.gamma_1" not in root.tensors
    return Draft(tensors, spec, (*notes, said, *(() if deit else (_GAMMA,))))


FAMILY = Family(
    name="timm",
    title="plain ViT in timm's names (timm, DeiT)",
    rank=0,
    anchors=ANCHORS,
    draft=_draft,
    known_by="the keys of a plain ViT",
    evaluated="cls, or the mean without a class token or with fc_norm",
    source="huggingface/pytorch-image-models",
    prefer=PREFER,
    rename=((r"dist_token", "reg_token"), *LAYER_SCALE),
    drop={
        r"head(_dist)?\..*": "classifier head",
        r"pre_logits\..*": "classifier head",
    },
    siblings={
        **BESIDE,
        "text": "text tower",
        "logit_scale": "scale of the similarities",
        "logit_bias": "scale of the similarities",
    },
)
