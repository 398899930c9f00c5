"""Folders that are checkpoints: weights beside a config.json, shards with an index, distributed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .dcp import METADATA

INDEX = ".index.json"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# In the order of transformers, which passes over the shards of an earlier save; its names, timm's and
# open_clip's.
_USUAL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_SEVERAL = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)")
# DeepSpeed keeps the weights of a process in one file, the optimizer's parts in others; at its stage 3 the
# weights are in parts too.
_STATES = re.compile(r"mp_rank_\d+_model_states\.pt")
_PARTS = re.compile(r"zero_pp_rank_\d+_.*model_states\.pt")
_PARTITIONED = re.compile(r"(zero_pp_rank_\d+_.*|mp_rank_\d+_.*|.*[._]rank[_]?\d+)\.(pt|pth)")


@dataclass(frozen=True)
class Found:
    """What a folder holds: a distributed checkpoint, an index of shards, or one file."""

    kind: str
    """``dcp``, ``index`` or ``file``."""
    path: Path


def find_weights(folder: Path) -> Found:
    """The weights of a folder, or of the folder in it that DeepSpeed's ``latest`` names.

    Raises:
        CheckpointError: there are none, several, or only the partitioned state of a training.
    """
    names = sorted(path.name for path in folder.iterdir())
    if METADATA in names:
        return Found("dcp", folder)
    several = [name for name in names if _SEVERAL.fullmatch(name)]
    if several:
        first = [name for name in _USUAL if name in names and not name.endswith(INDEX)]
        raise CheckpointError(
            f"{folder} holds the weights of several models ({', '.join((*first, *several))}), as accelerate "
            "saves them; give one of the files"
        )
    for name in _USUAL:
        if name in names:
            return Found("index" if name.endswith(INDEX) else "file", folder / name)
    states = [name for name in names if _STATES.fullmatch(name)]
    if len(states) == 1 and not any(_PARTS.fullmatch(name) for name in names):
        return Found("file", folder / states[0])
    parts = [name for name in names if _PARTITIONED.fullmatch(name)]
    if parts:
        raise CheckpointError(
            f"{folder} holds the partitioned state of a training ({parts[0]}), not whole weights; merge it "
            "where it was trained (DeepSpeed: zero_to_fp32.py, FSDP: a full state dict) and give the result"
        )
    indices = [name for name in names if name.endswith(INDEX)]
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    if len(indices) == 1:
        return Found("index", folder / indices[0])
    if len(weights) == 1:
        return Found("file", folder / weights[0])
    if weights:
        shown = ", ".join(weights[:5]) + (", ..." if len(weights) > 5 else "")
        raise CheckpointError(f"{folder} holds several files of weights ({shown}); give one of them")
    newest = _named_latest(folder)
    if newest is not None:
        return find_weights(newest)
    inner = [path.name for path in folder.iterdir() if path.is_dir() and (path / METADATA).is_file()]
    hint = f"; did you mean {folder / inner[0]}?" if inner else ""
    raise CheckpointError(f"{folder} holds no file of weights ({', '.join(_WEIGHTS)}){hint}")


def _named_latest(folder: Path) -> Path | None:
    """The folder of the newest checkpoint of DeepSpeed: what its file ``latest`` names, or ``checkpoint``."""
    name = "checkpoint"
    if (folder / "latest").is_file():
        with (folder / "latest").open(errors="replace") as stream:
            name = stream.read(255).strip()
    inside = folder / name
    return inside if name and Path(name).name == name and inside.is_dir() else None


def read_index(path: Path) -> dict[str, list[str]]:
    """The shards that an index names: file name -> keys, in order.

    Raises:
        CheckpointError: the index is damaged, or names a file that is missing or outside of the folder.
    """
    try:
        mapping = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(mapping, Mapping):
            raise TypeError("weight_map is no table")
        pairs = [(str(key), str(name)) for key, name in mapping.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index of shards (it has no weight_map)") from error
    shards: dict[str, list[str]] = {}
    for key, name in pairs:
        if Path(name).name != name:
            raise CheckpointError(f"{path} names a shard outside of its folder ({name}); it is refused")
        shards.setdefault(name, []).append(key)
    missing = [name for name in shards if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} shards missing)"
        )
    return shards
