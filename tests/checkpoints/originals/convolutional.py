"""Residual networks of SwAV, VICReg, Barlow Twins, MoCo and DINO; ConvNeXt; Swin; each by its own code."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, fresh, prefixed
from layouts import record

SIZES = {"native": (64, 64), "larger": (64, 96)}


def stages(net: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The last map of a residual network and its mean, by the network's own layers."""
    x = images
    for name in ("padding", "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = getattr(net, name, nn.Identity())(x)
    return {"patches@-1": x.permute(0, 2, 3, 1), "mean@-1": net.avgpool(x).flatten(1)}


def swav(peers: Path) -> None:
    fresh(peers / "swav")
    module = importlib.import_module("src.resnet50")
    net = module.ResNet(
        module.Bottleneck,
        [1, 2, 1, 1],
        widen=2,
        width_per_group=16,
        normalize=True,
        hidden_mlp=32,
        output_dim=8,
        nmb_prototypes=[4, 4],
    ).eval()
    record(
        "swav",
        made_by="facebookresearch/swav 06b1b7c, src.resnet50.ResNet, twice as wide",
        files={"swav_RN50w2_400ep_pretrain.pth.tar": prefixed("module.", net.state_dict())},
        features=lambda x: stages(net, x),
        sizes=SIZES,
        load="swav_RN50w2_400ep_pretrain.pth.tar",
        expect={"family": "swav", "pooling": "mean", "width": 32, "interpolation": "bilinear"},
    )


def vicreg(peers: Path) -> None:
    fresh(peers / "vicreg")
    module = importlib.import_module("resnet")
    net = module.ResNet(module.Bottleneck, [1, 1, 2, 1], widen=2, width_per_group=16).eval()
    state = prefixed("module.backbone.", net.state_dict()) | {"module.projector.0.weight": torch.zeros(8, 4)}
    for name, payload in (
        ("vicreg", {"epoch": 1, "model": state, "optimizer": OPTIMIZER}),
        ("vicreg-hub", None),
    ):
        record(
            name,
            made_by="facebookresearch/vicreg 4e12602, resnet.ResNet, twice as wide",
            files={"resnet50x2.pth": payload or net.state_dict()},
            features=lambda x: stages(net, x),
            sizes=SIZES,
            load="resnet50x2.pth",
            expect={"family": "barlow_vicreg" if payload else "resnet", "width": 32},
        )


def narrow(block: Any = Bottleneck, layers: tuple[int, ...] = (1, 1, 1, 1), classes: int = 5) -> Any:
    """torchvision's network with few blocks, narrow ones where they can be."""
    width = {"width_per_group": 16} if block is Bottleneck else {}
    return ResNet(block, list(layers), num_classes=classes, **width).eval()


def moco(peers: Path) -> None:
    fresh(peers / "moco")
    builder = importlib.import_module("moco.builder")
    model = builder.MoCo(lambda num_classes: narrow(classes=num_classes), dim=8, K=16, mlp=True).eval()
    record(
        "moco",
        made_by="facebookresearch/moco 5df3287, moco.builder.MoCo (encoder_q) on torchvision's ResNet",
        files={
            "checkpoint_0199.pth.tar": {
                "epoch": 200,
                "arch": "resnet50",
                "state_dict": prefixed("module.", model.state_dict()),
                "optimizer": OPTIMIZER,
            }
        },
        features=lambda x: stages(model.encoder_q, x),
        sizes=SIZES,
        load="checkpoint_0199.pth.tar",
        expect={"family": "moco", "container": "state_dict.module.encoder_q"},
    )


def moco_v3(peers: Path) -> None:
    fresh(peers / "moco-v3")
    builder = importlib.import_module("moco.builder")
    model = builder.MoCo_ResNet(lambda num_classes: narrow(classes=num_classes), dim=8, mlp_dim=16).eval()
    record(
        "moco-v3-resnet",
        made_by="facebookresearch/moco-v3 c349e6e, moco.builder.MoCo_ResNet (base_encoder)",
        files={
            "r-50-100ep.pth.tar": {
                "epoch": 100,
                "arch": "resnet50",
                "state_dict": prefixed("module.", model.state_dict()),
                "optimizer": OPTIMIZER,
                "scaler": {"scale": 1.0},
            }
        },
        features=lambda x: stages(model.base_encoder, x),
        sizes=SIZES,
        load="r-50-100ep.pth.tar",
        expect={"family": "moco_v3_resnet", "container": "state_dict.module.base_encoder"},
    )


def barlow(peers: Path) -> None:
    fresh(peers / "barlowtwins")
    import torchvision

    full, torchvision.models.resnet50 = (
        torchvision.models.resnet50,
        lambda **_: ResNet(Bottleneck, [1, 1, 1, 1]),
    )
    module = importlib.import_module("main")
    model = module.BarlowTwins(argparse.Namespace(projector="16-16", lambd=0.005, batch_size=2)).eval()
    torchvision.models.resnet50 = full
    record(
        "barlow-twins",
        made_by="facebookresearch/barlowtwins 8e8d284, main.BarlowTwins on a shorter ResNet",
        files={
            "checkpoint.pth": {
                "epoch": 1,
                "model": prefixed("module.", model.state_dict()),
                "optimizer": OPTIMIZER,
            }
        },
        features=lambda x: {"patches@-1": stages(model.backbone, x)["patches@-1"]},
        sizes={"native": (64, 64)},
        load="checkpoint.pth",
        expect={"family": "barlow_vicreg", "container": "model.module.backbone"},
    )


def dino(peers: Path) -> None:
    fresh(peers / "dino")
    vision = importlib.import_module("vision_transformer")

    def network() -> Any:
        model = nn.Module()
        model.backbone, model.backbone.fc = narrow(), nn.Identity()  # type: ignore[assignment]
        model.head = vision.DINOHead(512, 8, hidden_dim=16, bottleneck_dim=4)
        return model.eval()

    student, teacher = network(), network()
    record(
        "dino-resnet",
        made_by="facebookresearch/dino 7c446df, torchvision's ResNet and DINOHead as main_dino.py joins them",
        files={
            "checkpoint.pth": {
                "student": prefixed("module.", student.state_dict()),
                "teacher": prefixed("module.", teacher.state_dict()),
                "optimizer": OPTIMIZER,
                "epoch": 800,
                "args": argparse.Namespace(arch="resnet50"),
                "dino_loss": {"center": torch.zeros(1, 8)},
            }
        },
        features=lambda x: stages(teacher.backbone, x),
        sizes=SIZES,
        load="checkpoint.pth",
        expect={"family": "dino_resnet", "container": "teacher.module.backbone", "interpolation": "bicubic"},
    )


def solo_learn() -> None:
    """Keys and first convolution as solo/methods/base.py has them for CIFAR."""
    net = narrow(BasicBlock)
    net.fc = nn.Identity()
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    net.maxpool = nn.Identity()
    state = prefixed("backbone.", net.state_dict())
    state |= prefixed("momentum_backbone.", narrow(BasicBlock).state_dict())
    state |= {"classifier.weight": torch.zeros(5, 512), "projector.0.weight": torch.zeros(4, 512)}
    record(
        "solo-learn-cifar",
        made_by="torchvision's ResNet with the changes of vturrisi/solo-learn 9187ea3, solo/methods/base.py",
        files={
            "byol.ckpt": {
                "state_dict": state,
                "epoch": 1,
                "pytorch-lightning_version": "2.1",
                "optimizer_states": [OPTIMIZER],
                "loops": {},
                "callbacks": {},
            }
        },
        features=lambda x: {"mean@-1": stages(net, x)["mean@-1"]},
        sizes={"native": (32, 32), "larger": (32, 48)},
        load="byol.ckpt",
        expect={"family": "resnet", "container": "state_dict.backbone", "padding": 2, "patch_size": 8},
    )


def convnext(peers: Path) -> None:
    fresh(peers / "ConvNeXt")
    import timm.layers

    layers, registry = ModuleType("timm.models.layers"), ModuleType("timm.models.registry")
    for name in ("trunc_normal_", "DropPath"):
        setattr(layers, name, getattr(timm.layers, name))
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    sys.modules |= {"timm.models.layers": layers, "timm.models.registry": registry}
    module = importlib.import_module("models.convnext")
    net = module.ConvNeXt(depths=[1, 1, 2, 1], dims=[24, 32, 48, 64], num_classes=5).eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = images
        for down, stage in zip(net.downsample_layers, net.stages, strict=True):
            x = stage(down(x))
        return {"patches@-1": x.permute(0, 2, 3, 1), "mean@-1": net.forward_features(images)}

    record(
        "convnext",
        made_by="facebookresearch/ConvNeXt 048efce, models.convnext.ConvNeXt",
        files={"convnext_tiny_1k_224.pth": {"model": net.state_dict()}},
        features=features,
        sizes=SIZES,
        load="convnext_tiny_1k_224.pth",
        expect={"family": "convnext", "pooling": "mean", "embed_dim": 64},
    )


def swin(peers: Path) -> None:
    fresh(peers / "Swin-Transformer")
    import timm.layers

    layers = ModuleType("timm.models.layers")
    for name in ("trunc_normal_", "DropPath", "to_2tuple"):
        setattr(layers, name, getattr(timm.layers, name))
    sys.modules["timm.models.layers"] = layers
    package = ModuleType("models")
    package.__path__ = [str(peers / "Swin-Transformer" / "models")]
    sys.modules["models"] = package
    module = importlib.import_module("models.swin_transformer")

    def network(size: tuple[int, int]) -> Any:
        return module.SwinTransformer(
            img_size=size, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_classes=5
        ).eval()

    net = network((64, 64))

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        size = images.shape[-2], images.shape[-1]
        own = network(size)
        # The weights do not depend on the size of the image, only the masks do.
        state = {k: v for k, v in net.state_dict().items() if not k.endswith("attn_mask")}
        own.load_state_dict(state, strict=False)
        caught: list[torch.Tensor] = []
        own.norm.register_forward_hook(lambda layer, given, out: caught.append(out))
        mean = own.forward_features(images)
        return {"patches@-1": caught[0].unflatten(1, (size[0] // 8, size[1] // 8)), "mean@-1": mean}

    record(
        "swin",
        made_by="microsoft/Swin-Transformer f82860b, models.swin_transformer.SwinTransformer",
        files={"swin_tiny_patch4_window7_224.pth": {"model": net.state_dict()}},
        features=features,
        sizes={"native": (64, 64), "larger": (64, 96)},
        load="swin_tiny_patch4_window7_224.pth",
        keep=r"attn_mask$",
        expect={"family": "swin", "pooling": "mean"},
    )


def efficientnet(peers: Path) -> None:
    """The package efficientnet_lite_pytorch 0.1.0, which brings real weights in these names."""
    fresh(peers / "efficientnet_lite_pytorch")
    package = importlib.import_module("efficientnet_lite_pytorch")
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = net.extract_features(images)
        return {"patches@-1": found.permute(0, 2, 3, 1), "mean@-1": found.mean((2, 3))}

    record(
        "efficientnet-lite0",
        made_by="efficientnet_lite_pytorch 0.1.0 (EfficientNet-PyTorch), EfficientNet",
        files={"efficientnet-lite0.pth": net.state_dict()},
        features=features,
        sizes=SIZES,
        load="efficientnet-lite0.pth",
        expect={"family": "efficientnet", "pooling": "mean", "name": "tf_efficientnet_lite0"},
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    solo_learn()
    for recipe in (swav, vicreg, moco, moco_v3, barlow, dino, convnext, swin, efficientnet):
        recipe(folder)
