"""DINO as the official code saves it (facebookresearch/dino, main_dino.py) and as its hub serves it."""

from __future__ import annotations

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors, stated_args
from ..plain_vit import ANCHORS, depth_of, infer_spec

# Width and heads of the repository's transformers (vision_transformer.py), all of them 12 blocks deep.
_ARCHS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
_DEPTH = 12


def _matches(root: Root) -> bool:
    if root.parts[:1] in (("teacher",), ("student",)):
        head = root.path.removesuffix("backbone.") + "head."
        return any(name.startswith(head) for name in root.tree.tensors)
    # The hub's bare files have DeiT's very keys; their name is all that tells them apart, and timm's
    # config.json beside a file says more than its name.
    return not root.path and root.tree.stem.startswith("dino_") and "architecture" not in root.tree.config


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    arch = str(stated_args(root.tree).get("arch"))
    width, number = _ARCHS.get(arch.replace("deit", "vit"), (0, 0))
    # A fork may use the name for another network: it counts only where the width agrees.
    agrees = tensors["patch_embed.proj.weight"].shape[0] == width
    # One that lost its last blocks still has most of them; a much shallower one is a fork's own.
    if agrees and _DEPTH // 2 < (depth := depth_of(tensors)) < _DEPTH:
        raise CheckpointError(
            f"the file states the arch {arch!r} of {_DEPTH} blocks and has {depth}; if it was trained so, "
            "add #family=timm"
        )
    stated = (number, f"the arch {arch!r} that the file states") if agrees else None
    spec, notes = infer_spec("dino", tensors, heads, stated_heads=stated, pos_interpolation="dino")
    return Draft(tensors, spec, notes)


FAMILY = Family(
    name="dino",
    title="DINO, full checkpoints (teacher and student) and hub files",
    rank=50,
    anchors=ANCHORS,
    matches=_matches,
    draft=_draft,
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
