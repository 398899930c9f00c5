"""From a reference to an encoder: a checkpoint file, a timm model, a Python factory, or raw pixels.

path/to/model.pth                      a file; its layout is recognised (docs/checkpoints.md)
path/to/dino.pth#student,heads=6       with choices that the file leaves open
path/to/folder, hf:path/to/folder      a folder: Hugging Face's, or torch's distributed checkpoint
random:REFERENCE                       the same encoder with seeded random weights in place of its own
timm:vit_small_patch16_224             a timm architecture with seeded random weights
timm:vit_small_patch16_224:pretrained  the same with timm's pretrained weights
python:package.module:factory          whatever the factory returns
pixels, pixels:8                       no network: pooled pixels, the control
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from .backbones import ViTEncoder
from .building import build_model, make_encoder
from .checkpoints.loading import load_file
from .cost import encoder_flops
from .errors import CheckpointError, ConfigError, did_you_mean, first_line, first_problem
from .modules import ModuleEncoder, PixelEncoder, module_info
from .random_state import borrowed_state
from .references import HUGGING_FACE, PYTHON, RANDOM, TIMM, file_at_home, is_pixels, split_reference
from .timm_models import create_timm, timm_encoder, timm_notes, timm_spec
from .trial import try_encoder
from .types import CheckpointInfo, Encoder, EncoderSpec
from .vit import build_vit, vit_spec

__all__ = ["ViTEncoder", "build_vit", "inspect_checkpoint", "load_encoder", "vit_spec"]

SPEC_OPTIONS = (
    "image_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "pooling",
    "final_norm",
    "pos_interpolation",
)
FILE_OPTIONS = ("pick", "heads", "arch", "family", "ignore")


def load_encoder(
    reference: str | Path, *, overrides: Mapping[str, Any] | None = None, seed: int = 0
) -> Encoder:
    """Load the encoder that a reference names, on the CPU, in evaluation mode, without gradients.

    Args:
        reference: a file, a folder, ``random:REFERENCE``, ``timm:NAME[:pretrained]``,
            ``python:package.module:factory`` or ``pixels``; docs/checkpoints.md tells them all, with the
            options after ``#``.
        overrides: the same choices as after ``#``, which they overrule: fields of the spec that belong to
            the evaluation (``SPEC_OPTIONS``), and for a file ``FILE_OPTIONS``.
        seed: of the random weights of ``timm:NAME`` and ``random:REFERENCE``; the global random state is
            not touched.

    Raises:
        CheckpointError: the reference cannot be loaded completely and safely.
        ConfigError: an option is not known or not valid.
    """
    reference = file_at_home(str(reference))
    if reference.startswith(RANDOM):
        return _randomised(load_encoder(reference.removeprefix(RANDOM), overrides=overrides, seed=seed), seed)
    source, options = split_reference(reference)
    options |= dict(overrides or {})
    is_file = not source.startswith((TIMM, PYTHON)) and not is_pixels(source)
    known = SPEC_OPTIONS + (FILE_OPTIONS if is_file else ())
    for name in options:
        if name not in known:
            raise ConfigError(f"{source} has no option {name!r}. {did_you_mean(name, known)}")
    changes = {name: options[name] for name in SPEC_OPTIONS if name in options}
    if source.startswith(TIMM):
        encoder = _load_timm(source, seed)
    elif source.startswith(PYTHON):
        encoder = _tried(_load_python(source, seed), source)
    elif is_pixels(source):
        encoder = _load_pixels(source)
    else:
        encoder = load_file(
            _hugging_face(source), **{name: options[name] for name in FILE_OPTIONS if name in options}
        )
    return _respec(encoder, changes)


def _hugging_face(source: str) -> str:
    """The path of ``hf:FOLDER``; CheckpointError where it is no folder of Hugging Face."""
    if not source.startswith(HUGGING_FACE):
        return source
    folder = source.removeprefix(HUGGING_FACE)
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"{source}: {folder} is no folder with a config.json; download one first, such as by "
            f"`huggingface-cli download {folder or 'ORG/MODEL'} --local-dir DIR`"
        )
    return folder


def _randomised(encoder: Encoder, seed: int) -> Encoder:
    """The control of an encoder: built the same, with the weights that its constructor draws."""
    builder, info = encoder.spec.arch.get("builder"), encoder.info
    if builder in ("python", "module", "pixels"):
        raise CheckpointError(
            f"{info.source}: only an architecture that this project builds can have random weights"
        )
    fresh = CheckpointInfo(
        source=f"{RANDOM}{info.source}",
        sha256=None,
        format=f"random weights for {info.format}",
        container="",
        parameters=info.parameters,
        loaded_tensors=0,
        encoder_tensors=info.encoder_tensors,
        notes=(f"random weights, seed {seed}: not a trained model",),
        random_weights=True,
    )
    return make_encoder(build_model(encoder.spec, seed), encoder.spec, fresh)


def _load_pixels(source: str) -> Encoder:
    _, _, size = source.partition(":")
    if size and not size.isdigit():
        raise CheckpointError(f"{source}: expected pixels or pixels:PATCH, such as pixels:16")
    return PixelEncoder(int(size or 16))


def _load_timm(source: str, seed: int) -> Encoder:
    _, name, *rest = source.split(":")
    if rest not in ([], ["pretrained"]) or not name:
        raise CheckpointError(f"{source}: expected timm:NAME (random weights) or timm:NAME:pretrained")
    pretrained = bool(rest)
    model = create_timm(name, pretrained=pretrained, seed=seed)
    count = len(model.state_dict())
    notes = [
        "pretrained weights of timm" if pretrained else f"random weights, seed {seed}: not a trained model"
    ]
    notes += timm_notes(model)
    info = CheckpointInfo(
        source=source,
        sha256=None,
        format="timm",
        container="",
        parameters=sum(p.numel() for p in model.parameters()),
        loaded_tensors=count if pretrained else 0,
        encoder_tensors=count,
        notes=tuple(notes),
        random_weights=not pretrained,
    )
    return timm_encoder(model, timm_spec(model, {"builder": "timm", "name": name, "kwargs": {}}), info)


def _load_python(source: str, seed: int) -> Encoder:
    """Call the factory of ``python:package.module:factory``. This runs the user's own code, as asked."""
    _, module_name, factory_name = [*source.split(":"), "", ""][:3]
    if not module_name or not factory_name or source.count(":") != 2:
        raise CheckpointError(f"{source}: expected python:package.module:factory")
    try:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        factory = getattr(importlib.import_module(module_name), factory_name)
    except ImportError as error:
        raise CheckpointError(f"{source}: {module_name} cannot be imported: {error}") from error
    except AttributeError as error:
        raise CheckpointError(f"{source}: {module_name} has no {factory_name!r}") from error
    try:
        with borrowed_state():  # a factory with random weights gives the same ones again
            torch.manual_seed(seed)  # on a GPU too
            built = factory()
    except Exception as error:
        raise CheckpointError(f"{source} failed: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(built, Encoder):
        return built
    if not isinstance(built, nn.Module):
        raise CheckpointError(
            f"{source} returned {type(built).__name__}; expected an Encoder, a timm model, or a torch module"
        )
    for name, tensor in built.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values")
    if ViTEncoder.supports(built) or hasattr(built, "pretrained_cfg"):
        arch = {"builder": "python", "factory": source.removeprefix(PYTHON)}
        return timm_encoder(built, timm_spec(built, arch, family="python"), module_info(built, source))
    return ModuleEncoder(built, source, factory)


def _tried(encoder: Encoder, source: str) -> Encoder:
    """The encoder of a factory, with what it makes of two images as a part of its fingerprint."""
    mark = try_encoder(encoder, source)
    encoder.fingerprint = hashlib.sha256(f"{encoder.fingerprint}{mark}".encode()).hexdigest()
    return encoder


def _respec(encoder: Encoder, changes: Mapping[str, Any]) -> Encoder:
    """Put the overridden fields into the spec, and the spec into the fingerprint."""
    if not changes:
        return encoder
    try:
        spec = EncoderSpec.model_validate({**encoder.spec.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError(f"{encoder.info.source}: {first_problem(error)}") from error
    if spec.image_size < 1 or spec.image_size % spec.patch_size:
        raise ConfigError(
            f"{encoder.info.source}: image_size {spec.image_size} is not a multiple of the patch size "
            f"{spec.patch_size}"
        )
    if "cls" in spec.pooling and not spec.has_cls:
        raise ConfigError(
            f"{encoder.info.source}: pooling {spec.pooling!r} asks for a class token, which this encoder "
            "lacks; use pooling=mean"
        )
    encoder.spec = spec
    encoder.fingerprint = hashlib.sha256(
        f"{encoder.fingerprint}{spec.model_dump_json()}".encode()
    ).hexdigest()
    return encoder


def inspect_checkpoint(reference: str) -> dict[str, Any]:
    """All that loading finds out about a reference, as plain JSON values: for ``lmim-bench inspect``.

    Raises:
        CheckpointError: the reference cannot be loaded.
    """
    encoder = load_encoder(reference)
    spec, info = encoder.spec, encoder.info
    return {
        "source": info.source,
        "format": info.format,
        "container": info.container,
        "sha256": info.sha256,
        "fingerprint": encoder.fingerprint,
        "family": spec.family,
        "architecture": spec.arch,
        "parameters": info.parameters,
        "flops": encoder_flops(encoder),
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "tokens": {
            "class": spec.has_cls,
            "registers": spec.arch.get("reg_tokens", spec.arch.get("registers", 0)),
            "patches": (spec.image_size // spec.patch_size) ** 2,
        },
        "preprocessing": {
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
            "pos_interpolation": spec.pos_interpolation,
        },
        "pooling": spec.pooling,
        "final_norm": spec.final_norm,
        "coverage": {
            "encoder_tensors": info.encoder_tensors,
            "loaded_tensors": info.loaded_tensors,
            "random_weights": info.random_weights,
        },
        "dropped": dict(info.dropped),
        "notes": list(info.notes),
    }
