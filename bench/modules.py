"""Encoders without timm: raw pixels as the control, and whatever module a Python factory returns."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from .backbones import BaseEncoder, Grid
from .errors import CheckpointError, TaskError, first_problem
from .references import PYTHON
from .types import CheckpointInfo, EncoderSpec, Features, Pooling, PosInterpolation, Tap

_PIXEL_CELLS = 8


class PixelEncoder(BaseEncoder):
    """No network at all: the control that a representation has to beat.

    The feature of a patch is the patch itself, average-pooled to 8x8 RGB (D = 192); the global feature is
    the whole image pooled to 8x8 RGB. Images come normalised, with ImageNet's mean and deviation.
    """

    def __init__(self, patch_size: int = 16, image_size: int = 224) -> None:
        if patch_size < 1:
            raise CheckpointError(f"pixels: the patch size must be positive, got {patch_size}")
        spec = EncoderSpec(
            family="pixels",
            arch={"builder": "pixels", "cells": _PIXEL_CELLS},
            embed_dim=3 * _PIXEL_CELLS**2,
            depth=1,
            patch_size=patch_size,
            image_size=max(1, round(image_size / patch_size)) * patch_size,
            pooling="mean",
            has_cls=False,
        )
        info = CheckpointInfo(
            source="pixels",
            sha256=None,
            format="pixels",
            container="",
            parameters=0,
            loaded_tensors=0,
            encoder_tensors=0,
            notes=("raw pixels, a control without parameters",),
        )
        super().__init__(None, spec, info)

    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        pooled = F.adaptive_avg_pool2d(images, _PIXEL_CELLS).flatten(1)
        patch = self.spec.patch_size
        cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
        cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (B*h*w, 3, p, p)
        cells = F.adaptive_avg_pool2d(cut, _PIXEL_CELLS).reshape(len(images), *grid, -1)
        features = Features(cls=None, patches=cells, mean=pooled)
        return dict.fromkeys(taps, features)


class ModuleEncoder(BaseEncoder):
    """An ``Encoder`` around any module that offers ``embed_dim``, ``patch_size`` and ``forward_features``.

    ``forward_features(images)`` returns a map (B, D, h, w), or tokens (B, prefix + h*w, D) with the class
    token first where ``num_prefix_tokens`` says that there are any (with ``has_cls = False`` they are all
    registers), or a dict with ``patches`` (B, h, w, D) or (B, h*w, D), and ``cls`` (B, D) where the module
    says ``has_cls = True``. The spec's other fields (``image_size``, ``mean``, ``std``, ``interpolation``,
    ``crop_pct``, ``pooling``) are taken from attributes of the module where it has them. Only the last layer
    can be read; ``norm`` is the module's own business.

    What it computes is in its code and attributes as much as in its weights: the fingerprint also holds the
    name of the factory and the source files of the factory and of every class in the module.
    """

    def __init__(self, module: Any, source: str, factory: object) -> None:
        missing = [
            name for name in ("embed_dim", "patch_size", "forward_features") if not hasattr(module, name)
        ]
        if missing:
            raise CheckpointError(
                f"{source}: {type(module).__name__} lacks {', '.join(missing)}; a factory returns an "
                "Encoder, a timm model, or a module with embed_dim, patch_size and forward_features(images)"
            )
        self._prefix = int(getattr(module, "num_prefix_tokens", 0))
        optional = ("image_size", "mean", "std", "interpolation", "crop_pct", "pooling")
        given: dict[str, Any] = {name: getattr(module, name) for name in optional if hasattr(module, name)}
        has_cls = bool(getattr(module, "has_cls", self._prefix > 0))
        pooling: Pooling = "cls" if has_cls else "mean"
        fields = {"image_size": 224, "pooling": pooling, **given}
        try:
            spec = EncoderSpec(
                family="module",
                arch={
                    "builder": "module",
                    "class": f"{type(module).__module__}.{type(module).__qualname__}",
                    "factory": source.removeprefix(PYTHON),
                    "prefix_tokens": self._prefix,
                    "code": _code_digest([factory, *map(type, module.modules())]),
                },
                embed_dim=module.embed_dim,
                depth=1,
                patch_size=module.patch_size,
                has_cls=has_cls,
                **fields,
            )
        except ValidationError as error:
            raise CheckpointError(f"{source}: the module's {first_problem(error)}") from error
        super().__init__(module, spec, module_info(module, source))

    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        what = f"{self.spec.arch['class']}.forward_features gave"
        out = self.model.forward_features(images)
        if not isinstance(out, torch.Tensor) and not (isinstance(out, Mapping) and "patches" in out):
            keys = f" of {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
            given = f"{type(out).__name__}{keys}"
            raise TaskError(f"{what} {given}, expected a map, tokens, or a mapping with `patches`")
        cls, patches = self._split(out, grid)
        if cls is not None and not self.spec.has_cls:
            raise TaskError(f"{what} `cls`, and the module does not say has_cls = True; or leave `cls` out")
        expected = (len(images), *grid, self.spec.embed_dim)
        if tuple(patches.shape) != expected or (cls is None and self.spec.has_cls):
            raise TaskError(
                f"{what} patches of shape {tuple(patches.shape)}, expected {expected}"
                + (" and a class token" if self.spec.has_cls else "")
            )
        features = Features(cls=cls, patches=patches, mean=patches.mean(dim=(1, 2)))
        return dict.fromkeys(taps, features)

    def _split(self, out: Any, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor]:
        if isinstance(out, Mapping):
            cls, patches = out.get("cls"), out["patches"]
            return cls, patches.unflatten(1, grid) if patches.ndim == 3 else patches
        if out.ndim == 4:
            return None, out.permute(0, 2, 3, 1)
        if out.shape[1] - self._prefix != grid[0] * grid[1]:
            return None, out
        return (out[:, 0] if self.spec.has_cls else None), out[:, self._prefix :].unflatten(1, grid)


def _code_digest(objects: Sequence[Any]) -> str:
    """SHA-256 of the source files that functions and classes stand in, those of torch left out."""
    names = {str(getattr(one, "__module__", "")) for one in objects}
    digest = hashlib.sha256()
    for name in sorted(name for name in names if name.partition(".")[0] != "torch"):
        file = getattr(sys.modules.get(name), "__file__", None)
        digest.update(f"\n{name}\n".encode())
        if file is not None and Path(file).is_file():
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def module_info(module: nn.Module, source: str) -> CheckpointInfo:
    """What is known of a module that a factory made: its weights are whatever the factory loaded."""
    count = len(module.state_dict())
    return CheckpointInfo(
        source=source,
        sha256=None,
        format="python",
        container="",
        parameters=sum(p.numel() for p in module.parameters()),
        loaded_tensors=count,
        encoder_tensors=count,
        notes=("the weights are as the factory made them; nothing was checked but that they are finite",),
    )
