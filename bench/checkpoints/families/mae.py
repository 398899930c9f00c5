"""MAE as the official code saves it (facebookresearch/mae, models_mae.py and models_vit.py)."""

from __future__ import annotations

import torch

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import ANCHORS, infer_spec

_TABLE = "fixed sine-cosine position table, taken from the file"


def _matches(root: Root) -> bool:
    keys = root.tensors.keys()
    if "decoder_embed.weight" in keys and "decoder_pos_embed" in keys:
        return True
    if root.path != "model.":
        return False
    finetuned = "fc_norm.weight" in keys and "norm.weight" not in keys
    return finetuned or _fixed_table(root.tensors.get("pos_embed"))


def _fixed_table(table: torch.Tensor | None) -> bool:
    """MAE's table is never trained: the class token's row stays zero, the first patch's is sin 0, cos 0."""
    if table is None or table.ndim != 3 or table.shape[1] < 2 or table.shape[2] % 4:
        return False
    first = table[0, 1].float().reshape(4, -1)
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand_as(first)
    return not table[0, 0].any() and torch.equal(first, expected)


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    finetuned = "fc_norm.weight" in tensors
    spec, notes = infer_spec("mae", tensors, heads, pos_interpolation="bicubic")
    stage = (
        "fine-tuned with mean pooling: the norm follows the mean, patch features carry none"
        if finetuned
        else "pretrained encoder"
    )
    return Draft(tensors, spec, (*notes, stage, *(() if finetuned else (_TABLE,))))


FAMILY = Family(
    name="mae",
    title="MAE, official pre-training and fine-tuning",
    rank=50,
    anchors=ANCHORS,
    matches=_matches,
    draft=_draft,
    known_by="decoder_embed; or `model` with the fixed sine-cosine table; or `model` with fc_norm",
    evaluated="cls after the norm; fine-tuned: mean of the patches, then fc_norm",
    source="facebookresearch/mae",
    drop={
        r"decoder_.*": "decoder",
        r"mask_token": "mask token of the decoder",
        r"head\..*": "classifier head",
    },
)
