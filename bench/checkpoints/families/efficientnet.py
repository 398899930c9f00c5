"""EfficientNet and EfficientNet-Lite in the names of EfficientNet-PyTorch (lukemelas/EfficientNet-PyTorch).

The networks are those of TensorFlow, with its padding, as timm has them (``tf_efficientnet_*``). The package
normalises by ImageNet's mean and deviation, the Lite models by (x - 127) / 128 of 8-bit numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError
from ...timm_models import create_timm
from ...types import IMAGENET_MEAN, IMAGENET_STD
from ..family import Draft, Family, Root, Tensors, refuse_heads
from ..timm_build import timm_draft

_LITE = tuple(f"tf_efficientnet_lite{i}" for i in range(5))
_FULL = tuple(f"tf_efficientnet_b{i}" for i in range(9))


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    refuse_heads(heads)
    lite = not any("._se_reduce." in name for name in tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in _LITE if lite else _FULL:
        with torch.device("meta"):
            model = create_timm(name, pretrained=False)
        names = _names(model)
        expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        if {names.get(k, k): shape for k, shape in shapes.items()} == expected:
            break
    else:
        raise CheckpointError(f"its shapes are those of none of {', '.join(_LITE if lite else _FULL)}")
    fields: dict[str, Any] = {
        "mean": (127 / 255,) * 3 if lite else IMAGENET_MEAN,
        "std": (128 / 255,) * 3 if lite else IMAGENET_STD,
    }
    return timm_draft(
        "efficientnet",
        name,
        {},
        {names[k]: tensor for k, tensor in tensors.items()},
        notes=(
            f"the shapes are those of timm's {name}",
            *(("Lite models normalise by (x - 127) / 128",) if lite else ()),
        ),
        interpolation="bicubic",
        crop_pct=0.875,
        pooling="mean",
        **fields,
    )


def _names(model: Any) -> Mapping[str, str]:
    """From the names of EfficientNet-PyTorch to timm's, whose blocks are counted by stage."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    places = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    for i, place in enumerate(places):
        expands = hasattr(model.get_submodule(place), "conv_pwl")
        parts = (
            ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
            if expands
            else ("", "", "conv_dw", "bn1", "conv_pw", "bn2")
        )
        theirs = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
        names |= {f"_blocks.{i}.{a}": f"{place}.{b}" for a, b in zip(theirs, parts, strict=True) if b}
        names |= {f"_blocks.{i}._se_{a}": f"{place}.se.conv_{a}" for a in ("reduce", "expand")}
    ends = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{a}.{end}": f"{b}.{end}" for a, b in names.items() for end in ends}


FAMILY = Family(
    name="efficientnet",
    title="EfficientNet and EfficientNet-Lite in the names of EfficientNet-PyTorch",
    rank=44,
    anchors=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"),
    draft=_draft,
    known_by="_conv_stem and _blocks.0._depthwise_conv",
    evaluated="mean of the last map",
    source="lukemelas/EfficientNet-PyTorch",
    drop={r"_fc\..*": "classifier head"},
)
