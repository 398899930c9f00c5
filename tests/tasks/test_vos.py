"""The task end to end on toy videos, with pixels themselves as features."""

import errno
import io
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.config import validate
from lmim_bench.bench.errors import ConfigError, DataError, TaskError
from lmim_bench.bench.types import Context, Dataset, EncoderSpec, Features
from lmim_bench.tasks import vos
from lmim_bench.tasks._math import davis_frames, davis_metrics
from lmim_bench.tasks.vos import METRICS, TASK, VosConfig

PATCH = 4
SPEC = EncoderSpec(family="toy", arch={}, embed_dim=4, depth=1, patch_size=PATCH, image_size=64)
SMALL = {"size": 64, "radius": 4}
PATIENCE = 20.0
"""Seconds that a test waits for what another thread is to do."""


@dataclass
class Video:
    frames: np.ndarray
    masks: np.ndarray
    name: str = "toy"

    def __post_init__(self):
        self.frame_ids = [f"{i:05d}" for i in range(len(self.frames))]

    def __len__(self):
        return len(self.frames)

    def frame(self, i):
        return self.frames[i]

    def mask(self, i):
        return self.masks[i]

    def head(self, n):
        return Video(self.frames[:n], self.masks[:n], self.name)


def moving(length=12, height=64, width=128, objects=1, step=4, name="toy"):
    """Coloured squares that move to the right over a smooth background."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([x * 100 // width, y * 100 // height, (x + y) * 60 // (width + height)], axis=-1)
    frames = np.repeat(ground[None].astype(np.uint8), length, axis=0)
    masks = np.zeros((length, height, width), dtype=np.uint8)
    colours = [(250, 40, 40), (40, 250, 40), (60, 60, 250)]
    for t in range(length):
        for k in range(objects):
            rows, columns = slice(8 + 20 * k, 20 + 20 * k), slice(8 + step * t, 24 + step * t)
            frames[t, rows, columns] = colours[k]
            masks[t, rows, columns] = k + 1
    return Video(frames, masks, name)


@pytest.fixture
def context(toy):
    """Makes a context over videos; features are the mean colours of each patch and a constant."""

    @dataclass
    class MeanColours(toy.ToyContext):
        calls: list = field(default_factory=list)

        def encode(self, images, tap, pos_interpolation=None):
            self.calls.append((images, tap, pos_interpolation))
            means = torch.nn.functional.avg_pool2d(images, self.spec.patch_size).permute(0, 2, 3, 1)
            patches = torch.cat([means, torch.ones_like(means[..., :1])], dim=-1)
            return Features(None, patches, patches.mean(dim=(1, 2)))

    def make(*videos, **changes):
        data = Dataset(name="toys", kind="video", fingerprint="0", sequences=tuple(videos))
        return MeanColours(**({"spec": SPEC, "data": data, "banks": {}, "batch_size": 1} | changes))

    return make


def scores(ctx, config=None):
    return {m.metric: m for m in TASK.run(ctx, config or VosConfig(**SMALL))}


def png(ctx, name):
    return np.asarray(Image.open(io.BytesIO(ctx.files[name])))


def test_the_toy_is_a_context(context):
    public = {name for name in dir(Context) if not name.startswith("_")} | set(Context.__annotations__)
    assert public <= set(dir(context(moving())))


def test_a_moving_square_is_followed(context):
    ctx = context(moving())
    found = scores(ctx)
    assert found["j_mean"].items[0] > 0.85
    assert found["f_mean"].items[0] > 0.95
    assert found["j_recall"].items.tolist() == [1.0]
    assert found["jf_mean"].items[0] == pytest.approx(
        (found["j_mean"].items[0] + found["f_mean"].items[0]) / 2
    )
    assert found["j_mean"].detail["static_mask"] < 0.3, "the square leaves its first place"
    assert ctx.steps == 12


def test_a_still_video_is_perfect(context):
    """Squares aligned with the tokens: nothing is lost by the grid."""
    found = scores(context(moving(step=0)), VosConfig(**SMALL, upsample="nearest"))
    for name in ("jf_mean", "j_mean", "j_recall", "f_mean", "f_recall"):
        assert found[name].items.tolist() == [1.0]
        assert found[name].detail["static_mask"] == 1.0
    assert found["j_decay"].items.tolist() == [0.0]


def test_scores_follow_from_the_kept_pngs(context):
    """One item an object, grouped by sequence; a reader of the PNGs finds the same numbers."""
    videos = moving(objects=2, name="two"), moving(objects=1, name="one", step=2)
    ctx = context(*videos)
    found = scores(ctx)
    assert set(found) == {metric.id for metric in METRICS}
    assert found["jf_mean"].clusters.tolist() == [0, 0, 1]
    expected = []
    for video in videos:
        maps = np.stack([png(ctx, f"results/{video.name}/{i}.png") for i in video.frame_ids])
        assert np.array_equal(maps[0], video.masks[0])
        region, _ = davis_metrics.sequence_scores(video.masks, maps)
        expected += davis_metrics.statistics(region).mean.tolist()
    assert found["j_mean"].items.tolist() == expected
    assert all(measurement.chance is None for measurement in found.values())


def test_pngs_are_indexed_with_the_davis_palette(context):
    ctx = context(moving(objects=3))
    scores(ctx)
    assert len(ctx.files) == 12
    image = Image.open(io.BytesIO(ctx.files["results/toy/00005.png"]))
    assert image.mode == "P"
    assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert image.getpalette()[-3:] == [224, 224, 192]
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(davis_frames.read_indexed_png(davis_frames.indexed_png(labels)), labels)


def test_object_ids_need_not_be_consecutive_and_void_is_background(context):
    video = moving(objects=2)
    video.masks[video.masks == 2] = 9
    video.masks[:, :4, :4] = 255
    ctx = context(video)
    found = scores(ctx)
    assert len(found["jf_mean"].items) == 2
    assert set(np.unique(png(ctx, "results/toy/00006.png"))) == {0, 1, 9}
    assert (found["j_mean"].items > 0.8).all()


def test_portrait_frames_enter_upright(context):
    video = moving()
    turned = Video(video.frames.transpose(0, 2, 1, 3).copy(), video.masks.transpose(0, 2, 1).copy())
    ctx = context(turned)
    found = scores(ctx)
    assert {images.shape[2:] for images, _, _ in ctx.calls} == {(128, 64)}
    assert png(ctx, "results/toy/00003.png").shape == (128, 64)
    assert found["j_mean"].items[0] > 0.7


def test_batches_do_not_change_the_outcome_and_follow_the_area(context):
    """The batch size counts images of 224 x 224: 6 frames of 64 x 128 have that area, 256 x 512 exceed it."""
    runs = {size: context(moving(), batch_size=size) for size in (1, 2)}
    found = {size: scores(ctx) for size, ctx in runs.items()}
    assert [len(images) for images, _, _ in runs[1].calls] == [6, 6]
    assert [len(images) for images, _, _ in runs[2].calls] == [12]
    for name in found[1]:
        assert found[1][name].items.tolist() == found[2][name].items.tolist()
    large = context(moving())
    scores(large, VosConfig(size=256, radius=4))
    assert {len(images) for images, _, _ in large.calls} == {1}


def test_the_next_sequence_is_decoded_while_the_last_batch_is_encoded(context):
    first, second = moving(name="a"), moving(name="b")
    decoded, waited = threading.Event(), []
    frame = second.frame
    second.frame = lambda i: decoded.set() or frame(i)
    ctx = context(first, second, batch_size=2)
    encode = ctx.encode

    def patient(*arguments):
        waited.append(decoded.wait(PATIENCE))
        return encode(*arguments)

    ctx.encode = patient
    scores(ctx)
    assert waited == [True, True]


def test_a_sequence_is_scored_while_the_next_is_under_way(context, monkeypatch):
    monkeypatch.setattr(vos, "usable_cores", lambda: [0, 1, 2, 3])
    first, second = moving(name="a"), moving(name="b")
    ctx = context(first, second, batch_size=2)
    begun, waited = threading.Event(), []
    mask, encode = first.mask, ctx.encode

    def patient(i):
        if i == 5:
            waited.append(begun.wait(PATIENCE))
        return mask(i)

    first.mask = patient
    ctx.encode = lambda *arguments: (len(ctx.calls) and begun.set()) or encode(*arguments)
    scores(ctx)
    assert all(waited)


def test_a_sequence_is_done_with_before_the_second_after_it_begins(context):
    """What is not scored yet lies in memory."""
    ctx = context(*[moving(length=4, name=f"{i}") for i in range(5)], batch_size=2)
    undone, encode, save = [], ctx.encode, ctx.save_file

    def counted(*arguments):
        undone.append(4 * len(ctx.calls) - len(ctx.files))
        return encode(*arguments)

    ctx.encode = counted
    ctx.save_file = lambda *arguments: time.sleep(0.01) or save(*arguments)
    scores(ctx)
    assert max(undone) <= 4


def test_results_are_written_by_one_thread_beside_the_encoder(context):
    ctx = context(moving(objects=2), moving(name="b"))
    threads, save = set(), ctx.save_file
    ctx.save_file = lambda *arguments: threads.add(threading.get_ident()) or save(*arguments)
    scores(ctx)
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert len(ctx.files) == 24


@pytest.mark.parametrize("video", ["a", "b"])
def test_a_file_that_cannot_be_written_ends_the_task(context, video):
    ctx = context(moving(name="a"), moving(name="b"))
    save = ctx.save_file

    def full(name, content):
        if name == f"results/{video}/00007.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(name, content)

    ctx.save_file = full
    with pytest.raises(OSError, match="No space left"):
        scores(ctx)


def test_what_the_encoder_is_given(context):
    video = moving()
    ctx = context(video)
    scores(ctx, VosConfig(size=96, layer=-3, final_norm=False, pos_interpolation="timm", std="encoder"))
    images, tap, interpolation = ctx.calls[0]
    assert (tap.layer, tap.norm, interpolation) == (-3, False, "timm")
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    frame = davis_frames.resize_frame(video.frame(0), (96, 192), "cv2-bilinear")
    mean, std = (torch.tensor(colour).view(3, 1, 1) for colour in (SPEC.mean, SPEC.std))
    expected = (torch.from_numpy(frame).permute(2, 0, 1).float() / 255 - mean) / std
    assert torch.equal(images[0], expected)


@pytest.mark.parametrize(
    ("std", "spec_std", "used"),
    [
        ("dino-vos", (0.229, 0.224, 0.225), (0.228, 0.224, 0.225)),
        ("encoder", (0.229, 0.224, 0.225), (0.229, 0.224, 0.225)),
        ("dino-vos", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_colour_standard_deviation(context, std, spec_std, used):
    spec = SPEC.model_copy(update={"std": spec_std})
    video = moving(length=3, height=64, width=64)
    video.frames[:] = 255
    ctx = context(video, spec=spec)
    scores(ctx, VosConfig(**SMALL, std=std))
    white = np.mean([(1 - m) / s for m, s in zip(spec.mean, used, strict=True)])
    assert ctx.calls[0][0].mean().item() == pytest.approx(white, rel=1e-5)
    assert any("0.228" in note for note in ctx.notes) == (used == (0.5, 0.5, 0.5))


def test_a_patch_size_that_does_not_fit_is_noted(context):
    spec = SPEC.model_copy(update={"patch_size": 14})
    assert davis_frames.network_size(480, 854, 480, "dino64", 14) == (490, 840)
    ctx = context(moving(), spec=spec)
    scores(ctx)
    assert {images.shape[2:] for images, _, _ in ctx.calls} == {(70, 140)}
    assert any("patch size 14" in note for note in ctx.notes)


def test_network_sizes():
    size = davis_frames.network_size
    assert size(480, 854, 480, "dino64", 16) == (480, 832)
    assert size(480, 910, 480, "dino64", 8) == (480, 896)
    assert size(480, 1152, 480, "dino64", 16) == (480, 1152)
    assert size(854, 480, 480, "dino64", 16) == (832, 480)
    assert size(480, 480, 480, "dino64", 16) == (480, 448)
    assert size(480, 854, 480, "patch-ceil", 14) == (490, 882)
    assert size(854, 480, 480, "patch-ceil", 14) == (882, 490)
    assert size(480, 854, 960, "patch-ceil", 16) == (960, 1712)


def test_labels_on_the_token_grid():
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[2:4, 4:] = 5
    nearest = davis_frames.token_labels(labels, (5,), (4, 4), "nearest")
    assert nearest[..., 1].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    smooth = davis_frames.token_labels(labels, (5,), (3, 3), "bilinear")
    assert smooth.shape == (3, 3, 2)
    assert np.allclose(smooth.sum(axis=-1), 1)
    assert 0 < smooth[1, 2, 1] < 1


def test_spread_labels_follows_torch_nearest():
    labels = np.random.default_rng(0).integers(0, 9, (7, 11), dtype=np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].float(), size=(50, 61), mode="nearest"
    )
    assert np.array_equal(davis_frames.spread_labels(labels, (50, 61)), expected[0, 0].numpy())


def test_presets_fill_what_is_not_given():
    assert VosConfig() == VosConfig(preset="dino-480")
    notebook = VosConfig(preset="dinov3-notebook", temperature=0.3)
    assert (notebook.size, notebook.window, notebook.topk) == (960, "circle", 5)
    assert notebook.temperature == 0.3
    like = VosConfig(preset="crw-like")
    assert (like.context, like.topk, like.first_frame_window) == (20, 10, False)
    for config in (VosConfig(), notebook, like):
        assert VosConfig(**config.model_dump()) == config
        assert VosConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("preset", ["dino-480", "dinov3-notebook", "crw-like"])
def test_every_preset_follows_the_square(context, preset):
    found = scores(context(moving()), VosConfig(preset=preset, size=64))
    assert found["j_mean"].items[0] > 0.8


def test_every_field_is_described():
    assert all(field.description for field in VosConfig.model_fields.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "dino"}, "preset"),
        ({"temprature": 1}, "temperature"),
        ({"size": 32}, "patch-ceil"),
        ({"context": 0, "first_frame": False}, "no frame is left"),
        ({"layer": 0}, "layer"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(VosConfig, fields, "vos")


def test_two_runs_are_identical(context):
    first, second = context(moving(objects=3)), context(moving(objects=3))
    for a, b in zip(TASK.run(first, VosConfig(**SMALL)), TASK.run(second, VosConfig(**SMALL)), strict=True):
        assert a.items.tolist() == b.items.tolist()
    assert first.files == second.files


def test_pictures_and_bars_for_the_report(context):
    ctx = context(moving(name="a"), moving(step=9, length=10, name="b"), moving(step=0, name="c"))
    scores(ctx)
    data = ctx.saved["sequences"]
    assert data["labels"] == ["a", "b", "c"]
    reasons = [ctx.titles[name].split(": ")[1].split(" of 3")[0] for name in ctx.images]
    assert reasons[0] == "a seeded choice"
    assert len({ctx.titles[name].split(":")[0] for name in ctx.images}) == len(reasons) == 3
    for images in ctx.images.values():
        assert len(images) == 9
        assert all(image.dtype == np.uint8 and image.shape == (64, 128, 3) for image in images)


def test_sequences_without_objects_are_left_out_by_name(context):
    empty = moving(name="nothing")
    empty.masks[0] = 0
    ctx = context(moving(), empty)
    assert len(scores(ctx)["jf_mean"].items) == 1
    assert any("nothing" in note for note in ctx.notes)
    with pytest.raises(TaskError, match="no sequence"):
        scores(context(empty))


def test_an_object_too_small_for_the_grid_is_noted(context):
    video = moving(objects=2)
    video.masks[video.masks == 2] = 0
    video.masks[:, 60, 90] = 2
    ctx = context(video)
    found = scores(ctx)
    assert any("object 2 of toy" in note for note in ctx.notes)
    assert found["j_mean"].items[1] == 0


def test_errors_name_the_sequence(context):
    with pytest.raises(TaskError, match="toy has 2 frames"):
        scores(context(moving(length=2)))
    video = moving()
    video.masks = [*video.masks[:6], video.masks[6][:, :-1], *video.masks[7:]]
    with pytest.raises(DataError, match="mask of frame 00006 of toy is 64 x 127"):
        scores(context(video))
    video = moving()
    video.frames = [*video.frames[:4], video.frames[4][:-2], *video.frames[5:]]
    with pytest.raises(DataError, match="picture of frame 00004 of toy is 62 x 128"):
        scores(context(video))
