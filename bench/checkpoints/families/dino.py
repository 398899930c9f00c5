"""DINO as the official code saves it (facebookresearch/dino, main_dino.py) and as its hub serves it."""

from __future__ import annotations

from ..family import Family, Root
from ..plain_vit import ANCHORS, plain_draft


def _matches(root: Root) -> bool:
    if root.parts[:1] in (("teacher",), ("student",)):
        head = root.path.removesuffix("backbone.") + "head."
        return any(name.startswith(head) for name in root.tree.tensors)
    # The hub's bare files have DeiT's very keys; their name is all that tells them apart.
    return not root.path and root.tree.stem.startswith("dino_")


FAMILY = Family(
    name="dino",
    title="DINO, full checkpoints (teacher and student) and hub files",
    rank=50,
    anchors=ANCHORS,
    matches=_matches,
    draft=plain_draft("dino", pos_interpolation="dino"),
    known_by="teacher and student with a projection head; or a bare file called dino_*",
    evaluated="cls after the norm",
    source="facebookresearch/dino",
    prefer=("teacher", "student"),
    drop={r"head\..*": "projection head"},
    siblings={
        "head": "projection head",
        "student": "the other network of the pair",
        "teacher": "the other network of the pair",
    },
)
