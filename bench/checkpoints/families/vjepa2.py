"""V-JEPA and V-JEPA 2 as the official code saves them (facebookresearch/jepa and facebookresearch/vjepa2,
app/vjepa/train.py), as image encoders.

The official image evaluations (evals/image_classification_frozen) repeat an image 16 times as a video,
read the target encoder, and have no class token: the mean over all tokens stands for the image.

Both repositories write the same keys. V-JEPA adds a fixed table of positions to the tokens; V-JEPA 2 turns
queries and keys, and yet its published files hold a table that it never reads. Its public code writes none.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch

from ...errors import CheckpointError
from ...networks.vjepa import vjepa_spec
from ...networks.vjepa2 import vjepa2_spec
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, infer_heads, patches_of

# Rows of the tables that V-JEPA 2's published files may hold: grids of 256 and 384 pixels in patches of 16,
# by the half of 8, 16 or 64 frames.
_UNUSED = {frames // 2 * side**2 for frames in (8, 16, 64) for side in (16, 24)} - {8 * 24**2}
_MASK_TOKEN = re.compile(r"(?:.*\.)?mask_tokens\.\d+")
# Pre-training has a mask token for each kind of mask: V-JEPA's has two, V-JEPA 2's releases have ten.
_KINDS_OF_MASKS = 2


def _adds_table(root: Root) -> bool:
    """Whether the position table of a file is added to the tokens, as V-JEPA does.

    8 * 24**2 rows are V-JEPA's at 384 pixels: V-JEPA 2 came to that size with 64 frames only.
    """
    table = root.tensors.get("pos_embed")
    if table is None:
        return False
    return table.ndim != 3 or table.shape[1] not in _UNUSED or _masks(root) == _KINDS_OF_MASKS


def _masks(root: Root) -> int:
    return sum(_MASK_TOKEN.fullmatch(name) is not None for name in root.tree.tensors)


def _shape_of_table(table: torch.Tensor) -> tuple[int, int]:
    """Positions in time and the side of the grid: the first column is sin(t), which is 0 at t = 0 only."""
    rows = table[0, :, 0] if table.ndim == 3 else table.new_ones(1)
    later = rows.nonzero()
    area = int(later[0]) if len(later) else len(rows)
    side = math.isqrt(area)
    if not area or side * side != area or len(rows) % area:
        raise CheckpointError(
            f"pos_embed, of shape {tuple(table.shape)}, is no sine-cosine table of times and a square grid; "
            "V-JEPA's is, and V-JEPA 2 has none: load the encoder through a python: factory"
        )
    return len(rows) // area, side


def _draft(name: str, root: Root, tensors: Tensors, heads: int | None) -> Draft:
    dim, patch = patches_of(tensors, videos=True)
    depth, table = depth_of(tensors), name == "vjepa"
    tubelet = tensors["patch_embed.proj.weight"].shape[2]
    usual = {1408: 16, 1664: 16} if table else {1408: 22, 1664: 26}
    n_heads, note = infer_heads(dim, depth, heads, usual=usual)
    arch: dict[str, Any] = {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": n_heads,
        "patch_size": patch,
        "tubelet": tubelet,
        "hidden": tensors["blocks.0.mlp.fc1.weight"].shape[0],
    }
    if table:
        times, side = _shape_of_table(tensors["pos_embed"])
        spec = vjepa_spec(**arch, frames=times * tubelet, side=side)
        positions = f"positions by the file's table, for {times * tubelet} frames of {spec.image_size} pixels"
    else:
        spec = vjepa2_spec(**arch)
        positions = (
            "rotary positions: any image size; 256 pixels are assumed, set #image_size= for models of 384"
        )
    video = (
        f"an image is repeated {spec.arch['frames']} times as a video, as the official image evaluation does"
    )
    notes = [note, video, positions]
    if not table and "pos_embed" in root.tensors and not _masks(root):
        notes.append(
            "WARNING: the position table is taken for the unused one of V-JEPA 2's published files; add "
            "#family=vjepa if the model adds it to the tokens"
        )
    return Draft(tensors, spec, tuple(notes))


def _family(name: str, title: str, source: str, **rest: Any) -> Family:
    return Family(
        name=name,
        title=title,
        anchors=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"),
        draft=partial(_draft, name),
        evaluated="mean of all tokens after the norm of the target encoder; the image repeated 16 times",
        source=source,
        prefer=("target_encoder", "encoder"),
        siblings={
            "encoder": "the other network of the pair",
            "target_encoder": "the other network of the pair",
            "predictor": "predictor",
        },
        **rest,
    )


def _is_video(root: Root) -> bool:
    return root.tensors["patch_embed.proj.weight"].ndim == 5 and "cls_token" not in root.tensors


FAMILIES = (
    _family(
        "vjepa",
        "V-JEPA, official pre-training, as an image encoder",
        "facebookresearch/jepa",
        # Below V-JEPA 2, so that it can be asked for where a table may be either's.
        rank=83,
        matches=lambda root: _is_video(root) and "pos_embed" in root.tensors,
        known_by="V-JEPA 2's keys with a position table that is not of its published files",
    ),
    _family(
        "vjepa2",
        "V-JEPA 2, official pre-training, as an image encoder",
        "facebookresearch/vjepa2",
        rank=84,
        matches=lambda root: _is_video(root) and not _adds_table(root),
        drop={r"pos_embed": "position table that rotary models do not use"},
        known_by="a patch embedding of videos (D, 3, t, p, p) and no class token",
    ),
)
