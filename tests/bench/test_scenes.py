"""The embedded scenes: the same bytes on every run, exact masks, and the promised difficulty."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lmim_bench.bench.data import embedded, load_data, scenes
from lmim_bench.bench.data.drawing import SHAPES, TEXTURES, Thing, draw, grid, oklch
from lmim_bench.bench.data.embedded import Sizes, ensure_scenes, generate
from lmim_bench.bench.data.scenes import CLASSES, PAIRS, classification_scene, generator
from lmim_bench.bench.errors import DataError

TINY = Sizes(train_per_class=2, val_per_class=1, segmentation=(2, 3), sequences=1)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    generate(folder, TINY)
    return folder


def test_same_bytes_on_every_run_and_thread_count(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("lmim_bench.bench.data.embedded.usable_cores", lambda: [0])
    generate(tmp_path, TINY)
    assert digests(tmp_path) == digests(tiny)


def test_a_picture_does_not_depend_on_how_many_there_are(tiny, tmp_path):
    generate(tmp_path, TINY._replace(train_per_class=3, segmentation=(1, 4)))
    more, fewer = digests(tmp_path), digests(tiny)
    shared = {name for name in fewer if name in more and name != "complete.json"}
    assert len(shared) > 50
    assert all(more[name] == fewer[name] for name in shared)


def test_no_picture_occurs_twice_and_splits_are_disjoint(tiny):
    found = [
        d for n, d in digests(tiny).items() if n.endswith("png") and "masks" not in n and "Anno" not in n
    ]
    assert len(found) == 12 * 3 + 5 + scenes.FRAMES
    assert len(set(found)) == len(found)


def test_another_seed_is_another_data_set(tiny, tmp_path):
    generate(tmp_path, TINY, seed=1)
    name = "scenes/val/striped-ball/0000.png"
    assert digests(tmp_path)[name] != digests(tiny)[name]


def test_classes_are_pairs_and_neither_part_tells_the_class():
    assert len(set(CLASSES)) == len(set(PAIRS)) == 12
    for part, known in ((0, SHAPES), (1, TEXTURES)):
        counts = {name: sum(pair[part] == name for pair in PAIRS) for name in known}
        assert set(counts.values()) == {2}


def thing(**changes) -> Thing:
    plain = {
        "label": 5,
        "shape": "ball",
        "texture": "dotted",
        "centre": (0.5, 0.45),
        "radius": 0.3,
        "angle": 0.3,
        "squash": 1.0,
        "colours": np.array([[0.2, 0.3, 0.4], [0.9, 0.8, 0.7]], np.float32),
        "grain": (0.1, 1.0, 0.0, 0.0),
        "bend": np.zeros((3, 2), np.float32),
    }
    return Thing(**(plain | changes))


def drawn(things: list[Thing], side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    x, y = grid(side, side)
    canvas, labels = np.full((side, side, 3), 0.5, np.float32), np.zeros((side, side), np.uint8)
    for one in things:
        draw(canvas, labels, one, x, y, (0.6, -0.8))
    return canvas, labels


def test_mask_of_a_ball_is_the_pixels_whose_centre_lies_in_the_disc():
    _, labels = drawn([thing()])
    rows, cols = np.mgrid[0:96, 0:96]
    distance = np.hypot((cols + 0.5) / 96 - 0.5, (rows + 0.5) / 96 - 0.45)
    edge = np.abs(distance - 0.82 * 0.3) < 1e-5
    assert np.array_equal((labels == 5)[~edge], (distance < 0.82 * 0.3)[~edge])
    assert (labels == 5).sum() == pytest.approx(np.pi * (0.82 * 0.3 * 96) ** 2, rel=0.02)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_mask_is_where_the_object_was_painted(shape):
    """Beyond the mask only shadow and the half-covered edge differ: colour is exactly the object's inside."""
    with_object, labels = drawn([thing(shape=shape, texture=None)])
    from scipy.ndimage import binary_dilation, binary_erosion

    inner, outer = binary_erosion(labels == 5, iterations=2), ~binary_dilation(labels == 5, iterations=2)
    assert inner.any()
    # Outside only the grey ground, darkened alike in all channels; inside the painted colour is not grey.
    spread = np.ptp(with_object, axis=2)
    assert spread[outer].max() < 1e-6
    assert spread[inner].min() > 0.05


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_objects_are_connected_and_keep_within_reach(shape):
    from scipy.ndimage import label

    bend = np.array([[0.12, 1.0], [0.12, 2.0], [0.12, 3.0]], np.float32)
    large = {"shape": shape, "radius": 0.3, "centre": (0.5, 0.5), "squash": 1.1, "bend": bend}
    _, clipped = drawn([thing(**large)])
    x, y = grid(96, 96)
    from lmim_bench.bench.data.drawing import inside

    assert np.array_equal(clipped > 0, inside(thing(**large), x, y) < 0), "the drawn window cut the object"
    assert label(clipped, np.ones((3, 3)))[1] == 1
    assert 0.3 < (clipped > 0).mean() / (np.pi * 0.3**2) < 1.2


def test_the_later_object_covers_the_earlier():
    _, labels = drawn([thing(label=1), thing(label=2, centre=(0.6, 0.45))])
    _, alone = drawn([thing(label=2, centre=(0.6, 0.45))])
    assert np.array_equal(labels == 2, alone == 2)
    assert (labels == 1).any()


def test_objects_beyond_the_border_do_not_fail():
    for centre in ((-0.5, 0.5), (1.6, 1.6), (0.0, 0.0), (1.0, -0.29)):
        canvas, _ = drawn([thing(centre=centre)])
        assert np.isfinite(canvas).all()


def test_oklch_of_known_colours():
    assert oklch(1.0, 0.0, 0.3) == pytest.approx(np.ones(3), abs=1e-3)
    assert oklch(0.0, 0.0, 0.3) == pytest.approx(np.zeros(3), abs=1e-3)
    assert oklch(0.627955, 0.257683, 29.2339 / 360) == pytest.approx(
        np.array([1, 0, 0]), abs=2e-3
    )  # sRGB red


def test_one_object_dominates_each_classified_picture():
    for category in range(12):
        picture, labels = classification_scene(generator("t", category), category)
        assert picture.shape == (scenes.SIDE, scenes.SIDE, 3)
        assert picture.dtype == np.uint8
        assert 0.04 < (labels == 1).mean() < 0.6
        assert picture.std() > 8


def test_video_objects_are_there_move_and_hide_each_other():
    hidden = 0
    for i in range(4):
        shots = scenes.video_scene(generator(0, "video", i))
        assert len(shots) == scenes.FRAMES
        first = shots[0][1]
        objects = sorted(set(np.unique(first)) - {0})
        assert objects == list(range(1, len(objects) + 1))
        assert 2 <= len(objects) <= 3
        areas = np.array([[(labels == k).sum() for k in objects] for _, labels in shots])
        assert areas[0].min() > 0.008 * first.size
        assert (areas > 0).mean() > 0.95
        hidden += (areas.min(axis=0) < 0.6 * areas.max(axis=0)).any()
        assert all((a[1] != b[1]).mean() > 0.002 for a, b in pairwise(shots))
        assert not set(np.unique(np.stack([labels for _, labels in shots]))) - {0, *objects}
    assert hidden >= 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache whose scenes are the tiny ones."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "Sizes", lambda: TINY)
        load_data("scenes", cache_dir=folder)
    return folder


def test_ordinary_readers_serve_them(cache):
    labelled = load_data("scenes", cache_dir=cache)
    assert (labelled.name, labelled.kind, labelled.counts()) == (
        "scenes",
        "classification",
        {"train": 24, "val": 12},
    )
    assert set(labelled.classes) == set(CLASSES)
    dense = load_data("scenes-seg", cache_dir=cache)
    assert dense.classes == ("background", *CLASSES)
    assert dense.counts() == {"train": 2, "val": 3}
    mask = dense.splits["val"].mask(0)
    assert mask.shape == (scenes.SEGMENTATION_SIDE, scenes.SEGMENTATION_SIDE)
    assert set(np.unique(mask)) <= set(range(13))
    assert np.array_equal(mask, scenes.segmentation_scene(generator(0, "segmentation", "val", 0))[1])
    video = load_data("scenes-video", cache_dir=cache)
    (sequence,) = video.sequences
    assert (len(sequence), sequence.frame(0).shape) == (scenes.FRAMES, (*scenes.FRAME, 3))
    shots = scenes.video_scene(generator(0, "video", 0))
    for i in (0, 7):
        assert np.array_equal(sequence.frame(i), shots[i][0])
        assert np.array_equal(sequence.mask(i), shots[i][1])


def test_they_are_drawn_once(cache, monkeypatch):
    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(embedded, "generate", never)
    assert (
        load_data("scenes", cache_dir=cache).fingerprint == load_data("scenes", cache_dir=cache).fingerprint
    )


def test_a_run_that_was_cut_leaves_nothing_that_is_used(tmp_path, monkeypatch):
    calls = []

    def cut(folder, *_):
        calls.append(folder)
        (folder / "scenes" / "train").mkdir(parents=True)
        if len(calls) == 1:
            raise KeyboardInterrupt
        generate(folder / "rest", TINY)
        (folder / "complete.json").write_text("{}")

    monkeypatch.setattr(embedded, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        ensure_scenes(tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = ensure_scenes(tmp_path)
    assert (folder / "complete.json").is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_emptied_in_part_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "generate", lambda folder: generate(folder, TINY))
    folder = ensure_scenes(tmp_path)
    whole = digests(folder)
    (folder / "complete.json").unlink()
    (folder / "scenes" / "val" / "striped-ball" / "0000.png").unlink()
    assert digests(ensure_scenes(tmp_path)) == whole


def test_two_processes_at_once_end_with_one_whole_folder(tmp_path, monkeypatch):
    def overtaken(folder, *_):
        generate(folder, TINY)
        if not (tmp_path / f"scenes-v{scenes.VERSION}").exists():
            generate(tmp_path / f"scenes-v{scenes.VERSION}", TINY)  # the other process was faster

    monkeypatch.setattr(embedded, "generate", overtaken)
    folder = ensure_scenes(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"embedded scenes cannot be written below"):
        ensure_scenes(tmp_path / "file")


def test_pixels_do_not_tell_the_class():
    """1-NN on pixels must stay far from the ceiling; 20 x 12 references, chance 8.3%."""
    from PIL import Image

    def split(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        found = [
            np.asarray(Image.fromarray(classification_scene(generator(0, name, c, i), c)[0]).resize((16, 16)))
            for c in range(12)
            for i in range(count)
        ]
        return np.stack(found).reshape(len(found), -1).astype(np.float64), np.repeat(np.arange(12), count)

    (train, train_labels), (test, test_labels) = split("a", 20), split("b", 6)
    nearest = ((test[:, None] - train[None]) ** 2).sum(-1).argmin(1)
    assert (train_labels[nearest] == test_labels).mean() < 0.5
