"""Pickled checkpoints through torch's restricted unpickler, and never through any other.

A pickle can name any function of any module and have it called. ``torch.load(weights_only=True)`` admits
only what rebuilds tensors. Official files hold a little more beside the weights (``argparse.Namespace``,
NumPy numbers, configuration objects); for a fixed list of such names the unpickler is given an inert
stand-in that keeps the data and runs nothing: the named module is not even imported. Whatever else a file
names, it is refused. Allow-listing what an error message happens to name would run it.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line

# safe_globals is state of the whole process: two threads must not see each other's.
_LOCK = threading.Lock()
_LEGACY_PICKLES = 5


class Inert:
    """Stands in for an object of a class that is not loaded: takes any construction, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take and forget the arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def inert_dict(*args: Any) -> OrderedDict[Any, Any]:
    """Stands in for ``defaultdict``: its default, an inert class, is forgotten."""
    return OrderedDict()


def inert_list(*args: Any) -> list[Any]:
    """Stands in for ``deque``, whose items are appended one by one, as the unpickler does to lists alone."""
    return []


_EXACT = {
    "argparse.Namespace",
    "collections.defaultdict",
    "collections.deque",
    "torch.torch_version.TorchVersion",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "typing.Any",
    "types.SimpleNamespace",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    *(f"builtins.{name}" for name in ("frozenset", "slice", "range")),
    *(
        f"{package}.multiarray.{name}"
        for package in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ),
    "numpy.ndarray",
    "numpy.dtype",
}
_PATTERNS = re.compile(
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|numpy\.dtypes\.\w+DType"
    r"|numpy\.(bool_?|u?int(8|16|32|64)|float(16|32|64))"
    r"|omegaconf(\.\w+)+"
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": inert_dict,
    "collections.deque": inert_list,
}
_DICT_CLASSES = {"yacs.config.CfgNode", "fvcore.common.config.CfgNode"}


def is_harmless(name: str) -> bool:
    """Whether a global is one of the metadata classes that are replaced by an inert stand-in."""
    return name in _EXACT or _PATTERNS.fullmatch(name) is not None


def load_pickle(path: Path, *, zipped: bool) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The content of a torch checkpoint, and notes on what stood in for what.

    Raises:
        CheckpointError: damaged, no dict, or it names a global that is neither torch's nor harmless.
    """
    notes: tuple[str, ...] = ()
    try:
        payload = _load(path, zipped, {})
    except pickle.UnpicklingError:
        names = _globals(path, zipped)
        stubs = {name: _stub(name) for name in sorted(names) if is_harmless(name)}
        try:
            payload = _load(path, zipped, stubs)
        except pickle.UnpicklingError as error:
            raise CheckpointError(_refusal(path, zipped, set(stubs), error)) from error
        notes = (f"metadata read through inert stand-ins: {', '.join(stubs)}",)
    if not isinstance(payload, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(payload).__name__}, not a dict of weights; save model.state_dict()"
        )
    return payload, notes


def _stub(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    # The unpickler's SETITEM takes dict, OrderedDict and Counter by exact type.
    if name in _DICT_CLASSES:
        return OrderedDict
    return type(name.rpartition(".")[2], (Inert,), {})


def _load(path: Path, zipped: bool, stubs: Mapping[str, Callable[..., Any]]) -> Any:
    allowed: list[Any] = [(stub, name) for name, stub in stubs.items()]
    try:
        with _LOCK, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... for damaged files
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {first_line(error)}") from error


def _globals(path: Path, zipped: bool) -> set[str]:
    """Every global that the pickle names, found without running it."""
    found: set[str] = set()
    if zipped:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl"))
            with archive.open(name) as stream:
                _collect(stream, found)
        return found
    with path.open("rb") as stream:
        # The old format is a row of pickles (magic, version, system, object, keys) before the raw bytes.
        for _ in range(_LEGACY_PICKLES):
            if not _collect(stream, found):
                break
    return found


def _collect(stream: Any, found: set[str]) -> bool:
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                # Protocol 2 writes the names of Python 2, which the unpickler translates.
                module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
                found.add(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}")
    except ValueError:
        return False
    return True


def _refusal(path: Path, zipped: bool, stubs: set[str], error: Exception) -> str:
    offending: list[str] = []
    if zipped:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception:  # noqa: BLE001 - it only looks for names, and fails on what is no pickle of torch's
            unsafe = []
        offending = sorted(set(unsafe) - stubs)
    if not offending:
        offending = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if not offending:
        # torch's text begins with the advice to switch safety off; only its end says what is wrong.
        detail = str(error).partition("WeightsUnpickler error:")[2].strip() or "invalid pickle"
        return (
            f"{path} is not a checkpoint written by torch.save, or it is damaged ({detail.splitlines()[0]}); "
            "save model.state_dict() with torch.save or safetensors"
        )
    return (
        f"{path} is refused: its pickle names {', '.join(offending[:5])}, and loading that would run code; "
        "convert the weights to safetensors in a sandbox (safetensors.torch.save_file(state_dict, ...))"
    )
