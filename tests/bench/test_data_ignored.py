"""Images of types that are not read: none is missed in silence, and nothing else is taken for one."""

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench.api import run
from lmim_bench.bench.cli import cli
from lmim_bench.bench.data import Detected, load_data, load_unlabelled
from lmim_bench.bench.data.files import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from lmim_bench.bench.doctor_data import data_checks
from lmim_bench.bench.doctor_system import Subject
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.progress import Reporter


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(path, "PNG")
    return path


def mask(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16), 1, np.uint8)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for i in range(3):
                picture(root / split / name / f"{i}.png", 99 * label + i)
    for name in ("train/cat/7.gif", "train/cat/deep/8.GIF", "val/dog/9.avif"):
        picture(root / name)
    for name in ("train/cat/._x.gif", "train/cat/notes.txt", "train/cat/a.json", "val/.tmp/y.gif", "z.gif"):
        picture(root / name)
    return root


def load(root, tmp_path, **options):
    return load_data(str(root), cache_dir=tmp_path / "cache", **options)


def test_types_are_read_or_counted_and_torchvision_agrees_which():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMAGE_SUFFIXES) == set(IMG_EXTENSIONS)
    assert not set(UNREAD_SUFFIXES) & set(IMAGE_SUFFIXES)


def test_they_are_counted_below_the_splits_that_are_used(folder, tmp_path):
    data = load(folder, tmp_path)
    assert data.counts() == {"train": 6, "val": 6}
    assert data.ignored == {".gif": 2, ".avif": 1}
    assert data.limited(2).ignored == data.ignored
    assert load_unlabelled(folder, cache_dir=tmp_path / "cache").ignored == {".gif": 3}  # val is not read


def test_the_fingerprint_is_that_of_what_is_read(folder, tmp_path):
    before = load(folder, tmp_path).fingerprint
    (folder / "val" / "dog" / "9.avif").unlink()
    assert load(folder, tmp_path).fingerprint == before


def test_segmentation_and_video_count_theirs(tmp_path):
    root = tmp_path / "roads"
    for base in (root, root / "val"):
        for i in range(2):
            picture(base / "images" / f"{i}.png")
            mask(base / "masks" / f"{i}.png")
        picture(base / "images" / "2.gif")
        mask(base / "masks" / "2.gif")
    assert load(root, tmp_path, layout="segmentation-flat").ignored == {".gif": 2}
    assert load(root, tmp_path, layout="segmentation").ignored == {".gif": 2}
    clips = tmp_path / "clips"
    for i, suffix in enumerate((".png", ".png", ".jp2")):
        picture(clips / "JPEGImages" / "480p" / "cat" / f"{i}{suffix}")
        mask(clips / "Annotations" / "480p" / "cat" / f"{i}{suffix}")
    assert load(clips, tmp_path).ignored == {".jp2": 2}


KNOWN = re.escape("known: .jpg, .jpeg, .png")


def test_a_class_of_them_alone_is_told(folder, tmp_path):
    for i in range(3):
        picture(folder / "train" / "eel" / f"{i}.gif")
    with pytest.raises(DataError, match=rf"train/eel holds no image of a known type \(3 x \.gif; {KNOWN}"):
        load(folder, tmp_path)


def test_masks_of_them_alone_are_told(tmp_path):
    root = tmp_path / "roads"
    picture(root / "images" / "0.png")
    mask(root / "masks" / "0.gif")
    with pytest.raises(DataError, match=rf"masks holds no image of a known type \(1 x \.gif; {KNOWN}"):
        load(root, tmp_path)


def test_a_folder_of_them_alone_is_told(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "pets" / split / "cat" / "0.heic")
    with pytest.raises(DataError, match=r"no known layout: .* \(2 files ignored \(\.heic 2\)\)"):
        load(tmp_path / "pets", tmp_path)
    with pytest.raises(DataError, match=r"no image of a known type \(2 x \.heic"):
        load_unlabelled(tmp_path / "pets")


def test_the_data_command_and_the_doctor_say_it(folder, tmp_path):
    found = CliRunner().invoke(cli, ["data", str(folder), "--cache-dir", str(tmp_path / "cache")])
    assert "3 files ignored (.gif 2, .avif 1)" in found.output
    layout = Detected("imagefolder", "classification", "y")
    checks = data_checks(Subject("data", "pets"), load(folder, tmp_path), layout, Reporter())
    (warning,) = [check for check in checks if check.status == "warn"]
    assert warning.found == "3 files ignored (.gif 2, .avif 1)"


def test_a_run_says_it_in_its_lines_its_result_and_its_summary(folder, tmp_path):
    from lmim_bench.reports.model import read_report
    from lmim_bench.reports.tables import write_table
    from lmim_bench.reports.text import summary_table

    options = {"tasks": ["knn"], "data": [str(folder)], "device": "cpu", "cache_dir": tmp_path / "cache"}
    finished = run("pixels", **options, out=tmp_path / "out")
    (result,) = finished.results
    assert result.data.ignored == {".gif": 2, ".avif": 1}
    assert "3 files ignored (.gif 2, .avif 1)" in result.notes
    said = "pets: 3 files ignored (.gif 2, .avif 1)"
    assert said == str(summary_table(finished, tmp_path / "out")).splitlines()[0]
    assert f"{said}. " in write_table(read_report([tmp_path / "out"]), "md")
    arguments = ["run", "--ckpt", "pixels", "--tasks", "knn", "--data", str(folder), "--dry-run"]
    dry = CliRunner().invoke(cli, [*arguments, "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"])
    assert said in dry.output
