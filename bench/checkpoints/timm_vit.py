"""Plain vision transformers in timm's names: timm, DeiT (also distilled), and whatever is saved like them."""

from __future__ import annotations

from .family import Draft, Family, Root, Tensors
from .plain_vit import ANCHORS, infer_spec


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    spec, notes = infer_spec("timm", tensors, heads)
    preprocessing = (
        "mean and std are ImageNet's, which the file does not say (timm's augreg weights use 0.5); "
        "set #mean=a:b:c,std=a:b:c or #arch=NAME if the model differs"
    )
    return Draft(tensors, spec, (*notes, preprocessing))


FAMILY = Family(
    name="timm",
    title="plain ViT in timm's names (timm, DeiT)",
    rank=0,
    anchors=ANCHORS,
    draft=_draft,
    prefer=("state_dict_ema", "model_ema", "ema", "teacher", "state_dict", "model"),
    rename=((r"dist_token", "reg_token"),),
    drop={
        r"head(_dist)?\..*": "classifier head",
        r"pre_logits\..*": "classifier head",
    },
    siblings={
        "state_dict": "another copy of the encoder",
        "model": "another copy of the encoder",
        "state_dict_ema": "another copy of the encoder",
        "model_ema": "another copy of the encoder",
        "ema": "another copy of the encoder",
        "head": "head",
        "classifier": "head",
        "fc": "head",
        "projector": "projection head",
        "predictor": "predictor",
        "decoder": "decoder",
        "student": "another encoder",
        "teacher": "another encoder",
    },
)
