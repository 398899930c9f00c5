"""BEiT, BEiT v2 and data2vec: microsoft/unilm (beit, beit2) and facebookresearch/data2vec_vision."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import interpolate
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER
from layouts import record

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4, "mlp_ratio": 4}
NORM = partial(nn.LayerNorm, eps=1e-6)
SQUARE = {"native": (32, 32), "larger": (48, 48)}
UNILM = "microsoft/unilm 768a3c8"


class Interp2d:
    """scipy removed this function; its documentation gives the same spline of FITPACK in its place."""

    def __init__(self, x: Any, y: Any, z: Any, kind: str) -> None:
        self.spline = interpolate.RectBivariateSpline(x, y, z.T)

    def __call__(self, x: Any, y: Any) -> Any:
        return self.spline(x, y).T


def fresh(folder: Path) -> None:
    """Make a repository importable; the modules of all three have the same names."""
    for name in [n for n in sys.modules if n.startswith("modeling_")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))


def resized(script: Path, state: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The tables for another image size, by the very lines of the repository's run_class_finetuning.py."""
    text = script.read_text()
    first = text.index("\n        all_keys = list(checkpoint_model.keys())")
    last = text.index("        utils.load_state_dict(model, checkpoint_model", first)
    scope: dict[str, Any] = {
        "torch": torch,
        "np": np,
        "interpolate": SimpleNamespace(interp2d=Interp2d),
        "model": model,
        "checkpoint_model": dict(state),
        "print": lambda *args: None,
        # Options of data2vec's script, at their defaults.
        "args": SimpleNamespace(
            learn_layer_weights=False, target_layer=-1, remove_final_norm=False, linear_classifier=False
        ),
    }
    exec(compile("if True:\n" + text[first:last], "run_class_finetuning.py", "exec"), scope)
    table: dict[str, torch.Tensor] = scope["checkpoint_model"]
    return table


def at_size(make: Any, script: Path, state: Mapping[str, torch.Tensor], side: int) -> Any:
    """The classifier's encoder for images of a size, filled as the fine-tuning script fills it."""
    model = make(side).eval()
    skip = ("mask_token", "lm_head", "cls_pt_", "head.")
    kept = {k: v for k, v in resized(script, state, model).items() if not k.startswith(skip)}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(k.startswith("head") or "position_index" in k for k in missing)
    return model


def columns(blocks: list[torch.Tensor], model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns of the tokens after every block, with and without the last norm."""
    grid = images.shape[-2] // 8, images.shape[-1] // 8
    found = {
        "cls@-1:raw": blocks[-1][:, 0],
        "patches@-1:raw": blocks[-1][:, 1:].unflatten(1, grid),
        "patches@-2:raw": blocks[-2][:, 1:].unflatten(1, grid),
    }
    if model.fc_norm is None:
        found["cls@-1"] = model.norm(blocks[-1])[:, 0]
        return found
    return found | {"mean@-1": model.forward_features(images)}


def every_block(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """The tokens after every block; data2vec's blocks return a pair."""
    caught: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, given, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in model.blocks
    ]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return caught


def beit(folder: Path, made_by: str, prefix: str, second: bool) -> None:
    fresh(folder)
    import modeling_finetune
    import modeling_pretrain

    script = folder / "run_class_finetuning.py"
    common: dict[str, Any] = {"norm_layer": NORM, "qkv_bias": True, "init_values": 0.1, **SHAPE}
    unmasked = torch.zeros(2, 16, dtype=torch.bool)

    def pretrained(absolute: bool) -> tuple[Any, Any]:
        options = {"use_abs_pos_emb": absolute, "use_shared_rel_pos_bias": not absolute}
        kind = modeling_pretrain.VisionTransformerForMaskedImageModeling
        extra: dict[str, Any] = {}
        if second:
            kind = modeling_pretrain.VisionTransformerForMaskedImageModelingCLS
            extra = {"early_layers": 2, "head_layers": 1}
        model = kind(img_size=32, vocab_size=20, **options, **extra, **common).eval()

        def make(side: int) -> Any:
            return modeling_finetune.VisionTransformer(
                img_size=side, num_classes=0, use_mean_pooling=False, **options, **common
            )

        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            encoder = at_size(make, script, model.state_dict(), images.shape[-1])
            found = columns(encoder.get_intermediate_layers(images), encoder, images)
            if images.shape[-1] == 32:
                tokens = model.forward_features(images, unmasked)
                tokens = tokens[0] if second else tokens
                found["patches@-1"] = tokens[:, 1:].unflatten(1, (4, 4))
            return found

        return model, features

    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    model, features = pretrained(absolute=False)
    record(
        prefix,
        made_by=f"{made_by}, modeling_pretrain, evaluated as run_linear_eval.py does",
        files={
            "checkpoint-799.pth": {
                "model": model.state_dict(),
                "optimizer": OPTIMIZER,
                "epoch": 799,
                "scaler": {"scale": 65536.0},
                "args": argparse.Namespace(model="tiny", imagenet_default_mean_and_std=second),
            }
        },
        features=features,
        sizes=SQUARE,
        load="checkpoint-799.pth",
        expect={
            "family": "beit",
            "num_heads": 4,
            "relative": "shared",
            "pooling": "cls+mean",
            "final_norm": False,
            **(imagenet if second else half),
        },
    )
    if not second:
        model, features = pretrained(absolute=True)
        record(
            f"{prefix}-absolute",
            made_by=f"{made_by}, modeling_pretrain with --abs_pos_emb --disable_rel_pos_bias",
            files={"beit_base_patch16_224_pt1k_800ep.pth": {"model": model.state_dict()}},
            features=features,
            sizes=SQUARE,
            load="beit_base_patch16_224_pt1k_800ep.pth",
            options="#heads=4",
            expect={"family": "beit", "num_heads": 4, "relative": "none", "positions": True},
        )

    def classifier(side: int) -> Any:
        return modeling_finetune.VisionTransformer(
            img_size=side, num_classes=5, use_abs_pos_emb=False, use_rel_pos_bias=True, **common
        )

    tuned = classifier(32).eval()

    def tuned_features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoder = at_size(classifier, script, tuned.state_dict(), images.shape[-1])
        return columns(encoder.get_intermediate_layers(images), encoder, images)

    file = "beitv2_base_patch16_224_pt1k_ft1k.pth" if second else "mp_rank_00_model_states.pt"
    record(
        f"{prefix}-finetuned",
        made_by=f"{made_by}, modeling_finetune with relative positions in each block, as DeepSpeed saves it",
        files={
            file: {
                "module": tuned.state_dict(),
                "optimizer": None,
                "lr_scheduler": None,
                "skipped_steps": 0,
                "global_steps": 100,
                "epoch": 99,
            }
        },
        features=tuned_features,
        sizes=SQUARE,
        load=file,
        expect={
            "family": "beit",
            "num_heads": 4,
            "relative": "blocks",
            "pooling": "mean",
            **(imagenet if second else half),
        },
    )


def data2vec(folder: Path) -> None:
    fresh(folder)
    import modeling_cyclical
    import modeling_finetune

    script = folder / "run_class_finetuning.py"
    common: dict[str, Any] = {"norm_layer": NORM, "qkv_bias": True, "init_values": 1e-4, **SHAPE}
    options = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True}
    model, ema = (
        modeling_cyclical.VisionTransformerForCyclicalTraining(img_size=32, **options, **common).eval()
        for _ in range(2)
    )

    def make(side: int) -> Any:
        return modeling_finetune.VisionTransformer(
            img_size=side, num_classes=5, use_mean_pooling=False, **options, **common
        )

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoder = at_size(make, script, model.state_dict(), images.shape[-1])
        found = columns(every_block(encoder, images), encoder, images)
        if images.shape[-1] == 32:
            tokens = model.forward_features(images, bool_masked_pos=None, layer_results=None)
            found["patches@-1"] = tokens[:, 1:].unflatten(1, (4, 4))
        return found

    record(
        "data2vec",
        made_by="facebookresearch/data2vec_vision af9a363, modeling_cyclical evaluated in modeling_finetune",
        files={
            "checkpoint-799.pth": {
                "model": model.state_dict(),
                "optimizer": OPTIMIZER,
                "epoch": 799,
                "scaler": {"scale": 65536.0},
                "args": argparse.Namespace(model="tiny", imagenet_default_mean_and_std=True),
                "model_ema": ema.state_dict(),
            }
        },
        features=features,
        sizes=SQUARE,
        load="checkpoint-799.pth",
        expect={
            "family": "data2vec",
            "num_heads": 4,
            "pooling": "mean",
            "final_norm": False,
            "container": "model",
            "mean": [0.485, 0.456, 0.406],
        },
    )


if __name__ == "__main__":
    peers = Path(sys.argv[1])
    beit(peers / "unilm" / "beit", f"{UNILM}, beit", "beit", second=False)
    beit(peers / "unilm" / "beit2", f"{UNILM}, beit2", "beit2", second=True)
    data2vec(peers / "data2vec_vision" / "beit")
