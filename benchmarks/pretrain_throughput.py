"""Images per second in training: ours against the official MAE and Latent MIM code, in one process.

Theirs is their own ``train_one_epoch``, imported from checkouts that the user brings (``--peers``); none of
it is copied here. What their code needs to run beside current libraries is patched while it runs and printed.
Nothing is timed before both are shown to compute the same losses and gradients from the same weights, images
and masks. See README.md beside this file.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import importlib.util
import io
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import click
import numpy as np
import timm.models.vision_transformer
import torch
from timm.layers import use_fused_attn
from timm.optim import param_groups_weight_decay
from torch import nn

from lmim_bench.bench.engine import resolve_device
from lmim_bench.bench.environment import environment
from lmim_bench.bench.errors import LmimBenchError
from lmim_bench.pretrain.api import pretrain
from lmim_bench.pretrain.engine import (
    attention_kernel,
    compile_blocks,
    make_fabric,
    make_optimizer,
    peak_flops,
    resolve_precision,
    set_rates,
)
from lmim_bench.pretrain.flops import training_flops
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.model import MaskedImageModel
from lmim_bench.pretrain.patches import draw_offsets
from lmim_bench.pretrain.recipe import ARCHITECTURES, Recipe, load_recipe
from lmim_bench.pretrain.schedules import between, learning_rate, momentum, weight_decay

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPES = ("mae", "latent-mim")
SMALL = (  # for a machine without a GPU: the recipes' decoder and projector would outweigh a small encoder
    "model.patch_size=8",
    "decoder.width=192",
    "decoder.num_heads=6",
    "projector.hidden_dim=768",
)
CHECKED_IMAGES = 4
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
AIM = 0.5
"""Of the similarity constraint, where the two are compared."""
DONE = 0.01
"""Share of the schedule at which steps are timed: in the warm-up of the rate, so losses stay finite."""

Tensors = dict[str, torch.Tensor]


# What is measured, and how often


@dataclass(frozen=True)
class Settings:
    device: torch.device
    batch: int
    steps: int
    repeats: int


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Speed:
    """One side of a comparison.

    Attributes:
        images_per_second: over the repeats; ``every`` holds each of them, in order.
        utilisation: our count of the matrix products, which is the same for both sides, as a share of the
            device's peak; None where the peak is not known.
        memory: peak of the allocated bytes without the other side's; None on the CPU.
    """

    images_per_second: Spread
    every: list[float]
    utilisation: float | None
    memory: int | None


class Side(Protocol):
    def block(self, steps: int) -> None:
        """Some training steps."""


# Our step


class Ours:
    """The trainer's step (``pretrain.trainer``) on images that are already cropped.

    Masks and offsets are drawn in the step: the trainer leaves that to worker processes beside a GPU, but the
    official code draws them in its own step too.
    """

    def __init__(self, recipe: Recipe, images: torch.Tensor) -> None:
        self.recipe, self.images = recipe, images
        self.fabric = make_fabric(recipe.engine)
        self.model = MaskedImageModel(recipe)
        compile_blocks(self.model, recipe.engine, self.fabric.device)
        self.wrapped = self.fabric.setup_module(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optim, fused=self.fabric.device.type == "cuda")
        self.wrapped_optimizer = self.fabric.setup_optimizers(self.optimizer)
        self.generator = torch.Generator().manual_seed(0)
        self.total: torch.Tensor | float = 0.0

    def block(self, steps: int) -> None:
        with attention_kernel(self.fabric.device):
            for _ in range(steps):
                self.step()

    def step(self) -> None:
        recipe = self.recipe
        aim = between(recipe.objective.similarity_start, recipe.objective.similarity_end, DONE, "cosine")
        rate = learning_rate(recipe.optim, recipe.learning_rate, DONE)
        set_rates(self.optimizer, rate, weight_decay(recipe.optim, DONE))
        self.model.update_target(momentum(recipe.target, DONE))
        losses = self.wrapped(self.images, *self.draw(), aim)
        self.fabric.backward(losses.loss)
        self.total = self.total + losses.loss.detach()
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)

    def draw(self) -> tuple[torch.Tensor | None, Masks]:
        recipe, batch = self.recipe, len(self.images)
        masks = draw_masks(recipe, batch, slice(0, batch), self.generator)
        offsets = None
        if recipe.masking.gap:
            places = torch.rand(batch, recipe.grid**2, 2, generator=self.generator)
            offsets = self.upload(draw_offsets(places, recipe.masking.gap))
        return offsets, Masks(*map(self.upload, masks))

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """To the device as the trainer does it: from pinned memory, without waiting."""
        device = self.fabric.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# The official code, as it is


class Official(ABC):
    """An official repository: how its model is built, named and stepped."""

    folder: str
    repository: str
    modules: tuple[str, str]
    """The module of the model, whose file identifies the version, and the one with ``train_one_epoch``."""

    def __init__(self, peers: Path) -> None:
        self.root = peers / self.folder
        with current_libraries():
            self.models, self.engine = import_from(self.root, *self.modules)

    @abstractmethod
    def build(self, recipe: Recipe) -> nn.Module:
        """Their model of our recipe."""

    @abstractmethod
    def rename(self, theirs: Mapping[str, torch.Tensor], recipe: Recipe) -> Tensors:
        """Their tensors under our names and in our shapes."""

    @abstractmethod
    def forward(
        self, model: nn.Module, images: torch.Tensor, recipe: Recipe, move_target: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, Masks]:
        """Their loss, and the offsets and masks that they drew for it."""

    @abstractmethod
    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        """Parameter groups as in their main file."""

    @abstractmethod
    def arguments(self, recipe: Recipe) -> Arguments:
        """What ``train_one_epoch`` reads from its command line."""

    def version(self) -> dict[str, str | None]:
        content = (self.root / f"{self.modules[0]}.py").read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return {"repository": self.repository, "commit": commit_of(self.root), "model_blob": blob}


class Arguments(dict[str, Any]):
    """Options as the official code reads them: by attribute, and as a mapping."""

    __getattr__ = dict.__getitem__


class OfficialMae(Official):
    folder, repository = "mae", "facebookresearch/mae"
    modules = ("models_mae", "engine_pretrain")

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

    def rename(self, theirs: Mapping[str, torch.Tensor], recipe: Recipe) -> Tensors:
        ours = {}
        for name, value in theirs.items():
            if name == "decoder_pos_embed":
                continue  # computed on our side, not stored
            if name.startswith("decoder_pred"):
                ours[name.replace("decoder_pred", "decoder.head")] = value
            elif name.startswith("decoder_"):
                ours[name.replace("decoder_", "decoder.", 1)] = value
            else:
                ours["decoder.mask_token" if name == "mask_token" else f"encoder.vit.{name}"] = value
        return ours

    def forward(
        self, model: nn.Module, images: torch.Tensor, recipe: Recipe, move_target: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, Masks]:
        with spied(model, "random_masking") as drawn:
            loss = model(images, mask_ratio(recipe))[0]
        order = drawn[0][2].argsort(dim=1)  # theirs is the inverse permutation
        seen = int((drawn[0][1][0] == 0).sum())
        return loss, None, Masks(order[:, :seen], order[:, None, seen:])

    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        return list(param_groups_weight_decay(model, decay))

    def arguments(self, recipe: Recipe) -> Arguments:
        return Arguments(
            accum_iter=1,
            mask_ratio=mask_ratio(recipe),
            lr=recipe.learning_rate,
            min_lr=0.0,
            warmup_epochs=40,
            epochs=800,
        )


class OfficialLatentMim(Official):
    folder, repository = "LatentMIM", "yibingwei-1/LatentMIM"
    modules = ("models_lmim", "main_lmim")

    def build(self, recipe: Recipe) -> nn.Module:
        width, depth, heads = recipe.model.shape
        projector = Arguments(mlp_dim=recipe.projector.hidden_dim, mlp_depth=recipe.projector.depth)
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
            proj_cfg=projector,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        return model

    def rename(self, theirs: Mapping[str, torch.Tensor], recipe: Recipe) -> Tensors:
        ours = {}
        for name, value in theirs.items():
            side, _, rest = name.partition(".")
            if side == "decoder":
                if not rest.startswith("pos_embed"):  # computed on our side, not stored
                    ours["decoder." + rest.replace("cls_token", "query_token")] = value
            else:
                place, shaped = self._encoder_tensor(rest, value, recipe.model.patch_size)
                ours[f"{side}.{place}"] = shaped
        return ours

    @staticmethod
    def _encoder_tensor(name: str, value: torch.Tensor, patch: int) -> tuple[str, torch.Tensor]:
        if name == "pos_embed.pos_embeds":
            return "vit.pos_embed", value[None]
        if name == "embed.proj.weight":
            pixels = value.reshape(len(value), patch, patch, 3).permute(0, 3, 1, 2)
            return "vit.patch_embed.proj.weight", pixels
        if name.startswith("embed."):
            return f"vit.patch_{name}", value
        if name.startswith("head."):
            kind, what = name.split(".")[1:]  # linear0, norm0, linear1, ...; ours counts the GELUs too
            place = 3 * int(kind[-1]) + (0 if kind.startswith("linear") else 1)
            return f"projector.{place}.{what}", value
        return f"vit.{name}", value

    def forward(
        self, model: nn.Module, images: torch.Tensor, recipe: Recipe, move_target: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, Masks]:
        with spied(torch, "randint") as places, spied(model, "create_views") as views:
            loss = model(images, mom=momentum(recipe.target, DONE), sim_trg=AIM, update_ema=move_target)[0]
        offsets = torch.stack([p.flatten(1) for p in places], dim=-1) if places else None
        return loss, offsets, Masks(views[0][1], views[0][4][:, None])

    def groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        free = [
            n for n, _ in model.named_parameters() if any(part in n for part in ("bias", "norm", "embed"))
        ]
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

    def __init__(self, official: Official, recipe: Recipe, images: torch.Tensor, precision: str) -> None:
        self.engine, self.images, self.precision = official.engine, images, precision
        self.arguments = official.arguments(recipe)
        with current_libraries(), their_precision(images.device, precision):
            self.model = official.build(recipe).to(images.device)
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


PATCHES = (
    "timm 0.3.2's Block took qk_scale: the argument is dropped, which is None in the official code",
    "numpy's float, torch._six.inf and wandb (unused) are stand-ins where they are missing",
    "their fp16 autocast is set to the precision measured; GradScaler is on for fp16 only, bf16 needs none",
    "without a GPU, autocast and GradScaler are the CPU's and torch.cuda.synchronize does nothing",
)


@contextlib.contextmanager
def current_libraries() -> Iterator[None]:
    """The names of old libraries that the official code asks for."""

    class Block(timm.models.vision_transformer.Block):
        def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    six: Any = types.ModuleType("torch._six")
    six.inf = math.inf
    modules = {"torch._six": six}
    if importlib.util.find_spec("wandb") is None:
        modules["wandb"] = types.ModuleType("wandb")
    if importlib.util.find_spec("timm.models.layers") is None:
        modules["timm.models.layers"] = importlib.import_module("timm.layers")
    with (
        mock.patch.object(timm.models.vision_transformer, "Block", Block),
        mock.patch.object(np, "float", float, create=True),
        warnings.catch_warnings(),
        present(modules),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def their_precision(device: torch.device, precision: str) -> Iterator[None]:
    """``torch.cuda.amp`` as the official code calls it, in another precision and on any device."""
    dtype = DTYPES[precision]

    def autocast(enabled: bool = True) -> torch.autocast:
        on = enabled and dtype != torch.float32
        return torch.autocast(device.type, dtype if on else torch.bfloat16, enabled=on)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda.amp, "autocast", autocast))
        stack.enter_context(mock.patch.object(torch.cuda.amp, "GradScaler", scaler))
        if device.type != "cuda":
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield


@contextlib.contextmanager
def present(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Modules that can be imported for a while."""
    added = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def spied(owner: Any, name: str) -> Iterator[list[Any]]:
    """What a function returns while this is open."""
    original, results = getattr(owner, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with mock.patch.object(owner, name, spy):
        yield results


def import_from(folder: Path, *names: str) -> list[types.ModuleType]:
    """Modules of a folder, which leave no trace: both repositories have a package named ``util``."""
    own = {path.stem for path in folder.iterdir()}

    def loaded() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}

    before = loaded()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


def mask_ratio(recipe: Recipe) -> float:
    """The ratio that leaves exactly our number of visible patches, however it is rounded."""
    return 1 - (recipe.visible_patches + 0.5) / recipe.grid**2


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout; None for a plain copy."""
    if not (folder / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


# Do both compute the same?


@dataclass(frozen=True)
class Agreement:
    """Both sides on the same weights, images and masks.

    Attributes:
        loss_ours, loss_theirs: in fp32.
        gradients_apart: length of the difference of the gradients over the length of theirs, in fp32.
        gradient_error_ours, gradient_error_theirs: the same of a side in the timed precision against itself
            in fp32; None where fp32 is timed.
    """

    loss_ours: float
    loss_theirs: float
    gradients_apart: float
    gradient_error_ours: float | None
    gradient_error_theirs: float | None

    @property
    def losses_apart(self) -> float:
        return abs(self.loss_ours - self.loss_theirs)


class Pair:
    """Our model with the weights of theirs, and the images and masks to try both on; on the CPU, where fp32
    is fp32.
    """

    def __init__(self, official: Official, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.official, self.recipe = official, recipe
        self.theirs, self.ours = official.build(recipe), MaskedImageModel(recipe)
        target = getattr(self.theirs, "target_encoder", None)
        if target is not None:  # else a target that is mistaken for the online encoder would go unnoticed
            for parameter in target.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        self.ours.load_state_dict(official.rename(self.theirs.state_dict(), recipe), strict=True)
        self.images = torch.randn(CHECKED_IMAGES, 3, recipe.crop_size, recipe.crop_size)

    def run(self, precision: str, move_target: bool) -> tuple[float, float, Tensors, Tensors]:
        """Losses and gradients, ours and theirs; the draws are the same in every run."""
        torch.manual_seed(1)
        cpu, recipe = torch.device("cpu"), self.recipe
        self.theirs.zero_grad()
        self.ours.zero_grad()
        with their_precision(cpu, precision):
            with torch.cuda.amp.autocast():
                theirs, offsets, masks = self.official.forward(self.theirs, self.images, recipe, move_target)
            theirs.backward()  # type: ignore[no-untyped-call]
            if move_target:
                self.ours.update_target(momentum(recipe.target, DONE))
            with attention_kernel(cpu), torch.cuda.amp.autocast():
                ours = self.ours(self.images, offsets, masks, AIM).loss
            ours.backward()  # type: ignore[no-untyped-call]
        if masks.visible.shape[1] != recipe.visible_patches:
            raise click.ClickException(f"{self.official.repository} shows {masks.visible.shape[1]} patches")
        named = self.official.rename(gradients(self.theirs), recipe)
        return ours.item(), theirs.item(), gradients(self.ours), named


def gradients(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(some: Tensors, others: Tensors) -> float:
    """Length of the difference over that of the others; infinite where not the same tensors have one."""
    if some.keys() != others.keys():
        return math.inf
    difference = sum(float((some[name] - others[name]).double().square().sum()) for name in some)
    return math.sqrt(difference / sum(float(x.double().square().sum()) for x in others.values()))


def check(official: Official, recipe: Recipe, precision: str) -> Agreement:
    """Compare both.

    Raises:
        ClickException: they differ.
    """
    with current_libraries():
        pair = Pair(official, recipe)
        loss_ours, loss_theirs, exact_ours, exact_theirs = pair.run("fp32", move_target=True)
        errors: tuple[float | None, float | None] = (None, None)
        if precision != "fp32":
            _, _, ours, theirs = pair.run(precision, move_target=False)
            errors = apart(ours, exact_ours), apart(theirs, exact_theirs)
    found = Agreement(loss_ours, loss_theirs, apart(exact_ours, exact_theirs), *errors)
    click.echo(
        f"{recipe.name}: same weights, images and masks in fp32: loss ours {loss_ours:.7f}, official "
        f"{loss_theirs:.7f}, apart {found.losses_apart:.1e}; gradients apart {found.gradients_apart:.1e} of "
        "their length"
    )
    if errors[0] is not None and errors[1] is not None:
        click.echo(
            f"  {precision} gradients against fp32: ours {errors[0]:.2%}, official {errors[1]:.2%} off"
        )
    if not (found.losses_apart <= LOSS_TOLERANCE and found.gradients_apart <= GRADIENT_TOLERANCE):
        raise click.ClickException(f"{recipe.name}: ours and {official.repository} differ; nothing is timed")
    return found


# Timing


def timed(side: Side, steps: int, device: torch.device) -> float:
    """Seconds of a block of steps."""
    if device.type != "cuda":
        begun = time.perf_counter()
        side.block(steps)
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    side.block(steps)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


class Memory:
    """Peak of allocated bytes of a side, while the other side's weights lie beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on = device, device.type == "cuda"
        self.own, self.peak = 0, 0

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Building a side and its first steps: what stays is its own."""
        before = self._allocated()
        yield
        self.own = self._allocated() - before

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before = self._allocated()
        if self.on:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.on:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - before + self.own)

    def _allocated(self) -> int:
        return int(torch.cuda.memory_allocated(self.device)) if self.on else 0


def time_sides(
    builders: Mapping[str, Callable[[], Side]], settings: Settings, flops: float, peak: float | None
) -> dict[str, Speed]:
    """Blocks of steps of each side in turn, after a block each that is not counted."""
    device, sides, memory = settings.device, {}, {name: Memory(settings.device) for name in builders}
    rates: dict[str, list[float]] = {name: [] for name in builders}
    for name, build in builders.items():
        with memory[name].settling():
            sides[name] = build()
            timed(sides[name], settings.steps, device)
    for _ in range(settings.repeats):
        for name, side in sides.items():
            with memory[name].running():
                seconds = timed(side, settings.steps, device)
            rates[name].append(settings.batch * settings.steps / seconds)
    return {name: summarise(rates[name], memory[name], flops, peak) for name in builders}


def summarise(rates: list[float], memory: Memory, flops: float, peak: float | None) -> Speed:
    spread = Spread.of(rates)
    share = None if peak is None else spread.median * flops / peak
    return Speed(spread, rates, share, memory.peak if memory.on else None)


@dataclass(frozen=True)
class Comparison:
    """What is known of a recipe."""

    recipe: str
    shape: str
    compiled: bool
    flops_per_image: float
    official: dict[str, str | None] | None
    agreement: Agreement | None
    ours: Speed
    theirs: Speed | None
    ratio: Spread | None


def compare(recipe: Recipe, official: Official | None, settings: Settings) -> Comparison:
    """Check, then time; ours alone where there is no official code."""
    precision = resolve_precision(recipe.engine, settings.device.type)
    agreement = check(official, recipe, precision) if official else None
    images = torch.randn(settings.batch, 3, recipe.crop_size, recipe.crop_size).to(settings.device)
    builders: dict[str, Callable[[], Side]] = {"ours": lambda: Ours(recipe, images)}
    if official is not None:
        builders["theirs"] = lambda: Theirs(official, recipe, images, precision)
    flops = training_flops(recipe)
    # The table of peaks is of 16-bit matrix units, of which fp32 has no meaningful share.
    peak = None if precision == "fp32" else peak_flops(settings.device)
    speeds = time_sides(builders, settings, flops, peak)
    release(settings.device)
    return Comparison(
        recipe=recipe.name,
        shape=shape_of(recipe),
        compiled=recipe.engine.compile == "on",
        flops_per_image=flops,
        official=official.version() if official else None,
        agreement=agreement,
        ours=speeds["ours"],
        theirs=speeds.get("theirs"),
        ratio=ratio_of(speeds),
    )


def ratio_of(speeds: Mapping[str, Speed]) -> Spread | None:
    """Ours over theirs, each block over the block beside it."""
    if "theirs" not in speeds:
        return None
    pairs = zip(speeds["ours"].every, speeds["theirs"].every, strict=True)
    return Spread.of([ours / theirs for ours, theirs in pairs])


def release(device: torch.device) -> None:
    """Give memory and compiled code back, so that one recipe does not lean on the other."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# The whole loop, from stored images


@dataclass(frozen=True)
class Loop:
    """The trainer on stored images: reading, crops, step.

    Attributes:
        images_per_second: of windows of ``--steps`` steps, the first of which is left out.
        waiting: share of the time in which the device waited for data; the worst of these windows.
        whole: what the summary says of the whole sitting, start of the workers and compilation included.
    """

    recipe: str
    images_per_second: Spread
    waiting: float
    whole: float


def run_loop(recipe: Recipe, data: str, settings: Settings) -> Loop:
    """Train for a moment and read what the trainer says of itself."""
    windows = settings.repeats + 1
    changes = {
        "optim": {"steps": windows * settings.steps},
        "watch": {
            "log_every": settings.steps,
            "evaluations": 0,
            "checkpoints": 1,
            "tensorboard": False,
        },
    }
    fields = recipe.model_dump()
    for section, values in changes.items():
        fields[section] |= values
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        summary = pretrain(Recipe.model_validate(fields), data, out)
        lines = read_metrics(out)[1:]
    release(settings.device)
    speeds = Spread.of([line["images_per_second"] for line in lines])
    return Loop(recipe.name, speeds, max(line["waiting"] for line in lines), summary.images_per_second)


# What is printed


def shape_of(recipe: Recipe) -> str:
    width, depth, heads = recipe.model.shape
    decoder, projector = recipe.decoder, recipe.projector
    return (
        f"{recipe.model.arch} ({width} wide, {depth} blocks, {heads} heads), "
        f"patch {recipe.model.patch_size}, image {recipe.data.image_size}, gap {recipe.masking.gap}, "
        f"{recipe.visible_patches} of {recipe.grid**2} patches visible, "
        f"decoder {decoder.width} wide, {decoder.depth} blocks, "
        f"projector {projector.hidden_dim if projector.depth else 'none'}"
    )


def table(comparisons: Sequence[Comparison]) -> str:
    """Median, with the range over the repeats in brackets."""
    lines = [
        "| recipe | code | images/s | share of peak | peak memory | ours : official |",
        "|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        ratio = f"{c.ratio}" if c.ratio else "no official code, no ratio"
        ours = "ours, compiled" if c.compiled else "ours, not compiled"
        lines.append(f"| {c.recipe} | {ours} | {cells(c.ours)} | {ratio} |")
        if c.theirs is not None and c.official is not None:
            lines.append(f"| {c.recipe} | {c.official['repository']} | {cells(c.theirs)} | |")
    return "\n".join(lines)


def cells(speed: Speed) -> str:
    share = "-" if speed.utilisation is None else f"{speed.utilisation:.1%}"
    memory = "-" if speed.memory is None else f"{speed.memory / 2**30:.1f} GiB"
    return f"{speed.images_per_second} | {share} | {memory}"


def loop_table(loops: Sequence[Loop]) -> str:
    lines = ["| recipe | whole loop, images/s | waiting for data | with start |", "|---|---|---|---|"]
    lines += [f"| {x.recipe} | {x.images_per_second} | {x.waiting:.1%} | {x.whole:.1f} |" for x in loops]
    return "\n".join(lines)


def circumstances(settings: Settings, precision: str) -> dict[str, Any]:
    found = environment(str(settings.device), precision).model_dump(mode="json")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": found,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "timm_fused_attention": use_fused_attn(),
    }


def describe(facts: Mapping[str, Any]) -> str:
    found = facts["environment"]
    commit = (found["git_commit"] or "none")[:12] + (" with changes" if found["git_dirty"] else "")
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "timm", "numpy"))
    return (
        f"{facts['date']}, lmim-bench {found['lmim_bench']} at commit {commit}, Python {found['python']}, "
        f"{packages}\n{found['device']}, {found['precision']}, batch {facts['batch']}, "
        f"{facts['repeats']} blocks of {facts['steps']} steps; timm's fused attention "
        f"{'on' if facts['timm_fused_attention'] else 'off'}"
    )


# Command line


def make_recipe(name: str, device: torch.device, batch: int, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name as the options say; small where there is no GPU."""
    cuda = device.type == "cuda"
    compiled = "on" if options["compile_"] == "on" or (options["compile_"] == "auto" and cuda) else "off"
    sets = [
        *(() if cuda else SMALL),
        f"model.arch={options['arch'] or ('vit_base' if cuda else 'vit_tiny')}",
        f"data.image_size={options['image_size'] or (224 if cuda else 64)}",
        f"optim.batch_size={batch}",
        f"engine.device={device}",
        f"engine.precision={options['precision']}",
        f"engine.compile={compiled}",
        *options["sets"],
    ]
    return load_recipe(name, sets)


def find_official(name: str, peers: Path | None) -> Official | None:
    """The official code of a recipe, where it is."""
    kind = OFFICIAL[name]
    if peers is None or not (peers / kind.folder / f"{kind.modules[0]}.py").is_file():
        where = "give --peers DIR" if peers is None else f"there is no {kind.folder} in the folder of --peers"
        click.echo(
            f"{name}: no checkout of {kind.repository} ({where}): ours is measured alone, without a ratio"
        )
        return None
    official = kind(peers)
    version = official.version()
    commit = version["commit"] or f"unknown, git blob of the model file {version['model_blob']}"
    click.echo(f"{name}: {kind.repository} at commit {commit}")
    return official


@click.command()
@click.option(
    "--peers",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the official checkouts, mae and LatentMIM.",
)
@click.option("--recipe", type=click.Choice([*RECIPES, "all"]), default="all", show_default=True)
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), help="vit_base on a GPU, vit_tiny without.")
@click.option("--image-size", type=click.IntRange(min=8), help="Pixels; 224 on a GPU, 64 without.")
@click.option("--batch", type=click.IntRange(min=2), help="Images a step; 256 on a GPU, 16 without.")
@click.option(
    "--precision",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="Of both sides; auto is bf16 on a GPU, fp32 without.",
)
@click.option(
    "--compile",
    "compile_",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="torch.compile of our blocks; auto is on with a GPU.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a block; 20 on a GPU, 2 without.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Blocks of each side."
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Other changes of the recipe, of both sides where both have it.",
)
@click.option("--data", help="Images, to measure the whole loop of the trainer as well: what pretrain takes.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where the numbers go."
)
def main(**options: Any) -> None:
    """Images per second in training, ours against the official code of MAE and Latent MIM."""
    try:
        measure(options)
    except LmimBenchError as error:
        raise click.ClickException(str(error)) from error


def measure(options: Mapping[str, Any]) -> None:
    torch.backends.cudnn.benchmark = True  # as both official mains set it
    device = torch.device(resolve_device(options["device"]))
    cuda = device.type == "cuda"
    settings = Settings(
        device,
        options["batch"] or (256 if cuda else 16),
        options["steps"] or (20 if cuda else 2),
        options["repeats"],
    )
    names = RECIPES if options["recipe"] == "all" else (options["recipe"],)
    recipes = {name: make_recipe(name, device, settings.batch, options) for name in names}
    facts = circumstances(settings, resolve_precision(recipes[names[0]].engine, device.type))
    click.echo(describe(facts))
    if options["peers"]:
        click.echo("patched for the official code: " + "; ".join(PATCHES))
    comparisons = []
    for name, recipe in recipes.items():
        click.echo(f"{name}: {shape_of(recipe)}")
        comparisons.append(compare(recipe, find_official(name, options["peers"]), settings))
    click.echo("\n" + table(comparisons))
    loops = (
        [run_loop(recipe, options["data"], settings) for recipe in recipes.values()]
        if options["data"]
        else []
    )
    if loops:
        click.echo("\n" + loop_table(loops))
    if options["json_path"]:
        payload = {
            **facts,
            "patches": PATCHES if options["peers"] else (),
            "comparisons": [asdict(c) for c in comparisons],
            "loops": [asdict(loop) for loop in loops],
        }
        options["json_path"].write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
