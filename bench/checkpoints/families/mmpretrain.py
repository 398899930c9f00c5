"""The vision transformer of OpenMMLab (open-mmlab/mmpretrain, models/backbones/vision_transformer.py).

``attn.qkv`` is fused, the norms are ``ln1`` and ``ln2``, and the final norm is ``ln1`` too, or
``ln2`` after the mean of the patches (MAE, fine-tuned). The configuration, which the file keeps as text,
names the network; of one width there are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import first_axis, infer_spec

# Width and heads of the named networks of widths that have several.
_ARCHS = {
    **dict.fromkeys(("s", "small"), (768, 8)),
    **dict.fromkeys(("b", "base", "deit-b", "deit-base"), (768, 12)),
    **dict.fromkeys(("deit-t", "deit-tiny"), (192, 3)),
    **dict.fromkeys(("deit-s", "deit-small", "dinov2-s", "dinov2-small"), (384, 6)),
    **dict.fromkeys(("mocov3-s", "mocov3-small"), (384, 12)),
}
_NAMED = re.compile(r"""\barch\W{1,4}([\w-]+)['"]""")


def _stated(root: Root, dim: int) -> tuple[int, str] | None:
    """The heads of the network of this width that the configuration names, if it names no other of it."""
    meta = root.tree.payload.get("meta")
    text = str(meta.get("cfg", "")) if isinstance(meta, Mapping) else ""
    archs = {name: _ARCHS[name] for name in _NAMED.findall(text) if name in _ARCHS}
    fitting = {name: heads for name, (width, heads) in archs.items() if width == dim}
    if len(set(fitting.values())) != 1:
        return None
    name, heads = fitting.popitem()
    return heads, f"the arch {name!r} that the file states"


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    spec, notes = infer_spec(
        "mmpretrain",
        tensors,
        heads,
        stated_heads=_stated(root, tensors["patch_embed.proj.weight"].shape[0]),
        usual_heads={384: 12} if first_axis(tensors.get("pos_embed")) == "rows" else {},
        mixed_heads=True,
        pos_interpolation="bicubic",
    )
    return Draft(tensors, spec, notes)


FAMILY = Family(
    name="mmpretrain",
    title="vision transformers of OpenMMLab (mmpretrain, mmcls)",
    rank=64,
    anchors=("patch_embed.projection.weight", "layers.0.ln1.weight", "layers.0.attn.qkv.weight"),
    draft=_draft,
    known_by="patch_embed.projection and layers.0.ln1",
    evaluated="cls after the norm; with ln2: mean of the patches, then that norm",
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
        (r"ln2\.(\w+)", r"fc_norm.\1"),
    ),
    drop={r"mask_token": "mask token"},
    siblings={"head": "head", "neck": "neck", "data_preprocessor": "preprocessing"},
)
