"""Recipes, models, batches and trainings small enough for milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lmim_bench.pretrain.api import pretrain
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.model import MaskedImageModel
from lmim_bench.pretrain.outcome import Summary
from lmim_bench.pretrain.patches import draw_offsets
from lmim_bench.pretrain.recipe import Recipe, load_recipe

_SMALL = (
    "model.embed_dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=4",
    "data.image_size=16",
    "masking.visible=0.25",
    "masking.min_context=2",
    "projector.hidden_dim=24",
    "decoder.width=16",
    "decoder.depth=2",
    "decoder.num_heads=2",
)


class Fed(NamedTuple):
    """The arguments of a model but for the similarity that is aimed at."""

    images: torch.Tensor
    offsets: torch.Tensor | None
    masks: Masks


def _tiny(name: str = "latent-mim", *sets: str) -> Recipe:
    small = _SMALL + (("target.top_blocks=2",) if name == "data2vec" else ())
    return load_recipe(name, [*small, *sets])


def _shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("pos_embed"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def _built(recipe: Recipe, seed: int = 0) -> MaskedImageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _shaken(MaskedImageModel(recipe), seed)


def _fed(recipe: Recipe, batch: int = 3, seed: int = 0) -> Fed:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, recipe.crop_size, recipe.crop_size, generator=generator)
    offsets = None
    if recipe.masking.gap:
        noise = torch.rand(batch, recipe.grid**2, 2, generator=generator)
        offsets = draw_offsets(noise, recipe.masking.gap)
    return Fed(images, offsets, draw_masks(recipe, batch, slice(0, batch), generator))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Recipe]:
    """A built-in recipe shrunk to a 4 x 4 grid, with changes: ``tiny("mae", "model.depth=1")``."""
    return _tiny


@pytest.fixture(scope="session")
def shaken() -> Callable[..., Any]:
    """Moves every parameter at random, so that no bias is 0 and no norm the identity; returns the module."""
    return _shaken


@pytest.fixture(scope="session")
def built() -> Callable[..., MaskedImageModel]:
    """The model of a recipe with seeded, shaken weights."""
    return _built


@pytest.fixture(scope="session")
def fed() -> Callable[..., Fed]:
    """Random images, offsets and masks for a recipe."""
    return _fed


@pytest.fixture(scope="session")
def training(tiny_sets: tuple[str, ...]) -> tuple[str, ...]:
    """The changes of a recipe for a training of eight steps that logs each and saves at the half."""
    return (
        *tiny_sets,
        *("optim.base_lr=1e-2", "optim.steps=8", "watch.log_every=1", "watch.checkpoints=2"),
        *("watch.evaluations=1", "watch.tensorboard=false", "engine.device=cpu"),
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that trainings share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(colours: Path, cache: Path, tmp_path: Path, training: tuple[str, ...]) -> Callable[..., Summary]:
    """Train with a recipe's name and changes into a folder of the test."""

    def call(recipe: str, *sets: str, out: str = "out") -> Summary:
        return pretrain(recipe, str(colours), tmp_path / out, sets=(*training, *sets), cache_dir=cache)

    return call


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The loss of every step in a training's folder."""
    return lambda folder: [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture
def launch(cache: Path) -> Callable[..., subprocess.Popen[str]]:
    """``lmim-bench pretrain`` with arguments in a process of its own, or in several under torchrun."""

    def call(*args: object, sets: Sequence[str] = (), processes: int = 1) -> subprocess.Popen[str]:
        run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        changes = [word for change in sets for word in ("--set", change)]
        command = [sys.executable, *(run if processes > 1 else ()), "-m", "lmim_bench", "pretrain"]
        return subprocess.Popen(
            [*command, *map(str, args), *changes, "--cache-dir", str(cache)],
            # One thread: the processes of a test share the machine with each other and with the suite.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call


@pytest.fixture
def carry_out(launch: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[str, str]]:
    """As ``launch``, to its end, which must be a good one; what it wrote to standard output and error."""

    def call(*args: object, **options: Any) -> tuple[str, str]:
        process = launch(*args, **options)
        said, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems
        return said, problems

    return call
