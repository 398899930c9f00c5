"""Vision towers of CLIP: openai/CLIP d05afc4, open_clip_torch 3.3.0 and baaivision/EVA 5623d08 (EVA-CLIP)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, fresh, prefixed, token_features
from layouts import record

NATIVE = {"native": (32, 32)}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}


def openai(peers: Path) -> None:
    # Only the tokenizer needs these two; the model does not.
    sys.modules.setdefault("ftfy", ModuleType("ftfy"))
    fresh(peers / "CLIP")
    from clip.model import CLIP, convert_weights

    model = CLIP(
        embed_dim=32,
        image_resolution=32,
        vision_layers=2,
        vision_width=192,
        vision_patch_size=8,
        context_length=8,
        vocab_size=50,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    ).eval()
    convert_weights(model)
    numbers = {"input_resolution": 32, "context_length": 8, "vocab_size": 50}

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        visual = copy.deepcopy(model.visual).float()
        visual.proj = None
        caught: list[torch.Tensor] = []
        visual.transformer.register_forward_hook(
            lambda module, given, out: caught.append(out.transpose(0, 1))
        )
        cls = visual(images)
        tokens = token_features(caught[0], (4, 4), 1)
        return {"cls@-1": cls, "patches@-1:raw": tokens["patches@-1"]}

    record(
        "openai-clip",
        made_by="openai/CLIP d05afc4, clip.model.CLIP after convert_weights (half precision), visual",
        files={
            "ViT-B-32-state.pt": {
                **model.state_dict(),
                **{name: torch.tensor(number) for name, number in numbers.items()},
            }
        },
        features=features,
        sizes=NATIVE,
        load="ViT-B-32-state.pt",
        expect={
            "family": "openai_clip",
            "num_heads": 3,
            "activation": "quick_gelu",
            "eps": 1e-5,
            "pooling": "cls",
            "crop_pct": 1.0,
        },
    )


def open_clip() -> None:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, resize_pos_embed

    made_by = f"open_clip_torch {open_clip.__version__}"
    tower: dict[str, Any] = {"image_size": 32, "layers": 2, "width": 192, "patch_size": 8}

    def build(image_size: int | tuple[int, int] = 32, quick: bool = False, **more: Any) -> Any:
        vision = CLIPVisionCfg(**{**tower, "image_size": image_size, **more})
        return CLIP(32, vision, CLIPTextCfg(**TEXT), quick_gelu=quick).eval()

    def features(model: Any, images: torch.Tensor, **more: Any) -> Mapping[str, torch.Tensor]:
        height, width = images.shape[-2:]
        other = build((height, width), **more)
        state = dict(model.state_dict())
        resize_pos_embed(state, other)
        other.load_state_dict(state)
        other.visual.proj = None
        other.visual.output_tokens = True
        cls, tokens = other.visual(images)
        return {"cls@-1": cls, "patches@-1": tokens.unflatten(1, (height // 8, width // 8))}

    sizes = {"native": (32, 32), "larger": (32, 56)}
    plain = build()
    record(
        "open-clip-training",
        made_by=f"{made_by}, open_clip.model.CLIP",
        files={
            "epoch_32.pt": {
                "epoch": 32,
                "name": "run",
                "state_dict": prefixed("module.", plain.state_dict()),
                "optimizer": OPTIMIZER,
            }
        },
        features=partial(features, plain),
        sizes=sizes,
        load="epoch_32.pt",
        expect={
            "family": "open_clip",
            "num_heads": 3,
            "activation": "gelu",
            "pos_interpolation": "antialias",
        },
    )
    quick = build(quick=True)
    record(
        "open-clip-quickgelu",
        made_by=f"{made_by}, open_clip.model.CLIP with quick_gelu",
        files={"open_clip_pytorch_model.bin": quick.state_dict()},
        features=partial(features, quick, quick=True),
        sizes=NATIVE,
        load=None,
        options="#family=open_clip_quickgelu",
        expect={"family": "open_clip_quickgelu", "activation": "quick_gelu"},
    )
    options: dict[str, Any] = {"head_width": 32, "ls_init_value": 0.1, "mlp_ratio": 2.0}
    stated = build(quick=True, **options)
    record(
        "open-clip-config",
        made_by=f"{made_by}, open_clip.model.CLIP with head_width, ls_init_value and quick_gelu",
        files={
            "open_clip_model.safetensors": stated.state_dict(),
            "open_clip_config.json": {
                "model_cfg": {
                    "embed_dim": 32,
                    "quick_gelu": True,
                    "vision_cfg": {**tower, **options},
                    "text_cfg": TEXT,
                },
                "preprocess_cfg": {
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.4, 0.4, 0.4],
                    "interpolation": "bilinear",
                },
            },
        },
        features=partial(features, stated, quick=True, **options),
        sizes=sizes,
        load=None,
        expect={
            "family": "open_clip",
            "num_heads": 6,
            "activation": "quick_gelu",
            "mean": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
        },
    )
    trunk(CustomTextCLIP, CLIPVisionCfg, CLIPTextCfg, made_by)


def trunk(model_class: Any, vision_config: Any, text_config: Any, made_by: str) -> None:
    """A tower of timm: small, but with the activation and the heads of the model that open_clip names."""
    import timm

    name = "vit_giantopt_patch16_siglip_256"
    create = timm.create_model
    timm.create_model = partial(create, img_size=64, embed_dim=192, depth=2, num_heads=16, mlp_ratio=2.0)
    tower = {"image_size": 64, "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    model = model_class(192, vision_config(**tower), text_config(**{**TEXT, "pool_type": "last"})).eval()
    timm.create_model = create

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = model.visual.trunk.forward_features(images)
        return {"cls@-1": model.visual(images), "patches@-1": tokens.unflatten(1, (4, 4))}

    record(
        "open-clip-siglip",
        made_by=f"{made_by}, CustomTextCLIP with timm's {name} (width 192, depth 2)",
        files={
            "open_clip_model.safetensors": dict(model.state_dict()),
            "open_clip_config.json": {
                "model_cfg": {"embed_dim": 192, "vision_cfg": tower, "text_cfg": TEXT, "custom_text": True},
                "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
            },
        },
        features=features,
        sizes={"native": (64, 64)},
        load=None,
        expect={
            "family": "open_clip_timm",
            "num_heads": 16,
            "activation": "gelu_tanh",
            "map_pool": True,
            "pooling": "cls",
            "mean": [0.5, 0.5, 0.5],
        },
    )


def eva(peers: Path) -> None:
    fresh(peers / "EVA" / "EVA-CLIP" / "rei" / "eva_clip")
    # The module has relative imports of two others of its package, whose __init__ needs much more.
    package = ModuleType("eva_clip")
    package.__path__ = [str(peers / "EVA" / "EVA-CLIP" / "rei" / "eva_clip")]
    sys.modules["eva_clip"] = package
    from eva_clip.eva_vit_model import EVAVisionTransformer

    common: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "num_classes": 32,
        "use_mean_pooling": False,
        "embed_dim": 192,
        "depth": 2,
        "num_heads": 3,
        "qkv_bias": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    second = {"mlp_ratio": 2.6667, "rope": True, "pt_hw_seq_len": 8, "intp_freq": True}
    second |= {"naiveswiglu": True, "subln": True}
    for name, options in (("eva-clip", {"mlp_ratio": 4}), ("eva02-clip", second)):
        model = EVAVisionTransformer(**common, **options).eval()
        text = {"text.token_embedding.weight": torch.zeros(50, 8), "logit_scale": torch.zeros(())}

        def features(images: torch.Tensor, model: Any = model) -> dict[str, torch.Tensor]:
            tokens = model.norm(model.forward_features(images, return_all_features=True))
            return {**token_features(tokens, (4, 4), 1), "cls@-1": model.forward_features(images)}

        record(
            name,
            made_by="baaivision/EVA 5623d08, EVA-CLIP/rei, EVAVisionTransformer",
            files={"EVA_CLIP.pt": {**prefixed("visual.", model.state_dict()), **text}},
            features=features,
            sizes=NATIVE,
            load="EVA_CLIP.pt",
            keep=r"freqs_(cos|sin)$",
            expect={"family": "eva_clip", "num_heads": 3, "pooling": "cls", "crop_pct": 1.0},
        )


if __name__ == "__main__":
    openai(Path(sys.argv[1]))
    open_clip()
    eva(Path(sys.argv[1]))
