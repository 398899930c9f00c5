"""Latent MIM: yibingwei-1/LatentMIM 4e91363, evaluated as its util/misc.py eval_knn does."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, fresh, prefixed
from layouts import record

NORM = partial(nn.LayerNorm, eps=1e-6)
NATIVE = {"native": (32, 32)}


def grid(images: torch.Tensor, patch: int = 8) -> tuple[int, int]:
    return images.shape[-2] // patch, images.shape[-1] // patch


def old_timm() -> None:
    """The names that timm had when these repositories were written, for what is the same today."""
    import timm.layers
    import timm.models.vision_transformer

    layers = ModuleType("timm.models.layers")
    registry = ModuleType("timm.models.registry")
    for name in ("DropPath", "drop_path", "to_2tuple", "trunc_normal_", "Mlp", "PatchEmbed"):
        setattr(layers, name, getattr(timm.layers, name))
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    sys.modules |= {"timm.models.layers": layers, "timm.models.registry": registry}
    for name in ("DropPath", "Mlp"):
        setattr(timm.models.vision_transformer, name, getattr(timm.layers, name))


def latent_mim(peers: Path) -> None:
    fresh(peers / "LatentMIM")
    old_timm()
    vits = importlib.import_module("vits")

    def network() -> Any:
        head = nn.Sequential()
        for i, (a, b) in enumerate(((192, 64), (64, 64), (64, 192))):
            head.add_module(f"linear{i}", nn.Linear(a, b, bias=False))
            head.add_module(f"norm{i}", nn.LayerNorm(b))
        return vits.VIT(
            grid_size=4,
            embed_dim=192,
            depth=2,
            num_heads=3,
            embed_layer=vits.PatchEmbed(8, 3, 192),
            patchify=vits.Patchify(8, 4),
            head=head,
            norm_layer=NORM,
        ).eval()

    online, target = network(), network()
    state = prefixed("module.encoder.", online.state_dict())
    state |= prefixed("module.target_encoder.", target.state_dict())
    state["module.decoder.decoder_embed.weight"] = torch.zeros(8, 192)
    norm, head = online.norm, online.head

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        # util/misc.py eval_knn: norm and head are taken off.
        online.norm = online.head = nn.Identity()
        raw = online(images)
        online.norm = norm
        normed = online(images)
        online.head = head
        return {
            "mean@-1:raw": raw[:, 1:].mean(1),
            "patches@-1:raw": raw[:, 1:].unflatten(1, grid(images)),
            "cls@-1": normed[:, 0],
        }

    record(
        "latent-mim",
        made_by="yibingwei-1/LatentMIM 4e91363, vits.VIT (encoder)",
        files={
            "checkpoint_0800.pth": {
                "state_dict": state,
                "optimizer": OPTIMIZER,
                "loss_scaler": {"scale": 65536.0},
                "epoch": 800,
            }
        },
        features=features,
        sizes=NATIVE,
        load="checkpoint_0800.pth",
        keep=r"pos_embeds$",
        expect={"family": "latent_mim", "pooling": "mean", "final_norm": False, "num_heads": 3},
    )


if __name__ == "__main__":
    latent_mim(Path(sys.argv[1]))
