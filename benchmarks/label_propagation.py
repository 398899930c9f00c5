"""Label propagation without the encoder: ours against the dense form of DINO's script.

    python benchmarks/label_propagation.py [--peers DIR] [--grids 30x52 60x104] [--rounds 5] [--growth]

One frame's soft labels from 8 context frames (the first and the 7 before it), window 12, top 5, at the grid
of patch 16 (30 x 52 tokens) and of patch 8 (60 x 104). Ours is ``Propagator.step``; theirs is
``label_propagation`` of ``eval_video_segmentation.py`` with features that lie in memory in place of the
encoder, and with its mask of the neighbourhood made beforehand: that is a loop in Python once a video, timed
apart.

First both carry the labels of a first frame through a whole synthetic video: the soft labels of every frame
must agree within 1e-5, and so must the mean J&F of the label maps that each makes of them in its own way. The
peak of memory is that of a process of its own beyond its inputs. ``--peers DIR`` is a folder with a checkout
of facebookresearch/dino named ``dino``; without it the same dense computation is written out plainly.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from _growth import growth
from _patches import import_from
from _peer_code import compare, find_peer, options, start, write_json
from torch import Tensor
from torch.nn import functional as F

from lmim_bench.tasks._math.davis_frames import resize_labels
from lmim_bench.tasks._math.davis_metrics import frame_scores
from lmim_bench.tasks._math.propagation import Propagator, harden

RADIUS, TOPK, CONTEXT, TEMPERATURE = 12, 5, 7, 0.1
FRAMES = CONTEXT + 3
FULL_SIZE = (480, 854)
TOLERANCE = 1e-5
GROWTH_GRIDS = {"ours": ((22, 38), (30, 52), (42, 74), (60, 104)), "theirs": ((15, 26), (22, 38), (30, 52))}
GROWTH_FRAMES = (8, 16, 32, 64)


class Side(Protocol):
    """A video under way."""

    def step(self, features: Tensor) -> Tensor:
        """Soft labels (h, w, C) of the next frame from its features (h, w, D)."""

    def label_map(self, soft: Tensor, scale: int) -> np.ndarray[Any, Any]:
        """The strongest label of every pixel of a frame of full size."""


class Ours:
    def __init__(self, features: Tensor, labels: Tensor, peers: Path | None) -> None:
        settings = {"context": CONTEXT, "radius": RADIUS, "topk": TOPK, "temperature": TEMPERATURE}
        self.step = Propagator(features, labels, **settings).step  # type: ignore[arg-type]

    def label_map(self, soft: Tensor, scale: int) -> np.ndarray[Any, Any]:
        return resize_labels(harden(soft, scale).numpy(), FULL_SIZE)


class Theirs:
    """DINO's function, and around it the queue of its main loop."""

    def __init__(self, features: Tensor, labels: Tensor, peers: Path | None) -> None:
        self.h, self.w, self.width = features.shape
        self.code = dino(peers) if peers else None
        self.first = flat(features), labels.permute(2, 0, 1)[None]
        self.queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=CONTEXT)
        begun = time.perf_counter()
        mask = self.code.restrict_neighborhood(self.h, self.w) if self.code else neighbourhood(self.h, self.w)
        self.seconds_of_mask = time.perf_counter() - begun
        self.mask = mask[None]

    def step(self, features: Tensor) -> Tensor:
        context = [self.first, *self.queue]
        known, segments = [pair[0] for pair in context], [pair[1] for pair in context]
        mask = self.mask.expand(len(context), -1, -1)
        if self.code:
            model = SimpleNamespace(
                patch_embed=SimpleNamespace(patch_size=1),
                get_intermediate_layers=lambda frame, n: [F.pad(features.flatten(0, 1), (0, 0, 1, 0))[None]],
            )
            frame = features.new_empty(3, self.h, self.w)
            found, kept, _ = self.code.label_propagation(self.code.args, model, frame, known, segments, mask)
        else:
            found, kept = dense(features, known, segments, mask), flat(features)
        self.queue.append((kept, found))
        return found[0].permute(1, 2, 0)

    def label_map(self, soft: Tensor, scale: int) -> np.ndarray[Any, Any]:
        maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=scale, mode="bilinear")[0]
        maps = self.code.norm_mask(maps) if self.code else stretched(maps)
        return resize_labels(maps.max(dim=0).indices.numpy().astype(np.uint8), FULL_SIZE)


def dino(peers: Path) -> ModuleType:
    """Their script as a module, kept on the CPU."""
    code: ModuleType = import_from(peers / "dino", "eval_video_segmentation")[0]
    code.args = SimpleNamespace(size_mask_neighborhood=RADIUS, topk=TOPK)  # a global of their main program
    mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self).start()
    return code


def flat(features: Tensor) -> Tensor:
    """(h, w, D) as (D, h * w), the form in which theirs keeps a frame."""
    return features.flatten(0, 1).T


def neighbourhood(h: int, w: int) -> Tensor:
    """1 where a token may look at another one, (h * w, h * w)."""
    near = [((torch.arange(n)[:, None] - torch.arange(n)).abs() <= RADIUS).float() for n in (h, w)]
    return torch.kron(*near)


def dense(features: Tensor, known: list[Tensor], segments: list[Tensor], mask: Tensor) -> Tensor:
    """All pairs with all context frames, masked; only the k largest count, divided by their sum."""
    target = F.normalize(features.flatten(0, 1), dim=1).expand(len(known), -1, -1)
    weights = (target @ F.normalize(torch.stack(known), dim=1) / TEMPERATURE).exp() * mask
    weights = weights.transpose(1, 2).flatten(0, 1)  # (all context tokens, targets)
    weights = torch.where(weights < weights.topk(TOPK, dim=0).values[-1], 0, weights)
    weights /= weights.sum(dim=0)
    labels = torch.cat(segments).flatten(2).transpose(0, 1).flatten(1)  # (C, all context tokens)
    return (labels @ weights).view(1, -1, *features.shape[:2])


def stretched(maps: Tensor) -> Tensor:
    """Each label's map from 0 to 1, unless it is empty."""
    out = maps.clone()
    for plane in out:
        if plane.max() > 0:
            plane -= plane.min().clone()
            plane /= plane.max().clone()
    return out


def video(grid: tuple[int, int], width: int, objects: int, seed: int, frames: int) -> tuple[Tensor, Tensor]:
    """Features (T, h, w, D) of a drifting scene with noise, and the objects' one-hot labels (T, h, w, C)."""
    h, w = grid
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(h, w, dtype=torch.long)
    for k in range(objects):
        top, left = (k + 1) * h // (objects + 3), (k + 1) * w // (objects + 2)
        labels[top : top + h // 3, left : left + w // 5] = k + 1
    scene = torch.randn(h, w, width, generator=generator)
    scene += 0.7 * torch.randn(objects + 1, width, generator=generator)[labels]
    places = [(t // 3, t // 2) for t in range(frames)]
    noise = torch.randn(frames, h, w, width, generator=generator)
    features = torch.stack([scene.roll(place, (0, 1)) for place in places]) + 4 * noise
    one_hot = F.one_hot(labels, objects + 1).float()
    return features, torch.stack([one_hot.roll(place, (0, 1)) for place in places])


def under_way(side: type[Any], args: argparse.Namespace, grid: tuple[int, int]) -> Callable[[], Tensor]:
    """The next frame of a video whose context is full."""
    features, labels = video(grid, args.width, args.objects, args.seed, CONTEXT + 2)
    state = side(features[0], labels[0], args.peers)
    if isinstance(state, Theirs):
        state.queue.extend(
            (flat(f), s.permute(2, 0, 1)[None]) for f, s in zip(features[1:-1], labels[1:-1], strict=True)
        )
    else:
        for frame in features[1:-1]:
            state.step(frame)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as free for the work that is measured
    return partial(state.step, features[-1])


def agree(args: argparse.Namespace, grid: tuple[int, int]) -> dict[str, float]:
    """Both sides on one video from its first frame: how far they differ, and the seconds of their mask."""
    features, labels = video(grid, args.width, args.objects, args.seed, FRAMES)
    sides: list[Any] = [side(features[0], labels[0], args.peers) for side in (Ours, Theirs)]
    scale = FULL_SIZE[0] // grid[0]
    apart, scores = 0.0, []
    objects = tuple(range(1, args.objects + 1))
    for frame, truth in zip(features[1:], labels[1:], strict=True):
        soft = [side.step(frame) for side in sides]
        apart = max(apart, float((soft[0] - soft[1]).abs().max()))
        true_map = resize_labels(truth.argmax(dim=-1).numpy().astype(np.uint8), FULL_SIZE)
        maps = [side.label_map(found, scale) for side, found in zip(sides, soft, strict=True)]
        scores.append([np.mean(frame_scores(true_map, found, objects)) for found in maps])
    ours, theirs = np.mean(scores, axis=0)
    print(
        f"{grid[0]} x {grid[1]}, {FRAMES - 1} frames: soft labels differ by {apart:.1e} at most, J&F "
        f"{ours:.6f} and {theirs:.6f} (allowed {TOLERANCE:g}); their mask of the neighbourhood took "
        f"{sides[1].seconds_of_mask:.1f} s, once a video",
        flush=True,
    )
    assert apart <= TOLERANCE, "the two sides do not agree"
    assert abs(ours - theirs) <= TOLERANCE, "the two sides do not agree"
    return {"soft_labels": apart, "jf": abs(ours - theirs), "seconds_of_mask": sides[1].seconds_of_mask}


def whole_video(args: argparse.Namespace, frames: int) -> Callable[[], None]:
    """Ours from the first frame to the last, label maps included, one frame in memory at a time."""
    features, labels = video((30, 52), args.width, args.objects, args.seed, 2)

    def work() -> None:
        state = Ours(features[0], labels[0], None)
        for _ in range(frames - 1):
            state.label_map(state.step(features[1]), 16)

    return work


def grow(args: argparse.Namespace) -> list[dict[str, Any]]:
    def of_tokens(side: type[Any], tokens: int) -> Any:
        grids = {h * w: (h, w) for grids in GROWTH_GRIDS.values() for h, w in grids}
        return partial(under_way, side, args, grids[tokens])

    found = [
        growth(name, [h * w for h, w in GROWTH_GRIDS[name]], partial(of_tokens, side), args.threads, "tokens")
        for name, side in (("ours", Ours), ("theirs", Theirs))
    ]
    of_frames = partial(partial, whole_video, args)
    return [*found, growth("ours, whole videos", GROWTH_FRAMES, of_frames, args.threads, "frames")]


def main() -> None:
    parser = options(__doc__, rounds=5, width=384, objects=2)
    parser.add_argument("--grids", nargs="+", default=["30x52", "60x104"], help="tokens [30x52 60x104]")
    parser.add_argument("--growth", action="store_true", help="time and memory at several sizes as well")
    args = parser.parse_args()
    facts = start(args)
    find_peer(args, "dino", "eval_video_segmentation.py", "facebookresearch/dino")
    comparisons, apart = [], {}
    for name in args.grids:
        h, w = (int(side) for side in name.split("x"))
        apart[name] = agree(args, (h, w))
        builds = partial(under_way, Ours, args, (h, w)), partial(under_way, Theirs, args, (h, w))
        works = builds[0](), builds[1]()
        comparisons += compare({name: works[0]}, works[1], args.rounds, builds, args.threads)[0]
    write_json(args.json, facts, comparisons, apart=apart, growth=grow(args) if args.growth else [])


if __name__ == "__main__":
    main()
