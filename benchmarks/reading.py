"""Reading JPEG files against Pillow and torchvision's loader.

    python benchmarks/reading.py [--images 1024] [--processes 2]

Decoding: one process makes RGB arrays of the files, ours against Pillow. Resizing: decoded images that lie
on the device, as products of matrices, against Pillow on one core; a run does so beside a GPU alone. Loading:
decoding processes, views (short side to 256 by a cubic filter, of which the middle 224), and normalised
float32 batches on the device, ours against ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` in
torch's DataLoader, as the evaluation scripts of the field read ImageNet. All pixels are compared, and have to
be equal to the bit.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peer_code import Spread, compare, options, start, write_json
from _photographs import photographs
from PIL import Image
from torchvision import transforms

from lmim_bench.bench.data import resampling
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.reading import read_image
from lmim_bench.bench.data.views import geometry, normalise, view_pixels
from lmim_bench.bench.data.workers import most_workers
from lmim_bench.bench.engine import resolve_device
from lmim_bench.bench.types import Array, View

VIEW = View("crop", 224, 256, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def decoded_by_pillow(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def cuts_of(images: list[Array], device: str) -> resampling.Cuts:
    """What is resized of images, on the device."""
    cuts = [resampling.cut(image, *geometry(image, VIEW), VIEW.size, VIEW.interpolation) for image in images]
    found = [cut for cut in cuts if cut is not None]
    assert len(found) == len(images)
    return resampling.on_device(found, VIEW.size, device)


class Folder(torch.utils.data.Dataset[torch.Tensor]):
    """The images of a list of files, as torchvision's ``ImageFolder`` gives them."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(VIEW.resize, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(VIEW.size),
                transforms.ToTensor(),
                transforms.Normalize(VIEW.mean, VIEW.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            made: torch.Tensor = self.transform(image.convert("RGB"))
        return made


def main() -> None:
    parser = options(__doc__, peers=False, images=1024, processes=most_workers(), batch=256)
    args = parser.parse_args()
    device = resolve_device("auto")
    facts = start(args, device)
    root = Path(tempfile.mkdtemp(prefix="reading-"))
    try:
        split = photographs(root / "images", args.images, args.seed)
        paths = [split.root / name for name in split.ids]

        def sums(batches: Any) -> list[float]:
            """Of every batch, on the device: what is on the way there has arrived."""
            found = [float(batch.double().sum()) for batch in batches]
            assert found
            return found

        some = [read_image(path) for path in paths[: args.batch]]
        cuts = cuts_of(some, device)

        def our_resizing() -> torch.Tensor:
            made = resampling.resample(cuts)
            made[-1, -1, -1, -1].item()  # a GPU is done with it
            return made

        def their_resizing() -> torch.Tensor:
            return torch.from_numpy(np.stack([view_pixels(image, VIEW) for image in some]))

        def our_decoding() -> int:
            return sum(int(read_image(path)[0, 0, 0]) for path in paths)

        def their_decoding() -> int:
            return sum(int(decoded_by_pillow(path)[0, 0, 0]) for path in paths)

        def our_batches() -> Any:
            for batch in iterate_batches(split, VIEW, args.batch, args.processes, device=device):
                yield normalise(batch.images, VIEW)

        def their_batches() -> Any:
            loader = torch.utils.data.DataLoader(
                Folder(paths), args.batch, num_workers=args.processes, pin_memory=device != "cpu"
            )
            for batch in loader:
                yield batch.to(device, non_blocking=True)

        pairs = zip(our_batches(), their_batches(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs), "the batches are not equal"
        distinct = {path.stat().st_ino: path for path in paths}.values()
        for path in distinct:
            assert np.array_equal(read_image(path), decoded_by_pillow(path)), path
        assert torch.equal(our_resizing().cpu(), their_resizing().permute(0, 3, 1, 2)), "other pixels"
        print(f"{len(distinct)} files and all batches: equal to the bit")
        decoding, *_ = compare({"decoding": our_decoding}, their_decoding, args.rounds)
        name = f"resizing {len(some)} images, {device}"
        resizing, *_ = compare({name: our_resizing}, their_resizing, args.rounds, warm=device != "cpu")
        loading, *_ = compare(
            {f"loading, {args.processes} processes": lambda: sums(our_batches())},
            lambda: sums(their_batches()),
            args.rounds,
            warm=device != "cpu",
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for found, count in ((*decoding, args.images), (*resizing, len(some)), (*loading, args.images)):
        ours, theirs = (count / Spread.of(side).median for side in (found.ours, found.theirs))
        print(f"{found.name}: {ours:.0f} images a second for {theirs:.0f}")
    write_json(args.json, facts, [*decoding, *resizing, *loading])


if __name__ == "__main__":
    main()
