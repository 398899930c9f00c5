"""data2vec 2.0 for images: facebookresearch/fairseq, examples/data2vec."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, token_features
from layouts import record

POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
Modality = enum.Enum("Modality", ["AUDIO", "IMAGE", "TEXT"])


def module(name: str, path: Path | None = None, **content: Any) -> Any:
    """A module of given content, or a package whose parts are read from a folder."""
    made = ModuleType(name)
    if path is not None:
        made.__path__ = [str(path)]
    vars(made).update(content)
    sys.modules[name] = made
    return made


def without_fairseq(peers: Path) -> None:
    """fairseq needs an old Python; the image encoder needs of it the moving average, and empty bases."""
    import timm.layers
    from timm.models import vision_transformer

    for name in ("DropPath", "Mlp", "PatchEmbed"):
        setattr(vision_transformer, name, getattr(timm.layers, name))
    module("timm.models.layers", to_2tuple=timm.layers.to_2tuple)
    module("omegaconf", II=lambda text: None, MISSING=None)
    vars(np)["float"] = float
    # Its dataclasses have mutable defaults, which Python refuses since 3.11 unless they can be hashed.
    dataclasses.dataclass = partial(dataclasses.dataclass, unsafe_hash=True)  # type: ignore[assignment]

    def register_model(*args: Any, **kwargs: Any) -> Any:
        return lambda decorated: decorated

    base = type("Base", (), {})
    root = peers / "fairseq"
    module("fairseq", root)
    module("fairseq.dataclass", FairseqDataclass=base)
    module("fairseq.tasks", FairseqTask=base)
    module("fairseq.utils", index_put=None)
    module("fairseq.data", root)
    module("fairseq.data.data_utils", compute_mask_indices=None)
    module("fairseq.models", root, BaseFairseqModel=nn.Module, register_model=register_model)
    module("fairseq.models.wav2vec", root)
    module("fairseq.models.wav2vec.wav2vec2", TransformerSentenceEncoderLayer=None)
    content: dict[str, Any] = {
        "LayerNorm": nn.LayerNorm,
        "TransposeLast": lambda **options: nn.Identity(),
        "SamePad2d": lambda kernel: nn.Identity(),
        "SamePad": None,
        "GradMultiply": None,
    }
    modules = module("fairseq.modules", root / "fairseq" / "modules", **content)
    ema = importlib.import_module("fairseq.modules.ema_module")
    modules.EMAModule, modules.EMAModuleConfig = ema.EMAModule, ema.EMAModuleConfig
    module("fairseq.modules.transformer_sentence_encoder", init_bert_params=lambda layer: None)
    examples = root / "examples"
    module("examples", examples)
    module("examples.data2vec", examples / "data2vec")
    module("examples.data2vec.data", examples / "data2vec" / "data")
    module("examples.data2vec.data.modality", Modality=Modality)
    module("examples.data2vec.models", examples / "data2vec" / "models")
    models = examples / "data2vec" / "models" / "modalities"
    module("examples.data2vec.models.modalities", models)
    for name, kinds in (
        ("audio", ("D2vAudioConfig", "AudioEncoder")),
        ("text", ("D2vTextConfig", "TextEncoder")),
    ):
        module(
            f"examples.data2vec.models.modalities.{name}",
            **{kind: dataclasses.make_dataclass(kind, [], unsafe_hash=True) for kind in kinds},
        )


def main(peers: Path) -> None:
    without_fairseq(peers)
    from examples.data2vec.models.data2vec2 import Data2VecMultiConfig, Data2VecMultiModel
    from examples.data2vec.models.mae import interpolate_pos_embed
    from examples.data2vec.models.modalities.images import D2vImageConfig
    from examples.data2vec.models.modalities.modules import D2vDecoderConfig

    def network(side: int, prenet: int, depth: int, evaluated: bool = False) -> Any:
        image = D2vImageConfig(
            type=Modality.IMAGE,
            input_size=side,
            patch_size=8,
            embed_dim=96,
            prenet_depth=prenet,
            num_extra_tokens=1,
            init_extra_token_zero=False,
            ema_local_encoder=True,
            decoder=D2vDecoderConfig(decoder_dim=16, decoder_groups=4, decoder_kernel=3, decoder_layers=1),
        )
        config = Data2VecMultiConfig(
            depth=depth,
            num_heads=4,
            embed_dim=96,
            norm_eps=1e-6,
            encoder_dropout=0,
            post_mlp_drop=0,
            attention_dropout=0,
            ema_encoder_only=False,
            supported_modality=Modality.IMAGE,
        )
        config.modalities = SimpleNamespace(image=image)
        return Data2VecMultiModel(config, [Modality.IMAGE], skip_ema=evaluated).eval()

    for name, prenet, depth, pick in (
        ("data2vec2", 1, 2, ""),
        ("data2vec2-large", 0, 2, ""),
        ("data2vec2-ema", 1, 2, "#_ema"),
    ):
        model = network(32, prenet, depth)
        state = model.state_dict()
        chosen = state["_ema"] if pick else {k: v for k, v in state.items() if k != "_ema"}

        def features(
            images: torch.Tensor, prenet: int = prenet, depth: int = depth, chosen: dict[str, Any] = chosen
        ) -> dict[str, torch.Tensor]:
            # As mae_image_classification.py evaluates. Its resizing of positions looks for MAE's name of the
            # table and so does nothing here: it is given the table under that name.
            encoder = network(images.shape[-1], prenet, depth, evaluated=True)
            encoder.remove_pretraining_modules()
            kept = {k: v for k, v in chosen.items() if ".decoder." not in k}
            shape = SimpleNamespace(num_patches=(images.shape[-1] // 8) ** 2)
            table = {"pos_embed": kept[POSITIONS]}
            like = SimpleNamespace(patch_embed=shape, pos_embed=encoder.state_dict()[POSITIONS])
            interpolate_pos_embed(like, table)
            encoder.load_state_dict({**kept, POSITIONS: table["pos_embed"]})
            grid = images.shape[-2] // 8, images.shape[-1] // 8
            caught: list[torch.Tensor] = []
            hook = encoder.blocks[-2].register_forward_hook(lambda module, given, out: caught.append(out[0]))
            tokens = encoder.extract_features(images, mode="IMAGE", mask=False, remove_extra_tokens=False)[
                "x"
            ]
            hook.remove()
            return {
                **token_features(tokens, grid, 1),
                "mean@-1": tokens[:, 1:].mean(dim=1),
                "patches@-2": caught[0][:, 1:].unflatten(1, grid),
            }

        record(
            name,
            made_by="facebookresearch/fairseq 3d262bb2, examples/data2vec, Data2VecMultiModel",
            files={
                "base_imagenet.pt": {
                    "args": None,
                    "cfg": {"model": {"_name": "data2vec_multi", "depth": depth, "num_heads": 4}},
                    "model": state,
                    "criterion": None,
                    "optimizer_history": [{"num_updates": 375300}],
                    "task_state": {},
                    "extra_state": {"train_iterator": {"epoch": 300}},
                    "last_optimizer_state": OPTIMIZER,
                }
            },
            features=features,
            sizes={"native": (32, 32), "larger": (48, 48)},
            load="base_imagenet.pt",
            options=pick,
            keep=r"positions$",
            expect={
                "family": "data2vec2",
                "num_heads": 4,
                "depth": prenet + depth,
                "pooling": "mean",
                "container": "model._ema" if pick else "model",
            },
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
