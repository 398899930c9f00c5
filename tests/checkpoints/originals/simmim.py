"""SimMIM, with a plain ViT and with a Swin transformer: microsoft/SimMIM."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import scipy.interpolate
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from beit import SQUARE, Interp2d, columns, every_block
from common import OPTIMIZER, fresh
from layouts import record

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4, "mlp_ratio": 4}
NORM = partial(nn.LayerNorm, eps=1e-6)
COMMIT = "microsoft/SimMIM d3e29bc"
QUIET = SimpleNamespace(info=lambda text: None)


def saved(model: Any, kind: str) -> dict[str, Any]:
    """As utils.py saves a run, whose configuration is a yacs dict."""
    return {
        "model": model.state_dict(),
        "optimizer": OPTIMIZER,
        "lr_scheduler": {"last_epoch": 1},
        "max_accuracy": 0.0,
        "epoch": 799,
        "config": {"MODEL": {"TYPE": kind}, "DATA": {"IMG_SIZE": 32}},
    }


def vit() -> None:
    from models.simmim import SimMIM, VisionTransformerForSimMIM
    from models.vision_transformer import VisionTransformer
    from utils import remap_pretrained_keys_vit

    common: dict[str, Any] = {
        "qkv_bias": True,
        "norm_layer": NORM,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        **SHAPE,
    }
    model = SimMIM(
        VisionTransformerForSimMIM(
            img_size=32, num_classes=0, use_shared_rel_pos_bias=True, use_mean_pooling=False, **common
        ),
        encoder_stride=8,
    ).eval()

    def at_size(state: dict[str, torch.Tensor], side: int, mean: bool) -> Any:
        """The fine-tuning network of a size, filled as utils.load_pretrained does it."""
        network = VisionTransformer(
            img_size=side, num_classes=5, use_rel_pos_bias=True, use_mean_pooling=mean, **common
        ).eval()
        if not mean:
            state = remap_pretrained_keys_vit(network, dict(state), QUIET)
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert set(unexpected) <= {"mask_token"}
        assert all(k.startswith("head") or "position_index" in k for k in missing)
        return network

    def pretrained(images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoder = at_size(model.encoder.state_dict(), images.shape[-1], mean=False)
        found = columns(every_block(encoder, images), encoder, images)
        if images.shape[-1] == 32:
            tokens = model.encoder(images, torch.zeros(2, 4, 4))
            found |= {"patches@-1": tokens.permute(0, 2, 3, 1), "mean@-1": tokens.mean(dim=(2, 3))}
        return found

    record(
        "simmim",
        made_by=f"{COMMIT}, models.simmim.VisionTransformerForSimMIM with utils.remap_pretrained_keys_vit",
        files={"ckpt_epoch_799.pth": saved(model, "vit")},
        features=pretrained,
        sizes=SQUARE,
        load="ckpt_epoch_799.pth",
        expect={
            "family": "simmim",
            "num_heads": 4,
            "relative": "shared",
            "pooling": "mean",
            "container": "model.encoder",
            "mean": [0.485, 0.456, 0.406],
        },
    )
    tuned = VisionTransformer(
        img_size=32, num_classes=5, use_rel_pos_bias=True, use_mean_pooling=True, **common
    ).eval()

    def finetuned(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return columns(every_block(tuned, images), tuned, images)

    record(
        "simmim-finetuned",
        made_by=f"{COMMIT}, models.vision_transformer.VisionTransformer",
        files={"ckpt_epoch_99.pth": saved(tuned, "vit")},
        features=finetuned,
        sizes={"native": (32, 32)},
        load="ckpt_epoch_99.pth",
        expect={
            "family": "simmim",
            "num_heads": 4,
            "relative": "blocks",
            "pooling": "mean",
            "mean": [0.485, 0.456, 0.406],
        },
    )


def swin() -> None:
    from models.simmim import SimMIM, SwinTransformerForSimMIM
    from utils import remap_pretrained_keys_swin

    def network(size: tuple[int, int]) -> Any:
        return SwinTransformerForSimMIM(
            img_size=size,
            patch_size=4,
            num_classes=0,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        )

    model = SimMIM(network((64, 64)), encoder_stride=8).eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = images.shape[-2:]
        encoder = network((height, width)).eval()
        state = remap_pretrained_keys_swin(encoder, model.encoder.state_dict(), QUIET)
        missing, unexpected = encoder.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(k.endswith(("position_index", "attn_mask")) for k in missing)
        tokens = encoder.patch_embed(images)
        for layer in encoder.layers:
            tokens = layer(tokens)
        tokens = encoder.norm(tokens)
        assert torch.equal(encoder.forward_features(images), tokens.mean(dim=1))
        return {"mean@-1": tokens.mean(dim=1), "patches@-1": tokens.unflatten(1, (height // 8, width // 8))}

    record(
        "simmim-swin",
        made_by=f"{COMMIT}, models.simmim.SwinTransformerForSimMIM",
        files={"ckpt_epoch_799.pth": saved(model, "swin")},
        features=features,
        # The original takes sizes that its windows divide.
        sizes={"native": (64, 64), "larger": (64, 96)},
        load="ckpt_epoch_799.pth",
        keep=r"attn_mask$",
        expect={
            "family": "simmim_swin",
            "pooling": "mean",
            "container": "model.encoder",
            "mean": [0.485, 0.456, 0.406],
        },
    )


if __name__ == "__main__":
    fresh(Path(sys.argv[1]) / "SimMIM")
    scipy.interpolate.interp2d = Interp2d
    vit()
    swin()
