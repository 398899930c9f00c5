"""How the processors of Hugging Face prepare images: preprocessor_config.json beside the tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..transformers_models import has_transformers
from ..types import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from .family import Root

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
