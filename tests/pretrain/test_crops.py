import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from lmim_bench.pretrain.crops import CROP_NOISE, Crops, crop_and_resize, draw_crops, resize_weights

CASES = settings(deadline=None, derandomize=True, max_examples=40)
RATIO = (3 / 4, 4 / 3)


def noise(batch, seed=0):
    return torch.rand(batch, CROP_NOISE, generator=torch.Generator().manual_seed(seed))


def box_crops(top, left, height, width, side, flip=False):
    boxes = torch.tensor([[top / side[0], left / side[1], height / side[0], width / side[1]]])
    return Crops(boxes, torch.tensor([flip]))


def draw_one(height, width, min_scale, aspect, numbers):
    """RandomResizedCrop.get_params of one image, given its random numbers."""
    for i in range(10):
        area = height * width * (min_scale + (1 - min_scale) * numbers[i])
        low, high = math.log(aspect[0]), math.log(aspect[1])
        ratio = math.exp(low + (high - low) * numbers[10 + i])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[20 + i] * (height - h + 1)), int(numbers[30 + i] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@CASES
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=4),
    min_scale=st.sampled_from([0.08, 0.2, 1.0]),
    flip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_boxes_equal_a_loop_and_lie_inside_the_image(sizes, min_scale, flip, seed):
    numbers = noise(len(sizes), seed)
    found = draw_crops(torch.tensor(sizes), min_scale, RATIO, flip, numbers)
    assert found.boxes.shape == (len(sizes), 4)
    assert found.boxes.dtype == torch.float32
    for (height, width), box, row in zip(sizes, found.boxes.tolist(), numbers.tolist(), strict=True):
        pixels = [box[0] * height, box[1] * width, box[2] * height, box[3] * width]
        assert pixels == pytest.approx(draw_one(height, width, min_scale, RATIO, row), abs=1e-3)
        assert min(box[:2]) >= 0
        assert min(box[2:]) > 0
        assert max(box[0] + box[2], box[1] + box[3]) <= 1 + 1e-6
    assert found.flips.tolist() == [flip and row[40] < 0.5 for row in numbers.tolist()]


def test_boxes_are_distributed_as_those_of_torchvision():
    height, width, count = 300, 400, 1500
    found = draw_crops(torch.tensor([[height, width]]).expand(count, -1), 0.2, RATIO, True, noise(count))
    tops, lefts, heights, widths = (found.boxes * torch.tensor([height, width, height, width])).unbind(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        image = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), RATIO) for _ in range(count)])
    ours = torch.stack([tops, lefts, heights, widths], dim=1).numpy()
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert scipy.stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    area = heights * widths / (height * width)
    assert 0.19 < area.min() < 0.25
    assert area.max() > 0.9
    ratio = widths / heights
    assert 0.74 < ratio.min() < 0.78
    assert 1.29 < ratio.max() < 1.35
    assert found.flips.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_images_of_extreme_aspect_fall_back_to_the_central_box():
    sizes = torch.tensor([[100, 2000], [2000, 100]])
    found = draw_crops(sizes, 0.9, RATIO, False, noise(2)).boxes
    torch.testing.assert_close(found[0], torch.tensor([0, 933 / 2000, 1, 133 / 2000]))
    torch.testing.assert_close(found[1], torch.tensor([933 / 2000, 0, 133 / 2000, 1]))
    whole = draw_crops(torch.tensor([[64, 64]]), 1.0, (1.0, 1.0), False, noise(1)).boxes
    assert whole.tolist() == [[0, 0, 1, 1]]


@CASES
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    size=st.sampled_from([1, 4, 16, 33]),
    flip=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_crops_equal_torchvision(height, width, size, flip, seed, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    found = crop_and_resize(images, box_crops(top, left, h, w, (height, width), flip), size)
    expected = TF.resized_crop(
        images.float() / 255,
        top,
        left,
        h,
        w,
        [size, size],
        interpolation=TF.InterpolationMode.BICUBIC,
        antialias=True,
    ).clamp(0, 1)
    expected = expected.flip(3) if flip else expected
    assert found.shape == (1, 3, size, size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_batch_may_hold_boxes_of_any_size():
    images = torch.randint(256, (3, 3, 24, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops = draw_crops(torch.tensor([[24, 30]] * 3), 0.1, RATIO, True, noise(3))
    together = crop_and_resize(images, crops, 12)
    for i in range(3):
        alone = crop_and_resize(images[i : i + 1], Crops(crops.boxes[i : i + 1], crops.flips[i : i + 1]), 12)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_an_evenly_coloured_image_stays_so():
    images = torch.full((2, 3, 20, 20), 77, dtype=torch.uint8)
    found = crop_and_resize(images, draw_crops(torch.tensor([[20, 31]] * 2), 0.2, RATIO, True, noise(2)), 9)
    torch.testing.assert_close(found, torch.full_like(found, 77 / 255))


@CASES
@given(start=st.floats(0, 0.7), length=st.floats(0.1, 0.3), side=st.integers(11, 40), size=st.integers(1, 20))
def test_resize_weights_sum_to_one_over_the_stretch_alone(start, length, side, size):
    first, last = start * side, (start + length) * side
    weights = resize_weights(torch.tensor([first]), torch.tensor([last - first]), side, size)[0]
    assert weights.shape == (size, side)
    torch.testing.assert_close(weights.sum(1), torch.ones(size), atol=1e-4, rtol=0)
    centres = torch.arange(side) + 0.5
    outside = (centres < first - 1e-3) | (centres > last + 1e-3)
    assert weights[:, outside].abs().sum() == 0


@pytest.mark.parametrize("original", [(20, 4000), (4000, 20), (2, 300)])
def test_a_stretch_without_a_pixel_centre_still_gives_an_image(original):
    """The central box of a banner is narrower than a pixel of the stored square."""
    images = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for seed in range(3):
        crops = draw_crops(torch.tensor([original]), 0.2, RATIO, False, noise(1, seed))
        assert crop_and_resize(images, crops, 16).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_a_crop_of_the_squashed_image_is_the_crop_of_the_original(seed):
    height, width, side = 90, 150, 128
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 11 + c) + np.cos(y / 13 - c) for c in range(3)]
    pixels = (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
    squashed = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    crops = draw_crops(torch.tensor([[height, width]]), 0.2, RATIO, True, noise(1, seed))
    stored, original = (torch.tensor(np.array(p)).permute(2, 0, 1)[None] for p in (squashed, pixels))
    found, expected = crop_and_resize(stored, crops, 32), crop_and_resize(original, crops, 32)
    assert (found - expected).abs().max() < 0.02
    assert expected.std() > 0.1


def photograph(height, width, seed):
    """Noise whose spectrum falls as that of photographs does, uint8 (3, H, W)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    waves = [np.exp(2j * np.pi * rng.random((height, width))) / frequency for _ in range(3)]
    pixels = np.stack([np.fft.ifft2(wave).real for wave in waves])
    return (128 + 50 * (pixels - pixels.mean()) / pixels.std()).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kept", "sharpness", "apart"), [(256, (0.2, 0.5), (5, 9)), (512, (0.85, 1.0), (0, 1.5))]
)
def test_what_the_stored_square_does_to_a_crop(kept, sharpness, apart):
    """Beside torchvision's crop of a 640 x 480 original: energy of the Laplacian, and grey levels."""
    size, energy, distance = 224, [], []
    for seed in range(12):
        original = photograph(480, 640, seed)
        square = np.asarray(
            Image.fromarray(original.transpose(1, 2, 0)).resize((kept, kept), Image.Resampling.BICUBIC)
        ).transpose(2, 0, 1)
        crops = draw_crops(torch.tensor([[480, 640]]), 0.2, RATIO, False, noise(1, seed))
        box = (crops.boxes[0] * torch.tensor([480, 640, 480, 640])).round().int().tolist()
        ours = crop_and_resize(torch.from_numpy(square.copy())[None], crops, size)[0]
        pixels = torch.from_numpy(original).float() / 255
        theirs = TF.resized_crop(pixels, *box, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        laplacian = [
            (4 * x[:, 1:-1, 1:-1] - x[:, 2:, 1:-1] - x[:, :-2, 1:-1] - x[:, 1:-1, 2:] - x[:, 1:-1, :-2])
            for x in (ours, theirs)
        ]
        energy.append(float(laplacian[0].square().mean() / laplacian[1].square().mean()))
        distance.append(255 * float((ours - theirs).abs().mean()))
    assert sharpness[0] <= np.mean(energy) <= sharpness[1]
    assert apart[0] <= np.mean(distance) <= apart[1]
