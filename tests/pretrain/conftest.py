"""Recipes, models and batches small enough for milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.model import MaskedImageModel
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
