"""torchvision data sets by name, read from folders in their own layouts; nothing is downloaded."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.data import load_data
from lmim_bench.bench.errors import DataError


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 7, 3), value, np.uint8)).save(path)


@pytest.fixture
def textures(tmp_path) -> Path:
    """The layout of DTD with three images in two classes."""
    root = tmp_path / "tv" / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    names = {"train1": ["woven/a.jpg", "dotted/b.jpg"], "test1": ["dotted/c.jpg"]}
    for split, images in names.items():
        (root / "labels" / f"{split}.txt").write_text("\n".join(images) + "\n")
        for i, name in enumerate(images):
            picture(root / "images" / name, 40 * i + len(split))
    return tmp_path / "tv"


def load(reference: str, tmp_path: Path, **options):
    return load_data(reference, cache_dir=tmp_path / "cache", **options)


def test_read_in_its_own_layout(textures, tmp_path):
    data = load(f"torchvision:DTD:{textures}", tmp_path)
    assert (data.name, data.kind, data.counts()) == ("dtd", "classification", {"train": 2, "test": 1})
    assert data.classes == ("dotted", "woven")
    train = data.splits["train"]
    assert train.labels.tolist() == [1, 0]
    assert train.ids == ["dtd/dtd/images/woven/a.jpg", "dtd/dtd/images/dotted/b.jpg"]
    assert train.image(1).shape == (6, 7, 3)
    assert abs(int(train.image(1)[0, 0, 0]) - 46) <= 2
    assert train.subset(np.array([1])).ids == ["dtd/dtd/images/dotted/b.jpg"]
    with pytest.raises(DataError, match="has no mask"):
        train.mask(0)


def test_fingerprint_follows_the_pixels(textures, tmp_path):
    before = load(f"torchvision:DTD:{textures}", tmp_path).fingerprint
    assert load(f"torchvision:DTD:{textures}", tmp_path).fingerprint == before
    picture(textures / "dtd" / "dtd" / "images" / "dotted" / "c.jpg", 90)
    assert load(f"torchvision:DTD:{textures}", tmp_path).fingerprint != before


def test_broken_image_is_named(textures, tmp_path):
    (textures / "dtd" / "dtd" / "images" / "woven" / "a.jpg").write_bytes(b"no image")
    split = load(f"torchvision:DTD:{textures}", tmp_path).splits["train"]
    with pytest.raises(DataError, match=r"woven/a\.jpg is broken"):
        split.image(0)


@pytest.mark.parametrize(
    "name", ["DTD", "CIFAR10", "STL10", "Flowers102", "VOCSegmentation", "SVHN", "MNIST"]
)
def test_absent_set_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=rf"torchvision:{name} is not in .*--download") as caught:
        load(f"torchvision:{name}:{tmp_path / 'none'}", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cache.torchvision"):
        load(f"torchvision:{name}", tmp_path)


def test_download_that_fails_is_one_line(tmp_path, monkeypatch):
    import torchvision

    class Offline:
        def __init__(self, root, split="train", download=False):
            assert download
            raise OSError("network\nunreachable")

    monkeypatch.setattr(torchvision.datasets, "DTD", Offline)
    with pytest.raises(DataError, match=r"could not be downloaded into .*: network unreachable"):
        load("torchvision:DTD", tmp_path, download=True)


def aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707\n727\n")
    for split in ("trainval", "test"):
        (folder / f"images_variant_{split}.txt").write_text(f"{split}0 707\n{split}1 727\n")
        for i in range(2):
            picture(folder / "images" / f"{split}{i}.jpg", i)


def food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "meta" / f"{split}.json").write_text(
            f'{{"pie": ["pie/{split}"], "rice": ["rice/{split}"]}}'
        )
        for name in ("pie", "rice"):
            picture(folder / "images" / name / f"{split}.jpg", 1)


def pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split in ("trainval", "test"):
        lines = [f"{breed}_{split} {i} 1 1\n" for i, breed in enumerate(("Bengal", "Beagle"), 1)]
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
        for breed in ("Bengal", "Beagle"):
            picture(folder / "images" / f"{breed}_{split}.jpg", 1)


def signs(root: Path) -> None:
    for name in ("00000", "00001"):
        picture(root / "gtsrb" / "GTSRB" / "Training" / name / "0.ppm", 1)
        picture(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{name}.ppm", 1)
    (root / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;0\n00001.ppm;1\n")


def class_folders(*parts: str, classes: tuple[str, str], file: str = "0.png") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for part in parts:
            for name in classes:
                picture(root / part / name / file, 1)

    return write


IN_FILES: dict[str, Callable[[Path], None]] = {
    "Country211": class_folders("country211/train", "country211/test", classes=("AD", "AE")),
    "FGVCAircraft": aircraft,
    "Food101": food,
    "GTSRB": signs,
    "Imagenette": class_folders(
        "imagenette2/train", "imagenette2/val", classes=("n01440764", "n02102040"), file="0.jpeg"
    ),
    "OxfordIIITPet": pets,
    "RenderedSST2": class_folders(
        "rendered-sst2/train", "rendered-sst2/test", classes=("negative", "positive")
    ),
}


@pytest.mark.parametrize("name", IN_FILES)
def test_sets_of_files_are_told_apart_by_them(name, tmp_path, monkeypatch):
    root = tmp_path / "tv"
    IN_FILES[name](root)
    data = load(f"torchvision:{name}:{root}", tmp_path)
    for split in data.splits.values():
        assert len(split) == 2
        assert split.labels.tolist() == [0, 1]
        assert all((root / one).is_file() for one in split.ids)
    first = root / data.splits[data.test_split].ids[0]
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert load(f"torchvision:{name}:{root}", tmp_path).fingerprint != data.fingerprint
    with pytest.raises(DataError, match=rf"{first.name} is broken"):
        data.splits[data.test_split].image(0)


def test_every_listed_set_keeps_files_or_pixels_where_they_are_looked_for():
    """Those too that cannot be written here (archives, matrices, checksums)."""
    import inspect

    import torchvision

    from lmim_bench.bench.data.torchvision_sets import _FILES, SPLITS

    for name in SPLITS:
        lines = "".join(
            inspect.getsource(kind)
            for kind in getattr(torchvision.datasets, name).__mro__
            if kind.__module__.startswith("torchvision")
        )
        assert any(re.search(rf"self\.{kept}\b.* = ", lines) for kept in (*_FILES, "data")), name


def test_a_set_that_names_neither_files_nor_pixels_is_refused(tmp_path, monkeypatch):
    import torchvision

    class Opaque(InMemory):
        def __init__(self, root, train=True, download=False):
            super().__init__(root, train, download)
            self._elsewhere = self.__dict__.pop("data")

        def __len__(self):
            return len(self._elsewhere)

    monkeypatch.setattr(torchvision.datasets, "MNIST", Opaque)
    with pytest.raises(DataError, match="torchvision:Opaque names neither its files nor its pixels"):
        load("torchvision:MNIST", tmp_path)


class InMemory:
    """What MNIST and its like are to a caller: ``train``, ``data``, ``targets``."""

    def __init__(self, root, train=True, download=False):
        self.data = np.full((4 if train else 2, 5, 5), 7 if train else 9, np.uint8)
        self.targets = [0, 1, 1, 0] if train else [1, 0]
        self.classes = ["0 - zero", "1 - one"]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return Image.fromarray(self.data[i]), self.targets[i]


def test_in_memory_sets(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "MNIST", InMemory)
    data = load("torchvision:MNIST", tmp_path)
    assert data.counts() == {"train": 4, "test": 2}
    assert data.splits["train"].image(0).shape[2:] == (3,)
    assert data.splits["test"].labels.tolist() == [1, 0]
    assert data.limited(2).splits["train"].labels.tolist() in ([0, 1], [1, 0])
    with pytest.raises(DataError, match="has the splits train and test, no 'val'"):
        load("torchvision:MNIST", tmp_path, test="val")
    monkeypatch.setattr(InMemory, "__getitem__", lambda self, i: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(DataError, match="train/000001 is broken: cut"):
        data.splits["train"].image(1)


def test_every_listed_name_is_a_class_of_torchvision_with_those_splits():
    import inspect

    import torchvision

    from lmim_bench.bench.data.torchvision_sets import SPLITS, _arguments

    for name, splits in SPLITS.items():
        parameters = inspect.signature(getattr(torchvision.datasets, name)).parameters
        for split in splits:
            assert set(_arguments(name, split)) <= set(parameters) or "kwargs" in parameters, name
