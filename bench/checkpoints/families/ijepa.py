"""I-JEPA as the official code saves it (facebookresearch/ijepa, src/train.py).

There is no class token: the representation is the mean of all tokens after the norm. The file holds the
online and the target encoder; the paper evaluates the target encoder. timm and transformers convert
``encoder``.
"""

from __future__ import annotations

from ..family import Family, Root
from ..plain_vit import ANCHORS, plain_draft


def _matches(root: Root) -> bool:
    if "cls_token" in root.tensors or root.tensors["patch_embed.proj.weight"].ndim != 4:
        return False
    pair = {"encoder", "target_encoder"}
    if root.parts[:1] in {(name,) for name in pair} and pair <= root.tree.payload.keys():
        return True
    return any("predictor_embed" in name.split(".") for name in root.tree.tensors)


FAMILY = Family(
    name="ijepa",
    title="I-JEPA, official pre-training",
    rank=54,
    anchors=(*ANCHORS, "pos_embed"),
    matches=_matches,
    draft=plain_draft(
        "ijepa",
        pooling="mean",
        # The published giants have 16 heads of width 88.
        usual_heads={1408: 16},
        pos_interpolation="bicubic",
        says=("fixed sine-cosine position table, taken from the file",),
    ),
    known_by="no class token, and encoder and target_encoder, or a sibling predictor with predictor_embed",
    evaluated="mean of the tokens after the norm of the target encoder",
    source="facebookresearch/ijepa",
    prefer=("target_encoder", "encoder"),
    siblings={
        "encoder": "the other network of the pair",
        "target_encoder": "the other network of the pair",
        "predictor": "predictor",
    },
)
