"""Feature extraction against the bare encoder, on images that already lie in memory, on the CPU or a GPU.

Ours is the whole pass of a run: views cut from the images, batches, the encoder, features written to the
cache. The limit is timm's own forward pass over batches that are ready: no reading, no cutting, nothing kept
but the class token. Both give the same features.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peer_code import compare, options, start, write_json

from lmim_bench.bench.data.loading import apply_view
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine, resolve_device
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.runner import default_workers
from lmim_bench.bench.types import Array, Column, Dataset, Tap, View

TOLERANCE = 1e-4


class _Silent:
    def advance(self, n: int = 1) -> None:
        pass


def main() -> None:
    parser = options(__doc__, images=256, side=256, batch=32)
    parser.add_argument("--model", default="vit_small_patch16_224", help="of timm [vit_small_patch16_224]")
    args = parser.parse_args()
    facts = start(args)
    device = resolve_device("auto")
    encoder = load_encoder(f"timm:{args.model}")
    engine = Engine(encoder, device, "fp32", args.batch)
    view = View.crop(encoder.spec)
    pixels = np.random.default_rng(args.seed).integers(
        0, 256, size=(args.images, args.side, args.side, 3), dtype=np.uint8
    )
    split = ArraySplit(pixels, [str(i) for i in range(args.images)], None)
    data = Dataset("noise", "classification", "noise", splits={"val": split})
    batches = torch.stack([apply_view(split.image(i), view) for i in range(args.images)]).to(device)
    column = Column("cls", Tap())
    root = Path(tempfile.mkdtemp(prefix="features-"))

    def ours() -> Array:
        shutil.rmtree(root, ignore_errors=True)
        store = FeatureStore(root, 10**12, default_workers(device))
        bank, _ = store.bank(
            engine, data, "val", view, (column,), lambda *_: contextlib.nullcontext(_Silent())
        )
        return np.array(bank.column(column))

    @torch.inference_mode()
    def theirs() -> Any:
        model = encoder.model
        parts = [model.forward_features(batch)[:, 0] for batch in batches.split(args.batch)]
        return torch.cat(parts).cpu().numpy()

    try:
        name = f"{args.model} on {device}"
        (found,), own, second = compare({name: ours}, theirs, args.rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    apart = float(np.abs(own[name] - second).max())
    print(f"largest difference of a feature: {apart:.1e} (allowed {TOLERANCE:g})")
    print(f"share of the forward-only rate: {found.speedup.median:.1%}")
    assert apart <= TOLERANCE, "the two sides do not agree"
    write_json(args.json, facts, [found], largest_difference=apart)


if __name__ == "__main__":
    main()
