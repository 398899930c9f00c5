"""BEiT and BEiT v2 as the official code saves them (microsoft/unilm, beit and beit2), also by DeepSpeed.

The pretrained model is evaluated without its last norm: run_linear_eval.py joins the class token and the mean
of the patches of a block as it is. The fine-tuned one takes the norm of the mean of the patches.
"""

from __future__ import annotations

from ..beit_layout import (
    ANCHORS,
    BLOCK_TABLE,
    DROP,
    HALF,
    IMAGENET,
    SHARED_TABLE,
    image_statistics,
    infer_beit,
)
from ..family import Draft, Family, Root, Tensors


def _is_second(root: Root) -> bool:
    return root.tree.stem.lower().startswith("beitv2") or any(
        name.startswith("cls_pt_layers.") for name in root.tensors
    )


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    statistics, note = (
        image_statistics(root, IMAGENET, "ImageNet's, as in BEiT v2's recipes", HALF)
        if _is_second(root)
        else image_statistics(
            root,
            HALF,
            "BEiT's default of 0.5; its ImageNet-1k runs, BEiT v2 and data2vec take ImageNet's",
            HALF,
            sure=False,
        )
    )
    return infer_beit(
        "beit", root, tensors, heads, notes=(note,), pooling="cls+mean", final_norm=False, **statistics
    )


FAMILY = Family(
    name="beit",
    title="BEiT and BEiT v2, official pre-training and fine-tuning",
    rank=72,
    anchors=(
        *ANCHORS,
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        ("blocks.0.attn.v_bias", BLOCK_TABLE, SHARED_TABLE),
    ),
    # Towers of image-text models share the blocks, not the evaluation.
    matches=lambda root: "visual" not in root.parts,
    draft=_draft,
    known_by="relative_position_bias_table, or q_bias and v_bias beside a qkv without bias",
    evaluated="cls and mean of the patches, without the norm; fine-tuned: mean of the patches, then fc_norm",
    source="microsoft/unilm",
    prefer=("model", "module"),
    drop={**DROP, r"cls_pt_(layers|norm|lm_head)\..*": "head of the pretext task"},
)
