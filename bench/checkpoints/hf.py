"""What Hugging Face keeps beside the tensors (config.json and its kin), and how it splits attention."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..transformers_models import has_transformers
from ..types import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from .beit_layout import BLOCK_TABLE, SHARED_TABLE
from .exported import as_exported
from .family import Draft, Root, Tensors
from .plain_vit import depth_of, infer_spec

RANK = 66
SOURCE = "huggingface/transformers"
# The blocks of both spellings: what save_pretrained writes, and what the models of version 5 have in memory.
BLOCK = r"(?:encoder\.layer|encoder\.layers|layers|layer|model\.layer)\.(\d+)\."
CLASSIFIERS = dict.fromkeys(
    ("classifier", "cls_classifier", "distillation_classifier", "head"), "classifier head"
)
_PARTS = ("q", "k", "v")
_SPLIT = re.compile(r"(blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
# Options of config.json and the first tensor that a model with them has.
_STATED_PARTS = {
    "num_register_tokens": "reg_token",
    "use_absolute_position_embeddings": "pos_embed",
    "use_relative_position_bias": BLOCK_TABLE,
    "use_shared_relative_position_bias": SHARED_TABLE,
    "layer_scale_init_value": "blocks.0.gamma_1",
    "layerscale_value": "blocks.0.ls1.gamma",
    "qkv_bias": "blocks.0.attn.qkv.bias",
    **{f"{name}_bias": f"blocks.0.attn.{name[0]}.bias" for name in ("query", "key", "value")},
}
_BEITS, _BEITS_BIAS = ("beit", "data2vec-vision"), "blocks.0.attn.q_bias"
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_STATED = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "include_top"),
    *("do_flip_channel_order", "rescale_offset", "offset"),
)
_NOT_FOLLOWED = ("do_flip_channel_order", "rescale_offset", "offset")
_SQUASHED_FROM = 384
Colours = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a family prepares images where no preprocessor_config.json says it, and in words why so."""

    mean: Colours
    std: Colours
    why: str
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    image_size: int | None = None
    """None: the size that the position table was made for."""


IMAGENET = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and std")
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "mean and std of 0.5")
CLIP = Preprocessing(
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
    "CLIP's mean and std",
    crop_pct=1.0,
)


# ------------------------------------------------------------------------------------------- tensors


def attention(query: str, key: str, value: str, out: str) -> tuple[tuple[str, str], ...]:
    """Renames of a block's attention from these names (patterns after the block's own)."""
    names = zip((query, key, value), _PARTS, strict=True)
    parts = tuple((rf"{BLOCK}{name}\.(\w+)", rf"blocks.\1.attn.{part}.\2") for name, part in names)
    return (*parts, (rf"{BLOCK}{out}\.(\w+)", r"blocks.\1.attn.proj.\2"))


# On disk the parts of BERT's attention, in memory those of the text models.
ATTENTION = attention(
    r"attention\.(?:attention\.query|q_proj)",
    r"attention\.(?:attention\.key|k_proj)",
    r"attention\.(?:attention\.value|v_proj)",
    r"attention\.(?:output\.dense|o_proj)",
)


def fuse_qkv(tensors: Tensors, without_bias: str = "") -> dict[str, torch.Tensor]:
    """The tensors with query, key and value of every block one below the other.

    ``without_bias`` names parts (``k``) whose bias may be missing where others have one: it is then zero.

    Raises:
        CheckpointError: a block has only some of the three, or other ones than the first block.
    """
    fused = {name: tensor for name, tensor in tensors.items() if not _SPLIT.fullmatch(name)}
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _SPLIT.fullmatch(name):
            groups.setdefault((found[1], found[3]), {})[found[2]] = tensor
    for (block, kind), parts in groups.items():
        first = groups.get(("blocks.0.attn", kind), {})
        needed = [part for part in _PARTS if part in first or kind == "weight" or part not in without_bias]
        if lacking := [part for part in needed if part not in parts]:
            raise CheckpointError(
                f"{block} has no {lacking[0]}.{kind} (query, key, value: q, k, v); the file is not complete"
            )
        if kind == "bias":
            zeros = torch.zeros_like(next(iter(parts.values())))
            parts = dict.fromkeys(_PARTS, zeros) | parts
        fused[f"{block}.qkv.{kind}"] = torch.cat([parts[part] for part in _PARTS])
    return fused


# ------------------------------------------------------------------------------------------- model


def vision_config(root: Root, tensors: Tensors) -> Mapping[str, Any]:
    """What config.json says of the vision model, or nothing where there is none.

    It may leave out whatever is the default of transformers, even the width. ``tensors`` are the encoder's,
    in timm's or BEiT's names.

    Raises:
        CheckpointError: it is of another model than the weights, or states what they lack.
    """
    config = root.tree.config
    inner = config.get("vision_config")
    config = inner if isinstance(inner, Mapping) else config
    if not {"model_type", "hidden_size"} & config.keys():
        return {}
    dim, depth = tensors["patch_embed.proj.weight"].shape[0], depth_of(tensors)
    stated = config.get("hidden_size", dim), config.get("num_hidden_layers", depth)
    if stated != (dim, depth):
        raise CheckpointError(
            f"the config.json beside the file is of another model: its width and depth are {stated[0]} and "
            f"{stated[1]}, those of the weights {dim} and {depth}; move the file to a folder of its own"
        )
    if lacking := _lacking(config, tensors):
        raise CheckpointError(
            f"config.json says {lacking}, and the file has none; it is not complete, or of another model"
        )
    return config


def _lacking(config: Mapping[str, Any], tensors: Tensors) -> str | None:
    """What config.json states and the tensors do not have, or None."""
    for option, name in _STATED_PARTS.items():
        value = config.get(option)
        if value and name not in tensors:
            return f"{option} {value!r}"
    registers = config.get("num_register_tokens")
    if registers and registers != tensors["reg_token"].shape[1]:
        return f"num_register_tokens {registers!r}"
    kind = config.get("model_type")
    if kind and (kind in _BEITS) != (_BEITS_BIAS in tensors):
        of = "queries and values alone" if kind in _BEITS else "keys too"
        return f"model_type {kind!r}, whose attention has biases for {of}"
    return None


def stated_heads(config: Mapping[str, Any], dim: int) -> tuple[int, str] | None:
    """The number of attention heads in config.json. Raises CheckpointError where it cannot be."""
    heads = config.get("num_attention_heads")
    if heads is None:
        return None
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise CheckpointError(
            f"config.json says {heads!r} attention heads, which do not divide the width {dim}"
        )
    return heads, "config.json"


def stated_eps(config: Mapping[str, Any], default: float) -> float:
    """The epsilon of the norms in config.json, or else the default of transformers for the model.

    Raises:
        CheckpointError: it is no positive number.
    """
    eps = config.get("layer_norm_eps", default)
    if not isinstance(eps, int | float) or eps <= 0:
        raise CheckpointError(f"config.json says layer_norm_eps {eps!r}; expected a small positive number")
    return float(eps)


def stated_activation(config: Mapping[str, Any], default: str) -> str:
    """The activation of the MLP in the words of ``VitArch``. Raises CheckpointError for another one."""
    name = config.get("hidden_act", default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json says the activation {name!r}; known are {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def config_note(config: Mapping[str, Any], eps: float, activation: str) -> str:
    """Where norm and activation come from."""
    said = f"norm eps {eps:g} and {ACTIVATIONS[activation]}"
    if config:
        kind = config.get("model_type", "no model_type")
        return f"{said}, from config.json ({kind}) or by the defaults of transformers"
    return f"{said}, the default of transformers, as no config.json is beside the file"


ACTIVATIONS = {"gelu": "exact GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "QuickGELU", "silu": "SiLU"}


# ------------------------------------------------------------------------------------------- images


def prepared(spec: EncoderSpec, root: Root, default: Preprocessing) -> tuple[EncoderSpec, str]:
    """The spec with the preprocessing that the folder states, or else the family's, and a note on it.

    Raises:
        CheckpointError: the preprocessing is not one that can be followed.
    """
    stated = _processor(root)
    if not stated:
        fields: dict[str, Any] = {
            "mean": default.mean,
            "std": default.std,
            "interpolation": default.interpolation,
            "crop_pct": default.crop_pct,
        }
        if default.image_size and not default.image_size % spec.patch_size:
            fields["image_size"] = default.image_size
        note = f"{default.why}, as no preprocessor_config.json is beside the file; #mean= and std= set others"
        return spec.model_copy(update=fields), note
    fields, notes = _geometry(stated, spec)
    fields["mean"], fields["std"] = _colours(stated, default)
    resample = stated.get("resample")
    named = _RESAMPLING.get(resample) if isinstance(resample, int) else default.interpolation
    if named is None:
        notes.append(f"PIL's resampling {resample} is not available here: bicubic")
    fields["interpolation"] = named or "bicubic"
    note = "; ".join(("mean, std and size from preprocessor_config.json", *notes))
    return spec.model_copy(update=fields), note


def _colours(stated: Mapping[str, Any], default: Preprocessing) -> tuple[Colours, Colours]:
    """Mean and deviation of pixels between 0 and 1 that do what the processor does to those up to 255.

    Raises:
        CheckpointError: they are no numbers, or the processor does more to the pixels than that.
    """
    other = [key for key in _NOT_FOLLOWED if stated.get(key)]
    if other:
        raise CheckpointError(
            f"the preprocessing beside the file asks for {other[0]}, which is not supported; load the "
            "encoder through a python: factory that does it"
        )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if stated.get("do_normalize", True):
        mean = three_numbers(stated.get("image_mean") or default.mean, "image_mean")
        std = three_numbers(stated.get("image_std") or default.std, "image_std")
        if stated.get("include_top"):
            # EfficientNet's: the deviation divides a second time.
            std = std[0] ** 2, std[1] ** 2, std[2] ** 2
    factor = stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise CheckpointError(
            f"the preprocessing beside the file has rescale_factor {factor!r}; expected a positive number"
        )
    # Numbers written by hand, as 0.00392156862745098, stay what they mean.
    scale = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-6) else 255 * factor
    return (mean[0] / scale, mean[1] / scale, mean[2] / scale), (
        std[0] / scale,
        std[1] / scale,
        std[2] / scale,
    )


def _processor(root: Root) -> Mapping[str, Any]:
    """preprocessor_config.json, or the part for images of processor_config.json (transformers 5)."""
    folder = root.tree.folder
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if folder is None or not (folder / name).is_file():
            continue
        try:
            stated = json.loads((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} beside the file cannot be read: {error}") from error
        stated = stated.get(part) if part and isinstance(stated, dict) else stated
        if isinstance(stated, dict):
            return {**_defaults(stated), **stated}
    return {}


def _defaults(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the class of a processor takes where its file says nothing; empty without the library."""
    name = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "")))
    if not name or not has_transformers():
        return {}
    import transformers

    known = getattr(transformers, name.replace("FeatureExtractor", "ImageProcessor"), None)
    return {key: getattr(known, key, None) for key in _STATED} if hasattr(known, "do_normalize") else {}


def _geometry(stated: Mapping[str, Any], spec: EncoderSpec) -> tuple[dict[str, Any], list[str]]:
    """Image size and crop: shortest edge and centre crop, as everywhere here."""
    if not stated.get("do_resize", True):
        return {}, [f"no resizing is stated; images of {spec.image_size} pixels"]
    size = _side(stated.get("size"), "size")
    crops = bool(stated.get("do_center_crop", "crop_size" in stated))
    crop = _side(stated.get("crop_size"), "crop_size") if crops else size
    size, crop = size or crop or spec.image_size, crop or size or spec.image_size
    portion = crop / size
    if stated.get("crop_pct") is not None:
        portion, crops = _portion(stated["crop_pct"], portion, size, crops)
    if crop % spec.patch_size:
        return {}, [
            f"{crop} pixels are no multiple of the patch size {spec.patch_size}; {spec.image_size} are taken"
        ]
    notes = []
    if not crops:
        notes.append("transformers squashes the image to a square, here its centre square is taken")
    return {"image_size": crop, "crop_pct": min(1.0, portion)}, notes


def _portion(value: Any, portion: float, size: int, crops: bool) -> tuple[float, bool]:
    """How much of the image a processor with a ``crop_pct`` keeps, and whether it crops: of PoolFormer, which
    crops from a size enlarged by it, and of ConvNeXt, which does so below 384 pixels and squashes above.
    """
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise CheckpointError(
            f"the preprocessing beside the file has crop_pct {value!r}; expected a number up to 1"
        )
    if crops:
        return portion * value, True
    return (float(value), True) if size < _SQUASHED_FROM else (1.0, False)


def _side(value: Any, name: str) -> int | None:
    """The side of a square, or the shortest edge, in pixels; None where nothing is said."""
    if isinstance(value, Mapping):
        sides = [value[key] for key in ("height", "width", "shortest_edge") if value.get(key) is not None]
        if any(side != sides[0] for side in sides):
            raise CheckpointError(f"preprocessor_config.json has {name} {dict(value)}, which is no square")
        value = sides[0] if sides else None
    if value is None:
        return None
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"preprocessor_config.json has {name} {value!r}; expected pixels")
    return value


def three_numbers(values: Any, name: str) -> Colours:
    """A number for each colour. Raises CheckpointError for anything else."""
    numbers = [v for v in values if isinstance(v, int | float)] if isinstance(values, list | tuple) else []
    if len(numbers) != 3 or len(values) != 3:
        raise CheckpointError(
            f"the preprocessing beside the file has {name} {values!r}; expected three numbers"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


# ------------------------------------------------------------------------------------------- drafts


def hf_draft(
    family: str,
    *,
    eps: float,
    activation: str = "gelu",
    preprocessing: Callable[[Root, Mapping[str, Any]], Preprocessing],
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    says: tuple[str, ...] = (),
    **fields: Any,
) -> Callable[[Root, Tensors, int | None], Draft]:
    """The draft of a family of transformers whose tensors, once renamed, are a plain vision transformer's.

    Args:
        family: its name.
        eps: of the norms, where config.json is not there (the default of transformers).
        activation: likewise, in the words of transformers.
        preprocessing: from the root and config.json to the family's own, for a file alone.
        prepare: from the renamed tensors, with fused qkv, to timm's layout.
        says: notes for the result.
        fields: go to ``infer_spec``.
    """

    def draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
        tensors = prepare(fuse_qkv(tensors))
        dim = tensors["patch_embed.proj.weight"].shape[0]
        config = vision_config(root, tensors)
        norm_eps, act = stated_eps(config, eps), stated_activation(config, activation)
        spec, notes = infer_spec(
            family,
            tensors,
            heads,
            **{"stated_heads": stated_heads(config, dim), "eps": norm_eps, "activation": act, **fields},
        )
        spec, note = prepared(as_exported(spec, config), root, preprocessing(root, config))
        return Draft(tensors, spec, (*notes, config_note(config, norm_eps, act), note, *says))

    return draft
