"""MAE: facebookresearch/mae efb2a80, pre-training (models_mae.py) and fine-tuning (models_vit.py)."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from layouts import record

COMMIT = "facebookresearch/mae efb2a80"
SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 4}
NORM = partial(nn.LayerNorm, eps=1e-6)


def main(peers: Path) -> None:
    sys.path.insert(0, str(peers / "mae"))
    # The peer was written for numpy 1.19, and for timm 0.3, whose Block took an option without effect here.
    setattr(np, "float", float)  # noqa: B010 - the name is gone from numpy
    import timm.models.vision_transformer as timm_vit

    block = timm_vit.Block
    timm_vit.Block = lambda *args, qk_scale=None, **kwargs: block(*args, **kwargs)  # type: ignore[assignment,misc]
    import models_mae
    import models_vit
    from util.pos_embed import interpolate_pos_embed

    mae = models_mae.MaskedAutoencoderViT(
        img_size=32, decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3, norm_layer=NORM, **SHAPE
    ).eval()

    def pretrained(images: torch.Tensor) -> dict[str, torch.Tensor]:
        # main_linprobe.py: the pre-trained weights in the classifier's encoder, positions interpolated.
        side = images.shape[-1]
        vit = models_vit.VisionTransformer(
            img_size=side, num_classes=0, qkv_bias=True, norm_layer=NORM, **SHAPE
        ).eval()
        state = {k: v for k, v in mae.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
        interpolate_pos_embed(vit, state)
        vit.load_state_dict(state)
        return tokens(vit, images)

    common: dict[str, Any] = {"lr": 1e-3, "model": "mae_vit_tiny"}
    record(
        "mae",
        made_by=f"{COMMIT}, models_mae.MaskedAutoencoderViT evaluated in models_vit.VisionTransformer",
        files={
            "checkpoint-799.pth": {
                "model": mae.state_dict(),
                "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
                "epoch": 799,
                "scaler": {},
                "args": argparse.Namespace(**common),
            }
        },
        features=pretrained,
        sizes={"native": (32, 32), "larger": (48, 48)},
        load="checkpoint-799.pth",
        keep=r"pos_embed$",
        expect={"family": "mae", "num_heads": 3, "pooling": "cls", "pos_interpolation": "bicubic"},
    )

    finetuned = models_vit.VisionTransformer(
        img_size=32, num_classes=5, qkv_bias=True, norm_layer=NORM, global_pool=True, **SHAPE
    ).eval()

    def mean(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean@-1": finetuned.forward_features(images)}

    record(
        "mae-finetuned",
        made_by=f"{COMMIT}, models_vit.VisionTransformer with global_pool",
        files={"checkpoint-99.pth": {"model": finetuned.state_dict(), "args": argparse.Namespace(**common)}},
        features=mean,
        sizes={"native": (32, 32)},
        load="checkpoint-99.pth",
        expect={"family": "mae", "pooling": "mean", "fc_norm": True},
    )


def tokens(vit: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tokens after the final norm, which models_vit.py computes before it takes the first."""
    caught = []
    hook = vit.norm.register_forward_hook(lambda module, given, out: caught.append(out))
    cls = vit.forward_features(images)
    hook.remove()
    grid = images.shape[-2] // 8, images.shape[-1] // 8
    return {"cls@-1": cls if cls.ndim == 2 else cls[:, 0], "patches@-1": caught[0][:, 1:].unflatten(1, grid)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
