"""Vision towers of CLIP: OpenAI's (openai/CLIP), open_clip's, also with a plain ViT of timm, and EVA-CLIP's.

The global token is the class token after the last norm, before the projection to the space of the texts. The
two activations in use leave no trace in the tensors: three numbers tell OpenAI's files, open_clip says it in
its configuration, and where a file comes alone the user says it by the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers.activations import GELUTanh, QuickGELU

from ...backbones import ViTEncoder
from ...errors import CheckpointError
from ...timm_models import create_timm
from ...types import EncoderSpec
from ..beit_layout import ANCHORS as BEIT_ANCHORS
from ..beit_layout import DROP as BEIT_DROP
from ..beit_layout import infer_beit
from ..family import Draft, Family, Root, Tensors
from ..hf import CLIP, HALF, Preprocessing, three_numbers
from ..plain_vit import ANCHORS as VIT_ANCHORS
from ..plain_vit import depth_of, infer_spec

_CONFIG = "open_clip_config.json"
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_PROJECTION = "projection to the space of the texts"
_SIBLINGS = {
    **dict.fromkeys(
        (
            "text",
            "transformer",
            "token_embedding",
            "positional_embedding",
            "ln_final",
            "text_projection",
            "attn_mask",
        ),
        "text tower",
    ),
    **dict.fromkeys(("logit_scale", "logit_bias"), "scale of the similarities"),
    **dict.fromkeys(_OPENAI, "number of the configuration"),
    "text_decoder": "text decoder",
    "head": _PROJECTION,
}
Options = Mapping[str, Any]


def _config(root: Root) -> tuple[Options, Options]:
    """The tower and the preprocessing in open_clip_config.json beside the file, or nothing.

    The tower's options are ``vision_cfg``, with ``quick_gelu`` of the whole model and the norms' ``eps``.
    """
    folder = root.tree.folder
    if folder is None or not (folder / _CONFIG).is_file():
        return {}, {}
    try:
        stated = json.loads((folder / _CONFIG).read_bytes())
        model, images = stated.get("model_cfg", stated), stated.get("preprocess_cfg", {})
        tower = model["vision_cfg"]
        numbers = {
            "head_width": int(tower.get("head_width", 64)),
            "eps": float((tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
        }
        return {**tower, **numbers, "quick_gelu": bool(model.get("quick_gelu"))}, dict(images)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{_CONFIG} beside the file is no configuration of open_clip: {error}"
        ) from error


def _images(spec: EncoderSpec, stated: Options, default: Preprocessing) -> tuple[EncoderSpec, str]:
    """The spec with the preprocessing that open_clip states, or else the usual one."""
    mean, std = stated.get("mean"), stated.get("std")
    if mean and std:
        fields = {"mean": three_numbers(mean, "mean"), "std": three_numbers(std, "std")}
        note = f"mean and std from {_CONFIG}"
    else:
        fields, note = {"mean": default.mean, "std": default.std}, default.why
    if stated.get("resize_mode") == "squash":
        note += "; open_clip squashes the image to a square, here its centre square is taken"
    method = stated.get("interpolation")
    method = method if method in ("bicubic", "bilinear") else default.interpolation
    return spec.model_copy(update={**fields, "interpolation": method, "crop_pct": default.crop_pct}), note


def _clip_draft(
    family: str, activation: str | None, why: str
) -> Callable[[Root, Tensors, int | None], Draft]:
    """The draft of a tower in OpenAI's names; ``activation`` None: as the configuration says."""

    def draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
        if "attnpool.k_proj.weight" in root.tensors:
            raise CheckpointError(
                "this is CLIP with a residual network (RN50 and its like), which is not supported; give one "
                "with a vision transformer"
            )
        if any(name.startswith("attn_pool") for name in root.tensors):
            raise CheckpointError(
                "this tower pools by attention over queries (CoCa), which is not supported; give a CLIP"
            )
        named = dict(tensors)
        named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
        named["pos_embed"] = named["pos_embed"][None]
        width, depth = named["cls_token"].shape[-1], depth_of(named)
        config, images = _config(root)
        if config and (config.get("width", 768), config.get("layers", 12)) != (width, depth):
            raise CheckpointError(
                f"{_CONFIG} beside the file is of another tower than this, of width {width} and depth {depth}"
            )
        quick = bool(config.get("quick_gelu"))
        act = activation or ("quick_gelu" if quick else "gelu")
        said = why if activation else f"{_WORDS[act]}, from {_CONFIG}" if config else _ASSUMED
        stated = None
        if config:
            if config["head_width"] < 1 or width % config["head_width"]:
                raise CheckpointError(
                    f"{_CONFIG} says heads of width {config['head_width']}, which do not divide {width}"
                )
            stated = (width // config["head_width"], _CONFIG)
        elif family == "openai_clip":
            stated = (width // 64, "OpenAI's rule, width / 64")
        spec, notes = infer_spec(
            family,
            named,
            heads,
            stated_heads=stated,
            usual_heads={1792: 16},
            eps=config.get("eps", 1e-5),
            activation=act,
            pooling="mean" if config.get("pool_type") == "avg" else "cls",
            pos_interpolation="antialias",
        )
        spec, note = _images(spec, images, CLIP)
        return Draft(named, spec, (*notes, said, note))

    return draft


_WORDS = {"gelu": "exact GELU", "quick_gelu": "QuickGELU"}
_ASSUMED = (
    f"WARNING: exact GELU is assumed, as no {_CONFIG} is beside the file; add #family=open_clip_quickgelu "
    "for weights trained with QuickGELU (OpenAI's, MetaCLIP's, DFN's)"
)


def _is_openai(root: Root) -> bool:
    top = root.path.removesuffix("visual.")
    return all(top + name in root.tree.tensors for name in _OPENAI) or (
        not top and all(name in root.tree.payload for name in _OPENAI)
    )


def _family(name: str, title: str, rank: int, draft: Any, **rest: Any) -> Family:
    return Family(
        name=name,
        title=title,
        rank=rank,
        anchors=(
            "conv1.weight",
            ("ln_pre.weight", "attnpool.q_proj.weight"),
            ("class_embedding", "attnpool.k_proj.weight"),
            ("transformer.resblocks.0.attn.in_proj_weight", "attnpool.v_proj.weight"),
        ),
        draft=draft,
        evaluated="cls after ln_post, before the projection",
        rename=(
            (r"conv1\.weight", "patch_embed.proj.weight"),
            (r"class_embedding", "cls_token"),
            (r"positional_embedding", "pos_embed"),
            (r"ln_pre\.(\w+)", r"norm_pre.\1"),
            (r"ln_post\.(\w+)", r"norm.\1"),
            (_BLOCK + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
            (_BLOCK + r"ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
            (_BLOCK + r"attn\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
            (_BLOCK + r"attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
            (_BLOCK + r"mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
            (_BLOCK + r"mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        ),
        drop={"proj": _PROJECTION},
        siblings=_SIBLINGS,
        **rest,
    )


# ------------------------------------------------------------------------------------------- other towers


def _trunk_draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    """A plain transformer of timm in open_clip: the name of timm's model says what shapes do not."""
    config, images = _config(root)
    pooled = "attn_pool.latent" in tensors
    fields: dict[str, Any] = {"usual_heads": {1536: 16}} if pooled else {}
    said = _TRUNK_ASSUMED
    name = config.get("timm_model_name")
    if isinstance(name, str) and timm.is_model(name):
        model = create_timm(name, pretrained=False, device="meta")
        if not ViTEncoder.supports(model) or type(model.blocks[0].mlp.act) not in _ACTIVATIONS:
            raise CheckpointError(f"the tower is timm's {name}, which is no plain ViT; add #arch={name}")
        block = model.blocks[0]
        fields = {
            "stated_heads": (block.attn.num_heads, f"timm's {name}"),
            "eps": block.norm1.eps,
            "activation": _ACTIVATIONS[type(block.mlp.act)],
        }
        said = f"activation and norm of timm's {name}, from {_CONFIG}"
    spec, notes = infer_spec("open_clip_timm", tensors, heads, **fields)
    spec, note = _images(spec, images, replace(HALF, crop_pct=1.0) if pooled else CLIP)
    return Draft(tensors, spec, (*notes, said, note))


_ACTIVATIONS = {torch.nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
_TRUNK_ASSUMED = (
    f"WARNING: exact GELU and norm eps 1e-6 are assumed, as no {_CONFIG} is beside the file; name timm's "
    "model by #arch=NAME where it has others (SigLIP 2 at some sizes: tanh GELU)"
)


def _eva_draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    width = tensors["patch_embed.proj.weight"].shape[0]
    if width == 1792:
        raise CheckpointError(
            "this is the enormous EVA-CLIP, whose blocks have their norms elsewhere; it is not supported"
        )
    clip: dict[str, Any] = {"mean": CLIP.mean, "std": CLIP.std, "crop_pct": CLIP.crop_pct}
    return infer_beit("eva_clip", root, tensors, heads, notes=(CLIP.why,), pooling="cls", **clip)


_QUICK = "QuickGELU, as in all of OpenAI's models"
FAMILIES = (
    _family(
        "openai_clip",
        "CLIP, state dict of OpenAI's model, vision tower",
        63,
        _clip_draft("openai_clip", "quick_gelu", _QUICK),
        matches=_is_openai,
        known_by="visual.class_embedding and visual.ln_pre, with input_resolution and two more numbers",
        source="openai/CLIP",
    ),
    _family(
        "open_clip",
        "CLIP of open_clip, vision tower",
        62,
        _clip_draft("open_clip", None, ""),
        known_by="visual.class_embedding and visual.ln_pre",
        source="mlfoundations/open_clip",
    ),
    _family(
        "open_clip_quickgelu",
        "the same with QuickGELU, by #family=open_clip_quickgelu",
        61,
        _clip_draft("open_clip_quickgelu", "quick_gelu", "QuickGELU, as asked"),
        known_by="the user's choice",
        source="mlfoundations/open_clip",
    ),
    Family(
        name="open_clip_timm",
        title="CLIP and SigLIP of open_clip with a plain ViT of timm",
        rank=63,
        anchors=VIT_ANCHORS,
        matches=lambda root: root.parts[-2:] == ("visual", "trunk"),
        draft=_trunk_draft,
        known_by="visual.trunk with the keys of a plain ViT",
        evaluated="attention pooling (SigLIP), or cls after the norm",
        source="mlfoundations/open_clip",
        drop={r"head\..*": _PROJECTION},
        siblings=_SIBLINGS,
    ),
    Family(
        name="eva_clip",
        title="EVA-CLIP, vision tower",
        rank=63,
        anchors=BEIT_ANCHORS,
        matches=lambda root: root.parts[-1:] == ("visual",),
        draft=_eva_draft,
        known_by="visual.patch_embed and visual.blocks",
        evaluated="cls after the norm, before the projection",
        source="baaivision/EVA",
        prefer=("module", "model"),
        drop={**BEIT_DROP, r"head\..*": _PROJECTION},
        siblings=_SIBLINGS,
    ),
)
