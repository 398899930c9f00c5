"""The official MAE and Latent MIM: their model of our recipe, their step, and whether ours does the same."""

from __future__ import annotations

import contextlib
import io
import math
import re
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _patches import current_libraries, import_from, spied, their_precision
from _peer_code import git_blob
from timm.optim import param_groups_weight_decay
from torch import nn

from lmim_bench.bench.errors import LmimBenchError
from lmim_bench.pretrain.masking import Masks
from lmim_bench.pretrain.recipe import Recipe
from lmim_bench.pretrain.schedules import momentum
from lmim_bench.pretrain.step import Fed, initial_model

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
_IMAGES = 4
_AIM = 0.5
"""Of the similarity constraint, where the two are compared."""

Tensors = dict[str, torch.Tensor]


class Arguments(dict[str, Any]):
    """Options as the official code reads them: by attribute, and as a mapping."""

    __getattr__ = dict.__getitem__


class Official(ABC):
    """An official repository: how its model is built, named and stepped.

    Attributes:
        model_module: its file identifies the version.
        engine_module: the one with ``train_one_epoch``.
        names: their names of tensors as patterns, and ours; the first that matches counts.
        gains_fused_attention: whether its blocks are timm's, which fuses attention only since then.
    """

    folder: str
    repository: str
    model_module: str
    engine_module: str
    names: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
    gains_fused_attention = False

    def __init__(self, peers: Path) -> None:
        self.root = peers / self.folder
        with current_libraries():
            self.models, self.engine = import_from(self.root, self.model_module, self.engine_module)

    @classmethod
    def lies_in(cls, peers: Path) -> bool:
        return (peers / cls.folder / f"{cls.model_module}.py").is_file()

    @abstractmethod
    def build(self, recipe: Recipe) -> nn.Module:
        """Their model of our recipe."""

    @abstractmethod
    def forward(self, model: nn.Module, images: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, Fed]:
        """Their loss, the target moved first, and what ours has to be fed to do the same."""

    @abstractmethod
    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        """Parameter groups as in their main file."""

    @abstractmethod
    def arguments(self, recipe: Recipe) -> Arguments:
        """What ``train_one_epoch`` reads from its command line."""

    def rename(self, theirs: Mapping[str, torch.Tensor], patch: int) -> Tensors:
        """Their tensors under our names and in our shapes."""
        ours = {}
        for name, value in theirs.items():
            if name.startswith("decoder") and "pos_embed" in name:
                continue  # computed on our side, not stored
            matching = (re.subn(pattern, put, name, count=1) for pattern, put in self.names)
            renamed = next(new for new, hits in matching if hits)
            if renamed.endswith("pos_embed") and value.ndim == 2:
                value = value[None]
            if renamed.endswith("patch_embed.proj.weight") and value.ndim == 2:  # a map of flat patches
                value = value.reshape(len(value), patch, patch, 3).permute(0, 3, 1, 2)
            ours[renamed] = value
        return ours

    def version(self) -> dict[str, str | None]:
        """The commit, which a plain copy (or a machine without git) does not know, and git's hash of the
        model's file.
        """
        commit = None
        if (self.root / ".git").exists():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                changed = self._git("status", "--porcelain", "--untracked-files=no")
                commit = self._git("rev-parse", "HEAD") + ("-dirty" if changed else "")
        blob = git_blob(self.root / f"{self.model_module}.py")
        return {"repository": self.repository, "commit": commit, "model_blob": blob}

    def _git(self, *args: str) -> str:
        command = ["git", "-C", str(self.root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class OfficialMae(Official):
    folder, repository = "mae", "facebookresearch/mae"
    model_module, engine_module = "models_mae", "engine_pretrain"
    gains_fused_attention = True
    names = (
        ("^decoder_pred", "decoder.head"),
        ("^decoder_", "decoder."),
        ("^mask_token", "decoder.mask_token"),
        ("^", "encoder.vit."),
    )

    def build(self, recipe: Recipe) -> nn.Module:
        width, depth, heads = recipe.model.shape
        model: nn.Module = self.models.MaskedAutoencoderViT(
            img_size=recipe.data.image_size,
            patch_size=recipe.model.patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            decoder_embed_dim=recipe.decoder.width,
            decoder_depth=recipe.decoder.depth,
            decoder_num_heads=recipe.decoder.num_heads,
            norm_pix_loss=recipe.target.norm_pixels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        return model

    def forward(self, model: nn.Module, images: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, Fed]:
        with spied(model, "random_masking") as drawn:
            loss = model(images, _mask_ratio(recipe))[0]
        _, mask, inverse = drawn[0]
        order, seen = inverse.argsort(dim=1), int((mask[0] == 0).sum())
        return loss, Fed(images, None, Masks(order[:, :seen], order[:, None, seen:]))

    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        return list(param_groups_weight_decay(model, decay))

    def arguments(self, recipe: Recipe) -> Arguments:
        return Arguments(
            accum_iter=1,
            mask_ratio=_mask_ratio(recipe),
            lr=recipe.learning_rate,
            min_lr=0.0,
            warmup_epochs=40,
            epochs=800,
        )


def _mask_ratio(recipe: Recipe) -> float:
    """The ratio that leaves exactly our number of visible patches, however it is rounded."""
    return 1 - (recipe.visible_patches + 0.5) / recipe.grid**2


def _projector_name(match: re.Match[str]) -> str:
    """Theirs counts linear maps and norms apart (linear0, norm0, linear1), ours all layers, the GELUs too."""
    side, kind, number = match.groups()
    return f"{side}.projector.{3 * int(number) + (kind == 'norm')}."


class OfficialLatentMim(Official):
    folder, repository = "LatentMIM", "yibingwei-1/LatentMIM"
    model_module, engine_module = "models_lmim", "main_lmim"
    names = (
        (r"^decoder\.cls_token", "decoder.query_token"),
        (r"^decoder\.", "decoder."),
        (r"^(\w+)\.pos_embed\.pos_embeds", r"\1.vit.pos_embed"),
        (r"^(\w+)\.embed\.", r"\1.vit.patch_embed."),
        (r"^(\w+)\.head\.(linear|norm)(\d+)\.", _projector_name),
        (r"^(\w+)\.", r"\1.vit."),
    )

    def build(self, recipe: Recipe) -> nn.Module:
        width, depth, heads = recipe.model.shape
        model: nn.Module = self.models.LMIM(
            grid_size=recipe.grid,
            patch_size=recipe.model.patch_size,
            patch_gap=recipe.masking.gap,
            embed_dim=width,
            num_heads=heads,
            depth=depth,
            target_depth=depth,
            decoder_embed_dim=recipe.decoder.width,
            decoder_depth=recipe.decoder.depth,
            decoder_num_heads=recipe.decoder.num_heads,
            tau=recipe.objective.tau,
            num_vis=recipe.visible_patches,
            avg_vis_mask_token=recipe.decoder.cues,
            avg_sim_coeff=recipe.objective.similarity_weight,
            loss="infonce_patches",
            freeze_pe=True,
            proj_cfg=Arguments(mlp_dim=recipe.projector.hidden_dim, mlp_depth=recipe.projector.depth),
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        return model

    def forward(self, model: nn.Module, images: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, Fed]:
        with spied(torch, "randint") as places, spied(model, "create_views") as views:
            loss = model(images, mom=momentum(recipe.target, 0.0), sim_trg=_AIM, update_ema=True)[0]
        offsets = torch.stack([p.flatten(1) for p in places], dim=-1) if places else None
        _, visible, _, _, hidden = views[0]
        return loss, Fed(images, offsets, Masks(visible, hidden[:, None]))

    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        names = [name for name, _ in model.named_parameters()]
        free = [name for name in names if any(part in name for part in ("bias", "norm", "embed"))]
        return list(param_groups_weight_decay(model, decay, no_weight_decay_list=free))

    def arguments(self, recipe: Recipe) -> Arguments:
        return Arguments(
            accum_iter=1,
            lr=recipe.learning_rate,
            min_lr_frac=0.25,
            warmup_epochs=30,
            epochs=300,
            target_mom=recipe.target.momentum,
            sim_init=recipe.objective.similarity_start,
            sim_end=recipe.objective.similarity_end,
            log=Arguments(print_freq=20, use_wandb=False),
            env=Arguments(rank=0),
        )


OFFICIAL: dict[str, type[Official]] = {"mae": OfficialMae, "latent-mim": OfficialLatentMim}


class Theirs:
    """Their ``train_one_epoch`` on batches that are already on the device."""

    def __init__(
        self, official: Official, recipe: Recipe, images: torch.Tensor, precision: str, fused: bool = True
    ) -> None:
        self.label = official.repository + ("" if fused else ", attention not fused, as published")
        self.engine, self.images, self.precision = official.engine, images, precision
        self.arguments = official.arguments(recipe)
        with current_libraries(), their_precision(images.device, precision):
            self.model = official.build(recipe).to(images.device)
            if not fused:
                for block in (*self.model.blocks, *self.model.decoder_blocks):
                    block.attn.fused_attn = False
            groups = official.groups(self.model, recipe.optim.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
            self.scaler = self.engine.misc.NativeScalerWithGradNormCount()

    def block(self, steps: int) -> None:
        device, batches = self.images.device, [(self.images, None)] * steps
        with (
            current_libraries(),
            their_precision(device, self.precision),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            self.engine.train_one_epoch(
                self.model, batches, self.optimizer, device, 0, self.scaler, args=self.arguments
            )


@dataclass(frozen=True)
class Agreement:
    """Both sides on the same weights, images and masks, in fp32.

    Attributes:
        gradients_apart: length of the difference of the gradients over the length of theirs; infinite where
            not the same tensors have one.
    """

    loss_ours: float
    loss_theirs: float
    gradients_apart: float

    @property
    def losses_apart(self) -> float:
        return abs(self.loss_ours - self.loss_theirs)

    @property
    def good(self) -> bool:
        return self.losses_apart <= LOSS_TOLERANCE and self.gradients_apart <= GRADIENT_TOLERANCE


def check(official: Official, recipe: Recipe) -> Agreement:
    """Give our model the weights of theirs and compare losses and gradients; on the CPU, where fp32 is fp32.

    Raises:
        LmimBenchError: theirs shows another number of patches.
    """
    torch.manual_seed(0)
    images = torch.randn(_IMAGES, 3, recipe.crop_size, recipe.crop_size)
    patch = recipe.model.patch_size
    with current_libraries(), their_precision(torch.device("cpu"), "fp32"):
        theirs, ours = official.build(recipe), initial_model(recipe)
        target = getattr(theirs, "target_encoder", None)
        if target is not None:  # else a target that is mistaken for the online encoder would go unnoticed
            for parameter in target.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        ours.load_state_dict(official.rename(theirs.state_dict(), patch), strict=True)
        loss_theirs, fed = official.forward(theirs, images, recipe)
        loss_theirs.backward()  # type: ignore[no-untyped-call]
    seen = fed.masks.visible.shape[1]
    if seen != recipe.visible_patches:
        raise LmimBenchError(f"{official.repository} shows {seen} patches, ours {recipe.visible_patches}")
    ours.update_target(momentum(recipe.target, 0.0))
    loss_ours = ours(*fed, _AIM).loss
    loss_ours.backward()
    apart = _apart(_gradients(ours), official.rename(_gradients(theirs), patch))
    return Agreement(loss_ours.item(), loss_theirs.item(), apart)


def _gradients(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _apart(ours: Tensors, theirs: Tensors) -> float:
    if ours.keys() != theirs.keys():
        return math.inf
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return math.sqrt(difference / sum(float(x.double().square().sum()) for x in theirs.values()))
