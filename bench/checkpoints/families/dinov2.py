"""DINOv2: the bare files of its hub and the teachers that its trainer saves (facebookresearch/dinov2).

The hub's models come without registers (position table resampled by DINO's rule) or with four of them
(resampled to the new size with antialias). Registers have no position: the class token takes up its own row
of the table, which is exact, and the table is then the patches'. The trainer cuts the blocks into chunks and
counts them through (``blocks.1.7`` is block 7). The official k-nearest-neighbour evaluation takes the class
token after the norm at 224 pixels, whatever size the table is made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import infer_spec, refuse_without_scale, without_row_for_class

EVALUATED_AT = 224
ANCHORS: tuple[str | tuple[str, ...], ...] = (
    "patch_embed.proj.weight",
    "cls_token",
    "pos_embed",
    "mask_token",
    ("blocks.0.attn.qkv.weight", "blocks.0.0.attn.qkv.weight"),
)
RENAME = (
    (r"register_tokens", "reg_token"),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),
)
DROP = {r"mask_token": "mask token of the pre-training"}
SIBLINGS = {
    "dino_head": "projection head",
    "ibot_head": "projection head",
    "student": "the other network of the pair",
    "teacher": "the other network of the pair",
    "dino_loss": "training state",
    "ibot_patch_loss": "training state",
}


def draft(family: str, root: Root, tensors: Tensors, heads: int | None, usual: Mapping[int, int]) -> Draft:
    """The draft of a network of DINOv2's code.

    Raises:
        CheckpointError: the MLP or the position table has an unknown shape, or there is no layer scale.
    """
    refuse_without_scale(family, tensors)
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise CheckpointError(f"the blocks of {root.title!r} have neither mlp.fc1 nor the SwiGLU's mlp.w12")
    registers = "reg_token" in tensors
    table = tensors["pos_embed"]
    side = math.isqrt(table.shape[1] - 1) if table.ndim == 3 else 0
    if side == 0 or side * side != table.shape[1] - 1:
        raise CheckpointError(
            f"pos_embed has shape {tuple(table.shape)}; expected one row and a square grid of them"
        )
    own_size = side * tensors["patch_embed.proj.weight"].shape[-1]
    fields: dict[str, Any] = {"usual_heads": usual, "pos_interpolation": "dino"}
    notes = []
    if registers:
        tensors = without_row_for_class(tensors)
        fields |= {"pos_interpolation": "antialias", "no_embed_class": True, "image_size": own_size}
        notes.append("registers have no position: the class token's is added to the token")
    spec, how = infer_spec(family, tensors, heads, **fields)
    if own_size != EVALUATED_AT and not EVALUATED_AT % spec.patch_size:
        spec = spec.model_copy(update={"image_size": EVALUATED_AT})
        notes.append(
            f"images of {EVALUATED_AT} pixels, as the official evaluation has them; the position table is "
            f"for {own_size}, set #image_size={own_size} for that"
        )
    return Draft(tensors, spec, (*how, *notes))


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    return draft("dinov2", root, tensors, heads, {})


def is_dinov2(root: Root) -> bool:
    """The mask token of DINOv2 and its descendants has two dimensions, that of others three."""
    return root.tensors["mask_token"].ndim == 2


FAMILY = Family(
    name="dinov2",
    title="DINOv2, hub files (also with registers) and teachers of its trainer",
    rank=78,
    anchors=ANCHORS,
    matches=is_dinov2,
    draft=_draft,
    known_by="a class token, a position table and a mask token of shape (1, D)",
    evaluated="cls after the norm, at 224 pixels",
    source="facebookresearch/dinov2",
    prefer=("teacher", "student"),
    rename=RENAME,
    drop=DROP,
    siblings=SIBLINGS,
)
