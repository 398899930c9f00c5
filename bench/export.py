"""An encoder written for other programs: timm, transformers, and the official code of MAE.

timm    the weights in timm's names, and the config.json that names a registered model and its arguments
hf      a folder that transformers' ViTModel loads, with its preprocessing
mae     {"model": ...} as facebookresearch/mae saves it, for its models_vit.py and main_finetune.py

Every format gives the same features as the encoder had here. What a layout cannot say is refused with the
reason, never left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from .backbones import ViTEncoder, resample_positions
from .checkpoints.plain_vit import infer_heads
from .encoders import load_encoder
from .errors import CheckpointError, ConfigError, did_you_mean
from .results import atomic_write
from .timm_models import create_timm
from .types import EncoderSpec, Pooling, View
from .vit import VitArch, build_vit

ExportFormat = Literal["timm", "hf", "mae"]
State = dict[str, torch.Tensor]

_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_MAE_EPS = 1e-6

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

_MAE_MODELS = {
    (768, 12, 12, 16): "vit_base_patch16",
    (1024, 24, 16, 16): "vit_large_patch16",
    (1280, 32, 16, 14): "vit_huge_patch14",
}

# The names of transformers 4, which version 5 renames as it loads.
_HF_NAMES = (
    (r"cls_token$", "embeddings.cls_token"),
    (r"pos_embed$", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"norm\.", "layernorm."),
)
_HF_POOLED: dict[Pooling, str] = {
    "cls": "last_hidden_state[:, 0]",
    "mean": "last_hidden_state[:, 1:].mean(1)",
    "cls+mean": "last_hidden_state[:, 0] and last_hidden_state[:, 1:].mean(1)",
}
_PIL_RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        format: as asked.
        paths: the files, the weights first.
        tensors: number of tensors in the file of weights.
        parameters: number of numbers in them.
        how_to_load: one line of Python that loads the result, with its own imports.
        notes: what a reader should know: what the format cannot say, and what was converted.
    """

    format: ExportFormat
    paths: tuple[Path, ...]
    tensors: int
    parameters: int
    how_to_load: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """The content of an export: weights, JSON files by their names, the line that loads them, notes."""

    state: State
    files: Mapping[str, Mapping[str, Any]]
    how_to_load: str
    notes: tuple[str, ...] = ()


def export_encoder(reference: str, format: ExportFormat, out: str | Path) -> ExportSummary:  # noqa: A002
    """Write an encoder in the layout of another program.

    Args:
        reference: any reference of ``load_encoder`` that is a plain vision transformer. ``#image_size=``
            and the other options apply; positions of another size are resampled as at run time.
        format: ``timm``, ``hf`` or ``mae``; see the module's docstring.
        out: ``mae``: a file, .pth or .safetensors. ``timm``: such a file, or a folder for
            ``model.safetensors``; ``config.json`` goes beside it. ``hf``: a folder, or
            ``FOLDER/model.safetensors``. Folders are made; nothing that exists is overwritten.

    Raises:
        CheckpointError: the reference cannot be loaded, is no plain vision transformer, or has what the
            format cannot express.
        ConfigError: the format is not known, or ``out`` does not suit it, exists, or cannot be written.
    """
    if format not in get_args(ExportFormat):
        raise ConfigError(f"there is no format {format!r}. {did_you_mean(format, get_args(ExportFormat))}")
    weights = _target(format, Path(out))
    encoder = load_encoder(reference)
    if not isinstance(encoder, ViTEncoder):
        raise CheckpointError(
            f"{reference} is no plain vision transformer ({type(getattr(encoder, 'model', None)).__name__} "
            f"in {type(encoder).__name__}); only plain ones can be exported"
        )
    make: dict[str, Callable[[ViTEncoder, Path], _Draft]] = {"timm": _timm, "hf": _hf, "mae": _mae}
    try:
        draft = make[format](encoder, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{reference} cannot be exported as {format}: {error}") from error
    paths = (weights, *(weights.parent / name for name in draft.files))
    _write(format, paths, draft)
    return ExportSummary(
        format=format,
        paths=paths,
        tensors=len(draft.state),
        parameters=sum(tensor.numel() for tensor in draft.state.values()),
        how_to_load=draft.how_to_load,
        notes=(*_general_notes(encoder), *draft.notes),
    )


# ------------------------------------------------------------------------------------------- files


def _target(format: ExportFormat, out: Path) -> Path:  # noqa: A002
    """The file of weights that ``out`` means; ConfigError where it does not suit the format or exists."""
    suffixes = {"timm": (".safetensors", ".pth"), "hf": (), "mae": (".pth", ".pt", ".safetensors")}[format]
    beside = {"timm": ("config.json",), "hf": ("config.json", "preprocessor_config.json"), "mae": ()}[format]
    is_folder = out.suffix not in _WEIGHTS or out.is_dir()
    if format == "mae" and is_folder:
        raise ConfigError(f"--out {out}: the format mae is one file; give it the ending .pth or .safetensors")
    if format == "hf" and not is_folder and out.name != "model.safetensors":
        raise ConfigError(f"--out {out}: transformers loads a folder with model.safetensors; give the folder")
    if not is_folder and suffixes and out.suffix not in suffixes:
        raise ConfigError(
            f"--out {out}: a file of the format {format} ends in {' or '.join(suffixes)}, not {out.suffix}"
        )
    weights = out / "model.safetensors" if is_folder else out
    folder = weights.parent
    for path in (weights, *(folder / name for name in beside)):
        if path.exists():
            raise ConfigError(f"{path} exists; delete it or choose another --out")
    # timm and transformers open whichever weights the folder has, and a config.json speaks for all of them.
    if beside and folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
        if others:
            raise ConfigError(
                f"{folder} holds other weights ({others[0]}), which the config.json of this export would "
                "describe wrongly; choose a folder of its own"
            )
    return weights


def _write(format: ExportFormat, paths: tuple[Path, ...], draft: _Draft) -> None:  # noqa: A002
    """Write all files, each of them atomically, or none; ConfigError where that is not possible."""
    weights, *others = paths
    try:
        with atomic_write(weights, "wb") as stream:
            if weights.suffix == ".safetensors":
                from safetensors.torch import save

                stream.write(save(draft.state, metadata={"format": "pt"}))
            else:
                torch.save({"model": draft.state} if format == "mae" else draft.state, stream)
        for path, content in zip(others, draft.files.values(), strict=True):
            with atomic_write(path) as stream:
                json.dump(content, stream, indent=2, allow_nan=False)
                stream.write("\n")
    except BaseException as error:
        for path in paths:  # none of them was there before
            if path.exists():
                path.unlink()
        if isinstance(error, OSError):
            raise ConfigError(f"{weights} cannot be written: {error.strerror or error}") from error
        raise


def _general_notes(encoder: ViTEncoder) -> Iterator[str]:
    spec, own = encoder.spec, encoder.model.patch_embed
    if encoder.info.random_weights:
        yield "random weights: not a trained model"
    if spec.image_size != own.img_size[0]:
        old, new = own.grid_size[0], spec.image_size // spec.patch_size
        yield f"positions resampled from {old}x{old} to {new}x{new} patches by timm's rule"
    if not spec.final_norm:
        yield "the global feature here is taken before the final norm; the exported model applies that norm"


# ------------------------------------------------------------------------------------------- the encoder


def _state(encoder: ViTEncoder, *, class_row: bool = False) -> State:
    """The weights without a classifier, positions for the spec's image size, each in memory of its own.

    ``class_row`` puts a zero row before positions that cover the patches only. That is exact: to such a
    class token nothing is added.
    """
    model, side = encoder.model, encoder.spec.image_size // encoder.spec.patch_size
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    table = model.pos_embed
    rows = table[:, :prefix]
    if class_row and model.no_embed_class:
        rows = table.new_zeros(1, 1, table.shape[-1])
    grid = (side, side)
    body = resample_positions(table[:, prefix:], tuple(model.patch_embed.grid_size), grid, "timm")
    state["pos_embed"] = torch.cat([rows, body.to(table.dtype)], dim=1)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _plain_arch(model: Any, image_size: int) -> VitArch:
    """What a timm ``VisionTransformer`` is built of, where nothing in it goes beyond ``VitArch``.

    Raises:
        CheckpointError: something does: another activation, norms of queries and keys, a norm before the
            blocks. Its weights would load elsewhere and give other features.
    """
    for i, block in enumerate(model.blocks):
        kinds = (type(block), *(type(getattr(block, part, None)) for part in ("attn", "mlp")))
        if kinds != (Block, Attention, Mlp):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"block {i} is not that of a plain vision transformer ({names})")
    arch = _read_arch(model, image_size)
    found, plain = _parts(model), _parts(build_vit(arch.model_dump(), device="meta"))
    for name in sorted({**found, **plain}, key=plain.__contains__):  # what a plain one lacks says most
        if found.get(name) != plain.get(name):
            raise CheckpointError(
                f"its {name} is {found.get(name, 'absent')}, which in a plain vision transformer is "
                f"{plain.get(name, 'absent')}"
            )
    return arch


def _read_arch(model: Any, image_size: int) -> VitArch:
    """The fields of ``VitArch`` of a model of timm's usual blocks."""
    first = model.blocks[0]
    return VitArch(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=first.attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
        image_size=image_size,
        mlp_ratio=first.mlp.fc1.out_features / model.embed_dim,
        class_token=model.has_class_token,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=model.no_embed_class,
        qkv_bias=first.attn.qkv.bias is not None,
        init_values=None if isinstance(first.ls1, nn.Identity) else 1e-5,
        eps=getattr(first.norm1, "eps", 1e-6),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
    )


def _parts(model: nn.Module) -> dict[str, str]:
    """The modules that decide the arithmetic of the features in evaluation mode, each with its settings."""
    return {
        name: f"{type(part).__name__}({getattr(part, 'num_heads', None) or part.extra_repr()})"
        for name, part in model.named_modules()
        if name and name != "head" and not isinstance(part, nn.Identity | nn.Dropout | DropPath)
    }


def _mlp_ratio(arch: VitArch) -> float:
    """The ratio from which timm's ``int(dim * ratio)`` gets the hidden width, which may fall one short."""
    hidden = round(arch.embed_dim * arch.mlp_ratio)
    ratio = hidden / arch.embed_dim
    return ratio if int(arch.embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _require(what: Mapping[str, bool], layout: str) -> None:
    """Raise CheckpointError where anything of ``what`` is true: the layout has no place for it."""
    if beyond := [name for name, true in what.items() if true]:
        raise CheckpointError(f"{layout} knows no {', no '.join(beyond)}; use the format timm")


# ------------------------------------------------------------------------------------------- timm


def _timm(encoder: ViTEncoder, weights: Path) -> _Draft:
    spec, model = encoder.spec, encoder.model
    pool = "avg" if spec.pooling == "mean" else "token"
    if spec.arch.get("builder") == "timm":
        name, args = spec.arch["name"], dict(spec.arch.get("kwargs") or {})
        if (model.global_pool == "token") != (pool == "token"):
            args |= {"global_pool": pool, "fc_norm": not isinstance(model.fc_norm, nn.Identity)}
        if spec.image_size != model.patch_embed.img_size[0]:
            args["img_size"] = spec.image_size
    else:
        name, args = timm_name(_plain_arch(model, spec.image_size), spec.pooling)
    state = _state(encoder)
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
    }
    folder = f"local-dir:{weights.parent}"
    notes = [f"timm's {name}" + (f" with {_keywords(args)}" if args else "")]
    if spec.pooling == "cls+mean":
        notes.append("timm pools the class token alone; the global feature here is cls+mean")
    return _Draft(
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
    parts = _parts(build_vit(arch.model_dump(), device="meta"))
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
        if _parts(built) == parts:
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
        "mlp_ratio": _mlp_ratio(arch),
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
    arch = _read_arch(model, model.patch_embed.img_size[0])
    pre_norm = not isinstance(model.norm_pre, nn.Identity)
    return _timm_args(arch, model.global_pool) | {"pre_norm": pre_norm}


def _keywords(args: Mapping[str, Any]) -> str:
    """Keyword arguments as Python writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in args.items())


# ------------------------------------------------------------------------------------------- transformers


def _hf(encoder: ViTEncoder, weights: Path) -> _Draft:
    spec = encoder.spec
    arch = _plain_arch(encoder.model, spec.image_size)
    _require(
        {
            "encoder without a class token": not arch.class_token,
            "register tokens": arch.reg_tokens > 0,
            "layer scale": arch.init_values is not None,
            "norm after the mean of patches": arch.fc_norm,
        },
        "transformers' ViTModel",
    )
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.embed_dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_heads,
        "intermediate_size": round(arch.embed_dim * arch.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": arch.eps,
        "image_size": arch.image_size,
        "patch_size": arch.patch_size,
        "num_channels": 3,
        "qkv_bias": arch.qkv_bias,
    }
    return _Draft(
        dict(_hf_tensors(_state(encoder, class_row=True))),
        {"config.json": config, "preprocessor_config.json": _hf_preprocessing(spec)},
        "from transformers import ViTModel; "
        f"model = ViTModel.from_pretrained({str(weights.parent)!r}, add_pooling_layer=False)",
        (
            f"the global feature here ({spec.pooling}): {_HF_POOLED[spec.pooling]}; "
            "ViTModel's own pooler has no weights in this export",
            "images of other sizes: interpolate_pos_encoding=True, whose rule is not timm's (no antialias)",
        ),
    )


def _hf_tensors(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the names of transformers; the rows of a fused qkv are query, key and value."""
    for name, tensor in state.items():
        if fused := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            block, kind = fused.groups()
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"encoder.layer.{block}.attention.attention.{part}.{kind}", rows.clone()
            continue
        pattern, replacement = next(pair for pair in _HF_NAMES if re.match(pair[0], name))
        yield re.sub(f"^{pattern}", replacement, name), tensor


def _hf_preprocessing(spec: EncoderSpec) -> dict[str, Any]:
    """The classification view. ViT's own processor cannot crop; the one of BiT (and DINOv2) can."""
    view = View.crop(spec)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize},
        "resample": _PIL_RESAMPLING[view.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": view.size, "width": view.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }


# ------------------------------------------------------------------------------------------- MAE


def _mae(encoder: ViTEncoder, weights: Path) -> _Draft:
    spec = encoder.spec
    arch = _plain_arch(encoder.model, spec.image_size)
    _require(
        {
            "encoder without a class token": not arch.class_token,
            "register tokens": arch.reg_tokens > 0,
            "layer scale": arch.init_values is not None,
            "attention without a bias of queries, keys and values": not arch.qkv_bias,
            f"norms of eps {arch.eps:g} (its models have {_MAE_EPS:g})": arch.eps != _MAE_EPS,
        },
        "the official code of MAE",
    )
    notes = []
    try:
        heads, _ = infer_heads(arch.embed_dim, arch.depth, None)
    except CheckpointError:
        heads = 0
    if heads != arch.num_heads:
        notes.append(f"the layout does not say the number of heads: lmim-bench needs #heads={arch.num_heads}")
    if not arch.fc_norm and spec.pooling != "cls":
        notes.append(f"the global feature here is {spec.pooling}; models_vit.py returns the class token")
    if arch.fc_norm:
        notes.append(
            "this is the layout of a fine-tuned model without its head: main_finetune.py --finetune takes "
            "pre-trained ones only"
        )
    if weights.suffix == ".safetensors":
        notes.append("main_finetune.py reads torch files only; export to .pth for it")
    return _Draft(_state(encoder, class_row=True), {}, _mae_line(arch, weights), tuple(notes))


def _mae_line(arch: VitArch, weights: Path) -> str:
    """The line that loads an export with models_vit.py, in the folder of the official code."""
    path = str(weights)
    size = {} if arch.image_size == 224 else {"img_size": arch.image_size}
    common = _keywords({**size, "num_classes": 0, "global_pool": arch.fc_norm})
    name = _MAE_MODELS.get((arch.embed_dim, arch.depth, arch.num_heads, arch.patch_size))
    if name and arch.mlp_ratio == 4:
        imports, model = "torch, models_vit", f"models_vit.{name}({common})"
    else:
        shape = _keywords(
            {
                "patch_size": arch.patch_size,
                "embed_dim": arch.embed_dim,
                "depth": arch.depth,
                "num_heads": arch.num_heads,
                "mlp_ratio": _mlp_ratio(arch),
                "qkv_bias": True,
            }
        )
        imports = "functools, torch, models_vit"
        norm = f"functools.partial(torch.nn.LayerNorm, eps={_MAE_EPS:g})"
        model = f"models_vit.VisionTransformer({shape}, norm_layer={norm}, {common})"
    if weights.suffix == ".safetensors":
        imports, state = f"{imports}, safetensors.torch", f"safetensors.torch.load_file({path!r})"
    else:
        state = f"torch.load({path!r}, map_location='cpu')['model']"
    return f"import {imports}; model = {model}; model.load_state_dict({state})"
