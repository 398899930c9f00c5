"""What the shapes of a plain vision transformer say, and what they leave open.

Width, depth, patch, grid, tokens and biases follow from shapes. The number of heads does not: a fused qkv
of any number of heads has one shape, and a wrong number loads without complaint and gives other features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..types import EncoderSpec
from ..vit import vit_spec
from .family import Draft, Root, Tensors

ANCHORS = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")

# (width, depth) -> heads of the published plain transformers; depth None: the same at any depth.
_HEADS: dict[tuple[int, int | None], int] = {
    (192, None): 3,
    (256, None): 4,
    (320, None): 5,
    (384, None): 6,
    (512, None): 8,
    (640, None): 10,
    (768, 8): 8,
    (768, None): 12,
    (1024, None): 16,
    (1152, 27): 16,
    (1280, 32): 16,
    (1408, 40): 16,
    (1536, 40): 24,
    (1664, 48): 16,
    (4096, 40): 32,
}
# Widths with 12 heads too: in MoCo v3, in solo-learn's MAE, and in many a small MAE.
_OR_TWELVE = (192, 384)

_NORMED_AFTER = (
    "WARNING: no class token, no qkv bias and a norm of the mean, so perhaps timm's kind with the norms "
    "after each part of a block (vit_*_rpn_*), which leaves no trace; if so, name the model by #arch=NAME"
)


def infer_heads(
    embed_dim: int,
    depth: int,
    asked: int | None,
    stated: tuple[int, str] | None = None,
    usual: Mapping[int, int] | None = None,
    mixed: bool = False,
) -> tuple[int, str]:
    """The number of heads and a note on where it comes from.

    Args:
        embed_dim: width D.
        depth: number of blocks.
        asked: by the user; overrules everything.
        stated: what the file or its configuration says exactly, and where.
        usual: width -> heads where the family differs from the published plain transformers.
        mixed: files of this layout come from trainers that disagree on the number for a width.

    Raises:
        CheckpointError: the width says nothing, or is not a multiple of the heads asked for.
    """
    if asked is not None:
        if asked < 1 or embed_dim % asked:
            raise CheckpointError(f"heads={asked} does not divide the width {embed_dim}")
        return asked, f"{asked} heads, as asked"
    if stated is not None:
        return stated[0], f"{stated[0]} heads, from {stated[1]}"
    if usual and embed_dim in usual:
        heads = usual[embed_dim]
        return heads, f"{heads} heads, the family's number for width {embed_dim} (not stored in the file)"
    known = _HEADS.get((embed_dim, depth)) or _HEADS.get((embed_dim, None))
    if known and mixed and embed_dim in _OR_TWELVE:
        return known, (
            f"WARNING: {known} heads are assumed for width {embed_dim}, which other trainers give 12; add "
            f"#heads=12, or #heads={known} if it is right"
        )
    if known:
        return known, f"{known} heads, usual for width {embed_dim} and depth {depth} (not stored in the file)"
    if embed_dim % 64:
        raise CheckpointError(
            f"the file does not say how many heads a width of {embed_dim} has; add #heads=N to the path"
        )
    heads = embed_dim // 64
    return heads, f"WARNING: {heads} heads is a guess (width {embed_dim} / 64); add #heads=N if it is wrong"


def first_axis(table: torch.Tensor | None) -> str | None:
    """``columns`` or ``rows``: what the first half of a fixed sine-cosine table (1, 1 + h*w, D) counts.

    None where it is no such table. Fixed tables are never trained: the row of the class token stays zero,
    and that of the first patch is sin 0 and cos 0. MAE's counts columns first, that of MoCo v3 rows.
    """
    if table is None or table.ndim != 3 or table.shape[1] < 5 or table.shape[2] % 4:
        return None
    token, first, second = table[0, :3].float()
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, len(first) // 4)
    if token.any() or not torch.equal(first.reshape(4, -1), expected):
        return None
    half = len(first) // 2
    return "rows" if torch.equal(first[:half], second[:half]) else "columns"


def depth_of(tensors: Tensors) -> int:
    """The number of blocks; CheckpointError where their numbers have gaps."""
    numbers = {int(m.group(1)) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(f"the file lacks block {missing} of {max(numbers) + 1}; it is not complete")
    return len(numbers)


def refuse_without_scale(family: str, tensors: Tensors) -> None:
    """Raise CheckpointError where the layer scale is missing that all networks of a family have."""
    if "blocks.0.ls1.gamma" not in tensors:
        raise CheckpointError(
            f"the blocks have no layer scale (ls1.gamma), which every network of {family} has; the file is "
            "not complete. If it was trained without, name timm's model by #arch=NAME"
        )


def without_row_for_class(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors with the class token's row of the position table added to the token, which is exact.

    Raises:
        CheckpointError: the token has another shape than its row.
    """
    token, table = tensors["cls_token"], tensors["pos_embed"]
    if token.shape != table[:, :1].shape:
        raise CheckpointError(
            f"cls_token has shape {tuple(token.shape)}, and its row of the position table "
            f"{tuple(table[:, :1].shape)}"
        )
    return {**tensors, "cls_token": token.float() + table[:, :1].float(), "pos_embed": table[:, 1:]}


def patches_of(tensors: Tensors, videos: bool = False) -> tuple[int, int]:
    """Width and patch size that the patch embedding (D, 3, p, p), or (D, 3, t, p, p) of videos, says.

    Raises:
        CheckpointError: it has another shape.
    """
    shape = tuple(tensors["patch_embed.proj.weight"].shape)
    if len(shape) != 4 + videos or shape[1] != 3 or shape[-2] != shape[-1]:
        expected = "(D, 3, t, p, p) for RGB videos" if videos else "(D, 3, p, p) for RGB images"
        raise CheckpointError(f"patch_embed.proj.weight has shape {shape}; expected {expected}")
    return shape[0], shape[-1]


def infer_spec(
    family: str,
    tensors: Tensors,
    heads: int | None,
    *,
    stated_heads: tuple[int, str] | None = None,
    usual_heads: Mapping[int, int] | None = None,
    mixed_heads: bool = False,
    **fields: Any,
) -> tuple[EncoderSpec, tuple[str, ...]]:
    """The spec of a plain vision transformer from tensors in timm's names; ``fields`` go to ``vit_spec``.

    ``heads`` is what the user asks for; see ``infer_heads`` for the other three.

    Raises:
        CheckpointError: the shapes do not describe a square-image plain vision transformer.
    """
    dim, patch = patches_of(tensors)
    depth = depth_of(tensors)
    n_heads, note = infer_heads(dim, depth, heads, stated_heads, usual_heads, mixed_heads)
    has_cls = "cls_token" in tensors
    reg_tokens = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if "attn_pool.latent" in tensors and (has_cls or "norm_pre.weight" in tensors):
        raise CheckpointError(
            "this pools by attention and has a class token or a norm before the blocks, as Perception "
            "Encoders do, whose rotary positions leave no trace; name timm's model by #arch=NAME"
        )
    if "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        raise CheckpointError(
            "the file has no position table pos_embed of shape (1, L, D); if its positions are rotary or "
            "relative, name timm's model by #arch=NAME"
        )
    length = tensors["pos_embed"].shape[1]
    grid, covers_prefix = _grid(length, int(has_cls) + reg_tokens)
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    down = tensors.get("blocks.0.mlp.fc2.weight")
    shape = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": n_heads,
        "patch_size": patch,
        "image_size": patch * grid,
        "mlp_ratio": hidden / dim,
        "class_token": has_cls,
        "reg_tokens": reg_tokens,
        "no_embed_class": not covers_prefix,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "fc_norm": "fc_norm.weight" in tensors and "norm.weight" not in tensors,
        "swiglu": down is not None and hidden == 2 * down.shape[1],
        "pre_norm": "norm_pre.weight" in tensors,
        "map_pool": "attn_pool.latent" in tensors,
    }
    unsure = shape["fc_norm"] and not has_cls and not shape["qkv_bias"]
    return vit_spec(family, **{**shape, **fields}), (note, _NORMED_AFTER) if unsure else (note,)


def _grid(length: int, n_prefix: int) -> tuple[int, bool]:
    """Side of the square grid of a position table, and whether the table has rows for the prefix tokens."""
    for rows, covers in ((length - n_prefix, True), (length, False)):
        if rows > 0 and math.isqrt(rows) ** 2 == rows:
            return math.isqrt(rows), covers
    raise CheckpointError(
        f"the position table has {length} rows, which is no square grid with or without tokens"
    )


def plain_draft(
    family: str, *, says: tuple[str, ...] = (), **fields: Any
) -> Callable[[Root, Tensors, int | None], Draft]:
    """The draft of a family whose tensors, once renamed, are a plain vision transformer's.

    ``says`` are notes for the result, ``fields`` go to ``infer_spec``.
    """

    def draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
        spec, notes = infer_spec(family, tensors, heads, **fields)
        return Draft(tensors, spec, (*notes, *says))

    return draft
