"""Plain vision transformers in timm's names: timm, DeiT (also distilled), and whatever is saved like them."""

from __future__ import annotations

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import ANCHORS, infer_spec


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if "attn_pool.latent" in tensors:
        half = (0.5, 0.5, 0.5)
        spec, notes = infer_spec(
            "timm", tensors, heads, usual_heads={1536: 16}, mean=half, std=half, crop_pct=0.9
        )
        siglip = (
            "attention pooling, so SigLIP: mean and std of 0.5; exact GELU is assumed, name the model by "
            "#arch=NAME where timm has tanh (SigLIP 2 in sizes that came with it)"
        )
        return Draft(tensors, spec, (*notes, siglip))
    spec, notes = infer_spec("timm", tensors, heads)
    preprocessing = (
        "ImageNet's mean and std, norm eps 1e-6 and exact GELU are assumed, as the file does not say them; "
        "name the model by #arch=NAME, or set #mean=a:b:c,std=a:b:c, where it differs (timm's augreg: 0.5)"
    )
    return Draft(tensors, spec, (*notes, preprocessing))


FAMILY = Family(
    name="timm",
    title="plain ViT in timm's names (timm, DeiT)",
    rank=0,
    anchors=ANCHORS,
    draft=_draft,
    known_by="the keys of a plain ViT",
    evaluated="cls, or the mean without a class token or with fc_norm",
    source="huggingface/pytorch-image-models",
    prefer=("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model"),
    rename=((r"dist_token", "reg_token"),),
    drop={
        r"head(_dist)?\..*": "classifier head",
        r"pre_logits\..*": "classifier head",
    },
    siblings={
        "head": "head",
        "classifier": "head",
        "fc": "head",
        "projector": "projection head",
        "predictor": "predictor",
        "decoder": "decoder",
        "text": "text tower",
        "logit_scale": "scale of the similarities",
        "logit_bias": "scale of the similarities",
    },
)
