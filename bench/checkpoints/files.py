"""Open a checkpoint file safely: what is it, is it whole, and what tensors does it hold."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch

from ..errors import CheckpointError
from .dcp import read_dcp
from .folders import INDEX, find_weights, read_index
from .pickles import load_pickle

_LFS = b"version https://git-lfs"
_CONVERT = "convert it to safetensors with the library that wrote it"
_FOREIGN = (
    (b"GGUF", "a GGUF file of quantised weights", "give the original weights"),
    (b"\x89HDF", "an HDF5 file (Keras)", _CONVERT),
    (b"\x08\x07\x12\x07pytorch", "an ONNX graph", "save the state_dict() of the model instead"),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
)
_TAIL = 4096
"""Bytes at the end of a file that are no zeros in one that is whole."""
_ROW = 128
"""Numbers at the end of a matrix that are not all zeros where it was written to its end."""
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class Container:
    """An opened checkpoint file.

    Attributes:
        path: the file or folder.
        format: ``safetensors``, ``torch``, or ``dcp`` for torch's distributed checkpoints.
        sha256: of the whole file; of the digests of all files, where there are several.
        payload: what the file holds: nested dicts of tensors and plain values.
        config: the ``config.json`` beside the file (Hugging Face), or nothing.
        notes: what a reader should know about how it was read.
    """

    path: Path
    format: str
    sha256: str
    payload: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_checkpoint(path: str | Path) -> Container:
    """Read a checkpoint without ever running code from it.

    safetensors files go through safetensors. Everything else goes through torch's restricted unpickler,
    memory-mapped, so that an optimizer state beside the weights is never read. A folder is read by its
    index of shards, as a distributed checkpoint of torch, or by the one file of weights in it.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it names classes that are not harmless.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = find_weights(path)
            if found.kind == "dcp":
                return _open_dcp(path)
            return _open_shards(found.path) if found.kind == "index" else _open_file(found.path)
        return _open_shards(path) if path.name.endswith(INDEX) and path.exists() else _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_shards(index: Path) -> Container:
    shards = read_index(index)
    opened = [_open_file(index.parent / name) for name in shards]
    payload: dict[str, Any] = {}
    for container, keys in zip(opened, shards.values(), strict=True):
        lacking = [key for key in keys if key not in container.payload]
        extra = [key for key in container.payload if key not in keys]
        if lacking or extra:
            word = f"lacks {lacking[0]}" if lacking else f"has {extra[0]}, which is not listed"
            raise CheckpointError(f"{container.path.name} does not agree with {index}: it {word}")
        payload |= container.payload
    return replace(
        opened[0],
        path=index,
        sha256=_combined(container.sha256 for container in opened),
        payload=payload,
        notes=tuple(dict.fromkeys(note for container in opened for note in container.notes)),
    )


def _open_dcp(folder: Path) -> Container:
    payload, files = read_dcp(folder)
    digest = _combined(map(_sha256, files))
    return Container(folder, "dcp", digest, payload, _read_config(folder / "config.json"))


def _combined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _open_file(path: Path) -> Container:
    kind = _sniff(path)
    notes: tuple[str, ...] = ()
    # Hashing and checking read the whole file; both leave the interpreter free, so they share the time.
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(_sha256, path)
        if kind == "safetensors":
            payload = _read_safetensors(path)
        else:
            if kind == "zip":
                _check_zip(path)
            payload, notes = load_pickle(path, zipped=kind == "zip")
        if kind != "zip":  # whose checksums have shown it
            _check_tail(path, payload)
        sha256 = digest.result()
    return Container(
        path=path,
        format="safetensors" if kind == "safetensors" else "torch",
        sha256=sha256,
        payload=payload,
        config=_read_config(path.parent / "config.json"),
        notes=notes,
    )


def _sniff(path: Path) -> str:
    """``safetensors``, ``zip`` or ``pickle``, from the first bytes; CheckpointError for all else."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise CheckpointError(f"{path} is no regular file; copy the checkpoint to a file first")
        size = stat.st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(_no_such_file(path)) from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes); the download or the save did not finish")
    if head.startswith(_LFS):
        raise CheckpointError(f"{path} is a git-LFS pointer, not the weights; run `git lfs pull` there")
    if head.startswith(b"PK"):
        return "zip"
    length = int.from_bytes(head[:8], "little")
    # The first byte of a header's length may be that of a pickle: the brace and a small length decide.
    if head[8:9] == b"{" and (length < _LONGEST_HEADER or head[:1] != b"\x80"):
        if length > size - 8:
            raise CheckpointError(f"{path} is a truncated safetensors file; download it again")
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page (HTML), not a checkpoint; the download link was wrong")
    for start, name, mend in _FOREIGN:
        if head.startswith(start):
            raise CheckpointError(f"{path} is {name}, not a torch checkpoint; {mend}")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise CheckpointError(f"{path} is a compressed archive; unpack it first")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive (or a checkpoint of torch < 0.4); unpack it first")
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        raise CheckpointError(f"{path} is a text file, not a checkpoint")
    raise CheckpointError(f"{path} is neither a safetensors nor a torch checkpoint")


def _no_such_file(path: Path) -> str:
    """The message for a file that is not there, with the nearest names beside it."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no checkpoint file {path}: there is no folder {folder}"
    if path.is_symlink():
        return f"{path} is a link that leads nowhere: to {path.readlink()}"
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()], n=2, cutoff=0.6)
    hint = f"; near: {', '.join(near)}" if near else ""
    return f"there is no checkpoint file {path}{hint}"


def _check_zip(path: Path) -> None:
    """Refuse what is no plain torch.save archive, and whatever does not match its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            swapped = [r for r in records if r.filename.endswith("/byteorder") and _is_swapped(archive, r)]
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from error
    names = [record.filename for record in records]
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{path} is a NumPy archive (.npz, JAX weights); convert it to safetensors first"
        )
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds code; save its state_dict() as safetensors instead"
        )
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive but not a torch checkpoint (it has no data.pkl)")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(
            f"{path} has compressed records, which torch.save never writes; it was repacked and is refused"
        )
    if swapped:
        raise CheckpointError(
            f"{path} was written on another kind of machine: its byte order is not little-endian; load and "
            "save it again where it was written, as safetensors"
        )
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise CheckpointError(f"{path} claims to hold more bytes than it has; it is refused")
    _check_sums(path, records)


def _is_swapped(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether the numbers are big-endian; not looked at where torch was told to leave out checksums."""
    return bool(record.CRC) and archive.read(record) != b"little"


def _check_sums(path: Path, records: list[zipfile.ZipInfo]) -> None:
    """A flipped bit in a weight loads without any complaint; only the archive's checksums show it."""
    with zipfile.ZipFile(path) as archive:
        for record in records:
            if not record.CRC:  # torch can be told to leave them out
                continue
            try:
                with archive.open(record) as stream:
                    while stream.read(1 << 22):
                        pass
            except zipfile.BadZipFile as error:
                raise CheckpointError(
                    f"{path} is damaged: {record.filename} fails its checksum; copy or download it again"
                ) from error


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            meta = dict(stream.metadata() or {})
            names = list(stream.keys())
            if meta.get("format") != "lmim-bench":
                return {name: stream.get_tensor(name) for name in names}
            header = {name: json.loads(meta[name]) for name in ("version", "spec", "recipe") if name in meta}
            return {"format": meta["format"], **header, "encoder": {n: stream.get_tensor(n) for n in names}}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}") from error


def _check_tail(path: Path, payload: Mapping[str, Any]) -> None:
    """Refuse a file of its full size whose end was never written.

    Tables, biases and buffers may end in zeros; a file whose last bytes are zeros and that has a weight
    matrix which ends in them too, and begins otherwise, was cut.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        if any(stream.read()):
            return
    for name, tensor in _matrices(payload, ""):
        flat = tensor.reshape(-1)
        if not flat[-_ROW:].any() and flat[:_ROW].any():
            raise CheckpointError(
                f"{path} ends in zeros in the midst of {name}; the download or the copy did not finish"
            )


def _matrices(node: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight matrices and kernels of a file, by name."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _matrices(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, torch.Tensor) and node.layout == torch.strided and not node.is_quantized:
        plain = node.is_contiguous() and not node.is_meta and node.element_size() > 1
        if plain and name.endswith("weight") and node.ndim > 1 and node.numel() > 2 * _ROW:
            yield name, node


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def storage_is_honest(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are backed by as many bytes: a view expanded from one number is not."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
