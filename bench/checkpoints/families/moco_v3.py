"""MoCo v3 with a vision transformer as the official code saves it (facebookresearch/moco-v3, main_moco.py).

The official evaluation (main_lincls.py) keeps the base encoder and takes the class token after the norm. It
resizes bilinearly, torchvision's default. The models up to the base one have 12 heads, the small one too, and
solo-learn's tiny one. Its linear probes and what its convert_to_deit.py writes have DeiT's keys; the order of
the position table tells them.
"""

from __future__ import annotations

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import first_axis, infer_spec
from ..siblings import BESIDE, PREFER


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if "patch_embed.proj.weight" not in tensors:
        raise CheckpointError(
            "this is MoCo v3 with a convolutional stem (vit_conv_*), which is not supported; export its "
            "encoder through a python: factory"
        )
    spec, notes = infer_spec(
        "moco_v3",
        tensors,
        heads,
        usual_heads={192: 12, 384: 12, 768: 12},
        interpolation="bilinear",
        pos_interpolation="bicubic",
    )
    return Draft(tensors, spec, (*notes, "fixed sine-cosine position table, taken from the file"))


FAMILY = Family(
    name="moco_v3",
    title="MoCo v3, official pre-training of vision transformers",
    rank=56,
    anchors=(
        ("patch_embed.proj.weight", "patch_embed.proj.0.weight"),
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    ),
    matches=lambda root: (
        root.path.endswith(("base_encoder.", "momentum_encoder."))
        or first_axis(root.tensors.get("pos_embed")) == "rows"
    ),
    draft=_draft,
    known_by="base_encoder and momentum_encoder; or a sine-cosine table that counts rows first",
    evaluated="cls after the norm of the base encoder",
    source="facebookresearch/moco-v3",
    prefer=("base_encoder", "momentum_encoder", *PREFER),
    drop={r"head\..*": "head"},
    siblings={
        "base_encoder": "the other network of the pair",
        "momentum_encoder": "the other network of the pair",
        **BESIDE,
    },
)
