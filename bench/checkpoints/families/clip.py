"""Vision towers of CLIP: OpenAI's (openai/CLIP), open_clip's, also with a plain ViT of timm, and EVA-CLIP's.

The global token is the class token after the last norm, before the projection to the space of the texts. The
two activations in use leave no trace in the tensors: three numbers tell OpenAI's files, open_clip says it in
its configuration, and where a file comes alone the user says it by the family.
"""

from __future__ import annotations

import json
import re
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
from ..family import Draft, Family, Root, Tensors, Tree
from ..hf import ACTIVATIONS
from ..hf_images import CLIP, HALF, Preprocessing, three_numbers
from ..plain_vit import ANCHORS as VIT_ANCHORS
from ..plain_vit import depth_of, infer_spec

_CONFIG = "open_clip_config.json"
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_PROJECTION = "projection to the space of the texts"
SIBLINGS = {
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
# What vision_cfg says that is seen in the tensors too, is followed below, or matters to the training alone.
_FOLLOWED = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "no_ln_pre"),
    *("pos_embed_type", "pool_type", "final_ln_after_pool", "act_kwargs", "norm_kwargs"),
    *("block_type", "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
    *("timm_drop", "timm_drop_path"),
}
Options = Mapping[str, Any]


def _config(tree: Tree) -> tuple[Options, Options]:
    """The tower and the preprocessing in open_clip_config.json beside the file, or nothing.

    The tower's options are ``vision_cfg``, with ``quick_gelu`` of the whole model and the norms' ``eps``.

    Raises:
        CheckpointError: it is no configuration, or says what is not followed here.
    """
    folder = tree.folder
    if folder is None or not (folder / _CONFIG).is_file():
        return {}, {}
    try:
        stated = json.loads((folder / _CONFIG).read_bytes())
        model, images = stated.get("model_cfg", stated), stated.get("preprocess_cfg", {})
        tower = model["vision_cfg"]
        asked = {key: value for key, value in tower.items() if key not in _FOLLOWED and value}
        numbers = {
            "head_width": int(tower.get("head_width", 64)),
            "eps": float((tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
        }
        options = {**tower, **numbers, "quick_gelu": bool(model.get("quick_gelu"))}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{_CONFIG} beside the file is no configuration of open_clip: {error}"
        ) from error
    asked |= _not_followed(tower)
    if asked:
        said = ", ".join(f"{key} {value!r}" for key, value in asked.items())
        raise CheckpointError(f"{_CONFIG} beside the file asks for {said}, which is not supported")
    return options, dict(images)


def _not_followed(tower: Options) -> dict[str, Any]:
    """The options of a tower whose values are others than those that are followed."""
    known: dict[str, tuple[Any, ...]] = {
        "pool_type": (None, "tok", "avg"),
        "act_kwargs": (None, {}, _TANH),
        "block_type": (None, "default"),
        "timm_pool": (None, "", "avg", "token", "map"),
    }
    other = {key: tower[key] for key, values in known.items() if tower.get(key) not in values}
    more = {key: value for key, value in (tower.get("norm_kwargs") or {}).items() if key != "eps"}
    return other | ({"norm_kwargs": more} if more else {})


_TANH = {"approximate": "tanh"}


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
        if "norm_pre.weight" not in named:
            # A tower without this norm (CLIPA) has no bias in its patch embedding all the same.
            named["patch_embed.proj.bias"] = torch.zeros(width)
        config, images = _config(root.tree)
        if config and (config.get("width", 768), config.get("layers", 12)) != (width, depth):
            raise CheckpointError(
                f"{_CONFIG} beside the file is of another tower than this, of width {width} and depth {depth}"
            )
        quick, tanh = bool(config.get("quick_gelu")), config.get("act_kwargs") == _TANH
        if quick and tanh:
            raise CheckpointError(f"{_CONFIG} beside the file asks for QuickGELU and tanh GELU at once")
        act = activation or ("quick_gelu" if quick else "gelu_tanh" if tanh else "gelu")
        said = why if activation else f"{ACTIVATIONS[act]}, from {_CONFIG}" if config else _ASSUMED
        stated = None
        if config:
            if config["head_width"] < 1 or width % config["head_width"]:
                raise CheckpointError(
                    f"{_CONFIG} says heads of width {config['head_width']}, which do not divide {width}"
                )
            stated = (width // config["head_width"], _CONFIG)
            if config.get("pool_type") == "avg" and config.get("final_ln_after_pool"):
                named = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in named.items()}
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
            ("ln_post.weight", "attnpool.q_proj.weight"),
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
        siblings=SIBLINGS,
        **rest,
    )


# ------------------------------------------------------------------------------------------- other towers


def timm_tower(tree: Tree) -> tuple[str, Callable[[EncoderSpec], tuple[EncoderSpec, str]]] | None:
    """The name of timm's model in open_clip, where it is no plain transformer and a configuration tells it.

    With it comes what the configuration makes of the model's spec, and a note on that.
    """
    if not any("visual.trunk." in name for name in tree.tensors):
        return None
    config, images = _config(tree)
    name = config.get("timm_model_name")
    if not isinstance(name, str) or not timm.is_model(name) or _plain(name) is not None:
        return None

    def adapt(spec: EncoderSpec) -> tuple[EncoderSpec, str]:
        size = config.get("image_size")
        if isinstance(size, int) and size >= spec.patch_size and not size % spec.patch_size:
            spec = spec.model_copy(update={"image_size": size})
        return _images(_pooled(spec, config), images, CLIP)

    return name, adapt


def _plain(name: str) -> Any:
    """timm's model of a name, without values, where it is a plain transformer of known activation."""
    model = create_timm(name, pretrained=False, device="meta")
    known = ViTEncoder.supports(model) and type(model.blocks[0].mlp.act) in _ACTIVATIONS
    return model if known else None


def _pooled(spec: EncoderSpec, config: Options) -> EncoderSpec:
    mean = config.get("timm_pool") == "avg" or not spec.has_cls
    return spec.model_copy(update={"pooling": "mean"}) if mean else spec


def _trunk_draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    """A plain transformer of timm in open_clip: the name of timm's model says what shapes do not."""
    config, images = _config(root.tree)
    pooled = "attn_pool.latent" in tensors
    fields: dict[str, Any] = {"usual_heads": {1536: 16}} if pooled else {}
    if "norm_pre.weight" in tensors:
        fields["eps"] = 1e-5
    said = _TRUNK_ASSUMED.format(fields.get("eps", 1e-6))
    name = config.get("timm_model_name")
    if isinstance(name, str) and timm.is_model(name):
        model = _plain(name)
        if model is None:
            raise CheckpointError(
                f"{_CONFIG} says that the tower is timm's {name}, which has other tensors than the file"
            )
        block = model.blocks[0]
        fields = {
            "stated_heads": (block.attn.num_heads, f"timm's {name}"),
            "eps": block.norm1.eps,
            "activation": _ACTIVATIONS[type(block.mlp.act)],
        }
        said = f"activation and norm of timm's {name}, from {_CONFIG}"
    spec, notes = infer_spec("open_clip_timm", tensors, heads, **fields)
    spec, note = _images(_pooled(spec, config), images, replace(HALF, crop_pct=1.0) if pooled else CLIP)
    return Draft(tensors, spec, (*notes, said, note))


_ACTIVATIONS = {torch.nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
_TRUNK_ASSUMED = (
    f"WARNING: exact GELU and norm eps {{:g}} are assumed, as no {_CONFIG} is beside the file; name timm's "
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
        known_by="visual.class_embedding and visual.ln_post, with input_resolution and two more numbers",
        source="openai/CLIP",
    ),
    _family(
        "open_clip",
        "CLIP of open_clip, vision tower",
        62,
        _clip_draft("open_clip", None, ""),
        known_by="visual.class_embedding and visual.ln_post",
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
        siblings=SIBLINGS,
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
        siblings=SIBLINGS,
    ),
)
