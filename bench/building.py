"""From a spec to a model, and from a model to the encoder around it."""

from __future__ import annotations

from typing import Any

from .backbones import NetworkEncoder
from .networks import Network, build_network
from .random_state import borrowed_state
from .timm_models import create_timm, timm_encoder
from .transformers_models import BUILDER, TransformersEncoder, create_transformers
from .types import CheckpointInfo, Encoder, EncoderSpec
from .vit import build_vit


def build_model(spec: EncoderSpec, seed: int | None = None) -> Any:
    """The model of a spec, to be filled; or, with a seed, with the random weights of its constructor.

    Raises:
        CheckpointError: the builder is not known, or its numbers do not go together.
    """
    builder = spec.arch.get("builder")
    with borrowed_state(seed):
        if builder == "vit":
            # Without values, so that what a file does not fill cannot be scored by mistake.
            return build_vit(spec.arch, device="meta" if seed is None else "cpu")
        if builder == "timm" and isinstance(spec.arch.get("name"), str):
            kwargs = spec.arch.get("kwargs", {})
            return create_timm(spec.arch["name"], pretrained=False, seed=seed or 0, **kwargs)
        if builder == BUILDER:
            return create_transformers(spec.arch)
        return build_network(spec.arch)


def make_encoder(model: Any, spec: EncoderSpec, info: CheckpointInfo) -> Encoder:
    """The encoder around a model that was built from a spec."""
    if spec.arch.get("builder") == BUILDER:
        return TransformersEncoder(model, spec, info)
    if isinstance(model, Network):
        return NetworkEncoder(model, spec, info)
    return timm_encoder(model, spec, info)
