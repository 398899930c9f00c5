"""Shards: tar and parquet hold the same data set as the folder they were made of, and faults are named."""

import builtins
import contextlib
import errno
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmim_bench.bench.data import detect_layout, load_data, load_unlabelled
from lmim_bench.bench.data import parquet as parquet_module
from lmim_bench.bench.data import tars as tars_module
from lmim_bench.bench.data.layouts import shard_split
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.doctor_data import data_checks
from lmim_bench.bench.doctor_system import Subject
from lmim_bench.bench.errors import DataError, UnreadableError
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import View

CLASSES = ("cat", "dog", "eel")
Sample = tuple[str, dict[str, bytes]]


def encoded(value: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An ImageFolder of 3 x 5 and 3 x 2 pictures, all different."""
    root = tmp_path / "folder"
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                number = 100 * count + 10 * label + i
                (root / split / name / f"{i}.png").write_bytes(encoded(number))
    return root


def load(reference, tmp_path, **options):
    return load_data(str(reference), cache_dir=tmp_path / "cache", **options)


def samples_of(folder: Path, split: str) -> list[Sample]:
    """The samples of an ImageFolder in its order, each with its label in .cls."""
    return [
        (f"{path.parent.name}_{path.stem}", {"png": path.read_bytes(), "cls": b"%d" % CLASSES.index(name)})
        for name in CLASSES
        for path in sorted((folder / split / name).iterdir())
    ]


def write_tar(path: Path, samples: list[Sample], mode: str = "w", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def write_parquet(
    path: Path, images: list, labels: list | None, names: list[str] | None = None, group: int = 4, **columns
) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": pa.array([i if i is None else {"bytes": i, "path": "x.png"} for i in images]),
        **columns,
    }
    if labels is not None:
        table["label"] = pa.array(labels)
    made = pa.table(table)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path, row_group_size=group)
    return path


@pytest.fixture
def tars(folder, tmp_path) -> Path:
    root = tmp_path / "tars"
    train, val = samples_of(folder, "train"), samples_of(folder, "val")
    write_tar(root / "train-000000.tar", train[:8])
    write_tar(root / "train-000001.tar", train[8:])
    write_tar(root / "val-000000.tar", val)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def parquet(folder, tmp_path) -> Path:
    root = tmp_path / "parquet"
    for split, name in (("train", "train"), ("val", "validation")):
        samples = samples_of(folder, split)
        images = [members["png"] for _, members in samples]
        labels = [int(members["cls"]) for _, members in samples]
        for part in range(2):
            half = slice(0, len(images) // 2) if part == 0 else slice(len(images) // 2, None)
            write_parquet(
                root / "data" / f"{name}-0000{part}-of-00002.parquet",
                images[half],
                labels[half],
                list(CLASSES),
            )
    return root


@pytest.fixture(params=["tars", "parquet"])
def shards(request) -> Path:
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------- what both do


def test_shards_hold_what_the_folder_held(shards, folder, tmp_path):
    data, source = load(shards, tmp_path), load(folder, tmp_path)
    assert detect_layout(shards)[:2] == ({"tars": "webdataset"}.get(shards.name, "parquet"), "classification")
    assert (data.kind, data.classes, data.train_split) == ("classification", CLASSES, "train")
    for ours, theirs in ((data.train_split, "train"), (data.test_split, "val")):
        split, original = data.splits[ours], source.splits[theirs]
        assert split.labels.dtype == np.int64
        assert split.labels.tolist() == original.labels.tolist()
        assert len(set(split.ids)) == len(split) == len(original)
        for i in np.random.default_rng(0).permutation(len(split)):
            assert split.image(i).shape[2:] == (3,)
            assert np.array_equal(split.image(i), original.image(i))


def test_subset_keeps_images_with_their_labels_and_there_is_no_mask(shards, tmp_path):
    split = load(shards, tmp_path).splits["train"]
    index = np.array([9, 2, 2, 14])
    part = split.subset(index)
    assert part.labels.tolist() == split.labels[index].tolist()
    for i, original in enumerate(index):
        assert part.ids[i] == split.ids[original]
        assert np.array_equal(part.image(i), split.image(original))
    with pytest.raises(DataError, match=r"train-0.* has no mask"):
        part.mask(0)
    small = load(shards, tmp_path).limited(6).splits["train"]
    assert np.bincount(small.labels).tolist() == [2, 2, 2]


def test_a_used_split_goes_to_workers_by_pickle_and_by_fork(shards, tmp_path):
    split = load(shards, tmp_path).splits["train"]
    expected = [split.image(i) for i in range(len(split))]  # now it holds what must not travel
    again = pickle.loads(pickle.dumps(split))
    assert len(pickle.dumps(split)) < 8000
    view = View("squash", 4, 4, "nearest", (0, 0, 0), (1, 1, 1))
    for i, pixels in enumerate(expected):
        assert np.array_equal(again.image(i), pixels)
    alone = [batch.images for batch in iterate_batches(split, view, 4)]
    forked = [batch.images for batch in iterate_batches(split, view, 4, workers=2)]
    assert all((a == b).all() for a, b in zip(alone, forked, strict=True))
    assert sum(map(len, alone)) == 15


def test_a_forked_process_starts_with_files_of_its_own(tars, tmp_path):
    split = load(tars, tmp_path).splits["train"]
    split.image(0)
    (inherited,) = split.reader._files.values()
    split.reader._pid = -1  # as a process sees it that was forked off this one
    assert split.image(0).shape == (6, 8, 3)
    assert inherited.closed
    assert inherited not in split.reader._files.values()


def test_threads_do_not_read_each_others_images(shards, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    split = load(shards, tmp_path).splits["train"]
    expected = [split.image(i) for i in range(len(split))]
    order = np.random.default_rng(0).integers(0, len(split), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, image in zip(order, pool.map(split.image, order), strict=True):
            assert np.array_equal(np.asarray(image), expected[i])


def test_an_index_is_made_once_a_shard(shards, tmp_path, monkeypatch):
    before = load(shards, tmp_path)

    def refuse(path):
        raise AssertionError(f"{path} was walked through again")

    monkeypatch.setattr(tars_module, "index_tar", refuse)
    monkeypatch.setattr(parquet_module, "index_parquet", refuse)
    after = load(shards, tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.splits["train"].ids == before.splits["train"].ids
    assert np.array_equal(
        np.asarray(after.splits["train"].image(3)), np.asarray(before.splits["train"].image(3))
    )


def test_fingerprint_follows_content_not_place(shards, tmp_path):
    before = load(shards, tmp_path).fingerprint
    moved = shards.rename(tmp_path / "elsewhere")
    assert load(moved, tmp_path).fingerprint == before
    name = next(p for p in moved.rglob("train-*") if p.is_file())
    content = bytearray(name.read_bytes())
    place = content.index(b"IDAT") + 20
    content[place] ^= 1
    name.write_bytes(bytes(content))
    assert load(moved, tmp_path).fingerprint != before


def test_large_shards_are_told_apart_by_the_samples_inside(tmp_path, monkeypatch):
    from lmim_bench.bench.data import manifest

    monkeypatch.setattr(manifest, "CONTENT_LIMIT", 10)
    prints = set()
    for key, label in (("a", b"0"), ("b", b"0"), ("a", b"1")):
        root = tmp_path / f"{key}{label.decode()}"
        for split in ("train", "val"):
            write_tar(root / f"{split}-0.tar", [(key, {"png": encoded(0), "cls": label})])
        (root / "classes.txt").write_text("x\ny\n")
        prints.add(load(root, tmp_path).fingerprint)
    assert len(prints) == 3


def test_a_train_split_alone_is_refused_by_load_data(shards, tmp_path):
    for path in [*shards.rglob("val*.tar"), *shards.rglob("val*.parquet")]:
        path.unlink()
    with pytest.raises(DataError, match=r"has no test split \(test, testing, val.*Both a train and a test"):
        load(shards, tmp_path)
    data = load_unlabelled(shards, cache_dir=tmp_path / "cache")
    assert (data.counts(), data.splits["train"].labels) == ({"train": 15}, None)
    with pytest.raises(DataError, match="has no split 'holdout' with shards"):
        load(shards, tmp_path, test="holdout")


# ------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-000000.tar", "train"),
        ("train.tar", "train"),
        ("train0001.tar", "train"),
        ("val_3.tar", "val"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("imagenet1k-train-0000.tar", "train"),
        ("test/00001.tar", "test"),
        ("train/train-00001.tar", "train"),
        ("pets-train-val-0.tar", None),
        ("00000.tar", None),
        ("trainer-0.tar", None),
    ],
)
def test_what_tells_the_split_of_a_shard(path, split):
    assert shard_split(path) == split


def test_folders_of_splits_and_no_class_names(folder, tmp_path):
    root = tmp_path / "folders"
    write_tar(root / "train" / "00000.tar", samples_of(folder, "train"))
    write_tar(root / "test" / "00000.tar", samples_of(folder, "val"))
    data = load(root, tmp_path)
    assert (data.classes, data.test_split) == (("0", "1", "2"), "test")
    assert data.splits["test"].ids[0] == "test/00000.tar/cat_0"
    (root / "train" / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"classnames\.txt names 2 classes, but the label 2 occurs"):
        load(root, tmp_path)


def test_naming_the_splits_lists_no_shard_twice(folder, tmp_path):
    train, val = samples_of(folder, "train"), samples_of(folder, "val")
    write_tar(tmp_path / "wd" / "train" / "0.tar", train)
    write_tar(tmp_path / "wd" / "val" / "0.tar", val)
    for split, samples in (("train", train), ("val", val)):
        images, labels = [m["png"] for _, m in samples], [int(m["cls"]) for _, m in samples]
        write_parquet(tmp_path / "pq" / "data" / split / "0.parquet", images, labels)
    for root in (tmp_path / "wd", tmp_path / "pq"):
        named = load(root, tmp_path, train="train", test="val")
        assert named.counts() == {"train": 15, "val": 6}, root.name
        assert named.fingerprint == load(root, tmp_path).fingerprint


def test_a_split_called_data_lists_no_shard_twice(folder, tmp_path):
    write_tar(tmp_path / "wd" / "data" / "0.tar", samples_of(folder, "train"))
    write_tar(tmp_path / "wd" / "val" / "0.tar", samples_of(folder, "val"))
    data = load(tmp_path / "wd", tmp_path, layout="webdataset", train="data", test="val")
    assert data.counts() == {"data": 15, "val": 6}


def test_names_of_classes_in_the_files_of_windows(tars, tmp_path):
    (tars / "classes.txt").write_bytes("\r\n".join(CLASSES).encode("utf-8-sig"))
    assert load(tars, tmp_path).classes == CLASSES
    (tars / "classes.txt").write_bytes("caf\xe9\ndog\neel".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8; save it as UTF-8$"):
        load(tars, tmp_path)


def test_mixed_splits_are_refused(tars, tmp_path):
    (tars / "train").mkdir()
    (tars / "val-000000.tar").rename(tars / "train" / "val-000000.tar")
    with pytest.raises(DataError, match=r"train/val-000000\.tar lies in train/ but is named val"):
        load(tars, tmp_path)
    (tars / "train" / "val-000000.tar").rename(tars / "extra.tar")
    with pytest.raises(DataError, match=r"extra\.tar does not say which split it belongs to"):
        load(tars, tmp_path)


def test_a_test_split_without_labels_is_passed_over(tars, tmp_path):
    write_tar(tars / "test-000000.tar", [("x", {"png": encoded(1)})])
    assert load(tars, tmp_path).test_split == "val"
    data = load(tars, tmp_path, test="test")
    assert data.splits["test"].labels is None
    assert data.splits["train"].labels is not None


def test_other_layouts_are_not_disturbed_by_archives_beside_them(folder, tmp_path):
    write_tar(folder / "images_train.tar", samples_of(folder, "train"))
    assert detect_layout(folder).layout == "imagefolder"
    write_tar(tmp_path / "loose" / "train.tar", samples_of(folder, "train"))
    (tmp_path / "loose" / "train").mkdir()
    (tmp_path / "loose" / "train" / "0.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match="has no known layout"):
        detect_layout(tmp_path / "loose")


def test_tar_and_parquet_together_are_ambiguous(tars, folder, tmp_path):
    write_parquet(tars / "train-0.parquet", [encoded(0)], [0])
    with pytest.raises(DataError, match=r"more than one layout: webdataset .* and parquet"):
        load(tars, tmp_path)
    assert load(tars, tmp_path, layout="webdataset").counts() == {"train": 15, "val": 6}


# ------------------------------------------------------------------------------------------- tar


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_formats_suffixes_and_labels_in_json(tmp_path, kind):
    root = tmp_path / "x"
    deep = "a.b/" + "long/" * 25 + "0007"  # beyond the 100 bytes of a plain header
    samples: list[Sample] = [
        (deep, {"JPG": encoded(7, "JPEG"), "json": b'{"label": 1, "caption": "x"}'}),
        ("./0008", {"webp": encoded(8, "WEBP"), "json": b'{"cls": 0}', "txt": b"a caption"}),
        ("0009", {"input.png": encoded(9), "json": b'{"label": "tench", "cls": 2}'}),
        ("0010", {"png": encoded(10), "seg.png": encoded(11), "cls": b"3"}),
        ("dataset", {"json": b'{"version": 1}'}),
        ("._0008", {"jpg": b"of a Mac"}),
        ("README", {"md": b"words"}),
    ]
    write_tar(root / "train-0.tar", samples, format=kind)
    write_tar(root / "val-0.tar", samples[:1], format=kind)
    split = load(root, tmp_path).splits["train"]
    assert split.labels.tolist() == [1, 0, 2, 3]
    assert list(split.ids) == [f"train-0.tar/{key}" for key in (deep, "0008", "0009", "0010")]
    for i, (codec, value) in enumerate((("JPEG", 7), ("WEBP", 8), ("PNG", 9), ("PNG", 10))):
        with Image.open(io.BytesIO(encoded(value, codec))) as expected:
            assert np.array_equal(split.image(i), np.asarray(expected))


def test_tar_agrees_with_the_webdataset_library(tars, tmp_path):
    reference = pytest.importorskip("webdataset.tariterators")
    split = load(tars, tmp_path).splits["train"]
    paths = sorted(tars.glob("train-*.tar"))
    with contextlib.ExitStack() as stack:
        streams = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in paths]
        theirs = list(reference.group_by_keys(reference.tar_file_expander(streams)))
    assert [i.partition(".tar/")[2] for i in split.ids] == [sample["__key__"] for sample in theirs]
    assert split.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    for i, sample in enumerate(theirs):
        with Image.open(io.BytesIO(sample["png"])) as expected:
            assert np.array_equal(split.image(i), np.asarray(expected))


@pytest.mark.parametrize("cut", ["in an image", "in a header", "at a member", "before the end"])
def test_truncated_tar_is_named(tars, tmp_path, cut):
    path = tars / "train-000001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[6]
    whole = path.read_bytes()
    at = {
        "in an image": member.offset_data + 40,
        "in a header": member.offset + 100,
        "at a member": member.offset,
        "before the end": len(whole.rstrip(b"\0")) // 512 * 512 + 512,
    }[cut]
    path.write_bytes(whole[:at])
    with pytest.raises(DataError, match=r"train-000001\.tar is broken or no tar") as caught:
        load(tars, tmp_path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000001\.tar is broken or no tar"):
        load(tars, tmp_path)


def test_damaged_header_is_not_taken_for_the_end(tars, tmp_path):
    path = tars / "train-000001.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset + 150] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"has no header where one must be \(byte {offset}\)"):
        load(tars, tmp_path)


def test_a_shard_that_the_system_cannot_read_is_not_broken(tars, tmp_path, monkeypatch):
    split = load(tars, tmp_path).splits["train"]

    monkeypatch.setattr(tars_module.io, "FileIO", _stale)
    with pytest.raises(UnreadableError, match=rf"train-000001\.tar/eel_4 cannot be read: {STALE}"):
        split.image(14)


def test_a_parquet_file_that_the_system_cannot_read_is_not_broken(parquet, tmp_path, monkeypatch):
    split = load(parquet, tmp_path).splits["train"]
    monkeypatch.setattr(parquet_module._pyarrow().parquet, "ParquetFile", _stale)
    with pytest.raises(UnreadableError, match=rf"train-.*\.parquet cannot be read: {STALE}"):
        split.image(0)


STALE = os.strerror(errno.ESTALE)


def _stale(*_, **__):
    raise OSError(errno.ESTALE, STALE)


def test_shard_that_is_cut_or_gone_after_indexing_is_named(tars, tmp_path):
    split = load(tars, tmp_path).splits["train"]
    path = tars / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"train-000001\.tar/eel_4 cannot be read: .* ends before it"):
        split.image(14)
    path.unlink()
    fresh = pickle.loads(pickle.dumps(split))
    with pytest.raises(DataError, match=r"train-000001\.tar/eel_4 cannot be read: .*No such file"):
        fresh.image(14)
    assert fresh.image(0).shape == (6, 8, 3)


@pytest.mark.parametrize("name", ["train-000002.tar.gz", "train-000002.tgz", "train-000002.tar"])
def test_compressed_tar_is_refused(tars, folder, tmp_path, name):
    write_tar(tars / name, samples_of(folder, "train"), "w:gz")
    with pytest.raises(DataError, match=rf"{name} is compressed, and only plain tar .* decompress it"):
        load(tars, tmp_path)


def broken(tmp_path: Path, *members: dict[str, bytes]) -> Path:
    """A set whose train shard holds these samples after a whole one."""
    root = tmp_path / "broken"
    whole = {"png": encoded(0), "cls": b"0"}
    write_tar(root / "val-0.tar", [("v", whole)])
    write_tar(root / "train-0.tar", [("k0", whole), *((f"k{i + 1}", m) for i, m in enumerate(members))])
    return root


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"png": encoded(1)}, r"train-0\.tar/k1 has no label, but 1 others"),
        ({"png": encoded(1), "cls": b"-1"}, r"train-0\.tar/k1 has no label"),
        ({"png": encoded(1), "cls": b"cat"}, r"k1 has no whole number in its \.cls but b'cat'"),
        ({"png": encoded(1), "cls": b"1.0"}, r"k1 has no whole number in its \.cls"),
        ({"png": encoded(1), "cls": b"9" * 5000}, r"k1 has no whole number in its \.cls"),
        ({"png": encoded(1), "cls": b"-2"}, r"k1 has the label -2; labels count"),
        ({"png": encoded(1), "cls": b"999999999999"}, r"k1 has the label 999999999999; labels count"),
        ({"png": encoded(1), "json": b'{"label": "cat"}'}, r"k1 has no whole number as label in its \.json"),
        ({"png": encoded(1), "json": b'{"label": true}'}, r"k1 has no whole number as label"),
        ({"png": encoded(1), "json": b"{"}, r"k1 has a \.json that is not valid"),
        ({"png": encoded(1), "json": b"[" * 100_000}, r"k1 has a \.json that is not valid"),
        ({"cls": b"1"}, r"train-0\.tar/k1 has a label but no image"),
        ({"gif": b"GIF89a", "json": b'{"label": 0}'}, r"train-0\.tar/k1 has a label but no image"),
        ({"png": encoded(1), "jpg": encoded(1, "JPEG"), "cls": b"1"}, r"k1 has several images \(png, jpg\)"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, problem):
    root = broken(tmp_path, members)
    with pytest.raises(DataError, match=problem) as caught:
        load(root, tmp_path)
    assert "\n" not in str(caught.value)
    if "png" in members and "jpg" not in members:  # without labels none of this matters
        assert load_unlabelled(root, cache_dir=tmp_path / "cache").counts() == {"train": 2}


def test_a_json_without_a_label_needs_no_image(tmp_path):
    root = broken(tmp_path, {"json": b'{"made": "2024"}'}, {"json": b'{"label": -1}'}, {"json": b"[1]"})
    assert load(root, tmp_path).counts() == {"train": 1, "val": 1}


def test_twice_the_same_member_links_and_shards_without_images(tmp_path):
    root = broken(tmp_path, {"png": encoded(1), "cls": b"1"})
    write_tar(root / "train-0.tar", [("k", {"png": encoded(0)}), ("k", {"png": encoded(1)})])
    with pytest.raises(DataError, match=r"train-0\.tar/k\.png is in the shard twice"):
        load(root, tmp_path)
    with tarfile.open(root / "train-0.tar", "w") as tar:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"train-0\.tar/k\.png is a link"):
        load(root, tmp_path)
    write_tar(root / "train-0.tar", [("k", {"txt": b"x"})])
    with pytest.raises(DataError, match=r"train-0\.tar holds no sample with an image"):
        load(root, tmp_path)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_header_that_promises_more_than_there_is(tmp_path, kind):
    root = broken(tmp_path)
    header = tarfile.TarInfo("k.cls")
    header.type, header.size = kind, 2**50
    content = header.tobuf(tarfile.GNU_FORMAT)
    (root / "train-0.tar").write_bytes(content + bytes(4096))
    with pytest.raises(DataError, match=r"train-0\.tar is broken or no tar"):
        load(root, tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / "x"
    for split in ("train", "val"):
        key = b"caf\xe9".decode("utf-8", "surrogateescape")
        write_tar(
            root / f"{split}-0.tar",
            [(key, {"png": encoded(1), "cls": b"0"})],
            format=tarfile.GNU_FORMAT,
        )
    assert list(load(root, tmp_path).splits["train"].ids) == [r"train-0.tar/caf\xe9"]


def test_broken_and_huge_images_are_named_on_access(tmp_path, monkeypatch):
    root = broken(tmp_path, {"jpg": encoded(1, "JPEG")[:-200], "cls": b"1"}, {"jpg": b"<html>", "cls": b"1"})
    split = load(root, tmp_path).splits["train"]
    assert split.image(0).shape == (6, 8, 3)
    for i in (1, 2):
        with pytest.raises(DataError, match=rf"train-0\.tar/k{i} is broken"):
            split.image(i)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"train-0\.tar/k0 is broken: more than .* pixels"):
        split.image(0)


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars_module, "OPEN_AT_ONCE", 2)
    root = tmp_path / "many"
    for i in range(5):
        write_tar(root / f"train-{i}.tar", [("k", {"png": encoded(i), "cls": b"0"})])
    write_tar(root / "val-0.tar", [("k", {"png": encoded(0), "cls": b"0"})])
    split = load(root, tmp_path).splits["train"]
    for i in (0, 1, 2, 3, 4, 0, 3):
        with Image.open(io.BytesIO(encoded(i))) as expected:
            assert np.array_equal(split.image(i), np.asarray(expected))
        assert len(split.reader._files) <= 2


# ------------------------------------------------------------------------------------------- parquet


def test_a_pass_in_order_reads_each_row_group_once(parquet, tmp_path, monkeypatch):
    split = load(parquet, tmp_path).splits["train"]
    read = []
    original = parquet_module._column
    monkeypatch.setattr(
        parquet_module,
        "_column",
        lambda path, *rest: read.append((path.name, rest[1])) or original(path, *rest),
    )
    for i in range(len(split)):
        split.image(i)
    assert len(read) == len(set(read)) == 4
    assert split.ids[0] == "data/train-00000-of-00002.parquet/000000"
    monkeypatch.setattr(parquet_module, "BYTES_KEPT", 1)
    small = pickle.loads(pickle.dumps(split))
    for i in (0, 8, 14):
        small.image(i)
        assert len(small.reader._groups) == 1


def test_plain_binary_other_names_and_label_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    root = tmp_path / "x"
    root.mkdir()
    for split in ("train", "test"):
        table = {
            "coarse_label": pa.array([1, 1]),
            "fine_label": pa.array([3, 0], pa.uint8()),
            "png": pa.array([encoded(1), encoded(2)], pa.large_binary()),
        }
        pq.write_table(pa.table(table), root / f"{split}-00000-of-00001.parquet")
    data = load(root, tmp_path)
    assert data.splits["test"].labels.tolist() == [3, 0]
    assert data.classes == ("0", "1", "2", "3")
    with Image.open(io.BytesIO(encoded(2))) as expected:
        assert np.array_equal(np.asarray(data.splits["train"].image(1)), np.asarray(expected))


def test_hidden_labels_of_a_test_split(parquet, tmp_path):
    write_parquet(parquet / "data" / "test-00000-of-00001.parquet", [encoded(1)] * 2, [-1, -1], list(CLASSES))
    assert load(parquet, tmp_path).test_split == "validation"


def two(tmp_path: Path, *args, **columns) -> Path:
    root = tmp_path / "two"
    write_parquet(root / "train-0.parquet", *args, **columns)
    write_parquet(root / "test-0.parquet", [encoded(0)], [0])
    return root


def test_faults_of_parquet_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    images = [encoded(0), encoded(1)]
    with pytest.raises(DataError, match=r"train-0\.parquet/000001 has no label, but 1 others"):
        load(two(tmp_path, images, [0, None]), tmp_path)
    with pytest.raises(DataError, match=r"000000 has no whole number in the column label but string"):
        load(two(tmp_path, images, ["cat", "dog"]), tmp_path)
    with pytest.raises(DataError, match=r"train-0\.parquet/000001 has the label 18446744073709551615"):
        load(two(tmp_path, images, pa.array([0, 2**64 - 1], pa.uint64())), tmp_path)
    with pytest.raises(DataError, match=r"the schema of the shards names 1 classes, but the label 1"):
        load(two(tmp_path, images, [0, 1], ["cat"]), tmp_path)
    empty = pa.array([], pa.struct({"bytes": pa.binary()}))
    with pytest.raises(DataError, match=r"train-0\.parquet holds no rows"):
        load(two(tmp_path, [], [], image=empty), tmp_path)


def test_broken_rows_and_files_are_named(tmp_path):
    split = load(two(tmp_path, [encoded(0), None, b"<html>", encoded(3)[:-30]], [0] * 4), tmp_path).splits[
        "train"
    ]
    assert split.image(0).shape == (6, 8, 3)
    with pytest.raises(DataError, match=r"train-0\.parquet/000001 cannot be read: the row holds no bytes"):
        split.image(1)
    for i in (2, 3):
        with pytest.raises(DataError, match=rf"train-0\.parquet/00000{i} is broken"):
            split.image(i)
    path = tmp_path / "two" / "train-0.parquet"
    write_parquet(path, [encoded(0)], [0])
    with pytest.raises(DataError, match=r"train-0\.parquet/000003 cannot be read: the shard has changed"):
        pickle.loads(pickle.dumps(split)).image(3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train-0\.parquet/000000 cannot be read: .*broken or no parquet"):
        pickle.loads(pickle.dumps(split)).image(0)
    with pytest.raises(DataError, match=r"train-0\.parquet is broken or no parquet") as caught:
        load(tmp_path / "two", tmp_path)
    assert "\n" not in str(caught.value)


def test_columns_must_agree_and_be_told(tmp_path, parquet):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for columns, problem in (
        ({"text": ["x"]}, "no column of image bytes"),
        ({"a": [b"x"], "b": [b"y"]}, r"several columns of bytes \(a, b\)"),
    ):
        root = tmp_path / "_".join(columns)
        root.mkdir()
        for split in ("train", "test"):
            pq.write_table(pa.table(columns), root / f"{split}.parquet")
        with pytest.raises(DataError, match=rf"{problem}; the images must be"):
            load(root, tmp_path)
    write_parquet(parquet / "data" / "train-00002.parquet", [encoded(0)], [0], ["x", "y", "z"])
    with pytest.raises(DataError, match=r"train-00002\.parquet has other columns or classes"):
        load(parquet, tmp_path)
    (parquet / "data" / "train-00002.parquet").unlink()
    for path in parquet.rglob("validation*"):
        path.unlink()
    write_parquet(parquet / "data" / "test-0.parquet", [encoded(0)], [0], ["dog", "cat", "eel"])
    with pytest.raises(DataError, match="train and test name different classes"):
        load(parquet, tmp_path)


def test_without_pyarrow_the_extra_is_named(parquet, tars, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"reading parquet needs pyarrow: pip install 'lmim-bench\[parquet\]'"
    ):
        load(parquet, tmp_path)
    assert load(tars, tmp_path).counts() == {"train": 15, "val": 6}


# ------------------------------------------------------------------------------------------- without labels


def every(root: Path, tmp_path: Path):
    return load_unlabelled(root, cache_dir=tmp_path / "cache")


def test_images_anywhere_without_labels(tmp_path):
    root = tmp_path / "loose"
    for name in ("b/c/1.png", "a.jpg", "b/0.png", "b/._0.png", "b/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(1))
    data = every(root, tmp_path)
    assert data.splits["train"].ids == ["a.jpg", "b/0.png", "b/c/1.png"]
    assert (data.name, data.kind, data.classes, data.splits["train"].labels) == (
        "loose",
        "classification",
        (),
        None,
    )
    assert data.splits["train"].image(2).shape == (6, 8, 3)
    with pytest.raises(DataError, match="has no known layout"):
        load(root, tmp_path)
    before = data.fingerprint
    (root / "b" / "0.png").unlink()
    assert every(root, tmp_path).fingerprint != before


def test_a_train_folder_without_classes_leaves_the_test_folder_out(tmp_path):
    root = tmp_path / "flat"
    for name in ("train/0.png", "train/1.png", "extra/2.png", "val/3.png", "test/x/4.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(1))
    assert every(root, tmp_path).splits["train"].ids == ["extra/2.png", "train/0.png", "train/1.png"]
    assert len(every(root / "test", tmp_path).splits["train"]) == 1
    with pytest.raises(DataError, match="has no known layout"):
        detect_layout(root / "train")


def test_labelled_folder_and_shards_without_their_labels(folder, shards, tmp_path):
    for root in (folder, shards):
        data = every(root, tmp_path)
        assert (data.counts(), data.splits["train"].labels) == ({"train": 15}, None)


def test_shards_as_img2dataset_leaves_them(tmp_path):
    root = tmp_path / "laion"
    for i in range(2):
        name = f"{i:05d}"
        members = {"jpg": encoded(i, "JPEG"), "txt": b"a caption", "json": b'{"url": "x"}'}
        write_tar(root / f"{name}.tar", [(f"{name}{k}", members) for k in range(3)])
        write_parquet(root / f"{name}.parquet", [None], None)
    split = every(root, tmp_path).splits["train"]
    assert list(split.ids[:2]) == ["00000.tar/000000", "00000.tar/000001"]
    assert len(split) == 6
    (root / "sample.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match=r"both loose images \(sample\.png\) and shards \(00000\.tar\)"):
        every(root, tmp_path)


def test_archives_beside_a_folder_of_images_are_left(folder, tmp_path):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    write_tar(folder / "images_train.tar", samples_of(folder, "train"))
    assert every(folder, tmp_path).splits["train"].ids[0] == "train/cat/0.png"


def test_a_card_beside_named_shards_is_left(tars, tmp_path):
    (tars / "thumbnail.png").write_bytes(encoded(0))
    assert len(every(tars, tmp_path).splits["train"]) == 15


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"there is no data folder .*nowhere"):
        every(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"holds no image, no \*\.tar and no \*\.parquet; it holds notes\.txt"
    ):
        every(tmp_path / "empty", tmp_path)


def test_the_doctor_names_parts_of_a_split_that_are_not_there(tmp_path):
    root = tmp_path / "pq"
    for name in ("train-00001-of-00003", "test-00000-of-00001"):
        write_parquet(root / "data" / f"{name}.parquet", [encoded(i) for i in range(4)], [0, 1, 0, 1])
    data = load(root, tmp_path)
    checks = list(data_checks(Subject("data", "pq"), data, detect_layout(root), Reporter()))
    (warning,) = [check.found for check in checks if check.status == "warn"]
    assert warning.startswith("2 shards that the names of others count are not there: data/train-00000-of-0")
