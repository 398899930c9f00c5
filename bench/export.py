"""An encoder written for other programs: timm, transformers, and the official code of MAE.

timm    the weights in timm's names, and the config.json that names a registered model and its arguments
hf      a folder that transformers' ViTModel loads, with its preprocessing
mae     {"model": ...} as facebookresearch/mae saves it, for its models_vit.py and main_finetune.py

Every format gives the same features as the encoder had here. What a layout cannot say is refused with the
reason, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from .atomic import atomic_write
from .backbones import ViTEncoder
from .encoders import load_encoder
from .errors import CheckpointError, ConfigError, did_you_mean
from .exporting.plain import Draft
from .exporting.to_hf import draft_hf
from .exporting.to_mae import draft_mae
from .exporting.to_timm import draft_timm

ExportFormat = Literal["timm", "hf", "mae"]

_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_DRAFTS: dict[ExportFormat, Callable[[ViTEncoder, Path], Draft]] = {
    "timm": draft_timm,
    "hf": draft_hf,
    "mae": draft_mae,
}


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        format: as asked.
        paths: the files, the weights first.
        tensors: number of tensors in the file of weights.
        parameters: number of numbers in them.
        how_to_load: one line of Python that loads the result, with its own imports.
        notes: what a reader should know: what the format cannot say, and what was converted.
    """

    format: ExportFormat
    paths: tuple[Path, ...]
    tensors: int
    parameters: int
    how_to_load: str
    notes: tuple[str, ...] = ()


def export_encoder(reference: str, format: ExportFormat, out: str | Path) -> ExportSummary:  # noqa: A002
    """Write an encoder in the layout of another program.

    Args:
        reference: any reference of ``load_encoder`` that is a plain vision transformer. ``#image_size=``
            and the other options apply; positions of another size are resampled as at run time.
        format: ``timm``, ``hf`` or ``mae``; see the module's docstring.
        out: ``mae``: a file, .pth or .safetensors. ``timm``: such a file, or a folder for
            ``model.safetensors``; ``config.json`` goes beside it. ``hf``: a folder, or
            ``FOLDER/model.safetensors``. Folders are made; nothing that exists is overwritten.

    Raises:
        CheckpointError: the reference cannot be loaded, is no plain vision transformer, or has what the
            format cannot express.
        ConfigError: the format is not known, or ``out`` does not suit it, exists, or cannot be written.
    """
    if format not in get_args(ExportFormat):
        raise ConfigError(f"there is no format {format!r}. {did_you_mean(format, get_args(ExportFormat))}")
    weights = _target(format, Path(out))
    encoder = load_encoder(reference)
    if not isinstance(encoder, ViTEncoder):
        raise CheckpointError(
            f"{reference} is no plain vision transformer ({type(getattr(encoder, 'model', None)).__name__} "
            f"in {type(encoder).__name__}); only plain ones can be exported"
        )
    try:
        draft = _DRAFTS[format](encoder, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{reference} cannot be exported as {format}: {error}") from error
    paths = (weights, *(weights.parent / name for name in draft.files))
    _write(format, paths, draft)
    return ExportSummary(
        format=format,
        paths=paths,
        tensors=len(draft.state),
        parameters=sum(tensor.numel() for tensor in draft.state.values()),
        how_to_load=draft.how_to_load,
        notes=(*_general_notes(encoder), *draft.notes),
    )


def _target(format: ExportFormat, out: Path) -> Path:  # noqa: A002
    """The file of weights that ``out`` means; ConfigError where it does not suit the format or exists."""
    suffixes = {"timm": (".safetensors", ".pth"), "hf": (), "mae": (".pth", ".pt", ".safetensors")}[format]
    beside = {"timm": ("config.json",), "hf": ("config.json", "preprocessor_config.json"), "mae": ()}[format]
    is_folder = out.suffix not in _WEIGHTS or out.is_dir()
    if format == "mae" and is_folder:
        raise ConfigError(f"--out {out}: the format mae is one file; give it the ending .pth or .safetensors")
    if format == "hf" and not is_folder and out.name != "model.safetensors":
        raise ConfigError(f"--out {out}: transformers loads a folder with model.safetensors; give the folder")
    if not is_folder and suffixes and out.suffix not in suffixes:
        raise ConfigError(
            f"--out {out}: a file of the format {format} ends in {' or '.join(suffixes)}, not {out.suffix}"
        )
    weights = out / "model.safetensors" if is_folder else out
    folder = weights.parent
    for path in (weights, *(folder / name for name in beside)):
        if path.exists():
            raise ConfigError(f"{path} exists; delete it or choose another --out")
    # timm and transformers open whichever weights the folder has, and a config.json speaks for all of them.
    if beside and folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
        if others:
            raise ConfigError(
                f"{folder} holds other weights ({others[0]}), which the config.json of this export would "
                "describe wrongly; choose a folder of its own"
            )
    return weights


def _write(format: ExportFormat, paths: tuple[Path, ...], draft: Draft) -> None:  # noqa: A002
    """Write all files, each of them atomically, or none; ConfigError where that is not possible."""
    weights, *others = paths
    try:
        with atomic_write(weights, "wb") as stream:
            if weights.suffix == ".safetensors":
                from safetensors.torch import save

                stream.write(save(draft.state, metadata={"format": "pt"}))
            else:
                torch.save({"model": draft.state} if format == "mae" else draft.state, stream)
        for path, content in zip(others, draft.files.values(), strict=True):
            with atomic_write(path) as stream:
                json.dump(content, stream, indent=2, allow_nan=False)
                stream.write("\n")
    except BaseException as error:
        for path in paths:  # none of them was there before
            if path.exists():
                path.unlink()
        if isinstance(error, OSError):
            raise ConfigError(f"{weights} cannot be written: {error.strerror or error}") from error
        raise


def _general_notes(encoder: ViTEncoder) -> Iterator[str]:
    spec, own = encoder.spec, encoder.model.patch_embed
    if encoder.info.random_weights:
        yield "random weights: not a trained model"
    if spec.image_size != own.img_size[0]:
        old, new = own.grid_size[0], spec.image_size // spec.patch_size
        yield f"positions resampled from {old}x{old} to {new}x{new} patches by timm's rule"
    if not spec.final_norm:
        yield "the global feature here is taken before the final norm; the exported model applies that norm"
