"""How each task's time and memory grow with images, classes, frames and tokens, and how well it is foreseen.

    python benchmarks/growth.py [--tasks knn linear] [--json growth.json] [--plot growth.svg]

Each task runs on made-up features (the encoder's share is left out) at a base size, and along one axis at a
time at other sizes, in a process each, through its own code and with the intervals of its scores. Printed are
the exponents of the lines through time and memory, and beside every measurement what the task's ``work``
says for it, from which ``run --dry-run`` makes its estimate; ``--fit`` prints by how much the constants of
each part should change. ``--imagenet`` measures nothing and prints what is foreseen there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _growth import exponent
from _peer_code import ToyContext, clusters, options, peak_memory, start, toy_context

from lmim_bench.bench.estimate import REFERENCE_RATE, product_rate
from lmim_bench.bench.show import duration
from lmim_bench.bench.stats import score
from lmim_bench.bench.types import (
    Array,
    Dataset,
    EncoderSpec,
    FeatureBank,
    Features,
    TaskSpec,
    Work,
)
from lmim_bench.tasks import get_task

_MEGABYTE = 1e6


def _spec(width: int, depth: int = 12) -> EncoderSpec:
    return EncoderSpec(
        family="toy", arch={}, embed_dim=width, depth=depth, patch_size=16, image_size=224, pooling="cls"
    )


# ------------------------------------------------------------------------------------------- made-up data


def classification(*, train: int, test: int, classes: int, width: int) -> ToyContext:
    """Noisy classes in both splits."""
    made = [clusters(rows, width, classes, 5.0, 0, part=part) for part, rows in enumerate((train, test))]
    return toy_context(*made, n_classes=classes, spec=_spec(width))


@dataclass
class _Masks:
    """A split of segmentation: rectangles of classes, drawn when asked for."""

    ids: Sequence[str]
    classes: int
    side: tuple[int, int] = (360, 480)
    labels: None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Array:
        return np.repeat(self.mask(i)[..., None], 3, axis=2)

    def mask(self, i: int) -> Array:
        blocks = np.random.default_rng(i).integers(self.classes, size=(9, 12)).astype(np.uint8)
        return np.kron(blocks, np.ones((self.side[0] // 9, self.side[1] // 12), dtype=np.uint8))


def segmentation(*, images: int, side: int, classes: int, width: int) -> ToyContext:
    """Patch features on a grid of ``side`` x ``side``, of as many noisy classes as there are."""
    task = get_task("unsup_seg")
    spec = _spec(width).model_copy(update={"image_size": 8 * side})
    rows, _ = clusters(images * side * side, width, classes, 2.0, 0)
    column = task.config().column(spec)  # type: ignore[attr-defined]
    ids = [f"{i:05d}.png" for i in range(images)]
    bank = FeatureBank({column.id: rows.reshape(images, side, side, width)}, ids, None, np.arange(images))
    names = tuple(f"class {c}" for c in range(classes))
    data = Dataset("toy", "segmentation", "toy", names, {"val": _Masks(ids, classes)})  # type: ignore[dict-item]
    return ToyContext(spec, data, {"val": bank})


@dataclass
class _Film:
    """Objects side by side that move to the right on noise."""

    name: str
    frames: int
    objects: int
    size: tuple[int, int] = (480, 854)

    @property
    def frame_ids(self) -> list[str]:
        return [f"{i:05d}" for i in range(self.frames)]

    def __len__(self) -> int:
        return self.frames

    def frame(self, i: int) -> Array:
        noise = np.random.default_rng(0).integers(0, 64, size=(*self.size, 3), dtype=np.uint8)
        return noise + 20 * self.mask(i)[..., None]

    def mask(self, i: int) -> Array:
        mask = np.zeros(self.size, dtype=np.uint8)
        step = self.size[1] // (self.objects + 1)
        for k in range(self.objects):
            left = step * k + 2 * i
            mask[100:380, left : left + step - 10] = k + 1
        return mask

    def head(self, n: int) -> _Film:
        return replace(self, frames=min(n, self.frames))


class _Filmed(ToyContext):
    """Gives tokens without an encoder: noise that is the same for every batch."""

    def encode(self, images: Any, tap: Any, pos_interpolation: Any = None) -> Features:
        grid = (images.shape[2] // self.spec.patch_size, images.shape[3] // self.spec.patch_size)
        generator = torch.Generator().manual_seed(0)
        patches = torch.randn(len(images), *grid, self.spec.embed_dim, generator=generator)
        return Features(None, patches, patches.mean((1, 2)))


def video(*, frames: int, patch: int, objects: int, width: int) -> ToyContext:
    """A film at 480 x 854."""
    spec = _spec(width).model_copy(update={"patch_size": patch})
    data = Dataset("toy", "video", "toy", sequences=(_Film("film", frames, objects),))
    return _Filmed(spec, data, {})


# ------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Case:
    """A task, the data it is run on, and what is varied of either."""

    task: str
    make: Callable[..., ToyContext]
    base: dict[str, int]
    axes: dict[str, tuple[int, ...]]
    protocol: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def name(self) -> str:
        """What the lines and panels are called."""
        return self.title or self.task

    def points(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The axis, and the sizes at each place along it."""
        for axis, places in self.axes.items():
            for place in places:
                yield axis, {**self.base, axis: place}


CASES = (
    Case(
        "knn",
        classification,
        {"train": 20_000, "test": 5_000, "classes": 100, "width": 384},
        {
            "train": (10_000, 20_000, 40_000, 80_000, 160_000),
            "test": (2_500, 5_000, 10_000, 20_000),
            "classes": (10, 100, 1000),
            "width": (192, 384, 768, 1536),
        },
    ),
    Case(
        "linear",
        classification,
        {"train": 5_000, "test": 5_000, "classes": 100, "width": 384},
        {
            "train": (2_500, 5_000, 10_000, 20_000, 40_000),
            "classes": (10, 30, 100, 300, 1000),
            "width": (192, 384, 768),
        },
        title="linear, L-BFGS",
    ),
    Case(
        "linear",
        classification,
        {"train": 20_000, "test": 5_000, "classes": 100, "width": 384, "steps": 60},
        {
            "train": (20_000, 40_000, 80_000, 160_000),
            "steps": (30, 60, 120, 240),
            "classes": (10, 30, 100, 300),
            "width": (192, 384, 768),
        },
        {"solver": "sgd"},
        title="linear, SGD",
    ),
    Case(
        "few_shot",
        classification,
        {"train": 20_000, "test": 5_000, "classes": 100, "width": 384},
        {
            "train": (10_000, 20_000, 40_000, 80_000),
            "test": (2_500, 5_000, 10_000, 20_000, 40_000),
            "classes": (10, 30, 100, 300),
            "width": (192, 384, 768),
        },
    ),
    Case(
        "unsup_seg",
        segmentation,
        {"images": 100, "side": 28, "classes": 20, "width": 384},
        {
            "images": (50, 100, 200, 400, 800),
            "side": (14, 20, 28, 40),
            "classes": (5, 10, 20, 40, 80),
            "width": (192, 384, 768),
        },
    ),
    Case(
        "vos",
        video,
        {"frames": 20, "patch": 16, "objects": 2, "width": 384},
        {
            "frames": (10, 20, 40, 80),
            "patch": (32, 16, 8),
            "objects": (1, 2, 4, 8),
            "width": (192, 384, 768),
        },
    ),
)
_HOLD = 0.02
"""How much a factor of a part is held at 1, against the measurements."""
_OF_PROTOCOL = ("steps",)
"""Axes that are fields of the protocol, not sizes of the data."""


@dataclass(frozen=True)
class Point:
    """A measurement and what was foreseen for it."""

    axis: str
    sizes: dict[str, int]
    seconds: float
    megabytes: float
    work: Work

    @property
    def foreseen(self) -> float:
        return sum(self.work.seconds.values())


def _prepare(case: Case, sizes: dict[str, int]) -> Callable[[], tuple[float, Work]]:
    """Seconds of a point, and what the task says that it will cost."""
    task = get_task(case.task)
    assert task.work is not None
    protocol = {**case.protocol, **{name: sizes[name] for name in _OF_PROTOCOL if name in sizes}}
    small = {name: min(size, _WARM.get(name, size)) for name, size in case.base.items()}
    _score(task, _context(case, small), {**protocol, **({"steps": 1} if "steps" in protocol else {})})
    context = _context(case, sizes)
    foreseen = task.work(task.config(**protocol), context.spec, context.data)

    def work() -> tuple[float, Work]:
        begun = time.perf_counter()
        _score(task, context, protocol)
        return time.perf_counter() - begun, foreseen

    return work


_WARM = {"train": 400, "test": 200, "classes": 10, "images": 8, "side": 8, "frames": 4, "steps": 1}
"""A small run first: libraries load at first use."""


def _context(case: Case, sizes: dict[str, int]) -> ToyContext:
    return case.make(**{name: size for name, size in sizes.items() if name not in _OF_PROTOCOL})


def _score(task: TaskSpec, context: ToyContext, protocol: dict[str, Any]) -> None:
    for measurement in context.run(task, **protocol).values():
        score(measurement, np.random.default_rng(0))


def measure(case: Case, threads: int) -> list[Point]:
    """Every point of a case, printed as it comes."""
    known: dict[str, tuple[float, float, Work]] = {}
    points = []
    for axis, sizes in case.points():
        key = json.dumps(sizes)
        if key not in known:
            memory, (seconds, work) = peak_memory(partial(_prepare, case, sizes), threads)
            known[key] = seconds, memory.private, work
        point = Point(axis, sizes, *known[key])
        points.append(point)
        print(
            f"  {axis:>8} {sizes[axis]:>7}: {point.seconds:8.2f} s, foreseen {point.foreseen:8.2f}; "
            f"{point.megabytes:6.0f} MB, foreseen {point.work.memory / _MEGABYTE:6.0f}",
            flush=True,
        )
    return points


def exponents(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Of time and of memory along each axis."""
    found = {}
    for axis in dict.fromkeys(point.axis for point in points):
        line = [point for point in points if point.axis == axis]
        sizes = [point.sizes[axis] for point in line]
        found[axis] = (
            exponent(sizes, [point.seconds for point in line]),
            exponent(sizes, [max(point.megabytes, 1.0) for point in line]),
        )
    return found


def corrections(points: Sequence[Point]) -> dict[str, float]:
    """The factors of the parts that bring the sums nearest to the measured times, in relative terms.

    What the measurements do not tell apart stays near 1.
    """
    from scipy.optimize import nnls

    parts = list(points[0].work.seconds)
    rows = np.array([[point.work.seconds[part] / point.seconds for part in parts] for point in points])
    hold = _HOLD * len(points) ** 0.5 * np.eye(len(parts))
    factors, _ = nnls(np.vstack([rows, hold]), np.concatenate([np.ones(len(points)), hold.sum(axis=0)]))
    return dict(zip(parts, factors.round(3).tolist(), strict=True))


@dataclass(frozen=True)
class _Sized:
    """A split of which only the size is known."""

    images: int
    labels: None = None

    def __len__(self) -> int:
        return self.images


def print_imagenet() -> None:
    """What the tasks on global features are foreseen to take on ImageNet-1k, beside the encoder."""
    splits = {"train": _Sized(1_281_167), "val": _Sized(50_000)}
    data = Dataset("toy", "classification", "toy", tuple(map(str, range(1000))), splits)  # type: ignore[arg-type]
    for width in (384, 768, 1024):
        for name in ("knn", "linear", "few_shot"):
            task = get_task(name)
            assert task.work is not None
            work = task.work(task.config(), _spec(width), data)
            took = duration(sum(work.seconds.values()))
            print(f"ImageNet-1k, width {width}, {name}: {took}, {work.memory / _MEGABYTE:.0f} MB")


# ------------------------------------------------------------------------------------------- drawing


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Measured time as marks and what is foreseen as lines, a panel a task, from the rows of the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    bases = {case.name: case.base for case in CASES}
    columns = 3
    height = -(-len(rows) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(11, 3.6 * height), layout="constrained", squeeze=False
    )
    for panel, (title, points) in zip(axes.flat[: len(rows)], rows.items(), strict=True):
        for number, axis in enumerate(dict.fromkeys(point["axis"] for point in points)):
            line = [point for point in points if point["axis"] == axis]
            x = [_times(axis, point[axis], bases[title][axis]) for point in line]
            colour = f"C{number}"
            panel.plot(x, [sum(point["parts"].values()) for point in line], color=colour, linewidth=1)
            panel.plot(x, [p["seconds"] for p in line], "o", color=colour, markersize=4, label=axis)
        panel.set(xscale="log", yscale="log", title=title, xlabel="size, times the base", ylabel="seconds")
        for one in (panel.xaxis, panel.yaxis):
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter("{x:g}")
            one.set_minor_formatter(NullFormatter())
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.2)
    for panel in axes.flat[len(rows) :]:
        panel.axis("off")
    figure.suptitle("Time of each task beside the encoder: measured (marks), foreseen (lines)")
    figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def _times(axis: str, size: float, base: float) -> float:
    """A size over the base; of patches, how many there are in a row."""
    return base / size if axis == "patch" else size / base


def main() -> None:
    parser = options(__doc__, peers=False, rounds=None)
    parser.add_argument("--tasks", nargs="+", help="only these [all]")
    parser.add_argument(
        "--fit", action="store_true", help="also print factors for the constants of each part"
    )
    parser.add_argument("--plot", type=Path, help="where a figure goes (.svg, .png or .pdf)")
    parser.add_argument("--imagenet", action="store_true", help="only what is foreseen for ImageNet-1k")
    parser.add_argument("--redraw", type=Path, help="only draw --plot from an earlier --json")
    args = parser.parse_args()
    if args.redraw:
        draw(json.loads(args.redraw.read_text(encoding="utf-8"))["rows"], args.plot)
        return
    if args.imagenet:
        print_imagenet()
        return
    facts = start(args)
    rate = product_rate("cpu")
    print(
        f"matrix products: {rate / 1e9:.0f} GFLOP/s here, {REFERENCE_RATE / 1e9:.0f} on the reference machine"
    )
    results: dict[str, list[Point]] = {}
    for case in CASES:
        title = case.name
        if args.tasks and case.task not in args.tasks:
            continue
        print(f"{title}, base {', '.join(f'{name} {size}' for name, size in case.base.items())}", flush=True)
        results[title] = measure(case, args.threads)
        ratios = [point.foreseen / point.seconds for point in results[title]]
        for axis, (in_time, in_memory) in exponents(results[title]).items():
            print(f"  time grows as {axis}^{in_time:.2f}, memory as {axis}^{in_memory:.2f}")
        print(f"  foreseen / measured: {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        if args.fit:
            print(f"  factors of the parts: {corrections(results[title])}")
    rows = {
        title: [
            {
                "axis": p.axis,
                **p.sizes,
                "seconds": p.seconds,
                "mb": p.megabytes,
                "foreseen_mb": p.work.memory / _MEGABYTE,
                "parts": dict(p.work.seconds),
            }
            for p in points
        ]
        for title, points in results.items()
    }
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        found = {**facts, "rate": rate, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
