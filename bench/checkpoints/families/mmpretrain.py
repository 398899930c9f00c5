"""The vision transformer of OpenMMLab (open-mmlab/mmpretrain, models/backbones/vision_transformer.py).

``attn.qkv`` is fused, the norms are ``ln1`` and ``ln2``, and the final norm is ``ln1`` too. The published
configurations have the usual number of heads for their width.
"""

from __future__ import annotations

from ..family import Family
from ..plain_vit import plain_draft

FAMILY = Family(
    name="mmpretrain",
    title="vision transformers of OpenMMLab (mmpretrain, mmcls)",
    rank=64,
    anchors=("patch_embed.projection.weight", "layers.0.ln1.weight", "layers.0.attn.qkv.weight"),
    draft=plain_draft("mmpretrain", pos_interpolation="bicubic"),
    known_by="patch_embed.projection and layers.0.ln1",
    evaluated="cls after the norm",
    source="open-mmlab/mmpretrain",
    prefer=("teacher", "state_dict", "backbone"),
    rename=(
        (r"patch_embed\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (r"layers\.(\d+)\.ln([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (r"layers\.(\d+)\.attn\.(qkv|proj)\.(\w+)", r"blocks.\1.attn.\2.\3"),
        (r"layers\.(\d+)\.attn\.gamma1\.weight", r"blocks.\1.ls1.gamma"),
        (r"layers\.(\d+)\.ffn\.gamma2\.weight", r"blocks.\1.ls2.gamma"),
        (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"layers\.(\d+)\.ffn\.layers\.1\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"ln1\.(\w+)", r"norm.\1"),
    ),
    drop={r"mask_token": "mask token"},
    siblings={"head": "head", "neck": "neck", "data_preprocessor": "preprocessing"},
)
