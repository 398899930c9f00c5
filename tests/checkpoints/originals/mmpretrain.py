"""The vision transformer of OpenMMLab: open-mmlab/mmpretrain, as mmengine saves it below ``backbone``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import fresh, prefixed, token_features
from layouts import record


def main(peers: Path) -> None:
    fresh(peers / "mmpretrain")
    # Its packages import every model that there is; the transformer needs a few files of them.
    root = peers / "mmpretrain" / "mmpretrain"
    for name in ("mmpretrain", "mmpretrain.models", "mmpretrain.models.backbones", "mmpretrain.models.utils"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    utils = sys.modules["mmpretrain.models.utils"]
    from mmpretrain.models.utils import attention, embed, helpers, layer_scale, norm, swiglu_ffn

    for module in (attention, embed, helpers, layer_scale, norm, swiglu_ffn):
        for key, value in vars(module).items():
            setattr(utils, key, value)
    from mmpretrain.models.backbones.vision_transformer import VisionTransformer

    model = VisionTransformer(
        arch={"embed_dims": 192, "num_layers": 2, "num_heads": 3, "feedforward_channels": 768},
        img_size=32,
        patch_size=8,
        out_type="raw",
    )
    model.eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = images.shape[-2] // 8, images.shape[-1] // 8
        return token_features(model(images)[0], grid, 1)

    record(
        "mmpretrain",
        made_by="open-mmlab/mmpretrain ee7f2e88, VisionTransformer",
        files={
            "vit-tiny.pth": {
                "meta": {"epoch": 300},
                "state_dict": {
                    **prefixed("backbone.", model.state_dict()),
                    "head.layers.head.weight": torch.zeros(5, 192),
                },
            }
        },
        features=features,
        sizes={"native": (32, 32), "larger": (32, 48)},
        load="vit-tiny.pth",
        expect={"family": "mmpretrain", "num_heads": 3, "pooling": "cls"},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
