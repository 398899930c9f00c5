"""Latent MIM, BEiT, BEiT v2, data2vec, SimMIM, EVA-02 and data2vec 2.0, each by its own repository."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
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


def beit(peers: Path) -> None:
    for version, folder in (("beit", peers / "unilm" / "beit"), ("beit2", peers / "unilm" / "beit2")):
        fresh(folder)
        old_timm()
        finetune = importlib.import_module("modeling_finetune")
        pretrain = importlib.import_module("modeling_pretrain")
        common = {**SHAPE, "img_size": 32, "qkv_bias": True, "norm_layer": NORM, "init_values": 0.1}
        model = pretrain.VisionTransformerForMaskedImageModeling(
            vocab_size=16, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, **common
        ).eval()

        def features(images: torch.Tensor, model: Any = model) -> dict[str, torch.Tensor]:
            mask = torch.zeros(len(images), 16, dtype=torch.bool)
            tokens = normed_tokens(model, images, lambda x: model.forward_features(x, bool_masked_pos=mask))
            patches = tokens[:, 1:]
            return {**token_features(tokens, grid(images), 1), "mean@-1": patches.mean(1)}

        name = f"microsoft/unilm 768a3c8, {version}"
        args = argparse.Namespace(imagenet_default_mean_and_std=version == "beit2", model=version)
        record(
            version,
            made_by=f"{name}/modeling_pretrain.VisionTransformerForMaskedImageModeling",
            files={
                "checkpoint-799.pth": {
                    "model": model.state_dict(),
                    "optimizer": OPTIMIZER,
                    "epoch": 799,
                    "scaler": {"scale": 1.0},
                    "args": args,
                }
            },
            features=features,
            sizes=NATIVE,
            load="checkpoint-799.pth",
            expect={
                "family": "beit",
                "pooling": "mean",
                "mean": [0.485, 0.456, 0.406] if version == "beit2" else [0.5, 0.5, 0.5],
            },
        )
        tuned = finetune.VisionTransformer(
            num_classes=5, use_rel_pos_bias=True, use_abs_pos_emb=False, **common
        ).eval()

        def mean(images: torch.Tensor, tuned: Any = tuned) -> dict[str, torch.Tensor]:
            tokens = tuned.get_intermediate_layers(images)[-1]
            tokens = tokens if tokens.ndim == 3 else tokens[None]
            columns = {"mean@-1": tuned.forward_features(images)}
            if tokens.shape[1] == 17:
                columns["patches@-1:raw"] = tokens[:, 1:].unflatten(1, grid(images))
            return columns

        record(
            f"{version}-finetuned",
            made_by=f"{name}/modeling_finetune.VisionTransformer",
            files={"checkpoint-99.pth": {"model": tuned.state_dict(), "args": args}},
            features=mean,
            sizes=NATIVE,
            load="checkpoint-99.pth",
            expect={"family": "beit", "pooling": "mean"},
        )


def data2vec(peers: Path) -> None:
    fresh(peers / "data2vec_vision" / "beit")
    old_timm()
    module = importlib.import_module("modeling_cyclical")
    model = module.VisionTransformerForCyclicalTraining(
        img_size=32,
        qkv_bias=True,
        norm_layer=NORM,
        init_values=0.1,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=False,
        **SHAPE,
    ).eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(images), 16, dtype=torch.bool)

        def run(x: torch.Tensor) -> Any:
            return model.forward_features(x, bool_masked_pos=mask, layer_results=None)

        return token_features(normed_tokens(model, images, run), grid(images), 1)

    record(
        "data2vec",
        made_by="facebookresearch/data2vec_vision af9a363, beit/modeling_cyclical.VisionTransformerForCyclicalTraining",
        files={
            "checkpoint-799.pth": {
                "model": model.state_dict(),
                "optimizer": OPTIMIZER,
                "epoch": 799,
                "args": argparse.Namespace(model="beit_base_patch16_224"),
            }
        },
        features=features,
        sizes=NATIVE,
        load="checkpoint-799.pth",
        expect={"family": "data2vec", "pooling": "mean", "mean": [0.485, 0.456, 0.406]},
    )


def simmim(peers: Path) -> None:
    # The repository's package models imports both networks, and a swin that needs no more than timm.
    fresh(peers / "SimMIM")
    old_timm()
    module = importlib.import_module("models.simmim")
    vit = module.VisionTransformerForSimMIM(
        img_size=32,
        num_classes=0,
        qkv_bias=True,
        norm_layer=NORM,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
        use_mean_pooling=False,
        **SHAPE,
    )
    vit.in_chans, vit.patch_size = 3, 8
    model = module.SimMIM(encoder=vit, encoder_stride=8).eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(images), *grid(images))
        tokens = normed_tokens(vit, images, lambda x: vit(x, mask))
        return token_features(tokens, grid(images), 1)

    record(
        "simmim",
        made_by="microsoft/SimMIM d3e29bc, models.simmim.VisionTransformerForSimMIM",
        files={
            "ckpt_epoch_799.pth": {
                "model": model.state_dict(),
                "optimizer": OPTIMIZER,
                "lr_scheduler": {"last_epoch": 1},
                "max_accuracy": 0.0,
                "epoch": 799,
            }
        },
        features=features,
        sizes=NATIVE,
        load="ckpt_epoch_799.pth",
        expect={"family": "simmim", "pooling": "mean", "container": "model.encoder"},
    )
    swin = module.SwinTransformerForSimMIM(
        img_size=64,
        patch_size=4,
        num_classes=0,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        norm_layer=nn.LayerNorm,
    )
    model = module.SimMIM(encoder=swin, encoder_stride=8).eval()

    def map_of(images: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(images), images.shape[-2] // 4, images.shape[-1] // 4)
        found = swin(images, mask).permute(0, 2, 3, 1)
        return {"patches@-1": found, "mean@-1": found.mean((1, 2))}

    record(
        "simmim-swin",
        made_by="microsoft/SimMIM d3e29bc, models.simmim.SwinTransformerForSimMIM",
        files={"ckpt_epoch_799.pth": {"model": model.state_dict(), "optimizer": OPTIMIZER, "epoch": 799}},
        features=map_of,
        sizes={"native": (64, 64)},
        load="ckpt_epoch_799.pth",
        keep=r"attn_mask$",
        expect={"family": "simmim_swin", "pooling": "mean", "container": "model.encoder"},
    )


def eva02(peers: Path) -> None:
    fresh(peers / "EVA" / "EVA-02" / "asuka")
    old_timm()
    # Fused kernels of the same arithmetic, and an attention of xformers in its plain form.
    apex, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    normalization.FusedLayerNorm = nn.LayerNorm  # type: ignore[attr-defined]
    xformers, ops = ModuleType("xformers"), ModuleType("xformers.ops")

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        out = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    class SwiGLU(nn.Module):
        """Packed as xformers does: gate and value in one matrix."""

        def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
            super().__init__()
            self.w12 = nn.Linear(in_features, 2 * hidden_features)
            self.w3 = nn.Linear(hidden_features, in_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, value = self.w12(x).chunk(2, dim=-1)
            return self.w3(nn.functional.silu(gate) * value)

    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    ops.SwiGLU = SwiGLU  # type: ignore[attr-defined]
    xformers.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {"apex": apex, "apex.normalization": normalization, "xformers": xformers, "xformers.ops": ops}
    pretrain = importlib.import_module("modeling_pretrain")
    shape = {**SHAPE, "patch_size": 14, "mlp_ratio": 8 / 3, "img_size": 56, "qkv_bias": True, "norm_layer": NORM}
    variants = {"eva02": {"naiveswiglu": True, "subln": True}, "eva02-tiny": {"swiglu": True}}
    for name, options in variants.items():
        model = pretrain.VisionTransformerForMaskedImageModeling(
            rope=True, xattn=True, use_abs_pos_emb=True, predict_feature_dim=16, **options, **shape
        ).eval()

        def features(images: torch.Tensor, model: Any = model) -> dict[str, torch.Tensor]:
            mask = torch.zeros(len(images), 16, dtype=torch.bool)

            def run(x: torch.Tensor) -> Any:
                return model.forward_features(x, bool_masked_pos=mask)

            return token_features(normed_tokens(model, images, run), grid(images, 14), 1)

        record(
            name,
            made_by="baaivision/EVA 5623d08, EVA-02/asuka/modeling_pretrain.VisionTransformerForMaskedImageModeling",
            files={"eva02.pt": {"module": model.state_dict()}},
            features=features,
            sizes={"native": (56, 56)},
            load="eva02.pt",
            keep=r"freqs_(cos|sin)$",
            expect={"family": "eva02", "pooling": "mean"},
        )


def data2vec2(peers: Path) -> None:
    fresh(peers / "fairseq")
    old_timm()

    class Stub(ModuleType):
        """Parts of fairseq for audio, text and training, which an image encoder is built without."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name.startswith("register"):
                return lambda *args, **kwargs: lambda decorated: decorated
            return type(name, (nn.Module,), {})

    for name in ("", ".modules", ".data", ".data.data_utils", ".utils", ".tasks", ".models", ".models.wav2vec"):
        sys.modules["fairseq" + name] = Stub("fairseq" + name)
    for name in (".dataclass", ".distributed", ".modules.transformer_sentence_encoder", ".models.wav2vec.wav2vec2"):
        sys.modules["fairseq" + name] = Stub("fairseq" + name)
    for name in ("omegaconf", "examples.data2vec.data", "examples.data2vec.data.modality"):
        sys.modules[name] = Stub(name)
    sys.modules["omegaconf"].II = lambda text: None  # type: ignore[attr-defined]
    base = peers / "fairseq" / "examples" / "data2vec" / "models"
    for name, path in (
        ("examples", base.parents[1]),
        ("examples.data2vec", base.parent),
        ("examples.data2vec.models", base),
        ("examples.data2vec.models.modalities", base / "modalities"),
    ):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package

    # Its dataclasses have mutable defaults, which Python refuses since 3.11 unless they can be hashed.
    dataclasses.dataclass = partial(dataclasses.dataclass, unsafe_hash=True)  # type: ignore[assignment]

    class Modality:
        IMAGE = "IMAGE"

    sys.modules["examples.data2vec.data.modality"].Modality = Modality  # type: ignore[attr-defined]
    images_module = importlib.import_module("examples.data2vec.models.modalities.images")
    parts = importlib.import_module("examples.data2vec.models.modalities.modules")

    def block(drop_path: float, dim: Any = None, heads: Any = None) -> Any:
        return parts.AltBlock(192, 3, 4.0, qkv_bias=True, norm_layer=NORM, layer_norm_first=False)

    config = images_module.D2vImageConfig()
    settings = {
        "input_size": 32,
        "patch_size": 8,
        "in_chans": 3,
        "embed_dim": 192,
        "fixed_positions": True,
        "prenet_depth": 1,
        "num_extra_tokens": 1,
        "init_extra_token_zero": False,
        "use_alibi_encoder": False,
        "transformer_decoder": False,
        "decoder": None,
        "local_grad_mult": 1.0,
        "mask_prob": 0.0,
        "prenet_layerdrop": 0.0,
        "prenet_dropout": 0.0,
        "start_drop_path_rate": 0.0,
        "end_drop_path_rate": 0.0,
    }
    for key, value in settings.items():
        setattr(config, key, value)
    model = nn.Module()
    encoder = images_module.ImageEncoder(config, 192, block, NORM, False, {}, None)
    model.modality_encoders = nn.ModuleDict({"IMAGE": encoder})
    model.blocks = nn.ModuleList(block(0.0) for _ in range(2))
    model.eval()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = encoder(images, None, False, False)["x"]
        for layer in model.blocks:
            x, _ = layer(x)
        return token_features(x, grid(images), 1)

    average = {name.removeprefix("blocks."): t * 1 for name, t in model.state_dict().items() if "blocks.0" in name}
    record(
        "data2vec2",
        made_by="facebookresearch/fairseq 3d262bb, examples/data2vec ImageEncoder and AltBlock",
        files={
            "base_imagenet.pt": {
                "args": None,
                "cfg": {"model": {"depth": 2}},
                "model": {**model.state_dict(), "_ema": average},
                "criterion": None,
                "optimizer_history": [],
                "extra_state": {"epoch": 1},
            }
        },
        features=features,
        sizes=NATIVE,
        load="base_imagenet.pt",
        expect={"family": "data2vec2", "depth": 3, "pooling": "mean", "num_heads": 3},
    )


if __name__ == "__main__":
    asked = sys.argv[2:]
    for recipe in (latent_mim, beit, data2vec, simmim, eva02, data2vec2):
        if not asked or recipe.__name__ in asked:
            recipe(Path(sys.argv[1]))
