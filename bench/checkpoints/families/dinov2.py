"""DINOv2 and Franca: hub files and the teacher that training writes (facebookresearch/dinov2, valeoai/Franca).

Training cuts the blocks into chunks, ``blocks.CHUNK.INDEX``, where the index counts through. Registers carry no
position: the position of the class token is added to it here, which is the same sum. The official
evaluation crops 224 pixels although the published position tables are for 518.
"""

from __future__ import annotations

from ..family import Draft, Family, Root, Tensors
from ..plain_vit import infer_spec

_INPUT = 224
# Franca's giants beyond DINOv2's sizes have heads of width 128.
_HEADS = {2688: 21, 3072: 24, 3584: 28}


def _is_franca(root: Root) -> bool:
    """Franca has DINOv2's very keys; its heads are nested ones, and its small models have a SwiGLU."""
    swiglu = any(name.endswith(".mlp.w12.weight") for name in root.tensors)
    nested = any(".matryoshka_projections." in name for name in root.tree.tensors)
    width = root.tensors["cls_token"].shape[-1]
    return nested or root.tree.stem.startswith("franca") or (swiglu and width != 1536)


def _is_dinov2(root: Root) -> bool:
    # Without the mask token a file of timm's is meant, and DINOv3 has rotary embeddings.
    return "storage_tokens" not in root.tensors and root.tensors["mask_token"].ndim == 2


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    tensors, notes = dict(tensors), []
    if "reg_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
        notes.append("the class token's position is added to it; registers have none")
    family = "franca" if _is_franca(root) else "dinov2"
    spec, said = infer_spec(
        family,
        tensors,
        heads,
        usual_heads=_HEADS,
        pos_interpolation="antialias" if "reg_token" in tensors else "dino",
    )
    if not _INPUT % spec.patch_size:
        spec = spec.model_copy(update={"image_size": _INPUT})
        notes.append(f"evaluated at {_INPUT} pixels, as its authors do; #image_size= sets another")
    return Draft(tensors, spec, (*said, *notes))


def _family(name: str, title: str, rank: int, known_by: str, source: str) -> Family:
    return Family(
        name=name,
        title=title,
        rank=rank,
        anchors=(
            "mask_token",
            "cls_token",
            "patch_embed.proj.weight",
            ("blocks.0.ls1.gamma", "blocks.0.0.ls1.gamma"),
            (
                "blocks.0.mlp.fc1.weight",
                "blocks.0.0.mlp.fc1.weight",
                "blocks.0.mlp.w12.weight",
                "blocks.0.0.mlp.w12.weight",
            ),
        ),
        matches=lambda root: _is_dinov2(root) and _is_franca(root) == (name == "franca"),
        draft=_draft,
        known_by=known_by,
        evaluated="cls after the norm, at 224 pixels",
        source=source,
        prefer=("teacher", "student"),
        rename=(
            (r"register_tokens", "reg_token"),
            (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
            (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),
        ),
        drop={r"mask_token": "mask token"},
        siblings={
            "dino_head": "projection head",
            "ibot_head": "projection head",
            "student": "the other network of the pair",
            "teacher": "the other network of the pair",
            "dino_loss": "training state",
            "ibot_patch_loss": "training state",
        },
    )


FAMILIES = (
    _family(
        "dinov2",
        "DINOv2, hub files and training teachers, with and without registers",
        78,
        "mask_token (1, D) and layer scales ls1.gamma",
        "facebookresearch/dinov2",
    ),
    _family(
        "franca",
        "Franca, hub files",
        79,
        "DINOv2's keys with nested heads, or with a SwiGLU at another width than 1536",
        "valeoai/Franca",
    ),
)
