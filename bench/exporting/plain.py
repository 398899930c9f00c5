"""What all layouts start from: a plain vision transformer, its weights, and what a layout must refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from ..backbones import ViTEncoder, resample_positions
from ..errors import CheckpointError
from ..vit import VitArch, build_vit

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Draft:
    """The content of an export: weights, JSON files by their names, the line that loads them, notes."""

    state: State
    files: Mapping[str, Mapping[str, Any]]
    how_to_load: str
    notes: tuple[str, ...] = ()


def plain_state(encoder: ViTEncoder, *, class_row: bool = False) -> State:
    """The weights without a classifier, positions for the spec's image size, each in memory of its own.

    ``class_row`` puts a zero row before positions that cover the patches only. That is exact: to such a
    class token nothing is added.
    """
    model, side = encoder.model, encoder.spec.image_size // encoder.spec.patch_size
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    table = model.pos_embed
    rows = table[:, :prefix]
    if class_row and model.no_embed_class:
        rows = table.new_zeros(1, 1, table.shape[-1])
    grid = (side, side)
    body = resample_positions(table[:, prefix:], tuple(model.patch_embed.grid_size), grid, "timm")
    state["pos_embed"] = torch.cat([rows, body.to(table.dtype)], dim=1)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def plain_arch(model: Any, image_size: int) -> VitArch:
    """What a timm ``VisionTransformer`` is built of, where nothing in it goes beyond ``VitArch``.

    Raises:
        CheckpointError: something does: another activation, norms of queries and keys, a norm before the
            blocks. Its weights would load elsewhere and give other features.
    """
    for i, block in enumerate(model.blocks):
        kinds = (type(block), *(type(getattr(block, part, None)) for part in ("attn", "mlp")))
        if kinds != (Block, Attention, Mlp):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(f"block {i} is not that of a plain vision transformer ({names})")
    arch = arch_of(model, image_size)
    found, plain = arithmetic_parts(model), arithmetic_parts(build_vit(arch.model_dump(), device="meta"))
    for name in sorted({**found, **plain}, key=plain.__contains__):  # what a plain one lacks says most
        if found.get(name) != plain.get(name):
            raise CheckpointError(
                f"its {name} is {found.get(name, 'absent')}, which in a plain vision transformer is "
                f"{plain.get(name, 'absent')}"
            )
    return arch


def arch_of(model: Any, image_size: int) -> VitArch:
    """The fields of ``VitArch`` of a model of timm's usual blocks."""
    first = model.blocks[0]
    return VitArch(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=first.attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
        image_size=image_size,
        mlp_ratio=first.mlp.fc1.out_features / model.embed_dim,
        class_token=model.has_class_token,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=model.no_embed_class,
        qkv_bias=first.attn.qkv.bias is not None,
        init_values=None if isinstance(first.ls1, nn.Identity) else 1e-5,
        eps=getattr(first.norm1, "eps", 1e-6),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
    )


def arithmetic_parts(model: nn.Module) -> dict[str, str]:
    """The modules that decide the arithmetic of the features in evaluation mode, each with its settings."""
    return {
        name: f"{type(part).__name__}({getattr(part, 'num_heads', None) or part.extra_repr()})"
        for name, part in model.named_modules()
        if name and name != "head" and not isinstance(part, nn.Identity | nn.Dropout | DropPath)
    }


def require(what: Mapping[str, bool], layout: str) -> None:
    """Raise CheckpointError where anything of ``what`` is true: the layout has no place for it."""
    if beyond := [name for name, true in what.items() if true]:
        raise CheckpointError(f"{layout} knows no {', no '.join(beyond)}; use the format timm")


def keywords(args: Mapping[str, Any]) -> str:
    """Keyword arguments as Python writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in args.items())
