"""The feature store and the engine: batches that do not fit, disks that are full or fail, other runs."""

import errno
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from lmim_bench.bench import banks, features, room
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.data.views import apply_view
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine
from lmim_bench.bench.errors import DataError, TaskError
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Column, Dataset, Tap, View

CLS, MEAN, PATCHES = (Column(kind, Tap()) for kind in ("cls", "mean", "patches"))
COUNT = 7
VIEW = View("crop", 32, 32, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Flaky(ArraySplit):
    """Images of which some cannot be read in some passes."""

    reads = 0

    def unreadable(self, passes):
        """The positions that the n-th pass cannot read."""
        return ()

    def image(self, index):
        self.reads += 1
        if index in self.unreadable((self.reads - 1) // COUNT):
            raise DataError(f"{self.ids[index]} is broken")
        return super().image(index)


@pytest.fixture
def engine():
    return Engine(load_encoder("timm:vit_tiny_patch16_224"), "cpu", "fp32", 3)


@pytest.fixture
def split():
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    return Flaky(pixels, [str(i) for i in range(COUNT)], np.arange(COUNT))


@pytest.fixture
def bank(tmp_path, engine, split):
    data = Dataset("noise", "classification", "noise", splits={"val": split})

    def make(*columns, **options):
        store = FeatureStore(tmp_path / "features", 10**12, **options)
        return store.bank(engine, data, "val", VIEW, columns, Reporter())

    return make


def direct(engine, split, rows):
    images = torch.stack([apply_view(split.image(i), VIEW) for i in rows])
    return engine.encode(images, (Tap(),))[Tap()]


def test_columns_are_the_features_of_their_images_batch_by_batch(bank, engine, split):
    found, skipped = bank(CLS, PATCHES)
    expected = direct(engine, split, range(COUNT))
    np.testing.assert_allclose(found.column(CLS), expected.cls, atol=1e-5)
    np.testing.assert_allclose(found.column(PATCHES), expected.patches, atol=1e-5)
    assert skipped == ()
    assert found.images_per_second > 0


def test_a_pass_that_reads_other_images_never_meets_the_columns_of_another(bank, engine, split):
    split.unreadable = lambda passes: (0,) if passes == 0 else ()
    found, skipped = bank(CLS, skip_broken=True)
    assert skipped == ("0",)
    assert found.labels.tolist() == [1, 2, 3, 4, 5, 6]
    found, skipped = bank(CLS, MEAN, skip_broken=True)
    assert skipped == ()
    expected = direct(engine, split, range(COUNT))
    for column, values in ((CLS, expected.cls), (MEAN, expected.mean)):
        np.testing.assert_allclose(found.column(column), values, atol=1e-5)
    assert found.labels.tolist() == list(range(COUNT))


def test_images_that_come_and_go_are_an_error(bank, split):
    split.unreadable = lambda passes: (passes % COUNT,)
    bank(CLS, skip_broken=True)
    with pytest.raises(DataError, match="does not read twice the same"):
        bank(CLS, MEAN, skip_broken=True)


def test_a_bank_that_another_run_evicts_meanwhile_is_made_again(bank, tmp_path, monkeypatch):
    bank(CLS)
    original, evicted = FeatureStore.missing, []

    def evicting(self, key, columns):
        found = original(self, key, columns)
        if not evicted:
            evicted.append(key)
            shutil.rmtree(self.root / key)
        return found

    monkeypatch.setattr(FeatureStore, "missing", evicting)
    found, _ = bank(CLS)
    assert len(found.column(CLS)) == COUNT
    assert evicted


def test_images_that_a_disk_could_not_give_are_looked_at_again(bank, split, tmp_path):
    split.unreadable = lambda passes: (1, 4) if passes == 0 else ()
    assert bank(CLS, skip_broken=True)[1] == ("1", "4")
    again, skipped = bank(CLS)
    assert (len(again.ids), skipped) == (COUNT, ())
    assert len([path for path in (tmp_path / "features").iterdir() if path.is_dir()]) == 1
    assert bank(CLS, skip_broken=True)[1] == ()


def test_what_was_left_half_published_is_evicted(tmp_path, monkeypatch):
    store, rows = banks.BankStore(tmp_path, 1000), np.zeros((100, 10), np.float32)

    def add(key):
        with store.adding(key, len(rows), "rows", "mend") as new:
            new.write(np.arange(len(rows)), {"x": rows})
            new.publish([], {})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(banks, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            add("a" * 32)
    add("b" * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["b" * 32]


def test_a_bank_that_is_evicted_while_it_is_published_is_made_again(bank, tmp_path, monkeypatch):
    original, evicted = banks.write_json, []

    def late(path, payload):
        if not evicted:
            evicted.append(path)
            shutil.rmtree(path.parent)
            raise FileNotFoundError(path)
        original(path, payload)

    monkeypatch.setattr(banks, "write_json", late)
    found, _ = bank(CLS)
    assert len(found.column(CLS)) == COUNT
    assert evicted


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_killed_decoding_process_is_one_line_wherever_python_is(bank, engine, monkeypatch, elsewhere):
    message = "DataLoader worker (pid 7) is killed by signal: Killed." if not elsewhere else "worker 7"

    def told(*args):  # torch raises it where the signal finds the main thread: in the encoder most often
        raise RuntimeError(message)

    monkeypatch.setattr(engine, "launch", told)
    kind, words = (RuntimeError, "worker 7") if elsewhere else (DataError, "decodes images was killed")
    with pytest.raises(kind, match=words):
        bank(CLS)


def test_only_features_of_transformers_depend_on_its_version(engine, split):
    data = Dataset("noise", "classification", "noise", splits={"val": split})
    spec = engine.encoder.spec
    theirs = spec.model_copy(update={"family": "transformers"})
    keys = [features.bank_key("x", one, data, "val", VIEW, "fp32", "cpu") for one in (spec, theirs)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("cls@-1.npy", lambda data: data[:-100]),
        ("cls@-1.npy", lambda data: b""),
        ("index.npy", lambda data: data[:-8]),
        ("index.npy", lambda data: bytes(len(data))),
        ("meta.json", lambda data: data[: len(data) // 2]),
        ("meta.json", lambda data: b"{}"),
        ("meta.json", lambda data: b"null"),
    ],
)
def test_a_damaged_bank_is_made_again(bank, engine, split, tmp_path, name, damaged):
    folder = tmp_path / "features" / bank(CLS)[0].fingerprint
    (folder / name).write_bytes(damaged((folder / name).read_bytes()))
    found, _ = bank(CLS)
    expected = direct(engine, split, range(COUNT))
    np.testing.assert_allclose(found.column(CLS), expected.cls, atol=1e-5)
    assert found.labels.tolist() == list(range(COUNT))


def test_a_bank_without_its_index_is_made_again(bank, engine, split, tmp_path):
    folder = tmp_path / "features" / bank(CLS, MEAN)[0].fingerprint
    (folder / "index.npy").unlink()
    np.save(folder / "mean@-1.npy", np.zeros((COUNT, 192), np.float32))  # of whatever images
    found, _ = bank(CLS)
    np.testing.assert_allclose(found.column(CLS), direct(engine, split, range(COUNT)).cls, atol=1e-5)
    np.testing.assert_allclose(
        bank(MEAN)[0].column(MEAN), direct(engine, split, range(COUNT)).mean, atol=1e-5
    )


def test_no_column_is_ever_there_without_its_index(bank, tmp_path, monkeypatch):
    replace = type(tmp_path).replace

    def killed(path, target):
        if target.name == "cls@-1.npy":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bank(CLS)
    (made,) = (tmp_path / "features").iterdir()
    assert [path.name for path in made.iterdir()] == ["index.npy"]


def test_a_damaged_index_does_not_stop_the_columns_that_are_added(bank, tmp_path):
    folder = tmp_path / "features" / bank(CLS)[0].fingerprint
    (folder / "index.npy").write_bytes(b"")
    assert len(bank(CLS, MEAN)[0].column(CLS)) == COUNT


def test_an_error_of_the_encoding_is_no_damaged_bank(bank, engine, monkeypatch):
    def broken(*args):
        raise ValueError("of the encoder")

    monkeypatch.setattr(engine, "launch", broken)
    with pytest.raises(ValueError, match="of the encoder"):
        bank(CLS)


def test_a_bank_of_another_user_is_read(bank, monkeypatch):
    bank(CLS)

    def forbidden(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(banks.os, "utime", forbidden)
    assert len(bank(CLS)[0].column(CLS)) == COUNT


def test_a_bank_that_is_read_outlives_one_that_was_made_later(tmp_path):
    store = banks.BankStore(tmp_path, 10**9)

    def add(key, age):
        with store.adding(key, 1, "numbers", "free some") as rows:
            rows.write(np.arange(1), {"x": np.zeros((1, 1000))})
            rows.publish([], {})
        os.utime(tmp_path / key / "meta.json", (age, age))

    for age, key in enumerate(("first", "second")):
        add(key, age)
    store.read("first", ["x"])
    store = banks.BankStore(tmp_path, 20_000)
    add("third", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "third"]


def test_room_is_asked_for_all_columns_before_the_first_is_written(bank, tmp_path, monkeypatch):
    one = 4 * COUNT * 192
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(0, 0, one + 100))
    bank(CLS)
    with pytest.raises(
        DataError, match=r"the features mean@-1, patches@-1 need .* MB below .* are free; free"
    ):
        bank(MEAN, PATCHES)
    assert not list((tmp_path / "features").glob(".*"))


def test_room_that_another_process_takes_meanwhile_is_one_line(bank, tmp_path, monkeypatch):
    """Without its own room, a file with holes would end this process by a signal (SIGBUS)."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room.os, "posix_fallocate", full)
    with pytest.raises(
        DataError, match=r"the features cls@-1 need 0\.0 MB below .* free; free some, or set --c"
    ):
        bank(CLS)
    assert not list((tmp_path / "features").iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system does not offer it")
def test_the_room_of_a_new_array_is_its_own(tmp_path):
    room.new_array(tmp_path / "a.npy", np.float32, (1000, 100))
    assert 512 * (tmp_path / "a.npy").stat().st_blocks >= 4 * 1000 * 100
    assert np.load(tmp_path / "a.npy").shape == (1000, 100)


def test_a_disk_that_takes_no_room_at_once_is_written_to_all_the_same(bank, monkeypatch):
    def not_offered(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(room.os, "posix_fallocate", not_offered)
    assert len(bank(CLS)[0].column(CLS)) == COUNT


def test_the_speed_of_another_machine_is_not_given(bank, monkeypatch):
    assert bank(CLS)[0].images_per_second is not None
    monkeypatch.setattr(features.platform, "node", lambda: "another")
    assert bank(CLS)[0].images_per_second is None


def test_other_versions_of_what_computes_features_have_banks_of_their_own(bank, monkeypatch):
    first = bank(CLS)[0].fingerprint
    monkeypatch.setattr(features, "FEATURES_VERSION", 99)
    second = bank(CLS)[0].fingerprint
    monkeypatch.setattr(features, "_versions", lambda packages: ["timm 0.0.1"])
    assert len({first, second, bank(CLS)[0].fingerprint}) == 3


# ------------------------------------------------------------------------------------------- engine


class Cramped:
    """An encoder on a device that holds so many images."""

    def __init__(self, encoder, room):
        self.encoder, self.room, self.asked = encoder, room, []

    def to(self, device):
        return self

    def __call__(self, images, *args):
        self.asked.append(len(images))
        if len(images) > self.room:
            raise torch.cuda.OutOfMemoryError("made up")
        return self.encoder(images, *args)


def test_a_batch_that_does_not_fit_is_halved_and_that_is_remembered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    encoder = load_encoder("timm:vit_tiny_patch16_224")
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = Engine(encoder, "cpu", "fp32", None).encode(images, (Tap(),))[Tap()]
    cramped = Cramped(encoder, 3)
    engine = Engine(cramped, "cpu", "fp32", None)
    found = engine.encode(images, (Tap(),))[Tap()]
    torch.testing.assert_close(found.patches, expected.patches)
    torch.testing.assert_close(found.cls, expected.cls)
    assert cramped.asked == [10, 5, 2, 2, 2, 2, 2]
    cramped.asked.clear()
    engine.encode(images, (Tap(),))
    assert cramped.asked == [2, 2, 2, 2, 2]


def test_an_image_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine = Engine(Cramped(None, 0), "cpu", "fp32", None)
    with pytest.raises(TaskError, match="an image of 32 x 48 does not fit on cpu"):
        engine.encode(torch.zeros(2, 3, 32, 48), (Tap(),))


def test_what_is_not_finite_is_refused():
    class Broken:
        def to(self, device):
            return self

        def __call__(self, images, taps, _):
            nan = torch.full((len(images), 2, 2, 4), torch.nan)
            return {tap: features.Features(None, nan, nan.mean((1, 2))) for tap in taps}

    with pytest.raises(TaskError, match="not finite in fp32"):
        Engine(Broken(), "cpu", "fp32", None).encode(torch.zeros(1, 3, 32, 32), (Tap(),))
