"""Feature extraction against the bare encoder, on the CPU or a GPU.

    python benchmarks/features.py [--model vit_small_patch16_224] [--jpeg] [--kept] [--precision bf16]

Ours is the whole pass of a run: images read where they are ``--jpeg`` files (500 x 375, else they lie in
memory), views cut from them, batches, the encoder, features written to the cache; with ``--kept`` that of a
further checkpoint of a run with ``--keep-pixels``, whose cache holds the pixels. The limit is timm's own
forward pass over batches that are ready on the device: no reading, no cutting, nothing kept but the class
token. Both give the same features. Reading and cutting alone are timed as well, which tells the bottleneck.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _peer_code import Spread, compare, options, start, write_json
from _photographs import photographs

from lmim_bench.bench.data.loading import Batch
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.data.views import apply_view
from lmim_bench.bench.data.workers import decoding_workers
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine, resolve_device, torch_dtype
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Array, Column, Dataset, ImageSplit, Tap, View

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
READY = 2
"""Batches that lie on the device for the forward pass, again and again."""


class Reading(NamedTuple):
    """Images a second in all and after the first batch, seconds until that, this process's CPU an image."""

    rate: float
    later: float
    first: float
    own: float


def read_all(batches: Iterator[Batch], device: str) -> Reading:
    """Read and cut all images, batch by batch onto the device, and leave them."""
    begun, own = time.perf_counter(), time.process_time()
    some = len(next(batches).positions)
    first = time.perf_counter() - begun
    rest = sum(len(part.positions) for part in batches)
    if device != "cpu":
        torch.cuda.synchronize()
    taken = time.perf_counter() - begun
    later = rest / (taken - first) if rest else some / first
    return Reading((some + rest) / taken, later, first, (time.process_time() - own) / (some + rest))


def main() -> None:
    parser = options(__doc__, peers=False, images=256, side=256, batch=0)
    parser.add_argument("--model", default="vit_small_patch16_224", help="of timm [vit_small_patch16_224]")
    parser.add_argument("--jpeg", action="store_true", help="images are files, to be read")
    parser.add_argument("--kept", action="store_true", help="decoded before, and kept")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="[fp32]")
    args = parser.parse_args()
    device = resolve_device("auto")
    facts = start(args, device, args.precision)
    encoder = load_encoder(f"timm:{args.model}")
    engine = Engine(encoder, device, args.precision, args.batch or None)
    view, workers = View.crop(encoder.spec), decoding_workers(device)
    root = Path(tempfile.mkdtemp(prefix="features-"))
    if args.jpeg:
        split: ImageSplit = photographs(root / "images", args.images, args.seed)
    else:
        pixels = np.random.default_rng(args.seed).integers(
            0, 256, size=(args.images, args.side, args.side, 3), dtype=np.uint8
        )
        split = ArraySplit(pixels, [str(i) for i in range(args.images)], None)
    data = Dataset("noise", "classification", "noise", splits={"val": split})
    batch = engine.batch_for(view.size, view.size)
    alike = min(args.images, READY * batch)
    ready = torch.stack([apply_view(split.image(i), view) for i in range(alike)]).to(device).split(batch)
    column = Column("cls", Tap())
    store = FeatureStore(root / "cache", 10**12, workers, keep_pixels=args.kept)
    dtype = torch_dtype(args.precision)

    def ours() -> Array:
        for features in (root / "cache").rglob(f"{column.id}.npy"):
            features.unlink()
        bank, _ = store.bank(engine, data, "val", view, (column,), Reporter())
        return np.array(bank.column(column))

    @torch.inference_mode()
    def theirs() -> Any:
        model = encoder.model
        with torch.autocast(device.split(":")[0], dtype, enabled=args.precision != "fp32"):
            passes = -(-args.images // batch)
            parts = [model.forward_features(ready[i % len(ready)])[:, 0].float() for i in range(passes)]
        return torch.cat(parts)[: args.images].cpu().numpy()

    try:
        if args.kept:
            ours()
        name = f"{args.model} on {device}"
        (found,), own, second = compare({name: ours}, theirs, args.rounds, warm=device != "cpu")
        reading = read_all(store.batches(engine, data, "val", view), device)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    apart = float(np.abs(own[name] - second)[:alike].max())
    print(f"largest difference of a feature: {apart:.1e} (allowed {TOLERANCE[args.precision]:g})")
    encoding, whole = (args.images / Spread.of(side).median for side in (found.theirs, found.ours))
    slower = "the encoder" if encoding < reading.rate else "reading"
    print(
        f"images a second: reading and cutting alone {reading.rate:.0f} ({workers} workers), forward alone "
        f"{encoding:.0f}, the whole pass {whole:.0f}; the slower of the two is {slower}"
    )
    print(
        f"reading alone: the first batch after {reading.first:.2f} s, {reading.later:.0f} images a second "
        f"from there on, {1e3 * reading.own:.2f} ms of this process's CPU an image"
    )
    print(
        f"share of the forward-only rate {found.speedup.median:.1%}, of the slower of the two "
        f"{whole / min(encoding, reading.rate):.1%}"
    )
    write_json(
        args.json, facts, [found], largest_difference=apart, reading=reading._asdict(), encoding=encoding
    )
    assert apart <= TOLERANCE[args.precision], "the two sides do not agree"


if __name__ == "__main__":
    main()
