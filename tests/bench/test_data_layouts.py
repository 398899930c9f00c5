"""Layouts of classification and segmentation folders: what is read, and what is refused with which line."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.data import catalogue, detect_layout, is_embedded, load_data
from lmim_bench.bench.data.layouts import detect
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import Dataset


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "eel")):
            for i in range(count):
                picture(root / split / name / f"{i}.png", 10 * label + i)
    return root


def load(reference, tmp_path, **options):
    return load_data(str(reference), cache_dir=tmp_path / "cache", **options)


# ------------------------------------------------------------------------------------------- ImageFolder


def test_image_folder_agrees_with_torchvision(folder, tmp_path):
    from torchvision.datasets import ImageFolder

    data = load(folder, tmp_path)
    assert (data.name, data.kind, data.train_split, data.test_split) == (
        "pets",
        "classification",
        "train",
        "val",
    )
    for split in ("train", "val"):
        theirs, ours = ImageFolder(folder / split), data.splits[split]
        assert list(data.classes) == theirs.classes
        assert ours.labels.tolist() == theirs.targets
        assert [str(folder / i) for i in ours.ids] == [path for path, _ in theirs.samples]
        for i in range(len(ours)):
            assert np.array_equal(ours.image(i), np.asarray(theirs[i][0]))


def test_hidden_folders_and_links_that_lead_back_give_no_image(folder, tmp_path):
    picture(folder / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "train" / "cat" / "again").symlink_to(".")
    assert load(folder, tmp_path).counts() == {"train": 9, "val": 6}
    (folder / "train" / "train").symlink_to(folder / "train")  # ln -s called twice
    with pytest.raises(DataError, match=r"train/train is a link to .*; remove the link"):
        load(folder, tmp_path)


def test_a_name_that_is_not_utf8_is_named(folder, tmp_path):
    picture(folder / "train" / "cat" / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(DataError, match=r"train/cat/caf\\xe9\.png cannot be used: its name is not UTF-8"):
        load(folder, tmp_path)


def test_test_split_is_preferred_to_val_and_a_name_overrides(folder, tmp_path):
    picture(folder / "test" / "cat" / "t.png")
    assert load(folder, tmp_path).counts() == {"train": 9, "test": 1}
    assert load(folder, tmp_path, test="val").counts() == {"train": 9, "val": 6}
    with pytest.raises(DataError, match=r"no split 'holdout'.*test/, train/, val/"):
        load(folder, tmp_path, test="holdout")


def test_unlabelled_test_folder_is_passed_over(folder, tmp_path):
    picture(folder / "test" / "0001.png")
    assert load(folder, tmp_path).test_split == "val"


def test_one_split_alone_is_refused(tmp_path):
    picture(tmp_path / "x" / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"has no test split \(test, testing, val.*it holds train/"):
        load(tmp_path / "x", tmp_path)
    picture(tmp_path / "y" / "val" / "cat" / "0.png")
    with pytest.raises(DataError, match="has no train split"):
        load(tmp_path / "y", tmp_path)


def test_class_sets_must_agree(folder, tmp_path):
    picture(folder / "test" / "yak" / "0.png")
    with pytest.raises(
        DataError, match=r"test/yak is not a .* others; with test: val in a suite, val/ is sc"
    ):
        load(folder, tmp_path)
    picture(folder / "val" / "yak" / "0.png")
    with pytest.raises(DataError, match=r"val/yak is not a class of the train split; it has 3 others$"):
        load(folder, tmp_path, test="val")


def test_classes_of_test_that_are_all_novel_follow_those_of_train(folder, tmp_path):
    before = load(folder, tmp_path)
    for name in ("yak", "ant", "zebu"):
        for i in range(2):
            picture(folder / "test" / name / f"{i}.png", i)
    (folder / "val").rename(folder / "unused")  # its classes are train's, and it would be scored instead
    data = load(folder, tmp_path)
    assert data.classes == ("cat", "dog", "eel", "ant", "yak", "zebu")
    assert data.splits["train"].labels.tolist() == before.splits["train"].labels.tolist()
    assert data.splits["test"].labels.tolist() == [3, 3, 4, 4, 5, 5]
    assert [Path(name).parent.name for name in data.splits["test"].ids[::2]] == ["ant", "yak", "zebu"]
    few = data.limited(2).splits
    assert [len(few["train"]), len(few["test"])] == [2, 2]
    assert len(set(few["test"].labels.tolist())) == 2
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no image"):
        load(folder, tmp_path)


def test_classes_that_are_spelled_otherwise_in_test_are_not_novel(folder, tmp_path):
    for name in ("cat", "dog", "eel"):
        (folder / "val" / name).rename(folder / "val" / name.upper())
    with pytest.raises(DataError, match=r"val/CAT and .*train/cat differ in their spelling alone"):
        load(folder, tmp_path)


def test_images_at_any_depth_are_of_the_class_folder(folder, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog", "eel"):
            below = folder / split / name / "images"
            below.mkdir()
            for path in (folder / split / name).glob("*.png"):
                path.rename(below / path.name)
    data = load(folder, tmp_path)
    assert data.counts() == {"train": 9, "val": 6}
    assert data.splits["val"].labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("inside", ["", "images/"])
def test_images_that_lie_in_no_class_folder_are_counted(folder, tmp_path, inside):
    (folder / "val").rename(folder / "val-sorted")
    for i in range(2):
        picture(folder / "val" / inside / f"{i}.png")
    flat = rf"val/{inside} has 2 loose images and no class folders: sort them into val/<class>/"
    with pytest.raises(DataError, match=rf"has no test split \(.*\); {flat}\."):
        load(folder, tmp_path)
    with pytest.raises(DataError, match=rf"has no split 'val' with class folders; {flat}$"):
        load(folder, tmp_path, test="val")


@pytest.mark.parametrize("listed", ["metadata.csv", "metadata.jsonl"])
def test_labels_of_loose_images_that_are_not_read_are_named(tmp_path, listed):
    for split in ("train", "test"):
        picture(tmp_path / "x" / split / "0.png")
        (tmp_path / "x" / split / listed).write_text("")
    with pytest.raises(DataError, match=rf"no known layout: train/ has 1 loose .* \({listed} is not read\)"):
        load(tmp_path / "x", tmp_path)


@pytest.mark.parametrize("link", ["other", "train/yak", "train/cat/more"])
def test_links_that_lead_nowhere_are_named(folder, tmp_path, link):
    (folder / link).symlink_to("/nowhere/at/all")
    with pytest.raises(DataError, match=rf"{link} is a link to /nowhere/at/all, which does not exist; mend"):
        load(folder, tmp_path)


def test_images_are_not_scored_against_themselves(folder, roads, tmp_path):
    for split in ("train", "val"):
        with pytest.raises(
            DataError, match=rf"pets: train and test are both '{split}', and each image would"
        ):
            load(folder, tmp_path, train=split, test=split)
    assert load(roads, tmp_path, train="val", test="val").kind == "segmentation", "has no neighbours to find"


def test_class_absent_from_test_keeps_the_numbering(folder, tmp_path):
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    (folder / "val" / "cat").rmdir()
    data = load(folder, tmp_path)
    assert data.splits["val"].labels.tolist() == [1, 1, 2, 2]
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="train/empty holds no image"):
        load(folder, tmp_path)


def test_broken_image_is_named_on_access_only(folder, tmp_path):
    (folder / "train" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    split = load(folder, tmp_path).splits["train"]
    assert split.image(0).shape == (6, 8, 3)
    with pytest.raises(DataError, match=r"train/cat/1\.png is broken"):
        split.image(1)
    with pytest.raises(DataError, match="has no mask"):
        split.mask(0)


def test_a_limit_below_the_number_of_classes_leaves_no_split_empty():
    pixels = np.zeros((8, 4, 4, 3), np.uint8)
    names = [str(i) for i in range(8)]
    splits = {
        "train": ArraySplit(pixels, names, np.arange(8) % 5),
        "test": ArraySplit(pixels, names, np.full(8, 3)),
    }
    data = Dataset("few", "classification", "few", splits=splits, classes=("a", "b", "c", "d", "e"))
    for seed in range(5):
        assert data.limited(1, seed).counts() == {"train": 1, "test": 1}


def test_limited_is_balanced_and_keeps_images_with_their_labels(folder, tmp_path):
    data = load(folder, tmp_path)
    small = data.limited(6)
    split = small.splits["train"]
    assert np.bincount(split.labels).tolist() == [2, 2, 2]
    assert small.fingerprint != data.fingerprint
    for i, label in enumerate(split.labels):
        assert split.image(i)[0, 0, 0] // 10 == label
        assert data.classes[label] in split.ids[i]


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_images_than_classes_are_of_the_same_classes_in_every_split(folder, tmp_path, n):
    picture(folder / "train" / "cat" / "one-more.png")  # splits of other lengths are drawn in another order
    data = load(folder, tmp_path)
    drawn = [[set(part.labels.tolist()) for part in data.limited(n, s).splits.values()] for s in range(20)]
    assert all(train == test and len(train) == n for train, test in drawn)
    assert len(set(map(frozenset, (train for train, _ in drawn)))) == 3, "which ones is drawn"
    few = [data.limited(i, seed=3).splits["train"].labels for i in (1, 2)]
    assert set(few[0].tolist()) < set(few[1].tolist())


def test_fewer_images_than_classes_leave_out_a_class_that_a_split_lacks(folder, tmp_path):
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    data = load(folder, tmp_path)
    for seed in range(20):
        train, val = (split.labels.tolist() for split in data.limited(2, seed).splits.values())
        assert set(val) == set(train) - {0}
        assert len(val) == 2


def test_void_and_classes_are_for_masks(folder, tmp_path):
    with pytest.raises(DataError, match="void and classes are for masks"):
        load(folder, tmp_path, void=[255])


def test_kind_must_fit(folder, tmp_path):
    with pytest.raises(DataError, match=r"is a classification data set \(imagefolder\), not one for video"):
        load(folder, tmp_path, kind="video")


# ------------------------------------------------------------------------------------------- CIFAR


def cifar10(root: Path, protocol: int = 2) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (12, 3072), dtype=np.uint8)
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    for i, name in enumerate(names):
        content = {
            b"data": rows[2 * i : 2 * i + 2],
            b"labels": [i, 9 - i],
            b"filenames": [b"a.png", b"b.png"],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    meta = {b"label_names": [f"class{i}".encode() for i in range(10)], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return rows


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches(tmp_path, protocol):
    rows = cifar10(tmp_path / "c", protocol)
    data = load(tmp_path / "c", tmp_path)
    assert data.counts() == {"train": 10, "test": 2}
    assert data.classes[3] == "class3"
    assert data.splits["train"].labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert data.splits["test"].labels.tolist() == [5, 4]
    for row, (split, i) in {3: ("train", 3), 10: ("test", 0)}.items():
        pixels = np.asarray(data.splits[split].image(i))
        for channel in range(3):
            expected = rows[row][channel * 1024 : channel * 1024 + 1024].reshape(32, 32)
            assert np.array_equal(pixels[..., channel], expected)
    again = load(tmp_path / "c" / "cifar-10-batches-py", tmp_path)
    assert again.fingerprint == data.fingerprint
    assert data.splits["train"].subset(np.array([4, 1])).labels.tolist() == [2, 9]


def test_cifar_written_by_python_2_and_old_numpy(tmp_path):
    """The official files name numpy.core and hold text where Python 3 has bytes."""
    cifar10(tmp_path / "c")
    path = tmp_path / "c" / "cifar-10-batches-py" / "test_batch"
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert load(tmp_path / "c", tmp_path).counts()["test"] == 2


class _Hostile:
    def __reduce__(self):
        return (eval, ("1/0",))


@pytest.mark.parametrize("content", [_Hostile(), {"data": _Hostile()}, [1, 2]])
def test_cifar_pickle_that_asks_for_more_is_refused(tmp_path, content):
    cifar10(tmp_path / "c")
    path = tmp_path / "c" / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="data_batch_3 is not a file of CIFAR"):
        load(tmp_path / "c", tmp_path)


def test_cifar_has_its_two_splits_alone(tmp_path):
    cifar10(tmp_path / "c")
    load(tmp_path / "c", tmp_path, train="train", test="test")
    for options in ({"test": "val"}, {"train": "test"}):
        name = next(iter(options.values()))
        with pytest.raises(DataError, match=rf"the layout cifar has no choice of the split '{name}'; it is"):
            load(tmp_path / "c", tmp_path, **options)
        with pytest.raises(DataError, match=rf"^torchvision:CIFAR10:.* has no choice of the split '{name}'"):
            load(f"torchvision:CIFAR10:{tmp_path / 'c'}", tmp_path, **options)
    with pytest.raises(DataError, match="void and classes are for masks of classes"):
        load(f"torchvision:CIFAR10:{tmp_path / 'c'}", tmp_path, classes=["a"] * 10)


def test_cifar_labels_and_shapes_are_checked(tmp_path):
    cifar10(tmp_path / "c")
    path = tmp_path / "c" / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}))
    with pytest.raises(DataError, match=r"test_batch holds labels that are not in 0\.\.9"):
        load(tmp_path / "c", tmp_path)
    path.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}))
    with pytest.raises(DataError, match="test_batch does not hold one row"):
        load(tmp_path / "c", tmp_path)


def test_two_cifars_in_one_folder_are_named(tmp_path):
    cifar10(tmp_path / "c")
    (tmp_path / "c" / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "c" / "cifar-100-python" / name).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"/c holds cifar-10-batches-py and cifar-100-python; name one of them"
    ):
        load(tmp_path / "c", tmp_path)
    assert len(load(tmp_path / "c" / "cifar-10-batches-py", tmp_path).classes) == 10


def test_cifar100_uses_the_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, fine in (("train", [99, 1]), ("test", [4, 5])):
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": fine, b"coarse_labels": [0, 0]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [f"f{i}" for i in range(100)]}, protocol=2)
    )
    data = load(folder, tmp_path)
    assert data.splits["train"].labels.tolist() == [99, 1]
    assert len(data.classes) == 100


# ------------------------------------------------------------------------------------------- segmentation


@pytest.fixture
def roads(tmp_path) -> Path:
    root = tmp_path / "roads"
    for split in ("train", "val", "test"):
        for i in range(2):
            picture(root / split / "images" / f"f{i}.jpg")
            labels = np.zeros((6, 8))
            labels[0], labels[1] = i + 1, 11
            mask(root / split / "masks" / f"f{i}.png", labels)
    return root


def test_segmentation_folders(roads, tmp_path):
    data = load(roads, tmp_path, void=[11])
    assert data.kind == "segmentation"
    assert data.counts() == {"train": 2, "test": 2, "val": 2}
    assert (data.train_split, data.test_split, data.void) == ("train", "test", (11,))
    assert data.classes == ("class 0", "class 1", "class 2")
    assert np.unique(data.splits["val"].mask(1)).tolist() == [0, 2, 11]
    assert data.splits["val"].ids == ["val/images/f0.jpg", "val/images/f1.jpg"]
    subset = data.splits["val"].subset(np.array([1]))
    assert np.array_equal(subset.mask(0), data.splits["val"].mask(1))
    assert len(load(roads, tmp_path).classes) == 12, "without a void label, 11 is a class"
    assert load(roads, tmp_path).fingerprint != data.fingerprint


def test_classes_and_void_from_the_folder(roads, tmp_path):
    (roads / "classes.txt").write_text("sky\nroad\ntree\n")
    with pytest.raises(DataError, match=r"f0\.png holds the label 11, which is neither a class nor void"):
        load(roads, tmp_path).splits["test"].mask(0)
    (roads / "dataset.yaml").write_text("classes: [sky, road, tree]\nvoid: [11]\n")
    data = load(roads, tmp_path)
    assert (data.classes, data.void) == (("sky", "road", "tree"), (11,))
    assert data.splits["test"].mask(0)[1, 0] == 11
    assert load(roads, tmp_path, classes=["a", "b", "c"], void=[11, 255]).classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("names: [a]", "may hold the fields"),
        ("void: 3", "void must be a list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_dataset_yaml_is_checked(roads, tmp_path, text, problem):
    (roads / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"dataset\.yaml.*{problem}"):
        load(roads, tmp_path)


@pytest.mark.parametrize("label", [-1, 256])
def test_void_that_no_mask_can_hold_is_refused(roads, tmp_path, label):
    with pytest.raises(DataError, match=rf"void names the label {label}, .* 0\.\.255"):
        load(roads, tmp_path, void=[255, label])
    (roads / "dataset.yaml").write_text(f"void: [{label}]\n")
    with pytest.raises(DataError, match=rf"void names the label {label}, .* 0\.\.255"):
        load(roads, tmp_path)


def test_files_that_are_alone_are_named(roads, tmp_path):
    (roads / "val" / "masks" / "f1.png").unlink()
    with pytest.raises(
        DataError, match=r"val/images/f1\.jpg has no mask: .*val/masks/f1\.png does not exist"
    ):
        load(roads, tmp_path)
    (roads / "val" / "images" / "f1.jpg").unlink()
    mask(roads / "train" / "masks" / "extra.png", np.zeros((6, 8)))
    with pytest.raises(DataError, match=r"train/masks/extra\.png has no image"):
        load(roads, tmp_path)


def test_mask_of_another_size_is_named(roads, tmp_path):
    mask(roads / "test" / "masks" / "f0.png", np.zeros((3, 3)))
    with pytest.raises(DataError, match=r"masks/f0\.png is 3x3 pixels, its image .*f0\.jpg 8x6"):
        load(roads, tmp_path).splits["test"].mask(0)


def test_two_images_of_one_stem_are_refused(roads, tmp_path):
    picture(roads / "train" / "images" / "f0.png")
    with pytest.raises(DataError, match="have the same name"):
        load(roads, tmp_path)


def test_masks_of_void_alone_are_refused(tmp_path):
    picture(tmp_path / "v" / "images" / "a.png")
    mask(tmp_path / "v" / "masks" / "a.png", np.full((6, 8), 255))
    with pytest.raises(DataError, match=r"hold no label besides void \(255\)"):
        load(tmp_path / "v", tmp_path)


def test_masks_of_one_class_are_refused(roads, tmp_path):
    """Binary masks as many tools write them: the object has the label that means void here."""
    for path in roads.rglob("masks/*.png"):
        mask(path, 255 * np.eye(6, 8))
    with pytest.raises(
        DataError, match=r"one class, the label 0 alone beside void 255: where .* of 0 and 1$"
    ):
        load(roads, tmp_path)
    for path in roads.rglob("masks/*.png"):
        mask(path, np.zeros((6, 8)))
    with pytest.raises(DataError, match=r"the masks of .*roads hold one class, the label 0 alone$"):
        load(roads, tmp_path)
    for path in roads.rglob("masks/*.png"):
        mask(path, np.eye(6, 8))
    assert load(roads, tmp_path).classes == ("class 0", "class 1")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_masks_that_compression_changed_are_refused(roads, tmp_path, suffix):
    path = roads / "val" / "masks" / "f1.png"
    Image.open(path).save(path.with_suffix(f".{suffix}"))
    path.unlink()
    with pytest.raises(
        DataError, match=rf"val/masks/f1\.{suffix} is a JPEG, and its .*; write masks as PNG$"
    ):
        load(roads, tmp_path)


def test_flat_folder_is_one_split(tmp_path):
    for name in ("b/2", "a/1"):
        picture(tmp_path / "flat" / "images" / f"{name}.png")
        mask(tmp_path / "flat" / "masks" / f"{name}.png", np.ones((6, 8)))
    data = load(tmp_path / "flat", tmp_path)
    assert data.counts() == {"all": 2}
    assert (data.train_split, data.test_split) == ("all", "all")
    assert data.splits["all"].masks == ["masks/a/1.png", "masks/b/2.png"]


@pytest.mark.parametrize("which", ["train", "test"])
def test_flat_folder_has_no_other_split(tmp_path, which):
    picture(tmp_path / "f" / "images" / "0.jpg")
    mask(tmp_path / "f" / "masks" / "0.png", np.eye(6, 8))
    assert load(tmp_path / "f", tmp_path, **{which: "all"}).counts() == {"all": 1}
    with pytest.raises(DataError, match=r"segmentation-flat has no choice of the split 'val'; it is 'all'"):
        load(tmp_path / "f", tmp_path, **{which: "val"})


def test_lists_with_a_byte_order_mark_and_lists_that_are_not_utf8(roads, tmp_path):
    listed = roads / "classes.txt"
    listed.write_bytes("sky\r\nroad\r\ncar\r\ntree".encode("utf-8-sig"))
    assert load(roads, tmp_path).classes[0] == "sky"
    listed.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8; save it as UTF-8$"):
        load(roads, tmp_path)
    (roads / "dataset.yaml").write_bytes(b"classes: [caf\xe9]")
    with pytest.raises(DataError, match=r"dataset\.yaml is not UTF-8"):
        load(roads, tmp_path)


def test_voc_lists_with_a_byte_order_mark_and_lists_that_are_not_utf8(tmp_path):
    root = tmp_path / "voc"
    picture(root / "JPEGImages" / "a.jpg")
    mask(root / "SegmentationClass" / "a.png", np.eye(6, 8))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_bytes("a\r\n".encode("utf-8-sig"))
    assert load(root, tmp_path).counts() == {"train": 1, "val": 1}
    (lists / "val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"val\.txt is not UTF-8"):
        load(root, tmp_path)


def test_segmentation_without_a_train_split(roads, tmp_path):
    for split in ("train", "test"):
        (roads / split).rename(tmp_path / split)
    data = load(roads, tmp_path)
    assert (data.counts(), data.train_split, data.test_split) == ({"val": 2}, "val", "val")


def test_voc_layout(tmp_path):
    root = tmp_path / "VOC2012"
    for i, stem in enumerate(("a", "b", "c")):
        picture(root / "JPEGImages" / f"{stem}.jpg")
        labels = np.full((6, 8), i, np.uint8)
        labels[0] = 255
        image = Image.fromarray(labels).convert("P")
        image.putdata(labels.ravel().tolist())
        image.putpalette([7, 9, 200] * 256)
        (root / "SegmentationClass").mkdir(exist_ok=True)
        image.save(root / "SegmentationClass" / f"{stem}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("c\nb\n")
    data = load(root, tmp_path)
    assert data.counts() == {"train": 1, "val": 2}
    assert (data.classes[15], len(data.classes), data.void) == ("person", 21, (255,))
    assert data.splits["val"].ids == ["JPEGImages/c.jpg", "JPEGImages/b.jpg"], "the order of the list"
    assert np.unique(data.splits["val"].mask(0)).tolist() == [2, 255]
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\n")
    moved = load(root, tmp_path)
    assert [*moved.splits["train"].ids, *moved.splits["val"].ids] == [
        *data.splits["train"].ids,
        *data.splits["val"].ids,
    ]
    assert moved.fingerprint != data.fingerprint, "the same images in the same order, divided otherwise"
    with pytest.raises(DataError, match=r"trainval\.txt does not exist"):
        load(root, tmp_path, train="trainval")
    (root / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(DataError, match=r"lists 'b', and .*SegmentationClass has no file"):
        load(root, tmp_path)
    through = load(f"torchvision:VOCSegmentation:{_devkit(root, tmp_path)}", tmp_path, test="train")
    assert through.counts() == {"train": 2}


def _devkit(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "tv" / "VOCdevkit").mkdir(parents=True)
    root.rename(tmp_path / "tv" / "VOCdevkit" / "VOC2012")
    return tmp_path / "tv"


# ------------------------------------------------------------------------------------------- detection


def test_what_layouts_are_called(folder, roads):
    assert detect_layout(folder)[:2] == ("imagefolder", "classification")
    assert detect_layout(str(roads))[:2] == ("segmentation", "segmentation")
    assert detect_layout(roads / "train").layout == "segmentation-flat"
    assert detect_layout("scenes-video")[:2] == ("embedded", "video")
    assert detect_layout("torchvision:DTD").kind == "classification"
    assert detect_layout("torchvision:VOCSegmentation").kind == "segmentation"


def test_unknown_folder_says_what_was_seen_and_what_is_known(tmp_path):
    (tmp_path / "x" / "stuff").mkdir(parents=True)
    (tmp_path / "x" / "notes.md").write_text("")
    with pytest.raises(DataError) as caught:
        detect_layout(tmp_path / "x")
    text = str(caught.value)
    assert "it holds notes.md, stuff/" in text
    for layout in ("imagefolder", "segmentation", "voc", "davis", "cifar"):
        assert layout in text
    assert "\n" not in text


def test_ambiguous_folder_is_refused_and_a_layout_settles_it(roads, tmp_path):
    for split in ("train", "test"):
        picture(roads / split / "cars" / "0.png")
    with pytest.raises(DataError, match=r"more than one layout: segmentation .* and imagefolder"):
        load(roads, tmp_path)
    assert load(roads, tmp_path, layout="segmentation").kind == "segmentation"
    assert load(roads, tmp_path, layout="imagefolder").classes == ("cars", "images", "masks")


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "labels"),
        ("image", "label"),
        ("Images", "Masks"),
        ("imgs", "gt"),
        ("images", "annotations"),
        ("image_2", "semantic_rgb"),
        ("images_png", "masks_png"),
        ("JPEGImages/one", "Annotations/one"),
    ],
)
def test_masks_are_no_class(tmp_path, images, masks):
    root = tmp_path / "x"
    for split in ("train", "val"):
        for i in range(4):
            picture(root / split / images / f"{i}.jpg")
            if i != 1:  # one image has no mask
                mask(root / split / masks / f"{i}.png", np.eye(6, 8))
    first = images.split("/")[0]
    with pytest.raises(
        DataError, match=rf"x/train looks like images \({first}/\) with masks \(.*layout: image"
    ):
        load(root, tmp_path)
    assert len(load(root, tmp_path, layout="imagefolder").classes) == 2


def test_files_of_one_name_or_names_of_masks_alone_are_classes(folder, tmp_path):
    """0.png, 1.png... lie in all class folders of the fixture; and a mask may be what a class shows."""
    for split in ("train", "val"):
        for i in range(3):
            picture(folder / split / "mask" / f"{i}.png")
            picture(folder / split / "photos" / f"of-{i}.png")
    assert load(folder, tmp_path).classes == ("cat", "dog", "eel", "mask", "photos")


def test_unknown_names(tmp_path):
    with pytest.raises(
        DataError, match=r"no folder and no embedded data set 'scene'\. Did you mean 'scenes'"
    ):
        load("scene", tmp_path)
    with pytest.raises(DataError, match=r"there is no data folder .*nowhere"):
        load(tmp_path / "nowhere", tmp_path)
    with pytest.raises(DataError, match=r"no layout 'imagefolders'\. Did you mean 'imagefolder'"):
        load(tmp_path, tmp_path, layout="imagefolders")
    with pytest.raises(DataError, match=r"no torchvision data set 'CIFAR11' here\. Did you mean 'CIFAR1"):
        load("torchvision:CIFAR11", tmp_path)


def test_catalogue_lists_everything_that_loads():
    rows = {row.reference: row.kind for row in catalogue()}
    for name in ("scenes", "scenes-seg", "scenes-video"):
        assert is_embedded(name)
        assert rows[name] == detect_layout(name).kind
    for reference, kind in rows.items():
        if reference.startswith("torchvision:"):
            assert detect_layout(reference).kind == kind


def test_a_folder_that_is_not_there_is_told_with_the_nearest_name(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(DataError, match=r"there is no data folder .*cifar\. Did you mean .*/cifar10\?$"):
        detect(tmp_path / "cifar")
    with pytest.raises(DataError, match=r"there is no data folder .*imagenet$"):
        detect(tmp_path / "imagenet")


def test_folders_without_a_file_are_told_as_such(tmp_path):
    with pytest.raises(DataError, match=r"is empty$"):
        detect(tmp_path)
    for name in ("train/a", "val/a"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no file, only train/, val/$"):
        detect(tmp_path)
