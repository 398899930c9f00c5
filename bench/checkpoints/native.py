"""This project's own checkpoint: the spec travels with the weights, so nothing has to be inferred."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ..atomic import atomic_write
from ..errors import CheckpointError, first_problem
from ..types import EncoderSpec, TrainingPoint
from .family import Draft

FORMAT = "lmim-bench"
VERSION = 1


def save_checkpoint(
    path: str | Path,
    spec: EncoderSpec,
    state_dict: Mapping[str, torch.Tensor],
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoder with its spec, atomically; ``load_encoder`` reads it without any guess.

    Args:
        path: where to; ``.safetensors`` writes that format with the spec in its header, all else a .pth.
        spec: how the encoder is built and its images are prepared (``vit_spec`` makes one).
        state_dict: the encoder's weights in timm's names, without any head.
        recipe: how it was trained; JSON only.

    Raises:
        CheckpointError: the recipe is not JSON.
    """
    path = Path(path)
    try:
        described = json.loads(json.dumps(dict(recipe or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the recipe of a checkpoint must be plain JSON: {error}") from error
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    header = {"format": FORMAT, "version": VERSION, "spec": spec.model_dump(mode="json")}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        meta = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()
        }
        content = save(weights, metadata={**meta, "recipe": json.dumps(described)})
        with atomic_write(path, "wb") as stream:
            stream.write(content)
        return
    with atomic_write(path, "wb") as stream:
        torch.save({**header, "encoder": weights, "recipe": described}, stream)


def is_native(payload: Mapping[str, Any]) -> bool:
    """Whether a file's content is a checkpoint of this project."""
    return payload.get("format") == FORMAT


def read(payload: Mapping[str, Any]) -> Draft:
    """The spec and the weights of this project's checkpoint.

    Raises:
        CheckpointError: a later version, or a part is missing or not valid.
    """
    version = payload.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint is of format version {version}, this lmim-bench reads {VERSION}; "
            "update lmim-bench"
        )
    encoder = payload.get("encoder")
    if not isinstance(encoder, Mapping) or not all(isinstance(t, torch.Tensor) for t in encoder.values()):
        raise CheckpointError("the checkpoint has no encoder weights")
    try:
        spec = EncoderSpec.model_validate(payload.get("spec"))
    except ValidationError as error:
        raise CheckpointError(f"the checkpoint's spec is not valid: {first_problem(error)}") from error
    return Draft(dict(encoder), spec, _notes(payload.get("recipe")))


def is_untrained(payload: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this project holds the weights that a training starts from."""
    recipe = payload.get("recipe")
    return isinstance(recipe, Mapping) and recipe.get("step") == 0


def training_point(payload: Mapping[str, Any]) -> TrainingPoint | None:
    """When a training of this project saved the encoder: one recipe on one data set is one training."""
    recipe = payload.get("recipe")
    if not isinstance(recipe, Mapping) or "recipe" not in recipe or "step" not in recipe:
        return None
    identity = json.dumps([recipe["recipe"], recipe.get("data")], sort_keys=True)
    run = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return TrainingPoint(run=run, epoch=recipe.get("epochs", recipe["step"]))


def _notes(recipe: object) -> tuple[str, ...]:
    """What the recipe says of itself, or the recipe as it is where it says nothing."""
    if not recipe:
        return ()
    said = recipe.get("notes") if isinstance(recipe, Mapping) else None
    if isinstance(said, list):
        return tuple(str(note) for note in said)
    return (f"recipe: {json.dumps(recipe)}",)
