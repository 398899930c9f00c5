"""MSN as the official code saves it (facebookresearch/msn, src/msn_train.py).

The official evaluation (logistic_eval.py) reads the target encoder, and takes the class token after the norm.
It resizes bilinearly, torchvision's default.
"""

from __future__ import annotations

from ..family import Family, Root
from ..plain_vit import ANCHORS, plain_draft


def _matches(root: Root) -> bool:
    return root.parts in (("encoder",), ("target_encoder",)) or (
        root.parts[:-1] in (("encoder",), ("target_encoder",)) and root.parts[-1] == "module"
    )


FAMILY = Family(
    name="msn",
    title="MSN, official pre-training",
    rank=57,
    anchors=(*ANCHORS, "cls_token", "fc.fc1.weight"),
    matches=_matches,
    draft=plain_draft("msn", pos_interpolation="bicubic", interpolation="bilinear"),
    known_by="encoder and target_encoder with a class token and the projection head fc.fc1",
    evaluated="cls after the norm of the target encoder",
    source="facebookresearch/msn",
    prefer=("target_encoder", "encoder"),
    drop={r"fc\..*": "projection head", r"pred\..*": "prediction head"},
    siblings={
        "encoder": "the other network of the pair",
        "target_encoder": "the other network of the pair",
        "prototypes": "prototypes",
    },
)
