"""Data sets of torchvision by name: ``torchvision:NAME[:ROOT]``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..cache import cache_folder
from ..errors import DataError, did_you_mean
from ..references import at_home
from ..types import Array, DataKind, Dataset
from .manifest import Manifest
from .reading import not_read, read_image, whole_files_only
from .splits import Unmasked

SPLITS: dict[str, tuple[str, str]] = {
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "Country211": ("train", "test"),
    "DTD": ("train", "test"),
    "EMNIST": ("train", "test"),
    "FGVCAircraft": ("trainval", "test"),
    "FashionMNIST": ("train", "test"),
    "Flowers102": ("train", "test"),
    "Food101": ("train", "test"),
    "GTSRB": ("train", "test"),
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "KMNIST": ("train", "test"),
    "MNIST": ("train", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "RenderedSST2": ("train", "test"),
    "STL10": ("train", "test"),
    "SVHN": ("train", "test"),
    "StanfordCars": ("train", "test"),
    "USPS": ("train", "test"),
}
"""Classification sets with the train and test split that are used unless others are named."""

SEGMENTATION = "VOCSegmentation"
_FILES = ("_image_files", "_images", "_samples", "samples")
"""Where torchvision's classes keep the paths of their images, alone or each before its label."""
_EXTRA_ARGUMENTS = {"EMNIST": {"split": "balanced"}}
_FAILURES = (RuntimeError, OSError, ValueError, EOFError)


@dataclass(eq=False)
class TorchvisionSplit(Unmasked):
    """A split that torchvision finds; decoded on access. Where it lies in files, ids are their paths below
    ``root``, which is None for others.
    """

    source: Any
    root: Path | None
    index: Array
    ids: Sequence[str]
    labels: Array | None

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> Array:
        """The decoded image, RGB, uint8 (H, W, 3). Raises DataError naming it where it is broken."""
        if self.root is not None:
            return read_image(self.root / self.ids[i])
        try:
            with whole_files_only():
                image: Image.Image = self.source[int(self.index[i])][0]
                return np.asarray(image.convert("RGB"))
        except (*_FAILURES, SyntaxError) as error:
            raise not_read(self.ids[i], error) from error

    def subset(self, index: Array) -> TorchvisionSplit:
        """The split made of these positions, in this order."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, index=self.index[index], ids=[self.ids[i] for i in index], labels=labels)


def parse(reference: str) -> tuple[str, str | None]:
    """Name and root of ``torchvision:NAME[:ROOT]``. Raises DataError with the nearest known name."""
    _, name, *rest = reference.split(":", 2)
    known = [*SPLITS, SEGMENTATION]
    if name not in known:
        raise DataError(f"there is no torchvision data set {name!r} here. {did_you_mean(name, known)}")
    return name, rest[0] if rest and rest[0] else None


def kind_of(reference: str) -> DataKind:
    """The kind of the data set of a reference."""
    return "segmentation" if parse(reference)[0] == SEGMENTATION else "classification"


def load_torchvision(
    reference: str,
    name: str | None,
    train: str | None,
    test: str | None,
    void: Sequence[int] | None,
    classes: Sequence[str] | None,
    download: bool,
    cache_dir: Path | None,
) -> Dataset:
    """Read a torchvision data set from its root (``<cache>/torchvision`` unless given).

    CIFAR and VOC go through this package's own readers once the files are there.

    Raises:
        DataError: an unknown name, the files are not there and were not, or could not be, downloaded, or
            nothing says what a set holds.
    """
    class_name, given = parse(reference)
    root = at_home(given) if given else cache_folder(cache_dir) / "torchvision"
    name = name or class_name.lower()
    if class_name == SEGMENTATION:
        from .segmentation import load_voc

        folder = root / "VOCdevkit" / "VOC2012"
        if download and not folder.is_dir():
            _open(class_name, root, {"image_set": "train"}, download)
        if not folder.is_dir():
            raise _absent(class_name, root, f"{folder} does not exist")
        return load_voc(folder, name, train, test, void, classes, cache_dir)
    if class_name.startswith("CIFAR"):
        from .cifar import load_cifar
        from .layouts import CIFAR_FOLDERS, only_splits

        folder = root / CIFAR_FOLDERS[int(class_name[5:])]
        if download and not folder.is_dir():
            _open(class_name, root, {"train": True}, download)
        if not folder.is_dir():
            raise _absent(class_name, root, f"{folder} does not exist")
        only_splits(reference, (train, "train"), (test, "test"))
        return load_cifar(folder, name, cache_dir)
    train, test = train or SPLITS[class_name][0], test or SPLITS[class_name][1]
    sources = {
        split: _open(class_name, root, _arguments(class_name, split), download) for split in (train, test)
    }
    splits = {split: _split(source, split, root) for split, source in sources.items()}
    names = tuple(map(str, _class_names(sources[train], splits[train])))
    digest = hashlib.sha256()
    for split, source in sources.items():
        digest.update(f"{split}\0{_identity(source, splits[split], root, cache_dir)}\n".encode())
    return Dataset(
        name=name,
        kind="classification",
        fingerprint=digest.hexdigest(),
        classes=names,
        splits=splits,
        train_split=train,
        test_split=test,
        path=str(root),
    )


def _arguments(class_name: str, split: str) -> dict[str, Any]:
    import torchvision

    accepted = inspect.signature(getattr(torchvision.datasets, class_name)).parameters
    extra = _EXTRA_ARGUMENTS.get(class_name, {})
    if "split" in accepted and "split" not in extra:
        return {"split": split, **extra}
    if split not in ("train", "test"):
        raise DataError(f"torchvision:{class_name} has the splits train and test, no {split!r}")
    return {"train": split == "train", **extra}


def _open(class_name: str, root: Path, arguments: dict[str, Any], download: bool) -> Any:
    import torchvision

    build = getattr(torchvision.datasets, class_name)
    if "download" in inspect.signature(build).parameters:
        arguments = {**arguments, "download": download}
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        return build(str(root), **arguments)
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if download:
            raise DataError(
                f"torchvision:{class_name} could not be downloaded into {root}: {reason}"
            ) from error
        raise _absent(class_name, root, reason) from error


def _absent(class_name: str, root: Path, reason: str) -> DataError:
    return DataError(
        f"torchvision:{class_name} is not in {root} ({reason}); give its folder as "
        f"torchvision:{class_name}:ROOT, or fetch it with --download"
    )


def _split(source: Any, split: str, root: Path) -> TorchvisionSplit:
    paths = _paths(source)
    if paths is None:
        ids = [f"{split}/{i:06d}" for i in range(len(source))]
    else:
        ids = [p.relative_to(root).as_posix() if p.is_relative_to(root) else str(p) for p in paths]
    where = None if paths is None else root
    return TorchvisionSplit(source, where, np.arange(len(source)), ids, _labels(source))


def _paths(source: Any) -> list[Path] | None:
    for attribute in _FILES:
        found = getattr(source, attribute, None)
        if isinstance(found, (list, tuple)) and len(found) == len(source):
            return [Path(entry[0] if isinstance(entry, (list, tuple)) else entry) for entry in found]
    return None


def _labels(source: Any) -> Array:
    for attribute in ("targets", "_labels", "labels"):
        found = getattr(source, attribute, None)
        if found is not None and len(found) == len(source):
            return np.asarray(found, dtype=np.int64)
    samples = getattr(source, "_samples", None) or getattr(source, "samples", None)
    if samples is not None:
        return np.asarray([label for _, label in samples], dtype=np.int64)
    return np.asarray([source[i][1] for i in range(len(source))], dtype=np.int64)


def _class_names(source: Any, split: TorchvisionSplit) -> Sequence[Any]:
    found = getattr(source, "classes", None)
    number = int(split.labels.max()) + 1 if split.labels is not None else 0
    if found is not None and len(found) >= number:
        return [c[0] if isinstance(c, tuple) else c for c in found]
    return [f"class {i}" for i in range(number)]


def _identity(source: Any, split: TorchvisionSplit, root: Path, cache_dir: Path | None) -> str:
    """What stands for the contents: the files where there are files, else the decoded array.

    Raises:
        DataError: there is neither.
    """
    labels = [-1] * len(split) if split.labels is None else split.labels.tolist()
    if split.root is not None:
        return Manifest(root, list(zip(split.ids, labels, strict=True)), cache_dir).fingerprint()
    pixels = np.ascontiguousarray(np.asarray(getattr(source, "data", np.empty(0))))
    if not pixels.size:
        raise DataError(
            f"torchvision:{type(source).__name__} names neither its files nor its pixels, so that changed "
            "images would be taken for these; name a folder of its images"
        )
    digest = hashlib.sha256(f"{len(split)}\0{pixels.shape}\0{labels}".encode())
    digest.update(pixels.view(np.uint8).data)
    return digest.hexdigest()
