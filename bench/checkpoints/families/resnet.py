"""Residual networks in torchvision's names: supervised, and by self-supervised methods.

MoCo v1 and v2 (facebookresearch/moco), MoCo v3 (moco-v3), SwAV and DeepCluster v2 (swav), Barlow Twins
(barlowtwins), VICReg (vicreg), DINO (dino), and what toolkits save (solo-learn, lightly, stable-pretraining).
All of them evaluate the mean of the last map of images resized to 256 and cropped to 224.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from ...errors import CheckpointError
from ...networks.resnet import ResNetArch
from ...types import EncoderSpec
from ..family import Draft, Family, Root, Tensors, refuse_heads
from ..siblings import BESIDE, PREFER

_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.")
# torchvision's network as a list of its modules without the last ones, as lightly builds it.
_SEQUENTIAL = (
    (r"0\.(\w+)", r"conv1.\1"),
    (r"1\.(\w+)", r"bn1.\1"),
    *((rf"{3 + i}\.(\d+\..+)", rf"layer{i}.\1") for i in range(1, 5)),
)
_PROJECTORS = r"(projection_head|projector|proj|predictor|prototypes|head|heads|classifier|fc)\b.*"


def _draft(name: str, root: Root, tensors: Tensors, heads: int | None) -> Draft:
    refuse_heads(heads)
    weight = tensors["conv1.weight"]
    width, _, kernel, _ = weight.shape
    bottleneck = "layer1.0.conv3.weight" in tensors
    layers = tuple(
        len({m[2] for key in tensors if (m := _BLOCK.match(key)) and m[1] == str(i)}) for i in range(1, 5)
    )
    if kernel not in (3, 7) or weight.shape[1] != 3:
        raise CheckpointError(
            f"conv1.weight has shape {tuple(weight.shape)}; residual networks have (D, 3, 7, 7), "
            "or (D, 3, 3, 3) for small images"
        )
    small = kernel == 3
    inner = tensors["layer1.0.conv1.weight"].shape[0]
    groups = inner // tensors["layer1.0.conv2.weight"].shape[1] if bottleneck else 1
    solo = small and any(key.startswith("classifier.") for key in _beside(root))
    arch = ResNetArch(
        block="bottleneck" if bottleneck else "basic",
        layers=layers,
        width=width,
        groups=groups,
        base_width=inner * 64 // (width * groups) if bottleneck else 64,
        small=small,
        padding=(2 if solo else 1) if small else 3,
    )
    stride, dim = (8, 8 * width) if small else (32, 8 * width)
    spec = EncoderSpec(
        family=name,
        arch=arch.model_dump(mode="json"),
        embed_dim=dim * (4 if bottleneck else 1),
        depth=1,
        patch_size=stride,
        image_size=32 if small else 224,
        interpolation="bicubic" if name == "dino_resnet" else "bilinear",
        crop_pct=1.0 if small else 0.875,
        pooling="mean",
        has_cls=False,
    )
    notes = [
        f"residual network of {sum(layers) * (3 if bottleneck else 2) + 2} layers, {width} channels wide"
    ]
    if small:
        padding = "2, as solo-learn builds it" if solo else "1, the usual one"
        notes.append(
            f"for small images: a 3x3 first convolution without pooling, padding {padding} (the file does "
            "not say it); ImageNet's mean and std are assumed, set #mean=a:b:c,std=a:b:c where they differ"
        )
    elif name == "resnet":
        notes.append(
            "strides as torchvision has them: anti-aliased networks (timm's resnetblur*) leave no trace in "
            "the keys and need #arch=NAME"
        )
    return Draft(tensors, spec, tuple(notes))


def _beside(root: Root) -> set[str]:
    """The keys beside the root, below what the root itself is a part of."""
    above = root.path.rstrip(".").rpartition(".")[0]
    start = above + "." if above else ""
    return {
        k.removeprefix(start)
        for k in root.tree.tensors
        if k.startswith(start) and not k.startswith(root.path)
    }


def _has_beside(*names: str) -> Callable[[Root], bool]:
    def matches(root: Root) -> bool:
        found = {key.partition(".")[0] for key in _beside(root)}
        return any(name in found for name in names)

    return matches


def _family(name: str, title: str, known_by: str, source: str, **rest: Any) -> Family:
    options: dict[str, Any] = {
        "rank": 42,
        "prefer": ("state_dict_ema", "model_ema", "state_dict", "model"),
        **rest,
    }
    return Family(
        name=name,
        title=title,
        anchors=(
            ("conv1.weight", "0.weight"),
            ("bn1.running_mean", "1.running_mean"),
            ("layer1.0.conv1.weight", "4.0.conv1.weight"),
            ("layer4.0.conv1.weight", "7.0.conv1.weight"),
        ),
        draft=partial(_draft, name),
        rename=_SEQUENTIAL,
        drop={_PROJECTORS: "head"},
        known_by=known_by,
        evaluated="mean of the last map",
        source=source,
        **options,
    )


_PAIR = "the other network of the pair"

FAMILIES = (
    _family(
        "moco",
        "MoCo v1 and v2, residual networks",
        "encoder_q and encoder_k",
        "facebookresearch/moco",
        matches=lambda root: root.path.endswith(("encoder_q.", "encoder_k.")),
        prefer=("encoder_q", "encoder_k"),
        siblings={
            "encoder_q": _PAIR,
            "encoder_k": _PAIR,
            "queue": "queue of keys",
            "queue_ptr": "queue of keys",
        },
    ),
    _family(
        "moco_v3_resnet",
        "MoCo v3, residual networks",
        "base_encoder and momentum_encoder",
        "facebookresearch/moco-v3",
        matches=lambda root: root.path.endswith(("base_encoder.", "momentum_encoder.")),
        prefer=("base_encoder", "momentum_encoder"),
        siblings={"base_encoder": _PAIR, "momentum_encoder": _PAIR, "predictor": "predictor"},
    ),
    _family(
        "swav",
        "SwAV and DeepCluster v2, residual networks of any width",
        "projection_head and prototypes",
        "facebookresearch/swav",
        matches=lambda root: any(k.startswith(("projection_head.", "prototypes.")) for k in root.tensors),
    ),
    _family(
        "barlow_vicreg",
        "Barlow Twins and VICReg, full checkpoints",
        "backbone with a projector beside it",
        "facebookresearch/barlowtwins, facebookresearch/vicreg",
        matches=lambda root: (
            root.path.endswith("backbone.")
            and _has_beside("projector")(root)
            and not _has_beside("classifier", "momentum_backbone")(root)
        ),
        siblings={"projector": "projection head", "bn": "norm of the loss"},
    ),
    _family(
        "dino_resnet",
        "DINO, residual networks, full checkpoints and hub files",
        "teacher and student with a projection head; or a bare file called dino_*",
        "facebookresearch/dino",
        matches=lambda root: (
            (root.parts[:1] in (("teacher",), ("student",)) and root.path.endswith("backbone."))
            or (not root.path and root.tree.stem.startswith("dino_"))
        ),
        prefer=("teacher", "student"),
        siblings={"head": "projection head", "teacher": _PAIR, "student": _PAIR},
    ),
    _family(
        "resnet",
        "residual networks in torchvision's names: supervised, toolkits, hub files",
        "conv1, bn1 and layer1 to layer4, also numbered 0, 1 and 4 to 7",
        "pytorch/vision, vturrisi/solo-learn",
        rank=40,
        prefer=PREFER,
        siblings=BESIDE,
    ),
)
