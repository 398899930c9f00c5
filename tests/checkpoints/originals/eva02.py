"""EVA-02: baaivision/EVA, EVA-02/asuka."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from beit import every_block, resized
from common import fresh
from layouts import record

SHAPE: dict[str, Any] = {
    "patch_size": 7,
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 4 * 2 / 3,
    "qkv_bias": True,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    "rope": True,
    "xattn": True,
}
BASE = {"naiveswiglu": True, "subln": True}
TINY = {"swiglu": True}
COMMIT = "baaivision/EVA 5623d08, EVA-02/asuka"


class SwiGLU(nn.Module):
    """xformers' SwiGLU in plain torch: gate and value in one matrix, as it packs them by default."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features)
        self.w3 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """xformers' attention on (B, N, heads, d) in plain torch."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value)


def without_kernels() -> None:
    """The fused kernels of apex and xformers are not needed for the arithmetic."""
    apex, normalization = ModuleType("apex"), ModuleType("apex.normalization")
    normalization.FusedLayerNorm = nn.LayerNorm  # type: ignore[attr-defined]
    xformers, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.SwiGLU, ops.memory_efficient_attention = SwiGLU, attention  # type: ignore[attr-defined]
    xformers.ops = ops  # type: ignore[attr-defined]
    sys.modules |= {
        "apex": apex,
        "apex.normalization": normalization,
        "xformers": xformers,
        "xformers.ops": ops,
    }


def main(peers: Path) -> None:
    folder = peers / "EVA" / "EVA-02" / "asuka"
    script = folder / "run_class_finetuning.py"
    fresh(folder)
    without_kernels()
    from modeling_finetune import VisionTransformer
    from modeling_pretrain import VisionTransformerForMaskedImageModeling

    def at_size(
        state: dict[str, torch.Tensor], side: int, mean: bool, counted: int, options: dict[str, Any]
    ) -> Any:
        """The classifier's encoder of a size, as the fine-tuning script fills it and with its intp_freq."""
        model = VisionTransformer(
            img_size=side,
            num_classes=0,
            use_mean_pooling=mean,
            use_checkpoint=False,
            pt_hw_seq_len=counted,
            intp_freq=True,
            **SHAPE,
            **options,
        ).eval()
        dropped = ("mask_token", "lm_head", "head")
        kept = {k: v for k, v in state.items() if "rope." not in k and not k.startswith(dropped)}
        missing, unexpected = model.load_state_dict(resized(script, kept, model), strict=False)
        assert not unexpected
        assert all("rope." in name for name in missing)
        return model

    def features_of(state: dict[str, torch.Tensor], mean: bool, counted: int, options: dict[str, Any]) -> Any:
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            model = at_size(state, images.shape[-1], mean, counted, options)
            blocks = every_block(model, images)
            grid = images.shape[-2] // 7, images.shape[-1] // 7
            if mean:
                return {
                    "cls@-1:raw": blocks[-1][:, 0],
                    "patches@-1:raw": blocks[-1][:, 1:].unflatten(1, grid),
                    "mean@-1": model.forward_features(images),
                }
            return {
                "patches@-2:raw": blocks[-2][:, 1:].unflatten(1, grid),
                "cls@-1": model.forward_features(images),
                "patches@-1": model.forward_features(images, return_patch_tokens=True).unflatten(1, grid),
            }

        return features

    for name, options in (("eva02", BASE), ("eva02-tiny", TINY)):
        model = VisionTransformerForMaskedImageModeling(
            img_size=28, predict_feature_dim=16, **SHAPE, **options
        ).eval()
        features = features_of(model.state_dict(), False, 4, options)

        def pretrained(
            images: torch.Tensor, model: Any = model, features: Any = features
        ) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = features(images)
            if images.shape[-1] == 28:
                unmasked = torch.zeros(2, 16, dtype=torch.bool)
                tokens = model.forward_features(images, unmasked)
                assert torch.allclose(tokens[:, 0], found["cls@-1"], atol=1e-6)
            return found

        record(
            name,
            made_by=f"{COMMIT}, modeling_pretrain evaluated in modeling_finetune",
            files={"eva02_pt_in21k_p14.pt": {"module": model.state_dict()}},
            features=pretrained,
            sizes={"native": (28, 28), "larger": (42, 42)},
            load="eva02_pt_in21k_p14.pt",
            keep=r"rope\.freqs_(cos|sin)$",
            expect={
                "family": "eva02",
                "num_heads": 4,
                "rotary": 4,
                "pooling": "mean",
                "final_norm": True,
                "mlp": "swiglu" if options is BASE else "swiglu_packed",
                "mean": [0.48145466, 0.4578275, 0.40821073],
            },
        )
    # Fine-tuned at a larger size than the pre-training's: positions still count in the grid of that.
    tuned = VisionTransformer(
        img_size=42, num_classes=5, use_checkpoint=False, pt_hw_seq_len=4, intp_freq=True, **SHAPE, **BASE
    ).eval()
    record(
        "eva02-finetuned",
        made_by=f"{COMMIT}, modeling_finetune with positions of a smaller pre-training",
        files={"eva02_m38m_ft_in1k_p14.pt": {"module": tuned.state_dict()}},
        features=features_of(tuned.state_dict(), True, 4, BASE),
        sizes={"native": (42, 42), "larger": (56, 56)},
        load="eva02_m38m_ft_in1k_p14.pt",
        keep=r"rope\.freqs_(cos|sin)$",
        expect={"family": "eva02", "num_heads": 4, "rotary": 4, "pooling": "mean", "mean_norm": True},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
