"""iBOT as the official code saves it (bytedance/ibot: main_ibot.py, extract_backbone_weights.py)."""

from __future__ import annotations

from ..family import Family, Root
from ..plain_vit import ANCHORS, plain_draft


def _matches(root: Root) -> bool:
    return "masked_embed" in root.tensors or any(
        name.startswith(root.path.removesuffix("backbone.") + "head.last_layer2.")
        for name in root.tree.tensors
    )


FAMILY = Family(
    name="ibot",
    title="iBOT, full checkpoints (teacher and student) and extracted backbones",
    rank=58,
    anchors=ANCHORS,
    matches=_matches,
    draft=plain_draft("ibot", pos_interpolation="dino"),
    known_by="masked_embed, or a projection head with last_layer2",
    evaluated="cls after the norm",
    source="bytedance/ibot",
    prefer=("teacher", "student"),
    rename=((r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),),
    drop={r"masked_embed": "embedding of masked patches", r"head\..*": "projection head"},
    siblings={
        "head": "projection head",
        "student": "the other network of the pair",
        "teacher": "the other network of the pair",
        "ibot_loss": "training state",
    },
)
