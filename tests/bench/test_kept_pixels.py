"""Decoded pixels that are kept: those that decoding gives, read once from the files, whole or not there."""

import io
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from lmim_bench.bench import features, room
from lmim_bench.bench.banks import PIXELS, BankStore
from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.cli import cli
from lmim_bench.bench.data import kept, loading
from lmim_bench.bench.data.kept import keeping, open_kept, read_kept
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.features import FeatureStore, pixels_key
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.results import load_run
from lmim_bench.bench.types import Column, Dataset, Tap, View
from lmim_bench.bench.vit import build_vit, vit_spec

CLS = Column("cls", Tap())
COUNT, BATCH = 11, 3
VIEW = View("crop", 32, 36, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Counted(ArraySplit):
    """Images that know how often they were decoded; some are broken."""

    reads = 0
    broken = ()

    def image(self, index):
        self.reads += 1
        if index in self.broken:
            raise DataError(f"{self.ids[index]} is broken")
        return super().image(index)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(load_encoder("timm:vit_tiny_patch16_224"), "cpu", "fp32", None)
    engine.batch_for = lambda *_: BATCH
    return engine


@pytest.fixture
def split():
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 40, 52, 3), dtype=np.uint8)
    return Counted(pixels, [str(i) for i in range(COUNT)], np.arange(COUNT))


@pytest.fixture
def data(split):
    return Dataset("noise", "classification", "noise", splits={"val": split})


@pytest.fixture
def passes(tmp_path, engine, data):
    """Features of a pass whose own cache is new, beside pixels that stay."""

    def pass_over(view=VIEW, max_bytes=10**9, reporter=None, **options):
        store = FeatureStore(tmp_path / "cache", max_bytes, **options)
        bank, skipped = store.bank(engine, data, "val", view, [CLS], reporter or Reporter())
        values = np.array(bank.column(CLS))
        for column in (tmp_path / "cache").rglob("cls@*.npy"):
            column.unlink()
        return values, bank.ids, skipped

    return pass_over


def pixel_files(tmp_path):
    return list((tmp_path / "cache").rglob(f"{PIXELS}.npy"))


def test_kept_pixels_give_the_same_features_and_nothing_is_decoded_again(passes, split, tmp_path):
    expected, ids, _ = passes()
    assert not pixel_files(tmp_path)
    first, _, _ = passes(keep_pixels=True)
    assert split.reads == 2 * COUNT
    again, again_ids, _ = passes(keep_pixels=True)
    unasked, _, _ = passes()  # what is there is taken
    assert split.reads == 2 * COUNT
    for values in (first, again, unasked):
        np.testing.assert_array_equal(values, expected)
    assert again_ids == ids


def test_pixels_do_not_depend_on_what_an_encoder_subtracts_but_on_what_is_seen(passes, split, tmp_path):
    passes(keep_pixels=True)
    other, _, _ = passes(replace(VIEW, mean=(0.1, 0.2, 0.3)), keep_pixels=True)
    assert split.reads == COUNT
    assert len(pixel_files(tmp_path)) == 1
    for changed in ({"size": 16}, {"resize": 40}, {"interpolation": "bilinear"}, {"mode": "squash"}):
        before = split.reads
        passes(replace(VIEW, **changed), keep_pixels=True)
        assert split.reads == before + COUNT
    assert len(pixel_files(tmp_path)) == 5
    expected, _, _ = passes(replace(VIEW, mean=(0.1, 0.2, 0.3)))
    np.testing.assert_array_equal(other, expected)


def test_other_decoders_and_other_code_decode_anew(data, monkeypatch):
    first = pixels_key(data, "val", VIEW)
    monkeypatch.setattr(features, "_versions", lambda packages: [f"{name} 0.0.1" for name in packages])
    second = pixels_key(data, "val", VIEW)
    monkeypatch.setattr(features, "FEATURES_VERSION", 99)
    assert len({first, second, pixels_key(data, "val", VIEW)}) == 3


def test_broken_images_are_left_out_of_the_pixels_and_named_again(passes, split):
    split.broken = (0, 4)
    expected, ids, skipped = passes(skip_broken=True, keep_pixels=True)
    assert (len(expected), ids[0], skipped) == (COUNT - 2, "1", ("0", "4"))
    reads = split.reads
    again, again_ids, again_skipped = passes(skip_broken=True)
    assert split.reads == reads
    np.testing.assert_array_equal(again, expected)
    assert (again_ids, again_skipped) == (ids, skipped)
    with pytest.raises(DataError, match="0 is broken; --skip-broken leaves such images out"):
        passes()


def test_a_pass_that_stops_leaves_no_pixels(passes, split, tmp_path):
    split.broken = (COUNT - 1,)
    with pytest.raises(DataError, match=r"10 is broken"):
        passes(keep_pixels=True)
    assert not list((tmp_path / "cache").iterdir())


def test_nothing_is_kept_of_images_that_are_all_broken(passes, split, tmp_path):
    split.broken = range(COUNT)
    with pytest.raises(DataError, match="every image of noise/val is broken, first 0"):
        passes(keep_pixels=True, skip_broken=True)
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_without_room_is_one_line(passes, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(0, 0, COUNT * 3 * 32 * 32 - 1))
    with pytest.raises(DataError, match=r"the pixels of noise/val need .* free; free some, set --cache-dir"):
        passes(keep_pixels=True)
    assert not list((tmp_path / "cache").iterdir())


def test_pixels_that_were_used_longest_ago_make_room(passes, split, tmp_path):
    size = COUNT * 3 * 32 * 32
    passes(keep_pixels=True)
    (old,) = pixel_files(tmp_path)
    passes(replace(VIEW, resize=40), keep_pixels=True, max_bytes=int(1.6 * size))
    (new,) = pixel_files(tmp_path)
    assert new != old


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b""])
def test_damaged_pixels_are_decoded_again(passes, split, tmp_path, damage):
    expected, _, _ = passes(keep_pixels=True)
    (path,) = pixel_files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again, _, _ = passes(keep_pixels=True)
    assert split.reads == 2 * COUNT
    np.testing.assert_array_equal(again, expected)
    assert len(pixel_files(tmp_path)) == 1


# ------------------------------------------------------------------------------------------- reading them


@pytest.fixture
def bank(tmp_path):
    store = BankStore(tmp_path / "banks", 10**9)
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    with store.adding("key", COUNT, "pixels", "free some") as rows:
        rows.write(np.arange(COUNT) * 2, {PIXELS: pixels})
        rows.publish(["a", "b"], {})
    return store


@pytest.mark.parametrize("batch_size", [1, 2, 5, COUNT, 100])
@pytest.mark.parametrize("broken", [(), (0,), (3, 4, 5), (0, 1, 10)])
def test_batches_are_those_of_decoding(tmp_path, split, batch_size, broken):
    split.broken = broken
    store = BankStore(tmp_path / "banks", 10**9)
    with store.adding("key", COUNT, "pixels", "free some") as rows:
        decoded = list(keeping(iterate_batches(split, VIEW, batch_size, skip_broken=True), rows, {}))
    read = list(read_kept(open_kept(store, "key", True), COUNT, batch_size, "cpu"))
    for found, expected in zip(read, decoded, strict=True):
        np.testing.assert_array_equal(found.positions, expected.positions)
        assert torch.equal(found.images, expected.images)
    names = [[name for batch in batches for name in batch.broken] for batches in (read, decoded)]
    assert names[0] == names[1] == [str(i) for i in broken]


def test_a_file_that_another_run_deletes_is_read_to_its_end(bank, tmp_path):
    kept_pixels = open_kept(bank, "key", True)
    batches = read_kept(kept_pixels, 2 * COUNT, 1, "cpu")
    found = [next(batches)]
    shutil.rmtree(tmp_path / "banks")
    found += batches
    pixels = torch.cat([batch.images for batch in found]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, kept_pixels.bank.columns[PIXELS])
    assert open_kept(bank, "key", True) is None


def test_pixels_that_another_run_replaces_or_deletes_meanwhile_are_not_taken(bank, monkeypatch):
    read, path = BankStore.read, bank.path("key", PIXELS)

    def replaced(*args):
        found = read(*args)
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes())
        other.replace(path)
        return found

    monkeypatch.setattr(BankStore, "read", replaced)
    assert open_kept(bank, "key", True) is None

    def deleted(*args):
        found = read(*args)
        shutil.rmtree(path.parent)
        return found

    monkeypatch.setattr(BankStore, "read", deleted)
    assert open_kept(bank, "key", True) is None


def test_a_reader_that_is_left_leaves_nothing_open(bank, monkeypatch):
    streams = []
    read = kept._filled

    def seen(images, stream):
        streams.append(stream)
        return read(images, stream)

    monkeypatch.setattr(kept, "_filled", seen)
    batches = read_kept(open_kept(bank, "key", True), 2 * COUNT, 1, "cpu")
    next(batches)
    batches.close()
    assert all(stream.closed for stream in streams)
    assert 1 <= len(streams) < COUNT


def test_a_disk_that_fails_is_one_line_that_names_the_file():
    images = torch.empty((1, 8, 8, 3), dtype=torch.uint8)

    class Short(io.BytesIO):
        name = "pixels.npy"

    class Failing(Short):
        def readinto(self, target):
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match=r"^pixels\.npy cannot be read: Input/output error$"):
        kept._filled(images, Failing())
    with pytest.raises(DataError, match=r"is shorter than it was; delete it$"):
        kept._filled(images, Short(b"1"))


# ------------------------------------------------------------------------------------------- the command


def test_it_is_said_where_most_of_a_long_pass_is_reading(passes, monkeypatch):
    def told(**options):
        stream = io.StringIO()
        passes(reporter=Reporter(Console(file=stream, width=200)), **options)
        return stream.getvalue()

    def spend(share):
        spent = property(lambda laps: share * laps.seconds, lambda *_: None)
        monkeypatch.setattr(features._Laps, "waited", spent, raising=False)

    assert "went into" not in told()
    monkeypatch.setattr(features, "_LONG", 0.0)
    spend(0.4)
    assert "went into" not in told()
    spend(0.6)
    assert "--keep-pixels keeps them decoded for the next checkpoint, in 0.0 MB" in told()
    assert "--keep-pixels and a larger --cache-size keeps" in told(max_bytes=COUNT)
    assert "went into" not in told(keep_pixels=True)
    assert "went into" not in told(), "nothing was decoded"


def test_a_run_keeps_the_pixels_and_the_next_checkpoint_decodes_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / ("val" if number % 3 == 0 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    spec = vit_spec("lmim-bench", embed_dim=24, depth=4, num_heads=2, patch_size=8, image_size=32)
    for name in ("one", "two"):
        save_checkpoint(tmp_path / f"{name}.pth", spec, build_vit(spec.arch).state_dict(), {})

    def run(name, out, cache, *more):
        given = ["--data", str(tmp_path / "images"), "--cache-dir", str(tmp_path / cache), "--device", "cpu"]
        command = ["run", "--ckpt", str(tmp_path / f"{name}.pth"), "--tasks", "knn", "--out"]
        done = CliRunner().invoke(cli, [*command, str(tmp_path / out), *given, *more], catch_exceptions=False)
        return done.exit_code

    assert run("one", "refused", "cache", "--keep-pixels", "--cache-size", "0.00001") == 2
    assert not (tmp_path / "refused").exists()
    assert run("one", "first", "cache", "--keep-pixels") == 0
    assert len(pixel_files(tmp_path)) == 2
    assert run("two", "expected", "another") == 0

    def decoded(*_):
        raise AssertionError("images were decoded")

    monkeypatch.setattr(loading, "iterate_batches", decoded)
    assert run("two", "second", "cache") == 0
    (found,), (expected,) = (load_run(tmp_path / name).results for name in ("second", "expected"))
    assert [score.value for score in found.scores] == [score.value for score in expected.scores]
