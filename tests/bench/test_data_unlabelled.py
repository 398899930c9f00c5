"""Images without labels below a folder: those of a test and masks are left out, and counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.data import load_unlabelled
from lmim_bench.bench.progress import Reporter
from lmim_bench.pretrain.api import open_images


def written(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(root / name)
    return root


def found(root: Path, tmp_path: Path) -> tuple[list[str], dict[str, int]]:
    data = load_unlabelled(root, cache_dir=tmp_path / "cache")
    return list(data.splits["train"].ids), dict(data.left_out)


@pytest.mark.parametrize(
    ("kept", "left_out"),
    [
        (["train/a/0.jpg"], {"val": ["val/a/0.jpg"], "test": ["test/0.jpg"]}),
        (["images/train2017/0.jpg"], {"val2017": ["images/val2017/0.jpg", "images/val2017/1.jpg"]}),
        (
            ["Train/Urban/images_png/0.png"],
            {"masks_png": ["Train/Urban/masks_png/0.png"], "Val": ["Val/0.png"]},
        ),
        (["train_images/0.jpg"], {"test_images": ["test_images/0.jpg"]}),
        (["training/image_2/0.png"], {"semantic_rgb": ["training/semantic_rgb/0.png"]}),
        (
            ["VOC2012/JPEGImages/0.jpg"],
            {
                "SegmentationClass": ["VOC2012/SegmentationClass/9.png"],
                "SegmentationObject": ["VOC2012/SegmentationObject/9.png"],
            },
        ),
        (
            ["leftImg8bit/train/aachen/0_leftImg8bit.png"],
            {"gtFine": ["gtFine/train/aachen/0_gtFine_color.png"], "val": ["leftImg8bit/val/lindau/0.png"]},
        ),
        (
            ["train2017/0.jpg", "train2017/1.jpg"],
            {"stuffthingmaps": ["stuffthingmaps/train2017/0.png", "stuffthingmaps/train2017/1.png"]},
        ),
        (["0.jpg", "1.jpg", "2.jpg"], {"labels": ["labels/0.png", "labels/1.png"]}),
        (["images/0.jpg"], {"annotations": ["annotations/trimaps/0.png"]}),
    ],
)
def test_splits_for_a_test_and_masks_are_left_out_and_counted(tmp_path, kept, left_out):
    root = written(tmp_path / "x", *kept, *(path for paths in left_out.values() for path in paths))
    assert found(root, tmp_path) == (kept, {name: len(paths) for name, paths in left_out.items()})


@pytest.mark.parametrize(
    "names",
    [
        ["dog/0.jpg", "dog/1.jpg", "mask/0.jpg", "mask/1.jpg"],  # classes, of which one shows masks
        ["val/0.jpg", "test/0.jpg"],  # with nothing to train on beside them
        ["Test tubes/0.jpg", "train/0.jpg"],  # what a class shows
        ["gtFine/train/0.png"],  # nothing but masks: what was asked for
        ["a/train/0.jpg", "b/test/0.jpg"],  # not beside each other
    ],
)
def test_what_is_no_test_split_and_no_mask_stays(tmp_path, names):
    assert found(written(tmp_path / "x", *names), tmp_path) == (sorted(names), {})


def test_a_training_says_what_it_leaves_out(tmp_path, capsys):
    root = written(tmp_path / "x", "images/0.jpg", "images/1.jpg", "gt/a/0.png", "gt/b/0.png")
    assert open_images(str(root), Reporter(), tmp_path / "cache").counts() == {"train": 2}
    said = " ".join(capsys.readouterr().err.split())
    assert "left out, as masks or as a split for a test: gt 2 (images by folder)" in said
    open_images(str(root / "images"), Reporter(), tmp_path / "cache")
    assert "left out" not in capsys.readouterr().err
