"""JPEG files: the pixels, and the errors, of Pillow, also where it does not decode."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench.data import reading
from lmim_bench.bench.data.reading import read_image
from lmim_bench.bench.errors import DataError

KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "no chroma subsampling": {"subsampling": 0},
    "half the chroma": {"subsampling": 1},
    "tables of its own": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 2},
    "rgb": {"keep_rgb": True},
}


def photograph(mode: str = "RGB") -> Image.Image:
    draws = np.random.default_rng(0)
    coarse = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((61, 47), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(smooth + draws.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    photograph(mode).save(stream, "JPEG", quality=85, **KINDS[kind])
    return stream.getvalue()


def by_pillow(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError):
        return None


def ours(content: bytes) -> np.ndarray | None:
    try:
        return read_image(Path("x.jpg"), content)
    except DataError:
        return None


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_decoded_without_pillow_to_its_pixels(kind, mode, monkeypatch):
    content = encoded(kind, mode)
    expected = by_pillow(content)

    def refuse(*_):
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(reading.Image, "open", refuse)
    assert np.array_equal(ours(content), expected)


def test_cmyk_is_left_to_pillow():
    content = encoded("baseline", "CMYK")
    assert reading._sound_jpeg(content) is None
    assert np.array_equal(ours(content), by_pillow(content))


def test_pillows_limit_of_pixels_holds(monkeypatch):
    content = encoded("baseline")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"x\.jpg is broken: more than .* pixels"):
        read_image(Path("x.jpg"), content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(Path("x.jpg"), content).shape == (47, 61, 3)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    place=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 8),
    put=st.binary(max_size=4),
    cut=st.booleans(),
)
@example(kind="progressive", place=0.6, removed=0, put=b"\xff\xd9", cut=True)
@example(kind="restart markers", place=0.6, removed=0, put=b"\xff\xd9", cut=True)
@example(kind="baseline", place=0.999, removed=0, put=b"", cut=True)
def test_a_damaged_file_is_what_pillow_makes_of_it(kind, place, removed, put, cut):
    """Cut at a place, or with other bytes there: the same pixels, or broken for both."""
    content = encoded(kind)
    at = int(place * len(content))
    content = content[:at] + put + (b"" if cut else content[at + removed :])
    found, expected = ours(content), by_pillow(content)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert np.array_equal(found, expected)
