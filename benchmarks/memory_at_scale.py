"""Peak memory of the tasks on cached features, at growing numbers of train images up to ImageNet-1k's.

    python benchmarks/memory_at_scale.py [--sizes 40000 80000 160000 320000 1281167] [--folder DIR]

A synthetic bank is written as the cache writes it: one float32 .npy file of (N, 768) a split, which is then
mapped. Tasks run in a process each, through their own code and a Context over the mapped bank. Two numbers:
    private   peak of anonymous memory (RssAnon, polled every 5 ms from outside) of the whole process, Python
              and its libraries included: what cannot be given back, and what the limit is about.
    mapped    the kernel's largest resident set (VmHWM) less that: pages of the mapped bank and of shared
              libraries, which the kernel drops when others need the memory.
Memory does not depend on the number of optimiser steps, and hardly on that of queries (``--steps`` and
``--queries`` keep it short); L-BFGS is what the linear probe runs up to 100,000 images. Time and memory are
fitted as a * N^b over the sizes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _growth import exponent
from _peer_code import options, peak_memory, start, toy_context, value, write_json

from lmim_bench.bench.types import Array
from lmim_bench.tasks import few_shot, knn, linear

TASKS: dict[str, Any] = {
    "knn": knn.TASK,
    "linear, lbfgs": linear.TASK,
    "linear, sgd": linear.TASK,
    "few_shot": few_shot.TASK,
}
MOST_LBFGS = linear.LinearConfig().lbfgs_max_train
LIMIT = 6 * 1024
FITTED = ("private", "seconds")
_ROWS = 16_384


def write_bank(path: Path, rows: int, args: argparse.Namespace, part: int) -> Array:
    """Noisy classes in a .npy file, block by block; the labels."""
    means = np.random.default_rng([args.seed, 0]).standard_normal(
        (args.classes, args.width), dtype=np.float32
    )
    rng = np.random.default_rng([args.seed, 1, part])
    labels = rng.permutation(np.arange(rows) % args.classes)
    bank = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, args.width))
    for begin in range(0, rows, _ROWS):
        of_block = labels[begin : begin + _ROWS]
        noise = rng.standard_normal((len(of_block), args.width), dtype=np.float32)
        bank[begin : begin + _ROWS] = means[of_block] + args.noise * noise
    bank.flush()
    return labels


def prepare(name: str, settings: dict[str, Any], folder: Path, classes: int) -> Callable[[], dict[str, Any]]:
    """The task over the mapped bank; its headline."""
    splits = [
        (np.load(folder / f"{split}.npy", mmap_mode="r"), np.load(folder / f"{split}-labels.npy"))
        for split in ("train", "test")
    ]
    context, task = toy_context(*splits, n_classes=classes), TASKS[name]

    def work() -> dict[str, Any]:
        begun = time.perf_counter()
        found = context.run(task, **settings)
        headline = task.headline(task.config(**settings))
        return {"seconds": time.perf_counter() - begun, headline: value(found[headline])}

    return work


def main() -> None:
    parser = options(__doc__, peers=False, rounds=None, queries=10_000, steps=200, width=768, classes=1000)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[40_000, 80_000, 160_000, 320_000], help="train images"
    )
    parser.add_argument("--noise", type=float, default=4.0, help="of the synthetic classes [4]")
    parser.add_argument("--folder", type=Path, help="where the banks are written [a temporary folder]")
    args = parser.parse_args()
    facts = start(args)
    settings = {
        "knn": {},
        "linear, lbfgs": {"features": ("cls",), "solver": "lbfgs"},
        "linear, sgd": {"features": ("cls",), "solver": "sgd", "steps": args.steps},
        "few_shot": {"episodes": 0, "classifiers": ("ncm", "knn")},
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    print("task           train      private MB  mapped MB   seconds  headline")
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            for part, (split, count) in enumerate((("train", size), ("test", args.queries))):
                np.save(
                    folder / f"{split}-labels.npy", write_bank(folder / f"{split}.npy", count, args, part)
                )
            for task, options_of_task in settings.items():
                if task == "linear, lbfgs" and size > MOST_LBFGS:
                    continue  # the task itself goes over to SGD here
                build = partial(prepare, task, options_of_task, folder, args.classes)
                memory, found = peak_memory(build, args.threads)
                seconds = found.pop("seconds")
                rows[task].append(
                    {
                        "train": size,
                        "private": memory.total_private,
                        "mapped": memory.mapped,
                        "seconds": seconds,
                    }
                )
                ((headline, score),) = found.items()
                print(
                    f"{task:<14} {size:<10} {memory.total_private:10.0f} {memory.mapped:10.0f} "
                    f"{seconds:9.1f}  "
                    f"{headline} {score:.2%}",
                    flush=True,
                )
    for task, of_task in rows.items():
        if len(of_task) > 1:
            fits = [
                exponent([row["train"] for row in of_task], [row[key] for row in of_task]) for key in FITTED
            ]
            print(f"{task}: private memory ~ N^{fits[0]:.2f}, time ~ N^{fits[1]:.2f}")
    write_json(args.json, facts, [], limit_mb=LIMIT, rows=rows)
    highest = max(row["private"] for of_task in rows.values() for row in of_task)
    print(f"highest private peak {highest:.0f} MB of {LIMIT} allowed")
    assert highest < LIMIT, "a task held too much"


if __name__ == "__main__":
    main()
