"""Plain vision transformers: how one is declared, and built from its declaration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field, ValidationError, model_validator
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from .errors import CheckpointError, first_problem
from .random_state import borrowed_state
from .types import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Frozen, Interpolation, Pooling, PosInterpolation

_ACTIVATIONS = {"gelu": torch.nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}


class VitArch(Frozen):
    """What decides the shape and the arithmetic of a plain vision transformer (``EncoderSpec.arch``)."""

    builder: Literal["vit"] = "vit"
    embed_dim: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    image_size: int = Field(gt=0)
    """Side of the image that the stored position table was made for."""
    mlp_ratio: float = Field(4.0, gt=0)
    class_token: bool = True
    reg_tokens: int = Field(0, ge=0)
    no_embed_class: bool = False
    """The position table covers the patches only, not the class and register tokens."""
    qkv_bias: bool = True
    init_values: float | None = None
    """Initial layer scale; None means that there is no layer scale."""
    eps: float = Field(1e-6, gt=0)
    fc_norm: bool = False
    """The norm comes after mean pooling, in place of the norm of all tokens."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    swiglu: bool = False
    """The MLP is a SwiGLU, gate first; ``mlp_ratio`` counts gate and value together."""
    pre_norm: bool = False
    """A norm before the first block, and no bias in the patch embedding (CLIP)."""
    map_pool: bool = False
    """The global token is an attention pooling over all tokens after the final norm (SigLIP)."""

    @property
    def timm_ratio(self) -> float:
        """``mlp_ratio`` as timm takes it."""
        return ratio_of(round(self.embed_dim * self.mlp_ratio), self.embed_dim)

    @model_validator(mode="after")
    def _divides(self) -> VitArch:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        return self


def vit_spec(
    family: str,
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    patch_size: int = 16,
    image_size: int = 224,
    mlp_ratio: float = 4.0,
    class_token: bool = True,
    reg_tokens: int = 0,
    no_embed_class: bool = False,
    qkv_bias: bool = True,
    init_values: float | None = None,
    eps: float = 1e-6,
    fc_norm: bool = False,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu",
    swiglu: bool = False,
    pre_norm: bool = False,
    map_pool: bool = False,
    pooling: Pooling | None = None,
    final_norm: bool = True,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    interpolation: Interpolation = "bicubic",
    crop_pct: float = 0.875,
    pos_interpolation: PosInterpolation = "timm",
) -> EncoderSpec:
    """The spec of a plain vision transformer; see ``VitArch`` for the fields that shape it.

    ``pooling`` is ``cls`` unless given, or ``mean`` where there is no global token or a norm of the mean.

    Raises:
        CheckpointError: the numbers do not go together.
    """
    try:
        arch = VitArch(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            image_size=image_size,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            reg_tokens=reg_tokens,
            no_embed_class=no_embed_class,
            qkv_bias=qkv_bias,
            init_values=init_values,
            eps=eps,
            fc_norm=fc_norm,
            activation=activation,
            swiglu=swiglu,
            pre_norm=pre_norm,
            map_pool=map_pool,
        )
    except ValidationError as error:
        raise CheckpointError(f"not a vision transformer: {first_problem(error)}") from error
    return EncoderSpec(
        family=family,
        arch=arch.model_dump(),
        embed_dim=embed_dim,
        depth=depth,
        patch_size=patch_size,
        image_size=image_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=crop_pct,
        pooling=pooling or ("cls" if (class_token or map_pool) and not fc_norm else "mean"),
        final_norm=final_norm,
        has_cls=class_token or map_pool,
        pos_interpolation=pos_interpolation,
    )


def build_vit(arch: Mapping[str, Any], device: str = "cpu") -> VisionTransformer:
    """The timm ``VisionTransformer`` without a head that ``EncoderSpec.arch`` describes.

    On device ``meta`` the parameters have shapes but no values, so that what a checkpoint does not fill
    cannot be scored by mistake. The global random state is left as it was.

    Raises:
        CheckpointError: ``arch`` has an unknown or missing field, or numbers that do not go together.
    """
    try:
        vit = VitArch.model_validate(dict(arch))
    except ValidationError as error:
        raise CheckpointError(
            f"the architecture is not a plain vision transformer: {first_problem(error)}"
        ) from error
    return _construct(vit, device)


def _global_pool(vit: VitArch) -> Literal["map", "token", "avg"]:
    if vit.map_pool:
        return "map"
    return "token" if vit.class_token and not vit.fc_norm else "avg"


def ratio_of(hidden: int, dim: int) -> float:
    """The ratio from which timm's ``int(dim * ratio)`` gives the hidden width, and not one less."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _construct(vit: VitArch, device: str) -> VisionTransformer:
    with borrowed_state():
        return VisionTransformer(
            img_size=vit.image_size,
            patch_size=vit.patch_size,
            num_classes=0,
            global_pool=_global_pool(vit),
            embed_dim=vit.embed_dim,
            depth=vit.depth,
            num_heads=vit.num_heads,
            mlp_ratio=vit.timm_ratio,
            qkv_bias=vit.qkv_bias,
            init_values=vit.init_values,
            class_token=vit.class_token,
            no_embed_class=vit.no_embed_class,
            reg_tokens=vit.reg_tokens,
            fc_norm=vit.fc_norm,
            pre_norm=vit.pre_norm,
            act_layer=torch.nn.SiLU if vit.swiglu else _ACTIVATIONS[vit.activation],
            # A partial class, which timm's annotation does not foresee.
            mlp_layer=cast("type[torch.nn.Module]", SwiGLUPacked if vit.swiglu else Mlp),
            norm_layer=partial(torch.nn.LayerNorm, eps=vit.eps),
            device=device,
        )
