"""Encoders around any model of timm: transformers read at every block, the others at their last stage."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from torch import nn

from .backbones import BaseEncoder, Grid, ViTEncoder
from .errors import CheckpointError, TaskError, first_line
from .random_state import borrowed_state
from .types import CheckpointInfo, Encoder, EncoderSpec, Features, PosInterpolation, Tap

if TYPE_CHECKING:
    from typing_extensions import Self

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


def create_timm(name: str, *, pretrained: bool, seed: int = 0, **kwargs: Any) -> Any:
    """Create a timm model without its classifier, with the global random state left as it was.

    Models that can take images of any size are built so; the plain ViT needs no such switch here.

    Raises:
        CheckpointError: timm has no such model, or its pretrained weights cannot be had.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() names them"
        raise CheckpointError(f"timm {timm.__version__} has no model {name!r}; {hint}")

    def make(**extra: Any) -> Any:
        with borrowed_state(seed):
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs, **extra)

    try:
        model = make()
        if not ViTEncoder.supports(model) and _takes(model, "dynamic_img_size", kwargs):
            model = make(dynamic_img_size=True)
    except Exception as error:
        what = "the pretrained weights of timm's" if pretrained else "timm's"
        raise CheckpointError(f"{what} {name} cannot be loaded: {_reason(error)}") from error
    return model


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return (
            "they are not on this disk, and the hub cannot be reached; load them once where it can, with the "
            "same HF_HOME (HF_HUB_OFFLINE=1 then asks no network)"
        )
    return first_line(error)


def _takes(model: nn.Module, option: str, given: Mapping[str, Any]) -> bool:
    # A derived class may hand the option on to its base by **kwargs.
    inits = (inspect.signature(base).parameters for base in type(model).__mro__[:3])
    return option not in given and any(option in parameters for parameters in inits)


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
        common["image_size"] = int(model.patch_embed.img_size[0])
        # An attention pooling gives the global token where a class token would.
        has_cls = bool(model.has_class_token) or model.attn_pool is not None
        return EncoderSpec(
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            patch_size=model.patch_embed.patch_size[0],
            pooling="cls" if has_cls and model.global_pool in ("token", "map") else "mean",
            has_cls=has_cls,
            **common,
        )
    layout = _Layout(model, common["image_size"])
    return EncoderSpec(
        embed_dim=layout.embed_dim,
        depth=layout.depth,
        patch_size=layout.patch_size,
        pooling="cls" if layout.has_cls and getattr(model, "global_pool", "") in ("token", "map") else "mean",
        has_cls=layout.has_cls,
        **{**common, "image_size": layout.image_size},
    )


def timm_notes(model: Any) -> tuple[str, ...]:
    """What a reader should know of how a timm model is evaluated."""
    notes = []
    mode = (getattr(model, "pretrained_cfg", None) or {}).get("crop_mode") or "center"
    if mode != "center":
        notes.append(f"timm prepares images by crop_mode={mode}; the centre crops here do not")
    pools = getattr(model, "attn_pool", None) is not None
    if pools and not ViTEncoder.supports(model) and not _Layout(model, 224).pools_by_attention:
        notes.append(
            "the attention pooling of the model is not used: the global feature is the mean of patches"
        )
    return tuple(notes)


def timm_encoder(model: Any, spec: EncoderSpec, info: CheckpointInfo) -> Encoder:
    """The encoder around a timm model: exact token assembly for a plain ViT, timm's own for the others."""
    return ViTEncoder(model, spec, info) if ViTEncoder.supports(model) else TimmEncoder(model, spec, info)


class _Layout:
    """How the features of a timm model are laid out, found by one pass of a blank image."""

    def __init__(self, model: Any, image_size: int) -> None:
        name = type(model).__name__
        image_size = _own_size(model) or image_size
        infos = getattr(model, "feature_info", None)
        stride = 0 if not infos or _own_size(model) else int(infos[-1]["reduction"])
        if stride and image_size % stride:
            # A padded border would be taken for a part of the patches: the next size without one.
            image_size = -(-image_size // stride) * stride
        self.image_size = image_size
        model.eval()
        with torch.inference_mode():
            try:
                out = model.forward_features(torch.zeros(1, 3, image_size, image_size))
            except Exception as error:
                raise CheckpointError(
                    f"{name} gives no patch features: forward_features failed ({first_line(error)})"
                ) from error
        if not isinstance(out, torch.Tensor) or out.ndim not in (3, 4):
            raise CheckpointError(f"{name} gives no patch features: forward_features returns no feature map")
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.has_cls = getattr(model, "cls_token", None) is not None and self.prefix > 0
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
        if grid < 2 or image_size % grid:
            raise CheckpointError(f"{name} gives no map of patches ({grid}x{grid} for {image_size} pixels)")
        self.patch_size = image_size // grid
        self.columnar = out.ndim == 3 and _is_columnar(model, infos, self.embed_dim)
        # The output stands where others have a class token, as in ``ViTEncoder``.
        self.pools_by_attention = self.columnar and getattr(model, "attn_pool", None) is not None
        self.has_cls |= self.pools_by_attention
        self.depth = len(infos) if self.columnar and infos is not None else 1


def _own_size(model: Any) -> int | None:
    """The side of the images that the model was built for, where it says so."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return int(size[0]) if size else None


def _is_columnar(model: Any, infos: Any, width: int) -> bool:
    """Blocks of one width that can all be read: the depth of the encoder is then the number of blocks."""
    if not infos or not hasattr(model, "forward_intermediates"):
        return False
    takes_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    norm = getattr(model, "norm", None)
    known_norm = isinstance(norm, nn.Identity | nn.LayerNorm) or type(norm).__name__.startswith("RmsNorm")
    return takes_prefix and known_norm and all(i["num_chs"] == width for i in infos)


def _norm_of_mean(model: Any, width: int) -> Any:
    """The norm that a model applies after pooling: ``fc_norm`` of transformers, ``head.norm`` of ConvNeXt.

    One of another width belongs to a layer of the classifier.
    """
    norm = getattr(model, "fc_norm", None)
    if isinstance(norm, nn.LayerNorm):
        return norm
    norm = getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (width,):
        return None
    # ConvNeXt's is written for maps (B, D, 1, 1); on vectors it is the layer norm of the same weights.
    return lambda mean: F.layer_norm(mean, mean.shape[-1:], norm.weight, norm.bias, norm.eps)


class TimmEncoder(BaseEncoder):
    """An ``Encoder`` around any timm model that gives a map of features.

    Transformers of one width (EVA, BEiT, DeiT and their like) are read at any block. Convolutional and
    hierarchical networks are read at their last stage, after the model's own last norm: depth is 1, and
    ``norm=False`` gives the same map. Sizes other than the native one work where timm's model takes them.
    """

    def __init__(self, model: nn.Module, spec: EncoderSpec, info: CheckpointInfo) -> None:
        super().__init__(model, spec, info)
        self._layout = _Layout(model, spec.image_size)
        self._mean_norm = _norm_of_mean(model, self._layout.embed_dim)
        self._resized: tuple[Grid, Any] | None = None
        self.positions_of = None if getattr(model, "pos_embed", None) is None else "timm"

    def to(self, device: str | torch.device) -> Self:
        """Move to a device; returns self."""
        self._resized = None
        return super().to(device)

    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        size = self._layout.image_size
        native = all(n * self.spec.patch_size == size for n in grid)
        name = type(self.model).__name__
        timms = method in ("timm", "antialias")
        if not timms and not native and self.positions_of:
            raise TaskError(
                f"{name} resamples its position embeddings by timm's rule; {method!r} is not available"
            )
        try:
            model = self.model if native else self._at_size(grid)
            return self._read(model, images, taps, grid)
        except (AssertionError, RuntimeError, IndexError, ValueError) as error:
            if native or isinstance(error, torch.OutOfMemoryError):
                raise
            height, width = images.shape[-2:]
            raise TaskError(
                f"{name} cannot take images of {height}x{width} pixels, only {size} squared "
                f"is sure: {first_line(error)}"
            ) from error

    def _at_size(self, grid: Grid) -> Any:
        """The model for another grid: itself, or where it is built for one size a copy that timm resizes.

        The copy shares all weights but the tables that are resized, and is kept while the grid stays.
        """
        embed = getattr(self.model, "patch_embed", None)
        fixed = getattr(embed, "strict_img_size", False) and not getattr(embed, "dynamic_img_pad", False)
        if not fixed or not hasattr(self.model, "set_input_size"):
            return self.model
        if self._resized is None or self._resized[0] != grid:
            shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
            model = copy.deepcopy(self.model, shared)
            size = tuple(n * self.spec.patch_size for n in grid)
            # A window is a property of the trained network: it stays, and the map is padded to it.
            windows = inspect.signature(model.set_input_size).parameters
            keep = {"window_size": model.layers[0].blocks[0].window_size} if "window_size" in windows else {}
            model.set_input_size(img_size=size, **keep)
            self._resized = grid, model
        return self._resized[1]

    def _read(self, model: Any, images: torch.Tensor, taps: Sequence[Tap], grid: Grid) -> dict[Tap, Features]:
        if self._layout.columnar:
            return self._columnar(model, images, taps, grid)
        features = self._last_stage(model, images, grid)
        return {tap: self._pool(features, tap) for tap in taps}

    def _columnar(
        self, model: Any, images: torch.Tensor, taps: Sequence[Tap], grid: Grid
    ) -> dict[Tap, Features]:
        depth, prefix = self.spec.depth, self._layout.prefix
        layers = sorted({depth + tap.layer for tap in taps})
        maps = model.forward_intermediates(
            images,
            indices=layers,
            return_prefix_tokens=prefix > 0,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        found: dict[Tap, Features] = {}
        for layer, entry in zip(layers, maps, strict=True):
            body, head = entry if prefix else (entry, None)
            for tap in taps:
                if depth + tap.layer == layer and tap not in found:
                    tokens = body if head is None else torch.cat([head, body], dim=1)
                    tokens = model.norm(tokens) if tap.norm else tokens
                    cls = tokens[:, 0] if self.spec.has_cls else None
                    cls = model.attn_pool(tokens) if self._layout.pools_by_attention else cls
                    found[tap] = self._pool((cls, tokens[:, prefix:].unflatten(1, grid)), tap)
        return found

    def _last_stage(
        self, model: Any, images: torch.Tensor, grid: Grid
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        out = model.forward_features(images)
        prefix = self._layout.prefix
        cls = out[:, 0] if self.spec.has_cls else None
        if out.ndim == 3:
            return cls, out[:, prefix:].unflatten(1, grid)
        return cls, out if self._layout.channels_last else out.permute(0, 2, 3, 1)

    def _pool(self, features: tuple[torch.Tensor | None, torch.Tensor], tap: Tap) -> Features:
        cls, patches = features
        mean = patches.mean(dim=(1, 2))
        if tap.norm and self._mean_norm is not None:
            mean = self._mean_norm(mean)
        return Features(cls=cls, patches=patches, mean=mean)
