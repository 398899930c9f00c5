"""What the layouts of timm and transformers have no place for: an export says it in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import CheckpointError, first_problem
from ..types import EncoderSpec, Frozen, Pooling

_ENTRY = "lmim_bench"


class _GlobalFeature(Frozen):
    pooling: Pooling
    final_norm: bool


def global_feature(spec: EncoderSpec) -> dict[str, Any]:
    """The entry of config.json that says how the global feature is made; other programs pass over it."""
    return {_ENTRY: _GlobalFeature(pooling=spec.pooling, final_norm=spec.final_norm).model_dump()}


def as_exported(spec: EncoderSpec, config: Mapping[str, Any]) -> EncoderSpec:
    """The spec with the global feature that config.json states; as it is where no export wrote the file.

    Raises:
        CheckpointError: the entry is not valid, or asks for a class token that the encoder does not have.
    """
    if _ENTRY not in config:
        return spec
    try:
        stated = _GlobalFeature.model_validate(config[_ENTRY])
    except ValidationError as error:
        raise CheckpointError(f"{_ENTRY} in config.json is not valid: {first_problem(error)}") from error
    if stated.pooling != "mean" and not spec.has_cls:
        raise CheckpointError(
            f"{_ENTRY} in config.json says the pooling {stated.pooling}, and there is no class token"
        )
    return spec.model_copy(update=stated.model_dump())
