"""DAVIS layouts: which of 2016 and 2017 a folder is, and what its masks then mean."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench.cli import cli
from lmim_bench.bench.data import detect_layout, load_data
from lmim_bench.bench.errors import DataError

SIZE = (6, 9)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def davis(root: Path, values: dict[str, list[int]], resolution: str = "480p", frames: int = 3) -> Path:
    """Sequences whose masks hold 0 and the given values, one row each."""
    for name, found in values.items():
        for i in range(frames):
            write(root / "JPEGImages" / resolution / name / f"{i:05d}.jpg", np.full((*SIZE, 3), 10 * i))
            labels = np.zeros(SIZE)
            for row, value in enumerate(found):
                labels[row] = value
            write(root / "Annotations" / resolution / name / f"{i:05d}.png", labels)
    return root


def lists(root: Path, name: str, text: str) -> None:
    path = root / "ImageSets" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def load(root: Path, tmp_path: Path, **options):
    return load_data(str(root), cache_dir=tmp_path / "cache", **options)


def test_2016_maps_255_to_the_one_object(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255], "cow": [255, 255], "unlisted": [255]})
    lists(root, "2016/val.txt", "dog\ncow\n")
    data = load(root, tmp_path)
    assert detect_layout(root)[:2] == ("davis", "video")
    assert data.counts() == {"dog": 3, "cow": 3}, "the list's sequences, in its order"
    dog, cow = data.sequences
    assert np.unique(dog.mask(0)).tolist() == [0, 1]
    assert (cow.mask(2) == 1).sum() == 2 * SIZE[1]
    assert dog.mask(0).dtype == np.uint8
    assert dog.frame_ids == ["00000", "00001", "00002"]
    assert dog.frame(2).shape == (*SIZE, 3)
    assert abs(int(dog.frame(2)[0, 0, 0]) - 20) <= 2


def test_2016_by_its_own_list_of_paths(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255]})
    lines = [f"/JPEGImages/480p/dog/{i:05d}.jpg /Annotations/480p/dog/{i:05d}.png" for i in range(3)]
    lists(root, "480p/val.txt", "\n".join(lines))
    data = load(root, tmp_path)
    assert data.counts() == {"dog": 3}
    assert data.sequences[0].mask(1).max() == 1


def test_a_list_of_names_with_folders_is_no_list_of_pairs(tmp_path):
    root = davis(tmp_path / "d", {"grp/t": [1], "grp/u": [1]})
    with pytest.raises(DataError, match=r"480p/grp/t/00000\.jpg lies in a folder of its own"):
        load(root, tmp_path)  # two videos would be one
    lists(root, "2017/val.txt", "grp/t\ngrp/u\n")
    with pytest.raises(DataError, match=r"val\.txt lists 'grp/t'; each line is the name of a folder"):
        load(root, tmp_path)


def test_what_masks_hold_is_told(tmp_path):
    for name, value, words in (("a", 255, "0 and 255, the one object"), ("b", 2, "object ids, 255 is void")):
        root = davis(tmp_path / name, {"dog": [value]})
        found = CliRunner().invoke(cli, ["data", str(root), "--cache-dir", str(tmp_path / "cache")])
        assert words in found.output


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255]}, frames=12)
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for i in range(12):
            place = root / folder / "480p" / "dog"
            (place / f"{i:05d}.{suffix}").rename(place / f"frame {i + 1}.{suffix}")
    (dog,) = load(root, tmp_path).sequences
    assert dog.frame_ids == [f"frame {i}" for i in range(1, 13)]
    assert [int(dog.frame(i).mean().round()) // 10 for i in range(12)] == list(range(12))


def test_names_of_sequences_may_have_blanks(tmp_path):
    root = davis(tmp_path / "d", {"dog run": [1], "cat sit": [1, 2]})
    lists(root, "2017/val.txt", "dog run\ncat sit\n")
    assert load(root, tmp_path).counts() == {"dog run": 3, "cat sit": 3}


def test_2017_keeps_ids_and_255_is_void(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255], "pigs": [1, 2, 255]})
    lists(root, "2017/val.txt", "dog\npigs\n")
    data = load(root, tmp_path)
    assert np.unique(data.sequences[1].mask(0)).tolist() == [0, 1, 2, 255]
    assert np.unique(data.sequences[0].mask(0)).tolist() == [0, 255]


def test_object_that_appears_late_still_says_2017(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255]})
    labels = np.zeros(SIZE)
    labels[0] = 3
    write(root / "Annotations" / "480p" / "dog" / "00002.png", labels)
    assert np.unique(load(root, tmp_path).sequences[0].mask(2)).tolist() == [0, 3]


def test_the_year_can_be_said(tmp_path):
    root = davis(tmp_path / "d", {"dog": [255]})
    assert load(root, tmp_path).sequences[0].mask(0).max() == 1
    assert load(root, tmp_path, layout="davis2017").sequences[0].mask(0).max() == 255
    assert load(root, tmp_path, layout="davis2017").fingerprint != load(root, tmp_path).fingerprint
    pigs = davis(tmp_path / "p", {"pigs": [1, 2]})
    with pytest.raises(DataError, match=r"00000\.png holds object ids"):
        load(pigs, tmp_path, layout="davis2016").sequences[0].mask(0)


def test_lists_2017_first_and_another_by_name(tmp_path):
    root = davis(tmp_path / "d", {"a": [1], "b": [1], "c": [1]})
    assert list(load(root, tmp_path).counts()) == ["a", "b", "c"], "no list: all, sorted"
    lists(root, "2016/val.txt", "a\n")
    lists(root, "2017/val.txt", "b\n")
    lists(root, "2017/train.txt", "c\na\n")
    assert list(load(root, tmp_path).counts()) == ["b"]
    assert list(load(root, tmp_path, test="2016/val").counts()) == ["a"]
    assert list(load(root, tmp_path, test="2017/train").counts()) == ["c", "a"]
    with pytest.raises(DataError, match=r"2018/val\.txt does not exist"):
        load(root, tmp_path, test="2018/val")


def test_a_list_with_a_byte_order_mark_and_one_that_is_not_utf8(tmp_path):
    root = davis(tmp_path / "d", {"dog": [1]})
    lists(root, "2017/val.txt", "\ufeffdog\n")
    assert load(root, tmp_path).counts() == {"dog": 3}
    (root / "ImageSets" / "2017" / "val.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"2017/val\.txt is not UTF-8; save it as UTF-8$"):
        load(root, tmp_path)


def test_there_is_no_split_to_train_on(tmp_path):
    root = davis(tmp_path / "d", {"dog": [1]})
    with pytest.raises(DataError, match=r"the layout davis has no choice of the split 'train'; it has none"):
        load(root, tmp_path, train="train")


def test_resolution(tmp_path):
    root = davis(tmp_path / "d", {"a": [1]}, "Full-Resolution", frames=2)
    assert load(root, tmp_path).counts() == {"a": 2}
    davis(root, {"a": [1]}, "480p", frames=3)
    assert load(root, tmp_path).counts() == {"a": 3}
    assert load(root, tmp_path, layout="davis:Full-Resolution").counts() == {"a": 2}
    with pytest.raises(DataError, match="JPEGImages/1080p does not exist"):
        load(root, tmp_path, layout="davis2017:1080p")


def test_of_several_resolutions_the_one_with_masks_is_taken(tmp_path):
    root = davis(tmp_path / "d", {"dog": [1]}, "Full-Resolution")
    write(root / "JPEGImages" / "480p" / "dog" / "00000.jpg", np.zeros((*SIZE, 3)))
    assert load(root, tmp_path).sequences[0].frames[0].startswith("JPEGImages/Full-Resolution")


def test_head(tmp_path):
    root = davis(tmp_path / "d", {"a": [1]})
    short = load(root, tmp_path).limited(2)
    assert short.counts() == {"a": 2}
    assert short.sequences[0].frame_ids == ["00000", "00001"]
    assert short.sequences[0].mask(1).max() == 1


def test_missing_files_are_named(tmp_path):
    root = davis(tmp_path / "d", {"a": [1], "b": [1]})
    lists(root, "2017/val.txt", "a\nzebra\n")
    with pytest.raises(DataError, match="480p/zebra does not exist, but the sequence 'zebra' is listed"):
        load(root, tmp_path)
    lists(root, "2017/val.txt", "a\n")
    (root / "Annotations" / "480p" / "a" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"Annotations/480p/a/00001\.png does not exist; every frame"):
        load(root, tmp_path)
    write(root / "Annotations" / "480p" / "a" / "00001.png", np.ones(SIZE))
    (root / "JPEGImages" / "480p" / "a" / "00002.jpg").unlink()
    with pytest.raises(DataError, match=r"a/00002\.png has no frame"):
        load(root, tmp_path)
    lists(root, "2017/val.txt", "\n")
    with pytest.raises(DataError, match="lists no sequence"):
        load(root, tmp_path)


def test_mask_of_another_size_and_broken_frames_are_named(tmp_path):
    root = davis(tmp_path / "d", {"a": [1]})
    write(root / "Annotations" / "480p" / "a" / "00000.png", np.ones((2, 2)))
    (root / "JPEGImages" / "480p" / "a" / "00001.jpg").write_bytes(b"no image")
    sequence = load(root, tmp_path).sequences[0]
    with pytest.raises(DataError, match=r"00000\.png is 2x2 pixels"):
        sequence.mask(0)
    with pytest.raises(DataError, match=r"00001\.jpg is broken"):
        sequence.frame(1)


def test_masks_that_compression_changed_are_refused(tmp_path):
    root = davis(tmp_path / "d", {"dog": [1]})
    path = root / "Annotations" / "480p" / "dog" / "00001.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    with pytest.raises(DataError, match=r"dog/00001\.jpg is a JPEG, and its .*; write masks as PNG$"):
        load(root, tmp_path)
