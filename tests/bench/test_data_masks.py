"""Masks: each label is read as it was written, or refused with the file's name; folders of them."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.data import detect_layout, load_data
from lmim_bench.bench.data.reading import read_mask
from lmim_bench.bench.errors import DataError

LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def png(path: Path, bits: int, labels: np.ndarray, palette: bool = False) -> Path:
    """A PNG of so many bits a pixel, made by hand: Pillow writes no grey one of 2 or 4."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    rows = b""
    for row in labels.tolist():
        text = "".join(f"{label:0{bits}b}" for label in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    height, width = labels.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(range(3 * 2**bits))) if palette else b""
    content = chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def written(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Masks of every way to write labels that keeps them."""
    for bits, palette in ((1, False), (8, False), (16, False), (1, True), (2, True), (4, True)):
        labels = LABELS % min(2**bits, 12)
        yield png(folder / f"{bits}{palette}.png", bits, labels, palette), labels
    for name, content in (
        ("raw", b"P5\n4 3\n255\n" + LABELS.tobytes()),
        ("plain", b"P2\n4 3\n255\n" + b" ".join(b"%d" % label for label in LABELS.ravel())),
        ("wide", b"P5\n4 3\n65535\n" + LABELS.astype(">u2").tobytes()),
    ):
        (folder / f"{name}.pgm").write_bytes(content)
        yield folder / f"{name}.pgm", LABELS
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        Image.fromarray(LABELS).save(folder / f"{compression}.tif", compression=compression)
        yield folder / f"{compression}.tif", LABELS
    Image.fromarray(LABELS).convert("RGB").save(folder / "lossless.webp", lossless=True)
    yield folder / "lossless.webp", LABELS


def test_labels_are_those_that_were_written(tmp_path):
    for path, labels in written(tmp_path):
        assert np.array_equal(read_mask(path), labels), path.name


def test_labels_that_decoding_stretches_or_cuts_are_refused(tmp_path):
    png(tmp_path / "two.png", 2, LABELS % 4)
    png(tmp_path / "four.png", 4, LABELS)
    (tmp_path / "raw.pgm").write_bytes(b"P5\n4 3\n11\n" + LABELS.tobytes())
    (tmp_path / "plain.pgm").write_bytes(b"P2\n4 3\n11\n" + b" ".join(b"%d" % x for x in LABELS.ravel()))
    (tmp_path / "wide.pgm").write_bytes(b"P5\n4 3\n1000\n" + LABELS.astype(">u2").tobytes())
    cv2.imwrite(str(tmp_path / "colour16.png"), np.stack([LABELS.astype(np.uint16)] * 3, axis=-1))
    for name, words in (
        ("two.png", "grey values of 2 bits"),
        ("four.png", "grey values of 4 bits"),
        ("raw.pgm", "the highest value 11"),
        ("plain.pgm", "the highest value 11"),
        ("wide.pgm", "the highest value 1000"),
        ("colour16.png", "RGB values of 16 bits"),
    ):
        with pytest.raises(DataError, match=rf"{name} has {words}: .*; write masks as PNG of 8 bits"):
            read_mask(tmp_path / name)


def test_lossy_masks_are_refused_whatever_their_suffix(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").rename(tmp_path / "x.png")
    Image.fromarray(LABELS).save(tmp_path / "x.tif", compression="jpeg")
    Image.fromarray(LABELS).convert("RGB").save(tmp_path / "x.webp", quality=90)
    for name, kind in (("x.png", "a JPEG"), ("x.tif", "a TIFF with jpeg"), ("x.webp", "a WebP that may be")):
        with pytest.raises(DataError, match=rf"{name} is {kind}.*; write masks as PNG"):
            read_mask(tmp_path / name)


def test_a_label_that_is_too_small_is_named(tmp_path):
    Image.fromarray(LABELS.astype(np.int32) - 1).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="holds the label -1"):
        read_mask(tmp_path / "m.tif")


def test_masks_of_parts_of_a_label_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=r"m\.tif holds numbers that are not whole"):
        read_mask(tmp_path / "m.tif")


def test_palette_mask_keeps_its_indices(tmp_path):
    labels = np.array([[0, 1, 2], [255, 7, 1]], dtype=np.uint8)
    image = Image.fromarray(labels, mode=None).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as stored:
        assert stored.mode == "P"
        assert not np.array_equal(np.asarray(stored.convert("L")), labels)
    assert np.array_equal(read_mask(tmp_path / "p.png"), labels)


def test_mask_modes(tmp_path):
    labels = np.array([[0, 3], [4, 255]], dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "grey16.png")
    Image.fromarray(np.repeat(labels[..., None], 3, axis=2)).save(tmp_path / "rgb.png")
    for name in ("grey", "grey16", "rgb"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), labels), name
    Image.fromarray(np.array([[0, 1], [1, 1]], dtype=bool)).save(tmp_path / "bit.png")
    assert read_mask(tmp_path / "bit.png").tolist() == [[0, 1], [1, 1]]


def test_masks_that_hold_no_labels_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colours.png")
    with pytest.raises(DataError, match=r"colours\.png holds colours"):
        read_mask(tmp_path / "colours.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "high.png")
    with pytest.raises(DataError, match=r"high\.png holds the label 300"):
        read_mask(tmp_path / "high.png")


@pytest.mark.parametrize("alpha", ["equal", "opaque"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_the_alpha_of_a_mask_is_no_label(tmp_path, mode, alpha):
    labels = np.array([[0, 3], [4, 255]], dtype=np.uint8)
    grey = Image.fromarray(labels)
    above = grey if alpha == "equal" else Image.new("L", grey.size, 255)
    Image.merge(mode, [grey] * (len(mode) - 1) + [above]).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == labels.tolist()


# ------------------------------------------------------------------------------------------- folders


def picture(path: Path, labels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((3, 4, 3), np.uint8) if labels is None else labels.astype(np.uint8)).save(path)


def load(root: Path, **options):
    return load_data(str(root), cache_dir=root.parent / "cache", **options)


def pairs(root: Path, images: str, masks: str, labels: list[np.ndarray]) -> Path:
    for i, one in enumerate(labels):
        picture(root / images / f"{i}.png")
        picture(root / masks / f"{i}.png", one)
    return root


@pytest.mark.parametrize("many", [3, 40])
def test_masks_of_0_and_255_are_no_two_classes_whatever_their_names(tmp_path, many):
    root = pairs(tmp_path / "d", "val/images", "val/masks", [np.where(LABELS > 5, 255, 0)] * many)
    (root / "classes.txt").write_text("background\nobject\n")
    with pytest.raises(DataError, match=r"one class, the label 0 alone beside void 255: .* masks of 0 and 1"):
        load(root)
    picture(root / "val/masks/1.png", LABELS > 5)  # 1 is not among the first that are looked at of 40
    assert load(root).classes == ("background", "object")


def test_names_of_classes_are_different_and_none_is_blank(tmp_path):
    root = pairs(tmp_path / "d", "val/images", "val/masks", [LABELS % 3])
    (root / "classes.txt").write_text("bg\nthing\nthing\n")
    with pytest.raises(DataError, match="two classes are called 'thing'"):
        load(root)
    (root / "classes.txt").write_text("bg\n\nthing\nother\n\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 2 is blank"):
        load(root)
    (root / "classes.txt").write_text("bg\nthing\nother\n\n")
    assert load(root).classes == ("bg", "thing", "other")


def test_255_does_not_become_a_class_by_naming_another_void(tmp_path):
    labels = np.where(LABELS == 11, 255, LABELS % 4)
    root = pairs(tmp_path / "d", "val/images", "val/masks", [labels])
    with pytest.raises(DataError, match=r"hold 255, .*: add 255 to void \(0\), or name all classes"):
        load(root, void=[0])
    assert load(root, void=[0, 255]).void == (0, 255)


def test_splits_may_lie_in_the_folders_of_images_and_masks(tmp_path):
    root = tmp_path / "d"
    for split, count in (("training", 3), ("validation", 2)):
        pairs(root, f"images/{split}", f"masks/{split}", [LABELS % 3] * count)
    assert detect_layout(root).reason == "images/training and masks/training"
    data = load(root)
    assert (data.counts(), data.train_split, data.test_split) == (
        {"training": 3, "validation": 2},
        "training",
        "validation",
    )
    assert data.splits["validation"].ids[0] == "images/validation/0.png"
    with pytest.raises(DataError, match="no split 'test' with masks"):
        load(root, test="test")
    (root / "masks" / "validation" / "1.png").unlink()
    with pytest.raises(DataError, match=r"images/validation/1\.png has no mask"):
        load(root)


@pytest.mark.parametrize(("images", "masks"), [("images", "labels"), ("img", "ann")])
def test_images_and_masks_of_other_names_are_no_two_classes(tmp_path, images, masks):
    for split in ("train", "val"):
        for i in range(3):
            picture(tmp_path / "d" / split / images / f"aachen_{i}_leftImg8bit.png")
            picture(tmp_path / "d" / split / masks / f"aachen_{i}_gtFine.png", LABELS)
    with pytest.raises(DataError, match=rf"looks like images \({images}/\) with masks \({masks}/\)"):
        load(tmp_path / "d")


def test_voc_lists_are_read_line_by_line_and_need_no_train(tmp_path):
    root = tmp_path / "VOC2012"
    for i, name in enumerate(("a b.JPG", "c.png", "d.jpg")):
        picture(root / "JPEGImages" / name)
        picture(root / "SegmentationClass" / f"{Path(name).stem}.png", LABELS % (i + 2))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a b\nc\na b\n")
    data = load(root)
    assert data.splits["val"].ids == ["JPEGImages/a b.JPG", "JPEGImages/c.png"]
    assert (data.train_split, data.test_split) == ("val", "val")
    with pytest.raises(DataError, match=r"train\.txt does not exist"):
        load(root, train="train")
    (lists / "train.txt").write_text("d\ne\n")
    with pytest.raises(DataError, match=r"train\.txt lists 'e', and .*JPEGImages has no file of that name"):
        load(root)
