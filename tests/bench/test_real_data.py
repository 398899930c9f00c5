"""The readers on the real sets that may lie beside the repository; skipped where they do not."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from lmim_bench.bench.data import detect_layout, load_data
from lmim_bench.tasks._math.davis_metrics import sequence_scores

ARCHIVES = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    def unpack(archive: str, wanted: str = "") -> Path:
        source = ARCHIVES / archive
        if not source.is_file():
            pytest.skip(f"{archive} is not in ../shared/data")
        folder = tmp_path_factory.mktemp("real")
        with tarfile.open(source) as tar:
            members = [m for m in tar.getmembers() if wanted in m.name or "ImageSets" in m.name]
            tar.extractall(folder, members=members, filter="data")
        return folder

    return unpack


def test_davis_sequences_score_one_against_themselves(unpacked, tmp_path):
    root = unpacked("davis2016-8seq.tar", "/blackswan/") / "DAVIS"
    (root / "ImageSets" / "2016" / "val.txt").write_text("blackswan\n", encoding="utf-8")
    data = load_data(str(root), cache_dir=tmp_path)
    (sequence,) = data.sequences
    assert len(sequence) == 50
    truth = np.stack([sequence.mask(i) for i in range(len(sequence))])
    assert truth.shape == (50, 480, 854)
    assert set(np.unique(truth)) == {0, 1}
    region, boundary = sequence_scores(truth, truth)
    assert region.shape == (1, 48)
    assert region.min() == boundary.min() == 1
    region, _ = sequence_scores(truth, np.broadcast_to(truth[:1], truth.shape))
    assert 0.1 < region.mean() < 0.9


def test_camvid_has_eleven_classes_and_void(unpacked, tmp_path):
    root = unpacked("camvid.tar", "camvid/val") / "camvid"
    data = load_data(str(root), cache_dir=tmp_path, test="val", void=[11])
    split = data.splits["val"]
    assert (data.kind, len(split), len(data.classes)) == ("segmentation", 101, 11)
    assert split.image(0).shape[:2] == split.mask(0).shape == (360, 480)
    assert set(np.unique(split.mask(0))) <= set(range(12))


def test_caltech_is_an_image_folder_of_101_classes(unpacked, tmp_path):
    root = unpacked("caltech101-160px.tar") / "caltech101"
    assert detect_layout(str(root)).layout == "imagefolder"
    data = load_data(str(root), cache_dir=tmp_path)
    assert len(data.classes) == 101
    assert data.counts() == {"train": 2682, "val": 2611}
    assert min(data.splits["train"].image(0).shape[:2]) == 160
