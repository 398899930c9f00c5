"""Data sets: folders of a known layout, torchvision sets by name, and the embedded scenes.

Nothing here imports torch before a torchvision set is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DataError, did_you_mean
from ..references import at_home
from ..types import DataKind, Dataset
from .layouts import LAYOUTS, SHARD_SUFFIXES, Detected, detect, only_splits, require_folder

if TYPE_CHECKING:
    from .unlabelled import Unlabelled

__all__ = [
    "CatalogueRow",
    "Detected",
    "catalogue",
    "detect_layout",
    "is_embedded",
    "load_data",
    "load_unlabelled",
]

_EMBEDDED: dict[str, tuple[str, DataKind, str]] = {
    "scenes": ("imagefolder", "classification", "12 classes of textured objects, generated"),
    "scenes-seg": ("segmentation", "segmentation", "several objects a picture, exact masks, generated"),
    "scenes-video": ("davis2017", "video", "moving, occluding, deforming objects, generated"),
}
_TORCHVISION = "torchvision:"


class CatalogueRow(NamedTuple):
    """One line of ``lmim-bench data``."""

    reference: str
    kind: DataKind
    what: str


def catalogue() -> list[CatalogueRow]:
    """What can be named as data: the embedded sets, the layouts of folders, the torchvision sets."""
    from .torchvision_sets import SEGMENTATION, SPLITS

    rows = [CatalogueRow(name, kind, what) for name, (_, kind, what) in _EMBEDDED.items()]
    rows += [CatalogueRow(f"DIR ({name})", layout.kind, layout.holds) for name, layout in LAYOUTS.items()]
    rows += [
        CatalogueRow(f"{_TORCHVISION}{name}", "classification", f"scored on {test}, trained on {train}")
        for name, (train, test) in SPLITS.items()
    ]
    rows.append(CatalogueRow(f"{_TORCHVISION}{SEGMENTATION}", "segmentation", "VOC 2012, scored on val"))
    return rows


def is_embedded(reference: str | Path) -> bool:
    """Whether a reference names a generated data set."""
    return str(reference) in _EMBEDDED


def detect_layout(reference: str | Path) -> Detected:
    """What a reference is: (layout, kind, reason).

    Raises:
        DataError: a folder that is not there, has no known layout, or could have several.
    """
    text = str(reference)
    if not text:  # a variable that was not set, most often; as a path it is the working folder
        raise DataError("the name of a data set is empty; name a folder or an embedded set")
    if text in _EMBEDDED:
        return Detected("embedded", _EMBEDDED[text][1], "an embedded data set")
    if text.startswith(_TORCHVISION):
        from .torchvision_sets import kind_of

        return Detected("torchvision", kind_of(text), "a torchvision data set")
    root = at_home(text)
    if not root.exists() and "/" not in text and "\\" not in text:
        raise DataError(
            f"there is no folder and no embedded data set {text!r}. {did_you_mean(text, _EMBEDDED)}"
        )
    return detect(root)


def load_data(
    reference: str | Path,
    *,
    name: str | None = None,
    kind: DataKind | None = None,
    layout: str | None = None,
    train: str | None = None,
    test: str | None = None,
    void: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
    cache_dir: Path | None = None,
) -> Dataset:
    """Open a data set; its images are decoded later, on access.

    Args:
        reference: a folder, ``torchvision:NAME[:ROOT]``, or an embedded set (``scenes``, ``scenes-seg``,
            ``scenes-video``).
        name: how it is called in results; the folder's name unless given.
        kind: what it must be; an error where it is something else.
        layout: one of ``LAYOUTS`` for a folder whose layout is not to be guessed; ``davis2016`` or
            ``davis2017`` says which of the two, and ``davis:Full-Resolution`` picks the resolution.
        train: the split to train on.
        test: the split to score; for video the list below ``ImageSets``, ``2017/val``.
        void: labels of masks that are no class; 255 unless given here or in ``dataset.yaml``.
        classes: names of the labels 0, 1, ... of masks; found in the folder or the masks unless given.
        download: fetch a torchvision set that is not there.
        cache_dir: where generated and derived things are kept, the user's cache folder unless given.

    Raises:
        DataError: missing, of no known layout, inconsistent, not of the asked ``kind``, or classification
            with one split for both.
    """
    reference = str(reference)
    embedded, of_torchvision = reference in _EMBEDDED, reference.startswith(_TORCHVISION)
    if embedded:
        found = Detected(*_EMBEDDED[reference])
    else:
        found = given_layout(layout) if layout and not of_torchvision else detect_layout(reference)
    if kind and found.kind != kind:
        raise DataError(f"{reference} is a {found.kind} data set ({found.layout}), not one for {kind}")
    if (void is not None or classes is not None) and found.kind != "segmentation":
        raise DataError(f"{reference} is a {found.kind} data set; void and classes are for masks of classes")
    if of_torchvision:
        from .torchvision_sets import load_torchvision

        return _scored_on_others(
            load_torchvision(reference, name, train, test, void, classes, download, cache_dir)
        )
    if embedded:
        from .embedded import ensure_scenes

        root, name = ensure_scenes(cache_dir) / reference, name or reference
    else:
        root = at_home(reference)
        name = name or root.resolve().name
    return _scored_on_others(_load_folder(found, root, name, train, test, void, classes, cache_dir))


def load_unlabelled(
    reference: str | Path, name: str | None = None, cache_dir: Path | None = None
) -> Unlabelled:
    """Every image below a folder as one split ``train`` without labels, whatever the layout: for pretraining.

    ``load_data`` never comes here by itself; whoever needs no labels falls back to it where a folder has no
    known layout or no test split. Images lie loose or in shards (``*.tar``, ``*.parquet``). Left out, and of
    loose images counted, is what is set apart for a test (a split ``test`` or ``val`` beside a split
    ``train``, at any depth) and what is no image but a mask (folders ``masks``, ``annotations``, ``gtFine``
    and the like beside the images).

    Raises:
        DataError: no such folder, no image below it, or loose images and shards side by side.
    """
    from .unlabelled import load_every_image

    root = at_home(reference)
    require_folder(root)
    return load_every_image(root, name or root.resolve().name, cache_dir)


def _scored_on_others(data: Dataset) -> Dataset:
    """The data set. Raises DataError where images with labels would be scored against themselves."""
    if data.kind == "classification" and data.train_split == data.test_split:
        raise DataError(
            f"{data.name}: train and test are both {data.test_split!r}, and each image would be scored "
            "against itself; name two splits, or divide the images into two"
        )
    return data


def given_layout(layout: str) -> Detected:
    """The layout of a suite's ``layout:``. Raises DataError where there is none of that name."""
    family = "davis" if layout.startswith("davis") else layout
    stem = layout.partition(":")[0]
    if family not in LAYOUTS or (family == "davis" and stem not in ("davis", "davis2016", "davis2017")):
        known = [*LAYOUTS, "davis2016", "davis2017"]
        raise DataError(f"there is no layout {layout!r}. {did_you_mean(layout, known)}")
    return Detected(layout, LAYOUTS[family].kind, "as given")


def _load_folder(
    found: Detected,
    root: Path,
    name: str,
    train: str | None,
    test: str | None,
    void: Sequence[int] | None,
    classes: Sequence[str] | None,
    cache_dir: Path | None,
) -> Dataset:
    require_folder(root)
    what = f"{root}: the layout {found.layout}"
    if found.kind == "segmentation":
        from . import segmentation

        if found.layout == "segmentation-flat":
            only_splits(what, (train, "all"), (test, "all"))
            return segmentation.load_flat(root, name, void, classes, cache_dir)
        load = segmentation.load_voc if found.layout == "voc" else segmentation.load_split_folders
        return load(root, name, train, test, void, classes, cache_dir)
    if found.kind == "video":
        from .video import load_davis

        only_splits(what, (train, None))
        return load_davis(root, name, found.layout, test, cache_dir)
    if found.layout == "cifar":
        from .cifar import load_cifar

        only_splits(what, (train, "train"), (test, "test"))
        return load_cifar(root, name, cache_dir)
    if found.layout in SHARD_SUFFIXES:
        from .shard_sets import load_shards

        return load_shards(root, name, found.layout, train, test, cache_dir)
    from .classification import load_image_folder

    return load_image_folder(root, name, train, test, cache_dir)
