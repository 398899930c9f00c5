"""The model that an encoder was trained in, with its decoder and target: from the states beside the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..bench.backbones import ViTEncoder
from ..bench.encoders import load_encoder
from ..bench.errors import CheckpointError
from ..bench.random_state import borrowed_state
from ..bench.references import split_reference
from .model import MaskedImageModel
from .outcome import read_training
from .recipe import Recipe
from .state import load_state, states

_ENCODERS = {"online": "encoder.vit.", "target": "target_encoder.vit."}
"""Where a state keeps the encoder that a recipe exports."""


class Trained(NamedTuple):
    """A trained model, on the CPU, without gradients.

    Attributes:
        recipe: what it was trained by.
        model: encoder, decoder and target.
        step: optimiser steps that it had taken.
    """

    recipe: Recipe
    model: MaskedImageModel
    step: int


class Companion(NamedTuple):
    """A training and the state of it that holds an encoder, whose tensors are not read yet."""

    recipe: Recipe
    path: Path
    state: Mapping[str, Any]


def find_companion(reference: str) -> Companion:
    """The newest state whose exported encoder equals the one that a reference loads, tensor by tensor.

    It is looked for in the folder of the file, or the one above (``encoders/step-N.pth``).

    Raises:
        LmimBenchError: there is none; the message is the reason, in one line.
    """
    file = Path(split_reference(reference)[0])
    if not file.is_file():
        raise CheckpointError("there is no decoder: it is no file that `lmim-bench pretrain` wrote")
    home = file.resolve().parent
    folder = next((one for one in (home, home.parent) if (one / "recipe.json").is_file()), None)
    if folder is None:
        raise CheckpointError(
            "there is no decoder beside it (leave encoder.pth in the folder of its training, with "
            "recipe.json and states/)"
        )
    recipe = read_training(folder).recipe
    encoder = load_encoder(reference)
    weights = encoder.model.state_dict() if isinstance(encoder, ViTEncoder) else {}
    broken: list[str] = []
    found = states(folder / "states")
    for path, _ in found:
        try:
            state = load_state(path)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        if _holds(state, _ENCODERS[recipe.target.export], weights):
            return Companion(recipe, path, state)
    if not found:
        raise CheckpointError(f"there is no decoder beside it: {folder / 'states'} holds no step-*.pth")
    if broken:
        raise CheckpointError(f"no state that can be read holds this encoder: {broken[0]}")
    raise CheckpointError(f"the decoders in {folder / 'states'} are of other encoders than this one")


def load_trained(reference: str) -> Trained:
    """The whole model that an encoder belongs to.

    Raises:
        LmimBenchError: as ``find_companion``, or the state does not fit the recipe beside it.
    """
    recipe, path, state = find_companion(reference)
    with borrowed_state():
        model = MaskedImageModel(recipe)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the recipe beside it: {detail}") from error
    return Trained(recipe, model.eval().requires_grad_(False), int(state.get("step", 0)))


def _holds(state: object, prefix: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether an encoder of a state has these tensors and no others."""
    model = state.get("model") if isinstance(state, Mapping) else None
    if not isinstance(model, Mapping):
        return False
    held = {name[len(prefix) :]: tensor for name, tensor in model.items() if name.startswith(prefix)}
    same = bool(held) and held.keys() == weights.keys()
    return same and all(torch.equal(held[name], weights[name]) for name in weights)
