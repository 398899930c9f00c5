"""What the official code needs to run beside current libraries, patched only while it runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.models.vision_transformer
import torch

from lmim_bench.bench.config import Precision
from lmim_bench.bench.engine import torch_dtype

PATCHES = (
    "timm 0.3.2's Block took qk_scale: the argument is dropped, which is None in the official code",
    "numpy's float, torch._six.inf and wandb (unused) are stand-ins where they are missing",
    "their fp16 autocast is set to the precision measured; GradScaler is on for fp16 only, bf16 needs none",
    "without a GPU, autocast and GradScaler are the CPU's and torch.cuda.synchronize does nothing",
)


@contextlib.contextmanager
def current_libraries() -> Iterator[None]:
    """The names of old libraries that the official code asks for."""

    class Block(timm.models.vision_transformer.Block):
        def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    six: Any = types.ModuleType("torch._six")
    six.inf = math.inf
    modules = {"torch._six": six}
    if importlib.util.find_spec("wandb") is None:
        modules["wandb"] = types.ModuleType("wandb")
    if importlib.util.find_spec("timm.models.layers") is None:
        modules["timm.models.layers"] = importlib.import_module("timm.layers")
    with (
        mock.patch.object(timm.models.vision_transformer, "Block", Block),
        mock.patch.object(np, "float", float, create=True),
        warnings.catch_warnings(),
        _present(modules),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def their_precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """``torch.cuda.amp`` as the official code calls it, in another precision and on any device."""
    dtype = torch_dtype(precision)

    def autocast(enabled: bool = True) -> torch.autocast:
        on = enabled and dtype != torch.float32
        return torch.autocast(device.type, dtype if on else torch.bfloat16, enabled=on)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda.amp, "autocast", autocast))
        stack.enter_context(mock.patch.object(torch.cuda.amp, "GradScaler", scaler))
        if device.type != "cuda":
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield


@contextlib.contextmanager
def _present(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Modules that can be imported for a while."""
    added = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def spied(owner: Any, name: str) -> Iterator[list[Any]]:
    """What a function returns while this is open."""
    original, results = getattr(owner, name), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with mock.patch.object(owner, name, spy):
        yield results


def import_from(folder: Path, *names: str) -> list[Any]:
    """Modules of a folder, which leave no trace: both repositories have a package named ``util``."""
    own = {path.stem for path in folder.iterdir()}

    def loaded() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}

    before = loaded()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)
