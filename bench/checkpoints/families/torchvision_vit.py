"""The vision transformer of torchvision (torchvision.models.vit_b_16 and its siblings)."""

from __future__ import annotations

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import infer_spec
from ..siblings import BESIDE, PREFER

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    # torchvision's transformers have heads of width 64, but for the huge one with 16 of width 80.
    spec, notes = infer_spec(
        "torchvision", tensors, heads, interpolation="bilinear", pos_interpolation="bicubic"
    )
    return Draft(tensors, spec, notes)


FAMILY = Family(
    name="torchvision",
    title="vision transformers of torchvision",
    rank=30,
    anchors=("conv_proj.weight", "encoder.pos_embedding", "encoder.layers.encoder_layer_0.ln_1.weight"),
    draft=_draft,
    known_by="conv_proj and encoder.layers.encoder_layer_0",
    evaluated="cls after the norm",
    source="pytorch/vision",
    prefer=PREFER,
    rename=(
        (r"conv_proj\.(weight|bias)", r"patch_embed.proj.\1"),
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (_BLOCK + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (_BLOCK + r"self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
        (_BLOCK + r"self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        # Before torchvision 0.13 the two layers were called linear_1 and linear_2.
        (_BLOCK + r"mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (_BLOCK + r"mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(\w+)", r"norm.\1"),
    ),
    drop={r"heads\..*": "classifier head"},
    siblings=BESIDE,
)
