"""The state of a training on disk: written whole or not at all, the last ones kept, read without trust."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from ..bench.atomic import atomic_write
from ..bench.errors import CheckpointError, first_line

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
_NAME = re.compile(r"step-(\d+)\.pth")


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Weights (target and decoder too) and optimiser state, gathered whole on the CPU whatever the strategy:
    a training saved by several processes goes on with one, and the other way round. All processes call it;
    with FSDP2 the content is on the first only.
    """
    weights, moments = get_state_dict(model, optimizer, options=_FULL)
    return {"model": weights, "optimizer": moments}


def whole_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The full weights of a module on the CPU; all processes call it."""
    found: dict[str, Any] = dict(get_model_state_dict(module, options=_FULL))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def restore(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put a snapshot back. Raises CheckpointError where it is of another model."""
    try:
        # Whether AdamW is fused is this process's choice: the state may come from another kind of device.
        # Where the counts of steps are kept follows from it.
        groups = [
            {**group, "fused": optimizer.defaults["fused"]} for group in state["optimizer"]["param_groups"]
        ]
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict={**state["optimizer"], "param_groups": groups},
            options=StateDictOptions(full_state_dict=True, strict=True),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the training state does not fit the recipe: {first_line(error)}") from error


def write_state(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write ``step-N.pth`` and delete all but the last ``keep``; returns its path. Later ones, which could
    not be read or the training would not be here, make way first.
    """
    path = folder / f"step-{step:08d}.pth"
    with atomic_write(path, "wb") as stream:
        torch.save(dict(state), stream)
    written = states(folder)
    current = [old for old, number in written if number <= step]
    for old in [old for old, _ in written if old not in current[:keep]]:
        old.unlink()
    return path


def states(folder: Path) -> list[tuple[Path, int]]:
    """The states of a folder with their steps, newest first."""
    found = [(p, int(m.group(1))) for p in folder.glob("*.pth") if (m := _NAME.fullmatch(p.name))]
    return sorted(found, key=lambda one: -one[1])


def load_state(path: Path) -> dict[str, Any]:
    """One state; what is not looked at is not read. Raises CheckpointError where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        # After its first sentence torch explains itself, and proposes to read without care.
        reason = first_line(error).partition(". ")[0]
        raise CheckpointError(f"{path} cannot be read ({reason})") from error
    return state


def read_state(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest state that can be read, and a line for each newer one that cannot.

    Raises:
        CheckpointError: there is none.
    """
    broken: list[str] = []
    for path, _ in states(folder):
        try:
            return path, load_state(path), [f"{line}; going back to the one before" for line in broken]
        except CheckpointError as error:
            broken.append(str(error))
    if broken:
        raise CheckpointError(
            f"no training state can be read; the newest: {broken[0]}; start anew with another --out"
        )
    raise CheckpointError(f"{folder} holds no training state (step-*.pth)")
