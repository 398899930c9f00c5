"""The estimate of `run --dry-run` against the run itself, step by step.

    python benchmarks/foreseen.py [--ckpt REF] [--data DIR ...] [--tasks knn,linear] [--limit N] [--set T.F=V]

The plan is opened and estimated, then carried out with an empty cache, in one process; both as the command
line does it. A ratio above 1 is an estimate that was too high.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from _peer_code import options, start

from lmim_bench.bench.api import make_config
from lmim_bench.bench.config import parse_override
from lmim_bench.bench.estimate import Estimator
from lmim_bench.bench.opening import open_run
from lmim_bench.bench.plan import make_plan
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.show import duration


def main() -> None:
    parser = options(__doc__, peers=False, rounds=None, limit=0)
    parser.add_argument("--ckpt", action="append", help="as for run, repeats [timm:vit_tiny_patch16_224]")
    parser.add_argument("--data", action="append", default=[], help="as for run, repeats [the embedded sets]")
    parser.add_argument("--tasks", default="all", help="comma-separated [all]")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as for run, repeats")
    args = parser.parse_args()
    facts = start(args)
    overrides: dict[str, dict[str, object]] = defaultdict(dict)
    for text in args.sets:
        task, field, value = parse_override(text)
        overrides[task][field] = value
    with tempfile.TemporaryDirectory() as name:
        chosen = {
            "tasks": args.tasks.split(","),
            "data": args.data,
            "overrides": dict(overrides),
            "out": Path(name) / "run",
            "cache_dir": Path(name) / "cache",
            "limit": args.limit or None,
        }
        config = make_config(args.ckpt or ["timm:vit_tiny_patch16_224"], **chosen)
        run = open_run(make_plan(config), Reporter(), "foreseen.py")
        begun = time.perf_counter()
        steps = list(Estimator(run).steps())
        estimating = time.perf_counter() - begun
        begun = time.perf_counter()
        finished = run.execute()
        taken = time.perf_counter() - begun

    measured: dict[tuple[str, str], float] = defaultdict(float)
    for result in finished.results:
        assert result.status == "ok", result.error
        label, data = result.checkpoint.label, result.data.name
        measured[label, f"features of {data}"] += result.seconds["features"]
        measured[label, f"{result.task} on {data}"] += result.seconds["task"] + result.seconds["score"]
    foreseen: dict[tuple[str, str], float] = defaultdict(float)
    for step in steps:
        what = step.what.split("/")[0] if step.what.startswith("features") else step.what.split(",")[0]
        foreseen[step.checkpoint, what] += step.seconds or 0.0
    for (label, what), seconds in foreseen.items():
        real = measured[label, what]
        times = f"foreseen {duration(seconds):>8}, took {duration(real):>8}"
        print(f"{label:<24} {what:<28} {times}: {seconds / real:.2f}")
    total = sum(foreseen.values())
    print(
        f"in all: foreseen {duration(total)}, took {duration(taken)}: {total / taken:.2f}; "
        f"the estimate itself took {estimating:.1f} s"
    )
    if args.json:
        rows = [
            {"checkpoint": label, "what": what, "foreseen": seconds, "measured": measured[label, what]}
            for (label, what), seconds in foreseen.items()
        ]
        found = {"rows": rows, "foreseen": total, "measured": taken, "estimating": estimating}
        args.json.write_text(json.dumps({**facts, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
