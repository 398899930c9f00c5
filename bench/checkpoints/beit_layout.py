"""What the shapes say of a file of the BEiT code bases: BEiT, BEiT v2, data2vec, SimMIM's ViT and EVA-02.

Here the number of heads is exact: a table of relative positions has a column a head, and a rotary table has
the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..networks.beit import beit_spec, rotations
from ..types import IMAGENET_MEAN, IMAGENET_STD
from .family import Draft, Root, Tensors, stated_args
from .plain_vit import depth_of, infer_heads, patches_of

Statistics = dict[str, Any]
IMAGENET: Statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
HALF: Statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP: Statistics = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_SET_IMAGENET = "#mean=0.485:0.456:0.406,std=0.229:0.224:0.225"

ANCHORS = ("patch_embed.proj.weight", "cls_token", "blocks.0.norm1.weight", "blocks.0.attn.proj.weight")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.0.attn.relative_position_bias_table"
DROP = {
    r"mask_token": "mask token",
    r"lm_head\..*": "head of the pretext task",
    r"head\..*": "classifier head",
    r"(.*\.)?relative_position_index": "buffer that follows from the grid",
    r"(.*\.)?rope\.freqs_(cos|sin)": "buffer that follows from the grid",
}


def image_statistics(
    root: Root, default: Statistics, why: str, other: Statistics, *, sure: bool = True
) -> tuple[Statistics, str]:
    """Mean and deviation of the images, and a note on them.

    These trainers have an option for ImageNet's; ``other`` are those without it. Where neither the file nor
    timm's config.json beside it says, ``default`` is taken, ``why`` in words; ``sure`` where all published
    files of the layout agree.
    """
    config = root.tree.config.get("pretrained_cfg")
    if isinstance(config, Mapping) and "mean" in config and "std" in config:
        return {"mean": tuple(config["mean"]), "std": tuple(config["std"])}, "mean and std from config.json"
    stated = stated_args(root.tree).get("imagenet_default_mean_and_std")
    if isinstance(stated, bool):
        return (IMAGENET if stated else other), "mean and std as the options in the file say"
    if sure:
        return default, f"mean and std: {why}"
    return default, f"WARNING: mean and std are assumed ({why}); for ImageNet's add {_SET_IMAGENET}"


def infer_beit(
    family: str,
    root: Root,
    tensors: Tensors,
    heads: int | None,
    *,
    notes: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Draft:
    """The draft of a transformer of the BEiT kind from tensors in BEiT's names.

    ``options`` are fields of ``BeitArch`` that no shape tells, ``fields`` go to the spec.

    Raises:
        CheckpointError: the shapes do not go together, or ``heads`` is not what the file says.
    """
    dim, patch = patches_of(tensors)
    shared, of_block = tensors.get(SHARED_TABLE), tensors.get(BLOCK_TABLE)
    table = shared if shared is not None else of_block
    side = _side(table, tensors.get("pos_embed"))
    rotary, head_size = _rotary(root, side)
    stated = None
    if table is not None:
        stated = (table.shape[1], "the table of relative positions")
    elif head_size:
        stated = (dim // head_size, "the rotary table")
    if heads and stated and heads != stated[0]:
        raise CheckpointError(f"{stated[1]} is for {stated[0]} heads; leave out heads={heads}")
    depth = depth_of(tensors)
    n_heads, note = infer_heads(dim, depth, heads, stated)
    gated = "blocks.0.mlp.w3.weight" in tensors
    mean_norm = "fc_norm.weight" in tensors
    arch = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": n_heads,
        "patch_size": patch,
        "image_size": patch * side,
        "hidden": tensors["blocks.0.mlp.w3.weight"].shape[1]
        if gated
        else tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "positions": "pos_embed" in tensors,
        "relative": "shared" if shared is not None else "none" if of_block is None else "blocks",
        "rotary": rotary,
        "qkv_bias": "blocks.0.attn.q_bias" in tensors,
        "split_qkv": "blocks.0.attn.q_proj.weight" in tensors,
        "layer_scale": "blocks.0.gamma_1" in tensors,
        "mlp": "gelu" if not gated else "swiglu_packed" if "blocks.0.mlp.w12.weight" in tensors else "swiglu",
        "mlp_norm": "blocks.0.mlp.ffn_ln.weight" in tensors,
        "attn_norm": "blocks.0.attn.inner_attn_ln.weight" in tensors,
        "mean_norm": mean_norm,
        **(options or {}),
    }
    if mean_norm:
        fields |= {"pooling": "mean", "final_norm": True}
    if "crop_pct" not in fields:
        fields["crop_pct"] = 0.875 if patch * side < 384 else 1.0
    stage = (
        "fine-tuned with mean pooling: the norm follows the mean, patch features carry none"
        if mean_norm
        else "pretrained encoder"
    )
    spec = beit_spec(family, arch, **fields)
    return Draft(tensors, spec, (note, stage, *notes))


def _side(table: torch.Tensor | None, positions: torch.Tensor | None) -> int:
    """Side of the square grid of patches that the tables were made for."""
    sides = {}
    if table is not None:
        span = math.isqrt(max(0, table.shape[0] - 3))
        if table.ndim != 2 or span**2 != table.shape[0] - 3 or span % 2 == 0:
            raise CheckpointError(
                f"the table of relative positions has shape {tuple(table.shape)}, which is no square grid"
            )
        sides["the table of relative positions"] = (span + 1) // 2
    if positions is not None:
        side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
        if not side or side**2 != positions.shape[1] - 1:
            raise CheckpointError(f"pos_embed has shape {tuple(positions.shape)}, which is no square grid")
        sides["pos_embed"] = side
    if len(set(sides.values())) != 1:
        text = " and ".join(f"{name} is for {side}x{side} patches" for name, side in sides.items())
        raise CheckpointError(
            text
            or "the file has no table of positions, relative or absolute; if they are rotary, name timm's "
            "model by #arch=NAME"
        )
    return next(iter(sides.values()))


def _rotary(root: Root, side: int) -> tuple[int, int]:
    """Side of the grid that rotary positions count in, and the width of a head; zeros where there are none.

    The second entry of the table is turned by ``counted / side`` in its fastest pair of columns.
    """
    names = ("rope.freqs_{}", "blocks.0.attn.rope.freqs_{}")
    found = next((name for name in names if name.format("cos") in root.tensors), None)
    if found is None:
        return 0, 0
    cos, sin = (root.tensors[found.format(part)].float() for part in ("cos", "sin"))
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != side**2 or side < 2 or cos.shape[1] % 4:
        raise CheckpointError(
            f"the rotary table has shape {tuple(cos.shape)}; expected ({side**2}, D / heads)"
        )
    size = cos.shape[1]
    counted = round(side * math.atan2(float(sin[1, size // 2]), float(cos[1, size // 2])))
    expected = rotations((side, side), counted, size, cos)
    # Half precision keeps three digits of a cosine.
    if (
        counted < 1
        or max(float((a - b).abs().max()) for a, b in zip(expected, (cos, sin), strict=True)) > 0.02
    ):
        raise CheckpointError("the rotary table is not that of EVA-02; the positions would be wrong")
    return counted, size
