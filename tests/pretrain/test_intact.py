import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import DataError, UnreadableError
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Dataset
from lmim_bench.pretrain.api import pretrain, resume
from lmim_bench.pretrain.intact import without_broken
from lmim_bench.pretrain.logbook import read_metrics

IMAGES = 70


@dataclasses.dataclass
class Numbered:
    """A split whose image i has the colour i; those of ``broken`` raise ``error``."""

    numbers: np.ndarray
    broken: frozenset
    error: type = DataError

    def __len__(self):
        return len(self.numbers)

    @property
    def ids(self):
        return [f"{i}.png" for i in self.numbers]

    @property
    def labels(self):
        return self.numbers * 2

    def image(self, i):
        if self.numbers[i] in self.broken:
            raise self.error(f"{self.ids[i]} is broken")
        return np.full((1, 1, 3), (self.numbers[i], 0, 0), dtype=np.uint8)

    def subset(self, index):
        return dataclasses.replace(self, numbers=self.numbers[index])


def opened(**broken):
    splits = {
        name: Numbered(np.arange(IMAGES), frozenset(broken.get(name, ())))
        for name in ("train", "val", "more")
    }
    return Dataset("numbers", "classification", f"{broken}", ("a", "b"), splits)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(broken=st.sets(st.integers(0, IMAGES - 1), max_size=IMAGES - 1))
def test_the_next_readable_image_takes_the_place_and_all_others_stay(tmp_path_factory, broken):
    data = opened(train=broken)
    whole, named = without_broken(data, tmp_path_factory.mktemp("cache"), 0, Reporter())
    expected = []
    for place in range(IMAGES):
        while place in broken:
            place = (place + 1) % IMAGES
        expected.append(place)
    assert whole.splits["train"].numbers.tolist() == expected
    assert whole.splits["train"].labels.tolist() == [2 * place for place in expected]
    assert whole.splits["val"].numbers.tolist() == list(range(IMAGES))
    assert sorted(named) == sorted(f"{i}.png" for i in broken)
    assert whole.fingerprint == data.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_both_splits_are_looked_at_once_and_what_is_broken_is_told(tmp_path, capsys, monkeypatch, workers):
    data = opened(train={0, 69}, val={3}, more={5})
    whole, named = without_broken(data, tmp_path, workers, Reporter())
    assert named == ("0.png", "69.png", "3.png")
    said = " ".join(capsys.readouterr().err.split())
    assert "WARNING: 3 broken image(s) left out, another in the place of each, first 0.png" in said
    (kept,) = tmp_path.glob("*-broken.json")
    assert json.loads(kept.read_bytes()) == {"train": {"0.png": 0, "69.png": 69}, "val": {"3.png": 3}}
    monkeypatch.setattr(Numbered, "image", lambda *_: pytest.fail("looked at again"))
    again, named_again = without_broken(whole, tmp_path, workers, Reporter())
    assert named_again == named
    for name in ("train", "val", "more"):
        assert again.splits[name].numbers.tolist() == whole.splits[name].numbers.tolist()


def test_nothing_is_left_of_a_split_that_is_broken_all_over(tmp_path):
    with pytest.raises(DataError, match=r"every image of numbers/val is broken, first 0\.png"):
        without_broken(opened(val=range(IMAGES)), tmp_path, 0, Reporter())


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_system_fails_to_read_is_not_taken_for_broken(tmp_path, workers):
    data = opened()
    failing = dataclasses.replace(data.splits["val"], broken=frozenset({66}), error=UnreadableError)
    data = dataclasses.replace(data, splits={**data.splits, "val": failing})
    with pytest.raises(DataError, match=r"66\.png is broken"):
        without_broken(data, tmp_path, workers, Reporter())
    assert not list(tmp_path.glob("*-broken.json"))


@pytest.fixture
def photos(tmp_path):
    """An image folder, and the place of the image in it that is cut off."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    cut = tmp_path / "photos" / "train" / "a" / "07.png"
    cut.write_bytes(cut.read_bytes()[:200])
    return tmp_path / "photos", cut


def losses(out):
    return [line["loss"] for line in read_metrics(out) if "loss" in line]


@pytest.mark.parametrize("cached", ["never", "always"])
def test_a_training_that_a_broken_image_stopped_goes_on_without_it(photos, tmp_path, tiny, cached):
    folder, cut = photos
    sets = ("optim.batch_size=8", "optim.steps=6", f"data.cache={cached}", "data.store_size=16")
    sets += ("engine.device=cpu", "watch.tensorboard=false", "watch.checkpoints=6", "watch.log_every=1")
    sets += ("watch.evaluations=0",)
    recipe = tiny("mae", *sets)
    rest = {"reporter": Reporter(), "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match=rf"{cut.name} .*; --skip-broken puts another image in its place"):
        pretrain(recipe, str(folder), tmp_path / "stopped", **rest)
    resume(tmp_path / "stopped", sets=["engine.skip_broken=true"], **rest)
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_bytes())
    assert summary["broken_images"] == ["train/a/07.png"]
    notes = load_encoder(str(tmp_path / "stopped" / "encoder.pth")).info.notes
    assert "1 broken image(s) left out, first train/a/07.png" in notes

    # As if a copy of the next image had been there from the first.
    shutil.copy(cut.with_name("08.png"), cut)
    pretrain(recipe, str(folder), tmp_path / "copied", **rest)
    assert len(losses(tmp_path / "stopped")) == 6
    assert losses(tmp_path / "stopped") == losses(tmp_path / "copied")
