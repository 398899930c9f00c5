"""DAVIS from JPEG files to J&F, encoder included: `run --tasks vos` against DINO's script and the DAVIS tool.

    python benchmarks/video_end_to_end.py --peers DIR [--data DAVIS] [--sequences 8] [--frames 0] [--rounds 3]

Both load the same file, a DINO ViT-S/16 with random weights made by DINO's own code, carry the first mask of
every sequence through it, write the label maps as PNG, and score them. Theirs is
``eval_video_tracking_davis`` of ``eval_video_segmentation.py`` (one frame at a time, features recomputed for
none), then ``DAVISEvaluation.evaluate`` on its PNGs. Both run at the precision of the weights, fp32; what
ours does at another ``--precision`` is timed as well, beside the same peer. Label maps and J&F of fp32 are
compared. Without ``--data`` the sequences are drawn, at the size of DAVIS. ``--peers DIR`` holds
facebookresearch/dino as ``dino`` and davisvideochallenge/davis2017-evaluation as ``davis2017-evaluation``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from _patches import import_from
from _peer_code import compare, options, start, write_json
from PIL import Image

from lmim_bench.bench.api import make_config
from lmim_bench.bench.data import load_data
from lmim_bench.bench.data.scenes import generator, video_scene
from lmim_bench.bench.engine import resolve_device
from lmim_bench.bench.opening import open_run
from lmim_bench.bench.plan import make_plan
from lmim_bench.bench.progress import Reporter
from lmim_bench.tasks._math.davis_frames import indexed_png, read_indexed_png

TOLERANCE = 1e-3


def copy_davis(source: Path, target: Path, sequences: int, frames: int) -> list[str]:
    """Some sequences in the layout of DAVIS 2017, which both sides read; their names."""
    names = []
    for sequence in load_data(str(source), name="davis").sequences[:sequences]:
        names.append(sequence.name)
        images, masks = (target / kind / "480p" / sequence.name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(min(frames or len(sequence), len(sequence))):
            file = source / "JPEGImages" / "480p" / sequence.name / f"{sequence.frame_ids[i]}.jpg"
            shutil.copy(file, images / f"{i:05}.jpg")
            (masks / f"{i:05}.png").write_bytes(indexed_png(sequence.mask(i)))
    list_sequences(target, names)
    return names


def draw_davis(target: Path, sequences: int, frames: int, seed: int) -> list[str]:
    """Drawn sequences in the same layout, 480 x 854; their names."""
    names = [f"drawn-{i}" for i in range(sequences)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw_sequence, *zip(*((target, n, frames or 69, seed) for n in names), strict=True)))
    list_sequences(target, names)
    return names


def draw_sequence(target: Path, name: str, frames: int, seed: int) -> None:
    images, masks = (target / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i, (picture, labels) in enumerate(video_scene(generator(seed, "video", name), frames, (480, 854))):
        Image.fromarray(picture).save(images / f"{i:05}.jpg", quality=90)
        (masks / f"{i:05}.png").write_bytes(indexed_png(labels))


def list_sequences(target: Path, names: list[str]) -> None:
    (target / "ImageSets" / "2017").mkdir(parents=True)
    (target / "ImageSets" / "2017" / "val.txt").write_text("".join(f"{name}\n" for name in names))


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Their ``.cuda()`` without a GPU."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            for owner in (torch.Tensor, torch.nn.Module):
                stack.enter_context(mock.patch.object(owner, "cuda", lambda self, *_, **__: self))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


class Theirs:
    """DINO's script and the DAVIS tool."""

    def __init__(self, peers: Path, davis: Path, out: Path, device: str) -> None:
        self.davis, self.out, self.device = davis, out, device
        with on_device(device):
            self.script, self.vits, self.utils = import_from(
                peers / "dino", "eval_video_segmentation", "vision_transformer", "utils"
            )
            self.tool = import_from(peers / "davis2017-evaluation", "davis2017.evaluation")[0]
        self.args = SimpleNamespace(
            output_dir=str(out), n_last_frames=7, size_mask_neighborhood=12, topk=5, patch_size=16
        )
        self.script.args = self.args  # a global of their main program

    def save_checkpoint(self, path: Path, seed: int) -> None:
        """Random weights as their trainer saves them."""
        torch.manual_seed(seed)
        torch.save({"teacher": self.vits.vit_small(patch_size=16, num_classes=0).state_dict()}, path)

    def work(self, checkpoint: Path) -> float:
        """J&F mean, as their main program and the DAVIS tool come to it."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        with on_device(self.device), np.errstate(invalid="ignore"):
            model = self.vits.vit_small(patch_size=16, num_classes=0).cuda()
            self.utils.load_pretrained_weights(model, str(checkpoint), "teacher", "vit_small", 16)
            model.eval()
            palette = np.arange(768, dtype=np.uint8).reshape(-1, 3)
            for name in (self.davis / "ImageSets" / "2017" / "val.txt").read_text().split():
                folder = self.davis / "JPEGImages" / "480p" / name
                frames = self.script.read_frame_list(str(folder))
                first, original = self.script.read_seg(
                    frames[0].replace("JPEGImages", "Annotations").replace("jpg", "png"), 16
                )
                self.script.eval_video_tracking_davis(
                    self.args, model, frames, str(folder), first, original, palette
                )
            found = self.tool.DAVISEvaluation(str(self.davis), "semi-supervised", "val").evaluate(
                str(self.out)
            )
        return float((np.mean(found["J"]["M"]) + np.mean(found["F"]["M"])) / 2)


def our_work(checkpoint: Path, davis: Path, out: Path, precision: str) -> Callable[[], float]:
    """The run as the command does it, without the page."""

    def work() -> float:
        shutil.rmtree(out, ignore_errors=True)
        chosen = {"tasks": ["vos"], "data": [str(davis)], "out": out, "precision": precision}
        config = make_config({"dino": checkpoint}, **chosen, cache_dir=out / "cache")
        with contextlib.redirect_stderr(io.StringIO()):
            (result,) = open_run(make_plan(config), Reporter(), "video_end_to_end.py").execute().results
        assert result.status == "ok", result.error
        score = result.score("jf_mean")
        assert score is not None
        return score.value

    return work


def equal_pixels(ours: Path, theirs: Path) -> float:
    """The share of pixels with the same label in all PNGs."""
    same = total = 0
    for path in sorted(theirs.rglob("*.png")):
        other = next(ours.rglob(f"results/{path.parent.name}/{path.name}"))
        a, b = np.asarray(Image.open(path)), read_indexed_png(other.read_bytes())
        same, total = same + int((a == b).sum()), total + a.size
    return same / total


def compare_all(args: argparse.Namespace, root: Path, device: str) -> dict[str, Any]:
    davis, checkpoint = root / "davis", root / "dino.pth"
    names = (
        copy_davis(args.data, davis, args.sequences, args.frames)
        if args.data
        else draw_davis(davis, args.sequences, args.frames, args.seed)
    )
    files = len(list(davis.rglob("*.jpg")))
    print(f"{len(names)} sequences, {files} frames, on {device}", flush=True)
    theirs = Theirs(args.peers, davis, root / "theirs", device)
    theirs.save_checkpoint(checkpoint, args.seed)
    precisions = dict.fromkeys(("fp32", args.precision))
    ours = {name: our_work(checkpoint, davis, root / name, name) for name in precisions}
    comparisons, found, reference = compare(
        ours, lambda: theirs.work(checkpoint), args.rounds, warm=device != "cpu"
    )
    same = equal_pixels(root / "fp32", root / "theirs")
    scores = ", ".join(f"{name} {score:.6f}" for name, score in found.items())
    print(f"J&F: {scores} (allowed apart {TOLERANCE:g}); equal pixels in fp32 {same:.4%}")
    for one in comparisons:
        rates = [files / np.median(side) for side in (one.ours, one.theirs)]
        print(f"{one.name}: {rates[0]:.1f} frames a second, theirs {rates[1]:.1f}")
    return {
        "comparisons": comparisons,
        "scores": found,
        "reference": reference,
        "equal_pixels": same,
        "frames": files,
    }


def main() -> None:
    parser = options(__doc__, sequences=8, frames=0)
    parser.add_argument("--data", type=Path, help="a DAVIS folder, 2016 or 2017 [drawn sequences]")
    parser.add_argument("--precision", default="fp32", help="of our encoder, beside fp32 [fp32]")
    args = parser.parse_args()
    if args.peers is None:
        parser.error("--peers is needed: there is no end to compare with")
    device = resolve_device("auto")
    facts = start(args, device, args.precision)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        found = compare_all(args, Path(name), device)
    write_json(args.json, facts, found.pop("comparisons"), **found)
    apart = abs(found["scores"]["fp32"] - found["reference"])
    assert apart <= TOLERANCE, "the two sides do not agree"


if __name__ == "__main__":
    main()
