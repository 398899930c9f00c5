"""Training of the encoders that the benchmark scores: MAE, Latent MIM and its variants, I-JEPA, data2vec.

>>> from lmim_bench.pretrain import pretrain
>>> pretrain("latent-mim", "scenes", "runs/lmim", sets=["optim.steps=100", ...])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import pretrain, resume
    from .recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "pretrain", "recipe_names", "resume"]

_HOMES = {
    "pretrain": "api",
    "resume": "api",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "recipe_names": "recipe",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that importing the package loads no torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
