"""iBOT, MSN, I-JEPA, both V-JEPAs and MoCo v3, each by its own repository; the transformer of torchvision."""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, fresh, normed_tokens, prefixed, token_features
from layouts import record

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 4}
NORM = partial(nn.LayerNorm, eps=1e-6)
SIZES = {"native": (32, 32), "larger": (32, 48)}
SQUARE = {"native": (32, 32), "larger": (48, 48)}


def grid(images: torch.Tensor, patch: int = 8) -> tuple[int, int]:
    return images.shape[-2] // patch, images.shape[-1] // patch


def ibot(peers: Path) -> None:
    fresh(peers / "ibot")
    from models.head import iBOTHead
    from models.vision_transformer import VisionTransformer

    def network(**options: Any) -> Any:
        vit = VisionTransformer(img_size=[32], qkv_bias=True, norm_layer=NORM, **options, **SHAPE)
        model = nn.Module()
        model.backbone = vit
        model.head = iBOTHead(
            192, 16, patch_out_dim=16, hidden_dim=32, bottleneck_dim=8, norm="bn", act="gelu"
        )
        return model.eval()

    for name, init in (("ibot", 0.0), ("ibot-layerscale", 0.1)):
        student = network(masked_im_modeling=True, return_all_tokens=True, init_values=init)
        teacher = network(return_all_tokens=True, init_values=init)

        def features(images: torch.Tensor, vit: Any = teacher.backbone) -> dict[str, torch.Tensor]:
            last = vit(images, return_all_tokens=True)
            inner = vit.get_intermediate_layers(images, 2)[0]
            return token_features(last, grid(images), 1) | {"cls@-2": inner[:, 0]}

        record(
            name,
            made_by="bytedance/ibot da316d8, models.vision_transformer.VisionTransformer (teacher)",
            files={
                "checkpoint.pth": {
                    "student": prefixed("module.", student.state_dict()),
                    "teacher": teacher.state_dict(),
                    "optimizer": OPTIMIZER,
                    "epoch": 800,
                    "args": argparse.Namespace(arch="vit_small", patch_size=8),
                    "ibot_loss": {"center": torch.zeros(1, 16), "center2": torch.zeros(1, 1, 16)},
                }
            },
            features=features,
            sizes=SIZES,
            load="checkpoint.pth",
            expect={"family": "ibot", "num_heads": 3, "pooling": "cls", "container": "teacher.backbone"},
        )
    extracted = network(masked_im_modeling=True, return_all_tokens=True)

    def own(images: torch.Tensor) -> dict[str, torch.Tensor]:
        # Evaluation builds the network without the masking that it was trained with.
        extracted.backbone.masked_im_modeling = False
        return token_features(extracted.backbone(images, return_all_tokens=True), grid(images), 1)

    record(
        "ibot-extracted",
        made_by="bytedance/ibot da316d8, as extract_backbone_weights.py writes a student",
        files={"checkpoint_student.pth": {"state_dict": extracted.backbone.state_dict()}},
        features=own,
        sizes=SIZES,
        load="checkpoint_student.pth",
        expect={"family": "ibot", "container": "state_dict"},
    )


def msn(peers: Path) -> None:
    fresh(peers / "msn")
    from src.deit import VisionTransformer

    def network() -> Any:
        vit = VisionTransformer(img_size=[32], qkv_bias=True, norm_layer=NORM, **SHAPE)
        # As src/msn_train.py init_model builds the projection head.
        layers = {"fc1": nn.Linear(192, 32), "bn1": nn.BatchNorm1d(32), "gelu1": nn.GELU()}
        layers |= {"fc2": nn.Linear(32, 32), "bn2": nn.BatchNorm1d(32), "gelu2": nn.GELU()}
        vit.fc = nn.Sequential()
        for name, layer in {**layers, "fc3": nn.Linear(32, 16)}.items():
            vit.fc.add_module(name, layer)
        return vit.eval()

    encoder, target = network(), network()
    bare = copy.copy(target)

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        # logistic_eval.py: the head is taken off.
        bare._modules = {name: module for name, module in target._modules.items() if name != "fc"}
        bare.__dict__["fc"] = None
        inner = bare.forward_blocks(images, num_blocks=2)[:, :192]
        run = partial(bare.forward_features, patch_drop=0.0)
        return token_features(normed_tokens(bare, images, run), grid(images), 1) | {"cls@-2:raw": inner}

    record(
        "msn",
        made_by="facebookresearch/msn 4388dc1, src.deit.VisionTransformer (target_encoder)",
        files={
            "msn-ep800.pth.tar": {
                "encoder": prefixed("module.", encoder.state_dict()),
                "opt": OPTIMIZER,
                "prototypes": torch.zeros(8, 16),
                "target_encoder": prefixed("module.", target.state_dict()),
                "epoch": 800,
                "loss": 5.0,
                "batch_size": 16,
                "world_size": 8,
                "lr": 1e-3,
                "temperature": 0.1,
            }
        },
        features=features,
        sizes=SQUARE,
        load="msn-ep800.pth.tar",
        expect={"family": "msn", "num_heads": 3, "pooling": "cls", "interpolation": "bilinear"},
    )


def ijepa(peers: Path) -> None:
    fresh(peers / "ijepa")
    from src.models.vision_transformer import VisionTransformer, VisionTransformerPredictor

    def network() -> Any:
        return VisionTransformer(img_size=[32], qkv_bias=True, norm_layer=NORM, **SHAPE).eval()

    encoder, target = network(), network()
    predictor = VisionTransformerPredictor(16, 192, 96, depth=1, num_heads=3)

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = target(images)
        return token_features(tokens, grid(images), 0) | {"mean@-1": tokens.mean(dim=1)}

    record(
        "ijepa",
        made_by="facebookresearch/ijepa 52c1ae9, VisionTransformer (target_encoder)",
        files={
            "jepa-ep300.pth.tar": {
                "encoder": prefixed("module.", encoder.state_dict()),
                "predictor": prefixed("module.", predictor.state_dict()),
                "target_encoder": prefixed("module.", target.state_dict()),
                "opt": OPTIMIZER,
                "scaler": {"scale": 65536.0},
                "epoch": 300,
                "loss": 0.1,
                "batch_size": 128,
                "world_size": 16,
                "lr": 1e-3,
            }
        },
        features=features,
        # At other sizes the original takes the first position for a class token's, and fails.
        sizes={"native": (32, 32)},
        load="jepa-ep300.pth.tar",
        expect={"family": "ijepa", "num_heads": 3, "pooling": "mean", "container": "target_encoder.module"},
    )


def of_a_still(target: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The features of images repeated as videos, as both evaluations (image_classification_frozen) do it."""
    tokens = target(images.unsqueeze(2).repeat(1, 1, 16, 1, 1))
    patches = tokens.unflatten(1, (8, *grid(images))).mean(dim=1)
    return {"mean@-1": tokens.mean(dim=1), "patches@-1": patches}


def video_training(encoder: Any, target: Any, predictor: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What both trainers save."""
    return {
        "encoder": prefixed("module.backbone.", encoder.state_dict()),
        "predictor": predictor,
        "opt": OPTIMIZER,
        "scaler": None,
        "target_encoder": prefixed("module.backbone.", target.state_dict()),
        "epoch": 10,
        "loss": 0.5,
        "batch_size": 2,
        "world_size": 1,
        "lr": 1e-3,
    }


def vjepa(peers: Path) -> None:
    fresh(peers / "jepa")
    from src.models.vision_transformer import VisionTransformer

    def network() -> Any:
        return VisionTransformer(
            img_size=32,
            num_frames=16,
            tubelet_size=2,
            qkv_bias=True,
            uniform_power=True,
            norm_layer=NORM,
            **SHAPE,
        ).eval()

    encoder, target = network(), network()
    predictor = {
        "module.backbone.predictor_pos_embed": torch.zeros(1, 128, 8),
        "module.backbone.mask_tokens.0": torch.zeros(1, 1, 8),
        "module.backbone.mask_tokens.1": torch.zeros(1, 1, 8),
        "module.backbone.predictor_embed.weight": torch.zeros(8, 192),
    }
    record(
        "vjepa",
        made_by="facebookresearch/jepa 51c59d5, VisionTransformer (target_encoder)",
        files={"jepa-latest.pth.tar": video_training(encoder, target, predictor)},
        features=partial(of_a_still, target),
        sizes={"native": (32, 32), "larger": (24, 48)},
        load="jepa-latest.pth.tar",
        keep=r"module\.backbone\.pos_embed$",
        expect={"family": "vjepa", "image_size": 32, "pooling": "mean", "has_cls": False, "frames": 16},
    )


def vjepa2(peers: Path) -> None:
    fresh(peers / "vjepa2")
    # The repository was written for timm 0.6 and imports what it needs for training only.
    import timm.layers

    shim = ModuleType("timm.models.layers")
    shim.drop_path = timm.layers.drop_path  # type: ignore[attr-defined]
    sys.modules["timm.models.layers"] = shim
    import contextlib

    torch.backends.cuda.sdp_kernel = contextlib.nullcontext  # type: ignore[assignment]
    from src.models.vision_transformer import VisionTransformer

    def network() -> Any:
        return VisionTransformer(
            img_size=(32, 32),
            num_frames=16,
            tubelet_size=2,
            qkv_bias=True,
            use_rope=True,
            norm_layer=NORM,
            **SHAPE,
        ).eval()

    encoder, target = network(), network()
    predictor = {"module.backbone.predictor_embed.weight": torch.zeros(8, 192)}
    record(
        "vjepa2",
        made_by="facebookresearch/vjepa2 c2963a4, VisionTransformer (target_encoder)",
        files={"latest.pt": video_training(encoder, target, predictor)},
        features=partial(of_a_still, target),
        sizes={"native": (32, 32), "larger": (24, 48)},
        load="latest.pt",
        expect={"family": "vjepa2", "pooling": "mean", "has_cls": False, "interpolation": "bilinear"},
    )


def moco_v3(peers: Path) -> None:
    fresh(peers / "moco-v3")
    import timm.layers
    from timm.models import vision_transformer as timm_vit

    # The repository was written for timm 0.4: the same parts under their old names.
    helpers = ModuleType("timm.models.layers.helpers")
    helpers.to_2tuple = timm.layers.to_2tuple  # type: ignore[attr-defined]
    layers = ModuleType("timm.models.layers")
    layers.PatchEmbed = timm.layers.PatchEmbed  # type: ignore[attr-defined]
    sys.modules |= {"timm.models.layers": layers, "timm.models.layers.helpers": helpers}
    timm_vit.VisionTransformer.num_tokens = 1  # type: ignore[attr-defined]
    from moco.builder import MoCo_ViT
    from vits import VisionTransformerMoCo

    def network(num_classes: int, **options: Any) -> Any:
        return VisionTransformerMoCo(
            img_size=32,
            patch_size=8,
            embed_dim=384,
            depth=2,
            num_heads=12,
            qkv_bias=True,
            norm_layer=NORM,
            num_classes=num_classes,
            **options,
        )

    model = MoCo_ViT(network, dim=16, mlp_dim=32).eval()
    encoder = model.base_encoder

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return token_features(encoder.forward_features(images), grid(images), 1)

    record(
        "moco-v3",
        made_by="facebookresearch/moco-v3 c349e6e, vits.VisionTransformerMoCo (base_encoder)",
        files={
            "vit-s-300ep.pth.tar": {
                "epoch": 300,
                "arch": "vit_small",
                "state_dict": prefixed("module.", model.state_dict()),
                "optimizer": OPTIMIZER,
                "scaler": {"scale": 65536.0},
            }
        },
        features=features,
        sizes={"native": (32, 32)},
        load="vit-s-300ep.pth.tar",
        keep=r"pos_embed$",
        expect={
            "family": "moco_v3",
            "num_heads": 12,
            "pooling": "cls",
            "container": "state_dict.module.base_encoder",
        },
    )


def torchvision_vit() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 8, 2, 3, 192, 768, num_classes=5).eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        caught: list[torch.Tensor] = []
        hook = model.encoder.ln.register_forward_hook(lambda module, given, out: caught.append(out))
        model(images)
        hook.remove()
        return token_features(caught[0], grid(images), 1)

    import torchvision

    record(
        "torchvision-vit",
        made_by=f"torchvision {torchvision.__version__}, models.vision_transformer.VisionTransformer",
        files={"vit.pth": model.state_dict()},
        features=features,
        # torchvision's model takes no other size.
        sizes={"native": (32, 32)},
        load="vit.pth",
        expect={"family": "torchvision", "num_heads": 3, "pooling": "cls"},
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torchvision_vit()
    for recipe in (ibot, msn, ijepa, vjepa, vjepa2, moco_v3):
        recipe(folder)
