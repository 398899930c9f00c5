"""JPEG files that decode like photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from lmim_bench.bench.data.splits import FileSplit

DISTINCT = 512
"""Photographs that are drawn; more images are further names of them."""


def photographs(folder: Path, count: int, seed: int) -> FileSplit:
    """Files of the size (500 x 375) and about the weight of photographs: smooth content with some noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    names = [f"{i:07}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        if i >= DISTINCT:
            os.link(folder / names[i % DISTINCT], folder / name)
            continue
        small = Image.fromarray(rng.integers(0, 256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / name, quality=90)
    return FileSplit(folder, names)
