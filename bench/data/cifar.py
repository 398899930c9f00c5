"""CIFAR-10 and CIFAR-100 in their official python layout, read without trusting the pickles.

The files are pickles of a dictionary with a numpy array. They are read by an unpickler that can rebuild
exactly that - text, numbers, lists, dictionaries, numpy arrays - and refuses every other global.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..types import Array, Dataset
from .layouts import cifar_folder
from .manifest import Manifest
from .splits import ArraySplit

_PARTS = {
    10: ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "batches.meta", b"labels", b"label_names"),
    100: (["train"], ["test"], "meta", b"fine_labels", b"fine_label_names"),
}


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and plain values; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def read_batch(path: Path) -> dict[bytes, Any]:
    """The dictionary of one CIFAR file. Raises DataError naming the file where it is anything else."""
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a hostile or cut pickle can raise anything at all
        raise DataError(f"{path} is not a file of CIFAR: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a file of CIFAR: it holds a {type(content).__name__}")
    return {k.encode() if isinstance(k, str) else k: v for k, v in content.items()}


def load_cifar(root: Path, name: str, cache_dir: Path | None) -> Dataset:
    """CIFAR from ``root`` or from the official folder inside it; splits ``train`` and ``test``."""
    found = cifar_folder(root)
    if found is None:
        raise DataError(f"{root} does not hold the python batches of CIFAR-10 or CIFAR-100")
    folder, number = found
    train, test, meta, labels_key, names_key = _PARTS[number]
    for part in (*train, *test, meta):
        if not (folder / part).is_file():
            raise DataError(f"{folder / part} does not exist")
    names = read_batch(folder / meta).get(names_key)
    if not isinstance(names, list) or len(names) != number:
        raise DataError(f"{folder / meta} does not name {number} classes")
    classes = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)
    manifest = Manifest(folder, [(part, -1) for part in (*train, *test, meta)], cache_dir)
    return Dataset(
        name=name,
        kind="classification",
        fingerprint=manifest.fingerprint(classes=classes),
        classes=classes,
        splits={
            "train": _split(folder, "train", train, labels_key, number),
            "test": _split(folder, "test", test, labels_key, number),
        },
        test_split="test",
        path=str(folder),
    )


def _split(folder: Path, split: str, parts: list[str], labels_key: bytes, number: int) -> ArraySplit:
    pixels: list[Array] = []
    labels: list[Array] = []
    for part in parts:
        batch = read_batch(folder / part)
        data, found = batch.get(b"data"), np.asarray(batch.get(labels_key, ()))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(found), 3072):
            raise DataError(f"{folder / part} does not hold one row of 3072 bytes for each label")
        if found.dtype.kind != "i" or not len(found) or found.min() < 0 or found.max() >= number:
            raise DataError(f"{folder / part} holds labels that are not in 0..{number - 1}")
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(found.astype(np.int64))
    total = sum(map(len, labels))
    ids = [f"{split}/{i:05d}" for i in range(total)]
    return ArraySplit(np.ascontiguousarray(np.concatenate(pixels)), ids, np.concatenate(labels))
