"""data2vec for images as the official code saves it (facebookresearch/data2vec_vision, beit/run_cyclical.py).

The network is BEiT's. Its linear evaluation (run_class_finetuning.py --linear_classifier) takes the mean of
the patches without the norm of the pre-training. Fine-tuned files are laid out and read as BEiT's.
"""

from __future__ import annotations

from ..beit_layout import ANCHORS, DROP, HALF, IMAGENET, image_statistics, infer_beit
from ..family import Draft, Family, Root, Tensors


def _matches(root: Root) -> bool:
    head = root.tensors["lm_head.weight"]
    return head.ndim == 2 and head.shape[0] == head.shape[1] and "visual" not in root.parts


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    statistics, note = image_statistics(root, IMAGENET, "ImageNet's, as in data2vec's recipes", HALF)
    return infer_beit(
        "data2vec", root, tensors, heads, notes=(note,), pooling="mean", final_norm=False, **statistics
    )


FAMILY = Family(
    name="data2vec",
    title="data2vec for images, official pre-training",
    rank=74,
    anchors=(*ANCHORS, "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "mask_token", "lm_head.weight"),
    matches=_matches,
    draft=_draft,
    known_by="BEiT's keys with a square lm_head",
    evaluated="mean of the patches, without the norm",
    source="facebookresearch/data2vec_vision",
    prefer=("model", "module"),
    drop=DROP,
)
