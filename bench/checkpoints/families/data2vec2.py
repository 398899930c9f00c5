"""data2vec 2.0 for images as fairseq saves it (examples/data2vec): the model, and its teacher as ``_ema``.

The official evaluation deletes the teacher and takes the mean of the patches of the online network. The
blocks of the image encoder (prenet) come first, then those of all modalities; here they are one column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ...errors import CheckpointError
from ...networks.data2vec2 import data2vec2_spec
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, infer_heads, patches_of

_IMAGE = "modality_encoders.IMAGE."
_PRENET = re.compile(r"prenet\.(\d+)\.(.*)")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if any(name.startswith("alibi_") for name in tensors):
        raise CheckpointError(
            "the attention is biased by distance (alibi), which no official image model of data2vec 2 has"
        )
    prenet = len({found[1] for name in tensors if (found := _PRENET.fullmatch(name))})
    column = {}
    for name, tensor in tensors.items():
        if found := _PRENET.fullmatch(name):
            name = f"blocks.{found[1]}.{found[2]}"
        elif found := _BLOCK.fullmatch(name):
            name = f"blocks.{int(found[1]) + prenet}.{found[2]}"
        column[name] = tensor
    (dim, patch), table = patches_of(column), column["pos_embed"]
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if side == 0 or side**2 != table.shape[1]:
        raise CheckpointError(f"the position table has shape {tuple(table.shape)}, which is no square grid")
    depth = depth_of(column)
    n_heads, note = infer_heads(dim, depth, heads, _stated_heads(root))
    extra = column.get("extra_tokens")
    spec = data2vec2_spec(
        embed_dim=dim,
        depth=depth,
        num_heads=n_heads,
        patch_size=patch,
        image_size=patch * side,
        hidden=column["blocks.0.mlp.fc1.weight"].shape[0],
        extra_tokens=0 if extra is None else extra.shape[1],
    )
    said = (
        f"{prenet} blocks of the image encoder, then {depth - prenet} of the shared one",
        "post-norm blocks: features carry the norm of their block, there is no final norm",
    )
    return Draft(column, spec, (note, *said))


def _stated_heads(root: Root) -> tuple[int, str] | None:
    """The number of heads in fairseq's configuration of the run, a plain dict."""
    config = root.tree.payload.get("cfg")
    model = config.get("model") if isinstance(config, Mapping) else None
    heads = model.get("num_heads") if isinstance(model, Mapping) else None
    return (heads, "the configuration in the file") if isinstance(heads, int) and heads > 0 else None


FAMILY = Family(
    name="data2vec2",
    title="data2vec 2.0 for images, official pre-training",
    rank=86,
    anchors=(
        f"{_IMAGE}local_encoder.proj.weight",
        f"{_IMAGE}fixed_positional_encoder.positions",
        f"{_IMAGE}context_encoder.norm.weight",
    ),
    draft=_draft,
    known_by="modality_encoders.IMAGE with fixed positions and a norm before the first block",
    evaluated="mean of the patches of the last (post-norm) block of the online network",
    source="facebookresearch/fairseq, examples/data2vec",
    prefer=("model",),
    rename=(
        (rf"{re.escape(_IMAGE)}local_encoder\.proj\.(\w+)", r"patch_embed.proj.\1"),
        (rf"{re.escape(_IMAGE)}fixed_positional_encoder\.positions", "pos_embed"),
        (rf"{re.escape(_IMAGE)}context_encoder\.norm\.(\w+)", r"norm_pre.\1"),
        (rf"{re.escape(_IMAGE)}context_encoder\.blocks\.(\d+)\.(.*)", r"prenet.\1.\2"),
        (rf"{re.escape(_IMAGE)}(extra_tokens|alibi_\w+)", r"\1"),
    ),
    drop={
        r"_ema\..*": "the teacher, a moving average; #_ema picks it",
        rf"{re.escape(_IMAGE)}decoder\..*": "decoder",
        r"modality_encoders\.(AUDIO|TEXT)\..*": "another modality",
        r"(shared_decoder|recon_proj)\..*": "decoder",
    },
    siblings={
        **dict.fromkeys(
            ("modality_encoders", "blocks", "shared_decoder", "recon_proj"), "the online network"
        ),
        **dict.fromkeys(("last_optimizer_state", "optimizer_history", "extra_state"), "training state"),
    },
)
