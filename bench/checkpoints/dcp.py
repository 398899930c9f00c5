"""Folders of torch's distributed checkpoints (``.metadata`` and ``*.distcp``), read without running code.

torch reads the table of contents by a plain ``pickle.load``. Here a fixed list of its own class names is
answered by inert stand-ins, which keep the data, and every other name is refused. The tensors themselves are
little torch.save archives in the data files, and go through the restricted unpickler like any other.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from .family import TRAINING_STATE
from .pickles import Inert

METADATA = ".metadata"
_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
}
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _Contents(pickle.Unpickler):
    """Answers names of torch's metadata by inert classes; nothing else can be named."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return type(name, (Inert,), {})
        if (module, name) in (("torch", "Size"), ("collections", "OrderedDict")):
            return tuple if name == "Size" else dict
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_dcp(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The tensors of a distributed checkpoint as nested dicts, and the files that they are in.

    State of the training (optimizers) is not read: its tensors are on the device ``meta``.

    Raises:
        CheckpointError: the table of contents is damaged or names anything but torch's own metadata, or a
            tensor is not covered by its pieces.
    """
    try:
        with (folder / METADATA).open("rb") as stream:
            contents = _state(_Contents(stream).load())
        wanted, stored = contents["state_dict_metadata"], contents["storage_data"]
        pieces: dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]] = {}
        for index, info in stored.items():
            where = _state(index)
            pieces.setdefault(where["fqn"], []).append((tuple(where.get("offset") or ()), _state(info)))
        tensors = {name: _state(entry) for name, entry in wanted.items() if "size" in _state(entry)}
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / METADATA} is not the table of contents of a torch distributed checkpoint, or is not "
            f"safe ({error}); save the weights with torch.save instead"
        ) from error
    payload: dict[str, Any] = {}
    files = {folder / METADATA}
    for name, entry in tensors.items():
        first, dot, rest = name.partition(".")
        if first in TRAINING_STATE:
            tensor = torch.empty(tuple(entry["size"]), device="meta")
        else:
            chunks = list(_chunks(folder, name, pieces.get(name, [])))
            files |= {path for path, _, _ in chunks}
            tensor = _assemble(name, tuple(entry["size"]), [(offset, part) for _, offset, part in chunks])
        if dot:
            payload.setdefault(first, {})[rest] = tensor
        else:
            payload[name] = tensor
    return payload, sorted(files)


def _state(thing: Any) -> Mapping[str, Any]:
    state = getattr(thing, "state", {})
    if not isinstance(state, Mapping):
        raise ValueError("an entry has no fields")
    return state


def _chunks(
    folder: Path, name: str, pieces: list[tuple[tuple[int, ...], Mapping[str, Any]]]
) -> Iterator[tuple[Path, tuple[int, ...], torch.Tensor]]:
    for offset, info in pieces:
        path = folder / str(info["relative_path"])
        if path.parent.resolve() != folder.resolve():
            raise CheckpointError(f"{folder} names a file outside of itself for {name}; it is refused")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{name} in {path} is compressed or encrypted, which is not read")
        try:
            with path.open("rb") as stream:
                stream.seek(info["offset"])
                archive = io.BytesIO(stream.read(info["length"]))
            part = torch.load(archive, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} lacks {path.name}, which holds {name}") from error
        except Exception as error:  # torch raises many kinds for damaged archives
            raise CheckpointError(f"{name} in {path} cannot be read: {first_line(error)}") from error
        if not isinstance(part, torch.Tensor):
            raise CheckpointError(f"{name} in {path} is no tensor")
        yield path, offset, part


def _assemble(
    name: str, size: tuple[int, ...], parts: list[tuple[tuple[int, ...], torch.Tensor]]
) -> torch.Tensor:
    """One tensor from its pieces, each at its offset."""
    if len(parts) == 1 and tuple(parts[0][1].shape) == size:
        return parts[0][1]
    if not parts or math.prod(size) != sum(part.numel() for _, part in parts):
        raise CheckpointError(f"{name} is not covered by its pieces; parts of the checkpoint are missing")
    whole = torch.empty(size, dtype=parts[0][1].dtype)
    seen = torch.zeros(size, dtype=torch.bool)
    for offset, part in parts:
        where = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        if whole[where].shape != part.shape:
            raise CheckpointError(f"a piece of {name} lies outside of it; the checkpoint is damaged")
        whole[where] = part
        seen[where] = True
    if not seen.all():
        raise CheckpointError(f"{name} is not covered by its pieces; parts of the checkpoint are missing")
    return whole
