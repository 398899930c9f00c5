"""Decoding: what is whole is read exactly, what is broken is an error that names the file; fingerprints."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lmim_bench.bench.data import manifest, reading
from lmim_bench.bench.data.files import list_images
from lmim_bench.bench.data.layouts import detect
from lmim_bench.bench.data.manifest import Manifest
from lmim_bench.bench.data.reading import image_size, read_image, read_mask
from lmim_bench.bench.errors import DataError, UnreadableError


@pytest.fixture
def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_image_is_an_error_naming_the_file(tmp_path, noise, suffix, part):
    path = tmp_path / f"x.{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DataError, match=f"x.{suffix} is broken"):
        read_image(path)


def test_truncated_image_is_an_error_even_where_padding_was_switched_on(tmp_path, noise, monkeypatch):
    path = tmp_path / "x.jpg"
    noise.save(path)
    path.write_bytes(path.read_bytes()[:-900])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(path) as padded:
        padded.load()  # the danger is real: Pillow now fills the rest with grey
    with pytest.raises(DataError, match=r"x\.jpg is broken"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_no_image_at_all(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jpg is broken"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"y\.jpg does not exist"):
        read_image(tmp_path / "y.jpg")


@pytest.mark.parametrize(
    "number",
    ["EIO", "EACCES", "ENOMEM", "EMFILE", "ENFILE", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EUCLEAN", "ENOENT"],
)
def test_what_the_system_cannot_read_is_not_broken(tmp_path, noise, monkeypatch, number):
    noise.save(tmp_path / "x.png")

    def fail(*_):
        code = getattr(errno, number)
        raise OSError(code, os.strerror(code), "x.png")

    monkeypatch.setattr(reading.Image, "open", fail)
    for read in (read_image, read_mask, image_size):
        with pytest.raises(UnreadableError, match=r"x\.png (cannot be read: \w+|does not exist)") as caught:
            read(tmp_path / "x.png")
        assert "broken" not in str(caught.value)


def test_threads_that_come_and_go_let_no_cut_file_through(tmp_path, noise, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(reading, "_leave", False)
    noise.convert("L").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    begun, go_on = threading.Event(), threading.Event()
    original = reading.np.asarray

    def slow(image):
        begun.set()
        assert go_on.wait(10)
        return original(image)

    monkeypatch.setattr(reading.np, "asarray", slow)
    first = threading.Thread(target=read_mask, args=(tmp_path / "good.png",))
    first.start()
    assert begun.wait(10)
    with reading.whole_files_only():  # a second reader, which the first one leaves behind
        go_on.set()
        first.join()
        with pytest.raises(DataError, match=r"cut\.png is broken"):
            read_mask(tmp_path / "cut.png")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_reads_can_read(tmp_path, noise):
    noise.save(tmp_path / "x.png")
    with reading._strict:  # as another thread would hold it
        child = os.fork()
        if not child:
            os._exit(read_image(tmp_path / "x.png").shape != (40, 60, 3))
        for _ in range(200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process waits for a thread that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_tag_of_a_wrong_type_is_a_broken_file(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    entries = int.from_bytes(content[4:8], "little")
    for tag in range(int.from_bytes(content[entries : entries + 2], "little")):
        entry = entries + 2 + 12 * tag
        if int.from_bytes(content[entry : entry + 2], "little") == 273:  # where the strips begin
            content[entry + 2 : entry + 4] = (2).to_bytes(2, "little")  # in letters
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tif is broken"):
        read_image(path)


def test_every_colour_mode_becomes_rgb_and_exif_rotation_is_left(tmp_path, noise):
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png")):
        noise.convert(mode).save(tmp_path / f"x.{suffix}")
        assert read_image(tmp_path / f"x.{suffix}").shape == (40, 60, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (40, 60, 3)


def test_hidden_files_are_left_out_and_the_order_is_fixed(tmp_path, noise):
    for name in ("b/2.png", "b/1.JPG", "a/9.png", "._a.png", "a/notes.txt", "z.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert list_images(tmp_path) == ["z.png", "a/9.png", "b/1.JPG", "b/2.png"]


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, link):
    for name in ("a", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    shut = tmp_path / "a" / "shut"
    if link:
        shut.symlink_to(tmp_path / "elsewhere")
    else:
        shut.mkdir()
    scan = os.scandir

    def fail(path):
        if os.fspath(path) == str(shut):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UnreadableError, match=r"a/shut cannot be read: Permission denied$"):
        list_images(tmp_path)
    with pytest.raises(UnreadableError, match=r"a/shut cannot be read: Permission denied$"):
        detect(shut)
    (tmp_path / "a").rename(tmp_path / "train")
    shut = tmp_path / "train"
    with pytest.raises(UnreadableError, match=r"train cannot be read: Permission denied$"):
        detect(tmp_path)


@pytest.mark.parametrize(("link", "target"), [("a/b/up", ".."), ("a/here", "."), ("a/b/top", "../..")])
def test_a_link_to_a_folder_that_is_read_anyway_multiplies_nothing(tmp_path, link, target):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "0.png").write_bytes(b"")
    (tmp_path / link).symlink_to(target)
    assert list_images(tmp_path) == ["a/b/0.png"]


@pytest.mark.parametrize(("link", "listed"), [("a/up", "a"), ("self", "self")])
def test_a_link_to_a_folder_above_is_refused(tmp_path, link, listed):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    (tmp_path / link).symlink_to(tmp_path)
    with pytest.raises(DataError, match=rf"{link} is a link to .*, which it lies in; remove the link"):
        list_images(tmp_path / listed)


def test_links_to_a_folder_elsewhere_are_followed(tmp_path):
    (tmp_path / "store" / "x").mkdir(parents=True)
    (tmp_path / "store" / "x" / "0.png").write_bytes(b"")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "two").symlink_to("../store/x")
    assert list_images(tmp_path / "set") == ["one/x/0.png", "two/0.png"]
    assert list_images(tmp_path / "set" / "two") == ["0.png"]


def test_hidden_folders_are_left_out(tmp_path):
    for name in ("a/0.png", "a/.ipynb_checkpoints/0-checkpoint.png", "a/.hidden/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == ["a/0.png"]
    assert list_images(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("x.png", np.uint16, "I;16"),
        ("x.tif", np.uint16, "I;16"),
        ("x.tif", ">u2", "I;16B"),
        ("x.tif", np.int32, "I"),
        ("x.tif", np.float32, "F"),
    ],
)
def test_images_of_more_than_8_bits_are_refused_and_such_masks_are_not(tmp_path, name, kind, mode):
    image = Image.fromarray(np.arange(12).reshape(3, 4).astype(np.dtype(kind)))
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == mode
    with pytest.raises(DataError, match=rf"{name} has the mode {mode}, .*; convert it to 8 bits$") as caught:
        read_image(tmp_path / name)
    assert not isinstance(caught.value, UnreadableError)
    assert read_mask(tmp_path / name).ravel().tolist() == list(range(12))


@pytest.mark.parametrize("name", [b"caf\xe9", b"a/caf\xe9.png"])
def test_a_name_that_is_not_utf8_is_named_so_that_it_can_be_printed(tmp_path, name):
    name = os.fsdecode(name)
    (tmp_path / "a").mkdir()
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"caf\\xe9.* its name is not UTF-8; rename it") as caught:
        Manifest(tmp_path, [(name, 0)], tmp_path / "cache")
    assert str(caught.value).isascii()


def test_a_root_whose_name_is_not_utf8_is_named(tmp_path, noise):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    root.mkdir()
    noise.save(root / "a.png")
    with pytest.raises(DataError, match=r"caf\\xe9 cannot be used: its name is not UTF-8"):
        Manifest(root, [("a.png", 0)], tmp_path / "cache")


def _manifest(root: Path, cache: Path) -> Manifest:
    return Manifest(root, [("a.png", 0), ("b.png", 1)], cache)


@pytest.fixture
def two_files(tmp_path) -> Path:
    root = tmp_path / "set"
    root.mkdir()
    for name, value in (("a.png", 10), ("b.png", 20)):
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(root / name)
    return root


def test_fingerprint_changes_with_one_pixel_of_the_same_file_size(two_files, tmp_path):
    before = _manifest(two_files, tmp_path / "cache").fingerprint()
    assert _manifest(two_files, tmp_path / "cache").fingerprint() == before
    content = bytearray((two_files / "a.png").read_bytes())
    content[-20] ^= 1
    (two_files / "a.png").write_bytes(bytes(content))
    assert _manifest(two_files, tmp_path / "cache").fingerprint() != before


def test_fingerprint_is_of_the_content_not_of_place_or_time(two_files, tmp_path):
    before = _manifest(two_files, tmp_path / "cache").fingerprint()
    moved = two_files.rename(tmp_path / "elsewhere")
    os.utime(moved / "a.png", (1, 1))
    assert _manifest(moved, tmp_path / "cache2").fingerprint() == before


def test_fingerprint_depends_on_labels_names_and_extra(two_files, tmp_path):
    def of(files, **extra):
        return Manifest(two_files, files, tmp_path / "cache").fingerprint(**extra)

    prints = [
        of([("a.png", 0), ("b.png", 1)]),
        of([("a.png", 1), ("b.png", 1)]),
        of([("b.png", 1), ("a.png", 0)]),
        of([("a.png", 0)]),
        of([("a.png", 0), ("b.png", 1)], void=[3]),
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(("place", "seen"), [(0, True), (-1, True), (10_000, False)])
def test_of_large_sets_both_ends_of_files_are_read(tmp_path, monkeypatch, place, seen):
    """Uncompressed images that are made anew keep their sizes, but not their first and last bytes."""
    monkeypatch.setattr(manifest, "CONTENT_LIMIT", 10)
    monkeypatch.setattr(Path, "read_bytes", _no_reading_of(tmp_path / "set", Path.read_bytes))
    (tmp_path / "set").mkdir()
    content = np.random.default_rng(0).integers(0, 256, (2, 20_000), dtype=np.uint8)
    names = ("a.bmp", "b.bmp")

    def fingerprint():
        for name, values in zip(names, content, strict=True):
            (tmp_path / "set" / name).write_bytes(values.tobytes())
        return Manifest(tmp_path / "set", [(name, 0) for name in names], tmp_path / "cache").fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    content[1, place] ^= 1
    assert (fingerprint() != before) == seen


@pytest.mark.parametrize(("files", "read"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 3, 5, 8])])
def test_of_large_sets_files_are_read_that_are_spread_evenly(tmp_path, monkeypatch, files, read):
    monkeypatch.setattr(manifest, "CONTENT_LIMIT", 10)
    monkeypatch.setattr(manifest, "MOST_SAMPLED", 4)
    names = [f"{i}.bmp" for i in range(files)]
    for name in names:
        (tmp_path / name).write_bytes(b"not much")
    opened = []
    ends = manifest._ends
    monkeypatch.setattr(manifest, "_ends", lambda path: opened.append(path.name) or ends(path))
    Manifest(tmp_path, [(name, 0) for name in names], tmp_path / "cache").fingerprint()
    assert opened == [f"{i}.bmp" for i in read]
    assert ends(tmp_path / "0.bmp") == b"not much" * 2


def _no_reading_of(folder, original):
    def read_bytes(path):
        assert folder not in path.parents, f"{path} was read"
        return original(path)

    return read_bytes


def test_fingerprint_is_remembered_while_no_file_changes(two_files, tmp_path, monkeypatch):
    before = _manifest(two_files, tmp_path / "cache").fingerprint()
    monkeypatch.setattr(Path, "read_bytes", _no_reading_of(two_files, Path.read_bytes))
    assert _manifest(two_files, tmp_path / "cache").fingerprint() == before


def test_manifest_names_the_missing_file(two_files, tmp_path):
    (two_files / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        _manifest(two_files, tmp_path / "cache")
