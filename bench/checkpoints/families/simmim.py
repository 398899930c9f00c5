"""SimMIM with a plain transformer as the official code saves it (microsoft/SimMIM).

The network is BEiT's. The repository evaluates by fine-tuning only: the mean of the patches, then a norm. The
pre-trained encoder ends in the norm whose output its decoder reads. SimMIM with a Swin transformer is another
family.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..beit_layout import ANCHORS, BLOCK_TABLE, DROP, IMAGENET, SHARED_TABLE, infer_beit
from ..family import Draft, Family, Root, Tensors


def _matches(root: Root) -> bool:
    if root.parts[-1:] == ("encoder",) and "mask_token" in root.tensors:
        decoder = root.tree.tensors.get(root.path.removesuffix("encoder.") + "decoder.0.weight")
        return decoder is not None and decoder.ndim == 4
    # A fine-tuned file has BEiT's very keys: only the configuration of the run tells it.
    config = root.tree.payload.get("config")
    model = config.get("MODEL") if isinstance(config, Mapping) else None
    return isinstance(model, Mapping) and model.get("TYPE") == "vit"


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    notes = ("ImageNet's mean and std, as SimMIM always takes",)
    return infer_beit("simmim", root, tensors, heads, notes=notes, pooling="mean", crop_pct=0.875, **IMAGENET)


FAMILY = Family(
    name="simmim",
    title="SimMIM with a plain ViT, official pre-training and fine-tuning",
    rank=76,
    anchors=(
        *ANCHORS,
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        ("blocks.0.attn.v_bias", BLOCK_TABLE, SHARED_TABLE),
    ),
    matches=_matches,
    draft=_draft,
    known_by="encoder.mask_token beside a convolution decoder.0; or BEiT's keys with SimMIM's configuration",
    evaluated="mean of the patches after the norm; fine-tuned: mean of the patches, then fc_norm",
    source="microsoft/SimMIM",
    prefer=("model",),
    drop=DROP,
    siblings={"decoder": "decoder"},
)
