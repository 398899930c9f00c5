"""Encoders other than the plain vision transformer: any timm model, any module, and raw pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import nn

from .errors import CheckpointError, TaskError
from .types import CheckpointInfo, Encoder, EncoderSpec, Features, Pooling, PosInterpolation, Tap
from .vit import Grid, ViTEncoder, check_images, check_taps, weights_fingerprint

_PIXEL_CELLS = 8
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


# ------------------------------------------------------------------------------------------- timm models


def create_timm(name: str, *, pretrained: bool, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Create a timm model without its classifier, with the global random state left as it was.

    Raises:
        CheckpointError: timm has no such model, or its pretrained weights cannot be had.
    """
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise CheckpointError(f"timm {timm.__version__} has no model {name!r}{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        except Exception as error:  # timm and the hub raise many kinds for one cause
            what = "the pretrained weights of" if pretrained else "the timm model"
            raise CheckpointError(f"{what} {name} cannot be loaded: {_first_line(error)}") from error
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def timm_spec(
    model: Any,
    arch: Mapping[str, Any],
    family: str = "timm",
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> EncoderSpec:
    """The spec of a timm model, with the preprocessing that timm keeps with the weights.

    Args:
        model: the model.
        arch: what rebuilds it, ``{"builder": "timm", "name": ..., "kwargs": ...}``.
        family: the spec's family.
        pretrained_cfg: the preprocessing of a ``config.json``, in place of the model's own.

    Raises:
        CheckpointError: the model gives no map of patch features.
    """
    config: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        {}, pretrained_cfg=dict(pretrained_cfg or {}) or None, model=model
    )
    common: dict[str, Any] = {
        "family": family,
        "arch": dict(arch),
        "image_size": int(config["input_size"][-1]),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"] if config["interpolation"] in _INTERPOLATIONS else "bicubic",
        "crop_pct": min(1.0, float(config["crop_pct"])),
    }
    if ViTEncoder.supports(model):
        has_cls = bool(model.has_class_token)
        return EncoderSpec(
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            patch_size=model.patch_embed.patch_size[0],
            pooling="cls" if has_cls and model.global_pool == "token" else "mean",
            has_cls=has_cls,
            **common,
        )
    layout = _Layout(model, common["image_size"])
    return EncoderSpec(
        embed_dim=layout.embed_dim,
        depth=layout.depth,
        patch_size=layout.patch_size,
        pooling="cls" if layout.has_cls and getattr(model, "global_pool", "") == "token" else "mean",
        has_cls=layout.has_cls,
        **common,
    )


def timm_encoder(model: Any, spec: EncoderSpec, info: CheckpointInfo) -> Encoder:
    """The encoder around a timm model: exact token assembly for a plain ViT, timm's own for the others."""
    return ViTEncoder(model, spec, info) if ViTEncoder.supports(model) else TimmEncoder(model, spec, info)


class _Layout:
    """How the features of a timm model are laid out, found by one pass of a blank image."""

    def __init__(self, model: Any, image_size: int) -> None:
        name = type(model).__name__
        model.eval()
        with torch.inference_mode():
            try:
                out = model.forward_features(torch.zeros(1, 3, image_size, image_size))
            except Exception as error:
                raise CheckpointError(
                    f"{name} gives no patch features: forward_features failed ({_first_line(error)})"
                ) from error
        if not isinstance(out, torch.Tensor) or out.ndim not in (3, 4):
            raise CheckpointError(f"{name} gives no patch features: forward_features returns no feature map")
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.has_cls = getattr(model, "cls_token", None) is not None and self.prefix > 0
        infos = getattr(model, "feature_info", None)
        self.channels_last = False
        if out.ndim == 4:
            width = model.num_features
            if out.shape[1] != width and out.shape[3] != width:
                raise CheckpointError(f"{name} gives a feature map of shape {tuple(out.shape)}: unknown axes")
            self.channels_last = out.shape[1] != width or getattr(model, "output_fmt", "") == "NHWC"
            grid = out.shape[1] if self.channels_last else out.shape[2]
            self.embed_dim = int(out.shape[3] if self.channels_last else out.shape[1])
        else:
            grid = round((out.shape[1] - self.prefix) ** 0.5)
            self.embed_dim = int(out.shape[2])
            if grid * grid + self.prefix != out.shape[1]:
                raise CheckpointError(
                    f"{name} gives {out.shape[1]} tokens, which are no square map of patches"
                )
        if not grid or image_size % grid:
            raise CheckpointError(f"{name} gives a map of {grid}x{grid} for {image_size} pixels")
        self.patch_size = image_size // grid
        self.columnar = out.ndim == 3 and _is_columnar(model, infos, self.embed_dim)
        self.depth = len(infos) if self.columnar and infos is not None else 1
        self.native: Grid | None = None if self._any_size(model, out.ndim) else (grid, grid)

    @staticmethod
    def _any_size(model: Any, ndim: int) -> bool:
        embed = getattr(model, "patch_embed", None)
        if ndim == 4 and not getattr(embed, "strict_img_size", False):
            return True
        return bool(getattr(model, "dynamic_img_size", False))


def _is_columnar(model: Any, infos: Any, width: int) -> bool:
    """Blocks of one width that can all be read: the depth of the encoder is then the number of blocks."""
    if not infos or not hasattr(model, "forward_intermediates"):
        return False
    takes_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    norm = getattr(model, "norm", None)
    known_norm = isinstance(norm, nn.Identity | nn.LayerNorm) or type(norm).__name__.startswith("RmsNorm")
    return takes_prefix and known_norm and all(i["num_chs"] == width for i in infos)


class TimmEncoder:
    """An ``Encoder`` around any timm model that gives a map of features.

    Transformers of one width (EVA, BEiT, DeiT and their like) are read at any block. Convolutional and
    hierarchical networks are read at their last stage, after the model's own last norm: depth is 1, there
    is no class token, and ``norm=False`` gives the same features where nothing separates the two.
    """

    def __init__(self, model: nn.Module, spec: EncoderSpec, info: CheckpointInfo) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.spec = spec
        self.info = info
        self.fingerprint = weights_fingerprint(model.state_dict(), spec)
        self._layout = _Layout(model, spec.image_size)
        self._device = torch.device("cpu")

    def to(self, device: str | torch.device) -> TimmEncoder:
        """Move to a device; returns self."""
        self.model.to(device)
        self._device = torch.device(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        images: torch.Tensor,
        taps: Sequence[Tap] = (Tap(),),
        pos_interpolation: PosInterpolation | None = None,
    ) -> dict[Tap, Features]:
        """Encode (B, 3, H, W); see ``Encoder``. Raises TaskError for a size or layer that does not fit."""
        check_taps(taps, self.spec)
        grid = check_images(images, self.spec)
        self._check_size(grid, pos_interpolation)
        images = images.to(self._device)
        if self._layout.columnar:
            return self._columnar(images, taps, grid)
        features = self._last_stage(images, grid)
        return {tap: self._pool(features, tap) for tap in taps}

    def _check_size(self, grid: Grid, pos_interpolation: PosInterpolation | None) -> None:
        native = self._layout.native
        size = self.spec.image_size
        if native is not None and grid != native:
            raise TaskError(f"{type(self.model).__name__} takes images of {size}x{size} pixels only")
        at_home = tuple(n * self.spec.patch_size for n in grid) == (size, size)
        if pos_interpolation == "dino" and not at_home and getattr(self.model, "pos_embed", None) is not None:
            raise TaskError(
                f"{type(self.model).__name__} resamples its position embeddings by itself; "
                "use the interpolation 'timm'"
            )

    def _columnar(self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid) -> dict[Tap, Features]:
        depth, prefix = self.spec.depth, self._layout.prefix
        layers = sorted({depth + tap.layer for tap in taps})
        maps = self.model.forward_intermediates(
            images, indices=layers, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True,
            stop_early=True,
        )  # fmt: skip
        found: dict[Tap, Features] = {}
        for layer, entry in zip(layers, maps, strict=True):
            body, head = entry if prefix else (entry, None)
            for tap in taps:
                if depth + tap.layer == layer and tap not in found:
                    tokens = body if head is None else torch.cat([head, body], dim=1)
                    tokens = self.model.norm(tokens) if tap.norm else tokens
                    cls = tokens[:, 0] if self.spec.has_cls else None
                    found[tap] = self._pool((cls, tokens[:, prefix:].unflatten(1, grid)), tap)
        return found

    def _last_stage(self, images: torch.Tensor, grid: Grid) -> tuple[torch.Tensor | None, torch.Tensor]:
        out = self.model.forward_features(images)
        prefix = self._layout.prefix
        cls = out[:, 0] if self.spec.has_cls else None
        if out.ndim == 3:
            return cls, out[:, prefix:].unflatten(1, grid)
        return cls, out if self._layout.channels_last else out.permute(0, 2, 3, 1)

    def _pool(self, features: tuple[torch.Tensor | None, torch.Tensor], tap: Tap) -> Features:
        cls, patches = features
        mean = patches.mean(dim=(1, 2))
        if tap.norm and isinstance(getattr(self.model, "fc_norm", None), nn.LayerNorm):
            mean = self.model.fc_norm(mean)
        return Features(cls=cls, patches=patches, mean=mean)


# ------------------------------------------------------------------------------------------- pixels


class PixelEncoder:
    """No network at all: the control that a representation has to beat.

    The feature of a patch is the patch itself, average-pooled to 8x8 RGB (D = 192); the global feature is
    the whole image pooled to 8x8 RGB. Images come normalised, with ImageNet's mean and deviation.
    """

    def __init__(self, patch_size: int = 16, image_size: int = 224) -> None:
        if patch_size < 1:
            raise CheckpointError(f"pixels: the patch size must be positive, got {patch_size}")
        self.spec = EncoderSpec(
            family="pixels",
            arch={"builder": "pixels", "cells": _PIXEL_CELLS},
            embed_dim=3 * _PIXEL_CELLS**2,
            depth=1,
            patch_size=patch_size,
            image_size=max(1, round(image_size / patch_size)) * patch_size,
            pooling="mean",
            has_cls=False,
        )
        self.info = CheckpointInfo(
            source="pixels",
            sha256=None,
            format="pixels",
            container="",
            parameters=0,
            loaded_tensors=0,
            encoder_tensors=0,
            notes=("raw pixels, a control without parameters",),
        )
        self.fingerprint = weights_fingerprint({}, self.spec)
        self._device = torch.device("cpu")

    def to(self, device: str | torch.device) -> PixelEncoder:
        """Choose the device; returns self."""
        self._device = torch.device(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        images: torch.Tensor,
        taps: Sequence[Tap] = (Tap(),),
        pos_interpolation: PosInterpolation | None = None,
    ) -> dict[Tap, Features]:
        """Pixels of (B, 3, H, W); every tap is the same."""
        check_taps(taps, self.spec)
        grid = check_images(images, self.spec)
        images = images.to(self._device)
        pooled = F.adaptive_avg_pool2d(images, _PIXEL_CELLS).flatten(1)
        patch = self.spec.patch_size
        cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
        cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (B*h*w, 3, p, p)
        cells = F.adaptive_avg_pool2d(cut, _PIXEL_CELLS).reshape(len(images), *grid, -1)
        features = Features(cls=None, patches=cells, mean=pooled)
        return dict.fromkeys(taps, features)


# ------------------------------------------------------------------------------------------- modules


class ModuleEncoder:
    """An ``Encoder`` around any module that offers ``embed_dim``, ``patch_size`` and ``forward_features``.

    ``forward_features(images)`` returns a map (B, D, h, w), or tokens (B, prefix + h*w, D) with the class
    token first where ``num_prefix_tokens`` says that there are any, or a dict with ``patches`` (B, h, w, D)
    or (B, h*w, D) and optionally ``cls`` (B, D). The spec's other fields (``image_size``, ``mean``, ``std``,
    ``interpolation``, ``crop_pct``, ``pooling``) are taken from attributes of the module where it has them.
    Only the last layer can be read; ``norm`` is the module's own business.
    """

    def __init__(self, module: Any, source: str) -> None:
        missing = [
            name for name in ("embed_dim", "patch_size", "forward_features") if not hasattr(module, name)
        ]
        if missing:
            raise CheckpointError(
                f"{source}: {type(module).__name__} lacks {', '.join(missing)}; a factory returns an "
                "Encoder, a timm model, or a module with embed_dim, patch_size and forward_features(images)"
            )
        self.model: Any = module.eval().requires_grad_(False)
        self._prefix = int(getattr(module, "num_prefix_tokens", 0))
        optional = ("image_size", "mean", "std", "interpolation", "crop_pct", "pooling")
        given: dict[str, Any] = {name: getattr(module, name) for name in optional if hasattr(module, name)}
        has_cls = bool(getattr(module, "has_cls", self._prefix > 0))
        pooling: Pooling = "cls" if has_cls else "mean"
        fields = {"image_size": 224, "pooling": pooling, **given}
        self.spec = EncoderSpec(
            family="module",
            arch={"builder": "module", "class": f"{type(module).__module__}.{type(module).__qualname__}"},
            embed_dim=int(self.model.embed_dim),
            depth=1,
            patch_size=int(self.model.patch_size),
            has_cls=has_cls,
            **fields,
        )
        self.info = module_info(module, source)
        self.fingerprint = weights_fingerprint(module.state_dict(), self.spec)
        self._device = torch.device("cpu")

    def to(self, device: str | torch.device) -> ModuleEncoder:
        """Move to a device; returns self."""
        self.model.to(device)
        self._device = torch.device(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        images: torch.Tensor,
        taps: Sequence[Tap] = (Tap(),),
        pos_interpolation: PosInterpolation | None = None,
    ) -> dict[Tap, Features]:
        """Encode (B, 3, H, W); see ``Encoder``. Raises TaskError for features of another shape."""
        check_taps(taps, self.spec)
        grid = check_images(images, self.spec)
        cls, patches = self._split(self.model.forward_features(images.to(self._device)), grid)
        expected = (len(images), *grid, self.spec.embed_dim)
        if tuple(patches.shape) != expected or (cls is None and self.spec.has_cls):
            raise TaskError(
                f"{self.spec.arch['class']}.forward_features gave patches of shape {tuple(patches.shape)}, "
                f"expected {expected}" + (" and a class token" if self.spec.has_cls else "")
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
