"""The weights in timm's names, and the config.json that names a registered model and its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..backbones import ViTEncoder
from ..checkpoints.exported import global_feature
from ..errors import CheckpointError
from ..timm_models import create_timm
from ..types import Pooling
from ..vit import VitArch, build_vit
from .plain import Draft, arch_of, arithmetic_parts, keywords, plain_arch, plain_state

# (width, depth, heads) -> how timm's names call a plain transformer of that size.
_TIMM_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
    (1408, 40, 16): "giant",
    (1664, 48, 16): "gigantic",
}
# Arguments cannot set the eps of the norms: the second name is there for its eps of 1e-5 alone.
_TIMM_FALLBACKS = ("vit_base_patch16_224", "vit_base_patch16_clip_224")


def draft_timm(encoder: ViTEncoder, weights: Path) -> Draft:
    """An encoder for ``timm.create_model``. Raises CheckpointError where timm has no such model."""
    spec, model = encoder.spec, encoder.model
    pool = "avg" if spec.pooling == "mean" else "token"
    if spec.arch.get("builder") == "timm":
        name, args = spec.arch["name"], dict(spec.arch.get("kwargs") or {})
        # An attention pooling is a part of the weights: it stays.
        if model.attn_pool is None and (model.global_pool == "token") != (pool == "token"):
            args |= {"global_pool": pool, "fc_norm": not isinstance(model.fc_norm, nn.Identity)}
        if spec.image_size != model.patch_embed.img_size[0]:
            args["img_size"] = spec.image_size
    else:
        name, args = timm_name(plain_arch(model, spec.image_size), spec.pooling)
    state = plain_state(encoder)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": spec.embed_dim,
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **global_feature(spec),
    }
    folder = f"local-dir:{weights.parent}"
    notes = [f"timm's {name}" + (f" with {keywords(args)}" if args else "")]
    if spec.pooling == "cls+mean":
        notes.append("timm pools the class token alone; the global feature here is cls+mean")
    return Draft(
        state,
        {"config.json": config},
        f"import timm; model = timm.create_model({folder!r}, pretrained=True)",
        tuple(notes),
    )


def timm_name(arch: VitArch, pooling: Pooling) -> tuple[str, dict[str, Any]]:
    """The registered timm model nearest to a plain vision transformer, and the arguments that differ.

    Raises:
        CheckpointError: no registered model can be given this shape by arguments (the eps of its norms).
    """
    size = _TIMM_SIZES.get((arch.embed_dim, arch.depth, arch.num_heads))
    names = [f"vit_{size}_patch{arch.patch_size}_{arch.image_size}", f"vit_{size}_patch16_224"]
    if arch.init_values is not None:
        names += [f"vit_{size}_patch14_dinov2", f"vit_{size}_patch14_reg4_dinov2"]
    wanted = _timm_args(arch, "avg" if pooling == "mean" else "token")
    parts = arithmetic_parts(build_vit(arch.model_dump(), device="meta"))
    found: list[tuple[str, dict[str, Any]]] = []
    for name in dict.fromkeys((*filter(timm.is_model, names), *_TIMM_FALLBACKS)):
        if found and name in _TIMM_FALLBACKS:
            break
        base = create_timm(name, pretrained=False, device="meta")
        known = _known_args(base)
        args = {key: value for key, value in wanted.items() if known[key] != value}
        if {"global_pool", "fc_norm"} & args.keys():  # the one changes the default of the other
            args |= {key: wanted[key] for key in ("global_pool", "fc_norm")}
        built = create_timm(name, pretrained=False, device="meta", **args) if args else base
        if arithmetic_parts(built) == parts:
            found.append((name, args))
    if not found:
        raise CheckpointError(f"no registered model of timm {timm.__version__} has norms of eps {arch.eps:g}")
    return min(found, key=lambda entry: len(entry[1]))


def _timm_args(arch: VitArch, global_pool: str) -> dict[str, Any]:
    """The arguments of timm's ``VisionTransformer`` that decide the shape and the pooling."""
    return {
        "img_size": arch.image_size,
        "patch_size": arch.patch_size,
        "embed_dim": arch.embed_dim,
        "depth": arch.depth,
        "num_heads": arch.num_heads,
        "mlp_ratio": arch.timm_ratio,
        "qkv_bias": arch.qkv_bias,
        "init_values": arch.init_values,
        "class_token": arch.class_token,
        "reg_tokens": arch.reg_tokens,
        "no_embed_class": arch.no_embed_class,
        "pre_norm": False,
        "global_pool": global_pool,
        "fc_norm": arch.fc_norm,
    }


def _known_args(model: Any) -> dict[str, Any]:
    """The same arguments, of a model that timm built."""
    arch = arch_of(model, model.patch_embed.img_size[0])
    pre_norm = not isinstance(model.norm_pre, nn.Identity)
    return _timm_args(arch, model.global_pool) | {"pre_norm": pre_norm}
