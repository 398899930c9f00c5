"""Encoders around columns of transformer blocks, and what every encoder checks and hashes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .errors import TaskError
from .types import CheckpointInfo, EncoderSpec, Features, PosInterpolation, Tap

if TYPE_CHECKING:
    from typing_extensions import Self
_MAX_TABLES = 32
Grid = tuple[int, int]


def resample_positions(table: torch.Tensor, old: Grid, new: Grid, method: PosInterpolation) -> torch.Tensor:
    """Position embeddings of another grid.

    Args:
        table: embeddings of the patches, (1, old_h * old_w, D).
        old: the grid of the table, rows first.
        new: the wanted grid, rows first.
        method: ``timm`` and ``antialias`` are bicubic to the new size with antialias, as timm (at run time)
            and DINOv2 with registers do; ``bicubic`` is the same without antialias (MAE, DeiT, the ViT of
            transformers). ``dino`` is bicubic without antialias by the scale factor
            (new + 0.1) / old, which is also the scale of the sampling positions (DINO,
            ``interpolate_pos_encoding``): it differs from a resize to the new size.

    Returns:
        (1, new_h * new_w, D), float32; the table itself where the grids agree.
    """
    if old == new:
        return table.float()
    dim = table.shape[-1]
    image = table.float().reshape(1, *old, dim).permute(0, 3, 1, 2)
    if method == "dino":
        scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    else:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=method != "bicubic")
    if image.shape[-2:] != new:
        raise TaskError(
            f"position embeddings cannot be resampled from {old} to {new} by the rule {method!r}; "
            "use another interpolation or another image size"
        )
    return image.permute(0, 2, 3, 1).reshape(1, -1, dim)


def weights_fingerprint(state: Mapping[str, torch.Tensor], spec: EncoderSpec) -> str:
    """SHA-256 over the spec and every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_taps(taps: Sequence[Tap], spec: EncoderSpec) -> None:
    """Raise TaskError where a tap names a layer that the encoder does not have."""
    for tap in taps:
        if not -spec.depth <= tap.layer <= -1:
            raise TaskError(
                f"layer {tap.layer} does not exist: this {spec.family} encoder offers -1 (last) "
                f"to {-spec.depth} (first)"
            )


def check_images(images: torch.Tensor, spec: EncoderSpec) -> Grid:
    """The patch grid (h, w) of a batch (B, 3, H, W); raises TaskError where the patches do not fit."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise TaskError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    patch = spec.patch_size
    if height % patch or width % patch or not height or not width:
        raise TaskError(
            f"an image of {height}x{width} cannot be cut into patches of {patch}x{patch} pixels; "
            f"height and width must be multiples of {patch}"
        )
    return height // patch, width // patch


class BaseEncoder(ABC):
    """What every encoder does around its own arithmetic: hold spec and weights, check taps and images."""

    positions_of: str | None = None
    """The library by whose rule alone positions are resampled, where the spec's rule is the only one."""

    def __init__(self, model: nn.Module | None, spec: EncoderSpec, info: CheckpointInfo) -> None:
        # timm's models have attributes that their common type does not declare.
        self.model: Any = None if model is None else model.eval().requires_grad_(False)
        self.spec = spec
        self.info = info
        self.fingerprint = weights_fingerprint({} if model is None else model.state_dict(), spec)
        parameter = None if model is None else next(model.parameters(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    def to(self, device: str | torch.device) -> Self:
        """Move to a device; returns self."""
        if self.model is not None:
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
        method = pos_interpolation or self.spec.pos_interpolation
        if method not in get_args(PosInterpolation):
            raise TaskError(
                f"there is no rule {method!r} for positions; {', '.join(get_args(PosInterpolation))}"
            )
        return self._encode(images.to(self._device), taps, grid, method)

    @abstractmethod
    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        """Features of checked images on the encoder's device."""


class ColumnEncoder(BaseEncoder):
    """Blocks of one width one after another, read at any of them in one pass that ends after the deepest.

    A subclass says how images become tokens (prefix tokens first, then the patches row by row), what a
    block does, and what the final norm and the global token are.
    """

    n_prefix = 0
    """Number of tokens before those of the patches."""

    @abstractmethod
    def _embed(self, images: torch.Tensor, grid: Grid, method: PosInterpolation) -> tuple[torch.Tensor, Any]:
        """Tokens (B, prefix + h*w, D) before the first block, and what every block is given beside them."""

    @abstractmethod
    def _block(self, index: int, tokens: torch.Tensor, context: Any) -> torch.Tensor:
        """The tokens after a block."""

    def _norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """The final norm of all tokens."""
        normed: torch.Tensor = self.model.norm(tokens)
        return normed

    def _cls(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The global token (B, D), or None."""
        return tokens[:, 0] if self.spec.has_cls else None

    def _mean_norm(self, mean: torch.Tensor) -> torch.Tensor:
        """The family's own norm of the mean of the patches, where it has one."""
        return mean

    def _encode(
        self, images: torch.Tensor, taps: Sequence[Tap], grid: Grid, method: PosInterpolation
    ) -> dict[Tap, Features]:
        tokens, context = self._embed(images, grid, method)
        found: dict[Tap, Features] = {}
        depth = self.spec.depth
        last = max((depth + tap.layer for tap in taps), default=-1)
        for i in range(last + 1):
            tokens = self._block(i, tokens, context)
            for tap in taps:
                if tap.layer == i - depth and tap not in found:
                    found[tap] = self._read(tokens, tap, grid)
        return found

    def _read(self, tokens: torch.Tensor, tap: Tap, grid: Grid) -> Features:
        if tap.norm:
            tokens = self._norm(tokens)
        features = self._features(tokens, grid)
        return replace(features, mean=self._mean_norm(features.mean)) if tap.norm else features

    def _features(self, tokens: torch.Tensor, grid: Grid) -> Features:
        body = tokens[:, self.n_prefix :]
        return Features(self._cls(tokens), body.reshape(len(body), *grid, -1), body.mean(dim=1))


class NetworkEncoder(ColumnEncoder):
    """An ``Encoder`` around a network of this project (``bench.networks``), which declares its own parts."""

    def _embed(self, images: torch.Tensor, grid: Grid, method: PosInterpolation) -> tuple[torch.Tensor, Any]:
        embedded: tuple[torch.Tensor, Any] = self.model.embed(images, grid, method)
        return embedded

    def _block(self, index: int, tokens: torch.Tensor, context: Any) -> torch.Tensor:
        after: torch.Tensor = self.model.block(index, tokens, context)
        return after

    def _mean_norm(self, mean: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.norm_of_mean(mean)
        return normed

    def _features(self, tokens: torch.Tensor, grid: Grid) -> Features:
        features: Features = self.model.read(tokens, grid)
        return features


class ViTEncoder(ColumnEncoder):
    """An ``Encoder`` around a timm ``VisionTransformer``.

    It assembles the tokens by itself (patches, position table resampled to the grid at hand, class and
    register tokens), so any H and W that the patch size divides will do.
    """

    def __init__(self, model: VisionTransformer, spec: EncoderSpec, info: CheckpointInfo) -> None:
        super().__init__(model, spec, info)
        self.n_prefix = model.num_prefix_tokens
        self._tables: dict[tuple[Grid, PosInterpolation], torch.Tensor] = {}

    @staticmethod
    def supports(model: object) -> bool:
        """Whether the model is a plain ``VisionTransformer``, not one of timm's many relatives of it."""
        return (
            type(model) is VisionTransformer
            and type(model.patch_embed) is PatchEmbed
            and model.pos_embed is not None
            and len(set(model.patch_embed.patch_size)) == 1
            and len(set(model.patch_embed.img_size or ())) == 1
        )

    def to(self, device: str | torch.device) -> Self:
        """Move to a device; returns self."""
        self._tables.clear()
        return super().to(device)

    def _embed(self, images: torch.Tensor, grid: Grid, method: PosInterpolation) -> tuple[torch.Tensor, Any]:
        return self.model.norm_pre(self._tokens(images, grid, method)), None

    def _block(self, index: int, tokens: torch.Tensor, context: Any) -> torch.Tensor:
        after: torch.Tensor = self.model.blocks[index](tokens)
        return after

    def _cls(self, tokens: torch.Tensor) -> torch.Tensor | None:
        # An attention pooling stands where others have a class token.
        pool = self.model.attn_pool
        return super()._cls(tokens) if pool is None else pool(tokens)

    def _mean_norm(self, mean: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.model.fc_norm(mean)
        return normed

    def _tokens(self, images: torch.Tensor, grid: Grid, method: PosInterpolation) -> torch.Tensor:
        model = self.model
        embed = model.patch_embed
        patches: torch.Tensor = embed.norm(embed.proj(images).flatten(2).transpose(1, 2))  # (B, h*w, D)
        table = self._table(grid, method)
        covers_prefix = not model.no_embed_class
        n_prefix = model.num_prefix_tokens
        patches = patches + table[:, n_prefix if covers_prefix else 0 :]
        if not n_prefix:
            return patches
        prefix = torch.cat([t for t in (model.cls_token, model.reg_token) if t is not None], dim=1)
        if covers_prefix:
            prefix = prefix + table[:, :n_prefix]
        return torch.cat([prefix.expand(len(images), -1, -1).to(patches.dtype), patches], dim=1)

    def _table(self, grid: Grid, method: PosInterpolation) -> torch.Tensor:
        """The position table for a grid, prefix rows first where it has them; kept for the next batch."""
        key = (grid, method)
        if key not in self._tables:
            model = self.model
            n_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            prefix, body = model.pos_embed[:, :n_prefix], model.pos_embed[:, n_prefix:]
            body = resample_positions(body, tuple(model.patch_embed.grid_size), grid, method)
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            self._tables[key] = torch.cat([prefix.float(), body], dim=1)
        return self._tables[key]
