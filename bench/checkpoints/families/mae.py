"""MAE as the official code saves it (facebookresearch/mae, models_mae.py and models_vit.py), and as
solo-learn does, whose tiny and small networks have 12 heads (solo/backbones/vit/vit_mae.py)."""

from __future__ import annotations

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import ANCHORS, first_axis, infer_spec
from ..siblings import BESIDE

_TABLE = "fixed sine-cosine position table, taken from the file"


def _matches(root: Root) -> bool:
    keys = root.tensors.keys()
    if ("decoder_embed.weight" in keys and "decoder_pos_embed" in keys) or _is_solo_learns(root):
        return True
    if root.path != "model.":
        return False
    finetuned = "fc_norm.weight" in keys and "norm.weight" not in keys
    return finetuned or first_axis(root.tensors.get("pos_embed")) == "columns"


def _is_solo_learns(root: Root) -> bool:
    decoder = root.path.removesuffix("backbone.") + "decoder.decoder_embed.weight"
    return root.path.endswith("backbone.") and decoder in root.tree.tensors


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    finetuned = "fc_norm.weight" in tensors
    usual = {192: 12, 384: 12} if _is_solo_learns(root) else {}
    spec, notes = infer_spec(
        "mae", tensors, heads, usual_heads=usual, mixed_heads=True, pos_interpolation="bicubic"
    )
    stage = (
        "fine-tuned with mean pooling: the norm follows the mean, patch features carry none"
        if finetuned
        else "pretrained encoder"
    )
    return Draft(tensors, spec, (*notes, stage, *(() if finetuned else (_TABLE,))))


FAMILY = Family(
    name="mae",
    title="MAE, official pre-training and fine-tuning, and solo-learn's",
    rank=50,
    anchors=ANCHORS,
    matches=_matches,
    draft=_draft,
    known_by="decoder_embed, also beside backbone; or `model` with its sine-cosine table, or with fc_norm",
    evaluated="cls after the norm; fine-tuned: mean of the patches, then fc_norm",
    source="facebookresearch/mae, vturrisi/solo-learn",
    drop={
        r"decoder_.*": "decoder",
        r"mask_token": "mask token of the decoder",
        r"head\..*": "classifier head",
    },
    siblings=BESIDE,
)
