"""CAPI as the official code saves and serves it (facebookresearch/capi, model.py).

The official evaluation takes the normed tokens after the registers for patches, and for the image the mean
of what the first block of the decoder predicts for every position.
"""

from __future__ import annotations

from ...networks.capi import capi_spec
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, infer_heads


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    weight, depth = tensors["patch_embed.weight"], depth_of(tensors)
    dim, head = weight.shape[0], tensors["blocks.0.attn.rope.freqs"].shape[1]
    n_heads, note = infer_heads(dim, depth, heads, stated=(dim // head, "the table of rotary frequencies"))
    spec = capi_spec(
        embed_dim=dim,
        depth=depth,
        num_heads=n_heads,
        patch_size=weight.shape[2],
        registers=tensors["registers"].shape[1],
        hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        decoder_dim=tensors["mask_token"].shape[1],
        decoder_heads=tensors["mask_token"].shape[1] // tensors["decoder.attn.rope.freqs"].shape[1],
        decoder_hidden=tensors["decoder.mlp.fc1.weight"].shape[0],
    )
    said = "the global feature is the mean of the decoder's first block over all positions, as its authors do"
    return Draft(tensors, spec, (note, "rotary positions: any image size", said))


FAMILY = Family(
    name="capi",
    title="CAPI, hub files and pre-training",
    rank=88,
    anchors=(
        "registers",
        "patch_embed.weight",
        "encoder.blocks.0.residual1.fn.q_proj.weight",
        "decoder.blocks.0.residual1.fn.q_proj.weight",
    ),
    draft=_draft,
    known_by="registers, and encoder.blocks.0.residual1.fn.q_proj",
    evaluated="mean of the decoder's first block; patches: normed tokens after the registers",
    source="facebookresearch/capi",
    prefer=("student_ema", "teacher", "student"),
    rename=(
        (r"encoder\.blocks\.(\d+)\.residual([12])\.norm\.weight", r"blocks.\1.norm\2.weight"),
        (r"encoder\.blocks\.(\d+)\.residual1\.fn\.(.+)", r"blocks.\1.attn.\2"),
        (r"encoder\.blocks\.(\d+)\.residual2\.fn\.(.+)", r"blocks.\1.mlp.\2"),
        (r"decoder\.blocks\.0\.residual([12])\.norm\.weight", r"decoder.norm\1.weight"),
        (r"decoder\.blocks\.0\.residual1\.fn\.(.+)", r"decoder.attn.\1"),
        (r"decoder\.blocks\.0\.residual2\.fn\.(.+)", r"decoder.mlp.\1"),
    ),
    drop={r"decoder\.blocks\.[1-9]\d*\..*": "later blocks of the decoder"},
    siblings={
        "head": "prediction head",
        "student": "the other network of the pair",
        "student_ema": "the other network of the pair",
        "teacher": "the other network of the pair",
    },
)
