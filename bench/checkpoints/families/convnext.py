"""ConvNeXt and ConvNeXt V2, in the official names (facebookresearch/ConvNeXt, ConvNeXt-V2) and in timm's.

The official model norms the mean of the last map; patch features carry no norm. A file of ConvNeXt V2's
masked pre-training holds sparse convolutions in other shapes, which are turned as its own conversion does.
DINOv3's ConvNeXt (facebookresearch/dinov3) lists its norm a second time.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ...errors import CheckpointError
from ...types import IMAGENET_MEAN, IMAGENET_STD
from ..family import Draft, Family, Root, Tensors, refuse_heads
from ..timm_build import timm_draft

_FIRST = ("downsample_layers.0.0.weight", "stem.0.weight")
_OFFICIAL = (
    (r"downsample_layers\.0\.(\d)\.(\w+)", r"stem.\1.\2"),
    (r"downsample_layers\.([1-3])\.(\d)\.(\w+)", r"stages.\1.downsample.\2.\3"),
    (r"stages\.(\d)\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"stages\.(\d)\.(\d+)\.pwconv([12])\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"stages\.(\d)\.(\d+)\.grn\.beta", r"stages.\1.blocks.\2.mlp.grn.bias"),
    (r"stages\.(\d)\.(\d+)\.grn\.gamma", r"stages.\1.blocks.\2.mlp.grn.weight"),
    (r"stages\.(\d)\.(\d+)\.(norm\.\w+|gamma)", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(\w+)", r"head.norm.\1"),
)
_DINOV3 = (
    "DINOv3's ConvNeXt: the global feature is its own; it norms the patch features too, which carry none here"
)


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    refuse_heads(heads)
    for name, tensor in root.tensors.items():
        if name.startswith("norms.3.") and not torch.equal(
            tensor, tensors["head." + name.replace("s.3", "")]
        ):
            raise CheckpointError(
                f"{name} is not the norm that the file has a second time; it is not complete"
            )
    dims = [tensors["stem.0.weight"].shape[0]]
    dims += [tensors[f"stages.{i}.downsample.1.weight"].shape[0] for i in (1, 2, 3)]
    depths = [
        len({m[1] for key in tensors if (m := re.match(rf"stages\.{i}\.blocks\.(\d+)\.", key))})
        for i in range(4)
    ]
    second = "stages.0.blocks.0.mlp.grn.weight" in tensors
    tensors = {name: _flat(name, tensor) for name, tensor in tensors.items()}
    kwargs: dict[str, Any] = {"depths": depths, "dims": dims}
    if tensors["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4:
        kwargs["conv_mlp"] = True
    if "stages.0.blocks.0.gamma" not in tensors:
        kwargs["ls_init_value"] = None
    return timm_draft(
        "convnext",
        "convnextv2_tiny" if second else "convnext_tiny",
        kwargs | ({"use_grn": True} if second else {}),
        tensors,
        notes=(
            f"ConvNeXt{' V2' if second else ''} of depths {depths} and widths {dims}",
            *((_DINOV3,) if "norms.3.weight" in root.tensors else ()),
        ),
        image_size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation="bicubic",
        crop_pct=0.875,
        pooling="mean",
    )


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1) if ".mlp.grn." in name else tensor


FAMILY = Family(
    name="convnext",
    title="ConvNeXt and ConvNeXt V2, official and timm's",
    rank=41,
    anchors=(
        _FIRST,
        ("downsample_layers.1.1.weight", "stages.1.downsample.1.weight"),
        ("stages.0.0.dwconv.weight", "stages.0.blocks.0.conv_dw.weight"),
        ("stages.0.0.pwconv1.weight", "stages.0.blocks.0.mlp.fc1.weight"),
        ("norm.weight", "head.norm.weight"),
    ),
    draft=_draft,
    known_by="stages.0.0.dwconv, or timm's stages.0.blocks.0.conv_dw",
    evaluated="the norm of the mean of the last map",
    source="facebookresearch/ConvNeXt",
    prefer=("state_dict_ema", "model_ema", "state_dict", "model"),
    rename=_OFFICIAL,
    drop={r"head\.(?!norm\.).*": "classifier head", r"norms\.3\.\w+": "the last norm a second time"},
)
